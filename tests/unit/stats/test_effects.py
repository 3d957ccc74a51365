"""Effect sizes agree with other packages and printed examples; exact intervals with integrals and sums written out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pingouin as pg
import pytest
from scipy import integrate, special, stats
from statsmodels.stats import contingency_tables, proportion

from pgharness.stats.effects import (
    cliff_delta,
    cohen_d,
    cohen_dz,
    cohen_h,
    cohen_w,
    common_language_effect,
    cramer_v,
    epsilon2,
    eta2,
    glass_delta,
    hedges_g,
    magnitude,
    matched_rank_biserial,
    noncentral_chi2_interval,
    noncentral_f_interval,
    noncentral_t_cdf,
    noncentral_t_interval,
    odds_ratio,
    omega2,
    partial_eta2,
    r_from_t,
    rank_epsilon2,
    risk_difference,
    risk_ratio,
)
from pgharness.stats.results import Effect
from pgharness.stats.samples import InvalidSample
from unit.stats.data_sets import paired, several_groups, two_groups
from unit.stats.test_proportions import tables_2x2


@pytest.fixture(autouse=True)
def quiet_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pingouin")
        yield


def ends(effect: Effect) -> tuple[float, float]:
    assert effect.interval is not None
    return effect.interval.low, effect.interval.high


# -- standardised differences


def test_standardised_differences_agree_with_pingouin() -> None:
    # pingouin's Hedges g uses the approximation 1 - 3/(4N - 9) of the correction, so g is compared with its d
    for one, two in two_groups(200, seed=41):
        d = pg.compute_effsize(one, two, eftype="cohen")
        assert cohen_d(one, two).value == pytest.approx(d, rel=1e-8, abs=1e-12)
        df = len(one) + len(two) - 2
        exact = special.gamma(df / 2) / (math.sqrt(df / 2) * special.gamma((df - 1) / 2)) if df > 1 else math.nan
        assert hedges_g(one, two).value == pytest.approx(d * exact, rel=1e-8, abs=1e-12, nan_ok=True)
        assert exact == pytest.approx(1 - 3 / (4 * (df + 2) - 9), rel=0.05, nan_ok=True)
        assert glass_delta(one, two).value == pytest.approx((one.mean() - two.mean()) / two.std(ddof=1), rel=1e-8)
    for one, two in paired(200, seed=42):
        t = stats.ttest_rel(one, two).statistic
        assert cohen_dz(one, two).value == pytest.approx(t / math.sqrt(len(one)), rel=1e-8)


def test_exact_intervals_of_d_put_t_at_the_tails() -> None:
    for one, two in two_groups(200, seed=43, least=3):
        df, scale = len(one) + len(two) - 2, math.sqrt(1 / len(one) + 1 / len(two))
        found = cohen_d(one, two)
        for end, tail in zip(ends(found), (0.975, 0.025), strict=True):
            assert mixture_t(found.value / scale, df, end / scale) == pytest.approx(tail, abs=1e-8)


def mixture_t(t: float, df: float, noncentrality: float) -> float:
    """P(T <= t) as the mean of a normal distribution over that of the standard deviation, by Gauss's rule."""
    nodes, weights = special.roots_legendre(400)
    spread = 12 / math.sqrt(2 * df)
    low, high = max(0.0, 1 - spread), 1 + spread
    scale = (high - low) / 2 * nodes + (high + low) / 2
    density = stats.chi.pdf(scale * math.sqrt(df), df) * math.sqrt(df)
    return float((high - low) / 2 * (weights * density * special.ndtr(t * scale - noncentrality)).sum())


def test_d_has_the_interval_that_r_prints() -> None:
    # MBESS: conf.limits.nct(t.value = 2.83, df = 126), printed in Kelley (2007), Journal of Statistical Software 20(8)
    low, high = noncentral_t_interval(2.83, 126)
    assert (low, high) == pytest.approx((0.8337502, 4.815359), abs=5e-6)


