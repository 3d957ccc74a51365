"""The engine of one worker process: which item begins next, and when a slice is done.

Items of open slices wait in one line per run and model. A place that becomes free goes to the run of the highest
priority, among equals to the one with the fewest calls in flight; within a run grades go before notes, and notes in the
order of the plan. A note's grades follow in the same slice when this worker makes both.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pgharness.database import Database, Row
from pgharness.database import Line as DatabaseLine
from pgharness.execution.definition import Definition, next_grades
from pgharness.execution.items import Item
from pgharness.execution.lines import Line, Open, Run, close, goes_before
from pgharness.execution.recorder import Recorder
from pgharness.execution.slices import HandedBack, Loader, Slice
from pgharness.execution.tries import ASKED, Call, Tries
from pgharness.gateway import Gateway
from pgharness.gateway.cache import ResponseCache
from pgharness.gateway.calls import estimated_tokens
from pgharness.gateway.limits import Gate, Limits
from pgharness.types import ItemKind

logger = logging.getLogger(__name__)
_SUSPECT_AFTER = 3  # a slice of one item that came back so often is run alone, with its crash charged beforehand
_CACHED_RUNS = 50
_ROOM_SECONDS = 0.25  # so long the items that wait should last while the next slice is fetched
_MOST_UNWRITTEN = 5_000  # outcomes: beyond that no call begins, for the database does not keep up
_MOST_NEWS = 1_000  # items taken beyond that, so that a run which has just started need not wait for a big one


@dataclass(slots=True, eq=False, kw_only=True)
class _Call(Call):
    """A try that takes a place, of the run that it is for."""

    run: Run
    run_gate: Gate | None
    has_begun: bool = False


class Engine:
    """Runs slices of any runs, with at most `concurrency` calls in flight in this process."""

    def __init__(
        self,
        database: Database,
        gateway: Gateway,
        *,
        worker_id: int,
        concurrency: int,
        queues: Sequence[str] = ("note", "grade"),
    ) -> None:
        self._database = database
        self._gateway = gateway
        self._worker_id = worker_id
        self.concurrency = concurrency
        self._free = concurrency
        self._limits = Limits(database, worker_id, self._fill_places, lambda run_id: self._recorder.unwritten(run_id))
        self._cache = ResponseCache(database, worker_id)
        self._recorder = Recorder(
            DatabaseLine(database.url, application_name="pgharness recorder"),
            worker_id,
            keeps_grades="note" in queues and "grade" in queues,
            on_written=self._on_written,
            on_lost=self._on_lost,
        )
        self._loader = Loader(database, worker_id)
        self._tries = Tries(self._loader, self._recorder.add)
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._claims: dict[tuple[int, ItemKind, int], Item] = {}
        self._suspect: Item | None = None  # the one that runs alone
        self._waiting = 0
        self._looking = 0  # items that are looked up in the response cache
        self._parked = 0  # items whose answer somebody else is getting
        self._loading = 0
        self._has_news = False
        self._sated: int | None = None  # the run whose turn it is in the queue, when it had its share here
        self._started: deque[float] = deque(maxlen=4_096)  # when the latest calls began
        self._is_room_stale = False
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._sharing: asyncio.Task[None] | None = None
        self._is_held = False
        self.is_draining = False

    # -- what the process asks of it

    @property
    def open_runs(self) -> list[int]:
        """Ids of the runs with items here."""
        return [run.run_id for run in self._runs.values() if run.slices]

    @property
    def in_flight(self) -> dict[str, dict[ItemKind, int]]:
        """How many calls are in flight, by run and kind of item, as a heartbeat tells it."""
        return {str(run.run_id): dict(told) for run in self._runs.values() if (told := +run.in_flight)}

    @property
    def spare(self) -> int:
        """How many calls could begin if there were items for them."""
        return 0 if self.is_draining or self._loading else max(self._free - self._ready(), 0)

    @property
    def narrowed(self) -> dict[str, Any]:
        """Which jobs to take, as arguments of take_job; empty: whatever comes next."""
        # more of a run of which a worker's fill waits here would only be kept from other workers
        sated = [run.run_id for run in self._runs.values() if run.waiting >= self._enough()]
        return {"except_runs": sated} if sated else {}

    async def wait_for_room(self) -> bool:
        """Wait until another slice is welcome: a worker takes no more work than it can start soon.

        Returns False when there is no room, but news: then only a run that it `welcomes` should be taken.
        """
        await self._has_room.wait()
        return self.is_draining or self._needs_more()

    def hear_news(self) -> None:
        """There are new jobs, and they may be of a run that has just started."""
        self._has_news, self._sated = True, None
        self._update_room()

    def welcomes(self, run_id: int | None) -> bool:
        """Tell whether a job of this run, whose turn it is in the queue, should be taken though there is no room."""
        self._has_news, self._sated = run_id is not None, run_id
        is_welcome = run_id is not None and self._is_short_of(run_id)
        self._update_room()
        return is_welcome

    def apply_states(self, states: Sequence[Row]) -> None:
        """Act on what the database says of runs: abort those that ended, start nothing of those that paused."""
        for state in states:
            run = self._runs.get(state["run_id"])
            # a lower epoch was read before the run was queued anew
            if run is not None and (state["epoch"] >= run.epoch or state["status"] == "deleted"):
                self._learn(run, state["status"], state["epoch"])
                run.priority = state.get("priority", run.priority)
                if "max_concurrency" in state:
                    self._cap(run, state["max_concurrency"])
        idle = max((state.get("idle_elsewhere", 0) for state in states), default=0)
        if idle and (self._sharing is None or self._sharing.done()):
            self._sharing = asyncio.create_task(self._share(idle))
        self._fill_places()

    def _learn(self, run: Run, status: str, epoch: int) -> None:
        is_newer = epoch > run.epoch
        run.status, run.epoch = status, max(epoch, run.epoch)
        if status in ("cancelled", "failed", "deleted"):
            for task in list(run.tasks):
                task.cancel()
        if status != "running" or is_newer:
            self._drop(run)  # they may have long to wait, and others wait for them

    def _renew(self, run: Run, epoch: int) -> None:
        """Learn of an epoch by a slice of it that has something left: otherwise it would have nothing."""
        if epoch > run.epoch:
            self._learn(run, "running", epoch)

    def _cap(self, run: Run, max_concurrency: int | None) -> None:
        if (run.gate is not None) == (max_concurrency is not None):
            return
        if run.gate is not None:
            run.gate.waiting = 0
        run.gate = self._limits.of_run(run.run_id) if max_concurrency is not None else None
        if run.gate is not None:
            run.gate.close()
            run.gate.waiting = run.waiting  # calls in flight do not count: a new cap holds when they have ended

    def hold(self, *, is_held: bool) -> None:
        """Begin no call while held: a worker that cannot show life counts as lost, and others make its items."""
        self._is_held = is_held
        self._fill_places()

    def drain(self) -> None:
        """Start no more items; those in flight end, and slices hand back the rest."""
        self.is_draining = self._loader.is_stopping = True
        for run in self._runs.values():
            self._drop(run)
        self._update_room()

    def abort(self) -> None:
        """Cancel the calls in flight; their items go back to the queue with their slices."""
        self.drain()
        for run in self._runs.values():
            for task in list(run.tasks):
                task.cancel()
        self._recorder.hurry()  # what has ended is still written, unless the database stays away

    async def close(self) -> None:
        """Write what is left and stop."""
        self.abort()
        if self._sharing is not None:
            self._sharing.cancel()
        await self._recorder.close()
        await self._cache.close()
        await self._limits.close()

    # -- slices

    async def run_slice(self, work: Slice) -> None:
        """Do what a slice has left to do. Raises HandedBack unless all that is still wanted of it is durable."""
        with self._loads():
            run = await self._load_run(work.run_id)
        if run is None:
            return
        run.slices += 1  # and is not forgotten from here on
        opened = Open(work, 0, asyncio.get_running_loop().create_future())
        try:
            with self._loads():
                items = await self._loader.items(run.definition, work, lambda: self._renew(run, work.epoch))
                opened.left = len(items)
                if work.crashes >= _SUSPECT_AFTER and len(items) == 1:
                    items[0].is_suspect = True
                run.items += len(items)
                for item in items:
                    item.slice = opened
                    self._enqueue(run, item)
            self._fill_places()
            if items:
                await opened.done
        except asyncio.CancelledError:
            self._drop(run, opened)
            raise
        finally:
            run.slices -= 1
            if not run.slices and not run.items:
                run.definition.requests.forget()
        if not opened.is_whole and run.wants(work):
            raise HandedBack

    async def _load_run(self, run_id: int) -> Run | None:
        if run_id not in self._runs:
            row = (await self._loader.persist("load_run", run_id=run_id))[0]["load_run"]
            if row is None:
                return None
            # another slice may have loaded it meanwhile; there must be one, or its state would not reach all tasks
            if run_id not in self._runs:
                definition = Definition(row, self._gateway, self._limits, self._cache)
                self._runs[run_id] = Run(run_id, definition, row["priority"])
                self._cap(self._runs[run_id], row["max_concurrency"])
            idle = [old for old in self._runs.values() if not old.slices and not old.items and old.run_id != run_id]
            for old in idle[: max(len(self._runs) - _CACHED_RUNS, 0)]:
                del self._runs[old.run_id]
        return self._runs[run_id]

    async def _share(self, idle: int) -> None:
        """Give back part of what waits here, because other workers have nothing to do."""
        given: dict[Open, list[Item]] = {}
        for run in self._runs.values():
            for line in run.lines.values():
                # as much as those workers would do of it while we do the rest, from the end of the line
                count = len(line.items) * idle // (idle + self.concurrency)
                for _ in range(count):
                    item = line.items[-1]
                    if item.slice.work.job_id is None or item.slice.work.kind != item.kind or item.is_suspect:
                        break
                    line.items.pop()
                    self._leave_line(run, line)
                    given.setdefault(item.slice, []).append(item)
        for opened, items in given.items():
            is_given = False
            if self.is_draining:
                for item in items:
                    self._end(item, is_over=False)
                continue
            try:
                answer = await self._database.call(
                    "share_slice",
                    worker_id=self._worker_id,
                    job_id=opened.work.job_id,
                    ordinals=[item.ordinal for item in items],
                )
                is_given = answer[0]["share_slice"]
            except Exception as exc:  # whether they were given is not known: the next load of the slice will tell
                logger.warning("items could not be shared: %s", exc)
            for item in items:
                self._end(item, is_over=is_given, is_made=False)

    # -- lines and places

    def _enqueue(self, run: Run, item: Item) -> None:
        if (claimed := self._claims.get(item.key)) is not None:
            claimed.twins.append(item)  # another slice of this process has it
            return
        self._claims[item.key] = item
        if self.is_draining or not run.wants(item.slice.work):
            self._end(item, is_over=False)
            return
        if item.is_scored_here:
            try:
                outcome = item.scored()
            except Exception as exc:
                outcome = item.failed(exc)
            self._recorder.add(outcome, item)
        elif run.definition.answers is not None and item.spec.provider != "metric":
            self._seek(run, item)
        else:
            self._line_up(run, item)

    def _line_up(self, run: Run, item: Item) -> None:
        key = (item.kind, item.spec.id)
        line = run.lines.get(key)
        if line is None:
            line = run.lines[key] = Line(item.kind, self._limits.of_model(item.spec))
        line.items.append(item)
        run.waiting += 1
        self._waiting += 1
        if line.gate is not None:
            line.gate.waiting += 1
        if run.gate is not None:
            run.gate.waiting += 1

    def _leave_line(self, run: Run, line: Line) -> None:
        """Count that an item was taken from its line."""
        run.waiting -= 1
        self._waiting -= 1
        if line.gate is not None:
            line.gate.waiting -= 1
        if run.gate is not None:
            run.gate.waiting -= 1

    # -- the response cache

    def _seek(self, run: Run, item: Item, *, is_asked: bool = False) -> None:
        """Look for an item's answer before it waits for any place or limit; or wait for one that somebody else asks."""
        task = asyncio.get_running_loop().create_task(self._tries.answer_of(item, run.definition, is_asked=is_asked))
        run.seeking[item] = task
        if is_asked:
            self._parked += 1
        else:
            self._looking += 1
        task.add_done_callback(functools.partial(self._sought, run, item, is_asked))

    def _sought(self, run: Run, item: Item, is_asked: bool, task: asyncio.Task[Row | None]) -> None:
        del run.seeking[item]
        if is_asked:
            self._parked -= 1
        else:
            self._looking -= 1
        if task.cancelled():
            self._end(item, is_over=False)
        elif (outcome := task.result()) is not None:
            self._started.append(time.monotonic())
            self._recorder.add(outcome, item)
        elif self.is_draining or not run.wants(item.slice.work):
            self._end(item, is_over=False)
        else:
            self._prepare(run, item, is_gated=True)
            self._line_up(run, item)
        self._fill_places()

    def _park(self, call: _Call) -> None:
        """Let an item wait, without a place, for the answer that somebody else asks."""
        if self._suspect is call.item:
            self._suspect = None
        if self.is_draining or not call.run.wants(call.item.slice.work):
            self._end(call.item, is_over=False)
        else:
            self._seek(call.run, call.item, is_asked=True)

    def _drop(self, run: Run, opened: Open | None = None) -> None:
        """End what waits of a run, or of one of its slices, without trying it."""
        for item, task in run.seeking.items():
            if opened is None or item.slice is opened:
                task.cancel()
        for line in run.lines.values():
            items, line.items = line.items, deque()
            for item in items:
                if opened is None or item.slice is opened:
                    self._leave_line(run, line)
                    self._end(item, is_over=False)
                else:
                    line.items.append(item)
        self._update_room()

    def _fill_places(self) -> None:
        """Begin items while there are places for them."""
        while self._free > 0 and (call := self._next_call()) is not None:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._occupy(call))
            call.run.tasks.add(task)
            task.add_done_callback(functools.partial(self._vacate, call))
        self._update_room()

    def _next_call(self) -> _Call | None:
        """Take the item that begins next from its line, with what it takes to call its model; None when none may."""
        if self._is_held or self._recorder.backlog > _MOST_UNWRITTEN:
            return None
        while self._waiting and (found := self._next()) is not None:
            run, line = found
            item = line.items.popleft()
            self._leave_line(run, line)
            if item.request is None and item.trouble is None:
                self._prepare(run, item, is_gated=line.gate is not None)
            request, item.request = item.request, None
            if request is None:
                assert item.trouble is not None
                self._recorder.add(item.failed(item.trouble), item)
                continue
            definition = run.definition
            call = _Call(
                item, definition.answers, definition.completer(item), request, line.gate, run=run, run_gate=run.gate
            )
            call.charged = line.gate.enter() if line.gate is not None else 0.0
            if run.gate is not None:
                run.gate.enter()
            run.in_flight[item.kind] += 1
            self._started.append(time.monotonic())
            if item.is_suspect:
                self._suspect = item
            return call
        return None

    def _next(self) -> tuple[Run, Line] | None:
        """Return the line whose first item begins next, or None when nothing may."""
        runs = [run for run in self._runs.values() if run.waiting]
        if len(runs) > 1:
            runs.sort(key=lambda run: (-run.priority, len(run.tasks)))
        for run in runs:
            if run.gate is not None and not run.gate.admits():
                continue
            best: Line | None = None
            for line in run.lines.values():
                if not line.items or (best is not None and not goes_before(line, best)):
                    continue
                item = line.items[0]
                if item.is_suspect and self._suspect is not None:
                    continue
                if line.gate is not None:
                    if item.request is None and item.trouble is None:
                        self._prepare(run, item, is_gated=True)
                    line.gate.tokens = item.tokens
                    if not line.gate.admits():
                        continue
                best = line
            if best is not None:
                return run, best
        return None

    def _prepare(self, run: Run, item: Item, *, is_gated: bool) -> None:
        """Make what an item asks, or keep why it cannot be made."""
        try:
            run.definition.completer(item)
            request = item.request or run.definition.requests.of(item)
            if is_gated:
                item.tokens = estimated_tokens(request, item.spec)
            item.request = request
        except Exception as exc:
            item.request, item.trouble = None, exc

    # -- places

    async def _occupy(self, call: _Call | None) -> None:
        """Make calls in one place, one after the other: the next begins in the very step in which the last one ends."""
        task = asyncio.current_task()
        assert task is not None
        while call is not None:
            call.has_begun = True
            outcome = None
            try:
                outcome = await (self._tries.make_alone(call) if call.item.is_suspect else self._tries.make(call))
            except asyncio.CancelledError:
                task.uncancel()  # it was the call that was cancelled, not the place
            except Exception:
                logger.exception("item %s was left undone", call.item.key)
            call.run.tasks.discard(task)
            self._leave(call)
            if outcome is None:
                self._end(call.item, is_over=False)
            elif outcome is ASKED:
                self._park(call)
            else:
                self._recorder.add(outcome, call.item)
            call = self._next_call()
            if call is not None:
                call.run.tasks.add(task)
            if not self._is_room_stale and not self._has_room.is_set():  # a call that begins only makes room
                self._is_room_stale = True
                asyncio.get_running_loop().call_soon(self._update_room)  # once, however many calls end in this step

    def _vacate(self, first: _Call, task: asyncio.Task[None]) -> None:
        self._free += 1
        if not first.has_begun:  # cancelled before its first step, a task runs nothing of its own
            first.run.tasks.discard(task)
            self._leave(first)
            self._end(first.item, is_over=False)
        self._fill_places()

    def _leave(self, call: _Call) -> None:
        call.run.in_flight[call.item.kind] -= 1
        if call.gate is not None:
            call.gate.leave(call.began, call.error)
        if call.run_gate is not None:
            call.run_gate.leave()

    # -- ends

    def _on_written(self, written: Sequence[tuple[Row, Any]], states: Sequence[Row], is_repeated: bool) -> None:
        self.apply_states(states)
        kept = {state["run_id"]: None if state["kept_notes"] is None else set(state["kept_notes"]) for state in states}
        self._cache.hear(item.question_key for _, item in written if item is not None and item.question_key is not None)
        for outcome, item in written:
            if item is None:
                continue
            if outcome.get("cause") == "not_recordable":
                self._give_up(item)
            if item.kind == "note" and outcome["result"] == "succeeded":
                notes = kept.get(item.run_id)
                if is_repeated and notes is None:
                    # whether its grades were queued when it was written first is not known: the slice comes back
                    self._end(item, is_over=False)
                    continue
                # of a group that may have been written before, which notes were new then is not known any more
                if notes is not None and (is_repeated or item.ordinal in notes):
                    item.note = outcome["output"]
                    self._follow(item)
            self._end(item, is_over=True)
        self._fill_places()

    def _follow(self, note: Item) -> None:
        """Put the grades of a note that was just made into its slice."""
        run = self._runs[note.run_id]
        definition = run.definition
        grades = next_grades(note, definition.combinations[note.combination_number], definition.stride)
        note.slice.left += len(grades)
        run.items += len(grades)
        for grade in grades:
            self._enqueue(run, grade)

    def _give_up(self, item: Item) -> None:
        """Let others ask what an item asked: its answer was not kept."""
        answers = self._runs[item.run_id].definition.answers
        if answers is not None and item.question_key is not None:
            answers.release(item.question_key)

    def _on_lost(self, item: Any, error: Exception) -> None:
        if item is not None:
            self._give_up(item)
            self._end(item, is_over=False)

    def _end(self, item: Item, *, is_over: bool, is_made: bool = True) -> None:
        """Take an item out of its slice: what became of it is durable, or else it goes back with the slice."""
        if self._suspect is item:  # not before its outcome is durable: the next one may kill this process
            self._suspect = None
        if item.slice is None:
            return
        del self._claims[item.key]
        run = self._runs[item.run_id]
        twins, item.twins = item.twins, []
        close(run, item, is_over)
        for twin in twins:
            if is_over and is_made and item.tries >= twin.tries:  # the same try, or a later one
                close(run, twin, True)
            else:
                self._enqueue(run, twin)

    # -- room

    @contextmanager
    def _loads(self) -> Iterator[None]:
        self._loading += 1
        self._update_room()
        try:
            yield
        finally:
            self._loading -= 1
            self._update_room()

    def _update_room(self) -> None:
        self._is_room_stale = False
        has_news = self._has_news and (self._sated is None or self._is_short_of(self._sated))
        if self.is_draining or (self._loading < 4 and (has_news or self._needs_more())):
            self._has_room.set()
        else:
            self._has_room.clear()

    def _enough(self) -> int:
        since = time.monotonic() - _ROOM_SECONDS
        while self._started and self._started[0] < since:
            self._started.popleft()
        return max(self.concurrency, len(self._started))

    def _ready(self) -> int:
        """How many items wait for nothing but a place: what waits at a gate must not keep other runs away."""
        count = 0
        for run in self._runs.values():
            if run.waiting:
                ready = sum(
                    len(line.items) if line.gate is None else min(len(line.items), line.gate.room)
                    for line in run.lines.values()
                )
                count += ready if run.gate is None else min(ready, run.gate.room)
        return count

    def _needs_more(self) -> bool:
        if self._recorder.backlog > _MOST_UNWRITTEN:
            return False
        ready = self._ready() + self._looking + max(self._parked - _MOST_NEWS, 0)
        return ready < self.concurrency or ready < self._enough()

    def _is_short_of(self, run_id: int) -> bool:
        """Tell whether less of a run waits here than its share of the places, which those below it have no part in."""
        run = self._runs.get(run_id)
        enough = self._enough()
        # a run that has its fill here gets no more of it, so what waits of it is no news
        if sum(other.waiting for other in self._runs.values() if other.waiting < enough) >= enough + _MOST_NEWS:
            return False
        if run is None or not run.items:
            return True
        rivals = sum(1 for other in self._runs.values() if other.items and other.priority >= run.priority)
        return run.waiting * rivals < self.concurrency
