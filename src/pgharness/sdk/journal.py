"""Writing what tasks tell and how they end: in order, in groups, within a few hundredths of a second.

It has a thread and a connection of its own, so that code which never yields is written down all the same. What waits
to be written is bounded: who tells faster than the database takes it waits, and the memory of the process stays small.
Nothing told before a task's end is written after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import orjson

from pgharness.database import TRANSIENT, Line

logger = logging.getLogger(__name__)
_LINGER_SECONDS = 0.03
_MOST_WAITING = 2_000  # more would be seen too late
_MOST_WAITING_BYTES = 16_000_000
_GROUP_ROWS = 2_000
_GROUP_BYTES = 4_000_000
_LAST_WRITES_SECONDS = 20.0
_LONGEST_TEXT = 1_000_000
_ROW_BYTES = 200  # about what a row costs beside its texts
_COLUMNS = {"metric": {"value": "number"}, "progress": {"current": "position"}}


@dataclass(slots=True)
class _Entry:
    """What is told, and as it is sent: made by who tells it, while the database writes what was told before."""

    run_id: int
    task: int
    attempt: int
    kind: str
    row: dict[str, Any]
    at: datetime
    ended: asyncio.Future[None] | None = None
    text: str = field(init=False, default="")  # of all but artifacts, which are bytes

    def __post_init__(self) -> None:
        self.encode()

    def encode(self) -> None:
        """Make the text anew from the row."""
        if self.kind == "log":
            self.text = storable_json(_line(self))
        elif self.kind == "end":
            self.text = storable_json(self.row)
        elif self.kind != "artifact":
            self.text = storable_json(_row(self))

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return _ROW_BYTES + len(self.row["content"] if self.kind == "artifact" else self.text)


class _Away(Exception):
    """The database stays away, and there is no more time to wait for it."""


class Journal:
    """Writes for all tasks of this process. `on_state` hears, in its thread, what the database says of a run."""

    def __init__(self, line: Line, worker_id: int, on_state: Callable[[int, str, int], None]) -> None:
        self._line = line
        self._worker_id = worker_id
        self._on_state = on_state
        self._name = uuid4().hex  # by which the database knows a group that it is sent twice
        self._numbers = itertools.count(1)
        self._entries: list[_Entry] = []
        self._size = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._has_room = threading.Event()
        self._has_room.set()
        self._is_empty = threading.Event()
        self._is_empty.set()
        self._is_hurried = threading.Event()  # a task has ended, and its end is waited for
        self._is_closing = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def tell(self, run_id: int, task: int, attempt: int, kind: str, row: dict[str, Any]) -> None:
        """Take what a task tells; waits while too much is still to be written."""
        self._put(_Entry(run_id, task, attempt, kind, row, datetime.now(UTC)))

    def end(self, run_id: int, task: int, attempt: int, outcome: dict[str, Any]) -> asyncio.Future[None]:
        """Take how a task ended; the future is done when that is written. Called in the loop."""
        ended = asyncio.get_running_loop().create_future()
        row = outcome | {"ordinal": task, "attempt": attempt}
        self._put(_Entry(run_id, task, attempt, "end", row, datetime.now(UTC), ended), is_urgent=True)
        return ended

    def flush(self, seconds: float) -> bool:
        """Wait until all that was told is written, for so long at most."""
        return self._is_empty.wait(seconds)

    def close(self) -> None:
        """Write what is left and end; gives up on a database that stays away."""
        self._deadline = time.monotonic() + _LAST_WRITES_SECONDS
        self._is_closing = True
        self._has_room.set()
        self._is_hurried.set()
        self._wake.set()
        self._thread.join(2 * _LAST_WRITES_SECONDS)

    def _put(self, entry: _Entry, *, is_urgent: bool = False) -> None:
        if not self._has_room.is_set() and not is_urgent and threading.current_thread() is not self._thread:
            self._has_room.wait()
        with self._lock:
            self._entries.append(entry)
            self._size += entry.size
            if len(self._entries) >= _MOST_WAITING or self._size >= _MOST_WAITING_BYTES:
                self._has_room.clear()
            is_first = len(self._entries) == 1
        if is_urgent:
            self._is_hurried.set()
        if is_first:
            self._is_empty.clear()
            self._wake.set()

    def _run(self) -> None:
        while self._entries or not self._is_closing:
            self._wake.wait()
            self._wake.clear()
            if len(self._entries) < _GROUP_ROWS:
                self._is_hurried.wait(_LINGER_SECONDS)
            while self._entries:
                self._is_hurried.clear()
                group = self._cut()
                try:
                    for run_id in dict.fromkeys(entry.run_id for entry in group):
                        self._write(run_id, [entry for entry in group if entry.run_id == run_id])
                except _Away as exc:
                    logger.error("what tasks told could not be written: %s", exc.__cause__)
                    self._has_room.set()
                    return
                except Exception as exc:  # whatever it is, the journal lives on, and nobody waits for it in vain
                    logger.exception("what tasks told could not be written")
                    for entry in group:
                        self._settle(entry, exc)
            with self._lock:
                if not self._entries:
                    self._is_empty.set()
        self._line.close()

    def _cut(self) -> list[_Entry]:
        with self._lock:
            size = count = 0
            while count < len(self._entries) and count < _GROUP_ROWS and size < _GROUP_BYTES:
                size += self._entries[count].size
                count += 1
            group, self._entries = self._entries[:count], self._entries[count:]
            self._size -= size
            if len(self._entries) < _MOST_WAITING and self._size < _MOST_WAITING_BYTES:
                self._has_room.set()
        return group

    def _write(self, run_id: int, entries: list[_Entry]) -> None:
        lines = [entry for entry in entries if entry.kind == "log"]
        rows = [entry for entry in entries if entry.kind not in ("log", "artifact", "end")]
        ends = [entry for entry in entries if entry.kind == "end"]
        if lines or rows:
            self._tell(run_id, lines, rows)
        for entry in entries:
            if entry.kind == "artifact":
                self._keep(entry)
        if ends:
            self._end(run_id, ends)

    def _tell(self, run_id: int, lines: list[_Entry], rows: list[_Entry]) -> None:
        try:
            self._call(
                "record_told",
                worker_id=self._worker_id,
                run_id=run_id,
                teller=self._name,
                number=next(self._numbers),
                lines=_array(lines),
                rows=_array(rows),
            )
        except _Away:
            raise
        except Exception as exc:
            if len(lines) + len(rows) > 1:  # one bad value must not take the others with it
                for entry in lines:
                    self._tell(run_id, [entry], [])
                for entry in rows:
                    self._tell(run_id, [], [entry])
                return
            self._refuse((lines + rows)[0], exc)

    def _keep(self, artifact: _Entry) -> None:
        row = artifact.row | {"name": _text(artifact.row["name"]), "media_type": _text(artifact.row["media_type"])}
        place = {"run_id": artifact.run_id, "task": artifact.task, "attempt": artifact.attempt}
        try:
            self._call("keep_artifact", teller=self._name, number=next(self._numbers), **place, **row)
        except _Away:
            raise
        except Exception as exc:
            self._refuse(artifact, exc)

    def _refuse(self, told: _Entry, error: Exception) -> None:
        """Say in the log that something was refused."""
        logger.error("what a task of run %s told was refused: %s", told.run_id, error)
        if told.kind != "log":
            row = {"level": "error", "message": f"a {told.kind} was refused: {error}", "data": {}}
            self._tell(told.run_id, [_Entry(told.run_id, told.task, told.attempt, "log", row, told.at)], [])

    def _end(self, run_id: int, ends: list[_Entry]) -> None:
        try:
            self._call(
                "record_tasks",
                worker_id=self._worker_id,
                run_id=run_id,
                outcomes=_array(ends),
            )
        except _Away:
            raise
        except Exception as exc:
            if len(ends) > 1:
                for end in ends:
                    self._end(run_id, [end])
                return
            end = ends[0]
            if end.row["status"] == "failed" and end.row.get("result") is None:
                self._settle(end, exc)
                return
            refused = {"status": "failed", "error": f"its result could not be recorded: {exc}", "is_final": True}
            end.row = refused | {"ordinal": end.task, "attempt": end.attempt}
            end.encode()
            self._end(run_id, [end])
            return
        for end in ends:
            self._settle(end, None)

    def _settle(self, end: _Entry, error: Exception | None) -> None:
        ended = end.ended
        if ended is None:
            return

        def settle() -> None:
            if not ended.done():
                ended.set_result(None) if error is None else ended.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            ended.get_loop().call_soon_threadsafe(settle)

    def _call(self, function: str, **arguments: Any) -> None:
        """Call until the database answers; raise what it refuses."""
        delay = 0.1
        while True:
            try:
                found = self._line.call(function, **arguments)
                break
            except TRANSIENT as exc:
                if self._deadline and time.monotonic() > self._deadline:
                    raise _Away from exc
                time.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)
        if found and "epoch" in found[0]:
            self._on_state(arguments["run_id"], found[0]["status"], found[0]["epoch"])


def _array(entries: Iterable[_Entry]) -> str:
    return f"[{','.join([entry.text for entry in entries])}]"


def _line(entry: _Entry) -> list[Any]:
    row = entry.row
    return [entry.task, entry.attempt, row["level"], _text(row["message"]), row["data"], entry.at]


def _row(entry: _Entry) -> dict[str, Any]:
    renamed = _COLUMNS.get(entry.kind, {})
    row = {renamed.get(name, name): value for name, value in entry.row.items()}
    if entry.kind == "metric" and not math.isfinite(row["number"]):
        row["number"] = str(row["number"])  # which JSON has no number for, and Postgres reads
    return row | {"kind": entry.kind, "task": entry.task, "attempt": entry.attempt, "created_at": entry.at}


def _text(text: str) -> str:
    """Return a text as Postgres can store it: no NUL, no half of a character, no more than a megabyte of it."""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}… ({len(text) - _LONGEST_TEXT:,} characters were left out)"
    if "\0" in text or not text.isascii():
        text = text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def storable_json(value: Any) -> str:
    """Return JSON that Postgres can store."""
    with contextlib.suppress(TypeError):  # a lone surrogate, or an integer of more than 64 bits
        text = orjson.dumps(value)
        if b"\\u0000" not in text and (b"null" not in text or _is_finite(value)):
            return text.decode()
    return json.dumps(_storable(value), ensure_ascii=False, separators=(",", ":"), default=str)


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


def _storable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict):
        return {_text(str(key)): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value
