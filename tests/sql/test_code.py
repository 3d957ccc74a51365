"""Runs of code in SQL alone: registering, starting, tasks, what they tell, crashes, limits, purging."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from psycopg import Connection
from psycopg.errors import DatabaseError

SCHEMA = {
    "type": "object",
    "properties": {"rounds": {"type": "integer", "minimum": 1, "default": 3}},
    "additionalProperties": False,
}

_GROUPS = itertools.count(1)


def one(db: Connection[Any], query: str, *values: object) -> Any:
    row = db.execute(query.encode(), values).fetchone()
    return row[0] if row is not None and len(row) == 1 else row


def register(db: Connection[Any], name: str = "dice", *, digest: str = "a", **limits: object) -> int:
    named = "".join(f", {limit} => %s" for limit in limits)
    return one(
        db,
        f"select pgharness.register_experiment(%s, 'Throws dice.', 'experiments.dice', 'dice', %s, 'source', %s::jsonb{named})",
        name,
        digest,
        json.dumps(SCHEMA),
        *limits.values(),
    )


def start(db: Connection[Any], **arguments: object) -> int:
    if not one(db, "select exists (select from pgharness.instances where name = 'dice-3')"):
        db.execute("insert into pgharness.instances (name, experiment, seed) values ('dice-3', 'dice', 42)")
    named = "".join(f", {name} => %s" for name in arguments)
    return one(db, f"select run_id from pgharness.start_run('dice-3'{named})", *arguments.values())


def worker(db: Connection[Any]) -> int:
    return one(db, "select pgharness.register_worker('host', 1, '0', '{task}', 4)")


def load(db: Connection[Any], worker_id: int, run_id: int, ordinals: Sequence[int] = (0,), epoch: int = 0) -> list[Any]:
    slice_ = json.dumps({"run_id": run_id, "epoch": epoch, "kind": "task", "ordinals": list(ordinals)})
    return db.execute(
        "select ordinal, attempt from pgharness.load_tasks(%s, %s::jsonb) order by 1", (worker_id, slice_)
    ).fetchall()


def record(db: Connection[Any], worker_id: int, run_id: int, *outcomes: dict[str, object]) -> str:
    return one(
        db, "select status from pgharness.record_tasks(%s, %s, %s::jsonb)", worker_id, run_id, json.dumps(outcomes)
    )


def tell(
    db: Connection[Any],
    worker_id: int,
    run_id: int,
    *rows: dict[str, object],
    lines: Sequence[tuple[int, int, str, str]] = (),
) -> str:
    at = "2026-01-01T00:00:00Z"
    told = [{"task": 0, "attempt": 1, "created_at": at} | row for row in rows]
    query = "select status from pgharness.record_told(%s, %s, 'me', %s, %s::jsonb, %s::jsonb)"
    number = next(_GROUPS)
    return one(db, query, worker_id, run_id, number, json.dumps([[*line, {}, at] for line in lines]), json.dumps(told))


def status(db: Connection[Any], run_id: int) -> Any:
    return one(db, "select status, reason from pgharness.runs where id = %s", run_id)


def jobs(db: Connection[Any], run_id: int) -> list[dict[str, Any]]:
    found = db.execute(
        "select args from procrastinate.procrastinate_jobs where (args ->> 'run_id')::bigint = %s and status = 'todo' order by id",
        (run_id,),
    )
    return [args for (args,) in found]


def test_a_version_is_registered_once(db: Connection[Any]) -> None:
    first = register(db)
    assert register(db) == first
    assert register(db, digest="b") != first
    assert one(db, "select version, kind from pgharness.experiment_list where experiment = 'dice'") == (2, "code")


def test_a_name_of_another_kind_is_refused(db: Connection[Any]) -> None:
    with pytest.raises(DatabaseError, match="is one of notes and grades"):
        register(db, "note_grade")


def test_a_bad_config_is_refused_by_the_insert(db: Connection[Any]) -> None:
    register(db)
    with pytest.raises(DatabaseError, match=r"config\.rounds"):
        db.execute(
            """insert into pgharness.instances (name, experiment, config) values ('bad', 'dice', '{"rounds": 0}')"""
        )


def test_a_run_of_code_is_one_task_and_one_job(db: Connection[Any]) -> None:
    register(db)
    run_id = start(db)
    assert jobs(db, run_id) == [
        {"run_id": run_id, "kind": "task", "epoch": 0, "experiment": "dice", "ordinals": [0], "depth": 0}
    ]
    assert one(db, "select task_count, status, percent_done from pgharness.run_progress where run_id = %s", run_id) == (
        1,
        "running",
        0,
    )
    assert one(
        db,
        "select definition -> 'config' ->> 'rounds', definition -> 'code' ->> 'version' from pgharness.run_definitions where run_id = %s",
        run_id,
    ) == ("3", "1")


def test_a_run_ends_with_its_function(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    assert load(db, worker_id, run_id) == [(0, 1)]
    assert (
        record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "succeeded", "result": 7}) == "completed"
    )
    assert one(db, "select result, status from pgharness.task_results where run_id = %s", run_id) == (7, "succeeded")
    assert (
        record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "failed", "error": "late"}) == "completed"
    )


def test_items_are_planned_once_and_known_by_their_keys(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    add = "select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', %s)"
    assert one(db, add, run_id, '[["a", "A"], ["b", "B"]]') == 2
    assert load(db, worker_id, run_id, [1]) == [(1, 1)]
    record(db, worker_id, run_id, {"ordinal": 1, "attempt": 1, "status": "succeeded", "result": {"x": 1}})
    assert one(db, add, run_id, '[["a", "A"], ["b", "B"], ["c", "C"]]') == 1
    assert one(db, "select task_count from pgharness.runs where id = %s", run_id) == 4
    state = one(db, "select status, are_done from pgharness.map_state(%s, '{0,0}', '{score,other}')", run_id)
    assert state == ("running", [False, True])
    assert db.execute("select key, result from pgharness.map_results(%s, 0, 'score')", (run_id,)).fetchall() == [
        ("a", '{"x": 1}')
    ]
    with pytest.raises(DatabaseError, match='map "score" has an item "a" already'):
        one(db, add, run_id, '[["a", "other"]]')


def test_what_a_superseded_try_sends_is_dropped(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    tell(db, worker_id, run_id, {"kind": "result", "key": "k", "value": 1}, lines=[(0, 1, "info", "first")])
    assert load(db, worker_id, run_id) == [(0, 2)]  # begun anew after a crash: its result is taken back, its log stays
    tell(db, worker_id, run_id, {"kind": "result", "key": "k", "value": 2}, lines=[(0, 1, "info", "late")])
    tell(db, worker_id, run_id, {"kind": "result", "key": "k", "value": 3, "attempt": 2})
    assert record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "succeeded"}) == "running"
    assert db.execute("select value from pgharness.results where run_id = %s", (run_id,)).fetchall() == [(3,)]
    assert [
        m for (m,) in db.execute("select message from pgharness.run_log where run_id = %s order by id", (run_id,))
    ] == ["started", "first", "late"]
    with pytest.raises(DatabaseError, match="is not running any more"):
        db.execute("""select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', '[["a", 1]]')""", (run_id,))


