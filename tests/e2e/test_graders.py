"""Graders and programs end to end: metrics, models without a rubric, callables, a program at a pinned commit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import world
from command_line import CommandLine

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

# what the callable writes for each case, the case's target, and what each metric makes of it
METRICS = ("exact_match", "numeric_match", "contains", "regex")
CASES = {
    "same": ("72", "72", (1, 1, 1, 1)),
    "in words": ("18 - 6 = 12, so it is 72.", "72", (0, 1, 1, 1)),
    "other form": ("72.0", "72", (0, 1, 1, 1)),
    "wrong": ("I get 71", "72", (0, 0, 0, 0)),
}

CALLABLES = """
    def write_note(item):
        return item["case"]["metadata"]["note"]

    def break_down(item):
        raise LookupError(f"no idea about {item['case']['name']}")

    def grade_carelessly(item):
        # at first one verdict, whatever was asked; told so, one for each criterion
        told = item["messages"][-1]["content"]
        count = 1 if item["attempt"] == 1 else len(item["rubric"]["criteria"])
        return {"verdicts": [{"rationale": told, "satisfaction": 100}] * count}

    def grade_never(item):
        return {"verdicts": "splendid"}
"""
PROGRAM = """
    import json, os, sys
    asked = json.load(sys.stdin)
    told = {name: os.environ["PGHARNESS_" + name] for name in ("OVERLAP", "REPLICATION", "SOFTWARE_VERSION", "MODEL")}
    print(json.dumps({"said": "NUMBER", "case": asked["case"]["name"], "config": asked["config"], **told}))
"""


def _git(repository: Path, *arguments: str) -> str:
    person = ("-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(repository), *person, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose program says first, and at its head says second."""
    path = tmp_path_factory.mktemp("program")
    _git(path, "init", "--quiet", "--initial-branch=main")
    for version in ("first", "second"):
        (path / "write.py").write_text(textwrap.dedent(PROGRAM).replace("NUMBER", version))
        _git(path, "add", "--all")
        _git(path, "commit", "--quiet", "--message", version)
    return path


def _add_combination(db: world.Database, instance: str, generator: str, grader: str | None) -> None:
    db.execute(
        "insert into pgharness.model_combinations (instance, generator, grader) values (%s, %s, %s)",
        (instance, generator, grader),
    )


def _define(db: world.Database, repository: Path) -> None:
    for name, (note, target, _) in CASES.items():
        db.execute(
            "insert into pgharness.cases (name, input, target, metadata) values (%s, '\"How much is it?\"', %s, %s)",
            (name, json.dumps(target), json.dumps({"note": note})),
        )
    criteria = json.dumps([{"criterion": "says a number", "weight": 30}, {"criterion": "is polite", "weight": 10}])
    db.execute(
        "insert into pgharness.rubrics (case_name, author, validation, criteria)"
        " select name, author, 'accepted', %s from pgharness.cases, unnest('{ann,bob}'::text[]) as author",
        (criteria,),
    )
    for function in ("write_note", "break_down", "grade_carelessly", "grade_never"):
        db.execute(
            "insert into pgharness.models (name, provider, model) values (%s, 'python', %s)",
            (function, f"house_models:{function}"),
        )
    program = {"command": ["python3", "write.py"], "repository": str(repository)}
    db.execute(
        "insert into pgharness.models (name, provider, model, parameters) values ('program', 'command', 'brief', %s)",
        (json.dumps(program),),
    )
    instances: dict[str, dict[str, object]] = {
        "metrics": {"grade_replications": 3},
        "target": {"rubrics_per_case": 0, "grade_replications": 2},
        "careless": {"retry_delay_seconds": 0.5},
        "never": {"retry_delay_seconds": 0.5, "max_attempts": 2, "failure_threshold": 1},
        "broken": {"max_attempts": 1, "failure_threshold": 1},
        "pinned": {
            "software_version": _git(repository, "rev-parse", "--short", "HEAD~1"),
            "cycle_transcript_overlaps": [0, 50],
            "note_replications": 2,
            "config": json.dumps({"style": "brief"}),
        },
    }
    for name, columns in instances.items():
        world.add_instance(db, name, cases=0, combinations=(), **columns)
        db.execute("select pgharness.add_cases(%s, names => %s)", (name, list(CASES)))
    for metric in METRICS:
        _add_combination(db, "metrics", "write_note", metric)
    _add_combination(db, "target", "write_note", "simulator")
    _add_combination(db, "careless", "simulator", "grade_carelessly")
    _add_combination(db, "never", "simulator", "grade_never")
    _add_combination(db, "broken", "break_down", None)
    _add_combination(db, "pinned", "program", None)


