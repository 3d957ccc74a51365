"""The figure that compares pgharness with Inspect AI at the same task, each at its own pace.

Inspect AI lives in an environment of its own, whose Python is told to us; inspect_ai_task.py is what runs there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bed import CRITERIA, HERE, NOTE, Bed, connected, make_world
from figures import Line, whole_run
from windows import CALL_SECONDS

from pgharness.grading import criteria_values, verdict_schema
from pgharness.prompts import Prompt, case_facts

_CONCURRENCY = 100
HOW_TO = (
    "inspect is skipped. To compare with Inspect AI, make an environment for it and name its Python: "
    "python3 -m venv /tmp/inspect && /tmp/inspect/bin/pip install inspect-ai openai && "
    "make bench ARGS='--inspect-python /tmp/inspect/bin/python'"
)


def inspect(bed: Bed, python: Path) -> Iterator[Line]:
    """Run the same samples with both: on models that answer at once, and on the same stub over HTTP."""
    notes, samples = (4_000, 200) if bed.is_quick else (12_000, 1_000)
    yield _line(bed, python, "zero latency; Inspect by its mock model", notes=notes, samples=samples, at_least=10)
    samples = 200 if bed.is_quick else 500
    with bed.stub(CALL_SECONDS) as (base_url, _):
        model = f"HTTP calls of {CALL_SECONDS} s to one stub"
        yield _line(bed, python, model, notes=samples, samples=samples, base_url=base_url, at_least=1)


def _line(
    bed: Bed, python: Path, model: str, *, notes: int, samples: int, at_least: float, base_url: str | None = None
) -> Line:
    ours, theirs, with_start = [], [], []
    for _ in range(bed.repeats):
        done = whole_run(bed, notes=notes, concurrency=_CONCURRENCY, base_url=base_url)
        ours.append(done.items_per_second)
        file = bed.root / "inspect-task.json"
        file.write_text(json.dumps(_task(bed, samples=samples, base_url=base_url)))
        begun = time.monotonic()
        answer = bed.program_answer([str(python), str(HERE / "inspect_ai_task.py"), str(file)])
        with_start.append(2 * samples / (time.monotonic() - begun))
        theirs.append(2 * answer["samples"] / (answer["completed_at"] - answer["started_at"]))
    return Line(
        "inspect",
        f"notes and grades, {model} ({2 * notes:,} items, concurrency {_CONCURRENCY})",
        "items/s",
        ours,
        f"Inspect AI, generations and scores ({2 * samples:,}, as many connections and samples)",
        theirs,
        at_least=at_least,
        remark=f"Inspect AI with its start and end: {statistics.median(with_start):.0f} items/s",
        details={"inspect_with_start": with_start},
    )


def _task(bed: Bed, *, samples: int, base_url: str | None) -> dict[str, Any]:
    """Return what inspect_ai_task.py needs: the messages that our own worker would send."""
    with bed.database() as url, connected(url) as connection:
        make_world(connection, cases=1)
        [[note_system, note, grade_system, grade]] = connection.execute(
            "select note_system_prompt, note_prompt, grade_system_prompt, grade_prompt "
            "from pgharness.experiments where name = 'note_grade'"
        ).fetchall()
        [case] = connection.execute("select name, input, target, metadata from pgharness.cases").fetchall()
    columns = ("name", "input", "target", "metadata")
    values = case_facts(dict(zip(columns, case, strict=True))) | {"config": {}, "overlap": 100, "replication": 1}
    criteria = criteria_values({"criteria": CRITERIA})
    graded = values | {"note": "{note}", "criteria": criteria, "rubric_author": "author-1"}
    verdicts = [{"rationale": "The note says so, in its first and in its last line.", "satisfaction": 80}]
    return {
        "samples": samples,
        "concurrency": _CONCURRENCY,
        "base_url": base_url,
        "note_messages": [message.content for message in Prompt("note", note_system, note).render(values)],
        "grade_messages": [message.content for message in Prompt("grade", grade_system, grade).render(graded)],
        "schema": verdict_schema(len(CRITERIA)),
        "criteria": CRITERIA,
        "note": NOTE,
        "verdicts": json.dumps({"verdicts": verdicts * len(CRITERIA)}),
    }
