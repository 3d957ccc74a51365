-- Provider batches: requests that a vendor answers within hours at half the price. Two new tables; new columns of existing ones under a brief lock.

alter table pgharness.models
    add column has_batches boolean,
    add column batch_price_factor double precision not null default 0.5;
alter table pgharness.models
    add constraint models_batch_price_factor_check check (batch_price_factor between 0 and 1) not valid;
-- a handful of rows
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_batch_price_factor_check;
alter table pgharness.models
    add constraint models_has_batches_check
        check (not has_batches or provider in ('openai', 'openai_responses', 'openai_compatible', 'anthropic')) not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_has_batches_check;
comment on column pgharness.models.has_batches is
'Whether it can be asked in batches, in runs that ask for them; null: if its provider is openai, openai_responses or anthropic. Set it to true for an openai_compatible server that has /files and /batches, or to false for an address that lacks them.';
comment on column pgharness.models.batch_price_factor is 'What a request in a batch costs, as a part of the model''s prices.';

alter table pgharness.instances add column batch_deadline_seconds double precision;
alter table pgharness.instances
    add constraint instances_batch_deadline_seconds_check check (batch_deadline_seconds between 1 and 2592000) not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.instances validate constraint instances_batch_deadline_seconds_check;
comment on column pgharness.instances.batch_deadline_seconds is
'Seconds from its start (or from when it was last resumed) in which a run asks by its vendors'' batches, for less money; what is not done by then is asked live. Null: all calls are live. start_run may set another.';

alter table pgharness.runs add column batch_deadline_seconds double precision;
alter table pgharness.runs
    add constraint runs_batch_deadline_seconds_check check (batch_deadline_seconds between 1 and 2592000) not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.runs validate constraint runs_batch_deadline_seconds_check;
comment on column pgharness.runs.batch_deadline_seconds is
'Seconds from activated_at in which it asks by batches where its models have them; null: all calls are live.';

alter table pgharness.calls add column batch_id bigint;
comment on column pgharness.calls.batch_id is 'The batch in which it was made; null of a live call. Its latency is then that of the batch.';

-- workers are stopped while a migration runs; the type is in no table
alter type pgharness.outcome add attribute batch_id bigint;
comment on column pgharness.outcome.batch_id is 'The batch that the answer came in; null of a live call. An item that is not in that batch any more was recorded before.';

create table pgharness.batches (
    id                  bigint generated always as identity,
    uuid                uuid not null default gen_random_uuid(),
    run_id              bigint not null,
    kind                text not null,
    model_id            bigint not null,
    status              text not null default 'planned',
    request_count       integer not null default 0,
    succeeded_count     integer not null default 0,
    failed_count        integer not null default 0,
    unanswered_count    integer not null default 0,
    input_file          text,
    result_files        text[] not null default '{}',
    external_id         text,
    is_ours             boolean,
    foreign_ids         text[] not null default '{}',
    worker_id           bigint,
    failures            integer not null default 0,
    polls               integer not null default 0,
    error               text,
    created_at          timestamptz not null default now(),
    deadline_at         timestamptz not null,
    gathered_at         timestamptz not null default now(),
    submitting_at       timestamptz,
    submitted_at        timestamptz,
    polled_at           timestamptz,
    cancel_requested_at timestamptz,
    ended_at            timestamptz,
    finished_at         timestamptz,
    due_at              timestamptz not null,
    constraint batches_pkey primary key (id),
    constraint batches_uuid_key unique (uuid),
    constraint batches_kind_check check (kind in ('note', 'grade')),
    constraint batches_status_check check (status in ('planned', 'uploading', 'submitting', 'submitted', 'ended', 'collected', 'cancelled', 'failed')),
    constraint batches_finished_at_check check ((finished_at is not null) = (status in ('collected', 'cancelled', 'failed'))),
    constraint batches_external_id_check check ((external_id is not null) or status not in ('submitted', 'ended')),
    constraint batches_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint batches_model_id_fkey foreign key (model_id) references pgharness.models (id) on delete restrict
) with (fillfactor = 50);
create index batches_run_id_idx on pgharness.batches (run_id, model_id);
create index batches_model_id_idx on pgharness.batches (model_id);
create unique index batches_planned_idx on pgharness.batches (run_id, kind, model_id) where status = 'planned';
create index batches_due_idx on pgharness.batches (due_at) where finished_at is null;
comment on table pgharness.batches is
'One row per batch of requests that a vendor answers at its leisure; read it through batches_progress. A worker that holds it (worker_id) takes it one step further; another takes over when that one dies.';
comment on column pgharness.batches.uuid is 'What the vendor is told, in names and ids of requests, so that it is found again by whoever takes over.';
comment on column pgharness.batches.kind is 'What its requests ask for: note or grade.';
comment on column pgharness.batches.status is
'planned (items are gathered) -> uploading (closed; its requests are written and sent) -> submitting (the vendor may have begun it) -> submitted -> ended (the vendor is done) -> collected | cancelled (by a deadline, or with its run) | failed (the vendor will not have it).';
comment on column pgharness.batches.request_count is 'Items in it; when it was submitted, the requests that the vendor got.';
comment on column pgharness.batches.succeeded_count is 'Items recorded from it that succeeded.';
comment on column pgharness.batches.failed_count is 'Items recorded from it whose try failed.';
comment on column pgharness.batches.unanswered_count is 'Items that came back without an answer: the batch expired or was cancelled first. That costs no attempt.';
comment on column pgharness.batches.input_file is 'The vendor''s id of the file with its requests.';
comment on column pgharness.batches.result_files is 'Where the vendor keeps its results.';
comment on column pgharness.batches.external_id is 'What the vendor calls it.';
comment on column pgharness.batches.is_ours is
'False of a vendor''s batch that was found after a worker died and may be somebody else''s: its results will tell, and until then it is not cancelled.';
comment on column pgharness.batches.foreign_ids is 'Vendor''s batches that turned out to be somebody else''s.';
comment on column pgharness.batches.worker_id is 'The worker that takes it a step further now.';
comment on column pgharness.batches.failures is 'Steps that failed since the last one that succeeded.';
comment on column pgharness.batches.polls is 'How often the vendor was asked how it is.';
comment on column pgharness.batches.error is 'Why the last step failed, or why the batch did.';
comment on column pgharness.batches.deadline_at is 'When it is cancelled, and what it lacks asked live.';
comment on column pgharness.batches.gathered_at is 'When the last item was added.';
comment on column pgharness.batches.submitting_at is 'Since when the vendor may have it.';
comment on column pgharness.batches.submitted_at is 'When the vendor took it.';
comment on column pgharness.batches.polled_at is 'When the vendor last said how it is.';
comment on column pgharness.batches.cancel_requested_at is 'When the vendor was asked to cancel it.';
comment on column pgharness.batches.ended_at is 'When the vendor was done with it.';
comment on column pgharness.batches.due_at is 'When its next step is due.';

create table pgharness.batch_items (
    run_id   bigint not null,
    kind     text not null,
    ordinal  bigint not null,
    batch_id bigint not null,
    constraint batch_items_pkey primary key (run_id, kind, ordinal),
    constraint batch_items_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint batch_items_batch_id_fkey foreign key (batch_id) references pgharness.batches (id) on delete cascade
);
create index batch_items_batch_id_idx on pgharness.batch_items (batch_id, ordinal);
comment on table pgharness.batch_items is
'One row per note or grade that is in a batch now: nobody else makes it. It goes away in the transaction that records its outcome, so that an answer counts once however often it is collected.';
comment on column pgharness.batch_items.ordinal is 'Its number in the run''s plan.';
