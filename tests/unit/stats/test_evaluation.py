"""Clustered means and differences, variance parts and pass@k against R, dense matrix algebra and exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import linalg, stats

from pgharness.stats.evaluation import (
    VarianceParts,
    advise_precision,
    clustered_contrast,
    group_difference,
    mean_score,
    paired_difference,
    paired_variance_parts,
    pass_at_k,
    pass_at_k_values,
    variance_parts,
)
from pgharness.stats.samples import InvalidSample

# The data of reference.R: clusters of 1 to 12 values, without a random generator.
CLUSTER = np.repeat(np.arange(1, 13), np.arange(1, 13))
ORDER = np.arange(1, 79)
VALUE = np.sin(ORDER * 1.7) + 0.8 * np.sin(CLUSTER * 2.3)


def dense_cr2(outcomes: Any, design: Any, clusters: Any, contrast: Any) -> tuple[float, float, float]:
    """The definition, with n x n matrices: Pustejovsky & Tipton (2018), equations 4 to 11."""
    count = len(outcomes)
    inverse = np.linalg.inv(design.T @ design)
    residual_maker = np.eye(count) - design @ inverse @ design.T
    residuals = residual_maker @ outcomes
    meat, rows = 0.0, []
    for cluster in np.unique(clusters):
        inside = clusters == cluster
        block = residual_maker[np.ix_(inside, inside)]
        values, vectors = np.linalg.eigh(block)
        adjust = (vectors * np.where(values > 1e-9, np.maximum(values, 1e-12) ** -0.5, 0)) @ vectors.T
        weight = contrast @ inverse @ design[inside].T @ adjust
        meat += float(weight @ residuals[inside]) ** 2
        row = np.zeros(count)
        row[inside] = weight
        rows.append(residual_maker @ row)
    gram = np.array(rows) @ np.array(rows).T
    return float(contrast @ inverse @ design.T @ outcomes), math.sqrt(meat), np.trace(gram) ** 2 / np.sum(gram**2)


def cases_of(rng: np.random.Generator, cases: int, most: int) -> Any:
    return np.repeat(np.arange(cases), rng.integers(1, most + 1, cases))


def test_contrasts_agree_with_clubsandwich() -> None:
    def check(design: Any, contrast: list[float], se: float, df: float, value: float) -> None:
        found = clustered_contrast(VALUE, design, CLUSTER - 1, np.array(contrast))
        assert_allclose([found.value, found.standard_error, found.df], [value, se, df], rtol=1e-10)

    ones = np.ones(78)
    check(ones[:, None], [1.0], 0.2011331405116399, 8.3734350064347076, 0.0669112594874078)
    group = (np.sin(ORDER * 0.9) > 0.2).astype(float)
    check(np.column_stack([ones, group]), [0.0, 1.0], 0.165579923294254, 8.429020206314293, 0.047434883379093)
    check(np.column_stack([1 - group, group]), [-1.0, 1.0], 0.165579923294254, 8.429020206314293, 0.047434883379093)
    nested = (CLUSTER > 7).astype(float)
    check(np.column_stack([ones, nested]), [0.0, 1.0], 0.3986288745558715, 8.2105466809603058, 0.0711225230785584)


def test_contrasts_agree_with_the_dense_definition() -> None:
    rng = np.random.default_rng(11)
    for trial in range(200):
        clusters = cases_of(rng, int(rng.integers(3, 12)), 8)
        size = len(clusters)
        group = rng.integers(0, 2, size) if trial % 2 else (clusters % 2)
        design = np.column_stack([group == 0, group == 1]).astype(float)
        if min(design.sum(axis=0)) == 0 or min(len(np.unique(clusters[group == one])) for one in (0, 1)) < 2:
            design = np.ones((size, 1))
        outcomes = rng.normal(size=size) * 10.0 ** rng.integers(-6, 7) + rng.normal(size=12)[clusters]
        contrast = np.array([1.0, -1.0][: design.shape[1]])
        found = clustered_contrast(outcomes, design, clusters, contrast)
        wanted = dense_cr2(outcomes, design, clusters, contrast)
        assert_allclose([found.standard_error, found.df], wanted[1:], rtol=1e-8)
        assert_allclose(found.value, wanted[0], rtol=1e-8, atol=1e-10 * np.abs(outcomes).max())


def test_mean_score_weighs_cases_or_values() -> None:
    found = mean_score(VALUE, cases=list(CLUSTER), weights="values")
    assert_allclose([found.value, found.standard_error], [0.0669112594874078, 0.2011331405116399], rtol=1e-10)
    means = [VALUE[case == CLUSTER].mean() for case in range(1, 13)]
    by_case = mean_score(VALUE, cases=list(CLUSTER))
    plain = stats.ttest_1samp(means, 0).confidence_interval()
    assert_allclose([by_case.interval.low, by_case.interval.high], [plain.low, plain.high], rtol=1e-10)
    assert by_case.n == 12 and by_case.warnings == ()


def test_mean_score_of_balanced_clusters_is_a_t_interval_of_cluster_means() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        groups, size = int(rng.integers(2, 30)), int(rng.integers(1, 6))
        values = rng.normal(size=(groups, size)) + rng.normal(size=(groups, 1))
        cases = np.arange(groups * size)
        clusters = {int(case): int(case) // size for case in cases}
        found = mean_score(values.ravel(), cases=cases.tolist(), clusters=clusters, level=0.9)
        plain = stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.9)
        assert_allclose([found.interval.low, found.interval.high], [plain.low, plain.high], rtol=1e-8, atol=1e-12)


def test_paired_difference_of_single_values_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(4)
    for trial in range(200):
        size = int(rng.integers(2, 60))
        one, two = rng.normal(size=size), rng.normal(size=size) + 0.5
        if trial % 3 == 0:
            one, two = np.round(one), np.round(two)
        if np.ptp(one - two) == 0:
            continue
        alternative = ("two-sided", "less", "greater")[trial % 3]
        found = paired_difference(one, two, cases=list(range(size)), alternative=alternative)  # type: ignore[arg-type]
        wanted = stats.ttest_rel(one, two, alternative=alternative)
        interval = wanted.confidence_interval(0.95)
        assert_allclose(
            [found.statistic, found.p_value, found.df],
            [wanted.statistic, wanted.pvalue, wanted.df],
            rtol=1e-8,
            atol=1e-14,
        )
        assert found.interval is not None
        assert_allclose([found.interval.low, found.interval.high], [interval.low, interval.high], rtol=1e-8, atol=1e-13)


def test_paired_difference_averages_replications_and_aligns_by_case() -> None:
    first, cases = [1.0, 3.0, 5.0, 9.0, 4.0], ["a", "a", "b", "c", "only first"]
    second, others = [2.0, 1.0, 1.0, 3.0, 7.0], ["c", "b", "a", "b", "only second"]
    found = paired_difference(first, second, cases=cases, second_cases=others, names=("new", "old"))
    wanted = stats.ttest_rel([2.0, 5.0, 9.0], [1.0, 2.0, 2.0])
    assert_allclose([found.estimate, found.p_value], [11 / 3, wanted.pvalue], rtol=1e-12)
    assert found.n == 3 and any("2 cases" in warning for warning in found.warnings)
    assert found.groups[0].name == "new"


def test_paired_difference_with_clusters_agrees_with_the_dense_definition() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        clusters = cases_of(rng, int(rng.integers(3, 15)), 5)
        size = len(clusters)
        one, two = rng.normal(size=size) + rng.normal(size=15)[clusters], rng.normal(size=size)
        mapping = dict(enumerate(clusters.tolist()))
        found = paired_difference(one, two, cases=list(range(size)), clusters=mapping)
        value, error, df = dense_cr2(one - two, np.ones((size, 1)), clusters, np.ones(1))
        assert_allclose([found.statistic, found.df], [value / error, df], rtol=1e-8)
        assert_allclose(found.p_value, 2 * stats.t.sf(abs(value / error), df), rtol=1e-8)


def test_group_difference_of_separate_cases_has_welchs_standard_error() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        one, two = rng.normal(size=int(rng.integers(2, 30))), 2 * rng.normal(size=int(rng.integers(2, 30)))
        names = [f"a{i}" for i in range(len(one))], [f"b{i}" for i in range(len(two))]
        found = group_difference(one, two, cases=names[0], second_cases=names[1])
        # Same statistic as Welch; the degrees of freedom are Bell & McCaffrey's, which assume equal variances.
        assert_allclose(found.statistic, stats.ttest_ind(one, two, equal_var=False).statistic, rtol=1e-8)


def test_group_difference_of_the_same_cases_is_the_paired_comparison() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        one, two = rng.normal(size=(2, 20))
        cases = list(range(20))
        found = group_difference(one, two, cases=cases, second_cases=cases)
        wanted = paired_difference(one, two, cases=cases)
        assert_allclose([found.statistic, found.df], [wanted.statistic, wanted.df], rtol=1e-8)


def test_equal_systems_give_p_one_and_a_constant_difference_is_refused() -> None:
    same = paired_difference([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], cases=[1, 2, 3])
    assert same.p_value == 1 and same.estimate == 0 and "nothing varies" in same.warnings[0]
    with pytest.raises(InvalidSample, match="in every case"):
        paired_difference([0.2, 0.3, 0.4], [0.1, 0.2, 0.3], cases=[1, 2, 3])
    flat = group_difference([0.1, 0.1], [0.1, 0.1, 0.1], cases=[1, 2], second_cases=[3, 4, 5])
    assert flat.p_value == 1 and flat.estimate == 0
    with pytest.raises(InvalidSample, match="both constant"):
        group_difference([1, 1], [0, 0], cases=[1, 2], second_cases=[3, 4])
    certain = mean_score([0.1] * 5, cases=list("abcde"))
    assert certain.interval.width == 0 and "no variation" in certain.warnings[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_score([], cases=[]), "empty"),
        (lambda: mean_score([1.0, 2.0], cases=["a", "a"]), "1 of cases, at least 2"),
        (lambda: mean_score([1.0, 2.0], cases=["a"]), "has 2 values and cases has 1"),
        (lambda: mean_score([1.0, math.nan], cases=["a", "b"]), 'nan="omit"'),
        (lambda: mean_score([1.0, 2.0], cases=["a", None]), "missing label"),
        (lambda: mean_score([1.0, 2.0], cases=["a", "b"], clusters={"a": 1}), "case 'b' has no cluster"),
        (lambda: mean_score([1.0, 2.0], cases=["a", "b"], level=95), "level is 95"),
        (lambda: paired_difference([1.0, 2.0], [2.0, 1.0], cases=["a", "b"], second_cases=["c", "d"]), "share no case"),
        (
            lambda: paired_difference([1.0, 2.0], [2.0, 2.0], cases=["a", "b"], alternative="more"),
            "alternative is 'more'",
        ),  # type: ignore[arg-type]
        (lambda: variance_parts([1.0, 2.0], cases=["a", "a"]), "one case"),
        (lambda: variance_parts([1.0, 2.0], cases=["a", "b"], notes=["x"]), "notes has 1 labels"),
        (lambda: pass_at_k_values([1], [5], 6), "needs at least 6"),
        (lambda: pass_at_k_values([6], [5], 1), "more passed than attempts"),
        (lambda: pass_at_k_values([1.5], [5], 1), "whole numbers"),
        (lambda: pass_at_k_values([1], [5], 0), "k is 0"),
        (lambda: pass_at_k([1], [5], 1), "at least 2"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()


def test_missing_values_are_left_out_with_their_labels() -> None:
    found = mean_score([1.0, math.nan, 3.0, 5.0], cases=["a", "a", "b", "c"], nan="omit")
    assert_allclose(found.value, 3.0)
    parts = variance_parts([1.0, 2.0, math.nan, 4.0, 6.0], cases=list("aabbb"), nan="omit")
    assert_allclose([parts.cases, parts.replications], [2, 2])


def test_variance_parts_agree_with_lme4() -> None:
    case, note = np.repeat(np.arange(1, 9), 6), np.repeat(np.arange(1, 25), 2)
    score = 2 * np.sin(case * 5.1) + np.sin(note * 3.3) + 0.5 * np.sin(np.arange(1, 49) * 7.7)
    found = variance_parts(score, cases=list(case), notes=list(note))
    # Balanced and all parts above 0, so REML and the analysis of variance are one; lmer's optimiser stops near 1e-7.
    assert_allclose(
        [found.case, found.replication, found.grade],
        [1.8036727021712207, 0.8393194741438610, 0.0934277956887113],
        rtol=1e-6,
    )


def test_variance_parts_solve_the_expected_mean_squares() -> None:
    """The sums of squares as quadratic forms, their expectations by traces: no formula for unbalanced sizes is used."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        notes_of = rng.integers(1, 5, int(rng.integers(2, 8)))
        notes_of[0] = 3
        grades_of = rng.integers(1, 4, notes_of.sum())
        grades_of[0] = 2
        case = np.repeat(np.repeat(np.arange(len(notes_of)), notes_of), grades_of)
        note = np.repeat(np.arange(notes_of.sum()), grades_of)
        score = rng.normal(size=len(case)) + 2 * rng.normal(size=note.max() + 1)[note] + 3 * rng.normal(size=10)[case]
        incidences = [np.eye(case.max() + 1)[case], np.eye(note.max() + 1)[note], np.eye(len(case))]
        hats = [np.full((len(case),) * 2, 1 / len(case))] + [z @ np.linalg.pinv(z) for z in incidences]
        forms = [hats[i + 1] - hats[i] for i in range(3)]
        sums = np.array([score @ form @ score for form in forms])
        expected = np.array([[np.trace(form @ z @ z.T) for z in incidences] for form in forms])
        wanted = linalg.solve(expected, sums)
        found = variance_parts(score, cases=case.tolist(), notes=note.tolist())
        assert_allclose([found.case, found.replication, found.grade], np.maximum(wanted, 0), rtol=1e-7, atol=1e-9)
        assert len(found.warnings) == sum(wanted < 0)


