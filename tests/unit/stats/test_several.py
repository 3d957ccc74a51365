"""Tests of several groups and their post-hoc comparisons agree with pingouin, scikit-posthocs, statsmodels and R."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pingouin as pg
import pytest
import scikit_posthocs as sp
from scipy import stats
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multicomp import pairwise_tukeyhsd
from statsmodels.stats.oneway import anova_oneway

from pgharness.stats.posthoc import dunn, dunnett, games_howell, nemenyi, tukey_hsd
from pgharness.stats.results import Result
from pgharness.stats.samples import InvalidSample
from pgharness.stats.several import friedman, kruskal_wallis, one_way_anova, repeated_measures_anova, welch_anova
from unit.stats.data_sets import several_groups, tables, two_groups
from unit.stats.test_assumptions import SPRAYS

INDEPENDENT = (one_way_anova, welch_anova, kruskal_wallis)
# Hollander & Wolfe (1973), 140ff: rounding first base, in ?friedman.test
BASES = [
    [5.40, 5.50, 5.55], [5.85, 5.70, 5.75], [5.20, 5.60, 5.50], [5.55, 5.50, 5.40], [5.90, 5.85, 5.70], [5.45, 5.55, 5.60],
    [5.40, 5.40, 5.35], [5.45, 5.50, 5.35], [5.25, 5.15, 5.00], [5.85, 5.80, 5.70], [5.25, 5.20, 5.10], [5.65, 5.55, 5.45],
    [5.60, 5.35, 5.45], [5.05, 5.00, 4.95], [5.50, 5.50, 5.40], [5.45, 5.55, 5.50], [5.55, 5.55, 5.35], [5.45, 5.50, 5.55],
    [5.50, 5.45, 5.25], [5.65, 5.60, 5.40], [5.70, 5.65, 5.55], [6.30, 6.30, 6.25],
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_others() -> Iterator[None]:
    with warnings.catch_warnings():
        for module in ("pingouin", "scikit_posthocs", "statsmodels", "pandas"):
            warnings.filterwarnings("ignore", module=module)
        yield


def long(groups: list[np.ndarray]) -> pd.DataFrame:
    labels = np.repeat([f"group {i + 1}" for i in range(len(groups))], [len(one) for one in groups])
    return pd.DataFrame({"value": np.concatenate(groups), "group": labels})


# -- omnibus tests


def test_anovas_agree_with_statsmodels_and_scipy() -> None:
    for groups in several_groups(200, seed=81):
        plain, welch = one_way_anova(groups), welch_anova(groups)
        other = anova_oneway(groups, use_var="equal")
        assert (plain.statistic, plain.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-6, abs=1e-10)
        other = anova_oneway(groups, use_var="unequal", welch_correction=True)
        assert (welch.statistic, welch.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-6, abs=1e-10)
        assert welch.df == pytest.approx((other.df_num, other.df_denom), rel=1e-6)
        ranks = kruskal_wallis(groups)
        everything = stats.rankdata(np.concatenate(groups))
        places = np.split(everything, np.cumsum([len(one) for one in groups])[:-1])
        # H is (N - 1) times the explained share of the ranks' variance, which takes care of ties
        share = (
            sum(len(p) * (p.mean() - everything.mean()) ** 2 for p in places)
            / ((everything - everything.mean()) ** 2).sum()
        )
        h = (len(everything) - 1) * share
        assert ranks.statistic == pytest.approx(h, rel=1e-7, abs=1e-9)
        assert ranks.p_value == pytest.approx(stats.gamma.sf(h / 2, (len(groups) - 1) / 2), rel=1e-6)


def test_two_groups_make_the_anovas_t_tests() -> None:
    rng = np.random.default_rng(82)
    one, two = rng.normal(0, 1, 12), rng.normal(1, 3, 9)
    assert one_way_anova([one, two]).statistic == pytest.approx(stats.ttest_ind(one, two).statistic ** 2)
    assert welch_anova([one, two]).p_value == pytest.approx(stats.ttest_ind(one, two, equal_var=False).pvalue)


def test_anovas_give_what_r_prints() -> None:
    # summary(aov(count ~ spray, InsectSprays)): F = 34.7 on 5 and 66 df; oneway.test: F = 36.065 on 5 and 30.043 df,
    # p = 7.999e-12; kruskal.test: chi-squared = 54.691, df = 5, p-value = 1.511e-10
    found = one_way_anova(SPRAYS)
    assert round(found.statistic, 1) == 34.7 and found.df == (5.0, 66.0) and "F(5, 66) = 34.70, p < .001" in found.apa
    welch = welch_anova(SPRAYS)
    assert isinstance(welch.df, tuple)
    assert (round(welch.statistic, 3), round(welch.df[1], 3)) == (36.065, 30.043)
    assert welch.p_value == pytest.approx(7.999e-12, abs=5e-16)
    ranks = kruskal_wallis(SPRAYS)
    assert round(ranks.statistic, 3) == 54.691 and ranks.p_value == pytest.approx(1.511e-10, abs=5e-14)


def test_repeated_measures_agree_with_statsmodels_and_pingouin() -> None:
    for number, table in enumerate(tables(200, seed=83)):
        n, k = table.shape
        found = repeated_measures_anova(table, correction="none")
        residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
        between = n * ((table.mean(axis=0) - table.mean()) ** 2).sum()
        f = between * (n - 1) / (residual**2).sum()
        assert found.statistic == pytest.approx(f, rel=1e-6, abs=1e-9)
        assert found.p_value == pytest.approx(stats.f.sf(f, k - 1, (k - 1) * (n - 1)), rel=1e-6)
        corrected = repeated_measures_anova(table)
        covariance = np.cov(table, rowvar=False)  # Box (1954): from the doubly centred covariances of the conditions
        centred = covariance - covariance.mean(axis=0) - covariance.mean(axis=1)[:, None] + covariance.mean()
        factor = np.trace(centred) ** 2 / ((k - 1) * (centred**2).sum())
        assert isinstance(corrected.df, tuple)
        assert corrected.df == pytest.approx(((k - 1) * factor, (k - 1) * (n - 1) * factor), rel=1e-6)
        if number % 20 == 0:
            frame = pd.DataFrame(table).rename_axis("subject").reset_index().melt("subject", var_name="condition")
            row = AnovaRM(frame, "value", "subject", within=["condition"]).fit().anova_table.iloc[0]
            assert found.statistic == pytest.approx(float(row["F Value"]), rel=1e-5, abs=1e-9)


def test_corrected_repeated_measures_agree_with_pingouin() -> None:
    rng = np.random.default_rng(84)
    table = rng.normal(size=(15, 4)) + np.array([0.0, 0.2, 0.8, 0.4])
    frame = pd.DataFrame(table).rename_axis("subject").reset_index().melt("subject", var_name="condition")
    row = pg.rm_anova(frame, dv="value", within="condition", subject="subject", correction=True).iloc[0]
    found = repeated_measures_anova(table)
    assert found.statistic == pytest.approx(float(row["F"]), rel=1e-8)
    corrected = [float(row[name]) for name in row.index if str(name).lower() in ("p-gg-corr", "p_gg_corr")]
    assert found.p_value == pytest.approx(corrected[0], rel=1e-8)
    assert "Greenhouse-Geisser corrected" in found.test and found.assumptions[0].name == "sphericity"
    assert repeated_measures_anova(table, correction="huynh-feldt").p_value <= found.p_value


def test_friedman_agrees_with_scipy_and_r() -> None:
    for table in tables(200, seed=85):
        found, other = friedman(table), stats.friedmanchisquare(*table.T)
        assert (found.statistic, found.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-8, abs=1e-10)
        assert found.effect is not None
        w = (
            pg.friedman(
                pd.DataFrame(table).rename_axis("s").reset_index().melt("s"), dv="value", within="variable", subject="s"
            )
            if table[0, 0] % 7 < 0.5
            else None
        )
        if w is not None:
            assert found.effect.value == pytest.approx(float(w["W"].iloc[0]), abs=1e-8)
    # ?friedman.test: Friedman chi-squared = 11.143, df = 2, p-value = 0.003805
    found = friedman(BASES)
    assert (round(found.statistic, 3), found.df, round(found.p_value, 6)) == (11.143, 2, 0.003805)


# -- post-hoc comparisons


def test_two_groups_make_the_comparisons_t_tests() -> None:
    for one, two in two_groups(200, seed=86):
        (tukey,), (howell,) = tukey_hsd([one, two], intervals=False), games_howell([one, two], intervals=False)
        student, welch = stats.ttest_ind(one, two), stats.ttest_ind(one, two, equal_var=False)
        assert tukey.p_value == pytest.approx(student.pvalue, abs=1e-8)
        assert tukey.statistic == pytest.approx(student.statistic * math.sqrt(2), rel=1e-8, abs=1e-10)
        assert howell.p_value == pytest.approx(welch.pvalue, abs=2e-8)
        assert (howell.statistic, howell.df) == pytest.approx(
            (welch.statistic * math.sqrt(2), welch.df), rel=1e-8, abs=1e-10
        )


def test_tukey_agrees_with_statsmodels_scipy_and_r() -> None:
    for groups in several_groups(3, seed=87, most=12):
        ours, theirs = tukey_hsd(groups[:3]), pairwise_tukeyhsd(long(groups[:3])["value"], long(groups[:3])["group"])
        other = stats.tukey_hsd(*groups[:3])
        for i, (pair, (a, b)) in enumerate(zip(ours, ((0, 1), (0, 2), (1, 2)), strict=True)):
            assert pair.p_value == pytest.approx(other.pvalue[a, b], abs=1e-8)
            # statsmodels subtracts the first from the second, and interpolates p-values and critical values
            assert pair.difference == pytest.approx(-theirs.meandiffs[i], rel=1e-8, abs=1e-9)
            assert pair.interval is not None
            assert pair.interval.width == pytest.approx(theirs.confint[i][1] - theirs.confint[i][0], rel=3e-3)
    # TukeyHSD(aov(count ~ spray, InsectSprays)): B-A diff 0.8333333, lwr -3.866075, upr 5.532742, p adj 0.9951810
    first = tukey_hsd(SPRAYS)[0]
    assert first.interval is not None and (first.first, first.second) == ("A", "B")
    assert (first.difference, first.p_value) == pytest.approx((-0.8333333, 0.9951810), abs=5e-8)
    assert (first.interval.low, first.interval.high) == pytest.approx((-5.532742, 3.866075), abs=5e-6)


def test_games_howell_agrees_with_pingouin() -> None:
    for groups in several_groups(6, seed=88):
        other = pg.pairwise_gameshowell(long(groups), dv="value", between="group")
        p_name = next(name for name in other.columns if str(name).startswith("p"))
        for pair, (_, row) in zip(games_howell(groups, intervals=False), other.iterrows(), strict=True):
            assert (pair.first, pair.second) == (row["A"], row["B"])
            assert pair.difference == pytest.approx(float(row["diff"]), rel=1e-8, abs=1e-10)
            assert pair.df == pytest.approx(float(row["df"]), rel=1e-8)
            assert pair.p_value == pytest.approx(float(row[p_name]), abs=1e-8)
    pair = games_howell({"a": SPRAYS["A"], "b": SPRAYS["B"], "c": SPRAYS["C"]})[0]
    assert pair.interval is not None and pair.interval.low < pair.difference < pair.interval.high


def test_dunn_agrees_with_scikit_posthocs() -> None:
    for number, groups in enumerate(several_groups(200, seed=89)):
        upper = np.triu_indices(len(groups), 1)
        plain = sp.posthoc_dunn(groups).to_numpy()[upper]
        # statsmodels, which it calls to adjust by Holm's method, is slow: pingouin adjusts its p-values here
        found = [pair.p_value for pair in dunn(groups)]
        assert found == pytest.approx(list(pg.multicomp(plain, method="holm")[1]), rel=1e-6, abs=1e-12)
        if number % 20 == 0:
            other = sp.posthoc_dunn(groups, p_adjust="bonferroni").to_numpy()[upper]
            found = [pair.p_value for pair in dunn(groups, correction="bonferroni")]
            assert found == pytest.approx(list(other), rel=1e-6, abs=1e-12)


def test_nemenyi_agrees_with_scikit_posthocs() -> None:
    for table in tables(200, seed=90):
        table = table[:, :3]
        other = sp.posthoc_nemenyi_friedman(table).to_numpy()
        expected = other[np.triu_indices(table.shape[1], 1)]
        assert [pair.p_value for pair in nemenyi(table)] == pytest.approx(list(expected), abs=1e-6)


def test_dunnett_gives_what_is_published() -> None:
    # Dunnett (1955), JASA 50, blood counts: the difference from control of drug B is 2.6 above, that of A is not
    blood = {
        "control": [7.40, 8.50, 7.20, 8.24, 9.84, 8.32],
        "drug A": [9.76, 8.80, 7.68, 9.36],
        "drug B": [12.80, 9.68, 12.16, 9.20, 10.55],
    }
    a, b = dunnett(blood, control="control")
    assert (a.first, a.second) == ("drug A", "control")
    assert (a.difference, b.difference) == pytest.approx((0.65, 2.628), abs=2e-3)
    assert a.p_value > 0.05 > b.p_value
    # multcomp's glht gives p 0.62004 and 0.00586 for these data
    assert (a.p_value, b.p_value) == pytest.approx((0.62004, 0.00586), abs=3e-4)
    assert a.interval is not None and a.interval.low < a.difference < a.interval.high


def test_dunnett_agrees_with_an_integral_over_what_the_groups_share() -> None:
    for groups in (several[:3] for several in several_groups(200, seed=91)):
        sizes = [len(one) for one in groups]
        df = sum(sizes) - len(groups)
        variance = sum(((one - one.mean()) ** 2).sum() for one in groups) / df
        for found, size in zip(dunnett(groups, control="group 1"), sizes[1:], strict=True):
            error = math.sqrt(variance * (1 / size + 1 / sizes[0]))
            assert found.interval is not None
            assert found.p_value == pytest.approx(1 - _all_within(abs(found.difference) / error, sizes, df), abs=3e-4)
            end = (found.interval.high - found.difference) / error
            assert _all_within(end, sizes, df) == pytest.approx(0.95, abs=1e-3)


def _all_within(limit: float, sizes: list[int], df: int) -> float:
    """Return the chance that no t against the first group is beyond a limit, given its mean and the variance in turn."""
    means, weights = np.polynomial.hermite_e.hermegauss(60)
    at, shares = np.polynomial.legendre.leggauss(120)
    deviations = np.sqrt(stats.chi2(df).ppf((at + 1) / 2) / df)
    kept = np.ones((60, 120))
    for size in sizes[1:]:
        shared = math.sqrt(size / (size + sizes[0]))
        ends = [(shared * means[:, None] + side * limit * deviations) / math.sqrt(1 - shared**2) for side in (-1, 1)]
        kept *= stats.norm.cdf(ends[1]) - stats.norm.cdf(ends[0])
    return float(weights @ kept @ shares) / 2 / math.sqrt(2 * math.pi)


# -- nothing varies, too much is missing


def test_equal_constants_give_p_one_with_a_warning() -> None:
    for test in INDEPENDENT:
        found = test([[1, 1], [1, 1], [1, 1]])
        assert found.p_value == 1.0 and "by definition" in found.warnings[0] and "undefined" not in found.apa
    for test in (repeated_measures_anova, friedman):
        found = test([[1, 1, 1], [2, 2, 2]])
        assert found.p_value == 1.0 and "by definition" in found.warnings[0]


def test_one_constant_group_is_an_obstacle_for_welch_alone() -> None:
    groups = [[1.0] * 4, [1.0, 2.0, 4.0], [2.0, 0.0, 5.0]]
    assert 0 < one_way_anova(groups).p_value < 1 and 0 < kruskal_wallis(groups).p_value < 1
    with pytest.raises(InvalidSample, match=r"group 1: constant.*kruskal_wallis or one_way_anova"):
        welch_anova(groups)


def test_huge_samples() -> None:
    rng = np.random.default_rng(91)
    groups = [rng.normal(shift, 1, 30_000) for shift in (0, 0.1, 0.2)]
    for test in INDEPENDENT:
        assert test(groups).p_value < 1e-9
    for test in (repeated_measures_anova, friedman):
        assert test(np.column_stack(groups)).p_value < 1e-9
    assert all(pair.p_value < 0.01 for pair in (*tukey_hsd(groups, intervals=False), *dunn(groups)))


@pytest.mark.parametrize("test", INDEPENDENT)
def test_bad_groups_are_refused_by_name(test: Callable[..., Result]) -> None:
    for groups, message in (
        ({"a": [1, 2], "b": []}, "b: empty"),
        ({"a": [1, 2], "b": [1, None]}, "b has 1 missing value"),
        ([[1, 2]], "1 group given"),
    ):
        with pytest.raises(InvalidSample, match=message):
            test(groups)
    with pytest.raises(InvalidSample, match="alpha is 5"):
        test([[1, 2], [2, 3]], alpha=5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_way_anova([[1, 1], [2, 2]]), "no variation to go by.*chi_squared"),
        (lambda: friedman([[1, 2]]), "1 complete subject"),
        (lambda: friedman([[1, 2], [2, 3]], names=["a"]), "1 names for 2 conditions"),
        (lambda: repeated_measures_anova([[1, 2, 3], [2, 3, 4]]), "by the same amounts.*friedman"),
        (lambda: repeated_measures_anova([[1, 2], [2, 5]], correction="gg"), "correction is 'gg'"),  # type: ignore[arg-type]
        (lambda: tukey_hsd([[1, 1], [2, 2]]), "all groups are constant"),
        (lambda: games_howell([[1, 1], [2, 2]]), "group 1 and group 2 are constant"),
        (lambda: dunn([[1, 1], [1, 1]]), "all values are equal"),
        (lambda: nemenyi([[1, 2], [2, 3]], names=["a"]), "1 names for 2 conditions"),
        (lambda: dunnett([[1, 2], [2, 3]], control="a"), "control is 'a': it is one of group 1, group 2"),
        (lambda: dunnett([[1, 1], [2, 2]], control="group 1"), "all groups are constant"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
