"""Running items: load a slice, ask the models, record what came of it.

The promise: an item's outcome is durable before its slice is acknowledged; no connection is held while a model is
asked; a place is free for the next call before the last one's outcome is written; a cancelled run's calls are aborted.
Running a slice twice does only what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import traceback
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import CodeFailed, HarnessError, InvalidOutput, ModelError, RequestRejected
from pgharness.gateway import Gateway
from pgharness.gateway.limits import Limits
from pgharness.grading import criteria_values, read_verdicts, score_metric, verdict_schema
from pgharness.prompts import Prompt, case_values, text_of
from pgharness.types import Completer, Completion, ItemKind, Message, ModelSpec, Request

logger = logging.getLogger(__name__)
_CRASH_LIMIT = 5
_SUSPECT_AFTER = 3  # a slice of one item that came back so often is run alone, with its crash charged beforehand
_LINGER_SECONDS = 0.005
_BATCH_ITEMS = 500
_BATCH_BYTES = 8_000_000
_CACHED_INPUTS = 2_000
_CACHED_RUNS = 50
_OUTPUT_TOKENS_GUESS = 500
_LAST_WRITES_SECONDS = 20.0
_CODE = ("command", "python")
_REFUSALS = ("22", "23", "54", "PH")  # SQLSTATE classes: bad value, constraint, too large or deep, our own words


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


@dataclass(frozen=True, slots=True)
class _Combination:
    generator: ModelSpec
    grader: ModelSpec | None
    rubric_count: int


@dataclass(slots=True)
class _Run:
    """A run as this worker knows it: its frozen definition, and what the database last said of its state."""

    run_id: int
    definition: Row
    combinations: dict[int, _Combination]
    completers: dict[tuple[int, str], Completer] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    status: str = "running"
    epoch: int = 0
    slices: int = 0
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)  # items whose call has not ended

    def wants(self, work: Slice) -> bool:
        """Tell whether a slice is waited for: what a run that stopped has left comes back under a later epoch."""
        return self.status == "running" and self.epoch == work.epoch


class Engine:
    """Runs slices of any runs, with at most `concurrency` calls in flight in this process."""

    def __init__(self, database: Database, gateway: Gateway, *, worker_id: int, concurrency: int) -> None:
        self._database = database
        self._gateway = gateway
        self._limits = Limits(database, worker_id)
        self._worker_id = worker_id
        self.concurrency = concurrency
        self._slots = asyncio.Semaphore(concurrency)
        self._recorder = Recorder(database, worker_id, self.apply_states)
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._inputs: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._claims: dict[tuple[int, str, int], asyncio.Future[int]] = {}  # of tries made
        self._waiting: set[asyncio.Task[Any]] = set()  # items whose call has not begun
        self._alone = asyncio.Lock()
        self._room = asyncio.Event()
        self._room.set()
        self._loading = 0
        self._in_flight: Counter[tuple[int, ItemKind]] = Counter()
        self.is_draining = False

    # -- what the process asks of it

    @property
    def open_runs(self) -> list[int]:
        """Ids of the runs with items here."""
        return [run.run_id for run in self._runs.values() if run.slices]

    @property
    def in_flight(self) -> dict[str, dict[str, int]]:
        """How many calls are in flight, by run and kind of item, as a heartbeat tells it."""
        self._in_flight = +self._in_flight  # forget runs that have none
        told: dict[str, dict[str, int]] = {}
        for (run_id, kind), count in self._in_flight.items():
            told.setdefault(str(run_id), {})[kind] = count
        return told

    async def wait_for_room(self) -> None:
        """Wait until another slice would keep calls in flight: a worker takes no more work than it can start soon."""
        await self._room.wait()

    def apply_states(self, states: Sequence[Row]) -> None:
        """Act on what the database says of runs: abort those that ended, start nothing of those that paused."""
        for state in states:
            run = self._runs.get(state["run_id"])
            # a lower epoch was read before the run was queued anew
            if run is not None and (state["epoch"] >= run.epoch or state["status"] == "deleted"):
                self._learn(run, state["status"], state["epoch"])

    def _learn(self, run: _Run, status: str, epoch: int) -> None:
        is_newer = epoch > run.epoch
        run.status, run.epoch = status, max(epoch, run.epoch)
        if status in ("cancelled", "failed", "deleted"):
            _cancel(run.tasks)
        elif status != "running" or is_newer:
            _cancel(run.tasks & self._waiting)  # they may have long to wait, and others wait for them

    def drain(self) -> None:
        """Start no more items; those in flight end, and slices hand back the rest."""
        self.is_draining = True
        _cancel(self._waiting)
        self._update_room()

    def abort(self) -> None:
        """Cancel the calls in flight; their items go back to the queue with their slices."""
        self.drain()
        for run in self._runs.values():
            _cancel(run.tasks)
        self._recorder.hurry()  # what has ended is still written, unless the database stays away

    async def close(self) -> None:
        """Write what is left and stop."""
        await self._recorder.close()
        await self._limits.close()

    # -- slices

    async def run_slice(self, work: Slice) -> None:
        """Do what a slice has left to do. Raises HandedBack unless all that is still wanted of it is durable."""
        with self._loads():
            run = await self._load_run(work.run_id)
        if run is None:
            return
        run.slices += 1  # and is not forgotten from here on
        try:
            with self._loads():
                items = await self._load_items(run, work)
            await self._run_items(run, work, items)
        finally:
            run.slices -= 1
        if run.wants(work) and not all(item.is_over for item in items):
            raise HandedBack

    async def _run_items(self, run: _Run, work: Slice, items: list[_Item]) -> None:
        if work.crashes >= _SUSPECT_AFTER and len(items) == 1:
            items[0].is_suspect = True
        tasks = [asyncio.create_task(self._run_item(run, work, item)) for item in items]
        run.tasks.update(tasks)
        self._waiting.update(tasks)
        self._update_room()
        for task in tasks:
            # a task that is cancelled before its first step runs nothing of its own
            task.add_done_callback(run.tasks.discard)
            task.add_done_callback(self._stop_waiting)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _load_run(self, run_id: int) -> _Run | None:
        if run_id not in self._runs:
            definition = (await self._persist("load_run", run_id=run_id))[0]["load_run"]
            if definition is None:
                return None
            combinations = {
                row["number"]: _Combination(
                    ModelSpec.model_validate(row["generator"]),
                    ModelSpec.model_validate(row["grader"]) if row["grader"] else None,
                    row["rubric_count"],
                )
                for row in definition["combinations"]
            }
            # another slice may have loaded it meanwhile; there must be one, or its state would not reach all tasks
            self._runs.setdefault(run_id, _Run(run_id, definition, combinations))
            idle = [run for run in self._runs.values() if not run.slices and run.run_id != run_id]
            for old in idle[: max(len(self._runs) - _CACHED_RUNS, 0)]:
                del self._runs[old.run_id]
        return self._runs[run_id]

    async def _load_items(self, run: _Run, work: Slice) -> list[_Item]:
        rows = await self._persist(
            "load_slice",
            worker_id=self._worker_id,
            slice={name: value for name, value in asdict(work).items() if value is not None},
        )
        if not rows:
            return []
        if work.epoch > run.epoch:
            self._learn(run, "running", work.epoch)  # or it would have given nothing
        wanted = {("cases", row["case_id"]) for row in rows}
        wanted |= {("rubrics", row["rubric_id"]) for row in rows if row["rubric_id"] is not None}
        inputs = {key: self._inputs[key] for key in wanted if key in self._inputs}  # now: others may push them out
        missing = wanted - inputs.keys()
        notes = sorted({row["note_ordinal"] for row in rows}) if work.kind == "grade" else []
        found: Row = {}
        if missing or notes:
            found = (
                await self._persist(
                    "load_inputs",
                    run_id=work.run_id,
                    cases=[id for table, id in missing if table == "cases"],
                    rubrics=[id for table, id in missing if table == "rubrics"],
                    notes=notes,
                )
            )[0]["load_inputs"]
        for table in ("cases", "rubrics"):
            for id, content in (found.get(table) or {}).items():
                inputs[table, int(id)] = content
        for key, content in inputs.items():
            self._inputs[key] = content
            self._inputs.move_to_end(key)
        while len(self._inputs) > _CACHED_INPUTS:
            self._inputs.popitem(last=False)
        outputs = {int(ordinal): output for ordinal, output in (found.get("notes") or {}).items()}
        return [
            _Item(
                row,
                case=inputs["cases", row["case_id"]],
                rubric=inputs["rubrics", row["rubric_id"]] if row["rubric_id"] is not None else None,
                note=outputs.get(row["note_ordinal"]),
            )
            for row in rows
        ]

    async def _persist(self, function: str, /, **args: object) -> list[Row]:
        """Call the database until it answers, or the worker stops."""
        delay = 0.1
        while True:
            try:
                return await self._database.call(function, **args)
            except TRANSIENT as exc:
                if self.is_draining:
                    raise HandedBack from exc
                logger.warning("the database did not answer %s: %s", function, exc)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)

    # -- items

    async def _run_item(self, run: _Run, work: Slice, item: _Item) -> None:
        key = (run.run_id, work.kind, item.ordinal)
        while not item.is_over and key in self._claims:
            # another slice of this process has it: over when the same try, or a later one, is durable there
            item.is_over = await asyncio.shield(self._claims[key]) > item.row["tries"]
        if item.is_over:
            return
        claim = self._claims[key] = asyncio.get_running_loop().create_future()
        try:
            outcome = await self._outcome(run, work, item)
            if outcome is not None:
                task = _this_task()
                run.tasks.discard(task)
                self._stop_waiting(task)
                await self._recorder.record(outcome)
                item.is_over = True
        finally:
            del self._claims[key]
            claim.set_result(item.row["tries"] + 1 if item.is_over else 0)

    async def _outcome(self, run: _Run, work: Slice, item: _Item) -> Row | None:
        """Return what came of an item; None when it was not tried, because the worker or its run is stopping."""
        combination = run.combinations[item.row["combination_number"]]
        spec = combination.grader if work.kind == "grade" else combination.generator
        assert spec is not None
        if self.is_draining or not run.wants(work):
            return None
        try:
            if spec.provider == "metric":
                return self._score(run, item, spec)
            completer, request = self._completer(run, spec), self._request(run, work.kind, item, spec)
            tokens = _estimated_tokens(request, spec)
        except Exception as exc:
            return item.outcome(run.run_id, work.kind, result="failed") | _failure(_model_error(exc))
        alone = self._alone if item.is_suspect else contextlib.nullcontext()
        async with alone, self._limits.slot(spec, tokens=tokens), self._slots:
            if self.is_draining or not run.wants(work):
                return None
            self._stop_waiting(_this_task())
            if item.is_suspect and (crash := await self._charge(run, work, item)):
                return crash
            self._in_flight[run.run_id, work.kind] += 1
            try:
                return await self._ask(run, work.kind, item, spec, completer, request, tokens)
            finally:
                self._in_flight[run.run_id, work.kind] -= 1

    async def _charge(self, run: _Run, work: Slice, item: _Item) -> Row | None:
        """Count the crash that follows if this process dies of the item; return its failure after enough of them."""
        charged = await self._persist("charge_crash", run_id=run.run_id, kind=work.kind, ordinal=item.ordinal)
        if charged[0]["charge_crash"] <= _CRASH_LIMIT:
            return None
        error = RequestRejected(f"the worker process died {_CRASH_LIMIT} times while it ran this item alone")
        return item.outcome(run.run_id, work.kind, result="failed") | _failure(error) | {"cause": "crashed"}

    async def _ask(
        self,
        run: _Run,
        kind: ItemKind,
        item: _Item,
        spec: ModelSpec,
        completer: Completer,
        request: Request,
        tokens: int,
    ) -> Row:
        """Make the one call of this try and return its outcome; a cancelled call is recorded as such."""
        started_at, start = datetime.now(UTC).isoformat(), time.perf_counter()

        def call(**fields: Any) -> list[Row]:
            latency_ms = (time.perf_counter() - start) * 1000
            return [{"model_id": spec.id, "started_at": started_at, "latency_ms": latency_ms} | fields]

        completion: Completion | None = None
        try:
            completion = await completer(request)
            answer = self._read(kind, item, completion)
        except ModelError as exc:
            if exc.retry_after is not None and not exc.spends_attempt:
                self._limits.block(spec, exc.retry_after)
            usage = completion.usage if completion else None
            used = (usage.input_tokens, usage.output_tokens, usage.cached_tokens) if usage else _used(exc)
            self._limits.settle(spec, estimated=tokens, used=used[0] + used[1])
            text = (exc.text or (completion.text if completion else None) or "")[:100_000] or None
            failed = call(outcome=exc.outcome, error=str(exc)[:4000], answer=text, http_status=exc.http_status)
            failed[0] |= _reply_fields(spec, used, completion or exc)
            return item.outcome(run.run_id, kind, result="failed", calls=failed) | _failure(exc)
        except asyncio.CancelledError:
            with contextlib.suppress(Exception):
                cancelled = call(outcome="cancelled")
                self._recorder.enqueue(item.outcome(run.run_id, kind, result="cancelled", calls=cancelled))
            raise
        except Exception as exc:
            trouble = _model_error(exc)
            failed = call(outcome="error", error=str(trouble)[:4000], answer=trouble.text)
            return item.outcome(run.run_id, kind, result="failed", calls=failed) | _failure(trouble)
        usage = completion.usage
        self._limits.settle(spec, estimated=tokens, used=usage.input_tokens + usage.output_tokens)
        done = call(outcome="succeeded", http_status=completion.http_status)
        done[0] |= _reply_fields(spec, (usage.input_tokens, usage.output_tokens, usage.cached_tokens), completion)
        return item.outcome(run.run_id, kind, result="succeeded", calls=done) | answer

    def _read(self, kind: ItemKind, item: _Item, completion: Completion) -> Row:
        if kind == "note":
            if completion.data is None and not completion.text.strip():
                raise InvalidOutput("the answer is empty", text=completion.text)
            return {"output": completion.text if completion.data is None else completion.data}
        count = len(item.rubric["criteria"]) if item.rubric else 1
        return {"verdicts": read_verdicts(completion.data, count, text=completion.text)}

    def _score(self, run: _Run, item: _Item, spec: ModelSpec) -> Row:
        score = score_metric(spec.model, spec.parameters, item.note, item.case.get("target"))
        return item.outcome(run.run_id, "grade", result="succeeded") | {
            "score": score.score,
            "max_score": score.max_score,
        }

    def _completer(self, run: _Run, spec: ModelSpec) -> Completer:
        key = (spec.id, spec.model_dump_json())
        if key not in run.completers:
            run.completers[key] = self._gateway.completer(spec)
        return run.completers[key]

    def _request(self, run: _Run, kind: ItemKind, item: _Item, spec: ModelSpec) -> Request:
        definition, row = run.definition, item.row
        seed = _seed(definition["seed"], kind, item.ordinal)
        case = item.case
        if kind == "note" and spec.provider in _CODE:
            case = {name: value for name, value in case.items() if name != "target"}  # the answer is not given away
        facts: dict[str, Any] = {
            "case": case,
            "config": definition["config"],
            "overlap": row["overlap"],
            "replication": row["replication"],
            "cycle_times": definition["cycle_times"],
            "software_version": definition["software_version"],
            "run": definition["run"],
        }
        values = case_values(
            item.case, config=definition["config"], overlap=row["overlap"], replication=row["replication"]
        )
        schema = None
        if kind == "grade":
            criteria = criteria_values(item.rubric)
            values |= {
                "note": text_of(item.note),
                "criteria": criteria,
                "rubric_author": (item.rubric or {}).get("author"),
            }
            facts |= {"note": item.note, "rubric": {"criteria": criteria}}
            schema = verdict_schema(len(criteria))
        if kind not in run.prompts:
            prompts = definition["prompts"]
            run.prompts[kind] = Prompt(kind, prompts[f"{kind}_system"], prompts[kind])
        messages = run.prompts[kind].render(values)
        if row["cause"] == InvalidOutput.outcome and row["answer"]:
            messages += (
                Message("assistant", row["answer"]),
                Message(
                    "user",
                    f"This answer cannot be used: {row['error']}. Answer again, in full and in the form asked for.",
                ),
            )
        return Request(
            messages=messages,
            schema=schema,
            schema_name="verdicts",
            is_reasoning=spec.is_reasoning,
            seed=seed,
            attempt=row["tries"] + 1,
            item=facts,
        )

    @contextlib.contextmanager
    def _loads(self) -> Iterator[None]:
        self._loading += 1
        self._update_room()
        try:
            yield
        finally:
            self._loading -= 1
            self._update_room()

    def _stop_waiting(self, task: asyncio.Task[Any]) -> None:
        self._waiting.discard(task)
        self._update_room()

    def _update_room(self) -> None:
        if self.is_draining or (len(self._waiting) < self.concurrency and self._loading < 4):
            self._room.set()
        else:
            self._room.clear()


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in list(tasks):
        task.cancel()


class _Item:
    """A note or grade to make: its row of the plan, and what it is made from."""

    __slots__ = ("case", "is_over", "is_suspect", "note", "ordinal", "row", "rubric")

    def __init__(self, row: Row, *, case: Row, rubric: Row | None, note: Any) -> None:
        self.row = row
        self.ordinal: int = row["ordinal"]
        self.case = case
        self.rubric = rubric
        self.note = note
        self.is_over = False
        self.is_suspect = False

    def outcome(self, run_id: int, kind: ItemKind, *, result: str, calls: list[Row] | None = None) -> Row:
        """Return the common part of an outcome, shaped like the SQL type of that name."""
        return {
            "run_id": run_id,
            "kind": kind,
            "ordinal": self.ordinal,
            "attempt": self.row["tries"] + 1,
            "result": result,
            "calls": calls or [],
        }


def _model_error(exc: Exception) -> ModelError:
    """Return a ModelError as it is, and anything unexpected as the failure of code that it is."""
    if isinstance(exc, ModelError):
        return exc
    logger.error("an item failed with an unexpected error", exc_info=exc)
    text = "".join(traceback.format_exception(exc))[-8000:]
    return CodeFailed(f"{type(exc).__name__}: {exc}", text=text)


def _failure(error: ModelError) -> Row:
    return {
        "cause": error.outcome,
        "error": (str(error) + (f" ({error.hint})" if error.hint else ""))[:4000],
        "answer": error.text[:100_000] if error.text else None,
        "is_retryable": error.is_retryable,
        "spends_attempt": error.spends_attempt,
        "retry_after": error.retry_after,
    }


def _used(error: ModelError) -> tuple[int, int, int]:
    return error.input_tokens, error.output_tokens, error.cached_tokens


def _reply_fields(spec: ModelSpec, used: tuple[int, int, int], reply: Completion | ModelError) -> Row:
    return {
        "input_tokens": used[0],
        "output_tokens": used[1],
        "cached_tokens": used[2],
        "cost_usd": spec.price(*used),
        "finish_reason": reply.finish_reason,
        "request_id": reply.request_id,
        "answered_by": reply.model if isinstance(reply, Completion) else None,
    }


def _estimated_tokens(request: Request, spec: ModelSpec) -> int:
    limit = request.parameters.get("max_tokens") or spec.parameters.get("max_tokens") or _OUTPUT_TOKENS_GUESS
    return sum(len(message.content) for message in request.messages) // 4 + int(limit)


def _seed(run_seed: int, kind: str, ordinal: int) -> int:
    """Return an item's own seed (31 bits, which every provider takes), from the run's."""
    return int.from_bytes(blake2b(f"{run_seed}/{kind}/{ordinal}".encode(), digest_size=4).digest(), "big") >> 1


class Recorder:
    """Writes outcomes in groups: one statement for all that arrived within a few milliseconds.

    `record` returns when its outcome is committed. An outcome that the database refuses is written as a failure of its
    item, so that one bad value never holds up the others.
    """

    def __init__(self, database: Database, worker_id: int, on_states: Callable[[Sequence[Row]], None]) -> None:
        self._database = database
        self._worker_id = worker_id
        self._on_states = on_states
        self._queue: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._is_closing = False
        self._deadline: float | None = None
        self._task = asyncio.create_task(self._run())

    def enqueue(self, outcome: Row) -> asyncio.Future[None]:
        """Take an outcome to be written soon."""
        entry = _Entry(outcome, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self._wake.set()
        return entry.written

    async def record(self, outcome: Row) -> None:
        """Write an outcome; returns when it is durable, even when the caller is cancelled meanwhile."""
        await asyncio.shield(self.enqueue(outcome))

    def hurry(self) -> None:
        """From now on, give up on a database that stays away."""
        self._deadline = self._deadline or time.monotonic() + _LAST_WRITES_SECONDS

    async def close(self) -> None:
        """Write what is queued and end; gives up on a database that stays away."""
        self.hurry()
        self._is_closing = True
        self._wake.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while not (self._is_closing and not self._queue):
            await self._wake.wait()
            await asyncio.sleep(_LINGER_SECONDS)
            while self._queue:
                batch: list[_Entry] = []
                size = 0
                while self._queue and len(batch) < _BATCH_ITEMS and size < _BATCH_BYTES:
                    batch.append(self._queue.popleft())
                    size += len(batch[-1].text)
                try:
                    await self._write(batch)
                except Exception as exc:  # whatever it is, those who wait are told, and the recorder lives on
                    logger.exception("%s outcomes could not be written", len(batch))
                    _settle(batch, exc)
            self._wake.clear()
            if self._is_closing:
                self._wake.set()

    async def _write(self, batch: list[_Entry]) -> None:
        delay = 0.1
        while True:
            try:
                states = await self._database.call(
                    "record_outcomes",
                    worker_id=self._worker_id,
                    outcomes="[" + ",".join([entry.text for entry in batch]) + "]",
                )
                break
            except Exception as exc:
                if _is_refusal(exc):
                    await self._write_singly(batch, exc)
                    return
                if self._deadline and time.monotonic() > self._deadline:
                    logger.error("%s outcomes could not be written: %s", len(batch), exc)
                    _settle(batch, exc)
                    return
                logger.warning("the database did not take %s outcomes, which are kept: %s", len(batch), exc)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)
        _settle(batch, None)
        self._on_states(states)

    async def _write_singly(self, batch: list[_Entry], error: Exception) -> None:
        if len(batch) > 1:
            for entry in batch:
                await self._write([entry])
            return
        entry = batch[0]
        logger.error("an outcome of run %s was refused: %s", entry.outcome["run_id"], error)
        if (refused := _refused(entry.outcome, error)) is None:
            _settle(batch, error)
        else:
            await self._write([_Entry(refused, entry.written)])


def _is_refusal(error: Exception) -> bool:
    """Tell whether the database will never take these values; anything else is trouble that may pass.

    A server that restarts, became read-only or lost our privileges for a while says nothing about the outcome, whose
    call is paid for.
    """
    code = getattr(error, "sqlstate", None)
    return code.startswith(_REFUSALS) if code else not isinstance(error, (*TRANSIENT, HarnessError))


class _Entry:
    """An outcome on its way to the database: as it is sent, and who waits for it."""

    __slots__ = ("outcome", "text", "written")

    def __init__(self, outcome: Row, written: asyncio.Future[None]) -> None:
        self.outcome = outcome
        self.written = written
        try:
            self.text = _storable_json(outcome)
        except (RecursionError, TypeError, ValueError) as exc:  # nothing that a model answers may stop the recorder
            self.outcome = _refused(outcome, exc) or outcome | {"calls": []}
            self.text = _storable_json(self.outcome)


def _refused(outcome: Row, error: Exception) -> Row | None:
    """Return what to record instead of a refused outcome: a failure, with what its calls cost if that is taken."""
    was_refused = outcome.get("cause") == "not_recordable"
    if outcome["result"] == "cancelled" or (was_refused and not outcome["calls"]):
        return None
    failed = {key: outcome[key] for key in ("run_id", "kind", "ordinal", "attempt")} | {"result": "failed"}
    failed |= _failure(RequestRejected(f"the outcome could not be recorded: {error}")) | {"cause": "not_recordable"}
    calls = [] if was_refused else [call | {"answer": None, "error": None} for call in outcome["calls"]]
    return failed | {"calls": calls}


def _settle(batch: list[_Entry], error: Exception | None) -> None:
    for entry in batch:
        if entry.written.done():
            continue
        if error is None:
            entry.written.set_result(None)
        else:
            entry.written.set_exception(error)
            entry.written.exception()  # a cancelled caller will not look at it


def _storable_json(outcome: Mapping[str, Any]) -> str:
    """Return JSON that Postgres can store: without NUL characters and lone surrogates."""
    text = json.dumps(outcome, ensure_ascii=False, separators=(",", ":"), default=str)
    if "\\u0000" in text or not _is_encodable(text):
        return json.dumps(_storable(outcome), ensure_ascii=False, separators=(",", ":"), default=str)
    return text


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _storable(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_storable(key): _storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item) for item in value]
    return value