def test_variance_parts_say_what_they_cannot_separate() -> None:
    single = variance_parts([1.0, 2.0, 4.0], cases=["a", "b", "c"])
    assert single.replication is None and single.grade is None
    assert_allclose(single.case, np.var([1, 2, 4], ddof=1))
    assert len(single.warnings) == 2
    graded = variance_parts([1.0, 2.0, 4.0, 4.5], cases=list("aabb"), notes=list("aabb"))
    assert graded.replication is None and graded.grade is not None
    # Labels of notes need be unique only within their case.
    again = variance_parts([1.0, 2.0, 4.0, 4.5], cases=list("aabb"), notes=[1, 2, 1, 2])
    assert again.replication is not None and again.grade is None


def test_standard_error_predicted_from_parts_is_the_one_of_case_means() -> None:
    rng = np.random.default_rng(9)
    for _ in range(50):
        values = rng.normal(size=(12, 3, 2)) + rng.normal(size=(12, 3, 1)) + 3 * rng.normal(size=(12, 1, 1))
        case, note = np.repeat(np.arange(12), 6), np.tile(np.repeat(np.arange(3), 2), 12)
        parts = variance_parts(values.ravel(), cases=case.tolist(), notes=note.tolist())
        if not parts.warnings:
            wanted = mean_score(values.ravel(), cases=case.tolist()).standard_error
            assert_allclose(parts.standard_error(12, 3, 2), wanted, rtol=1e-8)


