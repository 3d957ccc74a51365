-- What people write: projects, experiments, instances, datasets, cases, rubrics, models, model combinations. New tables only, no lock on existing ones.

create table pgharness.projects (
    id          bigint generated always as identity,
    name        text not null,
    description text not null default '',
    created_at  timestamptz not null default now(),
    constraint projects_pkey primary key (id),
    constraint projects_name_key unique (name),
    constraint projects_id_name_key unique (id, name),
    constraint projects_name_check check (name <> '')
);
comment on table pgharness.projects is 'One row per project: a folder for instances.';

create table pgharness.experiments (
    id                  bigint generated always as identity,
    name                text not null,
    description         text not null default '',
    kind                text not null default 'note_grade',
    config_schema       jsonb not null default '{"type": "object"}',
    note_system_prompt  text not null default '',
    note_prompt         text not null default '{{ case_text }}',
    grade_system_prompt text not null default '',
    grade_prompt        text not null default '',
    created_at          timestamptz not null default now(),
    constraint experiments_pkey primary key (id),
    constraint experiments_name_key unique (name),
    constraint experiments_id_name_key unique (id, name),
    constraint experiments_name_check check (name <> ''),
    constraint experiments_kind_check check (kind in ('note_grade')),
    constraint experiments_config_schema_check check (jsonb_typeof(config_schema) in ('object', 'boolean'))
);
comment on table pgharness.experiments is
'One row per kind of experiment: its description, the JSON Schema of its configuration, and its default prompts. `note_grade` is built in; insert others to give a schema and prompts a name.';
comment on column pgharness.experiments.kind is 'How it runs: note_grade (a model writes a note per case, a grader scores it).';
comment on column pgharness.experiments.config_schema is
'JSON Schema (draft 2020-12) that every instance''s config must fit; checked by the database at insert and update.';
comment on column pgharness.experiments.note_prompt is
'Default user prompt of the generator, a Jinja template. It sees case_text (the transcript as lines, or the input as text), input, target, metadata, case_name, config, overlap, replication.';
comment on column pgharness.experiments.grade_prompt is
'Default user prompt of a grading model, a Jinja template. It sees what note_prompt sees, and note, criteria (number, criterion, weight), rubric_author.';

create table pgharness.datasets (
    id          bigint generated always as identity,
    name        text not null,
    description text not null default '',
    version     text not null default '',
    source      text not null default '',
    license     text not null default '',
    created_at  timestamptz not null default now(),
    constraint datasets_pkey primary key (id),
    constraint datasets_name_key unique (name),
    constraint datasets_id_name_key unique (id, name),
    constraint datasets_name_check check (name <> '')
);
comment on table pgharness.datasets is 'One row per dataset: a named set of cases with its source, version and licence.';

create table pgharness.cases (
    id         bigint generated always as identity,
    name       text not null,
    dataset_id bigint,
    dataset    text,
    input      jsonb not null,
    target     jsonb,
    metadata   jsonb not null default '{}',
    digest     text not null,
    created_at timestamptz not null default now(),
    constraint cases_pkey primary key (id),
    constraint cases_name_key unique (name),
    constraint cases_id_name_key unique (id, name),
    constraint cases_name_check check (name <> ''),
    constraint cases_input_check check (jsonb_typeof(input) <> 'null'),
    constraint cases_metadata_check check (jsonb_typeof(metadata) = 'object'),
    constraint cases_dataset_fkey foreign key (dataset_id, dataset)
        references pgharness.datasets (id, name) on update cascade on delete restrict
);
create index cases_dataset_id_idx on pgharness.cases (dataset_id, dataset);
comment on table pgharness.cases is
'One row per input: a transcript, a question, any JSON. Content that a run has used is frozen: changing or deleting it raises PH003; insert a new case instead. Renaming is allowed.';
comment on column pgharness.cases.input is
'What the generator gets. A transcript is an array of {"speaker", "text"} objects, or an object with such an array under "transcript".';
comment on column pgharness.cases.target is 'The expected answer, for metrics and for graders without a rubric; null when there is none.';
comment on column pgharness.cases.digest is 'SHA-256 of input, target and metadata, filled by the database.';

