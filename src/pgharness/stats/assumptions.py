"""Checking what tests assume: normal values, equal variances, spherical repeated measurements.

A check that does not reject proves nothing: small samples hide violations and huge samples make trifles significant.
So `alpha` is a screen, and the note says what was seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from pgharness.stats.results import Assumption, json_safe
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    generator,
    is_constant,
    matrix,
    named_samples,
    sample,
)

SHAPIRO_MOST = 5000


def shapiro_wilk(values: object, *, alpha: float = 0.05, name: str = "values", nan: NanPolicy = "raise") -> Assumption:
    """Check a sample of at least 3 values for normality by Shapiro & Wilk's (1965) W.

    Royston's (1995) p-value holds up to 5000 values; of a larger sample, 5000 are drawn with a fixed seed.
    """
    array = sample(values, name=name, nan=nan, minimum=3)
    if is_constant(array):
        return _not_checked(f"normality of {name}", "Shapiro-Wilk", "constant: normality cannot be checked")
    note = _shape(array)
    if len(array) > SHAPIRO_MOST:
        array = generator(0).choice(array, SHAPIRO_MOST, replace=False)
        note += f"; {SHAPIRO_MOST} values drawn"
    found = stats.shapiro((array - array.mean()) / array.std())
    return Assumption(
        f"normality of {name}",
        "Shapiro-Wilk",
        float(found.statistic),
        float(found.pvalue),
        bool(found.pvalue > alpha),
        note,
    )


def anderson_darling(
    values: object, *, alpha: float = 0.05, name: str = "values", nan: NanPolicy = "raise"
) -> Assumption:
    """Check a sample of at least 8 values for normality by Anderson & Darling's A^2, mean and variance estimated.

    The p-value is Stephens's (1986) for A^2 (1 + 0.75/n + 2.25/n^2), as in R's nortest.
    """
    array = sample(values, name=name, nan=nan, minimum=8)
    if is_constant(array):
        return _not_checked(f"normality of {name}", "Anderson-Darling", "constant: normality cannot be checked")
    n = len(array)
    z = np.sort((array - array.mean()) / array.std(ddof=1))
    weights = 2 * np.arange(1, n + 1) - 1
    statistic = float(-n - (weights * (special.log_ndtr(z) + special.log_ndtr(-z[::-1]))).mean())
    p_value = _stephens(statistic * (1 + 0.75 / n + 2.25 / n**2))
    return Assumption(f"normality of {name}", "Anderson-Darling", statistic, p_value, p_value > alpha, _shape(array))


def dagostino(values: object, *, alpha: float = 0.05, name: str = "values", nan: NanPolicy = "raise") -> Assumption:
    """Check a sample of at least 20 values for normal skewness and kurtosis by D'Agostino & Pearson's (1973) K^2."""
    array = sample(values, name=name, nan=nan, minimum=20)
    if is_constant(array):
        return _not_checked(f"normality of {name}", "D'Agostino-Pearson", "constant: normality cannot be checked")
    found = stats.normaltest((array - array.mean()) / array.std())
    return Assumption(
        f"normality of {name}",
        "D'Agostino-Pearson",
        float(found.statistic),
        float(found.pvalue),
        bool(found.pvalue > alpha),
        _shape(array),
    )


def equal_variances(
    groups: Mapping[Any, object] | Sequence[object],
    *,
    test: Literal["brown-forsythe", "levene", "bartlett"] = "brown-forsythe",
    alpha: float = 0.05,
    nan: NanPolicy = "raise",
) -> Assumption:
    """Check independent groups of at least 2 values for equal variances.

    Brown & Forsythe (1974), distances from medians, is robust and the default; Levene (1960) takes distances from
    means; Bartlett (1937) is the most powerful for normal values and misled by others.
    """
    if test not in _VARIANCE_TESTS:
        raise InvalidSample(f"test is {test!r}: it is one of {', '.join(_VARIANCE_TESTS)}")
    samples = list(named_samples(groups, nan=nan, minimum=2).values())
    sds = [float(one.std(ddof=1)) for one in samples]
    note = f"standard deviations from {min(sds):.3g} to {max(sds):.3g}"
    title = _VARIANCE_TESTS[test]
    constant = [is_constant(one) for one in samples]
    if all(constant):
        return _not_checked("equal variances", title, "all groups are constant: there is no variance to compare")
    if test == "bartlett" and any(constant):
        return Assumption("equal variances", title, math.inf, 0.0, False, f"a group is constant; {note}")
    if test == "bartlett":
        found = stats.bartlett(*samples)
        statistic, p_value = float(found.statistic), float(found.pvalue)
    else:
        centre = np.median if test == "brown-forsythe" else np.mean
        statistic, p_value = _one_way([np.abs(one - centre(one)) for one in samples])
    return Assumption("equal variances", title, statistic, p_value, p_value > alpha, note)


@dataclass(frozen=True, slots=True)
class Sphericity:
    """Mauchly's test and the factors by which the degrees of freedom of repeated measures shrink.

    w, chi2, df and p_value are NaN where the test needs more subjects than conditions and has fewer; is_met is None
    then. greenhouse_geisser and huynh_feldt are in 1/(k-1)..1.
    """

    w: float
    chi2: float
    df: float
    p_value: float
    is_met: bool | None
    greenhouse_geisser: float
    huynh_feldt: float
    note: str = ""

    @property
    def assumption(self) -> Assumption:
        """The test as an assumption of a result."""
        note = f"Greenhouse-Geisser {self.greenhouse_geisser:.3f}, Huynh-Feldt {self.huynh_feldt:.3f}"
        note = f"{note}; {self.note}" if self.note else note
        return Assumption("sphericity", "Mauchly", self.w, self.p_value, self.is_met, note)

    def as_dict(self) -> dict[str, Any]:
        """Return the test as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__dataclass_fields__}


