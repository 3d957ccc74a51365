-- Hedging: what workers learn from each other about how long models take.

create or replace function pgharness.recent_latencies(model_ids bigint[], after bigint[])
    returns table (model_id bigint, call_id bigint, started_at timestamptz, seconds double precision, is_cut boolean, prompt_tokens double precision, answer_tokens double precision)
    language sql stable security invoker rows 1000 set search_path = pgharness, pg_temp
as $$
    with recent as (
        select wanted.model_id, c.id, c.kind, c.started_at, c.latency_ms, c.outcome, c.batch_id, c.input_tokens, c.output_tokens,
               -- a further request for an answer that the same model was asked for before is no sample of its requests
               c.parent_started_at is not null and exists (
                   select from calls as f
                    where f.run_id = c.run_id and f.kind = c.kind and f.ordinal = c.ordinal and f.attempt = c.attempt
                      and f.parent_started_at = c.parent_started_at and f.started_at < c.started_at and f.model_id = c.model_id) as is_repeated
          from unnest(recent_latencies.model_ids, recent_latencies.after) as wanted (model_id, after)
         cross join lateral (
               -- a range, lest the planner walk back through all calls of all models by their id
               select c.* from calls as c
                where c.model_id between wanted.model_id and wanted.model_id and c.id > coalesce(wanted.after, 0)
                order by c.model_id desc, c.id desc limit case when wanted.after is null then 1000 else 200 end) as c
    )
    select r.model_id, r.id, r.started_at, r.latency_ms / 1000, r.outcome <> 'succeeded', coalesce(r.input_tokens, 0)::double precision,
           coalesce(avg(nullif(r.output_tokens, 0)) filter (where r.outcome = 'succeeded') over (partition by r.model_id, r.kind), 0)::double precision
      from recent as r
     where r.outcome in ('succeeded', 'cancelled', 'timeout') and not r.is_repeated and r.batch_id is null and r.latency_ms > 0  -- which imported calls may lack
     order by r.id;
$$;
comment on function pgharness.recent_latencies(bigint[], bigint[]) is
'For workers: how long models took lately, by their calls beyond an id each: the newest 200, or 1,000 where it is null. A call that is_cut was cancelled, or timed out, then; answer_tokens is what the model''s answers to that kind of item have on average. Example: select * from pgharness.recent_latencies(array[5], array[null]::bigint[]);';

create or replace function pgharness._hedging_latencies(run_id bigint, model_id bigint, kind text, call_count bigint)
    returns table (delay_ms double precision, latency_ms double precision[], unhedged_ms double precision[])
    language plpgsql stable security invoker rows 1 set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan set jit = off
as $$
declare
    v_step constant bigint := _hedging_latencies.call_count / 50000 + 1;  -- of more calls than that, an even sample, picked by a hash
begin
    return query
    with sampled as materialized (
        select c.outcome, c.latency_ms, (c.composition ->> 'delay_ms')::double precision as delay_ms,
               (c.composition ->> 'primary_ms')::double precision as primary_ms, c.composition ? 'primary_is_cut' as is_cut
          from calls as c
         where c.run_id = _hedging_latencies.run_id and c.model_id = _hedging_latencies.model_id and c.kind = _hedging_latencies.kind
           and c.composition <> '{}' and c.outcome <> 'cached'
           and not exists (select from calls as k
                            where k.run_id = c.run_id and k.kind = c.kind and k.ordinal = c.ordinal and k.attempt = c.attempt
                              and k.parent_started_at = c.started_at and k.outcome = 'cached')
           and (v_step = 1 or hashint8(c.ordinal) % v_step = 0)
    ), ranked as (
        select s.primary_ms, s.is_cut, count(*) over () - row_number() over (order by s.primary_ms, s.is_cut) + 1 as at_risk
          from sampled as s where s.primary_ms is not null
    ), survival as (
        -- the product-limit estimate of the share that takes longer; nobody is left after the last one, and 0 has no logarithm
        select r.primary_ms, exp(sum(case when r.is_cut then 0 else ln(greatest(1 - 1::double precision / r.at_risk, 1e-30)) end)
                                 over (order by r.primary_ms, r.is_cut rows unbounded preceding)) as share
          from ranked as r
    )
    select percentile_cont(0.5) within group (order by s.delay_ms),
           percentile_cont('{0.5, 0.95, 0.99}'::double precision[]) within group (order by s.latency_ms) filter (where s.outcome = 'succeeded'),
           (select array[min(v.primary_ms) filter (where v.share <= 0.5 + 1e-9), min(v.primary_ms) filter (where v.share <= 0.05 + 1e-9),
                         min(v.primary_ms) filter (where v.share <= 0.01 + 1e-9)] from survival as v)
      from sampled as s;
end;
$$;
comment on function pgharness._hedging_latencies(bigint, bigint, text, bigint) is
'The median delay of a hedge in a run, and the 50th, 95th and 99th percentile of its latency, with hedging and without; beyond 50,000 calls, of an even sample of about so many. The sample is the same at every look.';
