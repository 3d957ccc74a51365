"""The transport over real sockets: every provider in every scene, and what the wire and the logs see of it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import stub_provider
from pgharness.errors import (
    InvalidOutput,
    ModelError,
    RateLimited,
    Refused,
    RequestRejected,
    ServerFailed,
    TimedOut,
    Unavailable,
)
from pgharness.gateway.transport import Transport
from pgharness.types import Completion, Message, ModelSpec, Request, Usage
from stub_provider import (
    CACHED_TOKENS,
    INPUT_TOKENS,
    NOTE,
    OUTPUT_TOKENS,
    PROVIDERS,
    REFUSAL,
    SCENES,
    Scene,
    StubProvider,
)

# Slashes, because some servers escape them in JSON.
KEY = "sk-test/0123456789+abcdefghij/secret"
USAGE = Usage(INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS)
SCHEMA = {
    "type": "object",
    "properties": {"rationale": {"type": "string"}, "satisfaction": {"type": "integer", "minimum": 0, "maximum": 100}},
    "required": ["rationale", "satisfaction"],
    "additionalProperties": False,
}
ASK_NOTE = Request(messages=(Message("system", "You write notes."), Message("user", "Transcript")), seed=11)
ASK_GRADE = Request(messages=ASK_NOTE.messages, schema=SCHEMA, schema_name="grade", seed=12)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "STUB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
async def stub() -> AsyncIterator[StubProvider]:
    async with StubProvider() as server:
        yield server


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    async with contextlib.aclosing(Transport()) as opened:
        yield opened


def model(stub: StubProvider, provider: str, **fields: Any) -> ModelSpec:
    values: dict[str, Any] = {"id": 1, "name": f"test/{provider}", "provider": provider, "model": "model-1"}
    values |= {"base_url": stub.base_url(provider), "timeout_seconds": 10.0}
    if provider == "openai_compatible":
        values["api_key_env"] = "STUB_API_KEY"
    return ModelSpec.model_validate(values | fields)


async def failure(transport: Transport, spec: ModelSpec, request: Request = ASK_NOTE) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await transport.send(spec, request)
    return caught.value


# ---- scenes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_note_comes_back_with_what_it_used(stub: StubProvider, transport: Transport, provider: str) -> None:
    completion = await transport.send(model(stub, provider), ASK_NOTE)
    request_id = "gem-req-1" if provider == "gemini" else "req-1"
    assert completion == Completion(NOTE, None, USAGE, "stop", request_id, "model-1", 200)
    assert stub.problems == [] and len(stub.requests) == 1
    assert stub.requests[0].key == KEY
    assert stub.requests[0].headers["user-agent"] == "pgharness"


@pytest.mark.parametrize("scene", ["success", "fenced"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_grade_comes_back_as_data(
    stub: StubProvider, transport: Transport, provider: str, scene: Scene
) -> None:
    stub.play(scene)
    completion = await transport.send(model(stub, provider), ASK_GRADE)
    assert completion.data == {"rationale": "The note says so.", "satisfaction": 50}
    assert stub.problems == []


@pytest.mark.parametrize("parameters", [{}, {"reasoning_effort": "high"}, {"thinking_budget_tokens": 4096}])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_every_vendor_takes_every_neutral_parameter(
    stub: StubProvider, transport: Transport, provider: str, parameters: dict[str, Any]
) -> None:
    neutral = {"temperature": 0.3, "top_p": 0.9, "max_tokens": 2000, "stop": "END", **parameters}
    for is_reasoning in (False, True):
        for request in (ASK_NOTE, ASK_GRADE):
            await transport.send(model(stub, provider, parameters=neutral, is_reasoning=is_reasoning), request)
    assert stub.problems == [] and len(stub.requests) == 4


OUTCOMES: dict[Scene, type[ModelError]] = {
    "rate_limited": RateLimited,
    "overloaded": RateLimited,
    "out_of_credit": RequestRejected,
    "server_error": ServerFailed,
    "unavailable": Unavailable,
    "slow": TimedOut,
    "drip": TimedOut,
    "truncated_json": InvalidOutput,
    "broken_body": InvalidOutput,
    "dropped": Unavailable,
    "not_json": InvalidOutput,
    "empty": InvalidOutput,
    "content_filter": Refused,
    "refusal": Refused,
    "echo_key": RequestRejected,
    "redirect": RequestRejected,
}


def test_every_scene_is_tested() -> None:
    assert set(SCENES) - set(OUTCOMES) == {"success", "fenced", "cut_off", "answer_key"}


@pytest.mark.parametrize("scene", OUTCOMES)
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_failure_is_told_apart_and_sent_once(
    stub: StubProvider, transport: Transport, provider: str, scene: Scene
) -> None:
    stub.play(scene)
    timeout = 0.3 if scene in ("slow", "drip") else 10.0
    error = await failure(transport, model(stub, provider, timeout_seconds=timeout))
    assert type(error) is OUTCOMES[scene]
    assert f"test/{provider}" in str(error)
    assert len(stub.requests) == 1 and stub.problems == []
    assert KEY not in told(error)
    if scene in ("rate_limited", "unavailable"):
        assert error.retry_after == (7 if scene == "rate_limited" else 3)
    if scene in ("content_filter", "refusal"):
        assert error.finish_reason in ("refusal", "content_filter", "safety")
        assert (error.input_tokens, error.output_tokens) == (INPUT_TOKENS, OUTPUT_TOKENS)
        assert scene == "content_filter" or provider == "gemini" or REFUSAL in str(error)
    if scene in ("truncated_json", "broken_body", "not_json"):
        assert error.text and error.http_status == 200
    if scene == "out_of_credit":
        assert not error.is_retryable and "exceeded your current quota" in str(error)
    if scene == "redirect":
        assert stub.url in (error.hint or "")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_cut_off_note_is_kept_and_a_cut_off_grade_is_not(
    stub: StubProvider, transport: Transport, provider: str
) -> None:
    stub.play("cut_off", "cut_off")
    note = await transport.send(model(stub, provider), ASK_NOTE)
    assert note.finish_reason == "length" and note.text == NOTE[: len(NOTE) // 2]
    error = await failure(transport, model(stub, provider), ASK_GRADE)
    assert isinstance(error, InvalidOutput) and "cut off at max_tokens" in str(error)
    assert error.text and error.output_tokens == OUTPUT_TOKENS


async def test_a_grade_that_is_not_json_keeps_its_text_and_its_cost(stub: StubProvider, transport: Transport) -> None:
    stub.answer = "I would say 80 out of 100."
    error = await failure(transport, model(stub, "anthropic"), ASK_GRADE)
    assert isinstance(error, InvalidOutput) and error.text == stub.answer
    assert (error.input_tokens, error.cached_tokens) == (INPUT_TOKENS, CACHED_TOKENS)


async def test_what_postgres_cannot_store_is_replaced(stub: StubProvider, transport: Transport) -> None:
    stub.answer = '{"a\0": "x\0y", "b": ["\ud800"]}'.replace("\0", "\\u0000").replace("\ud800", "\\ud800")
    completion = await transport.send(model(stub, "openai_compatible"), ASK_GRADE)
    assert completion.data == {"a\ufffd": "x\ufffdy", "b": ["\ufffd"]}
    stub.answer = "x\0y\ud800"
    assert (await transport.send(model(stub, "openai_compatible"), ASK_NOTE)).text == "x\ufffdy\ufffd"


# ---- keys ------------------------------------------------------------------------------------------------------------


def told(error: BaseException) -> str:
    """Return everything that printing an error in any way can tell, frames' variables included."""
    whole = traceback.TracebackException.from_exception(error, capture_locals=True)
    # The frames of this file hold the stub, which knows every key.
    whole.stack = traceback.StackSummary.from_list([frame for frame in whole.stack if frame.filename != __file__])
    chain = [error, error.__cause__, error.__context__]
    return "\n".join([*whole.format(), *map(str, chain), *map(repr, chain), repr(vars(error))])


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene != "drip"])
@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_key_is_in_no_answer_no_exception_and_no_log(
    stub: StubProvider, transport: Transport, caplog: pytest.LogCaptureFixture, provider: str, scene: Scene
) -> None:
    caplog.set_level(logging.DEBUG)
    stub.play(scene)
    try:
        said = repr(await transport.send(model(stub, provider, timeout_seconds=0.3), ASK_NOTE))
    except ModelError as error:
        said = told(error)
    logged = "\n".join([*(record.getMessage() for record in caplog.records), *map(repr, map(vars, caplog.records))])
    assert stub.requests[0].key == KEY
    for text in (said, logged):
        assert KEY not in text and KEY.replace("/", "\\/") not in text
    if scene in ("echo_key", "answer_key"):
        assert "[redacted]" in said