def mauchly(table: object, *, alpha: float = 0.05, nan: NanPolicy = "raise") -> Sphericity:
    """Check repeated measurements for sphericity (Mauchly 1940): all differences of conditions have one variance.

    table has shape (subjects, conditions). Two conditions are always spherical. Huynh & Feldt's (1976) factor has
    Lecoutre's (1991) form for one group, which is the original one, cut at 1.
    """
    values = matrix(table, nan=nan)
    n, k = values.shape
    contrasts = _contrasts(k)
    covariance = np.atleast_2d(contrasts @ np.cov(values, rowvar=False) @ contrasts.T)
    trace = float(np.trace(covariance))
    if trace <= 1e-24 * max(float(np.abs(values).max()) ** 2, 1e-300):
        raise InvalidSample("all subjects differ between conditions by the same amounts: there is no variance to check")
    p = k - 1
    gg = trace**2 / (p * float((covariance**2).sum()))
    below = p * (n - 1 - p * gg)
    hf = min(1.0, (n * p * gg - 2) / below) if below > 0 else 1.0
    if k == 2:
        return Sphericity(1.0, 0.0, 0.0, 1.0, True, 1.0, 1.0, "two conditions are always spherical")
    if n <= p:
        note = f"{n} subjects are too few for Mauchly's test of {k} conditions"
        return Sphericity(math.nan, math.nan, math.nan, math.nan, None, gg, max(hf, gg), note)
    w = float(np.linalg.det(covariance / (trace / p)))
    w = max(w, 0.0)
    df = p * (p + 1) / 2 - 1
    factor = 1 - (2 * p**2 + p + 2) / (6 * p * (n - 1))
    chi2 = -(n - 1) * factor * math.log(w) if w > 0 else math.inf
    p_value = _mauchly_p(chi2, n, p, factor)
    return Sphericity(w, chi2, df, p_value, p_value > alpha, gg, max(hf, gg))


_VARIANCE_TESTS = {"brown-forsythe": "Brown-Forsythe", "levene": "Levene", "bartlett": "Bartlett"}


def _mauchly_p(chi2: float, n: int, p: int, factor: float) -> float:
    """Return Mauchly's p-value with the second term of its expansion (Anderson 2003, section 10.7), as in R."""
    df = p * (p + 1) / 2 - 1
    if math.isinf(chi2):
        return 0.0
    second = (p + 2) * (p - 1) * (p - 2) * (2 * p**3 + 6 * p**2 + 3 * p + 2) / (288 * ((n - 1) * p * factor) ** 2)
    first, later = float(stats.chi2.sf(chi2, df)), float(stats.chi2.sf(chi2, df + 4))
    return min(max(first + second * (later - first), 0.0), 1.0)


def _contrasts(k: int) -> FloatArray:
    """Return k - 1 orthonormal contrasts of k conditions (Helmert's), shape (k - 1, k)."""
    rows = np.zeros((k - 1, k))
    for i in range(1, k):
        rows[i - 1, :i], rows[i - 1, i] = 1.0, -float(i)
        rows[i - 1] /= math.sqrt(i * (i + 1))
    return rows


def _one_way(groups: list[FloatArray]) -> tuple[float, float]:
    """Return F and p of distances that may be constant within groups."""
    everything = np.concatenate(groups)
    df1, df2 = len(groups) - 1, len(everything) - len(groups)
    between = float(sum(len(one) * (one.mean() - everything.mean()) ** 2 for one in groups))
    within = float(sum(((one - one.mean()) ** 2).sum() for one in groups))
    if within <= 1e-24 * float((everything**2).sum()):
        return (0.0, 1.0) if is_constant(everything) else (math.inf, 0.0)
    f = between / df1 / (within / df2)
    return f, float(stats.f.sf(f, df1, df2))


def _stephens(a: float) -> float:
    if a < 0.2:
        return 1 - math.exp(-13.436 + 101.14 * a - 223.73 * a**2)
    if a < 0.34:
        return 1 - math.exp(-8.318 + 42.796 * a - 59.938 * a**2)
    if a < 0.6:
        return math.exp(0.9177 - 4.279 * a - 1.38 * a**2)
    if a < 10:
        return math.exp(1.2937 - 5.709 * a + 0.0186 * a**2)
    return 3.7e-24


def _shape(array: FloatArray) -> str:
    z = (array - array.mean()) / array.std()
    return f"skewness {float((z**3).mean()):.2f}, excess kurtosis {float((z**4).mean() - 3):.2f}"


def _not_checked(name: str, test: str, note: str) -> Assumption:
    return Assumption(name, test, math.nan, math.nan, None, note)