@pytest.mark.parametrize("t", [0.0, 0.5, -3.0, 60.0, -400.0, 5000.0])
@pytest.mark.parametrize("df", [2, 4, 30, 5000])
def test_noncentral_t_is_right_where_the_series_of_scipy_fails(t: float, df: int) -> None:
    low, high = noncentral_t_interval(t, df)
    assert low < t < high or df == 2
    for noncentrality in (low, high, (low + high) / 2, low - 3):

        def density(scale: float, shift: float = noncentrality) -> float:
            return float(special.ndtr(t * scale - shift) * stats.chi.pdf(scale * math.sqrt(df), df) * math.sqrt(df))

        spread = 12 / math.sqrt(2 * df)
        start, end = max(0.0, 1 - spread), 1 + spread + (20 if df < 9 else 0)
        kinks = [1.0] + [(noncentrality + shift) / t for shift in (-9, -3, -1, 0, 1, 3, 9) if t]
        points = sorted({min(max(point, start), end) for point in kinks})
        value = integrate.quad(density, start, end, points=points, limit=500, epsabs=1e-12)[0]
        assert noncentral_t_cdf(t, df, noncentrality) == pytest.approx(value, abs=2e-8)


# -- explained variance


def test_eta_and_omega_agree_with_pingouin_and_sums_of_squares() -> None:
    for groups in several_groups(200, seed=44):
        everything = np.concatenate(groups)
        k, n = len(groups), len(everything)
        total = ((everything - everything.mean()) ** 2).sum()
        within = sum(((one - one.mean()) ** 2).sum() for one in groups)
        between = total - within
        mean_within = within / (n - k)
        assert eta2(groups).value == pytest.approx(between / total, rel=1e-7, abs=1e-10)
        omega = (between - (k - 1) * mean_within) / (total + mean_within)
        assert omega2(groups).value == pytest.approx(omega, rel=1e-7, abs=1e-10)
        adjusted = 1 - (within / (n - k)) / (total / (n - 1))  # epsilon squared is the adjusted R squared
        assert epsilon2(groups).value == pytest.approx(adjusted, rel=1e-7, abs=1e-10)
        f = stats.f_oneway(*groups).statistic
        assert partial_eta2(f, k - 1, n - k).value == pytest.approx(eta2(groups).value, rel=1e-7, abs=1e-10)
    table = pd.DataFrame({"value": everything, "group": np.repeat(np.arange(k), [len(one) for one in groups])})
    row = pg.anova(table, dv="value", between="group")
    assert eta2(groups).value == pytest.approx(float(row["np2"].iloc[0]))


def test_exact_intervals_of_explained_variance_put_f_at_the_tails() -> None:
    rng = np.random.default_rng(45)
    for _ in range(200):
        df1, df2, f = int(rng.integers(1, 8)), int(rng.integers(3, 200)), float(rng.lognormal(0.7, 1))
        for noncentrality, tail in zip(noncentral_f_interval(f, df1, df2), (0.975, 0.025), strict=True):
            if noncentrality > 0:
                assert mixture_f(f, df1, df2, noncentrality) == pytest.approx(tail, abs=1e-8)
            else:
                assert stats.f.cdf(f, df1, df2) <= tail + 1e-12


def mixture_f(f: float, df1: int, df2: int, noncentrality: float) -> float:
    """P(F <= f) as its definition: incomplete beta functions with Poisson weights."""
    j = np.arange(int(noncentrality / 2 + 12 * math.sqrt(noncentrality + 10) + 50))
    share = df1 * f / (df1 * f + df2)
    return float((stats.poisson.pmf(j, noncentrality / 2) * special.betainc(df1 / 2 + j, df2 / 2, share)).sum())


def test_noncentral_chi_squared_puts_the_statistic_at_the_tails() -> None:
    rng = np.random.default_rng(46)
    for _ in range(200):
        df, chi2 = int(rng.integers(1, 9)), float(rng.lognormal(2, 1))
        for noncentrality, tail in zip(noncentral_chi2_interval(chi2, df), (0.975, 0.025), strict=True):
            j = np.arange(int(noncentrality / 2 + 12 * math.sqrt(noncentrality + 10) + 50))
            mixture = (stats.poisson.pmf(j, noncentrality / 2) * special.gammainc(df / 2 + j, chi2 / 2)).sum()
            assert mixture == pytest.approx(tail, abs=1e-8) or (noncentrality == 0 and mixture <= tail)


def test_f_has_the_interval_that_r_prints() -> None:
    low, high = noncentral_f_interval(11.2213, 4, 50)
    assert mixture_f(11.2213, 4, 50, low) == pytest.approx(0.975, abs=1e-9)
    # Smithson (2003) and MBESS's ci.pvaf(F.value = 11.2213, df.1 = 4, df.2 = 50, N = 55): 0.2263, 0.5873
    assert (low / (low + 55), high / (high + 55)) == pytest.approx((0.2263, 0.5873), abs=5e-4)


