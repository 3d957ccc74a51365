"""The clinical experiment runner's users move here: its tables, read and left alone, become ours.

All or nothing, and twice is once, like every import. Its rows are read in one read-only snapshot, staged as JSON, and
imported whole by the database; API keys stay behind, also where they were written into other columns.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pgharness import database
from pgharness.errors import ImportRefused
from pgharness.importing import BATCH_CHARACTERS, BATCH_ROWS, MAX_PROBLEMS, OnProgress

# what is read of it: all columns, or those that are needed
_TABLES: dict[str, tuple[str, ...]] = {
    "model": ("id", "created", "vendor", "model"),
    "case": (),
    "real_world_case": (),
    "synthetic_case": (),
    "case_provenance": (),
    "rubric": (),
    "experiment": (),
    "experiment_case": (),
    "experiment_model": (),
    "experiment_result": (),
    "experiment_result_score": (),
    "generated_note": ("id", "token_counts"),
    "score": ("id", "rubric_id"),
}
_NAMES = {
    "case": "cases",
    "rubric": "rubrics",
    "model": "models",
    "experiment": "experiments",
    "experiment_case": "cases of experiments",
    "experiment_model": "model combinations",
    "experiment_result": "results",
    "experiment_result_score": "grades",
}
_UNSTORABLE = re.compile(r"\\u(?:0000|[dD][89abABcdefCDEF])")


@dataclass(frozen=True, slots=True)
class ClinicalCount:
    """What became of one kind of row: `source` is the sum of the others."""

    what: str
    source: int
    inserted: int
    updated: int
    unchanged: int
    left_out: int


@dataclass(frozen=True, slots=True)
class ClinicalReport:
    """What an import of the clinical experiment runner did: a count per kind of row, and what to know of them."""

    counts: tuple[ClinicalCount, ...]
    remarks: tuple[str, ...]


class _DryRun(Exception):
    """Everything was checked; nothing is kept."""


def import_clinical_runner(
    connection: Connection[Any],
    source_url: str,
    *,
    schema: str = "public",
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> ClinicalReport:
    """Import everything of the clinical experiment runner from its tables in a database, which may be this one.

    The source is read in one read-only snapshot, and API keys stay there. Cases, rubrics and models become rows of the
    same kind, experiments instances, their results and grades finished runs. What cannot be represented is counted in
    the report. Raises ImportRefused when the tables are not there, or a name is taken by what was not imported.
    """
    counts: dict[str, int] = {}
    remarks: list[str] = []
    outcomes: list[database.Row] = []
    with contextlib.suppress(_DryRun), connection.transaction():
        with database.snapshot(source_url) as source:
            relations = database.relations(source, schema)
            for table, column in (("case", "transcript"), ("rubric", "rubric")):
                if column not in relations.get(table, ()):
                    raise ImportRefused(
                        f'schema "{schema}" of the source has no table "{table}" with column "{column}" to read',
                        hint="Name its schema with --schema, its database with --from, and let your role read it.",
                    )
            keys = _keys(source, schema, relations)
            for table, columns in _TABLES.items():
                present = [c for c in columns or relations.get(table, ()) if c in relations.get(table, ())]
                rows = database.json_rows(source, schema, table, present) if present else iter(())
                done = sum(counts.values())
                counts[table] = _stage(connection, table, _cleaned(rows, keys, table, remarks), done, on_progress)
            remarks += _leftovers(source, schema, relations)
        outcomes = database.call(connection, "import_clinical_runner")
        if refused := [row["remark"] for row in outcomes if row["outcome"] == "refused"]:
            raise ImportRefused(
                f"{len(refused)} names are taken by what was not imported; nothing was imported",
                detail="\n".join(refused[:MAX_PROBLEMS]),
                hint="Rename these, and import again.",
            )
        if dry_run:
            raise _DryRun
    for row in outcomes:
        if row["remark"] and row["item_count"]:
            prefix = "left out: " if row["outcome"] == "left out" else ""
            remarks.append(f"{row['what']}: {row['item_count']} {prefix}{row['remark']}")
    return ClinicalReport(tuple(_count(table, counts, outcomes) for table in _NAMES), tuple(remarks))


def _count(table: str, counts: Mapping[str, int], outcomes: Iterable[database.Row]) -> ClinicalCount:
    what = _NAMES[table]
    tally = {"inserted": 0, "updated": 0, "unchanged": 0, "left out": 0}
    for row in outcomes:
        if row["what"] == what and row["outcome"] in tally:
            tally[row["outcome"]] += row["item_count"]
    return ClinicalCount(
        what, counts[table], tally["inserted"], tally["updated"], tally["unchanged"], tally["left out"]
    )


def _keys(source: Connection[Any], schema: str, relations: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the API keys of the source, to take them out of whatever else they were written into."""
    if not {"id", "api_key"} <= set(relations.get("model", ())):
        return []
    found = {json.loads(text)["api_key"] for text in database.json_rows(source, schema, "model", ("id", "api_key"))}
    return sorted((key for key in found if key and len(key) >= 8), key=len, reverse=True)


def _cleaned(rows: Iterable[str], keys: Sequence[str], table: str, remarks: list[str]) -> Iterator[str]:
    """Yield rows without keys, and without what JSON of Postgres cannot hold (U+0000, halves of surrogate pairs)."""
    mended = 0
    for row in rows:
        text = row
        for key in keys:
            if (written := json.dumps(key, ensure_ascii=False)[1:-1]) in text:
                text = text.replace(written, "[key removed]")
        if _UNSTORABLE.search(text):
            repaired = json.dumps(_repaired(json.loads(text)))
            mended += json.loads(text) != json.loads(repaired)
            text = repaired
        yield text
    if mended:
        remarks.append(
            f"{table}: {mended} rows held characters that JSON in Postgres cannot (U+0000 or half a pair): now U+FFFD"
        )


def _repaired(value: Any) -> Any:
    match value:
        case str():
            return re.sub("[\0\ud800-\udfff]", "\ufffd", value)
        case dict():
            return {_repaired(key): _repaired(item) for key, item in value.items()}
        case list():
            return [_repaired(item) for item in value]
        case _:
            return value


def _stage(
    connection: Connection[Any], table: str, rows: Iterable[str], done: int, on_progress: OnProgress | None
) -> int:
    """Send rows to the database that imports them, in batches; return how many there were."""
    count = size = 0
    batch: list[str] = []
    for text in rows:
        batch.append(text)
        size += len(text)
        if len(batch) >= BATCH_ROWS or size >= BATCH_CHARACTERS:
            count += _send(connection, table, batch)
            batch, size = [], 0
            if on_progress:
                on_progress(done + count, None)
    count += _send(connection, table, batch)
    if on_progress:
        on_progress(done + count, None)
    return count


def _send(connection: Connection[Any], table: str, batch: Sequence[str]) -> int:
    (staged,) = database.call(connection, "stage_clinical_rows", source_table=table, rows="[" + ",".join(batch) + "]")
    return int(staged["stage_clinical_rows"])


def _leftovers(source: Connection[Any], schema: str, relations: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Say how many rows stay in the source because nothing here is like them."""
    for table in ("contributor", "contributor_generated_note_rank", "script_run"):
        if "id" in relations.get(table, ()) and (
            count := sum(1 for _ in database.json_rows(source, schema, table, ("id",)))
        ):
            yield f"{table}: {count} rows stay in the source"
