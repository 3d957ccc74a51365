"""Commands that move finished runs into files, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import archiving, database
from pgharness.archiving import Archive, OnProgress
from pgharness.cli.session import Json, Session, print_json, session_of, stderr, stdout, table

_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


def add_to(app: typer.Typer) -> None:
    app.command()(archive)
    app.command()(unarchive)


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d{1,5})([hdw])", text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is not an age like 12h, 90d or 8w.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def archive(
    context: typer.Context,
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="Names or ids of finished runs.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the files, one a run.")] = None,
    finished_before: Annotated[
        datetime | None,
        typer.Option(
            metavar="DATE", formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"], help="All runs that finished before it."
        ),
    ] = None,
    older_than: Annotated[
        timedelta | None,
        typer.Option(metavar="AGE", parser=_age, help="All runs that finished longer ago: 90d, 8w."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Write the files, and delete nothing.")] = False,
    lists: Annotated[bool, typer.Option("--list", help="Show the archived runs and their files.")] = False,
    as_json: Json = False,
) -> None:
    """Move notes, grades, calls, results and logs of finished runs into files, a ZIP of JSON lines each.

    The runs stay, with their definition, counters, cost and failures; `pgharness unarchive` brings the rest back.

    Example: pgharness archive --older-than 90d --out /backup/runs
    """
    session = session_of(context)
    chosen = (bool(runs), finished_before is not None, older_than is not None)
    if lists:
        if any(chosen) or keep or out is not None:
            raise typer.BadParameter("it goes alone.", param_hint="--list")
        _print_archived(session, as_json)
        return
    if sum(chosen) != 1:
        raise typer.BadParameter("give either runs, or --finished-before, or --older-than.", param_hint="RUN")
    if out is None:
        raise typer.BadParameter("say in which folder the files shall be.", param_hint="--out")
    with session.connection() as connection:
        if not runs:
            runs = archiving.finished_runs(connection, _limit(connection, finished_before, older_than))
        written = []
        for run in runs:
            with _progress(f"archiving {run}") as on_progress:
                done = archiving.archive_run(connection, session.url, run, out, keep=keep, on_progress=on_progress)
            written.append(done)
            if not as_json:
                stdout.print(Text(_archived_line(done)), soft_wrap=True)
    if as_json:
        print_json([asdict(done) for done in written])
    elif not written:
        stdout.print("no run finished before that, or they are archived: pgharness archive --list")


def _limit(connection: Connection[Any], finished_before: datetime | None, older_than: timedelta | None) -> datetime:
    """Return the time before which runs have to be finished: in local time, or by the database's clock."""
    if finished_before is not None:
        return finished_before.astimezone()
    now: datetime = database.call(connection, "clock")[0]["clock"]
    return now - (older_than or timedelta())


def _archived_line(done: Archive) -> str:
    counts = ", ".join(f"{done.rows[name]:,} {name}" for name in ("notes", "grades", "calls"))
    what = "archived" if done.is_detached else "written, and kept in the database"
    return f"run {done.run_id} ({done.run}) is {what}: {counts} in {done.path} ({_size(done.file_bytes)})"


def _size(count: int) -> str:
    return f"{count / 1_000_000:,.1f} MB" if count >= 100_000 else f"{count / 1_000:,.1f} kB"


def _print_archived(session: Session, as_json: bool) -> None:
    with session.connection() as connection:
        rows = database.rows(connection, "archived_runs", order="run_id")
    if as_json:
        print_json(rows)
    elif rows:
        columns: dict[str, Any] = {
            "id": "run_id",
            "run": "run",
            "status": "status",
            "archived": lambda row: row["archived_at"].astimezone().strftime("%Y-%m-%d"),
            "file": "file_name",
            "size": lambda row: _size(row["file_bytes"]),
        }
        stdout.print(table(rows, columns))
    else:
        stdout.print("No run is archived: pgharness archive RUN --out DIR")


def unarchive(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Files that `pgharness archive` wrote.")],
    as_json: Json = False,
) -> None:
    """Bring the rows of archived runs back from their files, exactly as they were; the files stay.

    Example: pgharness unarchive /backup/runs/triage-v2-1-0123456789ab.zip
    """
    restored = []
    with session_of(context).connection() as connection:
        for file in files:
            with _progress(f"restoring {file.name}") as on_progress:
                done = archiving.restore_run(connection, file, on_progress=on_progress)
            restored.append(done)
            if not as_json:
                counts = ", ".join(f"{done.rows[name]:,} {name}" for name in ("notes", "grades", "calls"))
                stdout.print(Text(f"run {done.run_id} ({done.run}) is back: {counts}"), soft_wrap=True)
    if as_json:
        print_json([asdict(done) for done in restored])


@contextmanager
def _progress(what: str) -> Iterator[OnProgress]:
    with stderr.status(Text(what)) as status:
        yield lambda rows: status.update(Text(f"{what}: {rows:,} rows"))
