-- What statistics say of runs: means and differences straight from the grades, and what analyses found.

create or replace view pgharness.combination_estimates with (security_invoker = true) as
select r.id as run_id, r.name as run, c.name as combination, s.grade_count, s.note_count, s.case_count, s.mean_score, s.standard_error,
       s.mean_score - pgharness._student_t(s.case_count - 1) * s.standard_error as confidence_low,
       s.mean_score + pgharness._student_t(s.case_count - 1) * s.standard_error as confidence_high
  from pgharness.runs as r
 cross join lateral (
       select k.combination_number, sum(k.grade_count)::bigint as grade_count, sum(k.note_count)::bigint as note_count, count(*) as case_count,
              avg(k.mean_score) as mean_score, stddev_samp(k.mean_score) / sqrt(count(*)::double precision) as standard_error
         from pgharness._case_scores(r.id) as k group by k.combination_number) as s
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = s.combination_number;
comment on view pgharness.combination_estimates is
'One row per run and combination with grades: the mean over cases of each case''s mean score (0..1), its standard error over cases, and its 95% interval by Student''s t. What analyses report. It differs from combination_scores, whose mean is over notes, where cases have different numbers of graded notes. Example: select combination, mean_score, confidence_low, confidence_high from pgharness.combination_estimates where run_id = 1;';
comment on column pgharness.combination_estimates.note_count is 'Notes with a grade.';
comment on column pgharness.combination_estimates.case_count is 'Cases with a grade: what is sampled.';
comment on column pgharness.combination_estimates.mean_score is 'Every case counts once: of its graded notes, each the mean of its grades.';
comment on column pgharness.combination_estimates.standard_error is 'Clustered by case: the standard deviation of the cases'' means / the root of their number. Null for one case.';
comment on column pgharness.combination_estimates.confidence_low is 'Lower end of the 95% confidence interval, by Student''s t with cases - 1 degrees of freedom; not cut off at 0.';
comment on column pgharness.combination_estimates.confidence_high is 'Upper end of the 95% confidence interval; not cut off at 1.';

create or replace view pgharness.paired_differences with (security_invoker = true) as
select r.id as run_id, r.name as run, a.name as combination_a, b.name as combination_b, s.case_count, s.mean_difference, s.standard_error,
       s.mean_difference - pgharness._student_t(s.case_count - 1) * s.standard_error as confidence_low,
       s.mean_difference + pgharness._student_t(s.case_count - 1) * s.standard_error as confidence_high
  from pgharness.runs as r
 cross join lateral (
       with score as materialized (select k.combination_number as number, k.case_number, k.mean_score from pgharness._case_scores(r.id) as k)
       select x.number as number_a, y.number as number_b, count(*) as case_count, avg(x.mean_score - y.mean_score) as mean_difference,
              stddev_samp(x.mean_score - y.mean_score) / sqrt(count(*)::double precision) as standard_error
         from score as x join score as y on y.case_number = x.case_number and y.number > x.number
        group by x.number, y.number) as s
  join pgharness.run_combinations as a on a.run_id = r.id and a.number = s.number_a
  join pgharness.run_combinations as b on b.run_id = r.id and b.number = s.number_b;
comment on view pgharness.paired_differences is
'One row per run and pair of its combinations: the mean over the cases that both have grades of, of a''s mean score of the case minus b''s, with its standard error over cases and its 95% interval by Student''s t. Where there are several pairs, an interval without 0 is no finding yet: ask for an analysis, which corrects for them. paired_run_differences() compares two runs. Example: select * from pgharness.paired_differences where run_id = 1;';
comment on column pgharness.paired_differences.combination_a is 'The one that comes first in the run.';
comment on column pgharness.paired_differences.combination_b is 'The other.';
comment on column pgharness.paired_differences.case_count is 'Cases that both have grades of.';
comment on column pgharness.paired_differences.mean_difference is 'a - b: above 0 where a scores higher.';
comment on column pgharness.paired_differences.standard_error is 'Clustered by case: the standard deviation of the cases'' differences / the root of their number. Null for one case.';
comment on column pgharness.paired_differences.confidence_low is 'Lower end of the 95% confidence interval.';
comment on column pgharness.paired_differences.confidence_high is 'Upper end of the 95% confidence interval.';

