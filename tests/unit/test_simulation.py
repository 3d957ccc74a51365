"""The simulator over HTTP: what an OpenAI client sees, what the gateway makes of it, and what is counted."""

from __future__ import annotations

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jsonschema
import pytest

from pgharness.errors import (
    HarnessError,
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
from pgharness.simulation import SimulationServer
from pgharness.types import Completion, Message, ModelSpec, Request

PROMPT = "My left knee has been swollen since Sunday. It gave way twice. Ibuprofen helped a little. I rest it."
FOREVER = 10_000.0
SCHEMA = {
    "type": "object",
    "properties": {"grade": {"type": "integer", "minimum": 1, "maximum": 5}, "why": {"type": "string"}},
    "required": ["grade", "why"],
    "additionalProperties": False,
}


class Client:
    """Talks to a server as curl would."""

    def __init__(self, server: SimulationServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def post(self, content: Any = PROMPT, **body: Any) -> tuple[int, dict[str, Any], Any]:
        """Return status, body and headers of the answer to a prompt."""
        asked = {"model": "simulator", "messages": [{"role": "user", "content": content}]} | body
        return await self.send(json.dumps(asked).encode())

    async def send(self, body: bytes) -> tuple[int, dict[str, Any], Any]:
        async with self.session.post(f"{self.server.url}/chat/completions", data=body) as reply:
            return reply.status, await reply.json(), reply.headers

    async def text(self, content: str = PROMPT, **body: Any) -> str:
        status, answer, _ = await self.post(content, **body)
        assert status == 200, answer
        return str(answer["choices"][0]["message"]["content"])

    async def get(self, path: str) -> Any:
        async with self.session.get(self.server.url.removesuffix("/v1") + path) as reply:
            assert reply.status == 200
            return await reply.json()


@asynccontextmanager
async def served(
    *, models: tuple[str, ...] = ("simulator",), seed: int = 0, **parameters: Any
) -> AsyncIterator[Client]:
    server = SimulationServer({"latency_seconds": 0.0} | parameters, models=models, seed=seed)
    await server.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Client(server, session)
    finally:
        await server.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


async def through_gateway(server: SimulationServer, request: Request, **spec: Any) -> Completion | ModelError:
    """Return what the gateway makes of the server's answer."""
    transport = Transport()
    fields = {"id": 1, "name": "m", "provider": "openai_compatible", "model": "simulator", "base_url": server.url}
    try:
        return await transport.send(ModelSpec.model_validate(fields | spec), request)
    except ModelError as error:
        return error
    finally:
        await transport.aclose()


def asked(schema: dict[str, Any] | None = None, **more: Any) -> Request:
    return Request(messages=(Message("system", "Write."), Message("user", PROMPT)), schema=schema, **more)


# -- answers


async def test_an_answer_is_a_note_of_the_prompt_in_the_shape_of_the_api() -> None:
    async with served(quality=1.0) as client:
        status, answer, headers = await client.post()
    assert status == 200
    assert answer["object"] == "chat.completion" and answer["model"] == "simulator"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and "swollen since Sunday" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    used = answer["usage"]
    assert used["prompt_tokens"] == len(PROMPT) // 4
    assert used["completion_tokens"] == len(choice["message"]["content"]) // 4
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]
    assert answer["id"].endswith(headers["x-request-id"])


async def test_the_gateway_reads_its_answers() -> None:
    async with served() as client:
        completion = await through_gateway(client.server, asked())
        assert isinstance(completion, Completion) and "knee" in completion.text and completion.usage.output_tokens
        graded = await through_gateway(client.server, asked(SCHEMA))
        assert isinstance(graded, Completion)
        jsonschema.validate(graded.data, SCHEMA)


async def test_content_may_come_in_parts() -> None:
    async with served(quality=1.0) as client:
        parts = [{"type": "text", "text": "The knee is swollen."}, {"type": "text", "text": "It gave way."}]
        assert await client.text(parts, seed=1) == await client.text("The knee is swollen.\nIt gave way.", seed=1)


@pytest.mark.parametrize("form", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}])
async def test_json_is_answered_where_it_is_asked_for(form: dict[str, Any]) -> None:
    async with served() as client:
        answer = json.loads(await client.text(response_format=form))
        assert isinstance(answer, dict) and answer
        assert "Plan:" in await client.text(response_format={"type": "text"})


