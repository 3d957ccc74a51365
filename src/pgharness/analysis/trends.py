"""A numeric setting against the score: the trend over cases that were run with every value of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np

from pgharness import stats
from pgharness.analysis.comparison import GroupEstimate
from pgharness.analysis.scores import Combination, Run, Scores
from pgharness.errors import InvalidArgument
from pgharness.stats.multiplicity import Correction
from pgharness.stats.results import Interval, Result, apa_estimate, apa_p, json_safe


@dataclass(frozen=True, slots=True)
class Point:
    """The mean score at one value of the setting."""

    value: float
    estimate: GroupEstimate


@dataclass(frozen=True, slots=True)
class Trend:
    """How the score of one series changes with the setting: slope is per unit of it, over the shared cases.

    result tests the slopes of single cases for a mean of 0; rises is 1, -1, or 0 where the corrected test shows none.
    """

    series: str
    points: tuple[Point, ...]
    cases: int
    slope: float
    standard_error: float
    interval: Interval | None
    result: Result
    p_value: float
    p_corrected: float
    rises: int
    sentence: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the trend as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Sweep:
    """Trends of the score with one setting, one for each series, p-values corrected together."""

    parameter: str
    alpha: float
    correction: Correction
    trends: tuple[Trend, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the sweep as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


def sweep(scores: Scores, *, parameter: str, alpha: float = 0.05, correction: Correction = "holm") -> Sweep:
    """Tell how the score changes with a numeric setting.

    parameter is a key of the runs' config, whose series are the combinations; or of the generators' parameters, whose
    series are the generators. Cases without a score at every value are left out. Raises InvalidArgument for a setting
    that is not numeric or has one value.
    """
    values, series = _values(scores, parameter)
    found = values[scores.run, scores.combination]
    code = series[1][scores.run, scores.combination]
    trends = [
        _trend(scores.rows((code == number) & ~np.isnan(found)), values, name, parameter, alpha)
        for number, name in enumerate(series[0])
        if len(np.unique(found[(code == number) & ~np.isnan(found)])) > 1
    ]
    if not trends:
        raise InvalidArgument(
            f"{parameter} has {len(np.unique(found[~np.isnan(found)]))} value in these runs, a trend needs 2 or more",
            hint="Name runs with different values: select run, config from pgharness.run_provenance;",
        )
    corrected = stats.adjust([trend.p_value for trend in trends], correction=correction).adjusted
    told = tuple(_told(trend, p, parameter, alpha) for trend, p in zip(trends, corrected, strict=True))
    return Sweep(parameter, alpha, correction, told)


def _values(
    scores: Scores, parameter: str
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], tuple[list[str], np.ndarray[Any, np.dtype[np.intp]]]]:
    """Return the setting's value and the series of every run and combination, and the names of the series."""
    in_config = any(parameter in run.config for run in scores.runs)
    values = np.full((len(scores.runs), len(scores.combinations)), np.nan)
    codes = np.zeros(values.shape, dtype=np.intp)
    names = dict[str, int]()
    for number, run in enumerate(scores.runs):
        for one in run.combinations:
            place = scores.combinations.index(one.name)
            values[number, place] = _number(run.config if in_config else one.parameters, parameter, run)
            codes[number, place] = names.setdefault(one.name if in_config else _models(one), len(names))
    if np.isnan(values).all():
        known = sorted({key for run in scores.runs for key in run.config})
        raise InvalidArgument(
            f"{parameter!r} is neither in the config of these runs nor among their generators' parameters",
            hint=f"Config has {', '.join(known) or 'nothing'}.",
        )
    return values, (list(names), codes)


def _number(holder: Mapping[str, Any], parameter: str, run: Run) -> float:
    value = holder.get(parameter)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InvalidArgument(
            f"{parameter} of run {run.name} is {value!r}, which is no number",
            hint="For settings that are names, compare the runs instead: kind 'ablation' or 'compare'.",
        )
    return float(value)


def _models(one: Combination) -> str:
    return one.generator if one.grader is None else f"{one.generator} -> {one.grader}"


def _trend(
    scores: Scores, values: np.ndarray[Any, np.dtype[np.float64]], series: str, parameter: str, alpha: float
) -> Trend:
    points, code = np.unique(values[scores.run, scores.combination], return_inverse=True)
    named = replace(scores, combination=code.astype(np.int32), combinations=tuple(f"{value:.15g}" for value in points))
    table = named.case_table("combination")
    shared = table.shared()
    count = int(shared.sum())
    if count < 2:
        raise InvalidArgument(
            f"{series}: {count} cases were graded at every value of {parameter}, at least 2 are needed",
            hint="Run the same cases with every value.",
        )
    means = table.means[:, shared]
    centred = points - points.mean()
    slopes = centred @ means / float(centred @ centred)  # of each case
    estimate = stats.mean_score(slopes, cases=range(count), level=1 - alpha, name="slope")
    result = stats.compare(
        {"slope": slopes, "none": np.zeros(count)}, paired=True, outcome="continuous", alpha=alpha
    ).result
    at = tuple(
        Point(
            float(value),
            GroupEstimate(
                name,
                int(table.grades[place]),
                int(table.notes[place][shared].sum()),
                count,
                one.value,
                one.standard_error,
                one.interval,
            ),
        )
        for place, (value, name) in enumerate(zip(points, table.names, strict=True))
        for one in [stats.mean_score(means[place], cases=range(count), level=1 - alpha)]
    )
    dropped = table.means.shape[1] - count
    warnings = (f"{dropped} cases that were not graded at every value were left out",) if dropped else ()
    return Trend(
        series,
        at,
        count,
        estimate.value,
        estimate.standard_error,
        estimate.interval,
        result,
        result.p_value,
        result.p_value,
        0,
        "",
        warnings + estimate.warnings,
    )


def _told(trend: Trend, corrected: float, parameter: str, alpha: float) -> Trend:
    rises = int(np.sign(trend.slope)) if corrected < alpha else 0
    word = {1: "the score rises", -1: "the score falls", 0: "no trend was shown"}[rises]
    sentence = (
        f"{trend.series} over {trend.cases} cases at {len(trend.points)} values of {parameter}: "
        f"{apa_estimate('slope', trend.slope, trend.interval)}, {apa_p(trend.p_value)}, "
        f"corrected {apa_p(corrected)}: {word}."
    )
    return replace(trend, p_corrected=corrected, rises=rises, sentence=sentence)
