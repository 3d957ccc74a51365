-- What runs found: notes, grades, criteria, scores with their uncertainty, agreement between graders, and how it was all made.

create or replace view pgharness.note_results with (security_invoker = true) as
select n.run_id, r.name as run, ca.name as case_name, c.name as combination, n.overlap, n.replication,
       n.output #>> '{}' as note, grade.score, grade.grade_count,
       n.attempts, call.input_tokens, call.output_tokens, call.cost_usd, call.latency_ms, n.created_at,
       rc.case_id, n.ordinal as note_ordinal, n.output
  from pgharness.notes as n
  join pgharness.runs as r on r.id = n.run_id
  join pgharness.run_cases as rc on rc.run_id = n.run_id and rc.number = n.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = n.run_id and c.number = n.combination_number
 cross join lateral (
       select round(avg(g.score / g.max_score), 4) as score, count(*) as grade_count
         from pgharness.grades as g where g.run_id = n.run_id and g.note_ordinal = n.ordinal) as grade
 cross join lateral (
       select sum(k.input_tokens) as input_tokens, sum(k.output_tokens) as output_tokens, sum(k.cost_usd) as cost_usd,
              max(k.latency_ms) filter (where k.outcome = 'succeeded') as latency_ms
         from pgharness.calls as k where k.run_id = n.run_id and k.kind = 'note' and k.ordinal = n.ordinal) as call;
comment on view pgharness.note_results is
'One row per note that was written. Example: select case_name, note, score from pgharness.note_results where run_id = 1;';
comment on column pgharness.note_results.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.note_results.replication is 'Which note of its case, combination and overlap it is (from 1).';
comment on column pgharness.note_results.note is 'The text; of what a program gave as JSON, its text (output has the JSON).';
comment on column pgharness.note_results.score is 'Mean of its grades, each as a share of the highest possible score (0..1); null without grades.';
comment on column pgharness.note_results.attempts is 'Tries it took, rate limits included.';
comment on column pgharness.note_results.input_tokens is 'Of all its tries together; likewise output_tokens and cost_usd.';
comment on column pgharness.note_results.latency_ms is 'Of the call that gave it.';
comment on column pgharness.note_results.note_ordinal is 'Its number in the run''s plan, from 0: grade_results and criterion_results have it too.';
comment on column pgharness.note_results.output is 'A JSON string for a text, or the object that a program or callable gave.';

create or replace view pgharness.grade_results with (security_invoker = true) as
select g.run_id, r.name as run, ca.name as case_name, c.name as combination, n.overlap, n.replication,
       ru.author as rubric_author, g.replication as grade_replication,
       round(g.score / g.max_score, 4) as normalised_score, g.score, g.max_score,
       g.attempts, call.input_tokens, call.output_tokens, call.cost_usd, call.latency_ms, g.created_at,
       rc.case_id, g.note_ordinal, g.rubric_id, g.ordinal
  from pgharness.grades as g
  join pgharness.notes as n on n.run_id = g.run_id and n.ordinal = g.note_ordinal
  join pgharness.runs as r on r.id = g.run_id
  join pgharness.run_cases as rc on rc.run_id = g.run_id and rc.number = n.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = g.run_id and c.number = n.combination_number
  left join pgharness.rubrics as ru on ru.id = g.rubric_id
 cross join lateral (
       select sum(k.input_tokens) as input_tokens, sum(k.output_tokens) as output_tokens, sum(k.cost_usd) as cost_usd,
              max(k.latency_ms) filter (where k.outcome = 'succeeded') as latency_ms
         from pgharness.calls as k where k.run_id = g.run_id and k.kind = 'grade' and k.ordinal = g.ordinal) as call;
