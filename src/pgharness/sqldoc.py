"""The SQL reference: docs/sql.md, written from the comments in the database.

`python -m pgharness.sqldoc [URL]` prints it, from the schema at URL or else from a throw-away server's. What it prints
depends on the schema alone: neither on the server's version nor on its collation.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from itertools import groupby

from pgharness import database, schema
from pgharness.database import Row
from pgharness.embedded import EmbeddedPostgres, temporary_root

_HEADER = """\
# SQL reference

Everything in schema `pgharness` that people and programs may use. Written by `make docs` from the comments in the
database, which can be read there too: `select * from pgharness.sql_reference;`.
"""
_FOR_WORKERS = "For workers"
_SECTIONS = {
    "Tables": "What people insert into, and where results are kept. A thing may be given by its name or by its id.",
    "Views": "What people read. A query may filter and sort them by any column.",
    "Functions": "What people call, with named arguments: `select pgharness.pause_run(run_id => 7);`.",
    "Functions for workers": "What worker processes call; people need none of these.",
    "Types": "What functions take and return.",
    "Notifications": "What the database tells to those who `listen pgharness;`.",
}


def render(entries: Sequence[Row]) -> str:
    """Return the reference as Markdown, from the rows of view sql_reference."""
    ordered = sorted(entries, key=lambda row: (row["section"], row["name"], row["signature"] or "", row["position"]))
    documents: dict[str, list[str]] = {title: [] for title in _SECTIONS}
    for _, overloads in groupby(ordered, key=lambda entry: (entry["section"], entry["name"])):
        objects = [list(parts) for _, parts in groupby(overloads, key=lambda entry: entry["signature"])]
        objects.sort(key=lambda parts: -len(parts[0]["comment"] or ""))  # the one that explains the others first
        first = objects[0][0]
        documents[_title(first)].append("\n".join([_heading(first), *(_object(*parts) for parts in objects)]))
    sections = [f"## {title}\n\n{intro}\n\n" + "\n".join(documents[title]) for title, intro in _SECTIONS.items()]
    return "\n".join([_HEADER, *sections])


def _title(entry: Row) -> str:
    if entry["section"] == "function":
        return "Functions for workers" if (entry["comment"] or "").startswith(_FOR_WORKERS) else "Functions"
    return f"{entry['section'].capitalize()}s"


def _heading(entry: Row) -> str:
    return f"### {'Channel ' if entry['section'] == 'notification' else ''}{entry['name']}\n"


def _object(entry: Row, *items: Row) -> str:
    purpose, _, example = (entry["comment"] or "").partition(" Example: ")
    lines = ["```sql", _call(entry, items), "```", ""] if entry["section"] == "function" else []
    lines += [purpose, ""]
    if example:
        lines += ["```sql", example, "```", ""]
    columns = [item for item in items if item["part"] == "column"]
    if columns:
        heads = ["column", "type", "default", "meaning"]
        rows = [[f"`{column['item']}`", column["type"], _default(column), _cell(column)] for column in columns]
        if entry["section"] != "table":  # nothing else has defaults
            heads, rows = [*heads[:2], heads[3]], [[*row[:2], row[3]] for row in rows]
        lines += [f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows]]
        lines.append("")
    return "\n".join(lines)


def _call(entry: Row, items: Sequence[Row]) -> str:
    arguments = [
        f"{item['item']} {item['type']}" + (f" default {_default(item)}" if item["default_value"] else "")
        for item in items
        if item["part"] == "argument"
    ]
    head = f"{entry['name']}({', '.join(arguments)})"
    if len(head) > 100:
        head = f"{entry['name']}(\n    " + ",\n    ".join(arguments) + "\n)"
    return f"{head}\nreturns {entry['type'].replace('TABLE(', 'table (').replace('SETOF ', 'setof ')}"


def _default(item: Row) -> str:
    """Return a default without the casts that Postgres adds to literals; nothing when there is none."""
    default: str = re.sub(r"::[a-z][a-z ]*(\[\])?$", "", item["default_value"] or "")
    return default.lower() if default.isupper() else default


def _cell(column: Row) -> str:
    return (column["comment"] or "").replace("|", "\\|")


def read(url: str | None) -> list[Row]:
    """Return the rows of view sql_reference, of the schema at `url` or of one installed into a throw-away server."""
    if url is not None:
        with database.connect(url) as connection:
            schema.verify(connection)
            return database.rows(connection, "sql_reference")
    root = temporary_root()
    try:
        with EmbeddedPostgres(root, durable=False) as server, database.connect(server.ensure()) as connection:
            schema.upgrade(connection)
            return database.rows(connection, "sql_reference")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the reference."""
    parser = argparse.ArgumentParser(prog="python -m pgharness.sqldoc", description=__doc__)
    parser.add_argument("url", nargs="?", help="a database with the schema installed; default: a throw-away server")
    sys.stdout.write(render(read(parser.parse_args(arguments).url)))


if __name__ == "__main__":
    main()
