"""Batches in the database: which items are gathered, when a batch is closed, who holds it, and what each state allows."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

import world
from world import add_instance, orphans, refused, rows, start, value

Database = psycopg.Connection[Any]
START = "2026-01-01 00:00:00+00"
HOUR = 3_600.0


@pytest.fixture
def db(tx: Database) -> Database:
    at(tx, 0)
    tx.execute(
        "insert into pgharness.models (name, provider, model) values ('gpt', 'openai', 'gpt'), ('claude', 'anthropic', 'claude')"
    )
    tx.execute(
        "insert into pgharness.models (name, provider, model, base_url, has_batches)"
        " values ('local', 'openai_compatible', 'm', 'http://localhost', true)"
    )
    return tx


def at(db: Database, seconds: float) -> None:
    """Set the clock, in seconds since the start."""
    db.execute(
        "select set_config('pgharness.fake_now', (%s::timestamptz + make_interval(secs => %s))::text, false)",
        (START, seconds),
    )


def begin(db: Database, *, cases: int = 4, generator: str = "gpt", grader: str | None = None, **columns: object) -> int:
    """Start a run that asks in batches."""
    options = {"batch_deadline_seconds": HOUR, "retry_delay_seconds": 0} | columns
    add_instance(db, cases=cases, combinations=[(generator, grader)], **options)
    return start(db)


def slices(db: Database, worker: int) -> list[world.Row]:
    """Take what is queued; return the items that are left for live calls."""
    live = []
    while (job := world.take(db, worker)) is not None:
        live += world.load(db, worker, job["args"])
        world.finish(db, job)
    return live


def following(db: Database, worker: int, kinds: str = "{note,grade}") -> Any:
    return value(db, "select pgharness.next_batch(%s, %s)", worker, kinds)


def states(db: Database) -> list[tuple[str, int]]:
    found = rows(db, "select status, requests from pgharness.batches_progress order by batch_id")
    return [(row["status"], row["requests"]) for row in found]


def submit(db: Database, worker: int, external_id: str = "batch_x") -> int:
    """Take a batch as far as its vendor; its id."""
    batch = following(db, worker)
    db.execute("select pgharness.begin_submission(%s, %s, %s)", (worker, batch["id"], batch["request_count"]))
    db.execute("select pgharness.record_submission(%s, %s, %s)", (worker, batch["id"], external_id))
    return int(batch["id"])


# -- gathering


@pytest.mark.parametrize("generator", ["gpt", "claude", "local"])
def test_items_of_models_with_batches_are_gathered_and_not_handed_out(db: Database, generator: str) -> None:
    begin(db, generator=generator)
    worker = world.register(db)
    assert slices(db, worker) == []
    assert states(db) == [("planned", 4)]
    assert value(db, "select count(*) from pgharness._missing(1, 'note', '{0,1,2,3}')") == 0
    assert orphans(db) == []


def test_a_slice_that_is_loaded_again_gathers_nothing_twice(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    job = world.take(db, worker)
    assert job is not None
    for _ in range(2):
        assert world.load(db, worker, job["args"]) == []
    assert states(db) == [("planned", 1)]


def test_a_simulator_and_a_gemini_are_asked_live(db: Database) -> None:
    db.execute("insert into pgharness.models (name, provider, model) values ('gemini', 'gemini', 'g')")
    db.execute("update pgharness.models set has_batches = false where name = 'claude'")
    worker = world.register(db)
    for generator in ("simulator", "gemini", "claude"):
        options = {"combinations": [(generator, None)], "batch_deadline_seconds": HOUR}
        add_instance(db, generator, cases=2, **options)  # type: ignore[arg-type]
        start(db, generator)
        assert len(slices(db, worker)) == 2
    assert states(db) == []


def test_only_providers_with_batches_may_be_said_to_have_them(db: Database) -> None:
    with refused(db, "PH002", 'model "simulator" of provider simulator has no batches'):
        db.execute("update pgharness.models set has_batches = true where name = 'simulator'")
    with refused(db, "23514", "batch_deadline_seconds is 0"):
        begin(db, batch_deadline_seconds=0)


def test_a_batch_that_is_full_is_closed_and_another_one_begun(db: Database) -> None:
    db.execute(
        "create or replace function pgharness._most_requests(provider text) returns integer language sql immutable"
        " set search_path = pgharness, pg_temp as 'select 3'"
    )
    begin(db, cases=8)
    worker = world.register(db)
    slices(db, worker)
    assert states(db) == [("uploading", 3), ("uploading", 3), ("planned", 2)]
    assert following(db, worker)["request_count"] == 3


def test_after_the_deadline_everything_is_live(db: Database) -> None:
    begin(db)
    at(db, HOUR)
    assert len(slices(db, world.register(db))) == 4


def test_an_item_waits_for_its_next_try_outside_of_any_batch(db: Database) -> None:
    run = begin(db, cases=1, retry_delay_seconds=60)
    worker = world.register(db)
    slices(db, worker)
    world.record(db, worker, world.failure(run, "note", 0, batch_id=following_id(db)))
    (job,) = world.jobs(db)
    assert world.load(db, worker, job["args"]) == []
    assert value(db, "select count(*) from pgharness.batch_items") == 0
    at(db, 200)
    assert world.load(db, worker, job["args"]) == []
    assert value(db, "select count(*) from pgharness.batch_items") == 1


def following_id(db: Database) -> int:
    return int(value(db, "select max(id) from pgharness.batches"))


def test_grades_of_notes_are_queued_for_batches_even_if_the_worker_makes_grades(db: Database) -> None:
    run = begin(db, grader="claude", rubrics_per_case=1)
    worker = world.register(db)
    slices(db, worker)
    batch = following_id(db)
    outcomes = [world.note(run, ordinal, batch_id=batch) for ordinal in range(4)]
    found = rows(
        db, "select * from pgharness.record_outcomes(%s, %s, keeps_grades => true)", worker, world.json.dumps(outcomes)
    )
    assert found[0]["kept_notes"] is None
    assert slices(db, worker) == []
    assert states(db) == [("planned", 4), ("planned", 4)]
    assert value(db, "select succeeded from pgharness.batches_progress where batch_id = %s", batch) == 4


# -- closing


def test_a_batch_is_closed_when_nothing_is_left_that_could_join_it(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    slices(db, worker)
    assert following(db, worker) is None
    at(db, 2)
    assert following(db, worker)["status"] == "uploading"


@pytest.mark.parametrize(("seconds", "is_ready"), [(30, False), (61, True)])
def test_a_batch_waits_for_a_busy_run_for_a_minute(db: Database, seconds: float, is_ready: bool) -> None:
    begin(db, batch_deadline_seconds=24 * HOUR)
    worker = world.register(db)
    job = world.take(db, worker)
    assert job is not None
    world.load(db, worker, job["args"])
    at(db, seconds)
    assert (following(db, worker) is not None) is is_ready


def test_a_batch_that_items_keep_joining_is_closed_after_a_tenth_of_its_deadline(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    taken = [world.take(db, worker) for _ in range(4)]
    for number, job in enumerate(taken):
        at(db, number * 50)
        assert job is not None
        world.load(db, worker, job["args"])
        assert following(db, worker) is None
    at(db, 201)
    assert following(db, worker) is None
    db.execute("update pgharness.batches set gathered_at = pgharness.clock() + interval '170 seconds'")
    at(db, 361)
    assert following(db, worker) is not None


# -- holding


def test_one_worker_holds_a_batch_until_it_lets_go_or_dies(db: Database) -> None:
    begin(db)
    first, second = world.register(db), world.register(db, pid=2)
    slices(db, first)
    at(db, 2)
    batch = following(db, first)
    assert (batch["is_repeated"], batch["is_wanted"], batch["model"]["name"]) == (False, True, "gpt")
    assert following(db, second) is None
    with refused(db, "PH005", "is not held by worker"):
        db.execute("select pgharness.release_batch(%s, %s)", (second, batch["id"]))
    db.execute("select pgharness.lose_worker('host', 1)")
    taken = following(db, second)
    assert (taken["id"], taken["is_repeated"]) == (batch["id"], True)
    with refused(db, "PH005"):
        db.execute("select pgharness.begin_submission(%s, %s, 4)", (first, batch["id"]))


def test_a_worker_takes_again_what_it_holds_and_is_not_busy_with(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = following(db, worker)
    assert value(db, "select pgharness.next_batch(%s, '{note}', %s)", worker, [batch["id"]]) is None
    assert value(db, "select pgharness.next_batch(%s, '{note}')", worker)["id"] == batch["id"]
    assert value(db, "select pgharness.next_batch(%s, '{grade}')", worker) is None


def test_a_step_that_failed_is_due_later_and_later(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    slices(db, worker)
    now, waits = 2.0, []
    for _ in range(6):
        at(db, now)
        batch = following(db, worker)
        db.execute("select pgharness.release_batch(%s, %s, 'status 503')", (worker, batch["id"]))
        waits.append(float(value(db, "select extract(epoch from due_at - pgharness.clock()) from pgharness.batches")))
        now += waits[-1]
    for number, wait in enumerate(waits):
        assert 0.5 * 5 * 2**number <= wait <= 1.5 * 5 * 2**number
    assert value(db, "select error from pgharness.batches_progress") == "status 503"


def test_what_was_submitted_twice_belongs_to_whoever_is_certain(db: Database) -> None:
    begin(db, generator="claude")
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = following(db, worker)
    db.execute("select pgharness.begin_submission(%s, %s, 4)", (worker, batch["id"]))
    db.execute("select pgharness.record_submission(%s, %s, 'msg', is_ours => false)", (worker, batch["id"]))
    at(db, HOUR + 5)
    assert not following(db, worker)["needs_cancel"]  # it may be somebody else's
    at(db, 5)
    begin(db, name="other", generator="claude")  # type: ignore[arg-type]
    start(db, "other")
    slices(db, worker)
    at(db, 8)
    other = following(db, worker, "{note}")
    while other["id"] == batch["id"]:
        db.execute("select pgharness.record_poll(%s, %s, false)", (worker, batch["id"]))
        other = following(db, worker, "{note}")
    db.execute("select pgharness.begin_submission(%s, %s, 4)", (worker, other["id"]))
    db.execute("select pgharness.record_submission(%s, %s, 'msg')", (worker, other["id"]))
    found = rows(db, "select status, external_id, is_ours from pgharness.batches where id = %s", batch["id"])
    assert found == [{"status": "submitting", "external_id": None, "is_ours": None}]


def test_who_lost_a_batch_whose_submission_was_found_has_lost_nothing(db: Database) -> None:
    """It may have been slow; were it refused, it would cancel what another one waits for."""
    begin(db, generator="claude")
    one, two = world.register(db, pid=1), world.register(db, pid=2)
    slices(db, one)
    at(db, 2)
    batch = following(db, one)
    db.execute("select pgharness.begin_submission(%s, %s, 4)", (one, batch["id"]))
    db.execute("update pgharness.batches set worker_id = %s where id = %s", (two, batch["id"]))
    db.execute("select pgharness.record_submission(%s, %s, 'msg', is_ours => false)", (two, batch["id"]))
    for _ in range(2):
        db.execute("select pgharness.record_submission(%s, %s, 'msg')", (one, batch["id"]))
    found = rows(db, "select status, external_id, is_ours from pgharness.batches where id = %s", batch["id"])
    assert found == [{"status": "submitted", "external_id": "msg", "is_ours": True}]
    with world.refused(db, "PH005"):
        db.execute("select pgharness.record_submission(%s, %s, 'other')", (one, batch["id"]))


# -- ending


def test_what_a_batch_leaves_unanswered_is_queued_again_and_spends_nothing(db: Database) -> None:
    run = begin(db, failure_threshold=1)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = submit(db, worker)
    at(db, 20)
    assert following(db, worker)["id"] == batch
    db.execute("select pgharness.record_poll(%s, %s, true, '{file-1}')", (worker, batch))
    assert following(db, worker)["result_files"] == ["file-1"]
    world.record(db, worker, world.note(run, 0, batch_id=batch), world.lost(run, "note", 1) | {"batch_id": batch})
    db.execute("select pgharness.finish_batch(%s, %s)", (worker, batch))
    found = rows(db, "select status, succeeded, failed, unanswered from pgharness.batches_progress")
    assert found == [{"status": "collected", "succeeded": 1, "failed": 1, "unanswered": 2}]
    assert orphans(db) == []
    assert slices(db, worker) == []
    assert states(db)[1] == ("planned", 2)
    assert value(db, "select count(*) from pgharness.failures") == 1


def test_an_outcome_from_a_batch_that_the_item_has_left_counts_for_nothing(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    batch = following_id(db)
    late = world.note(run, 0, batch_id=batch + 100)
    world.record(db, worker, late)
    assert value(db, "select count(*) from pgharness.notes") == value(db, "select count(*) from pgharness.calls") == 0
    world.record(db, worker, world.note(run, 0, batch_id=batch))
    world.record(db, worker, world.note(run, 0, batch_id=batch))
    assert value(db, "select count(*) from pgharness.calls where batch_id = %s", batch) == 1
    assert orphans(db) == []


def test_a_batch_that_failed_leaves_its_model_to_live_calls(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = following(db, worker)
    db.execute("select pgharness.finish_batch(%s, %s, 'status 404', has_failed => true)", (worker, batch["id"]))
    assert len(slices(db, worker)) == 4
    assert states(db) == [("failed", 4)]


def test_a_run_that_is_stopped_dissolves_what_no_vendor_has(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    db.execute("select pgharness.pause_run(%s)", (run,))
    assert following(db, worker) is None
    assert states(db) == [("cancelled", 4)]
    assert world.jobs(db) == []
    db.execute("select pgharness.resume_run(%s)", (run,))
    assert orphans(db) == []
    slices(db, worker)
    assert states(db) == [("cancelled", 4), ("planned", 4)]


def test_a_submission_that_nobody_wants_any_more_does_not_begin(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = following(db, worker)
    db.execute("select pgharness.cancel_run(%s)", (run,))
    assert value(db, "select pgharness.begin_submission(%s, %s, 4)", worker, batch["id"]) is False
    db.execute("select pgharness.finish_batch(%s, %s)", (worker, batch["id"]))
    assert states(db) == [("cancelled", 4)]


def test_a_cancelled_run_has_its_batches_cancelled_at_once(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = submit(db, worker)
    assert following(db, worker) is None
    db.execute("select pgharness.cancel_run(%s)", (run,))
    found = following(db, worker)
    assert (found["id"], found["needs_cancel"]) == (batch, True)
    db.execute("select pgharness.record_poll(%s, %s, false, is_cancelling => true)", (worker, batch))
    at(db, 30)
    assert not following(db, worker)["needs_cancel"]  # it was asked


# -- what others see of it


def test_a_run_whose_items_are_all_in_batches_is_neither_stalled_nor_swept(db: Database) -> None:
    begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 600)
    db.execute("update pgharness.workers set heartbeat_at = pgharness.clock()")
    submit(db, worker)
    assert value(db, "select count(*) from pgharness.stalled_work") == 0
    assert value(db, "select pgharness.sweep()") == 0
    at(db, HOUR / 2)
    db.execute("update pgharness.workers set heartbeat_at = pgharness.clock()")
    assert "nothing succeeded or failed" in value(
        db, "select problem from pgharness.stalled_work"
    )  # nobody asks the vendor


def test_the_speed_of_a_model_is_that_of_its_live_calls(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    model = value(db, "select id from pgharness.models where name = 'gpt'")
    slow = world.call(model_id=model, latency_ms=3_600_000)
    world.record(db, worker, world.note(run, 0, batch_id=following_id(db), calls=[slow]))
    assert value(db, "select pgharness._item_seconds(%s, 'note')", run) is None


def test_a_rerun_and_a_copy_ask_as_the_first_did(db: Database) -> None:
    run = begin(db)
    db.execute("select pgharness.cancel_run(%s)", (run,))
    db.execute("select pgharness.rerun(%s)", (run,))
    db.execute("select pgharness.clone_instance('trial', 'copy')")
    assert value(db, "select batch_deadline_seconds from pgharness.instances where name = 'copy'") == HOUR
    live = start(db, batch_deadline_seconds=0)
    db.execute("select pgharness.rerun(%s)", (live,))
    deadlines = rows(db, "select batch_deadline_seconds as seconds from pgharness.runs order by id")
    assert [row["seconds"] for row in deadlines] == [HOUR, HOUR, None, None]


def test_a_run_is_not_archived_while_a_vendor_has_a_batch_of_it(db: Database) -> None:
    run = begin(db)
    worker = world.register(db)
    slices(db, worker)
    at(db, 2)
    batch = submit(db, worker)
    db.execute("select pgharness.cancel_run(%s)", (run,))
    with refused(db, "PH003", "a vendor still has a batch of it", "batches_progress"):
        db.execute("select pgharness.open_archive('trial/1')")
    following(db, worker)
    db.execute("select pgharness.finish_batch(%s, %s)", (worker, batch))
    assert value(db, "select pgharness.open_archive('trial/1') is not null")
