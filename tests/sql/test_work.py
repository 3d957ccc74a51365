"""The work path without a worker process: what slices hold, what recording does, and how what died comes back."""

from __future__ import annotations

import json
from collections import Counter
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import Connection

from pgharness import schema
from world import (
    Row,
    add_cases,
    add_instance,
    call,
    contents,
    failure,
    finish,
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
    succeeded,
    take,
    value,
    work_off,
)

Database = Connection[Any]
EXAMPLES = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def at(db: Database, moment: str) -> None:
    """Make it that time of 2026-01-01 for the harness."""
    db.execute(f"set local pgharness.fake_now = '2026-01-01 {moment}+00'".encode())


def small(db: Database, **columns: Any) -> tuple[int, int]:
    """Start a run of four notes with one grade each; return it and a worker."""
    add_instance(db, cases=4, **{"rubrics_per_case": 1, "failure_threshold": 1, **columns})
    return start(db), register(db)


def failures(db: Database) -> list[Row]:
    return rows(
        db,
        "select kind, ordinal, status, attempts, delays, crashes, cause, error, answer from pgharness.failures order by kind, ordinal",
    )


def in_order(items: list[Row]) -> list[Row]:
    return sorted(items, key=lambda item: int(item["ordinal"]))


def lose(db: Database, worker: int) -> None:
    """Let a worker die, and let another notice."""
    db.execute("select pgharness.lose_worker(host, pid) from pgharness.workers where id = %s", (worker,))
    db.execute("select pgharness.sweep()")


# -- the plan is arithmetic


@EXAMPLES
@given(
    cases=st.integers(1, 9), combinations=st.integers(1, 5), overlaps=st.integers(1, 4), replications=st.integers(1, 7)
)
def test_an_ordinal_is_one_case_combination_overlap_and_replication(
    tx: Database, cases: int, combinations: int, overlaps: int, replications: int
) -> None:
    total = cases * combinations * overlaps * replications
    places = tx.execute(
        """select p.case_number, p.combination_number, p.overlap, p.replication from generate_series(0, %s - 1) as o
           cross join lateral pgharness._note_place(row(1, '{}', %s, %s, %s, 1)::pgharness.run_definitions, o) as p order by o""",
        (total, cases, combinations, [10 * n for n in range(overlaps)]),
    ).fetchall()
    expected = {
        (case, combination, 10 * overlap, replication + 1)
        for case in range(cases)
        for combination in range(combinations)
        for overlap in range(overlaps)
        for replication in range(replications)
    }
    assert len(places) == total and set(places) == expected
    for prefix in range(0, total, combinations):
        compared = Counter(place[1] for place in places[:prefix])
        assert len(set(compared.values())) <= 1, "a prefix of the plan treats combinations unequally"


def test_the_largest_ordinals_have_their_place(tx: Database) -> None:
    shape = "row(1, '{}', 1000000, 100, '{0,100}', 100000)::pgharness.run_definitions"
    last = 1_000_000 * 100 * 2 * 10_000 - 1
    assert tx.execute(f"select * from pgharness._note_place({shape}, {last})".encode()).fetchone() == (
        999_999,
        99,
        100,
        10_000,
    )


@EXAMPLES
@given(rubrics=st.integers(0, 6), replications=st.integers(0, 6))
def test_a_grades_place_is_one_rubric_and_replication(tx: Database, rubrics: int, replications: int) -> None:
    places = tx.execute(
        """with c as (select row(1, 0, 'c', null, 1, '{}', 2, '{}', %(rubrics)s, %(replications)s, greatest(%(rubrics)s, 1) * %(replications)s)
                             ::pgharness.run_combinations as c)
           select p.rubric_number, p.replication from c cross join lateral generate_series(0, (c.c).grades_per_note - 1) as k
            cross join lateral pgharness._grade_place(c.c, k) as p""",
        {"rubrics": rubrics, "replications": replications},
    ).fetchall()
    expected = {
        (rubric, replication + 1)
        for rubric in (range(1, rubrics + 1) if rubrics else (0,))
        for replication in range(replications)
    }
    assert len(places) == len(expected) and set(places) == expected


@settings(EXAMPLES, max_examples=12)
@given(data=st.data())
def test_a_run_of_any_shape_delivered_in_any_order_and_twice_ends_complete(tx: Database, data: st.DataObject) -> None:
    with tx.transaction(force_rollback=True):
        graders = data.draw(
            st.lists(st.sampled_from(["simulator", "exact_match", None]), min_size=1, max_size=3), label="graders"
        )
        add_instance(
            tx,
            cases=data.draw(st.integers(1, 4), label="cases"),
            note_replications=data.draw(st.integers(1, 3), label="notes"),
            grade_replications=data.draw(st.integers(1, 3), label="grades"),
            rubrics_per_case=data.draw(st.integers(0, 2), label="rubrics"),
            cycle_transcript_overlaps=data.draw(st.sampled_from([[100], [0, 50]]), label="overlaps"),
            combinations=[("simulator", grader) for grader in graders],
        )
        run, worker = start(tx), register(tx)
        done: list[Row] = []
        while queued := jobs(tx):
            job = data.draw(st.sampled_from(queued), label="job")
            tx.execute("update procrastinate.procrastinate_jobs set status = 'doing' where id = %s", (job["id"],))
            outcomes = succeeded(job["args"], load(tx, worker, job["args"]))
            if data.draw(st.booleans(), label="twice") and outcomes:
                again = data.draw(st.lists(st.sampled_from(done + outcomes), max_size=3), label="again")
                outcomes += [outcome | {"calls": []} for outcome in again]
            record(tx, worker, *outcomes)
            done += outcomes
            finish(tx, job)
        assert run_of(tx, run)["status"] == "completed"
        assert orphans(tx) == []


