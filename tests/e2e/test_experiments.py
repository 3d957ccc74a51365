"""The experiments in experiments/ do what they say, as written."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pgharness.embedded import find_bindir

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "experiments"
PRIMOCK57 = ROOT.parent / "shared" / "data" / "primock57"


def pgharness(url: str, *arguments: str, **environment: str) -> None:
    """Run a command against a database; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "pgharness", *arguments],
        env=os.environ | {"PGHARNESS_DATABASE_URL": url} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def psql(url: str, script: Path, **variables: str) -> None:
    """Apply a script with psql, as its README says."""
    given = [f"--set={name}={value}" for name, value in variables.items()]
    command = [str(find_bindir()[0] / "psql"), "--no-psqlrc", "--set=ON_ERROR_STOP=1", *given, "--dbname", url]
    done = subprocess.run([*command, "--file", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def run(url: str, instance: str, *options: str, **environment: str) -> None:
    """Start an instance and work until it has ended."""
    pgharness(url, "start", instance)
    pgharness(url, "worker", "--exit-when-idle", *options, **environment)


def rows(connection: Connection[Any], query: bytes) -> list[tuple[Any, ...]]:
    found = connection.execute(query).fetchall()
    connection.commit()
    return found


def scores(connection: Connection[Any]) -> dict[str, tuple[Decimal, Decimal, Decimal]]:
    """Return the mean score and its interval by combination."""
    found = rows(
        connection, b"select combination, mean_score, confidence_low, confidence_high from pgharness.combination_scores"
    )
    return {name: (mean, low, high) for name, mean, low, high in found}


@pytest.fixture
def demo(url: str) -> str:
    """Connection string of a database to which the demo was applied, twice."""
    script = (EXPERIMENTS / "demo" / "demo.sql").read_bytes()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(script)
        connection.execute(script)
    return url


def test_demo_can_be_applied_twice(demo: str) -> None:
    with psycopg.connect(demo) as connection:
        counts = rows(
            connection,
            b"""
            select (select count(*) from pgharness.cases), (select count(*) from pgharness.rubrics),
                   (select count(*) from pgharness.eligible_cases), (select count(*) from pgharness.instance_cases)
            """,
        )
        workload = rows(connection, b"select note_count, grade_count, problems from pgharness.expected_workload")
    assert counts == [(8, 17, 6, 6)]
    assert workload == [(36, 144, [])]


def test_demo_transcripts_and_rubrics_are_whole(demo: str) -> None:
    with psycopg.connect(demo) as connection:
        broken = rows(
            connection,
            b"""
            select c.name, turn from pgharness.cases as c, jsonb_array_elements(c.input) as turn
             where turn ->> 'speaker' not in ('Doctor', 'Nurse', 'Patient', 'Parent') or length(turn ->> 'text') < 3
            """,
        )
        turns = rows(connection, b"select jsonb_array_length(input) from pgharness.cases")
        weights = rows(
            connection,
            b"""
            select sum((criterion ->> 'weight')::integer)
              from pgharness.rubrics as r, jsonb_array_elements(r.criteria) as criterion group by r.id
            """,
        )
    assert not broken
    assert all(12 <= count <= 20 for (count,) in turns)
    assert all(total == 100 for (total,) in weights)


def test_demo_finds_that_careful_is_better_than_hasty_and_dearer(demo: str) -> None:
    run(demo, "demo", "--workers", "2", "--concurrency", "10")
    with psycopg.connect(demo) as connection:
        progress = rows(
            connection, b"select status, notes_succeeded, grades_succeeded, cost_usd > 0 from pgharness.run_progress"
        )
        found = scores(connection)
        costs = dict(rows(connection, b"select model, cost_usd from pgharness.cost_by_model where cost_usd > 0"))
        graded = rows(connection, b"select distinct case_name from pgharness.grade_results")
    assert progress == [("completed", 36, 144, True)]
    careful, hasty = found["demo/careful -> demo/grader"], found["demo/hasty -> demo/grader"]
    assert careful[1] > hasty[2], "the intervals overlap"
    assert costs["demo/careful"] > costs["demo/hasty"]
    assert len(graded) == 6


def test_clinical_program_runs_at_its_commit(demo: str, tmp_path: Path) -> None:
    repository = tmp_path / "scribe"
    repository.mkdir()
    program = EXPERIMENTS / "clinical_program" / "generate.py"
    (repository / "generate.py").write_bytes(program.read_bytes())
    commit = _committed(repository)
    (repository / "generate.py").write_text("raise SystemExit('not this version')")
    _committed(repository)
    for _ in range(2):
        psql(demo, EXPERIMENTS / "clinical_program" / "clinical_program.sql", repository=str(repository), commit=commit)
    run(demo, "clinical-program", "--concurrency", "4", "--allow-code", PGHARNESS_CACHE=str(tmp_path / "cache"))
    with psycopg.connect(demo) as connection:
        progress = rows(connection, b"select status, notes_succeeded, grades_succeeded from pgharness.run_progress")
        notes = rows(
            connection,
            b"""
            select count(distinct output), bool_and(jsonb_array_length(output -> 'plan') > 0)
              from pgharness.note_results where combination = 'program/full -> demo/grader' group by case_name
            """,
        )
        found = scores(connection)
    assert progress == [("completed", 24, 48)]
    assert all(has_plan for _, has_plan in notes)
    assert any(different == 2 for different, _ in notes), "the overlap reaches the program"
    assert found["program/full -> demo/grader"][0] > found["program/brief -> demo/grader"][0]


def _committed(repository: Path) -> str:
    git = ["git", "-C", str(repository), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    if not (repository / ".git").exists():
        subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "a version"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(
    not (PRIMOCK57 / "cases.jsonl").exists(), reason=f"PriMock57 is not part of the project, and not in {PRIMOCK57}"
)
def test_primock57_plans_and_yields_35_notes_and_140_grades_per_combination(url: str) -> None:
    pgharness(url, "import", "cases", str(PRIMOCK57 / "cases.jsonl"), "--dataset", "primock57", "--input", "transcript")
    pgharness(url, "import", "rubrics", str(PRIMOCK57 / "rubrics.jsonl"))
    psql(url, EXPERIMENTS / "primock57" / "primock57.sql")
    run(url, "primock57", "--workers", "2", "--concurrency", "50")
    with psycopg.connect(url) as connection:
        counts = rows(
            connection,
            b"""
            select (select count(*) from pgharness.cases), (select count(*) from pgharness.rubrics),
                   (select sum(jsonb_array_length(criteria)) from pgharness.rubrics),
                   (select count(*) from pgharness.eligible_cases)
            """,
        )
        leaked = rows(
            connection, b"select name from pgharness.cases where input ? 'reference_note' or target is not null"
        )
        progress = rows(connection, b"select status, notes_failed, grades_failed from pgharness.run_progress")
        done = rows(connection, b"select note_count, grade_count from pgharness.combination_scores")
        found = scores(connection)
    assert counts == [(57, 27, 1351, 7)]
    assert not leaked
    assert progress == [("completed", 0, 0)]
    assert done == [(35, 140), (35, 140)]
    careful = found["primock57/careful -> primock57/grader"]
    assert careful[1] > found["primock57/hasty -> primock57/grader"][2]


def test_a_panel_is_right_more_often_than_the_best_of_it_alone(url: str) -> None:
    script = EXPERIMENTS / "ensemble_reliability" / "ensemble_reliability.sql"
    psql(url, script)
    psql(url, script)
    run(url, "ensemble-reliability", "--concurrency", "100")
    with psycopg.connect(url) as connection:
        found = scores(connection)
        assert found["single"][0] < min(found["panel of 3"][0], found["panel of 5"][0], found["panel of 7"][0])
        assert found["panel of 7"][0] < Decimal("0.99"), "errors that come together are not voted away"
        united = rows(
            connection,
            b"""
            select avg(g.normalised_score) filter (where c.consensus = 1) - avg(g.normalised_score) filter (where c.consensus < 0.6)
              from pgharness.composite_calls as c
              join pgharness.grades as g on g.run_id = c.run_id and g.note_ordinal = c.ordinal
            """,
        )
        assert united[0][0] > 0.1, "consensus says how sure an answer is"


def test_hedging_cuts_the_slowest_answers_for_a_few_requests_more(url: str) -> None:
    psql(url, EXPERIMENTS / "hedging" / "hedging.sql")
    run(url, "hedging", "--concurrency", "50")
    with psycopg.connect(url) as connection:
        slowest = dict(
            rows(
                connection,
                b"""
                select combination, percentile_cont(0.99) within group (order by latency_ms)
                  from pgharness.note_results group by 1
                """,
            )
        )
        assert slowest["hedged"] < slowest["baseline"] / 2
        extra = rows(connection, b"select extra_count::float / call_count from pgharness.hedging")
        assert 0.01 < extra[0][0] <= 0.1
