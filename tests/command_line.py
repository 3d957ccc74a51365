"""The command line as its users have it: an environment of its own, what it prints, and its exit status."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from pgharness.cli import main


class Done(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class CommandLine:
    """Runs pgharness with a database (or, without one, the embedded server of a home) and nothing else of ours.

    The exit status of a command must be the one that is expected; None expects any.
    """

    def __init__(
        self, url: str | None = None, *, home: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGHARNESS_", "PG"))}
        kept |= {name: value for name, value in os.environ.items() if name == "PGHARNESS_PG_BIN"}
        self.environment = kept | {"COLUMNS": "80", "TERM": "dumb"} | dict(environment or {})
        if url is not None:
            self.environment["PGHARNESS_DATABASE_URL"] = url
        if home is not None:
            self.environment["PGHARNESS_HOME"] = str(home)

    def start(self, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
        """Start a command and return its process."""
        command = [sys.executable, "-m", "pgharness", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # a suite that runs in the background of a shell ignores Ctrl-C, and so would what it starts
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, env=self.environment, text=True, preexec_fn=heed, **pipes | streams)

    def run(self, *arguments: str, status: int | None = 0, timeout: float = 60) -> Done:
        """Run a command to its end, as a process."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{' '.join(arguments)} did not end\n{out}\n{err}") from None
        return _expected(Done(process.returncode, out, err), status)

    def call(self, *arguments: str, status: int | None = 0) -> Done:
        """Run a command to its end in this process, which takes a twentieth of the time."""
        out, err = io.StringIO(), io.StringIO()
        environment = mock.patch.dict(os.environ, self.environment, clear=True)
        ended: int | str | None = None
        with environment, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(list(arguments))
            except SystemExit as exc:
                ended = exc.code
        return _expected(Done(int(ended or 0), out.getvalue(), err.getvalue()), status)

    def work(self, *arguments: str, timeout: float = 60) -> Done:
        """Let one worker process do the work of all runs that are running."""
        return self.run("worker", "--exit-when-idle", "--queues", "note,grade", *arguments, timeout=timeout)


def _expected(done: Done, status: int | None) -> Done:
    assert "Traceback" not in done.err + done.out, done.err + done.out
    assert status is None or done.status == status, f"status {done.status}\n{done.out}\n{done.err}"
    return done
