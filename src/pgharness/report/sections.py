"""The sections that describe runs: results, costs, failures, outliers, methods and provenance."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pgharness.database import Row
from pgharness.report.model import (
    Block,
    Column,
    Figure,
    Paragraph,
    Points,
    Section,
    Table,
    Value,
    Verbatim,
    shown,
)
from pgharness.report.reading import RunData

_LISTED_OUTLIERS = 12
# a modified z beyond 3.5 marks an outlier: Iglewicz & Hoaglin (1993), How to detect and handle outliers
_OUTLYING = 3.5
_BINS = 20
_PACKAGES = ("pgharness", "numpy", "scipy", "psycopg", "procrastinate", "httpx", "aiohttp", "pydantic", "jinja2")


def label(data: Sequence[RunData], run: str, combination: str) -> str:
    """Return what a combination is called in a report: with its run where there are several."""
    return f"{run}: {combination}" if len(data) > 1 else combination


def counted(number: float, noun: str) -> str:
    """Return a count with its noun: 1 case, 24 cases."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def run_column(data: Sequence[RunData]) -> tuple[Column, ...]:
    """Return the column that names the run, where there are several."""
    return (Column("run", "Run"),) if len(data) > 1 else ()


def table_of(
    key: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
) -> Table:
    """Return rows of a view as a table of the columns' keys; objects become JSON."""
    values = tuple(tuple(_value(row.get(column.key)) for column in columns) for row in rows)
    return Table(key, caption, tuple(columns), values, tuple(notes))


def _value(value: Any) -> Value:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, (dict, list)) else value


# -- results


_SCORES = (
    Column("combination", "Combination", about="Generator and grader, as frozen at the start of the run."),
    Column(
        "mean", "Mean score", "score", "Mean over cases, of the mean of each one's notes; a share of the highest score."
    ),
    Column("low", "CI low", "score"),
    Column("high", "CI high", "score"),
    Column("standard_error", "SE", "score", "Standard error over cases."),
    Column("cases", "Cases", "count", "Cases with a scored note: what is sampled."),
    Column("notes", "Notes", "count", "Notes with a grade."),
    Column("grades", "Grades", "count"),
    Column("replication_sd", "Replication SD", "score", "Spread between notes of one case.", is_detail=True),
    Column("min_score", "Lowest", "score", "Of a note.", is_detail=True),
    Column("max_score", "Highest", "score", "Of a note.", is_detail=True),
)


def estimates(data: Sequence[RunData]) -> list[Row]:
    """Return the estimate of each run's combinations, in the order of the run, as rows."""
    rows = []
    for run in data:
        spread = {row["combination"]: row for row in run.combination_scores}
        for group in run.comparison.groups if run.comparison else ():
            own = {name: spread[group.name][name] for name in ("replication_sd", "min_score", "max_score")}
            rows.append(
                {
                    "run": run.name,
                    "combination": group.name,
                    "label": label(data, run.name, group.name),
                    "cases": group.cases,
                    "notes": group.notes,
                    "grades": group.grades,
                    "mean": group.mean,
                    "standard_error": group.standard_error,
                    "low": group.interval.low if group.interval else None,
                    "high": group.interval.high if group.interval else None,
                    **own,
                }
            )
    return rows


def results(data: Sequence[RunData]) -> Section:
    """The mean score of each combination with its uncertainty, and what a run's code recorded."""
    blocks: list[Block] = []
    rows = estimates(data)
    if rows:
        level = next(f"{100 * (1 - run.comparison.alpha):g}%" for run in data if run.comparison)
        notes: tuple[str, ...] = (
            "Scores are shares of the highest possible score, 0 to 1. A case counts once, however many notes it "
            "has; standard "
            f"errors count cases, and the {level} intervals use Student's t. They are not cut off at 0 or 1.",
            "Whether two intervals overlap says little about a difference: see Comparisons.",
        )
        lacking = [label(data, run, name) for run, name in _without_scores(data)]
        if lacking:
            notes = (f"Without a score: {', '.join(lacking)}.", *notes)
        columns = (*run_column(data), *_SCORES)
        blocks.append(table_of("results", f"Mean scores with {level} confidence intervals", columns, rows, notes))
        blocks.append(_intervals(rows, level))
        blocks.append(_distributions(data))
    elif not all(run.is_code for run in data):
        blocks.append(Paragraph("No note has a grade, so there are no scores to report."))
    blocks += _recorded(data)
    return Section("results", "Results", tuple(blocks) or (Paragraph("The runs recorded no results."),))


