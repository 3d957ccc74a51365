"""Tries: one request to a model for one item, or its answer from the response cache, and what comes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pgharness.database import Row
from pgharness.errors import ModelError, NotCached, RequestRejected
from pgharness.execution.definition import Definition
from pgharness.execution.items import Item
from pgharness.execution.slices import Loader
from pgharness.gateway.cache import Answers
from pgharness.gateway.calls import CallRecord, model_error, used_tokens
from pgharness.gateway.limits import Gate
from pgharness.types import Completer, Completion, Request, Trail

ASKED: Row = {}  # in the place of an outcome: somebody else is asking the same, and the answer will be kept
_CRASH_LIMIT = 5


@dataclass(slots=True, eq=False)
class Call:
    """An item that is tried now, with what it takes."""

    item: Item
    answers: Answers | None  # of the response cache, if its run uses it
    completer: Completer
    request: Request
    gate: Gate | None
    charged: float = 0.0
    began: float | None = None  # when the model was asked, once it has answered or failed
    error: ModelError | None = None


class Tries:
    """Makes tries. `on_cancelled` takes the outcome of one that was cancelled, which is recorded all the same."""

    def __init__(self, loader: Loader, on_cancelled: Callable[[Row], None]) -> None:
        self._loader = loader
        self._on_cancelled = on_cancelled

    async def answer_of(self, item: Item, definition: Definition, *, is_asked: bool) -> Row | None:
        """Return the outcome of an item that the cache answers, or may not be asked; None when it has to be asked."""
        answers, record = definition.answers, CallRecord(item.spec)
        assert answers is not None
        try:
            if item.question_key is None:
                item.request = definition.requests.of(item)
                item.question_key = answers.key(item.spec, item.request)
            if is_asked:
                stored = await answers.wait(item.question_key)
            else:
                stored = await answers.look(item.spec, item.question_key)
        except Exception as exc:
            return item.failed(exc, [record.failed(exc, None)] if isinstance(exc, NotCached) else ())
        if stored is None:
            return None
        try:
            return item.answered(record, stored)
        except ModelError as exc:
            if not answers.may_ask:
                return item.failed(exc, [record.failed(exc, None)])
            item.has_unusable = True  # it came from a member of a composite, of which more was not asked
            return None

    async def make(self, call: Call) -> Row:
        """Make the one call of this try and return its outcome; a cancelled call is recorded as such."""
        item, gate, request = call.item, call.gate, call.request
        answers, key = call.answers, item.question_key
        if answers is not None and key is not None and (found := await self._claim(call, answers, key)) is not None:
            return found
        record = CallRecord(item.spec)
        members: list[Row] = []
        if item.spec.members:
            trail = Trail(record.started_at)
            request, members = replace(request, trail=trail), trail.calls
        completion: Completion | None = None
        error: ModelError
        began = time.monotonic()
        try:
            completion = await call.completer(request)
            answer = item.read(completion)
        except asyncio.CancelledError:
            if answers is not None and key is not None:
                answers.release(key)
            self._on_cancelled(item.outcome("cancelled", [record.cancelled(), *members]))
            raise
        except Exception as exc:
            error = call.error = model_error(exc)
            call.began = began
            if gate is not None:
                gate.spare(began, error)
        else:
            call.began = began
            if gate is not None:
                gate.settle(call.charged, completion.usage.input_tokens + completion.usage.output_tokens)
            row = record.succeeded(completion)
            if answers is not None and key is not None:
                row |= answers.entry(key, row, completion, members, replaces=item.has_unusable)
            return item.outcome("succeeded", [row, *members]) | answer
        if answers is not None and key is not None:
            answers.release(key)
        if gate is not None:
            gate.settle(call.charged, sum(used_tokens(completion or error)[:2]))
        return item.failed(error, [record.failed(error, completion), *members])

    async def _claim(self, call: Call, answers: Answers, key: bytes) -> Row | None:
        """Return None when the call is to be made, else the outcome without it, or ASKED."""
        item, record = call.item, CallRecord(call.item.spec)
        claim = True if item.has_unusable else await answers.claim(item.spec, key)
        found: Row | None = None
        if claim is False:
            found = ASKED
        elif claim is not True:  # the answer has come meanwhile
            try:
                found = item.answered(record, claim)
            except ModelError:
                item.has_unusable = True
        if found is not None and call.gate is not None:
            call.gate.settle(call.charged, 0)
        return found

    async def make_alone(self, call: Call) -> Row:
        """Make a try that may kill this process: count the crash that follows if it does; fail after enough."""
        item = call.item
        charged = await self._loader.persist("charge_crash", run_id=item.run_id, kind=item.kind, ordinal=item.ordinal)
        if charged[0]["charge_crash"] > _CRASH_LIMIT:
            error = RequestRejected(f"the worker process died {_CRASH_LIMIT} times while it ran this item alone")
            return item.failed(error) | {"cause": "crashed"}
        return await self.make(call)
