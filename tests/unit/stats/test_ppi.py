"""Prediction-powered inference against ppi_py, its own variance minimised by search, and simulation of biased judges."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import optimize, stats

from pgharness.stats.ppi import GradedNotes, corrected_difference, corrected_mean
from pgharness.stats.samples import InvalidSample

SMALL, LARGE = np.arange(1, 41), np.arange(1, 201)
HUMAN = np.sin(SMALL * 1.3) + 0.5
JUDGE = 0.8 * HUMAN + 0.3 + 0.3 * np.sin(SMALL * 2.9)
REST = 0.8 * (np.sin(LARGE * 0.7) + 0.5) + 0.3 + 0.3 * np.sin(LARGE * 3.7)


@pytest.mark.parametrize(
    ("tuning", "value", "low", "high"),
    [
        (1.0, 0.51210669, 0.39734346, 0.62686992),
        (0.5, 0.52178126, 0.37886088, 0.66470165),
        (0.0, 0.53145584, 0.30976830, 0.75314338),
    ],
)
def test_means_agree_with_ppi_py(tuning: float, value: float, low: float, high: float) -> None:
    """ppi_py 0.2.3's ppi_mean_ci: normal, with n in the variances' denominators where this has n - 1 and a t."""
    found = corrected_mean(GradedNotes(HUMAN, JUDGE, REST), tuning=tuning).estimate
    assert_allclose(found.value, value, atol=1e-8)
    parts = np.var(HUMAN - tuning * JUDGE) / 40, tuning**2 * np.var(REST) / 200
    assert_allclose((high - low) / 2 / stats.norm.isf(0.025), math.sqrt(sum(parts)), rtol=1e-6)
    assert_allclose(found.standard_error, math.sqrt(parts[0] * 40 / 39 + parts[1] * 200 / 199), rtol=1e-10)


def test_tuned_mean_is_near_ppi_py_and_beats_both_sources() -> None:
    found = corrected_mean(GradedNotes(HUMAN, JUDGE, REST))
    # ppi_py tunes by the pooled variance of the judge's grades, this by that of each part: equal only in the limit.
    assert_allclose(found.estimate.value, 0.51350434, atol=0.003)
    assert found.estimate.standard_error < found.human_only.standard_error
    assert found.worth > 40
    assert_allclose(
        [found.bias.value, found.bias.standard_error], [np.mean(JUDGE - HUMAN), stats.sem(JUDGE - HUMAN)], rtol=1e-10
    )
    alone = stats.ttest_1samp(HUMAN, 0).confidence_interval()
    assert_allclose(
        [found.human_only.interval.low, found.human_only.interval.high], [alone.low, alone.high], rtol=1e-10
    )


def variance(tuning: float, notes: GradedNotes) -> float:
    """From the definition: squared sums of each case's weighted, centred grades."""
    human, judge, rest = (np.asarray(part) for part in (notes.human, notes.judge, notes.judge_only))
    n, m = len(human), len(rest)
    labels = notes.cases if notes.cases is not None else list(range(n))
    unread = notes.judge_only_cases if notes.judge_only_cases is not None else [("rest", i) for i in range(m)]
    size, rest_size = len(set(labels)), len(set(unread))
    left = human - tuning * judge
    sums: dict[Any, float] = {}
    for label, one in zip(labels, (left - left.mean()) / n * math.sqrt(size / (size - 2)), strict=True):
        sums[label] = sums.get(label, 0.0) + one
    for label, one in zip(
        unread, tuning * (rest - rest.mean()) / m * math.sqrt(rest_size / (rest_size - 1)), strict=True
    ):
        sums[label] = sums.get(label, 0.0) + one
    return sum(value**2 for value in sums.values())


def test_tuning_minimises_the_variance() -> None:
    rng = np.random.default_rng(1)
    for trial in range(200):
        n, m = int(rng.integers(5, 60)), int(rng.integers(5, 300))
        human = rng.normal(size=n)
        judge, rest = human * rng.uniform(-0.5, 2) + rng.normal(size=n), rng.normal(size=m)
        cases = others = None
        if trial % 2:
            cases, others = rng.integers(0, n, n).tolist(), rng.integers(0, n, m).tolist()
            if len(set(cases)) < 4 or len(set(others)) < 2:
                continue
        notes = GradedNotes(human, judge, rest, cases, others)
        found = corrected_mean(notes)

        best = optimize.minimize_scalar(
            variance, args=(notes,), bounds=(0, 1), method="bounded", options={"xatol": 1e-10}
        )
        assert_allclose(found.tuning, best.x, atol=1e-5)
        assert_allclose(found.estimate.standard_error, math.sqrt(variance(found.tuning, notes)), rtol=1e-8)
        assert_allclose(
            found.estimate.value,
            found.tuning * rest.mean() + np.mean(human - found.tuning * judge),
            rtol=1e-9,
            atol=1e-12,
        )


