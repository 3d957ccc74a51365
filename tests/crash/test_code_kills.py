"""kill -9 of workers and of the processes of runs, while many runs of code go on: nothing is lost and nothing told twice."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from code_lab import CodeLab, Worker, opened
from world import orphans

INSTANCES = 300
STEPS, ITEMS = 5, 20
KILLS = 60
_HITS = 2  # of a run's processes: a task that was there three times when its process died is taken to be the cause
_EXPERIMENT = f"""
import os
from pgharness import Context, experiment

def item(ctx: Context, number: int) -> int:
    ctx.debug("here", pid=os.getpid())
    ctx.metric("item", number)
    return number

@experiment
def steps(ctx: Context):
    ctx.debug("here", pid=os.getpid())
    total = 0
    for step in range({STEPS}):
        ctx.info(f"step {{step}}")
        ctx.result(f"step {{step}}", step)
        if step == 2:
            total = sum(ctx.map(item, range({ITEMS})))
    return total
"""


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_random_kills_lose_and_repeat_nothing(url: str, tmp_path: Path, record_property: Any) -> None:
    with opened(url, tmp_path) as lab:
        lab.write("steps", _EXPERIMENT)
        workers = [
            lab.worker("--queues", "task", "--runs", "4", "--concurrency", "20", PGHARNESS_STALE_SECONDS="2")
            for _ in range(2)
        ]
        served = "select count(*) from pgharness.workers where 'steps' = any (experiments)"
        lab.wait(lambda: lab.value(served) == 2, "both workers", 120)
        lab.db.execute(
            "insert into pgharness.instances (name, experiment) select 'i' || g, 'steps' from generate_series(1, %s) as g",
            (INSTANCES,),
        )
        began = time.monotonic()
        lab.db.execute("select pgharness.start_run(name) from pgharness.instances order by id")
        killed = kill_at_random(lab, workers)
        ended = "select count(*) from pgharness.runs where status <> 'running'"
        lab.wait(lambda: lab.value(ended) == INSTANCES, "the end of all runs", 300)
        took = time.monotonic() - began
        record_property("seconds", took)
        print(f"{INSTANCES} runs in {took:.0f} s, with {dict(killed)} killed")
        assert_all_once(lab)
        assert [worker.end() for worker in workers] == [0, 0]
        assert lab.value("select count(*) from procrastinate.procrastinate_jobs") == 0
        assert orphans(lab.db) == []


def kill_at_random(lab: CodeLab, workers: list[Worker]) -> Counter[str]:
    """Kill at even distances of progress, mostly processes of runs, sometimes a worker with all of its."""
    rng = random.Random(7)
    killed: Counter[str] = Counter()
    hits: Counter[int] = Counter()
    done = "select count(*) from pgharness.runs where status <> 'running'"
    for number in range(KILLS):
        wanted = INSTANCES * 0.95 * number / KILLS
        lab.wait(lambda wanted=wanted: lab.value(done) >= wanted, "progress", 120)
        is_worker = number % 6 == 5

        def kill(is_worker: bool = is_worker) -> bool:
            """Kill one of those that are there; False when there was none."""
            if is_worker:
                pids = [pid for worker in workers for pid in worker.worker_pids]
            else:
                pids = [pid for worker in workers for pid in worker.run_pids]
                pids = [pid for pid in pids if hits[run_of(lab, pid)] < _HITS]
            if not pids:
                return False
            victim = rng.choice(pids)
            run_id = run_of(lab, victim)
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                return False
            hits[run_id] += not is_worker
            return True

        lab.wait(kill, "a victim", 60)
        killed["workers" if is_worker else "runs"] += 1
    return killed


def run_of(lab: CodeLab, pid: int) -> int:
    """Return the run that said last that it is in a process; 0 for one that has not said anything yet."""
    query = "select run_id from pgharness.logs where data -> 'pid' = to_jsonb(%s::integer) order by id desc limit 1"
    return lab.value(query, pid) or 0


def assert_all_once(lab: CodeLab) -> None:
    """Check that every run is completed, and has told each step and each item exactly once."""
    assert lab.rows("select status, count(*) from pgharness.runs group by 1") == [("completed", INSTANCES)]
    tasks = "select status, count(*), count(distinct (run_id, parent_ordinal, key)) from pgharness.tasks group by 1"
    assert lab.rows(tasks) == [("succeeded", INSTANCES * (1 + ITEMS), INSTANCES * (1 + ITEMS))]
    wrong = (
        "select r.id, x.results, x.steps, m.metrics, m.items from pgharness.runs as r"
        " cross join lateral (select count(*) as results, count(distinct key) as steps from pgharness.results as x"
        "                      where x.run_id = r.id and x.key like 'step %%') as x"
        " cross join lateral (select count(*) as metrics, count(distinct (m.task, m.value)) as items"
        "                       from pgharness.metrics as m where m.run_id = r.id) as m"
        " where (x.results, x.steps, m.metrics, m.items) <> (%s, %s, %s, %s)"
    )
    assert lab.rows(wrong, STEPS, STEPS, ITEMS, ITEMS) == []
    returned = lab.rows("select distinct result from pgharness.tasks where ordinal = 0")
    assert returned == [(sum(range(ITEMS)),)]
    counts = "select count(*) from pgharness.runs where tasks_succeeded <> %s or tasks_failed <> 0 or task_count <> %s"
    assert lab.value(counts, ITEMS + 1, ITEMS + 1) == 0
