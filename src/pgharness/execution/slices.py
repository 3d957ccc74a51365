"""Slices: the queue's jobs of notes and grades, and what each has left to do, read from the database."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pgharness.database import TRANSIENT, Database, Row
from pgharness.execution.definition import Definition, loaded
from pgharness.execution.items import Item
from pgharness.types import ItemKind

logger = logging.getLogger(__name__)
_CACHED_INPUTS = 2_000


class HandedBack(Exception):
    """Not all of a slice was done, because the worker or the run is stopping: it goes back to the queue."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One queue job: a range of ordinals, or a list of them."""

    run_id: int
    kind: ItemKind
    epoch: int
    first: int | None = None
    last: int | None = None
    ordinals: list[int] | None = None
    crashes: int = 0
    keeps_grades: bool | None = None
    job_id: int | None = None
    experiment: str | None = None  # of code
    depth: int | None = None  # of code: how many maps its tasks stand in

    @property
    def count(self) -> int:
        """How many items it names."""
        if self.ordinals is not None:
            return len(self.ordinals)
        assert self.first is not None and self.last is not None
        return self.last - self.first + 1


class Loader:
    """Reads what slices have left to do. Once it `is_stopping`, it does not wait for a database that is away."""

    def __init__(self, database: Database, worker_id: int) -> None:
        self._database = database
        self._worker_id = worker_id
        self._inputs: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.is_stopping = False

    async def items(self, definition: Definition, work: Slice, on_found: Callable[[], None]) -> list[Item]:
        """Return what a slice has left to do; `on_found` is called first if that is anything."""
        rows = await self.persist(
            "load_slice",
            worker_id=self._worker_id,
            slice={name: value for name, value in asdict(work).items() if value is not None},
        )
        if not rows:
            return []
        on_found()
        wanted = {("cases", row["case_id"]) for row in rows}
        wanted |= {("rubrics", row["rubric_id"]) for row in rows if row["rubric_id"] is not None}
        wanted |= {("rubrics", rubric_id) for row in rows for rubric_id in row["rubric_ids"] or ()}
        inputs = {key: self._inputs[key] for key in wanted if key in self._inputs}  # now: others may push them out
        missing = wanted - inputs.keys()
        notes = sorted({row["note_ordinal"] for row in rows if row["kind"] == "grade"})
        if missing or notes:
            found = (
                await self.persist(
                    "load_inputs",
                    run_id=work.run_id,
                    cases=[id for table, id in missing if table == "cases"],
                    rubrics=[id for table, id in missing if table == "rubrics"],
                    notes=notes,
                )
            )[0]["load_inputs"]
            for table in ("cases", "rubrics", "notes"):
                for id, content in (found.get(table) or {}).items():
                    inputs[table, int(id)] = content
        for key in wanted:
            self._inputs[key] = inputs[key]
            self._inputs.move_to_end(key)
        while len(self._inputs) > _CACHED_INPUTS:
            self._inputs.popitem(last=False)
        return loaded(rows, definition, inputs)

    async def persist(self, function: str, /, **args: object) -> list[Row]:
        """Call the database until it answers, or the worker stops."""
        delay = 0.1
        while True:
            try:
                return await self._database.call(function, **args)
            except TRANSIENT as exc:
                if self.is_stopping:
                    raise HandedBack from exc
                logger.warning("the database did not answer %s: %s", function, exc)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)
