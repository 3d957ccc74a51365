"""Scores of systems on shared cases: means and differences whose errors know that values of one case belong together.

An evaluation repeats itself: several notes for a case, several grades for a note, several cases from one source. Such
values are not independent, and a standard error that treats them so is too small. Here the unit is the case, or the
cluster that cases belong to. The case counts once, however many of its notes were graded: a case whose notes failed
does not lose its weight.

Clustered errors are CR2, "bias-reduced linearization", with Satterthwaite degrees of freedom: Bell & McCaffrey (2002),
Survey Methodology 28; Pustejovsky & Tipton (2018), Journal of Business & Economic Statistics 36. With independent cases
they are the ordinary t interval on case means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from pgharness.stats.effects import cohen_dz
from pgharness.stats.results import Alternative, Effect, Estimate, Interval, Result
from pgharness.stats.samples import (
    FloatArray,
    IntArray,
    InvalidSample,
    NanPolicy,
    Rng,
    codes,
    describe,
    differences_are_constant,
    differences_of,
    generator,
    is_constant,
    pairs,
)

Clusters = Mapping[Any, Any]
"""Case to the cluster it belongs to: its source document, its patient, its author."""

Weights = Literal["cases", "values"]
CR2 = "CR2 with Satterthwaite df (Bell & McCaffrey 2002; Pustejovsky & Tipton 2018)"
CASE_MEANS = "t on case means (Student 1908; clustered as in Miller 2024, Adding error bars to evals)"
_FEW_CLUSTERS = 10


@dataclass(frozen=True, slots=True)
class ClusteredEstimate:
    """A linear contrast of regression coefficients, its clustered standard error and degrees of freedom."""

    value: float
    standard_error: float
    df: float


def clustered_contrast(
    outcomes: FloatArray, design: FloatArray, clusters: IntArray, contrast: FloatArray
) -> ClusteredEstimate:
    """Return contrast @ coefficients of a least-squares fit with its CR2 standard error.

    outcomes has shape (n,), design (n, p) of full rank, clusters (n,) with codes 0..k-1, contrast (p,). The working
    model is independent errors of equal variance; the standard error is right without it. Works on p x p matrices
    only, so a cluster of thousands costs no more than one of two.
    """
    inverse = np.linalg.inv(design.T @ design)
    residuals = outcomes - design @ (inverse @ (design.T @ outcomes))
    count, width = int(clusters.max()) + 1, design.shape[1]
    scores, crosses = np.zeros((count, width)), np.zeros((count, width, width))
    np.add.at(scores, clusters, design * residuals[:, None])
    np.add.at(crosses, clusters, design[:, :, None] * design[:, None, :])
    values, vectors = np.linalg.eigh(inverse)
    root = (vectors * np.sqrt(values)) @ vectors.T
    unroot = (vectors / np.sqrt(values)) @ vectors.T
    leverage, axes = np.linalg.eigh(root @ crosses @ root)
    # A cluster with leverage 1 decides a coefficient alone, so says nothing of its error: as in a pseudo-inverse.
    free = 1 - leverage
    grown = np.where(free > 1e-10, 1 / np.sqrt(np.maximum(free, 1e-10)), 0.0)
    adjusted = unroot @ ((axes * grown[:, None, :]) @ axes.transpose(0, 2, 1)) @ root
    weights = (contrast @ inverse) @ adjusted
    variance = float(np.sum(np.einsum("gp,gp->g", weights, scores) ** 2))
    images = np.einsum("gpq,gq->gp", crosses, weights)
    own = np.einsum("gp,gp->g", weights, images)
    shared = np.einsum("gp,pq,gq->g", images, inverse, images)
    trace = float(np.sum(own - shared))
    crossed = images.T @ images @ inverse
    square = float(np.sum(own**2) - 2 * np.sum(own * shared) + np.trace(crossed @ crossed))
    value = float(contrast @ inverse @ design.T @ outcomes)
    return ClusteredEstimate(value, math.sqrt(variance), trace**2 / square if square > 0 else math.nan)


def mean_score(
    values: object,
    *,
    cases: Sequence[Any],
    clusters: Clusters | None = None,
    weights: Weights = "cases",
    level: float = 0.95,
    name: str = "mean score",
    nan: NanPolicy = "raise",
) -> Estimate:
    """Return the mean score of a system with a standard error that counts cases, not values.

    values has shape (n,); cases labels each value's case. weights="cases": every case counts once; "values": every
    value does. clusters groups cases that are alike. Raises InvalidSample for fewer than two cases or clusters.
    """
    scores, labels = _labelled(values, cases, "values", "cases", nan)
    if weights not in ("cases", "values"):
        raise InvalidSample(f'weights is {weights!r}: it is "cases" or "values"')
    names, means = _case_means(scores, labels)
    if weights == "cases":
        outcomes, units = means, _cluster_codes(names, clusters)
    else:
        outcomes, units = scores, _cluster_codes(names, clusters)[codes(labels)]
    count = _enough_clusters(units, "clusters" if clusters else "cases", name)
    found = clustered_contrast(outcomes, np.ones((len(outcomes), 1)), units, np.ones(1))
    interval = _t_interval(found, "two-sided", level, CASE_MEANS if clusters is None and weights == "cases" else CR2)
    warnings = _few(count, found.df, "clusters" if clusters else "cases")
    if is_constant(outcomes):
        warnings = ("all cases score the same: the data show no variation, so the interval has no width", *warnings)
        interval = Interval(found.value, found.value, level, interval.method)
    return Estimate(name, found.value, found.standard_error, interval, count, interval.method, warnings)


def paired_difference(
    first: object,
    second: object,
    *,
    cases: Sequence[Any],
    second_cases: Sequence[Any] | None = None,
    clusters: Clusters | None = None,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Compare two systems on the cases that both answered: the mean over cases of first minus second.

    cases labels the values of first, second_cases those of second (None: the same labels in the same order). Several
    values of a case are averaged first. Cases that only one system has are left out, with a warning.
    """
    one = dict(zip(*_case_means(*_labelled(first, cases, names[0], "cases", nan)), strict=True))
    labels = cases if second_cases is None else second_cases
    two = dict(zip(*_case_means(*_labelled(second, labels, names[1], "second_cases", nan)), strict=True))
    shared = [case for case in one if case in two]
    if not shared:
        raise InvalidSample(f"{names[0]} and {names[1]} share no case: use group_difference for different cases")
    left, right = (np.array([side[case] for case in shared]) for side in (one, two))
    units = _cluster_codes(shared, clusters)
    count = _enough_clusters(units, "clusters" if clusters else "shared cases", "the paired comparison")
    dropped = len(one) + len(two) - 2 * len(shared)
    warnings = (f"{dropped} cases that only one of them has were left out",) if dropped else ()
    differences = differences_of(left, right)
    constant = differences_are_constant(left, right)
    if constant and differences[0] != 0:
        raise InvalidSample(
            f"{names[0]} and {names[1]} differ by {differences[0]:g} in every case: with no variation there is no "
            "standard error to test against"
        )
    found = clustered_contrast(differences, np.ones((len(shared), 1)), units, np.ones(1))
    method = CASE_MEANS if clusters is None else CR2
    return _tested(
        found,
        test="Paired comparison by case",
        n=len(shared),
        effect=None if constant else cohen_dz(left, right, level=1 - alpha),
        groups=(describe(names[0], left), describe(names[1], right)),
        warnings=warnings + _few(count, found.df, "clusters" if clusters else "cases"),
        method=method,
        alternative=alternative,
        alpha=alpha,
    )


