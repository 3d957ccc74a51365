-- Hedging: what it brought, and what it cost.

create or replace view pgharness.hedging with (security_invoker = true) as
select r.id as run_id, r.name as run, m.name as model, h.kind, h.strategy, h.call_count, h.hedged_count,
       round(h.hedged_count::numeric / h.call_count, 4)              as hedge_rate,
       h.won_count,
       round(h.won_count::numeric / nullif(h.hedged_count, 0), 4)    as win_rate,
       h.extra_count,
       round(h.extra_count::numeric / h.call_count, 4)               as extra_rate,
       h.held_back_count,
       round(l.delay_ms::numeric, 1)        as delay_p50_ms,
       round(l.latency_ms[1]::numeric, 1)   as latency_p50_ms,
       round(l.latency_ms[2]::numeric, 1)   as latency_p95_ms,
       round(l.latency_ms[3]::numeric, 1)   as latency_p99_ms,
       round(l.unhedged_ms[1]::numeric, 1)  as unhedged_p50_ms,
       round(l.unhedged_ms[2]::numeric, 1)  as unhedged_p95_ms,
       round(l.unhedged_ms[3]::numeric, 1)  as unhedged_p99_ms,
       h.cost_usd, h.extra_cost_usd,
       round(h.extra_cost_usd / nullif(h.cost_usd - h.extra_cost_usd, 0), 4) as extra_cost_rate
  from pgharness.models as m
 cross join lateral (
       select c.run_id, c.kind, min(c.composition ->> 'strategy')                        as strategy,
              count(*)                                                                   as call_count,
              count(*) filter (where (c.composition ->> 'hedges')::integer > 0)          as hedged_count,
              count(*) filter (where (c.composition ->> 'winner_number')::integer > 0)   as won_count,
              coalesce(sum((c.composition ->> 'hedges')::integer), 0)                    as extra_count,
              count(*) filter (where c.composition ? 'held_back')                        as held_back_count,
              coalesce(sum((c.composition ->> 'cost_usd')::numeric), 0)                  as cost_usd,
              coalesce(sum((c.composition ->> 'extra_usd')::numeric), 0)                 as extra_cost_usd
         from pgharness.calls as c
        where c.model_id between m.id and m.id and c.composition <> '{}' and c.outcome <> 'cached'
          -- what a member had in the response cache says nothing of how long it takes
          and not exists (select from pgharness.calls as k
                           where k.run_id = c.run_id and k.kind = c.kind and k.ordinal = c.ordinal and k.attempt = c.attempt
                             and k.parent_started_at = c.started_at and k.outcome = 'cached')
        group by c.run_id, c.kind) as h
  join pgharness.runs as r on r.id = h.run_id
 cross join lateral pgharness._hedging_latencies(h.run_id, m.id, h.kind, h.call_count) as l
 where m.provider = 'hedge';
comment on view pgharness.hedging is
'One row per run, hedge and kind of item (note, grade, task): how often it asked again, how often that paid, latency with and without, and cost. Example: select model, hedge_rate, win_rate, latency_p99_ms, unhedged_p99_ms, extra_cost_usd from pgharness.hedging where run_id = 1;';
comment on column pgharness.hedging.kind is 'What the hedge was asked for: note, grade, or task (by the code of a run).';
comment on column pgharness.hedging.strategy is 'How the delay is chosen: fixed, percentile, adaptive, workload or exponential; of several, the first request''s.';
comment on column pgharness.hedging.call_count is 'Calls of the hedge that ended, failed ones included; those of which a request was answered from the response cache are left out, here and in all that follows.';
comment on column pgharness.hedging.hedged_count is 'Those for which it asked again.';
comment on column pgharness.hedging.hedge_rate is 'hedged_count / call_count.';
comment on column pgharness.hedging.won_count is 'Calls whose answer came from a further request.';
comment on column pgharness.hedging.win_rate is 'won_count / hedged_count.';
comment on column pgharness.hedging.extra_count is 'Requests beyond the first of each call.';
comment on column pgharness.hedging.extra_rate is 'extra_count / call_count: what max_extra bounds.';
comment on column pgharness.hedging.held_back_count is 'Calls that were slow, and yet had no further request: beyond max_extra, or while a limit held it back.';
comment on column pgharness.hedging.delay_p50_ms is 'Median delay before asking again; in a run of more than 50,000 such calls, of an even sample of theirs, like the percentiles.';
comment on column pgharness.hedging.latency_p50_ms is 'Median latency of the calls that succeeded; p95 and p99 likewise (percentile_cont).';
comment on column pgharness.hedging.unhedged_p50_ms is
'Median latency of the first requests alone, as it would be without hedging; p95 and p99 likewise. Those that were cancelled when another answered count as longer than they were waited for (product-limit estimate); null where that leaves it open.';
comment on column pgharness.hedging.unhedged_p95_ms is '95th percentile, likewise.';
comment on column pgharness.hedging.unhedged_p99_ms is '99th percentile, likewise: null whenever all of the slowest first requests were cancelled, as where hedging works well, since nobody saw how long they would have taken. Ask without the hedge beside it, as experiment hedging does, to see it.';
comment on column pgharness.hedging.cost_usd is 'Of all requests that were made for the calls.';
comment on column pgharness.hedging.extra_cost_usd is 'The part of cost_usd that was not for the answers that were taken.';
comment on column pgharness.hedging.extra_cost_rate is 'extra_cost_usd / the rest of cost_usd.';
