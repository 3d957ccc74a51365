"""Running tasks of a run's code in this process: its function, and items of its maps.

Coroutines run in the loop, other functions in threads of their own. Each task is begun in the database before it runs
and its end is recorded after all that it told; whoever is interrupted leaves no end, so the task comes back. A task
that waits for a map holds no place, or maps within maps would block each other; how many tasks of one depth are begun
is bounded instead, so that wide maps of tasks that map fill no process with those that wait. The deepest ones never
wait for others, so there is always somebody who goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import hashlib
import inspect
import json
import logging
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from pydantic_core import PydanticSerializationError, to_jsonable_python

from pgharness.database import Database, Row
from pgharness.environment import environment
from pgharness.errors import LeaseLost
from pgharness.execution import Slice
from pgharness.gateway import Gateway
from pgharness.sdk.chat import Chat
from pgharness.sdk.definition import Experiment
from pgharness.sdk.journal import Journal, storable_json
from pgharness.sdk.loading import import_module
from pgharness.sdk.mapping import ItemFunction, OpenMaps, Stopped, item_function, keys_of, result_of, return_adapter
from pgharness.sdk.scope import (
    AsyncContext,
    Cancelled,
    Completed,
    Context,
    Failed,
    Scope,
    TaskFailed,
    current,
    entered,
)

logger = logging.getLogger(__name__)
_MAP_CHUNK = 5_000
_TASKS_PER_PLACE = 2  # of a depth: more that are begun would only wait, more that are taken be kept from others
_LONGEST_TRACEBACK = 20_000
_SUSPECT_CRASHES = 1
_LOOK_SECONDS = 0.2  # for code that looks at is_cancelled, before it is interrupted
_ENDING_SECONDS = 1.0  # for code that has seen it
T = TypeVar("T")


class _Interrupt(Cancelled):
    """Cancelled, as it is raised in a thread from outside; notes that it arrived."""

    arrived: ClassVar[set[int]] = set()

    def __init__(self, *args: object) -> None:
        super().__init__(*args or ("the run was cancelled",))
        _Interrupt.arrived.add(threading.get_ident())


@dataclass(slots=True, eq=False)
class _Task:
    """A task that is running here."""

    row: Row
    scope: Scope
    work: asyncio.Task[Any] | None = None
    thread: threading.Thread | None = None
    maps: int = 0  # that it waits for, and holds no place meanwhile
    places: int = 0  # that it holds
    is_interrupted: bool = False
    has_looked: bool = False  # at is_cancelled, when it was true

    @property
    def is_suspect(self) -> bool:
        """Whether its process died while it ran."""
        return bool(self.row["ordinal"]) and self.row["crashes"] >= _SUSPECT_CRASHES


class Session:
    """The tasks of one run in this process."""

    def __init__(
        self,
        database: Database,
        gateway: Gateway,
        journal: Journal,
        *,
        worker_id: int,
        run: Row,
        experiment: Experiment,
        concurrency: int,
        on_running: Callable[[list[tuple[int, int]], int], None] = lambda *_: None,
    ) -> None:
        """Prepare to run tasks of a run, which is given as `load_code` answers it.

        `on_running` hears, whenever that changes, which of them run (each with its try), and how many wait for maps.
        """
        self._database = database
        self._journal = journal
        self._worker_id = worker_id
        self.run = run
        self.run_id: int = run["run_id"]
        self._experiment = experiment
        self._on_running = on_running
        self._loop = asyncio.get_running_loop()
        self.loop_thread = threading.get_ident()
        self._chat = Chat(database, gateway, run)
        self._concurrency = concurrency
        self._places = asyncio.Semaphore(concurrency)
        self._alone = asyncio.Lock()
        self._depths = defaultdict[int, asyncio.Semaphore](lambda: asyncio.Semaphore(_TASKS_PER_PLACE * concurrency))
        self._maps = OpenMaps(database, self.run_id)
        self._functions: dict[str, ItemFunction] = {}
        self._running: dict[tuple[int, int], _Task] = {}  # by ordinal and attempt
        self._is_interrupted = False
        self._is_draining = False
        self.services = _Services(self)

    # -- slices

    async def run_slice(self, slice: Mapping[str, Any], on_end: Callable[[int], None]) -> bool:
        """Do the tasks of a queue job that are not decided; tell whether none of them has to come back.

        `on_end` hears how many are left, whenever that changes.
        """
        rows = await self._database.persist("load_tasks", worker_id=self._worker_id, slice=dict(slice))
        rows.sort(key=lambda row: row["ordinal"])
        depth = self._depths[slice["depth"]]

        left = len(rows)
        on_end(left)

        async def run(row: Row) -> bool:
            nonlocal left
            async with depth:
                is_whole = await self._run_in_place(self._begun(row))
            left -= 1
            on_end(left)
            return is_whole

        return all(await asyncio.gather(*map(run, rows)))

    async def _run_in_place(self, task: _Task) -> bool:
        """Run a task once there is a place for it, and see its end recorded; False when it has to come back."""
        await self._take_place(task)
        try:
            if task.scope.ordinal == 0 and self.run["kind"] == "milestone":
                await asyncio.to_thread(self._keep_origin, task.scope)
            outcome = None if self._is_interrupted or self._is_draining else await self._run_task(task)
        finally:
            self._leave_place(task)
        if outcome is None:
            return False
        # without its place, which is for others now
        if task.scope.ordinal == 0 and outcome["status"] == "succeeded" and outcome["result"] is not None:
            task.scope.emit("result", {"key": "return", "value": outcome["result"]})
        await self._journal.end(self.run_id, task.scope.ordinal, task.scope.attempt, outcome)
        self._maps.hear()
        return True

    async def _take_place(self, task: _Task) -> None:
        """Wait for a place to run in; for all of them, if it may take this process along: it is then known who did."""
        async with contextlib.AsyncExitStack() as stack:
            if task.is_suspect:
                await self._alone.acquire()
                stack.callback(self._alone.release)
            for _ in range(self._concurrency if task.is_suspect else 1):
                await self._places.acquire()
                stack.callback(self._places.release)
            if not task.maps and not task.places:  # else another map of its began, or ended, meanwhile
                stack.pop_all()
                task.places = self._concurrency if task.is_suspect else 1

    def _leave_place(self, task: _Task) -> None:
        places, task.places = task.places, 0
        for _ in range(places):
            self._places.release()
        if places and task.is_suspect:
            self._alone.release()

    def _begun(self, row: Row) -> _Task:
        ordinal, attempt = row["ordinal"], row["attempt"]

        def emit(kind: str, told: dict[str, Any]) -> None:
            self._journal.tell(self.run_id, ordinal, attempt, kind, told)

        scope = Scope(
            run_id=self.run_id,
            run=self.run["run"],
            kind=self.run["kind"],
            ordinal=ordinal,
            attempt=attempt,
            emit=emit,
            services=self.services,
            config=self.run["config"],
            seed=_seed(self.run["seed"], row),
        )
        return _Task(row, scope)

    def _keep_origin(self, scope: Scope) -> None:
        """Keep with a milestone what it was made by: its code, the environment and the configuration."""
        context = Context(scope)
        try:
            context.artifact("code.zip", self._experiment.snapshot())
            context.artifact("environment.json", json.dumps(environment(), indent=2))
            context.artifact("config.json", json.dumps(self.run["config"], indent=2))
        except (OSError, ValueError) as exc:
            context.error(f"what this milestone was made by could not be kept: {exc}")

    async def _run_task(self, task: _Task) -> dict[str, Any] | None:
        ordinal, attempt = task.scope.ordinal, task.scope.attempt
        # an earlier try that still runs here is superseded: this worker was taken for lost
        self._interrupt_all(lambda other: other.scope.ordinal == ordinal and other.scope.attempt < attempt)
        self._running[ordinal, attempt] = task
        self._tell_running()
        try:
            return await self._outcome(task)
        finally:
            del self._running[ordinal, attempt]
            self._tell_running()

    async def _outcome(self, task: _Task) -> dict[str, Any] | None:
        """Run a task and return how it ended; None when it was interrupted."""
        with entered(task.scope):
            try:
                call, is_async = self._call_of(task)
                if is_async:
                    task.work = asyncio.create_task(_shielded(call()))
                    try:
                        value = await task.work
                    except _Raised as raised:
                        raise raised.error from None
                else:
                    value = await self._in_thread(task, call)
                return {"status": "succeeded", "result": _json_result(value)}
            except Completed:
                return {"status": "succeeded", "result": None}
            except Failed as exc:
                return {"status": "failed", "error": str(exc), "is_final": True}
            except (Stopped, LeaseLost):
                return None
            except (Cancelled, asyncio.CancelledError):
                if not (self._is_interrupted or task.is_interrupted):  # its own doing
                    return {"status": "failed", "error": "it cancelled itself", "is_final": True}
                return None
            except BaseException as exc:
                return _failure(exc, is_item=bool(task.row["ordinal"]))

    def _call_of(self, task: _Task) -> tuple[Callable[[], Any], bool]:
        """Return what calls a task's function with what it takes, and whether that gives a coroutine."""
        row = task.row
        if row["ordinal"] == 0:
            experiment, is_async = self._experiment, self._experiment.is_async
            config = experiment.config(self.run["config"])
            context = AsyncContext(task.scope) if is_async else Context(task.scope)
            return lambda: experiment.start(context, config), is_async
        of = self._function(row["function"])
        context = AsyncContext(task.scope) if of.is_async else Context(task.scope)
        item = json.loads(row["argument"]) if of.adapter is None else of.adapter.validate_json(row["argument"])
        call = (lambda: of.function(context, item)) if of.takes_context else (lambda: of.function(item))
        return call, of.is_async

    def _function(self, path: str) -> ItemFunction:
        if path not in self._functions:
            module, _, name = path.rpartition(":")
            if module == self._experiment.module:
                found: Any = inspect.getmodule(inspect.unwrap(self._experiment.function))
            else:
                found = import_module(module, self._experiment.root)
            for part in name.split("."):
                found = getattr(found, part)
            self._functions[path] = item_function(found)
        return self._functions[path]

    async def _in_thread(self, task: _Task, call: Callable[[], T]) -> T:
        """Run a function in a thread of its own, which ends with the process if the function never does."""
        ended: asyncio.Future[T] = self._loop.create_future()
        context = contextvars.copy_context()

        def settle(value: Any, error: BaseException | None) -> None:
            if not ended.done():
                ended.set_result(value) if error is None else ended.set_exception(_Raised(error))

        def work() -> None:
            # an interruption may arrive at any point, also when the function has just ended by itself
            value: Any = None
            error: BaseException | None = None
            try:
                try:
                    value = context.run(call)
                except BaseException as exc:
                    error = exc
            except _Interrupt as late:
                error = error or late
            while True:
                try:
                    self._loop.call_soon_threadsafe(settle, value, error)
                    return
                except _Interrupt:
                    continue
                except RuntimeError:  # the loop was closed: nobody waits any more
                    return

        task.thread = threading.Thread(target=work, name=f"task-{task.row['ordinal']}", daemon=True)
        task.thread.start()
        try:
            return await ended
        except _Raised as raised:
            raise raised.error from None

    # -- interruption

    def interrupt(self) -> None:
        """Raise Cancelled in every task here; what it was doing comes back, unless its run has ended.

        Those that look at `is_cancelled` may find it out by themselves, and then have a moment to end as they like.
        """
        if not self._is_interrupted:
            self._is_interrupted = True
            self._interrupt_all(lambda task: bool(task.maps))
            self._loop.call_later(_LOOK_SECONDS, self._interrupt_all, lambda task: not task.has_looked)
            self._loop.call_later(_LOOK_SECONDS + _ENDING_SECONDS, self._interrupt_all, lambda _: True)

    def drain(self) -> None:
        """Begin nothing more, and let go of what waits for maps; all that comes back."""
        self._is_draining = True
        self._interrupt_all(lambda task: bool(task.maps))

    def notice(self, scope: Scope) -> None:
        """Note that a task has seen that it is cancelled."""
        if (task := self._running.get((scope.ordinal, scope.attempt))) is not None:
            task.has_looked = True

    def _interrupt_all(self, is_meant: Callable[[_Task], bool]) -> None:
        for task in [task for task in self._running.values() if not task.is_interrupted and is_meant(task)]:
            task.is_interrupted = True
            if task.work is not None:
                task.work.cancel()
            elif task.thread is not None and task.thread.ident is not None:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(task.thread.ident), ctypes.py_object(_Interrupt)
                )

    @property
    def is_interrupted(self) -> bool:
        """Whether the tasks here were told to stop."""
        return self._is_interrupted

    @property
    def first_scope(self) -> Scope | None:
        """The task that was begun first of those that run; None when none does."""
        return next((task.scope for task in self._running.values()), None)

    @property
    def has_heard(self) -> bool:
        """Whether every function that runs in a thread has been interrupted, or has ended."""
        return all(
            task.thread is None
            or task.has_looked
            or not task.thread.is_alive()
            or task.thread.ident in _Interrupt.arrived
            for task in self._running.values()
        )

    def _tell_running(self) -> None:
        running = [place for place, task in self._running.items() if not task.maps]
        self._on_running(running, len(self._running) - len(running))

    @contextlib.asynccontextmanager
    async def _parked(self, scope: Scope) -> AsyncIterator[None]:
        """Give a task's place to others while it waits for them."""
        task = self._running.get((scope.ordinal, scope.attempt))
        if task is None:
            yield
            return
        task.maps += 1
        self._leave_place(task)
        self._tell_running()
        if self._is_draining:
            self._interrupt_all(lambda each: each is task)
        try:
            yield
        finally:
            task.maps -= 1
            if not task.maps:  # else it waits for another one, beside
                await self._take_place(task)
            self._tell_running()

    # -- what contexts ask for

    async def map(
        self,
        scope: Scope,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None,
        name: str | None,
        errors: Literal["raise", "collect"],
        retries: int,
    ) -> list[Any]:
        """Have a function done for each item, by whatever worker; return the results in the order of the items."""
        if errors not in ("raise", "collect"):
            raise ValueError(f"errors={errors!r} is neither 'raise' nor 'collect'")
        path = self._path_of(function)
        label = name or path.rpartition(":")[2]
        items = list(items)
        arguments = [to_jsonable_python(item) for item in items]
        keys = list(keys_of(arguments, None if key is None else [key(item) for item in items]))
        if not keys:
            return []
        pairs = list(zip(keys, arguments, strict=True))
        for start in range(0, len(keys), _MAP_CHUNK):
            await self._database.persist(
                "add_tasks",
                run_id=self.run_id,
                parent=scope.ordinal,
                attempt=scope.attempt,
                map=label,
                function=path,
                items=storable_json(pairs[start : start + _MAP_CHUNK]),
                retries=retries,
            )
        async with self._parked(scope):
            await self._maps.wait(scope.ordinal, label)
        ended = {
            row["key"]: row
            for row in await self._database.persist("map_results", run_id=self.run_id, parent=scope.ordinal, map=label)
        }
        adapter = return_adapter(function)
        results = [result_of(ended[each], adapter) for each in keys]
        if errors == "raise" and (failed := [result for result in results if isinstance(result, TaskFailed)]):
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise TaskFailed(failed[0].key, failed[0].error + more)
        return results

    def _path_of(self, function: Callable[..., Any]) -> str:
        """Return the name by which any worker finds a function. Raises TypeError for one that has none."""
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<unknown>")
        if module is None or "<" in name:
            raise TypeError(
                f"map() needs a function that other processes can find, and {name} is none:"
                " define it at the top of its module"
            )
        own = inspect.unwrap(self._experiment.function).__module__
        return f"{self._experiment.module if module == own else module}:{name}"

    async def close(self) -> None:
        """Give back what was leased."""
        await self._chat.close()


