"""How strongly two measurements of the same units go together, with intervals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special, stats

from pgharness.stats.effects import magnitude
from pgharness.stats.groups import check_options, t_tails
from pgharness.stats.results import Alternative, Effect, Interval, Result
from pgharness.stats.samples import FloatArray, InvalidSample, NanPolicy, is_constant, pairs


def pearson(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Test the linear correlation of pairs (Pearson 1895), at least 3; Fisher's (1921) z interval from 4 pairs."""
    one, two = _varying(first, second, names, nan, alternative, alpha)
    n = len(one)
    centred = (one - one.mean()) / one.std(), (two - two.mean()) / two.std()
    r = min(max(float((centred[0] * centred[1]).mean()), -1.0), 1.0)
    below = 1 - r * r
    t = r * math.sqrt((n - 2) / below) if below > 0 else math.copysign(math.inf, r)
    error = 1 / math.sqrt(n - 3) if n > 3 else math.inf
    return _result(
        "Pearson correlation",
        "r",
        r,
        float(n - 2),
        t_tails(t, n - 2, alternative),
        n,
        error,
        alternative,
        alpha,
        "Pearson (1895); interval by Fisher (1921)",
    )


def spearman(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Test the rank correlation of pairs (Spearman 1904), at least 3, by t with n - 2 degrees of freedom.

    Up to 7 pairs the p-value is exact: all orders are counted. The interval is Fisher's z with the variance
    (1 + rho^2 / 2) / (n - 3) of Bonett & Wright (2000).
    """
    one, two = _varying(first, second, names, nan, alternative, alpha)
    n = len(one)
    ranks = stats.rankdata(one), stats.rankdata(two)
    rho = min(max(float(np.corrcoef(*ranks)[0, 1]), -1.0), 1.0)
    below = 1 - rho * rho
    t = rho * math.sqrt((n - 2) / below) if below > 1e-15 else math.copysign(math.inf, rho)
    p_value, how = t_tails(t, n - 2, alternative), "t approximation"
    if n <= 7:
        p_value, how = _all_orders(ranks[0], ranks[1], alternative), "exact, all orders"
    error = math.sqrt((1 + rho**2 / 2) / (n - 3)) if n > 3 else math.inf
    return _result(
        "Spearman correlation",
        "rho",
        rho,
        float(n - 2),
        p_value,
        n,
        error,
        alternative,
        alpha,
        f"Spearman (1904); {how}; interval by Bonett & Wright (2000), Psychometrika 65",
    )


def kendall(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Test the agreement in order of pairs by Kendall's (1938) tau-b, at least 3 pairs; exact up to 33 without ties.

    The interval is Fisher's z with the variance 0.437 / (n - 4) of Fieller, Hartley & Pearson (1957), from 5 pairs.
    """
    one, two = _varying(first, second, names, nan, alternative, alpha)
    n = len(one)
    found = stats.kendalltau(one, two, variant="b", alternative=alternative)
    error = math.sqrt(0.437 / (n - 4)) if n > 4 else math.inf
    return _result(
        "Kendall correlation",
        "tau",
        float(found.statistic),
        None,
        float(found.pvalue),
        n,
        error,
        alternative,
        alpha,
        "Kendall (1938); interval by Fieller, Hartley & Pearson (1957), Biometrika 44",
    )


def _varying(
    first: object, second: object, names: tuple[str, str], nan: NanPolicy, alternative: str, alpha: float
) -> tuple[FloatArray, FloatArray]:
    check_options(alternative, alpha)
    one, two = pairs(first, second, names=names, nan=nan, minimum=3)
    for name, values in zip(names, (one, two), strict=True):
        if is_constant(values):
            raise InvalidSample(f"{name} is always {values[0]:g}: a correlation needs values that vary")
    return one, two


def _result(
    test: str, name: str, value: float, df: float | None, p_value: float, n: int, error: float,
    alternative: Alternative, alpha: float, method: str,
) -> Result:  # fmt: skip
    interval = _fisher(value, error, alpha, alternative)
    word, source = magnitude("r", value)
    two_sided = _fisher(value, error, alpha, "two-sided")
    warnings = ("so few pairs leave the interval open: collect more",) if math.isinf(error) else ()
    details: dict[str, Any] = dict(alternative=alternative, alpha=alpha, method=method, warnings=warnings)
    effect = Effect(name, value, two_sided, word, source)
    return Result(
        test=test,
        statistic=value,
        statistic_name=name,
        p_value=p_value,
        n=n,
        df=df,
        estimate=value,
        interval=interval,
        effect=effect,
        **details,
    )


def _fisher(value: float, error: float, alpha: float, alternative: Alternative) -> Interval:
    tail = alpha / 2 if alternative == "two-sided" else alpha
    if math.isinf(error):
        low, high = -1.0, 1.0
    elif abs(value) == 1:
        low = high = value
    else:
        half = -float(special.ndtri(tail)) * error
        low, high = math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half)
    if alternative == "less":
        low = -1.0
    if alternative == "greater":
        high = 1.0
    return Interval(low, high, 1 - alpha, "Fisher z")


def _all_orders(one: FloatArray, two: FloatArray, alternative: Alternative) -> float:
    orders = np.array([[0]])
    for size in range(1, len(two)):  # all permutations, one place at a time
        orders = np.concatenate([np.insert(orders, place, size, axis=1) for place in range(size + 1)])
    sums = two[orders] @ one
    seen, slack = float(two @ one), 1e-9
    above, below = float((sums >= seen - slack).mean()), float((sums <= seen + slack).mean())
    return {"greater": above, "less": below}.get(alternative, min(1.0, 2 * min(above, below)))
