"""Hedges: who is asked when, who wins, what becomes of the others, and when nobody else is asked. On scripted time."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any

import pytest

import virtual_time
from pgharness.errors import (
    ModelError,
    RateLimited,
    RequestRejected,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from pgharness.gateway.calls import Member
from pgharness.gateway.delays import WINDOW, Observation, Size
from pgharness.gateway.hedging import Hedge, HedgeParameters
from pgharness.gateway.learned_delays import latencies, sizes_in
from pgharness.gateway.observations import Observations
from pgharness.types import Completion, Message, ModelSpec, Request, Trail, Usage

FOREVER = 1e9
AT_ONE = {"strategy": "fixed", "seconds": 1}
QUESTION = Request(messages=(Message("user", "What is it?" * 4),), seed=7)


@dataclasses.dataclass
class Asked:
    """A request as a scripted model got it."""

    name: str
    number: int
    at: float
    cancelled_at: float | None = None


Reply = float | Completion | ModelError | tuple[float, Completion | ModelError]


class Scripted:
    """A model that answers by a script: after so many seconds, with that, or both."""

    def __init__(self, spec: ModelSpec, replies: Iterable[Reply], asked: list[Asked]) -> None:
        self._spec = spec
        self._replies = iter(replies)
        self._asked = asked

    async def __call__(self, request: Request) -> Completion:
        clock = asyncio.get_running_loop().time
        asked = Asked(self._spec.name, request.number, clock())
        self._asked.append(asked)
        reply = next(self._replies)
        seconds, outcome = (
            reply if isinstance(reply, tuple) else (reply, None) if isinstance(reply, float | int) else (0, reply)
        )
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            asked.cancelled_at = clock()
            raise
        if isinstance(outcome, ModelError):
            raise outcome
        return outcome or Completion(text=f"{self._spec.name}/{request.number}", usage=Usage(100, 40))


class Stage(Member):
    """A member whose limits are scripted."""

    is_blocked = False
    would_wait = False


class Theatre:
    """A hedge among scripted models, and what they were asked."""

    def __init__(self, scripts: dict[str, Iterable[Reply]], **parameters: Any) -> None:
        self.asked: list[Asked] = []
        specs = tuple(
            ModelSpec(id=place, name=name, provider="simulator", input_usd_per_million=1, output_usd_per_million=10)
            for place, name in enumerate(scripts, start=1)
        )
        self.members = [
            Stage(spec, Scripted(spec, replies, self.asked))
            for spec, replies in zip(specs, scripts.values(), strict=True)
        ]
        parameters = {"members": list(scripts), "delay": AT_ONE, "max_extra": 4.0} | parameters
        self.spec = ModelSpec(id=9, name="quick", provider="hedge", parameters=parameters, members=specs)
        self.observations = Observations()
        self.hedge = Hedge(self.spec, self.members, self.observations)

    async def ask(self, request: Request = QUESTION) -> tuple[Completion, float]:
        """Return the answer, and how long it took."""
        begun = asyncio.get_running_loop().time()
        completion = await self.hedge(request)
        return completion, asyncio.get_running_loop().time() - begun

    def seen(self, model_id: int = 1) -> list[tuple[float, bool]]:
        """Return what was observed of a model: seconds, and whether it was cut."""
        seconds, is_cut = latencies(self.observations.window(model_id))
        return [(round(float(time), 6), bool(cut)) for time, cut in zip(seconds, is_cut, strict=True)]


def on_scripted_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test on a loop whose time is scripted, and see that it leaves no task behind."""

    async def watched(*args: Any, **kwargs: Any) -> None:
        await test(*args, **kwargs)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        virtual_time.run(watched(*args, **kwargs))

    return run


def trailed() -> tuple[Request, Trail]:
    trail = Trail(datetime.now(UTC))
    return dataclasses.replace(QUESTION, trail=trail), trail


# -- the race


