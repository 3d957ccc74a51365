"""An event loop on scripted time: whoever sleeps is woken at once, and the clock says that the time has passed.

Whatever asks the loop for the time and waits by its timers is tested as it is, without a second of waiting: the same
order of events on every machine. It does no I/O, so a test that would wait for a network hangs at once and says so.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock begins at 0 and moves only when everybody waits."""

    def __init__(self) -> None:
        super().__init__(_Impatient(self))
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def skip(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _Impatient(selectors.SelectSelector):
    """A selector that never waits: it lets the loop's time pass instead."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everybody waits for something that no timer will bring")
            self._loop.skip(timeout)
        return ready


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine on scripted time, and return what it returns."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
