"""The story of one run: what becomes of each note and grade is decided here, recorded as a worker would, and kept.

A test of a view works its numbers out from the notes, grades and calls of a Story, and compares.
"""

from __future__ import annotations

import json
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, ClassVar

import psycopg
from psycopg import Connection

import world
from world import Row, record, rows

CASES, OVERLAPS, NOTE_REPLICATIONS, GRADE_REPLICATIONS = 6, (50, 100), 3, 2
COMBINATIONS = ("a -> judge", "b -> judge", "b -> exact_match")
AUTHORS = (("ann", "bob"), ("ann", "carl"), ("bob", "carl"))  # of a case; the second one's rubric is the newer

Place = tuple[str, str, int, int]


@dataclass(frozen=True)
class Call:
    """One request to a model that ended."""

    model: str
    kind: str
    outcome: str
    latency_ms: float
    cost_usd: Decimal
    input_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclass(eq=False)
class Note:
    """One note of the plan; its state is planned, succeeded, failed or waiting."""

    kind: ClassVar[str] = "note"
    ordinal: int
    case: int
    combination: int
    overlap: int
    replication: int
    state: str = "planned"
    calls: list[Call] = field(default_factory=list)

    @property
    def note(self) -> Note:
        return self

    @property
    def place(self) -> Place:
        """What views list it under: case, combination, overlap and replication."""
        return f"case-{self.case + 1}", COMBINATIONS[self.combination], self.overlap, self.replication

    @property
    def model(self) -> str:
        return COMBINATIONS[self.combination].split(" -> ")[0]


@dataclass(eq=False)
class Grade:
    """One grade of the plan, skipped when its note failed; `parts` are (criterion, weight, satisfaction, score)."""

    kind: ClassVar[str] = "grade"
    ordinal: int
    note: Note
    author: str | None
    replication: int
    state: str = "planned"
    parts: list[tuple[str, int, int, Decimal]] = field(default_factory=list)
    score: Decimal = Decimal(0)
    max_score: Decimal = Decimal(1)
    calls: list[Call] = field(default_factory=list)

    @property
    def place(self) -> Place:
        """What views list its note under."""
        return self.note.place

    @property
    def model(self) -> str:
        return COMBINATIONS[self.note.combination].split(" -> ")[1]

    @property
    def share(self) -> float:
        """Its score as a share of the highest possible."""
        return float(self.score / self.max_score)


Item = Note | Grade


