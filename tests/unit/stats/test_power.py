"""Power against R, G*Power, statsmodels, exhaustive sums and simulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, special, stats
from statsmodels.stats.power import FTestAnovaPower, TTestIndPower, TTestPower

from pgharness.stats.evaluation import VarianceParts
from pgharness.stats.power import (
    ClusteredMeans,
    ManyMeans,
    McNemarPairs,
    PairedMeans,
    TwoMeans,
    TwoProportions,
    advise_from_pilot,
    detectable_effect,
    post_hoc_power,
    power_curve,
    power_of,
    sample_size,
    shared_cases,
    simulated_power,
    simulated_sample_size,
)
from pgharness.stats.samples import InvalidSample

SIDES = {"two-sided": "two-sided", "greater": "larger", "less": "smaller"}


def test_powers_agree_with_r() -> None:
    """The n that R solves for has the power that R was asked for; see reference.R."""
    for design, n, power in (
        (TwoMeans(0.5), 63.7657637142739, 0.8),
        (TwoMeans(0.2), 526.3333711634147, 0.9),
        (TwoMeans(0.8, alternative="greater"), 34.5183759482247, 0.95),
        (PairedMeans(0.3), 89.149577245627, 0.8),
        (ManyMeans(0.25, 4), 44.5992742990201, 0.8),
        (ManyMeans(0.1, 3), 422.7981891019105, 0.9),
        (TwoProportions(0.5, 0.75, approximate=True), 76.7069301141077, 0.9),
        (TwoProportions(0.85, 0.9, approximate=True), 685.5968580658480, 0.8),
    ):
        tolerance = 5e-4 if isinstance(design, TwoProportions) else 1e-5  # power.prop.test's own solver stops at 1e-4
        assert_allclose(design.power(n, 0.05), power, atol=tolerance)
    assert_allclose(power_of(TwoMeans(0.6), 20).power, 0.456034069359873, rtol=1e-8)
    assert_allclose(power_of(TwoMeans(0.7, ratio=40 / 12), 12).power, 0.550096012114974, rtol=1e-8)
    assert_allclose(power_of(TwoProportions(0.5, 0.75, approximate=True), 50).power, 0.740167193453611, rtol=1e-8)
    assert_allclose(detectable_effect(TwoMeans(1.0), 30).effect, 0.735629236718451, rtol=2e-5)
    assert_allclose(detectable_effect(PairedMeans(1.0), 30).effect, 0.529234471054348, rtol=2e-5)


def test_sample_sizes_of_the_usual_table() -> None:
    """Cohen (1988), table 2.4.1, as G*Power 3.1 gives it: n in each group."""
    table = {0.8: (394, 64, 26), 0.9: (527, 86, 34), 0.95: (651, 105, 42)}
    for power, sizes in table.items():
        found = [sample_size(TwoMeans(d), power=power) for d in (0.2, 0.5, 0.8)]
        assert [answer.n for answer in found] == list(sizes)
        assert all(answer.total_n == 2 * answer.n for answer in found)


def by_integral(noncentrality: float, df: float, alpha: float, side: str) -> float:
    """The power of a t test as the normal tail over the density of the estimated variance."""
    critical = stats.t.isf(alpha / 2 if side == "two-sided" else alpha, df)

    def tail(shift: float) -> float:
        spread = math.sqrt(2 * df)
        edges = max(df - 12 * spread, 0.0), df + 12 * spread + 30
        return float(
            integrate.quad(
                lambda u: stats.norm._cdf(shift - critical * math.sqrt(u / df)) * stats.chi2._pdf(u, df),
                *edges,
                epsabs=1e-13,
                limit=200,
            )[0]
        )

    near, far = tail(noncentrality), tail(-noncentrality)
    return {"two-sided": near + far, "greater": near, "less": far}[side]


def agree(ours: float, wanted: float, instead: float = math.nan) -> None:
    """statsmodels 0.15 gives NaN where scipy's noncentral t has no far tail, even at powers such as .9967."""
    if math.isnan(wanted):
        assert_allclose(ours, instead, rtol=1e-7, atol=1e-9)
    else:
        assert_allclose(ours, wanted, rtol=1e-8, atol=1e-10)


