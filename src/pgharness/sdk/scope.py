"""What code under an experiment sees: the task it runs in, and the context that its functions are handed.

The current task travels by context variable, so it is known in coroutines, in tasks and in the threads that are started
by those who know it. Everything that is told here is
handed to `emit` at once, in order; writing it is another's work and holds nobody up.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import mimetypes
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, overload

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from pgharness.errors import HarnessError
from pgharness.types import Completion, Message

logger = logging.getLogger(__name__)
Emit = Callable[[str, dict[str, Any]], None]
Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
LONGEST_KEY = 1_000  # bytes of UTF-8; what Postgres has in an index is bounded
LARGEST_ARTIFACT = 256 * 1024 * 1024
T = TypeVar("T")
R = TypeVar("R")


class Cancelled(BaseException):
    """The run was cancelled, or its time is over. Not an Exception, so that code which catches those lets it pass."""


class Completed(BaseException):
    """The experiment said that it is done: `ctx.complete()`."""


class Failed(BaseException):
    """The experiment said that it failed: `ctx.fail(reason)`."""


class TaskFailed(HarnessError):
    """An item of a map failed; `key` says which, `error` how."""

    def __init__(self, key: str, error: str) -> None:
        super().__init__(f"item {key!r} failed: {error}")
        self.key = key
        self.error = error


class Services(Protocol):
    """What a task needs from the process that runs it."""

    @property
    def is_cancelled(self) -> bool: ...

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
    ) -> list[Any]: ...

    async def complete(
        self,
        scope: Scope,
        model: str,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None,
        parameters: Mapping[str, Any],
        seed: int | None,
    ) -> Completion: ...

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait, in a thread that is not the loop's, for what is done in the loop."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Scope:
    """One try of one task of a run; the run's own function is task 0."""

    run_id: int
    run: str
    kind: Literal["trial", "milestone"]
    ordinal: int
    attempt: int
    emit: Emit
    services: Services
    config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


_PLAIN = frozenset({str, int, bool, type(None)})
_current: ContextVar[Scope | None] = ContextVar("pgharness_scope", default=None)


def current() -> Scope | None:
    """Return the task that this code runs in, or None outside of any."""
    return _current.get()


@contextlib.contextmanager
def entered(scope: Scope) -> Iterator[Scope]:
    """Make a task the current one within the block."""
    token = _current.set(scope)
    try:
        yield scope
    finally:
        _current.reset(token)


@contextlib.contextmanager
def threads_inherit() -> Iterator[None]:
    """Let threads know the task that starts them, within the block; a pool's are started by whom they first work for.

    Python itself does so from 3.14 on, when it is told to.
    """
    start = threading.Thread.start

    def inherit(thread: threading.Thread) -> None:
        if current() is not None:
            context, run = contextvars.copy_context(), thread.run
            thread.run = lambda: context.run(run)  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = inherit  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


def jsonable(value: Any) -> Any:
    """Return a value as JSON can hold it: models, dataclasses, dates, sets and numbers as usual, the rest as text."""
    if type(value) in _PLAIN:
        return value
    if type(value) is dict and all(type(part) in _PLAIN for part in value.values()):
        return value.copy()
    try:
        return to_jsonable_python(
            value, fallback=str, inf_nan_mode="strings", bytes_mode="utf8", serialize_unknown=True
        )
    except UnicodeDecodeError:
        return to_jsonable_python(
            value, fallback=str, inf_nan_mode="strings", bytes_mode="base64", serialize_unknown=True
        )


