-- Names for ids, clear refusals and freezing, for the tables that people write.

create or replace function pgharness.clock() returns timestamptz
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce(nullif(current_setting('pgharness.fake_now', true), '')::timestamptz, clock_timestamp());
$$;
comment on function pgharness.clock() is
'The time that the harness goes by: clock_timestamp(), or the setting pgharness.fake_now when a test sets it. Example: select pgharness.clock();';

create or replace function pgharness._refuse_unknown(what text, name text, known text[], hint text) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
begin
    if name is null then
        raise exception '% is missing', _refuse_unknown.what using errcode = 'PH002', hint = _refuse_unknown.hint;
    end if;
    raise exception '% "%" does not exist', _refuse_unknown.what, _refuse_unknown.name
        using errcode = 'PH001', hint = _refuse_unknown.hint,
              detail = case when cardinality(known) = 0 then format('There is no %s yet.', what)
                            else format('Some that exist: %s.', array_to_string(known, ', ')) end;
end;
$$;
comment on function pgharness._refuse_unknown(text, text, text[], text) is
'Raise PH001 for a name that does not exist, or PH002 when none was given, with what exists and what to type.';

create or replace function pgharness._check_id(what text, id bigint, name text) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
begin
    if _check_id.id is not null and _check_id.name is null then
        raise exception '% with id % does not exist', what, _check_id.id
            using errcode = 'PH001', hint = format('List those that exist: select id, name from pgharness.%ss;', what);
    end if;
end;
$$;
comment on function pgharness._check_id(text, bigint, text) is
'Raise PH001 for an id under which no name was found: a foreign key with a null in it checks nothing.';

