-- Batches: items of a run gathered for a vendor that answers them at its leisure, and the steps in which a worker takes a batch to its end.
-- Each step is a row's state, held by one worker at a time; whoever takes over from a dead one goes on from that state.

create or replace function pgharness._has_batches(model jsonb) returns boolean
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce((model ->> 'has_batches')::boolean, model ->> 'provider' in ('openai', 'openai_responses', 'anthropic'), false);
$$;
comment on function pgharness._has_batches(jsonb) is 'Whether a model, as a run froze it, can be asked in batches.';

create or replace function pgharness._most_requests(provider text) returns integer
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$ select case provider when 'anthropic' then 100000 else 50000 end; $$;
comment on function pgharness._most_requests(text) is 'How many requests a vendor takes in one batch.';

create or replace function pgharness._gather(run_id bigint, kind text, ordinals bigint[]) returns bigint[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_run   runs;
    v_group record;
    v_batch batches;
    v_rest  bigint[];
    v_part  bigint[];
    v_count integer;
    v_live  bigint[] := ordinals;
begin
    if cardinality(ordinals) = 0 or not exists (select from runs as r where r.id = _gather.run_id and r.batch_deadline_seconds is not null) then
        return ordinals;                                -- without a lock: most runs ask live
    end if;
    select * into strict v_run from runs as r where r.id = _gather.run_id for key share;
    if v_run.status <> 'running'
       or clock() >= v_run.activated_at + make_interval(secs => v_run.batch_deadline_seconds) then
        return ordinals;
    end if;
    for v_group in
        select spec.model_id, _most_requests(spec.model ->> 'provider') as most, array_agg(o order by o) as ordinals
          from run_definitions as d
         cross join unnest(_gather.ordinals) as o
         cross join lateral (
               select case _gather.kind when 'note' then c.generator_id else c.grader_id end as model_id,
                      case _gather.kind when 'note' then c.generator else c.grader end as model
                 from run_combinations as c
                where c.run_id = v_run.id
                  and c.number = (case _gather.kind when 'note' then o else o / d.grade_stride end % d.combination_count)::integer offset 0) as spec
         where d.run_id = v_run.id and _has_batches(spec.model)
           and not exists (select from batches as b where b.run_id = v_run.id and b.model_id = spec.model_id and b.status = 'failed' offset 0)
           and not exists (select from failures as f where f.run_id = v_run.id and f.kind = _gather.kind and f.ordinal = o and f.next_attempt_at > clock() offset 0)
         group by 1, 2 order by 1
    loop
        v_rest := v_group.ordinals;
        while cardinality(v_rest) > 0 loop
            select * into v_batch from batches as b
             where b.run_id = v_run.id and b.kind = _gather.kind and b.model_id = v_group.model_id and b.status = 'planned' for update;
            if not found then
                insert into batches (run_id, kind, model_id, created_at, gathered_at, deadline_at, due_at)
                values (v_run.id, _gather.kind, v_group.model_id, clock(), clock(), v_run.activated_at + make_interval(secs => v_run.batch_deadline_seconds), clock())
                on conflict do nothing;                 -- another slice was faster
                continue;
            end if;
            v_part := v_rest[1 : v_group.most - v_batch.request_count];
            insert into batch_items (run_id, kind, ordinal, batch_id) select v_run.id, _gather.kind, o, v_batch.id from unnest(v_part) as o on conflict do nothing;
            get diagnostics v_count = row_count;
            update batches as b
               set request_count = b.request_count + v_count, gathered_at = clock(),
                   status = case when b.request_count + v_count >= v_group.most then 'uploading' else 'planned' end,
                   due_at = case when b.request_count + v_count >= v_group.most then clock() else clock() + interval '2 seconds' end
             where b.id = v_batch.id;
            v_rest := v_rest[cardinality(v_part) + 1 :];
        end loop;
        v_live := array(select o from unnest(v_live) as o where o <> all (v_group.ordinals) order by o);
    end loop;
    return v_live;
end;
$$;
comment on function pgharness._gather(bigint, text, bigint[]) is
'Put those of some missing items that their run asks for in batches into the batch that is being gathered for their model; returns the others, which are for live calls: of models without batches, or that would not have one, of runs past their deadline, and those whose next try is not due.';

create or replace function pgharness._leave_batches(outcomes pgharness.outcome[]) returns pgharness.outcome[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_left outcome[];
begin
    if not exists (select from unnest(outcomes) as o where o.batch_id is not null) then
        return outcomes;
    end if;
    with gone as (
        delete from batch_items as i using unnest(outcomes) as o
         where i.run_id = o.run_id and i.kind = o.kind and i.ordinal = o.ordinal and i.batch_id = o.batch_id
        returning o as outcome, o.batch_id, o.result
    ), counted as (
        update batches as b
           set succeeded_count = b.succeeded_count + each.succeeded, failed_count = b.failed_count + each.failed
          from (select g.batch_id, count(*) filter (where g.result = 'succeeded') as succeeded, count(*) filter (where g.result = 'failed') as failed
                  from gone as g group by g.batch_id) as each
         where b.id = each.batch_id
    )
    select coalesce(array_agg(g.outcome), '{}') into v_left from gone as g;
    return v_left || array(select o from unnest(outcomes) as o where o.batch_id is null);
end;
$$;
comment on function pgharness._leave_batches(pgharness.outcome[]) is
'Take the items of outcomes out of the batches that they came in; returns the outcomes without those whose item had left its batch: they were recorded before. The caller holds the run''s row lock.';

create or replace function pgharness._return_items(run pgharness.runs, batch pgharness.batches) returns integer
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_items bigint[];
begin
    with gone as (delete from batch_items as i where i.batch_id = batch.id returning i.ordinal)
    select coalesce(array_agg(g.ordinal order by g.ordinal), '{}') into v_items from gone as g;
    if run.status = 'running' then                      -- a run that was stopped queues them when it resumes
        perform _defer_list(run.id, batch.kind, v_items, _slice_size(cardinality(v_items), _item_seconds(run.id, batch.kind)));
    end if;
    return cardinality(v_items);
end;
$$;
comment on function pgharness._return_items(pgharness.runs, pgharness.batches) is
'Take what is left in a batch out of it, and queue it: for the next batch, or past the deadline for live calls. Returns how many. The caller holds the run''s row lock.';

create or replace function pgharness._close_batch(run pgharness.runs, batch pgharness.batches, status text, error text) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_count integer;
    v_batch batches;
begin
    -- first its state, which says whether its items may be gathered again
    update batches as b
       set status = _close_batch.status, error = coalesce(_close_batch.error, b.error), finished_at = clock(), worker_id = null
     where b.id = batch.id returning b.* into v_batch;
    v_count := _return_items(run, batch);
    update batches as b set unanswered_count = v_count where b.id = v_batch.id;
    insert into logs (run_id, level, message, data)
    values (run.id, case when _close_batch.status = 'failed' or _close_batch.error is not null then 'warning' else 'info' end,
            format('batch %s of %ss is %s%s', v_batch.id, v_batch.kind, _close_batch.status, coalesce(': ' || _close_batch.error, '')),
            jsonb_build_object('batch', v_batch.id, 'external_id', v_batch.external_id, 'requests', v_batch.request_count, 'succeeded', v_batch.succeeded_count,
                               'failed', v_batch.failed_count, 'unanswered', v_count));
end;
$$;
comment on function pgharness._close_batch(pgharness.runs, pgharness.batches, text, text) is
'End a batch in a state, queue what it leaves unanswered, and log it. The caller holds the run''s row lock.';

create or replace function pgharness._held_batch(worker_id bigint, batch_id bigint) returns pgharness.batches
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches;
begin
    select * into v_batch from batches as b where b.id = _held_batch.batch_id for update;
    if not found or v_batch.finished_at is not null or v_batch.worker_id is distinct from _held_batch.worker_id then
        raise exception 'batch % is not held by worker % any more', _held_batch.batch_id, _held_batch.worker_id
            using errcode = 'PH005', hint = 'Another worker goes on with it; see select * from pgharness.batches_progress;';
    end if;
    return v_batch;
end;
$$;
comment on function pgharness._held_batch(bigint, bigint) is 'Lock a batch that a worker holds. Raises PH005 when it does not.';

create or replace function pgharness._is_ready(batch pgharness.batches) returns boolean
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select batch.gathered_at < clock() - interval '60 seconds'
        or batch.created_at < clock() - least(interval '15 minutes', (batch.deadline_at - batch.created_at) / 10)
        or (batch.gathered_at <= clock() - interval '2 seconds'
            and not (_queue_exists() and exists (
                    select from procrastinate.procrastinate_jobs as j
                     where j.task_name = 'pgharness.slice' and (j.status = 'doing' or (j.status = 'todo' and (j.scheduled_at is null or j.scheduled_at <= clock())))
                       and (j.args ->> 'run_id')::bigint = batch.run_id)));
$$;
comment on function pgharness._is_ready(pgharness.batches) is
'Whether a batch need not wait for more items: its run has no work in the queue that could bring some, or nothing came for a minute, or it was begun 15 minutes (or a tenth of its deadline) ago.';

create or replace function pgharness._is_held_elsewhere(batch pgharness.batches, worker_id bigint) returns boolean
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select batch.worker_id <> _is_held_elsewhere.worker_id
       and exists (select from workers as w where w.id = batch.worker_id and w.status in ('running', 'draining'));
$$;
comment on function pgharness._is_held_elsewhere(pgharness.batches, bigint) is 'Whether another worker, which is alive, takes a batch a step further now.';

create or replace function pgharness.next_batch(worker_id bigint, kinds text[], busy bigint[] default '{}') returns jsonb
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_found  record;
    v_run    runs;
    v_batch  batches;
    v_wanted boolean;
begin
    for v_found in
        select b.id, b.run_id from batches as b
         where b.finished_at is null and b.due_at <= clock() and b.kind = any (next_batch.kinds)
           and b.id <> all (next_batch.busy) and not _is_held_elsewhere(b, next_batch.worker_id)
         order by b.due_at limit 20
    loop
        select * into v_run from runs as r where r.id = v_found.run_id for no key update skip locked;
        continue when not found;                        -- busy: another time
        select * into v_batch from batches as b where b.id = v_found.id and b.finished_at is null and b.due_at <= clock() for update skip locked;
        continue when not found or _is_held_elsewhere(v_batch, next_batch.worker_id);
        v_wanted := v_run.status = 'running' and clock() < v_batch.deadline_at;
        if v_batch.status in ('planned', 'uploading') and not v_wanted then
            perform _close_batch(v_run, v_batch, 'cancelled', null);
            continue;
        elsif v_batch.status in ('submitting', 'submitted', 'ended') and clock() > v_batch.deadline_at + interval '1 hour' then
            perform _close_batch(v_run, v_batch, 'cancelled', 'its vendor did not give its results within an hour of its deadline');
            continue;
        elsif v_batch.status = 'planned' and not _is_ready(v_batch) then
            update batches as b set due_at = clock() + interval '2 seconds' where b.id = v_batch.id;
            continue;
        end if;
        update batches as b set worker_id = next_batch.worker_id, status = case b.status when 'planned' then 'uploading' else b.status end where b.id = v_batch.id;
        insert into run_workers (run_id, worker_id) values (v_run.id, next_batch.worker_id) on conflict do nothing;
        return _told_batch(v_run, v_batch, v_wanted);
    end loop;
    return null;
end;
$$;
comment on function pgharness.next_batch(bigint, text[], bigint[]) is
'For workers, every second or so: take hold of a batch whose next step is due and which no worker alive holds, as JSON with what the step needs; null when there is none. One that this worker holds and is not busy with counts as free. Batches that their run does not want any more are dissolved here, unless a vendor has them. Example: select pgharness.next_batch(1, ''{note,grade}'');';

create or replace function pgharness._told_batch(run pgharness.runs, batch pgharness.batches, is_wanted boolean) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select to_jsonb(batch) || jsonb_build_object(
        'status', case batch.status when 'planned' then 'uploading' else batch.status end,
        'is_wanted', is_wanted,
        'is_repeated', batch.worker_id is not null or batch.failures > 0,
        'needs_cancel', batch.cancel_requested_at is null and batch.is_ours and (run.finished_at is not null or clock() >= batch.deadline_at),
        'seconds_in_submission', extract(epoch from clock() - batch.submitting_at),
        'model', (select case batch.kind when 'note' then c.generator else c.grader end from run_combinations as c
                   where c.run_id = run.id and batch.model_id = case batch.kind when 'note' then c.generator_id else c.grader_id end order by c.number limit 1),
        'known_ids', to_jsonb(batch.foreign_ids || case when batch.status = 'submitting' then array(
                         select o.external_id from batches as o where o.external_id is not null and o.is_ours and o.created_at > batch.created_at - interval '3 days') end));
$$;
comment on function pgharness._told_batch(pgharness.runs, pgharness.batches, boolean) is
'What a worker is told of a batch that it holds: its row, whether its run still wants it submitted (is_wanted) or cancelled (needs_cancel), whether a step was begun before (is_repeated), its model, and vendor''s batches that are others (known_ids).';

create or replace function pgharness.load_batch(batch_id bigint, after bigint default -1, most integer default 500, ordinals bigint[] default null)
    returns table (kind text, ordinal bigint, case_id bigint, combination_number integer, overlap integer, replication integer,
                   note_ordinal bigint, rubric_id bigint, rubric_ids bigint[], tries integer, cause text, error text, answer text)
    language plpgsql stable security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_batch batches;
    v_items bigint[];
begin
    select * into v_batch from batches as b where b.id = load_batch.batch_id;
    if not found then
        return;
    end if;
    v_items := array(select i.ordinal from batch_items as i
                      where i.batch_id = v_batch.id and i.ordinal > load_batch.after and (load_batch.ordinals is null or i.ordinal = any (load_batch.ordinals))
                      order by i.ordinal limit load_batch.most);
    return query select * from _load_items(v_batch.run_id, v_batch.kind, v_items);
end;
$$;
comment on function pgharness.load_batch(bigint, bigint, integer, bigint[]) is
'For workers: items of a batch in the order of the plan, shaped like those of load_slice(): the next ones after an ordinal, or those of some that are still in it. Example: select * from pgharness.load_batch(3, after => 499);';

create or replace function pgharness.split_batch(worker_id bigint, batch_id bigint, first bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches := _held_batch(split_batch.worker_id, split_batch.batch_id);
    v_id    bigint;
    v_count integer;
begin
    insert into batches (run_id, kind, model_id, status, created_at, gathered_at, deadline_at, due_at)
    values (v_batch.run_id, v_batch.kind, v_batch.model_id, 'uploading', v_batch.created_at, v_batch.gathered_at, v_batch.deadline_at, clock()) returning id into v_id;
    update batch_items as i set batch_id = v_id where i.batch_id = v_batch.id and i.ordinal >= split_batch.first;
    get diagnostics v_count = row_count;
    update batches as b set request_count = v_count where b.id = v_id;
    update batches as b set request_count = b.request_count - v_count where b.id = v_batch.id;
end;
$$;
comment on function pgharness.split_batch(bigint, bigint, bigint) is
'For workers: give the items of a batch from an ordinal on to another batch, because the vendor takes no more bytes in one. Raises PH005. Example: select pgharness.split_batch(1, 3, 25000);';

create or replace function pgharness.begin_submission(worker_id bigint, batch_id bigint, request_count integer, input_file text default null) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches := _held_batch(begin_submission.worker_id, begin_submission.batch_id);
begin
    update batches as b
       set status = 'submitting', submitting_at = clock(), request_count = begin_submission.request_count, input_file = coalesce(begin_submission.input_file, b.input_file)
      from runs as r
     where b.id = v_batch.id and r.id = b.run_id and r.status = 'running' and clock() < b.deadline_at;
    return found;
end;
$$;
comment on function pgharness.begin_submission(bigint, bigint, integer, text) is
'For workers, before the vendor is asked to begin a batch: from here on whoever takes over looks for it there first. False when the run does not want it any more. Raises PH005. Example: select pgharness.begin_submission(1, 3, 500, ''file-abc'');';

create or replace function pgharness.record_submission(worker_id bigint, batch_id bigint, external_id text, is_ours boolean default true) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches;
begin
    -- known already: to whoever took the batch over and found it, or from a call whose commit was not heard of
    update batches as b set is_ours = b.is_ours or record_submission.is_ours
     where b.id = record_submission.batch_id and b.external_id = record_submission.external_id;
    if not found then
        v_batch := _held_batch(record_submission.worker_id, record_submission.batch_id);
        update batches as b
           set status = 'submitted', external_id = record_submission.external_id, is_ours = record_submission.is_ours, submitted_at = coalesce(b.submitting_at, clock()),
               worker_id = null, failures = 0, polls = 0, error = null, due_at = clock() + interval '10 seconds'
         where b.id = v_batch.id;
        insert into logs (run_id, level, message, data)
        values (v_batch.run_id, 'info', format('batch %s of %s %ss was submitted', v_batch.id, v_batch.request_count, v_batch.kind),
                jsonb_build_object('batch', v_batch.id, 'external_id', record_submission.external_id));
    end if;
    if record_submission.is_ours then                   -- so it is not that of another batch which only looks like it
        update batches as b
           set status = 'submitting', external_id = null, is_ours = null, due_at = clock()
         where b.external_id = record_submission.external_id and b.is_ours = false and b.status = 'submitted' and b.id <> record_submission.batch_id;
    end if;
end;
$$;
comment on function pgharness.record_submission(bigint, bigint, text, boolean) is
'For workers: say that the vendor has a batch, under which id, and whether that is certain to be this one. Idempotent, whoever holds the batch by now. Raises PH005. Example: select pgharness.record_submission(1, 3, ''batch_abc'');';

create or replace function pgharness.forget_submission(worker_id bigint, batch_id bigint, error text default null) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches := _held_batch(forget_submission.worker_id, forget_submission.batch_id);
begin
    update batches as b
       set status = 'submitting', foreign_ids = b.foreign_ids || b.external_id, external_id = null, is_ours = null, result_files = '{}', worker_id = null,
           ended_at = null, error = forget_submission.error, failures = b.failures + (forget_submission.error is not null)::integer,
           due_at = case when forget_submission.error is null then clock() else clock() + make_interval(secs => _retry_delay(null, 30 * 2 ^ least(b.failures, 8))) end
     where b.id = v_batch.id;
end;
$$;
comment on function pgharness.forget_submission(bigint, bigint, text) is
'For workers: the vendor''s batch turned out to be somebody else''s, or, with an error, the vendor gave it up before it began and may be asked again later. Raises PH005. Example: select pgharness.forget_submission(1, 3);';

create or replace function pgharness.record_poll(worker_id bigint, batch_id bigint, has_ended boolean, result_files text[] default '{}', is_cancelling boolean default false) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches := _held_batch(record_poll.worker_id, record_poll.batch_id);
begin
    update batches as b
       set worker_id = null, failures = 0, error = null, polled_at = clock(),
           polls = case when is_cancelling and b.cancel_requested_at is null then 0 else b.polls + 1 end,
           cancel_requested_at = case when is_cancelling then coalesce(b.cancel_requested_at, clock()) else b.cancel_requested_at end,
           status = case when has_ended then 'ended' else b.status end,
           ended_at = case when has_ended then clock() end,
           result_files = record_poll.result_files,
           due_at = case when has_ended then clock()
                         when clock() < b.deadline_at then least(b.deadline_at, clock() + make_interval(secs => least(10 * 1.5 ^ least(b.polls, 20), 300)))
                         else clock() + make_interval(secs => least(10 * 1.5 ^ least(b.polls, 20), 60)) end
     where b.id = v_batch.id;
end;
$$;
comment on function pgharness.record_poll(bigint, bigint, boolean, text[], boolean) is
'For workers: what the vendor said of a batch: whether it is done, where its results are, and whether it is being cancelled. It is asked again after 10 seconds, then more and more seldom, up to every 5 minutes. Raises PH005. Example: select pgharness.record_poll(1, 3, false);';

create or replace function pgharness.finish_batch(worker_id bigint, batch_id bigint, error text default null, has_failed boolean default false) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   runs;
    v_batch batches;
begin
    select * into v_run from runs as r where r.id = (select b.run_id from batches as b where b.id = finish_batch.batch_id) for no key update;
    v_batch := _held_batch(finish_batch.worker_id, finish_batch.batch_id);
    perform _close_batch(v_run, v_batch, case when has_failed then 'failed' when v_batch.submitted_at is null or v_batch.cancel_requested_at is not null then 'cancelled'
                                              else 'collected' end, finish_batch.error);
end;
$$;
comment on function pgharness.finish_batch(bigint, bigint, text, boolean) is
'For workers: end a batch whose answers are recorded; what is left in it is queued again, and spends no attempt. One that the vendor will not have has failed: the run then asks its model live. Raises PH005. Example: select pgharness.finish_batch(1, 3);';

create or replace function pgharness.release_batch(worker_id bigint, batch_id bigint, error text default null, retry_after double precision default null) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_batch batches := _held_batch(release_batch.worker_id, release_batch.batch_id);
begin
    update batches as b
       set worker_id = null, error = coalesce(release_batch.error, b.error), failures = b.failures + (release_batch.error is not null)::integer,
           due_at = case when release_batch.error is null then clock() + make_interval(secs => coalesce(release_batch.retry_after, 0))
                         else clock() + make_interval(secs => _retry_delay(release_batch.retry_after, 5 * 2 ^ least(b.failures, 8))) end
     where b.id = v_batch.id;
end;
$$;
comment on function pgharness.release_batch(bigint, bigint, text, double precision) is
'For workers: let go of a batch whose step could not be taken, or not be taken yet; it is due again after so many seconds, or a growing delay. Raises PH005. Example: select pgharness.release_batch(1, 3, ''status 503'');';
