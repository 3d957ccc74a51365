-- What a model may be asked at once and per minute, and what a run may have in flight, shared by all workers through these rows.

create or replace function pgharness._share(max_concurrency integer, held_by_others integer, sharers integer, in_use integer, wanted integer) returns integer
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    -- an equal share, never below what is in use, never above what the others hold back
    select greatest(in_use, least(in_use + wanted, greatest(max_concurrency / sharers, 1), max_concurrency - held_by_others));
$$;
comment on function pgharness._share(integer, integer, integer, integer, integer) is
'How many of a limited number of calls a worker may have in flight: its equal part, as far as the others leave it.';

create or replace function pgharness._paced(limits pgharness.model_limits, accepted double precision, in_use integer, peak integer, refused integer,
                                            refused_share double precision, refused_at timestamptz, is_short boolean) returns pgharness.model_limits
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_seconds  double precision := least(extract(epoch from clock() - limits.paced_at), 2);
    v_growth   double precision := 0.01 * 2 ^ least(extract(epoch from clock() - limits.cut_at) / 10, 3);
    v_is_trial boolean := limits.learned_concurrency is not null and limits.trial_at > clock() - interval '10 seconds';
begin
    if v_is_trial and (refused_share > 0.1 or (limits.trial_at < clock() - interval '8 seconds' and accepted < limits.rate_before * 0.97)) then
        -- to limit calls in flight brings less than to limit their rate
        limits.learned_concurrency := null;
        limits.learned_rate := limits.rate_before * 0.97;
        limits.cut_at := clock();
    elsif refused > 0 then
        -- once for all calls that began before the last cut: they could not know of it; and a few refusals are the price of knowing
        if refused_share <= 0.005 or accepted <= 0 or refused_at <= limits.cut_at then
            return limits;
        elsif limits.learned_concurrency is not null then
            limits.learned_concurrency := greatest(least(limits.learned_concurrency * 0.97, limits.learned_concurrency - 1), 1);
        elsif limits.is_settled and limits.cut_at < clock() - interval '1 second' and peak >= 4 and coalesce(limits.trial_at < clock() - interval '5 minutes', true) then
            limits.learned_concurrency := peak * 1.05;
            limits.rate_before := accepted;
            limits.learned_rate := accepted * 1.05;
            limits.trial_at := clock();
        else
            limits.is_settled := limits.learned_rate is not null;
            limits.learned_rate := greatest(accepted * 0.95, 1.0 / 60);
        end if;
        limits.cut_at := clock();
    elsif limits.learned_rate is null then
        limits.proven_concurrency := case when peak > limits.proven_concurrency * 1.2 then peak else limits.proven_concurrency end;
        return limits;
    elsif v_seconds < 1 then
        return limits;
    else
        -- 1 percent a second, and twice that for every 10 seconds without a refusal, 8 at most; only what is used up is too little
        if is_short then
            limits.learned_rate := least(limits.learned_rate * (1 + v_seconds * case when not limits.is_settled then 0.1 when limits.learned_concurrency is not null then 0.05 else v_growth end),
                                         case when limits.learned_concurrency is not null then greatest(accepted, limits.rate_before) * 1.3 end);
        end if;
        if in_use + 1 >= limits.learned_concurrency * 0.9 then
            limits.learned_concurrency := limits.learned_concurrency * (1 + v_seconds * case when v_is_trial and limits.cut_at <= limits.trial_at then 0.05 else v_growth end);
        end if;
    end if;
    limits.paced_at := clock();
    return limits;
end;
$$;
comment on function pgharness._paced(pgharness.model_limits, double precision, integer, integer, integer, double precision, timestamptz, boolean) is
'What is known of a model''s limits after a report: the rate is lowered to just below what was accepted, or raised gently while nothing is refused and all of it is used. Once refusals have confirmed it, a trial shows whether to limit the calls in flight instead, to as many as there were when one was refused, brings more.';