create table pgharness.models (
    id                           bigint generated always as identity,
    name                         text not null,
    description                  text not null default '',
    provider                     text not null,
    model                        text not null default '',
    base_url                     text,
    api_key_env                  text,
    parameters                   jsonb not null default '{}',
    is_reasoning                 boolean not null default false,
    timeout_seconds              double precision not null default 120,
    max_concurrency              integer,
    requests_per_minute          integer,
    tokens_per_minute            integer,
    input_usd_per_million        numeric(12, 6),
    output_usd_per_million       numeric(12, 6),
    cached_input_usd_per_million numeric(12, 6),
    created_at                   timestamptz not null default now(),
    constraint models_pkey primary key (id),
    constraint models_name_key unique (name),
    constraint models_id_name_key unique (id, name),
    constraint models_name_check check (name <> ''),
    constraint models_provider_check check (provider in ('openai', 'openai_responses', 'anthropic', 'gemini',
                                                         'openai_compatible', 'simulator', 'command', 'python', 'metric')),
    constraint models_model_check check (model <> '' or provider in ('simulator', 'command')),
    constraint models_base_url_check check (case when base_url is null then provider <> 'openai_compatible'
                                                 else base_url ~ '^https?://' end),
    constraint models_api_key_env_check check (api_key_env ~ '^[A-Z][A-Z0-9_]*_(KEY|TOKEN)$'),
    constraint models_parameters_check check (jsonb_typeof(parameters) = 'object'),
    constraint models_timeout_seconds_check check (timeout_seconds > 0 and timeout_seconds <= 86400),
    constraint models_limits_check check (max_concurrency > 0 and requests_per_minute > 0 and tokens_per_minute > 0),
    constraint models_prices_check check (input_usd_per_million >= 0 and output_usd_per_million >= 0
                                          and cached_input_usd_per_million >= 0)
);
comment on table pgharness.models is
'One row per model: anything that answers (a provider''s chat model, a program, a Python callable, the simulator) or scores (a metric). A run freezes the rows it uses; editing one changes the next run, except that limits apply at once.';
comment on column pgharness.models.provider is
'openai (chat completions), openai_responses, anthropic, gemini, openai_compatible (vLLM, llama.cpp, Ollama: needs base_url), simulator, command (an external program), python (module:function), metric (exact_match, numeric_match, contains, regex).';
comment on column pgharness.models.model is 'The provider''s own name of the model, the callable''s module:function, or the metric''s name.';
comment on column pgharness.models.api_key_env is
'Name of the environment variable of the worker that holds the key (it must end in _KEY or _TOKEN); never the key itself. Null means the provider''s usual variable.';
comment on column pgharness.models.parameters is
'Sampling parameters (temperature, top_p, max_tokens, stop, reasoning_effort, ...) or the options of a simulator, command or metric. A combination''s parameters override them key by key.';
comment on column pgharness.models.max_concurrency is 'Calls in flight at once over all workers together; null means no limit.';
comment on column pgharness.models.requests_per_minute is 'Calls started a minute over all workers together; null means no limit.';
comment on column pgharness.models.tokens_per_minute is 'Tokens (input and output) a minute over all workers together; null means no limit.';
comment on column pgharness.models.input_usd_per_million is 'USD per million input tokens; null prices count as zero cost.';

