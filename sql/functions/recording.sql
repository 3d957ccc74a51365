-- Recording outcomes: notes, grades, failures, calls and counters, in one transaction with the work that follows from them.

-- The generic plan: most groups are small, and to plan one anew takes as long as to record it.
create or replace function pgharness.record_outcomes(worker_id bigint, outcomes jsonb, keeps_grades boolean default false)
    returns table (run_id bigint, status text, epoch integer, priority integer, kept_notes bigint[])
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set plan_cache_mode = force_generic_plan set enable_seqscan = off
as $$
declare
    v_outcomes   outcome[] := array(select distinct on (o.run_id, o.kind, o.ordinal, o.result) o from jsonb_populate_recordset(null::outcome, outcomes) as o);
    v_keeps      boolean := keeps_grades and not exists (select from workers as w where w.status = 'running' and 'grade' = any (w.queues) and 'note' <> all (w.queues));
    v_run        runs;
    v_definition run_definitions;
    v_mine       outcome[];
    v_notes      bigint[];
    v_queued     bigint[];
    v_grades     bigint[];
    v_failed     failures[];
    v_cancelled  boolean;
    v_failing    boolean;
    v_late       boolean;
    v_hits       bytea[] := '{}';
    v_runs       bigint[] := '{}';
    v_before     numeric[] := '{}';
begin
    -- one writer a run at a time: the counters, the state and the rows then always agree
    for v_run in select r.* from runs as r where r.id in (select o.run_id from unnest(v_outcomes) as o) order by r.id for no key update loop
        select * into strict v_definition from run_definitions as d where d.run_id = v_run.id;
        v_mine := _leave_batches(array(select o from unnest(v_outcomes) as o where o.run_id = v_run.id));
        v_notes := '{}';
        v_queued := '{}';
        v_runs := v_runs || v_run.id;
        v_before := v_before || _cost_usd(v_run);
        v_hits := v_hits || _record_calls(record_outcomes.worker_id, v_run, v_mine);
        -- a group is small, so that each statement costs as much to begin as to do: those that are seldom needed are left out
        select bool_or(o.result = 'cancelled'), bool_or(o.result = 'failed'), bool_or(o.result = 'succeeded' and o.epoch < v_run.epoch)
          into v_cancelled, v_failing, v_late from unnest(v_mine) as o;
        if v_cancelled then                             -- a call that was aborted killed nobody
            update failures as f set crashes = f.crashes - 1
              from unnest(v_mine) as o where o.result = 'cancelled' and f.run_id = o.run_id and f.kind = o.kind and f.ordinal = o.ordinal and f.crashes > 0;
        end if;
        if v_run.finished_at is null then
            v_notes := _record_notes(v_run, v_definition, v_mine);
            v_grades := _record_grades(v_definition, v_mine);
            v_failed := case when v_failing then _record_failures(v_definition, v_mine) else '{}' end;
            delete from failures as f using (select 'note' as kind, unnest(v_notes) as ordinal union all select 'grade', unnest(v_grades)) as made
             where f.run_id = v_run.id and f.kind = made.kind and f.ordinal = made.ordinal;
            if not v_keeps or v_run.batch_deadline_seconds is not null then
                v_queued := v_notes;
            elsif v_late then
                -- made for a slice that nobody waits for any more: whoever is handed the note's new slice finds it done, and its grades not his
                v_queued := array(select n from unnest(v_notes) as n join unnest(v_mine) as o on o.kind = 'note' and o.ordinal = n and o.result = 'succeeded' and o.epoch < v_run.epoch);
            end if;
            perform _advance_run(v_run.id, v_definition, v_notes, v_queued, v_grades, v_failed);
        end if;
        return query select r.id, r.status, r.epoch, r.priority, case when v_keeps and v_run.batch_deadline_seconds is null then array(select n from unnest(v_notes) as n except select n from unnest(v_queued) as n) end
          from runs as r where r.id = v_run.id;
    end loop;
    -- after the runs, in the order of their keys, lest two groups wait for each other
    perform _spend(v_runs, v_before);
    if exists (select from unnest(v_outcomes) as o where o.calls @? '$[*].response') then
        perform _keep_responses((select jsonb_agg(c || jsonb_build_object('run_id', o.run_id)) from unnest(v_outcomes) as o cross join lateral jsonb_array_elements(o.calls) as c
                                  where c ? 'response'));
    end if;
    perform _count_hits(v_hits);
