"""Batches of requests that a vendor answers at its leisure for less money: the wire formats of OpenAI and Anthropic.

A request in a batch is the very body that a live call sends, and its result is read as the reply to that call. What a
vendor has begun can be found again by somebody who did not hear its answer: OpenAI keeps a label with the batch;
Anthropic keeps none, so there a batch is told by its age and size, and for certain only by its results.

Nothing is retried here, and nothing waits.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol
from urllib.parse import quote

import orjson

from pgharness.errors import RequestRejected, ServerFailed
from pgharness.gateway.replies import Reply, at, count, objects, string
from pgharness.gateway.transport import Account, Upload
from pgharness.types import Message, Request

UPLOAD_SECONDS = 1_800.0
SECONDS = 60.0
_LABEL = "pgharness_batch"
_SKEW = timedelta(minutes=2)  # by which a vendor's clock may be behind
_PAGES = 50
_ANY = Request(messages=(Message("user", "?"),))


@dataclass(frozen=True, slots=True)
class Remote:
    """A batch as its vendor tells of it; `files` are where its results are.

    A batch that `failed` was not begun, and nothing of it was billed; `is_retryable` says whether it may be later.
    """

    id: str
    state: Literal["running", "ended", "failed"]
    files: tuple[str, ...] = ()
    error: str | None = None
    is_retryable: bool = False


class Result(NamedTuple):
    """What became of a request: the reply that a live call would have got, or None when it was not asked at all."""

    custom_id: str
    reply: Reply | None


class BatchEndpoint(Protocol):
    """The batches of one vendor, for the models of one account. All methods raise ModelError."""

    most_bytes: int
    is_labelled: bool  # whether a batch that is found is certain to be the one

    def line(self, custom_id: str, body: Mapping[str, Any]) -> bytes:
        """Return a request as it stands in the file of a batch; lines are joined by `separator`."""

    @property
    def separator(self) -> bytes: ...

    async def upload(self, name: str, file: BinaryIO) -> str | None:
        """Give the vendor a file of requests; returns its id, or None where the file goes with `create`."""

    async def find_upload(self, name: str) -> str | None:
        """Return the id of a file that was uploaded before under this name."""

    async def create(self, uuid: str, input_file: str | None, file: BinaryIO, *, number: int) -> Remote:
        """Begin a batch; `number` counts those of this uuid that the vendor gave up."""

    async def find(self, uuid: str, *, since: datetime, requests: int, known: Collection[str]) -> Remote | None:
        """Return the batch that an earlier `create` may have begun, but none of those that are known to be others."""

    async def poll(self, id: str) -> Remote:
        """Return how a batch is."""

    async def cancel(self, id: str) -> Remote:
        """Ask the vendor to do no more of a batch; it goes on until it says that it ended."""

    def results(self, id: str, files: Collection[str]) -> AsyncIterator[Result]:
        """Yield what became of the requests of a batch that has ended, in any order."""

    async def forget(self, id: str, files: Collection[str]) -> None:
        """Delete what the vendor keeps of a batch: prompts hold other people's words."""


def batch_endpoint(account: Account) -> BatchEndpoint:
    """Return the batches of a model's vendor. Raises RequestRejected for a provider without any."""
    match account.spec.provider:
        case "openai" | "openai_compatible" | "openai_responses":
            return OpenAIBatches(account)
        case "anthropic":
            return AnthropicBatches(account)
        case provider:
            raise RequestRejected(f"model {account.spec.name!r}: provider {provider!r} has no batches")


