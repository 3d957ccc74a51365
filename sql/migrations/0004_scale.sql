-- Many runs and many workers side by side: caps on a run's calls, work that moves to workers with nothing to do, tables that are updated hot.

alter table pgharness.runs
    add column max_concurrency integer constraint runs_max_concurrency_check check (max_concurrency > 0);
comment on column pgharness.runs.max_concurrency is 'Calls that it may have in flight on all workers together; null means no limit.';
comment on column pgharness.runs.priority is 'Runs of higher priority are worked on first; runs of the same priority share the workers.';

alter table pgharness.workers add column spare integer not null default 0;
comment on column pgharness.workers.spare is 'Calls that it could have started at its last heartbeat, had there been work for it.';

create table pgharness.run_leases (
    run_id     bigint not null,
    worker_id  bigint not null,
    in_use     integer not null,
    granted    integer not null,
    wanted     integer not null,
    updated_at timestamptz not null default now(),
    constraint run_leases_pkey primary key (run_id, worker_id),
    constraint run_leases_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint run_leases_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete cascade
) with (fillfactor = 50);
create index run_leases_worker_id_idx on pgharness.run_leases (worker_id);
comment on table pgharness.run_leases is
'One row per worker that works on a run with max_concurrency: how many of its calls the worker may have in flight. Leases of workers that died do not count.';
comment on column pgharness.run_leases.in_use is 'Calls that the worker had in flight when it last asked.';
comment on column pgharness.run_leases.granted is 'Calls that it may have in flight.';
comment on column pgharness.run_leases.wanted is 'Calls that it would have started beyond those in flight.';

-- Few rows, updated many times a second: cleaned by the number of dead rows, whatever the table's size.
alter table pgharness.runs set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table pgharness.workers set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table pgharness.model_limits set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table pgharness.model_leases set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table pgharness.run_leases set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
alter table pgharness.failures set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 500);

-- Work functions alone write these rows, with their run's row locked, so the keys said nothing that does not hold already; each cost a
-- look-up and a lock a row. Trigger _100_delete_items deletes what the cascades did.
-- squawk-ignore ban-drop-constraint
alter table pgharness.notes drop constraint notes_run_id_fkey;
-- squawk-ignore ban-drop-constraint
alter table pgharness.grades drop constraint grades_note_fkey;
-- squawk-ignore ban-drop-constraint
alter table pgharness.calls drop constraint calls_run_id_fkey;

-- Functions whose signatures changed; functions/ makes them anew.
drop function if exists pgharness.start_run(text, text, text, double precision, integer, text);
drop function if exists pgharness.load_slice(bigint, jsonb);
drop function if exists pgharness.record_outcomes(bigint, jsonb);
drop function if exists pgharness._advance_run(bigint, pgharness.run_definitions, bigint[], bigint[], pgharness.failures[]);
drop function if exists pgharness.heartbeat(bigint, jsonb, text, bigint[], bigint[]);
drop function if exists pgharness._slice_size(bigint);
drop function if exists pgharness._defer(bigint, text, jsonb[], timestamptz);
