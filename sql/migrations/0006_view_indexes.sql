-- What statistics read, and no more of it: a grade's score as a share, within its primary key; calls that failed. Rewrites table grades under an exclusive lock.

alter table pgharness.grades
    drop constraint grades_pkey,
    add column normalised_score double precision generated always as ((score / nullif(max_score, 0))::double precision) stored,
    add constraint grades_pkey primary key (run_id, note_ordinal, rubric_number, replication) include (normalised_score);
comment on column pgharness.grades.normalised_score is
'score / max_score (0..1), computed by the database. It lies in the primary key too, so that statistics over millions of grades need not read the grades.';

create index calls_failed_idx on pgharness.calls (run_id, kind, outcome, id) include (started_at) where outcome not in ('succeeded', 'cancelled');
