"""The shape of the code: who may import whom, who may speak SQL, how large a file may grow, what may not be in one."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "pgharness"
MODULES = sorted(SRC.rglob("*.py"))

# From the top down. A unit (a module, or a package) imports units of lower rows only, so those of one row never each
# other; a new unit has to be put in a row here.
ROWS = (
    {"__main__"},
    {"cli", "sqldoc"},
    {"worker", "web"},
    {"queue"},
    {"sdk"},
    {"clinical_runner", "execution", "report"},
    {
        "analysis",
        "archiving",
        "datasets",
        "grading",
        "hooks",
        "importing",
        "metrics",
        "redteam",
        "simulation",
        "telemetry",
        "trace",
    }
    | {"training"},
    {"gateway", "prompts"},
    {"desk", "schema"},
    {"database", "embedded"},
    {"plugins", "settings"},
    {"environment", "errors", "types", "stats"},
    {"__init__"},
)
RANK = {unit: rank for rank, row in enumerate(reversed(ROWS)) for unit in row}

LINES = 600
LONG_FILES = {
    "src/pgharness/embedded.py": "one server on every host: binaries, accounts, locks and recovery lean on each other",
    "src/pgharness/execution/engine.py": "lines, places and ends of items are one state, which no other file should see",
    "sql/functions/clinical_runner.sql": "the clinical runner's tables are imported as a whole",
    "sql/functions/json_schema.sql": "all of JSON Schema",
}
FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {}


def unit(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def imported_units(path: Path) -> set[str]:
    """Return the units of pgharness that a module imports; a name of the package itself is unit __init__."""
    found = set()
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "pgharness":
            first = rest.split(".")[0]
            is_unit = (SRC / f"{first}.py").exists() or (SRC / first).is_dir()
            found.add(first if first and is_unit else "__init__")
    return found


def texts(path: Path) -> Iterator[str]:
    """Yield every string of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def project_files() -> list[Path]:
    """Return the project's files: what git tracks or would, or everything where this is no checkout."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = [
            "git",
            "-c",
            f"safe.directory={ROOT}",
            "-C",
            str(ROOT),
            "ls-files",
            "-z",
            "-co",
            "--exclude-standard",
        ]
        listed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        found = [ROOT / name for name in listed.split("\0") if name]
    else:
        folders = ("src", "sql", "tests", "experiments", "docs")
        found = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in found if path.is_file()]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    wrong = {name for name in imported_units(path) - {here} if RANK[name] >= RANK[here]}
    assert not wrong, f"{here} imports {', '.join(sorted(wrong))}, which is not below it"


def test_every_unit_has_its_row() -> None:
    assert {unit(path) for path in MODULES} <= RANK.keys()


def test_only_the_database_layer_imports_psycopg() -> None:
    names = {
        name
        for path in MODULES
        for name in imports(path)
        if re.match(r"psycopg(_pool)?\b", name) and unit(path) not in ("database", "schema", "embedded")
    }
    assert names <= {"psycopg.Connection"}, "others may name the type of a connection that they are handed, and no more"


def test_only_the_queue_imports_procrastinate() -> None:
    assert {unit(path) for path in MODULES for name in imports(path) if re.match(r"procrastinate\b", name)} == {"queue"}


def test_only_the_database_layer_holds_sql() -> None:
    statement = re.compile(r"\s*(select|insert|update|delete|create|alter|drop|truncate)\s")
    users = {unit(path) for path in MODULES for text in texts(path) if statement.match(text)}
    assert users <= {"database", "schema", "embedded"}


def test_commands_start_without_what_few_of_them_need() -> None:
    """Every command imports the whole command line; what takes long to import waits until it is used."""
    heavy = ("aiohttp", "numpy", "procrastinate", "scipy", "uvloop")
    code = f"import pgharness.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_public_names() -> None:
    sdk = ["AsyncContext", "Cancelled", "Context", "RunType", "Runnable", "TaskFailed", "Tracker", "batch_processor"]
    sdk += ["experiment", "llm_call", "metric", "timer"]
    for module, names in {"pgharness": ["__version__", *sdk], "pgharness.gateway": ["Gateway"]}.items():
        assert importlib.import_module(module).__all__ == names
        assert all(hasattr(importlib.import_module(module), name) for name in names)


def test_files_stay_readable() -> None:
    sources = [*MODULES, *(ROOT / "sql").rglob("*.sql")]
    long = {str(path.relative_to(ROOT)) for path in sources if len(path.read_text().splitlines()) > LINES}
    assert long <= LONG_FILES.keys(), f"more than {LINES} lines: split it, or add it here with the reason"


def test_functions_stay_readable() -> None:
    long = {
        f"{path.relative_to(SRC)}:{node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= FUNCTION_LINES
    }
    assert long <= LONG_FUNCTIONS.keys(), f"more than {FUNCTION_LINES} lines: split it, or add it here with the reason"


def test_no_module_is_named_after_nothing() -> None:
    assert not {"utils", "helpers", "common", "core", "base", "manager"} & {path.stem for path in MODULES}


def test_no_file_names_a_machine_or_a_registry() -> None:
    places = r"/(?:work|root|home|Users)/[\w.-]+/|/tmp/(?:venv|pgs)|[A-Z]:\\\\Users"
    registries = r"pypi\.org|pythonhosted\.org|--(?:extra-)?index-url|--trusted-host|artifactory|npmjs\.(?:org|com)"
    wrong = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        wrong += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), start=1)
            if path != Path(__file__) and re.search(f"{places}|{registries}", line)
        ]
    assert not wrong
