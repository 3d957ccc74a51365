"""Plugins: what other distributions add through entry points, and what is wrong with those that cannot be used.

| group | is called as |
|---|---|
| `pgharness.models` | `function(item, **parameters)`: answers, as the functions of provider `python` do |
| `pgharness.metrics` | `function(output, target, **parameters)`: a score from 0 to 1, or `(score, max_score)` |
| `pgharness.exporters` | `function(folder, out)`: writes the exported run in `folder` to `out` in a form of its own |
| `pgharness.hooks` | `function(event)`: hears what became of a run |

A class is made an object first, without arguments. Nothing of a plugin is imported here before a child process has
shown that importing it neither fails, nor hangs, nor ends the process. That is found out once a process: what was
mended counts from the next start on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, Literal, get_args

from pgharness.errors import NotFound, PluginBroken

logger = logging.getLogger(__name__)
Kind = Literal["models", "metrics", "exporters", "hooks"]
KINDS: tuple[Kind, ...] = get_args(Kind)
IMPORT_SECONDS = 30.0
_PREFIX = "pgharness."
_KEPT_CHARACTERS = 8_000
_GRACE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Plugin:
    """An entry point as its distribution declares it, imported or not."""

    kind: Kind
    name: str
    value: str
    distribution: str  # its name and version
    rivals: tuple[str, ...] = ()  # other distributions that declare the same name

    def broken(self, reason: str, text: str | None = None) -> PluginBroken:
        """Return the error that says so."""
        return PluginBroken(
            f'plugin "{self.name}" of {_PREFIX}{self.kind}, in {self.distribution}, is broken: {reason}',
            text=text,
            hint=f"Repair or uninstall {self.distribution.partition(' ')[0]}, then start anew what uses it;"
            " pgharness doctor checks all plugins.",
        )

    def failed(self, exc: BaseException) -> PluginBroken:
        """Return the error for what it raised."""
        return self.broken(*_told(exc))


def names(kind: Kind) -> list[str]:
    """Return the names of the plugins of a kind, whether or not they work."""
    return sorted(plugin.name for plugin in _installed().values() if plugin.kind == kind)


def find(kind: Kind, name: str) -> Plugin:
    """Return what is declared of a plugin. Raises NotFound, saying which there are."""
    plugin = _installed().get((kind, name))
    if plugin is None:
        known = ", ".join(names(kind))
        raise NotFound(
            f'no plugin "{name}" of {_PREFIX}{kind} is installed here',
            hint=f"There are: {known}." if known else "There are none: install the distribution that has it.",
        )
    return plugin


def check(kind: Kind, name: str, *, seconds: float = IMPORT_SECONDS) -> Plugin:
    """Find out in a child process whether a plugin can be imported. Raises PluginBroken, or NotFound."""
    plugin = find(kind, name)
    _slot(plugin).check(seconds)
    return plugin


def load(kind: Kind, name: str, *, seconds: float = IMPORT_SECONDS) -> Callable[..., Any]:
    """Return what a plugin is, imported when that was found to be harmless. Raises PluginBroken, or NotFound."""
    return _slot(find(kind, name)).load(seconds)


# -- what is installed


@functools.cache
def _installed() -> dict[tuple[Kind, str], Plugin]:
    found: dict[tuple[Kind, str], Plugin] = {}
    seen = set()
    for distribution in importlib.metadata.distributions():
        try:
            if _PREFIX not in (distribution.read_text("entry_points.txt") or ""):
                continue
            points = [point for point in distribution.entry_points if point.group.removeprefix(_PREFIX) in KINDS]
            name = str(distribution.metadata["Name"])
            label = f"{name} {distribution.version}"
        except Exception as exc:  # there are many ways to write wrong metadata
            logger.warning("the metadata of a distribution cannot be read: %s: %s", type(exc).__name__, exc)
            continue
        normal = re.sub(r"[-_.]+", "-", name).lower()
        if normal in seen:  # further down the path: Python would import the first
            continue
        seen.add(normal)
        for point in points:
            kind: Kind = point.group.removeprefix(_PREFIX)  # type: ignore[assignment]
            first = found.get((kind, point.name))
            if first is None:
                found[kind, point.name] = Plugin(kind, point.name, point.value, label)
            else:
                rivals = (*first.rivals, label)
                found[kind, point.name] = Plugin(kind, point.name, first.value, first.distribution, rivals)
    return found


# -- what this process knows of a plugin


class _Slot:
    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._lock = threading.RLock()
        self._is_checked = False
        self._trouble: tuple[str, str | None] | None = None
        self._found: Callable[..., Any] | None = None

    def check(self, seconds: float) -> None:
        with self._lock:
            if not self._is_checked:
                rivals = self._plugin.rivals
                self._trouble = (
                    (f"{', '.join(rivals)} {'has' if len(rivals) == 1 else 'have'} one of that name too", None)
                    if rivals
                    else _tried(self._plugin, seconds)
                )
                self._is_checked = True
            if self._trouble is not None:
                raise self._plugin.broken(*self._trouble)

    def load(self, seconds: float) -> Callable[..., Any]:
        with self._lock:
            self.check(seconds)
            if self._found is None:
                try:
                    self._found = _made(self._plugin)
                except (Exception, SystemExit) as exc:
                    self._trouble = _told(exc)
                    raise self._plugin.broken(*self._trouble) from exc
            return self._found


@functools.cache
def _slot(plugin: Plugin) -> _Slot:
    return _Slot(plugin)


def _made(plugin: Plugin) -> Callable[..., Any]:
    found: Any = EntryPoint(plugin.name, plugin.value, f"{_PREFIX}{plugin.kind}").load()
    if inspect.isclass(found):
        found = found()
    if not callable(found):
        raise TypeError(f"{plugin.value} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def _told(exc: BaseException) -> tuple[str, str]:
    """Return what is wrong in a line, with the place, and the traceback."""
    said = " ".join(traceback.format_exception_only(exc)[-1].split())[:500]
    if isinstance(exc, SystemExit):
        said = f"it ends the process ({said})"
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if frame.filename != __file__ and "importlib" not in frame.filename
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return said + where, "".join(traceback.format_exception(exc))[-_KEPT_CHARACTERS:]


# -- the child process


def _tried(plugin: Plugin, seconds: float) -> tuple[str, str | None] | None:
    """Import a plugin in a child process; return what is wrong, if anything is."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as pipe, tempfile.TemporaryFile() as output:
        try:
            asked = {"path": sys.path, "descriptor": writing, "seconds": seconds + _GRACE_SECONDS}
            asked |= {"kind": plugin.kind, "name": plugin.name, "value": plugin.value}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pgharness.plugins", json.dumps(asked)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        fate = ""
        try:
            fate = _ending(process.wait(seconds))
        except subprocess.TimeoutExpired:
            fate = f"importing it takes longer than {seconds:g} seconds"
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.set_blocking(pipe.fileno(), False)
        if told := pipe.read():
            verdict = json.loads(told)
            return (verdict["reason"], verdict["text"]) if verdict else None
        output.seek(0)
        said = output.read()[-_KEPT_CHARACTERS:].decode("utf-8", "replace").strip()
    return fate + (f": {said.splitlines()[-1]}" if said else ""), said or None


def _ending(status: int) -> str:
    if status >= 0:
        return f"importing it ends the process (exit status {status})"
    with contextlib.suppress(ValueError):
        return f"importing it kills the process ({signal.Signals(-status).name})"
    return f"importing it kills the process (signal {-status})"


def _serve(asked: dict[str, Any]) -> None:
    """Be the child: import a plugin and tell how that went. To end without a word is a verdict too."""
    descriptor: int = asked["descriptor"]
    os.set_inheritable(descriptor, False)
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])  # who would kill it may be gone
    sys.path[:] = asked["path"]
    verdict: dict[str, str] = {}
    try:
        _made(Plugin(asked["kind"], asked["name"], asked["value"], ""))
    except BaseException as exc:
        reason, text = _told(exc)
        verdict = {"reason": reason, "text": text}
    os.write(descriptor, json.dumps(verdict).encode())
    os._exit(0)  # whatever threads it has left


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
