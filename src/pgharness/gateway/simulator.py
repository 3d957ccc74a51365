"""A model that needs no network: seeded answers that read like notes, grades and short answers.

The same request always gets the same answer, fault and latency: everything random comes from one digest of the model's
name, the request's seed and its attempt. Another replication is another seed; a retry is another attempt, so an attempt
has to be counted even where it was not spent (a rate limit), or the same fault comes back.

A note repeats more or fewer facts of its case; that is its hidden quality, and the only thing a simulated grader can
find out about it. So good simulated models score better than bad ones, by a real path through the data.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import json
import math
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json

from pgharness.errors import InvalidOutput, RateLimited, Refused, RequestRejected, ServerFailed, TimedOut
from pgharness.types import Completion, ModelSpec, Request, Usage

_Parameters = TypeVar("_Parameters", bound=BaseModel)
_NORMAL = NormalDist()
_UNIT = 2.0**-64
_CLINICIANS = frozenset({"clinician", "doctor", "dr", "gp", "nurse", "physician", "provider", "therapist"})
_TELLING_WORD = re.compile(
    r"(?!(?:about|after|also|been|both|does|each|from|have|must|notes?|other|patient|should|that|their|them|then|there|"
    r"these|they|this|those|were|what|when|where|which|while|whether|will|with|without|your|documents|documented|"
    r"mentions|states|includes|records|clearly|correctly)\b)\b[^\W\d_][^\W_]{3,}|\b\d[^\W_]*"
)
_PLANS = (
    "Advice given; review in two weeks or sooner if worse.",
    "Safety-netting explained; follow up as needed.",
    "Continue present treatment and review with results.",
    "Supportive care discussed; return if symptoms persist.",
)
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_KEPT_CASES = 256
_DEEP = 6  # a schema that refers to itself gets no optional parts below this depth
_REFUSAL = "I am sorry, but I cannot help with this request."


def read_parameters(spec: ModelSpec, shape: type[_Parameters]) -> _Parameters:
    """Return a model's parameters in their shape, or raise RequestRejected naming each one that does not fit."""
    try:
        return shape.model_validate(spec.parameters)
    except ValidationError as exc:
        wrong = "; ".join(
            f"{'.'.join(str(step) for step in error['loc']) or 'parameters'}: {error['msg']}" for error in exc.errors()
        )
        raise RequestRejected(
            f"model '{spec.name}' has parameters that provider '{spec.provider}' cannot use: {wrong}",
            hint=f"Known parameters: {', '.join(shape.model_fields)}.",
        ) from None


