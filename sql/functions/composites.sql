-- Composites: models that ask other models. Who their members are, checked when they are written and frozen with a run.

create or replace function pgharness._member_names(parameters jsonb) returns table (number integer, name text)
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select m.place::integer, case jsonb_typeof(m.value) when 'string' then m.value #>> '{}' when 'object' then m.value ->> 'model' end
      from jsonb_array_elements(case when jsonb_typeof(parameters -> 'members') = 'array' then parameters -> 'members' else '[]' end) with ordinality as m (value, place);
$$;
comment on function pgharness._member_names(jsonb) is
'The members that a composite''s parameters name, in order: {"members": ["a", {"model": "b", "weight": 2}]}; null for one that is neither a name nor an object with a model.';

create or replace function pgharness._composite_schema(provider text) returns jsonb
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select case _composite_schema.provider
    when 'ensemble' then '{
        "$defs": {
            "MemberParameters": {
                "additionalProperties": false,
                "properties": {
                    "model": {"type": "string"},
                    "weight": {"exclusiveMinimum": 0, "maximum": 1000000.0, "type": "number"}},
                "required": ["model"],
                "type": "object"}},
        "additionalProperties": false,
        "properties": {
            "members": {"items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/MemberParameters"}]}, "maxItems": 100, "minItems": 1, "type": "array"},
            "strategy": {"enum": ["parallel", "sequential", "hedged", "cascade"], "type": "string"},
            "vote": {"type": "string"},
            "normalise": {"type": "string"},
            "field": {"anyOf": [{"minLength": 1, "type": "string"}, {"type": "null"}]},
            "confidence": {"enum": ["none", "reported", "stated"], "type": "string"},
            "default_confidence": {"maximum": 1, "minimum": 0, "type": "number"},
            "max_members": {"anyOf": [{"minimum": 1, "type": "integer"}, {"type": "null"}]},
            "min_responses": {"anyOf": [{"minimum": 1, "type": "integer"}, {"type": "null"}]},
            "min_consensus": {"maximum": 1, "minimum": 0, "type": "number"},
            "below": {"enum": ["fail", "answer", "escalate"], "type": "string"},
            "timeout_seconds": {"anyOf": [{"exclusiveMinimum": 0, "maximum": 86400, "type": "number"}, {"type": "null"}]},
            "enough_consensus": {"maximum": 1, "minimum": 0, "type": "number"},
            "hedge_delay_seconds": {"maximum": 86400, "minimum": 0, "type": "number"},
            "confident_at": {"maximum": 1, "minimum": 0, "type": "number"},
            "stops_early": {"type": "boolean"}},
        "required": ["members"],
        "type": "object"}'::jsonb
    when 'hedge' then '{
        "$defs": {
            "AdaptiveOptions": {
                "additionalProperties": false,
                "properties": {
                    "strategy": {"const": "adaptive", "type": "string"},
                    "extra_request_seconds": {"anyOf": [{"minimum": 0, "type": "number"}, {"type": "null"}]},
                    "candidates": {"anyOf": [{"items": {"minimum": 0, "type": "number"}, "maxItems": 200, "minItems": 1, "type": "array"}, {"type": "null"}]},
                    "initial_seconds": {"anyOf": [{"minimum": 0, "type": "number"}, {"type": "null"}]}},
                "required": ["strategy"],
                "type": "object"},
            "ExponentialOptions": {
                "additionalProperties": false,
                "properties": {
                    "strategy": {"const": "exponential", "type": "string"},
                    "initial_seconds": {"exclusiveMinimum": 0, "type": "number"},
                    "min_seconds": {"exclusiveMinimum": 0, "type": "number"},
                    "max_seconds": {"exclusiveMinimum": 0, "type": "number"}},
                "required": ["strategy"],
                "type": "object"},
            "FixedOptions": {
                "additionalProperties": false,
                "properties": {
                    "strategy": {"const": "fixed", "type": "string"},
                    "seconds": {"minimum": 0, "type": "number"}},
                "required": ["strategy", "seconds"],
                "type": "object"},
            "PercentileOptions": {
                "additionalProperties": false,
                "properties": {
                    "strategy": {"const": "percentile", "type": "string"},
                    "percentile": {"exclusiveMaximum": 100, "minimum": 50, "type": "number"},
                    "initial_seconds": {"anyOf": [{"minimum": 0, "type": "number"}, {"type": "null"}]}},
                "required": ["strategy"],
                "type": "object"},
            "WorkloadOptions": {
                "additionalProperties": false,
                "properties": {
                    "strategy": {"const": "workload", "type": "string"},
                    "percentile": {"exclusiveMaximum": 100, "minimum": 50, "type": "number"},
                    "initial_seconds": {"anyOf": [{"minimum": 0, "type": "number"}, {"type": "null"}]}},
                "required": ["strategy"],
                "type": "object"}},
        "additionalProperties": false,
        "properties": {
            "members": {"items": {"type": "string"}, "maxItems": 5, "minItems": 1, "type": "array"},
            "delay": {"anyOf": [{"oneOf": [{"$ref": "#/$defs/FixedOptions"}, {"$ref": "#/$defs/PercentileOptions"}, {"$ref": "#/$defs/AdaptiveOptions"}, {"$ref": "#/$defs/WorkloadOptions"}, {"$ref": "#/$defs/ExponentialOptions"}]}, {"items": {"oneOf": [{"$ref": "#/$defs/FixedOptions"}, {"$ref": "#/$defs/PercentileOptions"}, {"$ref": "#/$defs/AdaptiveOptions"}, {"$ref": "#/$defs/WorkloadOptions"}, {"$ref": "#/$defs/ExponentialOptions"}]}, "type": "array"}]},
            "max_hedges": {"anyOf": [{"maximum": 4, "minimum": 1, "type": "integer"}, {"type": "null"}]},
            "max_extra": {"maximum": 4, "minimum": 0, "type": "number"},
            "min_confidence": {"anyOf": [{"maximum": 1, "minimum": 0, "type": "number"}, {"type": "null"}]},
            "timeout_seconds": {"anyOf": [{"exclusiveMinimum": 0, "type": "number"}, {"type": "null"}]}},
        "required": ["members"],
        "type": "object"}'::jsonb
    end;
