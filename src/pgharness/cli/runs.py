"""Commands around runs: start, status, cancel, pause, resume, retry, rerun, export, worker."""

from __future__ import annotations

import csv
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer
from psycopg import Connection
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn

from pgharness import database
from pgharness.cli.session import plain, print_json, run_of, session_of, shown, stderr, stdout, table
from pgharness.database import TRANSIENT, Row
from pgharness.errors import HarnessError, InvalidArgument, NotFound
from pgharness.queue import QUEUES
from pgharness.worker import Supervisor, WorkerOptions

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's id or name.")]
_EXIT_BY_STATUS = {"failed": 5, "cancelled": 5, "paused": 6}
_REFRESH_SECONDS = 0.5


def add_to(app: typer.Typer) -> None:
    app.command()(start)
    app.command()(status)
    for name, function, text in (
        ("cancel", "cancel_run", "Stop a run; calls in flight are aborted, what is done is kept."),
        ("pause", "pause_run", "Stop starting calls of a run; those in flight end and are kept."),
        ("retry", "retry_failed", "Try the failed notes and grades of a run again."),
        ("rerun", "rerun", "Start a new run with the frozen definition of an earlier one."),
    ):
        app.command(name, help=f"{text}\n\nExample: pgharness {name} demo/1")(_control(function))
    app.command()(resume)
    app.command()(export)
    app.command()(worker)


