"""Making the reports that were asked for: a row says what, a process of its own computes it and keeps the files.

Nothing of it runs in a worker's event loop, and the memory is given back when it is done. A worker that dies, or is
told to stop, leaves a row that another takes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from pgharness import __version__, database
from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError

logger = logging.getLogger(__name__)
_POLLING_SECONDS = 1.0
# without the working directory on the path, where a file of the user's may have a library's name
_COMMAND = (sys.executable, "-P", "-m", "pgharness.report")
_TRY_AGAIN = 75  # the exit status of a process that lost the database


class Reports:
    """Makes the reports asked for in a database, one after the other; any number of workers may."""

    def __init__(self, pool: Database, *, worker_id: int) -> None:
        self._pool = pool
        self._worker_id = worker_id

    async def run(self) -> None:
        """Make what is asked for, until cancelled: whoever comes next makes what was begun."""
        while True:
            found: list[Row] = []
            try:
                found = await self._pool.call("take_report", worker_id=self._worker_id)
                for row in found:
                    await self._make(row)
            except Exception as exc:  # whatever it is: the next look may succeed
                level = logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR
                logger.log(level, "no report could be made: %s", exc)
            if not found:
                await asyncio.sleep(_POLLING_SECONDS)

    async def _make(self, row: Row) -> None:
        logger.info("report %s begins", row["id"])
        while (ended := await self._computed(row))[0] == _TRY_AGAIN:
            logger.warning("report %s is tried again: %s", row["id"], ended[1])
            await asyncio.sleep(_POLLING_SECONDS)
        status, said = ended
        if status != 0:
            logger.error("the process of report %s ended with status %s\n%s", row["id"], status, said)
            last = said.splitlines()[-1] if said else "it may lack memory"
            error = f"the process that made it ended with status {status}: {last}"
            hint = "This is a defect of pgharness, or too little memory: the worker's log has more."
            await self._pool.persist(
                "fail_report", report_id=row["id"], worker_id=self._worker_id, error=error, hint=hint
            )

    async def _computed(self, row: Row) -> tuple[int | None, str]:
        """Let a process make a report; return its exit status and what it said."""
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the worker, which decides
        )
        names = ("id", "worker_id", "run_ids", "formats", "alpha")
        # not as an argument, which others could read: it may hold a password
        asked = json.dumps({name: row[name] for name in names} | {"url": self._pool.url}).encode()
        try:
            _, err = await process.communicate(asked)
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return process.returncode, err.decode(errors="replace").strip()


def compute() -> None:
    """Be the process that makes a report: read what is asked from standard input, keep the files in the database."""
    from pgharness.report.files import files_of  # here: a worker does without numpy, scipy and matplotlib
    from pgharness.report.gathering import gather

    asked: dict[str, Any] = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    whose = {"report_id": asked["id"], "worker_id": asked["worker_id"]}
    try:
        try:
            with database.snapshot(asked["url"]) as connection:
                report = gather(connection, [str(run) for run in asked["run_ids"]], alpha=asked["alpha"])
            files = [
                {"path": f.path, "media_type": f.media_type, "content": base64.b64encode(f.content).decode()}
                for f in files_of(report, asked["formats"])
            ]
            told = {"title": report.title, "version": __version__, "files": json.dumps(files)}
            function = "finish_report"
        except HarnessError as exc:
            function, told = "fail_report", {"error": str(exc), "hint": exc.hint or ""}
        with database.connect(asked["url"]) as connection:
            database.call(connection, function, **whose, **told)
    except TRANSIENT as exc:
        print(exc, file=sys.stderr)
        sys.exit(_TRY_AGAIN)


def _end_with(parent: int) -> None:
    """End when the worker does: another makes the report then."""
    while os.getppid() == parent:
        time.sleep(_POLLING_SECONDS)
    os._exit(1)