comment on view pgharness.grade_results is
'One row per grade: one scoring of a note by a rubric, or against its case''s target. Example: select case_name, rubric_author, normalised_score from pgharness.grade_results where run_id = 1;';
comment on column pgharness.grade_results.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.grade_results.replication is 'Which note of its case, combination and overlap was graded (from 1).';
comment on column pgharness.grade_results.rubric_author is 'Whose rubric it is by; null for a grade against the target.';
comment on column pgharness.grade_results.grade_replication is 'Which grade of its note and rubric it is (from 1).';
comment on column pgharness.grade_results.normalised_score is 'score / max_score (0..1).';
comment on column pgharness.grade_results.score is 'Sum of the criteria''s scores, each weight x satisfaction / 100; or what the metric gave.';
comment on column pgharness.grade_results.max_score is 'Sum of the criteria''s weights; or the most that the metric gives.';
comment on column pgharness.grade_results.attempts is 'Tries it took, rate limits included.';
comment on column pgharness.grade_results.input_tokens is 'Of all its tries together; likewise output_tokens and cost_usd. Null for a metric, which makes no call.';
comment on column pgharness.grade_results.latency_ms is 'Of the call that gave it.';
comment on column pgharness.grade_results.note_ordinal is 'The note''s number in the run''s plan, from 0.';
comment on column pgharness.grade_results.ordinal is 'The grade''s number in the run''s plan.';

create or replace view pgharness.criterion_results with (security_invoker = true) as
select g.run_id, r.name as run, ca.name as case_name, c.name as combination, n.overlap, n.replication,
       ru.author as rubric_author, g.replication as grade_replication,
       part.number::integer as criterion_number, part.criterion, part.weight, part.satisfaction, part.score, part.rationale,
       rc.case_id, g.note_ordinal, g.rubric_id, g.ordinal
  from pgharness.grades as g
  join pgharness.notes as n on n.run_id = g.run_id and n.ordinal = g.note_ordinal
  join pgharness.runs as r on r.id = g.run_id
  join pgharness.run_cases as rc on rc.run_id = g.run_id and rc.number = n.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = g.run_id and c.number = n.combination_number
  left join pgharness.rubrics as ru on ru.id = g.rubric_id
 cross join lateral (
       select asked.number, asked.value ->> 'criterion' as criterion, (asked.value ->> 'weight')::numeric as weight,
              (judged.value ->> 'satisfaction')::numeric as satisfaction, (judged.value ->> 'score')::numeric as score, judged.value ->> 'rationale' as rationale
         from jsonb_array_elements(coalesce(ru.criteria, pgharness._target_criteria())) with ordinality as asked (value, number)
         join jsonb_array_elements(g.criteria) with ordinality as judged (value, number) on judged.number = asked.number
       union all
       select 1, case when c.grader ->> 'provider' = 'metric' then c.grader ->> 'model' end, g.max_score, round(100 * g.score / g.max_score, 4), g.score, null where g.criteria = '[]') as part;
comment on view pgharness.criterion_results is
'One row per grade and criterion of its rubric, in the rubric''s order; a grade by a metric has one row, named after the metric. Example: select criterion, avg(satisfaction) from pgharness.criterion_results where run_id = 1 group by criterion;';
comment on column pgharness.criterion_results.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.criterion_results.replication is 'Which note of its case, combination and overlap was graded (from 1).';
comment on column pgharness.criterion_results.rubric_author is 'Whose rubric the criterion is of; null for a grade against the target.';
comment on column pgharness.criterion_results.grade_replication is 'Which grade of its note and rubric it is part of (from 1).';
comment on column pgharness.criterion_results.criterion_number is 'Its place in the rubric (from 1).';
comment on column pgharness.criterion_results.satisfaction is 'How far the note meets the criterion, as the grader judged (0..100).';
comment on column pgharness.criterion_results.score is 'weight x satisfaction / 100.';
comment on column pgharness.criterion_results.rationale is 'Why, in the grader''s words.';
comment on column pgharness.criterion_results.note_ordinal is 'The note''s number in the run''s plan, from 0.';
comment on column pgharness.criterion_results.ordinal is 'The grade''s number in the run''s plan.';

