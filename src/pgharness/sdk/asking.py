"""Asking a model one question, outside of any run: within the limits that hold for all workers, and kept nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgharness.database import Database, Row
from pgharness.gateway import Gateway
from pgharness.sdk.chat import Chat
from pgharness.settings import Settings
from pgharness.types import Completion, Message


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Question:
    """What is asked, and the calls that were made for it: each like a row of `calls`, with the name of its model."""

    messages: Sequence[Message]
    schema: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    ordinal: int = 0
    attempt: int = 1
    calls: list[Row] = field(default_factory=list)

    def emit(self, kind: str, told: dict[str, Any]) -> None:
        """Keep a call."""
        self.calls.append(told["call"])

    async def ask(self, url: str, settings: Settings, model: str) -> Completion:
        """Ask a model of table `models`, by name, with `parameters` laid over its own. Raises ModelError, NotFound."""
        database = Database(url, size=1, application_name="pgharness ask")
        async with database.opened():
            gateway = Gateway(
                cache_root=settings.cache_root,
                allows_code=settings.allows_code,
                plugin_seconds=settings.plugin_seconds,
                database=database,
            )
            chat = Chat(database, gateway, {"run_id": 0, "max_concurrency": None})
            try:
                return await chat.complete(
                    self,
                    model,
                    self.messages,
                    schema=self.schema,
                    parameters=self.parameters,
                    seed=self.seed,
                    is_patient=False,
                )
            finally:
                await chat.close()
                await gateway.aclose()
