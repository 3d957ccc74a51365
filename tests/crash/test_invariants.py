"""The design's seven invariants, each with a test that tries to break it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgharness import __version__, database, schema
from pgharness.embedded import find_bindir
from pgharness.errors import EmbeddedError
from world import contents

KEY = "sk-recognisable-5f1c09e7b2d84a66"


def test_1_our_rows_are_the_truth_and_one_call_puts_the_work_back(lab: Any) -> None:
    """The queue is destroyed again and again, in every way, before and between the steps of a run."""
    lab.simulator(latency_seconds=0.005)
    lab.instance(cases=30, generator="sim", grader="sim")
    run_id = lab.start()
    assert_jobs_carry_ids_only(lab)
    group = lab.workers(1)
    for ruin in (
        "delete from procrastinate.procrastinate_jobs",
        "update procrastinate.procrastinate_jobs set scheduled_at = now() + interval '1 year' where status = 'todo'",
        "truncate procrastinate.procrastinate_workers, procrastinate.procrastinate_jobs cascade",
        "drop schema procrastinate cascade",
    ):
        before = lab.rows("select * from pgharness.notes order by 1, 2")
        lab.insist(ruin)
        if ruin.startswith("drop"):
            with database.connect(lab.url) as connection:
                schema.upgrade(connection)
        kept = set(lab.rows("select ordinal from pgharness.notes"))
        assert kept >= {(row[1],) for row in before}
        if lab.value("select status from pgharness.runs where id = %s", run_id) == "running":
            lab.db.execute("select pgharness.requeue_run(%s)", (run_id,))
        lab.wait_for_end(run_id)
        lab.assert_complete(run_id)
        lab.wait_for_quiet_queue()
        run_id = lab.start()
        lab.wait(lambda run_id=run_id: count(lab, "notes", run_id) > 3, "some notes", group=group)
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)


def assert_jobs_carry_ids_only(lab: Any) -> None:
    arguments = [args for (args,) in lab.rows("select args from procrastinate.procrastinate_jobs")]
    assert arguments and {key for args in arguments for key in args} == {"run_id", "kind", "epoch", "first", "last"}


def count(lab: Any, table: str, run_id: int) -> int:
    found: int = lab.value(f"select count(*) from pgharness.{table} where run_id = %s", run_id)
    return found


def test_2_nothing_is_there_twice_however_often_and_by_whom_it_is_delivered(lab: Any) -> None:
    """Every job is delivered five times, to three processes, while three sessions record the same items by hand."""
    lab.simulator(latency_seconds=0.01)
    lab.instance(cases=20, generator="sim", grader="sim", note_replications=2)
    lab.workers(3, concurrency=4)
    run_id = lab.start()
    copies = (
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name, priority, args)"
        " select queue_name, task_name, priority, args from procrastinate.procrastinate_jobs, generate_series(1, 4)"
        " where task_name = 'pgharness.slice'"
    )
    lab.db.execute(copies.encode())
    failures: list[str] = []

    def interfere() -> None:
        with psycopg.connect(lab.url, autocommit=True) as connection:
            worker_id = connection.execute("select min(id) from pgharness.workers").fetchone()
            assert worker_id is not None
            for ordinal in range(40):
                outcome = {"run_id": run_id, "kind": "note", "ordinal": ordinal, "attempt": 1, "result": "succeeded"}
                outcomes = [outcome | {"output": "by hand", "calls": []}] * 2
                try:
                    database.call(connection, "record_outcomes", worker_id=worker_id[0], outcomes=json.dumps(outcomes))
                except Exception as exc:
                    failures.append(str(exc))

    threads = [threading.Thread(target=interfere) for _ in range(3)]
    for thread in threads:
        thread.start()
    lab.wait(lambda: lab.value("select grades_succeeded from pgharness.runs"), "grades")
    lab.db.execute(copies.encode())
    for thread in threads:
        thread.join()
    lab.wait_for_end(run_id)
    lab.wait_for_quiet_queue()
    assert failures == []
    lab.assert_complete(run_id)
    for table, twice in (
        ("notes", "case_number, combination_number, overlap, replication"),
        ("grades", "note_ordinal, rubric_number, replication"),
    ):
        query = f"select {twice} from pgharness.{table} group by run_id, {twice} having count(*) > 1"
        assert lab.rows(query) == []


def test_3_starting_cancelling_retrying_and_finishing_are_single_transactions(lab: Any) -> None:
    """A rollback leaves nothing at all, a commit no orphan, from every state, alone and all at once."""
    lab.simulator()
    lab.instance(cases=4, generator="sim", grader="sim", max_attempts=1)
    (worker_id,) = lab.rows("select pgharness.register_worker('here', 1, '0', '{note}', 1)")[0]

    def outcomes(connection: psycopg.Connection[Any], run_id: int, result: str) -> None:
        made = {"run_id": run_id, "attempt": 1, "result": result, "calls": []}
        made |= {"cause": "refused", "error": "no", "is_retryable": True, "spends_attempt": True, "output": "x"}
        verdicts = [{"rationale": "r", "satisfaction": 50}] * 2
        notes = [made | {"kind": "note", "ordinal": n} for n in range(4)]
        grades = [made | {"kind": "grade", "ordinal": n, "verdicts": verdicts} for n in range(8)]
        for part in (notes, grades):
            database.call(connection, "record_outcomes", worker_id=worker_id, outcomes=json.dumps(part))

    def control(function: str) -> Any:
        return lambda connection, run_id: database.call(connection, function, run_id=run_id)

    steps = {
        "start": lambda connection, _: database.call(connection, "start_run", instance="trial"),
        "cancel": control("cancel_run"),
        "pause": control("pause_run"),
        "resume": control("resume_run"),
        "retry": control("retry_failed"),
        "requeue": control("requeue_run"),
        "rerun": control("rerun"),
        "finish": lambda connection, run_id: outcomes(connection, run_id, "succeeded"),
        "fail": lambda connection, run_id: outcomes(connection, run_id, "failed"),
    }
    refused = 0
    for reached in ([], ["cancel"], ["pause"], ["fail"], ["fail", "retry"], ["finish"], ["cancel", "resume"]):
        run_id = lab.start()
        for step in reached:
            steps[step](lab.db, run_id)
        lab.assert_consistent()
        before = contents(lab.db)
        for name, step in steps.items():
            with psycopg.connect(lab.url) as connection:
                try:
                    step(connection, run_id)
                except database.DatabaseError:
                    refused += 1
                connection.rollback()
            assert contents(lab.db) == before, f"a rolled back {name} left something"
    assert refused > 5

    def race(run_id: int, name: str) -> None:
        with psycopg.connect(lab.url, autocommit=True) as connection:
            try:
                steps[name](connection, run_id)
            except database.DatabaseError as exc:
                assert exc.sqlstate == "PH003", exc

    with ThreadPoolExecutor(6) as pool:
        for _ in range(25):
            run_id = lab.start()
            names = ["cancel", "finish", "fail", "retry", "resume", "pause", "requeue", "finish"]
            for future in [pool.submit(race, run_id, name) for name in names]:
                future.result()
            lab.assert_consistent()


def test_4_nothing_of_the_database_is_held_while_a_model_is_asked(lab: Any, stub: Any) -> None:
    stub.always = "slow"
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.instance(cases=40, generator="vendor")
    lab.workers(2, concurrency=10)
    run_id = lab.start()
    lab.wait(lambda: stub.in_flight == 20, "20 calls in flight")
    sessions = (
        "select pid, state, xact_start is not null and state <> 'active' from pg_stat_activity"
        " where datname = current_database() and application_name = 'pgharness worker'"
    )
    seen: dict[str, int] = {}

    def watch() -> bool:
        found = lab.rows(sessions)
        assert not [row for row in found if row[2] or "transaction" in (row[1] or "")]
        assert len(found) <= 2 * 6
        if all(row[1] == "idle" for row in found):
            seen["idle"] = seen.get("idle", 0) + 1
        if seen.setdefault("connections", len(found)) != len(found):
            seen.clear()  # pools may still grow to their size
        return seen.get("idle", 0) >= 40

    lab.wait(watch, "a look at idle connections")
    assert stub.in_flight == 20
    lab.db.execute("select pgharness.cancel_run(%s)", (run_id,))


def test_5_workers_need_nothing_but_the_connection_string(lab: Any) -> None:
    """An empty home, an empty directory, an empty environment; and coming and going does no harm."""
    lab.simulator(latency_seconds=0.02)
    lab.instance(cases=60, generator="sim", grader="sim")
    home = lab.folder / "nowhere"
    home.mkdir()
    first = lab.workers(1, folder=home, waits=False)
    lab.wait(lambda: lab.at_work(first), "a worker", group=first)
    run_id = lab.start()
    second = lab.workers(1, waits=False)
    lab.wait(lambda: lab.at_work(second), "another worker", group=second)
    first.kill()
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    assert os.listdir(home) == []


def test_6_a_finished_run_says_how_it_was_made(lab: Any) -> None:
    """Whatever is changed afterwards."""
    lab.model(
        "priced",
        parameters={"latency_seconds": 0, "quality": 0.7},
        input_usd_per_million=3,
        output_usd_per_million=15,
    )
    lab.instance(cases=3, generator="priced", grader="priced", seed=4711, note_prompt="Note on {{ case_text }}")
    group = lab.workers(1, waits=False)
    run_id = lab.start(kind="milestone")
    lab.wait_for_end(run_id)
    digests = lab.rows("select digest from pgharness.run_cases where run_id = %s order by number", run_id)
    said = provenance(lab, run_id)
    lab.db.execute("update pgharness.instances set seed = 1, note_prompt = 'other', config = '{\"a\": 1}'")
    lab.db.execute("update pgharness.models set input_usd_per_million = 99, parameters = '{}' where name = 'priced'")
    lab.db.execute("delete from pgharness.model_combinations")
    with pytest.raises(psycopg.Error, match="are frozen"):
        lab.db.execute("update pgharness.cases set input = '\"other\"'")
    assert provenance(lab, run_id) == said

    definition, generator, environments = said
    assert definition["seed"] == 4711
    assert definition["config"] == {}
    assert definition["prompts"]["note"] == "Note on {{ case_text }}"
    assert "verdicts" in definition["prompts"]["grade"]
    assert re.fullmatch(r"[0-9a-f]{64}", definition["cases_digest"]) and len(set(digests)) == 3
    assert generator["parameters"] == {"latency_seconds": 0, "quality": 0.7}
    assert (generator["input_usd_per_million"], generator["output_usd_per_million"]) == (3, 15)
    assert generator["provider"] == "simulator"
    (environment,) = environments
    assert environment["packages"].keys() >= {"pgharness", "procrastinate", "psycopg", "aiohttp"}
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    assert environment["git_commit"] == (commit or None) and environment["git_is_dirty"] in (True, False)
    assert lab.value("select version from pgharness.workers limit 1") == __version__
    assert group.process.poll() is None
    rerun = lab.value("select run_id from pgharness.rerun(%s)", run_id)
    lab.wait_for_end(rerun)
    outputs = "select ordinal, output from pgharness.notes where run_id = %s order by 1"
    assert lab.rows(outputs, rerun) == lab.rows(outputs, run_id)
    tokens = "select sum(input_tokens), sum(output_tokens) from pgharness.calls where run_id = %s"
    assert lab.rows(tokens, rerun) == lab.rows(tokens, run_id)
    cost = "select note_cost_usd + grade_cost_usd from pgharness.runs where id = %s"
    assert lab.value(cost, rerun) > lab.value(cost, run_id) > 0, "it is paid for at the prices of its own start"


def provenance(lab: Any, run_id: int) -> tuple[Any, ...]:
    return (
        lab.value("select definition from pgharness.run_definitions where run_id = %s", run_id),
        lab.value("select generator from pgharness.run_combinations where run_id = %s", run_id),
        [
            environment
            for (environment,) in lab.rows(
                "select w.environment from pgharness.run_workers as rw"
                " join pgharness.workers as w on w.id = rw.worker_id where rw.run_id = %s",
                run_id,
            )
        ],
    )


def test_7_no_secret_is_stored_or_logged(lab: Any, stub: Any) -> None:
    """Every provider, with vendors that quote the key in errors, in answers and in what they call a request."""
    providers = ("openai", "openai_responses", "anthropic", "gemini", "openai_compatible")
    (lab.folder / "leaky.py").write_text(
        "import os\ndef write(item, **_):\n    raise ValueError('the key is ' + os.environ['RECOGNISABLE_API_KEY'])\n"
    )
    for provider in providers:
        columns = {"model": "m", "base_url": stub.base_url(provider), "api_key_env": "RECOGNISABLE_API_KEY"}
        lab.model(provider, provider, timeout_seconds=2, **columns)
        lab.instance(provider, cases=6, generator=provider, grader=provider, max_attempts=2, failure_threshold=1)
    lab.model("leaky", "python", model="leaky:write", api_key_env="RECOGNISABLE_API_KEY")
    lab.instance("leaky", cases=1, generator="leaky", max_attempts=1, failure_threshold=1)
    scenes = ("success", "echo_key", "answer_key", "server_error", "truncated_json", "content_filter", "not_json")
    stub.play(*(scene for scene in scenes for _ in range(8)))
    path = f"{lab.environment()['PYTHONPATH']}:{lab.folder}"
    arguments = ["--log-level", "debug", "--allow-code", "--exit-when-idle"]
    for provider in (*providers, "leaky"):
        lab.start(provider)
    group = lab.workers(1, arguments=arguments, waits=False, PYTHONPATH=path, RECOGNISABLE_API_KEY=KEY)
    lab.wait(lambda: lab.value("select bool_and(finished_at is not null) from pgharness.runs"), "end of runs", 60)
    assert group.wait() == 0
    assert {request.key for request in stub.requests} == {KEY} and stub.problems == []
    assert {request.provider for request in stub.requests} == set(providers)
    dump = dumped(lab)
    assert "[redacted]" in dump and "RECOGNISABLE_API_KEY" in dump
    assert KEY not in dump
    assert KEY not in group.text() and "DEBUG" in group.text()


def dumped(lab: Any) -> str:
    """Return all that a database holds, as pg_dump writes it, or else as plain rows."""
    try:
        bindir, _ = find_bindir(lab.db.info.server_version // 10_000)
    except EmbeddedError:
        tables = lab.rows(
            "select format('%%I.%%I', schemaname, tablename) from pg_tables"
            " where schemaname in ('pgharness', 'procrastinate')"
        )
        return "\n".join(row for (name,) in tables for (row,) in lab.rows(f"select t::text from {name} as t"))
    command = [Path(bindir, "pg_dump"), "--dbname", lab.url]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=lab.environment()).stdout