class Story:
    """A run of 108 notes and 324 planned grades that meet every kind of fate."""

    def __init__(self, db: Connection[Any]) -> None:
        self.db = db
        self.last: list[Row] = []
        self._random = random.Random(20)
        self._criteria = {
            (case, author): [
                (f"criterion {n}", self._random.choice((5, 10, 40))) for n in range(self._random.randint(2, 4))
            ]
            for case in range(CASES)
            for author in AUTHORS[case % 3]
        }
        self._define()
        self._models = dict(db.execute("select name, id from pgharness.models").fetchall())
        self.run = world.start(db, "story")
        self.worker = world.register(db, host="here", pid=7)
        world.load(db, self.worker, {"run_id": self.run, "kind": "note", "epoch": 0, "ordinals": [0]})
        planned = CASES * len(COMBINATIONS) * len(OVERLAPS) * NOTE_REPLICATIONS
        self.notes = [_place(ordinal) for ordinal in range(planned)]
        self.grades = [grade for note in self.notes for grade in _grades_of(note)]
        self._write_notes()
        self._write_grades()
        db.execute("analyze")

    @property
    def items(self) -> list[Item]:
        return [*self.notes, *self.grades]

    @property
    def calls(self) -> list[Call]:
        return [call for item in self.items for call in item.calls]

    @property
    def graded(self) -> list[Grade]:
        """The grades that there are."""
        return [grade for grade in self.grades if grade.state == "succeeded"]

    @property
    def scores(self) -> dict[Note, float]:
        """The mean of each scored note's grades."""
        shares = defaultdict(list)
        for grade in self.graded:
            shares[grade.note].append(grade.share)
        return {note: statistics.fmean(each) for note, each in shares.items()}

    def view(self, name: str) -> list[Row]:
        """Return a view's rows of the run."""
        return rows(self.db, f"select * from pgharness.{name} where run_id = %s", self.run)

    def _define(self) -> None:
        for case in range(CASES):
            self.db.execute(
                "insert into pgharness.cases (name, input, target) values (%s, %s, %s)",
                (f"case-{case + 1}", json.dumps("x" * 400), json.dumps(f"target {case}")),
            )
            for day, author in enumerate(AUTHORS[case % 3], start=1):
                criteria = [{"criterion": text, "weight": weight} for text, weight in self._criteria[case, author]]
                self.db.execute(
                    "insert into pgharness.rubrics (case_name, author, validation, validated_at, criteria)"
                    " values (%s, %s, 'accepted', %s, %s)",
                    (f"case-{case + 1}", author, f"2026-01-0{day}", json.dumps(criteria)),
                )
        self.db.execute(
            "insert into pgharness.models (name, provider, model, input_usd_per_million, output_usd_per_million)"
            " select name, 'openai', 'gpt', 2, 8 from unnest('{a, b, judge}'::text[]) as name"
        )
        self.db.execute(
            "insert into pgharness.instances (name, note_replications, grade_replications, cycle_transcript_overlaps,"
            " failure_threshold, seed, software_version) values ('story', %s, %s, %s, 1, 4, 'abc123')",
            (NOTE_REPLICATIONS, GRADE_REPLICATIONS, list(OVERLAPS)),
        )
        self.db.execute("select pgharness.add_cases('story')")
        for name in COMBINATIONS:
            self.db.execute(
                "insert into pgharness.model_combinations (instance, generator, grader) values ('story', %s, %s)",
                name.split(" -> "),
            )

    def _write_notes(self) -> None:
        first, second = [], []
        for note in self.notes:
            has_trouble = self._decide(note)
            if has_trouble:
                first.append(self._failed(note, "rate_limited", is_final=False))
            if note.state == "failed":
                second.append(self._failed(note, "refused", is_final=True))
            elif note.state == "succeeded":
                second.append(
                    self._succeeded(note, output=f"note {note.ordinal}", calls=[self._call(note, "succeeded")])
                )
        self._write(first)
        self._write(second)

    def _write_grades(self) -> None:
        first, second = [], []
        for grade in self.grades:
            if grade.note.state != "succeeded":
                grade.state = "skipped" if grade.note.state == "failed" else "planned"
            elif grade.author is None:
                grade.state, grade.score = "succeeded", Decimal(self._random.randint(0, 1))
                second.append(self._succeeded(grade, score=float(grade.score), max_score=1, calls=[]))
            else:
                if self._decide(grade):
                    first.append(self._failed(grade, "invalid_output", is_final=False))
                if grade.state == "failed":
                    second.append(self._failed(grade, "rejected", is_final=True))
                elif grade.state == "succeeded":
                    self._judge(grade, grade.author)
                    verdicts = [{"rationale": f"because {part[0]}", "satisfaction": part[2]} for part in grade.parts]
                    second.append(self._succeeded(grade, verdicts=verdicts, calls=[self._call(grade, "succeeded")]))
        self._write(first)
        self._write(second)

    def _decide(self, item: Item) -> bool:
        """Set an item's fate; return whether its first try fails and may be tried again."""
        fate = self._random.random()
        states = {0.04: "planned", 0.08: "waiting", 0.14: "failed", 1: "succeeded"}
        item.state = next(state for limit, state in states.items() if fate < limit)
        return item.state == "waiting" or 0.14 <= fate < 0.3

    def _judge(self, grade: Grade, author: str) -> None:
        """Make a grade up: combinations, cases and notes differ."""
        note = grade.note
        level = 45 + 8 * note.case + 15 * note.combination + 7 * (note.ordinal % 5)
        for criterion, weight in self._criteria[note.case, author]:
            satisfaction = max(0, min(100, level + self._random.randint(-40, 25)))
            points = (Decimal(weight) * satisfaction / 100).quantize(Decimal("0.01"), ROUND_HALF_UP)
            grade.parts.append((criterion, weight, satisfaction, points))
        grade.score = sum((part[3] for part in grade.parts), Decimal(0))
        grade.max_score = Decimal(sum(part[1] for part in grade.parts))

    def _call(self, item: Item, outcome: str) -> Row:
        """Add a call to an item; return it as a worker reports it."""
        has_answer = outcome in ("succeeded", "invalid_output")
        call = Call(
            model=item.model,
            kind=item.kind,
            outcome=outcome,
            latency_ms=round(self._random.lognormvariate(6, 1), 3),
            cost_usd=Decimal(self._random.randint(1000, 99999)).scaleb(-7) if has_answer else Decimal(0),
            input_tokens=self._random.randint(100, 900) if has_answer else 0,
            output_tokens=self._random.randint(10, 400) if has_answer else 0,
            cached_tokens=50 if has_answer else 0,
        )
        item.calls.append(call)
        error = None if outcome == "succeeded" else f"{outcome} of {item.kind} {item.ordinal}"
        more = {"model_id": self._models[call.model], "error": error, "started_at": "2026-01-01T00:00:00Z"}
        return asdict(call) | more | {"cost_usd": float(call.cost_usd)}

    def _succeeded(self, item: Item, **fields: object) -> Row:
        return self._outcome(item, "succeeded", **fields)

    def _failed(self, item: Item, cause: str, *, is_final: bool) -> Row:
        call = self._call(item, cause)
        fields = {"cause": cause, "error": call["error"], "answer": "bad" if cause == "invalid_output" else None}
        steering = {"is_retryable": not is_final, "spends_attempt": cause != "rate_limited"}
        return self._outcome(item, "failed", calls=[call], **fields, **steering)

    def _outcome(self, item: Item, result: str, **fields: object) -> Row:
        known = {"run_id": self.run, "kind": item.kind, "ordinal": item.ordinal, "attempt": len(item.calls) or 1}
        return known | {"result": result} | fields

    def _write(self, outcomes: list[Row]) -> None:
        """Record outcomes, a few a transaction."""
        for start in range(0, len(outcomes), 25):
            self.last = outcomes[start : start + 25]
            record(self.db, self.worker, *self.last)


def _place(ordinal: int) -> Note:
    """Return a note by its number: combinations vary fastest, then cases, overlaps and replications."""
    rest, combination = divmod(ordinal, len(COMBINATIONS))
    rest, case = divmod(rest, CASES)
    replication, overlap = divmod(rest, len(OVERLAPS))
    return Note(ordinal, case, combination, OVERLAPS[overlap], replication + 1)


def _grades_of(note: Note) -> Iterator[Grade]:
    """Yield a note's planned grades: one by the metric, or some by each rubric, the newest author's first."""
    first = note.ordinal * 2 * GRADE_REPLICATIONS
    if note.combination == 2:
        yield Grade(first, note, None, 1)
        return
    for number, author in enumerate(reversed(AUTHORS[note.case % 3])):
        for replication in range(GRADE_REPLICATIONS):
            yield Grade(first + number * GRADE_REPLICATIONS + replication, note, author, replication + 1)


@contextmanager
def told(server_url: str, template: str) -> Iterator[Story]:
    """Tell the story in a database of its own."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        yield Story(db)
