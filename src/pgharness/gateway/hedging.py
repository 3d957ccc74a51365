"""Hedging: ask again when an answer is slow, and take whichever good one comes first.

A Hedge is a Completer of Completers, so it nests with ensembles. Its first request goes to the first member, the
second, when the delay has passed, to the second member, and so on; a member alone is its own backup. Requests that lost
are cancelled on the wire and waited for until that is recorded, never for their answer. What they cost is estimated and
counted: a hedge that hid it would bias every view of costs.

What makes a hedge safe is when it does not ask: beyond its share of extra requests, and while a provider limits the
rate.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pgharness.database import Row
from pgharness.errors import ModelError, RateLimited, RequestRejected, TimedOut, Unavailable
from pgharness.gateway.calls import Member, below
from pgharness.gateway.delays import Delay, DelayOptions, Observation, PercentileOptions, Size, delay_of
from pgharness.gateway.observations import Observations
from pgharness.gateway.parameters import read_parameters
from pgharness.types import Completion, ModelSpec, Request, Usage

_MOST_HEDGES = 4
_BURST = 100  # requests whose share of extra ones may be spent at once
_QUIET_SECONDS = 10.0  # without hedges after a rate limit, beyond what its provider asked for
_PAUSE_SECONDS = 0.01  # at least, before a hedge that was held back is tried again
_UNKNOWN_SECONDS = 0.25  # until it is looked up whether a delay is known now
_MOST_SHAPES = 256


class HedgeParameters(BaseModel):
    """Whom a hedge asks, when it asks again, and how often it may."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    members: list[str] = Field(
        min_length=1,
        max_length=_MOST_HEDGES + 1,
        description="the model asked first, then whom each further request goes to",
    )
    delay: DelayOptions | list[DelayOptions] = Field(
        default_factory=lambda: PercentileOptions(strategy="percentile"),
        description="how long to wait for an answer before asking again; a list has one for each request waited for",
    )
    max_hedges: int | None = Field(
        default=None,
        ge=1,
        le=_MOST_HEDGES,
        description="further requests for one answer; null: one for each member but the first, at least one",
    )
    max_extra: float = Field(
        default=0.1,
        ge=0,
        le=_MOST_HEDGES,
        description="further requests as a share of the first ones; those beyond it are not made",
    )
    min_confidence: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="an answer of less confidence is taken only if no other has more; null: every answer is good",
    )
    timeout_seconds: float | None = Field(
        default=None, gt=0, description="how long all requests together may take; null: as long as each of them may"
    )

    @model_validator(mode="after")
    def _delays_fit(self) -> HedgeParameters:
        if isinstance(self.delay, list) and len(self.delay) != self.hedges:
            raise ValueError(f"delay: {len(self.delay)} delays for {self.hedges} further requests")
        return self

    @property
    def hedges(self) -> int:
        """How many further requests one answer may take."""
        return max(1, len(self.members) - 1) if self.max_hedges is None else self.max_hedges


