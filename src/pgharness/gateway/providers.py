"""Wire formats: what each vendor is sent, and where its answers keep their parts.

Pure functions of their arguments: no I/O, no environment, no keys.

Parameters are a model's, overridden by the request's. These names mean the same with every vendor, and a vendor that
lacks one is not sent it: temperature, top_p, max_tokens, stop, seed, reasoning_effort, thinking_budget_tokens,
logprobs (true asks for the log-probabilities of the answer's tokens, of which its confidence is made). null unsets one.
Any other parameter goes into the body as it is; an object is merged into the object that is there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from pgharness.errors import RequestRejected
from pgharness.gateway.replies import Answer, Reply, at, confidence, count, decode, joined, objects, string, usage
from pgharness.types import Completion, ModelSpec, Request


class Call(NamedTuple):
    """One HTTP POST, without its key."""

    url: str
    headers: dict[str, str]
    body: dict[str, Any]


class WireFormat(Protocol):
    """What one vendor expects and how it answers; `key_env` names the variable of its key unless a model does."""

    key_env: str | None

    def encode(self, spec: ModelSpec, request: Request) -> Call:
        """Return the call that asks a vendor what is requested; raise RequestRejected when it cannot be asked."""

    def authorize(self, key: str) -> dict[str, str]:
        """Return the header that carries a key."""
        return {"authorization": f"Bearer {key}"}

    def answer(self, payload: Any) -> Answer:
        """Return the parts of an answer, whatever JSON the payload is."""

    def decode(self, spec: ModelSpec, request: Request, reply: Reply) -> Completion:
        """Return the completion that a reply holds, or raise the ModelError that it means."""
        return decode(spec, request, reply, read=self.answer, key_env=spec.api_key_env or self.key_env)


def wire_format(spec: ModelSpec) -> WireFormat:
    """Return the wire format of a model's provider."""
    try:
        return _WIRE_FORMATS[spec.provider]
    except KeyError:
        raise RequestRejected(f"model {spec.name!r}: provider {spec.provider!r} is not asked over HTTP") from None


# ---- vendors ---------------------------------------------------------------------------------------------------------

_OPENAI = "https://api.openai.com/v1"
_ANTHROPIC = "https://api.anthropic.com"
_GEMINI = "https://generativelanguage.googleapis.com/v1beta"


class OpenAIChat(WireFormat):
    """OpenAI's chat completions."""

    key_env: str | None = "OPENAI_API_KEY"
    base_url: str | None = _OPENAI

    def encode(self, spec: ModelSpec, request: Request) -> Call:
        asked = _asked(spec, request)
        is_reasoning = _is_reasoning(spec, request)
        body: dict[str, Any] = {
            "model": spec.model,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "stop": asked.stops,
            "seed": asked.seed_of(request),
            **self._limits(asked, is_reasoning),
        }
        if request.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": _schema_name(request),
                    "strict": True,
                    "schema": self._schema(spec, request.schema),
                },
            }
        return Call(_url(spec, spec.base_url or self.base_url, "/chat/completions"), {}, asked.complete(body))

    def _limits(self, asked: _Asked, is_reasoning: bool) -> dict[str, Any]:
        # max_tokens is deprecated here, and reasoning models refuse it as they refuse sampling parameters.
        return {
            "max_completion_tokens": asked.max_tokens,
            "reasoning_effort": asked.reasoning_effort or ("medium" if is_reasoning else None),
            **_openai_sampling(asked, is_reasoning),
        }

    def _schema(self, spec: ModelSpec, schema: Mapping[str, Any]) -> Any:
        return _openai_schema(spec, schema)

    def answer(self, payload: Any) -> Answer:
        choice = at(payload, "choices", 0)
        message, used = at(choice, "message"), at(payload, "usage")
        content = at(message, "content")
        return Answer(
            text=content if isinstance(content, str) else joined(content, "text"),
            finish_reason=string(at(choice, "finish_reason")),
            usage=usage(
                count(used, "prompt_tokens"),
                count(used, "completion_tokens"),
                count(used, "prompt_tokens_details", "cached_tokens"),
            ),
            id=string(at(payload, "id")),
            model=string(at(payload, "model")),
            refusal=string(at(message, "refusal")),
            confidence=confidence(at(choice, "logprobs", "content")),
        )


