"""Crucible's documented examples with correct numbers: what it prints is recomputed, and shown to contradict itself.

docs/statistics.md tells which of the printed numbers cannot be.
"""

from __future__ import annotations

import math

import numpy as np
import pingouin as pg
import pytest
from scipy import optimize, stats
from statsmodels.stats.power import NormalIndPower
from statsmodels.stats.proportion import proportions_ztest
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from pgharness.stats import (
    TwoProportions,
    cohen_d,
    cohen_h,
    compare,
    paired_difference,
    power_of,
    risk_difference,
    sample_size,
    two_proportion_z,
    welch_t,
)

CONTROL, TREATMENT = [0.89, 0.87, 0.90, 0.88, 0.91], [0.96, 0.97, 0.94, 0.95, 0.98]
REPEATS, QUESTIONS = 3, 100
ENSEMBLE, SINGLE = 289, 267  # of 300 answers: the totals nearest to the accuracies of the report, 96.3% and 89.1%


def test_control_against_treatment_has_these_numbers() -> None:
    found = welch_t(TREATMENT, CONTROL, names=("treatment", "control"))
    other = CompareMeans(DescrStatsW(np.array(TREATMENT)), DescrStatsW(np.array(CONTROL)))
    statistic, p_value, df = other.ttest_ind(usevar="unequal")
    assert (found.statistic, found.p_value, found.df) == pytest.approx((statistic, p_value, df), rel=1e-10)
    assert (round(found.statistic, 2), found.df, round(found.p_value, 5)) == (7.0, pytest.approx(8.0), 0.00011)
    assert found.interval is not None
    ends = other.tconfint_diff(usevar="unequal")
    assert (found.interval.low, found.interval.high) == pytest.approx(ends, rel=1e-10)
    assert [round(end, 3) for end in ends] == [0.047, 0.093]
    d = cohen_d(TREATMENT, CONTROL)
    assert d.value == pytest.approx(pg.compute_effsize(TREATMENT, CONTROL, eftype="cohen"), rel=1e-10)
    assert round(d.value, 2) == 4.43
    assert [round(group.sd, 3) for group in found.groups] == [0.016, 0.016]
    # the interval of d holds the noncentralities whose t is seen in either tail
    assert d.interval is not None
    for end, tail in ((d.interval.low, 0.975), (d.interval.high, 0.025)):
        assert stats.nct.cdf(found.statistic, 8, end / math.sqrt(2 / 5)) == pytest.approx(tail, abs=1e-8)
    assert [round(end, 2) for end in (d.interval.low, d.interval.high)] == [1.93, 6.86]
    assert "t(8) = 7.00, p < .001" in compare({"treatment": TREATMENT, "control": CONTROL}, paired=False).result.apa


def test_what_is_printed_of_control_and_treatment_cannot_be() -> None:
    one, two = np.var(CONTROL, ddof=1), np.var(TREATMENT, ddof=1)
    assert one == pytest.approx(two, rel=1e-12), "Welch's df is then 2n - 2 = 8, not 7.98"
    n, t, d, low, high = 5, 8.45, 4.52, 0.051, 0.089
    assert t * math.sqrt(2 / n) == pytest.approx(5.34, abs=0.005) and abs(t * math.sqrt(2 / n) - d) > 0.8
    assert 2 * stats.t.sf(t, 7.98) < 0.00012 / 3
    error = math.sqrt((one + two) / n)
    assert (high - low) / 2 / error < stats.norm.ppf(0.975) < stats.t.ppf(0.975, 8), "narrower than with infinite df"


def test_the_ensemble_report_has_these_numbers() -> None:
    answers = REPEATS * QUESTIONS
    table = [[ENSEMBLE, answers - ENSEMBLE], [SINGLE, answers - SINGLE]]
    found = two_proportion_z(table)
    statistic, p_value = proportions_ztest([ENSEMBLE, SINGLE], [answers, answers])
    assert (found.statistic, found.p_value) == pytest.approx((statistic, p_value), rel=1e-10)
    assert (round(found.statistic, 2), round(found.p_value, 5)) == (3.45, 0.00057)
    difference, h = risk_difference(table), cohen_h(table)
    assert round(100 * difference.value, 1) == 7.3
    assert h.value == pytest.approx(2 * math.asin(math.sqrt(289 / 300)) - 2 * math.asin(math.sqrt(267 / 300)))
    assert (round(h.value, 2), h.magnitude) == (0.29, "small")
    right = [np.repeat([1.0, 0.0], row) for row in table]
    assert round(cohen_d(*right).value, 2) == 0.28


