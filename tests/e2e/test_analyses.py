"""Analyses from end to end: asked for in SQL, made by real workers that may die, and right about a planted difference."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from scipy import stats as scipy_stats

from command_line import CommandLine
from world import Database, rows, value

ROOT = Path(__file__).parents[2]
PRIMOCK57 = ROOT.parent / "shared" / "data" / "primock57"
_POLL_SECONDS = 0.05


def wait_for(what: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Return what a condition gives, once it gives anything."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(_POLL_SECONDS)
    return found


@contextmanager
def worker(url: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Have a worker until the block ends; it and what it started are then killed."""
    command = CommandLine(url, environment={"PGHARNESS_STALE_SECONDS": "2"} | environment)
    process = command.start(
        "worker", "--queues", "note,grade", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def db(url: str) -> Iterator[Database]:
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


def define(
    db: Database, *, cases: int = 40, abilities: tuple[float, ...] = (0.45, 0.45, 0.75), replications: int = 3
) -> None:
    """Define simulated generators of different ability at invented questions of different difficulty."""
    db.execute(
        "insert into pgharness.cases (name, input, target, metadata)"
        " select 'question-' || i, to_jsonb('How much is ' || i || ' + ' || i || '?'), to_jsonb((2 * i)::text), jsonb_build_object('difficulty', (i %% 10) / 10.0)"
        " from generate_series(1, %s) as i",
        (cases,),
    )
    db.execute(
        "insert into pgharness.instances (name, note_replications, seed) values ('quiz', %s, 7)", (replications,)
    )
    db.execute("select pgharness.add_cases('quiz', names => array(select name from pgharness.cases))")
    for number, ability in enumerate(abilities):
        parameters = {"ability": ability, "discrimination": 4, "latency_seconds": 0}
        name = f"model {number}"
        db.execute(
            "insert into pgharness.models (name, provider, parameters) values (%s, 'simulator', %s)",
            (name, json.dumps(parameters)),
        )
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values ('quiz', %s, %s, 'exact_match')",
            (name, name),
        )


def finished(db: Database, analysis: int) -> dict[str, Any]:
    """Return an analysis once a worker has made it."""
    query = "select * from pgharness.analysis_results where analysis_id = %s and status in ('succeeded', 'failed')"
    found: dict[str, Any] = wait_for(lambda: rows(db, query, analysis))[0]
    return found


def test_a_planted_difference_is_found_and_no_other_through_sql_alone(url: str, db: Database) -> None:
    define(db)
    run = value(db, "select run_id from pgharness.start_run('quiz')")
    with worker(url):
        wait_for(lambda: value(db, "select status from pgharness.run_progress") == "completed")
        analysis = value(db, "select id from pgharness.request_analysis('compare', runs => '{quiz/1}')")
        found = finished(db, analysis)
        assert found["error"] is None
        different = {
            frozenset((row["first"], row["second"]))
            for row in rows(db, "select * from pgharness.analysis_comparisons where is_different")
        }
        assert different == {frozenset(("model 0", "model 2")), frozenset(("model 1", "model 2"))}
        check_numbers(db, run, analysis)
        assert value(db, "select id from pgharness.request_analysis('compare', array[%s])", run) == analysis
        assert value(db, "select attempts from pgharness.analyses") == 1
        again = value(db, "select id from pgharness.request_analysis('compare', array[%s], anew => true)", run)
        assert finished(db, again)["result"] == found["result"], "the same data give the same numbers"
        for kind in ("agreement", "ablation"):
            asked = value(
                db,
                "select id from pgharness.request_analysis(%s, array[%s], options => %s)",
                kind,
                run,
                json.dumps({"baseline": "model 0"} if kind == "ablation" else {}),
            )
            told = finished(db, asked)
            if kind == "agreement":  # one grade a note, by one metric
                assert (
                    told["status"] == "failed"
                    and "graded by two" in told["error"]
                    and "grade_replications" in told["hint"]
                )
            else:
                assert [
                    row["second"]
                    for row in rows(
                        db, "select second from pgharness.analysis_comparisons where analysis_id = %s", asked
                    )
                ] == ["model 0"] * 2


