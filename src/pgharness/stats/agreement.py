"""How far raters agree: kappas and Krippendorff's alpha for labels, intraclass correlations and limits for scores.

A grader is trusted as far as it agrees with people, beyond what chance gives. Each function returns an interval: an
agreement from a few dozen items is a rough number.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pgharness.stats.results import Assumption, Estimate, Interval, Result
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    Rng,
    differences_of,
    generator,
    is_constant,
    listed,
    matrix,
    pairs,
    sample,
)

KappaWeights = Literal["none", "linear", "quadratic"]
Metric = Literal["nominal", "ordinal", "interval", "ratio"]
IccForm = Literal["ICC1", "ICC2", "ICC3", "ICC1k", "ICC2k", "ICC3k"]

_ICC_FORMS: dict[IccForm, str] = {
    "ICC1": "ICC(1,1): one-way random, single rater",
    "ICC2": "ICC(2,1): two-way random, absolute agreement, single rater",
    "ICC3": "ICC(3,1): two-way mixed, consistency, single rater",
    "ICC1k": "ICC(1,k): one-way random, mean of raters",
    "ICC2k": "ICC(2,k): two-way random, absolute agreement, mean of raters",
    "ICC3k": "ICC(3,k): two-way mixed, consistency, mean of raters",
}
_KAPPA = "Cohen (1960, 1968); standard error of Fleiss, Cohen & Everitt (1969)"
_FLEISS = "Fleiss (1971); standard error by linearisation (Gwet 2021, Handbook of Inter-Rater Reliability, 5th ed.)"
_ALPHA = "Krippendorff (2019), Content Analysis, 4th ed., ch. 12; percentile bootstrap over units (Zapf et al. 2016)"
_ICC = "Shrout & Fleiss (1979); McGraw & Wong (1996)"
_LIMITS = "Bland & Altman (1986, 1999); exact interval of Carkeet (2015)"


def cohen_kappa(
    first: Sequence[Any],
    second: Sequence[Any],
    *,
    weights: KappaWeights = "none",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Return Cohen's kappa of two raters' labels of the same items, both of shape (n,), n >= 2.

    weights counts near misses for ordered labels by how many categories apart they are. categories gives the order (and
    categories that nobody used); numbers are in order by themselves. Raises InvalidSample where kappa is undefined
    because both raters gave one label to everything.
    """
    if len(first) != len(second):
        raise InvalidSample(f"first has {len(first)} labels and second {len(second)}: give one of each for every item")
    if len(first) < 2:
        raise InvalidSample(f"{len(first)} items: at least 2 needed")
    if weights not in ("none", "linear", "quadratic"):
        raise InvalidSample(f'weights is {weights!r}: it is "none", "linear" or "quadratic"')
    order = _ordered([*first, *second], categories, ordered=weights != "none")
    places = {label: place for place, label in enumerate(order)}
    table = np.zeros((len(order), len(order)))
    for one, two in zip(first, second, strict=True):
        table[places[_plain(one)], places[_plain(two)]] += 1
    if np.count_nonzero(table.sum(axis=0) + table.sum(axis=1)) < 2:
        raise InvalidSample(f"both raters gave {first[0]!r} to every item: kappa is undefined without variation")
    share = table / table.sum()
    apart = np.abs(np.subtract.outer(np.arange(len(order)), np.arange(len(order)))) / (len(order) - 1)
    credit = {"none": (apart == 0) * 1.0, "linear": 1 - apart, "quadratic": 1 - apart**2}[weights]
    rows, columns = share.sum(axis=1), share.sum(axis=0)
    seen, chance = float(np.sum(credit * share)), float(rows @ credit @ columns)
    kappa = (seen - chance) / (1 - chance)
    # The variance as that of each item's influence: unlike the published difference of sums it cannot fall below 0.
    influence = (credit - np.add.outer(credit @ columns, rows @ credit) * (1 - kappa)) / (1 - chance)
    centre = float(np.sum(share * influence))
    error = math.sqrt(float(np.sum(share * (influence - centre) ** 2)) / len(first))
    reach = float(stats.norm.isf((1 - _checked(level)) / 2)) * error
    warnings = (f"{len(first)} items: the interval is for large samples",) if len(first) < 30 else ()
    name = "kappa" if weights == "none" else f"{weights} weighted kappa"
    interval = Interval(max(kappa - reach, -1.0), min(kappa + reach, 1.0), level, "normal approximation")
    return Estimate(name, kappa, error, interval, len(first), _KAPPA, warnings)


