"""The figures of work that is under way: calls in flight, how soon they are durable, HTTP, and memory.

A worker is looked at through a window of time after its start-up, from outside and by what its rows say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bed import Bed, Process, connected, make_world, start_run, wait_for_end
from figures import Line

from pgharness.gateway.pacing import FIRST_WINDOW

LEVELS = {100: 0.97, 500: 0.97, 1000: 0.97, 3000: 0.95}  # calls in flight, and the least share of the ideal
HTTP_LEVELS = (100, 500, 1000)
MEMORY_LEVEL = 1000
CALL_SECONDS = 0.5
_DURABLE_MS = 50
_RESIDENT_MB = 200
_GROWTH_LATENCY = 0.2

# A call's item is a note or a grade; what it led to is durable when both are.
_SPANS = """
select start, start + c.latency_ms / 1000,
       extract(epoch from greatest(pg_xact_commit_timestamp(c.xmin), pg_xact_commit_timestamp(coalesce(n.xmin, g.xmin))))::float
  from pgharness.calls as c
 cross join lateral (select extract(epoch from c.started_at)::float as start) as moment
  left join pgharness.notes as n on c.kind = 'note' and n.run_id = c.run_id and n.ordinal = c.ordinal
  left join pgharness.grades as g on c.kind = 'grade' and g.run_id = c.run_id and g.ordinal = c.ordinal
 where c.outcome = 'succeeded'
