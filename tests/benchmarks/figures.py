"""The figures: each is measured next to its baseline, in the same run and alternating with it.

A figure is a function of the bed that yields lines; a line holds the samples of both sides, pair by pair, so that its
ratio can be taken within each pair. docs/performance.md explains each of them to the reader. Here are those that time
whole runs and their starts; windows.py, views.py and comparison.py have the others.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from bed import NOTE, PATIENCE_SECONDS, Bed, connected, make_world, scalar, start_run, timed, wait_for_end
from procrastinate import App, SyncPsycopgConnector
from psycopg import Connection
from psycopg.types.json import Jsonb


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: what was measured, what it is compared with, and the goals.

    `at_least` and `at_most` are goals for the ratio to the baseline, `limit` is the most that the measured value may be.
    """

    figure: str
    subject: str
    unit: str
    samples: Sequence[float]
    baseline: str
    baseline_samples: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None
    limit: float | None = None
    remark: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.samples, self.baseline_samples, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def goals(self) -> list[tuple[str, bool]]:
        """Each goal in words, and whether it is met."""
        goals = []
        if self.at_least is not None:
            goals.append((f"ratio ≥ {self.at_least:g}", self.ratio >= self.at_least))
        if self.at_most is not None:
            goals.append((f"ratio ≤ {self.at_most:g}", self.ratio <= self.at_most))
        if self.limit is not None:
            goals.append((f"≤ {self.limit:,g} {self.unit}", self.value <= self.limit))
        return goals


# Items per second -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Whole:
    """What became of a run from its start to its end."""

    items_per_second: float
    items: int
    cores: float


def whole_run(bed: Bed, *, notes: int, concurrency: int, base_url: str | None = None) -> Whole:
    """Time a run from start_run to its end, on a simulator that answers at once or on the stub; count its rows."""
    with bed.database() as url, connected(url) as connection:
        make_world(connection, base_url=base_url)
        with bed.worker(url, concurrency) as worker:
            cpu = worker.cpu_seconds
            run = wait_for_end(connection, start_run(connection, notes), every=0.1)
            seconds = (run["finished_at"] - run["created_at"]).total_seconds()
            cores = (worker.cpu_seconds - cpu) / seconds
        rows = sum(scalar(connection, f"select count(*) from pgharness.{table}") for table in ("notes", "grades"))
        if rows != run["note_count"] + run["grade_count"]:
            raise RuntimeError(f"{rows} rows of {run['note_count'] + run['grade_count']} are there")
    return Whole(rows / seconds, rows, cores)


def items(bed: Bed) -> Iterator[Line]:
    """Time whole runs on a simulator that answers at once, and Procrastinate's no-op jobs."""
    notes, jobs, concurrency = (4_000, 2_000, 100) if bed.is_quick else (12_000, 3_000, 100)
    ours, theirs = [], []
    for _ in range(bed.repeats):
        ours.append(whole_run(bed, notes=notes, concurrency=concurrency))
        with bed.database(migrated=False) as url:
            done = bed.baseline_answer("jobs", url, "--count", jobs, "--concurrency", concurrency)
            theirs.append(done["jobs"] / done["seconds"])
    yield Line(
        "items",
        f"notes and grades, zero latency ({ours[0].items:,} items, concurrency {concurrency})",
        "items/s",
        [run.items_per_second for run in ours],
        f"Procrastinate, no-op jobs ({jobs:,}, concurrency {concurrency})",
        theirs,
        at_least=10,
        remark=f"the worker used {statistics.median(run.cores for run in ours):.2f} cores",
        details={"runs": ours},
    )


# Planning -------------------------------------------------------------------------------------------------------------


def planning(bed: Bed) -> Iterator[Line]:
    """Time start_run of a million notes and its first call, and a bare insert of as many rows of a note's width."""
    cases, replications = (1_000 if bed.is_quick else 10_000), 100
    notes = cases * replications
    ours, theirs, firsts = [], [], []
    with bed.database() as url, connected(url) as connection:
        make_world(connection, cases=cases, latency=0.5)
        with bed.worker(url, 100):
            for _ in range(bed.repeats):
                start = time.perf_counter()
                run_id = start_run(connection, notes)
                committed = time.time()
                ours.append((time.perf_counter() - start) * 1000)
                firsts.append((_first_call(connection, run_id) - committed) * 1000)
                connection.execute("select from pgharness.cancel_run(%s)", (run_id,))
                theirs.append(_bare_insert(connection, notes) * 1000)
    planned = f"{notes:,} notes ({cases:,} cases x {replications})"
    yield Line(
        "planning",
        f"start_run of {planned}, and as many grades",
        "ms",
        ours,
        f"insert into ... select of {notes:,} rows",
        theirs,
        at_most=0.1,
    )
    yield Line(
        "planning",
        f"from the commit of {planned} to the first call, idle worker",
        "ms",
        firsts,
        "the start_run before it",
        ours,
        limit=300,
    )