class _Told:
    """What both kinds of context tell in the same way; none of it waits."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    @property
    def run_id(self) -> int:
        """The run's id."""
        return self._scope.run_id

    @property
    def run(self) -> str:
        """The run's name."""
        return self._scope.run

    @property
    def kind(self) -> Literal["trial", "milestone"]:
        """What the run is for."""
        return self._scope.kind

    @property
    def config(self) -> Mapping[str, Any]:
        """The instance's configuration as plain JSON; the function's `config` argument has it as a model."""
        return self._scope.config

    @property
    def seed(self) -> int:
        """The seed of the run, or of an item of a map: the same at every try."""
        return self._scope.seed

    @property
    def attempt(self) -> int:
        """Which try this is, from 1: a task starts anew after a crash."""
        return self._scope.attempt

    @property
    def is_cancelled(self) -> bool:
        """Whether the run was cancelled."""
        return self._scope.services.is_cancelled

    def check_cancelled(self) -> None:
        """Stop here when the run was cancelled."""
        if self.is_cancelled:
            raise Cancelled("the run was cancelled")

    def log(self, level: Level | Literal["warn"], message: str, **data: Any) -> None:
        """Add a line to the run's log, with anything else worth keeping."""
        level = "warning" if level == "warn" else level
        if level not in LEVELS:
            raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
        self._scope.emit("log", {"level": level, "message": str(message), "data": jsonable(data)})

    def debug(self, message: str, **data: Any) -> None:
        """Add a line of level debug."""
        self.log("debug", message, **data)

    def info(self, message: str, **data: Any) -> None:
        """Add a line of level info."""
        self.log("info", message, **data)

    def warning(self, message: str, **data: Any) -> None:
        """Add a line of level warning."""
        self.log("warning", message, **data)

    def error(self, message: str, **data: Any) -> None:
        """Add a line of level error."""
        self.log("error", message, **data)

    def log_batch(self, lines: Iterable[tuple[Level, str, Mapping[str, Any] | None]]) -> None:
        """Add several lines: (level, message, data or None) each."""
        for level, message, data in lines:
            self.log(level, message, **(data or {}))

    def result(self, key: str, value: Any) -> None:
        """Record a result under a key; the newest of a key counts, older ones are its history."""
        if not key or len(key.encode("utf-8", "surrogatepass")) > LONGEST_KEY:
            raise ValueError(f"a result needs a key of at most {LONGEST_KEY:,} bytes")
        self._scope.emit("result", {"key": key, "value": jsonable(value)})

    def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        """Say how far the run is; `total` stays what it was when it is left out."""
        self._scope.emit("progress", {"current": current, "total": total, "message": message})

    def metric(
        self, name: str, value: float, metric_type: str = "", *, step: int | None = None, data: Any = None
    ) -> None:
        """Record a number under a name."""
        row = {"name": name, "value": float(value), "metric_type": metric_type, "step": step, "data": jsonable(data)}
        self._scope.emit("metric", row)

    @contextlib.contextmanager
    def timer(self, operation: str) -> Iterator[None]:
        """Record how long the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timing(operation, (time.perf_counter() - start) * 1000)

    def timing(self, operation: str, duration_ms: float) -> None:
        """Record how long something took, in milliseconds."""
        self._scope.emit("timing", {"operation": operation, "duration_ms": duration_ms})

    def log_llm_call(
        self, model: str, input: Any, output: Any, duration_ms: float | None = None, *, error: str | None = None
    ) -> None:
        """Record a request to a model that was made without the harness."""
        row = {"model": model, "input": jsonable(input), "output": jsonable(output)}
        self._scope.emit("llm_call", row | {"duration_ms": duration_ms, "error": error})

    def artifact(self, name: str, content: bytes | str | Path, *, media_type: str | None = None) -> None:
        """Keep a file with the run: bytes, a text, or the path of a file; equal contents are stored once."""
        if not name:
            raise ValueError("an artifact needs a name")
        guessed = mimetypes.guess_type(str(content) if isinstance(content, Path) else name)[0]
        if isinstance(content, Path):
            if content.stat().st_size > LARGEST_ARTIFACT:
                raise ValueError(f"{content} has more than {LARGEST_ARTIFACT >> 20} MB")
            content = content.read_bytes()
        elif isinstance(content, str):
            guessed, content = guessed or "text/plain", content.encode()
        if len(content) > LARGEST_ARTIFACT:
            raise ValueError(f"artifact {name!r} has more than {LARGEST_ARTIFACT >> 20} MB")
        row = {"name": name, "media_type": media_type or guessed or "application/octet-stream", "content": content}
        self._scope.emit("artifact", row)

    def complete(self) -> None:
        """End here: the run is completed."""
        raise Completed

    def fail(self, reason: str) -> None:
        """End here: the run failed, for this reason."""
        raise Failed(reason)


class Context(_Told):
    """What a function of an experiment is handed, to tell what it does and to have it done."""

    @overload
    def map(
        self,
        function: Callable[..., R],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["raise"] = "raise",
        retries: int = 0,
    ) -> list[R]: ...

    @overload
    def map(
        self,
        function: Callable[..., R],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["collect"],
        retries: int = 0,
    ) -> list[R | TaskFailed]: ...

    def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["raise", "collect"] = "raise",
        retries: int = 0,
    ) -> list[Any]:
        """Run a function on each item, spread over all workers, and return the results in the order of the items.

        The function is one of a module, and takes the item, or a context and the item. Items and results are JSON, or
        what the annotation of the parameter makes of it. Each item is done once: what was done before a crash is not
        done again, by its `key` (default: the item itself). `name` tells maps of one function apart. A failed item
        raises TaskFailed when all others are done, or stands in the list as one with `errors="collect"`; it is tried
        `retries` times more.
        """
        services = self._scope.services
        return services.wait(
            services.map(self._scope, function, items, key=key, name=name, errors=errors, retries=retries)
        )

    def complete_chat(
        self,
        model: str,
        messages: str | Sequence[Message | Mapping[str, str]],
        *,
        schema: type[BaseModel] | Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Completion:
        """Ask a model of table `models` by name; the call is recorded, costed, limited and cancelled with the run."""
        services = self._scope.services
        return services.wait(_complete(self._scope, model, messages, schema, parameters, seed))


class AsyncContext(_Told):
    """A Context for coroutines: what has to be waited for is awaited."""

    @overload
    async def map(
        self,
        function: Callable[..., Coroutine[Any, Any, R]],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["raise"] = "raise",
        retries: int = 0,
    ) -> list[R]: ...

    @overload
    async def map(
        self,
        function: Callable[..., Coroutine[Any, Any, R]],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["collect"],
        retries: int = 0,
    ) -> list[R | TaskFailed]: ...

    @overload
    async def map(
        self,
        function: Callable[..., R],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["raise"] = "raise",
        retries: int = 0,
    ) -> list[R]: ...

    @overload
    async def map(
        self,
        function: Callable[..., R],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["collect"],
        retries: int = 0,
    ) -> list[R | TaskFailed]: ...

    async def map(
        self,
        function: Callable[..., Any],
        items: Iterable[Any],
        *,
        key: Callable[[Any], object] | None = None,
        name: str | None = None,
        errors: Literal["raise", "collect"] = "raise",
        retries: int = 0,
    ) -> list[Any]:
        """Run a function on each item: see Context.map."""
        return await self._scope.services.map(
            self._scope, function, items, key=key, name=name, errors=errors, retries=retries
        )

    async def complete_chat(
        self,
        model: str,
        messages: str | Sequence[Message | Mapping[str, str]],
        *,
        schema: type[BaseModel] | Mapping[str, Any] | None = None,
        parameters: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Completion:
        """Ask a model: see Context.complete_chat."""
        return await _complete(self._scope, model, messages, schema, parameters, seed)


async def _complete(
    scope: Scope,
    model: str,
    messages: str | Sequence[Message | Mapping[str, str]],
    schema: type[BaseModel] | Mapping[str, Any] | None,
    parameters: Mapping[str, Any] | None,
    seed: int | None,
) -> Completion:
    if isinstance(messages, str):
        messages = [Message("user", messages)]
    turns = [turn if isinstance(turn, Message) else Message(**turn) for turn in messages]  # type: ignore[arg-type]
    if isinstance(schema, type):
        schema = schema.model_json_schema()
    return await scope.services.complete(scope, model, turns, schema=schema, parameters=parameters or {}, seed=seed)
