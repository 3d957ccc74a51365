-- Columns as people fill them in: what a table's own checks would refuse is told by name, and without showing the row.

create or replace function pgharness._column_schema(relation text) returns jsonb
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select jsonb_build_object('type', 'object', 'properties', case _column_schema.relation
        when 'projects' then '{
            "name": {"type": "string", "minLength": 1},
            "budget_usd": {"type": ["number", "null"], "exclusiveMinimum": 0}}'
        when 'models' then '{
            "name": {"type": "string", "minLength": 1},
            "base_url": {"type": ["string", "null"], "pattern": "^https?://"},
            "parameters": {"type": "object"},
            "timeout_seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
            "max_concurrency": {"type": ["integer", "null"], "minimum": 1},
            "requests_per_minute": {"type": ["integer", "null"], "minimum": 1},
            "tokens_per_minute": {"type": ["integer", "null"], "minimum": 1},
            "input_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "output_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "cached_input_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "batch_price_factor": {"type": "number", "minimum": 0, "maximum": 1}}'
        when 'model_prices' then '{
            "input_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "output_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "cached_input_usd_per_million": {"type": ["number", "null"], "minimum": 0},
            "batch_price_factor": {"type": ["number", "null"], "minimum": 0, "maximum": 1}}'
        when 'instances' then '{
            "name": {"type": "string", "minLength": 1},
            "note_replications": {"type": "integer", "minimum": 1, "maximum": 10000},
            "grade_replications": {"type": "integer", "minimum": 1, "maximum": 1000},
            "rubrics_per_case": {"type": "integer", "minimum": 0, "maximum": 100},
            "cycle_times": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "max_attempts": {"type": "integer", "minimum": 1, "maximum": 100},
            "retry_delay_seconds": {"type": "number", "minimum": 0, "maximum": 3600},
            "failure_threshold": {"type": "number", "minimum": 0, "maximum": 1},
            "budget_usd": {"type": ["number", "null"], "exclusiveMinimum": 0},
            "total_budget_usd": {"type": ["number", "null"], "exclusiveMinimum": 0},
            "response_cache": {"enum": ["off", "read", "write", "replay"]},
            "batch_deadline_seconds": {"type": ["number", "null"], "minimum": 1, "maximum": 2592000}}'
    end::jsonb);
$$;
comment on function pgharness._column_schema(text) is
'What columns of a table that people insert into may hold, as a JSON Schema of its rows: the table''s own checks in words. NaN and infinity are no numbers there.';

create or replace function pgharness._check_columns() returns trigger
    language plpgsql volatile security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_row     jsonb := to_jsonb(new);
    v_problem record;
begin
    select * into v_problem from schema_violations(_column_schema(tg_table_name), v_row) limit 1;
    if found then
        raise exception '% "%": % %', tg_argv[0], coalesce(v_row ->> 'name', v_row ->> 'model', ''), v_problem.path, v_problem.problem
            using errcode = '23514', hint = format('What each column holds: \d+ pgharness.%s, or docs/sql.md.', tg_table_name);
    end if;
    return new;
end;
$$;
comment on function pgharness._check_columns() is 'Refuse a row with a value that its table would refuse, naming the column and what it may be (23514, as the table would).';

create or replace trigger _050_check_columns before insert or update on pgharness.projects
    for each row execute function pgharness._check_columns('project');
create or replace trigger _050_check_columns before insert or update on pgharness.models
    for each row execute function pgharness._check_columns('model');
create or replace trigger _050_check_columns before insert or update on pgharness.model_prices
    for each row execute function pgharness._check_columns('price of model');
create or replace trigger _050_check_columns before insert or update on pgharness.instances
    for each row execute function pgharness._check_columns('instance');
