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
from pgharness.desk import make_here

_SECONDS = 10
_MEGABYTES = 1_000
_VIEW_MS = 2_000
_QUERIES = {
    "combination_estimates": "select * from pgharness.combination_estimates where run_id = {run}",
    "paired_differences": "select * from pgharness.paired_differences where run_id = {run}",
    "paired_run_differences": "select * from pgharness.paired_run_differences('{run}', '{run}')",
}


def analyses(bed: Bed) -> Iterator[Line]:
    """Time each kind of analysis, with the most memory that its process takes, and each view that needs no worker."""
    notes = 25_000 if bed.is_quick else 500_000
    with bed.database() as url, connected(url) as connection:
        run_id = fill(connection, notes=notes)
        for kind in ("compare", "agreement", "power"):
            seconds, starts, megabytes = [], [], 0.0
            for _ in range(bed.repeats):
                seconds.append(timed(lambda kind=kind: _analyse(url, kind, run_id)))
                starts.append(timed(lambda: subprocess.run([sys.executable, "-c", "import scipy.stats"], check=True)))
                megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
            yield Line(
                "analyses",
                f"{kind} of {2 * notes:,} grades, its process included",
                "s",
                seconds,
                "import scipy.stats",
                starts,
                limit=_SECONDS,
                remark=f"at most {megabytes:,.0f} MB" + " (over the goal)" * (megabytes > _MEGABYTES),
            )
        for view, query in _QUERIES.items():
            trips, reads = [], []
            for _ in range(bed.repeats):
                trips.append(_read(connection, "select 1"))
                reads.append(_read(connection, query.format(run=run_id)))
            yield Line("analyses", f"{view} of {2 * notes:,} grades", "ms", reads, "select 1", trips, limit=_VIEW_MS)


def _analyse(connection: Connection[Any], url: str, kind: str, run_id: int) -> None:
    row = database.call(connection, "request_analysis", kind=kind, run_ids=[run_id], anew=True)[0]
    make_here(connection, url, "analysis", row["id"])
    found = database.rows(connection, "analyses", id=row["id"])[0]
    if found["status"] != "succeeded":
        raise RuntimeError(f"analysis {row['id']} is {found['status']}: {found['error']}")


def _read(connection: Connection[Any], query: str) -> float:
    begun = time.perf_counter()
    connection.execute(query.encode()).fetchall()
    return (time.perf_counter() - begun) * 1000
