"""What commands share: the database they talk to, and how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any
from uuid import UUID

import typer
from psycopg import Connection
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgharness import database, schema
from pgharness.embedded import EmbeddedPostgres
from pgharness.errors import SchemaOutOfDate
from pgharness.settings import Settings

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or id.")]


class Session:
    """One command's way to the database: the server that was named, else the embedded one, started when needed."""

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
        if self.settings.database_url:
            return self.settings.database_url
        if not self.embedded.data.exists():
            stderr.print(f"making a private Postgres server in {self.embedded.root} (once)", markup=False)
        return self.embedded.ensure()

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


def plain(value: Any) -> Any:
    """Return a database value as JSON holds it."""
    match value:
        case Decimal():
            return float(value) if value.is_finite() else str(value)
        case date():  # a datetime is one
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Path() | UUID():
            return str(value)
        case _:
            return value


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=plain, ensure_ascii=False)
    sys.stdout.write("\n")


def shown(value: Any) -> str:
    """Return a value as people read it."""
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


def usd(amount: Any) -> str:
    """Return an amount of USD: cents of large ones, four decimals of small ones."""
    amount = float(amount)
    if amount == 0:
        return "0"
    if abs(amount) < 0.0001:
        return "<0.0001"
    return f"{amount:,.2f}" if abs(amount) >= 100 else f"{amount:,.4f}"


def duration(seconds: Any) -> str:
    """Return seconds as hours, minutes and seconds."""
    return str(timedelta(seconds=round(float(seconds))))


Cell = Callable[[Mapping[str, Any]], object]


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | Cell], *, title: str | None = None) -> Table:
    """Return rows as a table: to each heading the column to show, or what makes a cell of a row."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    result.box, result.show_edge, result.pad_edge = box.SIMPLE_HEAD, False, False
    cells = []
    for heading, source in columns.items():
        column = [shown(source(row) if callable(source) else row[source]) for row in rows]
        is_number = all(text[:1] in "-<0123456789" for text in column)
        result.add_column(heading, justify="right" if is_number else "left", overflow="fold")
        cells.append(column)
    for texts in zip(*cells, strict=True):
        result.add_row(*map(Text, texts))  # what people wrote is no markup
    return result
