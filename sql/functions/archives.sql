-- Archives: the rows of a finished run as lines of JSON for a file, their removal once the file is safe, and their return.
-- A file outlives migrations, so columns come from the catalog and from the file, never from a list here: hence the dynamic SQL.

create or replace function pgharness._archive_members() returns table (place integer, member text, keys text[], condition text, is_detached boolean)
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    values ( 1, 'runs',             '{id}'::text[],                                't.id = $1', false),
           ( 2, 'run_definitions',  '{run_id}',                                    't.run_id = $1', false),
           ( 3, 'run_cases',        '{number}',                                    't.run_id = $1', false),
           ( 4, 'run_combinations', '{number}',                                    't.run_id = $1', false),
           ( 5, 'run_rubrics',      '{case_number,number}',                        't.run_id = $1', false),
           ( 6, 'run_workers',      '{worker_id}',                                 't.run_id = $1', false),
           ( 7, 'cases',            '{id}', 't.id in (select rc.case_id from run_cases as rc where rc.run_id = $1)', false),
           ( 8, 'rubrics',          '{id}', 't.id in (select rr.rubric_id from run_rubrics as rr where rr.run_id = $1)', false),
           ( 9, 'workers',          '{id}', 't.id in (select rw.worker_id from run_workers as rw where rw.run_id = $1)', false),
           (10, 'notes',            '{ordinal}',                                   't.run_id = $1', true),
           (11, 'grades',           '{note_ordinal,rubric_number,replication}',    't.run_id = $1', true),
           (12, 'calls',            '{kind,ordinal,attempt,started_at,id}',        't.run_id = $1', true),
           (13, 'failures',         '{kind,ordinal}',                              't.run_id = $1', false),
           (14, 'results',          '{key,id}',                                    't.run_id = $1', true),
           (15, 'logs',             '{id}',                                        't.run_id = $1', true),
           (16, 'run_versions',     '{version_id}',                                't.run_id = $1', false),
           (17, 'tasks',            '{ordinal}',                                   't.run_id = $1', false),
           (18, 'metrics',          '{id}',                                        't.run_id = $1', false),
           (19, 'timings',          '{id}',                                        't.run_id = $1', false),
           (20, 'logged_calls',     '{id}',                                        't.run_id = $1', false),
           (21, 'artifacts',        '{id}',                                        't.run_id = $1', false),
           (22, 'progress_reports', '{run_id}',                                    't.run_id = $1', false),
           (23, 'tellers',          '{teller}',                                    't.run_id = $1', false),
           (26, 'batches',          '{id}',                                        't.run_id = $1', false);
$$;
comment on function pgharness._archive_members() is
'The tables in an archive, in the order in which their rows can come back: the key that orders a run''s rows, which rows are its own ($1 is the run), and whether they leave the database. Failures stay: they are few, say what failed, and make retry_failed() refuse. So does what a run of code told beside its results and its log.';

create or replace function pgharness._line_checksum(line text) returns bigint
    language sql stable security invoker             -- no pinned path: it names nothing, and is inlined, since it promises no more than convert_to()
as $$ select ('x' || left(encode(sha256(convert_to(line, 'UTF8')), 'hex'), 15))::bit(60)::bigint; $$;
comment on function pgharness._line_checksum(text) is
'The first 60 bits of a line''s SHA-256: their sum over lines says whether two sets of lines are the same, in whatever order they come.';

create or replace function pgharness._tally_rows(run_id bigint, member text, out row_count bigint, out checksum numeric)
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set timezone = 'UTC' set extra_float_digits = 1
as $$
begin
    execute format('select count(*), coalesce(sum(_line_checksum(row_to_json(t)::text)), 0) from %I as t where t.run_id = $1', _tally_rows.member)
       into row_count, checksum using _tally_rows.run_id;
end;
$$;
comment on function pgharness._tally_rows(bigint, text) is 'How many rows a run has in a table, and the checksum of their lines.';

