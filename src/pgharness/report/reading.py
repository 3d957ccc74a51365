"""What a report reads: the rows of the views that say how a run was made and what came of it, each view once."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pgharness import database
from pgharness.analysis import Comparison, Scores, compare, load_scores
from pgharness.database import Row
from pgharness.errors import NotFound, WrongState
from pgharness.report.model import plain

_LISTED_FAILURES = 20
NOTE_GRADE = "note_grade"


@dataclass(frozen=True, slots=True)
class RunData:
    """The rows of one run, by view, with numbers as float and times as text; its scores, None without a grade."""

    run_id: int
    name: str
    rerun_of_id: int | None
    progress: Row
    provenance: Row
    combinations: list[Row]
    combination_scores: list[Row]
    scores: Scores | None
    comparison: Comparison | None
    costs: Row
    cost_per_correct: list[Row]
    performance: list[Row]
    failure_causes: list[Row]
    failed_items: list[Row]
    author_agreement: list[Row]
    replication_agreement: list[Row]
    rubrics: list[Row]
    results: list[Row]
    metrics: list[Row]
    deviations: list[Row]

    @property
    def is_code(self) -> bool:
        """Whether it is a run of an experiment in code, which has no notes and grades."""
        return bool(self.provenance["experiment"] != NOTE_GRADE)


def find(connection: Connection[Any], run: str) -> Row:
    """Return the row of a run given by name or id. Raises NotFound, and WrongState for one whose rows are archived."""
    found = database.rows(connection, "runs", name=run)
    if not found and run.isascii() and run.isdecimal() and len(run) < 19:
        found = database.rows(connection, "runs", id=int(run))
    if not found:
        raise NotFound(f'run "{run}" does not exist', hint="List runs: pgharness status")
    row = found[0]
    if row["archived_at"] is not None:
        raise WrongState(
            f'run "{row["name"]}" is archived: its notes and grades are in a file',
            hint="Report from the file: pgharness report --archive FILE; where it is: pgharness archive --list",
        )
    return row


def read(connection: Connection[Any], run: str, *, alpha: float) -> RunData:
    """Read a run given by name or id, from one snapshot if the connection has one. Raises NotFound, WrongState."""
    row = find(connection, run)
    run_id: int = row["id"]
    scores = load_scores(connection, [run_id]) if row["grades_succeeded"] else None

    def rows(view: str, *by: str, **filters: Any) -> list[Row]:
        read_rows = [plain(each) for each in database.rows(connection, view, run_id=run_id, **filters)]
        # a view's rows come in any order; a report of the same rows is the same
        return sorted(read_rows, key=lambda each: tuple(_sortable(each[name]) for name in by))

    return RunData(
        run_id=run_id,
        name=row["name"],
        rerun_of_id=row["rerun_of_id"],
        progress=rows("run_progress")[0],
        provenance=rows("run_provenance")[0],
        combinations=rows("run_combinations", "number"),
        combination_scores=rows("combination_scores", "combination"),
        scores=scores,
        comparison=compare(scores, by="combination", alpha=alpha) if scores else None,
        costs=rows("cost_by_run")[0],
        cost_per_correct=rows("cost_per_correct", "combination_number"),
        performance=rows("model_performance", "kind", "model"),
        failure_causes=rows("failure_causes", "kind", "cause"),
        failed_items=rows("failed_items", "ordinal", "kind", status="failed", order="ordinal", limit=1000)[
            :_LISTED_FAILURES
        ],
        author_agreement=rows("author_agreement", "combination", "author_a", "author_b"),
        replication_agreement=rows("replication_agreement", "combination", "rubric_author"),
        rubrics=_rubrics(connection, run_id),
        results=rows("run_results", "key"),
        metrics=_metrics(connection, run_id),
        deviations=rows("preregistration_deviations", "analysis_id", "deviation", "planned", "actual"),
    )


def _sortable(value: Any) -> tuple[bool, Any]:
    return (value is not None, value if value is not None else 0)


def _metrics(connection: Connection[Any], run_id: int) -> list[Row]:
    """Return the metrics that a run's code recorded, by name: how many values, their mean, extremes and last one."""
    found: dict[str, list[float]] = {}
    for columns, rows in database.stream(connection, "run_metrics", order="id", run_id=run_id):
        name, value = columns.index("name"), columns.index("value")
        for row in rows:
            number = plain(row[value])
            if isinstance(number, int | float):
                found.setdefault(row[name], []).append(float(number))
    return [
        {
            "name": name,
            "count": len(values),
            "mean": statistics.fmean(values),
            "low": min(values),
            "high": max(values),
            "last": values[-1],
        }
        for name, values in sorted(found.items())
    ]


def _rubrics(connection: Connection[Any], run_id: int) -> list[Row]:
    """Return the authors of the run's rubrics: how many cases and criteria they have, and whether they are people."""
    authors: dict[str, Row] = {}
    used = {row["rubric_id"] for row in database.rows(connection, "run_rubrics", run_id=run_id)}
    for rubric in database.rows(connection, "rubrics") if used else ():
        if rubric["id"] not in used:
            continue
        author = {"author": rubric["author"], "is_human": rubric["is_human"], "rubric_count": 0, "criterion_count": 0}
        row = authors.setdefault(rubric["author"], author)
        row["rubric_count"] += 1
        row["criterion_count"] += len(rubric["criteria"])
        row["is_human"] = row["is_human"] and rubric["is_human"]
    return [authors[name] for name in sorted(authors)]
