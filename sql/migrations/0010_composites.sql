-- Composites: models that ask other models, and the calls of their members. A new table; checks and columns of existing ones change under a brief lock.

-- squawk-ignore ban-drop-constraint
alter table pgharness.models drop constraint models_provider_check;
alter table pgharness.models
    add constraint models_provider_check check (provider in ('openai', 'openai_responses', 'anthropic', 'gemini', 'openai_compatible',
                                                             'simulator', 'command', 'python', 'plugin', 'metric', 'ensemble', 'hedge')) not valid;
-- a handful of rows
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_provider_check;
-- squawk-ignore ban-drop-constraint
alter table pgharness.models drop constraint models_model_check;
alter table pgharness.models
    add constraint models_model_check check (model <> '' or provider in ('simulator', 'command', 'ensemble', 'hedge')) not valid;
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_model_check;
comment on column pgharness.models.provider is
'openai (chat completions), openai_responses, anthropic, gemini, openai_compatible (vLLM, llama.cpp, Ollama: needs base_url), simulator, command (an external program), python (module:function), plugin (an entry point of group pgharness.models that workers have), metric (exact_match, numeric_match, contains, regex, or plugin:NAME), ensemble (asks several models and votes), hedge (asks again when an answer is slow).';
comment on column pgharness.models.parameters is
'Sampling parameters (temperature, top_p, max_tokens, stop, reasoning_effort, ...) or the options of a simulator, command, metric, ensemble or hedge; a composite names its members here: {"members": ["a", "b"]}. A combination''s parameters override them key by key.';

create table pgharness.model_members (
    model_id  bigint not null,
    number    integer not null,
    member_id bigint not null,
    constraint model_members_pkey primary key (model_id, number),
    constraint model_members_model_id_fkey foreign key (model_id) references pgharness.models (id) on delete cascade,
    constraint model_members_member_id_fkey foreign key (member_id) references pgharness.models (id) on delete restrict,
    constraint model_members_check check (model_id <> member_id)
);
create index model_members_member_id_idx on pgharness.model_members (member_id);
comment on table pgharness.model_members is
'One row per member of a composite model, numbered from 1 in the order of parameters.members: filled from there by the database.';

comment on column pgharness.model_members.number is 'Its place among the members, from 1.';

alter table pgharness.calls
    add column parent_started_at timestamptz,
    add column is_estimated boolean not null default false,
    add column composition jsonb not null default '{}';
comment on column pgharness.calls.parent_started_at is
'Of a call that a composite made of a member: the started_at of the composite''s own call, which has the same run_id, kind, ordinal and attempt.';
comment on column pgharness.calls.is_estimated is
'Whether tokens and cost are an estimate: of a call that was cancelled because another answered first, whose provider still bills it.';
comment on column pgharness.calls.composition is
'How a composite came to its answer, or failed to: the votes of an ensemble and its consensus, the delay of a hedge and which request won; {} of other models.';
