"""Configurations as people type and read them: `--set key=value`, a JSON file, and a schema as a table of fields.

What is typed becomes the value that the schema asks for; whether it fits is for the database to say.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pgharness.errors import HarnessError, InvalidArgument

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A value of the configuration; a.b=1 reaches into a. Repeatable."),
]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="JSON file with the configuration; - is standard input.")
]

_DEEPEST = 8
_DEEPEST_FIELD = 3
_Schema = Mapping[str, Any]
_PHRASES = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "multiple of {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "matches {}",
    "format": "{}",
}


# -- what is typed


def read_config(file: str) -> dict[str, Any]:
    """Read a configuration from a file, or from standard input."""
    name = "standard input" if file == "-" else file
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
    except OSError as exc:
        raise HarnessError(f"{name} cannot be read: {exc.strerror}", hint="Name a JSON file.") from exc
    except ValueError as exc:
        raise InvalidArgument(f"{name} is no JSON: {exc}", hint='Write an object: {"rounds": 3}') from exc
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} holds no JSON object", hint='Write an object: {"rounds": 3}')
    return value


def laid_over(config: Mapping[str, Any], settings: Sequence[str], schema: _Schema) -> dict[str, Any]:
    """Return a configuration with `key=value` texts laid over it."""
    result = copy.deepcopy(dict(config))
    for setting in settings:
        path, is_set, text = setting.partition("=")
        if not is_set or not path.strip():
            raise typer.BadParameter(f"{setting!r} is not KEY=VALUE.", param_hint="--set")
        _lay(result, path.strip(), text, [schema], schema)
    return result


def _lay(target: Any, path: str, text: str, schemas: Sequence[_Schema], root: _Schema) -> None:
    key, _, rest = (path, "", "") if _below(schemas, path, root)[0] else path.partition(".")
    inner = _below(schemas, key, root)[1]
    place: Any = key
    if isinstance(target, list) and key.isdecimal() and int(key) < len(target):
        place = int(key)
    elif not isinstance(target, dict):
        raise typer.BadParameter(f"{key!r} of {path}={text} would be inside {json.dumps(target)}.", param_hint="--set")
    if not rest:
        target[place] = _value(text, inner, root)
        return
    if isinstance(target, dict) and target.get(key) is None:
        target[key] = {}
    _lay(target[place], rest, text, inner, root)


def _below(schemas: Sequence[_Schema], key: str, root: _Schema) -> tuple[bool, list[_Schema]]:
    """Tell whether a key is a field by its name, and return the schemas of what it holds."""
    is_named, found = False, list[_Schema]()
    for schema in _alternatives(schemas, root):
        if key in schema.get("properties", {}):
            is_named = True
            found.append(schema["properties"][key])
        else:
            found += [
                schema[word] for word in ("additionalProperties", "items") if isinstance(schema.get(word), Mapping)
            ]
    return is_named, found


def _alternatives(schemas: Sequence[Any], root: _Schema, depth: int = 0) -> Iterator[_Schema]:
    """Yield the schemas that these stand for: references followed, unions taken apart."""
    for schema in schemas:
        if not isinstance(schema, Mapping) or depth > _DEEPEST:
            continue
        yield schema
        inner = [each for word in ("anyOf", "oneOf", "allOf") for each in schema.get(word, ())]
        if str(schema.get("$ref", "")).startswith("#/$defs/"):
            inner.append(root.get("$defs", {}).get(schema["$ref"].removeprefix("#/$defs/")))
        yield from _alternatives(inner, root, depth + 1)


def _value(text: str, schemas: Sequence[_Schema], root: _Schema) -> Any:
    """Return what a text means: JSON where it parses as such and a text is not what is asked for."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return text
    types = set[str]()
    for schema in _alternatives(schemas, root):
        told = schema.get("type", [_type_of(each) for each in _choices(schema)])
        types.update([told] if isinstance(told, str) else told)
    kind = _type_of(value)
    is_asked_for = kind in types or (kind == "integer" and "number" in types)
    return text if "string" in types and (kind == "string" or not is_asked_for) else value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _choices(schema: _Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema.get("enum", ()))


def _type_of(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return "integer"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


# -- what is read


def flattened(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values of nested objects by their dotted paths."""
    if not isinstance(value, Mapping) or not value:
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flattened(inner, f"{path}.{key}" if path else str(key))
    return found


def fields(schema: Any) -> list[dict[str, Any]]:
    """Return the fields of a schema, those of nested objects too: field, type, default, limits, description."""
    return list(_fields(schema, schema, "", 0)) if isinstance(schema, Mapping) else []


def _fields(schema: _Schema, root: _Schema, prefix: str, depth: int) -> Iterator[dict[str, Any]]:
    properties = schema.get("properties", {})
    required = schema.get("required", ())
    order = [name for name in schema.get("propertyOrder", ()) if name in properties]
    for name in dict.fromkeys((*order, *properties)):
        field = properties[name] if isinstance(properties[name], Mapping) else {}
        alternatives = list(_alternatives([field], root))
        told = (each["description"] for each in alternatives if "description" in each)
        default = json.dumps(field["default"], ensure_ascii=False) if "default" in field else None
        yield {
            "field": prefix + name,
            "type": _type_words(field, root) or "any",
            "default": default or ("required" if name in required else None),
            "limits": "; ".join(dict.fromkeys(limit for each in alternatives for limit in _limits(each))) or None,
            "description": next(told, None),
        }
        if depth < _DEEPEST_FIELD:
            for inner in alternatives:
                yield from _fields(inner, root, f"{prefix}{name}.", depth + 1)


def _type_words(schema: Any, root: _Schema) -> str:
    words = dict[str, None]()
    for each in _alternatives([schema], root):
        told = each.get("type", [_type_of(choice) for choice in _choices(each)])
        for kind in dict.fromkeys([told] if isinstance(told, str) else told):
            if kind == "array" and (inner := _type_words(each.get("items"), root)):
                kind = f"array of {inner}"
            elif kind == "object" and (inner := _type_words(each.get("additionalProperties"), root)):
                kind = f"object of {inner}"
            words[kind] = None
    return " | ".join(words)


def _limits(schema: _Schema) -> Iterator[str]:
    if choices := _choices(schema):
        yield "one of " + ", ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    for word, phrase in _PHRASES.items():
        if word in schema:
            yield phrase.format(schema[word])
