"""Runs of code by real workers: what they tell, their maps, what they do when they are killed, cancelled and paused.

One worker serves a project for the whole module; it is killed only by tests that have one of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from code_lab import CodeLab, is_alive, opened
from world import cloned, miscounted

_GATES = """
import asyncio, os, time
from pathlib import Path

def path(name):
    return Path(os.environ["LAB"], f"{name}.gate")

def wait(name):
    while not path(name).exists():
        time.sleep(0.01)

async def pass_through(name):
    while not path(name).exists():
        await asyncio.sleep(0.01)
"""
_TELLING = """
import asyncio, logging, os, sys, time
import gates
from pgharness import AsyncContext, Context, experiment, llm_call, metric, timer
from pydantic import BaseModel

class Config(BaseModel):
    gate: str
    lines: int = 0

@metric("decorated", "share")
def share(values):
    return sum(values) / len(values)

@timer("decorated")
def timed():
    pass

@llm_call(model="asked")
def ask(prompt):
    return prompt.upper()

def tell(ctx):
    print("printed")
    print("printed to stderr", file=sys.stderr)
    logging.getLogger("library").warning("logged by a library")
    os.system("echo printed by a program")
    ctx.debug("said", number=1)
    ctx.log_batch([("info", "one of two", None), ("error", "two of two", {"why": "for show"})])
    ctx.result("answer", {"value": 41})
    ctx.result("answer", {"value": 42})
    ctx.metric("accuracy", 0.5, "accuracy", step=3, data={"of": [1, 2]})
    with ctx.timer("nothing"):
        pass
    ctx.log_llm_call("elsewhere", [{"role": "user", "content": "hi"}], "hello", 12.5)
    ctx.artifact("words.txt", "h\\u00e9llo")
    ctx.artifact("bytes.bin", bytes(range(256)))
    ctx.progress(1, 4, "a quarter")
    share([1, 2]); timed(); ask("why")

@experiment
def telling(ctx: Context, config: Config):
    \"\"\"Tells all there is to tell.\"\"\"
    tell(ctx)
    gates.wait(config.gate)
    ctx.progress(4)
    return {"seed": ctx.seed, "kind": ctx.kind}

@experiment
async def telling_async(ctx: AsyncContext, config: Config):
    await asyncio.to_thread(lambda: print("printed in a thread"))
    tell(ctx)
    await gates.pass_through(config.gate)
    ctx.progress(4)
    return {"seed": ctx.seed, "kind": ctx.kind}

@experiment
def ticking(ctx: Context, config: Config):
    for number in range(config.lines):
        ctx.info("tick", at=time.time())
        time.sleep(0.1)

@experiment
def talkative(ctx: Context, config: Config):
    for number in range(config.lines):
        ctx.info(f"line {number}")
"""
_MAPS = """
import asyncio, os, time
from dataclasses import dataclass
from datetime import date
import gates
from pgharness import AsyncContext, Context, Runnable, TaskFailed, experiment
from pydantic import BaseModel, ConfigDict

class Question(BaseModel):
    model_config = ConfigDict(strict=True)
    text: str
    asked: date

class Answer(BaseModel):
    model_config = ConfigDict(strict=True)
    question: Question
    length: int

def answer(ctx: Context, question: Question) -> Answer:
    assert isinstance(question, Question)
    ctx.metric("length", len(question.text))
    return Answer(question=question, length=len(question.text))

async def answer_async(question: Question) -> tuple[int, str]:
    await asyncio.sleep(0)
    return len(question.text), question.text

def questions():
    return [Question(text="x" * (n % 7), asked=date(2026, 1, 1 + n)) for n in reversed(range(20))]

@experiment
def typed(ctx: Context):
    given = questions()
    found = ctx.map(answer, given)
    assert all(isinstance(each, Answer) for each in found) and [each.question for each in found] == given
    pairs = ctx.map(answer_async, given)
    assert pairs == [(len(each.text), each.text) for each in given]
    return len(found)

@experiment
async def typed_async(ctx: AsyncContext):
    given = questions()
    found, pairs = await asyncio.gather(ctx.map(answer, given), ctx.map(answer_async, given))
    assert [each.question for each in found] == given and len(pairs) == len(given)
    return len(found)

def picky(number: int) -> int:
    if number % 3 == 0:
        raise ValueError(f"{number} is a multiple of three")
    return number * 10

@experiment
def collecting(ctx: Context):
    found = ctx.map(picky, range(7), errors="collect")
    assert [each for each in found if not isinstance(each, TaskFailed)] == [10, 20, 40, 50]
    return {each.key: each.error for each in found if isinstance(each, TaskFailed)}

@experiment
def raising(ctx: Context):
    try:
        ctx.map(picky, [1, 2, 3], key=lambda number: f"number {number}")
    except TaskFailed as exc:
        ctx.result("caught", {"key": exc.key, "error": exc.error})
        raise

def flaky(ctx: Context, number: int) -> int:
    ctx.metric("try", ctx.attempt)
    if ctx.attempt <= number:
        raise RuntimeError(f"try {ctx.attempt} of {number}")
    return ctx.attempt

