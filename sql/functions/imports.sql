-- Imports: files of cases, rubrics and models in batches; runs made elsewhere.

create or replace function pgharness._lock_imports() returns void
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select pg_advisory_xact_lock(hashtextextended('pgharness.import', 0)); $$;
comment on function pgharness._lock_imports() is
'Let one import in at a time, until its transaction ends: two imports of one file then make no duplicates.';

create or replace function pgharness.import_cases(rows jsonb, replace boolean default false)
    returns table (inserted bigint, updated bigint, unchanged bigint, problems jsonb)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    perform _lock_imports();
    insert into datasets (name)
    select distinct r ->> 'dataset' from jsonb_array_elements(rows) as r where r ->> 'dataset' is not null
    on conflict on constraint datasets_name_key do nothing;
    return query
    with compared as materialized (
        select g.*, c.id as case_id, used.run,
               array_remove(array[case when c.input <> g.input then 'input' end, case when c.target is distinct from g.target then 'target' end,
                                  case when c.metadata <> g.metadata then 'metadata' end,
                                  case when g.dataset <> coalesce(c.dataset, '') then 'dataset' end], null) as differs
          from jsonb_to_recordset(rows) as g (line bigint, name text, dataset text, input jsonb, target jsonb, metadata jsonb)
          left join cases as c on c.name = g.name
          left join lateral (
               select r.name as run from run_cases as rc join runs as r on r.id = rc.run_id where rc.case_id = c.id order by r.id limit 1) as used on true
    ), judged as materialized (
        select x.*, case
                   when x.case_id is null or cardinality(x.differs) = 0 then null
                   when x.run is not null and x.differs && '{input,target,metadata}'
                       then format('name: case "%s" exists with other %s, and run "%s" used it, so that is frozen; import it under another name',
                                   x.name, array_to_string(x.differs, ' and '), x.run)
                   when not import_cases.replace
                       then format('name: case "%s" exists with other %s; import it under another name, or replace what is there with --replace',
                                   x.name, array_to_string(x.differs, ' and '))
               end as problem
          from compared as x
    ), added as (
        insert into cases (name, dataset, input, target, metadata)
        select j.name, j.dataset, j.input, j.target, j.metadata from judged as j where j.case_id is null order by j.line
        returning 1
    ), changed as (
        update cases as c
           set input = j.input, target = j.target, metadata = j.metadata, dataset = coalesce(j.dataset, c.dataset)
          from judged as j where c.id = j.case_id and cardinality(j.differs) > 0 and j.problem is null
        returning 1
    )
    select (select count(*) from added), (select count(*) from changed), count(*) filter (where j.case_id is not null and cardinality(j.differs) = 0),
           coalesce(jsonb_agg(jsonb_build_object('line', j.line, 'problem', j.problem) order by j.line) filter (where j.problem is not null), '[]')
      from judged as j;
end;
$$;
comment on function pgharness.import_cases(jsonb, boolean) is
'Insert cases, each name once a call: an array of {line, name, dataset, input, target, metadata}; datasets are created as needed. A case that exists with the same content is unchanged; with other content it is a problem of its line, or updated when replace is set and no run froze it. The caller rolls back when there are problems. Idempotent. Example: select * from pgharness.import_cases(''[{"line": 1, "name": "c1", "input": "text", "metadata": {}}]'');';

