"""Discovery: every good experiment is found, every bad file is named with its line, and none of them harms anybody."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

import pgharness
from pgharness.errors import Conflict, NotFound, SettingsError
from pgharness.sdk import discovery
from pgharness.sdk.discovery import discover, discover_isolated, init, load, scaffold, snapshot
from pgharness.settings import Settings

GOOD = """
from pgharness.sdk.definition import experiment

@experiment(name="{name}")
def run(): ...
"""

Write = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if not name.startswith("pgharness"):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    (tmp_path / ".pgharness").write_text('experiments = "experiments"\nproject = "tests"\n')
    (tmp_path / "experiments").mkdir()

    def write(name: str, text: str) -> Path:
        path = tmp_path / "experiments" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    return write


def good(name: str) -> str:
    return GOOD.format(name=name)


# -- what is found


def test_a_folder_is_searched_through(write: Write, tmp_path: Path) -> None:
    write("b.py", good("b"))
    write("deep/er/a.py", good("a"))
    write(".hidden/c.py", good("hidden"))
    write("venv/pyvenv.cfg", "")
    write("venv/lib/d.py", good("environment"))
    found = discover([tmp_path / "experiments"])
    assert found.problems == []
    assert {name: each.module for name, each in found.experiments.items()} == {
        "b": "path:experiments/b.py",
        "a": "path:experiments/deep/er/a.py",
    }
    assert list(discover([tmp_path / "experiments/b.py"]).experiments) == ["b"]


def test_files_that_define_nothing_are_not_run(write: Write, tmp_path: Path) -> None:
    write("script.py", "import pgharness  # an experiment of its own\nraise SystemExit('was run')\n")
    write("manual.py", "from pgharness.sdk import manual\nraise SystemExit('was run')\n")
    write("other.py", "experiment = None\nraise SystemExit('was run')\n")
    write("indirect.py", "import pgharness.sdk.definition as d\n@d.experiment\ndef found(): ...\n")
    write("called.py", "from pgharness.sdk import definition as d\nnamed = d.experiment(name='y')(lambda: 1)\n")
    found = discover([tmp_path / "experiments"])
    assert found.problems == [] and sorted(found.experiments) == ["found", "y"]
    assert found.experiments["y"].qualname == "named"
    assert load("path:experiments/called.py", "named", tmp_path).name == "y"


def test_an_experiment_is_found_where_it_is_defined(write: Write, tmp_path: Path) -> None:
    write("a.py", good("first"))
    write("b.py", "from a import run\n" + good("second").replace("def run", "def other"))
    found = discover([tmp_path / "experiments"])
    assert found.problems == []
    assert [each.module for each in found.experiments.values()] == ["path:experiments/a.py", "path:experiments/b.py"]


def test_files_import_their_neighbours_and_the_project(write: Write, tmp_path: Path) -> None:
    (tmp_path / "at_root.py").write_text("ROOT = 1")
    write("beside.py", "BESIDE = 2")
    write("a/helper.py", "NAME = 'a'")
    write("b/helper.py", "NAME = 'b'")
    for folder in "ab":
        write(f"{folder}/one.py", "import at_root, beside, helper\n" + good("{0}").replace('"{0}"', "helper.NAME"))
    write("c/one.py", "import helper\n" + good("c"))
    found = discover([tmp_path / "experiments"])
    assert sorted(found.experiments) == ["a", "b"]
    (problem,) = found.problems
    assert (problem.path, problem.line) == (str(tmp_path / "experiments/c/one.py"), 1)
    assert "No module named 'helper'" in problem.message


def test_a_folder_in_a_package_goes_by_its_dotted_name(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    folder = tmp_path / "src" / "acme_tests" / "trials"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("")
    (folder / "near.py").write_text("NAME = 'packaged'")
    (folder / "one.py").write_text("from .near import NAME\n" + good("x").replace('"x"', "NAME"))
    found = discover([folder])
    assert found.problems == []
    assert found.experiments["packaged"].module == "acme_tests.trials.one"
    for source in ("acme_tests", "acme_tests.trials", "acme_tests.trials.one"):
        assert discover([source]).experiments.keys() == {"packaged"}, source
    script = f"""if True:
        from pathlib import Path
        from pgharness.sdk.discovery import load
        print(load("acme_tests.trials.one", "run", Path({str(tmp_path)!r})).name)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "packaged\n"


def test_a_package_elsewhere_in_the_project_is_loaded_by_its_path(write: Write, tmp_path: Path) -> None:
    write("group/__init__.py", "")
    write("group/near.py", "")
    write("group/one.py", "from . import near\n" + good("grouped"))
    found = discover([tmp_path / "experiments"])
    assert found.problems == []
    assert found.experiments["grouped"].module == "path:experiments/group/one.py"
    assert load("path:experiments/group/one.py", "run", tmp_path).name == "grouped"


