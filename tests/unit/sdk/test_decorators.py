"""Decorators: what they tell the run, and that a function stays what it was."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pgharness.errors import HarnessError
from pgharness.sdk.decorators import batch_processor, llm_call, metric, timer
from pgharness.sdk.scope import Cancelled, Scope, Services, current, entered

Told = list[tuple[str, dict[str, Any]]]


class Run:
    """A current scope that collects what it is told."""

    def __init__(self) -> None:
        self.told: Told = []
        self.process = SimpleNamespace(is_cancelled=False)
        self.scope = Scope(
            run_id=1,
            run="triage/1",
            kind="trial",
            ordinal=0,
            attempt=1,
            emit=lambda kind, row: self.told.append((kind, row)),
            services=cast(Services, self.process),
        )

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for told, row in self.told if told == kind]

    def metrics(self) -> dict[str, float]:
        return {row["name"]: row["value"] for row in self.rows("metric")}

    def warnings(self) -> list[str]:
        return [row["message"] for row in self.rows("log") if row["level"] == "warning"]


@pytest.fixture
def run() -> Iterator[Run]:
    found = Run()
    with entered(found.scope):
        yield found


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decorator", [metric, metric(), timer, timer(), llm_call, llm_call(), llm_call("m")])
def test_outside_of_a_run_the_function_is_just_called(decorator: Callable[..., Any]) -> None:
    assert current() is None
    assert decorator(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize(
    "decorator", [metric, timer, llm_call, metric("m"), timer("t"), llm_call("m"), batch_processor]
)
def test_a_decorated_function_keeps_its_name_signature_and_kind(decorator: Callable[..., Any]) -> None:
    def plain(x: int) -> int:
        """Do it."""
        return x

    async def coroutine(x: int) -> int:
        return x

    assert decorator(plain).__name__ == "plain" and decorator(plain).__doc__ == "Do it."
    assert inspect.signature(decorator(plain)) == inspect.signature(plain)
    assert inspect.iscoroutinefunction(decorator(coroutine)) and not inspect.iscoroutinefunction(decorator(plain))


@pytest.mark.parametrize("decorator", [metric, timer, llm_call])
def test_what_a_function_raises_passes_through_unchanged(run: Run, decorator: Callable[..., Any]) -> None:
    problem = ValueError("no")

    def failing() -> None:
        raise problem

    with pytest.raises(ValueError) as caught:
        decorator(failing)()
    assert caught.value is problem


async def test_decorators_stack(run: Run) -> None:
    @metric("score")
    @timer
    @llm_call("m")
    async def ask(question: str) -> float:
        return 0.5

    assert await ask("why?") == 0.5
    assert [kind for kind, _ in run.told] == ["llm_call", "timing", "metric"]


async def test_the_run_is_known_in_tasks_and_in_threads_that_asyncio_starts(run: Run) -> None:
    @metric
    def score() -> int:
        return 1

    await asyncio.gather(asyncio.to_thread(score), asyncio.create_task(asyncio.to_thread(score)))
    assert len(run.rows("metric")) == 2


def test_methods_class_methods_and_static_methods_are_decorated_alike(run: Run) -> None:
    class Judge:
        @metric
        def own(self, x: int) -> int:
            return x

        @classmethod
        @timer
        def of_class(cls, x: int) -> int:
            return x

        @staticmethod
        @llm_call("m")
        def static(x: int) -> int:
            return x

        @batch_processor
        def many(self, x: int) -> int:
            return x + 1

    judge = Judge()
    assert (judge.own(1), judge.of_class(2), judge.static(3), judge.many([1, 2])) == (1, 2, 3, [2, 3])
    assert [kind for kind, _ in run.told if kind not in ("log", "progress")] == ["metric", "timing", "llm_call"]


# -- metric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"), [(0.85, 0.85), (3, 3.0), (True, 1.0), (False, 0.0), (Decimal("0.5"), 0.5)]
)
def test_a_number_is_one_metric(run: Run, value: object, number: float) -> None:
    @metric(name="accuracy", metric_type="share")
    def accuracy() -> object:
        return value

    assert accuracy() is value
    assert run.rows("metric") == [
        {"name": "accuracy", "value": number, "metric_type": "share", "step": None, "data": None}
    ]


def test_a_number_of_another_library_is_a_number(run: Run) -> None:
    class Scalar:
        def __float__(self) -> float:
            return 2.5

    metric("x")(Scalar)()
    assert run.metrics() == {"x": 2.5}


def test_a_metric_is_named_after_its_function_unless_told_otherwise(run: Run) -> None:
    @metric
    def bare() -> int:
        return 1

    @metric()
    def called() -> int:
        return 2

    bare(), called()
    assert run.metrics() == {"bare": 1, "called": 2}


def test_a_dict_of_numbers_is_a_metric_for_each_key(run: Run) -> None:
    scores = {"precision": 0.5, "recall": True}
    assert metric("eval")(lambda: scores)() is scores
    assert run.metrics() == {"eval.precision": 0.5, "eval.recall": 1.0} and not run.warnings()


def test_what_is_no_number_in_a_dict_is_named_and_the_rest_is_kept(run: Run) -> None:
    metric("eval")(lambda: {"f1": 0.5, "label": "good"})()
    assert run.metrics() == {"eval.f1": 0.5}
    assert run.warnings() == ["no metric eval.label: not a number"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [("0.5", "str"), (None, "nothing"), ([1, 2], "list"), ({}, "dict"), (1j, "complex"), (10**400, "int")],
)
def test_what_is_no_number_is_a_warning_and_returned_unchanged(run: Run, value: object, kind: str) -> None:
    assert metric("m")(lambda: value)() is value
    assert not run.rows("metric")
    assert run.warnings() == [f"no metric m: {kind} was returned, not a number or a dict of numbers"]


def test_a_function_that_raises_has_no_metric(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        metric(lambda: 1 / 0)()
    assert run.told == []


# -- timer ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_function_is_timed_also_when_it_raises(run: Run, clock: Callable[[float], None]) -> None:
    @timer
    def load(seconds: float) -> None:
        clock(seconds)
        if seconds > 1:
            raise OSError

    load(1)
    with pytest.raises(OSError):
        load(2)
    assert run.rows("timing") == [
        {"operation": "load", "duration_ms": 1000.0},
        {"operation": "load", "duration_ms": 2000.0},
    ]


async def test_a_coroutine_is_timed_until_it_has_returned(run: Run, clock: Callable[[float], None]) -> None:
    @timer("ask")
    async def ask() -> int:
        await asyncio.sleep(0)
        clock(3)
        return 1

    assert await ask() == 1
    assert run.rows("timing") == [{"operation": "ask", "duration_ms": 3000.0}]


def test_a_block_is_timed_by_its_name_or_that_of_the_function_around_it(
    run: Run, clock: Callable[[float], None]
) -> None:
    with timer("outer"), contextlib.suppress(OSError), timer():
        clock(1)
        raise OSError
    name = "test_a_block_is_timed_by_its_name_or_that_of_the_function_around_it"
    assert [row["operation"] for row in run.rows("timing")] == [name, "outer"]


def test_one_timer_may_be_used_within_itself(run: Run, clock: Callable[[float], None]) -> None:
    step = timer("step")
    with step:
        clock(1)
        with step:
            clock(1)
    assert [row["duration_ms"] for row in run.rows("timing")] == [1000.0, 2000.0]


def test_a_block_outside_of_a_run_is_just_run() -> None:
    with timer("x"):
        done = True
    assert done


def test_a_generator_is_timed_until_it_is_exhausted(run: Run, clock: Callable[[float], None]) -> None:
    @timer
    def rows() -> Iterator[int]:
        yield 1
        clock(1)
        yield 2
        clock(1)

    found = rows()
    assert next(found) == 1 and not run.told
    assert list(found) == [2]
    assert run.rows("timing") == [{"operation": "rows", "duration_ms": 2000.0}]


def test_a_generator_that_nobody_finishes_is_timed_until_it_is_closed(run: Run) -> None:
    closed = []

    @timer
    def rows() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    found = cast(Any, rows())
    next(found)
    found.close()
    assert closed == [True] and len(run.rows("timing")) == 1


async def test_an_async_generator_is_timed_until_it_is_exhausted_or_closed(run: Run) -> None:
    closed = []

    @timer
    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    assert inspect.isasyncgenfunction(rows)
    assert [row async for row in rows()] == [1, 2]
    early = cast(Any, rows())
    await anext(early)
    await early.aclose()
    assert closed == [True, True] and len(run.rows("timing")) == 2


async def test_generators_are_sent_to_thrown_at_and_return_as_before(run: Run) -> None:
    @timer
    def echo() -> Any:
        said: list[Any] = []
        try:
            while True:
                said.append((yield len(said)))
        except KeyError:
            return said

    @timer
    async def echo_async() -> Any:
        said: list[Any] = []
        try:
            while True:
                said.append((yield len(said)))
        except KeyError:
            yield said

    talk = echo()
    assert [next(talk), talk.send("a"), talk.send("b")] == [0, 1, 2]
    with pytest.raises(StopIteration) as end:
        talk.throw(KeyError())
    assert end.value.value == ["a", "b"]
    talk = echo_async()
    assert [await anext(talk), await talk.asend("a"), await talk.athrow(KeyError())] == [0, 1, ["a"]]


def test_a_timed_generator_still_makes_a_context_manager(run: Run) -> None:
    @contextlib.contextmanager
    @timer
    def swallowing() -> Iterator[None]:
        with contextlib.suppress(KeyError):
            yield

    with swallowing():
        raise KeyError
    assert len(run.rows("timing")) == 1


# -- llm_call ---------------------------------------------------------------------------------------------------------


def test_a_call_is_recorded_with_all_its_arguments_its_output_and_duration(
    run: Run, clock: Callable[[float], None]
) -> None:
    @llm_call(model="gpt-4")
    def ask(prompt: str, *more: str, temperature: float = 0.5, **rest: Any) -> dict[str, str]:
        clock(0.25)
        return {"answer": prompt.upper()}

    assert ask("why", "so", top_p=1) == {"answer": "WHY"}
    assert run.rows("llm_call") == [
        {
            "model": "gpt-4",
            "input": {"prompt": "why", "more": ["so"], "temperature": 0.5, "rest": {"top_p": 1}},
            "output": {"answer": "WHY"},
            "duration_ms": 250.0,
            "error": None,
        }
    ]


async def test_a_call_that_raises_is_recorded_with_its_error(run: Run) -> None:
    @llm_call("m")
    async def ask(prompt: str) -> str:
        raise TimeoutError("too slow")

    with pytest.raises(TimeoutError):
        await ask("why")
    (row,) = run.rows("llm_call")
    assert (row["input"], row["output"], row["error"]) == ({"prompt": "why"}, None, "TimeoutError: too slow")


async def test_a_call_that_is_cancelled_is_recorded(run: Run) -> None:
    begun = asyncio.Event()

    @llm_call("m")
    async def ask() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(ask())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [row["error"] for row in run.rows("llm_call")] == ["CancelledError"]


def test_input_and_output_are_left_out_on_request(run: Run) -> None:
    llm_call("m", log_input=False, log_output=False)(lambda prompt: "secret")("secret")
    assert "secret" not in str(run.told) and len(run.rows("llm_call")) == 1


def test_the_input_is_what_it_was_at_the_call(run: Run) -> None:
    @llm_call("m")
    def ask(messages: list[str]) -> None:
        messages.append("answer")

    ask(["question"])
    assert run.rows("llm_call")[0]["input"] == {"messages": ["question"]}


def test_a_method_is_recorded_without_its_object(run: Run) -> None:
    class Client:
        @llm_call("m")
        def ask(self, prompt: str) -> None: ...

    Client().ask("why")
    assert run.rows("llm_call")[0]["input"] == {"prompt": "why"}


def test_the_model_is_that_of_the_call_when_none_is_named(run: Run) -> None:
    @llm_call
    def ask(prompt: str, model: str = "small") -> None: ...

    @llm_call
    def answer(prompt: str) -> None: ...

    ask("x"), ask("x", model="large"), answer("x")
    assert [row["model"] for row in run.rows("llm_call")] == ["small", "large", "answer"]


def test_keys_and_passwords_are_not_recorded(run: Run) -> None:
    @llm_call("m")
    def ask(prompt: str, api_key: str, password: str | None = None, **options: Any) -> None: ...

    ask("why", "sk-1", headers={"Authorization": "Bearer 2", "x-api-key": "3"}, max_tokens=5)
    assert run.rows("llm_call")[0]["input"] == {
        "prompt": "why",
        "api_key": "[redacted]",
        "password": None,
        "options": {"headers": {"Authorization": "[redacted]", "x-api-key": "[redacted]"}, "max_tokens": 5},
    }


def test_what_is_no_json_does_not_fail_the_call(run: Run) -> None:
    loop: list[Any] = []
    loop.append(loop)

    @llm_call("m")
    def see(image: bytes, parts: list[Any]) -> list[Any]:
        return loop

    assert see(b"\xff\xd8", [{"image": b"\xff"}, "what is it?"]) is loop
    (row,) = run.rows("llm_call")
    assert row["input"]["parts"][1] == "what is it?" and row["output"]


def test_a_call_with_wrong_arguments_fails_as_it_would_without(run: Run) -> None:
    @llm_call("m")
    def ask(prompt: str) -> None: ...

    with pytest.raises(TypeError, match="prompt"):
        cast(Any, ask)()


async def test_a_streamed_answer_is_recorded_whole_when_it_ends(run: Run) -> None:
    @llm_call("m")
    def text(prompt: str) -> Iterator[str]:
        yield from ("Hel", "lo")

    @llm_call("m")
    async def chunks(prompt: str) -> AsyncIterator[dict[str, int]]:
        yield {"n": 1}
        yield {"n": 2}

    assert list(text("x")) == ["Hel", "lo"]
    assert [chunk async for chunk in chunks("x")] == [{"n": 1}, {"n": 2}]
    assert [row["output"] for row in run.rows("llm_call")] == ["Hello", [{"n": 1}, {"n": 2}]]


def test_a_stream_that_breaks_is_recorded_with_what_came(run: Run) -> None:
    @llm_call("m")
    def text() -> Iterator[str]:
        yield "Hel"
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        list(text())
    stopped = cast(Any, text())
    next(stopped)
    stopped.close()
    rows = run.rows("llm_call")
    assert [(row["output"], row["error"]) for row in rows] == [("Hel", "ConnectionError: gone"), ("Hel", None)]


# -- batch_processor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_items_are_worked_through_in_batches_with_a_line_and_progress_each(run: Run, parallel: bool) -> None:
    @batch_processor(batch_size=2, parallel=parallel)
    def double(x: int) -> int:
        return 2 * x

    assert double([3, 1, 2, 5, 4]) == [6, 2, 4, 10, 8]
    assert [row["message"] for row in run.rows("log")] == [
        "double: batch 1 done, 2 of 5 items",
        "double: batch 2 done, 4 of 5 items",
        "double: batch 3 done, 5 of 5 items",
    ]
    assert [(row["current"], row["total"]) for row in run.rows("progress")] == [(2, 5), (4, 5), (5, 5)]


def test_any_iterable_is_taken_a_batch_at_a_time(run: Run) -> None:
    taken = []
    seen = []

    def items() -> Iterator[int]:
        for x in range(5):
            taken.append(x)
            yield x

    @batch_processor(batch_size=2)
    def see(x: int) -> int:
        seen.append(len(taken))
        return x

    assert see(items()) == [0, 1, 2, 3, 4]
    assert seen == [2, 2, 4, 4, 5]
    assert [(row["current"], row["total"]) for row in run.rows("progress")] == [(2, None), (4, None), (5, None)]


@pytest.mark.parametrize("decorator", [batch_processor, batch_processor(2), batch_processor(2, parallel=True)])
def test_batches_work_outside_of_a_run_and_without_items(decorator: Callable[..., Any]) -> None:
    assert decorator(str)([1, 2, 3]) == ["1", "2", "3"]
    assert decorator(str)([]) == []


def test_threads_work_at_once_know_the_run_and_keep_the_order(run: Run) -> None:
    together = threading.Barrier(3, timeout=30)

    @batch_processor(batch_size=3, parallel=True, workers=3)
    @metric("x")
    def wait(x: int) -> int:
        together.wait()
        return x

    assert wait(range(6)) == [0, 1, 2, 3, 4, 5]
    assert sorted(row["value"] for row in run.rows("metric")) == [0, 1, 2, 3, 4, 5]


def test_no_more_threads_work_than_workers(run: Run) -> None:
    threads = set()

    @batch_processor(batch_size=8, parallel=True, workers=1)
    def where(x: int) -> None:
        threads.add(threading.get_ident())

    where(range(16))
    assert len(threads) == 1 and threading.get_ident() not in threads


async def test_coroutines_work_at_once_and_no_more_than_workers(run: Run) -> None:
    busy, most = 0, 0

    @batch_processor(batch_size=6, parallel=True, workers=3)
    async def work(x: int) -> int:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        for _ in range(3):
            await asyncio.sleep(0)
        busy -= 1
        return x

    assert await work(range(12)) == list(range(12))
    assert most == 3


async def test_coroutines_work_one_after_the_other_unless_parallel(run: Run) -> None:
    order = []

    @batch_processor(batch_size=2)
    async def work(x: int) -> int:
        order.append(f"{x} begins")
        await asyncio.sleep(0)
        order.append(f"{x} ends")
        return x

    assert await work(iter([1, 2])) == [1, 2]
    assert order == ["1 begins", "1 ends", "2 begins", "2 ends"]


@pytest.mark.parametrize("parallel", [False, True])
def test_an_item_that_raises_ends_it_and_is_named(run: Run, parallel: bool) -> None:
    @batch_processor(batch_size=2, parallel=parallel)
    def invert(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError) as caught:
        invert([1, 2, 3, 0, 5])
    assert caught.value.__notes__ == ["in item 3 of invert"]
    assert len(run.rows("progress")) == 1


async def test_a_coroutine_that_raises_leaves_no_task_behind(run: Run) -> None:
    stopped = []

    @batch_processor(parallel=True)
    async def work(x: int) -> None:
        if x == 0:
            raise OSError
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(x)

    with pytest.raises(OSError) as caught:
        await work([1, 0, 2])
    assert sorted(stopped) == [1, 2] or stopped == [1]  # one that had not begun needs no stopping
    assert caught.value.__notes__ == ["in item 1 of work"] and len(asyncio.all_tasks()) == 1


def test_a_cancelled_run_stops_between_batches(run: Run) -> None:
    done = []

    @batch_processor(batch_size=2)
    def work(x: int) -> None:
        done.append(x)
        run.process.is_cancelled = True

    with pytest.raises(Cancelled):
        work(range(6))
    assert done == [0, 1]


@pytest.mark.parametrize("settings", [{"batch_size": 0}, {"workers": 0}, {"batch_size": -1}])
def test_settings_that_cannot_be_used_are_refused_at_once(settings: dict[str, int]) -> None:
    with pytest.raises(HarnessError) as caught:
        batch_processor(**cast(Any, settings))
    assert caught.value.hint == "It has to be at least 1."


def test_a_batch_without_items_to_take_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match="takes the items as its first argument"):
        cast(Any, batch_processor(str))()
