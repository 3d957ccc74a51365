"""Maps in maps that are far wider than a process: what waits is bounded, all of it ends, and nothing depends on the order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from code_lab import CodeLab, opened
from world import cloned

CONCURRENCY = 2
_BEGUN = 2  # tasks of one depth for each place, at most
_WIDE = """
import contextlib, os, threading, time
from collections import Counter
from pgharness import AsyncContext, Context, experiment
from pydantic import BaseModel

class Config(BaseModel):
    count: int
    fan: int

begun = Counter()

@contextlib.contextmanager
def counted(ctx, what):
    begun[what] += 1
    ctx.metric(what, begun[what])
    try:
        yield
    finally:
        begun[what] -= 1

def leaf(ctx: Context, item: list[int]) -> list[int]:
    ctx.metric("threads", threading.active_count())
    return item

def below(ctx, item):
    return [[*item, each] for each in range(ctx.config["fan"])]

def twig(ctx: Context, item: list[int]) -> list[list[int]]:
    with counted(ctx, "twigs"):
        return ctx.map(leaf, below(ctx, item))

def branch(ctx: Context, number: int) -> list[list[list[int]]]:
    with counted(ctx, "branches"):
        return ctx.map(twig, below(ctx, [number]))

@experiment
def wide(ctx: Context, config: Config):
    return ctx.map(branch, range(config.count))

async def twig_async(ctx: AsyncContext, item: list[int]) -> list[list[int]]:
    with counted(ctx, "twigs"):
        return await ctx.map(leaf, below(ctx, item))

async def branch_async(ctx: AsyncContext, number: int) -> list[list[list[int]]]:
    with counted(ctx, "branches"):
        return await ctx.map(twig_async, below(ctx, [number]))

@experiment
async def wide_async(ctx: AsyncContext, config: Config):
    return await ctx.map(branch_async, range(config.count))

def picky(ctx: Context, item: list[int]) -> int:
    if ctx.attempt == 1 and item == [1, 1, 1]:
        raise RuntimeError("once")
    if sum(item) % 5 == 0:
        raise ValueError(f"{sum(item)} is too round")
    return sum(item)

def raising(ctx: Context, item: list[int]) -> list[int]:
    return ctx.map(picky, [[*item, each] for each in range(3)], retries=1)

def collecting(ctx: Context, number: int) -> list[str]:
    found = ctx.map(raising, [[number, each] for each in range(3)], errors="collect")
    return [str(each) for each in found]

@experiment
def failing(ctx: Context):
    return ctx.map(collecting, reversed(range(6)))

def gated(number: int) -> int:
    while not os.path.exists(os.path.join(os.environ["LAB"], "many.gate")):
        time.sleep(0.01)
    return number

@experiment
def many(ctx: Context):
    return sum(ctx.map(gated, range(800)))
"""


@pytest.fixture(scope="module")
def lab(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeLab]:
    with cloned(server_url, template) as url, opened(url, tmp_path_factory.mktemp("wide")) as lab:
        lab.write("wide", _WIDE)
        lab.worker("--queues", "task", "--concurrency", str(CONCURRENCY), serves="wide")
        yield lab


def most(lab: CodeLab, run_id: int) -> dict[str, Any]:
    """Return the largest number that a run told under each name."""
    return dict(lab.rows("select name, max(value) from pgharness.run_metrics where run_id = %s group by 1", run_id))


def assert_in_order(lab: CodeLab, run_id: int, count: int, fan: int) -> None:
    """Check that every item of three maps was done once, and stands where it belongs."""
    expected = [[[[each, one, two] for two in range(fan)] for one in range(fan)] for each in range(count)]
    assert lab.root(run_id)["result"] == expected
    tasks = "select depth, count(*), max(attempts) from pgharness.tasks where run_id = %s group by 1 order by 1"
    assert lab.rows(tasks, run_id) == [
        (0, 1, 1),
        (1, count, 1),
        (2, count * fan, 1),
        (3, count * fan * fan, 1),
    ]


@pytest.mark.parametrize("experiment", ["wide", "wide_async"])
def test_maps_in_maps_far_wider_than_a_worker_begin_a_few_at_a_time(lab: CodeLab, experiment: str) -> None:
    count, fan = 60, 2
    run_id = lab.run(experiment, count=count, fan=fan)
    assert_in_order(lab, run_id, count, fan)
    found = most(lab, run_id)
    for what in ("branches", "twigs"):
        assert CONCURRENCY < found[what] <= _BEGUN * CONCURRENCY, found
    assert found["threads"] < count, "one for each task that is begun, and some of its own"


def test_maps_in_maps_far_wider_than_a_program_begin_a_few_at_a_time(lab: CodeLab) -> None:
    places, count = 32, 150
    lab.python("-m", "pgharness", "run", "wide", "--set", f"count={count}", "--set", "fan=1")
    run_id = lab.value("select run_id from pgharness.run_progress where run = 'wide/1'")
    assert_in_order(lab, run_id, count, 1)
    found = most(lab, run_id)
    assert places < found["branches"] <= _BEGUN * places, found


def test_what_fails_deep_down_is_told_where_it_belongs(lab: CodeLab) -> None:
    run_id = lab.run("failing")
    expected = []
    for number in reversed(range(6)):
        for each in range(3):
            sums = [number + each + one for one in range(3)]
            bad = [one for one in range(3) if sums[one] % 5 == 0]
            inner = [f"item '[{number},{each},{one}]' failed: ValueError: {sums[one]} is too round" for one in bad]
            said = f"item '[{number},{each}]' failed: TaskFailed: {inner[0]}" if bad else str(sums)
            expected.append(said + f" (and {len(bad) - 1} more)" * (len(bad) > 1))
    assert [said for each in lab.root(run_id)["result"] for said in each] == expected
    tries = dict(lab.rows("select key, attempts from pgharness.tasks where run_id = %s and depth = 3", run_id))
    assert tries["[1,1,1]"] == tries["[0,0,0]"] == 2
    assert tries["[1,1,0]"] == 1


def test_a_worker_that_stands_still_for_a_while_loses_nothing(lab: CodeLab) -> None:
    """The process of a run waits for it to hear what has ended, however much that is."""
    run_id = lab.start("many")
    begun = "select count(*) from pgharness.tasks where run_id = %s and attempts > 0"
    lab.wait(lambda: lab.value(begun, run_id) > 100, "100 items, of which two run")
    seen = [(0, 0.0)]

    def has_halted() -> bool:
        count = lab.progress(run_id)["tasks_succeeded"]
        if count != seen[-1][0]:
            seen.append((count, time.monotonic()))
        return count > 0 and time.monotonic() > seen[-1][1] + 0.5

    (pid,) = lab.workers[0].worker_pids
    os.kill(pid, signal.SIGSTOP)
    try:
        lab.open_gate("many")
        lab.wait(has_halted, "the run to wait")
    finally:
        os.kill(pid, signal.SIGCONT)
    lab.wait_for_end(run_id, seconds=30)
    assert lab.root(run_id)["result"] == sum(range(800))
    assert {item["attempts"] for item in lab.items(run_id)} == {1}
