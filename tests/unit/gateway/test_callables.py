"""Python functions as models: how they are called, what they may answer, and what a bad one cannot do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgharness.errors import CodeFailed, InvalidOutput, ModelError, RateLimited, RequestRejected, TimedOut
from pgharness.gateway.callables import PythonCallable
from pgharness.types import Completion, Message, ModelSpec, Request, Usage

SRC = Path(__file__).parents[3] / "src"

ANSWERS = """
import asyncio, contextvars, os, sys, threading
from pgharness.errors import RateLimited
from pgharness.types import Completion, Usage

gate = threading.Event()
began = []
cancelled = []
where = contextvars.ContextVar("where", default="nowhere")

def echo(item, **parameters):
    return {"item": item, "parameters": parameters, "thread": threading.current_thread() is threading.main_thread()}

async def later(item, **parameters):
    await asyncio.sleep(0)
    return {"item": item, "parameters": parameters, "thread": threading.current_thread() is threading.main_thread()}

class Scribe:
    async def __call__(self, item):
        return "from an object"

    @staticmethod
    def write(item):
        return "from a method"

scribe = Scribe()

def given(item, value=None):
    return value

def odd(item):
    return {"set": {1, 2}}

def infinite(item):
    return float("inf")

def circular(item):
    answer = []
    answer.append(answer)
    return answer

def nothing(item):
    pass

def unstorable(item):
    return {"text": "nul \\0 and half \\ud800", "literal": "\\\\u0000"}

def whole(item):
    return Completion(text="a note", usage=Usage(10, 20), finish_reason="length", request_id="r-1")

def whole_data(item):
    return Completion(text="", data={"verdicts": ()}, usage=Usage(1, 2))

def wrong_data(item):
    return Completion(text="", data=object())

def change(item):
    item["case"]["input"].append("changed")
    item["extra"] = 1
    return "changed"

def fail(item):
    def deeper():
        raise ValueError(f"no such thing as {item['case']['name']} \\0 {os.environ.get('SCRIBE_KEY')}")
    deeper()

async def fail_later(item):
    raise KeyError("missing")

def leave(item):
    sys.exit(3)

async def leave_later(item):
    sys.exit(3)

def interrupt(item):
    raise KeyboardInterrupt

def stop(item):
    raise StopIteration

async def cancel_itself(item):
    raise asyncio.CancelledError

def time_out_itself(item):
    raise TimeoutError("the socket is slow")

async def time_out_later(item):
    raise TimeoutError("the socket is slow")

class Shy(Exception):
    def __str__(self):
        raise RuntimeError("no words")

def shy(item):
    raise Shy

def slow_down(item):
    raise RateLimited("wait", retry_after=9)

def hang(item):
    began.append(threading.current_thread())
    gate.wait(60)
    return "late"

async def hang_later(item):
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        cancelled.append(item["case"]["name"])
        raise

def context(item):
    return where.get()

number = 17
"""


@pytest.fixture(autouse=True)
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of the user's own, importable as `study.answers`; its hanging threads are let go at the end."""
    package = tmp_path / "study"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "answers.py").write_text(ANSWERS)
    (package / "broken.py").write_text("import no_such_library_anywhere")
    (package / "unfinished.py").write_text("def write(item:\n")
    (package / "leaving.py").write_text("import sys; sys.exit('not today')")
    monkeypatch.syspath_prepend(str(tmp_path))
    import study.answers  # type: ignore[import-not-found]

    yield study.answers
    study.answers.gate.set()
    for thread in study.answers.began:
        thread.join(10)
    for name in [name for name in sys.modules if name.split(".")[0] == "study"]:
        del sys.modules[name]


def model(name: str, *, module: str = "study.answers", **more: Any) -> PythonCallable:
    return PythonCallable(ModelSpec(id=1, name="mine", provider="python", model=f"{module}:{name}", **more))


def request(**more: Any) -> Request:
    item = {"case": {"name": "cough", "input": ["The patient coughs."]}, "config": {}, "overlap": 100}
    return Request(messages=(Message("user", "Write."),), item=item, seed=5, attempt=2, **more)


