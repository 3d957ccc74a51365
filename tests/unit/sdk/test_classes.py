"""Experiments as classes: the order of their stages, and that cleanup runs and hides nothing; runs by hand beside."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest

from pgharness.errors import HarnessError
from pgharness.sdk import manual
from pgharness.sdk.classes import Runnable
from pgharness.sdk.decorators import metric
from pgharness.sdk.manual import RunType, TrackedRun
from pgharness.sdk.scope import AsyncContext, Cancelled, Completed, Context, Failed, Scope, Services, current


class Opened:
    """A run that collects what it is told and how it ended."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.ends: list[tuple[str, str | None]] = []
        self.scope = Scope(
            run_id=7,
            run="triage/7",
            kind="trial",
            ordinal=0,
            attempt=1,
            emit=lambda kind, row: self.told.append((kind, row)),
            services=cast(Services, SimpleNamespace(is_cancelled=False)),
        )

    def end(self, status: Literal["completed", "failed", "cancelled"], reason: str | None = None) -> None:
        self.ends.append((status, reason))

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return [row for told, row in self.told if told == kind]


@pytest.fixture
def opened() -> Opened:
    return Opened()


def runnable(stages: list[str], **raised: BaseException) -> type[Runnable]:
    """Return a class that notes its stages and raises in those that are named."""

    def stage(name: str) -> Callable[[Any], str]:
        def method(self: Any) -> str:
            stages.append(name)
            if name in raised:
                raise raised[name]
            return f"{name}'s value"

        return method

    return type("Noted", (Runnable,), {name: stage(name) for name in ("prepare", "run", "score", "cleanup")})


def execute(kind: type[Runnable], opened: Opened) -> Any:
    return kind().execute(Context(opened.scope), {"rate": 1})


# -- stages -----------------------------------------------------------------------------------------------------------


def test_the_stages_follow_each_other_and_the_value_is_that_of_run(opened: Opened) -> None:
    stages: list[str] = []
    assert execute(runnable(stages), opened) == "run's value"
    assert stages == ["prepare", "run", "score", "cleanup"]


def test_only_run_has_to_be_written(opened: Opened) -> None:
    class Least(Runnable):
        def run(self) -> int:
            return 1

    class Nothing(Runnable):
        pass

    assert execute(Least, opened) == 1
    with pytest.raises(TypeError, match="run"):
        cast(Any, Nothing)()


def test_the_methods_have_the_config_and_tell_the_run_by_context_record_and_the_name_run(opened: Opened) -> None:
    class Sentiment(Runnable):
        ctx: Context

        def prepare(self) -> None:
            cast(Any, self.run).log_event("model_configured", {"model": "m"})

        def run(self) -> Any:
            self.ctx.log_llm_call("m", "good", "positive")
            self.run_record.log_metric("n", 1, "count")
            return self.config["rate"]

        def score(self) -> None:
            self.ctx.metric("accuracy", 0.9)

    assert execute(Sentiment, opened) == 1
    assert [(row["name"], row["value"]) for row in opened.rows("metric")] == [("n", 1), ("accuracy", 0.9)]
    assert opened.rows("llm_call")[0]["output"] == "positive"
    assert opened.rows("log")[0] == {"level": "info", "message": "model_configured", "data": {"event": {"model": "m"}}}


def test_without_a_model_the_config_is_a_dict_of_its_own(opened: Opened) -> None:
    class Plain(Runnable):
        def run(self) -> Any:
            return self.config

    scope = dataclasses.replace(opened.scope, config={"rate": 2})
    found = Plain().execute(Context(scope))
    assert found == {"rate": 2} and found is not scope.config


def test_run_stays_a_method_also_where_a_class_extends_another(opened: Opened) -> None:
    class First(Runnable):
        def run(self) -> int:
            return 1

    class Second(First):
        def run(self) -> int:
            return super().run() + 1

        def score(self) -> None:
            self.ctx.metric("again", self.run())

    assert execute(Second, opened) == 2
    assert opened.rows("metric")[0]["value"] == 2