$$;
comment on function pgharness._composite_schema(text) is
'The JSON Schema of the parameters of an ensemble or a hedge: what a worker reads them by, without the rules between several of them, which _composite_problem() has.';

create or replace function pgharness._composite_problem(provider text, parameters jsonb) returns text
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_strategy  text := coalesce(parameters ->> 'strategy', 'parallel');
    v_vote      text := coalesce(parameters ->> 'vote', case v_strategy when 'cascade' then 'best_confidence' else 'majority' end);
    v_normalise text := coalesce(parameters ->> 'normalise', 'text');
    v_is_sure   boolean := coalesce(parameters ->> 'confidence', 'none') <> 'none';
    v_members   integer := jsonb_array_length(parameters -> 'members');
    v_voters    integer := v_members - (coalesce(parameters ->> 'below', '') = 'escalate')::integer;
    v_asked     integer := least(v_voters, (parameters ->> 'max_members')::integer);
    v_hedges    integer := coalesce((parameters ->> 'max_hedges')::integer, greatest(v_members - 1, 1));
    v_option    record;
begin
    if provider = 'hedge' then
        return case when jsonb_typeof(parameters -> 'delay') = 'array' and jsonb_array_length(parameters -> 'delay') <> v_hedges
                    then format('delay: %s delays for %s further requests', jsonb_array_length(parameters -> 'delay'), v_hedges)
                    when jsonb_path_exists(parameters, '$.delay ? (@.min_seconds > @.max_seconds || !exists (@.max_seconds) && @.min_seconds > 5)')
                    then 'delay: min_seconds is above max_seconds' end;
    end if;
    for v_option in select * from (values ('vote', v_vote, '{majority,weighted,best_confidence,unanimous,mean,median}'::text[]),
                                          ('normalise', v_normalise, '{text,number,boolean,json,none}')) as o (name, value, known)
    loop
        if v_option.value <> all (v_option.known) and v_option.value !~ '^[[:alpha:]_]\w*(\.[[:alpha:]_]\w*)*:[[:alpha:]_]\w*(\.[[:alpha:]_]\w*)*$' then
            return format('%s is %L; use %s or package.module:function', v_option.name, v_option.value, array_to_string(v_option.known, ', '));
        end if;
    end loop;
    for v_option in select * from (values ('enough_consensus', 'sequential'), ('hedge_delay_seconds', 'hedged'), ('confident_at', 'cascade'),
                                          ('stops_early', 'parallel')) as o (name, strategy)
    loop
        if parameters ? v_option.name and v_option.strategy <> v_strategy then
            return format('%s is for strategy %s, and this one is %s', v_option.name, v_option.strategy, v_strategy);
        end if;
    end loop;
    return case
        when not v_is_sure and v_vote = 'best_confidence' then 'vote best_confidence needs to know how confident answers are: set confidence to reported or stated'
        when not v_is_sure and v_strategy = 'cascade' then 'strategy cascade needs to know how confident answers are: set confidence to reported or stated'
        when not v_is_sure and v_vote = 'weighted' and not jsonb_path_exists(parameters, '$.members[*] ? (@.type() == "object")')
        then 'vote weighted needs weights ({"model": "a", "weight": 2}), or confidence as reported or stated'
        when (parameters ->> 'stops_early')::boolean and v_vote not in ('majority', 'weighted', 'unanimous')
        then format('stops_early does not know when a vote by %s is settled: use majority, weighted, unanimous', v_vote)
        when v_vote = 'unanimous' and parameters ? 'min_consensus' then 'vote unanimous needs a consensus of 1: leave min_consensus out, or use majority'
        when v_vote in ('mean', 'median') and v_normalise not in ('text', 'number', 'json')
        then format('vote %s reads numbers by itself: leave normalise %s out', v_vote, v_normalise)
        when v_vote in ('mean', 'median') and parameters ->> 'field' is not null then format('vote %s is made of all numbers of JSON: leave field out', v_vote)
        when v_voters = 0 then 'below escalate needs a member that votes, and a last one to escalate to'
        when (parameters ->> 'min_responses')::integer > v_asked then format('min_responses is %s, and %s members are asked', parameters ->> 'min_responses', v_asked) end;
