"""The sections on what runs cost, how fast models were, and what failed."""

from __future__ import annotations

from collections.abc import Sequence

from pgharness.database import Row
from pgharness.report.model import Block, Column, Paragraph, Section, drawn, shown, table_of
from pgharness.report.reading import RunData, label, run_column


def costs(data: Sequence[RunData]) -> Section:
    """What the runs cost and how fast the models were."""
    totals = (
        *(run_column(data) or (Column("run", "Run", is_detail=True),)),
        Column("call_count", "Calls", "count"),
        Column("input_tokens", "Input tokens", "count"),
        Column("output_tokens", "Output tokens", "count"),
        Column("note_cost_usd", "Notes (USD)", "usd"),
        Column("grade_cost_usd", "Grades (USD)", "usd"),
        Column("cost_usd", "Total (USD)", "usd"),
        Column("usd_per_note", "USD per note", "usd", "Notes and their grades together, per note written."),
        Column("wasted_cost_usd", "Failed calls (USD)", "usd", "What calls cost that did not succeed.", is_detail=True),
    )
    calls = (
        *run_column(data),
        Column("model", "Model"),
        Column("kind", "For"),
        Column("call_count", "Calls", "count"),
        Column("calls_succeeded", "Succeeded", "count", is_detail=True),
        Column("calls_rate_limited", "Rate limited", "count", is_detail=True),
        Column("calls_failed", "Failed", "count"),
        Column("latency_p50_ms", "p50 (ms)", "ms", "Median latency of the calls that succeeded."),
        Column("latency_p90_ms", "p90 (ms)", "ms", is_detail=True),
        Column("latency_p95_ms", "p95 (ms)", "ms"),
        Column("latency_p99_ms", "p99 (ms)", "ms", is_detail=True),
        Column("input_tokens", "Input tokens", "count", is_detail=True),
        Column("output_tokens", "Output tokens", "count", is_detail=True),
        Column("cached_tokens", "Cached tokens", "count", is_detail=True),
        Column("cost_usd", "USD", "usd"),
    )
    blocks: list[Block] = [table_of("costs", "Calls, tokens and cost", totals, [run.costs for run in data])]
    performance = [row for run in data for row in run.performance]
    if performance:
        note = (
            "Latencies are of calls that succeeded, by model and what it was called for; beyond 50,000 notes or "
            "grades, of an even sample of about so many."
        )
        blocks.append(table_of("models_performance", "Calls by model", calls, performance, [note]))
    blocks += _cost_figures(data, performance)
    return Section("costs", "Costs and latencies", tuple(blocks))


def _cost_figures(data: Sequence[RunData], performance: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    points = []
    for run in data:
        means = {group.name: group.mean for group in run.comparison.groups} if run.comparison else {}
        for row in run.cost_per_correct:
            if row["combination"] in means and row["note_count"] and row["note_cost_usd"]:
                cost = row["note_cost_usd"] / row["note_count"]
                name = label(data, run.name, row["combination"])
                points.append({"label": name, "cost": cost, "value": means[row["combination"]]})
    if len(points) > 1:
        caption = "Mean score against the cost of generating a note (graders not counted)."
        blocks.append(drawn("cost_score", "costs", caption, "USD per note", points, _cost_in_words))
    rows = [
        {
            "label": f"{label(data, row['run'], row['model'])} ({row['kind']})",
            "low": row["latency_p50_ms"],
            "value": row["latency_p95_ms"],
            "high": row["latency_p99_ms"],
        }
        for row in performance
        if row["latency_p50_ms"] is not None
    ]
    if rows:
        caption = "Latency of calls that succeeded: median (filled), 95th percentile (bar), 99th percentile (open)."
        blocks.append(drawn("latency", "latencies", caption, "latency (ms)", rows, _latency_in_words))
    return blocks


def _cost_in_words(point: Row) -> str:
    return f"{point['label']}: {shown(point['cost'], 'usd')} USD, {shown(point['value'], 'score')}"


def _latency_in_words(row: Row) -> str:
    return f"{row['label']}: median {shown(row['low'], 'ms')} ms, 95% within {shown(row['value'], 'ms')} ms"


_ITEMS = (
    Column("notes", "Notes planned", "count"),
    Column("notes_failed", "Notes failed", "count"),
    Column("grades", "Grades planned", "count"),
    Column("grades_failed", "Grades failed", "count"),
    Column("grades_skipped", "Grades skipped", "count", "Grades of notes that failed."),
    Column("missing", "Undecided", "count", "Notes and grades that neither succeeded nor failed."),
)
_TASKS = (
    Column("tasks", "Tasks", "count", "The code's function, and the items of its maps."),
    Column("tasks_failed", "Tasks failed", "count"),
)


def failures(data: Sequence[RunData]) -> Section:
    """What failed for good, what was tried again, and why."""
    counts = [
        {
            "run": run.name,
            "status": run.progress["status"],
            "notes": run.progress["note_count"],
            "notes_failed": run.progress["notes_failed"],
            "grades": run.progress["grade_count"],
            "grades_failed": run.progress["grades_failed"],
            "grades_skipped": run.progress["grades_skipped"],
            "missing": run.missing,
            "tasks": run.progress["task_count"],
            "tasks_failed": run.progress["tasks_failed"],
        }
        for run in data
    ]
    columns = (
        *(run_column(data) or (Column("run", "Run", is_detail=True),)),
        Column("status", "Status"),
        *(_ITEMS if not all(run.is_code for run in data) else ()),
        *(_TASKS if any(run.is_code for run in data) else ()),
    )
    blocks: list[Block] = [table_of("completeness", "What was planned and what became of it", columns, counts)]
    causes = [row for run in data for row in run.failure_causes]
    if causes:
        columns = (
            *run_column(data),
            Column("kind", "Of"),
            Column("cause", "Cause"),
            Column("items_failed", "Items failed", "count", "For good."),
            Column("calls_failed", "Calls failed", "count", "Those included that a later try made good."),
            Column("example_error", "Latest error"),
        )
        blocks.append(table_of("failure_causes", "Failures by cause", columns, causes))
    else:
        blocks.append(Paragraph("No call failed."))
    failed = [row for run in data for row in run.failed_items]
    if failed:
        columns = (
            *run_column(data),
            Column("kind", "Of"),
            Column("case_name", "Case"),
            Column("combination", "Combination"),
            Column("cause", "Cause"),
            Column("error", "Error"),
        )
        blocks.append(table_of("failed_items", "Items that failed for good (the first 20 of a run)", columns, failed))
    return Section("failures", "Failures", tuple(blocks))
