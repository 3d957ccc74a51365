"""Agreement against pingouin, krippendorff, scikit-learn, R's psych and irrCAC, and published tables."""

from __future__ import annotations

import math
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
import pingouin
import pytest
from numpy.testing import assert_allclose
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from pgharness.stats.agreement import (
    bland_altman,
    cohen_kappa,
    fleiss_kappa,
    intraclass_correlation,
    intraclass_correlations,
    krippendorff_alpha,
)
from pgharness.stats.samples import InvalidSample

TABLE = np.array([[11, 3, 1, 0], [4, 9, 3, 1], [1, 2, 12, 4], [0, 1, 3, 10]])  # reference.R
JUDGES = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]  # Shrout & Fleiss (1979)
# Krippendorff (2011), Computing Krippendorff's alpha-reliability, section C: 4 observers, 12 units, gaps.
OBSERVERS: list[list[Any]] = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
# Bland & Altman (1986), table 1: peak expiratory flow (l/min) by Wright and mini meter.
WRIGHT = [494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427]
MINI = [512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451]


def labels_of(table: Any) -> tuple[list[int], list[int]]:
    pairs = [(i, j) for i in range(len(table)) for j in range(len(table)) for _ in range(table[i][j])]
    return [one for one, _ in pairs], [two for _, two in pairs]


def test_cohen_kappa_agrees_with_psych() -> None:
    first, second = labels_of(TABLE)
    plain = cohen_kappa(first, second)
    assert_allclose(
        [plain.interval.low, plain.value, plain.interval.high],
        [0.370918141285723, 0.526748971193416, 0.682579801101108],
        rtol=1e-10,
    )
    squared = cohen_kappa(first, second, weights="quadratic")
    # psych 2.2.9's weighted error, 0.05697, is not the delta method's, 0.0571957691, which statsmodels gives as well.
    assert_allclose([squared.value, squared.standard_error], [0.770503379400787, 0.0571957690766], rtol=1e-10)
    assert_allclose(cohen_kappa(first, second, weights="linear").value, 0.656622970064567, rtol=1e-10)


def kappa_error(table: Any, weight: Any) -> float:
    """Fleiss, Cohen & Everitt (1969), equation 9, with loops."""
    p = table / table.sum()
    rows, columns, size = p.sum(axis=1), p.sum(axis=0), len(p)
    seen = float(np.sum(weight * p))
    chance = float(np.sum(weight * np.outer(rows, columns)))
    total = 0.0
    for i in range(size):
        for j in range(size):
            mean_row, mean_column = float(weight[i] @ columns), float(weight[:, j] @ rows)
            total += p[i, j] * (weight[i, j] * (1 - chance) - (mean_row + mean_column) * (1 - seen)) ** 2
    return math.sqrt((total - (seen * chance - 2 * chance + seen) ** 2) / table.sum()) / (1 - chance) ** 2


def test_cohen_kappa_agrees_with_scikit_learn_and_the_published_error() -> None:
    rng = np.random.default_rng(1)
    for trial in range(300):
        size, count = int(rng.integers(2, 6)), int(rng.integers(2, 80))
        first = rng.integers(0, size, count)
        second = np.where(rng.random(count) < 0.6, first, rng.integers(0, size, count))
        if len(np.unique([first, second])) < 2:
            continue
        kind = ("none", "linear", "quadratic")[trial % 3]
        order = list(range(size))
        found = cohen_kappa(list(first), list(second), weights=kind, categories=order)  # type: ignore[arg-type]
        wanted = cohen_kappa_score(first, second, labels=order, weights=None if kind == "none" else kind)
        assert_allclose(found.value, wanted, rtol=1e-8, atol=1e-12)
        table = np.zeros((size, size))
        np.add.at(table, (first, second), 1)
        apart = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
        weight = {
            "none": (apart == 0) * 1.0,
            "linear": 1 - apart / (size - 1),
            "quadratic": 1 - (apart / (size - 1)) ** 2,
        }[kind]
        assert_allclose(found.standard_error, kappa_error(table, weight), rtol=1e-6, atol=1e-8)


