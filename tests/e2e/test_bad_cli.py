"""Wrong command lines: each is answered by an error that names the thing and the remedy, and changes nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import psycopg
import pytest

import world
from command_line import CommandLine
from pgharness.embedded import temporary_root

NOWHERE = "postgresql://nobody@localhost:1/nothing"


@pytest.fixture(scope="module")
def db(server_url: str, template: str) -> Iterator[world.Database]:
    """A database with the runs open/1 (running), stopped/1 (cancelled), spent/1 (paused at its budget) and done/1."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as connection:
        for name in ("open", "stopped", "spent", "done"):
            world.add_instance(connection, name, cases=1)
        world.add_instance(connection, "without-cases", cases=0)
        world.add_instance(connection, "without-models", combinations=())
        world.start(connection, "open", idempotency_key="monday")
        connection.execute("select pgharness.cancel_run(%s)", (world.start(connection, "stopped"),))
        worker = world.register(connection)
        spent = world.start(connection, "spent", budget_usd=Decimal("0.1"))
        world.record(connection, worker, world.note(spent, 0))
        done = world.start(connection, "done")
        grades = [world.grade(done, ordinal) for ordinal in range(2)]
        world.record(connection, worker, world.note(done, 0))
        world.record(connection, worker, *grades)
        connection.execute("select pgharness.lose_worker('host', 1)")
        yield connection


