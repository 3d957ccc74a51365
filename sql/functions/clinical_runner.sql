-- The clinical experiment runner: its rows are staged as JSON in temporary tables, then imported whole, set by set.
-- Steps return what they did: what, outcome (inserted, updated, unchanged, left out, refused, remark), how many, and why.

create or replace function pgharness.stage_clinical_rows(source_table text, rows jsonb) returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp set client_min_messages = warning
as $$
declare
    v_count bigint;
begin
    create temp table if not exists clinical_rows (source_table text, id bigint, data jsonb not null, primary key (source_table, id)) on commit drop;
    create temp table if not exists clinical_ids (kind text, source_id bigint, id bigint not null, primary key (kind, source_id)) on commit drop;
    create temp table if not exists clinical_combinations (
        experiment_id bigint, number integer, combination_id bigint, name text not null, generator text not null, grader text,
        is_reasoning boolean, primary key (experiment_id, number)) on commit drop;
    create temp table if not exists clinical_results (
        id bigint primary key, experiment_id bigint, part integer, case_id bigint, overlap integer, has_note boolean, generator text, grader text,
        is_reasoning boolean, replications integer, created_at timestamptz, updated_at timestamptz) on commit drop;
    create temp table if not exists clinical_places (
        result_id bigint primary key, combination integer not null, role text not null, block integer not null, replication integer not null) on commit drop;
    create temp table if not exists clinical_grades (
        id bigint primary key, result_id bigint not null, rubric_id bigint, grader text, created_at timestamptz) on commit drop;
    insert into clinical_rows select stage_clinical_rows.source_table, (r ->> 'id')::bigint, r from jsonb_array_elements(rows) as r;
    get diagnostics v_count = row_count;
    return v_count;
end;
$$;
comment on function pgharness.stage_clinical_rows(text, jsonb) is
'Lay rows of a table of the clinical experiment runner ready for import_clinical_runner(), in this transaction; returns their number. Example: select pgharness.stage_clinical_rows(''case'', ''[{"id": 1, "name": "c1"}]'');';

create or replace function pgharness.import_clinical_runner() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp set timezone = 'UTC' set jit = off
as $$
begin
    -- its timestamps have no zone, and are meant as UTC; no plan over staged JSON is estimated well enough to be worth compiling
    perform _lock_imports();
    analyze clinical_rows;
    return query select * from _import_clinical_models();
    return query select * from _import_clinical_cases();
    analyze clinical_ids;
    return query select * from _import_clinical_rubrics();
    return query select * from _import_clinical_experiments();
    return query select * from _import_clinical_results();
    drop table clinical_rows, clinical_ids, clinical_combinations, clinical_results, clinical_places, clinical_grades;
end;
$$;
comment on function pgharness.import_clinical_runner() is
'Import the clinical experiment runner''s rows that were staged in this transaction: cases, rubrics, models, experiments as instances, their results and grades as finished runs. Returns what became of them, by outcome: inserted, updated, unchanged, left out (with the reason), refused (roll back), or a remark. Idempotent. Example: select * from pgharness.import_clinical_runner();';

create or replace function pgharness._clinical_model(vendor text, model text) returns text
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce(nullif(lower(btrim(vendor)), ''), 'unknown') || '/' || coalesce(nullif(regexp_replace(btrim(model), '^models/', ''), ''), 'default');
$$;
comment on function pgharness._clinical_model(text, text) is 'What a vendor''s model is called here; "default" stands for the one that the program chooses.';

create or replace function pgharness._clinical_model_id(name text) returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_vendor text := split_part(name, '/', 1);
    v_known  text := case v_vendor when 'google' then 'gemini' else v_vendor end;
    v_word   text := coalesce(nullif(btrim(regexp_replace(v_known, '[^a-z0-9]+', '_', 'g'), '_0123456789'), ''), 'model');
    v_id     bigint;
begin
    select m.id into v_id from models as m where m.name = _clinical_model_id.name;
    if v_id is null and v_known in ('openai', 'anthropic', 'gemini') then
        insert into models (name, provider, model, api_key_env)
        values (_clinical_model_id.name, v_known, regexp_replace(_clinical_model_id.name, '^[^/]*/', ''), upper(v_word) || '_API_KEY')
        returning id into v_id;
    elsif v_id is null then
        insert into models (name, provider, model, base_url, api_key_env)
        values (_clinical_model_id.name, 'openai_compatible', regexp_replace(_clinical_model_id.name, '^[^/]*/', ''),
                'https://' || replace(v_word, '_', '-') || '.invalid/v1', upper(v_word) || '_API_KEY')
        returning id into v_id;
    end if;
    return v_id;
end;
$$;
comment on function pgharness._clinical_model_id(text) is
'The id of a model by the name that _clinical_model() gives it; makes it when it is new, with the vendor''s usual key variable.';

create or replace function pgharness._import_clinical_models() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_known bigint := (select max(m.id) from models as m);
begin
    insert into clinical_ids
    select 'model', r.id, _clinical_model_id(_clinical_model(r.data ->> 'vendor', r.data ->> 'model'))
      from clinical_rows as r where r.source_table = 'model' order by r.id;
    return query
    with imported as (
        select m.*, m.id > coalesce(v_known, 0) and row_number() over (partition by m.id order by i.source_id) = 1 as is_new
          from clinical_ids as i join models as m on m.id = i.id where i.kind = 'model'
    )
    select 'models', 'inserted', count(*) filter (where m.is_new), null from imported as m
    union all
    select 'models', 'unchanged', count(*) filter (where not m.is_new), null from imported as m
    union all
    select 'models', 'remark', count(*), format('their keys were left behind; workers find keys in %s', string_agg(distinct m.api_key_env, ', ')) from imported as m having count(*) > 0
    union all
    select 'models', 'remark', 1, format('model "%s" stands for the one that the program chose: set its model before starting a run with it', m.name)
      from imported as m where m.is_new and m.model = 'default'
    union all
    select 'models', 'remark', 1, format('model "%s" has a vendor that is not known here: set its base_url before starting a run with it', m.name)
      from imported as m where m.is_new and m.base_url like '%.invalid/v1';
end;
$$;
comment on function pgharness._import_clinical_models() is 'Import the models, without their keys; rows that differ by their key alone become one.';

