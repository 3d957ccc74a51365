"""Which of several groups differ: all pairs, or all against a control, with p-values adjusted for their number.

Each function returns one Comparison for each pair, in the order of the groups; differences are first minus second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import special, stats

from pgharness.stats.effects import cliff_delta, hedges_g
from pgharness.stats.multiplicity import Correction, adjust
from pgharness.stats.results import Comparison, Effect, Interval
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    Rng,
    generator,
    is_constant,
    matrix,
    named_samples,
)

Groups = Mapping[Any, object] | Sequence[object]


def tukey_hsd(
    groups: Groups,
    *,
    level: float = 0.95,
    intervals: bool = True,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
) -> tuple[Comparison, ...]:
    """Compare the means of all pairs of groups of equal variance (Tukey 1953, Kramer 1956); the statistic is q.

    intervals=False leaves out the intervals, which take most of the time.
    """
    samples = named_samples(groups, names=names, nan=nan, minimum=2)
    k, df = len(samples), sum(map(len, samples.values())) - len(samples)
    variance = sum(float(((one - one.mean()) ** 2).sum()) for one in samples.values()) / df
    if all(is_constant(one) for one in samples.values()):
        raise InvalidSample("all groups are constant: Tukey's test divides by the variation within groups; use dunn")
    critical = float(stats.studentized_range.ppf(level, k, df)) if intervals else math.nan
    found = []
    for (name1, one), (name2, two) in combinations(samples.items(), 2):
        difference = float(one.mean() - two.mean())
        error = math.sqrt(variance / 2 * (1 / len(one) + 1 / len(two)))
        half = critical * error
        interval = Interval(difference - half, difference + half, level, "Tukey-Kramer") if intervals else None
        p_value = _range_p(abs(difference) / error, k, df)
        found.append(
            Comparison(
                name1,
                name2,
                difference,
                difference / error,
                p_value,
                float(df),
                interval,
                _standardised(one, two, level),
            )
        )
    return tuple(found)


def games_howell(
    groups: Groups,
    *,
    level: float = 0.95,
    intervals: bool = True,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
) -> tuple[Comparison, ...]:
    """Compare the means of all pairs of groups, whatever their variances (Games & Howell 1976); the statistic is q.

    intervals=False leaves out the intervals, which take most of the time.
    """
    samples = named_samples(groups, names=names, nan=nan, minimum=2)
    found = []
    for (name1, one), (name2, two) in combinations(samples.items(), 2):
        if is_constant(one) and is_constant(two):
            raise InvalidSample(f"{name1} and {name2} are constant: the Games-Howell test has no variation; use dunn")
        parts = one.var(ddof=1) / len(one), two.var(ddof=1) / len(two)
        shares = parts[0] / sum(parts), parts[1] / sum(parts)
        df = float(1 / (shares[0] ** 2 / (len(one) - 1) + shares[1] ** 2 / (len(two) - 1)))
        difference, error = float(one.mean() - two.mean()), math.sqrt(sum(parts) / 2)
        interval = None
        if intervals:
            half = float(stats.studentized_range.ppf(level, len(samples), df)) * error
            interval = Interval(difference - half, difference + half, level, "Games-Howell")
        p_value = _range_p(abs(difference) / error, len(samples), df)
        found.append(
            Comparison(
                name1, name2, difference, difference / error, p_value, df, interval, _standardised(one, two, level)
            )
        )
    return tuple(found)


def dunn(
    groups: Groups,
    *,
    correction: Correction = "holm",
    level: float = 0.95,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
) -> tuple[Comparison, ...]:
    """Compare the mean ranks of all pairs of groups (Dunn 1964), ties corrected; the statistic is z."""
    samples = named_samples(groups, names=names, nan=nan)
    everything = np.concatenate(list(samples.values()))
    n = len(everything)
    if is_constant(everything):
        raise InvalidSample("all values are equal: there are no ranks to compare")
    ranks = stats.rankdata(everything)
    _, ties = np.unique(everything, return_counts=True)
    variance = n * (n + 1) / 12 - float((ties.astype(float) ** 3 - ties).sum()) / (12 * (n - 1))
    places = np.split(ranks, np.cumsum([len(one) for one in samples.values()])[:-1])
    mean_ranks = dict(zip(samples, (float(one.mean()) for one in places), strict=True))
    rows = []
    for (name1, one), (name2, two) in combinations(samples.items(), 2):
        difference = mean_ranks[name1] - mean_ranks[name2]
        rows.append((name1, name2, difference, difference / math.sqrt(variance * (1 / len(one) + 1 / len(two)))))
    adjusted = adjust([2 * float(special.ndtr(-abs(row[3]))) for row in rows], correction=correction).adjusted
    return tuple(
        Comparison(*row, p_value, effect=_dominance(samples[row[0]], samples[row[1]], level))
        for row, p_value in zip(rows, adjusted, strict=True)
    )


def nemenyi(table: object, *, names: Sequence[str] | None = None, nan: NanPolicy = "raise") -> tuple[Comparison, ...]:
    """Compare the mean ranks within subjects of all pairs of conditions (Nemenyi 1963); the statistic is q.

    table has shape (subjects, conditions).
    """
    values = matrix(table, nan=nan)
    n, k = values.shape
    titles = [f"condition {number}" for number in range(1, k + 1)] if names is None else list(names)
    if len(titles) != k:
        raise InvalidSample(f"{len(titles)} names for {k} conditions: give one name for each condition")
    ranks = stats.rankdata(values, axis=1).mean(axis=0)
    error = math.sqrt(k * (k + 1) / (12 * n))
    found = []
    for i, j in combinations(range(k), 2):
        difference = float(ranks[i] - ranks[j])
        p_value = _range_p(abs(difference) / error, k, math.inf)
        found.append(Comparison(titles[i], titles[j], difference, difference / error, p_value))
    return tuple(found)


def dunnett(
    groups: Groups,
    *,
    control: str,
    level: float = 0.95,
    rng: Rng = 0,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
) -> tuple[Comparison, ...]:
    """Compare the means of all groups with a control's, variances equal (Dunnett 1955); the statistic is t.

    control is the control group's name. The multivariate t distribution is integrated at random points: p-values are
    right to about 4 digits and repeat with the same rng.
    """
    samples = named_samples(groups, names=names, nan=nan, minimum=2)
    if control not in samples:
        raise InvalidSample(f"control is {control!r}: it is one of {', '.join(samples)}")
    if all(is_constant(one) for one in samples.values()):
        raise InvalidSample("all groups are constant: Dunnett's test divides by the variation within groups; use dunn")
    others = {name: one for name, one in samples.items() if name != control}
    df = float(sum(map(len, samples.values())) - len(samples))
    found = stats.dunnett(*others.values(), control=samples[control], rng=generator(rng))
    ends: Any = found.confidence_interval(level)
    return tuple(
        Comparison(
            name,
            control,
            float(one.mean() - samples[control].mean()),
            float(found.statistic[i]),
            float(min(max(found.pvalue[i], 0.0), 1.0)),
            df,
            Interval(float(ends.low[i]), float(ends.high[i]), level, "Dunnett"),
            _standardised(one, samples[control], level),
        )
        for i, (name, one) in enumerate(others.items())
    )


def _range_p(q: float, k: int, df: float) -> float:
    return float(min(max(stats.studentized_range.sf(q, k, df), 0.0), 1.0))


def _standardised(one: FloatArray, two: FloatArray, level: float) -> Effect | None:
    return None if is_constant(one) and is_constant(two) else hedges_g(one, two, level=level)


def _dominance(one: FloatArray, two: FloatArray, level: float) -> Effect | None:
    return cliff_delta(one, two, level=level) if min(len(one), len(two)) >= 2 else None
