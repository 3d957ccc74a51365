"""Every vendor end to end: a model is a row, each of its calls is a row, and what the vendor did is in them.

One run per vendor. A case's input says which scene the vendor plays at the first call for its note, its target which
one at the first call for its grade. With one attempt an item, each scene shows what it makes of an item; retry_failed
then tries again those that failed.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import psycopg
import pytest
from aiohttp import web

import world
from command_line import CommandLine
from stub_provider import CACHED_TOKENS, INPUT_TOKENS, NOTE, OUTPUT_TOKENS, PROVIDERS, Recorded, Scene, StubProvider

KEY = "sk-end-to-end-9f8e7d6c5b4a"
KEYS = {name: KEY for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "LOCAL_API_KEY")}
# 100 fresh and 20 cached tokens in, 30 out, at 10, 1 and 40 USD per million
CALL_USD = (100 * 10 + 20 * 1 + 30 * 40) / 1e6
RETRY_AFTER_SECONDS = 1.0

SCENES: tuple[Scene, ...] = ("success", "rate_limited", "server_error", "slow", "truncated_json", "content_filter")
# what becomes of a note whose first call ends so
CAUSES = {
    "server_error": "server_error",
    "slow": "timeout",
    "truncated_json": "invalid_output",
    "content_filter": "refused",
}
NEVER_MENDED = "content_filter"


class DirectedStub(StubProvider):
    """Plays the scene that a prompt names, at its first call alone; the content filter stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    async def _act(self, scene: Scene, recorded: Recorded, request: web.Request) -> web.StreamResponse:
        named = re.search(r"scene (\w+) of (note|grade)", json.dumps(recorded.body))
        if named:
            self.calls[named[0]] += 1
            if self.calls[named[0]] == 1 or named[1] == NEVER_MENDED:
                (scene,) = (scene for scene in get_args(Scene) if scene == named[1])
        response = await super()._act(scene, recorded, request)
        if scene == "rate_limited":
            response.headers["retry-after"] = str(RETRY_AFTER_SECONDS)
        return response


@dataclass
class World:
    """A database with one run per provider, the stubs that were asked, and all that the workers logged."""

    db: world.Database
    stubs: dict[str, DirectedStub]
    log: str

    def calls(self, provider: str, scene: str, kind: str = "note") -> list[world.Row]:
        """Return the calls made for the item of a scene, in order."""
        return world.rows(
            self.db,
            # one combination, one replication and one grade a note: an ordinal is the number of its case
            "select c.* from pgharness.calls as c join pgharness.runs as r on r.id = c.run_id"
            " join pgharness.run_cases as rc on rc.run_id = r.id and rc.number = c.ordinal"
            " join pgharness.cases as ca on ca.id = rc.case_id"
            " where r.instance = %s and ca.name = %s and c.kind = %s order by c.id",
            provider,
            scene,
            kind,
        )


async def _serve(stubs: dict[str, DirectedStub], ready: threading.Event, stopped: asyncio.Event) -> None:
    for stub in stubs.values():
        await stub.__aenter__()
    ready.set()
    await stopped.wait()
    for stub in stubs.values():
        await stub.__aexit__()


@pytest.fixture(scope="module")
def stubs() -> Iterator[dict[str, DirectedStub]]:
    """A vendor of each kind, served by a thread."""
    loop, ready, stopped = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found = {provider: DirectedStub() for provider in PROVIDERS}
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(found, ready, stopped),))
    thread.start()
    assert ready.wait(10)
    yield found
    loop.call_soon_threadsafe(stopped.set)
    thread.join(10)
    loop.close()


def _define(db: world.Database, stubs: dict[str, DirectedStub]) -> None:
    for scene in SCENES:
        of_grade = "success" if scene == "rate_limited" else scene  # to wait once is enough
        db.execute(
            "insert into pgharness.cases (name, input, target) values (%s, %s, %s)",
            (scene, json.dumps(f"scene {scene} of note"), json.dumps(f"scene {of_grade} of grade")),
        )
    for provider, stub in stubs.items():
        db.execute(
            "insert into pgharness.models (name, provider, model, base_url, api_key_env, timeout_seconds, parameters,"
            " input_usd_per_million, output_usd_per_million, cached_input_usd_per_million)"
            " values (%s, %s, 'stub-1', %s, %s, 1, '{\"max_tokens\": 100}', 10, 40, 1)",
            (
                provider,
                provider,
                stub.base_url(provider),
                "LOCAL_API_KEY" if provider == "openai_compatible" else None,
            ),
        )
        db.execute(
            "insert into pgharness.instances (name, rubrics_per_case, max_attempts, failure_threshold)"
            " values (%s, 0, 1, 1)",
            (provider,),
        )
        db.execute("select pgharness.add_cases(%s)", (provider,))
        db.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values (%s, %s, %s)",
            (provider, provider, provider),
        )
        db.execute("select pgharness.start_run(%s)", (provider,))


