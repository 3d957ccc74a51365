-- Models as people write them: what could never run, would do nothing, or holds a secret is refused.

create or replace function pgharness._check_models() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_providers constant text[] := array['openai', 'openai_responses', 'anthropic', 'gemini', 'openai_compatible', 'simulator', 'command', 'python', 'plugin', 'metric',
                                         'ensemble', 'hedge'];
begin
    if new.provider <> all (v_providers) then
        raise exception 'provider "%" of model "%" does not exist', new.provider, new.name
            using errcode = 'PH002', hint = format('Use one of %s.', array_to_string(v_providers, ', '));
    elsif new.model = '' and new.provider not in ('simulator', 'command', 'python', 'metric', 'ensemble', 'hedge') then
        raise exception 'model "%" does not say which model of % it is', new.name, new.provider
            using errcode = 'PH002', hint = 'Give the provider''s own name of it in model, for example (name, provider, model) values (''gpt'', ''openai'', ''...'').';
    end if;
    if new.api_key_env !~ '^[A-Z][A-Z0-9_]*_(KEY|TOKEN)(_[0-9]+)?( *, *[A-Z][A-Z0-9_]*_(KEY|TOKEN)(_[0-9]+)?)*$' then
        -- before the table's own check, whose message would show the row: somebody may have pasted a key
        raise exception 'api_key_env of model "%" is not the name of an environment variable that ends in _KEY or _TOKEN', new.name
            using errcode = 'PH002', hint = 'Name the variable that holds the key on the workers, for example OPENAI_API_KEY; the key itself is never stored.';
    end if;
    perform _refuse_secrets(format('parameters of model "%s"', new.name), new.parameters);
    if new.base_url ~ '^https?://[^/?#]*@' then
        raise exception 'base_url of model "%" holds a user or password', new.name
            using errcode = 'PH002', hint = 'Leave it out of the address; name the environment variable that holds the key in api_key_env.';
    end if;
    if new.has_batches and new.provider not in ('openai', 'openai_responses', 'openai_compatible', 'anthropic') then
        raise exception 'model "%" of provider % has no batches', new.name, new.provider
            using errcode = 'PH002', hint = 'Leave has_batches out: its calls are made live, beside the batches of a run.';
    end if;
    if new.provider = 'metric' then
        perform _check_metric(new.model, new.parameters);
        if exists (select from model_combinations as mc where mc.generator_id = new.id) then
            raise exception 'model "%" is the generator of a combination, and a metric writes no notes', new.name
                using errcode = 'PH003', hint = 'Insert the metric under another name.';
        end if;
        if exists (select from model_members as mm where mm.member_id = new.id) then
            raise exception 'model "%" is a member of %, and a metric answers nothing', new.name,
                            (select string_agg(format('"%s"', m.name), ', ' order by m.name) from model_members as mm join models as m on m.id = mm.model_id where mm.member_id = new.id)
                using errcode = 'PH003', hint = 'Insert the metric under another name.';
        end if;
    elsif new.provider = 'python' and new.model !~ '^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$' then
        raise exception 'model "%": "%" does not name a callable', new.name, new.model
            using errcode = 'PH002', hint = 'Write package.module:function, for example my_models.baseline:write_note.';
    elsif new.provider = 'command' and jsonb_path_exists(new.parameters, 'strict $.command ? (@.type() == "array" && @.size() > 0)', silent => true) is not true then
        raise exception 'model "%": parameters.command is missing', new.name
            using errcode = 'PH002', hint = 'Give the program as an array: {"command": ["python", "generate.py"], "repository": "..."}.';
    elsif new.provider = 'openai_compatible' and new.base_url is null then
        raise exception 'model "%" does not say where it is', new.name
            using errcode = 'PH002', hint = 'Give the address of its API in base_url, with the version, for example http://localhost:8000/v1.';
    elsif new.provider = 'simulator' then
        perform _check_simulator(format('model "%s"', new.name), new.parameters);
    elsif new.provider in ('ensemble', 'hedge') then
        perform _refuse_idle(new);
        perform _check_composite(new);
    end if;
    return new;
end;
$$;
comment on function pgharness._check_models() is 'Refuse a model whose provider could never run it (PH002).';

create or replace function pgharness._refuse_idle(composite pgharness.models) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_column text;
begin
    select each.name into v_column from (values
        ('model', (composite).model <> ''), ('base_url', (composite).base_url is not null), ('api_key_env', (composite).api_key_env is not null),
        ('input_usd_per_million', (composite).input_usd_per_million is not null), ('output_usd_per_million', (composite).output_usd_per_million is not null),
        ('cached_input_usd_per_million', (composite).cached_input_usd_per_million is not null)) as each (name, is_given) where each.is_given limit 1;
    if v_column is not null then
        raise exception 'model "%": % of % would do nothing', (composite).name, v_column, case (composite).provider when 'ensemble' then 'an ensemble' else 'a hedge' end
            using errcode = 'PH002', hint = format('It only asks its members: set %s of those.', v_column);
    end if;
