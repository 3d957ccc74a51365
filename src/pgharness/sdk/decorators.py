"""Decorators that tell the run what a function does: its metrics, its time, its questions to models, its batches.

A decorated function is called, returns and raises as it would without; only `batch_processor` changes what it takes.
Outside of a run there is nothing to tell, and nothing is told. Functions, coroutines, generators of both kinds and
methods are alike, with parentheses or without: `@metric`, `@metric()` and `@metric("accuracy")`.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import re
import reprlib
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, aclosing, contextmanager, nullcontext
from itertools import islice
from typing import Any, ParamSpec, Protocol, SupportsFloat, TypeVar, cast, overload

from pgharness.errors import HarnessError
from pgharness.sdk.scope import Context, current, jsonable

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

_SECRET = re.compile(r"(api[-_]?key|secret|password|authorization|(access|auth|bearer|api|hf)[-_]?token)$", re.I)
_DEPTH = 5
_THREADS = 32  # at most, where nobody says how many


# -- metrics ----------------------------------------------------------------------------------------------------------


@overload
def metric(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def metric(name: str | None = None, metric_type: str = "") -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def metric(name: Callable[P, R] | str | None = None, metric_type: str = "") -> Any:
    """Record what a function returns as a metric, under `name` or the function's own.

    A number is one metric (True counts 1, False 0), a dict of numbers one for each key, `name.key`. Anything else is
    a warning in the log. The value is returned as it is.
    """
    if callable(name):
        return metric()(name)

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        title = name or _name(function)

        @contextmanager
        def watch(context: Context, call: _Call) -> Iterator[None]:
            yield
            _record(context, title, metric_type, call.value)

        return _watched(function, watch, generators=False)

    return decorated


def _record(context: Context, name: str, metric_type: str, value: Any) -> None:
    if isinstance(value, Mapping) and value:
        numbers = {f"{name}.{key}": _number(item) for key, item in value.items()}
    else:
        numbers = {name: _number(value)}
    for key, number in numbers.items():
        if number is not None:
            context.metric(key, number, metric_type)
    wrong = [key for key, number in numbers.items() if number is None]
    if wrong and isinstance(value, Mapping) and value:
        context.warning(f"no metric {', '.join(wrong)}: not a number", metric=name)
    elif wrong:
        kind = "nothing" if value is None else type(value).__name__
        context.warning(f"no metric {name}: {kind} was returned, not a number or a dict of numbers", metric=name)


def _number(value: Any) -> float | None:
    """Return a number of any library as a float, None for what is no number."""
    try:
        return float(value) if isinstance(value, SupportsFloat) else None
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several; an integer of 400 digits
        return None


# -- time -------------------------------------------------------------------------------------------------------------


class _Timer:
    """What `timer(name)` makes: a decorator, and a context manager."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._open: list[tuple[Context | None, str, float]] = []

    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]:
        operation = self._name or _name(function)
        return _watched(function, lambda context, call: context.timer(operation))

    def __enter__(self) -> None:
        scope = current()
        operation = self._name or sys._getframe(1).f_code.co_name
        self._open.append((Context(scope) if scope else None, operation, time.perf_counter()))

    def __exit__(self, *_: object) -> None:
        context, operation, start = self._open.pop()
        if context:
            context.timing(operation, (time.perf_counter() - start) * 1000)