def test_a_constructor_of_ones_own_needs_no_super(opened: Opened) -> None:
    class Own(Runnable):
        def __init__(self) -> None:
            self.x = 5

        def run(self) -> int:
            return self.x

    assert execute(Own, opened) == 5


# -- sync and async ---------------------------------------------------------------------------------------------------


async def test_one_coroutine_function_makes_the_class_async_and_the_others_may_stay_as_they_are(opened: Opened) -> None:
    stages = []

    class Mixed(Runnable):
        def prepare(self) -> None:
            stages.append("prepare")

        async def run(self) -> str:
            await asyncio.sleep(0)
            stages.append("run")
            return "done"

        @metric
        async def score(self) -> float:
            stages.append("score")
            return 1.0

        async def cleanup(self) -> None:
            await asyncio.sleep(0)
            stages.append("cleanup")

    assert Mixed.is_async()
    assert await Mixed().execute(AsyncContext(opened.scope)) == "done"
    assert stages == ["prepare", "run", "score", "cleanup"]


def test_a_sync_class_needs_no_event_loop(opened: Opened) -> None:
    kind = runnable([])
    assert not kind.is_async()
    assert execute(kind, opened) == "run's value"


def test_an_awaitable_from_what_is_no_coroutine_function_is_refused_after_cleanup(opened: Opened) -> None:
    cleaned = []

    class Odd(Runnable):
        def run(self) -> Any:
            return asyncio.sleep(0)

        def cleanup(self) -> None:
            cleaned.append(True)

    with pytest.raises(HarnessError, match=r"Odd\.run returned an awaitable") as caught:
        execute(Odd, opened)
    assert caught.value.hint == "Write it as: async def run(self)" and cleaned == [True]


async def test_cleanup_runs_and_may_wait_when_the_task_is_cancelled(opened: Opened) -> None:
    begun, cleaned = asyncio.Event(), []

    class Waiting(Runnable):
        async def run(self) -> None:
            begun.set()
            await asyncio.Event().wait()

        async def cleanup(self) -> None:
            await asyncio.sleep(0)
            cleaned.append(True)

    task = asyncio.create_task(Waiting().execute(AsyncContext(opened.scope)))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True]


# -- when a stage fails -----------------------------------------------------------------------------------------------

ENDINGS = [
    ValueError("no"),
    Cancelled("the run was cancelled"),
    Failed("not good enough"),
    Completed(),
    KeyboardInterrupt(),
    SystemExit(1),
]


@pytest.mark.parametrize("problem", ENDINGS, ids=repr)
@pytest.mark.parametrize("where", ["prepare", "run", "score"])
def test_cleanup_runs_whatever_ends_a_stage_and_the_stages_between_do_not(
    opened: Opened, where: str, problem: BaseException
) -> None:
    stages: list[str] = []
    with pytest.raises(type(problem)) as caught:
        execute(runnable(stages, **{where: problem}), opened)
    assert caught.value is problem
    before = {"prepare": [], "run": ["prepare"], "score": ["prepare", "run"]}
    assert stages == [*before[where], where, "cleanup"]


def test_a_failing_cleanup_fails_the_run_and_is_logged(opened: Opened) -> None:
    problem = OSError("disk full")
    with pytest.raises(OSError) as caught:
        execute(runnable([], cleanup=problem), opened)
    assert caught.value is problem
    (line,) = opened.rows("log")
    assert (line["level"], line["message"]) == ("error", "cleanup failed: OSError: disk full")
    assert "Traceback" in line["data"]["traceback"]