async def test_an_answer_is_cut_at_max_tokens() -> None:
    async with served(quality=1.0) as client:
        whole = await client.text(seed=1)
        for name in ("max_tokens", "max_completion_tokens"):
            _, answer, _ = await client.post(seed=1, **{name: 5})
            assert answer["choices"][0]["message"]["content"] == whole[:20]
            assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 5
        assert await client.text(seed=1, max_tokens=5000) == whole


async def test_logprobs_are_given_for_each_token_and_are_nearer_to_0_the_better_the_model() -> None:
    means = []
    for quality in (0.2, 0.9):
        async with served(quality=quality) as client:
            _, answer, _ = await client.post(PROMPT * 20, seed=1, logprobs=True)
        choice = answer["choices"][0]
        content = choice["logprobs"]["content"]
        assert "".join(each["token"] for each in content) == choice["message"]["content"]
        assert len(content) == answer["usage"]["completion_tokens"]
        assert all(each["logprob"] <= 0 for each in content)
        means.append(sum(each["logprob"] for each in content) / len(content))
    assert means[0] < means[1] < 0


# -- seeds


async def test_a_prompt_with_a_seed_or_without_temperature_gets_one_answer_and_others_vary() -> None:
    async with served(quality=0.5) as client:
        for fixed in ({"seed": 7}, {"temperature": 0}):
            assert len({await client.text(**fixed) for _ in range(8)}) == 1
        assert len({await client.text() for _ in range(20)}) > 5
        assert len({await client.text(seed=seed) for seed in range(20)}) > 5


async def test_the_same_requests_in_the_same_order_fare_the_same_and_with_another_seed_otherwise() -> None:
    async def all_of(seed: int) -> list[Any]:
        async with served(seed=seed, quality=0.5, error_rate=0.3, rate_limit_rate=0.2) as client:
            replies = [await client.post() for _ in range(30)]
            return [(status, body.get("id"), str(body.get("choices"))) for status, body, _ in replies]

    assert await all_of(1) == await all_of(1) != await all_of(2)


async def test_a_prompt_that_is_asked_again_can_fare_better_and_gets_the_same_answer() -> None:
    async with served(error_rate=0.5) as client:
        replies = [await client.post(seed=3) for _ in range(40)]
    statuses = [status for status, _, _ in replies]
    assert 8 < statuses.count(500) < 32 and statuses.count(500) + statuses.count(200) == 40
    assert len({body["choices"][0]["message"]["content"] for status, body, _ in replies if status == 200}) == 1


async def test_each_model_answers_in_its_own_way() -> None:
    async with served(models=("small", "large", "small"), quality=0.5) as client:
        listed = await client.get("/v1/models")
        assert [each["id"] for each in listed["data"]] == ["small", "large"]
        small, large = [[await client.text(model=name, seed=s) for s in range(10)] for name in ("small", "large")]
    assert small != large


# -- faults


@pytest.mark.parametrize(
    ("parameters", "kind", "status"),
    [
        ({"error_rate": 1.0}, ServerFailed, 500),
        ({"rate_limit_rate": 1.0}, RateLimited, 429),
        ({"outages": [{"start_seconds": 0, "seconds": 1e9, "kind": "unavailable"}]}, Unavailable, 503),
        ({"refusal_rate": 1.0}, Refused, 200),
    ],
    ids=str,
)
async def test_the_gateway_understands_its_faults(
    parameters: dict[str, Any], kind: type[ModelError], status: int
) -> None:
    async with served(**parameters) as client:
        error = await through_gateway(client.server, asked())
        assert type(error) is kind and error.http_status == status and error.request_id


@pytest.mark.parametrize(("wait", "whole"), [(2.0, "2"), (0.3, "1"), (None, None)])
async def test_a_429_says_how_long_to_wait(wait: float | None, whole: str | None) -> None:
    async with served(rate_limit_rate=1.0, retry_after_seconds=wait) as client:
        status, body, headers = await client.post()
        assert status == 429 and body["error"]["type"] == "rate_limit_error" and body["error"]["message"]
        assert headers.get("Retry-After") == whole
        error = await through_gateway(client.server, asked())
        assert isinstance(error, RateLimited) and error.retry_after == wait


async def test_an_invalid_answer_is_for_the_client_to_find_out() -> None:
    async with served(invalid_rate=1.0) as client:
        found = [await through_gateway(client.server, asked(SCHEMA)) for _ in range(30)]
        assert client.server.stats.completed == 30
    unreadable = [each for each in found if isinstance(each, InvalidOutput)]
    misshapen = [each for each in found if isinstance(each, Completion)]
    assert unreadable and misshapen and len(unreadable) + len(misshapen) == 30
    for each in misshapen:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(each.data, SCHEMA)


