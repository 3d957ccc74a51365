"""Effect sizes with intervals: how large a difference is, apart from how sure one is of it.

Differences are first minus second. Intervals of standardised mean differences and of explained variance are exact
under the test's own assumptions (noncentral t, F and chi-squared distributions, inverted as in Steiger & Fouladi 1997,
"Noncentrality interval estimation"); the others cite their approximation. Words for magnitudes are conventions, not
findings: each carries its source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import integrate, optimize, special, stats

from pgharness.stats.results import Alternative, Effect, Interval
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    counts,
    differences_are_constant,
    differences_of,
    is_constant,
    named_samples,
    pairs,
    sample,
)

COHEN = "Cohen (1988), Statistical Power Analysis, 2nd ed."
_WORDS = ("negligible", "small", "medium", "large")
_BANDS: dict[str, tuple[tuple[float, float, float], str]] = {
    "d": ((0.2, 0.5, 0.8), COHEN),
    "h": ((0.2, 0.5, 0.8), COHEN),
    "r": ((0.1, 0.3, 0.5), COHEN),
    "w": ((0.1, 0.3, 0.5), COHEN),
    "eta2": ((0.01, 0.06, 0.14), COHEN),
    "delta": ((0.147, 0.33, 0.474), "Romano et al. (2006), Annual meeting of the Florida Association of IR"),
    "odds ratio": ((1.68, 3.47, 6.71), "Chen, Cohen & Chen (2010), Communications in Statistics 39"),
}


def magnitude(kind: str, value: float) -> tuple[str | None, str]:
    """Return the conventional word for an effect of a kind (d, h, r, w, eta2, delta, odds ratio), and its source."""
    if kind not in _BANDS:
        raise InvalidSample(f"no convention for effects of kind {kind!r}; there is one for {', '.join(_BANDS)}")
    bands, source = _BANDS[kind]
    if math.isnan(value):
        return None, source
    size = abs(value)
    if kind == "odds ratio":
        size = max(value, 1 / value) if value > 0 else math.inf
    return _WORDS[sum(size >= edge for edge in bands)], source


# -- standardised mean differences


def cohen_d(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return Cohen's d: the difference of means in units of the pooled standard deviation.

    Two samples of at least 2 values, not both constant. The interval is exact for normal groups of equal variance.
    """
    one, two = sample(first, name="first", nan=nan, minimum=2), sample(second, name="second", nan=nan, minimum=2)
    value, df = _pooled_d(one, two)
    scale = math.sqrt(1 / len(one) + 1 / len(two))
    low, high = noncentral_t_interval(value / scale, df, level)
    return _difference("Cohen d", value, Interval(low * scale, high * scale, level, "noncentral t"))