def fleiss_kappa(ratings: Sequence[Sequence[Any]], *, level: float = 0.95) -> Estimate:
    """Return Fleiss' kappa of labels of shape (items, raters): as many raters of each item, not always the same ones.

    Raises InvalidSample for fewer than 2 items or raters, missing labels (use krippendorff_alpha) and where all labels
    are the same.
    """
    rows = [[_plain(label) for label in row] for row in ratings]
    raters = {len(row) for row in rows}
    if len(rows) < 2 or raters != {max(raters, default=0)} or max(raters) < 2:
        raise InvalidSample("ratings needs at least 2 items, each with the same number of raters, at least 2")
    order = _ordered([label for row in rows for label in row], None, ordered=False)
    if len(order) < 2:
        raise InvalidSample(f"every label is {order[0]!r}: kappa is undefined without variation")
    places = {label: place for place, label in enumerate(order)}
    counts = np.zeros((len(rows), len(order)))
    for item, row in enumerate(rows):
        np.add.at(counts[item], [places[label] for label in row], 1)
    each = counts.sum(axis=1)
    shares = counts.mean(axis=0) / each[0]
    chance = float(np.sum(shares**2))
    agreed = (np.sum(counts**2, axis=1) - each) / (each * (each - 1))
    kappa = (float(np.mean(agreed)) - chance) / (1 - chance)
    by_chance = counts @ shares / each
    influence = (agreed - chance) / (1 - chance) - 2 * (1 - kappa) * (by_chance - chance) / (1 - chance)
    error = math.sqrt(float(np.sum((influence - kappa) ** 2)) / (len(rows) * (len(rows) - 1)))
    reach = float(stats.t.isf((1 - _checked(level)) / 2, len(rows) - 1)) * error
    interval = Interval(max(kappa - reach, -1.0), min(kappa + reach, 1.0), level, "t approximation")
    return Estimate("kappa", kappa, error, interval, len(rows), _FLEISS)