class CompatibleChat(OpenAIChat):
    """Chat completions of a server that speaks OpenAI's format: vLLM, llama.cpp, Ollama and many gateways."""

    key_env = None
    base_url = None

    def _limits(self, asked: _Asked, is_reasoning: bool) -> dict[str, Any]:
        # The older name is the one that every server knows, and local reasoning models do take a temperature.
        return {
            "max_tokens": asked.max_tokens,
            "reasoning_effort": asked.reasoning_effort,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "logprobs": asked.logprobs,
        }

    def _schema(self, spec: ModelSpec, schema: Mapping[str, Any]) -> Any:
        return dict(schema)  # whole: grammar-based servers enforce the keywords they know and ignore the others


class OpenAIResponses(WireFormat):
    """OpenAI's Responses API. It has neither `seed` nor `stop`."""

    key_env = "OPENAI_API_KEY"

    def encode(self, spec: ModelSpec, request: Request) -> Call:
        asked = _asked(spec, request)
        is_reasoning = _is_reasoning(spec, request)
        effort = asked.reasoning_effort or ("medium" if is_reasoning else None)
        sampling = _openai_sampling(asked, is_reasoning)
        body: dict[str, Any] = {
            "include": ["message.output_text.logprobs"] if sampling.pop("logprobs", None) else None,
            "model": spec.model,
            "instructions": _system(request),
            "input": _turns(request),
            "max_output_tokens": asked.max_tokens,
            "reasoning": {"effort": effort} if effort else None,
            **sampling,
            "store": False,  # prompts hold other people's words; keeping a copy at the vendor must be asked for
        }
        if request.schema is not None:
            schema = _openai_schema(spec, request.schema)
            name = _schema_name(request)
            body["text"] = {"format": {"type": "json_schema", "name": name, "strict": True, "schema": schema}}
        return Call(_url(spec, spec.base_url or _OPENAI, "/responses"), {}, asked.complete(body))

    def answer(self, payload: Any) -> Answer:
        parts = [
            part
            for item in objects(at(payload, "output"))
            if item.get("type") == "message"
            for part in objects(item.get("content"))
        ]
        used = at(payload, "usage")
        return Answer(
            text=joined(parts, "text", kind="output_text"),
            finish_reason=string(at(payload, "incomplete_details", "reason")) or string(at(payload, "status")),
            usage=usage(
                count(used, "input_tokens"),
                count(used, "output_tokens"),
                count(used, "input_tokens_details", "cached_tokens"),
            ),
            id=string(at(payload, "id")),
            model=string(at(payload, "model")),
            refusal=joined(parts, "refusal", kind="refusal") or None,
            confidence=confidence([token for part in parts for token in objects(part.get("logprobs"))]),
        )