@on_scripted_time
async def test_a_fast_answer_is_not_hedged() -> None:
    theatre = Theatre({"a": [0.9]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/0", 0.9)
    assert len(theatre.asked) == 1
    assert completion.composition == {
        "strategy": "fixed",
        "delay_ms": 1000.0,
        "hedges": 0,
        "winner": "a",
        "winner_number": 0,
        "primary_ms": 900.0,
    }


@on_scripted_time
async def test_a_slow_answer_is_overtaken_and_cancelled() -> None:
    theatre = Theatre({"a": [20, 0.5]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/1", 1.5)
    assert [(asked.number, asked.at, asked.cancelled_at) for asked in theatre.asked] == [(0, 0, 1.5), (1, 1, None)]
    assert completion.composition is not None
    assert completion.composition["winner_number"] == completion.composition["hedges"] == 1
    assert (completion.composition["primary_ms"], completion.composition["primary_is_cut"]) == (1500.0, True)


@on_scripted_time
async def test_the_first_request_may_win_after_all() -> None:
    theatre = Theatre({"a": [1.2, 5]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/0", 1.2)
    assert theatre.asked[1].cancelled_at == 1.2
    assert completion.composition is not None
    assert (completion.composition["winner_number"], completion.composition["hedges"]) == (0, 1)


@on_scripted_time
async def test_of_two_answers_at_once_the_first_request_wins() -> None:
    theatre = Theatre({"a": [3, 2]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/0", 3)


@on_scripted_time
async def test_a_request_that_was_cancelled_before_it_began_was_none() -> None:
    theatre = Theatre({"a": [1.0, 20]})  # the answer comes in the very moment in which another is asked for
    request, trail = trailed()
    completion, _ = await theatre.ask(request)
    assert completion.composition is not None
    assert completion.composition["hedges"] == len(theatre.asked) - 1 == len(trail.calls) - 1


@on_scripted_time
async def test_an_answer_comes_back_whole() -> None:
    """Whatever a Completion may hold, now or later, is handed on."""
    odd = {field.name: object() for field in dataclasses.fields(Completion)} | {
        "usage": Usage(1, 2, 3),
        "confidence": 0.5,
    }
    theatre = Theatre({"a": [Completion(**odd)]})  # type: ignore[arg-type]
    completion, _ = await theatre.ask()
    assert {name: getattr(completion, name) for name in odd if name != "composition"} == {
        name: value for name, value in odd.items() if name != "composition"
    }


@on_scripted_time
async def test_hedges_race_side_by_side() -> None:
    theatre = Theatre({"a": [value for _ in range(50) for value in (20.0, 0.25)]}, max_extra=1.0)

    async def later(place: int) -> float:
        await asyncio.sleep(place * 2)
        return (await theatre.ask())[1]

    assert set(await asyncio.gather(*map(later, range(50)))) == {1.25}


# -- tiers


@on_scripted_time
async def test_each_tier_goes_to_its_member_after_its_own_delay() -> None:
    delays = [{"strategy": "fixed", "seconds": seconds} for seconds in (1, 2)]
    theatre = Theatre({"a": [20], "b": [20], "c": [0.5]}, delay=delays)
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("c/2", 3.5)
    assert [(asked.name, asked.at) for asked in theatre.asked] == [("a", 0), ("b", 1), ("c", 3)]
    assert [asked.cancelled_at for asked in theatre.asked] == [3.5, 3.5, None]
    assert completion.composition is not None
    assert (completion.composition["winner"], completion.composition["winner_number"]) == ("c", 2)


@on_scripted_time
async def test_the_last_member_gets_all_further_requests() -> None:
    theatre = Theatre({"a": [20], "b": [20, 20, 0.5]}, max_hedges=3)
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("b/3", 3.5)


@on_scripted_time
async def test_no_more_are_asked_than_max_hedges() -> None:
    theatre = Theatre({"a": [20], "b": [19], "c": []}, max_hedges=1)
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/0", 20)
    assert len(theatre.asked) == 2


@on_scripted_time
async def test_an_unsure_answer_is_not_the_last_word() -> None:
    unsure, sure = (Completion(text=f"{share}", confidence=share) for share in (0.4, 0.9))
    theatre = Theatre({"a": [(0.5, unsure)], "b": [(2, sure)]}, min_confidence=0.8)
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("0.9", 2.5)  # without waiting for the delay
    assert completion.confidence == 0.9


@on_scripted_time
async def test_the_surest_answer_counts_where_none_is_sure_enough() -> None:
    answers = [Completion(text=f"{share}", confidence=share) for share in (0.4, 0.6, 0.5)]
    theatre = Theatre(dict(zip("abc", [[answer] for answer in answers], strict=True)), min_confidence=0.8)
    completion, _ = await theatre.ask()
    assert completion.text == "0.6"
    assert completion.composition is not None and completion.composition["winner"] == "b"


@on_scripted_time
async def test_an_answer_of_unknown_confidence_is_good() -> None:
    theatre = Theatre({"a": [0.5], "b": []}, min_confidence=0.8)
    assert (await theatre.ask())[0].text == "a/0"


@on_scripted_time
async def test_an_unsure_answer_is_better_than_a_failure() -> None:
    theatre = Theatre(
        {"a": [Completion(text="perhaps", confidence=0.1)], "b": [ServerFailed("it broke")]}, min_confidence=0.8
    )
    assert (await theatre.ask())[0].text == "perhaps"


# -- failures


@on_scripted_time
async def test_after_a_failure_the_next_is_asked_at_once() -> None:
    theatre = Theatre({"a": [(0.2, ServerFailed("it broke")), 0.3]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("a/1", 0.5)
    assert completion.composition is not None
    assert (completion.composition["hedges"], completion.composition["primary_ms"]) == (1, None)
    assert theatre.seen() == [(0.3, False)]  # how long a failure takes says nothing of answers


@on_scripted_time
async def test_after_a_failure_the_delay_of_the_next_counts() -> None:
    delays = [{"strategy": "fixed", "seconds": seconds} for seconds in (1_000, 2)]
    theatre = Theatre({"a": [(0.2, ServerFailed("it broke"))], "b": [20], "c": [0.5]}, delay=delays)
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("c/2", pytest.approx(2.7))


@pytest.mark.parametrize("error", [RateLimited("slow down", retry_after=3), RequestRejected("no such model")])
@on_scripted_time
async def test_a_refusal_that_asking_again_cannot_mend_is_handed_on(error: ModelError) -> None:
    theatre = Theatre({"a": [(0.2, error)], "b": []})
    with pytest.raises(type(error)) as caught:
        await theatre.ask()
    assert caught.value is error
    assert error.composition is not None
    assert (error.composition["hedges"], error.composition["winner"]) == (0, None)


@on_scripted_time
async def test_a_failure_does_not_stop_who_still_runs() -> None:
    theatre = Theatre({"a": [(1.5, RequestRejected("no"))], "b": [3]})
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("b/1", 4)


@pytest.mark.parametrize(
    ("first", "second", "raised"),
    [
        (ServerFailed("first"), ServerFailed("second"), "first"),
        (ServerFailed("first"), Unavailable("second"), "second"),
        (ServerFailed("first"), RequestRejected("second"), "first"),
        (Unavailable("first"), ServerFailed("second"), "first"),
    ],
)
@on_scripted_time
async def test_where_all_fail_a_failure_that_spends_no_attempt_counts(
    first: ModelError, second: ModelError, raised: str
) -> None:
    theatre = Theatre({"a": [first], "b": [second]})
    with pytest.raises(ModelError, match=raised) as caught:
        await theatre.ask()
    assert caught.value.composition is not None and caught.value.composition["hedges"] == 1


@on_scripted_time
async def test_all_requests_together_may_take_so_long() -> None:
    theatre = Theatre({"a": [20, 20]}, timeout_seconds=5.0)
    begun = asyncio.get_running_loop().time()
    with pytest.raises(TimedOut, match="5 s") as caught:
        await theatre.hedge(QUESTION)
    assert asyncio.get_running_loop().time() - begun == 5
    assert [asked.cancelled_at for asked in theatre.asked] == [5, 5]
    assert caught.value.composition is not None and caught.value.composition["primary_is_cut"]
    assert theatre.seen() == [(5.0, True)]


@on_scripted_time
async def test_what_there_is_counts_when_the_time_is_up() -> None:
    theatre = Theatre(
        {"a": [Completion(text="perhaps", confidence=0.1)], "b": [20]}, timeout_seconds=5.0, min_confidence=0.8
    )
    completion, seconds = await theatre.ask()
    assert (completion.text, seconds) == ("perhaps", 5)


@on_scripted_time
async def test_whoever_cancels_a_hedge_cancels_all_of_it() -> None:
    theatre = Theatre({"a": [20, 20]})
    request, trail = trailed()
    task = asyncio.create_task(theatre.hedge(request))
    await asyncio.sleep(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [asked.cancelled_at for asked in theatre.asked] == [2, 2]
    assert [row["outcome"] for row in trail.calls] == ["cancelled", "cancelled"]


@on_scripted_time
async def test_whoever_cancels_a_hedge_in_the_moment_of_an_overtaking_cancels_it() -> None:
    theatre = Theatre({"a": [20, 2]})
    task = asyncio.create_task(theatre.hedge(QUESTION))
    asyncio.get_running_loop().call_later(3, task.cancel)  # the second request ends then, too
    with pytest.raises(asyncio.CancelledError):
        await task
    assert theatre.asked[0].cancelled_at == 3


@on_scripted_time
async def test_a_timeout_around_a_hedge_is_a_timeout() -> None:
    theatre = Theatre({"a": [20, 20]})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(3):
            await theatre.hedge(QUESTION)
    assert [asked.cancelled_at for asked in theatre.asked] == [3, 3]


@on_scripted_time
async def test_an_overtaken_request_leaves_its_caller_alone() -> None:
    theatre = Theatre({"a": [20, 0.5, 0.1]})
    await theatre.ask()
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(1)  # and no late cancellation comes
    assert (await theatre.ask())[0].text == "a/0"


class Stubborn(Stage):
    """Makes something else of its first cancellation."""

    ending: Completion | ModelError | None = None

    async def __call__(self, request: Request) -> Completion:
        try:
            return await super().__call__(request)
        except asyncio.CancelledError:
            if isinstance(self.ending, Completion):
                return self.ending
            assert self.ending is not None
            raise self.ending from None


@pytest.mark.parametrize("ending", [Completion(text="late"), ServerFailed("interrupted")])
@on_scripted_time
async def test_a_model_that_makes_something_else_of_a_cancellation_changes_nothing(
    ending: Completion | ModelError,
) -> None:
    theatre = Theatre({"a": [20], "b": [0.5]})
    stubborn = Stubborn(theatre.members[0].spec, theatre.members[0]._completer)
    stubborn.ending = ending
    completion = await Hedge(theatre.spec, [stubborn, theatre.members[1]], Observations())(QUESTION)
    assert completion.text == "b/1"
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(1)


@on_scripted_time
async def test_an_inner_and_an_outer_hedge_interrupt_the_same_task_each_for_itself() -> None:
    inner = Theatre({"a": [20, 9, 20, 0.5]})
    asked: list[Asked] = []
    backup = ModelSpec(id=5, name="b", provider="simulator")
    parameters = {"members": ["quick", "b"], "delay": {"strategy": "fixed", "seconds": 3}, "max_extra": 1.0}
    spec = ModelSpec(id=10, name="outer", provider="hedge", parameters=parameters, members=(inner.spec, backup))
    members = [Stage(inner.spec, inner.hedge), Stage(backup, Scripted(backup, [7.0, 0.5], asked))]
    outer = Hedge(spec, members, Observations())
    # the backups of both end at 10
    assert (await outer(QUESTION)).text in ("a/1", "b/5")
    assert (await outer(QUESTION)).text == "a/1"
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    await asyncio.sleep(1)


# -- cost


class Clocked(Stage):
    """Scripts what its rows tell, as scripted time is nothing to what times calls."""

    milliseconds: tuple[float, ...] = (1_500.0, 500.0)

    async def __call__(self, request: Request) -> Completion:
        try:
            return await super().__call__(request)
        finally:
            assert request.trail is not None
            request.trail.calls[-1]["latency_ms"] = self.milliseconds[request.number]


def overtaken(*milliseconds: float) -> tuple[Completion, Trail]:
    """Return an answer to a second request, and the rows of both, as if they had taken so long."""
    theatre = Theatre({"a": [20, 0.5]})
    member = Clocked(theatre.spec.members[0], Scripted(theatre.spec.members[0], [20, 0.5], theatre.asked))
    member.milliseconds = milliseconds
    request, trail = trailed()
    return virtual_time.run(Hedge(theatre.spec, [member], Observations())(request)), trail


def test_what_was_cancelled_is_counted_by_estimate() -> None:
    completion, trail = overtaken(1_500, 500)
    rows = {row["number"]: row for row in trail.calls}
    assert [rows[number]["outcome"] for number in (0, 1)] == ["cancelled", "succeeded"]
    assert (rows[1]["input_tokens"], rows[1]["output_tokens"], rows[1]["cost_usd"]) == (100, 40, pytest.approx(500e-6))
    assert "is_estimated" not in rows[1]
    assert rows[0]["is_estimated"] is True
    assert (rows[0]["input_tokens"], rows[0]["output_tokens"], rows[0]["cost_usd"]) == (100, 40, pytest.approx(500e-6))
    assert completion.composition is not None
    assert completion.composition["extra_usd"] == pytest.approx(500e-6)
    assert completion.composition["cost_usd"] == pytest.approx(1000e-6)
    assert completion.composition["primary_ms"] == 1_500
    assert {row["parent_started_at"] for row in trail.calls} == {trail.parent_started_at}


@pytest.mark.parametrize(("waited", "tokens"), [(250.0, 10), (0.0, 0), (1_000.0, 40), (9_000.0, 40)])
def test_a_loser_is_taken_to_write_as_fast_as_the_winner(waited: float, tokens: int) -> None:
    _, trail = overtaken(waited, 1_000.0)
    row = next(row for row in trail.calls if row["outcome"] == "cancelled")
    assert row["output_tokens"] == tokens
    assert row["cost_usd"] == pytest.approx((100 + 10 * tokens) / 1e6)


@on_scripted_time
async def test_the_prompt_of_another_model_is_estimated_by_its_length() -> None:
    theatre = Theatre({"a": [20], "b": [0.5]})
    request, trail = trailed()
    await theatre.ask(request)
    assert (
        next(row["input_tokens"] for row in trail.calls if row["number"] == 0) == len(QUESTION.messages[0].content) // 4
    )


@on_scripted_time
async def test_a_hedge_within_a_hedge_has_numbers_and_costs_of_its_own() -> None:
    inner = Theatre({"a": [20, 20]})
    asked: list[Asked] = []
    backup = ModelSpec(id=5, name="b", provider="simulator", output_usd_per_million=10)
    spec = ModelSpec(
        id=10,
        name="outer",
        provider="hedge",
        parameters={"members": ["quick", "b"], "delay": {"strategy": "fixed", "seconds": 3}, "max_extra": 1.0},
        members=(inner.spec, backup),
    )
    members = [Stage(inner.spec, inner.hedge), Stage(backup, Scripted(backup, [0.5], asked))]
    request, trail = trailed()
    completion = await Hedge(spec, members, Observations())(request)
    assert completion.text == "b/5"
    assert sorted(asked.number for asked in (*inner.asked, *asked)) == [0, 1, 5]
    by_name = {(row["model_id"], row["number"]): row for row in trail.calls}
    assert by_name[9, 0]["outcome"] == "cancelled"
    assert "is_estimated" not in by_name[9, 0]  # a composite's own row has neither tokens nor cost
    assert [by_name[1, number]["is_estimated"] for number in (0, 1)] == [True, True]
    assert by_name[1, 0]["parent_started_at"] == by_name[9, 0]["started_at"]
    assert completion.composition is not None
    assert completion.composition["extra_usd"] == pytest.approx(sum(by_name[1, n]["cost_usd"] for n in (0, 1)))


# -- the share of extra requests


@on_scripted_time
async def test_the_share_of_extra_requests_is_kept() -> None:
    theatre = Theatre({"a": iter(lambda: 3.0, None)}, max_extra=0.1)
    for asked in range(1, 201):
        completion, _ = await theatre.ask()
        extra = len(theatre.asked) - asked
        assert extra <= 0.1 * asked + 1e-9
    assert extra == 20
    assert completion.composition is not None and completion.composition["hedges"] == 1


@on_scripted_time
async def test_who_is_beyond_the_share_says_so() -> None:
    theatre = Theatre({"a": [3.0]}, max_extra=0.1)
    completion, _ = await theatre.ask()
    assert completion.composition is not None
    assert (completion.composition["hedges"], completion.composition["held_back"]) == (0, "max_extra")


@on_scripted_time
async def test_a_long_quiet_time_does_not_pay_for_a_storm() -> None:
    theatre = Theatre({"a": [*[0.1] * 5_000, *[30.0] * 200]}, max_extra=0.1)
    for _ in range(5_000):
        await theatre.ask()
    await asyncio.gather(*(theatre.ask() for _ in range(100)))
    assert len(theatre.asked) - 5_100 == 10 or len(theatre.asked) - 5_100 == 11


@on_scripted_time
async def test_what_was_held_back_is_asked_when_there_is_room_again() -> None:
    theatre = Theatre({"a": [30.0, *[0.1] * 21]}, max_extra=0.1)
    slow = asyncio.create_task(theatre.ask())
    await asyncio.sleep(2.5)
    for _ in range(20):
        await theatre.ask()
    assert (await slow)[1] == pytest.approx(4.1)  # tried at 1, 2, 3 and 4, when there had been ten requests


@on_scripted_time
async def test_no_extra_requests_at_all() -> None:
    theatre = Theatre({"a": [3.0, (0.1, ServerFailed("it broke"))]}, max_extra=0.0)
    assert (await theatre.ask())[1] == 3
    with pytest.raises(ServerFailed):
        await theatre.ask()
    assert len(theatre.asked) == 2


# -- while a provider limits the rate


@pytest.mark.parametrize(("limit", "reason"), [("is_blocked", "rate_limited"), ("would_wait", "limits")])
@on_scripted_time
async def test_nobody_is_asked_again_while_a_limit_holds(limit: str, reason: str) -> None:
    theatre = Theatre({"a": [3.5, 30, 0.5]})
    setattr(theatre.members[0], limit, True)
    completion, seconds = await theatre.ask()
    assert seconds == 3.5
    assert completion.composition is not None and completion.composition["held_back"] == reason
    asyncio.get_running_loop().call_later(2.5, lambda: setattr(theatre.members[0], limit, False))
    completion, seconds = await theatre.ask()
    assert seconds == 3.5  # tried at 1, 2 and 3
    assert completion.composition is not None and "held_back" not in completion.composition


@on_scripted_time
async def test_the_limit_of_the_model_that_would_be_asked_counts() -> None:
    theatre = Theatre({"a": [3], "b": [0.5]})
    theatre.members[0].would_wait = True
    assert (await theatre.ask())[0].text == "b/1"


@on_scripted_time
async def test_nobody_is_asked_again_soon_after_a_rate_limit() -> None:
    theatre = Theatre({"a": [RateLimited("slow down", retry_after=1.0), 3.5, 5.0, 0.5]})
    with pytest.raises(RateLimited):
        await theatre.ask()
    completion, seconds = await theatre.ask()
    assert seconds == 3.5
    assert completion.composition is not None and completion.composition["held_back"] == "rate_limited"
    await asyncio.sleep(10)
    assert (await theatre.ask())[1] == 1.5


@on_scripted_time
async def test_a_rate_limit_is_heeded_for_as_long_as_it_says() -> None:
    theatre = Theatre({"a": [RateLimited("slow down", retry_after=60.0), 3.5]})
    with pytest.raises(RateLimited):
        await theatre.ask()
    await asyncio.sleep(50)
    assert (await theatre.ask())[1] == 3.5


# -- what is learned


@on_scripted_time
async def test_what_was_cut_is_observed_as_cut() -> None:
    theatre = Theatre({"a": [20, 0.5, 0.25, 1.75, 20]})
    for _ in range(3):
        await theatre.ask()
    assert theatre.seen() == [(1.5, True), (0.25, False), (1.75, False)]  # and nothing of further requests


@on_scripted_time
async def test_another_model_is_observed_too() -> None:
    theatre = Theatre({"a": [20, 2], "b": [0.5, 4]})
    await theatre.ask()
    await theatre.ask()
    assert theatre.seen(1) == [(1.5, True), (2.0, False)]
    assert theatre.seen(2) == [(0.5, False), (1.0, True)]


@on_scripted_time
async def test_an_answer_from_the_cache_is_no_latency() -> None:
    theatre = Theatre({"a": [0.5]})

    class Remembered(Stage):
        async def __call__(self, request: Request) -> Completion:
            assert request.trail is not None
            at = {"started_at": request.trail.begin(), "parent_started_at": request.trail.parent_started_at}
            request.trail.calls.append(
                {"model_id": 1, "number": request.number, "latency_ms": 0.1, "outcome": "cached"} | at
            )
            return Completion(text="remembered")

    hedge = Hedge(theatre.spec, [Remembered(theatre.members[0].spec, theatre.hedge)], theatre.observations)
    await hedge(trailed()[0])
    assert theatre.seen() == []


@on_scripted_time
async def test_the_wait_at_a_limit_is_no_latency() -> None:
    theatre = Theatre({"a": [20], "b": [0.5]})

    class Queued(Stage):
        async def __call__(self, request: Request) -> Completion:
            await asyncio.sleep(FOREVER)
            raise AssertionError("nobody waits that long")

    members = [Queued(theatre.members[0].spec, theatre.hedge), theatre.members[1]]
    completion = await Hedge(theatre.spec, members, theatre.observations)(trailed()[0])
    assert completion.text == "b/1"
    assert theatre.seen(1) == []
    assert len(theatre.seen(2)) == 1


@on_scripted_time
async def test_hedges_of_one_model_learn_together() -> None:
    percentile = {"strategy": "percentile", "percentile": 90.0}
    teacher = Theatre({"a": [second / 10 for second in range(1, 101)]}, delay=percentile, max_extra=0.0)
    for _ in range(100):
        await teacher.ask()
    pupil = Theatre({"a": [20, 0.5]}, delay=percentile)
    hedge = Hedge(pupil.spec, pupil.members, teacher.observations)
    completion = await hedge(QUESTION)
    assert completion.composition is not None
    assert completion.composition["delay_ms"] == 9000.0


@on_scripted_time
async def test_a_delay_that_becomes_known_counts_for_who_waits_already() -> None:
    theatre = Theatre({"a": [60, 0.5]}, delay={"strategy": "percentile"})
    asyncio.get_running_loop().call_later(
        5, lambda: [theatre.observations.add(1, Observation(second / 10)) for second in range(1, 21)]
    )
    completion, seconds = await theatre.ask()
    assert 5.5 < seconds < 10
    assert completion.composition is not None and completion.composition["delay_ms"] == 1900.0


@on_scripted_time
async def test_nobody_is_asked_again_while_no_delay_is_known() -> None:
    theatre = Theatre({"a": [60]}, delay={"strategy": "percentile"})
    completion, seconds = await theatre.ask()
    assert seconds == 60
    assert completion.composition is not None and completion.composition["delay_ms"] is None


@on_scripted_time
async def test_exponential_learns_from_every_end() -> None:
    options = {"strategy": "exponential", "initial_seconds": 1.0, "min_seconds": 0.01, "max_seconds": 10.0}
    broken = ServerFailed("it broke")
    # not needed; won; lost; failed twice
    theatre = Theatre({"a": [0.1, 20, 0.1, 2, 20, broken, broken, 0.1]}, delay=options)
    delays = []
    for _ in range(5):
        try:
            completion, _ = await theatre.ask()
            composition = completion.composition
        except ServerFailed as exc:
            composition = exc.composition
        assert composition is not None
        delays.append(composition["delay_ms"])
    assert delays == pytest.approx([1000, 900, 810, 1215, 2430], abs=0.1)


@on_scripted_time
async def test_workload_waits_longer_for_more() -> None:
    theatre = Theatre({"a": [60, 0.5, 60, 0.5]}, delay={"strategy": "workload"})
    for tokens in range(10, 10 + WINDOW):
        theatre.observations.add(1, Observation(tokens * 0.01, size=Size(tokens, 40)))
    delays = []
    for length in (400, 3_200):
        completion, _ = await theatre.ask(Request(messages=(Message("user", "x" * length),)))
        assert completion.composition is not None
        delays.append(completion.composition["delay_ms"] / 1000)
    assert delays == [pytest.approx(1.0, rel=0.2), pytest.approx(8.0, rel=0.2)]


@on_scripted_time
async def test_sizes_are_what_requests_turned_out_to_weigh() -> None:
    answers = [Completion(text="x", usage=Usage(2 * 100, 500)) for _ in range(200)]
    theatre = Theatre({"a": answers}, delay={"strategy": "workload"})
    sizes = theatre.hedge.sizes
    assert sizes is not None
    plain = Request(messages=(Message("user", "x" * 400),))
    short = dataclasses.replace(plain, parameters={"max_tokens": 20})
    form = dataclasses.replace(plain, schema={"type": "object"}, schema_name="verdicts")
    assert sizes.expected(plain) == Size(100, 0)
    assert sizes.expected(short) == Size(100, 20)
    for _ in range(200):
        await theatre.ask(plain)
    assert sizes.expected(plain) == (pytest.approx(200, rel=0.01), 500)
    assert sizes.expected(short).answer == 20
    assert sizes.expected(form).answer == 0
    assert sizes_in(theatre.observations.window(1))[-1].tolist() == [200, 500]


# -- parameters


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"members": []}, "members"),
        ({"members": ["a"], "max_hedges": 0}, "max_hedges"),
        ({"members": ["a"], "max_hedges": 9}, "max_hedges"),
        ({"members": ["a"], "max_extra": -1}, "max_extra"),
        ({"members": ["a"], "min_confidence": 2}, "min_confidence"),
        ({"members": ["a"], "timeout_seconds": 0}, "timeout_seconds"),
        ({"members": ["a"], "delay": {"strategy": "soon"}}, "delay"),
        ({"members": ["a"], "delay": {"strategy": "fixed"}}, "seconds"),
        ({"members": ["a", "b"], "delay": [AT_ONE, AT_ONE]}, "2 delays for 1 further request"),
        ({"members": ["a"], "after": 2}, "after"),
        ({"members": ["a"], "delay": {"strategy": "fixed"}}, "cannot use: delay.seconds: Field required$"),
        ({"members": ["a"], "delay": [{"strategy": "fixed", "seconds": -1}]}, "cannot use: delay.0.seconds: Input"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, Any], name: str) -> None:
    spec = ModelSpec(id=9, name="quick", provider="hedge", parameters=parameters)
    with pytest.raises(RequestRejected, match=name) as caught:
        Hedge(spec, [], Observations())
    assert "quick" in str(caught.value)


def test_a_hedge_is_made_with_the_members_that_it_names() -> None:
    theatre = Theatre({"a": [], "b": []})
    with pytest.raises(RequestRejected, match="a, b"):
        Hedge(theatre.spec, theatre.members[:1], Observations())


@pytest.mark.parametrize(
    ("parameters", "hedges"),
    [
        ({"members": ["a"]}, 1),
        ({"members": ["a", "b"]}, 1),
        ({"members": ["a", "b", "c"]}, 2),
        ({"members": ["a"], "max_hedges": 3}, 3),
    ],
)
def test_there_are_as_many_further_requests_as_members(parameters: dict[str, Any], hedges: int) -> None:
    assert HedgeParameters.model_validate(parameters).hedges == hedges


def test_every_parameter_is_described() -> None:
    schema = HedgeParameters.model_json_schema()
    shapes = [schema, *schema["$defs"].values()]
    fields = [field for shape in shapes for name, field in shape["properties"].items() if name != "strategy"]
    assert len(fields) > 12
    assert all(field.get("description") for field in fields)
