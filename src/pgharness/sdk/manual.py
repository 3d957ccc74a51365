"""Runs by hand: for code that is not an experiment's function, such as a notebook or a training loop of its own.

    tracker = Tracker("tuning", config={"rate": 0.1})
    with tracker.create_run(RunType.MILESTONE, run_id="v1") as run:
        run.log_metric("loss", 0.2)

The block ends the run: completed, or failed when it raises. Within the block the decorators tell this run too. Without
`with`, say `finish()` or `fail(reason)`; the first of these counts, and nothing can be told afterwards.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pydantic import BaseModel

from pgharness.errors import HarnessError
from pgharness.sdk.scope import AsyncContext, Cancelled, Completed, Context, Scope, entered


class RunType(StrEnum):
    """What a run is for."""

    TRIAL = "trial"
    MILESTONE = "milestone"


class RunRecord:
    """What can be told about a run, under the names of the manual interface."""

    def __init__(self, context: Context | AsyncContext) -> None:
        self._context = context

    def _told(self) -> Context | AsyncContext:
        return self._context

    def log(self, level: Literal["debug", "info", "warning", "warn", "error"], message: str, **data: Any) -> None:
        """Add a line to the run's log."""
        self._told().log(level, message, **data)

    def log_event(self, name: str, data: Any = None) -> None:
        """Add an event to the run's log: a line that is its name, with `data` as `event`."""
        self._told().log("info", name, event=data)

    def log_metric(self, name: str, value: float, metric_type: str = "") -> None:
        """Record a number under a name."""
        self._told().metric(name, value, metric_type)

    def log_llm_call(self, model: str, input: Any, output: Any, duration_ms: float | None = None) -> None:
        """Record a request to a model that was made without the harness."""
        self._told().log_llm_call(model, input, output, duration_ms)

    def result(self, key: str, value: Any) -> None:
        """Record a result under a key; the newest of a key counts."""
        self._told().result(key, value)

    def timer(self, operation: str) -> AbstractContextManager[None]:
        """Record how long the block takes."""
        return self._told().timer(operation)

    def artifact(self, name: str, content: bytes | str | Path, *, media_type: str | None = None) -> None:
        """Keep a file with the run: bytes, a text, or the path of a file."""
        self._told().artifact(name, content, media_type=media_type)

    def progress(self, current: float, total: float | None = None, message: str | None = None) -> None:
        """Say how far the run is."""
        self._told().progress(current, total, message)


class OpenRun(Protocol):
    """A run that was started in this process and waits to be ended."""

    @property
    def scope(self) -> Scope: ...

    def end(self, status: Literal["completed", "failed", "cancelled"], reason: str | None = None) -> None: ...


class TrackedRun(RunRecord):
    """A run in progress, until it is finished or failed."""

    def __init__(self, opened: OpenRun) -> None:
        super().__init__(Context(opened.scope))
        self._opened = opened
        self._status: str | None = None
        self._entered = ExitStack()

    @property
    def run_id(self) -> int:
        """The run's id."""
        return self._opened.scope.run_id

    @property
    def name(self) -> str:
        """The run's name."""
        return self._opened.scope.run

    def _told(self) -> Context | AsyncContext:
        if self._status:
            raise HarnessError(f"run {self.name} has ended: it is {self._status}", hint="Create another run.")
        return self._context

    def finish(self) -> None:
        """End the run as completed; does nothing when it has ended."""
        self._end("completed", None)

    def fail(self, reason: str) -> None:
        """End the run as failed, for this reason; does nothing when it has ended."""
        self._end("failed", reason)

    def _end(self, status: Literal["completed", "failed", "cancelled"], reason: str | None) -> None:
        if not self._status:
            self._status = status
            self._opened.end(status, reason)

    def __enter__(self) -> Self:
        self._entered.enter_context(entered(self._opened.scope))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        if error is None or isinstance(error, Completed):
            return self.finish()
        try:
            reason = "".join(traceback.format_exception_only(error)).strip()
            self._end("cancelled" if isinstance(error, Cancelled) else "failed", reason)
        except Exception as later:  # what went wrong first is what the caller has to see
            error.add_note(f"The run could not be ended either: {later!r}")


class Tracker:
    """An experiment by name, whose runs are made by hand; it is registered with its first run."""

    def __init__(
        self,
        experiment_name: str,
        instance: str | None = None,
        config: BaseModel | Mapping[str, Any] | None = None,
        database_url: str | None = None,
    ) -> None:
        self.experiment_name = experiment_name
        self.instance = instance
        self.config = config
        self.database_url = database_url

    def create_run(self, run_type: RunType | str = RunType.TRIAL, run_id: str | None = None) -> TrackedRun:
        """Start a run; `run_id` is its name, for which the database finds one otherwise."""
        from pgharness.sdk import direct  # takes a database and much else, which decorators have no need of

        try:
            kind = RunType(run_type)
        except ValueError:
            raise HarnessError(f"run type {run_type!r} is unknown", hint="It is trial or milestone.") from None
        opened = direct.open_run(
            self.experiment_name,
            instance=self.instance,
            config=self.config.model_dump(mode="json") if isinstance(self.config, BaseModel) else self.config,
            kind=kind.value,
            run_name=run_id,
            database_url=self.database_url,
        )
        return TrackedRun(opened)
