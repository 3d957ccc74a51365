-- Finished runs whose notes, grades and calls are in a file. A column and a check on runs (few rows), and a new table.

alter table pgharness.runs
    add column archived_at timestamptz,
    -- squawk-ignore constraint-missing-not-valid
    add constraint runs_archived_at_check check (archived_at is null or finished_at is not null);
comment on column pgharness.runs.archived_at is
'Since when its notes, grades, calls, results and logs are in a file instead of here; null while they are here.';

create table pgharness.archives (
    run_id        bigint not null,
    digest        text not null,
    file_name     text not null,
    file_bytes    bigint not null,
    content       jsonb not null,
    scores        jsonb not null,
    costs         jsonb not null,
    restored_rows jsonb not null default '{}',
    archived_by   text not null default session_user,
    archived_at   timestamptz not null default now(),
    restored_at   timestamptz,
    constraint archives_pkey primary key (run_id),
    constraint archives_run_id_fkey foreign key (run_id) references pgharness.runs (id) on delete cascade,
    constraint archives_digest_check check (digest ~ '^[0-9a-f]{64}$'),
    constraint archives_content_check check (jsonb_typeof(content -> 'members') = 'array')
);
comment on table pgharness.archives is
'One row per run that was archived, restored since or not: which file holds its rows, and what the file has to hold. Read it through archived_runs.';
comment on column pgharness.archives.digest is 'The digest in the file''s manifest: of the run''s identity and of the SHA-256 of everything in the file.';
comment on column pgharness.archives.file_name is 'Its name when it was written; where people keep it is theirs to know.';
comment on column pgharness.archives.file_bytes is 'Its size.';
comment on column pgharness.archives.content is
'What is in the file: of each table, as a member, its columns, how many rows, the SHA-256 of its text and a checksum of its rows.';
comment on column pgharness.archives.scores is 'The run''s rows of combination_scores when it was archived.';
comment on column pgharness.archives.costs is 'Calls, tokens and cost of the run per model and kind of item, when it was archived.';
comment on column pgharness.archives.restored_rows is 'While it is being restored: how many rows of each table are back, with their checksum.';
comment on column pgharness.archives.archived_by is 'The database role that archived it.';
comment on column pgharness.archives.archived_at is 'When it was last archived.';
comment on column pgharness.archives.restored_at is 'When its rows came back; null while they are in the file.';