def test_a_small_run_has_slices_of_one_and_a_large_one_spreads_over_the_workers(tx: Database) -> None:
    size = "select pgharness._slice_size(%s)"
    assert [value(tx, size, n) for n in (0, 1, 64, 65, 640, 32_000, 500_000, 900_000, 9_000_000)] == [
        1,
        1,
        1,
        2,
        10,
        500,
        500,
        900,
        1000,
    ]
    for pid in range(17):
        register(tx, pid=pid)
    tx.execute("update pgharness.workers set status = 'lost' where pid = 0")
    assert [value(tx, size, n) for n in (64, 128, 129, 12_800)] == [1, 1, 2, 100]


# -- what a slice holds


def test_a_slice_says_what_each_item_is_made_from(tx: Database) -> None:
    add_instance(tx, cases=2, note_replications=2, grade_replications=2, cycle_transcript_overlaps=[50, 100])
    run, worker = start(tx), register(tx)
    case_ids = [row["case_id"] for row in rows(tx, "select case_id from pgharness.run_cases order by number")]
    notes = in_order(load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "first": 0, "last": 7}))
    assert [
        (
            n["ordinal"],
            n["case_id"],
            n["combination_number"],
            n["overlap"],
            n["replication"],
            n["note_ordinal"],
            n["tries"],
        )
        for n in notes
    ] == [
        (ordinal, case_ids[ordinal % 2], 0, overlap, replication, ordinal, 0)
        for ordinal, overlap, replication in zip(range(8), [50, 50, 100, 100] * 2, [1] * 4 + [2] * 4, strict=True)
    ]
    assert load(tx, worker, {"run_id": run, "kind": "grade", "epoch": 0, "first": 0, "last": 31}) == [], (
        "no note, no grade"
    )
    record(tx, worker, note(run, 5, output={"text": "n5"}))
    grades = in_order(load(tx, worker, {"run_id": run, "kind": "grade", "epoch": 0, "ordinals": [20, 21, 22, 23, 24]}))
    rubric_ids = [
        row["rubric_id"]
        for row in rows(tx, "select rubric_id from pgharness.run_rubrics where case_number = 1 order by number")
    ]
    assert [
        (g["ordinal"], g["case_id"], g["note_ordinal"], g["rubric_id"], g["replication"], g["overlap"]) for g in grades
    ] == [(20 + place, case_ids[1], 5, rubric_ids[place // 2], place % 2 + 1, 50) for place in range(4)]
    inputs = value(tx, "select pgharness.load_inputs(%s, %s, %s, '{5}')", run, [case_ids[1]], rubric_ids)
    assert inputs["cases"][str(case_ids[1])]["name"] == "trial-2"
    assert [inputs["rubrics"][str(id_)]["author"] for id_ in rubric_ids] == ["bob", "ann"]
    assert inputs["notes"] == {"5": {"text": "n5"}}
    assert rows(tx, "select run_id, worker_id from pgharness.run_workers") == [{"run_id": run, "worker_id": worker}]


def test_a_slice_holds_only_what_is_missing(tx: Database) -> None:
    run, worker = small(tx)
    record(tx, worker, note(run, 1), lost(run, "note", 2))
    slice_ = {"run_id": run, "kind": "note", "epoch": 0}
    assert sorted(i["ordinal"] for i in load(tx, worker, slice_ | {"first": 0, "last": 3})) == [0, 3]
    assert sorted(i["ordinal"] for i in load(tx, worker, slice_ | {"ordinals": [3, 1, 2]})) == [3]
    assert (
        load(tx, worker, slice_ | {"first": -5, "last": -1})
        == load(tx, worker, slice_ | {"first": 4, "last": 900})
        == []
    )
    assert sorted(i["ordinal"] for i in load(tx, worker, slice_ | {"kind": "grade", "first": -9, "last": 900})) == [1]


def test_a_slice_of_an_earlier_epoch_another_state_or_no_run_holds_nothing(tx: Database) -> None:
    run, worker = small(tx)
    slice_ = {"run_id": run, "kind": "note", "epoch": 0, "first": 0, "last": 3}
    assert len(load(tx, worker, slice_)) == 4
    for action, state in (("requeue_run", "running"), ("pause_run", "paused"), ("cancel_run", "cancelled")):
        tx.execute(f"select pgharness.{action}(%s)".encode(), (run,))
        assert run_of(tx, run)["status"] == state
        assert load(tx, worker, slice_) == []
        assert len(load(tx, worker, slice_ | {"epoch": 1})) == (4 if state == "running" else 0)
    assert load(tx, worker, slice_ | {"run_id": 987654321}) == []


# -- recording


def test_recording_an_outcome_twice_changes_nothing_but_the_calls(tx: Database) -> None:
    run, worker = small(tx)
    record(tx, worker, note(run, 0), note(run, 1))
    record(tx, worker, grade(run, 0))
    kept = rows(tx, "select ordinal, output from pgharness.notes") + rows(
        tx, "select ordinal, score from pgharness.grades"
    )
    queued = jobs(tx)
    for outcome in (note(run, 0, output="later"), grade(run, 0, 0, 0)):
        record(tx, worker, outcome)
        record(tx, worker, outcome, note(run, 1), outcome | {"attempt": 2})
    assert (
        rows(tx, "select ordinal, output from pgharness.notes")
        + rows(tx, "select ordinal, score from pgharness.grades")
        == kept
    )
    assert jobs(tx) == queued
    assert (run_of(tx, run)["notes_succeeded"], run_of(tx, run)["grades_succeeded"]) == (2, 1)
    assert orphans(tx) == []


def test_the_grades_of_a_new_note_are_queued_exactly_once(tx: Database) -> None:
    add_instance(
        tx,
        cases=3,
        grade_replications=2,
        combinations=[("simulator", "simulator"), ("simulator", None), ("simulator", "contains")],
    )
    run, worker = start(tx), register(tx)
    record(tx, worker, *[note(run, n) for n in (0, 1, 2, 2, 3)], failure(run, "note", 4), lost(run, "note", 5))
    record(tx, worker, *[note(run, n) for n in (0, 2, 4)])
    queued = Counter(o for job in jobs(tx, kind="grade") for o in ordinals(job))
    stride = 4
    assert queued == Counter({note * stride + k: 1 for note, grades in ((0, 4), (2, 1), (3, 4)) for k in range(grades)})
    assert orphans(tx) == []


def test_a_note_and_its_grade_may_be_recorded_together(tx: Database) -> None:
    run, worker = small(tx)
    record(tx, worker, grade(run, 3), note(run, 3))
    assert run_of(tx, run)["grades_succeeded"] == 1
    assert orphans(tx) == []


@pytest.mark.parametrize("order", ["failed first", "succeeded first", "together"])
@pytest.mark.parametrize("is_final", [False, True])
@pytest.mark.parametrize("kind", ["note", "grade"])
def test_a_try_that_failed_and_one_that_succeeded_count_once(
    tx: Database, kind: str, is_final: bool, order: str
) -> None:
    run, worker = small(tx)
    if kind == "grade":
        record(tx, worker, note(run, 2))
    make = note if kind == "note" else grade
    good, bad = make(run, 2), (lost if is_final else failure)(run, kind, 2)
    steps = {"failed first": [[bad], [good]], "succeeded first": [[good], [bad]], "together": [[bad, good]]}[order]
    for outcomes in steps * 2:
        record(tx, worker, *outcomes)
        assert orphans(tx) == []
    row = run_of(tx, run)
    is_failed = is_final and order == "failed first"
    assert (row[f"{kind}s_succeeded"], row[f"{kind}s_failed"], len(failures(tx))) == (
        int(not is_failed),
        int(is_failed),
        int(is_failed),
    )
    assert (
        value(tx, "select count(*) from pgharness.calls where ordinal = 2 and kind = %s", kind) == 2
    )  # sent twice, kept once


def test_outcomes_of_several_runs_are_recorded_in_one_call(tx: Database) -> None:
    first, worker = small(tx)
    second = start(tx)
    tx.execute("select pgharness.cancel_run(%s)", (second,))
    learned = record(tx, worker, note(second, 0), note(first, 0), note(987654321, 0), lost(first, "note", 1))
    assert sorted((row["run_id"], row["status"]) for row in learned) == [(first, "running"), (second, "cancelled")]
    assert (run_of(tx, first)["notes_succeeded"], run_of(tx, second)["notes_succeeded"]) == (1, 0)
    assert orphans(tx) == []


def test_a_run_that_ended_keeps_late_calls_and_nothing_else(tx: Database) -> None:
    run, worker = small(tx)
    work_off(tx, worker)
    before, cost = contents(tx), run_of(tx, run)["note_cost_usd"]
    learned = record(tx, worker, note(run, 0, output="late"), failure(run, "note", 1), lost(run, "grade", 1))
    assert learned == [{"run_id": run, "status": "completed", "epoch": 0, "priority": 0, "kept_notes": None}]
    after = contents(tx)
    assert {table for table in after if after[table] != before[table]} == {
        *("pgharness.calls", "pgharness.call_totals", "pgharness.runs", "pgharness.instance_spending")
    }
    assert run_of(tx, run)["note_cost_usd"] == cost + Decimal("0.5")
    assert orphans(tx) == []


def test_calls_are_kept_as_they_were_reported(tx: Database) -> None:
    run, worker = small(tx)
    reported = call(
        0.125, http_status=200, finish_reason="stop", request_id="r1", cached_tokens=3, answer=None, error=None
    )
    record(
        tx,
        worker,
        note(run, 0, attempt=2, calls=[call(0, outcome="timeout"), reported]),
        note(run, 1, calls=None),
        note(run, 2, calls=[]),
    )
    kept = rows(tx, "select * from pgharness.calls order by id")
    assert [(c["outcome"], c["attempt"], c["worker_id"], c["ordinal"]) for c in kept] == [
        ("timeout", 2, worker, 0),
        ("succeeded", 2, worker, 0),
    ]
    assert {name: kept[1][name] for name in ("http_status", "finish_reason", "request_id", "cached_tokens", "input_tokens", "latency_ms")} == {
        "http_status": 200, "finish_reason": "stop", "request_id": "r1", "cached_tokens": 3, "input_tokens": 10, "latency_ms": 12.5
    }  # fmt: skip
    assert run_of(tx, run)["notes_succeeded"] == 3


@pytest.mark.parametrize(
    ("weights", "satisfactions", "score", "maximum", "parts"),
    [
        ((10, 5), (50, 100), 10, 15, ["5", "5"]),
        ((10, 5), (0, 0), 0, 15, ["0", "0"]),
        ((33,), (33,), 10.89, 33, ["10.89"]),
        ((1, 1, 1), (33.333, 66.666, 99.999), 2, 3, ["0.33", "0.67", "1"]),
        ((0, 7), (100, 50), 3.5, 7, ["0", "3.5"]),
        ((0.125,), (100,), 0.125, 0.125, ["0.125"]),
        ((2.005, 0.005), (100, 100), 2.01, 2.01, ["2.005", "0.005"]),
        ((0.004,), (100,), 0, 0.004, ["0"]),
    ],
)
def test_a_criterion_scores_its_weight_times_its_satisfaction(
    tx: Database,
    weights: tuple[float, ...],
    satisfactions: tuple[float, ...],
    score: float,
    maximum: float,
    parts: list[str],
) -> None:
    add_instance(tx, cases=0, rubrics_per_case=1)
    add_cases(tx, 1, weights=weights)
    tx.execute("select pgharness.add_cases('trial')")
    run, worker = start(tx), register(tx)
    record(tx, worker, note(run, 0), grade(run, 0, *satisfactions))
    (kept,) = rows(tx, "select score, max_score, criteria, rubric_id from pgharness.grades")
    assert (float(kept["score"]), float(kept["max_score"])) == (score, maximum)
    assert [Decimal(str(c["score"])) for c in kept["criteria"]] == [Decimal(part) for part in parts]
    assert [c["satisfaction"] for c in kept["criteria"]] == list(satisfactions)
    assert {c["rationale"] for c in kept["criteria"]} == {"because"}
    assert run_of(tx, run)["status"] == "completed"


def test_a_metric_brings_its_score_and_a_model_without_rubrics_one_verdict(tx: Database) -> None:
    add_instance(
        tx, cases=1, rubrics_per_case=0, combinations=[("simulator", "exact_match"), ("simulator", "simulator")]
    )
    run, worker = start(tx), register(tx)
    by_metric = grade(run, 0, verdicts=None, score=1, max_score=1, calls=[])
    record(tx, worker, note(run, 0), note(run, 1), by_metric, grade(run, 1, 40))
    kept = rows(tx, "select score, max_score, rubric_number, rubric_id from pgharness.grades order by ordinal")
    assert [(float(g["score"]), float(g["max_score"]), g["rubric_number"], g["rubric_id"]) for g in kept] == [
        (1, 1, 0, None),
        (40, 100, 0, None),
    ]
    assert orphans(tx) == []


@pytest.mark.parametrize(
    "outcome",
    [
        grade(0, 0, 50),
        grade(0, 0, 50, 50, 50),
        grade(0, 0, verdicts=[]),
        grade(0, 0, verdicts=None),
        grade(0, 0, 50, 101),
        grade(0, 0, 50, -1),
        grade(0, 0, verdicts=[{"rationale": "r"}, {"rationale": "r", "satisfaction": 5}]),
        grade(0, 0, verdicts=[{"satisfaction": "all"}, {"satisfaction": 5}]),
        grade(0, 0, verdicts={"satisfaction": 5}),
        grade(0, 0, verdicts=None, score=2, max_score=1),
        grade(0, 0, verdicts=None, score=1, max_score=0),
        grade(0, 0, verdicts=None, score=1),
        note(0, 1, output=None),
        note(0, 1, attempt=None),
        note(0, 1, calls=[{"outcome": "succeeded"}]),
        note(0, 1, calls=7),
        failure(0, "note", 1, cause=None),
        failure(0, "note", 1, spends_attempt=None),
        lost(0, "essay", 0),
        note(0, "first"),  # type: ignore[arg-type]
    ],
    ids=lambda outcome: json.dumps({k: v for k, v in outcome.items() if k not in ("calls", "run_id")})[:80],
)
def test_an_outcome_that_cannot_be_kept_is_refused_and_nothing_with_it_is(tx: Database, outcome: Row) -> None:
    run, worker = small(tx, rubrics_per_case=1)
    record(tx, worker, note(run, 0))
    before = contents(tx)
    with refused(tx, "22023 22P02 23502 23514"):
        record(tx, worker, note(run, 3), outcome | {"run_id": run})
    assert contents(tx) == before
    assert orphans(tx) == []


@pytest.mark.parametrize(
    "outcome",
    [
        note(0, 4),
        note(0, -1),
        note(0, 2**62),
        grade(0, 4),
        grade(0, -1),
        grade(0, 2**62),
        grade(0, 2),
        lost(0, "note", 4),
        lost(0, "note", -1),
        lost(0, "note", 2**62),
        failure(0, "grade", 2),
        failure(0, "grade", -1),
        failure(0, "grade", 99),
        note(0, 1, result="unheard of"),
        note(0, 1, result=None),
        note(0, 1, kind=None),
        note(987654321, 1),
    ],
    ids=lambda outcome: f"{outcome['kind']} {outcome['ordinal']} {outcome['result']}",
)
def test_an_outcome_outside_of_the_plan_leaves_no_trace_but_its_calls(tx: Database, outcome: Row) -> None:
    run, worker = small(tx)
    record(tx, worker, note(run, 0))
    before = contents(tx)
    record(tx, worker, {"run_id": run, **{k: v for k, v in outcome.items() if k != "run_id" or v}} | {"calls": []})
    assert contents(tx) == before
    assert orphans(tx) == []


def test_no_outcomes_and_nonsense_instead_of_outcomes(tx: Database) -> None:
    _run, worker = small(tx)
    before = contents(tx)
    assert record(tx, worker) == []
    for nonsense in ("{}", "[1]", '"x"', "null", "[[]]"):
        with refused(tx, "22023 22P02"):
            assert tx.execute("select * from pgharness.record_outcomes(%s, %s)", (worker, nonsense)).fetchall() == []
            raise psycopg.errors.InvalidParameterValue("nothing was recorded")
    assert contents(tx) == before


# -- trying again


def due(db: Database) -> list[float]:
    """Seconds from now (by the harness's clock) until each waiting failure's next try."""
    return [
        float(row["seconds"])
        for row in rows(
            db,
            "select extract(epoch from next_attempt_at - pgharness.clock()) as seconds from pgharness.failures where status = 'waiting' order by ordinal",
        )
    ]


def test_an_item_has_three_attempts_with_a_delay_that_doubles(tx: Database) -> None:
    at(tx, "12:00")
    add_instance(tx, cases=100, rubrics_per_case=1, failure_threshold=1, retry_delay_seconds=10)
    run, worker = start(tx), register(tx)
    for attempt, mean in ((1, 10), (2, 20)):
        record(tx, worker, *[failure(run, "note", n, error=f"try {attempt}") for n in range(100)])
        delays = due(tx)
        assert (
            len(delays) == 100 and mean * 0.5 <= min(delays) < mean * 0.75 and mean * 1.25 < max(delays) <= mean * 1.5
        )
        assert {(f["attempts"], f["error"]) for f in failures(tx)} == {(attempt, f"try {attempt}")}
        assert orphans(tx) == []
    record(tx, worker, *[failure(run, "note", n, error="try 3", answer="raw") for n in range(100)])
    assert {(f["status"], f["attempts"], f["cause"], f["error"], f["answer"]) for f in failures(tx)} == {
        ("failed", 3, "server_error", "try 3", "raw")
    }
    row = run_of(tx, run)
    assert (row["status"], row["notes_failed"], row["grades_skipped"]) == ("completed", 100, 100)
    assert orphans(tx) == []


@pytest.mark.parametrize("max_attempts", [1, 5])
def test_the_number_of_attempts_is_the_instances(tx: Database, max_attempts: int) -> None:
    run, worker = small(tx, max_attempts=max_attempts)
    for attempt in range(1, max_attempts + 1):
        assert failures(tx) == [] or failures(tx)[0]["status"] == "waiting"
        record(tx, worker, failure(run, "note", 0))
        assert failures(tx)[0]["attempts"] == attempt
    assert failures(tx)[0]["status"] == "failed"


def test_the_delay_grows_to_minutes_and_no_further(tx: Database) -> None:
    at(tx, "12:00")
    run, worker = small(tx, max_attempts=100, retry_delay_seconds=3600)
    for _ in range(5):
        record(tx, worker, failure(run, "note", 0))
        assert 150 <= due(tx)[0] <= 450
    for _ in range(90):
        record(tx, worker, failure(run, "note", 0))
    assert 150 <= due(tx)[0] <= 450


def test_a_rate_limit_waits_as_long_as_asked_and_spends_no_attempt(tx: Database) -> None:
    at(tx, "12:00")
    run, worker = small(tx)
    limited = {"cause": "rate_limited", "spends_attempt": False}
    for asked, least, most in ((7, 7, 7.7), (0, 0, 0), (3600, 3600, 3960), (1e15, 86400, 95040)):
        record(tx, worker, failure(run, "note", 0, retry_after=asked, **limited))
        assert least <= due(tx)[0] <= most
    for number in range(5, 14):
        record(tx, worker, failure(run, "note", 0, **limited))
        mean = 2 ** min(number - 1, 8)
        assert mean * 0.5 <= due(tx)[0] <= mean * 1.5
    (failed,) = failures(tx)
    assert (failed["status"], failed["attempts"], failed["delays"], failed["cause"]) == (
        "waiting",
        0,
        13,
        "rate_limited",
    )
    last = failure(run, "note", 0, retry_after=20)
    record(tx, worker, last)
    assert 20 <= due(tx)[0] <= 22
    assert failures(tx)[0]["attempts"] == 1
    assert load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0]}) == []
    at(tx, "12:01")
    assert load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0]})[0]["tries"] == last["attempt"]
    for _ in range(100):
        record(tx, worker, failure(run, "note", 0, **limited))
    assert failures(tx)[0]["status"] == "waiting"
    assert orphans(tx) == []


