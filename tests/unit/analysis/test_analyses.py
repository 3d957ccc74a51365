"""What is said of scores whose truth is known, and that it is said by the library's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats

from made_scores import made_scores
from pgharness import stats
from pgharness.analysis import KINDS, Combination, Run, agreement, analyse_scores, compare, power, sweep
from pgharness.errors import InvalidArgument


def test_estimates_are_those_of_a_regression_with_errors_clustered_by_case() -> None:
    scores = made_scores([0, 0.1], cases=25, replications=3, grades=2)
    found = compare(scores)
    for place, group in enumerate(found.groups):
        mine = scores.combination == place
        frame = pd.DataFrame({"score": scores.score[mine], "case": scores.case[mine]})
        fit = smf.ols("score ~ 1", frame).fit(cov_type="cluster", cov_kwds={"groups": frame["case"]}, use_t=True)
        assert (group.grades, group.notes, group.cases) == (150, 75, 25)
        assert group.mean == pytest.approx(fit.params.iloc[0], abs=1e-12)
        # balanced: the errors of a mean of clusters and of a mean clustered by them are one, but for statsmodels' (N - 1) / (N - K)
        assert group.standard_error == pytest.approx(fit.bse.iloc[0], abs=1e-12)
        assert group.interval is not None
        assert (group.interval.low, group.interval.high) == pytest.approx(tuple(fit.conf_int().iloc[0]), abs=1e-12)


def test_the_planted_difference_is_found_and_no_other() -> None:
    found = compare(made_scores([0, 0, 0.05, 0], cases=80))
    different = {(pair.first, pair.second) for pair in found.pairs if pair.differs}
    assert different == {("system 0", "system 2"), ("system 1", "system 2"), ("system 2", "system 3")}
    assert found.overall is not None and found.overall.result.is_significant()
    for pair in found.pairs:
        assert pair.verdict == ("system 2 scores higher" if pair.differs else "no difference shown")
        assert ("they differ" in pair.sentence) == pair.differs
        assert ("no difference was shown" in pair.sentence) != pair.differs
        assert "(Holm)" in pair.sentence and "significant" not in pair.sentence


def test_a_pair_is_the_paired_t_test_on_case_means() -> None:
    scores = made_scores([0, 0.03], cases=50, replications=4, authors=2)
    pair = compare(scores).pairs[0]
    means = scores.case_table("combination").means
    expected = scipy_stats.ttest_rel(means[0], means[1])
    assert pair.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert pair.p_corrected == pair.p_value, "one pair needs no correction"
    assert pair.df == pytest.approx(49)
    interval = expected.confidence_interval()
    assert pair.interval is not None
    assert (pair.interval.low, pair.interval.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert pair.standard_error == pytest.approx(abs(pair.difference / expected.statistic), rel=1e-9)
    assert pair.choice is not None and pair.choice.alternative is not None and pair.choice.reasons


def test_corrected_p_values_are_those_of_the_family() -> None:
    for correction in ("bonferroni", "holm", "bh", "by"):
        found = compare(made_scores([0, 0.02, 0.03]), correction=correction)
        raw = [pair.p_value for pair in found.pairs]
        assert [pair.p_corrected for pair in found.pairs] == list(stats.adjust(raw, correction=correction).adjusted)
        assert [pair.differs for pair in found.pairs] == [pair.p_corrected < 0.05 for pair in found.pairs]


def test_a_baseline_is_what_all_others_are_compared_with() -> None:
    found = compare(made_scores([0, 0.1, -0.1]), baseline="system 1")
    assert [(pair.first, pair.second) for pair in found.pairs] == [("system 0", "system 1"), ("system 2", "system 1")]
    with pytest.raises(InvalidArgument, match="no combination 'system 7'") as caught:
        compare(made_scores([0, 0.1]), baseline="system 7")
    assert "system 0" in (caught.value.hint or "")


def test_right_and_wrong_of_single_notes_are_tested_as_such() -> None:
    found = compare(made_scores([0, 0.2], replications=1, is_binary=True)).pairs[0]
    assert found.choice is not None and "McNemar" in found.choice.result.test
    assert "McNemar" in found.sentence


@pytest.mark.parametrize("test", ["t", "wilcoxon", "sign", "permutation"])
def test_a_test_that_was_fixed_beforehand_is_the_one_that_is_made(test: str) -> None:
    scores = made_scores([0, 0.1], cases=12)
    pair = compare(scores, test=test).pairs[0]
    assert pair.choice is not None and pair.choice.reasons == ("the test was fixed beforehand",)
    word = {"t": "t test", "wilcoxon": "Wilcoxon", "sign": "Sign", "permutation": "ermutation"}[test]
    assert word in pair.choice.result.test


def test_cases_that_one_side_lacks_are_left_out_of_the_pair_and_told() -> None:
    scores = made_scores([0, 0.1], cases=20)
    less = scores.rows(~((scores.combination == 1) & (scores.case < 5)))
    found = compare(less)
    assert [group.cases for group in found.groups] == [20, 15]
    assert found.pairs[0].cases == 15
    assert any("5 cases" in warning for warning in found.pairs[0].warnings)


@pytest.mark.parametrize(("effects", "sds"), [([0, 0], 0.0), ([0, 0.1], 0.0)])
def test_scores_without_variation_make_no_finding_up(effects: list[float], sds: float) -> None:
    scores = made_scores(effects, cases=10, case_sd=0.1, note_sd=sds, grade_sd=sds)
    pair = compare(scores).pairs[0]
    assert pair.difference == pytest.approx(effects[0] - effects[1], abs=1e-12)
    assert pair.p_value is not None and (pair.p_value == 1.0) == (effects[1] == 0)
    json.dumps(pair.as_dict(), allow_nan=False)


def test_what_cannot_be_compared_says_so() -> None:
    scores = made_scores([0, 0.1], cases=6)
    apart = scores.rows((scores.combination == 0) == (scores.case < 3))
    pair = compare(apart).pairs[0]
    assert (pair.differs, pair.p_value, pair.verdict, pair.cases) == (None, None, "cannot be compared", 0)
    single = compare(scores.select(cases=["case 1"]))
    assert single.groups[0].standard_error is None and single.pairs[0].differs is None
    alone = compare(scores.select(combinations=["system 0"]))
    assert alone.pairs == () and any("nothing to compare" in warning for warning in alone.warnings)


def test_a_live_run_and_unlike_runs_are_warned_of() -> None:
    systems = (Combination("system 0", "a", "judge"), Combination("system 1", "b", "judge"))
    runs = (Run(1, "x/1", "running", combinations=systems), Run(2, "x/2", combinations=systems[:1]))
    found = compare(made_scores([0, 0.1], runs=runs))
    assert found.by == "run"
    assert any("x/1 is running" in warning for warning in found.warnings)
    assert any("different combinations" in warning for warning in found.warnings)
    other = replace(runs[1], combinations=(Combination("system 0", "c", "judge"),))
    pooled = compare(made_scores([0, 0.1], runs=(runs[0], other)), by="combination")
    assert any("different models" in warning for warning in pooled.warnings)


def test_authors_who_grade_alike_agree_and_others_do_not() -> None:
    alike = made_scores([0, 0.1], authors=2, grade_sd=0.01)
    found = agreement(alike)
    assert (found.between, found.scale, found.raters) == ("author", "continuous", ("author 0", "author 1"))
    values = {(measure.raters, measure.name): measure for measure in found.measures}
    table = alike.score.reshape(-1, 2)
    expected = stats.intraclass_correlation(table, form="ICC2")
    assert values[found.raters, "ICC2"].value == pytest.approx(expected.estimate)
    assert values[found.raters, "ICC2"].value > 0.95
    assert values[found.raters, "r"].value == pytest.approx(np.corrcoef(table.T)[0, 1])
    assert values[found.raters, "mean difference"].value == pytest.approx(float(np.mean(table[:, 0] - table[:, 1])))
    apart = agreement(made_scores([0], authors=2, case_sd=0.01, note_sd=0.01, grade_sd=0.2))
    assert max(m.value for m in apart.measures if m.name == "ICC2") < 0.5


def test_binary_grades_agree_by_kappa() -> None:
    scores = made_scores([0], cases=100, authors=3, is_binary=True, grade_sd=0.1)
    found = agreement(scores)
    assert found.scale == "binary"
    table = scores.score.reshape(-1, 3).astype(int)
    names = {(measure.raters, measure.name): measure.value for measure in found.measures}
    assert names[found.raters, "Fleiss kappa"] == pytest.approx(stats.fleiss_kappa(table.tolist()).value)
    assert names[("author 0", "author 2"), "Cohen kappa"] == pytest.approx(
        stats.cohen_kappa(table[:, 0].tolist(), table[:, 2].tolist()).value
    )


def test_agreement_is_looked_for_where_there_is_any() -> None:
    assert agreement(made_scores([0], grades=2)).between == "replication"
    runs = (Run(1, "x/1"), Run(2, "x/2"))
    assert agreement(made_scores([0], runs=runs)).between == "run"
    with pytest.raises(InvalidArgument, match="graded by two"):
        agreement(made_scores([0]))
    with pytest.raises(InvalidArgument, match="two rubric authors"):
        agreement(made_scores([0], grades=2), between="author")


def test_the_detectable_difference_is_found_as_often_as_promised() -> None:
    pilot = power(made_scores([0, 0], cases=40, seed=1)).pairs[0]
    found = scipy_stats.nct.sf(
        scipy_stats.t.isf(0.025, 39), 39, pilot.detectable / (pilot.sd / np.sqrt(40))
    ) + scipy_stats.nct.cdf(-scipy_stats.t.isf(0.025, 39), 39, pilot.detectable / (pilot.sd / np.sqrt(40)))
    assert found == pytest.approx(0.8, abs=1e-6)
    assert pilot.parts.replication is not None


def test_variance_parts_and_advice_are_the_librarys() -> None:
    scores = made_scores([0, 0.1], cases=30, replications=3, grades=2)
    mine, other = (scores.rows(scores.combination == place) for place in (0, 1))
    expected = stats.paired_variance_parts(
        mine.score,
        other.score,
        cases=mine.case.tolist(),
        second_cases=other.case.tolist(),
        notes=mine.note.tolist(),
        second_notes=other.note.tolist(),
    )
    found = power(scores, difference=0.05, note_usd=0.02, grade_usd=0.01).pairs[0]
    for name in ("case", "replication", "grade"):
        assert getattr(found.parts, name) == pytest.approx(getattr(expected, name), rel=1e-9)
    advice = stats.advise_precision(expected, note_usd=0.04, grade_usd=0.02)
    assert (found.advice.best, found.advice.optimum.cases) == (advice.best, advice.optimum.cases)
    assert found.needed is not None and "cases" in found.needed.reason


def test_power_needs_a_pair() -> None:
    with pytest.raises(InvalidArgument, match="no pair"):
        power(made_scores([0]))


def test_a_setting_is_seen_in_its_trend() -> None:
    systems = (Combination("system 0", "a", "judge", {"temperature": 0.5}), Combination("system 1", "b", "judge"))
    runs = tuple(Run(n, f"x/{n}", config={"shots": n * n}, combinations=systems) for n in (1, 2, 3))
    scores = made_scores([0, 0], cases=30, runs=runs)
    shots = np.array([1, 4, 9])
    scores.score[:] += np.where(scores.combination == 0, 0.02 * shots[scores.run], 0)
    found = sweep(scores, parameter="shots")
    rising, flat = found.trends
    assert (rising.series, rising.rises, flat.rises) == ("system 0", 1, 0)
    assert rising.interval is not None and 0.02 in rising.interval
    assert rising.slope == pytest.approx(np.polyfit(shots, [p.estimate.mean for p in rising.points], 1)[0], abs=1e-12)
    assert [point.value for point in rising.points] == [1, 4, 9]
    assert "rises" in rising.sentence and "no trend was shown" in flat.sentence
    with pytest.raises(InvalidArgument, match="neither in the config"):
        sweep(scores, parameter="colour")
    with pytest.raises(InvalidArgument, match="has 1 value"):
        sweep(scores, parameter="temperature")


def test_options_that_do_not_exist_are_refused_with_those_that_do() -> None:
    scores = made_scores([0, 0.1])
    for kind, options, said in (
        ("guess", {}, "no analysis of kind 'guess'"),
        ("compare", {"colour": 1}, "no option 'colour'"),
        ("ablation", {}, "needs the option 'baseline'"),
        ("compare", {"combinations": "system 0"}, "give a list"),
        ("compare", {"combinations": ["nobody"]}, "no combination 'nobody'"),
        ("compare", {"correction": "guess"}, "correction is 'guess'"),
        ("compare", {"alpha": 2}, "alpha"),
        ("power", {"power": 1.5}, "power is 1.5"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            analyse_scores(scores, kind, options)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_can_be_written_as_json(kind: str) -> None:
    systems = (Combination("system 0", "a", "judge"), Combination("system 1", "b", "judge"))
    runs = tuple(Run(n, f"x/{n}", config={"shots": n}, combinations=systems) for n in (1, 2))
    options = {"ablation": {"baseline": "x/1"}, "sweep": {"parameter": "shots"}}.get(kind, {})
    found = analyse_scores(made_scores([0, 0.1], runs=runs, authors=2), kind, options)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))