def test_fleiss_kappa_of_published_tables() -> None:
    # Gwet's linearised error: irrCAC 0.4.4 (Python), rounded by it to 15 digits.
    ratings = [
        [1, 1, 1, 2],
        [2, 2, 2, 2],
        [3, 3, 3, 2],
        [1, 2, 1, 1],
        [3, 3, 3, 3],
        [2, 2, 1, 2],
        [1, 1, 1, 1],
        [3, 2, 3, 3],
        [2, 2, 2, 3],
        [1, 1, 2, 1],
    ]
    found = fleiss_kappa(ratings)
    assert_allclose([found.value, found.standard_error], [0.47069943289225, 0.118641104203413], rtol=1e-12)
    assert_allclose([found.interval.low, found.interval.high], [0.202314609216212, 0.739084256568288], rtol=1e-10)
    # The worked example of 10 items and 14 raters that is printed as 0.210 in many texts.
    counts = [
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    rows = [[label for label, count in zip("abcde", row, strict=True) for _ in range(count)] for row in counts]
    assert round(fleiss_kappa(rows).value, 3) == 0.210


def test_fleiss_kappa_is_nominal_alpha_without_its_small_sample_correction() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        items, raters = int(rng.integers(2, 30)), int(rng.integers(2, 6))
        truth = rng.integers(0, 4, items)
        ratings = np.where(rng.random((items, raters)) < 0.5, truth[:, None], rng.integers(0, 4, (items, raters)))
        if len(np.unique(ratings)) < 2:
            continue
        alpha = krippendorff.alpha(ratings.T, level_of_measurement="nominal")
        assert_allclose(
            fleiss_kappa(ratings.tolist()).value, 1 - (1 - alpha) / (1 - 1 / ratings.size), rtol=1e-8, atol=1e-12
        )


def test_krippendorff_alpha_of_the_published_example() -> None:
    ratings = [list(unit) for unit in zip(*OBSERVERS, strict=True)]
    wanted = {"nominal": 0.743, "ordinal": 0.815, "interval": 0.849, "ratio": 0.797}
    for metric, value in wanted.items():
        found = krippendorff_alpha(ratings, metric=metric, resamples=50)  # type: ignore[arg-type]
        assert round(found.value, 3) == value
        assert found.n == 11 and "1 units" in found.warnings[0]


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval", "ratio"])
def test_krippendorff_alpha_agrees_with_the_package(metric: Any) -> None:
    rng = np.random.default_rng(3)
    checked = 0
    while checked < 200:
        units, raters = int(rng.integers(2, 25)), int(rng.integers(2, 6))
        truth = rng.integers(0, 5, units)
        ratings = np.where(
            rng.random((units, raters)) < 0.6, truth[:, None], rng.integers(0, 5, (units, raters))
        ).astype(float)
        if checked % 4 == 3 and metric in ("interval", "ratio"):
            ratings = np.abs(ratings + rng.normal(size=ratings.shape)) * 1e3
        ratings[rng.random(ratings.shape) < 0.2] = np.nan
        paired = ratings[np.sum(~np.isnan(ratings), axis=1) > 1]
        if len(paired) < 2 or len(np.unique(paired[~np.isnan(paired)])) < 2:
            continue
        checked += 1
        found = krippendorff_alpha(ratings.tolist(), metric=metric, resamples=2)
        assert_allclose(found.value, krippendorff.alpha(paired.T, level_of_measurement=metric), rtol=1e-8, atol=1e-11)


def test_krippendorff_interval_covers_the_alpha_of_many_units() -> None:
    rng = np.random.default_rng(4)

    def draw(units: int) -> Any:
        truth = rng.integers(0, 4, units)
        return np.where(rng.random((units, 3)) < 0.7, truth[:, None], rng.integers(0, 4, (units, 3)))

    target = krippendorff.alpha(draw(40_000).T, level_of_measurement="nominal")
    covered = sum(
        target in krippendorff_alpha(draw(60).tolist(), resamples=150, rng=seed).interval for seed in range(100)
    )
    assert covered >= 86  # of 95 expected; the standard error is 2.2


def test_krippendorff_takes_words_in_a_given_order() -> None:
    words = [["low", "low"], ["mid", "high"], ["high", "high"], ["mid", None]]
    found = krippendorff_alpha(words, metric="ordinal", categories=["low", "mid", "high"], resamples=20)
    numbers = krippendorff_alpha([[0, 0], [1, 2], [2, 2], [1, None]], metric="ordinal", resamples=20)
    assert found.value == numbers.value and found.interval == numbers.interval


def test_intraclass_correlations_of_shrout_and_fleiss() -> None:
    found = intraclass_correlations(JUDGES)
    assert [round(result.estimate or 0, 2) for result in found.values()] == [
        0.17,
        0.29,
        0.71,
        0.44,
        0.62,
        0.91,
    ]  # table 4
    # R's psych, see reference.R: F, lower, upper.
    wanted = {
        "ICC1": (1.794678492239469, -0.132932324874751, 0.722560062328121),
        "ICC2": (11.0272479564033, 0.0187865133747120, 0.761084369648953),
        "ICC3": (11.0272479564033, 0.342464765033925, 0.945858259955360),
        "ICC1k": (1.794678492239469, -0.884442155238119, 0.912415420340776),
        "ICC2k": (11.0272479564033, 0.0711368153025035, 0.927232040167722),
        "ICC3k": (11.0272479564033, 0.675674713816305, 0.985891678169062),
    }
    for form, (statistic, low, high) in wanted.items():
        result = found[form]  # type: ignore[index]
        assert result.interval is not None
        assert_allclose(
            [result.statistic, result.interval.low, result.interval.high], [statistic, low, high], rtol=1e-9
        )
    assert "ICC = .29" in intraclass_correlation(JUDGES).apa


def random_scores(rng: np.random.Generator, trial: int) -> Any:
    n, k = int(rng.integers(3, 15)), int(rng.integers(2, 5))
    scores = rng.normal(size=(n, k)) + rng.normal(size=(n, 1)) * (trial % 3) + rng.normal(size=(1, k)) * (trial % 2)
    if trial % 5 == 0:
        scores = np.round(scores * 2) + rng.integers(0, 2, (n, k))
    return scores * 1e5 + 1e6 if trial % 7 == 0 else scores


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # pingouin 0.7 with pandas 3.1
def test_intraclass_correlations_agree_with_pingouin() -> None:
    rng = np.random.default_rng(5)
    for trial in range(30):  # 50 ms each; the next test has the number of data sets
        scores = random_scores(rng, trial)
        n, k = scores.shape
        frame = pd.DataFrame(
            {"subject": np.repeat(np.arange(n), k), "rater": np.tile(np.arange(k), n), "score": scores.ravel()}
        )
        wanted = pingouin.intraclass_corr(frame, targets="subject", raters="rater", ratings="score")
        for result, (_, row) in zip(intraclass_correlations(scores).values(), wanted.iterrows(), strict=True):
            assert_allclose(result.estimate, row["ICC"], rtol=1e-7, atol=1e-10)
            assert_allclose([result.statistic, *(result.df or ())], [row["F"], row["df1"], row["df2"]], rtol=1e-7)  # type: ignore[misc]
            assert_allclose(result.p_value, row["pval" if "pval" in wanted else "p_val"], rtol=1e-6, atol=1e-12)


def test_intraclass_correlations_invert_their_tests() -> None:
    """Estimates from least squares; an end of an interval is the value that the F test would just not refuse."""
    rng = np.random.default_rng(15)
    for trial in range(200):
        scores = random_scores(rng, trial)
        n, k = scores.shape
        subject, rater = np.eye(n)[np.repeat(np.arange(n), k)], np.eye(k)[np.tile(np.arange(k), n)]
        values = (scores - scores.mean()).ravel()

        def left(*parts: Any, values: Any = values) -> float:
            design = np.column_stack([np.ones(len(values)), *parts])
            return float(np.sum((values - design @ np.linalg.lstsq(design, values, rcond=None)[0]) ** 2))

        within, error = left(subject) / (n * (k - 1)), left(subject, rater) / ((n - 1) * (k - 1))
        between, raters = (left() - left(subject)) / (n - 1), (left() - left(rater)) / (k - 1)
        found = intraclass_correlations(scores)
        wanted = {
            "ICC1": (between - within) / (between + (k - 1) * within),
            "ICC2": (between - error) / (between + (k - 1) * error + k / n * (raters - error)),
            "ICC3": (between - error) / (between + (k - 1) * error),
        }
        for form, value in wanted.items():
            assert_allclose(found[form].estimate, value, rtol=1e-7, atol=1e-10)  # type: ignore[index]
            assert_allclose(found[form + "k"].estimate, k * value / (1 + (k - 1) * value), rtol=1e-6, atol=1e-8)  # type: ignore[index]
        for form, noise, df2 in (("ICC1", within, n * (k - 1)), ("ICC3", error, (n - 1) * (k - 1))):
            interval = found[form].interval  # type: ignore[index]
            for end, tail in ((interval.low, 0.025), (interval.high, 0.975)):
                # Under a correlation of end, between / noise is (1 + (k - 1) end) / (1 - end) times an F variable.
                inflated = (1 + (k - 1) * end) / (1 - end)
                assert_allclose(stats.f.sf(between / noise / inflated, n - 1, df2), tail, rtol=1e-6)


def test_intraclass_correlations_without_error_are_one() -> None:
    same = intraclass_correlations([[1, 1], [2, 2], [5, 5]])
    assert all(result.estimate == 1 and result.p_value == 0 for result in same.values())
    shifted = intraclass_correlations([[1, 2], [2, 3], [5, 6]])
    assert shifted["ICC3"].estimate == 1 and 0 < (shifted["ICC2"].estimate or 0) < 1
    assert shifted["ICC2"].interval is not None and math.isfinite(shifted["ICC2"].interval.low)


def test_bland_altman_of_the_published_example() -> None:
    found = bland_altman(WRIGHT, MINI)
    assert round(found.bias.value, 1) == -2.1 and round(found.sd, 1) == 38.8
    t = stats.ttest_rel(WRIGHT, MINI).confidence_interval()
    assert_allclose([found.bias.interval.low, found.bias.interval.high], [t.low, t.high], rtol=1e-10)
    # The paper uses 2 in place of 1.96: -79.7 and 75.5.
    assert_allclose(
        [found.lower.value, found.upper.value], [-2.1176 - 1.959964 * 38.7651, -2.1176 + 1.959964 * 38.7651], atol=1e-3
    )


def test_limits_of_agreement_have_the_tolerance_factors_of_the_tables() -> None:
    """One-sided normal tolerance factors, 95% confidence: Hahn & Meeker (1991), table A.12d (n, coverage, factor)."""
    for n, coverage, factor in ((10, 0.95, 2.911), (10, 0.99, 3.981), (20, 0.95, 2.396), (50, 0.90, 1.646)):
        values = stats.norm.ppf((np.arange(n) + 0.5) / n)
        found = bland_altman(values, np.zeros(n), coverage=2 * coverage - 1, level=0.90)
        assert round((found.upper.interval.high - found.bias.value) / found.sd, 3) == factor


def test_limits_of_agreement_cover() -> None:
    rng = np.random.default_rng(6)
    hits = sum(1.959964 in bland_altman(rng.normal(size=15), np.zeros(15)).upper.interval for _ in range(200))
    assert 0.91 <= hits / 200 <= 0.985


def test_bland_altman_sees_a_difference_that_grows() -> None:
    rng = np.random.default_rng(7)
    size = rng.uniform(1, 100, 80)
    found = bland_altman(size * 1.2 + rng.normal(size=80), size)
    assert found.proportional.is_met is False and found.proportional.p_value < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cohen_kappa([1, 1], [1, 1]), "undefined without variation"),
        (lambda: cohen_kappa([1, 2], [1]), "second 1"),
        (lambda: cohen_kappa([], []), "0 items"),
        (lambda: cohen_kappa(["a", "b"], ["a", "b"], weights="linear"), "no order"),
        (lambda: cohen_kappa(["a", None], ["a", "b"]), "missing"),
        (lambda: cohen_kappa(["a", "c"], ["a", "b"], categories=["a", "b"]), "'c' is not among"),
        (lambda: cohen_kappa([1, 2], [1, 2], weights="cubic"), "cubic"),  # type: ignore[arg-type]
        (lambda: fleiss_kappa([[1, 2], [1]]), "same number of raters"),
        (lambda: fleiss_kappa([[1, 1], [1, 1]]), "undefined"),
        (lambda: fleiss_kappa([]), "at least 2 items"),
        (lambda: krippendorff_alpha([[1, None], [2, None]]), "0 units have two ratings"),
        (lambda: krippendorff_alpha([[1, 1], [1, 1]]), "undefined"),
        (lambda: krippendorff_alpha([["a", "b"], ["a", "a"]], metric="interval"), "no order"),
        (lambda: krippendorff_alpha([[-1, 1], [1, 1]], metric="ratio"), "values from 0"),
        (lambda: krippendorff_alpha([[1, 2], [1, 1]], metric="cosine"), "cosine"),  # type: ignore[arg-type]
        (lambda: intraclass_correlations([[1, 1], [1, 1]]), "all ratings are equal"),
        (lambda: intraclass_correlations([[1, 2]]), "ratings"),
        (lambda: intraclass_correlations([[1, math.nan], [1, 2], [3, 4]]), 'nan="omit"'),
        (lambda: intraclass_correlation(JUDGES, form="ICC4"), "ICC4"),  # type: ignore[arg-type]
        (lambda: bland_altman([1, 2, 3], [0, 1, 2]), "differs by 1"),
        (lambda: bland_altman([1, 2], [0, 3]), "at least 3"),
        (lambda: bland_altman(WRIGHT, MINI, level=95), "level of 95"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
