"""Tests of two groups, independent or paired. Estimates are first minus second.

Samples without any variation are not tested: equal constants give p = 1 with a warning, different constants are
refused, because a test that estimates the variation from the data has none to go by.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import special, stats

from pgharness.stats.effects import (
    cliff_delta,
    clopper_pearson,
    cohen_d,
    cohen_dz,
    hedges_g,
    matched_rank_biserial,
    rank_balance,
)
from pgharness.stats.results import Alternative, Effect, Interval, Result
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    describe,
    differences_are_constant,
    differences_of,
    is_constant,
    pairs,
    sample,
)
from pgharness.stats.shifts import (
    exact_rank_sum_is_cheap,
    median_interval,
    rank_sum_p,
    shift_of_groups,
    shift_of_pairs,
    signed_rank_p,
)

NAMES = ("first", "second")
_EXACT_PAIRS = 50
_NO_VARIATION = "all values are equal: nothing varies, so p = 1 by definition"


def student_t(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test two independent groups of equal variance for equal means (Student 1908), at least 2 values each."""
    one, two = _independent(first, second, alternative, alpha, names, nan, 2)
    details = dict(test="Student t test", method="Student (1908), Biometrika 6", alternative=alternative, alpha=alpha)
    if (flat := _constant(one, two, names, "t", details)) is not None:
        return flat
    df = len(one) + len(two) - 2
    pooled = ((len(one) - 1) * one.var(ddof=1) + (len(two) - 1) * two.var(ddof=1)) / df
    error = math.sqrt(pooled * (1 / len(one) + 1 / len(two)))
    return _t_result(one, two, error, df, names, cohen_d(one, two, level=1 - alpha), details)


