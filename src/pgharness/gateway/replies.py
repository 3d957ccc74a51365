"""What a model's HTTP reply means: a Completion, or the ModelError that says whether asking again can help.

The vendors differ in where an answer keeps its parts; what follows from the parts is the same for all of them and is
decided here. Every reader takes whatever JSON a server may send: a shape that nobody expected is an empty answer, never
an exception.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import orjson

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
from pgharness.types import Completion, ModelSpec, Request, Usage

LONGEST_MESSAGE = 2_000


class Reply(NamedTuple):
    """One HTTP response; header names are found in lower case, and `is_whole` is false when the connection broke."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    is_whole: bool = True


class Answer(NamedTuple):
    """The parts of a vendor's answer; `refusal` is the reason given when the model or a filter refused.

    `confidence` is made of its tokens' log-probabilities, where those were asked for.
    """

    text: str
    finish_reason: str | None
    usage: Usage
    id: str | None
    model: str | None
    refusal: str | None = None
    confidence: float | None = None


def decode(
    spec: ModelSpec, request: Request, reply: Reply, *, read: Callable[[Any], Answer], key_env: str | None
) -> Completion:
    """Return the completion that a reply holds, or raise the ModelError that it means.

    `read` finds the parts of the vendor's answer in its JSON, whatever that is; it never raises.
    """
    facts: dict[str, Any] = {
        "http_status": reply.status,
        "request_id": reply.headers.get("x-request-id") or reply.headers.get("request-id"),
    }
    is_success = 200 <= reply.status < 300
    if is_success and not reply.is_whole:
        message = f"{spec.name}: the connection broke in the middle of the answer"
        raise InvalidOutput(message, text=_text(reply), **facts)
    try:
        payload = _payload(reply)
    except ValueError:
        if is_success:
            hint = "Check that the model's base_url is the API's, with its version: http://host:8000/v1"
            raise InvalidOutput(f"{spec.name}: the reply is not JSON", text=_text(reply), hint=hint, **facts) from None
        payload = None
    if not is_success:
        raise _failure(spec, reply, reply.status, payload, facts, key_env)

    answer = read(payload)
    finish = _finish_reason(answer.finish_reason)
    facts["request_id"] = facts["request_id"] or answer.id
    known = {
        **facts,
        "finish_reason": finish,
        "input_tokens": answer.usage.input_tokens,
        "output_tokens": answer.usage.output_tokens,
        "cached_tokens": answer.usage.cached_tokens,
    }
    if error := at(payload, "error"):  # gateways and the Responses API report failures with status 200 as well
        raise _failure(spec, reply, _status_of(error), payload, known, key_env)
    if answer.refusal is not None or finish in _REFUSALS:
        known["finish_reason"] = finish if finish in _REFUSALS else "refusal"
        reason = f"{known['finish_reason']}: {_trimmed(answer.refusal or 'no reason given')}"
        raise Refused(f"{spec.name} refused: {reason}", text=answer.text or answer.refusal, **known)
    if finish == "length" and (request.schema is not None or not answer.text.strip()):
        hint = "Raise max_tokens in the model's parameters; tokens spent on reasoning count as well"
        raise InvalidOutput(f"{spec.name}: cut off at max_tokens", text=answer.text, hint=hint, **known)
    if not answer.text.strip():
        message = f"{spec.name}: the answer is empty (finish reason: {finish or 'none'})"
        raise InvalidOutput(message, text=answer.text or _text(reply), **known)
    return Completion(
        text=answer.text,
        data=None if request.schema is None else _data(spec, answer.text, known),
        usage=answer.usage,
        finish_reason=finish,
        request_id=facts["request_id"],
        model=answer.model,
        http_status=reply.status,
        confidence=answer.confidence,
    )


# ---- decoding --------------------------------------------------------------------------------------------------------

