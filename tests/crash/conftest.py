"""Worker processes to break: groups of real processes, models to ask, and conditions to wait for.

A test gets a `lab`: a database of its own, the means to define and start runs in it, and `workers(...)`, each call a
supervisor with its processes in a session of its own, as on another host. Whatever a test leaves behind is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import pytest
from aiohttp import web
from psycopg import Connection

from stub_provider import Recorded, Scene, StubProvider
from world import orphans

SOURCES = Path(__file__).parents[2] / "src"
_POLL_SECONDS = 0.02
_T = TypeVar("_T")


class Group:
    """A supervisor and its worker processes, in a session of their own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def children(self) -> list[int]:
        """Ids of its worker processes, which live."""
        return [pid for pid, parent, command in _processes() if parent == self.pid and "spawn_main" in command]

    @property
    def members(self) -> list[int]:
        """Ids of all processes of its session, orphans included."""
        return [pid for pid, _, _ in _processes() if _session(pid) == self.pid]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End every process of the group at once, as a host ends that loses its power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid in self.members:
            kill(pid)
        self.process.wait()

    def wait(self, seconds: float = 15) -> int:
        """Return its exit status, once it ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the workers did not end within {seconds} s:\n{self.text()[-3000:]}") from None

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent and command line of every process that is not a zombie."""
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-axww", "-o", "pid=,ppid=,stat=,command="]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            pid, parent, state, *words = line.split(None, 3)
            if not state.startswith("Z"):
                yield int(pid), int(parent), "".join(words)
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(name), int(parent), os.fsdecode(Path("/proc", name, "cmdline").read_bytes())


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


