"""Two and three connections, step by step: whoever comes second waits, sees what the first did, and nothing is orphaned."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import psycopg
import pytest
from psycopg import Connection

from world import (
    Row,
    add_instance,
    call,
    clear,
    failure,
    finish,
    grade,
    jobs,
    load,
    lost,
    note,
    orphans,
    record,
    register,
    rows,
    run_of,
    start,
    succeeded,
    take,
    value,
    words,
    work_off,
)

Database = Connection[Any]
T = TypeVar("T")


class Person:
    """Somebody with a connection of their own, who may have to wait."""

    def __init__(self, url: str) -> None:
        self.db: Database = psycopg.connect(url)
        self._thread = ThreadPoolExecutor(1)

    def try_to(self, action: Callable[[Database], T]) -> Future[T]:
        """Do something that may block, without waiting for it."""
        return self._thread.submit(action, self.db)

    def does(self, action: Callable[[Database], T]) -> T:
        """Do something that must not block."""
        return self.try_to(action).result(10)

    def ask(self, query: str, *values: object) -> Callable[[Database], list[tuple[Any, ...]]]:
        return lambda db: db.execute(query.encode(), values or None).fetchall()

    def commit(self) -> None:
        self.does(lambda db: db.commit())

    def rollback(self) -> None:
        self.does(lambda db: db.rollback())

    def close(self) -> None:
        self._thread.shutdown()
        self.db.close()


class Scene:
    """Two people, and a watcher whose every statement is committed."""

    def __init__(self, url: str) -> None:
        self.watcher: Database = psycopg.connect(url, autocommit=True)
        self.ann, self.bob = Person(url), Person(url)

    def blocked(self, waiting: Future[T], person: Person) -> Future[T]:
        """Wait until somebody waits for somebody else's lock."""
        deadline = time.monotonic() + 10
        while not value(self.watcher, "select cardinality(pg_blocking_pids(%s)) > 0", person.db.info.backend_pid):
            assert not waiting.done(), f"it did not have to wait: {waiting.exception() or waiting.result()}"
            assert time.monotonic() < deadline, "it waits for no lock"
            threading.Event().wait(0.002)
        return waiting

    def is_consistent(self) -> bool:
        assert orphans(self.watcher) == []
        return True


@pytest.fixture
def scene(shared_url: str) -> Iterator[Scene]:
    """An empty database and the people in it."""
    made = Scene(shared_url)
    clear(made.watcher)
    yield made
    for person in (made.ann, made.bob):
        person.db.cancel_safe(timeout=1)
        person.close()
    made.watcher.close()


def refusal(future: Future[Any], sqlstate: str) -> str:
    """Return the words of the error that something ended with."""
    error = future.exception(10)
    assert isinstance(error, psycopg.Error) and error.sqlstate == sqlstate, error
    return words(error)


def small(db: Database, **columns: Any) -> tuple[int, int]:
    add_instance(db, cases=2, **{"rubrics_per_case": 1, "failure_threshold": 1, **columns})
    return start(db), register(db)


def control(action: str, run: int) -> Callable[[Database], Row]:
    return lambda db: rows(db, f"select * from pgharness.{action}(%s)", run)[0]


def recording(worker: int, *outcomes: Row) -> Callable[[Database], list[Row]]:
    return lambda db: record(db, worker, *outcomes)