def check_numbers(db: Database, run: int, analysis: int) -> None:
    """Compute every number of a comparison again, from the grades themselves."""
    found = rows(
        db,
        "select combination, case_name, avg(score / max_score)::double precision as score, count(*) as grades from pgharness.grade_results"
        " where run_id = %s group by 1, 2 order by 1, 2",
        run,
    )
    names = sorted({row["combination"] for row in found})
    means = {name: np.array([row["score"] for row in found if row["combination"] == name]) for name in names}
    for group in rows(db, "select * from pgharness.analysis_groups where analysis_id = %s", analysis):
        one = means[group["name"]]
        assert group["grade_count"] == sum(row["grades"] for row in found if row["combination"] == group["name"])
        assert group["mean_score"] == pytest.approx(one.mean(), abs=1e-9)
        interval = scipy_stats.t.interval(0.95, len(one) - 1, one.mean(), scipy_stats.sem(one))
        assert (group["confidence_low"], group["confidence_high"]) == pytest.approx(interval, abs=1e-9)
    raw, corrected = [], []
    for pair in rows(
        db, "select * from pgharness.analysis_comparisons where analysis_id = %s order by number", analysis
    ):
        one, two = means[pair["first"]], means[pair["second"]]
        expected = scipy_stats.ttest_rel(one, two)
        assert pair["difference"] == pytest.approx((one - two).mean(), abs=1e-9)
        assert pair["standard_error"] == pytest.approx(scipy_stats.sem(one - two), abs=1e-9)
        interval = expected.confidence_interval()
        if pair["test"] == "Paired permutation test":  # where differences are not normal; by other random signs
            assert scipy_stats.shapiro(one - two).pvalue < 0.05
            signs = np.random.default_rng(1).choice([-1.0, 1.0], (20_000, len(one)))
            beyond = np.round(signs @ (one - two) - (one - two).sum(), 9)
            ties = (beyond == 0).mean() / 2  # a mid-p
            p_value = 2 * min((beyond > 0).mean() + ties, (beyond < 0).mean() + ties)
            assert pair["p_value"] == pytest.approx(p_value, abs=4 * np.sqrt(0.75 / 9999))
            assert (pair["confidence_low"] <= 0 <= pair["confidence_high"]) == (pair["p_value"] >= 0.05)
            near = dict(abs=pair["standard_error"] / 2)
        else:
            assert pair["test"] == "Paired t test"
            assert pair["p_value"] == pytest.approx(expected.pvalue, rel=1e-6)
            near = dict(abs=1e-9)
        assert (pair["confidence_low"], pair["confidence_high"]) == pytest.approx((interval.low, interval.high), **near)
        raw.append(pair["p_value"])
        corrected.append(pair["p_corrected"])
    order = np.argsort(raw)
    holm = np.maximum.accumulate(np.array(raw)[order] * np.arange(len(raw), 0, -1)).clip(max=1)
    assert np.array(corrected)[order] == pytest.approx(holm, rel=1e-12)


def test_an_analysis_whose_worker_is_killed_is_made_by_another(url: str, db: Database) -> None:
    define(db, cases=5)
    db.execute("select pgharness.start_run('quiz')")
    CommandLine(url).work()
    # what it reads is locked, so that it is being made for as long as the test likes
    with psycopg.connect(url) as holder:
        holder.execute("lock table pgharness.rubrics in access exclusive mode")
        analysis = value(db, "select id from pgharness.request_analysis('power', runs => '{quiz/1}')")
        with worker(url) as first:
            wait_for(lambda: value(db, "select status from pgharness.analyses") == "running")
            kill_group(first)
        with worker(url):
            wait_for(lambda: value(db, "select attempts from pgharness.analyses") == 2)
            holder.rollback()
            assert finished(db, analysis)["status"] == "succeeded"


def test_a_worker_that_stops_leaves_its_analysis_and_answers_meanwhile(url: str, db: Database) -> None:
    define(db, cases=5)
    db.execute("select pgharness.start_run('quiz')")
    CommandLine(url).work()
    with psycopg.connect(url) as holder:
        holder.execute("lock table pgharness.rubrics in access exclusive mode")
        db.execute("select pgharness.request_analysis('compare', runs => '{quiz/1}')")
        with worker(url) as process:
            wait_for(lambda: value(db, "select status from pgharness.analyses") == "running")
            beat = value(db, "select max(heartbeat_at) from pgharness.workers")
            wait_for(lambda: value(db, "select max(heartbeat_at) from pgharness.workers") > beat)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        holder.rollback()
    assert CommandLine(url).run("analyse", "compare", "quiz/1").out.count("model 0 against model 1") == 1
    assert value(db, "select count(*) from pgharness.analyses") == 1


def test_the_command_makes_what_no_worker_does(url: str, db: Database) -> None:
    define(db, cases=30)
    db.execute("select pgharness.start_run('quiz')")
    command = CommandLine(url, environment={"COLUMNS": "200"})
    command.work()
    shown = command.run("analyse", "compare", "quiz/1", "--set", "alpha=0.01").out
    assert "second higher" in shown and "they differ" in shown and "p (holm)" in shown and "99% interval" in shown
    found = command.call("analyse", "ablation", "1", "--set", "baseline=model 0", "--json").json
    assert [pair["second"] for pair in found["result"]["pairs"]] == ["model 0", "model 0"]
    assert command.call("analyse", "power", "quiz/1", "--no-wait").out.count("pgharness worker") == 1
    assert "find a difference of" in command.call("analyse", "power", "quiz/1").out
    refused = command.call("analyse", "agreement", "quiz/1", status=1)
    assert "graded by two" in refused.out and "grade_replications" in refused.err
    for arguments, said in (
        (("guess", "quiz/1"), "It is one of"),
        (("compare", "nothing"), "quiz/1"),
        (("compare", "quiz/1", "--set", "colour=1"), "It has alpha"),
        (("compare", "quiz/1", "--set", "alpha=many"), "a number from"),
    ):
        assert said in " ".join(command.call("analyse", *arguments, status=1).err.split())
    assert "KEY=VALUE" in command.call("analyse", "compare", "quiz/1", "--set", "alpha", status=2).err
    assert value(db, "select count(*) from pgharness.workers where status = 'running'") == 0


