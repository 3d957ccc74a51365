"""Watching and planning: each view, against numbers that are worked out here from what was recorded.

What people ask about an experiment, and the one line that answers it (`MONITORING` below runs each of them):

    which cases have accepted rubrics by two people    select case_name from pgharness.eligible_cases
    which models are there, and what did they cost     select * from pgharness.cost_by_model
    how much work will it be, and what will it cost    select * from pgharness.expected_workload where instance = 'x'
    how many notes are there, how many failed          select * from pgharness.run_progress where run_id = 1
    what happened last                                 select * from pgharness.recent_activity where run_id = 1 limit 10
    which combination is better                        select * from pgharness.combination_scores where run_id = 1
    what did the graders say of each case              select * from pgharness.grade_results where run_id = 1
    why do calls fail                                  select * from pgharness.failure_causes where run_id = 1
    which notes and grades failed                      select * from pgharness.failed_items where run_id = 1
    what is left to do                                 select * from pgharness.outstanding_items where run_id = 1
    how slow and how dear are the models               select * from pgharness.model_performance where run_id = 1
    who is working                                     select * from pgharness.worker_health
    is there work in the queue                         select * from pgharness.queue_health
    why does it not get on                             select * from pgharness.stalled_work
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.types.json import Jsonb

import world
from story import Grade, Item, Story, told
from world import Row, record, rows, value


@pytest.fixture(scope="module")
def whole_story(server_url: str, template: str) -> Iterator[Story]:
    with told(server_url, template) as story:
        yield story


@pytest.fixture
def story(whole_story: Story) -> Iterator[Story]:
    """The run, in a transaction that is rolled back."""
    with whole_story.db.transaction(force_rollback=True):
        yield whole_story


def pick(row: Row, names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names.split())


def count(items: Iterable[Item], *states: str) -> int:
    return sum(item.state in states for item in items)


def set_clock(db: Connection[Any], run: int, seconds: float) -> None:
    """Set the harness's clock to so long after a run was started, for this transaction."""
    clock = "(activated_at + make_interval(secs => %s))::text"
    db.execute(
        f"select set_config('pgharness.fake_now', {clock}, true) from pgharness.runs where id = %s", (seconds, run)
    )


def beat(db: Connection[Any], worker: int, *, state: str = "running", in_flight: dict[str, Any] | None = None) -> None:
    """Give a sign of life."""
    db.execute("select pgharness.heartbeat(%s, %s, %s, '{}', '{}')", (worker, Jsonb(in_flight or {}), state))


# -- progress


def test_run_progress_counts_what_was_recorded(story: Story) -> None:
    [row] = story.view("run_progress")
    assert pick(row, "run_id run instance kind status reason") == (
        story.run,
        "story/1",
        "story",
        "trial",
        "running",
        None,
    )
    for kind, items in (("note", story.notes), ("grade", story.grades)):
        counts = (len(items), *(count(items, state) for state in ("succeeded", "failed", "waiting")))
        assert pick(row, f"{kind}_count {kind}s_succeeded {kind}s_failed {kind}s_waiting") == counts
        assert all(counts)
    assert row["grades_skipped"] == count(story.grades, "skipped") > 0
    decided = count(story.items, "succeeded", "failed", "skipped")
    assert row["percent_done"] == math.floor(1000 * decided / len(story.items)) / Decimal(10)


def test_run_progress_tells_speed_and_time_left(story: Story) -> None:
    set_clock(story.db, story.run, 200)
    beat(story.db, story.worker, in_flight={str(story.run): {"note": 3, "grade": 2}, "0": {"note": 9}})
    [row] = story.view("run_progress")
    done, left = count(story.items, "succeeded", "failed"), count(story.items, "planned", "waiting")
    assert pick(row, "active_seconds worker_count notes_running grades_running finished_at") == (200, 1, 3, 2, None)
    assert float(row["items_per_second"]) == pytest.approx(done / 200, abs=1e-3)
    assert float(row["seconds_left"]) == pytest.approx(left * 200 / done, abs=0.1)
    seconds = (row["expected_finish_at"] - value(story.db, "select pgharness.clock()")).total_seconds()
    assert seconds == pytest.approx(left * 200 / done, abs=0.1)


