"""Bayesian comparisons of two systems on the same cases: how probable it is that one is better, worse or equal enough.

A region of practical equivalence (ROPE) says which differences do not matter. Unlike a p-value these probabilities can
support "no difference that matters". Differences are first minus second: "first" means that the first scores higher.
Benavoli, Corani, Demsar & Zaffalon (2017), Time for a change, Journal of Machine Learning Research 18.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from pgharness.stats.results import Interval
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    Rng,
    differences_are_constant,
    differences_of,
    generator,
    pairs,
)

_CELLS = 4_000_000  # of the work arrays: what is drawn at once stays near 32 MB
_MOST_PAIRS = 4_000


def _smooth_rule(count: int) -> tuple[FloatArray, FloatArray]:
    """Return places and weights of an integral over 0..1 that is exact for functions with roots at either end."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    x = (nodes + 1) / 2
    return x**3 * (10 - 15 * x + 6 * x * x), weights * 15 * x * x * (1 - x) ** 2


_PLACES, _WEIGHTS = _smooth_rule(96)


@dataclass(frozen=True, slots=True)
class Posterior:
    """What the data say of the difference: probabilities that sum to 1, its mean, and a credible interval of it.

    p_first: the first is better by more than rope; p_equivalent: within -rope..rope; p_second: the second is better.
    monte_carlo_error is the largest standard error of the three, 0 where they are computed exactly.
    """

    comparison: str
    p_first: float
    p_equivalent: float
    p_second: float
    mean: float
    interval: Interval
    rope: float
    n: int
    method: str
    monte_carlo_error: float = 0.0
    warnings: tuple[str, ...] = ()

    def decision(self, threshold: float = 0.95) -> Literal["first", "equivalent", "second", "undecided"]:
        """Return which of the three has a probability above the threshold, or "undecided"."""
        for name, probability in (
            ("first", self.p_first),
            ("equivalent", self.p_equivalent),
            ("second", self.p_second),
        ):
            if probability > threshold:
                return name  # type: ignore[return-value]
        return "undecided"


def bayesian_t(
    first: object,
    second: object,
    *,
    rope: float = 0.0,
    correlation: float = 0.0,
    level: float = 0.95,
    nan: NanPolicy = "raise",
) -> Posterior:
    """Return the posterior of the mean difference of paired scores, both of shape (n,), n >= 2: the correlated t test.

    correlation is that between two differences: 0 for independent cases; test size over data size for results of
    repeated cross-validation (Nadeau & Bengio 2003). Reference prior: Corani & Benavoli (2015), Machine Learning 100.
    """
    one, two = pairs(first, second, nan=nan, minimum=2)
    _check(rope, level)
    if not 0 <= correlation < 1:
        raise InvalidSample(f"correlation is {correlation!r}: it lies from 0 to below 1")
    if differences_are_constant(one, two):
        raise InvalidSample("every pair differs by the same amount: the posterior has no width to speak of")
    differences = differences_of(one, two)
    n, mean = len(differences), float(differences.mean())
    scale = math.sqrt(1 / n + correlation / (1 - correlation)) * float(differences.std(ddof=1))
    posterior = stats.t(n - 1, loc=mean, scale=scale)
    above, below = float(posterior.sf(rope)), float(posterior.cdf(-rope))
    low, high = (float(end) for end in posterior.interval(level))
    interval = Interval(low, high, level, "credible, central")
    method = "Corani & Benavoli (2015)"
    return Posterior("Bayesian t", above, max(1 - above - below, 0.0), below, mean, interval, rope, n, method)


