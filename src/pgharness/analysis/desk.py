"""Making the analyses that were asked for: a row says what, a process of its own computes it, the row keeps the result.

Nothing of it runs in a worker's event loop, and the memory is given back when it is done. A worker that dies leaves a
row that another takes; one that is told to stop does, too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from psycopg import Connection

from pgharness import __version__, database
from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError

logger = logging.getLogger(__name__)
_POLLING_SECONDS = 1.0
# without the working directory on the path, where a file of the user's may have a library's name
_COMMAND = (sys.executable, "-P", "-m", "pgharness.analysis")


class Analyses:
    """Takes analyses of a database one after the other; any number of workers may."""

    def __init__(self, pool: Database, *, worker_id: int) -> None:
        self._pool = pool
        self._worker_id = worker_id

    async def run(self) -> None:
        """Make what is asked for, until cancelled: whoever comes next makes what was begun."""
        while True:
            try:
                found = await self._pool.call("take_analysis", worker_id=self._worker_id)
                for row in found:
                    await self._make(row)
            except Exception as exc:  # whatever it is: the next look may succeed
                level = logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR
                logger.log(level, "no analysis could be made: %s", exc)
                found = []
            if not found:
                await asyncio.sleep(_POLLING_SECONDS)

    async def _make(self, row: Row) -> None:
        logger.info("analysis %s (%s) begins", row["id"], row["kind"])
        while True:
            outcome = await self._computed(row)
            if "transient" not in outcome:
                break
            logger.warning("analysis %s is tried again: %s", row["id"], outcome["transient"])
            await asyncio.sleep(_POLLING_SECONDS)
        function, arguments = _told(row, self._worker_id, outcome)
        await self._pool.persist(function, **arguments)

    async def _computed(self, row: Row) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the worker, which decides
        )
        try:
            out, err = await process.communicate(_question(row, self._pool.url))
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return _answer(process.returncode, out, err)


def make_here(connection: Connection[Any], url: str, analysis_id: int) -> bool:
    """Make one analysis as a worker would, where none runs; False when somebody else makes it or has made it."""
    worker_id = database.call(
        connection,
        "register_worker",
        host=socket.gethostname(),
        pid=os.getpid(),
        version=__version__,
        queues=[],
        concurrency=1,
    )[0]["register_worker"]
    try:
        taken = database.call(connection, "take_analysis", worker_id=worker_id, analysis_id=analysis_id)
        for row in taken:
            done = subprocess.run(_COMMAND, input=_question(row, url), capture_output=True, check=False)
            outcome = _answer(done.returncode, done.stdout, done.stderr)
            if "transient" in outcome:
                outcome = {"error": outcome["transient"], "hint": "Ask for it again."}
            function, arguments = _told(row, worker_id, outcome)
            database.call(connection, function, **arguments)
        return bool(taken)
    finally:
        database.call(
            connection, "heartbeat", worker_id=worker_id, in_flight={}, state="stopped", runs=[], jobs=[], spare=0
        )


def compute() -> None:
    """Be the process that computes: read a question from standard input, write its answer to standard output."""
    from pgharness.analysis.kinds import analyse, library_versions  # here: a worker does without numpy and scipy

    asked = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answer: dict[str, Any]
    try:
        with database.snapshot(asked["url"]) as connection:
            digest = database.call(connection, "analysis_digest", run_ids=asked["run_ids"])[0]["analysis_digest"]
            found = analyse(connection, asked["kind"], asked["run_ids"], asked["options"])
        answer = {"digest": digest or "", "versions": library_versions(), "result": found.as_dict()}
    except HarnessError as exc:
        answer = {"error": str(exc), "hint": exc.hint}
    except TRANSIENT as exc:
        answer = {"transient": str(exc)}
    json.dump(answer, sys.stdout, allow_nan=False)


def _end_with(parent: int) -> None:
    """End when the worker does: another makes the analysis then."""
    while os.getppid() == parent:
        time.sleep(_POLLING_SECONDS)
    os._exit(1)


def _question(row: Row, url: str) -> bytes:
    asked = {"url": url, "kind": row["kind"], "run_ids": row["run_ids"], "options": row["options"]}
    return json.dumps(asked).encode()  # not as an argument, which others could read: it may hold a password


def _answer(status: int | None, out: bytes, err: bytes) -> dict[str, Any]:
    if status == 0:
        found: dict[str, Any] = json.loads(out)
        return found
    text = err.decode(errors="replace").strip()
    logger.error("the process of an analysis ended with status %s\n%s", status, text)
    last = text.splitlines()[-1] if text else "it may lack memory"
    return {
        "error": f"the process that made it ended with status {status}: {last}",
        "hint": "This is a defect of pgharness, or too little memory: the worker's log has more.",
    }


def _told(row: Row, worker_id: int, outcome: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the function that keeps an outcome, and its arguments."""
    whose = {"analysis_id": row["id"], "worker_id": worker_id}
    if "error" in outcome:
        return "fail_analysis", whose | {"error": outcome["error"], "hint": outcome["hint"]}
    return "finish_analysis", whose | {
        "inputs_digest": outcome["digest"],
        "library_versions": outcome["versions"],
        "result": outcome["result"],
    }