create or replace function pgharness._judged(limits pgharness.model_limits, worker_id bigint, failed integer, answered integer, wait double precision, error text)
    returns pgharness.model_limits
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_is_probe boolean := limits.probe_worker_id = _judged.worker_id;
begin
    if failed > 0 then
        limits.last_error := left(error, 1000);
        limits.last_failed_at := clock();
    end if;
    if limits.opened_at is null then
        limits.failures := case when answered > 0 then 0 else limits.failures end + failed;
        if limits.failures >= 10 then
            limits.opened_at := clock();
            limits.trips := 1;
            limits.next_probe_at := clock() + make_interval(secs => greatest(1, least(wait, 86400)));
        end if;
    elsif v_is_probe and answered > 0 then
        limits.opened_at := null;
        limits.next_probe_at := null;
        limits.probe_worker_id := null;
        limits.failures := 0;
        limits.trips := 0;
    elsif v_is_probe and failed > 0 then
        limits.failures := limits.failures + failed;
        limits.probe_worker_id := null;
        limits.trips := limits.trips + 1;
        limits.next_probe_at := clock() + make_interval(secs => case when wait > 0 then least(wait, 86400) else least(2 ^ (limits.trips - 1), 60) end);
    end if;
    return limits;
end;
$$;
comment on function pgharness._judged(pgharness.model_limits, bigint, integer, integer, double precision, text) is
'Whether a model counts as out of service after a report: from 10 failures in a row without an answer on; then a probe decides, after as long as the provider asks, or 1 second that doubles with every failed one up to a minute.';

create or replace function pgharness._rate_share(rate double precision, model_id bigint, worker_id bigint) returns double precision
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select greatest(rate / (count(*) + 1),
                    rate - coalesce(sum(case when l.wanted > 0 then rate / sharers.count else least(l.accepted * 1.2 + rate * 0.01, rate / sharers.count) end), 0))
      from model_leases as l join workers as w on w.id = l.worker_id
     cross join lateral (select count(*) + 1 as count from model_leases as x join workers as y on y.id = x.worker_id
                          where x.model_id = _rate_share.model_id and x.worker_id <> _rate_share.worker_id and x.in_use + x.wanted > 0
                            and x.updated_at > clock() - interval '5 seconds' and y.status in ('running', 'draining')) as sharers
     where l.model_id = _rate_share.model_id and l.worker_id <> _rate_share.worker_id and l.in_use + l.wanted > 0
       and l.updated_at > clock() - interval '5 seconds' and w.status in ('running', 'draining');
$$;
comment on function pgharness._rate_share(double precision, bigint, bigint) is
'A worker''s part of the calls that may begin a second: as much as each other one, and what those do not use.';

create or replace function pgharness._keep_limits(limits pgharness.model_limits) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    update model_limits as l
       set blocked_until = (limits).blocked_until, learned_rate = (limits).learned_rate, learned_concurrency = (limits).learned_concurrency,
           proven_concurrency = (limits).proven_concurrency, is_settled = (limits).is_settled, trial_at = (limits).trial_at, rate_before = (limits).rate_before,
           cut_at = (limits).cut_at, paced_at = (limits).paced_at, failures = (limits).failures, trips = (limits).trips, opened_at = (limits).opened_at,
           next_probe_at = (limits).next_probe_at, probe_worker_id = (limits).probe_worker_id, last_error = (limits).last_error,
           last_failed_at = (limits).last_failed_at
     where l.model_id = (limits).model_id;
$$;
comment on function pgharness._keep_limits(pgharness.model_limits) is 'Store what a report has changed of what is known of a model; the buckets are left as they are.';

drop function if exists pgharness.lease_model(bigint, bigint, integer, integer);
drop function if exists pgharness.lease_model(bigint, bigint, integer, integer, double precision, integer, integer, double precision, boolean, double precision, integer, integer, text);
create or replace function pgharness.lease_model(
    worker_id bigint, model_id bigint, in_use integer, wanted integer, accepted double precision default 0, peak integer default 0,
    refused integer default 0, refused_ago double precision default 0, is_short boolean default false, wait double precision default 0,
    failed integer default 0, answered integer default 0, error text default null
)
    returns table (granted integer, target integer, max_concurrency integer, is_rate_limited boolean, blocked_seconds double precision, rate double precision, proven_concurrency integer, is_out boolean)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_model    models;
    v_limits   model_limits;
    v_before   model_limits;
    v_others   record;
    v_max      integer;
    v_granted  integer := lease_model.in_use + lease_model.wanted;
    v_is_probe boolean;