async def test_a_key_that_a_server_escapes_is_hidden_as_well(stub: StubProvider, transport: Transport) -> None:
    for answer in (KEY.replace("/", "\\/"), KEY.replace("/", "%2F").replace("+", "%2B"), f'{{"key": "{KEY}"}}'):
        stub.answer = answer
        completion = await transport.send(model(stub, "openai"), ASK_NOTE)
        assert "secret" not in completion.text and "[redacted]" in completion.text
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
    stub.answer = f'{{"{KEY}": ["{escaped}"]}}'
    assert (await transport.send(model(stub, "openai"), ASK_GRADE)).data == {"[redacted]": ["[redacted]"]}


async def test_a_placeholder_key_does_not_falsify_answers(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUB_API_KEY", "none")
    stub.answer = "Allergies: none."
    assert (await transport.send(model(stub, "openai_compatible"), ASK_NOTE)).text == "Allergies: none."


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "openai_compatible"])
async def test_a_missing_key_is_named_and_nothing_is_sent(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch, provider: str
) -> None:
    variable = {"anthropic": "ANTHROPIC_API_KEY", "gemini": "GEMINI_API_KEY"}.get(provider, "OPENAI_API_KEY")
    for value in (None, "  "):
        monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
        error = await failure(transport, model(stub, provider))
        assert isinstance(error, RequestRejected) and variable in str(error) and variable in (error.hint or "")
    monkeypatch.setenv("MY_KEY", KEY)
    await transport.send(model(stub, provider, api_key_env="MY_KEY"), ASK_NOTE)
    assert len(stub.requests) == 1


