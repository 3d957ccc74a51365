"""The choice of a test follows the design, then the data, and says why; a test of another design is never taken."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pgharness.stats.samples import InvalidSample
from pgharness.stats.selection import Outcome, compare

RNG = np.random.default_rng(111)
NORMAL, WIDE, SKEWED = RNG.normal(5, 1, 40), RNG.normal(5.3, 3, 35), RNG.lognormal(0, 1.2, 14)
YES, NO = (RNG.random(60) < 0.8).astype(float), (RNG.random(60) < 0.5).astype(float)


@pytest.mark.parametrize(
    ("groups", "paired", "outcome", "test", "beside"),
    [
        ([NORMAL, WIDE], False, None, "Welch t test", "Brunner-Munzel test"),
        ([NORMAL[:8], WIDE[:9]], False, None, "Welch t test", "Mann-Whitney U test"),
        ([SKEWED, SKEWED[::-1] * 1.7], False, None, "Brunner-Munzel test", "Permutation test"),
        ([SKEWED[:9], SKEWED[:9] * 3.1], False, None, "Mann-Whitney U test", "Permutation test"),
        ([NORMAL, WIDE], False, "ordinal", "Brunner-Munzel test", None),
        ([[1, 1, 1], [2, 2, 2]], False, None, "Permutation test", None),
        ([NORMAL[:35], WIDE], True, None, "Paired t test", "Wilcoxon signed-rank test"),
        ([np.exp(SKEWED), np.zeros(14)], True, None, "Paired permutation test", "Wilcoxon signed-rank test"),
        ([NORMAL[:35], WIDE], True, "ordinal", "Wilcoxon signed-rank test", None),
        ([[1, 2, 3], [2, 3, 4]], True, None, "Paired permutation test", "Wilcoxon signed-rank test"),
        ([YES, NO], True, None, "McNemar test, mid-p", "McNemar test, exact"),
        ([YES, NO], False, None, "Two-proportion z test", "Fisher's exact test"),
        ([YES[:6], NO[:7]], False, None, "Fisher's exact test", "Two-proportion z test"),
        ([[1, 1], [1, 1, 1]], False, None, "Fisher's exact test", None),
        ([NORMAL, WIDE, NORMAL + 1], False, None, "Welch ANOVA", "Kruskal-Wallis test"),
        ([SKEWED, SKEWED * 2, SKEWED * 3], False, None, "Kruskal-Wallis test", None),
        ([NORMAL, WIDE, NORMAL + 1], False, "ordinal", "Kruskal-Wallis test", None),
        ([[1, 1, 1], [1, 2, 3], [3, 4, 5]], False, None, "Kruskal-Wallis test", None),
        (
            [NORMAL[:35], WIDE, NORMAL[5:]],
            True,
            None,
            "Repeated-measures ANOVA, Greenhouse-Geisser corrected",
            "Friedman test",
        ),
        ([SKEWED, SKEWED[::-1] * 2, SKEWED**2], True, None, "Friedman test", None),
        ([NORMAL[:35], WIDE, NORMAL[5:]], True, "ordinal", "Friedman test", None),
        ([[1, 2, 4], [2, 3, 5], [3, 4, 6]], True, None, "Friedman test", None),
        ([YES, NO, YES], True, None, "Cochran's Q test", "Friedman test"),
        ([YES, NO, YES], False, None, "Chi-squared test", "Chi-squared test"),
    ],
)
def test_the_design_decides(
    groups: list[object], paired: bool, outcome: Outcome | None, test: str, beside: str | None
) -> None:
    choice = compare(groups, paired=paired, outcome=outcome)
    assert choice.result.test == test
    assert (choice.alternative.test if choice.alternative else None) == beside
    assert len(choice.reasons) >= 3 and choice.reasons[0].startswith(str(len(groups)))
    assert choice.result.apa in choice.explanation
    json.dumps(choice.as_dict(), allow_nan=False)


def test_the_numbers_are_those_of_the_chosen_test() -> None:
    choice = compare({"old": NORMAL, "new": WIDE}, paired=False)
    other = stats.ttest_ind(NORMAL, WIDE, equal_var=False)
    assert (choice.result.statistic, choice.result.p_value) == pytest.approx((other.statistic, other.pvalue))
    assert [group.name for group in choice.result.groups] == ["old", "new"]
    assert {check.test for check in choice.result.assumptions} == {"Shapiro-Wilk", "Brown-Forsythe"}
    swapped = compare({"old": NORMAL, "new": WIDE}, paired=False, alternative="less")
    assert swapped.result.p_value == pytest.approx(
        stats.ttest_ind(NORMAL, WIDE, equal_var=False, alternative="less").pvalue
    )


def test_several_groups_come_with_their_comparisons() -> None:
    choice = compare({"a": NORMAL, "b": WIDE, "c": NORMAL + 1}, paired=False)
    assert [(c.first, c.second) for c in choice.result.comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert choice.alternative is not None and len(choice.alternative.comparisons) == 3


def test_replications_of_a_case_count_once() -> None:
    rng = np.random.default_rng(112)
    case = rng.normal(size=20).repeat(5)
    one, two = case + rng.normal(0, 0.05, 100), np.zeros(100)
    labels = np.arange(20).repeat(5)
    choice = compare([one, two], paired=True, clusters=labels)
    averages = one.reshape(20, 5).mean(axis=1)
    assert choice.result.p_value == pytest.approx(stats.ttest_1samp(averages, 0).pvalue)
    assert "20 clusters" in choice.explanation
    binary = compare([(one > 0).astype(int), np.zeros(100)], paired=True, clusters=labels)
    assert binary.outcome == "binary" and "McNemar" not in binary.result.test


def test_results_that_disagree_are_pointed_out() -> None:
    one = np.array([0.1, 0.2, 0.3, 0.15, 0.25, 0.12, 0.22, 0.31, 0.4, 30.0])
    choice = compare([one, -one / 50], paired=True)
    assert choice.agrees == (choice.result.is_significant() == choice.alternative.is_significant())  # type: ignore[union-attr]


def test_missing_values_of_paired_groups_take_the_case_with_them() -> None:
    choice = compare([[1.0, 2.0, None, 4.0, 7.0], [2.0, 2.5, 3.0, None, 9.0]], paired=True, nan="omit")
    assert choice.result.n == 3


def test_nothing_that_varies_is_no_error() -> None:
    for paired in (True, False):
        for groups in ([[0.5] * 4, [0.5] * 4], [[1] * 4, [1] * 4], [[0.5] * 4] * 3, [[1] * 4] * 3):
            assert compare(groups, paired=paired).result.p_value == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare([[1, 2]], paired=False), "1 group given"),
        (lambda: compare([[1, 2], []], paired=False), "group 2: empty"),
        (lambda: compare([[1, 2], [1]], paired=True), "align them by case"),
        (lambda: compare([[1, None], [1, 2]], paired=True), "missing value"),
        (lambda: compare([[1, 2], [2, 3]], paired=False, outcome="binary"), "there is a value 2"),
        (lambda: compare([[1, 2], [2, 3]], paired=False, outcome="nominal"), "outcome is 'nominal'"),  # type: ignore[arg-type]
        (lambda: compare([[1, 2]] * 3, paired=False, alternative="less"), "3 groups have no direction"),
        (lambda: compare([[1, 2], [2, 3]], paired=False, clusters=[1, 2]), "clusters are for two paired groups"),
        (lambda: compare([[1, 2], [2, 3]], paired=True, clusters=[1]), "1 labels for 2 values"),
        (lambda: compare([[1, 2], [2, 3]], paired=True, names=["a"]), "1 names for 2 groups"),
        (lambda: compare([[1, 2], [2, 3]], paired=True, alpha=2), "alpha is 2"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
