"""Discovery: the experiments in folders, modules and installed packages, without trusting the code that holds them.

A source is a folder or file, a dotted module or package, or `pgharness.experiments`, which stands for the entry points
of that group. Only files that use `experiment` are imported; `load` finds an experiment again in another process.

What is wrong with one file is told with its line and stops nothing else. `discover` imports into this process;
`discover_isolated` into a child, so a file that hangs, crashes or prints harms nobody and the others are still found.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import keyword
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pgharness.errors import Conflict, HarnessError, NotFound, SettingsError
from pgharness.sdk.definition import MARKER, Experiment, forget_git, name_module, project_root, source_files
from pgharness.sdk.loading import PATH_PREFIX, import_module, is_dotted, load, module_name
from pgharness.settings import Settings

__all__ = [
    "ENTRY_POINTS",
    "Catalogue",
    "Findings",
    "Problem",
    "default_sources",
    "discover",
    "discover_isolated",
    "find_marker",
    "import_module",
    "init",
    "load",
    "read_marker",
    "scaffold",
    "snapshot",
]
ENTRY_POINTS = "pgharness.experiments"
_FOLDER = "experiments"
_SEARCHING = "searching "
_PARENT_GONE = 70
_TICK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a source, a file or an experiment cannot be used."""

    path: str
    line: int | None
    message: str

    def __str__(self) -> str:
        return f"{self.path}{f':{self.line}' if self.line else ''}: {self.message}"


@dataclass(slots=True)
class Catalogue:
    """The experiments that were found, by name, and what could not be used."""

    experiments: dict[str, Experiment] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(slots=True)
