"""A stand-in for every vendor's API: a real HTTP server on 127.0.0.1 that checks requests and plays scenes.

    async with StubProvider() as stub:
        stub.play("rate_limited")  # for the next request; whatever follows succeeds
        spec = ModelSpec(provider="anthropic", base_url=stub.base_url("anthropic"), ...)
        ...
        assert stub.problems == []  # what the requests got wrong, had the vendor been asked

A request that the vendor would refuse is answered with 400, so a test cannot overlook it. A request with a JSON Schema
is answered with JSON that fits it.

As a program it serves benchmarks, and prints the base URL of its OpenAI-compatible API:

    python tests/stub_provider.py --port 8000 --latency 0.5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import uvloop
from aiohttp import web

Scene = Literal[
    "success",
    "fenced",  # JSON in a Markdown fence
    "rate_limited",
    "overloaded",
    "out_of_credit",
    "server_error",
    "unavailable",
    "slow",  # no answer until the client leaves
    "drip",  # a byte now and then, for ever
    "truncated_json",  # a whole HTTP body that ends in the middle of its JSON
    "broken_body",  # a connection that breaks in the middle of the HTTP body
    "dropped",  # a connection that breaks before any answer
    "not_json",
    "cut_off",
    "empty",
    "content_filter",
    "refusal",
    "echo_key",  # an error that quotes the key
    "answer_key",  # an answer that quotes the key
    "redirect",
]
SCENES: tuple[Scene, ...] = get_args(Scene)
PROVIDERS = ("openai", "openai_responses", "anthropic", "gemini", "openai_compatible")

NOTE = "Patient seen today. Plan agreed."
REFUSAL = "I cannot help with that."
# What every vendor reports in its own words: 120 tokens in, 20 of them cached, 30 out.
INPUT_TOKENS, OUTPUT_TOKENS, CACHED_TOKENS = 120, 30, 20


@dataclass
class Recorded:
    """One request as it arrived; `problems` is what the vendor would have refused."""

    provider: str
    path: str
    query: str
    headers: dict[str, str]
    body: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        names = {"anthropic": "x-api-key", "gemini": "x-goog-api-key"}
        return self.headers.get(names.get(self.provider, "authorization"), "").removeprefix("Bearer ")

    @property
    def schema(self) -> dict[str, Any] | None:
        """Return the JSON Schema that the request asks for."""
        places = {
            "openai_responses": ("text", "format", "schema"),
            "anthropic": ("output_config", "format", "schema"),
            "gemini": ("generationConfig", "responseJsonSchema"),
        }
        value: Any = self.body
        for step in places.get(self.provider, ("response_format", "json_schema", "schema")):
            value = value.get(step) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else None


class StubProvider:
    """The server: `play` scripts it, `requests` is what it saw, `wait_until` waits for what it will see."""

    def __init__(self, *, port: int = 0, latency: float = 0.0, is_recording: bool = True) -> None:
        self.requests: list[Recorded] = []
        self.answer: str | Callable[[Recorded], str] | None = None
        self.disconnects = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.url = ""
        self._port = port
        self._latency = latency
        self._is_recording = is_recording
        self._scenes: deque[Scene] = deque()
        self._changed = asyncio.Event()
        self._served = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> StubProvider:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._handler("openai_compatible"))
        app.router.add_post("/openai/v1/chat/completions", self._handler("openai"))
        app.router.add_post("/openai/v1/responses", self._handler("openai_responses"))
        app.router.add_post("/anthropic/v1/messages", self._handler("anthropic"))
        app.router.add_post("/gemini/v1beta/{model:.+}:generateContent", self._handler("gemini"))
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, backlog=4096).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def listen_with_tls(self, context: ssl.SSLContext) -> str:
        """Listen with TLS as well, and return that address."""
        assert self._runner is not None
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context).start()
        return f"https://localhost:{self._runner.addresses[-1][1]}"

    def base_url(self, provider: str) -> str:
        """Return the base_url of a model of this provider."""
        paths = {"openai_compatible": "/v1", "anthropic": "/anthropic", "gemini": "/gemini/v1beta"}
        return self.url + paths.get(provider, "/openai/v1")

    def play(self, *scenes: Scene) -> None:
        """Play these scenes for the next requests, one each."""
        self._scenes.extend(scenes)

    @property
    def connections(self) -> int:
        """Return how many connections are open, in use or not."""
        assert self._runner is not None and self._runner.server is not None
        return len(self._runner.server.connections)

    @property
    def problems(self) -> list[str]:
        return [problem for request in self.requests for problem in request.problems]

    async def wait_until(self, condition: Callable[[], bool], *, timeout: float = 10.0) -> None:
        """Return as soon as a condition on this server holds; raise TimeoutError when it does not in time."""
        async with asyncio.timeout(timeout):
            while not condition():
                await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _handler(self, provider: str) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.StreamResponse:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                return await self._serve(provider, request)
            except asyncio.CancelledError:
                self.disconnects += 1
                raise
            finally:
                self.in_flight -= 1
                self._notify()

        return handle

    async def _serve(self, provider: str, request: web.Request) -> web.StreamResponse:
        recorded = await _record(provider, request)
        self._served += 1
        if self._is_recording:
            self.requests.append(recorded)
        self._notify()
        if recorded.problems:
            return _error(recorded, 400, "invalid_request_error", "; ".join(recorded.problems))
        scene = self._scenes.popleft() if self._scenes else "success"
        if self._latency:
            await asyncio.sleep(self._latency)
        return await self._act(scene, recorded, request)

    async def _act(self, scene: Scene, recorded: Recorded, request: web.Request) -> web.StreamResponse:
        name = f"req-{self._served}"
        match scene:
            case "rate_limited":
                return _error(recorded, 429, "rate_limit_error", "slow down", {"retry-after": "7"})
            case "overloaded":
                return _error(recorded, 529, "overloaded_error", "overloaded")
            case "out_of_credit":
                return _error(recorded, 429, "insufficient_quota", "You exceeded your current quota")
            case "server_error":
                return _error(recorded, 500, "api_error", "it broke", {"x-request-id": name})
            case "unavailable":
                return _error(recorded, 503, "unavailable", "down for maintenance", {"retry-after": "3"})
            case "echo_key":
                return _error(recorded, 401, "authentication_error", f"Incorrect API key provided: {recorded.key}.")
            case "redirect":
                raise web.HTTPTemporaryRedirect(f"{self.url}/v1/chat/completions")
            case "not_json":
                return web.Response(text="<html>It works!</html>", content_type="text/html")
            case "slow":
                await asyncio.Event().wait()
            case "drip":
                return await _drip(request)
            case "dropped":
                assert request.transport is not None
                request.transport.close()
                return web.Response()
            case _:
                pass
        payload = _answer(scene, recorded, self._text(scene, recorded), name)
        body = json.dumps(payload)
        if scene == "truncated_json":
            return web.Response(text=body[: len(body) // 2], content_type="application/json")
        if scene == "broken_body":
            return await _broken(request, body)
        header = {"anthropic": "request-id", "gemini": "x-goog-other"}.get(recorded.provider, "x-request-id")
        return web.Response(text=body, content_type="application/json", headers={header: name})

    def _text(self, scene: Scene, recorded: Recorded) -> str:
        if scene == "answer_key":
            return f"The key is {recorded.key}"
        if callable(self.answer):
            text = self.answer(recorded)
        elif self.answer is not None:
            text = self.answer
        else:
            text = NOTE if recorded.schema is None else json.dumps(example(recorded.schema))
        return f"```json\n{text}\n```" if scene == "fenced" else text


async def _record(provider: str, request: web.Request) -> Recorded:
    headers = {name.lower(): value for name, value in request.headers.items()}
    try:
        body = json.loads(await request.text())
    except ValueError:
        body = None
    recorded = Recorded(provider, request.path, request.query_string, headers, body if isinstance(body, dict) else {})
    if not isinstance(body, dict):
        recorded.problems.append("the body is not a JSON object")
    else:
        recorded.problems.extend(_CHECKS[provider](recorded))
    if headers.get("content-type") != "application/json":
        recorded.problems.append("content-type is not application/json")
    if provider != "openai_compatible" and not recorded.key:
        recorded.problems.append("no API key")
    if recorded.key and recorded.key in f"{recorded.path}?{recorded.query}{json.dumps(body)}":
        recorded.problems.append("the API key is in the URL or the body")
    return recorded


async def _drip(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


async def _broken(request: web.Request, body: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "application/json", "content-length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2].encode())
    assert request.transport is not None
    request.transport.close()
    return response


# ---- answers ---------------------------------------------------------------------------------------------------------


def _error(
    recorded: Recorded, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> web.Response:
    error: dict[str, Any] = {"type": kind, "message": message}
    if recorded.provider == "gemini":
        error = {"code": status, "status": kind.upper(), "message": message}
        if kind == "insufficient_quota":
            error["type"] = kind
    elif recorded.provider != "anthropic":
        error |= {"param": None, "code": kind}
    body: dict[str, Any] = {"error": error}
    if recorded.provider == "anthropic":
        body |= {"type": "error", "request_id": "req-error"}
    return web.json_response(body, status=status, headers=headers)


def _answer(scene: Scene, recorded: Recorded, text: str, name: str) -> dict[str, Any]:
    """Return the vendor's answer: this text, or what the scene makes of it."""
    if scene == "cut_off":
        text = text[: len(text) // 2]
    elif scene in ("empty", "content_filter", "refusal"):
        text = ""
    if recorded.provider == "openai_responses":
        return _responses_answer(scene, recorded, text, name)
    if recorded.provider == "anthropic":
        return _anthropic_answer(scene, recorded, text, name)
    if recorded.provider == "gemini":
        return _gemini_answer(scene, recorded, text, name)
    finish = {"cut_off": "length", "content_filter": "content_filter"}.get(scene, "stop")
    message = {"role": "assistant", "content": text or None, "refusal": REFUSAL if scene == "refusal" else None}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "model": recorded.body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": INPUT_TOKENS,
            "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": INPUT_TOKENS + OUTPUT_TOKENS,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
        },
    }