end;
$$;
comment on function pgharness.record_outcomes(bigint, jsonb, boolean) is
'For workers: record how tries ended (an array of objects shaped like type outcome): notes, grades, failures and calls are stored, the grades of new notes and the next tries are queued, the runs'' counters move and runs that are done end, in this transaction. An item recorded before is left as it is; outcomes for a finished run keep only their calls. A worker that keeps the grades of its notes is told of which notes (kept_notes) it has to make them: these are not queued. Null says that they were queued, because there are workers for grades alone, or the run asks in batches. Answers the state of each run. Example: select * from pgharness.record_outcomes(1, ''[]'');';

create or replace function pgharness._record_notes(run pgharness.runs, definition pgharness.run_definitions, outcomes pgharness.outcome[]) returns bigint[]
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with recorded as (
        insert into notes (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output)
        select o.run_id, o.ordinal, place.case_number, place.combination_number, place.overlap, place.replication, o.attempt, o.output
          from unnest(outcomes) as o
         cross join lateral _note_place(definition, o.ordinal) as place
         where o.kind = 'note' and o.result = 'succeeded' and o.ordinal between 0 and (run).note_count - 1
           and not exists (select from failures as f where f.run_id = o.run_id and f.kind = 'note' and f.ordinal = o.ordinal and f.status = 'failed' offset 0)
        on conflict on constraint notes_pkey do nothing
        returning ordinal
    )
    select coalesce(array_agg(n.ordinal), '{}') from recorded as n;
$$;
comment on function pgharness._record_notes(pgharness.runs, pgharness.run_definitions, pgharness.outcome[]) is
'Store a run''s notes that are new; returns their ordinals.';

create or replace function pgharness._record_grades(definition pgharness.run_definitions, outcomes pgharness.outcome[]) returns bigint[]
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with recorded as (
        insert into grades (run_id, note_ordinal, rubric_number, replication, ordinal, rubric_id, attempts, score, max_score, criteria)
        select o.run_id, o.ordinal / (definition).grade_stride, place.rubric_number, place.replication, o.ordinal, rubric.id, o.attempt,
               coalesce(v.score, o.score), coalesce(v.max_score, o.max_score), coalesce(v.criteria, o.verdicts, '[]')
          from unnest(outcomes) as o
         cross join lateral (select n.case_number, n.combination_number from notes as n
                              where n.run_id = o.run_id and n.ordinal = o.ordinal / (definition).grade_stride offset 0) as note
         cross join lateral (select grade.rubric_number, grade.replication
                               from run_combinations as c cross join lateral _grade_place(c, (o.ordinal % (definition).grade_stride)::integer) as grade
                              where c.run_id = o.run_id and c.number = note.combination_number
                                and o.ordinal % (definition).grade_stride < c.grades_per_note offset 0) as place
          left join lateral (select r.id, r.criteria from run_rubrics as rr join rubrics as r on r.id = rr.rubric_id
                              where rr.run_id = o.run_id and rr.case_number = note.case_number and rr.number = place.rubric_number offset 0) as rubric on true
          left join lateral _score(coalesce(rubric.criteria, _target_criteria()), o.verdicts) as v on o.score is null
         where o.kind = 'grade' and o.result = 'succeeded' and o.ordinal >= 0
           and not exists (select from failures as f where f.run_id = o.run_id and f.kind = 'grade' and f.ordinal = o.ordinal and f.status = 'failed' offset 0)
        on conflict on constraint grades_pkey do nothing
        returning ordinal
    )
    select coalesce(array_agg(g.ordinal), '{}') from recorded as g;
$$;
comment on function pgharness._record_grades(pgharness.run_definitions, pgharness.outcome[]) is
'Score and store a run''s grades that are new; returns their ordinals. A verdict counts weight * satisfaction / 100; a metric brings its score.';

create or replace function pgharness._target_criteria() returns jsonb
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$ select '[{"criterion": "The output agrees with the target.", "weight": 100}]'::jsonb; $$;
comment on function pgharness._target_criteria() is 'The one criterion by which a model grades when there is no rubric.';

