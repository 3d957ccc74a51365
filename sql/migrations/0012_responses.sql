-- The response cache: what models answered, shared by all runs. New tables; columns of existing ones are added under a brief lock.

create table pgharness.responses (
    key           bytea not null,
    model         text not null,
    provider      text not null,
    run_id        bigint,
    answer        text not null,
    data          text,
    finish_reason text,
    request_id    text,
    answered_by   text,
    input_tokens  integer not null default 0,
    output_tokens integer not null default 0,
    cached_tokens integer not null default 0,
    confidence    double precision,
    composition   jsonb,
    cost_usd      numeric(14, 8) not null default 0,
    latency_ms    double precision not null,
    hit_count     bigint not null default 0,
    last_hit_at   timestamptz,
    created_at    timestamptz not null default now(),
    constraint responses_pkey primary key (key),
    constraint responses_key_check check (octet_length(key) = 32),
    constraint responses_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete set null
) with (fillfactor = 80);
create index responses_run_id_idx on pgharness.responses (run_id);
comment on table pgharness.responses is
'One row per answer that the response cache keeps, under a digest of all that shaped it; the question itself is not kept. Read them through response_entries; delete them with purge_responses().';
comment on column pgharness.responses.key is
'SHA-256 of the question: provider, model, base_url, parameters, messages, schema, what code sees of the case, the replication and the run''s seed.';
comment on column pgharness.responses.model is 'The name of the model when it answered.';
comment on column pgharness.responses.run_id is 'The run that asked; null once that is deleted.';
comment on column pgharness.responses.answer is 'The text of the answer.';
comment on column pgharness.responses.data is 'The JSON of an answer that has structure, as text: its keys keep their order.';
comment on column pgharness.responses.finish_reason is 'Why the model stopped, in the provider''s words.';
comment on column pgharness.responses.request_id is 'What the provider calls the request.';
comment on column pgharness.responses.answered_by is 'The model as the provider named it in its answer; of a program, the commit that ran.';
comment on column pgharness.responses.cached_tokens is 'The part of input_tokens that the provider served from its own cache.';
comment on column pgharness.responses.confidence is 'From 0 to 1, where the answer came with one.';
comment on column pgharness.responses.composition is 'How a composite came to it.';
comment on column pgharness.responses.cost_usd is 'What it cost to ask, of a composite with its members: what each hit saves.';
comment on column pgharness.responses.latency_ms is 'How long the model took.';
comment on column pgharness.responses.hit_count is 'How often it was given instead of a call.';
comment on column pgharness.responses.last_hit_at is 'When it was last given instead of a call.';

create table pgharness.response_claims (
    key        bytea not null,
    worker_id  bigint not null,
    expires_at timestamptz not null,
    constraint response_claims_pkey primary key (key),
    constraint response_claims_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete cascade
);
create index response_claims_worker_id_idx on pgharness.response_claims (worker_id);
comment on table pgharness.response_claims is
'One row per question that a worker is asking now and whose answer will be kept: whoever has the same question waits for it. The claim of a worker that died does not count.';
comment on column pgharness.response_claims.key is 'The key that the answer will have in responses.';
comment on column pgharness.response_claims.expires_at is 'When others ask nevertheless.';

alter table pgharness.instances
    add column response_cache text not null default 'off';
alter table pgharness.instances
    add constraint instances_response_cache_check check (response_cache in ('off', 'read', 'write', 'replay')) not valid;
-- few rows, and all of them new to the column
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.instances validate constraint instances_response_cache_check;
comment on column pgharness.instances.response_cache is
'Whether its runs use the response cache: off; read (an answer that is there is taken, else the model is asked); write (the same, and new answers are kept); replay (only from the cache: what is not there fails). start_run may set another.';

alter table pgharness.runs
    add column response_cache text;
alter table pgharness.runs
    add constraint runs_response_cache_check check (response_cache in ('off', 'read', 'write', 'replay')) not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.runs validate constraint runs_response_cache_check;
comment on column pgharness.runs.response_cache is
'How it uses the response cache: off, read, write or replay; the instance''s unless its start named another. Null is off.';

alter table pgharness.calls
    add column response_key bytea,
    add column saved_usd numeric(14, 8) not null default 0;
comment on column pgharness.calls.outcome is
'succeeded, cached (answered from the response cache: no request was made), rate_limited, unavailable, server_error, timeout, invalid_output, refused, rejected, not_cached, code_failed, error or cancelled; of an ensemble also insufficient_responses and no_consensus.';
comment on column pgharness.calls.response_key is 'The entry of responses that it was answered from, or that its answer became.';
comment on column pgharness.calls.saved_usd is 'What the answer had cost, of a call that was answered from the response cache.';