# -- a run's state against its outcomes


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
def test_a_cancel_that_comes_after_the_last_outcome_waits_for_it(scene: Scene, ending: str) -> None:
    run, worker = small(scene.watcher)
    record(scene.watcher, worker, note(run, 0), note(run, 1), grade(run, 0))
    scene.ann.does(recording(worker, grade(run, 1)))
    cancel = scene.blocked(scene.bob.try_to(control("cancel_run", run)), scene.bob)
    if ending == "commits":
        scene.ann.commit()
        assert f"run {run} is already completed" in refusal(cancel, "PH003")
        scene.bob.rollback()
    else:
        scene.ann.rollback()
        assert cancel.result(10)["status"] == "cancelled"
        scene.bob.commit()
    row = run_of(scene.watcher, run)
    assert (row["status"], row["grades_succeeded"]) == (("completed", 2) if ending == "commits" else ("cancelled", 1))
    assert scene.is_consistent()


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
def test_a_last_outcome_that_comes_after_a_cancel_waits_for_it(scene: Scene, ending: str) -> None:
    run, worker = small(scene.watcher)
    record(scene.watcher, worker, note(run, 0), note(run, 1), grade(run, 0))
    scene.ann.does(control("cancel_run", run))
    late = scene.blocked(scene.bob.try_to(recording(worker, grade(run, 1), lost(run, "note", 0))), scene.bob)
    if ending == "commits":
        scene.ann.commit()
    else:
        scene.ann.rollback()
    assert [row["status"] for row in late.result(10)] == ["cancelled" if ending == "commits" else "completed"]
    scene.bob.commit()
    row = run_of(scene.watcher, run)
    assert (row["status"], row["grades_succeeded"]) == (("cancelled", 1) if ending == "commits" else ("completed", 2))
    assert value(scene.watcher, "select count(*) from pgharness.calls") == 5
    assert scene.is_consistent()