def krippendorff_alpha(
    ratings: Sequence[Sequence[Any]],
    *,
    metric: Metric = "nominal",
    categories: Sequence[Any] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    rng: Rng = 0,
) -> Estimate:
    """Return Krippendorff's alpha of ratings of shape (units, raters); None or NaN where a rater did not rate.

    metric says how labels differ: "nominal", "ordinal" (in the order of categories, or of the numbers), "interval" or
    "ratio" (numbers from 0). Units with fewer than two ratings cannot be compared and are left out, with a warning.
    Raises InvalidSample without two such units, and where all ratings are the same.
    """
    if metric not in ("nominal", "ordinal", "interval", "ratio"):
        raise InvalidSample(f'metric is {metric!r}: it is "nominal", "ordinal", "interval" or "ratio"')
    rows = [[_plain(label) for label in row if not _is_missing(label)] for row in listed(ratings, "ratings", "units")]
    kept = [row for row in rows if len(row) > 1]
    if len(kept) < 2:
        raise InvalidSample(f"{len(kept)} units have two ratings: at least 2 are needed")
    order = _ordered([label for row in kept for label in row], categories, ordered=metric != "nominal")
    if len({label for row in kept for label in row}) < 2:
        raise InvalidSample(f"every rating is {kept[0][0]!r}: alpha is undefined without variation")
    places = {label: place for place, label in enumerate(order)}
    counts = np.zeros((len(kept), len(order)))
    for unit, row in enumerate(kept):
        np.add.at(counts[unit], [places[label] for label in row], 1)
    values = np.arange(len(order), dtype=np.float64)
    if metric in ("interval", "ratio"):
        values = _as_numbers(order, metric)
    alpha = float(_alphas(np.ones((1, len(kept))), counts, values, metric)[0])
    random, even = generator(rng), np.full(len(kept), 1 / len(kept))
    block = max(1, 2_000_000 // (len(kept) + len(order)))  # so that thousands of units do not fill the memory
    sizes = [min(block, resamples - done) for done in range(0, resamples, block)]
    again = np.concatenate(
        [_alphas(random.multinomial(len(kept), even, size=size), counts, values, metric) for size in sizes]
    )
    low, high = (float(end) for end in np.quantile(again, [(1 - _checked(level)) / 2, (1 + level) / 2]))
    warnings = (f"{len(rows) - len(kept)} units with fewer than two ratings left out",) if len(kept) < len(rows) else ()
    interval = Interval(low, high, level, f"percentile bootstrap over units, {resamples} resamples")
    return Estimate("alpha", alpha, float(again.std(ddof=1)), interval, len(kept), f"{_ALPHA}; {metric}", warnings)


def _alphas(draws: NDArray[Any], counts: FloatArray, values: FloatArray, metric: Metric) -> FloatArray:
    """Return alpha for each row of draws, shape (resamples, units): how often each unit is in that resample.

    counts has shape (units, categories), with at least two labels in each unit; values has shape (categories,).
    """
    each = counts.sum(axis=1)
    if metric == "interval":  # squares of distances are sums of squares, so no two labels need be compared
        values = values - values.mean()
        means = counts @ values / each
        within = np.sum(counts * (values - means[:, None]) ** 2, axis=1)
        count, sums, squares = (draws @ of for of in (each, counts @ values, counts @ values**2))
        return _ratios(2 * (draws @ (each * within / (each - 1))), 2 * (count * squares - sums**2), count)
    totals = draws @ counts
    count = totals.sum(axis=1)
    if metric == "ordinal":  # labels are as far apart as their mid-ranks in the resample
        ranks = np.cumsum(totals, axis=1) - totals / 2
        ranks = ranks - count[:, None] / 2  # their mean, so that the squares below do not cancel
        squares = ranks**2 @ counts.T * each - (ranks @ counts.T) ** 2
        observed = np.sum(draws * 2 * squares / (each - 1), axis=1)
        expected = 2 * count * np.sum(totals * ranks**2, axis=1)
    else:
        distance = _distances(values, metric)
        observed = draws @ (np.sum(counts @ distance * counts, axis=1) / (each - 1))
        expected = np.sum(totals @ distance * totals, axis=1)
    return _ratios(observed, expected, count)


def _ratios(observed: FloatArray, expected: FloatArray, count: FloatArray) -> FloatArray:
    """Return 1 - observed over expected disagreement; a resample of one label only has nothing to disagree on."""
    alphas: FloatArray = 1 - np.divide((count - 1) * observed, expected, out=np.zeros(len(count)), where=expected > 0)
    return alphas


def _distances(values: FloatArray, metric: Metric) -> FloatArray:
    if metric == "nominal":
        return 1.0 - np.eye(len(values))
    sums = values[:, None] + values[None, :]
    return np.square(np.divide(values[:, None] - values[None, :], sums, out=np.zeros_like(sums), where=sums != 0))


def intraclass_correlations(ratings: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> dict[IccForm, Result]:
    """Return all six intraclass correlations of scores of shape (subjects, raters), at least 2 of each.

    ICC1: every subject has its own raters. ICC2: the same raters, drawn from many; their level counts. ICC3: just these
    raters; only their consistency counts. k: of the raters' mean. The test's null hypothesis is a correlation of 0.
    """
    scores = matrix(ratings, name="ratings", nan=nan)
    if is_constant(scores.ravel()):
        raise InvalidSample("all ratings are equal: an intraclass correlation divides by their variation")
    n, k = scores.shape
    scores = scores - scores.mean()
    scale = float(np.max(np.abs(scores)))
    scores = scores / scale
    rows, columns = scores.mean(axis=1, keepdims=True), scores.mean(axis=0, keepdims=True)
    between = float(k * np.sum(rows**2) / (n - 1))
    raters = float(n * np.sum(columns**2) / (k - 1))
    error = float(np.sum((scores - rows - columns) ** 2) / ((n - 1) * (k - 1)))
    within = float(np.sum((scores - rows) ** 2) / (n * (k - 1)))
    error, within, raters = (0.0 if square < 1e-28 else square for square in (error, within, raters))
    one = ((n - 1), n * (k - 1), _ratio(between, within))
    two = ((n - 1), (n - 1) * (k - 1), _ratio(between, error))
    values: dict[IccForm, float] = {
        "ICC1": (between - within) / (between + (k - 1) * within),
        "ICC2": (between - error) / (between + (k - 1) * error + k * (raters - error) / n),
        "ICC3": (between - error) / (between + (k - 1) * error),
        "ICC1k": 1 - _ratio(within, between),
        "ICC2k": (between - error) / (between + (raters - error) / n),
        "ICC3k": 1 - _ratio(error, between),
    }
    tail = (1 - _checked(level)) / 2
    single = _agreement_interval(values["ICC2"], (between, raters, error), (n, k), tail)
    ends: dict[IccForm, tuple[float, float]] = {
        "ICC1": _consistency_interval(one, k, tail, averaged=False),
        "ICC2": single,
        "ICC3": _consistency_interval(two, k, tail, averaged=False),
        "ICC1k": _consistency_interval(one, k, tail, averaged=True),
        "ICC2k": (_stepped_up(single[0], k), _stepped_up(single[1], k)),
        "ICC3k": _consistency_interval(two, k, tail, averaged=True),
    }
    results: dict[IccForm, Result] = {}
    for form, title in _ICC_FORMS.items():
        df1, df2, ratio = one if form in ("ICC1", "ICC1k") else two
        low, high = (min(end, 1.0) for end in ends[form])
        warnings = ("the raters do not differ at all beyond their levels: F is infinite",) if math.isinf(ratio) else ()
        results[form] = Result(
            test=title,
            statistic=ratio,
            statistic_name="F",
            p_value=float(stats.f.sf(ratio, df1, df2)),
            n=(n, k),
            df=(df1, df2),
            estimate=values[form],
            estimate_name="ICC",
            interval=Interval(low, high, level, _ICC),
            alternative="greater",
            alpha=1 - level,
            warnings=warnings,
            method=_ICC,
        )
    return results


def intraclass_correlation(
    ratings: object, *, form: IccForm = "ICC2", level: float = 0.95, nan: NanPolicy = "raise"
) -> Result:
    """Return one intraclass correlation, by default the absolute agreement of single raters."""
    if form not in _ICC_FORMS:
        raise InvalidSample(f"form is {form!r}: it is one of {', '.join(_ICC_FORMS)}")
    return intraclass_correlations(ratings, level=level, nan=nan)[form]


def _consistency_interval(test: tuple[int, int, float], k: int, tail: float, *, averaged: bool) -> tuple[float, float]:
    df1, df2, ratio = test
    if math.isinf(ratio):
        return 1.0, 1.0
    low = ratio / float(stats.f.isf(tail, df1, df2))
    high = ratio * float(stats.f.isf(tail, df2, df1))
    if averaged:
        return 1 - _ratio(1, low), 1 - _ratio(1, high)
    return (low - 1) / (low + k - 1), (high - 1) / (high + k - 1)


def _agreement_interval(
    value: float, squares: tuple[float, float, float], shape: tuple[int, int], tail: float
) -> tuple[float, float]:
    """McGraw & Wong (1996), table 7, case 2A, written without dividing by the error mean square, which may be 0."""
    (between, raters, error), (n, k) = squares, shape
    if raters == 0 and error == 0:
        return 1.0, 1.0
    own = n * (1 + (k - 1) * value) - k * value
    upper = (k - 1) * (n - 1) * (k * value * raters + own * error) ** 2
    df = upper / ((n - 1) * (k * value * raters) ** 2 + (own * error) ** 2)
    if not df > 0:
        return -1 / (k - 1), 1.0
    rest = k * raters + (k * n - k - n) * error
    low, high = float(stats.f.isf(tail, n - 1, df)), float(stats.f.isf(tail, df, n - 1))
    return (
        n * (between - low * error) / (low * rest + n * between),
        n * (high * between - error) / (rest + n * high * between),
    )


def _stepped_up(value: float, k: int) -> float:
    """The reliability of the mean of k raters from that of one: Spearman-Brown."""
    return k * value / (1 + (k - 1) * value)


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else math.inf


@dataclass(frozen=True, slots=True)
class BlandAltman:
    """How far two measurements of the same thing differ: their bias and the limits that hold 95% of differences.

    Differences are first minus second. Each of bias, lower and upper has its own interval. proportional asks whether
    the difference grows with the size of what is measured, in which case limits in these units mislead.
    """

    bias: Estimate
    lower: Estimate
    upper: Estimate
    sd: float
    proportional: Assumption


def bland_altman(
    first: object, second: object, *, coverage: float = 0.95, level: float = 0.95, nan: NanPolicy = "raise"
) -> BlandAltman:
    """Return the bias and the limits of agreement of paired scores, both of shape (n,), n >= 3.

    coverage is the share of differences within the limits, if they are normal: bias -/+ z sd. The limits' intervals are
    exact for normal differences (noncentral t). Raises InvalidSample where the differences do not vary.
    """
    one, two = pairs(first, second, nan=nan, minimum=3)
    differences = differences_of(one, two)
    if is_constant(differences):
        raise InvalidSample(f"every pair differs by {differences[0]:g}: limits of agreement need some variation")
    _checked(coverage)
    n, bias, sd = len(one), float(differences.mean()), float(differences.std(ddof=1))
    tail, z = (1 - _checked(level)) / 2, float(stats.norm.isf((1 - coverage) / 2))
    reach = float(stats.t.isf(tail, n - 1)) * sd / math.sqrt(n)
    near, far = (float(stats.nct.ppf(p, n - 1, z * math.sqrt(n))) / math.sqrt(n) * sd for p in (tail, 1 - tail))
    error = sd * math.sqrt(1 / n + z * z / (2 * (n - 1)))
    exact = Interval(bias - reach, bias + reach, level, "t")
    above = Interval(bias + near, bias + far, level, "noncentral t")
    below = Interval(bias - far, bias - near, level, "noncentral t")
    sizes = (one + two) / 2
    if is_constant(sizes):
        grows = Assumption(
            "no proportional bias", "slope of difference on mean", math.nan, math.nan, None, "equal means"
        )
    else:
        line = stats.linregress(sizes, differences)
        p_value = float(line.pvalue)
        grows = Assumption(
            "no proportional bias", "slope of difference on mean", float(line.slope), p_value, p_value >= 0.05
        )
    share = f"{coverage * 100:g}% limit of agreement"
    return BlandAltman(
        bias=Estimate("bias", bias, sd / math.sqrt(n), exact, n, _LIMITS),
        lower=Estimate(f"lower {share}", bias - z * sd, error, below, n, _LIMITS),
        upper=Estimate(f"upper {share}", bias + z * sd, error, above, n, _LIMITS),
        sd=sd,
        proportional=grows,
    )


def _ordered(labels: Sequence[Any], categories: Sequence[Any] | None, *, ordered: bool) -> list[Any]:
    plain = [_plain(label) for label in labels]
    for label in plain:
        if _is_missing(label):
            raise InvalidSample("a label is missing: leave the item out, or use krippendorff_alpha, which allows gaps")
    used = list(dict.fromkeys(plain))
    if categories is not None:
        order = [_plain(label) for label in categories]
        unknown = [label for label in used if label not in order]
        if unknown:
            raise InvalidSample(f"label {unknown[0]!r} is not among the categories {order}")
        return order
    if all(isinstance(label, numbers.Real) for label in used):
        return sorted(used)
    if ordered:
        raise InvalidSample(f"labels such as {used[0]!r} have no order: pass categories=[...] from lowest to highest")
    return used


def _as_numbers(order: Sequence[Any], metric: Metric) -> FloatArray:
    if not all(isinstance(label, numbers.Real) for label in order):
        raise InvalidSample(f"the {metric} metric needs numbers, not labels such as {order[0]!r}")
    values = sample(order, name="ratings")
    if metric == "ratio" and values.min() < 0:
        raise InvalidSample(f"the ratio metric needs values from 0, not {values.min():g}")
    return values


def _plain(label: Any) -> Any:
    return label.item() if isinstance(label, np.generic) else label


def _is_missing(label: Any) -> bool:
    return label is None or label is np.ma.masked or (isinstance(label, (float, np.floating)) and bool(label != label))


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise InvalidSample(f"a level of {level!r} is not between 0 and 1, such as 0.95")
    return level
