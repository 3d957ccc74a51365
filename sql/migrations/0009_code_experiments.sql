-- Experiments in code: their versions, the tasks of their runs, and what those tell. New tables; checks and columns of existing ones change under a brief lock.

-- squawk-ignore ban-drop-constraint
alter table pgharness.experiments drop constraint experiments_kind_check;
alter table pgharness.experiments
    add column version integer,
    add column timeout_seconds double precision not null default 86400 constraint experiments_timeout_seconds_check check (timeout_seconds > 0),
    add column memory_mb integer not null default 4096 constraint experiments_memory_mb_check check (memory_mb >= 64),
    add column log_mb integer not null default 64 constraint experiments_log_mb_check check (log_mb >= 1);
alter table pgharness.experiments
    add constraint experiments_kind_check check (kind in ('note_grade', 'code')) not valid;
-- a handful of rows
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.experiments validate constraint experiments_kind_check;
comment on column pgharness.experiments.kind is
'How it runs: note_grade (a model writes a note per case, a grader scores it), or code (a Python function that workers discover).';
comment on column pgharness.experiments.version is 'Of code: the number of its current version in experiment_versions, the one that was registered last.';
comment on column pgharness.experiments.timeout_seconds is 'Of code: seconds that its function may run, after which the run fails; to wait for a worker does not count.';
comment on column pgharness.experiments.memory_mb is 'Of code: memory that a process of a run may use, in MB, after which the run fails.';
comment on column pgharness.experiments.log_mb is 'Of code: what a run may log, in MB of text, after which it fails.';

create table pgharness.experiment_versions (
    id            bigint generated always as identity,
    experiment_id bigint not null,
    number        integer not null,
    digest        text not null,
    module        text not null,
    function      text not null,
    source        text not null,
    config_schema jsonb not null,
    git_commit    text,
    is_dirty      boolean not null default false,
    git_diff      text,
    created_by    text not null default session_user,
    created_at    timestamptz not null default now(),
    constraint experiment_versions_pkey primary key (id),
    constraint experiment_versions_experiment_id_number_key unique (experiment_id, number),
    constraint experiment_versions_experiment_id_digest_key unique (experiment_id, digest),
    constraint experiment_versions_experiment_id_fkey foreign key (experiment_id) references pgharness.experiments (id) on delete cascade
);
comment on table pgharness.experiment_versions is
'One row per version of an experiment''s code that was ever registered: a change of its source is a new one. Never changes.';
comment on column pgharness.experiment_versions.number is 'From 1, in the order in which they were first seen.';
comment on column pgharness.experiment_versions.digest is 'SHA-256 over the sources of its module and of what that imports from its own folder.';
comment on column pgharness.experiment_versions.module is 'What a worker imports: a dotted name, or path: and a file.';
comment on column pgharness.experiment_versions.function is 'The function or class in it.';
comment on column pgharness.experiment_versions.source is 'The text of the module.';
comment on column pgharness.experiment_versions.config_schema is 'The JSON Schema of its configuration.';
comment on column pgharness.experiment_versions.git_commit is 'Of the working directory; null outside of a repository.';
comment on column pgharness.experiment_versions.is_dirty is 'Whether the working directory had changes that were not committed.';
comment on column pgharness.experiment_versions.git_diff is 'Those changes, up to 1 MB.';
comment on column pgharness.experiment_versions.created_by is 'The database role that registered it.';

create table pgharness.run_versions (
    run_id     bigint not null,
    version_id bigint not null,
    started_at timestamptz not null default now(),
    constraint run_versions_pkey primary key (run_id, version_id),
    constraint run_versions_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint run_versions_version_id_fkey foreign key (version_id) references pgharness.experiment_versions (id) on delete restrict
);
create index run_versions_version_id_idx on pgharness.run_versions (version_id);
comment on table pgharness.run_versions is 'One row per version of its code that a run was executed with: more than one when it went on after a deploy.';
comment on column pgharness.run_versions.started_at is 'When a worker first executed it.';

alter table pgharness.runs
    add column task_count bigint not null default 0,
    add column tasks_succeeded bigint not null default 0,
    add column tasks_failed bigint not null default 0,
    add column task_cost_usd numeric(16, 8) not null default 0,
    add column log_bytes bigint not null default 0,
    add column timeout_seconds double precision;
comment on column pgharness.runs.task_count is 'Of code: its function, and the items of its maps so far. 0 for notes and grades.';
comment on column pgharness.runs.tasks_succeeded is 'Tasks that are done.';
comment on column pgharness.runs.tasks_failed is 'Tasks that failed for good.';
comment on column pgharness.runs.task_cost_usd is 'Cost of all calls that its code made, failed ones included.';
comment on column pgharness.runs.timeout_seconds is 'Of code: seconds that its function may run.';
comment on column pgharness.runs.log_bytes is 'Text that its code has logged.';

alter table pgharness.workers add column experiments text[] not null default '{}';
comment on column pgharness.workers.experiments is 'Experiments in code that it has.';