def test_run_progress_projects_the_cost_of_what_is_left(story: Story) -> None:
    [row] = story.view("run_progress")
    projected = spent = 0.0
    for kind, items in (("note", story.notes), ("grade", story.grades)):
        cost = float(sum(call.cost_usd for call in story.calls if call.kind == kind))
        spent += cost
        projected += cost / count(items, "succeeded", "failed") * (len(items) - count(items, "skipped"))
    assert float(row["cost_usd"]) == pytest.approx(spent, abs=1e-6)
    assert float(row["projected_cost_usd"]) == pytest.approx(projected, abs=1e-6)


def test_run_progress_of_a_new_run_foretells_nothing(story: Story) -> None:
    run = world.start(story.db, "story", budget_usd=3)
    [row] = rows(story.db, "select * from pgharness.run_progress where run_id = %s", run)
    assert pick(row, "percent_done cost_usd projected_cost_usd seconds_left budget_usd") == (0, 0, None, None, 3)


def test_run_progress_of_a_run_without_grades_needs_only_notes_to_project(tx: Connection[Any]) -> None:
    world.add_instance(tx, combinations=(("simulator", None),), note_replications=2)
    run, worker = world.start(tx), world.register(tx)
    record(tx, worker, world.note(run, 0))
    [row] = rows(tx, "select * from pgharness.run_progress where run_id = %s", run)
    assert pick(row, "percent_done cost_usd projected_cost_usd") == (25, Decimal("0.5"), 2)


def test_run_progress_does_not_count_workers_that_went_silent(story: Story) -> None:
    set_clock(story.db, story.run, 3600)
    [row] = story.view("run_progress")
    assert pick(row, "worker_count notes_running grades_running") == (0, 0, 0)


def test_run_progress_of_a_cancelled_run_stands_still(story: Story) -> None:
    story.db.execute("select pgharness.cancel_run(%s)", (story.run,))
    before = story.view("run_progress")
    story.db.execute("set local pgharness.fake_now = '2099-01-01'")
    assert story.view("run_progress") == before
    assert pick(before[0], "projected_cost_usd seconds_left worker_count") == (before[0]["cost_usd"], None, 0)


def test_recent_activity_is_what_was_recorded_last(story: Story) -> None:
    found = rows(story.db, "select * from pgharness.recent_activity where run_id = %s", story.run)
    assert len(found) == 100
    assert [row["created_at"] for row in found] == sorted((row["created_at"] for row in found), reverse=True)
    items = {(item.kind, item.ordinal): item for item in story.items}
    expected: Counter[tuple[Any, ...]] = Counter()
    for outcome in story.last:
        item = items[outcome["kind"], outcome["ordinal"]]
        share = f"{item.share:.4f}" if isinstance(item, Grade) and item.state == "succeeded" else None
        expected[item.kind, *item.place[:2], item.state, share, outcome.get("error")] += 1
    newest = found[: len(story.last)]
    columns = "kind case_name combination status score error"
    assert Counter(pick(row | {"score": row["score"] and str(row["score"])}, columns) for row in newest) == expected


def test_run_log_has_changes_of_state_and_what_was_logged(story: Story) -> None:
    story.db.execute("select pgharness.log(%s, 'more workers')", (story.run,))
    story.db.execute("select pgharness.log(null, 'for all', level => 'warning')")
    story.db.execute("select pgharness.pause_run(%s, 'lunch')", (story.run,))
    lines = rows(story.db, "select * from pgharness.run_log order by id")
    assert [pick(line, "run level message") for line in lines] == [
        ("story/1", "info", "started"),
        ("story/1", "info", "more workers"),
        (None, "warning", "for all"),
        ("story/1", "warning", "paused: lunch"),
    ]


# -- failures and what is left


def test_failure_causes_count_items_and_calls(story: Story) -> None:
    found = {pick(row, "kind cause"): row for row in story.view("failure_causes")}
    calls = Counter((call.kind, call.outcome) for call in story.calls if call.outcome != "succeeded")
    assert found.keys() == calls.keys()
    for (kind, cause), row in found.items():
        items = [item for item in story.items if item.kind == kind and item.calls and item.calls[-1].outcome == cause]
        counts = (count(items, "failed"), count(items, "waiting"), calls[kind, cause])
        assert pick(row, "items_failed items_waiting calls_failed") == counts
        assert row["example_error"].startswith(f"{cause} of {kind} ")


