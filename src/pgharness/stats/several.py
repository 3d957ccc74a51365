"""Tests of three or more groups at once, independent or measured on the same subjects.

They say whether any groups differ, not which: that is for the post-hoc comparisons of `posthoc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import special, stats

from pgharness.stats.assumptions import mauchly
from pgharness.stats.effects import magnitude, omega2, partial_eta2, rank_epsilon2
from pgharness.stats.groups import check_options
from pgharness.stats.results import Effect, Group, Result
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    describe,
    is_constant,
    matrix,
    named_samples,
)

Groups = Mapping[Any, object] | Sequence[object]
_EQUAL = "all values are equal: nothing varies, so p = 1 by definition"


def one_way_anova(
    groups: Groups, *, alpha: float = 0.05, names: Sequence[str] | None = None, nan: NanPolicy = "raise"
) -> Result:
    """Test independent groups of equal variance for equal means (Fisher 1925), each of at least 2 values."""
    samples = _independent(groups, alpha, names, nan)
    n, k = sum(map(len, samples.values())), len(samples)
    details = _details("One-way ANOVA", "F", samples, alpha, "Fisher (1925)")
    details["df"] = (float(k - 1), float(n - k))
    everything = np.concatenate(list(samples.values()))
    if is_constant(everything):
        return Result(statistic=0.0, p_value=1.0, warnings=(_EQUAL,), **details)
    _refuse_constants(samples, every=True)
    centre = everything.mean()
    between = float(sum(len(one) * (one.mean() - centre) ** 2 for one in samples.values()))
    within = float(sum(((one - one.mean()) ** 2).sum() for one in samples.values()))
    f = between / (k - 1) / (within / (n - k))
    return Result(
        statistic=f, p_value=float(special.fdtrc(k - 1, n - k, f)), effect=omega2(samples, level=1 - alpha), **details
    )


def welch_anova(
    groups: Groups, *, alpha: float = 0.05, names: Sequence[str] | None = None, nan: NanPolicy = "raise"
) -> Result:
    """Test independent groups for equal means, whatever their variances (Welch 1951), each of at least 2 values."""
    samples = _independent(groups, alpha, names, nan)
    k = len(samples)
    details = _details("Welch ANOVA", "F", samples, alpha, "Welch (1951), Biometrika 38")
    if is_constant(np.concatenate(list(samples.values()))):
        df2 = float(sum(map(len, samples.values())) - k)
        return Result(statistic=0.0, p_value=1.0, df=(k - 1.0, df2), warnings=(_EQUAL,), **details)
    _refuse_constants(samples, every=False)
    sizes = np.array([len(one) for one in samples.values()], dtype=np.float64)
    means = np.array([one.mean() for one in samples.values()])
    variances = np.array([one.var(ddof=1) for one in samples.values()])
    weights = sizes / variances
    shares = weights / weights.sum()
    lost = float(((1 - shares) ** 2 / (sizes - 1)).sum())
    centre = float((shares * means).sum())
    above = float((weights * (means - centre) ** 2).sum()) / (k - 1)
    f = above / (1 + 2 * (k - 2) / (k**2 - 1) * lost)
    df2 = (k**2 - 1) / (3 * lost)
    return Result(
        statistic=f,
        df=(k - 1.0, df2),
        p_value=float(special.fdtrc(k - 1, df2, f)),
        effect=omega2(samples, level=1 - alpha),
        **details,
    )


def kruskal_wallis(
    groups: Groups, *, alpha: float = 0.05, names: Sequence[str] | None = None, nan: NanPolicy = "raise"
) -> Result:
    """Test independent groups for one tending to larger values, by ranks (Kruskal & Wallis 1952), ties corrected."""
    samples = _independent(groups, alpha, names, nan, minimum=1)
    n, k = sum(map(len, samples.values())), len(samples)
    details = _details("Kruskal-Wallis test", "H", samples, alpha, "Kruskal & Wallis (1952), JASA 47")
    details["df"] = float(k - 1)
    if is_constant(np.concatenate(list(samples.values()))):
        return Result(statistic=0.0, p_value=1.0, warnings=(_EQUAL,), **details)
    found = stats.kruskal(*samples.values())
    h = float(found.statistic)
    few = ("a group has fewer than 5 values: the chi-squared approximation is rough",)
    return Result(
        statistic=h,
        p_value=float(found.pvalue),
        effect=rank_epsilon2(h, n),
        warnings=few if min(map(len, samples.values())) < 5 else (),
        **details,
    )


def repeated_measures_anova(
    table: object,
    *,
    correction: Literal["greenhouse-geisser", "huynh-feldt", "none"] = "greenhouse-geisser",
    alpha: float = 0.05,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
) -> Result:
    """Test conditions measured on the same subjects for equal means (Fisher 1925).

    table has shape (subjects, conditions). The degrees of freedom shrink by the correction's factor for lack of
    sphericity; "none" trusts it. Mauchly's test is reported, but does not decide: a small sample hides a violation.
    """
    values, titles = _repeated(table, alpha, names, nan)
    if correction not in ("greenhouse-geisser", "huynh-feldt", "none"):
        raise InvalidSample(f'correction is {correction!r}: it is "greenhouse-geisser", "huynh-feldt" or "none"')
    n, k = values.shape
    groups = tuple(describe(title, column) for title, column in zip(titles, values.T, strict=True))
    details: dict[str, Any] = dict(statistic_name="F", n=n, alpha=alpha, groups=groups)
    centred = values - values.mean(axis=1, keepdims=True)
    effects = centred.mean(axis=0)
    between = n * float((effects**2).sum())
    residual = float(((centred - effects) ** 2).sum())
    scale = 1e-24 * max(float((values**2).sum()), 1e-300)
    if residual <= scale and between <= scale:
        note = "no subject differs between conditions, so p = 1 by definition"
        return Result(
            test="Repeated-measures ANOVA",
            statistic=0.0,
            df=(k - 1.0, (k - 1.0) * (n - 1)),
            p_value=1.0,
            warnings=(note,),
            method="Fisher (1925)",
            **details,
        )
    if residual <= scale:
        raise InvalidSample(
            "all subjects differ between conditions by the same amounts: without variation there is nothing to test "
            "against; use friedman"
        )
    sphericity = mauchly(values, alpha=alpha)
    factor = {"none": 1.0, "greenhouse-geisser": sphericity.greenhouse_geisser}.get(correction, sphericity.huynh_feldt)
    df1, df2 = float(k - 1), float((k - 1) * (n - 1))
    f = between / df1 / (residual / df2)
    title = "Repeated-measures ANOVA" + ("" if correction == "none" or k == 2 else f", {correction.title()} corrected")
    return Result(
        test=title,
        statistic=f,
        df=(df1 * factor, df2 * factor),
        p_value=float(special.fdtrc(df1 * factor, df2 * factor, f)),
        effect=partial_eta2(f, df1, df2, level=1 - alpha),
        assumptions=(sphericity.assumption,),
        method="Fisher (1925); Greenhouse & Geisser (1959), Psychometrika 24; Huynh & Feldt (1976)",
        **details,
    )


def friedman(
    table: object, *, alpha: float = 0.05, names: Sequence[str] | None = None, nan: NanPolicy = "raise"
) -> Result:
    """Test conditions measured on the same subjects for one tending to larger values, by ranks within subjects.

    table has shape (subjects, conditions); Friedman (1937) with the correction for ties. The effect is Kendall's W.
    """
    values, titles = _repeated(table, alpha, names, nan)
    n, k = values.shape
    groups = tuple(describe(title, column) for title, column in zip(titles, values.T, strict=True))
    details: dict[str, Any] = dict(test="Friedman test", statistic_name="chi2", df=float(k - 1), n=n, alpha=alpha)
    details |= dict(groups=groups, method="Friedman (1937), JASA 32")
    ranks = stats.rankdata(values, axis=1)
    spread = float((ranks**2).sum()) - n * k * (k + 1) ** 2 / 4
    if spread <= 0:
        note = "no subject differs between conditions, so p = 1 by definition"
        return Result(statistic=0.0, p_value=1.0, warnings=(note,), **details)
    sums = ranks.sum(axis=0)
    chi2 = float((k - 1) * ((sums - n * (k + 1) / 2) ** 2).sum() / spread)
    word, source = magnitude("r", value := chi2 / (n * (k - 1)))
    few = () if n * k > 24 else (f"{n} subjects x {k} conditions: the chi-squared approximation is rough",)
    return Result(
        statistic=chi2,
        p_value=float(special.chdtrc(k - 1, chi2)),
        warnings=few,
        effect=Effect("Kendall W", value, None, word, source),
        **details,
    )


def _independent(
    groups: Groups, alpha: float, names: Sequence[str] | None, nan: NanPolicy, minimum: int = 2
) -> dict[str, FloatArray]:
    check_options("two-sided", alpha)
    return named_samples(groups, names=names, nan=nan, minimum=minimum)


def _repeated(table: object, alpha: float, names: Sequence[str] | None, nan: NanPolicy) -> tuple[FloatArray, list[str]]:
    check_options("two-sided", alpha)
    values = matrix(table, nan=nan)
    titles = [f"condition {number}" for number in range(1, values.shape[1] + 1)] if names is None else list(names)
    if len(titles) != values.shape[1]:
        raise InvalidSample(f"{len(titles)} names for {values.shape[1]} conditions: give one name for each condition")
    return values, titles


def _details(
    test: str, statistic_name: str, samples: dict[str, FloatArray], alpha: float, method: str
) -> dict[str, Any]:
    groups: tuple[Group, ...] = tuple(describe(name, one) for name, one in samples.items())
    sizes = tuple(len(one) for one in samples.values())
    return dict(test=test, statistic_name=statistic_name, n=sizes, alpha=alpha, groups=groups, method=method)


def _refuse_constants(samples: dict[str, FloatArray], *, every: bool) -> None:
    constant = [name for name, one in samples.items() if is_constant(one)]
    if (len(constant) == len(samples)) if every else constant:
        raise InvalidSample(
            f"{', '.join(constant)}: constant, so there is no variation to go by; use kruskal_wallis"
            + (" or, for yes-no outcomes, chi_squared" if every else " or one_way_anova")
        )