create or replace function pgharness.import_rubrics(rows jsonb, replace boolean default false)
    returns table (inserted bigint, updated bigint, unchanged bigint, problems jsonb)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    perform _lock_imports();
    return query
    with compared as materialized (
        select g.*, c.id as case_id, m.id as generator_id, parent.id as parent_id, same.id as rubric_id,
               row_number() over (partition by g."case", g.author, g.criteria order by g.line) as place,
               (same.validation, same.comments) is distinct from (g.validation, coalesce(g.comments, same.comments)) as differs,
               case when c.id is null then format('case: case "%s" does not exist; import the cases first', g."case")
                    when _criteria_problem(g.criteria) is not null then 'criteria: ' || _criteria_problem(g.criteria)
                    when g.generator is not null and m.id is null then format('generator: model "%s" does not exist; import the models first', g.generator)
                    when g.parent is not null and parent.id is null
                        then format('parent: case "%s" has no rubric by "%s"; put the parent''s line before this one', g."case", g.parent)
               end as problem
          from jsonb_to_recordset(rows) as g (line bigint, "case" text, author text, validation text, validated_at timestamptz, criteria jsonb,
                                              comments text, generator text, parent text)
          left join cases as c on c.name = g."case"
          left join models as m on m.name = g.generator
          left join lateral (select r.id from rubrics as r where r.case_id = c.id and r.author = g.parent order by r.id desc limit 1) as parent on true
          left join lateral (select r.id, r.validation, r.comments from rubrics as r
                              where r.case_id = c.id and r.author = g.author and r.criteria = g.criteria order by r.id limit 1) as same on true
    ), added as (
        insert into rubrics (case_id, author, parent_id, validation, validated_at, criteria, comments, generator_id)
        select x.case_id, x.author, x.parent_id, x.validation, x.validated_at, x.criteria, coalesce(x.comments, ''), x.generator_id
          from compared as x where x.problem is null and x.rubric_id is null and x.place = 1 order by x.line
        returning 1
    ), changed as (
        update rubrics as r set validation = x.validation, validated_at = x.validated_at, comments = coalesce(x.comments, r.comments)
          from compared as x where r.id = x.rubric_id and x.problem is null and x.place = 1 and x.differs and import_rubrics.replace
        returning 1
    )
    select (select count(*) from added), (select count(*) from changed),
           count(*) filter (where x.problem is null) - (select count(*) from added) - (select count(*) from changed),
           coalesce(jsonb_agg(jsonb_build_object('line', x.line, 'problem', x.problem) order by x.line) filter (where x.problem is not null), '[]')
      from compared as x;
end;
$$;
comment on function pgharness.import_rubrics(jsonb, boolean) is
'Insert rubrics: an array of {line, case, author, validation, validated_at, criteria, comments, generator, parent}; parent names the author of the case''s rubric that it derives from. A rubric with the same case, author and criteria is unchanged, or takes the validation and comments given when replace is set. Problems are returned by line, and the caller rolls back. Idempotent. Example: select * from pgharness.import_rubrics(''[{"line": 1, "case": "c1", "author": "ann", "validation": "accepted", "criteria": [{"criterion": "names the dose", "weight": 10}]}]'');';

create or replace function pgharness.import_models(rows jsonb, replace boolean default false)
    returns table (inserted bigint, updated bigint, unchanged bigint, problems jsonb)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_row   jsonb;
    v_old   models;
    v_new   models;
    v_words text;
    v_hint  text;
begin
    perform _lock_imports();
    select 0, 0, 0, '[]' into inserted, updated, unchanged, problems;
    for v_row in select r from jsonb_array_elements(rows) as r loop
        select * into v_old from models as m where m.name = v_row ->> 'name';
        v_new := jsonb_populate_record(v_old, v_row - 'line');
        begin
            if v_old.id is null then
                insert into models (name, description, provider, model, base_url, api_key_env, parameters, is_reasoning, timeout_seconds,
                                    max_concurrency, requests_per_minute, tokens_per_minute,
                                    input_usd_per_million, output_usd_per_million, cached_input_usd_per_million)
                values (v_new.name, coalesce(v_new.description, ''), v_new.provider, coalesce(v_new.model, ''), v_new.base_url, v_new.api_key_env,
                        coalesce(v_new.parameters, '{}'), coalesce(v_new.is_reasoning, false), coalesce(v_new.timeout_seconds, 120),
                        v_new.max_concurrency, v_new.requests_per_minute, v_new.tokens_per_minute,
                        v_new.input_usd_per_million, v_new.output_usd_per_million, v_new.cached_input_usd_per_million);
                inserted := inserted + 1;
            elsif v_new is not distinct from v_old then
                unchanged := unchanged + 1;
            elsif not import_models.replace then
                raise exception 'name: model "%" exists with other values', v_old.name
                    using errcode = 'PH004', hint = 'import it under another name, or replace what is there with --replace';
            else
                update models as m
                   set description = v_new.description, provider = v_new.provider, model = v_new.model, base_url = v_new.base_url,
                       api_key_env = v_new.api_key_env, parameters = v_new.parameters, is_reasoning = v_new.is_reasoning,
                       timeout_seconds = v_new.timeout_seconds, max_concurrency = v_new.max_concurrency,
                       requests_per_minute = v_new.requests_per_minute, tokens_per_minute = v_new.tokens_per_minute,
                       input_usd_per_million = v_new.input_usd_per_million, output_usd_per_million = v_new.output_usd_per_million,
                       cached_input_usd_per_million = v_new.cached_input_usd_per_million
                 where m.id = v_old.id;
                updated := updated + 1;
            end if;
        exception when others then
            get stacked diagnostics v_words = message_text, v_hint = pg_exception_hint;
            problems := problems || jsonb_build_object('line', v_row -> 'line', 'problem', concat_ws('; ', v_words, nullif(v_hint, '')));
        end;
    end loop;
    return next;