def test_an_outcome_that_comes_after_a_pause_queues_nothing(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    scene.ann.does(control("pause_run", run))
    late = scene.blocked(scene.bob.try_to(recording(worker, note(run, 0), failure(run, "note", 1))), scene.bob)
    scene.ann.commit()
    late.result(10)
    scene.bob.commit()
    assert jobs(scene.watcher) == [] and run_of(scene.watcher, run)["notes_succeeded"] == 1
    assert scene.is_consistent()
    scene.bob.does(control("resume_run", run))
    scene.bob.commit()
    assert len(jobs(scene.watcher)) == 2
    assert scene.is_consistent()


def test_a_pause_that_comes_after_an_outcome_drops_what_it_queued(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    scene.ann.does(recording(worker, note(run, 0), failure(run, "note", 1)))
    pause = scene.blocked(scene.bob.try_to(control("pause_run", run)), scene.bob)
    scene.ann.commit()
    assert pause.result(10)["status"] == "paused"
    scene.bob.commit()
    assert jobs(scene.watcher) == []
    assert scene.is_consistent()


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
def test_of_two_recorders_of_one_item_the_first_counts(scene: Scene, ending: str) -> None:
    run, worker = small(scene.watcher)
    record(scene.watcher, worker, note(run, 0), grade(run, 0))
    scene.ann.does(recording(worker, note(run, 1, output="ann's"), grade(run, 1)))
    second = scene.blocked(scene.bob.try_to(recording(worker, note(run, 1, output="bob's"), grade(run, 1))), scene.bob)
    if ending == "commits":
        scene.ann.commit()
    else:
        scene.ann.rollback()
    assert [row["status"] for row in second.result(10)] == ["completed"]
    scene.bob.commit()
    row = run_of(scene.watcher, run)
    assert (row["notes_succeeded"], row["grades_succeeded"], row["status"]) == (2, 2, "completed")
    assert value(scene.watcher, "select output from pgharness.notes where ordinal = 1") == (
        "ann's" if ending == "commits" else "bob's"
    )
    assert jobs(scene.watcher) == []
    assert scene.is_consistent()


@pytest.mark.parametrize("first", ["record", "delete"])
def test_a_run_that_is_deleted_while_an_outcome_is_recorded_leaves_no_row_behind(scene: Scene, first: str) -> None:
    add_instance(scene.watcher, cases=4, rubrics_per_case=1)
    run, worker = start(scene.watcher), register(scene.watcher)
    record(scene.watcher, worker, note(run, 0))
    actions: list[Callable[[Database], Any]] = [
        lambda db: record(db, worker, note(run, 1, calls=[call()]), grade(run, 0, calls=[call()])),
        lambda db: db.execute("delete from pgharness.runs where id = %s", (run,)),
    ]
    actions = actions if first == "record" else actions[::-1]
    scene.ann.does(actions[0])
    waiting = scene.blocked(scene.bob.try_to(actions[1]), scene.bob)
    scene.ann.commit()
    waiting.result(10)
    scene.bob.commit()
    for table in ("runs", "notes", "grades", "calls", "failures"):
        assert value(scene.watcher, f"select count(*) from pgharness.{table}") == 0, table


@pytest.mark.parametrize("first", ["failed", "succeeded"])
def test_of_a_failure_and_a_success_of_one_item_one_counts(scene: Scene, first: str) -> None:
    run, worker = small(scene.watcher)
    outcomes = {"failed": lost(run, "note", 0), "succeeded": note(run, 0)}
    scene.ann.does(recording(worker, outcomes.pop(first)))
    other = scene.blocked(scene.bob.try_to(recording(worker, *outcomes.values())), scene.bob)
    scene.ann.commit()
    other.result(10)
    scene.bob.commit()
    row = run_of(scene.watcher, run)
    assert (row["notes_succeeded"], row["notes_failed"]) == ((1, 0) if first == "succeeded" else (0, 1))
    assert scene.is_consistent()


def test_a_retry_that_comes_after_a_failure_takes_it_along(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    scene.ann.does(recording(worker, lost(run, "note", 0)))
    retry = scene.blocked(scene.bob.try_to(control("retry_failed", run)), scene.bob)
    scene.ann.commit()
    assert retry.result(10)["status"] == "running"
    scene.bob.commit()
    row = run_of(scene.watcher, run)
    assert (row["notes_failed"], row["grades_skipped"], row["epoch"]) == (0, 0, 0)
    assert scene.is_consistent()


def test_a_crash_is_not_charged_to_an_item_that_is_being_recorded(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    scene.ann.does(recording(worker, note(run, 0)))
    charge = scene.blocked(
        scene.bob.try_to(scene.bob.ask("select pgharness.charge_crash(%s, 'note', 0)", run)), scene.bob
    )
    scene.ann.commit()
    assert charge.result(10) == [(0,)]
    scene.bob.commit()
    assert scene.is_consistent()


# -- starting against editing


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
@pytest.mark.parametrize(
    "edit",
    [
        "update pgharness.cases set input = '\"edited\"'",
        'update pgharness.rubrics set criteria = \'[{"criterion": "edited", "weight": 1}]\'',
        "update pgharness.rubrics set validation = 'refused' where author = 'bob'",
        "update pgharness.instances set note_replications = 3",
    ],
)
def test_a_start_waits_for_an_edit_and_freezes_its_result(scene: Scene, edit: str, ending: str) -> None:
    add_instance(scene.watcher, cases=1, rubrics_per_case=1)
    add_instance(scene.watcher, "unused", cases=0)
    scene.ann.does(lambda db: db.execute(edit.encode()))
    begin = scene.blocked(scene.bob.try_to(start), scene.bob)
    if ending == "commits":
        scene.ann.commit()
    else:
        scene.ann.rollback()
    run = begin.result(10)
    scene.bob.commit()
    assert scene.is_consistent()
    used = rows(
        scene.watcher,
        """select c.input = '"edited"' or rb.criteria -> 0 ->> 'criterion' = 'edited' or rb.author = 'ann' or r.note_count = 3 as is_edited
             from pgharness.runs as r join pgharness.run_cases as rc on rc.run_id = r.id join pgharness.cases as c on c.id = rc.case_id
             join pgharness.run_rubrics as rr on rr.run_id = r.id join pgharness.rubrics as rb on rb.id = rr.rubric_id where r.id = %s""",
        run,
    )
    assert used == [{"is_edited": ending == "commits"}]


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
@pytest.mark.parametrize(
    "edit",
    [
        "update pgharness.cases set target = '0'",
        "update pgharness.rubrics set author = author || '2'",
        "delete from pgharness.rubrics",
    ],
)
def test_an_edit_waits_for_a_start_and_is_refused_by_it(scene: Scene, edit: str, ending: str) -> None:
    add_instance(scene.watcher, cases=1)
    scene.ann.does(start)
    change = scene.blocked(scene.bob.try_to(lambda db: db.execute(edit.encode())), scene.bob)
    if ending == "commits":
        scene.ann.commit()
        assert 'was used by run "trial/1"' in refusal(change, "PH003")
        scene.bob.rollback()
    else:
        scene.ann.rollback()
        assert change.result(10).rowcount > 0
        scene.bob.commit()
    assert scene.is_consistent()


def test_two_starts_of_one_instance_take_two_numbers(scene: Scene) -> None:
    add_instance(scene.watcher)
    scene.ann.does(start)
    second = scene.blocked(scene.bob.try_to(start), scene.bob)
    scene.ann.commit()
    second.result(10)
    scene.bob.commit()
    assert [row["name"] for row in rows(scene.watcher, "select name from pgharness.runs order by id")] == [
        "trial/1",
        "trial/2",
    ]
    assert scene.is_consistent()


@pytest.mark.parametrize("ending", ["commits", "rolls back"])
def test_a_start_with_a_key_waits_for_another_with_that_key(scene: Scene, ending: str) -> None:
    add_instance(scene.watcher)
    first = scene.ann.does(lambda db: start(db, idempotency_key="k"))
    second = scene.blocked(scene.bob.try_to(lambda db: start(db, idempotency_key="k")), scene.bob)
    if ending == "commits":
        scene.ann.commit()
    else:
        scene.ann.rollback()
    assert (second.result(10) == first) == (ending == "commits")
    scene.bob.commit()
    assert value(scene.watcher, "select count(*) from pgharness.runs") == 1
    assert scene.is_consistent()


# -- the sweep against everybody


def left_behind(db: Database) -> tuple[int, int]:
    """Start a run whose one worker has died with a slice in hand."""
    run, worker = small(db)
    assert take(db, worker) is not None
    db.execute("select pgharness.lose_worker('host', 1)")
    return run, register(db, pid=2)


def sweep(db: Database) -> int:
    return int(value(db, "select pgharness.sweep()"))


@pytest.mark.parametrize("action", ["cancel_run", "pause_run", "requeue_run"])
def test_what_a_sweep_puts_back_does_not_outlive_the_run(scene: Scene, action: str) -> None:
    run, _ = left_behind(scene.watcher)
    assert scene.ann.does(sweep) == 1
    ending = scene.blocked(scene.bob.try_to(control(action, run)), scene.bob)
    scene.ann.commit()
    ending.result(10)
    scene.bob.commit()
    assert scene.is_consistent()


@pytest.mark.parametrize("action", ["cancel_run", "pause_run", "requeue_run"])
def test_a_sweep_puts_nothing_back_that_has_ended_meanwhile(scene: Scene, action: str) -> None:
    run, _ = left_behind(scene.watcher)
    scene.ann.does(control(action, run))
    sweeping = scene.blocked(scene.bob.try_to(sweep), scene.bob)
    scene.ann.commit()
    sweeping.result(10)
    scene.bob.commit()
    assert scene.is_consistent()


def test_a_sweep_and_a_change_of_priority_do_not_wait_for_each_other(scene: Scene) -> None:
    run, _ = left_behind(scene.watcher)
    # a sweep takes jobs, and then waits for runs
    assert scene.ann.does(
        scene.ann.ask("select from procrastinate.procrastinate_jobs where status = 'doing' for update")
    )
    scene.bob.does(scene.bob.ask("select pgharness.adjust_run(%s::bigint, priority => 3)", run))
    sweeping = scene.blocked(scene.ann.try_to(sweep), scene.ann)
    scene.bob.commit()
    assert sweeping.result(10) == 1
    scene.ann.commit()
    waiting = jobs(scene.watcher)
    assert waiting and all(2_000_000 < job["priority"] <= 3_000_000 for job in waiting)
    assert scene.is_consistent()


def test_a_sweep_and_a_resume_of_a_run_that_lost_its_jobs_queue_them_once(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    scene.watcher.execute("select pgharness.pause_run(%s)", (run,))
    scene.ann.does(control("resume_run", run))
    assert scene.bob.does(sweep) == 0
    scene.bob.commit()
    scene.ann.commit()
    scene.watcher.execute("delete from procrastinate.procrastinate_jobs")
    scene.watcher.execute("update pgharness.runs set activated_at = activated_at - interval '1 hour'")
    scene.ann.does(control("requeue_run", run))
    assert scene.bob.does(sweep) == 0, "it skips a run that somebody has in hand"
    scene.bob.commit()
    scene.ann.commit()
    assert len(jobs(scene.watcher)) == 2
    assert scene.is_consistent()
    work_off(scene.watcher, worker)
    assert run_of(scene.watcher, run)["status"] == "completed"


def test_of_two_sweeps_at_once_one_does_nothing(scene: Scene) -> None:
    left_behind(scene.watcher)
    assert scene.ann.does(sweep) == 1
    assert scene.bob.does(sweep) == 0
    scene.bob.commit()
    scene.ann.commit()
    assert scene.is_consistent()


def test_a_job_that_is_being_fetched_is_not_dropped_under_its_worker(scene: Scene) -> None:
    run, worker = small(scene.watcher)
    taken = scene.ann.does(lambda db: take(db, worker))
    assert taken is not None
    pause = scene.blocked(scene.bob.try_to(control("pause_run", run)), scene.bob)
    scene.ann.commit()
    pause.result(10)
    scene.bob.commit()
    assert [job["id"] for job in jobs(scene.watcher, status="doing")] == [taken["id"]] and jobs(scene.watcher) == []
    assert load(scene.watcher, worker, taken["args"]) == []
    assert scene.is_consistent()


# -- all at once


def test_a_storm_of_workers_and_controllers_leaves_no_deadlock_and_no_orphan(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        add_instance(db, cases=6, note_replications=4, rubrics_per_case=1, failure_threshold=1, retry_delay_seconds=0)
        runs = [start(db) for _ in range(3)]
        barrier = threading.Barrier(5)

        def work(seed: int) -> None:
            luck = random.Random(seed)
            with psycopg.connect(url, autocommit=True) as mine:
                worker = register(mine, pid=seed)
                barrier.wait(10)
                for _ in range(60):
                    job = take(mine, worker)
                    if job is None:
                        continue
                    outcomes = succeeded(job["args"], load(mine, worker, job["args"]))
                    luck.shuffle(outcomes)
                    for outcome in outcomes[: luck.randrange(len(outcomes) + 1)]:
                        if luck.random() < 0.3:
                            outcome |= luck.choice([failure, lost])(
                                outcome["run_id"], outcome["kind"], outcome["ordinal"]
                            )
                    others = [note(luck.choice(runs), luck.randrange(24), calls=[]) for _ in range(luck.randrange(3))]
                    record(mine, worker, *outcomes, *others)
                    if luck.random() < 0.2:  # it dies, and another takes its place
                        mine.execute("select pgharness.lose_worker('host', %s)", (seed,))
                        worker = register(mine, pid=seed)
                    else:
                        finish(mine, job)
                    mine.execute("select * from pgharness.heartbeat(%s, '{}', 'running', %s, '{}')", (worker, runs))

        def interfere(seed: int) -> None:
            luck = random.Random(seed)
            actions = [
                "pause_run",
                "resume_run",
                "resume_run",
                "cancel_run",
                "retry_failed",
                "requeue_run",
                "adjust_run",
                "sweep",
            ]
            with psycopg.connect(url, autocommit=True) as mine:
                barrier.wait(10)
                for _ in range(60):
                    action = luck.choice(actions)
                    try:
                        if action == "sweep":
                            sweep(mine)
                        elif action == "adjust_run":
                            priority = luck.randrange(3)
                            mine.execute("select pgharness.adjust_run(%s::bigint, %s)", (luck.choice(runs), priority))
                        else:
                            control(action, luck.choice(runs))(mine)
                    except psycopg.ProgrammingError as error:
                        assert error.sqlstate == "PH003", error

        with ThreadPoolExecutor(5) as pool:
            for done in [
                *(pool.submit(work, seed) for seed in (1, 2, 3)),
                *(pool.submit(interfere, seed) for seed in (4, 5)),
            ]:
                done.result(60)
        db.execute("update pgharness.workers set status = 'lost'")
        sweep(db)
        assert orphans(db) == []
        worker = register(db, pid=99)
        for run in runs:
            if run_of(db, run)["status"] in ("paused", "cancelled"):
                control("resume_run", run)(db)
            control("retry_failed", run)(db)
        db.execute(
            "update procrastinate.procrastinate_jobs set scheduled_at = null; update pgharness.failures set next_attempt_at = now()"
        )
        work_off(db, worker)
        assert [run_of(db, run)["status"] for run in runs] == ["completed"] * 3
        assert orphans(db) == []