def test_paired_variance_parts_recover_what_made_the_data() -> None:
    rng = np.random.default_rng(10)
    cases = 4000
    truth, gap = rng.normal(0, 3, cases), rng.normal(0.5, 0.7, cases)
    first = (truth + gap)[:, None] + rng.normal(0, 1.0, (cases, 3))
    second = truth[:, None] + rng.normal(0, 0.5, (cases, 3))
    labels = np.repeat(np.arange(cases), 3).tolist()
    found = paired_variance_parts(first.ravel(), second.ravel(), cases=labels, second_cases=labels)
    assert_allclose([found.case, found.replication], [0.49, 1.25], rtol=0.1)
    wanted = paired_difference(first.ravel(), second.ravel(), cases=labels, second_cases=labels)
    assert_allclose(found.standard_error(cases, 3, 1), wanted.estimate / wanted.statistic, rtol=1e-8)


def test_advice_agrees_with_cochrans_optimum() -> None:
    parts = VarianceParts(case=4.0, replication=1.0, grade=9.0, cases=100, replications=2, grades=1)
    advice = advise_precision(parts, case_usd=2.0, note_usd=0.5, grade_usd=0.1, budget_usd=10_000)
    # Cochran (1977), section 10.8: grades = sqrt(note cost / grade cost * grade part / note part), and so on up.
    grades = math.sqrt(9.0 / 1.0 * 0.5 / 0.1)
    replications = math.sqrt(1.0 / 4.0 * 2.0 / 0.5)
    assert abs(advice.optimum.grades - grades) <= 1 and abs(advice.optimum.replications - replications) <= 1
    best = min(
        parts.variance(cases, r, g)
        for r in range(1, 30)
        for g in range(1, 30)
        if (cases := math.floor(10_000 / (2 + r * (0.5 + 0.1 * g)) * (1 + 1e-12))) >= 2
    )
    assert_allclose(advice.optimum.standard_error, math.sqrt(best), rtol=1e-12)
    assert advice.optimum.cost_usd <= 10_000
    assert advice.best == "grades" and "grades" in advice.reason


