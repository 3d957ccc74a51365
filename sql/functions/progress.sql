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

create or replace function pgharness._cell_count(run_id bigint) returns bigint
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select d.case_count::bigint * d.combination_count * cardinality(d.transcript_overlaps) from run_definitions as d where d.run_id = _cell_count.run_id;
$$;
comment on function pgharness._cell_count(bigint) is
'How many cells a run has: cases x combinations x overlaps, what replications share. A note''s ordinal modulo it names the cell, and _note_place() of that the case, combination and overlap.';

create or replace function pgharness._scores(run_id bigint)
    returns table (cell bigint, rubric_number integer, note_count bigint, grade_count bigint, mean_score double precision, replication_sd double precision,
                   min_score double precision, max_score double precision)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_cells     bigint := _cell_count(_scores.run_id);
    v_is_single boolean := not exists (select from run_combinations as c where c.run_id = _scores.run_id and c.grade_replications > 1);
begin
    return query
    select each.cell, each.rubric_number, count(*), sum(each.grade_count)::bigint, avg(each.score), stddev_samp(each.score), min(each.score), max(each.score)
      from (
           -- a single grade by a rubric is the note's score; the planner leaves out the branch that is not needed
           select g.note_ordinal % v_cells as cell, g.rubric_number, g.normalised_score as score, 1::bigint as grade_count
             from grades as g where g.run_id = _scores.run_id and v_is_single
           union all
           select g.note_ordinal % v_cells, g.rubric_number, avg(g.normalised_score), count(*)
             from grades as g where g.run_id = _scores.run_id and not v_is_single
            group by g.note_ordinal, g.rubric_number) as each
     group by each.cell, each.rubric_number;
end;
$$;
comment on function pgharness._scores(bigint) is
'Scores of a run''s notes by each rubric, per cell (see _cell_count). Of grades it reads the primary key alone.';

create or replace function pgharness._note_scores(run_id bigint)
    returns table (cell bigint, note_count bigint, scored_count bigint, grade_count bigint, total double precision, squares double precision,
                   lowest double precision, highest double precision)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_cells bigint := _cell_count(_note_scores.run_id);
begin
    return query
    select written.cell, written.note_count, coalesce(scored.scored_count, 0), coalesce(scored.grade_count, 0),
           scored.total, coalesce(scored.squares, 0), scored.lowest, scored.highest
      from (select n.ordinal % v_cells as cell, count(*) as note_count from notes as n where n.run_id = _note_scores.run_id group by 1) as written
      left join (select note.ordinal % v_cells as cell, count(*) as scored_count, sum(note.grade_count)::bigint as grade_count, sum(note.score) as total,
                        var_samp(note.score) * (count(*) - 1) as squares, min(note.score) as lowest, max(note.score) as highest
                   from (select g.note_ordinal as ordinal, avg(g.normalised_score) as score, count(*) as grade_count
                           from grades as g where g.run_id = _note_scores.run_id group by g.note_ordinal) as note
                  group by 1) as scored on scored.cell = written.cell;
end;
$$;
comment on function pgharness._note_scores(bigint) is
'Notes of a run per cell (see _cell_count), and of those with grades the sum, the sum of squares about the cell''s mean and the extremes of their scores, each the mean of its grades.';

create or replace function pgharness._author_pairs(run_id bigint)
    returns table (cell bigint, rubric_a integer, rubric_b integer, note_count bigint, total_a double precision, total_b double precision,
                   squares_a double precision, squares_b double precision, products double precision, differences double precision,
                   min_a double precision, max_a double precision, min_b double precision, max_b double precision)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_plan      run_definitions;
    v_cells     bigint := _cell_count(_author_pairs.run_id);
    v_rubrics   integer := (select max(rr.number) from run_rubrics as rr where rr.run_id = _author_pairs.run_id);
    v_first     integer[];
    v_is_single boolean;
