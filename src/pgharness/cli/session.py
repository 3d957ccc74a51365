"""What commands share: the database they talk to, and how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from types import TracebackType
from typing import Any

import typer
from psycopg import Connection
from rich.console import Console
from rich.table import Table

from pgharness import database, schema
from pgharness.database import Row
from pgharness.embedded import EmbeddedPostgres
from pgharness.errors import SchemaOutOfDate
from pgharness.settings import Settings

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


class Session:
    """One command's way to the database: the server that was named, else the embedded one, started when first needed."""

    def __init__(self, database_url: str | None) -> None:
        self._database_url = database_url
        self._embedded: EmbeddedPostgres | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._embedded is not None:
            self._embedded.close()

    @cached_property
    def settings(self) -> Settings:
        return Settings.from_env(database_url=self._database_url)

    @property
    def is_embedded(self) -> bool:
        return self.settings.database_url is None

    @cached_property
    def embedded(self) -> EmbeddedPostgres:
        self._embedded = EmbeddedPostgres()
        return self._embedded

    @cached_property
    def url(self) -> str:
        """Connection string of the server, which runs."""
        return self.settings.database_url or self.embedded.ensure()

    @contextmanager
    def connection(self, *, checked: bool = True) -> Iterator[Connection[Any]]:
        """Open a connection; the schema is checked first, and an embedded database is brought up to date by itself."""
        with database.connect(self.url) as connection:
            if checked:
                try:
                    schema.verify(connection)
                except SchemaOutOfDate:
                    if not self.is_embedded:
                        raise
                    schema.upgrade(connection)
            yield connection

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a child process that shall use the same server."""
        return {**os.environ, "PGHARNESS_DATABASE_URL": self.url}


def session_of(context: typer.Context) -> Session:
    session = context.find_root().obj
    assert isinstance(session, Session)
    return session


def run_of(reference: str) -> dict[str, Any]:
    """Return the argument that names a run in a function call: by id, or by name."""
    return {"run_id": int(reference)} if reference.isdecimal() else {"run": reference}


def plain(value: Any) -> Any:
    """Return a database value as JSON holds it."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=plain, ensure_ascii=False)
    sys.stdout.write("\n")


def shown(value: Any) -> str:
    """Return a value as a table cell."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float() | Decimal():
            return f"{float(value):,.4f}".rstrip("0").rstrip(".") or "0"
        case int():
            return f"{value:,}"
        case datetime():
            return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        case timedelta():
            return str(timedelta(seconds=round(value.total_seconds())))
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)


def table(rows: Sequence[Row], columns: Sequence[str] | None = None, *, title: str | None = None) -> Table:
    """Return rows as a table; columns default to all of them."""
    names = list(columns or (rows[0].keys() if rows else []))
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for name in names:
        numeric = bool(rows) and isinstance(rows[0].get(name), int | float | Decimal) and name not in ("run_id", "id")
        result.add_column(name.replace("_", " "), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(shown(row[name]) for name in names))
    return result
