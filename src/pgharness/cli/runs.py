"""Commands around runs: start, status, cancel, pause, resume, adjust, retry, rerun, export, worker."""

from __future__ import annotations

import csv
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import typer
from psycopg import Connection
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from pgharness import database
from pgharness.cli.session import Json, Run, duration, plain, print_json, session_of, stderr, stdout, table, usd
from pgharness.database import TRANSIENT, Row
from pgharness.errors import HarnessError, InvalidArgument, NotFound


def _usd(text: str) -> Decimal:
    try:
        amount = Decimal(text)
        if Decimal("0.000001") <= amount < 1_000_000:
            return amount
    except InvalidOperation:
        pass
    raise typer.BadParameter(f"{text!r} is not an amount of USD above 0 and below 1,000,000.")


def _named(name: str | None) -> str | None:
    if name is not None and not name.strip():
        raise typer.BadParameter("it is empty.")
    return name


Kind = Literal["trial", "milestone"]
Cache = Annotated[
    Literal["off", "read", "write", "replay"] | None,
    typer.Option("--cache", help="Whether answers come from the response cache, and new ones go there."),
]
Key = Annotated[str | None, typer.Option(callback=_named, help="A second start with this key returns the first run.")]
Budget = Annotated[Decimal | None, typer.Option(metavar="USD", parser=_usd, help="Pause when so much is spent.")]

EXIT_BY_STATUS = {"failed": 5, "cancelled": 5, "paused": 6}
_REFRESH_SECONDS = 0.5
_LINE_SECONDS = 5.0
_PATIENCE_SECONDS = 5.0


def add_to(app: typer.Typer) -> None:
    app.command()(estimate)
    app.command()(start)
    app.command()(status)
    for name, function, text in (
        ("cancel", "cancel_run", "Stop a run; calls in flight are aborted, what is done is kept."),
        ("pause", "pause_run", "Stop starting calls of a run; those in flight end and are kept."),
        ("retry", "retry_failed", "Try the failed notes and grades of a run again."),
    ):
        app.command(name, help=f"{text}\n\nExample: pgharness {name} demo/1")(_control(function))
    app.command()(resume)
    app.command()(adjust)
    app.command()(rerun)
    app.command()(export)
    app.command()(worker)


def _print_receipt(connection: Connection[Any], row: Row, as_json: bool) -> None:
    if as_json:
        print_json(row)
        return
    reason = f" ({row['reason']})" if row["reason"] else ""
    is_code = not row["notes"]
    planned = "" if is_code else f": {row['notes']:,} notes, {row['grades']:,} grades planned"
    stdout.print(Text(f"run {row['run_id']} ({row['run']}) is {row['status']}{reason}{planned}"))
    if row["status"] == "running":
        if not database.rows(connection, "worker_health", status="running", limit=1):
            stdout.print("No worker is running: pgharness worker" + ("" if is_code else " --workers 2"))
        stdout.print(Text(f"Watch it: pgharness status {shlex.quote(row['run'])} --watch"))


def _control(function: str) -> Callable[..., None]:
    def command(context: typer.Context, run: Run, as_json: Json = False) -> None:
        with session_of(context).connection() as connection:
            _print_receipt(connection, database.call(connection, function, run=run)[0], as_json)

    return command


def estimate(
    context: typer.Context,
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance's name.")],
    as_json: Json = False,
) -> None:
    """Say what a run of an instance would come to: notes, grades, and their cost with a 90% interval.

    Example: pgharness estimate triage-v2
    """
    with session_of(context).connection() as connection:
        found = database.rows(connection, "expected_workload", instance=instance)
        if not found:
            raise NotFound(f'instance "{instance}" does not exist', hint="List them: pgharness instances list")
        plan = found[0]
        combinations = database.rows(connection, "expected_costs", instance=instance)
    if as_json:
        print_json(plan | {"combinations": combinations})
        return
    stdout.print(
        f"{instance}: {plan['note_count']:,} notes, {plan['grade_count']:,} grades, about {usd(plan['cost_usd'])} USD "
        f"({usd(plan['low_cost_usd'])} to {usd(plan['high_cost_usd'])}), by {plan['cost_basis']}",
        markup=False,
        soft_wrap=True,
    )
    columns: dict[str, Any] = {"combination": "combination", "notes": "note_count", "grades": "grade_count"}
    columns["USD"] = lambda row: usd(row["note_cost_usd"] + row["grade_cost_usd"])
    columns["from"] = lambda row: usd(row["low_cost_usd"])
    columns["to"] = lambda row: usd(row["high_cost_usd"])
    stdout.print(table(combinations, columns))
    for model in plan["unpriced_models"]:
        stdout.print(f"without a price, so counted as free: {model}", markup=False)
    for problem in plan["problems"]:
        stdout.print(f"cannot start: {problem}", markup=False)


