"""The wire formats of batches, over HTTP to a scripted vendor: what each vendor is sent, and what its answers mean."""

from __future__ import annotations

import asyncio
import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import pytest

from pgharness.errors import ModelError, RateLimited, RequestRejected, ServerFailed, Unavailable
from pgharness.gateway.batching import BatchEndpoint, Remote, Result, batch_endpoint
from pgharness.gateway.transport import Account, Transport
from pgharness.types import Message, ModelSpec, Request
from scripted_vendor import DROPPED, Answer, ScriptedVendor, Sent

KEY = "sk-test-0123456789abcdef"
UUID = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
ASK = Request(messages=(Message("system", "You write notes."), Message("user", "Transcript")), seed=11)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)


class Script:
    """A vendor that answers in turn, the account of a model there, and its batches."""

    def __init__(self, vendor: ScriptedVendor, transport: Transport, provider: str, **columns: Any) -> None:
        self.vendor = vendor
        columns = {"base_url": vendor.url + ("" if provider == "anthropic" else "/v1")} | columns
        spec = ModelSpec(id=1, name="m", provider=provider, model="vendor-model", **columns)  # type: ignore[arg-type]
        self.account: Account = transport.account(spec)
        self.endpoint: BatchEndpoint = batch_endpoint(self.account)

    @property
    def requests(self) -> list[Sent]:
        return self.vendor.sent

    @property
    def asked(self) -> list[str]:
        return self.vendor.asked

    async def results(self, id: str, *files: str) -> list[Result]:
        return [result async for result in self.endpoint.results(id, files)]


Scripted = Callable[..., Awaitable[Script]]


@pytest.fixture
async def scripted() -> AsyncIterator[Scripted]:
    async with contextlib.AsyncExitStack() as opened:
        transport = await opened.enter_async_context(contextlib.aclosing(Transport()))

        async def start(provider: str, *answers: Any, path: str | None = None) -> Script:
            vendor = await opened.enter_async_context(ScriptedVendor(*answers))
            return Script(vendor, transport, provider, **({"base_url": vendor.url + path} if path else {}))

        yield start


def openai(**fields: Any) -> dict[str, Any]:
    return {"id": "batch_1", "status": "in_progress", "created_at": int(SINCE.timestamp())} | fields