create or replace view pgharness.analysis_results with (security_invoker = true) as
select a.id as analysis_id, a.kind, named.runs, a.options, a.status, a.error, a.hint,
       a.status = 'succeeded' and a.inputs_digest = pgharness.analysis_digest(a.run_ids) as is_current,
       a.result -> 'warnings' as warnings, a.library_versions, a.inputs_digest, a.requested_by, a.requested_at, a.started_at, a.finished_at,
       round(extract(epoch from a.finished_at - a.started_at), 3) as seconds, a.result, a.run_ids
  from pgharness.analyses as a
 cross join lateral (select array(select r.name from pgharness.runs as r where r.id = any (a.run_ids) order by r.id) as runs) as named;
comment on view pgharness.analysis_results is
'One row per analysis that was asked for, with what came of it; analysis_comparisons, analysis_groups, analysis_measures, analysis_trends and analysis_powers have the parts of its result. Example: select analysis_id, status, error from pgharness.analysis_results order by analysis_id desc;';
comment on column pgharness.analysis_results.runs is 'The runs whose grades are analysed.';
comment on column pgharness.analysis_results.options is 'What was asked for beyond the kind.';
comment on column pgharness.analysis_results.hint is 'What to type next, when it failed.';
comment on column pgharness.analysis_results.is_current is 'Whether the runs are as they were when it was made; if not, asking again makes it anew.';
comment on column pgharness.analysis_results.warnings is 'What weakens it, as a list of texts.';
comment on column pgharness.analysis_results.library_versions is 'What computed it.';
comment on column pgharness.analysis_results.inputs_digest is 'analysis_digest() of what was read.';
comment on column pgharness.analysis_results.requested_by is 'The database role that asked for it first.';
comment on column pgharness.analysis_results.requested_at is 'When that was.';
comment on column pgharness.analysis_results.seconds is 'How long it took, the reading of the grades included.';
comment on column pgharness.analysis_results.result is 'All that was found.';
comment on column pgharness.analysis_results.run_ids is 'The ids of runs, also of those deleted since.';