def test_failure_causes_name_a_crash_that_has_no_call(story: Story) -> None:
    planned = next(note for note in story.notes if note.state == "planned")
    story.db.execute("select pgharness.charge_crash(%s, 'note', %s)", (story.run, planned.ordinal))
    [row] = [row for row in story.view("failure_causes") if row["cause"] == "crashed"]
    assert pick(row, "items_waiting calls_failed example_error") == (1, 0, "the worker died while it ran this item")


def check_item(row: Row, item: Item) -> None:
    """Compare what says which note or grade a row is about."""
    assert pick(row, "case_name combination overlap replication") == item.place
    of_grade = (item.author, item.replication) if isinstance(item, Grade) else (None, None)
    assert pick(row, "rubric_author grade_replication") == of_grade
    assert (row["next_attempt_at"] is not None) == (item.state == "waiting")


def test_failed_items_say_what_they_are_and_why(story: Story) -> None:
    found = {pick(row, "kind ordinal"): row for row in story.view("failed_items")}
    failed = [item for item in story.items if item.state in ("failed", "waiting")]
    assert found.keys() == {(item.kind, item.ordinal) for item in failed}
    for item in failed:
        row, cause = found[item.kind, item.ordinal], item.calls[-1].outcome
        check_item(row, item)
        assert pick(row, "status cause error") == (item.state, cause, f"{cause} of {item.kind} {item.ordinal}")
        assert row["answer"] == ("bad" if cause == "invalid_output" else None)
        delays = any(call.outcome == "rate_limited" for call in item.calls)
        assert row["delays"] == int(delays) and row["attempts"] == len(item.calls) - int(delays)


def test_outstanding_items_are_the_plan_minus_what_is_there(story: Story) -> None:
    found = {pick(row, "kind ordinal"): row for row in story.view("outstanding_items")}
    left = [item for item in story.items if item.state in ("planned", "waiting")]
    assert found.keys() == {(item.kind, item.ordinal) for item in left}
    for item in left:
        check_item(found[item.kind, item.ordinal], item)


# -- health


def test_worker_health_tells_the_living_from_the_dead(tx: Connection[Any]) -> None:
    world.add_instance(tx, "health")
    run = world.start(tx, "health")
    alive, draining, silent, dead, done = (world.register(tx, pid=pid) for pid in range(1, 6))
    world.load(tx, alive, {"run_id": run, "kind": "note", "epoch": 0, "ordinals": [0]})
    beat(tx, draining, state="draining", in_flight={str(run): {"note": 3}, "0": {"grade": 1}})
    tx.execute(
        "update pgharness.workers set heartbeat_at = heartbeat_at - interval '31 seconds' where id = %s", (silent,)
    )
    tx.execute("select pgharness.lose_worker('host', 4)")
    beat(tx, done, state="stopped")
    found = {row["worker_id"]: row for row in rows(tx, "select * from pgharness.worker_health")}
    states = {alive: "running", draining: "draining", silent: "stale", dead: "lost", done: "stopped"}
    assert {worker: row["status"] for worker, row in found.items()} == states
    assert (found[alive]["runs"], found[silent]["runs"]) == (["health/1"], [])
    assert pick(found[draining], "host pid in_flight concurrency queues") == ("host", 2, 4, 10, ["note", "grade"])
    assert 31 <= found[silent]["seconds_since_heartbeat"] < 600


def test_queue_health_counts_jobs_by_queue(tx: Connection[Any]) -> None:
    world.add_instance(tx, cases=4)
    run, worker = world.start(tx), world.register(tx)
    tx.execute("set local pgharness.fake_now = '2099-01-01'")
    beat(tx, worker)
    found = {row["queue"]: row for row in rows(tx, "select * from pgharness.queue_health")}
    columns = "jobs_waiting jobs_scheduled jobs_doing worker_count"
    assert pick(found["note"], columns) == (4, 0, 0, 1) and pick(found["grade"], columns) == (0, 0, 0, 1)
    assert found["note"]["oldest_waiting_seconds"] > 86400 and found["grade"]["oldest_waiting_seconds"] is None
    assert world.take(tx, worker) is not None
    record(tx, worker, world.failure(run, "note", 1), world.note(run, 2))
    found = {row["queue"]: row for row in rows(tx, "select * from pgharness.queue_health")}
    assert pick(found["note"], columns) == (3, 1, 1, 1)
    assert found["grade"]["jobs_waiting"] > 0 and found["grade"]["oldest_waiting_seconds"] is not None


def stalled(db: Connection[Any], run: int) -> list[tuple[str, str]]:
    return [
        pick(row, "problem remedy") for row in rows(db, "select * from pgharness.stalled_work where run_id = %s", run)
    ]