def test_an_item_that_was_only_delayed_for_a_day_fails(tx: Database) -> None:
    run, worker = small(tx)
    limited = {"cause": "rate_limited", "spends_attempt": False}
    for moment, fields, status in (
        ("01-01 12:00", limited, "waiting"),
        ("01-02 11:59", limited, "waiting"),
        ("01-02 12:00", {}, "waiting"),
        ("01-02 12:01", limited, "waiting"),
        ("01-03 12:00", limited, "waiting"),
        ("01-03 12:02", limited, "failed"),
    ):
        tx.execute(f"set local pgharness.fake_now = '2026-{moment}+00'".encode())
        record(tx, worker, failure(run, "note", 0, **limited if fields else {}))
        assert failures(tx)[0]["status"] == status, moment
    assert (failures(tx)[0]["attempts"], failures(tx)[0]["delays"]) == (1, 5)
    assert orphans(tx) == []


def test_a_batch_that_is_sent_again_counts_once(tx: Database) -> None:
    run, worker = small(tx)
    record(tx, worker, note(run, 3))
    batch = [
        note(run, 0),
        failure(run, "note", 1),
        lost(run, "note", 2),
        grade(run, 3),
        failure(run, "note", 1, spends_attempt=False),
    ]
    record(tx, worker, *batch[:4])
    record(tx, worker, batch[4])
    before = contents(tx)
    for again in (batch[:4], batch[4:], batch):
        record(tx, worker, *again)
        assert contents(tx) == before
    assert run_of(tx, run)["note_cost_usd"] == Decimal("1.0")
    assert value(tx, "select count(*) from pgharness.calls") == 6
    assert [(f["attempts"], f["delays"]) for f in failures(tx)] == [(1, 1), (1, 0)]
    assert orphans(tx) == []