def _responses_answer(scene: Scene, recorded: Recorded, text: str, name: str) -> dict[str, Any]:
    content = {"type": "output_text", "text": text, "annotations": []}
    if scene == "refusal":
        content = {"type": "refusal", "refusal": REFUSAL}
    reason = {"cut_off": "max_output_tokens", "content_filter": "content_filter"}.get(scene)
    return {
        "id": f"resp-{name}",
        "object": "response",
        "model": recorded.body["model"],
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "error": None,
        "output": [
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [content] if text or scene == "refusal" else []},
        ],
        "usage": {
            "input_tokens": INPUT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "input_tokens_details": {"cached_tokens": CACHED_TOKENS},
        },
    }


def _anthropic_answer(scene: Scene, recorded: Recorded, text: str, name: str) -> dict[str, Any]:
    is_refused = scene in ("refusal", "content_filter")
    thought = [{"type": "thinking", "thinking": "Hm.", "signature": "x"}] if "thinking" in recorded.body else []
    return {
        "id": f"msg-{name}",
        "type": "message",
        "role": "assistant",
        "model": recorded.body["model"],
        "content": [*thought, *([{"type": "text", "text": text}] if text else [])],
        "stop_reason": "refusal" if is_refused else "max_tokens" if scene == "cut_off" else "end_turn",
        "stop_details": {"type": "refusal", "explanation": REFUSAL} if is_refused else None,
        "usage": {
            "input_tokens": INPUT_TOKENS - CACHED_TOKENS - 10,
            "cache_read_input_tokens": CACHED_TOKENS,
            "cache_creation_input_tokens": 10,
            "output_tokens": OUTPUT_TOKENS,
        },
    }