def test_stalled_work_names_queues_that_nobody_serves(tx: Connection[Any]) -> None:
    world.add_instance(tx)
    run = world.start(tx)
    both = ("no running worker serves queue note, grade", "start one: pgharness worker --queues note,grade")
    assert stalled(tx, run) == [both]
    tx.execute("update pgharness.workers set queues = '{note}' where id = %s", (world.register(tx),))
    one = ("no running worker serves queue grade", "start one: pgharness worker --queues grade")
    assert stalled(tx, run) == [one]
    world.register(tx)
    assert stalled(tx, run) == []


def test_stalled_work_sees_that_the_queue_was_lost(tx: Connection[Any]) -> None:
    world.add_instance(tx)
    run, _ = world.start(tx), world.register(tx)
    tx.execute("delete from procrastinate.procrastinate_jobs")
    requeue = f"queue it again: select pgharness.requeue_run({run});"
    assert stalled(tx, run) == [("it has work left and no job in the queue", requeue)]
    tx.execute("select pgharness.requeue_run(%s)", (run,))
    assert stalled(tx, run) == []


def test_stalled_work_waits_as_long_as_a_call_may_take(tx: Connection[Any]) -> None:
    world.add_instance(tx)
    run, worker = world.start(tx), world.register(tx)
    for seconds, problems in ((400, 0), (450, 1)):  # a call may take 120 seconds, and 300 more are allowed
        set_clock(tx, run, seconds)
        beat(tx, worker)
        assert len(stalled(tx, run)) == problems
    [(problem, remedy)] = stalled(tx, run)
    assert problem == "nothing succeeded or failed for longer than a call may take"
    assert f"select pgharness.requeue_run({run});" in remedy
    tx.execute("select pgharness.block_model(id, 60) from pgharness.models where name = 'simulator'")
    assert stalled(tx, run)[0][0].startswith('model "simulator" asked to wait until ')
    tx.execute("select pgharness.pause_run(%s)", (run,))
    assert stalled(tx, run) == []


# -- before the run


def workload(db: Connection[Any], instance: str = "trial") -> Row:
    [row] = rows(db, "select * from pgharness.expected_workload where instance = %s", instance)
    return row


def test_198_cases_are_990_notes_and_3960_grades(tx: Connection[Any]) -> None:
    world.add_instance(tx, cases=198, note_replications=5, grade_replications=2)
    assert pick(workload(tx), "case_count note_count grade_count problems") == (198, 990, 3960, [])


PLANS: list[tuple[tuple[str | None, ...], dict[str, Any]]] = [
    (("simulator",), {}),
    (("simulator", "exact_match", None), {"grade_replications": 3, "note_replications": 2}),
    (("simulator", "exact_match"), {"rubrics_per_case": 0, "grade_replications": 4}),
    (("simulator",), {"rubrics_per_case": 1, "cycle_transcript_overlaps": [0, 50, 100]}),
    ((None,), {"note_replications": 7, "rubrics_per_case": 9}),
]


@pytest.mark.parametrize(("graders", "columns"), PLANS)
def test_expected_workload_is_what_start_run_plans(
    tx: Connection[Any], graders: tuple[str | None, ...], columns: dict[str, Any]
) -> None:
    world.add_instance(tx, cases=3, combinations=[("simulator", grader) for grader in graders], **columns)
    expected, costs = workload(tx), rows(tx, "select * from pgharness.expected_costs order by combination_id")
    run = world.run_of(tx, world.start(tx))
    assert pick(expected, "note_count grade_count problems") == (*pick(run, "note_count grade_count"), [])
    notes = run["note_count"] // len(graders)
    planned = rows(tx, "select * from pgharness.run_combinations where run_id = %s order by number", run["id"])
    assert [pick(row, "combination note_count grade_count") for row in costs] == [
        (row["name"], notes, notes * row["grades_per_note"]) for row in planned
    ]


REFUSALS = {
    "delete from pgharness.instance_cases": "it has no cases",
    "delete from pgharness.model_combinations": "it has no model combinations",
    "update pgharness.rubrics set validation = 'refused' where author = 'bob' and case_name = 'trial-2'": (
        "1 of its cases lack accepted rubrics by 2 different human authors: trial-2"
    ),
    "update pgharness.rubrics set author = 'llm' where author = 'bob'": (
        "3 of its cases lack accepted rubrics by 2 different human authors: trial-1, trial-2, trial-3"
    ),
    "update pgharness.cases set target = null where name = 'trial-3'": (
        "1 of its cases have no target to grade against: trial-3"
    ),
}


