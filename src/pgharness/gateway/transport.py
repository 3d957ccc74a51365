"""One HTTP call to a model: sent once, bounded in time, and with its key seen by nobody but the vendor.

Nothing is retried here. A retry is durable work with an attempt to spend, so it belongs to the queue; this module only
says truthfully what happened: a Completion, or the ModelError that fits.

The key is read from the environment when a call is made and goes into a header. It is hidden in everything that comes
back, and a ModelError leaves without the frames and causes that held it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import aiohttp
import httpx
from httpx_aiohttp import HttpxAiohttpClient

from pgharness.errors import InvalidOutput, ModelError, RequestRejected, ServerFailed, TimedOut, Unavailable
from pgharness.gateway.providers import Call, WireFormat, wire_format
from pgharness.gateway.replies import Reply
from pgharness.types import Completion, ModelSpec, Request

# A server that cannot be reached is an outage, known long before the model's own timeout.
CONNECT_SECONDS = 15.0
# Shorter than the 5 s after which uvicorn, and so most local servers, close an idle connection: a request must not
# meet the closing of the connection that it is sent on.
KEEPALIVE_SECONDS = 4.0
# Shorter values ("EMPTY", "none", "ollama") are placeholders for servers without keys; hiding such a word would
# falsify every note in which it occurs.
SHORTEST_SECRET = 8
# Far beyond any answer; a server that never stops must not take the worker's memory.
LARGEST_REPLY = 32 * 1024 * 1024


class Transport:
    """The HTTP client of one process: one connection pool for all models, as many connections as calls.

    httpx's own pool costs CPU in proportion to its connections for every call, so the requests travel over aiohttp.
    Proxies are taken from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY. `transport` replaces the network in tests.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._client = HttpxAiohttpClient(
            transport=transport,
            # 0 is aiohttp's word for no limit; the worker's concurrency is the limit. None would mean 100.
            limits=httpx.Limits(max_connections=0, keepalive_expiry=KEEPALIVE_SECONDS),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            follow_redirects=False,  # a redirect would carry the key to wherever it points
            headers={"user-agent": "pgharness"},
        )

    async def send(self, spec: ModelSpec, request: Request) -> Completion:
        """Ask a model once and return its answer, within the model's timeout; raise ModelError."""
        wire = wire_format(spec)
        call = wire.encode(spec, request)
        key = _Key.of(spec, wire)
        try:
            async with asyncio.timeout(spec.timeout_seconds):
                reply = await self._post(spec, wire, call, key)
            return key.hidden_in_completion(wire.decode(spec, request, reply))
        except TimeoutError:
            failure: ModelError = TimedOut(f"{spec.name}: no answer within {spec.timeout_seconds:g} s")
        except ModelError as error:
            failure = key.hidden_in_error(error)
        raise failure  # outside the handlers, so that it carries no context

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def _post(self, spec: ModelSpec, wire: WireFormat, call: Call, key: _Key) -> Reply:
        try:
            content = json.dumps(call.body, allow_nan=False).encode()
            headers = {**call.headers, "content-type": "application/json"}
            async with self._client.stream(
                "POST", _parsed(call.url), content=content, headers=key.added_to(headers, wire)
            ) as response:
                return await _read(response, key)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as exc:
            raise RequestRejected(f"{spec.name}: its base_url cannot be used: {exc}") from exc
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout) as exc:
            raise TimedOut(f"{spec.name}: no answer from {_host(call)} in time: {exc}") from exc
        except httpx.TransportError as exc:  # aiohttp's transport calls most of these ConnectTimeout: no use to look
            if isinstance(exc.__cause__, aiohttp.ClientConnectorCertificateError):
                hint = "Set SSL_CERT_FILE to the authority that signed it, in the environment of the workers"
                raise RequestRejected(f"{spec.name}: certificate of {_host(call)}: {exc}", hint=hint) from exc
            raise Unavailable(f"{spec.name}: no connection to {_host(call)}: {exc}") from exc
        except httpx.DecodingError as exc:
            raise InvalidOutput(f"{spec.name}: the reply cannot be decompressed: {exc}") from exc
        except aiohttp.ClientError as exc:
            raise ServerFailed(f"{spec.name}: {_host(call)} does not speak HTTP: {exc}") from exc