def anthropic(**fields: Any) -> dict[str, Any]:
    counts = {"processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    told = {"id": "msgbatch_1", "processing_status": "in_progress", "request_counts": counts}
    return told | {"created_at": "2026-01-01T00:00:00Z"} | fields


def page(*batches: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"data": list(batches), "has_more": has_more}


def lines(*objects: Any) -> Answer:
    return Answer("\n".join(map(json.dumps, objects)).encode())


# -- requests


@pytest.mark.parametrize(
    ("provider", "url"), [("openai", "/v1/chat/completions"), ("openai_responses", "/v1/responses")]
)
async def test_a_line_is_the_live_request_with_a_name(scripted: Scripted, provider: str, url: str) -> None:
    script = await scripted(provider)
    body = script.account.wire.encode(script.account.spec, ASK).body
    line = json.loads(script.endpoint.line("a-1-1", body))
    assert line == {"custom_id": "a-1-1", "method": "POST", "url": url, "body": body}


async def test_an_anthropic_line_holds_the_params_of_the_live_request(scripted: Scripted) -> None:
    script = await scripted("anthropic")
    body = script.account.wire.encode(script.account.spec, ASK).body
    assert json.loads(script.endpoint.line("a-1-1", body)) == {"custom_id": "a-1-1", "params": body}


async def test_a_file_is_uploaded_under_its_name_with_its_length_and_the_key(scripted: Scripted) -> None:
    script = await scripted("openai", {"id": "file-1"})
    assert await script.endpoint.upload("pgharness-7.jsonl", BytesIO(b'{"a": 1}\n{"b": 2}')) == "file-1"
    (sent,) = script.requests
    assert script.asked == ["POST /v1/files"]
    assert sent.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert int(sent.headers["content-length"]) == len(sent.content)
    assert b'name="purpose"\r\n\r\nbatch\r\n' in sent.content
    assert b'filename="pgharness-7.jsonl"' in sent.content
    assert b'\r\n\r\n{"a": 1}\n{"b": 2}\r\n--' in sent.content


async def test_an_upload_is_found_by_its_name(scripted: Scripted) -> None:
    script = await scripted("openai", page({"id": "file-2", "filename": "other"}, {"id": "file-1", "filename": "mine"}))
    assert await script.endpoint.find_upload("mine") == "file-1"
    script.vendor.answers = [page(), Answer({}, 404)]
    assert await script.endpoint.find_upload("mine") is None
    assert await script.endpoint.find_upload("mine") is None


async def test_an_openai_batch_is_created_from_its_file_with_a_label(scripted: Scripted) -> None:
    script = await scripted("openai_responses", openai(status="validating"), path="/api/v1")
    created = await script.endpoint.create(UUID, "file-1", BytesIO(), number=2)
    assert created == Remote("batch_1", "running")
    assert script.asked == ["POST /api/v1/batches"]
    assert json.loads(script.requests[0].content) == {
        "input_file_id": "file-1",
        "endpoint": "/v1/responses",
        "completion_window": "24h",
        "metadata": {"pgharness_batch": UUID},
    }
    assert script.requests[0].headers["idempotency-key"] == f"{UUID}-2"


async def test_an_anthropic_batch_is_created_with_its_requests(scripted: Scripted) -> None:
    script = await scripted("anthropic", anthropic())
    file = BytesIO(b'{"custom_id":"a"},{"custom_id":"b"}')
    assert await script.endpoint.create(UUID, None, file, number=0) == Remote("msgbatch_1", "running")
    (sent,) = script.requests
    assert script.asked == ["POST /v1/messages/batches"]
    assert json.loads(sent.content) == {"requests": [{"custom_id": "a"}, {"custom_id": "b"}]}
    assert int(sent.headers["content-length"]) == len(sent.content)
    assert (sent.headers["x-api-key"], sent.headers["anthropic-version"]) == (KEY, "2023-06-01")


# -- finding


async def test_an_openai_batch_is_found_by_its_label_on_any_page(scripted: Scripted) -> None:
    mine = openai(id="batch_3", metadata={"pgharness_batch": UUID})
    script = await scripted("openai", page(openai(metadata=None), openai(id="batch_2"), has_more=True), page(mine))
    found = await script.endpoint.find(UUID, since=SINCE, requests=3, known=())
    assert found == Remote("batch_3", "running")
    assert script.asked[1] == "GET /v1/batches?limit=100&after=batch_2"


async def test_an_openai_batch_that_was_given_up_is_not_found(scripted: Scripted) -> None:
    script = await scripted("openai", page(openai(metadata={"pgharness_batch": UUID})))
    assert await script.endpoint.find(UUID, since=SINCE, requests=3, known=["batch_1"]) is None


async def test_the_search_ends_where_batches_are_older(scripted: Scripted) -> None:
    old = int(SINCE.timestamp()) - 3_600
    script = await scripted("openai", page(openai(created_at=old), has_more=True))
    assert await script.endpoint.find(UUID, since=SINCE, requests=3, known=()) is None
    script = await scripted("anthropic", page(anthropic(created_at="2025-12-31T23:00:00Z"), has_more=True))
    assert await script.endpoint.find(UUID, since=SINCE, requests=3, known=()) is None


async def test_an_anthropic_batch_is_the_oldest_of_its_size_that_nobody_knows(scripted: Scripted) -> None:
    other_size = anthropic(id="other", request_counts={"processing": 1, "succeeded": 1})
    script = await scripted("anthropic", page(anthropic(id="c"), other_size, anthropic(id="b"), anthropic(id="a")))
    found = await script.endpoint.find(UUID, since=SINCE, requests=3, known=["a"])
    assert found == Remote("b", "running")
    assert not script.endpoint.is_labelled


# -- polling


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((status, "running") for status in ("validating", "in_progress", "finalizing", "cancelling", "unheard of")),
        *((status, "ended") for status in ("completed", "expired", "cancelled")),
    ],
)
async def test_openai_states(scripted: Scripted, status: str, state: str) -> None:
    script = await scripted("openai", openai(status=status, output_file_id="file-2", error_file_id="file-3"))
    assert await script.endpoint.poll("batch_1") == Remote("batch_1", state, ("file-2", "file-3"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "is_retryable"), [("token_limit_exceeded", True), ("invalid_json_line", False)])
