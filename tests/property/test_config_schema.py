"""The database and Python judge a configuration alike, for every kind of field that a model may have."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Annotated, Any, Literal, NamedTuple, NotRequired
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import UUID4, AliasChoices, AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, NaiveDatetime
from typing_extensions import TypedDict

from pgharness.errors import InvalidArgument
from pgharness.sdk.config import read_config, schema_of

EXAMPLES = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Texts(BaseModel):
    plain: str
    sized: Annotated[str, Field(min_length=2, max_length=3)] = "ab"
    matched: Annotated[str, Field(pattern=r"^(?P<letter>[a-z])-\d+$")] = "a-1"
    empty: Annotated[str, Field(max_length=0)] | None = None


class Whole(BaseModel):
    plain: int
    between: Annotated[int, Field(ge=1, le=3)] = 2
    strictly: Annotated[int, Field(gt=1, lt=4)] = 2
    even: Annotated[int, Field(multiple_of=2)] = 0


class Real(BaseModel):
    plain: float
    between: Annotated[float, Field(ge=0, le=1)] = 0.5
    strictly: Annotated[float, Field(gt=0, lt=2.5)] = 1
    steps: Annotated[float, Field(multiple_of=0.5)] = 0.5


class Flags(BaseModel):
    needed: bool
    on: bool = True
    maybe: bool | None = None


class Choices(BaseModel):
    word: Literal["a", "b"]
    number: Literal[1, 2] = 1
    mixed: Literal["a", 3, None] = None
    only: Literal["exact"] = "exact"


class Style(Enum):
    SOAP = "soap"
    BRIEF = "brief"


class Level(IntEnum):
    LOW = 1
    HIGH = 3


class Mixed(Enum):
    ONE = 1
    TWO = "b"


class Enums(BaseModel):
    style: Style
    level: Level = Level.LOW
    mixed: Mixed = Mixed.ONE


class Optionals(BaseModel):
    needed: int | None
    given: int | None = 3
    text: str | None = None
    sloppy: int = None  # type: ignore[assignment]


class Inner(BaseModel):
    size: int = 1
    name: Annotated[str, Field(min_length=1)]


class Nested(BaseModel):
    inner: Inner
    other: Inner = Inner(name="a")
    maybe: Inner | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int = 1


class Typed(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int]
    a: str = ""


class Extras(BaseModel):
    open: Open = Open()
    typed: Typed = Typed()


class Lists(BaseModel):
    plain: list[int]
    sized: Annotated[list[str], Field(min_length=1, max_length=2)] = ["a"]
    models: list[Inner] = []
    anything: list[Any] = []


class Sets(BaseModel):
    words: set[str]
    few: Annotated[frozenset[int], Field(min_length=1, max_length=2)] = frozenset([1])


class Dicts(BaseModel):
    plain: dict[str, int]
    chosen: dict[Literal["a", "b"], float] = {}
    models: dict[str, Inner] = {}
    matched: dict[Annotated[str, Field(pattern="^a")], int] = {}
    sized: Annotated[dict[str, int], Field(min_length=1, max_length=2)] = {"a": 1}


class Keys(BaseModel):
    whole: dict[int, str] = {}
    real: dict[float, str] = {}
    flags: dict[bool, str] = {}
    days: dict[date, str] = {}
    levels: dict[Level, str] = {}
    styles: dict[Style, str] = {}
    ids: dict[UUID, str] = {}


class Tuples(BaseModel):
    pair: tuple[int, str]
    any_number: tuple[float, ...] = ()
    deep: tuple[Inner, bool] | None = None


class Unions(BaseModel):
    word_or_number: int | str
    numbers: int | list[int] = 1
    models: Inner | list[Inner] | None = None
    either: bool | float = False


class Exact(BaseModel):
    kind: Literal["exact"] = "exact"
    ignore_case: bool = False


class Judge(BaseModel):
    kind: Literal["judge"]
    weight: Annotated[float, Field(ge=0, le=1)] = 1


class Callout(BaseModel):
    kind: Literal["callout", "call"]
    exact: Exact | None = None


class Discriminated(BaseModel):
    grader: Annotated[Exact | Judge | Callout, Field(discriminator="kind")] = Exact()
    more: list[Annotated[Exact | Judge, Field(discriminator="kind")]] = []
    maybe: Annotated[Exact | Judge, Field(discriminator="kind")] | None = None
    plain: Exact = Exact()


class Undiscriminated(BaseModel):
    grader: Exact | Judge | Inner


class Moments(BaseModel):
    day: date
    at: datetime = datetime(2025, 1, 2)
    aware: AwareDatetime | None = None
    naive: NaiveDatetime | None = None
    clock: time = time(10)
    long: timedelta = timedelta(hours=1)


class Ids(BaseModel):
    any_version: UUID
    random: UUID4 | None = None


class Prices(BaseModel):
    plain: Decimal = Decimal("1.5")
    bounded: Annotated[Decimal, Field(ge=0, le=10)] = Decimal(1)
    cents: Annotated[Decimal, Field(max_digits=4, decimal_places=2)] = Decimal("1.25")


class Aliased(BaseModel):
    model_config = ConfigDict(populate_by_name=True)
    top_p: float = Field(0.5, alias="topP")
    first: int = Field(validation_alias="1st")
    either: int = Field(1, validation_alias=AliasChoices("one", "uno"))


class Tree(BaseModel):
    text: str = ""
    children: list[Tree] = []
    parent: Tree | None = None


class Forbidding(BaseModel):
    model_config = ConfigDict(extra="forbid")
    a: int = 1


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    a: float = 1.0
    day: date = date(2025, 1, 2)


class Lax(BaseModel):
    a: Annotated[int, Field(strict=False)] = 1


class Empty(BaseModel):
    pass


@dataclass
class Data:
    x: int
    y: str = "a"


class Typing(TypedDict):
    a: int
    b: NotRequired[str]


class Named(NamedTuple):
    a: int
    b: str = "x"


class Foreign(BaseModel):
    data: Data
    typed: Typing
    named: Named = Named(1)


class Anything(BaseModel):
    value: Any = None
    tree: JsonValue = None
    plain: dict[str, Any] = {}
    bare: list = []  # type: ignore[type-arg]


class Made(BaseModel):
    names: list[str] = Field(default_factory=list)
    seed: int = Field(default_factory=lambda: 1, ge=0)


class Base(BaseModel):
    seed: int = 0


class Derived(Base):
    steps: Annotated[int, Field(ge=1)]


class Described(BaseModel):
    a: Annotated[int, Field(ge=0, title="Label", description="What", examples=[1], deprecated=True)] = 1


MODELS: list[type[BaseModel]] = [
    *(Texts, Whole, Real, Flags, Choices, Enums, Optionals, Nested, Extras, Lists, Sets, Dicts, Keys, Tuples, Unions),
    *(Discriminated, Undiscriminated, Moments, Ids, Prices, Aliased, Tree, Forbidding, Strict, Lax, Empty, Foreign),
    *(Anything, Made, Derived, Described),
]

NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 0.5, 1.0, 2.5, 1.25, 1.255, 100, -0.5, 1e20])
MOMENTS = [
    *("2025-01-02", "2025-02-30", "2025-01-02T03:04:05", "2025-01-02 03:04:05.5Z", "2025-01-02T03:04:05+02:00"),
    *(
        "2025-01-02T03:04",
        "2025-01-02_03:04:05",
        "20250102",
        "1735689600",
        "03:04:05",
        "03:04",
        "03:04:05Z",
        "25:00:00",
    ),
    *("PT1H", "P1DT2H3M4.5S", "-PT1S", "P1D", "P", "PT", "1:00:00", "1 day", "P1Y", "P1W", "+PT1M", "PT5"),
]
UUIDS = [
    *("0b8a2d5e-6a53-4c62-9d0f-3f3c6a0f1c11", "0b8a2d5e-6a53-1c62-9d0f-3f3c6a0f1c11"),
    *("0B8A2D5E6A534C629D0F3F3C6A0F1C11", "urn:uuid:0b8a2d5e-6a53-4c62-9d0f-3f3c6a0f1c11", "x"),
]
WORDS = st.sampled_from(["", "a", "b", "ab", "abc", "abcd", "a-1", "a-x", "1", "1.5", "true", "soap", "exact", "judge"])
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.sampled_from(MOMENTS + UUIDS))
KEYS = st.sampled_from(["a", "b", "ab", "1", "01", "1.5", "1e5", "true", "True", "soap", "3", *MOMENTS[:2], *UUIDS[:2]])
JUNK = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(KEYS, SCALARS, max_size=2))


def value_of(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values that mostly fit a schema."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if alternatives := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*(value_of(alternative, root) for alternative in alternatives))
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    match schema.get("type"):
        case "object":
            members = {name: mostly(sub, root) for name, sub in schema.get("properties", {}).items()}
            required = {name: members.pop(name) for name in schema.get("required", [])}
            named = st.fixed_dictionaries(required, optional=members)
            others = schema.get("additionalProperties", True)
            if others is False:
                return named
            keys = st.one_of(KEYS, value_of(schema.get("propertyNames", {}), root).filter(lambda k: isinstance(k, str)))
            more = st.dictionaries(keys, SCALARS if others is True else mostly(others, root), max_size=2)
            return st.builds(lambda some, rest: rest | some, named, more)
        case "array":
            if "prefixItems" in schema:
                return st.tuples(*(mostly(s, root) for s in schema["prefixItems"])).map(list)
            return st.lists(mostly(schema["items"], root), min_size=schema.get("minItems", 0), max_size=3)
        case "string":
            match schema.get("format"):
                case "date" | "date-time" | "time" | "duration":
                    return st.sampled_from(MOMENTS)
                case "uuid":
                    return st.sampled_from(UUIDS)
            return WORDS
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "integer" | "number":
            return NUMBERS
    return JUNK


def mostly(schema: Any, root: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for values of which one in twelve need not fit."""
    return st.deferred(lambda: st.integers(0, 11).flatmap(lambda n: JUNK if n == 11 else value_of(schema, root)))


