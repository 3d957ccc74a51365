"""Runs of code in this very process, without a worker: the same rows, and the same limits by the database.

The process joins the queue for its own run alone, so workers that have the code may share in the items of its maps;
and when it dies, they go on with what it left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from psycopg import Connection

from pgharness import __version__, database, schema
from pgharness.database import TRANSIENT, Database, Line, Row
from pgharness.embedded import EmbeddedPostgres
from pgharness.environment import environment
from pgharness.errors import HarnessError, SchemaOutOfDate, WrongState
from pgharness.execution import Slice
from pgharness.gateway import Gateway
from pgharness.sdk.capture import Capture
from pgharness.sdk.definition import Experiment
from pgharness.sdk.journal import Journal
from pgharness.sdk.loading import module_name
from pgharness.sdk.scope import Scope, threads_inherit
from pgharness.sdk.session import OpenSlice, Session, full_depths
from pgharness.settings import Settings

logger = logging.getLogger(__name__)
Kind = Literal["trial", "milestone"]
_CONCURRENCY = 32
_POLL_SECONDS = 0.05
_BEAT_SECONDS = 1.0
_FLUSH_SECONDS = 30.0
_CLEANUP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: its state and why, and what its function returned."""

    run_id: int
    run: str
    status: str
    reason: str | None
    result: Any


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[str]:
    """Yield the connection string of the server to use, with the schema checked; the embedded one is started."""
    with contextlib.ExitStack() as stack:
        url = settings.database_url
        if url is None:
            embedded = EmbeddedPostgres()
            stack.callback(embedded.close)
            url = embedded.ensure()
        with database.connect(url) as connection:
            try:
                schema.verify(connection)
            except SchemaOutOfDate:
                if settings.database_url is not None:
                    raise
                schema.upgrade(connection)
        yield url


def run_here(experiment: Experiment, *, argv: Sequence[str] | None = None) -> Any:
    """Run an experiment in this process and return what it returned; with `argv`, as a program that prints how it went.

    Raises WrongState when the run fails; a program ends with status 5 instead.
    """
    options = _options(experiment, argv)
    if argv is not None and experiment.file is not None:
        experiment.module = module_name(experiment.file, experiment.root)  # as workers know it, who may go on with it
    config: dict[str, Any] = {}
    for key, _, text in (setting.partition("=") for setting in options.set):
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        config[key] = text
    settings = Settings.from_env()
    with opened(settings) as url:
        outcome = execute(
            experiment,
            url=url,
            settings=settings,
            config=config or None,
            kind="milestone" if options.milestone else "trial",
            run_name=options.run_id,
            response_cache=options.cache,
        )
    if argv is not None:
        print(
            f"run {outcome.run_id} ({outcome.run}) is {outcome.status}" + (f": {outcome.reason}" * bool(outcome.reason))
        )
        if outcome.status != "completed":
            raise SystemExit(5)
    elif outcome.status != "completed":
        raise WrongState(f"run {outcome.run} is {outcome.status}: {outcome.reason}")
    return outcome.result


def _options(experiment: Experiment, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=experiment.description or None)
    parser.add_argument("--milestone", action="store_true", help="keep the run, with its code and environment")
    parser.add_argument("--run-id", help="name of a milestone run")
    modes = ("off", "read", "write", "replay")
    parser.add_argument("--cache", choices=modes, help="whether models are asked, or the response cache")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value of the configuration")
    options = parser.parse_args(list(argv or ()))
    if options.run_id and not options.milestone:
        parser.error("--run-id is for milestone runs: add --milestone")
    return options


