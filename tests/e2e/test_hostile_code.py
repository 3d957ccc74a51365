"""Code that misbehaves in every way that we could think of, all at once on one worker, beside a run that does not.

Each ends with a reason that says what it did; the good run notices nothing, and the worker lives on.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_lab import CodeLab, is_alive, opened
from world import cloned

_HOSTILE = r"""
import os, signal, subprocess, sys, threading, time
from pgharness import AsyncContext, Context, Runnable, experiment

@experiment(timeout_seconds=3)
def loop(ctx: Context):
    while True:
        pass

@experiment(timeout_seconds=3)
def stubborn(ctx: Context):
    while True:
        try:
            while True:
                time.sleep(0.01)
        except BaseException:
            pass

@experiment(timeout_seconds=3)
async def blocking(ctx: AsyncContext):
    time.sleep(1000)

@experiment(memory_mb=300)
def hog(ctx: Context):
    held = []
    while True:
        held.append(bytearray(b"x" * 20_000_000))
        time.sleep(0.02)

@experiment(memory_mb=300)
def hog_by_child(ctx: Context):
    subprocess.run([sys.executable, "-c", "import time; held = b'x' * 500_000_000; time.sleep(1000)"])

@experiment
def exits(ctx: Context):
    os._exit(3)

@experiment
def leaves(ctx: Context):
    sys.exit(4)

@experiment
async def leaves_async(ctx: AsyncContext):
    sys.exit("for good")

@experiment
def unstorable(ctx: Context):
    return threading.Lock()

@experiment
def circular(ctx: Context):
    value = []
    value.append(value)
    return value

@experiment(log_mb=2)
def chatters(ctx: Context):
    while True:
        print("x" * 1000)

@experiment
def threads(ctx: Context):
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()

@experiment
class Untidy(Runnable):
    def run(self):
        return 1

    def cleanup(self):
        raise RuntimeError("cleanup went wrong")

@experiment
class UntidyTwice(Runnable):
    def run(self):
        raise ValueError("run went wrong")

    def cleanup(self):
        raise RuntimeError("cleanup went wrong")

@experiment
def kills_itself(ctx: Context):
    os.kill(os.getpid(), signal.SIGKILL)

@experiment
def segfaults(ctx: Context):
    os.kill(os.getpid(), signal.SIGSEGV)

@experiment(timeout_seconds=6)
def closes(ctx: Context):
    os.closerange(0, 1024)
    while True:
        time.sleep(0.01)

@experiment
def recurses(ctx: Context):
    return recurses.function(ctx)

@experiment
def interrupts(ctx: Context):
    raise KeyboardInterrupt