async def failure(callable_: PythonCallable, asked: Request | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await callable_(asked or request())
    return caught.value


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("name", "in_main_thread"), [("echo", False), ("later", True)])
async def test_a_function_gets_the_item_and_the_parameters(name: str, in_main_thread: bool) -> None:
    asked = request(parameters={"temperature": 0.5}, schema={"type": "object"})
    completion = await model(name, parameters={"temperature": 1.0, "style": "brief"})(asked)
    assert completion.data == {
        "item": {
            **asked.item,
            "messages": [{"role": "user", "content": "Write."}],
            "schema": {"type": "object"},
            "seed": 5,
            "attempt": 2,
        },
        "parameters": {"temperature": 0.5, "style": "brief"},
        "thread": in_main_thread,
    }
    assert json.loads(completion.text) == completion.data


@pytest.mark.parametrize(
    ("name", "text"),
    [("scribe", "from an object"), ("Scribe.write", "from a method"), ("scribe.write", "from a method")],
)
async def test_anything_that_can_be_called_is_a_function(name: str, text: str) -> None:
    assert (await model(name)(request())).text == text


@pytest.mark.parametrize("value", [{"plan": "rest"}, ["a"], [], {}, 3, 2.5, True, False, 0])
async def test_json_becomes_data(value: Any) -> None:
    completion = await model("given", parameters={"value": value})(request())
    assert completion.data == value and type(completion.data) is type(value)
    assert json.loads(completion.text) == value
    assert completion.finish_reason == "stop"


async def test_text_stays_text_unless_a_schema_asks_for_json() -> None:
    told = model("given", parameters={"value": '{"a": 1}'})
    assert ((await told(request())).text, (await told(request())).data) == ('{"a": 1}', None)
    assert (await told(request(schema={"type": "object"}))).data == {"a": 1}
    prose = await failure(model("given", parameters={"value": "Well, ..."}), request(schema={"type": "object"}))
    assert isinstance(prose, InvalidOutput) and prose.text == "Well, ..."


async def test_a_completion_keeps_what_the_function_knows() -> None:
    completion = await model("whole")(request())
    assert completion == Completion("a note", None, Usage(10, 20), finish_reason="length", request_id="r-1")
    with_data = await model("whole_data")(request())
    assert (with_data.data, with_data.text, with_data.usage) == ({"verdicts": []}, '{"verdicts": []}', Usage(1, 2))


@pytest.mark.parametrize("name", ["odd", "infinite", "circular", "nothing", "wrong_data"])
async def test_what_is_not_json_is_refused(name: str) -> None:
    error = await failure(model(name))
    assert isinstance(error, InvalidOutput) and error.text


@pytest.mark.parametrize("value", ["", "  \n"])
async def test_empty_text_is_refused(value: str) -> None:
    assert isinstance(await failure(model("given", parameters={"value": value})), InvalidOutput)


async def test_characters_that_postgres_cannot_store_are_replaced() -> None:
    completion = await model("unstorable")(request())
    assert completion.data == {"text": "nul \ufffd and half \ufffd", "literal": "\\u0000"}
    completion.text.encode()


async def test_a_function_that_changes_its_item_changes_no_other() -> None:
    asked = request()
    await model("change")(asked)
    assert asked.item == request().item


async def test_an_exception_keeps_its_traceback_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIBE_KEY", "sk-very-secret")
    error = await failure(model("fail", api_key_env="SCRIBE_KEY"))
    assert isinstance(error, CodeFailed)
    assert "ValueError: no such thing as cough" in str(error) and "study.answers:fail" in str(error)
    assert error.text and 'answers.py", line' in error.text and "deeper" in error.text
    for kept in (str(error), error.text):
        assert "sk-very-secret" not in kept and "[redacted]" in kept and "\0" not in kept


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fail_later", "KeyError"),
        ("leave", "SystemExit: 3"),
        ("leave_later", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt"),
        ("stop", "StopIteration"),
        ("cancel_itself", "CancelledError"),
        ("time_out_itself", "TimeoutError: the socket is slow"),
        ("time_out_later", "TimeoutError: the socket is slow"),
        ("shy", "Shy"),
    ],
)
async def test_whatever_is_raised_fails_the_attempt_and_nothing_else(name: str, said: str) -> None:
    error = await failure(model(name))
    assert isinstance(error, CodeFailed)
    assert said in str(error) and error.text


