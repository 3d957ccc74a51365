"""Batches from end to end: a run in SQL alone with workers, and every turn of the cycle by a scripted clock.

The vendor is a real HTTP server that counts what it bills; the harness's clock is a table, so that hours pass at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import world
from command_line import CommandLine
from pgharness.database import Database
from pgharness.execution import Batches
from pgharness.gateway import Gateway
from pgharness.types import ItemKind
from stub_batches import BatchVendor, serving
from stub_provider import CACHED_TOKENS, INPUT_TOKENS, OUTPUT_TOKENS

KEY = "sk-batches-9f8e7d6c5b4a"
KEYS = {name: KEY for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY")}
PROVIDERS = ("openai", "openai_responses", "anthropic")
DAY = 86_400
# 100 fresh and 20 cached tokens in, 30 out, at 10, 1 and 40 USD per million
CALL_USD = ((INPUT_TOKENS - CACHED_TOKENS) * 10 + CACHED_TOKENS * 1 + OUTPUT_TOKENS * 40) / 1e6


@pytest.fixture
def vendor() -> Iterator[BatchVendor]:
    with serving() as served:
        yield served
        assert served.problems == []


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def define(db: world.Database, vendor: BatchVendor, provider: str, **columns: Any) -> None:
    """Insert a model of a vendor, named by its provider."""
    fields = {"name": provider, "provider": provider, "model": "m", "base_url": vendor.base_url(provider)}
    fields |= {"input_usd_per_million": 10, "cached_input_usd_per_million": 1, "output_usd_per_million": 40} | columns
    marks = ", ".join(["%s"] * len(fields))
    db.execute(f"insert into pgharness.models ({', '.join(fields)}) values ({marks})".encode(), list(fields.values()))


class Cycle:
    """A database whose clock is scripted, a vendor, and a worker that is driven step by step."""

    def __init__(self, url: str, vendor: BatchVendor, folder: Path) -> None:
        self.url = url
        self.vendor = vendor
        self.folder = folder
        self.db: world.Database = psycopg.connect(url, autocommit=True)
        self.db.execute("create table public.clock (at timestamptz); insert into public.clock values ('2026-01-01Z')")
        self.db.execute(
            "create or replace function pgharness.clock() returns timestamptz language sql stable"
            " set search_path = pgharness, pg_temp as 'select c.at from public.clock as c'"
        )
        self.worker = self.hire()
        self.live: list[world.Row] = []
        self._runner = asyncio.Runner()
        self._pool: Database | None = None
        self._gateway: Gateway

    def hire(self) -> int:
        """Register another worker."""
        return world.register(self.db, pid=int(time.monotonic_ns() % 1_000_000))

    def lose(self) -> None:
        """Let the worker count as dead, and hire another."""
        self.db.execute("update pgharness.workers set status = 'lost' where id = %s", (self.worker,))
        self.worker = self.hire()

    def start(
        self,
        provider: str = "openai",
        *,
        cases: int = 4,
        grader: str | None = None,
        deadline: float = DAY,
        **columns: Any,
    ) -> int:
        define(self.db, self.vendor, provider)
        combinations = [(provider, grader)]
        options = {"batch_deadline_seconds": deadline, "retry_delay_seconds": 0, "failure_threshold": 1} | columns
        world.add_instance(self.db, cases=cases, combinations=combinations, **options)
        return world.start(self.db)

    def advance(self, seconds: float) -> None:
        self.db.execute("update public.clock set at = at + make_interval(secs => %s)", (seconds,))

    def slices(self) -> list[world.Row]:
        """Take the slices that are due; return the items that they leave for live calls."""
        live = []
        while (job := world.take(self.db, self.worker)) is not None:
            live += world.load(self.db, self.worker, job["args"])
            world.finish(self.db, job)
        return live

    def steps(self, most: int = 100) -> int:
        """Take the steps of batches that are due; return how many."""
        return self._runner.run(self._steps(most))

    async def _steps(self, most: int) -> int:
        if self._pool is None:
            self._pool, self._gateway = Database(self.url), Gateway(cache_root=self.folder)
            await self._pool.open()
        kinds: list[ItemKind] = ["note", "grade"]
        batches = Batches(self._pool, self._gateway, worker_id=self.worker, kinds=kinds, settle_seconds=30)
        count = 0
        while count < most and (row := await batches.next()) is not None:
            await batches.step(row)
            count += 1
        await batches.close()
        return count

    async def _close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
            await self._gateway.aclose()

    def close(self) -> None:
        self._runner.run(self._close())
        self._runner.close()
        self.db.close()

    def gather(self) -> list[world.Row]:
        """Gather what the queue holds and let it lie long enough for its batches to be closed."""
        live = self.slices()
        self.advance(3)
        return live

    def run(self, most: int = 50, *, seconds: float = 60) -> None:
        """Do as workers do, a minute at a time, until the run has ended; items that go live are kept in `live`."""
        for _ in range(most):
            self.live += self.gather()
            self.steps()
            if world.value(self.db, "select count(*) from pgharness.runs where status = 'running'") == 0:
                return
            self.advance(seconds)
        raise AssertionError(f"the run does not end: {self.batches()}")

    def batches(self) -> list[world.Row]:
        return world.rows(self.db, "select * from pgharness.batches_progress order by batch_id")

    def states(self) -> list[str]:
        return [batch["status"] for batch in self.batches()]

    def calls(self) -> list[world.Row]:
        return world.rows(self.db, "select * from pgharness.calls order by id")

    def assert_complete(self) -> None:
        """Check that every note is there once, and that none was billed twice."""
        notes = world.value(self.db, "select count(distinct output) from pgharness.notes")
        planned = world.value(self.db, "select max(note_count) from pgharness.runs")
        assert notes == planned == world.value(self.db, "select min(notes_succeeded) from pgharness.runs")
        assert set(self.vendor.billed.values()) <= {1}
        assert world.value(self.db, "select count(*) from pgharness.batch_items") == 0
        assert world.orphans(self.db) == []


@pytest.fixture
def cycle(url: str, vendor: BatchVendor, tmp_path: Path) -> Iterator[Cycle]:
    made = Cycle(url, vendor, tmp_path)
    yield made
    made.close()


# -- the way it should go


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_run_asks_in_one_batch_a_kind_at_half_the_price(cycle: Cycle, provider: str) -> None:
    run = cycle.start(provider, grader=provider, rubrics_per_case=1)
    cycle.run()

    cycle.assert_complete()
    batches = [(each["kind"], each["status"], each["requests"], each["succeeded"]) for each in cycle.batches()]
    assert batches == [("note", "collected", 4, 4), ("grade", "collected", 4, 4)]
    assert (cycle.live, cycle.vendor.live) == ([], Counter())
    calls = cycle.calls()
    assert {float(call["cost_usd"]) for call in calls} == {CALL_USD / 2}
    assert {(call["outcome"], call["attempt"], call["http_status"]) for call in calls} == {("succeeded", 1, 200)}
    assert [call["batch_id"] for call in calls] == [1] * 4 + [2] * 4
    assert all(call["request_id"] for call in calls)
    note = cycle.batches()[0]
    assert {call["latency_ms"] for call in calls[:4]} == {
        (note["ended_at"] - note["submitted_at"]).total_seconds() * 1000
    }
    cost = world.value(cycle.db, "select cost_usd from pgharness.cost_by_run where run_id = %s", run)
    assert float(cost) == pytest.approx(8 * CALL_USD / 2)


def test_what_a_vendor_keeps_is_deleted_once_it_is_recorded(cycle: Cycle) -> None:
    cycle.start()
    cycle.run()
    assert cycle.vendor.files == {}
    assert cycle.vendor.log.count("delete") == 3


def test_the_next_look_comes_later_and_later_until_the_deadline(cycle: Cycle) -> None:
    cycle.vendor.polls_to_end = 1_000
    cycle.start(deadline=7_200)
    cycle.gather()
    waits = []
    while cycle.states() != ["cancelled"]:
        cycle.steps()
        if (
            wait := world.value(
                cycle.db, "select extract(epoch from due_at - pgharness.clock()) from pgharness.batches"
            )
        ) > 0:
            waits.append(float(wait))
            cycle.advance(float(wait))
    assert waits[:4] == [10, 10, 15, 22.5]
    assert max(waits) == 300
    assert sum(waits) == pytest.approx(7_200 - 3, abs=1)


def test_slices_of_a_run_gather_in_one_batch_until_nothing_comes_any_more(cycle: Cycle) -> None:
    cycle.start(cases=300)
    job = world.take(cycle.db, cycle.worker)
    assert job is not None
    assert world.load(cycle.db, cycle.worker, job["args"]) == []
    cycle.advance(10)
    assert cycle.steps() == 0  # other slices are still to come
    assert cycle.states() == ["planned"]
    world.finish(cycle.db, job)
    cycle.gather()
    cycle.steps()
    assert [(each["status"], each["requests"]) for each in cycle.batches()] == [("submitted", 300)]


def test_models_without_batches_are_asked_live_beside_those_that_have_them(cycle: Cycle) -> None:
    define(cycle.db, cycle.vendor, "openai")
    define(cycle.db, cycle.vendor, "anthropic", has_batches=False)
    combinations = [("openai", None), ("anthropic", None), ("simulator", None)]
    world.add_instance(cycle.db, cases=3, combinations=combinations, batch_deadline_seconds=DAY)
    world.start(cycle.db)
    live = cycle.gather()
    assert Counter(item["combination_number"] for item in live) == {1: 3, 2: 3}
    assert [(each["model"], each["requests"]) for each in cycle.batches()] == [("openai", 3)]


def test_a_run_may_be_started_live_whatever_its_instance_says(cycle: Cycle) -> None:
    define(cycle.db, cycle.vendor, "openai")
    world.add_instance(cycle.db, cases=3, combinations=[("openai", None)], batch_deadline_seconds=DAY)
    world.start(cycle.db, batch_deadline_seconds=0)
    assert len(cycle.gather()) == 3
    world.start(cycle.db, batch_deadline_seconds=60)
    assert cycle.gather() == []


# -- what goes wrong in it


@pytest.mark.parametrize("provider", PROVIDERS)
def test_requests_that_failed_are_tried_again_and_those_that_expired_cost_no_attempt(
    cycle: Cycle, provider: str
) -> None:
    fates = {"input 1": "errored", "input 2": "expired"}

    def fate(question: str, times_asked: int) -> Any:
        return fates.get(question.split("\n")[-1].strip(), "succeeded") if times_asked == 1 else "succeeded"

    cycle.vendor.fate = lambda question, times: fate(question, times)
    cycle.start(provider, note_prompt="{{ input }}")
    cycle.run()

    cycle.assert_complete()
    first, *later = cycle.batches()
    assert (first["succeeded"], first["failed"], first["unanswered"]) == (2, 1, 1)
    assert sum(each["succeeded"] for each in later) == 2
    attempts = world.rows(cycle.db, "select ordinal, attempts from pgharness.notes order by ordinal")
    assert [row["attempts"] for row in attempts] == [2, 1, 1, 1]
    assert Counter(call["outcome"] for call in cycle.calls()) == {"succeeded": 4, "server_error": 1}


def test_a_request_that_the_vendor_rejects_fails_for_good(cycle: Cycle) -> None:
    cycle.vendor.fate = lambda question, times: "rejected" if question == "input 3" else "succeeded"
    cycle.start(note_prompt="{{ input }}")
    cycle.run()
    failed = world.rows(cycle.db, "select status, cause, attempts from pgharness.failures")
    assert failed == [{"status": "failed", "cause": "rejected", "attempts": 1}]


def test_an_answer_that_cannot_be_used_is_shown_to_the_model_in_the_next_batch(cycle: Cycle) -> None:
    answers = iter(["", "", "", ""])
    cycle.vendor.answer = lambda question: next(answers, "a note")
    cycle.start(cases=4)
    cycle.run()
    calls = cycle.calls()
    assert Counter(call["outcome"] for call in calls) == {"invalid_output": 4, "succeeded": 4}
    assert {float(call["cost_usd"]) for call in calls} == {CALL_USD / 2}  # what was of no use is billed as well


def test_at_the_deadline_the_batch_is_cancelled_and_what_it_lacks_is_asked_live(cycle: Cycle) -> None:
    cycle.vendor.polls_to_end = 1_000_000
    cycle.vendor.done_before_cancel = 3
    cycle.start(cases=5, deadline=3_600)
    cycle.gather()
    cycle.steps()
    cycle.advance(3_600)
    for _ in range(3):
        cycle.steps()
        cycle.advance(30)
    (batch,) = cycle.batches()
    assert (batch["status"], batch["succeeded"], batch["unanswered"]) == ("cancelled", 3, 2)
    live = cycle.gather()
    assert len(live) == 2
    assert {item["tries"] for item in live} == {0}
    assert len(cycle.vendor.billed) == 3


def test_a_vendor_that_never_ends_a_batch_does_not_hold_up_the_run(cycle: Cycle) -> None:
    cycle.vendor.refusals["poll"] = cycle.vendor.refusals["cancel"] = [503] * 1_000
    cycle.start(deadline=3_600)
    cycle.gather()
    cycle.steps()
    cycle.advance(3_600)
    cycle.steps()
    assert cycle.gather() == []
    cycle.advance(3_700)
    cycle.steps()
    assert cycle.states() == ["cancelled"]
    assert len(cycle.gather()) == 4


def test_a_batch_that_the_vendor_will_not_have_goes_live_and_no_other_is_tried(cycle: Cycle) -> None:
    cycle.vendor.refusals["upload:before"] = [404]
    cycle.start()
    assert cycle.gather() == []
    cycle.steps()
    (batch,) = cycle.batches()
    assert batch["status"] == "failed"
    assert "404" in batch["error"]
    assert len(cycle.gather()) == 4
    warned = world.value(cycle.db, "select message from pgharness.run_log where level = 'warning'")
    assert "batch 1 of notes is failed" in warned


def test_a_batch_that_is_one_too_many_for_now_is_submitted_again_later(cycle: Cycle) -> None:
    cycle.vendor.validation_errors = ["token_limit_exceeded"]
    cycle.start()
    cycle.run()
    cycle.assert_complete()
    (batch,) = cycle.batches()
    assert batch["status"] == "collected"
    assert len(cycle.vendor.batches) == 2
    assert [step for step in cycle.vendor.log if step.startswith("upload")] == ["upload:before", "upload:after"]


def test_a_batch_that_fails_its_validation_goes_live(cycle: Cycle) -> None:
    cycle.vendor.validation_errors = ["model_not_found"]
    cycle.start()
    cycle.gather()
    cycle.steps()
    cycle.advance(30)
    cycle.steps()
    assert cycle.states() == ["failed"]
    assert len(cycle.gather()) == 4


def test_trouble_on_the_way_is_tried_again(cycle: Cycle) -> None:
    for step in ("upload:before", "create:before", "poll", "results"):
        cycle.vendor.refusals[step] = [500, 503, 429]
    cycle.start()
    cycle.run()
    cycle.assert_complete()
    assert len(cycle.vendor.batches) == 1


def test_a_prompt_that_cannot_be_made_fails_its_item_alone(cycle: Cycle) -> None:
    cycle.start(note_prompt="{{ input }} {{ 1 // (replication - 1) }}", note_replications=2)
    cycle.run()
    assert world.value(cycle.db, "select count(*) from pgharness.failures where status = 'failed'") == 4
    assert [each["requests"] for each in cycle.batches()] == [4]


def test_what_does_not_fit_into_one_file_goes_into_several(cycle: Cycle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgharness.gateway.batching.OpenAIBatches.most_bytes", 1_200)
    cycle.start(cases=12, note_prompt="{{ input }} " + "x" * 200)
    cycle.run()
    cycle.assert_complete()
    sizes = [each["requests"] for each in cycle.batches()]
    assert len(sizes) > 2
    assert sum(sizes) == 12
    assert all(len(content) <= 1_200 for _, content in cycle.vendor.files.values())


def test_what_the_response_cache_has_is_not_asked_and_what_a_batch_gives_goes_there(cycle: Cycle) -> None:
    cycle.start(note_prompt="{{ input }}", response_cache="write")
    cycle.run()
    assert len(cycle.vendor.billed) == 4
    cycle.db.execute("select pgharness.rerun(1)")
    cycle.run()
    cycle.assert_complete()
    assert len(cycle.vendor.batches) == 1
    assert Counter(call["outcome"] for call in cycle.calls()) == {"succeeded": 4, "cached": 4}


# -- the run is stopped


def test_a_cancelled_run_is_cancelled_at_the_vendor_and_pays_for_what_was_done(cycle: Cycle) -> None:
    cycle.vendor.polls_to_end = 1_000_000
    cycle.vendor.done_before_cancel = 1
    run = cycle.start()
    cycle.gather()
    cycle.steps()
    cycle.db.execute("select pgharness.cancel_run(%s)", (run,))
    assert cycle.steps() > 0  # at once
    cycle.advance(60)
    cycle.steps()
    assert cycle.states() == ["cancelled"]
    assert [held.is_cancelled for held in cycle.vendor.batches.values()] == [True]
    assert (len(cycle.calls()), world.value(cycle.db, "select count(*) from pgharness.notes")) == (1, 0)
    cycle.db.execute("select pgharness.resume_run(%s)", (run,))
    cycle.vendor.polls_to_end = 1
    cycle.run()
    assert world.value(cycle.db, "select notes_succeeded from pgharness.runs") == 4
    assert world.orphans(cycle.db) == []


def test_a_paused_run_collects_what_was_submitted_and_plans_nothing_more(cycle: Cycle) -> None:
    run = cycle.start(grader="openai", rubrics_per_case=1)
    cycle.gather()
    cycle.steps()
    cycle.db.execute("select pgharness.pause_run(%s)", (run,))
    cycle.advance(30)
    cycle.steps()
    assert cycle.states() == ["collected"]
    assert world.value(cycle.db, "select notes_succeeded from pgharness.runs") == 4
    assert cycle.gather() == []
    cycle.db.execute("select pgharness.resume_run(%s)", (run,))
    cycle.run()
    cycle.assert_complete()


def test_items_that_were_only_gathered_go_back_when_the_run_pauses(cycle: Cycle) -> None:
    run = cycle.start()
    cycle.gather()
    cycle.db.execute("select pgharness.pause_run(%s)", (run,))
    cycle.steps()
    assert (cycle.states(), cycle.vendor.log) == (["cancelled"], [])
    cycle.db.execute("select pgharness.resume_run(%s)", (run,))
    cycle.run()
    cycle.assert_complete()


def test_items_in_a_batch_are_queued_by_nobody_else(cycle: Cycle) -> None:
    run = cycle.start()
    cycle.gather()
    cycle.db.execute("select pgharness.requeue_run(%s)", (run,))
    assert cycle.gather() == []
    cycle.steps()
    cycle.db.execute("select pgharness.requeue_run(%s)", (run,))
    assert cycle.gather() == []
    assert world.value(cycle.db, "select pgharness.sweep('1 second')") == 0
    assert (
        world.rows(cycle.db, "select * from pgharness.stalled_work where problem not like 'no running worker%%'") == []
    )
    cycle.run()
    cycle.assert_complete()


# -- somebody dies


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_batch_whose_beginning_nobody_heard_of_is_found_again(cycle: Cycle, provider: str) -> None:
    cycle.vendor.refusals["create:after"] = [500]  # it was begun all the same
    cycle.start(provider)
    cycle.run(seconds=20)
    cycle.assert_complete()
    assert len(cycle.vendor.batches) == 1
    assert cycle.vendor.log.count("create:before") == 1


def test_a_file_whose_upload_nobody_heard_of_is_used(cycle: Cycle) -> None:
    cycle.vendor.refusals["upload:after"] = [500]
    cycle.start()
    cycle.run()
    cycle.assert_complete()
    assert cycle.vendor.log.count("upload:before") == 1


def test_a_batch_that_looks_like_ours_and_is_not_is_left_alone(cycle: Cycle) -> None:
    cycle.vendor.refusals["create:before"] = [500]
    cycle.start("anthropic")
    now = world.value(cycle.db, "select pgharness.clock()")
    foreign = cycle.vendor.plant("anthropic", 4, now)
    cycle.run(seconds=20)
    cycle.assert_complete()
    assert world.value(cycle.db, "select foreign_ids from pgharness.batches") == [foreign]
    assert not cycle.vendor.batches[foreign].is_cancelled
    assert len(cycle.vendor.batches) == 2


def test_a_worker_that_was_taken_for_dead_does_not_go_on(cycle: Cycle) -> None:
    cycle.start()
    cycle.gather()
    old = cycle.worker
    held = world.value(cycle.db, "select pgharness.next_batch(%s, '{note}')", old)
    cycle.lose()
    assert cycle.steps() == 1
    with world.refused(cycle.db, "PH005", f"batch {held['id']} is not held by worker {old}"):
        cycle.db.execute("select pgharness.begin_submission(%s, %s, 4)", (old, held["id"]))


def test_an_answer_counts_once_however_often_it_is_collected(cycle: Cycle) -> None:
    cycle.start()
    cycle.gather()
    outcome = world.note(1, 0, batch_id=1, calls=[world.call()])
    world.record(cycle.db, cycle.worker, outcome)
    world.record(cycle.db, cycle.worker, outcome | {"calls": [world.call()]})
    assert len(cycle.calls()) == 1
    assert cycle.batches()[0]["succeeded"] == 1


# -- SQL alone


def hurried(db: world.Database) -> None:
    """Make what is due later due now: tests do not wait for a vendor's hours."""
    db.execute("update pgharness.batches set due_at = now() where finished_at is null and due_at > now()")


