-- What could run, and what it would cost: read before starting.

create or replace view pgharness.accepted_rubrics with (security_invoker = true) as
select latest.case_id, latest.case_name,
       row_number() over (partition by latest.case_id order by latest.validated_at desc, latest.rubric_id desc)::integer as author_rank,
       latest.author, latest.rubric_id, latest.validated_at, latest.criteria_count
  from (select distinct on (r.case_id, r.author)
               r.case_id, r.case_name, r.author, r.id as rubric_id, r.validated_at,
               jsonb_array_length(r.criteria) as criteria_count
          from pgharness.rubrics as r
         where r.validation = 'accepted' and r.is_human
         order by r.case_id, r.author, r.validated_at desc, r.id desc) as latest;
comment on view pgharness.accepted_rubrics is
'One row per case and human author: the author''s most recently accepted rubric, newest author first (author_rank from 1). A run grades with the first rubrics_per_case of them.';

create or replace view pgharness.eligible_cases with (security_invoker = true) as
select c.id as case_id, c.name as case_name, c.dataset,
       count(*)                              as author_count,
       array_agg(a.author order by a.author) as authors
  from pgharness.cases as c
  join pgharness.accepted_rubrics as a on a.case_id = c.id
 group by c.id
having count(*) >= 2;
comment on view pgharness.eligible_cases is
'One row per case with accepted rubrics by at least two different human authors: case, dataset, how many authors and who.';

create or replace view pgharness.expected_costs with (security_invoker = true) as
select i.id as instance_id, i.name as instance, mc.id as combination_id, mc.name as combination, g.name as generator, j.name as grader,
       cases.note_count, cases.note_count * plan.grades_per_note as grade_count,
       round(note.usd::numeric, 6) as note_cost_usd, round(grade.usd::numeric, 6) as grade_cost_usd,
       case when plan.grades_per_note = 0 or j.provider = 'metric' or (note_usage.kind is null) = (grade_usage.kind is null)
                then case when note_usage.kind is null then 'text length' else 'past calls' end
            else 'past calls and text length' end as cost_basis,
       round(greatest(note.usd + grade.usd - note.spread - grade.spread, 0)::numeric, 6) as low_cost_usd,
       round((note.usd + grade.usd + note.spread + grade.spread)::numeric, 6) as high_cost_usd
  from pgharness.model_combinations as mc
  join pgharness.instances as i on i.id = mc.instance_id
  join pgharness.experiments as e on e.id = i.experiment_id
  join pgharness.models as g on g.id = mc.generator_id
  left join pgharness.models as j on j.id = mc.grader_id
  left join pgharness.model_usage as note_usage on note_usage.model_id = g.id and note_usage.kind = 'note'
  left join pgharness.model_usage as grade_usage on grade_usage.model_id = j.id and grade_usage.kind = 'grade'
 cross join lateral (
       select count(*) * cardinality(i.cycle_transcript_overlaps) * i.note_replications as note_count
         from pgharness.instance_cases as ic where ic.instance_id = i.id) as cases
 cross join lateral (
       -- a metric grades once, against the target; a model grades by each rubric, or the target when there is none, as often as asked
       select case when j.id is null then 0 when j.provider = 'metric' then 1
                   else greatest(i.rubrics_per_case, 1) * i.grade_replications end as grades_per_note) as plan
 cross join lateral (
       -- mean lengths over up to 100 cases: enough for an estimate, and as quick for many cases
       select coalesce(avg(length(c.input::text)), 0) as input, coalesce(avg(rubric.length), 0) as criteria
         from (select ic.case_id from pgharness.instance_cases as ic where ic.instance_id = i.id order by ic.case_id limit 100) as ic
         join pgharness.cases as c on c.id = ic.case_id
        cross join lateral (
              select avg(length(r.criteria::text)) as length
                from pgharness.accepted_rubrics as a join pgharness.rubrics as r on r.id = a.rubric_id
               where a.case_id = c.id and a.author_rank <= i.rubrics_per_case) as rubric) as size
 cross join lateral (
       select coalesce(i.note_system_prompt, e.note_system_prompt) || coalesce(i.note_prompt, e.note_prompt) as note,
              coalesce(i.grade_system_prompt, e.grade_system_prompt) || coalesce(i.grade_prompt, e.grade_prompt) as grade) as prompt
 cross join lateral (
       select jsonb_path_query_first(g.parameters || mc.generator_parameters, '$.max_tokens ? (@.type() == "number")')::double precision as note,
              jsonb_path_query_first(j.parameters || mc.grader_parameters, '$.max_tokens ? (@.type() == "number")')::double precision as grade) as max_tokens
 cross join lateral (
       select coalesce(note_usage.output_tokens, max_tokens.note, 500) as output_tokens,
              coalesce(note_usage.usd_per_item,
                       pgharness._text_cost(g, (length(prompt.note) + size.input)::double precision / 4, coalesce(max_tokens.note, 500))) as usd,
              coalesce(grade_usage.usd_per_item,
                       pgharness._text_cost(j, (length(prompt.grade) + size.criteria
                                                + case when prompt.grade ~ '\m(case_text|input)\M' then size.input else 0 end)::double precision / 4
                                               + coalesce(note_usage.output_tokens, max_tokens.note, 500), coalesce(max_tokens.grade, 500)), 0) as grade_usd) as item
 cross join lateral (
       select cases.note_count * item.usd as usd,
              case when note_usage.kind is null then cases.note_count * item.usd / 2
                   else 1.645 * note_usage.usd_deviation * sqrt(cases.note_count + cases.note_count::double precision ^ 2 / note_usage.item_count) end as spread) as note
 cross join lateral (
       select cases.note_count * plan.grades_per_note * item.grade_usd as usd,
              case when grade_usage.kind is null then cases.note_count * plan.grades_per_note * item.grade_usd / 2
                   else 1.645 * grade_usage.usd_deviation
                        * sqrt(cases.note_count * plan.grades_per_note + (cases.note_count * plan.grades_per_note)::double precision ^ 2 / grade_usage.item_count) end as spread) as grade;
