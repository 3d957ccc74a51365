-- Analyses of runs, and what was registered before a run. New tables only.

create table pgharness.analyses (
    id               bigint generated always as identity,
    kind             text not null,
    run_ids          bigint[] not null,
    options          jsonb not null default '{}',
    status           text not null default 'pending',
    inputs_digest    text not null,
    library_versions jsonb not null default '{}',
    result           jsonb,
    error            text,
    hint             text,
    attempts         integer not null default 0,
    worker_id        bigint,
    requested_by     text not null default session_user,
    requested_at     timestamptz not null default now(),
    started_at       timestamptz,
    finished_at      timestamptz,
    constraint analyses_pkey primary key (id),
    constraint analyses_kind_check check (kind in ('compare', 'ablation', 'sweep', 'agreement', 'power')),
    constraint analyses_run_ids_check check (cardinality(run_ids) > 0),
    constraint analyses_options_check check (jsonb_typeof(options) = 'object'),
    constraint analyses_status_check check (status in ('pending', 'running', 'succeeded', 'failed')),
    constraint analyses_finished_at_check check ((finished_at is not null) = (status in ('succeeded', 'failed'))),
    constraint analyses_result_check check ((result is not null) = (status = 'succeeded')),
    constraint analyses_error_check check ((error is not null) = (status = 'failed')),
    constraint analyses_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete set null
);
create index analyses_worker_id_idx on pgharness.analyses (worker_id);
create index analyses_inputs_digest_idx on pgharness.analyses (inputs_digest);
create index analyses_run_ids_idx on pgharness.analyses using gin (run_ids);
create index analyses_open_idx on pgharness.analyses (id) where status in ('pending', 'running');
comment on table pgharness.analyses is
'One row per analysis that was asked for by request_analysis(), with what came of it; read it through analysis_results. Any worker takes one that is pending, or whose worker died.';
comment on column pgharness.analyses.kind is 'compare, ablation, sweep, agreement or power.';
comment on column pgharness.analyses.run_ids is 'The runs whose grades are analysed. It stays when a run is deleted.';
comment on column pgharness.analyses.options is 'What was asked for beyond the kind, as it was given.';
comment on column pgharness.analyses.status is 'pending -> running -> succeeded | failed; running -> pending when its worker died.';
comment on column pgharness.analyses.inputs_digest is 'SHA-256 over what the result follows from: the runs'' counters, costs, names and states, and when their last grade came. Once it is made, of what was read.';
comment on column pgharness.analyses.library_versions is 'What computed it: pgharness, python, numpy, scipy.';
comment on column pgharness.analyses.result is 'All that was found, as an object; the views analysis_... have its parts.';
comment on column pgharness.analyses.error is 'Why it failed.';
comment on column pgharness.analyses.hint is 'What to type next.';
comment on column pgharness.analyses.attempts is 'How often a worker took it, not counting those that were stopped before its end.';
comment on column pgharness.analyses.worker_id is 'The worker that has it or made it.';
comment on column pgharness.analyses.requested_by is 'The database role that asked for it first.';
comment on column pgharness.analyses.requested_at is 'When that was.';

create table pgharness.preregistrations (
    id                 bigint generated always as identity,
    instance_id        bigint not null,
    hypotheses         jsonb not null,
    primary_metric     text not null,
    test               text not null,
    alpha              double precision not null,
    correction         text not null,
    case_count         integer not null,
    note_replications  integer not null,
    grade_replications integer not null,
    created_by         text not null default session_user,
    created_at         timestamptz not null default now(),
    constraint preregistrations_pkey primary key (id),
    constraint preregistrations_hypotheses_check check (jsonb_typeof(hypotheses) = 'array'),
    constraint preregistrations_alpha_check check (alpha > 0 and alpha < 1),
    constraint preregistrations_test_check check (test in ('auto', 't', 'wilcoxon', 'sign', 'permutation', 'mcnemar')),
    constraint preregistrations_correction_check check (correction in ('bonferroni', 'holm', 'hochberg', 'bh', 'by')),
    constraint preregistrations_instance_id_fkey foreign key (instance_id) references pgharness.instances (id) on delete cascade
);
create index preregistrations_instance_id_idx on pgharness.preregistrations (instance_id, id);
comment on table pgharness.preregistrations is
'One row per plan of analysis that was stored by preregister(), before its runs. Never changes; each run of the instance freezes the newest one as "preregistration" in its definition.';
comment on column pgharness.preregistrations.hypotheses is 'A list of {"first", "second", "direction", "text"}: two combinations, and whether first scores "higher", "lower" or "different".';
comment on column pgharness.preregistrations.primary_metric is 'What is compared: mean_score, or "mean_score by AUTHOR" for the rubrics of one author.';
comment on column pgharness.preregistrations.test is 'auto, or the test that is made whatever the data look like.';
comment on column pgharness.preregistrations.alpha is 'The level of corrected p-values below which two combinations are said to differ.';
comment on column pgharness.preregistrations.correction is 'How p-values are corrected for several hypotheses.';
comment on column pgharness.preregistrations.case_count is 'Cases of the instance when it was stored; likewise the replications.';
comment on column pgharness.preregistrations.created_by is 'The database role that stored it.';
