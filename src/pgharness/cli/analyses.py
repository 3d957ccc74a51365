"""The command around analyses: ask for one, wait for it, print what was found."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import database
from pgharness.cli.configs import laid_over
from pgharness.cli.session import Json, print_json, session_of, stderr, stdout, table
from pgharness.database import Row
from pgharness.desk import make_here
from pgharness.errors import NOT_PERMITTED, DatabaseError, HarnessError

EXIT_FAILED = 1
_REFRESH_SECONDS = 0.3


def add_to(app: typer.Typer) -> None:
    app.command()(analyse)


def analyse(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="compare, ablation, sweep, agreement or power.")],
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs' names or ids.")],
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the analysis. Repeatable."),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Make it again even if nothing changed.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave it to a worker.")] = False,
    as_json: Json = False,
) -> None:
    """Compare what runs found, with errors clustered by case: by a worker, or here if none runs.

    Example: pgharness analyse compare demo/1 --set alpha=0.01
    """
    given = laid_over({}, options or (), {})
    for name in ("combinations", "cases", "authors"):
        if isinstance(given.get(name), str):
            given[name] = [given[name]]
    session = session_of(context)
    with session.connection() as connection:
        row = database.call(connection, "request_analysis", kind=kind, runs=runs, options=given, anew=anew)[0]
        if not no_wait:
            _wait(connection, session.url, row["id"])
        found = database.rows(connection, "analysis_results", analysis_id=row["id"])[0]
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["status"] == "failed":
        if found["hint"] and not as_json:
            stderr.print(found["hint"], markup=False, highlight=False)
        raise typer.Exit(EXIT_FAILED)


def _wait(connection: Connection[Any], url: str, analysis_id: int) -> None:
    while True:
        row = database.rows(connection, "analyses", id=analysis_id)[0]
        if row["status"] in ("succeeded", "failed"):
            return
        is_alone = not database.rows(connection, "worker_health", status="running", limit=1)
        if not (is_alone and _made_here(connection, url, analysis_id)):
            time.sleep(_REFRESH_SECONDS)


def _made_here(connection: Connection[Any], url: str, analysis_id: int) -> bool:
    try:
        return make_here(connection, url, "analysis", analysis_id)
    except DatabaseError as exc:
        if exc.sqlstate != NOT_PERMITTED:
            raise
        raise HarnessError(
            f"analysis {analysis_id} waits: no worker runs, and this role may not be one",
            hint="It is made by the next worker, started as a role with pgharness_worker: pgharness worker",
        ) from exc


def _print(found: Row) -> None:
    about = f"analysis {found['analysis_id']} ({found['kind']} of {', '.join(found['runs'])}) is {found['status']}"
    stdout.print(Text(about + (f": {found['error']}" if found["error"] else "")))
    result = found["result"]
    if result is None:
        if found["status"] == "pending":
            stdout.print("It is made by the next worker: pgharness worker")
        return
    if found["kind"] in ("compare", "ablation"):
        _print_comparison(result)
    elif found["kind"] == "agreement":
        rows = [
            one | {"who": ", ".join(one["raters"]), "interval": _interval(one["interval"])}
            for one in result["measures"]
        ]
        stdout.print(
            table(rows, {"raters": "who", "measure": "name", "value": "value", "interval": "interval", "of": "units"})
        )
    else:
        for one in result["trends"] if found["kind"] == "sweep" else result["pairs"]:
            stdout.print(Text(one["sentence"]))
    for warning in result["warnings"]:
        stdout.print(Text(f"Note: {warning}."))


def _print_comparison(result: Mapping[str, Any]) -> None:
    level = f"{100 * (1 - result['alpha']):g}% interval"
    groups = [one | {"interval": _interval(one["interval"])} for one in result["groups"]]
    stdout.print(
        table(
            groups,
            {
                result["by"]: "name",
                "mean": "mean",
                "SE": "standard_error",
                level: "interval",
                "cases": "cases",
                "notes": "notes",
                "grades": "grades",
            },
        )
    )
    pairs = [one | {"interval": _interval(one["interval"]), "found": _found(one)} for one in result["pairs"]]
    if pairs:
        stdout.print()
        stdout.print(
            table(
                pairs,
                {
                    "first": "first",
                    "second": "second",
                    "diff.": "difference",
                    level: "interval",
                    "p": "p_value",
                    f"p ({result['correction']})": "p_corrected",
                    "found": "found",
                },
            )
        )
    for pair in pairs:
        stdout.print()
        stdout.print(Text(pair["sentence"]))
        for text in (*pair["reasons"], *pair["warnings"]):
            stdout.print(Text(f"- {text}"))


def _interval(interval: Mapping[str, float | None] | None) -> str:
    if interval is None:
        return "-"
    low, high = (f"{end:.4f}" if end is not None else "?" for end in (interval["low"], interval["high"]))
    return f"[{low}, {high}]"


def _found(pair: Mapping[str, Any]) -> str:
    """Return what the corrected test says, in the words of a narrow column."""
    if pair["differs"] is None:
        return "-"
    if not pair["differs"]:
        return "not shown"
    return "first higher" if pair["difference"] > 0 else "second higher"