@pytest.mark.parametrize("state", ["running", "cancelled"])
def test_a_call_that_was_aborted_is_no_crash_of_its_item(tx: Database, state: str) -> None:
    run, worker = small(tx)
    for _ in range(2):
        tx.execute("select pgharness.charge_crash(%s, 'note', 0)", (run,))
    if state == "cancelled":
        tx.execute("select pgharness.cancel_run(%s)", (run,))
    for expected in (1, 0, 0):
        record(tx, worker, note(run, 0, result="cancelled"), note(run, 1, result="cancelled"))
        assert [f["crashes"] for f in failures(tx)] == [expected]
    assert orphans(tx) == []


def test_a_slice_of_a_worker_that_stopped_by_itself_comes_back_without_a_crash(tx: Database) -> None:
    _run, worker = small(tx)
    assert take(tx, worker) is not None
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'stopped', '{}', '{}')", (worker,))
    assert value(tx, "select pgharness.sweep()") == 1
    assert [job["args"]["crashes"] for job in jobs(tx) if "crashes" in job["args"]] == [0]
    assert orphans(tx) == []


def test_an_item_that_waits_has_a_job_of_its_own_at_its_time(tx: Database) -> None:
    at(tx, "12:00")
    run, worker = small(tx)
    tx.execute("delete from procrastinate.procrastinate_jobs")
    record(
        tx,
        worker,
        *[failure(run, "note", n, retry_after=100 * n + 50, spends_attempt=False) for n in range(3)],
        note(run, 3),
    )
    record(tx, worker, failure(run, "grade", 3, retry_after=400))
    waiting = {
        (f["kind"], f["ordinal"]): f["next_attempt_at"]
        for f in rows(tx, "select kind, ordinal, next_attempt_at from pgharness.failures")
    }
    scheduled = {
        (job["args"]["kind"], o): job["scheduled_at"] for job in jobs(tx) for o in ordinals(job) if job["scheduled_at"]
    }
    assert scheduled == waiting


