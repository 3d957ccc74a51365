"""A model that needs no network: seeded answers that read like notes, grades and short answers.

The same request always gets the same answer, fault and latency: everything random comes from one digest of the model's
name, the request's seed and its attempt. Another replication is another seed; a retry is another attempt, so an attempt
has to be counted even where it was not spent (a rate limit), or the same fault comes back. Requests made for one answer
at once, as by a hedge, have their own faults and latencies, and one answer: who wins the race changes no result.

A note repeats more or fewer facts of its case; that is its hidden quality, and the only thing a simulated grader can
find out about it. So good simulated models score better than bad ones, by a real path through the data.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import math
import random
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic_core import to_json

from pgharness.errors import InvalidOutput, ModelError, RateLimited, Refused, ServerFailed, TimedOut, Unavailable
from pgharness.gateway.parameters import read_parameters
from pgharness.gateway.simulated_answers import facts_of, lacking, note, structured, wrong_answer
from pgharness.gateway.simulated_world import Clock, Competence, Latency, SimulatorParameters, world_of
from pgharness.types import Completion, ModelSpec, Request, Usage

_UNIT = 2.0**-64
_KEPT_CASES = 256
_REFUSAL = "I am sorry, but I cannot help with this request."


class Simulator:
    """Answer like a model would: a grade or any JSON where a schema is given, a target's answer, else a note.

    `clock` tells the time for outages and limits, `sleep` waits: a scripted pair lets hours pass at once. All models
    on one clock live in one world, with one beginning of time.
    """

    def __init__(
        self, spec: ModelSpec, *, clock: Clock = time.time, sleep: Callable[[float], Awaitable[Any]] | None = None
    ) -> None:
        self._spec = spec
        self._parameters = read_parameters(spec, SimulatorParameters)
        self._sleep = sleep or asyncio.sleep
        self._world = world_of(clock)
        self._limit = self._world.limit(spec.name, self._parameters)
        self._latency = Latency(self._parameters)
        self._competence = Competence(self._parameters)
        self._kept: dict[int | str, tuple[Any, list[tuple[str, str]]]] = {}  # the facts of the latest cases
        self._identity = hashlib.blake2b(spec.name.encode(), digest_size=32)
        faults, rates = zip(*self._parameters.faults(), strict=True)
        self._faults: tuple[tuple[str, float], ...] = tuple(zip(faults, itertools.accumulate(rates), strict=True))
        if not any(rates):
            self._faults = ()

    async def __call__(self, request: Request) -> Completion:
        """Answer after the drawn latency, or raise the drawn fault, the outage's or the limit's."""
        if self._limit is None:
            return await self._answered(request)
        if not self._limit.enter():
            raise self._error("rate_limited", None, 0)
        try:
            return await self._answered(request)
        finally:
            self._limit.leave()

    async def _answered(self, request: Request) -> Completion:
        fault_draw, pace_draw, answer_seed, identity = self._drawn(request)
        request_id = f"sim-{identity:016x}"
        input_tokens = sum([len(message.content) for message in request.messages]) // 4
        fault = self._fault(fault_draw * _UNIT)
        slowdown = 1.0
        if self._parameters.outages and (outage := self._world.outage(self._parameters)) is not None:
            fault = outage.fault or fault
            slowdown = outage.factor if outage.kind == "slow" else 1.0
        if fault in ("rate_limited", "unavailable"):
            raise self._error(fault, request_id, 0)
        reply: Completion | ModelError | None = None
        if self._latency.follows_output:
            reply = self._reply(request, fault, answer_seed, request_id, input_tokens)
        if not self._latency.is_none or fault == "hang":
            seconds = math.inf
            if fault not in ("timeout", "hang"):
                seconds = slowdown * self._latency.seconds(pace_draw, input_tokens, _output_tokens(reply))
            await self._sleep(min(seconds, self._spec.timeout_seconds))
            if seconds > self._spec.timeout_seconds:
                raise self._error("timeout", request_id, 0)
        if reply is None:
            reply = self._reply(request, fault, answer_seed, request_id, input_tokens)
        if isinstance(reply, ModelError):
            raise reply
        return reply

    def _drawn(self, request: Request) -> tuple[int, int, int, int]:
        """Return what decides a request's fault, its pace and its answer, and its identity."""
        digest = self._identity.copy()
        digest.update(f"\0{request.seed}\0{request.attempt}".encode())
        drawn: tuple[int, int, int, int] = struct.unpack("<4Q", digest.digest())
        if request.number:
            digest.update(f"\0{request.number}".encode())
            fault_draw, pace_draw, _, identity = struct.unpack("<4Q", digest.digest())
            return fault_draw, pace_draw, drawn[2], identity
        return drawn

    def _reply(
        self, request: Request, fault: str | None, seed: int, request_id: str, input_tokens: int
    ) -> Completion | ModelError:
        """Return the answer, or the error that comes in its place."""
        if fault is not None and fault != "invalid":
            return self._error(fault, request_id, input_tokens)
        confidence: float | None = None
        if request.schema is None:
            text, data, confidence = self._answer(request.item, seed)
        else:
            noise, leniency = self._parameters.noise, self._parameters.leniency
            data = structured(request.item, request.schema, seed, leniency=leniency, noise=noise)
            if fault == "invalid":
                data = _misshapen(data, request.schema, random.Random(seed), request_id, input_tokens)
                if isinstance(data, ModelError):
                    return data
            text = to_json(data).decode()
        return Completion(
            text=text,
            data=data,
            usage=Usage(input_tokens, max(1, len(text) // 4)),
            finish_reason="stop",
            request_id=request_id,
            model=self._spec.model or self._spec.name,
            http_status=200,
            confidence=confidence,
        )

    def _answer(self, item: Mapping[str, Any], seed: int) -> tuple[str, Any, float | None]:
        """Return the text, the JSON of one that has structure, and the confidence of an answer without a schema."""
        case = item.get("case") or {}
        target = case.get("target")
        if target is None:
            told_share = functools.partial(self._competence.told_share, case)
            facts, length = self._facts(case.get("input")), self._parameters.output_tokens
            return note(facts, seed, told_share=told_share, output_tokens=length), None, None
        belief = self._competence.belief(case, seed)
        text = target if isinstance(target, str) else json.dumps(target)
        if not belief.is_right:
            return wrong_answer(text, self._competence.mistake(case, seed)), None, belief.confidence
        return text, target if isinstance(target, (dict, list)) else None, belief.confidence

    def _facts(self, case_input: Any) -> list[tuple[str, str]]:
        key = case_input if isinstance(case_input, str) else id(case_input)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = (case_input, facts_of(case_input))  # with the input, so that no other gets its id
            if len(self._kept) > _KEPT_CASES:
                del self._kept[next(iter(self._kept))]
        return kept[1]

    def _fault(self, draw: float) -> str | None:
        for fault, upper in self._faults:
            if draw < upper:
                return fault
        return None

    def _error(self, fault: str, request_id: str | None, input_tokens: int) -> ModelError:
        match fault:
            case "rate_limited":
                return RateLimited(
                    "the simulated provider asks to slow down",
                    retry_after=self._parameters.retry_after_seconds,
                    http_status=429,
                    request_id=request_id,
                )
            case "unavailable":
                return Unavailable("the simulated provider is down", http_status=503, request_id=request_id)
            case "server_error":
                return ServerFailed("the simulated provider failed", http_status=500, request_id=request_id)
            case "timeout" | "hang":
                return TimedOut(f"the simulated model gave no answer within {self._spec.timeout_seconds:g} s")
        return Refused(
            "the simulated model refused to answer",
            text=_REFUSAL,
            finish_reason="content_filter",
            http_status=200,
            request_id=request_id,
            input_tokens=input_tokens,
            output_tokens=len(_REFUSAL) // 4,
        )


def _output_tokens(reply: Completion | ModelError | None) -> int:
    if reply is None:
        return 0
    return reply.usage.output_tokens if isinstance(reply, Completion) else reply.output_tokens


def _misshapen(data: Any, schema: Mapping[str, Any], rng: random.Random, request_id: str, input_tokens: int) -> Any:
    """Return an answer of another shape, or the error that a provider makes of one that is not JSON."""
    whole = json.dumps(data)
    text, finish_reason = rng.choice(
        ((None, ""), (whole[: max(1, len(whole) // 2)], "length"), (f"Here is my answer: {whole}", "stop"))
    )
    if text is None:
        return lacking(data, schema)
    return InvalidOutput(
        "the simulated answer is not JSON",
        text=text,
        finish_reason=finish_reason,
        http_status=200,
        request_id=request_id,
        input_tokens=input_tokens,
        output_tokens=max(1, len(text) // 4),
    )
