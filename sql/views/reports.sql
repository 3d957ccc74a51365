-- Reports that were asked for, and their files.

create or replace view pgharness.report_files with (security_invoker = true) as
select r.id as report_id, named.runs, r.title, c.path, c.media_type, octet_length(c.content) as size_bytes, c.digest, r.finished_at, c.content
  from pgharness.reports as r
  join pgharness.report_contents as c on c.report_id = r.id
 cross join lateral (
       select array(select x.name from unnest(r.run_ids) with ordinality as i (id, place) join pgharness.runs as x on x.id = i.id order by i.place) as runs) as named;
comment on view pgharness.report_files is
'One row per file of a report that a worker made; `pgharness report --fetch ID --out DIR` writes them. Example: select convert_from(content, ''UTF8'') from pgharness.report_files where report_id = 1 and path = ''report.md'';';
comment on column pgharness.report_files.runs is 'The runs that are reported on, the first one first.';
comment on column pgharness.report_files.title is 'What the report is headed.';
comment on column pgharness.report_files.media_type is 'As HTTP has it: text/html, image/svg+xml.';
comment on column pgharness.report_files.size_bytes is 'Of the content.';
comment on column pgharness.report_files.path is 'Below the report''s folder: report.html, figures/estimates.svg.';
comment on column pgharness.report_files.digest is 'SHA-256 of the content.';
comment on column pgharness.report_files.content is 'The file: of a text in UTF-8.';

create or replace view pgharness.run_rubric_authors with (security_invoker = true) as
select used.run_id, r.name as run, ru.author, bool_and(ru.is_human) as is_human, count(*) as rubric_count,
       sum(jsonb_array_length(ru.criteria))::bigint as criterion_count
  from (select distinct rr.run_id, rr.rubric_id from pgharness.run_rubrics as rr) as used
  join pgharness.runs as r on r.id = used.run_id
  join pgharness.rubrics as ru on ru.id = used.rubric_id
 group by used.run_id, r.name, ru.author;
comment on view pgharness.run_rubric_authors is
'One row per run and author of rubrics that its grades go by: how many rubrics, with how many criteria. Example: select author, rubric_count from pgharness.run_rubric_authors where run_id = 1;';
comment on column pgharness.run_rubric_authors.is_human is 'Whether people wrote all of them.';
comment on column pgharness.run_rubric_authors.rubric_count is 'Rubrics of theirs that are used.';
comment on column pgharness.run_rubric_authors.criterion_count is 'Criteria in these.';

create or replace view pgharness.run_metric_totals with (security_invoker = true) as
select m.run_id, r.name as run, m.name, count(*) as value_count, avg(m.value) as mean_value, min(m.value) as min_value, max(m.value) as max_value,
       (array_agg(m.value order by m.id desc))[1] as last_value
  from pgharness.metrics as m
  join pgharness.runs as r on r.id = m.run_id
 where m.value not in ('NaN', 'Infinity', '-Infinity')
 group by m.run_id, r.name, m.name;
comment on view pgharness.run_metric_totals is
'One row per run and metric that its code recorded: its finite values in short. Example: select name, mean_value from pgharness.run_metric_totals where run_id = 1;';
comment on column pgharness.run_metric_totals.last_value is 'The value that was recorded last.';
comment on column pgharness.run_metric_totals.value_count is 'How many there are.';
comment on column pgharness.run_metric_totals.mean_value is 'Their mean.';
comment on column pgharness.run_metric_totals.min_value is 'The lowest.';
comment on column pgharness.run_metric_totals.max_value is 'The highest.';
