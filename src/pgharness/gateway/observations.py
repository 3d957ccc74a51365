"""Observations: how long models took lately, for hedges to choose their delays by.

Each process keeps a window per model. What its own requests took is in it at once; what those of other workers took is
read from the calls that they record, about once a second while this process observes something itself. A new window
begins with the history of its model, whoever made it. While the database is away, windows go on with what they have.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

from pgharness.database import TRANSIENT, Database
from pgharness.errors import HarnessError
from pgharness.gateway.delays import WINDOW, Observation, Size, Window

logger = logging.getLogger(__name__)
_REFRESH_SECONDS = 1.0


class _Shared:
    """A window, and what is needed to add to it what others observed."""

    __slots__ = ("is_new", "last_id", "own", "window")

    def __init__(self) -> None:
        self.window = Window()
        self.own: dict[datetime, None] = {}  # when the latest requests of this process began: their calls come back
        self.last_id: int | None = None
        self.is_new = True  # something was observed, or nothing was read yet


class Observations:
    """The windows of one process, by the id of the model. Without a database, each process learns alone."""

    def __init__(self, database: Database | None = None) -> None:
        self._database = database
        self._shared: dict[int, _Shared] = {}
        self._refreshing: asyncio.Task[None] | None = None

    def window(self, model_id: int) -> Window:
        """Return the window of a model, which fills with its history as soon as that is read."""
        return self._of(model_id).window

    def add(self, model_id: int, observation: Observation, started_at: datetime | None = None) -> None:
        """Add what was observed; `started_at` is that of the call, by which it is known when it comes back."""
        shared = self._of(model_id)
        shared.window.add(observation)
        if self._database is None:
            return
        if started_at is not None:
            shared.own[started_at] = None
            if len(shared.own) > 2 * WINDOW:
                del shared.own[next(iter(shared.own))]
        shared.is_new = True
        self._refresh()

    def _of(self, model_id: int) -> _Shared:
        shared = self._shared.get(model_id)
        if shared is None:
            shared = self._shared[model_id] = _Shared()
            self._refresh()
        return shared

    # -- sharing

    def _refresh(self) -> None:
        if self._database is not None and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._read_on(self._database))

    async def _read_on(self, database: Database) -> None:
        """Read what others observed, as long as there is something new here."""
        while wanted := [model_id for model_id, shared in self._shared.items() if shared.is_new]:
            for model_id in wanted:
                self._shared[model_id].is_new = False
            try:
                await self._read(database, wanted)
            except (HarnessError, *TRANSIENT) as exc:
                logger.warning("what others observed of models could not be read: %s", exc)
                for model_id in wanted:
                    self._shared[model_id].is_new |= self._shared[model_id].last_id is None
            await asyncio.sleep(_REFRESH_SECONDS)

    async def _read(self, database: Database, model_ids: list[int]) -> None:
        after = [self._shared[model_id].last_id for model_id in model_ids]
        rows = await database.call("recent_latencies", model_ids=model_ids, after=after)
        for model_id in model_ids:
            shared = self._shared[model_id]
            found = [row for row in rows if row["model_id"] == model_id]
            shared.last_id = max((row["call_id"] for row in found), default=shared.last_id or 0)
            for row in found:
                if row["started_at"] not in shared.own:
                    size = Size(row["prompt_tokens"], row["answer_tokens"])
                    shared.window.add(Observation(row["seconds"], row["is_cut"], size))

    async def aclose(self) -> None:
        """Stop reading."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