def execute(
    experiment: Experiment,
    *,
    url: str,
    settings: Settings,
    instance: str | None = None,
    config: Mapping[str, Any] | None = None,
    kind: Kind = "trial",
    run_name: str | None = None,
    response_cache: str | None = None,
    is_echoed: bool = True,
) -> Outcome:
    """Run an experiment in this process: register it, configure its instance, start a run, and do its tasks.

    `instance` is named like the experiment unless it is given; `config` becomes its configuration;
    `response_cache` (off, read, write, replay) is the instance's unless it is given. What the code prints
    becomes its log, and is printed too when `is_echoed`.
    """
    registration = experiment.registration()
    with database.connect(url, autocommit=False) as connection:  # at once: no worker gets its function before us
        database.call(connection, "register_experiment", **registration)
        name = instance or experiment.name
        given = {} if config is None else {"config": dict(config)}
        found = database.call(connection, "configure_instance", instance=name, experiment=experiment.name, **given)
        experiment.config(found[0]["config"])  # which may be older than the schema
        database.call(connection, "load_code", run_id=0)  # a role that may not work is told before a run is started
        started = {"instance": name, "kind": kind, "name": run_name, "response_cache": response_cache}
        run_id: int = database.call(connection, "start_run", **started)[0]["run_id"]
        ids = _joined(connection, experiment.name)
        taken = database.call(connection, "take_job", queues=["task"], queue_worker_id=ids[1], only_runs=[run_id])
    _Runner(experiment, url, settings, run_id, ids, taken, is_echoed=is_echoed).work()
    with database.connect(url) as connection:
        run = database.rows(connection, "runs", id=run_id)[0]
        task = database.rows(connection, "tasks", run_id=run_id, ordinal=0)[0]
    return Outcome(run_id, run["name"], run["status"], run["reason"], task["result"])