def test_gains_are_the_fall_of_the_variance_per_dollar() -> None:
    parts = VarianceParts(case=1.0, replication=2.0, grade=3.0, cases=50, replications=3, grades=2)
    gains = advise_precision(parts, case_usd=0.2, note_usd=0.3, grade_usd=0.05).gains
    tiny, now = 1e-6, parts.variance(50, 3, 2)

    def slope(cases: float, replications: float, grades: float) -> float:
        cost = cases * (0.2 + replications * (0.3 + grades * 0.05)) - 50 * (0.2 + 3 * (0.3 + 2 * 0.05))
        return (now - parts.variance(cases, replications, grades)) / cost / now

    wanted = [slope(50 + tiny, 3, 2), slope(50, 3 + tiny, 2), slope(50, 3, 2 + tiny)]
    assert_allclose([gains["cases"], gains["replications"], gains["grades"]], wanted, rtol=1e-4)


def test_advice_knows_its_limits() -> None:
    parts = VarianceParts(case=1.0, replication=1.0, grade=None, cases=10, replications=2, grades=1)
    capped = advise_precision(parts, note_usd=1.0, grade_usd=0.0, budget_usd=1000, maximum_cases=10)
    assert capped.optimum.cases == 10 and capped.optimum.replications == 100 and capped.gains["cases"] == 0
    with pytest.raises(InvalidSample, match="two cases"):
        advise_precision(parts, note_usd=1.0, grade_usd=0.0, budget_usd=1.5)
    with pytest.raises(InvalidSample, match="costs"):
        advise_precision(parts, note_usd=0.0, grade_usd=0.0)
    nothing = VarianceParts(case=0.0, replication=0.0, grade=None, cases=10, replications=2, grades=1)
    assert advise_precision(nothing, note_usd=1.0, grade_usd=0.0).best == "none"