@overload
def timer(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def timer(name: str | None = None) -> _Timer: ...


def timer(name: Callable[P, R] | str | None = None) -> Any:
    """Record how long each call of a function takes, or a block: `with timer("loading"):`; also when it raises.

    Without a name it is the function's, for a block that of the function in which it stands. A generator is timed from
    its first item until it is exhausted or closed.
    """
    return _Timer(None)(name) if callable(name) else _Timer(name)


# -- questions to models ----------------------------------------------------------------------------------------------


@overload
def llm_call(function: Callable[P, R], /) -> Callable[P, R]: ...


@overload
def llm_call(
    model: str | None = None, log_input: bool = True, log_output: bool = True
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def llm_call(model: Callable[P, R] | str | None = None, log_input: bool = True, log_output: bool = True) -> Any:
    """Record each call of a function that asks a model: its arguments, what came of it, and how long it took.

    Without `model` it is the call's argument of that name, else the function's name. The arguments are recorded as they
    were at the call, without what is named like an API key or a password. Of a generator the output is all it yielded,
    joined where that is text.
    """
    if callable(model):
        return llm_call()(model)

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        arguments = _arguments_of(function)

        @contextmanager
        def watch(context: Context, call: _Call) -> Iterator[None]:
            given = arguments(call.args, call.kwargs)
            asked = model or str(given.get("model") or _name(function))
            question = _without_secrets(_kept(given)) if log_input else None
            call.items = [] if log_output else None
            error = None
            start = time.perf_counter()
            try:
                yield
            except GeneratorExit:
                raise  # nobody wants more of it, which is no error
            except BaseException as exc:
                error = f"{type(exc).__name__}: {exc}".removesuffix(": ")
                raise
            finally:
                duration_ms = (time.perf_counter() - start) * 1000
                output = _kept(call.output) if log_output else None
                context.log_llm_call(asked, question, output, duration_ms, error=error)

        return _watched(function, watch)

    return decorated


def _arguments_of(function: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """Return what names the arguments of a call, defaults included, without a method's object."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin may have none
        return lambda args, kwargs: {"args": args, **kwargs}
    owner = _owner(function)

    def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # the call itself will say so
            return {"args": args, **kwargs}
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if name != owner}

    return arguments


def _kept(value: Any, depth: int = 0) -> Any:
    """Return a value as JSON; what cannot be, the bytes of an image or a list that holds itself, as a text about it."""
    try:
        return jsonable(value)
    except Exception:
        if isinstance(value, bytes | bytearray):
            return f"{len(value)} bytes"
        if isinstance(value, Mapping) and depth < _DEPTH:
            return {str(key): _kept(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple) and depth < _DEPTH:
            return [_kept(item, depth + 1) for item in value]
        return reprlib.repr(value)


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: "[redacted]" if item is not None and _SECRET.search(key) else _without_secrets(item)
            for key, item in value.items()
        }
    return [_without_secrets(item) for item in value] if isinstance(value, list) else value


# -- batches ----------------------------------------------------------------------------------------------------------


class Batching(Protocol):
    """A function of one item becomes one of any number of items; so does a method."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a coroutine is also just a value
        self, function: Callable[[T], Awaitable[R]], /
    ) -> Callable[[Iterable[T]], Coroutine[Any, Any, list[R]]]: ...
    @overload
    def __call__(self, function: Callable[[T], R], /) -> Callable[[Iterable[T]], list[R]]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[[S, T], Awaitable[R]], /
    ) -> Callable[[S, Iterable[T]], Coroutine[Any, Any, list[R]]]: ...
    @overload
    def __call__(self, function: Callable[[S, T], R], /) -> Callable[[S, Iterable[T]], list[R]]: ...


@overload
def batch_processor(  # type: ignore[overload-overlap]
    function: Callable[[T], Awaitable[R]], /
) -> Callable[[Iterable[T]], Coroutine[Any, Any, list[R]]]: ...


@overload
def batch_processor(function: Callable[[T], R], /) -> Callable[[Iterable[T]], list[R]]: ...


@overload
def batch_processor(  # type: ignore[overload-overlap]
    function: Callable[[S, T], Awaitable[R]], /
) -> Callable[[S, Iterable[T]], Coroutine[Any, Any, list[R]]]: ...


@overload
def batch_processor(function: Callable[[S, T], R], /) -> Callable[[S, Iterable[T]], list[R]]: ...


@overload
def batch_processor(batch_size: int = 10, parallel: bool = False, workers: int | None = None) -> Batching: ...


def batch_processor(batch_size: Any = 10, parallel: bool = False, workers: int | None = None) -> Any:
    """Let a function of one item take any number of them: it is called with each, and the results are a list in order.

    The items are taken and worked through in batches; after each the log gets a line and the run its progress, and a
    run that was cancelled stops there. `parallel` does the items of a batch at once: in at most `workers` threads, or
    for a coroutine function as that many tasks (default: as many as the batch has, threads at most 32). An item that
    raises ends it all, those begun are waited for, or cancelled where they are tasks; a note says which item it was.
    """
    if callable(batch_size):
        return batch_processor()(batch_size)
    for name, number in {"batch_size": batch_size, "workers": workers}.items():
        if number is not None and number < 1:
            raise HarnessError(f"{name} is {number}", hint="It has to be at least 1.")

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        title = _name(function)
        position = 0 if _owner(function) is None else 1

        def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Iterable[Any], Callable[[Any], Any]]:
            """Return the items of a call, and how one of them is done."""
            if len(args) <= position:
                raise TypeError(f"{title}() takes the items as its first argument")
            return args[position], lambda item: function(*args[:position], item, *args[position + 1 :], **kwargs)

        def wrapper(*args: Any, **kwargs: Any) -> list[Any]:
            items, one = given(args, kwargs)
            batches = _batches(title, items, batch_size)
            if not parallel:
                return [_named(title, one, *entry) for batch in batches for entry in batch]
            results: list[Any] = []
            with ThreadPoolExecutor(workers or min(batch_size, _THREADS), thread_name_prefix=title) as pool:
                for batch in batches:
                    results += _threaded(pool, functools.partial(_named, title, one), batch)
            return results

        async def async_wrapper(*args: Any, **kwargs: Any) -> list[Any]:
            items, one = given(args, kwargs)
            limit = workers or batch_size if parallel else 1
            results: list[Any] = []
            for batch in _batches(title, items, batch_size):
                results += await _gathered(limit, functools.partial(_named_async, title, one), batch)
            return results

        return functools.wraps(function)(async_wrapper if inspect.iscoroutinefunction(function) else wrapper)

    return decorated