def _gemini_answer(scene: Scene, recorded: Recorded, text: str, name: str) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "responseId": f"gem-{name}",
        "modelVersion": recorded.path.rpartition("/")[2].partition(":")[0],
        "usageMetadata": {
            "promptTokenCount": INPUT_TOKENS,
            "cachedContentTokenCount": CACHED_TOKENS,
            "candidatesTokenCount": OUTPUT_TOKENS - 8,
            "thoughtsTokenCount": 8,
        },
    }
    if scene == "content_filter":
        return payload | {"promptFeedback": {"blockReason": "SAFETY"}}
    finish = {"cut_off": "MAX_TOKENS", "refusal": "SAFETY"}.get(scene, "STOP")
    parts = [{"text": "Hm.", "thought": True}, {"text": text}] if text else []
    return payload | {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": finish}]}


def example(schema: Mapping[str, Any], root: Mapping[str, Any] | None = None) -> Any:
    """Return a JSON value that fits a JSON Schema of the kind that graders use."""
    root = schema if root is None else root
    if "$ref" in schema:
        target: Any = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return example(target, root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return example(schema[choice][0], root)
    kind = schema.get("type")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {name: example(inner, root) for name, inner in schema.get("properties", {}).items()}
        case "array":
            told = re.search(r"minItems: (\d+)", schema.get("description", ""))  # where a strict mode forbids it
            count = schema.get("minItems", int(told[1]) if told else 1)
            return [example(schema.get("items", {"type": "string"}), root) for _ in range(count)]
        case "integer" | "number" as number:
            low = schema.get("minimum", 0)
            middle = (low + schema.get("maximum", low + 100)) / 2
            return round(middle) if number == "integer" else middle
        case "boolean":
            return True
        case "null":
            return None
        case _:
            return "The note says so.".ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength", None)]


# ---- checks: what the vendor would refuse ----------------------------------------------------------------------------

_NUMBER = (int, float)
_SAMPLING = {"temperature": _NUMBER, "top_p": _NUMBER}


def _fields(
    where: str, body: Any, required: Mapping[str, Any], optional: Mapping[str, Any] | None = None
) -> Iterator[str]:
    if not isinstance(body, dict):
        yield f"{where} is not an object"
        return
    known = {**required, **(optional or {})}
    yield from (f"{where}.{name} is missing" for name in required if name not in body)
    for name, value in body.items():
        if name not in known:
            yield f"{where}.{name} is not a parameter"
        elif not isinstance(value, known[name]) or (isinstance(value, bool) and known[name] is not bool):
            yield f"{where}.{name} is {type(value).__name__}"


def _messages(messages: Any, roles: set[str]) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield "no messages"
        return
    for message in messages:
        yield from _fields("message", message, {"role": str, "content": str})
        if message.get("role") not in roles:
            yield f"role {message.get('role')!r} is not one of {sorted(roles)}"


_STRUCTURE = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf"}
_STRUCTURE |= {"$ref", "$defs", "definitions", "title", "description"}
_GEMINI_SCHEMA = (_STRUCTURE - {"const", "definitions"}) | {"$id", "$anchor", "format", "oneOf", "prefixItems"}
_GEMINI_SCHEMA |= {"minItems", "maxItems", "minimum", "maximum"}


def _strict_schema(schema: Any, keywords: set[str] = _STRUCTURE, where: str = "schema") -> Iterator[str]:
    if not isinstance(schema, dict):
        yield f"{where} is not an object"
        return
    yield from (f"{where}: keyword {keyword} is not permitted" for keyword in schema if keyword not in keywords)
    if "$ref" in schema and any(not keyword.startswith("$") for keyword in schema):
        yield f"{where}: $ref cannot have other keywords"
    if "properties" in schema:
        if schema.get("additionalProperties") is not False:
            yield f"{where}: additionalProperties must be false"
        if set(schema.get("required", ())) != set(schema["properties"]):
            yield f"{where}: every property must be required"
    children = [*schema.get("properties", {}).items(), *schema.get("$defs", {}).items()]
    children += [("items", schema["items"])] if "items" in schema else []
    children += [("anyOf", inner) for inner in schema.get("anyOf", [])]
    for name, inner in children:
        yield from _strict_schema(inner, keywords, f"{where}.{name}")


def _json_schema_format(value: Any) -> Iterator[str]:
    yield from _fields("json_schema", value, {"name": str, "strict": bool, "schema": dict}, {"description": str})
    if isinstance(value, dict) and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", str(value.get("name"))):
        yield "the schema's name is malformed"


def _check_chat(recorded: Recorded, *, is_openai: bool) -> Iterator[str]:
    body = recorded.body
    limit = "max_completion_tokens" if is_openai else "max_tokens"
    optional = {**_SAMPLING, limit: int, "stop": list, "seed": int, "reasoning_effort": str, "response_format": dict}
    optional |= {"logit_bias": dict, "user": str, "metadata": dict, "top_k": int}
    yield from _fields("body", body, {"model": str, "messages": list}, optional)
    yield from _messages(body.get("messages"), {"system", "user", "assistant"})
    if is_openai and "reasoning_effort" in body and body.keys() & _SAMPLING.keys():
        yield "reasoning models take no temperature and no top_p"
    if "response_format" in body:
        yield from _fields("response_format", body["response_format"], {"type": str, "json_schema": dict})
        yield from _json_schema_format(body["response_format"].get("json_schema"))
        if is_openai:
            yield from _strict_schema(recorded.schema)


def _check_responses(recorded: Recorded) -> Iterator[str]:
    body = recorded.body
    optional = {**_SAMPLING, "instructions": str, "max_output_tokens": int, "reasoning": dict, "text": dict}
    optional |= {"store": bool, "metadata": dict}
    yield from _fields("body", body, {"model": str, "input": list}, optional)
    yield from _messages(body.get("input"), {"user", "assistant"})
    if "reasoning" in body:
        yield from _fields("reasoning", body["reasoning"], {"effort": str}, {"summary": str})
        if body.keys() & _SAMPLING.keys():
            yield "reasoning models take no temperature and no top_p"
    if recorded.schema is not None:
        form = dict(body["text"]["format"])
        if form.pop("type", None) != "json_schema":
            yield "text.format.type is not json_schema"
        yield from _json_schema_format(form)
        yield from _strict_schema(recorded.schema)


def _check_anthropic(recorded: Recorded) -> Iterator[str]:
    body = recorded.body
    optional = {**_SAMPLING, "system": str, "stop_sequences": list, "thinking": dict, "output_config": dict}
    optional |= {"top_k": int, "metadata": dict}
    yield from _fields("body", body, {"model": str, "messages": list, "max_tokens": int}, optional)
    yield from _messages(body.get("messages"), {"user", "assistant"})
    if recorded.headers.get("anthropic-version") != "2023-06-01":
        yield "anthropic-version is missing"
    if "thinking" in body:
        if body.keys() & _SAMPLING.keys():
            yield "thinking takes no temperature and no top_p"
        thinking = body["thinking"]
        if thinking.get("type") == "enabled":
            yield from _fields("thinking", thinking, {"type": str, "budget_tokens": int})
            if not 1_024 <= thinking.get("budget_tokens", 0) < body.get("max_tokens", 0):
                yield "budget_tokens must be at least 1024 and less than max_tokens"
        else:
            yield from _fields("thinking", thinking, {"type": str})
    if "output_config" in body:
        yield from _fields("output_config", body["output_config"], {}, {"effort": str, "format": dict})
    if recorded.schema is not None:
        yield from _fields("format", body["output_config"]["format"], {"type": str, "schema": dict})
        yield from _strict_schema(recorded.schema)


def _check_gemini(recorded: Recorded) -> Iterator[str]:
    body = recorded.body
    optional = {"systemInstruction": dict, "generationConfig": dict, "safetySettings": list}
    yield from _fields("body", body, {"contents": list}, optional)
    for content in [*body.get("contents", []), body.get("systemInstruction", {"parts": [{"text": ""}]})]:
        yield from _fields("content", content, {"parts": list}, {"role": str})
        if content.get("role", "user") not in ("user", "model"):
            yield f"role {content['role']!r} is not user or model"
        for part in content.get("parts", []):
            yield from _fields("part", part, {"text": str})
    config = body.get("generationConfig", {})
    known = {"temperature": _NUMBER, "topP": _NUMBER, "topK": int, "maxOutputTokens": int, "stopSequences": list}
    known |= {"seed": int, "thinkingConfig": dict, "responseMimeType": str, "responseJsonSchema": dict}
    yield from _fields("generationConfig", config, {}, known)
    if not -(2**31) <= config.get("seed", 0) < 2**31:
        yield "seed is not an int32"
    if "thinkingConfig" in config:
        thinking = config["thinkingConfig"]
        yield from _fields("thinkingConfig", thinking, {}, {"thinkingBudget": int, "thinkingLevel": str})
        if len(thinking) != 1:
            yield "one of thinkingBudget and thinkingLevel"
    if recorded.schema is not None:
        if config.get("responseMimeType") != "application/json":
            yield "responseJsonSchema needs responseMimeType application/json"
        yield from _strict_schema(recorded.schema, _GEMINI_SCHEMA)


_CHECKS: Mapping[str, Callable[[Recorded], Iterator[str]]] = {
    "openai": lambda recorded: _check_chat(recorded, is_openai=True),
    "openai_compatible": lambda recorded: _check_chat(recorded, is_openai=False),
    "openai_responses": _check_responses,
    "anthropic": _check_anthropic,
    "gemini": _check_gemini,
}


# ---- as a program ----------------------------------------------------------------------------------------------------


async def _serve_forever(port: int, latency: float) -> None:
    stopped = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stopped.set)
    async with StubProvider(port=port, latency=latency, is_recording=False) as stub:
        print(stub.base_url("openai_compatible"), flush=True)
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve every vendor's API on 127.0.0.1, for benchmarks.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer")
    arguments = parser.parse_args()
    uvloop.run(_serve_forever(arguments.port, arguments.latency))


if __name__ == "__main__":
    main()
