"""Batches: items that a vendor answers at its leisure, taken from gathered to recorded in steps that survive anything.

A batch is a row whose state says which step comes next. A worker takes hold of it, takes the step, and writes the new
state; one that dies in between leaves the old state, and whoever takes over looks at the vendor's before it asks for
anything again. An answer is recorded as a live one is, in the transaction that takes its item out of the batch: so a
collection may end anywhere and begin anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import BinaryIO

from pgharness.database import TRANSIENT, Database, Line, Row
from pgharness.errors import HarnessError, InvalidOutput, LeaseLost, ModelError, RequestRejected
from pgharness.execution.definition import Definition, loaded
from pgharness.execution.items import Item
from pgharness.execution.recorder import Recorder
from pgharness.gateway import Gateway
from pgharness.gateway.batching import BatchEndpoint, Remote, Result, batch_endpoint
from pgharness.gateway.cache import ResponseCache
from pgharness.gateway.calls import CallRecord, model_error
from pgharness.gateway.replies import Reply
from pgharness.gateway.transport import Account
from pgharness.types import Completion, ItemKind, ModelSpec

logger = logging.getLogger(__name__)
_POLLING_SECONDS = 1.0
_MOST_STEPS = 4  # at once in a process
_GROUP_ITEMS = 200
_MOST_UNWRITTEN = 2_000
_MOST_FAILURES = 5  # of steps that a worker could not even ask the vendor to take
_CACHED_RUNS = 10


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch that this worker holds, with the vendor that it is for."""

    row: Row
    spec: ModelSpec
    account: Account
    endpoint: BatchEndpoint

    @property
    def id(self) -> int:
        return int(self.row["id"])

    @property
    def file_name(self) -> str:
        return f"pgharness-{self.row['uuid']}.jsonl"

    def custom_id(self, item: Item) -> str:
        """Return what a request is called: at most 64 letters, digits and hyphens."""
        return f"{self.row['uuid'].replace('-', '')}-{item.ordinal}-{item.tries + 1}"

    def ordinal(self, custom_id: str) -> int | None:
        """Return which item a result is of, or None for one of another batch."""
        uuid, _, rest = custom_id.partition("-")
        number = rest.partition("-")[0]
        return int(number) if uuid == self.row["uuid"].replace("-", "") and number.isdecimal() else None


