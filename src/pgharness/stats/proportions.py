"""Tests and intervals of yes-no outcomes: independent groups, pairs, and several conditions on the same cases.

Tables have one row for each group and the outcome that is counted in the first column; `outcome_table` and
`paired_table` make them from 0/1 samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import special, stats
from scipy.stats import contingency

from pgharness.stats.effects import clopper_pearson, cohen_h, cramer_v, magnitude, risk_difference, wilson
from pgharness.stats.groups import check_options
from pgharness.stats.results import Alternative, Assumption, Effect, Estimate, Interval, Result
from pgharness.stats.samples import (
    IntArray,
    InvalidSample,
    NanPolicy,
    Rng,
    binary,
    counts,
    generator,
    matrix,
    named_samples,
    pairs,
)

ProportionMethod = Literal["wilson", "exact", "jeffreys", "agresti-coull"]
_PROPORTION_METHODS = {
    "wilson": "Wilson (1927), JASA 22",
    "exact": "Clopper & Pearson (1934), Biometrika 26",
    "jeffreys": "Brown, Cai & DasGupta (2001), Statistical Science 16",
    "agresti-coull": "Agresti & Coull (1998), American Statistician 52",
}


def outcome_table(groups: Mapping[Any, object] | Sequence[object], *, nan: NanPolicy = "raise") -> IntArray:
    """Return the table of independent 0/1 samples, shape (groups, 2): how many 1, how many 0."""
    samples = {name: binary(one, name=name) for name, one in named_samples(groups, nan=nan).items()}
    return np.array([[int(one.sum()), len(one) - int(one.sum())] for one in samples.values()], dtype=np.intp)


def paired_table(
    first: object, second: object, *, names: tuple[str, str] = ("first", "second"), nan: NanPolicy = "raise"
) -> IntArray:
    """Return the table of paired 0/1 samples: [[both 1, first alone], [second alone, neither]]."""
    one, two = pairs(first, second, names=names, nan=nan)
    one, two = binary(one, name=names[0]), binary(two, name=names[1])
    cells = [[one * two, one * (1 - two)], [(1 - one) * two, (1 - one) * (1 - two)]]
    return np.array([[int(cell.sum()) for cell in row] for row in cells], dtype=np.intp)


def proportion_interval(
    successes: int, n: int, *, level: float = 0.95, method: ProportionMethod = "wilson"
) -> Estimate:
    """Estimate a proportion from successes out of n with an interval: Wilson's unless another is asked for.

    "exact" (Clopper-Pearson) never covers less than its level, so it is wide; "jeffreys" is Bayesian with a
    Beta(1/2, 1/2) prior and reaches to 0 and 1 where all outcomes are equal.
    """
    _check_count(successes, n)
    if method not in _PROPORTION_METHODS:
        raise InvalidSample(f"method is {method!r}: it is one of {', '.join(_PROPORTION_METHODS)}")
    if not 0 < level < 1:
        raise InvalidSample(f"level is {level}: a confidence level is between 0 and 1, such as 0.95")
    share, z = successes / n, -float(special.ndtri((1 - level) / 2))
    if method == "wilson":
        low, high = wilson(share, n, z)
    elif method == "exact":
        low, high = clopper_pearson(successes, n, level)
    elif method == "jeffreys":
        posterior = stats.beta(successes + 0.5, n - successes + 0.5)
        low = float(posterior.ppf((1 - level) / 2)) if successes > 0 else 0.0
        high = float(posterior.ppf((1 + level) / 2)) if successes < n else 1.0
    else:
        adjusted = (successes + z**2 / 2) / (n + z**2)
        half = z * math.sqrt(adjusted * (1 - adjusted) / (n + z**2))
        low, high = max(adjusted - half, 0.0), min(adjusted + half, 1.0)
    source = _PROPORTION_METHODS[method]
    error = math.sqrt(share * (1 - share) / n)
    return Estimate("proportion", share, error, Interval(low, high, level, source), n, source)


def binomial_test(
    successes: int, n: int, *, expected: float = 0.5, alternative: Alternative = "two-sided", alpha: float = 0.05
) -> Result:
    """Test one proportion against an expected one, exactly; two-sided p sums all outcomes as unlikely as that seen."""
    check_options(alternative, alpha)
    _check_count(successes, n)
    if not 0 <= expected <= 1:
        raise InvalidSample(f"expected is {expected}: a proportion is between 0 and 1")
    found = stats.binomtest(successes, n, expected, alternative=alternative)
    interval = Interval(*clopper_pearson(successes, n, 1 - alpha, alternative), 1 - alpha, _PROPORTION_METHODS["exact"])
    return Result(
        test="Binomial test",
        statistic=float(successes),
        statistic_name="successes",
        p_value=float(found.pvalue),
        n=n,
        estimate=successes / n,
        estimate_name="proportion",
        interval=interval,
        alternative=alternative,
        alpha=alpha,
        method=_PROPORTION_METHODS["exact"],
    )


def two_proportion_z(table: object, *, alternative: Alternative = "two-sided", alpha: float = 0.05) -> Result:
    """Test two independent proportions for equality by the pooled z (chi2 = z^2); estimates are first minus second."""
    check_options(alternative, alpha)
    cells = counts(table, shape=(2, 2))
    difference = risk_difference(cells, level=1 - alpha)
    sizes = cells.sum(axis=1)
    pooled = float(cells[:, 0].sum() / cells.sum())
    details: dict[str, Any] = dict(
        test="Two-proportion z test", statistic_name="z", alternative=alternative, alpha=alpha
    )
    details |= dict(n=(int(sizes[0]), int(sizes[1])), estimate=difference.value, interval=difference.interval)
    details |= dict(estimate_name="risk difference", effect=cohen_h(cells, level=1 - alpha))
    details |= dict(method="Pearson (1900); interval by Newcombe (1998), Statistics in Medicine 17")
    if pooled in (0.0, 1.0):
        return Result(statistic=0.0, p_value=1.0, warnings=(_EQUAL,), **details)
    z = difference.value / math.sqrt(pooled * (1 - pooled) * float((1 / sizes).sum()))
    tails = {"greater": stats.norm.sf(z), "less": stats.norm.cdf(z), "two-sided": 2 * stats.norm.sf(abs(z))}
    return Result(statistic=z, p_value=float(tails[alternative]), assumptions=(expected_counts(cells),), **details)


def chi_squared(
    table: object, *, yates: bool = False, alpha: float = 0.05, n_resamples: int | None = None, rng: Rng = 0
) -> Result:
    """Test rows and columns of a table for independence (Pearson 1900), at least 2 x 2.

    yates applies the continuity correction of 2 x 2 tables. n_resamples replaces the chi-squared distribution by that
    of random tables with the same margins, which needs no minimum of expected counts.
    """
    check_options("two-sided", alpha)
    cells = counts(table)
    if (cells.sum(axis=1) == 0).any():
        raise InvalidSample(f"row {int(np.argmin(cells.sum(axis=1))) + 1} of the table is all 0: leave it out")
    details: dict[str, Any] = dict(test="Chi-squared test", statistic_name="chi2", n=int(cells.sum()), alpha=alpha)
    used = cells[:, cells.any(axis=0)]
    if used.shape[1] < 2:
        df = float((cells.shape[0] - 1) * (cells.shape[1] - 1))
        return Result(statistic=0.0, df=df, p_value=1.0, warnings=(_EQUAL,), method="Pearson (1900)", **details)
    found = stats.chi2_contingency(used, correction=yates)
    p_value, method = float(found.pvalue), "Pearson (1900)" + (", Yates (1934) correction" if yates else "")
    if n_resamples is not None:
        p_value = _random_tables_p(used, n_resamples, generator(rng))
        method = f"Pearson (1900); {n_resamples} random tables with the same margins"
    return Result(
        statistic=float(found.statistic),
        df=float(found.dof),
        p_value=p_value,
        effect=cramer_v(used, level=1 - alpha),
        assumptions=(expected_counts(used),),
        method=method,
        **details,
    )


def fisher_exact(table: object, *, alternative: Alternative = "two-sided", alpha: float = 0.05) -> Result:
    """Test a 2 x 2 table for independence exactly, given its margins (Fisher 1935).

    The effect is the conditional maximum-likelihood odds ratio with its exact interval, as in R; it can be 0 or
    infinite. Conservative: `two_proportion_z` has more power where expected counts are large.
    """
    check_options(alternative, alpha)
    cells = counts(table, shape=(2, 2))
    found = stats.fisher_exact(cells, alternative=alternative)
    details: dict[str, Any] = dict(test="Fisher's exact test", statistic_name="odds ratio", alternative=alternative)
    details |= dict(n=int(cells.sum()), alpha=alpha, method="Fisher (1935)")
    if (cells.sum(axis=0) == 0).any() or (cells.sum(axis=1) == 0).any():
        return Result(statistic=1.0, p_value=1.0, warnings=(_EQUAL,), **details)
    ratio = contingency.odds_ratio(cells, kind="conditional")
    ends = ratio.confidence_interval(1 - alpha, alternative=alternative)
    value = float(ratio.statistic)
    word, source = magnitude("odds ratio", value)
    interval = Interval(float(ends.low), float(ends.high), 1 - alpha, "exact, conditional on the margins")
    effect = Effect("conditional odds ratio", value, interval, word, source)
    difference = risk_difference(cells, level=1 - alpha)
    return Result(
        statistic=float(found.statistic),
        p_value=min(float(found.pvalue), 1.0),
        effect=effect,
        estimate=difference.value,
        estimate_name="risk difference",
        interval=difference.interval,
        **details,
    )


def mcnemar(
    table: object,
    *,
    method: Literal["exact", "mid-p", "asymptotic"] = "mid-p",
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
) -> Result:
    """Test paired yes-no outcomes for equal proportions (McNemar 1947), from the table that `paired_table` makes.

    Pairs that agree say nothing. "exact" is the binomial test of the others and conservative; "mid-p" counts the
    observed outcome half and is closer to its level (Fagerland et al. 2013, BMC Medical Research Methodology 13).
    """
    check_options(alternative, alpha)
    if method not in ("exact", "mid-p", "asymptotic"):
        raise InvalidSample(f'method is {method!r}: it is "exact", "mid-p" or "asymptotic"')
    cells = counts(table, shape=(2, 2))
    first, second, n = int(cells[0, 1]), int(cells[1, 0]), int(cells.sum())
    difference, interval = _paired_difference(cells, 1 - alpha)
    details: dict[str, Any] = dict(test=f"McNemar test, {method}", n=n, alternative=alternative, alpha=alpha)
    details |= dict(estimate=difference, estimate_name="difference of proportions", interval=interval)
    details |= dict(method="McNemar (1947), Psychometrika 12; interval by Newcombe (1998), Statistics in Medicine 17")
    details |= dict(effect=_discordant_odds(first, second, 1 - alpha))
    name, statistic = ("first alone", float(first))
    if method == "asymptotic":
        name, statistic = "z", (first - second) / math.sqrt(first + second) if first + second else 0.0
    if first + second == 0:
        note = "all pairs agree, so p = 1 by definition"
        return Result(statistic=statistic, statistic_name=name, p_value=1.0, warnings=(note,), **details)
    if method == "asymptotic":
        tails = {"greater": stats.norm.sf(statistic), "less": stats.norm.cdf(statistic)}
        p_value = float(tails.get(alternative, 2 * stats.norm.sf(abs(statistic))))
    else:
        share = 0.5 if method == "mid-p" else 1.0
        chance = share * float(stats.binom.pmf(first, first + second, 0.5))
        above = float(special.bdtrc(first, first + second, 0.5)) + chance if second else chance
        below = float(special.bdtrc(second, first + second, 0.5)) + chance if first else chance
        p_value = {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]
    return Result(statistic=statistic, statistic_name=name, p_value=p_value, **details)


def cochran_q(table: object, *, alpha: float = 0.05, nan: NanPolicy = "raise") -> Result:
    """Test several conditions on the same cases for equal proportions (Cochran 1950).

    table is 0/1, shape (cases, conditions). Cases whose outcomes all agree say nothing; the effect is Serlin's eta
    squared, Q / (cases (conditions - 1)).
    """
    check_options("two-sided", alpha)
    outcomes = matrix(table, name="outcomes", nan=nan)
    binary(outcomes.ravel(), name="outcomes")
    n, k = outcomes.shape
    rows, columns = outcomes.sum(axis=1), outcomes.sum(axis=0)
    below = float(k * rows.sum() - (rows**2).sum())
    details: dict[str, Any] = dict(test="Cochran's Q test", statistic_name="chi2", df=float(k - 1), n=n, alpha=alpha)
    details |= dict(method="Cochran (1950), Biometrika 37; effect by Serlin, Carr & Marascuilo (1982)")
    if below == 0:
        note = "all cases have one outcome under every condition, so p = 1 by definition"
        return Result(statistic=0.0, p_value=1.0, warnings=(note,), **details)
    q = float((k - 1) * (k * (columns**2).sum() - columns.sum() ** 2) / below)
    word, source = magnitude("eta2", q / (n * (k - 1)))
    informative = int(((rows > 0) & (rows < k)).sum())
    warnings = (
        ()
        if informative * k >= 24
        else (f"{informative} cases x {k} conditions are few for the chi-squared approximation (24 are advised)",)
    )
    return Result(
        statistic=q,
        p_value=float(stats.chi2.sf(q, k - 1)),
        warnings=warnings,
        effect=Effect("eta2", q / (n * (k - 1)), None, word, source),
        **details,
    )


def _random_tables_p(cells: IntArray, n_resamples: int, rng: np.random.Generator) -> float:
    """Return the share of tables with the same margins that are as far from independence, the observed one included."""
    expected = contingency.expected_freq(cells)
    seen = float(((cells - expected) ** 2 / expected).sum())
    drawn = stats.random_table(cells.sum(axis=1), cells.sum(axis=0), seed=rng).rvs(size=n_resamples)
    found = ((drawn - expected) ** 2 / expected).sum(axis=(1, 2))
    return float(((found >= seen * (1 - 1e-12)).sum() + 1) / (n_resamples + 1))


def expected_counts(cells: IntArray) -> Assumption:
    """Check the expected counts of a table: none below 1 and at most a fifth below 5 (Cochran 1954)."""
    expected = contingency.expected_freq(cells)
    low = float((expected < 5).mean())
    is_met = bool(expected.min() >= 1 and low <= 0.2)
    note = f"smallest expected count {expected.min():.3g}; {low:.0%} below 5"
    return Assumption("expected counts", "Cochran's rule", float(expected.min()), math.nan, is_met, note)


_EQUAL = "all outcomes are equal, so p = 1 by definition"


def _check_count(successes: int, n: int) -> None:
    if n < 1 or not 0 <= successes <= n or successes != int(successes) or n != int(n):
        raise InvalidSample(f"{successes} successes of {n}: give whole numbers, 0 <= successes <= n, n >= 1")


def _paired_difference(cells: IntArray, level: float) -> tuple[float, Interval]:
    """Return p1 - p2 of paired proportions with Newcombe's (1998) square-and-add interval (his method 10)."""
    n, z = int(cells.sum()), -float(special.ndtri((1 - level) / 2))
    rows, columns = cells.sum(axis=1).astype(float), cells.sum(axis=0).astype(float)
    p1, p2 = rows[0] / n, columns[0] / n
    (low1, high1), (low2, high2) = wilson(p1, n, z), wilson(p2, n, z)
    margins = math.sqrt(rows[0]) * math.sqrt(rows[1]) * math.sqrt(columns[0]) * math.sqrt(columns[1])
    balance = float(cells[0, 0]) * float(cells[1, 1]) - float(cells[0, 1]) * float(cells[1, 0])
    phi = 0.0 if margins == 0 else (max(balance - n / 2, 0.0) if balance > 0 else balance) / margins
    down1, up1, down2, up2 = p1 - low1, high1 - p1, p2 - low2, high2 - p2
    low = p1 - p2 - math.sqrt(max(down1**2 - 2 * phi * down1 * up2 + up2**2, 0.0))
    high = p1 - p2 + math.sqrt(max(up1**2 - 2 * phi * up1 * down2 + down2**2, 0.0))
    return float(p1 - p2), Interval(float(low), float(high), level, "Newcombe square-and-add")


def _discordant_odds(first: int, second: int, level: float) -> Effect | None:
    """Return the conditional odds ratio of pairs that disagree, with the interval that Clopper-Pearson's implies."""
    if first + second == 0:
        return None
    ends = clopper_pearson(first, first + second, level)
    low, high = (end / (1 - end) if end < 1 else math.inf for end in ends)
    value = first / second if second else math.inf
    word, source = magnitude("odds ratio", value)
    return Effect("conditional odds ratio", value, Interval(low, high, level, "Clopper-Pearson"), word, source)
