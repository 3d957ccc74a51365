"""Items: what a note or a grade is made from, how a call of its model is recorded, and what an outcome looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pgharness.database import Row
from pgharness.errors import InvalidOutput, ModelError
from pgharness.gateway.cache import Stored
from pgharness.gateway.calls import CallRecord, model_error
from pgharness.gateway.plugged import METRIC_PREFIX
from pgharness.grading import read_verdicts, score_metric
from pgharness.types import Completion, ItemKind, ModelSpec, Request

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
    note_replication: int = 0  # of a grade: which of its case's notes it scores
    rubrics: Sequence[Row] = ()  # of a note: by which its grades are made
    tries: int = 0
    cause: str | None = None
    error: str | None = None
    answer: str | None = None
    is_suspect: bool = False
    slice: Any = None  # the open slice that waits for it, until it has ended
    request: Request | None = None
    tokens: int = 0
    question_key: bytes | None = None  # of what it asks, in the response cache
    has_unusable: bool = False  # the cache has an answer to it, and that is of no use
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

    def answered(self, record: CallRecord, stored: Stored) -> Row:
        """Return the outcome of a try that the response cache answered. Raises InvalidOutput if it is of no use."""
        assert self.question_key is not None
        answer = self.read(stored.completion)
        return self.outcome("succeeded", [record.cached(self.question_key, stored)]) | answer

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
