"""The SQL validator agrees with the jsonschema library on what is valid, and every refusal says something."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker
from pydantic import BaseModel, ConfigDict, Field

QUICK = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Small worlds, so that a generated value has something to do with a generated schema.
NAMES = st.sampled_from(["a", "b", "ab", "a.b", "x y", ""])
WORDS = st.sampled_from(["", "a", "b", "ab", "aab", "a-b", "b1", "ä", "🙂", "A\nb"])
NUMBERS = st.sampled_from([-3, -1, 0, 1, 2, 3, 4, 10, 0.5, 1.0, 2.5, -1.5, 1e20])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
COUNTS = st.integers(0, 3)
PATTERNS = st.sampled_from(
    ["^a", "b$", "^[a-z]+$", "a.b", r"\d", r"^[a-z]\w*$", r"\ba\b", "^(a|b){2}", "(?=.*b)a", "^$"]
)
TYPES = ["array", "boolean", "integer", "null", "number", "object", "string"]
FORMATS = FormatChecker(["uuid"])
DEFINITIONS = ["a/b", "c~d", "e"]

VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=6,
)

ASSERTIONS: dict[str, st.SearchStrategy[Any]] = {
    "type": st.one_of(st.sampled_from(TYPES), st.lists(st.sampled_from(TYPES), min_size=1, max_size=3, unique=True)),
    "enum": st.lists(VALUES, min_size=1, max_size=3),
    "const": VALUES,
    "minimum": NUMBERS,
    "maximum": NUMBERS,
    "exclusiveMinimum": NUMBERS,
    "exclusiveMaximum": NUMBERS,
    "multipleOf": st.sampled_from([1, 2, 3, 0.5, 0.25]),
    "minLength": COUNTS,
    "maxLength": COUNTS,
    "pattern": PATTERNS,
    "minItems": COUNTS,
    "maxItems": COUNTS,
    "uniqueItems": st.booleans(),
    "required": st.lists(NAMES, max_size=2, unique=True),
    "minProperties": COUNTS,
    "maxProperties": COUNTS,
    "dependentRequired": st.dictionaries(NAMES, st.lists(NAMES, max_size=2, unique=True), max_size=2),
    "title": st.just("ignored"),
    "default": st.just(0),
    "widget": st.just({"type": "ignored"}),
}


def applicators(inner: st.SearchStrategy[Any]) -> dict[str, st.SearchStrategy[Any]]:
    """Return the keywords that hold schemas, each with a strategy for its argument."""
    some = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(NAMES, inner, max_size=3)
    return {
        "items": inner,
        "prefixItems": some,
        "contains": inner,
        "properties": named,
        "patternProperties": st.dictionaries(PATTERNS, inner, max_size=2),
        "additionalProperties": inner,
        "propertyNames": inner,
        "allOf": some,
        "anyOf": some,
        "oneOf": some,
        "not": inner,
        "if": inner,
        "then": inner,
        "else": inner,
    }


def schema_of(keywords: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Return a strategy for schemas of at most four of these keywords."""
    chosen = st.lists(st.sampled_from(sorted(keywords)), max_size=4, unique=True)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: keywords[name] for name in names}))


