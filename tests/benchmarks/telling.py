"""The figure of what code tells: its log and results written while it runs, compared with a COPY of as many rows."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bed import Bed, connected, scalar, timed
from figures import Line
from psycopg import Connection

_LINES = 100_000
_LINES_PER_RESULT = 10
_VISIBLE_MS = 200
_MESSAGE = "iteration {} of an experiment that says what it does"
_VALUE = {"iteration": 1, "model": "some model", "output": "what it answered, in a line or so of text"}
_CODE = f"""
    from pgharness import Context, experiment

    @experiment(name="teller")
    def teller(ctx: Context) -> None:
        for number in range({_LINES}):
            ctx.info("{_MESSAGE}".format(number), number=number)
            if number % {_LINES_PER_RESULT} == 0:
                ctx.result(f"iteration_{{number}}", {_VALUE!r})
"""


def telling(bed: Bed) -> Iterator[Line]:
    """Time a run of code that tells much, by its rows, and a COPY of rows like them."""
    told, copied, delays = [], [], []
    with bed.database() as url, connected(url) as connection, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "teller.py").write_text(textwrap.dedent(_CODE))
        command = [sys.executable, "-m", "pgharness", "worker", "--queues", "task"]
        with bed.program(command, {"PGHARNESS_DATABASE_URL": url, "PGHARNESS_EXPERIMENTS": folder}) as program:
            served = "select 1 from pgharness.experiment_list where experiment = 'teller' and is_served"
            bed.wait_for(program, lambda: scalar(connection, served))
            connection.execute("insert into pgharness.instances (name, experiment) values ('teller', 'teller')")
            ended = "select 1 from pgharness.runs where id = %s and status <> 'running'"
            for _ in range(bed.repeats):
                run_id = scalar(connection, "select run_id from pgharness.start_run('teller')")
                bed.wait_for(program, lambda run_id=run_id: scalar(connection, ended, run_id))
                told.append(_seconds(connection, run_id))
                delays.append(_delay_ms(connection, run_id))
                copied.append(timed(lambda run_id=run_id: _copy(connection, run_id)))
                time.sleep(0.2)
    rows = f"{_LINES:,} lines and {_LINES // _LINES_PER_RESULT:,} results of one run"
    yield Line("telling", rows, "s", told, "COPY of rows like them", copied, at_most=2)
    yield Line(
        "telling",
        "from a line's being said to its commit, p95, while it says them as fast as it can",
        "ms",
        delays,
        "a commit of one row alone",
        [bed.commit_ms] * len(delays),
        limit=_VISIBLE_MS,
    )


def _seconds(connection: Connection[Any], run_id: int) -> float:
    """Return how long a run's function took, its last row written."""
    took = "select extract(epoch from finished_at - started_at)::float from pgharness.tasks where run_id = %s"
    count = scalar(connection, "select count(*) from pgharness.logs where run_id = %s and task = 0", run_id)
    if count != _LINES:
        raise RuntimeError(f"{_LINES:,} lines were said, and {count:,} are there")
    return float(scalar(connection, took, run_id))


def _delay_ms(connection: Connection[Any], run_id: int) -> float:
    found = connection.execute(
        "select extract(epoch from pg_xact_commit_timestamp(xmin) - created_at)::float from pgharness.logs"
        " where run_id = %s and task = 0",
        (run_id,),
    ).fetchall()
    return statistics.quantiles([delay * 1000 for (delay,) in found], n=20)[18]


def _copy(connection: Connection[Any], run_id: int) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        with cursor.copy("copy pgharness.logs (run_id, level, message, data) from stdin") as copy:
            for number in range(_LINES):
                copy.write_row((run_id, "info", _MESSAGE.format(number), json.dumps({"number": number})))
        with cursor.copy("copy pgharness.results (run_id, key, value) from stdin") as copy:
            for number in range(0, _LINES, _LINES_PER_RESULT):
                copy.write_row((run_id, f"iteration_{number}", json.dumps(_VALUE)))