create table pgharness.rubrics (
    id           bigint generated always as identity,
    case_id      bigint not null,
    case_name    text not null,
    author       text not null,
    parent_id    bigint,
    validation   text not null default 'not_evaluated',
    validated_at timestamptz,
    criteria     jsonb not null,
    comments     text not null default '',
    generator_id bigint,
    generator    text,
    is_human     boolean not null generated always as (generator_id is null and lower(author) <> 'llm') stored,
    created_at   timestamptz not null default now(),
    constraint rubrics_pkey primary key (id),
    constraint rubrics_author_check check (author <> ''),
    constraint rubrics_validation_check check (validation in ('not_evaluated', 'accepted', 'refused')),
    constraint rubrics_validated_at_check check ((validated_at is not null) = (validation <> 'not_evaluated')),
    constraint rubrics_criteria_check check (
        jsonb_typeof(criteria) = 'array'
        and jsonb_array_length(criteria) between 1 and 1000
        and not jsonb_path_exists(criteria, 'strict $[*] ? (@.type() != "object")')
        and not jsonb_path_exists(criteria, 'lax $[*] ? (!exists(@.criterion) || @.criterion.type() != "string" || @.criterion == "")')
        and not jsonb_path_exists(criteria, 'lax $[*] ? (!exists(@.weight) || @.weight.type() != "number" || @.weight < 0 || @.weight > 100)')
        and jsonb_path_exists(criteria, 'lax $[*] ? (@.weight > 0)')
    ),
    constraint rubrics_case_fkey foreign key (case_id, case_name)
        references pgharness.cases (id, name) on update cascade on delete cascade,
    constraint rubrics_parent_id_fkey foreign key (parent_id) references pgharness.rubrics (id) on delete restrict,
    constraint rubrics_generator_fkey foreign key (generator_id, generator)
        references pgharness.models (id, name) on update cascade on delete restrict
);
create index rubrics_case_id_idx on pgharness.rubrics (case_id, author, validated_at);
create index rubrics_parent_id_idx on pgharness.rubrics (parent_id);
create index rubrics_generator_id_idx on pgharness.rubrics (generator_id, generator);
comment on table pgharness.rubrics is
'One row per rubric: the criteria by which one author judges the notes of one case. Case, author and criteria are frozen once a run has used them (PH003): insert a new rubric with parent_id instead; validation may still change, for later runs.';
comment on column pgharness.rubrics.criteria is
'Array of {"criterion": text, "weight": 0..100, ...}, 1 to 1000 of them, at least one with a weight above 0. Other keys are kept.';
comment on column pgharness.rubrics.validation is 'not_evaluated -> accepted | refused, by people; only accepted rubrics grade.';
comment on column pgharness.rubrics.generator_id is 'The model that wrote it; null for a person''s rubric.';
comment on column pgharness.rubrics.is_human is 'Whether a person wrote it: no generator, and author is not "llm".';

