"""`pgharness demo`: a whole experiment on simulated models, in half a minute."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from pgharness import database, schema
from pgharness.cli.runs import watch_run
from pgharness.cli.session import session_of, shown, stdout, table
from pgharness.errors import HarnessError

_SCORES = ("combination", "mean_score", "standard_error", "ci_low", "ci_high", "note_count", "grade_count")


def add_to(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    context: typer.Context, workers: Annotated[int, typer.Option(min=1, max=16, help="Worker processes.")] = 2
) -> None:
    """Define, run and read a small experiment: two simulated models write notes, a third grades them by rubrics.

    Example: pgharness demo
    """
    session = session_of(context)
    script = schema.packaged("experiments") / "demo" / "demo.sql"
    with session.connection(checked=False) as connection:
        schema.upgrade(connection)
        database.run_script(connection, script.read_text())
        workload = database.rows(connection, "expected_workload", instance="demo")[0]
        stdout.print(
            f"experiment 'demo': {workload['case_count']} consultations, {workload['combination_count']} model combinations, "
            f"{workload['note_count']} notes, {workload['grade_count']} grades planned"
        )
        receipt = database.call(connection, "start_run", instance="demo")[0]
        command = [sys.executable, "-m", "pgharness", "worker", "--workers", str(workers), "--concurrency", "10"]
        process = subprocess.Popen(
            [*command, "--exit-when-idle", "--log-level", "error"], env=session.environment, stderr=subprocess.DEVNULL
        )
        try:
            row = watch_run(connection, receipt["run_id"])
        finally:
            process.terminate()
            process.wait(timeout=60)
        if row["status"] != "completed":
            raise HarnessError(
                f"the demo run is {row['status']}: {row['reason']}", hint="Look further: pgharness status --json"
            )
        run_id = receipt["run_id"]
        stdout.print(
            table(database.rows(connection, "combination_scores", run_id=run_id), _SCORES, title="scores (0 to 1)")
        )
        stdout.print(f"cost: {shown(row['cost_usd'])} USD (simulated)")
    stdout.print(
        f"""
Look further with `pgharness db psql`:
  select * from pgharness.run_progress where run_id = {run_id};
  select * from pgharness.scores where run_id = {run_id};
  select * from pgharness.grade_results where run_id = {run_id} limit 10;
  select * from pgharness.model_performance where run_id = {run_id};
The experiment is plain SQL: {script}""",
        markup=False,
        soft_wrap=True,
    )
