"""Tests and intervals that resample the data themselves: permutations, sign flips and bootstraps.

They assume no distribution. Every function that draws takes `rng`, a seed or a generator: the same seed, the same
numbers. Data sets whose permutations are fewer than n_resamples are enumerated, and the p-value is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from scipy import optimize, special, stats

from pgharness.stats.effects import cliff_delta, cohen_dz, hedges_g
from pgharness.stats.groups import check_options
from pgharness.stats.results import Alternative, Estimate, Interval, Result
from pgharness.stats.samples import (
    FloatArray,
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
    sample,
)

Statistic = Literal["mean", "median"] | Callable[[FloatArray], float]
BootstrapMethod = Literal["percentile", "basic", "BCa"]
_BATCH_CELLS = 4_000_000
_SEEN_TAIL = 0.005  # 9999 random signs see half of a hundredth with an error of a seventh of it
_METHODS = {
    "percentile": "percentile bootstrap, Efron & Tibshirani (1993)",
    "basic": "basic bootstrap, Davison & Hinkley (1997)",
    "BCa": "BCa bootstrap, Efron (1987), JASA 82",
}


def permutation_test(
    first: object,
    second: object,
    *,
    statistic: Literal["mean", "median"] = "mean",
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    n_resamples: int = 9999,
    rng: Rng = 0,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Test two independent groups for one distribution, by the difference of their means (or medians).

    Exact if there are at most n_resamples ways to divide the values into groups, else a random sample of them with the
    observed one counted among them (Phipson & Smyth 2010). Two-sided p is twice the smaller tail.
    """
    check_options(alternative, alpha)
    one, two = (
        sample(values, name=name, nan=nan, minimum=2) for name, values in zip(names, (first, second), strict=True)
    )
    _check_resamples(n_resamples)
    if statistic not in ("mean", "median"):
        raise InvalidSample(f'statistic is {statistic!r}: it is "mean" or "median"')
    centre = _vectorized(statistic)
    both = np.concatenate((one, two))
    details: dict[str, Any] = dict(test="Permutation test", statistic_name=f"{statistic} difference", alpha=alpha)
    details |= dict(n=(len(one), len(two)), alternative=alternative)
    details |= dict(groups=(describe(names[0], one), describe(names[1], two)))
    if is_constant(both):
        note = "all values are equal: nothing varies, so p = 1 by definition"
        return Result(statistic=0.0, p_value=1.0, warnings=(note,), method="Fisher (1935)", **details)

    def difference(x: FloatArray, y: FloatArray, axis: int = -1) -> Any:
        return centre(x, axis=axis) - centre(y, axis=axis)

    found = stats.permutation_test(
        (one, two),
        difference,
        permutation_type="independent",
        vectorized=True,
        n_resamples=n_resamples,
        alternative=alternative,
        rng=generator(rng),
        batch=_batch(len(both)),
    )
    is_exact = len(found.null_distribution) < n_resamples or _divisions(len(one), len(two)) <= n_resamples
    effect = None
    if min(len(one), len(two)) >= 2:
        both_constant = is_constant(one) and is_constant(two)
        effect = (cliff_delta if both_constant or statistic == "median" else hedges_g)(one, two, level=1 - alpha)
    observed = float(difference(one, two))
    return Result(
        statistic=observed,
        p_value=min(float(found.pvalue), 1.0),
        effect=effect,
        method=_permutation_method(is_exact, n_resamples),
        **details,
    )