def test_t_powers_agree_with_statsmodels() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        d, alpha = float(rng.uniform(-1.5, 1.5)), float(rng.choice([0.001, 0.01, 0.05, 0.1]))
        n, ratio = int(rng.integers(2, 300)), float(rng.choice([0.5, 1.0, 2.0]))
        side = str(rng.choice(list(SIDES)))
        if n * (1 + ratio) <= 3:
            continue
        ours = TwoMeans(d, ratio, side).power(n, alpha)  # type: ignore[arg-type]
        second = n * ratio
        wanted = TTestIndPower().power(d, n, alpha, ratio=ratio, alternative=SIDES[side])
        agree(
            ours,
            wanted,
            by_integral(d * math.sqrt(n * second / (n + second)), n + second - 2, alpha, side)
            if math.isnan(wanted)
            else 0,
        )
        ours = PairedMeans(d, side).power(n, alpha)  # type: ignore[arg-type]
        wanted = TTestPower().power(d, n, alpha, alternative=SIDES[side])
        agree(ours, wanted, by_integral(d * math.sqrt(n), n - 1, alpha, side) if math.isnan(wanted) else 0)


def test_anova_powers_agree_with_statsmodels() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        f, groups, n = float(rng.uniform(0, 0.8)), int(rng.integers(2, 8)), int(rng.integers(2, 100))
        wanted = FTestAnovaPower().power(f, n * groups, 0.05, k_groups=groups)
        assert_allclose(ManyMeans(f, groups).power(n, 0.05), wanted, rtol=1e-8, atol=1e-10)


def test_power_is_right_where_noncentral_series_give_up() -> None:
    for d in (0.9, 3.0, 20.0):
        for n in (50, 3_000, 1_000_000):
            assert 0.99 < TwoMeans(d).power(n, 0.05) <= 1 + 1e-12
    assert TwoMeans(5.0, alternative="less").power(1000, 0.05) < 1e-12
    # Few degrees of freedom and a large effect: by simulation of the t statistic itself.
    rng = np.random.default_rng(10)
    for d, n, alpha in ((30.0, 3, 0.001), (25.0, 3, 0.0005), (21.0, 4, 1e-5)):
        noncentrality, df = d * math.sqrt(n), n - 1
        t = (rng.normal(size=400_000) + noncentrality) / np.sqrt(rng.chisquare(df, 400_000) / df)
        seen = np.mean(t > stats.t.isf(alpha / 2, df))
        assert abs(PairedMeans(d).power(n, alpha) - seen) < 0.003  # four times the simulation's error


def test_proportions_agree_with_their_definition_by_simulation() -> None:
    rng = np.random.default_rng(3)
    for first, second, n, ratio in (
        (0.6, 0.7, 300, 1.0),
        (0.1, 0.2, 150, 2.0),
        (0.9, 0.8, 200, 1.0),
        (0.9, 0.97, 20, 1.0),
        (0.02, 0.1, 150, 1.0),
        (0.5, 0.52, 9000, 1.0),
    ):
        other = int(n * ratio)
        one, two = rng.binomial(n, first, 200_000) / n, rng.binomial(other, second, 200_000) / other
        pooled = (n * one + other * two) / (n + other)
        error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / other))
        z = np.divide(one - two, error, out=np.zeros(len(one)), where=error > 0)
        seen = np.mean(np.abs(z) > 1.959964)
        assert abs(TwoProportions(first, second, ratio).power(n, 0.05) - seen) < 0.005  # of it .0045 simulation
    # what most tables give instead
    assert (
        TwoProportions(0.9, 0.97, approximate=True).power(20, 0.05) > TwoProportions(0.9, 0.97).power(20, 0.05) + 0.06
    )


def test_a_sample_size_for_proportions_keeps_its_power_in_larger_samples() -> None:
    for design in (TwoProportions(0.92, 0.99), TwoProportions(0.5, 0.75), TwoProportions(0.1, 0.3, 2.0, "greater")):
        found = sample_size(design).n
        assert (
            all(design.power(n, 0.05) >= 0.8 for n in range(found, found + 60)) and design.power(found - 1, 0.05) < 0.8
        )


@pytest.mark.parametrize("mid_p", [False, True])
def test_mcnemar_power_agrees_with_a_sum_over_all_tables(mid_p: bool) -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        n, (a, b) = int(rng.integers(1, 40)), rng.uniform(0.02, 0.45, 2)
        alpha, total = float(rng.choice([0.01, 0.05, 0.2])), 0.0
        for x in range(n + 1):
            for y in range(n + 1 - x):
                p_value = stats.binomtest(x, x + y).pvalue if (x + y and not mid_p) else 1.0
                if mid_p and x + y:
                    least = min(x, y)
                    p_value = min(2 * stats.binom.cdf(least, x + y, 0.5) - stats.binom.pmf(least, x + y, 0.5), 1.0)
                if p_value <= alpha * (1 + 1e-12):
                    total += math.exp(
                        math.lgamma(n + 1)
                        - math.lgamma(x + 1)
                        - math.lgamma(y + 1)
                        - math.lgamma(n - x - y + 1)
                        + x * math.log(a)
                        + y * math.log(b)
                        + (n - x - y) * math.log(1 - a - b)
                    )
        assert_allclose(McNemarPairs(a, b, mid_p).power(n, alpha), total, rtol=1e-8, atol=1e-10)
        if n > 12:
            break