@dataclass(slots=True)
class OpenSlice:
    """A slice that a process has taken: of which run and depth, and how many of its tasks have not ended."""

    run_id: int
    depth: int
    left: int

    @classmethod
    def of(cls, slice: Slice) -> OpenSlice:
        """Return a slice as it is when it was just taken."""
        assert slice.depth is not None
        return cls(slice.run_id, slice.depth, slice.count)


def full_depths(slices: Iterable[OpenSlice], concurrency: int) -> dict[str, list[int]]:
    """Return of which depths a process has enough tasks, by run.

    Whoever waits for a map thus keeps nobody from taking its items: they are deeper.
    """
    left = Counter[tuple[int, int]]()
    for slice in slices:
        left[slice.run_id, slice.depth] += slice.left
    full = defaultdict[str, list[int]](list)
    for (run_id, depth), count in left.items():
        if count >= _TASKS_PER_PLACE * concurrency:
            full[str(run_id)].append(depth)
    return dict(full)


class _Services:
    """What contexts reach of a session, from the loop or from threads."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.map = session.map
        self.complete = session._chat.complete

    @property
    def is_cancelled(self) -> bool:
        if self._session.is_interrupted and (scope := current()) is not None:
            self._session.notice(scope)
        return self._session.is_interrupted

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait in a thread for what is done in the loop; in short steps, or an interruption would not arrive."""
        loop = self._session._loop
        if threading.get_ident() == self._session.loop_thread:
            work.close()
            raise RuntimeError("this would wait for itself: make the function async and await it")
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(timeout=0.1)
                if future.done():
                    return future.result()
        except BaseException:
            future.cancel()
            raise