create or replace function pgharness._clinical_input(data jsonb) returns jsonb
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select jsonb_build_object('chart', data -> 'limited_chart', 'profile', coalesce(data -> 'profile', '""'), 'transcript', case jsonb_typeof(data -> 'transcript')
        when 'object' then (
            -- turns by cycle: one list, in the order of the cycles, each turn with its cycle when there are several
            select coalesce(jsonb_agg(case when jsonb_typeof(turn.value) = 'object' and cycle.count > 1 then turn.value || jsonb_build_object('cycle', cycle.name) else turn.value end
                                      order by length(cycle.name), cycle.name, turn.number), '[]')
              from (select c.key as name, c.value as turns, count(*) over () as count from jsonb_each(data -> 'transcript') as c) as cycle
             cross join lateral jsonb_array_elements(case jsonb_typeof(cycle.turns) when 'array' then cycle.turns else jsonb_build_array(cycle.turns) end)
                   with ordinality as turn (value, number))
        when 'null' then '[]'::jsonb
        else coalesce(data -> 'transcript', '[]') end);
$$;
comment on function pgharness._clinical_input(jsonb) is 'A clinical case as an input: transcript (its cycles in one list), chart and profile.';

create or replace function pgharness._match_clinical_cases() returns void
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    -- the same case whatever its name is here now; else one of the same name
    insert into clinical_ids
    select distinct on (r.id) 'case', r.id, c.id
      from clinical_rows as r
      join cases as c on c.metadata #>> '{provenance,case_id}' = r.data ->> 'id' and c.metadata #>> '{provenance,created}' = r.data ->> 'created'
     where r.source_table = 'case' order by r.id, c.id
    on conflict do nothing;
    insert into clinical_ids
    select 'case', r.id, c.id from clinical_rows as r join cases as c on c.name = coalesce(nullif(r.data ->> 'name', ''), 'case ' || r.id) where r.source_table = 'case'
    on conflict do nothing;
$$;
comment on function pgharness._match_clinical_cases() is 'Find which staged cases are here already.';

create or replace function pgharness._import_clinical_cases() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    perform _match_clinical_cases();
    return query
    with side as (
        select (r.data ->> 'case_id')::bigint as case_id, jsonb_object_agg(
                   case r.source_table when 'real_world_case' then 'real_world' when 'synthetic_case' then 'synthetic' else coalesce(r.data ->> 'author', 'unknown') end,
                   r.data - '{id,case_id,created,updated,author}'::text[]) as facts
          from clinical_rows as r where r.source_table in ('real_world_case', 'synthetic_case', 'case_provenance') group by 1
    ), given as (
        select r.id as source_id, coalesce(nullif(r.data ->> 'name', ''), 'case ' || r.id) as name, _clinical_input(r.data) as input,
               jsonb_build_object('status', r.data -> 'validation_status', 'batch', r.data -> 'batch_identifier', 'tags', r.data -> 'tags',
                                  'provenance', coalesce(s.facts, '{}') || jsonb_build_object('system', 'clinical_runner', 'case_id', r.id, 'created', r.data -> 'created')) as metadata,
               (r.data ->> 'created')::timestamptz as created_at
          from clinical_rows as r left join side as s on s.case_id = r.id where r.source_table = 'case'
    ), judged as materialized (
        select g.*, c.id as case_id,
               case when c.id is null then 'inserted'
                    when c.metadata #> '{provenance,case_id}' is distinct from to_jsonb(g.source_id) then case when c.input = g.input then 'unchanged' else 'refused' end
                    when c.input = g.input then case when c.metadata || g.metadata = c.metadata then 'unchanged' else 'updated' end
                    when exists (select from run_cases as rc where rc.case_id = c.id) then 'frozen'
                    else 'updated' end as fate
          from given as g
          left join clinical_ids as i on i.kind = 'case' and i.source_id = g.source_id
          left join cases as c on c.id = i.id
    ), added as (
        insert into cases (name, input, metadata, created_at)
        select j.name, j.input, j.metadata, coalesce(j.created_at, clock()) from judged as j where j.fate = 'inserted' order by j.source_id
    ), changed as (
        update cases as c set input = j.input, metadata = c.metadata || j.metadata from judged as j where c.id = j.case_id and j.fate = 'updated'
    )
    select 'cases', case j.fate when 'frozen' then 'unchanged' else j.fate end, count(*),
           case when j.fate = 'refused' then format('case "%s" exists here with another input: rename it first (update pgharness.cases set name = ...)', min(j.name)) end
      from judged as j group by j.fate, case when j.fate = 'refused' then j.source_id end
    union all
    select 'cases', 'remark', count(*), format('changed in the source after a run used them, so they keep the input they had: %s', string_agg(j.name, ', ' order by j.source_id))
      from judged as j where j.fate = 'frozen' having count(*) > 0;
    perform _match_clinical_cases();
end;
$$;
comment on function pgharness._import_clinical_cases() is
'Import the cases with their status, batch, tags and provenance as metadata. A case of the same name that was not imported and has another input is refused.';

create or replace function pgharness._clinical_rubrics() returns table (
    source_id bigint, case_id bigint, author text, generator text, validation text, validated_at timestamptz, criteria jsonb, problem text, comments text,
    parent_source_id bigint, created_at timestamptz, place bigint)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select r.id, c.id, who.author, case when lower(who.author) = 'llm' and said.vendor <> '' then _clinical_model(said.vendor, r.data ->> 'text_llm_name') end,
           said.validation, case when said.validation <> 'not_evaluated' then coalesce(r.data ->> 'validation_timestamp', r.data ->> 'updated', r.data ->> 'created')::timestamptz end,
           rubric.criteria, case when c.id is null then 'its case is not there' else _criteria_problem(rubric.criteria) end,
           coalesce(r.data ->> 'comments', ''), (r.data ->> 'parent_rubric_id')::bigint, coalesce((r.data ->> 'created')::timestamptz, 'epoch'),
           row_number() over (partition by c.id, who.author, md5(rubric.criteria::text), r.data ->> 'created' order by r.id)
      from clinical_rows as r
      left join clinical_ids as c on c.kind = 'case' and c.source_id = (r.data ->> 'case_id')::bigint
     -- without an author nobody vouches for it: like a generated one, it makes no case eligible
     cross join lateral (select coalesce(nullif(btrim(r.data ->> 'author'), ''), 'llm') as author) as who
     cross join lateral (select case when r.data ->> 'validation' in ('accepted', 'refused') then r.data ->> 'validation' else 'not_evaluated' end as validation,
                                coalesce(btrim(r.data ->> 'text_llm_vendor'), '') as vendor) as said
     cross join lateral (
           select case when jsonb_typeof(r.data -> 'rubric') <> 'array' then r.data -> 'rubric' else (
                      select coalesce(jsonb_agg(case when jsonb_typeof(k.value) = 'object' and k.value ->> 'weight' ~ '^\s*\d+(\.\d+)?\s*$'
                                                     then jsonb_set(k.value, '{weight}', to_jsonb((k.value ->> 'weight')::numeric)) else k.value end order by k.number), '[]')
                        from jsonb_array_elements(r.data -> 'rubric') with ordinality as k (value, number)) end as criteria) as rubric
     where r.source_table = 'rubric';