@pytest.mark.parametrize("problem", [error for error in ENDINGS if not isinstance(error, Completed)], ids=repr)
@pytest.mark.parametrize("later", [OSError("disk full"), Cancelled("again"), KeyboardInterrupt()], ids=repr)
def test_a_failing_cleanup_never_hides_what_went_wrong_before(
    opened: Opened, problem: BaseException, later: BaseException
) -> None:
    problem = type(problem)(*problem.args)  # notes stay on an exception
    with pytest.raises(type(problem)) as caught:
        execute(runnable([], run=problem, cleanup=later), opened)
    assert caught.value is problem
    assert "Cleanup failed too" in problem.__notes__[0] and type(later).__name__ in problem.__notes__[0]
    assert opened.rows("log")[0]["level"] == "error"


def test_a_run_that_called_itself_complete_fails_with_its_cleanup(opened: Opened) -> None:
    with pytest.raises(OSError):
        execute(runnable([], run=Completed(), cleanup=OSError("disk full")), opened)


def test_a_cleanup_that_says_complete_completes_no_failed_run(opened: Opened) -> None:
    with pytest.raises(ValueError):
        execute(runnable([], run=ValueError("no"), cleanup=Completed()), opened)
    with pytest.raises(Completed):
        execute(runnable([], cleanup=Completed()), opened)


# -- runs by hand -----------------------------------------------------------------------------------------------------


def test_a_tracked_run_tells_all_that_a_context_tells(opened: Opened) -> None:
    run = TrackedRun(opened)
    run.log("warn", "careful", n=1)
    run.log_event("loaded", {"message": "any key", "level": 3})
    run.log_metric("loss", 0.5, "loss")
    run.log_llm_call("m", {"q": 1}, "a", 150.0)
    run.result("best", [1])
    with run.timer("work"):
        pass
    run.artifact("a.txt", "text")
    run.progress(1, 2, "half")
    run.finish()
    assert [kind for kind, _ in opened.told] == [
        "log",
        "log",
        "metric",
        "llm_call",
        "result",
        "timing",
        "artifact",
        "progress",
    ]
    assert (run.run_id, run.name, opened.ends) == (7, "triage/7", [("completed", None)])


def test_the_first_end_of_a_run_counts_and_nothing_is_told_after_it(opened: Opened) -> None:
    run = TrackedRun(opened)
    run.fail("bad data")
    run.finish()
    run.fail("again")
    assert opened.ends == [("failed", "bad data")]
    with pytest.raises(HarnessError, match="has ended: it is failed"):
        run.log_metric("x", 1)


def test_a_block_completes_its_run_and_decorators_within_it_tell_it(opened: Opened) -> None:
    with TrackedRun(opened) as run:
        assert current() is opened.scope
        metric("x")(lambda: 1)()
        run.result("k", 1)
    assert current() is None and opened.ends == [("completed", None)]
    assert [kind for kind, _ in opened.told] == ["metric", "result"]


@pytest.mark.parametrize(
    ("problem", "end"),
    [
        (ValueError("no"), ("failed", "ValueError: no")),
        (KeyboardInterrupt(), ("failed", "KeyboardInterrupt")),
        (Cancelled("late"), ("cancelled", "pgharness.sdk.scope.Cancelled: late")),
        (Completed(), ("completed", None)),
    ],
    ids=repr,
)
def test_what_a_block_raises_ends_its_run_and_passes_on(
    opened: Opened, problem: BaseException, end: tuple[str, str | None]
) -> None:
    with pytest.raises(type(problem)) as caught, TrackedRun(opened):
        raise problem
    assert caught.value is problem and opened.ends == [end]


def test_a_run_that_cannot_be_ended_hides_nothing(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no database")

    monkeypatch.setattr(opened, "end", refuse)
    with pytest.raises(ValueError) as caught, TrackedRun(opened):
        raise ValueError("no")
    assert caught.value.__notes__ == ["The run could not be ended either: OSError('no database')"]


def test_run_types_are_words() -> None:
    assert [RunType.TRIAL, RunType.MILESTONE] == ["trial", "milestone"]
    assert manual.RunType("milestone") is RunType.MILESTONE
