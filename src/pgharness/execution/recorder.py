"""Writing outcomes in groups: one statement for all that arrived within a few milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from pgharness.database import TRANSIENT, Line, Row
from pgharness.errors import HarnessError, RequestRejected
from pgharness.execution.items import failure_fields

logger = logging.getLogger(__name__)
_LINGER_SECONDS = 0.015  # a group costs the database about 2 ms beside its outcomes
_GROUP_ITEMS = 50  # so many are not kept waiting for more
_BATCH_ITEMS = 2_000
_BATCH_BYTES = 8_000_000
_LAST_WRITES_SECONDS = 20.0
_REFUSALS = ("22", "23", "54", "PH")  # SQLSTATE classes: bad value, constraint, too large or deep, our own words


class Recorder:
    """Writes outcomes, and says of each when it is committed.

    It has a thread and a connection of its own, so that a busy event loop does not hold up the database, nor the
    database the loop. An outcome that the database refuses is written as a failure of its item, so that one bad value
    never holds up the others.

    Called in the loop, `on_written` hears of a group: its outcomes, each with what it was added with, what the database
    answered (the state of each run), and whether the group may have been written before without our hearing of it;
    `on_lost` hears of an outcome that will never be written, and why.
    """

    def __init__(
        self,
        line: Line,
        worker_id: int,
        *,
        keeps_grades: bool,
        on_written: Callable[[Sequence[tuple[Row, Any]], Sequence[Row], bool], None],
        on_lost: Callable[[Any, Exception], None],
    ) -> None:
        self._line = line
        self._worker_id = worker_id
        self._keeps_grades = keeps_grades
        self._on_written = on_written
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Entry] = deque()
        self._added: Counter[int] = Counter()  # by run; only the loop's thread counts here,
        self._settled: Counter[int] = Counter()  # and only the recorder's here
        self._wake = threading.Event()
        self._has_group = threading.Event()
        self._is_closing = False
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def add(self, outcome: Row, token: Any = None) -> None:
        """Take an outcome to be written soon, for whom the token stands."""
        self._added[outcome["run_id"]] += 1
        self._queue.append(_Entry(outcome, token))
        if not self._wake.is_set():
            self._wake.set()
        if len(self._queue) == _GROUP_ITEMS:
            self._has_group.set()

    @property
    def backlog(self) -> int:
        """How many outcomes wait to be written."""
        return len(self._queue)

    def unwritten(self, run_id: int) -> int:
        """Return how many outcomes of a run wait to be written, or are being written."""
        return self._added[run_id] - self._settled[run_id]

    def hurry(self) -> None:
        """From now on, give up on a database that stays away."""
        self._deadline = self._deadline or time.monotonic() + _LAST_WRITES_SECONDS

    async def close(self) -> None:
        """Write what is queued and end; gives up on a database that stays away."""
        self.hurry()
        self._is_closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 2 * _LAST_WRITES_SECONDS)

    def _run(self) -> None:
        while self._queue or not self._is_closing:
            self._wake.wait()
            self._wake.clear()
            self._has_group.clear()
            if self._queue and len(self._queue) < _GROUP_ITEMS and not self._is_closing:
                self._has_group.wait(self._queue[0].added_at + _LINGER_SECONDS - time.monotonic())
            batch: list[_Entry] = []
            size = 0
            while self._queue and len(batch) < _BATCH_ITEMS and size < _BATCH_BYTES:
                batch.append(self._queue.popleft())
                size += len(batch[-1].text)
            if not batch:
                continue
            try:
                self._write(batch)
            except Exception as exc:  # whatever it is, those who wait are told, and the recorder lives on
                logger.exception("%s outcomes could not be written", len(batch))
                self._lose(batch, exc)
            self._settled.update(entry.outcome["run_id"] for entry in batch)
            if self._queue:
                self._wake.set()
        self._line.close()

    def _write(self, batch: list[_Entry]) -> None:
        delay = 0.1
        is_repeated = False
        while True:
            try:
                states = self._line.call(
                    "record_outcomes",
                    worker_id=self._worker_id,
                    outcomes=(b"[" + b",".join([entry.text for entry in batch]) + b"]").decode(),
                    keeps_grades=self._keeps_grades,
                )
                break
            except Exception as exc:
                if _is_refusal(exc):
                    self._write_singly(batch, exc)
                    return
                if self._deadline and time.monotonic() > self._deadline:
                    logger.error("%s outcomes could not be written: %s", len(batch), exc)
                    self._lose(batch, exc)
                    return
                logger.warning("the database did not take %s outcomes, which are kept: %s", len(batch), exc)
                is_repeated = True
                time.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)
        self._tell(self._on_written, [(entry.outcome, entry.token) for entry in batch], states, is_repeated)

    def _write_singly(self, batch: list[_Entry], error: Exception) -> None:
        if len(batch) > 1:
            for entry in batch:
                self._write([entry])
            return
        entry = batch[0]
        logger.error("an outcome of run %s was refused: %s", entry.outcome["run_id"], error)
        if (refused := _refused(entry.outcome, error)) is None:
            self._lose(batch, error)
        else:
            self._write([_Entry(refused, entry.token)])

    def _lose(self, batch: list[_Entry], error: Exception) -> None:
        for entry in batch:
            self._tell(self._on_lost, entry.token, error)

    def _tell(self, hear: Callable[..., None], *told: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody listens any more
            self._loop.call_soon_threadsafe(hear, *told)


def _is_refusal(error: Exception) -> bool:
    """Tell whether the database will never take these values; anything else is trouble that may pass.

    A server that restarts, became read-only or lost our privileges for a while says nothing about the outcome, whose
    call is paid for.
    """
    code = getattr(error, "sqlstate", None)
    return code.startswith(_REFUSALS) if code else not isinstance(error, (*TRANSIENT, HarnessError))


class _Entry:
    """An outcome on its way to the database: as it is sent, and for whom."""

    __slots__ = ("added_at", "outcome", "text", "token")

    def __init__(self, outcome: Row, token: Any) -> None:
        self.added_at = time.monotonic()
        self.outcome = outcome
        self.token = token
        try:
            self.outcome, self.text = _storable_json(outcome)
        except (RecursionError, TypeError, ValueError) as exc:  # nothing that a model answers may stop the recorder
            refused = _refused(outcome, exc) or outcome | {"calls": []}
            self.outcome, self.text = _storable_json(refused)


def _refused(outcome: Row, error: Exception) -> Row | None:
    """Return what to record instead of a refused outcome: a failure, with what its calls cost if that is taken."""
    was_refused = outcome.get("cause") == "not_recordable"
    if outcome["result"] == "cancelled" or (was_refused and not outcome["calls"]):
        return None
    failed = {key: outcome[key] for key in ("run_id", "kind", "ordinal", "attempt")} | {"result": "failed"}
    failed |= failure_fields(RequestRejected(f"the outcome could not be recorded: {error}"))
    left_out = {"answer": None, "error": None, "response": None}
    calls = [] if was_refused else [call | left_out for call in outcome["calls"]]
    return failed | {"cause": "not_recordable", "calls": calls}


def _storable_json(outcome: Row) -> tuple[Row, bytes]:
    """Return an outcome as Postgres can store it, without NUL characters and lone surrogates, and its JSON."""
    try:
        # what a program gave as an object goes by way of json, which knows numbers of any size and says NaN
        output = outcome.get("output")
        is_plain = output is None or isinstance(output, str)
        text = orjson.dumps(outcome if is_plain else outcome | {"output": orjson.Fragment(_dumped(output))})
        if b"\\u0000" not in text:
            return outcome, text
    except (TypeError, UnicodeEncodeError):  # a lone surrogate, or an integer of more than 64 bits
        pass
    outcome = _storable(outcome)
    return outcome, _dumped(outcome)


def _dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str).encode()


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value