class AnthropicMessages(WireFormat):
    """Anthropic's messages.

    A schema is sent as native structured output (`output_config.format`), not as a forced tool call: the API refuses
    a forced tool while the model thinks, and reasoning graders are common.

    A reasoning model thinks adaptively, steered by reasoning_effort. Models before 4.6 know only a fixed budget: give
    those thinking_budget_tokens, which newer ones refuse.
    """

    key_env = "ANTHROPIC_API_KEY"

    def encode(self, spec: ModelSpec, request: Request) -> Call:
        asked = _asked(spec, request)
        is_reasoning = _is_reasoning(spec, request)
        budget = asked.thinking_budget_tokens
        is_thinking = is_reasoning or budget is not None
        # max_tokens is required and bounds thinking and text together, so thinking must leave room for the text.
        max_tokens = asked.max_tokens or (16_384 if is_thinking and budget is None else 4_096)
        if budget is not None and max_tokens <= budget:
            max_tokens += budget
        thinking: dict[str, Any] | None = None
        if budget is not None:
            thinking = {"type": "enabled", "budget_tokens": budget}
        elif is_thinking:
            thinking = {"type": "adaptive"}
        output: dict[str, Any] = {}
        if asked.reasoning_effort:
            output["effort"] = asked.reasoning_effort
        if request.schema is not None:
            output["format"] = {"type": "json_schema", "schema": _narrow(_Same(request.schema), _STRICT_KEYWORDS)}
        body = {
            "model": spec.model,
            "max_tokens": max_tokens,
            "system": _system(request),
            "messages": _turns(request),
            "stop_sequences": asked.stops,
            "temperature": None if is_thinking else asked.temperature,
            "top_p": None if is_thinking else asked.top_p,
            "thinking": thinking,
            "output_config": output or None,
        }
        # A base_url is accepted with and without its version: Anthropic's own tools leave it out.
        url = _url(spec, (spec.base_url or _ANTHROPIC).rstrip("/").removesuffix("/v1"), "/v1/messages")
        return Call(url, {"anthropic-version": "2023-06-01"}, asked.complete(body))

    def authorize(self, key: str) -> dict[str, str]:
        return {"x-api-key": key}

    def answer(self, payload: Any) -> Answer:
        used = at(payload, "usage")
        cached = count(used, "cache_read_input_tokens")
        finish = string(at(payload, "stop_reason"))
        return Answer(
            text=joined(at(payload, "content"), "text", kind="text"),
            finish_reason=finish,
            usage=usage(
                # The vendor's input_tokens leave out what was read from and written to the cache.
                count(used, "input_tokens") + cached + count(used, "cache_creation_input_tokens"),
                count(used, "output_tokens"),
                cached,
            ),
            id=string(at(payload, "id")),
            model=string(at(payload, "model")),
            refusal=string(at(payload, "stop_details", "explanation")) if finish == "refusal" else None,
        )


class GeminiContent(WireFormat):
    """Google Gemini's generateContent.

    The schema goes into responseJsonSchema, which every model and proxy takes; the newer responseFormat is not yet
    understood everywhere. A model thinks by default: reasoning_effort is its thinkingLevel, and
    thinking_budget_tokens its thinkingBudget (for 2.5 models; the API refuses both at once).
    """

    key_env = "GEMINI_API_KEY"

    def encode(self, spec: ModelSpec, request: Request) -> Call:
        asked = _asked(spec, request)
        thinking: dict[str, Any] | None = None
        if asked.thinking_budget_tokens is not None:
            thinking = {"thinkingBudget": asked.thinking_budget_tokens}
        elif asked.reasoning_effort:
            thinking = {"thinkingLevel": asked.reasoning_effort}
        config: dict[str, Any] = {
            "maxOutputTokens": asked.max_tokens,
            "temperature": asked.temperature,
            "topP": asked.top_p,
            "stopSequences": asked.stops,
            "seed": asked.seed_of(request),
            "thinkingConfig": thinking,
            "responseLogprobs": asked.logprobs,
        }
        if request.schema is not None:
            config["responseMimeType"] = "application/json"
            config["responseJsonSchema"] = _narrow(_Same(request.schema), _GEMINI_KEYWORDS)
        system = _system(request)
        roles = {"user": "user", "assistant": "model"}
        body = {
            "systemInstruction": {"parts": [{"text": system}]} if system else None,
            "contents": [
                {"role": roles[message.role], "parts": [{"text": message.content}]}
                for message in request.messages
                if message.role != "system"
            ],
            "generationConfig": _present(config) or None,
        }
        model = spec.model if "/" in spec.model else f"models/{spec.model}"
        url = _url(spec, spec.base_url or _GEMINI, f"/{quote(model, safe='/')}:generateContent")
        return Call(url, {}, asked.complete(body))

    def authorize(self, key: str) -> dict[str, str]:
        return {"x-goog-api-key": key}

    def answer(self, payload: Any) -> Answer:
        candidate = at(payload, "candidates", 0)
        parts = [part for part in objects(at(candidate, "content", "parts")) if part.get("thought") is not True]
        used = at(payload, "usageMetadata")
        blocked = string(at(payload, "promptFeedback", "blockReason"))
        return Answer(
            text=joined(parts, "text"),
            finish_reason=string(at(candidate, "finishReason")) or blocked,
            usage=usage(
                count(used, "promptTokenCount"),
                count(used, "candidatesTokenCount") + count(used, "thoughtsTokenCount"),
                count(used, "cachedContentTokenCount"),
            ),
            id=string(at(payload, "responseId")),
            model=string(at(payload, "modelVersion")),
            refusal=f"the prompt was blocked: {blocked}" if blocked and not parts else None,
            confidence=confidence(at(candidate, "logprobsResult", "chosenCandidates"), "logProbability"),
        )


