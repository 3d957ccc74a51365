"""Worker processes: one supervisor that starts, watches and stops N processes, each running one engine.

A process that dies is reported and replaced at once, and one that hangs is killed. SIGTERM drains: no new calls, those
in flight end and are recorded, the rest goes back to the queue; a second signal to the supervisor cancels the calls in
flight. kill -9 of anything loses nothing: what was not recorded is put back by the next sweep of any worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from ctypes import c_double
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import get_args

import uvloop

from pgharness import __version__, database, hooks, plugins, schema
from pgharness.database import TRANSIENT, Database
from pgharness.desk import Desk
from pgharness.environment import environment
from pgharness.errors import HarnessError, LeaseLost, SchemaOutOfDate
from pgharness.execution import Batches, Engine
from pgharness.gateway import Gateway
from pgharness.queue import CODE_QUEUE, Queue
from pgharness.sdk.hosts import Hosts
from pgharness.settings import LISTEN_OFF, Settings
from pgharness.types import ItemKind

logger = logging.getLogger(__name__)
EXIT_SCHEMA = 4
_HEARTBEAT_SECONDS = 1.0
_RESTART_SECONDS = (0.1, 5.0)
_SETTLED_SECONDS = 2.0  # a process that died younger is replaced with growing delay
_HUNG_SECONDS = 10.0  # without a turn of its event loop; never less than it takes to count as lost
_HOOKS_SECONDS = hooks.CALL_SECONDS + 5.0
_SETTLING_SECONDS = 5.0
_ABORT = signal.SIGUSR1  # from the supervisor: who stops a service may send SIGTERM to all its processes, several times


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What a worker process is told; picklable."""

    url: str
    settings: Settings
    queues: tuple[str, ...]
    concurrency: int
    log_level: int
    most_runs: int = 4  # of code, at once


# -- one process


async def run_process(options: WorkerOptions, *, parent_pid: int, pulse: c_double) -> None:
    """Work until told to stop, with the time of the last sign of life in `pulse`.

    Raises SchemaOutOfDate when the database is not at this version.
    """
    with database.connect(options.url) as connection:
        schema.verify(connection)
    listen_url = _listen_url(options)
    pool = Database(options.url, application_name="pgharness worker")
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
        gateway = Gateway(
            cache_root=options.settings.cache_root,
            allows_code=options.settings.allows_code,
            plugin_seconds=options.settings.plugin_seconds,
            database=pool,
        )
        engine = await _open_engine(options, pool, gateway, worker_id)
        queue = Queue(pool, engine, worker_id=worker_id, listen_url=listen_url)
        process = _Process(pool, engine, queue, worker_id, parent_pid, options.settings.stale_seconds)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, process.stop)
        loop.add_signal_handler(signal.SIGINT, process.on_interrupt)
        loop.add_signal_handler(_ABORT, process.abort)
        pulsing = asyncio.create_task(_show_pulse(pulse))
        beside = [
            asyncio.create_task(_move_batches(options, pool, gateway, worker_id)),
            asyncio.create_task(Desk(pool, "analysis", worker_id=worker_id).run()),
            asyncio.create_task(Desk(pool, "report", worker_id=worker_id).run()),
        ]
        try:
            await process.run(options.queues)
        finally:
            pulsing.cancel()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            pulse.value = 0  # what is left may wait for the database
            await engine.close()
            await gateway.aclose()
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await process.beat("stopped")


async def _open_engine(options: WorkerOptions, pool: Database, gateway: Gateway, worker_id: int) -> Engine | Hosts:
    """Return what does the work of the queues: calls of models side by side, or processes that run code."""
    if options.queues != (CODE_QUEUE,):
        return Engine(pool, gateway, worker_id=worker_id, concurrency=options.concurrency, queues=options.queues)
    hosts = Hosts(
        pool,
        options.settings,
        worker_id=worker_id,
        concurrency=options.concurrency,
        most_runs=options.most_runs,
        log_level=options.log_level,
    )
    await hosts.open()
    return hosts


