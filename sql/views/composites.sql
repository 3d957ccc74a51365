-- Composites: what their calls came to, and the calls of their members.

create or replace view pgharness.member_calls with (security_invoker = true) as
select c.run_id, c.kind, c.ordinal, c.attempt, parent.id as parent_id, p.name as parent, c.id as call_id, m.name as model, c.outcome, c.error,
       c.latency_ms, c.input_tokens, c.output_tokens, c.cost_usd, c.is_estimated, c.started_at, c.parent_started_at
  from pgharness.calls as c
  join pgharness.calls as parent on parent.run_id = c.run_id and parent.kind = c.kind and parent.ordinal = c.ordinal and parent.attempt = c.attempt
                                and parent.started_at = c.parent_started_at
  join pgharness.models as m on m.id = c.model_id
  join pgharness.models as p on p.id = parent.model_id
 where c.parent_started_at is not null;
comment on view pgharness.member_calls is
'One row per call that a composite made of a member, with the call that it was made for. Example: select parent, model, outcome, cost_usd from pgharness.member_calls where run_id = 1;';
comment on column pgharness.member_calls.parent is 'The composite.';
comment on column pgharness.member_calls.model is 'The member.';
comment on column pgharness.member_calls.parent_started_at is 'When the composite''s own call began.';
comment on column pgharness.member_calls.parent_id is 'The composite''s own call, which may itself be a member''s.';
comment on column pgharness.member_calls.is_estimated is 'Whether tokens and cost are an estimate: of a call that was cancelled because another answered first.';

create or replace view pgharness.composite_calls with (security_invoker = true) as
select c.run_id, c.kind, c.ordinal, c.attempt, c.id as call_id, m.name as model, m.provider, c.outcome, c.error, c.latency_ms,
       members.member_count, members.failed_count, members.input_tokens, members.output_tokens, members.cost_usd,
       (c.composition ->> 'consensus')::double precision as consensus, c.composition, c.started_at, c.parent_started_at
  from pgharness.calls as c
  join pgharness.models as m on m.id = c.model_id
 cross join lateral (
       with recursive below as (
           select x.started_at, x.outcome, x.input_tokens, x.output_tokens, x.cost_usd, true as is_direct
             from pgharness.calls as x
            where x.run_id = c.run_id and x.kind = c.kind and x.ordinal = c.ordinal and x.attempt = c.attempt and x.parent_started_at = c.started_at
           union all
           select x.started_at, x.outcome, x.input_tokens, x.output_tokens, x.cost_usd, false
             from below as b
             join pgharness.calls as x on x.run_id = c.run_id and x.kind = c.kind and x.ordinal = c.ordinal and x.attempt = c.attempt and x.parent_started_at = b.started_at
       )
       select count(*) filter (where b.is_direct) as member_count,
              count(*) filter (where b.is_direct and b.outcome not in ('succeeded', 'cached', 'cancelled')) as failed_count,
              coalesce(sum(b.input_tokens), 0)::bigint as input_tokens, coalesce(sum(b.output_tokens), 0)::bigint as output_tokens, coalesce(sum(b.cost_usd), 0) as cost_usd
         from below as b) as members
 where m.provider in ('ensemble', 'hedge');
comment on view pgharness.composite_calls is
'One row per call of a composite: how long it took by the clock, what its members cost together, and how it came to its answer. Example: select model, consensus, member_count, cost_usd from pgharness.composite_calls where run_id = 1;';
comment on column pgharness.composite_calls.parent_started_at is 'Of a composite that is itself a member: when its composite''s call began.';
comment on column pgharness.composite_calls.member_count is 'Calls that it made of its members.';
comment on column pgharness.composite_calls.failed_count is 'Those that failed; cancelled ones are not among them.';
comment on column pgharness.composite_calls.cost_usd is 'Of its members'' calls, and of theirs; input_tokens and output_tokens likewise.';
comment on column pgharness.composite_calls.consensus is 'Of an ensemble: the share of the votes that agree with its answer, 0 to 1.';
comment on column pgharness.composite_calls.composition is 'The votes of an ensemble, or the delay of a hedge and which request won.';
comment on column pgharness.composite_calls.kind is 'note, grade, or task (asked by the code of a run).';
comment on column pgharness.composite_calls.ordinal is 'The item that it was made for: with run_id, kind and attempt.';
comment on column pgharness.composite_calls.attempt is 'Which try of the item it was.';
comment on column pgharness.composite_calls.outcome is 'As in calls.';
comment on column pgharness.member_calls.kind is 'note, grade, or task (asked by the code of a run).';
comment on column pgharness.member_calls.ordinal is 'The item that it was made for: with run_id, kind and attempt.';
comment on column pgharness.member_calls.attempt is 'Which try of the item it was.';
comment on column pgharness.member_calls.outcome is 'As in calls; cancelled where another answered first.';
comment on column pgharness.composite_calls.latency_ms is 'By the clock, from the first request to the answer.';
comment on column pgharness.member_calls.latency_ms is 'From the request to its answer, or until it was cancelled.';
