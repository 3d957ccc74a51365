"""The figure of looking at a big run: every view at a million notes and two million grades, while the run goes on."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from bed import Bed, connected, scalar, timed
from figures import Line
from fill import fill
from psycopg import Connection
from psycopg.errors import QueryCanceled

# One row per item, call, failure or line of the log: read by the page. All others aggregate, and are read whole.
PAGED = (
    "criterion_results",
    "failed_items",
    "grade_results",
    "note_results",
    "outstanding_items",
    "recent_activity",
    "run_log",
)
_PAGE_ROWS = 100
_CONCURRENCY = 50  # of the worker meanwhile: slow enough that what is left of the run lasts
_VIEW_MS = 1000
_STOP_SECONDS = 30  # a view that takes longer is not waited for
_ENOUGH_SECONDS = 20  # of samples of one view


def views(bed: Bed) -> Iterator[Line]:
    """Time a look at run_progress, and at every other view, over a big run that a worker goes on with."""
    notes, looks = (50_000, 100) if bed.is_quick else (1_000_000, 200)
    with bed.database() as url, connected(url) as connection:
        run_id = fill(connection, notes=notes)
        written = _items(connection, run_id)
        with bed.worker(url, _CONCURRENCY):
            connection.execute(f"set statement_timeout = '{_STOP_SECONDS}s'".encode())
            progress = f"select * from pgharness.run_progress where run_id = {run_id}"
            trips, glances = [], []
            for _ in range(bed.repeats):
                pairs = [(_read(connection, "select 1")[0], _read(connection, progress)[0]) for _ in range(looks)]
                trips.append(statistics.median(trip for trip, _ in pairs))
                glances.append(statistics.median(glance for _, glance in pairs))
            yield Line(
                "views",
                f"run_progress at {notes:,} notes and {2 * notes:,} grades, while it runs, p50 of {looks}",
                "ms",
                glances,
                "select 1",
                trips,
                at_most=5,
            )
            for view, query in _queries(connection, run_id):
                yield _line(connection, view, query, repeats=bed.repeats)
            status = scalar(connection, "select status from pgharness.runs where id = %s", run_id)
            if status != "running" or _items(connection, run_id) == written:
                raise RuntimeError(f"the run was to go on while its views were read: it is {status}")


def _items(connection: Connection[Any], run_id: int) -> int:
    counted = "select notes_succeeded + grades_succeeded from pgharness.runs where id = %s"
    return int(scalar(connection, counted, run_id))


def _line(connection: Connection[Any], view: str, query: str, *, repeats: int) -> Line:
    samples: list[float] = []
    remark, count = "", 0
    while not remark and len(samples) < repeats and sum(samples) < _ENOUGH_SECONDS * 1000:
        try:
            milliseconds, count = _read(connection, query)
        except QueryCanceled:
            milliseconds, remark = _STOP_SECONDS * 1000, f"stopped after {_STOP_SECONDS} s"
        samples.append(milliseconds)
    trips = [statistics.median(_read(connection, "select 1")[0] for _ in range(20)) for _ in samples]
    amount = "first " * (view in PAGED and count == _PAGE_ROWS) + f"{count:,} row{'s' * (count != 1)}"
    return Line("views", f"{view}: {amount}", "ms", samples, "select 1", trips, limit=_VIEW_MS, remark=remark)


def _queries(connection: Connection[Any], run_id: int) -> list[tuple[str, str]]:
    """Return how to read every view but run_progress: its part of one run where it has runs, by the page or whole."""
    found = connection.execute(
        "select c.relname, exists (select from pg_attribute as a where a.attrelid = c.oid and a.attname = 'run_id') "
        "from pg_class as c where c.relnamespace = 'pgharness'::regnamespace and c.relkind = 'v' "
        "and c.relname <> 'run_progress' order by c.relname"
    ).fetchall()
    return [
        (
            view,
            f"select * from pgharness.{view}"
            + f" where run_id = {run_id}" * has_run
            + f" limit {_PAGE_ROWS}" * (view in PAGED),
        )
        for view, has_run in found
    ]


def _read(connection: Connection[Any], query: str) -> tuple[float, int]:
    """Return the milliseconds until a query's last row has arrived (unparsed), and the number of its rows."""
    cursor = connection.cursor()
    milliseconds = timed(lambda: cursor.execute(query.encode())) * 1000
    return milliseconds, cursor.rowcount
