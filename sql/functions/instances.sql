-- Instances by name: made, copied; and runs and their logs as those who look at them page through them.

create or replace function pgharness.create_instance(name text, experiment text, config jsonb default '{}', description text default '') returns pgharness.instances
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_instance instances;
    v_schema   jsonb;
begin
    select * into v_instance from instances as i where i.name = create_instance.name;
    if v_instance.id is null then
        insert into instances (name, experiment, config, description)
        values (create_instance.name, create_instance.experiment, coalesce(create_instance.config, '{}'), coalesce(create_instance.description, ''))
        returning * into v_instance;
        return v_instance;
    end if;
    select e.config_schema into v_schema from experiments as e where e.id = v_instance.experiment_id;
    if v_instance.experiment <> create_instance.experiment or v_instance.description <> coalesce(create_instance.description, '')
       or v_instance.config <> _apply_defaults(v_schema, coalesce(create_instance.config, '{}')) then
        raise exception 'there is an instance "%" already, and it is another one', v_instance.name
            using errcode = 'PH004', detail = format('It is one of experiment "%s", with config %s.', v_instance.experiment, v_instance.config),
                  hint = 'Choose another name, or change it: update pgharness.instances set config = ''...'' where name = ''...'';';
    end if;
    return v_instance;
end;
$$;
comment on function pgharness.create_instance(text, text, jsonb, text) is
'Make an instance of an experiment; keys that its configuration leaves out take the defaults. Idempotent. Raises PH001 (unknown experiment), PH002 (the configuration does not fit), PH004 (the name is taken by another one). Example: select pgharness.create_instance(''dice-9'', ''dice'', ''{"rounds": 9}'');';

create or replace function pgharness.clone_instance(source text, name text, config jsonb default null, description text default null) returns pgharness.instances
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_source   instances;
    v_instance instances;
begin
    select * into strict v_source from instances as i where i.id = _instance_id(clone_instance.source);
    select * into v_instance from instances as i where i.name = clone_instance.name;
    if v_instance.id is not null then
        raise exception 'there is an instance "%" already', v_instance.name
            using errcode = 'PH004', hint = 'Choose another name for the copy.';
    end if;
    insert into instances (name, description, project_id, experiment_id, config, note_replications, grade_replications, rubrics_per_case, cycle_times, cycle_transcript_overlaps,
                           software_version, seed, max_attempts, retry_delay_seconds, failure_threshold, budget_usd, batch_deadline_seconds, response_cache, note_system_prompt, note_prompt, grade_system_prompt,
                           grade_prompt)
    values (clone_instance.name, coalesce(clone_instance.description, v_source.description), v_source.project_id, v_source.experiment_id,
            coalesce(clone_instance.config, v_source.config), v_source.note_replications, v_source.grade_replications, v_source.rubrics_per_case, v_source.cycle_times,
            v_source.cycle_transcript_overlaps, v_source.software_version, v_source.seed, v_source.max_attempts, v_source.retry_delay_seconds, v_source.failure_threshold,
            v_source.budget_usd, v_source.batch_deadline_seconds, v_source.response_cache, v_source.note_system_prompt, v_source.note_prompt, v_source.grade_system_prompt, v_source.grade_prompt)
    returning * into v_instance;
    insert into instance_cases (instance_id, instance, case_id, case_name)
    select v_instance.id, v_instance.name, ic.case_id, ic.case_name from instance_cases as ic where ic.instance_id = v_source.id order by ic.case_id;
    insert into model_combinations (instance_id, instance, name, generator_id, generator, generator_parameters, generator_is_reasoning, grader_id, grader, grader_parameters, grader_is_reasoning)
    select v_instance.id, v_instance.name, mc.name, mc.generator_id, mc.generator, mc.generator_parameters, mc.generator_is_reasoning,
           mc.grader_id, mc.grader, mc.grader_parameters, mc.grader_is_reasoning
      from model_combinations as mc where mc.instance_id = v_source.id order by mc.id;
    return v_instance;
end;
$$;
comment on function pgharness.clone_instance(text, text, jsonb, text) is
'Copy an instance under another name, with its cases and model combinations; another configuration or description takes the place of its own. Raises PH001, PH002 (the configuration does not fit), PH004 (the name is taken). Example: select pgharness.clone_instance(''dice-9'', ''dice-99'', config => ''{"rounds": 99}'');';

create or replace function pgharness.latest_runs(instance text default null, experiment text default null, most integer default 20) returns setof pgharness.runs
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_instance_id   bigint := case when latest_runs.instance is not null then _instance_id(latest_runs.instance) end;
    v_experiment_id bigint := case when latest_runs.experiment is not null then _experiment_id(latest_runs.experiment) end;
begin
    return query
    select r.* from runs as r
     where (v_instance_id is null or r.instance_id = v_instance_id)
       and (v_experiment_id is null or exists (select from instances as i where i.id = r.instance_id and i.experiment_id = v_experiment_id))
     order by r.id desc limit latest_runs.most;
end;
$$;
comment on function pgharness.latest_runs(text, text, integer) is
'The latest runs, newest first: all, or those of an instance or an experiment. Raises PH001. Example: select id, name, status from pgharness.latest_runs(experiment => ''dice'');';

create or replace function pgharness.read_log(run_id bigint, after bigint default 0, lowest text default 'debug', most integer default 1000)
    returns table (id bigint, created_at timestamptz, level text, message text, data jsonb, task bigint, attempt integer)
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select l.id, l.created_at, l.level, l.message, l.data, l.task, l.attempt
      from logs as l
     where l.run_id = read_log.run_id and l.id > read_log.after
       and array_position('{debug,info,warning,error}', l.level) >= array_position('{debug,info,warning,error}', read_log.lowest)
     order by l.id limit read_log.most;
$$;
comment on function pgharness.read_log(bigint, bigint, text, integer) is
'A page of a run''s log: lines of a level or above that come after the one with a given id, oldest first. A line may appear below one that was read, when it was written at the same time by another process. Example: select created_at, level, message from pgharness.read_log(7, after => 1200, lowest => ''info'');';

create or replace function pgharness.record_result(run_id bigint, key text, value jsonb) returns bigint
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into results (run_id, key, value) values (record_result.run_id, record_result.key, record_result.value) returning id;
$$;
comment on function pgharness.record_result(bigint, text, jsonb) is
'Add a result to a run under a key; the newest of a key counts. Returns its id. Example: select pgharness.record_result(7, ''conclusion'', ''"B is better"'');';

create or replace function pgharness.log(run_id bigint, message text, level text default 'info', data jsonb default '{}') returns bigint
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into logs (run_id, level, message, data) values (log.run_id, log.level, log.message, log.data) returning id;
$$;
comment on function pgharness.log(bigint, text, text, jsonb) is
'Add a line to the log of a run, or of the harness when run_id is null. Returns its id. Example: select pgharness.log(7, ''doubled the workers'');';
