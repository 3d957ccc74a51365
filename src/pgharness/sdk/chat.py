"""Asking models for the code of a run: recorded, costed, within every limit that holds for all workers together.

A process that asks holds its leases as a worker of its own, registered when it first asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pgharness import __version__
from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError, ModelError
from pgharness.execution.items import CallRecord, estimated_tokens, model_error, used_tokens
from pgharness.gateway import Gateway
from pgharness.gateway.limits import Gate, Limits
from pgharness.sdk.scope import Scope
from pgharness.types import Completer, Completion, Message, ModelSpec, Request

_ATTEMPTS = 3
_BEAT_SECONDS = 1.0


class Chat:
    """The models of one process, by name."""

    def __init__(self, database: Database, gateway: Gateway, run: Row) -> None:
        self._run = run
        self._database = database
        self._gateway = gateway
        self._models: dict[str, tuple[ModelSpec, Completer]] = {}
        self._asked: Counter[int] = Counter()  # how often each question was asked, by its hash
        self._opening: asyncio.Task[Limits] | None = None
        self._limits: Limits | None = None
        self._lease_holder: int | None = None
        self._beating: asyncio.Task[None] | None = None
        self._may_call = asyncio.Event()

    async def complete(
        self,
        scope: Scope,
        model: str,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None,
        parameters: Mapping[str, Any],
        seed: int | None,
    ) -> Completion:
        """Ask a model, and again when that may help; each request is recorded and costed, and keeps to its limits."""
        spec, completer = await self._model(model)
        request = Request(
            tuple(messages),
            schema=schema,
            parameters=parameters,
            is_reasoning=spec.is_reasoning,
            seed=self._seed(scope, model, messages) if seed is None else seed,
        )
        delay = 1.0
        for attempt in itertools.count(1):
            try:
                return await self._ask(scope, spec, completer, request)
            except ModelError as exc:
                if not exc.is_retryable or (exc.spends_attempt and attempt >= _ATTEMPTS):
                    raise
                await asyncio.sleep((exc.retry_after or delay) * (0.75 + 0.5 * random.random()))
                delay = min(delay * 2, 60.0)
        raise AssertionError

    def _seed(self, scope: Scope, model: str, messages: Sequence[Message]) -> int:
        """Return a seed of the task's own; of a question that it asks again, the next."""
        asked = hash((scope.ordinal, scope.attempt, model, tuple(messages)))
        self._asked[asked] += 1
        return (scope.seed + self._asked[asked] - 1) & 0x7FFFFFFF

    async def _model(self, name: str) -> tuple[ModelSpec, Completer]:
        if name not in self._models:
            row = (await self._database.persist("load_model", model=name))[0]["load_model"]
            spec = ModelSpec.model_validate(row)
            self._models[name] = spec, self._gateway.completer(spec)
        return self._models[name]

    async def _ask(self, scope: Scope, spec: ModelSpec, completer: Completer, request: Request) -> Completion:
        limits = await self._own_limits()
        # the run's cap as it was when this process began; it follows a cap that changes, not one that is new
        gates = [limits.of_run(self._run["run_id"])] if self._run["max_concurrency"] is not None else []
        if (of_model := limits.of_model(spec)) is not None:
            gates.append(of_model)
        tokens = estimated_tokens(request, spec)
        async with contextlib.AsyncExitStack() as stack:
            charged = 0.0
            for gate in gates:
                charged = await self._enter(gate, tokens)
                stack.callback(gate.leave)
            used = 0
            record = CallRecord(spec)
            try:
                completion = await completer(request)
                used = completion.usage.input_tokens + completion.usage.output_tokens
            except asyncio.CancelledError:
                scope.emit("call", {"call": record.cancelled()})
                raise
            except Exception as exc:
                error = model_error(exc)
                used = sum(used_tokens(error)[:2])
                scope.emit("call", {"call": record.failed(error, None)})
                if error.retry_after is not None and not error.spends_attempt:
                    limits.block(spec, error.retry_after)
                raise error from exc
            finally:
                if of_model is not None:
                    of_model.settle(charged, used)
            scope.emit("call", {"call": record.succeeded(completion)})
            return completion

    async def _enter(self, gate: Gate, tokens: int) -> float:
        """Wait until a gate admits a call; return the tokens that it is charged."""
        gate.waiting += 1
        gate.tokens = tokens
        try:
            while not gate.admits():
                self._may_call.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._may_call.wait()
        finally:
            gate.waiting -= 1
        return gate.enter()

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
        self._limits = Limits(self._database, self._lease_holder, self._may_call.set)
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
            with contextlib.suppress(HarnessError, *TRANSIENT):
                await self._beat("stopped")
