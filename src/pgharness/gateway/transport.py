"""One HTTP call to a model: sent once, bounded in time, and with its key seen by nobody but the vendor.

Nothing is retried here. A retry is durable work with an attempt to spend, so it belongs to the queue; this module only
says truthfully what happened: a Completion, or the ModelError that fits.

The key is read from the environment when a call is made and goes into a header. It is hidden in everything that comes
back, and a ModelError leaves without the frames and causes that held it.

A worker makes thousands of calls a second, so a call builds nothing that it shares with the model's other calls.
"""

from __future__ import annotations

import json
import math
import os
import re
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import aiohttp
import certifi
import orjson
from aiohttp.http_exceptions import ContentEncodingError
from multidict import CIMultiDict
from yarl import URL

from pgharness.errors import (
    InvalidOutput,
    ModelError,
    RateLimited,
    RequestRejected,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from pgharness.gateway.providers import Call, WireFormat, wire_format
from pgharness.gateway.replies import Reply
from pgharness.types import Completer, Completion, ModelSpec, Request

# A server that cannot be reached is an outage, known long before the model's own timeout.
CONNECT_SECONDS = 15.0
# Shorter than the 5 s after which uvicorn, and so most local servers, close an idle connection: a request must not
# meet the closing of the connection that it is sent on.
KEEPALIVE_SECONDS = 4.0
# Shorter values ("EMPTY", "none", "ollama") are placeholders for servers without keys; hiding such a word would
# falsify every note in which it occurs.
SHORTEST_SECRET = 8
# A key that was refused for too many requests, without a word of when to come back; one that was refused altogether.
_KEY_REST_SECONDS = 1.0
_BAD_KEY_REST_SECONDS = 300.0
# Far beyond any answer; a server that never stops must not take the worker's memory.
LARGEST_REPLY = 32 * 1024 * 1024

_HEADERS = {"accept": "*/*", "accept-encoding": "gzip, deflate", "user-agent": "pgharness"}


class Transport:
    """The network of one process: one connection pool for all models, as many connections as calls.

    Proxies are taken from HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY. The certificates of authorities are those of
    SSL_CERT_FILE and SSL_CERT_DIR, or else those of the system and of certifi.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tls = _tls()
        self._proxies = urllib.request.getproxies()
        self._session: aiohttp.ClientSession | None = None

    def completer(self, spec: ModelSpec) -> Completer:
        """Return what asks a model; to be kept, for it holds what the model's calls have in common."""
        return _Endpoint(spec, self, self._clock).ask

    async def send(self, spec: ModelSpec, request: Request) -> Completion:
        """Ask a model once and return its answer, within the model's timeout; raise ModelError."""
        return await self.completer(spec)(request)

    def account(self, spec: ModelSpec) -> Account:
        """Return what else a model's vendor does for the holder of its key, beside answering."""
        return Account(spec, self)

    async def aclose(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    def way_to(self, address: str, name: str) -> Way:
        """Return how a URL of a model of this name is reached. Raises RequestRejected for one that cannot be."""
        try:
            url = URL(address)
            host = url.host or ""
            host.encode("idna")  # as looking it up will
        except ValueError as exc:
            raise RequestRejected(f"{name}: its base_url cannot be used: {exc}") from None
        proxied = self._proxies.get(url.scheme) or self._proxies.get("all")
        if not proxied or any(map(urllib.request.proxy_bypass, (host, url.host_port_subcomponent or ""))):
            return Way(url, {}, {})
        hint = "Set HTTP_PROXY and HTTPS_PROXY to an HTTP proxy, or NO_PROXY to the hosts that need none"
        try:
            proxy = URL(proxied if "://" in proxied else f"http://{proxied}")
            if proxy.scheme not in ("http", "https"):
                raise RequestRejected(f"{host}: a {proxy.scheme} proxy cannot be used", hint=hint)
            (proxy.host or ".").encode("idna")
            user, password = proxy.user, proxy.password or ""
            login = {"proxy-authorization": aiohttp.encode_basic_auth(user, password)} if user else {}
            options: dict[str, Any] = {"proxy": proxy.with_user(None)}  # errors show it
        except ValueError:
            raise RequestRejected(f"{host}: the address of its proxy cannot be used", hint=hint) from None
        if url.scheme == "http":
            return Way(url, login, options)
        return Way(url, {}, options | {"proxy_headers": login})  # the server itself must not read it

    def request(
        self, method: str, way: Way, *, headers: Mapping[str, str], data: Any, timeout: aiohttp.ClientTimeout
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Open the response to a request. A POST is sent once, whatever becomes of it."""
        if self._session is None:
            # 0 is no limit: the worker's concurrency is the limit. A cookie would tie a model's calls to one another.
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=self._tls)
            self._session = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self._session.request(
            method, way.url, headers=headers, data=data, timeout=timeout, allow_redirects=False, **way.options
        )


class Way(NamedTuple):
    """A URL and what it takes to reach it through a proxy, if there is one: headers, and options of aiohttp."""

    url: URL
    headers: dict[str, str]
    options: dict[str, Any]

    def __repr__(self) -> str:  # a proxy's password is in it
        return f"Way({self.url})"


def _tls() -> ssl.SSLContext:
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file or folder:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


class _Endpoint:
    """A model behind an API, with what its calls have in common."""

    def __init__(self, spec: ModelSpec, transport: Transport, clock: Callable[[], float]) -> None:
        self._spec = spec
        self._transport = transport
        self._timeout = aiohttp.ClientTimeout(
            total=spec.timeout_seconds, sock_connect=CONNECT_SECONDS, ceil_threshold=math.inf
        )
        self._way: Way | None = None
        self._headers: dict[_Key, CIMultiDict[str]] = {}  # of the present keys
        self._keys = _KeyRing(key_names(spec, wire_format(spec)), clock)

    async def ask(self, request: Request) -> Completion:
        """Ask once and return the answer, within the model's timeout; raise ModelError."""
        spec = self._spec
        wire = wire_format(spec)
        call = wire.encode(spec, request)
        for others in reversed(range(max(len(self._keys), 1))):
            name = self._keys.next()
            try:
                return await self._ask_with(_Key.of(spec, wire, name), wire, call, request)
            except ModelError as error:
                failure = error
            if name is None or len(self._keys) == 1:
                break
            if isinstance(failure, RateLimited):
                self._keys.rest(name, failure.retry_after or _KEY_REST_SECONDS)
                break
            is_refused = failure.http_status in (401, 403) or (failure.http_status is None and not os.environ.get(name))
            if not is_refused or not others:
                break
            self._keys.rest(name, _BAD_KEY_REST_SECONDS)  # nothing was asked yet: the next key may
        raise failure.with_traceback(None)

    async def _ask_with(self, key: _Key, wire: WireFormat, call: Call, request: Request) -> Completion:
        spec = self._spec
        try:
            return key.hidden_in_completion(wire.decode(spec, request, await self._post(wire, call, key)))
        except TimeoutError:
            failure: ModelError = TimedOut(f"{spec.name}: no answer within {spec.timeout_seconds:g} s")
        except ModelError as error:
            failure = key.hidden_in_error(error)
        raise failure  # outside the handlers, so that it carries no context

    async def _post(self, wire: WireFormat, call: Call, key: _Key) -> Reply:
        if self._way is None:
            self._way = self._transport.way_to(call.url, self._spec.name)
        if key not in self._headers:
            if len(self._headers) >= max(len(self._keys), 1):
                self._headers.clear()  # the environment has others now
            fields = {**_HEADERS, **self._way.headers, **call.headers, **key.header(wire)}
            self._headers[key] = CIMultiDict({**fields, "content-type": "application/json"})
        body = aiohttp.BytesPayload(_dumped(call.body))
        try:
            async with self._transport.request(
                "POST", self._way, headers=self._headers[key], data=body, timeout=self._timeout
            ) as response:
                return await _read(response, key)
        except aiohttp.ClientError as exc:
            raise _trouble(self._spec.name, self._way.url, exc) from exc


class Account:
    """What a model's vendor does for the holder of a key at the address of the model: files and batches.

    Every request carries the key, so it goes to no URL that a server named. A POST is sent once; others, which may be
    repeated, are sent again when their connection breaks. Raises ModelError as calls do.
    """

    def __init__(self, spec: ModelSpec, transport: Transport) -> None:
        self.spec = spec
        self.wire = wire_format(spec)
        self._transport = transport

    async def send(
        self,
        method: str,
        url: str,
        *,
        seconds: float,
        headers: Mapping[str, str] = {},
        body: bytes | Upload = b"",
    ) -> Reply:
        """Send a request and return the reply, whatever its status, within so many seconds."""
        key = _Key.of(self.spec, self.wire)
        failure: ModelError
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT_SECONDS, ceil_threshold=math.inf)
        try:
            async with self._opened(method, url, key, headers, body, timeout) as response:
                return await _read(response, key)
        except TimeoutError:
            failure = TimedOut(f"{self.spec.name}: no answer to {method} {url} within {seconds:g} s")
        except ModelError as error:
            failure = key.hidden_in_error(error)
        raise failure  # outside the handlers, so that it carries no context

    @asynccontextmanager
    async def lines(
        self, url: str, *, seconds: float, headers: Mapping[str, str] = {}
    ) -> AsyncIterator[AsyncIterator[bytes] | Reply]:
        """Open a long text: its lines as they come, each within so many seconds of the last, or the reply of a refusal.

        The lines raise Unavailable when the connection breaks.
        """
        key = _Key.of(self.spec, self.wire)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=seconds)
        try:
            async with self._opened("GET", url, key, headers, b"", timeout) as response:
                if response.status == 200:
                    yield self._split(response, key)
                else:
                    yield await _read(response, key)
                return
        except ModelError as error:
            failure = key.hidden_in_error(error)
        raise failure  # outside the handler, so that it carries no context

    def read(self, request: Request, reply: Reply) -> Completion:
        """Return the completion that a reply to a request holds, or raise the ModelError that it means."""
        key = _Key.of(self.spec, self.wire)
        try:
            return key.hidden_in_completion(self.wire.decode(self.spec, request, reply))
        except ModelError as error:
            failure = key.hidden_in_error(error)
        raise failure

    @asynccontextmanager
    async def _opened(
        self,
        method: str,
        url: str,
        key: _Key,
        headers: Mapping[str, str],
        body: bytes | Upload,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        way = self._transport.way_to(url, self.spec.name)
        fields = {**_HEADERS, **way.headers, **headers, **key.header(self.wire)}
        if isinstance(body, Upload):
            fields["content-length"] = str(body.size)  # or it would be sent in chunks
        try:
            request = self._transport.request(method, way, headers=fields, data=body or None, timeout=timeout)
            async with request as response:
                yield response
        except aiohttp.ClientError as exc:
            raise _trouble(self.spec.name, way.url, exc) from exc

    async def _split(self, response: aiohttp.ClientResponse, key: _Key) -> AsyncIterator[bytes]:
        rest = bytearray()
        name = self.spec.name
        try:
            async for chunk in response.content.iter_any():
                *lines, last = (rest + chunk).split(b"\n") if b"\n" in chunk else [rest + chunk]
                rest = last
                if len(rest) > LARGEST_REPLY:
                    raise InvalidOutput(f"{name}: a line of the results never ends")
                for line in lines:
                    yield key.hidden_in(bytes(line))
        except aiohttp.ClientError as exc:
            raise Unavailable(f"{name}: the connection broke in the middle of the results: {exc}") from None
        if rest:
            yield key.hidden_in(bytes(rest))


class Upload:
    """A body of a known size that is read from a file while it is sent, between a head and a tail."""

    def __init__(self, file: BinaryIO, *, head: bytes = b"", tail: bytes = b"") -> None:
        self._file = file
        self._head = head
        self._tail = tail
        self.size = len(head) + file.seek(0, os.SEEK_END) + len(tail)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._file.seek(0)
        yield self._head
        while chunk := self._file.read(_CHUNK):
            yield chunk
        yield self._tail


_CHUNK = 256 * 1024


def _trouble(name: str, url: URL, exc: aiohttp.ClientError) -> ModelError:
    """Return what it means for a model's call that the network failed so."""
    match exc:
        case aiohttp.InvalidURL():
            return RequestRejected(f"{name}: its base_url cannot be used: {exc}")
        case aiohttp.ClientConnectorCertificateError():
            hint = "Set SSL_CERT_FILE to the authority that signed it, in the environment of the workers"
            return RequestRejected(f"{name}: certificate of {url.host_port_subcomponent}: {exc}", hint=hint)
        case aiohttp.ClientConnectionError() | aiohttp.ClientHttpProxyError():
            return Unavailable(f"{name}: no connection to {url.host_port_subcomponent}: {exc}")
        case aiohttp.ClientPayloadError():
            return InvalidOutput(f"{name}: the reply cannot be decompressed: {exc}")
        case _:
            return ServerFailed(f"{name}: {url.host_port_subcomponent} does not speak HTTP: {exc}")


def _dumped(body: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:  # half a character, or an integer longer than its 64 bits
        return json.dumps(body, allow_nan=False).encode()


async def _read(response: aiohttp.ClientResponse, key: _Key) -> Reply:
    """Return a response with what of its body arrived."""
    headers: Mapping[str, str] = response.headers  # which find a name in any case
    if key.is_in("\n".join(headers.values())):
        headers = {name.lower(): key.hidden_in(value) for name, value in headers.items()}
    body = bytearray()
    is_whole = True
    try:
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > LARGEST_REPLY:
                is_whole = False
                break
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as exc:
        if response.ok and isinstance(exc.__cause__, ContentEncodingError):
            raise
        is_whole = False
    return Reply(response.status, headers, key.hidden_in(bytes(body)), is_whole)


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # neither Postgres nor UTF-8 has these


class _Key:
    """An API key, or none, that shows itself only in the header that carries it."""

    __slots__ = ("_forms", "_is_well_formed", "_value")

    def __init__(self, value: str) -> None:
        self._value = value
        self._is_well_formed = all("!" <= character <= "~" for character in value)
        forms = {value, json.dumps(value)[1:-1], value.replace("/", "\\/"), quote(value, safe="")}
        forms = forms if len(value) >= SHORTEST_SECRET else set()
        self._forms = [(form, form.encode()) for form in sorted(forms, key=len, reverse=True)]

    def __repr__(self) -> str:
        return "_Key(…)"

    @classmethod
    def of(cls, spec: ModelSpec, wire: WireFormat, name: str | None = None) -> _Key:
        """Return a key of a model, by default its first, from the environment.

        Raises RequestRejected when it is missing or malformed.
        """
        name = name or next(iter(key_names(spec, wire)), None)
        if name is None:
            return _key("")
        if name.upper().startswith("PG"):
            # Whoever may define a model must not be able to send the database's own password to a host of their own.
            raise RequestRejected(f"model {spec.name!r}: {name} is a variable of Postgres, not an API key")
        key = _key(os.environ.get(name, "").strip())
        if not key._value:
            raise RequestRejected(
                f"model {spec.name!r} needs an API key in {name}, which is not set",
                hint=f"Set {name} in the environment of the workers and restart them",
            )
        if not key._is_well_formed:
            raise RequestRejected(f"model {spec.name!r}: the value of {name} has characters that no API key has")
        return key

    def header(self, wire: WireFormat) -> dict[str, str]:
        """Return the header that carries this key, if it is one."""
        return wire.authorize(self._value) if self._value else {}

    def is_in(self, text: str) -> bool:
        """Tell whether a text holds this key."""
        return any(form in text for form, _ in self._forms)

    def hidden_in(self, value: Any) -> Any:
        """Return text or JSON without this key and without what Postgres cannot store; itself when it has neither."""
        if isinstance(value, str):
            for form, _ in self._forms:
                value = value.replace(form, "[redacted]")
            return value if value.isascii() and "\0" not in value else _UNSTORABLE.sub("\ufffd", value)
        if isinstance(value, bytes):
            for _, encoded in self._forms:
                value = value.replace(encoded, b"[redacted]")
            return value
        if isinstance(value, list):
            return [self.hidden_in(item) for item in value]
        if isinstance(value, dict):
            return {self.hidden_in(name): self.hidden_in(item) for name, item in value.items()}
        return value

    def hidden_in_completion(self, completion: Completion) -> Completion:
        """Return a completion that is safe to store and to log."""
        changed = {}
        for name in ("text", "finish_reason", "request_id", "model"):
            value = getattr(completion, name)
            hidden = self.hidden_in(value)
            if hidden is not value:
                changed[name] = hidden
        if changed or "\\" in completion.text:  # what is parsed from a text without escapes is made of its pieces
            changed["data"] = self.hidden_in(completion.data)
        return replace(completion, **changed) if changed else completion

    def hidden_in_error(self, error: ModelError) -> ModelError:
        """Return the same error, safe to store and to log, without the frames and causes that saw the key."""
        error.args = tuple(self.hidden_in(argument) for argument in error.args)
        for name in ("hint", "detail", "text", "request_id", "finish_reason"):
            setattr(error, name, self.hidden_in(getattr(error, name)))
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def key_names(spec: ModelSpec, wire: WireFormat) -> list[str]:
    """Return the environment variables that hold a model's keys; none for a model without."""
    return [name.strip() for name in (spec.api_key_env or wire.key_env or "").split(",") if name.strip()]


class _KeyRing:
    """The keys of a model, used in turn; one that was refused rests while others go on."""

    def __init__(self, names: Sequence[str], clock: Callable[[], float]) -> None:
        self._names = list(names)
        self._clock = clock
        self._resting = dict.fromkeys(names, 0.0)  # until when

    def __len__(self) -> int:
        return len(self._names)

    def next(self) -> str | None:
        """Return the variable of the next key: of those that rest, the one that has rested most."""
        if not self._names:
            return None
        now = self._clock()
        found = min(self._names, key=lambda name: max(self._resting[name] - now, 0.0))
        self._names.remove(found)
        self._names.append(found)
        return found

    def rest(self, name: str, seconds: float) -> None:
        self._resting[name] = self._clock() + seconds


@lru_cache(maxsize=64)
def _key(value: str) -> _Key:
    return _Key(value)
