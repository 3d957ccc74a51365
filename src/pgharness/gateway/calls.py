"""Calls: the record of each request to a model, and the members of a composite, whose calls stand beside its own."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pgharness.database import Row
from pgharness.errors import CodeFailed, ModelError, NotCached
from pgharness.gateway.limits import Gate, Limits
from pgharness.types import Completer, Completion, ModelSpec, Request, Trail

if TYPE_CHECKING:
    from pgharness.gateway.cache import Answers, Stored

logger = logging.getLogger(__name__)
_CODE = ("command", "python", "plugin")
_ITEM_READERS = (*_CODE, "simulator")
_OUTPUT_TOKENS_GUESS = 500
_LONGEST_ERROR = 4_000
_LONGEST_ANSWER = 100_000


class CallRecord:
    """One request to a model while it is under way; each of its ends gives the row of `calls`.

    What a composite used is in the rows of its members: its own has neither tokens nor cost.
    """

    __slots__ = ("_spec", "_start", "_trail", "started_at")

    def __init__(self, spec: ModelSpec, trail: Trail | None = None) -> None:
        self._spec = spec
        self._trail = trail
        self.started_at = datetime.now(UTC) if trail is None else trail.begin()
        self._start = time.perf_counter()

    def _row(self, outcome: str) -> Row:
        row = {
            "model_id": self._spec.id,
            "started_at": self.started_at,
            "latency_ms": (time.perf_counter() - self._start) * 1000,
            "outcome": outcome,
        }
        if self._trail is not None:
            row["parent_started_at"] = self._trail.parent_started_at
        return row

    def cancelled(self) -> Row:
        return self._row("cancelled")

    def failed(self, error: ModelError, completion: Completion | None) -> Row:
        """Return the row of a call that failed, or whose answer could not be used."""
        answer = error.text or (completion.text if completion else None)
        row = self._row(error.outcome)
        row["error"] = str(error)[:_LONGEST_ERROR]
        row["answer"] = answer[:_LONGEST_ANSWER] if answer else None
        row["http_status"] = error.http_status
        row |= self._reply(completion or error)
        return row

    def succeeded(self, completion: Completion) -> Row:
        row = self._row("succeeded")
        row["http_status"] = completion.http_status
        row |= self._reply(completion)
        return row

    def cached(self, key: bytes, stored: Stored) -> Row:
        """Return the row of a call that was not made, because the response cache had its answer."""
        found = stored.completion
        row = self._row("cached") | {"response_key": f"\\x{key.hex()}", "saved_usd": stored.cost_usd}
        row |= {"finish_reason": found.finish_reason, "request_id": found.request_id, "answered_by": found.model}
        return row if found.composition is None else row | {"composition": found.composition}

    def _reply(self, reply: Completion | ModelError) -> Row:
        used = (0, 0, 0) if self._spec.members else used_tokens(reply)
        row: Row = {
            "input_tokens": used[0],
            "output_tokens": used[1],
            "cached_tokens": used[2],
            "cost_usd": self._spec.price(*used),
            "finish_reason": reply.finish_reason,
            "request_id": reply.request_id,
            "answered_by": reply.model if isinstance(reply, Completion) else None,
        }
        if reply.composition is not None:
            row["composition"] = reply.composition
        return row


class Member:
    """A model that a composite asks: within the model's own limits, each call recorded in the request's trail.

    A row of a trail says which request it was by `number`, so that a composite can complete the row of a call that it
    cancelled; the database does not keep that. A model that is out of service fails at once, for the composite has
    others; nothing is recorded of what was not asked. `answers` are those that the response cache has for its run: one
    that is there waits for no limit.
    """

    def __init__(
        self, spec: ModelSpec, completer: Completer, limits: Limits | None = None, answers: Answers | None = None
    ) -> None:
        self.spec = spec
        self._completer = completer
        self._limits = limits
        self._answers = answers

    @property
    def _gate(self) -> Gate | None:
        return None if self._limits is None or self.spec.members else self._limits.of_model(self.spec)

    @property
    def is_blocked(self) -> bool:
        """Whether its provider asks to wait."""
        gate = self._gate
        return gate is not None and gate.is_blocked

    @property
    def would_wait(self) -> bool:
        """Whether a call would not begin at once."""
        gate = self._gate
        return gate is not None and not gate.admits()

    async def __call__(self, request: Request) -> Completion:
        if (facts := facts_for(self.spec, request.item)) is not request.item:
            request = replace(request, item=facts)
        answers = self._answers
        if answers is None:
            completion = await self._ask(request, None)
            assert completion is not None
            return completion
        key = answers.key(self.spec, request, is_member=True)
        record = CallRecord(self.spec, request.trail)
        try:
            found = await answers.found(self.spec, key, lambda: self._ask(request, key))
        except NotCached as exc:
            _note(request, record.failed(exc, None))
            raise
        if isinstance(found, Completion):
            return found
        _note(request, record.cached(key, found))
        return found.completion

    async def _ask(self, request: Request, key: bytes | None) -> Completion | None:
        """Make the call, within the model's limits; None when another one asks the same and its answer will be kept."""
        gate = self._gate
        if gate is None:
            return await self._call(request, key)
        charged = await gate.entered(estimated_tokens(request, self.spec), has_others=True)
        began = time.monotonic()
        try:
            completion = await self._call(request, key)
        except ModelError as exc:
            gate.leave(began, exc)
            gate.settle(charged, sum(used_tokens(exc)[:2]))
            raise
        except BaseException:
            gate.leave()
            gate.settle(charged, 0)
            raise
        if completion is None:  # nothing was asked
            gate.leave()
            gate.settle(charged, 0)
        else:
            gate.leave(began)
            gate.settle(charged, sum(used_tokens(completion)[:2]))
        return completion

    async def _call(self, request: Request, key: bytes | None) -> Completion | None:
        answers, trail = self._answers, request.trail
        if answers is not None and key is not None:
            claim = await answers.claim(self.spec, key)
            if claim is not True:  # or its answer has come meanwhile
                return None
        record = CallRecord(self.spec, trail)
        asked = request
        if self.spec.members and trail is not None:
            asked = replace(request, trail=trail.under(record.started_at))
        try:
            completion = await self._completer(asked)
        except BaseException as exc:
            if answers is not None and key is not None:
                answers.release(key)
            if isinstance(exc, asyncio.CancelledError):
                _note(request, record.cancelled())
            if trail is None or not isinstance(exc, Exception):
                raise
            error = model_error(exc)
            _note(request, record.failed(error, None))
            raise error from exc
        row = record.succeeded(completion)
        if answers is not None and key is not None:
            row |= answers.keep(key, row, completion, below(trail.calls, row) if self.spec.members and trail else ())
        _note(request, row)
        return completion


