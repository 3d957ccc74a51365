-- Analyses: what statistics read of runs, who asks for one, and what a worker found.

create or replace function pgharness.score_plan(run_id bigint) returns jsonb
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run  runs;
    v_plan run_definitions;
begin
    select * into v_run from runs as r where r.id = score_plan.run_id;
    perform _check_id('run', score_plan.run_id, v_run.name);
    select * into v_plan from run_definitions as d where d.run_id = v_run.id;
    return jsonb_build_object(
        'run_id', v_run.id, 'run', v_run.name, 'status', v_run.status, 'config', coalesce(nullif(v_plan.definition -> 'config', 'null'), '{}'),
        'overlaps', to_jsonb(coalesce(v_plan.transcript_overlaps, '{}')), 'notes_succeeded', v_run.notes_succeeded,
        'note_cost_usd', v_run.note_cost_usd, 'grade_cost_usd', v_run.grade_cost_usd,
        'archive', (select a.file_name from archives as a where a.run_id = v_run.id and a.restored_at is null))
        || (select jsonb_build_object('case_ids', coalesce(jsonb_agg(c.id order by rc.number), '[]'), 'cases', coalesce(jsonb_agg(c.name order by rc.number), '[]'))
              from run_cases as rc join cases as c on c.id = rc.case_id where rc.run_id = v_run.id)
        || (select jsonb_build_object('combinations', coalesce(jsonb_agg(jsonb_build_object(
                       'name', c.name, 'generator', c.generator ->> 'name', 'grader', c.grader ->> 'name',
                       'parameters', coalesce(c.generator -> 'parameters', '{}')) order by c.number), '[]'))
              from run_combinations as c where c.run_id = v_run.id)
        || (select jsonb_build_object('rubric_cases', coalesce(jsonb_agg(rr.case_number order by rr.case_number, rr.number), '[]'),
                                      'rubric_numbers', coalesce(jsonb_agg(rr.number order by rr.case_number, rr.number), '[]'),
                                      'rubric_authors', coalesce(jsonb_agg(ru.author order by rr.case_number, rr.number), '[]'))
              from run_rubrics as rr join rubrics as ru on ru.id = rr.rubric_id where rr.run_id = v_run.id);
end;
$$;
comment on function pgharness.score_plan(bigint) is
'What the numbers in a run''s grades stand for: its cases, combinations, rubric authors and overlaps in the order of their numbers, with its config and what it cost. Raises PH001. Example: select pgharness.score_plan(7);';
