-- Learned limits, circuit breakers, prices with dates, budgets of instances and projects. New tables; new columns of existing ones under a brief lock.

alter table pgharness.model_limits
    add column learned_rate double precision,
    add column learned_concurrency double precision,
    add column proven_concurrency integer not null default 0,
    add column is_settled boolean not null default false,
    add column trial_at timestamptz,
    add column rate_before double precision,
    add column cut_at timestamptz,
    add column paced_at timestamptz,
    add column failures integer not null default 0,
    add column trips integer not null default 0,
    add column opened_at timestamptz,
    add column next_probe_at timestamptz,
    add column probe_worker_id bigint,
    add column last_error text,
    add column last_failed_at timestamptz;
comment on column pgharness.model_limits.learned_rate is 'Calls that may begin a second on all workers together, as learned from what the provider refused; null while it has refused nothing.';
comment on column pgharness.model_limits.learned_concurrency is 'Calls that may be in flight on all workers together, where to limit their number has brought more than to limit their rate, or is being tried; else null.';
comment on column pgharness.model_limits.proven_concurrency is 'The most calls that were in flight together while nothing was refused: workers that start begin there.';
comment on column pgharness.model_limits.is_settled is 'Whether refusals confirmed the learned limits; before, they grow fast.';
comment on column pgharness.model_limits.trial_at is 'When it was last tried whether to limit the calls in flight brings more than to limit their rate.';
comment on column pgharness.model_limits.rate_before is 'Calls accepted a second before that trial.';
comment on column pgharness.model_limits.cut_at is 'When the provider last refused more than was known, and the learned limits were lowered to what it had accepted.';
comment on column pgharness.model_limits.paced_at is 'When the learned limits were last lowered or raised.';
comment on column pgharness.model_limits.failures is 'Failures in a row, by the last reports of workers: outages, server errors and calls without an answer in time.';
comment on column pgharness.model_limits.trips is 'Probes in a row that failed, the outage itself included; each doubles the time to the next one.';
comment on column pgharness.model_limits.opened_at is 'Since when the model counts as out of service, and gets no calls but probes; null while it is in service.';
comment on column pgharness.model_limits.next_probe_at is 'When one call may try whether it is back.';
comment on column pgharness.model_limits.probe_worker_id is 'The worker whose call is trying that now.';
comment on column pgharness.model_limits.last_error is 'How a call failed last.';
comment on column pgharness.model_limits.last_failed_at is 'When that was.';

alter table pgharness.model_leases add column accepted double precision not null default 0;
comment on column pgharness.model_leases.accepted is 'Calls that it began a second of late and that were not refused.';
comment on table pgharness.model_leases is
'One row per worker that calls a model: how much of its limits the worker may use. Leases of workers that died do not count.';

-- Money: budgets of instances and projects, what was spent on them, and prices with dates.

alter table pgharness.projects add column budget_usd numeric(12, 6);
alter table pgharness.projects add constraint projects_budget_usd_check check (budget_usd > 0 and budget_usd <> 'NaN') not valid;
-- a handful of rows
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.projects validate constraint projects_budget_usd_check;
comment on column pgharness.projects.budget_usd is 'What all runs of its instances may spend together; null means no limit.';
alter table pgharness.instances add column total_budget_usd numeric(12, 6);
alter table pgharness.instances add constraint instances_total_budget_usd_check check (total_budget_usd > 0 and total_budget_usd <> 'NaN') not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.instances validate constraint instances_total_budget_usd_check;
comment on column pgharness.instances.total_budget_usd is 'What all its runs may spend together; null means no limit. budget_usd is for each of them.';