async def _move_batches(options: WorkerOptions, pool: Database, gateway: Gateway, worker_id: int) -> None:
    """Take vendors' batches of the kinds of items that this process makes from step to step."""
    kinds = [kind for kind in get_args(ItemKind) if kind in options.queues and kind != CODE_QUEUE]
    if kinds:
        settle_seconds = options.settings.stale_seconds
        await Batches(pool, gateway, worker_id=worker_id, kinds=kinds, settle_seconds=settle_seconds).run()


def _listen_url(options: WorkerOptions) -> str | None:
    """Return where to hear of new work; None to ask for it instead."""
    chosen = options.settings.listen_url or options.url
    if chosen == LISTEN_OFF:
        return None
    with contextlib.suppress(HarnessError, *TRANSIENT):  # a listener that cannot connect tries again later
        if database.shares_servers(chosen):
            # a LISTEN would stay behind on a server connection that others use next
            logger.warning(
                "a pooler in transaction mode carries no notifications: asking for new work once a second;"
                " set PGHARNESS_LISTEN_URL to a direct connection string, or to off"
            )
            return None
    return chosen


async def _show_pulse(pulse: c_double) -> None:
    while True:
        pulse.value = time.monotonic()
        await asyncio.sleep(_HEARTBEAT_SECONDS)


class _Process:
    """The life of a worker process around its engine: heartbeat, sweep, signals."""

    def __init__(
        self,
        pool: Database,
        engine: Engine | Hosts,
        queue: Queue,
        worker_id: int,
        parent_pid: int,
        stale_seconds: float,
    ) -> None:
        self._pool = pool
        self._engine = engine
        self._queue = queue
        self._worker_id = worker_id
        self._parent_pid = parent_pid
        self._stale_seconds = stale_seconds
        self._beat_at = self._sweep_at = time.monotonic()
        self._is_forgotten = False

    async def run(self, queues: Sequence[str]) -> None:
        keepers = (self._keep_beating(), self._keep_sweeping(), self._keep_watching(), self._keep_settling())
        tasks = [asyncio.create_task(keeper) for keeper in keepers]
        try:
            await self._queue.run(queues)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._is_forgotten:
            raise LeaseLost("this worker is not registered any more: its database was restored or rebuilt")

    def stop(self) -> None:
        if not self._queue.is_stopping:
            self._queue.stop()

    def on_interrupt(self) -> None:
        if os.getppid() != self._parent_pid:  # else Ctrl-C reached the supervisor as well, which decides
            self.stop()

    def abort(self) -> None:
        self.stop()
        self._engine.abort()

    async def beat(self, state: str) -> None:
        states = await self._pool.call(
            "heartbeat",
            worker_id=self._worker_id,
            in_flight=self._engine.in_flight,
            state=state,
            runs=self._engine.open_runs,
            jobs=list(self._queue.open_jobs),
            spare=self._engine.spare,
        )
        self._engine.apply_states(states)

    async def _keep_beating(self) -> None:
        """Show life and learn which runs ended, once a second or so."""
        while True:
            if os.getppid() != self._parent_pid and not self._queue.is_stopping:
                logger.warning("the supervisor is gone: draining")
                self.stop()
            try:
                await self.beat("draining" if self._queue.is_stopping else "running")
                last, self._beat_at = self._beat_at, time.monotonic()
                if self._beat_at - last > self._stale_seconds * 0.6:
                    # the database was away, for others too: nobody counts as lost before they could show life
                    self._sweep_at = self._beat_at + self._stale_seconds
            except LeaseLost:
                self._is_forgotten = True
                self.abort()
                return
            except Exception as exc:  # whatever it is: without a heartbeat this worker would count as lost
                logger.log(logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR, "no heartbeat: %s", exc)
            await asyncio.sleep(min(_HEARTBEAT_SECONDS, self._stale_seconds / 10))

    async def _keep_watching(self) -> None:
        """Begin no calls while the last heartbeat is so old that others make our items; one may hang, so beside it."""
        while True:
            self._engine.hold(is_held=time.monotonic() - self._beat_at > self._stale_seconds)
            await asyncio.sleep(min(_HEARTBEAT_SECONDS, self._stale_seconds / 10))

    async def _keep_sweeping(self) -> None:
        """Put back what other workers left, every few seconds; beside the heartbeat, for it may take long."""
        while True:
            await asyncio.sleep(min(_HEARTBEAT_SECONDS, self._stale_seconds / 10))
            # not while our own signs of life fail, and not by a call that waited for the database to be back: it would
            # come before the others', who were silent because nobody was there to hear them
            is_heard = time.monotonic() - self._beat_at <= self._stale_seconds * 0.6
            if not is_heard or time.monotonic() < self._sweep_at:
                continue
            try:
                swept = await self._pool.call_within(
                    self._stale_seconds * 0.15, "sweep", stale_after=f"{self._stale_seconds} seconds"
                )
                if swept[0]["sweep"]:
                    logger.warning("%s slices of lost workers were queued again", swept[0]["sweep"])
            except Exception as exc:  # whatever it is: the next sweep may succeed
                logger.log(logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR, "no sweep: %s", exc)
            self._sweep_at = max(self._sweep_at, time.monotonic() + min(self._stale_seconds / 6, 5.0))

    async def _keep_settling(self) -> None:
        """Sum up the scores of what is settled of a run, every few seconds, so that looking at them stays quick."""
        while True:
            await asyncio.sleep(_SETTLING_SECONDS)
            try:
                await self._pool.call_within(_SETTLING_SECONDS, "settle_scores", worker_id=self._worker_id)
            except Exception as exc:  # whatever it is: views read what is not settled
                logger.log(logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR, "nothing settled: %s", exc)


