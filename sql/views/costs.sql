-- What runs and models cost, and how models behaved: read from calls.

create or replace view pgharness.model_performance with (security_invoker = true) as
select r.id as run_id, r.name as run, m.name as model, t.kind, t.call_count, t.calls_succeeded, t.calls_rate_limited, t.calls_failed,
       round(l.latency_ms[1]::numeric, 1) as latency_p50_ms, round(l.latency_ms[2]::numeric, 1) as latency_p90_ms,
       round(l.latency_ms[3]::numeric, 1) as latency_p95_ms, round(l.latency_ms[4]::numeric, 1) as latency_p99_ms,
       t.input_tokens, t.output_tokens, t.cached_tokens, t.cost_usd, t.wasted_cost_usd
  from pgharness.runs as r
 cross join lateral (
       select c.model_id, c.kind, sum(c.call_count)::bigint                                           as call_count,
              coalesce(sum(c.call_count) filter (where c.outcome = 'succeeded'), 0)::bigint           as calls_succeeded,
              coalesce(sum(c.call_count) filter (where c.outcome = 'rate_limited'), 0)::bigint        as calls_rate_limited,
              coalesce(sum(c.call_count) filter (where c.outcome not in ('succeeded', 'rate_limited', 'cancelled')), 0)::bigint as calls_failed,
              sum(c.input_tokens)::bigint as input_tokens, sum(c.output_tokens)::bigint as output_tokens, sum(c.cached_tokens)::bigint as cached_tokens,
              sum(c.cost_usd) as cost_usd, coalesce(sum(c.cost_usd) filter (where c.outcome <> 'succeeded'), 0) as wasted_cost_usd
         from pgharness._call_totals(r.id) as c group by c.model_id, c.kind) as t
  join pgharness.models as m on m.id = t.model_id
  left join lateral pgharness._call_latencies(r.id) as l on l.model_id = t.model_id and l.kind = t.kind;
comment on view pgharness.model_performance is
'One row per run, model and kind of item (note, grade, task): its calls, their latency, tokens and cost. Example: select * from pgharness.model_performance where run_id = 1;';
comment on column pgharness.model_performance.kind is 'What the model was asked for: note, grade, or task (by the code of a run).';
comment on column pgharness.model_performance.call_count is 'Requests that ended, retries included; cancelled ones are in this count alone.';
comment on column pgharness.model_performance.calls_failed is 'Calls that ended neither well, nor at a rate limit, nor by a cancelled run.';
comment on column pgharness.model_performance.latency_p50_ms is 'Median latency of the calls that succeeded; p90, p95 and p99 likewise (percentile_cont). In a run of more than 50,000 notes (or grades), of an even sample of theirs.';
comment on column pgharness.model_performance.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.model_performance.wasted_cost_usd is 'The part of cost_usd spent on calls that did not succeed.';

create or replace view pgharness.cost_by_run with (security_invoker = true) as
select r.id as run_id, r.name as run, r.instance, r.kind, r.status,
       c.call_count, c.input_tokens, c.output_tokens, c.cached_tokens,
       r.note_cost_usd, r.grade_cost_usd, pgharness._cost_usd(r) as cost_usd, r.budget_usd,
       round((r.note_cost_usd + r.grade_cost_usd) / nullif(r.notes_succeeded, 0), 8) as usd_per_note,
       c.wasted_cost_usd, r.created_at as started_at, r.task_cost_usd
  from pgharness.runs as r
 cross join lateral pgharness._call_sums(r.id) as c;
comment on view pgharness.cost_by_run is
'One row per run: calls, tokens and cost. Example: select run, cost_usd, usd_per_note from pgharness.cost_by_run order by cost_usd desc;';
comment on column pgharness.cost_by_run.call_count is 'Requests to models that ended, whatever their outcome.';
comment on column pgharness.cost_by_run.cached_tokens is 'The part of input_tokens that providers served from their caches.';
comment on column pgharness.cost_by_run.usd_per_note is 'cost_usd, grading included, per note that succeeded.';
comment on column pgharness.cost_by_run.wasted_cost_usd is 'The part of cost_usd spent on calls that did not succeed.';
comment on column pgharness.cost_by_run.task_cost_usd is 'The part of cost_usd spent on calls of a run''s code.';