async def test_a_batch_that_failed_says_why_and_whether_it_may_be_later(
    scripted: Scripted, code: str, is_retryable: bool
) -> None:
    errors = {"data": [{"code": code, "message": "Enqueued too much"}]}
    script = await scripted("openai", openai(status="failed", errors=errors))
    remote = await script.endpoint.poll("batch_1")
    assert (remote.state, remote.is_retryable) == ("failed", is_retryable)
    assert remote.error == "the vendor refused the batch: Enqueued too much"


@pytest.mark.parametrize(
    ("status", "state"), [("in_progress", "running"), ("canceling", "running"), ("ended", "ended")]
)
async def test_anthropic_states(scripted: Scripted, status: str, state: str) -> None:
    script = await scripted("anthropic", anthropic(processing_status=status))
    assert (await script.endpoint.poll("msgbatch_1")).state == state


@pytest.mark.parametrize(("provider", "told"), [("openai", openai), ("anthropic", anthropic)])
async def test_cancelling_what_has_ended_tells_that_it_has(
    scripted: Scripted, provider: str, told: Callable[..., Any]
) -> None:
    ended = told(status="completed", processing_status="ended")
    script = await scripted(provider, Answer({"error": {"message": "too late"}}, 400), ended)
    assert (await script.endpoint.cancel("batch_1")).state == "ended"
    assert [asked.split()[0] for asked in script.asked] == ["POST", "GET"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer({}, 429, {"retry-after": "7"}), RateLimited),
        (Answer({}, 503), Unavailable),
        (Answer({"error": {"message": "no such batch"}}, 404), RequestRejected),
        (Answer(b"<html>"), ServerFailed),
        (Answer(["what?"], 200), ServerFailed),
        (DROPPED, Unavailable),
    ],
)
async def test_refusals_mean_what_they_mean_of_live_calls(
    scripted: Scripted, answer: Any, error: type[ModelError]
) -> None:
    for provider in ("openai", "anthropic"):
        with pytest.raises(error):
            await (await scripted(provider, answer, answer)).endpoint.poll("batch_1")


async def test_no_error_shows_the_key(scripted: Scripted) -> None:
    script = await scripted("openai", Answer({"error": {"message": f"Incorrect API key: {KEY}"}}, 401))
    with pytest.raises(RequestRejected) as caught:
        await script.endpoint.poll("batch_1")
    assert KEY not in str(caught.value)
    assert "[redacted]" in str(caught.value)


async def test_results_from_what_is_no_vendor_do_not_show_the_key() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 abc {KEY}\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        spec = ModelSpec(id=1, name="m", provider="openai", model="vendor-model", base_url=url)
        async with contextlib.aclosing(Transport()) as transport:
            with pytest.raises(ServerFailed) as caught:
                async for _ in batch_endpoint(transport.account(spec)).results("batch_1", ["file-2"]):
                    pass
    assert "[redacted]" in str(caught.value)
    assert caught.value.__cause__ is None and KEY not in "".join(traceback.format_exception(caught.value))


async def test_an_id_cannot_lead_elsewhere(scripted: Scripted) -> None:
    script = await scripted("openai", openai())
    await script.endpoint.poll("../files/../../evil?x=1")
    assert script.asked == ["GET /v1/batches/..%2Ffiles%2F..%2F..%2Fevil%3Fx=1"]


async def test_a_provider_without_batches_is_refused(scripted: Scripted) -> None:
    with pytest.raises(RequestRejected, match="'gemini' has no batches"):
        await scripted("gemini")


