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
