-- Functions behind views: what a view computes for one run, where a query of its own would be planned anew at every look, or planned badly.
-- Each is planned for the run that it is asked about (a big run and a small one need different plans) and without JIT, which would cost more than it saves.

create or replace function pgharness._run_progress(
    run pgharness.runs, out percent_done numeric, out notes_running bigint, out notes_waiting bigint, out grades_running bigint, out grades_waiting bigint,
    out items_per_second numeric, out seconds_left numeric, out expected_finish_at timestamptz, out projected_cost_usd numeric,
    out worker_count bigint, out active_seconds numeric
)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_now         timestamptz := clock();
    v_notes       bigint := run.notes_succeeded + run.notes_failed;
    v_grades      bigint := run.grades_succeeded + run.grades_failed;
    v_grades_left bigint := run.grade_count - v_grades - run.grades_skipped;
    v_active      double precision := run.active_seconds + coalesce(greatest(extract(epoch from v_now - run.activated_at), 0), 0)::double precision;
    v_speed       double precision := (v_notes + v_grades) / nullif(v_active, 0);
    v_left        double precision := case when run.status = 'running' then (run.note_count - v_notes + v_grades_left) / nullif(v_speed, 0) end;
begin
    percent_done := trunc(100.0 * (v_notes + v_grades + run.grades_skipped) / nullif(run.note_count + run.grade_count, 0), 1);
    if run.task_count > 0 then
        percent_done := case when run.status = 'completed' then 100
                             else coalesce((select trunc((100 * greatest(least(p.position / nullif(p.total, 0), 1), 0))::numeric, 1) from progress_reports as p where p.run_id = run.id),
                                           trunc(100.0 * (run.tasks_succeeded + run.tasks_failed) / run.task_count, 1)) end;
        v_speed := (run.tasks_succeeded + run.tasks_failed) / nullif(v_active, 0);
        v_left := null;
    end if;
    items_per_second := round(v_speed::numeric, 3);
    seconds_left := round(v_left::numeric, 1);
    expected_finish_at := v_now + make_interval(secs => v_left);
    active_seconds := round(v_active::numeric, 1);
    projected_cost_usd := round(
        case when run.finished_at is not null then _cost_usd(run)
             when v_grades_left = 0 then run.note_cost_usd * run.note_count / nullif(v_notes, 0) + run.grade_cost_usd
             else run.note_cost_usd * run.note_count / nullif(v_notes, 0) + run.grade_cost_usd * (v_grades + v_grades_left) / nullif(v_grades, 0) end, 6);
    select count(*) filter (where f.kind = 'note'), count(*) into notes_waiting, grades_waiting
      from failures as f where f.run_id = run.id and f.status = 'waiting';
    grades_waiting := grades_waiting - notes_waiting;
    select count(*), coalesce(sum((w.in_flight -> run.id::text ->> 'note')::integer), 0), coalesce(sum((w.in_flight -> run.id::text ->> 'grade')::integer), 0)
      into worker_count, notes_running, grades_running
      from run_workers as rw
      join workers as w on w.id = rw.worker_id
     where rw.run_id = run.id and run.status = 'running' and w.status in ('running', 'draining') and w.heartbeat_at > v_now - interval '30 seconds';
end;
$$;
comment on function pgharness._run_progress(pgharness.runs) is
'What run_progress computes from a run''s counters, its waiting failures and its workers. In a function because planning it would take longer than doing it.';


create or replace function pgharness._call_latencies(run_id bigint) returns table (model_id bigint, kind text, latency_ms double precision[])
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_enough constant bigint := 50000;                  -- items; of more, some of the blocks of 100, picked by a hash lest a pattern of the plan be picked
begin
    return query
    select c.model_id, part.kind, percentile_cont('{0.5, 0.9, 0.95, 0.99}'::double precision[]) within group (order by c.latency_ms)
      from unnest('{note, grade}'::text[]) as part (kind)
     cross join lateral (
           select max(c.ordinal) as last, max(c.ordinal) / v_enough + 1 as step from calls as c where c.run_id = _call_latencies.run_id and c.kind = part.kind) as plan
     cross join lateral generate_series(0, plan.last, 100) as block
     cross join lateral (
           select c.model_id, c.latency_ms from calls as c
            where c.run_id = _call_latencies.run_id and c.kind = part.kind and c.ordinal between block and block + 99 and c.outcome = 'succeeded' offset 0) as c
     where hashint8(block / 100) % plan.step = 0
     group by c.model_id, part.kind;
end;
$$;
comment on function pgharness._call_latencies(bigint) is
'The 50th, 90th, 95th and 99th percentile of the latency of a run''s calls that succeeded, by model and kind of item; beyond 50,000 items of a kind, of an even sample of about so many. The sample is the same at every look.';

create or replace function pgharness._open_blocks(run_id bigint, kind text) returns table (first bigint, last bigint)
    language plpgsql stable security invoker rows 10 set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_notes        bigint := (select r.note_count from runs as r where r.id = _open_blocks.run_id);
    v_combinations bigint := (select d.combination_count from run_definitions as d where d.run_id = _open_blocks.run_id);
    v_size         bigint := v_combinations * (1000 / nullif(v_combinations, 0) + 1);  -- null of code, which has none
    v_planned      bigint := case when kind = 'note' then v_combinations
                                  else (select sum(c.grades_per_note) from run_combinations as c where c.run_id = _open_blocks.run_id) end;
begin
    return query
    select b * v_size, least((b + 1) * v_size, v_notes) - 1
      from generate_series(0, (v_notes - 1) / v_size) as b
      left join (select decided.number, sum(decided.items) as items
                   from (select n.ordinal / v_size as number, count(*) as items
                           from notes as n where n.run_id = _open_blocks.run_id and _open_blocks.kind = 'note' group by 1
                         union all
                         select f.ordinal / v_size, count(*)
                           from failures as f where f.run_id = _open_blocks.run_id and f.kind = 'note' and f.status = 'failed' and _open_blocks.kind = 'note' group by 1
                         union all
                         select g.note_ordinal / v_size, count(*)
                           from grades as g where g.run_id = _open_blocks.run_id and _open_blocks.kind = 'grade' group by 1) as decided
                  group by decided.number) as decided on decided.number = b
     where coalesce(decided.items, 0) * v_combinations < least(v_size, v_notes - b * v_size) * v_planned
     order by b;
end;
$$;
comment on function pgharness._open_blocks(bigint, text) is
'Ranges of a run''s note ordinals, about a thousand each, in which notes (or grades of them) are not all decided: what is outstanding is in them.';