@experiment
def retrying(ctx: Context):
    return [each if isinstance(each, int) else each.error for each in ctx.map(flaky, range(4), retries=2, errors="collect")]

def leaf(ctx: Context, item: list[int]) -> int:
    return item[0] * 10 + item[1]

def branch(ctx: Context, number: int) -> int:
    return sum(ctx.map(leaf, [[number, each] for each in range(5)]))

@experiment
def nested(ctx: Context):
    return ctx.map(branch, range(30))

async def branches(ctx: AsyncContext, number: int) -> int:
    both = await asyncio.gather(
        ctx.map(branch, [number * 2, number * 2 + 1]), ctx.map(leaf, [[number, 0]], name="beside")
    )
    return sum(map(sum, both))

@experiment
def deep(ctx: Context):
    return ctx.map(branches, range(20))

def same(item: int) -> int:
    return item

class Config(BaseModel):
    how: str

@experiment
def refused(ctx: Context, config: Config):
    match config.how:
        case "keys":
            ctx.map(same, [1, 2], key=lambda _: "one for all")
        case "lambda":
            ctx.map(lambda item: item, [1])
        case "local":
            def local(item):
                return item
            ctx.map(local, [1])
        case "other item":
            ctx.map(same, [1], key=lambda _: "k")
            ctx.map(same, [2], key=lambda _: "k")
        case "item":
            ctx.map(same, [object()])

@experiment
def edges(ctx: Context):
    return [
        ctx.map(same, []),
        ctx.map(same, [], key=str),
        ctx.map(same, (n for n in (3, 1, 2)), key=str, name="a generator"),
        ctx.map(same, [7, 7, 7], name="repeated"),
        ctx.map(same, [1], name="n\\u00e0med"),
        ctx.map(same, [1], key=lambda _: "\\u00fcnicode '; drop"),
    ]

def count(ctx: Context, number: int) -> int:
    ctx.metric("number", number)
    return number * 2

@experiment
def large(ctx: Context):
    return ctx.map(count, range(2000)) == [2 * number for number in range(2000)]

class Gated(BaseModel):
    gate: str
    items: int = 40
    free: int = 20

def gated(ctx: Context, item: tuple[int, str]) -> int:
    number, gate = item
    ctx.metric("number", number)
    ctx.result(f"item {number}", number)
    if gate:
        gates.wait(gate)
    return number

@experiment
def checkpointed(ctx: Context, config: Gated):
    ctx.result("process", os.getpid())
    ctx.metric("begun", 1)
    given = [(number, config.gate if number >= config.free else "") for number in range(config.items)]
    return sum(ctx.map(gated, given, key=lambda item: item[0]))

def slow(ctx: Context, number: int) -> int:
    ctx.metric("number", number)
    time.sleep(0.3)
    return number

@experiment
def drained(ctx: Context):
    return sum(ctx.map(slow, range(200)))

def fragile(ctx: Context, item: tuple[int, str]) -> int:
    number, gate = item
    ctx.metric("number", number)
    if number == 3 and not gates.path(gate).exists():
        raise RuntimeError("the gate is shut")
    return number

@experiment
def fragile_run(ctx: Context, config: Gated):
    ctx.metric("begun", 1)
    return ctx.map(fragile, [(number, config.gate) for number in range(8)])
"""
_STOPS = """
import asyncio, os, time
from pgharness import AsyncContext, Cancelled, Context, Runnable, experiment

@experiment
def spins(ctx: Context):
    ctx.result("process", os.getpid())
    try:
        while True:
            pass
    finally:
        ctx.info("cleaned up")

@experiment
def polls(ctx: Context):
    ctx.result("process", os.getpid())
    while not ctx.is_cancelled:
        time.sleep(0.01)
    ctx.info("cleaned up")

@experiment
def sleeps(ctx: Context):
    ctx.result("process", os.getpid())
    time.sleep(1000)

@experiment
async def sleeps_async(ctx: AsyncContext):
    ctx.result("process", os.getpid())
    try:
        await asyncio.sleep(1000)
    finally:
        ctx.info("cleaned up")

def forever(ctx: Context, number: int) -> None:
    while True:
        time.sleep(0.01)

@experiment
def maps(ctx: Context):
    ctx.result("process", os.getpid())
    try:
        ctx.map(forever, range(20))
    finally:
        ctx.info("cleaned up")

@experiment
def swallows(ctx: Context):
    ctx.result("process", os.getpid())
    while True:
        try:
            while True:
                time.sleep(0.01)
        except Exception:
            pass
        except Cancelled:
            ctx.info("cleaned up")
            raise

class Loop(Runnable):
    def prepare(self):
        self.ctx.result("process", os.getpid())

    def run(self):
        while True:
            time.sleep(0.01)

    def cleanup(self):
        self.ctx.info("cleaned up")

@experiment(name="staged")
class Staged(Loop):
    pass

@experiment(name="staged_here")
class staged_here(Loop):
    pass

@experiment(name="staged_async")
class StagedAsync(Runnable):
    async def run(self):
        self.ctx.result("process", os.getpid())
        await asyncio.sleep(1000)

    async def cleanup(self):
        await asyncio.sleep(0.1)
        self.ctx.info("cleaned up")
