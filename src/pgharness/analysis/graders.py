"""Do graders agree: rubric authors, graders, several grades by one grader, or several runs, on the same notes.

The scale decides the measure: kappas and Krippendorff's nominal alpha for right and wrong, weighted ones for a few
ordered levels, intraclass correlations and limits of agreement for scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pgharness import stats
from pgharness.analysis.scores import Scores
from pgharness.errors import InvalidArgument
from pgharness.stats.results import Estimate, Interval, Result, json_safe
from pgharness.stats.samples import FloatArray, IntArray

Between = Literal["author", "grader", "replication", "run"]
Scale = Literal["binary", "ordinal", "continuous"]
BETWEEN: dict[str, str] = {
    "author": "rubric authors",
    "grader": "graders",
    "replication": "grades by one rubric",
    "run": "runs",
}
_LEVELS = 7  # at most so many different scores are an ordered scale, not a measure
_MOST_UNITS = 2_000  # that alpha's bootstrap is made of
_MOST_LABELLED = 100_000  # that kappas count


@dataclass(frozen=True, slots=True)
class Measure:
    """One coefficient between two raters, or all of them, with its interval where there is one."""

    raters: tuple[str, ...]
    name: str
    value: float
    interval: Interval | None
    units: int
    method: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the measure as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far raters agree: between says what rates, units how many things two or more of them rated.

    means has each rater's mean score over what it rated; measures has each coefficient, over all raters and by pair.
    """

    between: Between
    scale: Scale
    raters: tuple[str, ...]
    units: int
    means: tuple[float, ...]
    measures: tuple[Measure, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the agreement as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


def agreement(
    scores: Scores,
    *,
    between: Between | None = None,
    scale: Scale | None = None,
    alpha: float = 0.05,
    seed: int = 0,
) -> Agreement:
    """Measure how far raters agree on what several of them rated.

    between is by default the first of rubric authors, replications of grades, runs and graders that has two raters of
    the same thing. scale is seen from the scores if it is not given. Raises InvalidArgument where less was rated twice.
    """
    between, raters, table = _found(scores, between)
    kind = scale or _scale(table)
    rated = table[(~np.isnan(table)).sum(axis=1) >= 2]
    random = np.random.default_rng(seed)
    measures = [*_overall(raters, rated, kind, between, 1 - alpha, random)]
    if between != "replication":  # which grade is the first of several means nothing
        for one, two in combinations(range(len(raters)), 2):
            both = rated[:, [one, two]]
            both = both[~np.isnan(both).any(axis=1)]
            measures += _pair((raters[one], raters[two]), both, kind, 1 - alpha)
    warnings: tuple[str, ...] = ()
    if len(rated) > len(np.unique(scores.case)):
        warnings = ("notes of one case are alike, which these intervals do not know: they are somewhat too narrow",)
    if between == "grader":
        warnings += ("each grader graded notes of its own combination: they are the same only if answers were shared",)
    return Agreement(
        between, kind, raters, len(rated), tuple(np.nanmean(rated, axis=0).tolist()), tuple(measures), warnings
    )


def _found(scores: Scores, between: Between | None) -> tuple[Between, tuple[str, ...], FloatArray]:
    choices: list[Between] = [between] if between else ["author", "replication", "run", "grader"]
    for choice in choices:
        if choice not in BETWEEN:
            raise InvalidArgument(f"between is {choice!r}: it is one of {', '.join(BETWEEN)}")
        raters, table = _ratings(scores, choice)
        if len(raters) >= 2 and ((~np.isnan(table)).sum(axis=1) >= 2).sum() >= 3:
            return choice, raters, table
    what = BETWEEN[between] if between else "authors, grades, runs or graders"
    raise InvalidArgument(
        f"no 3 notes were graded by two {what}",
        hint="Grade notes twice: set rubrics_per_case or grade_replications of the instance to 2, and start a run.",
    )


def _ratings(scores: Scores, between: Between) -> tuple[tuple[str, ...], FloatArray]:
    """Return the raters and their mean scores of the same things, shape (units, raters), NaN where there is none."""
    keys: list[NDArray[Any]]
    rater: NDArray[Any]
    match between:
        case "author":
            keys, rater, names = [scores.note], scores.author, scores.authors
        case "replication":
            keys, rater = [scores.note, scores.author], scores.grade_replication
            names = tuple(f"grade {number}" for number in range(int(rater.max()) + 1))
        case "run":
            keys = [scores.case, scores.combination, scores.overlap, scores.replication, scores.author]
            rater, names = scores.run, scores.run_names
        case "grader":
            generator, grader, names = _models(scores)
            keys = [scores.case, generator, scores.overlap, scores.replication, scores.author]
            rater = grader
    unit = np.zeros(len(scores), dtype=np.int64)
    for key in keys:
        low = int(key.min())
        unit = unit * (int(key.max()) - low + 1) + (key - low)
    unit = np.unique(unit, return_inverse=True)[1]
    used, column = np.unique(rater, return_inverse=True)
    place = unit * len(used) + column
    size = (int(unit.max()) + 1) * len(used)
    counts = np.bincount(place, minlength=size)
    sums = np.bincount(place, scores.score, minlength=size)
    means = np.divide(sums, counts, out=np.full(size, np.nan), where=counts > 0)
    return tuple(names[code] for code in used), means.reshape(-1, len(used))


def _models(scores: Scores) -> tuple[IntArray, IntArray, tuple[str, ...]]:
    """Return each grade's generator and grader, and the graders' names."""
    generators, graders = dict[str, int](), dict[str, int]()
    places = np.zeros((len(scores.runs), len(scores.combinations), 2), dtype=np.intp)
    for number, run in enumerate(scores.runs):
        for one in run.combinations:
            place = scores.combinations.index(one.name)
            places[number, place, 0] = generators.setdefault(one.generator, len(generators))
            places[number, place, 1] = graders.setdefault(one.grader or "none", len(graders))
    found = places[scores.run, scores.combination]
    return found[:, 0], found[:, 1], tuple(graders)


def _scale(table: FloatArray) -> Scale:
    levels = np.unique(table[~np.isnan(table)])
    if np.isin(levels, (0.0, 1.0)).all():
        return "binary"
    return "ordinal" if len(levels) <= _LEVELS else "continuous"


def _overall(
    raters: tuple[str, ...],
    table: FloatArray,
    scale: Scale,
    between: Between,
    level: float,
    random: np.random.Generator,
) -> Iterator[Measure]:
    complete = table[~np.isnan(table).any(axis=1)]
    if scale == "continuous" and len(complete) >= 2:
        form: Literal["ICC1", "ICC2"] = "ICC1" if between == "replication" else "ICC2"
        yield from _tried(
            raters, form, len(complete), lambda: stats.intraclass_correlation(complete, form=form, level=level)
        )
    if scale == "binary" and len(raters) > 2 and len(complete) >= 2:
        labelled, about = _sampled(complete, _MOST_LABELLED, random)
        yield from _tried(
            raters,
            "Fleiss kappa",
            len(labelled),
            lambda: stats.fleiss_kappa(labelled.astype(int).tolist(), level=level),
            about,
        )
    few, remark = _sampled(table, _MOST_UNITS, random)
    metric: Literal["nominal", "ordinal", "interval"] = {
        "binary": "nominal",
        "ordinal": "ordinal",
        "continuous": "interval",
    }[scale]  # type: ignore[assignment]
    yield from _tried(
        raters,
        "Krippendorff alpha",
        len(few),
        lambda: stats.krippendorff_alpha(few.tolist(), metric=metric, level=level, rng=random),
        remark,
    )


def _pair(raters: tuple[str, str], both: FloatArray, scale: Scale, level: float) -> Iterator[Measure]:
    if len(both) < 3:
        return
    if scale == "continuous":
        one, two = both.T
        yield from _tried(
            raters, "ICC2", len(both), lambda: stats.intraclass_correlation(both, form="ICC2", level=level)
        )
        yield from _tried(raters, "r", len(both), lambda: stats.pearson(one, two, alpha=1 - level))
        yield from _tried(raters, "mean difference", len(both), lambda: stats.bland_altman(one, two, level=level).bias)
        return
    labels, remark = _sampled(both, _MOST_LABELLED, np.random.default_rng(0))
    weights: Literal["none", "quadratic"] = "none" if scale == "binary" else "quadratic"
    name = "Cohen kappa" if scale == "binary" else "weighted kappa"
    yield from _tried(
        raters,
        name,
        len(labels),
        lambda: stats.cohen_kappa(labels[:, 0].tolist(), labels[:, 1].tolist(), weights=weights, level=level),
        remark,
    )


def _tried(
    raters: tuple[str, ...], name: str, units: int, made: Callable[[], Estimate | Result], about: tuple[str, ...] = ()
) -> Iterator[Measure]:
    """Yield the measure, or nothing where it is not defined: all raters gave everything the same score."""
    try:
        found = made()
    except stats.InvalidSample as exc:
        yield Measure(raters, name, float("nan"), None, units, "", (*about, str(exc)))
        return
    value = found.value if isinstance(found, Estimate) else found.estimate
    assert value is not None
    yield Measure(raters, name, value, found.interval, units, found.method, (*about, *found.warnings))


def _sampled(table: FloatArray, most: int, random: np.random.Generator) -> tuple[FloatArray, tuple[str, ...]]:
    if len(table) <= most:
        return table, ()
    chosen = np.sort(random.choice(len(table), most, replace=False))
    return table[chosen], (f"of a random {most:,} of {len(table):,} that were rated",)