class Hedge:
    """Ask the first member, and the next one whenever the answer is late; return the first good answer.

    All times are those of the event loop's clock. `seed` is what an adaptive delay draws from, else the model's id.
    """

    def __init__(
        self,
        spec: ModelSpec,
        members: Sequence[Member],
        observations: Observations,
        *,
        seed: int | None = None,
    ) -> None:
        parameters = read_parameters(spec, HedgeParameters)
        if parameters.members != [member.spec.name for member in members]:
            raise RequestRejected(
                f"hedge '{spec.name}' names the members {', '.join(parameters.members)}, and was made with others",
                hint="A combination cannot exchange members: insert another hedge.",
            )
        count = parameters.hedges
        self.parameters = parameters
        self.members = [members[min(place, len(members) - 1)] for place in range(count + 1)]
        self.observations = observations
        options = parameters.delay if isinstance(parameters.delay, list) else [parameters.delay] * count
        seed = spec.id if seed is None else seed
        windows = [observations.window(member.spec.id) for member in self.members]
        self.strategies = [option.strategy for option in options]
        self.delays: list[Delay] = [
            delay_of(option, windows[place], windows[place + 1], max_extra=parameters.max_extra, seed=seed + place)
            for place, option in enumerate(options)
        ]
        self.sizes = _Sizes() if "workload" in self.strategies else None
        self.step = (_MOST_HEDGES + 1) ** max(_hedges_in(member.spec) for member in members)
        self.specs = {leaf.id: leaf for leaf in spec.leaves()}
        self._allowance = _Allowance(parameters.max_extra)
        self._quiet_until: dict[int, float] = {}

    async def __call__(self, request: Request) -> Completion:
        """Return the first good answer.

        Raises what the first request failed with, if all did, or what a later one failed with that spends no attempt.
        """
        self._allowance.earn()
        race = _Race(self, request)
        try:
            await race.run()
        finally:
            await race.stop()
        return race.result()

    def holds_back(self, place: int, *, is_instead: bool = False) -> str | None:
        """Return why a further request may not be made now; None when it may, and then it counts as made.

        One that is made instead of the one before, which asked nobody, is no extra one.
        """
        member = self.members[place]
        if member.is_blocked or asyncio.get_running_loop().time() < self._quiet_until.get(member.spec.id, 0.0):
            return "rate_limited"
        if member.would_wait:
            return "limits"
        return None if is_instead or self._allowance.take() else "max_extra"

    def hear_limit(self, member: Member, error: RateLimited) -> None:
        """Make no further requests to a model for a while, because its provider limits the rate."""
        quiet = asyncio.get_running_loop().time() + max(error.retry_after or 0.0, _QUIET_SECONDS)
        self._quiet_until[member.spec.id] = quiet


class _Asked:
    """One request that was made of a member."""

    __slots__ = ("begun", "completion", "ended", "error", "member", "number", "place", "row", "task")

    def __init__(self, place: int, member: Member, number: int, begun: float) -> None:
        self.place = place
        self.member = member
        self.number = number
        self.begun = begun
        self.task: asyncio.Task[Completion] | None = None  # but for the first, which runs in the caller's
        self.ended: float | None = None
        self.completion: Completion | None = None
        self.error: BaseException | None = None
        self.row: Row | None = None  # of calls, where they are recorded

    @property
    def is_cut(self) -> bool:
        """Whether it was given up, and would have taken longer."""
        return self.completion is None and (self.error is None or isinstance(self.error, TimedOut))

    @property
    def seconds(self) -> float:
        """How long it took, without the wait at a limit where that is known."""
        if self.row is not None:
            return float(self.row["latency_ms"]) / 1000.0
        return (self.begun if self.ended is None else self.ended) - self.begun