@pytest.mark.skipif(
    not (PRIMOCK57 / "cases.jsonl").exists(), reason=f"PriMock57 is not part of the project, and not in {PRIMOCK57}"
)
def test_primock57_shows_the_planted_difference_and_no_other(url: str, db: Database) -> None:
    command = CommandLine(url)
    command.call("import", "cases", str(PRIMOCK57 / "cases.jsonl"), "--dataset", "primock57", "--input", "transcript")
    command.call("import", "rubrics", str(PRIMOCK57 / "rubrics.jsonl"))
    for name, quality in (("careful", 0.9), ("careful too", 0.9), ("hasty", 0.4)):
        db.execute(
            "insert into pgharness.models (name, provider, parameters) values (%s, 'simulator', %s)",
            (name, json.dumps({"quality": quality, "output_tokens": 1000, "latency_seconds": 0})),
        )
    db.execute(
        "insert into pgharness.models (name, provider, parameters) values ('judge', 'simulator', '{\"latency_seconds\": 0}')"
    )
    db.execute(
        "insert into pgharness.instances (name, note_replications, grade_replications, seed) values ('primock', 5, 2, 57)"
    )
    db.execute("select pgharness.add_cases('primock', eligible => true, dataset => 'primock57')")
    db.execute(
        "insert into pgharness.model_combinations (instance, name, generator, grader)"
        " select 'primock', n, n, 'judge' from unnest('{careful,careful too,hasty}'::text[]) as n"
    )
    db.execute(
        'select pgharness.preregister(\'primock\', \'[{"first": "careful", "second": "hasty", "direction": "higher"},'
        ' {"first": "careful too", "second": "hasty", "direction": "higher"}, {"first": "careful", "second": "careful too"}]\', test => \'t\')'
    )
    run = value(db, "select run_id from pgharness.start_run('primock')")
    with worker(url):
        wait_for(lambda: value(db, "select status from pgharness.run_progress") == "completed", seconds=120)
        analysis = value(
            db,
            "select id from pgharness.request_analysis('compare', runs => '{primock/1}', options => '{\"test\": \"t\"}')",
        )
        assert finished(db, analysis)["error"] is None
    different = {
        (row["first"], row["second"])
        for row in rows(db, "select * from pgharness.analysis_comparisons where is_different")
    }
    assert different == {("careful", "hasty"), ("careful too", "hasty")}
    check_numbers(db, run, analysis)
    assert rows(db, "select * from pgharness.preregistration_deviations") == []


def test_the_page_about_analyses_runs_as_written(url: str, db: Database) -> None:
    db.execute((ROOT / "experiments" / "demo" / "demo.sql").read_bytes())
    faultless = {"latency_seconds": 0, "latency_tail_rate": 0, "error_rate": 0, "rate_limit_rate": 0, "invalid_rate": 0}
    db.execute(
        "update pgharness.models set parameters = parameters || %s where name like 'demo/%%'", (json.dumps(faultless),)
    )
    db.execute("select pgharness.start_run('demo'), pgharness.start_run('demo')")
    command = CommandLine(url, environment={"COLUMNS": "200"})
    command.work()
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "analyses.md").read_text(), re.S)
    printed = []
    for language, text in blocks:
        if language == "sql":
            db.execute(text.encode())
        elif language == "sh":
            for line in text.strip().splitlines():
                printed.append(command.call(*shlex.split(line)[1:]).out)
        else:
            exec(compile(text, "docs/analyses.md", "exec"), {"url": url})
    assert [language for language, _ in blocks] == ["sql", "sql", "sh", "sql", "python"]
    assert "demo/careful -> demo/grader" in printed[0] and '"detectable"' in printed[1]
    assert value(db, "select count(*) from pgharness.preregistrations") == 1
    assert value(db, "select count(*) from pgharness.analyses where status = 'succeeded'") == 2


def test_hostile_names_are_only_names(url: str, db: Database) -> None:
    names = ['x"; drop table pgharness.grades; --', "</script><script>alert(1)</script>", "\\n{}%s \N{SNOWMAN} '"]
    define(db, cases=6, abilities=())
    for number, name in enumerate(names):
        model = f"model {number}"
        db.execute(
            "insert into pgharness.models (name, provider, parameters) values (%s, 'simulator', %s)",
            (model, json.dumps({"quality": 0.2 + 0.3 * number, "latency_seconds": 0})),
        )
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values ('quiz', %s, %s, 'exact_match')",
            (name, model),
        )
    db.execute("select pgharness.start_run('quiz', name => %s)", (names[0],))
    command = CommandLine(url)
    command.work()
    found = command.call("analyse", "ablation", names[0], "--set", f"baseline={json.dumps(names[2])}", "--json").json
    assert [group["name"] for group in found["result"]["groups"]] == names
    shown = command.call("analyse", "compare", names[0], "--set", f"combinations={json.dumps(names[:2])}").out
    assert "alert(1)" in "".join(shown.split())
    assert value(db, "select count(*) from pgharness.grades") == 6 * 3 * 3
