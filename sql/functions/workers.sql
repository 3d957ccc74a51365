-- Workers: their sign of life, what they share with each other, and putting back what died with them.

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

create or replace function pgharness._is_gone(worker_id bigint) returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select not exists (select from workers as w where w.id = _is_gone.worker_id and w.status in ('running', 'draining') and w.heartbeat_at > clock() - interval '30 seconds');
$$;
comment on function pgharness._is_gone(bigint) is 'Whether a worker will not end what it has: it stopped, is lost, or was not heard of for 30 seconds.';

create or replace function pgharness._has_stopped(worker_id bigint) returns boolean
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$ select exists (select from workers as w where w.id = _has_stopped.worker_id and w.status = 'stopped'); $$;
comment on function pgharness._has_stopped(bigint) is 'Whether a worker ended in good order, so that what it had is no reason against it.';

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

create or replace function pgharness.heartbeat(worker_id bigint, in_flight jsonb, state text, runs bigint[], jobs bigint[], spare integer default 0)
    returns table (run_id bigint, status text, epoch integer, priority integer, max_concurrency integer, idle_elsewhere integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_worker workers;
    v_job    bigint;
    v_idle   integer := 0;
begin
    update workers as w set heartbeat_at = clock(), in_flight = heartbeat.in_flight, status = heartbeat.state, spare = heartbeat.spare
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
        if not exists (select from procrastinate.procrastinate_jobs as j where j.status = 'todo' and (j.scheduled_at is null or j.scheduled_at <= clock())) then
            select coalesce(sum(w.spare), 0) into v_idle from workers as w
             where w.status = 'running' and w.id <> v_worker.id and w.spare > 0 and 'note' = any (w.queues) and w.heartbeat_at > clock() - interval '5 seconds';
        end if;
    end if;
    return query select r.id, coalesce(now_.status, 'deleted'), coalesce(now_.epoch, 0), coalesce(now_.priority, 0), _call_cap(now_), v_idle
      from unnest(heartbeat.runs) as r (id) left join pgharness.runs as now_ on now_.id = r.id;
end;
$$;
comment on function pgharness.heartbeat(bigint, jsonb, text, bigint[], bigint[], integer) is
'For workers, every second: a sign of life, with the runs and jobs it works on and the calls that it could start if there were work for it; answers the state of those runs ("deleted" for one that is gone), and how many calls other workers could start while the queue holds nothing for them. Raises PH005 when the worker is unknown. Example: select * from pgharness.heartbeat(1, ''{}'', ''running'', ''{}'', ''{}'');';

create or replace function pgharness.share_slice(worker_id bigint, job_id bigint, ordinals bigint[]) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_args jsonb;
begin
    if not _queue_exists() then
        return false;
    end if;
    -- locked, so that its work is not queued anew meanwhile
    perform from runs as r join procrastinate.procrastinate_jobs as j on (j.args ->> 'run_id')::bigint = r.id
      where j.id = share_slice.job_id and r.status = 'running' and r.epoch = (j.args ->> 'epoch')::integer for share of r;
    if not found then
        return false;
    end if;
    update procrastinate.procrastinate_jobs as j
       set args = (j.args - '{first,last}'::text[])
                  || jsonb_build_object('ordinals', to_jsonb(array(select o from unnest(_ordinals(j.args)) as o where o <> all (share_slice.ordinals) order by o)))
     where j.id = share_slice.job_id and j.status = 'doing' and share_slice.ordinals <@ _ordinals(j.args)
       and j.worker_id = (select w.queue_worker_id from workers as w where w.id = share_slice.worker_id)
    returning j.args into v_args;
    if not found then
        return false;
    end if;
    perform _defer_list((v_args ->> 'run_id')::bigint, v_args ->> 'kind', array(select o from unnest(share_slice.ordinals) as o order by o),
                        ceil(cardinality(share_slice.ordinals) / (select greatest(8.0, 4 * count(*)) from workers as w where w.status = 'running' and w.queues <> '{}'))::integer);
    return true;
end;
$$;
comment on function pgharness.share_slice(bigint, bigint, bigint[]) is
'For workers: give items of a job that were not begun back to the queue, in several parts, because other workers have nothing to do. False when the job is not this worker''s any more. Example: select pgharness.share_slice(1, 10, ''{5,6,7}'');';

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
    -- of code, the process of the run is to blame or not, which its worker knows, and says
    v_crashes := case when v_job.args ->> 'kind' = 'task' then 0 else coalesce((v_job.args ->> 'crashes')::integer, 0) + has_crashed::integer end;
    v_items := array(
        select m from _missing(v_run.id, v_job.args ->> 'kind', _ordinals(v_job.args)) as m
         where not exists (select from failures as f where f.run_id = v_run.id and f.kind = v_job.args ->> 'kind' and f.ordinal = m and f.next_attempt_at > clock()));
    -- in parts: if one item kills workers, a few rounds leave it alone in its slice
    perform _defer_list(v_run.id, v_job.args ->> 'kind', v_items, greatest(1, ceil(cardinality(v_items) / 8.0)::integer), null, v_crashes);
    if v_job.args ? 'keeps_grades' then
        v_items := array(
            select g from unnest(_missing_grades(v_run.id, _ordinals(v_job.args))) as g
             where not exists (select from failures as f where f.run_id = v_run.id and f.kind = 'grade' and f.ordinal = g and f.next_attempt_at > clock()));
        perform _defer_list(v_run.id, 'grade', v_items, greatest(1, ceil(cardinality(v_items) / 8.0)::integer), null, v_crashes);
    end if;
end;
$$;
comment on function pgharness._put_back(bigint, boolean) is
'Queue again what a job has left undone, with the grades that it kept, in up to 8 parts each, counting a crash if its worker died. The caller takes jobs in the order of their runs, which are locked.';

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
    delete from run_leases as l using workers as w where w.id = l.worker_id and w.status in ('lost', 'stopped');
    perform _pause_spent_runs();
    delete from response_claims as c using workers as w where w.id = c.worker_id and w.status in ('lost', 'stopped');
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
           and not exists (select from batches as b where b.run_id = r.id and b.finished_at is null)
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