@pytest.mark.parametrize("change", REFUSALS)
def test_expected_workload_names_what_start_run_refuses(tx: Connection[Any], change: str) -> None:
    world.add_instance(tx, cases=3, combinations=[("simulator", "simulator"), ("simulator", "contains")])
    assert workload(tx)["problems"] == []
    tx.execute(change.encode())
    assert workload(tx)["problems"] == [REFUSALS[change]]
    with world.refused(tx, "PH003", "trial"):
        world.start(tx)


def test_a_metric_that_needs_no_target_is_no_problem(tx: Connection[Any]) -> None:
    world.add_instance(tx, combinations=[("simulator", "regex")])
    tx.execute("update pgharness.cases set target = null")
    assert len(workload(tx)["problems"]) == 1
    tx.execute("""update pgharness.model_combinations set grader_parameters = '{"pattern": "x"}'""")
    assert workload(tx)["problems"] == []
    world.start(tx)


def test_costs_are_estimated_by_text_length_before_there_are_calls(tx: Connection[Any]) -> None:
    tx.execute(
        "insert into pgharness.models"
        " (name, provider, model, input_usd_per_million, output_usd_per_million, parameters)"
        """ values ('writer', 'openai', 'x', 2, 10, '{"max_tokens": 800}'), ('judge', 'openai', 'y', 3, 20, '{}'),"""
        " ('free', 'openai', 'z', null, null, '{}')"
    )
    prompts = {"note_system_prompt": "s" * 40, "note_prompt": "p" * 60, "grade_prompt": "g" * 80}
    pairs = [("writer", "judge"), ("free", "exact_match")]
    world.add_instance(tx, cases=4, combinations=pairs, note_replications=5, grade_system_prompt="", **prompts)
    case = value(tx, "select avg(length(input::text))::float8 from pgharness.cases")
    criteria = value(tx, "select avg(length(criteria::text))::float8 from pgharness.rubrics")
    note = ((100 + case) / 4 * 2 + 800 * 10) / 1e6
    grade = (((80 + criteria) / 4 + 800) * 3 + 500 * 20) / 1e6
    row = workload(tx)
    assert pick(row, "note_count grade_count cost_basis unpriced_models") == (40, 60, "text length", ["free"])
    assert float(row["note_cost_usd"]) == pytest.approx(20 * note, abs=1e-6)
    assert float(row["grade_cost_usd"]) == pytest.approx(40 * grade, abs=1e-6)
    assert row["cost_usd"] == row["note_cost_usd"] + row["grade_cost_usd"]
    tx.execute("update pgharness.instances set grade_prompt = '{{ case_text }}'")
    longer = 40 * ((15 - 80 + case) / 4 * 3) / 1e6
    assert float(workload(tx)["grade_cost_usd"]) == pytest.approx(40 * grade + longer, abs=1e-6)


def test_costs_are_estimated_by_past_calls_where_there_are_any(story: Story) -> None:
    def usd(model: str, kind: str) -> float:
        calls = [call for call in story.calls if (call.model, call.kind) == (model, kind)]
        spent = sum(call.input_tokens * 2 + call.output_tokens * 8 for call in calls) / 1e6
        return spent / sum(call.outcome == "succeeded" for call in calls)

    row, notes = workload(story.db, "story"), len(story.notes) / 3
    assert float(row["note_cost_usd"]) == pytest.approx(notes * (usd("a", "note") + 2 * usd("b", "note")), abs=1e-5)
    assert float(row["grade_cost_usd"]) == pytest.approx(notes * 8 * usd("judge", "grade"), abs=1e-5)
    assert row["cost_basis"] == "past calls"
    story.db.execute(
        "insert into pgharness.model_combinations (instance, generator, grader) values ('story', 'judge', 'a')"
    )
    assert workload(story.db, "story")["cost_basis"] == "past calls and text length"


# -- what holds for all views