async def test_a_compatible_server_is_asked_without_a_key_unless_one_is_named(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    await transport.send(model(stub, "openai_compatible", api_key_env=None), ASK_NOTE)
    assert "authorization" not in stub.requests[0].headers
    monkeypatch.delenv("STUB_API_KEY")
    assert "STUB_API_KEY" in str(await failure(transport, model(stub, "openai_compatible")))


@pytest.mark.parametrize("value", ["sk-0123456789\nx: y", "sk-0123456789é", "sk 0123456789"])
async def test_a_malformed_key_is_refused_without_repeating_it(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    error = await failure(transport, model(stub, "openai"))
    assert isinstance(error, RequestRejected) and "0123456789" not in told(error)
    assert stub.requests == []


async def test_the_databases_password_is_no_api_key(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGPASSWORD", "PGHARNESS_DATABASE_URL"):
        monkeypatch.setenv(name, KEY)
        assert isinstance(await failure(transport, model(stub, "openai", api_key_env=name)), RequestRejected)
    assert stub.requests == []


async def test_a_key_that_was_changed_is_the_one_of_the_next_call(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = transport.completer(model(stub, "openai"))
    await ask(ASK_NOTE)
    changed = KEY.replace("test", "next")
    monkeypatch.setenv("OPENAI_API_KEY", changed)
    stub.answer = f"{KEY} is old, {changed} is new"
    assert (await ask(ASK_NOTE)).text == f"{KEY} is old, [redacted] is new"
    assert [request.key for request in stub.requests] == [KEY, changed]


async def test_a_key_in_a_header_is_hidden(transport: Transport, stub: StubProvider) -> None:
    async with answering(chat(NOTE), f"x-request-id: {KEY}") as (address, _):
        spec = model(stub, "openai_compatible", base_url=address)
        assert (await transport.send(spec, ASK_NOTE)).request_id == "[redacted]"
    async with answering(b"", f"location: http://other.invalid/?key={KEY}", status="307 Moved") as (address, _):
        error = await failure(transport, model(stub, "openai_compatible", base_url=address))
    assert error.hint is not None and error.hint.endswith("?key=[redacted]") and KEY not in told(error)


# ---- the wire --------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_unavailable(transport: Transport, stub: StubProvider) -> None:
    with socket.socket() as taken:  # bound and not listening: nothing else can answer there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        error = await failure(transport, model(stub, "openai_compatible", base_url=address))
    assert type(error) is Unavailable and not error.spends_attempt
    error = await failure(transport, model(stub, "openai_compatible", base_url="http://nowhere.invalid/v1"))
    assert type(error) is Unavailable and "nowhere.invalid" in str(error)


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".com", "xn--", "1.2.3.4.5", "\udc80.com"])
async def test_a_host_that_can_have_no_address_is_a_rejection(
    transport: Transport, stub: StubProvider, host: str
) -> None:
    error = await failure(transport, model(stub, "openai", base_url=f"http://{host}/v1"))
    assert type(error) is RequestRejected and "test/openai: its base_url cannot be used" in str(error)


async def test_a_server_that_does_not_speak_http_fails(transport: Transport, stub: StubProvider) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        error = await failure(transport, model(stub, "openai_compatible", base_url=f"http://127.0.0.1:{port}/v1"))
    assert type(error) is ServerFailed and "does not speak HTTP" in str(error)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
async def test_a_certificate_that_nobody_vouches_for_is_a_rejection(
    transport: Transport, stub: StubProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = tmp_path / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(certificate)]
    subprocess.run([*make.split(), *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, tmp_path / "key.pem")
    spec = model(stub, "openai", base_url=await stub.listen_with_tls(context) + "/openai/v1")

    error = await failure(transport, spec)
    assert isinstance(error, RequestRejected) and "SSL_CERT_FILE" in (error.hint or "")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with contextlib.aclosing(Transport()) as trusting:
        assert (await trusting.send(spec, ASK_NOTE)).text == NOTE


async def test_the_timeout_bounds_the_whole_call(stub: StubProvider, transport: Transport) -> None:
    stub.play("drip")  # every byte arrives in time, the answer never
    started = time.monotonic()
    error = await failure(transport, model(stub, "openai", timeout_seconds=0.3))
    assert isinstance(error, TimedOut) and 0.25 < time.monotonic() - started < 2
    await stub.wait_until(lambda: stub.in_flight == 0)


@pytest.mark.parametrize("scene", ["slow", "drip"])
async def test_a_cancelled_call_leaves_the_server_at_once(
    stub: StubProvider, transport: Transport, scene: Scene
) -> None:
    stub.play(scene)
    call = asyncio.create_task(transport.send(model(stub, "openai"), ASK_NOTE))
    await stub.wait_until(lambda: len(stub.requests) == 1)
    started = time.monotonic()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await stub.wait_until(lambda: stub.disconnects == 1)
    assert time.monotonic() - started < 1
    assert (await transport.send(model(stub, "openai"), ASK_NOTE)).text == NOTE  # the pool is none the worse


async def test_a_connection_is_used_again(stub: StubProvider, transport: Transport) -> None:
    for _ in range(5):
        await transport.send(model(stub, "openai"), ASK_NOTE)
    assert stub.connections == 1


async def test_500_calls_at_once_take_little_longer_than_one(transport: Transport) -> None:
    async with StubProvider(latency=0.5) as stub:
        spec = model(stub, "openai")
        started = time.monotonic()
        completions = await asyncio.gather(*(transport.send(spec, ASK_NOTE) for _ in range(500)))
        seconds = time.monotonic() - started
        assert all(completion.text == NOTE for completion in completions)
        assert stub.most_in_flight > 250  # no limit of connections holds calls back
    assert seconds < 10


async def test_closing_leaves_no_socket_behind(stub: StubProvider) -> None:
    before = open_files()
    async with contextlib.aclosing(Transport()) as transport:
        stub.play("slow", "dropped", "broken_body", "server_error")
        spec = model(stub, "openai", timeout_seconds=0.3)
        await asyncio.gather(*(transport.send(spec, ASK_NOTE) for _ in range(40)), return_exceptions=True)
    await eventually(lambda: stub.connections == 0 and open_files() <= before)


async def test_a_proxy_of_the_environment_is_used(stub: StubProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    monkeypatch.setenv("NO_PROXY", "direct.invalid")
    async with contextlib.aclosing(Transport()) as transport:
        spec = model(stub, "openai", base_url="http://far.invalid/openai/v1")
        assert (await transport.send(spec, ASK_NOTE)).text == NOTE
        assert stub.requests[0].headers["host"] == "far.invalid"
        spec = model(stub, "openai", base_url="http://direct.invalid/openai/v1")
        assert isinstance(await failure(transport, spec), Unavailable)


async def test_a_proxy_is_told_its_own_password(stub: StubProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", stub.url.replace("://", "://user:pass@"))
    async with contextlib.aclosing(Transport()) as transport:
        await transport.send(model(stub, "openai", base_url="http://far.invalid/openai/v1"), ASK_NOTE)
    assert stub.requests[0].headers["proxy-authorization"] == "Basic dXNlcjpwYXNz"


async def test_a_proxy_for_tls_alone_is_told_its_password(stub: StubProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Who are you\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:passphrase@127.0.0.1:{port}")
        async with contextlib.aclosing(Transport()) as transport:
            error = await failure(transport, model(stub, "openai", base_url="https://far.invalid/v1"))
    assert heads[0].startswith(b"CONNECT far.invalid:443") and b"Basic dXNlcjpwYXNzcGhyYXNl" in heads[0]
    assert KEY.encode() not in heads[0]
    assert type(error) is Unavailable
    assert "passphrase" not in told(error) and "dXNlcjpwYXNzcGhyYXNl" not in told(error)


@pytest.mark.parametrize(
    "proxy", ["http://a%3Ab:passphrase@host", "http://u:passphrase@a..b:80", "http://:3128", "http://host:99999"]
)
async def test_a_proxy_without_an_address_is_named_when_it_is_needed(
    stub: StubProvider, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with contextlib.aclosing(Transport()) as transport:
        error = await failure(transport, model(stub, "openai", base_url="http://far.invalid/v1"))
        assert type(error) is RequestRejected and "far.invalid: the address of its proxy" in str(error)
        assert "passphrase" not in told(error)
        assert (await transport.send(model(stub, "openai"), ASK_NOTE)).text == NOTE


async def test_a_proxy_that_cannot_be_used_is_named(stub: StubProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with contextlib.aclosing(Transport()) as transport:
        error = await failure(transport, model(stub, "openai", base_url="http://far.invalid/v1"))
        assert isinstance(error, RequestRejected) and "far.invalid: a socks5 proxy" in str(error)
        assert (await transport.send(model(stub, "openai"), ASK_NOTE)).text == NOTE


async def test_variables_for_certificates_that_are_empty_count_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", "")
    assert len(Transport()._tls.get_ca_certs()) > 50
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    with pytest.raises(FileNotFoundError):
        Transport()


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_compressed_reply_is_read(stub: StubProvider, transport: Transport, coding: str) -> None:
    body = gzip.compress(chat(NOTE)) if coding == "gzip" else zlib.compress(chat(NOTE))
    async with answering(body, f"Content-Encoding: {coding}") as (address, requests):
        spec = model(stub, "openai_compatible", base_url=address)
        assert (await transport.send(spec, ASK_NOTE)).text == NOTE
    assert b"accept-encoding: gzip, deflate" in requests[0].lower()


async def test_a_reply_that_is_not_compressed_as_it_says_is_invalid(stub: StubProvider, transport: Transport) -> None:
    async with answering(b"not gzip", "content-encoding: gzip") as (address, _):
        error = await failure(transport, model(stub, "openai_compatible", base_url=address))
    assert type(error) is InvalidOutput and "cannot be decompressed" in str(error)
    headers = ("content-encoding: gzip", "retry-after: 7")
    async with answering(b"not gzip", *headers, status="429 Slow down") as (address, _):
        error = await failure(transport, model(stub, "openai_compatible", base_url=address))
    assert type(error) is RateLimited and error.retry_after == 7


async def test_a_small_reply_that_grows_without_end_is_given_up(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgharness.gateway.transport.LARGEST_REPLY", 10_000)
    async with answering(gzip.compress(chat("x" * 100_000)), "content-encoding: gzip") as (address, _):
        error = await failure(transport, model(stub, "openai_compatible", base_url=address))
    assert type(error) is InvalidOutput


async def test_no_call_leaves_anything_to_the_next(stub: StubProvider, transport: Transport) -> None:
    async with answering(chat(NOTE), "Set-Cookie: session=1; Path=/") as (address, requests):
        ask = transport.completer(model(stub, "openai_compatible", base_url=address))
        for _ in range(2):
            await ask(ASK_NOTE)
        assert len(requests) == 2
    assert all(b"cookie" not in request.lower() for request in requests)


async def test_a_request_says_how_long_it_is(stub: StubProvider, transport: Transport) -> None:
    await transport.send(model(stub, "openai"), ASK_GRADE)
    headers = stub.requests[0].headers
    assert int(headers["content-length"]) > 100 and "transfer-encoding" not in headers


async def test_what_half_a_character_and_a_long_number_are_asked_with_arrives(
    stub: StubProvider, transport: Transport
) -> None:
    odd = Request(messages=(Message("user", "half \ud800"),))
    await transport.send(model(stub, "openai_compatible", parameters={"metadata": {"n": 2**70}}), odd)
    body = stub.requests[0].body
    assert body["messages"][0]["content"] == "half \ud800" and body["metadata"] == {"n": 2**70}


async def test_calls_of_one_model_at_once_do_not_mix(stub: StubProvider, transport: Transport) -> None:
    stub.answer = lambda recorded: str(recorded.body["messages"][0]["content"])
    ask = transport.completer(model(stub, "openai"))
    texts = [f"text {number}" for number in range(50)]
    completions = await asyncio.gather(*(ask(Request(messages=(Message("user", text),))) for text in texts))
    assert [completion.text for completion in completions] == texts


async def test_an_endless_reply_is_given_up(
    stub: StubProvider, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgharness.gateway.transport.LARGEST_REPLY", 10_000)
    stub.answer = "x" * 100_000
    assert isinstance(await failure(transport, model(stub, "openai")), InvalidOutput)


async def test_the_stub_runs_as_a_program(transport: Transport, stub: StubProvider) -> None:
    program = [sys.executable, str(Path(stub_provider.__file__)), "--latency", "0.01"]
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        address = (await process.stdout.readline()).decode().strip()
        spec = model(stub, "openai_compatible", base_url=address)
        assert (await transport.send(spec, ASK_GRADE)).data["satisfaction"] == 50
    finally:
        process.terminate()
        assert await process.wait() == 0


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()


@contextlib.asynccontextmanager
async def answering(body: bytes, *headers: str, status: str = "200 OK") -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every request in these bytes, as no framework would; yield the base URL and the heads of the requests."""
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                heads.append(await reader.readuntil(b"\r\n\r\n"))
                length = re.search(rb"content-length: (\d+)", heads[-1].lower())
                assert length is not None
                await reader.readexactly(int(length[1]))
                lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]
                writer.write("\r\n".join(lines).encode() + body)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", heads


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


async def eventually(condition: Any, *, timeout: float = 5.0) -> None:
    """Return when a condition of the operating system holds, for which nobody can be waited."""
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)
