"""Looking at a run before it ends, without spoiling it: group-sequential boundaries and always-valid intervals.

Testing again at each look, as if it were the only one, finds differences that are not there. Alpha spending (Lan &
DeMets 1983, Biometrika 70) divides the error over looks whose number and times need not be planned. A confidence
sequence holds at all times at once, so one may look after every case and stop for any reason; it is wider.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from scipy import optimize, stats
from scipy.special import ndtr

from pgharness.stats.results import Interval
from pgharness.stats.samples import FloatArray, InvalidSample, NanPolicy, sample

Spending = Literal["obrien-fleming", "pocock"]
LAN_DEMETS = "Lan & DeMets (1983); integration of Armitage, McPherson & Rowe (1969)"
REPEATED = "repeated confidence interval (Jennison & Turnbull 1989)"
_NOTHING = 1e-15  # less alpha than this is not spent: its boundary is out of reach
_CLOSEST = 0.0005  # looks nearer than this add nothing and would need a finer grid
_FAR = 8.5  # standard deviations beyond which no mass is followed


def spent_alpha(fraction: float, *, alpha: float = 0.05, spending: Spending = "obrien-fleming") -> float:
    """Return how much of a two-sided alpha may be spent when so much of the planned information (0..1) is in.

    "obrien-fleming" spends next to nothing early, so that the last look is almost an ordinary test; "pocock" spends
    evenly, for stopping early.
    """
    _check_alpha(alpha)
    if spending not in ("obrien-fleming", "pocock"):
        raise InvalidSample(f'spending is {spending!r}: it is "obrien-fleming" or "pocock"')
    if not 0 < fraction <= 1:
        raise InvalidSample(f"an information fraction is {fraction!r}: it lies above 0 and up to 1")
    if spending == "pocock":
        return alpha * math.log1p((math.e - 1) * fraction)
    return 4 * float(stats.norm.sf(stats.norm.isf(alpha / 4) / math.sqrt(fraction)))


def boundaries(
    fractions: Sequence[float], *, alpha: float = 0.05, spending: Spending = "obrien-fleming"
) -> tuple[float, ...]:
    """Return for each look the |z| that stops it, two-sided and symmetric; infinite where nothing can be spent yet.

    fractions are the shares of the planned information at each look, rising, up to 1. A boundary depends on the looks
    before it only, so looks may be added as they come. The last look may be below 1: then some alpha is left.
    """
    times = [float(fraction) for fraction in fractions]
    if not times:
        raise InvalidSample("no looks: give the information fraction of each, such as [0.25, 0.5, 1]")
    if any(later - earlier < _CLOSEST * (1 - 1e-9) for earlier, later in pairwise(times)):
        raise InvalidSample(f"information fractions must rise by at least {_CLOSEST} from look to look: {times}")
    spent = [spent_alpha(time, alpha=alpha, spending=spending) for time in times]
    found: list[float] = []
    places, mass = np.zeros(1), np.ones(1)  # the sum of the data before the first look: 0 for sure
    before, used = 0.0, 0.0
    for time, total in zip(times, spent, strict=True):
        step, share = math.sqrt(time - before), total - used
        bound = math.inf
        if share > _NOTHING:
            bound = _bound(places, mass, step, math.sqrt(time), share)
            used = total
        found.append(bound)
        edge = min(bound, _FAR) * math.sqrt(time)
        nodes, weights = _panels(edge, step)
        density = stats.norm.pdf((nodes[:, None] - places[None, :]) / step) @ mass / step
        places, mass, before = nodes, density * weights, time
    return tuple(found)


_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(16)


def _panels(edge: float, step: float) -> tuple[FloatArray, FloatArray]:
    """Return nodes and weights of an integral over -edge..edge of what varies over distances of step."""
    count = max(8, math.ceil(edge / (1.5 * step)))
    half = edge / count
    middles = -edge + half * (2 * np.arange(count) + 1)
    return (middles[:, None] + half * _NODES).ravel(), np.tile(half * _NODE_WEIGHTS, count)


def _bound(places: FloatArray, mass: FloatArray, step: float, scale: float, share: float) -> float:
    """Return the |z| that takes `share` of the mass that is still in the trial."""

    def over(bound: float) -> float:
        edge = bound * scale
        out = ndtr((places - edge) / step) + ndtr((-edge - places) / step)
        return math.log(max(float(out @ mass), 1e-300)) - math.log(share)

    return float(optimize.brentq(over, 0.0, 2 * _FAR, xtol=1e-12, rtol=1e-12))


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a running comparison: the statistic, the boundary it has to pass, and an interval that stays valid.

    alpha_spent is what all looks up to this one may have used. is_past says whether this look or one before it stops.
    """

    fraction: float
    estimate: float
    z: float
    boundary: float
    alpha_spent: float
    interval: Interval
    is_past: bool