class _Race:
    """The requests for one answer.

    The first runs in the caller's own task, so that an answer in time costs no more than a timer. Whoever overtakes it
    interrupts it there, the way asyncio.timeout does. What happens meanwhile happens in callbacks.
    """

    __slots__ = (
        *("_asked", "_cancelling", "_deadline", "_delay", "_due", "_failure", "_first_delay", "_hedge", "_held_back"),
        *("_is_interrupted", "_loop", "_news", "_request", "_running", "_size", "_task", "_timer", "_winner"),
    )

    def __init__(self, hedge: Hedge, request: Request) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._is_interrupted = False
        self._loop = asyncio.get_running_loop()
        self._hedge = hedge
        self._request = request
        self._size = Size() if hedge.sizes is None else hedge.sizes.expected(request)
        self._asked: list[_Asked] = []
        self._running = 0
        self._winner: _Asked | None = None
        self._failure: ModelError | None = None
        self._delay: float | None = None  # of the latest request
        self._first_delay: float | None = None
        self._due = math.inf  # when the next one is made
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._held_back: str | None = None
        self._news: asyncio.Future[None] | None = None  # what is waited for once the first request has ended

    # -- asking

    async def run(self) -> None:
        """Make requests until there is a good answer, or no more can be made."""
        first = self._begin(self._request)
        if (timeout := self._hedge.parameters.timeout_seconds) is not None:
            self._deadline = first.begun + timeout
        self._set_timer()
        await self._run_first(first)
        while self._winner is None and self._failure is None:
            if self._running:
                self._news = self._loop.create_future()
                await self._news
            elif not self._may_help() or not self._ask_again():
                return

    async def _run_first(self, first: _Asked) -> None:
        try:
            first.completion = await first.member(self._request)
        except asyncio.CancelledError:
            if not self._is_interrupted:
                raise
        except Exception as exc:
            first.error = exc
        finally:
            self._end(first)
        if self._is_interrupted and self._task.uncancel() > self._cancelling:
            raise asyncio.CancelledError  # somebody else wants it to end, too

    def _begin(self, request: Request) -> _Asked:
        """Take note of a request that is about to be made, and of when the next one is due."""
        place = len(self._asked)
        asked = _Asked(place, self._hedge.members[place], request.number, self._loop.time())
        self._asked.append(asked)
        self._running += 1
        self._set_due()
        return asked

    def _set_due(self) -> None:
        """Look up how long to wait for the latest request; while nobody knows that, look again before long."""
        latest = self._asked[-1]
        self._delay = math.inf
        if latest.place < len(self._hedge.delays):
            self._delay = self._hedge.delays[latest.place].seconds(self._size)
            if latest.place == 0:
                self._first_delay = self._delay
        if self._delay is None:
            now = self._loop.time()
            self._due = now + max(_UNKNOWN_SECONDS, now - latest.begun)
        else:
            self._due = latest.begun + self._delay

    def _ask_again(self) -> bool:
        """Make the next request, unless something holds it back."""
        place = len(self._asked)
        error = self._asked[-1].error
        is_instead = isinstance(error, Unavailable) and not error.was_asked
        self._held_back = self._hedge.holds_back(place, is_instead=is_instead)
        if self._held_back is not None:
            return False
        request = replace(self._request, number=self._request.number + place * self._hedge.step)
        asked = self._begin(request)
        task = asked.task = self._loop.create_task(asked.member(request))
        task.add_done_callback(lambda _: self._on_ended(asked))
        self._set_timer()
        return True

    def _may_help(self) -> bool:
        """Tell whether another request may succeed where all before failed, or were not sure."""
        return len(self._asked) < len(self._hedge.members) and all(
            asked.error is None
            or (
                isinstance(asked.error, ModelError)
                and asked.error.is_retryable
                and not isinstance(asked.error, RateLimited)
            )
            for asked in self._asked
        )

    # -- what happens meanwhile

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        until = min(self._due, self._deadline)
        self._timer = None if until == math.inf else self._loop.call_at(until, self._on_time)

    def _on_time(self) -> None:
        now = self._loop.time()
        if now >= self._deadline:
            self._failure = TimedOut(f"no answer within the hedge's {self._hedge.parameters.timeout_seconds:g} s")
            return self._tell()
        if now >= self._due and self._running:
            self._set_due()  # what others learned meanwhile counts
            if now >= self._due and not self._ask_again():
                self._due = now + max(self._delay or 0.0, _PAUSE_SECONDS)
        return self._set_timer()

    def _on_ended(self, asked: _Asked) -> None:
        if asked.ended is None:
            self._take(asked)
            self._end(asked)
            self._tell()

    def _take(self, asked: _Asked) -> None:
        """Take over what a task came to."""
        if asked.task is not None and not asked.task.cancelled():
            asked.error = asked.task.exception()
            if asked.error is None:
                asked.completion = asked.task.result()

    def _end(self, asked: _Asked) -> None:
        """Count a request as ended, and its answer as the winner if it is the first good one."""
        asked.ended = self._loop.time()
        self._running -= 1
        if isinstance(asked.error, RateLimited):
            self._hedge.hear_limit(asked.member, asked.error)
        elif asked.completion is not None and self._winner is None and self._is_good(asked.completion):
            self._winner = asked

    def _is_good(self, completion: Completion) -> bool:
        least = self._hedge.parameters.min_confidence
        return least is None or completion.confidence is None or completion.confidence >= least

    def _tell(self) -> None:
        """Let the caller's task go on: interrupt the first request if it still runs, and is not needed any more."""
        if self._news is not None:
            if not self._news.done():
                self._news.set_result(None)
        elif (
            self._asked[0].ended is None
            and not self._is_interrupted
            and (self._winner is not None or self._failure is not None)
        ):
            self._is_interrupted = True
            self._task.cancel()

    # -- ending

    async def stop(self) -> None:
        """Cancel who still runs, and wait until that is recorded; take note of what was seen."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [asked.task for asked in self._asked if asked.task is not None and asked.ended is None]
        if tasks:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for asked in self._asked:
                if asked.ended is None:
                    self._take(asked)  # one may have ended in the very moment, or would not be cancelled
                    asked.ended = self._loop.time()
        if self._winner is None:
            unsure = [
                (asked.completion.confidence or 0.0, asked) for asked in self._asked if asked.completion is not None
            ]
            self._winner = max(unsure, key=itemgetter(0), default=(0.0, None))[1]
        for asked in self._asked:
            asked.row = self._row(asked)
        self._observe()
        if len(self._asked) > 1 and self._winner is not None:
            self._estimate(self._winner)

    def result(self) -> Completion:
        """Return the answer, or raise the failure, with how it came about."""
        self._learn()
        if self._winner is not None and self._winner.completion is not None:
            return replace(self._winner.completion, composition=self._composition())
        errors = [asked.error for asked in self._asked if asked.error is not None]
        error = self._failure or min(
            errors, key=lambda error: not isinstance(error, ModelError) or error.spends_attempt
        )
        if isinstance(error, ModelError):
            error.composition = self._composition()
        raise error

    def _learn(self) -> None:
        """Tell the delays how it went with each request that had one."""
        winner, last = self._winner, len(self._asked) - 1
        for place, delay in enumerate(self._hedge.delays[: last + 1]):
            if winner is None:
                delay.learn("failed")
            elif place < last:
                delay.learn("won" if winner.place > place else "lost")
            elif winner.place == last and self._held_back is None:
                delay.learn("unneeded")

    def _observe(self) -> None:
        """Take note of how long each model took for the first request that it got."""
        hedge, winner = self._hedge, self._winner
        used = Usage() if winner is None or winner.completion is None else winner.completion.usage
        size = Size(used.input_tokens or self._size.prompt, self._size.answer)
        seen: list[int] = []
        for asked in self._asked:
            model_id = asked.member.spec.id
            if model_id in seen or not (asked.completion or asked.is_cut):
                continue
            seen.append(model_id)
            if asked.row is None:
                if self._request.trail is None:
                    hedge.observations.add(model_id, Observation(asked.seconds, asked.is_cut, size))
            elif asked.row["outcome"] != "cached":
                observation = Observation(asked.seconds, asked.is_cut, size)
                hedge.observations.add(model_id, observation, asked.row["started_at"])
        if hedge.sizes is not None and used.output_tokens:
            hedge.sizes.learn(self._request, used)

    # -- rows

    def _row(self, asked: _Asked) -> Row | None:
        """Return the row of a request; None while it waits at a limit, and where nothing is recorded."""
        trail = self._request.trail
        if trail is not None:
            row: Row
            for row in reversed(trail.calls):
                if row["number"] == asked.number and row["parent_started_at"] == trail.parent_started_at:
                    return row
        return None

    def _rows(self, asked: _Asked) -> list[Row]:
        """Return the row of a request, and those of the requests that were made for it."""
        trail, row = self._request.trail, asked.row
        if trail is None or row is None:
            return []
        return [row, *below(trail.calls, row)] if asked.member.spec.members else [row]

    def _estimate(self, winner: _Asked) -> None:
        """Complete the rows of requests that were cancelled: their providers bill them all the same.

        They are taken to have read the whole prompt, and written as fast as the winner did.
        """
        assert winner.completion is not None
        used, seconds = winner.completion.usage, winner.seconds
        for row in (row for asked in self._asked if asked is not winner for row in self._rows(asked)):
            spec = self._hedge.specs.get(row["model_id"])
            if spec is None or row["outcome"] != "cancelled" or row.get("is_estimated"):
                continue
            read = used.input_tokens if spec.id == winner.member.spec.id else _estimated(self._request)
            written = round(used.output_tokens * min(1.0, row["latency_ms"] / 1000.0 / max(seconds, 1e-9)))
            row.update(input_tokens=read, output_tokens=written, cost_usd=spec.price(read, written), is_estimated=True)

    def _composition(self) -> dict[str, Any]:
        """Return how the answer, or the failure, came about."""
        first, winner, trail = self._asked[0], self._winner, self._request.trail
        # one that was cancelled before it began was none
        hedges = sum([trail is None or asked.row is not None for asked in self._asked[1:]])
        composition: dict[str, Any] = {
            "strategy": self._hedge.strategies[0],
            "delay_ms": _milliseconds(self._first_delay),
            "hedges": hedges,
            "winner": None if winner is None else winner.member.spec.name,
            "winner_number": None if winner is None else winner.place,
            "primary_ms": _milliseconds(first.seconds) if first.completion or first.is_cut else None,
        }
        if first.is_cut:
            composition["primary_is_cut"] = True
        if self._held_back is not None:
            composition["held_back"] = self._held_back
        if trail is not None:
            costs = [sum([row.get("cost_usd", 0.0) for row in self._rows(asked)]) for asked in self._asked]
            composition["cost_usd"] = sum(costs)
            if hedges:
                composition["extra_usd"] = sum(costs) - (costs[winner.place] if winner else 0.0)
        return composition


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == math.inf else round(seconds * 1000.0, 1)


class _Allowance:
    """How many further requests may be made: a share of the first ones, and of not more than the latest hundred."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._most = max(1.0, _BURST * share)
        self._left = 0.0

    def earn(self) -> None:
        """Count a first request."""
        self._left = min(self._left + self._share, self._most)

    def take(self) -> bool:
        """Count a further request, if it may be made."""
        is_left = self._left > 1.0 - 1e-9
        if is_left:
            self._left -= 1.0
        return is_left


