"""What every statistical function returns: the numbers, how they were made, and a sentence that a paper could print.

A result is a value: it holds no data and computes nothing but its own presentation. A number that could not be
computed is never silently NaN: the function that made the result either refused, or says why in `warnings`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

Alternative = Literal["two-sided", "less", "greater"]
"""What the estimate is if the null hypothesis is false: different from it, less than it, or greater."""

# Statistics that cannot exceed 1: written without a zero before the point (APA 7th ed., section 6.36).
_BOUNDED = frozenset(
    {
        "p",
        "r",
        "rho",
        "tau",
        "eta2",
        "partial eta2",
        "epsilon2",
        "omega2",
        "kappa",
        "alpha",
        "ICC",
        "phi",
        "Cramer V",
        "Kendall W",
        "Cliff delta",
        "rank-biserial r",
        "common-language effect",
        "risk difference",
        "proportion",
        "difference of proportions",
        "Shapiro W",
        "AUC",
    }
)


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval estimate: `level` is its confidence (or credible mass), in 0..1; one side of it may be infinite."""

    low: float
    high: float
    level: float = 0.95
    method: str = ""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    @property
    def width(self) -> float:
        """The distance between the two ends."""
        return self.high - self.low

    def as_dict(self) -> dict[str, Any]:
        """Return the interval as JSON-safe values; an infinite end is None."""
        return _fields_of(self)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A quantity estimated from data, in the data's units, without a test: n is how many units it rests on."""

    name: str
    value: float
    standard_error: float
    interval: Interval
    n: int | tuple[int, ...]
    method: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def apa(self) -> str:
        """The estimate with its interval, as a paper would print it."""
        return apa_estimate(self.name, self.value, self.interval)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as JSON-safe values, with its sentence."""
        return {**_fields_of(self), "apa": self.apa}


@dataclass(frozen=True, slots=True)
class Effect:
    """How large an effect is: a standardised value, its interval, and a conventional word for it with its source."""

    name: str
    value: float
    interval: Interval | None = None
    magnitude: str | None = None
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the effect as JSON-safe values."""
        return _fields_of(self)