create or replace function pgharness._project_id(project text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select p.id into v_id from projects as p where p.name = _project_id.project;
    if v_id is null and _project_id.project ~ '^\d{1,18}$' then
        select p.id into v_id from projects as p where p.id = _project_id.project::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('project', _project_id.project, array(select p.name from projects as p order by p.id desc limit 5),
                                'Create it: insert into pgharness.projects (name) values (''...'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._project_id(text) is 'The id of a project given by name, or by id as text. Raises PH001.';

create or replace function pgharness._experiment_id(experiment text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select e.id into v_id from experiments as e where e.name = _experiment_id.experiment;
    if v_id is null and _experiment_id.experiment ~ '^\d{1,18}$' then
        select e.id into v_id from experiments as e where e.id = _experiment_id.experiment::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('experiment', _experiment_id.experiment, array(select e.name from experiments as e order by e.id desc limit 5),
                                'Use ''note_grade'', or: insert into pgharness.experiments (name, config_schema) values (''...'', ''{}'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._experiment_id(text) is 'The id of an experiment given by name, or by id as text. Raises PH001.';

create or replace function pgharness._instance_id(instance text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select i.id into v_id from instances as i where i.name = _instance_id.instance;
    if v_id is null and _instance_id.instance ~ '^\d{1,18}$' then
        select i.id into v_id from instances as i where i.id = _instance_id.instance::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('instance', _instance_id.instance, array(select i.name from instances as i order by i.id desc limit 5),
                                'Create it: insert into pgharness.instances (name) values (''...'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._instance_id(text) is 'The id of an instance given by name, or by id as text. Raises PH001.';

create or replace function pgharness._dataset_id(dataset text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select d.id into v_id from datasets as d where d.name = _dataset_id.dataset;
    if v_id is null and _dataset_id.dataset ~ '^\d{1,18}$' then
        select d.id into v_id from datasets as d where d.id = _dataset_id.dataset::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('dataset', _dataset_id.dataset, array(select d.name from datasets as d order by d.id desc limit 5),
                                'Create it: insert into pgharness.datasets (name) values (''...'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._dataset_id(text) is 'The id of a dataset given by name, or by id as text. Raises PH001.';

create or replace function pgharness._case_id(case_name text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select c.id into v_id from cases as c where c.name = _case_id.case_name;
    if v_id is null and _case_id.case_name ~ '^\d{1,18}$' then
        select c.id into v_id from cases as c where c.id = _case_id.case_name::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('case', _case_id.case_name, array(select c.name from cases as c order by c.id desc limit 5),
                                'Create it: insert into pgharness.cases (name, input) values (''...'', ''...'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._case_id(text) is 'The id of a case given by name, or by id as text. Raises PH001.';

create or replace function pgharness._model_id(model text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select m.id into v_id from models as m where m.name = _model_id.model;
    if v_id is null and _model_id.model ~ '^\d{1,18}$' then
        select m.id into v_id from models as m where m.id = _model_id.model::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('model', _model_id.model, array(select m.name from models as m order by m.id desc limit 5),
                                'Create it: insert into pgharness.models (name, provider, model) values (''...'', ''openai'', ''...'');');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._model_id(text) is 'The id of a model or metric given by name, or by id as text. Raises PH001.';

create or replace function pgharness._run_id(run text) returns bigint
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    select r.id into v_id from runs as r where r.name = _run_id.run;
    if v_id is null and _run_id.run ~ '^\d{1,18}$' then
        select r.id into v_id from runs as r where r.id = _run_id.run::bigint;
    end if;
    if v_id is null then
        perform _refuse_unknown('run', _run_id.run, array(select r.name from runs as r order by r.id desc limit 5),
                                'List runs: select run_id, run, status from pgharness.run_progress;');
    end if;
    return v_id;
end;
$$;
comment on function pgharness._run_id(text) is 'The id of a run given by name, or by id as text. Raises PH001.';

create or replace function pgharness._check_settings(
    kind text default null, budget_usd double precision default null, priority integer default null, max_concurrency integer default null,
    batch_deadline_seconds double precision default null, response_cache text default null, failure_threshold double precision default null
) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_wrong record;
begin
    select * into v_wrong from (values
        ('kind', kind, kind not in ('trial', 'milestone'), 'trial or milestone'),
        ('budget_usd', budget_usd::text, not budget_usd between 0.000001 and 999999, 'an amount of USD from 0.000001 to 999999, or null for no budget'),
        ('priority', priority::text, not priority between -1000 and 1000, 'a number from -1000 to 1000'),
        ('max_concurrency', max_concurrency::text, max_concurrency < 1, 'a number of calls from 1 on, or null for no cap'),
        ('batch_deadline_seconds', batch_deadline_seconds::text, batch_deadline_seconds <> 0 and not batch_deadline_seconds between 1 and 2592000,
         'a number of seconds from 1 to 2592000 (30 days), or 0 to ask live'),
        ('response_cache', response_cache, response_cache not in ('off', 'read', 'write', 'replay'), 'off, read, write or replay'),
        ('failure_threshold', failure_threshold::text, not failure_threshold between 0 and 1, 'a share from 0 to 1')
    ) as each (name, value, is_wrong, allowed) where each.is_wrong limit 1;
    if found then
        raise exception '% of a run cannot be "%"', v_wrong.name, v_wrong.value using errcode = 'PH002', hint = format('Give %s.', v_wrong.allowed);
    end if;
end;
$$;
comment on function pgharness._check_settings(text, double precision, integer, integer, double precision, text, double precision) is
'Refuse settings that a run cannot have (PH002), before the table does, which would show the whole row; null is any that is not given.';

-- Triggers: a row may be inserted with names, with ids, or with both.

create or replace function pgharness._resolve_instances() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_schema   jsonb;
    v_problems text[];
begin
    if new.project_id is not distinct from old.project_id then
        new.project_id := case when new.project is not null then _project_id(new.project) end;
    end if;
    select p.name into new.project from projects as p where p.id = new.project_id;
    perform _check_id('project', new.project_id, new.project);
    if new.experiment_id is not distinct from old.experiment_id then
        new.experiment_id := _experiment_id(new.experiment);
    end if;
    select e.name, e.config_schema into new.experiment, v_schema from experiments as e where e.id = new.experiment_id;
    perform _check_id('experiment', new.experiment_id, new.experiment);
    if array_ndims(new.cycle_transcript_overlaps) > 1 or array_lower(new.cycle_transcript_overlaps, 1) <> 1
       or (select count(distinct o) < count(*) from unnest(new.cycle_transcript_overlaps) as o) then
        raise exception 'cycle_transcript_overlaps of instance "%" is %, not a list of different overlaps', new.name, new.cycle_transcript_overlaps
            using errcode = 'PH002', hint = 'Name each overlap once, for example ''{0,50,100}''; for more notes of each raise note_replications.';
    end if;
    if tg_op = 'UPDATE' and (new.experiment_id, new.config) is not distinct from (old.experiment_id, old.config) then
        return new;                                     -- nothing to check: a rename must not fail over a schema that changed since
    end if;
    new.config := _apply_defaults(v_schema, new.config);
    select array_agg(format('%s %s', case when v.path = '' or v.path like '[%' then 'config' || v.path else 'config.' || v.path end, v.problem))
      into v_problems
      from schema_violations(v_schema, new.config) as v;
    if v_problems is not null then
        raise exception '%', v_problems[1]
            using errcode = 'PH002',
                  detail = format('%s problem(s) with the config of instance "%s": %s.', cardinality(v_problems), new.name,
                                  array_to_string(v_problems[1:10], '; ')),
                  hint = format('See what is allowed: select jsonb_pretty(config_schema) from pgharness.experiments where name = %L;',
                                new.experiment);
    end if;
    return new;
end;
$$;
comment on function pgharness._resolve_instances() is
'Fill an instance''s project and experiment by name or id, complete its config with the schema''s defaults, and refuse a config that does not fit (PH002 naming field and limit).';

create or replace function pgharness._check_experiments() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_problem record;
begin
    for v_problem in select * from schema_problems(new.config_schema) limit 1 loop
        raise exception 'config_schema of experiment "%" is not usable: % %', new.name,
                        coalesce(nullif(v_problem.path, ''), 'the schema'), v_problem.problem
            using errcode = 'PH002', hint = 'Use JSON Schema draft 2020-12, for example {"type": "object", "properties": {"temperature": {"type": "number", "maximum": 2}}}.';
    end loop;
    return new;
end;
$$;
comment on function pgharness._check_experiments() is 'Refuse an experiment whose config_schema could not be enforced (PH002).';

create or replace function pgharness._resolve_cases() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run text;
begin
    if new.dataset_id is not distinct from old.dataset_id then
        new.dataset_id := case when new.dataset is not null then _dataset_id(new.dataset) end;
    end if;
    select d.name into new.dataset from datasets as d where d.id = new.dataset_id;
    perform _check_id('dataset', new.dataset_id, new.dataset);
    new.digest := encode(sha256(convert_to(concat_ws(E'\n', new.input, coalesce(new.target::text, ''), new.metadata), 'UTF8')), 'hex');
    if tg_op = 'UPDATE' and new.digest <> old.digest then
        select r.name into v_run from run_cases as rc join runs as r on r.id = rc.run_id where rc.case_id = old.id order by r.id limit 1;
        if v_run is not null then
            raise exception 'case "%" was used by run "%": its input, target and metadata are frozen', old.name, v_run
                using errcode = 'PH003', hint = 'Insert a new case under another name, and use that in the next instance.';
        end if;
    end if;
    return new;
end;
$$;
comment on function pgharness._resolve_cases() is
'Fill a case''s dataset by name or id and its digest; refuse to change the content of a case that a run used (PH003).';

create or replace function pgharness._protect_cases() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run text;
begin
    select r.name into v_run from run_cases as rc join runs as r on r.id = rc.run_id where rc.case_id = old.id order by r.id limit 1;
    if v_run is not null then
        raise exception 'case "%" was used by run "%" and cannot be deleted', old.name, v_run
            using errcode = 'PH003', hint = 'Leave it out of an instance instead: delete from pgharness.instance_cases where case_name = ''...'';';
    end if;
    return old;
end;
$$;
comment on function pgharness._protect_cases() is 'Refuse to delete a case that a run used (PH003).';

create or replace function pgharness._resolve_rubrics() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_problem text;
    v_run     text;
begin
    if new.case_id is not distinct from old.case_id then
        new.case_id := _case_id(new.case_name);
    end if;
    select c.name into new.case_name from cases as c where c.id = new.case_id;
    perform _check_id('case', new.case_id, new.case_name);
    if new.generator_id is not distinct from old.generator_id then
        new.generator_id := case when new.generator is not null then _model_id(new.generator) end;
    end if;
    select m.name into new.generator from models as m where m.id = new.generator_id;
    perform _check_id('model', new.generator_id, new.generator);
    v_problem := _criteria_problem(new.criteria);
    if v_problem is not null then
        raise exception 'rubric of case "%" by %: %', new.case_name, new.author, v_problem
            using errcode = 'PH002', hint = 'criteria is an array such as [{"criterion": "names the medication", "weight": 10}].';
    end if;
    if new.parent_id is not null and not exists (select from rubrics as p where p.id = new.parent_id and p.case_id = new.case_id) then
        raise exception 'parent rubric % is not a rubric of case "%"', new.parent_id, new.case_name
            using errcode = 'PH002', hint = format('List them: select id, author from pgharness.rubrics where case_name = %L;', new.case_name);
    end if;
    if new.validation = 'not_evaluated' then
        new.validated_at := null;
    elsif new.validated_at is null or (tg_op = 'UPDATE' and new.validation <> old.validation and new.validated_at is not distinct from old.validated_at) then
        new.validated_at := clock();
    end if;
    if tg_op = 'UPDATE' and (new.criteria, new.author, new.case_id) is distinct from (old.criteria, old.author, old.case_id) then
        select r.name into v_run from run_rubrics as rr join runs as r on r.id = rr.run_id where rr.rubric_id = old.id order by r.id limit 1;
        if v_run is not null then
            raise exception 'rubric % was used by run "%": its case, author and criteria are frozen', old.id, v_run
                using errcode = 'PH003', hint = format('Insert a new rubric with parent_id => %s; the newest accepted one of an author is used.', old.id);
        end if;
    end if;
    return new;
end;
$$;
comment on function pgharness._resolve_rubrics() is
'Fill a rubric''s case and generator by name or id, stamp its validation, refuse bad criteria (PH002) and changes to one that a run used (PH003).';

create or replace function pgharness._criteria_problem(criteria jsonb) returns text
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select case
        when jsonb_typeof(criteria) is distinct from 'array' then 'criteria must be a JSON array'
        when jsonb_array_length(criteria) = 0 then 'criteria is empty'
        when jsonb_array_length(criteria) > 1000 then format('criteria has %s entries, more than 1000', jsonb_array_length(criteria))
        else coalesce((
            select format('criterion %s %s', c.number, case
                       when jsonb_typeof(c.value) <> 'object' then 'is not an object'
                       when jsonb_typeof(c.value -> 'criterion') is distinct from 'string' or c.value ->> 'criterion' = ''
                           then 'has no text under "criterion"'
                       when jsonb_typeof(c.value -> 'weight') is distinct from 'number' then 'has no number under "weight"'
                       when (c.value ->> 'weight')::numeric not between 0 and 100
                           then format('has weight %s, which is not between 0 and 100', c.value ->> 'weight')
                   end)
              from jsonb_array_elements(criteria) with ordinality as c (value, number)
             where jsonb_typeof(c.value) <> 'object'
                or jsonb_typeof(c.value -> 'criterion') is distinct from 'string' or c.value ->> 'criterion' = ''
                or jsonb_typeof(c.value -> 'weight') is distinct from 'number'
                or (c.value ->> 'weight')::numeric not between 0 and 100
             order by c.number limit 1),
            (select 'the weights add up to 0' from jsonb_array_elements(criteria) as c (value)
             having round(sum((c.value ->> 'weight')::numeric), 4) = 0))
    end;
$$;
comment on function pgharness._criteria_problem(jsonb) is 'What is wrong with a rubric''s criteria, naming the criterion; null when nothing is.';

create or replace function pgharness._protect_rubrics() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run text;
begin
    select r.name into v_run from run_rubrics as rr join runs as r on r.id = rr.run_id where rr.rubric_id = old.id order by r.id limit 1;
    if v_run is not null then
        raise exception 'rubric % was used by run "%" and cannot be deleted', old.id, v_run
            using errcode = 'PH003', hint = format('Take it out of later runs: update pgharness.rubrics set validation = ''refused'' where id = %s;', old.id);
    end if;
    return old;
end;
$$;
comment on function pgharness._protect_rubrics() is 'Refuse to delete a rubric that a run used (PH003).';

create or replace function pgharness._resolve_instance_cases() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    if new.instance_id is not distinct from old.instance_id then
        new.instance_id := _instance_id(new.instance);
    end if;
    if new.case_id is not distinct from old.case_id then
        new.case_id := _case_id(new.case_name);
    end if;
    select i.name into new.instance from instances as i where i.id = new.instance_id;
    perform _check_id('instance', new.instance_id, new.instance);
    select c.name into new.case_name from cases as c where c.id = new.case_id;
    perform _check_id('case', new.case_id, new.case_name);
    return new;
end;
$$;
comment on function pgharness._resolve_instance_cases() is 'Fill instance and case by name or id.';

create or replace function pgharness._resolve_model_combinations() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_provider text;
begin
    if new.instance_id is not distinct from old.instance_id then
        new.instance_id := _instance_id(new.instance);
    end if;
    -- an old name is not looked up again: a model that is renamed may be both, and is renamed here one at a time
    if new.generator_id is not distinct from old.generator_id and (tg_op = 'INSERT' or new.generator is distinct from old.generator) then
        new.generator_id := _model_id(new.generator);
    end if;
    if new.grader_id is not distinct from old.grader_id and (tg_op = 'INSERT' or new.grader is distinct from old.grader) then
        new.grader_id := case when new.grader is not null then _model_id(new.grader) end;
    end if;
    select i.name into new.instance from instances as i where i.id = new.instance_id;
    perform _check_id('instance', new.instance_id, new.instance);
    select m.name, m.provider into new.generator, v_provider from models as m where m.id = new.generator_id;
    perform _check_id('model', new.generator_id, new.generator);
    select m.name into new.grader from models as m where m.id = new.grader_id;
    perform _check_id('model', new.grader_id, new.grader);
    if v_provider = 'metric' then
        raise exception 'generator "%" is a metric, which writes no notes', new.generator
            using errcode = 'PH002', hint = 'Use it as the grader; list generators: select name from pgharness.models where provider <> ''metric'';';
    end if;
    if new.grader_id is not null then
        perform _check_metric(m.model, m.parameters || new.grader_parameters) from models as m
          where m.id = new.grader_id and m.provider = 'metric';
    end if;
    if new.generator_parameters ? 'members' or new.grader_parameters ? 'members' then
        raise exception 'a combination cannot exchange the members of a composite'
            using errcode = 'PH002', hint = 'Insert another composite: insert into pgharness.models (name, provider, parameters) values (''...'', ''ensemble'', ''{"members": [...]}'');';
    end if;
    perform _refuse_secrets(format('generator_parameters of combination "%s"', new.name), new.generator_parameters);
    perform _refuse_secrets(format('grader_parameters of combination "%s"', new.name), new.grader_parameters);
    perform case m.provider when 'simulator' then _check_simulator(laid.what, m.parameters || laid.parameters)
                            else _check_composite_parameters(laid.what, m.provider, m.parameters || laid.parameters) end
       from (values (new.generator_id, new.generator_parameters, format('generator_parameters of combination with "%s"', new.generator)),
                    (new.grader_id, new.grader_parameters, format('grader_parameters of combination with "%s"', new.grader))) as laid (model_id, parameters, what)
       join models as m on m.id = laid.model_id and m.provider in ('simulator', 'ensemble', 'hedge');
    new.name := coalesce(new.name, case when new.grader is null then new.generator else new.generator || ' -> ' || new.grader end);
    return new;
end;
$$;
comment on function pgharness._resolve_model_combinations() is
'Fill instance, generator and grader by name or id, and the name; refuse a metric as generator and bad metric options (PH002).';

create or replace function pgharness._refuse_change() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    if tg_op = 'DELETE' and not exists (select from runs as r where r.id = old.run_id) then
        return old;                                     -- the whole run is being deleted
    end if;
    raise exception 'the definition of run % is frozen', old.run_id
        using errcode = 'PH003', hint = 'Change the instance, and start a new run.';
end;
$$;
comment on function pgharness._refuse_change() is 'Refuse to change what a run was started with (PH003).';

create or replace trigger _100_check before insert or update on pgharness.experiments
    for each row execute function pgharness._check_experiments();
create or replace trigger _100_resolve before insert or update on pgharness.instances
    for each row execute function pgharness._resolve_instances();
create or replace trigger _100_resolve before insert or update on pgharness.cases
    for each row execute function pgharness._resolve_cases();
create or replace trigger _200_protect before delete on pgharness.cases
    for each row execute function pgharness._protect_cases();
create or replace trigger _100_resolve before insert or update on pgharness.rubrics
    for each row execute function pgharness._resolve_rubrics();
create or replace trigger _200_protect before delete on pgharness.rubrics
    for each row execute function pgharness._protect_rubrics();
create or replace trigger _100_resolve before insert or update on pgharness.instance_cases
    for each row execute function pgharness._resolve_instance_cases();
create or replace trigger _100_resolve before insert or update on pgharness.model_combinations
    for each row execute function pgharness._resolve_model_combinations();
create or replace trigger _100_refuse before update or delete on pgharness.run_definitions
    for each row execute function pgharness._refuse_change();
create or replace trigger _100_refuse before update or delete on pgharness.run_cases
    for each row execute function pgharness._refuse_change();
create or replace trigger _100_refuse before update or delete on pgharness.run_rubrics
    for each row execute function pgharness._refuse_change();
-- all but combination_id, which becomes null when the combination is deleted
create or replace trigger _100_refuse
    before delete or update of run_id, number, name, generator_id, generator, grader_id, grader, rubric_count, grade_replications
    on pgharness.run_combinations for each row execute function pgharness._refuse_change();

create or replace function pgharness.add_cases(
    instance text, eligible boolean default false, dataset text default null, names text[] default null
) returns bigint
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_instance instances;
    v_dataset  bigint;
    v_cases    bigint[] := array(select _case_id(n) from unnest(add_cases.names) as n);
    v_count    bigint;
begin
    select * into strict v_instance from instances as i where i.id = _instance_id(add_cases.instance);
    if add_cases.dataset is not null then
        v_dataset := _dataset_id(add_cases.dataset);
    end if;
    insert into instance_cases (instance_id, instance, case_id, case_name)
    select v_instance.id, v_instance.name, c.id, c.name
      from cases as c
     where (v_dataset is null or c.dataset_id = v_dataset)
       and (add_cases.names is null or c.id = any (v_cases))
       and (not add_cases.eligible
            or (select count(*) from accepted_rubrics as a where a.case_id = c.id) >= greatest(v_instance.rubrics_per_case, 1))
     order by c.id
    on conflict on constraint instance_cases_pkey do nothing;
    get diagnostics v_count = row_count;
    if v_count = 0 and not exists (select from instance_cases as ic where ic.instance_id = v_instance.id) then
        raise exception 'no case was added to instance "%"', v_instance.name
            using errcode = 'PH002',
                  detail = case when add_cases.eligible
                      then format('No case has accepted rubrics by %s different human authors.', v_instance.rubrics_per_case)
                      else 'No case matches.' end,
                  hint = case when add_cases.eligible
                      then 'See what is missing: select case_name, author, validation from pgharness.rubrics order by 1;'
                      else 'List cases: select name, dataset from pgharness.cases;' end;
    end if;
    return v_count;
end;
$$;
comment on function pgharness.add_cases(text, boolean, text, text[]) is
'Add cases to an instance: all, or only eligible ones (accepted rubrics by enough human authors), of a dataset, or by name; returns how many were added. Idempotent. Raises PH001, PH002. Example: select pgharness.add_cases(''triage-v2'', eligible => true);';
