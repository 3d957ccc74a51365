"""A real worker sums up what is settled of a run, unasked."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import psycopg
from psycopg import Connection

from command_line import CommandLine
from world import add_instance, rows, run_of, start, value

CASES, REPLICATIONS = 100, 251
LEFT = CASES  # notes, of the last replication


def nearly_done(db: Connection[Any]) -> int:
    """Make a run of 25,100 notes with two grades each of which the last replication is left to do; return its id."""
    add_instance(db, cases=CASES, note_replications=REPLICATIONS)
    run, notes = start(db), CASES * REPLICATIONS
    written = notes - LEFT
    db.execute(
        "insert into pgharness.notes (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output)"
        " select %s, o, p.case_number, p.combination_number, p.overlap, p.replication, 1, '\"\"'"
        " from pgharness.run_definitions as d cross join generate_series(0, %s - 1) as o cross join lateral pgharness._note_place(d, o) as p",
        (run, written),
    )
    db.execute(
        "insert into pgharness.grades (run_id, note_ordinal, rubric_number, replication, ordinal, rubric_id, attempts, score, max_score)"
        " select n.run_id, n.ordinal, rr.number, 1, n.ordinal * 2 + rr.number - 1, rr.rubric_id, 1, (n.ordinal * 7 + rr.number) % 100, 100"
        " from pgharness.notes as n join pgharness.run_rubrics as rr on rr.run_id = n.run_id and rr.case_number = n.case_number"
    )
    db.execute("update pgharness.runs set notes_succeeded = %s, grades_succeeded = %s", (written, 2 * written))
    db.execute("select pgharness.requeue_run(%s)", (run,))
    return run


def test_a_worker_settles_the_run_that_it_works_on(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        run = nearly_done(db)
        worker = CommandLine(url).start("worker", "--queues", "note,grade", "--concurrency", "100")
        try:
            deadline = time.monotonic() + 60
            while not run_of(db, run)["settled_notes"] or run_of(db, run)["status"] == "running":
                assert time.monotonic() < deadline and worker.poll() is None, worker.communicate()
                threading.Event().wait(0.05)
        finally:
            worker.send_signal(signal.SIGTERM)
            _, said = worker.communicate(timeout=30)
        assert "settled" not in said  # nor that it could not be
        settled = run_of(db, run)["settled_notes"]
        assert settled % CASES == 0 and settled >= 25_000
        assert value(db, "select count(*) from pgharness.settled_scores") == 2 * CASES
        query = "select * from pgharness.combination_scores where run_id = %s"
        [seen] = rows(db, query, run)
        db.execute("update pgharness.runs set settled_notes = 0")
        assert rows(db, query, run) == [seen]
        assert seen["note_count"] == CASES * REPLICATIONS