"""


@dataclass(frozen=True, slots=True)
class Steady:
    """What one worker did within a window after its start-up."""

    calls_per_second: float
    durable_p99_ms: float  # from the end of a call
    unwritten: int
    cores: float
    stub_cores: float
    idle_mb: float
    busy_mb: float


class Windows:
    """Looks at worker processes through a window of time; kept for the figures that share them."""

    def __init__(
        self, bed: Bed, base_url: str | None = None, stub: Process | None = None, *, are_brief: bool = False
    ) -> None:
        self._bed = bed
        self._are_brief = are_brief
        self._stub = stub
        self.base_url = base_url
        self.ramp, self.window, self._tail = (1.5, 2.5, 1.5) if bed.is_quick else (3.0, 4.0, 2.0)
        self.seen: dict[int, list[Steady]] = {}

    def look(self, concurrency: int) -> Steady:
        """Run one worker at this concurrency and keep what was seen."""
        ramp = self.ramp * max(1.0, concurrency / 1500)
        if self.base_url is not None:  # calls of a model behind an API begin few at a time, and double each round trip
            ramp += CALL_SECONDS * math.log2(concurrency / FIRST_WINDOW)
        seconds = ramp + self.window + self._tail  # calls of the window's end must be over and recorded
        with self._bed.database() as url, connected(url) as connection:
            make_world(connection, latency=CALL_SECONDS, base_url=self.base_url, are_brief=self._are_brief)
            with self._bed.worker(url, concurrency) as worker:
                idle = worker.resident_mb
                run_id = start_run(connection, math.ceil(concurrency * (seconds + 2.0) / CALL_SECONDS / 2))
                time.sleep(ramp)
                cpu, stub_cpu = worker.cpu_seconds, self._stub_seconds()
                time.sleep(self.window)
                cores = (worker.cpu_seconds - cpu) / self.window
                stub_cores = (self._stub_seconds() - stub_cpu) / self.window
                busy = worker.resident_mb
                time.sleep(self._tail)
                connection.execute("select from pgharness.cancel_run(%s)", (run_id,))
            connection.execute("analyze pgharness.calls, pgharness.notes, pgharness.grades")
            spans = connection.execute(_SPANS.encode()).fetchall()
        start = min(begin for begin, *_ in spans) + ramp
        rate = calls_within([(begin, end) for begin, end, _ in spans], start, self.window)
        ended = [(end, durable) for _, end, durable in spans if start < end <= start + self.window]
        delays = [durable - end for end, durable in ended]
        p99 = statistics.quantiles(delays, n=100)[98] * 1000 + self._bed.commit_ms  # its stamp precedes its flush
        unwritten = sum(durable > start + self.window for _, durable in ended)
        steady = Steady(rate, p99, unwritten, cores, stub_cores, idle, busy)
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
    for level, goal in LEVELS.items():
        seen = [windows.look(level) for _ in range(bed.repeats)]
        yield _share(f"{level:,} simulated calls of {CALL_SECONDS} s in flight, one process", level, seen, goal)
        yield Line(
            "calls",
            f"{level:,} in flight: from a call's end to its rows' commit, p99",
            "ms",
            [steady.durable_p99_ms for steady in seen],
            "a commit of one row alone",
            [bed.commit_ms] * len(seen),
            limit=_DURABLE_MS,
        )
    level, long = max(LEVELS), Windows(bed)
    seen = [long.look(level) for _ in range(bed.repeats)]
    yield _share(f"the same {level:,}, but whole notes by four criteria are made up", level, seen, None)


def _share(subject: str, level: int, seen: Sequence[Steady], goal: float | None) -> Line:
    return Line(
        "calls",
        subject,
        "calls/s",
        [steady.calls_per_second for steady in seen],
        "ideal: concurrency / latency",
        [level / CALL_SECONDS] * len(seen),
        at_least=goal,
        remark=_at_work(seen),
        details={"workers": seen},
    )


def http(bed: Bed, windows: Windows) -> Iterator[Line]:
    """Compare calls over real HTTP with bare loops of httpx and of aiohttp, against the same stub."""
    for level in HTTP_LEVELS:
        seen: list[Steady] = []
        loops: dict[str, list[float]] = {"httpx": [], "aiohttp": []}
        for _ in range(bed.repeats):
            seen.append(windows.look(level))
            for loop, rates in loops.items():
                limits = ("--concurrency", level, "--ramp", windows.ramp / 2, "--window", windows.window)
                spans = bed.baseline_answer(loop, windows.base_url, *limits)["spans"]
                start = min(begin for begin, _ in spans) + windows.ramp / 2
                rates.append(calls_within(spans, start, windows.window))
        ideal = level / CALL_SECONDS
        shares = [statistics.median(rates) / ideal for rates in loops.values()]
        rate = statistics.median(steady.calls_per_second for steady in seen)
        remark = f"{rate / ideal:.0%} of the ideal, the loops {shares[0]:.0%} and {shares[1]:.0%}; {_at_work(seen)}"
        for loop, baseline, goal in (
            ("httpx", "bare loop of httpx over aiohttp", 0.9),
            ("aiohttp", "bare loop of aiohttp", 0.8),
        ):
            yield Line(
                "http",
                f"{level:,} HTTP calls of {CALL_SECONDS} s in flight, one process",
                "calls/s",
                [steady.calls_per_second for steady in seen],
                baseline,
                loops[loop],
                at_least=goal,
                remark=remark if loop == "httpx" else "",
                details={"workers": seen, "ideal": ideal},
            )


def _at_work(seen: Sequence[Steady]) -> str:
    cores = f"the worker used {statistics.median(steady.cores for steady in seen):.2f} cores"
    if stub := statistics.median(steady.stub_cores for steady in seen):
        cores += f", the stub {stub:.2f}"
    unwritten = round(statistics.median(steady.unwritten for steady in seen))
    return f"{cores}; {unwritten:,} outcomes not yet durable at the window's end"


def memory(bed: Bed, windows: Windows, kind: str) -> Iterator[Line]:
    """Compare the memory of a worker process with 1,000 calls in flight to its own when idle."""
    seen = windows.seen.get(MEMORY_LEVEL) or [windows.look(MEMORY_LEVEL) for _ in range(bed.repeats)]
    busy, idle = [steady.busy_mb for steady in seen], [steady.idle_mb for steady in seen]
    each = statistics.median((b - i) * 1000 / MEMORY_LEVEL for b, i in zip(busy, idle, strict=True))
    yield Line(
        "memory",
        f"worker process, {MEMORY_LEVEL:,} {kind} calls in flight",
        "MB",
        busy,
        "the same process, idle",
        idle,
        at_most=2,
        limit=_RESIDENT_MB,
        remark=f"{each:.0f} kB a call",
    )


def growth(bed: Bed) -> Iterator[Line]:
    """Compare the memory of a worker late in a long run to its own early in it."""
    items = 20_000 if bed.is_quick else 100_000
    curves = [_resident(bed, items) for _ in range(bed.repeats)]
    fifths = [(curve, len(curve) // 5) for curve in curves]
    yield Line(
        "memory",
        f"worker process in the last fifth of a run of {items:,} items, {MEMORY_LEVEL:,} in flight",
        "MB",
        [statistics.median(curve[-fifth:]) for curve, fifth in fifths],
        "its second fifth",
        [statistics.median(curve[fifth : 2 * fifth]) for curve, fifth in fifths],
        at_most=1.1,
        limit=_RESIDENT_MB,
        details={"resident_mb": curves},
    )


def _resident(bed: Bed, items: int) -> list[float]:
    """Return the worker's memory as it was, five times a second, from the start of a run to its end."""
    curve: list[float] = []
    with bed.database() as url, connected(url) as connection:
        make_world(connection, latency=_GROWTH_LATENCY)
        with bed.worker(url, MEMORY_LEVEL) as worker:
            run_id = start_run(connection, items // 2)
            wait_for_end(connection, run_id, every=0.2, meanwhile=lambda: curve.append(worker.resident_mb))
    return curve
