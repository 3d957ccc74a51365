"""Tests of two groups agree with formulas written out, other packages, full enumeration and printed examples."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pingouin as pg
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from pgharness.stats.groups import (
    brunner_munzel,
    mann_whitney,
    paired_t,
    sign_test,
    student_t,
    welch_t,
    wilcoxon_signed_rank,
)
from pgharness.stats.results import Alternative, Result
from pgharness.stats.samples import InvalidSample
from pgharness.stats.shifts import shift_of_pairs
from unit.stats.data_sets import paired, two_groups

Array = NDArray[np.float64]
ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "less", "greater")
LARGER: dict[str, str] = {"two-sided": "two-sided", "less": "smaller", "greater": "larger"}
INDEPENDENT = (student_t, welch_t, mann_whitney, brunner_munzel)
PAIRED = (paired_t, wilcoxon_signed_rank, sign_test)

# Student's sleep data (R's datasets::sleep), and the depression scores of Hollander & Wolfe (1973) in ?wilcox.test
SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DEPRESSION = (
    [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30],
    [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29],
)
PERMEABILITY = [0.80, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46], [1.15, 0.88, 0.90, 0.74, 1.21]
PAIN = [1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 1, 1], [3, 3, 4, 3, 1, 2, 3, 1, 1, 5, 4]


@pytest.fixture(autouse=True)
def quiet_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pingouin")
        yield


def close(found: float | None, expected: float, *, rel: float = 1e-8, abs: float = 1e-10) -> bool:
    assert found is not None
    return found == pytest.approx(expected, rel=rel, abs=abs)


def ends(result: Result) -> tuple[float, float]:
    assert result.interval is not None
    return result.interval.low, result.interval.high


# -- t tests


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_student_and_welch_agree_with_statsmodels(alternative: Alternative) -> None:
    for one, two in two_groups(200 if alternative == "two-sided" else 50):
        means = CompareMeans(DescrStatsW(one), DescrStatsW(two))
        for test, pooling in ((student_t, "pooled"), (welch_t, "unequal")):
            found = test(one, two, alternative=alternative)
            statistic, p_value, df = means.ttest_ind(LARGER[alternative], pooling)
            assert close(found.statistic, statistic) and close(found.p_value, p_value) and close(found.df, df)  # type: ignore[arg-type]
            expected = means.tconfint_diff(0.05, LARGER[alternative], pooling)
            assert ends(found) == pytest.approx(expected, rel=1e-8)


def test_student_and_welch_agree_with_the_formulas() -> None:
    for one, two in two_groups(seed=11):
        v1, v2 = one.var(ddof=1) / len(one), two.var(ddof=1) / len(two)
        found = welch_t(one, two)
        t = (one.mean() - two.mean()) / math.sqrt(v1 + v2)
        df = (v1 + v2) ** 2 / (v1**2 / (len(one) - 1) + v2**2 / (len(two) - 1))
        # P(|T| > t) = I_{df/(df+t^2)}(df/2, 1/2)
        assert close(found.statistic, t) and close(found.p_value, stats.beta.cdf(df / (df + t * t), df / 2, 0.5))


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_paired_t_agrees_with_statsmodels_and_pingouin(alternative: Alternative) -> None:
    for one, two in paired(200 if alternative == "two-sided" else 50):
        found = paired_t(one, two, alternative=alternative)
        differences = DescrStatsW(one - two)
        statistic, p_value, df = differences.ttest_mean(0, LARGER[alternative])
        assert close(found.statistic, statistic) and close(found.p_value, p_value) and found.df == df
        assert ends(found) == pytest.approx(differences.tconfint_mean(0.05, LARGER[alternative]), rel=1e-8)
        assert close(found.effect.value, (one - two).mean() / (one - two).std(ddof=1))  # type: ignore[union-attr]


def test_t_tests_give_what_r_prints_for_the_sleep_data() -> None:
    # t.test(extra ~ group, data = sleep), the same with var.equal = TRUE, and paired
    welch, student, pair = welch_t(*SLEEP), student_t(*SLEEP), paired_t(*SLEEP)
    assert (round(welch.statistic, 4), round(welch.df, 3), round(welch.p_value, 5)) == (-1.8608, 17.776, 0.07939)  # type: ignore[arg-type]
    assert ends(welch) == pytest.approx((-3.3654832, 0.2054832), abs=5e-8)
    assert (round(student.statistic, 4), student.df, round(student.p_value, 5)) == (-1.8608, 18, 0.07919)
    assert ends(student) == pytest.approx((-3.363874, 0.203874), abs=5e-7)
    assert (round(pair.statistic, 4), pair.df, round(pair.p_value, 6)) == (-4.0621, 9, 0.002833)
    assert ends(pair) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)
    assert "t(9) = -4.06, p = .003" in pair.apa


def test_the_documented_example_of_crucible_is_recomputed() -> None:
    # its documentation prints t(7.98) = 8.45, p = .00012, d = 4.52, interval (0.051, 0.089): the p-value alone is near
    found = welch_t([0.89, 0.87, 0.90, 0.88, 0.91], [0.96, 0.97, 0.94, 0.95, 0.98], names=("control", "treatment"))
    assert close(found.statistic, -7.0) and close(found.df, 8.0)  # type: ignore[arg-type]
    assert found.p_value == pytest.approx(0.0001126, abs=5e-8)
    assert ends(found) == pytest.approx((-0.0930600, -0.0469400), abs=1e-6)


# -- rank tests


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_mann_whitney_agrees_with_enumeration_scipy_and_the_textbook(alternative: Alternative) -> None:
    enumerated = clean = approximate = 0
    for most, count in ((8, 70), (30, 70), (200, 60)):
        for one, two in two_groups(count if alternative == "two-sided" else 30, seed=5, most=most):
            found = mann_whitney(one, two, alternative=alternative)
            assert close(found.statistic, np.sign(np.subtract.outer(one, two)).sum() / 2 + len(one) * len(two) / 2)
            if "normal" in found.method:
                approximate += 1
                assert close(found.p_value, rank_sum_normal(one, two, alternative), rel=1e-7)
            elif len(np.unique(np.concatenate((one, two)))) == len(one) + len(two):
                clean += 1
                other = stats.mannwhitneyu(one, two, alternative=alternative, method="exact")
                assert close(found.p_value, other.pvalue, rel=1e-7)
            elif math.comb(len(one) + len(two), len(one)) <= 2000:
                enumerated += 1
                assert close(found.p_value, rank_sum_enumerated(one, two, alternative))
    assert enumerated > 9 and clean > 9 and approximate > 9


def rank_sum_normal(one: Array, two: Array, alternative: str) -> float:
    """The textbook approximation, with ties and continuity (Hollander & Wolfe 2014, 4.1)."""
    n1, n2 = len(one), len(two)
    n = n1 + n2
    _, counts = np.unique(np.concatenate((one, two)), return_counts=True)
    sd = math.sqrt(n1 * n2 / 12 * (n + 1 - (counts**3 - counts).sum() / (n * (n - 1))))
    above = sum((a > b) + 0.5 * (a == b) for a in one for b in two) - n1 * n2 / 2
    if alternative == "two-sided":
        return min(1.0, 2 * stats.norm.sf((abs(above) - 0.5) / sd))
    return float(stats.norm.sf(((above if alternative == "greater" else -above) - 0.5) / sd))


def rank_sum_enumerated(one: Array, two: Array, alternative: str) -> float:
    ranks = stats.rankdata(np.concatenate((one, two)))
    sums = np.array([ranks[list(chosen)].sum() for chosen in itertools.combinations(range(len(ranks)), len(one))])
    seen = ranks[: len(one)].sum()
    above, below = (sums >= seen - 1e-9).mean(), (sums <= seen + 1e-9).mean()
    return float({"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative])


def test_mann_whitney_gives_what_r_prints() -> None:
    # ?wilcox.test: Hollander & Wolfe (1973), 69f: W = 35, p-value = 0.1272 (greater)
    found = mann_whitney(*PERMEABILITY, alternative="greater")
    assert found.statistic == 35 and round(found.p_value, 4) == 0.1272
    # wilcox.test(x, y, conf.int = TRUE): two-sided p 0.2544, interval (-0.15, 0.76), difference 0.305
    both = mann_whitney(*PERMEABILITY)
    assert round(both.p_value, 4) == 0.2544 and close(both.estimate, 0.305)
    assert ends(both) == pytest.approx((-0.15, 0.76), abs=1e-9)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("zeros", ["wilcox", "pratt"])
def test_wilcoxon_agrees_with_enumeration_scipy_and_the_textbook(alternative: Alternative, zeros: str) -> None:
    exact = clean = approximate = 0
    for most, count in ((11, 70), (40, 70), (200, 60)):
        for one, two in paired(count if alternative == "two-sided" else 30, seed=6, most=most):
            differences = np.array([round(value, 14) for value in one - two])
            if np.ptp(one) > 1e4:
                differences = np.array([round(value, 6) for value in one - two])
            kept = differences[differences != 0]
            ranks = stats.rankdata(np.abs(kept))
            if zeros == "pratt":
                ranks = stats.rankdata(np.abs(differences))[differences != 0]
            found = wilcoxon_signed_rank(one, two, alternative=alternative, zeros=zeros)
            seen = ranks[kept > 0].sum()
            assert close(found.statistic, seen)
            if len(kept) <= 10:
                exact += 1
                sums = np.array(list(itertools.product((0, 1), repeat=len(kept)))) @ ranks
                above, below = (sums >= seen - 1e-9).mean(), (sums <= seen + 1e-9).mean()
                p_value = {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]
                assert close(found.p_value, p_value)
            elif "normal" in found.method:
                approximate += 1
                n, zero_count = len(differences), len(differences) - len(kept) if zeros == "pratt" else 0
                n = n if zeros == "pratt" else len(kept)
                _, counts = np.unique(ranks, return_counts=True)
                mean = n * (n + 1) / 4 - zero_count * (zero_count + 1) / 4
                square = n * (n + 1) * (2 * n + 1) - zero_count * (zero_count + 1) * (2 * zero_count + 1)
                z = (seen - mean) / math.sqrt(square / 24 - (counts**3 - counts).sum() / 48)
                tails = {"greater": stats.norm.sf(z), "less": stats.norm.cdf(z), "two-sided": 2 * stats.norm.sf(abs(z))}
                assert close(found.p_value, tails[alternative])
            elif len(np.unique(np.abs(differences))) == len(differences) and len(kept) == len(differences):
                clean += 1
                assert close(found.p_value, stats.wilcoxon(kept, alternative=alternative, method="exact").pvalue)
    assert exact > 9 and clean > 9 and approximate > 9


def test_wilcoxon_gives_what_r_prints() -> None:
    # ?wilcox.test: Hollander & Wolfe (1973), 29f: V = 40, p-value = 0.01953 (greater)
    found = wilcoxon_signed_rank(*DEPRESSION, alternative="greater")
    assert found.statistic == 40 and round(found.p_value, 5) == 0.01953
    # conf.int = TRUE: pseudomedian 0.46, interval (0.01, 0.786)
    both = wilcoxon_signed_rank(*DEPRESSION)
    assert round(both.p_value, 5) == 0.03906 and close(both.estimate, 0.46)
    assert ends(both) == pytest.approx((0.01, 0.786), abs=1e-9)


def test_pratt_keeps_the_ranks_of_equal_pairs() -> None:
    for one, two in paired(seed=7, least=14):
        differences = np.array([round(value, 14) for value in one - two])
        if not (differences == 0).any():
            continue
        ranks = stats.rankdata(np.abs(differences))
        found = wilcoxon_signed_rank(one, two, zeros="pratt")
        assert close(found.statistic, ranks[differences > 0].sum())


def test_rounding_does_not_break_ties() -> None:
    found = wilcoxon_signed_rank([0.3, 0.9, 0.6, 0.8], [0.1, 0.7, 0.8, 0.9])
    as_integers = wilcoxon_signed_rank([3, 9, 6, 8], [1, 7, 8, 9])
    assert (found.statistic, found.p_value) == (as_integers.statistic, as_integers.p_value)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_sign_test_agrees_with_the_binomial_sum(alternative: Alternative) -> None:
    for one, two in paired(200 if alternative == "two-sided" else 50, seed=8):
        positive, negative = int((one > two).sum()), int((one < two).sum())
        n = positive + negative
        found = sign_test(one, two, alternative=alternative)
        chances = [math.comb(n, k) / 2**n for k in range(n + 1)]
        above, below = sum(chances[positive:]), sum(chances[: positive + 1])
        expected = {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]
        assert found.statistic == positive and close(found.p_value, expected)
        assert ends(found)[0] <= np.median(one - two) <= ends(found)[1]


def test_the_interval_of_a_median_covers_as_its_binomial_says() -> None:
    # BSDA::SIGN.test: for n = 10 the order statistics 2 and 9 cover with 97.85%, 3 and 8 with 89.06%
    values = np.arange(1.0, 11.0)
    assert ends(sign_test(values, np.zeros(10))) == (2.0, 9.0)
    assert ends(sign_test(values, np.zeros(10), alpha=0.2)) == (3.0, 8.0)
    assert ends(sign_test(values[:5], np.zeros(5))) == (-math.inf, math.inf)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_brunner_munzel_agrees_with_scipy(alternative: Alternative) -> None:
    # scipy's statistic has the other sign, and its alternatives name the relation of first and second as ours do
    compared = 0
    for one, two in two_groups(200 if alternative == "two-sided" else 50, seed=9):
        if one.min() >= two.max() or two.min() >= one.max():
            continue
        found = brunner_munzel(one, two, alternative=alternative)
        other = stats.brunnermunzel(one, two, alternative=alternative)
        assert close(found.statistic, -other.statistic) and close(found.p_value, other.pvalue)
        compared += 1
    assert compared > 40


def test_brunner_munzel_gives_what_r_prints() -> None:
    # lawstat::brunner.munzel.test(Y, N), the pain scores of Brunner & Munzel (2000):
    # statistic 3.1375, df 17.683, p 0.005786, P(X<Y)+.5*P(X=Y) = 0.788961, interval (0.5952169, 0.9827052)
    found = brunner_munzel(*PAIN)
    assert (round(-found.statistic, 4), round(found.df, 3), round(found.p_value, 6)) == (3.1375, 17.683, 0.005786)  # type: ignore[arg-type]
    assert close(1 - found.estimate, 0.788961, abs=5e-7)  # type: ignore[operator]
    low, high = ends(found)
    assert (1 - high, 1 - low) == pytest.approx((0.5952169, 0.9827052), abs=5e-8)


# -- intervals of shifts


def test_shifts_are_medians_of_all_differences_and_intervals_invert_the_exact_test() -> None:
    for one, two in itertools.islice(two_groups(seed=10, least=4, most=12), 60):
        if len(np.unique(np.concatenate((one, two)))) < len(one) + len(two):
            continue
        found = mann_whitney(one, two, alpha=0.1)
        assert close(found.estimate, float(np.median(np.subtract.outer(one, two))))
        low, high = ends(found)
        step = 1e-7 * max(abs(low), abs(high), 1e-12)
        for inside, outside in ((low + step, low - step), (high - step, high + step)):
            assert stats.mannwhitneyu(one - inside, two, method="exact").pvalue > 0.1
            assert stats.mannwhitneyu(one - outside, two, method="exact").pvalue <= 0.1


def test_large_samples_need_no_matrix_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for trial in range(20):
        one, two = rng.normal(0, 1, 70 + trial), rng.integers(0, 4, 61).astype(float)
        pair = rng.normal(0, 1, 61)
        whole = mann_whitney(one, two), wilcoxon_signed_rank(pair, two)
        with monkeypatch.context() as patch:
            patch.setattr("pgharness.stats.shifts._MOST_CELLS", 10)
            parts = mann_whitney(one, two), wilcoxon_signed_rank(pair, two)
        for a, b in zip(whole, parts, strict=True):
            assert close(b.estimate, a.estimate, abs=1e-12) and ends(b) == pytest.approx(ends(a), abs=1e-12)  # type: ignore[arg-type]


def test_huge_samples_are_quick() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.normal(0, 1, 20_000), rng.normal(0.1, 1, 20_000)
    for test in (*INDEPENDENT, *PAIRED):
        found = test(one, two)
        assert found.p_value < 1e-6 and found.estimate is not None and "NaN" not in found.apa


# -- what is refused, and what has nothing to vary


@pytest.mark.parametrize("test", [*INDEPENDENT, *PAIRED])
def test_bad_input_is_refused_by_name(test: Callable[..., Result]) -> None:
    bad: list[tuple[list[Any], str]] = [
        ([], "empty"),
        ([1.0, np.nan, 2.0], "missing|no value"),
        (["a", 1, 2], "not a number"),
    ]
    for values, message in bad:
        with pytest.raises(InvalidSample, match=f"old.*{message}|{message}.*old"):
            test(values, [1.0, 2.0, 4.0][: len(values)], names=("old", "new"))
    with pytest.raises(InvalidSample, match="alternative is 'both'"):
        test([1, 2, 3], [2, 3, 5], alternative="both")
    with pytest.raises(InvalidSample, match="alpha is 5"):
        test([1, 2, 3], [2, 3, 5], alpha=5)


@pytest.mark.parametrize("test", [*INDEPENDENT, *PAIRED])
def test_equal_constants_give_p_one_with_a_warning(test: Callable[..., Result]) -> None:
    found = test([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert found.p_value == 1.0 and "p = 1 by definition" in found.warnings[0]
    assert not math.isnan(found.statistic) and "undefined" not in found.apa


def test_different_constants_are_refused_where_variation_is_needed() -> None:
    for test in (student_t, welch_t):
        with pytest.raises(InvalidSample, match=r"old is always 1 and new always 2.*permutation_test"):
            test([1, 1, 1], [2, 2, 2], names=("old", "new"))
    with pytest.raises(InvalidSample, match=r"differ by -0.1 in every pair.*sign_test"):
        paired_t([0.1, 0.3, 0.6], [0.2, 0.4, 0.7])
    with pytest.raises(InvalidSample, match=r"do not overlap.*mann_whitney"):
        brunner_munzel([1, 2, 3], [4, 5, 6])
    assert mann_whitney([1, 1, 1], [2, 2, 2]).p_value == pytest.approx(0.1)
    assert sign_test([1, 1, 1], [2, 2, 2]).p_value == 0.25


def test_one_constant_group_is_no_obstacle() -> None:
    for test in INDEPENDENT:
        found = test([1.0] * 5, [1.0, 2.0, 0.0, 4.0])
        assert 0 < found.p_value <= 1 and math.isfinite(found.statistic)


def test_too_few_values_to_ever_be_significant_are_pointed_out() -> None:
    assert "no outcome gives p below 0.1" in mann_whitney([1, 2, 3], [4, 5, 6]).warnings[0]
    assert "no outcome gives p below 0.062" in wilcoxon_signed_rank([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]).warnings[0]
    assert "no outcome" in sign_test([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]).warnings[0]
    assert not mann_whitney([1, 2, 3, 4], [4.5, 5, 6, 7]).warnings


@pytest.mark.parametrize("test", [*INDEPENDENT, *PAIRED])
def test_swapping_the_groups_mirrors_the_result(test: Callable[..., Result]) -> None:
    source: Any = paired if test in PAIRED else two_groups
    for one, two in source(40, seed=12, least=4):
        if one.min() >= two.max() or two.min() >= one.max():
            continue
        a, b = test(one, two, alternative="less"), test(two, one, alternative="greater")
        assert close(a.p_value, b.p_value)
        if a.estimate_name != "common-language effect":
            assert close(a.estimate, -(b.estimate or 0.0))


def test_welch_agrees_with_pingouin() -> None:
    for one, two in itertools.islice(two_groups(seed=13), 50):
        other = pg.ttest(one, two, correction=True)
        found = welch_t(one, two)
        assert close(found.statistic, float(other["T"].iloc[0])) and close(found.p_value, float(other.iloc[0, 3]))


def test_shifts_of_large_tied_and_skewed_samples_are_those_of_all_sums() -> None:
    rng = np.random.default_rng(12)
    for number in range(200):
        size = int(rng.integers(460, 620))  # more sums than are formed at once
        one = (rng.normal(size=size), rng.integers(0, 9, size) / 3, rng.lognormal(0, 2, size))[number % 3]
        one[: int(rng.integers(0, 300))] = one[0]
        rows, columns = np.triu_indices(size)
        averages = np.sort((one[rows] + one[columns]) / 2)
        level = float(rng.choice([0.5, 0.95, 0.999]))
        estimate, interval = shift_of_pairs(one, level)
        cut = int(np.searchsorted(averages, interval.low, side="right"))
        assert estimate == pytest.approx(float(np.median(averages)), abs=1e-12)
        z = stats.norm.isf((1 - level) / 2) * math.sqrt(size * (size + 1) * (2 * size + 1) / 24)
        expected = math.floor(len(averages) / 2 - z)
        assert interval.low == pytest.approx(averages[expected - 1], abs=1e-12) and cut >= expected
        assert interval.high == pytest.approx(averages[len(averages) - expected], abs=1e-12)