class _Runner:
    """A worker for one run, in this process."""

    def __init__(
        self,
        experiment: Experiment,
        url: str,
        settings: Settings,
        run_id: int,
        ids: tuple[int, int],
        taken: list[Row],
        *,
        is_echoed: bool,
    ) -> None:
        """Prepare to work on a run under the ids that `_joined` gave, beginning with the job that was taken."""
        self._ids = ids
        self._taken = taken
        self._experiment = experiment
        self._url = url
        self._settings = settings
        self._run_id = run_id
        self._is_echoed = is_echoed
        self._is_over = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Session | None = None
        self._open: dict[int, OpenSlice] = {}  # by its job
        self._is_stopping = threading.Event()
        self._has_ended = threading.Event()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Work until the run has ended, in a thread: signals arrive in the caller's, whatever the code does meanwhile.

        Interrupted from the keyboard, it cancels the run; interrupted again, it ends the process.
        """
        thread = threading.Thread(target=self._run_in_thread, name="pgharness run", daemon=True)
        thread.start()
        is_cancelled = False
        try:
            while not self._has_ended.wait(0.2):
                pass
        except KeyboardInterrupt:
            while not self._has_ended.is_set():
                try:
                    if not is_cancelled:
                        is_cancelled = True
                        self._cancel()
                    self._has_ended.wait(0.2)
                except KeyboardInterrupt:
                    os._exit(130)
        except BaseException:
            self._end_soon()  # what it has not done comes back, for workers to do
            self._has_ended.wait(_CLEANUP_SECONDS)
            raise
        if self._error is not None:
            raise self._error

    def _run_in_thread(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as exc:
            self._error = exc
        finally:
            self._has_ended.set()

    def _cancel(self) -> None:
        with contextlib.suppress(HarnessError, *TRANSIENT), database.connect(self._url) as connection:
            database.call(connection, "cancel_run", run_id=self._run_id, reason="interrupted from the keyboard")
        self._end_soon()

    def _end_soon(self) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._end)

    async def _run(self) -> None:
        pool = Database(self._url, application_name="pgharness run")
        async with pool.opened():
            worker_id, queue_worker_id = self._ids
            run = (await pool.call("load_code", run_id=self._run_id))[0]["load_code"]
            self._loop = asyncio.get_running_loop()

            def on_state(_: int, status: str, epoch: int) -> None:
                if status != "running":
                    self._end_soon()

            journal = Journal(Line(self._url, application_name="pgharness run"), worker_id, on_state)
            gateway = Gateway(
                cache_root=self._settings.cache_root,
                allows_code=self._settings.allows_code,
                plugin_seconds=self._settings.plugin_seconds,
                database=pool,
            )
            session = self._session = Session(
                pool,
                gateway,
                journal,
                worker_id=worker_id,
                run=run,
                experiment=self._experiment,
                concurrency=_CONCURRENCY,
            )
            version = await pool.call("register_experiment", **self._experiment.registration(), becomes_current=False)
            await pool.call("start_version", run_id=self._run_id, version_id=version[0]["register_experiment"])
            capture = Capture(lambda: session.first_scope, is_echoed=self._is_echoed)
            beating = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
            beating.start()
            try:
                with capture.taken_over(), threads_inherit():
                    await self._work(pool, queue_worker_id)
            finally:
                await session.close()
                await gateway.aclose()
                await asyncio.to_thread(journal.close)
                self._is_stopping.set()
                await asyncio.to_thread(beating.join)
                with contextlib.suppress(HarnessError, *TRANSIENT):
                    await pool.call(
                        "heartbeat", worker_id=worker_id, in_flight={}, state="stopped", runs=[], jobs=list(self._open)
                    )

    def _end(self) -> None:
        self._is_over.set()
        if self._session is not None:
            self._session.interrupt()

    async def _work(self, pool: Database, queue_worker_id: int) -> None:
        assert self._session is not None
        work: set[asyncio.Task[None]] = set()
        rows = self._taken
        while True:
            for job in rows:
                self._open[job["id"]] = OpenSlice.of(Slice(**job["args"]))
                task = asyncio.create_task(self._do(pool, job))
                work.add(task)
                task.add_done_callback(work.discard)
            if not rows:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_SECONDS):
                        await self._is_over.wait()
            if self._is_over.is_set():
                break
            rows = await pool.persist(
                "take_job",
                queues=["task"],
                queue_worker_id=queue_worker_id,
                only_runs=[self._run_id],
                except_depths=full_depths(self._open.values(), _CONCURRENCY),
            )
        if work:
            await asyncio.wait(work, timeout=_CLEANUP_SECONDS)

    async def _do(self, pool: Database, job: Row) -> None:
        assert self._session is not None
        try:
            await self._session.run_slice(job["args"], partial(setattr, self._open[job["id"]], "left"))
        except HarnessError as exc:
            logger.error("a slice was left undone: %s", exc)
        finally:
            await pool.persist("end_slice", job_id=job["id"])
            del self._open[job["id"]]

    def _keep_beating(self) -> None:
        """Show life once a second, in a thread of its own: code may keep the loop busy."""
        line = Line(self._url, application_name="pgharness run")
        while not self._is_stopping.is_set():
            with contextlib.suppress(HarnessError, *TRANSIENT):
                states = line.call(
                    "heartbeat",
                    worker_id=self._ids[0],
                    in_flight={},
                    state="running",
                    runs=[self._run_id],
                    jobs=list(self._open),
                )
                line.call("expire_runs")
                if states[0]["status"] != "running":
                    self._end_soon()
            self._is_stopping.wait(_BEAT_SECONDS)
        line.close()


def _joined(connection: Connection[Any], experiment: str) -> tuple[int, int]:
    """Register this process as a worker, with the queue too; return both of its ids."""
    worker_id: int = database.call(connection, "register_worker", **_worker())[0]["register_worker"]
    queue_worker_id: int = database.call(connection, "join_queue", worker_id=worker_id)[0]["join_queue"]
    database.call(connection, "serve_experiments", worker_id=worker_id, experiments=[experiment])
    return worker_id, queue_worker_id


def _worker() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": __version__,
        "queues": ["task"],
        "concurrency": _CONCURRENCY,
        "environment": environment(),
    }


# -- by hand


class OpenRun:
    """A run whose code is not called by us: what it tells is recorded until it is ended."""

    def __init__(self, url: str, run_id: int, stack: contextlib.ExitStack) -> None:
        self._line = Line(url, application_name="pgharness run")
        self._stack = stack
        self._run_id = run_id
        self._stopped = threading.Event()
        self._worker_id: int = self._line.call("register_worker", **_worker())[0]["register_worker"]
        run = self._line.call("load_code", run_id=run_id)[0]["load_code"]
        self._line.call("serve_experiments", worker_id=self._worker_id, experiments=[run["experiment"]])
        slice = json.dumps({"run_id": run_id, "epoch": run["epoch"], "kind": "task", "ordinals": [0]})
        task = self._line.call("load_tasks", worker_id=self._worker_id, slice=slice)[0]
        self._attempt: int = task["attempt"]
        self._journal = Journal(Line(url, application_name="pgharness run"), self._worker_id, lambda *_: None)
        self.scope = Scope(
            run_id=run_id,
            run=run["run"],
            kind=run["kind"],
            ordinal=0,
            attempt=self._attempt,
            emit=lambda kind, row: self._journal.tell(run_id, 0, self._attempt, kind, row),
            services=_NoServices(),
            config=run["config"],
            seed=run["seed"],
        )
        self._beating = threading.Thread(target=self._keep_beating, args=(url,), daemon=True)
        self._beating.start()

    def _keep_beating(self, url: str) -> None:
        line = Line(url, application_name="pgharness run")
        while not self._stopped.is_set():
            with contextlib.suppress(HarnessError, *TRANSIENT):
                line.call("heartbeat", worker_id=self._worker_id, in_flight={}, state="running", runs=[], jobs=[])
            self._stopped.wait(_BEAT_SECONDS)
        line.close()

    def end(self, status: str, reason: str | None = None) -> None:
        """End the run: completed, failed or cancelled."""
        if not self._journal.flush(_FLUSH_SECONDS):
            raise HarnessError("what the run told could not be written: the database does not answer")
        self._journal.close()
        if status == "cancelled":
            self._line.call("cancel_run", run_id=self._run_id, reason=reason or "cancelled")
        else:
            outcome = {"status": "succeeded" if status == "completed" else "failed", "error": reason, "is_final": True}
            rows = [outcome | {"ordinal": 0, "attempt": self._attempt}]
            self._line.call("record_tasks", worker_id=self._worker_id, run_id=self._run_id, outcomes=json.dumps(rows))
        self._stopped.set()
        self._line.call("heartbeat", worker_id=self._worker_id, in_flight={}, state="stopped", runs=[], jobs=[])
        self._line.close()
        self._stack.close()


class _NoServices:
    """What a run that nobody executes cannot have done."""

    is_cancelled = False

    async def map(self, *_: Any, **__: Any) -> list[Any]:
        raise HarnessError("a run that is tracked by hand has no map", hint="Use @experiment for durable items.")

    async def complete(self, *_: Any, **__: Any) -> Any:
        raise HarnessError(
            "a run that is tracked by hand asks no models", hint="Use @experiment and ctx.complete_chat."
        )

    def wait(self, work: Any) -> Any:
        return asyncio.run(work)


def open_run(
    name: str,
    *,
    instance: str | None = None,
    config: Mapping[str, Any] | None = None,
    kind: Kind = "trial",
    run_name: str | None = None,
    database_url: str | None = None,
) -> OpenRun:
    """Start a run that is tracked by hand: an experiment of this name is made where there is none."""
    settings = Settings.from_env(database_url=database_url)
    stack = contextlib.ExitStack()
    try:
        url = stack.enter_context(opened(settings))
        with database.connect(url) as connection:
            known = database.rows(connection, "experiments", name=name, kind="code")
            if not known:
                database.call(
                    connection,
                    "register_experiment",
                    name=name,
                    description="Tracked by hand.",
                    module="",
                    function="",
                    digest="",
                    source="",
                    config_schema={"type": "object"},
                )
            given = {} if config is None else {"config": dict(config)}
            database.call(connection, "configure_instance", instance=instance or name, experiment=name, **given)
            started = database.call(connection, "start_run", instance=instance or name, kind=kind, name=run_name)
        return OpenRun(url, started[0]["run_id"], stack)
    except BaseException:
        stack.close()
        raise
