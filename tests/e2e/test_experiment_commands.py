"""The commands for experiments in code, on a real database: what they print, what they change, their exit status."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from psycopg import sql
from psycopg.types.json import Jsonb

import world
from command_line import CommandLine, Done
from pgharness.cli import exports
from pgharness.cli.configs import fields, laid_over

_GROUPS = itertools.count(1)
DICE = '''
"""Throws dice."""

from __future__ import annotations

from pydantic import BaseModel, Field

from pgharness import Context, experiment, timer


class Die(BaseModel):
    sides: int = Field(6, ge=2, le=100, description="How many sides it has")
    name: str = "d"


class Config(BaseModel):
    rounds: int = Field(3, ge=1, le=1000, description="How often to throw")
    label: str = Field("plain", max_length=20)
    note: str | None = None
    die: Die = Die()
    fails: bool = False


@timer("throwing")
def throw(config: Config, round: int) -> int:
    return round % config.die.sides + 1


@experiment(name="dice", memory_mb=512)
def dice(ctx: Context, config: Config) -> dict[str, int]:
    """Throw dice and add them up."""
    print("from the code")
    total = 0
    for round in range(config.rounds):
        total += throw(config, round)
        ctx.metric("share", total / config.rounds, "share", step=round)
        ctx.result("sum", total)
    ctx.log_llm_call("gpt-4", "how many?", "six", 12.5)
    ctx.info("thrown", total=total)
    ctx.artifact("plots/sum.txt", f"sum {total}")
    if config.fails:
        raise ValueError("the dice are loaded")
    return {"total": total}
'''
BROKEN = """
from pgharness import experiment

def helper():
    return 1

import no_such_module_at_all
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the experiment `dice`, in which commands are typed."""
    folder = tmp_path / "lab"
    (folder / "experiments").mkdir(parents=True)
    (folder / "experiments" / "dice.py").write_text(DICE)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def line(url: str) -> CommandLine:
    return CommandLine(url)


@pytest.fixture
def shown(url: str) -> Iterator[world.Database]:
    """The database, to look at what commands did."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


# -- experiments


def test_the_list_has_what_is_registered_and_what_is_found(project: Path, line: CommandLine) -> None:
    (listed,) = [row for row in line.call("experiments", "list", "--json").json if row["experiment"] == "dice"]
    assert (listed["is_registered"], listed["version"], listed["run_count"]) == (False, None, 0)
    assert "1 not registered yet: pgharness experiments sync" in line.call("experiments", "list").out
    line.call("experiments", "sync")
    (listed,) = [row for row in line.call("experiments", "list", "--json").json if row["experiment"] == "dice"]
    assert (listed["is_registered"], listed["version"]) == (True, 1)
    assert listed["path"] == str(project / "experiments" / "dice.py")
    assert "not registered" not in line.call("experiments", "list").out


def test_what_cannot_be_imported_is_told_with_its_line_and_stops_nothing(project: Path, line: CommandLine) -> None:
    broken = project / "experiments" / "broken.py"
    broken.write_text(BROKEN)
    listed = line.call("experiments", "list")
    assert f"{broken}:7: ModuleNotFoundError" in listed.err
    assert "dice" in listed.out
    synced = line.call("experiments", "sync", "--json", status=1)
    assert [(row["experiment"], row["state"]) for row in synced.json["experiments"]] == [("dice", "new")]
    (problem,) = synced.json["problems"]
    assert (problem["path"], problem["line"]) == (str(broken), 7)
    broken.unlink()
    assert line.call("experiments", "sync", "--json").json["problems"] == []


def test_sync_says_what_is_new(project: Path, line: CommandLine, shown: world.Database) -> None:
    def synced() -> list[tuple[str, str, int]]:
        told = line.call("experiments", "sync", "--json").json["experiments"]
        return [(row["experiment"], row["state"], row["version"]) for row in told]

    assert synced() == [("dice", "new", 1)]
    assert synced() == [("dice", "unchanged", 1)]
    file = project / "experiments" / "dice.py"
    file.write_text(DICE + "\n# changed\n")
    assert synced() == [("dice", "new version", 2)]
    assert world.value(shown, "select count(*) from pgharness.experiment_versions") == 2


def test_sync_tells_of_a_name_that_is_taken(project: Path, line: CommandLine, shown: world.Database) -> None:
    shown.execute("insert into pgharness.experiments (name) values ('dice')")
    refused = line.call("experiments", "sync", status=1)
    assert "dice.py" in refused.err and "is one of notes and grades" in refused.err