def paired_permutation_test(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    clusters: Iterable[Any] | None = None,
    mid_p: bool = False,
    n_resamples: int = 9999,
    rng: Rng = 0,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Result:
    """Test pairs for differences symmetric about 0, by their mean under random signs (Fisher 1935).

    clusters has one label for each pair: the pairs of a cluster (replications of one case) change sign together.
    Exact if there are at most n_resamples signs, else a random sample of them with the observed one counted among them;
    tails below .005 are Robinson's (1982) saddlepoint approximation, which does not end at 1 / n_resamples.
    mid_p counts signs with the very sum that was seen half: nearer to the level where values are tied. The interval
    holds the shifts of all pairs that the same signs do not reject (Hartigan 1969).
    """
    check_options(alternative, alpha)
    one, two = pairs(first, second, names=names, nan="raise" if clusters is not None else nan)
    _check_resamples(n_resamples)
    differences = differences_of(one, two)
    units: FloatArray = differences
    sizes = np.ones(len(one))
    if clusters is not None:
        labels = codes(clusters, name="clusters", length=len(one))
        units, sizes = np.bincount(labels, differences).astype(np.float64), np.bincount(labels).astype(np.float64)
    units = np.where(np.abs(units) > 1e-14 * max(float(np.abs(units).max()), 1e-300), units, 0.0)
    observed = float(differences.mean())
    details: dict[str, Any] = dict(test="Paired permutation test", statistic=observed, n=len(one), alpha=alpha)
    details |= dict(statistic_name="mean difference", alternative=alternative)
    details |= dict(groups=(describe(names[0], one), describe(names[1], two)))
    moving = units[units != 0]
    if len(moving) == 0:
        note = "no pair differs" if clusters is None else "no cluster differs"
        return Result(p_value=1.0, warnings=(f"{note}, so p = 1 by definition",), method="Fisher (1935)", **details)
    # What is flipped says all: signs are as extreme as those seen if the units that they flip sum to 0 or beyond.
    flipped, shifted = _flipped(units, sizes, n_resamples, generator(rng))
    is_exact = _can_count(len(moving), n_resamples)
    sums = _flipped(moving, moving, n_resamples, generator(rng))[0] if is_exact else flipped
    effect = None
    if len(one) > 1 and not differences_are_constant(one, two):
        effect = cohen_dz(one, two, level=1 - alpha)
    few = 2.0 ** -min(len(moving), 1000) * (2 if alternative == "two-sided" else 1) * (0.5 if mid_p else 1)
    warnings = () if few <= alpha else (f"with so few units no outcome gives p below {few:.2g}: collect more",)
    return Result(
        p_value=_signs_p(moving, sums, is_exact, mid_p, alternative),
        estimate=observed,
        estimate_name="mean difference",
        interval=_signs_interval(flipped, shifted, mid_p, 1 - alpha, alternative),
        effect=effect,
        warnings=warnings,
        method=_permutation_method(is_exact, n_resamples) + (", mid-p" if mid_p else ""),
        **details,
    )


def bootstrap(
    values: object,
    *,
    statistic: Statistic = "mean",
    method: BootstrapMethod = "BCa",
    clusters: Iterable[Any] | None = None,
    level: float = 0.95,
    alternative: Alternative = "two-sided",
    n_resamples: int = 9999,
    rng: Rng = 0,
    name: str = "values",
    nan: NanPolicy = "raise",
) -> Estimate:
    """Estimate a statistic of one sample with a bootstrap interval and standard error, at least 2 values.

    statistic is "mean", "median" or a function of one array. clusters has one label for each value: then whole
    clusters are drawn, and n is their number. The estimate of a constant sample has an interval of width 0.
    """
    array = sample(values, name=name, nan="raise" if clusters is not None else nan, minimum=2)
    _check_bootstrap(method, level, n_resamples)
    label = statistic if isinstance(statistic, str) else getattr(statistic, "__name__", "statistic")
    if clusters is None:
        compute = _vectorized(statistic)
        return _bootstrap(
            label, (array,), compute, method, level, alternative, n_resamples, rng, constant=is_constant(array)
        )
    labels = codes(clusters, name="clusters", length=len(array))
    members = _members(labels, name="clusters")
    if statistic == "mean":
        sums, counts = np.bincount(labels, weights=array), np.bincount(labels).astype(float)

        def of_clusters(drawn: Any, axis: int = -1) -> Any:
            index = np.asarray(drawn, dtype=int)
            return sums[index].sum(axis=axis) / counts[index].sum(axis=axis)
    else:
        inner = _vectorized(statistic)

        def of_clusters(drawn: Any, axis: int = -1) -> Any:
            return _rowwise(lambda row: inner(array[np.concatenate([members[int(i)] for i in row])]), drawn, axis)

    places = np.arange(len(members), dtype=float)
    return _bootstrap(
        label, (places,), of_clusters, method, level, alternative, n_resamples, rng, constant=is_constant(array)
    )


def bootstrap_difference(
    first: object,
    second: object,
    *,
    paired: bool = False,
    statistic: Statistic = "mean",
    method: BootstrapMethod = "BCa",
    clusters: Iterable[Any] | None = None,
    level: float = 0.95,
    alternative: Alternative = "two-sided",
    n_resamples: int = 9999,
    rng: Rng = 0,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
) -> Estimate:
    """Estimate first minus second of a statistic with a bootstrap interval, at least 2 values (or pairs).

    paired draws whole pairs; clusters (for pairs alone, one label for each) draws whole clusters of pairs. For means
    this is the bootstrap of the mean difference.
    """
    _check_bootstrap(method, level, n_resamples)
    if clusters is not None and not paired:
        raise InvalidSample("clusters are for pairs: pass paired=True, or bootstrap each group by itself")
    label = f"difference of {statistic}s" if isinstance(statistic, str) else "difference"
    compute = _vectorized(statistic)
    if not paired:
        one = sample(first, name=names[0], nan=nan, minimum=2)
        two = sample(second, name=names[1], nan=nan, minimum=2)

        def difference(x: FloatArray, y: FloatArray, axis: int = -1) -> Any:
            return compute(x, axis=axis) - compute(y, axis=axis)

        constant = is_constant(one) and is_constant(two)
        return _bootstrap(
            label, (one, two), difference, method, level, alternative, n_resamples, rng, constant=constant
        )
    one, two = pairs(first, second, names=names, nan="raise" if clusters is not None else nan, minimum=2)
    if statistic == "mean":
        options: dict[str, Any] = dict(method=method, clusters=clusters, level=level, alternative=alternative)
        options |= dict(n_resamples=n_resamples, rng=rng, name="the differences")
        return replace(bootstrap(one - two, **options), name="mean difference")
    if clusters is None:
        members = [np.array([i]) for i in range(len(one))]
    else:
        members = _members(codes(clusters, name="clusters", length=len(one)), name="clusters")

    def of_units(drawn: Any, axis: int = -1) -> Any:
        def one_row(row: FloatArray) -> float:
            index = np.concatenate([members[int(i)] for i in row])
            return float(compute(one[index]) - compute(two[index]))

        return _rowwise(one_row, drawn, axis)

    places = np.arange(len(members), dtype=float)
    constant = differences_are_constant(one, two)
    return _bootstrap(label, (places,), of_units, method, level, alternative, n_resamples, rng, constant=constant)


def _bootstrap(
    name: str,
    data: tuple[FloatArray, ...],
    compute: Callable[..., Any],
    method: BootstrapMethod,
    level: float,
    alternative: Alternative,
    n_resamples: int,
    rng: Rng,
    *,
    constant: bool,
) -> Estimate:
    n: int | tuple[int, ...] = len(data[0]) if len(data) == 1 else tuple(len(one) for one in data)
    value = float(compute(*data))
    if constant:
        note = "the values do not vary: an interval of width 0 says nothing about other cases"
        return Estimate(name, value, 0.0, Interval(value, value, level, _METHODS[method]), n, _METHODS[method], (note,))
    found = stats.bootstrap(
        data,
        compute,
        method=method,
        confidence_level=level,
        alternative=alternative,
        n_resamples=n_resamples,
        rng=generator(rng),
        vectorized=True,
        batch=_batch(sum(len(one) for one in data)),
    )
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    warnings: tuple[str, ...] = ()
    if np.isnan(low) or np.isnan(high):  # BCa where the jackknife or the resamples do not vary
        low, high = _percentiles(found.bootstrap_distribution, level, alternative)
        warnings = ("the BCa correction is undefined for these data: the interval is the percentile bootstrap's",)
    smallest = min(len(one) for one in data)
    if smallest < 20:
        warnings = (*warnings, f"{smallest} units are few for a bootstrap: its interval is probably too narrow")
    error = float(np.std(found.bootstrap_distribution, ddof=1))
    return Estimate(name, value, error, Interval(low, high, level, _METHODS[method]), n, _METHODS[method], warnings)


def _percentiles(distribution: FloatArray, level: float, alternative: Alternative) -> tuple[float, float]:
    tail = (1 - level) / 2 if alternative == "two-sided" else 1 - level
    low, high = (float(np.quantile(distribution, share)) for share in (tail, 1 - tail))
    return (-np.inf if alternative == "less" else low), (np.inf if alternative == "greater" else high)


def _can_count(units: int, n_resamples: int) -> bool:
    return units <= 60 and 2**units <= n_resamples


def _flipped(
    units: FloatArray, sizes: FloatArray, n_resamples: int, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Return for many signs the sum and the size of the units that they flip: all signs, or none flipped and random."""
    if _can_count(len(units), n_resamples):
        sums, counts = np.zeros(1), np.zeros(1)
        for unit, size in zip(units, sizes, strict=True):
            sums, counts = np.concatenate((sums, sums + unit)), np.concatenate((counts, counts + size))
    else:
        drawn = [(np.zeros(1), np.zeros(1))]
        for start in range(0, n_resamples, step := max(1, _BATCH_CELLS // len(units))):
            shape = min(step, n_resamples - start), -(-len(units) // 8)
            bits = np.frombuffer(rng.bytes(shape[0] * shape[1]), dtype=np.uint8).reshape(shape)
            is_flipped = np.unpackbits(bits, axis=1, count=len(units)).astype(np.float64)
            drawn.append((is_flipped @ units, is_flipped @ sizes))
        sums, counts = (np.concatenate(part) for part in zip(*drawn, strict=True))
    cancelled = np.abs(sums) <= 1e-12 * float(np.abs(units).sum())
    return np.where(cancelled, 0.0, sums), counts


def _signs_p(moving: FloatArray, flipped: FloatArray, is_exact: bool, mid_p: bool, alternative: Alternative) -> float:
    tails, ties = {}, int((flipped == 0).sum())
    for side, sign in (("greater", 1.0), ("less", -1.0)):
        count = int((sign * flipped < 0).sum()) + (ties / 2 if mid_p else ties)
        is_seen = is_exact or count > _SEEN_TAIL * len(flipped)
        tails[side] = count / len(flipped) if is_seen else signs_tail(sign * moving)
    tails["two-sided"] = min(1.0, 2 * min(tails.values()))
    return tails[alternative]


def _signs_interval(
    flipped: FloatArray, sizes: FloatArray, mid_p: bool, level: float, alternative: Alternative
) -> Interval:
    """Return the shifts that the signs do not reject: a shift is beyond the mean of what so many signs flip."""
    means, counts = np.unique(flipped[sizes > 0] / sizes[sizes > 0], return_counts=True)
    always = int((sizes == 0).sum())  # signs that flip nothing are as extreme at every shift
    wanted = len(flipped) * ((1 - level) / 2 if alternative == "two-sided" else 1 - level)
    low, high = -math.inf, math.inf
    if mid_p and wanted > always / 2:
        reached = always / 2 + np.cumsum(counts) - counts / 2
        low, high = (float(np.interp(one, reached, means)) for one in (wanted, len(flipped) - wanted))
    elif not mid_p and wanted > always:
        place = math.ceil(wanted - always - 1e-9)
        low, high = (
            float(side[np.searchsorted(np.cumsum(number), place)])
            for side, number in ((means, counts), (means[::-1], counts[::-1]))
        )
    low, high = (-math.inf if alternative == "less" else low), (math.inf if alternative == "greater" else high)
    return Interval(low, high, level, "inverts the test, Hartigan (1969)")


def signs_tail(units: FloatArray) -> float:
    """Return P(the sum of units under random signs >= the sum seen): the saddlepoint approximation of Robinson (1982).

    From 14 units on it is right to a few hundredths of the value in the tails; where sums are tied it is a mid-p.
    """
    sizes = np.abs(units) / float(np.abs(units).max())
    seen = float(units.sum()) / float(np.abs(units).max())
    if abs(seen) >= float(sizes.sum()) * (1 - 1e-12):  # all signs are equal
        return 0.5 ** len(units) if seen > 0 else 1.0

    def slope(tilt: float) -> float:
        return float(sizes @ np.tanh(tilt * sizes)) - abs(seen)

    high = 1.0
    while slope(high) < 0:
        high *= 2
    tilt = float(optimize.brentq(slope, 0.0, high, xtol=1e-14))
    tilted = tilt * sizes
    decay = np.exp(-2 * tilted)
    cumulant = float((tilted + np.log1p(decay) - math.log(2)).sum())  # log cosh
    root = math.sqrt(max(2 * (tilt * abs(seen) - cumulant), 0.0))
    if root > 1e-3:
        spread = 2 * math.sqrt(float(sizes**2 @ (decay / (1 + decay) ** 2)))
        root += math.log(tilt * spread / root) / root
    tail = float(special.ndtr(-root))
    return tail if seen > 0 else 1 - tail


def _vectorized(statistic: Statistic) -> Callable[..., Any]:
    if statistic == "mean":
        return np.mean
    if statistic == "median":
        return np.median
    if not callable(statistic):
        raise InvalidSample(f'statistic is {statistic!r}: it is "mean", "median" or a function of one array')
    return lambda values, axis=-1: _rowwise(statistic, values, axis)


def _rowwise(statistic: Callable[[FloatArray], float], values: Any, axis: int) -> Any:
    array = np.asarray(values, dtype=np.float64)
    return float(statistic(array)) if array.ndim == 1 else np.apply_along_axis(statistic, axis, array)


def _members(labels: Any, *, name: str) -> list[Any]:
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(labels))[:-1])
    if len(members) < 2:
        raise InvalidSample(f"{name}: all values are in one cluster, at least 2 clusters needed")
    return members


def _divisions(n1: int, n2: int) -> float:
    return float(np.exp(stats.binom.logpmf(n1, n1 + n2, 0.5) + (n1 + n2) * np.log(2))) if n1 + n2 < 1000 else np.inf


def _batch(cells: int) -> int:
    return max(1, _BATCH_CELLS // max(cells, 1))


def _permutation_method(is_exact: bool, n_resamples: int) -> str:
    return "Fisher (1935); exact" if is_exact else f"Fisher (1935); {n_resamples} random permutations"


def _check_resamples(n_resamples: int) -> None:
    if n_resamples < 99:
        raise InvalidSample(f"n_resamples is {n_resamples}: at least 99 are needed, 9999 are usual")


def _check_bootstrap(method: str, level: float, n_resamples: int) -> None:
    _check_resamples(n_resamples)
    if method not in _METHODS:
        raise InvalidSample(f"method is {method!r}: it is one of {', '.join(_METHODS)}")
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level}: a confidence level is between 0 and 1, such as 0.95")