end;
$$;
comment on function pgharness._refuse_idle(pgharness.models) is 'Refuse what a composite does not have of its own: where it is, a key, prices (PH002).';

create or replace function pgharness._check_model_prices() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
begin
    if new.input_usd_per_million is null and new.output_usd_per_million is null and new.cached_input_usd_per_million is null and new.batch_price_factor is null then
        raise exception 'price of model "%" from % on has no price', new.model, new.valid_from
            using errcode = 'PH002', hint = 'Give one or more of input_usd_per_million, output_usd_per_million, cached_input_usd_per_million, batch_price_factor; 0 is free.';
    elsif exists (select from models as m where m.id = new.model_id and m.provider in ('ensemble', 'hedge')) then
        raise exception 'model "%" has no price of its own: it only asks its members', new.model
            using errcode = 'PH002', hint = format('Give those prices: select name from pgharness.model_members as mm join pgharness.models as m on m.id = mm.member_id where mm.model_id = %s;', new.model_id);
    elsif new.valid_from is null then
        raise exception 'price of model "%" does not say from when it holds', new.model
            using errcode = 'PH002', hint = 'Give valid_from, for example ''2026-07-01''; prices that hold until then are columns of pgharness.models.';
    elsif new.valid_until <= new.valid_from then
        raise exception 'price of model "%": valid_until is %, and valid_from is %', new.model, new.valid_until, new.valid_from
            using errcode = 'PH002', hint = 'Leave valid_until out: a price holds until the next one begins.';
    end if;
    return new;
end;
$$;
comment on function pgharness._check_model_prices() is 'Refuse a price that says nothing, ends before it begins, or is of a composite (PH002).';

create or replace function pgharness._protect_models() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_composite text;
begin
    -- one that is deleted by the same statement is not seen here any more
    select m.name into v_composite from model_members as mm join models as m on m.id = mm.model_id where mm.member_id = old.id order by m.id limit 1;
    if v_composite is not null then
        raise exception 'model "%" is a member of "%" and cannot be deleted', old.name, v_composite
            using errcode = 'PH003', hint = format('Delete that first, or give it other members: update pgharness.models set parameters = parameters || ''{"members": [...]}'' where name = %L;', v_composite);
    end if;
    return old;
end;
$$;
comment on function pgharness._protect_models() is 'Refuse to delete a model that is a member of another (PH003).';

create or replace function pgharness._refuse_secrets(what text, parameters jsonb) returns void
    language plpgsql immutable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_key text;
begin
    select k into v_key from jsonb_object_keys(case when jsonb_typeof(parameters) = 'object' then parameters else '{}' end) as k
     where k ~* '(^|[_-])(api[_-]?key|token|secret|password|authorization)$' limit 1;
    if v_key is not null then
        raise exception '% would store a secret under "%"', _refuse_secrets.what, v_key
            using errcode = 'PH002', hint = 'Keep it in an environment variable of the workers, and name that in api_key_env (a program: in parameters.environment).';
    end if;
end;
$$;
comment on function pgharness._refuse_secrets(text, jsonb) is 'Refuse parameters that look like a key, token or password (PH002): no secret is stored.';

create or replace function pgharness._check_metric(metric text, parameters jsonb) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_allowed text[];
    v_key     text;
begin
    if metric ~ '^plugin:.' then
        return;                                         -- only workers know which are installed, and their options
    end if;
    v_allowed := case metric
        when 'exact_match' then array['ignore_case', 'ignore_space']
        when 'contains' then array['ignore_case']
        when 'numeric_match' then array['absolute_tolerance', 'relative_tolerance']
        when 'regex' then array['pattern', 'ignore_case']
    end;
    if v_allowed is null then
        raise exception 'metric "%" does not exist', metric
            using errcode = 'PH002', hint = 'Use exact_match, numeric_match, contains or regex, or plugin:NAME for one that is installed where workers run.';
    end if;
    select k into v_key from jsonb_object_keys(parameters) as k where k <> all (v_allowed) limit 1;
    if v_key is not null then
        raise exception 'metric % has no option "%"', metric, v_key
            using errcode = 'PH002', hint = format('Its options: %s.', array_to_string(v_allowed, ', '));
    end if;
end;
$$;
comment on function pgharness._check_metric(text, jsonb) is 'Refuse an unknown metric or option (PH002); those of plugins (plugin:NAME) are for workers to judge.';

create or replace trigger _100_check before insert or update on pgharness.models
    for each row execute function pgharness._check_models();
create or replace trigger _200_check before insert or update on pgharness.model_prices
    for each row execute function pgharness._check_model_prices();
create or replace trigger _200_protect before delete on pgharness.models
    for each row execute function pgharness._protect_models();
