"""Boundary types: a frozen model row is read as it is, and a call costs what its prices say."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pgharness.types import Completion, Message, ModelSpec, Provider, Request, Usage

MIGRATIONS = Path(__file__).parents[2] / "sql" / "migrations"
ROW: dict[str, Any] = {"id": 7, "name": "vendor/big", "provider": "openai", "model": "big"}


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate(ROW | fields)


def test_a_row_of_the_database_is_a_spec() -> None:
    row = ROW | {
        "base_url": None,
        "api_key_env": None,
        "parameters": {"temperature": 0},
        "timeout_seconds": 60,
        "input_usd_per_million": "3.000000",
        "created_at": "2026-01-01T00:00:00Z",
        "description": "columns that it does not need are left out",
    }
    model = ModelSpec.model_validate(row)
    assert (model.id, model.parameters, model.timeout_seconds) == (7, {"temperature": 0}, 60.0)
    assert model.input_usd_per_million == 3.0
    assert model.output_usd_per_million is None


def test_a_provider_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValidationError, match="provider"):
        spec(provider="openapi")


def test_the_providers_are_those_of_the_database() -> None:
    migrations = "".join(path.read_text() for path in sorted(MIGRATIONS.glob("*.sql")))
    check = re.findall(r"models_provider_check check \(provider in \((.*?)\)\)", migrations, re.DOTALL)[
        -1
    ]  # the newest
    assert set(re.findall(r"'(\w+)'", check)) == set(get_args(Provider))


def test_data_cannot_be_changed_behind_the_back_of_whoever_holds_it() -> None:
    for value in (Message("user", "x"), Usage(), Request(messages=()), Completion(text="x")):
        name = dataclasses.fields(value)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, None)
    with pytest.raises(ValidationError):
        setattr(spec(), "name", "other")  # noqa: B010


@pytest.mark.parametrize(
    ("prices", "tokens", "usd"),
    [
        ({}, (1_000_000, 1_000_000, 0), 0),
        ({"input_usd_per_million": 3, "output_usd_per_million": 15}, (1_000_000, 1_000_000, 0), 18),
        ({"input_usd_per_million": 3, "output_usd_per_million": 15}, (120, 30, 20), 0.00081),
        # cached tokens are part of the input, and cost their own price where there is one
        ({"input_usd_per_million": 3, "cached_input_usd_per_million": 0.3}, (100, 0, 100), 0.00003),
        ({"input_usd_per_million": 3, "cached_input_usd_per_million": 0}, (100, 0, 100), 0),
        ({"cached_input_usd_per_million": 1}, (100, 0, 50), 0.00005),
    ],
)
def test_price(prices: dict[str, float], tokens: tuple[int, int, int], usd: float) -> None:
    assert spec(**prices).price(*tokens) == pytest.approx(usd)


_PRICES = st.none() | st.floats(0, 1000)


@settings(deadline=None)
@given(_PRICES, _PRICES, st.integers(0, 10**7), st.integers(0, 10**7), st.data())
def test_a_price_is_never_negative_and_the_cache_never_costs_more_than_it_says(
    input_price: float | None, output_price: float | None, input_tokens: int, output_tokens: int, data: st.DataObject
) -> None:
    cached = data.draw(st.integers(0, input_tokens))
    model = spec(input_usd_per_million=input_price, output_usd_per_million=output_price)
    fresh = model.price(input_tokens, output_tokens)
    assert fresh >= 0
    assert model.price(input_tokens, output_tokens, cached) == pytest.approx(fresh)
