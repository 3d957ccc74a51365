-- The work path: queueing slices, and giving workers what to do.
-- An item is a note or a grade of a run, named by its ordinal. A slice is one queue job: a range of ordinals, or a list.

create or replace function pgharness._slice_size(items bigint, seconds double precision default null) returns integer
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select greatest(1, case when items > 500000 then least(1000, ceil(items / 1000.0))
                            else least(500, greatest(ceil(items / 2000.0),
                                                     least(ceil(items / greatest(64.0, 8 * alive.workers)), ceil(10 * alive.concurrency / nullif(seconds, 0))))) end)::integer
      from (select count(*) as workers, avg(w.concurrency) as concurrency from workers as w where w.status = 'running' and w.queues <> '{}') as alive;
$$;
comment on function pgharness._slice_size(bigint, double precision) is
'How many items a slice holds, given how many there are and the seconds that one takes (null when unknown): small enough to spread a run over the workers alive and those to come, and not to keep one of them busy for more than 10 seconds; at most 500, for then the queue''s per-job cost does not show, and more when there would be over 2,000 slices. Up to 1,000 of more than 500,000 items, for a start queues every slice.';

create or replace function pgharness._item_seconds(run_id bigint, kind text) returns double precision
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select avg(case when _item_seconds.kind = 'note' then generator.seconds + coalesce(c.grades_per_note * grader.seconds, 0) else grader.seconds end)
      from run_combinations as c
     -- "between", so that only the index on model_id will do: calls_pkey would be walked to its start for a model without calls
     cross join lateral (
           select avg(newest.latency_ms) filter (where newest.outcome <> 'cached' and newest.batch_id is null) / 1000 as seconds
             from (select k.latency_ms, k.outcome, k.batch_id from calls as k
                    where k.model_id between c.generator_id and c.generator_id order by k.model_id desc, k.id desc limit 20) as newest) as generator
     cross join lateral (
           select avg(newest.latency_ms) filter (where newest.outcome <> 'cached' and newest.batch_id is null) / 1000 as seconds
             from (select k.latency_ms, k.outcome, k.batch_id from calls as k
                    where k.model_id between c.grader_id and c.grader_id order by k.model_id desc, k.id desc limit 20) as newest) as grader
     where c.run_id = _item_seconds.run_id;
$$;
comment on function pgharness._item_seconds(bigint, text) is
'Seconds that a note of a run takes with its grades, or a grade alone, by the latest calls of its models; null when none of them was called before.';

create or replace function pgharness._queue_exists() returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$ select to_regclass('procrastinate.procrastinate_jobs') is not null; $$;
comment on function pgharness._queue_exists() is 'Whether the queue''s schema is installed: our rows are kept without it.';

create or replace function pgharness._defer(run_id bigint, kind text, slices jsonb[], at timestamptz default null, comes_anew boolean default false) returns void
    language plpgsql volatile security definer set search_path = pgharness, procrastinate, pg_temp
as $$
declare
    v_run  runs;
    v_more jsonb := '{}';
    v_top  integer;
    v_turn integer;
begin
    if cardinality(slices) = 0 or not _queue_exists() then
        return;                                         -- requeue_run() finds what is missing once the queue is back
    end if;
    select * into strict v_run from runs as r where r.id = _defer.run_id;
    if kind = 'task' then                               -- not every worker has its code
        v_more := (select jsonb_build_object('experiment', d.definition ->> 'experiment') from run_definitions as d where d.run_id = v_run.id);
    end if;
    -- runs of one priority take turns: a job's turn grows with the items of its run that go before it, and a run that comes anew begins
    -- just before the turn that the others have reached
    v_top := v_run.priority * 1000000;
    v_turn := coalesce((select (v_top - j.priority) / 2 from procrastinate_jobs as j
                         where j.status = 'todo' and (j.scheduled_at is null or j.scheduled_at <= clock())
                           and j.priority between v_top - 999999 and v_top order by j.priority desc limit 1), 100);
    v_turn := greatest(v_turn - _defer.comes_anew::integer, 0);
    perform procrastinate_defer_jobs_v1(array(
        select row(_defer.kind, 'pgharness.slice', v_top - 2 * least(v_turn + part.items_before / 64, 499999)::integer - (_defer.kind = 'note')::integer, null, null,
                   jsonb_build_object('run_id', v_run.id, 'kind', _defer.kind, 'epoch', v_run.epoch) || v_more || part.slice, _defer.at)::procrastinate_job_to_defer_v1
          from (select s || coalesce((select jsonb_build_object('depth', t.depth) from tasks as t
                                       where _defer.kind = 'task' and t.run_id = v_run.id and t.ordinal = coalesce(s -> 'ordinals' ->> 0, s ->> 'first')::bigint), '{}') as slice, n,
                       coalesce(sum(coalesce(jsonb_array_length(s -> 'ordinals'), (s ->> 'last')::bigint - (s ->> 'first')::bigint + 1))
                                over (order by n rows between unbounded preceding and 1 preceding), 0)::bigint as items_before
                  from unnest(slices) with ordinality as each (s, n)) as part
         order by part.n));
