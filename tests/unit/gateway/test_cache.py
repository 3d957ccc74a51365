"""What makes two questions the same, and what a member of a composite does with an answer that is there already."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from pgharness.database import Row
from pgharness.errors import NotCached, RateLimited
from pgharness.gateway.cache import Answers, Mode, ResponseCache, Stored
from pgharness.gateway.calls import Member
from pgharness.types import Completion, Message, ModelSpec, Request, Trail, Usage

START = datetime(2026, 1, 1, tzinfo=UTC)
ASKED = Request(
    (Message("system", "Be brief."), Message("user", "Why?")),
    schema={"type": "object"},
    parameters={"top_p": 0.5},
    replication=2,
    note_replication=1,
    run_seed=7,
    seed=12345,
    attempt=1,
)


def spec(**fields: Any) -> ModelSpec:
    made = {"id": 1, "name": "m", "provider": "openai", "model": "gpt", "parameters": {"temperature": 0.5}}
    return ModelSpec.model_validate(made | fields)


class Shelf:
    """A response cache of a few answers, which claims nothing twice."""

    def __init__(self, **stored: Completion) -> None:
        self.stored = {bytes.fromhex(key): Stored(answer, 0.25) for key, answer in stored.items()}
        self.claimed: set[bytes] = set()
        self.kept: list[Row] = []
        self.released: list[bytes] = []
        self.waited: list[bytes] = []

    async def look(self, key: bytes) -> Stored | None:
        return self.stored.get(key)

    async def claim(self, key: bytes, seconds: float) -> Stored | bool:
        assert seconds > 60
        if key in self.claimed:
            return False
        self.claimed.add(key)
        return True

    async def wait(self, key: bytes) -> Stored | None:
        self.waited.append(key)
        return self.stored.get(key)

    def keep(self, call: Row) -> None:
        self.kept.append(call)

    def release(self, key: bytes) -> None:
        self.released.append(key)


def answers(shelf: Shelf | None = None, mode: Mode = "write") -> Answers:
    return Answers(cast(ResponseCache, shelf or Shelf()), mode, 7)


def key(request: Request = ASKED, model: ModelSpec | None = None, *, is_member: bool = False) -> str:
    return answers().key(model or spec(), request, is_member=is_member).hex()


# -- keys


@pytest.mark.parametrize(
    "changed",
    [
        {"messages": (Message("system", "Be brief."), Message("user", "Why not?"))},
        {"messages": (Message("user", "Be brief."), Message("user", "Why?"))},
        {"schema": {"type": "array"}},
        {"schema": None},
        {"schema_name": "verdicts"},
        {"parameters": {"top_p": 0.6}},
        {"parameters": {"top_p": 0.5, "temperature": 1}},
        {"parameters": {"top_p": 0.5, "seed": 1}},
        {"is_reasoning": True},
        {"replication": 1},
        {"note_replication": 2},
        {"run_seed": 8},
        {"number": 1},
    ],
)
def test_all_that_shapes_an_answer_is_in_its_key(changed: dict[str, Any]) -> None:
    assert key(replace(ASKED, **changed)) != key()


@pytest.mark.parametrize(
    "changed",
    [
        {"provider": "openai_responses"},
        {"model": "gpt-2"},
        {"base_url": "https://elsewhere/v1"},
        {"parameters": {"temperature": 0.6}},
        {"is_reasoning": True},
    ],
)
def test_all_of_a_model_that_shapes_an_answer_is_in_its_key(changed: dict[str, Any]) -> None:
    assert key(model=spec(**changed)) != key()


def test_names_limits_prices_and_tries_are_no_part_of_a_key() -> None:
    others = {
        "id": 2,
        "name": "other",
        "api_key_env": "OTHER_KEY",
        "timeout_seconds": 5,
        "max_concurrency": 3,
        "requests_per_minute": 10,
        "input_usd_per_million": 9,
    }
    assert key(model=spec(**others)) == key()
    assert key(replace(ASKED, seed=99, attempt=3, trail=Trail(START))) == key()
    swapped = spec(parameters={"temperature": 0.9}), replace(ASKED, parameters={"top_p": 0.5, "temperature": 0.5})
    assert key(swapped[1], swapped[0]) == key()


def test_an_item_gets_under_its_question_what_it_got_in_the_end() -> None:
    corrected = replace(
        ASKED,
        messages=(*ASKED.messages, Message("assistant", "?"), Message("user", "That is no answer.")),
        question=ASKED.messages,
        rejected=1,
        attempt=2,
    )
    assert key(corrected) == key()
    # a member must not give the answer again that was of no use
    assert key(corrected, is_member=True) != key(is_member=True) == key()
    wordless = replace(ASKED, rejected=1)
    assert key(wordless, is_member=True) != key(is_member=True)


def test_a_composite_is_its_members_whatever_they_are_called() -> None:
    def panel(*members: ModelSpec, **options: Any) -> ModelSpec:
        named = [{"model": member.name, "weight": 2} for member in members]
        return spec(provider="ensemble", model="", members=members, parameters={"members": named, **options})

    one, two = spec(name="one"), spec(name="two", model="gpt-2")
    asked = key(model=panel(one, two))
    assert key(model=panel(spec(name="first"), spec(name="second", model="gpt-2"))) == asked
    assert key(model=panel(two, one)) != asked
    assert key(model=panel(one, two, vote="weighted")) != asked
    assert key(model=panel(one, spec(name="two", model="gpt-2", parameters={"temperature": 1}))) != asked
    named = spec(provider="ensemble", model="", members=(one, two), parameters={"members": ["one", "two"]})
    assert key(model=named) != asked


def test_only_what_sees_the_case_is_keyed_by_it() -> None:
    facts = {"case": {"name": "c", "input": 1}, "overlap": 100, "run": "r/1"}
    seen = replace(ASKED, item=facts)
    assert key(seen) == key()
    code = spec(provider="python", model="a:b")
    assert key(seen, code) != key(ASKED, code)
    assert key(replace(ASKED, item=facts | {"run": "r/2"}), code) == key(seen, code)
    assert key(replace(ASKED, item=facts | {"software_version": "v2"}), code) != key(seen, code)


def test_a_simulator_draws_by_its_name() -> None:
    one, two = (spec(provider="simulator", name=name) for name in ("one", "two"))
    assert key(model=one) != key(model=two)


@pytest.mark.parametrize("value", [2**70, "\ud800", "\0"])
def test_any_question_has_a_key(value: Any) -> None:
    odd = replace(ASKED, parameters={"odd": value}, messages=(Message("user", str(value)),))
    assert key(odd) == key(replace(odd)) != key()


# -- members


class Closed:
    """Limits that nobody may ask for."""

    def of_model(self, spec: ModelSpec) -> Any:
        raise AssertionError("it waited for a limit")


LATE = Completion("because", usage=Usage(1_000_000, 0), model="gpt-x", request_id="r-1", finish_reason="stop")


async def never(_: Request) -> Completion:
    raise AssertionError("it was asked")


async def asked(_: Request) -> Completion:
    return LATE


def member(shelf: Shelf, ask: Any, mode: Mode = "write", limits: Any = None) -> Member:
    return Member(spec(input_usd_per_million=2), ask, limits, answers(shelf, mode))


async def test_an_answer_that_is_there_waits_for_no_limit_and_costs_nothing() -> None:
    shelf = Shelf(**{key(): replace(LATE, is_cached=True)})
    request = replace(ASKED, trail=Trail(START), number=0)
    found = await member(shelf, never, "replay", Closed())(request)
    assert (found.text, found.is_cached, found.usage) == ("because", True, Usage(1_000_000, 0))
    assert request.trail is not None
    (row,) = request.trail.calls
    assert row["outcome"] == "cached" and row["saved_usd"] == 0.25 and "cost_usd" not in row
    assert row["response_key"] == "\\x" + key() and row["parent_started_at"] == START
    assert (row["answered_by"], row["request_id"], row["finish_reason"]) == ("gpt-x", "r-1", "stop")


async def test_a_new_answer_is_kept_with_what_it_cost() -> None:
    shelf, trail = Shelf(), Trail(START)
    found = await member(shelf, asked)(replace(ASKED, trail=trail))
    assert found is LATE and not found.is_cached
    (kept,) = shelf.kept
    assert (kept["run_id"], kept["response_key"]) == (7, "\\x" + key())
    assert kept["response"]["answer"] == "because" and kept["response"]["cost_usd"] == 2.0
    assert trail.calls[0]["outcome"] == "succeeded" and trail.calls[0]["response_key"] == "\\x" + key()
    assert "response" not in trail.calls[0]


async def test_a_run_that_only_reads_keeps_and_claims_nothing() -> None:
    shelf, trail = Shelf(), Trail(START)
    await member(shelf, asked, "read")(replace(ASKED, trail=trail))
    assert not shelf.kept and not shelf.claimed and "response_key" not in trail.calls[0]


async def test_a_replay_asks_nobody() -> None:
    trail = Trail(START)
    with pytest.raises(NotCached, match="no answer of model 'm'") as caught:
        await member(Shelf(), never, "replay")(replace(ASKED, trail=trail))
    assert caught.value.hint and "response_cache => 'write'" in caught.value.hint
    assert not caught.value.is_retryable
    assert [row["outcome"] for row in trail.calls] == ["not_cached"]


async def test_who_finds_a_question_taken_waits_for_the_answer() -> None:
    shelf, trail = Shelf(), Trail(START)
    shelf.claimed.add(bytes.fromhex(key()))
    real_wait = shelf.wait

    async def wait(question: bytes) -> Stored | None:
        if len(shelf.waited) == 1:  # the second time; the first time its asker failed
            shelf.stored[question] = Stored(LATE, 2.0)
        return await real_wait(question)

    shelf.wait = wait  # type: ignore[method-assign]
    assert (await member(shelf, never)(replace(ASKED, trail=trail))).text == "because"
    assert len(shelf.waited) == 2 and [row["outcome"] for row in trail.calls] == ["cached"]


async def test_who_has_no_answer_lets_others_ask() -> None:
    async def refuses(_: Request) -> Completion:
        raise RateLimited("slow down")

    async def hangs(_: Request) -> Completion:
        await asyncio.Event().wait()
        raise AssertionError

    shelf = Shelf()
    with pytest.raises(RateLimited):
        await member(shelf, refuses)(replace(ASKED, trail=Trail(START)))
    assert shelf.released == [bytes.fromhex(key())]
    shelf.claimed.clear()
    waiting = asyncio.create_task(member(shelf, hangs)(replace(ASKED, trail=Trail(START))))
    while not shelf.claimed:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(shelf.released) == 2 and not shelf.kept


async def test_a_composite_saves_what_its_members_would_cost() -> None:
    """One was asked, the other was answered from the cache: both would have to be paid for."""
    shelf, trail = Shelf(**{key(): replace(LATE, is_cached=True)}), Trail(START)
    known, new = (
        member(shelf, never),
        Member(spec(id=2, model="new", input_usd_per_million=4), asked, None, answers(shelf)),
    )

    async def both(request: Request) -> Completion:
        await known(request)
        await new(request)
        return Completion("both", composition={"votes": 2})

    panel = spec(provider="ensemble", model="", members=(known.spec, new.spec), parameters={"members": ["m", "m"]})
    await Member(panel, both, None, answers(shelf))(replace(ASKED, trail=trail))
    kept = {call["response"]["answer"]: call["response"]["cost_usd"] for call in shelf.kept}
    assert kept == {"because": 4.0, "both": 4.25}