$$;
comment on function pgharness._clinical_rubrics() is
'The staged rubrics as they would be here: weights as numbers, "llm" for those without an author, and what keeps one out.';

create or replace function pgharness._match_clinical_rubrics() returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_count bigint;
begin
    insert into clinical_ids
    select 'rubric', s.source_id, r.id
      from _clinical_rubrics() as s
      join (select r.id, r.case_id, r.author, r.criteria, r.created_at,
                   row_number() over (partition by r.case_id, r.author, md5(r.criteria::text), r.created_at order by r.id) as place
              from rubrics as r where r.case_id in (select c.id from clinical_ids as c where c.kind = 'case')) as r
        on (r.case_id, r.author, r.created_at, r.place) = (s.case_id, s.author, s.created_at, s.place) and r.criteria = s.criteria
     where s.problem is null and not exists (select from clinical_ids as i where i.kind = 'rubric' and i.source_id = s.source_id);
    get diagnostics v_count = row_count;
    return v_count;
end;
$$;
comment on function pgharness._match_clinical_rubrics() is
'Find which staged rubrics are here already: the same case, author, criteria and time, one for one; returns how many it found.';

create or replace function pgharness._import_clinical_rubrics() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_known   bigint := _match_clinical_rubrics();
    v_added   bigint;
    v_changed bigint;
begin
    insert into rubrics (case_id, author, generator_id, validation, validated_at, criteria, comments, created_at)
    select s.case_id, s.author, case when s.generator is not null then _clinical_model_id(s.generator) end, s.validation, s.validated_at, s.criteria, s.comments, s.created_at
      from _clinical_rubrics() as s
     where s.problem is null and not exists (select from clinical_ids as i where i.kind = 'rubric' and i.source_id = s.source_id)
     order by s.source_id;
    v_added := _match_clinical_rubrics();
    update rubrics as r set validation = s.validation, validated_at = s.validated_at
      from _clinical_rubrics() as s join clinical_ids as i on i.kind = 'rubric' and i.source_id = s.source_id
     where r.id = i.id and s.validated_at > coalesce(r.validated_at, '-infinity');
    get diagnostics v_changed = row_count;
    update rubrics as r set parent_id = p.id
      from _clinical_rubrics() as s
      join clinical_ids as i on i.kind = 'rubric' and i.source_id = s.source_id
      join clinical_ids as pi on pi.kind = 'rubric' and pi.source_id = s.parent_source_id
      join rubrics as p on p.id = pi.id and p.id <> i.id
     where r.id = i.id and r.case_id = p.case_id and r.parent_id is distinct from p.id;
    return query
    with given as (
        select s.*, i.id as rubric_id, r.parent_id, src.data
          from _clinical_rubrics() as s
          join clinical_rows as src on src.source_table = 'rubric' and src.id = s.source_id
          left join clinical_ids as i on i.kind = 'rubric' and i.source_id = s.source_id
          left join rubrics as r on r.id = i.id
    )
    select 'rubrics', 'inserted', v_added, null
    union all select 'rubrics', 'updated', v_changed, null
    union all select 'rubrics', 'unchanged', v_known - v_changed, null
    union all select 'rubrics', 'left out', count(*), g.problem || ' (rubric ' || string_agg(g.source_id::text, ', ' order by g.source_id) || ' of the source)'
      from given as g where g.problem is not null group by g.problem
    union all select 'rubrics', 'remark', count(*), 'without an author: imported as by "llm", so they make no case eligible'
      from given as g where g.problem is null and coalesce(btrim(g.data ->> 'author'), '') = '' having count(*) > 0
    union all select 'rubrics', 'remark', count(*), 'derive from a rubric that is of another case or left out: imported without their parent'
      from given as g where g.rubric_id is not null and g.parent_source_id is not null and g.parent_id is null having count(*) > 0
    union all select 'rubrics', 'remark', count(*), 'their case_provenance_classification and temperature stay in the source'
      from given as g where coalesce(g.data ->> 'case_provenance_classification', '') <> '' or (g.data ->> 'temperature')::numeric <> 0 having count(*) > 0;
end;
$$;
comment on function pgharness._import_clinical_rubrics() is
'Import the rubrics with authors, parents and validation; one that is here already takes over a newer validation.';

