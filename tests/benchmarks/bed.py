"""What the figures are measured on: a durable server of the benchmark's own, real worker processes, the HTTP stub.

Nothing here measures. Everything that is started is stopped on exit, and the server's data are removed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psycopg
from psycopg import Connection
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from pgharness import schema
from pgharness.embedded import EmbeddedPostgres, _filesystem, _mounts

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PATIENCE_SECONDS = 300.0  # after which something hangs, and the benchmark says so
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_TEMPLATE = "bench_template"

CASE_COUNT = 50
# A short consultation and a rubric of four criteria: about 1.1 kB of prompt, a note of about 0.5 kB.
_TURNS = (
    ("Doctor", "Good morning, what has brought you here today, and how long has it been going on?"),
    ("Patient", "I have had a cough for nine days, and since Tuesday a fever of up to 38.7 degrees."),
    ("Doctor", "Do you bring anything up, and does it hurt when you take a deep breath?"),
    ("Patient", "Some yellow phlegm in the morning, and a stitch on the right side when I breathe in."),
    ("Doctor", "Any other conditions, regular medicines or allergies that I should know of?"),
    ("Patient", "Mild asthma with a salbutamol inhaler, and penicillin gave me a rash as a child."),
    ("Doctor", "There are crackles at the right base, the oxygen saturation is 96 percent."),
    ("Doctor", "This is most likely pneumonia. I suggest doxycycline for five days and a chest film."),
    ("Patient", "Should I stay at home? I work in a kitchen with eleven other people."),
    ("Doctor", "Yes, until the fever has been gone for a day. Come back at once if breathing gets harder."),
)
_QUESTION = "A clinic sees 12 patients in the morning and twice as many in the afternoon. How many is that in a day?"
_ANSWER = "36"
CRITERIA = (
    {"criterion": "Records the cough of nine days with fever up to 38.7 degrees.", "weight": 30},
    {"criterion": "Records the asthma and the allergy to penicillin.", "weight": 30},
    {"criterion": "Records the crackles at the right base and the saturation.", "weight": 20},
    {"criterion": "Records doxycycline for five days, the chest film and the safety net.", "weight": 20},
)
NOTE = (
    "Subjective: " + "; ".join(text for speaker, text in _TURNS if speaker == "Patient") + ".\n"
    "Discussed: " + "; ".join(text for _, text in _TURNS[6:8]) + ".\nPlan: Review in two weeks or sooner if worse."
)
_WORLD = """
insert into pgharness.models (name, provider, model, base_url, parameters)
select %(model)s || '-' || i, %(provider)s, %(model)s, %(base_url)s, %(parameters)s from generate_series(1, %(combinations)s) as i;
insert into pgharness.cases (name, input, target) select 'case-' || i, %(input)s, %(target)s from generate_series(1, %(cases)s) as i;
insert into pgharness.rubrics (case_name, author, validation, criteria)
select 'case-' || i, 'author-' || a, 'accepted', %(criteria)s from generate_series(1, %(cases)s) as i, generate_series(1, %(authors)s) as a;
insert into pgharness.instances (name, note_replications, rubrics_per_case) values ('bench', 1, %(authors)s);
insert into pgharness.instance_cases (instance, case_name)
select 'bench', 'case-' || i from generate_series(1, %(cases)s) as i;
insert into pgharness.model_combinations (instance, generator, grader)
select 'bench', %(model)s || '-' || i, %(model)s || '-' || i from generate_series(1, %(combinations)s) as i;
"""


@dataclass(frozen=True, slots=True)
class Process:
    """A process to look at from outside."""

    pid: int

    @property
    def resident_mb(self) -> float:
        text = subprocess.run(["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, text=True, check=True)
        return int(text.stdout) * 1024 / 1e6

    @property
    def cpu_seconds(self) -> float:
        """CPU time so far; nan where /proc does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bed:
    """One server for the whole benchmark; every sample takes a new database of it."""

    def __init__(self, *, is_quick: bool) -> None:
        self.is_quick = is_quick
        self.repeats = 1 if is_quick else 3
        self._names = itertools.count(1)

    def __enter__(self) -> Bed:
        with contextlib.ExitStack() as undo:
            self.root, self.filesystem = _root_on_disk()
            undo.callback(shutil.rmtree, self.root, ignore_errors=True)
            # so that every row says when it was committed
            self._server = EmbeddedPostgres(self.root, durable=True, settings={"track_commit_timestamp": "on"})
            undo.callback(self._server.close)
            self.url = self._server.ensure()
            with self._administered() as connection:
                connection.execute(f"create database {_TEMPLATE}".encode())
            with psycopg.connect(make_conninfo(self.url, dbname=_TEMPLATE), autocommit=True) as connection:
                schema.upgrade(connection)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def _administered(self) -> Iterator[Connection[Any]]:
        with psycopg.connect(make_conninfo(self.url, dbname="postgres"), autocommit=True) as connection:
            yield connection

    @functools.cached_property
    def commit_ms(self) -> float:
        """How long a commit takes: the median of 200 one-row inserts."""
        with self._administered() as connection:
            connection.execute("create table commits (i integer)")
            commits = [timed(lambda: connection.execute("insert into commits values (1)")) for _ in range(200)]
            connection.execute("drop table commits")
        return statistics.median(commits) * 1000

    def facts(self) -> dict[str, Any]:
        """Return what a reader must know of the place."""
        with self._administered() as connection:
            version, fsync = connection.execute(
                "select current_setting('server_version'), current_setting('fsync')"
            ).fetchone() or ("", "")
        return {
            "postgres": version,
            "fsync": fsync,
            "data_on": self.filesystem,
            "is_in_memory": self.filesystem in _MEMORY_FILESYSTEMS,
            "commit_ms": round(self.commit_ms, 3),
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 2),
        }

    @contextlib.contextmanager
    def database(self, *, migrated: bool = True) -> Iterator[str]:
        """Make a new database and drop it in the end; nothing of an earlier sample is left to be written."""
        name = f"bench_{next(self._names)}"
        with self._administered() as connection:
            connection.execute(f"create database {name} template {_TEMPLATE if migrated else 'template1'}".encode())
            connection.execute("checkpoint")
        yield make_conninfo(self.url, dbname=name)
        with self._administered() as connection:
            connection.execute(f"drop database {name} with (force)".encode())

    @contextlib.contextmanager
    def worker(self, url: str, concurrency: int) -> Iterator[Process]:
        """Run one worker process of the command line, idle when this returns; it is drained in the end."""
        command = [sys.executable, "-m", "pgharness", "worker", "--workers", "1", "--concurrency", str(concurrency)]
        command += ["--queues", "note,grade"]  # what code there is where this runs has no part in it
        with self.program(command, {"PGHARNESS_DATABASE_URL": url}) as program, connected(url) as connection:
            ready = "select pid from pgharness.workers where status = 'running' and queue_worker_id is not null"
            process = Process(self.wait_for(program, lambda: scalar(connection, ready)))
            time.sleep(0.5)  # until it listens
            yield process

    @contextlib.contextmanager
    def stub(self, latency: float) -> Iterator[tuple[str, Process]]:
        """Run the provider stub in a process of its own; yield its OpenAI-compatible base URL, and the process."""
        command = [sys.executable, str(HERE.parent / "stub_provider.py"), "--latency", str(latency)]
        with self.program(command) as program:
            assert program.stdout is not None
            yield program.stdout.readline().strip(), Process(program.pid)

    @contextlib.contextmanager
    def baseline(self, *arguments: object) -> Iterator[subprocess.Popen[str]]:
        """Run one of the programs of baselines.py."""
        with self.program([sys.executable, str(HERE / "baselines.py"), *map(str, arguments)]) as program:
            yield program

    def baseline_answer(self, *arguments: object) -> dict[str, Any]:
        """Run one of the programs of baselines.py to its end; return the JSON that it prints."""
        return self.program_answer([sys.executable, str(HERE / "baselines.py"), *map(str, arguments)])

    def program_answer(self, command: Sequence[str]) -> dict[str, Any]:
        """Run a program to its end; return the JSON that it prints."""
        with self.program(command) as program:
            output, _ = program.communicate(timeout=PATIENCE_SECONDS)
            if program.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{self._log()}")
            answer: dict[str, Any] = json.loads(output.splitlines()[-1])
            return answer

    @contextlib.contextmanager
    def program(
        self, command: Sequence[str], extra: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """Run a program with no variables of Postgres or ours but those given; it is ended in the end."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")} | dict(
            extra or {}
        )
        with open(self.root / "programs.log", "a") as log, _popen(command, environment, log) as program:
            try:
                yield program
            finally:
                program.terminate()
                try:
                    program.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(program.pid, signal.SIGKILL)

    def wait_for(self, program: subprocess.Popen[str], condition: Any) -> Any:
        """Return what a condition gives once that is anything but None, while a program runs."""
        deadline = time.monotonic() + 60
        while (found := condition()) is None:
            if program.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the worker did not start:\n{self._log()}")
            time.sleep(0.05)
        return found

    def _log(self) -> str:
        return (self.root / "programs.log").read_text()[-3000:]


def _popen(command: Sequence[str], environment: Mapping[str, str], log: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )


def _root_on_disk() -> tuple[Path, str]:
    """Make a folder for the server on a disk if there is one; return it with the type of its file system."""
    mounts = _mounts()
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), REPOSITORY]
    usable = [place.resolve() for place in places if os.access(place, os.W_OK)]
    place = next((p for p in usable if _filesystem(p, mounts) not in _MEMORY_FILESYSTEMS), usable[0])
    return Path(tempfile.mkdtemp(prefix="pgharness-bench-", dir=place)), _filesystem(place, mounts)


# Databases ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(url: str) -> Iterator[Connection[Any]]:
    """Connect as psql would: every statement commits, none is prepared."""
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        yield connection


def scalar(connection: Connection[Any], query: str, *parameters: object) -> Any:
    """Return the first column of the first row, or None."""
    row = connection.execute(query.encode(), parameters).fetchone()
    return row[0] if row else None


def make_world(
    connection: Connection[Any],
    *,
    latency: float = 0.0,
    base_url: str | None = None,
    cases: int = CASE_COUNT,
    authors: int = 1,
    combinations: int = 1,
    are_brief: bool = False,
) -> None:
    """Define instance `bench`: cases with a rubric by each author, and simulated models (or the stub's) that both
    write the notes and grade them. Brief cases are questions of a line, whose answers are graded by their target."""
    values = {
        "model": "stub" if base_url else "simulated",
        "provider": "openai_compatible" if base_url else "simulator",
        "base_url": base_url,
        "parameters": "{}" if base_url else json.dumps({"latency_seconds": latency, "latency_spread": 0}),
        "cases": cases,
        "authors": 0 if are_brief else authors,
        "combinations": combinations,
        "input": json.dumps(_QUESTION if are_brief else {"transcript": [{"speaker": s, "text": t} for s, t in _TURNS]}),
        "target": json.dumps(_ANSWER) if are_brief else None,
        "criteria": json.dumps(CRITERIA),
    }
    with psycopg.ClientCursor(connection) as cursor:  # it sends several statements with their values in one go
        cursor.execute(_WORLD, values)
    # as autovacuum would soon; tables that are still empty it leaves alone, and so must we
    connection.execute("analyze pgharness.cases, pgharness.rubrics, pgharness.instance_cases")


def start_run(connection: Connection[Any], notes: int) -> int:
    """Start a run of so many notes, rounded up to whole replications of all cases; return its id."""
    replications = -(-notes // int(scalar(connection, "select count(*) from pgharness.instance_cases")))
    connection.execute("update pgharness.instances set note_replications = %s", (replications,))
    return int(scalar(connection, "select run_id from pgharness.start_run('bench')"))


def wait_for_end(
    connection: Connection[Any],
    run_id: int,
    *,
    every: float,
    patience: float = PATIENCE_SECONDS,
    meanwhile: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Wait until a run has ended and return its row; raise when it is not completed in time.

    Time that is up raises TimeoutError. `meanwhile` is called before each look at the run.
    """
    deadline = time.monotonic() + patience
    while True:
        meanwhile()
        with connection.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute("select * from pgharness.runs where id = %s", (run_id,)).fetchone()
        assert row is not None
        if row["status"] == "completed":
            return row
        if row["status"] != "running":
            raise RuntimeError(f"run {run_id} is {row['status']}, not completed: {row['reason']}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"run {run_id} has not ended after {patience:g} s")
        time.sleep(every)


def timed(action: Any) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
