-- What runs and models cost, and how models behaved: read from calls, and from what was counted as they were recorded.

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
              coalesce(sum(c.call_count) filter (where c.outcome not in ('succeeded', 'cached', 'rate_limited', 'cancelled')), 0)::bigint as calls_failed,
              sum(c.input_tokens)::bigint as input_tokens, sum(c.output_tokens)::bigint as output_tokens, sum(c.cached_tokens)::bigint as cached_tokens,
              sum(c.cost_usd) as cost_usd, coalesce(sum(c.cost_usd) filter (where c.outcome <> 'succeeded'), 0) as wasted_cost_usd
         from pgharness.call_totals as c where c.run_id = r.id group by c.model_id, c.kind) as t
  join pgharness.models as m on m.id = t.model_id
  left join lateral pgharness._call_latencies(r.id) as l on l.model_id = t.model_id and l.kind = t.kind;
comment on view pgharness.model_performance is
'One row per run, model and kind of item (note, grade, task): its calls, their latency, tokens and cost. Example: select * from pgharness.model_performance where run_id = 1;';
comment on column pgharness.model_performance.kind is 'What the model was asked for: note, grade, or task (by the code of a run).';
comment on column pgharness.model_performance.call_count is 'Requests that ended, retries included; cancelled ones, and those that the response cache answered, are in this count alone.';
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
 cross join lateral (
       select coalesce(sum(t.call_count), 0)::bigint as call_count, coalesce(sum(t.input_tokens), 0)::bigint as input_tokens,
              coalesce(sum(t.output_tokens), 0)::bigint as output_tokens, coalesce(sum(t.cached_tokens), 0)::bigint as cached_tokens,
              coalesce(sum(t.cost_usd) filter (where t.outcome <> 'succeeded'), 0) as wasted_cost_usd
         from pgharness.call_totals as t where t.run_id = r.id) as c;
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
               from (select c.model_id, sum(c.call_count) as call_count, sum(c.input_tokens) as input_tokens, sum(c.output_tokens) as output_tokens,
                            sum(c.cached_tokens) as cached_tokens, sum(c.cost_usd) as cost_usd, max(c.last_used_at) as last_used_at
                       from pgharness.call_totals as c group by c.model_id, c.run_id
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
       pgharness._token_cost(now_.price, c.input_tokens, c.output_tokens, c.cached_tokens) + c.member_usd as usd_per_item,
       coalesce(sqrt(c.variance_usd), 0) as usd_deviation
  from pgharness.models as m
 cross join lateral (select pgharness._priced(m) as price offset 0) as now_
 cross join lateral (
       select recent.kind,
              count(*) filter (where recent.outcome = 'succeeded') as item_count,
              sum(recent.input_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded')  as input_tokens,
              sum(recent.output_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded') as output_tokens,
              sum(recent.cached_tokens)::double precision / count(*) filter (where recent.outcome = 'succeeded') as cached_tokens,
              coalesce(sum(recent.member_usd), 0) / count(*) filter (where recent.outcome = 'succeeded') as member_usd,
              var_samp(pgharness._token_cost(now_.price, recent.input_tokens, recent.output_tokens, recent.cached_tokens) + coalesce(recent.member_usd, 0))
                  filter (where recent.outcome = 'succeeded') as variance_usd
         from (select c.kind, c.outcome, c.input_tokens, c.output_tokens, c.cached_tokens, members.usd as member_usd
                 -- a range, lest the planner walk back through all calls of all models by their id, in search of a model that has none
                 from (select latest.*
                         from (select c.run_id, c.kind, c.ordinal, c.attempt, c.outcome, c.input_tokens, c.output_tokens, c.cached_tokens, c.started_at, c.parent_started_at
                                 from pgharness.calls as c where c.model_id between m.id and m.id and c.outcome <> 'cached' order by c.model_id desc, c.id desc limit 2000) as latest
                        where m.provider not in ('ensemble', 'hedge') or latest.parent_started_at is null
                        limit case when m.provider in ('ensemble', 'hedge') then 200 end) as c
                 left join lateral (
                       -- what a composite made others do for this call of its own, and they others: code may ask it often for one item
                       with recursive below as (
                           select x.model_id, x.started_at, x.input_tokens, x.output_tokens, x.cached_tokens, x.outcome, 1 as depth
                             from pgharness.calls as x
                            where x.run_id = c.run_id and x.kind = c.kind and x.ordinal = c.ordinal and x.attempt = c.attempt
                              and x.parent_started_at = c.started_at
                           union all
                           select x.model_id, x.started_at, x.input_tokens, x.output_tokens, x.cached_tokens, x.outcome, b.depth + 1
                             from below as b
                             join pgharness.calls as x on x.run_id = c.run_id and x.kind = c.kind and x.ordinal = c.ordinal
                                                      and x.attempt = c.attempt and x.parent_started_at = b.started_at
                            where b.depth < 4
                       )
                       select sum(pgharness._token_cost(pgharness._priced(x), b.input_tokens, b.output_tokens, b.cached_tokens)) as usd
                         from below as b join pgharness.models as x on x.id = b.model_id
                        where m.provider in ('ensemble', 'hedge') and b.outcome <> 'cached') as members on true) as recent
        group by recent.kind
       having count(*) filter (where recent.outcome = 'succeeded') > 0) as c;
comment on view pgharness.model_usage is
'One row per model and kind of item (note, grade) among its last 2,000 calls (of a composite, 200): the mean tokens of an item, with what its repeated calls used, and what that costs at present prices. Estimates rest on it.';
comment on column pgharness.model_usage.item_count is 'Calls that succeeded, over which the means are taken.';
comment on column pgharness.model_usage.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.model_usage.usd_per_item is 'Prices that are not set count as zero.';
comment on column pgharness.model_usage.usd_deviation is 'Standard deviation of what a call that succeeded costs. Both of a composite are of its members'' calls together.';

create or replace view pgharness.present_prices with (security_invoker = true) as
select m.id as model_id, m.name as model, m.provider, (p.price).input_usd_per_million, (p.price).output_usd_per_million, (p.price).cached_input_usd_per_million,
       (p.price).batch_price_factor, dated.valid_from, coalesce(dated.valid_until, later.valid_from) as valid_until
  from pgharness.models as m
 cross join lateral (select pgharness.clock() as now) as at_
 cross join lateral (select (pgharness._priced(m)) as price offset 0) as p
  left join lateral (
       select x.valid_from, x.valid_until from pgharness.model_prices as x
        where x.model_id = m.id and x.valid_from <= at_.now and (x.valid_until is null or x.valid_until > at_.now) order by x.valid_from desc limit 1) as dated on true
  left join lateral (
       select min(x.valid_from) as valid_from from pgharness.model_prices as x where x.model_id = m.id and x.valid_from > at_.now) as later on true
 where m.provider not in ('metric', 'ensemble', 'hedge');
comment on view pgharness.present_prices is
'One row per model that may cost anything: the prices that a run would take if it started now. Example: select model, input_usd_per_million, output_usd_per_million, valid_until from pgharness.present_prices;';
comment on column pgharness.present_prices.input_usd_per_million is 'USD per million input tokens; null counts as zero. Likewise the other prices.';
comment on column pgharness.present_prices.output_usd_per_million is 'USD per million output tokens, reasoning included.';
comment on column pgharness.present_prices.cached_input_usd_per_million is 'USD per million input tokens served from the provider''s cache; null means the input price.';
comment on column pgharness.present_prices.batch_price_factor is 'What a request in a batch costs, as a part of these prices.';
comment on column pgharness.present_prices.valid_from is 'Since when they hold; null for those in models, which have no date.';
comment on column pgharness.present_prices.valid_until is 'Until when they hold, as far as is known.';

create or replace view pgharness.repriced_runs with (security_invoker = true) as
select r.id as run_id, r.name as run, r.created_at as started_at, m.name as model, t.kind, t.input_tokens, t.output_tokens, t.cached_tokens, t.cost_usd,
       round(pgharness._token_cost(pgharness._priced(m), t.input_tokens, t.output_tokens, t.cached_tokens)::numeric, 8) as present_cost_usd
  from pgharness.runs as r
 cross join lateral (
       select c.model_id, c.kind, sum(c.input_tokens)::bigint as input_tokens, sum(c.output_tokens)::bigint as output_tokens, sum(c.cached_tokens)::bigint as cached_tokens,
              sum(c.cost_usd) as cost_usd
         from pgharness.call_totals as c where c.run_id = r.id and c.outcome <> 'cached' group by c.model_id, c.kind) as t
  join pgharness.models as m on m.id = t.model_id;
comment on view pgharness.repriced_runs is
'One row per run, model and kind of item: what its calls have cost, by the prices of its start, and what they would cost at present ones (live, not in batches). Example: select run, sum(cost_usd), sum(present_cost_usd) from pgharness.repriced_runs group by run;';
comment on column pgharness.repriced_runs.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.repriced_runs.present_cost_usd is 'By the prices of now.';

create or replace view pgharness.budgets with (security_invoker = true) as
select 'project' as scope, p.id as scope_id, p.name as subject, p.budget_usd, coalesce(s.spent_usd, 0) as spent_usd, p.budget_usd - coalesce(s.spent_usd, 0) as left_usd
  from pgharness.projects as p left join pgharness.project_spending as s on s.project_id = p.id
 where p.budget_usd is not null or s.spent_usd > 0
union all
select 'instance', i.id, i.name, i.total_budget_usd, coalesce(s.spent_usd, 0), i.total_budget_usd - coalesce(s.spent_usd, 0)
  from pgharness.instances as i left join pgharness.instance_spending as s on s.instance_id = i.id
 where i.total_budget_usd is not null or s.spent_usd > 0
union all
select 'run', r.id, r.name, r.budget_usd, pgharness._cost_usd(r), r.budget_usd - pgharness._cost_usd(r)
  from pgharness.runs as r where r.budget_usd is not null or pgharness._cost_usd(r) > 0;
comment on view pgharness.budgets is
'One row per project, instance and run that has a budget or has spent anything. Runs pause when one of theirs is spent. Example: select * from pgharness.budgets where left_usd <= 0;';
comment on column pgharness.budgets.scope is 'project, instance (all its runs) or run.';
comment on column pgharness.budgets.subject is 'The name of it.';
comment on column pgharness.budgets.spent_usd is 'What its runs have cost, those deleted since included.';
comment on column pgharness.budgets.left_usd is 'Of the budget; below 0 by at most what the calls in flight cost when it was spent. Null without one.';

create or replace view pgharness.cost_per_correct with (security_invoker = true) as
select r.id as run_id, r.name as run, c.name as combination, t.note_count, t.scored_count, t.correct_count, round(t.mean_score::numeric, 4) as mean_score,
       t.note_cost_usd, t.grade_cost_usd, t.note_cost_usd + t.grade_cost_usd as cost_usd,
       round(t.note_cost_usd / nullif(t.correct_count, 0), 8) as usd_per_correct,
       round((t.note_cost_usd + t.grade_cost_usd) / nullif(t.correct_count, 0), 8) as graded_usd_per_correct, c.number as combination_number
  from pgharness.runs as r
 cross join lateral pgharness.costs_per_correct(r.id) as t
  join pgharness.run_combinations as c on c.run_id = r.id and c.number = t.combination_number;
comment on view pgharness.cost_per_correct is
'One row per run and combination: what a correct note costs. Correct is a note with a mean score of at least half of what its grades could give; costs_per_correct() takes another threshold. Example: select combination, correct_count, usd_per_correct from pgharness.cost_per_correct where run_id = 1 order by usd_per_correct;';
comment on column pgharness.cost_per_correct.scored_count is 'Notes with grades.';
comment on column pgharness.cost_per_correct.correct_count is 'Those with a mean score of at least 0.5.';
comment on column pgharness.cost_per_correct.usd_per_correct is 'note_cost_usd, failed calls included, per correct note: what answers cost where nobody grades them.';
comment on column pgharness.cost_per_correct.graded_usd_per_correct is 'cost_usd per correct note.';
comment on column pgharness.cost_per_correct.combination_number is 'Its number in run_combinations.';

create or replace view pgharness.cost_per_point with (security_invoker = true) as
select c.run_id, c.run, c.combination, c.baseline, round(c.mean_score, 4) as mean_score, round(c.usd_per_note, 8) as usd_per_note,
       round(100 * (c.mean_score - c.base_score), 2) as extra_points, round(c.usd_per_note - c.base_usd, 8) as extra_usd_per_note,
       case when c.mean_score > c.base_score then round((c.usd_per_note - c.base_usd) / (100 * (c.mean_score - c.base_score)), 8) end as usd_per_point
  from (select each.*, first_value(each.combination) over cheapest as baseline, first_value(each.mean_score) over cheapest as base_score,
               first_value(each.usd_per_note) over cheapest as base_usd
          from (select c.run_id, c.run, c.combination, c.combination_number, c.mean_score, c.note_cost_usd / nullif(c.note_count, 0) as usd_per_note
                  from pgharness.cost_per_correct as c where c.scored_count > 0) as each
        window cheapest as (partition by each.run_id order by each.usd_per_note, each.mean_score desc, each.combination_number)) as c;
comment on view pgharness.cost_per_point is
'One row per run and combination with grades: how many percentage points of mean score it has more than the cheapest one of the run, what a note of it costs more, and so what a point costs. Example: select combination, extra_points, usd_per_point from pgharness.cost_per_point where run_id = 1;';
comment on column pgharness.cost_per_point.baseline is 'The combination of the run whose notes cost least.';
comment on column pgharness.cost_per_point.usd_per_note is 'Of its calls for notes, failed ones included; grading is not.';
comment on column pgharness.cost_per_point.extra_points is 'mean_score beyond the baseline''s, in percentage points.';
comment on column pgharness.cost_per_point.extra_usd_per_note is 'usd_per_note beyond the baseline''s.';
comment on column pgharness.cost_per_point.usd_per_point is 'USD more per note for each point more; null where the score is no better.';

create or replace view pgharness.circuit_breakers with (security_invoker = true) as
select m.id as model_id, m.name as model, coalesce(m.base_url, m.provider) as endpoint,
       case when l.opened_at is null then 'closed' when l.probe_worker_id is not null then 'half_open' else 'open' end as state,
       l.failures, l.opened_at, case when l.probe_worker_id is null then l.next_probe_at end as next_probe_at, l.last_error, l.last_failed_at
  from pgharness.model_limits as l join pgharness.models as m on m.id = l.model_id;
comment on view pgharness.circuit_breakers is
'One row per model that workers have called behind an API: whether it is in service. Example: select * from pgharness.circuit_breakers where state <> ''closed'';';
comment on column pgharness.circuit_breakers.endpoint is 'Where it is: its base_url, or its provider.';
comment on column pgharness.circuit_breakers.state is
'closed (calls go through), open (from 10 failures in a row on nothing is sent, and items wait without spending attempts), half_open (one call tries whether it is back).';
comment on column pgharness.circuit_breakers.failures is 'Outages, server errors and timeouts in a row.';
comment on column pgharness.circuit_breakers.opened_at is 'Since when it is out of service.';
comment on column pgharness.circuit_breakers.next_probe_at is 'When one call may try whether it is back.';
comment on column pgharness.circuit_breakers.last_error is 'How a call failed last.';
comment on column pgharness.circuit_breakers.last_failed_at is 'When that was.';

create or replace view pgharness.learned_limits with (security_invoker = true) as
select m.id as model_id, m.name as model, m.provider, round((l.learned_rate * 60)::numeric, 1) as requests_per_minute, floor(l.learned_concurrency)::integer as concurrency,
       l.cut_at as last_refused_at, coalesce(lease.in_flight, 0)::integer as in_flight, round(coalesce(lease.accepted, 0)::numeric * 60, 1) as present_requests_per_minute
  from pgharness.model_limits as l
  join pgharness.models as m on m.id = l.model_id
  left join lateral (
       select sum(x.in_use) as in_flight, sum(x.accepted) as accepted from pgharness.model_leases as x join pgharness.workers as w on w.id = x.worker_id
        where x.model_id = l.model_id and w.status in ('running', 'draining') and x.updated_at > pgharness.clock() - interval '10 seconds') as lease on true
 where l.learned_rate is not null;
comment on view pgharness.learned_limits is
'One row per model that has refused calls: what workers learned to ask of it at most, without configuration. Example: select * from pgharness.learned_limits;';
comment on column pgharness.learned_limits.requests_per_minute is 'Calls that all workers together begin a minute at most, at present; it rises until calls are refused again.';
comment on column pgharness.learned_limits.concurrency is 'Calls in flight at most, where refusals came at that number.';
comment on column pgharness.learned_limits.last_refused_at is 'When more was refused than was known, last.';
comment on column pgharness.learned_limits.in_flight is 'Calls in flight now.';
comment on column pgharness.learned_limits.present_requests_per_minute is 'Calls that begin a minute now.';

-- what the views were made of before
drop function if exists pgharness._call_totals(bigint), pgharness._call_sums(bigint);
