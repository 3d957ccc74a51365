"""Every command, as a process, on a real database: what it prints, what it changes, and its exit status."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from psycopg.conninfo import make_conninfo

import world
from command_line import CommandLine, Done
from pgharness import __version__
from pgharness.cli import app, main
from pgharness.embedded import find_bindir, temporary_root

READY = {"latency_seconds": 0}


def is_narrow(text: str) -> bool:
    """Whether a text fits a terminal of 80 columns."""
    return max(map(len, text.splitlines())) <= 80


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command below a command."""
    inner = getattr(command, "commands", {})
    for name, sub in inner.items():
        yield from _commands(sub, (*path, name))
    if not inner:
        yield path


COMMANDS = sorted(_commands(typer.main.get_command(app)))


def _help(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


# -- help and options


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(_help(capsys, *command).split())
    example = re.search(r"Example: (.*)", text)
    assert example and f"pgharness {' '.join(command)}" in example[1]


@pytest.mark.parametrize(
    "command", ["start", "status", "cancel", "pause", "resume", "retry", "rerun", "doctor", "db status"]
)
def test_scripts_can_ask_for_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--json" in _help(capsys, *command.split())


def test_the_first_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = _help(capsys)
    assert all(command[0] in text for command in COMMANDS)


def test_version() -> None:
    assert CommandLine().run("--version").out.strip() == __version__


# -- one database with runs in all states, to read from


@pytest.fixture(scope="module")
def runs(server_url: str, template: str) -> Iterator[tuple[world.Database, CommandLine]]:
    """A database with the runs done/1 (completed), refused/1 (failed), stopped/1 (cancelled) and held/1 (paused)."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        db.execute(
            "insert into pgharness.models (name, provider, parameters, input_usd_per_million)"
            " values ('quick', 'simulator', %s, 2), ('mute', 'simulator', %s, 2)",
            (json.dumps(READY), json.dumps(READY | {"refusal_rate": 1})),
        )
        world.add_instance(db, "done", combinations=[("quick", "quick")], note_replications=2)
        for name in ("refused", "stopped", "held"):
            world.add_instance(db, name, combinations=[("mute", "quick")], max_attempts=1)
        for name in ("stopped", "held"):
            world.start(db, name)
        db.execute("select pgharness.cancel_run('stopped/1'), pgharness.pause_run('held/1')")
        for name in ("done", "refused"):
            world.start(db, name)
        line = CommandLine(url)
        line.work()
        yield db, line


@pytest.mark.parametrize(
    ("run", "state", "status"),
    [("done/1", "completed", 0), ("refused/1", "failed", 5), ("stopped/1", "cancelled", 5), ("held/1", "paused", 6)],
)
def test_status_says_how_a_run_stands_in_its_exit_status(
    runs: tuple[world.Database, CommandLine], run: str, state: str, status: int
) -> None:
    db, line = runs
    shown = line.run("status", run, "--watch", "--json", status=status).json
    assert shown["status"] == state
    assert shown["run_id"] == world.value(db, "select id from pgharness.runs where name = %s", run)
    assert [row["combination"] for row in shown["combinations"]] == ["combination 0"]


def test_status_of_a_run_shows_scores_and_cost(runs: tuple[world.Database, CommandLine]) -> None:
    db, line = runs
    shown = line.run("status", "done/1").out
    assert "run 3 (done/1) is completed after" in shown and "4 of 4" in shown and "8 of 8" in shown
    (row,) = world.rows(
        db, "select mean_score, confidence_low, confidence_high from pgharness.combination_scores where run = 'done/1'"
    )
    assert f"{row['mean_score']:.3f}" in shown
    assert f"{row['confidence_low']:.2f} to {row['confidence_high']:.2f}" in shown
    cost = world.value(db, "select cost_usd from pgharness.run_progress where run = 'done/1'")
    assert f"cost   {cost:.4f} USD" in shown
    assert is_narrow(shown)


def test_status_of_a_failed_run_says_why_and_what_to_do(runs: tuple[world.Database, CommandLine]) -> None:
    _, line = runs
    shown = line.run("status", "refused/1", status=5).out
    assert re.search(r"because \d notes and 0 grades failed", shown)
    assert re.search(r"note +refused +\d +0 +\d +the simulated", shown)
    assert "try what failed again: pgharness retry refused/1" in shown
    assert is_narrow(shown)


def test_status_lists_the_runs_newest_first(runs: tuple[world.Database, CommandLine]) -> None:
    _, line = runs
    listed = [row["run"] for row in line.call("status", "--json").json]
    assert listed == ["refused/1", "done/1", "held/1", "stopped/1"]
    shown = line.call("status").out
    assert re.findall(r"\w+/1\b", shown) == listed
    assert is_narrow(shown)


@pytest.mark.parametrize("view", ["run_progress", "note_results", "scores", "runs"])
def test_export_writes_a_view_as_it_is(runs: tuple[world.Database, CommandLine], view: str) -> None:
    db, line = runs
    rows = world.rows(db, f"select * from pgharness.{view}")
    exported = [json.loads(text) for text in line.call("export", view).out.splitlines()]
    assert len(exported) == len(rows) > 0
    assert [list(row) for row in exported] == [list(row) for row in rows]
    name = "run" if "run" in rows[0] else "name"
    assert sorted(row[name] for row in exported) == sorted(row[name] for row in rows)


def test_export_to_a_csv_file_of_one_run(runs: tuple[world.Database, CommandLine], tmp_path: Path) -> None:
    db, line = runs
    file = tmp_path / "grades.csv"
    done = line.run("export", "criterion_results", "--run", "done/1", "--format", "csv", "--out", str(file))
    assert done.out == "" and "16 rows written" in done.err
    assert os.listdir(tmp_path) == ["grades.csv"]
    found = list(csv.DictReader(io.StringIO(file.read_text())))
    assert {row["run"] for row in found} == {"done/1"}
    expected = world.rows(db, "select rationale, satisfaction from pgharness.criterion_results where run = 'done/1'")
    assert sorted((row["rationale"], float(row["satisfaction"])) for row in found) == sorted(
        (row["rationale"], float(row["satisfaction"])) for row in expected
    )


def test_export_keeps_json_as_json(runs: tuple[world.Database, CommandLine]) -> None:
    db, line = runs
    (exported,) = csv.DictReader(io.StringIO(line.call("export", "runs", "--run", "done/1", "--format", "csv").out))
    assert exported["reason"] == ""
    definitions = csv.DictReader(io.StringIO(line.call("export", "run_definitions", "--format", "csv").out))
    found = {row["run_id"]: json.loads(row["definition"]) for row in definitions}
    for row in world.rows(db, "select run_id, definition from pgharness.run_definitions"):
        assert found[str(row["run_id"])] == row["definition"]


def test_what_is_piped_is_utf8_whatever_the_locale(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    db.execute("insert into pgharness.projects (name) values ('café 診察')")
    line.environment["PYTHONIOENCODING"] = "ascii"
    process = line.start("export", "projects", encoding="utf-8")
    assert json.loads(process.communicate(timeout=60)[0])["name"] == "café 診察"


def test_export_into_a_closed_pipe_is_quiet(runs: tuple[world.Database, CommandLine]) -> None:
    _, line = runs
    process = line.start("export", "criterion_results")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) in (0, 1)
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()


# -- defining what a run does


@pytest.fixture
def small(url: str) -> Iterator[tuple[world.Database, CommandLine]]:
    """A new database with the instance `trial` of two notes and eight grades, ready to start."""
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(
            "insert into pgharness.models (name, provider, parameters) values ('quick', 'simulator', %s)",
            (json.dumps(READY),),
        )
        world.add_instance(db, combinations=[("quick", "quick")], grade_replications=2)
        yield db, CommandLine(url)


def test_a_run_from_start_to_rerun(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    started = line.run("start", "trial", "--kind", "milestone", "--budget", "5", "--priority", "3", "--json").json
    assert (started["run_id"], started["run"], started["status"]) == (1, "trial/1", "running")
    assert (started["notes"], started["grades"]) == (2, 8)
    row = world.run_of(db, 1)
    assert (row["kind"], row["budget_usd"], row["priority"]) == ("milestone", 5, 3)
    assert line.call("pause", "1", "--json").json["status"] == "paused"
    assert line.call("resume", "trial/1", "--budget", "7", "--json").json["status"] == "running"
    assert world.run_of(db, 1)["budget_usd"] == 7
    assert line.call("cancel", "trial/1", "--json").json["status"] == "cancelled"
    assert line.call("resume", "1", "--json").json["status"] == "running"
    line.work()
    assert line.call("status", "1", "--json").json["grades_succeeded"] == 8
    assert line.call("retry", "1", "--json").json["status"] == "completed"
    again = line.call("rerun", "1", "--kind", "trial", "--json").json
    assert (again["run"], world.run_of(db, again["run_id"])["rerun_of_id"]) == ("trial/2", 1)


def test_starting_twice_with_a_key_starts_once(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    receipts = [line.call("start", "trial", "--idempotency-key", "monday", "--json").json for _ in range(2)]
    assert receipts[0] == receipts[1]
    assert world.value(db, "select count(*) from pgharness.runs") == 1


def test_estimate_says_what_a_run_would_come_to(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    db.execute("update pgharness.models set output_usd_per_million = 1000 where name = 'quick'")
    plan = line.call("estimate", "trial", "--json").json
    assert 0 < plan["low_cost_usd"] < plan["cost_usd"] < plan["high_cost_usd"] and len(plan["combinations"]) == 1
    assert "trial: 2 notes, 8 grades, about" in line.call("estimate", "trial").out
    assert 'instance "trail" does not exist' in line.call("estimate", "trail", status=1).err


def test_start_says_what_is_planned_and_that_nobody_works(small: tuple[world.Database, CommandLine]) -> None:
    _, line = small
    out = line.call("start", "trial", "--name", "monday morning").out
    assert "run 1 (monday morning) is running: 2 notes, 8 grades planned" in out
    assert "No worker is running: pgharness worker" in out
    assert "pgharness status 'monday morning' --watch" in out
    assert "stalled: no running worker serves queue" in line.call("status", "monday morning").out


def _until_watched(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert "0.0% done" in process.stdout.readline()


@pytest.mark.parametrize(
    ("function", "status", "said"), [("cancel_run", 5, "is cancelled"), ("pause_run", 6, "is paused")]
)
def test_watch_ends_when_the_run_is_stopped(
    small: tuple[world.Database, CommandLine], function: str, status: int, said: str
) -> None:
    db, line = small
    world.start(db)
    process = line.start("status", "trial/1", "--watch")
    _until_watched(process)
    db.execute(f"select pgharness.{function}(1)".encode())
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status
    assert said in out


def test_watch_ends_when_the_run_is_done(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    world.start(db)
    process = line.start("status", "trial/1", "--watch")
    _until_watched(process)
    line.work()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "is completed after" in out and "8 of 8" in out


def test_an_interrupted_watch_leaves_the_run_alone(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    world.start(db)
    process = line.start("status", "1", "--watch")
    _until_watched(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run 1 goes on" in err
    assert world.run_of(db, 1)["status"] == "running"


def test_a_terminal_sees_one_panel_drawn_anew(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    world.start(db)
    terminal, inner = pty.openpty()
    line.environment |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    process = line.start("status", "1", "--watch", stdout=inner, stderr=inner)
    os.close(inner)
    shown = ""
    while "0 of 8" not in shown:
        shown += os.read(terminal, 4096).decode()
    db.execute("select pgharness.cancel_run(1)")
    while "continue it" not in shown:
        shown += os.read(terminal, 4096).decode()
    assert process.wait(60) == 5
    os.close(terminal)
    assert "\x1b[2K" in shown, "lines were drawn anew"
    assert "━" in shown


# -- workers


def test_a_worker_takes_only_the_queues_it_is_given(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    world.start(db)
    process = line.start("worker", "--queues", "note")
    try:
        with psycopg.connect(db.info.dsn, autocommit=True) as listening:
            listening.execute("listen pgharness")
            while world.run_of(db, 1)["notes_succeeded"] < 2:
                assert process.poll() is None
                next(listening.notifies(timeout=0.1, stop_after=1), None)
        (health,) = world.rows(db, "select * from pgharness.worker_health")
        assert (health["queues"], health["status"]) == (["note"], "running")
    finally:
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert world.run_of(db, 1)["grades_succeeded"] == 0
    assert world.value(db, "select status from pgharness.worker_health") == "stopped"


def test_a_worker_that_shall_end_when_idle_ends(small: tuple[world.Database, CommandLine]) -> None:
    _, line = small
    assert "1 worker(s) x 10 calls" in line.work().err


# -- the server: URL, schema, roles


def test_the_url_may_stand_before_or_after_the_command(runs: tuple[world.Database, CommandLine]) -> None:
    db, _ = runs
    line = CommandLine("postgresql://nobody@localhost:1/nothing")
    url = db.info.dsn
    for arguments in (
        ["--database-url", url, "status", "done/1", "--json"],
        ["status", f"--database-url={url}", "done/1", "--json"],
    ):
        assert line.run(*arguments).json["run"] == "done/1"


def test_migrate_installs_once_and_says_so(empty_url: str) -> None:
    line = CommandLine(empty_url)
    for arguments in (["status"], ["start", "x"], ["export", "runs"], ["worker", "--exit-when-idle"]):
        refused = line.call(*arguments, status=4)
        assert "schema pgharness is not installed" in refused.err and "pgharness migrate" in refused.err
    doctor = line.call("doctor", "--json", status=1).json
    assert doctor[-1] == {
        "subject": "schema",
        "verdict": "error",
        "finding": "schema pgharness is not installed in this database",
        "remedy": "Run `pgharness migrate`.",
    }
    assert "applied 0001_inputs.sql" in line.run("migrate").out
    assert "is up to date on your server" in line.call("init").out


def test_a_bundle_is_the_migration_as_plain_sql(empty_url: str, tmp_path: Path) -> None:
    bundle = tmp_path / "pgharness.sql"
    bundle.write_text(CommandLine("postgresql://nobody@localhost:1/nothing").run("migrate", "--bundle").out)
    psql = [
        str(find_bindir()[0] / "psql"),
        "-X",
        "-q",
        "-1",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        empty_url,
        "-f",
        str(bundle),
    ]
    subprocess.run(psql, check=True, capture_output=True)
    assert CommandLine(empty_url).run("migrate").out == "the schema is up to date\n"


def test_a_newer_database_is_left_alone(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    db.execute("insert into pgharness.schema_migrations (name, checksum) values ('9999_future.sql', '')")
    for command in ("status", "migrate"):
        refused = line.call(command, status=4)
        assert "9999_future.sql" in refused.err and "pip install --upgrade" in refused.err


def test_psql_dump_and_restore_work_on_any_server(
    small: tuple[world.Database, CommandLine], empty_url: str, tmp_path: Path
) -> None:
    _, line = small
    query = "select name from pgharness.instances"
    assert line.run("db", "psql", "-XAt", "--command", query).out == "trial\n"
    assert line.run("db", "psql", "--", "-Xqv", "ON_ERROR_STOP=1", "-c", "select bogus", status=1).out == ""
    file = str(tmp_path / "backup.dump")
    line.run("db", "dump", "--", "-Fc", "-f", file)
    restored = CommandLine(empty_url)
    restored.run("db", "restore", "--", "--no-owner", file)
    assert restored.run("db", "psql", "--", "-XAtc", query).out == "trial\n"


# -- doctor


def _findings(done: Done) -> dict[str, tuple[str, str, str]]:
    return {check["subject"]: (check["verdict"], check["finding"], check["remedy"]) for check in done.json}


def test_doctor_is_content_with_a_sound_database_and_misses_workers(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    assert is_narrow(line.run("doctor").out)
    found = _findings(line.call("doctor", "--json"))
    assert {subject for subject, (verdict, _, _) in found.items() if verdict == "ok"} == {
        "python",
        "server",
        "schema",
        "connections",
        "listener",
        "role",
        "clock",
    }
    assert found["workers"] == ("warning", "none is running", "pgharness worker --workers 2")
    world.start(db)
    verdict, finding, remedy = _findings(line.call("doctor", "--json"))["run trial/1"]
    assert (verdict, finding) == ("warning", "no running worker serves queue note, grade")
    assert "pgharness worker" in remedy


def test_doctor_names_missing_keys_and_code(small: tuple[world.Database, CommandLine]) -> None:
    db, _ = small
    db.execute(
        "insert into pgharness.models (name, provider, model, api_key_env, base_url) values"
        " ('big', 'openai', 'x', null, null), ('other', 'anthropic', 'x', 'TEAM_TWO_KEY', null),"
        " ('local', 'openai_compatible', 'x', null, 'http://localhost:1/v1'), ('unused', 'gemini', 'x', null, null), ('third', 'openai', 'x', 'TEAM_THREE_KEY', null),"
        " ('mine', 'python', 'a:b', null, null)"
    )
    db.execute(
        "insert into pgharness.models (name, provider, parameters) values"
        """ ('panel', 'ensemble', '{"members": ["third", "local"]}'), ('spare', 'hedge', '{"members": ["panel"]}'),"""
        """ ('torn', 'simulator', '{"error_rate": 0.6, "timeout_rate": 0.6}')"""
    )
    for generator in ("big", "other", "local", "mine", "spare", "torn"):
        db.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values ('trial', %s, 'contains')",
            (generator,),
        )
    found = _findings(
        CommandLine(db.info.dsn, environment={"TEAM_TWO_KEY": "secret-of-team-two"}).call("doctor", "--json", status=1)
    )
    assert found["model big"][:2] == ("warning", "its key OPENAI_API_KEY is not set here")
    assert "export OPENAI_API_KEY" in found["model big"][2]
    assert found["model other"] == ("ok", "its key TEAM_TWO_KEY is set here", "")
    assert found["model third"][:2] == ("warning", "its key TEAM_THREE_KEY is not set here"), "a member's member"
    assert found["model torn"][0] == "error" and "timeout_rate" in found["model torn"][1]
    assert not {"model panel", "model spare"} & found.keys()
    assert found["model mine"][:2] == ("warning", "runs code (python)") and "--allow-code" in found["model mine"][2]
    assert not {"model local", "model unused", "model quick", "model contains"} & found.keys()
    assert "secret-of-team-two" not in str(found)


def test_doctor_says_when_the_server_cannot_be_reached() -> None:
    done = CommandLine("postgresql://nobody@localhost:1/nothing").call("doctor", "--json", status=1)
    verdict, finding, remedy = _findings(done)["server"]
    assert verdict == "error" and "cannot connect" in finding and "PGHARNESS_DATABASE_URL" in remedy


@pytest.fixture
def roles(small: tuple[world.Database, CommandLine]) -> Iterator[dict[str, str]]:
    """Connection strings of a role without privileges, and of one with each of ours."""
    db, _ = small
    if not world.value(db, "select rolsuper from pg_roles where rolname = current_user"):
        pytest.skip("only a superuser may make roles of all kinds")
    urls = {}
    for kind in ("nothing", "reader", "author", "worker"):
        name = f"pgharness_test_{kind}_{os.getpid()}"
        db.execute(f"create role {name} login".encode())
        if kind != "nothing":
            db.execute(f"grant pgharness_{kind} to {name}".encode())
        urls[kind] = make_conninfo(db.info.dsn, options=f"-c role={name}")
    yield urls
    for kind in urls:
        name = f"pgharness_test_{kind}_{os.getpid()}"
        db.execute(f"drop owned by {name} cascade; drop role {name}".encode())


def test_each_role_is_told_what_it_lacks(roles: dict[str, str]) -> None:
    lacking = CommandLine(roles["nothing"])
    assert _findings(lacking.call("doctor", "--json", status=1))["schema"][0] == "error"
    assert "grant pgharness_author" in lacking.call("status", status=4).err
    reader = CommandLine(roles["reader"])
    assert _findings(reader.call("doctor", "--json"))["role"][0] == "warning"
    assert "pgharness_author" in reader.call("start", "trial", status=1).err
    assert "pgharness_author" in reader.call("migrate", status=1).err
    author = CommandLine(roles["author"])
    assert author.call("start", "trial", "--json").json["status"] == "running"
    assert "as a role with pgharness_worker" in author.call("analyse", "power", "trial/1", status=1).err
    assert "_worker" in author.call("worker", "--exit-when-idle", status=1).err
    assert "_worker" in author.call("demo", status=1).err
    worker = CommandLine(roles["worker"])
    assert _findings(worker.call("doctor", "--json"))["role"][0] == "ok"
    worker.work()
    assert reader.call("status", "trial/1", "--json").json["status"] == "completed"


# -- the embedded server


def test_the_embedded_server_from_init_to_stop() -> None:
    home = temporary_root()  # and not pytest's, which another account cannot reach when root runs the tests
    line = CommandLine(home=home)
    try:
        assert line.call("db", "status", "--json", status=1).json["running"] is False
        assert "pgharness db start" in line.call("db", "url", status=1).err
        first = line.run("init")
        assert "making a private Postgres server" in first.err and "is installed on the embedded server" in first.out
        assert line.call("db", "status", status=1).out.startswith("running      no"), "it stops with its last user"
        url = line.run("db", "start").out.strip()
        status = line.call("db", "status", "--json").json
        assert (status["running"], status["is_pinned"], status["conninfo"]) == (True, True, url)
        assert isinstance(status["pid"], int) and status["data"].startswith(str(home.resolve()))
        assert line.call("db", "url").out.strip() == url
        with psycopg.connect(url, autocommit=True) as db:
            db.execute("insert into pgharness.projects (name) values ('kept')")
        file = str(home / "backup.dump")
        line.run("db", "dump", "--", "-Fc", "-f", file)
        assert line.run("db", "psql", "--", "-XAtc", "delete from pgharness.projects").out == "DELETE 1\n"
        line.run("db", "restore", "--", "--data-only", "--table=projects", file)
        assert line.run("db", "psql", "--", "-XAtc", "select name from pgharness.projects").out == "kept\n"
        assert line.call("status").out.startswith("No runs yet")
        assert line.run("db", "stop").out == "stopped\n"
    finally:
        again = line.call("db", "stop").out
        shutil.rmtree(home, ignore_errors=True)
    assert again == "the embedded server was not running\n"


# -- the demo


def test_the_demo_shows_a_whole_experiment(url: str) -> None:
    done = CommandLine(url).run("demo", timeout=90)
    assert is_narrow("\n".join(done.out.splitlines()[:-1])), "all but the last line, which is a path"
    assert "36 of 36" in done.out and "144 of 144" in done.out
    careful, hasty = (float(score) for score in re.findall(r"demo/\w+ -> demo/grader\s+([\d.]+)", done.out))
    assert careful > hasty
    assert re.search(r"cost +0\.\d+ USD", done.out)
    statements = re.findall(r"^  select .*?;$", done.out, re.MULTILINE | re.DOTALL)
    assert len(statements) >= 4
    with psycopg.connect(url, autocommit=True) as db:
        assert all(db.execute(statement.encode()).fetchall() for statement in statements)
        assert world.rows(db, "select status from pgharness.worker_health where status = 'running'") == []


def test_an_interrupted_demo_cancels_its_run(url: str) -> None:
    process = CommandLine(url).start("demo")
    assert process.stdout is not None
    while "0.0% done" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted, and its run cancelled\n")
    with psycopg.connect(url) as db:
        assert world.value(db, "select status from pgharness.runs") == "cancelled"


def test_the_demo_keeps_off_an_instance_of_that_name(small: tuple[world.Database, CommandLine]) -> None:
    db, line = small
    db.execute("update pgharness.instances set name = 'demo'")
    before = world.contents(db)
    refused = line.call("demo", status=1)
    assert 'an instance "demo" with models of your own' in refused.err and "Rename it" in refused.err
    assert world.contents(db) == before