@pytest.mark.parametrize(
    "parameters",
    [{"timeout_rate": 1.0}, {"timeout_rate": 1.0, "latency_seconds": 0.01}, {"latency_seconds": FOREVER}],
    ids=str,
)
async def test_a_request_may_get_no_answer_until_the_client_leaves(parameters: dict[str, Any]) -> None:
    async with served(**parameters) as client:
        error = await through_gateway(client.server, asked(), timeout_seconds=0.1)
        assert isinstance(error, TimedOut)
        await until(lambda: client.server.stats.cancelled == 1)
        assert client.server.stats.in_flight == 0


async def test_a_client_that_leaves_cancels_its_request_and_frees_its_place() -> None:
    async with served(latency_seconds=FOREVER, concurrency_limit=2) as client:
        stats = client.server.stats
        calls = [asyncio.create_task(client.post()) for _ in range(2)]
        await until(lambda: stats.in_flight == 2)
        assert (await client.post())[0] == 429
        calls[0].cancel()
        await until(lambda: stats.cancelled == 1)
        calls.append(asyncio.create_task(client.post()))
        await until(lambda: stats.in_flight == 2)
        for call in calls:
            call.cancel()
        await until(lambda: stats.cancelled == 3)
        await asyncio.gather(*calls, return_exceptions=True)
        assert await client.get("/stats") == {
            "requests": 4,
            "in_flight": 0,
            "max_in_flight": 3,
            "completed": 0,
            "refused": 1,
            "failed": 0,
            "rejected": 0,
            "cancelled": 3,
        }


# -- limits


async def test_requests_above_the_rate_are_refused() -> None:
    async with served(requests_per_second_limit=0.01, retry_after_seconds=5.0) as client:
        assert [(await client.post())[0] for _ in range(4)] == [200, 429, 429, 429]
        error = await through_gateway(client.server, asked())
        assert isinstance(error, RateLimited) and error.retry_after == 5.0
        assert (client.server.stats.completed, client.server.stats.refused) == (1, 4)


async def test_models_of_one_server_share_its_limits() -> None:
    async with served(models=("a", "b"), requests_per_second_limit=0.01) as client:
        assert [(await client.post(model=name))[0] for name in "ab"] == [200, 429]


# -- requests that cannot be answered


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"model": "gpt"}, 404, "gpt"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"response_format": {"type": "grammar"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/a"}}}}, 400, "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, 400, "schema"),
    ],
    ids=str,
)
async def test_a_wrong_request_is_rejected_by_name(body: dict[str, Any], status: int, named: str) -> None:
    async with served() as client:
        found, answer, _ = await client.post(**body)
        assert found == status and named in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"
        assert client.server.stats.rejected == 1 == client.server.stats.requests
        assert (await client.post())[0] == 200


async def test_a_body_that_is_no_json_is_rejected() -> None:
    async with served() as client:
        for body in (b"", b"{", b"[]", b'"x"', b'{"model": "\xff"}'):
            assert (await client.send(body))[0] == 400


async def test_the_gateway_gives_up_on_a_model_that_is_not_served() -> None:
    async with served() as client:
        assert isinstance(await through_gateway(client.server, asked(), model="gpt"), RequestRejected)


async def test_every_request_is_counted_once() -> None:
    async with served(error_rate=0.2, rate_limit_rate=0.2, refusal_rate=0.2) as client:
        replies = await asyncio.gather(*[client.post(model=("simulator", "gpt")[s % 10 == 0]) for s in range(200)])
        counts = await client.get("/stats")
    statuses = [status for status, _, _ in replies]
    assert counts["requests"] == 200 and counts["in_flight"] == 0 and counts["max_in_flight"] >= 1
    assert counts["completed"] == statuses.count(200) and counts["refused"] == statuses.count(429)
    assert counts["failed"] == statuses.count(500) and counts["rejected"] == statuses.count(404) == 20
    assert counts["cancelled"] == 0 and math.isclose(counts["completed"] / 180, 0.6, abs_tol=0.15)


# -- starting


def test_parameters_that_cannot_be_used_are_named() -> None:
    with pytest.raises(RequestRejected, match="latency_secs"):
        SimulationServer({"latency_secs": 1})


async def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HarnessError, match=str(port)) as caught:
            await SimulationServer({}).start(port=port)
    assert caught.value.hint and "--port 0" in caught.value.hint