@pytest.fixture(scope="module")
def refused(
    server_url: str, template: str, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[world.Database, CommandLine]]:
    """A database in which a worker without --allow-code has met a program and a callable."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "house_models.py").write_text(textwrap.dedent(CALLABLES))
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        _define(db, repository)
        world.start(db, "pinned")
        modules = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        line = CommandLine(url, environment={"PYTHONPATH": modules, "PGHARNESS_CACHE": str(folder / "cache")})
        line.work()
        yield db, line
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)  # checkouts are read-only, and the folder is to be removed


@pytest.fixture(scope="module")
def done(refused: tuple[world.Database, CommandLine]) -> world.Database:
    """The same database after a worker with --allow-code has done everything."""
    db, line = refused
    db.execute("select pgharness.retry_failed('pinned/1')")
    for instance in ("metrics", "target", "careless", "never", "broken"):
        world.start(db, instance)
    line.work("--allow-code", "--concurrency", "20")
    return db


def _progress(db: world.Database, run: str) -> world.Row:
    (row,) = world.rows(db, "select * from pgharness.run_progress where run = %s", run)
    return row


def test_a_worker_without_allow_code_runs_no_code_and_says_what_would(
    refused: tuple[world.Database, CommandLine],
) -> None:
    db, _ = refused
    progress = _progress(db, "pinned/1")
    assert (progress["status"], progress["notes_succeeded"]) == ("failed", 0)
    items = world.rows(db, "select error, attempts, status from pgharness.failed_items where run = 'pinned/1'")
    assert items
    for item in items:
        assert item["status"] == "failed"
        assert "model 'program' runs code (command), which this worker does not allow" in item["error"]
        assert "--allow-code" in item["error"] and "retry_failed" in item["error"]
    assert world.value(db, "select count(*) from pgharness.calls") == 0


def test_a_program_runs_at_its_pinned_commit(done: world.Database, repository: Path) -> None:
    progress = _progress(done, "pinned/1")
    assert (progress["status"], progress["note_count"], progress["notes_succeeded"]) == ("completed", 16, 16)
    notes = world.rows(
        done, "select case_name, overlap, replication, output from pgharness.note_results where run = 'pinned/1'"
    )
    commit = _git(repository, "rev-parse", "HEAD~1")
    for note in notes:
        assert note["output"] == {
            "said": "first",
            "case": note["case_name"],
            "config": {"style": "brief"},
            "OVERLAP": str(note["overlap"]),
            "REPLICATION": str(note["replication"]),
            "SOFTWARE_VERSION": commit,
            "MODEL": "brief",
        }
    assert {note["overlap"] for note in notes} == {0, 50}


def test_metrics_score_as_they_promise(done: world.Database) -> None:
    rows = world.rows(
        done,
        "select case_name, combination, score, max_score, rubric_author, grade_replication"
        " from pgharness.grade_results where run = 'metrics/1'",
    )
    found = {(row["case_name"], row["combination"].removeprefix("write_note -> ")): row["score"] for row in rows}
    expected = {(case, metric): score for case in CASES for metric, score in zip(METRICS, CASES[case][2], strict=True)}
    assert found == expected
    # a metric grades once, against the target, and asks nobody
    assert {(row["max_score"], row["rubric_author"], row["grade_replication"]) for row in rows} == {(1, None, 1)}
    assert len(rows) == len(expected)
    count = "select count(*) from pgharness.calls where kind = 'grade' and run_id = %s"
    assert world.value(done, count, _progress(done, "metrics/1")["run_id"]) == 0
    (exact,) = world.rows(
        done,
        "select mean_score, case_count from pgharness.combination_scores"
        " where run = 'metrics/1' and combination = 'write_note -> exact_match'",
    )
    assert (exact["mean_score"], exact["case_count"]) == (pytest.approx(0.25), 4)


def test_without_rubrics_a_model_grades_against_the_target(done: world.Database) -> None:
    assert _progress(done, "target/1")["grades_succeeded"] == 8
    criteria = world.rows(
        done,
        "select criterion, weight, rubric_author, rationale from pgharness.criterion_results where run = 'target/1'",
    )
    assert {(row["criterion"], row["weight"], row["rubric_author"]) for row in criteria} == {
        ("The output agrees with the target.", 100, None)
    }
    assert all(row["rationale"] for row in criteria)


def test_a_grader_is_told_what_was_wrong_with_its_answer(done: world.Database) -> None:
    progress = _progress(done, "careless/1")
    assert (progress["status"], progress["grades_succeeded"]) == ("completed", 8)
    rationales = world.rows(done, "select distinct rationale from pgharness.criterion_results where run = 'careless/1'")
    assert [row["rationale"] for row in rationales] == [
        "This answer cannot be used: the answer has 1 verdicts for 2 criteria."
        " Answer again, in full and in the form asked for."
    ]
    assert world.value(done, "select count(*) from pgharness.failed_items where run = 'careless/1'") == 0


def test_an_answer_that_never_fits_fails_its_grade_and_is_kept(done: world.Database) -> None:
    progress = _progress(done, "never/1")
    assert (progress["status"], progress["grades_failed"], progress["notes_succeeded"]) == ("completed", 8, 4)
    items = world.rows(done, "select cause, error, answer, attempts from pgharness.failed_items where run = 'never/1'")
    assert {(item["cause"], item["attempts"]) for item in items} == {("invalid_output", 2)}
    assert {item["answer"] for item in items} == {'{"verdicts": "splendid"}'}
    assert {item["error"] for item in items} == {'the answer has no array under "verdicts"'}


def test_what_a_callable_raises_is_kept_with_its_traceback(done: world.Database) -> None:
    assert _progress(done, "broken/1")["notes_failed"] == 4
    items = world.rows(
        done, "select case_name, cause, error, answer from pgharness.failed_items where run = 'broken/1'"
    )
    for item in items:
        assert item["cause"] == "code_failed"
        assert f"LookupError: no idea about {item['case_name']}" in item["error"]
        assert "house_models.py" in item["answer"] and "break_down" in item["answer"]


def test_nothing_is_left_behind(done: world.Database) -> None:
    assert world.orphans(done) == []
