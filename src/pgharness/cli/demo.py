"""`pgharness demo`: a whole experiment on simulated models, in half a minute."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Annotated, Any

import typer
from psycopg import Connection

from pgharness import database, schema
from pgharness.cli.runs import RunPanel, watch_run
from pgharness.cli.session import Session, session_of, stderr, stdout, table, usd
from pgharness.database import TRANSIENT, Row
from pgharness.errors import Conflict, HarnessError, SchemaOutOfDate

_PRIORITY = 100  # before the work of other runs on a shared server: it is over in seconds
_CALLS: dict[str, Any] = {
    "model": "model",
    "kind": "kind",
    "calls": "call_count",
    "succeeded": "calls_succeeded",
    "median": lambda row: "-" if row["latency_p50_ms"] is None else f"{row['latency_p50_ms'] / 1000:.2f} s",
    "tokens": lambda row: row["input_tokens"] + row["output_tokens"],
    "USD": lambda row: usd(row["cost_usd"]),
}


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    context: typer.Context, workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 2
) -> None:
    """Define, run and read a small experiment on simulated models: no network, no key, no cost, under half a minute.

    Example: pgharness demo
    """
    session = session_of(context)
    script = schema.packaged("experiments") / "demo" / "demo.sql"
    with session.connection(checked=False) as connection:
        try:
            schema.verify(connection)
        except SchemaOutOfDate:
            schema.upgrade(connection)
        database.call(connection, "load_run", run_id=0)  # a role that may not work is told before anything is made
        combinations = database.rows(connection, "model_combinations", instance="demo")
        if any(not row["generator"].startswith("demo/") for row in combinations):
            raise Conflict(
                'there is an instance "demo" with models of your own, which the demo would run',
                hint="Rename it: update pgharness.instances set name = 'mine' where name = 'demo';",
            )
        database.run_script(connection, script.read_text(encoding="utf-8"))
        plan = database.rows(connection, "expected_workload", instance="demo")[0]
        stdout.print(
            "Two simulated models write notes of invented consultations; a third grades\n"
            "them by the rubrics of two clinicians. Does the careful model earn its price?\n\n"
            f"planned: {plan['note_count']} notes of {plan['case_count']} consultations, {plan['grade_count']} grades, "
            f"about {usd(plan['cost_usd'])} USD",
            soft_wrap=True,
        )
        run_id = database.call(connection, "start_run", instance="demo", priority=_PRIORITY)[0]["run_id"]
        try:
            row = _watch(session, connection, run_id, workers)
        except BaseException as exc:
            with suppress(HarnessError, *TRANSIENT):  # nobody would work on it, or another's workers would
                database.call(connection, "cancel_run", run_id=run_id, reason="the demo was interrupted")
            if not isinstance(exc, KeyboardInterrupt):
                raise
            stderr.print("interrupted, and its run cancelled")
            raise typer.Exit(130) from None
        stdout.print(RunPanel(connection).of(row))
        if row["status"] != "completed":
            raise HarnessError(f"the demo run is {row['status']}", hint=f"Look further: pgharness status {run_id}")
        calls = database.rows(connection, "model_performance", run_id=run_id)
        stdout.print(table(calls, _CALLS, title="\ncalls (faults, tokens and prices are simulated)"))
    stdout.print("\n" + _LOOK_FURTHER.format(run_id=run_id, script=script), markup=False, soft_wrap=True)


def _watch(session: Session, connection: Connection[Any], run_id: int, workers: int) -> Row:
    """Do the run's work in worker processes of our own and show it; raise what they say when they give up."""
    command = [sys.executable, "-m", "pgharness", "worker", "--workers", str(workers), "--concurrency", "10"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--log-level", "error"], env=session.environment, stderr=log)

        def check() -> None:
            if process.poll() is not None:
                log.seek(0)
                raise HarnessError("the demo's workers ended before their work", detail=log.read().strip()[-2000:])

        try:
            return watch_run(connection, run_id, check=check)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


_LOOK_FURTHER = """\
Is the difference more than chance?      pgharness analyse compare {run_id}
The whole of it as a page to hand over:  pgharness report {run_id} --out report

Every number is a row. Look further with `pgharness db psql`:

  select case_name, combination, rubric_author, mean_score, replication_sd
    from pgharness.scores where run_id = {run_id} order by 1, 2, 3;
  select case_name, combination, score, note
    from pgharness.note_results where run_id = {run_id} order by score limit 3;
  select case_name, criterion, satisfaction, rationale
    from pgharness.criterion_results where run_id = {run_id} limit 10;
  select combination, author_a, author_b, mean_difference, correlation
    from pgharness.author_agreement where run_id = {run_id};
  \\dv+ pgharness.*

The experiment is plain SQL, to copy and change: {script}"""
