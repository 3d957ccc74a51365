"""Bayesian comparisons against baycomp, the t test that they equal without a ROPE, and direct draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate, special, stats

from pgharness.stats.bayes import bayesian_pass_rates, bayesian_signed_rank, bayesian_t
from pgharness.stats.samples import InvalidSample

STEP = np.arange(1, 31)
ONE = np.sin(STEP * 1.3)
TWO = np.sin(STEP * 1.3) + 0.25 * np.sin(STEP * 2.1) - 0.08


def test_bayesian_t_agrees_with_baycomp() -> None:
    # baycomp 1.0.3, CorrelatedTTest.probs with runs=1: a correlation of 1/n. Its "left" is our first.
    found = bayesian_t(ONE, TWO, correlation=1 / 30)
    assert_allclose([found.p_first, found.p_second], [0.9490744612026787, 0.05092553879732131], rtol=1e-10)
    found = bayesian_t(ONE, TWO, correlation=1 / 30, rope=0.05)
    wanted = [0.731188672122068, 0.2637964336512473, 0.005014894226684774]
    assert_allclose([found.p_first, found.p_equivalent, found.p_second], wanted, rtol=1e-10)


def test_bayesian_t_without_rope_is_the_one_sided_t_test() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        one, two = rng.normal(size=(2, int(rng.integers(2, 50)))) * 10.0 ** rng.integers(-5, 6)
        found = bayesian_t(one, two)
        test = stats.ttest_rel(one, two, alternative="greater")
        assert_allclose([found.p_second, found.p_first + found.p_second], [test.pvalue, 1], rtol=1e-8)
        interval = stats.ttest_rel(one, two).confidence_interval()
        assert_allclose([found.interval.low, found.interval.high], [interval.low, interval.high], rtol=1e-8)


def test_bayesian_signed_rank_agrees_with_baycomp() -> None:
    # baycomp 1.0.3, SignedRankTest.probs with 200,000 draws.
    found = bayesian_signed_rank(ONE, TWO, rng=1)
    assert abs(found.p_first - 0.94912) < 4 * math.hypot(found.monte_carlo_error, 0.0005)
    found = bayesian_signed_rank(ONE, TWO, rope=0.05, rng=1)
    assert_allclose([found.p_first, found.p_equivalent, found.p_second], [0.99139, 0.00724, 0.00137], atol=0.003)
    assert bayesian_signed_rank(ONE, TWO, rng=5, draws=100) == bayesian_signed_rank(ONE, TWO, rng=5, draws=100)


def test_bayesian_signed_rank_agrees_with_loops_over_its_own_draws() -> None:
    rng = np.random.default_rng(2)
    for trial in range(200):
        size, rope = int(rng.integers(2, 8)), float(rng.choice([0.0, 1.0, 0.5]))
        one, two = (rng.integers(0, 4, size).astype(float) if trial % 2 else rng.normal(size=size) for _ in range(2))
        found = bayesian_signed_rank(one, two, rope=rope, draws=20, rng=trial)
        z = [0.0, *(one - two)]
        wins = [0, 0, 0]
        for weights in np.random.default_rng(trial).dirichlet([0.5] + [1.0] * size, 20):
            mass = [0.0, 0.0, 0.0]
            for i, a in enumerate(z):
                for j, b in enumerate(z):
                    for place, side in ((0, a + b), (2, -a - b)):
                        part = weights[i] * weights[j] * (1.0 if side > 2 * rope else 0.5 if side == 2 * rope else 0.0)
                        mass[place] += part
            mass[1] = 1 - mass[0] - mass[2] if rope else -1.0
            wins[int(np.argmax(np.round(mass, 12)))] += 1
        assert [found.p_first, found.p_equivalent, found.p_second] == [count / 20 for count in wins]


def outcomes(first_only: int, second_only: int, both: int, neither: int) -> tuple[list[int], list[int]]:
    one = [1] * first_only + [0] * second_only + [1] * both + [0] * neither
    return one, [0] * first_only + [1] * second_only + [1] * both + [0] * neither


def test_pass_rates_agree_with_draws_from_the_posterior() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        counts = [int(count) for count in rng.integers(0, 30, 4)]
        if sum(counts) == 0:
            continue
        rope = float(rng.choice([0.0, 0.02, 0.1]))
        found = bayesian_pass_rates(*outcomes(*counts), rope=rope)
        drawn = rng.dirichlet(np.array(counts) + 0.5, 100_000)
        gap = drawn[:, 0] - drawn[:, 1]
        wanted = [np.mean(gap > rope), np.mean(np.abs(gap) <= rope) if rope else 0, np.mean(gap < -rope)]
        assert_allclose(
            [found.p_first, found.p_equivalent, found.p_second], wanted, atol=0.0065
        )  # four errors of 0.0016
        assert_allclose(
            [found.mean, found.interval.low, found.interval.high],
            [gap.mean(), *np.quantile(gap, [0.025, 0.975])],
            atol=0.01,
        )


def test_pass_rates_agree_with_a_plain_integral() -> None:
    rng = np.random.default_rng(7)
    for trial in range(200):
        a, b, c, d = (int(count) for count in rng.integers(0, 40, 4))
        if a + b + c + d == 0:
            continue
        rope = float(rng.uniform(0.001, 0.3))
        found = bayesian_pass_rates(*outcomes(a, b, c, d), rope=rope, prior=1.0)
        log_constant = math.lgamma(a + b + c + d + 4) - math.lgamma(a + b + 2) - math.lgamma(c + d + 2)

        def exceeds(
            rate: float, up: int = a, down: int = b, rest: int = c + d, log: float = log_constant, edge: float = rope
        ) -> float:
            density = math.exp(log + (up + down + 1) * math.log(rate) + (rest + 1) * math.log1p(-rate))
            return density * float(special.betaincc(up + 1, down + 1, (1 + edge / rate) / 2))

        wanted = integrate.quad(exceeds, rope, 1, epsabs=1e-12, epsrel=1e-10, limit=300)[0]
        assert_allclose(found.p_first, wanted, atol=1e-8)
        if trial % 4:
            continue
        mirrored = bayesian_pass_rates(*outcomes(b, a, c, d), rope=rope, prior=1.0)
        assert_allclose([found.p_second, found.mean], [mirrored.p_first, -mirrored.mean], atol=1e-8)


def test_pass_rates_without_rope_are_a_binomial_tail() -> None:
    """With a prior of 1, P(share > 1/2) is a sum of binomial chances: Casella & Berger (1987) for the sign test."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        a, b, c, d = (int(count) for count in rng.integers(0, 60, 4))
        if a + b + c + d == 0:
            continue
        found = bayesian_pass_rates(*outcomes(a, b, c, d), prior=1.0, level=0.5)
        assert_allclose(found.p_first, stats.binom.cdf(a, a + b + 1, 0.5), rtol=1e-9)
        assert_allclose(found.p_first + found.p_second, 1, rtol=1e-12)