MONITORING = [
    "select case_name from pgharness.eligible_cases",
    "select provider, model, cost_usd from pgharness.cost_by_model order by provider, model",
    "select note_count, grade_count, cost_usd, problems from pgharness.expected_workload where instance = 'story'",
    "select note_count, notes_succeeded, notes_failed from pgharness.run_progress where run_id = 1",
    "select case_name, status, created_at from pgharness.recent_activity where run_id = 1 limit 10",
    "select combination, mean_score, standard_error from pgharness.combination_scores where run_id = 1",
    "select case_name, rubric_author, normalised_score from pgharness.grade_results where run_id = 1",
    "select cause, calls_failed, items_failed, example_error from pgharness.failure_causes where run_id = 1",
    "select case_name, error from pgharness.failed_items where run_id = 1 and status = 'failed'",
    "select kind, case_name, replication from pgharness.outstanding_items where run_id = 1",
    "select model, cost_usd, latency_p50_ms from pgharness.model_performance where run_id = 1",
    "select host, pid, version, in_flight, seconds_since_heartbeat from pgharness.worker_health",
    "select queue, jobs_waiting, oldest_waiting_seconds from pgharness.queue_health",
    "select problem, remedy from pgharness.stalled_work",
]


@pytest.mark.parametrize("query", MONITORING)
def test_a_question_is_one_line(story: Story, query: str) -> None:
    assert story.run == 1
    set_clock(story.db, story.run, 100_000)  # by now nobody is there, so the run is stalled
    assert rows(story.db, query)


def test_the_reader_sees_in_every_view_what_the_owner_sees(story: Story) -> None:
    if not value(story.db, "select exists (select from pg_roles where rolname = 'pgharness_reader')"):
        pytest.skip("roles cannot be created on this server")
    story.db.execute("set local pgharness.fake_now = '2099-01-01'")
    views = [row["relname"] for row in rows(story.db, _VIEWS)]
    assert len(views) > 25
    seen = {view: rows(story.db, f"select * from pgharness.{view}") for view in views}
    story.db.execute("set local role pgharness_reader")
    assert {view: rows(story.db, f"select * from pgharness.{view}") for view in views} == seen


_VIEWS = "select relname from pg_class where relnamespace = 'pgharness'::regnamespace and relkind = 'v' order by 1"


# -- a run of 100,000 notes


