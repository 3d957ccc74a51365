"""The figures of statistics: how often they are wrong when the truth is known, with naive tests beside.

Two systems of equal true quality answer the same cases, several notes of each, in eight ways that evaluations happen to
be. A false positive is p < .05; coverage is how often the 95% interval of the difference holds its true value, 0: the
interval of the test that was chosen, and that of `paired_difference`. With
2000 data sets the standard error of a rate of .05 is .005. Seeded: the same figures each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from bed import Bed
from figures import Line
from scipy import stats

from pgharness.stats.evaluation import paired_difference
from pgharness.stats.selection import compare

COLUMNS = ("automatic choice", "coverage", "coverage by case", "t on notes", "paired t on notes")
Draw = Callable[[np.random.Generator], tuple[Any, Any, Any, Any]]
"""Draws values of both systems, shape (notes,), with each note's case, and a mapping of case to cluster or None."""


def _shaped(random: np.random.Generator, cases: int, notes: int, kind: str) -> tuple[Any, Any, Any, Any]:
    level = random.normal(0, 1, (cases, 1))
    gap = random.normal(0, 0.5, (cases, 1))  # which system does better differs from case to case, by 0 on average
    one, two = (level + side * gap / 2 + random.normal(0, 0.7, (cases, notes)) for side in (1, -1))
    case = np.repeat(np.arange(cases), notes)
    if kind == "pass or fail":
        one, two = (one > 0.3).astype(float), (two > 0.3).astype(float)
    elif kind == "five grades":
        one, two = (np.clip(np.round(part + 3), 1, 5) for part in (one, two))
    elif kind == "skewed":
        one, two = np.exp(one), np.exp(two)
    elif kind == "near the ceiling":
        one, two = (np.minimum(part + 1.5, 1.0) for part in (one, two))
    return one.ravel(), two.ravel(), case, None


def _unequal(random: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    case = np.repeat(np.arange(30), random.integers(1, 9, 30))
    gap = random.normal(0, 0.5, 30)[case]
    return gap + random.normal(0, 0.7, len(case)), random.normal(0, 0.7, len(case)), case, None


def _clustered(random: np.random.Generator) -> tuple[Any, Any, Any, Any]:
    sources = np.repeat(np.arange(12), random.integers(1, 9, 12))
    gap = random.normal(0, 0.5, 12)[sources] + random.normal(0, 0.3, len(sources))
    one, two = gap + random.normal(0, 0.5, len(sources)), random.normal(0, 0.5, len(sources))
    return one, two, np.arange(len(sources)), dict(enumerate(sources.tolist()))


PROCESSES: dict[str, Draw] = {
    "normal, 30 cases x 3": lambda random: _shaped(random, 30, 3, "normal"),
    "normal, 6 cases x 5": lambda random: _shaped(random, 6, 5, "normal"),
    "pass or fail, 50 x 3": lambda random: _shaped(random, 50, 3, "pass or fail"),
    "five grades, 30 x 3": lambda random: _shaped(random, 30, 3, "five grades"),
    "skewed, 40 x 3": lambda random: _shaped(random, 40, 3, "skewed"),
    "near the ceiling, 40 x 3": lambda random: _shaped(random, 40, 3, "near the ceiling"),
    "1 to 8 notes, 30 cases": _unequal,
    "12 sources of 1 to 8 cases": _clustered,
}


def calibrate(draw: Draw, *, data_sets: int, seed: int) -> dict[str, float]:
    """Return rates over so many data sets, by column; "automatic choice" is `selection.compare` on case means."""
    random = np.random.default_rng(seed)
    counts = dict.fromkeys(COLUMNS, 0)
    for _ in range(data_sets):
        one, two, case, clusters = draw(random)
        if np.ptp(one - two) == 0:
            counts["coverage"] += 1
            counts["coverage by case"] += 1
            continue
        found = paired_difference(one, two, cases=case.tolist(), clusters=clusters)
        means = [np.bincount(case, side) / np.bincount(case) for side in (one, two)]
        groups = None if clusters is None else [clusters[label] for label in range(len(means[0]))]
        chosen = compare(means, paired=True, clusters=groups, rng=seed).result
        assert found.interval is not None and chosen.interval is not None
        counts["automatic choice"] += chosen.p_value < 0.05
        counts["coverage"] += 0.0 in chosen.interval
        counts["coverage by case"] += 0.0 in found.interval
        counts["t on notes"] += stats.ttest_ind(one, two).pvalue < 0.05
        counts["paired t on notes"] += stats.ttest_rel(one, two).pvalue < 0.05
    return {name: count / data_sets for name, count in counts.items()}


def calibration(bed: Bed) -> Iterator[Line]:
    """Compare false positives and coverage with what alpha = .05 promises."""
    data_sets = 200 if bed.is_quick else 2000
    for seed, (name, draw) in enumerate(PROCESSES.items(), start=1):
        rates = {column: 100 * rate for column, rate in calibrate(draw, data_sets=data_sets, seed=seed).items()}
        yield Line(
            "calibration",
            f"{name}: false positives of the automatic choice ({data_sets:,} data sets)",
            "%",
            [rates["automatic choice"]],
            "alpha",
            [5.0],
            at_least=None if bed.is_quick else 0.8,
            at_most=None if bed.is_quick else 1.2,
            remark=f"t on notes: {rates['t on notes']:.1f}%, paired t on notes: {rates['paired t on notes']:.1f}%",
        )
        yield Line(
            "calibration",
            f"{name}: 95% intervals of the difference that hold it",
            "%",
            [rates["coverage"]],
            "nominal",
            [95.0],
            at_least=None if bed.is_quick else 0.979,
            at_most=None if bed.is_quick else 1.021,
            remark=f"t on case means: {rates['coverage by case']:.1f}%",
        )