end;
$$;
comment on function pgharness.import_models(jsonb, boolean) is
'Insert models: an array of objects with a line and columns of table models. A model that exists with the values given is unchanged; with others it is a problem of its line, or updated when replace is set. Problems are returned by line, and the caller rolls back. Idempotent. Example: select * from pgharness.import_models(''[{"line": 1, "name": "m", "provider": "simulator"}]'');';

-- Runs made elsewhere: finished history, with the same rows as a run made here.

create or replace function pgharness._import_definition(run_id bigint, instance pgharness.instances, run jsonb) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    insert into run_cases (run_id, number, case_id, digest)
    select _import_definition.run_id, k.number - 1, c.id, c.digest from jsonb_array_elements_text(run -> 'cases') with ordinality as k (id, number) join cases as c on c.id = k.id::bigint;
    insert into run_combinations (run_id, number, name, combination_id, generator_id, generator, grader_id, grader, rubric_count, grade_replications)
    select _import_definition.run_id, k.number - 1, k.value ->> 'name', (k.value ->> 'combination_id')::bigint,
           g.id, _frozen_model(g, '{}', null) || jsonb_strip_nulls(jsonb_build_object('model', k.value -> 'generator_model')),
           j.id, _frozen_model(j, '{}', (k.value ->> 'grader_is_reasoning')::boolean) || jsonb_strip_nulls(jsonb_build_object('model', k.value -> 'grader_model')),
           case when j.id is null then 0 else (run ->> 'rubric_count')::integer end,
           case when j.id is null then 0 else (run ->> 'grade_replications')::integer end
      from jsonb_array_elements(run -> 'combinations') with ordinality as k (value, number)
      join models as g on g.id = (k.value ->> 'generator_id')::bigint
      left join models as j on j.id = (k.value ->> 'grader_id')::bigint;
    if (select count(*) from run_cases as c where c.run_id = _import_definition.run_id) <> jsonb_array_length(run -> 'cases')
       or (select count(*) from run_combinations as c where c.run_id = _import_definition.run_id) <> jsonb_array_length(run -> 'combinations') then
        raise exception 'run "%" names a case or a model that does not exist', run ->> 'key'
            using errcode = 'PH001', hint = 'Import cases and models first; name them by their ids.';
    end if;
    insert into run_definitions (run_id, definition, case_count, combination_count, transcript_overlaps, grade_stride)
    select _import_definition.run_id,
           to_jsonb(instance) - '{id,project_id,experiment_id,created_at,budget_usd,total_budget_usd,note_system_prompt,note_prompt,grade_system_prompt,grade_prompt}'::text[]
           || jsonb_build_object('prompts', '{}'::jsonb) || run
              - '{instance,key,created_at,finished_at,cases,combinations,rubrics,overlaps}'::text[],
           jsonb_array_length(run -> 'cases'), count(*), array(select o::integer from jsonb_array_elements_text(run -> 'overlaps') as o),
           greatest(max(c.grades_per_note), 1)
      from run_combinations as c where c.run_id = _import_definition.run_id;
    if exists (select from jsonb_to_recordset(run -> 'rubrics') as rr (case_number integer, rubric_id bigint)
                where rr.case_number not between 0 and jsonb_array_length(run -> 'cases') - 1
                   or not exists (select from rubrics as x where x.id = rr.rubric_id)) then
        raise exception 'run "%" names a rubric that does not exist, or one of a case that it does not have', run ->> 'key'
            using errcode = 'PH001', hint = 'Import rubrics first; name them by their ids, and their cases by their places in "cases", from 0.';
    end if;
    insert into run_rubrics (run_id, case_number, number, rubric_id)
    select _import_definition.run_id, rr.case_number, rr.number, rr.rubric_id
      from jsonb_to_recordset(run -> 'rubrics') as rr (case_number integer, number integer, rubric_id bigint);
    update runs as r
       set note_count = plan.places * d.combination_count, grade_count = plan.places * plan.grades_per_note
      from run_definitions as d
     cross join lateral (
           select d.case_count::bigint * cardinality(d.transcript_overlaps) * (d.definition ->> 'note_replications')::integer as places,
                  (select sum(c.grades_per_note) from run_combinations as c where c.run_id = d.run_id) as grades_per_note) as plan
     where d.run_id = r.id and r.id = _import_definition.run_id;