end;
$$;
comment on function pgharness._defer(bigint, text, jsonb[], timestamptz, boolean) is
'Queue slices of a run, one job each, in this transaction. Runs of one priority take turns by the items that they have queued; grades go before notes of the same turn, so that results come early.';

create or replace function pgharness._defer_range(run_id bigint, kind text, first bigint, last bigint, size integer) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    select _defer(run_id, kind, array(
        select jsonb_build_object('first', f, 'last', least(f + size - 1, last)) from generate_series(first, last, size) as f), comes_anew => true);
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

create or replace function pgharness._defer_tasks(run_id bigint, ordinals bigint[]) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    select _defer(run_id, 'task', array(
        select jsonb_build_object('ordinals', jsonb_agg(part.ordinal order by part.ordinal))
          from (select t.ordinal, t.depth, (row_number() over (partition by t.depth order by t.ordinal) - 1) / 20 as number
                  from unnest(_defer_tasks.ordinals) as o
                 cross join lateral (select t.ordinal, t.depth from tasks as t where t.run_id = _defer_tasks.run_id and t.ordinal = o offset 0) as t) as part
         group by part.depth, part.number order by part.depth desc, part.number));
$$;
comment on function pgharness._defer_tasks(bigint, bigint[]) is 'Queue tasks in slices, those of different depths apart and the deepest first: others wait for them.';

create or replace function pgharness.next_run(queues text[]) returns bigint
    language plpgsql stable security definer set search_path = pgharness, pg_temp
as $$
begin
    if not _queue_exists() then
        return null;
    end if;
    return (select (j.args ->> 'run_id')::bigint from procrastinate.procrastinate_jobs as j
             where j.status = 'todo' and j.queue_name = any (next_run.queues) and (j.scheduled_at is null or j.scheduled_at <= clock())
             order by j.priority desc, j.id limit 1);
end;
$$;
comment on function pgharness.next_run(text[]) is
'For workers: the run whose turn it is in the queue, so that one that has its hands full can see whether it is of a run that it has nothing of. Null when nothing waits. Example: select pgharness.next_run(''{note,grade}'');';

drop function if exists pgharness.take_job(text[], bigint, bigint[]);
create or replace function pgharness.take_job(
    queues text[], queue_worker_id bigint, except_runs bigint[] default '{}', only_runs bigint[] default null, experiments text[] default null,
    except_depths jsonb default '{}'
)
    returns table (id bigint, status text, task_name text, priority integer, lock text, queueing_lock text, args jsonb,
                   scheduled_at timestamptz, queue_name text, attempts integer, worker_id bigint)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    return query
    update procrastinate.procrastinate_jobs as j set status = 'doing', worker_id = take_job.queue_worker_id
     where j.id = (select w.id from procrastinate.procrastinate_jobs as w
                    where w.status = 'todo' and w.queue_name = any (take_job.queues) and (w.scheduled_at is null or w.scheduled_at <= clock())
                      and (w.args ->> 'run_id')::bigint <> all (take_job.except_runs)
                      and (take_job.only_runs is null or (w.args ->> 'run_id')::bigint = any (take_job.only_runs))
                      and (take_job.experiments is null or w.args ->> 'experiment' = any (take_job.experiments))
                      and not coalesce(take_job.except_depths -> (w.args ->> 'run_id') @> (w.args -> 'depth'), false)
                    order by w.priority desc, w.id limit 1 for update skip locked)
    returning j.id, j.status::text, j.task_name::text, j.priority, j.lock, j.queueing_lock, j.args, j.scheduled_at, j.queue_name::text, j.attempts, j.worker_id;
