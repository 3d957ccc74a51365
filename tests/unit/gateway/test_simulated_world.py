"""What simulated models are told to be, they are: measured against the same laws computed another way. Nothing sleeps.

All seeds are fixed, so a test that passes passes always; bounds are four standard errors wide or more.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from pgharness.errors import (
    ModelError,
    RateLimited,
    RequestRejected,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from pgharness.gateway.simulated_world import SimulatorParameters
from pgharness.gateway.simulator import Simulator
from pgharness.types import Completion, Message, ModelSpec, Request

DOCUMENT = Path(__file__).parents[3] / "docs" / "simulator.md"


class Script:
    """A clock that only moves when somebody sleeps, or when it is told to."""

    def __init__(self, now: float = 1e9) -> None:
        self.now = now
        self.slept: list[float] = []

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def model(
    name: str = "simulated", *, script: Script | None = None, timeout_seconds: float = 1e9, **parameters: Any
) -> Simulator:
    script = script or Script()
    parameters = {"latency_seconds": 0.0} | parameters
    spec = ModelSpec(id=1, name=name, provider="simulator", parameters=parameters, timeout_seconds=timeout_seconds)
    return Simulator(spec, clock=script.time, sleep=script.sleep)


def question(case: int, *, target: Any = "42", seed: int | None = None, number: int = 0, **more: Any) -> Request:
    """Return a request for the answer to a case; each case has a seed of its own unless one is given."""
    facts = {"name": f"case {case}", "input": f"question {case}", "target": target} | more
    seed = case if seed is None else seed
    return Request(messages=(Message("user", "x" * 400),), seed=seed, number=number, item={"case": facts})


async def outcome(simulator: Simulator, request: Request) -> Completion | ModelError:
    try:
        return await simulator(request)
    except ModelError as error:
        return error


async def kind_of(simulator: Simulator, request: Request) -> str:
    return type(await outcome(simulator, request)).__name__


async def latencies(count: int = 4000, **parameters: Any) -> np.ndarray:
    script = Script()
    simulator = model(script=script, **parameters)
    for seed in range(count):
        await simulator(question(seed))
    return np.array(script.slept)


async def rights(simulator: Simulator, requests: Sequence[Request]) -> np.ndarray:
    """Return which answers are right."""
    return np.array([(await simulator(each)).text == each.item["case"]["target"] for each in requests])


def assert_rate(found: float, wanted: float, count: int) -> None:
    assert abs(found - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / count) + 1e-12, f"{found} is not {wanted}"


# -- what there was


async def test_without_the_new_parameters_every_draw_is_what_it_has_always_been() -> None:
    script = Script()
    simulator = model(
        script=script,
        timeout_seconds=120.0,
        latency_seconds=2.0,
        error_rate=0.1,
        rate_limit_rate=0.1,
        timeout_rate=0.1,
        invalid_rate=0.2,
        refusal_rate=0.1,
    )
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
    told = []
    for seed in range(40):
        for request in (
            question(seed, target=("42", "B", "yes", "Paris is large")[seed % 4]),
            question(seed, target=None, input="The knee hurts. It gave way twice. Ice helps a little."),
            Request(messages=(), schema=schema, seed=seed, attempt=1 + seed % 2),
        ):
            script.slept.clear()
            found = await outcome(simulator, request)
            told.append([type(found).__name__, found.text, found.request_id, *(f"{s:.6f}" for s in script.slept)])
    assert hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest() == "7398335afe183499"


# -- latency


async def test_a_tail_makes_its_share_of_calls_so_many_times_slower() -> None:
    found = await latencies(latency_seconds=0.5, latency_spread=0, latency_tail_rate=0.04, latency_tail_factor=20)
    assert set(found) == {0.5, 10.0}
    assert_rate(np.mean(found == 10.0), 0.04, len(found))


async def test_a_tail_is_apart_from_the_spread() -> None:
    found = await latencies(latency_seconds=0.5, latency_spread=0.4, latency_tail_rate=0.1, latency_tail_factor=8)
    body = stats.lognorm(s=0.4, scale=0.5)
    assert stats.kstest(found, lambda x: 0.9 * body.cdf(x) + 0.1 * body.cdf(x / 8)).pvalue > 0.01


async def test_a_mixture_has_the_quantiles_of_its_parts() -> None:
    parts = [(6.0, 0.4, 0.2), (3.0, 2.0, 0.5), (1.0, 30.0, 1.2)]
    mixture = [{"weight": weight, "seconds": seconds, "spread": spread} for weight, seconds, spread in parts]
    found = await latencies(latency_mixture=mixture, latency_seconds=99.0)

    def cdf(x: Any) -> Any:
        return sum(weight / 10 * stats.lognorm(s=spread, scale=seconds).cdf(x) for weight, seconds, spread in parts)

    assert stats.kstest(found, cdf).pvalue > 0.01
    for share in (0.5, 0.9, 0.99):
        assert_rate(np.mean(found <= np.quantile(found, share)), share, len(found))
        assert_rate(float(cdf(np.quantile(found, share))), share, len(found))


async def test_a_mixture_alone_decides_whether_there_is_a_pause() -> None:
    assert not len(await latencies(1, latency_mixture=[{"weight": 1, "seconds": 0}], latency_seconds=5.0))
    assert len(await latencies(1, latency_mixture=[{"weight": 1, "seconds": 1}], latency_seconds=0.0))


async def test_longer_prompts_and_longer_answers_take_longer() -> None:
    script = Script()
    rates = {"seconds_per_1k_input_tokens": 3.0, "seconds_per_1k_output_tokens": 50.0}
    simulator = model(script=script, latency_seconds=0.5, latency_spread=0, **rates)
    plain = model()
    for seed in range(20):
        completion = await simulator(question(seed, target=None, input="The knee hurts. " * (1 + seed)))
        used = completion.usage
        assert script.slept[-1] == pytest.approx(0.5 + 3 * used.input_tokens / 1000 + 50 * used.output_tokens / 1000)
        assert completion == await plain(question(seed, target=None, input="The knee hurts. " * (1 + seed)))
    assert len(set(script.slept)) > 10


async def test_tokens_alone_make_a_pause_and_the_spread_is_of_the_whole() -> None:
    found = await latencies(seconds_per_1k_input_tokens=20.0, latency_spread=0.3)
    assert stats.kstest(found, stats.lognorm(s=0.3, scale=2.0).cdf).pvalue > 0.01


async def test_an_error_that_comes_after_its_answer_was_made_takes_that_long() -> None:
    script = Script()
    simulator = model(
        script=script, refusal_rate=1.0, seconds_per_1k_output_tokens=100.0, latency_seconds=1.0, latency_spread=0
    )
    error = await outcome(simulator, question(1))
    assert isinstance(error, ModelError)
    assert script.slept == [pytest.approx(1.0 + error.output_tokens / 10)]


# -- requests made for one answer at once


async def test_a_hedge_draws_its_own_latency_and_the_same_answer() -> None:
    script = Script()
    simulator = model(script=script, latency_seconds=1.0, latency_spread=0.5, quality=0.5)
    pairs = [(await simulator(question(s)), await simulator(question(s, number=1))) for s in range(2000)]
    assert all(first.text == second.text and first.confidence == second.confidence for first, second in pairs)
    assert all(first.request_id != second.request_id for first, second in pairs)
    first, second = np.log(np.array(script.slept).reshape(-1, 2)).T
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(2000)
    assert stats.kstest(np.exp(second), stats.lognorm(s=0.5, scale=1.0).cdf).pvalue > 0.01


async def test_a_hedge_fails_by_its_own_luck() -> None:
    simulator = model(error_rate=0.3)
    failed = [
        [await kind_of(simulator, question(s, number=number)) == "ServerFailed" for number in range(3)]
        for s in range(2000)
    ]
    first, second, third = np.array(failed).T
    for one, other in ((first, second), (first, third), (second, third)):
        assert_rate(np.mean(one & other), 0.09, 2000)


# -- difficulty


async def test_harder_cases_are_answered_rightly_less_often_by_the_logistic_law() -> None:
    simulator = model(quality=0.99, ability=0.6, discrimination=5.0)
    for difficulty in (0, 0.3, 0.6, 0.9, 1.0, 1.5):
        requests = [question(case, metadata={"difficulty": difficulty}) for case in range(1500)]
        assert_rate(np.mean(await rights(simulator, requests)), expit(5.0 * (0.6 - difficulty)), 1500)


@pytest.mark.parametrize("metadata", [None, {}, {"difficulty": "hard"}, {"difficulty": True}, {"difficulty": "nan"}])
async def test_cases_without_a_difficulty_are_answered_as_quality_says(metadata: Any) -> None:
    requests = [question(case, metadata=metadata) for case in range(300)]
    plain, able = model(quality=0.7), model(quality=0.7, ability=-50.0)
    assert (await rights(plain, requests) == await rights(able, requests)).all()


async def test_difficulty_counts_only_for_a_model_with_an_ability() -> None:
    hard = [question(case, metadata={"difficulty": 1.0}) for case in range(300)]
    assert (await rights(model(), hard) == await rights(model(), [question(case) for case in range(300)])).all()


async def test_difficulty_may_have_another_name_and_be_text() -> None:
    simulator = model(ability=0.5, difficulty_key="level", discrimination=1000.0)
    for level, wanted in (("0.2", True), (0.2, True), ("0.8", False), (1, False)):
        requests = [question(case, metadata={"level": level, "difficulty": 0.5}) for case in range(20)]
        assert (await rights(simulator, requests) == wanted).all()


async def test_notes_of_hard_cases_leave_more_out() -> None:
    text = " ".join(f"On day {day} the pain was {day % 9} of ten." for day in range(40))
    simulator = model(ability=0.5, output_tokens=2000)

    async def length(difficulty: float) -> float:
        metadata = {"difficulty": difficulty}
        requests = [question(case, target=None, input=text, metadata=metadata) for case in range(40)]
        return float(np.mean([len((await simulator(each)).text) for each in requests]))

    easy, middling, hard = [await length(difficulty) for difficulty in (0.1, 0.5, 0.9)]
    assert easy > 1.5 * middling > 2 * hard


# -- errors that come together


def _both(first: float, second: float, correlation: float) -> float:
    """Return how often two answers are right together: the copula, integrated by somebody else."""
    bars = [stats.norm.ppf(first), stats.norm.ppf(second)]
    return float(stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]]).cdf(bars))


@pytest.mark.parametrize(("correlation", "other"), [(0.3, 0.3), (0.7, 0.7), (0.9, 0.4)])
async def test_models_of_a_group_err_together_as_the_copula_says_and_each_as_often_as_alone(
    correlation: float, other: float
) -> None:
    requests = [question(case) for case in range(5000)]
    first = await rights(model("one", quality=0.8, error_group="g", error_correlation=correlation), requests)
    second = await rights(model("two", quality=0.6, error_group="g", error_correlation=other), requests)
    assert_rate(np.mean(first), 0.8, 5000)
    assert_rate(np.mean(second), 0.6, 5000)
    wanted = _both(0.8, 0.6, math.sqrt(correlation * other))
    assert_rate(np.mean(first & second), wanted, 5000)
    assert wanted > 0.48 + 4 * 0.007  # which is far from what independent ones would be


async def test_models_of_other_groups_or_none_err_apart() -> None:
    requests = [question(case) for case in range(5000)]
    first = await rights(model("one", quality=0.8, error_group="g", error_correlation=0.9), requests)
    for parameters in ({}, {"error_group": "h", "error_correlation": 0.9}):
        second = await rights(model("two", quality=0.6, **parameters), requests)
        assert_rate(np.mean(first & second), 0.48, 5000)


async def test_wholly_correlated_models_of_one_accuracy_are_right_in_the_same_cases_whatever_the_seed() -> None:
    parameters: dict[str, Any] = {"quality": 0.7, "error_group": "g", "error_correlation": 1.0}
    first = await rights(model("one", **parameters), [question(case) for case in range(500)])
    second = await rights(model("two", **parameters), [question(case, seed=case + 9999) for case in range(500)])
    assert (first == second).all()
    assert_rate(np.mean(first), 0.7, 500)


async def test_the_difficulty_of_cases_and_their_errors_together_keep_each_chance() -> None:
    simulator = model(ability=0.5, error_group="g", error_correlation=0.6)
    for difficulty in (0.2, 0.5, 0.8):
        requests = [question(case, metadata={"difficulty": difficulty}) for case in range(2000)]
        assert_rate(np.mean(await rights(simulator, requests)), expit(6 * (0.5 - difficulty)), 2000)


async def test_a_certain_answer_is_certain_in_every_group() -> None:
    for quality in (0.0, 1.0):
        simulator = model(quality=quality, error_group="g", error_correlation=0.9)
        assert (await rights(simulator, [question(case) for case in range(300)]) == bool(quality)).all()


async def test_replications_of_a_case_share_its_hardness_and_no_more() -> None:
    simulator = model(quality=0.7, error_group="g", error_correlation=0.5)
    first = await rights(simulator, [question(case, seed=2 * case) for case in range(4000)])
    second = await rights(simulator, [question(case, seed=2 * case + 1) for case in range(4000)])
    assert_rate(np.mean(first & second), _both(0.7, 0.7, 0.5), 4000)


async def test_a_case_is_known_by_its_name_and_without_one_by_its_input() -> None:
    parameters: dict[str, Any] = {"quality": 0.5, "error_group": "g", "error_correlation": 1.0}
    named = await rights(model("one", **parameters), [question(case, input="other") for case in range(200)])
    assert (named == await rights(model("one", **parameters), [question(case) for case in range(200)])).all()
    unnamed = [question(case, name=None, input={"text": f"{case}"}) for case in range(200)]
    first, second = await rights(model("one", **parameters), unnamed), await rights(model("two", **parameters), unnamed)
    assert (first == second).all() and (first != named).any()


async def test_wrong_models_of_a_group_agree_on_the_answer_as_often_as_they_are_correlated() -> None:
    requests = [question(case, target="B") for case in range(3000)]
    for correlation in (0.0, 0.4, 0.8):
        parameters: dict[str, Any] = {"quality": 0.0, "error_group": "g", "error_correlation": correlation}
        one, two = model("one", **parameters), model("two", **parameters)
        same = [(await one(each)).text == (await two(each)).text for each in requests]
        assert_rate(np.mean(same), correlation + (1 - correlation) / 4, 3000)  # one of four by chance


async def test_votes_help_among_strangers_and_are_fooled_by_a_group() -> None:
    requests = [question(case) for case in range(600)]

    async def majority(**parameters: Any) -> float:
        voters = [model(f"voter {number}", quality=0.65, **parameters) for number in range(5)]
        votes = [Counter([(await voter(each)).text for voter in voters]) for each in requests]
        return float(np.mean([vote.most_common(1)[0][0] == "42" for vote in votes]))

    apart, together = await majority(), await majority(error_group="g", error_correlation=0.9)
    assert apart > 0.85
    assert together < 0.74


async def test_notes_of_a_group_are_bad_in_the_same_cases() -> None:
    text = " ".join(f"On day {day} the pain was {day % 9} of ten." for day in range(60))
    requests = [question(case, target=None, input=text) for case in range(400)]

    async def lengths(name: str, **parameters: Any) -> list[int]:
        simulator = model(name, quality=0.5, output_tokens=3000, **parameters)
        return [(await simulator(each)).text.count("On day") for each in requests]

    group: dict[str, Any] = {"error_group": "g", "error_correlation": 0.9}
    together = np.corrcoef(await lengths("one", **group), await lengths("two", **group))[0, 1]
    apart = np.corrcoef(await lengths("one"), await lengths("two"))[0, 1]
    assert together > 0.6 and abs(apart) < 0.2


# -- confidence


async def _stated(count: int = 6000, **parameters: Any) -> tuple[np.ndarray, np.ndarray]:
    simulator = model(**parameters)
    answers = [await simulator(question(case)) for case in range(count)]
    assert all(answer.confidence is not None for answer in answers)
    return np.array([answer.confidence for answer in answers]), np.array([answer.text == "42" for answer in answers])


def _miscalibration(stated: np.ndarray, is_right: np.ndarray) -> float:
    """Return the expected calibration error over ten bins of equal size."""
    order = np.array_split(np.argsort(stated), 10)
    return float(np.mean([abs(stated[bin_].mean() - is_right[bin_].mean()) for bin_ in order]))


@pytest.mark.parametrize("insight", [0.0, 0.3, 0.8, 0.99])
@pytest.mark.parametrize("group", [{}, {"error_group": "g", "error_correlation": 0.7}], ids=["alone", "group"])
async def test_stated_confidence_is_the_share_of_right_answers(insight: float, group: dict[str, Any]) -> None:
    stated, is_right = await _stated(quality=0.7, confidence_insight=insight, **group)
    assert ((stated > 0) & (stated < 1)).all()
    assert _miscalibration(stated, is_right) < 0.02
    if insight == 0:
        assert stated == pytest.approx(0.7)


async def test_a_model_with_more_insight_tells_its_right_answers_from_its_wrong_ones() -> None:
    areas = []
    for insight in (0.0, 0.4, 0.9):
        stated, is_right = await _stated(2000, quality=0.7, confidence_insight=insight)
        areas.append(
            stats.mannwhitneyu(stated[is_right], stated[~is_right]).statistic / is_right.sum() / (~is_right).sum()
        )
    assert areas[0] == pytest.approx(0.5) and areas[1] > 0.75 and areas[2] > 0.93


async def test_noise_spoils_the_calibration_and_not_the_answers() -> None:
    stated, is_right = await _stated(quality=0.7)
    noisy, as_right = await _stated(quality=0.7, calibration_noise=2.0)
    assert (is_right == as_right).all()
    assert _miscalibration(noisy, is_right) > 0.08
    shift = np.log(noisy / (1 - noisy)) - np.log(stated / (1 - stated))
    assert stats.kstest(shift, stats.norm(0, 2.0).cdf).pvalue > 0.01


async def test_confidence_follows_the_difficulty_of_a_case() -> None:
    simulator = model(ability=0.5, confidence_insight=0.0)
    for difficulty in (0.0, 0.5, 1.0):
        completion = await simulator(question(1, metadata={"difficulty": difficulty}))
        assert completion.confidence == pytest.approx(expit(6 * (0.5 - difficulty)))


async def test_nothing_is_stated_where_no_target_is_known() -> None:
    assert (await model()(question(1, target=None))).confidence is None
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert (await model()(Request(messages=(), schema=schema, seed=1))).confidence is None


@pytest.mark.parametrize("quality", [0.0, 1.0])
async def test_a_certain_model_is_sure(quality: float) -> None:
    stated, _ = await _stated(50, quality=quality, calibration_noise=1.0)
    assert (abs(stated - quality) < 1e-4).all()


# -- outages


def outage(start: float, seconds: float, kind: str, **more: Any) -> dict[str, Any]:
    return {"start_seconds": start, "seconds": seconds, "kind": kind} | more


async def test_outages_begin_and_end_by_the_clock() -> None:
    script = Script()
    schedule = [outage(10, 5, "error"), outage(20, 5, "rate_limit"), outage(30, 5, "unavailable")]
    simulator = model(script=script, outages=schedule)
    began, seen = script.now, []
    for second in (0, 9.9, 10, 14.9, 15, 20, 24.9, 25, 30, 34.9, 35, 1000):
        script.now = began + second
        seen.append(await kind_of(simulator, question(1)))
    assert seen == [
        *["Completion"] * 2,
        *["ServerFailed"] * 2,
        "Completion",
        *["RateLimited"] * 2,
        "Completion",
        *["Unavailable"] * 2,
        *["Completion"] * 2,
    ]


async def test_each_kind_of_outage_takes_its_time() -> None:
    async def timed(kind: str, **more: Any) -> tuple[Completion | ModelError, list[float]]:
        script = Script()
        simulator = model(
            script=script,
            timeout_seconds=60.0,
            latency_seconds=2.0,
            latency_spread=0,
            retry_after_seconds=7.0,
            outages=[outage(0, 1e6, kind, **more)],
        )
        return await outcome(simulator, question(1)), script.slept

    found, slept = await timed("error")
    assert isinstance(found, ServerFailed) and found.http_status == 500 and slept == [2.0]
    found, slept = await timed("unavailable")
    assert isinstance(found, Unavailable) and found.http_status == 503 and slept == []
    found, slept = await timed("rate_limit")
    assert isinstance(found, RateLimited) and found.retry_after == 7.0 and slept == []
    found, slept = await timed("hang")
    assert isinstance(found, TimedOut) and slept == [60.0]
    found, slept = await timed("slow", factor=4)
    assert isinstance(found, Completion) and slept == [8.0]
    found, slept = await timed("slow", factor=40)
    assert isinstance(found, TimedOut) and slept == [60.0]


async def test_a_model_that_hangs_takes_its_whole_timeout_even_if_it_has_no_latency() -> None:
    script = Script()
    simulator = model(script=script, timeout_seconds=30.0, outages=[outage(0, 10, "hang")])
    assert await kind_of(simulator, question(1)) == "TimedOut" and script.slept == [30.0]
    assert await kind_of(simulator, question(1)) == "Completion" and script.slept == [30.0]


async def test_of_outages_at_once_the_first_in_the_list_counts() -> None:
    simulator = model(outages=[outage(0, 10, "slow"), outage(0, 10, "error")])
    assert await kind_of(simulator, question(1)) == "Completion"
    simulator = model(outages=[outage(0, 10, "error"), outage(0, 10, "slow")])
    assert await kind_of(simulator, question(1)) == "ServerFailed"


async def test_an_outage_comes_on_top_of_the_models_own_faults() -> None:
    simulator = model(refusal_rate=1.0, latency_seconds=1.0, outages=[outage(0, 10, "slow"), outage(500, 1e6, "error")])
    assert [await kind_of(simulator, question(1)) for _ in range(2)] == ["Refused"] * 2
    simulator = model(refusal_rate=1.0, outages=[outage(0, 10, "error")])
    assert await kind_of(simulator, question(1)) == "ServerFailed"


async def test_an_epoch_puts_outages_at_a_time_of_day() -> None:
    script = Script(datetime(2030, 5, 1, 12, 0, 0, tzinfo=UTC).timestamp())
    schedule: dict[str, Any] = {"outages": [outage(60, 30, "error")], "outage_epoch": "2030-05-01T14:00:00+02:00"}
    simulator = model(script=script, **schedule)
    assert await kind_of(simulator, question(1)) == "Completion"
    script.now += 60
    assert await kind_of(simulator, question(1)) == "ServerFailed"
    assert await kind_of(model(script=script, **schedule), question(1)) == "ServerFailed"
    script.now += 30
    assert await kind_of(simulator, question(1)) == "Completion"


async def test_without_an_epoch_time_begins_for_all_models_of_a_process_with_the_first_request() -> None:
    script = Script()
    first = model("one", script=script, outages=[outage(10, 10, "error")])
    script.now += 500
    assert await kind_of(first, question(1)) == "Completion"
    script.now += 10
    second = model("two", script=script, outages=[outage(10, 10, "error")])
    assert await kind_of(second, question(1)) == await kind_of(first, question(1)) == "ServerFailed"


# -- true limits


async def test_requests_above_the_rate_are_refused_and_those_below_are_not() -> None:
    script = Script()
    simulator = model(script=script, requests_per_second_limit=5.0, retry_after_seconds=0.25)
    burst = [await outcome(simulator, question(case)) for case in range(8)]
    assert [isinstance(each, Completion) for each in burst] == [True] * 5 + [False] * 3
    assert isinstance(burst[-1], RateLimited)
    assert (burst[-1].retry_after, burst[-1].http_status) == (0.25, 429)
    served = 0
    for case in range(1000):  # 20 a second for 50 seconds
        script.now += 0.05
        served += await kind_of(simulator, question(case)) == "Completion"
    assert 249 <= served <= 250
    script.now += 60
    assert [await kind_of(simulator, question(case)) for case in range(6)] == ["Completion"] * 5 + ["RateLimited"]


async def test_less_than_one_request_a_second_is_a_limit_too() -> None:
    script = Script()
    simulator = model(script=script, requests_per_second_limit=0.1)
    seen = []
    for _ in range(21):
        seen.append(await kind_of(simulator, question(1)))
        script.now += 5
    assert seen == ["Completion", "RateLimited"] * 10 + ["Completion"]


async def test_requests_above_the_concurrency_are_refused_until_one_ends() -> None:
    may_end = asyncio.Event()

    async def sleep(seconds: float) -> None:
        await may_end.wait()

    script = Script()
    parameters = {"concurrency_limit": 3, "retry_after_seconds": None}
    spec = ModelSpec(id=1, name="m", provider="simulator", parameters=parameters)
    simulators = [
        Simulator(spec, clock=script.time, sleep=sleep) for _ in range(2)
    ]  # of one model, which has one limit
    calls = [asyncio.create_task(simulators[case % 2](question(case))) for case in range(3)]
    await asyncio.sleep(0)
    refused = await outcome(simulators[0], question(9))
    assert isinstance(refused, RateLimited) and refused.retry_after is None
    calls[0].cancel()
    await asyncio.gather(*calls[:1], return_exceptions=True)
    calls[0] = asyncio.create_task(simulators[1](question(9)))
    await asyncio.sleep(0)
    assert isinstance(await outcome(simulators[1], question(10)), RateLimited)
    may_end.set()
    assert all(isinstance(each, Completion) for each in await asyncio.gather(*calls))
    assert await kind_of(simulators[0], question(11)) == "Completion"


# -- parameters


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"latency_mixture": [{"weight": 0, "seconds": 1}]}, "latency_mixture.0.weight"),
        ({"latency_mixture": [{"weight": 1}]}, "latency_mixture.0.seconds"),
        ({"latency_mixture": [{"weight": 1, "seconds": 1, "tail": 2}]}, "latency_mixture.0.tail"),
        ({"latency_tail_rate": 1.1}, "latency_tail_rate"),
        ({"latency_tail_factor": 0.5}, "latency_tail_factor"),
        ({"seconds_per_1k_input_tokens": -1}, "seconds_per_1k_input_tokens"),
        ({"discrimination": 0}, "discrimination"),
        ({"error_correlation": 0.5}, "error_group"),
        ({"error_group": ""}, "error_group"),
        ({"error_group": "g", "error_correlation": 1.5}, "error_correlation"),
        ({"confidence_insight": 1.0}, "confidence_insight"),
        ({"outages": [{"start_seconds": 0, "seconds": 1, "kind": "sleepy"}]}, "outages.0.kind"),
        ({"outages": [{"start_seconds": 0, "seconds": 0, "kind": "hang"}]}, "outages.0.seconds"),
        ({"outage_epoch": "2030-05-01T12:00:00"}, "outage_epoch"),
        ({"outage_epoch": "noon"}, "outage_epoch"),
        ({"requests_per_second_limit": 0}, "requests_per_second_limit"),
        ({"concurrency_limit": 0}, "concurrency_limit"),
        ({"concurrency_limit": 2.5}, "concurrency_limit"),
    ],
    ids=str,
)
def test_parameters_that_cannot_be_used_are_named(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRejected, match=re.escape(named)):
        model(**parameters)


def test_the_document_lists_every_parameter_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE))
    defaults = SimulatorParameters().model_dump()
    assert {name: json.loads(listed[name].strip("` ")) for name in defaults} == defaults
    assert set(listed) == set(defaults)


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in SimulatorParameters.model_fields.values())
