"""Exact rank tests, and Hodges-Lehmann estimates: by how much one sample is shifted, with the interval of its test.

Exact p-values count all arrangements (or signs) of the ranks as they are, ties included: midranks doubled are whole
numbers, so a table of sums is enough (Streitberg & Roehmel 1986, Statistical Software Newsletter 12). The interval
inverts the test (Hollander, Wolfe & Chicken 2014, sections 3.2 and 4.2): exactly for small samples
without ties, else by the normal approximation of the rank sum. Ties make the interval slightly too wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from pgharness.stats.results import Alternative, Interval
from pgharness.stats.samples import FloatArray, IntArray

_EXACT_PRODUCT = 2500
_EXACT_PAIRS = 50
_MOST_CELLS = 100_000  # sums that are formed and sorted
_THIN = 256
_THIN_ERROR = 1.5 / _THIN  # of the share of sums at most a value


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
    kth = _differences(one, two).kth(((count + 1) // 2, count // 2 + 1), (cut,), (count + 1 - cut,))
    estimate = (kth[(count + 1) // 2] + kth[count // 2 + 1]) / 2
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
    kth = _walsh_averages(differences).kth(((count + 1) // 2, count // 2 + 1), (cut,), (count + 1 - cut,))
    estimate = (kth[(count + 1) // 2] + kth[count // 2 + 1]) / 2
    return estimate, _interval(kth, count, cut, level, alternative, method)


def median_interval(values: FloatArray, level: float, alternative: Alternative = "two-sided") -> Interval:
    """Return the distribution-free interval of a median from the order statistics that the sign test implies."""
    ordered = np.sort(values)
    n = len(ordered)
    cut = int(stats.binom.ppf(_tail(level, alternative), n, 0.5))
    if stats.binom.cdf(cut, n, 0.5) > _tail(level, alternative):
        cut -= 1
    kth = {k: float(ordered[k - 1]) for k in (cut + 1, n - cut) if 1 <= k <= n}
    return _interval(kth, n, cut + 1, level, alternative, "order statistics")


def _tail(level: float, alternative: Alternative) -> float:
    return (1 - level) / 2 if alternative == "two-sided" else 1 - level


def _interval(
    kth: Mapping[int, float], count: int, cut: int, level: float, alternative: Alternative, method: str
) -> Interval:
    """Return the cut-th smallest and largest values; samples too small for the level give an infinite interval."""
    low, high = (kth[cut], kth[count + 1 - cut]) if cut >= 1 else (-math.inf, math.inf)
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


@dataclass(frozen=True, slots=True)
class _Edge:
    """A value, how many sums are at most that, and in which column each row's sums end to be."""

    value: float
    count: int
    ends: IntArray