"""
_MODELS = """
import asyncio
from pgharness import AsyncContext, Context, experiment
from pgharness.errors import RequestRejected
from pydantic import BaseModel

class Verdict(BaseModel):
    verdict: str

def ask(ctx: Context, number: int) -> str:
    return ctx.complete_chat("priced", f"Say {number}.").text

@experiment
def asking(ctx: Context):
    assert len(ctx.map(ask, range(5))) == 5
    answer = ctx.complete_chat("simulator", [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi."}], schema=Verdict)
    ctx.result("verdict", answer.data)
    return ctx.complete_chat("priced", "Say it again.", seed=1).text == ctx.complete_chat("priced", "Say it again.", seed=1).text

@experiment
async def asking_async(ctx: AsyncContext):
    found = await asyncio.gather(*(ctx.complete_chat("priced", f"Say {number}.") for number in range(5)))
    return len({each.text for each in found})

def ask_again(ctx: Context, number: int) -> str:
    return ctx.complete_chat("dear", f"Say {number} once more.").text

@experiment
def asking_for_money(ctx: Context):
    return len(ctx.map(ask_again, range(60)))

@experiment
def asking_nobody(ctx: Context):
    ctx.complete_chat("nobody", "Hi.")

@experiment
def asking_otherwise(ctx: Context):
    told = []
    for model, parameters in (("pair", {}), ("pair", {"max_members": 1}), ("pair", {"temperature": 1}), ("simulator", {"qualitty": 1})):
        try:
            told.append(ctx.complete_chat(model, "Hi.", parameters=parameters).composition["responses"])
        except RequestRejected as error:
            told.append(str(error))
    return told
"""
_DIRECT = """
from pgharness import Context, experiment
from pydantic import BaseModel, Field

class Config(BaseModel):
    rounds: int = Field(2, ge=1, le=100)
    label: str = "none"

def double(ctx: Context, number: int) -> int:
    ctx.metric("doubled", number)
    return number * 2

@experiment
def direct(ctx: Context, config: Config):
    \"\"\"Doubles numbers.\"\"\"
    print("printed")
    total = sum(ctx.map(double, range(config.rounds)))
    ctx.result("label", config.label)
    if config.label == "bad":
        ctx.fail("the label is bad")
    return total

if __name__ == "__main__":
    direct()
"""
_HANDED = """
import os, time
from pgharness import Context, experiment

def item(ctx: Context, number: int) -> int:
    ctx.metric("number", number)
    while number >= 10 and not os.path.exists(os.path.join(os.environ["LAB"], "handed.gate")):
        time.sleep(0.01)
    return number

@experiment
def handed(ctx: Context):
    return sum(ctx.map(item, range(20)))

if __name__ == "__main__":
    handed()
"""
_SIMPLE = """
from pgharness import Context, experiment

@experiment
def {name}(ctx: Context):
    return "{value}"
"""


@pytest.fixture(scope="module")
def lab(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CodeLab]:
    """A laboratory whose worker serves all of the above, among files that cannot be used."""
    with cloned(server_url, template) as url, opened(url, tmp_path_factory.mktemp("code")) as lab:
        lab.write("gates", _GATES)
        lab.write("telling", _TELLING)
        lab.write("maps", _MAPS)
        lab.write("stops", _STOPS)
        lab.write("models", _MODELS)
        lab.write("direct", _DIRECT)
        lab.write("broken", _SIMPLE.format(name="unheard", value="") + "def broken(:\n")
        lab.write("raises", "raise RuntimeError('not today')\n" + _SIMPLE.format(name="never", value=""))
        lab.write("exits", "import os\nfrom pgharness import experiment\nos._exit(7)\n")
        lab.db.execute(
            "insert into pgharness.models (name, provider, input_usd_per_million, output_usd_per_million, parameters)"
            """ values ('priced', 'simulator', 1, 10, '{"latency_seconds": 0}')"""
        )
        lab.worker("--log-level", "info", serves="telling", PGHARNESS_STALE_SECONDS="5")
        yield lab


# -- what a run tells


@pytest.mark.parametrize("experiment", ["telling", "telling_async"])
def test_what_a_run_tells_is_there_while_it_goes_on(lab: CodeLab, experiment: str) -> None:
    run_id = lab.start(experiment, gate=experiment)
    last = (
        "select exists (select from pgharness.run_llm_calls where run_id = %s and model = 'asked')"
        " and exists (select from pgharness.run_artifacts where run_id = %s and name = 'bytes.bin')"
    )
    lab.wait(lambda: lab.value(last, run_id, run_id), "all that is told")
    assert lab.progress(run_id)["status"] == "running"
    lines = lab.rows(
        "select level, message, data from pgharness.logs where run_id = %s and task = 0 order by id", run_id
    )
    in_order = [line for line in lines if line[1] != "printed by a program"]
    expected = [
        ("info", "printed", {"stream": "stdout"}),
        ("warning", "printed to stderr", {"stream": "stderr"}),
        ("warning", "logged by a library", {"logger": "library"}),
        ("debug", "said", {"number": 1}),
        ("info", "one of two", {}),
        ("error", "two of two", {"why": "for show"}),
    ]
    if experiment == "telling_async":
        expected = [("info", "printed in a thread", {"stream": "stdout"}), *expected]
    assert in_order == expected
    lab.wait(lambda: "printed by a program" in lab.messages(run_id), "what a program printed")
    assert lab.results(run_id) == {"answer": {"value": 42}}
    metrics = lab.rows(
        "select name, value, metric_type, step, data from pgharness.run_metrics where run_id = %s order by id", run_id
    )
    assert metrics == [("accuracy", 0.5, "accuracy", 3, {"of": [1, 2]}), ("decorated", 1.5, "share", None, None)]
    timings = lab.rows(
        "select operation from pgharness.run_timings where run_id = %s and duration_ms >= 0 order by id", run_id
    )
    assert timings == [("nothing",), ("decorated",)]
    calls = lab.rows(
        "select model, input, output, error from pgharness.run_llm_calls where run_id = %s order by id", run_id
    )
    assert calls[0] == ("elsewhere", [{"role": "user", "content": "hi"}], "hello", None)
    assert (calls[1][0], calls[1][2:]) == ("asked", ("WHY", None))
    kept = lab.rows(
        "select a.name, a.media_type, c.content from pgharness.run_artifacts as a"
        " join pgharness.artifact_contents as c using (digest) where a.run_id = %s order by a.name desc",
        run_id,
    )
    assert [(name, kind, bytes(content)) for name, kind, content in kept] == [
        ("words.txt", "text/plain", "héllo".encode()),
        ("bytes.bin", "application/octet-stream", bytes(range(256))),
    ]
    progress = lab.progress(run_id)
    assert (progress["position"], progress["total"], progress["message"]) == (1, 4, "a quarter")
    assert progress["percent_done"] == 25
    lab.open_gate(experiment)
    lab.wait_for_end(run_id)
    returned = lab.root(run_id)["result"]
    assert returned["kind"] == "trial"
    assert lab.results(run_id)["return"] == returned
    progress = lab.progress(run_id)
    assert (progress["position"], progress["total"], progress["percent_done"]) == (4, 4, 100)


def test_a_line_is_in_the_log_within_a_second(lab: CodeLab, record_property: Any) -> None:
    """Within 200 ms on a machine with nothing else to do; a busy one is given more."""
    run_id = lab.start("ticking", gate="", lines=25)
    seen: dict[float, float] = {}

    def look() -> bool:
        for (at,) in lab.rows(
            "select (data ->> 'at')::float8 from pgharness.logs where run_id = %s and message = 'tick'", run_id
        ):
            seen.setdefault(at, time.time() - at)
        return len(seen) == 25

    lab.wait(look, "25 lines")
    delays = sorted(seen.values())
    record_property("log_visible_ms", {"median": delays[12] * 1000, "max": delays[-1] * 1000})
    print(f"log visible after: median {delays[12] * 1000:.0f} ms, max {delays[-1] * 1000:.0f} ms")
    assert delays[-1] < 1.0
    lab.wait_for_end(run_id)


def test_many_lines_arrive_in_order(lab: CodeLab, record_property: Any) -> None:
    began = time.monotonic()
    run_id = lab.run("talkative", gate="", lines=20_000)
    record_property("lines_per_second", 20_000 / (time.monotonic() - began))
    lines = [line for line in lab.messages(run_id) if line.startswith("line ")]
    assert lines == [f"line {number}" for number in range(20_000)]


# -- maps


@pytest.mark.parametrize("experiment", ["typed", "typed_async"])
def test_a_map_keeps_the_order_and_the_types_of_its_items(lab: CodeLab, experiment: str) -> None:
    run_id = lab.run(experiment)
    assert lab.root(run_id)["result"] == 20
    items = lab.items(run_id)
    assert len(items) == 40
    assert {(item["status"], item["attempts"]) for item in items} == {("succeeded", 1)}
    assert {item["map"] for item in items} == {"answer", "answer_async"}


def test_failed_items_are_collected(lab: CodeLab) -> None:
    run_id = lab.run("collecting")
    assert lab.root(run_id)["result"] == {
        str(number): f"ValueError: {number} is a multiple of three" for number in (0, 3, 6)
    }
    assert lab.progress(run_id)["tasks_failed"] == 3
    failed = [item for item in lab.items(run_id) if item["status"] == "failed"]
    assert all("in picky" in item["traceback"] for item in failed)


def test_a_failed_item_raises_and_is_named(lab: CodeLab) -> None:
    run_id = lab.run("raising", status="failed")
    assert lab.results(run_id)["caught"] == {"key": "number 3", "error": "ValueError: 3 is a multiple of three"}
    assert lab.progress(run_id)["reason"] == (
        "TaskFailed: item 'number 3' failed: ValueError: 3 is a multiple of three"
    )


def test_an_item_is_tried_as_often_as_it_may(lab: CodeLab) -> None:
    run_id = lab.run("retrying")
    assert lab.root(run_id)["result"] == [1, 2, 3, "RuntimeError: try 3 of 3"]
    assert [item["attempts"] for item in lab.items(run_id)] == [1, 2, 3, 3]
    # what earlier tries told is taken back
    tries = lab.rows("select value from pgharness.run_metrics where run_id = %s order by task", run_id)
    assert tries == [(1,), (2,), (3,), (3,)]


def test_items_map_in_turn(lab: CodeLab) -> None:
    run_id = lab.run("nested")
    assert lab.root(run_id)["result"] == [50 * number + 10 for number in range(30)]
    assert len(lab.items(run_id)) == 30 + 150


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("keys", "two items have the key 'one for all'"),
        ("lambda", "map() needs a function that other processes can find"),
        ("local", "refused.<locals>.local is none: define it at the top of its module"),
        ("other item", 'map "same" has an item "k" already, and it is another one'),
        ("item", "PydanticSerializationError"),
    ],
)
def test_what_cannot_be_mapped_is_refused_and_says_why(lab: CodeLab, how: str, said: str) -> None:
    run_id = lab.run("refused", status="failed", how=how)
    assert said in lab.progress(run_id)["reason"]


def test_maps_take_any_iterable_and_any_name(lab: CodeLab) -> None:
    assert lab.root(lab.run("edges"))["result"] == [[], [], [3, 1, 2], [7, 7, 7], [1], [1]]


def test_a_map_of_2000_items(lab: CodeLab, record_property: Any) -> None:
    began = time.monotonic()
    run_id = lab.run("large", seconds=60)
    record_property("items_per_second", 2000 / (time.monotonic() - began))
    assert lab.root(run_id)["result"] is True
    metrics = lab.rows("select count(*), count(distinct value) from pgharness.run_metrics where run_id = %s", run_id)
    assert metrics == [(2000, 2000)]
    assert {item["attempts"] for item in lab.items(run_id)} == {1}


# -- going on


def process_of(lab: CodeLab, run_id: int) -> int:
    """Wait for a run to say which process it runs in."""
    lab.wait(lambda: "process" in lab.results(run_id), "the run to begin")
    return int(lab.results(run_id)["process"])


def assert_each_once(lab: CodeLab, run_id: int, count: int) -> None:
    """Check that every item told its number once, whatever became of earlier tries."""
    told = lab.rows(
        "select value, task from pgharness.metrics where run_id = %s and name = 'number' order by value", run_id
    )
    assert [value for value, _ in told] == list(range(count))
    assert len({task for _, task in told}) == count


def test_a_killed_run_does_only_what_it_had_not_done(lab: CodeLab) -> None:
    run_id = lab.start("checkpointed", gate="killed")
    pid = process_of(lab, run_id)
    lab.wait(lambda: lab.progress(run_id)["tasks_succeeded"] == 20, "20 items")
    lab.wait(lambda: len(lab.results(run_id)) > 21, "an item that waits for the gate")
    os.kill(pid, signal.SIGKILL)
    lab.wait(lambda: lab.root(run_id)["attempts"] == 2, "another process")
    lab.open_gate("killed")
    lab.wait_for_end(run_id)
    assert lab.root(run_id)["result"] == sum(range(40))
    assert lab.root(run_id)["attempts"] == 2
    items = lab.items(run_id)
    assert [item["attempts"] for item in items[:20]] == [1] * 20
    assert {item["status"] for item in items} == {"succeeded"}
    assert {item["attempts"] for item in items[20:]} <= {1, 2}
    assert_each_once(lab, run_id, 40)
    told = lab.rows("select key, count(*) from pgharness.results where run_id = %s group by 1", run_id)
    assert dict(told) == {f"item {number}": 1 for number in range(40)} | {"process": 1, "return": 1}
    assert lab.value("select count(*) from pgharness.metrics where run_id = %s and name = 'begun'", run_id) == 1
    assert "its process was killed by SIGKILL" in lab.messages(run_id, "error")


def test_a_paused_run_goes_on_where_it_was(lab: CodeLab) -> None:
    run_id = lab.start("checkpointed", gate="paused")
    pid = process_of(lab, run_id)
    lab.wait(lambda: lab.progress(run_id)["tasks_succeeded"] == 20, "20 items")
    lab.db.execute("select pgharness.pause_run(%s::bigint)", (run_id,))
    lab.wait(lambda: not is_alive(pid), "the process to end", 10)
    assert lab.progress(run_id)["status"] == "paused", lab.progress(run_id)["reason"]
    lab.open_gate("paused")
    lab.db.execute("select pgharness.resume_run(%s::bigint)", (run_id,))
    lab.wait_for_end(run_id)
    assert lab.root(run_id)["result"] == sum(range(40))
    assert [item["attempts"] for item in lab.items(run_id)[:20]] == [1] * 20
    assert_each_once(lab, run_id, 40)


def test_retry_failed_keeps_what_is_done(lab: CodeLab) -> None:
    run_id = lab.run("fragile_run", status="failed", gate="fragile")
    assert "item" in lab.progress(run_id)["reason"]
    lab.open_gate("fragile")
    lab.db.execute("select pgharness.retry_failed(%s::bigint)", (run_id,))
    lab.wait_for_end(run_id)
    assert lab.root(run_id)["result"] == list(range(8))
    assert [item["attempts"] for item in lab.items(run_id)] == [1, 1, 1, 2, 1, 1, 1, 1]
    assert_each_once(lab, run_id, 8)
    assert lab.value("select count(*) from pgharness.metrics where run_id = %s and name = 'begun'", run_id) == 1
    progress = lab.progress(run_id)
    assert (progress["tasks_failed"], progress["tasks_succeeded"]) == (0, 9)


@pytest.mark.parametrize(
    "experiment",
    ["spins", "polls", "sleeps", "sleeps_async", "maps", "swallows", "staged", "staged_async"],
)
def test_cancel_ends_what_runs_and_lets_it_clean_up(lab: CodeLab, experiment: str, record_property: Any) -> None:
    run_id = lab.start(experiment)
    pid = process_of(lab, run_id)
    if experiment == "maps":
        lab.wait(lambda: lab.progress(run_id)["task_count"] == 21, "its items")
    lab.db.execute("select pgharness.cancel_run(%s::bigint)", (run_id,))
    took = lab.wait(lambda: not is_alive(pid), "the process to end", 10)
    record_property("cancel_seconds", took)
    print(f"cancelled {experiment} in {took:.2f} s")
    assert took < 5
    progress = lab.progress(run_id)
    assert (progress["status"], progress["reason"]) == ("cancelled", "cancelled by hand")
    if experiment != "sleeps":  # nobody can interrupt a thread that sleeps; its process is killed
        assert "cleaned up" in lab.messages(run_id)
    jobs = "select count(*) from procrastinate.procrastinate_jobs where args ->> 'run_id' = %s"
    lab.wait(lambda: lab.value(jobs, str(run_id)) == 0, "its jobs to end")


# -- models


@pytest.mark.parametrize("experiment", ["asking", "asking_async"])
def test_questions_to_models_are_recorded_and_costed(lab: CodeLab, experiment: str) -> None:
    run_id = lab.run(experiment)
    calls = {"asking": {"priced": 7, "simulator": 1}, "asking_async": {"priced": 5}}[experiment]
    found = lab.dicts(
        "select model, kind, call_count, calls_failed, cost_usd from pgharness.model_performance where run_id = %s",
        run_id,
    )
    assert {row["model"]: row["call_count"] for row in found} == calls
    assert {(row["kind"], row["calls_failed"]) for row in found} == {("task", 0)}
    cost = next(row["cost_usd"] for row in found if row["model"] == "priced")
    assert cost > 0
    assert lab.value("select cost_usd from pgharness.cost_by_run where run_id = %s", run_id) == cost
    assert lab.value("select sum(cost_usd) from pgharness.calls where run_id = %s", run_id) == cost
    assert miscounted(lab.db) == []
    if experiment == "asking":
        assert lab.root(run_id)["result"] is True, "one seed, one answer"
        assert "verdict" in lab.results(run_id)["verdict"]


def test_code_keeps_to_a_budget_and_goes_on_with_a_larger_one(lab: CodeLab) -> None:
    lab.db.execute(
        "insert into pgharness.models (name, provider, input_usd_per_million, output_usd_per_million, parameters)"
        """ values ('dear', 'simulator', 1000, 1000, '{"latency_seconds": 0.05}')"""
    )
    lab.db.execute("insert into pgharness.instances (name, experiment) values ('for money', 'asking_for_money')")
    run_id = lab.value("select run_id from pgharness.start_run('for money', budget_usd => 0.2)")
    lab.wait(lambda: lab.progress(run_id)["status"] == "paused", "the end of its money")
    [(spent, reason, dearest)] = lab.rows(
        "select r.task_cost_usd, r.reason, (select max(c.cost_usd) from pgharness.calls as c where c.run_id = r.id)"
        " from pgharness.runs as r where r.id = %s",
        run_id,
    )
    assert Decimal("0.2") <= spent <= Decimal("0.2") + 12 * dearest, "the first calls, of unknown cost, and no more"
    lab.db.execute(reason.partition("continue with: ")[2].replace("0.4", "100").encode())
    lab.wait(lambda: lab.progress(run_id)["status"] == "completed", "the rest")
    assert lab.root(run_id)["result"] == 60


def test_parameters_of_a_question_count_as_in_a_combination(lab: CodeLab) -> None:
    lab.db.execute(
        "insert into pgharness.models (name, provider, parameters)"
        """ values ('pair', 'ensemble', '{"members": ["simulator", "simulator"], "min_responses": 1}')"""
    )
    both, one, strange, mistyped = lab.root(lab.run("asking_otherwise"))["result"]
    assert (both, one) == (2, 1)
    assert "temperature: is not known" in strange and "qualitty: is not known" in mistyped


def test_a_model_that_is_not_there_is_named(lab: CodeLab) -> None:
    run_id = lab.run("asking_nobody", status="failed")
    assert "nobody" in lab.progress(run_id)["reason"]


# -- kinds of runs


def test_trials_are_purged_and_milestones_kept(lab: CodeLab) -> None:
    lab.open_gate("kinds")
    runs = [lab.run("telling", instance="kinds", kind=kind, gate="kinds") for kind in ("trial", "milestone", "trial")]
    assert [lab.root(run_id)["result"]["kind"] for run_id in runs] == ["trial", "milestone", "trial"]
    with pytest.raises(psycopg.Error, match="is a milestone, which is kept"):
        lab.db.execute("delete from pgharness.runs where id = %s", (runs[1],))
    assert lab.value("select pgharness.purge_trials('kinds')") == 1
    assert lab.rows("select id from pgharness.runs where instance = 'kinds' order by id") == [(runs[1],), (runs[2],)]
    orphans = "select count(*) from pgharness.artifact_contents as c where not exists (select from pgharness.artifacts as a where a.digest = c.digest)"
    assert lab.value(orphans) == 0


def test_a_program_runs_its_experiment_by_itself(lab: CodeLab) -> None:
    done = lab.python(
        "-m", "experiments.direct", "--milestone", "--run-id", "v1", "--set", "rounds=3", "--set", "label=first"
    )
    assert "printed" in done.stdout
    run_id, kind, status = lab.rows("select id, kind, status from pgharness.runs where name = 'v1'")[0]
    assert (kind, status) == ("milestone", "completed")
    assert f"run {run_id} (v1) is completed" in done.stdout
    assert lab.root(run_id)["result"] == 6
    assert lab.results(run_id)["label"] == "first"
    assert "printed" in lab.messages(run_id)
    doubled = lab.rows("select value from pgharness.run_metrics where run_id = %s order by value", run_id)
    assert doubled == [(0,), (1,), (2,)]
    assert {item["attempts"] for item in lab.items(run_id)} == {1}
    versions = lab.rows("select version, module, function from pgharness.experiment_list where experiment = 'direct'")
    assert versions == [(1, "path:experiments/direct.py", "direct")], "the same code under the same name as a worker's"


def test_workers_go_on_with_what_a_program_left(lab: CodeLab) -> None:
    lab.write("handed", _HANDED)
    lab.wait(lambda: is_served(lab, "handed"), "the new experiment to be served")
    program = subprocess.Popen([sys.executable, "-m", "experiments.handed"], cwd=lab.folder, env=lab.environment())
    lab.wait(
        lambda: lab.value("select tasks_succeeded from pgharness.run_progress where run = 'handed/1'") == 10, "10 items"
    )
    run_id = lab.value("select run_id from pgharness.run_progress where run = 'handed/1'")
    program.kill()
    program.wait()
    lab.wait(lambda: lab.root(run_id)["attempts"] == 2, "a worker to go on", 30)
    lab.open_gate("handed")
    lab.wait_for_end(run_id)
    assert lab.root(run_id)["result"] == sum(range(20))
    assert {item["attempts"] for item in lab.items(run_id)[:10]} == {1}
    assert_each_once(lab, run_id, 20)


def test_a_program_that_is_interrupted_cancels_its_run(lab: CodeLab) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", "from experiments.stops import staged_here; staged_here()"],
        cwd=lab.folder,
        env=lab.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which who runs the tests may ignore
    )
    running = "select max(run_id) from pgharness.run_results where run like 'staged_here/%%' and key = 'process'"
    lab.wait(lambda: lab.value(running), "the run to begin")
    program.send_signal(signal.SIGINT)
    assert program.wait(30) != 0
    assert program.stderr is not None
    assert "interrupted from the keyboard" in program.stderr.read()
    program.stderr.close()
    run_id = lab.value(running)
    assert lab.progress(run_id)["status"] == "cancelled"
    assert "cleaned up" in lab.messages(run_id)


def test_a_program_that_fails_says_so(lab: CodeLab) -> None:
    failed = lab.python("-m", "experiments.direct", "--set", "label=bad", check=False)
    assert failed.returncode == 5
    assert "is failed: the label is bad" in failed.stdout
    refused = lab.python("-m", "experiments.direct", "--set", "rounds=1000", check=False)
    assert refused.returncode != 0
    assert "rounds" in refused.stderr
    asked = lab.python("-m", "experiments.direct", "--run-id", "v2", check=False)
    assert asked.returncode == 2
    assert "--run-id is for milestone runs" in asked.stderr


# -- code and its versions


def test_changed_code_is_another_version_and_the_run_says_which(lab: CodeLab) -> None:
    path = lab.write("changing", _SIMPLE.format(name="changing", value="old"))
    lab.wait(lambda: is_served(lab, "changing"), "the new experiment to be served")
    first = lab.run("changing", instance="changing")
    path.write_text(path.read_text().replace("old", "new"))
    second = lab.run("changing", instance="changing")
    assert [lab.root(run_id)["result"] for run_id in (first, second)] == ["old", "new"]
    said = [lab.value("select code from pgharness.run_provenance where run_id = %s", run) for run in (first, second)]
    assert [[code["version"] for code in versions] for versions in said] == [[1], [2]]
    sources = lab.rows(
        "select digest, source from pgharness.experiment_versions where experiment_id = (select id from pgharness.experiments where name = 'changing') order by number"
    )
    assert [code["digest"] for versions in said for code in versions] == [digest for digest, _ in sources]
    assert ["new" in source for _, source in sources] == [False, True]
    # what is put back is the version that it was
    path.write_text(path.read_text().replace("new", "old"))
    third = lab.run("changing", instance="changing")
    assert lab.value("select code -> 0 -> 'version' from pgharness.run_provenance where run_id = %s", third) == 1


def is_served(lab: CodeLab, experiment: str) -> bool:
    return bool(lab.value("select is_served from pgharness.experiment_list where experiment = %s", experiment))


def test_a_run_that_no_worker_has_the_code_of_says_so_and_runs_once_one_has(lab: CodeLab) -> None:
    source = _SIMPLE.format(name="elsewhere", value="here at last")
    schema = json.dumps({"type": "object"})
    digest = hashlib.sha256(source.encode()).hexdigest()
    lab.db.execute(
        "select pgharness.register_experiment('elsewhere', '', 'path:experiments/elsewhere.py', 'elsewhere', %s, %s, %s)",
        (digest, source, schema),
    )
    run_id = lab.start("elsewhere")
    stalled = lab.rows("select problem, remedy from pgharness.stalled_work where run_id = %s", run_id)
    assert stalled == [
        (
            'no running worker has the code of experiment "elsewhere"',
            "start one where it is: pgharness worker, in the folder of its project",
        )
    ]
    lab.write("elsewhere", source)
    lab.wait_for_end(run_id)
    assert lab.root(run_id)["result"] == "here at last"
    assert lab.rows("select 1 from pgharness.stalled_work where run_id = %s", run_id) == []


def test_code_that_ends_its_process_while_it_is_loaded_fails_its_run(lab: CodeLab) -> None:
    dying = "import os\n\nif os.path.exists(os.path.join(os.environ['LAB'], 'dying.gate')):\n    os._exit(3)\n"
    lab.write("dying", dying + _SIMPLE.format(name="dying", value="alive"))
    lab.wait(lambda: is_served(lab, "dying"), "the new experiment to be served")
    lab.open_gate("dying")
    run_id = lab.run("dying", status="failed")
    assert lab.progress(run_id)["reason"] == "its process ended itself with status 3 while its code was loaded"


def test_files_that_cannot_be_used_stop_no_others(lab: CodeLab) -> None:
    text = lab.workers[0].text()
    for name, said in (("broken.py:6", "invalid syntax"), ("raises.py", "not today"), ("exits.py", "")):
        lines = [line for line in text.splitlines() if name in line]
        assert any(said in line for line in lines), f"{name}: {text[-2000:]}"
    assert not is_served(lab, "never")
    assert is_served(lab, "telling")


# -- workers that go and come


@pytest.fixture
def other(url: str, tmp_path: Path) -> Iterator[CodeLab]:
    """A laboratory for tests that end workers."""
    with opened(url, tmp_path) as made:
        made.write("gates", _GATES)
        made.write("maps", _MAPS)
        yield made


def test_a_worker_that_is_told_to_end_hands_back_and_another_one_goes_on(other: CodeLab, record_property: Any) -> None:
    workers = [other.worker("--queues", "task", "--concurrency", "20") for _ in range(2)]
    served = "select count(*) from pgharness.workers where 'drained' = any (experiments)"
    other.wait(lambda: other.value(served) == 2, "both workers", 120)
    run_id = other.start("drained")
    other.wait(lambda: other.progress(run_id)["tasks_succeeded"] >= 5, "5 items")
    pid = other.value(
        "select w.pid from pgharness.workers as w join pgharness.tasks as t on t.worker_id = w.id and t.ordinal = 0"
    )
    first, second = sorted(workers, key=lambda worker: pid not in worker.worker_pids)
    began = time.monotonic()
    assert first.end(signal.SIGTERM) == 0
    took = time.monotonic() - began
    record_property("drain_seconds", took)
    print(f"drained in {took:.2f} s")
    assert took < 5, "it waits for the items that run, not for all that it has taken"
    other.wait_for_end(run_id, seconds=60)
    assert other.root(run_id)["result"] == sum(range(200))
    assert_each_once(other, run_id, 200)
    assert other.value("select count(*) from pgharness.run_workers where run_id = %s", run_id) == 2
    assert other.rows("select distinct crashes, failures from pgharness.tasks where run_id = %s", run_id) == [(0, 0)]
    began = time.monotonic()
    assert second.end() == 0
    print(f"idle worker ended in {time.monotonic() - began:.2f} s")
    assert other.value("select count(*) from procrastinate.procrastinate_jobs") == 0
    states = other.rows("select status, count(*) from pgharness.workers group by 1")
    assert [status for status, _ in states] == ["stopped"]


def test_maps_in_maps_need_no_more_than_one_place(other: CodeLab) -> None:
    """Whoever waits for a map holds nothing that its items need, at any depth, also after a crash."""
    worker = other.worker("--queues", "task", "--concurrency", "1", serves="deep")
    run_id = other.start("deep")
    for done in (10, 60):
        other.wait(lambda done=done: other.progress(run_id)["tasks_succeeded"] >= done, f"{done} tasks", 30)
        os.kill(worker.run_pids[0], signal.SIGKILL)
    other.wait_for_end(run_id, seconds=60)
    assert other.root(run_id)["result"] == [(50 * 2 * n + 10) + (50 * (2 * n + 1) + 10) + 10 * n for n in range(20)]
    assert other.progress(run_id)["tasks_succeeded"] == 1 + 20 + 20 + 40 + 200