def test_entry_points_are_a_source(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "site-packages" / "plugged_tests"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text(good("plugged"))
    monkeypatch.syspath_prepend(str(installed.parent))
    point = importlib.metadata.EntryPoint("any", "plugged_tests", discovery.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    found = discover([discovery.ENTRY_POINTS])
    assert found.problems == [] and found.experiments["plugged"].module == "plugged_tests"


# -- what is wrong


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("from pgharness import experiment\ndef (", 2, "SyntaxError"),
        ("# experiment(pgharness)\nx = experiment(1)", 2, "NameError"),
        ("import sys\nsys.exit(3)\n" + good("x"), 2, "SystemExit: it ends the process (3)"),
        ("import pgharness_nowhere\n" + good("x"), 1, "No module named 'pgharness_nowhere'"),
        (good("x").replace("run()", "run(a, b)"), 5, 'experiment "x" takes a, b'),
        (good(""), 5, "no name"),
    ],
)
def test_a_bad_file_is_told_with_its_line(write: Write, tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write("bad.py", text)
    write("good.py", good("good"))
    found = discover([tmp_path / "experiments"])
    assert list(found.experiments) == ["good"]
    (problem,) = found.problems
    assert problem.path == str(path) and message in problem.message
    assert problem.line is not None and abs(problem.line - line) <= 1  # of a decorator or of what it decorates


def test_two_of_a_name_are_told_and_the_first_is_used(write: Write, tmp_path: Path) -> None:
    first, second = write("a.py", good("same")), write("b.py", good("same"))
    for found in (discover([tmp_path / "experiments"]), discover_isolated([tmp_path / "experiments"])):
        (problem,) = found.problems
        assert problem.path == str(second) and f'"same" is also defined in {first}:' in problem.message


def test_a_config_that_cannot_be_stored_is_told(write: Write, tmp_path: Path) -> None:
    write(
        "bad.py",
        """
        from collections.abc import Callable
        from pydantic import BaseModel
        from pgharness.sdk.definition import experiment
        class Config(BaseModel):
            call: Callable[[], int]
        @experiment
        def run(config: Config): ...
        """,
    )
    (problem,) = discover([tmp_path / "experiments"]).problems
    assert problem.line == 7 and "Config has no JSON Schema" in problem.message


def test_a_source_that_is_not_there_is_told(tmp_path: Path) -> None:
    sources = [str(tmp_path / "nowhere"), "nowhere.at_all", "json.nowhere"]
    assert [problem.path for problem in discover(sources).problems] == sources
    assert [problem.path for problem in discover_isolated(sources).problems] == sources


def test_what_is_no_more_cannot_be_loaded(write: Write, tmp_path: Path) -> None:
    write("a.py", good("a"))
    with pytest.raises(NotFound, match="no experiment gone"):
        load("path:experiments/a.py", "gone", tmp_path)
    with pytest.raises(NotFound, match="no file"):
        load("path:experiments/b.py", "run", tmp_path)


# -- in another process


def test_isolated_discovery_returns_plain_data_and_imports_nothing_here(write: Write, tmp_path: Path) -> None:
    write("a.py", "import os\nprint('noise'); os.write(1, b'more')\ninput if True else 0\n" + good("a"))
    before = set(sys.modules)
    found = discover_isolated([tmp_path / "experiments"])
    assert found.problems == []
    (row,) = found.experiments
    assert (row["name"], row["module"], row["function"]) == ("a", "path:experiments/a.py", "run")
    assert row["config_schema"] == {"type": "object", "additionalProperties": False}
    assert len(row["digest"]) == 64 and row["source"] == (tmp_path / "experiments/a.py").read_text()
    assert (row["path"], row["root"]) == (str(tmp_path / "experiments/a.py"), str(tmp_path))
    assert not [name for name in set(sys.modules) - before if name.startswith("_pgharness_")]


def test_files_that_hang_crash_or_kill_are_named_and_the_others_found(write: Write, tmp_path: Path) -> None:
    write("a.py", good("a"))
    exits = write("b.py", "import os\nprint('last words', flush=True)\nos._exit(7)\n" + good("b"))
    hangs = write("c.py", "while True: pass\n" + good("c"))
    killed = write("d.py", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n" + good("d"))
    write("e.py", "import threading, time\nthreading.Thread(target=time.sleep, args=(999,)).start()\n" + good("e"))
    write("f.py", good("f"))
    found = discover_isolated([tmp_path / "experiments"], timeout=6)
    assert [row["name"] for row in found.experiments] == ["a", "e", "f"]
    problems = {problem.path: problem.message for problem in found.problems}
    assert problems.keys() == {str(exits), str(hangs), str(killed)}
    assert problems[str(exits)] == "importing it ends the process (exit status 7): last words"
    assert problems[str(hangs)] == "importing it takes longer than 6 seconds"
    assert "importing it kills the process (SIGSEGV)" in problems[str(killed)]


def test_a_hung_import_ends_with_its_parent(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    write("a.py", f"import os\nopen({str(mark)!r}, 'w').write(str(os.getpid()) + '.')\nwhile True: pass\n" + good("a"))
    script = f"from pgharness.sdk import discovery as d; d.discover_isolated([{str(tmp_path / 'experiments')!r}])"
    parent = subprocess.Popen([sys.executable, "-c", script])
    _wait_until(lambda: mark.exists() and mark.read_text().endswith("."))
    parent.kill()
    parent.wait()
    child = int(mark.read_text().rstrip("."))
    _wait_until(lambda: not _runs(child))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_that_cannot_start_is_told(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.py", good("a"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (problem,) = discover_isolated([tmp_path / "experiments"]).problems
    assert "discovery ends the process (exit status 1)" in problem.message


# -- which sources, and whether they changed


def test_the_sources_are_configured_or_the_projects_or_beside(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"HOME": "/nonexistent", "PGHARNESS_EXPERIMENTS": os.pathsep.join(["/a", "b.c"])}
    assert Settings.from_env(environment).experiments == ("/a", "b.c")
    assert Settings.from_env({"HOME": "/nonexistent"}).experiments == ()
    assert discovery.default_sources(("/a", "b.c")) == ("/a", "b.c")
    deep = tmp_path / "deep" / "er"
    deep.mkdir(parents=True)
    expected = (str(tmp_path / "experiments"), discovery.ENTRY_POINTS)
    assert discovery.default_sources((), deep) == expected
    (tmp_path / ".pgharness").unlink()
    write("a.py", "")
    assert discovery.default_sources((), tmp_path) == (discovery.ENTRY_POINTS,)
    write("a.py", good("a"))
    assert discovery.default_sources((), tmp_path) == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PGHARNESS_EXPERIMENTS", raising=False)
    assert list(discover().experiments) == ["a"]


@pytest.mark.parametrize("text", ["experiments = 3", "experiments = [3]", "project = 3", "folder = 'x'", "no toml"])
def test_a_marker_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / ".pgharness").write_text(text)
    with pytest.raises(SettingsError, match=r"\.pgharness cannot be read") as caught:
        discovery.default_sources((), tmp_path)
    assert caught.value.hint


def test_a_snapshot_changes_with_the_files_and_with_what_they_import(write: Write, tmp_path: Path) -> None:
    path = write("a.py", "import beside\n" + good("a"))
    beside = write("beside.py", "")
    seen = [snapshot([tmp_path / "experiments"])]
    assert snapshot([tmp_path / "experiments"]) == seen[0]
    for change in (
        lambda: beside.write_text("x = 1"),
        lambda: path.write_text(path.read_text() + "\n"),
        lambda: write("b.py", good("b")),
        lambda: path.unlink(),
    ):
        change()
        seen.append(snapshot([tmp_path / "experiments"]))
    assert len(set(seen)) == len(seen)


# -- beginning


def test_init_makes_a_project_once(tmp_path: Path) -> None:
    marker = init(tmp_path / "new", project='my "own"')
    assert discovery.read_marker(marker) == ((str(tmp_path / "new" / "experiments"),), 'my "own"')
    with pytest.raises(Conflict, match="is a project already") as caught:
        init(tmp_path / "new")
    assert caught.value.hint and str(marker) in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(Conflict, match="is a file"):
        init(tmp_path, experiments="file")
    assert not (tmp_path / ".pgharness").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/one.py").write_text(good("kept"))
    assert discovery.read_marker(init(tmp_path, experiments="kept"))[1] == tmp_path.name
    assert list(discover(discovery.default_sources((), tmp_path)).experiments) == ["kept"]


@pytest.mark.parametrize("name", ["triage", "my-exp 2", "2 fast", "class", 'say "hi"', "grün", "Config", "experiment"])
def test_a_new_experiment_works(write: Write, tmp_path: Path, name: str) -> None:
    text = scaffold(name)
    assert len(text.splitlines()) <= 25
    compile(text, "new", "exec")
    if callable(getattr(pgharness, "experiment", None)) and hasattr(pgharness, "Context"):
        write("new.py", text)
        found = discover([tmp_path / "experiments"])
        assert found.problems == [] and list(found.experiments) == [name]