def test_groups_without_variation_inside_explain_everything() -> None:
    found = eta2([[1, 1], [2, 2], [3, 3]])
    assert found.value == 1.0 and ends(found) == (1.0, 1.0)
    assert rank_epsilon2(6.0, 13).value == 0.5


def test_rank_epsilon_squared_is_the_share_of_the_ranks_variance_between_groups() -> None:
    for groups in several_groups(200, seed=48):
        ranks = stats.rankdata(np.concatenate(groups))
        labels = np.repeat(np.arange(len(groups)), [len(one) for one in groups])
        between = sum(size * ranks[labels == i].mean() ** 2 for i, size in enumerate(np.bincount(labels)))
        share = (between - len(ranks) * ranks.mean() ** 2) / ranks.var() / len(ranks)
        found = rank_epsilon2(stats.kruskal(*groups).statistic, len(ranks))
        assert found.value == pytest.approx(share, abs=1e-8)


# -- orders


def test_cliff_delta_agrees_with_all_pairs_and_with_r() -> None:
    for one, two in two_groups(200, seed=47):
        signs = np.sign(np.subtract.outer(one, two))
        found = cliff_delta(one, two)
        assert found.value == pytest.approx(signs.mean(), abs=1e-12)
        assert common_language_effect(one, two).value == pytest.approx(
            stats.mannwhitneyu(one, two, method="asymptotic").statistic / signs.size, abs=1e-12
        )
        n1, n2 = signs.shape
        delta = signs.mean()
        if abs(delta) == 1:
            continue
        rows = ((signs.mean(axis=1) - delta) ** 2).sum()
        columns = ((signs.mean(axis=0) - delta) ** 2).sum()
        cells = ((signs - delta) ** 2).sum()
        variance = (n2**2 * rows + n1**2 * columns - cells) / (n1 * n2 * (n1 - 1) * (n2 - 1))  # Cliff (1993), eq. 6
        variance = max(variance, (1 - delta**2) / (n1 * n2 - 1))
        z = stats.t.ppf(0.975, n1 + n2 - 2)
        root = z * math.sqrt(variance * ((1 - delta**2) ** 2 + z**2 * variance))
        expected = [(delta - delta**3 + side * root) / (1 - delta**2 + z**2 * variance) for side in (-1, 1)]
        assert ends(found) == pytest.approx((max(expected[0], -1), min(expected[1], 1)), abs=1e-9)
    # ?effsize::cliff.delta: estimate -0.25, interval (-0.7265846, 0.3890062)
    found = cliff_delta([10, 10, 20, 20, 20, 30, 30, 30, 40, 50], [10, 20, 30, 40, 40, 50])
    assert found.value == -0.25 and found.magnitude == "small"
    assert ends(found) == pytest.approx((-0.7265846, 0.3890062), abs=5e-8)


def test_groups_that_do_not_overlap_keep_an_open_interval() -> None:
    found = cliff_delta([5, 6, 7, 8, 9], [0, 1, 2, 3])
    z2 = stats.t.ppf(0.975, 7) ** 2
    assert found.value == 1.0 and ends(found) == pytest.approx(((4 - z2) / (4 + z2), 1.0))
    assert ends(cliff_delta([0, 1, 2, 3], [5, 6, 7, 8, 9])) == pytest.approx((-1.0, -(4 - z2) / (4 + z2)))


def test_matched_rank_biserial_agrees_with_pingouin() -> None:
    for one, two in paired(200, seed=48):
        if np.ptp(one) < 1e-3 or (one == two).any():
            continue
        other = pg.wilcoxon(one, two)
        assert matched_rank_biserial(one, two).value == pytest.approx(float(other["RBC"].iloc[0]), abs=1e-8)


def test_r_from_t_is_the_point_biserial_correlation() -> None:
    for one, two in two_groups(200, seed=49):
        labels = np.repeat([1.0, 0.0], [len(one), len(two)])
        r = stats.pearsonr(labels, np.concatenate((one, two))).statistic
        found = r_from_t(stats.ttest_ind(one, two).statistic, len(one) + len(two) - 2)
        assert found.value == pytest.approx(r, abs=1e-8)
        assert ends(found)[0] <= found.value <= ends(found)[1]


# -- tables