def test_an_item_that_waits_is_not_run_early_by_another_slice_or_after_a_crash(tx: Database) -> None:
    at(tx, "12:00")
    run, worker = small(tx)
    tx.execute("delete from procrastinate.procrastinate_jobs")
    tx.execute("select pgharness._defer_range(%s, 'note', 0, 3, 4)", (run,))
    job = take(tx, worker)
    assert job is not None and len(load(tx, worker, job["args"])) == 4
    record(tx, worker, failure(run, "note", 1, retry_after=600, spends_attempt=False), note(run, 2))
    for names in ({"first": 0, "last": 3}, {"ordinals": [0, 1, 2, 3]}):
        slice_ = {"run_id": run, "kind": "note", "epoch": 0} | names
        assert sorted(i["ordinal"] for i in load(tx, worker, slice_)) == [0, 3]
    lose(tx, worker)
    early = [o for queued in jobs(tx, kind="note") if queued["scheduled_at"] is None for o in ordinals(queued)]
    assert sorted(early) == [0, 3]
    assert orphans(tx) == []
    at(tx, "12:12")
    assert sorted(
        i["ordinal"] for i in load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0, 1, 2, 3]})
    ) == [0, 1, 3]


def test_what_the_model_answered_comes_back_with_the_next_try(tx: Database) -> None:
    at(tx, "12:00")
    run, worker = small(tx)
    record(tx, worker, failure(run, "note", 0, attempt=1, cause="invalid_output", error="no JSON", answer="{oops"))
    at(tx, "12:30")
    (item, *_) = load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0]})
    assert (item["tries"], item["cause"], item["error"], item["answer"]) == (1, "invalid_output", "no JSON", "{oops")