@pytest.mark.parametrize(("is_opposed", "p_value"), [(False, 7.52e-7), (True, 0.0534)])
def test_totals_do_not_say_what_a_comparison_by_question_finds(is_opposed: bool, p_value: float) -> None:
    """The same totals: wrong answers scattered and shared, or whole questions that only one of them gets wrong."""
    single, ensemble = np.zeros(QUESTIONS), np.zeros(QUESTIONS)  # wrong answers of 3
    if is_opposed:
        single[:11], ensemble[11:14], ensemble[14] = 3, 3, 2
    else:
        single[:33], ensemble[:11] = 1, 1
    assert (300 - single.sum(), 300 - ensemble.sum()) == (SINGLE, ENSEMBLE)
    cases = np.repeat(np.arange(QUESTIONS), REPEATS).tolist()
    one, two = ([float(i >= w) for w in wrong for i in range(REPEATS)] for wrong in (ensemble, single))
    found = paired_difference(one, two, cases=cases)
    assert found.p_value == pytest.approx(stats.ttest_rel(1 - ensemble / 3, 1 - single / 3).pvalue, rel=1e-9)
    assert found.p_value == pytest.approx(p_value, rel=0.01)


def test_what_is_printed_of_the_ensemble_cannot_be() -> None:
    high, low = 96.3, 89.1
    assert not any(round(100 * right / 300, 1) == low for right in range(301)), "no 300 answers are 89.1% right"
    gap, spreads = high - low, (1.2, 2.1)
    readings = {  # of the number after the plus-minus sign: what it is in standard deviations of a repeat's accuracy
        "standard deviation": 1.0,
        "standard error": math.sqrt(REPEATS),
        "half of a 95% interval": math.sqrt(REPEATS) / stats.t.ppf(0.975, REPEATS - 1),
        "half of a 95% interval, normal": math.sqrt(REPEATS) / stats.norm.ppf(0.975),
    }
    found = {
        name: gap / math.hypot(*(scale * one for one in spreads)) * math.sqrt(2) for name, scale in readings.items()
    }
    assert {name: round(d, 1) for name, d in found.items()} == {
        "standard deviation": 4.2,
        "standard error": 2.4,
        "half of a 95% interval": 10.5,
        "half of a 95% interval, normal": 4.8,
    }
    # as standard deviations of three repeats each, they give no p below .001 either
    welch = stats.ttest_ind_from_stats(high, spreads[0], REPEATS, low, spreads[1], REPEATS, equal_var=False)
    assert welch.pvalue == pytest.approx(0.0122, abs=5e-4)


def test_a_large_d_of_right_and_wrong_answers_cannot_be() -> None:
    """The first hypothesis expects d above 1 between accuracies of 99% and 92% of 200 questions."""
    spread = math.sqrt((0.99 * 0.01 + 0.92 * 0.08) / 2)
    assert round(0.07 / spread, 2) == 0.34
    # with 99% on one side, d of 1 needs the other to be right in fewer than two of three
    other = optimize.brentq(lambda p: (0.99 - p) / math.sqrt((0.99 * 0.01 + p * (1 - p)) / 2) - 1, 0.5, 0.98)
    assert round(other, 2) == 0.64
    h = 2 * math.asin(math.sqrt(0.99)) - 2 * math.asin(math.sqrt(0.92))
    design = TwoProportions(0.92, 0.99)
    assert round(h, 2) == 0.37
    assert power_of(design, 200).power == pytest.approx(NormalIndPower().power(h, 200, 0.05), abs=0.04)
    assert sample_size(design).n in range(100, 150)