class SimulatorParameters(BaseModel):
    """What a simulated model is like: its speed, its faults and how good its answers are."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    latency_seconds: float = Field(
        default=0.05, ge=0, description="median time to an answer; 0 answers without a pause"
    )
    latency_spread: float = Field(default=0.3, ge=0, le=5, description="sigma of the lognormal latency; 0 is constant")
    error_rate: float = Field(default=0.0, ge=0, le=1, description="fraction of requests that fail like a status 500")
    rate_limit_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that fail like a status 429, at once")
    retry_after_seconds: float | None = Field(
        default=1.0, ge=0, description="what a 429 asks to wait; null says nothing"
    )
    timeout_rate: float = Field(
        default=0.0, ge=0, le=1, description="fraction that take longer than the model's timeout"
    )
    invalid_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that do not fit the schema asked for")
    refusal_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that are refused")
    quality: float = Field(default=0.8, ge=0, le=1, description="facts that a note repeats; targets that are answered")
    leniency: float = Field(default=0.0, ge=-1, le=1, description="how far a grader leans towards 0 (-1) or 100 (1)")
    noise: float = Field(default=8.0, ge=0, le=100, description="standard deviation of a grader's satisfaction")
    output_tokens: int = Field(default=300, ge=1, le=100_000, description="median length of a note")

    @model_validator(mode="after")
    def _rates_share_one_whole(self) -> SimulatorParameters:
        if sum(rate for _, rate in self.faults()) > 1 + 1e-9:
            raise ValueError(
                "error_rate, rate_limit_rate, timeout_rate, invalid_rate and refusal_rate exceed 1 together"
            )
        return self

    def faults(self) -> tuple[tuple[str, float], ...]:
        """Return each fault with its probability, in the order in which a draw is compared with them."""
        return (
            ("rate_limited", self.rate_limit_rate),
            ("server_error", self.error_rate),
            ("timeout", self.timeout_rate),
            ("refused", self.refusal_rate),
            ("invalid", self.invalid_rate),
        )


class Simulator:
    """Answer like a model would: a grade or any JSON where a schema is given, a target's answer, else a note."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._parameters = read_parameters(spec, SimulatorParameters)
        self._kept: dict[int, tuple[Any, list[tuple[str, str]]]] = {}  # the facts of the latest cases
        self._identity = hashlib.blake2b(spec.name.encode(), digest_size=32)
        faults, rates = zip(*self._parameters.faults(), strict=True)
        self._faults: tuple[tuple[str, float], ...] = tuple(zip(faults, itertools.accumulate(rates), strict=True))
        if not any(rates):
            self._faults = ()

    async def __call__(self, request: Request) -> Completion:
        """Answer after the drawn latency, or raise the drawn fault."""
        digest = self._identity.copy()
        digest.update(f"\0{request.seed}\0{request.attempt}".encode())
        fault_draw, pace_draw, answer_seed, identity = struct.unpack("<4Q", digest.digest())
        request_id = f"sim-{identity:016x}"
        input_tokens = sum([len(message.content) for message in request.messages]) // 4
        fault = self._fault(fault_draw * _UNIT)
        if fault == "rate_limited":
            raise RateLimited(
                "the simulated provider asks to slow down",
                retry_after=self._parameters.retry_after_seconds,
                http_status=429,
                request_id=request_id,
            )
        if self._parameters.latency_seconds:
            seconds = math.inf if fault == "timeout" else self._seconds(pace_draw)
            await asyncio.sleep(min(seconds, self._spec.timeout_seconds))
            if seconds > self._spec.timeout_seconds:
                self._time_out()
        if fault is not None and fault != "invalid":
            self._fail(fault, request_id, input_tokens)
        if request.schema is None:
            text, data = self._answer(request.item, answer_seed)
        else:
            data = _structured(request, request.schema, self._parameters, answer_seed)
            if fault == "invalid":
                data = self._misshape(data, request.schema, random.Random(answer_seed), request_id, input_tokens)
            text = to_json(data).decode()
        return Completion(
            text=text,
            data=data,
            usage=Usage(input_tokens, max(1, len(text) // 4)),
            finish_reason="stop",
            request_id=request_id,
            model=self._spec.model or self._spec.name,
            http_status=200,
        )

    def _answer(self, item: Mapping[str, Any], seed: int) -> tuple[str, Any]:
        """Return the text, and the JSON of an answer that has structure, to a request without a schema."""
        case = item.get("case") or {}
        target = case.get("target")
        if target is None:
            return _note(self._facts(case.get("input")), self._parameters, seed), None
        if _draws(seed, 1)[0] >= self._parameters.quality:
            wrong = _wrong_answer(target if isinstance(target, str) else json.dumps(target), random.Random(seed))
            return wrong, None
        if isinstance(target, str):
            return target, None
        return json.dumps(target), target if isinstance(target, (dict, list)) else None

    def _facts(self, case_input: Any) -> list[tuple[str, str]]:
        kept = self._kept.get(id(case_input))
        if kept is None:
            facts = [(speaker.lower(), _shortened(text)) for speaker, text in _facts(case_input)]
            kept = self._kept[id(case_input)] = (case_input, facts)  # with the input, so that no other gets its id
            if len(self._kept) > _KEPT_CASES:
                del self._kept[next(iter(self._kept))]
        return kept[1]

    def _fault(self, draw: float) -> str | None:
        for fault, upper in self._faults:
            if draw < upper:
                return fault
        return None

    def _seconds(self, draw: int) -> float:
        seconds = self._parameters.latency_seconds
        if self._parameters.latency_spread:
            seconds *= math.exp(self._parameters.latency_spread * _NORMAL.inv_cdf((draw + 0.5) * _UNIT * (1 - 1e-12)))
        return seconds

    def _time_out(self) -> NoReturn:
        raise TimedOut(f"the simulated model gave no answer within {self._spec.timeout_seconds:g} s")

    def _fail(self, fault: str, request_id: str, input_tokens: int) -> NoReturn:
        if fault == "timeout":
            self._time_out()
        if fault == "server_error":
            raise ServerFailed("the simulated provider failed", http_status=500, request_id=request_id)
        raise Refused(
            "the simulated model refused to answer",
            text=_REFUSAL,
            finish_reason="content_filter",
            http_status=200,
            request_id=request_id,
            input_tokens=input_tokens,
            output_tokens=len(_REFUSAL) // 4,
        )

    def _misshape(
        self, data: Any, schema: Mapping[str, Any], rng: random.Random, request_id: str, input_tokens: int
    ) -> Any:
        """Return an answer of another shape, or raise what a provider makes of one that is not JSON."""
        whole = json.dumps(data)
        text, finish_reason = rng.choice(
            ((None, ""), (whole[: max(1, len(whole) // 2)], "length"), (f"Here is my answer: {whole}", "stop"))
        )
        if text is None:
            return _lacking(data, schema)
        raise InvalidOutput(
            "the simulated answer is not JSON",
            text=text,
            finish_reason=finish_reason,
            http_status=200,
            request_id=request_id,
            input_tokens=input_tokens,
            output_tokens=max(1, len(text) // 4),
        )


def _draws(seed: int, count: int) -> list[float]:
    """Return numbers between 0 and 1, the same for the same seed: much cheaper than to begin a random.Random anew."""
    digest = hashlib.shake_128(seed.to_bytes(8)).digest(4 * count)
    return [(number + 0.5) * 2.0**-32 for number in struct.unpack(f"<{count}I", digest)]


def _note(facts: Sequence[tuple[str, str]], parameters: SimulatorParameters, seed: int) -> str:
    """Return a note that repeats some of a case's facts: how many is its hidden quality."""
    size, quality, choice, *luck = _draws(seed, 3 + len(facts))
    plan = _PLANS[int(choice * len(_PLANS))]
    if not facts:
        return f"Summary: no information was given.\nPlan: {plan}"
    room = int(parameters.output_tokens * 4 * math.exp(0.25 * _NORMAL.inv_cdf(size))) // 90 + 1
    step = max(1.0, len(facts) / room)
    share = parameters.quality + 0.12 * _NORMAL.inv_cdf(quality)
    told: list[str] = []
    discussed: list[str] = []
    for place in range(min(room, len(facts))):
        if luck[place] < share:
            speaker, text = facts[int(place * step)]
            (discussed if speaker in _CLINICIANS else told).append(text)
    if not told and not discussed:
        told.append(facts[0][1])
    if not any(speaker for speaker, _ in facts):
        return f"Summary: {'; '.join(told)}.\nPlan: {plan}"
    return (
        f"Subjective: {'; '.join(told) or 'no history recorded'}.\n"
        f"Discussed: {'; '.join(discussed) or 'nothing further recorded'}.\nPlan: {plan}"
    )


def _facts(value: Any) -> list[tuple[str, str]]:
    """Return a case's facts as (speaker, text): the turns that say something, the sentences, or the JSON's leaves."""
    if isinstance(value, Mapping) and isinstance(value.get("transcript"), list):
        value = value["transcript"]
    if isinstance(value, str):
        return [("", sentence) for sentence in re.split(r"(?<=[.!?])\s+", value) if sentence.strip()]
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "text" in value[0]:
        turns = [
            (str(turn.get("speaker", "")), str(turn.get("text", ""))) for turn in value if isinstance(turn, Mapping)
        ]
        return [turn for turn in turns if len(turn[1]) > 24] or [turn for turn in turns if turn[1].strip()]
    return list(itertools.islice(_leaves(value, ""), 200))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    elif value is not None and value != "":
        yield "", f"{name} {value}".strip()


def _shortened(text: str) -> str:
    """Return a fact as a clause of at most 160 characters, cut between words."""
    if len(text) > 160:
        text = text[:160].rsplit(" ", 1)[0]
    return text.strip(" .;?!\n")


def _wrong_answer(target: str, rng: random.Random) -> str:
    """Return an answer that looks like the target, and neither equals nor contains it."""
    simple = target.strip()
    opposite = _OPPOSITES.get(simple.lower())
    candidates: list[str] = []
    if opposite is not None:
        candidates.append(opposite.capitalize() if simple[0].isupper() else opposite)
    elif re.fullmatch(r"[A-Ea-e]", simple):
        letters = "ABCDE" if simple.isupper() else "abcde"
        candidates.append(rng.choice(letters.replace(simple, "")))
    elif number := re.search(r"-?\d{1,15}(?:\.\d{1,6})?", simple):
        decimals = len(number.group().partition(".")[2])
        for _ in range(4):
            near = float(number.group()) * rng.choice((0.5, 0.9, 1.1, 2.0)) + rng.randint(1, 9)
            candidates.append(f"{simple[: number.start()]}{near:.{decimals}f}{simple[number.end() :]}")
    elif " " in simple:
        words = simple.split()
        candidates.append(" ".join(words[: max(1, len(words) * 2 // 3)]))
    return next((wrong for wrong in candidates if target not in wrong and simple not in wrong), "unknown")


def _structured(request: Request, schema: Mapping[str, Any], parameters: SimulatorParameters, seed: int) -> Any:
    """Return JSON that fits the schema; the schema of a grade gets satisfactions that the note has earned."""
    verdicts = schema.get("properties", {}).get("verdicts")
    rubric = request.item.get("rubric")
    if verdicts is not None and rubric is not None:
        verdict_count = verdicts.get("minItems", len(rubric["criteria"]))
        return {"verdicts": _verdicts(request.item.get("note"), rubric["criteria"], verdict_count, parameters, seed)}
    return _filled(schema, schema, random.Random(seed), 0)


def _verdicts(
    note: Any, criteria: Sequence[Mapping[str, Any]], count: int, parameters: SimulatorParameters, seed: int
) -> list[dict[str, Any]]:
    """Judge a note by the share of each criterion's words that it has, and by whether it is long enough to say much."""
    text = (note if isinstance(note, str) else json.dumps(note, ensure_ascii=False)).lower()
    lean = 20.0 * parameters.leniency - 15.0 * max(0.0, 1.0 - len(text) / 300)
    verdicts: list[dict[str, Any]] = []
    for place, draw in enumerate(_draws(seed, count)):
        found: list[str] = []
        missing: list[str] = []
        if place < len(criteria):
            for word, stem in _stems(str(criteria[place].get("criterion", ""))):
                (found if stem in text else missing).append(word)
        coverage = len(found) / (len(found) + len(missing)) if found or missing else 0.5
        noise = lean + parameters.noise * _NORMAL.inv_cdf(draw)
        satisfaction = round(15.0 + 80.0 * math.sqrt(coverage) + noise)
        satisfaction = 0 if satisfaction < 0 else 100 if satisfaction > 100 else satisfaction
        verdicts.append({"rationale": _rationale(found, missing), "satisfaction": satisfaction})
    return verdicts


@functools.lru_cache(maxsize=4096)
def _stems(criterion: str) -> tuple[tuple[str, str], ...]:
    """Return the words of a criterion that carry meaning, each with the stem to look for in a note."""
    words = dict.fromkeys(_TELLING_WORD.findall(criterion.lower()) or criterion.lower().split())
    return tuple((word, word[:5]) for word in words)


def _rationale(found: Sequence[str], missing: Sequence[str]) -> str:
    if not missing:
        return f"The note covers this fully: {', '.join(found[:4])}." if found else "The note addresses this in part."
    if not found:
        return f"The note does not mention {', '.join(missing[:4])}."
    return f"The note mentions {', '.join(found[:3])}, but not {', '.join(missing[:3])}."


def _filled(schema: Any, root: Mapping[str, Any], rng: random.Random, depth: int) -> Any:
    """Return a value that fits a JSON Schema of the kind that models accept: no patterns, no formats."""
    if not isinstance(schema, Mapping):
        return None
    if "$ref" in schema:
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            target = target[step] if step else target
        return _filled(target, root, rng, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(list(schema["enum"]))
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _filled(schema[choice][-1 if depth > _DEEP else 0], root, rng, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        wanted = schema.get("required", ()) if depth > _DEEP else schema.get("properties", {})
        return {name: _filled(schema["properties"][name], root, rng, depth + 1) for name in wanted}
    if kind == "array":
        least = schema.get("minItems", 0)
        length = least if depth > _DEEP else min(schema.get("maxItems", least + 2), max(least, 2))
        return [_filled(schema.get("items", {}), root, rng, depth + 1) for _ in range(length)]
    if kind in ("integer", "number"):
        return _number(schema, rng, is_integer=kind == "integer")
    if kind == "boolean":
        return rng.random() < 0.5
    return None if kind == "null" else _words(schema, rng)


def _number(schema: Mapping[str, Any], rng: random.Random, *, is_integer: bool) -> float:
    """Return a number within its bounds; a range open on one side is 100 wide."""
    lower = schema.get("minimum", schema.get("exclusiveMinimum"))
    upper = schema.get("maximum", schema.get("exclusiveMaximum"))
    lower = (0 if upper is None or upper > 0 else upper - 100) if lower is None else lower
    upper = lower + 100 if upper is None else upper
    if not is_integer:
        return lower + (upper - lower) * rng.uniform(0.05, 0.95)
    first = math.floor(lower) + 1 if "exclusiveMinimum" in schema else math.ceil(lower)
    last = math.ceil(upper) - 1 if "exclusiveMaximum" in schema else math.floor(upper)
    return rng.randint(first, max(first, last))


def _words(schema: Mapping[str, Any], rng: random.Random) -> str:
    """Return a sentence of a length that the schema allows."""
    text = rng.choice(_PLANS)
    least = int(schema.get("minLength", 0))
    while len(text) < least:
        text += " " + rng.choice(_PLANS)
    return text[: schema.get("maxLength")]


def _lacking(data: dict[str, Any], schema: Mapping[str, Any]) -> Any:
    """Return an answer that lacks something which its schema asks for, the way a hasty model would."""
    if data.get("verdicts"):
        return data | {"verdicts": data["verdicts"][:-1]}
    required = schema.get("required")
    return {name: value for name, value in data.items() if name != required[-1]} if required else [data]
