"""Provider `python`: a function of the user's own answers.

`models.model` names it as `package.module:function`; every worker must be able to import it. It is called as

    function(item, **parameters)

and may be `async`. `parameters` are the model's, overridden by the request's. `item` is a dict of its own to keep or
change:

| key | holds |
|---|---|
| `case` | name, input and metadata; the target only when it grades |
| `config`, `replication`, `overlap`, ... | the run's settings, as the request carries them |
| `note`, `rubric` | what to grade, when it is used as a grader |
| `messages` | the prompts as rendered: a list of `{"role", "content"}` |
| `schema` | the JSON Schema that the answer must fit, or None |
| `seed`, `attempt` | this item's seed, the same for each of its attempts, and which attempt this is |

It returns text, any other JSON value, or a Completion where it knows the tokens. Whatever it raises fails the attempt,
with the traceback kept; a ModelError that it raises itself (RateLimited with a `retry_after`, Refused) counts as what
it says.

A sync function runs in a thread and must be safe to run in several at once. Python cannot kill a thread: one that
outlives its timeout keeps its place among `max_concurrency` (else 32) until it returns, so a function that hangs for
good uses these up, and the calls that follow time out waiting rather than pile up. Threads never keep a worker from
exiting. An async function is cancelled properly, and in return must not block.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import importlib
import inspect
import json
import os
import re
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from pgharness.errors import CodeFailed, InvalidOutput, ModelError, RequestRejected, TimedOut, Unavailable
from pgharness.types import Completion, ModelSpec, Request

_KEPT_CHARACTERS = 8_000
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # neither Postgres nor UTF-8 has these


def completion_of(answer: object, *, wants_json: bool = False, secrets: Iterable[str] = ()) -> Completion:
    """Return what user code answered as a Completion without the secrets, or raise InvalidOutput where it is no answer.

    Text stays text unless JSON was asked for; any other value becomes `data`, with the JSON it is as its text.
    """
    value: Any = answer
    if isinstance(answer, str):
        text = storable(answer, secrets)
        if not text.strip():
            raise InvalidOutput("the answer is empty", text=text)
        if not wants_json:
            return Completion(text=text, finish_reason="stop")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InvalidOutput(f"the answer is not JSON: {exc}", text=text) from None
    if value is None:
        raise InvalidOutput("the answer is null", text="null")
    try:
        data = storable(json.loads(json.dumps(value, allow_nan=False)), secrets)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidOutput(
            f"the answer, a {type(value).__name__}, cannot be written as JSON: {exc}",
            text=storable(repr(value), secrets)[:_KEPT_CHARACTERS],
            hint="Return text, or dicts, lists, numbers, booleans and strings.",
        ) from None
    return Completion(text=json.dumps(data, ensure_ascii=False), data=data, finish_reason="stop")


def storable(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Return a copy of text or JSON without the secrets and without the characters that Postgres cannot store."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "[redacted]")
        return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [storable(inner, secrets) for inner in value]
    if isinstance(value, dict):
        return {storable(key, secrets): storable(inner, secrets) for key, inner in value.items()}
    return value


class Function(ABC):
    """Answer with a function, wherever it comes from; see the module for how it is called."""

    _given: ClassVar[str] = "an item"

    def __init__(self, spec: ModelSpec, what: str) -> None:
        self._spec = spec
        self._what = what
        self._function: Callable[..., Any] | None = None
        self._places = asyncio.Semaphore(spec.max_concurrency or 32)

    @abstractmethod
    def _found(self) -> Callable[..., Any]:
        """Return the function; runs in a thread, as some imports take long."""

    def _arguments(self, request: Request) -> tuple[Any, ...]:
        """Return what the function gets to see of a request: its own, to keep or change."""
        return (_item(request),)

    async def __call__(self, request: Request) -> Completion:
        """Return what the function answers to this request."""
        parameters = {**self._spec.parameters, **request.parameters}
        try:
            async with asyncio.timeout(self._spec.timeout_seconds) as limit:
                if self._function is None:
                    self._function = await self._in_thread(self._found)
                function = self._function
                arguments = self._arguments(request)
                self._check_call(function, arguments, parameters)
                if inspect.iscoroutinefunction(function):
                    answer = await function(*arguments, **parameters)
                else:
                    answer = await self._in_thread(lambda: function(*arguments, **parameters))
                    if inspect.isawaitable(answer):
                        answer = await answer
        except ModelError:
            raise
        except asyncio.CancelledError as exc:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise self._failed(exc) from exc
        except (Exception, SystemExit) as exc:
            if not limit.expired():
                raise self._failed(exc) from exc
            busy = "; every thread is busy with an earlier call" if self._places.locked() else ""
            seconds = f"{self._spec.timeout_seconds:g} s"
            raise TimedOut(f"{self._what} gave no answer within {seconds}{busy}") from None
        return self._completion(answer, wants_json=request.schema is not None)

    def _check_call(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], parameters: Mapping[str, Any]
    ) -> None:
        """Raise RequestRejected where the function does not take these parameters: no retry would help."""
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none
            return
        try:
            signature.bind(*arguments, **parameters)
        except TypeError as exc:
            raise RequestRejected(
                f"{self._what}{signature} cannot be called with {self._given} and "
                f"the parameters {', '.join(parameters) or '(none)'}: {exc}",
                hint=f"Change the parameters of model '{self._spec.name}', or let the function accept **parameters.",
            ) from None

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Run work in a daemon thread once a place is free; it keeps the place until it ends, awaited or not."""
        await self._places.acquire()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

        def finish(answer: Any, error: BaseException | None) -> None:
            self._places.release()
            if not ended.done():
                ended.set_result((answer, error))

        def run() -> None:
            answer, error = None, None
            try:
                answer = work()
            except BaseException as exc:
                error = exc
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
                loop.call_soon_threadsafe(finish, answer, error)

        context = contextvars.copy_context()
        try:
            threading.Thread(target=context.run, args=(run,), name=self._what, daemon=True).start()
        except RuntimeError as exc:
            self._places.release()
            raise Unavailable(f"this host cannot start another thread: {exc}") from exc
        answer, error = await ended
        if error is None:
            return answer
        raise error if isinstance(error, Exception) else self._failed(error)

    def _completion(self, answer: object, *, wants_json: bool) -> Completion:
        if not isinstance(answer, Completion):
            return completion_of(answer, wants_json=wants_json)
        checked = completion_of(answer.text if answer.data is None else answer.data, wants_json=wants_json)
        return replace(answer, text=storable(answer.text) or checked.text, data=checked.data)

    def _failed(self, exc: BaseException) -> CodeFailed:
        return CodeFailed(f"{self._what} raised {self._reason(exc)}", text=self._traceback(exc))

    def _reason(self, exc: BaseException) -> str:
        return self._kept(traceback.format_exception_only(exc)[-1].strip())[:500]

    def _traceback(self, exc: BaseException) -> str:
        return self._kept("".join(traceback.format_exception(exc)))[-_KEPT_CHARACTERS:]

    def _kept(self, text: str) -> str:
        names = (self._spec.api_key_env or "").split(",")
        kept: str = storable(text, [key for name in names if (key := os.environ.get(name.strip()))])
        return kept