class _Sizes:
    """What requests are expected to weigh, by what those before them did."""

    def __init__(self) -> None:
        self._prompt_ratio = 1.0  # tokens of a prompt to a quarter of its characters
        self._answers: dict[tuple[str, Any], float] = {}  # by the form asked for and the limit

    def expected(self, request: Request) -> Size:
        """Return the size of a request; what is not known of it is 0."""
        answer = self._answers.get(_shape(request))
        if answer is None:
            answer = float(request.parameters.get("max_tokens") or 0)
        return Size(self._prompt_ratio * _estimated(request), answer)

    def learn(self, request: Request, used: Usage) -> None:
        """Take note of what a request weighed."""
        if estimated := _estimated(request):
            self._prompt_ratio += 0.05 * (used.input_tokens / estimated - self._prompt_ratio)
        shape = _shape(request)
        known = self._answers.get(shape, float(used.output_tokens))
        if len(self._answers) >= _MOST_SHAPES:
            self._answers.clear()
        self._answers[shape] = known + 0.05 * (used.output_tokens - known)


def _shape(request: Request) -> tuple[str, Any]:
    return request.schema_name if request.schema is not None else "", request.parameters.get("max_tokens")


def _estimated(request: Request) -> int:
    """Return about how many tokens a prompt has."""
    return sum([len(message.content) for message in request.messages]) // 4


def _hedges_in(spec: ModelSpec) -> int:
    """Return how many hedges deep a model is."""
    return (spec.provider == "hedge") + max(map(_hedges_in, spec.members), default=0)
