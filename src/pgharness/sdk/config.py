"""Configuration: a pydantic model's JSON Schema as the database enforces it, and values read as it judges them.

The database checks a configuration when an instance is inserted, Python when a run starts; both must come to the same.
So the schema says what the model checks (closed to keys that no field has, unless it says `extra="allow"`), and Python
reads in pydantic's strict JSON mode by alias, with 1.0 as the integer that it is in JSON, and refuses what pydantic
would let pass and the schema does not: unknown keys, sets that repeat an item, dates and durations spelt otherwise.
What a JSON Schema cannot say, such as a model's own validators, is seen when a run starts.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

from pydantic import AliasChoices, BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticSerializationError, to_json

from pgharness.errors import InvalidArgument

# -- the schema

_DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
_OFFSET = r"([Zz]|[-+]([01][0-9]|2[0-3]):[0-5][0-9])?"
_HEX = "[0-9A-Fa-f]"
_NUMBER = r"-?(0|[1-9][0-9]*)"
# How values that are texts in JSON are spelt: pydantic reads more, which the database would refuse.
_SPELLINGS: dict[type, str] = {
    datetime: rf"^{_DATE}[Tt ]{_CLOCK}{_OFFSET}$",
    date: f"^{_DATE}$",
    time: f"^{_CLOCK}{_OFFSET}$",
    timedelta: r"^[-+]?P(?=[0-9T])([0-9]{1,6}D)?(T(?=[0-9])([0-9]{1,6}H)?([0-9]{1,6}M)?([0-9]{1,6}(\.[0-9]+)?S)?)?$",
    UUID: f"^{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}$",
    int: f"^{_NUMBER}$",  # these three as keys of an object
    float: rf"^{_NUMBER}(\.[0-9]+)?([eE][-+]?[0-9]+)?$",
    Decimal: rf"^{_NUMBER}(\.[0-9]+)?$",
}
_KEY_TYPES: dict[str, type] = {"int": int, "float": float, "decimal": Decimal}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON Schema in the words that the database enforces, closed to keys that no field has.

    A default that its own field would refuse (`seed: int = None`) is not told: Python fills it in.
    """
    try:
        schema = model.model_json_schema(schema_generator=_Generator)
    except PydanticUserError as exc:
        raise InvalidArgument(
            f"configuration {model.__name__} has no JSON Schema: {str(exc).splitlines()[0]}",
            hint="A configuration is stored as JSON: use text, numbers, lists, dicts and models of these.",
        ) from exc
    if "$ref" in schema and "properties" not in schema:  # of a model that refers to itself
        schema = {**schema["$defs"][schema["$ref"].rpartition("/")[2]], "$defs": schema["$defs"]}
    _close(schema)
    return schema


class _Generator(GenerateJsonSchema):
    """Pydantic's schemas, told to the last where they say less than its validators check."""

    ignored_warning_kinds: typing.ClassVar[set[Any]] = {"skipped-choice", "non-serializable-default"}  # type: ignore[misc]

    def encode_default(self, dft: Any) -> Any:
        if isinstance(dft, Decimal) and dft.is_finite():
            return int(dft) if dft == dft.to_integral_value() else float(dft)
        return super().encode_default(dft)

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().model_schema(schema)
        for name, field in schema["cls"].model_fields.items():
            told = found.get("properties", {}).get(_key_of(name, field))
            if isinstance(told, dict):
                told.setdefault("title", self.get_title_from_name(name))
                if "default" in told and not _takes_default(field, told["default"]):
                    del told["default"]
        return found

    def dict_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().dict_schema(schema)
        key = schema.get("keys_schema") or {"type": "any"}
        if patterns := found.pop("patternProperties", None):
            ((pattern, found["additionalProperties"]),) = patterns.items()
            found["propertyNames"] = {**found.get("propertyNames", {}), "pattern": pattern}
        elif key["type"] in _KEY_TYPES:
            found["propertyNames"] = {"pattern": _SPELLINGS[_KEY_TYPES[key["type"]]]}
        elif key["type"] == "bool":
            found["propertyNames"] = {"enum": ["true", "false"]}
        elif key["type"] in ("enum", "literal"):
            members = (m.value if isinstance(m, Enum) else m for m in key.get("members") or key["expected"])
            found["propertyNames"] = {"enum": [m if isinstance(m, str) else json.dumps(m) for m in members]}
        return found

    def decimal_schema(self, schema: Any) -> JsonSchemaValue:
        alternatives = super().decimal_schema(schema)
        found: JsonSchemaValue = next(
            (each for each in alternatives.get("anyOf", [alternatives]) if each.get("type") == "number"), alternatives
        )
        places, digits = schema.get("decimal_places"), schema.get("max_digits")
        if places is not None:
            found.setdefault("multipleOf", 10**-places)
        if places is not None and digits is not None:
            found.setdefault("exclusiveMinimum", -(10 ** (digits - places)))
            found.setdefault("exclusiveMaximum", 10 ** (digits - places))
        return found

    def datetime_schema(self, schema: Any) -> JsonSchemaValue:
        offset = {"aware": _OFFSET.removesuffix("?"), "naive": ""}.get(schema.get("tz_constraint"))
        pattern = {} if offset is None else {"pattern": f"^{_DATE}[Tt ]{_CLOCK}{offset}$"}
        return {**super().datetime_schema(schema), **pattern}

    def time_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().time_schema(schema), "pattern": _SPELLINGS[time]}

    def timedelta_schema(self, schema: Any) -> JsonSchemaValue:
        return {**super().timedelta_schema(schema), "pattern": _SPELLINGS[timedelta]}

    def str_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().str_schema(schema)
        if "pattern" in found:
            found["pattern"] = re.sub(r"\(\?P<\w+>", "(", found["pattern"])  # names mean nothing here
        return found

    def uuid_schema(self, schema: Any) -> JsonSchemaValue:
        version = schema.get("version")
        return {"type": "string", "format": "uuid", **({"pattern": f"^.{{14}}{version}"} if version else {})}

    def url_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().url_schema(schema)
        if schemes := schema.get("allowed_schemes"):
            found["pattern"] = f"^({'|'.join(map(re.escape, schemes))})://[^/?#]"
        return found

    def tagged_union_schema(self, schema: Any) -> JsonSchemaValue:
        found = super().tagged_union_schema(schema)
        if "discriminator" in found:
            found["required"] = [found["discriminator"]["propertyName"]]  # also where it has a default
        elif "oneOf" in found:
            found["anyOf"] = found.pop("oneOf")  # the tag that a function chooses decides, not which ones fit
        return found