def wait(db: world.Database, condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, world.rows(db, "select * from pgharness.batches_progress")
        hurried(db)
        time.sleep(0.05)


def test_a_run_in_sql_alone(url: str, vendor: BatchVendor) -> None:
    vendor.fate = lambda question, times: "errored" if "input 7" in question and times == 1 else "succeeded"
    command = CommandLine(url, environment=KEYS)
    with psycopg.connect(url, autocommit=True) as db:
        define(db, vendor, "openai")
        define(db, vendor, "anthropic")
        world.add_instance(
            db,
            cases=20,
            combinations=[("openai", "anthropic"), ("anthropic", "exact_match")],
            rubrics_per_case=1,
            retry_delay_seconds=0,
            batch_deadline_seconds=DAY,
        )
        run = world.start(db)
        worker = command.start("worker", "--exit-when-idle", "--workers", "2")
        try:
            wait(db, lambda: world.run_of(db, run)["finished_at"])
            worker.wait(30)
        finally:
            worker.kill()
            print(worker.communicate()[1])
        assert world.run_of(db, run)["status"] == "completed"
        assert vendor.live == {}
        assert set(vendor.billed.values()) == {1}
        progress = world.rows(
            db, "select kind, model, sum(succeeded) as done from pgharness.batches_progress group by 1, 2"
        )
        assert {(row["kind"], row["model"]): row["done"] for row in progress} == {
            ("note", "openai"): 20,
            ("note", "anthropic"): 20,
            ("grade", "anthropic"): 20,
        }
        spent = world.value(db, "select cost_usd from pgharness.cost_by_run where run_id = %s", run)
        assert float(spent) == pytest.approx(60 * CALL_USD / 2)
        assert world.orphans(db) == []
        logged = [row["message"] for row in world.rows(db, "select message from pgharness.run_log order by id")]
        assert sum("submitted" in message for message in logged) >= 3


def test_the_command_line_starts_a_run_with_a_deadline(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        world.add_instance(db, cases=1)
        CommandLine(url).run("start", "trial", "--batch-deadline", "3600")
        CommandLine(url).run("start", "trial")
        deadlines = world.rows(db, "select batch_deadline_seconds from pgharness.runs order by id")
        assert [row["batch_deadline_seconds"] for row in deadlines] == [3_600, None]
