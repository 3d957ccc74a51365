"""Counted calls: whatever records, archives or deletes a run's calls, call_totals has what a look at all of them would have."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pgharness import schema
from world import Row, add_instance, call, failure, grade, miscounted, note, orphans, record, register, rows, start

Database = Connection[Any]


def totals(db: Database, run: int) -> list[Row]:
    """Return a run's rows of call_totals, in order."""
    return rows(
        db,
        "select * from pgharness.call_totals where run_id = %s order by model_id, kind, outcome, combination_number",
        run,
    )


def by_metric(run: int, ordinal: int) -> Row:
    """Return the outcome of a grade by a metric, which seems to have called a model."""
    return grade(run, ordinal, verdicts=None, score=1, max_score=1)


@pytest.fixture
def two_combinations(tx: Database) -> tuple[Database, int, int]:
    """A started run of two combinations, and a worker: the connection, the worker, the run."""
    add_instance(tx, combinations=[("simulator", "simulator"), ("simulator", "exact_match")], note_replications=3)
    return tx, register(tx), start(tx)


def test_calls_are_counted_by_what_they_were_made_for_and_how_they_ended(
    two_combinations: tuple[Database, int, int],
) -> None:
    db, worker, run = two_combinations
    stride = rows(db, "select grade_stride from pgharness.run_definitions where run_id = %s", run)[0]["grade_stride"]
    assert stride > 1, "or a grade's combination would be its ordinal's"
    first = note(run, 1, calls=[call(0.1, started_at="2026-01-01T00:00:05Z"), call(0, outcome="rate_limited")])
    record(db, worker, first, note(run, 0), note(run, 3, calls=[call(0.2), call(0, outcome="cached", saved_usd=0.7)]))
    before = totals(db, run)
    record(db, worker, first)  # a group whose commit was not heard of
    assert totals(db, run) == before
    record(db, worker, failure(run, "note", 2), by_metric(run, stride * 3), note(run, 5, calls=[call(0.3, model_id=6)]))
    found = {
        (row["model_id"], row["kind"], row["outcome"], row["combination_number"]): (
            row["call_count"],
            row["input_tokens"],
            row["cost_usd"],
            row["saved_usd"],
        )
        for row in totals(db, run)
    }
    assert found == {
        (5, "note", "succeeded", 0): (1, 10, Decimal("0.5"), 0),
        (5, "note", "succeeded", 1): (2, 20, Decimal("0.3"), 0),
        (5, "note", "rate_limited", 1): (1, 10, 0, 0),
        (5, "note", "cached", 1): (1, 10, 0, Decimal("0.7")),
        (5, "note", "server_error", 0): (1, 10, 0, 0),
        (5, "grade", "succeeded", 1): (1, 10, Decimal("0.25"), 0),
        (6, "note", "succeeded", 1): (1, 10, Decimal("0.3"), 0),
    }
    [latest] = [row for row in before if row["outcome"] == "succeeded" and row["combination_number"] == 1]
    assert latest["last_used_at"].isoformat().startswith("2026-01-01T00:00:05")
    assert orphans(db) == []


def test_calls_of_no_combination_are_counted_beside_the_others(two_combinations: tuple[Database, int, int]) -> None:
    db, worker, run = two_combinations
    record(db, worker, note(run, 0))
    db.execute(
        "insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, outcome, latency_ms, started_at, cost_usd)"
        " select %s, 'task', o, 1, 5, 'succeeded', 1, now(), 0.5 from generate_series(0, 3) as o",
        (run,),
    )
    found = [(row["kind"], row["combination_number"], row["call_count"]) for row in totals(db, run)]
    assert found == [("note", 0, 1), ("task", -1, 4)]
    assert miscounted(db) == []
    db.execute("update pgharness.call_totals set cached_tokens = 1 where kind = 'task'")
    assert len(miscounted(db)) == 1, "the look itself sees what is wrong"


def test_calls_from_before_the_table_are_counted_when_it_comes(empty_url: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as db:
        schema.upgrade(db)
        add_instance(db, combinations=[("simulator", "simulator"), ("simulator", "exact_match")], note_replications=3)
        worker, run = register(db), start(db)
        stride = rows(db, "select grade_stride from pgharness.run_definitions")[0]["grade_stride"]
        record(db, worker, note(run, 1), failure(run, "note", 2), note(run, 3), by_metric(run, stride * 3))
        before = totals(db, run)
        assert len(before) == 3
        db.execute(
            "drop table pgharness.call_totals cascade; drop trigger _500_count on pgharness.calls;"
            "delete from pgharness.schema_migrations where name = '0016_call_totals.sql'"
        )
        assert schema.upgrade(db) == ["0016_call_totals.sql"]
        assert totals(db, run) == before
        assert schema.upgrade(db) == [] and totals(db, run) == before, "counted once"
        record(db, worker, note(run, 5))
        assert sum(row["call_count"] for row in totals(db, run)) == sum(row["call_count"] for row in before) + 1
        assert orphans(db) == []