comment on view pgharness.expected_costs is
'One row per combination of an instance: the notes and grades that start_run would plan for it now, and an estimate of what they cost.';
comment on column pgharness.expected_costs.note_cost_usd is 'At present prices; prices that are not set count as zero.';
comment on column pgharness.expected_costs.cost_basis is
'What the estimate rests on: past calls (model_usage), where a model has any; else text length (4 characters a token of prompt, case and criteria; answers of the max_tokens parameter, or 500).';
comment on column pgharness.expected_costs.low_cost_usd is
'Of notes and grades together: the lower end of an interval that holds 90 percent of such runs. From past calls it is the mean of an item by their number, and 1.645 standard errors for the spread of these items and that of the past ones, over which the mean was taken; where there are none, half of the estimate by text length, and the upper end one and a half.';
comment on column pgharness.expected_costs.high_cost_usd is 'The upper end.';

create or replace view pgharness.expected_workload with (security_invoker = true) as
select i.id as instance_id, i.name as instance, cases.case_count, plan.combination_count, plan.note_count, plan.grade_count,
       plan.note_cost_usd, plan.grade_cost_usd, plan.note_cost_usd + plan.grade_cost_usd as cost_usd, plan.cost_basis, price.unpriced_models,
       array_remove(array[
           case when cases.case_count = 0 then 'it has no cases' end,
           case when plan.combination_count = 0 then 'it has no model combinations' end,
           case when model.needs_rubrics and cardinality(cases.without_rubrics) > 0
                then format('%s of its cases lack accepted rubrics by %s different human authors: %s', cardinality(cases.without_rubrics),
                            i.rubrics_per_case, array_to_string(cases.without_rubrics[1:5], ', ')) end,
           case when model.needs_targets and cardinality(cases.without_target) > 0
                then format('%s of its cases have no target to grade against: %s', cardinality(cases.without_target),
                            array_to_string(cases.without_target[1:5], ', ')) end], null) as problems,
       plan.low_cost_usd, plan.high_cost_usd
  from pgharness.instances as i
 cross join lateral (
       select count(*) as case_count,
              coalesce(array_agg(c.name order by c.id) filter (where c.target is null), '{}') as without_target,
              coalesce(array_agg(c.name order by c.id) filter (
                  where (select count(*) from pgharness.accepted_rubrics as a where a.case_id = c.id) < i.rubrics_per_case), '{}') as without_rubrics
         from pgharness.instance_cases as ic
         join pgharness.cases as c on c.id = ic.case_id
        where ic.instance_id = i.id) as cases
 cross join lateral (
       select count(*) as combination_count,
              coalesce(sum(x.note_count), 0)::bigint as note_count,
              coalesce(sum(x.grade_count), 0)::bigint as grade_count,
              coalesce(sum(x.note_cost_usd), 0) as note_cost_usd,
              coalesce(sum(x.grade_cost_usd), 0) as grade_cost_usd,
              coalesce(sum(x.low_cost_usd), 0) as low_cost_usd,
              coalesce(sum(x.high_cost_usd), 0) as high_cost_usd,
              case when min(x.cost_basis) = max(x.cost_basis) then min(x.cost_basis) else 'past calls and text length' end as cost_basis
         from pgharness.expected_costs as x where x.instance_id = i.id) as plan
 cross join lateral (
       select coalesce(bool_or(m.id = mc.grader_id and m.provider <> 'metric' and i.rubrics_per_case > 0), false) as needs_rubrics,
              coalesce(bool_or(m.id = mc.grader_id and (m.provider = 'metric' or i.rubrics_per_case = 0)
                               and not (m.model = 'regex' and m.parameters || mc.grader_parameters ? 'pattern')
                               and not (m.provider = 'metric' and m.model like 'plugin:%')), false) as needs_targets
         from pgharness.model_combinations as mc
         join pgharness.models as m on m.id in (mc.generator_id, mc.grader_id)
        where mc.instance_id = i.id) as model
 cross join lateral (
       with recursive asked (model_id) as (
           select used.model_id from pgharness.model_combinations as mc cross join lateral (values (mc.generator_id), (mc.grader_id)) as used (model_id)
            where mc.instance_id = i.id
           union
           select x.member_id from asked join pgharness.model_members as x on x.model_id = asked.model_id
       )
       select coalesce(array_agg(m.name order by m.name), '{}') as unpriced_models
         from asked join pgharness.models as m on m.id = asked.model_id
        where m.provider in ('openai', 'openai_responses', 'anthropic', 'gemini') and m.input_usd_per_million is null and m.output_usd_per_million is null) as price;
