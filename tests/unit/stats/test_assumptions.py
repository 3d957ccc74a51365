"""Checks of assumptions agree with scipy, statsmodels, pingouin and what R prints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import pingouin as pg
import pytest
from scipy import stats
from statsmodels.stats.diagnostic import normal_ad

from pgharness.stats.assumptions import anderson_darling, dagostino, equal_variances, mauchly, shapiro_wilk
from pgharness.stats.samples import InvalidSample
from unit.stats.data_sets import KINDS, draw, several_groups, tables, varied

# R's datasets::women and InsectSprays
HEIGHTS = list(range(58, 73))
SPRAYS = {
    "A": [10, 7, 20, 14, 14, 12, 10, 23, 17, 20, 14, 13], "B": [11, 17, 21, 11, 16, 14, 17, 17, 19, 21, 7, 13],
    "C": [0, 1, 7, 2, 3, 1, 2, 1, 3, 0, 1, 4], "D": [3, 5, 12, 6, 4, 3, 5, 5, 5, 5, 2, 4],
    "E": [3, 5, 3, 5, 3, 6, 1, 1, 3, 2, 6, 4], "F": [11, 9, 15, 22, 15, 16, 13, 10, 26, 26, 24, 13],
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet_others() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pingouin")
        warnings.filterwarnings("ignore", module="statsmodels")
        yield


def samples(count: int, least: int, *, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        values = draw(rng, KINDS[made % len(KINDS)], int(rng.integers(least, 60)))
        if varied(values):
            made += 1
            yield values


def test_normality_checks_agree_with_scipy_and_statsmodels() -> None:
    for values in samples(200, 20, seed=71):
        w, k2, a2 = shapiro_wilk(values), dagostino(values), anderson_darling(values)
        other = stats.shapiro(values)
        assert (w.statistic, w.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-6, abs=1e-9)
        z1, z2 = stats.skewtest(values).statistic, stats.kurtosistest(values).statistic
        assert k2.statistic == pytest.approx(z1**2 + z2**2, rel=1e-7)
        assert k2.p_value == pytest.approx(math.exp(-(z1**2 + z2**2) / 2), rel=1e-6, abs=1e-300)
        statistic, p_value = normal_ad(values)
        assert a2.statistic == pytest.approx(statistic, rel=1e-7)
        if a2.p_value > 1e-20:  # statsmodels stops its own formula elsewhere in the far tail
            assert a2.p_value == pytest.approx(p_value, rel=1e-6)


def test_shapiro_gives_what_is_published() -> None:
    # Shapiro & Wilk (1965), weights of 11 men: W = 0.79, p near .01; Royston's algorithm in R gives 0.78881, 0.006704
    found = shapiro_wilk([148, 154, 158, 160, 161, 162, 166, 170, 182, 195, 236])
    assert (round(found.statistic, 5), round(found.p_value, 6)) == (0.78881, 0.006704)
    # shapiro.test(women$height): W = 0.96359, p-value = 0.7545
    found = shapiro_wilk(HEIGHTS)
    assert (round(found.statistic, 5), round(found.p_value, 4)) == (0.96359, 0.7545)
    assert found.is_met


def test_variance_checks_agree_with_scipy() -> None:
    for groups in several_groups(200, seed=72):
        for test, centre in (("brown-forsythe", "median"), ("levene", "mean")):
            found, other = equal_variances(groups, test=test), stats.levene(*groups, center=centre)  # type: ignore[arg-type]
            if math.isfinite(found.statistic):
                assert (found.statistic, found.p_value) == pytest.approx(
                    (other.statistic, other.pvalue), rel=1e-6, abs=1e-10
                )
        bartlett, other = equal_variances(groups, test="bartlett"), stats.bartlett(*groups)
        assert (bartlett.statistic, bartlett.p_value) == pytest.approx(
            (other.statistic, other.pvalue), rel=1e-8, abs=1e-12
        )


def test_bartlett_and_levene_give_what_r_prints() -> None:
    # bartlett.test(count ~ spray, InsectSprays): K-squared = 25.96, df = 5, p-value = 9.085e-05
    found = equal_variances(SPRAYS, test="bartlett")
    assert round(found.statistic, 2) == 25.96 and found.p_value == pytest.approx(9.085e-05, abs=5e-9)
    # car::leveneTest(count ~ spray, InsectSprays): F = 3.8214, p = 0.004223
    found = equal_variances(SPRAYS)
    assert (round(found.statistic, 4), round(found.p_value, 6)) == (3.8214, 0.004223)
    assert found.is_met is False


def test_sphericity_agrees_with_pingouin() -> None:
    # pingouin's W of unrounded data is the same; its p-value leaves out the second term of the expansion, R's has it
    compared = 0
    for table in tables(260, seed=73):
        n, k = table.shape
        if k >= n or np.ptp(table) < 1e-3:
            continue
        frame = pd.DataFrame(table)
        found = mauchly(table)
        other = pg.sphericity(frame)
        compared += 1
        assert found.greenhouse_geisser == pytest.approx(float(pg.epsilon(frame, correction="gg")), rel=1e-6)
        assert max(found.huynh_feldt, 0) == pytest.approx(
            max(float(pg.epsilon(frame, correction="hf")), found.greenhouse_geisser), rel=1e-6
        )
        if k > 2 and found.w > 1e-9:
            assert found.w == pytest.approx(float(other.W), rel=1e-5)
            assert found.chi2 == pytest.approx(float(other.chi2), rel=1e-5)
            assert found.df == other.dof
            assert found.p_value == pytest.approx(float(other.pval), abs=0.05)
    assert compared > 100


def test_sphericity_gives_what_r_prints() -> None:
    # ?mauchly.test: reaction times of Maxwell & Delaney, all six conditions: W = 0.031084, p-value = 0.04765. R takes k for
    # p in one term of Anderson's (2003) weight of the expansion, 2 p^3 + 6 p^2 + 3 k + 2, so its p differs in the 4th digit
    deg0 = [420, 420, 480], [420, 480, 480], [480, 480, 540], [420, 540, 540], [540, 660, 540]
    deg0 += [360, 420, 360], [480, 480, 600], [480, 600, 660], [540, 600, 540], [480, 420, 540]
    noisy = [480, 600, 780], [360, 480, 600], [660, 780, 780], [480, 780, 900], [480, 660, 720]
    noisy += [360, 480, 540], [540, 720, 840], [540, 720, 900], [480, 720, 780], [540, 660, 780]
    table = np.hstack((np.array(deg0), np.array(noisy)))
    found = mauchly(table)
    assert found.w == pytest.approx(0.031084, abs=5e-7)
    first, later = stats.chi2.sf(found.chi2, 14), stats.chi2.sf(found.chi2, 18)
    as_in_r = first + (found.p_value - first) * (250 + 150 + 18 + 2) / (250 + 150 + 15 + 2)
    assert later > first and as_in_r == pytest.approx(0.04765, abs=5e-6)
    assert found.is_met is False and "Greenhouse-Geisser" in found.assumption.note


def test_what_cannot_be_checked_says_so() -> None:
    for check, values in ((shapiro_wilk, [1.0] * 9), (anderson_darling, [1.0] * 9), (dagostino, [1.0] * 20)):
        found = check(values)
        assert found.is_met is None and "constant" in found.note
    assert equal_variances([[1, 1], [2, 2]]).is_met is None
    assert equal_variances([[1, 1, 1], [2, 5, 9]], test="bartlett").is_met is False
    assert 0 <= equal_variances([[1, 1, 1], [2, 5, 9]]).p_value <= 1
    two = mauchly([[1, 2], [2, 5], [3, 3]])
    assert two.is_met is True and two.greenhouse_geisser == 1.0
    few = mauchly([[1, 2, 3, 5], [2, 5, 1, 1], [3, 3, 2, 8]])
    assert few.is_met is None and few.as_dict()["w"] is None and "too few" in few.note


def test_large_samples_of_normal_values_pass_and_skewed_ones_fail() -> None:
    rng = np.random.default_rng(74)
    normal, skewed = rng.normal(5, 2, 20_000), rng.lognormal(0, 1, 20_000)
    for check in (shapiro_wilk, anderson_darling, dagostino):
        assert check(normal).is_met is True
        assert check(skewed).is_met is False
    assert "5000 values drawn" in shapiro_wilk(normal).note


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapiro_wilk([1, 2]), "2 values, at least 3 needed"),
        (lambda: anderson_darling([1, 2]), "2 values, at least 8 needed"),
        (lambda: dagostino([1, 2], name="scores"), "scores: 2 values, at least 20 needed"),
        (lambda: shapiro_wilk([1, 2, None]), "missing"),
        (lambda: equal_variances([[1, 2]]), "1 group given"),
        (lambda: equal_variances([[1, 2], [1]]), "group 2: 1 value"),
        (lambda: equal_variances([[1, 2], [1, 3]], test="fligner"), "test is 'fligner'"),  # type: ignore[arg-type]
        (lambda: mauchly([[1, 2, 3], [2, 3, 4]]), "by the same amounts"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