def welch_t(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test two independent groups for equal means, whatever their variances (Welch 1947), at least 2 values each."""
    one, two = _independent(first, second, alternative, alpha, names, nan, 2)
    details = dict(test="Welch t test", method="Welch (1947), Biometrika 34", alternative=alternative, alpha=alpha)
    if (flat := _constant(one, two, names, "t", details)) is not None:
        return flat
    parts = one.var(ddof=1) / len(one), two.var(ddof=1) / len(two)
    shares = parts[0] / sum(parts), parts[1] / sum(parts)  # squares of tiny variances would be 0
    df = 1 / (shares[0] ** 2 / (len(one) - 1) + shares[1] ** 2 / (len(two) - 1))
    return _t_result(one, two, math.sqrt(sum(parts)), df, names, hedges_g(one, two, level=1 - alpha), details)


def paired_t(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test pairs for a mean difference of 0 (Student 1908), at least 2 pairs."""
    one, two = _paired(first, second, alternative, alpha, names, nan, 2)
    details = dict(test="Paired t test", method="Student (1908), Biometrika 6", alternative=alternative, alpha=alpha)
    if (flat := _constant_differences(one, two, names, "t", details)) is not None:
        return flat
    error = float((one - two).std(ddof=1)) / math.sqrt(len(one))
    return _t_result(one, two, error, len(one) - 1, names, cohen_dz(one, two, level=1 - alpha), details, n=len(one))


def mann_whitney(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test two independent groups for one tending to larger values (Mann & Whitney 1947), at least 2 values each.

    Exact for small samples (up to about 80 values in all), ties included: all arrangements of the ranks are counted.
    Else the normal approximation with corrections for ties and continuity. The estimate is the Hodges-Lehmann shift,
    meaningful if the groups differ by a shift alone.
    """
    one, two = _independent(first, second, alternative, alpha, names, nan, 2)
    details: dict[str, Any] = dict(test="Mann-Whitney U test", alternative=alternative, alpha=alpha)
    method = "Mann & Whitney (1947), Annals of Mathematical Statistics 18"
    described = (describe(names[0], one), describe(names[1], two))
    if is_constant(both := np.concatenate((one, two))):
        statistic = len(one) * len(two) / 2
        return Result(
            statistic=statistic,
            statistic_name="U",
            p_value=1.0,
            n=(len(one), len(two)),
            groups=described,
            warnings=(_NO_VARIATION,),
            method=method,
            **details,
        )
    ranks = stats.rankdata(both)
    statistic = float(ranks[: len(one)].sum()) - len(one) * (len(one) + 1) / 2
    if exact_rank_sum_is_cheap(len(one), len(two)):
        p_value, how = rank_sum_p(ranks, len(one), alternative), "exact, given the ties"
    else:
        p_value = float(stats.mannwhitneyu(one, two, alternative=alternative, method="asymptotic").pvalue)
        how = "normal approximation with continuity and tie correction"
    estimate, interval = shift_of_groups(one, two, 1 - alpha, alternative)
    return Result(
        statistic=statistic,
        statistic_name="U",
        p_value=p_value,
        n=(len(one), len(two)),
        estimate=estimate,
        estimate_name="Hodges-Lehmann shift",
        interval=interval,
        effect=cliff_delta(one, two, level=1 - alpha),
        groups=described,
        method=f"{method}; {how}",
        warnings=_unreachable(_arrangements(len(one), len(two)), alternative, alpha),
        **details,
    )


def wilcoxon_signed_rank(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    zeros: str = "wilcox",
    shift: bool = True,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test pairs for differences that are symmetric about 0 (Wilcoxon 1945), at least 1 pair that differs.

    zeros is what happens to equal pairs: "wilcox" leaves them out, "pratt" (1959) ranks them and drops their ranks.
    Exact up to 50 pairs, ties and zeros included: all signs of the ranks are counted. Else the normal approximation
    with the tie correction. The statistic is the sum of the ranks of positive differences. shift=False leaves out the
    estimate and its interval, which take most of the time in large samples.
    """
    one, two = _paired(first, second, alternative, alpha, names, nan, 1)
    if zeros not in ("wilcox", "pratt"):
        raise InvalidSample(f'zeros is {zeros!r}: it is "wilcox" (left out) or "pratt" (ranked, then dropped)')
    details: dict[str, Any] = dict(test="Wilcoxon signed-rank test", alternative=alternative, alpha=alpha)
    details |= dict(statistic_name="W", n=len(one), groups=(describe(names[0], one), describe(names[1], two)))
    method = "Wilcoxon (1945), Biometrics Bulletin 1" + ("; zeros by Pratt (1959)" if zeros == "pratt" else "")
    differences = differences_of(one, two)
    kept = differences[differences != 0]
    if len(kept) == 0:
        note = "all pairs are equal, so p = 1 by definition"
        return Result(statistic=0.0, p_value=1.0, warnings=(note,), method=method, **details)
    ranks = stats.rankdata(np.abs(differences))[differences != 0] if zeros == "pratt" else stats.rankdata(np.abs(kept))
    statistic = float(ranks[kept > 0].sum())
    if len(kept) <= _EXACT_PAIRS:
        p_value, how = signed_rank_p(ranks, statistic, alternative), "exact, given the ties"
    else:
        z = (statistic - ranks.sum() / 2) / math.sqrt((ranks**2).sum() / 4)
        p_value, how = t_tails(z, math.inf, alternative), "normal approximation with tie correction"
    estimate, interval = shift_of_pairs(kept, 1 - alpha, alternative) if shift else (None, None)
    warnings = _unreachable(2.0 ** min(len(kept), 1000), alternative, alpha)
    if len(kept) < len(one):
        note = f"{len(one) - len(kept)} of {len(one)} pairs are equal" + (" and left out" if zeros == "wilcox" else "")
        warnings = (*warnings, note)
    return Result(
        statistic=statistic,
        p_value=p_value,
        estimate=estimate,
        estimate_name="Hodges-Lehmann pseudomedian",
        interval=interval,
        effect=matched_rank_biserial(one, two) if zeros == "pratt" else rank_balance(statistic, float(ranks.sum())),
        warnings=warnings,
        method=f"{method}; {how}",
        **details,
    )


def sign_test(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test pairs for as many positive as negative differences (Arbuthnot 1710): exact, equal pairs are left out.

    The statistic is the number of positive differences; the estimate is the median difference over all pairs.
    """
    one, two = _paired(first, second, alternative, alpha, names, nan, 1)
    differences = differences_of(one, two)
    positive, negative = int((differences > 0).sum()), int((differences < 0).sum())
    warnings: tuple[str, ...] = ()
    p_value, effect = 1.0, None
    if positive + negative == 0:
        warnings = ("all pairs are equal, so p = 1 by definition",)
    else:
        found = stats.binomtest(positive, positive + negative, 0.5, alternative=alternative)
        p_value = float(found.pvalue)
        ends = clopper_pearson(positive, positive + negative, 1 - alpha)
        effect = Effect(
            "proportion",
            positive / (positive + negative),
            Interval(*ends, 1 - alpha, "Clopper-Pearson"),
        )
        warnings = _unreachable(2.0 ** min(positive + negative, 1000), alternative, alpha)
        if len(one) > positive + negative:
            warnings = (*warnings, f"{len(one) - positive - negative} of {len(one)} pairs are equal and left out")
    return Result(
        test="Sign test",
        statistic=float(positive),
        statistic_name="S",
        p_value=p_value,
        n=len(one),
        estimate=float(np.median(differences)),
        estimate_name="median difference",
        interval=median_interval(differences, 1 - alpha, alternative),
        effect=effect,
        alternative=alternative,
        alpha=alpha,
        groups=(describe(names[0], one), describe(names[1], two)),
        warnings=warnings,
        method="Dixon & Mood (1946), JASA 41; exact binomial",
    )


def brunner_munzel(
    first: object,
    second: object,
    *,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: tuple[str, str] = NAMES,
    nan: NanPolicy = "raise",
) -> Result:
    """Test two independent groups for P(first > second) + P(equal) / 2 = 1/2, whatever their shapes and variances.

    Brunner & Munzel (2000) with t and its approximate degrees of freedom; below about 10 values in a group
    `permutation_test` is safer. Groups that do not overlap leave the test no variance: refused.
    """
    one, two = _independent(first, second, alternative, alpha, names, nan, 2)
    details: dict[str, Any] = dict(test="Brunner-Munzel test", statistic_name="t", alternative=alternative, alpha=alpha)
    details |= dict(n=(len(one), len(two)), groups=(describe(names[0], one), describe(names[1], two)))
    method = "Brunner & Munzel (2000), Biometrical Journal 42"
    if is_constant(np.concatenate((one, two))):
        return Result(statistic=0.0, p_value=1.0, warnings=(_NO_VARIATION,), method=method, **details)
    ranks = stats.rankdata(np.concatenate((one, two)))
    n1, n2 = len(one), len(two)
    placements = (ranks[:n1] - stats.rankdata(one)) / n2, (ranks[n1:] - stats.rankdata(two)) / n1
    variances = placements[0].var(ddof=1) / n1, placements[1].var(ddof=1) / n2
    if sum(variances) <= 1e-15:
        raise InvalidSample(
            f"{names[0]} and {names[1]} do not overlap, so the Brunner-Munzel test has no variance to go by: "
            "use mann_whitney or permutation_test"
        )
    df = sum(variances) ** 2 / (variances[0] ** 2 / (n1 - 1) + variances[1] ** 2 / (n2 - 1))
    probability = float(placements[0].mean())
    error = math.sqrt(sum(variances))
    statistic = (probability - 0.5) / error
    p_value = t_tails(statistic, df, alternative)
    half = t_reach(df, alpha, alternative) * error
    low = max(probability - half, 0.0) if alternative != "less" else 0.0
    high = min(probability + half, 1.0) if alternative != "greater" else 1.0
    few = ("a group has fewer than 10 values: permutation_test is safer",) if min(n1, n2) < 10 else ()
    return Result(
        statistic=statistic,
        df=float(df),
        p_value=p_value,
        estimate=probability,
        estimate_name="common-language effect",
        interval=Interval(low, high, 1 - alpha, "Brunner-Munzel t"),
        effect=cliff_delta(one, two, level=1 - alpha),
        warnings=few,
        method=method,
        **details,
    )


# -- shared


def check_options(alternative: str, alpha: float) -> None:
    """Refuse an alternative or an alpha that no test has."""
    if alternative not in ("two-sided", "less", "greater"):
        raise InvalidSample(f'alternative is {alternative!r}: it is "two-sided", "less" or "greater"')
    if not 0 < alpha < 1:
        raise InvalidSample(f"alpha is {alpha}: it is between 0 and 1, such as 0.05")


def _independent(
    first: object, second: object, alternative: str, alpha: float, names: tuple[str, str], nan: NanPolicy, minimum: int
) -> tuple[FloatArray, FloatArray]:
    check_options(alternative, alpha)
    return (
        sample(first, name=names[0], nan=nan, minimum=minimum),
        sample(second, name=names[1], nan=nan, minimum=minimum),
    )


def _paired(
    first: object, second: object, alternative: str, alpha: float, names: tuple[str, str], nan: NanPolicy, minimum: int
) -> tuple[FloatArray, FloatArray]:
    check_options(alternative, alpha)
    return pairs(first, second, names=names, nan=nan, minimum=minimum)


def _constant(
    one: FloatArray, two: FloatArray, names: tuple[str, str], statistic_name: str, details: dict[str, Any]
) -> Result | None:
    if not (is_constant(one) and is_constant(two)):
        return None
    if not is_constant(np.concatenate((one, two))):
        raise InvalidSample(
            f"{names[0]} is always {one[0]:g} and {names[1]} always {two[0]:g}: without variation a t test has nothing "
            "to go by; use permutation_test or, for yes-no outcomes, fisher_exact"
        )
    described = (describe(names[0], one), describe(names[1], two))
    return Result(
        statistic=0.0,
        statistic_name=statistic_name,
        df=float(len(one) + len(two) - 2),
        p_value=1.0,
        n=(len(one), len(two)),
        estimate=0.0,
        estimate_name="mean difference",
        groups=described,
        warnings=(_NO_VARIATION,),
        **details,
    )


def _constant_differences(
    one: FloatArray, two: FloatArray, names: tuple[str, str], statistic_name: str, details: dict[str, Any]
) -> Result | None:
    if not differences_are_constant(one, two):
        return None
    if differences_of(one, two).any():
        raise InvalidSample(
            f"{names[0]} and {names[1]} differ by {float((one - two)[0]):g} in every pair: without variation a paired "
            "t test has nothing to go by; use sign_test or permutation_test"
        )
    described = (describe(names[0], one), describe(names[1], two))
    return Result(
        statistic=0.0,
        statistic_name=statistic_name,
        df=float(len(one) - 1),
        p_value=1.0,
        n=len(one),
        estimate=0.0,
        estimate_name="mean difference",
        groups=described,
        warnings=("all pairs are equal, so p = 1 by definition",),
        **details,
    )


def _t_result(
    one: FloatArray,
    two: FloatArray,
    error: float,
    df: float,
    names: tuple[str, str],
    effect: Effect,
    details: dict[str, Any],
    n: int | None = None,
) -> Result:
    alternative, alpha = details["alternative"], float(details["alpha"])
    estimate = float(one.mean() - two.mean())
    half = t_reach(df, alpha, alternative) * error
    low = estimate - half if alternative != "less" else -math.inf
    high = estimate + half if alternative != "greater" else math.inf
    return Result(
        statistic=estimate / error,
        statistic_name="t",
        df=float(df),
        p_value=t_tails(estimate / error, df, alternative),
        n=(len(one), len(two)) if n is None else n,
        estimate=estimate,
        estimate_name="mean difference",
        interval=Interval(low, high, 1 - alpha, "t"),
        effect=effect,
        groups=(describe(names[0], one), describe(names[1], two)),
        **details,
    )


def t_tails(t: float, df: float, alternative: Alternative) -> float:
    """Return the p-value of a t statistic."""
    if alternative == "two-sided":
        return 2 * float(special.stdtr(df, -abs(t)))
    return float(special.stdtr(df, t if alternative == "less" else -t))


def t_reach(df: float, alpha: float, alternative: Alternative) -> float:
    """Return how many standard errors an interval of level 1 - alpha reaches to each side, or to its one side."""
    return -float(special.stdtrit(df, alpha / 2 if alternative == "two-sided" else alpha))


def _arrangements(n1: int, n2: int) -> float:
    return float(math.comb(n1 + n2, n1)) if n1 + n2 <= 1000 else math.inf


def _unreachable(arrangements: float, alternative: Alternative, alpha: float) -> tuple[str, ...]:
    """Warn if even the most extreme data could not reach alpha."""
    least = (2 if alternative == "two-sided" else 1) / arrangements
    if least <= alpha:
        return ()
    return (f"with so few values no outcome gives p below {least:.2g}: collect more",)