def test_show_describes_the_configuration_as_fields(project: Path, line: CommandLine) -> None:
    line.call("experiments", "sync")
    line.call("instances", "create", "nine", "--experiment", "dice", "--set", "rounds=9")
    told = line.call("experiments", "show", "dice", "--json").json
    described = {row["field"]: row for row in told["fields"]}
    assert list(described) == ["rounds", "label", "note", "die", "die.sides", "die.name", "fails"]
    assert described["rounds"] == {
        "field": "rounds",
        "type": "integer",
        "default": "3",
        "limits": ">= 1; <= 1000",
        "description": "How often to throw",
    }
    assert described["note"]["type"] == "string | null"
    assert described["die.sides"]["limits"] == ">= 2; <= 100"
    assert [version["number"] for version in told["versions"]] == [1]
    assert [instance["name"] for instance in told["instances"]] == ["nine"]
    assert (told["memory_mb"], told["kind"]) == (512, "code")
    text = words(line.call("experiments", "show", "dice").out)
    assert "Throw dice and add them up." in text and "How often to throw" in text and "rounds=9" in text


def test_show_of_an_unknown_experiment_says_what_to_type(project: Path, line: CommandLine) -> None:
    assert "pgharness experiments sync" in line.call("experiments", "show", "dice", status=1).err
    line.call("experiments", "sync")
    assert "Did you mean dice?" in line.call("experiments", "show", "dic", status=1).err


def test_a_new_experiment_runs_as_it_is_written(project: Path, line: CommandLine) -> None:
    written = line.call("experiments", "new", "My first: one")
    file = project / "experiments" / "my_first_one.py"
    assert f"{Path('experiments') / 'my_first_one.py'} is written" in written.out and file.exists()
    assert "pgharness run 'My first: one'\n" in written.out
    before = file.read_text()
    refused = line.call("experiments", "new", "my first one", status=1)
    assert "exists already" in refused.err and file.read_text() == before
    done = line.run("run", "My first: one", "--set", "steps=2")
    assert "is completed" in done.out and "0.25" in done.out


def test_a_new_experiment_elsewhere_is_run_by_its_file(project: Path, line: CommandLine) -> None:
    written = line.call("experiments", "new", "away", "--folder", "elsewhere")
    assert "pgharness run away --script elsewhere/away.py" in written.out
    assert "is completed" in line.run("run", "away", "--script", "elsewhere/away.py").out


# -- instances


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": "integer"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "mode": {"enum": ["fast", "slow"]},
        "inner": {"$ref": "#/$defs/Inner"},
        "prices": {"type": "object", "additionalProperties": {"type": "string"}},
        "items": {"type": "array", "items": {"type": "string"}},
        "dotted.name": {"type": "integer"},
    },
    "$defs": {"Inner": {"type": "object", "properties": {"text": {"type": "string"}, "deep": {"type": "object"}}}},
}


@pytest.mark.parametrize(
    ("setting", "config"),
    [
        ("name=12", {"name": "12"}),
        ("name=null", {"name": "null"}),
        ('name="quoted"', {"name": '"quoted"'}),
        ("name=a=b", {"name": "a=b"}),
        ("name=", {"name": ""}),
        ("count=12", {"count": 12}),
        ("count=twelve", {"count": "twelve"}),
        ("maybe=null", {"maybe": None}),
        ("maybe=7", {"maybe": "7"}),
        ("either=7", {"either": 7}),
        ("either=true", {"either": "true"}),
        ("mode=fast", {"mode": "fast"}),
        ("inner.text=5", {"inner": {"text": "5"}}),
        ("inner.deep.er=5", {"inner": {"deep": {"er": 5}}}),
        ("prices.gpt=1", {"prices": {"gpt": "1"}}),
        ('prices={"gpt-3.5": "1"}', {"prices": {"gpt-3.5": "1"}}),
        ('items=["a"]', {"items": ["a"]}),
        ("dotted.name=1", {"dotted.name": 1}),
        ("unknown=[1, 2.5]", {"unknown": [1, 2.5]}),
        ("unknown=NaN", {"unknown": "NaN"}),
        ("a.b=1", {"a": {"b": 1}}),
    ],
)
def test_what_is_set_becomes_what_the_schema_asks_for(setting: str, config: dict[str, Any]) -> None:
    assert laid_over({}, [setting], SCHEMA) == config


def test_settings_are_laid_over_and_leave_the_rest() -> None:
    base = {"inner": {"text": "a", "deep": {"x": 1}}, "items": ["a", "b"], "count": 1}
    over = laid_over(base, ["inner.deep.y=2", "items.1=3", "count=2", "count=3"], SCHEMA)
    assert over == {"inner": {"text": "a", "deep": {"x": 1, "y": 2}}, "items": ["a", "3"], "count": 3}
    assert base["inner"] == {"text": "a", "deep": {"x": 1}}
    for wrong in ("count", "=1", "count.a=1"):
        with pytest.raises(typer.BadParameter):
            laid_over(base, [wrong], SCHEMA)


def test_a_recursive_schema_has_fields_too() -> None:
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/T"}}}
    assert [row["field"] for row in fields(tree | {"$defs": {"T": tree}})][:2] == ["left", "left.left"]
    assert fields(True) == []