def test_pass_at_k_agrees_with_exact_fractions() -> None:
    rng = np.random.default_rng(12)
    for _ in range(200):
        attempts = int(rng.integers(1, 400))
        passed, k = int(rng.integers(0, attempts + 1)), int(rng.integers(1, attempts + 1))
        exact = 1 - Fraction(math.comb(attempts - passed, k), math.comb(attempts, k))
        assert_allclose(pass_at_k_values([passed], [attempts], k), [float(exact)], rtol=1e-11, atol=1e-13)
        # The product of Chen et al. (2021), figure 3.
        chen = 1.0 if attempts - passed < k else 1 - np.prod(1 - k / np.arange(attempts - passed + 1, attempts + 1))
        assert_allclose(pass_at_k_values([passed], [attempts], k), [chen], rtol=1e-9, atol=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    rate, attempts, k = 0.2, 8, 3
    counts = np.arange(attempts + 1)
    chances = stats.binom.pmf(counts, attempts, rate)
    assert_allclose(chances @ pass_at_k_values(counts, [attempts] * 9, k), 1 - (1 - rate) ** k, rtol=1e-12)


def test_pass_at_k_interval_covers_and_is_repeatable() -> None:
    rng = np.random.default_rng(13)
    truth, covered = rng.beta(0.6, 0.9, (200, 60)), 0
    for row in truth:
        found = pass_at_k(rng.binomial(10, row), [10] * 60, 1, resamples=499, rng=1)
        covered += 0.4 in found.interval
    assert 0.90 <= covered / 200 <= 0.99  # 0.95 with a standard error of 0.015
    one, two = (pass_at_k([1, 2, 5, 0, 3], [5] * 5, 2, rng=7) for _ in range(2))
    assert one == two and one.interval.low < one.value < one.interval.high


def test_pass_at_k_without_variation_keeps_a_honest_interval() -> None:
    perfect = pass_at_k([5] * 40, [5] * 40, 1)
    exact = stats.binomtest(40, 40).proportion_ci(0.95, method="exact")
    assert_allclose([perfect.interval.low, perfect.interval.high], [exact.low, exact.high], rtol=1e-10)
    hopeless = pass_at_k([0] * 40, [5] * 40, 3)
    exact = stats.binomtest(0, 40).proportion_ci(0.95, method="exact")
    assert_allclose([hopeless.interval.low, hopeless.interval.high], [exact.low, exact.high], rtol=1e-10)