def _note(request: Request, row: Row) -> None:
    if request.trail is not None:
        row["number"] = request.number
        request.trail.calls.append(row)


def below(calls: Iterable[Row], parent: Row) -> list[Row]:
    """Return those of an item's calls that were made for one of them, directly or not."""
    parents, found = {parent["started_at"]}, []
    for call in sorted(calls, key=lambda call: call["started_at"]):  # who asks begins before who answers
        if call.get("parent_started_at") in parents and call["started_at"] not in parents:
            parents.add(call["started_at"])
            found.append(call)
    return found


def reads_items(spec: ModelSpec) -> bool:
    """Tell whether a model, or a member of it, sees the case itself and not messages alone."""
    return spec.provider in _ITEM_READERS or any(map(reads_items, spec.members))


def facts_for(spec: ModelSpec, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a model may see of an item: to code that generates, the answer is not given away."""
    if spec.provider not in _CODE or "note" in facts or "case" not in facts:
        return facts
    return {**facts, "case": {name: value for name, value in facts["case"].items() if name != "target"}}


def used_tokens(reply: Completion | ModelError) -> tuple[int, int, int]:
    """Return the input, output and cached tokens of a reply."""
    usage = reply.usage if isinstance(reply, Completion) else reply
    return usage.input_tokens, usage.output_tokens, usage.cached_tokens


def model_error(error: Exception) -> ModelError:
    """Return a ModelError as it is, and anything unexpected as the failure of code that it is."""
    if isinstance(error, ModelError):
        return error
    logger.error("an item failed with an unexpected error", exc_info=error)
    text = "".join(traceback.format_exception(error))[-8000:]
    return CodeFailed(f"{type(error).__name__}: {error}", text=text)


def estimated_tokens(request: Request, spec: ModelSpec) -> int:
    """Return about how many tokens a call will count against a quota."""
    limit = spec.parameters.get("max_tokens") or _OUTPUT_TOKENS_GUESS
    return sum([len(message.content) for message in request.messages]) // 4 + int(limit)