class Stub(StubProvider):
    """The provider stub, which also remembers when requests came and may ask to wait for another time than it does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.arrivals: list[tuple[float, Recorded]] = []
        self.retry_after: str | None = None
        self.always: Scene | None = None

    async def _act(self, scene: Scene, recorded: Recorded, request: web.Request) -> web.StreamResponse:
        self.arrivals.append((time.monotonic(), recorded))
        response = await super()._act(self.always or scene, recorded, request)
        if self.retry_after is not None and "retry-after" in response.headers:
            response.headers["retry-after"] = self.retry_after
        return response


class StubThread:
    """A Stub that serves from a thread of its own, so that a test may block."""

    def __init__(self, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.stub = self._do(self._enter(options))

    async def _enter(self, options: dict[str, Any]) -> Stub:
        stub = Stub(**options)
        await stub.__aenter__()
        return stub

    def _do(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def close(self) -> None:
        self._do(self.stub.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Lab:
    """A database with runs and the processes that work on them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.groups: list[Group] = []
        self._db: Connection[Any] | None = None

    # -- the database

    @property
    def db(self) -> Connection[Any]:
        """An autocommit connection; a new one when the last one broke."""
        if self._db is None or self._db.closed or self._db.broken:
            self._db = psycopg.connect(self.url, autocommit=True, connect_timeout=5)
        return self._db

    def value(self, query: str, *arguments: object) -> Any:
        found = self.rows(query, *arguments)
        return found[0][0] if found else None

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        with contextlib.suppress(psycopg.OperationalError):
            return self.db.execute(query.encode(), arguments).fetchall()
        return self.db.execute(query.encode(), arguments).fetchall()  # the server was restarted since

    def insist(self, statement: str) -> None:
        """Execute what locks tables in another order than their users do, again when it is picked to end a deadlock."""

        def is_done() -> bool:
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                self.db.execute(statement.encode())
                return True
            return False

        self.wait(is_done, "locks on tables in use")

    def close(self) -> None:
        for group in self.groups:
            group.kill()
        if self._db is not None:
            self._db.close()

    # -- definitions

    def model(self, name: str, provider: str = "simulator", **columns: Any) -> str:
        """Insert a model; its name."""
        columns = {"name": name, "provider": provider, **columns}
        columns = {key: json.dumps(item) if isinstance(item, dict) else item for key, item in columns.items()}
        places = ", ".join(["%s"] * len(columns))
        self.db.execute(
            f"insert into pgharness.models ({', '.join(columns)}) values ({places})".encode(), tuple(columns.values())
        )
        return name

    def simulator(self, name: str = "sim", **parameters: Any) -> str:
        """Insert a simulated model, by default one that answers at once; its name."""
        columns = {key: parameters.pop(key) for key in list(parameters) if key.endswith(("_million", "_concurrency"))}
        columns |= {key: parameters.pop(key) for key in list(parameters) if key.endswith("_minute")}
        return self.model(name, parameters={"latency_seconds": 0, "latency_spread": 0} | parameters, **columns)

    def instance(
        self, name: str = "trial", *, cases: int, generator: str, grader: str | None = None, **columns: Any
    ) -> str:
        """Insert an instance with cases `name-1...`, each with a target and rubrics of two authors; its name."""
        self.db.execute(
            "insert into pgharness.cases (name, input, target) select %s || '-' || i, to_jsonb('input ' || i),"
            " to_jsonb(i::text) from generate_series(1, %s) as i",
            (name, cases),
        )
        self.db.execute(
            "insert into pgharness.rubrics (case_name, author, validation, criteria)"
            ' select %s || \'-\' || i, a, \'accepted\', \'[{"criterion": "is short", "weight": 10},'
            ' {"criterion": "is clear", "weight": 5}]\''
            " from generate_series(1, %s) as i, unnest(array['ann', 'bob']) as a",
            (name, cases),
        )
        columns = {"name": name, "retry_delay_seconds": 0, **columns}
        places = ", ".join(["%s"] * len(columns))
        self.db.execute(
            f"insert into pgharness.instances ({', '.join(columns)}) values ({places})".encode(),
            tuple(columns.values()),
        )
        self.db.execute(
            "insert into pgharness.instance_cases (instance, case_name)"
            " select %s, %s || '-' || i from generate_series(1, %s) as i",
            (name, name, cases),
        )
        self.db.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values (%s, %s, %s)",
            (name, generator, grader),
        )
        return name

    def start(self, instance: str = "trial", **arguments: Any) -> int:
        """Start a run; its id."""
        named = "".join(f", {name} => %s" for name in arguments)
        run_id: int = self.value(f"select run_id from pgharness.start_run(%s{named})", instance, *arguments.values())
        return run_id

    # -- processes

    def environment(self, **variables: str) -> dict[str, str]:
        """Return the environment for a command on this database."""
        kept = {key: item for key, item in os.environ.items() if not key.startswith("PG")}
        kept |= {"PYTHONPATH": str(SOURCES), "PYTHONUNBUFFERED": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        return kept | {"PGHARNESS_DATABASE_URL": self.url, "PGHARNESS_STALE_SECONDS": "2"} | variables

    def workers(
        self,
        count: int = 1,
        *,
        concurrency: int = 10,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        waits: bool = True,
        folder: Path | None = None,
        **variables: str,
    ) -> Group:
        """Start a supervisor with so many processes; returns when they take work, unless told not to wait.

        With a folder it runs there, and its environment is empty but for the connection string.
        """
        command = [*prefix, sys.executable, "-m", "pgharness", "worker", "--workers", str(count)]
        command += ["--concurrency", str(concurrency), "--queues", "note,grade", *arguments]
        log = self.folder / f"workers-{len(self.groups)}.log"
        environment = self.environment(**variables)
        if folder is not None:
            environment = {name: environment[name] for name in ("PGHARNESS_DATABASE_URL", "PYTHONPATH")}
        group = Group(command, environment, log, folder)
        self.groups.append(group)
        if waits:
            self.wait(lambda: len(self.at_work(group)) == count, f"{count} workers at work", group=group)
        return group

    def at_work(self, group: Group) -> list[int]:
        """Ids of a group's processes that take work now, as the database knows them."""
        found = self.rows(
            "select pid from pgharness.workers where status = 'running' and queue_worker_id is not null"
            " and pid = any (%s)",
            group.children,
        )
        return [pid for (pid,) in found]

    # -- waiting

    def wait(
        self, condition: Callable[[], object], what: str, seconds: float = 20, *, group: Group | None = None
    ) -> None:
        """Return as soon as a condition holds; fail after so many seconds, with what the workers said."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert group is None or group.process.poll() is None, f"the workers ended:\n{group.text()[-3000:]}"
            if time.monotonic() > deadline:
                said = "\n".join(f"{each.log.name}:\n{each.text()[-1500:]}" for each in self.groups)
                raise AssertionError(f"not within {seconds} s: {what}\n{self.state()}\n{said}")
            time.sleep(_POLL_SECONDS)

    def wait_for_end(self, run_id: int, status: str = "completed", seconds: float = 30) -> None:
        """Wait until a run has ended, and check how."""
        query = "select status from pgharness.runs where id = %s"
        self.wait(
            lambda: self.value(query, run_id) in ("completed", "failed", "cancelled", "paused"), "end of run", seconds
        )
        assert self.value(query, run_id) == status, self.state()

    def state(self) -> str:
        """Return the runs and jobs, in words."""
        try:
            runs = self.rows(
                "select id, status, reason, epoch, note_count, notes_succeeded, notes_failed, grade_count,"
                " grades_succeeded, grades_failed, grades_skipped from pgharness.runs"
            )
            jobs = self.rows("select id, status, attempts, scheduled_at, args from procrastinate.procrastinate_jobs")
            failures = self.rows("select kind, ordinal, status, cause, attempts, crashes from pgharness.failures")
        except psycopg.Error as exc:
            return str(exc)
        return f"runs: {runs}\njobs: {jobs[:10]} ({len(jobs)})\nfailures: {failures[:10]} ({len(failures)})"

    def wait_for_quiet_queue(self, seconds: float = 10) -> None:
        """Wait until no job is left; those that nobody waits for are dropped by the worker that gets them."""
        self.wait(
            lambda: self.value("select count(*) from procrastinate.procrastinate_jobs") == 0, "empty queue", seconds
        )

    def assert_consistent(self) -> None:
        """Check that counters, rows, plan and queue agree."""
        assert orphans(self.db) == []

    def assert_complete(self, run_id: int) -> None:
        """Check that a run has exactly the notes and grades that it planned, none twice."""
        counts = self.rows(
            "select note_count, grade_count, (select count(*) from pgharness.notes as n where n.run_id = r.id),"
            " (select count(distinct (n.case_number, n.combination_number, n.overlap, n.replication))"
            "    from pgharness.notes as n where n.run_id = r.id),"
            " (select count(*) from pgharness.grades as g where g.run_id = r.id),"
            " (select count(distinct (g.note_ordinal, g.rubric_number, g.replication))"
            "    from pgharness.grades as g where g.run_id = r.id)"
            " from pgharness.runs as r where id = %s",
            run_id,
        )
        notes, grades = counts[0][:2]
        assert counts[0] == (notes, grades, notes, notes, grades, grades)
        self.assert_consistent()


@pytest.fixture
def lab(url: str, tmp_path: Path) -> Iterator[Lab]:
    """A laboratory on a new database."""
    made = Lab(url, tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    """Every provider's API, served from another thread."""
    served = StubThread()
    try:
        yield served.stub
    finally:
        served.close()


@pytest.fixture(scope="session")
def lab_class() -> type[Lab]:
    """The class, for laboratories on other databases or that outlive a test."""
    return Lab