def _batches(title: str, items: Iterable[Any], size: int) -> Iterator[list[tuple[int, Any]]]:
    """Yield the numbered items batch by batch, and tell the run of each batch that was done."""
    scope = current()
    context = Context(scope) if scope else None
    total = len(items) if isinstance(items, Sized) else None
    rest = enumerate(items)
    done, number = 0, 0
    while batch := list(islice(rest, size)):
        if context:
            context.check_cancelled()
        start = time.perf_counter()
        yield batch
        number, done = number + 1, done + len(batch)
        if context:
            duration_ms = (time.perf_counter() - start) * 1000
            so_far = f"{done} items" if total is None else f"{done} of {total} items"
            context.info(f"{title}: batch {number} done, {so_far}", batch=number, duration_ms=round(duration_ms, 3))
            context.progress(done, total, title)


def _threaded(pool: ThreadPoolExecutor, one: Callable[[int, Any], Any], batch: list[tuple[int, Any]]) -> list[Any]:
    """Do a batch in threads, each of which knows the run; the first failure in the order of the items is raised."""
    futures: list[Future[Any]] = [pool.submit(contextvars.copy_context().run, one, *entry) for entry in batch]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


async def _gathered(limit: int, one: Callable[[int, Any], Awaitable[Any]], batch: list[tuple[int, Any]]) -> list[Any]:
    """Do a batch in tasks, `limit` at a time; none is left behind when one fails."""
    if limit == 1:
        return [await one(*entry) for entry in batch]
    places = asyncio.Semaphore(limit)

    async def placed(index: int, item: Any) -> Any:
        async with places:
            return await one(index, item)

    tasks = [asyncio.create_task(placed(*entry)) for entry in batch]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _named(title: str, one: Callable[[Any], Any], index: int, item: Any) -> Any:
    try:
        return one(item)
    except Exception as exc:
        exc.add_note(f"in item {index} of {title}")
        raise


async def _named_async(title: str, one: Callable[[Any], Awaitable[Any]], index: int, item: Any) -> Any:
    try:
        return await one(item)
    except Exception as exc:
        exc.add_note(f"in item {index} of {title}")
        raise


# -- what surrounds a call --------------------------------------------------------------------------------------------


class _Call:
    """One call of a decorated function: what it was given, and what came of it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs
        self.value: Any = None
        self.items: list[Any] | None = None  # what a generator yielded, where somebody put a list here

    @property
    def output(self) -> Any:
        """What was returned, or all that was yielded."""
        if not self.items:
            return self.value
        return "".join(self.items) if all(isinstance(item, str) for item in self.items) else self.items

    def took(self, item: T) -> T:
        if self.items is not None:
            self.items.append(item)
        return item


def _watched(
    function: Callable[P, R],
    watch: Callable[[Context, _Call], AbstractContextManager[None]],
    *,
    generators: bool = True,
) -> Callable[P, R]:
    """Return the function with `watch` around each call within a run; around a generator, until it is exhausted."""
    plain = cast("Callable[..., Any]", function)

    def watching(call: _Call) -> AbstractContextManager[None]:
        scope = current()
        return watch(Context(scope), call) if scope else nullcontext()

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        with watching(call):
            call.value = plain(*args, **kwargs)
        return call.value

    async def coroutine_wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        with watching(call):
            call.value = await plain(*args, **kwargs)
        return call.value

    def generator_wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        call = _Call(args, kwargs)
        with watching(call):
            call.value = yield from _relayed(plain(*args, **kwargs), call)
        return call.value

    async def async_generator_wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs)
        with watching(call):
            async with aclosing(plain(*args, **kwargs)) as inner:
                step = inner.asend(None)
                while True:
                    try:
                        item = call.took(await step)
                    except StopAsyncIteration:
                        break
                    try:
                        step = inner.asend((yield item))
                    except GeneratorExit:
                        raise
                    except BaseException as exc:
                        step = inner.athrow(exc)

    chosen: Callable[..., Any] = wrapper
    if inspect.iscoroutinefunction(function):
        chosen = coroutine_wrapper
    elif generators and inspect.isgeneratorfunction(function):
        chosen = generator_wrapper
    elif generators and inspect.isasyncgenfunction(function):
        chosen = async_generator_wrapper
    return cast("Callable[P, R]", functools.wraps(function)(chosen))


def _relayed(inner: Generator[Any, Any, Any], call: _Call) -> Generator[Any, Any, Any]:
    """Stand between a generator and its caller without either noticing, and take down what passes."""
    sent, thrown = None, None
    while True:
        try:
            item = call.took(inner.send(sent) if thrown is None else inner.throw(thrown))
        except StopIteration as end:
            return end.value
        sent, thrown = None, None
        try:
            sent = yield item
        except GeneratorExit:
            inner.close()
            raise
        except BaseException as exc:
            thrown = exc


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _owner(function: Callable[..., Any]) -> str | None:
    """Return the name under which a method takes its object, None for a function."""
    try:
        first = next(iter(inspect.signature(function).parameters), "")
    except ValueError:
        return None
    return first if first in ("self", "cls") else None
