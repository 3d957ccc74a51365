"""Boundaries against published tables, plain integrals and simulation; confidence sequences over whole paths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, stats

from pgharness.stats.samples import InvalidSample
from pgharness.stats.sequential import boundaries, confidence_sequence, monitor, spent_alpha

FIVE = [0.2, 0.4, 0.6, 0.8, 1.0]


def test_boundaries_of_the_published_tables() -> None:
    # Reboussin, DeMets, Kim & Lan (2000), Controlled Clinical Trials 21; R's ldbounds and gsDesign print the same.
    # The printed second bound, 3.3569, comes from a coarser grid: the next test has it to 1e-9.
    assert_allclose(boundaries(FIVE), [4.8769, 3.3569, 2.6803, 2.2898, 2.0310], atol=1.5e-4)
    assert_allclose(boundaries(FIVE, spending="pocock"), [2.44, 2.43, 2.41, 2.40, 2.39], atol=6e-3)


def test_one_look_is_the_ordinary_test() -> None:
    for alpha in (0.01, 0.05, 0.1):
        for spending in ("obrien-fleming", "pocock"):
            assert_allclose(boundaries([1.0], alpha=alpha, spending=spending), [stats.norm.isf(alpha / 2)], rtol=1e-10)  # type: ignore[arg-type]


def test_second_boundary_solves_the_plain_integral() -> None:
    rng = np.random.default_rng(1)
    for trial in range(200):
        first = float(rng.uniform(0.1, 0.95))
        second = float(
            rng.uniform(first + (0.0006 if trial < 50 else 0.01), min(first + (0.002 if trial < 50 else 1), 1))
        )
        spending = ("obrien-fleming", "pocock")[trial % 2]
        one, two = boundaries([first, second], spending=spending)  # type: ignore[arg-type]

        def stays(z: float, one: float = first, two: float = second, edge: float = two) -> float:
            """The density of the first z, times the chance that the second is within its boundary."""
            scale = math.sqrt(1 - one / two)
            middle = z * math.sqrt(one / two)
            inside = math.erf((edge - middle) / scale / math.sqrt(2)) - math.erf(
                (-edge - middle) / scale / math.sqrt(2)
            )
            return float(math.exp(-z * z / 2) / math.sqrt(2 * math.pi) * inside / 2)

        reach = min(one, 9.0)
        kept = integrate.quad(
            stays, -reach, reach, epsabs=1e-13, epsrel=1e-12, limit=400, points=[-one, one] if one < 9 else None
        )[0]
        assert_allclose(1 - kept, spent_alpha(second, spending=spending), atol=1e-9)  # type: ignore[arg-type]


def test_third_boundary_agrees_with_the_multivariate_normal() -> None:
    times = np.array([0.3, 0.55, 1.0])
    bounds = np.array(boundaries(times.tolist(), spending="pocock"))
    correlation = np.sqrt(np.minimum.outer(times, times) / np.maximum.outer(times, times))
    kept = stats.multivariate_normal(np.zeros(3), correlation).cdf(bounds, lower_limit=-bounds)
    assert_allclose(1 - kept, 0.05, atol=1e-4)  # scipy's quasi-Monte Carlo error


def test_looking_often_keeps_the_level_and_naive_looking_does_not() -> None:
    rng = np.random.default_rng(2)
    times = np.arange(1, 21) / 20
    paths = np.cumsum(rng.normal(size=(40_000, 20)), axis=1) / np.sqrt(np.arange(1, 21))
    for spending in ("obrien-fleming", "pocock"):
        bounds = np.array(boundaries(times.tolist(), spending=spending))  # type: ignore[arg-type]
        assert abs(np.mean(np.any(np.abs(paths) > bounds, axis=1)) - 0.05) < 0.0045  # four standard errors
    assert np.mean(np.any(np.abs(paths) > 1.96, axis=1)) > 0.2


def test_looks_too_early_to_spend_and_looks_close_together() -> None:
    early = boundaries([0.005, 0.5, 1.0])
    assert early[0] == math.inf
    assert_allclose(early[1:], boundaries([0.5, 1.0]), rtol=1e-9)
    close = boundaries([0.5, 0.5005, 1.0], spending="pocock")
    assert all(bound > 1.9 for bound in close)
    assert_allclose(close[2], boundaries([0.5, 1.0], spending="pocock")[1], atol=0.02)


def test_monitor_judges_each_look_and_widens_its_interval() -> None:
    looks = monitor([0.4, 0.35, 0.3], [0.2, 0.12, 0.1], [0.25, 0.6, 1.0])
    assert [look.is_past for look in looks] == [False, True, True]
    assert_allclose([look.boundary for look in looks], boundaries([0.25, 0.6, 1.0]))
    for look in looks:
        assert_allclose(look.interval.width / 2, look.boundary * abs(look.estimate / look.z), rtol=1e-9)
    assert_allclose(looks[-1].alpha_spent, 0.05)
    with_t = monitor([0.4], [0.2], [1.0], df=[5])[0]
    assert_allclose(with_t.z, stats.norm.isf(stats.t.sf(2.0, 5)), rtol=1e-10)
    plain = stats.t.isf(0.025, 5) * 0.2
    assert_allclose(with_t.interval.high, 0.4 + plain, rtol=1e-9)
    # A look that does not stop does not change what an earlier one decided, and a first look needs no later ones.
    assert monitor([0.4], [0.2], [0.25])[0] == looks[0]


def test_confidence_sequences_hold_along_the_whole_path() -> None:
    rng = np.random.default_rng(3)
    missed = {"bounded": 0, "asymptotic": 0, "naive": 0}
    for _ in range(300):
        values = rng.binomial(1, 0.3, 1500).astype(float)
        for name, bounds in (("bounded", (0.0, 1.0)), ("asymptotic", None)):
            found = confidence_sequence(values, bounds=bounds)
            missed[name] += bool(np.any((found.low > 0.3) | (found.high < 0.3)))
        n = np.arange(1, 1501)
        mean = np.cumsum(values) / n
        off = np.abs(mean - 0.3) > 1.96 * np.sqrt(mean * (1 - mean) / n)
        missed["naive"] += bool(np.any(off[20:]))
    assert missed["bounded"] <= 15 and missed["asymptotic"] <= 26 and missed["naive"] > 90


def test_confidence_sequence_is_its_formula_and_narrowest_where_asked() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        size, best = int(rng.integers(11, 400)), int(rng.integers(10, 500))
        values = rng.normal(5, 2, size) * 10.0 ** rng.integers(-4, 5)
        found = confidence_sequence(values, best_at=best, level=0.9)
        t, alpha = int(rng.integers(11, size + 1)), 0.1
        rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / best
        part = values[:t]
        reach = part.std() * math.sqrt(2 * (t * rho2 + 1) / (t * t * rho2) * math.log(math.sqrt(t * rho2 + 1) / alpha))
        assert_allclose([found.low[t - 1], found.high[t - 1]], [part.mean() - reach, part.mean() + reach], rtol=1e-8)
    widths = [confidence_sequence(np.zeros(100), best_at=n, bounds=(-1, 1)).at(100).width for n in (20, 100, 500)]
    assert widths[1] == min(widths)
    assert confidence_sequence([1.0, 2.0]).at(2).width == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: boundaries([]), "no looks"),
        (lambda: boundaries([0.5, 0.5]), "must rise"),
        (lambda: boundaries([0.5, 1.2]), "1.2"),
        (lambda: boundaries([0.0, 1.0]), "0.0"),
        (lambda: boundaries([1.0], alpha=5), "alpha is 5"),
        (lambda: boundaries([1.0], spending="all"), "'all'"),  # type: ignore[arg-type]
        (lambda: monitor([0.1], [0.1, 0.2], [0.5]), "one value for each look"),
        (lambda: monitor([0.1], [0.0], [0.5]), "look 1"),
        (lambda: confidence_sequence([]), "empty"),
        (lambda: confidence_sequence([0.5, 2.0], bounds=(0, 1)), "not within bounds"),
        (lambda: confidence_sequence([0.5], best_at=0), "best_at"),
        (lambda: confidence_sequence([0.5, math.nan]), "missing"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