@pytest.fixture(scope="module")
def big(server_url: str, template: str) -> Iterator[Connection[Any]]:
    """A run of which all is done but the last grade, made of its rows alone."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        pair = [("simulator", "exact_match")]
        world.add_instance(db, "big", cases=1000, combinations=pair, note_replications=100)
        assert world.start(db, "big") == 1
        db.execute(
            "insert into pgharness.notes"
            " (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output, created_at)"
            " select 1, o, o % 1000, 0, 100, o / 1000 + 1, 1, '\"\"', timestamptz '2026-01-01' + o * interval '2 ms'"
            " from generate_series(0, 99999) as o"
        )
        db.execute(
            "insert into pgharness.grades"
            " (run_id, note_ordinal, rubric_number, replication, ordinal, attempts, score, max_score, criteria, created_at)"
            " select 1, n.ordinal, 0, 1, n.ordinal, 1, n.ordinal % 2, 1, jsonb_build_array(repeat('why ', 100)), n.created_at + interval '1 ms'"
            " from pgharness.notes as n where n.ordinal < 99999"
        )
        db.execute(
            "insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, outcome, latency_ms, started_at)"
            " select 1, 'note', o * 10, 1, m.id, case when o % 1000 = 7 then 'timeout' else 'succeeded' end, o * 7919 % 50021, now()"
            " from generate_series(0, 49999) as o join pgharness.models as m on m.name = 'simulator'"
        )
        db.execute("update pgharness.runs set notes_succeeded = 100000, grades_succeeded = 99999")
        world.add_instance(db, "small", combinations=pair)
        assert world.start(db, "small") == 2
        world.work_off(db, world.register(db))
        db.execute("vacuum analyze")
        yield db


def explained(db: Connection[Any], query: str) -> Row:
    """Return the plan of a query that was run."""
    [found] = value(db, f"explain (analyze, buffers, costs off, timing off, format json) {query}")
    plan: Row = found["Plan"]
    return plan


def pages(plan: Row) -> int:
    """Return how many pages a query looked at."""
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


@pytest.mark.parametrize("condition", ["run_id = 1", "run = 'big/1'"])
def test_run_progress_reads_counters_alone(big: Connection[Any], condition: str) -> None:
    query = f"select * from pgharness.run_progress where {condition}"
    assert rows(big, query)[0]["notes_succeeded"] == 100_000  # and what follows reads no catalog
    assert pages(explained(big, query)) < 50


def test_recent_activity_reads_little_more_than_it_shows(big: Connection[Any]) -> None:
    query = "select * from pgharness.recent_activity where run_id = 1 limit 10"
    assert [row["kind"] for row in rows(big, query)] == ["note", "grade"] * 5
    notes = value(big, "select pg_relation_size('pgharness.notes') / current_setting('block_size')::integer")
    assert pages(explained(big, query)) < notes / 1.5


def test_outstanding_items_finds_the_one_of_200000(big: Connection[Any]) -> None:
    found = rows(big, "select * from pgharness.outstanding_items where run_id = 1")
    assert [pick(row, "kind ordinal") for row in found] == [("grade", 99999)]


def test_run_progress_reads_no_failures_but_those_that_wait(big: Connection[Any]) -> None:
    with big.transaction(force_rollback=True):
        big.execute(
            "insert into pgharness.failures (run_id, kind, ordinal, status, cause, error)"
            " select 1, 'grade', o, case when o % 1000 = 0 then 'waiting' else 'failed' end, 'refused', ''"
            " from generate_series(1, 20000) as o"
        )
        big.execute("analyze pgharness.failures")
        query = "select * from pgharness.run_progress where run_id = 1"
        assert rows(big, query)[0]["grades_waiting"] == 20
        assert pages(explained(big, query)) < 70


OF_RUNS = (
    "select table_name from information_schema.columns where table_schema = 'pgharness' and column_name = 'run_id'"
)


def test_a_small_run_is_read_without_the_big_one_beside_it(big: Connection[Any]) -> None:
    tables = " intersect select viewname from pg_views where schemaname = 'pgharness'"
    views = [row["table_name"] for row in rows(big, OF_RUNS + tables)]
    assert len(views) > 15
    for view in set(views) - {"outstanding_items"}:  # which may count the notes of all runs, if that is quicker
        query = f"select * from pgharness.{view} where run_id = 2"
        big.execute(query.encode())
        assert pages(explained(big, query)) < 250, view


@pytest.mark.parametrize("function", ["_score_sums", "_note_sums"])
def test_scores_are_read_from_the_index_of_grades(big: Connection[Any], function: str) -> None:
    grades = value(big, "select pg_relation_size('pgharness.grades') / current_setting('block_size')::integer")
    query = f"select * from pgharness.{function}(1)"
    assert len(rows(big, query)) == 1000
    assert pages(explained(big, query)) < grades / 2


def test_model_usage_does_not_look_for_calls_of_models_that_have_none(big: Connection[Any]) -> None:
    query = "select * from pgharness.model_usage"
    found = rows(big, query)
    assert {row["model"] for row in found} == {"simulator"} and sum(
        row["item_count"] for row in found
    ) == 1998  # of 2,000
    assert pages(explained(big, query)) < 200


def test_failure_causes_reads_the_calls_that_failed(big: Connection[Any]) -> None:
    big.execute("vacuum pgharness.failures")  # of what other tests rolled back
    query = "select * from pgharness.failure_causes where run_id = 1"
    assert [pick(row, "cause calls_failed") for row in rows(big, query)] == [("timeout", 50)]
    assert pages(explained(big, query)) < 50


def test_latencies_of_very_many_calls_are_those_of_a_sample(big: Connection[Any]) -> None:
    [row] = rows(big, "select * from pgharness.model_performance where run_id = 1")
    latencies = sorted(o * 7919 % 50021 for o in range(50_000) if o % 1000 != 7)
    assert row["calls_succeeded"] == len(latencies)
    for percent in (50, 90, 95, 99):
        exact = latencies[len(latencies) * percent // 100]
        assert float(row[f"latency_p{percent}_ms"]) == pytest.approx(exact, rel=0.04)


def test_the_first_page_of_outstanding_items_passes_over_what_is_done(big: Connection[Any]) -> None:
    with big.transaction(force_rollback=True):
        big.execute("delete from pgharness.notes where run_id = 1 and ordinal > 99000")
        query = "select * from pgharness.outstanding_items where run_id = 1 and kind = 'note' limit 100"
        assert [row["ordinal"] for row in rows(big, query)] == list(range(99001, 99101))
        notes = value(big, "select pg_relation_size('pgharness.notes_pkey') / current_setting('block_size')::integer")
        assert pages(explained(big, query)) < notes + 20_000
