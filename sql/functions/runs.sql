-- The life of a run: start, pause, resume, cancel, retry, rerun, and what happens when its last item is done.

create or replace function pgharness._receipt(run_id bigint) returns pgharness.run_receipt
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select (r.id, r.name, r.status, r.reason, r.note_count, r.grade_count)::run_receipt from runs as r where r.id = _receipt.run_id;
$$;
comment on function pgharness._receipt(bigint) is 'What a run control function answers about a run.';

create or replace function pgharness._cost_usd(run pgharness.runs) returns numeric
    language sql immutable security invoker          -- no pinned path: it names nothing, and is inlined
as $$ select (run).note_cost_usd + (run).grade_cost_usd + (run).task_cost_usd; $$;
comment on function pgharness._cost_usd(pgharness.runs) is 'What a run has cost so far.';

create or replace function pgharness._plan_run() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    perform _check_settings(new.kind, new.budget_usd::double precision, new.priority, new.max_concurrency, new.batch_deadline_seconds, new.response_cache);
    if new.rerun_of_id is not null then
        select r.instance_id, r.instance into new.instance_id, new.instance from runs as r where r.id = new.rerun_of_id;
        perform _check_id('run', new.rerun_of_id, new.instance);
    elsif new.instance_id is null then
        new.instance_id := _instance_id(new.instance);
    end if;
    -- the lock makes two starts of one instance take two different default names
    select i.name, coalesce(new.budget_usd, i.budget_usd), nullif(coalesce(new.batch_deadline_seconds, i.batch_deadline_seconds), 0), coalesce(new.response_cache, i.response_cache),
           coalesce((select d.definition ->> 'failure_threshold' from run_definitions as d where d.run_id = new.rerun_of_id)::double precision, i.failure_threshold)
      into new.instance, new.budget_usd, new.batch_deadline_seconds, new.response_cache, new.failure_threshold
      from instances as i where i.id = new.instance_id for no key update;
    perform _check_id('instance', new.instance_id, new.instance);
    new.batch_deadline_seconds := case when new.response_cache <> 'replay' then new.batch_deadline_seconds end;  -- it asks nobody
    if new.name is null then
        -- among all runs: another instance may have had this name before
        select new.instance || '/' || coalesce(max(substring(r.name from '/(\d{1,9})$')::integer), 0) + 1 into new.name
          from runs as r where r.name like replace(replace(new.instance, '\', '\\'), '_', '\_') || '/%';
    end if;
    perform _refuse_spent(new);
    new.status := 'running';
    new.activated_at := clock();
    return new;
end;
$$;
comment on function pgharness._plan_run() is 'Fill a new run''s instance by name or id, its name, and its budget; refuse settings that no run can have (PH002).';

create or replace function pgharness._freeze_run() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_is_code boolean := (select e.kind = 'code' from instances as i join experiments as e on e.id = i.experiment_id where i.id = new.instance_id);
    v_notes   bigint;
    v_grades  bigint;
begin
    if new.rerun_of_id is not null then
        perform _copy_definition(new.rerun_of_id, new.id);
        v_is_code := (select d.definition ? 'code' from run_definitions as d where d.run_id = new.id);
    elsif v_is_code then
        perform _freeze_code(new.id, new.instance_id);
    else
        perform _freeze_instance(new.id, new.instance_id);
    end if;
    if v_is_code then
        perform _plan_code(new.id);
        return null;
    end if;
    select d.case_count::bigint * d.combination_count * cardinality(d.transcript_overlaps) * (d.definition ->> 'note_replications')::integer,
           d.case_count::bigint * cardinality(d.transcript_overlaps) * (d.definition ->> 'note_replications')::integer
               * (select sum(c.grades_per_note) from run_combinations as c where c.run_id = new.id)
      into v_notes, v_grades
      from run_definitions as d where d.run_id = new.id;
    update runs as r set note_count = v_notes, grade_count = v_grades where r.id = new.id;
    perform _defer_range(new.id, 'note', 0, v_notes - 1, _slice_size(v_notes, _item_seconds(new.id, 'note')));
    return null;
end;
$$;
comment on function pgharness._freeze_run() is 'Freeze what a new run uses, count its plan, and queue its notes, or its code: all in the transaction of the insert.';

create or replace function pgharness._freeze_instance(run_id bigint, instance_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_instance   instances;
    v_experiment experiments;
    v_cases      integer;
begin
    select * into strict v_instance from instances as i where i.id = _freeze_instance.instance_id;
    select * into strict v_experiment from experiments as e where e.id = v_instance.experiment_id;
    -- a case or rubric that is being edited is waited for, and one edited later is refused
    with locked as (
        select c.id, c.digest from instance_cases as ic join cases as c on c.id = ic.case_id
         where ic.instance_id = v_instance.id order by c.id for share of c)
    insert into run_cases (run_id, number, case_id, digest)
    select _freeze_instance.run_id, row_number() over (order by c.id) - 1, c.id, c.digest from locked as c;
    get diagnostics v_cases = row_count;
    perform from rubrics as r where r.case_id in (select ic.case_id from instance_cases as ic where ic.instance_id = v_instance.id) for share;
    if v_cases = 0 then
        raise exception 'instance "%" has no cases', v_instance.name
            using errcode = 'PH003', hint = format('Add some: select pgharness.add_cases(%L, eligible => true);', v_instance.name);
    end if;
    insert into run_combinations (run_id, number, name, combination_id, generator_id, generator, grader_id, grader, rubric_count, grade_replications)
    select _freeze_instance.run_id, row_number() over (order by mc.id) - 1, mc.name, mc.id,
           g.id, _frozen_model(g, mc.generator_parameters, mc.generator_is_reasoning),
           j.id, case when j.id is not null then _frozen_model(j, mc.grader_parameters, mc.grader_is_reasoning) end,
           case when j.provider = 'metric' or j.id is null then 0 else v_instance.rubrics_per_case end,
           case when j.id is null then 0 when j.provider = 'metric' then 1 else v_instance.grade_replications end
      from model_combinations as mc
      join models as g on g.id = mc.generator_id
      left join models as j on j.id = mc.grader_id
     where mc.instance_id = v_instance.id;
    if not found then
        raise exception 'instance "%" has no model combinations', v_instance.name
            using errcode = 'PH003', hint = format('Add one: insert into pgharness.model_combinations (instance, generator, grader) values (%L, ''...'', ''...'');', v_instance.name);
    end if;
    insert into run_definitions (run_id, definition, case_count, combination_count, transcript_overlaps, grade_stride)
    select _freeze_instance.run_id,
           to_jsonb(v_instance) - '{id,project_id,experiment_id,created_at,budget_usd,total_budget_usd,batch_deadline_seconds,response_cache,note_system_prompt,note_prompt,grade_system_prompt,grade_prompt}'::text[]
           || jsonb_build_object(
               'prompts', jsonb_build_object(
                   'note_system', coalesce(v_instance.note_system_prompt, v_experiment.note_system_prompt),
                   'note', coalesce(v_instance.note_prompt, v_experiment.note_prompt),
                   'grade_system', coalesce(v_instance.grade_system_prompt, v_experiment.grade_system_prompt),
                   'grade', coalesce(v_instance.grade_prompt, v_experiment.grade_prompt)),
               'cases_digest', (select encode(sha256(convert_to(string_agg(rc.digest, E'\n' order by rc.number), 'UTF8')), 'hex')
                                  from run_cases as rc where rc.run_id = _freeze_instance.run_id)) || _registered_plan(v_instance.id),
           v_cases, count(*), v_instance.cycle_transcript_overlaps, greatest(max(c.grades_per_note), 1)
      from run_combinations as c where c.run_id = _freeze_instance.run_id;
    perform _freeze_rubrics(_freeze_instance.run_id, v_instance.name, v_instance.rubrics_per_case);
end;
$$;
comment on function pgharness._freeze_instance(bigint, bigint) is
'Copy into a run what its instance says now: cases, models, prompts, config. Raises PH003 when something to run is missing.';

create or replace function pgharness._freeze_rubrics(run_id bigint, instance text, rubrics_per_case integer) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_needs_target boolean;
    v_found        bigint;
    v_lacking      text[];
begin
    if exists (select from run_combinations as c where c.run_id = _freeze_rubrics.run_id and c.rubric_count > 0) then
        insert into run_rubrics (run_id, case_number, number, rubric_id)
        select rc.run_id, rc.number, a.author_rank, a.rubric_id
          from run_cases as rc join accepted_rubrics as a on a.case_id = rc.case_id
         where rc.run_id = _freeze_rubrics.run_id and a.author_rank <= _freeze_rubrics.rubrics_per_case;
        get diagnostics v_found = row_count;
        if v_found < rubrics_per_case * (select count(*) from run_cases as rc where rc.run_id = _freeze_rubrics.run_id) then
            v_lacking := array(
                select c.name from run_cases as rc join cases as c on c.id = rc.case_id
                 where rc.run_id = _freeze_rubrics.run_id
                   and (select count(*) from run_rubrics as rr where rr.run_id = rc.run_id and rr.case_number = rc.number) < rubrics_per_case
                 order by rc.number);
            raise exception '% of the cases of instance "%" lack accepted rubrics by % different human authors',
                            cardinality(v_lacking), instance, rubrics_per_case
                using errcode = 'PH003', detail = 'For example: ' || array_to_string(v_lacking[1:5], ', '),
                      hint = 'Keep the eligible ones (delete from pgharness.instance_cases, then add_cases(..., eligible => true)), or set rubrics_per_case lower; 0 grades against the target.';
        end if;
    end if;
    select bool_or(c.grader_id is not null and c.rubric_count = 0
                   and not (c.grader ->> 'model' = 'regex' and c.grader -> 'parameters' ? 'pattern')
                   and not (c.grader ->> 'provider' = 'metric' and c.grader ->> 'model' like 'plugin:%'))
      into v_needs_target from run_combinations as c where c.run_id = _freeze_rubrics.run_id;
    if v_needs_target then
        v_lacking := array(
            select c.name from run_cases as rc join cases as c on c.id = rc.case_id
             where rc.run_id = _freeze_rubrics.run_id and c.target is null order by rc.number);
        if cardinality(v_lacking) > 0 then
            raise exception '% of the cases of instance "%" have no target to grade against', cardinality(v_lacking), instance
                using errcode = 'PH003', detail = 'For example: ' || array_to_string(v_lacking[1:5], ', '),
                      hint = 'Set it: update pgharness.cases set target = to_jsonb(''...''::text) where name = ''...'';';
        end if;
    end if;
end;
$$;
comment on function pgharness._freeze_rubrics(bigint, text, integer) is
'Pick the rubrics that grade each case of a run: the most recently accepted of each human author, newest author first. Raises PH003 naming the cases that lack rubrics or targets.';

create or replace function pgharness._frozen_model(model pgharness.models, parameters jsonb, is_reasoning boolean) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select to_jsonb(_priced(model)) - '{description,created_at}'::text[]
           || jsonb_build_object('parameters', (model).parameters || _frozen_model.parameters,
                                 'is_reasoning', coalesce(_frozen_model.is_reasoning, (model).is_reasoning))
           || case when (model).provider in ('ensemble', 'hedge') then jsonb_build_object('members', (
                  select jsonb_agg(_frozen_model(m, '{}', null) order by named.number)
                    from _member_names((model).parameters || _frozen_model.parameters) as named join models as m on m.name = named.name)) else '{}' end;
$$;
comment on function pgharness._frozen_model(pgharness.models, jsonb, boolean) is 'A model as a run keeps it: with the prices of now, with the combination''s parameters laid over its own, and the members of a composite with it.';

create or replace function pgharness._repriced_model(frozen jsonb) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select frozen || coalesce((
               select (select jsonb_object_agg(price.key, price.value) from jsonb_each(to_jsonb(_priced(m))) as price where price.key like '%usd_per_million' or price.key = 'batch_price_factor')
                 from models as m where m.id = (frozen ->> 'id')::bigint), '{}')
           || case when frozen ? 'members' then jsonb_build_object('members', (
                  select jsonb_agg(_repriced_model(member.value) order by member.number) from jsonb_array_elements(frozen -> 'members') with ordinality as member (value, number)))
                   else '{}' end;
$$;
comment on function pgharness._repriced_model(jsonb) is 'A model as a run kept it, with the prices of now, and its members likewise; one that is gone keeps its prices.';

create or replace function pgharness._copy_definition(from_run_id bigint, to_run_id bigint) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into run_cases (run_id, number, case_id, digest)
    select to_run_id, c.number, c.case_id, c.digest from run_cases as c where c.run_id = from_run_id;
    insert into run_combinations (run_id, number, name, combination_id, generator_id, generator, grader_id, grader, rubric_count, grade_replications)
    select to_run_id, c.number, c.name, c.combination_id, c.generator_id, _repriced_model(c.generator), c.grader_id, _repriced_model(c.grader), c.rubric_count, c.grade_replications
      from run_combinations as c where c.run_id = from_run_id;
    insert into run_definitions (run_id, definition, case_count, combination_count, transcript_overlaps, grade_stride)
    select to_run_id, d.definition, d.case_count, d.combination_count, d.transcript_overlaps, d.grade_stride
      from run_definitions as d where d.run_id = from_run_id;
    insert into run_rubrics (run_id, case_number, number, rubric_id)
    select to_run_id, rr.case_number, rr.number, rr.rubric_id from run_rubrics as rr where rr.run_id = from_run_id;
$$;
comment on function pgharness._copy_definition(bigint, bigint) is 'Give a rerun the frozen definition of the run it repeats, with the prices of now.';

-- a run that is inserted finished is history (import_run): nothing to plan, freeze or queue
create or replace trigger _100_plan before insert on pgharness.runs
    for each row when (new.finished_at is null) execute function pgharness._plan_run();
create or replace trigger _500_freeze after insert on pgharness.runs
    for each row when (new.finished_at is null) execute function pgharness._freeze_run();

create or replace function pgharness._delete_items() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    delete from grades as g where g.run_id = old.id;
    delete from notes as n where n.run_id = old.id;
    delete from calls as c where c.run_id = old.id;
    perform _drop_settled(old.id, null);
    return old;
end;
$$;
comment on function pgharness._delete_items() is
'Delete a run''s notes, grades, their sums, and calls with it. Nobody adds any meanwhile: who records an outcome locks the run''s row first.';
create or replace trigger _100_delete_items before delete on pgharness.runs
    for each row execute function pgharness._delete_items();

create or replace function pgharness._delete_inputs() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    delete from run_rubrics as rr where rr.run_id = old.id;
    delete from run_cases as rc where rc.run_id = old.id;
    return null;
end;
$$;
comment on function pgharness._delete_inputs() is 'Delete a run''s frozen cases and rubrics once it is gone: until then they cannot be changed.';
create or replace trigger _500_delete_inputs after delete on pgharness.runs
    for each row execute function pgharness._delete_inputs();

create or replace function pgharness._announce_run() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if tg_op = 'INSERT' or new.status <> old.status or new.reason is distinct from old.reason then
        insert into logs (run_id, level, message, data)
        values (new.id, case when new.status = 'failed' then 'error' when new.reason is not null then 'warning' else 'info' end,
                case when tg_op = 'INSERT' then 'started' else new.status end || coalesce(': ' || new.reason, ''),
                jsonb_build_object('by', session_user));
        perform pg_notify('pgharness', jsonb_build_object(
            'event', case when tg_op = 'INSERT' then 'run.started' else 'run.' || new.status end, 'run_id', new.id, 'run', left(new.name, 500),
            'status', new.status, 'previous_status', case when tg_op = 'UPDATE' then old.status end, 'reason', left(new.reason, 500), 'at', clock())::text);
    end if;
    return null;
end;
$$;
comment on function pgharness._announce_run() is
'Log every change of a run''s state and NOTIFY channel pgharness. Payload: event (run.started, run.running, run.paused, run.completed, run.failed, run.cancelled), run_id, run, status, previous_status, reason, at.';
create or replace trigger _900_announce_insert after insert on pgharness.runs
    for each row when (new.finished_at is null) execute function pgharness._announce_run();
create or replace trigger _900_announce_update after update of status, reason on pgharness.runs
    for each row execute function pgharness._announce_run();

create or replace function pgharness._set_status(run_id bigint, status text, reason text) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    update runs as r
       set status = _set_status.status,
           reason = _set_status.reason,
           active_seconds = r.active_seconds + coalesce(extract(epoch from clock() - r.activated_at), 0),
           activated_at = case when _set_status.status = 'running' then clock() end,
           finished_at = case when _set_status.status in ('completed', 'failed', 'cancelled') then clock() end
     where r.id = _set_status.run_id;
    if _set_status.status <> 'running' then
        perform _drop_jobs(_set_status.run_id);
        update batches as b set due_at = clock() where b.run_id = _set_status.run_id and b.finished_at is null;
    end if;
end;
$$;
comment on function pgharness._set_status(bigint, text, text) is 'Move a run to a state, keeping its clock, and drop its waiting jobs unless it runs.';

drop function if exists pgharness._pause_at_budget(pgharness.runs);
create or replace function pgharness._settle_run(run_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run    runs;
    v_failed bigint;
begin
    select * into strict v_run from runs as r where r.id = _settle_run.run_id;
    if v_run.finished_at is not null then
        return;
    end if;
    v_failed := v_run.notes_failed + v_run.grades_failed + v_run.grades_skipped;
    if v_run.task_count > 0 then                        -- code ends when its function does
        perform _pause_if_spent(v_run);
    elsif v_failed > v_run.failure_threshold * (v_run.note_count + v_run.grade_count) then
        perform _set_status(v_run.id, 'failed', format('%s notes and %s grades failed (%s grades of failed notes are skipped), more than %s%% of %s',
                                                       v_run.notes_failed, v_run.grades_failed, v_run.grades_skipped, round((v_run.failure_threshold * 100)::numeric, 2),
                                                       v_run.note_count + v_run.grade_count));
    elsif v_run.notes_succeeded + v_run.notes_failed = v_run.note_count
      and v_run.grades_succeeded + v_run.grades_failed + v_run.grades_skipped = v_run.grade_count then
        perform _set_status(v_run.id, 'completed', null);
    elsif _cost_usd(v_run) >= v_run.budget_usd or v_run.status = 'paused' then
        perform _pause_if_spent(v_run);
    end if;
end;
$$;
comment on function pgharness._settle_run(bigint) is
'End or pause a run whose counters say so: completed, failed past its threshold, or paused at its budget. The caller holds the run''s row lock.';

create or replace function pgharness._lock_run(run_id bigint) returns pgharness.runs
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs;
begin
    select * into v_run from runs as r where r.id = _lock_run.run_id for no key update;
    if not found then
        perform _refuse_unknown('run', _lock_run.run_id::text, array(select format('%s (%s)', r.id, r.name) from runs as r order by r.id desc limit 5),
                                'List runs: select run_id, run, status from pgharness.run_progress;');
    end if;
    return v_run;
end;
$$;
comment on function pgharness._lock_run(bigint) is 'Lock a run''s row, so that its state changes one transaction at a time. Raises PH001.';

drop function if exists pgharness.start_run(text, text, text, double precision, integer, text, integer), pgharness.rerun(bigint, text, text), pgharness.rerun(text, text, text);
create or replace function pgharness.start_run(
    instance text, kind text default 'trial', idempotency_key text default null, budget_usd double precision default null,
    priority integer default 0, name text default null, max_concurrency integer default null, batch_deadline_seconds double precision default null,
    response_cache text default null
) returns pgharness.run_receipt
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_instance_id bigint := _instance_id(start_run.instance);
    v_run         record;
    v_id          bigint;
begin
    perform _check_settings(budget_usd => start_run.budget_usd);  -- its column could not even hold some
    if start_run.idempotency_key is not null then
        -- two starts with one key: the second waits here for the first
        perform pg_advisory_xact_lock(hashtextextended('pgharness.start_run ' || start_run.idempotency_key, 0));
        select r.id, r.instance_id, r.kind, r.name, r.rerun_of_id into v_run from runs as r where r.idempotency_key = start_run.idempotency_key;
        if found then
            if v_run.instance_id <> v_instance_id or v_run.kind <> start_run.kind or v_run.rerun_of_id is not null then
                raise exception 'idempotency key "%" already started run "%" (%)', start_run.idempotency_key, v_run.name, v_run.kind
                    using errcode = 'PH004', hint = 'Use another key for another run.';
            end if;
            return _receipt(v_run.id);
        end if;
    end if;
    insert into runs (instance_id, instance, kind, idempotency_key, budget_usd, priority, name, max_concurrency, batch_deadline_seconds, response_cache)
    values (v_instance_id, start_run.instance, start_run.kind, start_run.idempotency_key, start_run.budget_usd, start_run.priority, start_run.name,
            start_run.max_concurrency, start_run.batch_deadline_seconds, start_run.response_cache)
    returning id into v_id;
    return _receipt(v_id);
end;
$$;
comment on function pgharness.start_run(text, text, text, double precision, integer, text, integer, double precision, text) is
'Start a run of an instance: freeze what it uses and queue its work, in this transaction. A batch_deadline_seconds takes the place of the instance''s (0 asks live), and so does a response_cache (off, read, write, replay). With an idempotency key a second call returns the first run. Raises PH001, PH002, PH003 (nothing to run), PH004 (key used for something else). Example: select run_id from pgharness.start_run(''triage-v2'', kind => ''milestone'');';

create or replace function pgharness.rerun(run_id bigint, kind text default null, idempotency_key text default null, response_cache text default null) returns pgharness.run_receipt
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_run   runs;
    v_other record;
    v_id    bigint;
begin
    select * into v_run from runs as r where r.id = rerun.run_id;
    perform _check_id('run', rerun.run_id, v_run.name);
    if rerun.idempotency_key is not null then
        perform pg_advisory_xact_lock(hashtextextended('pgharness.start_run ' || rerun.idempotency_key, 0));
        select r.id, r.name, r.kind, r.rerun_of_id into v_other from runs as r where r.idempotency_key = rerun.idempotency_key;
        if found then
            if v_other.rerun_of_id is distinct from v_run.id or v_other.kind <> coalesce(rerun.kind, v_run.kind) then
                raise exception 'idempotency key "%" already started run "%" (%)', rerun.idempotency_key, v_other.name, v_other.kind
                    using errcode = 'PH004', hint = 'Use another key for another run.';
            end if;
            return _receipt(v_other.id);
        end if;
    end if;
    insert into runs (instance_id, instance, kind, idempotency_key, budget_usd, priority, max_concurrency, batch_deadline_seconds, response_cache, rerun_of_id)
    values (v_run.instance_id, v_run.instance, coalesce(rerun.kind, v_run.kind), rerun.idempotency_key, v_run.budget_usd, v_run.priority,
            v_run.max_concurrency, coalesce(v_run.batch_deadline_seconds, 0), coalesce(rerun.response_cache, v_run.response_cache), v_run.id)
    returning id into v_id;
    return _receipt(v_id);
end;
$$;
comment on function pgharness.rerun(bigint, text, text, text) is
'Start a new run with the frozen definition of an earlier one: same cases, rubrics, models, prompts and seed, whatever the instance says now. With response_cache => ''replay'' a run that kept its answers is made again without a call. With an idempotency key a second call returns the first rerun. Raises PH001, PH004 (key used for something else). Example: select run_id from pgharness.rerun(7);';

create or replace function pgharness.pause_run(run_id bigint, reason text default 'paused by hand') returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs := _lock_run(pause_run.run_id);
begin
    if v_run.status = 'running' then
        perform _set_status(v_run.id, 'paused', pause_run.reason);
    elsif v_run.status <> 'paused' then
        raise exception 'run % is already %', v_run.id, v_run.status
            using errcode = 'PH003', hint = 'Only a running run can be paused.';
    end if;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.pause_run(bigint, text) is
'Stop starting calls of a run; calls in flight end and are kept. Idempotent. Raises PH001, PH003. Example: select pgharness.pause_run(7);';

create or replace function pgharness.resume_run(run_id bigint, budget_usd double precision default null, failure_threshold double precision default null)
    returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run       runs := _lock_run(resume_run.run_id);
    v_budget    numeric;
    v_threshold double precision := coalesce(resume_run.failure_threshold, v_run.failure_threshold);
begin
    perform _check_settings(budget_usd => nullif(greatest(resume_run.budget_usd, 0), 0), failure_threshold => resume_run.failure_threshold);  -- 0 is spent: below
    v_budget := coalesce(resume_run.budget_usd::numeric, v_run.budget_usd);
    if v_run.status = 'completed' then
        raise exception 'run % is already completed', v_run.id
            using errcode = 'PH003', hint = format('Try its failed items again: select pgharness.retry_failed(%s); or start anew: select pgharness.rerun(%s);', v_run.id, v_run.id);
    elsif v_run.tasks_failed > 0 and exists (select from tasks as t where t.run_id = v_run.id and t.ordinal = 0 and t.status = 'failed') then
        raise exception 'run % is already failed: %', v_run.id, v_run.reason
            using errcode = 'PH003', hint = format('Run it again, with what it has done: select pgharness.retry_failed(%s);', v_run.id);
    elsif v_run.status = 'failed'
      and v_run.notes_failed + v_run.grades_failed + v_run.grades_skipped > v_threshold * (v_run.note_count + v_run.grade_count) then
        raise exception 'run % is already failed: more of its notes and grades failed than % percent of the plan', v_run.id, round((v_threshold * 100)::numeric, 2)
            using errcode = 'PH003', hint = format('Try them again: select pgharness.retry_failed(%s); or go on without them: select pgharness.resume_run(%s, failure_threshold => 1);', v_run.id, v_run.id);
    end if;
    v_run.budget_usd := v_budget;
    perform _refuse_spent(v_run);
    update runs as r set budget_usd = v_budget, failure_threshold = v_threshold where r.id = v_run.id;
    if v_run.status <> 'running' then
        perform _set_status(v_run.id, 'running', null);
        perform _requeue(v_run.id);
    end if;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.resume_run(bigint, double precision, double precision) is
'Continue a paused, cancelled or failed run with what it has not done yet, optionally with another budget or failure threshold. Calls that are still in flight from before may be made twice; their outcome counts once. Idempotent. Raises PH001, PH002, PH003 (it is completed, or too much of it failed), PH006 (a budget of the run, its instance or its project is still spent). Example: select pgharness.resume_run(7, budget_usd => 20);';

create or replace function pgharness.adjust_run(run_id bigint, priority integer default null, max_concurrency integer default null)
    returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs := _lock_run(adjust_run.run_id);
begin
    perform _check_settings(priority => adjust_run.priority, max_concurrency => nullif(adjust_run.max_concurrency, 0));
    update runs as r
       set priority = coalesce(adjust_run.priority, r.priority),
           max_concurrency = case when adjust_run.max_concurrency = 0 then null else coalesce(adjust_run.max_concurrency, r.max_concurrency) end
     where r.id = v_run.id;
    if adjust_run.priority <> v_run.priority and _queue_exists() then
        -- a job that somebody holds is not waited for, lest a sweep that holds it wait for us: it ends, is put back with the new priority, or at worst
        -- keeps the old one
        update procrastinate.procrastinate_jobs as j set priority = j.priority + (adjust_run.priority - v_run.priority) * 1000000
         where j.id = any (array(select w.id from procrastinate.procrastinate_jobs as w
                                  where w.status in ('todo', 'doing') and w.task_name = 'pgharness.slice' and (w.args ->> 'run_id')::bigint = v_run.id
                                    for update skip locked));
    end if;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.adjust_run(bigint, integer, integer) is
'Change the priority of a run (what is waiting moves in the queue), or how many calls it may have in flight on all workers together (0 removes the cap; a lower one holds once the calls in flight have ended); null leaves a setting as it is. Idempotent. Raises PH001, PH002. Example: select pgharness.adjust_run(7, priority => 5, max_concurrency => 20);';

create or replace function pgharness.cancel_run(run_id bigint, reason text default 'cancelled by hand') returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs := _lock_run(cancel_run.run_id);
begin
    if v_run.status in ('running', 'paused') then
        perform _set_status(v_run.id, 'cancelled', cancel_run.reason);
    elsif v_run.status <> 'cancelled' then
        raise exception 'run % is already %', v_run.id, v_run.status
            using errcode = 'PH003', hint = 'Only running or paused runs can be cancelled.';
    end if;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.cancel_run(bigint, text) is
'Stop a run: waiting work is dropped, calls in flight are aborted within 2 seconds on every host, what is done is kept. Idempotent. Raises PH001, PH003. Example: select pgharness.cancel_run(7);';

create or replace function pgharness.retry_failed(run_id bigint) returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run    runs := _lock_run(retry_failed.run_id);
    v_notes  bigint[];
    v_grades bigint[];
begin
    if v_run.status = 'cancelled' then
        raise exception 'run % is cancelled', v_run.id
            using errcode = 'PH003', hint = format('Continue it first: select pgharness.resume_run(%s);', v_run.id);
    end if;
    with reset as (
        update failures as f
           set status = 'waiting', attempts = 0, delays = 0, crashes = 0, first_delayed_at = null, next_attempt_at = clock(), updated_at = clock()
         where f.run_id = v_run.id and f.status = 'failed'
        returning f.kind, f.ordinal
    )
    select coalesce(array_agg(x.ordinal order by x.ordinal) filter (where x.kind = 'note'), '{}'),
           coalesce(array_agg(x.ordinal order by x.ordinal) filter (where x.kind = 'grade'), '{}')
      into v_notes, v_grades from reset as x;
    if v_run.task_count > 0 then
        perform _retry_tasks(v_run);
        return _receipt(v_run.id);
    elsif v_notes || v_grades = '{}' then
        return _receipt(v_run.id);
    end if;
    update runs as r set notes_failed = 0, grades_failed = 0, grades_skipped = 0, settled_notes = 0, reopenings = r.reopenings + 1 where r.id = v_run.id;
    if v_run.status = 'running' then                    -- what is in flight goes on
        perform _defer_list(v_run.id, 'note', v_notes, 100);
        perform _defer_list(v_run.id, 'grade', v_grades, 100);
    elsif v_run.finished_at is not null then
        perform _set_status(v_run.id, 'running', null);
        perform _requeue(v_run.id);
    end if;
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.retry_failed(bigint) is
'Try the failed notes and grades of a run again, with all their attempts, or the failed tasks of a run of code; reopens a finished run. Does nothing when none failed. Raises PH001, PH003. Example: select pgharness.retry_failed(7);';

create or replace function pgharness.requeue_run(run_id bigint) returns pgharness.run_receipt
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs := _lock_run(requeue_run.run_id);
begin
    if v_run.status <> 'running' then
        raise exception 'run % is %', v_run.id, v_run.status
            using errcode = 'PH003', hint = format('Only a running run has work to queue; continue it: select pgharness.resume_run(%s);', v_run.id);
    end if;
    perform _requeue(v_run.id);
    return _receipt(v_run.id);
end;
$$;
comment on function pgharness.requeue_run(bigint) is
'Queue everything that a running run has not done yet, from its own rows alone: the remedy when the queue was lost. Idempotent. Raises PH001, PH003. Example: select pgharness.requeue_run(7);';

-- A run may be named as well as numbered.
create or replace function pgharness.rerun(run text, kind text default null, idempotency_key text default null, response_cache text default null) returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select rerun(_run_id(rerun.run), rerun.kind, rerun.idempotency_key, rerun.response_cache); $$;
comment on function pgharness.rerun(text, text, text, text) is 'rerun() of a run given by name. Example: select run_id from pgharness.rerun(''triage-v2/1'');';

create or replace function pgharness.pause_run(run text, reason text default 'paused by hand') returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select pause_run(_run_id(pause_run.run), pause_run.reason); $$;
comment on function pgharness.pause_run(text, text) is 'pause_run() of a run given by name. Example: select pgharness.pause_run(''triage-v2/1'');';

create or replace function pgharness.resume_run(run text, budget_usd double precision default null, failure_threshold double precision default null)
    returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select resume_run(_run_id(resume_run.run), resume_run.budget_usd, resume_run.failure_threshold); $$;
comment on function pgharness.resume_run(text, double precision, double precision) is 'resume_run() of a run given by name. Example: select pgharness.resume_run(''triage-v2/1'');';

create or replace function pgharness.adjust_run(run text, priority integer default null, max_concurrency integer default null) returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select adjust_run(_run_id(adjust_run.run), adjust_run.priority, adjust_run.max_concurrency); $$;
comment on function pgharness.adjust_run(text, integer, integer) is 'adjust_run() of a run given by name. Example: select pgharness.adjust_run(''triage-v2/1'', priority => 5);';

create or replace function pgharness.cancel_run(run text, reason text default 'cancelled by hand') returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select cancel_run(_run_id(cancel_run.run), cancel_run.reason); $$;
comment on function pgharness.cancel_run(text, text) is 'cancel_run() of a run given by name. Example: select pgharness.cancel_run(''triage-v2/1'');';

create or replace function pgharness.retry_failed(run text) returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select retry_failed(_run_id(retry_failed.run)); $$;
comment on function pgharness.retry_failed(text) is 'retry_failed() of a run given by name. Example: select pgharness.retry_failed(''triage-v2/1'');';

create or replace function pgharness.requeue_run(run text) returns pgharness.run_receipt
    language sql volatile security invoker set search_path = pgharness, pg_temp
as $$ select requeue_run(_run_id(requeue_run.run)); $$;
comment on function pgharness.requeue_run(text) is 'requeue_run() of a run given by name. Example: select pgharness.requeue_run(''triage-v2/1'');';