@st.composite
def configs(draw: Callable[..., Any], schema: Any) -> Any:
    """Draw a config; one in six has a key too many or one that is missing."""
    value = draw(value_of(schema, schema))
    match draw(st.integers(0, 11)):
        case 0:
            return value | {draw(KEYS): draw(JUNK)}
        case 1 if value:
            return {key: value[key] for key in list(value)[1:]}
    return value


def violations(db: psycopg.Connection[Any], schema: object, value: object) -> list[tuple[str, str]]:
    query = "select path, problem from pgharness.schema_violations(%s, %s)"
    return db.execute(query, (json.dumps(schema), json.dumps(value))).fetchall()


def refusal(model: type[BaseModel], value: Any) -> str | None:
    try:
        read_config(model, value, name="x")
    except InvalidArgument as exc:
        return str(exc.detail)
    return None


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_the_database_takes_the_schema(db: psycopg.Connection[Any], model: type[BaseModel]) -> None:
    query = "select path, problem from pgharness.schema_problems(%s)"
    assert db.execute(query, (json.dumps(schema_of(model)),)).fetchall() == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_python_and_the_database_judge_alike(db: psycopg.Connection[Any], model: type[BaseModel]) -> None:
    schema = schema_of(model)

    @EXAMPLES
    @given(configs(schema))
    def judged_alike(value: Any) -> None:
        found, refused = violations(db, schema, value), refusal(model, value)
        assert bool(found) is bool(refused), (value, found, refused)
        if found and refused:
            assert all(path for path, _ in found), found
            assert refused.split("config", 2)[2][0] in ".[", refused

    judged_alike()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_what_the_database_completes_python_reads_the_same(db: psycopg.Connection[Any], model: type[BaseModel]) -> None:
    schema = schema_of(model)

    @settings(EXAMPLES, max_examples=20)
    @given(configs(schema))
    def completed(value: Any) -> None:
        if refusal(model, value) is None:
            row = db.execute("select pgharness._apply_defaults(%s, %s)", (json.dumps(schema), json.dumps(value)))
            (stored,) = row.fetchone() or (None,)
            assert violations(db, schema, stored) == []
            assert read_config(model, stored, name="x") == read_config(model, value, name="x")

    completed()


