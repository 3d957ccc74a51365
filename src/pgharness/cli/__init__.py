"""The command line: a command is parse, one call, print.

Exit status: 0 done; 1 refused or failed; 2 wrong usage; 4 the schema must be migrated; 5 the watched run failed or was
cancelled; 6 it is paused; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, NoReturn

import typer

from pgharness import __version__
from pgharness.cli import admin, analyses, archive, demo, experiments, imports, models, records, reports, runs, simulate
from pgharness.cli.session import Session, stderr
from pgharness.database import TRANSIENT
from pgharness.errors import HarnessError, ImportRefused, SchemaOutOfDate

app = typer.Typer(
    name="pgharness",
    help="LLM experiments in Postgres: define with SQL, run durable workers, read results with SQL.",
    epilog="Exit status: 0 done; 1 refused or failed; 2 wrong usage; 4 the schema must be migrated; of a run, 5 failed "
    "or cancelled, 6 paused.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (demo, admin, experiments, imports, models, runs, records, analyses, reports, archive, simulate):
    commands.add_to(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    database_url: Annotated[
        str | None,
        typer.Option(
            "--database-url",
            help="Server to use, for example postgresql://user@host/database; default PGHARNESS_DATABASE_URL, "
            "else the embedded server.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    context.obj = context.with_resource(Session(database_url))


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # files and pipes get UTF-8 whatever the locale; a terminal shows what it can
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    try:
        try:
            app(_url_first(sys.argv[1:] if arguments is None else arguments), prog_name="pgharness")
        finally:
            sys.stdout.flush()  # so that a reader who is gone is noticed here
    except SchemaOutOfDate as exc:
        _print_error(exc)
        sys.exit(4)
    except HarnessError as exc:
        _print_error(exc)
        sys.exit(1)
    except TRANSIENT as exc:
        stderr.print("[red]error:[/] the connection to the database was lost")
        stderr.print(str(exc).strip(), markup=False, highlight=False)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would fail on its way out
        sys.exit(1)
    sys.exit(0)


def _url_first(arguments: list[str]) -> list[str]:
    """Let --database-url stand after the command too."""
    head, tail = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        head, tail = arguments[:cut], arguments[cut:]
    for index, word in enumerate(head):
        if word == "--database-url":
            if index + 1 == len(head):
                return [word]  # whose error is that it lacks its argument
            return [*head[index : index + 2], *head[:index], *head[index + 2 :], *tail]
        if word.startswith("--database-url="):
            return [word, *head[:index], *head[index + 1 :], *tail]
    return arguments


def _print_error(error: HarnessError) -> None:
    stderr.print("[red]error:[/] ", end="")
    stderr.print(str(error), markup=False, highlight=False)
    if error.detail:
        stderr.print(error.detail, markup=False, highlight=False)
    if isinstance(error, ImportRefused):
        stderr.print("Nothing was imported.", markup=False)
    if error.hint:
        stderr.print(f"hint: {error.hint}", markup=False, highlight=False)
