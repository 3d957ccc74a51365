"""The sections that say how runs were made: design, models, prompts, and all that is known of the execution."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pgharness.database import Row
from pgharness.report.model import Block, Column, Paragraph, Points, Section, Verbatim, counted, shown, table_of
from pgharness.report.reading import RunData, run_column

_PACKAGES = ("pgharness", "numpy", "scipy", "psycopg", "procrastinate", "aiohttp", "pydantic", "jinja2")


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