create or replace function pgharness._clinical_integers(list jsonb) returns integer[]
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce(array_agg(n.value order by n.place), '{}')
      from (select round((e.value #>> '{}')::numeric)::integer as value, min(e.place) as place
              from jsonb_array_elements(case jsonb_typeof(list) when 'array' then list else '[]' end) with ordinality as e (value, place)
             where e.value #>> '{}' ~ '^\d{1,6}(\.\d+)?$' group by 1) as n;
$$;
comment on function pgharness._clinical_integers(jsonb) is 'The different whole numbers of a JSON array, in its order.';

create or replace function pgharness._import_clinical_experiments() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_row   record;
    v_known bigint := coalesce((select max(i.id) from instances as i), 0);
    v_cases bigint;
    v_combinations bigint;
begin
    insert into experiments (name, description, note_system_prompt, note_prompt, grade_system_prompt, grade_prompt)
    select 'clinical_runner', 'Experiments of the clinical experiment runner, imported.', e.note_system_prompt, e.note_prompt, e.grade_system_prompt, e.grade_prompt
      from experiments as e where e.name = 'note_grade' and exists (select from clinical_rows as r where r.source_table = 'experiment')
    on conflict on constraint experiments_name_key do nothing;
    for v_row in
        select r.id, r.data ->> 'name' as name, r.data, i.id as instance_id, taken.id as taken_id, source.key,
               case when (r.data ->> 'note_replications')::integer not between 1 and 10000 then 'note_replications is ' || (r.data ->> 'note_replications')
                    when (r.data ->> 'grade_replications')::integer not between 1 and 1000 then 'grade_replications is ' || (r.data ->> 'grade_replications')
                    when coalesce(r.data ->> 'name', '') = '' then 'it has no name' end as problem
          from clinical_rows as r
         cross join lateral (select jsonb_build_object('imported', jsonb_build_object('experiment_id', r.id, 'created', r.data -> 'created')) as key) as source
          left join instances as i on i.experiment = 'clinical_runner' and i.config @> source.key
          left join instances as taken on taken.name = r.data ->> 'name'
         where r.source_table = 'experiment' order by r.id
    loop
        if v_row.problem is not null then
            return query select 'experiments', 'left out', 1::bigint, format('%s (experiment %s of the source)', v_row.problem, v_row.id);
            continue;
        elsif v_row.instance_id is null and v_row.taken_id is not null then
            return query select 'experiments', 'refused', 1::bigint,
                format('instance "%s" exists here and was not imported: rename it first (update pgharness.instances set name = ...)', v_row.name);
            continue;
        elsif v_row.instance_id is null then
            insert into instances (name, description, experiment, config, note_replications, grade_replications, cycle_times, cycle_transcript_overlaps, software_version, created_at)
            values (v_row.name, format('Experiment %s of the clinical experiment runner.', v_row.id), 'clinical_runner', v_row.key,
                    (v_row.data ->> 'note_replications')::integer, (v_row.data ->> 'grade_replications')::integer, _clinical_integers(v_row.data -> 'cycle_times'),
                    coalesce(nullif(_clinical_integers(v_row.data -> 'cycle_transcript_overlaps'), '{}'), '{100}'), v_row.data ->> 'hyperscribe_version',
                    coalesce((v_row.data ->> 'created')::timestamptz, clock()))
            returning id into v_row.instance_id;
        end if;
        insert into clinical_ids values ('experiment', v_row.id, v_row.instance_id);
    end loop;
    insert into instance_cases (instance_id, case_id)
    select e.id, c.id from _clinical_links('experiment_case') as l
      join clinical_ids as e on e.kind = 'experiment' and e.source_id = l.experiment_id
      join clinical_ids as c on c.kind = 'case' and c.source_id = (l.data ->> 'case_id')::bigint
    on conflict on constraint instance_cases_pkey do nothing;
    get diagnostics v_cases = row_count;
    v_combinations := _import_clinical_combinations();
    return query
    select 'experiments', 'inserted', count(*) filter (where e.id > v_known), null from clinical_ids as e where e.kind = 'experiment'
    union all select 'experiments', 'unchanged', count(*) filter (where e.id <= v_known), null from clinical_ids as e where e.kind = 'experiment'
    union all select 'cases of experiments', 'inserted', v_cases, null
    union all select 'cases of experiments', 'unchanged', count(*) filter (where l.is_imported) - v_cases, null from _clinical_links('experiment_case') as l
    union all select 'cases of experiments', 'left out', count(*), 'their experiment or case is not imported' from _clinical_links('experiment_case') as l where not l.is_imported having count(*) > 0
    union all select 'model combinations', 'inserted', v_combinations, null
    union all select 'model combinations', 'unchanged', count(*) filter (where l.is_imported) - v_combinations, null from _clinical_links('experiment_model') as l
    union all select 'model combinations', 'left out', count(*), 'their experiment or a model of theirs is not imported' from _clinical_links('experiment_model') as l where not l.is_imported having count(*) > 0;
end;
$$;
comment on function pgharness._import_clinical_experiments() is
'Import the experiments as instances of experiment "clinical_runner", with their cases and model combinations.';

create or replace function pgharness._clinical_links(source_table text) returns table (id bigint, experiment_id bigint, data jsonb, is_imported boolean)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select r.id, (r.data ->> 'experiment_id')::bigint, r.data,
           exists (select from clinical_ids as i where i.kind = 'experiment' and i.source_id = (r.data ->> 'experiment_id')::bigint)
           and case _clinical_links.source_table
               when 'experiment_case' then exists (select from clinical_ids as i where i.kind = 'case' and i.source_id = (r.data ->> 'case_id')::bigint)
               else 2 = (select count(*) from unnest(array[r.data ->> 'model_note_generator_id', r.data ->> 'model_note_grader_id']) as m
                           join clinical_ids as i on i.kind = 'model' and i.source_id = m::bigint) end
      from clinical_rows as r where r.source_table = _clinical_links.source_table;
$$;
comment on function pgharness._clinical_links(text) is 'The staged rows of experiment_case or experiment_model, and whether what they join is imported.';

create or replace function pgharness._import_clinical_combinations() returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_count bigint;
begin
    insert into clinical_combinations (experiment_id, number, name, generator, grader, is_reasoning)
    select k.experiment_id, row_number() over (partition by k.experiment_id order by k.id) - 1,
           k.name || case when k.place > 1 then ' #' || k.place else '' end, k.generator, k.grader, k.is_reasoning
      from (select named.*, row_number() over (partition by named.experiment_id, named.name order by named.id) as place
              from (select l.id, l.experiment_id, g.name as generator, j.name as grader, coalesce((l.data ->> 'model_note_grader_is_reasoning')::boolean, false) as is_reasoning,
                           g.name || ' -> ' || j.name || case when (l.data ->> 'model_note_grader_is_reasoning')::boolean then ' (reasoning)' else '' end as name
                      from _clinical_links('experiment_model') as l
                      join clinical_ids as gi on gi.kind = 'model' and gi.source_id = (l.data ->> 'model_note_generator_id')::bigint
                      join clinical_ids as ji on ji.kind = 'model' and ji.source_id = (l.data ->> 'model_note_grader_id')::bigint
                      join models as g on g.id = gi.id
                      join models as j on j.id = ji.id
                     where l.is_imported) as named) as k;
    insert into model_combinations (instance_id, name, generator, grader, grader_is_reasoning)
    select i.id, k.name, k.generator, k.grader, k.is_reasoning
      from clinical_combinations as k join clinical_ids as i on i.kind = 'experiment' and i.source_id = k.experiment_id
     where not exists (select from model_combinations as mc where mc.instance_id = i.id and mc.name = k.name)
     order by k.experiment_id, k.number;
    get diagnostics v_count = row_count;
    update clinical_combinations as k set combination_id = mc.id
      from clinical_ids as i join model_combinations as mc on mc.instance_id = i.id
     where i.kind = 'experiment' and i.source_id = k.experiment_id and mc.name = k.name;
    return v_count;
end;
$$;
comment on function pgharness._import_clinical_combinations() is 'Import the model combinations of the experiments; returns how many were new.';

create or replace function pgharness._stage_clinical_results() returns void
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    insert into clinical_grades
    select s.id, (s.data ->> 'experiment_result_id')::bigint, rb.id,
           case when s.data ->> 'text_llm_vendor' <> '' then _clinical_model(s.data ->> 'text_llm_vendor', s.data ->> 'text_llm_name') end, (s.data ->> 'created')::timestamptz
      from clinical_rows as s
      join clinical_rows as r on r.source_table = 'experiment_result' and r.id = (s.data ->> 'experiment_result_id')::bigint
      left join clinical_ids as c on c.kind = 'case' and c.source_id = (r.data ->> 'case_id')::bigint
      left join clinical_rows as sc on sc.source_table = 'score' and sc.id = (s.data ->> 'score_id')::bigint
      left join clinical_ids as ri on ri.kind = 'rubric' and ri.source_id = (sc.data ->> 'rubric_id')::bigint
      left join rubrics as rb on rb.id = ri.id and rb.case_id = c.id
     where s.source_table = 'experiment_result_score';
    insert into clinical_results
    select r.id, r.experiment_id, dense_rank() over (partition by r.experiment_id order by r.part_start, r.version, r.cycle_time), r.case_id,
           (r.data ->> 'cycle_transcript_overlap')::integer, r.has_note,
           case when r.data ->> 'text_llm_vendor' <> '' then _clinical_model(r.data ->> 'text_llm_vendor', r.data ->> 'text_llm_name') end,
           g.grader, g.grader ~* '/(o[1-9]|.*(opus|-pro|reason|think))', r.replications, r.created_at, r.updated_at
      from (select s.id, s.data, e.source_id as experiment_id, c.id as case_id, s.data ->> 'hyperscribe_version' as version, s.data ->> 'cycle_time' as cycle_time,
                   (x.data ->> 'note_replications')::integer as replications,
                   -- a row that never got its note back still says that it did not fail
                   not coalesce((s.data ->> 'failed')::boolean, false)
                   and coalesce(s.data ->> 'generated_note_id' <> '0' or s.data -> 'note_json' not in ('[]', '{}', 'null', '""'), false) as has_note,
                   (s.data ->> 'created')::timestamptz as created_at, (s.data ->> 'updated')::timestamptz as updated_at,
                   min(s.data ->> 'created') over (partition by e.source_id, s.data ->> 'hyperscribe_version', s.data ->> 'cycle_time') as part_start
              from clinical_rows as s
              join clinical_ids as e on e.kind = 'experiment' and e.source_id = (s.data ->> 'experiment_id')::bigint
              join clinical_rows as x on x.source_table = 'experiment' and x.id = e.source_id
              join clinical_ids as c on c.kind = 'case' and c.source_id = (s.data ->> 'case_id')::bigint
             where s.source_table = 'experiment_result') as r
      left join (select distinct on (k.result_id) k.result_id, k.grader from clinical_grades as k where k.grader is not null order by k.result_id, k.id) as g on g.result_id = r.id;
    create index on clinical_grades (result_id);
    -- results of a model that no combination of their experiment names
    insert into clinical_combinations (experiment_id, number, name, generator, grader)
    select o.experiment_id, row_number() over (partition by o.experiment_id order by o.first_id)
                            + (select coalesce(max(k.number), -1) from clinical_combinations as k where k.experiment_id = o.experiment_id),
           o.generator || coalesce(' -> ' || o.grader, '') || ' (not planned)', o.generator, o.grader
      from (select r.experiment_id, r.generator, min(r.id) as first_id, (array_agg(r.grader order by r.id) filter (where r.grader is not null))[1] as grader
              from clinical_results as r
             where r.generator is not null and not exists (select from _clinical_candidates() as k where k.result_id = r.id) group by 1, 2) as o;
    perform _clinical_model_id(k.generator), case when k.grader is not null then _clinical_model_id(k.grader) end from clinical_combinations as k where k.combination_id is null;
end;
$$;
comment on function pgharness._stage_clinical_results() is
'Read the staged results and grades whose experiment and case are imported, with the combinations that they show. One program version of an experiment is a part of it.';

create or replace function pgharness._clinical_candidates() returns table (result_id bigint, number integer)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select m.id, m.number
      from (select r.id, k.number, rank() over (partition by r.id order by (k.generator = r.generator) desc, coalesce(k.is_reasoning = r.is_reasoning, true) desc) as preference
              from clinical_results as r
              join clinical_combinations as k
                on k.experiment_id = r.experiment_id and k.generator in (r.generator, split_part(r.generator, '/', 1) || '/default')
               and (r.grader is null or k.combination_id is null or split_part(k.grader, '/', 1) = split_part(r.grader, '/', 1))) as m
     where m.preference = 1;
$$;
comment on function pgharness._clinical_candidates() is
'Which combinations a result may belong to: rows name the models used, not the combination. The same generator, or the program''s own choice for its vendor; a grader of the same vendor, chat or reasoning.';

create or replace function pgharness._place_clinical_results() returns void
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    with class as (
        select k.result_id, array_agg(k.number order by k.number) as numbers from _clinical_candidates() as k group by 1
    ), known as (
        select r.*, k.numbers[1 + ((row_number() over (partition by r.experiment_id, r.part, r.case_id, r.overlap, k.numbers order by r.created_at, r.id) - 1)
                                   / r.replications) % cardinality(k.numbers)] as number
          from clinical_results as r join class as k on k.result_id = r.id
    ), room as (
        -- a result without a model never came to one: it goes where one is missing
        select cell.*, sum(cell.free) over (partition by cell.experiment_id, cell.part, cell.case_id, cell.overlap order by cell.number) as upto
          from (select p.experiment_id, p.part, p.case_id, p.overlap, c.number, greatest(p.replications - count(k.id), 0) as free
                  from (select distinct r.experiment_id, r.part, r.case_id, r.overlap, r.replications from clinical_results as r) as p
                  join clinical_combinations as c on c.experiment_id = p.experiment_id
                  left join known as k on (k.experiment_id, k.part, k.case_id, k.overlap, k.number) = (p.experiment_id, p.part, p.case_id, p.overlap, c.number)
                 group by p.experiment_id, p.part, p.case_id, p.overlap, c.number, p.replications) as cell
    ), lost as (
        select r.*, row_number() over (partition by r.experiment_id, r.part, r.case_id, r.overlap order by r.created_at, r.id) as n
          from clinical_results as r where not exists (select from class as k where k.result_id = r.id)
    ), matched as (
        select k.id, k.experiment_id, k.part, k.case_id, k.overlap, k.has_note, k.replications, k.created_at, k.number from known as k
        union all
        select l.id, l.experiment_id, l.part, l.case_id, l.overlap, l.has_note, l.replications, l.created_at, coalesce(f.number, 0)
          from lost as l
          left join room as f on (f.experiment_id, f.part, f.case_id, f.overlap) = (l.experiment_id, l.part, l.case_id, l.overlap)
           and l.n > f.upto - f.free and l.n <= f.upto
         where exists (select from clinical_combinations as c where c.experiment_id = l.experiment_id)
    ), counted as (
        select m.*, count(*) filter (where m.has_note) over cell as notes,
               row_number() over (partition by m.experiment_id, m.part, m.case_id, m.overlap, m.number, m.has_note
                                  order by case when m.has_note then 1 else -1 end * extract(epoch from m.created_at), m.id) as n
          from matched as m window cell as (partition by m.experiment_id, m.part, m.case_id, m.overlap, m.number)
    ), slotted as (
        -- notes first, in time; then failures, newest first, where notes are missing; failures beyond that came before some note
        select c.*, c.has_note or c.notes + c.n <= size.slots as is_item,
               case when c.has_note then c.n when c.notes + c.n <= size.slots then c.notes + c.n else (c.n - (size.slots - c.notes) - 1) % size.slots + 1 end as slot
          from counted as c
         cross join lateral (select greatest(ceil(c.notes::numeric / c.replications), 1)::bigint * c.replications as slots) as size
    )
    insert into clinical_places
    select s.id, s.number, case when not s.is_item then 'attempt' when s.has_note then 'note' else 'failure' end,
           (s.slot - 1) / s.replications, (s.slot - 1) % s.replications + 1
      from slotted as s;
$$;
comment on function pgharness._place_clinical_results() is
'Give each staged result its place: note, failure, or earlier attempt of a combination''s replication. What a case has beyond its replications goes to a further run (block): running an experiment again repeated all of it.';

create or replace function pgharness._clinical_run(experiment_id bigint, part integer, block integer) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    with mine as (
        select r.*, p.combination, p.role, s.data
          from clinical_results as r
          join clinical_places as p on p.result_id = r.id and p.block = _clinical_run.block
          join clinical_rows as s on s.source_table = 'experiment_result' and s.id = r.id
         where r.experiment_id = _clinical_run.experiment_id and r.part = _clinical_run.part
    ), plan as (
        -- the first run is of the whole plan, a further one of what was repeated
        select x.data, _clinical_run.part = 1 and _clinical_run.block = 0 as is_first from clinical_rows as x
         where x.source_table = 'experiment' and x.id = _clinical_run.experiment_id
    ), graded as (
        select distinct m.case_id, g.rubric_id from mine as m join clinical_grades as g on g.result_id = m.id where m.role = 'note' and g.rubric_id is not null
    ), run_case as (
        select c.case_id, row_number() over (order by c.case_id) - 1 as number
          from (select m.case_id from mine as m
                union
                select i.id from plan as p, _clinical_links('experiment_case') as l join clinical_ids as i on i.kind = 'case' and i.source_id = (l.data ->> 'case_id')::bigint
                 where p.is_first and l.is_imported and l.experiment_id = _clinical_run.experiment_id) as c
    ), rubric as (
        select c.number as case_number, row_number() over (partition by c.number order by r.validated_at desc nulls last, r.id desc) as number, r.id as rubric_id
          from graded as g join rubrics as r on r.id = g.rubric_id join run_case as c on c.case_id = g.case_id
    )
    select jsonb_build_object(
        'key', format('clinical_runner experiment %s of %s, part %s.%s', _clinical_run.experiment_id, p.data ->> 'created', _clinical_run.part, _clinical_run.block + 1),
        'instance', (select i.name from instances as i join clinical_ids as e on e.kind = 'experiment' and e.id = i.id where e.source_id = _clinical_run.experiment_id),
        'imported', jsonb_build_object('system', 'clinical_runner', 'experiment_id', _clinical_run.experiment_id, 'part', _clinical_run.part,
                                       'block', _clinical_run.block, 'tags', first.data -> 'hyperscribe_tags', 'cycle_time', first.data -> 'cycle_time',
                                       'digest', _clinical_digest(_clinical_run.experiment_id)),
        'software_version', first.data -> 'hyperscribe_version',
        'note_replications', p.data -> 'note_replications', 'grade_replications', p.data -> 'grade_replications',
        'rubric_count', coalesce((select max(r.number) from rubric as r), 2),
        'created_at', (select min(m.created_at) from mine as m),
        'finished_at', (select greatest(max(m.updated_at), max(g.created_at)) from mine as m left join clinical_grades as g on g.result_id = m.id),
        'overlaps', to_jsonb(_clinical_integers(case when p.is_first then p.data -> 'cycle_transcript_overlaps' else '[]' end
                                                || (select jsonb_agg(distinct m.overlap) from mine as m))),
        'cases', (select jsonb_agg(c.case_id order by c.number) from run_case as c),
        'rubrics', (select coalesce(jsonb_agg(to_jsonb(r)), '[]') from rubric as r),
        'combinations', (
            select jsonb_agg(jsonb_build_object(
                       'name', k.name, 'combination_id', k.combination_id, 'generator_id', g.id, 'grader_id', j.id, 'grader_is_reasoning', k.is_reasoning,
                       'generator_model', regexp_replace(used.generator, '^[^/]*/', ''), 'grader_model', regexp_replace(used.grader, '^[^/]*/', '')) order by k.number)
              from clinical_combinations as k
              join models as g on g.name = k.generator
              left join models as j on j.name = k.grader
             cross join lateral (select max(m.generator) as generator, max(m.grader) as grader, count(*) as count from mine as m where m.combination = k.number) as used
             where k.experiment_id = _clinical_run.experiment_id and (used.count > 0 or p.is_first and k.combination_id is not null)))
      from plan as p cross join lateral (select m.data from mine as m order by m.created_at, m.id limit 1) as first;
$$;
comment on function pgharness._clinical_run(bigint, integer, integer) is 'A part of an experiment of the clinical runner, as import_run() takes it.';

create or replace function pgharness._clinical_digest(experiment_id bigint) returns text
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select md5(string_agg(md5(r.data::text), '' order by r.source_table, r.id))
      from clinical_rows as r
     where r.source_table in ('experiment_case', 'experiment_model', 'experiment_result') and r.data ->> 'experiment_id' = _clinical_digest.experiment_id::text
        or r.source_table = 'experiment' and r.id = _clinical_digest.experiment_id
        or r.source_table = 'experiment_result_score'
           and r.id in (select g.id from clinical_grades as g join clinical_results as s on s.id = g.result_id where s.experiment_id = _clinical_digest.experiment_id);
$$;
comment on function pgharness._clinical_digest(bigint) is 'A digest of all that the source has of an experiment.';

create or replace function pgharness._clinical_notes(run_id bigint) returns table (
    result_id bigint, role text, ordinal bigint, attempt bigint, generator_id bigint, grader_id bigint, case_number integer, grade_replications integer, data jsonb)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select r.id, p.role, place.ordinal,
           row_number() over (partition by place.ordinal order by p.role = 'attempt' desc, r.created_at, r.id),
           c.generator_id, c.grader_id, rc.number, c.grade_replications, s.data
      from run_definitions as d
     cross join lateral jsonb_to_record(d.definition -> 'imported') as i (experiment_id bigint, part integer, block integer)
      join clinical_results as r on r.experiment_id = i.experiment_id and r.part = i.part
      join clinical_places as p on p.result_id = r.id and p.block = i.block
      join clinical_rows as s on s.source_table = 'experiment_result' and s.id = r.id
      join clinical_combinations as k on k.experiment_id = r.experiment_id and k.number = p.combination
      join run_cases as rc on rc.run_id = d.run_id and rc.case_id = r.case_id
      join run_combinations as c on c.run_id = d.run_id and c.name = k.name
     cross join lateral (select _note_ordinal(d, rc.number, c.number, r.overlap, p.replication) as ordinal) as place
     where d.run_id = _clinical_notes.run_id;
$$;
comment on function pgharness._clinical_notes(bigint) is 'The staged results of an imported run, with the ordinals of their places and which try each was.';

create or replace function pgharness._clinical_failure(data jsonb) returns jsonb
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    -- the variables that the program printed with an error may hold anything, keys too: they stay behind
    select jsonb_build_object(
        'cause', case when told.error is null then 'error' else 'code_failed' end,
        'error', coalesce(told.error, case when (data ->> 'failed')::boolean then 'it failed, and its cause was not recorded' else 'no note was recorded' end),
        'answer', nullif(jsonb_strip_nulls(jsonb_build_object('files', data #> '{errors,files}', 'note', nullif(data -> 'note_json', '[]')))::text, '{}'))
      from (select nullif(case jsonb_typeof(data -> 'errors')
                              when 'object' then coalesce(data #>> '{errors,error}', nullif((data -> 'errors') - '{variables,files}'::text[], '{}')::text)
                              when 'array' then nullif(data -> 'errors', '[]')::text
                              else data ->> 'errors' end, '') as error) as told;
$$;
comment on function pgharness._clinical_failure(jsonb) is 'Cause, error and answer of a result that left no note.';

create or replace function pgharness._clinical_grade(rubric jsonb, verdicts jsonb) returns table (score numeric, max_score numeric, criteria jsonb)
    language sql immutable security invoker rows 1 set search_path = pgharness, pg_temp
as $$
    select sum(part.score), sum(part.weight),
           jsonb_agg(jsonb_build_object('rationale', coalesce(v.value ->> 'rationale', ''), 'satisfaction', part.satisfaction, 'score', part.score) order by c.number)
      from jsonb_array_elements(rubric) with ordinality as c (value, number)
      join jsonb_array_elements(case jsonb_typeof(verdicts) when 'array' then verdicts else '[]' end) with ordinality as v (value, number) on v.number = c.number
     cross join lateral (select (c.value ->> 'weight')::numeric as weight,
                                case when v.value ->> 'satisfaction' ~ '^\d{1,3}(\.\d+)?$' then (v.value ->> 'satisfaction')::numeric end as satisfaction,
                                case when jsonb_typeof(v.value -> 'score') = 'number' then round((v.value ->> 'score')::numeric, 4) end as recorded) as given
     cross join lateral (select given.weight, given.satisfaction, coalesce(given.recorded, round(given.weight * given.satisfaction / 100, 2)) as score) as part
    having count(part.satisfaction) = jsonb_array_length(rubric) and count(*) = jsonb_array_length(verdicts)
       and bool_and(part.satisfaction <= 100 and part.score between 0 and part.weight + 0.01) and sum(part.score) <= sum(part.weight) and sum(part.weight) > 0;
$$;
comment on function pgharness._clinical_grade(jsonb, jsonb) is
'The scores of a grade as they were recorded (weight * satisfaction / 100 where they were not). No row when its verdicts do not fit the criteria of its rubric.';

create or replace function pgharness._import_clinical_notes(run_id bigint) returns void
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    select import_run_items(_import_clinical_notes.run_id,
               coalesce(jsonb_agg(jsonb_build_object('ordinal', n.ordinal, 'attempts', n.attempt, 'output', coalesce(nullif(n.data -> 'note_json', 'null'), '""'),
                                                     'created_at', n.data -> 'updated')) filter (where n.role = 'note'), '[]'),
               '[]',
               coalesce(jsonb_agg(n.failure || jsonb_build_object('kind', 'note', 'ordinal', n.ordinal, 'attempts', n.attempt, 'updated_at', n.data -> 'updated'))
                        filter (where n.role = 'failure'), '[]'),
               coalesce(jsonb_agg(jsonb_build_object(
                            'kind', 'note', 'ordinal', n.ordinal, 'attempt', n.attempt, 'model_id', n.generator_id, 'request_id', 'experiment_result/' || n.result_id,
                            'input_tokens', coalesce(n.tokens -> 'prompt', '0'), 'output_tokens', coalesce(n.tokens -> 'generated', '0'),
                            'latency_ms', greatest(extract(epoch from (n.data ->> 'updated')::timestamptz - (n.data ->> 'created')::timestamptz) * 1000, 0),
                            'started_at', n.data -> 'created')
                            || case when n.role = 'note' then '{"outcome": "succeeded"}'::jsonb
                                    else jsonb_build_object('outcome', n.failure -> 'cause', 'error', n.failure -> 'error', 'answer', n.failure -> 'answer') end)
                        filter (where n.role <> 'note' or (n.tokens ->> 'generated')::bigint > 0), '[]'))
      from (select m.*, (row_number() over (order by m.result_id) - 1) / 500 as chunk, g.data -> 'token_counts' as tokens,
                   case when m.role <> 'note' then _clinical_failure(m.data) end as failure
              from _clinical_notes(_import_clinical_notes.run_id) as m
              left join clinical_rows as g on g.source_table = 'generated_note' and g.id = (m.data ->> 'generated_note_id')::bigint) as n
     group by n.chunk;
$$;
comment on function pgharness._import_clinical_notes(bigint) is
'Add the staged results to an imported run: notes, failures with their cause, and calls for every try that failed or whose tokens were counted.';

create or replace function pgharness._import_clinical_grades(run_id bigint) returns void
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$
    with given as (
        select g.id, g.created_at, n.result_id, n.ordinal as note_ordinal, n.role, n.grade_replications, coalesce(n.grader_id, n.generator_id) as model_id,
               rr.number as rubric_number, fit.score, fit.max_score, fit.criteria, s.data -> 'scoring_result' as answer
          from _clinical_notes(_import_clinical_grades.run_id) as n
          join clinical_grades as g on g.result_id = n.result_id
          join clinical_rows as s on s.source_table = 'experiment_result_score' and s.id = g.id
          left join rubrics as rb on rb.id = g.rubric_id
          left join run_rubrics as rr on n.role = 'note' and rr.run_id = _import_clinical_grades.run_id and rr.case_number = n.case_number and rr.rubric_id = rb.id
          left join lateral _clinical_grade(rb.criteria, s.data -> 'scoring_result') as fit on true
    ), ranked as (
        select g.*, g.rubric_number is not null
                    and row_number() over (partition by g.result_id, g.rubric_number order by g.score is null, g.created_at desc, g.id desc) <= g.grade_replications as is_item
          from given as g
    ), placed as (
        select r.*, r.note_ordinal * d.grade_stride
                    + case when r.is_item then (r.rubric_number - 1) * r.grade_replications
                                               + row_number() over (partition by r.result_id, r.rubric_number, r.is_item order by r.created_at, r.id) - 1
                           else 0 end as ordinal
          from ranked as r join run_definitions as d on d.run_id = _import_clinical_grades.run_id
    )
    select import_run_items(_import_clinical_grades.run_id, '[]',
               coalesce(jsonb_agg(jsonb_build_object('ordinal', p.ordinal, 'score', p.score, 'max_score', p.max_score, 'criteria', p.criteria, 'created_at', p.created_at))
                        filter (where p.is_item and p.score is not null), '[]'),
               coalesce(jsonb_agg(jsonb_build_object('kind', 'grade', 'ordinal', p.ordinal, 'attempts', 1, 'cause', 'invalid_output', 'error', p.problem,
                                                     'answer', p.answer::text, 'updated_at', p.created_at))
                        filter (where p.is_item and p.score is null), '[]'),
               coalesce(jsonb_agg(jsonb_build_object('kind', 'grade', 'ordinal', p.ordinal, 'attempt', 1, 'model_id', p.model_id, 'error', p.problem, 'answer', p.answer::text,
                                                     'outcome', case when p.is_item then 'invalid_output' else 'cancelled' end,
                                                     'request_id', 'experiment_result_score/' || p.id, 'latency_ms', 0, 'started_at', p.created_at))
                        filter (where p.problem is not null), '[]'))
      from (select q.*, (row_number() over (order by q.id) - 1) / 1000 as chunk,
                   case when q.is_item and q.score is not null then null
                        when q.is_item then 'its verdicts do not fit the criteria of its rubric'
                        when q.role <> 'note' then 'its note failed'
                        when q.rubric_number is null then 'its rubric is not there any more, or is of another case'
                        else 'superseded by later grades of the same note and rubric' end as problem
              from placed as q) as p
     group by p.chunk;
$$;
comment on function pgharness._import_clinical_grades(bigint) is
'Add the staged grades to an imported run. Of more grades than replications the latest count; those that cannot be a grade are kept as calls with their answer.';

create or replace function pgharness._import_clinical_results() returns table (what text, outcome text, item_count bigint, remark text)
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_part record;
    v_run  record;
    v_runs bigint[] := '{}';
begin
    perform _stage_clinical_results();
    perform _place_clinical_results();
    analyze clinical_grades, clinical_results, clinical_places;
    for v_part in
        select r.experiment_id, r.part, p.block, count(*) as results, sum((select count(*) from clinical_grades as g where g.result_id = r.id)) as grades
          from clinical_results as r join clinical_places as p on p.result_id = r.id group by 1, 2, 3 order by 1, 2, 3
    loop
        select i.* into v_run from import_run(_clinical_run(v_part.experiment_id, v_part.part, v_part.block)) as i;
        if v_run.outcome <> 'unchanged' then
            perform _import_clinical_notes(v_run.run_id);
            perform _import_clinical_grades(v_run.run_id);
            perform finish_imported_run(v_run.run_id);
        end if;
        v_runs := v_runs || v_run.run_id;
        return query values ('runs', v_run.outcome, 1::bigint, null), ('results', v_run.outcome, v_part.results, null), ('grades', v_run.outcome, v_part.grades::bigint, null);
    end loop;
    return query
    select 'results', 'left out', count(*), 'their experiment, case or model combination is not there any more'
      from clinical_rows as s where s.source_table = 'experiment_result' and not exists (select from clinical_places as p where p.result_id = s.id) having count(*) > 0
    union all
    select 'grades', 'left out', count(*), 'their result is left out or not there any more'
      from clinical_rows as s
     where s.source_table = 'experiment_result_score'
       and not exists (select from clinical_places as p where p.result_id = (s.data ->> 'experiment_result_id')::bigint) having count(*) > 0
    union all
    select 'results', 'remark', count(*), case p.role when 'failure' then 'failed: they are failures of their run, with their cause where it was recorded'
                                                      else 'failed, and the note was made by another try: they are calls of their run' end
      from clinical_places as p where p.role <> 'note' group by p.role
    union all
    select 'results', 'remark', count(*), 'could belong to several model combinations, and were shared out in order'
      from (select from _clinical_candidates() as k group by k.result_id having count(*) > 1) as k having count(*) > 0
    union all
    select 'grades', 'remark', count(*), 'kept as calls with their answer: ' || k.error from calls as k where k.run_id = any (v_runs) and k.kind = 'grade' group by k.error
    union all
    select 'notes and scores', 'remark', count(*), 'made outside of experiments: they stay in the source'
      from clinical_rows as s
     where s.source_table = 'generated_note' and s.id not in (
               select (u.data ->> 'generated_note_id')::bigint from clinical_rows as u where u.source_table = 'experiment_result' and u.data ->> 'generated_note_id' <> '0')
        or s.source_table = 'score' and s.id not in (
               select (u.data ->> 'score_id')::bigint from clinical_rows as u where u.source_table = 'experiment_result_score' and u.data ->> 'score_id' <> '0')
    having count(*) > 0
    union all
    select 'runs', 'remark', 1, format('"%s" is incomplete: %s', r.name, r.reason) from runs as r where r.id = any (v_runs) and r.status = 'cancelled';
end;
$$;
comment on function pgharness._import_clinical_results() is
'Import the results and grades: a finished run per program version of an experiment, and one more for each time that it was repeated.';