def _process_main(options: WorkerOptions, parent_pid: int, pulse: c_double) -> None:
    # every call in flight is a file descriptor, and many systems allow 1,024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.concurrency + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
    _log_to_stderr(options)
    sys.setswitchinterval(0.001)  # the recorder has little to do at a time, and what it does is waited for
    # what is here now stays; and the calls in flight are many objects, which need not be looked through so often
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    try:
        uvloop.run(run_process(options, parent_pid=parent_pid, pulse=pulse))
    except SchemaOutOfDate as exc:
        logger.error("%s. %s", exc, exc.hint or "")
        sys.exit(EXIT_SCHEMA)
    except (HarnessError, *TRANSIENT) as exc:
        logger.error("%s", exc)
        sys.exit(1)


def _hooks_main(options: WorkerOptions, parent_pid: int, pulse: c_double) -> None:
    _log_to_stderr(options)
    listen_url, import_seconds = _listen_url(options), options.settings.plugin_seconds
    asyncio.run(hooks.serve(listen_url, parent_pid=parent_pid, pulse=pulse, import_seconds=import_seconds))


def _log_to_stderr(options: WorkerOptions) -> None:
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")
    if options.log_level > logging.DEBUG:
        for noisy in ("procrastinate", "psycopg.pool"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


# -- the supervisor


class _Place:
    """One of the supervisor's processes, and when to start the next one after it died."""

    __slots__ = ("delay", "is_for_hooks", "options", "process", "pulse", "restart_at", "started_at")

    process: BaseProcess
    pulse: c_double  # time of its last sign of life; 0 before the first and while it ends
    started_at: float

    def __init__(self, options: WorkerOptions, *, is_for_hooks: bool = False) -> None:
        self.options = options
        self.is_for_hooks = is_for_hooks
        self.delay = _RESTART_SECONDS[0]
        self.restart_at: float | None = None

    @property
    def what(self) -> str:
        return "the hooks' process" if self.is_for_hooks else "worker process"


class Supervisor:
    """Keeps N worker processes alive until it is told to stop, or until `is_done` says so.

    Code has a process beside them, which starts one for each run; hooks, where any are installed, have one that ends
    after all others, to hear what became of their runs.
    """

    def __init__(self, options: WorkerOptions, workers: int, *, is_done: Callable[[], bool] | None = None) -> None:
        self._options = options
        self._context = multiprocessing.get_context("spawn")
        self._signals = 0
        self._is_done = is_done
        calls = tuple(name for name in options.queues if name != CODE_QUEUE)
        self._places = [_Place(replace(options, queues=calls)) for _ in range(workers if calls else 0)]
        if CODE_QUEUE in options.queues:
            self._places.append(_Place(replace(options, queues=(CODE_QUEUE,))))
        if plugins.names("hooks"):
            self._places.append(_Place(options, is_for_hooks=True))
        for place in self._places:
            self._start(place)

    def run(self) -> int:
        """Supervise until all processes have ended; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        checked_at = time.monotonic()
        while True:
            alive = [place for place in self._places if place.process.is_alive()]
            if self._signals and all(place.is_for_hooks for place in alive):
                return self._join(0)
            multiprocessing.connection.wait([place.process.sentinel for place in alive], timeout=0.25)
            for place in self._places:
                if place.process.exitcode == EXIT_SCHEMA:
                    self.stop()
                    return self._join(EXIT_SCHEMA)
                self._tend(place)
            if self._is_done is not None and not self._signals and time.monotonic() - checked_at > 0.5:
                checked_at = time.monotonic()
                if self._is_done():
                    self.stop()

    def _tend(self, place: _Place) -> None:
        now = time.monotonic()
        if place.process.is_alive():
            silence = now - place.pulse.value if place.pulse.value else 0.0
            if silence > max(_HUNG_SECONDS, self._options.settings.stale_seconds):
                logger.error("%s %s hangs since %.0f seconds; killing it", place.what, place.process.pid, silence)
                place.process.kill()
        elif self._signals:
            pass
        elif place.restart_at is None:
            logger.error(
                "%s %s ended with status %s; starting another", place.what, place.process.pid, place.process.exitcode
            )
            if not place.is_for_hooks:
                self._report_lost(place.process)
            is_settled = now - place.started_at > _SETTLED_SECONDS
            place.delay = _RESTART_SECONDS[0] if is_settled else min(place.delay * 2, _RESTART_SECONDS[1])
            place.restart_at = now + place.delay
        elif now >= place.restart_at:
            self._start(place)

    def _start(self, place: _Place) -> None:
        place.pulse = self._context.RawValue(c_double, 0.0)
        main = _hooks_main if place.is_for_hooks else _process_main
        process = self._context.Process(target=main, args=(place.options, os.getpid(), place.pulse), daemon=False)
        process.start()
        place.process, place.started_at, place.restart_at = process, time.monotonic(), None
        if self._signals:
            process.terminate()  # the signal came while it was being started

    def stop(self) -> None:
        """Ask every process to drain; asked again, to drop its calls. Hooks are asked when all others have ended."""
        self._signals += 1
        for place in self._places:
            if place.is_for_hooks and self._signals == 1:
                continue
            if place.process.is_alive() and place.process.pid is not None:
                os.kill(place.process.pid, signal.SIGTERM if self._signals == 1 else _ABORT)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()

    def _join(self, status: int) -> int:
        for place in sorted(self._places, key=lambda place: place.is_for_hooks):
            if place.is_for_hooks:
                if place.process.is_alive() and place.process.pid is not None:
                    os.kill(place.process.pid, hooks.STOP)
                place.process.join(_HOOKS_SECONDS)
                place.process.kill()
            place.process.join()
        return status

    def _report_lost(self, process: BaseProcess) -> None:
        with contextlib.suppress(HarnessError, *TRANSIENT), database.connect(self._options.url) as connection:
            database.call(connection, "lose_worker", host=socket.gethostname(), pid=process.pid)
