"""Prediction-powered inference: what people would have said of all notes, from a few that they did grade.

A judge model grades every note and may be biased; people grade a random part of them. The judge's mean is corrected by
the mean of its errors on that part. The result is unbiased whatever the judge is worth, and the better the judge, the
more precise: Angelopoulos, Bates, Fannjiang, Jordan & Zrnic (2023), Science 382; power tuning of Angelopoulos, Duchi &
Zrnic (2023), PPI++. It rests on one thing: which notes people graded was decided by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pgharness.stats.results import Alternative, Estimate, Interval, Result
from pgharness.stats.samples import FloatArray, InvalidSample, codes, pairs, sample

METHOD = "PPI++ (Angelopoulos, Duchi & Zrnic 2023), clustered by case, t with Satterthwaite df"


@dataclass(frozen=True, slots=True)
class GradedNotes:
    """The grades of one system: human and judge of the same notes, judge_only of the notes that no one else graded.

    human and judge have shape (n,), judge_only shape (m,). cases and judge_only_cases label them (None: every note is a
    case of its own); notes of one case are not taken for independent.
    """

    human: Sequence[Any] | FloatArray
    judge: Sequence[Any] | FloatArray
    judge_only: Sequence[Any] | FloatArray
    cases: Sequence[Any] | None = None
    judge_only_cases: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True)
class CorrectedMean:
    """The mean that people would have given, beside what either source says alone.

    bias is the judge's mean minus the people's on the notes that both graded. tuning is how much the judge was relied
    on, 0 to 1. worth is how many notes graded by people alone would be as precise as this.
    """

    estimate: Estimate
    human_only: Estimate
    bias: Estimate
    tuning: float
    worth: float


@dataclass(frozen=True, slots=True)
class _Influence:
    """How much each case moves a mean, by source: sums to the variance when squared."""

    value: float
    human: FloatArray
    judge: FloatArray
    df_human: int
    df_judge: int
    tuning: float


def corrected_mean(
    notes: GradedNotes, *, tuning: float | None = None, level: float = 0.95, name: str = "mean score"
) -> CorrectedMean:
    """Return the mean that people would have given all notes, with an interval, from judge and part of them by people.

    tuning=None chooses the weight of the judge that gives the smallest variance, within 0..1; 1 is plain PPI, 0 uses
    the people's grades alone. Needs at least 4 cases graded by people and 2 by the judge only.
    """
    human, judge, rest, code, rest_code, count = _read(notes, "notes")
    found = _influence((human, judge, rest), (code, rest_code), count, tuning)
    estimate = _estimate(name, found.value, _combined(found), level, (len(human), len(rest)))
    alone = _influence((human, judge, rest), (code, rest_code), count, 0.0)
    wrong = _influence((judge - human, judge, rest), (code, rest_code), count, 0.0)
    variance = estimate.standard_error**2
    return CorrectedMean(
        estimate=estimate,
        human_only=_estimate(name, alone.value, _combined(alone), level, len(human)),
        bias=_estimate("bias of the judge", wrong.value, _combined(wrong), level, len(human)),
        tuning=found.tuning,
        worth=len(human) * float(np.sum(alone.human**2)) / variance if variance > 0 else math.inf,
    )


def corrected_difference(
    first: GradedNotes,
    second: GradedNotes,
    *,
    tuning: float | None = None,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
) -> Result:
    """Compare two systems by what people would have said: the corrected mean of first minus that of second.

    Cases are matched by label, so two systems on the same cases are compared within cases. The judge may be biased by a
    different amount for each system.
    """
    read = [_read(first, names[0]), _read(second, names[1])]
    sides = (first, second)
    labels: list[Any] = []
    for side, (human, _, rest, *_others) in zip(sides, read, strict=True):
        for given, size in ((side.cases, len(human)), (side.judge_only_cases, len(rest))):
            labels += [object() for _ in range(size)] if given is None else list(given)
    code = codes(labels)
    count, start = int(code.max()) + 1, 0
    found = []
    for human, judge, rest, *_others in read:
        middle, end = start + len(human), start + len(human) + len(rest)
        found.append(_influence((human, judge, rest), (code[start:middle], code[middle:end]), count, tuning))
        start = end
    one, two = found
    # The degrees of freedom take the sources as independent, which only errs by how much the variance itself varies.
    error, df = _combined(one, two)
    value = one.value - two.value
    if error == 0:
        raise InvalidSample("the grades do not vary: there is no standard error to test against")
    statistic = value / error
    p_value = {
        "two-sided": 2 * float(stats.t.sf(abs(statistic), df)),
        "greater": float(stats.t.sf(statistic, df)),
        "less": float(stats.t.cdf(statistic, df)),
    }[alternative]
    reach = float(stats.t.isf(alpha / 2 if alternative == "two-sided" else alpha, df)) * error
    low = -math.inf if alternative == "less" else value - reach
    high = math.inf if alternative == "greater" else value + reach
    return Result(
        test="Prediction-powered comparison",
        statistic=statistic,
        statistic_name="t",
        p_value=p_value,
        n=(len(read[0][0]), len(read[1][0])),
        df=df,
        estimate=value,
        estimate_name="mean difference",
        interval=Interval(low, high, 1 - alpha, METHOD),
        alternative=alternative,
        alpha=alpha,
        method=METHOD,
    )


def _influence(
    grades: tuple[FloatArray, FloatArray, FloatArray],
    case_codes: tuple[Any, Any],
    count: int,
    tuning: float | None,
) -> _Influence:
    human, judge, rest = grades
    code, rest_code = case_codes
    cases, rest_cases = len(np.unique(code)), len(np.unique(rest_code))

    def moves(values: FloatArray, of: Any, free: int) -> FloatArray:
        size = len(np.unique(of))
        summed = np.bincount(of, values - values.mean(), minlength=count) / len(values)
        return np.asarray(summed * math.sqrt(size / free))

    # As in regression, the weight that is fitted to the same grades costs a degree of freedom.
    free = cases - 1 if tuning is not None else cases - 2
    by_human, by_judge = moves(human, code, free), moves(judge, code, free)
    by_rest = moves(rest, rest_code, rest_cases - 1)
    if tuning is None:
        gap = by_judge - by_rest
        square = float(gap @ gap)
        tuning = min(max(float(by_human @ gap) / square, 0.0), 1.0) if square > 0 else 0.0
    elif not 0 <= tuning <= 1:
        raise InvalidSample(f"tuning is {tuning!r}: it lies between 0 and 1, or is None to be chosen")
    value = tuning * float(rest.mean()) + float(np.mean(human - tuning * judge))
    left = by_human - tuning * by_judge
    return _Influence(value, left, tuning * by_rest, free, rest_cases - 1, tuning)


def _combined(one: _Influence, two: _Influence | None = None) -> tuple[float, float]:
    """Return the standard error of a corrected mean, or of the difference of two, and its degrees of freedom."""
    total = one.human + one.judge - (0.0 if two is None else two.human + two.judge)
    variance = float(np.sum(total**2))
    parts = [
        (float(np.sum(source**2)), df)
        for side in (one, two)
        if side is not None
        for source, df in ((side.human, side.df_human), (side.judge, side.df_judge))
    ]
    below = sum(part**2 / df for part, df in parts)
    return math.sqrt(variance), sum(part for part, _ in parts) ** 2 / below if below > 0 else math.inf


def _estimate(name: str, value: float, spread: tuple[float, float], level: float, n: int | tuple[int, ...]) -> Estimate:
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level!r}: it lies between 0 and 1, such as 0.95")
    error, df = spread
    reach = float(stats.t.isf((1 - level) / 2, df)) * error
    people = n if isinstance(n, int) else n[0]
    warnings = (f"only {people} notes graded by people: the interval leans on normality",) if people < 20 else ()
    if error == 0:
        warnings = ("the grades do not vary: the interval has no width", *warnings)
    return Estimate(name, value, error, Interval(value - reach, value + reach, level, METHOD), n, METHOD, warnings)


def _read(notes: GradedNotes, name: str) -> tuple[FloatArray, FloatArray, FloatArray, Any, Any, int]:
    human, judge = pairs(notes.human, notes.judge, names=(f"human of {name}", f"judge of {name}"), minimum=1)
    rest = sample(notes.judge_only, name=f"judge_only of {name}", minimum=1)
    if (notes.cases is None) != (notes.judge_only_cases is None):
        raise InvalidSample(f"{name}: give both cases and judge_only_cases, or neither")
    labels = list(range(len(human))) if notes.cases is None else list(notes.cases)
    others = [f"judge only {i}" for i in range(len(rest))]
    if notes.judge_only_cases is not None:
        others = list(notes.judge_only_cases)
    codes(labels, name=f"cases of {name}", length=len(human))
    codes(others, name=f"judge_only_cases of {name}", length=len(rest))
    code = codes([*labels, *others])
    for what, part, least in (("people", code[: len(human)], 4), ("the judge only", code[len(human) :], 2)):
        if len(np.unique(part)) < least:
            raise InvalidSample(f"{name}: {len(np.unique(part))} cases graded by {what}, at least {least} needed")
    return human, judge, rest, code[: len(human)], code[len(human) :], int(code.max()) + 1