# -- workers that die


def test_a_slice_whose_worker_died_comes_back_in_parts_down_to_single_items(tx: Database) -> None:
    add_instance(tx, cases=125, note_replications=4, rubrics_per_case=1)
    run = start(tx)
    tx.execute("delete from procrastinate.procrastinate_jobs")
    tx.execute("select pgharness._defer_range(%s, 'note', 0, 499, 500)", (run,))
    sizes, crashes = [], []
    for pid in range(1, 6):
        worker = register(tx, pid=pid)
        job = take(tx, worker)
        assert job is not None
        items = load(tx, worker, job["args"])
        sizes.append(len(items))
        crashes.append(job["args"].get("crashes", 0))
        record(tx, worker, *[note(run, i["ordinal"]) for i in items[:-1]][: len(items) // 100])
        tx.execute("delete from procrastinate.procrastinate_jobs where status = 'todo'")
        lose(tx, worker)
        back = jobs(tx, kind="note")
        assert len(back) <= 8 and sum(len(ordinals(b)) for b in back) == len(items) - len(items) // 100
        tx.execute("delete from procrastinate.procrastinate_jobs where args ->> 'kind' = 'grade'")
    assert sizes == [500, 62, 8, 1, 1] and crashes == [0, 1, 2, 3, 4]


def test_one_item_that_kills_every_worker_ends_up_alone_and_the_rest_is_done(tx: Database) -> None:
    add_instance(tx, cases=50, note_replications=10, rubrics_per_case=1)
    run, poison = start(tx), 321
    for pid in range(1, 30):
        worker = register(tx, pid=pid)
        while job := take(tx, worker):
            items = load(tx, worker, job["args"])
            if job["args"]["kind"] == "note" and poison in [i["ordinal"] for i in items]:
                break
            record(tx, worker, *succeeded(job["args"], items))
            finish(tx, job)
        else:
            break
        is_alone = len(items) == 1 and job["args"]["crashes"] >= 3
        if is_alone and value(tx, "select pgharness.charge_crash(%s, 'note', %s)", run, poison) > 5:
            record(tx, worker, lost(run, "note", poison))
            finish(tx, job)
            continue
        lose(tx, worker)
        assert orphans(tx) == []
    row = run_of(tx, run)
    assert (row["status"], row["notes_succeeded"], row["notes_failed"], row["grades_succeeded"]) == (
        "completed",
        499,
        1,
        499,
    )
    assert pid < 12
    assert orphans(tx) == []


def test_a_crash_is_charged_until_any_outcome_clears_it(tx: Database) -> None:
    run, worker = small(tx)
    charge = "select pgharness.charge_crash(%s, 'note', %s)"
    assert [value(tx, charge, run, 0) for _ in range(3)] == [1, 2, 3]
    assert [(f["status"], f["crashes"], f["cause"], f["attempts"]) for f in failures(tx)] == [
        ("waiting", 3, "crashed", 0)
    ]
    assert len(load(tx, worker, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0]})) == 1
    record(tx, worker, failure(run, "note", 0))
    assert [(f["crashes"], f["attempts"], f["cause"]) for f in failures(tx)] == [(0, 1, "server_error")]
    assert value(tx, charge, run, 0) == 1
    record(tx, worker, note(run, 0), lost(run, "note", 1))
    assert [value(tx, charge, run, ordinal) for ordinal in (0, 1, 99, -1)] == [0, 0, 0, 0], (
        "done, failed, not in the plan"
    )
    assert [(f["ordinal"], f["status"], f["cause"]) for f in failures(tx)] == [(1, "failed", "rejected")]
    with refused(tx, "PH001", "987654321"):
        value(tx, charge, 987654321, 0)
    assert orphans(tx) == []