def told(err: str) -> str:
    """Return what was said, without the frame of usage errors and without line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())


def refused(line: CommandLine, words: list[str], status: int, *texts: str) -> None:
    """Expect a command to be refused with a status, saying every text."""
    done = line.call(*words, status=status)
    said = told(done.err)
    assert said and not [text for text in texts if text not in said], said


HELP = "-h' for help"
REFUSED: dict[str, tuple[list[str], int, str, str]] = {
    # words, exit status, the thing that is named, the remedy
    "a command that does not exist": (["strat", "open"], 2, "No such command 'strat'", "pgharness -h"),
    "an option that does not exist": (["start", "open", "--bugdet", "5"], 2, "No such option: --bugdet", "--budget"),
    "a simulated model without a name": (["simulate", "--model", ""], 2, "a model needs a name", "--model"),
    "no instance": (["start"], 2, "Missing argument 'INSTANCE'", HELP),
    "two instances": (["start", "open", "done"], 2, "unexpected extra argument(s) (done)", HELP),
    "an unknown instance": (["start", "opne"], 1, 'instance "opne" does not exist', "insert into pgharness.instances"),
    "an instance without cases": (["start", "without-cases"], 1, '"without-cases" has no cases', "add_cases"),
    "an instance without models": (
        ["start", "without-models"],
        1,
        '"without-models" has no model combinations',
        "insert into pgharness.model_combinations",
    ),
    "a negative budget": (["start", "open", "--budget", "-1"], 2, "'-1' is not an amount of USD", "above 0"),
    "no budget at all": (["start", "open", "--budget", "0"], 2, "'0' is not an amount of USD", "above 0"),
    "a budget in words": (["start", "open", "--budget", "five"], 2, "'five' is not an amount of USD", "'--budget'"),
    "a budget that is no number": (["resume", "spent/1", "--budget", "nan"], 2, "'nan' is not an amount", "above 0"),
    "a priority beyond its range": (["start", "open", "--priority", "5000"], 2, "'--priority'", "1000"),
    "a kind that does not exist": (["start", "open", "--kind", "final"], 2, "'final'", "'milestone'"),
    "an empty name": (["start", "open", "--name", " "], 2, "'--name': it is empty", HELP),
    "a name that is taken": (["start", "open", "--name", "done/1"], 1, "(done/1) already exists", "Choose another"),
    "a key that was used for another run": (
        ["start", "done", "--idempotency-key", "monday"],
        1,
        'idempotency key "monday" already started run "open/1"',
        "Use another key",
    ),
    "an empty key": (["start", "open", "--idempotency-key", ""], 2, "'--idempotency-key': it is empty", HELP),
    "an unknown run": (["cancel", "opne/1"], 1, 'run "opne/1" does not exist', "pgharness.run_progress"),
    "an id that no run can have": (["pause", "9" * 30], 1, f'run "{"9" * 30}" does not exist', "run_progress"),
    "to cancel what is done": (["cancel", "done/1"], 1, "is already completed", "Only running or paused runs"),
    "to pause what is done": (["pause", "done/1"], 1, "is already completed", "running"),
    "to resume what is done": (["resume", "done/1"], 1, "is already completed", "pgharness.rerun"),
    "to retry what is cancelled": (["retry", "stopped/1"], 1, "is cancelled", "pgharness.resume_run"),
    "to resume without money": (["resume", "spent/1"], 1, "has spent 0.5000 USD of its budget of 0.1", "budget_usd =>"),
    "to repeat what never was": (["rerun", "never"], 1, 'run "never" does not exist', "run_progress"),
    "the status of an unknown run": (["status", "nope"], 1, 'run "nope" does not exist', "pgharness status"),
    "to watch nothing": (["status", "--watch"], 2, "it needs a RUN to watch", HELP),
    "a view that does not exist": (["export", "note_result"], 1, '"note_result"', "Did you mean note_results"),
    "a view like no other": (["export", "zzz; drop table runs"], 1, '"zzz; drop table runs"', "run_progress"),
    "a view of another schema": (["export", "procrastinate_jobs"], 1, '"procrastinate_jobs"', "Choose one of"),
    "to export an unknown run": (["export", "scores", "--run", "x"], 1, 'run "x" does not exist', "pgharness status"),
    "a run of what has none": (["export", "models", "--run", "1"], 1, "models is not about runs", "Leave --run out"),
    "a format that does not exist": (["export", "runs", "--format", "xlsx"], 2, "'xlsx'", "'csv'"),
    "a file that is a folder": (["export", "runs", "--out", "/"], 2, "file '/' is a directory", HELP),
    "a file without a name": (["export", "runs", "--out", ""], 2, "'--out'", HELP),
    "a file in no folder": (
        ["export", "runs", "--out", "/nonexistent/x.csv"],
        1,
        "/nonexistent/x.csv cannot be written",
        "Choose another --out",
    ),
    "a queue that does not exist": (["worker", "--queues", "notes"], 2, "'notes' is not one of", "note, grade"),
    "no queue": (["worker", "--queues", ","], 2, "',' is not one of", "note, grade"),
    "no workers": (["worker", "--workers", "0"], 2, "'--workers'", "1"),
    "no calls at once": (["worker", "--concurrency", "0"], 2, "'--concurrency'", "1"),
    "a loud log": (["worker", "--log-level", "loud"], 2, "'loud'", "'debug'"),
    "a demo by nobody": (["demo", "--workers", "0"], 2, "'--workers'", "1"),
    "to stop a server that is not ours": (["db", "stop"], 1, "is for the embedded server", "PGHARNESS_DATABASE_URL"),
    "to start it": (["db", "start"], 1, "is for the embedded server", "PGHARNESS_DATABASE_URL"),
    "a malformed URL": (["status", "--database-url", "mydb"], 1, '"mydb"', "--database-url"),
    "a URL without one": (["status", "--database-url"], 2, "'--database-url' requires an argument", "argument"),
    "a server that is not there": (["status", "--database-url", NOWHERE], 1, "cannot connect", "pgharness doctor"),
}


@pytest.mark.parametrize(("words", "status", "thing", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_command_line_is_refused(
    db: world.Database, words: list[str], status: int, thing: str, remedy: str
) -> None:
    before = world.contents(db)
    refused(CommandLine(db.info.dsn), words, status, thing, remedy)
    assert world.contents(db) == before


@pytest.mark.parametrize(
    ("name", "value", "thing", "remedy"),
    [
        ("PGHARNESS_DATABSE_URL", NOWHERE, "PGHARNESS_DATABSE_URL is unknown", "Did you mean PGHARNESS_DATABASE_URL?"),
        ("PGHARNESS_WORKERS", "4", "PGHARNESS_WORKERS is unknown", "Known: "),
        ("PGHARNESS_ALLOW_CODE", "perhaps", "PGHARNESS_ALLOW_CODE is 'perhaps'", "PGHARNESS_ALLOW_CODE=1"),
        ("PGHARNESS_STALE_SECONDS", "soon", "PGHARNESS_STALE_SECONDS is 'soon'", "between 1 and 3600"),
    ],
)
def test_a_wrong_variable_is_refused(db: world.Database, name: str, value: str, thing: str, remedy: str) -> None:
    line = CommandLine(db.info.dsn, environment={name: value})
    refused(line, ["status"], 1, thing, remedy)
    (_, found) = line.call("doctor", "--json", status=1).json
    assert (found["subject"], found["verdict"]) == ("settings", "error")
    assert thing in found["finding"] and remedy in found["remedy"]


def test_a_database_that_does_not_exist_is_named(db: world.Database) -> None:
    url = psycopg.conninfo.make_conninfo(db.info.dsn, dbname="no_such_database")
    refused(CommandLine(url), ["status"], 1, 'database "no_such_database" does not exist', "--database-url")


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("")
    refused(CommandLine(home=home), ["status"], 1, "cannot use", "set PGHARNESS_HOME")
    assert home.read_text() == ""


def test_programs_that_are_not_there_are_refused(tmp_path: Path) -> None:
    home = temporary_root()
    line = CommandLine(home=home, environment={"PGHARNESS_PG_BIN": str(tmp_path)})
    refused(line, ["status"], 1, "PGHARNESS_PG_BIN is not the bin directory", "initdb")
    shutil.rmtree(home)


def test_a_failed_export_leaves_no_file_behind(db: world.Database, tmp_path: Path) -> None:
    (tmp_path / "kept.jsonl").write_text("as it was")
    with psycopg.connect(db.info.dsn, autocommit=True) as other:
        other.execute("begin; lock pgharness.grades in access exclusive mode")
        line = CommandLine(psycopg.conninfo.make_conninfo(db.info.dsn, options="-c lock_timeout=100ms"))
        file = str(tmp_path / "kept.jsonl")
        refused(line, ["export", "grades", "--out", file], 1, "lock timeout")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.jsonl"]
    assert (tmp_path / "kept.jsonl").read_text() == "as it was"


def test_what_people_name_things_breaks_no_output(db: world.Database) -> None:
    name = "[/b] %s {}\\"
    world.add_instance(db, name, cases=1)
    run = world.start(db, name, name=name)
    line = CommandLine(db.info.dsn)
    for words in (["status"], ["status", name], ["doctor"], ["pause", name], ["cancel", str(run)]):
        assert name in " ".join(line.call(*words, status=None).out.split())
    assert json.loads(line.call("export", "runs", "--run", name).out)["name"] == name
