"""How runs share workers, and workers share work: turns in the queue, kept grades, work given back, caps."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from psycopg import Connection

from world import (
    add_instance,
    call,
    grade,
    jobs,
    load,
    note,
    ordinals,
    record,
    refused,
    register,
    rows,
    run_of,
    start,
    take,
    value,
    work_off,
)

Database = Connection[Any]
Row = dict[str, Any]


def worker_of(db: Database, *queues: str, pid: int) -> int:
    worker = register(db, pid=pid)
    db.execute("update pgharness.workers set queues = %s where id = %s", (list(queues), worker))
    return worker


def keep(db: Database, worker: int, *outcomes: Row) -> Row:
    """Record outcomes as a worker that keeps the grades of its notes; what it learns of the one run."""
    (state,) = rows(db, "select * from pgharness.record_outcomes(%s, %s, true)", worker, json.dumps(outcomes))
    return state


def taken(db: Database, worker: int) -> Row:
    """Fetch a job and load it as a worker does; its arguments as they are then, with its id."""
    job = take(db, worker)
    assert job is not None
    load(db, worker, job["args"] | {"job_id": job["id"]})
    args = value(db, "select args from procrastinate.procrastinate_jobs where id = %s", job["id"])
    return {**args, "job_id": job["id"]}


def waiting(db: Database, kind: str = "%") -> list[int]:
    return sorted(o for job in jobs(db, kind=kind) for o in ordinals(job))


def die(db: Database, worker: int) -> None:
    db.execute(
        "update pgharness.workers set heartbeat_at = clock_timestamp() - interval '1 hour' where id = %s", (worker,)
    )
    db.execute("select pgharness.sweep()")


# -- turns


def test_a_small_run_that_comes_later_is_not_behind_all_of_a_large_one(tx: Database) -> None:
    add_instance(tx, cases=100, note_replications=100)
    large, worker = start(tx), register(tx)
    for _ in range(20):
        assert take(tx, worker)["args"]["run_id"] == large  # type: ignore[index]
    tx.execute("update pgharness.instances set note_replications = 1")
    small = start(tx)
    order = [take(tx, worker)["args"]["run_id"] for _ in range(70)]  # type: ignore[index]
    ends = max(place for place, run in enumerate(order) if run == small)
    assert order.count(small) == len(jobs(tx, status="doing")) - 20 - order.count(large) == 50
    assert order[: ends + 1].count(large) <= 3


def test_large_runs_of_one_priority_alternate_whatever_the_order_of_their_starts(tx: Database) -> None:
    add_instance(tx, cases=100, note_replications=320)
    runs = [start(tx) for _ in range(3)]
    worker = register(tx)
    order = [take(tx, worker)["args"]["run_id"] for _ in range(60)]  # type: ignore[index]
    assert [order.count(run) for run in runs] == pytest.approx([20, 20, 20], abs=1)


def test_what_waits_of_a_run_moves_in_the_queue_with_its_priority(tx: Database) -> None:
    add_instance(tx, cases=3)
    first, second = start(tx), start(tx)
    tx.execute("select pgharness.adjust_run(%s, priority => 7)", (second,))
    tx.execute("select pgharness.adjust_run(%s)", (second,))
    assert run_of(tx, second)["priority"] == 7
    worker = register(tx)
    order = [take(tx, worker)["args"]["run_id"] for _ in range(6)]  # type: ignore[index]
    assert order == [second] * 3 + [first] * 3
    with refused(tx, "PH001", "987654321"):
        tx.execute("select pgharness.adjust_run(987654321, priority => 7)")
    with refused(tx, "PH002", "priority of a run cannot be"):
        tx.execute("select pgharness.adjust_run(%s, priority => 7000)", (second,))


# -- the size of slices


def test_a_slice_of_slow_calls_does_not_keep_a_worker_busy_for_long(tx: Database) -> None:
    register(tx)  # which has ten calls in flight at a time
    size = "select pgharness._slice_size(%s, %s)"
    assert [value(tx, size, 32_000, seconds) for seconds in (None, 0.0, 0.1, 1.0, 60.0)] == [500, 500, 500, 100, 16]
    assert value(tx, size, 3_000_000, 60.0) == 1000, "or the queue would hold a job a note"


def test_what_a_note_takes_is_seen_from_the_latest_calls_of_its_models(tx: Database) -> None:
    add_instance(tx, cases=2, rubrics_per_case=1, grade_replications=2)
    run, worker = start(tx), register(tx)
    seconds = "select pgharness._item_seconds(%s, %s)"
    assert value(tx, seconds, run, "note") is None
    model = value(tx, "select generator_id from pgharness.run_combinations where run_id = %s", run)  # grades, too
    record(tx, worker, note(run, 0, calls=[call(model_id=model, latency_ms=4000)]))
    record(tx, worker, grade(run, 0, calls=[call(model_id=model, latency_ms=1000)]))
    assert (value(tx, seconds, run, "note"), value(tx, seconds, run, "grade")) == pytest.approx((3 * 2.5, 2.5))


# -- grades that follow their notes


def test_a_worker_that_makes_grades_too_keeps_those_of_its_notes(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    first = taken(tx, worker)
    assert first["keeps_grades"]
    state = keep(tx, worker, note(run, first["first"]))
    assert (state["kept_notes"], waiting(tx, "grade")) == ([first["first"]], [])
    assert keep(tx, worker, note(run, first["first"]))["kept_notes"] == [], "it was recorded before"
    keep(tx, worker, grade(run, first["first"]))
    assert run_of(tx, run)["grades_succeeded"] == 1


def test_grades_that_died_with_their_worker_are_put_back_with_the_notes(tx: Database) -> None:
    add_instance(tx, cases=256, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    job = taken(tx, worker)
    keep(tx, worker, note(run, 0), note(run, 1))
    keep(tx, worker, grade(run, 0))
    die(tx, worker)
    assert job["last"] == 3
    assert waiting(tx, "grade") == [1] and waiting(tx, "note")[:3] == [2, 3, 4]
    work_off(tx, register(tx, pid=2))
    assert run_of(tx, run)["status"] == "completed"


def test_a_slice_that_was_handed_back_brings_the_grades_it_kept(tx: Database) -> None:
    add_instance(tx, cases=128, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    job = taken(tx, worker)
    keep(tx, worker, note(run, 0))
    again = load(tx, register(tx, pid=2), job)
    assert [(item["kind"], item["ordinal"]) for item in again] == [("note", 1), ("grade", 0)]
    assert waiting(tx, "grade") == []


def test_a_worker_for_notes_leaves_the_grades_of_a_slice_to_others(tx: Database) -> None:
    add_instance(tx, cases=128, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    job = taken(tx, worker)
    keep(tx, worker, note(run, 0))
    writer = worker_of(tx, "note", pid=2)
    assert [item["kind"] for item in load(tx, writer, job)] == ["note"]
    assert waiting(tx, "grade") == [0]
    args = value(tx, "select args from procrastinate.procrastinate_jobs where id = %s", job["job_id"])
    assert "keeps_grades" not in args, "or they would be put back as well"


def test_grades_go_to_workers_for_grades_where_there_are_some(tx: Database) -> None:
    add_instance(tx, cases=2, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    worker_of(tx, "grade", pid=2)
    assert keep(tx, worker, note(run, 0))["kept_notes"] is None
    assert waiting(tx, "grade") == [0]


def test_a_note_that_was_under_way_when_its_run_was_queued_anew_has_its_grades_queued(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    for action in ("pause_run", "resume_run"):
        tx.execute(f"select pgharness.{action}(%s)".encode(), (run,))
    state = keep(tx, worker, note(run, 0, epoch=0), note(run, 1, epoch=1))
    assert state["kept_notes"] == [1], "nobody else would make the grades of the other: its new slice finds it done"
    assert waiting(tx, "grade") == [0]


# -- work that is given back


def test_items_that_were_not_begun_go_to_workers_with_nothing_to_do(tx: Database) -> None:
    add_instance(tx, cases=640)
    run, busy = start(tx), register(tx)
    while job := take(tx, busy):
        load(tx, busy, job["args"] | {"job_id": job["id"]})
    idle = register(tx, pid=2)
    beat = "select * from pgharness.heartbeat(%s, '{}', 'running', %s, %s, %s)"
    at_work = [job["id"] for job in jobs(tx, status="doing")]
    assert rows(tx, beat, idle, [], [], 8) == []
    (state,) = rows(tx, beat, busy, [run], at_work, 0)
    assert state["idle_elsewhere"] == 8
    share = "select pgharness.share_slice(%s, %s, %s)"
    assert value(tx, share, busy, job_id := at_work[0], [6, 7, 8, 9]) is True
    assert waiting(tx) == [6, 7, 8, 9] and len(jobs(tx)) == 4
    (state,) = rows(tx, beat, busy, [run], at_work, 0)
    assert state["idle_elsewhere"] == 0, "the queue has something for them"
    assert value(tx, share, busy, job_id, [6]) is False, "they are not its own any more"
    assert value(tx, share, idle, job_id, [5]) is False
    die(tx, busy)
    assert waiting(tx) == list(range(640)), "each once"


# -- caps


def test_workers_never_hold_more_calls_of_a_run_than_it_may_have_together(tx: Database) -> None:
    add_instance(tx, cases=2)
    run = start(tx, max_concurrency=5)
    workers = {register(tx, pid=pid): 0 for pid in range(4)}
    rng = random.Random(4)
    for _ in range(200):
        worker = rng.choice(list(workers))
        in_use = rng.randint(0, workers[worker])
        (lease,) = rows(tx, "select * from pgharness.lease_run(%s, %s, %s, %s)", worker, run, in_use, rng.randint(0, 6))
        workers[worker] = lease["granted"]
        assert lease["max_concurrency"] == 5 and sum(workers.values()) <= 5
    tx.execute("select pgharness.adjust_run(%s, max_concurrency => 0)", (run,))
    (lease,) = rows(tx, "select * from pgharness.lease_run(%s, %s, 0, 70)", next(iter(workers)), run)
    assert (lease["granted"], lease["max_concurrency"]) == (70, None)
    with refused(tx, "PH002", "max_concurrency of a run cannot be"):
        start(tx, max_concurrency=-1)