def test_an_instance_is_made_listed_and_copied(project: Path, line: CommandLine) -> None:
    line.call("experiments", "sync")
    settings = ["--set", "rounds=9", "--set", "label=7", "--set", "die.sides=20"]
    made = line.call(
        "instances", "create", "nine", "--experiment", "dice", *settings, "--description", "many", "--json"
    ).json
    assert made["config"]["die"] == {"sides": 20, "name": "d"}
    assert (made["config"]["rounds"], made["config"]["label"], made["description"]) == (9, "7", "many")
    copied = line.call("instances", "clone", "nine", "ten", "--set", "rounds=10", "--json").json
    assert copied["config"] == made["config"] | {"rounds": 10}
    listed = line.call("instances", "list", "--experiment", "dice", "--json").json
    assert [row["name"] for row in listed] == ["nine", "ten"]
    text = line.call("instances", "list").out
    assert "nine" in text and "rounds=10" in words(text)
    assert "pgharness run dice --instance eleven" in line.call("instances", "clone", "ten", "eleven").out


def test_making_an_instance_twice_makes_it_once(project: Path, line: CommandLine, shown: world.Database) -> None:
    line.call("experiments", "sync")
    create = ("instances", "create", "nine", "--experiment", "dice", "--set")
    first = line.call(*create, "rounds=9", "--json").json
    assert line.call(*create, "rounds=9", "--json").json == first
    assert 'there is an instance "nine" already' in line.call(*create, "rounds=10", status=1).err
    assert "already" in line.call("instances", "clone", "nine", "nine", status=1).err
    assert world.value(shown, "select config ->> 'rounds' from pgharness.instances where name = 'nine'") == "9"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("bogus=1", "config.bogus is not a known property"),
        ("rounds=0", "less than the minimum"),
        ("rounds=x", "rounds"),
    ],
)
def test_the_database_refuses_what_does_not_fit(project: Path, line: CommandLine, setting: str, said: str) -> None:
    line.call("experiments", "sync")
    refused = line.call("instances", "create", "bad", "--experiment", "dice", "--set", setting, status=1)
    assert said in words(refused.err)
    assert line.call("instances", "list", "--json").json == []


def test_a_configuration_comes_from_a_file_or_standard_input(project: Path, line: CommandLine) -> None:
    line.call("experiments", "sync")
    file = project / "config.json"
    file.write_text('{"rounds": 8, "label": "from a file"}')
    create = ("instances", "create", "eight", "--experiment", "dice", "--json", "--config")
    made = line.call(*create, str(file), "--set", "rounds=9").json
    assert (made["config"]["rounds"], made["config"]["label"]) == (9, "from a file")
    process = line.start("instances", "create", "five", *create[3:], "-", stdin=subprocess.PIPE)
    assert json.loads(process.communicate('{"rounds": 5}', timeout=60)[0])["config"]["rounds"] == 5
    for text, said in (("{", "is no JSON"), ("[1]", "holds no JSON object"), ('{"rounds": NaN}', "is no JSON")):
        file.write_text(text)
        assert said in line.call(*create, str(file), status=1).err
    assert "cannot be read" in line.call(*create, "missing.json", status=1).err


def test_an_instance_of_notes_is_copied_with_its_cases_and_models(line: CommandLine, shown: world.Database) -> None:
    world.add_instance(shown, "trial", note_replications=2)
    line.call("instances", "clone", "trial", "copy")
    for table in ("instance_cases", "model_combinations"):
        counts = world.rows(shown, f"select instance, count(*) from pgharness.{table} group by 1 order by 1")
        assert [row["instance"] for row in counts] == ["copy", "trial"]
        assert counts[0]["count"] == counts[1]["count"] > 0
    ends = world.rows(shown, "select note_replications, seed from pgharness.instances")
    assert ends[0] == ends[1]
    assert "1 notes" not in line.call("start", "copy").out
    assert world.value(shown, "select note_count > 0 from pgharness.runs")


def test_unknown_instances_and_experiments_are_refused(project: Path, line: CommandLine) -> None:
    assert (
        'experiment "dice" does not exist'
        in line.call("instances", "create", "x", "--experiment", "dice", status=1).err
    )
    assert 'instance "x" does not exist' in line.call("instances", "clone", "x", "y", status=1).err
    assert 'instance "x" does not exist' in line.call("instances", "clone", "x", "y", "--set", "a=1", status=1).err
    assert "does not exist" in line.call("instances", "list", "--experiment", "x", status=1).err
    assert "No instances yet" in line.call("instances", "list").out


# -- run