def test_all_kinds_of_what_is_told_are_read_in_views(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    tell(
        db,
        worker_id,
        run_id,
        {"kind": "result", "key": "k", "value": None},
        {"kind": "result", "key": "k", "value": {"deep": [1]}},
        {"kind": "metric", "name": "accuracy", "number": 0.5, "metric_type": "accuracy", "step": 2, "data": None},
        {"kind": "timing", "operation": "load", "duration_ms": 12.5},
        {"kind": "llm_call", "model": "m", "input": "hi", "output": "ho", "duration_ms": 3.0, "error": None},
        {"kind": "progress", "position": 1, "total": 4, "message": "a"},
        {"kind": "progress", "position": 3, "total": None, "message": None},
    )
    assert one(db, "select value from pgharness.run_results where run_id = %s", run_id) == {"deep": [1]}
    assert one(db, "select name, value, metric_type, step from pgharness.run_metrics where run_id = %s", run_id) == (
        "accuracy",
        0.5,
        "accuracy",
        2,
    )
    assert one(db, "select operation, duration_ms from pgharness.run_timings where run_id = %s", run_id) == (
        "load",
        12.5,
    )
    assert one(db, "select model, input, output from pgharness.run_llm_calls where run_id = %s", run_id) == (
        "m",
        "hi",
        "ho",
    )
    db.execute("select pgharness.keep_artifact(%s, 'other', 1, 0, 1, 'a.txt', 'text/plain', 'abc')", (run_id,))
    assert one(db, "select name, size_bytes from pgharness.run_artifacts where run_id = %s", run_id) == ("a.txt", 3)


def test_progress_is_what_the_code_says(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    tell(db, worker_id, run_id, {"kind": "progress", "position": 1, "total": 4, "message": "a"})
    tell(db, worker_id, run_id, {"kind": "progress", "position": 3, "total": None, "message": "b"})
    assert one(
        db, "select percent_done, position, total, message from pgharness.run_progress where run_id = %s", run_id
    ) == (75, 3, 4, "b")


def test_a_failed_item_is_tried_again_while_it_has_attempts_left(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    db.execute("""select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', '[["a", 1]]', retries => 1)""", (run_id,))
    for attempt in (1, 2):
        assert load(db, worker_id, run_id, [1]) == [(1, attempt)]
        record(db, worker_id, run_id, {"ordinal": 1, "attempt": attempt, "status": "failed", "error": "no"})
        assert load(db, worker_id, run_id, [1]) == []  # not before its next try is due
        db.execute("select set_config('pgharness.fake_now', (now() + interval '1 hour')::text, false)")
    assert load(db, worker_id, run_id, [1]) == []
    assert one(db, "select status, failures from pgharness.task_results where run_id = %s and ordinal = 1", run_id) == (
        "failed",
        2,
    )
    db.execute("select pgharness.retry_failed(%s)", (run_id,))
    assert load(db, worker_id, run_id, [1]) == [(1, 3)]


def test_a_completed_run_with_failed_items_ends_again_when_they_are_retried(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    db.execute("""select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', '[["a", 1], ["b", 2]]')""", (run_id,))
    load(db, worker_id, run_id, [1, 2])
    ends = [
        {"ordinal": 1, "attempt": 1, "status": "failed", "error": "no"},
        {"ordinal": 2, "attempt": 1, "status": "succeeded"},
    ]
    record(db, worker_id, run_id, *ends)
    assert record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "succeeded"}) == "completed"
    db.execute("select pgharness.retry_failed(%s)", (run_id,))
    assert one(db, "select task_count, tasks_succeeded, tasks_failed from pgharness.runs where id = %s", run_id) == (
        3,
        1,
        0,
    )
    assert sorted(job["ordinals"] for job in jobs(db, run_id)) == [[0], [1]]
    assert load(db, worker_id, run_id, [0, 1], epoch=1) == [(0, 2), (1, 2)]
    record(db, worker_id, run_id, {"ordinal": 1, "attempt": 2, "status": "succeeded"})
    assert record(db, worker_id, run_id, {"ordinal": 0, "attempt": 2, "status": "succeeded"}) == "completed"
    assert one(db, "select tasks_succeeded, tasks_failed from pgharness.runs where id = %s", run_id) == (3, 0)


def test_a_group_that_is_sent_again_counts_once(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    told = json.dumps(
        [{"kind": "result", "key": "k", "value": 1, "task": 0, "attempt": 1, "created_at": "2026-01-01T00:00:00Z"}]
    )
    query = "select status from pgharness.record_told(%s, %s, 'me', %s, '[]', %s::jsonb)"
    for number in (1, 1, 2, 1):
        assert one(db, query, worker_id, run_id, number, told) == "running"
    assert one(db, "select count(*) from pgharness.results where run_id = %s", run_id) == 2


def test_a_crash_fails_the_run_when_its_function_reaches_the_limit(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    assert one(db, "select pgharness.lose_tasks(%s, '{0}', '{1}', 'killed', 2)", run_id) == []
    assert one(db, "select pgharness.lose_tasks(%s, '{0}', '{1}', 'killed', 2)", run_id) == []  # said twice
    assert status(db, run_id) == ("running", None)
    assert load(db, worker_id, run_id) == [(0, 2)]
    assert (
        one(db, "select pgharness.lose_tasks(%s, '{0}', '{1}', 'killed', 1)", run_id) == []
    )  # of a try that was superseded
    assert one(db, "select pgharness.lose_tasks(%s, '{0}', '{2}', 'killed', 2)", run_id) == [0]
    assert status(db, run_id) == ("failed", "killed")
    with pytest.raises(DatabaseError, match="already failed: killed"), db.transaction():
        db.execute("select pgharness.resume_run(%s)", (run_id,))
    db.execute("select pgharness.retry_failed(%s)", (run_id,))
    assert status(db, run_id) == ("running", None)
    assert [job["ordinals"] for job in jobs(db, run_id)] == [[0]]


def test_a_cancelled_run_resumes_with_what_it_has_done(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    db.execute("""select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', '[["a", 1], ["b", 2]]')""", (run_id,))
    load(db, worker_id, run_id, [1])
    record(db, worker_id, run_id, {"ordinal": 1, "attempt": 1, "status": "succeeded"})
    db.execute("select pgharness.cancel_run(%s)", (run_id,))
    assert jobs(db, run_id) == []
    assert record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "succeeded"}) == "cancelled"
    db.execute("select pgharness.resume_run(%s)", (run_id,))
    assert sorted(job["ordinals"] for job in jobs(db, run_id)) == [[0], [2]]


def add(db: Connection[Any], run_id: int, parent: int, count: int) -> list[tuple[int, int, int]]:
    """Add items to a map of a task, and return the slices that are new: of which depth, from where to where."""
    known = len(jobs(db, run_id))
    items = json.dumps([[str(number), number] for number in range(count)])
    db.execute("select pgharness.add_tasks(%s, %s, 1, 'score', 'm:score', %s)", (run_id, parent, items))
    return [(job["depth"], job["first"], job["last"]) for job in jobs(db, run_id)[known:]]


def test_slices_are_of_one_depth_and_as_large_as_keeps_everybody_busy(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    assert add(db, run_id, 0, 40) == [(1, first, first + 4) for first in range(1, 41, 5)]
    load(db, worker_id, run_id, [1])
    assert add(db, run_id, 1, 3) == [(2, 41, 43)], "there is enough to do beside"
    for ordinals in (range(2, 41), range(41, 44)):
        load(db, worker_id, run_id, ordinals)
        outcomes = [{"ordinal": each, "attempt": 1, "status": "succeeded"} for each in ordinals]
        record(db, worker_id, run_id, *outcomes)
    db.execute("update pgharness.tasks set status = 'waiting', attempts = 1, finished_at = null where ordinal = 41")
    assert add(db, run_id, 41, 3) == [(3, 44, 44), (3, 45, 45), (3, 46, 46)]
    assert one(db, "select array_agg(distinct depth order by depth) from pgharness.tasks") == [0, 1, 2, 3]


def test_what_is_queued_anew_is_apart_by_depth_and_taken_by_depth(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    add(db, run_id, 0, 30)
    load(db, worker_id, run_id, [1])
    add(db, run_id, 1, 2)
    db.execute("select pgharness.pause_run(%s)", (run_id,))
    db.execute("select pgharness.resume_run(%s)", (run_id,))
    expected = [(2, [31, 32]), (1, list(range(1, 21))), (1, list(range(21, 31))), (0, [0])]
    assert [(job["depth"], job["ordinals"]) for job in jobs(db, run_id)] == expected
    take = "select (args -> 'depth')::integer from pgharness.take_job('{task}', null, except_depths => %s::jsonb)"
    assert one(db, take, json.dumps({str(run_id): [2, 1]})) == 0
    assert one(db, take, json.dumps({str(run_id): [2]})) == 1
    assert one(db, take, json.dumps({str(run_id + 1): [2]})) == 2
    assert one(db, take, json.dumps({str(run_id): [1]})) is None


def test_a_run_past_its_time_fails(db: Connection[Any]) -> None:
    register(db, timeout_seconds=60)
    run_id, worker_id = start(db), worker(db)
    db.execute("select set_config('pgharness.fake_now', (now() + interval '2 hours')::text, false)")
    assert one(db, "select pgharness.expire_runs()") == 0  # it waits for a worker
    load(db, worker_id, run_id)
    assert one(db, "select pgharness.expire_runs()") == 0
    db.execute("select set_config('pgharness.fake_now', (now() + interval '2 hours 61 seconds')::text, false)")
    assert one(db, "select pgharness.expire_runs()") == 1
    assert status(db, run_id) == ("failed", "it ran for longer than its 60 seconds")


def test_a_run_that_logs_too_much_fails(db: Connection[Any]) -> None:
    register(db, log_mb=1)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    assert tell(db, worker_id, run_id, lines=[(0, 1, "info", "x" * 600_000)]) == "running"
    assert tell(db, worker_id, run_id, lines=[(0, 1, "info", "x" * 600_000)]) == "failed"
    assert tell(db, worker_id, run_id, lines=[(0, 1, "info", "x" * 600_000)]) == "failed"
    assert status(db, run_id) == ("failed", "it logged more than its 1 MB")
    assert one(db, "select count(*) from pgharness.logs where run_id = %s and task = 0", run_id) == 2


def test_a_call_is_costed_and_pauses_at_the_budget(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db, budget_usd=0.5), worker(db)
    load(db, worker_id, run_id)
    model = one(db, "select id from pgharness.models where name = 'simulator'")
    call = {
        "model_id": model,
        "outcome": "succeeded",
        "cost_usd": 0.3,
        "latency_ms": 5,
        "started_at": "2026-01-01T00:00:00Z",
    }
    assert tell(db, worker_id, run_id, {"kind": "call", "call": call}) == "running"
    assert tell(db, worker_id, run_id, {"kind": "call", "call": call}) == "running"  # sent again: counted once
    assert (
        tell(db, worker_id, run_id, {"kind": "call", "call": call | {"started_at": "2026-01-01T00:00:01Z"}}) == "paused"
    )
    assert one(db, "select cost_usd from pgharness.run_progress where run_id = %s", run_id) == Decimal("0.6")
    assert one(db, "select kind, call_count from pgharness.model_performance where run_id = %s", run_id) == ("task", 2)


def test_a_rerun_of_code_repeats_its_config(db: Connection[Any]) -> None:
    register(db)
    run_id = start(db)
    db.execute("""update pgharness.instances set config = '{"rounds": 9}'""")
    again = one(db, "select run_id from pgharness.rerun(%s)", run_id)
    assert (
        one(db, "select definition -> 'config' ->> 'rounds' from pgharness.run_definitions where run_id = %s", again)
        == "3"
    )
    assert [job["ordinals"] for job in jobs(db, again)] == [[0]]


def test_code_that_no_worker_has_is_said_to_wait(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    assert (
        one(db, "select problem from pgharness.stalled_work where run_id = %s", run_id)
        == 'no running worker has the code of experiment "dice"'
    )
    db.execute("select pgharness.serve_experiments(%s, '{dice}')", (worker_id,))
    assert one(db, "select count(*) from pgharness.stalled_work where run_id = %s", run_id) == 0
    assert one(db, "select is_served from pgharness.experiment_list where experiment = 'dice'") is True
    take = "select (args ->> 'run_id')::bigint from pgharness.take_job('{task}', null, experiments => %s)"
    assert one(db, take, ["other"]) is None
    assert one(db, take, ["dice"]) == run_id


def test_trials_are_purged_and_milestones_kept(db: Connection[Any]) -> None:
    register(db)
    worker_id = worker(db)
    runs = [start(db, kind=kind) for kind in ("trial", "trial", "milestone", "trial")]
    for run_id in runs:
        load(db, worker_id, run_id)
        db.execute(
            "select pgharness.keep_artifact(%s, 'other', 1, 0, 1, 'a', 'text/plain', %s)",
            (run_id, f"{run_id % 2}".encode()),
        )
        record(db, worker_id, run_id, {"ordinal": 0, "attempt": 1, "status": "succeeded"})
    assert one(db, "select pgharness.purge_trials('dice-3')") == 2
    assert [id for (id,) in db.execute("select id from pgharness.runs order by id")] == runs[2:]
    with pytest.raises(DatabaseError, match="is a milestone, which is kept"), db.transaction():
        db.execute("delete from pgharness.runs")
    db.execute("set pgharness.deletes_milestones = on")
    db.execute("delete from pgharness.runs")
    assert one(db, "select count(*) from pgharness.artifact_contents") == 0


def test_every_view_reads_a_database_with_a_run_of_code(db: Connection[Any]) -> None:
    register(db)
    run_id, worker_id = start(db), worker(db)
    load(db, worker_id, run_id)
    db.execute("""select pgharness.add_tasks(%s, 0, 1, 'score', 'm:score', '[["a", 1]]')""", (run_id,))
    views = db.execute(
        "select relname from pg_class where relnamespace = 'pgharness'::regnamespace and relkind = 'v'"
    ).fetchall()
    assert len(views) > 20
    for (view,) in views:
        db.execute(f"select * from pgharness.{view}".encode())
    assert one(db, "select code from pgharness.run_provenance where run_id = %s", run_id) is None
