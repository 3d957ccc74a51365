"""Simulated models behind an OpenAI-compatible API: what a load test points its clients at.

The answer to a prompt with a seed, or with temperature 0, follows from these alone; any other request draws its own, as
from a model that samples. Faults and latency follow from a request's place in the order of arrival, so a prompt that is
asked again, by a retry or a hedge, can fare better. The same requests in the same order fare the same at every start.

The server sees a prompt and nothing else: no target, no rubric. It answers with a note of the last user message, or
with any JSON that fits the schema asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import math
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pgharness.errors import HarnessError, InvalidOutput, ModelError, RateLimited, Refused, TimedOut
from pgharness.gateway.parameters import read_parameters
from pgharness.gateway.simulated_world import SimulatorParameters, TrueLimit
from pgharness.gateway.simulator import Simulator
from pgharness.types import Completion, Message, ModelSpec, Request

HANG_SECONDS = 600.0  # how long a request may get no answer before the connection is given up
LARGEST_BODY = 64 * 1024 * 1024
_LIMITS = ("requests_per_second_limit", "concurrency_limit")
_ANY_OBJECT = {"type": "object", "properties": {"answer": {"type": "string"}}}
_ERROR_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


@dataclass(slots=True)
class Stats:
    """What became of the requests for completions so far; `requests` is the sum of those in flight and those ended."""

    requests: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    completed: int = 0  # answered with 200
    refused: int = 0  # with 429
    failed: int = 0  # with 500 and above
    rejected: int = 0  # with 400, 404 or 413
    cancelled: int = 0  # the client left, or the server ended


class _Lax(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Part(_Lax):
    type: Literal["text"]
    text: str


class _Turn(_Lax):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None

    def message(self) -> Message:
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return Message("system" if self.role == "developer" else self.role, text)


class _Schema(_Lax):
    name: str = "answer"
    json_schema: dict[str, Any] = Field(alias="schema")


class _Format(_Lax):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


class _Chat(_Lax):
    """The body of a request; what cannot change a simulated answer is not looked at."""

    model: str
    messages: list[_Turn] = Field(min_length=1)
    seed: int | None = None
    temperature: float | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: _Format | None = None
    logprobs: bool | None = None
    stream: Literal[False] | None = None
    n: Literal[1] | None = None

    def schema_asked(self) -> Mapping[str, Any] | None:
        if self.response_format is None or self.response_format.type == "text":
            return None
        found = self.response_format.json_schema
        return _ANY_OBJECT if found is None else found.json_schema


class SimulationServer:
    """Serves simulated models that share parameters and, as one provider's models do, its limits.

    Each name in `models` is a model with draws of its own; `seed` changes all of them.
    """

    def __init__(self, parameters: Mapping[str, Any], *, models: Sequence[str] = ("simulator",), seed: int = 0) -> None:
        self.stats = Stats()
        self.models = tuple(dict.fromkeys(models))
        self.url = ""
        specs = [
            ModelSpec(id=0, name=name, provider="simulator", parameters=dict(parameters), timeout_seconds=HANG_SECONDS)
            for name in self.models
        ]
        self._parameters = read_parameters(specs[0], SimulatorParameters)
        per_second, at_once = self._parameters.requests_per_second_limit, self._parameters.concurrency_limit
        self._limit = TrueLimit(per_second, at_once, time.monotonic)
        for spec in specs:
            for name in _LIMITS:
                spec.parameters.pop(name, None)
        self._simulators = {spec.name: Simulator(spec) for spec in specs}
        self._identity = hashlib.blake2b(b"%d" % seed, digest_size=8)
        self._runner: web.AppRunner | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; `url` is then the base URL for clients. Port 0 takes a free one."""
        app = web.Application(client_max_size=LARGEST_BODY)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/stats", self._show_stats)
        # a client that leaves cancels its request, as it would stop a real model
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, backlog=4096).start()
        except OSError as exc:
            await self._runner.cleanup()
            raise HarnessError(
                f"{host}:{port} cannot be listened on: {exc.strerror or exc}", hint="--port 0 takes a free port"
            ) from exc
        shown = socket.gethostname() if host in ("0.0.0.0", "::", "") else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        """Stop listening and drop what is in flight."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _list_models(self, http: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "pgharness"} for name in self.models]
        return _json({"object": "list", "data": data})

    async def _show_stats(self, http: web.Request) -> web.Response:
        return _json(asdict(self.stats))

    async def _chat(self, http: web.Request) -> web.Response:
        stats = self.stats
        place = stats.requests
        stats.requests += 1
        stats.in_flight += 1
        stats.max_in_flight = max(stats.max_in_flight, stats.in_flight)
        status = 500
        try:
            response = await self._within_limit(http, place)
            status = response.status
            return response
        except asyncio.CancelledError:
            status = 0
            raise
        except web.HTTPException as exc:
            status = exc.status
            raise
        finally:
            stats.in_flight -= 1
            stats.completed += status == 200
            stats.refused += status == 429
            stats.failed += status >= 500
            stats.rejected += status in (400, 404, 413)
            stats.cancelled += status == 0

    async def _within_limit(self, http: web.Request, place: int) -> web.Response:
        if not self._limit.enter():
            wait = self._parameters.retry_after_seconds
            return _failure(RateLimited("the limit is reached", retry_after=wait, http_status=429))
        try:
            return await self._respond(http, place)
        finally:
            self._limit.leave()

    async def _respond(self, http: web.Request, place: int) -> web.Response:
        arrived_at = time.monotonic()
        try:
            chat = _Chat.model_validate_json(await http.read())
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            where = ".".join(str(step) for step in first["loc"]) or "body"
            return _error(400, f"{where}: {first['msg']}")
        simulator = self._simulators.get(chat.model)
        if simulator is None:
            return _error(
                404, f"there is no model {chat.model!r}; there are {', '.join(self.models)}", "model_not_found"
            )
        request = self._request(chat, place)
        try:
            return _completion(chat, await simulator(request), self._parameters.quality)
        except (Refused, InvalidOutput) as exc:
            return _unusable(chat, exc)
        except TimedOut as exc:
            await asyncio.sleep(arrived_at + HANG_SECONDS - time.monotonic())  # a fault without latency comes at once
            return _failure(exc)
        except ModelError as exc:
            return _failure(exc)
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as exc:
            if request.schema is None:
                raise
            return _error(400, f"response_format: no answer can be made for this schema: {type(exc).__name__}: {exc}")

    def _request(self, chat: _Chat, place: int) -> Request:
        messages = tuple([turn.message() for turn in chat.messages])
        is_fixed = chat.seed is not None or chat.temperature == 0
        digest = self._identity.copy()
        digest.update(f"\0{chat.seed}\0{None if is_fixed else place}".encode())
        for message in messages:
            digest.update(f"\0{message.role}\0{message.content}".encode())
        asked = next((message.content for message in reversed(messages) if message.role == "user"), "")
        return Request(
            messages=messages,
            schema=chat.schema_asked(),
            seed=int.from_bytes(digest.digest(), "big"),
            item={"case": {"input": asked}},
            number=place,
        )


async def serve(
    server: SimulationServer, *, host: str, port: int, on_ready: Callable[[SimulationServer], None]
) -> None:
    """Serve until SIGTERM or SIGINT; `on_ready` is called when clients can connect. Raises HarnessError."""
    with contextlib.suppress(ValueError, OSError):  # every client is a file descriptor, and many systems allow 1,024
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    ended = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    await server.start(host, port)
    try:
        on_ready(server)
        await ended.wait()
    finally:
        await server.stop()


# ---- replies ---------------------------------------------------------------------------------------------------------


def _json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, headers=headers, content_type="application/json")


def _error(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> web.Response:
    kind = _ERROR_TYPES.get(status, "server_error")
    return _json({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)


def _failure(error: ModelError) -> web.Response:
    """Return the reply that a real server gives in such a case."""
    headers = {"x-request-id": error.request_id} if error.request_id else {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))  # whole seconds are all that HTTP knows
        headers["retry-after-ms"] = str(round(error.retry_after * 1000))
    return _error(error.http_status or 504, str(error), error.outcome, headers)


def _completion(chat: _Chat, completion: Completion, quality: float) -> web.Response:
    text, tokens, finish_reason = completion.text, completion.usage.output_tokens, "stop"
    most = chat.max_completion_tokens or chat.max_tokens
    if most is not None and tokens > most:
        text, tokens, finish_reason = text[: 4 * most], most, "length"
    logprobs = _logprobs(text, tokens, quality) if chat.logprobs else None
    message = {"role": "assistant", "content": text, "refusal": None}
    return _chat_reply(
        chat, completion.request_id, message, finish_reason, completion.usage.input_tokens, tokens, logprobs
    )


def _unusable(chat: _Chat, error: Refused | InvalidOutput) -> web.Response:
    """Return a reply whose answer nobody can use: a refusal, or no JSON."""
    is_refusal = isinstance(error, Refused)
    message = {"role": "assistant", "content": error.text, "refusal": None}
    if is_refusal:
        message |= {"content": None, "refusal": error.text}
    finish_reason = error.finish_reason or "stop"
    return _chat_reply(chat, error.request_id, message, finish_reason, error.input_tokens, error.output_tokens)


def _chat_reply(
    chat: _Chat,
    request_id: str | None,
    message: Mapping[str, Any],
    finish_reason: str,
    input_tokens: int,
    output_tokens: int,
    logprobs: Mapping[str, Any] | None = None,
) -> web.Response:
    body = {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}],
        "usage": {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
        },
    }
    return _json(body, headers={"x-request-id": request_id or ""})


def _logprobs(text: str, count: int, quality: float) -> dict[str, Any]:
    """Return a log-probability for each token: exponential, and nearer to 0 the better the model is."""
    rng = random.Random(text)
    cuts = [4 * place for place in range(count)] + [len(text)]
    content = []
    for start, end in itertools.pairwise(cuts):
        token = text[start:end]
        logprob = -rng.expovariate(1.0) * (1.0 - quality)
        content.append({"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []})
    return {"content": content, "refusal": None}