_FINISH_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("stop", "end_turn", "stop_sequence", "completed"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"), "length"),
}
_REFUSALS = frozenset(
    {"refusal", "content_filter", "safety", "recitation", "blocklist", "prohibited_content", "spii", "model_armor"}
)
_REFUSAL_CODES = frozenset({"content_filter", "content_policy_violation", "invalid_prompt"})
# A 429 with one of these is an empty account, not a busy one: waiting never helps.
_BILLING_CODES = frozenset(
    {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "billing_not_active"}
    | {"organization_spend_limit_exceeded", "project_spend_limit_exceeded", "organization_usage_limit_exceeded"}
    | {"enforced_spend_limit_reached"}
)
_FENCE = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*", re.DOTALL | re.IGNORECASE)


def _text(reply: Reply) -> str:
    return reply.body.decode("utf-8", "replace")


def _payload(reply: Reply) -> Any:
    try:
        return orjson.loads(reply.body)
    except ValueError:  # it is stricter than need be: half a character must not cost an answer
        return _loads(_text(reply))


def _finish_reason(word: str | None) -> str | None:
    return None if word is None else _FINISH_REASONS.get(word.lower(), word.lower())


def _data(spec: ModelSpec, text: str, known: Mapping[str, Any]) -> Any:
    try:
        return json_of(text)
    except ValueError as exc:
        raise InvalidOutput(f"{spec.name}: the answer is not JSON: {exc}", text=text, **known) from None


def _failure(
    spec: ModelSpec, reply: Reply, status: int, payload: Any, facts: Mapping[str, Any], key_env: str | None
) -> ModelError:
    """Return the error that an HTTP status and an error body mean."""
    if isinstance(payload, list):
        payload = at(payload, 0)
    error = at(payload, "error")
    words = (at(error, "type"), at(error, "code"), at(error, "details", "error_code"))
    codes = {word for word in words if isinstance(word, str)}
    said = (
        string(at(error, "message"))
        or string(error)
        or string(at(payload, "message"))
        or string(at(payload, "detail"))
        or _text(reply).strip()
        or "no message"
    )
    message = f"{spec.name} answered {status}: {_trimmed(said)}"
    known = {**facts, "http_status": status}
    known["request_id"] = known["request_id"] or string(at(payload, "request_id"))
    if codes & _REFUSAL_CODES:
        known["finish_reason"] = min(codes & _REFUSAL_CODES)
        return Refused(message, **known)
    wait = retry_after(reply.headers, payload)
    if codes & _BILLING_CODES:
        return RequestRejected(message, hint="The account has no credit left or has reached its spend limit", **known)
    if status in (429, 529):
        return RateLimited(message, retry_after=_ratelimit_reset(reply.headers) if wait is None else wait, **known)
    if status in (502, 503, 504):
        return Unavailable(message, retry_after=wait, **known)
    if status == 408:
        return TimedOut(message, retry_after=wait, **known)
    if status >= 500 or status == 409:  # 409: the vendor's own lock was taken
        return ServerFailed(message, retry_after=wait, **known)
    return RequestRejected(message, hint=_hint(spec, reply, said, key_env), **known)


def _hint(spec: ModelSpec, reply: Reply, said: str, key_env: str | None) -> str:
    if reply.status in (401, 403) or "api key" in said.lower():
        return f"Check the key in {key_env or 'a variable that api_key_env names'}, in the environment of the workers"
    if 300 <= reply.status < 400:
        return f"Set the model's base_url to where the server sends it: {reply.headers.get('location', 'not said')}"
    if reply.status == 402:
        return "The account has no credit left"
    if reply.status == 404:
        return f"Check the model's name ({spec.model!r}) and its base_url"
    return "Check the parameters; not every model takes temperature, reasoning_effort or thinking_budget_tokens"


def _status_of(error: Any) -> int:
    """Return the HTTP status that an error inside a successful reply would have had."""
    code = at(error, "code")
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return 429 if code == "rate_limit_exceeded" else 500


def retry_after(headers: Mapping[str, str], payload: Any) -> float | None:
    """Return the number of seconds that a server asked to wait, or None."""
    if milliseconds := _seconds(headers.get("retry-after-ms")):
        return milliseconds / 1_000
    if (seconds := _seconds(headers.get("retry-after"))) is not None:
        return seconds
    if (moment := _epoch(headers.get("retry-after"))) is not None:
        return max(0.0, moment - _server_time(headers))
    for detail in objects(at(payload, "error", "details")):  # Gemini's google.rpc.RetryInfo
        if (delay := _seconds(string(detail.get("retryDelay")))) is not None:
            return delay
    return None


