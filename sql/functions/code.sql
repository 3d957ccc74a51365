-- Runs of code: its versions, its tasks and what they tell. A task is begun, tells, and ends; whoever took it over refuses what an earlier try still sends.

create or replace function pgharness.register_experiment(
    name text, description text, module text, function text, digest text, source text, config_schema jsonb,
    timeout_seconds double precision default 86400, memory_mb integer default 4096, log_mb integer default 64,
    git_commit text default null, is_dirty boolean default false, git_diff text default null, becomes_current boolean default true
) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_experiment experiments;
    v_version    experiment_versions;
begin
    perform pg_advisory_xact_lock(hashtextextended('pgharness.register_experiment ' || register_experiment.name, 0));
    select * into v_experiment from experiments as e where e.name = register_experiment.name;
    if v_experiment.kind = 'note_grade' then
        raise exception 'experiment "%" is one of notes and grades, not of code', v_experiment.name
            using errcode = 'PH004', hint = 'Give the function another name: @experiment(name="...").';
    elsif v_experiment.id is null then
        insert into experiments (name, kind, config_schema) values (register_experiment.name, 'code', register_experiment.config_schema) returning * into v_experiment;
    end if;
    select * into v_version from experiment_versions as v where v.experiment_id = v_experiment.id and v.digest = register_experiment.digest;
    if v_version.id is null then
        insert into experiment_versions (experiment_id, number, digest, module, function, source, config_schema, git_commit, is_dirty, git_diff)
        select v_experiment.id, coalesce(max(v.number), 0) + 1, register_experiment.digest, register_experiment.module, register_experiment.function,
               register_experiment.source, register_experiment.config_schema, register_experiment.git_commit, register_experiment.is_dirty, left(register_experiment.git_diff, 1000000)
          from experiment_versions as v where v.experiment_id = v_experiment.id
        returning * into v_version;
    end if;
    if v_experiment.version is null or register_experiment.becomes_current and v_experiment.version <> v_version.number then
        update experiments as e
           set description = register_experiment.description, config_schema = register_experiment.config_schema, version = v_version.number,
               timeout_seconds = register_experiment.timeout_seconds, memory_mb = register_experiment.memory_mb, log_mb = register_experiment.log_mb
         where e.id = v_experiment.id;
    end if;
    return v_version.id;
end;
$$;
comment on function pgharness.register_experiment(text, text, text, text, text, text, jsonb, double precision, integer, integer, text, boolean, text, boolean) is
'Make an experiment in code known, or a new version of it when its digest is new; its description, limits and the schema of its configuration are then this version''s, unless it shall not become the current one. Returns the version''s id. Idempotent. Raises PH002 (unusable schema), PH004 (the name is taken by another kind of experiment). Example: select pgharness.register_experiment(''mine'', '''', ''experiments.mine'', ''mine'', ''digest'', '''', ''{"type": "object"}'');';