def hedges_g(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return Hedges' g: Cohen's d times the exact correction of its bias in small samples (Hedges 1981)."""
    biased = cohen_d(first, second, level=level, nan=nan)
    df = len(sample(first, nan=nan)) + len(sample(second, nan=nan)) - 2
    return _corrected("Hedges g", biased, df)


def glass_delta(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return Glass's delta: the difference of means in units of the second (control) group's standard deviation.

    The interval is exact for normal groups of equal variance (noncentral t with n2 - 1 degrees of freedom).
    """
    one, two = sample(first, name="first", nan=nan), sample(second, name="second", nan=nan, minimum=2)
    if is_constant(two):
        raise InvalidSample("second (the control group) is constant: Glass's delta divides by its standard deviation")
    value = float((one.mean() - two.mean()) / two.std(ddof=1))
    scale = math.sqrt(1 / len(one) + 1 / len(two))
    low, high = noncentral_t_interval(value / scale, len(two) - 1, level)
    return _difference("Glass delta", value, Interval(low * scale, high * scale, level, "noncentral t"))


def cohen_dz(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return d_z of pairs: the mean difference in units of the differences' standard deviation.

    At least 2 pairs whose differences are not constant. The interval is exact for normal differences.
    """
    one, two = pairs(first, second, nan=nan, minimum=2)
    differences = one - two
    if differences_are_constant(one, two):
        raise InvalidSample("every pair differs by the same amount: d_z divides by the differences' standard deviation")
    value = float(differences.mean() / differences.std(ddof=1))
    scale = math.sqrt(1 / len(differences))
    low, high = noncentral_t_interval(value / scale, len(differences) - 1, level)
    return _difference("Cohen d_z", value, Interval(low * scale, high * scale, level, "noncentral t"))


def small_sample_correction(df: float) -> float:
    """Return J(df), by which d is multiplied to be unbiased: gamma(df/2) / (sqrt(df/2) gamma((df-1)/2)), df >= 2."""
    if df < 2:
        return math.nan
    return math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2)


def _pooled_d(one: FloatArray, two: FloatArray) -> tuple[float, int]:
    if is_constant(one) and is_constant(two):
        raise InvalidSample("both groups are constant: a standardised difference divides by their standard deviation")
    df = len(one) + len(two) - 2
    pooled = ((len(one) - 1) * one.var(ddof=1) + (len(two) - 1) * two.var(ddof=1)) / df
    return float((one.mean() - two.mean()) / math.sqrt(pooled)), df


def _difference(name: str, value: float, interval: Interval) -> Effect:
    word, source = magnitude("d", value)
    return Effect(name, value, interval, word, source)


def _corrected(name: str, biased: Effect, df: float) -> Effect:
    factor = small_sample_correction(df)
    assert biased.interval is not None
    low, high = biased.interval.low * factor, biased.interval.high * factor
    return _difference(name, biased.value * factor, Interval(low, high, biased.interval.level, "noncentral t"))


# -- explained variance


def eta2(groups: Mapping[Any, object] | Sequence[object], *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return eta squared of independent groups: the share of the variance that lies between them."""
    between, within, df1, df2 = _sums_of_squares(groups, nan)
    return _explained("eta2", between / (between + within), between, within, df1, df2, level)


def omega2(groups: Mapping[Any, object] | Sequence[object], *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return omega squared of independent groups: eta squared less its bias (Hays 1963); it can be below 0."""
    between, within, df1, df2 = _sums_of_squares(groups, nan)
    value = (between - df1 * within / df2) / (between + within + within / df2)
    return _explained("omega2", value, between, within, df1, df2, level)


def epsilon2(
    groups: Mapping[Any, object] | Sequence[object], *, level: float = 0.95, nan: NanPolicy = "raise"
) -> Effect:
    """Return epsilon squared of independent groups: eta squared less its bias (Kelley 1935); it can be below 0."""
    between, within, df1, df2 = _sums_of_squares(groups, nan)
    value = (between - df1 * within / df2) / (between + within)
    return _explained("epsilon2", value, between, within, df1, df2, level)


def partial_eta2(f: float, df1: float, df2: float, *, level: float = 0.95) -> Effect:
    """Return partial eta squared from an F statistic (>= 0) and its degrees of freedom."""
    if not (f >= 0 and df1 > 0 and df2 > 0):
        raise InvalidSample(f"F = {f} with df = ({df1}, {df2}): F is at least 0 and both df are above 0")
    word, source = magnitude("eta2", value := f * df1 / (f * df1 + df2))
    return Effect("partial eta2", value, explained_interval(f, df1, df2, level), word, source)


def explained_interval(f: float, df1: float, df2: float, level: float = 0.95) -> Interval:
    """Return the interval of the explained variance share, lambda / (lambda + df1 + df2 + 1) (Steiger 2004)."""
    low, high = noncentral_f_interval(f, df1, df2, level)
    total = df1 + df2 + 1
    return Interval(low / (low + total), high / (high + total), level, "noncentral F, Steiger (2004)")


def rank_epsilon2(h: float, n: int) -> Effect:
    """Return the share of the ranks' variance that lies between groups: Kruskal-Wallis H / (n - 1)."""
    word, source = magnitude("eta2", value := h / (n - 1))
    return Effect("epsilon2", value, None, word, source)


def _sums_of_squares(groups: Mapping[Any, object] | Sequence[object], nan: NanPolicy) -> tuple[float, float, int, int]:
    samples = list(named_samples(groups, nan=nan).values())
    total = np.concatenate(samples)
    df1, df2 = len(samples) - 1, len(total) - len(samples)
    if df2 < 1:
        raise InvalidSample("each group has one value: the variance within groups needs a group with two")
    if is_constant(total):
        raise InvalidSample("all values are equal: there is no variance to explain")
    centre = total.mean()
    between = float(sum(len(one) * (one.mean() - centre) ** 2 for one in samples))
    within = float(sum(((one - one.mean()) ** 2).sum() for one in samples))
    return between, within, df1, df2


def _explained(name: str, value: float, between: float, within: float, df1: int, df2: int, level: float) -> Effect:
    word, source = magnitude("eta2", max(value, 0.0))
    if within == 0:
        interval = Interval(1.0, 1.0, level, "no variance within groups")
    else:
        interval = explained_interval(between / df1 / (within / df2), df1, df2, level)
    return Effect(name, value, interval, word, source)


# -- orders


def cliff_delta(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return Cliff's delta: P(first > second) - P(first < second), also the rank-biserial correlation.

    Two samples of at least 2 values; the interval is Feng & Cliff's (2004) asymmetric one with the unbiased variance.
    """
    one, two = sample(first, name="first", nan=nan, minimum=2), sample(second, name="second", nan=nan, minimum=2)
    delta, interval = _dominance(one, two, level)
    word, source = magnitude("delta", delta)
    return Effect("Cliff delta", delta, interval, word, source)


def common_language_effect(first: object, second: object, *, level: float = 0.95, nan: NanPolicy = "raise") -> Effect:
    """Return P(first > second) + P(equal) / 2, the probability of superiority, from Cliff's delta and its interval."""
    delta = cliff_delta(first, second, level=level, nan=nan)
    assert delta.interval is not None
    interval = Interval((delta.interval.low + 1) / 2, (delta.interval.high + 1) / 2, level, delta.interval.method)
    return Effect("common-language effect", (delta.value + 1) / 2, interval, delta.magnitude, delta.source)


def matched_rank_biserial(first: object, second: object, *, nan: NanPolicy = "raise") -> Effect:
    """Return the matched-pairs rank-biserial correlation: the signed ranks' balance, -1..1 (Kerby 2014)."""
    one, two = pairs(first, second, nan=nan)
    differences = differences_of(one, two)
    differences = differences[differences != 0]
    if len(differences) == 0:
        raise InvalidSample("all pairs are equal: there are no signed ranks")
    ranks = stats.rankdata(np.abs(differences))
    return rank_balance(float(ranks[differences > 0].sum()), float(ranks.sum()))


def rank_balance(positive: float, total: float) -> Effect:
    """Return the matched-pairs rank-biserial correlation from the sum of the positive ranks and that of all."""
    word, source = magnitude("r", value := 2 * positive / total - 1)
    return Effect("rank-biserial r", value, None, word, source)


def r_from_t(t: float, df: float, *, level: float = 0.95) -> Effect:
    """Return the point-biserial r of a t statistic, t / sqrt(t^2 + df), with the interval of its noncentral t."""
    if df <= 0:
        raise InvalidSample(f"df is {df}: it must be above 0")
    low, high = noncentral_t_interval(t, df, level)
    ends = [end / math.sqrt(end**2 + df + 2) for end in (low, high)]
    word, source = magnitude("r", value := t / math.sqrt(t**2 + df))
    return Effect("r", value, Interval(ends[0], ends[1], level, "noncentral t"), word, source)


def _dominance(one: FloatArray, two: FloatArray, level: float) -> tuple[float, Interval]:
    """Return Cliff's delta and its interval; counting with sorted arrays, so large samples need no n1 x n2 matrix."""
    n1, n2 = len(one), len(two)
    low, high = np.sort(one), np.sort(two)
    rows = (np.searchsorted(high, one, "left") + np.searchsorted(high, one, "right") - n2) / n2
    columns = -(np.searchsorted(low, two, "left") + np.searchsorted(low, two, "right") - n1) / n1
    delta = float(rows.mean())
    ties = float((np.searchsorted(high, one, "right") - np.searchsorted(high, one, "left")).sum())
    s_rows = float(((rows - delta) ** 2).sum() / (n1 - 1))
    s_columns = float(((columns - delta) ** 2).sum() / (n2 - 1))
    s_cells = (n1 * n2 - ties - n1 * n2 * delta**2) / ((n1 - 1) * (n2 - 1))
    variance = max(
        (n2**2 * s_rows * (n1 - 1) + n1**2 * s_columns * (n2 - 1)) / (n1 * n2 * (n1 - 1) * (n2 - 1))
        - s_cells / (n1 * n2),
        (1 - delta**2) / (n1 * n2 - 1),
    )
    z = float(stats.t.ppf((1 + level) / 2, n1 + n2 - 2))
    if abs(delta) == 1:  # no variance is left to see: the bound depends on the smaller sample alone
        bound = (min(n1, n2) - z**2) / (min(n1, n2) + z**2)
        ends = (bound, 1.0) if delta > 0 else (-1.0, -bound)
    else:
        root = z * math.sqrt(variance) * math.sqrt((1 - delta**2) ** 2 + z**2 * variance)
        middle, below = delta - delta**3, 1 - delta**2 + z**2 * variance
        ends = (max((middle - root) / below, -1.0), min((middle + root) / below, 1.0))
    return delta, Interval(*ends, level, "Feng & Cliff (2004)")


# -- tables of counts: one row for each group, the outcome that is counted in the first column


def odds_ratio(table: object, *, level: float = 0.95) -> Effect:
    """Return the odds ratio of a 2 x 2 table with Woolf's (1955) interval; a 0 adds 1/2 to all cells (Haldane 1956)."""
    cells = counts(table, shape=(2, 2)).astype(np.float64)
    method = "Woolf logit"
    if (cells == 0).any():
        cells, method = cells + 0.5, "Woolf logit, 1/2 added to every cell (Haldane-Anscombe)"
    value = float(cells[0, 0] * cells[1, 1] / (cells[0, 1] * cells[1, 0]))
    half = _z(level) * math.sqrt(float((1 / cells).sum()))
    word, source = magnitude("odds ratio", value)
    interval = Interval(value * math.exp(-half), value * math.exp(half), level, method)
    return Effect("odds ratio", value, interval, word, source)


def risk_ratio(table: object, *, level: float = 0.95) -> Effect:
    """Return the ratio of two proportions with the log interval of Katz et al. (1978).

    Without successes in a group, 1/2 is added to the successes and 1 to the size of both (Walter 1975).
    """
    cells = counts(table, shape=(2, 2)).astype(np.float64)
    successes, sizes = cells[:, 0], cells.sum(axis=1)
    _no_empty_group(sizes)
    method = "Katz log"
    if (successes == 0).any():
        successes, sizes, method = successes + 0.5, sizes + 1, "Katz log, 1/2 success added to each group"
    value = float(successes[0] / sizes[0] / (successes[1] / sizes[1]))
    half = _z(level) * math.sqrt(float((1 / successes - 1 / sizes).sum()))
    return Effect("risk ratio", value, Interval(value * math.exp(-half), value * math.exp(half), level, method))


def risk_difference(table: object, *, level: float = 0.95) -> Effect:
    """Return the difference of two proportions with Newcombe's (1998) hybrid score interval."""
    cells = counts(table, shape=(2, 2)).astype(np.float64)
    sizes = cells.sum(axis=1)
    _no_empty_group(sizes)
    (p1, p2), z = cells[:, 0] / sizes, _z(level)
    (low1, high1), (low2, high2) = (wilson(p, n, z) for p, n in zip((p1, p2), sizes, strict=True))
    low = float(p1 - p2 - math.hypot(p1 - low1, high2 - p2))
    high = float(p1 - p2 + math.hypot(high1 - p1, p2 - low2))
    return Effect("risk difference", float(p1 - p2), Interval(low, high, level, "Newcombe hybrid score"))


def cohen_h(table: object, *, level: float = 0.95) -> Effect:
    """Return Cohen's h of two proportions, the difference of their arcsines, with its normal interval."""
    cells = counts(table, shape=(2, 2)).astype(np.float64)
    sizes = cells.sum(axis=1)
    _no_empty_group(sizes)
    first, second = 2 * np.arcsin(np.sqrt(cells[:, 0] / sizes))
    half = _z(level) * math.sqrt(float((1 / sizes).sum()))
    word, source = magnitude("h", value := float(first - second))
    return Effect(
        "Cohen h", value, Interval(value - half, value + half, level, "normal, variance-stabilised"), word, source
    )


def cohen_w(table: object, *, level: float = 0.95) -> Effect:
    """Return Cohen's w of a table, sqrt(chi2 / N), with the interval of the noncentral chi-squared; phi if 2 x 2."""
    chi2, df, total, _ = _chi2(table)
    low, high = (math.sqrt(end / total) for end in noncentral_chi2_interval(chi2, df, level))
    word, source = magnitude("w", value := math.sqrt(chi2 / total))
    return Effect("Cohen w", value, Interval(low, high, level, "noncentral chi-squared"), word, source)


def cramer_v(table: object, *, level: float = 0.95) -> Effect:
    """Return Cramer's V of a table, w / sqrt(min(rows, columns) - 1), with a noncentral chi-squared interval."""
    chi2, df, total, smaller = _chi2(table)
    scale = math.sqrt(total * (smaller - 1))
    low, high = (min(math.sqrt(end) / scale, 1.0) for end in noncentral_chi2_interval(chi2, df, level))
    word, source = magnitude("w", math.sqrt(chi2 / total))
    value = min(math.sqrt(chi2) / scale, 1.0)
    return Effect("Cramer V", value, Interval(low, high, level, "noncentral chi-squared"), word, source)


def wilson(proportion: float, n: float, z: float) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a proportion of n for a normal quantile z."""
    centre, below = proportion + z**2 / (2 * n), 1 + z**2 / n
    half = z * math.sqrt(proportion * (1 - proportion) / n + z**2 / (4 * n**2))
    low = 0.0 if proportion == 0 else (centre - half) / below
    high = 1.0 if proportion == 1 else (centre + half) / below
    return float(low), float(high)


def clopper_pearson(
    successes: int, n: int, level: float, alternative: Alternative = "two-sided"
) -> tuple[float, float]:
    """Return Clopper & Pearson's (1934) exact interval of a proportion; one-sided it is open to 0 or 1."""
    tail = (1 - level) / 2 if alternative == "two-sided" else 1 - level
    low = high = None
    if successes == 0 or alternative == "less":
        low = 0.0
    if successes == n or alternative == "greater":
        high = 1.0
    if low is None:
        low = float(special.betaincinv(successes, n - successes + 1, tail))
    if high is None:
        high = float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return low, high


def _chi2(table: object) -> tuple[float, int, int, int]:
    cells = counts(table)
    cells = cells[:, cells.any(axis=0)][cells.any(axis=1)]
    if min(cells.shape) < 2:
        raise InvalidSample("the table has one row or column that is not all 0: there is no association to measure")
    found = stats.chi2_contingency(cells, correction=False)
    return float(found.statistic), int(found.dof), int(cells.sum()), min(cells.shape)


def _z(level: float) -> float:
    _check_level(level)
    return -float(special.ndtri((1 - level) / 2))


def _no_empty_group(sizes: FloatArray) -> None:
    if (sizes == 0).any():
        raise InvalidSample(f"row {int(np.argmin(sizes)) + 1} of the table is all 0: both groups need values")


# -- noncentral distributions


def noncentral_t_interval(t: float, df: float, level: float = 0.95) -> tuple[float, float]:
    """Return the noncentralities for which t is at the upper and lower tail of the noncentral t distribution."""
    _check_level(level)
    tail = (1 - level) / 2

    def cdf(noncentrality: float) -> float:
        return noncentral_t_cdf(t, df, noncentrality)

    return _solve(cdf, 1 - tail, t), _solve(cdf, tail, t)


def noncentral_t_cdf(t: float, df: float, noncentrality: float) -> float:
    """Return P(T <= t); where scipy's series does not converge, the integral over the chi distribution that it sums."""
    if min(abs(t), abs(noncentrality)) > 1e6 and t * noncentrality > 0:  # only the variance estimate varies
        beyond = float(special.chdtrc(df, df * (noncentrality / t) ** 2))
        return beyond if t > 0 else 1 - beyond
    value = float(special.nctdtr(df, noncentrality, t))
    if not math.isnan(value):
        return value
    constant = math.log(2) + df / 2 * math.log(df / 2) - float(special.gammaln(df / 2))

    def density(scale: float) -> float:
        log_chi = constant + (df - 1) * math.log(scale) - df * scale**2 / 2
        return float(special.ndtr(t * scale - noncentrality)) * math.exp(log_chi)

    end = 1 + 40 / math.sqrt(2 * df)
    around = [(noncentrality + shift) / t for shift in (-8, -2, 0, 2, 8)] if t else []
    kinks = sorted({min(max(one, 1e-12), end) for one in [*around, 1.0]})
    return float(integrate.quad(density, 1e-300, end, points=kinks, epsabs=1e-13, epsrel=1e-11, limit=500)[0])


def noncentral_f_cdf(f: float, df1: float, df2: float, noncentrality: float) -> float:
    """Return P(F <= f); where scipy's series fails or does not end, that of Patnaik (1949), Biometrika 36."""
    value = float(special.ncfdtr(df1, df2, noncentrality, f)) if noncentrality < 1e8 else math.nan
    if not math.isnan(value):
        return value
    scaled = (df1 + noncentrality) ** 2 / (df1 + 2 * noncentrality)
    return float(special.fdtr(scaled, df2, f / (1 + noncentrality / df1)))


def noncentral_f_interval(f: float, df1: float, df2: float, level: float = 0.95) -> tuple[float, float]:
    """Return the noncentralities for which F is at the tails of the noncentral F distribution; at least 0."""
    _check_level(level)
    tail = (1 - level) / 2

    def cdf(noncentrality: float) -> float:
        return noncentral_f_cdf(f, df1, df2, noncentrality)

    return _solve_from_zero(cdf, 1 - tail, f * df1), _solve_from_zero(cdf, tail, f * df1)


def noncentral_chi2_interval(chi2: float, df: float, level: float = 0.95) -> tuple[float, float]:
    """Return the noncentralities for which chi2 is at the tails of the noncentral distribution; at least 0."""
    _check_level(level)
    tail = (1 - level) / 2

    def cdf(noncentrality: float) -> float:
        return float(special.chndtr(chi2, df, noncentrality))

    return _solve_from_zero(cdf, 1 - tail, chi2), _solve_from_zero(cdf, tail, chi2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level}: a confidence level is between 0 and 1, such as 0.95")


def _solve(cdf: Callable[[float], float], target: float, start: float) -> float:
    """Return where a falling function is target: brackets around start, widened until they hold it."""
    width = 2 + abs(start) / 4
    low, high = start - width, start + width
    while cdf(low) < target:
        low -= (width := width * 2)
    while cdf(high) > target:
        high += (width := width * 2)
    return float(optimize.brentq(lambda value: cdf(value) - target, low, high, xtol=1e-13, rtol=1e-13))


def _solve_from_zero(cdf: Callable[[float], float], target: float, start: float) -> float:
    if cdf(0.0) <= target:
        return 0.0
    high = max(2 * start, 10.0)
    while cdf(high) > target:
        high *= 2
    return float(optimize.brentq(lambda value: cdf(value) - target, 0.0, high, xtol=1e-12, rtol=1e-13))
