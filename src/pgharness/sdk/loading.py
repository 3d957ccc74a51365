"""Loading: importing an experiment's file by the name that it has in every process.

A file of a package is imported by its dotted name, any other as `path:<relative to its project>`, with the same folders
to import from wherever that is: the file's own, and those above it up to the project's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pgharness.errors import HarnessError, NotFound
from pgharness.sdk.definition import MARKER, Experiment, folders_of, name_module, project_root

PATH_PREFIX = "path:"
_MODULE_PREFIX = "_pgharness_"

_added: list[str] = []  # to sys.path


def is_dotted(source: str) -> bool:
    return all(step.isidentifier() for step in source.split("."))


def module_name(file: Path, root: Path) -> str:
    """Return the name by which another process can import a file."""
    base, name = _package_name(file)
    others = {Path(place or os.curdir).resolve() for place in sys.path if place not in _added}
    if name and base in {root, root / "src", *others}:
        return name
    return PATH_PREFIX + file.relative_to(root).as_posix()


def _package_name(file: Path) -> tuple[Path, str | None]:
    """Return the folder to import a file from, and its dotted name where it is part of a package."""
    base = file.parent
    while (base / "__init__.py").exists() and base.parent != base:
        base = base.parent
    name = ".".join(file.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
    return base, name if base != file.parent and is_dotted(name) else None


def import_module(module: str, root: Path | None = None) -> ModuleType:
    """Import what an experiment's `module` names; root is its project's folder, by default that of this folder."""
    root = (root or project_root(Path.cwd() / MARKER)).resolve()
    if not module.startswith(PATH_PREFIX):
        places = [place for place in (root, root / "src") if place.is_dir() and not (place / "__init__.py").exists()]
        with _searched(places):
            return importlib.import_module(module)
    file = (root / module.removeprefix(PATH_PREFIX)).resolve()
    if not file.is_file():
        raise NotFound(f"there is no file {file}", hint="Start the worker in a checkout of the experiment's project.")
    name_module(file, module)
    base, name = _package_name(file)
    with _searched([*folders_of(file, root), base]):
        return importlib.import_module(name) if name else _import_file(file, root)


def load(module: str, qualname: str, root: Path | None = None) -> Experiment:
    """Return an experiment that was discovered, in this process. Raises NotFound where it is no more."""
    loaded = import_module(module, root)
    found: Any = loaded
    for step in qualname.split("."):
        found = getattr(found, step, None)
    if isinstance(found, Experiment):
        return found
    raise NotFound(f"{module} has no experiment {qualname}", hint="See what there is: pgharness experiments list")


def _import_file(file: Path, root: Path) -> ModuleType:
    name = _file_module_name(file, file.relative_to(root).as_posix())
    if (loaded := sys.modules.get(name)) and loaded.__file__ != str(file):  # of another project
        name = _file_module_name(file, str(file))
        loaded = sys.modules.get(name)
    if loaded:
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise HarnessError(f"{file} cannot be imported", hint="Name it *.py.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _file_module_name(file: Path, told: str) -> str:
    digest = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{_MODULE_PREFIX}{digest}_{re.sub(r'[^0-9A-Za-z_]', '_', file.stem)}"


@contextlib.contextmanager
def _searched(folders: Iterable[Path]) -> Iterator[None]:
    """Let imports look into these folders first, and not into those of other experiments, which follow afterwards.

    What was imported from those is hidden meanwhile: a helper of the same name may be here, or should be missed.
    """
    own = list(dict.fromkeys(str(folder) for folder in folders))
    others = [place for place in _added if place not in own]
    _added.extend(place for place in own if place not in sys.path)
    sys.path[:] = own + [place for place in sys.path if place not in own and place not in others]
    importlib.invalidate_caches()
    hidden = _hide(others)
    try:
        yield
    finally:
        sys.path.extend(others)
        for name, module in hidden.items():
            sys.modules.setdefault(name, module)


def _hide(folders: Collection[str]) -> dict[str, ModuleType]:
    hidden = {}
    tops = {name for name, module in sys.modules.items() if "." not in name and _home(module) in folders}
    for name in list(sys.modules):
        if name.partition(".")[0] in tops:
            hidden[name] = sys.modules.pop(name)
    return hidden


def _home(module: ModuleType) -> str | None:
    """Return the folder of sys.path that a top-level module is from."""
    file = getattr(module, "__file__", None)
    if not file or module.__name__.startswith(_MODULE_PREFIX) or module.__name__ == "__main__":
        return None
    path = Path(file)
    return str(path.parent.parent if path.name == "__init__.py" else path.parent)