def test_a_run_here_is_recorded_and_summed_up(project: Path, line: CommandLine, shown: world.Database) -> None:
    done = line.run("run", "dice", "--set", "rounds=4")
    assert done.out.startswith("from the code\n")
    text = words(done.out)
    assert "run 1 (dice/1) is completed after" in text and "sum 10" in text and "share 4 1.25" in text
    assert "pgharness runs show dice/1" in text and "pgharness runs logs dice/1" in text
    (row,) = world.rows(shown, "select kind, instance, status from pgharness.runs")
    assert row == {"kind": "trial", "instance": "dice", "status": "completed"}
    told = line.run("run", "dice", "--instance", "other", "--json").json
    assert (told["instance"], told["result"], told["results"]["sum"]) == ("other", {"total": 6}, 6)
    assert [metric["name"] for metric in told["metrics"]] == ["share"]
    assert told["config"]["rounds"] == 3


def test_a_trial_takes_the_place_of_earlier_trials(project: Path, line: CommandLine, shown: world.Database) -> None:
    def names() -> list[str]:
        return [row["name"] for row in world.rows(shown, "select name from pgharness.runs order by id")]

    line.run("run", "dice")
    line.run("run", "dice", "--keep-trials")
    line.run("run", "dice", "--milestone", "--run-id", "v1.0")
    assert names() == ["dice/1", "dice/2", "v1.0"]
    line.run("run", "dice", "--set", "fails=true", status=5)
    assert names() == ["v1.0", "dice/3"]
    assert (
        "Choose another"
        in line.run("run", "dice", "--set", "fails=false", "--milestone", "--run-id", "v1.0", status=1).err
    )


def test_a_run_that_fails_says_why_in_its_exit_status_too(project: Path, line: CommandLine) -> None:
    done = line.run("run", "dice", "--set", "fails=true", status=5)
    assert "is failed" in done.out and "the dice are loaded" in done.out
    assert re.search(r'dice.py", line \d+, in dice\n +raise', done.out)
    shown = line.call("runs", "show", "dice/1")
    assert "the dice are loaded" in shown.out


def test_a_run_id_is_for_milestones(project: Path, line: CommandLine) -> None:
    refused = line.call("run", "dice", "--run-id", "v1", status=2)
    assert "add --milestone" in words(refused.err)


def test_an_experiment_is_found_by_module_or_script(project: Path, line: CommandLine, shown: world.Database) -> None:
    package = project / "labour"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "coins.py").write_text(DICE.replace("dice", "coins"))
    line.run("run", "coins", "--module", "labour.coins")
    line.run("run", "coins", "-m", "labour.coins.coins", "--keep-trials")
    line.run("run", "dice", "-s", "experiments/dice.py")
    found = world.rows(
        shown, "select experiment, module, function from pgharness.experiment_list where kind = 'code' order by 1"
    )
    assert [tuple(row.values()) for row in found] == [
        ("coins", "labour.coins", "coins"),
        ("dice", "path:dice.py", "dice"),  # in a project that nothing marks as one
    ]
    assert "It has: coins." in line.run("run", "dice", "--module", "labour.coins", status=1).err
    assert "there is no folder" in line.run("run", "dice", "--module", "labour.nothing", status=1).err
    both = line.call("run", "dice", "-m", "labour.coins", "-s", "experiments/dice.py", status=2)
    assert "not both" in words(both.err)


def test_an_experiment_that_is_not_here_says_what_to_type(project: Path, line: CommandLine) -> None:
    assert "Did you mean dice?" in line.call("run", "dicey", status=1).err
    nothing = line.call("run", "weather", status=1).err
    assert "--script FILE" in nothing and "pgharness experiments new" in words(nothing)
    assert str(project / "experiments") in nothing.replace("\n", "")


def test_what_is_set_stays_with_the_instance_until_it_is_reset(
    project: Path, line: CommandLine, shown: world.Database
) -> None:
    def rounds() -> str:
        return str(world.value(shown, "select config ->> 'rounds' from pgharness.instances where name = 'dice'"))

    line.run("run", "dice", "--set", "rounds=5")
    changed = line.run("run", "dice", "--set", "label=x")
    assert rounds() == "5" and "instance dice has now" in changed.err and "label=x" in changed.err
    refused = line.run("run", "dice", "--set", "rounds=0", status=1)
    assert "less than the minimum" in refused.err and "pgharness experiments show dice" in refused.err
    (project / "experiments" / "dice.py").write_text(DICE.replace("rounds", "throws"))
    stale = line.run("run", "dice", status=1)
    assert "rounds" in stale.err and "--reset" in stale.err
    assert world.value(shown, "select count(*) from pgharness.runs") == 1
    line.run("run", "dice", "--reset", "--set", "throws=2")
    assert world.value(shown, "select config ->> 'throws' from pgharness.instances where name = 'dice'") == "2"


def test_a_detached_run_is_left_to_workers(project: Path, line: CommandLine, shown: world.Database) -> None:
    done = line.call("run", "dice", "--detach", "--milestone")
    assert "run 1 (dice/1) is running" in done.out
    assert "No running worker has this experiment: pgharness worker" in done.out
    assert "pgharness runs logs dice/1 -f" in words(done.out)
    told = line.call("run", "dice", "--detach", "--json").json
    assert (told["run"], told["status"]) == ("dice/2", "running")
    assert world.value(shown, "select count(*) from pgharness.tasks where status = 'waiting'") == 2
    receipt = line.call("start", "dice")
    assert "run 3 (dice/3) is running\n" in receipt.out and "0 notes" not in receipt.out


