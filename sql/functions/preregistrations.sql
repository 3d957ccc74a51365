-- Pre-registration: a plan of analysis that is stored before a run, frozen with the run, and compared with what was analysed.

create or replace function pgharness.preregister(
    instance text, hypotheses jsonb, primary_metric text default 'mean_score', test text default 'auto', alpha double precision default 0.05,
    correction text default 'holm'
) returns pgharness.preregistrations
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
declare
    v_instance instances;
    v_last     preregistrations;
    v_new      preregistrations;
begin
    select * into v_instance from instances as i where i.id = _instance_id(preregister.instance) for no key update;
    perform _check_hypotheses(v_instance, preregister.hypotheses);
    if preregister.primary_metric <> 'mean_score' and preregister.primary_metric not like 'mean\_score by _%' then
        raise exception 'primary_metric is "%"', preregister.primary_metric
            using errcode = 'PH002', hint = 'Give mean_score, or "mean_score by AUTHOR" for the rubrics of one author.';
    end if;
    perform _check_option('test', to_jsonb(preregister.test), o.type, o.allowed, o.low, o.high) from _analysis_options() as o where o.kind = 'compare' and o.option = 'test';
    perform _check_option('alpha', to_jsonb(preregister.alpha), o.type, o.allowed, o.low, o.high) from _analysis_options() as o where o.kind = 'compare' and o.option = 'alpha';
    perform _check_option('correction', to_jsonb(preregister.correction), o.type, o.allowed, o.low, o.high) from _analysis_options() as o where o.kind = 'compare' and o.option = 'correction';
    select * into v_last from preregistrations as p where p.instance_id = v_instance.id order by p.id desc limit 1;
    insert into preregistrations (instance_id, hypotheses, primary_metric, test, alpha, correction, case_count, note_replications, grade_replications, created_at)
    values (v_instance.id, preregister.hypotheses, preregister.primary_metric, preregister.test, preregister.alpha, preregister.correction,
            (select count(*) from instance_cases as ic where ic.instance_id = v_instance.id), v_instance.note_replications, v_instance.grade_replications, clock())
    returning * into v_new;
    if to_jsonb(v_new) - '{id,created_by,created_at}'::text[] = to_jsonb(v_last) - '{id,created_by,created_at}'::text[] then
        delete from preregistrations as p where p.id = v_new.id;
        return v_last;                                  -- the same once more is not another plan
    end if;
    return v_new;
end;
$$;
comment on function pgharness.preregister(text, jsonb, text, text, double precision, text) is
'Store what will be compared, and how, before a run of an instance starts: every later run freezes the newest plan, and no plan ever changes. hypotheses is a list of {"first", "second", "direction": higher, lower or different, "text"}. preregistration_deviations says where analyses differ from it. Idempotent. Raises PH001, PH002. Example: select pgharness.preregister(''triage-v2'', ''[{"first": "new", "second": "old", "direction": "higher"}]'', alpha => 0.01);';

create or replace function pgharness._check_hypotheses(instance pgharness.instances, hypotheses jsonb) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_one   jsonb;
    v_name  text;
    v_known text[] := array(select mc.name from model_combinations as mc where mc.instance_id = instance.id order by mc.id);
    v_hint  constant text := 'Give a list such as ''[{"first": "new", "second": "old", "direction": "higher"}]''.';
begin
    if jsonb_typeof(hypotheses) is distinct from 'array' then
        raise exception 'hypotheses are %, not a list', coalesce(jsonb_typeof(hypotheses), 'null') using errcode = 'PH002', hint = v_hint;
    elsif jsonb_array_length(hypotheses) = 0 then
        raise exception 'there is no hypothesis' using errcode = 'PH002', hint = v_hint;
    end if;
    for v_one in select h from jsonb_array_elements(hypotheses) as h loop
        if jsonb_typeof(v_one) <> 'object' then
            raise exception 'a hypothesis is %', left(v_one::text, 100) using errcode = 'PH002', hint = v_hint;
        end if;
        v_name := (select k from jsonb_object_keys(v_one) as k where k <> all ('{first,second,direction,text}') limit 1);
        if v_name is not null then
            raise exception 'a hypothesis has no "%"', left(v_name, 100) using errcode = 'PH002', hint = 'It has first, second, direction and text.';
        elsif coalesce(v_one ->> 'direction', 'different') <> all ('{higher,lower,different}') then
            raise exception 'the direction of a hypothesis is %', left(v_one ->> 'direction', 100) using errcode = 'PH002', hint = 'It is higher, lower or different.';
        end if;
        for v_name in select unnest(array[v_one ->> 'first', v_one ->> 'second']) loop
            if v_name is null or v_name <> all (v_known) then
                perform _refuse_unknown('combination', v_name, v_known[1:5],
                                        format('List them: select name from pgharness.model_combinations where instance = %L;', instance.name));
            end if;
        end loop;
        if v_one ->> 'first' = v_one ->> 'second' then
            raise exception 'a hypothesis compares "%" with itself', v_one ->> 'first' using errcode = 'PH002', hint = v_hint;
        end if;
    end loop;
end;
$$;
comment on function pgharness._check_hypotheses(pgharness.instances, jsonb) is
'Raise PH002 for hypotheses of another form, PH001 for a combination that the instance does not have.';

create or replace function pgharness._registered_plan(instance_id bigint) returns jsonb
    language sql stable security invoker set search_path = pgharness, pg_temp
as $$
    select coalesce((select jsonb_build_object('preregistration', to_jsonb(p) - 'instance_id') from preregistrations as p
                      where p.instance_id = _registered_plan.instance_id order by p.id desc limit 1), '{}');
$$;
comment on function pgharness._registered_plan(bigint) is 'What a run''s definition keeps of the newest plan of its instance: nothing, where there is none.';

create or replace function pgharness._keep_plan() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    raise exception 'a preregistration never changes' using errcode = 'PH003', hint = 'Store another, for the runs to come: select pgharness.preregister(...);';
end;
$$;
comment on function pgharness._keep_plan() is 'Refuse every change of a preregistration. Raises PH003.';
create or replace trigger _100_refuse before update on pgharness.preregistrations
    for each row execute function pgharness._keep_plan();
