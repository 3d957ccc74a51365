"""`pgharness report`: what runs found, as files to read, to print, to compute with, and to check."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import __version__, database, schema
from pgharness.cli.session import Session, session_of, stderr, stdout
from pgharness.errors import HarnessError, NotFound, WrongState

if TYPE_CHECKING:
    from pgharness.report.files import Earlier, File
    from pgharness.report.model import Report

_SHOWN = 20


def add_to(app: typer.Typer) -> None:
    app.command()(report)


def report(
    context: typer.Context,
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Names or ids of runs, which are compared; files with --archive."),
    ] = None,
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
    fetch: Annotated[
        int | None, typer.Option(metavar="ID", help="Write the files of a report that request_report() asked for.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(min=0.0001, max=0.5, help="Level of tests, 0.05; intervals are of 1 - alpha.")
    ] = None,
) -> None:
    """Write a report on runs: scores with intervals, comparisons, costs, failures, limits, how it was made.

    Example: pgharness report triage-v2/1 --out report; pgharness report --archive run.zip --check report/report.json;
    pgharness report --fetch 3 --out report
    """
    if bool(runs) == (fetch is not None):
        raise typer.BadParameter("give either runs, or --fetch.", param_hint="RUN")
    if out is None and (check is None or fetch is not None):
        raise typer.BadParameter("say in which folder the files shall be.", param_hint="--out")
    from pgharness.report.files import FORMATS, files_of, read_earlier, write
    from pgharness.report.gathering import gather  # numpy and scipy take a second

    if fetch is not None:
        assert out is not None
        _print_paths(write(_fetched(session_of(context), fetch), out, force=force))
        return
    assert runs
    chosen = [name.strip() for name in formats.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in FORMATS]
    if unknown or not chosen:
        named = f"{unknown[0]!r} is no format; it" if unknown else "it"
        raise typer.BadParameter(f"{named} is of {', '.join(FORMATS)}.", param_hint="--format")
    earlier = read_earlier(check) if check is not None else None
    with stderr.status("computing"), _source(session_of(context), runs if archive else None) as (connection, adopted):
        names = earlier.ordered(adopted or runs) if earlier else adopted or runs
        made = gather(connection, names, alpha=alpha or (earlier.alpha if earlier else 0.05))
        files = files_of(made, chosen) if out is not None else []
    if out is not None:
        _print_paths(write(files, out, force=force))
    if earlier is not None:
        _check(earlier, made)


def _check(earlier: Earlier, made: Report) -> None:
    """Say that an earlier report is reproduced; raise HarnessError where it is not."""
    found = earlier.differences(made)
    if found:
        hint = "Was it made of the same runs, with the same --alpha?"
        if earlier.version != __version__:
            hint = f"pgharness {earlier.version} made it, and this is {__version__}: check it with that version."
        more = [f"... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise HarnessError(
            f"{earlier.path} says something else in {len(found)} {'place' if len(found) == 1 else 'places'}",
            detail="\n".join([*found[:_SHOWN], *more]),
            hint=hint,
        )
    stdout.print(Text(f"all numbers of {earlier.path} are reproduced"), soft_wrap=True)


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        stdout.print(Text(str(path)), soft_wrap=True)


def _fetched(session: Session, report_id: int) -> list[File]:
    """Return the files of a report that a worker made. Raises NotFound, and WrongState for one that is not made."""
    from pgharness.report.files import File

    with session.connection() as connection:
        found = database.rows(connection, "reports", id=report_id)
        if not found:
            raise NotFound(
                f"report {report_id} does not exist", hint="Ask for one: select pgharness.request_report('RUN');"
            )
        if found[0]["status"] != "succeeded":
            error = f": {found[0]['error']}" if found[0]["error"] else ""
            raise WrongState(
                f"report {report_id} is {found[0]['status']}{error}",
                hint=found[0]["hint"] or "Workers make reports: pgharness worker",
            )
        rows = database.rows(connection, "report_files", report_id=report_id, order="path")
    return [File(row["path"], row["media_type"], row["content"]) for row in rows]


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