def monitor(
    estimates: Sequence[float],
    standard_errors: Sequence[float],
    fractions: Sequence[float],
    *,
    df: Sequence[float] | None = None,
    alpha: float = 0.05,
    spending: Spending = "obrien-fleming",
) -> tuple[Look, ...]:
    """Return what each look so far may conclude: estimates, their standard errors and information fractions by look.

    The fraction is what was measured over what was planned, such as cases done over cases planned. df are the t
    degrees of freedom of the looks (None: normal); a t is judged as the z of the same p-value.
    """
    if not len(estimates) == len(standard_errors) == len(fractions) == len(df if df is not None else fractions):
        raise InvalidSample("estimates, standard_errors, fractions and df need one value for each look")
    looks: list[Look] = []
    bounds = boundaries(fractions, alpha=alpha, spending=spending)
    for place, (estimate, error, fraction, bound) in enumerate(
        zip(estimates, standard_errors, fractions, bounds, strict=True)
    ):
        if not (error > 0 and math.isfinite(error) and math.isfinite(estimate)):
            raise InvalidSample(f"look {place + 1} has estimate {estimate} and standard error {error}: both are needed")
        freedom = math.inf if df is None else float(df[place])
        statistic = estimate / error
        z = math.copysign(float(stats.norm.isf(stats.t.sf(abs(statistic), freedom))), statistic)
        reach = float(stats.t.isf(stats.norm.sf(bound), freedom)) * error
        looks.append(
            Look(
                fraction=float(fraction),
                estimate=float(estimate),
                z=z,
                boundary=bound,
                alpha_spent=spent_alpha(fraction, alpha=alpha, spending=spending),
                interval=Interval(estimate - reach, estimate + reach, 1 - alpha, REPEATED),
                is_past=abs(z) >= bound or (bool(looks) and looks[-1].is_past),
            )
        )
    return tuple(looks)


@dataclass(frozen=True, slots=True)
class ConfidenceSequence:
    """An interval of the mean after each value, all right at once with the level: mean, low, high of shape (n,)."""

    mean: FloatArray
    low: FloatArray
    high: FloatArray
    level: float
    method: str

    def at(self, n: int) -> Interval:
        """Return the interval after n values."""
        return Interval(float(self.low[n - 1]), float(self.high[n - 1]), self.level, self.method)


def confidence_sequence(
    values: object,
    *,
    best_at: int = 200,
    bounds: tuple[float, float] | None = None,
    level: float = 0.95,
    nan: NanPolicy = "raise",
) -> ConfidenceSequence:
    """Return an always-valid interval of the mean after each of n independent values, such as differences by case.

    bounds=(low, high) between which all values lie gives a sequence that is exact at any n (normal mixture for
    sub-Gaussian means: Robbins 1970; Howard et al. 2021). Without bounds it is asymptotic (Waudby-Smith et al. 2024,
    Annals of Statistics 52, theorem 2.2), infinite for the first 10 values. best_at is the n at which it is narrowest.
    """
    data = sample(values, nan=nan)
    alpha = 1 - level
    _check_alpha(alpha)
    if best_at < 1:
        raise InvalidSample(f"best_at is {best_at}: it is a number of values, from 1")
    count = np.arange(1, len(data) + 1, dtype=np.float64)
    mean = np.cumsum(data) / count
    if bounds is not None:
        least, most = bounds
        if not least < most or data.min() < least or data.max() > most:
            raise InvalidSample(f"values lie between {data.min():g} and {data.max():g}, not within bounds {bounds}")
        spread = np.full(len(data), (most - least) / 2)
        method = "normal mixture for bounded values (Robbins 1970; Howard et al. 2021)"
    else:
        centred = data - data[0]  # so that the squares do not cancel
        variance = np.cumsum(centred**2) / count - (np.cumsum(centred) / count) ** 2
        spread = np.sqrt(np.maximum(variance, 0.0))
        spread[:10] = np.inf
        method = "asymptotic (Waudby-Smith et al. 2024)"
    log = -2 * math.log(alpha)
    rho = (log + math.log(log + 1)) / best_at
    grown = count * rho + 1
    reach = spread * np.sqrt(2 * grown / (count**2 * rho) * np.log(np.sqrt(grown) / alpha))
    low, high = mean - reach, mean + reach
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    return ConfidenceSequence(mean, low, high, level, method)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise InvalidSample(f"alpha is {alpha!r}: it lies between 0 and 1, such as 0.05")
