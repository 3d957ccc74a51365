"""Maps: how a function takes its items, by which keys they are known, how they are waited for, and what they gave."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from pgharness.database import Database, Row
from pgharness.sdk.scope import LONGEST_KEY, AsyncContext, Cancelled, Context, TaskFailed

_POLL_SECONDS = (0.02, 0.5)


class Stopped(Cancelled):
    """Cancelled, as the database said it before this process was told."""


class OpenMaps:
    """The maps of a run that tasks here wait for: the database is asked after all of them at once."""

    def __init__(self, database: Database, run_id: int) -> None:
        self._database = database
        self._run_id = run_id
        self._waiting: dict[asyncio.Future[None], tuple[int, str]] = {}
        self._has_news = asyncio.Event()
        self._asking: asyncio.Task[None] | None = None

    async def wait(self, parent: int, map: str) -> None:
        """Wait until all items of a map are decided. Raises Stopped when the run does not go on."""
        decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[decided] = (parent, map)
        self.hear()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        try:
            await decided
        finally:
            self._waiting.pop(decided, None)

    def hear(self) -> None:
        """Be told that there is reason to ask soon: a task has ended here."""
        self._has_news.set()

    async def _ask(self) -> None:
        delay = _POLL_SECONDS[0]
        while self._waiting:
            self._has_news.clear()
            asked = dict(self._waiting)
            parents, maps = map(list, zip(*asked.values(), strict=True))
            try:
                rows = await self._database.persist("map_state", run_id=self._run_id, parents=parents, maps=maps)
                state = rows[0] if rows else {"status": "deleted", "are_done": [False] * len(asked)}
            except Exception as exc:
                self._settle(list(self._waiting), exc)
                return
            self._settle([each for each, is_done in zip(asked, state["are_done"], strict=True) if is_done], None)
            if state["status"] != "running":
                self._settle(asked, Stopped(f"the run is {state['status']}"))
            await asyncio.sleep(_POLL_SECONDS[0])
            delay = _POLL_SECONDS[0] if self._has_news.is_set() else min(delay * 1.3, _POLL_SECONDS[1])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._has_news.wait()

    def _settle(self, decided: Iterable[asyncio.Future[None]], error: BaseException | None) -> None:
        for each in decided:
            if not each.done():
                each.set_result(None) if error is None else each.set_exception(error)
            self._waiting.pop(each, None)


@dataclass(frozen=True, slots=True)
class ItemFunction:
    """How a function takes its item."""

    is_async: bool
    takes_context: bool
    adapter: TypeAdapter[Any] | None  # what makes it of JSON
    function: Callable[..., Any]


def keys_of(arguments: Sequence[Any], given: Sequence[object] | None) -> Iterator[str]:
    """Yield a key for each item: the one that was given, else the item itself, numbered where items repeat."""
    seen: dict[str, int] = {}
    for argument, key in zip(arguments, [None] * len(arguments) if given is None else given, strict=True):
        if given is not None:
            text = str(key)
        elif isinstance(argument, str) and len(argument) <= 200:
            text = argument
        else:
            text = json.dumps(argument, sort_keys=True, separators=(",", ":"))
            if len(text) > 200:
                text = hashlib.sha256(text.encode()).hexdigest()
        if len(text.encode("utf-8", "surrogatepass")) > LONGEST_KEY:
            raise ValueError(f"the key {text[:50]!r}… has more than {LONGEST_KEY:,} bytes")
        count = seen[text] = seen.get(text, 0) + 1
        if count > 1 and given is not None:
            raise ValueError(f"two items have the key {text!r}: a key is one item's alone")
        yield text if count == 1 else f"{text}~{count}"


def result_of(row: Row, adapter: TypeAdapter[Any] | None) -> Any:
    """Return what an item gave, or the TaskFailed that stands for it."""
    if row["status"] == "failed":
        return TaskFailed(row["key"], row["error"])
    text = "null" if row["result"] is None else row["result"]
    return json.loads(text) if adapter is None else adapter.validate_json(text)


def item_function(found: Callable[..., Any]) -> ItemFunction:
    """Return how a function takes its item."""
    return ItemFunction(inspect.iscoroutinefunction(found), *_signature(found), found)


def _signature(function: Callable[..., Any]) -> tuple[bool, TypeAdapter[Any] | None]:
    """Tell whether a function of an item takes a context first, and what makes its item of JSON."""
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    hints = _hints(function)
    takes_context = len(parameters) > 1 or any(
        hints.get(parameter.name) in (Context, AsyncContext) for parameter in parameters
    )
    item = parameters[-1] if parameters else None
    annotation = hints.get(item.name) if item is not None else None
    return takes_context, _adapter(annotation)


def return_adapter(function: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """Return what makes the result of a function of its JSON; None where it stays as it is."""
    return _adapter(_hints(function).get("return"))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(inspect.unwrap(function))
    except (NameError, TypeError):
        return {}


def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    if annotation is None or annotation in (Any, inspect.Parameter.empty, object):
        return None
    try:
        return TypeAdapter(annotation)
    except Exception:  # a type that pydantic knows nothing of stays as JSON has it
        return None
