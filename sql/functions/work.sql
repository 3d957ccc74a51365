-- The work path: queueing slices, giving workers what to do, recording outcomes, and putting back what died.
-- An item is a note or a grade of a run, named by its ordinal. A slice is one queue job: a range of ordinals, or a list.

create or replace function pgharness._slice_size(items bigint) returns integer
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select greatest(1, least(500, ceil(items / greatest(64.0, 8 * (select count(*) from workers as w where w.status = 'running')))))::integer;
$$;
comment on function pgharness._slice_size(bigint) is
'How many items a slice holds: small enough to spread a run over the workers alive and those to come, at most 500 so that the queue''s per-job cost does not show.';

create or replace function pgharness._queue_exists() returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$ select to_regclass('procrastinate.procrastinate_jobs') is not null; $$;
comment on function pgharness._queue_exists() is 'Whether the queue''s schema is installed: our rows are kept without it.';

create or replace function pgharness._defer(run_id bigint, kind text, slices jsonb[], at timestamptz) returns void
    language plpgsql volatile security definer set search_path = pgharness, procrastinate, pg_temp
as $$
declare
    v_run runs;
begin
    if cardinality(slices) = 0 or not _queue_exists() then
        return;                                         -- requeue_run() finds what is missing once the queue is back
    end if;
    select * into strict v_run from runs as r where r.id = _defer.run_id;
    perform procrastinate_defer_jobs_v1(array(
        select row(_defer.kind, 'pgharness.slice', v_run.priority * 2 + (_defer.kind = 'grade')::integer, null, null,
                   jsonb_build_object('run_id', v_run.id, 'kind', _defer.kind, 'epoch', v_run.epoch) || s, _defer.at)::procrastinate_job_to_defer_v1
          from unnest(slices) as s));
end;
$$;
comment on function pgharness._defer(bigint, text, jsonb[], timestamptz) is
'Queue slices of a run, one job each, in this transaction. Grades go before notes of the same priority, so that results come early.';

create or replace function pgharness._defer_range(run_id bigint, kind text, first bigint, last bigint, size integer) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    select _defer(run_id, kind, array(
        select jsonb_build_object('first', f, 'last', least(f + size - 1, last)) from generate_series(first, last, size) as f), null);
$$;
comment on function pgharness._defer_range(bigint, text, bigint, bigint, integer) is 'Queue a range of ordinals in slices of a size.';

create or replace function pgharness._defer_list(run_id bigint, kind text, ordinals bigint[], size integer, at timestamptz default null, crashes integer default 0) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    select _defer(run_id, kind, array(
        select jsonb_build_object('ordinals', to_jsonb(ordinals[i : i + size - 1]), 'crashes', crashes)
          from generate_series(1, cardinality(ordinals), size) as i), at);
$$;
comment on function pgharness._defer_list(bigint, text, bigint[], integer, timestamptz, integer) is 'Queue a list of ordinals in slices of a size, now or at a time.';

