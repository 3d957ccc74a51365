"""Permutation tests are exact where enumeration is possible; bootstraps agree with others within Monte-Carlo error."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pgharness.stats.proportions import mcnemar, paired_table
from pgharness.stats.resampling import (
    bootstrap,
    bootstrap_difference,
    paired_permutation_test,
    permutation_test,
    signs_tail,
)
from pgharness.stats.results import Alternative
from pgharness.stats.samples import InvalidSample
from unit.stats.data_sets import paired, two_groups

Array = NDArray[np.float64]
ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "less", "greater")


def tail(values: list[float], seen: float, alternative: str) -> float:
    slack = 1e-12 * max(abs(value) for value in [*values, 1e-300])
    above = sum(value >= seen - slack for value in values) / len(values)
    below = sum(value <= seen + slack for value in values) / len(values)
    return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[alternative]


def test_small_permutation_tests_are_full_enumerations() -> None:
    for number, (one, two) in enumerate(two_groups(200, seed=21, most=6)):
        alternative = ALTERNATIVES[number % 3]
        both = np.concatenate((one, two))
        everyone = range(len(both))
        differences = [
            both[list(chosen)].mean() - np.delete(both, list(chosen)).mean()
            for chosen in itertools.combinations(everyone, len(one))
        ]
        found = permutation_test(one, two, alternative=alternative)
        assert found.p_value == pytest.approx(tail(differences, one.mean() - two.mean(), alternative), abs=1e-12)
        assert "exact" in found.method


def test_small_paired_permutation_tests_are_full_enumerations() -> None:
    for number, (one, two) in enumerate(paired(200, seed=22, most=9)):
        alternative = ALTERNATIVES[number % 3]
        differences = one - two
        means = [float(np.mean(differences * signs)) for signs in itertools.product((1, -1), repeat=len(one))]
        found = paired_permutation_test(one, two, alternative=alternative)
        assert found.p_value == pytest.approx(tail(means, differences.mean(), alternative), abs=1e-12)


def test_clusters_change_sign_together() -> None:
    rng = np.random.default_rng(23)
    for number in range(200):
        alternative = ALTERNATIVES[number % 3]
        labels = np.concatenate((np.arange(6), rng.integers(0, 6, 9)))
        one, two = rng.normal(size=15), rng.normal(size=15)
        means = [
            float(np.mean((one - two) * np.array(signs)[labels])) for signs in itertools.product((1, -1), repeat=6)
        ]
        found = paired_permutation_test(one, two, clusters=[f"case {i}" for i in labels], alternative=alternative)
        assert found.p_value == pytest.approx(tail(means, (one - two).mean(), alternative), abs=1e-12)


def test_random_permutations_are_near_the_t_test_of_large_normal_samples() -> None:
    rng = np.random.default_rng(24)
    for shift in (0.0, 0.2, 0.35):
        one, two = rng.normal(shift, 1, 200), rng.normal(0, 1, 200)
        error = 4 * math.sqrt(0.25 / 9999)
        assert permutation_test(one, two).p_value == pytest.approx(stats.ttest_ind(one, two).pvalue, abs=error)
        found = paired_permutation_test(one, two)
        assert found.p_value == pytest.approx(stats.ttest_rel(one, two).pvalue, abs=error)
        assert found.p_value == paired_permutation_test(one, two, rng=0).p_value
        assert permutation_test(one, two, statistic="median", n_resamples=499).p_value > 0


def test_a_random_p_value_is_never_zero() -> None:
    found = permutation_test(np.arange(30.0), np.arange(30.0) + 100, n_resamples=199)
    assert found.p_value == pytest.approx(2 / 200)
    assert paired_permutation_test(np.arange(30.0), np.arange(30.0) + 100, n_resamples=199).p_value == pytest.approx(
        2 * 2**-30, rel=1e-12
    )


def test_bootstrap_intervals_of_a_mean_are_near_their_expansion() -> None:
    # the percentile interval of a mean is normal with the plug-in standard error to first order
    rng = np.random.default_rng(25)
    for _ in range(10):
        values = rng.normal(3, 2, 400)
        error = values.std() / math.sqrt(400)
        for method in ("percentile", "basic", "BCa"):
            found = bootstrap(values, method=method, n_resamples=1999, rng=1)  # type: ignore[arg-type]
            assert found.value == values.mean()
            assert found.standard_error == pytest.approx(error, rel=0.08)
            assert found.interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
            assert found.interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_bca_agrees_with_efron_and_tibshirani() -> None:
    # An Introduction to the Bootstrap (1993), table 14.2: variance of the spatial test data A, 90% BCa (115.8, 259.6),
    # percentile (100.8, 233.9), each from 2000 replications
    data = [48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41]
    bca = bootstrap(data, statistic=np.var, level=0.9, n_resamples=4999, rng=2)
    assert bca.value == pytest.approx(171.5, abs=0.05)
    assert (bca.interval.low, bca.interval.high) == pytest.approx((115.8, 259.6), abs=8)
    plain = bootstrap(data, statistic=np.var, method="percentile", level=0.9, n_resamples=4999, rng=2)
    assert (plain.interval.low, plain.interval.high) == pytest.approx((100.8, 233.9), abs=8)


def test_bootstrap_of_medians_agrees_with_the_exact_bootstrap_distribution() -> None:
    # for odd n the bootstrap distribution of the median is a binomial sum (Maritz & Jarrett 1978)
    values = np.sort(np.random.default_rng(26).normal(size=21))
    upper = stats.binom.sf(10, 21, np.arange(22) / 21)  # P(median <= values[k - 1])
    exact = np.diff(upper)
    error = math.sqrt((exact * values**2).sum() - (exact * values).sum() ** 2)
    found = bootstrap(values, statistic="median", method="percentile", rng=3)
    assert found.standard_error == pytest.approx(error, rel=0.04)
    low = values[np.searchsorted(np.cumsum(exact), 0.025)]
    high = values[np.searchsorted(np.cumsum(exact), 0.975)]
    assert found.interval.low == pytest.approx(low, abs=1e-9) and found.interval.high == pytest.approx(high, abs=1e-9)


def test_drawing_clusters_gives_the_error_of_cluster_means() -> None:
    rng = np.random.default_rng(27)
    effects, labels = rng.normal(size=60), np.repeat(np.arange(60), 4)
    values = effects[labels] + rng.normal(0, 0.1, 240)
    means = values.reshape(60, 4).mean(axis=1)
    found = bootstrap(values, clusters=labels, n_resamples=2999)
    assert found.n == 60
    assert found.standard_error == pytest.approx(means.std() / math.sqrt(60), rel=0.06)
    assert found.standard_error > 1.8 * bootstrap(values, n_resamples=999).standard_error
    median = bootstrap(values, statistic="median", clusters=labels, n_resamples=299)
    assert median.value == np.median(values)


def test_differences_of_pairs_and_groups() -> None:
    rng = np.random.default_rng(28)
    one = rng.normal(size=100)
    two = one + rng.normal(0.1, 0.1, 100)
    pair = bootstrap_difference(one, two, paired=True, n_resamples=1999)
    assert pair.standard_error == pytest.approx((one - two).std() / 10, rel=0.08)
    group = bootstrap_difference(one, two, n_resamples=1999)
    assert group.standard_error == pytest.approx(math.sqrt(one.var() / 100 + two.var() / 100), rel=0.08)
    assert pair.value == pytest.approx(group.value)
    median = bootstrap_difference(one, two, paired=True, statistic="median", n_resamples=199)
    assert median.value == np.median(one) - np.median(two)
    clustered = bootstrap_difference(one, two, paired=True, clusters=np.arange(100) // 2, n_resamples=499)
    assert clustered.n == 50
    assert (
        bootstrap_difference(one, two, paired=True, statistic=np.max, clusters=np.arange(100) // 2, n_resamples=99).n
        == 50
    )


def test_seeds_repeat_and_generators_move_on() -> None:
    values = np.arange(25.0) ** 2
    assert bootstrap(values, n_resamples=199, rng=5) == bootstrap(values, n_resamples=199, rng=5)
    rng = np.random.default_rng(5)
    assert bootstrap(values, n_resamples=199, rng=rng) != bootstrap(values, n_resamples=199, rng=rng)


def test_data_that_do_not_vary() -> None:
    assert permutation_test([1, 1], [1, 1]).p_value == 1.0
    assert permutation_test([1] * 5, [2] * 5).p_value == pytest.approx(2 / 252)
    assert paired_permutation_test([1, 2], [1, 2]).p_value == 1.0
    assert paired_permutation_test([1] * 8, [2] * 8).p_value == pytest.approx(2 / 256)
    found = bootstrap([1.0, 1.0, 1.0])
    assert found.interval.width == 0 and "do not vary" in found.warnings[0]
    few = bootstrap([1.0, 2.0, 5.0], n_resamples=99)
    assert "few for a bootstrap" in few.warnings[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([1.0]), "1 value, at least 2 needed"),
        (lambda: bootstrap([1.0, 2.0], method="bca"), "method is 'bca'"),  # type: ignore[arg-type]
        (lambda: bootstrap([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap([1.0, 2.0], statistic="mode"), "statistic is 'mode'"),  # type: ignore[arg-type]
        (lambda: bootstrap([1.0, 2.0], clusters=[1]), "1 labels for 2 values"),
        (lambda: bootstrap([1.0, 2.0], clusters=[1, 1]), "all values are in one cluster"),
        (lambda: bootstrap([1.0, 2.0], n_resamples=10), "n_resamples is 10"),
        (lambda: bootstrap_difference([1.0, 2.0], [1.0, 3.0], clusters=[1, 2]), "pass paired=True"),
        (lambda: permutation_test([], [1.0]), "first: empty"),
        (lambda: permutation_test([1.0, 2.0], [1.0, 2.0], statistic="max"), "statistic is 'max'"),  # type: ignore[arg-type]
        (lambda: paired_permutation_test([1.0], [1.0, 2.0]), "first has 1 values and second has 2"),
        (lambda: paired_permutation_test([1.0, None], [1.0, 2.0], clusters=[1, 2]), "has no value"),
    ],
)
def test_bad_input_is_refused(call: object, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()  # type: ignore[operator]


def flips(differences: Array) -> Array:
    """Every choice of pairs whose signs are flipped, as 0 and 1, shape (2^n, n)."""
    return np.array(list(itertools.product((0.0, 1.0), repeat=len(differences))))


def shifts_kept(differences: Array, shifts: Array, alternative: str, *, mid_p: bool) -> list[bool]:
    """Which shifts the test of the shifted differences, enumerated, does not reject at .05."""
    kept, chosen = [], flips(differences)
    for shift in shifts:
        sums = chosen @ (differences - shift)  # what is flipped sums to 0 or below: as extreme as seen
        slack = 1e-12 * np.abs(differences - shift).sum()
        tied = (np.abs(sums) <= slack).mean() * (0.5 if mid_p else 1.0)
        above, below = (sums < -slack).mean() + tied, (sums > slack).mean() + tied
        p = {"greater": above, "less": below, "two-sided": 2 * min(above, below)}[alternative]
        kept.append(bool(p >= 0.05))
    return kept


def test_the_interval_of_random_signs_holds_what_the_test_does_not_reject() -> None:
    for number, (one, two) in enumerate(paired(200, seed=29, least=6, most=10)):
        alternative, mid_p = ALTERNATIVES[number % 3], number % 2 == 0
        differences = np.array([round(value, 12) for value in one - two]) if np.ptp(one) < 1e3 else one - two
        found = paired_permutation_test(differences, np.zeros(len(one)), alternative=alternative, mid_p=mid_p)
        assert found.interval is not None and found.estimate == pytest.approx(differences.mean(), rel=1e-12, abs=1e-12)
        chosen = flips(differences)[1:]
        means = np.unique(chosen @ differences / chosen.sum(axis=1))
        shifts = (means[1:] + means[:-1])[np.diff(means) > 1e-9 * np.ptp(means)] / 2
        kept = shifts_kept(differences, shifts, alternative, mid_p=mid_p)
        inside = [shift in found.interval for shift in shifts]
        # mid-p ends lie between two neighbouring means, so the shift between these may be on either side
        assert sum(a != b for a, b in zip(kept, inside, strict=True)) <= (2 if mid_p else 0)
        assert (0.0 in found.interval) == (found.p_value >= 0.05) or mid_p


def test_test_and_interval_of_many_pairs_tell_the_same() -> None:
    rng = np.random.default_rng(30)
    for number in range(200):
        size = int(rng.integers(14, 60))
        differences = rng.integers(-2, 4, size) / 3 if number % 2 else rng.standard_t(2, size) + rng.choice([0.0, 0.5])
        moving = np.where(differences == 0, 1 / 3, differences)
        for mid_p in (True, False):
            found = paired_permutation_test(moving, np.zeros(size), mid_p=mid_p)
            assert found.interval is not None and (0.0 in found.interval) == (found.p_value >= 0.05)


def test_mid_p_of_signs_is_mcnemars() -> None:
    rng = np.random.default_rng(31)
    for _ in range(200):
        one, two = (rng.integers(0, 2, 13).astype(float) for _ in range(2))
        expected = mcnemar(paired_table(one, two), method="mid-p").p_value
        assert paired_permutation_test(one, two, mid_p=True).p_value == pytest.approx(expected, abs=1e-12)


def test_far_tails_of_signs_are_near_their_enumeration() -> None:
    rng = np.random.default_rng(32)
    errors = []
    while len(errors) < 200:
        units = rng.normal(0.8, 1, 18) if len(errors) % 2 else rng.exponential(1, 18) - 0.2
        sums = np.zeros(1)
        for unit in units:
            sums = np.concatenate((sums, sums + unit))
        exact = float((sums <= 1e-12).mean())
        if 1e-4 < exact < 0.005:  # below, signs are seen one by one
            errors.append(signs_tail(units) / exact - 1)
    assert abs(float(np.median(errors))) < 0.03 and np.quantile(np.abs(errors), 0.9) < 0.15
    assert signs_tail(np.ones(40)) == 2.0**-40 and signs_tail(-np.ones(40)) == 1.0
    one = rng.normal(2.0, 1, 60)
    found = paired_permutation_test(one, np.zeros(60))
    assert found.p_value < 1e-9, "a p-value does not end where random signs do"