def bayesian_signed_rank(
    first: object,
    second: object,
    *,
    rope: float = 0.0,
    prior_strength: float = 0.5,
    draws: int = 20_000,
    level: float = 0.95,
    rng: Rng = 0,
    nan: NanPolicy = "raise",
) -> Posterior:
    """Return how probable it is that each of the three has the most mass among means of two differences.

    Both scores have shape (n,), 2 <= n <= 4000. Makes no assumption of normality; the prior is a Dirichlet process with
    one difference of 0 of the given strength (Benavoli et al. 2014, ICML). By Monte Carlo, from the seed. The mean and
    interval are of the mean difference.
    """
    one, two = pairs(first, second, nan=nan, minimum=2)
    _check(rope, level)
    if len(one) > _MOST_PAIRS:
        raise InvalidSample(f"{len(one)} pairs: at most {_MOST_PAIRS}; use bayesian_t, which so many pairs make safe")
    if not prior_strength > 0 or draws < 1:
        raise InvalidSample("prior_strength must be above 0, and draws at least 1")
    differences = np.concatenate([[0.0], differences_of(one, two)])
    sums = differences_of(
        differences[:, None].repeat(len(differences), 1).ravel(), -np.tile(differences, len(differences))
    )
    sums = sums.reshape(len(differences), -1)
    above, below = (_beyond(side * sums, 2 * rope) for side in (1, -1))
    random, alpha = generator(rng), np.concatenate([[prior_strength], np.ones(len(one))])
    wins, means = np.zeros(3), []
    block = max(1, _CELLS // len(differences))
    for start in range(0, draws, block):
        weights = random.dirichlet(alpha, min(block, draws - start))
        shares = [np.einsum("bi,bi->b", weights @ side, weights) for side in (above, below)]
        mass = np.column_stack([shares[0], 1 - shares[0] - shares[1], shares[1]])
        if rope == 0:
            mass[:, 1] = -1.0  # no difference is within a region without width
        wins += np.bincount(np.argmax(mass, axis=1), minlength=3)
        means.append(weights @ differences)
    p_first, p_equivalent, p_second = (float(count) / draws for count in wins)
    drawn = np.concatenate(means)
    low, high = (float(end) for end in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    error = max(math.sqrt(p * (1 - p) / draws) for p in (p_first, p_equivalent, p_second))
    return Posterior(
        comparison="Bayesian signed rank",
        p_first=p_first,
        p_equivalent=p_equivalent,
        p_second=p_second,
        mean=float(drawn.mean()),
        interval=Interval(low, high, level, "credible, central"),
        rope=rope,
        n=len(one),
        method=f"Benavoli et al. (2014), {draws} draws",
        monte_carlo_error=error,
        warnings=("fewer than 10 pairs: the prior counts",) if len(one) < 10 else (),
    )


def bayesian_pass_rates(
    first: object,
    second: object,
    *,
    rope: float = 0.0,
    prior: float = 0.5,
    level: float = 0.95,
    nan: NanPolicy = "raise",
) -> Posterior:
    """Return the posterior of the difference of two pass rates on the same cases; both have shape (n,), of 0 and 1.

    Each of the four outcomes of a case (both pass, only the first, only the second, neither) has a Dirichlet prior of
    the given strength, by default Jeffreys'. Exact: the difference of the two discordant rates is a product of two
    independent beta variables (Altham 1971, Biometrika 58).
    """
    one, two = pairs(first, second, nan=nan, minimum=1)
    _check(rope, level)
    if not prior > 0:
        raise InvalidSample(f"prior is {prior!r}: it is above 0")
    for name, values in (("first", one), ("second", two)):
        if not np.isin(values, (0, 1)).all():
            raise InvalidSample(f"{name} must be 0 (fail) and 1 (pass) only")
    only_first, only_second = float(np.sum(one > two)) + prior, float(np.sum(two > one)) + prior
    total = len(one) + 4 * prior
    discordant = (only_first + only_second, total - only_first - only_second)

    def above(edge: float) -> float:
        """The chance that the difference, discordant rate times (2 share - 1), exceeds edge: over the rate's quantiles.

        Where the rate is below |edge| the answer is known, which is also where the integrand bends.
        """
        known = float(special.betainc(*discordant, abs(edge)))
        rates = special.betaincinv(*discordant, known + (1 - known) * _PLACES)
        bends = np.maximum(0.5 * (1 + edge / np.maximum(rates, 1e-300)), 0.0)
        beyond = special.betaincc(only_first, only_second, np.minimum(bends, 1.0))
        return float((1 - known) * (beyond @ _WEIGHTS)) + (known if edge < 0 else 0.0)

    p_first, p_second = above(rope), 1 - above(-rope)
    mean = (only_first - only_second) / total
    sd = math.sqrt(((only_first + only_second) / total - mean**2) / (total + 1))
    ends = _difference_quantiles(above, ((1 - level) / 2, (1 + level) / 2), (mean, sd))
    return Posterior(
        comparison="Bayesian comparison of pass rates",
        p_first=p_first,
        p_equivalent=max(1 - p_first - p_second, 0.0),
        p_second=p_second,
        mean=mean,
        interval=Interval(*ends, level, "credible, central"),
        rope=rope,
        n=len(one),
        method="Dirichlet posterior of paired outcomes (Altham 1971)",
    )


def _difference_quantiles(
    above: Callable[[float], float], quantiles: tuple[float, float], near: tuple[float, float]
) -> tuple[float, float]:
    """Return where `above` falls to what the quantiles leave, searching near the mean -/+ 10 sd first."""
    mean, sd = near
    found = []
    for quantile in quantiles:

        def over(edge: float, left: float = 1 - quantile) -> float:
            return above(edge) - left

        low, high = max(mean - 10 * sd, -1 + 1e-12), min(mean + 10 * sd, 1 - 1e-12)
        if not over(low) > 0 > over(high):
            low, high = -1 + 1e-12, 1 - 1e-12
        found.append(float(optimize.brentq(over, low, high, xtol=1e-9)))
    return found[0], found[1]


def _beyond(values: FloatArray, edge: float) -> FloatArray:
    """Return 1 where values exceed the edge, one half where they equal it."""
    return np.asarray((values > edge) + 0.5 * (values == edge), dtype=np.float64)


def _check(rope: float, level: float) -> None:
    if not (rope >= 0 and math.isfinite(rope)):
        raise InvalidSample(f"rope is {rope!r}: it is the largest difference that does not matter, from 0")
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level!r}: it lies between 0 and 1, such as 0.95")
