"""The runs of code that a worker hosts: a process for each, watched over, fed with slices, and stopped when it must.

It stands where the engine of notes and grades stands, behind the queue. A worker hosts so many runs at once; beyond
them it takes only what belongs to those, so a function that waits for its items always has somebody to do them. A
process that ends by itself takes the tasks that it ran with it: a task that was alone is to blame, several are tried
again one by one. A run that is cancelled, or goes beyond its limits, is interrupted first, and then killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError
from pgharness.execution import HandedBack, Slice
from pgharness.sdk.discovery import default_sources, discover_isolated, snapshot
from pgharness.sdk.host import HostOptions, main
from pgharness.sdk.session import OpenSlice, full_depths
from pgharness.settings import Settings
from pgharness.types import ItemKind

logger = logging.getLogger(__name__)
_WATCH_SECONDS = 0.25
_EXPIRY_SECONDS = 1.0
_START_SECONDS = 60.0
_HEARD_SECONDS = 1.0  # for an interruption to arrive
_CLEANUP_SECONDS = 15.0  # for what it interrupted to end
_TERM_SECONDS = 0.5
_IDLE_SECONDS = 1.0
_DRAIN_SECONDS = 30.0
_REFRESH_SECONDS = 5.0
_MOST_THREADS = 500  # beside those of its tasks
_MOST_PROCESSES = 500
_MOST_OPEN_SLICES = 10_000
_CRASH_LIMIT = 3
_MB = 1_000_000
_CONTEXT = multiprocessing.get_context("forkserver")
_WHERE = ("root", "path", "line")  # of a registration: where the code lies on this host


class HostDied(Exception):
    """The process of a run ended."""


class ProcessHost:
    """A process that runs the code of one run, as its worker sees it."""

    def __init__(self, options: HostOptions, on_end: Callable[[ProcessHost], None]) -> None:
        self.run = options.run
        self.run_id: int = options.run["run_id"]
        self.running: list[tuple[int, int]] = []  # tasks, with which try
        self.parked = 0  # tasks that wait for maps
        self.slices: dict[int, tuple[asyncio.Future[bool], Callable[[int], None]]] = {}
        self.idle_since = time.monotonic()
        self.reason: str | None = None  # why it was killed; None while nobody meant to
        self.excess: str | None = None  # which limit of its run it was beyond
        self.was_ready = False
        self.is_interrupted = False
        self.is_stopping = False
        self._options = options
        self._on_end = on_end
        self._numbers = itertools.count()
        self._heard = asyncio.Event()
        self._ended = asyncio.Event()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._process: Any = None
        self._pipe, self._theirs = _CONTEXT.Pipe()
        self._killing: asyncio.Task[None] | None = None
        self.unloadable: str | None = None

    async def start(self) -> None:
        """Start the process and wait until it has loaded its code. Raises HostDied."""
        process = _CONTEXT.Process(target=main, args=(self._theirs, self._options), daemon=False)
        await asyncio.to_thread(process.start)
        self._process = process
        self._theirs.close()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._hear)
        os.set_blocking(self._pipe.fileno(), True)  # which uvloop changed, and half a message would be lost
        loop.add_reader(self._process.sentinel, self._on_exit)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._ready
        except TimeoutError:
            self.kill(f"its code took longer than {_START_SECONDS:.0f} seconds to load")
            raise HostDied from None

    @property
    def pid(self) -> int:
        pid: int = self._process.pid
        return pid

    async def run_slice(self, work: Slice, on_end: Callable[[int], None]) -> bool:
        """Have a slice done; tell whether nothing of it has to come back. Raises HostDied.

        `on_end` hears how many of its tasks are left, whenever that changes.
        """
        number = next(self._numbers)
        ended: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.slices[number] = ended, on_end
        told = {name: value for name, value in asdict(work).items() if value is not None}
        try:
            self._send("slice", number, told)
            return await ended
        finally:
            del self.slices[number]
            self.idle_since = time.monotonic()

    def interrupt(self) -> None:
        """Stop what it does; if that does not help, kill it."""
        if not self.is_interrupted:
            self.is_interrupted = True
            self._send("interrupt")
            self._killing = asyncio.create_task(self._escalate())

    def drain(self) -> None:
        """Have it begin nothing more, and let go of functions that wait for others."""
        self._send("drain")

    def stop(self) -> None:
        """Let it end once it has nothing to do."""
        if not self.is_stopping:
            self.is_stopping = True
            self._send("stop")

    def kill(self, reason: str) -> None:
        """End the process and what it started, now."""
        self.reason = self.reason or reason
        self._signal(signal.SIGKILL)

    async def join(self, seconds: float) -> None:
        """Wait for the process to end, then kill it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        if not self._ended.is_set():
            self.kill("it did not stop")
            await self._ended.wait()

    async def _escalate(self) -> None:
        for event, seconds in ((self._heard, _HEARD_SECONDS), (self._ended, _CLEANUP_SECONDS)):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
            if not event.is_set():
                break
        if not self._ended.is_set():
            self.reason = self.reason or "it did not stop when it was told to"
            self._signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TERM_SECONDS):
                    await self._ended.wait()
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process is not None and not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # it may have no group of its own yet
                os.kill(self.pid, number)

    def _send(self, *message: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # it is gone, which is noticed by itself
            self._pipe.send(message)

    def _hear(self) -> None:
        try:
            while self._pipe.poll():
                match self._pipe.recv():
                    case ("ready",):
                        self.was_ready = True
                        self._ready.set_result(None)
                    case ("running", ordinals, parked):
                        self.running, self.parked = ordinals, parked
                    case ("left", number, left):
                        if number in self.slices:
                            self.slices[number][1](left)
                    case ("ended", number, is_whole):
                        if number in self.slices and not self.slices[number][0].done():
                            self.slices[number][0].set_result(is_whole)
                    case ("heard",):
                        self.is_interrupted = True  # it may have found out by itself
                        self._heard.set()
                    case ("unloadable", reason):
                        self.unloadable = reason
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())

    def _on_exit(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._process.sentinel)
        self._hear()
        with contextlib.suppress(OSError, ValueError):
            loop.remove_reader(self._pipe.fileno())
        self._process.join()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started
        self._pipe.close()
        self._ended.set()
        if not self._ready.done():
            self._ready.set_exception(HostDied())
        self._on_end(self)
        for ended, _ in list(self.slices.values()):
            if not ended.done():
                ended.set_exception(HostDied())

    @property
    def ending(self) -> str:
        """How the process ended, in words."""
        status = self._process.exitcode
        if self.reason:
            return self.reason
        if status is None or status >= 0:
            return f"its process ended itself with status {status}"
        return f"its process was killed by {signal.Signals(-status).name}"

    @property
    def ended_itself(self) -> bool:
        """Whether the code ended its process, rather than somebody else."""
        # 255 is said of all of them when the process that starts them is killed
        return self.reason is None and 0 <= (self._process.exitcode or 0) < 255