end;
$$;
comment on function pgharness._import_definition(bigint, pgharness.instances, jsonb) is
'Write what an imported run used (cases, combinations, rubrics), and count its plan.';

create or replace function pgharness.import_run(run jsonb) returns table (run_id bigint, outcome text)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_instance instances;
    v_old      record;
    v_missing  text;
    v_id       bigint;
begin
    perform _lock_imports();
    select k into v_missing
      from unnest('{key,instance,imported,created_at,finished_at,note_replications,grade_replications,rubric_count,overlaps,cases,combinations,rubrics}'::text[]) as k
     where run ->> k is null limit 1;
    if v_missing is not null then
        raise exception 'the run to import does not say its "%"', v_missing
            using errcode = 'PH002', hint = 'See what it needs: select obj_description(''pgharness.import_run(jsonb)''::regprocedure);';
    end if;
    select * into strict v_instance from instances as i where i.id = _instance_id(run ->> 'instance');
    select r.id, r.name, d.definition -> 'imported' as imported into v_old
      from runs as r join run_definitions as d on d.run_id = r.id where r.idempotency_key = run ->> 'key';
    if v_old.imported = run -> 'imported' then
        return query select v_old.id, 'unchanged';
        return;
    elsif v_old.id is not null and v_old.imported is null then
        raise exception 'run "%" was not imported, and has the key "%"', v_old.name, run ->> 'key'
            using errcode = 'PH004', hint = 'Give the run to import another key.';
    end if;
    delete from runs as r where r.id = v_old.id;        -- its source has changed since: made anew under the same id and name
    v_id := coalesce(v_old.id, nextval(pg_get_serial_sequence('pgharness.runs', 'id')));
    insert into runs (id, name, instance_id, instance, status, reason, idempotency_key, active_seconds, created_at, finished_at)
    overriding system value
    values (v_id, coalesce(v_old.name, v_instance.name || '/' || (
                select coalesce(max(substring(r.name from '/(\d{1,9})$')::integer), 0) + 1 from runs as r where starts_with(r.name, v_instance.name || '/'))),
            v_instance.id, v_instance.name, 'cancelled', 'its import was not finished', run ->> 'key',
            extract(epoch from (run ->> 'finished_at')::timestamptz - (run ->> 'created_at')::timestamptz),
            (run ->> 'created_at')::timestamptz, (run ->> 'finished_at')::timestamptz);
    perform _import_definition(v_id, v_instance, run);
    insert into logs (run_id, message, data) values (v_id, 'imported', run -> 'imported');
    return query select v_id, case when v_old.id is null then 'inserted' else 'updated' end;
end;
$$;
comment on function pgharness.import_run(jsonb) is
'Add a run made elsewhere, finished and without jobs: {key, instance, created_at, finished_at, imported, note_replications, grade_replications, rubric_count, software_version, overlaps, cases: [id], combinations: [{name, combination_id, generator_id, generator_model, grader_id, grader_model, grader_is_reasoning}], rubrics: [{case_number, number, rubric_id}]}. Its notes and grades follow through import_run_items(), then finish_imported_run() ends it. A run with the same key and the same `imported` is unchanged; with another, made anew under its id. Nothing continues or reruns an imported run. Raises PH001, PH002, PH004 (the key is another run''s). Example: select * from pgharness.import_run(''{"key": "old system, 1", "instance": "triage-v2", "imported": {"system": "old system"}, "created_at": "2025-01-31T12:00:00Z", "finished_at": "2025-01-31T13:00:00Z", "note_replications": 1, "grade_replications": 1, "rubric_count": 0, "overlaps": [100], "cases": [1], "combinations": [{"name": "a", "generator_id": 1}], "rubrics": []}'');';