def test_decisions() -> None:
    assert bayesian_t(ONE, TWO).decision(0.9) == "first"
    assert bayesian_t(TWO, ONE).decision(0.9) == "second"
    assert bayesian_t(ONE, TWO).decision(0.99) == "undecided"
    one = np.random.default_rng(5).normal(size=400)
    same = one + np.random.default_rng(6).normal(0, 0.01, 400)
    assert bayesian_t(one, same, rope=0.1).decision() == "equivalent"
    assert bayesian_signed_rank(one, same, rope=0.1, draws=200).decision() == "equivalent"
    assert bayesian_pass_rates(*outcomes(5, 5, 900, 90), rope=0.05).decision() == "equivalent"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bayesian_t([1, 2], [0, 1]), "same amount"),
        (lambda: bayesian_t([1], [0]), "at least 2"),
        (lambda: bayesian_t([1, 2], [0, 3], rope=-1), "rope is -1"),
        (lambda: bayesian_t([1, 2], [0, 3], correlation=1.0), "correlation is 1.0"),
        (lambda: bayesian_t([1, math.nan], [0, 3]), "no value"),
        (lambda: bayesian_t([1, 2], [0, 3], level=95), "level is 95"),
        (lambda: bayesian_signed_rank([], []), "empty"),
        (lambda: bayesian_signed_rank(np.zeros(5000), np.ones(5000)), "at most 4000"),
        (lambda: bayesian_signed_rank([1, 2], [0, 3], draws=0), "draws"),
        (lambda: bayesian_pass_rates([0.5, 1], [0, 1]), "first must be 0"),
        (lambda: bayesian_pass_rates([1, 1], [0, 1], prior=0), "prior is 0"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        call()
