"""What code prints and logs becomes lines of its run's log.

Python's own streams know which task wrote to them. What programs and libraries below Python write goes to the file
descriptors, and is told of the task that was begun first. Nothing is dropped: who prints faster than the log is
written waits.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from pgharness.sdk.scope import Level, Scope, current, jsonable

_LONGEST_LINE = 64 * 1024
_LEVELS: tuple[tuple[int, Level], ...] = (
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
)


class Capture:
    """Streams and loggers of this process, told to the log of the task that uses them, or else of `fallback`."""

    def __init__(self, fallback: Callable[[], Scope | None], *, is_echoed: bool = False) -> None:
        self._fallback = fallback
        self._is_echoed = is_echoed
        self._terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        self._threads: list[threading.Thread] = []
        self._streams: list[_Stream] = []

    def start(self, log_level: int) -> None:
        """Take the streams over; pgharness's own loggers write to the stream that standard error was."""
        own = logging.StreamHandler(self._terminal)
        own.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"))
        ours = logging.getLogger("pgharness")
        ours.addHandler(own)
        ours.setLevel(log_level)
        ours.propagate = False
        for noisy in ("psycopg.pool", "httpx", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        root = logging.getLogger()
        root.addHandler(_Handler(self._tell))
        root.setLevel(logging.INFO)
        for number, name, level in ((1, "stdout", "info"), (2, "stderr", "warning")):
            stream = _Stream(self._tell, level, name)  # type: ignore[arg-type]
            self._streams.append(stream)
            setattr(sys, name, stream)
            reader, writer = os.pipe()
            os.dup2(writer, number)
            os.close(writer)
            thread = threading.Thread(target=self._read, args=(reader, level, name), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        """Take Python's streams and loggers over within the block, in a process that is not ours alone."""
        streams, handler, root = (sys.stdout, sys.stderr), _Handler(self._tell), logging.getLogger()
        outer = root.level
        self._streams = [
            _Stream(self._tell, "info", "stdout", echo=streams[0] if self._is_echoed else None),
            _Stream(self._tell, "warning", "stderr", echo=streams[1] if self._is_echoed else None),
        ]
        root.addHandler(handler)
        root.setLevel(min(outer or logging.WARNING, logging.INFO))
        sys.stdout, sys.stderr = self._streams
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            root.removeHandler(handler)
            root.setLevel(outer)
            self.flush()

    def flush(self) -> None:
        """Tell what was printed without the end of a line."""
        for stream in self._streams:
            stream.flush_rest()

    def stop(self) -> None:
        """Tell what is left; nothing more is read afterwards."""
        self.flush()
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            for number in (1, 2):
                os.dup2(null, number)  # the last writer of each pipe is gone, and its reader ends
        for thread in self._threads:
            thread.join(1.0)

    def _tell(self, level: Level, message: str, data: dict[str, Any]) -> None:
        scope = current() or self._fallback()
        if scope is None:
            self._terminal.write(f"{message}\n")
        else:
            scope.emit("log", {"level": level, "message": message, "data": data})

    def _read(self, reader: int, level: Level, name: str) -> None:
        with os.fdopen(reader, "rb", buffering=0) as file:
            rest = b""
            while chunk := file.read(_LONGEST_LINE):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._tell(level, line.decode(errors="replace"), {"stream": name})
            if rest:
                self._tell(level, rest.decode(errors="replace"), {"stream": name})


class _Stream(io.TextIOBase):
    """A standard stream: each line is a line of the log."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(
        self,
        tell: Callable[[Level, str, dict[str, Any]], None],
        level: Level,
        name: str,
        *,
        echo: TextIO | None = None,
    ) -> None:
        self._tell = tell
        self._echo = echo
        self._level = level
        self._name = name
        self._number = 1 if name == "stdout" else 2
        self._rests: dict[int, str] = {}  # what each thread has not ended with a newline yet

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._number

    @property
    def buffer(self) -> io.BufferedWriter:
        """The stream as bytes, which go below Python."""
        return io.BufferedWriter(io.FileIO(self._number, "w", closefd=False))

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        if self._echo is not None:
            self._echo.write(text)
        thread = threading.get_ident()
        *lines, rest = (self._rests.pop(thread, "") + text).split("\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        for line in lines:
            self._tell(self._level, line, {"stream": self._name})
        if rest:
            self._rests[thread] = rest
        return len(text)

    def flush_rest(self) -> None:
        """Tell what has no newline yet."""
        rests, self._rests = self._rests, {}
        for rest in rests.values():
            self._tell(self._level, rest, {"stream": self._name})


class _Handler(logging.Handler):
    """Python's logging, told to the run's log under the same levels."""

    def __init__(self, tell: Callable[[Level, str, dict[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
            if record.exc_info:
                message += "\n" + logging.Formatter().formatException(record.exc_info)
            level: Level = next((level for number, level in _LEVELS if record.levelno >= number), "debug")
            self._tell(level, message, jsonable({"logger": record.name}))
        except Exception:
            self.handleError(record)