def _ratelimit_reset(headers: Mapping[str, str]) -> float | None:
    """Return when the limit that ran out is whole again; the soonest when none says that it ran out."""
    limits = {
        kind: wait
        for kind in ("requests", "tokens")
        if (wait := _seconds(headers.get(f"x-ratelimit-reset-{kind}"))) is not None
    }
    exhausted = [wait for kind, wait in limits.items() if headers.get(f"x-ratelimit-remaining-{kind}") == "0"]
    if exhausted:
        return max(exhausted)
    if limits:
        return min(limits.values())
    reset = _seconds(headers.get("x-ratelimit-reset"))
    if reset is None or reset < 1e9:  # seconds; else an epoch, in milliseconds at some gateways
        return reset
    return max(0.0, (reset / 1_000 if reset > 1e11 else reset) - _server_time(headers))


def _seconds(text: str | None) -> float | None:
    """Return the seconds in '2', '1.5s', '120ms' or '6m0s', or None."""
    text = (text or "").strip()
    if re.fullmatch(r"\d{1,15}(\.\d+)?", text):
        return float(text)
    if not re.fullmatch(r"(\d{1,15}(\.\d+)?(ms|[dhms]))+", text):
        return None
    unit = {"ms": 0.001, "s": 1, "m": 60, "h": 3_600, "d": 86_400}
    return float(sum(float(number) * unit[name] for number, name in re.findall(r"([\d.]+)(ms|[dhms])", text)))


def _server_time(headers: Mapping[str, str]) -> float:
    return _epoch(headers.get("date")) or time.time()  # a server means its dates by its own clock


def _epoch(http_date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(http_date or "").timestamp()
    except (ValueError, OverflowError, OSError):
        return None


# ---- reading what anyone may have written ----------------------------------------------------------------------------


def json_of(text: str) -> Any:
    """Return the JSON that a text is, in a Markdown fence or not. Raises ValueError for any other text."""
    fenced = _FENCE.fullmatch(text)
    return _loads(fenced[1] if fenced else text)


def _loads(text: str) -> Any:
    """Parse JSON strictly: NaN and Infinity, which no jsonb can hold, are refused, and so is bottomless nesting.

    Integers of any length are kept as they are, which orjson does not do.
    """
    try:
        return _JSON.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


def at(value: Any, *path: str | int) -> Any:
    """Return what lies at a path into JSON, or None."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def string(value: Any) -> str | None:
    """Return a string that says something, or None."""
    return value if isinstance(value, str) and value else None


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of an array."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def joined(parts: Any, name: str, *, kind: str | None = None) -> str:
    """Return the text under a name in every object of an array, or in those of one type."""
    matching = (part for part in objects(parts) if kind is None or part.get("type") == kind)
    return "".join(string(part.get(name)) or "" for part in matching)


def count(value: Any, *path: str) -> int:
    """Return the number of tokens at a path, or 0."""
    number = at(value, *path)
    return max(0, number) if isinstance(number, int) and not isinstance(number, bool) else 0


def usage(input_tokens: int, output_tokens: int, cached_tokens: int) -> Usage:
    """Return a usage whose cached tokens are a part of its input, as every price assumes."""
    return Usage(input_tokens, output_tokens, min(cached_tokens, input_tokens))


def confidence(tokens: Any, name: str = "logprob") -> float | None:
    """Return the mean probability of an answer's tokens, from the log-probability under a name in each; None without.

    That is the mean of exp(logprob): 1 where the model saw no alternative to any token.
    """
    found = [at(token, name) for token in objects(tokens)]
    chances = [math.exp(min(value, 0.0)) for value in found if isinstance(value, float) or type(value) is int]
    return math.fsum(chances) / len(chances) if chances else None


def _trimmed(message: str) -> str:
    return message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 1] + "…"
