"""Delays: what a hedge learns from latencies, those that it cut short included, and how long it then waits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from scipy.stats import CensoredData, ecdf

from pgharness.gateway.delays import (
    AdaptiveOptions,
    Delay,
    DelayOptions,
    Exponential,
    ExponentialOptions,
    Fixed,
    FixedOptions,
    Observation,
    PercentileOptions,
    Size,
    Window,
    WorkloadOptions,
    delay_of,
)
from pgharness.gateway.learned_delays import (
    FEWEST,
    Adaptive,
    Array,
    Percentile,
    Survival,
    Workload,
    hedged_means,
    latencies,
    objective,
    sizes_in,
)

ANY = Size()
Draw = Callable[[np.random.Generator, int], Array]


def heavy_tailed(rng: np.random.Generator, count: int) -> Array:
    """Draw latencies of a median of 1 s, one in fifty of them twenty times as long."""
    usual = np.exp(0.3 * rng.standard_normal(count))
    slow: Array = np.where(rng.random(count) < 0.02, 20 * usual, usual)
    return slow


def short_tailed(rng: np.random.Generator, count: int) -> Array:
    latencies: Array = rng.uniform(0.5, 1.5, count)
    return latencies


def filled(
    latencies: Array, *, is_cut: NDArray[np.bool_] | None = None, sizes: list[Size] | None = None, size: int = 1_000
) -> Window:
    window = Window(size)
    for place, seconds in enumerate(latencies):
        cut = is_cut is not None and bool(is_cut[place])
        window.add(Observation(float(seconds), cut, sizes[place] if sizes else ANY))
    return window


def played(
    delay: Delay, window: Window, firsts: Array, seconds: Array, *, keeps_cut: bool = True
) -> tuple[Array, Array]:
    """Play calls one after the other as a hedge would; return their latencies, and the delays."""
    latencies, delays = np.empty(len(firsts)), np.empty(len(firsts))
    for place, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        wait = delay.seconds(ANY)
        delays[place] = math.inf if wait is None else wait
        latencies[place] = min(first, delays[place] + second)
        is_cut = latencies[place] < first
        if keeps_cut or not is_cut:
            window.add(Observation(latencies[place], is_cut))
    return latencies, delays


# -- the window


def test_a_window_keeps_the_latest() -> None:
    window = filled(np.arange(7.0), size=5)
    assert len(window) == 5
    assert window.count == 7
    assert sorted(latencies(window)[0]) == [2, 3, 4, 5, 6]


def test_a_window_keeps_what_is_known_of_each() -> None:
    window = Window(3)
    window.add(Observation(1.5, True, Size(100, 20)))
    window.add(Observation(0.5))
    seconds, is_cut = latencies(window)
    assert seconds.tolist() == [1.5, 0.5]
    assert is_cut.tolist() == [True, False]
    assert sizes_in(window).tolist() == [[100, 20], [0, 0]]


# -- distributions

observed = st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=60)


@given(observed)
def test_the_estimate_is_the_product_limit(observations: list[tuple[int, bool]]) -> None:
    seconds = np.array([seconds / 10 for seconds, _ in observations])
    is_cut = np.array([is_cut for _, is_cut in observations])
    survival = Survival.of(seconds, is_cut)
    expected = ecdf(CensoredData.right_censored(seconds, is_cut)).sf
    known = expected.quantiles <= seconds.max()
    np.testing.assert_allclose(survival.at(expected.quantiles[known]), expected.probabilities[known], atol=1e-9)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.floats(50, 99.9))
def test_without_cuts_a_percentile_is_the_usual_one(latencies: list[float], percent: float) -> None:
    seconds = np.array(latencies)
    found = Survival.of(seconds, np.zeros(len(seconds), dtype=np.bool_)).percentile(percent)
    # the nearest rank, give or take rounding at a boundary
    ranks = [math.ceil(len(seconds) * percent / 100 + shift) - 1 for shift in (-1e-9, 1e-9)]
    assert found in {float(np.sort(seconds)[min(rank, len(seconds) - 1)]) for rank in ranks}


def test_a_cut_request_counts_as_longer_than_it_was_waited_for() -> None:
    seconds = np.array([1.0, 2.0, 3.0, 4.0])
    nothing, second = np.zeros(4, dtype=np.bool_), np.array([False, True, False, False])
    assert Survival.of(seconds, nothing).at(3.0) == pytest.approx(1 / 4)
    assert Survival.of(seconds, second).at(3.0) == pytest.approx(3 / 4 * 1 / 2)


def test_what_no_observation_reaches_lasts_longer_than_all_of_them() -> None:
    survival = Survival.of(np.array([1.0, 2.0, 5.0]), np.array([False, False, True]))
    assert survival.at(5.0) == pytest.approx(1 / 3)
    assert survival.percentile(99) == 15.0
    assert survival.at(15.0) == 0.0


@given(observed, observed, st.floats(0, 4))
def test_the_mean_of_hedged_requests_is_that_of_all_pairs(
    first: list[tuple[int, bool]], second: list[tuple[int, bool]], delay: float
) -> None:
    firsts, seconds = (Survival.of(*(np.array(part) for part in zip(*pairs, strict=True))) for pairs in (first, second))
    masses = [-np.diff(survival.shares, prepend=1.0) for survival in (firsts, seconds)]
    expected = math.fsum(
        mass * other * min(time, delay + late)
        for (time, mass), (late, other) in itertools.product(
            zip(firsts.times, masses[0], strict=True), zip(seconds.times, masses[1], strict=True)
        )
    )
    assert hedged_means(firsts, seconds, np.array([delay]))[0] == pytest.approx(expected)


def test_a_long_distribution_is_thinned_in_its_body() -> None:
    latencies = np.arange(1.0, 1_001.0)
    survival = Survival.of(latencies, np.zeros(1_000, dtype=np.bool_))
    thinned = survival.thinned(100)
    assert len(thinned.times) == 100
    assert thinned.times[-50:].tolist() == survival.times[-50:].tolist()
    assert thinned.at(500.0) == pytest.approx(survival.at(500.0), abs=0.02)
    assert thinned.thinned(100) is thinned


# -- fixed and exponential


def test_fixed_is_always_the_same() -> None:
    delay = Fixed(FixedOptions(strategy="fixed", seconds=0.25))
    delay.learn("failed")
    assert delay.seconds(ANY) == 0.25


@pytest.mark.parametrize(("end", "factor"), [("unneeded", 0.9), ("won", 0.9), ("lost", 1.5), ("failed", 2.0)])
def test_exponential_follows_how_requests_end(end: str, factor: float) -> None:
    delay = Exponential(ExponentialOptions(strategy="exponential"))
    assert delay.seconds(ANY) == 0.1
    delay.learn(end)  # type: ignore[arg-type]
    assert delay.seconds(ANY) == pytest.approx(0.1 * factor)


def test_exponential_stays_within_its_bounds() -> None:
    delay = Exponential(ExponentialOptions(strategy="exponential"))
    for _ in range(100):
        delay.learn("won")
    assert delay.seconds(ANY) == 0.01
    for _ in range(100):
        delay.learn("failed")
    assert delay.seconds(ANY) == 5.0


def test_exponential_has_bounds_of_ones_own() -> None:
    options = ExponentialOptions(strategy="exponential", initial_seconds=9, min_seconds=1, max_seconds=8)
    delay = Exponential(options)
    assert delay.seconds(ANY) == 8
    for _ in range(100):
        delay.learn("unneeded")
    assert delay.seconds(ANY) == 1


# -- percentile


def test_a_percentile_is_not_known_before_there_are_twenty() -> None:
    window = Window()
    delay = Percentile(PercentileOptions(strategy="percentile"), window)
    impatient = Percentile(PercentileOptions(strategy="percentile", initial_seconds=0.3), window)
    for second in range(1, FEWEST):
        window.add(Observation(float(second)))
    assert delay.seconds(ANY) is None
    assert impatient.seconds(ANY) == 0.3
    window.add(Observation(20.0))
    assert delay.seconds(ANY) == impatient.seconds(ANY) == 19.0


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0])
def test_the_percentile_is_the_one_asked_for(percent: float) -> None:
    window = filled(np.arange(1.0, 1_001.0))
    assert Percentile(PercentileOptions(strategy="percentile", percentile=percent), window).seconds(ANY) == percent * 10


def test_the_window_is_looked_at_now_and_then() -> None:
    class Counted(Window):
        looks = 0

        def numbers(self) -> memoryview:
            self.looks += 1
            return super().numbers()

    window = Counted()
    delay = Percentile(PercentileOptions(strategy="percentile"), window)
    for latency in heavy_tailed(np.random.default_rng(1), 5_000):
        window.add(Observation(float(latency)))
        delay.seconds(ANY)
    assert window.looks < 200  # once for every 50 of a full window, more often while it fills


def test_a_percentile_follows_a_model_that_became_slower() -> None:
    window = Window()
    delay = Percentile(PercentileOptions(strategy="percentile"), window)
    rng = np.random.default_rng(2)
    before = played(delay, window, heavy_tailed(rng, 2_000), heavy_tailed(rng, 2_000))[1][-1]
    after = played(delay, window, 3 * heavy_tailed(rng, 2_000), 3 * heavy_tailed(rng, 2_000))[1][-1]
    assert after == pytest.approx(3 * before, rel=0.15)


def test_the_delay_does_not_drift_although_slow_requests_are_cut() -> None:
    rng = np.random.default_rng(3)
    firsts, seconds = np.exp(rng.standard_normal((2, 10_000)))
    truth = float(np.percentile(firsts, 80))
    options = PercentileOptions(strategy="percentile", percentile=80.0)
    honest, naive = Window(), Window()
    kept = played(Percentile(options, honest), honest, firsts, seconds)[1]
    dropped = played(Percentile(options, naive), naive, firsts, seconds, keeps_cut=False)[1]
    assert np.median(kept[5_000:]) == pytest.approx(truth, rel=0.05)
    assert np.median(dropped[5_000:]) < 0.8 * truth


def test_a_percentile_cuts_the_tail_by_more_than_half_at_its_share_of_extra_requests() -> None:
    rng = np.random.default_rng(4)
    firsts, seconds = heavy_tailed(rng, 10_000), heavy_tailed(rng, 10_000)
    window = Window()
    latencies, delays = played(Percentile(PercentileOptions(strategy="percentile"), window), window, firsts, seconds)
    assert np.percentile(latencies, 99) < 0.4 * np.percentile(firsts, 99)
    assert np.mean(firsts > delays) < 0.06


# -- adaptive


def weighed(draw: Draw, price: float, delays: Array) -> Array:
    """Return what delays come to on half a million draws."""
    rng = np.random.default_rng(99)
    firsts, seconds = draw(rng, 500_000), draw(rng, 500_000)
    return np.array([np.minimum(firsts, delay + seconds).mean() + price * (firsts > delay).mean() for delay in delays])


def adaptive(window: Window, *, max_extra: float = 4.0, seed: int = 0, **options: object) -> Adaptive:
    shape = AdaptiveOptions.model_validate({"strategy": "adaptive", **options})
    return Adaptive(shape, window, window, max_extra=max_extra, seed=seed)


@pytest.mark.parametrize("price", [1.0, 5.0])
@pytest.mark.parametrize("draw", [heavy_tailed, short_tailed])
def test_adaptive_is_near_the_best_fixed_delay_after_500_calls(draw: Draw, price: float) -> None:
    rng = np.random.default_rng(5)
    window = Window()
    delay = adaptive(window, extra_request_seconds=price)
    _, delays = played(delay, window, draw(rng, 1_000), draw(rng, 1_000))
    best = weighed(draw, price, np.append(np.geomspace(0.3, 60, 100), math.inf)).min()
    chosen, counts = np.unique(delays[500:], return_counts=True)
    assert np.average(weighed(draw, price, chosen), weights=counts) < 1.05 * best


def test_adaptive_keeps_to_the_share_of_extra_requests() -> None:
    rng = np.random.default_rng(6)
    firsts, seconds = heavy_tailed(rng, 3_000), heavy_tailed(rng, 3_000)
    eager, capped = Window(), Window()
    _, often = played(adaptive(eager, extra_request_seconds=0.0), eager, firsts, seconds)
    _, seldom = played(adaptive(capped, extra_request_seconds=0.0, max_extra=0.1), capped, firsts, seconds)
    assert np.mean(firsts[500:] > often[500:]) > 0.3
    assert np.mean(firsts[500:] > seldom[500:]) == pytest.approx(0.1, abs=0.02)


def test_an_extra_request_is_worth_the_median_latency_by_default() -> None:
    survival = Survival.of(heavy_tailed(np.random.default_rng(7), 1_000), np.zeros(1_000, dtype=np.bool_))
    delays = np.array([0.5, 1.0, 2.0, math.inf])
    by_default = objective(None, survival, survival, delays)
    assert by_default.tolist() == objective(survival.percentile(50), survival, survival, delays).tolist()
    assert by_default[-1] == pytest.approx(float(-np.diff(survival.shares, prepend=1.0) @ survival.times))


def test_adaptive_chooses_among_the_candidates_or_never() -> None:
    window = filled(heavy_tailed(np.random.default_rng(8), 1_000))
    assert adaptive(window, candidates=[0.1, 2.5, 15.0]).seconds(ANY) == 2.5
    assert adaptive(window, candidates=[0.1, 2.5, 15.0], extra_request_seconds=1e6).seconds(ANY) == math.inf
    assert adaptive(window, candidates=[0.1, 0.2], max_extra=0.1).seconds(ANY) == math.inf


def test_adaptive_does_not_forget_the_tail_because_it_cuts_it() -> None:
    rng = np.random.default_rng(9)
    window = Window()
    _, delays = played(adaptive(window), window, heavy_tailed(rng, 8_000), heavy_tailed(rng, 8_000))
    assert delays[2_000:].max() < 10  # a slow call takes about 20 s, and hardly any is ever seen to its end


def test_adaptive_tries_others_while_little_is_known_and_settles() -> None:
    rng = np.random.default_rng(10)
    latencies = heavy_tailed(rng, 100_000)
    truth = Survival.of(latencies, np.zeros(len(latencies), dtype=np.bool_)).thinned(5_000)
    worst = []
    for count in (30, 1_000):
        window = filled(latencies[:count])
        tried = {adaptive(window, seed=seed).seconds(ANY) for seed in range(50)}
        assert len(tried) > 1
        worst.append(objective(1.0, truth, truth, np.array(sorted(filter(None, tried)))).max())
    assert worst[0] > 1.05 * worst[1]


def test_adaptive_takes_the_latency_of_the_other_model_into_account() -> None:
    window = filled(heavy_tailed(np.random.default_rng(11), 1_000))
    options = AdaptiveOptions(strategy="adaptive", extra_request_seconds=2.0)
    found = [
        Adaptive(options, window, filled(np.full(100, late)), max_extra=4.0, seed=0).seconds(ANY)
        for late in (0.1, 100.0)
    ]
    assert found[0] is not None and found[0] < 5
    assert found[1] is not None and found[1] > 15  # nothing to gain from a model that is slower than the slow calls


def test_adaptive_is_the_same_for_the_same_seed() -> None:
    window = filled(heavy_tailed(np.random.default_rng(12), 60))
    assert adaptive(window, seed=1).seconds(ANY) == adaptive(window, seed=1).seconds(ANY)


# -- workload


def of_sizes(rng: np.random.Generator, count: int) -> tuple[list[Size], Array]:
    """Draw sizes, and latencies that follow them by the square root of the prompt and the answer itself."""
    sizes = [Size(float(prompt), float(answer)) for prompt, answer in rng.integers(50, 5_000, (count, 2))]
    usual = np.array([0.001 * math.sqrt(1 + size.prompt) * (1 + size.answer) for size in sizes])
    return sizes, usual * np.exp(0.3 * rng.standard_normal(count))


def workload(window: Window, percentile: float = 95.0) -> Workload:
    return Workload(WorkloadOptions(strategy="workload", percentile=percentile), window)


def test_workload_waits_as_long_as_requests_of_that_size_take() -> None:
    rng = np.random.default_rng(13)
    sizes, latencies = of_sizes(rng, 1_000)
    delay = workload(filled(latencies, sizes=sizes))
    for size in (Size(100, 100), Size(100, 4_000), Size(4_000, 100), Size(4_000, 4_000)):
        usual = 0.001 * math.sqrt(1 + size.prompt) * (1 + size.answer)
        assert delay.seconds(size) == pytest.approx(usual * math.exp(0.3 * 1.645), rel=0.15)


def test_workload_counts_what_was_cut() -> None:
    rng = np.random.default_rng(14)
    sizes, latencies = of_sizes(rng, 1_000)
    usual = np.array([0.001 * math.sqrt(1 + size.prompt) * (1 + size.answer) for size in sizes])
    limit = 1.2 * usual  # most of what takes longer was given up then
    is_cut = (latencies > limit) & (rng.random(1_000) < 0.8)
    delay = workload(filled(np.where(is_cut, limit, latencies), is_cut=is_cut, sizes=sizes))
    expected = 0.001 * math.sqrt(1_001) * 1_001 * math.exp(0.3 * 1.645)
    assert delay.seconds(Size(1_000, 1_000)) == pytest.approx(expected, rel=0.2)


def test_workload_is_a_percentile_where_all_requests_are_alike() -> None:
    latencies = heavy_tailed(np.random.default_rng(15), 1_000)
    alike = filled(latencies, sizes=[Size(500, 300)] * 1_000)
    assert workload(alike).seconds(Size(500, 300)) == pytest.approx(
        Percentile(PercentileOptions(strategy="percentile"), filled(latencies)).seconds(ANY)
    )
    assert workload(alike).seconds(Size(5_000, 3_000)) == pytest.approx(workload(alike).seconds(Size(500, 300)))


def test_workload_takes_a_request_of_unknown_size_for_a_usual_one() -> None:
    sizes, latencies = of_sizes(np.random.default_rng(16), 1_000)
    delay = workload(filled(latencies, sizes=sizes))
    logs = np.log1p(np.array(sizes)).mean(axis=0)
    usual = Size(*np.expm1(logs).tolist())
    assert delay.seconds(Size()) == pytest.approx(delay.seconds(usual))
    assert delay.seconds(Size(0, usual.answer)) == pytest.approx(delay.seconds(usual))


def test_workload_learns_from_requests_of_known_size_alone() -> None:
    sizes, latencies = of_sizes(np.random.default_rng(17), 1_000)
    holes = [Size() if place % 3 == 0 else size for place, size in enumerate(sizes)]
    whole, holed = workload(filled(latencies, sizes=sizes)), workload(filled(latencies, sizes=holes))
    ratios = [delay.seconds(Size(4_000, 4_000)) / delay.seconds(Size(400, 400)) for delay in (whole, holed)]  # type: ignore[operator]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.2)


def test_workload_beats_a_percentile_on_a_mixed_workload() -> None:
    rng = np.random.default_rng(18)
    count = 6_000
    is_long = rng.random(count) < 0.2
    usual = np.where(is_long, 12.0, 1.5)
    firsts, seconds = (usual * heavy_tailed(rng, count) for _ in range(2))
    windows = Window(), Window()
    delays: list[Delay] = [workload(windows[0]), Percentile(PercentileOptions(strategy="percentile"), windows[1])]
    latencies: list[list[float]] = [[], []]
    extra = [0, 0]
    for place in range(count):
        size = Size(1_500, 800) if is_long[place] else Size(3_000, 60)
        for way, delay in enumerate(delays):
            wait = delay.seconds(size)
            wait = math.inf if wait is None else wait
            taken = min(firsts[place], wait + seconds[place])
            latencies[way].append(taken)
            extra[way] += firsts[place] > wait
            windows[way].add(Observation(taken, taken < firsts[place], size))
    ours, theirs = (np.array(found) for found in latencies)
    assert extra[0] < extra[1] * 1.1
    assert ours.mean() < 0.98 * theirs.mean()
    assert np.percentile(ours / usual, 99) < 0.5 * np.percentile(theirs / usual, 99)


# -- options


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"strategy": "fixed", "seconds": 1}, Fixed),
        ({"strategy": "percentile"}, Percentile),
        ({"strategy": "adaptive"}, Adaptive),
        ({"strategy": "workload"}, Workload),
        ({"strategy": "exponential"}, Exponential),
    ],
)
def test_options_name_their_policy(options: dict[str, object], kind: type[Delay]) -> None:
    read = TypeAdapter[DelayOptions](DelayOptions).validate_python(options)
    assert type(delay_of(read, Window(), Window(), max_extra=0.1, seed=0)) is kind


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"strategy": "soon"}, "soon"),
        ({"percentile": 95}, "strategy"),
        ({"strategy": "fixed"}, "seconds"),
        ({"strategy": "fixed", "seconds": -1}, "seconds"),
        ({"strategy": "percentile", "percentile": 30}, "percentile"),
        ({"strategy": "percentile", "percentile": 100}, "percentile"),
        ({"strategy": "percentile", "percentil": 90}, "percentil"),
        ({"strategy": "adaptive", "candidates": []}, "candidates"),
        ({"strategy": "adaptive", "extra_request_seconds": -1}, "extra_request_seconds"),
        ({"strategy": "exponential", "min_seconds": 0}, "min_seconds"),
        ({"strategy": "exponential", "min_seconds": 3, "max_seconds": 2}, "min_seconds"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        TypeAdapter[DelayOptions](DelayOptions).validate_python(options)