create or replace function pgharness._check_archivable(run pgharness.runs) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
begin
    if run.finished_at is null then
        raise exception 'run "%" is %', run.name, run.status
            using errcode = 'PH003', hint = format('Only finished runs can be archived; wait for it, or end it: select pgharness.cancel_run(%s);', run.id);
    elsif run.archived_at is not null then
        raise exception 'run "%" is archived already, in %', run.name, (select a.file_name from archives as a where a.run_id = run.id)
            using errcode = 'PH003', hint = format('See where: select * from pgharness.archived_runs where run_id = %s;', run.id);
    elsif exists (select from batches as b where b.run_id = run.id and b.finished_at is null) then
        raise exception 'run "%" is %, and a vendor still has a batch of it', run.name, run.status
            using errcode = 'PH003', hint = format('Wait until it is collected, which needs a worker: select * from pgharness.batches_progress where run_id = %s;', run.id);
    elsif _queue_exists() then
        if exists (select from procrastinate.procrastinate_jobs as j join workers as w on w.queue_worker_id = j.worker_id
                    where j.status = 'doing' and j.args ->> 'run_id' = run.id::text
                      and w.status in ('running', 'draining') and w.heartbeat_at > clock() - interval '30 seconds') then
            raise exception 'run "%" is %, and workers still end their calls for it', run.name, run.status
                using errcode = 'PH003', hint = 'Try again in a few seconds; see who works: select * from pgharness.worker_health;';
        end if;
    end if;
end;
$$;
comment on function pgharness._check_archivable(pgharness.runs) is
'Raise PH003 for a run that is not finished, is archived, or of which a worker alive has a job or a vendor a batch: it may still record calls.';

create or replace function pgharness.open_archive(run text) returns jsonb
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp set timezone = 'UTC'
as $$
declare
    v_run runs;
begin
    select r.* into strict v_run from runs as r where r.id = _run_id(open_archive.run);
    perform _check_archivable(v_run);
    if not pg_try_advisory_xact_lock(hashtextextended('pgharness.archive ' || v_run.id, 0)) then
        raise exception 'run "%" is being archived by another session', v_run.name
            using errcode = 'PH003', hint = 'Wait for it; then see: select * from pgharness.archived_runs;';
    end if;
    return jsonb_build_object(
        'run_id', v_run.id, 'run', v_run.name, 'instance', v_run.instance, 'status', v_run.status, 'created_at', v_run.created_at,
        'finished_at', v_run.finished_at, 'schema', (select max(s.name) from schema_migrations as s where s.name not like '%/%'),
        'members', (
            select jsonb_agg(jsonb_build_object(
                       'name', m.member, 'is_detached', m.is_detached, 'about', obj_description(format('pgharness.%I', m.member)::regclass, 'pg_class'),
                       'columns', (
                           select jsonb_agg(jsonb_strip_nulls(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
                                                                                 'about', col_description(a.attrelid, a.attnum))) order by a.attnum)
                             from pg_attribute as a
                            where a.attrelid = format('pgharness.%I', m.member)::regclass and a.attnum > 0 and not a.attisdropped)) order by m.place)
              from _archive_members() as m));
end;
$$;
comment on function pgharness.open_archive(text) is
'What an archive of a finished run, given by name or id, has to hold: the run, and each table with its columns, types and comments; archive_rows() has the rows. Until the transaction ends no other session can open it. Read both in one repeatable read transaction. Raises PH001, PH003 (it is not finished, is archived, or is being archived). Example: select pgharness.open_archive(''triage-v2/1'');';

-- pages come straight from an index, whatever the statistics say: sorting what is left for each would take the square of the time
create or replace function pgharness.archive_rows(run_id bigint, member text, after text default null) returns setof text
    language plpgsql stable security invoker set search_path = pgharness, pg_temp set timezone = 'UTC' set extra_float_digits = 1
    set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
as $$
declare
    v_member record;
    v_after  json := archive_rows.after::json;
    v_line   text;
    v_bytes  bigint := 0;
begin
    select m.* into v_member from _archive_members() as m where m.member = archive_rows.member;
    if not found then
        raise exception '"%" is no table of an archive', archive_rows.member
            using errcode = 'PH002', hint = 'See which are: select pgharness.open_archive(...);';
    end if;
    for v_line in execute (
        select format('select row_to_json(t)::text from %I as t where %s', v_member.member, v_member.condition)
               || case when v_after is not null then format(' and (%s) > (%s)', string_agg(format('t.%I', k), ', '), string_agg(quote_literal(v_after ->> k), ', ')) else '' end
               || format(' order by %s limit 5000', string_agg(format('t.%I', k), ', '))
          from unnest(v_member.keys) as k) using archive_rows.run_id
    loop
        return next v_line;
        v_bytes := v_bytes + octet_length(v_line);
        exit when v_bytes > 4000000;
    end loop;
end;
$$;
comment on function pgharness.archive_rows(bigint, text, text) is
'The next rows of a run in one table of its archive, one JSON object each, in the order of their key: those after the row given, which is the last one of the call before. At most 5,000 rows, or 4 MB and a row; none when all were given. Raises PH002. Example: select pgharness.archive_rows(7, ''notes'');';

