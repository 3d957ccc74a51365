"""A model's parameters, read in the shape that its provider knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pgharness.errors import RequestRejected
from pgharness.types import ModelSpec

_Parameters = TypeVar("_Parameters", bound=BaseModel)
_OTHER_KINDS = ("list_type", "dict_type", "string_type", "model_type", "model_attributes_type")


def read_parameters(spec: ModelSpec, shape: type[_Parameters]) -> _Parameters:
    """Return a model's parameters in their shape, or raise RequestRejected naming each one that does not fit."""
    try:
        return shape.model_validate(spec.parameters)
    except ValidationError as exc:
        raise RequestRejected(
            f"model '{spec.name}' has parameters that provider '{spec.provider}' cannot use: "
            + "; ".join(_problems(spec.parameters, exc)),
            hint=f"Known parameters: {', '.join(shape.model_fields)}.",
        ) from None


def _problems(parameters: Mapping[str, Any], exc: ValidationError) -> list[str]:
    """Return what is wrong and where, in the words of the parameters."""
    found = [(_place(parameters, error["loc"], error["type"]), error["type"], error["msg"]) for error in exc.errors()]
    told = []
    for place, kind, message in found:
        # where a value may be of several kinds, those that it is not are no news beside what is wrong with it
        is_idle = kind in _OTHER_KINDS and any(
            other not in _OTHER_KINDS and there[: len(place)] == place for there, other, _ in found
        )
        if not is_idle:
            message = "is not known" if kind == "extra_forbidden" else message.removeprefix("Value error, ")
            told.append(f"{'.'.join(map(str, place))}: {message}" if place else message)
    return told


def _place(value: Any, steps: tuple[int | str, ...], kind: str) -> tuple[int | str, ...]:
    """Return those steps that lead through the value itself: between them pydantic names types of its own."""
    place: list[int | str] = []
    for number, step in enumerate(steps):
        is_inside = (isinstance(value, Mapping) and step in value) or (
            isinstance(value, list) and isinstance(step, int) and step < len(value)
        )
        if is_inside:
            value = value[step]
        if is_inside or (kind == "missing" and number == len(steps) - 1):
            place.append(step)
    return tuple(place)