end;
$$;
comment on function pgharness._composite_problem(text, jsonb) is
'What parameters of an ensemble or a hedge, each allowed, do not mean together; null if they do. Workers know the same rules.';

create or replace function pgharness._check_composite_parameters(what text, provider text, parameters jsonb) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_problem record;
    v_schema  jsonb := _composite_schema(provider);
begin
    select * into v_problem from schema_violations(v_schema, parameters) limit 1;
    if found then
        raise exception '%: % %', what, coalesce(nullif(v_problem.path, ''), 'its parameters'), v_problem.problem
            using errcode = 'PH002', hint = case provider
                when 'ensemble' then 'For example: {"members": ["a", "b", "c"], "vote": "majority", "min_consensus": 0.5}.'
                else 'For example: {"members": ["a"], "delay": {"strategy": "percentile", "percentile": 95}}.' end;
    elsif _composite_problem(provider, parameters) is not null then
        raise exception '%: %', what, _composite_problem(provider, parameters)
            using errcode = 'PH002', hint = 'Change or leave out one of them: docs/ensembles.md and docs/hedging.md say what goes with what.';
    end if;
end;
$$;
comment on function pgharness._check_composite_parameters(text, text, jsonb) is
'Refuse parameters that an ensemble or hedge does not have, or that mean nothing together (PH002), naming the first.';

create or replace function pgharness._check_composite(composite pgharness.models) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_member text;
    v_path   text;
    v_depth  integer;
    v_most   constant integer := 4;
    v_above  integer;      -- how deep it lies below others