class Findings:
    """The same as plain data: each experiment as the arguments of register_experiment, with its path, line and root."""

    experiments: list[dict[str, Any]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Unit:
    """A file that is imported by itself."""

    file: Path
    root: Path
    module: str


# -- where to look


def default_sources(configured: Sequence[str] | None = None, folder: Path | None = None) -> tuple[str, ...]:
    """Return what to search: what is configured, else what the project says, else ./experiments; and entry points."""
    here = folder or Path.cwd()
    given = Settings.from_env().experiments if configured is None else tuple(configured)
    if given:
        return given
    if marker := find_marker(here):
        return (*read_marker(marker)[0], ENTRY_POINTS)
    if any(_defines(path) for path in _python_files(here / _FOLDER)):
        return (str(here / _FOLDER), ENTRY_POINTS)
    return (ENTRY_POINTS,)


def holds_code(sources: Iterable[str | Path] | None = None) -> bool:
    """Tell whether there is any experiment in the sources, without importing them."""
    for source in _given(sources):
        with contextlib.suppress(NotFound, ValueError):
            if any(_defines(unit.file) for unit in _units(source)):
                return True
    return False


def find_marker(folder: Path) -> Path | None:
    """Return the marker of the project that a folder is in."""
    folder = folder.resolve()
    return next((path / MARKER for path in (folder, *folder.parents) if (path / MARKER).is_file()), None)


def read_marker(marker: Path) -> tuple[tuple[str, ...], str]:
    """Return a project's sources and its name. Raises SettingsError on a marker that cannot be read."""
    try:
        told = tomllib.loads(marker.read_text("utf-8"))
        sources = told.pop("experiments", _FOLDER)
        project = told.pop("project", marker.parent.name)
        sources = [sources] if isinstance(sources, str) else sources
        if told or not isinstance(project, str) or not all(isinstance(source, str) for source in sources):
            raise ValueError(f"it holds {', '.join(told) or 'something else than text'}")
    except (OSError, ValueError, TypeError) as exc:
        raise SettingsError(
            f"{marker} cannot be read: {exc}", hint='It holds two lines: experiments = "experiments", project = "name".'
        ) from exc
    return tuple(_beside(marker, source) for source in sources), project


def _beside(marker: Path, source: str) -> str:
    return source if is_dotted(source) and not (marker.parent / source).exists() else str(marker.parent / source)


def _units(source: str) -> Iterator[_Unit]:
    """Yield the files of a source. Raises NotFound where there is none."""
    if source == ENTRY_POINTS:
        for module in sorted({point.module for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}):
            yield from _module_units(module)
    elif Path(source).exists():
        for path in _python_files(Path(source).resolve()):
            if path == Path(source).resolve() or _defines(path):
                root = project_root(path)
                yield _Unit(path, root, module_name(path, root))
    elif is_dotted(source):
        yield from _module_units(source)
    else:
        raise NotFound(f"there is no folder {source}", hint="Name a folder or a module in PGHARNESS_EXPERIMENTS.")


def _module_units(module: str) -> Iterator[_Unit]:
    place = _place(module)
    if place.is_file():
        yield _Unit(place, project_root(place), module)
        return
    for path in _python_files(place):
        steps = [*module.split("."), *path.relative_to(place).with_suffix("").parts]
        name = ".".join(steps).removesuffix(".__init__")
        if is_dotted(name) and (name == module or _defines(path)):
            yield _Unit(path, project_root(path), name)


def _place(module: str) -> Path:
    """Return the file of a module or the folder of a package, without importing what is above it."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    starts = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    if spec and not starts and spec.origin and not rest:
        return Path(spec.origin).resolve()
    for start in starts:
        place = start.joinpath(*rest).resolve()
        if place.is_dir():
            return place
        if place.with_suffix(".py").is_file():
            return place.with_suffix(".py")
    raise NotFound(f"there is no folder or module {module}", hint="Install it, or run where it can be imported.")


def _python_files(place: Path) -> Iterator[Path]:
    """Yield a file, or the Python files below a folder, in order; not those of hidden folders and environments."""
    if place.is_file():
        yield place
    for folder, folders, files in os.walk(place):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in ("__pycache__", "node_modules", "site-packages")
            and not Path(folder, name, "pyvenv.cfg").exists()
        )
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _defines(file: Path) -> bool:
    """Return whether a file uses `experiment` of pgharness: any other may be a script, which importing would run."""
    try:
        source = file.read_bytes()
    except OSError:
        return False
    if b"pgharness" not in source or b"experiment" not in source:
        return False
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return True  # importing it tells what is wrong
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pgharness":
            if any(alias.name == "experiment" for alias in node.names):
                return True
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if any(_is_experiment(decorator) for decorator in node.decorator_list):
                return True
        elif isinstance(node, ast.Call) and _is_experiment(node.func):
            return True
    return False


def _is_experiment(node: ast.expr) -> bool:
    node = node.func if isinstance(node, ast.Call) else node
    return (node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)) == "experiment"


# -- discovering


def discover(sources: Iterable[str | Path] | None = None) -> Catalogue:
    """Import the files of the sources and return their experiments, and what is wrong with the others."""
    catalogue = Catalogue()
    for kind, _, found in _explore(_given(sources), ()):
        if kind == "end":
            experiments, problems = found
            catalogue.problems += problems
            for experiment in experiments:
                first = catalogue.experiments.setdefault(experiment.name, experiment)
                if first is not experiment:
                    catalogue.problems.append(_duplicate(_told(experiment), _told(first)))
    return catalogue


def snapshot(sources: Iterable[str | Path] | None = None) -> str:
    """Return a fingerprint of the sources: their files, what these import from their projects, times and sizes."""
    digest, seen = hashlib.sha256(), set[Path]()
    for source in _given(sources):
        digest.update(f"{source}\n".encode("utf-8", "surrogateescape"))
        with contextlib.suppress(NotFound, ValueError):
            for unit in _units(source):
                seen.update(source_files(unit.file, unit.root))
    for path in sorted(seen):
        with contextlib.suppress(OSError):
            stat = path.stat()
            digest.update(f"{path} {stat.st_mtime_ns} {stat.st_size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _given(sources: Iterable[str | Path] | None) -> list[str]:
    return list(dict.fromkeys(default_sources() if sources is None else map(str, sources)))


def _explore(
    sources: Iterable[str], skipped: Collection[str]
) -> Iterator[tuple[str, str, tuple[list[Experiment], list[Problem]]]]:
    """Yield ("begin", what) and ("end", what, found) for each source and then for each file of theirs."""
    forget_git()
    units: dict[Path, _Unit] = {}
    for source in sources:
        if (searching := f"{_SEARCHING}{source}") not in skipped:
            yield "begin", searching, ([], [])
            problems = []
            try:
                for unit in _units(source):
                    units.setdefault(unit.file, unit)
            except Exception as exc:
                problems.append(Problem(source, None, str(exc)))
            yield "end", searching, ([], problems)
    for unit in units.values():
        if unit.module.startswith(PATH_PREFIX):
            name_module(unit.file, unit.module)
    for unit in units.values():
        if str(unit.file) not in skipped:
            yield "begin", str(unit.file), ([], [])
            yield "end", str(unit.file), _import_unit(unit)


def _import_unit(unit: _Unit) -> tuple[list[Experiment], list[Problem]]:
    try:
        module = import_module(unit.module, unit.root)
    except KeyboardInterrupt:
        raise
    except BaseException as exc:
        return [], [_explain(exc, unit)]
    experiments, problems = [], []
    found: dict[int, Experiment] = {}
    for name, value in list(vars(module).items()):
        if isinstance(value, Experiment) and value.file == unit.file and id(value) not in found:
            found[id(value)] = value
            if getattr(module, value.qualname, None) is not value:
                value.qualname = name
    for experiment in found.values():
        try:
            experiment.config_schema()
        except Exception as exc:
            problems.append(Problem(str(unit.file), experiment.line, str(exc)))
        else:
            experiments.append(experiment)
    return experiments, problems


def _explain(exc: BaseException, unit: _Unit) -> Problem:
    """Return what stopped an import, at the last line of the project's own code."""
    if isinstance(exc, SyntaxError) and exc.filename:
        return Problem(exc.filename, exc.lineno, f"{type(exc).__name__}: {exc.msg}")
    frames = [frame for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename) == unit.file]
    frames += [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if Path(frame.filename).is_relative_to(unit.root)
        and not Path(frame.filename).is_relative_to(Path(__file__).parents[1])
        and "site-packages" not in frame.filename
    ]
    said = f"SystemExit: it ends the process ({exc.code})" if isinstance(exc, SystemExit) else f"{exc}"
    message = said if isinstance(exc, HarnessError | SystemExit) else f"{type(exc).__name__}: {said}"
    return (
        Problem(frames[-1].filename, frames[-1].lineno, message) if frames else Problem(str(unit.file), None, message)
    )


