"""The life of a run: what it plans and freezes, who may move it where, and that money, failures and accidents stop it rightly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pgharness import schema
from world import (
    Row,
    add_cases,
    add_instance,
    call,
    contents,
    failure,
    grade,
    jobs,
    load,
    lost,
    note,
    ordinals,
    orphans,
    record,
    refused,
    register,
    rows,
    run_of,
    start,
    take,
    value,
    work_off,
)

Database = Connection[Any]


def statuses(db: Database, run: int) -> tuple[str, str | None]:
    row = run_of(db, run)
    return row["status"], row["reason"]


def receipt(db: Database, query: str, *values: object) -> Row:
    return rows(db, f"select * from {query}", *values)[0]


def definition(db: Database, run: int) -> dict[str, Any]:
    """Everything that is frozen in a run, without what names the run itself."""
    frozen: dict[str, Any] = value(db, "select pgharness.load_run(%s)", run)
    for key in ("run_id", "run"):
        del frozen[key]
    tables = {
        "cases": "select number, case_id, digest from pgharness.run_cases where run_id = %s order by 1",
        "rubrics": "select case_number, number, rubric_id from pgharness.run_rubrics where run_id = %s order by 1, 2",
        "shape": "select case_count, combination_count, transcript_overlaps, grade_stride from pgharness.run_definitions where run_id = %s",
    }
    return frozen | {name: rows(db, query, run) for name, query in tables.items()}


# -- the plan


def test_198_cases_by_5_notes_and_2_rubrics_by_2_grades_are_990_notes_and_3960_grades(tx: Database) -> None:
    add_instance(tx, cases=198, note_replications=5, grade_replications=2)
    answer = receipt(tx, "pgharness.start_run('trial')")
    assert (answer["status"], answer["notes"], answer["grades"]) == ("running", 990, 3960)
    assert sorted(o for job in jobs(tx) for o in ordinals(job)) == list(range(990))
    assert orphans(tx) == []


@pytest.mark.parametrize(
    ("columns", "combinations", "notes", "grades"),
    [
        ({}, [("simulator", None)], 3, 0),
        ({"grade_replications": 4}, [("simulator", "exact_match")], 3, 3),
        ({"grade_replications": 4, "rubrics_per_case": 0}, [("simulator", "simulator")], 3, 12),
        ({"grade_replications": 4, "rubrics_per_case": 1}, [("simulator", "simulator")], 3, 12),
        (
            {"grade_replications": 2},
            [("simulator", "simulator"), ("simulator", None), ("simulator", "contains")],
            9,
            15,
        ),
        ({"cycle_transcript_overlaps": [0, 50, 100], "note_replications": 2}, [("simulator", "simulator")], 18, 36),
        ({"cycle_times": [30, 60], "note_replications": 2}, [("simulator", "simulator")], 6, 12),
    ],
)
def test_a_plan_is_cases_times_combinations_times_overlaps_times_replications(
    tx: Database, columns: dict[str, Any], combinations: list[tuple[str, str | None]], notes: int, grades: int
) -> None:
    add_instance(tx, cases=3, combinations=combinations, **columns)
    answer = receipt(tx, "pgharness.start_run('trial')")
    assert (answer["notes"], answer["grades"]) == (notes, grades)
    assert work_off(tx, register(tx)) == notes + grades
    assert statuses(tx, answer["run_id"]) == ("completed", None)
    assert orphans(tx) == []


def test_a_run_grades_with_the_latest_accepted_rubric_of_each_of_two_people_newest_first(tx: Database) -> None:
    tx.execute("insert into pgharness.cases (name, input) values ('c', '1')")
    add = "insert into pgharness.rubrics (case_name, author, criteria, validation, validated_at, generator) values ('c', %s, %s, %s, %s, %s) returning id"
    ids = {
        comment: value(tx, add, author, '[{"criterion": "x", "weight": 1}]', validation, at, generator)
        for comment, author, validation, at, generator in [
            ("ann's first", "ann", "accepted", "2026-01-01", None),
            ("ann's second", "ann", "accepted", "2026-01-05", None),
            ("ann's refused", "ann", "refused", "2026-01-09", None),
            ("ann's unseen", "ann", "not_evaluated", None, None),
            ("bob's", "bob", "accepted", "2026-01-06", None),
            ("cat's", "cat", "accepted", "2026-01-02", None),
            ("llm's", "llm", "accepted", "2026-02-01", None),
            ("a model's", "gpt", "accepted", "2026-02-01", "simulator"),
            ("dan's refused", "dan", "refused", "2026-02-01", None),
        ]
    }
    add_instance(tx, cases=0)
    tx.execute("select pgharness.add_cases('trial')")

    def chosen(run: int) -> list[str]:
        by_id = {id_: comment for comment, id_ in ids.items()}
        return [
            by_id[row["rubric_id"]]
            for row in rows(tx, "select rubric_id from pgharness.run_rubrics where run_id = %s order by number", run)
        ]

    assert chosen(start(tx)) == ["bob's", "ann's second"]
    tx.execute("update pgharness.instances set rubrics_per_case = 3")
    assert chosen(start(tx)) == ["bob's", "ann's second", "cat's"]
    tx.execute("update pgharness.rubrics set validation = 'refused' where id = %s", (ids["ann's second"],))
    tx.execute("update pgharness.instances set rubrics_per_case = 2")
    later = start(tx)
    assert chosen(later) == ["bob's", "cat's"]
    tx.execute("update pgharness.rubrics set validation = 'refused'")
    assert chosen(later) == ["bob's", "cat's"]


def test_a_run_that_lacks_something_is_refused_naming_it(tx: Database) -> None:
    add_instance(tx, "empty", cases=0)
    with refused(
        tx, "PH003", 'instance "empty" has no cases', "select pgharness.add_cases('empty', eligible => true);"
    ):
        start(tx, "empty")
    add_instance(tx, "alone", combinations=[])
    with refused(tx, "PH003", 'instance "alone" has no model combinations', "insert into pgharness.model_combinations"):
        start(tx, "alone")
    add_instance(tx, cases=3)
    tx.execute("delete from pgharness.rubrics where case_name = 'trial-2' and author = 'bob'")
    with refused(
        tx,
        "PH003",
        '1 of the cases of instance "trial" lack accepted rubrics by 2 different',
        "For example: trial-2",
        "rubrics_per_case",
    ):
        start(tx)
    add_instance(tx, "targets", combinations=[("simulator", "exact_match")])
    tx.execute("update pgharness.cases set target = null where name = 'targets-1'")
    with refused(
        tx,
        "PH003",
        '1 of the cases of instance "targets" have no target',
        "For example: targets-1",
        "update pgharness.cases set target",
    ):
        start(tx, "targets")
    tx.execute(
        """update pgharness.model_combinations set grader = 'regex', grader_parameters = '{"pattern": "x"}' where instance = 'targets'"""
    )
    assert start(tx, "targets")
    with refused(
        tx, "PH001", 'instance "nope" does not exist', "targets, trial, alone, empty", "insert into pgharness.instances"
    ):
        start(tx, "nope")
    assert value(tx, "select count(*) from pgharness.runs") == 1
    assert orphans(tx) == []


def test_a_run_freezes_what_its_instance_says_at_the_start(tx: Database) -> None:
    tx.execute(
        """insert into pgharness.models (name, provider, model, parameters, is_reasoning, input_usd_per_million)
           values ('m', 'openai', 'gpt', '{"temperature": 0.2, "top_p": 0.9}', true, 2.5)"""
    )
    add_instance(
        tx,
        cases=3,
        combinations=[],
        seed=42,
        note_prompt="Mine: {{ case_text }}",
        config='{"depth": 1}',
        cycle_times=[30],
        software_version="abc",
    )
    tx.execute(
        """insert into pgharness.model_combinations (instance, generator, generator_parameters, generator_is_reasoning, grader, grader_parameters)
           values ('trial', 'm', '{"temperature": 1}', false, 'm', '{"max_tokens": 9}')"""
    )
    frozen = definition(tx, start(tx))
    assert (frozen["seed"], frozen["config"], frozen["cycle_times"], frozen["software_version"]) == (
        42,
        {"depth": 1},
        [30],
        "abc",
    )
    assert frozen["prompts"]["note"] == "Mine: {{ case_text }}"
    assert frozen["prompts"]["note_system"] == value(
        tx, "select note_system_prompt from pgharness.experiments where name = 'note_grade'"
    )
    generator, grader = frozen["combinations"][0]["generator"], frozen["combinations"][0]["grader"]
    assert (generator["parameters"], generator["is_reasoning"]) == ({"temperature": 1, "top_p": 0.9}, False)
    assert (grader["parameters"], grader["is_reasoning"]) == ({"temperature": 0.2, "top_p": 0.9, "max_tokens": 9}, True)
    assert grader["input_usd_per_million"] == 2.5
    expected = (
        "select encode(sha256(convert_to(string_agg(digest, E'\\n' order by id), 'UTF8')), 'hex') from pgharness.cases"
    )
    assert frozen["cases_digest"] == value(tx, expected)


# -- starting


def test_inserting_a_run_by_name_or_id_is_starting_it(tx: Database) -> None:
    add_instance(tx, note_replications=2, budget_usd=9)
    started = start(tx, kind="milestone", priority=3)
    instance_id = value(tx, "select id from pgharness.instances")
    kept = "status, kind, priority, epoch, note_count, grade_count, budget_usd, instance, created_by"
    expected = rows(tx, f"select {kept} from pgharness.runs")
    expected_jobs = [{**job["args"], "run_id": None, "priority": job["priority"]} for job in jobs(tx)]
    frozen = definition(tx, started)
    for columns in ({"instance": "trial"}, {"instance_id": instance_id}, {"instance": str(instance_id)}):
        with tx.transaction(force_rollback=True):
            tx.execute("delete from procrastinate.procrastinate_jobs")
            fields = {"kind": "milestone", "priority": 3} | columns
            marks = ", ".join(["%s"] * len(fields))
            query = f"insert into pgharness.runs ({', '.join(fields)}) values ({marks}) returning id"
            inserted = value(tx, query, *fields.values())
            assert rows(tx, f"select {kept} from pgharness.runs where id = %s", inserted) == expected
            assert [{**job["args"], "run_id": None, "priority": job["priority"]} for job in jobs(tx)] == expected_jobs
            assert definition(tx, inserted) == frozen


def test_rolling_a_start_back_leaves_no_row_and_no_job(url: str) -> None:
    with psycopg.connect(url) as db:
        add_instance(db)
        db.commit()
        before = contents(db)
        start(db)
        assert contents(db) != before
        db.rollback()
        assert contents(db) == before
        with refused(db, "PH003"):
            db.execute("delete from pgharness.model_combinations")
            start(db)
        db.commit()
        assert contents(db) == before
        assert orphans(db) == []


def test_runs_of_an_instance_are_numbered_whatever_it_is_or_was_called(tx: Database) -> None:
    for name in ("trial", "50%_\\", "a/1", "ünï/ 'x'"):
        add_instance(tx, name, cases=1)
        assert [run_of(tx, start(tx, name))["name"] for _ in range(3)] == [f"{name}/{n}" for n in (1, 2, 3)]
    assert run_of(tx, start(tx, "trial", name="mine"))["name"] == "mine"
    assert run_of(tx, start(tx, "trial", name="trial/7"))["name"] == "trial/7"
    assert run_of(tx, start(tx, "trial"))["name"] == "trial/8"
    with refused(tx, "23505", "runs_name_key", "mine"):
        start(tx, "trial", name="mine")
    tx.execute("update pgharness.instances set name = 'old' where name = 'trial'")
    add_instance(tx, "trial", cases=0)
    add_cases(tx, 1, prefix="another")
    tx.execute("select pgharness.add_cases('trial', names => '{another-1}')")
    assert run_of(tx, start(tx, "trial"))["name"] == "trial/9"
    assert run_of(tx, start(tx, "old"))["name"] == "old/1"


def test_a_second_start_with_the_same_key_returns_the_first_run(tx: Database) -> None:
    add_instance(tx)
    add_instance(tx, "other")
    first = start(tx, idempotency_key="k")
    queued = jobs(tx)
    assert start(tx, idempotency_key="k") == start(tx, idempotency_key="k", budget_usd=5) == first
    assert jobs(tx) == queued
    for arguments in ({"instance": "other"}, {"kind": "milestone"}):
        with refused(tx, "PH004", 'idempotency key "k" already started run "trial/1" (trial)', "another key"):
            start(tx, **{"instance": "trial", "idempotency_key": "k"} | arguments)
    with refused(tx, "PH004", 'idempotency key "k" already started run "trial/1"'):
        value(tx, "select run_id from pgharness.rerun(%s, idempotency_key => 'k')", first)
    again = value(tx, "select run_id from pgharness.rerun(%s, idempotency_key => 'r')", first)
    assert value(tx, "select run_id from pgharness.rerun(%s, idempotency_key => 'r')", first) == again != first
    for statement in (
        "pgharness.start_run('trial', idempotency_key => 'r')",
        f"pgharness.rerun({again}, idempotency_key => 'r')",
    ):
        with refused(tx, "PH004", 'idempotency key "r" already started run "trial/2"'):
            value(tx, f"select run_id from {statement}")
    assert value(tx, "select count(*) from pgharness.runs") == 2


def test_starts_with_one_key_at_the_same_time_make_one_run(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        add_instance(db)
        barrier = threading.Barrier(4)

        def begin(key: str | None) -> int:
            with psycopg.connect(url, autocommit=True) as mine:
                barrier.wait(10)
                return start(mine, idempotency_key=key)

        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(begin, ["k"] * 4))) == 1
            assert len(set(pool.map(begin, [None] * 4))) == 4
        assert (
            value(db, "select string_agg(name, ' ' order by name) from pgharness.runs")
            == "trial/1 trial/2 trial/3 trial/4 trial/5"
        )
        assert orphans(db) == []


# -- states


def into(db: Database, state: str) -> int:
    """Make a run of two notes with a grade each, and bring it into a state."""
    add_instance(db, cases=2, rubrics_per_case=1)
    run, worker = start(db), register(db)
    match state:
        case "paused" | "cancelled":
            db.execute(f"select pgharness.{state.removesuffix('d').removesuffix('le')}_run(%s)".encode(), (run,))
        case "completed":
            work_off(db, worker)
        case "failed":
            record(db, worker, note(run, 0), lost(run, "note", 1))
    assert run_of(db, run)["status"] == state
    return run


TRANSITIONS = {
    ("running", "pause_run"): "paused",
    ("running", "resume_run"): "running",
    ("running", "cancel_run"): "cancelled",
    ("running", "retry_failed"): "running",
    ("running", "requeue_run"): "running",
    ("paused", "pause_run"): "paused",
    ("paused", "resume_run"): "running",
    ("paused", "cancel_run"): "cancelled",
    ("paused", "retry_failed"): "paused",
    ("paused", "requeue_run"): "run {run} is paused",
    ("cancelled", "pause_run"): "run {run} is already cancelled",
    ("cancelled", "resume_run"): "running",
    ("cancelled", "cancel_run"): "cancelled",
    ("cancelled", "retry_failed"): "run {run} is cancelled",
    ("cancelled", "requeue_run"): "run {run} is cancelled",
    ("completed", "pause_run"): "run {run} is already completed",
    ("completed", "resume_run"): "run {run} is already completed",
    ("completed", "cancel_run"): "run {run} is already completed",
    ("completed", "retry_failed"): "completed",
    ("completed", "requeue_run"): "run {run} is completed",
    ("failed", "pause_run"): "run {run} is already failed",
    ("failed", "resume_run"): "run {run} is already failed",
    ("failed", "cancel_run"): "run {run} is already failed",
    ("failed", "retry_failed"): "running",
    ("failed", "requeue_run"): "run {run} is failed",
}


@pytest.mark.parametrize(("state", "action"), TRANSITIONS, ids=lambda part: str(part))
def test_a_run_moves_only_along_its_lifecycle_by_number_and_by_name(tx: Database, state: str, action: str) -> None:
    run = into(tx, state)
    name = run_of(tx, run)["name"]
    expected = TRANSITIONS[state, action]
    for argument in (run, name):
        with tx.transaction(force_rollback=True):
            if " " in expected:
                with refused(tx, "PH003", expected.format(run=run)):
                    tx.execute(f"select pgharness.{action}(%s)".encode(), (argument,))
            else:
                answers = [receipt(tx, f"pgharness.{action}(%s)", argument) for _ in range(2)]
                assert [(a["run_id"], a["run"], a["status"]) for a in answers] == [(run, name, expected)] * 2
                assert run_of(tx, run)["status"] == expected
            assert orphans(tx) == []


@pytest.mark.parametrize("action", ["pause_run", "resume_run", "cancel_run", "retry_failed", "requeue_run", "rerun"])
def test_a_run_that_does_not_exist_is_refused_with_where_to_look(tx: Database, action: str) -> None:
    into(tx, "running")
    for argument, text in (
        ("987654321::bigint", "987654321"),
        ("'nope'", 'run "nope" does not exist'),
        ("null::text", "run is missing"),
    ):
        with refused(tx, "PH001 PH002", text, "pgharness.run"):
            tx.execute(f"select pgharness.{action}({argument})".encode())


def test_a_run_is_named_by_number_even_when_another_has_that_number_for_a_name(tx: Database) -> None:
    add_instance(tx, cases=1)
    run = start(tx)
    other = start(tx, name=str(run))
    again = value(tx, "select run_id from pgharness.rerun(%s::bigint)", run)
    assert run_of(tx, again)["rerun_of_id"] == run
    tx.execute(f"select pgharness.cancel_run({run}); select pgharness.pause_run('{run}')".encode())
    assert (statuses(tx, run)[0], statuses(tx, other)[0]) == ("cancelled", "paused")


def test_pausing_drops_what_waits_and_resuming_queues_what_is_missing(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1)
    run, worker = start(tx), register(tx)
    taken = take(tx, worker)
    assert taken is not None
    record(tx, worker, note(run, 0))
    tx.execute("select pgharness.pause_run(%s, 'lunch')", (run,))
    assert statuses(tx, run) == ("paused", "lunch")
    assert jobs(tx) == []
    assert load(tx, worker, taken["args"]) == []
    record(tx, worker, note(run, 1), grade(run, 0))
    assert jobs(tx) == []
    assert orphans(tx) == []
    assert receipt(tx, "pgharness.resume_run(%s)", run)["status"] == "running"
    assert load(tx, worker, taken["args"]) == [], "a slice of before the pause does nothing"
    assert orphans(tx) == []
    assert work_off(tx, worker) == 2 + 3
    assert statuses(tx, run) == ("completed", None)


def test_a_paused_run_whose_last_calls_end_well_is_completed(tx: Database) -> None:
    run = into(tx, "paused")
    record(tx, register(tx), note(run, 0), note(run, 1), grade(run, 0), grade(run, 1))
    assert statuses(tx, run) == ("completed", None)
    assert orphans(tx) == []


def test_pauses_do_not_count_as_time_spent_running(tx: Database) -> None:
    tx.execute("set local pgharness.fake_now = '2026-01-01 12:00+00'")
    add_instance(tx)
    run = start(tx)
    for minute, action in ((10, "pause_run"), (40, "resume_run"), (45, "cancel_run")):
        tx.execute(f"set local pgharness.fake_now = '2026-01-01 12:{minute}+00'".encode())
        tx.execute(f"select pgharness.{action}(%s)".encode(), (run,))
    row = run_of(tx, run)
    assert (row["active_seconds"], row["activated_at"], row["finished_at"].isoformat()) == (
        15 * 60,
        None,
        "2026-01-01T12:45:00+00:00",
    )


def test_a_run_of_higher_priority_goes_first_and_grades_before_notes(tx: Database) -> None:
    add_instance(tx, cases=1, rubrics_per_case=1)
    worker = register(tx)
    runs = [start(tx, priority=priority) for priority in (0, 5, -5)]
    record(tx, worker, note(runs[0], 0))
    order = []
    while job := take(tx, worker):
        order.append((job["args"]["run_id"], job["args"]["kind"]))
    assert order == [(runs[1], "note"), (runs[0], "grade"), (runs[0], "note"), (runs[2], "note")]


# -- money


def test_a_run_pauses_at_its_budget_and_goes_on_with_a_larger_one(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1, budget_usd=100)
    run, worker = start(tx, budget_usd=Decimal("1.5")), register(tx)
    record(tx, worker, note(run, 0), note(run, 1))
    assert statuses(tx, run) == ("running", None)
    record(tx, worker, note(run, 2, calls=[call(0.3), call(0.25)]))
    status, reason = statuses(tx, run)
    assert status == "paused"
    assert (
        reason is not None
        and "budget of 1.5 USD is spent (1.5500 USD)" in reason
        and f"select pgharness.resume_run({run}, budget_usd => 3" in reason
    )
    assert jobs(tx) == []
    for argument in ("", ", budget_usd => 1.55", ", budget_usd => 0", ", budget_usd => -1"):
        with refused(
            tx,
            "PH006",
            f"run {run} has spent 1.5500 USD of its budget of ",
            f"select pgharness.resume_run({run}, budget_usd => 4.1",
        ):
            tx.execute(f"select pgharness.resume_run({run}{argument})".encode())
    assert receipt(tx, "pgharness.resume_run(%s, budget_usd => 50)", run)["status"] == "running"
    assert work_off(tx, worker) == 1 + 4
    row = run_of(tx, run)
    assert (row["status"], row["budget_usd"], row["note_cost_usd"], row["grade_cost_usd"]) == (
        "completed",
        50,
        Decimal("2.05"),
        1,
    )
    assert orphans(tx) == []


def test_a_run_takes_its_instances_budget_and_one_that_is_done_does_not_pause(tx: Database) -> None:
    add_instance(tx, cases=1, rubrics_per_case=1, budget_usd=0.5)
    run = start(tx)
    assert run_of(tx, run)["budget_usd"] == Decimal("0.5")
    worker = register(tx)
    record(tx, worker, note(run, 0, calls=[call(0.4)]))
    record(tx, worker, grade(run, 0))
    assert statuses(tx, run) == ("completed", None)
    with refused(tx, "PH002", "budget_usd of a run cannot be"):
        start(tx, budget_usd=0)


def test_late_calls_of_a_cancelled_run_are_paid_for_and_change_nothing_else(tx: Database) -> None:
    run = into(tx, "cancelled")
    record(
        tx,
        register(tx),
        note(run, 0),
        lost(run, "note", 1),
        {**note(run, 1), "result": "cancelled", "calls": [call(0.1, outcome="cancelled")]},
    )
    row = run_of(tx, run)
    assert (row["note_cost_usd"], row["notes_succeeded"], row["notes_failed"]) == (Decimal("0.6"), 0, 0)
    assert value(tx, "select count(*) from pgharness.calls") == 3
    assert (
        value(tx, "select count(*) from pgharness.notes") == value(tx, "select count(*) from pgharness.failures") == 0
    )
    assert orphans(tx) == []


# -- failures


@pytest.mark.parametrize(
    ("threshold", "failing", "expected"),
    [
        (0, 0, "completed"),
        (0, 1, "failed"),
        (0.2, 1, "completed"),
        (0.2, 2, "completed"),
        (0.2, 3, "failed"),
        (0.9, 10, "failed"),
        (1, 10, "completed"),
    ],
)
def test_a_run_fails_when_more_than_its_share_fails(
    tx: Database, threshold: float, failing: int, expected: str
) -> None:
    add_instance(tx, cases=10, rubrics_per_case=1, failure_threshold=threshold, grade_replications=4)
    run, worker = start(tx), register(tx)
    for ordinal in range(failing):
        record(tx, worker, lost(run, "note", ordinal))
        assert orphans(tx) == []
    work_off(tx, worker)
    assert statuses(tx, run)[0] == expected
    if expected == "failed":
        assert f"of {10 + 40}" in (statuses(tx, run)[1] or "")
    assert orphans(tx) == []


def test_failed_grades_count_as_much_as_planned_ones(tx: Database) -> None:
    add_instance(tx, cases=5, rubrics_per_case=1, failure_threshold=0.1)
    run, worker = start(tx), register(tx)
    record(tx, worker, *[note(run, n) for n in range(5)], lost(run, "grade", 0))
    assert statuses(tx, run)[0] == "running"
    record(tx, worker, lost(run, "grade", 1))
    assert statuses(tx, run) == (
        "failed",
        "0 notes and 2 grades failed (0 grades of failed notes are skipped), more than 10.00% of 10",
    )
    assert jobs(tx) == []


@pytest.mark.parametrize("state", ["running", "paused", "completed", "failed"])
def test_what_failed_is_tried_again_with_all_its_attempts(tx: Database, state: str) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1, failure_threshold=0.25 if state == "failed" else 1)
    run, worker = start(tx), register(tx)
    record(tx, worker, note(run, 0), lost(run, "note", 1), failure(run, "note", 2))
    record(tx, worker, lost(run, "grade", 0))
    if state == "paused":
        tx.execute("select pgharness.pause_run(%s)", (run,))
    if state == "completed":
        record(tx, worker, note(run, 2), note(run, 3), grade(run, 2), grade(run, 3))
    assert statuses(tx, run)[0] == state
    answer = receipt(tx, "pgharness.retry_failed(%s)", run)
    assert (answer["status"], answer["reason"] is None) == (
        ("paused", False) if state == "paused" else ("running", True)
    )
    assert value(tx, "select count(*) from pgharness.failures where status = 'failed'") == 0
    assert orphans(tx) == []
    if state == "paused":
        tx.execute("select pgharness.resume_run(%s)", (run,))
        assert orphans(tx) == []
    for attempt in (1, 2):
        record(tx, worker, failure(run, "note", 1))
        assert rows(tx, "select status, attempts from pgharness.failures where ordinal = 1") == [
            {"status": "waiting", "attempts": attempt}
        ]
    record(tx, worker, note(run, 1))
    if state == "running":
        record(tx, worker, note(run, 2))  # it waits on: only what had failed was queued again
    work_off(tx, worker)
    assert (statuses(tx, run), run_of(tx, run)["grades_succeeded"]) == (("completed", None), 4)
    assert orphans(tx) == []


def test_retrying_when_nothing_failed_moves_nothing(tx: Database) -> None:
    run = into(tx, "running")
    before = contents(tx)
    assert receipt(tx, "pgharness.retry_failed(%s)", run)["status"] == "running"
    assert contents(tx) == before


def test_retrying_past_the_budget_pauses_again(tx: Database) -> None:
    add_instance(tx, cases=2, rubrics_per_case=1, budget_usd=0.4, failure_threshold=1)
    run, worker = start(tx), register(tx)
    tx.execute("select pgharness.resume_run(%s, budget_usd => 5)", (run,))
    record(tx, worker, note(run, 0), lost(run, "note", 1), grade(run, 0))
    assert statuses(tx, run)[0] == "completed"
    tx.execute("update pgharness.runs set budget_usd = 0.5")
    answer = receipt(tx, "pgharness.retry_failed(%s)", run)
    assert answer["status"] == "paused" and "budget" in answer["reason"]
    assert orphans(tx) == []


# -- again


def test_a_failed_run_goes_on_without_what_failed_when_more_may_fail(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1, failure_threshold=0.25)
    run, worker = start(tx), register(tx)
    record(tx, worker, note(run, 0), lost(run, "note", 1), lost(run, "grade", 0))
    assert statuses(tx, run)[0] == "failed"
    for argument in ("", ", failure_threshold => 0.3"):
        with refused(
            tx, "PH003", f"run {run} is already failed", f"pgharness.retry_failed({run})", "failure_threshold => 1"
        ):
            tx.execute(f"select pgharness.resume_run({run}{argument})".encode())
    with refused(tx, "PH002", "failure_threshold of a run cannot be"):
        tx.execute(f"select pgharness.resume_run({run}, failure_threshold => 7)".encode())
    assert receipt(tx, "pgharness.resume_run('trial/1', failure_threshold => 0.5)")["status"] == "running"
    assert orphans(tx) == []
    work_off(tx, worker)
    row = run_of(tx, run)
    assert (row["status"], row["notes_failed"], row["grades_failed"], row["failure_threshold"]) == (
        "completed",
        1,
        1,
        0.5,
    )
    assert orphans(tx) == []
    again = value(tx, "select run_id from pgharness.rerun(%s)", run)
    assert run_of(tx, again)["failure_threshold"] == 0.25, "as it was defined"


def test_what_failed_is_tried_again_beside_what_is_in_flight(tx: Database) -> None:
    add_instance(tx, cases=4, rubrics_per_case=1, failure_threshold=1)
    run, worker = start(tx), register(tx)
    record(tx, worker, lost(run, "note", 1))
    taken = take(tx, worker)
    assert taken is not None
    tx.execute("select pgharness.retry_failed(%s)", (run,))
    assert len(load(tx, worker, taken["args"])) == 1
    assert [ordinals(job) for job in jobs(tx)].count([1]) == 2, "its old job and its new one"
    assert orphans(tx) == []


def test_a_rerun_repeats_a_run_whatever_its_instance_says_now(tx: Database) -> None:
    add_instance(
        tx, cases=3, note_replications=2, combinations=[("simulator", "simulator"), ("simulator", "exact_match")]
    )
    first = start(tx, kind="milestone")
    frozen = definition(tx, first)
    tx.execute("update pgharness.instances set failure_threshold = 1")
    tx.execute(
        "update pgharness.instances set note_replications = 9, seed = 7, note_prompt = 'x', rubrics_per_case = 1, name = 'renamed'"
    )
    tx.execute(
        """update pgharness.models set parameters = '{"latency_seconds": 1}', name = 'm' where name = 'simulator'"""
    )
    tx.execute(
        "delete from pgharness.instance_cases where case_name = 'trial-1'; delete from pgharness.model_combinations where grader = 'exact_match'"
    )
    tx.execute(
        "update pgharness.rubrics set validation = 'refused'; update pgharness.experiments set note_prompt = 'y'"
    )
    again = value(tx, "select run_id from pgharness.rerun(%s)", first)
    third = value(
        tx,
        "select run_id from pgharness.rerun((select name from pgharness.runs where id = %s), kind => 'trial')",
        again,
    )
    inserted = value(tx, "insert into pgharness.runs (rerun_of_id) values (%s) returning id", first)
    for run, kind, source in ((again, "milestone", first), (third, "trial", again), (inserted, "trial", first)):
        row = run_of(tx, run)
        assert (row["kind"], row["rerun_of_id"], row["instance"], row["note_count"], row["grade_count"]) == (
            kind,
            source,
            "renamed",
            12,
            18,
        )
        repeated = definition(tx, run)
        for combination in frozen["combinations"] + repeated["combinations"]:
            combination.pop("combination_id", None)
        assert repeated == frozen
    assert orphans(tx) == []


def test_losing_the_whole_queue_loses_nothing_and_one_call_puts_the_work_back(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        add_instance(db, cases=4, rubrics_per_case=1, failure_threshold=1)
        run, idle = start(db), start(db)
        db.execute("select pgharness.pause_run(%s)", (idle,))
        worker = register(db)
        record(db, worker, note(run, 0), lost(run, "note", 1), failure(run, "note", 2))
        record(db, worker, grade(run, 0))
        db.execute("drop schema procrastinate cascade")
        record(db, worker, note(run, 3))
        assert value(db, "select pgharness.sweep()") == 0
        beat = "select run_id, status, epoch from pgharness.heartbeat(%s, '{}', 'running', %s, '{}')"
        assert rows(db, beat, worker, [run]) == [{"run_id": run, "status": "running", "epoch": 0}]
        assert orphans(db) == []
        schema.upgrade(db)
        assert receipt(db, "pgharness.requeue_run(%s)", run)["status"] == "running"
        assert (
            receipt(db, "pgharness.requeue_run((select name from pgharness.runs where id = %s))", run)["status"]
            == "running"
        )
        assert orphans(db) == []
        db.execute("select pgharness.resume_run(%s)", (idle,))
        with refused(db, "PH004", "the queue knows another worker under id 1", "Register with the queue again."):
            register(db, pid=2)
        work_off(db, register(db, pid=2))
        row = run_of(db, run)
        assert (row["status"], row["notes_succeeded"], row["notes_failed"], row["grades_succeeded"]) == (
            "completed",
            3,
            1,
            3,
        )
        assert run_of(db, idle)["status"] == "completed"
        assert orphans(db) == []


def test_an_action_without_a_queue_still_keeps_the_rows_right(tx: Database) -> None:
    add_instance(tx, cases=2, rubrics_per_case=1)
    tx.execute("drop schema procrastinate cascade")
    run = start(tx)
    for action in ("pause_run", "resume_run", "cancel_run", "resume_run", "requeue_run", "retry_failed"):
        tx.execute(f"select pgharness.{action}(%s)".encode(), (run,))
        assert orphans(tx) == []


# -- announcements


def test_every_change_of_state_is_announced_once_and_logged(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db, psycopg.connect(url, autocommit=True) as listener:
        listener.execute("listen pgharness")

        def heard() -> list[tuple[str, str, str | None, str | None]]:
            listener.execute("select 1")
            payloads = [json.loads(n.payload) for n in listener.notifies(timeout=0)]
            assert all(
                set(p) == {"event", "run_id", "run", "status", "previous_status", "reason", "at"} for p in payloads
            )
            assert all((p["run_id"], p["run"]) == (run, "trial/1") for p in payloads)
            return [(p["event"], p["status"], p["previous_status"], p["reason"]) for p in payloads]

        add_instance(db, cases=2, rubrics_per_case=1, failure_threshold=0)
        run, worker = start(db), register(db)
        assert heard() == [("run.started", "running", None, None)]
        steps: list[tuple[Callable[[], object], list[tuple[str, str, str | None, str | None]]]] = [
            (
                lambda: db.execute("select pgharness.pause_run(%s, %s)", (run, "r" * 900)),
                [("run.paused", "paused", "running", "r" * 500)],
            ),
            (lambda: db.execute("select pgharness.pause_run(%s)", (run,)), []),
            (
                lambda: db.execute("select pgharness.resume_run(%s)", (run,)),
                [("run.running", "running", "paused", None)],
            ),
            (lambda: db.execute("select pgharness.resume_run(%s, budget_usd => 9)", (run,)), []),
            (lambda: db.execute("select pgharness.requeue_run(%s)", (run,)), []),
            (lambda: record(db, worker, note(run, 0)), []),
            (
                lambda: db.execute("select pgharness.cancel_run(%s)", (run,)),
                [("run.cancelled", "cancelled", "running", "cancelled by hand")],
            ),
            (
                lambda: db.execute("select pgharness.resume_run(%s)", (run,)),
                [("run.running", "running", "cancelled", None)],
            ),
            (
                lambda: record(db, worker, lost(run, "note", 1)),
                [
                    (
                        "run.failed",
                        "failed",
                        "running",
                        "1 notes and 0 grades failed (1 grades of failed notes are skipped), more than 0.00% of 4",
                    )
                ],
            ),
            (
                lambda: db.execute("select pgharness.retry_failed(%s)", (run,)),
                [("run.running", "running", "failed", None)],
            ),
            (lambda: work_off(db, worker), [("run.completed", "completed", "running", None)]),
            (lambda: record(db, worker, note(run, 0)), []),
        ]
        for step, expected in steps:
            step()
            assert heard() == expected
        logged = [
            row["message"].split(":")[0]
            for row in rows(db, "select message from pgharness.logs where run_id = %s order by id", run)
        ]
        assert logged == ["started", "paused", "running", "cancelled", "running", "failed", "running", "completed"]


def test_a_start_with_the_longest_of_names_can_be_announced(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        add_instance(db)
        run = start(db, name="x" * 20_000)
        db.execute("select pgharness.cancel_run(%s, %s)", (run, "\x01" * 20_000))
        assert statuses(db, run)[0] == "cancelled"


def test_results_and_log_lines_are_kept_with_their_run(tx: Database) -> None:
    run = into(tx, "completed")
    first = value(tx, "select pgharness.record_result(%s, 'best', '\"a\"')", run)
    assert value(tx, "select pgharness.record_result(%s, 'best', '\"b\"')", run) > first
    assert (
        value(tx, "select string_agg(value #>> '{}', ' ' order by id) from pgharness.results where key = 'best'")
        == "a b"
    )
    tx.execute(
        "select pgharness.log(%s, 'doubled the workers', data => '{\"by\": 2}'), pgharness.log(null, 'hello', 'debug')",
        (run,),
    )
    assert rows(tx, "select run_id, level, message, data from pgharness.logs order by id desc limit 2") == [
        {"run_id": None, "level": "debug", "message": "hello", "data": {}},
        {"run_id": run, "level": "info", "message": "doubled the workers", "data": {"by": 2}},
    ]
