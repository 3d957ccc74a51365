"""What may be in flight, shared by every worker: a model's calls, requests and tokens a minute and waiting periods, and
a run's calls.

The truth is in the database; each process keeps a gate per model and per capped run that negotiates with it. A gate
asks for as many slots and requests as it has callers waiting, about once a second while it is in use, so a limit costs
a few statements a second however many calls it governs. With its question it tells what its calls met: of a model
behind an API, limits that nobody configured are learned from what is refused (see pacing), and one that is out of
service gets no calls but probes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from pgharness.database import TRANSIENT, Database
from pgharness.errors import HarnessError, ModelError, Unavailable
from pgharness.gateway.pacing import Pacer, Report
from pgharness.types import ModelSpec

logger = logging.getLogger(__name__)
_REFRESH_SECONDS = 1.0
_IMPATIENT_SECONDS = 0.1
_TICK_SECONDS = 0.002
_LOCAL = (
    "simulator",
    "command",
    "python",
    "metric",
    "ensemble",
    "hedge",
)  # governed only when they have limits of their own
_UNPACED = (*_LOCAL, "plugin")


class Limits:
    """The gates of one worker process. `on_change` is called when a gate may admit callers that it turned away.

    `unwritten` says how many calls of a run have ended whose outcomes are not in the database yet: a budget has to pay
    for them.
    """

    def __init__(
        self,
        database: Database,
        worker_id: int,
        on_change: Callable[[], None] = lambda: None,
        unwritten: Callable[[int], int] = lambda run_id: 0,
    ) -> None:
        self.unwritten = unwritten
        self._database = database
        self._worker_id = worker_id
        self._hear_change = on_change
        self._changed = asyncio.Event()
        self._gates: dict[tuple[str, int], Gate] = {}
        self._reports: set[asyncio.Task[None]] = set()

    def of_model(self, spec: ModelSpec) -> Gate | None:
        """Return the gate of a model; None for one that nothing holds up."""
        limited = spec.max_concurrency or spec.requests_per_minute or spec.tokens_per_minute
        if spec.provider in _LOCAL and not limited:
            return None
        return self._gate("model", spec.id, is_paced=spec.provider not in _UNPACED)

    def of_run(self, run_id: int) -> Gate:
        """Return the gate of a run whose calls are capped."""
        return self._gate("run", run_id)

    def _gate(self, kind: str, id: int, *, is_paced: bool = False) -> Gate:
        gate = self._gates.get((kind, id))
        if gate is None:
            pacer = Pacer(time.monotonic) if is_paced else None
            gate = self._gates[kind, id] = Gate(self, self._database, self._worker_id, kind, id, pacer)
        return gate

    def on_change(self) -> None:
        """A gate may admit callers that it turned away."""
        self._hear_change()
        self._changed.set()  # wakes all who wait now
        self._changed.clear()

    async def wait_for_change(self) -> None:
        """Wait until a gate may admit callers that it turned away, a second at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REFRESH_SECONDS):
                await self._changed.wait()

    def block(self, model_id: int, seconds: float) -> None:
        """Hold back every worker's calls to a model, because its provider asked to wait: ours at once, theirs soon."""
        if gate := self._gates.get(("model", model_id)):
            gate.wait(seconds)
        report = asyncio.create_task(self._report_block(model_id, seconds))
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
    next call is expected to use; a call that enters is charged what its permit cost, and settles the difference. How it
    went is said when it leaves.
    """

    def __init__(
        self, limits: Limits, database: Database, worker_id: int, kind: str, id: int, pacer: Pacer | None = None
    ) -> None:
        self._limits = limits
        self._database = database
        self._subject: dict[str, Any] = {"worker_id": worker_id, f"{kind}_id": id}
        self._lease_function = f"lease_{kind}"
        self._id = id
        self._pacer = pacer
        self._in_use = 0
        self._granted: int | None = 0  # None: no limit on calls at once
        self._permits: int | None = 0  # None: no limit on calls that begin
        self._permit_tokens = 0.0
        self._wait_seconds = _IMPATIENT_SECONDS
        self._negotiation: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._urgent = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._debt = 0.0
        self._asked_at = 0.0
        self._is_budgeted = False
        self._own_block = 0.0  # as our own calls were told
        self._shared_block = 0.0  # as the database says
        self._is_out = False  # of service
        self.waiting = 0
        self.tokens = 0

    def admits(self) -> bool:
        """Tell whether a call may begin now; if not, `on_change` is called when that may have changed."""
        is_granted = (
            self._permits != 0 and (self._granted is None or self._in_use < self._granted) and not self.is_blocked
        )
        is_open = is_granted and (self._pacer is None or self._pacer.admits())
        if self._negotiation is None or self._negotiation.done():
            self._negotiation = asyncio.create_task(self._negotiate())
        elif not is_granted:
            self._wake.set()
            if not self.is_blocked and time.monotonic() - self._asked_at >= _IMPATIENT_SECONDS:
                self._urgent.set()  # what was granted is used up
        elif not is_open:
            self._call_soon()
        return is_open

    def _call_soon(self) -> None:
        """Have callers try again when the rate lets another call begin."""
        assert self._pacer is not None
        seconds = self._pacer.seconds_to_wait
        if self._timer is None and seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(max(seconds, _TICK_SECONDS), self._hear_timer)

    def _hear_timer(self) -> None:
        self._timer = None
        self._limits.on_change()

    @property
    def blocked_until(self) -> float:
        """Until when, by time.monotonic(), no call may begin."""
        return max(self._own_block, self._shared_block)

    @property
    def is_blocked(self) -> bool:
        """Whether the provider asks to wait, or is out of service."""
        return time.monotonic() < self.blocked_until

    def wait(self, seconds: float) -> None:
        """Begin no call for so many seconds."""
        self._own_block = max(self._own_block, time.monotonic() + seconds)

    async def entered(self, tokens: int, *, has_others: bool = False) -> float:
        """Begin a call once it is admitted; return the tokens that it is charged.

        Raises Unavailable for one that `has_others` to ask, while the model is out of service and gets probes alone.
        """
        self.waiting += 1
        self.tokens = tokens
        try:
            while not self.admits():
                if has_others and self._is_out and self.is_blocked:
                    error = Unavailable("out of service: it failed again and again")
                    error.was_asked = False
                    raise error
                await self._limits.wait_for_change()
        finally:
            self.waiting -= 1
        return self.enter()

    @property
    def room(self) -> int:
        """How many calls may begin, of those that wait; at least one while that is not known."""
        if self.is_blocked:
            return 0
        free = self.waiting if self._granted is None else max(self._granted - self._in_use, 0)
        if self._pacer is not None:
            free = min(free, self._pacer.room)
        return min(self.waiting, free if self._permits is None else min(free, max(self._permits, 1)))

    def enter(self) -> float:
        """Begin a call; return the tokens that it is charged."""
        self._in_use += 1
        if self._pacer is not None:
            self._pacer.begin()
        if self._permits is None:
            return 0.0
        self._permits -= 1
        return self._permit_tokens

    def leave(self, began: float | None = None, error: ModelError | None = None) -> None:
        """End a call: when it began, by time.monotonic(), and its error if it failed; without these it was aborted."""
        self._in_use -= 1
        if began is not None and error is not None:
            self.spare(began, error)
        if self._pacer is None:
            if error is not None and error.retry_after is not None and not error.spends_attempt:
                self._limits.block(self._id, error.retry_after)
        elif began is None:
            self._pacer.cancel()
        elif (seconds := self._pacer.end(began, error)) is not None:
            asyncio.get_running_loop().call_later(seconds, self._urgent.set)

    def spare(self, began: float, error: ModelError) -> None:
        """Let a failure spend no attempt if its call was in flight when the model went out of service."""
        if self._pacer is not None and self._pacer.is_spared(began, error):
            error.spends_attempt = False

    def settle(self, charged: float, used: int) -> None:
        """Correct the quota by what a call really used."""
        if self._permits is not None:
            self._debt += used - charged

    @property
    def _is_idle(self) -> bool:
        """Whether nobody waits and nothing is begun, or ended and still to be paid for."""
        return not self.waiting and not self._in_use and not (self._is_budgeted and self._limits.unwritten(self._id))

    async def _negotiate(self) -> None:
        while True:
            self._wake.clear()
            self._urgent.clear()
            is_idle = self._is_idle  # then this question gives everything back
            try:
                await self._ask()
            except (HarnessError, *TRANSIENT) as exc:
                logger.warning("the limits of %s could not be read: %s", self._subject, exc)
                await asyncio.sleep(_REFRESH_SECONDS)
                continue
            if self.waiting:
                self._limits.on_change()
            if is_idle and self._is_idle:
                return  # whoever comes now starts another negotiation
            pause = _REFRESH_SECONDS
            if self.waiting:
                pause = max(self.blocked_until - time.monotonic(), self._wait_seconds, 0.01)
            with contextlib.suppress(TimeoutError):
                # callers that arrive wake it, at most every few milliseconds; a blocked gate sleeps on
                async with asyncio.timeout(min(pause, _REFRESH_SECONDS)):
                    await asyncio.sleep(0.01)
                    await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        """Wait until there is something to report, or to ask for."""
        while not self._urgent.is_set() and (self.waiting or not self._wake.is_set()):
            waits = [asyncio.create_task(event.wait()) for event in (self._urgent, self._wake)]
            try:
                await asyncio.wait(waits if not self.waiting else waits[:1], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in waits:
                    each.cancel()

    async def _lease(self) -> dict[str, Any]:
        self._asked_at = time.monotonic()
        if self._granted is not None:
            self._granted = self._in_use  # what is reported must hold until the answer, or others get the same slots
        told: dict[str, Any] = {}
        if self._pacer is not None:
            report = self._pacer.report()
            told = _told(report)
            if report.wait and not report.failed:
                self.wait(report.wait)
        in_use = self._in_use
        if self._is_budgeted:
            in_use += self._limits.unwritten(self._id)
            self._permits = 0
        answer = await self._database.call(
            self._lease_function, **self._subject, in_use=in_use, wanted=self.waiting, **told
        )
        return answer[0]

    async def _ask(self) -> None:
        lease = await self._lease()
        self._granted = lease["target"] if lease["max_concurrency"] is not None else None
        self._shared_block = 0.0
        self._is_out = lease.get("is_out", False)
        if lease["blocked_seconds"]:
            self._shared_block = time.monotonic() + lease["blocked_seconds"]
            self._granted = 0  # afterwards, the next answer says how many may begin
        if self._pacer is not None:
            self._pacer.learn(lease["rate"], lease["proven_concurrency"])
        is_used_up = self._granted is not None and self._in_use >= self._granted
        self._wait_seconds = _IMPATIENT_SECONDS if is_used_up else _REFRESH_SECONDS
        if "may_begin" in lease:
            self._permits = lease["may_begin"]
            self._is_budgeted = self._permits is not None
            if self._permits is not None and self._permits <= self.waiting:
                self._wait_seconds = _IMPATIENT_SECONDS
        elif not lease["is_rate_limited"]:
            self._permits = None
        else:
            await self._buy()

    async def _buy(self) -> None:
        """Take requests and tokens from the model's per-minute buckets, for those who wait."""
        self._wait_seconds = _IMPATIENT_SECONDS
        self._permits = (self._permits or 0) if self.waiting else 0  # not kept for a burst later
        if debt := round(self._debt):
            self._debt -= debt
            await self._database.call("take_requests", model_id=self._id, requests=0, tokens=debt)
        room = self.waiting if self._granted is None else self._granted - self._in_use
        wanted = min(self.waiting, room) - self._permits
        if wanted > 0:
            taken = await self._database.call(
                "take_requests", model_id=self._id, requests=wanted, tokens=wanted * self.tokens
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
        if self._timer is not None:
            self._timer.cancel()
        if self._negotiation is not None:
            self._negotiation.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._negotiation


def _told(report: Report) -> dict[str, Any]:
    """Return a report as arguments of lease_model: what is as usual is left out."""
    usual = Report()
    return {name: value for name in Report.__slots__ if (value := getattr(report, name)) != getattr(usual, name)}
