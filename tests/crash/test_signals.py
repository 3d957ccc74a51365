"""What a worker promises to those who stop it, and what a run promises to those who pause or cancel it.

SIGTERM drains, a second one aborts, kill -9 of a supervisor or of a worker loses nothing; a cancelled run's calls end
within 2 seconds on every host; a paused run's calls end by themselves.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import psycopg
import pytest


def ask_slowly(lab: Any, stub: Any, *, cases: int, seconds: float | None = None, name: str = "trial") -> int:
    """Start a run of notes by a model that takes so many seconds, or for ever."""
    stub.always = "slow" if seconds is None else None
    stub._latency = seconds or 0.0
    base_url = stub.base_url("openai_compatible")
    lab.model(f"vendor-{name}", "openai_compatible", model="m", base_url=base_url, timeout_seconds=60)
    lab.instance(name, cases=cases, generator=f"vendor-{name}")
    run_id: int = lab.start(name)
    return run_id


def asked(lab: Any) -> dict[str, int]:
    return dict(lab.rows("select outcome, count(*) from pgharness.calls group by 1"))


def jobs(lab: Any) -> dict[str, int]:
    return dict(lab.rows("select status::text, count(*) from procrastinate.procrastinate_jobs group by 1"))


def assert_drained(lab: Any, stub: Any) -> None:
    """Every call that was made is recorded, and the rest is in the queue, for anybody to take at once."""
    made = len(stub.requests)
    assert asked(lab) == {"succeeded": made}
    assert lab.value("select count(*) from pgharness.notes") == made
    assert set(jobs(lab)) == {"todo"}
    assert lab.value(
        "select bool_and(scheduled_at is null or scheduled_at <= now()) from procrastinate.procrastinate_jobs"
    )
    assert set(lab.rows("select status from pgharness.workers")) == {("stopped",)}
    lab.assert_consistent()


def test_sigterm_drains_even_when_every_process_gets_it_twice(lab: Any, stub: Any) -> None:
    """As from a service manager, which tells all processes of a service, and the supervisor passes it on."""
    group = lab.workers(1, concurrency=5)
    ask_slowly(lab, stub, cases=30, seconds=1.0)
    lab.wait(lambda: stub.in_flight == 5, "5 calls in flight")
    os.killpg(group.pid, signal.SIGTERM)
    assert group.wait(8) == 0
    assert len(stub.requests) == 5 and stub.disconnects == 0
    assert_drained(lab, stub)


def test_a_second_sigterm_aborts_the_calls_in_flight(lab: Any, stub: Any) -> None:
    group = lab.workers(1, concurrency=5)
    ask_slowly(lab, stub, cases=30)
    lab.wait(lambda: stub.in_flight == 5, "5 calls in flight")
    group.signal(signal.SIGTERM)
    lab.wait(lambda: lab.rows("select status from pgharness.workers") == [("draining",)], "worker to drain")
    assert group.process.poll() is None and stub.disconnects == 0
    group.signal(signal.SIGTERM)
    assert group.wait(5) == 0
    lab.wait(lambda: stub.disconnects == 5, "5 disconnects")
    assert asked(lab) == {"cancelled": 5}
    assert set(jobs(lab)) == {"todo"}
    lab.assert_consistent()


def test_sigterm_ends_a_supervisor_that_waits_to_replace_a_process(lab: Any) -> None:
    group = lab.workers(1)
    for _ in range(4):  # each dies young, so that the next one is started later
        lab.wait(lambda: group.children, "a process")
        for pid in group.children:
            os.kill(pid, signal.SIGKILL)
        lab.wait(lambda: not group.children, "no process")
    group.signal(signal.SIGTERM)
    assert group.wait(10) == 0
    lab.wait(lambda: group.members == [], "what helps to start processes to end", 10)


def test_workers_whose_supervisor_was_killed_drain_by_themselves(lab: Any, stub: Any) -> None:
    group = lab.workers(2, concurrency=3)
    ask_slowly(lab, stub, cases=60, seconds=1.0)
    lab.wait(lambda: stub.in_flight == 6, "6 calls in flight")
    group.signal(signal.SIGKILL)
    lab.wait(lambda: group.members == [], "the processes to end", 10)
    assert stub.disconnects == 0 and len(stub.requests) < 60
    assert_drained(lab, stub)


def test_a_worker_that_was_killed_is_reported_and_replaced_and_its_work_put_back(lab: Any, stub: Any) -> None:
    group = lab.workers(2, concurrency=3, PGHARNESS_STALE_SECONDS="60")  # so that only the report can tell
    run_id = ask_slowly(lab, stub, cases=40, seconds=0.2)
    lab.wait(lambda: stub.in_flight == 6, "6 calls in flight")
    victim = lab.at_work(group)[0]
    os.kill(victim, signal.SIGKILL)
    lab.wait(
        lambda: lab.rows("select status from pgharness.workers where pid = %s", victim) == [("lost",)], "report", 5
    )
    lab.wait(lambda: len(lab.at_work(group)) == 2, "replacement")
    assert victim not in lab.at_work(group)
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    assert len(stub.requests) <= 40 + 3


def test_cancel_aborts_running_calls_within_2_seconds_on_every_host_and_pause_lets_them_end(
    lab: Any, stub: Any
) -> None:
    groups = [lab.workers(1, concurrency=5, waits=False) for _ in range(2)]
    for group in groups:
        lab.wait(lambda group=group: lab.at_work(group), "worker", group=group)
    cancelled = ask_slowly(lab, stub, cases=40, name="cancelled")
    lab.wait(lambda: stub.in_flight == 10, "10 calls in flight")
    lab.db.execute("select pgharness.cancel_run(%s)", (cancelled,))
    cancelled_at = time.monotonic()
    lab.wait(lambda: stub.disconnects == 10, "10 disconnects", 5)
    assert time.monotonic() - cancelled_at < 2
    lab.wait(lambda: asked(lab) == {"cancelled": 10}, "the aborted calls on record")
    lab.wait_for_quiet_queue()
    lab.assert_consistent()
    assert len(stub.requests) == 10 and lab.value("select count(*) from pgharness.notes") == 0

    stub.requests.clear()
    paused = ask_slowly(lab, stub, cases=24, seconds=1.0, name="paused")
    lab.wait(lambda: stub.in_flight == 10, "10 calls in flight")
    lab.db.execute("select pgharness.pause_run(%s)", (paused,))
    lab.wait(lambda: lab.value("select count(*) from pgharness.notes") == 10, "the calls in flight to end")
    lab.wait_for_quiet_queue()
    lab.assert_consistent()
    assert len(stub.requests) == 10 and stub.disconnects == 10, "a paused run started calls, or lost some"
    lab.db.execute("select pgharness.resume_run(%s)", (paused,))
    lab.wait(lambda: stub.in_flight == 10, "10 more calls in flight")
    for change in ("pause_run", "resume_run") * 3:  # faster than a worker can follow
        lab.db.execute(f"select pgharness.{change}(%s)".encode(), (paused,))
    lab.wait_for_end(paused)
    lab.assert_complete(paused)
    lab.wait_for_quiet_queue()
    assert len(stub.requests) <= 24 + 10, "more was repeated than the other worker could have had in flight"


def test_a_race_between_cancel_and_finish_leaves_no_orphan(lab: Any) -> None:
    lab.simulator()
    lab.instance(cases=2, generator="sim", grader="sim")
    lab.workers(2)
    rng, ended = random.Random(11), {"completed": 0, "cancelled": 0}
    done = "select notes_succeeded + grades_succeeded from pgharness.runs where id = %s"
    for round_ in range(60):
        run_id = lab.start()
        wanted = rng.randrange(7)  # of 2 notes and 4 grades
        lab.wait(lambda run_id=run_id, wanted=wanted: lab.value(done, run_id) >= wanted, f"{wanted} items")
        try:
            lab.db.execute("select pgharness.cancel_run(%s)", (run_id,))
        except psycopg.Error as exc:
            assert exc.sqlstate == "PH003", exc
        ended[lab.value("select status from pgharness.runs where id = %s", run_id)] += 1
        if round_ % 20 == 0:  # and one that comes back to life while its last outcomes arrive
            lab.db.execute("select pgharness.cancel_run(%s)", (again := lab.start(),))
            lab.db.execute("select pgharness.resume_run(%s)", (again,))
            lab.wait_for_end(again)
            lab.assert_complete(again)
    assert min(ended.values()) > 5, f"not much of a race: {ended}"
    lab.wait_for_quiet_queue()
    lab.assert_consistent()
    for table in ("notes", "grades"):
        late = f"from pgharness.{table} as x join pgharness.runs as r on r.id = x.run_id where x.created_at > r.finished_at"
        assert lab.value(f"select count(*) {late}") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_idle_workers_end_at_once(lab: Any, number: signal.Signals) -> None:
    group = lab.workers(2)
    os.killpg(group.pid, number)
    assert group.wait(5) == 0
    assert set(lab.rows("select status from pgharness.workers")) == {("stopped",)}
