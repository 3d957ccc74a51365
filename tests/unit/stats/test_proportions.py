"""Tests of yes-no outcomes agree with statsmodels, pingouin, sums written out and published tables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pingouin as pg
import pytest
from scipy import stats
from statsmodels.stats import contingency_tables, proportion

from pgharness.stats.proportions import (
    binomial_test,
    chi_squared,
    cochran_q,
    fisher_exact,
    mcnemar,
    outcome_table,
    paired_table,
    proportion_interval,
    two_proportion_z,
)
from pgharness.stats.results import Alternative, Result
from pgharness.stats.samples import InvalidSample
from unit.stats.data_sets import tables_2x2

ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "less", "greater")
LARGER = {"two-sided": "two-sided", "less": "smaller", "greater": "larger"}
BENTUR = [[1, 1], [7, 12]]  # airway hyper-responsiveness before and after transplantation


@pytest.fixture(autouse=True)
def quiet_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pingouin")
        yield


def ends(result: Result) -> tuple[float, float]:
    assert result.interval is not None
    return result.interval.low, result.interval.high


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("wilson", "wilson"), ("exact", "beta"), ("jeffreys", "jeffreys"), ("agresti-coull", "agresti_coull")],
)
def test_intervals_of_a_proportion_agree_with_statsmodels(method: str, theirs: str) -> None:
    rng = np.random.default_rng(30)
    for _ in range(200):
        n = int(rng.integers(1, rng.choice([5, 50, 5000])))
        successes, level = int(rng.integers(0, n + 1)), float(rng.choice([0.8, 0.95, 0.99]))
        found = proportion_interval(successes, n, level=level, method=method)  # type: ignore[arg-type]
        low, high = proportion.proportion_confint(successes, n, 1 - level, theirs)
        if method == "jeffreys":  # statsmodels leaves the open ends of 0 and n successes where the quantile is
            low, high = (0.0 if successes == 0 else low), (1.0 if successes == n else high)
        assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=1e-9)


def test_intervals_of_a_proportion_are_those_that_newcombe_prints() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 857-872, table I: 81/263, 15/148, 0/20, 1/29
    published = {
        "wilson": [(0.2553, 0.3662), (0.0624, 0.1605), (0.0, 0.1611), (0.0061, 0.1718)],
        "exact": [(0.2527, 0.3676), (0.0578, 0.1617), (0.0, 0.1684), (0.0009, 0.1776)],
    }
    for method, rows in published.items():
        for (successes, n), expected in zip([(81, 263), (15, 148), (0, 20), (1, 29)], rows, strict=True):
            interval = proportion_interval(successes, n, method=method).interval  # type: ignore[arg-type]
            assert (round(interval.low, 4), round(interval.high, 4)) == expected


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_two_proportion_z_agrees_with_statsmodels(alternative: Alternative) -> None:
    for cells in tables_2x2(200 if alternative == "two-sided" else 50):
        found = two_proportion_z(cells, alternative=alternative)
        z, p_value = proportion.proportions_ztest(cells[:, 0], cells.sum(axis=1), alternative=LARGER[alternative])
        assert found.statistic == pytest.approx(z, rel=1e-8, abs=1e-10)
        assert found.p_value == pytest.approx(p_value, rel=1e-8)
        (x1, x2), (n1, n2) = cells[:, 0], cells.sum(axis=1)
        low, high = proportion.confint_proportions_2indep(x1, n1, x2, n2, method="newcomb")
        assert ends(found) == pytest.approx((low, high), abs=1e-8)


def test_differences_have_the_intervals_that_newcombe_prints() -> None:
    # Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10: 56/70 - 48/80, 9/10 - 3/10, 10/10 - 0/20
    for table, expected in (
        ([[56, 14], [48, 32]], (0.0524, 0.3339)),
        ([[9, 1], [3, 7]], (0.1705, 0.8090)),
        ([[10, 0], [0, 20]], (0.6791, 1.0)),
        ([[5, 51], [0, 29]], (-0.0381, 0.1926)),
    ):
        low, high = ends(two_proportion_z(table))
        assert (round(low, 4), round(high, 4)) == expected


def test_chi_squared_agrees_with_the_sum_and_with_r() -> None:
    rng = np.random.default_rng(32)
    for _ in range(200):
        cells = rng.integers(0, 30, (int(rng.integers(2, 5)), int(rng.integers(2, 5)))) + np.eye(1, dtype=int)
        if not (cells.sum(axis=1).all() and cells.sum(axis=0).all()):
            continue
        expected = np.outer(cells.sum(axis=1), cells.sum(axis=0)) / cells.sum()
        chi2 = ((cells - expected) ** 2 / expected).sum()
        df = (cells.shape[0] - 1) * (cells.shape[1] - 1)
        found = chi_squared(cells)
        assert found.statistic == pytest.approx(chi2, rel=1e-9, abs=1e-12) and found.df == df
        assert found.p_value == pytest.approx(stats.gamma.sf(chi2 / 2, df / 2), rel=1e-8)
    # ?chisq.test: Agresti (2007), party by gender: X-squared = 30.07, df = 2, p-value = 2.954e-07
    found = chi_squared([[762, 327, 468], [484, 239, 477]])
    assert (round(found.statistic, 2), found.df) == (30.07, 2)
    assert found.p_value == pytest.approx(2.954e-7, abs=5e-11)
    assert "chi2(2, N = 2757) = 30.07, p < .001" in found.apa


def test_yates_and_random_tables() -> None:
    for cells in tables_2x2(200, seed=33, least=1):
        yates = chi_squared(cells, yates=True)
        (a, b), (c, d) = cells.astype(float)
        n = cells.sum()
        gap = max(abs(a * d - b * c) - n / 2, 0.0)
        expected = n * gap**2 / ((a + b) * (c + d) * (a + c) * (b + d))
        assert yates.statistic == pytest.approx(expected, rel=1e-8, abs=1e-10)
    exact = fisher_exact([[8, 2], [3, 7]]).p_value
    random = chi_squared([[8, 2], [3, 7]], n_resamples=4999, rng=1).p_value
    assert random == pytest.approx(exact, abs=4 * math.sqrt(exact / 4999))


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_fisher_agrees_with_the_hypergeometric_sum(alternative: Alternative) -> None:
    for cells in tables_2x2(200 if alternative == "two-sided" else 50, seed=34):
        n, row, column = int(cells.sum()), int(cells[0].sum()), int(cells[:, 0].sum())
        if n > 200:
            continue
        support = range(max(0, row + column - n), min(row, column) + 1)
        chances = {k: math.comb(column, k) * math.comb(n - column, row - k) / math.comb(n, row) for k in support}
        seen = int(cells[0, 0])
        expected = {
            "less": sum(chance for k, chance in chances.items() if k <= seen),
            "greater": sum(chance for k, chance in chances.items() if k >= seen),
            "two-sided": sum(chance for chance in chances.values() if chance <= chances[seen] * (1 + 1e-7)),
        }
        assert fisher_exact(cells, alternative=alternative).p_value == pytest.approx(
            min(expected[alternative], 1.0), rel=1e-8
        )


def test_fisher_gives_what_r_prints() -> None:
    # ?fisher.test: the tea tasting: p 0.2429 (greater), odds ratio 6.408309, interval (0.3135693, Inf); R's root of
    # w^4 - 36 w^2 - 32 w - 3 is right to 5 digits
    tea = fisher_exact([[3, 1], [1, 3]], alternative="greater")
    assert round(tea.p_value, 4) == 0.2429
    assert tea.effect is not None and tea.effect.interval is not None
    assert tea.effect.value == pytest.approx(6.408309, abs=2e-5)
    assert tea.effect.value == pytest.approx(max(np.roots([1, 0, -36, -32, -3])), rel=1e-8)
    assert (tea.effect.interval.low, tea.effect.interval.high) == pytest.approx((0.3135693, math.inf), abs=2e-5)
    # the convictions of twins: p 0.0004652 (less), odds ratio 0.04693661, interval to 0.2849601
    twins = fisher_exact([[2, 15], [10, 3]], alternative="less")
    assert twins.p_value == pytest.approx(0.0004652, abs=5e-8)
    assert twins.effect is not None and twins.effect.interval is not None
    assert twins.effect.value == pytest.approx(0.04693661, abs=2e-5)
    assert twins.effect.interval.high == pytest.approx(0.2849601, abs=2e-5)


def test_mcnemar_agrees_with_statsmodels() -> None:
    for cells in tables_2x2(seed=35):
        exact = contingency_tables.mcnemar(cells, exact=True)
        assert mcnemar(cells, method="exact").p_value == pytest.approx(min(exact.pvalue, 1.0), rel=1e-8)
        b, c = int(cells[0, 1]), int(cells[1, 0])
        if b + c == 0:
            continue
        wald = contingency_tables.mcnemar(cells, exact=False, correction=False)
        found = mcnemar(cells, method="asymptotic")
        assert found.statistic**2 == pytest.approx(wald.statistic, rel=1e-8, abs=1e-12)
        assert found.p_value == pytest.approx(wald.pvalue, rel=1e-8)
        # mid-p is the exact p less the chance of what was observed (Fagerland et al. 2013, equation 6)
        middle = exact.pvalue - stats.binom.pmf(b, b + c, 0.5) if b != c else 1.0
        assert mcnemar(cells).p_value == pytest.approx(middle, rel=1e-7)


def test_one_sided_mcnemar_tests_add_up() -> None:
    for cells in tables_2x2(seed=36):
        greater, less = (mcnemar(cells, alternative=side).p_value for side in ("greater", "less"))  # type: ignore[arg-type]
        assert greater + less == pytest.approx(1.0 if cells[0, 1] + cells[1, 0] else 2.0)


def test_mcnemar_gives_what_fagerland_prints() -> None:
    # Fagerland, Lydersen & Laake (2014), Statistics in Medicine 33, table VIII, and R's contingencytables
    assert round(mcnemar(BENTUR, method="asymptotic").p_value, 4) == 0.0339
    assert round(mcnemar(BENTUR, method="mid-p").p_value, 4) == 0.0391
    assert round(mcnemar(BENTUR, method="exact").p_value, 4) == 0.0703
    low, high = ends(mcnemar(BENTUR))
    assert (round(low, 3), round(high, 3)) == (-0.507, -0.026)
    # ?mcnemar.test: Agresti (1990), approval of the president: chi-squared 34.712 with its continuity correction
    approval = mcnemar([[794, 150], [86, 570]], method="asymptotic")
    assert approval.statistic == pytest.approx((150 - 86) / math.sqrt(236))
    assert (abs(150 - 86) - 1) ** 2 / 236 == pytest.approx(16.82, abs=0.01)  # his 1600 pairs, 150 against 86


def test_paired_intervals_hold_the_difference_and_mirror() -> None:
    for cells in tables_2x2(seed=37):
        found, mirrored = mcnemar(cells), mcnemar(cells.T)
        low, high = ends(found)
        assert -1 <= low <= (found.estimate or 0.0) <= high <= 1
        assert ends(mirrored) == pytest.approx((-high, -low), abs=1e-12)


def test_cochran_q_agrees_with_statsmodels_and_pingouin() -> None:
    rng = np.random.default_rng(38)
    compared = 0
    while compared < 200:
        outcomes = (rng.random((int(rng.integers(4, 40)), int(rng.integers(2, 6)))) < rng.random()).astype(int)
        if (outcomes.sum(axis=1) % outcomes.shape[1] == 0).all():
            continue
        compared += 1
        found = cochran_q(outcomes)
        other = contingency_tables.cochrans_q(outcomes)
        assert (found.statistic, found.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-8, abs=1e-12)
        if compared <= 30:
            table = pd.DataFrame(outcomes).rename_axis("case").reset_index().melt("case")
            row = pg.cochran(table, dv="value", within="variable", subject="case")
            assert found.statistic == pytest.approx(float(row["Q"].iloc[0]), rel=1e-8, abs=1e-12)
    if outcomes.shape[1] == 2:
        assert found.p_value == pytest.approx(mcnemar(paired_table(*outcomes.T), method="asymptotic").p_value)


def test_two_conditions_make_cochran_q_the_mcnemar_test() -> None:
    rng = np.random.default_rng(39)
    outcomes = rng.integers(0, 2, (50, 2))
    found = mcnemar(paired_table(outcomes[:, 0], outcomes[:, 1]), method="asymptotic")
    assert cochran_q(outcomes).statistic == pytest.approx(found.statistic**2)


def test_binomial_test_gives_what_r_prints() -> None:
    # ?binom.test: Conover (1971), 682 of 925 plants against 3/4: p 0.3825, interval (0.7076683, 0.7654066)
    found = binomial_test(682, 925, expected=0.75)
    assert round(found.p_value, 4) == 0.3825
    assert ends(found) == pytest.approx((0.7076683, 0.7654066), abs=5e-8)


def test_tables_come_from_samples() -> None:
    assert outcome_table({"a": [True, False, True], "b": [0, 0]}).tolist() == [[2, 1], [0, 2]]
    assert paired_table([1, 1, 0, 0, 1], [1, 0, 1, 0, 1]).tolist() == [[2, 1], [1, 1]]
    assert paired_table([1, None, 0], [1, 0, 1], nan="omit").tolist() == [[1, 0], [1, 0]]


def test_outcomes_that_do_not_vary_give_p_one() -> None:
    for found in (
        two_proportion_z([[5, 0], [7, 0]]),
        chi_squared([[5, 0], [7, 0]]),
        fisher_exact([[5, 0], [7, 0]]),
        mcnemar([[5, 0], [0, 3]]),
        mcnemar([[5, 0], [0, 3]], method="asymptotic"),
        cochran_q([[1, 1, 1], [0, 0, 0]]),
    ):
        assert found.p_value == 1.0 and "by definition" in found.warnings[0] and "undefined" not in found.apa


def test_small_expected_counts_are_pointed_out() -> None:
    assert chi_squared([[1, 2], [3, 1]]).assumptions[0].is_met is False
    assert chi_squared([[20, 20], [30, 10]]).assumptions[0].is_met is True
    assert "few for the chi-squared" in cochran_q([[1, 0, 0], [1, 1, 0]]).warnings[0]


def test_huge_counts() -> None:
    big = [[5_000_000, 5_000_000], [5_010_000, 4_990_000]]
    for test in (two_proportion_z, chi_squared, mcnemar):
        assert 0 <= test(big).p_value < 0.05
    assert proportion_interval(5_000_000, 10_000_000).interval.width < 0.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportion_interval(5, 4), "5 successes of 4"),
        (lambda: proportion_interval(0, 0), "0 successes of 0"),
        (lambda: proportion_interval(1, 4, method="wald"), "method is 'wald'"),  # type: ignore[arg-type]
        (lambda: proportion_interval(1, 4, level=95), "level is 95"),
        (lambda: binomial_test(1, 4, expected=2), "expected is 2"),
        (lambda: two_proportion_z([[1, 2, 3], [4, 5, 6]]), "table is 2 x 3: this needs 2 x 2"),
        (lambda: two_proportion_z([[0.5, 0.5], [1, 2]]), "not counts"),
        (lambda: two_proportion_z([[1, -1], [1, 2]]), "not counts"),
        (lambda: two_proportion_z([[0, 0], [1, 2]]), "row 1 of the table is all 0"),
        (lambda: chi_squared([[0, 0], [1, 2]]), "row 1 of the table is all 0: leave it out"),
        (lambda: chi_squared([[0, 0], [0, 0]]), "all counts are 0"),
        (lambda: mcnemar([[1, 2], [3, 4]], method="yates"), "method is 'yates'"),  # type: ignore[arg-type]
        (lambda: cochran_q([[1, 2], [0, 1]]), "outcomes has 2: outcomes must be 0 or 1"),
        (lambda: outcome_table([[1, 0.5], [0, 1]]), "group 1 has 0.5"),
        (lambda: paired_table([1, 0], [1]), "first has 2 values and second has 1"),
        (lambda: fisher_exact([[1, 2], [3, 4]], alternative="both"), "alternative is 'both'"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
