-- The response cache: its entries, and what they saved.

create or replace view pgharness.response_entries with (security_invoker = true) as
select encode(e.key, 'hex') as key, e.model, e.provider, e.run_id, r.name as run, e.created_at, e.cost_usd, e.latency_ms, e.hit_count, e.last_hit_at,
       e.hit_count * e.cost_usd as saved_usd, e.hit_count * e.latency_ms / 1000 as saved_seconds, e.answer
  from pgharness.responses as e
  left join pgharness.runs as r on r.id = e.run_id;
comment on view pgharness.response_entries is
'One row per answer that the response cache keeps: where it came from and what it saved. Example: select model, run, hit_count, saved_usd from pgharness.response_entries order by saved_usd desc limit 10;';
comment on column pgharness.response_entries.key is 'SHA-256 of the question.';
comment on column pgharness.response_entries.run_id is 'The run that asked.';
comment on column pgharness.response_entries.latency_ms is 'How long the model took.';
comment on column pgharness.response_entries.hit_count is 'How often it was given instead of a call.';
comment on column pgharness.response_entries.last_hit_at is 'When it was last given instead of a call.';
comment on column pgharness.response_entries.saved_usd is 'What those calls would have cost.';
comment on column pgharness.response_entries.saved_seconds is 'How long those calls would have taken, one after the other.';
comment on column pgharness.response_entries.answer is 'Its text.';

create or replace view pgharness.response_savings with (security_invoker = true) as
select e.model, count(*) as entry_count, sum(e.hit_count)::bigint as hit_count, sum(e.cost_usd) as cost_usd, sum(e.hit_count * e.cost_usd) as saved_usd,
       sum(e.hit_count * e.latency_ms) / 1000 as saved_seconds, max(e.last_hit_at) as last_hit_at
  from pgharness.responses as e group by e.model;
comment on view pgharness.response_savings is
'One row per model with answers in the response cache: how many, and what they saved over all runs. Example: select model, hit_count, saved_usd from pgharness.response_savings order by saved_usd desc;';
comment on column pgharness.response_savings.entry_count is 'Answers that are kept.';
comment on column pgharness.response_savings.hit_count is 'How often they were given instead of a call.';
comment on column pgharness.response_savings.cost_usd is 'What asking for them cost.';
comment on column pgharness.response_savings.saved_usd is 'What those calls would have cost.';
comment on column pgharness.response_savings.saved_seconds is 'How long those calls would have taken, one after the other.';
comment on column pgharness.response_savings.last_hit_at is 'When one was last given.';

create or replace view pgharness.run_savings with (security_invoker = true) as
select r.id as run_id, r.name as run, coalesce(r.response_cache, 'off') as response_cache, m.name as model, c.calls_cached, c.calls_made, c.saved_usd, c.cost_usd
  from pgharness.runs as r
 cross join lateral (
       select t.model_id, coalesce(sum(t.call_count) filter (where t.outcome = 'cached'), 0)::bigint as calls_cached,
              coalesce(sum(t.call_count) filter (where t.outcome not in ('cached', 'not_cached')), 0)::bigint as calls_made,
              sum(t.saved_usd) as saved_usd, sum(t.cost_usd) as cost_usd
         from pgharness.call_totals as t where t.run_id = r.id group by t.model_id) as c
  join pgharness.models as m on m.id = c.model_id;
comment on view pgharness.run_savings is
'One row per run and model that it asked: how many of its calls the response cache answered, and what that saved. A composite counts for its own answers; those of its members are in their rows. An archived run has none. Example: select model, calls_cached, calls_made, saved_usd from pgharness.run_savings where run_id = 1;';
comment on column pgharness.run_savings.response_cache is 'How the run uses the response cache: off, read, write or replay.';
comment on column pgharness.run_savings.calls_cached is 'Calls that were answered from the cache, for nothing.';
comment on column pgharness.run_savings.calls_made is 'Requests that were made, whatever became of them.';
comment on column pgharness.run_savings.saved_usd is 'What the cached ones had cost when they were made.';

-- what the view was made of before
drop function if exists pgharness._call_savings(bigint);