create or replace view pgharness.analysis_groups with (security_invoker = true) as
select a.id as analysis_id, a.kind, g.number::integer as number, g.value ->> 'name' as name, (g.value ->> 'grades')::bigint as grade_count,
       (g.value ->> 'notes')::bigint as note_count, (g.value ->> 'cases')::bigint as case_count, (g.value ->> 'mean')::double precision as mean_score,
       (g.value ->> 'standard_error')::double precision as standard_error, (g.value #>> '{interval,low}')::double precision as confidence_low,
       (g.value #>> '{interval,high}')::double precision as confidence_high, g.value -> 'warnings' as warnings
  from pgharness.analyses as a
 cross join lateral jsonb_array_elements(a.result -> 'groups') with ordinality as g (value, number)
 where a.kind in ('compare', 'ablation');
comment on view pgharness.analysis_groups is
'One row per analysis that compares, and combination or run in it: its mean score with its standard error over cases. Example: select name, mean_score from pgharness.analysis_groups where analysis_id = 1;';
comment on column pgharness.analysis_groups.number is 'Its place, from 1.';
comment on column pgharness.analysis_groups.standard_error is 'Clustered by case; null for one case.';
comment on column pgharness.analysis_groups.confidence_low is 'Lower end of the confidence interval, whose level is 1 - alpha.';
comment on column pgharness.analysis_groups.confidence_high is 'Its upper end.';
comment on column pgharness.analysis_groups.warnings is 'What weakens it.';

create or replace view pgharness.analysis_comparisons with (security_invoker = true) as
select a.id as analysis_id, a.kind, p.number::integer as number, p.value ->> 'first' as first, p.value ->> 'second' as second, (p.value ->> 'cases')::bigint as case_count,
       (p.value ->> 'difference')::double precision as difference, (p.value ->> 'standard_error')::double precision as standard_error,
       (p.value #>> '{interval,low}')::double precision as confidence_low, (p.value #>> '{interval,high}')::double precision as confidence_high,
       p.value ->> 'test' as test, (p.value ->> 'p_value')::double precision as p_value, (p.value ->> 'p_corrected')::double precision as p_corrected,
       a.result ->> 'correction' as correction, (a.result ->> 'alpha')::double precision as alpha,
       p.value #>> '{effect,name}' as effect, (p.value #>> '{effect,value}')::double precision as effect_size,
       (p.value #>> '{effect,interval,low}')::double precision as effect_low, (p.value #>> '{effect,interval,high}')::double precision as effect_high,
       p.value #>> '{effect,magnitude}' as magnitude, (p.value ->> 'differs')::boolean as is_different, p.value ->> 'verdict' as verdict, p.value ->> 'sentence' as sentence,
       p.value -> 'reasons' as reasons, p.value #>> '{alternative,test}' as alternative_test, (p.value #>> '{alternative,p_value}')::double precision as alternative_p_value,
       (p.value ->> 'agrees')::boolean as is_confirmed, p.value -> 'warnings' as warnings
  from pgharness.analyses as a
 cross join lateral jsonb_array_elements(a.result -> 'pairs') with ordinality as p (value, number)
 where a.kind in ('compare', 'ablation');
comment on view pgharness.analysis_comparisons is
'One row per analysis that compares, and pair of combinations or runs in it: the difference first - second on the cases that both have, and what the corrected test says of it. Example: select first, second, difference, p_corrected, verdict from pgharness.analysis_comparisons where analysis_id = 1;';
comment on column pgharness.analysis_comparisons.number is 'Its place, from 1.';
comment on column pgharness.analysis_comparisons.first is 'A combination or run.';
comment on column pgharness.analysis_comparisons.second is 'The other one; the baseline, if there is one.';
comment on column pgharness.analysis_comparisons.case_count is 'Cases that both have grades of.';
comment on column pgharness.analysis_comparisons.difference is 'Mean over those cases of first - second (scores are 0..1).';
comment on column pgharness.analysis_comparisons.standard_error is 'Clustered by case; null where the difference does not vary.';
comment on column pgharness.analysis_comparisons.confidence_low is 'Lower end of the confidence interval of the difference, whose level is 1 - alpha; of this pair alone.';
comment on column pgharness.analysis_comparisons.confidence_high is 'Its upper end.';
comment on column pgharness.analysis_comparisons.test is 'The test that was chosen, or fixed by options.test.';
comment on column pgharness.analysis_comparisons.p_value is 'Of this pair alone; null where nothing can be tested.';
comment on column pgharness.analysis_comparisons.p_corrected is 'Corrected for all pairs of the analysis.';
comment on column pgharness.analysis_comparisons.correction is 'How.';
comment on column pgharness.analysis_comparisons.alpha is 'The level that p_corrected is compared with.';
comment on column pgharness.analysis_comparisons.effect is 'What effect_size is.';
comment on column pgharness.analysis_comparisons.effect_size is 'A standardised effect, its interval in effect_low and effect_high.';
comment on column pgharness.analysis_comparisons.effect_low is 'Lower end of its interval.';
comment on column pgharness.analysis_comparisons.effect_high is 'Upper end of its interval.';
comment on column pgharness.analysis_comparisons.magnitude is 'The conventional word for it.';
comment on column pgharness.analysis_comparisons.is_different is 'p_corrected < alpha; null where nothing can be tested.';
comment on column pgharness.analysis_comparisons.verdict is 'That in words; "no difference shown" is not evidence that there is none.';
comment on column pgharness.analysis_comparisons.sentence is 'All of it as a sentence.';
comment on column pgharness.analysis_comparisons.reasons is 'Why this test, as a list of texts.';
comment on column pgharness.analysis_comparisons.alternative_test is 'A test that assumes less, made beside it.';
comment on column pgharness.analysis_comparisons.alternative_p_value is 'Its p-value, not corrected.';
comment on column pgharness.analysis_comparisons.is_confirmed is 'Whether both fall on the same side of alpha; if not, report both.';
comment on column pgharness.analysis_comparisons.warnings is 'What weakens it.';

create or replace view pgharness.analysis_measures with (security_invoker = true) as
select a.id as analysis_id, a.result ->> 'between' as between_what, a.result ->> 'scale' as scale, m.number::integer as number,
       array(select jsonb_array_elements_text(m.value -> 'raters')) as raters, m.value ->> 'name' as measure, (m.value ->> 'value')::double precision as value,
       (m.value #>> '{interval,low}')::double precision as confidence_low, (m.value #>> '{interval,high}')::double precision as confidence_high,
       (m.value ->> 'units')::bigint as unit_count, m.value ->> 'method' as method, m.value -> 'warnings' as warnings
  from pgharness.analyses as a
 cross join lateral jsonb_array_elements(a.result -> 'measures') with ordinality as m (value, number)
 where a.kind = 'agreement';
comment on view pgharness.analysis_measures is
'One row per analysis of agreement and coefficient: of all raters together, and of each pair. Example: select raters, measure, value from pgharness.analysis_measures where analysis_id = 1;';
comment on column pgharness.analysis_measures.between_what is 'What rates: author, grader, replication or run.';
comment on column pgharness.analysis_measures.scale is 'binary, ordinal or continuous.';
comment on column pgharness.analysis_measures.number is 'Its place, from 1.';
comment on column pgharness.analysis_measures.raters is 'Whose agreement it is.';
comment on column pgharness.analysis_measures.measure is 'The coefficient''s name.';
comment on column pgharness.analysis_measures.confidence_low is 'Lower end of its confidence interval.';
comment on column pgharness.analysis_measures.confidence_high is 'Upper end of its confidence interval.';
comment on column pgharness.analysis_measures.unit_count is 'Notes that it rests on.';
comment on column pgharness.analysis_measures.method is 'Where the procedure comes from.';
comment on column pgharness.analysis_measures.warnings is 'What weakens it.';

create or replace view pgharness.analysis_trends with (security_invoker = true) as
select a.id as analysis_id, a.result ->> 'parameter' as parameter, t.number::integer as number, t.value ->> 'series' as series, (t.value ->> 'cases')::bigint as case_count,
       jsonb_array_length(t.value -> 'points') as point_count, (t.value ->> 'slope')::double precision as slope,
       (t.value ->> 'standard_error')::double precision as standard_error, (t.value #>> '{interval,low}')::double precision as confidence_low,
       (t.value #>> '{interval,high}')::double precision as confidence_high, (t.value ->> 'p_value')::double precision as p_value,
       (t.value ->> 'p_corrected')::double precision as p_corrected, (t.value ->> 'rises')::integer as rises, t.value ->> 'sentence' as sentence,
       t.value -> 'points' as points, t.value -> 'warnings' as warnings
  from pgharness.analyses as a
 cross join lateral jsonb_array_elements(a.result -> 'trends') with ordinality as t (value, number)
 where a.kind = 'sweep';
comment on view pgharness.analysis_trends is
'One row per analysis of a sweep and series in it: how the mean score changes with the setting, over the cases that were run with all its values. Example: select series, slope, sentence from pgharness.analysis_trends where analysis_id = 1;';
comment on column pgharness.analysis_trends.parameter is 'The setting.';
comment on column pgharness.analysis_trends.number is 'Its place, from 1.';
comment on column pgharness.analysis_trends.series is 'A combination, or a generator where the setting is one of its parameters.';
comment on column pgharness.analysis_trends.point_count is 'Different values of the setting.';
comment on column pgharness.analysis_trends.slope is 'Change of the score (0..1) per unit of the setting.';
comment on column pgharness.analysis_trends.standard_error is 'Over cases.';
comment on column pgharness.analysis_trends.confidence_low is 'Lower end of its confidence interval.';
comment on column pgharness.analysis_trends.confidence_high is 'Upper end of its confidence interval.';
comment on column pgharness.analysis_trends.p_value is 'Of this series alone.';
comment on column pgharness.analysis_trends.p_corrected is 'Corrected for all series.';
comment on column pgharness.analysis_trends.rises is '1 or -1 where the corrected test shows a trend, else 0.';
comment on column pgharness.analysis_trends.sentence is 'All of it as a sentence.';
comment on column pgharness.analysis_trends.points is 'The mean score at each value, with its interval.';
comment on column pgharness.analysis_trends.warnings is 'What weakens it.';

create or replace view pgharness.analysis_powers with (security_invoker = true) as
select a.id as analysis_id, p.number::integer as number, p.value ->> 'first' as first, p.value ->> 'second' as second, (p.value ->> 'cases')::bigint as case_count,
       (a.result ->> 'alpha')::double precision as alpha, (a.result ->> 'power')::double precision as power, (p.value ->> 'detectable')::double precision as detectable_difference,
       (p.value ->> 'sd')::double precision as difference_sd, (p.value #>> '{parts,case}')::double precision as case_variance,
       (p.value #>> '{parts,replication}')::double precision as replication_variance, (p.value #>> '{parts,grade}')::double precision as grade_variance,
       p.value #>> '{advice,best}' as buy_next, (p.value #>> '{needed,expected,n}')::bigint as needed_cases, (p.value #>> '{needed,safe,n}')::bigint as safe_cases,
       p.value ->> 'sentence' as sentence, p.value -> 'warnings' as warnings
  from pgharness.analyses as a
 cross join lateral jsonb_array_elements(a.result -> 'pairs') with ordinality as p (value, number)
 where a.kind = 'power';
comment on view pgharness.analysis_powers is
'One row per analysis of power and pair in it: the difference that it finds, where its variance comes from, and what to buy more of. Example: select first, second, detectable_difference, buy_next from pgharness.analysis_powers where analysis_id = 1;';
comment on column pgharness.analysis_powers.number is 'Its place, from 1.';
comment on column pgharness.analysis_powers.first is 'A combination or run.';
comment on column pgharness.analysis_powers.second is 'The other one.';
comment on column pgharness.analysis_powers.case_count is 'Cases that both have grades of.';
comment on column pgharness.analysis_powers.alpha is 'The level, before corrections.';
comment on column pgharness.analysis_powers.power is 'The chance to find the difference.';
comment on column pgharness.analysis_powers.detectable_difference is 'The smallest difference of scores (0..1) that is found with this chance.';
comment on column pgharness.analysis_powers.difference_sd is 'Standard deviation of the cases'' differences.';
comment on column pgharness.analysis_powers.case_variance is 'Variance of the difference between cases.';
comment on column pgharness.analysis_powers.replication_variance is 'Between notes of a case; null where no case has two.';
comment on column pgharness.analysis_powers.grade_variance is 'Between grades of a note; null where no note has two.';
comment on column pgharness.analysis_powers.buy_next is 'What the next dollar buys most precision in: cases, replications (of notes) or grades.';
comment on column pgharness.analysis_powers.needed_cases is 'Cases that find options.difference, if that was given.';
comment on column pgharness.analysis_powers.safe_cases is 'The same, in case the runs varied less than is usual.';
comment on column pgharness.analysis_powers.sentence is 'All of it as a sentence.';
comment on column pgharness.analysis_powers.warnings is 'What weakens it.';

create or replace view pgharness.preregistration_deviations with (security_invoker = true) as
with plan as (
    select r.id as run_id, r.name as run, r.instance_id, r.finished_at, d.definition -> 'preregistration' as planned, d.definition, d.case_count
      from pgharness.runs as r join pgharness.run_definitions as d on d.run_id = r.id
     where d.definition ? 'preregistration'
), made as (
    select p.*, a.id as analysis_id, a.options, a.result, a.run_ids, a.started_at,
           case when a.options ? 'authors' then 'mean_score by ' || array_to_string(array(select jsonb_array_elements_text(a.options -> 'authors')), ', ') else 'mean_score' end as metric
      from plan as p
      join pgharness.analyses as a on a.run_ids @> array[p.run_id] and a.status = 'succeeded' and a.kind in ('compare', 'ablation')
), pair as (
    select m.run_id, m.analysis_id, x.value ->> 'first' as first, x.value ->> 'second' as second
      from made as m cross join lateral jsonb_array_elements(m.result -> 'pairs') as x (value) where x.value ->> 'p_value' is not null
), hypothesis as (
    select p.run_id, h.value ->> 'first' as first, h.value ->> 'second' as second
      from plan as p cross join lateral jsonb_array_elements(p.planned -> 'hypotheses') as h (value)
), deviation as (
    select m.run_id, m.run, m.analysis_id, said.deviation, said.planned, said.actual
      from made as m
     cross join lateral (
           values ('metric', m.planned ->> 'primary_metric', m.metric),
                  ('test', m.planned ->> 'test', coalesce(m.options ->> 'test', 'auto')),
                  ('alpha', m.planned ->> 'alpha', m.result ->> 'alpha'),
                  ('correction', m.planned ->> 'correction', m.result ->> 'correction'),
                  ('runs', '1', cardinality(m.run_ids)::text),
                  ('selected cases', 'all', case when m.options ? 'cases' then jsonb_array_length(m.options -> 'cases')::text else 'all' end),
                  ('analysed before the end', 'no', case when m.finished_at is null or m.started_at < m.finished_at then 'yes' else 'no' end)) as said (deviation, planned, actual)
     where said.planned <> said.actual
    union all
    select p.run_id, p.run, null, said.deviation, said.planned, said.actual
      from plan as p
     cross join lateral (
           values ('cases', p.planned ->> 'case_count', p.case_count::text),
                  ('note replications', p.planned ->> 'note_replications', p.definition ->> 'note_replications'),
                  ('grade replications', p.planned ->> 'grade_replications', p.definition ->> 'grade_replications'),
                  ('runs before it was registered', '0', (select count(*) from pgharness.runs as r where r.instance_id = p.instance_id and r.id <> p.run_id
                                                              and r.created_at < (p.planned ->> 'created_at')::timestamptz)::text),
                  ('analyses', 'at least 1', case when exists (select from made as m where m.run_id = p.run_id) then 'at least 1' else '0' end)) as said (deviation, planned, actual)
     where said.planned <> said.actual
    union all
    select m.run_id, m.run, m.analysis_id, 'hypothesis not tested', h.first || ' against ' || h.second, null
      from made as m join hypothesis as h on h.run_id = m.run_id
     where not exists (select from pair as x where x.run_id = m.run_id and x.analysis_id = m.analysis_id and (x.first, x.second) in ((h.first, h.second), (h.second, h.first)))
    union all
    select x.run_id, m.run, x.analysis_id, 'extra comparison', null, x.first || ' against ' || x.second
      from pair as x join made as m on m.run_id = x.run_id and m.analysis_id = x.analysis_id
     where not exists (select from hypothesis as h where h.run_id = x.run_id and (x.first, x.second) in ((h.first, h.second), (h.second, h.first)))
)
select d.run_id, d.run, d.analysis_id, d.deviation, d.planned, d.actual from deviation as d;
comment on view pgharness.preregistration_deviations is
'One row per run with a preregistration and point in which the run, or an analysis of it that compares, is not as it was planned. A run of which nothing is said here was made and analysed as registered. Example: select * from pgharness.preregistration_deviations where run_id = 1;';
comment on column pgharness.preregistration_deviations.analysis_id is 'The analysis that deviates; null where the run does.';
comment on column pgharness.preregistration_deviations.deviation is
'metric, test, alpha, correction, runs, selected cases, analysed before the end, hypothesis not tested, extra comparison; of the run: cases, note replications, grade replications, runs before it was registered, analyses.';
comment on column pgharness.preregistration_deviations.planned is 'What was registered; null of an extra comparison.';
comment on column pgharness.preregistration_deviations.actual is 'What was done; null of a hypothesis that was not tested.';
