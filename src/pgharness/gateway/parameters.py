"""A model's parameters, read in the shape that its provider knows."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pgharness.errors import RequestRejected
from pgharness.types import ModelSpec

_Parameters = TypeVar("_Parameters", bound=BaseModel)


def read_parameters(spec: ModelSpec, shape: type[_Parameters]) -> _Parameters:
    """Return a model's parameters in their shape, or raise RequestRejected naming each one that does not fit."""
    try:
        return shape.model_validate(spec.parameters)
    except ValidationError as exc:
        wrong = "; ".join(
            f"{'.'.join(str(step) for step in error['loc']) or 'parameters'}: {error['msg']}" for error in exc.errors()
        )
        raise RequestRejected(
            f"model '{spec.name}' has parameters that provider '{spec.provider}' cannot use: {wrong}",
            hint=f"Known parameters: {', '.join(shape.model_fields)}.",
        ) from None