# -- runs, told by hand


class Teller:
    """Tells rows as a worker of a run would."""

    def __init__(self, db: world.Database, run: str = "dice-3") -> None:
        self.db = db
        schema = {"type": "object", "properties": {"rounds": {"type": "integer", "default": 3}}}
        self.version("a", "one\ntwo\n", schema)
        db.execute(
            "insert into pgharness.instances (name, experiment) values ('dice-3', 'dice') on conflict do nothing"
        )
        self.worker = self.value("register_worker", host="h", pid=1, version="0", queues=["task"], concurrency=4)

    def value(self, function: str, /, **arguments: Any) -> Any:
        names = sql.SQL(", ").join(sql.SQL(f"{name} => %({name})s") for name in arguments)
        query = sql.SQL("select * from pgharness.{}({})").format(sql.Identifier(function), names)
        row = self.db.execute(query, arguments).fetchone()
        return row[0] if row else None

    def version(self, digest: str, source: str, schema: dict[str, Any]) -> int:
        told = {"name": "dice", "description": "", "module": "m", "function": "f", "digest": digest, "source": source}
        version: int = self.value("register_experiment", **told, config_schema=Jsonb(schema))
        return version

    def start(self, **arguments: Any) -> int:
        run_id: int = self.value("start_run", instance="dice-3", **arguments)
        slice_ = {"run_id": run_id, "epoch": 0, "kind": "task", "ordinals": [0]}
        self.value("load_tasks", worker_id=self.worker, slice=Jsonb(slice_))
        return run_id

    def tell(self, run_id: int, *rows: dict[str, Any]) -> None:
        base = {"task": 0, "attempt": 1, "created_at": "2026-01-01T00:00:00Z"}
        self._told(run_id, [base | row for row in rows], [])

    def log(self, run_id: int, *lines: tuple[str, str]) -> None:
        self._told(run_id, [], list(lines))

    def _told(self, run_id: int, rows: list[dict[str, Any]], lines: list[tuple[str, str]]) -> None:
        told = [[0, 1, level, message, {}, "2026-01-01T00:00:00Z"] for level, message in lines]
        arguments = {"worker_id": self.worker, "run_id": run_id, "lines": Jsonb(told), "rows": Jsonb(rows)}
        self.value("record_told", teller="test", number=next(_GROUPS), **arguments)

    def keep(self, run_id: int, name: str, content: bytes) -> None:
        told = {"task": 0, "attempt": 1, "name": name, "media_type": "text/plain", "content": content}
        self.value("keep_artifact", run_id=run_id, teller="test", number=next(_GROUPS), **told)

    def end(self, run_id: int, **outcome: Any) -> None:
        row = {"ordinal": 0, "attempt": 1, "status": "succeeded", "is_final": True} | outcome
        self.value("record_tasks", worker_id=self.worker, run_id=run_id, outcomes=Jsonb([row]))


@pytest.fixture
def teller(shown: world.Database) -> Teller:
    return Teller(shown)


def test_runs_are_listed_newest_first(line: CommandLine, teller: Teller) -> None:
    assert line.call("runs", "list").out.startswith("No runs")
    ids = [teller.start() for _ in range(3)]
    teller.end(ids[0])
    teller.db.execute("insert into pgharness.instances (name, experiment) values ('other', 'dice')")
    teller.value("start_run", instance="other")
    listed = line.call("runs", "list", "--json").json
    assert [row["run"] for row in listed] == ["other/1", "dice-3/3", "dice-3/2", "dice-3/1"]
    assert [row["experiment"] for row in listed] == ["dice"] * 4
    assert [row["run"] for row in line.call("runs", "list", "--instance", "other", "--json").json] == ["other/1"]
    assert len(line.call("runs", "list", "--experiment", "dice", "--limit", "2", "--json").json) == 2
    assert line.call("runs", "list", "--experiment", "note_grade", "--json").json == []
    shown = line.call("runs", "list").out
    assert "completed" in shown and "100%" in shown and max(map(len, shown.splitlines())) <= 80
    assert 'instance "nobody" does not exist' in line.call("runs", "list", "--instance", "nobody", status=1).err


