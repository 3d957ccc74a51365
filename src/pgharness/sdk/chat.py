"""Asking models for the code of a run: recorded, costed, within every limit that holds for all workers together.

A process that asks holds its leases as a worker of its own, registered when it first asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from pgharness import __version__
from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError, InvalidOutput, ModelError, NotCached
from pgharness.gateway import Gateway
from pgharness.gateway.cache import Answers, ResponseCache
from pgharness.gateway.calls import CallRecord, estimated_tokens, model_error, used_tokens
from pgharness.gateway.limits import Gate, Limits
from pgharness.types import Completer, Completion, Message, ModelSpec, Request, Trail

_ATTEMPTS = 3
_BEAT_SECONDS = 1.0


class Asker(Protocol):
    """Who asks: a try of a task, as `ordinal` and `attempt` say, with a seed of its own; it hears of each call."""

    @property
    def ordinal(self) -> int: ...
    @property
    def attempt(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def emit(self) -> Callable[[str, dict[str, Any]], None]: ...


class Chat:
    """The models of one process, by name."""

    def __init__(self, database: Database, gateway: Gateway, run: Row) -> None:
        self._run = run
        self._database = database
        self._gateway = gateway
        self._loaded: dict[str, ModelSpec] = {}
        self._models: dict[tuple[str, str], tuple[ModelSpec, Completer]] = {}  # by name, and what is laid over it
        self._asked: dict[int, Counter[int]] = {}  # of each try: how often it asked each question, by its hash
        self._opening: asyncio.Task[Limits] | None = None
        self._limits: Limits | None = None
        self._cache: ResponseCache | None = None
        self._answers: Answers | None = None
        self._lease_holder: int | None = None
        self._beating: asyncio.Task[None] | None = None

    async def complete(
        self,
        asker: Asker,
        model: str,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None,
        parameters: Mapping[str, Any],
        seed: int | None,
        is_patient: bool = True,
    ) -> Completion:
        """Ask a model, and again when that may help; each request is recorded and costed, and keeps to its limits.

        Who is patient waits for an outage or a rate limit to pass, however long that takes.
        `parameters` are laid over the model's own: the options of a composite over its, others over its members'.
        """
        spec, completer, parameters = await self._model(model, parameters)
        count = self._count(asker, model, messages)
        request = Request(
            tuple(messages),
            schema=schema,
            parameters=parameters,
            is_reasoning=spec.is_reasoning,
            seed=(asker.seed + count - 1) & 0x7FFFFFFF if seed is None else seed,
            replication=count,
            run_seed=asker.seed if seed is None else seed,
        )
        delay = 1.0
        for attempt in itertools.count(1):
            try:
                return await self._ask(asker, spec, completer, request)
            except ModelError as exc:
                if not exc.is_retryable or ((exc.spends_attempt or not is_patient) and attempt >= _ATTEMPTS):
                    raise
                if isinstance(exc, InvalidOutput):
                    request = replace(request, rejected=attempt)
                await asyncio.sleep((exc.retry_after or delay) * (0.75 + 0.5 * random.random()))
                delay = min(delay * 2, 60.0)
        raise AssertionError

    def _count(self, asker: Asker, model: str, messages: Sequence[Message]) -> int:
        """Return the how manieth time it is that a task asks a question: each has a seed of its own."""
        counts = self._asked.get(id(asker))
        if counts is None:
            counts = self._asked[id(asker)] = Counter()
            weakref.finalize(asker, self._asked.pop, id(asker), None).atexit = False  # it is forgotten when it ends
        asked = hash((model, tuple(messages)))
        counts[asked] += 1
        return counts[asked]

    async def _model(self, name: str, parameters: Mapping[str, Any]) -> tuple[ModelSpec, Completer, Mapping[str, Any]]:
        """Return a model with parameters laid over its own, and those that go with the request."""
        if name not in self._loaded:
            row = (await self._database.persist("load_model", model=name))[0]["load_model"]
            self._loaded[name] = ModelSpec.model_validate(row)
        loaded = self._loaded[name]
        changed, taken = self._gateway.laid_over(loaded, parameters) if parameters else (loaded, parameters)
        key = name, "" if changed is loaded else json.dumps(parameters, sort_keys=True)
        if key not in self._models:
            limits = await self._own_limits()
            self._models[key] = changed, self._gateway.completer(changed, limits, self._answers)
        return *self._models[key], taken

    async def _ask(self, asker: Asker, spec: ModelSpec, completer: Completer, request: Request) -> Completion:
        answers = self._answers
        if answers is None:
            completion = await self._call(asker, spec, completer, request, None)
            assert completion is not None
            return completion
        key, record = answers.key(spec, request), CallRecord(spec)
        try:
            found = await answers.found(spec, key, lambda: self._call(asker, spec, completer, request, key))
        except NotCached as exc:
            asker.emit("call", {"call": record.failed(exc, None)})
            raise
        if isinstance(found, Completion):
            return found
        asker.emit("call", {"call": record.cached(key, found)})
        return found.completion

    async def _call(
        self, asker: Asker, spec: ModelSpec, completer: Completer, request: Request, key: bytes | None
    ) -> Completion | None:
        """Make the call, within every limit; None when another one asks the same and its answer will be kept."""
        answers, limits = self._answers, await self._own_limits()
        # the run's cap as it was when this process began; it follows a cap that changes, not one that is new
        gates = [limits.of_run(self._run["run_id"])] if self._run["max_concurrency"] is not None else []
        if (of_model := limits.of_model(spec)) is not None:
            gates.append(of_model)
        tokens = estimated_tokens(request, spec)
        async with contextlib.AsyncExitStack() as stack:
            charged = 0.0
            how: tuple[float | None, ModelError | None] = (None, None)  # it went

            def leave(gate: Gate) -> None:
                gate.leave(*how)

            for gate in gates:
                charged = await gate.entered(tokens)
                stack.callback(leave, gate)
            used = 0
            if answers is not None and key is not None:
                claim = await answers.claim(spec, key)
                if claim is not True:
                    if of_model is not None:
                        of_model.settle(charged, 0)
                    return None
            began = time.monotonic()
            record = CallRecord(spec)
            trail = Trail(record.started_at)
            if spec.members:
                request = replace(request, trail=trail)
            try:
                completion = await completer(request)
                used = completion.usage.input_tokens + completion.usage.output_tokens
                how = began, None
            except asyncio.CancelledError:
                if answers is not None and key is not None:
                    answers.release(key)
                _tell(asker, record.cancelled(), trail)
                raise
            except Exception as exc:
                error = model_error(exc)
                used = sum(used_tokens(error)[:2])
                how = began, error
                if answers is not None and key is not None:
                    answers.release(key)
                _tell(asker, record.failed(error, None), trail)
                raise error from exc
            finally:
                if of_model is not None:
                    of_model.settle(charged, used)
            row = record.succeeded(completion)
            if answers is not None and key is not None:
                row |= answers.keep(key, row, completion, trail.calls)
            _tell(asker, row, trail)
            return completion

    async def _own_limits(self) -> Limits:
        """Return the gates of this process, which holds leases as a worker of its own."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open_limits())
        return await asyncio.shield(self._opening)

    async def _open_limits(self) -> Limits:
        registered = await self._database.persist(
            "register_worker",
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            queues=[],
            concurrency=0,
        )
        self._lease_holder = registered[0]["register_worker"]
        self._limits = Limits(self._database, self._lease_holder)
        self._cache = ResponseCache(self._database, self._lease_holder)
        self._answers = self._cache.answers(self._run.get("response_cache", "off"), self._run["run_id"])
        self._beating = asyncio.create_task(self._keep_beating())
        return self._limits

    async def _keep_beating(self) -> None:
        while True:
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await self._beat("running")
            await asyncio.sleep(_BEAT_SECONDS)

    async def _beat(self, state: str) -> None:
        await self._database.call(
            "heartbeat", worker_id=self._lease_holder, in_flight={}, state=state, runs=[], jobs=[]
        )

    async def close(self) -> None:
        """Give back what was leased."""
        if self._limits is not None:
            assert self._beating is not None
            self._beating.cancel()
            await self._limits.close()
            if self._cache is not None:
                await self._cache.close()
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await self._beat("stopped")


def _tell(asker: Asker, call: Row, trail: Trail) -> None:
    for row in (call, *trail.calls):
        asker.emit("call", {"call": row})
