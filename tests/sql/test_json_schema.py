"""schema_violations, schema_problems and _apply_defaults: what they find and how they say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

Found = list[tuple[str, str]]
SCHEMA_PROBLEMS = "select path, problem from pgharness.schema_problems(%s)"
VIOLATIONS = "select path, problem from pgharness.schema_violations(%s, %s)"


@pytest.fixture
def db(server_url: str, template: str) -> Iterator[psycopg.Connection[Any]]:
    """A read-only connection to the template itself: nothing is written, and 170 clones would be slow."""
    options = "-c default_transaction_read_only=on"
    with psycopg.connect(make_conninfo(server_url, dbname=template, options=options)) as connection:
        yield connection
        connection.rollback()


def problems(db: psycopg.Connection[Any], schema: object) -> Found:
    return db.execute(SCHEMA_PROBLEMS, (json.dumps(schema),)).fetchall()


def violations(db: psycopg.Connection[Any], schema: object, value: object) -> Found:
    return db.execute(VIOLATIONS, (json.dumps(schema), json.dumps(value))).fetchall()


def completed(db: psycopg.Connection[Any], schema: object, value: object) -> Any:
    row = db.execute("select pgharness._apply_defaults(%s, %s)", (json.dumps(schema), json.dumps(value))).fetchone()
    assert row is not None
    return row[0]


CONFIG = {
    "type": "object",
    "properties": {
        "model": {"type": "string", "minLength": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "seed": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        "items": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
    "required": ["model"],
    "additionalProperties": False,
}
LONG = "x" * 100
SHORTENED = '"' + "x" * 56 + "..."


def test_a_fitting_config_has_no_violations(db: psycopg.Connection[Any]) -> None:
    assert violations(db, CONFIG, {"model": "m", "temperature": 2, "seed": None, "items": [{"name": 1}]}) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"model": "m", "temperature": 3.5}, [("temperature", "is 3.5, more than the maximum 2")]),
        ({"temperature": 1}, [("model", "is missing")]),
        ({"model": ""}, [("model", "has 0 characters, fewer than the minimum 1")]),
        ({"model": "m", "items": [{"name": 1}, {}, {}]},
            [("items[1].name", "is missing"), ("items[2].name", "is missing")]),
        ({"model": "m", "temprature": 1},
            [("temprature", 'is not a known property; known are "items", "model", "seed", "temperature"')]),
        ({"model": "m", "seed": -1}, [("seed", "is -1, less than the minimum 0")]),
        ({"model": "m", "seed": "one"}, [("seed", 'is "one", not an integer or null')]),
        ({"seed": 1.5, "temperature": "hot"}, [
            ("model", "is missing"),
            ("seed", "is 1.5, not an integer or null"),
            ("temperature", 'is "hot", not a number'),
        ]),
        ([], [("", "is [], not an object")]),
        (None, [("", "is null, not an object")]),
    ],
)  # fmt: skip
def test_a_violation_names_field_value_and_limit(db: psycopg.Connection[Any], value: object, found: Found) -> None:
    assert violations(db, CONFIG, value) == found


@pytest.mark.parametrize(
    ("schema", "value", "problem"),
    [
        ({"type": "integer"}, 1.5, "is 1.5, not an integer"),
        ({"type": "integer"}, True, "is true, not an integer"),
        ({"type": ["number", "null"]}, "x", 'is "x", not a number or null'),
        ({"type": "boolean"}, 0, "is 0, not a boolean"),
        ({"type": "null"}, 0, "is 0, not null"),
        ({"type": "array"}, {"a": 1}, 'is {"a": 1}, not an array'),
        ({"type": "number"}, LONG, f"is {SHORTENED}, not a number"),
        ({"enum": ["a", 1, None]}, "b", 'is "b", not one of "a", 1, null'),
        ({"const": "a"}, "b", 'is "b", must be "a"'),
        ({"const": [1, {"a": None}]}, [1, {}], 'is [1, {}], must be [1, {"a": null}]'),
        ({"minimum": 1}, 0.99, "is 0.99, less than the minimum 1"),
        ({"maximum": 1.5}, 2, "is 2, more than the maximum 1.5"),
        ({"exclusiveMinimum": 0}, 0, "is 0, must be more than 0"),
        ({"exclusiveMaximum": 1}, 1, "is 1, must be less than 1"),
        ({"multipleOf": 0.1}, 0.35, "is 0.35, not a multiple of 0.1"),
        ({"minLength": 2}, "ä", "has 1 character, fewer than the minimum 2"),
        ({"maxLength": 2}, "äöü", "has 3 characters, more than the maximum 2"),
        ({"pattern": "^[a-z]+$"}, "a1", 'is "a1", which does not match the pattern ^[a-z]+$'),
        ({"format": "date"}, "2025-02-29", 'is "2025-02-29", not a valid date'),
        ({"format": "date-time"}, "2025-02-28", 'is "2025-02-28", not a valid date-time'),
        ({"format": "email"}, "nobody", 'is "nobody", not a valid email'),
        ({"format": "uuid"}, "1-2-3", 'is "1-2-3", not a valid uuid'),
        ({"format": "uri"}, "no scheme", 'is "no scheme", not a valid uri'),
        ({"minItems": 2}, [1], "has 1 item, fewer than the minimum 2"),
        ({"maxItems": 0}, [1, 2], "has 2 items, more than the maximum 0"),
        ({"uniqueItems": True}, ["a", 1, "a", 1.0, "a"], 'has the same item "a" at 0 and 2 and 4'),
        ({"contains": {"type": "null"}}, [1], "has no item of the kind that it must contain"),
        ({"minProperties": 2}, {"a": 1}, "has 1 property, fewer than the minimum 2"),
        ({"maxProperties": 1}, {"a": 1, "b": 2}, "has 2 properties, more than the maximum 1"),
        ({"not": {"type": "string"}}, "x", 'is "x", of the kind that it must not be'),
        (False, 1, "is not allowed"),
        ({"if": {"minimum": 5}, "then": {"multipleOf": 5}}, 7, "is 7, not a multiple of 5"),
        ({"if": {"minimum": 5}, "else": {"maximum": 1}}, 3, "is 3, more than the maximum 1"),
        ({"allOf": [{"minimum": 1}, {"maximum": 3}]}, 4, "is 4, more than the maximum 3"),
        ({"oneOf": [{"minimum": 1}, {"type": "null"}, {"maximum": 3}]}, 2,
            "is 2, which fits alternatives 1 and 3, must fit exactly one"),
        ({"anyOf": [{"minimum": 5}, {"multipleOf": 2}]}, 3,
            "fits none of the 2 alternatives: is 3, less than the minimum 5; or is 3, not a multiple of 2"),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "integer", "minimum": 3}]}, None,
            "is null, not an integer or a string"),
        ({"anyOf": [False, False]}, 1, "is not allowed"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"$ref": "#/definitions/c~0d"}},
            "definitions": {"c~d": {"minimum": 2}}}, 1, "is 1, less than the minimum 2"),
    ],
)  # fmt: skip
def test_each_keyword_says_what_is_wrong(
    db: psycopg.Connection[Any], schema: object, value: object, problem: str
) -> None:
    assert problems(db, schema) == []
    assert violations(db, schema, value)[0] == ("", problem)


@pytest.mark.parametrize(
    ("schema", "value", "found"),
    [
        ({"properties": {"a b": {"items": {"properties": {"c": False}}}}}, {"a b": [{}, {"c": 1}]},
            [('["a b"][1].c', "is not allowed")]),
        ({"properties": {"a": {"additionalProperties": {"type": "null"}}}}, {"a": {"b.c": 1, "": 2}},
            [('a[""]', "is 2, not null"), ('a["b.c"]', "is 1, not null")]),
        ({"prefixItems": [{"type": "string"}, True], "items": {"type": "null"}}, [1, 2, 3],
            [("[0]", "is 1, not a string"), ("[2]", "is 3, not null")]),
        ({"prefixItems": [True], "items": False}, [1, 2], [("[1]", "is not allowed")]),
        ({"patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False}, {"x_a": "1", "y": 2},
            [("y", "is not a known property"), ("x_a", 'is "1", not an integer')]),
        ({"additionalProperties": {"type": "number"}, "properties": {"a": True}}, {"a": "x", "b": "y"},
            [("b", 'is "y", not a number')]),
        ({"propertyNames": {"pattern": "^[a-z]+$", "maxLength": 3}}, {"Abcd": 1},
            [("Abcd", "name has 4 characters, more than the maximum 3"),
             ("Abcd", 'name is "Abcd", which does not match the pattern ^[a-z]+$')]),
        ({"dependentRequired": {"user": ["password"]}}, {"user": "x"},
            [("password", 'is missing, required with "user"')]),
        ({"required": ["b", "a"]}, {}, [("b", "is missing"), ("a", "is missing")]),
        ({"enum": [1], "minimum": 3}, 2, [("", "is 2, not one of 1"), ("", "is 2, less than the minimum 3")]),
        ({"type": "string", "enum": ["a"], "minLength": 3}, 2, [("", "is 2, not a string")]),
    ],
)  # fmt: skip
def test_paths_lead_to_the_offending_place(
    db: psycopg.Connection[Any], schema: object, value: object, found: Found
) -> None:
    assert violations(db, schema, value) == found


UNION = {
    "properties": {
        "guard": {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"kind": {"const": "regex"}, "pattern": {"type": "string"}},
                    "required": ["kind", "pattern"],
                },
                {"$ref": "#/$defs/Classifier"},
            ],
            "discriminator": {"propertyName": "kind"},
        }
    },
    "$defs": {
        "Classifier": {
            "type": "object",
            "properties": {"kind": {"const": "classifier"}, "threshold": {"type": "number", "maximum": 1}},
            "required": ["kind"],
        }
    },
}


@pytest.mark.parametrize(
    ("guard", "found"),
    [
        ({"kind": "classifier", "threshold": 2}, [("guard.threshold", "is 2, more than the maximum 1")]),
        ({"kind": "regex"}, [("guard.pattern", "is missing")]),
        ({"kind": "llm"}, [("guard", "fits none of the 2 alternatives: "
            'pattern is missing; or kind is "llm", must be "classifier"')]),
        ("regex", [("guard", 'is "regex", not an object')]),
    ],
)  # fmt: skip
def test_a_union_is_explained_by_the_alternative_that_was_meant(
    db: psycopg.Connection[Any], guard: object, found: Found
) -> None:
    assert violations(db, UNION, {"guard": guard}) == found


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (True, None),
        ({}, [1, {"a": None}]),
        ({"type": "integer"}, 1.0),
        ({"type": "number"}, 3),
        ({"enum": [1.0]}, 1),
        ({"const": {"a": [1], "b": 2}}, {"b": 2.0, "a": [1]}),
        ({"multipleOf": 0.01}, 19.99),
        ({"minLength": 2, "maxLength": 2}, "🙂🙂"),
        ({"minimum": 5, "minLength": 5, "minItems": 5, "required": ["a"]}, None),
        ({"uniqueItems": True}, [1, True, "1", [1], {"a": 1}, {"a": 2}]),
        ({"contains": {"minimum": 5}}, ["x"]),
        ({"anyOf": [{"type": "null"}, {"minimum": 3}]}, 3),
        ({"if": {"type": "string"}, "then": False}, 3),
        ({"format": "duration"}, "whatever"),
        ({"x-note": 1, "label": "Seed", "group": {}, "widget": 7, "title": 3, "examples": [], "$id": "x"}, 1),
        ({"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}}}}}, {"next": {}}),
    ],
)
def test_what_json_schema_allows_is_allowed(db: psycopg.Connection[Any], schema: object, value: object) -> None:
    assert problems(db, schema) == []
    assert violations(db, schema, value) == []


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        (r"\bcat\b", "a cat sat", True),
        (r"\bcat\b", "concatenate", False),
        (r"\Bcat", "concat", True),
        (r"^.$", "\n", False),
        (r"^[.]$", "x", False),
        (r"^[\w.-]+$", "a-b.c_1", True),
        (r"^\w+$", "é", False),
        (r"^\d{4}$", "2025", True),
        (r"^(?!.*--)[a-z-]+$", "a--b", False),
        (r"^(?:ab|c)+?$", "abcab", True),
        (r"\$\{\w+\}", "a ${name} b", True),
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "-1.25", True),
        (r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$", "-", False),
        ("b", "abc", True),
        ("", "anything", True),
    ],
)
def test_patterns_mean_what_they_mean_in_json_schema(
    db: psycopg.Connection[Any], pattern: str, text: str, fits: bool
) -> None:
    schema = {"pattern": pattern}
    assert problems(db, schema) == []
    assert (violations(db, schema, text) == []) is fits


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("date", ["2024-02-29", "1999-12-31"],
            ["2023-02-29", "2025-13-01", "2025-04-31", "0000-01-01", "2025-1-1", "2025-01-00", "x"]),
        ("date-time", ["2025-01-31T23:59:59Z", "2025-01-31t00:00:00.25+02:00", "2025-01-31T10:00:00"],
            ["2025-01-31", "2025-02-30T10:00:00Z", "2025-01-31T24:00:00Z", "2025-01-31T10:00Z", "2025-01-31T1:00:00Z"]),
        ("email", ["a@b", "first.last+tag@example.org"], ["@b", "a@", "a b@c", "a@b@c"]),
        ("uuid", ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567e89b12d3a456426614174000", "g" * 36]),
        ("uri", ["https://example.org/a?b=c#d", "urn:isbn:1"], ["example.org", "https://a b", "1x:y"]),
    ],
)  # fmt: skip
def test_formats_are_checked_lightly(db: psycopg.Connection[Any], name: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if violations(db, {"format": name}, text)] == []
    assert [text for text in bad if not violations(db, {"format": name}, text)] == []


UNSUPPORTED = "is not supported, so it would not be enforced"
NOT_A_TYPE = 'not a type; types are "array", "boolean", "integer", "null", "number", "object", "string"'


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        (3, [("", "is 3, not a schema (an object, true or false)")]),
        ({"type": "int"}, [("type", f'is "int", {NOT_A_TYPE}')]),
        ({"type": ["string", "int"]}, [("type", f'is ["string", "int"], {NOT_A_TYPE}')]),
        ({"type": []}, [("type", f"is [], {NOT_A_TYPE}")]),
        ({"minimum": "0"}, [("minimum", 'is "0", not a number')]),
        ({"exclusiveMinimum": True}, [("exclusiveMinimum", "is true, not a number")]),
        ({"multipleOf": 0}, [("multipleOf", "is 0, not a number above 0")]),
        ({"maxLength": -1}, [("maxLength", "is -1, not a whole number from 0")]),
        ({"minItems": 1.5}, [("minItems", "is 1.5, not a whole number from 0")]),
        ({"uniqueItems": "yes"}, [("uniqueItems", 'is "yes", not true or false')]),
        ({"enum": "a"}, [("enum", 'is "a", not a list of values')]),
        ({"enum": []}, [("enum", "is [], not a list of values")]),
        ({"format": 1}, [("format", "is 1, not a string")]),
        ({"pattern": 1}, [("pattern", "is 1, not a string")]),
        ({"pattern": "[a-"},
            [("pattern", 'is "[a-", not a regular expression that Postgres reads: brackets [] not balanced')]),
        ({"patternProperties": {"a**": True}}, [("patternProperties.a**",
            'is "a**", not a regular expression that Postgres reads: quantifier operand invalid')]),
        ({"properties": {"a": {"required": True}}},
            [("properties.a.required", "is true, not a list of property names")]),
        ({"required": ["a", 1]}, [("required", 'is ["a", 1], not a list of property names')]),
        ({"dependentRequired": {"a": "b"}},
            [("dependentRequired", 'is {"a": "b"}, not an object of lists of property names')]),
        ({"properties": ["a"]}, [("properties", 'is ["a"], not an object of schemas')]),
        ({"properties": {"a": "string"}}, [("properties.a", 'is "string", not a schema (an object, true or false)')]),
        ({"items": [{}]}, [("items", "is [{}], not a schema (an object, true or false); "
            "a list of schemas by position is prefixItems")]),
        ({"anyOf": []}, [("anyOf", "is [], not a list of schemas")]),
        ({"oneOf": [{"not": {"type": "x"}}, 1]}, [
            ("oneOf[1]", "is 1, not a schema (an object, true or false)"),
            ("oneOf[0].not.type", f'is "x", {NOT_A_TYPE}')]),
        ({"minimum": 5, "maximum": 2}, [("minimum", "is 5 and maximum is 2, so nothing fits")]),
        ({"minimum": 5, "exclusiveMaximum": 5}, [("minimum", "is 5 and exclusiveMaximum is 5, so nothing fits")]),
        ({"exclusiveMinimum": 5, "maximum": 5}, [("exclusiveMinimum", "is 5 and maximum is 5, so nothing fits")]),
        ({"minLength": 5, "maxLength": 2}, [("minLength", "is 5 and maxLength is 2, so nothing fits")]),
        ({"minItems": 5, "maxItems": 2}, [("minItems", "is 5 and maxItems is 2, so nothing fits")]),
        ({"minProperties": 5, "maxProperties": 2}, [("minProperties", "is 5 and maxProperties is 2, so nothing fits")]),
        ({"unevaluatedProperties": False}, [("unevaluatedProperties", UNSUPPORTED)]),
        ({"items": {"nullable": True}}, [("items.nullable", UNSUPPORTED)]),
        ({"contains": {}, "minContains": 2}, [("minContains", UNSUPPORTED)]),
        ({"max_length": 3}, [("max_length", "is not a keyword, did you mean maxLength")]),
        ({"additionalproperties": False},
            [("additionalproperties", "is not a keyword, did you mean additionalProperties")]),
        ({"$ref": "#/$defs/A"}, [("$ref", 'is "#/$defs/A", but there is no such schema here')]),
        ({"$ref": "#/required", "required": ["a"]}, [("$ref", 'is "#/required", but there is no such schema here')]),
        ({"$ref": "other.json"},
            [("$ref", 'is "other.json", but only references into this schema (# or #/...) are supported')]),
        ({"$ref": 1}, [("$ref", "is 1, not a string"),
            ("$ref", 'is "1", but only references into this schema (# or #/...) are supported')]),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]},
            [("anyOf[1].$ref", 'is "#", which leads back here without going into the value')]),
        ({"properties": {"t": {"type": "number", "maximum": 2, "default": 3}}},
            [("properties.t.default", "is 3, more than the maximum 2")]),
        ({"$defs": {"T": {"required": ["n"]}}, "properties": {"t": {"$ref": "#/$defs/T", "default": {}}}},
            [("properties.t.default.n", "is missing")]),
    ],
)  # fmt: skip
def test_a_bad_schema_is_told_where_and_why(db: psycopg.Connection[Any], schema: object, found: Found) -> None:
    assert problems(db, schema) == found


def test_property_names_are_not_taken_for_keywords(db: psycopg.Connection[Any]) -> None:
    names = ("type", "minimum", "$ref", "max_length", "nullable", "properties")
    schema = {"properties": {name: {"type": "integer"} for name in names}}
    assert problems(db, schema) == []
    assert violations(db, schema, {name: 1 for name in names}) == []
    assert violations(db, schema, {"$ref": "x"}) == [("$ref", 'is "x", not an integer')]


def test_an_absent_schema_accepts_anything_and_an_absent_value_is_null(db: psycopg.Connection[Any]) -> None:
    assert db.execute(VIOLATIONS, (None, '{"a": 1}')).fetchall() == []
    assert db.execute(VIOLATIONS, ('{"type": "object"}', None)).fetchall() == [("", "is null, not an object")]
    assert db.execute(SCHEMA_PROBLEMS, (None,)).fetchall() == []


TREE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None},
            },
            "required": ["value"],
        }
    },
}


def nested(levels: int, innermost: object) -> object:
    value = innermost
    for _ in range(levels):
        value = {"value": 1, "next": value}
    return value


def test_a_recursive_schema_reaches_deep_values(db: psycopg.Connection[Any]) -> None:
    assert problems(db, TREE) == []
    assert violations(db, TREE, nested(35, None)) == []
    assert violations(db, TREE, nested(35, 3)) == [(".".join(["next"] * 35), "is 3, not an object or null")]


@pytest.mark.parametrize(
    "schema", [{"$ref": "#"}, {"anyOf": [{"allOf": [{"$ref": "#"}]}]}, {"oneOf": [{"$ref": "#"}]}, TREE]
)
def test_endless_recursion_is_an_error(db: psycopg.Connection[Any], schema: object) -> None:
    with pytest.raises(psycopg.errors.Error, match="nest more than 150 levels") as raised:
        violations(db, schema, nested(60, None))
    assert raised.value.sqlstate == "PH002"
    assert "schema_problems" in (raised.value.diag.message_hint or "")


def test_a_dangling_reference_is_an_error_not_a_pass(db: psycopg.Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.Error, match='schema reference "#/\\$defs/A" leads nowhere') as raised:
        violations(db, {"not": {"$ref": "#/$defs/A"}}, 1)
    assert raised.value.sqlstate == "PH002"


def test_failing_alternatives_within_alternatives_stay_cheap(db: psycopg.Connection[Any]) -> None:
    schema: dict[str, Any] = {
        "$defs": {"L": {"anyOf": [{"items": {"$ref": "#/$defs/L"}, "type": "array"}, {"const": 1}]}}
    }
    schema["$ref"] = "#/$defs/L"
    value: object = 2
    for _ in range(30):
        value = [value]
    db.execute("set local statement_timeout = '5s'")
    assert violations(db, schema, value) == [("[0]" * 30, "is 2, must be 1")]
    schema["$defs"]["L"]["anyOf"][1] = {"type": "array", "minItems": 2}
    [(path, problem)] = violations(db, schema, value)
    assert (path, len(problem) < 300) == ("", True)


@pytest.mark.parametrize(
    ("schema", "value", "complete"),
    [
        ({"properties": {"a": {"default": 1}, "b": {}, "c": {"default": None}}}, {}, {"a": 1, "c": None}),
        ({"properties": {"a": {"default": 1}}}, {"a": None, "z": 2}, {"a": None, "z": 2}),
        ({"properties": {"o": {"properties": {"a": {"default": 1}}}}}, {"o": {"b": 2}}, {"o": {"a": 1, "b": 2}}),
        ({"properties": {"o": {"properties": {"a": {"default": 1}}}}}, {}, {}),
        ({"properties": {"o": {"default": {}, "properties": {"a": {"default": 1}}}}}, {}, {"o": {"a": 1}}),
        ({"properties": {"o": {"$ref": "#/$defs/O"}}, "$defs": {"O": {"properties": {"a": {"default": 1}}}}}, {"o": {}},
            {"o": {"a": 1}}),
        ({"$ref": "#/$defs/O", "$defs": {"O": {"properties": {"a": {"default": 1}}}}}, {}, {"a": 1}),
        ({"allOf": [{"properties": {"a": {"default": 1}}}]}, {}, {"a": 1}),
        ({"properties": {"o": {"anyOf": [{"type": "object", "properties": {"a": {"default": 1}}}, {"type": "null"}]}}},
            {"o": {}}, {"o": {"a": 1}}),
        ({"oneOf": [{"properties": {"k": {"const": c}, "n": {"default": c * 2}}} for c in ("a", "b")]}, {"k": "b"},
            {"k": "b", "n": "bb"}),
        ({"oneOf": [{"properties": {"k": {"const": c}, "n": {"default": c * 2}}} for c in ("a", "b")]}, {}, {}),
        ({"properties": {"l": {"items": {"properties": {"a": {"default": 1}}}}}}, {"l": [{}, {"a": 2}, 3]},
            {"l": [{"a": 1}, {"a": 2}, 3]}),
        ({"properties": {"a": {"default": 1}}}, [1], [1]),
        ({"properties": {"a": {"default": 1}}}, "text", "text"),
        ({"items": {}}, [], []),
        (True, {"a": 1}, {"a": 1}),
        (None, {"a": 1}, {"a": 1}),
    ],
)  # fmt: skip
def test_defaults_fill_what_is_absent_and_nothing_else(
    db: psycopg.Connection[Any], schema: object, value: object, complete: object
) -> None:
    filled = completed(db, schema, value)
    assert filled == complete
    assert completed(db, schema, filled) == filled
