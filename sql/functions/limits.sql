-- What a model may be asked at once and per minute, and what a run may have in flight, shared by all workers through these rows.

create or replace function pgharness._share(max_concurrency integer, held_by_others integer, sharers integer, in_use integer, wanted integer) returns integer
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    -- an equal share, never below what is in use, never above what the others hold back
    select greatest(in_use, least(in_use + wanted, greatest(max_concurrency / sharers, 1), max_concurrency - held_by_others));
$$;
comment on function pgharness._share(integer, integer, integer, integer, integer) is
'How many of a limited number of calls a worker may have in flight: its equal part, as far as the others leave it.';

create or replace function pgharness.lease_model(worker_id bigint, model_id bigint, in_use integer, wanted integer)
    returns table (granted integer, max_concurrency integer, is_rate_limited boolean, blocked_seconds double precision)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_model   models;
    v_blocked timestamptz;
    v_others  integer;
    v_sharers integer;
    v_granted integer;
begin
    insert into model_limits (model_id) values (lease_model.model_id) on conflict do nothing;
    select l.blocked_until into v_blocked from model_limits as l where l.model_id = lease_model.model_id for no key update;
    select * into v_model from models as m where m.id = lease_model.model_id;
    if v_model.max_concurrency is null then
        v_granted := lease_model.in_use + lease_model.wanted;
    else
        select coalesce(sum(greatest(l.granted, l.in_use)), 0), count(*) filter (where l.in_use + l.wanted > 0) + 1 into v_others, v_sharers
          from model_leases as l join workers as w on w.id = l.worker_id
         where l.model_id = lease_model.model_id and l.worker_id <> lease_model.worker_id and w.status in ('running', 'draining');
        v_granted := _share(v_model.max_concurrency, v_others, v_sharers, lease_model.in_use, lease_model.wanted);
        insert into model_leases as l (model_id, worker_id, in_use, granted, wanted, updated_at)
        values (lease_model.model_id, lease_model.worker_id, lease_model.in_use, v_granted, lease_model.wanted, clock())
        on conflict on constraint model_leases_pkey do update
           set in_use = excluded.in_use, granted = excluded.granted, wanted = excluded.wanted, updated_at = excluded.updated_at;
    end if;
    return query select v_granted, v_model.max_concurrency, v_model.requests_per_minute is not null or v_model.tokens_per_minute is not null,
                        greatest(extract(epoch from v_blocked - clock()), 0)::double precision;
end;
$$;
comment on function pgharness.lease_model(bigint, bigint, integer, integer) is
'For workers: how many calls to a model this worker may have in flight, given how many it has and how many more it wants; the sum over live workers never exceeds max_concurrency. Also its limit, whether it has per-minute limits, and the seconds for which its provider still asks to wait. Example: select * from pgharness.lease_model(1, 2, 0, 10);';

create or replace function pgharness.lease_run(worker_id bigint, run_id bigint, in_use integer, wanted integer)
    returns table (granted integer, max_concurrency integer, is_rate_limited boolean, blocked_seconds double precision)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_max     integer;
    v_others  integer;
    v_sharers integer;
    v_granted integer := lease_run.in_use + lease_run.wanted;
begin
    perform pg_advisory_xact_lock(hashtextextended('pgharness.lease_run ' || lease_run.run_id, 0));  -- not the run's row, which is busy
    select r.max_concurrency into v_max from runs as r where r.id = lease_run.run_id;
    if v_max is not null then
        select coalesce(sum(greatest(l.granted, l.in_use)), 0), count(*) filter (where l.in_use + l.wanted > 0) + 1 into v_others, v_sharers
          from run_leases as l join workers as w on w.id = l.worker_id
         where l.run_id = lease_run.run_id and l.worker_id <> lease_run.worker_id and w.status in ('running', 'draining');
        v_granted := _share(v_max, v_others, v_sharers, lease_run.in_use, lease_run.wanted);
        insert into run_leases as l (run_id, worker_id, in_use, granted, wanted, updated_at)
        values (lease_run.run_id, lease_run.worker_id, lease_run.in_use, v_granted, lease_run.wanted, clock())
        on conflict on constraint run_leases_pkey do update
           set in_use = excluded.in_use, granted = excluded.granted, wanted = excluded.wanted, updated_at = excluded.updated_at;
    end if;
    return query select v_granted, v_max, false, 0::double precision;
