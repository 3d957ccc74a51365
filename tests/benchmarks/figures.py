"""The figures: each is measured next to its baseline, in the same run and alternating with it.

A figure is a function of the bed that yields lines; a line holds the samples of both sides, pair by pair, so that its
ratio can be taken within each pair. docs/performance.md explains each of them to the reader.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from bed import NOTE, PATIENCE_SECONDS, Bed, Process, connected, make_world, scalar, start_run, timed, wait_for_end
from procrastinate import App, SyncPsycopgConnector
from psycopg import Connection
from psycopg.types.json import Jsonb

LEVELS = (100, 500, 1000)
CALL_SECONDS = 0.5
_PLANNED_NOTES = 100_000


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: what was measured, what it is compared with, and the goal for the ratio of both."""

    figure: str
    subject: str
    unit: str
    samples: Sequence[float]
    baseline: str
    baseline_samples: Sequence[float]
    at_least: float | None = None
    at_most: float | None = None
    remark: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [ours / theirs for ours, theirs in zip(self.samples, self.baseline_samples, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def is_met(self) -> bool | None:
        """Whether the ratio reaches its goal; None when it has none."""
        if self.at_least is not None:
            return self.ratio >= self.at_least
        return self.ratio <= self.at_most if self.at_most is not None else None


# Items per second -----------------------------------------------------------------------------------------------------


def items(bed: Bed) -> Iterator[Line]:
    """Time whole runs on a simulator that answers at once, and Procrastinate's no-op jobs."""
    notes, jobs, concurrency = (4_000, 2_000, 100) if bed.is_quick else (12_000, 3_000, 100)
    ours, theirs, cores = [], [], []
    for _ in range(bed.repeats):
        with bed.database() as url, connected(url) as connection:
            make_world(connection)
            with bed.worker(url, concurrency) as worker:
                cpu = worker.cpu_seconds
                run = wait_for_end(connection, start_run(connection, notes), every=0.1)
                seconds = (run["finished_at"] - run["created_at"]).total_seconds()
                cores.append((worker.cpu_seconds - cpu) / seconds)
            rows = sum(scalar(connection, f"select count(*) from pgharness.{table}") for table in ("notes", "grades"))
            if rows != run["note_count"] + run["grade_count"]:
                raise RuntimeError(f"{rows} rows of {run['note_count'] + run['grade_count']} are there")
            ours.append(rows / seconds)
        with bed.database(migrated=False) as url:
            done = bed.baseline_answer("jobs", url, "--count", jobs, "--concurrency", concurrency)
            theirs.append(done["jobs"] / done["seconds"])
    yield Line(
        "items",
        f"notes and grades, zero latency ({rows:,} items, concurrency {concurrency})",
        "items/s",
        ours,
        f"Procrastinate, no-op jobs ({jobs:,}, concurrency {concurrency})",
        theirs,
        at_least=10,
        remark=f"the worker used {statistics.median(cores):.2f} cores",
        details={"worker_cores": cores},
    )


# Calls in flight ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Steady:
    """What one worker did within a window after its start-up."""

    calls_per_second: float
    unwritten: int
    cores: float
    stub_cores: float
    idle_mib: float
    busy_mib: float


class Windows:
    """Looks at worker processes through a window of time; kept for the figures that share them."""

    def __init__(self, bed: Bed, base_url: str | None = None, stub: Process | None = None) -> None:
        self._bed = bed
        self._stub = stub
        self.base_url = base_url
        self.ramp, self.window, self._tail = (1.5, 2.5, 1.5) if bed.is_quick else (3.0, 4.0, 2.0)
        self.seen: dict[int, list[Steady]] = {}

    def look(self, concurrency: int) -> Steady:
        """Run one worker at this concurrency and keep what was seen."""
        seconds = self.ramp + self.window + self._tail  # calls of the window's end must be over and recorded
        with self._bed.database() as url, connected(url) as connection:
            make_world(connection, latency=CALL_SECONDS, base_url=self.base_url)
            with self._bed.worker(url, concurrency) as worker:
                idle = worker.resident_mib
                run_id = start_run(connection, math.ceil(concurrency * (seconds + 2.0) / CALL_SECONDS / 2))
                time.sleep(self.ramp)
                cpu, stub_cpu = worker.cpu_seconds, self._stub_seconds()
                time.sleep(self.window)
                cores = (worker.cpu_seconds - cpu) / self.window
                stub_cores = (self._stub_seconds() - stub_cpu) / self.window
                busy = worker.resident_mib
                time.sleep(self._tail)
                connection.execute("select from pgharness.cancel_run(%s)", (run_id,))
            spans = connection.execute(
                "select at, at + latency_ms / 1000 from pgharness.calls, "
                "lateral (select extract(epoch from started_at)::float as at) as moment where outcome = 'succeeded'"
            ).fetchall()
            start = min(begin for begin, _ in spans) + self.ramp
            written = scalar(
                connection,
                "select (select count(*) from pgharness.notes where created_at <= to_timestamp(%s)) "
                "+ (select count(*) from pgharness.grades where created_at <= to_timestamp(%s))",
                start + self.window,
                start + self.window,
            )
        ended = sum(end <= start + self.window for _, end in spans)
        rate = calls_within(spans, start, self.window)
        steady = Steady(rate, ended - written, cores, stub_cores, idle, busy)
        self.seen.setdefault(concurrency, []).append(steady)
        return steady

    def _stub_seconds(self) -> float:
        return self._stub.cpu_seconds if self._stub else 0.0


def calls_within(spans: Sequence[tuple[float, float]], start: float, window: float) -> float:
    """Return calls per second within a window, where a call that straddles an edge counts by its part inside.

    Calls of one length come in waves; counting whole calls would be off by up to a wave.
    """
    inside = (
        max(0.0, min(end, start + window) - max(begin, start)) / (end - begin) for begin, end in spans if end > begin
    )
    return sum(inside) / window


def calls(bed: Bed, windows: Windows) -> Iterator[Line]:
    """Compare the calls per second of a simulator of constant latency with what the concurrency allows at most."""
    for level in LEVELS:
        seen = [windows.look(level) for _ in range(bed.repeats)]
        yield Line(
            "calls",
            f"{level:,} simulated calls of {CALL_SECONDS} s in flight, one process",
            "calls/s",
            [steady.calls_per_second for steady in seen],
            "ideal: concurrency / latency",
            [level / CALL_SECONDS] * len(seen),
            at_least=0.95,
            remark=_at_work(seen),
            details={"workers": seen},
        )


def http(bed: Bed, windows: Windows) -> Iterator[Line]:
    """Compare calls over real HTTP with a bare loop of the same client against the same stub."""
    for level in LEVELS:
        seen, bare, bare_mib = [], [], []
        for _ in range(bed.repeats):
            seen.append(windows.look(level))
            limits = ("--concurrency", level, "--ramp", windows.ramp / 2, "--window", windows.window)
            answer = bed.baseline_answer("loop", windows.base_url, *limits)
            start = min(begin for begin, _ in answer["spans"]) + windows.ramp / 2
            bare.append(calls_within(answer["spans"], start, windows.window))
            bare_mib.append(answer["resident_mib"])
        ideal = level / CALL_SECONDS
        rate = statistics.median(steady.calls_per_second for steady in seen)
        yield Line(
            "http",
            f"{level:,} HTTP calls of {CALL_SECONDS} s in flight, one process",
            "calls/s",
            [steady.calls_per_second for steady in seen],
            "bare loop of the same client",
            bare,
            at_least=0.9,
            remark=f"{rate / ideal:.0%} of the ideal, the loop {statistics.median(bare) / ideal:.0%}; {_at_work(seen)}",
            details={"workers": seen, "ideal": ideal, "loop_resident_mib": bare_mib},
        )


def _at_work(seen: Sequence[Steady]) -> str:
    cores = f"the worker used {statistics.median(steady.cores for steady in seen):.2f} cores"
    if stub := statistics.median(steady.stub_cores for steady in seen):
        cores += f", the stub {stub:.2f}"
    unwritten = round(statistics.median(steady.unwritten for steady in seen))
    return f"{cores}; {unwritten:,} outcomes not yet durable at the window's end"


def memory(bed: Bed, windows: Windows, kind: str) -> Iterator[Line]:
    """Compare the memory of a worker process with 1,000 calls in flight to its own when idle."""
    level = LEVELS[-1]
    seen = windows.seen.get(level) or [windows.look(level) for _ in range(bed.repeats)]
    busy, idle = [steady.busy_mib for steady in seen], [steady.idle_mib for steady in seen]
    each = statistics.median((b - i) * 1024 / level for b, i in zip(busy, idle, strict=True))
    yield Line(
        "memory",
        f"worker process, {level:,} {kind} calls in flight",
        "MiB",
        busy,
        "the same process, idle",
        idle,
        at_most=2,
        remark=f"{each:.0f} KiB a call",
    )


# Planning -------------------------------------------------------------------------------------------------------------


def planning(bed: Bed) -> Iterator[Line]:
    """Time start_run of 100,000 notes, and a bare insert of as many rows of a note's width."""
    ours, theirs = [], []
    with bed.database() as url, connected(url) as connection:
        make_world(connection, cases=1_000)
        for _ in range(bed.repeats):
            start = time.perf_counter()
            run_id = start_run(connection, _PLANNED_NOTES)
            ours.append((time.perf_counter() - start) * 1000)
            connection.execute("select from pgharness.cancel_run(%s)", (run_id,))
            connection.execute(b"create table bare as select * from pgharness.notes")
            connection.execute(b"alter table bare add primary key (run_id, ordinal)")
            insert = f"""
                insert into bare (run_id, ordinal, case_number, combination_number, overlap, replication,
                                  attempts, output, created_at)
                select 1, i, i %% 1000, 0, 100, i / 1000, 1, %s, now() from generate_series(1, {_PLANNED_NOTES}) as i"""
            theirs.append(timed(lambda text=insert: connection.execute(text.encode(), (Jsonb(NOTE),))) * 1000)
            connection.execute("drop table bare")
            connection.execute("checkpoint")
    yield Line(
        "planning",
        f"start_run of {_PLANNED_NOTES:,} notes (1,000 cases x 100), and as many grades",
        "ms",
        ours,
        f"insert into ... select of {_PLANNED_NOTES:,} rows",
        theirs,
        at_most=1,
    )


# Views ----------------------------------------------------------------------------------------------------------------


def views(bed: Bed) -> Iterator[Line]:
    """Time a look at run_progress and every other view over a run with 100,000 notes, and a bare round trip."""
    with bed.database() as url, connected(url) as connection:
        make_world(connection, cases=1_000)
        run_id = start_run(connection, _PLANNED_NOTES)
        filled = _fill(connection, run_id)
        looks = 100 if bed.is_quick else 200
        trips, glances = [], []
        progress = f"select * from pgharness.run_progress where run_id = {run_id}"
        for _ in range(bed.repeats):
            pairs = [(_read(connection, "select 1")[0], _read(connection, progress)[0]) for _ in range(looks)]
            trips.append(statistics.median(trip for trip, _ in pairs))
            glances.append(statistics.median(glance for _, glance in pairs))
        yield Line(
            "views",
            f"run_progress at {_PLANNED_NOTES:,} notes, p50 of {looks} looks",
            "ms",
            glances,
            "select 1",
            trips,
            at_most=20,
            remark=f"{filled:,.0f} outcomes/s through record_outcomes alone, one connection",
            details={"record_outcomes_per_second": filled},
        )
        for view, query in _view_queries(connection, run_id):
            if view == "run_progress":
                continue
            samples: list[float] = []
            count = 0
            while len(samples) < bed.repeats and sum(samples) < 5_000:
                milliseconds, count = _read(connection, query)
                samples.append(milliseconds)
            trips = [statistics.median(_read(connection, "select 1")[0] for _ in range(20)) for _ in samples]
            yield Line("views", f"{view}: {count:,} row{'s' * (count != 1)}", "ms", samples, "select 1", trips)


def _fill(connection: Connection[Any], run_id: int, *, batch: int = 500) -> float:
    """Record nearly all of a run's notes and grades as a worker would; return the outcomes recorded per second."""
    worker_id = scalar(connection, "select pgharness.register_worker('bench', 0, '', '{note,grade}', 1)")
    model_id = scalar(connection, "select id from pgharness.models where name = 'simulated'")
    call = {
        "model_id": model_id,
        "outcome": "succeeded",
        "http_status": 200,
        "finish_reason": "stop",
        "request_id": "r",
    }
    call |= {"input_tokens": 300, "output_tokens": 130, "cached_tokens": 0, "cost_usd": 0.001, "latency_ms": 500}
    verdicts = [{"rationale": "The note says so, in its first and in its last line.", "satisfaction": 80}] * 4
    record = """
        select from pgharness.record_outcomes(%s, (
            select jsonb_agg(%s || jsonb_build_object('ordinal', o, 'calls', jsonb_build_array(
                       %s || jsonb_build_object('started_at', clock_timestamp()))))
              from generate_series(%s::bigint, %s::bigint) as o))"""
    done = 0
    start = time.perf_counter()
    for kind, answer, count in (
        ("note", {"output": NOTE}, _PLANNED_NOTES),
        ("grade", {"verdicts": verdicts}, _PLANNED_NOTES - 1_000),  # so that the run still runs
    ):
        outcome = {"run_id": run_id, "kind": kind, "attempt": 1, "result": "succeeded"} | answer
        for first in range(0, count, batch):
            last = min(first + batch, count) - 1
            connection.execute(record.encode(), (worker_id, Jsonb(outcome), Jsonb(call), first, last))
            done += last - first + 1
    seconds = time.perf_counter() - start
    connection.execute("vacuum analyze")
    connection.execute("checkpoint")
    return done / seconds


def _view_queries(connection: Connection[Any], run_id: int) -> list[tuple[str, str]]:
    """Return how to read every view whole, or its part of one run where it has runs."""
    found = connection.execute(
        "select c.relname, exists (select from pg_attribute as a where a.attrelid = c.oid and a.attname = 'run_id') "
        "from pg_class as c where c.relnamespace = 'pgharness'::regnamespace and c.relkind = 'v' order by c.relname"
    ).fetchall()
    return [
        (view, f"select * from pgharness.{view}" + f" where run_id = {run_id}" * has_run) for view, has_run in found
    ]


def _read(connection: Connection[Any], query: str) -> tuple[float, int]:
    """Return the milliseconds until a query's last row has arrived (unparsed), and the number of its rows."""
    cursor = connection.cursor()
    milliseconds = timed(lambda: cursor.execute(query.encode())) * 1000
    return milliseconds, cursor.rowcount


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
                    run = wait_for_end(connection, start_run(connection, 1), every=0.01)
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