create or replace function pgharness.import_run_items(run_id bigint, notes jsonb, grades jsonb, failures jsonb, calls jsonb) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_definition run_definitions;
    v_notes      bigint;
    v_grades     bigint;
begin
    select * into v_definition from run_definitions as d where d.run_id = import_run_items.run_id and d.definition ? 'imported';
    if not found then
        raise exception 'run % was not imported', import_run_items.run_id
            using errcode = 'PH003', hint = 'Make the run first: select * from pgharness.import_run(...);';
    end if;
    insert into notes (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output, created_at)
    select v_definition.run_id, n.ordinal, place.case_number, place.combination_number, place.overlap, place.replication, n.attempts, n.output, n.created_at
      from jsonb_to_recordset(import_run_items.notes) as n (ordinal bigint, attempts integer, output jsonb, created_at timestamptz)
     cross join lateral _note_place(v_definition, n.ordinal) as place
     where n.ordinal between 0 and (select r.note_count - 1 from runs as r where r.id = v_definition.run_id);
    get diagnostics v_notes = row_count;
    insert into grades (run_id, note_ordinal, rubric_number, replication, ordinal, rubric_id, attempts, score, max_score, criteria, created_at)
    select v_definition.run_id, n.ordinal, place.rubric_number, place.replication, g.ordinal, rr.rubric_id, 1, g.score, g.max_score, g.criteria, g.created_at
      from jsonb_to_recordset(import_run_items.grades) as g (ordinal bigint, score numeric, max_score numeric, criteria jsonb, created_at timestamptz)
      join notes as n on n.run_id = v_definition.run_id and n.ordinal = g.ordinal / v_definition.grade_stride
      join run_combinations as c on c.run_id = n.run_id and c.number = n.combination_number
     cross join lateral _grade_place(c, (g.ordinal % v_definition.grade_stride)::integer) as place
      left join run_rubrics as rr on rr.run_id = n.run_id and rr.case_number = n.case_number and rr.number = place.rubric_number
     where g.ordinal % v_definition.grade_stride < c.grades_per_note;
    get diagnostics v_grades = row_count;
    if (v_notes, v_grades) <> (jsonb_array_length(import_run_items.notes), jsonb_array_length(import_run_items.grades)) then
        raise exception 'run % has no place for % of these notes and % of these grades', v_definition.run_id,
                        jsonb_array_length(import_run_items.notes) - v_notes, jsonb_array_length(import_run_items.grades) - v_grades
            using errcode = 'PH002', hint = 'A note''s ordinal is below the run''s note_count; a grade''s is its note''s ordinal * grade_stride + its place, and its note has to be there.';
    end if;
    insert into failures (run_id, kind, ordinal, status, attempts, cause, error, answer, updated_at)
    select v_definition.run_id, f.kind, f.ordinal, 'failed', f.attempts, f.cause, f.error, f.answer, f.updated_at
      from jsonb_to_recordset(import_run_items.failures) as f (kind text, ordinal bigint, attempts integer, cause text, error text, answer text, updated_at timestamptz);
    insert into calls (run_id, kind, ordinal, attempt, model_id, outcome, error, answer, request_id, input_tokens, output_tokens, latency_ms, started_at)
    select v_definition.run_id, k.kind, k.ordinal, k.attempt, k.model_id, k.outcome, k.error, k.answer, k.request_id,
           coalesce(k.input_tokens, 0), coalesce(k.output_tokens, 0), k.latency_ms, k.started_at
      from jsonb_to_recordset(import_run_items.calls) as k (kind text, ordinal bigint, attempt integer, model_id bigint, outcome text, error text, answer text,
                                                            request_id text, input_tokens integer, output_tokens integer, latency_ms double precision, started_at timestamptz);
    update runs as r
       set notes_succeeded = r.notes_succeeded + jsonb_array_length(import_run_items.notes),
           grades_succeeded = r.grades_succeeded + jsonb_array_length(import_run_items.grades),
           notes_failed = r.notes_failed + failed.notes, grades_failed = r.grades_failed + failed.grades, grades_skipped = r.grades_skipped + failed.skipped,
           settled_notes = 0, reopenings = r.reopenings + 1
      from (select count(*) filter (where f.kind = 'note') as notes, count(*) filter (where f.kind = 'grade') as grades,
                   coalesce(sum(c.grades_per_note) filter (where f.kind = 'note'), 0) as skipped
              from jsonb_to_recordset(import_run_items.failures) as f (kind text, ordinal bigint)
              left join run_combinations as c on c.run_id = v_definition.run_id and c.number = f.ordinal % v_definition.combination_count) as failed
     where r.id = v_definition.run_id;
