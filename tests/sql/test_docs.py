"""docs/sql.md: written from the comments in the database, and never stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from psycopg import Connection

from pgharness import database, sqldoc
from world import rows, value

DOCUMENT = Path(__file__).parents[2] / "docs" / "sql.md"


def test_the_reference_is_not_stale(tx: Connection[Any]) -> None:
    written = sqldoc.render(database.rows(tx, "sql_reference"))
    assert written == DOCUMENT.read_text(), "the SQL has changed since docs/sql.md was written: make docs"


def test_the_reference_does_not_depend_on_the_search_path(tx: Connection[Any]) -> None:
    before = rows(tx, "select * from pgharness.sql_reference order by section, name, signature, position")
    tx.execute("set local search_path = pgharness, procrastinate")
    assert rows(tx, "select * from pgharness.sql_reference order by section, name, signature, position") == before


def test_the_reference_has_every_table_view_and_public_function(tx: Connection[Any]) -> None:
    headings = {line.removeprefix("### ") for line in DOCUMENT.read_text().splitlines() if line.startswith("### ")}
    tables = "select array_agg(relname::text) from pg_class where relkind in ('r', 'v') and relnamespace = "
    functions = "select array_agg(proname::text) from pg_proc where proname !~ '^_' and pronamespace = "
    names = [value(tx, f"{query} 'pgharness'::regnamespace") for query in (tables, functions)]
    assert {*names[0], *names[1]} <= headings
    assert not {heading for heading in headings if heading.startswith("_")}


def test_it_is_printed_from_a_database_by_its_address(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    sqldoc.main([url])
    assert capsys.readouterr().out == DOCUMENT.read_text()


def test_functions_are_shown_as_they_are_called() -> None:
    def row(part: str | None, position: int, item: str | None, type: str, default: str | None = None) -> database.Row:
        names = {"section": "function", "name": "f", "signature": "f(a bigint, b text)", "part": part, "item": item}
        comment = "Do it. Example: select f(1);" if part is None else None
        return names | {"position": position, "type": type, "default_value": default, "comment": comment}

    entries = [
        row("argument", 2, "b", "text", "'x'::text"),
        row(None, 0, None, "TABLE(c text[])"),
        row("argument", 1, "a", "bigint"),
        row("result", 3, "c", "text[]"),
    ]
    call = "```sql\nf(a bigint, b text default 'x')\nreturns table (c text[])\n```"
    shown = f"### f\n\n{call}\n\nDo it.\n\n```sql\nselect f(1);\n```\n"
    assert shown in sqldoc.render(entries)