def test_a_run_is_shown_whole(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    teller.tell(
        run_id,
        {"kind": "result", "key": "rate", "value": 1e-7},
        {"kind": "metric", "name": "loss", "number": 1e-5, "metric_type": ""},
        {"kind": "metric", "name": "loss", "number": 3e-5, "metric_type": ""},
        {"kind": "timing", "operation": "load", "duration_ms": 12.5},
        {"kind": "progress", "position": 1, "total": 4, "message": "a quarter"},
    )
    teller.keep(run_id, "plot.txt", b"plot")
    text = words(line.call("runs", "show", str(run_id)).out)
    assert "is running, 25.0% done" in text and "rate 1e-07" in text and "loss 2 2e-05" in text
    assert "load 1 12.5" in text and "plot.txt 4 text/plain" in text and "rounds 3" in text
    told = line.call("runs", "show", "dice-3/1", "--json").json
    assert told["metrics"] == [
        {"name": "loss", "count": 2, "mean": 2e-5, "minimum": 1e-5, "maximum": 3e-5, "last": 3e-5}
    ]
    assert told["timings"][0]["mean_ms"] == 12.5
    assert [version["number"] for version in told["versions"]] == [1]
    assert "pgharness status" in line.call("runs", "show", "none", status=1).err


def test_results_are_the_latest_or_all(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    assert line.call("runs", "results", "1").out == "No results.\n"
    for value in ([1], {"a": "b"}):
        teller.tell(run_id, {"kind": "result", "key": "x", "value": value}, {"kind": "result", "key": "y", "value": 1})
    latest = line.call("runs", "results", "1", "--json").json
    assert [(row["key"], row["value"]) for row in latest] == [("x", {"a": "b"}), ("y", 1)]
    history = line.call("runs", "results", "1", "--key", "x", "--history", "--json").json
    assert [row["value"] for row in history] == [[1], {"a": "b"}]
    assert '{"a": "b"}' in line.call("runs", "results", "1").out
    assert "It has: x, y." in line.call("runs", "results", "1", "--key", "z", status=1).err


def test_the_log_is_printed_from_a_level(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    teller.log(run_id, ("debug", "small"), ("info", "plain"), ("error", "[bold]bad[/]"))
    lines = line.call("runs", "logs", "1").out.splitlines()
    assert len(lines) == 4 and lines[0].split()[2:4] == ["info", "started"]
    assert lines[1].endswith("debug   small") and lines[3].endswith("error   [bold]bad[/]")
    said = [
        json.loads(text) for text in line.call("runs", "logs", "1", "--level", "warning", "--json").out.splitlines()
    ]
    assert [row["message"] for row in said] == ["[bold]bad[/]"]
    assert said[0]["task"] == 0


class Follower:
    """`runs logs -f` as a process, whose lines are read as they come."""

    def __init__(self, line: CommandLine, *arguments: str) -> None:
        self.process = line.start("runs", "logs", *arguments, "-f", bufsize=1)

    def until(self, message: str) -> list[str]:
        assert self.process.stdout is not None
        read = []
        for text in self.process.stdout:
            read.append(text.rstrip("\n"))
            if message in text:
                return read
        raise AssertionError(f"{message} did not come: {read}")

    def rest(self) -> Done:
        out, err = self.process.communicate(timeout=30)
        return Done(self.process.returncode, out, err)


def test_a_followed_log_shows_lines_as_they_come_and_ends_with_the_run(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    follower = Follower(line, str(run_id))
    follower.until("started")
    late = []
    for number in range(5):
        told_at = time.monotonic()
        teller.log(run_id, ("info", f"line {number}."), ("debug", f"more {number}."))
        assert len(follower.until(f"more {number}.")) == 2
        late.append(time.monotonic() - told_at)
    assert max(late) < 0.5
    teller.log(run_id, ("info", "last words"))
    teller.end(run_id)
    done = follower.rest()
    assert done.status == 0
    assert [text.split()[3] for text in done.out.splitlines()] == ["last", "completed"]


def test_a_followed_log_loses_no_line_that_another_process_writes_late(
    line: CommandLine, teller: Teller, url: str
) -> None:
    run_id = teller.start()
    follower = Follower(line, str(run_id))
    follower.until("started")
    with psycopg.connect(url) as other:
        other.execute("select pgharness.log(run_id => %s, message => 'committed late')", (run_id,))
        teller.log(run_id, ("info", "committed first"))
        follower.until("committed first")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:  # longer than lines are looked over again at every turn
            teller.log(run_id, ("info", "and another"))
            follower.until("and another")
        other.commit()
    follower.until("committed late")
    teller.end(run_id)
    done = follower.rest()
    assert "committed" not in done.out and done.status == 0


def test_a_followed_log_of_a_run_that_ended_ends_at_once(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    teller.log(run_id, *[("info", f"line {number}") for number in range(12_000)])
    teller.end(run_id)
    done = line.call("runs", "logs", str(run_id), "-f", "--json")
    said = [json.loads(text)["message"] for text in done.out.splitlines()]
    assert said == ["started", *[f"line {number}" for number in range(12_000)], "completed"]


def test_an_interrupted_follower_leaves_the_run_alone(line: CommandLine, teller: Teller) -> None:
    run_id = teller.start()
    follower = Follower(line, str(run_id))
    follower.until("started")
    follower.process.send_signal(signal.SIGINT)
    done = follower.rest()
    assert done.status == 130 and "run 1 goes on" in done.err
    assert world.value(teller.db, "select status from pgharness.runs") == "running"


def test_two_runs_are_compared(line: CommandLine, teller: Teller) -> None:
    for number, digest in enumerate("ab"):
        source = "one\ntwo\n" if digest == "a" else "one\nthree\n"
        version = teller.version(digest, source, {"type": "object"})
        teller.db.execute(
            "update pgharness.instances set config = %s", (Jsonb({"rounds": 3 + number, "deep": {"x": 1}}),)
        )
        run_id = teller.start()
        teller.value("start_version", run_id=run_id, version_id=version)
        teller.tell(
            run_id,
            {"kind": "result", "key": "same", "value": 1},
            {"kind": "result", "key": "sum", "value": number},
            {"kind": "metric", "name": "loss", "number": 0.5 + number, "metric_type": ""},
        )
    told = line.call("runs", "diff", "1", "2", "--json").json
    difference = {"key": "rounds", "a": 3, "b": 4, "in_a": True, "in_b": True, "difference": 1}
    assert told["config"] == [difference]
    assert [row["key"] for row in told["results"]] == ["sum"]
    assert [(row["key"], row["difference"]) for row in told["metrics"]] == [("loss", 1.0)]
    assert told["code"]["diff"].splitlines()[2:] == ["@@ -1,2 +1,2 @@", " one", "-two", "+three"]
    text = line.call("runs", "diff", "1", "2").out
    assert "-two" in text and "+three" in text and "version 2 of dice" in text
    assert "code: the same" in line.call("runs", "diff", "1", "1").out


# -- files


NAMES = [
    "plot.txt",
    "plot.txt",
    "a/b.txt",
    "a",
    "../../evil.txt",
    "/etc/passwd",
    "..",
    "PLOT.txt",
    "x\x01:y",
    "é" * 300,
]


def _saved(line: CommandLine, teller: Teller, folder: Path) -> dict[str, bytes]:
    run_id = teller.start()
    for number, name in enumerate(NAMES):
        teller.keep(run_id, name, f"content {number}".encode())
    told = line.call("runs", "artifacts", str(run_id), "--save", str(folder), "--json").json
    return {row["path"]: Path(row["path"]).read_bytes() for row in told}


def test_artifacts_are_saved_each_in_a_file_below_the_folder(line: CommandLine, teller: Teller, tmp_path: Path) -> None:
    assert line.call("runs", "list", "--json").json == []
    found = _saved(line, teller, tmp_path / "out")
    assert sorted(found.values()) == sorted(f"content {number}".encode() for number in range(len(NAMES)))
    assert all(Path(path).resolve().is_relative_to(tmp_path / "out") for path in found)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"out"}
    again = line.call("runs", "artifacts", "1", "--save", str(tmp_path / "out"))
    assert "plot~2.txt" in words(again.out).replace(" ", "")
    (tmp_path / "out" / "plot.txt").write_text("mine")
    assert "exists already" in line.call("runs", "artifacts", "1", "--save", str(tmp_path / "out"), status=1).err
    assert (tmp_path / "out" / "plot.txt").read_text() == "mine"


def test_paths_of_artifacts_never_meet() -> None:
    taken: set[str] = set()
    names = ["a", "a/b", "a/b", "b/c", "b", "b", "~", "a~2", "B/C"]
    paths = [exports._free(exports._safe(name), taken) for name in names]
    assert paths[0] == "a" and len({path.lower() for path in paths}) == len(names)
    folders = {str(parent).lower() for path in paths for parent in Path(path).parents} - {"."}
    assert not folders & {path.lower() for path in paths}


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _exported(teller: Teller) -> None:
    run_id = teller.start(kind="milestone", name="v1")
    teller.value("start_version", run_id=run_id, version_id=1)
    teller.log(run_id, ("info", "first"), ("warning", "second"))
    teller.tell(
        run_id,
        {"kind": "metric", "name": "accuracy", "number": 0.85, "metric_type": "accuracy"},
        {"kind": "metric", "name": "f1", "number": "NaN", "metric_type": "f1", "step": 2},
        {"kind": "timing", "operation": "load", "duration_ms": 1250.5},
        {"kind": "llm_call", "model": "gpt-4", "input": "a?", "output": {"b": 1}, "duration_ms": 3},
        {"kind": "result", "key": "x", "value": 1},
        {"kind": "result", "key": "x", "value": 2},
    )
    teller.keep(run_id, "plots/p.txt", b"plot")
    teller.end(run_id, result=7)


def _check(read: Callable[[str], bytes]) -> dict[str, Any]:
    """Check an export by its manifest; return that."""
    manifest: dict[str, Any] = json.loads(read("manifest.json"))
    for file in manifest["files"]:
        content = read(file["path"])
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (file["sha256"], file["size_bytes"])
        assert "rows" not in file or file["rows"] == len(content.splitlines())
    return manifest


def test_an_export_is_whole_in_a_folder_and_in_an_archive(line: CommandLine, teller: Teller, tmp_path: Path) -> None:
    _exported(teller)
    out, archive = tmp_path / "v1", tmp_path / "made" / "v1.zip"
    done = line.call("runs", "export", "v1", "--out", str(out), "--archive", str(archive))
    assert str(out) in words(done.out).replace(" ", "") or "v1" in done.out
    manifest = _check(lambda name: (out / name).read_bytes())
    with zipfile.ZipFile(archive) as opened:
        assert _check(opened.read) == manifest
        assert sorted(opened.namelist()) == sorted(["manifest.json", *(file["path"] for file in manifest["files"])])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "v1"]
    assert [path.name for path in archive.parent.iterdir()] == ["v1.zip"]
    assert {file["path"] for file in manifest["files"]} == {
        *("run.jsonl", "metrics.jsonl", "timings.jsonl", "results.jsonl", "tasks.jsonl"),
        *("artifacts/plots/p.txt", "code/version-1.py"),
    }
    assert (manifest["run"]["run"], manifest["run"]["kind"], manifest["run"]["status"]) == (
        "v1",
        "milestone",
        "completed",
    )
    assert manifest["code"][0]["digest"] == "a" and manifest["definition"]["config"] == {"rounds": 3}
    assert (out / "code" / "version-1.py").read_text() == "one\ntwo\n"


def test_an_export_has_the_shapes_of_plain_logs(line: CommandLine, teller: Teller, tmp_path: Path) -> None:
    _exported(teller)
    out = tmp_path / "v1"
    told = line.call("runs", "export", "v1", "--out", str(out), "--json").json
    assert told == json.loads((out / "manifest.json").read_text())
    at = "2026-01-01T00:00:00+00:00"
    assert _lines((out / "metrics.jsonl").read_text()) == [
        {"timestamp": at, "run_id": "v1", "name": "accuracy", "value": 0.85, "type": "accuracy"},
        {"timestamp": at, "run_id": "v1", "name": "f1", "value": "nan", "type": "f1", "step": 2},
    ]
    timing = {"timestamp": at, "run_id": "v1", "operation": "load", "duration_ms": 1250.5}
    assert _lines((out / "timings.jsonl").read_text()) == [timing]
    assert [row["value"] for row in _lines((out / "results.jsonl").read_text())] == [1, 2]
    assert [(row["status"], row["result"]) for row in _lines((out / "tasks.jsonl").read_text())] == [("succeeded", 7)]
    events = _lines((out / "run.jsonl").read_text())
    assert events[0] | {"timestamp": None} == {
        "timestamp": None,
        "event_type": "run_started",
        "run_id": "v1",
        "run_type": "milestone",
        "instance": "dice-3",
        "experiment": "dice",
    }
    assert (events[-1]["event_type"], events[-1]["status"]) == ("run_finished", "completed")
    assert events[-1]["duration_seconds"] >= 0
    (call,) = [event for event in events if event["event_type"] == "llm_call"]
    assert (call["model"], call["input"], call["output"], call["duration_ms"]) == ("gpt-4", "a?", {"b": 1}, 3)
    said = [event["message"] for event in events if event["event_type"] == "log"]
    assert said == ["started", "first", "second", "completed"]


def test_an_export_overwrites_nothing_and_leaves_nothing_behind(
    line: CommandLine, teller: Teller, tmp_path: Path
) -> None:
    _exported(teller)
    out = tmp_path / "v1"
    out.mkdir()
    line.call("runs", "export", "v1", "--out", str(out))
    assert "exists already" in line.call("runs", "export", "v1", "--out", str(out), status=1).err
    assert "exists already" in line.call("runs", "export", "v1", "--archive", str(out / "run.jsonl"), status=1).err
    (tmp_path / "file").write_text("")
    below = line.call("runs", "export", "v1", "--out", str(tmp_path / "file" / "x"), status=1)
    assert "cannot be written" in words(below.err)
    assert "does not exist" in line.call("runs", "export", "v2", "--out", str(tmp_path / "v2"), status=1).err
    assert line.call("runs", "export", "v1", status=2).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "v1"]


# -- init


def test_init_makes_a_folder_a_project(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = CommandLine(url)
    line.call("init")
    assert list(tmp_path.iterdir()) == []
    done = line.call("init", "--experiments-dir", "trials", "--project", "lab")
    assert "pgharness experiments new NAME" in done.out and "is up to date on your server" in done.out
    assert (tmp_path / "trials").is_dir()
    line.call("experiments", "new", "first")
    assert (tmp_path / "trials" / "first.py").exists()
    assert [row["experiment"] for row in line.call("experiments", "sync", "--json").json["experiments"]] == ["first"]
    assert "is a project already" in words(line.call("init", "--project", "lab", status=1).err)