def _told(experiment: Experiment) -> dict[str, Any]:
    return {"name": experiment.name, "path": str(experiment.file), "line": experiment.line}


def _duplicate(second: dict[str, Any], first: dict[str, Any]) -> Problem:
    message = f'experiment "{second["name"]}" is also defined in {first["path"]}:{first["line"]}, which is used'
    return Problem(second["path"], second["line"], message)


# -- discovering in another process


def discover_isolated(sources: Iterable[str | Path] | None = None, *, timeout: float = 20.0) -> Findings:
    """Return what the sources hold as plain data; their code is imported by child processes only.

    A file that says nothing for `timeout` seconds, or takes its process with it, is named and left out.
    """
    given = _given(sources)
    findings, skipped = Findings(), list[str]()
    names: dict[str, dict[str, Any]] = {}
    while True:
        child, before = _Child(given, skipped), len(skipped)
        for told in child.messages(timeout):
            problems = [Problem(**problem) for problem in told["problems"]]
            findings.problems += [problem for problem in problems if problem not in findings.problems]
            for experiment in told["experiments"]:
                first = names.setdefault(experiment["name"], experiment)
                if first is experiment:
                    findings.experiments.append(experiment)
                else:
                    findings.problems.append(_duplicate(experiment, first))
            if not told["end"].startswith(_SEARCHING):  # which is done again
                skipped.append(told["end"])
        if child.is_done:
            return findings
        if child.current is not None:
            skipped.append(child.current)
            path = child.current.removeprefix(_SEARCHING)
            findings.problems.append(Problem(path, None, f"importing it {child.fate}"))
        elif len(skipped) == before:
            findings.problems.append(Problem(", ".join(given), None, f"discovery {child.fate}"))
            return findings