create or replace function pgharness.detach_run(run_id bigint, digest text, file_name text, file_bytes bigint, content jsonb) returns pgharness.archives
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run     runs;
    v_archive archives;
    v_member  record;
begin
    -- for update: whoever is about to add a row to the run has to wait, and whoever did so is waited for
    select r.* into v_run from runs as r where r.id = detach_run.run_id for update;
    perform _check_id('run', detach_run.run_id, v_run.name);
    select a.* into v_archive from archives as a where a.run_id = v_run.id;
    if v_run.archived_at is not null and v_archive.digest = detach_run.digest then
        return v_archive;                               -- a second detaching by the same file is not an error
    end if;
    perform _check_archivable(v_run);
    if (content ->> 'run_id')::bigint is distinct from v_run.id then
        raise exception 'the file is an archive of run %, not of run %', content ->> 'run_id', v_run.id
            using errcode = 'PH002', hint = format('Archive this one: pgharness archive %s --out FOLDER', v_run.id);
    end if;
    for v_member in
        select m.member, now_.row_count, now_.checksum, (f.value ->> 'rows')::bigint as file_rows, (f.value ->> 'checksum')::numeric as file_checksum
          from _archive_members() as m
         cross join lateral _tally_rows(v_run.id, m.member) as now_
          left join jsonb_array_elements(content -> 'members') as f on f.value ->> 'name' = m.member
         where m.is_detached
    loop
        if (v_member.row_count, v_member.checksum) is distinct from (v_member.file_rows, v_member.file_checksum) then
            raise exception '% of run "%" are not those in the file', v_member.member, v_run.name
                using errcode = 'PH004', detail = format('Here are %s rows, in the file %s.', v_member.row_count, coalesce(v_member.file_rows::text, 'none')),
                      hint = format('Nothing was deleted. They changed since the file was written: archive the run again: pgharness archive %s --out FOLDER', v_run.id);
        end if;
    end loop;
    insert into archives as a (run_id, digest, file_name, file_bytes, content, scores, costs, archived_at)
    values (v_run.id, detach_run.digest, detach_run.file_name, detach_run.file_bytes, detach_run.content, _archive_scores(v_run.id), _archive_costs(v_run.id), clock())
    on conflict on constraint archives_pkey do update
       set digest = excluded.digest, file_name = excluded.file_name, file_bytes = excluded.file_bytes, content = excluded.content,
           scores = excluded.scores, costs = excluded.costs, archived_by = session_user, archived_at = excluded.archived_at, restored_at = null
    returning a.* into v_archive;
    for v_member in select m.member from _archive_members() as m where m.is_detached order by m.place desc loop
        execute format('delete from %I as t where t.run_id = $1', v_member.member) using v_run.id;
    end loop;
    delete from call_totals as t where t.run_id = v_run.id;      -- restore_rows() counts its calls anew
    perform _drop_settled(v_run.id, null);
    update runs as r set archived_at = v_archive.archived_at, settled_notes = 0 where r.id = v_run.id;
    insert into logs (run_id, message, data)
    values (v_run.id, 'archived', jsonb_build_object('by', session_user, 'file', v_archive.file_name, 'digest', v_archive.digest));
    return v_archive;
end;
$$;
comment on function pgharness.detach_run(bigint, text, text, bigint, jsonb) is
'Delete the notes, grades, calls, results and logs of a finished run that are in a file, if the rows here are still those in it, and remember the file; the run, its counters, its definition and its failures stay. The file has to be safe before. Idempotent. Raises PH001, PH002, PH003 (not finished, or archived in another file), PH004 (the rows are others). Example: pgharness archive calls it; select pgharness.detach_run(7, ''digest'', ''triage-v2-1.zip'', 1000, ''{"run_id": 7, "members": []}'');';

-- without nested loops: a run that was never analysed looks tiny, and is not
create or replace function pgharness._archive_scores(run_id bigint) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp set enable_nestloop = off
as $$
    select coalesce(jsonb_agg(to_jsonb(s) - '{run_id,run}'::text[] order by s.combination), '[]') from combination_scores as s where s.run_id = _archive_scores.run_id;
$$;
comment on function pgharness._archive_scores(bigint) is 'A run''s rows of combination_scores, to keep when its grades go.';

create or replace function pgharness._archive_costs(run_id bigint) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce(jsonb_agg(to_jsonb(s) order by s.model_id, s.kind), '[]')
      from (select c.model_id, m.name as model, c.kind, sum(c.call_count) as call_count, sum(c.input_tokens) as input_tokens, sum(c.output_tokens) as output_tokens,
                   sum(c.cached_tokens) as cached_tokens, sum(c.cost_usd) as cost_usd, max(c.last_used_at) as last_used_at
              from call_totals as c left join models as m on m.id = c.model_id
             where c.run_id = _archive_costs.run_id group by c.model_id, m.name, c.kind) as s;
