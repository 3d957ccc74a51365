"""Plugins end to end: an installed distribution's models, metrics, exporters and hooks, the broken ones among them.

Workers are real processes that find the distribution on their path. Whatever its plugins do, the worker processes that
were there at the beginning are there at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest

import world
from command_line import CommandLine
from fake_distribution import install

PLUGINS = """
import json
import os
import shutil
import time
from pathlib import Path


def write(item, style="plain"):
    assert "target" not in item["case"]
    return f"{style} note of {item['case']['name']}"

class Judge:
    async def __call__(self, item):
        count = len(item["rubric"]["criteria"])
        return {"verdicts": [{"rationale": item["note"], "satisfaction": 50}] * count}

def length(output, target, most=100):
    return min(len(output), most), most

def agrees(output, target):
    return target is None or float(str(target) in output)

def fail(output, target):
    raise LookupError(f"no idea about {output}")

def too_much(output, target):
    return 17

def die(output, target):
    if output.endswith("-2"):
        os._exit(7)
    return 1

def hang(output, target):
    time.sleep(600)

def pretty(folder, out):
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = (folder / "run.jsonl").read_text().splitlines()
    Path(out).write_text(f"{manifest['run']['run']}: {len(lines)} events")

def folders(folder, out):
    shutil.copytree(folder, out)

def clumsy(folder, out):
    Path(out).write_text("half")
    raise ValueError("cannot go on")

def idle(folder, out):
    pass

def note_down(event):
    with open(os.environ["HEARD"], "a") as file:
        file.write(json.dumps(event | {"pid": os.getpid()}) + "\\n")

def complain(event):
    raise RuntimeError("a hook that raises")

def doze(event):
    time.sleep(600)

def quit(event):
    if event["run"] == "fatal/1" and event["event"] == "run.started":
        os._exit(9)