def test_ratios_agree_with_statsmodels() -> None:
    for cells in tables_2x2(200, seed=50, least=1):
        table = contingency_tables.Table2x2(cells)
        odds, risk = odds_ratio(cells), risk_ratio(cells)
        assert odds.value == pytest.approx(table.oddsratio, rel=1e-8)
        assert ends(odds) == pytest.approx(table.oddsratio_confint(), rel=1e-8)
        assert risk.value == pytest.approx(table.riskratio, rel=1e-8)
        assert ends(risk) == pytest.approx(table.riskratio_confint(), rel=1e-8)
        (x1, x2), (n1, n2) = cells[:, 0], cells.sum(axis=1)
        difference = proportion.confint_proportions_2indep(x1, n1, x2, n2, method="newcomb", compare="diff")
        assert ends(risk_difference(cells)) == pytest.approx(difference, abs=1e-8)
        assert cohen_h(cells).value == pytest.approx(proportion.proportion_effectsize(x1 / n1, x2 / n2), abs=1e-10)
        h = cohen_h(cells)
        assert h.interval is not None and h.interval.width / 2 == pytest.approx(
            1.9599639845 * math.sqrt(1 / n1 + 1 / n2)
        )


def test_association_of_tables_agrees_with_scipy() -> None:
    rng = np.random.default_rng(51)
    for _ in range(200):
        cells = rng.integers(1, 40, (int(rng.integers(2, 6)), int(rng.integers(2, 6))))
        v = stats.contingency.association(cells, method="cramer")
        assert cramer_v(cells).value == pytest.approx(v, abs=1e-10)
        assert cohen_w(cells).value == pytest.approx(v * math.sqrt(min(cells.shape) - 1), abs=1e-10)
        assert ends(cramer_v(cells))[0] <= v <= ends(cramer_v(cells))[1]


def test_zeros_in_a_table_leave_ratios_finite() -> None:
    assert odds_ratio([[5, 0], [3, 4]]).value == pytest.approx(5.5 * 4.5 / (0.5 * 3.5))
    assert "added" in ends_method(odds_ratio([[5, 0], [3, 4]]))
    assert risk_ratio([[0, 5], [3, 4]]).value == pytest.approx(0.5 / 6 / (3.5 / 8))
    assert cramer_v([[5, 0, 2], [3, 0, 4]]).value > 0


def ends_method(effect: Effect) -> str:
    assert effect.interval is not None
    return effect.interval.method


# -- words and refusals


@pytest.mark.parametrize(
    ("kind", "value", "word"),
    [
        ("d", 0.19, "negligible"), ("d", -0.2, "small"), ("d", 0.5, "medium"), ("d", -4.0, "large"),
        ("r", 0.3, "medium"), ("eta2", 0.06, "medium"), ("delta", -0.474, "large"), ("h", 0.1, "negligible"),
        ("odds ratio", 1.0, "negligible"), ("odds ratio", 0.5, "small"), ("odds ratio", 7.0, "large"),
        ("odds ratio", 0.0, "large"), ("odds ratio", math.inf, "large"), ("d", math.nan, None),
    ],
)  # fmt: skip
def test_magnitudes_follow_their_sources(kind: str, value: float, word: str | None) -> None:
    found, source = magnitude(kind, value)
    assert found == word and "(" in source


def test_huge_samples() -> None:
    rng = np.random.default_rng(52)
    one, two = rng.normal(0, 1, 50_000), rng.normal(0.2, 1, 50_000)
    for effect in (
        cohen_d(one, two),
        hedges_g(one, two),
        glass_delta(one, two),
        cliff_delta(one, two),
        eta2([one, two]),
    ):
        low, high = ends(effect)
        assert low < effect.value < high and high - low < 0.06


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cohen_d([1, 1], [2, 2]), "both groups are constant"),
        (lambda: glass_delta([1, 2], [2, 2]), "the control group"),
        (lambda: cohen_dz([1, 2], [2, 3]), "differs by the same amount"),
        (lambda: cohen_d([1], [1, 2]), "first: 1 value, at least 2 needed"),
        (lambda: cohen_d([1, 2], [1, 3], level=95), "level is 95"),
        (lambda: eta2([[1], [2]]), "each group has one value"),
        (lambda: eta2([[1, 1], [1, 1]]), "all values are equal"),
        (lambda: partial_eta2(-1, 2, 3), "F = -1"),
        (lambda: matched_rank_biserial([1, 2], [1, 2]), "all pairs are equal"),
        (lambda: r_from_t(1, 0), "df is 0"),
        (lambda: risk_ratio([[0, 0], [1, 2]]), "row 1 of the table is all 0"),
        (lambda: cramer_v([[1, 0], [2, 0]]), "no association to measure"),
        (lambda: magnitude("f", 1), "no convention for effects of kind 'f'"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