def _close(schema: Any) -> None:
    """Refuse the keys that no field has, wherever a schema does not say otherwise; keep their order in a list too."""
    if not isinstance(schema, dict):
        return
    if isinstance(properties := schema.get("properties"), dict):
        schema.setdefault("additionalProperties", False)
        if len(properties) > 1:
            schema["propertyOrder"] = list(properties)  # for jsonb forgets it
    for keyword, inner in schema.items():
        if keyword in ("properties", "$defs", "patternProperties") and isinstance(inner, dict):
            for each in inner.values():
                _close(each)
        elif keyword in ("items", "additionalProperties", "propertyNames", "not", "if", "then", "else", "contains"):
            _close(inner)
        elif keyword in ("prefixItems", "anyOf", "oneOf", "allOf") and isinstance(inner, list):
            for each in inner:
                _close(each)


def _key_of(name: str, field: FieldInfo) -> str:
    """Return the key by which a field stands in a configuration."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        alias = next((choice for choice in alias.choices if isinstance(choice, str)), None)
    return alias if isinstance(alias, str) else name


def _takes_default(field: FieldInfo, default: Any) -> bool:
    try:
        annotated: Any = Annotated[field.annotation, field]
        adapter: TypeAdapter[Any] = TypeAdapter(annotated)
        return not _find_problems(adapter.validate_json, default)[1]
    except Exception:  # whatever it is, Python fills it in
        return False


# -- a value


def read_config(model: type[BaseModel], value: Mapping[str, Any] | BaseModel, *, name: str) -> BaseModel:
    """Return a value validated as the database judges it. Raises InvalidArgument naming each wrong field."""
    try:
        given = json.loads(to_json(value, by_alias=True, inf_nan_mode="constants"))
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        raise InvalidArgument(
            f'config of experiment "{name}" is no JSON: {exc}', hint="Use text, numbers, lists and dicts."
        ) from exc
    found, problems = _find_problems(model.model_validate_json, given)
    if problems:
        raise refusal(name, problems)
    return typing.cast(BaseModel, found)


_Problem = tuple[str, str, str]  # where, the key there, what


def _find_problems(validate: Callable[..., Any], given: Any) -> tuple[Any, list[_Problem]]:
    """Return what a value is validated to, and what is wrong with it."""
    if infinite := [(path, "", f"is {value}, no number in JSON") for path, value in _infinite(given)]:
        return None, infinite
    found, problems = _attempt(validate, given)
    if problems and _canonical(given) != json.dumps(given, sort_keys=True):
        again = _attempt(validate, _with_integers(given))
        return (found, problems) if again[1] else again
    return found, problems


def _attempt(validate: Callable[..., Any], given: Any) -> tuple[Any, list[_Problem]]:
    try:
        found = validate(json.dumps(given), strict=True, by_alias=True, by_name=False)
    except ValidationError as exc:
        return None, [_tell(error, given) for error in exc.errors(include_url=False, include_context=False)]
    return found, list(_compare(found, given, ""))


def _with_integers(value: Any) -> Any:
    """Return a value with 1.0 as 1: to JSON, and so to the database, these are one number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_with_integers(item) for item in value]
    return {key: _with_integers(item) for key, item in value.items()} if isinstance(value, dict) else value