class PythonCallable(Function):
    """Answer with the Python function that a model names."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, spec.model)
        self._module, colon, self._name = spec.model.partition(":")
        if not (colon and all(part.isidentifier() for part in f"{self._module}.{self._name}".split("."))):
            raise RequestRejected(
                f"model '{spec.name}' names the Python function '{spec.model}'",
                hint="Name it as package.module:function.",
            )

    def _found(self) -> Callable[..., Any]:
        try:
            found: Any = importlib.import_module(self._module)
            for name in self._name.split("."):
                found = getattr(found, name)
        except (Exception, SystemExit) as exc:
            raise RequestRejected(
                f"model '{self._spec.name}' cannot import {self._spec.model}: {self._reason(exc)}",
                text=self._traceback(exc),
                hint=f"Install {self._module.partition('.')[0]} where workers run, or set PYTHONPATH to where it lies.",
            ) from exc
        if not callable(found):
            raise RequestRejected(
                f"model '{self._spec.name}' names {self._spec.model}, which is a {type(found).__name__}",
                hint="Name a function.",
            )
        return found  # type: ignore[no-any-return]


def _item(request: Request) -> dict[str, Any]:
    """Return the request as a dict of its own: other items share its case, and the function may change its copy."""
    return copy.deepcopy(
        {
            **request.item,
            "messages": [{"role": message.role, "content": message.content} for message in request.messages],
            "schema": request.schema,
            "seed": request.seed,
            "attempt": request.attempt,
        }
    )