$$;
comment on function pgharness._archive_costs(bigint) is 'Calls, tokens and cost of a run per model and kind of item, to keep when its calls go.';

-- Coming back

create or replace function pgharness.begin_restore(run_id bigint, digest text) returns pgharness.archives
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run     runs;
    v_archive archives;
begin
    select r.* into v_run from runs as r where r.id = begin_restore.run_id for update;
    select a.* into v_archive from archives as a where a.run_id = v_run.id;
    if v_run.id is null then
        raise exception 'run % is not in this database', begin_restore.run_id
            using errcode = 'PH001', hint = 'Its rows can come back only where they came from, and only while the run is there: select * from pgharness.archived_runs;';
    elsif v_archive.run_id is null then
        raise exception 'run "%" was never archived here', v_run.name
            using errcode = 'PH003', hint = 'The file may be of another database. See what is archived: select * from pgharness.archived_runs;';
    elsif v_archive.digest <> begin_restore.digest then
        raise exception 'the file is not the archive of run "%", which is %', v_run.name, v_archive.file_name
            using errcode = 'PH004', detail = format('The digest of the file is %s, that of the archive %s.', begin_restore.digest, v_archive.digest),
                  hint = format('Look for that file; there may be more than one of the run. See: select * from pgharness.archived_runs where run_id = %s;', v_run.id);
    elsif v_run.archived_at is not null and v_archive.restored_rows <> '{}' then
        raise exception 'run "%" is restored in part', v_run.name
            using errcode = 'PH003', hint = format('Go on with restore_rows() and end with: select pgharness.finish_restore(%s);', v_run.id);
    end if;
    return v_archive;                                   -- restored_at says whether there is anything to do
end;
$$;
comment on function pgharness.begin_restore(bigint, text) is
'Before restore_rows(), in the same transaction: lock an archived run and check that a file, given by its digest, is its archive. When restored_at is not null the rows are back already. Raises PH001, PH003 (it was never archived), PH004 (the file is another). Example: select restored_at from pgharness.begin_restore(7, ''digest'');';

create or replace function pgharness._archived_columns(content jsonb, member text) returns table (place bigint, name text, is_there boolean, is_same boolean, is_generated boolean, is_json boolean)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select c.place, c.value ->> 'name', a.attname is not null, coalesce(format_type(a.atttypid, a.atttypmod) = c.value ->> 'type', false),
           coalesce(a.attgenerated <> '', false), coalesce(a.atttypid in ('json'::regtype, 'jsonb'::regtype), false)
      from jsonb_array_elements(content -> 'members') as m
     cross join lateral jsonb_array_elements(m.value -> 'columns') with ordinality as c (value, place)
      left join pg_attribute as a
        on a.attrelid = to_regclass(format('pgharness.%I', member)) and a.attname = c.value ->> 'name' and a.attnum > 0 and not a.attisdropped
     where m.value ->> 'name' = _archived_columns.member and (m.value ->> 'is_detached')::boolean;
$$;
comment on function pgharness._archived_columns(jsonb, text) is
'The columns that a table had when it was archived: whether it still has each, of the same type, whether the database makes its values, and whether they are JSON.';

create or replace function pgharness.restore_rows(run_id bigint, member text, rows json) returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp set timezone = 'UTC' set extra_float_digits = 1
as $$
declare
    v_archive  archives;
    v_columns  text;
    v_writable text;
    v_values   text;
    v_count    bigint;
    v_checksum numeric;