@pytest.fixture(scope="module")
def first_try(server_url: str, template: str, stubs: dict[str, DirectedStub]) -> Iterator[World]:
    """All runs after their first try."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        _define(db, stubs)
        done = CommandLine(url, environment=KEYS).work("--concurrency", "40", "--log-level", "debug")
        yield World(db, stubs, done.out + done.err)


@pytest.fixture(scope="module")
def second_try(first_try: World) -> World:
    """All runs after what failed was tried again; `first_try` is no more."""
    for provider in PROVIDERS:
        first_try.db.execute("select pgharness.retry_failed(%s)", (f"{provider}/1",))
    done = CommandLine(first_try.db.info.dsn, environment=KEYS).work("--concurrency", "40", "--log-level", "debug")
    return World(first_try.db, first_try.stubs, first_try.log + done.out + done.err)


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- the first try


def test_an_answer_is_recorded_with_what_it_took(first_try: World, provider: str) -> None:
    (call,) = first_try.calls(provider, "success")
    assert call["outcome"] == "succeeded"
    assert call["http_status"] == 200
    assert (call["input_tokens"], call["output_tokens"]) == (INPUT_TOKENS, OUTPUT_TOKENS)
    assert call["cached_tokens"] == CACHED_TOKENS
    assert float(call["cost_usd"]) == pytest.approx(CALL_USD)
    assert call["latency_ms"] > 0
    assert call["finish_reason"] in ("stop", "completed", "end_turn", "STOP")
    assert re.fullmatch(r"(gem-)?req-\d+", call["request_id"])
    (note,) = world.rows(
        first_try.db,
        "select note, attempts, cost_usd from pgharness.note_results where run = %s and case_name = 'success'",
        f"{provider}/1",
    )
    assert (note["note"], note["attempts"], note["cost_usd"]) == (NOTE, 1, call["cost_usd"])


def test_a_grade_is_recorded_with_its_verdicts(first_try: World, provider: str) -> None:
    (call,) = first_try.calls(provider, "success", "grade")
    assert (call["outcome"], call["input_tokens"]) == ("succeeded", INPUT_TOKENS)
    (criterion,) = world.rows(
        first_try.db,
        "select criterion, weight, satisfaction, score, rationale from pgharness.criterion_results"
        " where run = %s and case_name = 'success'",
        f"{provider}/1",
    )
    assert criterion["criterion"] == "The output agrees with the target."
    assert (criterion["weight"], criterion["satisfaction"], criterion["score"]) == (100, 50, 50)
    assert criterion["rationale"].startswith("The note says so.")


def test_a_rate_limit_is_waited_for_and_spends_no_attempt(first_try: World, provider: str) -> None:
    first, second = first_try.calls(provider, "rate_limited")
    assert (first["outcome"], first["http_status"], first["cost_usd"]) == ("rate_limited", 429, 0)
    assert (second["outcome"], second["attempt"]) == ("succeeded", 2)
    assert (second["started_at"] - first["started_at"]).total_seconds() >= RETRY_AFTER_SECONDS


@pytest.mark.parametrize(("scene", "cause"), CAUSES.items())
def test_a_failure_is_kept_with_its_cause(first_try: World, provider: str, scene: str, cause: str) -> None:
    (call,) = first_try.calls(provider, scene)
    assert call["outcome"] == cause
    (item,) = world.rows(
        first_try.db,
        "select status, cause, error, attempts from pgharness.failed_items where run = %s and case_name = %s",
        f"{provider}/1",
        scene,
    )
    assert (item["status"], item["cause"], item["attempts"]) == ("failed", cause, 1)
    assert provider in item["error"], "the error names the model"
    if scene == "server_error":
        assert call["http_status"] == 500
    if scene == "slow":
        assert 900 <= call["latency_ms"] <= 5000
        assert "within 1 s" in item["error"]


def test_the_views_say_what_happened(first_try: World, provider: str) -> None:
    run = f"{provider}/1"
    (progress,) = world.rows(first_try.db, "select * from pgharness.run_progress where run = %s", run)
    assert progress["status"] == "completed"
    assert (progress["notes_succeeded"], progress["notes_failed"]) == (2, 4)
    assert (progress["grades_succeeded"], progress["grades_failed"], progress["grades_skipped"]) == (2, 0, 4)
    (spent,) = world.rows(
        first_try.db,
        "select sum(cost_usd) from pgharness.calls where run_id = %s",
        progress["run_id"],
    )
    assert progress["cost_usd"] == spent["sum"] > 0
    causes = world.rows(first_try.db, "select * from pgharness.failure_causes where run = %s", run)
    found = Counter({(row["kind"], row["cause"]): row["calls_failed"] for row in causes})
    assert found == Counter(("note", cause) for cause in ("rate_limited", *CAUSES.values()))
    (notes,) = world.rows(
        first_try.db, "select * from pgharness.model_performance where run = %s and kind = 'note'", run
    )
    assert notes["model"] == provider
    assert (notes["call_count"], notes["calls_succeeded"], notes["calls_rate_limited"]) == (7, 2, 1)
    assert notes["calls_failed"] == 4


# -- the second


def test_what_failed_is_tried_again_and_what_stays_filtered_stays_failed(second_try: World, provider: str) -> None:
    (progress,) = world.rows(second_try.db, "select * from pgharness.run_progress where run = %s", f"{provider}/1")
    assert progress["status"] == "completed"
    assert (progress["notes_succeeded"], progress["notes_failed"]) == (5, 1)
    # the same scenes were then played to the grades
    assert (progress["grades_succeeded"], progress["grades_failed"], progress["grades_skipped"]) == (2, 3, 1)
    assert len(second_try.calls(provider, NEVER_MENDED)) == 2
    assert world.orphans(second_try.db) == []


def test_no_vendor_was_sent_what_it_would_refuse(second_try: World, provider: str) -> None:
    assert second_try.stubs[provider].problems == []
    assert {request.key for request in second_try.stubs[provider].requests} == {KEY}


def test_the_key_is_nowhere(second_try: World) -> None:
    assert KEY not in second_try.log
    tables = world.rows(
        second_try.db,
        "select oid::regclass::text as name from pg_class"
        " where relkind = 'r' and relnamespace in ('pgharness'::regnamespace, 'procrastinate'::regnamespace)",
    )
    assert len(tables) > 20
    for table in tables:
        found = world.rows(second_try.db, f"select t::text as text from {table['name']} as t")
        assert not [row for row in found if KEY in row["text"]], table
