"""Worker processes: one supervisor that starts, watches and stops N processes, each running one engine.

A process that dies is reported and replaced at once. SIGTERM drains: no new calls, those in flight end and are
recorded, the rest goes back to the queue; a second signal cancels the calls in flight. kill -9 of anything loses
nothing: what was not recorded is put back by the next sweep of any worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from types import FrameType

from pgharness import __version__, database, schema
from pgharness.database import TRANSIENT, Database
from pgharness.errors import HarnessError, SchemaOutOfDate
from pgharness.execution import Engine
from pgharness.gateway import Gateway
from pgharness.queue import Queue
from pgharness.settings import Settings

logger = logging.getLogger(__name__)
EXIT_SCHEMA = 4
_HEARTBEAT_SECONDS = 1.0
_POOL_SIZE = 4
_RESTART_SECONDS = (0.1, 5.0)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker process is told; picklable."""

    url: str
    settings: Settings
    queues: tuple[str, ...]
    concurrency: int
    log_level: int


def environment() -> dict[str, object]:
    """Return how this process would make a run: versions, and the git state of its working directory."""
    packages = {
        name: importlib.metadata.version(name)
        for name in ("pgharness", "procrastinate", "psycopg", "httpx", "pydantic")
    }
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_is_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


# -- one process


async def run_process(options: WorkerOptions, *, parent_pid: int) -> None:
    """Work until told to stop. Raises SchemaOutOfDate when the database is not at this version."""
    with database.connect(options.url) as connection:
        schema.verify(connection)
    pool = Database(options.url, size=_POOL_SIZE, application_name="pgharness worker")
    async with pool.opened():
        registered = await pool.call(
            "register_worker",
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues=list(options.queues),
            concurrency=options.concurrency,
            environment=environment(),
        )
        worker_id: int = registered[0]["register_worker"]
        gateway = Gateway(cache_root=options.settings.cache_root, allows_code=options.settings.allows_code)
        engine = Engine(pool, gateway, worker_id=worker_id, concurrency=options.concurrency)
        queue = Queue(pool, engine, worker_id=worker_id)
        process = _Process(pool, engine, queue, worker_id, parent_pid, options.settings.stale_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, process.on_signal, number)
        try:
            await process.run(options.queues)
        finally:
            await engine.close()
            await gateway.aclose()
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await process.beat("stopped")


class _Process:
    """The life of a worker process around its engine: heartbeat, sweep, signals."""

    def __init__(
        self, pool: Database, engine: Engine, queue: Queue, worker_id: int, parent_pid: int, stale_seconds: float
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._queue = queue
        self._worker_id = worker_id
        self._parent_pid = parent_pid
        self._stale_seconds = stale_seconds

    async def run(self, queues: Sequence[str]) -> None:
        heartbeat = asyncio.create_task(self._keep_beating())
        try:
            await self._queue.run(queues)
        finally:
            heartbeat.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await heartbeat

    def on_signal(self, number: int) -> None:
        if number == signal.SIGINT and not self._queue.is_stopping and os.getppid() == self._parent_pid:
            return  # Ctrl-C reaches the whole group; the supervisor decides
        if self._queue.is_stopping:
            self._engine.abort()
        else:
            self.stop()

    def stop(self) -> None:
        self._queue.stop()

    async def beat(self, state: str) -> None:
        states = await self._pool.call(
            "heartbeat",
            worker_id=self._worker_id,
            in_flight=self._engine.in_flight,
            state=state,
            runs=self._engine.open_runs,
            jobs=list(self._queue.open_jobs),
        )
        self._engine.apply_states(states)

    async def _keep_beating(self) -> None:
        """Show life, learn which runs ended, and put back what other workers left, once a second or so."""
        sweep_at = time.monotonic()
        while True:
            if os.getppid() != self._parent_pid and not self._queue.is_stopping:
                logger.warning("the supervisor is gone: draining")
                self.stop()
            try:
                await self.beat("draining" if self._queue.is_stopping else "running")
                if time.monotonic() >= sweep_at:
                    put_back = (await self._pool.call("sweep", stale_after=f"{self._stale_seconds} seconds"))[0][
                        "sweep"
                    ]
                    if put_back:
                        logger.warning("%s slices of lost workers were queued again", put_back)
                    sweep_at = time.monotonic() + min(self._stale_seconds / 6, 5.0)
            except TRANSIENT as exc:
                logger.warning("no heartbeat: %s", exc)
            except HarnessError as exc:
                logger.error("no heartbeat: %s", exc)
            await asyncio.sleep(_HEARTBEAT_SECONDS)


def _process_main(options: WorkerOptions, parent_pid: int) -> None:
    # every call in flight is a file descriptor, and many systems allow 1,024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.concurrency + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
    if options.log_level > logging.DEBUG:
        for noisy in ("procrastinate", "httpx", "psycopg.pool"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        asyncio.run(run_process(options, parent_pid=parent_pid))
    except SchemaOutOfDate as exc:
        logger.error("%s. %s", exc, exc.hint or "")
        sys.exit(EXIT_SCHEMA)
    except (HarnessError, *TRANSIENT) as exc:
        logger.error("%s", exc)
        sys.exit(1)


# -- the supervisor


class Supervisor:
    """Keeps N worker processes alive until it is told to stop, or until `is_done` says so."""

    def __init__(self, options: WorkerOptions, workers: int, *, is_done: Callable[[], bool] | None = None) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = [self._spawn() for _ in range(workers)]
        self._delay = _RESTART_SECONDS[0]
        self._signals = 0
        self._is_done = is_done

    def _spawn(self) -> BaseProcess:
        process = self._context.Process(target=_process_main, args=(self._options, os.getpid()), daemon=False)
        process.start()
        return process

    def run(self) -> int:
        """Supervise until all processes have ended; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        healthy_since = checked_at = time.monotonic()
        while True:
            multiprocessing.connection.wait([process.sentinel for process in self._processes], timeout=0.25)
            now = time.monotonic()
            for index, process in enumerate(self._processes):
                if process.is_alive():
                    continue
                if process.exitcode == EXIT_SCHEMA:
                    self.stop()
                    return self._join(EXIT_SCHEMA)
                if self._signals:
                    continue
                logger.error("worker process %s ended with status %s; starting another", process.pid, process.exitcode)
                self._report_lost(process)
                healthy_since = now
                time.sleep(self._delay)
                self._delay = min(self._delay * 2, _RESTART_SECONDS[1])
                self._processes[index] = self._spawn()
            if now - healthy_since > 10:
                self._delay = _RESTART_SECONDS[0]
            if self._signals and not any(process.is_alive() for process in self._processes):
                return self._join(0)
            if self._is_done is not None and not self._signals and now - checked_at > 0.5:
                checked_at = now
                if self._is_done():
                    self.stop()

    def stop(self) -> None:
        """Ask every process to drain; asked again, to drop its calls."""
        self._signals += 1
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def _join(self, status: int) -> int:
        for process in self._processes:
            process.join()
        return status

    def _report_lost(self, process: BaseProcess) -> None:
        with contextlib.suppress(HarnessError, *TRANSIENT), database.connect(self._options.url) as connection:
            database.call(connection, "lose_worker", host=socket.gethostname(), pid=process.pid)