end;
$$;
comment on function pgharness.import_run_items(bigint, jsonb, jsonb, jsonb, jsonb) is
'Add notes, grades, failures and calls to an imported run, by ordinal, with the times at which they were made; its counters follow. An ordinal that is taken or not in its plan is refused. Raises PH002, PH003. Example: select pgharness.import_run_items(7, ''[{"ordinal": 0, "attempts": 1, "output": "text", "created_at": "2025-01-31T12:00:00Z"}]'', ''[]'', ''[]'', ''[]'');';

create or replace function pgharness.finish_imported_run(run_id bigint) returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run    runs := _lock_run(finish_imported_run.run_id);
    v_notes  bigint := v_run.note_count - v_run.notes_succeeded - v_run.notes_failed;
    v_grades bigint := v_run.grade_count - v_run.grades_succeeded - v_run.grades_failed - v_run.grades_skipped;
begin
    if not exists (select from run_definitions as d where d.run_id = v_run.id and d.definition ? 'imported') then
        raise exception 'run % was not imported', v_run.id using errcode = 'PH003', hint = 'Runs made here end by themselves.';
    end if;
    update runs as r
       set status = case when v_notes + v_grades = 0 then 'completed' else 'cancelled' end,
           reason = case when v_notes + v_grades > 0 then format('%s of its notes and %s of its grades were never made', v_notes, v_grades) end
     where r.id = v_run.id;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.finish_imported_run(bigint) is
'End an imported run when its items are in: completed, or cancelled with how much of its plan was never made. Idempotent. Raises PH001, PH003. Example: select pgharness.finish_imported_run(7);';

create or replace function pgharness._note_ordinal(
    definition pgharness.run_definitions, case_number integer, combination_number integer, overlap integer, replication integer
) returns bigint
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$
    select (((replication - 1)::bigint * cardinality((definition).transcript_overlaps) + array_position((definition).transcript_overlaps, overlap) - 1)
            * (definition).case_count + case_number) * (definition).combination_count + combination_number;
$$;
comment on function pgharness._note_ordinal(pgharness.run_definitions, integer, integer, integer, integer) is
'The ordinal of a note''s case, combination, overlap and replication: what _note_place() turns back.';

create or replace function pgharness._refuse_imported() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run runs;
begin
    select r.* into v_run from runs as r join run_definitions as d on d.run_id = r.id
     where r.id = case when tg_op = 'INSERT' then new.rerun_of_id else new.id end and d.definition ? 'imported';
    if found then
        raise exception 'run "%" was imported: its prompts are not known here, so it cannot be run on', v_run.name
            using errcode = 'PH003', hint = format('Start a new run of its instance: select pgharness.start_run(%L);', v_run.instance);
    end if;
    return new;
end;
$$;
comment on function pgharness._refuse_imported() is 'Refuse to continue or rerun an imported run (PH003).';
create or replace trigger _050_refuse_rerun before insert on pgharness.runs
    for each row when (new.rerun_of_id is not null) execute function pgharness._refuse_imported();
create or replace trigger _050_refuse_continuation before update of status on pgharness.runs
    for each row when (new.status = 'running' and old.finished_at is not null) execute function pgharness._refuse_imported();