create or replace view pgharness.run_results with (security_invoker = true) as
select distinct on (x.run_id, x.key) x.run_id, r.name as run, x.key, x.value, x.created_at
  from pgharness.results as x
  join pgharness.runs as r on r.id = x.run_id
 order by x.run_id, x.key, x.id desc;
comment on view pgharness.run_results is 'One row per run and key: the latest value that record_result() was given.';

create or replace view pgharness.scores with (security_invoker = true) as
select r.id as run_id, r.name as run, ca.name as case_name, c.name as combination, place.overlap, ru.author as rubric_author,
       s.note_count, s.grade_count, round(s.mean_score::numeric, 4) as mean_score, round(sqrt(s.squares / nullif(s.note_count - 1, 0))::numeric, 4) as replication_sd,
       round(s.min_score::numeric, 4) as min_score, round(s.max_score::numeric, 4) as max_score, rc.case_id
  from pgharness.runs as r
  join pgharness.run_definitions as d on d.run_id = r.id
 cross join lateral pgharness._score_sums(r.id) as s
 cross join lateral pgharness._note_place(d, s.cell) as place
  join pgharness.run_cases as rc on rc.run_id = r.id and rc.number = place.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = place.combination_number
  left join pgharness.run_rubrics as rr on rr.run_id = r.id and rr.case_number = place.case_number and rr.number = s.rubric_number
  left join pgharness.rubrics as ru on ru.id = rr.rubric_id;
comment on view pgharness.scores is
'One row per run, case, combination, transcript overlap and rubric author that has grades: their scores, as shares of the highest possible (0..1). Example: select * from pgharness.scores where run_id = 1;';
comment on column pgharness.scores.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.scores.rubric_author is 'Null for grades against the target.';
comment on column pgharness.scores.note_count is 'Notes with a grade by this author''s rubric.';
comment on column pgharness.scores.mean_score is 'Mean over those notes of each one''s mean grade.';
comment on column pgharness.scores.replication_sd is 'Standard deviation (n - 1) of those notes'' mean grades: the spread between note replications. Null for one note.';
comment on column pgharness.scores.min_score is 'Lowest mean grade of a note.';
comment on column pgharness.scores.max_score is 'Highest mean grade of a note.';

create or replace view pgharness.combination_scores with (security_invoker = true) as
select r.id as run_id, r.name as run, s.combination, s.case_count, s.note_count, s.grade_count,
       round(s.mean_score::numeric, 4)                                            as mean_score,
       round(s.standard_error::numeric, 4)                                        as standard_error,
       round((s.mean_score - quantile.t * s.standard_error)::numeric, 4)          as confidence_low,
       round((s.mean_score + quantile.t * s.standard_error)::numeric, 4)          as confidence_high,
       round(s.replication_sd::numeric, 4)                                        as replication_sd,
       round(s.min_score::numeric, 4) as min_score, round(s.max_score::numeric, 4) as max_score
  from pgharness.runs as r
 cross join lateral (
       with note as materialized (
           select place.combination_number, place.case_number, n.*
             from pgharness.run_definitions as d
            cross join pgharness._note_sums(r.id) as n
            cross join lateral pgharness._note_place(d, n.cell) as place
            where d.run_id = r.id
       ), cell as (
           -- replications differ by chance alone only within one case and one overlap
           select c.number, c.name, note.case_number, coalesce(note.note_count, 0) as note_count, coalesce(note.scored_count, 0) as scored_count,
                  coalesce(note.grade_count, 0) as grade_count, note.total, note.lowest, note.highest,
                  coalesce(note.squares, 0) as squares, greatest(note.scored_count - 1, 0) as freedom
             from pgharness.run_combinations as c
             left join note on note.combination_number = c.number
            where c.run_id = r.id
       ), cluster as (
           select cell.number, cell.name, sum(cell.note_count) as note_count, sum(cell.grade_count) as grade_count, sum(cell.scored_count) as scored_count,
                  sum(cell.total) as total, min(cell.lowest) as lowest, max(cell.highest) as highest, sum(cell.squares) as squares, sum(cell.freedom) as freedom,
                  sum(sum(cell.total)) over (partition by cell.number) / nullif(sum(sum(cell.scored_count)) over (partition by cell.number), 0)::double precision as mean
             from cell group by cell.number, cell.name, cell.case_number
       )
       select x.number, x.name as combination, count(x.total) as case_count, sum(x.note_count)::bigint as note_count, sum(x.grade_count)::bigint as grade_count,
              max(x.mean) as mean_score,
              case when count(x.total) >= 2
                   then sqrt(count(x.total) / (count(x.total) - 1.0)::double precision * sum((x.total - x.scored_count * x.mean) ^ 2)) / sum(x.scored_count) end as standard_error,
              sqrt(sum(x.squares) / nullif(sum(x.freedom), 0)::double precision) as replication_sd, min(x.lowest) as min_score, max(x.highest) as max_score
         from cluster as x group by x.number, x.name) as s
 cross join lateral (select pgharness._student_t(s.case_count - 1) as t) as quantile;
