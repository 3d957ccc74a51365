"""The queue: Procrastinate carries slices to workers; our rows hold everything else.

The one importer of procrastinate. A job's arguments are a Slice. Jobs are put back by our own sweep, judged by our own
workers' heartbeats, so Procrastinate's pruning of workers is kept out of the way. Its connection to the database is
made to outlive the database: a restart pauses fetching and ends nothing. It needs no session of its own either: names
carry their schema, and notifications come over whatever connection they are told to.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import Any, LiteralString, TypeVar

from procrastinate import App, BaseRetryStrategy, JobContext, PsycopgConnector, RetryDecision
from procrastinate import exceptions as queue_errors
from procrastinate.connector import Notify
from procrastinate.jobs import Job, Status
from procrastinate.manager import JobManager

from pgharness.database import TRANSIENT, Database, listen
from pgharness.errors import HarnessError
from pgharness.execution import Engine, HandedBack, Slice
from pgharness.sdk.hosts import Hosts

logger = logging.getLogger(__name__)
CODE_QUEUE = "task"
QUEUES = ("note", "grade", CODE_QUEUE)
_POLLING_SECONDS = 1.0
_PEEKING_SECONDS = 0.05
_NEVER_SECONDS = 10 * 365 * 86400.0
_T = TypeVar("_T")


class _Again(BaseRetryStrategy):
    """Every slice that did not end comes back: at once when handed back, a little later after an error."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision:
        if isinstance(exception, HandedBack | asyncio.CancelledError):
            return RetryDecision(retry_in={"seconds": 0})
        return RetryDecision(retry_in={"seconds": min(5 * (job.attempts + 1), 60)})