begin
    if not exists (select from _member_names((composite).parameters)) then
        raise exception 'model "%": % needs members, in an array', (composite).name, case (composite).provider when 'ensemble' then 'an ensemble' else 'a hedge' end
            using errcode = 'PH002', hint = 'Name other models: {"members": ["a", "b", "c"]}.';
    end if;
    if exists (select from _member_names((composite).parameters) as m where m.name is null) then
        raise exception 'model "%": a member is neither a name nor an object with a model', (composite).name
            using errcode = 'PH002', hint = 'Write members like {"members": ["a", {"model": "b", "weight": 2}]}.';
    end if;
    select m.name into v_member from _member_names((composite).parameters) as m left join models as found on found.name = m.name
     where found.id is null or found.provider = 'metric' or m.name = (composite).name order by m.number limit 1;
    if v_member is not null then
        raise exception 'model "%": its member "%" %', (composite).name, v_member,
                        case when v_member = (composite).name then 'is itself' when exists (select from models as x where x.name = v_member) then 'is a metric' else 'does not exist' end
            using errcode = 'PH002', hint = 'Insert the members first; list models that can be one: select name from pgharness.models where provider <> ''metric'';';
    end if;
    with recursive above as (
        select mm.model_id, 1 as height from model_members as mm where mm.member_id = (composite).id
        union all
        select mm.model_id, a.height + 1 from above as a join model_members as mm on mm.member_id = a.model_id where a.height < v_most
    )
    select coalesce(max(a.height), 0) into v_above from above as a;
    with recursive below as (
        select found.id, (composite).name || ' -> ' || found.name as path, 2 as depth, found.id = (composite).id as is_cycle
          from _member_names((composite).parameters) as m join models as found on found.name = m.name
        union all
        select mm.member_id, b.path || ' -> ' || found.name, b.depth + 1, mm.member_id = (composite).id
          from below as b join model_members as mm on mm.model_id = b.id join models as found on found.id = mm.member_id
         where not b.is_cycle and b.depth + v_above <= v_most
    )
    select b.path, case when b.is_cycle then 0 else b.depth end into v_path, v_depth
      from below as b where b.is_cycle or b.depth + v_above > v_most order by b.is_cycle desc limit 1;
    if v_path is not null then
        raise exception 'model "%" %: %', (composite).name, case v_depth when 0 then 'would ask itself' else format('would be more than %s models deep, with those that ask it', v_most) end, v_path
            using errcode = 'PH002', hint = 'Leave that member out.';
    end if;
    perform _check_composite_parameters(format('model "%s"', (composite).name), (composite).provider, (composite).parameters);
end;
$$;
comment on function pgharness._check_composite(pgharness.models) is
'Refuse a composite without members, with unknown ones, metrics or itself among them, or more than 4 deep with the composites above it (PH002).';

create or replace function pgharness._link_members() returns trigger
    language plpgsql volatile security definer set search_path = pgharness, pg_temp
as $$
begin
    if tg_op = 'UPDATE' and new.name <> old.name then
        -- every name anew, by who the members are: one statement may rename several
        update models as m
           set parameters = jsonb_set(m.parameters, '{members}', (
                   select jsonb_agg(case jsonb_typeof(each.value) when 'object' then each.value || jsonb_build_object('model', found.name) else to_jsonb(found.name) end order by mm.number)
                     from model_members as mm
                     join jsonb_array_elements(m.parameters -> 'members') with ordinality as each (value, place) on each.place = mm.number
                     join models as found on found.id = mm.member_id
                    where mm.model_id = m.id))
         where m.id in (select mm.model_id from model_members as mm where mm.member_id = new.id);
    end if;
    delete from model_members as mm where mm.model_id = new.id;
    insert into model_members (model_id, number, member_id)
    select new.id, m.number, found.id from _member_names(new.parameters) as m join models as found on found.name = m.name
     where new.provider in ('ensemble', 'hedge');
    return null;
end;
$$;
comment on function pgharness._link_members() is 'Keep model_members as a composite''s parameters name them, and those names when a member is renamed.';
create or replace trigger _500_link_members after insert or update of name, provider, parameters on pgharness.models
    for each row execute function pgharness._link_members();