comment on view pgharness.combination_scores is
'One row per run and combination: the mean score of its notes (each the mean of its grades, as shares of the highest possible, 0..1) with a standard error clustered by case. Notes of one case are alike, so cases are what is sampled: with G cases, N scored notes y and their mean m, SE = sqrt(G / (G - 1) * sum over cases of (sum over the case''s notes of (y - m))^2) / N, the CR1 cluster-robust variance of a mean (Liang and Zeger 1986; Cameron and Miller 2015), and the 95% interval is m -+ t(G - 1) * SE. Example: select combination, mean_score, standard_error from pgharness.combination_scores where run_id = 1;';
comment on column pgharness.combination_scores.case_count is 'Cases with a scored note: the clusters, G.';
comment on column pgharness.combination_scores.note_count is 'Notes written, scored or not yet.';
comment on column pgharness.combination_scores.standard_error is 'Clustered by case; null for fewer than 2 cases.';
comment on column pgharness.combination_scores.confidence_low is
'Lower end of the 95% confidence interval, by Student''s t with cases - 1 degrees of freedom; not cut off at 0. For the difference of two combinations compare case by case, not interval with interval.';
comment on column pgharness.combination_scores.confidence_high is 'Upper end of the 95% confidence interval; not cut off at 1.';
comment on column pgharness.combination_scores.replication_sd is
'Spread between note replications: the standard deviation within case and overlap, pooled (sum of squares / sum of n - 1). Null without replications.';
comment on column pgharness.combination_scores.min_score is 'Lowest score of a note.';
comment on column pgharness.combination_scores.max_score is 'Highest score of a note.';