class _Child:
    """A process that imports the sources but for what is skipped, and tells what it begins and ends."""

    def __init__(self, sources: Sequence[str], skipped: Sequence[str]) -> None:
        self.current: str | None = None  # what it is importing
        self.is_done = False
        self.fate = ""
        self._request = json.dumps({"sources": sources, "skipped": skipped}).encode() + b"\n"

    def messages(self, timeout: float) -> Iterator[dict[str, Any]]:
        """Yield what it found, until it is done, has died, or was silent for too long."""
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as pipe, tempfile.TemporaryFile() as output:
            try:
                command = [sys.executable, "-P", "-m", "pgharness.sdk.discovery", str(writing)]
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,  # held open: the child ends when we do
                    stdout=output,
                    stderr=output,
                    pass_fds=(writing,),
                    start_new_session=True,
                )
            finally:
                os.close(writing)
            try:
                with contextlib.suppress(OSError):
                    assert process.stdin is not None
                    process.stdin.write(self._request)
                    process.stdin.flush()
                yield from self._listen(process, pipe, timeout)
            finally:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                with contextlib.suppress(OSError):
                    if process.stdin is not None:
                        process.stdin.close()
            if not self.is_done:
                output.seek(0)
                lines = output.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
                self.fate += f": {lines[-1]}" if lines else ""

    def _listen(self, process: subprocess.Popen[bytes], pipe: IO[bytes], timeout: float) -> Iterator[dict[str, Any]]:
        buffer, deadline = b"", time.monotonic() + timeout
        os.set_blocking(pipe.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not self.is_done:
                has_ended = process.poll() is not None  # before reading: what it told is read to the end
                selector.select(0 if has_ended else _TICK_SECONDS)
                if chunk := pipe.read(1 << 20):
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        deadline = time.monotonic() + timeout
                        yield from self._hear(json.loads(line))
                elif has_ended:
                    self.fate = _ending(process.returncode)
                    return
                elif time.monotonic() > deadline:
                    self.fate = f"takes longer than {timeout:g} seconds"
                    return

    def _hear(self, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self.current = told.get("begin")
        self.is_done = "done" in told
        if "end" in told:
            yield told


def _ending(status: int) -> str:
    if status >= 0:
        return f"ends the process (exit status {status})"
    with contextlib.suppress(ValueError):
        return f"kills the process ({signal.Signals(-status).name})"
    return f"kills the process (signal {-status})"


def _serve(descriptor: int) -> None:
    """Be the child: read what to import from standard input, tell what is found, and end with the parent."""
    os.set_inheritable(descriptor, False)
    request = json.loads(_read_line(0))
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    for kind, what, (experiments, problems) in _explore(request["sources"], request["skipped"]):
        told: dict[str, Any] = {kind: what, "experiments": [], "problems": [asdict(problem) for problem in problems]}
        if kind == "end":
            told["experiments"] = [
                {**each.registration(), "path": str(each.file), "line": each.line, "root": str(each.root)}
                for each in experiments
            ]
        _tell(descriptor, told)
    _tell(descriptor, {"done": True})
    os._exit(0)  # whatever threads user code has left


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (chunk := os.read(descriptor, 1 << 16)):
        line += chunk
    return line


def _end_with_parent(lifeline: int) -> None:
    while os.read(lifeline, 1024):
        pass
    os._exit(_PARENT_GONE)


def _tell(descriptor: int, message: dict[str, Any]) -> None:
    rest = json.dumps(message).encode() + b"\n"
    while rest:
        rest = rest[os.write(descriptor, rest) :]


# -- beginning a project


def init(folder: Path, experiments: str = _FOLDER, project: str | None = None) -> Path:
    """Make a folder a project: write its marker and its folder for experiments. Raises Conflict where it is one."""
    marker = folder.resolve() / MARKER
    if marker.exists():
        raise Conflict(f"{folder} is a project already", hint=f"Its settings are in {marker}.")
    place = folder / experiments
    if place.exists() and not place.is_dir():
        raise Conflict(f"{place} is a file", hint="Choose another folder: pgharness init --experiments-dir NAME")
    place.mkdir(parents=True, exist_ok=True)
    name = project or folder.resolve().name
    with marker.open("x", encoding="utf-8") as file:
        file.write(f"experiments = {json.dumps(experiments)}\nproject = {json.dumps(name)}\n")
    return marker


def scaffold(name: str) -> str:
    """Return the text of a new experiment's file."""
    function = re.sub(r"\W", "_", name.strip())
    if not function.isidentifier() or keyword.iskeyword(function) or function in _TAKEN:
        function = f"run_{function}"
    return _SCAFFOLD.format(name=json.dumps(name.strip(), ensure_ascii=False), function=function)


_TAKEN = ("experiment", "Config", "Context", "BaseModel", "Field", "range", "float", "int")
_SCAFFOLD = '''\
"""What this experiment is to find out."""

from pydantic import BaseModel, Field

from pgharness import Context, experiment


class Config(BaseModel):
    steps: int = Field(10, ge=1, description="How many steps to take")
    rate: float = Field(0.5, gt=0, lt=1)


@experiment(name={name})
def {function}(ctx: Context, config: Config) -> None:
    remaining = 1.0
    for step in range(config.steps):
        remaining *= 1 - config.rate
        ctx.progress(step + 1, config.steps)
    ctx.result("remaining", remaining)


if __name__ == "__main__":
    {function}()
'''

if __name__ == "__main__":
    _serve(int(sys.argv[1]))
