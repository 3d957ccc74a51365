"""What an engine keeps of runs: their open slices, and the lines in which items wait for a place."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field

from pgharness.database import Row
from pgharness.execution.definition import Definition
from pgharness.execution.items import Item
from pgharness.execution.slices import Slice
from pgharness.gateway.limits import Gate
from pgharness.types import ItemKind


@dataclass(slots=True, eq=False)
class Open:
    """A slice that is being worked on."""

    work: Slice
    left: int
    done: asyncio.Future[None]
    is_whole: bool = True  # nothing of it was left undone


@dataclass(slots=True, eq=False)
class Line:
    """Items of a run that wait for a place and for one model."""

    kind: ItemKind
    gate: Gate | None
    items: deque[Item] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Run:
    """A run as this worker knows it: its frozen definition, and what the database last said of its state."""

    run_id: int
    definition: Definition
    priority: int
    status: str = "running"
    epoch: int = 0
    slices: int = 0
    gate: Gate | None = None  # when its calls are capped
    lines: dict[tuple[ItemKind, int], Line] = field(default_factory=dict)
    waiting: int = 0
    items: int = 0  # those in slices, waiting, in flight and being recorded
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    seeking: dict[Item, asyncio.Task[Row | None]] = field(default_factory=dict)  # in the response cache
    in_flight: Counter[ItemKind] = field(default_factory=Counter)

    def wants(self, work: Slice) -> bool:
        """Tell whether a slice is waited for: what a run that stopped has left comes back under a later epoch."""
        return self.status == "running" and self.epoch == work.epoch


def close(run: Run, item: Item, is_over: bool) -> None:
    """Take an item out of its slice; whether it is over, or left undone."""
    opened, item.slice = item.slice, None
    run.items -= 1
    opened.left -= 1
    opened.is_whole = opened.is_whole and is_over
    if not opened.left and not opened.done.done():
        opened.done.set_result(None)


def goes_before(line: Line, other: Line) -> bool:
    """Tell whether the first item of one line begins before that of another line of the same run."""
    if line.kind != other.kind:
        return line.kind == "grade"
    return line.items[0].ordinal < other.items[0].ordinal