create table pgharness.instance_spending (
    instance_id bigint not null,
    spent_usd   numeric(16, 8) not null default 0,
    constraint instance_spending_pkey primary key (instance_id),
    constraint instance_spending_instance_id_fkey foreign key (instance_id) references pgharness.instances (id) on delete cascade
) with (fillfactor = 50);
comment on table pgharness.instance_spending is 'One row per instance whose runs cost anything: a counter, which deleted runs do not lower.';
comment on column pgharness.instance_spending.spent_usd is 'What its runs have cost.';
create table pgharness.project_spending (
    project_id bigint not null,
    spent_usd  numeric(16, 8) not null default 0,
    constraint project_spending_pkey primary key (project_id),
    constraint project_spending_project_id_fkey foreign key (project_id) references pgharness.projects (id) on delete cascade
) with (fillfactor = 50);
comment on table pgharness.project_spending is 'One row per project on which anything was spent: a counter, which deleted runs and instances do not lower.';
comment on column pgharness.project_spending.spent_usd is 'What runs of its instances have cost.';
insert into pgharness.instance_spending (instance_id, spent_usd)
select r.instance_id, sum(r.note_cost_usd + r.grade_cost_usd + r.task_cost_usd) from pgharness.runs as r
 group by r.instance_id having sum(r.note_cost_usd + r.grade_cost_usd + r.task_cost_usd) > 0;
insert into pgharness.project_spending (project_id, spent_usd)
select i.project_id, sum(s.spent_usd) from pgharness.instance_spending as s join pgharness.instances as i on i.id = s.instance_id
 where i.project_id is not null group by i.project_id;

create table pgharness.model_prices (
    id                           bigint generated always as identity,
    model_id                     bigint not null,
    model                        text not null,
    valid_from                   timestamptz not null,
    valid_until                  timestamptz,
    input_usd_per_million        numeric(12, 6),
    output_usd_per_million       numeric(12, 6),
    cached_input_usd_per_million numeric(12, 6),
    batch_price_factor           double precision,
    created_at                   timestamptz not null default now(),
    constraint model_prices_pkey primary key (id),
    constraint model_prices_model_id_valid_from_key unique (model_id, valid_from),
    constraint model_prices_valid_until_check check (valid_until > valid_from),
    constraint model_prices_prices_check check (input_usd_per_million >= 0 and output_usd_per_million >= 0 and cached_input_usd_per_million >= 0),
    constraint model_prices_batch_price_factor_check check (batch_price_factor between 0 and 1),
    constraint model_prices_model_fkey foreign key (model_id, model)
        references pgharness.models (id, name) on update cascade on delete cascade
);
create index model_prices_model_id_idx on pgharness.model_prices (model_id, model);
comment on table pgharness.model_prices is
'One row per time in which a model has or had prices of its own. A run takes those of its start, and keeps them; where there are none, those in models, which have no date. Insert a row when a provider announces a change: insert into pgharness.model_prices (model, valid_from, input_usd_per_million, output_usd_per_million) values (''...'', ''2026-01-01'', 1, 4);';
comment on column pgharness.model_prices.model is 'The model''s name.';
comment on column pgharness.model_prices.valid_from is 'From when on they hold.';
comment on column pgharness.model_prices.valid_until is 'Until when they hold; null: until a later row begins.';
comment on column pgharness.model_prices.input_usd_per_million is 'USD per million input tokens; null keeps that of models. Likewise the other prices.';
comment on column pgharness.model_prices.output_usd_per_million is 'USD per million output tokens, reasoning included.';
comment on column pgharness.model_prices.cached_input_usd_per_million is 'USD per million input tokens served from the provider''s cache.';
comment on column pgharness.model_prices.batch_price_factor is 'What a request in a batch costs, as a part of these prices.';

-- squawk-ignore ban-drop-constraint
alter table pgharness.models drop constraint models_api_key_env_check;
alter table pgharness.models
    add constraint models_api_key_env_check check (api_key_env ~ '^[A-Z][A-Z0-9_]*_(KEY|TOKEN)(_[0-9]+)?( *, *[A-Z][A-Z0-9_]*_(KEY|TOKEN)(_[0-9]+)?)*$') not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_api_key_env_check;
comment on column pgharness.models.api_key_env is
'Name of the environment variable of the worker that holds the key (it must end in _KEY or _TOKEN, a number may follow), or several with commas, which are used in turn; never the key itself. Null means the provider''s usual variable.';