create or replace function pgharness._freeze_code(run_id bigint, instance_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_instance   instances;
    v_experiment experiments;
    v_version    experiment_versions;
begin
    select * into strict v_instance from instances as i where i.id = _freeze_code.instance_id;
    select * into strict v_experiment from experiments as e where e.id = v_instance.experiment_id;
    select * into v_version from experiment_versions as v where v.experiment_id = v_experiment.id and v.number = v_experiment.version;
    insert into run_definitions (run_id, definition, case_count, combination_count, transcript_overlaps, grade_stride)
    values (_freeze_code.run_id,
            to_jsonb(v_instance) - '{id,project_id,experiment_id,created_at,budget_usd,total_budget_usd,response_cache,note_system_prompt,note_prompt,grade_system_prompt,grade_prompt,'
                                   'note_replications,grade_replications,rubrics_per_case,cycle_times,cycle_transcript_overlaps,software_version}'::text[]
            || jsonb_build_object('code', jsonb_build_object('version', v_version.number, 'digest', v_version.digest, 'module', v_version.module, 'function', v_version.function),
                                  'timeout_seconds', v_experiment.timeout_seconds, 'memory_mb', v_experiment.memory_mb, 'log_mb', v_experiment.log_mb),
            0, 0, '{}', 1);
end;
$$;
comment on function pgharness._freeze_code(bigint, bigint) is 'Copy into a run of code what its instance and its experiment say now: config, seed, limits, version.';

create or replace function pgharness._plan_code(run_id bigint) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into tasks (run_id, ordinal) values (_plan_code.run_id, 0);
    update runs as r set task_count = 1, timeout_seconds = (select (d.definition ->> 'timeout_seconds')::double precision from run_definitions as d where d.run_id = r.id)
     where r.id = _plan_code.run_id;
    select _defer(_plan_code.run_id, 'task', array['{"ordinals": [0]}'::jsonb], comes_anew => true);
$$;
comment on function pgharness._plan_code(bigint) is 'Plan a run of code: one task, its function.';

create or replace function pgharness._known_items(run_id bigint, parent bigint, map text, items jsonb) returns table (place bigint, key text, function text, argument jsonb)
    language sql stable security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
    -- "offset 0": one look at an index for each item, however many tasks the planner believes there are; and a row's order instead of its
    -- equality: for that no index will do but the one that leads to a single task, whatever the planner believes of a run that is new
    select i.n, t.key, t.function, t.argument
      from jsonb_array_elements(_known_items.items) with ordinality as i (item, n)
     cross join lateral (
           select t.key, t.function, t.argument from tasks as t
            where (t.parent_ordinal, t.map, t.run_id, t.key) >= (_known_items.parent, _known_items.map, _known_items.run_id, i.item ->> 0)
              and (t.parent_ordinal, t.map, t.run_id, t.key) <= (_known_items.parent, _known_items.map, _known_items.run_id, i.item ->> 0) offset 0) as t;
$$;
comment on function pgharness._known_items(bigint, bigint, text, jsonb) is 'Those of some items of a map that are tasks already: by their place among the items, and as they are known.';

create or replace function pgharness.add_tasks(run_id bigint, parent bigint, attempt integer, map text, function text, items text, retries integer default 0)
    returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   runs := _lock_run(add_tasks.run_id);
    v_depth integer := (select t.depth + 1 from tasks as t where t.run_id = v_run.id and t.ordinal = add_tasks.parent and t.attempts = add_tasks.attempt and t.finished_at is null);
    v_items jsonb := add_tasks.items;
    v_known bigint[];
    v_clash text;
    v_new   bigint;
begin
    if v_run.status <> 'running' or v_depth is null then
        raise exception 'task % of run % is not running any more', add_tasks.parent, v_run.id
            using errcode = 'PH005', hint = 'It was cancelled, or begun anew elsewhere.';
    end if;
    select array_agg(k.place), min(k.key) filter (where k.argument is distinct from v_items -> (k.place - 1)::integer -> 1 or k.function <> add_tasks.function)
      into v_known, v_clash from _known_items(v_run.id, add_tasks.parent, add_tasks.map, v_items) as k;
    if v_clash is not null then
        raise exception 'map "%" has an item "%" already, and it is another one', add_tasks.map, v_clash
            using errcode = 'PH004', hint = 'Tell two maps of one function apart by name=..., and items by a key that is theirs alone.';
    end if;
    insert into tasks (run_id, ordinal, parent_ordinal, depth, map, key, function, argument, max_attempts)
    select v_run.id, v_run.task_count + row_number() over (order by i.n) - 1, add_tasks.parent, v_depth, add_tasks.map, i.item ->> 0, add_tasks.function, i.item -> 1, add_tasks.retries + 1
      from jsonb_array_elements(v_items) with ordinality as i (item, n)
     where i.n not in (select unnest(v_known));
    get diagnostics v_new = row_count;
    if v_new > 0 then
        update runs as r set task_count = r.task_count + v_new where r.id = v_run.id;
        -- a process does the tasks of a slice side by side, so small slices would only cost, as long as there is something for every worker
        perform _defer_range(v_run.id, 'task', v_run.task_count, v_run.task_count + v_new - 1,
                             least(100, ceil((v_run.task_count + v_new - v_run.tasks_succeeded - v_run.tasks_failed - v_depth)
                                             / (select greatest(8.0, 4 * count(*)) from workers as w where w.status = 'running' and 'task' = any (w.queues))))::integer);
    end if;
    return v_new;
end;
$$;
comment on function pgharness.add_tasks(bigint, bigint, integer, text, text, text, integer) is
'For workers: plan items of a map, an array of [key, argument], and queue them; those that are there already are left as they are. Returns how many are new. Raises PH004 (an item of that key is another one), PH005 (the task that maps is not running any more). Example: select pgharness.add_tasks(7, 0, 1, ''score'', ''my_module:score'', ''[["a", {"text": "A"}]]'');';

create or replace function pgharness.map_state(run_id bigint, parents bigint[], maps text[]) returns table (status text, are_done boolean[])
    language sql stable security definer set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan
as $$
    select r.status,
           array(select not exists (select from tasks as t where t.run_id = r.id and t.parent_ordinal = m.parent and t.map = m.map and t.status = 'waiting' offset 0)
                   from unnest(map_state.parents, map_state.maps) with ordinality as m (parent, map, place) order by m.place)
      from runs as r where r.id = map_state.run_id;
$$;
comment on function pgharness.map_state(bigint, bigint[], text[]) is
'For workers: the state of a run, and of some of its maps, each named by the task that maps and its name, whether all items are decided. Example: select * from pgharness.map_state(7, ''{0}'', ''{score}'');';

create or replace function pgharness.map_results(run_id bigint, parent bigint, map text) returns table (key text, status text, result text, error text)
    language sql stable security definer set search_path = pgharness, pg_temp set plan_cache_mode = force_custom_plan
as $$
    select t.key, t.status, t.result::text, t.error from tasks as t
     where t.run_id = map_results.run_id and t.parent_ordinal = map_results.parent and t.map = map_results.map and t.status <> 'waiting';
$$;
comment on function pgharness.map_results(bigint, bigint, text) is
'For workers: what the items of a map gave. Example: select * from pgharness.map_results(7, 0, ''score'');';

create or replace function pgharness.load_code(run_id bigint) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select load_run(r.id) || jsonb_build_object('kind', r.kind, 'status', r.status, 'epoch', r.epoch) from runs as r where r.id = load_code.run_id;
$$;
comment on function pgharness.load_code(bigint) is
'For workers: load_run() of a run of code, with its kind and its present state; null when it is gone. Example: select pgharness.load_code(7);';

create or replace function pgharness.load_tasks(worker_id bigint, slice jsonb)
    returns table (ordinal bigint, parent_ordinal bigint, map text, key text, function text, argument text, attempt integer, crashes integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_run_id bigint := (slice ->> 'run_id')::bigint;
    v_run    runs := _lock_run(v_run_id);
    v_tasks  bigint[];
    v_again  bigint[];
begin
    if v_run.status <> 'running' or v_run.epoch <> (slice ->> 'epoch')::integer then
        return;                                         -- paused, finished, or queued anew since
    end if;
    insert into run_workers (run_id, worker_id) values (v_run_id, load_tasks.worker_id) on conflict do nothing;
    v_tasks := array(select _missing(v_run_id, 'task', _ordinals(slice)));
    -- "offset 0": one look at an index for each task, however many the planner believed there were
    v_again := array(select o from unnest(v_tasks) as o where exists (select from tasks as t where t.run_id = v_run_id and t.ordinal = o and t.attempts > 0 offset 0));
    if cardinality(v_again) > 0 then
        -- each tells everything anew; its log stays, to show what happened
        delete from results as x where x.run_id = v_run_id and x.task = any (v_again);
        delete from metrics as x where x.run_id = v_run_id and x.task = any (v_again);
        delete from timings as x where x.run_id = v_run_id and x.task = any (v_again);
        delete from logged_calls as x where x.run_id = v_run_id and x.task = any (v_again);
        delete from artifacts as x where x.run_id = v_run_id and x.task = any (v_again);
    end if;
    return query
    update tasks as t
       set attempts = t.attempts + 1, worker_id = load_tasks.worker_id, started_at = clock()
      from unnest(v_tasks) as o cross join lateral (select k.ctid from tasks as k where k.run_id = v_run_id and k.ordinal = o offset 0) as known
     where t.ctid = known.ctid
    returning t.ordinal, t.parent_ordinal, t.map, t.key, t.function, t.argument::text, t.attempts, t.crashes;
end;
$$;
comment on function pgharness.load_tasks(bigint, jsonb) is
'For workers: begin the tasks of a slice (a queue job''s arguments) that are not decided; what earlier tries of them told is taken back, but for their logs. Nothing when the run is not running or was queued anew. Example: select * from pgharness.load_tasks(1, ''{"run_id": 7, "epoch": 0, "ordinals": [0]}'');';

create or replace function pgharness.start_version(run_id bigint, version_id bigint) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    insert into run_versions (run_id, version_id) values (start_version.run_id, start_version.version_id) on conflict do nothing;
$$;
comment on function pgharness.start_version(bigint, bigint) is
'For workers: say which version of its code a run is executed with. Idempotent. Example: select pgharness.start_version(7, 3);';

create or replace function pgharness.record_tasks(worker_id bigint, run_id bigint, outcomes jsonb) returns table (status text, epoch integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp set enable_seqscan = off
as $$
declare
    v_run   runs := _lock_run(record_tasks.run_id);
    v_delay interval := make_interval(secs => _retry_delay(null, 1));
    v_done  record;
    v_root  record;
begin
    if v_run.finished_at is null then
        with told as (
            select * from jsonb_to_recordset(record_tasks.outcomes) as o (ordinal bigint, attempt integer, status text, result jsonb, error text, traceback text, is_final boolean)
        ), ended as (
            update tasks as t
               set status = case when o.status = 'succeeded' then 'succeeded' when o.is_final or t.failures + 1 >= t.max_attempts then 'failed' else 'waiting' end,
                   result = o.result, error = o.error, traceback = o.traceback, crashes = 0,
                   failures = t.failures + (o.status = 'failed')::integer, next_attempt_at = clock() + v_delay,
                   finished_at = case when o.status = 'succeeded' or o.is_final or t.failures + 1 >= t.max_attempts then clock() end
              from told as o
             -- of a task that was begun anew since, the earlier try says nothing; "offset 0" as in load_tasks()
             cross join lateral (select k.ctid from tasks as k where k.run_id = v_run.id and k.ordinal = o.ordinal and k.attempts = o.attempt and k.finished_at is null offset 0) as known
             where t.ctid = known.ctid
            returning t.ordinal, t.status
        )
        select count(*) filter (where e.status = 'succeeded') as succeeded, count(*) filter (where e.status = 'failed') as failed,
               array_agg(e.ordinal) filter (where e.status = 'waiting') as again, bool_or(e.ordinal = 0 and e.status <> 'waiting') as has_ended
          into v_done from ended as e;
        update runs as r set tasks_succeeded = r.tasks_succeeded + v_done.succeeded, tasks_failed = r.tasks_failed + v_done.failed where r.id = v_run.id;
        if v_done.again is not null and v_run.status = 'running' then
            perform _defer_list(v_run.id, 'task', v_done.again, 1, (select max(t.next_attempt_at) from tasks as t where t.run_id = v_run.id and t.ordinal = any (v_done.again)));
        end if;
        if v_done.has_ended then
            select o.status, o.error into v_root from jsonb_to_recordset(record_tasks.outcomes) as o (ordinal bigint, status text, error text) where o.ordinal = 0;
            perform _set_status(v_run.id, case when v_root.status = 'succeeded' then 'completed' else 'failed' end, left(v_root.error, 2000));
        end if;
    end if;
    return query select r.status, r.epoch from runs as r where r.id = v_run.id;
end;
$$;
comment on function pgharness.record_tasks(bigint, bigint, jsonb) is
'For workers: record how tries of tasks of a run ended (an array of {ordinal, attempt, status: succeeded or failed, result, error, traceback, is_final}); a failed one is queued again while it has attempts left, and the run ends with its function. Idempotent: the end of an earlier try is ignored. Answers the state of the run. Example: select * from pgharness.record_tasks(1, 7, ''[]'');';

create or replace function pgharness.lose_tasks(run_id bigint, ordinals bigint[], attempts integer[], reason text, limit_crashes integer) returns bigint[]
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run  runs := _lock_run(lose_tasks.run_id);
    v_lost bigint[];
    v_any  boolean;
begin
    if v_run.finished_at is not null then
        return '{}';
    end if;
    with ended as (
        update tasks as t
           set crashes = t.crashes + 1, crashed_attempt = t.attempts,
               status = case when t.crashes + 1 >= lose_tasks.limit_crashes then 'failed' else t.status end,
               error = case when t.crashes + 1 >= lose_tasks.limit_crashes then lose_tasks.reason end,
               finished_at = case when t.crashes + 1 >= lose_tasks.limit_crashes then clock() end
          from unnest(lose_tasks.ordinals, lose_tasks.attempts) as lost (ordinal, attempt)
         -- not of a task that was begun anew since, and once for each try
         where t.run_id = v_run.id and t.ordinal = lost.ordinal and t.attempts = lost.attempt and t.status = 'waiting' and t.crashed_attempt is distinct from lost.attempt
        returning t.ordinal, t.status
    )
    select coalesce(array_agg(e.ordinal) filter (where e.status = 'failed'), '{}'), count(*) > 0 into v_lost, v_any from ended as e;
    if v_any then
        insert into logs (run_id, level, message, data)
        values (v_run.id, 'error', lose_tasks.reason, jsonb_build_object('tasks', lose_tasks.ordinals[1:100], 'failed', v_lost[1:100]));
        update runs as r set tasks_failed = r.tasks_failed + cardinality(v_lost) where r.id = v_run.id;
        if 0 = any (v_lost) then
            perform _set_status(v_run.id, 'failed', lose_tasks.reason);
        end if;
    end if;
    return v_lost;
end;
$$;
comment on function pgharness.lose_tasks(bigint, bigint[], integer[], text, integer) is
'For workers: count a crash of the tries of tasks that were running when their process ended, and fail the tasks that reach a number of crashes, with their run if its function is one of them. Returns those that failed. Idempotent; what was begun anew since is left alone. Example: select pgharness.lose_tasks(7, ''{0}'', ''{1}'', ''its process ended with status 1'', 1);';

create or replace function pgharness.fail_run(run_id bigint, reason text) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run runs := _lock_run(fail_run.run_id);
begin
    if v_run.finished_at is null then
        update tasks as t set status = 'failed', error = left(fail_run.reason, 2000), finished_at = clock() where t.run_id = v_run.id and t.ordinal = 0 and t.status = 'waiting';
        update runs as r set tasks_failed = r.tasks_failed + found::integer where r.id = v_run.id;
        perform _set_status(v_run.id, 'failed', left(fail_run.reason, 2000));
    end if;
end;
$$;
comment on function pgharness.fail_run(bigint, text) is
'For workers: fail a run of code that went beyond a limit. Idempotent. Raises PH001. Example: select pgharness.fail_run(7, ''it used more memory than it may'');';

create or replace function pgharness.expire_runs() returns integer
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run   record;
    v_count integer := 0;
begin
    for v_run in
        select r.id, r.timeout_seconds as seconds
          from runs as r
         cross join lateral (select t.started_at from tasks as t where t.run_id = r.id and t.ordinal = 0 offset 0) as t
         where r.status = 'running' and r.finished_at is null and r.task_count > 0
           -- since its function was begun: to wait for a worker takes no time of its own
           and extract(epoch from clock() - greatest(t.started_at, r.activated_at)) > r.timeout_seconds and t.started_at is not null
         order by r.id for no key update of r skip locked
    loop
        perform fail_run(v_run.id, format('it ran for longer than its %s seconds', v_run.seconds));
        v_count := v_count + 1;
    end loop;
    return v_count;
end;
$$;
comment on function pgharness.expire_runs() is
'For workers: fail runs of code whose function has been running for longer than their experiment allows; returns how many. Example: select pgharness.expire_runs();';

create or replace function pgharness._is_new(run_id bigint, teller text, number bigint) returns boolean
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    insert into tellers as t (run_id, teller, last_group) values (_is_new.run_id, _is_new.teller, _is_new.number)
    on conflict on constraint tellers_pkey do update set last_group = excluded.last_group where t.last_group < excluded.last_group;
    return found;
end;
$$;
comment on function pgharness._is_new(bigint, text, bigint) is 'Remember the number of a group that a process tells; false for one that it told before. The caller holds the run''s row lock.';

create or replace function pgharness.record_told(worker_id bigint, run_id bigint, teller text, number bigint, lines jsonb, rows jsonb) returns table (status text, epoch integer)
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    -- locked, so that a try which is begun anew meanwhile finds all that this one told
    v_run   runs := _lock_run(record_told.run_id);
    v_limit bigint;
    v_bytes bigint := 0;
    v_cost  numeric := 0;
begin
    if not _is_new(v_run.id, record_told.teller, record_told.number) then
        return query select v_run.status, v_run.epoch;
        return;
    end if;
    v_limit := (select (d.definition ->> 'log_mb')::bigint from run_definitions as d where d.run_id = v_run.id) * 1000000;
    if record_told.lines <> '[]' then
        v_bytes := octet_length(record_told.lines::text);
        if v_run.log_bytes <= v_limit then
            insert into logs (run_id, level, message, data, task, attempt, created_at)
            select v_run.id, l.line ->> 2, l.line ->> 3, l.line -> 4, (l.line -> 0)::bigint, (l.line -> 1)::integer, (l.line ->> 5)::timestamptz
              from jsonb_array_elements(record_told.lines) as l (line);
        end if;
    end if;
    if record_told.rows <> '[]' then
        v_cost := _record_rows(record_told.worker_id, v_run.id, record_told.rows);
        perform _count_hits(array(select (o.value -> 'call' ->> 'response_key')::bytea from jsonb_array_elements(record_told.rows) as o (value)
                                   where o.value -> 'call' ->> 'outcome' = 'cached'));
    end if;
    if v_bytes > 0 or v_cost > 0 then
        update runs as r set log_bytes = r.log_bytes + v_bytes, task_cost_usd = r.task_cost_usd + v_cost where r.id = v_run.id returning r.* into v_run;
        if v_run.log_bytes > v_limit and v_run.finished_at is null then
            perform fail_run(v_run.id, format('it logged more than its %s MB', v_limit / 1000000));
        elsif v_cost > 0 then
            perform _settle_run(v_run.id);
            perform _spend(array[v_run.id], array[_cost_usd(v_run) - v_cost]);
        end if;
    end if;
    perform pg_notify('pgharness', jsonb_build_object('event', 'run.told', 'run_id', v_run.id, 'run', left(v_run.name, 500), 'at', clock())::text);
    return query select r.status, r.epoch from runs as r where r.id = v_run.id;
end;
$$;
comment on function pgharness.record_told(bigint, bigint, text, bigint, jsonb, jsonb) is
'For workers: store what tasks of a run told: lines of its log as arrays of task, attempt, level, message, data, time; all else as objects with kind (result, metric, timing, llm_call, progress, call), task, attempt, created_at and the columns of its table. What a try of a task that was begun anew since tells is dropped, its log excepted. A group that the same teller sends again under its number counts once. NOTIFYs channel pgharness (event run.told). Answers the state of the run. Example: select * from pgharness.record_told(1, 7, ''me'', 1, ''[[0, 1, "info", "begun", {}, "2026-01-01T00:00:00Z"]]'', ''[]'');';

create or replace function pgharness._record_rows(worker_id bigint, run_id bigint, rows jsonb) returns numeric
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    with told as materialized (
        select e.place, o.*
          from jsonb_array_elements(rows) with ordinality as e (value, place)
         cross join lateral jsonb_to_record(e.value) as o (
                   kind text, task bigint, attempt integer, created_at timestamptz, key text, value jsonb, name text, number double precision, metric_type text, step bigint,
                   data jsonb, operation text, duration_ms double precision, model text, input jsonb, output jsonb, error text, position double precision, total double precision,
                   message text)
         where exists (select from tasks as t where t.run_id = _record_rows.run_id and t.ordinal = o.task and t.attempts = o.attempt and t.finished_at is null offset 0)
    ), result as (
        insert into results (run_id, key, value, task, attempt, created_at)
        select _record_rows.run_id, o.key, coalesce(o.value, 'null'), o.task, o.attempt, o.created_at from told as o where o.kind = 'result' order by o.place
    ), metric as (
        insert into metrics (run_id, name, value, metric_type, step, data, task, attempt, created_at)
        select _record_rows.run_id, o.name, o.number, o.metric_type, o.step, o.data, o.task, o.attempt, o.created_at from told as o where o.kind = 'metric' order by o.place
    ), timing as (
        insert into timings (run_id, operation, duration_ms, task, attempt, created_at)
        select _record_rows.run_id, o.operation, o.duration_ms, o.task, o.attempt, o.created_at from told as o where o.kind = 'timing' order by o.place
    ), logged as (
        insert into logged_calls (run_id, model, input, output, duration_ms, error, task, attempt, created_at)
        select _record_rows.run_id, o.model, o.input, o.output, o.duration_ms, o.error, o.task, o.attempt, o.created_at from told as o where o.kind = 'llm_call' order by o.place
    ), progress as (
        insert into progress_reports as p (run_id, position, total, message, updated_at)
        select _record_rows.run_id, last.position, last.total, last.message, last.created_at
          from (select o.*, max(o.place) over () as latest from told as o where o.kind = 'progress') as last where last.place = last.latest
        on conflict on constraint progress_reports_pkey do update
           set position = excluded.position, total = coalesce(excluded.total, p.total), message = excluded.message, updated_at = excluded.updated_at
    ), called as (
        -- a call that was made is paid for, whoever goes on with its task
        insert into calls (run_id, kind, ordinal, attempt, model_id, worker_id, outcome, error, answer, http_status, finish_reason, request_id, answered_by,
                           input_tokens, output_tokens, cached_tokens, cost_usd, latency_ms, started_at, parent_started_at, is_estimated, composition,
                           response_key, saved_usd)
        select _record_rows.run_id, 'task', (o.value ->> 'task')::bigint, (o.value ->> 'attempt')::integer, c.model_id, _record_rows.worker_id, c.outcome, c.error, c.answer,
               c.http_status, c.finish_reason, c.request_id, c.answered_by, coalesce(c.input_tokens, 0), coalesce(c.output_tokens, 0), coalesce(c.cached_tokens, 0),
               coalesce(c.cost_usd, 0), c.latency_ms, c.started_at, c.parent_started_at, coalesce(c.is_estimated, false), coalesce(c.composition, '{}'),
               c.response_key, coalesce(c.saved_usd, 0)
          from jsonb_array_elements(rows) as o (value)
         cross join lateral jsonb_to_record(o.value -> 'call') as c (
               model_id bigint, outcome text, error text, answer text, http_status integer, finish_reason text, request_id text, answered_by text,
               input_tokens integer, output_tokens integer, cached_tokens integer, cost_usd numeric, latency_ms double precision, started_at timestamptz,
               parent_started_at timestamptz, is_estimated boolean, composition jsonb, response_key bytea, saved_usd numeric)
         where o.value ->> 'kind' = 'call'
        on conflict on constraint calls_run_id_kind_ordinal_attempt_started_at_key do nothing
        returning cost_usd
    )
    select coalesce(sum(c.cost_usd), 0) from called as c;
$$;
comment on function pgharness._record_rows(bigint, bigint, jsonb) is 'Store what tasks told, each kind in its table, in order; returns the cost of the calls among it.';

create or replace function pgharness.keep_artifact(run_id bigint, teller text, number bigint, task bigint, attempt integer, name text, media_type text, content bytea) returns text
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_run    runs := _lock_run(keep_artifact.run_id);
    v_digest text := encode(sha256(content), 'hex');
begin
    if not _is_new(v_run.id, keep_artifact.teller, keep_artifact.number) then
        return v_digest;
    elsif not exists (select from tasks as t where t.run_id = keep_artifact.run_id and t.ordinal = keep_artifact.task and t.attempts = keep_artifact.attempt) then
        return null;                                    -- begun anew since
    end if;
    insert into artifact_contents (digest, content) values (v_digest, keep_artifact.content) on conflict on constraint artifact_contents_pkey do update set created_at = now();  -- locked, lest it be purged
    insert into artifacts (run_id, task, attempt, name, media_type, digest, size_bytes)
    values (keep_artifact.run_id, keep_artifact.task, keep_artifact.attempt, keep_artifact.name, keep_artifact.media_type, v_digest, octet_length(keep_artifact.content));
    return v_digest;
end;
$$;
comment on function pgharness.keep_artifact(bigint, text, bigint, bigint, integer, text, text, bytea) is
'For workers: keep a file with a run; equal contents are stored once. Returns its SHA-256, or null when the task was begun anew since. What the same teller sends again under its number counts once. Example: select pgharness.keep_artifact(7, ''me'', 2, 0, 1, ''plot.png'', ''image/png'', ''\x00'');';

create or replace function pgharness._delete_contents() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    delete from artifact_contents as c
     where c.digest in (select o.digest from gone as o) and not exists (select from artifacts as a where a.digest = c.digest);
    return null;
end;
$$;
comment on function pgharness._delete_contents() is 'Delete the content of artifacts that no run keeps any more.';
create or replace trigger _500_delete_contents after delete on pgharness.artifacts
    referencing old table as gone for each statement execute function pgharness._delete_contents();

create or replace function pgharness._protect_milestones() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if old.kind = 'milestone' and old.task_count > 0 and current_setting('pgharness.deletes_milestones', true) is distinct from 'on' then
        raise exception 'run "%" is a milestone, which is kept', old.name
            using errcode = 'PH003', hint = 'If it must go: set pgharness.deletes_milestones = on; and delete it again.';
    end if;
    return old;
end;
$$;
comment on function pgharness._protect_milestones() is 'Refuse to delete a milestone run of code (PH003).';
create or replace trigger _050_protect before delete on pgharness.runs
    for each row execute function pgharness._protect_milestones();

create or replace function pgharness.purge_trials(instance text, keep integer default 1) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_instance_id bigint := _instance_id(purge_trials.instance);
    v_count       bigint;
begin
    if purge_trials.keep < 0 then
        raise exception 'keep is %, not a number of runs', purge_trials.keep using errcode = 'PH002', hint = 'Give 0 or more.';
    end if;
    delete from runs as r
     where r.id in (select t.id from runs as t where t.instance_id = v_instance_id and t.kind = 'trial' and t.task_count > 0 and t.finished_at is not null
                     order by t.id desc offset purge_trials.keep);
    get diagnostics v_count = row_count;
    return v_count;
end;
$$;
comment on function pgharness.purge_trials(text, integer) is
'Delete the finished trial runs of an instance of code with all that they told, but for the latest; returns how many. Milestones stay. Raises PH001, PH002. Example: select pgharness.purge_trials(''sentiment'', keep => 1);';

create or replace function pgharness.serve_experiments(worker_id bigint, experiments text[]) returns void
    language sql volatile security definer set search_path = pgharness, pg_temp
as $$
    update workers as w set experiments = serve_experiments.experiments where w.id = serve_experiments.worker_id;
$$;
comment on function pgharness.serve_experiments(bigint, text[]) is
'For workers: say which experiments in code a worker has. Idempotent. Example: select pgharness.serve_experiments(1, ''{mine}'');';

create or replace function pgharness.load_model(model text) returns jsonb
    language sql stable security definer set search_path = pgharness, pg_temp
as $$
    select _frozen_model(m, '{}', null) from models as m where m.id = _model_id(load_model.model);
$$;
comment on function pgharness.load_model(text) is
'For workers: a model by name, as code asks for it. Raises PH001. Example: select pgharness.load_model(''simulator'');';

create or replace function pgharness.configure_instance(instance text, experiment text, config jsonb default null) returns pgharness.instances
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_instance instances;
begin
    select * into v_instance from instances as i where i.name = configure_instance.instance;
    if v_instance.id is null then
        insert into instances (name, experiment, config) values (configure_instance.instance, configure_instance.experiment, coalesce(configure_instance.config, '{}'))
        returning * into v_instance;
    elsif v_instance.experiment <> configure_instance.experiment then
        raise exception 'instance "%" is one of experiment "%"', v_instance.name, v_instance.experiment
            using errcode = 'PH004', hint = 'Name another instance.';
    elsif configure_instance.config is not null then
        update instances as i set config = configure_instance.config where i.id = v_instance.id returning * into v_instance;
    end if;
    return v_instance;
end;
$$;
comment on function pgharness.configure_instance(text, text, jsonb) is
'Make an instance of an experiment, or give the one of that name another configuration; null leaves it as it is. Idempotent. Raises PH001, PH002 (the configuration does not fit), PH004 (it is an instance of something else). Example: select pgharness.configure_instance(''dice-9'', ''dice'', ''{"rounds": 9}'');';

create or replace function pgharness.join_queue(worker_id bigint) returns bigint
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_id bigint;
begin
    insert into procrastinate.procrastinate_workers default values returning id into v_id;
    perform attach_queue_worker(join_queue.worker_id, v_id);
    return v_id;
end;
$$;
comment on function pgharness.join_queue(bigint) is
'For workers: be known to the queue; returns the id under which a worker takes jobs there. Example: select pgharness.join_queue(1);';

create or replace function pgharness.end_slice(job_id bigint) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    perform _put_back(end_slice.job_id, false);
end;
$$;
comment on function pgharness.end_slice(bigint) is
'For workers: end a job that was taken by take_job(); what is left undone of it is queued again. Idempotent. Example: select pgharness.end_slice(10);';

create or replace function pgharness._retry_tasks(run pgharness.runs) returns void
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_failed bigint[] := array(select t.ordinal from tasks as t where t.run_id = (run).id and t.status = 'failed' order by t.ordinal);
begin
    if cardinality(v_failed) = 0 then
        return;
    end if;
    -- its function with them, whatever became of it: it goes over what is done, and ends the run
    update tasks as t set status = 'waiting', result = null, error = null, traceback = null, failures = 0, crashes = 0, next_attempt_at = null, finished_at = null
     where t.run_id = (run).id and (t.ordinal = any (v_failed) or t.ordinal = 0) and t.status <> 'waiting';
    update runs as r
       set tasks_failed = 0, tasks_succeeded = (select count(*) from tasks as t where t.run_id = r.id and t.status = 'succeeded') where r.id = (run).id;
    if (run).status = 'running' then                    -- what is in flight goes on
        perform _defer_tasks((run).id, v_failed);
    elsif (run).status <> 'paused' then
        perform _set_status((run).id, 'running', null);
        perform _requeue((run).id);
    end if;
end;
$$;
comment on function pgharness._retry_tasks(pgharness.runs) is 'Let the failed tasks of a run of code be tried again; items that are done stay done.';