class OpenAIBatches(BatchEndpoint):
    """A file of lines, a batch of that file, and two files of results."""

    most_bytes = 200_000_000
    is_labelled = True
    separator = b"\n"

    def __init__(self, account: Account) -> None:
        self._account = account
        path = "/responses" if account.spec.provider == "openai_responses" else "/chat/completions"
        self._root = account.wire.encode(account.spec, _ANY).url.removesuffix(path)
        self._path = f"/v1{path}"  # as OpenAI calls it, wherever it is served

    def line(self, custom_id: str, body: Mapping[str, Any]) -> bytes:
        return orjson.dumps({"custom_id": custom_id, "method": "POST", "url": self._path, "body": body})

    async def upload(self, name: str, file: BinaryIO) -> str:
        boundary = f"pgharness-{name}"
        head = (
            f'--{boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/jsonl\r\n\r\n"
        )
        body = Upload(file, head=head.encode(), tail=f"\r\n--{boundary}--\r\n".encode())
        headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
        return _id(await _asked(self._account, "POST", f"{self._root}/files", UPLOAD_SECONDS, headers, body))

    async def find_upload(self, name: str) -> str | None:
        url = f"{self._root}/files?purpose=batch&limit=100&order=desc"
        try:
            payload = await _asked(self._account, "GET", url)
        except RequestRejected:  # not every server that takes files lists them
            return None
        return next(
            (string(file.get("id")) for file in objects(at(payload, "data")) if file.get("filename") == name), None
        )

    async def create(self, uuid: str, input_file: str | None, file: BinaryIO, *, number: int) -> Remote:
        body = {
            "input_file_id": input_file,
            "endpoint": self._path,
            "completion_window": "24h",
            "metadata": {_LABEL: uuid},
        }
        headers = {"content-type": "application/json", "idempotency-key": f"{uuid}-{number}"}
        return self._read(
            await _asked(self._account, "POST", f"{self._root}/batches", SECONDS, headers, orjson.dumps(body))
        )

    async def find(self, uuid: str, *, since: datetime, requests: int, known: Collection[str]) -> Remote | None:
        after = ""
        for _ in range(_PAGES):
            payload = await _asked(self._account, "GET", f"{self._root}/batches?limit=100{after}")
            page = objects(at(payload, "data"))
            for batch in page:
                if at(batch, "metadata", _LABEL) == uuid and batch.get("id") not in known:
                    return self._read(batch)
            is_older = all(count(batch, "created_at") < (since - _SKEW).timestamp() for batch in page)
            if is_older or at(payload, "has_more") is not True:
                break
            after = f"&after={quote(_id(page[-1]), safe='')}"
        return None

    async def poll(self, id: str) -> Remote:
        return self._read(await _asked(self._account, "GET", self._url(id)))

    async def cancel(self, id: str) -> Remote:
        try:
            return self._read(await _asked(self._account, "POST", f"{self._url(id)}/cancel"))
        except RequestRejected:  # it has ended meanwhile
            return await self.poll(id)

    async def results(self, id: str, files: Collection[str]) -> AsyncIterator[Result]:
        for file in files:
            async for line in _lines(self._account, f"{self._root}/files/{quote(file, safe='')}/content"):
                error, response = at(line, "error"), at(line, "response")
                custom_id = string(at(line, "custom_id")) or ""
                if at(error, "code") in ("batch_expired", "batch_cancelled"):
                    yield Result(custom_id, None)
                elif isinstance(response, dict):
                    request_id = string(response.get("request_id"))
                    headers = {"x-request-id": request_id} if request_id else {}
                    status = count(response, "status_code") or 500
                    yield Result(custom_id, Reply(status, headers, orjson.dumps(response.get("body"))))
                else:
                    yield Result(custom_id, Reply(500, {}, orjson.dumps({"error": error})))

    async def forget(self, id: str, files: Collection[str]) -> None:
        for file in files:
            with suppress(RequestRejected):  # it is gone
                await _asked(self._account, "DELETE", f"{self._root}/files/{quote(file, safe='')}")

    def _url(self, id: str) -> str:
        return f"{self._root}/batches/{quote(id, safe='')}"

    def _read(self, payload: Any) -> Remote:
        errors = objects(at(payload, "errors", "data"))
        files = (string(at(payload, "output_file_id")), string(at(payload, "error_file_id")))
        known = tuple(file for file in files if file is not None)
        match at(payload, "status"):
            case "completed" | "expired" | "cancelled":
                return Remote(_id(payload), "ended", known)
            case "failed":
                said = "; ".join(string(error.get("message")) or str(error.get("code")) for error in errors[:3])
                busy = any(
                    "limit" in str(error.get("code")) for error in errors
                )  # token_limit_exceeded: others' batches
                return Remote(_id(payload), "failed", known, f"the vendor refused the batch: {said}", busy)
            case _:
                return Remote(_id(payload), "running", known)