create or replace view pgharness.author_agreement with (security_invoker = true) as
select r.id as run_id, r.name as run, c.name as combination, s.author_a, s.author_b, s.note_count,
       round((s.difference / s.note_count)::numeric, 4)  as mean_difference,
       round((s.differences / s.note_count)::numeric, 4) as mean_absolute_difference,
       -- a constant has no correlation, and rounding errors must not give it one
       case when s.is_varied and s.squares_a > 0 and s.squares_b > 0
            then round((s.products / (sqrt(s.squares_a) * sqrt(s.squares_b)))::numeric, 4) end as correlation
  from pgharness.runs as r
 cross join lateral (
       with pair as materialized (
           -- which of two authors comes first among a case's rubrics differs between cases
           select place.combination_number, least(a.author, b.author) as author_a, greatest(a.author, b.author) as author_b, p.note_count, p.products, p.differences, x.*
             from pgharness.run_definitions as d
            cross join pgharness._pair_sums(r.id) as p
            cross join lateral pgharness._note_place(d, p.cell) as place
             join pgharness.run_rubrics as of_a on of_a.run_id = r.id and of_a.case_number = place.case_number and of_a.number = p.rubric_a
             join pgharness.rubrics as a on a.id = of_a.rubric_id
             join pgharness.run_rubrics as of_b on of_b.run_id = r.id and of_b.case_number = place.case_number and of_b.number = p.rubric_b
             join pgharness.rubrics as b on b.id = of_b.rubric_id
            cross join lateral (
                  select p.total_a, p.total_b, p.squares_a, p.squares_b, p.min_a, p.max_a, p.min_b, p.max_b where a.author < b.author
                  union all
                  select p.total_b, p.total_a, p.squares_b, p.squares_a, p.min_b, p.max_b, p.min_a, p.max_a where a.author >= b.author) as x
            where d.run_id = r.id
       )
       select p.combination_number, p.author_a, p.author_b, sum(p.note_count)::bigint as note_count,
              sum(p.total_a - p.total_b) as difference, sum(p.differences) as differences,
              sum(p.note_count)::double precision * sum(p.products) - sum(p.total_a) * sum(p.total_b) as products,
              sum(p.note_count)::double precision * sum(p.squares_a) - sum(p.total_a) ^ 2 as squares_a,
              sum(p.note_count)::double precision * sum(p.squares_b) - sum(p.total_b) ^ 2 as squares_b,
              min(p.min_a) < max(p.max_a) and min(p.min_b) < max(p.max_b) as is_varied
         from pair as p
        group by p.combination_number, p.author_a, p.author_b) as s
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = s.combination_number;
comment on view pgharness.author_agreement is
'One row per run, combination and pair of rubric authors: how far notes graded by the rubrics of both get the same score (0..1; of several grades by one rubric the mean). Example: select * from pgharness.author_agreement where run_id = 1;';
comment on column pgharness.author_agreement.author_a is 'The first of the two by alphabet.';
comment on column pgharness.author_agreement.note_count is 'Notes graded by rubrics of both.';
comment on column pgharness.author_agreement.mean_difference is 'Mean of a - b: above 0 when the rubrics of author_a give more.';
comment on column pgharness.author_agreement.correlation is 'Pearson''s r over those notes; null when either score never varies.';

create or replace view pgharness.replication_agreement with (security_invoker = true) as
select r.id as run_id, r.name as run, c.name as combination, s.rubric_author, s.note_count, s.grade_count,
       round(sqrt(s.squares / s.freedom)::numeric, 4)      as replication_sd,
       round((s.differences / s.pair_count)::numeric, 4)   as mean_absolute_difference
  from pgharness.runs as r
 cross join lateral (
       select place.combination_number, ru.author as rubric_author, sum(p.note_count)::bigint as note_count, sum(p.grade_count)::bigint as grade_count,
              sum(p.squares) as squares, sum(p.grade_count - p.note_count)::double precision as freedom,
              sum(p.differences) as differences, sum(p.pair_count)::double precision as pair_count
         from pgharness.run_definitions as d
        cross join pgharness._spread_sums(r.id) as p
        cross join lateral pgharness._note_place(d, p.cell) as place
         left join pgharness.run_rubrics as rr on rr.run_id = r.id and rr.case_number = place.case_number and rr.number = p.rubric_number
         left join pgharness.rubrics as ru on ru.id = rr.rubric_id
        where d.run_id = r.id
        group by place.combination_number, ru.author) as s
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = s.combination_number;
comment on view pgharness.replication_agreement is
'One row per run, combination and rubric author with several grades of a note: how far the grader agrees with itself (scores 0..1). Example: select * from pgharness.replication_agreement where run_id = 1;';
comment on column pgharness.replication_agreement.rubric_author is 'Null for grades against the target.';
comment on column pgharness.replication_agreement.note_count is 'Notes with at least two grades by this author''s rubric; grade_count is theirs.';
comment on column pgharness.replication_agreement.replication_sd is
'Standard deviation between grades of one note and rubric, pooled over notes (sum of squares / sum of n - 1).';
comment on column pgharness.replication_agreement.mean_absolute_difference is 'Mean over all pairs of grades of one note and rubric.';