REFERENCES = st.sampled_from([f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}" for name in DEFINITIONS])
SCHEMAS = st.recursive(
    st.one_of(schema_of(ASSERTIONS), st.booleans(), REFERENCES.map(lambda reference: {"$ref": reference})),
    lambda inner: schema_of(ASSERTIONS | applicators(inner)),
    max_leaves=5,
)
PLAIN_SCHEMAS = st.one_of(schema_of(ASSERTIONS), st.booleans())
DOCUMENTS = st.builds(
    lambda schema, definitions: {**schema, "$defs": dict(zip(DEFINITIONS, definitions, strict=True))},
    SCHEMAS.filter(lambda schema: isinstance(schema, dict)),
    st.tuples(PLAIN_SCHEMAS, PLAIN_SCHEMAS, PLAIN_SCHEMAS),
)


def violations(db: psycopg.Connection[Any], schema: object, value: object) -> list[tuple[str, str]]:
    query = "select path, problem from pgharness.schema_violations(%s, %s)"
    return db.execute(query, (json.dumps(schema), json.dumps(value))).fetchall()


def assert_agreement(db: psycopg.Connection[Any], schema: dict[str, Any], value: object) -> None:
    found = violations(db, schema, value)
    assert (not found) is Draft202012Validator(schema, format_checker=FORMATS).is_valid(value), found
    assert all(problem.startswith(("is ", "has ", "name ", "fits ")) for _, problem in found)


@QUICK
@given(DOCUMENTS, VALUES)
def test_generated_schemas_agree_with_the_reference(
    db: psycopg.Connection[Any], schema: dict[str, Any], value: object
) -> None:
    assert_agreement(db, schema, value)


@QUICK
@given(st.data(), st.sampled_from(sorted(ASSERTIONS | applicators(st.nothing()))))
def test_each_keyword_alone_agrees_with_the_reference(
    db: psycopg.Connection[Any], data: st.DataObject, keyword: str
) -> None:
    argument = data.draw((ASSERTIONS | applicators(schema_of(ASSERTIONS)))[keyword])
    assert_agreement(db, {keyword: argument}, data.draw(VALUES))


class Style(Enum):
    SOAP = "soap"
    BRIEF = "brief"


class Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["exact"] = "exact"
    ignore_case: bool = False


class Judge(BaseModel):
    kind: Literal["judge"]
    model: Annotated[str, Field(min_length=1, pattern=r"^[\w.-]+/[\w.-]+$")]
    weights: dict[Literal["clarity", "safety"], Annotated[float, Field(ge=0, le=1)]] = {}


class Sampling(BaseModel):
    model_config = ConfigDict(extra="forbid")
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: Annotated[list[str], Field(max_length=2)] = []


class Prompt(BaseModel):
    text: str
    children: list[Prompt] = []


class Config(BaseModel):
    seed: int
    style: Style = Style.SOAP
    sampling: Sampling = Sampling()
    grader: Annotated[Exact | Judge, Field(discriminator="kind")] = Exact()
    prompts: tuple[Prompt, Prompt] | None = None
    tags: set[str] = set()
    batch: UUID | None = None


MODELS: list[type[BaseModel]] = [Sampling, Exact, Judge, Prompt, Config]


def value_of(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values that mostly fit a schema which pydantic made."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*(value_of(alternative, root) for alternative in alternatives))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object" if "properties" in schema:
            members = {name: mostly(sub, root) for name, sub in schema["properties"].items()}
            required = {name: members.pop(name) for name in schema.get("required", [])}
            return st.fixed_dictionaries(required, optional=members)
        case "object":
            names = value_of(schema.get("propertyNames", {"type": "string"}), root)
            return st.dictionaries(names, mostly(schema["additionalProperties"], root), max_size=2)
        case "array" if "prefixItems" in schema:
            return st.tuples(*(mostly(s, root) for s in schema["prefixItems"])).map(list)
        case "array":
            return st.lists(mostly(schema["items"], root), max_size=3)
        case "string":
            return st.sampled_from(["a", "openai/gpt", "", "0b8a2d5e-6a53-4c62-9d0f-3f3c6a0f1c11"])
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
    return NUMBERS


def mostly(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values of which one in ten need not fit."""
    return st.deferred(lambda: st.integers(0, 9).flatmap(lambda n: SCALARS if n == 9 else value_of(schema, root)))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_pydantic_schemas_have_no_problems(db: psycopg.Connection[Any], model: type[BaseModel]) -> None:
    query = "select path, problem from pgharness.schema_problems(%s)"
    assert db.execute(query, (json.dumps(model.model_json_schema()),)).fetchall() == []


@settings(QUICK, max_examples=200)
@given(st.data(), st.sampled_from(MODELS))
def test_pydantic_schemas_agree_with_the_reference(
    db: psycopg.Connection[Any], data: st.DataObject, model: type[BaseModel]
) -> None:
    schema = model.model_json_schema()
    assert_agreement(db, schema, data.draw(value_of(schema, schema)))


def test_a_wrong_config_of_a_pydantic_model_reads_well(db: psycopg.Connection[Any]) -> None:
    config = {
        "style": "long",
        "sampling": {"temperature": 3.5, "topp": 1},
        "grader": {"kind": "judge", "model": "gpt", "weights": {"style": 1}},
        "prompts": [{"text": "a", "children": [{"text": 1}]}, {}],
        "tags": ["a", "a"],
    }
    assert sorted(violations(db, Config.model_json_schema(), config)) == [
        ("grader.model", r'is "gpt", which does not match the pattern ^[\w.-]+/[\w.-]+$'),
        ("grader.weights.style", 'name is "style", not one of "clarity", "safety"'),
        ("prompts[0].children[0].text", "is 1, not a string"),
        ("prompts[1].text", "is missing"),
        ("sampling.temperature", "is 3.5, more than the maximum 2"),
        ("sampling.topp", 'is not a known property; known are "stop", "temperature", "top_p"'),
        ("seed", "is missing"),
        ("style", 'is "long", not one of "soap", "brief"'),
        ("tags", 'has the same item "a" at 0 and 1'),
    ]


def test_defaults_make_a_pydantic_config_complete(db: psycopg.Connection[Any]) -> None:
    given = {"seed": 1, "grader": {"kind": "judge", "model": "a/b"}, "prompts": None}
    query = "select pgharness._apply_defaults(%s, %s)"
    row = db.execute(query, (json.dumps(Config.model_json_schema()), json.dumps(given))).fetchone()
    assert row is not None
    assert row[0] == Config.model_validate(given).model_dump(mode="json")