def start(
    context: typer.Context,
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="An instance's name or id.")],
    kind: Annotated[Kind, typer.Option(help="What the run is for.")] = "trial",
    budget: Budget = None,
    priority: Annotated[int, typer.Option(min=-1000, max=1000, help="Higher goes first.")] = 0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, metavar="CALLS", help="Calls in flight on all workers together, at most.")
    ] = None,
    name: Annotated[str | None, typer.Option(callback=_named, help="Its name; default INSTANCE/NUMBER.")] = None,
    batch_deadline: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="Ask in vendors' batches, and live what they lack by then; 0: live."
        ),
    ] = None,
    cache: Cache = None,
    idempotency_key: Key = None,
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
            max_concurrency=max_concurrency,
            name=name,
            batch_deadline_seconds=batch_deadline,
            response_cache=cache,
            idempotency_key=idempotency_key,
        )
        _print_receipt(connection, receipt[0], as_json)


def rerun(
    context: typer.Context,
    run: Run,
    kind: Annotated[Kind | None, typer.Option(help="What the new run is for; default as the earlier one.")] = None,
    cache: Cache = None,
    idempotency_key: Key = None,
    as_json: Json = False,
) -> None:
    """Start a new run with the frozen definition of an earlier one.

    With --cache replay, a run that kept its answers is made again without asking a model.

    Example: pgharness rerun demo/1 --kind milestone
    """
    with session_of(context).connection() as connection:
        options = {"kind": kind, "response_cache": cache, "idempotency_key": idempotency_key}
        receipt = database.call(connection, "rerun", run=run, **options)
        _print_receipt(connection, receipt[0], as_json)


def resume(context: typer.Context, run: Run, budget: Budget = None, as_json: Json = False) -> None:
    """Continue a paused or cancelled run with what it has not done yet, with another budget if you give one.

    Example: pgharness resume demo/1 --budget 20
    """
    with session_of(context).connection() as connection:
        receipt = database.call(connection, "resume_run", run=run, budget_usd=budget)
        _print_receipt(connection, receipt[0], as_json)


