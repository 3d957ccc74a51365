"""Items: what a note or a grade is made from, how a call of its model is recorded, and what an outcome looks like."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pgharness.database import Row
from pgharness.errors import CodeFailed, InvalidOutput, ModelError
from pgharness.gateway.plugged import METRIC_PREFIX
from pgharness.grading import read_verdicts, score_metric
from pgharness.types import Completion, ItemKind, ModelSpec, Request

logger = logging.getLogger(__name__)
_OUTPUT_TOKENS_GUESS = 500
_LONGEST_ERROR = 4_000
_LONGEST_ANSWER = 100_000


@dataclass(slots=True, eq=False)
class Item:
    """A note or grade to make: its place in the plan, what it is made from, and how it was tried before."""

    run_id: int
    kind: ItemKind
    ordinal: int
    spec: ModelSpec
    case: Row
    combination_number: int
    overlap: int
    replication: int
    rubric: Row | None = None  # of a grade
    note: Any = None  # of a grade
    rubrics: Sequence[Row] = ()  # of a note: by which its grades are made
    tries: int = 0
    cause: str | None = None
    error: str | None = None
    answer: str | None = None
    is_suspect: bool = False
    slice: Any = None  # the open slice that waits for it, until it has ended
    request: Request | None = None
    tokens: int = 0
    trouble: Exception | None = None  # why it cannot be asked
    twins: list[Item] = field(default_factory=list)  # the same item, as other slices brought it

    @property
    def is_scored_here(self) -> bool:
        """Tell whether a metric scores it that answers at once; one of a plugin's may be slow, hang or die."""
        return self.spec.provider == "metric" and not self.spec.model.startswith(METRIC_PREFIX)

    @property
    def key(self) -> tuple[int, ItemKind, int]:
        return self.run_id, self.kind, self.ordinal

    def outcome(self, result: str, calls: Sequence[Row] = ()) -> Row:
        """Return the common part of an outcome, shaped like the SQL type of that name."""
        return {
            "run_id": self.run_id,
            "kind": self.kind,
            "ordinal": self.ordinal,
            "attempt": self.tries + 1,
            "epoch": self.slice.work.epoch,
            "result": result,
            "calls": calls,
        }

    def failed(self, error: Exception, calls: Sequence[Row] = ()) -> Row:
        """Return the outcome of a try that failed."""
        return self.outcome("failed", calls) | failure_fields(model_error(error))

    def scored(self) -> Row:
        """Return the outcome of a grade by a metric. Raises ModelError for a target that no output could match."""
        score = score_metric(self.spec.model, self.spec.parameters, self.note, self.case.get("target"))
        return self.outcome("succeeded") | {"score": score.score, "max_score": score.max_score}

    def read(self, completion: Completion) -> Row:
        """Return what an answer gives the item. Raises InvalidOutput for one that cannot be used."""
        if self.spec.provider == "metric":
            return dict(completion.data)
        if self.kind == "note":
            if completion.data is None and not completion.text.strip():
                raise InvalidOutput("the answer is empty", text=completion.text)
            return {"output": completion.text if completion.data is None else completion.data}
        count = len(self.rubric["criteria"]) if self.rubric else 1
        return {"verdicts": read_verdicts(completion.data, count, text=completion.text)}


class CallRecord:
    """One request to a model while it is under way; each of its ends gives the row of `calls`."""

    __slots__ = ("_spec", "_start", "_started_at")

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._started_at = datetime.now(UTC)
        self._start = time.perf_counter()

    def _row(self, outcome: str) -> Row:
        return {
            "model_id": self._spec.id,
            "started_at": self._started_at,
            "latency_ms": (time.perf_counter() - self._start) * 1000,
            "outcome": outcome,
        }

    def cancelled(self) -> Row:
        return self._row("cancelled")

    def failed(self, error: ModelError, completion: Completion | None) -> Row:
        """Return the row of a call that failed, or whose answer could not be used."""
        answer = error.text or (completion.text if completion else None)
        row = self._row(error.outcome)
        row["error"] = str(error)[:_LONGEST_ERROR]
        row["answer"] = answer[:_LONGEST_ANSWER] if answer else None
        row["http_status"] = error.http_status
        return row | self._reply(completion or error, used_tokens(completion or error))

    def succeeded(self, completion: Completion) -> Row:
        row = self._row("succeeded")
        row["http_status"] = completion.http_status
        return row | self._reply(completion, used_tokens(completion))

    def _reply(self, reply: Completion | ModelError, used: tuple[int, int, int]) -> Row:
        return {
            "input_tokens": used[0],
            "output_tokens": used[1],
            "cached_tokens": used[2],
            "cost_usd": self._spec.price(*used),
            "finish_reason": reply.finish_reason,
            "request_id": reply.request_id,
            "answered_by": reply.model if isinstance(reply, Completion) else None,
        }


def used_tokens(reply: Completion | ModelError) -> tuple[int, int, int]:
    """Return the input, output and cached tokens of a reply."""
    usage = reply.usage if isinstance(reply, Completion) else reply
    return usage.input_tokens, usage.output_tokens, usage.cached_tokens


def model_error(error: Exception) -> ModelError:
    """Return a ModelError as it is, and anything unexpected as the failure of code that it is."""
    if isinstance(error, ModelError):
        return error
    logger.error("an item failed with an unexpected error", exc_info=error)
    text = "".join(traceback.format_exception(error))[-8000:]
    return CodeFailed(f"{type(error).__name__}: {error}", text=text)


def failure_fields(error: ModelError) -> Row:
    """Return what a failed outcome says beyond the common part."""
    return {
        "cause": error.outcome,
        "error": (str(error) + (f" ({error.hint})" if error.hint else ""))[:_LONGEST_ERROR],
        "answer": error.text[:_LONGEST_ANSWER] if error.text else None,
        "is_retryable": error.is_retryable,
        "spends_attempt": error.spends_attempt,
        "retry_after": error.retry_after,
    }


def estimated_tokens(request: Request, spec: ModelSpec) -> int:
    """Return about how many tokens a call will count against a quota."""
    limit = spec.parameters.get("max_tokens") or _OUTPUT_TOKENS_GUESS
    return sum([len(message.content) for message in request.messages]) // 4 + int(limit)