create table pgharness.instances (
    id                        bigint generated always as identity,
    name                      text not null,
    description               text not null default '',
    project_id                bigint,
    project                   text,
    experiment_id             bigint not null,
    experiment                text not null default 'note_grade',
    config                    jsonb not null default '{}',
    note_replications         integer not null default 1,
    grade_replications        integer not null default 1,
    rubrics_per_case          integer not null default 2,
    cycle_times               integer[] not null default '{}',
    cycle_transcript_overlaps integer[] not null default '{100}',
    software_version          text,
    seed                      bigint not null default 0,
    max_attempts              integer not null default 3,
    retry_delay_seconds       double precision not null default 2,
    failure_threshold         double precision not null default 0.2,
    budget_usd                numeric(12, 6),
    note_system_prompt        text,
    note_prompt               text,
    grade_system_prompt       text,
    grade_prompt              text,
    created_at                timestamptz not null default now(),
    constraint instances_pkey primary key (id),
    constraint instances_name_key unique (name),
    constraint instances_id_name_key unique (id, name),
    constraint instances_name_check check (name <> ''),
    constraint instances_note_replications_check check (note_replications between 1 and 10000),
    constraint instances_grade_replications_check check (grade_replications between 1 and 1000),
    constraint instances_rubrics_per_case_check check (rubrics_per_case between 0 and 100),
    constraint instances_cycle_times_check check (array_position(cycle_times, null) is null and 0 <= all (cycle_times)),
    constraint instances_cycle_transcript_overlaps_check check (
        cardinality(cycle_transcript_overlaps) between 1 and 100 and array_position(cycle_transcript_overlaps, null) is null
        and 0 <= all (cycle_transcript_overlaps)),
    constraint instances_max_attempts_check check (max_attempts between 1 and 100),
    constraint instances_retry_delay_seconds_check check (retry_delay_seconds between 0 and 3600),
    constraint instances_failure_threshold_check check (failure_threshold between 0 and 1),
    constraint instances_budget_usd_check check (budget_usd > 0 and budget_usd <> 'NaN'),
    constraint instances_project_fkey foreign key (project_id, project)
        references pgharness.projects (id, name) on update cascade on delete restrict,
    constraint instances_experiment_fkey foreign key (experiment_id, experiment)
        references pgharness.experiments (id, name) on update cascade on delete restrict
);
create index instances_project_id_idx on pgharness.instances (project_id, project);
create index instances_experiment_id_idx on pgharness.instances (experiment_id, experiment);
comment on table pgharness.instances is
'One row per configured experiment: config, replications, seed, prompts. Each start_run freezes a copy, so an instance may be edited between runs.';
comment on column pgharness.instances.config is 'Checked by the database against the experiment''s config_schema; absent keys take the schema''s defaults.';
comment on column pgharness.instances.note_replications is 'Notes per case, combination and overlap.';
comment on column pgharness.instances.grade_replications is 'Grades per note and rubric by a grading model; a metric grades once.';
comment on column pgharness.instances.rubrics_per_case is
'How many different human authors'' rubrics grade each note: the most recently accepted of each, newest author first. 0 grades against the case''s target.';
comment on column pgharness.instances.cycle_times is 'Seconds per cycle, handed to the generator; they do not multiply the plan.';
comment on column pgharness.instances.cycle_transcript_overlaps is 'Transcript overlaps handed to the generator; each multiplies the notes.';
comment on column pgharness.instances.software_version is 'Git commit (or tag) at which a command generator''s repository is run.';
comment on column pgharness.instances.seed is 'Every random choice of a run derives from it.';
comment on column pgharness.instances.max_attempts is 'Attempts per note or grade before it counts as failed; rate limits and outages spend none.';
comment on column pgharness.instances.retry_delay_seconds is 'Mean delay before the second attempt; it doubles per attempt, with jitter, up to 5 minutes.';
comment on column pgharness.instances.failure_threshold is 'Share of the planned notes and grades that may fail before the run stops as failed (0..1).';
comment on column pgharness.instances.budget_usd is 'Spending at which a run pauses; null means none. start_run may set another.';
comment on column pgharness.instances.note_prompt is 'Jinja template; null means the experiment''s. Likewise the other prompts.';

create table pgharness.instance_cases (
    instance_id bigint not null,
    instance    text not null,
    case_id     bigint not null,
    case_name   text not null,
    constraint instance_cases_pkey primary key (instance_id, case_id),
    constraint instance_cases_instance_fkey foreign key (instance_id, instance)
        references pgharness.instances (id, name) on update cascade on delete cascade,
    constraint instance_cases_case_fkey foreign key (case_id, case_name)
        references pgharness.cases (id, name) on update cascade on delete restrict
);
create index instance_cases_instance_id_idx on pgharness.instance_cases (instance_id, instance);
create index instance_cases_case_id_idx on pgharness.instance_cases (case_id, case_name);
comment on table pgharness.instance_cases is 'One row per case of an instance. Fill it by insert, or with add_cases().';

