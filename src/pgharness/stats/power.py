"""How much data a comparison needs, what it could have found, and what a pilot run says of the next one.

A design knows its effect and gives the power for n units of its own: values in a group, pairs, cases or clusters.
`sample_size`, `power_of` and `detectable_effect` ask it the three questions there are; `simulated_power` answers where
no formula fits. Powers of t and F tests are exact for normal data (noncentral t and F), of McNemar's test exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
from scipy import integrate, optimize, special, stats

from pgharness.stats.effects import noncentral_f_cdf
from pgharness.stats.evaluation import VarianceParts
from pgharness.stats.results import Alternative, Interval
from pgharness.stats.samples import InvalidSample, Rng, generator

Question = Literal["a priori", "achieved", "post hoc", "sensitivity", "simulation"]
COHEN = "Cohen (1988), Statistical Power Analysis, 2nd ed."
CAVEAT = (
    "power at the observed effect is the p-value in other words and adds nothing to it (Hoenig & Heisey 2001, "
    "The American Statistician 55): report the interval, or the effect that this n could have detected"
)
_LARGEST_N = 100_000_000
_MOST_TABLES = 100_000  # pairs of counts that a power is summed over


class Design(Protocol):
    """A comparison whose power is known: `unit` is what n counts, `effect` what it looks for."""

    unit: ClassVar[str]
    effect_name: ClassVar[str]
    method: ClassVar[str]
    smallest: ClassVar[int]

    @property
    def effect(self) -> float:
        """The effect that is looked for."""

    @property
    def largest_effect(self) -> float:
        """The largest effect that is possible."""

    def with_effect(self, effect: float) -> Self:
        """Return the same design with another effect."""

    def power(self, n: float, alpha: float) -> float:
        """Return the chance that the test of n units finds the effect."""

    def total(self, n: float) -> int:
        """Return how many measured units n means in all groups together."""


@dataclass(frozen=True, slots=True)
class TwoMeans:
    """Two independent groups, t test; d in standard deviations; n in the first group, ratio times n in the second."""

    d: float
    ratio: float = 1.0
    alternative: Alternative = "two-sided"
    unit: ClassVar[str] = "values in the first group"
    effect_name: ClassVar[str] = "Cohen d"
    method: ClassVar[str] = f"noncentral t; {COHEN}"
    smallest: ClassVar[int] = 2

    @property
    def effect(self) -> float:
        return self.d

    @property
    def largest_effect(self) -> float:
        return 1e3

    def with_effect(self, effect: float) -> Self:
        return replace(self, d=effect)

    def power(self, n: float, alpha: float) -> float:
        second = n * self.ratio
        return _t_power(self.d * math.sqrt(n * second / (n + second)), n + second - 2, alpha, self.alternative)

    def total(self, n: float) -> int:
        return math.ceil(n) + math.ceil(n * self.ratio)


@dataclass(frozen=True, slots=True)
class PairedMeans:
    """Pairs, such as two systems on the same cases; dz is the mean difference in standard deviations of differences."""

    dz: float
    alternative: Alternative = "two-sided"
    unit: ClassVar[str] = "pairs"
    effect_name: ClassVar[str] = "Cohen d_z"
    method: ClassVar[str] = f"noncentral t; {COHEN}"
    smallest: ClassVar[int] = 2

    @property
    def effect(self) -> float:
        return self.dz

    @property
    def largest_effect(self) -> float:
        return 1e3

    def with_effect(self, effect: float) -> Self:
        return replace(self, dz=effect)

    def power(self, n: float, alpha: float) -> float:
        return _t_power(self.dz * math.sqrt(n), n - 1, alpha, self.alternative)

    def total(self, n: float) -> int:
        return math.ceil(n)


@dataclass(frozen=True, slots=True)
class ManyMeans:
    """Several independent groups of n each, one-way ANOVA; f is the means' standard deviation over the values' own."""

    f: float
    groups: int
    unit: ClassVar[str] = "values in each group"
    effect_name: ClassVar[str] = "Cohen f"
    method: ClassVar[str] = f"noncentral F; {COHEN}"
    smallest: ClassVar[int] = 2

    @property
    def effect(self) -> float:
        return self.f

    @property
    def largest_effect(self) -> float:
        return 1e3

    def with_effect(self, effect: float) -> Self:
        return replace(self, f=effect)

    def power(self, n: float, alpha: float) -> float:
        df1, df2 = self.groups - 1, self.groups * (n - 1)
        critical = float(stats.f.isf(alpha, df1, df2))
        noncentrality = self.f**2 * n * self.groups
        missed = noncentral_f_cdf(critical, df1, df2, noncentrality) if noncentrality else 1 - alpha
        return 1 - missed

    def total(self, n: float) -> int:
        return math.ceil(n) * self.groups


@dataclass(frozen=True, slots=True)
class TwoProportions:
    """Two independent proportions, z test of pooled variance; n in the first group, ratio times n in the second.

    Summed over both counts, unless approximate is set or the groups are large: then the normal approximation of most
    tables and programs, which is wrong by several points where few successes or failures are expected.
    """

    first: float
    second: float
    ratio: float = 1.0
    alternative: Alternative = "two-sided"
    approximate: bool = False
    unit: ClassVar[str] = "values in the first group"
    effect_name: ClassVar[str] = "difference of proportions"
    method: ClassVar[str] = "over both counts; large groups: Fleiss, Levin & Paik (2003), Statistical Methods, ch. 4"
    smallest: ClassVar[int] = 2

    @property
    def effect(self) -> float:
        return self.second - self.first

    @property
    def largest_effect(self) -> float:
        return 1 - self.first

    def with_effect(self, effect: float) -> Self:
        return replace(self, second=self.first + effect)

    def power(self, n: float, alpha: float) -> float:
        for name, share in (("first", self.first), ("second", self.second)):
            if not 0 <= share <= 1:
                raise InvalidSample(f"{name} is {share!r}: a proportion lies between 0 and 1")
        other = n * self.ratio
        if not self.approximate and (exact := self._exact(math.floor(n), math.floor(other + 1e-9), alpha)) is not None:
            return exact
        pooled = (self.first + self.ratio * self.second) / (1 + self.ratio)
        null = math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / other))
        real = math.sqrt(self.first * (1 - self.first) / n + self.second * (1 - self.second) / other)
        tail = alpha / 2 if self.alternative == "two-sided" else alpha
        reach = float(stats.norm.isf(tail)) * null
        if real == 0:
            return float(abs(self.effect) > reach) if null else alpha
        above = float(stats.norm.sf((reach - self.effect) / real))
        below = float(stats.norm.cdf((-reach - self.effect) / real))
        return {"two-sided": above + below, "greater": above, "less": below}[self.alternative]

    def _exact(self, n: int, other: int, alpha: float) -> float | None:
        """Return the chance of all counts that the test rejects, None where they are too many."""
        counts, chances = [], []
        for size, share in ((n, self.first), (other, self.second)):
            low, high = (int(stats.binom.ppf(p, size, share)) for p in (1e-12, 1 - 1e-12))
            counts.append(np.arange(max(low, 0), high + 1))
            chances.append(stats.binom.pmf(counts[-1], size, share))
        if len(counts[0]) * len(counts[1]) > _MOST_TABLES:
            return None
        one, two = counts[0][:, None], counts[1][None, :]
        pooled = (one + two) / (n + other)
        error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / other))
        z = np.divide(two / other - one / n, error, out=np.zeros(error.shape), where=error > 0)
        critical = float(stats.norm.isf(alpha / 2 if self.alternative == "two-sided" else alpha))
        rejected = {"two-sided": np.abs(z) > critical, "greater": z > critical, "less": z < -critical}[self.alternative]
        return float(chances[0] @ rejected @ chances[1])

    def total(self, n: float) -> int:
        return math.ceil(n) + math.ceil(n * self.ratio)


@dataclass(frozen=True, slots=True)
class McNemarPairs:
    """Pass or fail of two systems on the same n cases, McNemar's exact test, unless mid_p is set its mid-p version.

    first_only and second_only are the shares of cases that only the one and only the other passes.
    """

    first_only: float
    second_only: float
    mid_p: bool = False
    unit: ClassVar[str] = "cases"
    effect_name: ClassVar[str] = "difference of proportions"
    method: ClassVar[str] = "exact, over the number of discordant cases; Duffy (1984), Biometrics 40"
    smallest: ClassVar[int] = 1

    @property
    def effect(self) -> float:
        return self.first_only - self.second_only

    @property
    def largest_effect(self) -> float:
        return self.first_only + self.second_only

    def with_effect(self, effect: float) -> Self:
        both = self.first_only + self.second_only
        return replace(self, first_only=(both + effect) / 2, second_only=(both - effect) / 2)

    def power(self, n: float, alpha: float) -> float:
        both = self.first_only + self.second_only
        if min(self.first_only, self.second_only) < 0 or not 0 < both <= 1:
            raise InvalidSample("first_only and second_only are shares of all cases: from 0, and together at most 1")
        size = math.floor(n)
        # All but 1e-12 of the chances of the number of discordant cases.
        low, high = (int(stats.binom.ppf(p, size, both)) for p in (1e-12, 1 - 1e-12))
        discordant = np.arange(low, high + 1)
        chances = stats.binom.pmf(discordant, size, both)
        edge = stats.binom.ppf(alpha / 2, discordant, 0.5)
        reached = stats.binom.cdf(edge, discordant, 0.5)
        if self.mid_p:
            reached = reached - stats.binom.pmf(edge, discordant, 0.5) / 2
        edge = np.where(reached <= alpha / 2 * (1 + 1e-12), edge, edge - 1)
        share = self.first_only / both
        found = stats.binom.cdf(edge, discordant, share) + stats.binom.cdf(edge, discordant, 1 - share)
        return float(np.sum(chances * found))

    def total(self, n: float) -> int:
        return math.ceil(n)


@dataclass(frozen=True, slots=True)
class ClusteredMeans:
    """Two groups of n clusters each, cluster_size values in a cluster, t test on cluster means.

    d is in standard deviations of single values; icc is the correlation of two values of one cluster. The variance of a
    mean is 1 + (cluster_size - 1) icc times that of independent values (the design effect of Kish 1965).
    """

    d: float
    cluster_size: float
    icc: float
    alternative: Alternative = "two-sided"
    unit: ClassVar[str] = "clusters in each group"
    effect_name: ClassVar[str] = "Cohen d"
    method: ClassVar[str] = "noncentral t on cluster means; Donner & Klar (2000), Cluster Randomization Trials"
    smallest: ClassVar[int] = 2

    @property
    def effect(self) -> float:
        return self.d

    @property
    def largest_effect(self) -> float:
        return 1e3

    def with_effect(self, effect: float) -> Self:
        return replace(self, d=effect)

    def power(self, n: float, alpha: float) -> float:
        if not 0 <= self.icc <= 1 or self.cluster_size < 1:
            raise InvalidSample("icc lies between 0 and 1, and cluster_size is at least 1")
        inflated = 1 + (self.cluster_size - 1) * self.icc
        noncentrality = self.d * math.sqrt(n * self.cluster_size / (2 * inflated))
        return _t_power(noncentrality, 2 * n - 2, alpha, self.alternative)

    def total(self, n: float) -> int:
        return 2 * math.ceil(math.ceil(n) * self.cluster_size)


def shared_cases(
    difference: float,
    parts: VarianceParts,
    *,
    replications: int = 1,
    grades: int = 1,
    alternative: Alternative = "two-sided",
) -> PairedMeans:
    """Return the design of two systems on shared cases, from the variance parts of their difference.

    difference is in units of the score; parts come from evaluation.paired_variance_parts on a pilot run.
    """
    sd = parts.standard_error(1, replications, grades)
    if sd == 0:
        raise InvalidSample("the pilot's differences do not vary: no number of cases follows from that")
    return PairedMeans(difference / sd, alternative)


@dataclass(frozen=True, slots=True)
class Power:
    """The answer to one question about a design: n counts `unit`, total_n all groups; interval is a simulation's."""

    question: Question
    n: int
    unit: str
    total_n: int
    effect: float
    effect_name: str
    power: float
    alpha: float
    method: str
    interval: Interval | None = None
    warnings: tuple[str, ...] = ()

    @property
    def advice(self) -> str:
        """The answer as a sentence; adequate from a power of .80, marginal from .60."""
        word = "adequate" if self.power >= 0.8 - 1e-9 else "marginal" if self.power >= 0.6 else "too low"
        told = f"{self.n} {self.unit}" + (f" ({self.total_n} in all)" if self.total_n != self.n else "")
        return (
            f"{told} find an effect of {self.effect_name} = {self.effect:.3g} with power {self.power:.2f} "
            f"at alpha {self.alpha:g}: {word}"
        )


