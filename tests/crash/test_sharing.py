"""Runs beside each other on the same workers, and workers beside each other on the same run."""

from __future__ import annotations

import signal
import time
from typing import Any


def seconds_of(lab: Any, run_id: int) -> float:
    """How long a run took, as the database saw it."""
    seconds: float = lab.value(
        "select extract(epoch from finished_at - created_at)::float from pgharness.runs where id = %s", run_id
    )
    return seconds


def test_a_small_run_gets_half_of_the_places_beside_a_huge_one(lab: Any) -> None:
    lab.simulator("steady", latency_seconds=0.25)
    lab.instance("huge", cases=100, generator="steady", grader="steady", note_replications=100)
    lab.instance("small", cases=60, generator="steady", grader="steady")
    group = lab.workers(concurrency=40)
    huge = lab.start("huge")
    done = "select notes_succeeded + grades_succeeded from pgharness.runs where id = %s"
    lab.wait(lambda: lab.value(done, huge) > 400, "the huge run keeps the worker busy", group=group)
    small = lab.start("small")
    lab.wait_for_end(small)
    assert lab.value(done, huge) < 20_000
    calls = "select count(*) from pgharness.calls where run_id = %s and started_at between"
    window = " (select created_at from pgharness.runs where id = %s) and"
    window += " (select max(started_at) from pgharness.calls where run_id = %s)"
    own, others = (lab.value(calls + window, run_id, small, small) for run_id in (small, huge))
    assert own == 60 + lab.value("select count(*) from pgharness.grades where run_id = %s", small) >= 120
    assert others < 2 * own, "half of the places, so as many calls, and those made before its first place came free"


def test_a_run_of_higher_priority_overtakes_what_a_worker_already_holds(lab: Any) -> None:
    lab.simulator("slow", latency_seconds=0.3)
    lab.instance("first", cases=100, generator="slow", note_replications=20)
    lab.instance("second", cases=30, generator="slow")
    group = lab.workers(concurrency=10)
    first = lab.start("first")
    count = "select count(*) from pgharness.calls where run_id = %s"
    lab.wait(lambda: lab.value(count, first) >= 10, "the first run has all places", group=group)
    second = lab.start("second", priority=10)
    lab.wait_for_end(second)
    overlap = lab.value(
        "select count(*) from pgharness.calls as c where c.run_id = %s and c.started_at between"
        " (select min(started_at) + interval '0.1 s' from pgharness.calls where run_id = %s) and"
        " (select max(started_at) - interval '0.1 s' from pgharness.calls where run_id = %s)",
        *(first, second, second),
    )
    assert overlap <= 3, "places went to the run of lower priority"


def test_workers_together_keep_within_the_cap_of_a_run(lab: Any) -> None:
    lab.simulator("slow", latency_seconds=0.2)
    lab.instance(cases=100, generator="slow", grader="slow", rubrics_per_case=1)
    lab.workers(2, concurrency=20)
    run_id = lab.start(max_concurrency=7)
    crowd = (
        "select max(n) from (select (select count(*) from pgharness.calls as b where b.started_at <= a.started_at"
        " and b.started_at + make_interval(secs => b.latency_ms / 1000) > a.started_at) as n from pgharness.calls as a)"
        " as x"
    )
    lab.wait(lambda: lab.value("select count(*) from pgharness.calls") > 60, "some calls")
    assert 5 <= lab.value(crowd) <= 7
    lab.db.execute("select pgharness.adjust_run(%s, max_concurrency => 0)", (run_id,))
    lab.wait_for_end(run_id)
    assert lab.value(crowd) > 7
    lab.assert_complete(run_id)


def test_a_worker_that_joins_late_takes_over_what_the_first_one_had_not_begun(lab: Any) -> None:
    lab.simulator("slow", latency_seconds=0.5)
    lab.instance(cases=160, generator="slow", grader="slow", rubrics_per_case=1)
    run_id = lab.start()
    lab.workers(concurrency=4)
    lab.wait(
        lambda: (
            lab.value("select count(*) from procrastinate.procrastinate_jobs where status = 'todo'") < 150
            and lab.value("select count(*) from pgharness.notes") > 4
        ),
        "the first worker has its hands full",
    )
    # one job with much of the run, as a plan for other latencies may have it
    lab.db.execute("select pgharness.pause_run(%s)", (run_id,))
    lab.wait_for_quiet_queue()
    lab.db.execute("select pgharness.resume_run(%s)", (run_id,))
    lab.db.execute("delete from procrastinate.procrastinate_jobs where status = 'todo'")
    lab.db.execute("select pgharness._defer_range(%s, 'note', 0, 159, 160)", (run_id,))
    lab.wait(
        lambda: lab.value("select count(*) from procrastinate.procrastinate_jobs where status = 'todo'") == 0, "it"
    )
    begun = time.monotonic()
    lab.workers(2, concurrency=20)
    lab.wait_for_end(run_id, seconds=60)
    assert time.monotonic() - begun < 30, "alone, the first worker would have needed 38 seconds"
    counts = lab.rows("select worker_id, count(*) from pgharness.calls where outcome = 'succeeded' group by 1")
    assert len(counts) == 3 and sum(count for _, count in sorted(counts)[1:]) > 160
    assert lab.value("select count(*) from pgharness.calls where outcome = 'succeeded'") == 320, "none was made twice"
    lab.assert_complete(run_id)


def test_the_grades_that_a_killed_worker_kept_are_made_by_another(lab: Any) -> None:
    lab.simulator("quick", latency_seconds=0.01)
    lab.simulator("slow", latency_seconds=2)
    lab.instance(cases=8, generator="quick", grader="slow", rubrics_per_case=1)
    run_id = lab.start()
    group = lab.workers(concurrency=3)
    lab.wait(lambda: lab.value("select count(*) from pgharness.notes") >= 3, "grades have begun", group=group)
    group.kill()
    other = lab.workers(concurrency=3)
    lab.wait_for_end(run_id)
    lab.assert_complete(run_id)
    other.signal(signal.SIGTERM)
    assert other.wait() == 0


def test_a_run_that_may_make_few_calls_keeps_no_other_from_its_worker(lab: Any) -> None:
    lab.simulator("narrow", latency_seconds=0.05, max_concurrency=1)
    lab.simulator("wide", latency_seconds=0.05)
    lab.instance("slow", cases=100, generator="narrow", note_replications=20)
    lab.instance("capped", cases=100, generator="wide", note_replications=20)
    lab.instance("quick", cases=100, generator="wide", note_replications=4)
    group = lab.workers(concurrency=20)
    lab.start("slow", priority=1)
    lab.start("capped", max_concurrency=1)
    lab.wait(lambda: lab.value("select count(*) from pgharness.notes") > 20, "both go on", group=group)
    quick = lab.start("quick")
    lab.wait_for_end(quick)
    assert seconds_of(lab, quick) < 10, "alone, it takes a little over one second"
