-- Where the rows of archived runs are.

create or replace view pgharness.archived_runs with (security_invoker = true) as
select r.id as run_id, r.name as run, r.instance, r.kind, r.status, r.finished_at,
       a.archived_at, a.archived_by, a.file_name, a.file_bytes, a.digest,
       r.notes_succeeded, r.grades_succeeded, r.note_cost_usd + r.grade_cost_usd as cost_usd, a.scores, a.costs
  from pgharness.runs as r
  join pgharness.archives as a on a.run_id = r.id
 where r.archived_at is not null;
comment on view pgharness.archived_runs is
'One row per run whose notes, grades and calls are in a file: which file that is, and what is known without it. Example: select run, file_name from pgharness.archived_runs order by archived_at;';
comment on column pgharness.archived_runs.archived_at is 'When its rows left the database.';
comment on column pgharness.archived_runs.archived_by is 'The database role that archived it.';
comment on column pgharness.archived_runs.file_name is 'The file''s name when it was written.';
comment on column pgharness.archived_runs.file_bytes is 'The file''s size.';
comment on column pgharness.archived_runs.digest is 'The digest in the file''s manifest: pgharness unarchive takes no other file.';
comment on column pgharness.archived_runs.scores is 'The run''s rows of combination_scores when it was archived.';
comment on column pgharness.archived_runs.costs is 'Calls, tokens and cost of the run per model and kind of item, when it was archived.';