def group_difference(
    first: object,
    second: object,
    *,
    cases: Sequence[Any],
    second_cases: Sequence[Any],
    clusters: Clusters | None = None,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Compare two systems whose cases differ, wholly or in part: the difference of their mean case scores.

    Cases or clusters in both groups keep their correlation, so nothing is left out. Without any in common the standard
    error is Welch's. Prefer paired_difference where all cases are shared: it is the same there but says what it uses.
    """
    sides = [
        _case_means(*_labelled(first, cases, names[0], "cases", nan)),
        _case_means(*_labelled(second, second_cases, names[1], "second_cases", nan)),
    ]
    outcomes = np.concatenate([means for _, means in sides])
    group = np.repeat([0, 1], [len(means) for _, means in sides])
    units = _cluster_codes([*sides[0][0], *sides[1][0]], clusters)
    for side in (0, 1):
        _enough_clusters(units[group == side], "clusters" if clusters else "cases", names[side])
    if is_constant(outcomes):
        outcomes = np.zeros(len(outcomes))
    elif all(is_constant(means) for _, means in sides):
        raise InvalidSample(f"{names[0]} and {names[1]} are both constant: there is no standard error to test against")
    design = np.column_stack([group == 0, group == 1]).astype(np.float64)
    found = clustered_contrast(outcomes, design, units, np.array([1.0, -1.0]))
    return _tested(
        found,
        test="Comparison of groups of cases",
        n=(len(sides[0][1]), len(sides[1][1])),
        effect=None,
        groups=(describe(names[0], sides[0][1]), describe(names[1], sides[1][1])),
        warnings=_few(int(units.max()) + 1, found.df, "clusters" if clusters else "cases"),
        method=CR2,
        alternative=alternative,
        alpha=alpha,
    )


def _tested(
    found: ClusteredEstimate,
    *,
    test: str,
    n: int | tuple[int, ...],
    effect: Effect | None,
    groups: tuple[Any, ...],
    warnings: tuple[str, ...],
    method: str,
    alternative: Alternative,
    alpha: float,
) -> Result:
    if alternative not in ("two-sided", "less", "greater"):
        raise InvalidSample(f'alternative is {alternative!r}: it is "two-sided", "less" or "greater"')
    if found.standard_error == 0:
        statistic, p_value = 0.0, 1.0
        interval = Interval(found.value, found.value, 1 - alpha, method)
        warnings = ("the systems score the same in every case: nothing varies, so p = 1 by definition", *warnings)
    else:
        statistic = found.value / found.standard_error
        tail = {"less": stats.t.cdf(statistic, found.df), "greater": stats.t.sf(statistic, found.df)}
        p_value = float(tail.get(alternative, 2 * stats.t.sf(abs(statistic), found.df)))
        interval = _t_interval(found, alternative, 1 - alpha, method)
    return Result(
        test=test,
        statistic=statistic,
        statistic_name="t",
        p_value=p_value,
        n=n,
        df=found.df,
        estimate=found.value,
        estimate_name="mean difference",
        interval=interval,
        effect=effect,
        alternative=alternative,
        alpha=alpha,
        groups=groups,
        warnings=warnings,
        method=method,
    )


@dataclass(frozen=True, slots=True)
class VarianceParts:
    """Where the variation of scores comes from: cases, replications (notes) of a case, grades of a note.

    Variances in squared units of the score. A part that the data cannot separate is None and contained in the part
    above it. cases, replications (per case) and grades (per note) are what was measured, the latter two as means.
    """

    case: float
    replication: float | None
    grade: float | None
    cases: int
    replications: float
    grades: float
    warnings: tuple[str, ...] = ()

    def variance(self, cases: float, replications: float, grades: float, *, fixed_cases: bool = False) -> float:
        """Return the variance of the mean of so many cases, replications of each, and grades of each of these.

        fixed_cases=True asks only about repeating the measurement on the very same cases.
        """
        within = (self.replication or 0.0) + (self.grade or 0.0) / grades
        return ((0.0 if fixed_cases else self.case) + within / replications) / cases

    def standard_error(self, cases: float, replications: float, grades: float, *, fixed_cases: bool = False) -> float:
        """Return the standard error of the mean, the square root of `variance`."""
        return math.sqrt(self.variance(cases, replications, grades, fixed_cases=fixed_cases))


def variance_parts(
    values: object, *, cases: Sequence[Any], notes: Sequence[Any] | None = None, nan: NanPolicy = "raise"
) -> VarianceParts:
    """Split the variance of scores into parts between cases, between notes of a case, and between grades of a note.

    values has shape (n,), one for each grade; cases and notes label them (None: each value is a note of its own; a
    note's label need only be unique within its case). Estimates by the nested analysis of variance, balanced or not:
    Searle, Casella & McCulloch (1992), Variance Components, ch. 3. A negative estimate is reported as 0 with a warning.
    """
    labels = cases if notes is None else list(zip(cases, notes, strict=False))
    if notes is not None and len(notes) != len(cases):
        raise InvalidSample(f"notes has {len(notes)} labels and cases has {len(cases)}: give one of each per value")
    scores, kept = _labelled(values, list(range(len(labels))), "values", "cases", nan)
    case = codes([cases[row] for row in kept])
    note = codes([labels[row] for row in kept]) if notes is not None else np.arange(len(scores))
    return coded_variance_parts(scores, case, note)


def paired_variance_parts(
    first: object,
    second: object,
    *,
    cases: Sequence[Any],
    second_cases: Sequence[Any],
    notes: Sequence[Any] | None = None,
    second_notes: Sequence[Any] | None = None,
    nan: NanPolicy = "raise",
) -> VarianceParts:
    """Split the variance of the difference between two systems on shared cases, as `variance_parts` does for one.

    The case part is how much the systems' true difference varies from case to case; the other parts are the sums of
    both systems' own. Moments estimator: the variance of case differences less its expected noise.
    """
    sides = [
        variance_parts(first, cases=cases, notes=notes, nan=nan),
        variance_parts(second, cases=second_cases, notes=second_notes, nan=nan),
    ]
    one = dict(zip(*_case_means(*_labelled(first, cases, "first", "cases", nan)), strict=True))
    two = dict(zip(*_case_means(*_labelled(second, second_cases, "second", "second_cases", nan)), strict=True))
    shared = [case for case in one if case in two]
    if len(shared) < 2:
        raise InvalidSample(f"{len(shared)} shared cases: at least 2 are needed to see how differences vary")
    return difference_parts(sides[0], sides[1], np.array([one[case] - two[case] for case in shared]))


def difference_parts(first: VarianceParts, second: VarianceParts, differences: FloatArray) -> VarianceParts:
    """Split the variance of differences by case, shape (cases,), at least 2, given the parts of both systems."""
    spread = float(np.var(differences, ddof=1))
    noise = sum(side.variance(1, side.replications, side.grades, fixed_cases=True) for side in (first, second))
    warnings = tuple(dict.fromkeys((*first.warnings, *second.warnings)))
    if spread < noise:
        warnings += ("the case part came out negative and is reported as 0",)
    return VarianceParts(
        case=max(spread - noise, 0.0),
        replication=_sum(first.replication, second.replication),
        grade=_sum(first.grade, second.grade),
        cases=len(differences),
        replications=(first.replications + second.replications) / 2,
        grades=(first.grades + second.grades) / 2,
        warnings=warnings,
    )


def coded_variance_parts(scores: FloatArray, case: IntArray, note: IntArray) -> VarianceParts:
    """Do as `variance_parts` with labels that are codes already, 0..k-1 without gaps, all of shape (n,)."""
    total, notes, cases = len(scores), int(note.max()) + 1, int(case.max()) + 1
    if cases < 2:
        raise InvalidSample("all values belong to one case: at least 2 cases are needed to split the variance")
    scores = scores - scores.mean()
    per_note, per_case = np.bincount(note), np.bincount(case)
    note_case = np.zeros(notes, dtype=np.intp)
    note_case[note] = case
    note_mean = np.bincount(note, scores) / per_note
    case_mean = np.bincount(case, scores) / per_case
    squares = np.bincount(note_case, per_note.astype(np.float64) ** 2, minlength=cases) / per_case
    grade = float(np.sum((scores - note_mean[note]) ** 2) / (total - notes)) if total > notes else None
    between = float(np.sum(per_note * (note_mean - case_mean[note_case]) ** 2))
    replication = None
    if notes > cases:
        share = (total - squares.sum()) / (notes - cases)
        replication = (between / (notes - cases) - (grade or 0.0)) / share
    above = float(np.sum(per_case * case_mean**2) / (cases - 1))
    notes_in_case = (squares.sum() - np.sum(per_note**2.0) / total) / (cases - 1)
    size = (total - np.sum(per_case**2.0) / total) / (cases - 1)
    part = (above - (grade or 0.0) - notes_in_case * (replication or 0.0)) / size
    warnings = []
    if replication is None:
        warnings.append("one note for each case: the case part contains the replications' part; repeat some notes")
    if grade is None:
        warnings.append("one grade for each note: the part above contains the grades' part; grade some notes twice")
    for name, value in (("case", part), ("replication", replication)):
        if value is not None and value < 0:
            warnings.append(f"the {name} part came out negative ({value:.3g}) and is reported as 0")
    return VarianceParts(
        case=max(float(part), 0.0),
        replication=None if replication is None else max(float(replication), 0.0),
        grade=grade,
        cases=cases,
        replications=notes / cases,
        grades=total / notes,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, slots=True)
class Allocation:
    """How much to measure: cases, replications of each, grades of each replication; its cost and its standard error."""

    cases: int
    replications: float
    grades: float
    cost_usd: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class PrecisionAdvice:
    """Where the next dollar buys most precision, and the best use of a whole budget.

    gains holds, for "cases", "replications" and "grades", by what fraction the variance of the mean falls for each
    dollar spent there at the margin. best is the largest of them.
    """

    best: str
    gains: Mapping[str, float]
    current: Allocation
    optimum: Allocation
    reason: str


def advise_precision(
    parts: VarianceParts,
    *,
    note_usd: float,
    grade_usd: float,
    case_usd: float = 0.0,
    budget_usd: float | None = None,
    maximum_cases: int | None = None,
) -> PrecisionAdvice:
    """Say whether more cases, more replications or more grades buy the most precision for the money.

    The costs are of one more case (its preparation), note and grade; budget_usd is by default what the measured design
    would cost. Optimal allocation in nested sampling: Cochran (1977), Sampling Techniques, 3rd ed., ch. 10.
    """
    if min(note_usd, grade_usd, case_usd) < 0 or note_usd + grade_usd + case_usd <= 0:
        raise InvalidSample("costs must not be negative, and one of them must be above 0")
    c, r, g = parts.cases, parts.replications, parts.grades
    per_note = note_usd + g * grade_usd
    current = parts.variance(c, r, g)
    within, graded = (parts.replication or 0.0) + (parts.grade or 0.0) / g, (parts.grade or 0.0) / g
    slopes = {
        "cases": (current / c, case_usd + r * per_note),
        "replications": (within / (c * r * r), c * per_note),
        "grades": (graded / (c * r * g), c * r * grade_usd),
    }
    gains = {
        name: 0.0 if slope == 0 else math.inf if cost == 0 else slope / cost / current
        for name, (slope, cost) in slopes.items()
    }
    if maximum_cases is not None and c >= maximum_cases:
        gains["cases"] = 0.0
    best = max(gains, key=lambda name: gains[name])
    spent = c * (case_usd + r * per_note)
    now = Allocation(c, r, g, spent, math.sqrt(current))
    optimum = _optimum(
        parts, (case_usd, note_usd, grade_usd), spent if budget_usd is None else budget_usd, maximum_cases
    )
    shares = [parts.case / c, (parts.replication or 0.0) / (c * r), (parts.grade or 0.0) / (c * r * g)]
    told = ", ".join(
        f"{100 * share / current:.0f}% {name}" if current else f"0% {name}"
        for name, share in zip(("between cases", "between replications", "between grades"), shares, strict=True)
    )
    as_good = [name for name in gains if name != best and gains[name] > 0.99 * gains[best] > 0]
    reason = f"the variance of the mean is {told}; the next dollar buys most precision in {best}"
    reason += f", and as much in {' and '.join(as_good)}" * bool(as_good)
    return PrecisionAdvice(best if current else "none", gains, now, optimum, reason)


def _optimum(
    parts: VarianceParts, costs: tuple[float, float, float], budget: float, maximum_cases: int | None
) -> Allocation:
    # What the data could not separate is not traded: it stays at one of each.
    replications = np.arange(1, 201 if parts.replication is not None else 2, dtype=np.float64)[:, None]
    grades = np.arange(1, 101 if parts.grade is not None else 2, dtype=np.float64)[None, :]
    each = np.maximum(costs[0] + replications * (costs[1] + grades * costs[2]), 1e-300)
    cases = np.floor(np.minimum(budget / each * (1 + 1e-12), maximum_cases if maximum_cases is not None else 1e9))
    within = ((parts.replication or 0.0) + (parts.grade or 0.0) / grades) / replications
    variance = np.where(cases >= 2, (parts.case + within) / np.maximum(cases, 1), np.inf)
    if not np.isfinite(variance).any():
        raise InvalidSample(f"a budget of {budget:g} USD does not pay for two cases")
    cost = cases * each
    tied = variance <= variance.min() * (1 + 1e-9)
    row, column = np.unravel_index(int(np.argmin(np.where(tied, cost, np.inf))), variance.shape)
    return Allocation(
        cases=int(cases[row, column]),
        replications=float(row + 1),
        grades=float(column + 1),
        cost_usd=float(cost[row, column]),
        standard_error=math.sqrt(float(variance[row, column])),
    )


def pass_at_k_values(passed: object, attempts: object, k: int) -> FloatArray:
    """Return each problem's unbiased estimate of the chance that at least one of k attempts passes, shape (problems,).

    passed of attempts (both of shape (problems,)) were right: 1 - C(attempts - passed, k) / C(attempts, k), from
    Chen et al. (2021), Evaluating large language models trained on code. Raises InvalidSample if k exceeds attempts.
    """
    right, tries = pairs(passed, attempts, names=("passed", "attempts"))
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise InvalidSample(f"k is {k!r}: it is a whole number from 1")
    for name, counts in (("passed", right), ("attempts", tries)):
        if np.any(counts < 0) or np.any(counts != np.floor(counts)):
            raise InvalidSample(f"{name} must be whole numbers from 0")
    if np.any(right > tries):
        raise InvalidSample("a problem has more passed than attempts")
    if np.any(tries < k):
        raise InvalidSample(f"a problem has {int(tries.min())} attempts: pass@{k} needs at least {k} of each")
    wrong = tries - right
    factors = np.ones(len(right))
    for step in range(int(k)):  # C(wrong, k) / C(attempts, k) as a product: no factorial overflows, nothing cancels
        factors *= np.maximum(wrong - step, 0) / (tries - step)
    return 1 - factors


def pass_at_k(
    passed: object, attempts: object, k: int, *, level: float = 0.95, resamples: int = 10_000, rng: Rng = 0
) -> Estimate:
    """Return pass@k over problems with its interval: BCa bootstrap over problems (Efron 1987).

    passed of attempts, both of shape (problems,), at least 2 problems. Where all problems agree on 0 or on 1 there is
    nothing to resample: the interval is Clopper-Pearson's on problems, which holds for any mean of values in 0..1.
    """
    values = pass_at_k_values(passed, attempts, k)
    count = len(values)
    if count < 2:
        raise InvalidSample(f"{count} problem: at least 2 are needed for an interval")
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(count))
    warnings = (f"only {count} problems: the interval is rough",) if count < _FEW_CLUSTERS else ()
    if not is_constant(values):
        # scipy draws from the generator; the same seed gives the same interval.
        found = stats.bootstrap((values,), np.mean, confidence_level=level, n_resamples=resamples, rng=generator(rng))
        low, high = (float(end) for end in found.confidence_interval)
        interval = Interval(low, high, level, f"BCa bootstrap over problems, {resamples} resamples")
    elif mean in (0.0, 1.0):
        edge = float(special.betaincinv(count, 1, (1 - level) / 2))  # Clopper-Pearson's bound for count of count
        low, high = (edge, 1.0) if mean == 1.0 else (0.0, 1 - edge)
        interval = Interval(low, high, level, "Clopper-Pearson over problems")
        warnings = (f"every problem has pass@{k} = {mean:g}", *warnings)
    else:
        interval = Interval(mean, mean, level, "no variation between problems")
        warnings = ("every problem has the same value: the interval has no width", *warnings)
    return Estimate(f"pass@{k}", mean, error, interval, count, interval.method, warnings)


def _labelled(
    values: object, labels: Sequence[Any], name: str, labels_name: str, nan: NanPolicy
) -> tuple[FloatArray, Sequence[Any]]:
    """Return values and their labels without the rows whose value is missing, if that is allowed."""
    given = labels if isinstance(labels, range) else list(labels)
    codes(given, name=labels_name)
    scores, rows = pairs(values, np.arange(len(given), dtype=np.float64), names=(name, labels_name), nan=nan)
    return scores, given if len(rows) == len(given) else [given[int(row)] for row in rows]


def _case_means(scores: FloatArray, labels: Sequence[Any]) -> tuple[Sequence[Any], FloatArray]:
    if isinstance(labels, range):  # each value is a case of its own
        return labels, scores
    code = codes(labels)
    return list(dict.fromkeys(labels)), np.bincount(code, scores) / np.bincount(code)


def _cluster_codes(cases: Sequence[Any], clusters: Clusters | None) -> IntArray:
    if clusters is None:
        return codes(cases)
    for case in cases:
        if case not in clusters:
            raise InvalidSample(f"case {case!r} has no cluster: name one for each case, or leave clusters out")
    return codes([clusters[case] for case in cases])


def _enough_clusters(units: IntArray, what: str, name: str) -> int:
    count = int(np.count_nonzero(np.bincount(units)))
    if count < 2:
        raise InvalidSample(f"{name}: {count} of {what}, at least 2 needed to see how they vary")
    return count


def _few(count: int, df: float, what: str) -> tuple[str, ...]:
    if count < _FEW_CLUSTERS or df < 4:
        return (f"only {count} {what} ({df:.1f} degrees of freedom): the p-value and interval lean on normality",)
    return ()


def _t_interval(found: ClusteredEstimate, alternative: Alternative, level: float, method: str) -> Interval:
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level!r}: it lies between 0 and 1, such as 0.95")
    tail = (1 - level) / 2 if alternative == "two-sided" else 1 - level
    reach = float(stats.t.isf(tail, found.df)) * found.standard_error
    low = -math.inf if alternative == "less" else found.value - reach
    high = math.inf if alternative == "greater" else found.value + reach
    return Interval(low, high, level, method)


def _sum(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one + two
