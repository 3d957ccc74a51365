"""`pgharness report`: what runs found, as files to read, to print, to compute with, and to check."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import database, schema
from pgharness.cli.session import Session, session_of, stderr, stdout
from pgharness.errors import HarnessError

_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(
    context: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Names or ids of runs, which are compared; files with --archive.")
    ],
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="Of html, md, latex, ipynb, json, csv, with commas between.")
    ] = "html,md",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the files.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    archive: Annotated[
        bool, typer.Option("--archive", help="RUN are files of `pgharness archive`: no other database is needed.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Compare with an earlier report's report.json; exit 1 if not equal."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0.0001, max=0.5, help="Level of tests, 0.05; intervals are of 1 - alpha.")
    ] = None,
) -> None:
    """Write a report on runs: scores with intervals, comparisons, costs, failures, limits, how it was made.

    Examples: pgharness report triage-v2/1 --out report; pgharness report --archive run.zip --check report/report.json
    """
    if out is None and check is None:
        raise typer.BadParameter("say in which folder the files shall be.", param_hint="--out")
    from pgharness import report as reports  # numpy and scipy take a second

    chosen = [name.strip() for name in formats.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in reports.FORMATS]
    if unknown or not chosen:
        named = f"{unknown[0]!r} is no format; it" if unknown else "it"
        raise typer.BadParameter(f"{named} is of {', '.join(reports.FORMATS)}.", param_hint="--format")
    earlier = reports.read_earlier(check) if check is not None else None
    with stderr.status("computing"), _source(session_of(context), runs if archive else None) as (connection, adopted):
        names = earlier.ordered(adopted or runs) if earlier else adopted or runs
        made = reports.gather(connection, names, alpha=alpha or (earlier.alpha if earlier else 0.05))
        files = reports.files_of(made, chosen) if out is not None else []
    if out is not None:
        for path in reports.write(files, out, force=force):
            stdout.print(Text(str(path)), soft_wrap=True)
    if earlier is not None:
        found = earlier.differences(made)
        if found:
            more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            raise HarnessError(
                f"{check} says something else in {len(found)} places",
                detail="\n".join([*found[:_SHOWN], *more]),
                hint="Was it made of the same runs, with the same --alpha, by the same version of pgharness?",
            )
        stdout.print(Text(f"all numbers of {check} are reproduced"), soft_wrap=True)


@contextmanager
def _source(session: Session, files: list[str] | None) -> Iterator[tuple[Connection[Any], list[str]]]:
    """Yield a connection to read from, and the runs that files hold: with files, that of a private database."""
    if files is None:
        with session.connection():
            pass  # an embedded database is brought up to date
        with database.snapshot(session.url) as connection:
            yield connection, []
        return
    from pgharness import archiving
    from pgharness.embedded import EmbeddedPostgres, temporary_root

    root = temporary_root()
    try:
        with EmbeddedPostgres(root, durable=False) as server:
            url = server.ensure()
            with database.connect(url) as connection:
                schema.upgrade(connection)
                names = archiving.adopt_runs(connection, map(Path, files))
            with database.snapshot(url) as connection:
                yield connection, names
    finally:
        shutil.rmtree(root, ignore_errors=True)