async def test_a_function_may_say_that_it_was_rate_limited() -> None:
    error = await failure(model("slow_down"))
    assert isinstance(error, RateLimited) and error.retry_after == 9


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("study.missing", "write", "ModuleNotFoundError"),
        ("nowhere", "write", "No module named 'nowhere'"),
        ("study.broken", "write", "no_such_library_anywhere"),
        ("study.unfinished", "write", "SyntaxError"),
        ("study.leaving", "write", "not today"),
        ("study.answers", "absent", "absent"),
        ("study.answers", "number", "int"),
    ],
)
async def test_what_cannot_be_imported_is_named_with_the_reason(module: str, name: str, reason: str) -> None:
    error = await failure(model(name, module=module))
    assert isinstance(error, RequestRejected)
    assert f"{module}:{name}" in str(error) and reason in str(error) and error.hint


@pytest.mark.parametrize(
    "name", ["", "write", "study.answers", "study.answers:", ":write", "study/answers.py:write", "a:b:c"]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(RequestRejected, match="names the Python function") as caught:
        PythonCallable(ModelSpec(id=1, name="mine", provider="python", model=name))
    assert caught.value.hint


async def test_parameters_that_the_function_does_not_take_are_named() -> None:
    error = await failure(model("nothing", parameters={"temperature": 1}))
    assert isinstance(error, RequestRejected) and "temperature" in str(error)


async def test_an_async_function_is_cancelled_past_its_timeout(answers: Any) -> None:
    error = await failure(model("hang_later", timeout_seconds=0.1))
    assert isinstance(error, TimedOut) and "0.1 s" in str(error)
    assert answers.cancelled == ["cough"]


async def test_an_async_function_is_cancelled_with_its_task(answers: Any) -> None:
    running = asyncio.create_task(model("hang_later")(request()))
    await asyncio.wait([running], timeout=0.2)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert answers.cancelled == ["cough"]


async def test_a_hung_thread_times_out_and_its_late_answer_is_nobodys(answers: Any) -> None:
    hung = model("hang", timeout_seconds=0.2)
    assert isinstance(await failure(hung), TimedOut)
    answers.gate.set()
    await until(lambda: not answers.began[0].is_alive())
    assert (await hung(request())).text == "late"


async def test_a_cancelled_call_returns_at_once(answers: Any) -> None:
    running = asyncio.create_task(model("hang")(request()))
    await until(lambda: answers.began)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_hung_threads_are_bounded_and_their_places_come_back(answers: Any) -> None:
    hung = model("hang", timeout_seconds=0.3, max_concurrency=2)
    errors = await asyncio.gather(*(failure(hung) for _ in range(6)))
    assert all(isinstance(error, TimedOut) for error in errors)
    assert len(answers.began) == 2
    assert "busy" in str(await failure(hung))
    answers.gate.set()
    await until(lambda: not any(thread.is_alive() for thread in answers.began))
    assert [answer.text for answer in await asyncio.gather(*(hung(request()) for _ in range(6)))] == ["late"] * 6


async def test_context_variables_reach_a_thread(answers: Any) -> None:
    answers.where.set("here")
    assert (await model("context")(request())).text == "here"


def test_a_hung_thread_does_not_keep_the_process_from_exiting(tmp_path: Path) -> None:
    script = """
        import asyncio
        from pgharness.errors import TimedOut
        from pgharness.gateway.callables import PythonCallable
        from pgharness.types import ModelSpec, Request
        hung = PythonCallable(
            ModelSpec(id=1, name="mine", provider="python", model="study.answers:hang", timeout_seconds=0.2)
        )
        try:
            asyncio.run(hung(Request(messages=())))
        except TimedOut:
            print("timed out")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {"PYTHONPATH": f"{SRC}:{tmp_path}", "PYTHONDONTWRITEBYTECODE": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "timed out", "")


async def test_threads_end_with_their_calls() -> None:
    before = threading.active_count()
    await asyncio.gather(*(model("echo")(request()) for _ in range(50)))
    await until(lambda: threading.active_count() <= before)
