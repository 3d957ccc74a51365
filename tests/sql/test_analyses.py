"""Analyses in the database: what they read, who asks for them, what is kept, what is told without a worker."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest

from pgharness.analysis import Scores, load_scores
from pgharness.errors import DatabaseError, InvalidArgument
from world import add_instance, finish, grade, load, note, record, register, rows, start, take, value

Database = psycopg.Connection[Any]


def graded_run(
    db: Database, instance: str = "trial", *, effects: tuple[float, ...] = (0, 10), **columns: object
) -> int:
    """Run an instance of two combinations; a grade's satisfaction depends on its case, its note and its combination."""
    fields = {"note_replications": 2, "grade_replications": 2, "rubrics_per_case": 2} | columns
    if not value(db, "select exists (select from pgharness.instances where name = %s)", instance):
        pairs = tuple(("simulator", "simulator") for _ in effects)
        add_instance(db, instance, cases=5, combinations=pairs, **fields)
    run = start(db, instance)
    do_work(db, run, effects)
    return run


def do_work(db: Database, run: int, effects: tuple[float, ...] = (0, 10), *, at_most: int = 1_000_000) -> None:
    """Make notes and grades of what is queued."""
    worker = register(db)
    random = np.random.default_rng(run)
    while at_most > 0 and (job := take(db, worker)) is not None:
        items = load(db, worker, job["args"])
        for item in items:
            if job["args"]["kind"] == "note":
                record(db, worker, note(run, item["ordinal"]))
            else:
                base = 40 + 3 * (item["case_id"] % 7) + effects[item["combination_number"]]
                one, two = np.clip(base + random.normal(0, 4, 2), 0, 100).round(1)
                record(db, worker, grade(run, item["ordinal"], float(one), float(two)))
        at_most -= len(items)
        finish(db, job)


def test_scores_are_those_of_grade_results(tx: Database) -> None:
    first = graded_run(tx, cycle_transcript_overlaps=[0, 50])
    second = graded_run(tx)
    scores = load_scores(tx, [first, second])
    assert len(scores) == value(tx, "select count(*) from pgharness.grade_results") == 2 * 5 * 2 * 2 * 2 * 2 * 2
    assert rows_of(scores) == sorted(
        tuple(row.values())
        for row in rows(
            tx,
            "select run, combination, case_name, overlap, replication, rubric_author, grade_replication, (score / max_score)::double precision as score"
            " from pgharness.grade_results",
        )
    )
    means = {
        (row["run_id"], row["combination"]): row["mean_score"]
        for row in rows(tx, "select * from pgharness.combination_scores")
    }
    table = scores.select(runs=[scores.runs[0].name]).case_table("combination")
    assert [round(float(mean), 4) for mean in table.means.mean(axis=1)] == [
        float(means[first, name]) for name in table.names
    ]
    assert np.bincount(scores.note).tolist() == [4] * len(np.bincount(scores.note))


def rows_of(scores: Scores) -> list[tuple[Any, ...]]:
    """Return scores as the view grade_results has them, sorted."""
    return sorted(
        zip(
            [scores.runs[code].name for code in scores.run],
            [scores.combinations[code] for code in scores.combination],
            [scores.cases[code] for code in scores.case],
            scores.overlap.tolist(),
            scores.replication.tolist(),
            [scores.authors[code] for code in scores.author],
            scores.grade_replication.tolist(),
            scores.score.tolist(),
            strict=True,
        )
    )


def test_runs_without_grades_are_refused(tx: Database) -> None:
    add_instance(tx)
    with pytest.raises(InvalidArgument, match="no grades to analyse"):
        load_scores(tx, [start(tx)])
    with pytest.raises(DatabaseError, match="run with id 4711 does not exist"):
        load_scores(tx, [4711])