@dataclass(frozen=True, slots=True)
class Assumption:
    """One assumption of a test, how it was checked, and whether it is met (None: it could not be checked)."""

    name: str
    test: str
    statistic: float
    p_value: float
    is_met: bool | None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the check as JSON-safe values."""
        return _fields_of(self)


@dataclass(frozen=True, slots=True)
class Group:
    """One group's description: sd has n - 1 in its denominator and is NaN for a single value."""

    name: str
    n: int
    mean: float
    sd: float
    median: float

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON-safe values."""
        return _fields_of(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two groups of several, compared: p_value is adjusted for all the comparisons that were made together.

    difference is first minus second, in the units of the post-hoc test (means or mean ranks).
    """

    first: str
    second: str
    difference: float
    statistic: float
    p_value: float
    df: float | None = None
    interval: Interval | None = None
    effect: Effect | None = None

    def is_significant(self, alpha: float = 0.05) -> bool:
        """Say whether the adjusted p-value is below alpha."""
        return self.p_value < alpha

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-safe values."""
        return _fields_of(self)


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one hypothesis test.

    statistic_name is how the statistic is written ("t", "F", "U", "chi2", "z", ...). df is None where the test has no
    degrees of freedom, two numbers for F. estimate is in the units of the data and named by estimate_name; interval is
    its interval. n is one number, or one for each group. method cites where the procedure comes from. comparisons are
    pairs of groups, for post-hoc tests.
    """

    test: str
    statistic: float
    statistic_name: str
    p_value: float
    n: int | tuple[int, ...]
    df: float | tuple[float, float] | None = None
    estimate: float | None = None
    estimate_name: str = ""
    interval: Interval | None = None
    effect: Effect | None = None
    alternative: Alternative = "two-sided"
    alpha: float = 0.05
    groups: tuple[Group, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    assumptions: tuple[Assumption, ...] = ()
    warnings: tuple[str, ...] = ()
    method: str = ""

    def is_significant(self, alpha: float | None = None) -> bool:
        """Say whether the p-value is below alpha, by default the result's own."""
        return self.p_value < (self.alpha if alpha is None else alpha)

    @property
    def apa(self) -> str:
        """The result as a sentence in the style of the APA's Publication Manual (7th ed.), without italics."""
        level = apa_number(self.alpha, bounded=True, digits=2 if round(self.alpha, 2) == self.alpha else 3)
        verdict = "the result was significant at" if self.is_significant() else "the result did not reach"
        parts = [f"{self.test} ({_described(self.groups)})" if self.groups else self.test]
        parts[0] += f": {verdict} the {level} level"
        if self.statistic_name != self.estimate_name:  # else it comes with its interval
            parts.append(apa_statistic(self.statistic_name, self.statistic, self.df, self.n))
        parts.append(apa_p(self.p_value) + ("" if self.alternative == "two-sided" else " (one-sided)"))
        if self.estimate is not None and self.estimate_name:
            parts.append(apa_estimate(self.estimate_name, self.estimate, self.interval))
        if self.effect is not None:
            parts.append(apa_estimate(self.effect.name, self.effect.value, self.effect.interval))
        return ", ".join(parts) + "."

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON-safe values, with its sentence; NaN and infinities are None."""
        return {**_fields_of(self), "apa": self.apa}


def apa_number(value: float, *, bounded: bool = False, digits: int = 2) -> str:
    """Write a number with so many decimals; one that cannot exceed 1 without the zero before its point."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    places = digits
    if value != 0 and abs(value) < 0.1 and not bounded:
        places = digits - 1 - math.floor(math.log10(abs(value)))  # two digits that mean something
        if places > 6:
            return f"{value:.{digits - 1}e}"
    text = f"{value:.{places}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    if bounded and abs(float(text)) < 1:
        text = text.replace("0.", ".", 1)
    return text


def apa_p(p_value: float) -> str:
    """Write a p-value: exact to three decimals, "p < .001" below that."""
    if math.isnan(p_value):
        return "p undefined"
    if p_value < 0.001:
        return "p < .001"
    if p_value > 0.999:
        return "p > .999"
    return f"p = {apa_number(p_value, bounded=True, digits=3)}"


def apa_statistic(
    name: str, value: float, df: float | tuple[float, float] | None = None, n: int | tuple[int, ...] = 0
) -> str:
    """Write a statistic with its degrees of freedom: t(9) = 2.26, F(2, 27) = 3.35, chi2(1, N = 40) = 3.84."""
    number = apa_number(value, bounded=name in _BOUNDED)
    if df is None:
        return f"{name} = {number}"
    inside = ", ".join(_apa_df(one) for one in (df if isinstance(df, tuple) else (df,)))
    if name == "chi2":
        inside += f", N = {n if isinstance(n, int) else sum(n)}"
    return f"{name}({inside}) = {number}"


def apa_estimate(name: str, value: float, interval: Interval | None = None) -> str:
    """Write an estimate with its interval: mean difference = 0.07, 95% CI [0.05, 0.09]."""
    bounded = name in _BOUNDED
    text = f"{name} = {apa_number(value, bounded=bounded)}"
    if interval is None:
        return text
    ends = ", ".join(apa_number(end, bounded=bounded) for end in (interval.low, interval.high))
    return f"{text}, {interval.level * 100:g}% CI [{ends}]"


def _apa_df(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.2f}"


def _described(groups: tuple[Group, ...]) -> str:
    return "; ".join(f"{group.name}: M = {apa_number(group.mean)}, SD = {apa_number(group.sd)}" for group in groups)


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: json_safe(getattr(value, field.name)) for field in fields(value)}


def json_safe(value: Any) -> Any:
    """Return a value as JSON can hold it: dataclasses are objects, tuples lists, NaN and infinities None."""
    if is_dataclass(value) and not isinstance(value, type):
        return value.as_dict() if hasattr(value, "as_dict") else _fields_of(value)
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        return json_safe(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
