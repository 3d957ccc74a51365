"""The figure of statistics over a big run: an analysis of a million grades from request to result, and the views."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from bed import Bed, connected, timed
from figures import Line
from fill import fill
from psycopg import Connection

from pgharness import database
from pgharness.desk import Kind, make_here

_SECONDS = 10
_REPORT_SECONDS = 30
_TABLES: dict[Kind, str] = {"analysis": "analyses", "report": "reports"}
_MEGABYTES = 1_000
_VIEW_MS = 2_000
_QUERIES = {
    "combination_estimates": "select * from pgharness.combination_estimates where run_id = {run}",
    "paired_differences": "select * from pgharness.paired_differences where run_id = {run}",
    "paired_run_differences": "select * from pgharness.paired_run_differences('{run}', '{run}')",
}


def analyses(bed: Bed) -> Iterator[Line]:
    """Time each kind of analysis and a report, with the most memory that their process takes, and each view."""
    notes = 25_000 if bed.is_quick else 500_000
    with bed.database() as url, connected(url) as connection:
        run_id = fill(connection, notes=notes)
        asked: dict[str, tuple[Kind, dict[str, Any], int]] = {
            kind: ("analysis", {"kind": kind, "run_ids": [run_id]}, _SECONDS)
            for kind in ("compare", "agreement", "power")
        }
        asked["report (html, md, json, csv)"] = (
            "report",
            {"run_id": run_id, "formats": ["html", "md", "json", "csv"]},
            _REPORT_SECONDS,
        )
        for what, (kind, options, limit) in asked.items():
            seconds, starts, megabytes = [], [], 0.0
            for _ in range(bed.repeats):
                seconds.append(timed(lambda kind=kind, options=options: _make(connection, url, kind, options)))
                starts.append(timed(lambda: subprocess.run([sys.executable, "-c", "import scipy.stats"], check=True)))
                megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            yield Line(
                "analyses",
                f"{what} of {2 * notes:,} grades, its process included",
                "s",
                seconds,
                "import scipy.stats",
                starts,
                limit=limit,
                remark=f"at most {megabytes:,.0f} MB" + " (over the goal)" * (megabytes > _MEGABYTES),
            )
        for view, query in _QUERIES.items():
            trips, reads = [], []
            for _ in range(bed.repeats):
                trips.append(_read(connection, "select 1"))
                reads.append(_read(connection, query.format(run=run_id)))
            yield Line("analyses", f"{view} of {2 * notes:,} grades", "ms", reads, "select 1", trips, limit=_VIEW_MS)


def _make(connection: Connection[Any], url: str, kind: Kind, options: dict[str, Any]) -> None:
    row = database.call(connection, f"request_{kind}", **options, anew=True)[0]
    make_here(connection, url, kind, row["id"])
    found = database.rows(connection, _TABLES[kind], id=row["id"])[0]
    if found["status"] != "succeeded":
        raise RuntimeError(f"{kind} {row['id']} is {found['status']}: {found['error']}")


def _read(connection: Connection[Any], query: str) -> float:
    begun = time.perf_counter()
    connection.execute(query.encode()).fetchall()
    return (time.perf_counter() - begun) * 1000