def test_a_worker_that_shows_no_life_is_lost_and_its_work_put_back(tx: Database) -> None:
    at(tx, "12:00:00")
    run, silent = small(tx)
    lively = register(tx, pid=2)
    taken = [take(tx, worker) for worker in (silent, lively)]
    assert None not in taken
    at(tx, "12:00:29")
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'running', '{}', %s)", (lively, [taken[1]["id"]]))  # type: ignore[index]
    assert value(tx, "select pgharness.sweep('30 seconds')") == 0
    at(tx, "12:00:31")
    assert value(tx, "select pgharness.sweep('30 seconds')") == 1
    assert [row["status"] for row in rows(tx, "select status from pgharness.workers order by id")] == [
        "lost",
        "running",
    ]
    assert [job["id"] for job in jobs(tx, status="doing")] == [taken[1]["id"]]  # type: ignore[index]
    assert orphans(tx) == []
    assert value(tx, "select pgharness.sweep('30 seconds')") == 0
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'stopped', '{}', '{}')", (lively,))
    assert value(tx, "select pgharness.sweep('30 seconds')") == 1, "a worker that stopped holds nothing either"
    work_off(tx, register(tx, pid=3))
    assert run_of(tx, run)["status"] == "completed"


@pytest.mark.parametrize("action", ["pause_run", "cancel_run", "requeue_run"])
def test_a_slice_that_nobody_waits_for_is_not_put_back(tx: Database, action: str) -> None:
    run, worker = small(tx)
    assert take(tx, worker) is not None
    tx.execute(f"select pgharness.{action}(%s)".encode(), (run,))
    queued = jobs(tx)
    lose(tx, worker)
    assert jobs(tx) == queued and jobs(tx, status="doing") == []
    assert orphans(tx) == []


def test_a_running_run_without_a_job_is_queued_again(tx: Database) -> None:
    at(tx, "12:00:00")
    run, worker = small(tx)
    record(tx, worker, note(run, 0), failure(run, "note", 1))
    tx.execute("delete from procrastinate.procrastinate_jobs")
    at(tx, "12:00:59")
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'running', '{}', '{}')", (worker,))
    assert value(tx, "select pgharness.sweep('30 seconds')") == 0
    at(tx, "12:01:01")
    assert value(tx, "select pgharness.sweep('30 seconds')") == 1
    assert orphans(tx) == []
    assert value(tx, "select message from pgharness.logs where level = 'warning'").startswith("the run had no job left")
    assert value(tx, "select pgharness.sweep('30 seconds')") == 0
    work_off(tx, worker)
    assert run_of(tx, run)["status"] == "completed"


