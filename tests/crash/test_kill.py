"""kill -9 of anything: worker processes, supervisors, the database's server, the queue's whole schema."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgharness import database, schema
from pgharness.embedded import EmbeddedPostgres, temporary_root

CONCURRENCY = 10
KILLS = 100
DATABASE_KILLS = 3


@pytest.fixture
def server() -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, which it may kill; it lives in memory, which outlives the server."""
    root = temporary_root()
    made = EmbeddedPostgres(root, durable=False)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(root, ignore_errors=True)


@pytest.mark.crash
def test_100_kills_of_workers_and_3_of_the_database_lose_and_repeat_nothing(
    server: EmbeddedPostgres, stub: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = server.ensure()
    with database.connect(url) as connection:
        schema.upgrade(connection)
    lab = request.getfixturevalue("lab_class")(url, tmp_path)
    request.addfinalizer(lab.close)
    stub._latency = 0.1
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.simulator("grader", latency_seconds=0.02)
    lab.instance(cases=100, generator="vendor", grader="grader", note_replications=20, max_attempts=1)
    groups = [lab.workers(3, concurrency=CONCURRENCY, waits=False) for _ in range(2)]
    run_id = lab.start()

    rng = random.Random(42)
    victims = ["worker"] * (KILLS - 4) + ["supervisor"] * 4
    rng.shuffle(victims)
    for number in range(DATABASE_KILLS):
        victims.insert((number + 1) * KILLS // (DATABASE_KILLS + 1), "database")
    total = lab.value("select note_count + grade_count from pgharness.runs")
    assert total == 2_000 + 4_000
    supervisors_killed = 0
    for number, victim in enumerate(victims):
        wanted = total * 0.9 * number / len(victims)
        lab.wait(lambda wanted=wanted: done(lab) >= wanted and any(group.children for group in groups), "progress", 60)
        assert lab.value("select status from pgharness.runs") == "running"
        if victim == "database":
            os.kill(server.status().pid or 0, signal.SIGKILL)
            assert server.ensure() == url
        elif victim == "supervisor":
            index = rng.randrange(len(groups))
            groups[index].signal(signal.SIGKILL)
            groups[index] = lab.workers(3, concurrency=CONCURRENCY, waits=False)
            supervisors_killed += 1
        else:
            os.kill(rng.choice([pid for group in groups for pid in group.children]), signal.SIGKILL)
    lab.wait_for_end(run_id, seconds=60)

    lab.assert_complete(run_id)
    assert lab.value("select count(*) from pgharness.failures") == 0
    # a killed worker takes its calls with it; a killed database may make all workers do theirs again
    most_repeated = CONCURRENCY * (KILLS + DATABASE_KILLS * sum(len(group.children) for group in groups))
    assert 2_000 <= len(stub.requests) <= 2_000 + most_repeated
    repeated = "select count(*) - count(distinct (kind, ordinal)) from pgharness.calls where outcome = 'succeeded'"
    assert lab.value(repeated) <= most_repeated
    for group in groups:
        group.signal(signal.SIGTERM)
    assert [group.wait() for group in groups] == [0, 0]
    lab.assert_consistent()


def done(lab: Any) -> int:
    """How many notes and grades there are; -1 while the database is away."""
    try:
        count: int = lab.value("select notes_succeeded + grades_succeeded from pgharness.runs")
    except psycopg.OperationalError:
        return -1
    return count


def test_losing_the_whole_queue_loses_no_result(lab: Any, stub: Any) -> None:
    """And one call brings the outstanding work back, to the workers that were there all along."""
    stub._latency = 0.3
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.simulator("grader", latency_seconds=0.01)
    lab.instance(cases=20, generator="vendor", grader="grader", note_replications=4)
    group = lab.workers(2, concurrency=4)
    run_id = lab.start()
    lab.wait(lambda: done(lab) > 40 and stub.in_flight == 8, "the run to be under way")
    lab.insist("drop schema procrastinate cascade")
    answered = len(stub.requests)
    lab.wait(lambda: stub.in_flight == 0, "the calls in flight to end")
    lab.wait(lambda: lab.value("select count(*) from pgharness.notes") >= answered, "their notes")
    assert lab.value("select status from pgharness.runs") == "running"
    lab.assert_consistent()
    with database.connect(lab.url) as connection:
        schema.upgrade(connection)
    lab.db.execute("select pgharness.requeue_run(%s)", (run_id,))
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    assert len(stub.requests) <= 80 + 8, "more was repeated than could have been in flight"
    # the new queue numbers its workers anew: nobody may get the number of one that has been there all along
    newcomer, taken = lab.rows("select max(id) + 1, max(queue_worker_id) from pgharness.workers")[0]
    assert lab.value("select pgharness.register_worker('here', 1, '0', '{note}', 1)") == newcomer
    with pytest.raises(psycopg.Error) as refused:
        lab.db.execute("select pgharness.attach_queue_worker(%s, %s)", (newcomer, taken))
    assert refused.value.sqlstate == "PH004"
    group.signal(signal.SIGTERM)
    assert group.wait() == 0


def test_a_database_that_is_away_for_a_while_makes_no_call_run_twice(
    server: EmbeddedPostgres, stub: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Longer than a worker may be silent: nobody is lost who had nobody to talk to."""
    url = server.ensure()
    with database.connect(url) as connection:
        schema.upgrade(connection)
    lab = request.getfixturevalue("lab_class")(url, tmp_path)
    request.addfinalizer(lab.close)
    stub._latency = 1.0
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.instance(cases=40, generator="vendor")
    lab.workers(2, concurrency=10, PGHARNESS_STALE_SECONDS="1")
    run_id = lab.start()
    lab.wait(lambda: stub.in_flight == 20, "20 calls in flight")
    server.stop()
    lab.wait(lambda: stub.in_flight == 0, "the calls to end without a database")
    assert len(stub.requests) < 40
    assert server.ensure() == url
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    assert len(stub.requests) == 40