begin
    insert into model_limits (model_id) values (lease_model.model_id) on conflict do nothing;
    select * into v_limits from model_limits as l where l.model_id = lease_model.model_id for no key update;
    select * into v_model from models as m where m.id = lease_model.model_id;
    select coalesce(sum(greatest(l.granted, l.in_use)), 0) as granted, count(*) filter (where l.in_use + l.wanted > 0) + 1 as sharers,
           coalesce(sum(l.in_use), 0)::integer as in_use, coalesce(sum(l.accepted) filter (where l.updated_at > clock() - interval '3 seconds'), 0) as accepted
      into v_others
      from model_leases as l join workers as w on w.id = l.worker_id
     where l.model_id = lease_model.model_id and l.worker_id <> lease_model.worker_id and w.status in ('running', 'draining');
    v_before := v_limits;
    v_limits := _paced(v_limits, lease_model.accepted + v_others.accepted, lease_model.in_use + v_others.in_use, case when lease_model.peak > 0 then lease_model.peak + v_others.in_use else 0 end,
                       lease_model.refused, lease_model.refused / greatest(lease_model.accepted, 1), clock() - make_interval(secs => lease_model.refused_ago),
                       lease_model.is_short);
    v_limits := _judged(v_limits, lease_model.worker_id, lease_model.failed, lease_model.answered, lease_model.wait, lease_model.error);
    if lease_model.wait > 0 and lease_model.failed = 0 and v_others.accepted < 1 then  -- nobody gets anything
        v_limits.blocked_until := greatest(v_limits.blocked_until, clock() + make_interval(secs => least(lease_model.wait, 86400)));
    end if;
    v_is_probe := v_limits.opened_at is not null and v_limits.next_probe_at <= clock() and lease_model.wanted > 0
                  and coalesce(v_limits.blocked_until <= clock(), true);
    if v_is_probe then
        v_limits.probe_worker_id := lease_model.worker_id;
        v_limits.next_probe_at := clock() + make_interval(secs => v_model.timeout_seconds + 5);  -- should it die meanwhile
    end if;
    if v_limits is distinct from v_before then
        perform _keep_limits(v_limits);
    end if;
    v_max := least(v_model.max_concurrency, floor(v_limits.learned_concurrency)::integer);
    if v_max is not null then
        v_granted := _share(v_max, v_others.granted::integer, v_others.sharers::integer, lease_model.in_use, lease_model.wanted);
    end if;
    if v_limits.opened_at is not null then
        v_max := lease_model.in_use + v_is_probe::integer;
        v_granted := least(v_granted, v_max);
    end if;
    insert into model_leases as l (model_id, worker_id, in_use, granted, wanted, accepted, updated_at)
    values (lease_model.model_id, lease_model.worker_id, lease_model.in_use, case when v_max is null then lease_model.in_use else v_granted end,
            lease_model.wanted, lease_model.accepted, clock())
    on conflict on constraint model_leases_pkey do update
       set in_use = excluded.in_use, granted = excluded.granted, wanted = excluded.wanted, accepted = excluded.accepted, updated_at = excluded.updated_at;
    return query select v_granted, case when v_granted > lease_model.in_use or v_limits.opened_at is not null then v_granted else least(v_granted, greatest(v_max / v_others.sharers::integer, 1)) end, v_max,
                        v_model.requests_per_minute is not null or v_model.tokens_per_minute is not null,
                        greatest(extract(epoch from v_limits.blocked_until - clock()),
                                 case when v_limits.opened_at is not null and not v_is_probe then extract(epoch from v_limits.next_probe_at - clock()) end, 0)::double precision,
                        _rate_share(v_limits.learned_rate, lease_model.model_id, lease_model.worker_id),
                        v_limits.proven_concurrency, v_limits.opened_at is not null;
