"""Definition: what `@experiment` makes of a function or a class, and how its configuration and its source are told.

    @experiment(name="triage", timeout_seconds=600)
    def triage(ctx, config: Config): ...

A parameter that is annotated with a pydantic model is the configuration, any other required one is the context; both
are optional. The decorated function stays what it was when it is called with arguments, or by an experiment that runs.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import io
import os
import subprocess
import sys
import textwrap
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, update_wrapper
from pathlib import Path
from typing import Annotated, Any, overload

from pydantic import BaseModel

from pgharness.errors import InvalidArgument
from pgharness.sdk.config import read_config, refusal, schema_of

MARKER = ".pgharness"  # the file that makes a folder a project
_BUILT_IN = "note_grade"
_DIFF_BYTES = 1_000_000
_GIT_SECONDS = 10.0
_STAGED = ("run", "execute")
_EMPTY_SCHEMA = {"type": "object", "additionalProperties": False}

_loaded_as: dict[Path, str] = {}  # the module names of files that are no importable modules


def name_module(file: Path, module: str) -> None:
    """Let experiments of a file say that they are from this module; to be called before the file is imported."""
    _loaded_as[file.resolve()] = module


@dataclasses.dataclass(frozen=True, slots=True)
class Version:
    """The code of an experiment at one time."""

    digest: str  # of the sources of its module and of what that imports from the same project
    source: str
    git_commit: str | None
    is_dirty: bool
    git_diff: str


class Experiment:
    """A function or a class that runs as an experiment."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_seconds: float = 3600.0,
        memory_mb: int = 4096,
        log_mb: int = 64,
        names: Mapping[str, Any] | None = None,
    ) -> None:
        """Define an experiment; `names` are those which annotations may use beside the module's."""
        update_wrapper(self, function, updated=())
        self.function = function
        self.qualname: str = getattr(function, "__qualname__", type(function).__qualname__)
        self.name: str = getattr(function, "__name__", self.qualname) if name is None else name
        self.description = inspect.cleandoc(function.__doc__ or "") if description is None else description
        self.timeout_seconds, self.memory_mb, self.log_mb = timeout_seconds, memory_mb, log_mb
        self.is_class = isinstance(function, type)
        self.file = _file_of(function)
        self.root = project_root(self.file) if self.file else Path.cwd()
        self.module = _module_of(function, self.file, self.root)
        self._parameters = {} if self.is_class else _parameters_of(function)
        self._config: str | None = None
        self.config_model = self._find_model(names or {})
        self.takes_config = self.config_model is not None
        self._context = self._find_context()
        self.takes_context = self.is_class or self._context is not None
        self.is_async = _is_async(function)
        self._refuse_bad_options()

    def __repr__(self) -> str:
        return f"<experiment {self.name!r} of {self.module}:{self.qualname}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with arguments or inside a run; else run it tracked, in this process."""
        from pgharness.sdk import scope

        if args or kwargs or scope.current() is not None:
            return self.function(*args, **kwargs)
        from pgharness.sdk import direct

        is_script = getattr(self.function, "__module__", None) == "__main__"
        return direct.run_here(self, argv=sys.argv[1:] if is_script else None)

    def start(self, context: Any, config: BaseModel | None) -> Any:
        """Call the function, or all stages of the class, with what it takes of these; a coroutine where is_async."""
        if self.is_class:
            return self.function().execute(context, config)
        given = {self._context: context, self._config: config}
        bound = inspect.Signature(list(self._parameters.values())).bind_partial()
        bound.arguments.update({name: given[name] for name in self._parameters if name in given})
        return self.function(*bound.args, **bound.kwargs)

    def config_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the configuration, as the database enforces it."""
        if self.config_model is None:
            return dict(_EMPTY_SCHEMA)
        return schema_of(self.config_model)

    def config(self, value: Mapping[str, Any] | BaseModel | None = None) -> BaseModel | None:
        """Return the validated configuration. Raises InvalidArgument that names each field that does not fit."""
        if self.config_model is None:
            if isinstance(value, BaseModel) or not value:
                return None
            raise refusal(
                self.name, [("", key, "is not a known property; this experiment takes none") for key in value]
            )
        if isinstance(value, self.config_model):
            return value
        return read_config(self.config_model, value or {}, name=self.name)

    def version(self) -> Version:
        """Return the experiment's code as it is on disk, and the git state around it; read once."""
        return self._version

    def snapshot(self) -> bytes:
        """Return a ZIP of the experiment's source files, as they are on disk; equal files give equal bytes."""
        files = source_files(self.file, self.root) if self.file is not None and self.file.is_file() else []
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in files:
                archive.writestr(zipfile.ZipInfo(path.relative_to(self.root).as_posix()), path.read_bytes())
        return packed.getvalue()

    def registration(self) -> dict[str, Any]:
        """Return the arguments of the database's register_experiment."""
        return {
            "name": self.name,
            "description": self.description,
            "module": self.module,
            "function": self.qualname,
            "config_schema": self.config_schema(),
            "timeout_seconds": self.timeout_seconds,
            "memory_mb": self.memory_mb,
            "log_mb": self.log_mb,
            **dataclasses.asdict(self.version()),
        }

    @property
    def line(self) -> int:
        """The line of its file on which the experiment begins; 1 where that is not known."""
        if code := getattr(inspect.unwrap(self.function), "__code__", None):
            return int(code.co_firstlineno)
        try:
            return inspect.getsourcelines(self.function)[1]
        except (OSError, TypeError):
            return 1

    @cached_property
    def _version(self) -> Version:
        if self.file is None or not self.file.is_file():
            try:
                source = textwrap.dedent(inspect.getsource(self.function))
            except (OSError, TypeError):
                source = ""
            files = {}
            digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        else:
            files = {path: path.read_bytes() for path in source_files(self.file, self.root)}
            source = _storable(files[self.file].decode("utf-8", "replace"))
            digest = _digest(files, self.root)
        return Version(digest, source, *git_state(self.root, tuple(files)))

    def _find_model(self, names: Mapping[str, Any]) -> type[BaseModel] | None:
        """Return the model of the configuration, and remember by which parameter it comes."""
        if self.is_class:
            annotation = _annotations(self.function, names).get("config")
            if isinstance(annotation, str):
                raise self._refusal(f"annotation {annotation!r} of config names nothing that is known")
            return _model_in(annotation)
        annotations = _annotations(self.function, names)
        found = {name: _model_in(annotations.get(name)) for name in self._parameters}
        models = {name: model for name, model in found.items() if model is not None}
        if len(models) > 1:
            raise self._refusal(f"has {len(models)} configurations: {', '.join(models)}")
        if not models and isinstance(annotations.get("config"), str) and "config" in self._parameters:
            raise self._refusal(f"annotation {annotations['config']!r} of config names nothing that is known")
        self._config = next(iter(models), None)
        return models[self._config] if self._config else None

    def _find_context(self) -> str | None:
        others = [p for p in self._parameters.values() if p.name != self._config]
        required = [p.name for p in others if p.default is inspect.Parameter.empty]
        if len(required) > 1:
            raise self._refusal(f"takes {', '.join(required)}, and only one of them can be the context")
        return required[0] if required else next((p.name for p in others if p.name in ("ctx", "context")), None)

    def _refusal(self, problem: str) -> InvalidArgument:
        return InvalidArgument(
            f'experiment "{self.name}" {problem}',
            hint="Write it as (ctx, config: Config), where Config is a pydantic model, or leave either out.",
        )

    def _refuse_bad_options(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip() or self.name != self.name.strip():
            raise InvalidArgument(
                f"{self.name!r} is no name for an experiment", hint='Write @experiment(name="triage").'
            )
        if self.name == _BUILT_IN:
            raise InvalidArgument(f'"{_BUILT_IN}" is the built-in experiment', hint="Choose another name.")
        for option in ("timeout_seconds", "memory_mb", "log_mb"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise InvalidArgument(
                    f'{option} of experiment "{self.name}" is {value!r}', hint="Write a number above 0."
                )
        if self.config_model is not None and self.config_model.__pydantic_root_model__:
            raise self._refusal(f"has a configuration without fields ({self.config_model.__name__})")


@overload
def experiment(function: Callable[..., Any], /) -> Experiment: ...


@overload
def experiment(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_seconds: float = 3600.0,
    memory_mb: int = 4096,
    log_mb: int = 64,
) -> Callable[[Callable[..., Any]], Experiment]: ...


def experiment(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make a function, or a class with a method `run`, an experiment: @experiment or @experiment(name="triage").

    The name defaults to the function's, the description to its docstring.
    """
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__") == __package__:  # it is called by another name too
        frame = frame.f_back
    names = frame.f_locals  # what annotations of a function inside a function may mean

    def define(function: Callable[..., Any]) -> Experiment:
        if isinstance(function, Experiment) or not callable(function):
            raise InvalidArgument(f"{function!r} is no function", hint="Write @experiment above a plain function.")
        if isinstance(function, type) and (
            inspect.isabstract(function) or not all(callable(getattr(function, name, None)) for name in _STAGED)
        ):
            raise InvalidArgument(
                f"class {function.__qualname__} has no method run",
                hint="Derive it from pgharness.Runnable and define run(self).",
            )
        return Experiment(function, names=names, **options)

    return define if function is None else define(function)


# -- parameters


def _is_async(function: Callable[..., Any]) -> bool:
    asks = getattr(function, "is_async", None)  # a class has stages
    return bool(asks()) if isinstance(function, type) and callable(asks) else inspect.iscoroutinefunction(function)


def _parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind not in variadic}


def _annotations(owner: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    """Return annotations, each resolved by itself: one that cannot be, as of a TYPE_CHECKING import, stays a text."""
    if isinstance(owner, type):
        found: dict[str, Any] = {}
        for base in reversed(owner.__mro__):
            found.update(_resolved(inspect.get_annotations(base), base, names))
        return found
    return _resolved(getattr(inspect.unwrap(owner), "__annotations__", {}), inspect.unwrap(owner), names)


def _resolved(annotations: Mapping[str, Any], owner: Any, names: Mapping[str, Any]) -> dict[str, Any]:
    module = sys.modules.get(owner.__module__)
    known = {**getattr(owner, "__globals__", vars(module) if module else {}), **names}
    found = {}
    for name, annotation in annotations.items():
        try:
            found[name] = typing.get_type_hints(_holder(name, annotation), known, include_extras=True)[name]
        except Exception:
            found[name] = annotation
    return found


def _holder(name: str, annotation: Any) -> Any:
    return type("Holder", (), {"__annotations__": {name: annotation}, "__module__": __name__})


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation names, also inside Annotated and beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = [item for item in typing.get_args(annotation) if item is not type(None)]
    if typing.get_origin(annotation) is Annotated or len(inner) == 1:
        return _model_in(inner[0])
    return None


# -- source


def project_root(file: Path) -> Path:
    """Return the folder that a file's project is: by its marker, its pyproject.toml or its git folder, upwards.

    Without any of them, or for an installed package, it is the folder of the file's package, or the file's own.
    """
    folder = file.parent
    while (folder / "__init__.py").exists() and folder.parent != folder:
        folder = folder.parent
    if not {"site-packages", "dist-packages"} & set(file.parts):
        for sign in (MARKER, "pyproject.toml", ".git"):
            for above in (file.parent, *file.parent.parents):
                if (above / sign).is_file() or (sign == ".git" and (above / sign).is_dir()):
                    return above
    return folder


def folders_of(file: Path, root: Path) -> list[Path]:
    """Return where a file's imports are looked for, nearest first: from its own folder up to the project's."""
    above = (file.parent, *file.parent.parents)
    inside = [folder for folder in above if folder.is_relative_to(root) and not (folder / "__init__.py").exists()]
    return [*inside, root / "src"] if (root / "src").is_dir() else inside


def source_files(file: Path, root: Path) -> list[Path]:
    """Return a file and what it imports, directly or not, from the same project."""
    bases = folders_of(file, root)
    found, open_files = {file}, [file]
    while open_files:
        here = open_files.pop()
        for path in _imported_files(here, bases):
            if path not in found and path.is_relative_to(root):
                found.add(path)
                open_files.append(path)
    return sorted(found)


def _imported_files(file: Path, bases: list[Path]) -> Iterator[Path]:
    try:
        imports = _imports_of(file, file.stat().st_mtime_ns)
    except OSError:
        return
    for level, steps in imports:
        start = bases if level == 0 else [file.parents[level - 1]] if level <= len(file.parents) else []
        yield from _files_of(list(steps), start)


@lru_cache(maxsize=4096)
def _imports_of(file: Path, modified_at: int) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Return what a file imports: how many folders up, or 0 for anywhere, and the steps from there."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            found += [(node.level, (*module, alias.name)) for alias in node.names]
    return tuple(found)


def _files_of(steps: list[str], bases: list[Path]) -> Iterator[Path]:
    """Yield the files that importing a dotted name runs; its last step may be a name inside the module."""
    for base in bases:
        folder, any_found = base, False
        for step in steps:
            for path in (folder / step / "__init__.py", folder / f"{step}.py"):
                if path.is_file():
                    any_found = True
                    yield path
                    break
            folder = folder / step
        if any_found:
            return


def _digest(files: Mapping[Path, bytes], root: Path) -> str:
    digest = hashlib.sha256()
    for path, content in files.items():
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def _file_of(function: Callable[..., Any]) -> Path | None:
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = code.co_filename if code else getattr(module, "__file__", None)
    if name is None or name.startswith("<"):
        return None
    path = Path(name).resolve()
    return path if path.is_file() else None


def _module_of(function: Callable[..., Any], file: Path | None, root: Path) -> str:
    name = getattr(function, "__module__", None) or "__main__"
    if file is not None and file in _loaded_as:
        return _loaded_as[file]
    if name != "__main__":
        return name
    if spec := getattr(sys.modules.get("__main__"), "__spec__", None):  # python -m package.module
        return str(spec.name)
    return f"path:{file.relative_to(root).as_posix()}" if file and file.is_relative_to(root) else name


# -- git


def git_state(root: Path, files: tuple[Path, ...] = ()) -> tuple[str | None, bool, str]:
    """Return the commit of a folder's repository, whether it differs from it, and how; files it does not know do."""
    commit = _git(root, "rev-parse", "HEAD")
    top = _git(root, "rev-parse", "--show-toplevel")
    if not commit or not top:
        return None, False, ""
    diff = _git(root, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color") or ""
    known = {Path(top.strip(), name) for name in (_git(root, "ls-files", "-z", "--full-name", ":/") or "").split("\0")}
    new = [path for path in files if path not in known and path.is_relative_to(top.strip())]
    diff += "".join(_as_new(path, Path(top.strip())) for path in new)
    is_dirty = bool(diff)
    if len(kept := diff.encode("utf-8", "replace")) > _DIFF_BYTES:
        diff = kept[: _DIFF_BYTES - 100].decode("utf-8", "ignore") + "\n... (cut: the diff is larger)\n"
    return commit.strip(), is_dirty, _storable(diff)


def forget_git() -> None:
    """Ask git anew, for files may have changed."""
    _git.cache_clear()


def _as_new(path: Path, top: Path) -> str:
    lines = path.read_text("utf-8", "replace").splitlines()
    head = f"--- /dev/null\n+++ b/{path.relative_to(top).as_posix()}\n@@ -0,0 +1,{len(lines)} @@\n"
    return head + "".join(f"+{line}\n" for line in lines)


@lru_cache(maxsize=256)
def _git(root: Path, *arguments: str) -> str | None:
    """Return what git says of a folder, None where it says nothing; with no hooks, and nothing of an outer git."""
    settings = ["core.fsmonitor=false", "core.hooksPath=/dev/null", "core.quotePath=false", "safe.directory=*"]
    command = ["git", "--no-optional-locks", *(word for setting in settings for word in ("-c", setting)), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None


def _storable(text: str) -> str:
    """Return a text as the database can store it."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
