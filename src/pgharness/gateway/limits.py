"""What may be in flight, shared by every worker: a model's calls, requests and tokens a minute and waiting periods, and
a run's calls.

The truth is in the database; each process keeps a gate per model and per capped run that negotiates with it. A gate
asks for as many slots and requests as it has callers waiting, about once a second while it is in use, so a limit costs
a few statements a second however many calls it governs. Models without limits are never held up; they only learn that
a provider asked somebody else to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from pgharness.database import TRANSIENT, Database
from pgharness.errors import HarnessError
from pgharness.types import ModelSpec

logger = logging.getLogger(__name__)
_REFRESH_SECONDS = 1.0
_IMPATIENT_SECONDS = 0.1
_UNGOVERNED = ("simulator", "command", "python", "metric")  # local: governed only when they have limits of their own


class Limits:
    """The gates of one worker process. `on_change` is called when a gate may admit callers that it turned away."""

    def __init__(self, database: Database, worker_id: int, on_change: Callable[[], None]) -> None:
        self._database = database
        self._worker_id = worker_id
        self._on_change = on_change
        self._gates: dict[tuple[str, int], Gate] = {}
        self._reports: set[asyncio.Task[None]] = set()

    def of_model(self, spec: ModelSpec) -> Gate | None:
        """Return the gate of a model; None for one that nothing holds up."""
        limited = spec.max_concurrency or spec.requests_per_minute or spec.tokens_per_minute
        if spec.provider in _UNGOVERNED and not limited:
            return None
        return self._gate("model", spec.id)

    def of_run(self, run_id: int) -> Gate:
        """Return the gate of a run whose calls are capped."""
        return self._gate("run", run_id)

    def _gate(self, kind: str, id: int) -> Gate:
        gate = self._gates.get((kind, id))
        if gate is None:
            gate = self._gates[kind, id] = Gate(self._database, self._worker_id, kind, id, self._on_change)
        return gate

    def block(self, spec: ModelSpec, seconds: float) -> None:
        """Hold back every worker's calls to a model, because its provider asked to wait: ours at once, theirs soon."""
        if gate := self._gates.get(("model", spec.id)):
            gate.blocked_until = max(gate.blocked_until, time.monotonic() + seconds)
        report = asyncio.create_task(self._report_block(spec.id, seconds))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _report_block(self, model_id: int, seconds: float) -> None:
        with contextlib.suppress(HarnessError, *TRANSIENT):
            await self._database.call("block_model", model_id=model_id, seconds=seconds)

    async def close(self) -> None:
        await asyncio.gather(*self._reports, *(gate.end() for gate in self._gates.values()))


class Gate:
    """How many calls of one model, or one run, may begin in this process now.

    Callers that are turned away say so by `waiting`, and are heard of again through `on_change`. `tokens` is what the
    next call is expected to use; a call that enters is charged what its permit cost, and settles the difference.
    """

    def __init__(self, database: Database, worker_id: int, kind: str, id: int, on_change: Callable[[], None]) -> None:
        self._database = database
        self._subject: dict[str, Any] = {"worker_id": worker_id, f"{kind}_id": id}
        self._lease_function = f"lease_{kind}"
        self._model_id = id
        self._on_change = on_change
        self._in_use = 0
        self._granted: int | None = 0  # None: no limit on calls at once
        self._permits: int | None = 0  # None: no limit per minute
        self._permit_tokens = 0.0
        self._wait_seconds = _IMPATIENT_SECONDS
        self._negotiation: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._debt = 0.0
        self.waiting = 0
        self.tokens = 0
        self.blocked_until = 0.0

    def admits(self) -> bool:
        """Tell whether a call may begin now; if not, `on_change` is called when that may have changed."""
        is_open = (
            self._permits != 0
            and (self._granted is None or self._in_use < self._granted)
            and (not self.blocked_until or time.monotonic() >= self.blocked_until)
        )
        if self._negotiation is None or self._negotiation.done():
            self._negotiation = asyncio.create_task(self._negotiate())
        elif not is_open:
            self._wake.set()
        return is_open

    @property
    def room(self) -> int:
        """How many calls may begin, of those that wait; at least one while that is not known."""
        if self.blocked_until and time.monotonic() < self.blocked_until:
            return 0
        free = self.waiting if self._granted is None else max(self._granted - self._in_use, 0)
        return min(self.waiting, free if self._permits is None else min(free, max(self._permits, 1)))

    def enter(self) -> float:
        """Begin a call; return the tokens that it is charged."""
        self._in_use += 1
        if self._permits is None:
            return 0.0
        self._permits -= 1
        return self._permit_tokens

    def leave(self) -> None:
        """End a call."""
        self._in_use -= 1

    def settle(self, charged: float, used: int) -> None:
        """Correct the quota by what a call really used."""
        if self._permits is not None:
            self._debt += used - charged

    async def _negotiate(self) -> None:
        while True:
            self._wake.clear()
            is_idle = not self.waiting and not self._in_use  # then this question gives everything back
            try:
                await self._ask()
            except (HarnessError, *TRANSIENT) as exc:
                logger.warning("the limits of %s could not be read: %s", self._subject, exc)
                await asyncio.sleep(_REFRESH_SECONDS)
                continue
            if self.waiting:
                self._on_change()
            if is_idle and not self.waiting and not self._in_use:
                return  # whoever comes now starts another negotiation
            pause = _REFRESH_SECONDS
            if self.waiting:
                pause = max(self.blocked_until - time.monotonic(), self._wait_seconds, 0.01)
            with contextlib.suppress(TimeoutError):
                # callers that arrive wake it, at most every few milliseconds; a blocked gate sleeps on
                async with asyncio.timeout(min(pause, _REFRESH_SECONDS)):
                    await asyncio.sleep(0.01)
                    await (asyncio.Event() if self.waiting else self._wake).wait()

    async def _lease(self) -> dict[str, Any]:
        if self._granted is not None:
            self._granted = self._in_use  # what is reported must hold until the answer, or others get the same slots
        answer = await self._database.call(
            self._lease_function, **self._subject, in_use=self._in_use, wanted=self.waiting
        )
        return answer[0]

    async def _ask(self) -> None:
        lease = await self._lease()
        self._granted = lease["granted"] if lease["max_concurrency"] is not None else None
        if lease["blocked_seconds"]:
            self.blocked_until = max(self.blocked_until, time.monotonic() + lease["blocked_seconds"])
        self._wait_seconds = _IMPATIENT_SECONDS
        if not lease["is_rate_limited"]:
            self._permits = None
            return
        self._permits = (self._permits or 0) if self.waiting else 0  # not kept for a burst later
        if debt := round(self._debt):
            self._debt -= debt
            await self._database.call("take_requests", model_id=self._model_id, requests=0, tokens=debt)
        room = self.waiting if self._granted is None else self._granted - self._in_use
        wanted = min(self.waiting, room) - self._permits
        if wanted > 0:
            taken = await self._database.call(
                "take_requests", model_id=self._model_id, requests=wanted, tokens=wanted * self.tokens
            )
            bought = taken[0]["granted"]
            if bought:
                cost = self._permits * self._permit_tokens + bought * self.tokens
                self._permits += bought
                self._permit_tokens = cost / self._permits
            self._wait_seconds = max(taken[0]["wait_seconds"], 0.01)

    def close(self) -> None:
        """Admit nobody until the next answer: what was granted for other terms does not count."""
        self._granted = 0

    async def end(self) -> None:
        if self._negotiation is not None:
            self._negotiation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._negotiation
