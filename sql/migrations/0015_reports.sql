-- Reports that were asked for, and their files. New tables only.

create table pgharness.reports (
    id            bigint generated always as identity,
    run_ids       bigint[] not null,
    formats       text[] not null,
    alpha         double precision not null,
    status        text not null default 'pending',
    inputs_digest text not null,
    title         text,
    version       text,
    error         text,
    hint          text,
    attempts      integer not null default 0,
    worker_id     bigint,
    requested_by  text not null default session_user,
    requested_at  timestamptz not null default now(),
    started_at    timestamptz,
    finished_at   timestamptz,
    constraint reports_pkey primary key (id),
    constraint reports_run_ids_check check (cardinality(run_ids) > 0),
    constraint reports_formats_check check (cardinality(formats) > 0 and formats <@ '{html,md,latex,ipynb,json,csv}'),
    constraint reports_alpha_check check (alpha > 0 and alpha < 1),
    constraint reports_status_check check (status in ('pending', 'running', 'succeeded', 'failed')),
    constraint reports_finished_at_check check ((finished_at is not null) = (status in ('succeeded', 'failed'))),
    constraint reports_error_check check ((error is not null) = (status = 'failed')),
    constraint reports_worker_id_fkey foreign key (worker_id) references pgharness.workers (id) on delete set null
);
create index reports_worker_id_idx on pgharness.reports (worker_id);
create index reports_inputs_digest_idx on pgharness.reports (inputs_digest);
create index reports_open_idx on pgharness.reports (id) where status in ('pending', 'running');
comment on table pgharness.reports is
'One row per report that was asked for by request_report(), with what came of it; report_files has its files. Any worker takes one that is pending, or whose worker died.';
comment on column pgharness.reports.run_ids is 'The runs that are reported on, the first one first. It stays when a run is deleted.';
comment on column pgharness.reports.formats is 'Of html, md, latex, ipynb, json, csv.';
comment on column pgharness.reports.alpha is 'The level of its tests; its intervals are of 1 - alpha.';
comment on column pgharness.reports.status is 'pending -> running -> succeeded | failed; running -> pending when its worker died.';
comment on column pgharness.reports.inputs_digest is 'analysis_digest() of the runs when it was asked for.';
comment on column pgharness.reports.title is 'What it is headed.';
comment on column pgharness.reports.version is 'The version of pgharness that made it.';
comment on column pgharness.reports.error is 'Why it failed.';
comment on column pgharness.reports.hint is 'What to type next.';
comment on column pgharness.reports.attempts is 'How often a worker took it.';
comment on column pgharness.reports.worker_id is 'The worker that has it or made it.';
comment on column pgharness.reports.requested_by is 'The database role that asked for it first.';
comment on column pgharness.reports.requested_at is 'When that was.';

create table pgharness.report_contents (
    report_id  bigint not null,
    path       text not null,
    media_type text not null,
    digest     text not null,
    content    bytea not null,
    constraint report_contents_pkey primary key (report_id, path),
    constraint report_contents_path_check check (path ~ '^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*\.[a-z]+$'),
    constraint report_contents_digest_check check (digest ~ '^[0-9a-f]{64}$'),
    constraint report_contents_report_id_fkey foreign key (report_id) references pgharness.reports (id) on delete cascade
);
comment on table pgharness.report_contents is 'One row per file of a report; read it through report_files.';
comment on column pgharness.report_contents.path is 'Below the report''s folder: report.html, figures/estimates.svg.';
comment on column pgharness.report_contents.digest is 'SHA-256 of the content.';
comment on column pgharness.report_contents.media_type is 'As HTTP has it: text/html, image/svg+xml.';
comment on column pgharness.report_contents.content is 'The file: of a text in UTF-8.';