create or replace view pgharness.cost_by_model with (security_invoker = true) as
select m.id as model_id, m.name as model, m.provider, coalesce(c.run_count, 0) as run_count, coalesce(c.call_count, 0) as call_count,
       coalesce(c.input_tokens, 0) as input_tokens, coalesce(c.output_tokens, 0) as output_tokens, coalesce(c.cached_tokens, 0) as cached_tokens,
       coalesce(c.cost_usd, 0) as cost_usd, c.last_used_at
  from pgharness.models as m
  left join (select each.model_id, count(*) as run_count, sum(each.call_count)::bigint as call_count, sum(each.input_tokens)::bigint as input_tokens,
                    sum(each.output_tokens)::bigint as output_tokens, sum(each.cached_tokens)::bigint as cached_tokens, sum(each.cost_usd) as cost_usd,
                    max(each.last_used_at) as last_used_at
               from (select c.model_id, count(*) as call_count, sum(c.input_tokens) as input_tokens, sum(c.output_tokens) as output_tokens,
                            sum(c.cached_tokens) as cached_tokens, sum(c.cost_usd) as cost_usd, max(c.started_at) as last_used_at
                       from pgharness.calls as c group by c.model_id, c.run_id
                     union all
                     select k.model_id, sum(k.call_count), sum(k.input_tokens), sum(k.output_tokens), sum(k.cached_tokens), sum(k.cost_usd), max(k.last_used_at)
                       from pgharness.runs as r
                       join pgharness.archives as a on a.run_id = r.id
                      cross join lateral jsonb_to_recordset(a.costs) as k (model_id bigint, call_count bigint, input_tokens bigint, output_tokens bigint,
                                                                           cached_tokens bigint, cost_usd numeric, last_used_at timestamptz)
                      where r.archived_at is not null group by k.model_id, r.id) as each
              group by each.model_id) as c on c.model_id = m.id;
comment on view pgharness.cost_by_model is
'One row per model, used or not: its calls, tokens and cost over all runs, archived ones included. Example: select model, cost_usd from pgharness.cost_by_model order by cost_usd desc;';
comment on column pgharness.cost_by_model.run_count is 'Runs that called it.';
comment on column pgharness.cost_by_model.call_count is 'Requests that ended, whatever their outcome.';
comment on column pgharness.cost_by_model.cached_tokens is 'The part of input_tokens that the provider served from its cache.';

create or replace view pgharness.model_usage with (security_invoker = true) as
select m.id as model_id, m.name as model, c.kind, c.item_count, c.input_tokens, c.output_tokens, c.cached_tokens,
       ((c.input_tokens - c.cached_tokens) * coalesce(m.input_usd_per_million, 0)
        + c.cached_tokens * coalesce(m.cached_input_usd_per_million, m.input_usd_per_million, 0)
        + c.output_tokens * coalesce(m.output_usd_per_million, 0)) / 1e6 as usd_per_item
  from pgharness.models as m
 cross join lateral (
       select recent.kind,
              count(*) filter (where recent.outcome = 'succeeded') as item_count,
              sum(recent.input_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded')  as input_tokens,
              sum(recent.output_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded') as output_tokens,
              sum(recent.cached_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded') as cached_tokens
         from (select c.kind, c.outcome, c.input_tokens, c.output_tokens, c.cached_tokens
                 -- a range, lest the planner walk back through all calls of all models by their id, in search of a model that has none
                 from pgharness.calls as c where c.model_id between m.id and m.id order by c.model_id desc, c.id desc limit 2000) as recent
        group by recent.kind
       having count(*) filter (where recent.outcome = 'succeeded') > 0) as c;
comment on view pgharness.model_usage is
'One row per model and kind of item (note, grade) among its last 2,000 calls: the mean tokens of an item, with what its repeated calls used, and what that costs at the model''s present prices. Estimates rest on it.';
comment on column pgharness.model_usage.item_count is 'Calls that succeeded, over which the means are taken.';
comment on column pgharness.model_usage.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.model_usage.usd_per_item is 'Prices that are not set count as zero.';
