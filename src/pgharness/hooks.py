"""Hooks: plugins that hear what becomes of runs, in a process of their own beside the workers.

Of each change of a run's state, every hook hears once, from one process of the cluster: the one that holds the hook's
lock, which another takes over within a second or so of its end. What happens while nobody holds it is not told later.
A hook hears one event after the other, each in a thread and for so many seconds at most; one that raises, hangs or
kills the process harms no worker, and all but the last no other hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from ctypes import c_double
from typing import Any

from pgharness import database, plugins
from pgharness.database import TRANSIENT
from pgharness.errors import HarnessError

logger = logging.getLogger(__name__)
STOP = signal.SIGUSR2  # from the supervisor
CALL_SECONDS = 10.0
_CHANNEL = "pgharness"
_MOST_WAITING = 1_000
_MOST_HANGING = 8
_TICK_SECONDS = 0.25
_CLAIM_SECONDS = 1.0
_LAST_SECONDS = 0.5
_RECONNECT_SECONDS = 1.0


async def serve(
    listen_url: str | None,
    *,
    parent_pid: int,
    pulse: c_double,
    import_seconds: float = plugins.IMPORT_SECONDS,
    call_seconds: float = CALL_SECONDS,
) -> None:
    """Call the hooks that are installed here until told to stop or left alone, and then for what has been heard."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(STOP, stopping.set)
    for number in (signal.SIGTERM, signal.SIGINT):  # to all processes of a service: workers are to end first
        loop.add_signal_handler(number, lambda: None)
    hooks = [_Hook(name, call_seconds) for name in plugins.names("hooks")]
    tasks = [asyncio.create_task(hook.run(import_seconds)) for hook in hooks]
    tasks.append(asyncio.create_task(_show_pulse(pulse, parent_pid, stopping)))
    if listen_url is None:
        logger.error("hooks hear nothing through a pooler: set PGHARNESS_LISTEN_URL to a direct connection string")
        await stopping.wait()
    while not stopping.is_set():
        try:
            assert listen_url is not None
            await _listen(listen_url, hooks, stopping)
        except (HarnessError, *TRANSIENT) as exc:
            logger.warning("hooks hear nothing for the moment: %s", exc)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), _RECONNECT_SECONDS)
    try:
        async with asyncio.timeout(call_seconds + 1):
            await asyncio.gather(*(hook.ended() for hook in hooks))
    except TimeoutError:
        logger.error("hooks were told to stop before they had heard all")
    pulse.value = 0
    for task in tasks:
        task.cancel()


async def _listen(url: str, hooks: list[_Hook], stopping: asyncio.Event) -> None:
    held: list[_Hook] = []
    asked_at = 0.0
    async with database.ear(url, _CHANNEL) as ear:
        while True:
            is_last = stopping.is_set()
            if not is_last and time.monotonic() - asked_at > _CLAIM_SECONDS:
                asked_at = time.monotonic()
                for hook in [hook for hook in hooks if hook.is_ready and hook not in held]:
                    if await ear.claim(f"pgharness.hook {hook.name}"):
                        _tell(held, await ear.hear(0))  # the new one's former holder has heard that
                        held.append(hook)
                        logger.info("hook %s is called from here", hook.name)
            _tell(held, await ear.hear(_LAST_SECONDS if is_last else _TICK_SECONDS))
            if is_last:
                return


def _tell(hooks: list[_Hook], payloads: list[str]) -> None:
    for payload in payloads:
        with contextlib.suppress(ValueError):  # the channel is open to all
            event = json.loads(payload)
            name = event.get("event") if isinstance(event, dict) else None
            if isinstance(name, str) and name.startswith("run.") and name != "run.told":
                for hook in hooks:
                    hook.put(payload)


class _Hook:
    """A hook with the events that wait for it, so that it delays no other."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self._seconds = seconds
        self._function: Callable[[dict[str, Any]], object] | None = None
        self._events: asyncio.Queue[str] = asyncio.Queue(_MOST_WAITING)
        self._hanging = 0

    @property
    def is_ready(self) -> bool:
        return self._function is not None

    def put(self, payload: str) -> None:
        try:
            self._events.put_nowait(payload)
        except asyncio.QueueFull:
            logger.error("hook %s has %s events to hear, and misses another: %s", self.name, _MOST_WAITING, payload)

    async def ended(self) -> None:
        """Wait until it has heard all that it was told."""
        await self._events.join()

    async def run(self, import_seconds: float) -> None:
        """Import the function, unless it is broken, then call it with one event after the other."""
        try:
            self._function, error = await _in_thread(lambda: plugins.load("hooks", self.name, seconds=import_seconds))
            if error is not None:
                raise error
        except HarnessError as exc:
            logger.error("%s. %s", exc, exc.hint or "")
            return
        except Exception:
            logger.exception("hook %s cannot be imported", self.name)
            return
        while True:
            payload = await self._events.get()
            try:
                await self._call(self._function, payload)
            except Exception:
                logger.exception("hook %s failed with %s", self.name, payload)
            finally:
                self._events.task_done()

    async def _call(self, function: Callable[[dict[str, Any]], object], payload: str) -> None:
        if self._hanging >= _MOST_HANGING:
            logger.error("hook %s hangs in %s calls already, and misses %s", self.name, self._hanging, payload)
            return
        call = _in_thread(lambda: _called(function, json.loads(payload)))
        self._hanging += 1
        call.add_done_callback(self._on_return)
        done, _ = await asyncio.wait([call], timeout=self._seconds)
        if not done:
            logger.error("hook %s takes longer than %g seconds with %s", self.name, self._seconds, payload)
        elif error := call.result()[1]:
            logger.error("hook %s raised with %s", self.name, payload, exc_info=error)

    def _on_return(self, call: object) -> None:
        self._hanging -= 1


def _called(function: Callable[[dict[str, Any]], object], event: dict[str, Any]) -> None:
    answer = function(event)
    if inspect.isawaitable(answer):
        asyncio.run(_awaited(answer))


async def _awaited(answer: Awaitable[object]) -> None:
    await answer


def _in_thread(work: Callable[[], Any]) -> asyncio.Future[tuple[Any, BaseException | None]]:
    """Run work in a daemon thread, which keeps no process from ending; what it returned and what it raised."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def finish(answer: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result((answer, error))

    def run() -> None:
        answer, error = None, None
        try:
            answer = work()
        except BaseException as exc:
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
            loop.call_soon_threadsafe(finish, answer, error)

    threading.Thread(target=run, name="hook", daemon=True).start()
    return ended


async def _show_pulse(pulse: c_double, parent_pid: int, stopping: asyncio.Event) -> None:
    while True:
        pulse.value = time.monotonic()
        if os.getppid() != parent_pid:
            stopping.set()
        await asyncio.sleep(1.0)