class _Raised(Exception):
    """Carries what a thread raised to the loop, which stops at exceptions that are more than an Exception."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


async def _shielded(work: Coroutine[Any, Any, T]) -> T:
    """Await user code, so that what would stop the loop reaches its task alone."""
    try:
        return await work
    except (SystemExit, KeyboardInterrupt, GeneratorExit, Cancelled, Completed, Failed) as exc:
        raise _Raised(exc) from None


def _seed(seed: int, row: Row) -> int:
    """Return a task's seed, 31 bits: of the run's, and of what the item is, not of when it was planned."""
    if row["ordinal"] == 0:
        return seed & 0x7FFFFFFF
    digest = hashlib.sha256(f"{seed}\0{row['map']}\0{row['key']}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _json_result(value: Any) -> Any:
    """Return a result as JSON. Raises TypeError for one that is none."""
    try:
        return to_jsonable_python(value, inf_nan_mode="strings")
    except (PydanticSerializationError, ValueError, RecursionError) as exc:
        raise TypeError(f"its result is a {type(value).__name__}, which cannot be kept as JSON: {exc}") from None


def _failure(error: BaseException, *, is_item: bool) -> dict[str, Any]:
    if isinstance(error, _Raised):
        error = error.error
    text = "".join(traceback.format_exception(error))
    if isinstance(error, SystemExit):
        said = f"it called sys.exit({error.code!r})"
    else:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return {
        "status": "failed",
        "error": (said + notes)[:4_000],
        "traceback": text[-_LONGEST_TRACEBACK:],
        "is_final": not is_item,
    }