def power_of(design: Design, n: int, *, alpha: float = 0.05) -> Power:
    """Return the power of a design with n of its units, at an effect that was chosen before looking."""
    return _answer("achieved", design, n, alpha)


def post_hoc_power(design: Design, n: int, *, alpha: float = 0.05) -> Power:
    """Return the power at an effect that was itself observed; the warning says why that is no evidence."""
    return replace(_answer("post hoc", design, n, alpha), warnings=(CAVEAT,))


def sample_size(design: Design, *, power: float = 0.8, alpha: float = 0.05) -> Power:
    """Return the smallest n from which on the design has at least the power asked for.

    Raises InvalidSample for an effect of 0 and for one that no number of units would find.
    """
    _level("power", power)
    if design.effect == 0:
        raise InvalidSample("an effect of 0 cannot be found: give the smallest effect that would matter")
    high = design.smallest
    while design.power(high, _level("alpha", alpha)) < power:
        high *= 2
        if high > _LARGEST_N:
            raise InvalidSample(
                f"more than {_LARGEST_N:,} units would be needed for {design.effect_name} = {design.effect:g}"
            )
    low = max(high // 2, design.smallest)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if design.power(middle, alpha) >= power else (middle + 1, high)
    if isinstance(design, McNemarPairs):
        high = _past_the_teeth(design, high, power, alpha, 1 / (design.first_only + design.second_only))
    elif isinstance(design, TwoProportions) and not design.approximate:
        high = _past_the_teeth(design, high, power, alpha, 1.0)
    return _answer("a priori", design, high, alpha)


def detectable_effect(design: Design, n: int, *, power: float = 0.8, alpha: float = 0.05) -> Power:
    """Return the smallest effect that n units find with the power asked for; the design's own effect gives its sign.

    Raises InvalidSample where even the largest effect that is possible would be missed.
    """
    _level("power", power)
    _enough(design, n)
    sign = -1.0 if design.effect < 0 else 1.0
    top = design.with_effect(-design.largest_effect).largest_effect if sign < 0 else design.largest_effect
    if isinstance(design, TwoProportions) and sign < 0:
        top = design.first

    def short(effect: float) -> float:
        return design.with_effect(sign * effect).power(n, alpha) - power

    top *= 1 - 1e-12
    if short(top) < 0:
        raise InvalidSample(f"{n} {design.unit} do not find even the largest possible effect with power {power:g}")
    if short(top * 1e-9) >= 0:
        raise InvalidSample(f"a power of {power:g} is not above alpha ({alpha:g})")
    found = float(optimize.brentq(short, top * 1e-9, top, xtol=1e-13, rtol=1e-12))
    return _answer("sensitivity", design.with_effect(sign * found), n, alpha)


def power_curve(design: Design, sizes: Sequence[int], *, alpha: float = 0.05) -> tuple[Power, ...]:
    """Return the power of a design for each of several n."""
    return tuple(_answer("achieved", design, n, alpha) for n in sizes)


def simulated_power(
    p_value: Callable[[np.random.Generator], float],
    *,
    simulations: int = 1000,
    alpha: float = 0.05,
    rng: Rng = 0,
    n: int = 0,
    unit: str = "units",
) -> Power:
    """Return the share of simulated data sets whose p-value is below alpha, with its 95% Wilson interval.

    p_value draws one data set from the generator it is given and tests it. n and unit only describe the data.
    """
    if simulations < 1:
        raise InvalidSample(f"{simulations} simulations: at least 1 is needed")
    random = generator(rng)
    found = sum(p_value(random) < _level("alpha", alpha) for _ in range(simulations))
    ends = stats.binomtest(found, simulations).proportion_ci(0.95, method="wilson")
    interval = Interval(float(ends.low), float(ends.high), 0.95, "Wilson")
    method = f"{simulations} simulations"
    return Power("simulation", n, unit, n, math.nan, "as simulated", found / simulations, alpha, method, interval)


def simulated_sample_size(
    p_value: Callable[[np.random.Generator, int], float],
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    simulations: int = 1000,
    rng: int = 0,
    smallest: int = 2,
    largest: int = 100_000,
    unit: str = "units",
) -> Power:
    """Return the smallest n whose simulated power reaches the power asked for: doubling, then bisection.

    p_value draws and tests one data set of n units. Each n is simulated from the same seed. The answer has the error of
    the simulation: its interval says how far the power at that n may be from what was asked.
    """

    def at(n: int) -> Power:
        return simulated_power(
            lambda random: p_value(random, n), simulations=simulations, alpha=alpha, rng=rng, n=n, unit=unit
        )

    low = high = smallest
    found = at(high)
    while found.power < power:
        if high >= largest:
            raise InvalidSample(f"{largest} {unit} have a simulated power of {found.power:.3f}: raise `largest`")
        low, high = high + 1, min(high * 2, largest)
        found = at(high)
    while low < high:
        middle = (low + high) // 2
        tried = at(middle)
        if tried.power >= power:
            high, found = middle, tried
        else:
            low = middle + 1
    return found


@dataclass(frozen=True, slots=True)
class PilotAdvice:
    """How many pairs or cases the next run needs, from a pilot's standard deviation, and in case that was too small.

    expected takes the pilot's sd for true; safe takes its upper confidence limit, so it suffices with the assurance.
    """

    expected: Power
    safe: Power
    sd: float
    sd_upper: float
    assurance: float
    reason: str


def advise_from_pilot(
    sd: float,
    n: int,
    *,
    difference: float,
    power: float = 0.8,
    alpha: float = 0.05,
    assurance: float = 0.8,
    alternative: Alternative = "two-sided",
) -> PilotAdvice:
    """Say how many shared cases find a difference, from the sd of differences in a pilot of n cases.

    difference is the smallest that would matter, not the pilot's own: a pilot's difference is too rough to plan by.
    Browne (1995), Statistics in Medicine 14: the sd's upper limit gives the power with the assurance asked for.
    """
    if n < 2 or not sd > 0:
        raise InvalidSample("the pilot needs at least 2 cases and differences that vary")
    upper = sd * math.sqrt((n - 1) / float(stats.chi2.ppf(1 - _level("assurance", assurance), n - 1)))
    expected, safe = (
        sample_size(PairedMeans(difference / size, alternative), power=power, alpha=alpha) for size in (sd, upper)
    )
    reason = (
        f"with the pilot's standard deviation of {sd:.3g}, {expected.n} cases find a difference of {difference:g} with "
        f"power {power:g}; a pilot of {n} may have been lucky: {safe.n} cases suffice with {assurance:.0%} assurance"
    )
    return PilotAdvice(expected, safe, sd, upper, assurance, reason)


def _answer(question: Question, design: Design, n: int, alpha: float) -> Power:
    _enough(design, n)
    power = min(max(design.power(n, _level("alpha", alpha)), 0.0), 1.0)
    return Power(
        question, n, design.unit, design.total(n), design.effect, design.effect_name, power, alpha, design.method
    )


def _past_the_teeth(design: Design, n: int, power: float, alpha: float, tooth: float) -> int:
    """The power of a test of counts falls now and then as n grows: return the n past the last fall below the power."""
    step = math.ceil(tooth)
    while True:
        ahead = range(n, n + 40 * step + n // 10)
        below = [size for size in ahead if design.power(size, alpha) < power]
        if not below:
            break
        n = below[-1] + 1
    while n > design.smallest and design.power(n - 1, alpha) >= power:
        n -= 1
    return n


def _t_power(noncentrality: float, df: float, alpha: float, alternative: Alternative) -> float:
    tail = alpha / 2 if alternative == "two-sided" else alpha
    critical = float(stats.t.isf(tail, df))
    above = _nct_sf(critical, df, noncentrality)
    below = _nct_sf(critical, df, -noncentrality)
    return {"two-sided": above + below, "greater": above, "less": below}[alternative]


def _nct_sf(critical: float, df: float, noncentrality: float) -> float:
    found = float(stats.nct.sf(critical, df, noncentrality)) if abs(noncentrality) < 37 else math.nan
    if not math.isnan(found):
        return found

    def above(share: float) -> float:  # beyond the series: the normal tail over the variance's quantiles
        return float(special.ndtr(noncentrality - critical * math.sqrt(special.chdtri(df, 1 - share) / df)))

    return float(integrate.quad(above, 0, 1, limit=200)[0])


def _enough(design: Design, n: float) -> None:
    if not n >= design.smallest:
        raise InvalidSample(f"{n} {design.unit}: at least {design.smallest} needed")


def _level(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise InvalidSample(f"{name} is {value!r}: it lies between 0 and 1")
    return value
