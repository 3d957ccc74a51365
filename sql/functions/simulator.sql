-- Simulated models: what they may be told to be like, checked when they are written, as workers check it.

create or replace function pgharness._simulator_schema() returns jsonb
    language sql immutable security invoker set search_path = pgharness, pg_temp
as $$
    select '{
        "$defs": {
            "LatencyPart": {
                "additionalProperties": false,
                "properties": {
                    "weight": {"exclusiveMinimum": 0, "type": "number"},
                    "seconds": {"minimum": 0, "type": "number"},
                    "spread": {"maximum": 5, "minimum": 0, "type": "number"}},
                "required": ["weight", "seconds"],
                "type": "object"},
            "Outage": {
                "additionalProperties": false,
                "properties": {
                    "start_seconds": {"minimum": 0, "type": "number"},
                    "seconds": {"exclusiveMinimum": 0, "type": "number"},
                    "kind": {"enum": ["error", "unavailable", "rate_limit", "hang", "slow"], "type": "string"},
                    "factor": {"minimum": 1, "type": "number"}},
                "required": ["start_seconds", "seconds", "kind"],
                "type": "object"}},
        "additionalProperties": false,
        "properties": {
            "latency_seconds": {"minimum": 0, "type": "number"},
            "latency_spread": {"maximum": 5, "minimum": 0, "type": "number"},
            "latency_mixture": {"items": {"$ref": "#/$defs/LatencyPart"}, "type": "array"},
            "latency_tail_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "latency_tail_factor": {"minimum": 1, "type": "number"},
            "seconds_per_1k_input_tokens": {"minimum": 0, "type": "number"},
            "seconds_per_1k_output_tokens": {"minimum": 0, "type": "number"},
            "error_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "rate_limit_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "retry_after_seconds": {"anyOf": [{"minimum": 0, "type": "number"}, {"type": "null"}]},
            "timeout_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "invalid_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "refusal_rate": {"maximum": 1, "minimum": 0, "type": "number"},
            "outages": {"items": {"$ref": "#/$defs/Outage"}, "type": "array"},
            "outage_epoch": {"anyOf": [{"format": "date-time", "type": "string"}, {"type": "null"}]},
            "requests_per_second_limit": {"anyOf": [{"exclusiveMinimum": 0, "type": "number"}, {"type": "null"}]},
            "concurrency_limit": {"anyOf": [{"minimum": 1, "type": "integer"}, {"type": "null"}]},
            "quality": {"maximum": 1, "minimum": 0, "type": "number"},
            "ability": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "discrimination": {"exclusiveMinimum": 0, "type": "number"},
            "difficulty_key": {"type": "string"},
            "error_group": {"anyOf": [{"minLength": 1, "type": "string"}, {"type": "null"}]},
            "error_correlation": {"maximum": 1, "minimum": 0, "type": "number"},
            "confidence_insight": {"maximum": 0.99, "minimum": 0, "type": "number"},
            "calibration_noise": {"maximum": 10, "minimum": 0, "type": "number"},
            "leniency": {"maximum": 1, "minimum": -1, "type": "number"},
            "noise": {"maximum": 100, "minimum": 0, "type": "number"},
            "output_tokens": {"maximum": 100000, "minimum": 1, "type": "integer"}},
        "type": "object"}'::jsonb;
$$;
comment on function pgharness._simulator_schema() is
'The JSON Schema of the parameters of a simulated model: what a worker reads them by, which also knows what times and shares may go together.';

create or replace function pgharness._check_simulator(what text, parameters jsonb) returns void
    language plpgsql stable security invoker set search_path = pgharness, pg_temp
as $$
declare
    v_problem record;
begin
    select * into v_problem from schema_violations(_simulator_schema(), parameters) limit 1;
    if found then
        raise exception '%: % %', what, v_problem.path, split_part(v_problem.problem, '; known are', 1)
            using errcode = 'PH002', hint = format('Known are %s: see docs/simulator.md.', (
                select string_agg(name, ', ' order by name) from jsonb_object_keys(_simulator_schema() -> 'properties') as name));
    end if;
end;
$$;
comment on function pgharness._check_simulator(text, jsonb) is 'Refuse parameters that a simulated model does not have (PH002), naming the first.';