end;
$$;
comment on function pgharness.take_job(text[], bigint, bigint[], bigint[], text[], jsonb) is
'For workers: take the job whose turn it is, as the queue''s own fetch does, but none of some runs of which the worker has enough, or of some depths of runs ({"7": [1, 2]}); or only one of some runs, or of some experiments in code. No row when nothing waits. Example: select * from pgharness.take_job(''{note,grade}'', 5, ''{}'');';

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
    language plpgsql stable security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_stride integer;
begin
    -- "offset 0": look up one item at a time; a plan that was made when the tables were small must not join them whole when they are large
    if kind = 'task' then
        return query
        select o from unnest(_missing.ordinals) as o
         where exists (select from tasks as t where t.run_id = _missing.run_id and t.ordinal = o and t.finished_at is null
                                                and (t.next_attempt_at is null or t.next_attempt_at <= clock()) offset 0) order by o;
    elsif kind = 'note' then
        return query
        select o from unnest(_missing.ordinals) as o
         where o between 0 and (select r.note_count - 1 from runs as r where r.id = _missing.run_id)
           and not exists (select from notes as n where n.run_id = _missing.run_id and n.ordinal = o offset 0)
           and not exists (select from failures as f where f.run_id = _missing.run_id and f.kind = 'note' and f.ordinal = o and f.status = 'failed' offset 0)
           and not exists (select from batch_items as b where b.run_id = _missing.run_id and b.kind = 'note' and b.ordinal = o offset 0)
         order by o;
    else
        select d.grade_stride into strict v_stride from run_definitions as d where d.run_id = _missing.run_id;
        return query
        select o
          from unnest(_missing.ordinals) as o
         cross join lateral (select n.combination_number as number from notes as n where n.run_id = _missing.run_id and n.ordinal = o / v_stride offset 0) as note
         cross join lateral (select grade.rubric_number, grade.replication
                               from run_combinations as c cross join lateral _grade_place(c, (o % v_stride)::integer) as grade
                              where c.run_id = _missing.run_id and c.number = note.number and o % v_stride < c.grades_per_note offset 0) as place
         where o >= 0
           and not exists (
               select from grades as g
                where g.run_id = _missing.run_id and g.note_ordinal = o / v_stride
                  and g.rubric_number = place.rubric_number and g.replication = place.replication offset 0)
           and not exists (
               select from failures as f where f.run_id = _missing.run_id and f.kind = 'grade' and f.ordinal = o and f.status = 'failed' offset 0)
           and not exists (select from batch_items as b where b.run_id = _missing.run_id and b.kind = 'grade' and b.ordinal = o offset 0)
         order by o;
    end if;
end;
$$;
comment on function pgharness._missing(bigint, text, bigint[]) is
'Those of some ordinals that are neither done nor failed nor in a batch: the plan minus what is there. A grade is missing only once its note exists.';

create or replace function pgharness._missing_grades(run_id bigint, notes bigint[]) returns bigint[]
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select array(select _missing(_missing_grades.run_id, 'grade', array(
        select o * d.grade_stride + k from run_definitions as d, unnest(_missing_grades.notes) as o, generate_series(0, d.grade_stride - 1) as k
         where d.run_id = _missing_grades.run_id)));