create table pgharness.tasks (
    run_id         bigint not null,
    ordinal        bigint not null,
    parent_ordinal bigint,
    depth          integer not null default 0,
    map            text not null default '',
    key            text not null default '',
    function       text not null default '',
    argument       jsonb,
    max_attempts   integer not null default 1,
    status         text not null default 'waiting',
    result         jsonb,
    error          text,
    traceback      text,
    attempts       integer not null default 0,
    failures       integer not null default 0,
    crashes        integer not null default 0,
    crashed_attempt integer,
    next_attempt_at timestamptz,
    worker_id      bigint,
    created_at     timestamptz not null default now(),
    started_at     timestamptz,
    finished_at    timestamptz,
    constraint tasks_pkey primary key (run_id, ordinal),
    constraint tasks_parent_ordinal_map_run_id_key_key unique nulls not distinct (parent_ordinal, map, run_id, key),
    constraint tasks_status_check check (status in ('waiting', 'succeeded', 'failed')),
    constraint tasks_finished_at_check check ((finished_at is not null) = (status <> 'waiting')),
    constraint tasks_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint tasks_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete restrict
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
create index tasks_worker_id_idx on pgharness.tasks (worker_id);
-- neither this nor the unique one is for looking up a run's tasks by their ordinals, for which they would seem good while the table's statistics are old
create index tasks_waiting_idx on pgharness.tasks (parent_ordinal, map, run_id) where status = 'waiting';
comment on table pgharness.tasks is
'One row per task of a run of code: its function (ordinal 0), and each item of its maps. Read them through task_results.';
comment on column pgharness.tasks.ordinal is 'Its number in the run, from 0.';
comment on column pgharness.tasks.parent_ordinal is 'The task that maps; null for the run''s function.';
comment on column pgharness.tasks.depth is 'How many maps it stands in: 0 for the run''s function, one more than its parent''s for an item.';
comment on column pgharness.tasks.map is 'Which map of its parent it is of: the name of the function, or the one given.';
comment on column pgharness.tasks.key is 'What tells it from the other items of its map: done once, it is not done again.';
comment on column pgharness.tasks.function is 'What is called: module:function.';
comment on column pgharness.tasks.argument is 'The item.';
comment on column pgharness.tasks.max_attempts is 'How often it may fail.';
comment on column pgharness.tasks.status is 'waiting -> succeeded | failed; a failed one goes back to waiting by retry_failed().';
comment on column pgharness.tasks.result is 'What it returned.';
comment on column pgharness.tasks.attempts is 'Times that it was begun; what earlier tries told is taken back when it is begun anew, but for their logs.';
comment on column pgharness.tasks.failures is 'Times that it failed.';
comment on column pgharness.tasks.crashes is 'Times that its process died while it ran.';
comment on column pgharness.tasks.crashed_attempt is 'The try that crashed last.';
comment on column pgharness.tasks.next_attempt_at is 'When it is tried again, after it failed.';
comment on column pgharness.tasks.worker_id is 'The worker that began it last.';
comment on column pgharness.tasks.traceback is 'Of the exception by which it failed last.';

alter table pgharness.results add column task bigint, add column attempt integer;
comment on column pgharness.results.task is 'The task of the run''s code that told it; null for record_result().';
comment on column pgharness.results.attempt is 'Which try of the task told it.';
alter table pgharness.logs add column task bigint, add column attempt integer;
comment on column pgharness.logs.task is 'The task of the run''s code that told it; null for lines of the harness.';
comment on column pgharness.logs.attempt is 'Which try of the task told it.';

create table pgharness.metrics (
    id          bigint generated always as identity,
    run_id      bigint not null,
    task        bigint not null,
    attempt     integer not null,
    name        text not null,
    value       double precision not null,
    metric_type text not null default '',
    step        bigint,
    data        jsonb,
    created_at  timestamptz not null default now(),
    constraint metrics_pkey primary key (id),
    constraint metrics_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
create index metrics_run_id_idx on pgharness.metrics (run_id, task, id);
comment on table pgharness.metrics is 'One row per number that a run''s code recorded under a name.';
comment on column pgharness.metrics.task is 'The task that told it.';
comment on column pgharness.metrics.attempt is 'Which try of the task told it.';
comment on column pgharness.metrics.metric_type is 'What kind of number it is, in the experiment''s words: accuracy, f1.';
comment on column pgharness.metrics.step is 'Where in a series it stands.';
comment on column pgharness.metrics.data is 'More about it, as JSON.';

create table pgharness.timings (
    id          bigint generated always as identity,
    run_id      bigint not null,
    task        bigint not null,
    attempt     integer not null,
    operation   text not null,
    duration_ms double precision not null,
    created_at  timestamptz not null default now(),
    constraint timings_pkey primary key (id),
    constraint timings_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
create index timings_run_id_idx on pgharness.timings (run_id, task, id);
comment on table pgharness.timings is 'One row per operation that a run''s code timed.';
comment on column pgharness.timings.operation is 'What was timed, in the experiment''s words.';
comment on column pgharness.timings.duration_ms is 'How long it took.';
comment on column pgharness.timings.task is 'The task that told it.';
comment on column pgharness.timings.attempt is 'Which try of the task told it.';

create table pgharness.logged_calls (
    id          bigint generated always as identity,
    run_id      bigint not null,
    task        bigint not null,
    attempt     integer not null,
    model       text not null,
    input       jsonb,
    output      jsonb,
    duration_ms double precision,
    error       text,
    created_at  timestamptz not null default now(),
    constraint logged_calls_pkey primary key (id),
    constraint logged_calls_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
create index logged_calls_run_id_idx on pgharness.logged_calls (run_id, task, id);
comment on table pgharness.logged_calls is
'One row per request to a model that a run''s code made without the harness and told of; those made through the harness are in calls.';
comment on column pgharness.logged_calls.task is 'The task that told it.';
comment on column pgharness.logged_calls.attempt is 'Which try of the task told it.';
comment on column pgharness.logged_calls.model is 'The model as the code names it.';
comment on column pgharness.logged_calls.error is 'How it failed; null when it did not.';
comment on column pgharness.logged_calls.input is 'What it was asked.';
comment on column pgharness.logged_calls.output is 'What it answered.';
comment on column pgharness.logged_calls.duration_ms is 'How long that took; null when it was not said.';

create table pgharness.artifact_contents (
    digest     text not null,
    content    bytea not null,
    created_at timestamptz not null default now(),
    constraint artifact_contents_pkey primary key (digest)
);
comment on table pgharness.artifact_contents is 'One row per content of an artifact, however many runs keep it.';
comment on column pgharness.artifact_contents.digest is 'SHA-256 of it.';
comment on column pgharness.artifact_contents.content is 'The bytes.';

create table pgharness.artifacts (
    id         bigint generated always as identity,
    run_id     bigint not null,
    task       bigint not null,
    attempt    integer not null,
    name       text not null,
    media_type text not null,
    digest     text not null,
    size_bytes bigint not null,
    created_at timestamptz not null default now(),
    constraint artifacts_pkey primary key (id),
    constraint artifacts_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint artifacts_digest_fkey foreign key (digest) references pgharness.artifact_contents (digest) on delete restrict
);
create index artifacts_run_id_idx on pgharness.artifacts (run_id, task, id);
create index artifacts_digest_idx on pgharness.artifacts (digest);
comment on table pgharness.artifacts is 'One row per file that a run''s code kept; artifact_contents has the bytes.';
comment on column pgharness.artifacts.task is 'The task that told it.';
comment on column pgharness.artifacts.attempt is 'Which try of the task told it.';
comment on column pgharness.artifacts.digest is 'SHA-256 of its content.';
comment on column pgharness.artifacts.media_type is 'What kind of file it is: text/plain, image/png.';
comment on column pgharness.artifacts.size_bytes is 'How large it is.';

create table pgharness.progress_reports (
    run_id     bigint not null,
    position   double precision not null,
    total      double precision,
    message    text,
    updated_at timestamptz not null default now(),
    constraint progress_reports_pkey primary key (run_id),
    constraint progress_reports_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (fillfactor = 50);
comment on table pgharness.progress_reports is 'One row per run whose code said how far it is: the latest word.';
comment on column pgharness.progress_reports.position is 'How far it is, of the total.';
comment on column pgharness.progress_reports.total is 'How far it will be in the end; null when that is not known.';

-- squawk-ignore ban-drop-constraint
alter table pgharness.models drop constraint models_provider_check;
alter table pgharness.models
    add constraint models_provider_check check (provider in ('openai', 'openai_responses', 'anthropic', 'gemini', 'openai_compatible',
                                                             'simulator', 'command', 'python', 'plugin', 'metric')) not valid;
-- a handful of rows
-- squawk-ignore constraint-missing-not-valid
alter table pgharness.models validate constraint models_provider_check;
comment on column pgharness.models.provider is
'openai (chat completions), openai_responses, anthropic, gemini, openai_compatible (vLLM, llama.cpp, Ollama: needs base_url), simulator, command (an external program), python (module:function), plugin (an entry point of group pgharness.models that workers have), metric (exact_match, numeric_match, contains, regex, or plugin:NAME).';
comment on column pgharness.models.model is 'The provider''s own name of the model, the callable''s module:function, the plugin''s name, or the metric''s.';

create table pgharness.tellers (
    run_id     bigint not null,
    teller     text not null,
    last_group bigint not null,
    constraint tellers_pkey primary key (run_id, teller),
    constraint tellers_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (fillfactor = 50);
comment on table pgharness.tellers is
'One row per process that told something of a run of code: a group that is sent again, because nobody heard that it was stored, counts once.';
comment on column pgharness.tellers.teller is 'Made up by the process.';
comment on column pgharness.tellers.last_group is 'The number of the last group that was stored.';