WRONG: list[tuple[type[BaseModel], Any, str]] = [
    (Texts, {"plain": "a", "sized": "abcd"}, "sized"),
    (Whole, {"plain": "1"}, "plain"),
    (Whole, {"plain": 1, "even": 3}, "even"),
    (Nested, {"inner": {"name": ""}}, "inner.name"),
    (Nested, {"inner": {"name": "a", "sise": 1}}, "inner.sise"),
    (Lists, {"plain": [1, "a"]}, "plain[1]"),
    (Lists, {"plain": [], "models": [{"name": "a"}, {}]}, "models[1].name"),
    (Dicts, {"plain": {"a b": "x"}}, 'plain["a b"]'),
    (Discriminated, {"maybe": {"kind": "judge", "weight": 2}}, "maybe.weight"),
    (Discriminated, {"grader": {"ignore_case": True}}, "grader"),
    (Aliased, {"1st": 1, "topP": "x"}, "topP"),
    (Aliased, {"first": 1}, "1st"),
    (Moments, {"day": "2025-02-30"}, "day"),
    (Tree, {"children": [{"children": [{"text": 1}]}]}, "children[0].children[0].text"),
    (Sets, {"words": ["a", "a"]}, "words"),
    (Empty, {"a": 1}, "a"),
]


@pytest.mark.parametrize(("model", "value", "field"), WRONG, ids=lambda item: getattr(item, "__name__", None))
def test_both_name_the_field(db: psycopg.Connection[Any], model: type[BaseModel], value: Any, field: str) -> None:
    assert any(path.startswith(field) for path, _ in violations(db, schema_of(model), value))
    assert f"config.{field}" in (refusal(model, value) or "")