def _recorded(data: Sequence[RunData]) -> list[Block]:
    """Return what the code of runs recorded: its results, and its metrics in short."""
    blocks: list[Block] = []
    if rows := [{"run": run.name} | row for run in data for row in run.results]:
        columns = (*run_column(data), Column("key", "Result"), Column("value", "Value"))
        blocks.append(
            table_of("recorded_results", "Results that the code recorded, the latest of each key", columns, rows)
        )
    if rows := [{"run": run.name} | row for run in data for row in run.metrics]:
        columns = (
            *run_column(data),
            Column("name", "Metric"),
            Column("count", "Values", "count"),
            Column("mean", "Mean", "measure"),
            Column("low", "Lowest", "measure"),
            Column("high", "Highest", "measure"),
            Column("last", "Last", "measure"),
        )
        blocks.append(table_of("recorded_metrics", "Metrics that the code recorded", columns, rows))
    return blocks


def _without_scores(data: Sequence[RunData]) -> list[tuple[str, str]]:
    """Return the runs and combinations that have no score."""
    scored = case_means(data)
    named = [(run.name, row["name"]) for run in data for row in run.combinations]
    return [each for each in named if each not in scored]


def _intervals(rows: Sequence[Row], level: str) -> Figure:
    points = tuple(
        {"label": row["label"], "value": row["mean"], "low": row["low"], "high": row["high"]} for row in rows
    )
    told = "; ".join(_interval_in_words(point) for point in points)
    caption = f"Mean score of each combination with its {level} confidence interval over cases."
    return Figure("estimates", "intervals", caption, f"Mean scores with intervals: {told}.", "mean score", points)


def _interval_in_words(point: dict[str, Any]) -> str:
    text = f"{point['label']} {shown(point['value'], 'score')}"
    if point["low"] is None:
        return text
    return f"{text} [{shown(point['low'], 'score')}, {shown(point['high'], 'score')}]"


def case_means(data: Sequence[RunData]) -> dict[tuple[str, str], dict[str, float]]:
    """Return to each run and combination the mean score of each of its cases that has one."""
    found = {}
    for run in data:
        if run.scores is not None:
            table = run.scores.case_table("combination")
            for name, means in zip(table.names, table.means.tolist(), strict=True):
                kept = {case: mean for case, mean in zip(table.cases, means, strict=True) if not math.isnan(mean)}
                found[run.name, name] = kept
    return found


def _distributions(data: Sequence[RunData]) -> Figure:
    rows: list[dict[str, Any]] = []
    for (run, combination), means in case_means(data).items():
        bins = [0] * _BINS
        for mean in means.values():
            bins[min(int(mean * _BINS), _BINS - 1)] += 1
        middle = statistics.median(means.values())
        rows.append({"label": label(data, run, combination), "bins": bins, "median": middle, "count": len(means)})
    told = "; ".join(f"{row['label']}: median {shown(row['median'], 'score')}" for row in rows)
    caption = f"Cases by their mean score, in {_BINS} bins; the line marks the median case."
    return Figure(
        "distributions", "distributions", caption, f"Histograms. {told}.", "mean score of a case", tuple(rows)
    )


# -- costs and failures


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
        note = "Latencies are of calls that succeeded, by model and what it was called for."
        blocks.append(table_of("models_performance", "Calls by model", calls, performance, [note]))
    blocks += _cost_figures(data, performance)
    return Section("costs", "Costs and latencies", tuple(blocks))


