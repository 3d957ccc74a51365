"""A run's frozen definition: which models make its items, and the items themselves from the rows of its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgharness.database import Row
from pgharness.execution.items import Item
from pgharness.execution.requests import Requests
from pgharness.gateway import Gateway
from pgharness.gateway.cache import ResponseCache
from pgharness.gateway.limits import Limits
from pgharness.types import Completer, ItemKind, ModelSpec


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

    def __init__(
        self, row: Row, gateway: Gateway, limits: Limits | None = None, cache: ResponseCache | None = None
    ) -> None:
        self.row = row
        self.answers = None if cache is None else cache.answers(row["response_cache"], row["run_id"])
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
        self._limits = limits
        self._completers: dict[tuple[ItemKind, int], Completer] = {}
        self.requests = Requests(row)

    def completer(self, item: Item) -> Completer:
        """Return what answers for an item's model. Raises ModelError when nothing here can."""
        key = (item.kind, item.combination_number)
        if key not in self._completers:
            self._completers[key] = self._gateway.completer(item.spec, self._limits, self.answers)
        return self._completers[key]


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
            note_replication=item.replication,
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
            item.note_replication = row["note_ordinal"] // definition.row["notes_per_replication"] + 1
        else:
            item.rubrics = [inputs["rubrics", rubric_id] for rubric_id in row["rubric_ids"]]
        items.append(item)
    return items
