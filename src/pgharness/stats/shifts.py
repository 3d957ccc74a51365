"""Exact rank tests, and Hodges-Lehmann estimates: by how much one sample is shifted, with the interval of its test.

Exact p-values count all arrangements (or signs) of the ranks as they are, ties included: midranks doubled are whole
numbers, so a table of sums is enough (Streitberg & Roehmel 1986, Statistical Software Newsletter 12). The interval
inverts the test (Hollander, Wolfe & Chicken 2014, sections 3.2 and 4.2): exactly for small samples
without ties, else by the normal approximation of the rank sum. Ties make the interval slightly too wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from pgharness.stats.results import Alternative, Interval
from pgharness.stats.samples import FloatArray

_EXACT_PRODUCT = 2500
_EXACT_PAIRS = 50
_MATRIX = 4_000_000


def exact_rank_sum_is_cheap(n1: int, n2: int) -> bool:
    """Say whether counting all arrangements of two groups takes a few hundredths of a second at most."""
    return min(n1, n2) * (n1 + n2) ** 3 <= 20_000_000


def rank_sum_p(ranks: FloatArray, n1: int, alternative: Alternative) -> float:
    """Return the exact p-value of the sum of the first n1 midranks among all arrangements of the ranks."""
    doubled = np.rint(2 * ranks).astype(int)
    total, seen = int(doubled.sum()), int(doubled[:n1].sum())
    size = min(n1, len(ranks) - n1)  # the sums of the smaller group say as much
    if size < n1:
        seen, alternative = total - seen, _mirrored(alternative)
    ways = np.zeros((size + 1, total + 1))
    ways[0, 0] = 1.0
    for number, rank in enumerate(doubled, start=1):
        most = min(size, number)
        ways[1 : most + 1, rank:] += ways[:most, : total + 1 - rank].copy()
    return _exact_p(ways[size], seen, alternative)


def signed_rank_p(ranks: FloatArray, statistic: float, alternative: Alternative) -> float:
    """Return the exact p-value of a sum of positive midranks among all signs of the ranks."""
    doubled = np.rint(2 * ranks).astype(int)
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] += ways[: len(ways) - rank].copy()
    return _exact_p(ways, round(2 * statistic), alternative)


def _mirrored(alternative: Alternative) -> Alternative:
    return {"less": "greater", "greater": "less"}.get(alternative, alternative)  # type: ignore[return-value]


def _exact_p(ways: FloatArray, seen: int, alternative: Alternative) -> float:
    total = float(ways.sum())
    below, above = float(ways[: seen + 1].sum()) / total, float(ways[seen:].sum()) / total
    if alternative == "two-sided":
        return min(1.0, 2 * min(below, above))
    return below if alternative == "less" else above


def shift_of_groups(
    one: FloatArray, two: FloatArray, level: float, alternative: Alternative = "two-sided"
) -> tuple[float, Interval]:
    """Return the median of all differences first - second and its interval: the shift of two independent groups."""
    n1, n2 = len(one), len(two)
    count = n1 * n2
    if count <= _EXACT_PRODUCT:
        cut = _rank_sum_quantile(n1, n2, _tail(level, alternative))
        method = "Hodges-Lehmann, exact"
    else:
        z = float(stats.norm.isf(_tail(level, alternative)))
        cut = math.floor(count / 2 - z * math.sqrt(count * (n1 + n2 + 1) / 12))
        method = "Hodges-Lehmann, normal approximation"
    if count <= _MATRIX:
        differences = np.sort(np.subtract.outer(one, two), axis=None)
        estimate = float(np.median(differences))

        def kth(k: int) -> float:
            return float(differences[k - 1])
    else:
        one, two = np.sort(one), np.sort(two)
        middle = [_kth_difference(one, two, k) for k in {(count + 1) // 2, count // 2 + 1}]
        estimate = sum(middle) / len(middle)

        def kth(k: int) -> float:
            return _kth_difference(one, two, k)

    return estimate, _interval(kth, count, cut, level, alternative, method)


def shift_of_pairs(
    differences: FloatArray, level: float, alternative: Alternative = "two-sided"
) -> tuple[float, Interval]:
    """Return the median of all means of two differences (Walsh averages) and its interval: the pseudomedian."""
    n = len(differences)
    count = n * (n + 1) // 2
    if n <= _EXACT_PAIRS:
        cut = _signed_rank_quantile(n, _tail(level, alternative))
        method = "Hodges-Lehmann, exact"
    else:
        z = float(stats.norm.isf(_tail(level, alternative)))
        cut = math.floor(count / 2 - z * math.sqrt(n * (n + 1) * (2 * n + 1) / 24))
        method = "Hodges-Lehmann, normal approximation"
    if count <= _MATRIX:
        rows, columns = np.triu_indices(n)
        averages = np.sort((differences[rows] + differences[columns]) / 2)
        estimate = float(np.median(averages))

        def kth(k: int) -> float:
            return float(averages[k - 1])
    else:
        ordered = np.sort(differences)
        middle = [_kth_walsh(ordered, k) for k in {(count + 1) // 2, count // 2 + 1}]
        estimate = sum(middle) / len(middle)

        def kth(k: int) -> float:
            return _kth_walsh(ordered, k)

    return estimate, _interval(kth, count, cut, level, alternative, method)


def median_interval(values: FloatArray, level: float, alternative: Alternative = "two-sided") -> Interval:
    """Return the distribution-free interval of a median from the order statistics that the sign test implies."""
    ordered = np.sort(values)
    n = len(ordered)
    cut = int(stats.binom.ppf(_tail(level, alternative), n, 0.5))
    if stats.binom.cdf(cut, n, 0.5) > _tail(level, alternative):
        cut -= 1
    return _interval(lambda k: float(ordered[k - 1]), n, cut + 1, level, alternative, "order statistics")


def _tail(level: float, alternative: Alternative) -> float:
    return (1 - level) / 2 if alternative == "two-sided" else 1 - level


def _interval(
    kth: Callable[[int], float], count: int, cut: int, level: float, alternative: Alternative, method: str
) -> Interval:
    """Return the cut-th smallest and largest values; samples too small for the level give an infinite interval."""
    low = kth(cut) if cut >= 1 else -math.inf
    high = kth(count + 1 - cut) if cut >= 1 else math.inf
    if alternative == "less":
        low = -math.inf
    if alternative == "greater":
        high = math.inf
    return Interval(low, high, level, method)


def _quantile(counts: FloatArray, tail: float) -> int:
    """Return the largest c with P(statistic <= c - 1) <= tail, for a distribution on 0, 1, ... given by counts."""
    below = np.cumsum(counts / counts.sum())
    return int(np.searchsorted(below, tail * (1 + 1e-12), side="right"))


def _rank_sum_quantile(n1: int, n2: int, tail: float) -> int:
    # the generating function of U is prod (1 - x^(n2 + i)) / (1 - x^i), i = 1..n1
    counts = np.zeros(n1 * n2 + 1)
    counts[0] = 1.0
    small, large = sorted((n1, n2))
    for i in range(1, small + 1):
        step = large + i
        if step < len(counts):
            counts[step:] = counts[step:] - counts[: len(counts) - step]
        for start in range(i):
            counts[start::i] = np.cumsum(counts[start::i])
    return _quantile(counts, tail)


def _signed_rank_quantile(n: int, tail: float) -> int:
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1.0
    for i in range(1, n + 1):
        shifted = np.zeros_like(counts)
        shifted[i:] = counts[:-i]
        counts = counts + shifted
    return _quantile(counts, tail)


def _kth_difference(one: FloatArray, two: FloatArray, k: int) -> float:
    """Return the k-th smallest of all differences of two sorted samples, without forming them."""

    def at_most(value: float) -> int:
        return int(np.searchsorted(two, one - value, side="left").astype(np.int64).sum())

    total = len(one) * len(two)
    return _bisect(lambda value: total - at_most(value), float(one[0] - two[-1]), float(one[-1] - two[0]), k)


def _kth_walsh(ordered: FloatArray, k: int) -> float:
    """Return the k-th smallest mean of two values (or of one with itself) of a sorted sample, without forming them."""
    places = np.arange(len(ordered))

    def at_most(value: float) -> int:
        ends = np.searchsorted(ordered, 2 * value - ordered, side="right")
        return int(np.maximum(ends - places, 0).sum())

    return _bisect(at_most, float(ordered[0]), float(ordered[-1]), k)


def _bisect(at_most: Callable[[float], int], low: float, high: float, k: int) -> float:
    """Return the smallest value with at least k at most it, to the last digits of its magnitude."""
    if at_most(low) >= k:
        return low
    tolerance = 4 * float(np.finfo(np.float64).eps) * max(abs(low), abs(high))
    while high - low > tolerance:
        middle = (low + high) / 2
        if at_most(middle) >= k:
            high = middle
        else:
            low = middle
    return high