_WIRE_FORMATS: Mapping[str, WireFormat] = {
    "openai": OpenAIChat(),
    "openai_responses": OpenAIResponses(),
    "anthropic": AnthropicMessages(),
    "gemini": GeminiContent(),
    "openai_compatible": CompatibleChat(),
}


# ---- encoding --------------------------------------------------------------------------------------------------------


class _Asked(BaseModel):
    """The neutral parameters of one request; the others are its extras."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None
    thinking_budget_tokens: int | None = None
    logprobs: bool | None = None

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def seed_of(self, request: Request) -> int | None:
        """Return the seed of this try.

        A retry asks with the next seed, or a deterministic server would repeat the answer that was refused. Every
        vendor takes 31 bits.
        """
        seed = self.seed if "seed" in self.model_fields_set else request.seed
        return None if seed is None else (seed + request.attempt - 1) & 0x7FFF_FFFF

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body without what is unset and with the vendor's own parameters."""
        present = _present(body)
        return _merged(present, self.model_extra) if self.model_extra else present


_NAME = re.compile("[A-Za-z0-9_-]{1,64}")
NEUTRAL_PARAMETERS = tuple(_Asked.model_fields)


def _asked(spec: ModelSpec, request: Request) -> _Asked:
    if request.parameters:
        return _valid(spec.name, {**spec.parameters, **request.parameters})
    return _asked_of_all(spec.name, _Same(spec.parameters))


@lru_cache(maxsize=64)
def _asked_of_all(name: str, parameters: _Same) -> _Asked:
    return _valid(name, parameters.value)  # most calls of a model have no parameters of their own


def _valid(name: str, parameters: Mapping[str, Any]) -> _Asked:
    try:
        return _Asked.model_validate(parameters)
    except ValidationError as exc:
        wrong = exc.errors()[0]
        message = f"model {name!r}: parameter {wrong['loc'][0]}: {wrong['msg']}"
        raise RequestRejected(message, hint="Correct the parameters of the model or of the instance") from None


def _is_reasoning(spec: ModelSpec, request: Request) -> bool:
    return spec.is_reasoning or request.is_reasoning


def _openai_sampling(asked: _Asked, is_reasoning: bool) -> dict[str, Any]:
    # OpenAI refuses these from whoever asks a model to reason; with the effort "none" it does not reason.
    if is_reasoning or asked.reasoning_effort not in (None, "none"):
        return {}
    return {"temperature": asked.temperature, "top_p": asked.top_p, "logprobs": asked.logprobs}


def _present(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in extra.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return merged


def _system(request: Request) -> str | None:
    return "\n\n".join(message.content for message in request.messages if message.role == "system") or None


def _turns(request: Request) -> list[dict[str, str]]:
    return [
        {"role": message.role, "content": message.content} for message in request.messages if message.role != "system"
    ]


def _schema_name(request: Request) -> str:
    name = request.schema_name
    return name if _NAME.fullmatch(name) else re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64] or "answer"


def _url(spec: ModelSpec, base_url: str | None, path: str) -> str:
    return _joined_url(spec.name, base_url, path)


