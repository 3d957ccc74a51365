"""What is measured while the storm goes on: memory and open files of every process, and connections of the server."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from hosts import Host

LONG_SHARE = 0.6  # of the storm: a process that lived so long is judged
SAMPLES_NEEDED = 12
_TOLERANCE, _TOLERANCE_MIB, _TOLERANCE_FILES = 1.15, 10.0, 8
_STUCK_TRANSACTION_SECONDS = 15
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(slots=True)
class Life:
    """One process as it was seen: (seconds, resident MiB, open files or None) a sample."""

    host: str
    role: str
    pid: int
    samples: list[tuple[float, float, int | None]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] - self.samples[0][0] if self.samples else 0.0

    def thirds(self, column: int) -> list[float]:
        """Return the median of a column in each third of the life; nan where it is not known."""
        first, length = self.samples[0][0], self.seconds or 1.0
        parts: list[list[float]] = [[], [], []]
        for sample in self.samples:
            if (value := sample[column]) is not None:
                parts[min(int(3 * (sample[0] - first) / length), 2)].append(value)
        return [statistics.median(part) if part else float("nan") for part in parts]

    def growth(self) -> list[str]:
        """Return in words what grew from the second third to the last."""
        grown = []
        _, second, last = self.thirds(1)
        if last > second * _TOLERANCE + _TOLERANCE_MIB:
            grown.append(f"memory of {self.role} {self.pid} on {self.host} grew from {second:.0f} to {last:.0f} MiB")
        _, second, last = self.thirds(2)
        if last > second + _TOLERANCE_FILES:
            grown.append(f"open files of {self.role} {self.pid} on {self.host} grew from {second:.0f} to {last:.0f}")
        return grown


class Watch:
    """Samples all hosts and the server."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        self._begun = time.monotonic()
        self.lives: dict[tuple[int, str], Life] = {}
        self.connections: list[tuple[float, int]] = []  # of worker processes
        self.stuck_transactions: Counter[str] = Counter()

    def sample_processes(self) -> None:
        at = time.monotonic() - self._begun
        for host in self._hosts:
            roles = [(host.supervisor, "supervisor")] if host.supervisor else []
            roles += [(pid, "worker") for pid in host.workers]
            for pid, role in roles:
                if pid is not None and (seen := _looked_at(pid)) is not None:
                    mark, resident, files = seen
                    life = self.lives.setdefault((pid, mark), Life(host.name, role, pid))
                    life.samples.append((at, resident, files))

    def sample_server(self, connection: psycopg.Connection[Any]) -> None:
        counts = worker_connections(connection)
        self.connections.append((time.monotonic() - self._begun, sum(counts.values())))
        stuck = connection.execute(
            "select application_name, left(query, 200) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid() and state like 'idle in transaction%%'"
            "   and state_change < clock_timestamp() - make_interval(secs => %s)",
            (_STUCK_TRANSACTION_SECONDS,),
        )
        self.stuck_transactions.update(f"{name}: {query}" for name, query in stuck)

    def long_lives(self, storm_seconds: float) -> list[Life]:
        """Return the processes that lived through most of the storm."""
        return [
            life
            for life in self.lives.values()
            if life.seconds >= LONG_SHARE * storm_seconds and len(life.samples) >= SAMPLES_NEEDED
        ]


def worker_connections(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Return the connections of workers and supervisors, by what they call themselves."""
    found = connection.execute(
        "select application_name, count(*) from pg_stat_activity"
        " where datname = current_database() and application_name like 'pgharness%' group by 1"
    )
    counts: dict[str, int] = defaultdict(int)
    counts.update(found.fetchall())
    return counts


def _looked_at(pid: int) -> tuple[str, float, int | None] | None:
    """Return what tells a process from a later one of its id, its resident MiB, and its open files if that is known."""
    if Path("/proc/self/statm").exists():
        with contextlib.suppress(OSError):
            born = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            return born, pages * _PAGE_MIB, len(os.listdir(f"/proc/{pid}/fd"))
        return None
    command = ["ps", "-o", "rss=,lstart=", "-p", str(pid)]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(None, 1)
    return (told[1].strip(), int(told[0]) / 1024, None) if len(told) == 2 else None