def adjust(
    context: typer.Context,
    run: Run,
    priority: Annotated[int | None, typer.Option(min=-1000, max=1000, help="Higher goes first.")] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=0, metavar="CALLS", help="Calls in flight on all workers together; 0: no limit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Change how a run shares the workers with others, while it runs.

    Example: pgharness adjust demo/1 --priority 5
    """
    with session_of(context).connection() as connection:
        receipt = database.call(connection, "adjust_run", run=run, priority=priority, max_concurrency=max_concurrency)
        _print_receipt(connection, receipt[0], as_json)


# -- status


def status(
    context: typer.Context,
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="A run's name or id; default the latest runs.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait until it ends or pauses, showing it meanwhile.")] = False,
    as_json: Json = False,
) -> None:
    """Show how runs stand. Exit status of a run: 0 completed or running, 5 failed or cancelled, 6 paused.

    Example: pgharness status demo/1 --watch
    """
    if watch and run is None:
        raise typer.BadParameter("it needs a RUN to watch.", param_hint="--watch")
    with session_of(context).connection() as connection:
        if run is None:
            _print_latest(connection, as_json)
            return
        row = progress_of(connection, run)
        if watch:
            try:
                row = watch_run(connection, row["run_id"], is_silent=as_json)
            except KeyboardInterrupt:
                stderr.print(Text(f"\nrun {row['run_id']} goes on; cancel it with: pgharness cancel {row['run_id']}"))
                raise typer.Exit(130) from None
        if as_json:
            print_json(row | {"combinations": database.rows(connection, "combination_scores", run_id=row["run_id"])})
        else:
            stdout.print(RunPanel(connection).of(row))
    if code := EXIT_BY_STATUS.get(row["status"]):
        raise typer.Exit(code)


def _print_latest(connection: Connection[Any], as_json: bool) -> None:
    rows = sorted(database.rows(connection, "run_progress"), key=lambda row: -row["run_id"])
    if as_json:
        print_json(rows)
    elif rows:
        columns: dict[str, Any] = {
            "id": "run_id",
            "run": "run",
            "kind": "kind",
            "status": "status",
            "notes": lambda row: f"{row['notes_succeeded']:,}/{row['note_count']:,}",
            "grades": lambda row: f"{row['grades_succeeded']:,}/{row['grade_count']:,}",
            "failed": lambda row: row["notes_failed"] + row["grades_failed"] + row["tasks_failed"],
            "USD": lambda row: usd(row["cost_usd"]),
        }
        if any(row["task_count"] for row in rows):
            columns["tasks"] = lambda row: f"{row['tasks_succeeded']:,}/{row['task_count']:,}" * bool(row["task_count"])
        stdout.print(table(rows[:20], columns))
        if len(rows) > 20:
            stdout.print(f"{len(rows) - 20:,} older runs: pgharness status --json, or select * from run_progress")
    else:
        stdout.print("No runs yet: pgharness start INSTANCE, or see one: pgharness demo")


def progress_of(connection: Connection[Any], run: str) -> Row:
    """Return the run_progress row of a run given by name or id."""
    found = database.rows(connection, "run_progress", run=run)
    if not found and run.isascii() and run.isdecimal() and len(run) < 19:
        found = database.rows(connection, "run_progress", run_id=int(run))
    if not found:
        raise NotFound(f'run "{run}" does not exist', hint="List runs: pgharness status")
    return found[0]


def watch_run(
    connection: Connection[Any],
    run_id: int,
    *,
    is_silent: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Row:
    """Show a run until it ends or pauses; return its last progress row. `check` may raise to give up.

    A terminal shows one panel, drawn anew; anything else gets a line now and then.
    """
    started_at, line_at, last = time.monotonic(), 0.0, ""
    panel = RunPanel(connection)
    is_live = stdout.is_terminal and not is_silent
    with Live(console=stdout, auto_refresh=False, transient=True) if is_live else nullcontext() as live:
        while True:
            found = database.rows(connection, "run_progress", run_id=run_id)
            if not found:
                raise NotFound(f"run {run_id} was deleted", hint="List runs: pgharness status")
            row = found[0]
            if row["status"] != "running":
                return row
            check()
            now = time.monotonic()
            if live:
                live.update(panel.of(row, is_patient=now < started_at + _PATIENCE_SECONDS), refresh=True)
            elif not is_silent and now >= line_at and (line := _progress_line(row)) != last:
                stdout.print(Text(line))
                line_at, last = now + _LINE_SECONDS, line
            time.sleep(_REFRESH_SECONDS)


class RunPanel:
    """A run as people look at it; what is read from all its grades is read anew at a pace that the database stands."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection
        self._details: list[RenderableType] = []
        self._read_at = 0.0

    def of(self, row: Row, *, is_patient: bool = False) -> Group:
        """Return a run's state, progress, cost, scores and failures; `is_patient` lets it stand still for now."""
        is_running = row["status"] == "running"
        if not is_running or time.monotonic() >= self._read_at:
            begun = time.monotonic()
            self._details = self._read(row["run_id"])
            self._read_at = time.monotonic() + 20 * (time.monotonic() - begun)
        parts: list[RenderableType] = [Text(_state_line(row)), _bars(row), Text(_cost_line(row))]
        if is_running and not is_patient:
            stalled = database.rows(self._connection, "stalled_work", run_id=row["run_id"])
            parts += [Text(f"stalled: {found['problem']}; {found['remedy']}", style="yellow") for found in stalled]
        return Group(*parts, *self._details, *map(Text, _next_steps(row)))

    def _read(self, run_id: int) -> list[RenderableType]:
        scores = database.rows(self._connection, "combination_scores", run_id=run_id)
        failures = database.rows(self._connection, "failure_causes", run_id=run_id)
        details: list[RenderableType] = []
        if any(row["mean_score"] is not None for row in scores):
            title = "\nscores (0 to 1), with 95% confidence intervals clustered by case"
            details.append(table(scores, _SCORES, title=title))
        if failures:
            failures.sort(key=lambda row: (-row["items_failed"], -row["items_waiting"], -row["calls_failed"]))
            title = "\nfailed calls, and how many items wait for their next try or failed for good"
            details.append(table(failures[:10], _FAILURES, title=title))
        return details


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["confidence_low"], row["confidence_high"]
    return "-" if low is None else f"{low:.2f} to {high:.2f}"


_SCORES: dict[str, Any] = {
    "combination": "combination",
    "score": lambda row: None if row["mean_score"] is None else f"{row['mean_score']:.3f}",
    "95% interval": _interval,
    "cases": "case_count",
    "notes": "note_count",
    "grades": "grade_count",
}
_FAILURES: dict[str, Any] = {
    "kind": "kind",
    "cause": "cause",
    "calls": "calls_failed",
    "waiting": "items_waiting",
    "failed": "items_failed",
    "for example": lambda row: shortened(row["example_error"] or "", 120),
}


def shortened(text: str, length: int) -> str:
    """Return the beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _bars(row: Row) -> Progress:
    bars = Progress(TextColumn("{task.description:6}"), BarColumn(40), TextColumn("{task.fields[text]}"))
    for kind in ("note", "grade", "task"):
        planned, done = row[f"{kind}_count"], row[f"{kind}s_succeeded"]
        if not planned:
            continue
        text = f"{done:,} of {planned:,}"
        for state in ("failed", "skipped", "running", "waiting"):
            count = row.get(f"{kind}s_{state}")  # notes are never skipped
            text += f", {count:,} {state}" if count else ""
        bars.add_task(f"{kind}s", total=planned, completed=done, text=text)
    return bars


def _state_line(row: Row) -> str:
    line = f"run {row['run_id']} ({row['run']}) is {row['status']}"
    if row["status"] == "running":
        line += f", {row['percent_done']}% done"
        if row["seconds_left"] is not None:
            line += f", about {duration(row['seconds_left'])} left"
    else:
        line += f" after {duration(row['active_seconds'])}"
    return line + (f"\nbecause {row['reason']}" if row["reason"] else "")


def _cost_line(row: Row) -> str:
    line = f"cost   {usd(row['cost_usd'])} USD"
    if row["status"] == "running" and row["projected_cost_usd"] is not None:
        line += f" of about {usd(row['projected_cost_usd'])}"
    if row["budget_usd"] is not None:
        line += f", budget {usd(row['budget_usd'])}"
    if row["worker_count"]:
        line += f"; {row['worker_count']} workers, {row['notes_running'] + row['grades_running']} calls in flight"
    return line


def _progress_line(row: Row) -> str:
    if row["task_count"]:
        said = f" ({row['message']})" if row["message"] else ""
        done = f"{row['tasks_succeeded']:,} of {row['task_count']:,} tasks so far"
        return f"{row['percent_done']}% done{said}: {done}, {usd(row['cost_usd'])} USD"
    return (
        f"{row['percent_done']}% done: {row['notes_succeeded']:,} of {row['note_count']:,} notes, "
        f"{row['grades_succeeded']:,} of {row['grade_count']:,} grades, {usd(row['cost_usd'])} USD"
    )


def _next_steps(row: Row) -> list[str]:
    name = shlex.quote(row["run"])
    if row["status"] in ("paused", "cancelled"):
        is_spent = row["budget_usd"] is not None and row["cost_usd"] >= row["budget_usd"]
        return [f"continue it: pgharness resume {name}" + (" --budget USD" if is_spent else "")]
    if row["status"] != "running" and (row["notes_failed"] or row["grades_failed"] or row["tasks_failed"]):
        return [f"try what failed again: pgharness retry {name}"]
    return []


# -- export


def export(
    context: typer.Context,
    view: Annotated[str, typer.Argument(metavar="VIEW", help="A view or table of schema pgharness.")],
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Only this run, by name or id.")] = None,
    form: Annotated[Literal["jsonl", "csv"], typer.Option("--format", help="How to write rows.")] = "jsonl",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="File to write; default standard output.")
    ] = None,
) -> None:
    """Write all rows of a view; a file appears when it is whole.

    Example: pgharness export grade_results --run demo/1 --format csv --out grades.csv
    """
    with session_of(context).connection() as connection:
        filters = _export_filters(connection, view, run)
        if out is None:
            _write_rows(connection, view, filters, form, sys.stdout)
            return
        partial = out.with_name(f"{out.name}.partial")
        try:
            with partial.open("w", newline="", encoding="utf-8") as file:
                count = _write_rows(connection, view, filters, form, file)
            partial.replace(out)
        except OSError as exc:
            raise HarnessError(f"{out} cannot be written: {exc.strerror}", hint="Choose another --out.") from exc
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
    stderr.print(Text(f"{count:,} rows written to {out}"), soft_wrap=True)


def _export_filters(connection: Connection[Any], view: str, run: str | None) -> dict[str, Any]:
    """Return the filter for a run. Raises NotFound for an unknown view or run."""
    known = database.relations(connection)
    if view not in known:
        close = get_close_matches(view, known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"Choose one of: {', '.join(known)}."
        raise NotFound(f'there is no view "{view}"', hint=hint)
    if run is None:
        return {}
    column = "id" if view == "runs" else "run_id"
    if column not in known[view]:
        raise InvalidArgument(f"{view} is not about runs", hint="Leave --run out.")
    return {column: progress_of(connection, run)["run_id"]}


def _write_rows(connection: Connection[Any], view: str, filters: dict[str, Any], form: str, file: IO[str]) -> int:
    count = 0
    for columns, rows in database.stream(connection, view, **filters):
        writer = csv.writer(file, lineterminator="\n")
        if form == "csv":
            writer.writerow(columns)
        for row in rows:
            count += 1
            if form == "csv":
                writer.writerow([_json(value) if isinstance(value, dict | list) else plain(value) for value in row])
            else:
                file.write(_json(dict(zip(columns, row, strict=True))) + "\n")
    return count


def _json(value: Any) -> str:
    return json.dumps(value, default=plain, ensure_ascii=False)


# -- worker


def worker(
    context: typer.Context,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Worker processes; about one per core.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, max=10_000, help="Calls in flight in each process.")] = 10,
    queues: Annotated[
        str | None,
        typer.Option(help="The work to take, of note, grade and task (code); default all, code where there is some."),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=64, help="Runs of code at once, each in a process of its own.")] = 4,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run command and python models, which execute what database rows name.")
    ] = False,
    exit_when_idle: Annotated[bool, typer.Option("--exit-when-idle", help="End when no run is running.")] = False,
    log_level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="What to log.")] = "warning",
) -> None:
    """Do the work of all runs, on any number of hosts at once; Ctrl-C or SIGTERM drains, a second one drops the calls.

    Example: pgharness worker --workers 4 --concurrency 50
    """
    # here, for they take half a second to import
    from pgharness.queue import CODE_QUEUE, QUEUES
    from pgharness.sdk.discovery import default_sources, holds_code
    from pgharness.worker import Supervisor, WorkerOptions

    session = session_of(context)
    if queues is None:
        has_code = holds_code(default_sources(session.settings.experiments or None))
        queues = ",".join(QUEUES if has_code else [name for name in QUEUES if name != CODE_QUEUE])
    chosen = tuple(name.strip() for name in queues.split(",") if name.strip())
    if not chosen or not set(chosen) <= set(QUEUES):
        raise typer.BadParameter(f"{queues!r} is not one of {', '.join(QUEUES)}, nor several with commas between.")
    with session.connection() as connection:
        database.call(connection, "load_run", run_id=0)  # a schema or role that is not fit for work is told at once
    settings = session.settings
    settings = replace(settings, allows_code=settings.allows_code or allow_code)
    level = getattr(logging, log_level.upper())
    options = WorkerOptions(session.url, settings, chosen, concurrency, level, most_runs=runs)
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
                is_running = bool(database.rows(connection, "runs", status="running", limit=1))
                if any(
                    database.rows(connection, asked, status=status, limit=1)
                    for asked in ("analyses", "reports")
                    for status in ("pending", "running")
                ):
                    return False
                # what a vendor has of a run that was cancelled costs money until it is cancelled there
                return not is_running and not database.rows(connection, "batches_progress", is_open=True, limit=1)
        except (HarnessError, *TRANSIENT):
            return False  # a database that is away says nothing about the runs

    return is_idle