class Batches:
    """Takes the batches of a database further, a few at once; any number of workers may."""

    def __init__(
        self,
        database: Database,
        gateway: Gateway,
        *,
        worker_id: int,
        kinds: Sequence[ItemKind],
        settle_seconds: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare; `settle_seconds` is how long a vendor may take to list a batch that it has begun."""
        self._database = database
        self._gateway = gateway
        self._worker_id = worker_id
        self._kinds = list(kinds)
        self._settle_seconds = settle_seconds
        self._sleep = sleep
        self._cache = ResponseCache(database, worker_id)
        self._definitions: OrderedDict[int, Definition] = OrderedDict()
        self._steps: dict[int, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Take steps as they become due, until cancelled: whoever comes next goes on from there."""
        try:
            while True:
                row = None
                if len(self._steps) < _MOST_STEPS:
                    try:
                        row = await self.next()
                    except Exception as exc:  # whatever it is: the next look may succeed
                        level = logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR
                        logger.log(level, "no batch could be looked for: %s", exc)
                if row is None:
                    await self._sleep(_POLLING_SECONDS)
                else:
                    step = self._steps[row["id"]] = asyncio.create_task(self.step(row))
                    step.add_done_callback(lambda _, id=row["id"]: self._steps.pop(id))  # type: ignore[misc]
        finally:
            for step in self._steps.values():
                step.cancel()
            await asyncio.gather(*self._steps.values(), return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Stop what is asked of the response cache."""
        await self._cache.close()

    async def next(self) -> Row | None:
        """Take hold of a batch whose next step is due."""
        found = await self._call("next_batch", kinds=self._kinds, busy=list(self._steps))
        row: Row | None = found[0]["next_batch"]
        return row

    async def step(self, row: Row) -> None:
        """Take the next step of a batch that this worker holds, and let go of it."""
        try:
            spec = ModelSpec.model_validate(row["model"])
            account = self._gateway.account(spec)
            batch = _Batch(row, spec, account, batch_endpoint(account))
            match row["status"]:
                case "uploading" | "submitting":
                    await self._submit(batch)
                case "submitted":
                    await self._poll(batch)
                case _:
                    await self._collect(batch)
        except LeaseLost as exc:
            logger.warning("%s", exc)
        except TRANSIENT as exc:
            logger.warning("a step of batch %s could not be written, and is taken again: %s", row["id"], exc)
        except Exception as exc:
            await self._stumble(row, model_error(exc))

    async def _stumble(self, row: Row, error: ModelError) -> None:
        """Say why a step could not be taken: later it may be, or else never."""
        is_begun = row["status"] in ("submitted", "ended")
        # nothing was sent: this worker lacks the key, or nobody has it
        is_unasked = error.http_status is None and row["failures"] < _MOST_FAILURES
        is_final = isinstance(error, RequestRejected) and not is_unasked and (not is_begun or error.http_status == 404)
        text = str(error) + (f" ({error.hint})" if error.hint else "")
        logger.warning("a step of batch %s failed: %s", row["id"], text)
        try:
            if is_final:
                await self._call("finish_batch", batch_id=row["id"], error=text, has_failed=True)
            else:
                await self._call("release_batch", batch_id=row["id"], error=text, retry_after=error.retry_after)
        except (HarnessError, *TRANSIENT) as exc:
            logger.warning("batch %s could not be let go of: %s", row["id"], exc)

    # -- the vendor is given it

    async def _submit(self, batch: _Batch) -> None:
        row, endpoint = batch.row, batch.endpoint
        if row["status"] == "submitting":  # somebody asked for it, and did not hear the answer
            since = datetime.fromisoformat(row["gathered_at"])
            known = row["known_ids"]
            found = await endpoint.find(row["uuid"], since=since, requests=row["request_count"], known=known)
            if found is not None:
                await self._submitted(batch, found, is_ours=endpoint.is_labelled)
                return
            if (left := self._settle_seconds - row["seconds_in_submission"]) > 0:
                await self._call("release_batch", batch_id=batch.id, retry_after=left)
                return
            if not row["is_wanted"]:
                await self._call("finish_batch", batch_id=batch.id)
                return
        with TemporaryFile() as file:
            count, input_file = row["request_count"], row["input_file"]
            if input_file is None and row["is_repeated"]:
                input_file = await endpoint.find_upload(batch.file_name)
            if input_file is None:
                count = await self._encode(batch, file)
                if count:
                    input_file = await endpoint.upload(batch.file_name, file)
            is_wanted = bool(count) and await self._begin(batch, count, input_file)
            if not is_wanted:
                await self._call("finish_batch", batch_id=batch.id)
                return
            remote = await endpoint.create(row["uuid"], input_file, file, number=len(row["foreign_ids"]))
        await self._submitted(batch, remote, is_ours=True)

    async def _begin(self, batch: _Batch, count: int, input_file: str | None) -> bool:
        """Say that the vendor is asked now; False when nobody wants it to be."""
        found = await self._call("begin_submission", batch_id=batch.id, request_count=count, input_file=input_file)
        return bool(found[0]["begin_submission"])

    async def _submitted(self, batch: _Batch, remote: Remote, *, is_ours: bool) -> None:
        try:
            await self._call("record_submission", batch_id=batch.id, external_id=remote.id, is_ours=is_ours)
        except LeaseLost:
            if is_ours:  # somebody else goes on, and has not found it
                await batch.endpoint.cancel(remote.id)
            raise

    async def _encode(self, batch: _Batch, file: BinaryIO) -> int:
        """Write the requests of a batch; return how many. What no longer fits goes into another batch."""
        definition = await self._definition(batch)
        count, size, after = 0, 0, -1
        while items := await self._items(batch, definition, after=after, most=_GROUP_ITEMS):
            outcomes: list[Row] = []
            for item, made in zip(items, await self._prepared(batch, definition, items), strict=True):
                if not isinstance(made, bytes):
                    outcomes.append(made | {"batch_id": batch.id})
                    continue
                size += len(made) + 1
                if size > batch.endpoint.most_bytes and count:
                    await self._call("split_batch", batch_id=batch.id, first=item.ordinal)
                    break
                file.write(batch.endpoint.separator + made if count else made)
                count += 1
            after = items[-1].ordinal
            if outcomes:
                async with self._recorder() as recorder:
                    for outcome in outcomes:
                        recorder.add(outcome)
        return count

    async def _prepared(self, batch: _Batch, definition: Definition, items: Sequence[Item]) -> list[Row | bytes]:
        """Return the request of each item, or the outcome of one that the response cache answers or nobody can ask."""

        async def prepare(item: Item) -> Row | bytes:
            record, answers = CallRecord(item.spec), definition.answers
            try:
                request = definition.requests.of(item)
                body = batch.account.wire.encode(item.spec, request).body
                line = batch.endpoint.line(batch.custom_id(item), body)
                if answers is None:
                    return line
                item.question_key = answers.key(item.spec, request)
                stored = await answers.look(item.spec, item.question_key)
                return line if stored is None else item.answered(record, stored)
            except InvalidOutput:  # what the cache has is of no use
                return line
            except Exception as exc:
                return item.failed(exc)

        return await asyncio.gather(*map(prepare, items))

    # -- the vendor works on it

    async def _poll(self, batch: _Batch) -> None:
        row, endpoint = batch.row, batch.endpoint
        needs_cancel = row["needs_cancel"]
        id = row["external_id"]
        remote = await (endpoint.cancel(id) if needs_cancel else endpoint.poll(id))
        if remote.state != "failed":
            await self._call(
                "record_poll",
                batch_id=batch.id,
                has_ended=remote.state == "ended",
                result_files=list(remote.files),
                is_cancelling=needs_cancel,
            )
        elif remote.is_retryable and not needs_cancel:
            await self._call("forget_submission", batch_id=batch.id, error=remote.error)
        else:
            await self._call("finish_batch", batch_id=batch.id, error=remote.error, has_failed=True)

    # -- the vendor is done

    async def _collect(self, batch: _Batch) -> None:
        row = batch.row
        definition = await self._definition(batch)
        is_ours = row["is_ours"]
        async with self._recorder() as recorder:
            async for group in _grouped(batch.endpoint.results(row["external_id"], row["result_files"])):
                mine = [
                    (ordinal, each.reply) for each in group if (ordinal := batch.ordinal(each.custom_id)) is not None
                ]
                if not mine and not is_ours:
                    break
                is_ours = True
                replies = {ordinal: reply for ordinal, reply in mine if reply is not None}
                for item in await self._items(batch, definition, most=len(replies), ordinals=list(replies)):
                    recorder.add(self._outcome(batch, definition, item, replies[item.ordinal]))
                while recorder.backlog > _MOST_UNWRITTEN:
                    await asyncio.sleep(0.01)
        if not is_ours:
            await self._call("forget_submission", batch_id=batch.id)
            return
        await self._call("finish_batch", batch_id=batch.id)
        files = [file for file in (row["input_file"], *row["result_files"]) if file is not None]
        try:
            await batch.endpoint.forget(row["external_id"], files)
        except ModelError as exc:
            logger.warning("batch %s is still with its vendor: %s", batch.id, exc)

    def _outcome(self, batch: _Batch, definition: Definition, item: Item, reply: Reply) -> Row:
        record = CallRecord(item.spec)
        completion: Completion | None = None
        try:
            request = definition.requests.of(item)
            completion = batch.account.read(request, reply)
            answer = item.read(completion)
        except Exception as exc:
            error = model_error(exc)
            outcome = item.failed(error, [_in_batch(batch, record.failed(error, completion))])
        else:
            call = _in_batch(batch, record.succeeded(completion))
            if definition.answers is not None:
                key = definition.answers.key(item.spec, request)
                call |= definition.answers.entry(key, call, completion, (), replaces=False)
            outcome = item.outcome("succeeded", [call]) | answer
        return outcome | {"batch_id": batch.id}

    # -- what all steps need

    async def _call(self, function: str, /, **args: object) -> list[Row]:
        return await self._database.call(function, worker_id=self._worker_id, **args)

    @asynccontextmanager
    async def _recorder(self) -> AsyncIterator[Recorder]:
        """Yield what records outcomes; on exit they are durable, or else it raises why not."""
        lost: list[Exception] = []
        line = Line(self._database.url, application_name="pgharness batches")
        recorder = Recorder(
            line,
            self._worker_id,
            keeps_grades=False,
            on_written=lambda *_: None,
            on_lost=lambda _, error: lost.append(error),
        )
        try:
            yield recorder
        finally:
            await recorder.close()
        await asyncio.sleep(0)  # it told the loop
        if lost:
            raise lost[0]

    async def _definition(self, batch: _Batch) -> Definition:
        run_id = batch.row["run_id"]
        if run_id not in self._definitions:
            row = (await self._database.call("load_run", run_id=run_id))[0]["load_run"]
            if row is None:
                raise LeaseLost(f"batch {batch.id} went away with its run")
            self._definitions[run_id] = Definition(row, self._gateway, cache=self._cache)
            if len(self._definitions) > _CACHED_RUNS:
                self._definitions.popitem(last=False)
        return self._definitions[run_id]

    async def _items(
        self, batch: _Batch, definition: Definition, *, most: int, after: int = -1, ordinals: list[int] | None = None
    ) -> list[Item]:
        """Return items that are in a batch now, with what they are made from."""
        rows = await self._database.call("load_batch", batch_id=batch.id, after=after, most=most, ordinals=ordinals)
        if not rows:
            return []
        found = await self._database.call(
            "load_inputs",
            run_id=batch.row["run_id"],
            cases=sorted({row["case_id"] for row in rows}),
            rubrics=sorted(
                {row["rubric_id"] for row in rows if row["rubric_id"] is not None}
                | {rubric_id for row in rows for rubric_id in row["rubric_ids"] or ()}
            ),
            notes=sorted({row["note_ordinal"] for row in rows if row["kind"] == "grade"}),
        )
        inputs = {
            (table, int(id)): content
            for table, contents in found[0]["load_inputs"].items()
            for id, content in (contents or {}).items()
        }
        items = sorted(loaded(rows, definition, inputs), key=lambda item: item.ordinal)
        for item in items:
            item.slice = SimpleNamespace(work=SimpleNamespace(epoch=None))  # of whichever epoch: its grades are queued
        definition.requests.forget()  # what it keeps is by identity, and these are new
        return items


def _in_batch(batch: _Batch, call: Row) -> Row:
    """Return the row of a call as it was made in a batch: from submission to end, at the batch's price."""
    submitted_at, ended_at = (datetime.fromisoformat(batch.row[name]) for name in ("submitted_at", "ended_at"))
    return call | {
        "started_at": submitted_at,
        "latency_ms": (ended_at - submitted_at).total_seconds() * 1000,
        "cost_usd": call["cost_usd"] * batch.spec.batch_price_factor,
    }


async def _grouped(results: AsyncIterator[Result]) -> AsyncIterator[list[Result]]:
    group: list[Result] = []
    async for result in results:
        group.append(result)
        if len(group) == _GROUP_ITEMS:
            yield group
            group = []
    if group:
        yield group