# -- results


async def test_openai_results_are_replies_of_live_calls(scripted: Scripted) -> None:
    answer = {"choices": [{"message": {"content": "A note"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}}
    response = {"status_code": 200, "request_id": "req-1", "body": answer}
    good = lines({"custom_id": "a", "response": response, "error": None}, "nonsense")
    broken = {"status_code": 429, "request_id": "req-2", "body": {"error": {"message": "slow down"}}}
    bad = lines(
        {"custom_id": "b", "response": broken, "error": None},
        {"custom_id": "c", "response": None, "error": {"code": "batch_expired", "message": "too late"}},
        {"custom_id": "d", "response": None, "error": {"code": "batch_cancelled", "message": "cancelled"}},
        {"custom_id": "e", "response": None, "error": {"code": "server_error", "message": "it broke"}},
    )
    script = await scripted("openai", good, bad)
    results = {result.custom_id: result.reply for result in await script.results("batch_1", "file-2", "file-3")}
    assert results.pop("") is not None  # of nobody
    assert (results["c"], results["d"]) == (None, None)
    assert results["a"] and results["b"] and results["e"]
    completion = script.account.read(ASK, results["a"])
    assert (completion.text, completion.usage.input_tokens, completion.request_id) == ("A note", 5, "req-1")
    with pytest.raises(RateLimited, match="slow down"):
        script.account.read(ASK, results["b"])
    with pytest.raises(ServerFailed, match="it broke"):
        script.account.read(ASK, results["e"])


async def test_anthropic_results_are_replies_of_live_calls(scripted: Scripted) -> None:
    message = {"id": "msg_1", "content": [{"type": "text", "text": "A note"}], "stop_reason": "end_turn"}
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    rejected = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    script = await scripted(
        "anthropic",
        lines(
            {"custom_id": "a", "result": {"type": "succeeded", "message": message}},
            {"custom_id": "b", "result": {"type": "errored", "error": overloaded}},
            {"custom_id": "c", "result": {"type": "errored", "error": rejected}},
            {"custom_id": "d", "result": {"type": "expired"}},
            {"custom_id": "e", "result": {"type": "canceled"}},
        ),
    )
    results = {result.custom_id: result.reply for result in await script.results("msgbatch_1")}
    assert script.asked == ["GET /v1/messages/batches/msgbatch_1/results"]
    assert (results["d"], results["e"]) == (None, None)
    assert results["a"] and results["b"] and results["c"]
    assert script.account.read(ASK, results["a"]).request_id == "msg_1"
    with pytest.raises(RateLimited, match="busy"):
        script.account.read(ASK, results["b"])
    with pytest.raises(RequestRejected, match="too long"):
        script.account.read(ASK, results["c"])


async def test_results_that_break_off_give_what_came_and_say_so(scripted: Scripted) -> None:
    text = b'{"custom_id": "a", "response": null}\n{"custom_id": "b"'
    script = await scripted("openai", Answer(text, breaks_off=True))
    seen: list[str] = []

    async def collect() -> None:
        async for result in script.endpoint.results("batch_1", ["file-2"]):
            seen.append(result.custom_id)

    with pytest.raises(Unavailable, match="in the middle of the results"):
        await collect()
    assert seen == ["a"]


async def test_results_that_are_gone_are_refused(scripted: Scripted) -> None:
    script = await scripted("openai", Answer({"error": {"message": "No such File"}}, 404))
    with pytest.raises(RequestRejected, match="No such File"):
        await script.results("batch_1", "file-2")


async def test_what_the_vendor_keeps_is_deleted(scripted: Scripted) -> None:
    script = await scripted("openai", {}, Answer({}, 404))
    await script.endpoint.forget("batch_1", ["file-1", "file-2"])
    assert script.asked == [f"DELETE /v1/files/file-{n}" for n in (1, 2)]
    script = await scripted("anthropic", {})
    await script.endpoint.forget("msgbatch_1", [])
    assert script.asked == ["DELETE /v1/messages/batches/msgbatch_1"]