def _cost_figures(data: Sequence[RunData], performance: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    points = tuple(
        {
            "label": label(data, row["run"], row["combination"]),
            "cost": row["note_cost_usd"] / row["note_count"],
            "value": row["mean_score"],
        }
        for run in data
        for row in run.cost_per_correct
        if row["mean_score"] is not None and row["note_count"] and row["note_cost_usd"]
    )
    if len(points) > 1:
        told = "; ".join(f"{p['label']}: {shown(p['cost'], 'usd')} USD, {shown(p['value'], 'score')}" for p in points)
        caption = "Mean score against the cost of generating a note (graders not counted)."
        blocks.append(Figure("cost_score", "costs", caption, f"Cost and score. {told}.", "USD per note", points))
    rows = tuple(
        {
            "label": f"{label(data, row['run'], row['model'])} ({row['kind']})",
            "low": row["latency_p50_ms"],
            "value": row["latency_p95_ms"],
            "high": row["latency_p99_ms"],
        }
        for row in performance
        if row["latency_p50_ms"] is not None
    )
    if rows:
        told = "; ".join(f"{r['label']}: {shown(r['low'], 'ms')} to {shown(r['high'], 'ms')} ms" for r in rows)
        caption = "Latency of calls that succeeded: median (filled), 95th percentile (bar), 99th percentile (open)."
        blocks.append(Figure("latency", "latencies", caption, f"Latencies. {told}.", "latency (ms)", rows))
    return blocks


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
            "missing": missing(run),
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


def missing(run: RunData) -> int:
    """Return how many notes and grades of a run are not decided."""
    row = run.progress
    notes = row["note_count"] - row["notes_succeeded"] - row["notes_failed"]
    grades = row["grade_count"] - row["grades_succeeded"] - row["grades_failed"] - row["grades_skipped"]
    return int(notes + grades)


# -- outliers


def outliers(data: Sequence[RunData]) -> Section | None:
    """The cases that score unlike the others, per combination; None without enough cases."""
    found: list[Row] = []
    lowest: list[Row] = []
    for (run, combination), means in case_means(data).items():
        if len(means) < 5:
            continue
        middle = statistics.median(means.values())
        spread = statistics.median(abs(mean - middle) for mean in means.values())
        for case, mean in means.items():
            z = 0.6745 * (mean - middle) / spread if spread else None
            row = {"run": run, "combination": combination, "case": case, "mean": mean, "from": mean - middle, "z": z}
            lowest.append(row)
            if z is not None and abs(z) > _OUTLYING:
                found.append(row)
    if not lowest:
        return None
    columns = (
        *run_column(data),
        Column("case", "Case"),
        Column("combination", "Combination"),
        Column("mean", "Mean score", "score"),
        Column("from", "From the median case", "difference"),
        Column("z", "Modified z", "number", "0.6745 x (mean - median) / median absolute deviation."),
    )
    found.sort(key=lambda row: (-abs(row["z"] or 0), row["case"], row["combination"]))
    lowest.sort(key=lambda row: (row["mean"], row["case"], row["combination"]))
    rule = f"Modified z-scores beyond ±{_OUTLYING} of a combination's case means (Iglewicz & Hoaglin 1993)"
    blocks: list[Block] = []
    if found:
        more = f"The {_LISTED_OUTLIERS} farthest of {len(found)}." if len(found) > _LISTED_OUTLIERS else ""
        notes = [text for text in (f"{rule}. None was left out of any result.", more) if text]
        blocks.append(table_of("outliers", "Outlying cases", columns, found[:_LISTED_OUTLIERS], notes))
    else:
        blocks.append(Paragraph(f"No case is an outlier by the rule used. Rule: {rule[0].lower()}{rule[1:]}."))
    blocks.append(table_of("lowest_cases", "The lowest-scoring cases, worth reading first", columns, lowest[:8]))
    return Section("outliers", "Outlying cases", tuple(blocks))


# -- methods and provenance


def methods(data: Sequence[RunData], statistics_used: Sequence[str]) -> Section | None:
    """How the runs were made: design, models with parameters and prices, graders, prompts; None where code decides."""
    blocks: list[Block] = []
    blocks += [Paragraph(_design(run)) for run in data if not run.is_code]
    blocks += [Points(tuple(statistics_used))] if statistics_used else []
    models = _models(data)
    if models:
        columns: tuple[Column, ...] = (
            Column("model", "Model"),
            Column("roles", "Role"),
            Column("provider", "Provider"),
            Column("id", "Model id", is_detail=True),
            Column("parameters", "Parameters"),
            Column("input", "USD/M input", "usd", "Price of a million input tokens at the start."),
            Column("output", "USD/M output", "usd"),
        )
        note = "As frozen when the run started; a combination's parameters are laid over the model's own."
        blocks.append(table_of("models", "Models, parameters and prices", columns, models, [note]))
    rubrics = [{"run": run.name} | row for run in data for row in run.rubrics]
    if rubrics:
        columns = (
            *run_column(data),
            Column("author", "Author"),
            Column("is_human", "Written by a person", "flag"),
            Column("rubric_count", "Rubrics", "count"),
            Column("criterion_count", "Criteria", "count"),
        )
        blocks.append(table_of("rubrics", "Rubrics", columns, rubrics))
    blocks += _prompts(data)
    return Section("methods", "Methods", tuple(blocks)) if blocks else None


def _design(run: RunData) -> str:
    made = run.provenance
    graded = f"{counted(made['grade_replications'] or 1, 'grade')} of each note and rubric"
    overlaps = made["transcript_overlaps"] or []
    partly = "" if overlaps in ([], [100]) else f" and transcript overlaps of {', '.join(map(str, overlaps))} percent"
    return (
        f"Run {run.name} has {counted(made['case_count'], 'case')}, "
        f"{counted(len(run.combinations), 'combination')} of generator "
        f"and grader, {counted(made['note_replications'] or 1, 'note')} of each case and combination{partly}, and "
        f"{graded}: "
        f"{counted(run.progress['note_count'], 'note')} and {counted(run.progress['grade_count'], 'grade')} planned. "
        "A grade is the weighted share of its rubric's criteria that the grader saw satisfied, or what the "
        "metric gave; "
        "a note's score is the mean of its grades."
    )


def _models(data: Sequence[RunData]) -> list[Row]:
    found: dict[str, Row] = {}
    for run in data:
        for combination in run.combinations:
            for role in ("generator", "grader"):
                for model in _with_members(combination[role]):
                    parameters = json.dumps(model.get("parameters") or {}, ensure_ascii=False, sort_keys=True)
                    name = str(model.get("name") or model.get("model"))
                    row = found.setdefault(
                        f"{name}\n{parameters}",
                        {
                            "model": name,
                            "roles": [],
                            "provider": model.get("provider"),
                            "id": model.get("model"),
                            "parameters": parameters,
                            "input": model.get("input_usd_per_million"),
                            "output": model.get("output_usd_per_million"),
                        },
                    )
                    if role not in row["roles"]:
                        row["roles"].append(role)
    return [row | {"roles": ", ".join(row["roles"])} for _, row in sorted(found.items())]


def _with_members(model: Any) -> list[Row]:
    if not isinstance(model, dict):
        return []
    return [model] + [each for member in model.get("members") or [] for each in _with_members(member)]


def _prompts(data: Sequence[RunData]) -> list[Block]:
    names = {
        "note_system": "System prompt for notes",
        "note": "Prompt for notes",
        "grade_system": "System prompt for grades",
        "grade": "Prompt for grades",
    }
    blocks: list[Block] = []
    printed: set[tuple[str, str]] = set()
    for run in data:
        for key, title in names.items():
            text = (run.provenance["prompts"] or {}).get(key)
            if text and (key, text) not in printed:
                printed.add((key, text))
                blocks.append(Verbatim(f"{title} ({run.name})" if len(data) > 1 else title, text))
        if run.provenance["config"]:
            text = json.dumps(run.provenance["config"], indent=2, ensure_ascii=False, sort_keys=True)
            blocks.append(Verbatim(f"Configuration ({run.name})" if len(data) > 1 else "Configuration", text))
    return blocks


def provenance(data: Sequence[RunData]) -> Section:
    """Everything that is known of how the runs were executed, a row a fact."""
    columns = (Column("fact", "Fact"), *(Column(f"run_{place}", run.name) for place, run in enumerate(data)))
    facts = [_facts(run) for run in data]
    names = list(dict.fromkeys(name for each in facts for name in each))
    rows: list[Row] = [
        {"fact": name} | {f"run_{place}": each.get(name, "") for place, each in enumerate(facts)} for name in names
    ]
    return Section("provenance", "Provenance", (table_of("provenance", "How the runs were made", columns, rows),))


def _facts(run: RunData) -> dict[str, str]:
    made, progress = run.provenance, run.progress
    environments = made["worker_environments"] or []
    packages: dict[str, set[str]] = defaultdict(set)
    for environment in environments:
        for name, version in (environment.get("packages") or {}).items():
            packages[name.lower()].add(version)
    frozen = made["definition"] or {}
    code = frozen.get("code") or {}
    facts: dict[str, Any] = {
        "run": run.name,
        "run id": str(run.run_id),
        "experiment": made["experiment"],
        "instance": frozen.get("name") or made["instance"],
        "kind": made["kind"],
        "status": progress["status"] + (f" ({progress['reason']})" if progress["reason"] else ""),
        "repeats the run of id": None if run.rerun_of_id is None else str(run.rerun_of_id),
        "started by": made["started_by"],
        "started at": made["started_at"],
        "finished at": progress["finished_at"],
        "active seconds": shown(progress["active_seconds"], "ms"),
        "seed": None if made["seed"] is None else str(made["seed"]),
        "SHA-256 of the cases": made["cases_digest"],
        "response cache": made["response_cache"],
        "program version": made["software_version"],
        "code": f"{code['module']}:{code['function']}" if code.get("module") else None,
        "SHA-256 of the code": code.get("digest"),
        "git commit": ", ".join(made["worker_git_commits"] or []),
        "pgharness of the workers": ", ".join(made["worker_versions"] or []),
        "Python": ", ".join(sorted({str(each.get("python")) for each in environments if each.get("python")})),
        "platform": ", ".join(sorted({str(each.get("platform")) for each in environments if each.get("platform")})),
        "packages": ", ".join(f"{name} {'/'.join(sorted(packages[name]))}" for name in _PACKAGES if name in packages),
    }
    return {name: str(value) for name, value in facts.items() if value}