def exit_at_three(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number

@experiment
def item_exits(ctx: Context):
    return [str(each) for each in ctx.map(exit_at_three, range(6), errors="collect")]

def leave_at_three(number: int) -> int:
    if number == 3:
        sys.exit(1)
    return number

@experiment
def item_leaves(ctx: Context):
    return [str(each) for each in ctx.map(leave_at_three, range(6), errors="collect")]

@experiment
def garbles(ctx: Context):
    os.write(1, bytes(range(256)) + b"\n")
    print("a\0b \ud800 \N{GRINNING FACE}")
    ctx.info("x" * 2_000_000, nan=float("nan"), large=10**40, bytes=b"\xff")
    ctx.metric("nan", float("nan"))
    ctx.metric("infinite", float("-inf"))
    ctx.result("key \0", {"\0": "\ud800", 1: {2, 3}, "large": 10**400})
    return {"nan": float("nan")}

@experiment
def lingers(ctx: Context):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    child = subprocess.Popen(["sleep", "1000"])
    ctx.result("processes", [os.getpid(), child.pid])
"""
_GOOD = """
import time
from pgharness import Context, experiment

def step(ctx: Context, number: int) -> int:
    ctx.metric("number", number)
    time.sleep(0.05)
    return number

@experiment
def good(ctx: Context):
    total = 0
    for turn in range(20):
        ctx.progress(turn, 20)
        total += sum(ctx.map(step, range(turn * 10, turn * 10 + 10), name=f"turn {turn}"))
    return total
"""
_ENDS = {
    "loop": ("failed", "it ran for longer than its 3 seconds"),
    "stubborn": ("failed", "it ran for longer than its 3 seconds"),
    "blocking": ("failed", "it ran for longer than its 3 seconds"),
    "hog": ("failed", "MB of memory, more than its 300"),
    "hog_by_child": ("failed", "MB of memory, more than its 300"),
    "exits": ("failed", "its process ended itself with status 3"),
    "leaves": ("failed", "it called sys.exit(4)"),
    "leaves_async": ("failed", "it called sys.exit('for good')"),
    "unstorable": ("failed", "its result is a lock, which cannot be kept as JSON"),
    "circular": ("failed", "its result is a list, which cannot be kept as JSON"),
    "chatters": ("failed", "it logged more than its 2 MB"),
    "threads": ("failed", "threads, more than 510"),
    "Untidy": ("failed", "RuntimeError: cleanup went wrong"),
    "UntidyTwice": ("failed", "ValueError: run went wrong"),
    "kills_itself": ("failed", "its process was killed by SIGKILL"),
    "segfaults": ("failed", "its process was killed by SIGSEGV"),
    "closes": ("failed", ""),
    "recurses": ("failed", "RecursionError"),
    "interrupts": ("failed", "KeyboardInterrupt"),
    "item_exits": ("completed", None),
    "item_leaves": ("completed", None),
    "garbles": ("completed", None),
    "lingers": ("completed", None),
}


@pytest.fixture(scope="module")
def lab(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeLab]:
    """A laboratory in which all of them have ended, and the worker is still there; `runs` by name."""
    with cloned(server_url, template) as url, opened(url, tmp_path_factory.mktemp("hostile")) as lab:
        lab.write("hostile", _HOSTILE)
        lab.write("good", _GOOD)
        lab.worker("--runs", "6", "--queues", "task", serves="good", PGHARNESS_STALE_SECONDS="5")
        for name in ("good", *_ENDS):
            lab.start(name, instance=name)
        began = time.monotonic()
        lab.wait(
            lambda: not lab.value("select count(*) from pgharness.runs where status = 'running'"), "their end", 200
        )
        print(f"{len(_ENDS)} hostile runs ended within {time.monotonic() - began:.1f} s")
        yield lab


def run_of(lab: CodeLab, name: str) -> int:
    return int(lab.value("select id from pgharness.runs where instance = %s order by id limit 1", name))


@pytest.mark.parametrize("name", list(_ENDS))
def test_it_ends_and_says_why(lab: CodeLab, name: str) -> None:
    run_id = run_of(lab, name)
    progress = lab.progress(run_id)
    status, reason = _ENDS[name]
    assert progress["status"] == status, progress["reason"]
    if reason is not None:
        assert reason in progress["reason"]
        assert lab.root(run_id)["status"] == "failed"
        assert reason in (lab.root(run_id)["error"] or "")
        assert any(reason in message for message in lab.messages(run_id, "error"))


def test_the_good_run_is_unharmed(lab: CodeLab) -> None:
    run_id = run_of(lab, "good")
    assert lab.progress(run_id)["status"] == "completed"
    assert lab.root(run_id)["result"] == sum(range(200))
    assert lab.value("select sum(attempts) from pgharness.tasks where run_id = %s", run_id) == 201
    assert lab.value("select count(*) from pgharness.run_metrics where run_id = %s", run_id) == 200


@pytest.mark.parametrize("name", ["item_exits", "item_leaves"])
def test_an_item_that_ends_its_process_takes_no_other_with_it(lab: CodeLab, name: str) -> None:
    run_id = run_of(lab, name)
    said = {"item_exits": "its process ended itself with status 1", "item_leaves": "it called sys.exit(1)"}[name]
    assert lab.root(run_id)["result"] == ["0", "1", "2", f"item '3' failed: {said}", "4", "5"]
    assert [item["status"] for item in lab.items(run_id)] == ["succeeded"] * 3 + ["failed"] + ["succeeded"] * 2


def test_what_no_database_can_store_is_stored_as_well_as_can_be(lab: CodeLab) -> None:
    run_id = run_of(lab, "garbles")
    messages = lab.messages(run_id)
    assert "a\ufffdb \ufffd \N{GRINNING FACE}" in messages
    assert any(message.startswith("xxx") and len(message) < 1_001_000 for message in messages)
    metrics = dict(lab.rows("select name, value::text from pgharness.run_metrics where run_id = %s", run_id))
    assert metrics == {"nan": "NaN", "infinite": "-Infinity"}
    assert lab.root(run_id)["result"] == {"nan": "NaN"}
    assert "key \ufffd" in lab.results(run_id)


def test_the_cause_of_an_error_is_kept_with_it(lab: CodeLab) -> None:
    task = lab.root(run_of(lab, "UntidyTwice"))
    assert "ValueError: run went wrong" in task["traceback"]
    assert any("cleanup failed" in message for message in lab.messages(run_of(lab, "UntidyTwice"), "error"))


def test_what_a_run_leaves_running_ends_with_it(lab: CodeLab) -> None:
    pids = lab.results(run_of(lab, "lingers"))["processes"]
    lab.wait(lambda: not any(map(is_alive, pids)), "its processes to end")


def test_the_worker_lives_on(lab: CodeLab) -> None:
    worker = lab.workers[0]
    assert worker.process.poll() is None
    assert lab.rows("select status from pgharness.workers where 'good' = any (experiments)") == [("running",)], (
        "the first one"
    )
    lab.wait(lambda: not worker.run_pids, "all processes of runs to end", 25)
    began = time.monotonic()
    run_id = lab.run("item_leaves")
    print(f"the next run took {time.monotonic() - began:.2f} s")
    assert lab.root(run_id)["result"][0] == "0"
    assert lab.rows("select * from pgharness.stalled_work") == []
    assert worker.end(signal.SIGTERM) == 0
    assert lab.value("select count(*) from procrastinate.procrastinate_jobs") == 0


_ORPHAN = """
import os, time
from pgharness import AsyncContext, Context, experiment

@experiment
async def deaf(ctx: AsyncContext):
    ctx.result("process", os.getpid())
    time.sleep(1000)

@experiment
def busy(ctx: Context):
    ctx.result("process", os.getpid())
    while True:
        pass
"""


@pytest.mark.parametrize("experiment", ["deaf", "busy"])
def test_a_process_that_hears_nothing_ends_with_its_worker(url: str, tmp_path: Path, experiment: str) -> None:
    with opened(url, tmp_path) as lab:
        lab.write("orphan", _ORPHAN)
        worker = lab.worker("--queues", "task", serves=experiment)
        run_id = lab.start(experiment)
        lab.wait(lambda: "process" in lab.results(run_id), "the run to begin")
        pid = lab.results(run_id)["process"]
        for each in (*worker.worker_pids, worker.process.pid):
            os.kill(each, signal.SIGKILL)
        lab.wait(lambda: not is_alive(pid), "its process to end", 10)
