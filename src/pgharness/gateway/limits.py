"""What a model may be asked, shared by every worker: calls at once, requests and tokens a minute, and waiting periods.

The truth is in the database; each process keeps a gate per model that negotiates with it. A gate asks for as many slots
and requests as it has callers waiting, about once a second while it is in use, so a limit costs a few statements a
second however many calls it governs. Models without limits are never held up; they only learn that a provider asked
somebody else to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from pgharness.database import TRANSIENT, Database
from pgharness.errors import HarnessError
from pgharness.types import ModelSpec

logger = logging.getLogger(__name__)
_REFRESH_SECONDS = 1.0
_IMPATIENT_SECONDS = 0.1
_UNGOVERNED = ("simulator", "command", "python")  # local: governed only when they have limits of their own


class Limits:
    """The gates of one worker process."""

    def __init__(self, database: Database, worker_id: int) -> None:
        self._database = database
        self._worker_id = worker_id
        self._gates: dict[int, _Gate] = {}
        self._reports: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def slot(self, spec: ModelSpec, *, tokens: int) -> AsyncIterator[None]:
        """Hold one of a model's slots, having taken a request and so many estimated tokens from its quota."""
        limited = spec.max_concurrency or spec.requests_per_minute or spec.tokens_per_minute
        if spec.provider in _UNGOVERNED and not limited:
            yield
            return
        gate = self._gates.get(spec.id)
        if gate is None:
            gate = self._gates[spec.id] = _Gate(self._database, self._worker_id, spec.id)
        await gate.acquire(tokens)
        try:
            yield
        finally:
            gate.release()

    def settle(self, spec: ModelSpec, *, estimated: int, used: int) -> None:
        """Correct the quota by what a call really used."""
        if gate := self._gates.get(spec.id):
            gate.debt += used - estimated

    def block(self, spec: ModelSpec, seconds: float) -> None:
        """Hold back every worker's calls to a model, because its provider asked to wait: ours at once, theirs soon."""
        if gate := self._gates.get(spec.id):
            gate.blocked_until = max(gate.blocked_until, time.monotonic() + seconds)
        report = asyncio.create_task(self._report_block(spec.id, seconds))
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)

    async def _report_block(self, model_id: int, seconds: float) -> None:
        with contextlib.suppress(HarnessError, *TRANSIENT):
            await self._database.call("block_model", model_id=model_id, seconds=seconds)

    async def close(self) -> None:
        await asyncio.gather(*self._reports, *(gate.close() for gate in self._gates.values()))


class _Gate:
    """One model's callers in this process, first come first served."""

    def __init__(self, database: Database, worker_id: int, model_id: int) -> None:
        self._database = database
        self._worker_id = worker_id
        self._model_id = model_id
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._in_use = 0
        self._granted: int | None = 0  # None: no limit on calls at once
        self._permits: int | None = 0  # None: no limit per minute
        self._wait_seconds = _IMPATIENT_SECONDS
        self._negotiation: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self.blocked_until = 0.0
        self.debt = 0

    async def acquire(self, tokens: int) -> None:
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ticket, tokens))
        self._admit()
        if self._negotiation is None or self._negotiation.done():
            self._negotiation = asyncio.create_task(self._negotiate())
        elif self._waiting:
            self._wake.set()
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self._in_use -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            ticket, _ = self._waiting[0]
            if not ticket.done():  # else its caller was cancelled
                if time.monotonic() < self.blocked_until or self._permits == 0:
                    return
                if self._granted is not None and self._in_use >= self._granted:
                    return
                self._in_use += 1
                if self._permits is not None:
                    self._permits -= 1
                ticket.set_result(None)
            self._waiting.popleft()

    async def _negotiate(self) -> None:
        while True:
            self._wake.clear()
            is_idle = not self._waiting and not self._in_use  # then this question gives everything back
            try:
                await self._ask()
            except (HarnessError, *TRANSIENT) as exc:
                logger.warning("limits of model %s could not be read: %s", self._model_id, exc)
                await asyncio.sleep(_REFRESH_SECONDS)
                continue
            self._admit()
            if is_idle and not self._waiting and not self._in_use:
                return  # whoever comes now starts another negotiation
            pause = _REFRESH_SECONDS
            if self._waiting:
                pause = max(self.blocked_until - time.monotonic(), self._wait_seconds, 0.01)
            with contextlib.suppress(TimeoutError):
                # callers that arrive wake it, at most every few milliseconds; a blocked gate sleeps on
                async with asyncio.timeout(min(pause, _REFRESH_SECONDS)):
                    await asyncio.sleep(0.01)
                    await (asyncio.Event() if self._waiting else self._wake).wait()

    async def _lease(self) -> dict[str, Any]:
        if self._granted is not None:
            self._granted = self._in_use  # what is reported must hold until the answer, or others get the same slots
        answer = await self._database.call(
            "lease_model",
            worker_id=self._worker_id,
            model_id=self._model_id,
            in_use=self._in_use,
            wanted=len(self._waiting),
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
        self._permits = (self._permits or 0) if self._waiting else 0  # not kept for a burst later
        if self.debt:
            debt, self.debt = self.debt, 0
            await self._database.call("take_requests", model_id=self._model_id, requests=0, tokens=debt)
        room = len(self._waiting) if self._granted is None else self._granted - self._in_use
        wanted = min(len(self._waiting), room) - self._permits
        if wanted > 0:
            tokens = sum(tokens for _, tokens in list(self._waiting)[:wanted])
            taken = await self._database.call("take_requests", model_id=self._model_id, requests=wanted, tokens=tokens)
            self._permits += taken[0]["granted"]
            self._wait_seconds = max(taken[0]["wait_seconds"], 0.01)

    async def close(self) -> None:
        if self._negotiation is not None:
            self._negotiation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._negotiation
