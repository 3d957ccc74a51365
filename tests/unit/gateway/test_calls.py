"""Calls: what is recorded of each, of those of members beside their composite's, and what code may see of an item."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from pgharness.errors import CodeFailed, RateLimited, TimedOut
from pgharness.gateway.calls import CallRecord, Member, facts_for, reads_items
from pgharness.types import Completion, Message, ModelSpec, Request, Trail, Usage

START = datetime(2026, 1, 1, tzinfo=UTC)


def spec(name: str, provider: Any = "simulator", **fields: Any) -> ModelSpec:
    """Return a model whose input costs a dollar and output two dollars a million tokens."""
    prices = {"input_usd_per_million": 1, "output_usd_per_million": 2}
    return ModelSpec.model_validate({"id": ord(name[0]), "name": name, "provider": provider} | prices | fields)


def request(trail: Trail | None = None, **fields: Any) -> Request:
    return Request((Message("user", "Is it?"),), trail=trail, **fields)


async def answers(_: Request) -> Completion:
    return Completion("yes", usage=Usage(1_000_000, 500_000), finish_reason="stop", model="m-1", http_status=200)


async def is_limited(_: Request) -> Completion:
    raise RateLimited("slow down", retry_after=3, http_status=429)


async def breaks(_: Request) -> Completion:
    raise ZeroDivisionError("a bug")


async def hangs(_: Request) -> Completion:
    await asyncio.Event().wait()
    raise AssertionError


async def test_each_end_of_a_members_call_is_a_row_of_its_own() -> None:
    trail = Trail(START)
    assert (await Member(spec("a"), answers)(request(trail))).text == "yes"
    with pytest.raises(RateLimited):
        await Member(spec("b"), is_limited)(request(trail, number=1))
    with pytest.raises(CodeFailed, match="ZeroDivisionError: a bug"):
        await Member(spec("c"), breaks)(request(trail))
    slow = asyncio.create_task(Member(spec("d"), hangs)(request(trail, number=2)))
    await asyncio.sleep(0)
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    told = [(row["model_id"], row["outcome"], row["number"]) for row in trail.calls]
    assert told == [
        (ord("a"), "succeeded", 0),
        (ord("b"), "rate_limited", 1),
        (ord("c"), "code_failed", 0),
        (ord("d"), "cancelled", 2),
    ]
    assert {row["parent_started_at"] for row in trail.calls} == {START}
    first = trail.calls[0]
    assert (first["input_tokens"], first["output_tokens"], first["cost_usd"]) == (1_000_000, 500_000, 2)
    assert (first["http_status"], first["finish_reason"], first["answered_by"]) == (200, "stop", "m-1")
    assert trail.calls[1]["http_status"] == 429


async def test_calls_of_one_trail_begin_at_instants_of_their_own() -> None:
    trail = Trail(datetime.now(UTC))
    member = Member(spec("a"), answers)
    await asyncio.gather(*(member(request(trail)) for _ in range(500)))
    begun = [row["started_at"] for row in trail.calls]
    assert len(set(begun)) == 500 and min(begun) > trail.parent_started_at


async def test_calls_of_a_composites_members_name_it_however_deep_it_is() -> None:
    leaf = Member(spec("a"), answers)

    async def asks_twice(asked: Request) -> Completion:
        await leaf(asked)
        return await leaf(asked)

    inner = spec("b", "ensemble", members=[spec("a").model_dump()])
    trail = Trail(START)
    await Member(inner, asks_twice)(request(trail))
    first, second, own = trail.calls
    assert own["parent_started_at"] == START
    assert first["parent_started_at"] == second["parent_started_at"] == own["started_at"] < first["started_at"]
    assert (own["input_tokens"], own["output_tokens"], own["cost_usd"]) == (0, 0, 0), "its members' rows have them"


async def test_without_a_trail_a_member_answers_all_the_same() -> None:
    assert (await Member(spec("a"), answers)(request())).text == "yes"
    with pytest.raises(ZeroDivisionError):
        await Member(spec("a"), breaks)(request())


def test_what_a_composite_says_of_itself_is_kept_with_its_call() -> None:
    panel = spec("p", "ensemble", members=[spec("a").model_dump()])
    done = CallRecord(panel).succeeded(Completion("yes", usage=Usage(9, 9), composition={"consensus": 1}))
    assert (done["composition"], done["input_tokens"], done["cost_usd"]) == ({"consensus": 1}, 0, 0)
    failed = CallRecord(panel).failed(TimedOut("late", composition={"responses": 1}, input_tokens=5), None)
    assert (failed["composition"], failed["outcome"], failed["input_tokens"]) == ({"responses": 1}, "timeout", 0)
    assert "composition" not in CallRecord(spec("a")).succeeded(Completion("yes"))


async def test_code_that_generates_never_sees_the_answer() -> None:
    seen: list[Any] = []

    async def looks(asked: Request) -> Completion:
        seen.append(asked.item)
        return Completion("yes")

    facts = {"case": {"input": "q", "target": "t"}, "replication": 1}
    for provider in ("python", "command", "plugin", "simulator"):
        await Member(spec("a", provider, model="m:f"), looks)(request(item=facts))
    hidden = {"case": {"input": "q"}, "replication": 1}
    assert seen == [hidden, hidden, hidden, facts]
    graded = facts | {"note": "n"}
    assert facts_for(spec("a", "python", model="m:f"), graded) == graded, "who grades may compare"
    assert facts == {"case": {"input": "q", "target": "t"}, "replication": 1}


def test_a_composite_reads_items_where_one_of_its_members_does() -> None:
    chat = spec("c", "openai", model="m").model_dump()
    assert not reads_items(spec("p", "ensemble", members=[chat]))
    deep = spec("h", "hedge", members=[chat, spec("s").model_dump()]).model_dump()
    assert reads_items(spec("p", "ensemble", members=[chat, deep]))
