-- What the harness writes: runs and their frozen definitions, notes, grades, calls, failures, results, logs, workers. New tables only.

create table pgharness.runs (
    id                bigint generated always as identity,
    name              text not null,
    instance_id       bigint not null,
    instance          text not null,
    kind              text not null default 'trial',
    status            text not null default 'running',
    reason            text,
    idempotency_key   text,
    rerun_of_id       bigint,
    priority          integer not null default 0,
    epoch             integer not null default 0,
    budget_usd        numeric(12, 6),
    failure_threshold double precision not null default 0.2,
    note_count        bigint not null default 0,
    grade_count       bigint not null default 0,
    notes_succeeded   bigint not null default 0,
    notes_failed      bigint not null default 0,
    grades_succeeded  bigint not null default 0,
    grades_failed     bigint not null default 0,
    grades_skipped    bigint not null default 0,
    note_cost_usd     numeric(16, 8) not null default 0,
    grade_cost_usd    numeric(16, 8) not null default 0,
    active_seconds    double precision not null default 0,
    activated_at      timestamptz,
    created_by        text not null default session_user,
    created_at        timestamptz not null default now(),
    finished_at       timestamptz,
    constraint runs_pkey primary key (id),
    constraint runs_name_key unique (name),
    constraint runs_idempotency_key_key unique (idempotency_key),
    constraint runs_name_check check (name <> ''),
    constraint runs_kind_check check (kind in ('trial', 'milestone')),
    constraint runs_status_check check (status in ('running', 'paused', 'completed', 'failed', 'cancelled')),
    constraint runs_finished_at_check check ((finished_at is not null) = (status in ('completed', 'failed', 'cancelled'))),
    constraint runs_activated_at_check check ((activated_at is not null) = (status = 'running')),
    constraint runs_budget_usd_check check (budget_usd > 0 and budget_usd <> 'NaN'),
    constraint runs_failure_threshold_check check (failure_threshold between 0 and 1),
    constraint runs_priority_check check (priority between -1000 and 1000),
    constraint runs_counts_check check (notes_succeeded + notes_failed <= note_count
                                        and grades_succeeded + grades_failed + grades_skipped <= grade_count),
    constraint runs_instance_fkey foreign key (instance_id, instance)
        references pgharness.instances (id, name) on update cascade on delete restrict,
    constraint runs_rerun_of_id_fkey foreign key (rerun_of_id) references pgharness.runs (id) on delete set null
) with (fillfactor = 50);
create index runs_instance_id_idx on pgharness.runs (instance_id, instance);
create index runs_rerun_of_id_idx on pgharness.runs (rerun_of_id);
create index runs_unfinished_idx on pgharness.runs (id) where finished_at is null;
comment on table pgharness.runs is
'One row per execution of an instance. Insert here (or call start_run) to start work: what the run uses is frozen and its jobs are queued in the same transaction.';
comment on column pgharness.runs.kind is 'trial (the default) or milestone.';
comment on column pgharness.runs.status is
'running -> paused -> running; running | paused -> cancelled; running -> completed, or failed when more items failed than the threshold allows. resume_run continues paused and cancelled runs, retry_failed reopens finished ones.';
comment on column pgharness.runs.reason is 'Why it is paused, failed or cancelled.';
comment on column pgharness.runs.idempotency_key is 'A second start with the same key returns the first run.';
comment on column pgharness.runs.epoch is 'Counts how often the outstanding work was queued anew; jobs of an earlier epoch do nothing.';
comment on column pgharness.runs.grades_skipped is 'Planned grades of notes that failed for good.';
comment on column pgharness.runs.active_seconds is 'Seconds spent running before activated_at; pauses do not count.';