def test_intervals_cover_whatever_the_judge_is_worth() -> None:
    rng = np.random.default_rng(2)
    for slope, bias, noise in ((1.0, 0.6, 0.3), (0.5, -1.0, 1.0), (0.0, 0.0, 1.0)):
        covered, narrower = 0, 0
        for _ in range(150):
            truth = rng.normal(0.3, 1, 325)
            judge = slope * truth + bias + rng.normal(0, noise, 325)
            found = corrected_mean(GradedNotes(truth[:25], judge[:25], judge[25:]))
            covered += 0.3 in found.estimate.interval
            narrower += found.estimate.interval.width < found.human_only.interval.width
        assert 0.89 <= covered / 150 <= 0.995  # 0.95 with an error of 0.018
        if slope == 1.0:
            assert narrower > 140


def test_notes_of_one_case_are_not_independent() -> None:
    rng = np.random.default_rng(3)
    covered = naive = 0
    for _ in range(200):
        levels = rng.normal(0, 1, 100)
        truth = levels[:, None] + rng.normal(0, 0.3, (100, 4))
        judge = truth + 0.5 + rng.normal(0, 0.5, (100, 4)) + rng.normal(0, 0.5, (100, 1))
        cases = np.repeat(np.arange(100), 4)
        by_people, rest = slice(0, 80), slice(80, 400)
        human, graded, others = truth.ravel()[by_people], judge.ravel()[by_people], judge.ravel()[rest]
        notes = GradedNotes(human, graded, others, cases[by_people].tolist(), cases[rest].tolist())
        covered += 0.0 in corrected_mean(notes).estimate.interval
        naive += 0.0 in corrected_mean(GradedNotes(human, graded, others)).estimate.interval
    assert 0.90 <= covered / 200 <= 0.99 and naive / 200 < 0.85


def test_differences_of_separate_notes_add_variances() -> None:
    first, second = GradedNotes(HUMAN, JUDGE, REST), GradedNotes(HUMAN[::-1] * 0.5, JUDGE[::-1], REST * 0.9)
    found = corrected_difference(first, second, names=("new", "old"))
    means = [corrected_mean(notes).estimate for notes in (first, second)]
    assert found.estimate is not None and found.interval is not None
    assert_allclose(found.estimate, means[0].value - means[1].value, rtol=1e-12)
    error = math.hypot(means[0].standard_error, means[1].standard_error)
    assert_allclose(found.statistic, found.estimate / error, rtol=1e-10)
    assert_allclose(found.p_value, 2 * stats.t.sf(abs(found.statistic), found.df), rtol=1e-10)
    above = corrected_difference(first, second, alternative="greater")
    assert_allclose(above.p_value, found.p_value / 2 if found.statistic > 0 else 1 - found.p_value / 2, rtol=1e-9)
    assert above.interval is not None and above.interval.high == math.inf


def test_differences_on_shared_cases_hold_their_level_and_gain_power() -> None:
    rng = np.random.default_rng(4)
    false = paired_width = apart_width = 0.0
    for _ in range(200):
        level = rng.normal(0, 1, 200)
        sides = []
        for lean in (0.8, -0.4):  # the judge favours the first system; people do not
            truth = level + rng.normal(0, 0.4, 200)
            judge = truth + lean + rng.normal(0, 0.3, 200)
            sides.append((truth[:30], judge[:30], judge[30:]))
        cases, others = list(range(30)), list(range(30, 200))
        shared = corrected_difference(*(GradedNotes(*side, cases, others) for side in sides))
        apart = corrected_difference(*(GradedNotes(*side) for side in sides))
        false += shared.p_value < 0.05
        assert shared.interval is not None and apart.interval is not None
        paired_width, apart_width = paired_width + shared.interval.width, apart_width + apart.interval.width
    assert false / 200 <= 0.1  # 0.05 with an error of 0.015
    assert paired_width < 0.8 * apart_width


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrected_mean(GradedNotes([], [], [1.0])), "empty"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3], [1, 2, 3], [1, 2])), "3 cases graded by people"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 4], [1, 2, 3], [1, 2])), "human of notes has 4"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 4], [1, 2, 3, math.nan], [1, 2])), "no value"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 4], [1, 2, 3, 4], [1, 2], cases=[1, 2, 3, 4])), "both cases"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 4], [1, 2, 3, 4], [1, 2], [1, 2, 3], [1, 2])), "3 labels"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 5], [1, 2, 3, 4], [1, 2]), tuning=2.0), "tuning is 2.0"),
        (lambda: corrected_mean(GradedNotes([1, 2, 3, 5], [1, 2, 3, 4], [1, 2]), level=95), "level is 95"),
        (
            lambda: corrected_difference(GradedNotes([1] * 4, [1] * 4, [1, 1]), GradedNotes([1] * 4, [1] * 4, [1, 1])),
            "do not vary",
        ),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
