"""Boundary types: what is asked of a model, what it answers, and how a model is described.

A ModelSpec is a `models` row as a run froze it. A Request is provider-neutral; each provider encodes what it
supports of it. Everything here is data: no I/O, no defaults that depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "user", "assistant"]
Provider = Literal[
    "openai",
    "openai_responses",
    "anthropic",
    "gemini",
    "openai_compatible",
    "simulator",
    "command",
    "python",
    "plugin",
    "metric",
    "ensemble",
    "hedge",
]
ItemKind = Literal["note", "grade", "task"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call; `cached_tokens` are the part of `input_tokens` that the provider served from its cache."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


_INSTANT = timedelta(microseconds=1)


class Trail:
    """Collects the calls that a composite makes of its members for one request, shaped like rows of `calls`.

    `parent_started_at` is when the composite's own call began, which its members' rows name. Rows of one item are told
    apart by when they began, so every call of a trail begins at an instant of its own.
    """

    __slots__ = ("_latest", "calls", "parent_started_at")

    def __init__(self, parent_started_at: datetime, within: Trail | None = None) -> None:
        self.parent_started_at = parent_started_at
        self.calls: list[dict[str, Any]] = [] if within is None else within.calls
        self._latest: list[datetime] = [parent_started_at] if within is None else within._latest

    def begin(self) -> datetime:
        """Return when a call begins."""
        now = self._latest[0] = max(datetime.now(UTC), self._latest[0] + _INSTANT)
        return now

    def under(self, started_at: datetime) -> Trail:
        """Return the trail of the members of a call that is itself in this trail."""
        return Trail(started_at, self)


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model.

    `schema` asks for an answer that fits a JSON Schema (its top level is an object). `seed` is the item's own, made of
    the run's (`run_seed`), stable over retries except that `attempt` counts them. `replication` tells independent
    answers to one question apart (for the grade of a note, with the note's own, `note_replication`), `number` requests
    made for one answer at once, as a hedge does. `item` is what a program or callable sees instead of messages: the
    case and the run's settings as plain JSON. After an answer that could not be used, `question` is the messages
    without those that say so, and `rejected` the attempt that gave it.
    """

    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    schema_name: str = "answer"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_reasoning: bool = False
    seed: int | None = None
    attempt: int = 1
    item: Mapping[str, Any] = field(default_factory=dict)
    replication: int = 1
    run_seed: int = 0
    number: int = 0
    note_replication: int = 0
    question: tuple[Message, ...] | None = None
    rejected: int = 0
    trail: Trail | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, the parsed JSON where a schema or a program gave some, and what the call used.

    `confidence` (0 to 1) is given where it is known: from log-probabilities, or as the model stated it. `composition`
    is how a composite came to its answer, as JSON. `is_cached` says that no call was made for it: it comes from the
    response cache, and `usage` is what the call used that once gave it.
    """

    text: str
    data: Any = None
    usage: Usage = Usage()
    finish_reason: str | None = None
    request_id: str | None = None
    model: str | None = None
    http_status: int | None = None
    confidence: float | None = None
    composition: Mapping[str, Any] | None = None
    is_cached: bool = field(default=False, compare=False)


class Completer(Protocol):
    """Anything that answers. Raises ModelError, or asyncio.CancelledError when its task is cancelled."""

    async def __call__(self, request: Request) -> Completion: ...


class ModelSpec(BaseModel):
    """A model as a run froze it: see the comments on table `pgharness.models` for each field's meaning.

    `members` are the models that a composite (ensemble, hedge) asks, as they were frozen with it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: int
    name: str
    provider: Provider
    model: str = ""
    base_url: str | None = None
    api_key_env: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    is_reasoning: bool = False
    timeout_seconds: float = 120.0
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    input_usd_per_million: float | None = None
    output_usd_per_million: float | None = None
    cached_input_usd_per_million: float | None = None
    batch_price_factor: float = 0.5
    members: tuple[ModelSpec, ...] = ()

    def leaves(self) -> Iterator[ModelSpec]:
        """Yield the models below a composite that answer by themselves."""
        for member in self.members:
            if member.members:
                yield from member.leaves()
            else:
                yield member

    def price(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        """Return what so many tokens cost, in USD; a price that is not set counts as zero.

        `cached_tokens` are part of `input_tokens`, and cost the input price when the model has no price for them.
        """
        input_price = self.input_usd_per_million or 0.0
        cached_price = input_price if self.cached_input_usd_per_million is None else self.cached_input_usd_per_million
        output_price = self.output_usd_per_million or 0.0
        fresh_tokens = input_tokens - cached_tokens
        return (fresh_tokens * input_price + cached_tokens * cached_price + output_tokens * output_price) / 1_000_000