class AnthropicBatches(BatchEndpoint):
    """One request with all of them, and a text of results."""

    most_bytes = 250_000_000
    is_labelled = False
    separator = b","

    def __init__(self, account: Account) -> None:
        self._account = account
        url, self._headers, _ = account.wire.encode(account.spec, _ANY)
        self._root = f"{url}/batches"

    def line(self, custom_id: str, body: Mapping[str, Any]) -> bytes:
        return orjson.dumps({"custom_id": custom_id, "params": body})

    async def upload(self, name: str, file: BinaryIO) -> None:
        return None

    async def find_upload(self, name: str) -> None:
        return None

    async def create(self, uuid: str, input_file: str | None, file: BinaryIO, *, number: int) -> Remote:
        headers = {**self._headers, "content-type": "application/json", "idempotency-key": f"{uuid}-{number}"}
        body = Upload(file, head=b'{"requests":[', tail=b"]}")
        return self._read(await _asked(self._account, "POST", self._root, UPLOAD_SECONDS, headers, body))

    async def find(self, uuid: str, *, since: datetime, requests: int, known: Collection[str]) -> Remote | None:
        after = ""
        found: Remote | None = None
        for _ in range(_PAGES):
            payload = await _asked(self._account, "GET", f"{self._root}?limit=100{after}", SECONDS, self._headers)
            page = objects(at(payload, "data"))
            young = [batch for batch in page if (_moment(batch.get("created_at")) or since) >= since - _SKEW]
            for batch in young:  # newest first: the oldest of those that fit
                counts = at(batch, "request_counts")
                size = sum(count(counts, name) for name in counts) if isinstance(counts, dict) else 0
                if size == requests and batch.get("id") not in known:
                    found = self._read(batch)
            if not young or at(payload, "has_more") is not True:
                break
            after = f"&after_id={quote(_id(page[-1]), safe='')}"
        return found

    async def poll(self, id: str) -> Remote:
        return self._read(await _asked(self._account, "GET", self._url(id), SECONDS, self._headers))

    async def cancel(self, id: str) -> Remote:
        try:
            return self._read(await _asked(self._account, "POST", f"{self._url(id)}/cancel", SECONDS, self._headers))
        except RequestRejected:  # it has ended meanwhile
            return await self.poll(id)

    async def results(self, id: str, files: Collection[str]) -> AsyncIterator[Result]:
        async for line in _lines(self._account, f"{self._url(id)}/results", self._headers):
            custom_id = string(at(line, "custom_id")) or ""
            match at(line, "result", "type"):
                case "succeeded":
                    yield Result(custom_id, Reply(200, {}, orjson.dumps(at(line, "result", "message"))))
                case "errored":
                    error = at(line, "result", "error")
                    kind = at(error, "error", "type") or at(error, "type")
                    yield Result(custom_id, Reply(_STATUSES.get(str(kind), 500), {}, orjson.dumps(error)))
                case _:
                    yield Result(custom_id, None)

    async def forget(self, id: str, files: Collection[str]) -> None:
        with suppress(RequestRejected):  # it is gone
            await _asked(self._account, "DELETE", self._url(id), SECONDS, self._headers)

    def _url(self, id: str) -> str:
        return f"{self._root}/{quote(id, safe='')}"

    def _read(self, payload: Any) -> Remote:
        return Remote(_id(payload), "ended" if at(payload, "processing_status") == "ended" else "running")


# The status with which a live call fails so.
_STATUSES: Mapping[str, int] = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


async def _asked(
    account: Account,
    method: str,
    url: str,
    seconds: float = SECONDS,
    headers: Mapping[str, str] = {},
    body: bytes | Upload = b"",
) -> Any:
    """Send a request and return the JSON of its reply; raise the ModelError that a refusal means."""
    reply = await account.send(method, url, seconds=seconds, headers=headers, body=body)
    if not 200 <= reply.status < 300:
        account.read(_ANY, reply)
    try:
        return orjson.loads(reply.body)
    except ValueError:
        message = f"{account.spec.name}: the reply to {method} {url} is not JSON"
        raise ServerFailed(message, http_status=reply.status) from None


async def _lines(account: Account, url: str, headers: Mapping[str, str] = {}) -> AsyncIterator[Any]:
    async with account.lines(url, seconds=SECONDS, headers=headers) as opened:
        if isinstance(opened, Reply):
            account.read(_ANY, opened)
            raise ServerFailed(f"{account.spec.name}: the results cannot be read: status {opened.status}")
        async for line in opened:
            with suppress(ValueError):  # a line that nobody can read answers nothing: its request is asked again
                yield orjson.loads(line)


def _id(payload: Any) -> str:
    id = string(at(payload, "id"))
    if id is None:
        raise ServerFailed("the vendor's answer has no id")
    return id


def _moment(text: Any) -> datetime | None:
    with suppress(ValueError, TypeError):
        return datetime.fromisoformat(text)
    return None
