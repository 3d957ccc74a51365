"""Experiments as classes: prepare, run, score, clean up.

    class Sentiment(Runnable):
        config: Config                        # a pydantic model, or a dict where there is none
        ctx: Context                          # AsyncContext where a method is a coroutine function

        def prepare(self) -> None: ...        # optional, as are score and cleanup
        def run(self) -> object: ...
        def score(self) -> None:
            self.ctx.metric("accuracy", 0.9)
        def cleanup(self) -> None: ...

Each method may be a coroutine function; then all of them run in the event loop, and none may block it. Whatever ends
the run, be it a cancellation or an interrupt in `prepare`, `cleanup` runs. When it fails, so does the run, but it never
hides what went wrong before: that exception is raised, and cleanup's is a note on it and a line in the log.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from pgharness.errors import HarnessError
from pgharness.sdk.manual import RunRecord
from pgharness.sdk.scope import AsyncContext, Completed, Context

logger = logging.getLogger(__name__)
STAGES = ("prepare", "run", "score", "cleanup")


class Runnable(ABC):
    """An experiment as a class; one object is one execution.

    `config` is the validated model, or the instance's configuration as a dict where the class names none. `ctx` is the
    context that functions are handed. `run_record` tells the same under the names of the manual interface
    (log_event, log_metric, ...), and so does `self.run`, which stays the method that it is.
    """

    config: Any
    ctx: Context | AsyncContext
    run_record: RunRecord

    def prepare(self) -> Any:
        """Set up what the run needs."""
        return None

    @abstractmethod
    def run(self) -> Any:
        """Do the experiment; what it returns is the result."""

    def score(self) -> Any:
        """Evaluate what `run` did, when that succeeded."""
        return None

    def cleanup(self) -> Any:
        """Give back what `prepare` took, even if it came to nothing: it may have been cut short."""
        return None

    @classmethod
    def is_async(cls) -> bool:
        """Return whether any of the methods is a coroutine function."""
        return any(inspect.iscoroutinefunction(getattr(cls, stage)) for stage in STAGES)

    def execute(self, ctx: Context | AsyncContext, config: Any = None) -> Any:
        """Go through all stages and return what `run` returned; where the class is async, a coroutine that does."""
        self.ctx, self.run_record = ctx, RunRecord(ctx)
        self.config = dict(ctx.config) if config is None else config
        vars(self)["run"] = _RunMethod(ctx, self.run)
        stages = self._stages()
        if self.is_async():
            return stages
        try:
            stages.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("nothing was awaited")

    async def _stages(self) -> Any:
        try:
            await self._stage("prepare")
            value = await self._stage("run")
            await self._stage("score")
        except BaseException as earlier:
            await self._clean_up(earlier)
            raise
        await self._clean_up(None)
        return value

    async def _stage(self, name: str) -> Any:
        value = getattr(self, name)()
        if inspect.isawaitable(value) and not self.is_async():
            if inspect.iscoroutine(value):
                value.close()
            raise HarnessError(
                f"{type(self).__name__}.{name} returned an awaitable", hint=f"Write it as: async def {name}(self)"
            )
        return await value if inspect.isawaitable(value) else value

    async def _clean_up(self, earlier: BaseException | None) -> None:
        """Call `cleanup`; raise what it raises unless something went wrong earlier, which then has it as a note."""
        try:
            await self._stage("cleanup")
        except Completed:
            if earlier is None:
                raise
        except BaseException as later:
            trace = "".join(traceback.format_exception(later, chain=False)).strip()
            is_hidden = earlier is not None and not isinstance(earlier, Completed)
            if earlier is not None and is_hidden:
                earlier.add_note(f"Cleanup failed too:\n{trace}")
            try:
                self.ctx.error(f"cleanup failed: {type(later).__name__}: {later}", traceback=trace)
            except Exception:
                logger.exception("the failure of a cleanup could not be logged")
            if not is_hidden:
                raise


class _RunMethod(RunRecord):
    """A runnable's method `run`, by which the run can be told things too."""

    def __init__(self, context: Context | AsyncContext, method: Callable[..., Any]) -> None:
        super().__init__(context)
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs)
