"""The response cache end to end: a rerun asks nobody, a replay needs no network, a crowd with one question asks once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import world
from command_line import CommandLine
from stub_provider import Recorded, StubProvider

KEY = "sk-local-0123456789"
CASES, REPLICATIONS = 500, 2
CALL_USD = Decimal(120 * 10 + 30 * 40) / 1_000_000


class Vendor:
    """A provider that never gives the same answer twice, served by a thread; it can be cut off."""

    def __init__(self, **options: Any) -> None:
        self._loop, self._stopped = asyncio.new_event_loop(), asyncio.Event()
        self.stub = StubProvider(**options)
        numbers = itertools.count(1)

        def answer(request: Recorded) -> str:
            number = next(numbers)
            if request.schema is None:
                return f"note {number}"
            return json.dumps({"verdicts": [{"rationale": f"grade {number}", "satisfaction": number % 101}] * 2})

        self.stub.answer = answer
        ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(ready),))
        self._thread.start()
        assert ready.wait(10)

    async def _serve(self, ready: threading.Event) -> None:
        async with self.stub:
            ready.set()
            await self._stopped.wait()

    @property
    def calls(self) -> int:
        return len(self.stub.requests)

    def cut_off(self) -> None:
        """End; whoever calls from now on finds nobody."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join(10)
            self._loop.close()


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    made = Vendor()
    yield made
    made.cut_off()