comment on view pgharness.expected_workload is
'One row per instance: what start_run would plan now (198 cases x 5 notes are 990 notes; x 2 rubrics x 2 grades, 3,960 grades), an estimate of its cost, and what would keep it from starting. Example: select * from pgharness.expected_workload where instance = ''triage-v2'';';
comment on column pgharness.expected_workload.note_count is 'Cases x combinations x transcript overlaps x note replications.';
comment on column pgharness.expected_workload.grade_count is
'Notes x rubrics per case x grade replications; a metric grades each note once, a combination without a grader never.';
comment on column pgharness.expected_workload.note_cost_usd is 'Estimate for the notes; expected_costs has it by combination.';
comment on column pgharness.expected_workload.grade_cost_usd is 'Estimate for the grades.';
comment on column pgharness.expected_workload.cost_usd is 'Estimate for notes and grades together. Calls that fail and are repeated are in it as far as past calls had them.';
comment on column pgharness.expected_workload.cost_basis is
'What the estimate rests on: past calls (model_usage), where a model has any; else text length (4 characters a token of prompt, case and criteria; answers of the max_tokens parameter, or 500); null without combinations.';
comment on column pgharness.expected_workload.unpriced_models is 'Models of paid providers, members of composites too, without a price: the estimate takes them as free.';
comment on column pgharness.expected_workload.problems is 'Why start_run would refuse this instance; empty when it would start.';
comment on column pgharness.expected_workload.low_cost_usd is 'The lower end of an interval for cost_usd, the sum of those of expected_costs, which says how it is made: for several combinations rather too wide.';
comment on column pgharness.expected_workload.high_cost_usd is 'The upper end.';
