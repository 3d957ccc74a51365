"""Items: what a note or a grade is made from, what its model is asked, and what an outcome looks like."""

from __future__ import annotations

import logging
import time
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, get_args

from pgharness.database import Row
from pgharness.errors import CodeFailed, InvalidOutput, ModelError
from pgharness.gateway import Gateway
from pgharness.grading import criteria_values, read_verdicts, score_metric, verdict_schema
from pgharness.prompts import Prompt, case_facts, text_of
from pgharness.types import Completer, Completion, ItemKind, Message, ModelSpec, Request

logger = logging.getLogger(__name__)
_OUTPUT_TOKENS_GUESS = 500
_LONGEST_ERROR = 4_000
_LONGEST_ANSWER = 100_000
_CODE = ("command", "python")
_CACHED_CASES = 500
_ITEM_READERS = (*_CODE, "simulator")  # those that see the case itself, not messages alone


@dataclass(frozen=True, slots=True)
class Combination:
    """A generator and its grader, as a run froze them."""

    generator: ModelSpec
    grader: ModelSpec | None
    rubric_count: int
    grade_replications: int

    def spec(self, kind: ItemKind) -> ModelSpec:
        """Return the model that makes items of a kind."""
        spec = self.grader if kind == "grade" else self.generator
        assert spec is not None
        return spec


class Definition:
    """A run's frozen definition, with what is made of it once for all its items."""

    def __init__(self, row: Row, gateway: Gateway) -> None:
        self.row = row
        self.stride: int = row["grade_stride"]
        self.combinations = {
            found["number"]: Combination(
                ModelSpec.model_validate(found["generator"]),
                ModelSpec.model_validate(found["grader"]) if found["grader"] else None,
                found["rubric_count"],
                found["grade_replications"],
            )
            for found in row["combinations"]
        }
        self._gateway = gateway
        self._completers: dict[tuple[ItemKind, int], Completer] = {}
        self._prompts: dict[ItemKind, Prompt] = {}
        self._cases: OrderedDict[int, _KnownCase] = OrderedDict()  # by their identity
        self._seeds = {kind: blake2b(f"{row['seed']}/{kind}/".encode(), digest_size=4) for kind in get_args(ItemKind)}
        self._item_facts = {name: row[name] for name in ("config", "cycle_times", "software_version", "run")}

    def completer(self, item: Item) -> Completer:
        """Return what answers for an item's model. Raises ModelError when nothing here can."""
        key = (item.kind, item.combination_number)
        if key not in self._completers:
            self._completers[key] = self._gateway.completer(item.spec)
        return self._completers[key]

    def request(self, item: Item) -> Request:
        """Return what to ask for an item. Raises ModelError for a prompt or setting that cannot be used."""
        spec = item.spec
        schema, criteria = None, None
        if item.kind == "grade":
            criteria = criteria_values(item.rubric)
            schema = verdict_schema(len(criteria))
        facts: dict[str, Any] = {}
        if spec.provider in _ITEM_READERS:
            case = item.case
            if item.kind == "note" and spec.provider in _CODE:
                case = {name: value for name, value in case.items() if name != "target"}  # the answer is not given away
            facts = {"case": case, "overlap": item.overlap, "replication": item.replication, **self._item_facts}
            if item.kind == "grade":
                facts |= {"note": item.note, "rubric": {"criteria": criteria}}
        messages = self._messages(item, criteria)
        if item.cause == InvalidOutput.outcome and item.answer:
            messages += (
                Message("assistant", item.answer),
                Message(
                    "user",
                    f"This answer cannot be used: {item.error}. Answer again, in full and in the form asked for.",
                ),
            )
        return Request(
            messages=messages,
            schema=schema,
            schema_name="verdicts",
            is_reasoning=spec.is_reasoning,
            seed=self._seed(item),
            attempt=item.tries + 1,
            item=facts,
        )

    def _seed(self, item: Item) -> int:
        """Return an item's own seed (31 bits, which every provider takes), from the run's."""
        digest = self._seeds[item.kind].copy()
        digest.update(b"%d" % item.ordinal)
        return int.from_bytes(digest.digest(), "big") >> 1

    def _messages(self, item: Item, criteria: Sequence[Row] | None) -> tuple[Message, ...]:
        prompt = self._prompts.get(item.kind)
        if prompt is None:
            prompts = self.row["prompts"]
            prompt = Prompt(item.kind, prompts[f"{item.kind}_system"], prompts[item.kind])
            self._prompts[item.kind] = prompt
        case = self._known(item.case)
        if item.kind == "note" and case.note_messages is not None:
            return case.note_messages
        values = {
            **case.values,
            "config": self.row["config"],
            "overlap": item.overlap,
            "replication": item.replication,
        }
        if item.kind == "grade":
            values["note"] = text_of(item.note)
            values["criteria"] = criteria
            values["rubric_author"] = (item.rubric or {}).get("author")
        messages = prompt.render(values)
        if item.kind == "note" and prompt.is_of_case:
            case.note_messages = messages
        return messages

    def _known(self, case: Row) -> _KnownCase:
        known = self._cases.get(id(case))
        if known is None:
            known = self._cases[id(case)] = _KnownCase(case, case_facts(case))
            if len(self._cases) > _CACHED_CASES:
                self._cases.popitem(last=False)
        return known


@dataclass(slots=True, eq=False)
class _KnownCase:
    """What is made of a case once: it is kept with it, so that no other case gets its identity meanwhile."""

    case: Row
    values: Row
    note_messages: tuple[Message, ...] | None = None  # when they are the same for all its notes


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


def next_grades(item: Item, combination: Combination, stride: int) -> list[Item]:
    """Return the grades of a note that was just made: by each of its rubrics, or the target, each so many times."""
    if combination.grader is None:
        return []
    return [
        Item(
            run_id=item.run_id,
            kind="grade",
            ordinal=item.ordinal * stride + place * combination.grade_replications + number,
            spec=combination.grader,
            case=item.case,
            combination_number=item.combination_number,
            overlap=item.overlap,
            replication=number + 1,
            rubric=rubric,
            note=item.note,
            slice=item.slice,
        )
        for place, rubric in enumerate(item.rubrics if combination.rubric_count else (None,))
        for number in range(combination.grade_replications)
    ]


def loaded(rows: Sequence[Row], definition: Definition, inputs: Mapping[tuple[str, int], Any]) -> list[Item]:
    """Return the items of a slice, from the rows of its plan and their inputs."""
    items = []
    for row in rows:
        kind: ItemKind = row["kind"]
        combination = definition.combinations[row["combination_number"]]
        item = Item(
            run_id=definition.row["run_id"],
            kind=kind,
            ordinal=row["ordinal"],
            spec=combination.spec(kind),
            case=inputs["cases", row["case_id"]],
            combination_number=row["combination_number"],
            overlap=row["overlap"],
            replication=row["replication"],
            tries=row["tries"],
            cause=row["cause"],
            error=row["error"],
            answer=row["answer"],
        )
        if kind == "grade":
            item.rubric = inputs["rubrics", row["rubric_id"]] if row["rubric_id"] is not None else None
            item.note = inputs["notes", row["note_ordinal"]]
        else:
            item.rubrics = [inputs["rubrics", rubric_id] for rubric_id in row["rubric_ids"]]
        items.append(item)
    return items