def test_mcnemar_sample_size_is_past_every_fall_of_the_power() -> None:
    design = McNemarPairs(0.25, 0.10)
    found = sample_size(design)
    assert all(design.power(n, 0.05) >= 0.8 for n in range(found.n, found.n + 300))
    assert design.power(found.n - 1, 0.05) < 0.8
    # Connor (1987), Biometrics 43, equation 3, is for the asymptotic test, so a little below.
    z = stats.norm.isf(0.025) * math.sqrt(0.35) + stats.norm.isf(0.2) * math.sqrt(0.35 - 0.15**2)
    assert 0 < found.n - (z / 0.15) ** 2 < 25


def test_clustered_power_is_that_of_a_t_test_on_cluster_means() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        d, n, size, icc = (
            float(rng.uniform(0, 1)),
            int(rng.integers(2, 60)),
            int(rng.integers(1, 30)),
            float(rng.uniform(0, 1)),
        )
        in_sd_of_means = d / math.sqrt(icc + (1 - icc) / size)
        wanted = TTestIndPower().power(in_sd_of_means, n, 0.05)
        instead = (
            by_integral(in_sd_of_means * math.sqrt(n / 2), 2 * n - 2, 0.05, "two-sided") if math.isnan(wanted) else 0
        )
        agree(ClusteredMeans(d, size, icc).power(n, 0.05), wanted, instead)
    assert ClusteredMeans(0.5, 10, 0.2).total(7) == 140


def test_the_three_questions_answer_each_other() -> None:
    rng = np.random.default_rng(6)
    for _ in range(6):
        power, alpha = float(rng.uniform(0.3, 0.95)), float(rng.choice([0.01, 0.05]))
        for design in (
            TwoMeans(float(rng.uniform(0.2, 1.5))),
            PairedMeans(-float(rng.uniform(0.2, 1.5))),
            ManyMeans(float(rng.uniform(0.1, 0.6)), 3),
            TwoProportions(0.5, float(rng.uniform(0.6, 0.9))),
            TwoProportions(0.5, float(rng.uniform(0.1, 0.4))),
            McNemarPairs(0.3, float(rng.uniform(0.05, 0.2))),
            ClusteredMeans(float(rng.uniform(0.3, 1)), 5, 0.1),
        ):
            size = sample_size(design, power=power, alpha=alpha)
            assert size.power >= power and size.n >= design.smallest
            if size.n > design.smallest:
                assert design.power(size.n - 1, alpha) < power
            least = detectable_effect(design, max(size.n, 5), power=power, alpha=alpha)
            assert_allclose(least.power, power, atol=1e-6)
            if size.n >= 5:
                assert abs(least.effect) <= abs(design.effect) + 1e-9
            assert math.copysign(1, least.effect) == math.copysign(1, design.effect)