create table pgharness.model_combinations (
    id                     bigint generated always as identity,
    instance_id            bigint not null,
    instance               text not null,
    name                   text not null,
    generator_id           bigint not null,
    generator              text not null,
    generator_parameters   jsonb not null default '{}',
    generator_is_reasoning boolean,
    grader_id              bigint,
    grader                 text,
    grader_parameters      jsonb not null default '{}',
    grader_is_reasoning    boolean,
    created_at             timestamptz not null default now(),
    constraint model_combinations_pkey primary key (id),
    constraint model_combinations_instance_id_name_key unique (instance_id, name),
    constraint model_combinations_name_check check (name <> ''),
    constraint model_combinations_generator_parameters_check check (jsonb_typeof(generator_parameters) = 'object'),
    constraint model_combinations_grader_parameters_check check (jsonb_typeof(grader_parameters) = 'object'),
    constraint model_combinations_instance_fkey foreign key (instance_id, instance)
        references pgharness.instances (id, name) on update cascade on delete cascade,
    constraint model_combinations_generator_fkey foreign key (generator_id, generator)
        references pgharness.models (id, name) on update cascade on delete restrict,
    constraint model_combinations_grader_fkey foreign key (grader_id, grader)
        references pgharness.models (id, name) on update cascade on delete restrict
);
create index model_combinations_instance_id_idx on pgharness.model_combinations (instance_id, instance);
create index model_combinations_generator_id_idx on pgharness.model_combinations (generator_id, generator);
create index model_combinations_grader_id_idx on pgharness.model_combinations (grader_id, grader);
comment on table pgharness.model_combinations is
'One row per generator and grader to compare in an instance. grader may be a model, a metric, or null for notes without grades.';
comment on column pgharness.model_combinations.name is 'What results are listed under; filled as "generator -> grader" when not given.';
comment on column pgharness.model_combinations.grader_is_reasoning is 'Overrides the model''s own flag; null keeps it.';

-- What the remaining columns mean.
comment on column pgharness.experiments.note_system_prompt is 'Default system prompt of the generator; a template like note_prompt.';
comment on column pgharness.experiments.grade_system_prompt is 'Default system prompt of a grading model; a template like grade_prompt.';
comment on column pgharness.datasets.version is 'Which edition of the data it is.';
comment on column pgharness.datasets.source is 'Where the data comes from.';
comment on column pgharness.datasets.license is 'Terms under which the data may be used.';
comment on column pgharness.cases.metadata is 'Anything worth keeping beside the input; prompts see it.';
comment on column pgharness.models.base_url is 'Address of the server; null means the provider''s own.';
comment on column pgharness.models.is_reasoning is 'Whether to ask it to reason before it answers, in the provider''s way.';
comment on column pgharness.models.timeout_seconds is 'How long one call may take.';
comment on column pgharness.models.output_usd_per_million is 'USD per million output tokens, reasoning included.';
comment on column pgharness.models.cached_input_usd_per_million is 'USD per million input tokens served from the provider''s cache; null means the input price.';
comment on column pgharness.rubrics.author is 'Who wrote it: any name or address, the same for one person; "llm" for a model.';
comment on column pgharness.rubrics.parent_id is 'The rubric of the same case that it was derived from.';
comment on column pgharness.rubrics.validated_at is 'When it was accepted or refused; filled by the database.';
comment on column pgharness.rubrics.comments is 'What people noted about it; graders do not see it.';
comment on column pgharness.rubrics.generator is 'Name of generator_id''s model.';
comment on column pgharness.instances.note_system_prompt is 'Overrides the experiment''s; null keeps it.';
comment on column pgharness.instances.grade_system_prompt is 'Overrides the experiment''s; null keeps it.';
comment on column pgharness.instances.grade_prompt is 'Overrides the experiment''s; null keeps it.';
comment on column pgharness.model_combinations.generator is 'The model that writes the notes.';
comment on column pgharness.model_combinations.generator_parameters is 'Laid over the model''s own parameters, key by key.';
comment on column pgharness.model_combinations.generator_is_reasoning is 'Overrides the model''s own flag; null keeps it.';
comment on column pgharness.model_combinations.grader is 'The model or metric that scores them; null for none.';
comment on column pgharness.model_combinations.grader_parameters is 'Laid over the model''s own parameters, key by key; a metric''s options.';
