"""The wire formats, as pure functions: what a request becomes, and what a reply means."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from pgharness.gateway.providers import Call, wire_format
from pgharness.gateway.replies import LONGEST_MESSAGE, Reply, retry_after
from pgharness.types import Completion, Message, ModelSpec, Request, Usage
from stub_provider import PROVIDERS, example

TURNS = (Message("system", "You write notes."), Message("user", "Transcript"), Message("system", "Be brief."))
GRADE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "criteria": {
            "type": "array",
            "description": "One entry per criterion.",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "rationale": {"type": "string", "minLength": 1},
                    "satisfaction": {"type": "integer", "minimum": 0, "maximum": 100},
                },
                "required": ["rationale"],
            },
        },
        "verdict": {"const": "done"},
    },
    "additionalProperties": False,
}


def model(provider: str, **fields: Any) -> ModelSpec:
    fields.setdefault("base_url", "http://host:8000/v1" if provider == "openai_compatible" else None)
    return ModelSpec.model_validate({"id": 1, "name": f"test/{provider}", "provider": provider, "model": "m", **fields})


def encoded(provider: str, request: Request | None = None, **fields: Any) -> Call:
    spec = model(provider, **fields)
    return wire_format(spec).encode(spec, request or Request(messages=TURNS))


def decoded(
    provider: str, body: Any, *, status: int = 200, headers: dict[str, str] | None = None, schema: Any = None
) -> Completion:
    spec = model(provider)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wire_format(spec).decode(spec, Request(messages=TURNS, schema=schema), Reply(status, headers or {}, content))


def chat(text: str | None, finish: str = "stop", **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "model": "m-1", "choices": [{"message": {"content": text}, "finish_reason": finish}], **fields}


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "url", "body"),
    [
        (
            "openai",
            "https://api.openai.com/v1/chat/completions",
            {
                "messages": [
                    {"role": "system", "content": "You write notes."},
                    {"role": "user", "content": "Transcript"},
                    {"role": "system", "content": "Be brief."},
                ]
            },
        ),
        (
            "openai_responses",
            "https://api.openai.com/v1/responses",
            {
                "instructions": "You write notes.\n\nBe brief.",
                "input": [{"role": "user", "content": "Transcript"}],
                "store": False,
            },
        ),
        (
            "anthropic",
            "https://api.anthropic.com/v1/messages",
            {
                "system": "You write notes.\n\nBe brief.",
                "messages": [{"role": "user", "content": "Transcript"}],
                "max_tokens": 4096,
            },
        ),
    ],
)
def test_a_plain_request_says_what_was_asked_and_nothing_else(provider: str, url: str, body: dict[str, Any]) -> None:
    call = encoded(provider)
    assert call.url == url
    assert call.body == {"model": "m", **body}


def test_a_gemini_request_names_the_model_in_its_path() -> None:
    call = encoded("gemini", Request(messages=(*TURNS, Message("assistant", "Draft"), Message("user", "Again"))))
    assert call.url == "https://generativelanguage.googleapis.com/v1beta/models/m:generateContent"
    assert call.body == {
        "systemInstruction": {"parts": [{"text": "You write notes.\n\nBe brief."}]},
        "contents": [
            {"role": "user", "parts": [{"text": "Transcript"}]},
            {"role": "model", "parts": [{"text": "Draft"}]},
            {"role": "user", "parts": [{"text": "Again"}]},
        ],
    }
    assert encoded("gemini", model="tunedModels/a b").url.endswith("/tunedModels/a%20b:generateContent")


NEUTRAL = {"temperature": 0.2, "top_p": 0.9, "max_tokens": 5000, "stop": "END", "seed": 7}


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("openai", {"temperature": 0.2, "top_p": 0.9, "max_completion_tokens": 5000, "stop": ["END"], "seed": 7}),
        ("openai_compatible", {"temperature": 0.2, "top_p": 0.9, "max_tokens": 5000, "stop": ["END"], "seed": 7}),
        ("openai_responses", {"temperature": 0.2, "top_p": 0.9, "max_output_tokens": 5000, "store": False}),
        ("anthropic", {"temperature": 0.2, "top_p": 0.9, "max_tokens": 5000, "stop_sequences": ["END"]}),
        (
            "gemini",
            {
                "generationConfig": {
                    **{"temperature": 0.2, "topP": 0.9, "maxOutputTokens": 5000, "stopSequences": ["END"]},
                    "seed": 7,
                }
            },
        ),
    ],
)
def test_neutral_parameters_take_each_vendors_names(provider: str, expected: dict[str, Any]) -> None:
    body = encoded(provider, parameters=NEUTRAL).body
    plain = {"model", "messages", "input", "instructions", "system", "contents", "systemInstruction"}
    assert {name: value for name, value in body.items() if name not in plain} == expected


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_requests_parameters_override_the_models_and_null_unsets(provider: str) -> None:
    request = Request(messages=TURNS, parameters={"temperature": 0.7, "stop": None, "max_tokens": 99})
    body = encoded(provider, request, parameters={"temperature": 0.1, "stop": ["x"], "max_tokens": 1}).body
    text = json.dumps(body)
    assert "0.7" in text and "99" in text and "0.1" not in text and "stop" not in text.lower()


@pytest.mark.parametrize(
    ("provider", "extras", "expected"),
    [
        ("openai", {"logit_bias": {"50256": -100}}, {"logit_bias": {"50256": -100}}),
        (
            "openai_responses",
            {"reasoning": {"summary": "auto"}},
            {"reasoning": {"effort": "medium", "summary": "auto"}},
        ),
        (
            "anthropic",
            {"output_config": {"effort": "max"}, "top_k": 3},
            {"output_config": {"effort": "max"}, "top_k": 3},
        ),
        ("gemini", {"generationConfig": {"topK": 3}}, {"generationConfig": {"temperature": 1.0, "topK": 3}}),
        ("gemini", {"safetySettings": []}, {"safetySettings": []}),
        ("openai_compatible", {"top_k": 3, "cache": None}, {"top_k": 3, "cache": None}),
    ],
)
def test_other_parameters_pass_through_and_merge(
    provider: str, extras: dict[str, Any], expected: dict[str, Any]
) -> None:
    request = Request(messages=TURNS, is_reasoning=provider == "openai_responses")
    body = encoded(provider, request, parameters={"temperature": 1, **extras}).body
    assert {name: body[name] for name in expected} == expected


@pytest.mark.parametrize("bad", [{"max_tokens": "many"}, {"temperature": "hot"}, {"stop": [1]}, {"seed": 1.5}])
def test_a_parameter_of_a_wrong_type_is_named(bad: dict[str, Any]) -> None:
    with pytest.raises(RequestRejected, match=next(iter(bad))):
        encoded("openai", parameters=bad)


def test_a_seed_fits_31_bits_and_changes_with_the_attempt() -> None:
    first = encoded("openai", Request(messages=TURNS, seed=2**63 - 1)).body["seed"]
    second = encoded("openai", Request(messages=TURNS, seed=2**63 - 1, attempt=2)).body["seed"]
    assert first == 2**31 - 1 and second == 0
    assert "seed" not in encoded("openai").body


@pytest.mark.parametrize(
    ("provider", "parameters", "expected"),
    [
        ("openai", {}, {"reasoning_effort": "medium"}),
        ("openai", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ("openai_responses", {}, {"reasoning": {"effort": "medium"}}),
        ("openai_responses", {"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}),
        ("anthropic", {}, {"thinking": {"type": "adaptive"}, "max_tokens": 16_384}),
        (
            "anthropic",
            {"reasoning_effort": "high", "max_tokens": 900},
            {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}, "max_tokens": 900},
        ),
        (
            "anthropic",
            {"thinking_budget_tokens": 8000},
            {"thinking": {"type": "enabled", "budget_tokens": 8000}, "max_tokens": 12_096},
        ),
        (
            "anthropic",
            {"thinking_budget_tokens": 2000, "max_tokens": 9000},
            {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 9000},
        ),
        ("gemini", {"reasoning_effort": "low"}, {"generationConfig": {"thinkingConfig": {"thinkingLevel": "low"}}}),
        (
            "gemini",
            {"thinking_budget_tokens": 512, "reasoning_effort": "low"},
            {"generationConfig": {"thinkingConfig": {"thinkingBudget": 512}}},
        ),
        ("openai_compatible", {"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
    ],
)
def test_a_reasoning_model_is_asked_to_think(
    provider: str, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    for spec, request in (({"is_reasoning": True}, False), ({}, True)):
        body = encoded(provider, Request(messages=TURNS, is_reasoning=request), parameters=parameters, **spec).body
        assert {name: body[name] for name in expected} == expected


@pytest.mark.parametrize("provider", ["openai", "openai_responses", "anthropic"])
def test_a_reasoning_model_is_sent_no_sampling_parameters(provider: str) -> None:
    body = encoded(provider, is_reasoning=True, parameters={"temperature": 0.2, "top_p": 0.5}).body
    assert not {"temperature", "top_p"} & body.keys()


@pytest.mark.parametrize(
    "base_url",
    [
        *("ftp://host/v1", "host:8000/v1", "http://", "http://[", "http://host:99999/v1", "http://host:0"),
        *("http://me:secret@host/v1", "https://host/v1?key=secret", "https://host/v1#secret"),
    ],
)
def test_an_unusable_base_url_is_refused_without_repeating_it(base_url: str) -> None:
    for provider in PROVIDERS:
        with pytest.raises(RequestRejected, match="base_url") as caught:
            encoded(provider, base_url=base_url)
        assert "secret" not in f"{caught.value}{caught.value.hint}"


def test_a_compatible_server_needs_a_base_url() -> None:
    with pytest.raises(RequestRejected, match="needs a base_url"):
        encoded("openai_compatible", base_url=None)


@pytest.mark.parametrize("base_url", ["http://host/proxy", "http://host/proxy/", "http://host/proxy/v1"])
def test_anthropics_base_url_may_have_its_version(base_url: str) -> None:
    assert encoded("anthropic", base_url=base_url).url == "http://host/proxy/v1/messages"


def test_a_provider_without_http_is_refused() -> None:
    with pytest.raises(RequestRejected, match="simulator"):
        wire_format(model("simulator"))


# ---- schemas ---------------------------------------------------------------------------------------------------------


def sent_schema(provider: str, schema: Any = GRADE_SCHEMA, **fields: Any) -> Any:
    body = encoded(provider, Request(messages=TURNS, schema=schema, schema_name="grade of note 1"), **fields).body
    if provider == "openai_responses":
        assert body["text"]["format"]["strict"] is True and body["text"]["format"]["name"] == "grade_of_note_1"
        return body["text"]["format"]["schema"]
    if provider == "anthropic":
        assert "tools" not in body
        return body["output_config"]["format"]["schema"]
    if provider == "gemini":
        assert body["generationConfig"]["responseMimeType"] == "application/json"
        return body["generationConfig"]["responseJsonSchema"]
    form = body["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
    assert form["json_schema"]["name"] == "grade_of_note_1"
    return form["json_schema"]["schema"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_schema_that_was_asked_for_is_not_changed(provider: str) -> None:
    original = copy.deepcopy(GRADE_SCHEMA)
    sent_schema(provider)
    assert original == GRADE_SCHEMA


@pytest.mark.parametrize("provider", PROVIDERS)
def test_what_fits_the_schema_that_is_sent_fits_the_one_asked_for(provider: str) -> None:
    sent = sent_schema(provider)
    answer = example(sent)
    assert set(answer) == {"criteria", "verdict"} and len(answer["criteria"]) == 2
    assert 0 <= answer["criteria"][0]["satisfaction"] <= 100
    jsonschema.validate(answer, sent)
    jsonschema.validate(answer, GRADE_SCHEMA)


def test_a_strict_schema_is_closed_requires_everything_and_tells_what_it_cannot_enforce() -> None:
    schema = sent_schema("anthropic")
    criteria = schema["properties"]["criteria"]
    assert criteria["items"]["required"] == ["rationale", "satisfaction"]
    assert criteria["items"]["additionalProperties"] is False
    assert criteria["description"] == "One entry per criterion.\n(minItems: 2; maxItems: 2)"
    assert criteria["items"]["properties"]["satisfaction"] == {
        "type": "integer",
        "description": "(minimum: 0; maximum: 100)",
    }
    assert "$schema" not in schema and schema["required"] == ["criteria", "verdict"]


def test_openai_enforces_bounds_but_its_fine_tuned_models_and_other_hosts_do_not() -> None:
    def bounds(**fields: Any) -> Any:
        schema = sent_schema("openai", **fields)
        return schema["properties"]["criteria"]["items"]["properties"]["satisfaction"].get("maximum")

    assert bounds() == 100
    assert bounds(model="ft:m") is None
    assert bounds(base_url="https://mine.example.com/openai/v1") is None


def test_gemini_keeps_bounds_and_takes_a_constant_as_an_enum() -> None:
    schema = sent_schema("gemini")
    assert schema["properties"]["criteria"]["minItems"] == 2
    assert schema["properties"]["verdict"] == {"enum": ["done"]}


def test_a_compatible_server_is_sent_the_whole_schema() -> None:
    assert sent_schema("openai_compatible") == GRADE_SCHEMA


def test_references_and_choices_survive_narrowing() -> None:
    schema = {
        "type": "object",
        "properties": {
            "one": {"$ref": "#/$defs/score", "description": "dropped"},
            "two": {"oneOf": [{"type": "null"}, {"type": "string", "pattern": "^a"}]},
            "three": {"type": "object", "properties": {"x": True}},
        },
        "$defs": {"score": {"type": "number", "minimum": 0}},
    }
    sent = sent_schema("anthropic", schema)
    assert sent["properties"]["one"] == {"$ref": "#/$defs/score"}
    assert sent["properties"]["two"]["anyOf"][1] == {"type": "string", "description": '(pattern: "^a")'}
    assert sent["$defs"]["score"] == {"type": "number", "description": "(minimum: 0)"}
    assert sent["properties"]["three"]["properties"] == {"x": True}


# ---- replies ---------------------------------------------------------------------------------------------------------

ERRORS: list[tuple[int, Any, type[ModelError]]] = [
    (400, {"error": {"message": "bad temperature"}}, RequestRejected),
    (400, {"error": {"message": "filtered", "code": "content_filter"}}, Refused),
    (401, {"error": {"message": "no"}}, RequestRejected),
    (402, {"error": {"message": "pay"}}, RequestRejected),
    (403, {"type": "error", "error": {"type": "permission_error", "message": "no"}}, RequestRejected),
    (404, {"detail": "Not Found"}, RequestRejected),
    (408, b"", TimedOut),
    (409, {"error": {"message": "lock"}}, ServerFailed),
    (413, b"<html>too large</html>", RequestRejected),
    (422, {"detail": [{"loc": ["body"], "msg": "field required"}]}, RequestRejected),
    (429, {"error": {"message": "slow", "type": "tokens", "code": "rate_limit_exceeded"}}, RateLimited),
    (429, {"error": {"message": "pay", "type": "insufficient_quota", "code": "x"}}, RequestRejected),
    (429, {"error": {"message": "pay", "type": "y", "code": "credit_balance_exhausted"}}, RequestRejected),
    (
        429,
        {"error": {"type": "rate_limit_error", "details": {"error_code": "enforced_spend_limit_reached"}}},
        RequestRejected,
    ),
    (429, [{"error": {"code": 429, "message": "slow", "status": "RESOURCE_EXHAUSTED"}}], RateLimited),
    (500, {"error": {"message": "oops"}}, ServerFailed),
    (501, b"", ServerFailed),
    (502, b"<html>bad gateway</html>", Unavailable),
    (503, {"error": "loading model"}, Unavailable),
    (504, {"error": {"code": 504, "status": "DEADLINE_EXCEEDED"}}, Unavailable),
    (529, {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}, RateLimited),
    (307, b"", RequestRejected),
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("status", "body", "kind"), ERRORS, ids=[f"{e[0]}-{e[2].__name__}" for e in ERRORS])
def test_a_status_means_the_same_with_every_vendor(
    provider: str, status: int, body: Any, kind: type[ModelError]
) -> None:
    with pytest.raises(ModelError) as caught:
        decoded(provider, body, status=status, headers={"x-request-id": "r1"})
    assert type(caught.value) is kind
    assert caught.value.http_status == status
    assert caught.value.request_id == "r1"
    assert kind is not RequestRejected or caught.value.hint


def test_the_servers_message_is_kept_and_trimmed() -> None:
    with pytest.raises(RequestRejected) as caught:
        decoded("openai", {"error": {"message": "temperature is too hot " + "x" * 5000}}, status=400)
    assert "temperature is too hot" in str(caught.value)
    assert len(str(caught.value)) < LONGEST_MESSAGE + 100


@pytest.mark.parametrize(
    ("status", "message", "word"),
    [(401, "no", "OPENAI_API_KEY"), (400, "API key not valid.", "OPENAI_API_KEY"), (404, "no such model", "'m'")],
)
def test_a_rejection_says_what_to_check(status: int, message: str, word: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        decoded("openai", {"error": {"message": message}}, status=status)
    assert word in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "7"}, None, 7),
        ({"retry-after": "0.5"}, None, 0.5),
        ({"retry-after-ms": "250", "retry-after": "7"}, None, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None, 10),
        ({"retry-after": "Wed, 21 Oct 2020 07:28:00 GMT"}, None, 0),
        ({}, {"error": {"details": [{"@type": "…/google.rpc.RetryInfo", "retryDelay": "34.5s"}]}}, 34.5),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": "-3"}, None, None),
        ({"retry-after": "9" * 400}, None, None),
        ({"retry-after": "Wed, 99 Oct 20266 07:28:00 GMT"}, {"error": [1]}, None),
        ({}, None, None),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], body: Any, seconds: float | None) -> None:
    assert retry_after(headers, body) == seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x-ratelimit-reset-requests": "120ms", "x-ratelimit-reset-tokens": "6m0s"}, 0.12),
        (
            {
                "x-ratelimit-reset-requests": "120ms",
                "x-ratelimit-reset-tokens": "6m0s",
                "x-ratelimit-remaining-tokens": "0",
            },
            360,
        ),
        ({"x-ratelimit-reset": "30"}, 30),
        ({"x-ratelimit-reset": "1792567690000", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10),
        ({"x-ratelimit-reset": "1792567690", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10),
        ({"x-ratelimit-reset-requests": "1s", "retry-after": "4"}, 4),
    ],
)
def test_a_rate_limit_says_when_it_is_whole_again(headers: dict[str, str], seconds: float) -> None:
    with pytest.raises(RateLimited) as caught:
        decoded("openai", {"error": {"message": "slow"}}, status=429, headers=headers)
    assert caught.value.retry_after == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "server_error", "message": "oops"}, ServerFailed),
        ({"code": "rate_limit_exceeded", "message": "slow"}, RateLimited),
        ({"code": "invalid_prompt", "message": "flagged"}, Refused),
        ({"code": 429, "message": "slow"}, RateLimited),
        ({"code": 502, "message": "upstream"}, Unavailable),
    ],
)
def test_an_error_inside_a_successful_reply_is_an_error(error: dict[str, Any], kind: type[ModelError]) -> None:
    used = {"input_tokens": 5, "output_tokens": 1}
    with pytest.raises(kind) as caught:
        decoded("openai_responses", {"status": "failed", "error": error, "usage": used})
    assert (caught.value.input_tokens, caught.value.output_tokens) == (5, 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}',
        '```json\n{"a": 1}\n```',
        '\n```\n{\n"a": 1\n}\n```\n',
        ' ```JSON\n{"a": 1}\n  ```  ',
    ],
)
def test_json_is_read_with_and_without_a_fence(text: str) -> None:
    assert decoded("openai", chat(text), schema={"type": "object"}).data == {"a": 1}


def test_a_fence_inside_the_json_stays() -> None:
    text = json.dumps({"a": "```json\n1\n```"})
    assert decoded("openai", chat(f"```json\n{text}\n```"), schema={}).data == {"a": "```json\n1\n```"}


@pytest.mark.parametrize("text", ["{", 'Here: {"a": 1}', '{"a": NaN}', '{"a": 1e999}', "[" * 100_000, "1" * 5000])
def test_an_answer_that_is_not_json_keeps_its_text_and_its_cost(text: str) -> None:
    used = {"prompt_tokens": 9, "completion_tokens": 3}
    with pytest.raises(InvalidOutput, match="not JSON") as caught:
        decoded("openai", chat(text, usage=used), schema={"type": "object"})
    assert caught.value.text == text
    assert (caught.value.input_tokens, caught.value.output_tokens) == (9, 3)


def test_an_answer_without_a_schema_is_not_parsed() -> None:
    completion = decoded("openai", chat('{"a": 1}'))
    assert completion.data is None and completion.text == '{"a": 1}'


def test_a_cut_off_answer_is_usable_only_as_free_text() -> None:
    assert decoded("openai", chat("half a no", "length")).finish_reason == "length"
    for body, schema in ((chat('{"a"', "length"), {}), (chat(None, "length"), None)):
        with pytest.raises(InvalidOutput, match="cut off at max_tokens") as caught:
            decoded("openai", body, schema=schema)
        assert "max_tokens" in (caught.value.hint or "")


def test_a_reply_that_broke_off_is_invalid_and_keeps_what_came() -> None:
    spec = model("openai")
    with pytest.raises(InvalidOutput, match="connection broke") as caught:
        reply = Reply(200, {}, b'{"choices": [', is_whole=False)
        wire_format(spec).decode(spec, Request(messages=TURNS), reply)
    assert caught.value.text == '{"choices": ['


def test_a_number_of_any_length_arrives_as_it_was_written() -> None:
    text = '{"id": 123456789012345678901234567890, "ratio": 0.1}'
    assert decoded("openai", chat(text), schema={"type": "object"}).data == json.loads(text)


@pytest.mark.parametrize("answer", [b'"half: \\ud800"', b'"half: \xc3"'])
def test_half_a_character_does_not_cost_an_answer(answer: bytes) -> None:
    body = b'{"choices": [{"message": {"content": %b}, "finish_reason": "stop"}]}' % answer
    assert decoded("openai", body).text[:6] == "half: "


@pytest.mark.parametrize("answer", ['{"a": NaN}', '{"a": 1e999}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}"])
def test_what_no_database_can_hold_is_no_json(answer: str) -> None:
    with pytest.raises(InvalidOutput, match="the answer is not JSON"):
        decoded("openai", chat(answer), schema={"type": "object"})
    with pytest.raises(InvalidOutput, match="the reply is not JSON"):
        decoded("openai", answer.encode())


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}
    assert decoded("openai_compatible", body).text == "ab"


def test_anthropics_input_tokens_include_the_cache() -> None:
    used = {"input_tokens": 3, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 4, "output_tokens": 2}
    body = {"content": [{"type": "text", "text": "a"}], "stop_reason": "end_turn", "usage": used}
    assert decoded("anthropic", body).usage == Usage(27, 2, 20)


def test_geminis_thoughts_are_output() -> None:
    used = {"promptTokenCount": 10, "candidatesTokenCount": 2, "thoughtsTokenCount": 5, "cachedContentTokenCount": 4}
    parts = [{"text": "Hm.", "thought": True}, {"text": "a", "thoughtSignature": "x"}]
    body = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "usageMetadata": used}
    completion = decoded("gemini", body)
    assert completion.text == "a" and completion.usage == Usage(10, 7, 4)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_schema_that_is_asked_with_again_is_the_same_and_another_is_not(provider: str) -> None:
    def asked(schema: dict[str, Any]) -> str:
        return json.dumps(encoded(provider, Request(messages=TURNS, schema=schema)).body)

    narrow, wide = ({"type": "object", "properties": {name: {"type": "string"}}} for name in ("a", "b"))
    first = asked(narrow)
    assert '"a"' not in asked(wide) and '"b"' in asked(wide)
    assert asked(narrow) == first == asked(dict(narrow))


FIELD_NAMES = st.sampled_from(
    [
        *("choices", "message", "content", "finish_reason", "usage", "prompt_tokens", "prompt_tokens_details"),
        *("cached_tokens", "error", "code", "type", "output", "text", "status", "incomplete_details", "reason"),
        *("stop_reason", "candidates", "parts", "finishReason", "usageMetadata", "details", "promptFeedback"),
        *("blockReason", "retryDelay", "@type", "id", "model", "refusal"),
    ]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD_NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(provider=st.sampled_from(PROVIDERS), status=st.sampled_from([200, 400, 429, 503]), body=JSON_VALUES)
def test_whatever_a_server_says_only_a_completion_or_a_model_error_comes_out(
    provider: str, status: int, body: Any
) -> None:
    with contextlib.suppress(ModelError):
        decoded(provider, body, status=status, schema={"type": "object"})


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(["retry-after", "retry-after-ms", "date", "x-ratelimit-reset"]), value=st.text(max_size=40))
def test_whatever_a_header_says_a_wait_is_never_negative(name: str, value: str) -> None:
    with pytest.raises(RateLimited) as caught:
        decoded("openai", {}, status=429, headers={"retry-after": "x", name: value})
    assert caught.value.retry_after is None or caught.value.retry_after >= 0


# ---- confidence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("openai", {"logprobs": True}),
        ("openai_compatible", {"logprobs": True}),
        ("openai_responses", {"include": ["message.output_text.logprobs"]}),
        ("gemini", {"generationConfig": {"responseLogprobs": True}}),
        ("anthropic", {}),
    ],
)
def test_log_probabilities_are_asked_for_in_each_vendors_words(provider: str, expected: dict[str, Any]) -> None:
    plain = encoded(provider).body
    body = encoded(provider, parameters={"logprobs": True}).body
    assert {name: value for name, value in body.items() if name not in plain} == expected
    if provider.startswith("openai") and provider != "openai_compatible":
        body = encoded(provider, is_reasoning=True, parameters={"logprobs": True}).body
        assert not expected.keys() & body.keys(), "a model that reasons refuses them"


TOKENS = [{"token": "Par", "logprob": -0.5}, {"token": "is", "logprob": 0.0}, {"token": "!", "logprob": -9999.0}]
MEAN = (math.exp(-0.5) + 1 + 0) / 3


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        ("openai", {"choices": [{"message": {"content": "Paris!"}, "logprobs": {"content": TOKENS}}]}),
        ("openai_compatible", {"choices": [{"message": {"content": "Paris!"}, "logprobs": {"content": TOKENS}}]}),
        (
            "openai_responses",
            {
                "output": [
                    {"type": "reasoning"},
                    *[
                        {"type": "message", "content": [{"type": "output_text", "text": "P", "logprobs": tokens}]}
                        for tokens in (TOKENS[:1], TOKENS[1:])
                    ],
                ]
            },
        ),
        (
            "gemini",
            {
                "candidates": [
                    {
                        "content": {"parts": [{"text": "Paris!"}]},
                        "avgLogprobs": -3.0,
                        "logprobsResult": {
                            "chosenCandidates": [{"logProbability": token["logprob"]} for token in TOKENS]
                        },
                    }
                ]
            },
        ),
    ],
)
def test_the_confidence_of_an_answer_is_the_mean_probability_of_its_tokens(provider: str, body: Any) -> None:
    assert decoded(provider, body).confidence == pytest.approx(MEAN)


@pytest.mark.parametrize("tokens", [None, [], {}, "x", [None, "x", {}, {"logprob": "high"}, {"logprob": True}]])
def test_without_log_probabilities_there_is_no_confidence(tokens: Any) -> None:
    choice = {"message": {"content": "Paris"}, "logprobs": {"content": tokens}}
    assert decoded("openai", {"choices": [choice]}).confidence is None
    assert decoded("openai", chat("Paris", logprobs=tokens)).confidence is None