class _Connector(PsycopgConnector):
    """Procrastinate's connector without state in any session, so that a pooler may pool transactions."""

    def __init__(self, listen_url: str | None) -> None:
        super().__init__()
        self.listen_url = listen_url

    async def execute_query_async(self, query: LiteralString, **arguments: Any) -> None:
        await super().execute_query_async(qualified(query), **arguments)

    async def execute_query_one_async(self, query: LiteralString, **arguments: Any) -> dict[str, Any]:
        found: dict[str, Any] = await super().execute_query_one_async(qualified(query), **arguments)
        return found

    async def execute_query_all_async(self, query: LiteralString, **arguments: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await super().execute_query_all_async(qualified(query), **arguments)
        return found

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        assert self.listen_url is not None
        async for channel, payload in listen(self.listen_url, channels):
            await on_notification(channel=channel, payload=payload)


@cache
def qualified(query: LiteralString) -> LiteralString:
    """Return a query of Procrastinate's with the schema in front of the queue's tables, types and functions."""
    return re.sub(r"(?<![\w.])(?=procrastinate_)", "procrastinate.", query)


class _Jobs(JobManager):
    """Procrastinate's job manager, fetching only when the engine has room and patient with the database."""

    def __init__(self, connector: _Connector, queue: Queue) -> None:
        super().__init__(connector)
        self._queue = queue

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        try:
            while not await self._queue.engine.wait_for_room():
                found = await self._queue.database.call("next_run", queues=list(queues or QUEUES))
                if self._queue.engine.welcomes(found[0]["next_run"]):
                    break
                await asyncio.sleep(_PEEKING_SECONDS)
            if self._queue.is_stopping:
                return None
            while True:
                if not (narrowed := self._queue.engine.narrowed):
                    return await super().fetch_job(queues, worker_id)
                row = await self._queue.database.call(
                    "take_job", queues=list(queues or QUEUES), queue_worker_id=worker_id, **narrowed
                )
                if row or not isinstance(self._queue.engine, Hosts):
                    return Job.from_row(row[0]) if row else None
                # what is narrowed widens when a slice ends, which tells nobody else
                await self._queue.engine.wait_for_change(_POLLING_SECONDS)
                if self._queue.is_stopping:
                    return None
        except (queue_errors.ConnectorException, *TRANSIENT) as exc:
            logger.warning("no job could be fetched: %s", _reason(exc))
            await asyncio.sleep(0.5 * (0.5 + random.random()))
            return None

    async def finish_job(self, job: Job, status: Status, delete_job: bool) -> None:
        await self._patiently(lambda: super(_Jobs, self).finish_job(job, status, delete_job))

    async def retry_job(self, job: Job, *args: Any, **kwargs: Any) -> None:
        await self._patiently(lambda: super(_Jobs, self).retry_job(job, *args, **kwargs))

    async def register_worker(self) -> int:
        queue_worker_id = await super().register_worker()
        await self._queue.database.call(
            "attach_queue_worker", worker_id=self._queue.worker_id, queue_worker_id=queue_worker_id
        )
        return queue_worker_id

    async def update_heartbeat(self, worker_id: int) -> None:
        """Do nothing: `pgharness.heartbeat` is the sign of life that counts."""

    async def list_jobs_to_abort_async(self, queue: str | None = None) -> Iterable[int]:
        """Return nothing: runs are cancelled by their state, not job by job."""
        return []

    async def listen_for_jobs(self, *, on_notification: Callable[..., Awaitable[None]], **kwargs: Any) -> None:
        async def notified(**told: Any) -> None:
            self._queue.engine.hear_news()
            await on_notification(**told)

        while not self._queue.is_stopping:
            if self._queue.listen_url is not None:
                try:
                    await super().listen_for_jobs(on_notification=notified, **kwargs)
                except (HarnessError, queue_errors.ConnectorException, *TRANSIENT) as exc:
                    logger.warning("no notifications for the moment, polling instead: %s", _reason(exc))
            await asyncio.sleep(_POLLING_SECONDS)
            self._queue.engine.hear_news()  # for all we know

    async def _patiently(self, write: Callable[[], Awaitable[_T]]) -> _T | None:
        delay = 0.1
        while True:
            try:
                return await write()
            except queue_errors.ConnectorException as exc:
                if self._queue.is_stopping or not isinstance(exc.__cause__, TRANSIENT):
                    # in one line: a sweep that took us for lost has put the job back, and every open slice says so
                    logger.warning("the end of a job could not be written: %s", str(_reason(exc)).splitlines()[0])
                    return None
                await asyncio.sleep(delay)
                delay = min(delay * 2, 5.0)


class Queue:
    """This process's end of the queue: takes slices for the engine until it is stopped."""

    def __init__(self, database: Database, engine: Engine | Hosts, *, worker_id: int, listen_url: str | None) -> None:
        """Prepare to take slices; without a `listen_url`, new work is asked for once a second."""
        self.database = database
        self.engine = engine
        self.worker_id = worker_id
        self.listen_url = listen_url
        self.is_stopping = False
        self.open_jobs: set[int] = set()
        self._working: asyncio.Task[None] | None = None
        connector = _Connector(listen_url)
        self._app = App(connector=connector)
        self._app.job_manager = _Jobs(connector, self)
        self._app.task(name="pgharness.slice", pass_context=True, retry=_Again())(self._run_slice)

    async def run(self, queues: Iterable[str]) -> None:
        """Take slices until `stop`, then wait for those that are open."""
        async with self._app.open_async(self.database.pool):
            while not self.is_stopping:
                self._working = asyncio.create_task(
                    self._app.run_worker_async(
                        queues=list(queues),
                        # the engine says when it has room; this bound only has to be far beyond that
                        concurrency=3 * self.engine.concurrency + 100,
                        fetch_job_polling_interval=_POLLING_SECONDS,
                        abort_job_polling_interval=_NEVER_SECONDS,
                        update_heartbeat_interval=_NEVER_SECONDS,
                        stalled_worker_timeout=_NEVER_SECONDS,
                        delete_jobs="always",
                        install_signal_handlers=False,
                    )
                )
                try:
                    await asyncio.wait([self._working])
                    if not self._working.cancelled():
                        self._working.result()
                except (queue_errors.ConnectorException, HarnessError, *TRANSIENT) as exc:
                    logger.warning("the queue cannot be reached: %s", _reason(exc))
                    await asyncio.sleep(1.0)

    def stop(self) -> None:
        """Take no more slices; `run` returns when the open ones have ended."""
        self.is_stopping = True
        self.engine.drain()
        if self._working is not None:
            self._working.cancel()

    async def _run_slice(self, context: JobContext, /, **args: Any) -> None:
        job_id = context.job.id
        assert job_id is not None
        self.open_jobs.add(job_id)
        try:
            await self.engine.run_slice(Slice(**args, job_id=job_id))
        finally:
            self.open_jobs.discard(job_id)


def _reason(exc: BaseException) -> BaseException:
    return exc.__cause__ or exc  # the queue's own errors say no more than "Database error"