$$;
comment on function pgharness._missing_grades(bigint, bigint[]) is 'The grades of some notes that are neither done nor failed; none of a note that does not exist.';

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
    if v_run.task_count > 0 then
        update tasks as t set next_attempt_at = null where t.run_id = v_run.id and t.status = 'waiting' and t.next_attempt_at is not null;
        perform _defer_tasks(v_run.id, array(select t.ordinal from tasks as t where t.run_id = v_run.id and t.status = 'waiting'));
        return;
    end if;
    update failures as f set next_attempt_at = clock() where f.run_id = v_run.id and f.status = 'waiting' and f.next_attempt_at > clock();
    select d.grade_stride into v_stride from run_definitions as d where d.run_id = v_run.id;
    v_size := _slice_size(v_run.note_count - v_run.notes_succeeded, _item_seconds(v_run.id, 'note'));
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
         order by b.first), comes_anew => true);
    v_size := greatest(1, _slice_size(v_run.grade_count - v_run.grades_succeeded, _item_seconds(v_run.id, 'grade')) / v_stride);
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
         order by n.bucket), comes_anew => true);
    perform _settle_run(v_run.id);
end;
$$;
comment on function pgharness._requeue(bigint) is
'Queue a run''s outstanding work anew under a new epoch, from its rows alone; jobs of earlier epochs then do nothing. The caller holds the run''s row lock.';

create or replace function pgharness.load_run(run_id bigint) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select d.definition || jsonb_build_object(
               'run_id', r.id, 'run', r.name, 'priority', r.priority, 'max_concurrency', _call_cap(r), 'grade_stride', d.grade_stride,
               'response_cache', coalesce(r.response_cache, 'off'), 'notes_per_replication', d.case_count::bigint * d.combination_count * cardinality(d.transcript_overlaps),
               'combinations', (select jsonb_agg(jsonb_build_object('number', c.number, 'name', c.name, 'generator', c.generator, 'grader', c.grader,
                                                                    'rubric_count', c.rubric_count, 'grade_replications', c.grade_replications) order by c.number)
                                  from run_combinations as c where c.run_id = r.id))
      from runs as r join run_definitions as d on d.run_id = r.id
     where r.id = load_run.run_id;
$$;
comment on function pgharness.load_run(bigint) is
'For workers: the frozen definition of a run with its combinations, its present priority and cap, or null when it is gone. Example: select pgharness.load_run(7);';

create or replace function pgharness.load_slice(worker_id bigint, slice jsonb)
    returns table (kind text, ordinal bigint, case_id bigint, combination_number integer, overlap integer, replication integer,
                   note_ordinal bigint, rubric_id bigint, rubric_ids bigint[], tries integer, cause text, error text, answer text)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_run_id bigint := (slice ->> 'run_id')::bigint;
    v_notes  bigint[];
    v_grades bigint[];
begin
    if not exists (select from runs as r where r.id = v_run_id and r.status = 'running' and r.epoch = (slice ->> 'epoch')::integer) then
        return;                                         -- paused, finished, deleted, or queued anew since
    end if;
    insert into run_workers (run_id, worker_id) values (v_run_id, load_slice.worker_id) on conflict do nothing;
    if slice ->> 'kind' = 'note' then
        v_notes := array(select _missing(v_run_id, 'note', _ordinals(slice)));
        v_grades := _kept_grades(load_slice.worker_id, slice);
    else
        v_grades := array(select _missing(v_run_id, 'grade', _ordinals(slice)));
    end if;
    -- an item that waits for its next attempt has a job of its own; one that is asked in a batch waits there
    return query select * from _load_items(v_run_id, 'note', _gather(v_run_id, 'note', coalesce(v_notes, '{}')));
    return query select * from _load_items(v_run_id, 'grade', _gather(v_run_id, 'grade', v_grades));
end;
$$;
comment on function pgharness.load_slice(bigint, jsonb) is
'For workers: what a slice (a queue job''s arguments: run_id, kind, epoch, and first and last or ordinals, with its job_id) still has to do: notes with the rubrics of their cases, or grades; nothing when the run is not running or was queued anew. Idempotent. Example: select * from pgharness.load_slice(1, ''{"run_id": 7, "kind": "note", "epoch": 0, "first": 0, "last": 99}'');';

create or replace function pgharness._load_items(run_id bigint, item_kind text, ordinals bigint[])
    returns table (kind text, ordinal bigint, case_id bigint, combination_number integer, overlap integer, replication integer,
                   note_ordinal bigint, rubric_id bigint, rubric_ids bigint[], tries integer, cause text, error text, answer text)
    language plpgsql stable security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_plan run_definitions;
