"""Experiments in code, run for real: a project folder, worker processes in it, and conditions to wait for.

A `CodeLab` has a database and a folder. Tests write modules into the folder's `experiments`, start runs by SQL, and
look at views. Code of a test waits for files that the test makes (`lab.open_gate`), so nobody guesses how long things
take; only what is measured is timed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import Connection
from psycopg.rows import dict_row

SOURCES = Path(__file__).parents[1] / "src"
_POLL_SECONDS = 0.01
Row = dict[str, Any]


class Worker:
    """A `pgharness worker` in a session of its own, as on another host."""

    def __init__(self, folder: Path, environment: dict[str, str], log: Path, arguments: tuple[str, ...]) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pgharness", "worker", *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def family(self) -> list[psutil.Process]:
        """All of its processes: the supervisor's children, their fork server, and the processes of runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    @property
    def worker_pids(self) -> list[int]:
        """The supervisor's own processes."""
        return [pid for pid, command in self._commands() if "spawn_main" in command]

    @property
    def run_pids(self) -> list[int]:
        """The processes of runs: each is the first of a session."""
        found = []
        for pid, _ in self._commands():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    found.append(pid)
        return found

    def _commands(self) -> list[tuple[int, str]]:
        found = []
        for process in self.family:
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.pid, " ".join(process.cmdline())))
        return found

    def end(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Tell it to end and return its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker did not end within {seconds} s:\n{self.text()[-3000:]}") from None

    def kill(self) -> None:
        """End every process of it at once."""
        family = self.family
        for process in (*family, psutil.Process(self.process.pid)) if self.process.poll() is None else family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


class CodeLab:
    """A database, a project folder with experiments, and workers that run them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.workers: list[Worker] = []
        self.db: Connection[Any] = psycopg.connect(url, autocommit=True)
        (folder / "experiments").mkdir(parents=True, exist_ok=True)
        (folder / ".pgharness").write_text('experiments = "experiments"\nproject = "lab"\n')

    # -- code

    def write(self, name: str, source: str) -> Path:
        """Write a module of the project's experiments; what it needs most is imported for it."""
        path = self.folder / "experiments" / f"{name}.py"
        path.write_text(textwrap.dedent(source).lstrip())
        return path

    def open_gate(self, name: str) -> None:
        """Let the code go on that waits for a gate."""
        (self.folder / f"{name}.gate").touch()

    # -- processes

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        kept |= {"PYTHONPATH": str(SOURCES), "PYTHONUNBUFFERED": "1", "LAB": str(self.folder)}
        return kept | {"PGHARNESS_DATABASE_URL": self.url} | variables

    def worker(
        self, *arguments: str, serves: str | None = None, folder: Path | None = None, **variables: str
    ) -> Worker:
        """Start a worker in the project's folder; returns once it serves an experiment."""
        log = self.folder / f"worker-{len(self.workers)}.log"
        started = Worker(folder or self.folder, self.environment(**variables), log, arguments)
        self.workers.append(started)
        if serves is not None:
            query = (
                "select 1 from pgharness.workers where %s = any (experiments) and status = 'running' and pid = any (%s)"
            )
            self.wait(lambda: self.rows(query, serves, started.worker_pids), f"{serves} to be served", 120)
        return started

    def python(self, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the project's folder, to its end."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert not check or done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.db.close()

    # -- runs

    def start(self, experiment: str, *, instance: str | None = None, kind: str = "trial", **config: Any) -> int:
        """Start a run of an instance of an experiment, which is made unless it is there; its id."""
        name = instance or f"{experiment}-{time.monotonic_ns()}"
        self.db.execute("select pgharness.configure_instance(%s, %s, %s)", (name, experiment, json.dumps(config)))
        run_id: int = self.value("select run_id from pgharness.start_run(%s, kind => %s)", name, kind)
        return run_id

    def run(self, experiment: str, *, status: str = "completed", seconds: float = 60, **options: Any) -> int:
        """Start a run and wait for its end; its id."""
        run_id = self.start(experiment, **options)
        self.wait_for_end(run_id, status, seconds)
        return run_id

    def progress(self, run_id: int) -> Row:
        return self.dicts("select * from pgharness.run_progress where run_id = %s", run_id)[0]

    def results(self, run_id: int) -> Row:
        """Return a run's results: the newest of each key."""
        return dict(self.rows("select key, value from pgharness.run_results where run_id = %s", run_id))

    def root(self, run_id: int) -> Row:
        """Return the task that is the run's function."""
        return self.dicts("select * from pgharness.task_results where run_id = %s and ordinal = 0", run_id)[0]

    def items(self, run_id: int) -> list[Row]:
        """Return the items of the run's maps."""
        return self.dicts(
            "select * from pgharness.task_results where run_id = %s and ordinal > 0 order by ordinal", run_id
        )

    def messages(self, run_id: int, level: str = "%") -> list[str]:
        """Return the lines of a run's log, oldest first."""
        query = "select message from pgharness.logs where run_id = %s and level like %s order by id"
        return [message for (message,) in self.rows(query, run_id, level)]

    # -- asking and waiting

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        return self.db.execute(query.encode(), values or None).fetchall()

    def value(self, query: str, *values: object) -> Any:
        found = self.rows(query, *values)
        return found[0][0] if found else None

    def dicts(self, query: str, *values: object) -> list[Row]:
        with self.db.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode(), values or None).fetchall()

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 60) -> float:
        """Return, as soon as a condition holds, how many seconds that took; fail after too many."""
        began = time.monotonic()
        while not condition():
            assert all(worker.process.poll() != 1 for worker in self.workers), self.workers[-1].text()
            if time.monotonic() > began + seconds:
                said = "\n".join(f"{worker.log.name}:\n{worker.text()[-2500:]}" for worker in self.workers)
                raise AssertionError(f"not within {seconds} s: {what}\n{self.state()}\n{said}")
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - began

    def wait_for_end(self, run_id: int, status: str = "completed", seconds: float = 60) -> float:
        """Wait until a run has ended, and check how; returns the seconds that it took."""
        query = "select status not in ('running', 'paused') from pgharness.runs where id = %s"
        took = self.wait(lambda: self.value(query, run_id), f"end of run {run_id}", seconds)
        ended, reason = self.rows("select status, reason from pgharness.runs where id = %s", run_id)[0]
        assert ended == status, f"{ended}: {reason}\n" + "\n".join(self.messages(run_id)[-20:])
        return took

    def state(self) -> str:
        """Return the runs that have not ended, their last words, and their jobs, in words."""
        runs = self.rows("select id, name, status, reason, epoch from pgharness.runs where finished_at is null")
        tasks = self.rows(
            "select run_id, status, count(*), max(attempts) from pgharness.tasks where run_id = any (%s) group by 1, 2",
            [run[0] for run in runs],
        )
        jobs = self.rows("select id, status, attempts, worker_id, args from procrastinate.procrastinate_jobs limit 10")
        lines = self.rows("select run_id, level, message from pgharness.logs order by id desc limit 15")
        return f"runs: {runs}\ntasks: {tasks}\njobs: {jobs}\nlog, newest first: {lines}"


def is_alive(pid: int) -> bool:
    """Tell whether a process is there, and is more than a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def opened(url: str, folder: Path) -> Iterator[CodeLab]:
    """Yield a laboratory, and end all that runs in it."""
    lab = CodeLab(url, folder)
    try:
        yield lab
    finally:
        lab.close()