def test_a_heartbeat_learns_the_state_of_runs_and_of_those_that_are_gone(tx: Database) -> None:
    run, worker = small(tx)
    paused = start(tx)
    tx.execute("select pgharness.pause_run(%s)", (paused,))
    learned = tx.execute(
        """select run_id, status, epoch from pgharness.heartbeat(%s, '{"1": {"note": 3}}', 'draining', %s, '{}')""",
        (worker, [run, paused, 987654321]),
    ).fetchall()
    assert learned == [(run, "running", 0), (paused, "paused", 0), (987654321, "deleted", 0)]
    assert rows(tx, "select in_flight, status from pgharness.workers") == [
        {"in_flight": {"1": {"note": 3}}, "status": "draining"}
    ]
    with refused(tx, "PH005", "worker 987654321 is not registered", "Restart the worker."):
        tx.execute("select * from pgharness.heartbeat(987654321, '{}', 'running', '{}', '{}')")
    with refused(tx, "23514", "workers_status_check"):
        tx.execute("select * from pgharness.heartbeat(%s, '{}', 'happy', '{}', '{}')", (worker,))


def test_a_job_whose_end_could_not_be_written_is_put_back_by_its_own_worker(tx: Database) -> None:
    _run, worker = small(tx)
    held, dropped = take(tx, worker), take(tx, worker)
    assert held is not None and dropped is not None
    beat = "select * from pgharness.heartbeat(%s, '{}', 'running', '{}', %s)"
    tx.execute(beat.encode(), (worker, [held["id"]]))
    assert len(jobs(tx, status="doing")) == 2, "it may have been taken a moment ago"
    tx.execute("update procrastinate.procrastinate_events set at = at - interval '1 minute'")
    tx.execute(beat.encode(), (worker, [held["id"]]))
    assert [job["id"] for job in jobs(tx, status="doing")] == [held["id"]]
    (back,) = [
        job for job in jobs(tx) if job["id"] > dropped["id"] and job["args"].get("ordinals") == ordinals(dropped)
    ]
    assert back["args"]["crashes"] == 0
    assert orphans(tx) == []


@pytest.mark.parametrize("accident", ["a day passed", "taken for lost", "its row is gone"])
def test_a_worker_alive_can_always_take_jobs(tx: Database, accident: str) -> None:
    run, worker = small(tx)
    if accident == "a day passed":
        tx.execute("update procrastinate.procrastinate_workers set last_heartbeat = now() - interval '2 days'")
        tx.execute("select pgharness.sweep()")
    elif accident == "taken for lost":
        lose(tx, worker)
    else:
        tx.execute("delete from procrastinate.procrastinate_workers")
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'running', '{}', '{}')", (worker,))
    assert value(tx, "select pgharness.sweep()") == 0
    assert take(tx, worker) is not None
    assert value(tx, "select pgharness.sweep()") == 0
    work_off(tx, worker)
    tx.execute("update procrastinate.procrastinate_jobs set status = 'todo'")
    work_off(tx, worker)
    assert run_of(tx, run)["status"] == "completed"
    lose(tx, worker)
    assert value(tx, "select count(*) from procrastinate.procrastinate_workers") == 0


def test_workers_of_before_the_queue_was_rebuilt_do_not_cost_new_ones_their_place(tx: Database) -> None:
    run, old = small(tx)
    lose(tx, old)
    tx.execute("drop schema procrastinate cascade")
    tx.execute(schema.migrations()[0].text.encode())
    worker = register(tx, pid=2)
    tx.execute(
        "update pgharness.workers as o set queue_worker_id = n.queue_worker_id from pgharness.workers as n where n.id = %s",
        (worker,),
    )
    assert value(tx, "select pgharness.sweep()") == 0
    tx.execute("select pgharness.requeue_run(%s)", (run,))
    work_off(tx, worker)
    assert run_of(tx, run)["status"] == "completed"


def test_a_worker_is_registered_with_what_it_runs_on(tx: Database) -> None:
    worker = value(tx, """select pgharness.register_worker('h', 7, '0.1.0', '{note}', 3, '{"python": "3.12"}')""")
    (row,) = rows(tx, "select * from pgharness.workers where id = %s", worker)
    assert (row["host"], row["pid"], row["queues"], row["concurrency"], row["environment"], row["status"]) == (
        "h", 7, ["note"], 3, {"python": "3.12"}, "running"
    )  # fmt: skip
    tx.execute("select pgharness.lose_worker('h', 8), pgharness.lose_worker('g', 7)")
    assert value(tx, "select status from pgharness.workers where id = %s", worker) == "running"
    tx.execute("select pgharness.lose_worker('h', 7)")
    assert value(tx, "select status from pgharness.workers where id = %s", worker) == "lost"


def test_a_run_that_is_gone_is_loaded_as_null(tx: Database) -> None:
    assert value(tx, "select pgharness.load_run(987654321)") is None
    assert value(tx, "select pgharness.load_inputs(987654321, '{1}', '{1}', '{1}')") == {
        "cases": None,
        "rubrics": None,
        "notes": None,
    }