create or replace function pgharness._score(rubric jsonb, verdicts jsonb) returns table (score numeric, max_score numeric, criteria jsonb)
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    -- two sets in one select list go side by side, and the shorter one ends in nulls
    select sum(part.score), sum(part.weight),
           jsonb_agg(jsonb_build_object('rationale', part.verdict ->> 'rationale', 'satisfaction', part.satisfaction, 'score', part.score))
      from (select each.*, least(round(each.weight * each.satisfaction / 100, 2), each.weight) as score
              from (select (pair.criterion ->> 'weight')::numeric as weight, (pair.verdict ->> 'satisfaction')::numeric as satisfaction, pair.verdict
                      from (select jsonb_array_elements(rubric) as criterion, jsonb_array_elements(verdicts) as verdict) as pair offset 0) as each offset 0) as part
    having count(part.weight) = count(*) and count(part.satisfaction) = count(*) and bool_and(part.satisfaction between 0 and 100);
$$;
comment on function pgharness._score(jsonb, jsonb) is
'Score verdicts by a rubric''s criteria, in order: each gives weight * satisfaction / 100 rounded to cents (at most its weight), the sum is the score. No row when their numbers differ, or for a satisfaction outside 0..100.';

create or replace function pgharness._record_failures(definition pgharness.run_definitions, outcomes pgharness.outcome[]) returns pgharness.failures[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_outcome  outcome;
    v_failure  failures;
    v_failures failures[] := '{}';
    v_attempts integer := (definition).definition ->> 'max_attempts';
    v_delay    double precision := (definition).definition ->> 'retry_delay_seconds';
begin
    for v_outcome in
        select o.* from unnest(outcomes) as o
         where o.result = 'failed' and o.ordinal in (select _missing(o.run_id, o.kind, array[o.ordinal]))
           -- else it was recorded before, by a batch whose commit was not heard of
           and not exists (select from failures as f where f.run_id = o.run_id and f.kind = o.kind and f.ordinal = o.ordinal and f.tries >= o.attempt)
    loop
        insert into failures as f (run_id, kind, ordinal, status, cause, error) values (v_outcome.run_id, v_outcome.kind, v_outcome.ordinal, 'waiting', '', '')
        on conflict on constraint failures_pkey do update set updated_at = clock()
        returning f.* into v_failure;
        v_failure.attempts := v_failure.attempts + v_outcome.spends_attempt::integer;
        v_failure.delays := v_failure.delays + (not v_outcome.spends_attempt)::integer;
        v_failure.crashes := 0;
        v_failure.cause := v_outcome.cause;
        v_failure.error := v_outcome.error;
        v_failure.answer := v_outcome.answer;
        v_failure.first_delayed_at := case when not v_outcome.spends_attempt then coalesce(v_failure.first_delayed_at, clock()) end;
        if v_failure.attempts >= v_attempts or v_failure.first_delayed_at < clock() - interval '1 day' or not v_outcome.is_retryable then
            v_failure.status := 'failed';
            v_failure.next_attempt_at := null;
        else
            v_failure.next_attempt_at := clock() + make_interval(secs => _retry_delay(
                v_outcome.retry_after, case when v_outcome.spends_attempt then v_delay * 2 ^ (v_failure.attempts - 1) else 2 ^ least(v_failure.delays - 1, 8) end));
        end if;
        update failures as f
           set status = v_failure.status, attempts = v_failure.attempts, delays = v_failure.delays, tries = greatest(f.tries + 1, v_outcome.attempt), crashes = 0,
               first_delayed_at = v_failure.first_delayed_at, cause = v_failure.cause,
               error = v_failure.error, answer = v_failure.answer, next_attempt_at = v_failure.next_attempt_at, updated_at = clock()
         where f.run_id = v_failure.run_id and f.kind = v_failure.kind and f.ordinal = v_failure.ordinal;
        v_failures := v_failures || v_failure;
    end loop;
    return v_failures;
end;
$$;
comment on function pgharness._record_failures(pgharness.run_definitions, pgharness.outcome[]) is
'Spend an attempt, or only wait after a rate limit or outage (for at most a day of nothing else), and set each item''s next try, or fail it for good; returns the rows.';


create or replace function pgharness._retry_delay(retry_after double precision, backoff double precision) returns double precision
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    -- jitter spreads the next tries of items that failed together
    select case when retry_after is not null then least(retry_after, 86400) * (1 + 0.1 * random()) else least(backoff, 300) * (0.5 + random()) end;
$$;
comment on function pgharness._retry_delay(double precision, double precision) is
'Seconds until the next try: what the server asked for (at most a day), else the backoff (at most 5 minutes), with jitter.';

drop function if exists pgharness._record_calls(bigint, bigint, pgharness.outcome[]);
create or replace function pgharness._record_calls(worker_id bigint, run pgharness.runs, outcomes pgharness.outcome[]) returns bytea[]
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with recorded as (
        insert into calls (run_id, kind, ordinal, attempt, model_id, worker_id, outcome, error, answer, http_status, finish_reason, request_id, answered_by,
                           input_tokens, output_tokens, cached_tokens, cost_usd, latency_ms, started_at, parent_started_at, is_estimated, composition, batch_id,
                           response_key, saved_usd)
        select o.run_id, o.kind, o.ordinal, o.attempt, c.model_id, _record_calls.worker_id, c.outcome, c.error, c.answer, c.http_status,
               c.finish_reason, c.request_id, c.answered_by, coalesce(c.input_tokens, 0), coalesce(c.output_tokens, 0), coalesce(c.cached_tokens, 0),
               coalesce(c.cost_usd, 0), c.latency_ms, c.started_at, c.parent_started_at, coalesce(c.is_estimated, false), coalesce(c.composition, '{}'), o.batch_id,
               c.response_key, coalesce(c.saved_usd, 0)
          from unnest(outcomes) as o
         cross join lateral jsonb_to_recordset(o.calls) as c (
               model_id bigint, outcome text, error text, answer text, http_status integer, finish_reason text, request_id text, answered_by text,
               input_tokens integer, output_tokens integer, cached_tokens integer, cost_usd numeric, latency_ms double precision, started_at timestamptz,
               parent_started_at timestamptz, is_estimated boolean, composition jsonb, response_key bytea, saved_usd numeric)
         -- one that had ended when its run was archived is sent again: it is in the archive
         where coalesce(c.started_at + c.latency_ms * interval '1 ms' > (run).archived_at, true)
        on conflict on constraint calls_run_id_kind_ordinal_attempt_started_at_key do nothing
        returning kind, cost_usd, outcome, response_key
    ), spent as (
        select coalesce(sum(c.cost_usd) filter (where c.kind = 'note'), 0) as note, coalesce(sum(c.cost_usd) filter (where c.kind = 'grade'), 0) as grade
          from recorded as c
    ), paid as (
        update runs as r
           set note_cost_usd = r.note_cost_usd + spent.note, grade_cost_usd = r.grade_cost_usd + spent.grade
          from spent where r.id = (run).id and spent.note + spent.grade > 0
    )
    select coalesce(array_agg(c.response_key), '{}') from recorded as c where c.outcome = 'cached';
$$;
comment on function pgharness._record_calls(bigint, pgharness.runs, pgharness.outcome[]) is
'Store every call of a run''s outcomes, whatever became of its item, and add its cost to the run; returns the entries of the response cache that answered them.';

create or replace function pgharness._count_calls() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    -- in the order of the key, lest two groups wait for each other
    insert into call_totals as t (run_id, model_id, kind, outcome, combination_number, call_count, input_tokens, output_tokens, cached_tokens, cost_usd, saved_usd,
                                  last_used_at)
    select c.run_id, c.model_id, c.kind, c.outcome, place.combination_number, count(*), sum(c.input_tokens), sum(c.output_tokens), sum(c.cached_tokens), sum(c.cost_usd),
           sum(c.saved_usd), max(c.started_at)
      from added as c
      left join lateral (select d.grade_stride, d.combination_count from run_definitions as d where d.run_id = c.run_id offset 0) as plan on true
     cross join lateral (
           select coalesce(case c.kind when 'note' then c.ordinal when 'grade' then c.ordinal / nullif(plan.grade_stride, 0) end
                           % nullif(plan.combination_count, 0), -1)::integer as combination_number) as place
     group by c.run_id, c.model_id, c.kind, c.outcome, place.combination_number
     order by c.run_id, c.model_id, c.kind, c.outcome, place.combination_number
    on conflict on constraint call_totals_pkey do update
       set call_count = t.call_count + excluded.call_count, input_tokens = t.input_tokens + excluded.input_tokens,
           output_tokens = t.output_tokens + excluded.output_tokens, cached_tokens = t.cached_tokens + excluded.cached_tokens,
           cost_usd = t.cost_usd + excluded.cost_usd, saved_usd = t.saved_usd + excluded.saved_usd, last_used_at = greatest(t.last_used_at, excluded.last_used_at);
    return null;
end;
$$;
comment on function pgharness._count_calls() is
'Count calls in call_totals as they are recorded. They are never changed; who deletes a run''s calls deletes its totals.';
create or replace trigger _500_count after insert on pgharness.calls referencing new table as added
    for each statement execute function pgharness._count_calls();

create or replace function pgharness._advance_run(
    run_id bigint, definition pgharness.run_definitions, notes bigint[], queued bigint[], grades bigint[], failed pgharness.failures[]
) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run           runs;
    v_notes_failed  bigint := 0;
    v_grades_failed bigint := 0;
    v_skipped       bigint := 0;
    v_first         bigint := least((select min(o) from unnest(notes) as o), (select min(o) from unnest(grades) as o) / (definition).grade_stride);
    v_waiting       record;
begin
    if cardinality(failed) > 0 then
        select count(*) filter (where f.kind = 'note'), count(*) filter (where f.kind = 'grade'), coalesce(sum(c.grades_per_note) filter (where f.kind = 'note'), 0)
          into v_notes_failed, v_grades_failed, v_skipped
          from unnest(failed) as f
          left join run_combinations as c on f.kind = 'note' and c.run_id = f.run_id and c.number = f.ordinal % (definition).combination_count
         where f.status = 'failed';
    end if;
    update runs as r
       set notes_succeeded = r.notes_succeeded + cardinality(_advance_run.notes), grades_succeeded = r.grades_succeeded + cardinality(_advance_run.grades),
           notes_failed = r.notes_failed + v_notes_failed, grades_failed = r.grades_failed + v_grades_failed, grades_skipped = r.grades_skipped + v_skipped,
           -- what is settled does not change; if it did, its sums would not count
           settled_notes = case when v_first < r.settled_notes then 0 else r.settled_notes end,
           reopenings = r.reopenings + coalesce(v_first < r.settled_notes, false)::integer
     where r.id = _advance_run.run_id returning r.* into v_run;
    if v_run.status = 'running' then                    -- a paused run queues these when it resumes
        if cardinality(_advance_run.queued) > 0 then
            perform _defer_list(v_run.id, 'grade', array(
                select o * (definition).grade_stride + k
                  from unnest(_advance_run.queued) as o
                  join run_combinations as c on c.run_id = v_run.id and c.number = o % (definition).combination_count
                 cross join lateral generate_series(0, c.grades_per_note - 1) as k
                 order by 1), _slice_size(v_run.grade_count, _item_seconds(v_run.id, 'grade')));
        end if;
        if cardinality(failed) > 0 then
            for v_waiting in
                select f.kind, array_agg(f.ordinal order by f.ordinal) as ordinals, max(f.next_attempt_at) as at
                  from unnest(failed) as f where f.status = 'waiting' group by f.kind, date_trunc('second', f.next_attempt_at)
            loop
                perform _defer_list(v_run.id, v_waiting.kind, v_waiting.ordinals, 100, v_waiting.at);
            end loop;
        end if;
    end if;
    perform _settle_run(v_run.id);
end;
$$;
comment on function pgharness._advance_run(bigint, pgharness.run_definitions, bigint[], bigint[], bigint[], pgharness.failures[]) is
'Move a run''s counters, queue the grades of those of its new notes whose worker does not keep them, and its next tries, and end it when all is done. The caller holds the run''s row lock.';

create or replace function pgharness.charge_crash(run_id bigint, kind text, ordinal bigint) returns integer
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_crashes integer;
begin
    perform _lock_run(charge_crash.run_id);             -- or its outcome could be recorded meanwhile, and the charge would stay
    insert into failures as f (run_id, kind, ordinal, status, crashes, cause, error)
    select charge_crash.run_id, charge_crash.kind, m, 'waiting', 1, 'crashed', 'the worker died while it ran this item'
      from _missing(charge_crash.run_id, charge_crash.kind, array[charge_crash.ordinal]) as m
    on conflict on constraint failures_pkey do update set crashes = f.crashes + 1, cause = 'crashed', error = excluded.error, updated_at = clock()
    returning f.crashes into v_crashes;
    return coalesce(v_crashes, 0);
end;
$$;
comment on function pgharness.charge_crash(bigint, text, bigint) is
'For workers: before running a suspect item alone, count the crash that follows if the worker dies; any outcome clears it. Returns the count, 0 for an item that is done or failed. Raises PH001. Example: select pgharness.charge_crash(7, ''note'', 12);';
