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
from collections import OrderedDict
from collections.abc import Mapping, Sequence
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
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)


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
        self._claimed: set[tuple[int, str, int]] = set()
        self._alone = asyncio.Lock()
        self._room = asyncio.Event()
        self._room.set()
        self._loading = 0
        self.waiting = 0
        self.in_flight = 0
        self.is_draining = False

    # -- what the process asks of it

    @property
    def open_runs(self) -> list[int]:
        """Ids of the runs with items here."""
        return [run.run_id for run in self._runs.values() if run.tasks]

    async def wait_for_room(self) -> None:
        """Wait until another slice would keep calls in flight: a worker takes no more work than it can start soon."""
        await self._room.wait()

    def apply_states(self, states: Sequence[Row]) -> None:
        """Act on what the database says of runs: abort those that ended, start nothing of those that paused."""
        for state in states:
            run = self._runs.get(state["run_id"])
            if run is None or (state["epoch"] < run.epoch and state["status"] != "deleted"):
                continue  # read before the run was queued anew
            run.status, run.epoch = state["status"], state["epoch"]
            if run.status in ("cancelled", "failed", "deleted"):
                for task in run.tasks:
                    task.cancel()

    def drain(self) -> None:
        """Start no more items; those in flight end, and slices hand back the rest."""
        self.is_draining = True
        self._room.set()

    def abort(self) -> None:
        """Cancel the calls in flight; their items go back to the queue with their slices."""
        self.drain()
        for run in self._runs.values():
            for task in run.tasks:
                task.cancel()

    async def close(self) -> None:
        """Write what is left and stop."""
        await self._recorder.close()
        await self._limits.close()

    # -- slices

    async def run_slice(self, work: Slice) -> None:
        """Do what a slice has left to do. Raises HandedBack unless every item's outcome is durable."""
        self._loading += 1
        self._update_room()
        try:
            run = await self._load_run(work.run_id)
            items = await self._load_items(work) if run else []
        finally:
            self._loading -= 1
            self._update_room()
        if run is None or not items:
            return
        run.epoch = max(run.epoch, work.epoch)
        if work.crashes >= _SUSPECT_AFTER and len(items) == 1:
            await self._run_suspect(run, work, items[0])
        else:
            await self._run_items(run, work, items)
        if any(not item.is_over for item in items):
            raise HandedBack  # whether anybody still waits for them, load_slice decides at the next delivery

    async def _run_items(self, run: _Run, work: Slice, items: list[_Item]) -> None:
        tasks = []
        self.waiting += len(items)
        self._update_room()
        for item in items:
            task = asyncio.create_task(self._run_item(run, work, item))
            run.tasks.add(task)
            task.add_done_callback(run.tasks.discard)
            tasks.append(task)
        for task, outcome in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(outcome, Exception) and not task.cancelled():
                raise outcome

    async def _run_suspect(self, run: _Run, work: Slice, item: _Item) -> None:
        async with self._alone:
            if self.is_draining:
                return
            crashes = await self._persist("charge_crash", run_id=run.run_id, kind=work.kind, ordinal=item.ordinal)
            if crashes[0]["charge_crash"] > _CRASH_LIMIT:
                error = RequestRejected(f"the worker process died {_CRASH_LIMIT} times while it ran this item alone")
                outcome = item.outcome(run.run_id, work.kind, result="failed") | _failure(error) | {"cause": "crashed"}
                await self._recorder.record(outcome)
                item.is_over = True
            else:
                await self._run_items(run, work, [item])

    async def _load_run(self, run_id: int) -> _Run | None:
        if run_id not in self._runs:
            definition = (await self._persist("load_run", run_id=run_id))[0]["load_run"]
            if definition is None:
                return None
            self._runs[run_id] = _Run(
                run_id,
                definition,
                {
                    row["number"]: _Combination(
                        ModelSpec.model_validate(row["generator"]),
                        ModelSpec.model_validate(row["grader"]) if row["grader"] else None,
                        row["rubric_count"],
                    )
                    for row in definition["combinations"]
                },
            )
            for old in [run for run in self._runs.values() if not run.tasks][: max(len(self._runs) - _CACHED_RUNS, 0)]:
                del self._runs[old.run_id]
        return self._runs.get(run_id)

    async def _load_items(self, work: Slice) -> list[_Item]:
        rows = await self._persist(
            "load_slice",
            worker_id=self._worker_id,
            slice={name: value for name, value in asdict(work).items() if value is not None},
        )
        if not rows:
            return []
        run = self._runs[work.run_id]
        run.status = "running"  # or it would have given nothing
        wanted = {("cases", row["case_id"]) for row in rows}
        wanted |= {("rubrics", row["rubric_id"]) for row in rows if row["rubric_id"] is not None}
        missing = wanted - self._inputs.keys()
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
                self._inputs[table, int(id)] = content
        outputs = {int(ordinal): output for ordinal, output in (found.get("notes") or {}).items()}
        items = [
            _Item(
                row,
                case=self._inputs["cases", row["case_id"]],
                rubric=self._inputs["rubrics", row["rubric_id"]] if row["rubric_id"] is not None else None,
                note=outputs.get(row["note_ordinal"]),
            )
            for row in rows
        ]
        for key in wanted:
            self._inputs.move_to_end(key)
        while len(self._inputs) > _CACHED_INPUTS:
            self._inputs.popitem(last=False)
        return items

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
        is_waiting = True
        try:
            if key in self._claimed:
                item.is_over = True  # another slice of this process has it in flight and will record it
                return
            self._claimed.add(key)
            try:
                combination = run.combinations[item.row["combination_number"]]
                spec = combination.grader if work.kind == "grade" else combination.generator
                assert spec is not None
                if spec.provider == "metric":
                    outcome = self._score(run, item, spec)
                else:
                    try:
                        completer, request = (
                            self._completer(run, work.kind, spec),
                            self._request(run, work.kind, item, spec),
                        )
                    except ModelError as exc:
                        outcome = item.outcome(run.run_id, work.kind, result="failed") | _failure(exc)
                    else:
                        tokens = _estimated_tokens(request, spec)
                        async with self._limits.slot(spec, tokens=tokens), self._slots:
                            if self.is_draining or run.status != "running" or run.epoch != work.epoch:
                                return
                            self.waiting -= 1
                            is_waiting = False
                            self.in_flight += 1
                            self._update_room()
                            try:
                                outcome = await self._ask(run, work.kind, item, spec, completer, request, tokens)
                            finally:
                                self.in_flight -= 1
                await self._recorder.record(outcome)
                item.is_over = True
            finally:
                self._claimed.discard(key)
        finally:
            if is_waiting:
                self.waiting -= 1
                self._update_room()

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
                await self._limits.block(spec, exc.retry_after)
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
            logger.exception("a completer failed with an unexpected error")
            failed = call(
                outcome="error", error=f"{type(exc).__name__}: {exc}"[:4000], answer=traceback.format_exc()[-8000:]
            )
            trouble = CodeFailed(f"{type(exc).__name__}: {exc}", text=traceback.format_exc()[-8000:])
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
        try:
            score = score_metric(spec.model, spec.parameters, item.note, item.case.get("target"))
        except ModelError as exc:
            return item.outcome(run.run_id, "grade", result="failed") | _failure(exc)
        return item.outcome(run.run_id, "grade", result="succeeded") | {
            "score": score.score,
            "max_score": score.max_score,
        }

    def _completer(self, run: _Run, kind: ItemKind, spec: ModelSpec) -> Completer:
        key = (spec.id, spec.model_dump_json())
        if key not in run.completers:
            run.completers[key] = self._gateway.completer(spec)
        return run.completers[key]

    def _request(self, run: _Run, kind: ItemKind, item: _Item, spec: ModelSpec) -> Request:
        definition, row = run.definition, item.row
        seed = _seed(definition["seed"], kind, item.ordinal)
        facts: dict[str, Any] = {
            "case": item.case,
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

    def _update_room(self) -> None:
        if self.is_draining or (self.waiting < self.concurrency and self._loading < 4):
            self._room.set()
        else:
            self._room.clear()


class _Item:
    """A note or grade to make: its row of the plan, and what it is made from."""

    __slots__ = ("case", "is_over", "note", "ordinal", "row", "rubric")

    def __init__(self, row: Row, *, case: Row, rubric: Row | None, note: Any) -> None:
        self.row = row
        self.ordinal: int = row["ordinal"]
        self.case = case
        self.rubric = rubric
        self.note = note
        self.is_over = False

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

    def __init__(self, database: Database, worker_id: int, on_states: Any) -> None:
        self._database = database
        self._worker_id = worker_id
        self._on_states = on_states
        self._queue: list[tuple[Row, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()
        self._is_closing = False
        self._task = asyncio.create_task(self._run())

    def enqueue(self, outcome: Row) -> asyncio.Future[None]:
        """Take an outcome to be written soon."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((outcome, written))
        self._wake.set()
        return written

    async def record(self, outcome: Row) -> None:
        """Write an outcome; returns when it is durable, even when the caller is cancelled meanwhile."""
        await asyncio.shield(self.enqueue(outcome))

    async def close(self) -> None:
        """Write what is queued and end; gives up on a database that stays away."""
        self._is_closing = True
        self._wake.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while not (self._is_closing and not self._queue):
            await self._wake.wait()
            await asyncio.sleep(_LINGER_SECONDS)
            while self._queue:
                batch: list[tuple[Row, asyncio.Future[None]]] = []
                texts: list[str] = []
                size = 0
                while self._queue and len(batch) < _BATCH_ITEMS and size < _BATCH_BYTES:
                    batch.append(self._queue.pop(0))
                    texts.append(_storable_json(batch[-1][0]))
                    size += len(texts[-1])
                await self._write(batch, texts)
            self._wake.clear()
            if self._is_closing:
                self._wake.set()

    async def _write(self, batch: list[tuple[Row, asyncio.Future[None]]], texts: list[str]) -> None:
        delay, deadline = 0.1, None
        while True:
            try:
                states = await self._database.call(
                    "record_outcomes", worker_id=self._worker_id, outcomes="[" + ",".join(texts) + "]"
                )
                break
            except TRANSIENT as exc:
                deadline = deadline or (time.monotonic() + 20 if self._is_closing else None)
                if deadline and time.monotonic() > deadline:
                    logger.error("%s outcomes could not be written: %s", len(batch), exc)
                    _settle(batch, exc)
                    return
                logger.warning("the database did not take %s outcomes, which are kept: %s", len(batch), exc)
                await asyncio.sleep(delay * (0.5 + random.random()))
                delay = min(delay * 2, 5.0)
            except HarnessError as exc:
                await self._write_singly(batch, texts, exc)
                return
        _settle(batch, None)
        self._on_states(states)

    async def _write_singly(
        self, batch: list[tuple[Row, asyncio.Future[None]]], texts: list[str], error: HarnessError
    ) -> None:
        if len(batch) > 1:
            for entry, text in zip(batch, texts, strict=True):
                await self._write([entry], [text])
            return
        outcome, _ = batch[0]
        logger.error("an outcome of run %s was refused: %s", outcome["run_id"], error)
        if outcome.get("cause") == "not_recordable" or outcome["result"] == "cancelled":
            _settle(batch, error)
            return
        refusal = RequestRejected(f"the outcome could not be recorded: {error}")
        failed = {key: outcome[key] for key in ("run_id", "kind", "ordinal", "attempt")} | _failure(refusal)
        failed |= {"result": "failed", "cause": "not_recordable", "calls": []}
        await self._write([(failed, batch[0][1])], [_storable_json(failed)])


def _settle(batch: list[tuple[Row, asyncio.Future[None]]], error: Exception | None) -> None:
    for _, written in batch:
        if written.done():
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
            written.exception()  # a cancelled caller will not look at it


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