end;
$$;
comment on function pgharness.lease_run(bigint, bigint, integer, integer) is
'For workers: how many calls of a run with max_concurrency this worker may have in flight, given how many it has and how many more it wants; the sum over live workers never exceeds it. Answers like lease_model(). Example: select * from pgharness.lease_run(1, 7, 0, 10);';

create or replace function pgharness.take_requests(model_id bigint, requests integer, tokens bigint)
    returns table (granted integer, wait_seconds double precision)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_bucket  model_limits;
    v_model   models;
    v_seconds double precision;
    v_granted integer := take_requests.requests;
    v_each    double precision := take_requests.tokens::double precision / greatest(take_requests.requests, 1);
begin
    insert into model_limits (model_id) values (take_requests.model_id) on conflict do nothing;
    select * into v_bucket from model_limits as l where l.model_id = take_requests.model_id for no key update;
    select * into v_model from models as m where m.id = take_requests.model_id;
    v_seconds := greatest(extract(epoch from clock() - v_bucket.refilled_at), 0);
    -- a bucket holds what 2 seconds bring (at least one request), so that a minute's quota is not spent in a burst
    v_bucket.requests_available := least(v_bucket.requests_available + v_seconds * v_model.requests_per_minute / 60.0, greatest(v_model.requests_per_minute / 30.0, 1));
    v_bucket.tokens_available := least(v_bucket.tokens_available + v_seconds * v_model.tokens_per_minute / 60.0, greatest(v_model.tokens_per_minute / 30.0, v_each));
    if v_model.requests_per_minute is not null then
        v_granted := least(v_granted, floor(v_bucket.requests_available));
    end if;
    if v_model.tokens_per_minute is not null and v_each > 0 then
        v_granted := least(v_granted, floor(v_bucket.tokens_available / v_each));
    end if;
    v_granted := greatest(v_granted, 0);
    update model_limits as l
       set requests_available = case when v_model.requests_per_minute is null then 1e9 else v_bucket.requests_available - v_granted end,
           tokens_available = case when v_model.tokens_per_minute is null then 1e9       -- a limit that is set later starts full
                                   else v_bucket.tokens_available - case when take_requests.requests > 0 then v_granted * v_each else take_requests.tokens end end,
           refilled_at = clock()
     where l.model_id = take_requests.model_id;
    return query select v_granted, case when v_granted > 0 or take_requests.requests = 0 then 0::double precision else greatest(
        coalesce((1 - v_bucket.requests_available) * 60.0 / v_model.requests_per_minute, 0),
        coalesce((v_each - v_bucket.tokens_available) * 60.0 / v_model.tokens_per_minute, 0), 0.01)::double precision end;
end;
$$;
comment on function pgharness.take_requests(bigint, integer, bigint) is
'For workers: take up to so many requests, with their estimated tokens together, from a model''s per-minute buckets; answers how many may start and when to ask again. With requests => 0 it settles the difference between estimated and real tokens (which may be negative). Example: select * from pgharness.take_requests(2, 5, 10000);';

create or replace function pgharness.block_model(model_id bigint, seconds double precision) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into model_limits as l (model_id, blocked_until) values (block_model.model_id, clock() + make_interval(secs => least(block_model.seconds, 86400)))
    on conflict on constraint model_limits_pkey do update set blocked_until = greatest(l.blocked_until, excluded.blocked_until);
$$;
comment on function pgharness.block_model(bigint, double precision) is
'For workers: hold back every worker''s calls to a model for so many seconds, a day at most, because its provider asked to wait. Example: select pgharness.block_model(2, 10);';