begin
    select * into strict v_plan from run_definitions as d where d.run_id = _author_pairs.run_id;
    -- an author with several rubrics of a case, as imported runs may have, counts once: under the first of them
    select array_agg(each.first order by each.case_number, each.number), bool_and(each.first = each.number) into v_first, v_is_single
      from (select rc.number as case_number, n as number, min(rr.number) over (partition by rc.number, ru.author) as first
              from run_cases as rc
             cross join generate_series(1, v_rubrics) as n
              left join run_rubrics as rr on rr.run_id = rc.run_id and rr.case_number = rc.number and rr.number = n
              left join rubrics as ru on ru.id = rr.rubric_id
             where rc.run_id = _author_pairs.run_id) as each;
    return query
    select note.ordinal % v_cells, pair.a, pair.b, count(*), sum(note.a), sum(note.b), sum(note.a * note.a), sum(note.b * note.b), sum(note.a * note.b),
           sum(abs(note.a - note.b)), min(note.a), max(note.a), min(note.b), max(note.b)
      from (select i as a, j as b from generate_series(1, v_rubrics) as i cross join generate_series(i + 1, v_rubrics) as j) as pair
     cross join lateral (
           select g.note_ordinal as ordinal, avg(g.normalised_score) filter (where author.place = pair.a) as a,
                  avg(g.normalised_score) filter (where author.place = pair.b) as b
             from grades as g
            cross join lateral (
                  select case when v_is_single or g.rubric_number = 0 then g.rubric_number
                              else v_first[(g.note_ordinal / v_plan.combination_count % v_plan.case_count)::integer * v_rubrics + g.rubric_number] end as place) as author
            where g.run_id = _author_pairs.run_id and (v_rubrics <= 2 or author.place in (pair.a, pair.b))
            group by g.note_ordinal) as note
     where note.a is not null and note.b is not null
     group by note.ordinal % v_cells, pair.a, pair.b;
end;
$$;
comment on function pgharness._author_pairs(bigint) is
'Sums over the notes of a run that two authors'' rubrics graded, per cell (see _cell_count) and pair of rubric numbers: enough for the agreement of the authors.';

create or replace function pgharness._replication_spread(run_id bigint)
    returns table (cell bigint, rubric_number integer, note_count bigint, grade_count bigint, squares double precision, differences double precision, pair_count bigint)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_cells bigint := _cell_count(_replication_spread.run_id);
    v_most  integer := (select max(c.grade_replications) from run_combinations as c where c.run_id = _replication_spread.run_id);
begin
    if v_most < 2 then
        return;
    end if;
    return query
    select each.note_ordinal % v_cells, each.rubric_number, count(*), sum(each.grade_count)::bigint, sum(each.squares),
           -- over all pairs, the i-th of n sorted scores is the larger one i - 1 times and the smaller one n - i times; of up to three only the range is left
           sum(case when v_most <= 3 then each.range * (each.grade_count - 1)
                    else (select sum((2 * x.i - 1 - each.grade_count) * x.score) from unnest(each.sorted) with ordinality as x (score, i)) end),
           sum(each.grade_count * (each.grade_count - 1) / 2)::bigint
      from (select g.note_ordinal, g.rubric_number, count(*) as grade_count, var_samp(g.normalised_score) * (count(*) - 1) as squares,
                   max(g.normalised_score) - min(g.normalised_score) as range,
                   case when v_most > 3 then array_agg(g.normalised_score order by g.normalised_score) end as sorted
              from grades as g where g.run_id = _replication_spread.run_id
             group by g.note_ordinal, g.rubric_number having count(*) >= 2) as each
     group by each.note_ordinal % v_cells, each.rubric_number;
end;
$$;
comment on function pgharness._replication_spread(bigint) is
'How far several grades of one note by one rubric differ, summed per cell (see _cell_count) and rubric of a run: squares about each mean, and differences over all pairs.';

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