create or replace view pgharness.run_provenance with (security_invoker = true) as
select r.id as run_id, r.name as run, r.instance, r.kind, r.created_by as started_by, r.created_at as started_at, origin.name as rerun_of,
       (d.definition ->> 'seed')::bigint as seed, d.definition ->> 'software_version' as software_version, d.definition ->> 'experiment' as experiment,
       d.definition -> 'config' as config, d.case_count, d.definition ->> 'cases_digest' as cases_digest, d.transcript_overlaps,
       (d.definition ->> 'note_replications')::integer as note_replications, (d.definition ->> 'grade_replications')::integer as grade_replications,
       (select jsonb_agg(jsonb_build_object('combination', c.name, 'generator', c.generator, 'grader', c.grader) order by c.number)
          from pgharness.run_combinations as c where c.run_id = r.id) as models,
       d.definition -> 'prompts' as prompts, d.definition,
       worker.versions as worker_versions, worker.git_commits as worker_git_commits, worker.environments as worker_environments,
       (select jsonb_agg(jsonb_build_object('version', v.number, 'digest', v.digest, 'module', v.module, 'function', v.function, 'git_commit', v.git_commit, 'is_dirty', v.is_dirty) order by v.number)
          from pgharness.run_versions as rv join pgharness.experiment_versions as v on v.id = rv.version_id where rv.run_id = r.id) as code,
       coalesce(r.response_cache, 'off') as response_cache
  from pgharness.runs as r
  join pgharness.run_definitions as d on d.run_id = r.id
  left join pgharness.runs as origin on origin.id = r.rerun_of_id
 cross join lateral (
       select coalesce(array_agg(distinct w.version), '{}') as versions,
              coalesce(array_agg(distinct (w.environment ->> 'git_commit') || case when w.environment ->> 'git_is_dirty' = 'true' then ' (dirty)' else '' end)
                       filter (where w.environment ->> 'git_commit' is not null), '{}') as git_commits,
              coalesce(jsonb_agg(distinct w.environment), '[]') as environments
         from pgharness.run_workers as rw join pgharness.workers as w on w.id = rw.worker_id
        where rw.run_id = r.id) as worker;
comment on view pgharness.run_provenance is
'One row per run: how it was made, as frozen at its start. run_cases and run_rubrics have its cases and rubrics. Example: select * from pgharness.run_provenance where run_id = 1;';
comment on column pgharness.run_provenance.instance is 'Its present name; definition has the one at the start.';
comment on column pgharness.run_provenance.started_by is 'The database role that started it.';
comment on column pgharness.run_provenance.rerun_of is 'The run whose definition it repeats, if any.';
comment on column pgharness.run_provenance.software_version is 'Git commit or tag at which a command generator''s repository was run.';
comment on column pgharness.run_provenance.cases_digest is 'SHA-256 over the digests of its cases, in order: equal for runs of equal cases.';
comment on column pgharness.run_provenance.models is 'One object per combination, with its generator and grader as they were: parameters, limits, prices; never a key.';
comment on column pgharness.run_provenance.prompts is 'The templates: note_system, note, grade_system, grade.';
comment on column pgharness.run_provenance.definition is 'All of the frozen instance.';
comment on column pgharness.run_provenance.worker_versions is 'Versions of pgharness that worked on it.';
comment on column pgharness.run_provenance.worker_git_commits is 'Git commits of the directories that its workers ran in, with "(dirty)" where files were changed.';
comment on column pgharness.run_provenance.worker_environments is 'Python, platform and package versions of its workers, each different one once.';
comment on column pgharness.run_provenance.response_cache is 'How it used the response cache: off, read, write or replay; calls of outcome cached say which answers came from there.';
comment on column pgharness.run_provenance.code is 'Of a run of code: the versions of it that were executed, with their git commit; experiment_versions has their source and what was not committed.';

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

-- what these views called before
drop function if exists pgharness._scores(bigint), pgharness._note_scores(bigint), pgharness._author_pairs(bigint), pgharness._replication_spread(bigint);
