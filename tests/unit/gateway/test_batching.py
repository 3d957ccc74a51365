"""The wire formats of batches, over a scripted transport: what each vendor is sent, and what its answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import httpx
import pytest

from pgharness.errors import ModelError, RateLimited, RequestRejected, ServerFailed, Unavailable
from pgharness.gateway.batching import BatchEndpoint, Remote, Result, batch_endpoint
from pgharness.gateway.transport import Account, Transport
from pgharness.types import Message, ModelSpec, Request

KEY = "sk-test-0123456789abcdef"
UUID = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
SINCE = datetime(2026, 1, 1, tzinfo=UTC)
ASK = Request(messages=(Message("system", "You write notes."), Message("user", "Transcript")), seed=11)
Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, KEY)


class Script:
    """A vendor that answers in turn, and remembers what it was sent."""

    def __init__(self, provider: str, *answers: Any, **columns: Any) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        spec = ModelSpec(id=1, name="m", provider=provider, model="vendor-model", **columns)  # type: ignore[arg-type]
        self.account: Account = Transport(httpx.MockTransport(self._answer)).account(spec)
        self.endpoint: BatchEndpoint = batch_endpoint(self.account)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, httpx.Response):
            return answer
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, json=answer)

    @property
    def asked(self) -> list[str]:
        return [f"{request.method} {request.url}" for request in self.requests]

    def results(self, id: str, *files: str) -> list[Result]:
        async def collected() -> list[Result]:
            return [result async for result in self.endpoint.results(id, files)]

        return asyncio.run(collected())


def openai(**fields: Any) -> dict[str, Any]:
    return {"id": "batch_1", "status": "in_progress", "created_at": int(SINCE.timestamp())} | fields


def anthropic(**fields: Any) -> dict[str, Any]:
    counts = {"processing": 3, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
    told = {"id": "msgbatch_1", "processing_status": "in_progress", "request_counts": counts}
    return told | {"created_at": "2026-01-01T00:00:00Z"} | fields


def page(*batches: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"data": list(batches), "has_more": has_more}


def lines(*objects: Any) -> httpx.Response:
    return httpx.Response(200, content="\n".join(map(json.dumps, objects)).encode())


# -- requests


@pytest.mark.parametrize(
    ("provider", "url"), [("openai", "/v1/chat/completions"), ("openai_responses", "/v1/responses")]
)
def test_a_line_is_the_live_request_with_a_name(provider: str, url: str) -> None:
    script = Script(provider)
    body = script.account.wire.encode(script.account.spec, ASK).body
    line = json.loads(script.endpoint.line("a-1-1", body))
    assert line == {"custom_id": "a-1-1", "method": "POST", "url": url, "body": body}


def test_an_anthropic_line_holds_the_params_of_the_live_request() -> None:
    script = Script("anthropic")
    body = script.account.wire.encode(script.account.spec, ASK).body
    assert json.loads(script.endpoint.line("a-1-1", body)) == {"custom_id": "a-1-1", "params": body}


def test_a_file_is_uploaded_under_its_name_with_its_length_and_the_key() -> None:
    script = Script("openai", {"id": "file-1"})
    assert asyncio.run(script.endpoint.upload("pgharness-7.jsonl", BytesIO(b'{"a": 1}\n{"b": 2}'))) == "file-1"
    (sent,) = script.requests
    assert script.asked == ["POST https://api.openai.com/v1/files"]
    assert sent.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert sent.headers["authorization"] == f"Bearer {KEY}"
    assert int(sent.headers["content-length"]) == len(sent.content)
    assert b'name="purpose"\r\n\r\nbatch\r\n' in sent.content
    assert b'filename="pgharness-7.jsonl"' in sent.content
    assert b'\r\n\r\n{"a": 1}\n{"b": 2}\r\n--' in sent.content


def test_an_upload_is_found_by_its_name() -> None:
    script = Script("openai", page({"id": "file-2", "filename": "other"}, {"id": "file-1", "filename": "mine"}))
    assert asyncio.run(script.endpoint.find_upload("mine")) == "file-1"
    script.answers = [page(), httpx.Response(404, json={})]
    assert asyncio.run(script.endpoint.find_upload("mine")) is None
    assert asyncio.run(script.endpoint.find_upload("mine")) is None


def test_an_openai_batch_is_created_from_its_file_with_a_label() -> None:
    script = Script("openai_responses", openai(status="validating"), base_url="http://host/api/v1")
    created = asyncio.run(script.endpoint.create(UUID, "file-1", BytesIO(), number=2))
    assert created == Remote("batch_1", "running")
    assert script.asked == ["POST http://host/api/v1/batches"]
    assert json.loads(script.requests[0].content) == {
        "input_file_id": "file-1",
        "endpoint": "/v1/responses",
        "completion_window": "24h",
        "metadata": {"pgharness_batch": UUID},
    }
    assert script.requests[0].headers["idempotency-key"] == f"{UUID}-2"


def test_an_anthropic_batch_is_created_with_its_requests() -> None:
    script = Script("anthropic", anthropic())
    file = BytesIO(b'{"custom_id":"a"},{"custom_id":"b"}')
    assert asyncio.run(script.endpoint.create(UUID, None, file, number=0)) == Remote("msgbatch_1", "running")
    (sent,) = script.requests
    assert script.asked == ["POST https://api.anthropic.com/v1/messages/batches"]
    assert json.loads(sent.content) == {"requests": [{"custom_id": "a"}, {"custom_id": "b"}]}
    assert int(sent.headers["content-length"]) == len(sent.content)
    assert (sent.headers["x-api-key"], sent.headers["anthropic-version"]) == (KEY, "2023-06-01")


# -- finding


def test_an_openai_batch_is_found_by_its_label_on_any_page() -> None:
    mine = openai(id="batch_3", metadata={"pgharness_batch": UUID})
    script = Script("openai", page(openai(metadata=None), openai(id="batch_2"), has_more=True), page(mine))
    found = asyncio.run(script.endpoint.find(UUID, since=SINCE, requests=3, known=()))
    assert found == Remote("batch_3", "running")
    assert script.asked[1] == "GET https://api.openai.com/v1/batches?limit=100&after=batch_2"


def test_an_openai_batch_that_was_given_up_is_not_found() -> None:
    script = Script("openai", page(openai(metadata={"pgharness_batch": UUID})))
    assert asyncio.run(script.endpoint.find(UUID, since=SINCE, requests=3, known=["batch_1"])) is None


def test_the_search_ends_where_batches_are_older() -> None:
    old = int(SINCE.timestamp()) - 3_600
    script = Script("openai", page(openai(created_at=old), has_more=True))
    assert asyncio.run(script.endpoint.find(UUID, since=SINCE, requests=3, known=())) is None
    script = Script("anthropic", page(anthropic(created_at="2025-12-31T23:00:00Z"), has_more=True))
    assert asyncio.run(script.endpoint.find(UUID, since=SINCE, requests=3, known=())) is None


def test_an_anthropic_batch_is_the_oldest_of_its_size_that_nobody_knows() -> None:
    other_size = anthropic(id="other", request_counts={"processing": 1, "succeeded": 1})
    script = Script("anthropic", page(anthropic(id="c"), other_size, anthropic(id="b"), anthropic(id="a")))
    found = asyncio.run(script.endpoint.find(UUID, since=SINCE, requests=3, known=["a"]))
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
def test_openai_states(status: str, state: str) -> None:
    script = Script("openai", openai(status=status, output_file_id="file-2", error_file_id="file-3"))
    assert asyncio.run(script.endpoint.poll("batch_1")) == Remote("batch_1", state, ("file-2", "file-3"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("code", "is_retryable"), [("token_limit_exceeded", True), ("invalid_json_line", False)])
def test_a_batch_that_failed_says_why_and_whether_it_may_be_later(code: str, is_retryable: bool) -> None:
    errors = {"data": [{"code": code, "message": "Enqueued too much"}]}
    script = Script("openai", openai(status="failed", errors=errors))
    remote = asyncio.run(script.endpoint.poll("batch_1"))
    assert (remote.state, remote.is_retryable) == ("failed", is_retryable)
    assert remote.error == "the vendor refused the batch: Enqueued too much"


@pytest.mark.parametrize(
    ("status", "state"), [("in_progress", "running"), ("canceling", "running"), ("ended", "ended")]
)
def test_anthropic_states(status: str, state: str) -> None:
    script = Script("anthropic", anthropic(processing_status=status))
    assert asyncio.run(script.endpoint.poll("msgbatch_1")).state == state


@pytest.mark.parametrize(("provider", "told"), [("openai", openai), ("anthropic", anthropic)])
def test_cancelling_what_has_ended_tells_that_it_has(provider: str, told: Callable[..., Any]) -> None:
    ended = told(status="completed", processing_status="ended")
    script = Script(provider, httpx.Response(400, json={"error": {"message": "too late"}}), ended)
    assert asyncio.run(script.endpoint.cancel("batch_1")).state == "ended"
    assert [asked.split()[0] for asked in script.asked] == ["POST", "GET"]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(429, headers={"retry-after": "7"}, json={}), RateLimited),
        (httpx.Response(503, json={}), Unavailable),
        (httpx.Response(404, json={"error": {"message": "no such batch"}}), RequestRejected),
        (httpx.Response(200, content=b"<html>"), ServerFailed),
        (httpx.Response(200, json=["what?"]), ServerFailed),
        (httpx.ConnectError("refused"), Unavailable),
    ],
)
def test_refusals_mean_what_they_mean_of_live_calls(answer: Any, error: type[ModelError]) -> None:
    for provider in ("openai", "anthropic"):
        with pytest.raises(error):
            asyncio.run(Script(provider, answer).endpoint.poll("batch_1"))


def test_no_error_shows_the_key() -> None:
    script = Script("openai", httpx.Response(401, json={"error": {"message": f"Incorrect API key: {KEY}"}}))
    with pytest.raises(RequestRejected) as caught:
        asyncio.run(script.endpoint.poll("batch_1"))
    assert KEY not in str(caught.value)
    assert "[redacted]" in str(caught.value)


def test_an_id_cannot_lead_elsewhere() -> None:
    script = Script("openai", openai())
    asyncio.run(script.endpoint.poll("../files/../../evil?x=1"))
    assert script.requests[0].url.path == "/v1/batches/../files/../../evil?x=1"
    assert script.requests[0].url.raw_path == b"/v1/batches/..%2Ffiles%2F..%2F..%2Fevil%3Fx%3D1"


def test_a_provider_without_batches_is_refused() -> None:
    with pytest.raises(RequestRejected, match="'gemini' has no batches"):
        Script("gemini")


# -- results


def test_openai_results_are_replies_of_live_calls() -> None:
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
    script = Script("openai", good, bad)
    results = {result.custom_id: result.reply for result in script.results("batch_1", "file-2", "file-3")}
    assert results.pop("") is not None  # of nobody
    assert (results["c"], results["d"]) == (None, None)
    assert results["a"] and results["b"] and results["e"]
    completion = script.account.read(ASK, results["a"])
    assert (completion.text, completion.usage.input_tokens, completion.request_id) == ("A note", 5, "req-1")
    with pytest.raises(RateLimited, match="slow down"):
        script.account.read(ASK, results["b"])
    with pytest.raises(ServerFailed, match="it broke"):
        script.account.read(ASK, results["e"])


def test_anthropic_results_are_replies_of_live_calls() -> None:
    message = {"id": "msg_1", "content": [{"type": "text", "text": "A note"}], "stop_reason": "end_turn"}
    overloaded = {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}
    rejected = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    script = Script(
        "anthropic",
        lines(
            {"custom_id": "a", "result": {"type": "succeeded", "message": message}},
            {"custom_id": "b", "result": {"type": "errored", "error": overloaded}},
            {"custom_id": "c", "result": {"type": "errored", "error": rejected}},
            {"custom_id": "d", "result": {"type": "expired"}},
            {"custom_id": "e", "result": {"type": "canceled"}},
        ),
    )
    results = {result.custom_id: result.reply for result in script.results("msgbatch_1")}
    assert script.asked == ["GET https://api.anthropic.com/v1/messages/batches/msgbatch_1/results"]
    assert (results["d"], results["e"]) == (None, None)
    assert results["a"] and results["b"] and results["c"]
    assert script.account.read(ASK, results["a"]).request_id == "msg_1"
    with pytest.raises(RateLimited, match="busy"):
        script.account.read(ASK, results["b"])
    with pytest.raises(RequestRejected, match="too long"):
        script.account.read(ASK, results["c"])


class Broken(httpx.AsyncByteStream):
    """A text in small pieces whose connection breaks."""

    async def __aiter__(self) -> Any:
        for piece in (b'{"custom_id": "a", "resp', b'onse": null}\n{"custom', b'_id": "b"'):
            yield piece
        raise httpx.ReadError("the connection broke")


def test_results_that_break_off_give_what_came_and_say_so() -> None:
    script = Script("openai", httpx.Response(200, stream=Broken()))
    seen: list[str] = []

    async def collect() -> None:
        async for result in script.endpoint.results("batch_1", ["file-2"]):
            seen.append(result.custom_id)

    with pytest.raises(Unavailable, match="in the middle of the results"):
        asyncio.run(collect())
    assert seen == ["a"]


def test_results_that_are_gone_are_refused() -> None:
    script = Script("openai", httpx.Response(404, json={"error": {"message": "No such File"}}))
    with pytest.raises(RequestRejected, match="No such File"):
        script.results("batch_1", "file-2")


def test_what_the_vendor_keeps_is_deleted() -> None:
    script = Script("openai", {}, httpx.Response(404, json={}))
    asyncio.run(script.endpoint.forget("batch_1", ["file-1", "file-2"]))
    assert script.asked == [f"DELETE https://api.openai.com/v1/files/file-{n}" for n in (1, 2)]
    script = Script("anthropic", {})
    asyncio.run(script.endpoint.forget("msgbatch_1", []))
    assert script.asked == ["DELETE https://api.anthropic.com/v1/messages/batches/msgbatch_1"]
