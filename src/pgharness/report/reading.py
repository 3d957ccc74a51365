"""What a report reads: the rows of the views that say how a run was made and what came of it, each view once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pgharness import database
from pgharness.analysis import CaseTable, Comparison, Scores, compare, load_scores
from pgharness.database import Row
from pgharness.errors import NotFound, WrongState
from pgharness.report.model import Column, plain

_LISTED_FAILURES = 20
NOTE_GRADE = "note_grade"


@dataclass(frozen=True, slots=True)
class RunData:
    """The rows of one run, by view, with numbers as float and times as text; scores are None without a grade.

    late_plans are preregistrations that came after the run had begun: they bind later runs.
    """

    run_id: int
    name: str
    rerun_of_id: int | None
    progress: Row
    provenance: Row
    combinations: list[Row]
    scores: Scores | None
    cases: CaseTable | None
    comparison: Comparison | None
    costs: Row
    cost_per_correct: list[Row]
    performance: list[Row]
    failure_causes: list[Row]
    failed_items: list[Row]
    replication_agreement: list[Row]
    rubrics: list[Row]
    results: list[Row]
    metrics: list[Row]
    deviations: list[Row]
    late_plans: list[Row]

    @property
    def is_code(self) -> bool:
        """Whether it is a run of an experiment in code, which has no notes and grades."""
        return bool(self.provenance["experiment"] != NOTE_GRADE)

    @property
    def missing(self) -> int:
        """How many notes and grades neither succeeded nor failed."""
        row = self.progress
        notes = row["note_count"] - row["notes_succeeded"] - row["notes_failed"]
        grades = row["grade_count"] - row["grades_succeeded"] - row["grades_failed"] - row["grades_skipped"]
        return int(notes + grades)


def label(data: Sequence[RunData], run: str, combination: str) -> str:
    """Return what a combination is called in a report: with its run where there are several."""
    return f"{run}: {combination}" if len(data) > 1 else combination


def run_column(data: Sequence[RunData]) -> tuple[Column, ...]:
    """Return the column that names the run, where there are several."""
    return (Column("run", "Run"),) if len(data) > 1 else ()


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
        scores=scores,
        cases=scores.case_table("combination") if scores else None,
        comparison=compare(scores, by="combination", alpha=alpha) if scores else None,
        costs=rows("cost_by_run")[0],
        cost_per_correct=rows("cost_per_correct", "combination_number"),
        performance=rows("model_performance", "kind", "model"),
        failure_causes=rows("failure_causes", "kind", "cause"),
        failed_items=rows("failed_items", "ordinal", "kind", status="failed", order="ordinal", limit=1000)[
            :_LISTED_FAILURES
        ],
        replication_agreement=rows("replication_agreement", "combination", "rubric_author"),
        rubrics=rows("run_rubric_authors", "author"),
        results=rows("run_results", "key"),
        metrics=rows("run_metric_totals", "name"),
        deviations=rows("preregistration_deviations", "analysis_id", "deviation", "planned", "actual"),
        late_plans=_late_plans(connection, row),
    )


def _sortable(value: Any) -> tuple[bool, Any]:
    return (value is not None, value if value is not None else 0)


def _late_plans(connection: Connection[Any], run: Row) -> list[Row]:
    """Return the plans that were registered for the run's instance after the run began, the first one first."""
    plans = database.rows(connection, "preregistrations", order="id", instance_id=run["instance_id"])
    return [plain(plan) for plan in plans if plan["created_at"] > run["created_at"]]