create table pgharness.run_definitions (
    run_id            bigint not null,
    definition        jsonb not null,
    case_count        integer not null,
    combination_count integer not null,
    transcript_overlaps integer[] not null,
    grade_stride      integer not null,
    constraint run_definitions_pkey primary key (run_id),
    constraint run_definitions_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
comment on table pgharness.run_definitions is
'One row per run: the instance as it was frozen at the start (config, prompts, replications, seed, digest of the cases). Never changes.';
comment on column pgharness.run_definitions.grade_stride is 'Grade ordinals per note: a grade''s ordinal is note ordinal * grade_stride + its place.';

create table pgharness.run_cases (
    run_id  bigint not null,
    number  integer not null,
    case_id bigint not null,
    digest  text not null,
    constraint run_cases_pkey primary key (run_id, number),
    constraint run_cases_run_id_case_id_key unique (run_id, case_id),
    constraint run_cases_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint run_cases_case_id_fkey foreign key (case_id) references pgharness.cases (id) on delete restrict
);
create index run_cases_case_id_idx on pgharness.run_cases (case_id);
comment on table pgharness.run_cases is 'One row per case of a run, numbered from 0. Never changes; the case''s content is frozen with it.';

create table pgharness.run_combinations (
    run_id             bigint not null,
    number             integer not null,
    name               text not null,
    combination_id     bigint,
    generator_id       bigint not null,
    generator          jsonb not null,
    grader_id          bigint,
    grader             jsonb,
    rubric_count       integer not null,
    grade_replications integer not null,
    grades_per_note    integer not null generated always as (greatest(rubric_count, 1) * grade_replications) stored,
    constraint run_combinations_pkey primary key (run_id, number),
    constraint run_combinations_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint run_combinations_combination_id_fkey foreign key (combination_id)
        references pgharness.model_combinations (id) on delete set null,
    constraint run_combinations_generator_id_fkey foreign key (generator_id) references pgharness.models (id) on delete restrict,
    constraint run_combinations_grader_id_fkey foreign key (grader_id) references pgharness.models (id) on delete restrict
);
create index run_combinations_combination_id_idx on pgharness.run_combinations (combination_id);
create index run_combinations_generator_id_idx on pgharness.run_combinations (generator_id);
create index run_combinations_grader_id_idx on pgharness.run_combinations (grader_id);
comment on column pgharness.run_combinations.rubric_count is 'Rubrics that grade each note; 0 grades against the target.';
comment on column pgharness.run_combinations.grade_replications is 'Grades per note and rubric: 0 without a grader, 1 for a metric.';
comment on table pgharness.run_combinations is
'One row per combination of a run, numbered from 0, with both models as they were at the start (parameters, prices). Never changes.';

create table pgharness.run_rubrics (
    run_id      bigint not null,
    case_number integer not null,
    number      integer not null,
    rubric_id   bigint not null,
    constraint run_rubrics_pkey primary key (run_id, case_number, number),
    constraint run_rubrics_run_id_case_number_fkey foreign key (run_id, case_number)
        references pgharness.run_cases (run_id, number) on delete cascade,
    constraint run_rubrics_rubric_id_fkey foreign key (rubric_id) references pgharness.rubrics (id) on delete restrict
);
create index run_rubrics_rubric_id_idx on pgharness.run_rubrics (rubric_id);
comment on table pgharness.run_rubrics is
'One row per rubric that grades a case in a run, numbered from 1 (newest author first). Never changes; the rubric''s criteria are frozen with it.';

create table pgharness.workers (
    id              bigint generated always as identity,
    host            text not null,
    pid             integer not null,
    version         text not null,
    queues          text[] not null,
    concurrency     integer not null,
    environment     jsonb not null default '{}',
    queue_worker_id bigint,
    status          text not null default 'running',
    in_flight       jsonb not null default '{}',
    started_at      timestamptz not null default now(),
    heartbeat_at    timestamptz not null default now(),
    constraint workers_pkey primary key (id),
    constraint workers_status_check check (status in ('running', 'draining', 'stopped', 'lost'))
) with (fillfactor = 50);
create index workers_alive_idx on pgharness.workers (id) where status in ('running', 'draining');
comment on table pgharness.workers is 'One row per worker process that ever registered; read it through worker_health.';
comment on column pgharness.workers.environment is 'Python and package versions, git commit and dirty flag of the directory it runs in.';
comment on column pgharness.workers.queue_worker_id is 'Its id in the queue''s own worker table.';
comment on column pgharness.workers.status is 'running -> draining -> stopped; running | draining -> lost when its heartbeat stops.';

create table pgharness.run_workers (
    run_id     bigint not null,
    worker_id  bigint not null,
    started_at timestamptz not null default now(),
    constraint run_workers_pkey primary key (run_id, worker_id),
    constraint run_workers_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint run_workers_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete restrict
);
create index run_workers_worker_id_idx on pgharness.run_workers (worker_id);
comment on table pgharness.run_workers is 'One row per worker that took work of a run: how the run was made.';

create table pgharness.notes (
    run_id             bigint not null,
    ordinal            bigint not null,
    case_number        integer not null,
    combination_number integer not null,
    overlap            integer not null,
    replication        integer not null,
    attempts           integer not null,
    output             jsonb not null,
    created_at         timestamptz not null default now(),
    constraint notes_pkey primary key (run_id, ordinal),
    constraint notes_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);
create index notes_created_at_idx on pgharness.notes (run_id, created_at);
comment on table pgharness.notes is
'One row per generated output, written when it is done. The ordinal says case, combination, overlap and replication, so its primary key is the promise that none exists twice. Read them through note_results.';
comment on column pgharness.notes.attempts is 'Tries it took, rate limits included.';
comment on column pgharness.notes.output is 'A JSON string for a text, or the object that a program or callable gave.';

create table pgharness.grades (
    run_id        bigint not null,
    note_ordinal  bigint not null,
    rubric_number integer not null,
    replication   integer not null,
    ordinal       bigint not null,
    rubric_id     bigint,
    attempts      integer not null,
    score         numeric(12, 4) not null,
    max_score     numeric(12, 4) not null,
    criteria      jsonb not null default '[]',
    created_at    timestamptz not null default now(),
    constraint grades_pkey primary key (run_id, note_ordinal, rubric_number, replication),
    constraint grades_max_score_check check (max_score > 0),
    constraint grades_score_check check (score >= 0 and score <= max_score),
    constraint grades_note_fkey foreign key (run_id, note_ordinal) references pgharness.notes (run_id, ordinal) on delete cascade
) with (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);
create index grades_created_at_idx on pgharness.grades (run_id, created_at);
comment on table pgharness.grades is
'One row per scoring of a note: by a rubric (rubric_number from 1) or against the target (0), per replication. Read them through grade_results and criterion_results.';
comment on column pgharness.grades.ordinal is 'Its number in the run''s plan: note_ordinal * grade_stride + its place among the note''s grades.';
comment on column pgharness.grades.criteria is
'One object per criterion of the rubric, in its order: rationale, satisfaction (0..100), score (weight * satisfaction / 100).';

create table pgharness.failures (
    run_id          bigint not null,
    kind            text not null,
    ordinal         bigint not null,
    status          text not null,
    attempts        integer not null default 0,
    delays          integer not null default 0,
    tries           integer not null default 0,
    crashes         integer not null default 0,
    first_delayed_at timestamptz,
    cause           text not null,
    error           text not null,
    answer          text,
    next_attempt_at timestamptz,
    updated_at      timestamptz not null default now(),
    constraint failures_pkey primary key (run_id, kind, ordinal),
    constraint failures_kind_check check (kind in ('note', 'grade')),
    constraint failures_status_check check (status in ('waiting', 'failed')),
    constraint failures_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (fillfactor = 70);
create index failures_waiting_idx on pgharness.failures (run_id, kind) where status = 'waiting';
comment on table pgharness.failures is
'One row per note or grade whose last try did not succeed; it goes away when a later one does (calls keep every try).';
comment on column pgharness.failures.status is 'waiting (it will be tried again at next_attempt_at) or failed (retry_failed() tries it again).';
comment on column pgharness.failures.attempts is 'Attempts spent; rate limits and outages count as delays instead.';
comment on column pgharness.failures.tries is 'How often it was tried in all; retry_failed() resets attempts and delays, not this, so that no try repeats an earlier one.';
comment on column pgharness.failures.crashes is 'Times that a worker died while it ran this item alone; at 5 the item is failed.';
comment on column pgharness.failures.answer is 'The model''s answer, or a program''s traceback, when that was what failed.';

create table pgharness.calls (
    id            bigint generated always as identity,
    run_id        bigint not null,
    kind          text not null,
    ordinal       bigint not null,
    attempt       integer not null,
    model_id      bigint not null,
    worker_id     bigint,
    outcome       text not null,
    error         text,
    answer        text,
    http_status   integer,
    finish_reason text,
    request_id    text,
    answered_by   text,
    input_tokens  integer not null default 0,
    output_tokens integer not null default 0,
    cached_tokens integer not null default 0,
    cost_usd      numeric(14, 8) not null default 0,
    latency_ms    double precision not null,
    started_at    timestamptz not null,
    constraint calls_pkey primary key (id),
    -- a batch whose commit was not heard of is sent again: its calls count once
    constraint calls_run_id_kind_ordinal_attempt_started_at_key unique (run_id, kind, ordinal, attempt, started_at),
    constraint calls_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
) with (autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.02);
create index calls_model_id_idx on pgharness.calls (model_id, id);
comment on table pgharness.calls is
'One row per request to a model that ended, whatever its outcome: tokens, cost, latency, finish reason. Written with the outcome it led to.';
comment on column pgharness.calls.attempt is 'Which try of its item it belongs to, rate limits included.';
comment on column pgharness.calls.outcome is
'succeeded, rate_limited, unavailable, server_error, timeout, invalid_output, refused, rejected, code_failed, error or cancelled.';
comment on column pgharness.calls.answer is 'The answer as received, kept when it could not be used.';

create table pgharness.results (
    id         bigint generated always as identity,
    run_id     bigint not null,
    key        text not null,
    value      jsonb not null,
    created_at timestamptz not null default now(),
    constraint results_pkey primary key (id),
    constraint results_key_check check (key <> ''),
    constraint results_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
create index results_run_id_idx on pgharness.results (run_id, key, id);
comment on table pgharness.results is 'One row per recorded result of a run: a key and any JSON value; the newest of a key counts, older ones are its history.';

create table pgharness.logs (
    id         bigint generated always as identity,
    run_id     bigint,
    level      text not null default 'info',
    message    text not null,
    data       jsonb not null default '{}',
    created_at timestamptz not null default now(),
    constraint logs_pkey primary key (id),
    constraint logs_level_check check (level in ('debug', 'info', 'warning', 'error')),
    constraint logs_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade
);
create index logs_run_id_idx on pgharness.logs (run_id, id);
comment on table pgharness.logs is 'One row per thing worth telling: state changes of runs, workers lost, work put back.';

create table pgharness.model_limits (
    model_id           bigint not null,
    blocked_until      timestamptz,
    requests_available double precision not null default 1e9,
    tokens_available   double precision not null default 1e9,
    refilled_at        timestamptz not null default now(),
    constraint model_limits_pkey primary key (model_id),
    constraint model_limits_model_id_fkey foreign key (model_id) references pgharness.models (id) on delete cascade
) with (fillfactor = 50);
comment on table pgharness.model_limits is
'One row per model in use: the token buckets for its requests and tokens per minute, shared by all workers, and until when its provider asked to wait. The buckets start full.';

create table pgharness.model_leases (
    model_id   bigint not null,
    worker_id  bigint not null,
    in_use     integer not null,
    granted    integer not null,
    wanted     integer not null,
    updated_at timestamptz not null default now(),
    constraint model_leases_pkey primary key (model_id, worker_id),
    constraint model_leases_model_id_fkey foreign key (model_id) references pgharness.models (id) on delete cascade,
    constraint model_leases_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete cascade
) with (fillfactor = 50);
create index model_leases_worker_id_idx on pgharness.model_leases (worker_id);
comment on table pgharness.model_leases is
'One row per worker that uses a model with max_concurrency: how many of its slots the worker may fill. Leases of workers that died do not count.';

create type pgharness.run_receipt as (
    run_id bigint,
    run    text,
    status text,
    reason text,
    notes  bigint,
    grades bigint
);
comment on type pgharness.run_receipt is 'What a run control function answers: the run, its state and why, and how many notes and grades it plans.';

create type pgharness.outcome as (
    run_id         bigint,
    kind           text,
    ordinal        bigint,
    attempt        integer,
    result         text,
    output         jsonb,
    verdicts       jsonb,
    score          numeric,
    max_score      numeric,
    cause          text,
    error          text,
    answer         text,
    is_retryable   boolean,
    spends_attempt boolean,
    retry_after    double precision,
    calls          jsonb
);
comment on type pgharness.outcome is
'One element of record_outcomes(): how one try of a note or grade ended (result: succeeded, failed or cancelled), with the calls it made.';

-- What the remaining columns mean.
comment on column pgharness.runs.rerun_of_id is 'The run whose frozen definition it repeats.';
comment on column pgharness.runs.priority is 'Runs of higher priority are worked on first.';
comment on column pgharness.runs.budget_usd is 'Cost at which it pauses; null means none.';
comment on column pgharness.runs.failure_threshold is 'Share of the planned notes and grades that may fail before it stops as failed; the instance''s, until resume_run() changes it.';
comment on column pgharness.runs.note_count is 'Notes planned.';
comment on column pgharness.runs.grade_count is 'Grades planned.';
comment on column pgharness.runs.notes_succeeded is 'Notes there are.';
comment on column pgharness.runs.notes_failed is 'Notes that failed for good.';
comment on column pgharness.runs.grades_succeeded is 'Grades there are.';
comment on column pgharness.runs.grades_failed is 'Grades that failed for good.';
comment on column pgharness.runs.note_cost_usd is 'Cost of all calls for notes, failed ones included.';
comment on column pgharness.runs.grade_cost_usd is 'Cost of all calls for grades, failed ones included.';
comment on column pgharness.runs.activated_at is 'When it was last started or resumed; null unless it is running.';
comment on column pgharness.runs.created_by is 'The database role that started it.';
comment on column pgharness.run_definitions.definition is 'The instance''s columns, with the prompts in use under "prompts" and a digest of the cases.';
comment on column pgharness.run_definitions.transcript_overlaps is 'The instance''s cycle_transcript_overlaps.';
comment on column pgharness.run_cases.number is 'Its place in the run, from 0 in the order of case ids.';
comment on column pgharness.run_cases.digest is 'The digest of the case''s content at the start.';
comment on column pgharness.run_combinations.number is 'Its place in the run, from 0.';
comment on column pgharness.run_combinations.combination_id is 'Null when the instance''s combination was deleted since.';
comment on column pgharness.run_combinations.generator is 'The generator''s row of models, with the combination''s parameters.';
comment on column pgharness.run_combinations.grader is 'The grader''s row of models, with the combination''s parameters; null for none.';
comment on column pgharness.run_combinations.grades_per_note is 'Rubrics (or the target) x replications.';
comment on column pgharness.run_rubrics.case_number is 'The case''s number in run_cases.';
comment on column pgharness.run_rubrics.number is 'From 1, the author with the newest accepted rubric first.';
comment on column pgharness.workers.pid is 'Its process id on its host.';
comment on column pgharness.workers.version is 'The version of pgharness that it runs.';
comment on column pgharness.workers.queues is 'The queues it serves: note, grade.';
comment on column pgharness.workers.concurrency is 'Calls that it may have in flight.';
comment on column pgharness.workers.in_flight is 'Calls in flight at its last heartbeat: to each run''s id, how many for notes and for grades, as in {"7": {"note": 3, "grade": 1}}.';
comment on column pgharness.workers.heartbeat_at is 'Its last sign of life; one a second.';
comment on column pgharness.run_workers.started_at is 'When it took the first slice of the run.';
comment on column pgharness.notes.ordinal is 'Its number in the run''s plan, from 0.';
comment on column pgharness.notes.case_number is 'The case''s number in run_cases.';
comment on column pgharness.notes.combination_number is 'The combination''s number in run_combinations.';
comment on column pgharness.notes.overlap is 'The transcript overlap that the generator was given.';
comment on column pgharness.notes.replication is 'Which note of its case, combination and overlap it is, from 1.';
comment on column pgharness.grades.note_ordinal is 'The note it scores.';
comment on column pgharness.grades.rubric_number is 'The rubric''s number in run_rubrics; 0 for a grade against the target.';
comment on column pgharness.grades.replication is 'Which grade of its note and rubric it is, from 1.';
comment on column pgharness.grades.attempts is 'Tries it took, rate limits included.';
comment on column pgharness.grades.score is 'Sum of the criteria''s scores; or what the metric gave.';
comment on column pgharness.grades.max_score is 'Sum of the criteria''s weights; or the most that the metric gives.';
comment on column pgharness.failures.kind is 'note or grade.';
comment on column pgharness.failures.ordinal is 'The item''s number in the run''s plan.';
comment on column pgharness.failures.delays is 'Tries that spent no attempt: rate limits and outages.';
comment on column pgharness.failures.first_delayed_at is 'Since when there were only rate limits and outages; after a day of them the item fails.';
comment on column pgharness.failures.cause is 'How the last try ended: the outcome of its call, crashed (a worker died of it) or not_recordable.';
comment on column pgharness.failures.next_attempt_at is 'When a waiting item is tried again.';
comment on column pgharness.calls.kind is 'What the model was asked for: note or grade.';
comment on column pgharness.calls.ordinal is 'The number of that note or grade in the run''s plan.';
comment on column pgharness.calls.http_status is 'Null when there was no answer, or no HTTP.';
comment on column pgharness.calls.finish_reason is 'Why the model stopped, in the provider''s words.';
comment on column pgharness.calls.answered_by is 'The model as the provider named it in its answer; of a program, the commit that ran.';
comment on column pgharness.calls.request_id is 'What the provider calls the request, for its support.';
comment on column pgharness.calls.cached_tokens is 'The part of input_tokens that the provider served from its cache.';
comment on column pgharness.calls.cost_usd is 'By the prices that the run froze.';
comment on column pgharness.calls.latency_ms is 'From sending the request to the end of the answer.';
comment on column pgharness.logs.level is 'debug, info, warning or error.';
comment on column pgharness.logs.data is 'More about it, as JSON.';
comment on column pgharness.model_limits.blocked_until is 'Until when no worker calls the model, because its provider asked to wait.';
comment on column pgharness.model_limits.requests_available is 'Requests that may start now.';
comment on column pgharness.model_limits.tokens_available is 'Tokens that may be spent now; below 0 after calls that used more than was estimated.';
comment on column pgharness.model_limits.refilled_at is 'Up to when the buckets have been filled.';
comment on column pgharness.model_leases.in_use is 'Calls that the worker had in flight when it last asked.';
comment on column pgharness.model_leases.granted is 'Calls that it may have in flight.';
comment on column pgharness.model_leases.wanted is 'Calls that it would have started beyond those in flight.';
comment on column pgharness.run_receipt.reason is 'Why it is paused, failed or cancelled.';
comment on column pgharness.run_receipt.notes is 'Notes planned.';
comment on column pgharness.run_receipt.grades is 'Grades planned.';
comment on column pgharness.outcome.kind is 'note or grade.';
comment on column pgharness.outcome.ordinal is 'The item''s number in the run''s plan.';
comment on column pgharness.outcome.attempt is 'Which try of the item it was, from 1, rate limits included.';
comment on column pgharness.outcome.result is 'succeeded, failed or cancelled.';
comment on column pgharness.outcome.output is 'Of a note that succeeded: a JSON string for a text, or an object.';
comment on column pgharness.outcome.verdicts is 'Of a grade by a model: one {"rationale", "satisfaction"} per criterion, in order.';
comment on column pgharness.outcome.score is 'Of a grade by a metric.';
comment on column pgharness.outcome.max_score is 'Of a grade by a metric: the most that it gives.';
comment on column pgharness.outcome.cause is 'How a failed try ended: the outcome of its call, crashed or not_recordable.';
comment on column pgharness.outcome.answer is 'What the model answered, or the end of a program''s output, when that was what failed.';
comment on column pgharness.outcome.is_retryable is 'Whether another try may succeed; if not, the item fails at once.';
comment on column pgharness.outcome.spends_attempt is 'False for rate limits and outages.';
comment on column pgharness.outcome.retry_after is 'Seconds that the provider asked to wait.';
comment on column pgharness.outcome.calls is 'The requests that the try made: objects with columns of calls.';
