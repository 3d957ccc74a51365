"""The response cache in the database: claims and answers, what a run freezes of it, what it saved, what is purged."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import pgharness.database
from pgharness.errors import HarnessError
from pgharness.gateway.cache import ResponseCache, Stored
from world import (
    add_instance,
    call,
    clear,
    finish,
    load,
    note,
    orphans,
    record,
    refused,
    register,
    rows,
    run_of,
    start,
    take,
    value,
)

Database = Connection[Any]
MODES = ("off", "read", "write", "replay")


def key(text: object) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()


def response(text: str, **fields: object) -> dict[str, object]:
    """Return what a call says so that its answer is kept."""
    kept = {"answer": f"answer to {text}", "cost_usd": 0.5, "input_tokens": 10, "output_tokens": 5}
    return {"response_key": f"\\x{key(text).hex()}", "response": kept | fields}


def hit(text: str) -> dict[str, object]:
    """Return a call that was answered from the cache."""
    return call(0, outcome="cached", response_key=f"\\x{key(text).hex()}", saved_usd=0.5)


def seek(db: Database, worker: int, *texts: str, claims: tuple[str, ...] = (), seconds: float = 60) -> dict[str, str]:
    """Return the state of questions, by their texts."""
    found = rows(
        db,
        "select key, state from pgharness.seek_responses(%s, %s, %s, %s)",
        worker,
        [key(text) for text in texts],
        [key(text) for text in claims],
        [seconds] * len(claims),
    )
    names = {key(text): text for text in (*texts, *claims)}
    return {names[bytes(row["key"])]: row["state"] for row in found}


def keep(db: Database, *calls: dict[str, object]) -> None:
    db.execute("select pgharness.keep_responses(%s)", (json.dumps([call() | each for each in calls]),))


# -- claims


def test_a_question_is_asked_by_one_worker_and_then_known(tx: Database) -> None:
    one, two = register(tx, pid=1), register(tx, pid=2)
    assert seek(tx, one, "why") == {"why": "free"}
    assert seek(tx, one, claims=("why",)) == {"why": "mine"}
    assert seek(tx, two, "why", "how", claims=("why", "when")) == {"why": "taken", "how": "free", "when": "mine"}
    assert seek(tx, one, claims=("why",)) == {"why": "mine"}  # the first answer may not have been heard
    assert seek(tx, one, "why") == seek(tx, two, claims=("why",)) == {"why": "taken"}
    keep(tx, response("why"))
    assert seek(tx, two, "why", claims=("why",)) == {"why": "found"}
    assert value(tx, "select count(*) from pgharness.response_claims") == 1
    found = rows(tx, "select * from pgharness.seek_responses(%s, %s)", two, [key("why")])[0]
    assert (found["answer"], found["cost_usd"], found["input_tokens"]) == ("answer to why", 0.5, 10)


def test_a_claim_that_is_given_up_is_free_at_once(tx: Database) -> None:
    one, two = register(tx, pid=1), register(tx, pid=2)
    seek(tx, one, claims=("why",))
    tx.execute("select pgharness.release_responses(%s, %s)", (two, [key("why")]))
    assert seek(tx, two, "why") == {"why": "taken"}
    tx.execute("select pgharness.release_responses(%s, %s)", (one, [key("why")]))
    assert seek(tx, two, claims=("why",)) == {"why": "mine"}


@pytest.mark.parametrize("status", ["lost", "stopped"])
def test_the_claim_of_a_worker_that_ended_does_not_count(tx: Database, status: str) -> None:
    dead, living = register(tx, pid=1), register(tx, pid=2)
    seek(tx, dead, claims=("why", "how"))
    tx.execute("update pgharness.workers set status = %s where id = %s", (status, dead))
    assert seek(tx, living, "why", claims=("how",)) == {"why": "free", "how": "mine"}
    tx.execute("select pgharness.sweep()")
    assert value(tx, "select count(*) from pgharness.response_claims where worker_id = %s", dead) == 0


def test_a_worker_whose_heartbeat_stopped_loses_its_claims_at_the_next_sweep(tx: Database) -> None:
    dead, living = register(tx, pid=1), register(tx, pid=2)
    seek(tx, dead, claims=("why",))
    tx.execute("update pgharness.workers set heartbeat_at = now() - interval '1 hour' where id = %s", (dead,))
    tx.execute("select pgharness.sweep()")
    assert seek(tx, living, claims=("why",)) == {"why": "mine"}


def test_a_claim_expires(tx: Database) -> None:
    one, two = register(tx, pid=1), register(tx, pid=2)
    seek(tx, one, claims=("why",), seconds=60)
    tx.execute("select set_config('pgharness.fake_now', (now() + interval '59 seconds')::text, true)")
    assert seek(tx, two, claims=("why",)) == {"why": "taken"}
    tx.execute("select set_config('pgharness.fake_now', (now() + interval '61 seconds')::text, true)")
    assert seek(tx, two, claims=("why",)) == {"why": "mine"}


# -- what is kept


def test_the_first_answer_stays_unless_it_was_of_no_use(tx: Database) -> None:
    keep(tx, response("why", answer="first"))
    keep(tx, response("why", answer="second"))
    assert rows(tx, "select answer from pgharness.responses") == [{"answer": "first"}]
    keep(tx, response("why", answer="fourth", replaces=True))
    assert rows(tx, "select answer from pgharness.responses") == [{"answer": "fourth"}]


def test_an_answer_is_as_durable_as_the_note_that_it_became(tx: Database) -> None:
    add_instance(tx, cases=2, combinations=[("simulator", None)])
    run, worker = start(tx, response_cache="write"), register(tx)
    seek(tx, worker, claims=("why",))
    answered = note(run, 0, calls=[call() | response("why", data='{"b": 1, "a": 2}', confidence=0.75)])
    record(tx, worker, answered)
    kept = rows(tx, "select * from pgharness.responses")[0]
    assert (kept["run_id"], kept["model"], kept["provider"]) == (run, "simulator", "simulator")
    assert (kept["data"], kept["confidence"], kept["cost_usd"], kept["latency_ms"]) == (
        '{"b": 1, "a": 2}',
        0.75,
        0.5,
        12.5,
    )
    assert value(tx, "select count(*) from pgharness.response_claims") == 0
    assert value(tx, "select response_key from pgharness.calls") == key("why")


def test_a_hit_counts_once_however_often_it_is_told(tx: Database) -> None:
    add_instance(tx, cases=2, combinations=[("simulator", None)])
    run, worker = start(tx, response_cache="write"), register(tx)
    keep(tx, response("why"), response("how"))
    told = [note(run, 0, calls=[hit("why")]), note(run, 1, calls=[hit("why"), hit("how")])]
    for _ in range(2):  # the commit of the first was not heard of
        record(tx, worker, *told)
    entries = "select answer, hit_count, saved_usd, last_hit_at is not null as is_used from pgharness.response_entries order by 1"
    assert rows(tx, entries) == [
        {"answer": "answer to how", "hit_count": 1, "saved_usd": 0.5, "is_used": True},
        {"answer": "answer to why", "hit_count": 2, "saved_usd": 1.0, "is_used": True},
    ]
    assert rows(
        tx, "select response_cache, calls_cached, calls_made, saved_usd, cost_usd from pgharness.run_savings"
    ) == [{"response_cache": "write", "calls_cached": 3, "calls_made": 0, "saved_usd": 1.5, "cost_usd": 0}]
    assert rows(tx, "select calls_failed, call_count from pgharness.model_performance") == [
        {"calls_failed": 0, "call_count": 3}
    ]
    assert rows(tx, "select cause from pgharness.failure_causes") == []
    assert run_of(tx, run)["status"] == "completed" and orphans(tx) == []


def test_a_deleted_run_leaves_its_answers(tx: Database) -> None:
    add_instance(tx, cases=1, combinations=[("simulator", None)])
    run, worker = start(tx, response_cache="write"), register(tx)
    record(tx, worker, note(run, 0, calls=[call() | response("why")]))
    tx.execute("delete from pgharness.runs where id = %s", (run,))
    assert rows(tx, "select run_id, run, answer from pgharness.response_entries") == [
        {"run_id": None, "run": None, "answer": "answer to why"}
    ]


@pytest.mark.parametrize("batch", [None, 77])
def test_an_answer_is_kept_though_nobody_waits_for_its_item(tx: Database, batch: int | None) -> None:
    """Its run was deleted, or its item has left its batch: the answer is paid for, and others wait for it."""
    add_instance(tx, cases=1, combinations=[("simulator", None)])
    run, worker = start(tx, response_cache="write"), register(tx)
    assert seek(tx, worker, claims=("why",)) == {"why": "mine"}
    if batch is None:
        tx.execute("delete from pgharness.runs where id = %s", (run,))
    record(tx, worker, note(run, 0, calls=[call() | response("why")], batch_id=batch))
    assert seek(tx, register(tx, pid=2), "why") == {"why": "found"}
    assert rows(tx, "select key from pgharness.response_claims") == []


def test_what_was_not_used_for_long_is_purged(tx: Database) -> None:
    keep(tx, response("old"), response("used"), response("new"), response("other") | {"model_id": 1})
    tx.execute("update pgharness.responses set created_at = now() - interval '10 days' where answer <> 'answer to new'")
    tx.execute("update pgharness.responses set last_hit_at = now() - interval '1 day' where answer = 'answer to used'")
    other = value(tx, "select name from pgharness.models where id = 1")
    assert value(tx, "select pgharness.purge_responses(older_than => '5 days', model => %s)", other) == 1
    assert value(tx, "select pgharness.purge_responses(older_than => '5 days')") == 1
    assert value(tx, "select array_agg(answer order by answer) from pgharness.responses") == [
        "answer to new",
        "answer to used",
    ]
    with refused(tx, "PH002", "older_than is -5 days", "'90 days'"):
        tx.execute("select pgharness.purge_responses(older_than => '-5 days')")
    assert value(tx, "select pgharness.purge_responses(older_than => '0 days')") == 2
    with refused(tx, "PH002", "neither older_than nor model", "0 days"):
        tx.execute("select pgharness.purge_responses()")
    with refused(tx, "PH001", 'model "gpt-9" does not exist', "response_savings"):
        tx.execute("select pgharness.purge_responses(model => 'gpt-9')")


# -- the mode of a run


def frozen(db: Database, run: int) -> Any:
    return value(db, "select pgharness.load_run(%s) ->> 'response_cache'", run)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_uses_the_cache_as_its_instance_says_unless_its_start_says_otherwise(tx: Database, mode: str) -> None:
    add_instance(tx, cases=1, response_cache=mode)
    assert frozen(tx, start(tx)) == mode
    other = MODES[MODES.index(mode) - 1]
    run = start(tx, response_cache=other)
    assert frozen(tx, run) == other
    tx.execute("update pgharness.instances set response_cache = 'off'")
    assert frozen(tx, run) == other
    assert value(tx, "select response_cache from pgharness.run_provenance where run_id = %s", run) == other
    inserted = value(
        tx, "insert into pgharness.runs (instance, response_cache) values ('trial', %s) returning id", mode
    )
    assert frozen(tx, inserted) == mode


def test_a_rerun_uses_the_cache_as_the_run_did_unless_it_is_told_otherwise(tx: Database) -> None:
    add_instance(tx, cases=1)
    run = start(tx, response_cache="write")
    assert frozen(tx, value(tx, "select run_id from pgharness.rerun(%s)", run)) == "write"
    assert (
        frozen(tx, value(tx, "select run_id from pgharness.rerun(%s, response_cache => 'replay')", "trial/1"))
        == "replay"
    )


def test_a_copy_of_an_instance_uses_the_cache_as_it_does(tx: Database) -> None:
    add_instance(tx, cases=1, response_cache="read")
    tx.execute("select pgharness.clone_instance('trial', 'copy')")
    assert value(tx, "select response_cache from pgharness.instances where name = 'copy'") == "read"


def test_a_mode_that_does_not_exist_is_refused(tx: Database) -> None:
    with refused(tx, "23514", 'response_cache is "always"', "replay"):
        add_instance(tx, cases=0, response_cache="always")
    add_instance(tx, cases=1)
    with refused(tx, "PH002", 'response_cache of a run cannot be "always"', "replay"):
        start(tx, response_cache="always")


# -- many questions of one process


class Counting(pgharness.database.Database):
    """A database that counts the statements it is sent."""

    sent = 0

    async def call(self, function: str, /, **args: object) -> list[pgharness.database.Row]:
        self.sent += 1
        return await super().call(function, **args)


@pytest.fixture
def office(shared_url: str) -> Iterator[Database]:
    with psycopg.connect(shared_url, autocommit=True) as db:
        clear(db)
        db.execute("delete from pgharness.responses")
        yield db


@asynccontextmanager
async def opened(
    url: str, worker: int, kind: type[Counting] = Counting
) -> AsyncIterator[tuple[ResponseCache, Counting]]:
    async def moment(_: float) -> None:
        await asyncio.sleep(0)

    database = kind(url, size=2)
    async with database.opened():
        cache = ResponseCache(database, worker, sleep=moment)
        yield cache, database
        await cache.close()


async def test_a_thousand_questions_are_few_statements(office: Database, shared_url: str) -> None:
    texts = [f"question {number}" for number in range(1_000)]
    keep(office, *(response(text) for text in texts[::2]))
    async with opened(shared_url, register(office)) as (cache, database):
        found = await asyncio.gather(*(cache.look(key(text)) for text in texts for _ in range(2)))
        assert database.sent <= 5
    answers = [stored and stored.completion.text for stored in found[::2]]
    assert answers == [f"answer to {text}" if number % 2 == 0 else None for number, text in enumerate(texts)]


async def test_of_many_who_ask_the_same_one_asks_and_all_hear(office: Database, shared_url: str) -> None:
    """In two processes at once; the first who asks fails, the second one has the answer."""
    numbers = itertools.count(1)
    async with (
        opened(shared_url, register(office, pid=1)) as (one, _),
        opened(shared_url, register(office, pid=2)) as (two, _),
    ):

        async def get(cache: ResponseCache) -> str:
            while True:
                claim = await cache.claim(key("why"), 60)
                if isinstance(claim, Stored):
                    return claim.completion.text
                if claim and next(numbers) == 1:
                    cache.release(key("why"))
                elif claim:
                    cache.keep(call() | response("why") | {"run_id": None})
                elif (stored := await cache.wait(key("why"))) is not None:
                    return stored.completion.text

        heard = await asyncio.wait_for(asyncio.gather(*(get(cache) for cache in (one, two) for _ in range(100))), 30)
    assert heard == ["answer to why"] * 200 and next(numbers) == 3
    assert value(office, "select count(*) from pgharness.response_claims") == 0


async def test_who_is_cancelled_while_it_claims_leaves_no_claim(office: Database, shared_url: str) -> None:
    async with opened(shared_url, register(office)) as (cache, _):
        claims = [asyncio.create_task(cache.claim(key(number), 60)) for number in range(20)]
        await asyncio.sleep(0)
        for claim in claims:
            claim.cancel()
        assert await cache.claim(key("last"), 60) is True
        cache.release(key("last"))
    assert value(office, "select count(*) from pgharness.response_claims") == 0


class Forgetful(Counting):
    """A database whose answers are lost: of all that is sent, the first statement is done twice."""

    async def call(self, function: str, /, **args: object) -> list[pgharness.database.Row]:
        if self.sent == 0:
            await super().call(function, **args)
        return await super().call(function, **args)


async def test_a_claim_of_which_nothing_was_heard_is_granted_again(office: Database, shared_url: str) -> None:
    async with opened(shared_url, register(office), Forgetful) as (cache, _):
        claims = [await asyncio.wait_for(cache.claim(key("why"), 60), 30) for _ in range(3)]
        assert claims == [True, False, False], "one of the process asks, however often the statement was sent"
        cache.release(key("why"))
        assert await asyncio.wait_for(cache.wait(key("why")), 30) is None
        assert await cache.claim(key("why"), 60) is True
        cache.keep(call() | response("why") | {"run_id": None})
        stored = await asyncio.wait_for(cache.wait(key("why")), 30)
        assert stored is not None and stored.completion.text == "answer to why"


class Refusing(Counting):
    """A database that does the first statement and then says that it refuses it."""

    async def call(self, function: str, /, **args: object) -> list[pgharness.database.Row]:
        done = await super().call(function, **args)
        if self.sent == 1:
            raise HarnessError("no")
        return done


async def test_who_is_refused_a_claim_leaves_none(office: Database, shared_url: str) -> None:
    async with opened(shared_url, register(office), Refusing) as (cache, _):
        with pytest.raises(HarnessError):
            await cache.claim(key("why"), 60)
    assert value(office, "select count(*) from pgharness.response_claims") == 0


def test_a_whole_run_as_workers_do_it(office: Database) -> None:
    """Take, look, claim, keep with the outcome: by statements alone, then all of it again from the cache."""
    add_instance(office, cases=3, combinations=[("simulator", None)], response_cache="write")
    worker = register(office)
    for is_known in (False, True):
        run = start(office)
        while (job := take(office, worker)) is not None:
            for item in load(office, worker, job["args"]):
                text = f"case {item['case_id']}"
                assert seek(office, worker, text) == {text: "found" if is_known else "free"}
                if not is_known:
                    assert seek(office, worker, claims=(text,)) == {text: "mine"}
                told = hit(text) if is_known else call() | response(text)
                record(office, worker, note(run, item["ordinal"], calls=[told]))
            finish(office, job)
        assert run_of(office, run)["status"] == "completed"
    assert rows(office, "select entry_count, hit_count, saved_usd from pgharness.response_savings") == [
        {"entry_count": 3, "hit_count": 3, "saved_usd": 1.5}
    ]
    assert orphans(office) == []