class Hosts:
    """Does slices of runs of code, each run in a process of its own, at most `most_runs` at once."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        worker_id: int,
        concurrency: int,
        most_runs: int,
        log_level: int,
    ) -> None:
        self.concurrency = _MOST_OPEN_SLICES  # far more than it takes
        self._places = concurrency
        self.is_draining = False
        self._database = database
        self._settings = settings
        self._worker_id = worker_id
        self._most_runs = most_runs
        self._log_level = log_level
        self._hosts: dict[int, ProcessHost] = {}
        self._starting: dict[int, asyncio.Task[ProcessHost | None]] = {}
        self._open: dict[int, OpenSlice] = {}  # by their jobs
        self.narrowed: dict[str, Any] = {"experiments": []}  # which jobs to take, as arguments of take_job
        self._ends: set[asyncio.Task[None]] = set()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._has_changed = asyncio.Event()
        self._known: dict[str, Row] = {}  # experiments that are here: their registrations, by name
        self._fingerprint: object = None
        self._keepers: list[asyncio.Task[None]] = []
        self._is_held = False
        self._stillborn: dict[int, int] = {}  # processes of a run that ended before they were ready

    async def open(self) -> None:
        """Find the experiments, make them known, and begin to watch."""
        # a host needs nothing of the program that this process was started by
        sys.modules["__main__"] = types.ModuleType("__main__")
        multiprocessing.set_forkserver_preload(["pgharness.sdk.host"])
        await self._refresh()
        self._keepers = [
            asyncio.create_task(keeper)
            for keeper in (self._keep_watching(), self._keep_expiring(), self._keep_refreshing())
        ]

    # -- what the process asks of it, as of the engine of notes and grades

    @property
    def open_runs(self) -> list[int]:
        """Ids of the runs with slices here."""
        return list({slice.run_id for slice in self._open.values()})

    @property
    def in_flight(self) -> dict[str, dict[ItemKind, int]]:
        """How many tasks run, by run."""
        return {}

    @property
    def spare(self) -> int:
        """How many calls could begin: none, for tasks are not shared among those that have taken them."""
        return 0

    async def wait_for_room(self) -> bool:
        """Wait until another slice is welcome."""
        await self._has_room.wait()
        return True

    def hear_news(self) -> None:
        """There are new jobs."""
        self._has_changed.set()

    async def wait_for_change(self, seconds: float) -> None:
        """Wait until other jobs than those that were asked for may be taken, or there are new ones."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_changed.wait()
        self._has_changed.clear()

    def welcomes(self, run_id: int | None) -> bool:
        """Tell whether a job of this run should be taken though there is no room: never."""
        return False

    def apply_states(self, states: Sequence[Row]) -> None:
        """Stop the processes of runs that have ended, pause, or were queued anew."""
        for state in states:
            host = self._hosts.get(state["run_id"])
            if host is None or (state["epoch"] < host.run["epoch"] and state["status"] != "deleted"):
                continue  # read before the run was queued anew
            if state["status"] != "running" or state["epoch"] > host.run["epoch"]:
                host.interrupt()

    def hold(self, *, is_held: bool) -> None:
        """Begin nothing while held."""
        self._is_held = is_held
        self._update_room()

    def drain(self) -> None:
        """Take no more; functions that wait for others go back at once, all else is let end for a while."""
        self.is_draining = True
        self._update_room()
        for host in self._hosts.values():
            host.drain()
        self._keepers.append(asyncio.create_task(self._keep_draining()))

    def abort(self) -> None:
        """Interrupt everything; it goes back to the queue."""
        self.is_draining = True
        self._update_room()
        for host in self._hosts.values():
            host.interrupt()

    async def close(self) -> None:
        """End every process."""
        self.abort()
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*(host.join(_CLEANUP_SECONDS + 5) for host in list(self._hosts.values())))
        await asyncio.gather(*self._ends, return_exceptions=True)

    # -- slices

    async def run_slice(self, work: Slice) -> None:
        """Do what a slice has left to do. Raises HandedBack unless all that is still wanted of it is durable."""
        assert work.job_id is not None
        slice = self._open[work.job_id] = OpenSlice.of(work)
        self._narrow()

        def on_end(left: int) -> None:
            slice.left = left
            self._narrow()

        try:
            host = await self._host(work)
            if host is None:
                return
            try:
                is_whole = await host.run_slice(work, on_end)
            except HostDied:
                is_whole = False
        finally:
            del self._open[work.job_id]
            self._update_room()
        if not is_whole:
            await asyncio.gather(*self._ends, return_exceptions=True)  # what the end of its process led to is known
            raise HandedBack

    async def _host(self, work: Slice) -> ProcessHost | None:
        """Return the process of a run, started if need be; None when nobody waits for the slice any more."""
        run_id = work.run_id
        while not self.is_draining:
            host = self._hosts.get(run_id)
            if run_id in self._starting or host is None:
                if run_id not in self._starting:
                    starting = self._starting[run_id] = asyncio.create_task(self._started(work))
                    starting.add_done_callback(lambda _: self._starting.pop(run_id))
                if (host := await asyncio.shield(self._starting[run_id])) is None and await self._is_stale(work):
                    return None
            if (
                host is not None and host.run["epoch"] < work.epoch
            ):  # all of it was queued anew: what it does comes back
                host.interrupt()
            if host is not None and (host.is_interrupted or host.is_stopping):
                await host.join(_CLEANUP_SECONDS + 5)
            elif host is not None:
                return host
        raise HandedBack

    async def _is_stale(self, work: Slice) -> bool:
        """Tell whether a run is not running, or was queued anew since; what another slice found may be older."""
        run = (await self._database.persist("load_code", run_id=work.run_id))[0]["load_code"]
        return run is None or run["status"] != "running" or run["epoch"] != work.epoch

    async def _started(self, work: Slice) -> ProcessHost | None:
        run = (await self._database.persist("load_code", run_id=work.run_id))[0]["load_code"]
        if run is None or run["status"] != "running":
            return None
        found = self._known.get(run["experiment"])
        if found is None:
            raise HandedBack  # its code was here a moment ago
        run["code"] |= {"module": found["module"], "function": found["function"]}
        root = found.get("root")
        options = HostOptions(
            self._database.url,
            self._settings,
            self._worker_id,
            run,
            Path(root) if root else None,
            self._places,
            self._log_level,
        )
        host = ProcessHost(options, self._on_end)
        self._hosts[work.run_id] = host
        try:
            await host.start()
        except HostDied:
            await asyncio.gather(*self._ends, return_exceptions=True)
            raise HandedBack from None
        except Exception:  # no process could be started: nobody may wait for it
            self._hosts.pop(work.run_id, None)
            raise
        return host

    def _on_end(self, host: ProcessHost) -> None:
        if self._hosts.get(host.run_id) is host:
            del self._hosts[host.run_id]
        end = asyncio.create_task(self._account(host))
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        self._update_room()

    async def _account(self, host: ProcessHost) -> None:
        """Say what became of the tasks that a process took along."""
        if host.unloadable is not None:
            await self._database.persist("fail_run", run_id=host.run_id, reason=host.unloadable)
        elif host.excess is not None:
            await self._database.persist("fail_run", run_id=host.run_id, reason=host.excess)
        elif not host.was_ready and not host.is_interrupted:
            count = self._stillborn[host.run_id] = self._stillborn.get(host.run_id, 0) + 1
            if count >= _CRASH_LIMIT:
                del self._stillborn[host.run_id]
                reason = f"{host.ending} while its code was loaded"
                await self._database.persist("fail_run", run_id=host.run_id, reason=reason)
        elif host.running and not host.is_interrupted:
            # alone, it is to blame; what was killed from outside may be innocent
            limit = 1 if len(host.running) == 1 and host.ended_itself else _CRASH_LIMIT
            ordinals, attempts = zip(*host.running, strict=True)
            await self._database.persist(
                "lose_tasks",
                run_id=host.run_id,
                ordinals=list(ordinals),
                attempts=list(attempts),
                reason=host.ending,
                limit_crashes=limit,
            )

    # -- keeping

    def _narrow(self) -> None:
        """Take jobs of experiments that are here, and when all places are taken, of runs that are."""
        here = sorted(self.open_runs)
        narrowed = {
            "except_depths": full_depths(self._open.values(), self._places),
            "only_runs": here if len(here) >= self._most_runs else None,
            "experiments": sorted(self._known),
        }
        if narrowed != self.narrowed:
            self.narrowed = narrowed
            self._has_changed.set()

    def _update_room(self) -> None:
        self._narrow()
        self._has_changed.set()
        if self.is_draining or (self._known and not self._is_held):
            self._has_room.set()
        else:
            self._has_room.clear()

    async def _keep_watching(self) -> None:
        """Hold every process to its limits, and end those that have nothing to do."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for host in list(self._hosts.values()):
                if (excess := self._excess(host)) is not None:
                    host.excess = excess
                    host.kill(excess)
                elif host.run_id not in self.open_runs and time.monotonic() - host.idle_since > _IDLE_SECONDS:
                    host.stop()

    async def _keep_expiring(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_SECONDS * (0.5 + random.random()))
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await self._database.call("expire_runs")

    def _excess(self, host: ProcessHost) -> str | None:
        """Return which limit the process of a run is beyond."""
        if host.run_id in self._starting:
            return None
        try:
            process = psutil.Process(host.pid)
            family = [process, *process.children(recursive=True)]
            used = threads = 0
            for member in family:
                with contextlib.suppress(psutil.Error):
                    used += member.memory_info().rss
                    threads += member.num_threads()
        except psutil.Error:
            return None
        limit = host.run["memory_mb"]
        if used > limit * _MB:
            return f"it used {used // _MB:,} MB of memory, more than its {limit:,}"
        most = _MOST_THREADS + self._places + host.parked
        if threads > most:
            return f"it had {threads:,} threads, more than {most:,}"
        if len(family) > _MOST_PROCESSES:
            return f"it had {len(family):,} processes, more than {_MOST_PROCESSES:,}"
        return None

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_SECONDS)
            try:
                await self._refresh()
            except Exception as exc:
                logger.warning("experiments could not be looked for: %s", exc)

    async def _refresh(self) -> None:
        """Look for experiments where they have changed."""
        sources = default_sources(self._settings.experiments or None)
        fingerprint = await asyncio.to_thread(snapshot, sources)
        if fingerprint == self._fingerprint:
            return
        found = await asyncio.to_thread(discover_isolated, sources)
        for problem in found.problems:
            logger.warning("%s", problem)
        known = {}
        for registration in found.experiments:
            told = {name: value for name, value in registration.items() if name not in _WHERE}
            try:
                await self._database.persist("register_experiment", **told)
            except HarnessError as exc:
                logger.warning("experiment %r is not served: %s", told["name"], exc)
            else:
                known[told["name"]] = registration
        self._known, self._fingerprint = known, fingerprint
        await self._database.persist("serve_experiments", worker_id=self._worker_id, experiments=sorted(known))
        self._update_room()

    async def _keep_draining(self) -> None:
        await asyncio.sleep(_DRAIN_SECONDS)
        self.abort()
