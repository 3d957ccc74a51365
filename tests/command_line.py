"""The command line as its users have it: a process with an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Done(NamedTuple):
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class CommandLine:
    """Runs pgharness with a database (or, without one, the embedded server of a home) and nothing else of ours."""

    def __init__(self, url: str | None = None, *, home: Path | None = None, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGHARNESS_", "PG"))}
        kept |= {name: value for name, value in os.environ.items() if name == "PGHARNESS_PG_BIN"}
        self.environment = kept | {"COLUMNS": "100", "TERM": "dumb"} | environment
        if url is not None:
            self.environment["PGHARNESS_DATABASE_URL"] = url
        if home is not None:
            self.environment["PGHARNESS_HOME"] = str(home)

    def start(self, *arguments: str, **streams: Any) -> subprocess.Popen[str]:
        """Start a command and return its process."""
        command = [sys.executable, "-m", "pgharness", *arguments]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=self.environment, text=True, **pipes | streams)

    def run(self, *arguments: str, status: int | None = 0, timeout: float = 60) -> Done:
        """Run a command to its end; its exit status must be this one (None allows any)."""
        process = self.start(*arguments)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"{' '.join(arguments)} did not end\n{out}\n{err}") from None
        assert "Traceback" not in err + out, err + out
        assert status is None or process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
        return Done(process.returncode, out, err)

    def work(self, *arguments: str, timeout: float = 60) -> Done:
        """Let one worker process do the work of all runs that are running."""
        return self.run("worker", "--exit-when-idle", *arguments, timeout=timeout)