def _replayed(design: Any, n: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw data of a design so many times and make its test; return the p-values."""
    times = 60_000
    match design:
        case TwoMeans():
            one, two = random.normal(design.d, 1, (times, n)), random.normal(0, 1, (times, round(n * design.ratio)))
            return np.asarray(stats.ttest_ind(one, two, axis=1).pvalue)
        case PairedMeans():
            return np.asarray(stats.ttest_1samp(random.normal(design.dz, 1, (times, n)), 0, axis=1).pvalue)
        case ManyMeans():
            means = np.arange(design.groups) / np.std(np.arange(design.groups)) * design.f
            return np.asarray(stats.f_oneway(*(random.normal(mean, 1, (times, n)) for mean in means), axis=1).pvalue)
        case ClusteredMeans():
            spread = design.icc**0.5, (1 - design.icc) ** 0.5
            size = int(design.cluster_size)
            one, two = (
                random.normal(mean, spread[0], (times, n)) + random.normal(0, spread[1], (times, n, size)).mean(axis=2)
                for mean in (design.d, 0)
            )
            return np.asarray(stats.ttest_ind(one, two, axis=1).pvalue)
        case McNemarPairs():
            rest = 1 - design.first_only - design.second_only
            counts = random.multinomial(n, [design.first_only, design.second_only, rest], times)
            low, whole = counts[:, :2].min(axis=1), counts[:, :2].sum(axis=1)
            less = stats.binom.pmf(low, whole, 0.5) * design.mid_p
            return np.asarray(np.minimum(2 * stats.binom.cdf(low, whole, 0.5) - less, 1))
    raise AssertionError(design)


def test_sizes_that_are_advised_have_their_power_when_replayed() -> None:
    random = np.random.default_rng(11)
    for design in (
        TwoMeans(0.6),
        TwoMeans(0.9, ratio=2.0),
        PairedMeans(0.35),
        ManyMeans(0.3, 4),
        ClusteredMeans(0.5, 5, 0.2),
        McNemarPairs(0.25, 0.10),
        McNemarPairs(0.25, 0.10, mid_p=True),
    ):
        for power in (0.5, 0.8, 0.9):
            advised = sample_size(design, power=power)
            seen = float(np.mean(_replayed(design, advised.n, random) <= 0.05))
            assert abs(seen - advised.power) < 0.008, (design, advised)  # four times the simulation's error of .002
            assert seen > power - 0.008


def test_simulation_agrees_with_the_formula() -> None:
    def p_value(random: np.random.Generator, n: int = 40) -> float:
        one, two = random.normal(0.6, 1, n), random.normal(0, 1, n)
        t = (one.mean() - two.mean()) / math.sqrt((one.var(ddof=1) + two.var(ddof=1)) / n)
        return 2 * float(special.stdtr(2 * n - 2, -abs(t)))

    found = simulated_power(p_value, simulations=600, rng=7, n=40, unit="values in each group")
    assert found.interval is not None and TwoMeans(0.6).power(40, 0.05) in found.interval
    assert simulated_power(p_value, simulations=50, rng=3) == simulated_power(p_value, simulations=50, rng=3)
    size = simulated_sample_size(p_value, simulations=300, rng=8)
    assert abs(size.n - sample_size(TwoMeans(0.6)).n) < 9  # 45; the simulation's error of 0.023 is about 3 units
    with pytest.raises(InvalidSample, match="raise `largest`"):
        simulated_sample_size(p_value, simulations=20, largest=4)


def test_advice_from_a_pilot() -> None:
    parts = VarianceParts(case=0.04, replication=0.09, grade=0.02, cases=30, replications=3, grades=2)
    design = shared_cases(0.1, parts, replications=3, grades=2)
    assert_allclose(design.dz, 0.1 / math.sqrt(0.04 + (0.09 + 0.01) / 3))
    advice = advise_from_pilot(0.3, 20, difference=0.1)
    assert advice.expected.n == sample_size(PairedMeans(1 / 3)).n == 73
    assert_allclose(advice.sd_upper, 0.3 * math.sqrt(19 / stats.chi2.ppf(0.2, 19)))
    assert advice.safe.n > advice.expected.n and "80% assurance" in advice.reason
    rng = np.random.default_rng(9)
    pilots = [rng.normal(0, 0.3, 20).std(ddof=1) for _ in range(2000)]
    enough = [advise_from_pilot(sd, 20, difference=0.1).safe.n >= 73 for sd in pilots[:60]]
    assert enough == [sd * math.sqrt(19 / stats.chi2.ppf(0.2, 19)) >= 0.2973 for sd in pilots[:60]]  # 73 cases' sd
    enough = [sd * math.sqrt(19 / stats.chi2.ppf(0.2, 19)) >= 0.3 for sd in pilots]
    assert 0.77 <= np.mean(enough) <= 0.83  # the assurance, 0.8 with an error of 0.009


def test_post_hoc_power_carries_its_caveat_and_words_follow_the_power() -> None:
    assert "Hoenig" in post_hoc_power(TwoMeans(0.4), 20).warnings[0]
    words = [answer.advice.rsplit(": ", 1)[1] for answer in power_curve(TwoMeans(0.5), [20, 45, 64])]
    assert words == ["too low", "marginal", "adequate"]
    assert "(128 in all)" in sample_size(TwoMeans(0.5)).advice


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_size(TwoMeans(0.0)), "effect of 0"),
        (lambda: sample_size(TwoMeans(1e-9)), "more than"),
        (lambda: sample_size(TwoMeans(0.5, alternative="less")), "more than"),
        (lambda: sample_size(TwoMeans(0.5), power=80), "power is 80"),
        (lambda: power_of(TwoMeans(0.5), 1), "at least 2"),
        (lambda: power_of(TwoMeans(0.5), 10, alpha=0), "alpha is 0"),
        (lambda: power_of(TwoProportions(0.5, 1.2), 10), "second is 1.2"),
        (lambda: power_of(McNemarPairs(0.7, 0.6), 10), "at most 1"),
        (lambda: power_of(ClusteredMeans(0.5, 10, 1.5), 10), "icc"),
        (lambda: detectable_effect(McNemarPairs(0.1, 0.05), 10), "even the largest"),
        (lambda: detectable_effect(TwoMeans(0.5), 10, power=0.01), "not above alpha"),
        (lambda: simulated_power(lambda random: 0.5, simulations=0), "at least 1"),
        (lambda: advise_from_pilot(0.0, 10, difference=0.1), "vary"),
        (lambda: shared_cases(0.1, VarianceParts(0.0, 0.0, None, 5, 2, 1)), "do not vary"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