def _print_receipt(row: Row, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    reason = f" ({row['reason']})" if row["reason"] else ""
    stdout.print(
        f"run {row['run_id']} ({row['run']}) is {row['status']}{reason}: {row['notes']:,} notes, {row['grades']:,} grades planned",
        markup=False,
    )


def _control(function: str) -> Callable[..., None]:
    def command(context: typer.Context, run: Run, as_json: Json = False) -> None:
        with session_of(context).connection() as connection:
            _print_receipt(database.call(connection, function, **run_of(run))[0], as_json)

    return command


def start(
    context: typer.Context,
    instance: Annotated[str, typer.Argument(help="An instance's name or id.")],
    kind: Annotated[Literal["trial", "milestone"], typer.Option(help="What the run is for.")] = "trial",
    budget: Annotated[float | None, typer.Option(help="Pause at so many USD.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    name: Annotated[str | None, typer.Option(help="The run's name; default INSTANCE/NUMBER.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A second start with this key returns the first run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a run of an instance: freeze what it uses and queue its work.

    Example: pgharness start triage-v2 --kind milestone --budget 5
    """
    with session_of(context).connection() as connection:
        receipt = database.call(
            connection,
            "start_run",
            instance=instance,
            kind=kind,
            budget_usd=budget,
            priority=priority,
            name=name,
            idempotency_key=idempotency_key,
        )[0]
        _print_receipt(receipt, as_json)
        if not as_json and not database.rows(connection, "worker_health", status="running"):
            stdout.print("No worker is running: pgharness worker --workers 2")


def resume(
    context: typer.Context,
    run: Run,
    budget: Annotated[float | None, typer.Option(help="A new budget in USD.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a paused or cancelled run with what it has not done yet.

    Example: pgharness resume demo/1 --budget 20
    """
    with session_of(context).connection() as connection:
        _print_receipt(database.call(connection, "resume_run", budget_usd=budget, **run_of(run))[0], as_json)


# -- status


def status(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run's id or name; default the latest runs.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep showing it until it ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show how runs stand. With a run, the exit status tells: 0 completed or running, 5 failed or cancelled, 6 paused.

    Example: pgharness status demo/1 --watch
    """
    with session_of(context).connection() as connection:
        if run is None:
            rows = sorted(database.rows(connection, "run_progress"), key=lambda row: -row["run_id"])[:20]
            if as_json:
                print_json(rows)
            elif rows:
                stdout.print(table(rows, _SUMMARY))
            else:
                stdout.print("no runs yet: pgharness start INSTANCE")
            return
        row = progress_of(connection, run)
        if watch and not as_json:
            row = watch_run(connection, row["run_id"])
        elif as_json:
            print_json(row | {"combinations": database.rows(connection, "combination_scores", run_id=row["run_id"])})
        else:
            stdout.print(run_panel(connection, row))
    if code := _EXIT_BY_STATUS.get(row["status"]):
        raise typer.Exit(code)


_SUMMARY = (
    "run_id",
    "run",
    "kind",
    "status",
    "notes_succeeded",
    "note_count",
    "grades_succeeded",
    "grade_count",
    "cost_usd",
)


def progress_of(connection: Connection[Any], run: str) -> Row:
    """Return the run_progress row of a run given by id or name."""
    found = database.rows(connection, "run_progress", **run_of(run))
    if not found:
        raise NotFound(f"run {run} does not exist", hint="List runs: pgharness status")
    return found[0]


def run_panel(connection: Connection[Any], row: Row) -> Group:
    """Return a run's progress, its scores so far and its failures, for printing."""
    bars = Progress(TextColumn("{task.description:7}"), BarColumn(40), TextColumn("{task.fields[text]}"))
    for kind in ("note", "grade"):
        done, failed, planned = row[f"{kind}s_succeeded"], row[f"{kind}s_failed"], row[f"{kind}_count"]
        text = f"{done:,} of {planned:,}" + (f", {failed:,} failed" if failed else "")
        bars.add_task(f"{kind}s", total=max(planned, 1), completed=done if planned else 1, text=text)
    reason = f" ({row['reason']})" if row["reason"] else ""
    line = f"run {row['run_id']} ({row['run']}) is {row['status']}{reason}, cost {shown(row['cost_usd'])} USD"
    if row["status"] == "running" and row.get("eta") is not None:
        line += f", done about {shown(row['eta'])}"
    parts: list[Any] = [line, bars]
    if scores := database.rows(connection, "combination_scores", run_id=row["run_id"]):
        parts.append(table(scores, [name for name in _SCORES if name in scores[0]]))
    if failures := database.rows(connection, "failure_causes", run_id=row["run_id"]):
        parts.append(table(failures, [name for name in failures[0] if name not in ("run_id", "run")], title="failures"))
    return Group(*parts)


_SCORES = ("combination", "note_count", "grade_count", "mean_score", "standard_error", "ci_low", "ci_high")


def watch_run(connection: Connection[Any], run_id: int) -> Row:
    """Show a run until it ends or pauses; return its last progress row."""
    row = progress_of(connection, str(run_id))
    with Live(console=stdout, auto_refresh=False, transient=not stdout.is_terminal) as live:
        while True:
            live.update(run_panel(connection, row), refresh=True)
            if row["status"] != "running":
                return row
            time.sleep(_REFRESH_SECONDS)
            row = progress_of(connection, str(run_id))


# -- export


def export(
    context: typer.Context,
    view: Annotated[str, typer.Argument(help="A view or table of schema pgharness, for example grade_results.")],
    run: Annotated[str | None, typer.Option(help="Only this run, by id or name.")] = None,
    form: Annotated[Literal["jsonl", "csv"], typer.Option("--format", help="How to write rows.")] = "jsonl",
    out: Annotated[Path | None, typer.Option(help="File to write; default standard output.")] = None,
) -> None:
    """Write all rows of a view.

    Example: pgharness export grade_results --run demo/1 --format csv --out grades.csv
    """
    with session_of(context).connection() as connection:
        known = database.relations(connection)
        if view not in known:
            raise NotFound(f"there is no view {view!r}", hint=f"Choose one of: {', '.join(known)}.")
        filters: dict[str, Any] = {}
        if run is not None:
            if "run_id" not in known[view]:
                raise InvalidArgument(f"{view} has no runs to choose from", hint="Leave --run out.")
            filters["run_id"] = progress_of(connection, run)["run_id"]
        if out is None:
            _write_rows(connection, view, filters, form, sys.stdout)
            return
        partial = out.with_name(out.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            count = _write_rows(connection, view, filters, form, file)
        partial.replace(out)
        stderr.print(f"{count:,} rows written to {out}", markup=False)


def _write_rows(connection: Connection[Any], view: str, filters: dict[str, Any], form: str, file: IO[str]) -> int:
    count = 0
    for columns, rows in database.stream(connection, view, **filters):
        writer = csv.writer(file)
        if form == "csv":
            writer.writerow(columns)
        for row in rows:
            count += 1
            if form == "jsonl":
                file.write(json.dumps(dict(zip(columns, row, strict=True)), default=plain, ensure_ascii=False) + "\n")
            else:
                writer.writerow(
                    [
                        json.dumps(v, default=plain, ensure_ascii=False) if isinstance(v, dict | list) else plain(v)
                        for v in row
                    ]
                )
    return count


# -- worker


def worker(
    context: typer.Context,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Worker processes; about one per core.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, max=10_000, help="Calls in flight in each process.")] = 10,
    queues: Annotated[str, typer.Option(help="Which kinds of work to take: note, grade or both.")] = ",".join(QUEUES),
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run command and python models, which execute what database rows name.")
    ] = False,
    exit_when_idle: Annotated[bool, typer.Option("--exit-when-idle", help="End when no run is running.")] = False,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="What to log.")] = "warning",
) -> None:
    """Do the work of all runs, on any number of hosts at once; Ctrl-C or SIGTERM drains, a second one drops the calls.

    Example: pgharness worker --workers 4 --concurrency 50
    """
    session = session_of(context)
    chosen = tuple(name.strip() for name in queues.split(",") if name.strip())
    if not chosen or not set(chosen) <= set(QUEUES):
        raise InvalidArgument(f"--queues is {queues!r}", hint=f"Use some of: {','.join(QUEUES)}.")
    with session.connection():
        pass  # the schema is there, or this says what to do
    settings = session.settings
    if allow_code:
        settings = type(settings)(settings.database_url, settings.cache_root, True, settings.stale_seconds)
    level = getattr(logging, log_level.upper())
    options = WorkerOptions(session.url, settings, chosen, concurrency, level)
    stderr.print(
        f"{workers} worker(s) x {concurrency} calls on queues {', '.join(chosen)}; Ctrl-C drains", markup=False
    )
    code = Supervisor(options, workers, is_done=_nothing_runs(session.url) if exit_when_idle else None).run()
    if code:
        raise typer.Exit(code)


def _nothing_runs(url: str) -> Callable[[], bool]:
    def is_idle() -> bool:
        try:
            with database.connect(url) as connection:
                return not database.rows(connection, "runs", status="running", limit=1)
        except (HarnessError, *TRANSIENT):
            return False  # a database that is away says nothing about the runs

    return is_idle
