"""A process that runs the code of one run, and nothing else: what it breaks is its own.

Its parent, a worker, sends it slices of the run's tasks over a pipe and hears which tasks run, which slices have ended,
and whether an interruption has arrived. When the pipe closes, the parent is gone, and so is this process.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvloop

from pgharness.database import Database, Line, Row
from pgharness.gateway import Gateway
from pgharness.sdk.capture import Capture
from pgharness.sdk.definition import Experiment
from pgharness.sdk.discovery import load
from pgharness.sdk.journal import Journal
from pgharness.sdk.scope import Scope, threads_inherit
from pgharness.sdk.session import Session
from pgharness.settings import Settings

logger = logging.getLogger(__name__)
_LAST_WORDS_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What a host is told; picklable."""

    url: str
    settings: Settings
    worker_id: int
    run: Row
    root: Path | None
    concurrency: int
    log_level: int


def main(pipe: Connection[Any, Any], options: HostOptions) -> None:
    """Run what comes over the pipe until it closes or says stop; the process ends here."""
    os.setsid()  # with the programs that it starts, so that they end together
    sys.setswitchinterval(0.001)  # what code tells is written while it runs, and both want the interpreter
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()  # code may block the loop
    session: list[Session] = []

    def fallback() -> Scope | None:
        return session[0].first_scope if session else None

    capture = Capture(fallback)
    capture.start(options.log_level)
    status = 1
    try:
        try:
            code = options.run["code"]
            experiment = load(code["module"], code["function"], options.root)
        except BaseException as exc:
            logger.error("the code of run %s cannot be loaded: %s", options.run["run_id"], exc)
            pipe.send(("unloadable", f"its code cannot be loaded: {type(exc).__name__}: {exc}"[:1_000]))
        else:
            with threads_inherit():
                uvloop.run(_serve(pipe, options, experiment, session, capture))
            status = 0
    except BaseException:
        logger.exception("the process of run %s failed", options.run["run_id"])
    finally:
        os._exit(status)  # threads that never end must not keep it


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _end()


def _end() -> None:
    """End at once, with the programs that were started."""
    os.killpg(os.getpid(), signal.SIGKILL)


async def _serve(
    pipe: Connection[Any, Any], options: HostOptions, experiment: Experiment, sessions: list[Session], capture: Capture
) -> None:
    loop = asyncio.get_running_loop()
    host = _Host(pipe, options.run)
    journal = Journal(
        Line(options.url, application_name="pgharness run"),
        options.worker_id,
        lambda _, status, epoch: host.on_state(loop, status, epoch),
    )
    pool = Database(options.url, size=1, application_name="pgharness run")
    async with pool.opened():
        version = await pool.call("register_experiment", **experiment.registration(), becomes_current=False)
        await pool.call("start_version", run_id=host.run_id, version_id=version[0]["register_experiment"])
        gateway = Gateway(
            cache_root=options.settings.cache_root,
            allows_code=options.settings.allows_code,
            plugin_seconds=options.settings.plugin_seconds,
            database=pool,
        )
        session = Session(
            pool,
            gateway,
            journal,
            worker_id=options.worker_id,
            run=options.run,
            experiment=experiment,
            concurrency=options.concurrency,
            on_running=lambda *told: pipe.send(("running", *told)),
        )
        sessions.append(session)
        await host.work(session, capture)
        capture.stop()
        journal.flush(_LAST_WORDS_SECONDS)
        await session.close()
        await gateway.aclose()
        journal.close()


class _Host:
    """What the parent says, and is told."""

    def __init__(self, pipe: Connection[Any, Any], run: Row) -> None:
        self.run_id: int = run["run_id"]
        self._epoch: int = run["epoch"]
        self._pipe = pipe
        self._interrupted = asyncio.Event()
        self._stopping = asyncio.Event()
        self._slices: set[asyncio.Task[None]] = set()

    def on_state(self, loop: asyncio.AbstractEventLoop, status: str, epoch: int) -> None:
        """Hear, in the journal's thread, what the database says of the run."""
        if status != "running" or epoch > self._epoch:
            loop.call_soon_threadsafe(self._interrupted.set)

    async def work(self, session: Session, capture: Capture) -> None:
        """Do slices until there is an interruption, or nothing more to come."""
        listening = (asyncio.get_running_loop(), session, capture)
        threading.Thread(target=self._listen, args=listening, name="pipe", daemon=True).start()
        self._pipe.send(("ready",))
        ends = [asyncio.create_task(event.wait()) for event in (self._interrupted, self._stopping)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        while self._slices and not self._interrupted.is_set():
            await asyncio.wait([*self._slices, ends[0]], return_when=asyncio.FIRST_COMPLETED)
        if self._interrupted.is_set():
            session.interrupt()
            while not session.has_heard:
                await asyncio.sleep(0.02)
            self._pipe.send(("heard",))
        while self._slices:
            await asyncio.wait(self._slices)

    def _listen(self, loop: asyncio.AbstractEventLoop, session: Session, capture: Capture) -> None:
        """Empty the pipe whatever the loop does: a parent that cannot write would stand still."""
        try:
            while True:
                loop.call_soon_threadsafe(self._hear, session, capture, self._pipe.recv())
        except (EOFError, OSError):  # the parent is gone
            _end()
        except RuntimeError:  # the loop was closed: nothing is wanted any more
            return

    def _hear(self, session: Session, capture: Capture, told: tuple[Any, ...]) -> None:
        match told:
            case ("slice", number, slice):
                task = asyncio.create_task(self._do(session, capture, number, slice))
                self._slices.add(task)
                task.add_done_callback(self._slices.discard)
            case ("drain",):
                session.drain()
            case ("interrupt",):
                self._interrupted.set()
            case ("stop",):
                self._stopping.set()

    async def _do(self, session: Session, capture: Capture, number: int, slice: Row) -> None:
        is_whole = False
        try:
            is_whole = await session.run_slice(slice, lambda left: self._pipe.send(("left", number, left)))
        except Exception as exc:
            logger.error("a slice of run %s was left undone: %s", self.run_id, exc)
        capture.flush()
        self._pipe.send(("ended", number, is_whole))