begin
    if cardinality(ordinals) = 0 then
        return;
    end if;
    select * into strict v_plan from run_definitions as d where d.run_id = _load_items.run_id;
    if item_kind = 'note' then
        return query
        select 'note', o, rc.case_id, place.combination_number, place.overlap, place.replication, o, null::bigint,
               array(select rr.rubric_id from run_rubrics as rr where rr.run_id = _load_items.run_id and rr.case_number = place.case_number order by rr.number),
               coalesce(f.tries, 0), f.cause, f.error, f.answer
          from unnest(ordinals) as o
         cross join lateral _note_place(v_plan, o) as place
         cross join lateral (select rc.case_id from run_cases as rc where rc.run_id = _load_items.run_id and rc.number = place.case_number offset 0) as rc
          left join lateral (select * from failures as f where f.run_id = _load_items.run_id and f.kind = 'note' and f.ordinal = o offset 0) as f on true
         where f.next_attempt_at is null or f.next_attempt_at <= clock();
    else
        return query
        select 'grade', o, rc.case_id, place.combination_number, place.overlap, place.replication, o / v_plan.grade_stride, rr.rubric_id, null::bigint[],
               coalesce(f.tries, 0), f.cause, f.error, f.answer
          from unnest(ordinals) as o
         cross join lateral (
               select n.case_number, n.combination_number, n.overlap, grade.rubric_number, grade.replication
                 from _note_place(v_plan, o / v_plan.grade_stride) as n
                 join run_combinations as c on c.run_id = _load_items.run_id and c.number = n.combination_number
                cross join lateral _grade_place(c, (o % v_plan.grade_stride)::integer) as grade offset 0) as place
         cross join lateral (select rc.case_id from run_cases as rc where rc.run_id = _load_items.run_id and rc.number = place.case_number offset 0) as rc
          left join lateral (select rr.rubric_id from run_rubrics as rr
                              where rr.run_id = _load_items.run_id and rr.case_number = place.case_number and rr.number = place.rubric_number offset 0) as rr on true
          left join lateral (select * from failures as f where f.run_id = _load_items.run_id and f.kind = 'grade' and f.ordinal = o offset 0) as f on true
         where f.next_attempt_at is null or f.next_attempt_at <= clock();
    end if;
end;
$$;
comment on function pgharness._load_items(bigint, text, bigint[]) is
'What notes (with the rubrics of their cases) or grades of a run are made from, and how they were tried before; none whose next try is not due.';

create or replace function pgharness._kept_grades(worker_id bigint, slice jsonb) returns bigint[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_makes_grades boolean := exists (select from workers as w where w.id = _kept_grades.worker_id and w.queues @> '{note,grade}')
                              and not exists (select from runs as r where r.id = (slice ->> 'run_id')::bigint and r.batch_deadline_seconds is not null);
    v_grades       bigint[] := '{}';
begin
    if not slice ? 'job_id' or not _queue_exists() then
        return v_grades;
    end if;
    if slice ? 'keeps_grades' then                      -- it was begun before
        v_grades := _missing_grades((slice ->> 'run_id')::bigint, _ordinals(slice));
    elsif v_makes_grades then
        update procrastinate.procrastinate_jobs as j set args = j.args || '{"keeps_grades": true}' where j.id = (slice ->> 'job_id')::bigint and j.status = 'doing';
    end if;
    if slice ? 'keeps_grades' and not v_makes_grades then
        update procrastinate.procrastinate_jobs as j set args = j.args - 'keeps_grades' where j.id = (slice ->> 'job_id')::bigint and j.status = 'doing';
        perform _defer_list((slice ->> 'run_id')::bigint, 'grade', v_grades, _slice_size(cardinality(v_grades)));
        v_grades := '{}';
    end if;
    return v_grades;
end;
$$;
comment on function pgharness._kept_grades(bigint, jsonb) is
'Mark the job of a slice of notes as one that keeps its grades, if its worker makes grades too and its run does not ask in batches: what is missing of them then belongs to the slice, and is returned when the slice was begun before. A worker that makes no grades leaves them to jobs of their own.';

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