"""
BROKEN = {
    "raising": "raise KeyError('no licence')\n",
    "leaving": "import os\nos._exit(0)\n",
    "hanging": "import time\ntime.sleep(600)\n",
}
ENTRY_POINTS = {
    "pgharness.models": {"writer": "demo_plugins:write", "judge": "demo_plugins:Judge"}
    | {name: f"{name}:answer" for name in BROKEN},
    "pgharness.metrics": {
        name: f"demo_plugins:{name}" for name in ("length", "agrees", "fail", "too_much", "hang", "die")
    }
    | {"raising": "raising:score"},
    "pgharness.exporters": {name: f"demo_plugins:{name}" for name in ("pretty", "folders", "clumsy", "idle")}
    | {"leaving": "leaving:export"},
}
HOOKS = {"pgharness.hooks": {name: f"demo_plugins:{name}" for name in ("note_down", "complain", "doze", "quit")}}


@pytest.fixture
def line(url: str, tmp_path: Path) -> CommandLine:
    """The command line where the distribution is installed, without hooks."""
    return _line(url, tmp_path, ENTRY_POINTS)


def _line(url: str, tmp_path: Path, entry_points: dict[str, dict[str, str]], **environment: str) -> CommandLine:
    modules = {"demo_plugins": PLUGINS} | BROKEN
    folder = tmp_path / "site"
    if not folder.exists():
        install(folder, "demo-plugins", entry_points, modules)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    told = {"PYTHONPATH": path, "PGHARNESS_PLUGIN_SECONDS": "10", "HEARD": str(tmp_path / "heard.jsonl")}
    return CommandLine(url, environment=told | environment)


@pytest.fixture
def base(url: str) -> Iterator[world.Database]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def _add_model(base: world.Database, name: str, provider: str, model: str, **fields: Any) -> None:
    base.execute(
        "insert into pgharness.models (name, provider, model, parameters, timeout_seconds, max_concurrency) values (%s, %s, %s, %s, %s, %s)",
        (
            name,
            provider,
            model,
            json.dumps(fields.get("parameters", {})),
            fields.get("timeout", 60),
            fields.get("most"),
        ),
    )


def _add(base: world.Database, instance: str, generator: str, grader: str | None, **columns: object) -> None:
    once = {"max_attempts": 1, "failure_threshold": 1} | columns
    world.add_instance(base, instance, cases=3, combinations=((generator, grader),), **once)


def _wait(condition: Callable[[], object], what: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} took longer than {seconds} s"
        time.sleep(0.05)


@contextlib.contextmanager
def _working(line: CommandLine, log: Path, *arguments: str, status: int = 0) -> Iterator[psutil.Process]:
    with log.open("w") as output:
        command = ("worker", "--queues", "note,grade", "--log-level", "info", *arguments)
        process = line.start(*command, stdout=output, stderr=output, start_new_session=True)
    try:
        yield psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == status, log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failures(base: world.Database, run: str) -> list[world.Row]:
    return world.rows(base, "select kind, cause, error, answer from pgharness.failed_items where run = %s", run)


def _status(base: world.Database, run: int) -> str:
    return str(world.run_of(base, run)["status"])


# -- models and metrics


def test_plugins_write_notes_and_grade_them_and_broken_ones_fail_their_items_alone(
    line: CommandLine, base: world.Database, tmp_path: Path
) -> None:
    _add_model(base, "writer", "plugin", "writer", parameters={"style": "dry"}, most=2)
    _add_model(base, "judge", "plugin", "judge")
    for name in (*BROKEN, "unheard_of"):
        _add_model(base, name, "plugin", name, timeout=1)
    for metric in ("length", "agrees", "fail", "too_much", "hang", "raising", "unheard_of"):
        parameters = {"most": 40} if metric == "length" else {}
        _add_model(base, f"m-{metric}", "metric", f"plugin:{metric}", parameters=parameters, timeout=1)
    good = ("judge", "m-length", "m-agrees")
    bad = ("raising", "unheard_of", "m-fail", "m-too_much", "m-hang", "m-raising", "m-unheard_of")
    for grader in (*good, *bad):
        _add(base, f"by {grader}", "writer", grader)
    for generator in (*BROKEN, "unheard_of"):
        _add(base, f"of {generator}", generator, None)
    base.execute("update pgharness.cases set target = null where name like 'by m-agrees-%'")
    with _working(line, tmp_path / "log", "--workers", "1", "--concurrency", "10") as supervisor:
        _wait(lambda: world.value(base, "select count(*) from pgharness.workers where status = 'running'"), "a worker")
        before = {child.pid for child in supervisor.children()}
        instances = [f"by {grader}" for grader in (*bad, *good)] + [f"of {name}" for name in (*BROKEN, "unheard_of")]
        runs = {name: world.start(base, name) for name in instances}
        _wait(lambda: {_status(base, run) for run in runs.values()} == {"completed"}, "the runs")
        assert {child.pid for child in supervisor.children()} == before, (tmp_path / "log").read_text()
        assert len(before) >= 1
    scores = {
        name: world.rows(
            base, "select distinct score, max_score from pgharness.grade_results where run_id = %s", runs[f"by {name}"]
        )
        for name in good
    }
    note = "dry note of by judge-1"
    notes = world.rows(
        base, "select output from pgharness.note_results where run_id = %s order by case_name", runs["by judge"]
    )
    assert [row["output"] for row in notes] == [note[:-1] + str(n) for n in (1, 2, 3)]
    assert [row["score"] / row["max_score"] for row in scores["judge"]] == [0.5]
    assert scores["m-length"] == [{"score": len("dry note of by m-length-1"), "max_score": 40}]
    assert scores["m-agrees"] == [{"score": 1, "max_score": 1}], "it needs no target"
    expected = {
        "by m-fail": ("code_failed", "LookupError: no idea about dry note of by m-fail"),
        "by m-too_much": ("invalid_output", "gave 17, which is no score"),
        "by m-hang": ("timeout", "gave no answer within 1 s"),
        "by m-raising": ("rejected", "KeyError: 'no licence'"),
        "by m-unheard_of": ("rejected", 'no plugin "unheard_of" of pgharness.metrics'),
        "by raising": ("rejected", 'plugin "raising" of pgharness.models, in demo-plugins 1.0, is broken'),
        "by unheard_of": ("rejected", "There are: hanging, judge, leaving, raising, writer."),
        "of raising": ("rejected", "KeyError: 'no licence'"),
        "of leaving": ("rejected", "importing it ends the process (exit status 0)"),
        "of hanging": ("rejected", "importing it takes longer than 10 seconds"),
        "of unheard_of": ("rejected", "retry_failed"),
    }
    for instance, (cause, words) in expected.items():
        failures = _failures(base, f"{instance}/1")
        assert len(failures) == (6 if instance in ("by raising", "by unheard_of") else 3), instance
        assert {row["cause"] for row in failures} == {cause}, failures
        assert all(words in row["error"] for row in failures), failures
    assert "demo_plugins.py" in _failures(base, "by m-fail/1")[0]["answer"]
    assert world.orphans(base) == []


def test_a_metric_that_kills_its_process_fails_the_one_item_that_made_it_so(
    line: CommandLine, base: world.Database, tmp_path: Path
) -> None:
    _add_model(base, "writer", "plugin", "writer")
    _add_model(base, "m-die", "metric", "plugin:die")
    _add(base, "i", "writer", "m-die")
    with _working(line, tmp_path / "log", "--concurrency", "1"):
        run = world.start(base, "i")
        _wait(lambda: _status(base, run) == "completed", "the run", 150)
    (failure,) = _failures(base, "i/1")
    assert (failure["kind"], failure["cause"]) == ("grade", "crashed")
    assert world.run_of(base, run)["grades_succeeded"] == 2


def test_doctor_lists_plugins_and_says_which_are_broken(line: CommandLine, base: world.Database) -> None:
    _add_model(base, "elsewhere", "plugin", "elsewhere")
    _add_model(base, "m-elsewhere", "metric", "plugin:elsewhere")
    _add(base, "i", "elsewhere", "m-elsewhere")
    found = {check["subject"]: check for check in line.run("doctor", "--json").json}
    assert found["plugin models/writer"]["verdict"] == "ok"
    assert found["plugin models/writer"]["finding"] == "in demo-plugins 1.0"
    broken = {name for name, check in found.items() if name.startswith("plugin ") and check["verdict"] == "warning"}
    expected = {f"plugin models/{name}" for name in BROKEN}
    assert broken == expected | {"plugin metrics/raising", "plugin exporters/leaving"}
    assert "takes longer than 10 seconds" in found["plugin models/hanging"]["finding"]
    assert "uninstall demo-plugins" in found["plugin models/raising"]["remedy"]
    for subject, group in (("model elsewhere", "models"), ("model m-elsewhere", "metrics")):
        assert found[subject]["finding"] == f'its plugin "elsewhere" of pgharness.{group} is not installed here'


# -- exporters


def test_an_exporter_writes_a_run_in_its_own_form_or_nothing(
    line: CommandLine, base: world.Database, tmp_path: Path
) -> None:
    world.add_instance(base, "trial")
    world.start(base)
    line.work()
    out = tmp_path / "out"
    out.mkdir()

    def export(form: str, name: str, status: int = 0) -> str:
        done = line.run("runs", "export", "trial/1", "--format", form, "--out", str(out / name), status=status)
        return " ".join((done.out + done.err).split())

    assert "as pretty" in export("pretty", "run.txt")
    assert (out / "run.txt").read_text().startswith("trial/1: ")
    export("folders", "copy")
    assert {"manifest.json", "run.jsonl"} <= {path.name for path in (out / "copy").iterdir()}
    assert "exists already" in export("pretty", "run.txt", 1)
    for form, words in {
        "clumsy": "ValueError: cannot go on (",
        "idle": "it wrote nothing",
        "leaving": "importing it ends the process",
        "xlsx": "There are: clumsy, folders, idle, leaving, pretty.",
    }.items():
        assert words in export(form, "none", 1)
    assert sorted(path.name for path in out.iterdir()) == ["copy", "run.txt"], "no half of anything stays"
    line.run("runs", "export", "trial/1", "--format", "pretty", status=2)


# -- hooks


def _heard(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "heard.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _events(tmp_path: Path, run: str) -> list[str]:
    return [event["event"] for event in _heard(tmp_path) if event["run"] == run]


def test_hooks_hear_each_event_once_whatever_other_hooks_do(url: str, base: world.Database, tmp_path: Path) -> None:
    broken = {f"broken-{name}": f"{name}:hear" for name in BROKEN}
    line = _line(url, tmp_path, {"pgharness.hooks": HOOKS["pgharness.hooks"] | broken})
    for instance in ("trial", "fatal"):
        world.add_instance(base, instance)
    logs = [tmp_path / "log 0", tmp_path / "log 1"]

    def said() -> str:
        return "".join(log.read_text() for log in logs if log.exists())

    with _working(line, logs[0]) as first, _working(line, logs[1]) as second:
        _wait(lambda: said().count("is called from here") == 4, "hooks to be called")
        _wait(lambda: world.value(base, "select count(*) from pgharness.workers where status = 'running'") == 2, "both")
        run = world.start(base)
        _wait(lambda: "run.completed" in _events(tmp_path, "trial/1"), "the end of the run to be heard")
        assert Counter(_events(tmp_path, "trial/1")) == {"run.started": 1, "run.completed": 1}
        assert _heard(tmp_path)[0] | {"pid": 0, "at": ""} == {
            "event": "run.started", "run_id": run, "run": "trial/1", "status": "running", "previous_status": None,
            "reason": None, "at": "", "pid": 0,
        }  # fmt: skip
        _wait(lambda: said().count("hook complain raised") == 2, "what was raised to be logged")
        _wait(lambda: "hook doze takes longer than 10 seconds" in said(), "a hook that hangs to be left")
        assert all(f'plugin "{name}" of pgharness.hooks' in said() for name in broken)
        # a hook that kills its process: it comes back, or the other takes over
        workers = _workers(base)
        world.start(base, "fatal")
        _wait(lambda: "the hooks' process" in said() and "ended with status 9" in said(), "the process to die")
        _wait(lambda: _held(base) == 4, "all hooks to be called again")
        world.start(base)
        _wait(lambda: "run.completed" in _events(tmp_path, "trial/2"), "the next run to be heard")
        assert Counter(_events(tmp_path, "trial/2")) == {"run.started": 1, "run.completed": 1}
        assert _workers(base) == workers, "the workers never noticed"
        assert all(each.is_running() for each in (first, second))


def _held(base: world.Database) -> int:
    """Return how many hooks there are whom a process of the cluster calls."""
    query = (
        "select count(*) from pg_locks as l join pg_stat_activity as a using (pid)"
        " where l.locktype = 'advisory' and l.granted and a.datname = current_database() and a.application_name = 'pgharness hooks'"
    )
    return int(world.value(base, query))


def _workers(base: world.Database) -> set[int]:
    rows = world.rows(base, "select pid from pgharness.workers where status = 'running'")
    return {row["pid"] for row in rows}


def test_when_the_host_that_calls_hooks_is_gone_another_takes_over(
    url: str, base: world.Database, tmp_path: Path
) -> None:
    line = _line(url, tmp_path, {"pgharness.hooks": {"note_down": "demo_plugins:note_down"}})
    world.add_instance(base, "trial")
    logs = [tmp_path / "log 0", tmp_path / "log 1"]
    with _working(line, logs[0], status=-signal.SIGKILL) as first:
        _wait(lambda: _held(base) == 1, "the first to call it")
        with _working(line, logs[1]):
            _wait(lambda: len(_workers(base)) == 2, "both workers")
            world.start(base)
            _wait(lambda: "run.completed" in _events(tmp_path, "trial/1"), "the run to be heard")
            assert "is called from here" not in logs[1].read_text()
            os.killpg(first.pid, signal.SIGKILL)
            _wait(lambda: "is called from here" in logs[1].read_text(), "the other to take over")
            world.start(base)
            _wait(lambda: "run.completed" in _events(tmp_path, "trial/2"), "the next run to be heard")
    for run in ("trial/1", "trial/2"):
        assert _events(tmp_path, run) == ["run.started", "run.completed"]
    assert len({event["pid"] for event in _heard(tmp_path)}) == 2


def test_the_end_of_the_last_run_is_heard_before_the_workers_command_ends(
    url: str, base: world.Database, tmp_path: Path
) -> None:
    line = _line(url, tmp_path, {"pgharness.hooks": {"note_down": "demo_plugins:note_down"}})
    world.add_instance(base, "trial", cases=5)
    log = tmp_path / "log"
    with _working(line, log) as supervisor:
        _wait(lambda: "is called from here" in log.read_text(), "the hook")
        run = world.start(base)
        _wait(lambda: _status(base, run) == "completed", "the run")
        os.killpg(supervisor.pid, signal.SIGTERM)  # as a service manager ends a service: all of its processes at once
    assert _events(tmp_path, "trial/1") == ["run.started", "run.completed"]


def test_without_hooks_there_is_no_process_for_them(line: CommandLine, base: world.Database, tmp_path: Path) -> None:
    with _working(line, tmp_path / "log") as supervisor:
        _wait(lambda: len(_workers(base)) == 1, "the worker")
        assert len([each for each in supervisor.children() if "spawn_main" in " ".join(each.cmdline())]) == 1