def _first_call(connection: Connection[Any], run_id: int) -> float:
    """Wait until a call of a run is recorded; return when the first one started."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        first = scalar(connection, "select min(started_at) from pgharness.calls where run_id = %s", run_id)
        if first is not None:
            return float(first.timestamp())
        time.sleep(0.05)
    raise TimeoutError(f"no call of run {run_id} in {PATIENCE_SECONDS:g} s")


def _bare_insert(connection: Connection[Any], rows: int) -> float:
    """Return the seconds that it takes to insert so many rows of a note's columns, width and primary key."""
    connection.execute("create table bare as select * from pgharness.notes where false")
    connection.execute("alter table bare add primary key (run_id, ordinal)")
    insert = f"""
        insert into bare (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output, created_at)
        select 1, i, i %% 1000, 0, 100, i / 1000, 1, %s, now() from generate_series(1, {rows}) as i"""
    seconds = timed(lambda: connection.execute(insert.encode(), (Jsonb(NOTE),)))
    connection.execute("drop table bare")
    connection.execute("checkpoint")
    os.sync()  # the file system has half a gigabyte to free, and other commits would wait for it
    return seconds


# A small run beside a big one -----------------------------------------------------------------------------------------


def sharing(bed: Bed) -> Iterator[Line]:
    """Time a small run alone, and while a big one that was started before it has the only worker busy."""
    big, small, lead, patience = 100_000, 50, (5.0 if bed.is_quick else 10.0), 60.0
    alone, beside, unfinished = [], [], 0
    for _ in range(bed.repeats):
        with bed.database() as url, connected(url) as connection:
            make_world(connection, latency=0.5)
            with bed.worker(url, 100):
                run = wait_for_end(connection, start_run(connection, small), every=0.05)
                alone.append((run["finished_at"] - run["created_at"]).total_seconds())
                big_id = start_run(connection, big)
                time.sleep(lead)
                begun = time.monotonic()
                try:
                    run = wait_for_end(connection, start_run(connection, small), every=0.05, patience=patience)
                    beside.append((run["finished_at"] - run["created_at"]).total_seconds())
                except TimeoutError:
                    beside.append(time.monotonic() - begun)
                    unfinished += 1
                done, status = connection.execute(
                    "select notes_succeeded, status from pgharness.runs where id = %s", (big_id,)
                ).fetchone() or (0, "")
                if status != "running" or not done:
                    raise RuntimeError(f"the big run was to be at work meanwhile: it is {status}, with {done} notes")
                connection.execute("select from pgharness.cancel_run(%s)", (big_id,))
    yield Line(
        "sharing",
        f"a run of {small} notes, started {lead:g} s after one of {big:,}, concurrency 100, calls of 0.5 s",
        "s",
        beside,
        "the same run alone",
        alone,
        at_most=2,
        remark=f"{unfinished} of {len(beside)} had not ended after {patience:g} s" if unfinished else "",
    )


# Start to first call --------------------------------------------------------------------------------------------------


def start(bed: Bed) -> Iterator[Line]:
    """Time from start_run to the first call with an idle worker, and from a job's deferral to its start."""
    trials = 5 if bed.is_quick else 10
    ours, theirs, ends = [], [], []
    for _ in range(bed.repeats):
        with bed.database() as url, connected(url) as connection:
            make_world(connection, cases=1)
            with bed.worker(url, 10):
                latencies, durations = [], []
                for _ in range(trials):
                    time.sleep(0.3)
                    begun = time.time()
                    run_id = scalar(connection, "select run_id from pgharness.start_run('bench')")
                    run = wait_for_end(connection, run_id, every=0.01)
                    durations.append((run["finished_at"].timestamp() - begun) * 1000)
                    first = scalar(
                        connection, "select min(started_at) from pgharness.calls where run_id = %s", run["id"]
                    )
                    latencies.append((first.timestamp() - begun) * 1000)
            ours.append(statistics.median(latencies))
            ends.append(statistics.median(durations))
        with bed.database(migrated=False) as url, bed.baseline("idle", url) as program:
            theirs.append(_job_latency(url, program, trials))
    yield Line(
        "start",
        f"start_run to first call, idle worker, median of {trials}",
        "ms",
        ours,
        "Procrastinate: defer to job's start",
        theirs,
        at_most=2,
        limit=100,
        remark=f"start_run to the end of its note and grade: {statistics.median(ends):.0f} ms",
        details={"end_ms": ends},
    )


def _job_latency(url: str, program: Any, trials: int) -> float:
    """Return the median milliseconds from a job's deferral to its start in an idle stock worker."""
    assert program.stdout.readline().strip() == "ready"
    latencies = []
    with App(connector=SyncPsycopgConnector(conninfo=url)).open() as app:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with psycopg.connect(url) as connection:
                if scalar(connection, "select count(*) from procrastinate_workers"):
                    break
            time.sleep(0.05)
        job = app.configure_task("stamp")
        for _ in range(trials):
            time.sleep(0.5)  # until it listens; then idle
            begun = time.time()
            job.defer()
            latencies.append((float(program.stdout.readline()) - begun) * 1000)
    return statistics.median(latencies)
