"""Making what is asked for: a row says which analysis or report, a process of its own makes it, the row keeps it.

Nothing of it runs in a worker's event loop, and the memory is given back when it is done. A worker that dies, or is
told to stop, leaves a row that another takes.
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
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from psycopg import Connection

from pgharness import __version__, database
from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError

logger = logging.getLogger(__name__)
Kind = Literal["analysis", "report"]
"""What is made: `python -m pgharness.KIND` makes it, and the functions take_KIND, finish_KIND and fail_KIND keep it."""

_POLLING_SECONDS = 1.0
_TRY_AGAIN = 75  # the exit status of a process that lost the database


class Desk:
    """Makes what is asked for of one kind, one after the other; any number of workers may."""

    def __init__(self, pool: Database, kind: Kind, *, worker_id: int) -> None:
        self._pool = pool
        self._kind = kind
        self._worker_id = worker_id

    async def run(self) -> None:
        """Make what is asked for, until cancelled: whoever comes next makes what was begun."""
        while True:
            found: list[Row] = []
            try:
                found = await self._pool.call(f"take_{self._kind}", worker_id=self._worker_id)
                for row in found:
                    await self._make(row)
            except Exception as exc:  # whatever it is: the next look may succeed
                level = logging.WARNING if isinstance(exc, TRANSIENT) else logging.ERROR
                logger.log(level, "no %s could be made: %s", self._kind, exc)
            if not found:
                await asyncio.sleep(_POLLING_SECONDS)

    async def _make(self, row: Row) -> None:
        logger.info("%s %s begins", self._kind, row["id"])
        while (ended := await self._ended(row))[0] == _TRY_AGAIN:
            logger.warning("%s %s is tried again: %s", self._kind, row["id"], ended[1])
            await asyncio.sleep(_POLLING_SECONDS)
        if ended[0] != 0:
            await self._pool.persist(f"fail_{self._kind}", **_failure(self._kind, row, *ended))

    async def _ended(self, row: Row) -> tuple[int, str]:
        """Let a process make it; return its exit status and what it said."""
        process = await asyncio.create_subprocess_exec(
            *_command(self._kind),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the worker, which decides
        )
        try:
            _, said = await process.communicate(_question(row, self._pool.url))
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        return process.returncode, _text(said)


def make_here(connection: Connection[Any], url: str, kind: Kind, row_id: int) -> bool:
    """Make one as a worker would, where none runs; False when somebody else makes it or has made it."""
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
        taken = database.call(connection, f"take_{kind}", worker_id=worker_id, **{f"{kind}_id": row_id})
        for row in taken:
            done = subprocess.run(_command(kind), input=_question(row, url), capture_output=True, check=False)
            if done.returncode != 0:
                database.call(connection, f"fail_{kind}", **_failure(kind, row, done.returncode, _text(done.stderr)))
        return bool(taken)
    finally:
        database.call(
            connection, "heartbeat", worker_id=worker_id, in_flight={}, state="stopped", runs=[], jobs=[], spare=0
        )


def serve(kind: Kind, make: Callable[[str, Row], dict[str, Any]]) -> None:
    """Be the process that makes one: read the question from standard input, keep the answer in the database.

    `make` gets the database's URL and the row, and returns what finish_KIND keeps. Exits with 75 when the database went
    away.
    """
    asked = json.load(sys.stdin)
    row, url = asked["row"], asked["url"]
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        try:
            function, told = f"finish_{kind}", make(url, row)
        except HarnessError as exc:
            function, told = f"fail_{kind}", {"error": str(exc), "hint": exc.hint or ""}
        with database.connect(url) as connection:
            database.call(connection, function, **_whose(kind, row), **told)
    except TRANSIENT as exc:
        print(exc, file=sys.stderr)
        sys.exit(_TRY_AGAIN)


def _end_with(parent: int) -> None:
    """End when the worker does: another makes it then."""
    while os.getppid() == parent:
        time.sleep(_POLLING_SECONDS)
    os._exit(1)


def _command(kind: Kind) -> tuple[str, ...]:
    # without the working directory on the path, where a file of the user's may have a library's name
    return (sys.executable, "-P", "-m", f"pgharness.{kind}")


def _question(row: Row, url: str) -> bytes:
    # not as an argument, which others could read: it may hold a password
    return json.dumps({"url": url, "row": row}, default=str).encode()


def _text(said: bytes) -> str:
    return said.decode(errors="replace").strip()


def _whose(kind: Kind, row: Row) -> dict[str, Any]:
    return {f"{kind}_id": row["id"], "worker_id": row["worker_id"]}


def _failure(kind: Kind, row: Row, status: int, said: str) -> dict[str, Any]:
    """Return the arguments of fail_KIND for a process that ended before it was done."""
    last = said.splitlines()[-1] if said else "it may lack memory"
    if status == _TRY_AGAIN:
        return _whose(kind, row) | {"error": f"the database went away: {last}", "hint": "Ask for it again."}
    logger.error("the process of %s %s ended with status %s\n%s", kind, row["id"], status, said)
    return _whose(kind, row) | {
        "error": f"the process that made it ended with status {status}: {last}",
        "hint": "This is a defect of pgharness, or too little memory: the worker's log has more.",
    }
