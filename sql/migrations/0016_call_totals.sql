-- The calls of each run, counted and summed as they are recorded: a new table, filled from the calls that are there. No call can be recorded meanwhile.

create table pgharness.call_totals (
    run_id             bigint not null,
    model_id           bigint not null,
    kind               text not null,
    outcome            text not null,
    combination_number integer not null,
    call_count         bigint not null,
    input_tokens       bigint not null,
    output_tokens      bigint not null,
    cached_tokens      bigint not null,
    cost_usd           numeric(20, 8) not null,
    saved_usd          numeric(20, 8) not null,
    last_used_at       timestamptz not null,
    constraint call_totals_pkey primary key (run_id, model_id, kind, outcome, combination_number),
    constraint call_totals_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
comment on table pgharness.call_totals is
'One row per run, model, kind of item, outcome and combination: its rows of calls, counted and summed by trigger _500_count as they are recorded. An archived run has none.';
comment on column pgharness.call_totals.kind is 'note, grade, or task (of a run''s code).';
comment on column pgharness.call_totals.outcome is 'As in calls.';
comment on column pgharness.call_totals.combination_number is 'The run''s combination that the calls were made for; -1 of a task.';
comment on column pgharness.call_totals.call_count is 'Calls that ended so; those that the response cache answered are cached.';
comment on column pgharness.call_totals.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.call_totals.saved_usd is 'What the cached ones had cost when they were made.';
comment on column pgharness.call_totals.last_used_at is 'When the last of them began.';

-- functions/ adds the trigger, in the same transaction: what is recorded before is counted here, and what is recorded after, there
lock table pgharness.calls in share row exclusive mode;
insert into pgharness.call_totals (run_id, model_id, kind, outcome, combination_number, call_count, input_tokens, output_tokens, cached_tokens, cost_usd, saved_usd,
                                   last_used_at)
select c.run_id, c.model_id, c.kind, c.outcome, c.combination_number, count(*), sum(c.input_tokens), sum(c.output_tokens), sum(c.cached_tokens), sum(c.cost_usd),
       sum(c.saved_usd), max(c.started_at)
  from (select k.*, coalesce(case k.kind when 'note' then k.ordinal when 'grade' then k.ordinal / nullif(d.grade_stride, 0) end % nullif(d.combination_count, 0), -1)
                    as combination_number
          from pgharness.calls as k left join pgharness.run_definitions as d on d.run_id = k.run_id) as c
  join pgharness.runs as r on r.id = c.run_id
 group by c.run_id, c.model_id, c.kind, c.outcome, c.combination_number;