class _Sums:
    """All sums of a value of one sample and a value of another, counted and selected without forming them.

    Equal values count as one with a weight. A table of the sums has a row for each value of the first sample, and in it
    the columns from starts on, values of the second; diagonal has further sums of given counts.
    """

    def __init__(
        self,
        rows: tuple[FloatArray, IntArray],
        columns: tuple[FloatArray, IntArray],
        starts: IntArray,
        diagonal: tuple[FloatArray, IntArray],
    ) -> None:
        (self.rows, self.row_counts), (self.columns, self.column_counts) = rows, columns
        self.starts, self.diagonal = starts, diagonal
        self.below = np.concatenate(([0], np.cumsum(self.column_counts)))  # values left of a column
        self.diagonal_below = np.concatenate(([0], np.cumsum(diagonal[1])))
        self.smallest, self.largest = float(self.rows[0] + self.columns[0]), float(self.rows[-1] + self.columns[-1])
        self.error = 4 * float(np.finfo(np.float64).eps) * max(abs(self.smallest), abs(self.largest))

    def kth(self, *groups: tuple[int, ...]) -> dict[int, float]:
        """Return the k-th smallest sums by k, from 1; groups are of neighbours. What there is not is left out."""
        low, high = _Edge(-math.inf, 0, self.starts), self._upto(math.nextafter(self.largest, math.inf))
        wanted = [[k for k in group if 1 <= k <= high.count] for group in groups]
        every = sorted(k for group in wanted for k in group)
        if every and _cells(low, high) > _MOST_CELLS:
            guesses = self._thinned()
            shares = every[0] / high.count - _THIN_ERROR, every[-1] / high.count + _THIN_ERROR
            for value in np.quantile(guesses, np.clip(shares, 0, 1)):
                low, high = self._narrowed(every, float(value), low, high)
        if _cells(low, high) <= _MOST_CELLS:
            wanted = [every]
        found: dict[int, float] = {}
        for group in filter(None, wanted):
            found |= self._select(group, low, high)
        return found

    def _select(self, group: list[int], low: _Edge, high: _Edge) -> dict[int, float]:
        """Return the k-th smallest of the sums between two edges, which are drawn together around them first."""
        while _cells(low, high) > _MOST_CELLS:
            start = max(low.value, self.smallest)
            width, inside = high.value - start, high.count - low.count
            if width <= self.error:
                return dict.fromkeys(group, high.value)  # one value, often
            for share in ((group[0] - low.count) / inside - 0.01, (group[-1] - low.count) / inside + 0.01):
                low, high = self._narrowed(group, start + share * width, low, high)
            if high.value - max(low.value, self.smallest) > width / 4:  # not as even as that took it for
                low, high = self._narrowed(group, (max(low.value, self.smallest) + high.value) / 2, low, high)
        values, counts = self._between(low, high)
        order = np.argsort(values)
        reached = low.count + np.cumsum(counts[order])
        return {k: float(values[order[np.searchsorted(reached, k)]]) for k in group}

    def _narrowed(self, group: list[int], value: float, low: _Edge, high: _Edge) -> tuple[_Edge, _Edge]:
        if not low.value < value < high.value:
            return low, high
        edge = self._upto(value)
        if edge.count >= group[-1]:
            return low, edge
        return (edge, high) if edge.count < group[0] else (low, high)

    def _upto(self, value: float) -> _Edge:
        ends = np.maximum(np.searchsorted(self.columns, value - self.rows, side="right"), self.starts)
        count = int(self.row_counts @ (self.below[ends] - self.below[self.starts]))
        own = self.diagonal_below[np.searchsorted(self.diagonal[0], value, side="right")]
        return _Edge(value, count + int(own), ends)

    def _between(self, low: _Edge, high: _Edge) -> tuple[FloatArray, IntArray]:
        lengths = high.ends - low.ends
        row = np.repeat(np.arange(len(lengths)), lengths)
        column = np.arange(len(row)) + np.repeat(low.ends - np.cumsum(lengths) + lengths, lengths)
        places = slice(*np.searchsorted(self.diagonal[0], (low.value, high.value), side="right"))
        values = np.concatenate((self.rows[row] + self.columns[column], self.diagonal[0][places]))
        return values, np.concatenate((self.row_counts[row] * self.column_counts[column], self.diagonal[1][places]))

    def _thinned(self) -> FloatArray:
        """Return sums of evenly spaced quantiles of both samples: nearly the distribution of all."""
        shares = (np.arange(_THIN) + 0.5) / _THIN
        rows, columns = (
            values[np.searchsorted(np.cumsum(counts), shares * counts.sum())]
            for values, counts in ((self.rows, self.row_counts), (self.columns, self.column_counts))
        )
        return np.sort(np.add.outer(rows, columns), axis=None)


def _cells(low: _Edge, high: _Edge) -> int:
    return int((high.ends - low.ends).sum())


def _differences(one: FloatArray, two: FloatArray) -> _Sums:
    rows, columns = np.unique(one, return_counts=True), np.unique(-two, return_counts=True)
    starts = np.zeros(len(rows[0]), dtype=np.intp)
    return _Sums(rows, columns, starts, (np.empty(0), np.empty(0, dtype=np.intp)))


def _walsh_averages(values: FloatArray) -> _Sums:
    """Return all means of two values and of one with itself: sums of halves, where a value meets only later ones."""
    different, counts = np.unique(values, return_counts=True)
    halves, starts = different / 2, np.arange(1, len(different) + 1)
    return _Sums((halves, counts), (halves, counts), starts, (different, counts * (counts + 1) // 2))