def _infinite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        yield path, value
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _infinite(item, _extend(path, key))


def _compare(found: Any, given: Any, path: str) -> Iterator[_Problem]:
    """Yield what pydantic let pass and the database would not: unknown keys, items that repeat, other spellings."""
    if isinstance(given, dict):
        yield from _compare_keys(found, given, path)
    elif isinstance(given, list):
        if isinstance(found, set | frozenset):
            if len({_canonical(item) for item in given}) < len(given):
                yield path, "", "has the same item twice"
        elif isinstance(found, list | tuple):
            for index, (inner, item) in enumerate(zip(found, given, strict=False)):
                yield from _compare(inner, item, _extend(path, index))
    elif isinstance(given, str):
        if isinstance(found, Decimal) or not _is_spelt(found, given):
            yield path, "", f"is {json.dumps(given)}, not the JSON form of {_a(type(found))}"
    elif isinstance(given, bool | int | float):
        plain = found.value if isinstance(found, Enum) else found
        if isinstance(plain, bool | int | float) and isinstance(plain, bool) is not isinstance(given, bool):
            yield path, "", f"is {json.dumps(given)}, not {_a(type(plain))}"


def _compare_keys(found: Any, given: dict[str, Any], path: str) -> Iterator[_Problem]:
    kind = type(found)
    if isinstance(found, BaseModel):
        inner = {_key_of(name, field): vars(found).get(name) for name, field in kind.model_fields.items()}
        inner.update(found.model_extra or {})
    elif dataclasses.is_dataclass(found):
        fields: Mapping[str, FieldInfo] = getattr(kind, "__pydantic_fields__", {})
        inner = {
            _key_of(f.name, fields[f.name]) if f.name in fields else f.name: getattr(found, f.name)
            for f in dataclasses.fields(found)
        }
    elif isinstance(found, dict):
        if len(found) == len(given) and not found.keys() <= given.keys():  # keys that are no texts
            for key, (told, item) in zip(given, found.items(), strict=True):
                if not isinstance(told, str) and not _is_spelt(told, key):
                    yield path, key, f"name is not the JSON form of {_a(type(told))}"
                yield from _compare(item, given[key], _extend(path, key))
            return
        inner = found
    else:
        if isinstance(found, tuple):
            yield path, "", "is an object, not an array"
        return
    for key, item in given.items():
        if key in inner:
            yield from _compare(inner[key], item, _extend(path, key))
        else:
            known = ", ".join(f'"{name}"' for name in sorted(inner)[:20])
            yield path, key, "is not a known property" + (f"; known are {known}" if known else "")


def _is_spelt(found: Any, given: str) -> bool:
    plain = found.value if isinstance(found, Enum) else found
    if isinstance(plain, bool) or (isinstance(found, Enum) and isinstance(plain, int | float)):
        return given == json.dumps(plain)  # of a key
    for kind, pattern in _SPELLINGS.items():
        if isinstance(plain, kind):
            return re.fullmatch(pattern[1:-1], given) is not None
    return True


def _canonical(value: Any) -> str:
    return json.dumps(_with_integers(value), sort_keys=True)


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def _tell(error: Any, given: Any) -> _Problem:
    """Return an error of pydantic with its place in the value: a location also names alternatives of a union."""
    path, here = "", given
    *outer, last = error["loc"] or ("",)
    for step in outer:
        if isinstance(here, dict | list) and _has(here, step):
            path, here = _extend(path, step), here[step]
    is_missing = error["type"] in ("missing", "missing_argument", "extra_forbidden")
    if is_missing or (isinstance(here, dict | list) and _has(here, last)):
        return path, last, "is missing" if error["type"].startswith("missing") else _words(error)
    return path, "", _words(error)


def _has(value: Any, step: Any) -> bool:
    return step in value if isinstance(value, dict) else isinstance(step, int) and step < len(value)


def _words(error: Any) -> str:
    message = error["msg"][:1].lower() + error["msg"][1:]
    shown = json.dumps(error["input"], default=str)
    return f"is {shown if len(shown) <= 60 else shown[:57] + '...'}: {message}"


def _extend(path: str, key: str | int) -> str:
    if isinstance(key, int):
        return f"{path}[{key}]"
    if not re.fullmatch(r'[^\[\].\s"]+', key):
        return f"{path}[{json.dumps(key, ensure_ascii=False)}]"
    return f"{path}.{key}" if path else key


def refusal(name: str, problems: Iterable[_Problem]) -> InvalidArgument:
    told = []
    for path, key, problem in problems:
        at = _extend(path, key) if key != "" else path
        told.append(f"config{'' if at == '' or at.startswith('[') else '.'}{at} {problem}")
    return InvalidArgument(
        told[0],
        detail=f'{len(told)} problem(s) with the config of experiment "{name}": {"; ".join(told[:10])}.',
        hint=f"See what is allowed: pgharness experiments show {name}",
    )
