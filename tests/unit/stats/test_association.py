"""Correlations agree with scipy, pingouin, full enumeration and what R prints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pgharness.stats.association import kendall, pearson, spearman
from pgharness.stats.results import Alternative, Result
from pgharness.stats.samples import InvalidSample
from unit.stats.data_sets import paired, varied

ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "less", "greater")
# Hollander & Wolfe (1973), 187f, in ?cor.test: Hunter L and sensory quality of tuna
TUNA = [44.4, 45.9, 41.9, 53.3, 44.7, 44.1, 50.7, 45.2, 60.1], [2.6, 3.1, 2.5, 5.0, 3.6, 4.0, 5.2, 2.8, 3.8]


def ends(result: Result) -> tuple[float, float]:
    assert result.interval is not None
    return result.interval.low, result.interval.high


def test_correlations_agree_with_scipy() -> None:
    for number, (one, two) in enumerate(paired(200, seed=101, least=8)):
        if not (varied(one) and varied(two)):
            continue
        alternative = ALTERNATIVES[number % 3]
        found, other = pearson(one, two, alternative=alternative), stats.pearsonr(one, two, alternative=alternative)
        assert (found.statistic, found.p_value) == pytest.approx((other.statistic, other.pvalue), rel=1e-6, abs=1e-9)
        interval = other.confidence_interval()
        assert ends(found) == pytest.approx((interval.low, interval.high), abs=1e-8)
        found, rank = spearman(one, two, alternative=alternative), stats.spearmanr(one, two, alternative=alternative)
        assert (found.statistic, found.p_value) == pytest.approx((rank.statistic, rank.pvalue), rel=1e-6, abs=1e-9)


def test_kendall_agrees_with_counted_pairs() -> None:
    for one, two in paired(200, seed=102, least=5):
        if not (varied(one) and varied(two)):
            continue
        above = np.triu_indices(len(one), 1)
        x, y = (np.sign(np.subtract.outer(v, v))[above] for v in (one, two))
        tau = (x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum())
        assert kendall(one, two).statistic == pytest.approx(tau, abs=1e-12)


def test_few_pairs_are_enumerated() -> None:
    for number, (one, two) in enumerate(paired(200, seed=103, least=3, most=6)):
        if not (varied(one) and varied(two)):
            continue
        alternative = ALTERNATIVES[number % 3]
        seen = np.corrcoef(stats.rankdata(one), stats.rankdata(two))[0, 1]
        ranks = stats.rankdata(two)
        orders = np.array(list(itertools.permutations(ranks)))
        centred = stats.rankdata(one) - (len(one) + 1) / 2
        values = orders @ centred / (math.sqrt((centred**2).sum()) * math.sqrt(((ranks - ranks.mean()) ** 2).sum()))
        above, below = (values >= seen - 1e-9).mean(), (values <= seen + 1e-9).mean()
        expected = {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]
        assert spearman(one, two, alternative=alternative).p_value == pytest.approx(expected, abs=1e-12)


def test_correlations_give_what_r_prints() -> None:
    # cor.test: t = 1.8411, df = 7, p-value = 0.1082, interval (-0.1497426, 0.8955795), cor 0.5711816
    found = pearson(*TUNA)
    assert (round(found.statistic, 7), found.df, round(found.p_value, 4)) == (0.5711816, 7, 0.1082)
    assert ends(found) == pytest.approx((-0.1497426, 0.8955795), abs=5e-8)
    assert "r(7) = .57, p = .108" in found.apa
    # method = "kendall", alternative = "greater": T = 26, p-value = 0.05972, tau 0.4444444
    found = kendall(*TUNA, alternative="greater")
    assert (round(found.statistic, 7), round(found.p_value, 5)) == (0.4444444, 0.05972)


def test_perfect_and_huge_correlations() -> None:
    line = np.arange(20.0)
    for test in (pearson, spearman, kendall):
        found = test(line, 3 * line + 1)
        assert found.statistic == pytest.approx(1.0) and found.p_value < 1e-6 and "undefined" not in found.apa
    rng = np.random.default_rng(104)
    one = rng.normal(size=50_000)
    for test in (pearson, spearman, kendall):
        found = test(one, one + rng.normal(size=50_000))
        assert found.interval is not None and found.interval.width < 0.02


@pytest.mark.parametrize("test", [pearson, spearman, kendall])
def test_bad_input_is_refused_by_name(test: Callable[..., Result]) -> None:
    bad: list[tuple[object, object, str]] = [
        ([1, 2], [1, 2], "2 pairs, at least 3 needed"),
        ([1, 1, 1], [1, 2, 3], "first is always 1"),
        ([1, None, 1], [1, 2, 3], "has no value"),
        ([1, 2, 3], [1, 2], "first has 3 values and second has 2"),
    ]
    for one, two, message in bad:
        with pytest.raises(InvalidSample, match=message):
            test(one, two)
    assert "collect more" in test([1, 2, 4], [3, 1, 2]).warnings[0]