create or replace function pgharness._drop_jobs(run_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if _queue_exists() then
        delete from procrastinate.procrastinate_jobs as j
         where j.status = 'todo' and j.task_name = 'pgharness.slice' and (j.args ->> 'run_id')::bigint = _drop_jobs.run_id;
    end if;
end;
$$;
comment on function pgharness._drop_jobs(bigint) is 'Delete the waiting jobs of a run; those being worked on end by themselves.';

create or replace function pgharness._missing(run_id bigint, kind text, ordinals bigint[]) returns setof bigint
    language plpgsql stable security definer set search_path = pgharness, pg_temp
as $$
declare
    v_stride integer;
begin
    if kind = 'note' then
        return query
        select o from unnest(_missing.ordinals) as o
         where o between 0 and (select r.note_count - 1 from runs as r where r.id = _missing.run_id)
           and not exists (select from notes as n where n.run_id = _missing.run_id and n.ordinal = o)
           and not exists (select from failures as f where f.run_id = _missing.run_id and f.kind = 'note' and f.ordinal = o and f.status = 'failed')
         order by o;
    else
        select d.grade_stride into strict v_stride from run_definitions as d where d.run_id = _missing.run_id;
        return query
        select o
          from unnest(_missing.ordinals) as o
          join notes as n on n.run_id = _missing.run_id and n.ordinal = o / v_stride
          join run_combinations as c on c.run_id = _missing.run_id and c.number = n.combination_number
         cross join lateral _grade_place(c, (o % v_stride)::integer) as place
         where o >= 0 and o % v_stride < c.grades_per_note
           and not exists (
               select from grades as g
                where g.run_id = _missing.run_id and g.note_ordinal = o / v_stride
                  and g.rubric_number = place.rubric_number and g.replication = place.replication)
           and not exists (
               select from failures as f where f.run_id = _missing.run_id and f.kind = 'grade' and f.ordinal = o and f.status = 'failed')
         order by o;
    end if;
end;
$$;
comment on function pgharness._missing(bigint, text, bigint[]) is
'Those of some ordinals that are neither done nor failed: the plan minus what is there. A grade is missing only once its note exists.';

create or replace function pgharness._ordinals(slice jsonb) returns bigint[]
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select case when slice ? 'ordinals' then array(select o::bigint from jsonb_array_elements_text(slice -> 'ordinals') as o)
                else array(select generate_series((slice ->> 'first')::bigint, (slice ->> 'last')::bigint)) end;
$$;
comment on function pgharness._ordinals(jsonb) is 'The ordinals that a queue job names, as a list or as a range.';

create or replace function pgharness._requeue(run_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run    runs;
    v_stride integer;
    v_size   integer;
begin
    perform _drop_jobs(_requeue.run_id);
    update runs as r set epoch = r.epoch + 1 where r.id = _requeue.run_id returning r.* into v_run;
    update failures as f set next_attempt_at = clock() where f.run_id = v_run.id and f.status = 'waiting' and f.next_attempt_at > clock();
    select d.grade_stride into v_stride from run_definitions as d where d.run_id = v_run.id;
    v_size := _slice_size(v_run.note_count - v_run.notes_succeeded);
    -- whole ranges of notes with anything missing; a slice runs only what it finds missing
    perform _defer(v_run.id, 'note', array(
        select jsonb_build_object('first', b.first, 'last', least(b.first + v_size, v_run.note_count) - 1)
          from generate_series(0, v_run.note_count - 1, v_size) as b (first)
          left join (select n.ordinal / v_size as bucket, count(*) as done from notes as n where n.run_id = v_run.id group by 1) as n
            on n.bucket = b.first / v_size
          left join (select f.ordinal / v_size as bucket, count(*) as failed from failures as f
                      where f.run_id = v_run.id and f.kind = 'note' and f.status = 'failed' group by 1) as f
            on f.bucket = b.first / v_size
         where coalesce(n.done, 0) + coalesce(f.failed, 0) < least(v_size, v_run.note_count - b.first)
         order by b.first), null);
    v_size := greatest(1, _slice_size(v_run.grade_count - v_run.grades_succeeded) / v_stride);
    perform _defer(v_run.id, 'grade', array(
        select jsonb_build_object('first', n.bucket * v_size * v_stride, 'last', (n.bucket + 1) * v_size * v_stride - 1)
          from (select n.ordinal / v_size as bucket, sum(c.grades_per_note) as planned
                  from notes as n join run_combinations as c on c.run_id = n.run_id and c.number = n.combination_number
                 where n.run_id = v_run.id group by 1) as n
          left join (select g.note_ordinal / v_size as bucket, count(*) as done from grades as g where g.run_id = v_run.id group by 1) as g
            on g.bucket = n.bucket
          left join (select f.ordinal / v_stride / v_size as bucket, count(*) as failed from failures as f
                      where f.run_id = v_run.id and f.kind = 'grade' and f.status = 'failed' group by 1) as f
            on f.bucket = n.bucket
         where coalesce(g.done, 0) + coalesce(f.failed, 0) < n.planned
         order by n.bucket), null);
    perform _settle_run(v_run.id);
end;
$$;
comment on function pgharness._requeue(bigint) is
'Queue a run''s outstanding work anew under a new epoch, from its rows alone; jobs of earlier epochs then do nothing. The caller holds the run''s row lock.';

create or replace function pgharness.load_run(run_id bigint) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select d.definition || jsonb_build_object(
               'run_id', r.id, 'run', r.name, 'grade_stride', d.grade_stride,
               'combinations', (select jsonb_agg(jsonb_build_object('number', c.number, 'name', c.name, 'generator', c.generator, 'grader', c.grader,
                                                                    'rubric_count', c.rubric_count, 'grade_replications', c.grade_replications) order by c.number)
                                  from run_combinations as c where c.run_id = r.id))
      from runs as r join run_definitions as d on d.run_id = r.id
     where r.id = load_run.run_id;
$$;
comment on function pgharness.load_run(bigint) is
'For workers: the frozen definition of a run with its combinations, or null when it is gone. It never changes. Example: select pgharness.load_run(7);';

create or replace function pgharness.load_slice(worker_id bigint, slice jsonb)
    returns table (ordinal bigint, case_id bigint, combination_number integer, overlap integer, replication integer,
                   note_ordinal bigint, rubric_id bigint, tries integer, cause text, error text, answer text)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run_id  bigint := (slice ->> 'run_id')::bigint;
    v_plan    run_definitions;
    v_missing bigint[];
begin
    if not exists (select from runs as r where r.id = v_run_id and r.status = 'running' and r.epoch = (slice ->> 'epoch')::integer) then
        return;                                         -- paused, finished, deleted, or queued anew since
    end if;
    insert into run_workers (run_id, worker_id) values (v_run_id, load_slice.worker_id) on conflict do nothing;
    select * into strict v_plan from run_definitions as d where d.run_id = v_run_id;
    v_missing := array(select _missing(v_run_id, slice ->> 'kind', _ordinals(slice)));
    -- an item that waits for its next attempt has a job of its own
    if slice ->> 'kind' = 'note' then
        return query
        select o, rc.case_id, place.combination_number, place.overlap, place.replication,
               o, null::bigint, coalesce(f.tries, 0), f.cause, f.error, f.answer
          from unnest(v_missing) as o
         cross join lateral _note_place(v_plan, o) as place
          join run_cases as rc on rc.run_id = v_run_id and rc.number = place.case_number
          left join failures as f on f.run_id = v_run_id and f.kind = 'note' and f.ordinal = o
         where f.next_attempt_at is null or f.next_attempt_at <= clock();
    else
        return query
        select o, rc.case_id, n.combination_number, n.overlap, place.replication,
               n.ordinal, rr.rubric_id, coalesce(f.tries, 0), f.cause, f.error, f.answer
          from unnest(v_missing) as o
          join notes as n on n.run_id = v_run_id and n.ordinal = o / v_plan.grade_stride
          join run_combinations as c on c.run_id = v_run_id and c.number = n.combination_number
         cross join lateral _grade_place(c, (o % v_plan.grade_stride)::integer) as place
          join run_cases as rc on rc.run_id = v_run_id and rc.number = n.case_number
          left join run_rubrics as rr on rr.run_id = v_run_id and rr.case_number = n.case_number and rr.number = place.rubric_number
          left join failures as f on f.run_id = v_run_id and f.kind = 'grade' and f.ordinal = o
         where f.next_attempt_at is null or f.next_attempt_at <= clock();
    end if;
end;
$$;
comment on function pgharness.load_slice(bigint, jsonb) is
'For workers: what a slice (a queue job''s arguments: run_id, kind, epoch, and first and last or ordinals) still has to do; nothing when the run is not running or was queued anew. Idempotent. Example: select * from pgharness.load_slice(1, ''{"run_id": 7, "kind": "note", "epoch": 0, "first": 0, "last": 99}'');';

create or replace function pgharness._note_place(definition pgharness.run_definitions, ordinal bigint)
    returns table (case_number integer, combination_number integer, overlap integer, replication integer)
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    -- combinations vary fastest and replications slowest: every prefix of the plan compares all combinations on the same cases
    select (ordinal / (definition).combination_count % (definition).case_count)::integer,
           (ordinal % (definition).combination_count)::integer,
           ((definition).transcript_overlaps)[ordinal / ((definition).combination_count::bigint * (definition).case_count) % cardinality((definition).transcript_overlaps) + 1],
           (ordinal / ((definition).combination_count::bigint * (definition).case_count * cardinality((definition).transcript_overlaps)))::integer + 1;
$$;
comment on function pgharness._note_place(pgharness.run_definitions, bigint) is
'The case, combination, overlap and replication (from 1) of a note ordinal. One to one, so a run has at most one note for each of them.';

create or replace function pgharness._grade_place(combination pgharness.run_combinations, place integer)
    returns table (rubric_number integer, replication integer)
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    select case when (combination).rubric_count > 0 then place / (combination).grade_replications + 1 else 0 end,
           place % (combination).grade_replications + 1;
$$;
comment on function pgharness._grade_place(pgharness.run_combinations, integer) is
'The rubric (from 1, or 0 for the target) and replication (from 1) of a grade''s place within its note (ordinal modulo stride).';

create or replace function pgharness.load_inputs(run_id bigint, cases bigint[], rubrics bigint[], notes bigint[]) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select jsonb_build_object(
        'cases', (select jsonb_object_agg(c.id, jsonb_build_object('name', c.name, 'input', c.input, 'target', c.target, 'metadata', c.metadata))
                    from cases as c where c.id = any (load_inputs.cases)),
        'rubrics', (select jsonb_object_agg(r.id, jsonb_build_object('author', r.author, 'criteria', r.criteria))
                      from rubrics as r where r.id = any (load_inputs.rubrics)),
        'notes', (select jsonb_object_agg(n.ordinal, n.output)
                    from notes as n where n.run_id = load_inputs.run_id and n.ordinal = any (load_inputs.notes)));
$$;
comment on function pgharness.load_inputs(bigint, bigint[], bigint[], bigint[]) is
'For workers: the content of cases and rubrics by id (frozen, so cacheable) and of a run''s notes by ordinal. Example: select pgharness.load_inputs(7, ''{1}'', ''{}'', ''{}'');';

create or replace function pgharness.record_outcomes(worker_id bigint, outcomes jsonb) returns table (run_id bigint, status text, epoch integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_outcomes   outcome[] := array(select distinct on (o.run_id, o.kind, o.ordinal, o.result) o from jsonb_populate_recordset(null::outcome, outcomes) as o);
    v_run        runs;
    v_definition run_definitions;
    v_mine       outcome[];
    v_notes      bigint[];
    v_grades     bigint[];
    v_failed     failures[];
begin
    -- one writer a run at a time: the counters, the state and the rows then always agree
    for v_run in select r.* from runs as r where r.id in (select o.run_id from unnest(v_outcomes) as o) order by r.id for no key update loop
        select * into strict v_definition from run_definitions as d where d.run_id = v_run.id;
        v_mine := array(select o from unnest(v_outcomes) as o where o.run_id = v_run.id);
        perform _record_calls(record_outcomes.worker_id, v_run.id, v_mine);
        -- a call that was aborted killed nobody
        update failures as f set crashes = f.crashes - 1
          from unnest(v_mine) as o where o.result = 'cancelled' and f.run_id = o.run_id and f.kind = o.kind and f.ordinal = o.ordinal and f.crashes > 0;
        if v_run.finished_at is null then
            v_notes := _record_notes(v_run, v_definition, v_mine);
            v_grades := _record_grades(v_definition, v_mine);
            v_failed := _record_failures(v_definition, v_mine);
            delete from failures as f where f.run_id = v_run.id and (f.kind = 'note' and f.ordinal = any (v_notes) or f.kind = 'grade' and f.ordinal = any (v_grades));
            perform _advance_run(v_run.id, v_definition, v_notes, v_grades, v_failed);
        end if;
    end loop;
    return query select r.id, r.status, r.epoch from runs as r where r.id in (select o.run_id from unnest(v_outcomes) as o);
end;
$$;
comment on function pgharness.record_outcomes(bigint, jsonb) is
'For workers: record how tries ended (an array of objects shaped like type outcome): notes, grades, failures and calls are stored, the grades of new notes and the next tries are queued, the runs'' counters move and runs that are done end, in this transaction. An item recorded before is left as it is; outcomes for a finished run keep only their calls. Answers the state of each run. Example: select * from pgharness.record_outcomes(1, ''[]'');';

create or replace function pgharness._record_notes(run pgharness.runs, definition pgharness.run_definitions, outcomes pgharness.outcome[]) returns bigint[]
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with recorded as (
        insert into notes (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output)
        select o.run_id, o.ordinal, place.case_number, place.combination_number, place.overlap, place.replication, o.attempt, o.output
          from unnest(outcomes) as o
         cross join lateral _note_place(definition, o.ordinal) as place
         where o.kind = 'note' and o.result = 'succeeded' and o.ordinal between 0 and (run).note_count - 1
           and not exists (select from failures as f where f.run_id = o.run_id and f.kind = 'note' and f.ordinal = o.ordinal and f.status = 'failed')
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
        select o.run_id, n.ordinal, place.rubric_number, place.replication, o.ordinal, rb.id, o.attempt,
               coalesce(v.score, o.score), coalesce(v.max_score, o.max_score), coalesce(v.criteria, o.verdicts, '[]')
          from unnest(outcomes) as o
          join notes as n on n.run_id = o.run_id and n.ordinal = o.ordinal / (definition).grade_stride
          join run_combinations as c on c.run_id = n.run_id and c.number = n.combination_number
         cross join lateral _grade_place(c, (o.ordinal % (definition).grade_stride)::integer) as place
          left join run_rubrics as rr on rr.run_id = o.run_id and rr.case_number = n.case_number and rr.number = place.rubric_number
          left join rubrics as rb on rb.id = rr.rubric_id
          left join lateral _score(coalesce(rb.criteria, _target_criteria()), o.verdicts) as v on o.score is null
         where o.kind = 'grade' and o.result = 'succeeded' and o.ordinal >= 0 and o.ordinal % (definition).grade_stride < c.grades_per_note
           and not exists (select from failures as f where f.run_id = o.run_id and f.kind = 'grade' and f.ordinal = o.ordinal and f.status = 'failed')
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
    select sum(part.score), sum(part.weight),
           jsonb_agg(jsonb_build_object('rationale', v.value ->> 'rationale', 'satisfaction', (v.value ->> 'satisfaction')::numeric, 'score', part.score) order by c.number)
      from jsonb_array_elements(rubric) with ordinality as c (value, number)
      join jsonb_array_elements(verdicts) with ordinality as v (value, number) on v.number = c.number
     cross join lateral (
           select (c.value ->> 'weight')::numeric as weight,
                  least(round((c.value ->> 'weight')::numeric * (v.value ->> 'satisfaction')::numeric / 100, 2), (c.value ->> 'weight')::numeric) as score) as part
    having count(*) = jsonb_array_length(rubric) and count(*) = jsonb_array_length(verdicts)
       and bool_and(coalesce((v.value ->> 'satisfaction')::numeric between 0 and 100, false));
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

create or replace function pgharness._record_calls(worker_id bigint, run_id bigint, outcomes pgharness.outcome[]) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with recorded as (
        insert into calls (run_id, kind, ordinal, attempt, model_id, worker_id, outcome, error, answer, http_status, finish_reason, request_id, answered_by,
                           input_tokens, output_tokens, cached_tokens, cost_usd, latency_ms, started_at)
        select o.run_id, o.kind, o.ordinal, o.attempt, c.model_id, _record_calls.worker_id, c.outcome, c.error, c.answer, c.http_status,
               c.finish_reason, c.request_id, c.answered_by, coalesce(c.input_tokens, 0), coalesce(c.output_tokens, 0), coalesce(c.cached_tokens, 0),
               coalesce(c.cost_usd, 0), c.latency_ms, c.started_at
          from unnest(outcomes) as o
         cross join lateral jsonb_to_recordset(o.calls) as c (
               model_id bigint, outcome text, error text, answer text, http_status integer, finish_reason text, request_id text, answered_by text,
               input_tokens integer, output_tokens integer, cached_tokens integer, cost_usd numeric, latency_ms double precision, started_at timestamptz)
        on conflict on constraint calls_run_id_kind_ordinal_attempt_started_at_key do nothing
        returning kind, cost_usd
    ), spent as (
        select coalesce(sum(c.cost_usd) filter (where c.kind = 'note'), 0) as note, coalesce(sum(c.cost_usd) filter (where c.kind = 'grade'), 0) as grade
          from recorded as c
    )
    update runs as r
       set note_cost_usd = r.note_cost_usd + spent.note, grade_cost_usd = r.grade_cost_usd + spent.grade
      from spent where r.id = _record_calls.run_id and spent.note + spent.grade > 0;
$$;
comment on function pgharness._record_calls(bigint, bigint, pgharness.outcome[]) is
'Store every call of a run''s outcomes, whatever became of its item, and add its cost to the run.';

create or replace function pgharness._advance_run(
    run_id bigint, definition pgharness.run_definitions, notes bigint[], grades bigint[], failed pgharness.failures[]
) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run     runs;
    v_skipped bigint;
    v_grades  bigint[];
    v_waiting record;
begin
    select coalesce(sum(c.grades_per_note), 0) into v_skipped
      from unnest(failed) as f
      join run_combinations as c on c.run_id = f.run_id and c.number = f.ordinal % (definition).combination_count
     where f.kind = 'note' and f.status = 'failed';
    update runs as r
       set notes_succeeded = r.notes_succeeded + cardinality(_advance_run.notes), grades_succeeded = r.grades_succeeded + cardinality(_advance_run.grades),
           notes_failed = r.notes_failed + count.notes, grades_failed = r.grades_failed + count.grades, grades_skipped = r.grades_skipped + v_skipped
      from (select count(*) filter (where f.kind = 'note') as notes, count(*) filter (where f.kind = 'grade') as grades
              from unnest(failed) as f where f.status = 'failed') as count
     where r.id = _advance_run.run_id returning r.* into v_run;
    if v_run.status = 'running' then                    -- a paused run queues these when it resumes
        v_grades := array(
            select o * (definition).grade_stride + k
              from unnest(_advance_run.notes) as o
              join run_combinations as c on c.run_id = v_run.id and c.number = o % (definition).combination_count
             cross join lateral generate_series(0, c.grades_per_note - 1) as k
             order by 1);
        perform _defer_list(v_run.id, 'grade', v_grades, _slice_size(cardinality(v_grades) * 4));
        for v_waiting in
            select f.kind, array_agg(f.ordinal order by f.ordinal) as ordinals, max(f.next_attempt_at) as at
              from unnest(failed) as f where f.status = 'waiting' group by f.kind, date_trunc('second', f.next_attempt_at)
        loop
            perform _defer_list(v_run.id, v_waiting.kind, v_waiting.ordinals, 100, v_waiting.at);
        end loop;
    end if;
    perform _settle_run(v_run.id);
end;
$$;
comment on function pgharness._advance_run(bigint, pgharness.run_definitions, bigint[], bigint[], pgharness.failures[]) is
'Move a run''s counters, queue the grades of its new notes and its next tries, and end it when all is done. The caller holds the run''s row lock.';

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

-- Workers

create or replace function pgharness.register_worker(host text, pid integer, version text, queues text[], concurrency integer, environment jsonb default '{}') returns bigint
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into workers (host, pid, version, queues, concurrency, environment, started_at, heartbeat_at)
    values (register_worker.host, register_worker.pid, register_worker.version, register_worker.queues, register_worker.concurrency,
            register_worker.environment, clock(), clock())
    returning id;
$$;
comment on function pgharness.register_worker(text, integer, text, text[], integer, jsonb) is
'For workers: make a row for a worker process; returns its id. Example: select pgharness.register_worker(''host'', 1, ''0.1.0'', ''{note,grade}'', 10);';

create or replace function pgharness.attach_queue_worker(worker_id bigint, queue_worker_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if exists (select from workers as w
                where w.queue_worker_id = attach_queue_worker.queue_worker_id and w.id <> attach_queue_worker.worker_id and w.status in ('running', 'draining')) then
        raise exception 'the queue knows another worker under id %', attach_queue_worker.queue_worker_id
            using errcode = 'PH004', detail = 'A queue that was rebuilt numbers its workers anew.', hint = 'Register with the queue again.';
    end if;
    update workers as w set queue_worker_id = attach_queue_worker.queue_worker_id, heartbeat_at = clock() where w.id = attach_queue_worker.worker_id;
end;
$$;
comment on function pgharness.attach_queue_worker(bigint, bigint) is
'For workers: say under which id the queue knows a worker, before it takes its first job. Raises PH004 when a worker alive has that id, for they would take each other''s jobs for lost. Example: select pgharness.attach_queue_worker(1, 5);';

create or replace function pgharness.heartbeat(worker_id bigint, in_flight jsonb, state text, runs bigint[], jobs bigint[])
    returns table (run_id bigint, status text, epoch integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_worker workers;
    v_job    bigint;
begin
    update workers as w set heartbeat_at = clock(), in_flight = heartbeat.in_flight, status = heartbeat.state
     where w.id = heartbeat.worker_id returning w.* into v_worker;
    if not found then
        raise exception 'worker % is not registered', heartbeat.worker_id using errcode = 'PH005', hint = 'Restart the worker.';
    end if;
    if _queue_exists() then
        -- without its row in the queue it could take no job: the queue was rebuilt, or a sweep took a paused worker for lost
        insert into procrastinate.procrastinate_workers (id) overriding system value
        select v_worker.queue_worker_id where v_worker.queue_worker_id is not null and v_worker.status <> 'stopped'
        on conflict do nothing;
        -- a job that the queue thinks this worker runs, and it does not: its end could not be written
        for v_job in
            select j.id from procrastinate.procrastinate_jobs as j
             where j.worker_id = v_worker.queue_worker_id and j.status = 'doing' and j.id <> all (heartbeat.jobs)
               and not exists (select from procrastinate.procrastinate_events as e where e.job_id = j.id and e.at > clock() - interval '30 seconds')
             order by (j.args ->> 'run_id')::bigint
        loop
            perform _put_back(v_job, false);
        end loop;
    end if;
    return query select r.id, coalesce(now_.status, 'deleted'), coalesce(now_.epoch, 0)
      from unnest(heartbeat.runs) as r (id) left join pgharness.runs as now_ on now_.id = r.id;
end;
$$;
comment on function pgharness.heartbeat(bigint, jsonb, text, bigint[], bigint[]) is
'For workers, every second: a sign of life, with the runs and jobs it works on; answers the state of those runs ("deleted" for one that is gone). Raises PH005 when the worker is unknown. Example: select * from pgharness.heartbeat(1, ''{}'', ''running'', ''{}'', ''{}'');';

create or replace function pgharness._put_back(job_id bigint, has_crashed boolean) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_job     record;
    v_run     runs;
    v_items   bigint[];
    v_crashes integer;
begin
    delete from procrastinate.procrastinate_jobs as j where j.id = _put_back.job_id and j.status = 'doing' returning j.args into v_job;
    if not found then
        return;
    end if;
    -- locked, so that the run cannot end meanwhile and leave the new jobs behind
    select * into v_run from runs as r
     where r.id = (v_job.args ->> 'run_id')::bigint and r.status = 'running' and r.epoch = (v_job.args ->> 'epoch')::integer for share;
    if not found then
        return;                                         -- nobody waits for it any more
    end if;
    v_crashes := coalesce((v_job.args ->> 'crashes')::integer, 0) + has_crashed::integer;
    v_items := array(
        select m from _missing(v_run.id, v_job.args ->> 'kind', _ordinals(v_job.args)) as m
         where not exists (select from failures as f where f.run_id = v_run.id and f.kind = v_job.args ->> 'kind' and f.ordinal = m and f.next_attempt_at > clock()));
    -- in parts: if one item kills workers, a few rounds leave it alone in its slice
    perform _defer_list(v_run.id, v_job.args ->> 'kind', v_items, greatest(1, ceil(cardinality(v_items) / 8.0)::integer), null, v_crashes);
end;
$$;
comment on function pgharness._put_back(bigint, boolean) is
'Queue again what a job has left undone, in up to 8 parts, counting a crash if its worker died. The caller takes jobs in the order of their runs, which are locked.';

create or replace function pgharness.lose_worker(host text, pid integer) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    update workers as w set status = 'lost' where w.host = lose_worker.host and w.pid = lose_worker.pid and w.status in ('running', 'draining');
$$;
comment on function pgharness.lose_worker(text, integer) is
'For worker supervisors: say at once that a process died, so that the next sweep puts its work back without waiting for its heartbeat to age. Example: select pgharness.lose_worker(''host'', 4711);';

create or replace function pgharness.sweep(stale_after interval default '30 seconds') returns integer
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_job   record;
    v_run   bigint;
    v_count integer := 0;
begin
    if not _queue_exists() or not pg_try_advisory_xact_lock(hashtextextended('pgharness.sweep', 0)) then
        return 0;
    end if;
    update workers as w set status = 'lost' where w.status in ('running', 'draining') and w.heartbeat_at < clock() - stale_after;
    delete from model_leases as l using workers as w where w.id = l.worker_id and w.status in ('lost', 'stopped');
    for v_job in
        select j.id, exists (select from workers as w where w.queue_worker_id = j.worker_id and w.status = 'stopped') as has_stopped
          from procrastinate.procrastinate_jobs as j
         where j.status = 'doing' and j.task_name = 'pgharness.slice'
           and not exists (select from workers as w where w.queue_worker_id = j.worker_id and w.status in ('running', 'draining'))
         order by (j.args ->> 'run_id')::bigint for update of j skip locked
    loop
        perform _put_back(v_job.id, not v_job.has_stopped);
        v_count := v_count + 1;
    end loop;
    -- never that of a worker alive, which could take no job without it: its heartbeats are in our own table
    delete from procrastinate.procrastinate_workers as q
     where (q.last_heartbeat < now() - interval '1 day'
            or exists (select from workers as w where w.queue_worker_id = q.id and w.status in ('lost', 'stopped')))
       and not exists (select from workers as w where w.queue_worker_id = q.id and w.status in ('running', 'draining'));
    -- a running run without a single job has lost its work somewhere: put it back
    for v_run in
        select r.id from runs as r
         where r.status = 'running' and r.activated_at < clock() - stale_after * 2
           and not exists (select from procrastinate.procrastinate_jobs as j
                            where j.task_name = 'pgharness.slice' and j.status in ('todo', 'doing') and (j.args ->> 'run_id')::bigint = r.id)
         order by r.id for no key update skip locked
    loop
        insert into logs (run_id, level, message) values (v_run, 'warning', 'the run had no job left in the queue; its outstanding work was queued again');
        perform _requeue(v_run);
        v_count := v_count + 1;
    end loop;
    return v_count;
end;
$$;
comment on function pgharness.sweep(interval) is
'For workers: mark workers without a heartbeat as lost, put their slices back, and queue again the work of runs that have no job left; returns how many it put back. One sweeper at a time, others return 0. Example: select pgharness.sweep();';