end;
$$;
comment on function pgharness.lease_model(bigint, bigint, integer, integer, double precision, integer, integer, double precision, boolean, double precision, integer, integer, text) is
'For workers: how many calls to a model this worker may have in flight, given how many it has and how many more it wants; the sum over live workers never exceeds max_concurrency, nor what was learned, but for calls that were in flight before: those are not replaced beyond its target. Also that limit, whether the model has per-minute limits, the seconds for which nothing may be sent (its provider asks to wait, or it is out of service), how many calls a second this worker may begin (null: no limit is known), how many were once in flight together, and whether it is out of service. It reports what the worker has seen since its last question: calls accepted a second, the most in flight (or those in flight when one was refused), how many were refused, how long ago the last of those began, whether the rate kept calls waiting, for how many seconds to send nothing, failures since the last answer, answers, and the last failure. Example: select * from pgharness.lease_model(1, 2, 0, 10);';

drop function if exists pgharness.lease_run(bigint, bigint, integer, integer);
create or replace function pgharness.lease_run(worker_id bigint, run_id bigint, in_use integer, wanted integer)
    returns table (granted integer, target integer, max_concurrency integer, may_begin integer, blocked_seconds double precision)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run       runs;
    v_others    integer;
    v_sharers   integer;
    v_granted   integer := lease_run.in_use + lease_run.wanted;
    v_may_begin integer;
    v_places    integer;
begin
    select r.* into v_run from runs as r where r.id = lease_run.run_id;
    -- not the run's row, which is busy; those who share a budget come one after the other
    perform pg_advisory_xact_lock(hashtextextended('pgharness.lease_run ' || coalesce((
        select coalesce('project ' || i.project_id, 'instance ' || i.id) from instances as i where i.id = v_run.instance_id), ''), 0));
    if v_run.max_concurrency is not null then
        select coalesce(sum(greatest(l.granted, l.in_use)), 0), count(*) filter (where l.in_use + l.wanted > 0) + 1 into v_others, v_sharers
          from run_leases as l join workers as w on w.id = l.worker_id
         where l.run_id = lease_run.run_id and l.worker_id <> lease_run.worker_id and w.status in ('running', 'draining');
        v_granted := _share(v_run.max_concurrency, v_others, v_sharers, lease_run.in_use, lease_run.wanted);
    end if;
    if _is_budgeted(v_run) then
        v_places := coalesce((select w.concurrency from workers as w where w.id = lease_run.worker_id and w.concurrency > 0), 10);  -- code has no places of its own
        -- no more than it can use until it asks again; while nothing is known of the costs, one call in each place
        -- and nothing for who neither has nor wants a call: it asks no more, and what it held would be kept from the others
        v_may_begin := case when lease_run.in_use + lease_run.wanted = 0 then 0
                            else least(coalesce(_payable_calls(v_run, lease_run.worker_id, lease_run.in_use), greatest(v_places - lease_run.in_use, 0)),
                                       10 * greatest(v_places, 100)) end;
        v_granted := case when v_run.max_concurrency is null then lease_run.in_use + v_may_begin else least(v_granted, lease_run.in_use + v_may_begin) end;
    end if;
    if v_run.max_concurrency is not null or v_may_begin is not null then
        insert into run_leases as l (run_id, worker_id, in_use, granted, wanted, updated_at)
        values (lease_run.run_id, lease_run.worker_id, lease_run.in_use, v_granted, lease_run.wanted, clock())
        on conflict on constraint run_leases_pkey do update
           set in_use = excluded.in_use, granted = excluded.granted, wanted = excluded.wanted, updated_at = excluded.updated_at;
    end if;
    return query select v_granted, case when v_granted > lease_run.in_use then v_granted else least(v_granted, greatest(v_run.max_concurrency / v_sharers, 1)) end,
                        v_run.max_concurrency, v_may_begin, 0::double precision;
end;
$$;
comment on function pgharness.lease_run(bigint, bigint, integer, integer) is
'For workers: how many calls of a run this worker may have in flight, given how many it has begun and not recorded and how many more it wants; the sum over live workers never exceeds max_concurrency, but for calls that were in flight before: those are not replaced beyond its target. may_begin is how many more it may begin before it asks again, so that the budgets of the run, its instance and its project are kept: null without one. Example: select * from pgharness.lease_run(1, 7, 0, 10);';

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