@lru_cache(maxsize=256)
def _joined_url(name: str, base_url: str | None, path: str) -> str:
    """Return a URL under a base URL; that one is stored and logged, so a secret in it is refused."""
    hint = "Set the model's base_url to the API's address with its version: http://host:8000/v1"
    if not base_url:
        raise RequestRejected(f"model {name!r} needs a base_url", hint=hint)
    try:
        parts = urlsplit(base_url)
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise RequestRejected(f"model {name!r}: its base_url is not an http:// or https:// URL", hint=hint)
    if "@" in parts.netloc or parts.query or parts.fragment:
        message = f"model {name!r}: its base_url must not hold a user name, a password or a query"
        raise RequestRejected(message, hint="Keep the key in an environment variable and name it in api_key_env")
    return base_url.rstrip("/") + path


# ---- schemas ---------------------------------------------------------------------------------------------------------

# What the strict modes of every vendor have in common. Each refuses a whole request for one keyword too many.
_STRICT_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "anyOf", "oneOf"}
    | {"$ref", "$defs", "definitions", "title", "description"}
)
_BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minItems", "maxItems"}
)
_OPENAI_KEYWORDS = _STRICT_KEYWORDS | _BOUNDS
_GEMINI_KEYWORDS = (_STRICT_KEYWORDS - {"const", "definitions"}) | {
    *("minimum", "maximum", "minItems", "maxItems", "prefixItems", "format", "$id", "$anchor")
}
_ANNOTATIONS = frozenset({"$schema", "$id", "$anchor", "$comment", "title", "default", "examples", "deprecated"})


def _openai_schema(spec: ModelSpec, schema: Mapping[str, Any]) -> Any:
    # OpenAI itself enforces bounds; its fine-tuned models and other hosts of its API still refuse them.
    knows_bounds = spec.base_url is None and not spec.model.startswith("ft:")
    return _narrow(_Same(schema), _OPENAI_KEYWORDS if knows_bounds else _STRICT_KEYWORDS)


class _Same:
    """An object that is equal to itself alone, so that a cache finds what was made of it without reading it."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


@lru_cache(maxsize=64)
def _narrow(schema: _Same, keywords: frozenset[str]) -> Any:
    return _narrowed(schema.value, keywords)  # all grades of a run are asked with one schema


def _narrowed(schema: Any, keywords: frozenset[str]) -> Any:
    """Return a schema of these keywords alone, in which every object is closed and all its properties are required.

    What fits it fits the original but for the constraints left out; those are told in the description instead, and
    whoever asked validates the answer with the full schema.
    """
    if not isinstance(schema, Mapping):
        return schema
    if "$ref" in schema:  # strict modes allow no keyword beside a reference
        schema = {name: value for name, value in schema.items() if name in ("$ref", "$defs")}
    narrow: dict[str, Any] = {}
    told: list[str] = []
    for keyword, value in schema.items():
        if keyword == "const" and keyword not in keywords:
            narrow["enum"] = [value]
        elif keyword not in keywords:
            if keyword not in _ANNOTATIONS:
                told.append(f"{keyword}: {json.dumps(value, ensure_ascii=False)}")
        elif keyword in ("properties", "$defs", "definitions"):
            narrow[keyword] = {name: _narrowed(inner, keywords) for name, inner in value.items()}
        elif keyword in ("anyOf", "oneOf", "prefixItems"):
            narrow["anyOf" if keyword == "oneOf" else keyword] = [_narrowed(inner, keywords) for inner in value]
        elif keyword == "items":
            narrow[keyword] = _narrowed(value, keywords)
        else:
            narrow[keyword] = value
    if "properties" in narrow:
        narrow["required"] = list(narrow["properties"])
        narrow["additionalProperties"] = False
    if told:
        lines = [narrow["description"]] if narrow.get("description") else []
        narrow["description"] = "\n".join([*lines, f"({'; '.join(told)})"])
    return narrow