begin
    select a.* into v_archive from archives as a where a.run_id = restore_rows.run_id and a.restored_at is null for update;
    if not found then
        raise exception 'run % is not archived', restore_rows.run_id
            using errcode = 'PH003', hint = 'See what is: select * from pgharness.archived_runs;';
    end if;
    -- a column of JSON is never null in these tables: its null is JSON's own
    select string_agg(quote_ident(c.name), ', ' order by c.place), string_agg(quote_ident(c.name), ', ' order by c.place) filter (where not c.is_generated),
           string_agg(format(case when c.is_json then 'coalesce(r.%I, ''null'')' else 'r.%I' end, c.name), ', ' order by c.place) filter (where not c.is_generated)
      into v_columns, v_writable, v_values
      from _archived_columns(v_archive.content, restore_rows.member) as c where c.is_there;
    if v_writable is null then
        raise exception '"%" is no table whose rows left the database', restore_rows.member
            using errcode = 'PH002', hint = format('See which are: select content from pgharness.archives where run_id = %s;', restore_rows.run_id);
    end if;
    -- columns that came since take their defaults
    execute format(
        'with restored as (
             insert into %1$I (%2$s) overriding system value
             select %3$s from json_populate_recordset(null::%1$I, $1) as r where r.run_id = $2
             returning %4$s)
         select count(*), coalesce(sum(_line_checksum(row_to_json(t)::text)), 0) from restored as t', restore_rows.member, v_writable, v_values, v_columns)
       into v_count, v_checksum using restore_rows.rows, restore_rows.run_id;
    update archives as a
       set restored_rows = a.restored_rows || jsonb_build_object(restore_rows.member, jsonb_build_object(
               'rows', coalesce((a.restored_rows -> restore_rows.member ->> 'rows')::bigint, 0) + v_count,
               'checksum', coalesce((a.restored_rows -> restore_rows.member ->> 'checksum')::numeric, 0) + v_checksum))
     where a.run_id = v_archive.run_id;
    return v_count;
end;
$$;
comment on function pgharness.restore_rows(bigint, text, json) is
'Put rows of an archived run back into a table, an array of the objects that archive_rows() gave: ids and times as they were. Tables come in the order of the archive. Returns how many rows they were; finish_restore() checks that they are the ones that left. Raises PH002, PH003. Example: pgharness unarchive calls it; select pgharness.restore_rows(7, ''notes'', ''[]'');';

create or replace function pgharness.finish_restore(run_id bigint) returns pgharness.archives
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_archive archives;
    v_member  record;
begin
    select a.* into v_archive from archives as a where a.run_id = finish_restore.run_id for update;
    if not found then
        raise exception 'run % was never archived', finish_restore.run_id
            using errcode = 'PH003', hint = 'See what is: select * from pgharness.archived_runs;';
    elsif v_archive.restored_at is not null then
        return v_archive;
    end if;
    for v_member in
        select m.value ->> 'name' as name, (m.value ->> 'rows')::bigint as row_count, coalesce((back.value ->> 'rows')::bigint, 0) as back_count,
               -- a migration that changed a column since changed its text as well
               (m.value ->> 'checksum')::numeric = coalesce((back.value ->> 'checksum')::numeric, 0)
               or exists (select from _archived_columns(v_archive.content, m.value ->> 'name') as c where not c.is_same) as is_equal
          from jsonb_array_elements(v_archive.content -> 'members') as m
         cross join lateral (select v_archive.restored_rows -> (m.value ->> 'name') as value) as back
         where (m.value ->> 'is_detached')::boolean
    loop
        if v_member.row_count <> v_member.back_count or not v_member.is_equal then
            raise exception '% of run % that came back are not those that left', v_member.name, v_archive.run_id
                using errcode = 'PH004', detail = format('%s rows left, %s came back.', v_member.row_count, v_member.back_count),
                      hint = 'Roll back, and restore from another copy of the file.';
        end if;
    end loop;
    update runs as r set archived_at = null where r.id = v_archive.run_id;
    update archives as a set restored_at = clock(), restored_rows = '{}' where a.run_id = v_archive.run_id returning a.* into v_archive;
    insert into logs (run_id, message, data)
    values (v_archive.run_id, 'restored', jsonb_build_object('by', session_user, 'file', v_archive.file_name, 'digest', v_archive.digest));
    return v_archive;
end;
$$;
comment on function pgharness.finish_restore(bigint) is
'End the restoring of an archived run, in the transaction of begin_restore() and restore_rows(): when what came back is what left, row for row, the run is no longer archived. Idempotent. Raises PH003, PH004 (rows are missing or others). Example: select restored_at from pgharness.finish_restore(7);';

create or replace function pgharness._refuse_archived() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    raise exception 'run "%" is archived: its notes and grades are in %', old.name, (select a.file_name from archives as a where a.run_id = old.id)
        using errcode = 'PH003', hint = 'Bring them back first: pgharness unarchive FILE; or run it anew: ' || format('select pgharness.rerun(%s);', old.id);
end;
$$;
comment on function pgharness._refuse_archived() is 'Refuse to continue, retry or recount an archived run (PH003).';
create or replace trigger _010_refuse_archived
    before update of status, epoch, notes_succeeded, notes_failed, grades_succeeded, grades_failed, grades_skipped on pgharness.runs
    for each row when (old.archived_at is not null and new.archived_at is not null) execute function pgharness._refuse_archived();