async def _read(response: httpx.Response, key: _Key) -> Reply:
    """Return a response with what of its body arrived."""
    body = bytearray()
    is_whole = True
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > LARGEST_REPLY:
                is_whole = False
                break
    except httpx.TransportError:
        is_whole = False
    headers = {
        name.decode("latin-1").lower(): key.hidden_in(value.decode("latin-1")) for name, value in response.headers.raw
    }
    return Reply(response.status_code, headers, key.hidden_in(bytes(body)), is_whole)


@lru_cache(maxsize=256)
def _parsed(url: str) -> httpx.URL:
    return httpx.URL(url)  # parsing takes a tenth of a call's CPU, and a run has few URLs


def _host(call: Call) -> str:
    return _parsed(call.url).netloc.decode()


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # neither Postgres nor UTF-8 has these


class _Key:
    """An API key, or none, that shows itself only in the header that carries it."""

    __slots__ = ("_forms", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        forms = {value, json.dumps(value)[1:-1], value.replace("/", "\\/"), quote(value, safe="")}
        self._forms = sorted(forms, key=len, reverse=True) if len(value) >= SHORTEST_SECRET else []

    def __repr__(self) -> str:
        return "_Key(…)"

    @classmethod
    def of(cls, spec: ModelSpec, wire: WireFormat) -> _Key:
        """Return the key of a model from the environment; raise RequestRejected when it is missing or malformed."""
        name = spec.api_key_env or wire.key_env
        if name is None:
            return cls("")
        if name.upper().startswith("PG"):
            # Whoever may define a model must not be able to send the database's own password to a host of their own.
            raise RequestRejected(f"model {spec.name!r}: {name} is a variable of Postgres, not an API key")
        key = cls(os.environ.get(name, "").strip())
        if not key._value:
            raise RequestRejected(
                f"model {spec.name!r} needs an API key in {name}, which is not set",
                hint=f"Set {name} in the environment of the workers and restart them",
            )
        if not all("!" <= character <= "~" for character in key._value):
            raise RequestRejected(f"model {spec.name!r}: the value of {name} has characters that no API key has")
        return key

    def added_to(self, headers: dict[str, str], wire: WireFormat) -> dict[str, str]:
        """Return headers with the one that carries this key."""
        return {**headers, **wire.authorize(self._value)} if self._value else headers

    def hidden_in(self, value: Any) -> Any:
        """Return a copy of text or JSON without this key and without what Postgres cannot store."""
        if isinstance(value, str):
            for form in self._forms:
                value = value.replace(form, "[redacted]")
            return _UNSTORABLE.sub("\ufffd", value)
        if isinstance(value, bytes):
            for form in self._forms:
                value = value.replace(form.encode(), b"[redacted]")
            return value
        if isinstance(value, list):
            return [self.hidden_in(item) for item in value]
        if isinstance(value, dict):
            return {self.hidden_in(name): self.hidden_in(item) for name, item in value.items()}
        return value

    def hidden_in_completion(self, completion: Completion) -> Completion:
        """Return a completion that is safe to store and to log."""
        return replace(
            completion,
            text=self.hidden_in(completion.text),
            data=self.hidden_in(completion.data),
            finish_reason=self.hidden_in(completion.finish_reason),
            request_id=self.hidden_in(completion.request_id),
            model=self.hidden_in(completion.model),
        )

    def hidden_in_error(self, error: ModelError) -> ModelError:
        """Return the same error, safe to store and to log, without the frames and causes that saw the key."""
        error.args = tuple(self.hidden_in(argument) for argument in error.args)
        for name in ("hint", "detail", "text", "request_id", "finish_reason"):
            setattr(error, name, self.hidden_in(getattr(error, name)))
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