@pytest.fixture(scope="module")
def served_url(server_url: str, template: str) -> Iterator[str]:
    """Connection string of a database with a worker, for all tests of this module that need no more of it."""
    with world.cloned(server_url, template) as url:
        line = CommandLine(url, environment={"LOCAL_API_KEY": KEY})
        worker = line.start("worker", "--queues", "note,grade", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield url
        finally:
            worker.terminate()
            worker.communicate(timeout=60)


@pytest.fixture
def db(served_url: str) -> Iterator[Connection[Any]]:
    """A connection to that database, emptied."""
    with psycopg.connect(served_url, autocommit=True) as connection:
        yield connection
        for table in ("runs", "instances", "cases", "responses"):
            connection.execute(f"delete from pgharness.{table}".encode())
        for provider in ("ensemble", "openai_compatible"):
            connection.execute("delete from pgharness.models where provider = %s", (provider,))


@pytest.fixture
def own(url: str) -> Iterator[Connection[Any]]:
    """A connection to a database without a worker."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def add_model(db: Connection[Any], vendor: Vendor, name: str = "vendor", **columns: object) -> None:
    fields = {
        "name": name,
        "provider": "openai_compatible",
        "model": "stub-1",
        "base_url": vendor.stub.base_url("openai_compatible"),
        "api_key_env": "LOCAL_API_KEY",
        "input_usd_per_million": 10,
        "output_usd_per_million": 40,
    } | columns
    marks = ", ".join(["%s"] * len(fields))
    db.execute(
        f"insert into pgharness.models ({', '.join(fields)}) values ({marks})".encode(),
        [json.dumps(item) if isinstance(item, dict) else item for item in fields.values()],
    )


def ended(db: Connection[Any], run: int) -> int:
    """Wait for the end of a run; its id."""
    wait_until(lambda: world.run_of(db, run)["status"] != "running", f"the end of run {run}")
    return run


def repeated(db: Connection[Any], run: int) -> int:
    """Replay a run to its end; the id of the new one."""
    return ended(db, world.value(db, "select run_id from pgharness.rerun(%s, response_cache => 'replay')", run))


def wait_until(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def made(db: Connection[Any], run: int) -> list[world.Row]:
    """Return all that a run's items are, but for when they were made."""
    notes = "select to_jsonb(n) - '{run_id,created_at}'::text[] as row from pgharness.notes as n where n.run_id = %s order by n.ordinal"
    grades = "select to_jsonb(g) - '{run_id,created_at}'::text[] as row from pgharness.grades as g where g.run_id = %s order by g.note_ordinal, g.ordinal"
    return [row["row"] for query in (notes, grades) for row in world.rows(db, query, run)]


def outcomes(db: Connection[Any], run: int) -> dict[str, int]:
    return dict(
        db.execute("select outcome, count(*) from pgharness.calls where run_id = %s group by 1", (run,)).fetchall()
    )


def test_a_rerun_asks_nobody_and_a_replay_needs_no_network(own: Connection[Any], url: str, vendor: Vendor) -> None:
    db, line = own, CommandLine(url)
    with_key = CommandLine(url, environment={"LOCAL_API_KEY": KEY})
    add_model(db, vendor)
    columns = {"note_replications": REPLICATIONS, "rubrics_per_case": 1, "note_prompt": "{{ input }}"}
    world.add_instance(db, cases=CASES, combinations=[("vendor", "vendor")], **columns)
    first = world.start(db, response_cache="write")
    with_key.work("--concurrency", "50")
    asked = 2 * CASES * REPLICATIONS
    assert vendor.calls == asked and outcomes(db, first) == {"succeeded": asked}
    assert len({json.dumps(row["output"]) for row in made(db, first) if "output" in row}) == CASES * REPLICATIONS

    again = world.value(db, "select run_id from pgharness.rerun(%s)", first)
    with_key.work("--concurrency", "50")
    assert vendor.calls == asked and outcomes(db, again) == {"cached": asked}

    vendor.cut_off()
    replay = world.value(db, "select run_id from pgharness.rerun(%s, response_cache => 'replay')", first)
    line.work("--concurrency", "50")
    assert outcomes(db, replay) == {"cached": asked}

    for run in (again, replay):
        assert world.run_of(db, run)["status"] == "completed"
        assert world.value(db, "select cost_usd from pgharness.cost_by_run where run_id = %s", run) == 0
        assert made(db, run) == made(db, first)
        saved = "select calls_cached, calls_made, saved_usd from pgharness.run_savings where run_id = %s"
        assert world.rows(db, saved, run) == [{"calls_cached": asked, "calls_made": 0, "saved_usd": asked * CALL_USD}]
        assert world.value(db, "select sum(calls_failed) from pgharness.model_performance where run_id = %s", run) == 0
    hits = "select entry_count, hit_count, saved_usd from pgharness.response_savings"
    assert world.rows(db, hits) == [{"entry_count": asked, "hit_count": 2 * asked, "saved_usd": 2 * asked * CALL_USD}]
    assert world.orphans(db) == []


def test_a_crowd_with_one_question_on_two_hosts_asks_once(own: Connection[Any], url: str) -> None:
    """200 cases of the same content, which no worker has begun when the first call ends."""
    db, vendor = own, Vendor(latency=1.0)
    try:
        add_model(db, vendor)
        columns = {"note_prompt": "{{ input }}", "response_cache": "write"}
        world.add_instance(db, cases=200, combinations=[("vendor", None)], **columns)
        db.execute("update pgharness.cases set input = '\"the same\"'")
        line = CommandLine(url, environment={"LOCAL_API_KEY": KEY})
        arguments = ("worker", "--concurrency", "100", "--queues", "note,grade")
        hosts = [line.start(*arguments, stderr=subprocess.DEVNULL) for _ in range(2)]
        try:
            alive = "select count(*) from pgharness.workers where status = 'running'"
            wait_until(lambda: world.value(db, alive) == 2, "two workers")
            run = ended(db, world.start(db))
        finally:
            for host in hosts:
                host.terminate()
            for host in hosts:
                host.communicate(timeout=60)
        assert vendor.calls == 1
        assert outcomes(db, run) == {"succeeded": 1, "cached": 199}
        assert len({json.dumps(row["output"]) for row in made(db, run)}) == 1
        assert world.value(db, "select count(distinct worker_id) from pgharness.calls") == 2
        assert world.rows(db, "select hit_count, saved_usd from pgharness.response_entries") == [
            {"hit_count": 199, "saved_usd": 199 * CALL_USD}
        ]
        assert world.value(db, "select count(*) from pgharness.response_claims") == 0
    finally:
        vendor.cut_off()


def test_replications_and_seeds_are_asked_each_on_its_own(db: Connection[Any], vendor: Vendor) -> None:
    """Two notes of each case, all notes graded twice: equal notes are not graded by the same grade."""
    add_model(db, vendor)
    vendor.stub.answer = None  # every note is the same, and every grade
    columns = {"note_replications": 2, "grade_replications": 2, "rubrics_per_case": 1, "response_cache": "write"}
    world.add_instance(db, cases=2, combinations=[("vendor", "vendor"), ("vendor", None)], **columns)
    ended(db, world.start(db))
    assert vendor.calls == 2 * 2 + 2 * 2 * 2  # both combinations share their notes
    for change, calls in (("seed = 1", 12), ("seed = 0", 0), ("note_prompt = 'Otherwise: {{ input }}'", 4)):
        before = vendor.calls
        db.execute(f"update pgharness.instances set {change}".encode())
        ended(db, world.start(db))
        assert vendor.calls - before == calls, change


def test_only_answers_that_could_be_used_come_again(db: Connection[Any], vendor: Vendor) -> None:
    """The first grade is no good, and the grader is told so; a rerun gets what it said then."""
    add_model(db, vendor)

    def answer(request: Recorded) -> str:
        said = request.body["messages"]
        if request.schema is None:
            return "a note"
        return json.dumps({"verdicts": [{"rationale": "r", "satisfaction": 50 if len(said) > 2 else 500}] * 2})

    vendor.stub.answer = answer
    columns = {"rubrics_per_case": 1, "retry_delay_seconds": 0, "response_cache": "write"}
    world.add_instance(db, cases=1, combinations=[("vendor", "vendor")], **columns)
    first = ended(db, world.start(db))
    assert outcomes(db, first) == {"succeeded": 2, "invalid_output": 1}
    vendor.cut_off()
    replay = repeated(db, first)
    assert outcomes(db, replay) == {"cached": 2}
    assert [row["criteria"] for row in made(db, replay)[1:]] == [row["criteria"] for row in made(db, first)[1:]]


def test_what_a_replay_lacks_fails_and_says_how_to_go_on(db: Connection[Any], vendor: Vendor) -> None:
    add_model(db, vendor)
    world.add_instance(db, cases=3, combinations=[("vendor", None)], response_cache="replay")
    run = ended(db, world.start(db))
    assert vendor.calls == 0 and set(outcomes(db, run)) == {"not_cached"}
    assert world.run_of(db, run)["status"] == "failed"
    failed = world.rows(db, "select cause, error from pgharness.failures where run_id = %s", run)[0]
    assert failed["cause"] == "not_cached"
    assert "no answer of model 'vendor'" in failed["error"] and "response_cache => 'write'" in failed["error"]
    ended(db, world.start(db, response_cache="write"))
    db.execute("select pgharness.retry_failed(%s)", (run,))
    ended(db, run)
    assert world.run_of(db, run)["status"] == "completed" and vendor.calls == 3


def test_a_run_that_reads_takes_what_is_there_and_keeps_nothing(db: Connection[Any], vendor: Vendor) -> None:
    add_model(db, vendor)
    world.add_instance(db, "small", cases=2, combinations=[("vendor", None)], note_prompt="{{ input }}")
    ended(db, world.start(db, "small", response_cache="write"))
    world.add_instance(db, "large", cases=4, combinations=[("vendor", None)], note_prompt="{{ input }}")
    large = ended(db, world.start(db, "large", response_cache="read"))  # its first two cases say the same
    assert outcomes(db, large) == {"cached": 2, "succeeded": 2}
    assert world.value(db, "select count(*) from pgharness.responses") == 2


def test_ensembles_share_their_members_answers(db: Connection[Any], vendor: Vendor) -> None:
    for name in ("a", "b", "c"):
        add_model(db, vendor, name, model=name)
    vendor.stub.answer = "yes"
    add_composite(db, "all", ["a", "b", "c"])
    add_composite(db, "pair", ["c", "b"])
    world.add_instance(db, cases=3, combinations=[("all", None)], response_cache="write")
    first = ended(db, world.start(db))
    assert vendor.calls == 9
    replay = repeated(db, first)
    assert outcomes(db, replay) == {"cached": 3} and made(db, replay) == made(db, first)
    composition = (
        "select composition from pgharness.calls where run_id = %s and parent_started_at is null order by ordinal"
    )
    assert world.rows(db, composition, replay) == world.rows(db, composition, first)

    db.execute("update pgharness.model_combinations set generator = 'pair', name = 'pair'")
    second = ended(db, world.start(db))
    db.execute("update pgharness.model_combinations set generator = 'a', name = 'a'")
    alone = ended(db, world.start(db))
    assert vendor.calls == 9
    assert outcomes(db, second) == {"succeeded": 3, "cached": 6} and outcomes(db, alone) == {"cached": 3}
    add_composite(db, "twice", ["a", "a"])
    db.execute("update pgharness.model_combinations set generator = 'twice', name = 'twice'")
    ended(db, world.start(db))
    assert vendor.calls == 12  # its first sample is known, its second one is another
    entries = dict(db.execute("select model, cost_usd from pgharness.response_savings").fetchall())
    assert entries == {name: 3 * CALL_USD for name in "bc"} | {
        name: calls * CALL_USD for name, calls in {"a": 6, "all": 9, "pair": 6, "twice": 6}.items()
    }


def add_composite(db: Connection[Any], name: str, members: list[str]) -> None:
    db.execute(
        "insert into pgharness.models (name, provider, parameters) values (%s, 'ensemble', %s)",
        (name, json.dumps({"members": members, "vote": "majority"})),
    )


def test_the_command_line_starts_and_repeats_runs_from_the_cache(
    db: Connection[Any], served_url: str, vendor: Vendor
) -> None:
    add_model(db, vendor)
    world.add_instance(db, cases=2, combinations=[("vendor", None)])
    line = CommandLine(served_url)
    started = line.call("start", "trial", "--cache", "write", "--name", "first", "--json")
    ended(db, started.json["run_id"])
    ended(db, line.call("rerun", "first", "--cache", "replay", "--json").json["run_id"])
    assert vendor.calls == 2
    modes = "select response_cache, status from pgharness.runs order by id"
    assert db.execute(modes).fetchall() == [("write", "completed"), ("replay", "completed")]
    assert "always" in line.call("start", "trial", "--cache", "always", status=2).err


CODE = '''
from pgharness import Context, experiment

def ask(ctx: Context, question: str) -> str:
    return ctx.complete_chat("vendor", question).text

@experiment
def asking(ctx: Context):
    """Asks some questions, one of them twice, and lets items of a map ask."""
    twice = [ctx.complete_chat("vendor", "why?").text for _ in range(2)]
    items = ctx.map(ask, ["why?", "how?"])
    fixed = [ctx.complete_chat("vendor", "when?", seed=seed).text for seed in (1, 2)]
    return [*twice, *items, *fixed]

if __name__ == "__main__":
    asking()
'''


def test_code_uses_the_cache_as_its_run_does(own: Connection[Any], url: str, vendor: Vendor, tmp_path: Path) -> None:
    db = own
    add_model(db, vendor)
    (tmp_path / "experiments").mkdir()
    (tmp_path / ".pgharness").write_text('experiments = "experiments"\nproject = "lab"\n')
    script = tmp_path / "experiments" / "asking.py"
    script.write_text(CODE)
    environment = os.environ | {"PGHARNESS_DATABASE_URL": url, "LOCAL_API_KEY": KEY}

    def run(mode: str) -> tuple[Any, dict[str, int]]:
        command = [sys.executable, "-m", "pgharness", "run", "asking", "--script", str(script), "--cache", mode]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == (5 if mode == "replay" and not vendor.calls else 0), done.stderr
        latest = world.value(db, "select max(id) from pgharness.runs")
        result = "select value from pgharness.run_results where run_id = %s and key = 'return'"
        found = world.rows(db, result, latest)
        return found and found[0]["value"], outcomes(db, latest)

    assert run("replay") == ([], {"not_cached": 1})
    first, made_by = run("write")
    assert len(set(first)) == 6 and made_by == {"succeeded": 6}  # each item of a map, and each time, has its own
    assert run("write") == (first, {"cached": 6})
    vendor.cut_off()
    assert run("replay") == (first, {"cached": 6})
    assert world.value(db, "select sum(hit_count) from pgharness.responses") == 12
