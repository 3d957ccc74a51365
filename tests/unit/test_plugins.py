"""Plugins: which there are, that nothing harmful is imported here, and how models, metrics and hooks of them behave."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fake_distribution import install
from pgharness import hooks, plugins
from pgharness.errors import CodeFailed, InvalidOutput, NotFound, PluginBroken, RequestRejected, TimedOut
from pgharness.execution.items import Item
from pgharness.execution.requests import Requests
from pgharness.gateway import Gateway
from pgharness.types import ModelSpec, Request

GOOD = """
import asyncio

loaded = True

def answer(item, prefix="said"):
    return f"{prefix} {item['case']['name']}"

async def later(item):
    await asyncio.sleep(0)
    return {"later": item["attempt"]}

class Scribe:
    def __init__(self):
        self.count = 0
    def __call__(self, item):
        self.count += 1
        return f"note {self.count}"

number = 7

def give(output, target, value=None):
    output.append("changed")
    return tuple(value) if isinstance(value, list) else value

def equal(output, target):
    return float(output == target)

def fail(output, target):
    raise LookupError("no such word")

def hang(output, target):
    import time
    time.sleep(30)
"""
MODULES = {
    "good_plugins": GOOD,
    "raising": "def deep():\n    raise KeyError('no licence')\n\ndeep()\n",
    "leaving": "import os, sys\nprint('cannot go on', file=sys.stderr, flush=True)\nos._exit(0)\n",
    "exiting": "import sys\nsys.exit(3)\n",
    "killing": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "hanging": "import pathlib, time\npathlib.Path(__file__).with_suffix('.began').touch()\ntime.sleep(600)\n",
    "stubborn": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass\n",
    "loud": "print('hello')\ndef answer(item):\n    return 'x'\n",
    "treacherous": "import os, pathlib\nmark = pathlib.Path(__file__).with_suffix('.seen')\nif mark.exists(): raise OSError('only once')\nmark.touch()\ndef answer(item): pass\n",
}
MODELS = {
    "answer": "good_plugins:answer",
    "later": "good_plugins:later",
    "scribe": "good_plugins:Scribe",
    "number": "good_plugins:number",
    "absent": "good_plugins:nothing",
    "nowhere": "no_such_module:answer",
    "odd": "not a reference",
} | {name: f"{name}:answer" for name in MODULES if name != "good_plugins"}
METRICS = {name: f"good_plugins:{name}" for name in ("give", "equal", "fail", "hang")}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the distribution demo-plugins."""
    folder = tmp_path / "site"
    install(folder, "demo-plugins", {"pgharness.models": MODELS, "pgharness.metrics": METRICS}, MODULES)
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    forget()
    for module in MODULES:
        sys.modules.pop(module, None)


def forget() -> None:
    plugins._installed.cache_clear()
    plugins._slot.cache_clear()


def spec(model: str, provider: str = "plugin", **fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"id": 1, "name": "m", "provider": provider, "model": model} | fields)


def ask(
    tmp_path: Path, model: ModelSpec, item: dict[str, Any] | None = None, times: int = 1, seconds: float = 20
) -> Any:
    gateway = Gateway(cache_root=tmp_path, plugin_seconds=seconds)
    given = Request(messages=(), seed=1, item=item or {"case": {"name": "a"}})

    async def asked() -> Any:
        return [await gateway.completer(model)(given) for _ in range(times)]

    return asyncio.run(asked())[-1]


# -- which there are


def test_plugins_are_listed_by_kind_and_loaded_once_they_were_tried_elsewhere(site: Path) -> None:
    assert plugins.names("models") == sorted(MODELS)
    assert (plugins.names("metrics"), plugins.names("hooks")) == (sorted(METRICS), [])
    assert plugins.check("models", "answer").distribution == "demo-plugins 1.0"
    assert "good_plugins" not in sys.modules, "a check imports nothing here"
    assert plugins.load("models", "answer")({"case": {"name": "a"}}) == "said a"
    assert plugins.load("models", "scribe") is plugins.load("models", "scribe"), "a class is made an object, once"


def test_a_name_that_does_not_exist_says_which_there_are(site: Path) -> None:
    with pytest.raises(NotFound, match=r'no plugin "equals" of pgharness\.metrics') as caught:
        plugins.load("metrics", "equals")
    assert caught.value.hint == "There are: equal, fail, give, hang."
    with pytest.raises(NotFound) as caught:
        plugins.find("exporters", "xlsx")
    assert "There are none" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["KeyError: 'no licence'", "raising.py:2"]),
        ("leaving", ["importing it ends the process (exit status 0): cannot go on"]),
        ("exiting", ["it ends the process (SystemExit: 3)"]),
        ("killing", ["importing it kills the process (SIGSEGV)"]),
        ("absent", ["AttributeError", "nothing"]),
        ("nowhere", ["ModuleNotFoundError: No module named 'no_such_module'"]),
        ("number", ["good_plugins:number is a int, which cannot be called"]),
        ("odd", ["Error"]),
    ],
)
def test_a_broken_plugin_is_named_with_its_distribution_and_never_imported_here(
    site: Path, name: str, words: list[str]
) -> None:
    with pytest.raises(PluginBroken) as caught:
        plugins.load("models", name)
    said = str(caught.value)
    assert said.startswith(f'plugin "{name}" of pgharness.models, in demo-plugins 1.0, is broken: ')
    for word in words:
        assert word in said
    assert "\n" not in said
    assert "demo-plugins" in str(caught.value.hint) and "doctor" in str(caught.value.hint)
    assert name not in sys.modules


@pytest.mark.parametrize("name", ["hanging", "stubborn"])
def test_an_import_that_hangs_is_ended_and_the_verdict_is_kept(site: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(PluginBroken, match=r"importing it takes longer than 1 seconds"):
        plugins.load("models", name, seconds=1)
    again = time.monotonic()
    with pytest.raises(PluginBroken, match="takes longer"):
        plugins.load("models", name)
    assert (again - start) < 8 and time.monotonic() - again < 0.5
    # one that has ended, and is not waited for yet, has no command any more
    commands = [
        child.info["cmdline"] or []
        for child in psutil.process_iter(["cmdline", "ppid"])
        if child.info["ppid"] == os.getpid()
    ]
    assert not [command for command in commands if "pgharness.plugins" in " ".join(command)]


def test_what_only_fails_the_second_time_is_broken_too(site: Path) -> None:
    plugins.check("models", "treacherous")
    for _ in range(2):
        with pytest.raises(PluginBroken, match="OSError: only once"):
            plugins.load("models", "treacherous")


def test_many_that_ask_at_once_wait_for_one_verdict(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real = plugins._tried
    monkeypatch.setattr(
        plugins, "_tried", lambda plugin, seconds: (tried.append(plugin.name), real(plugin, seconds))[1]
    )
    threads = [threading.Thread(target=plugins.load, args=("models", "answer")) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tried == ["answer"]


def test_one_name_in_two_distributions_is_nobodys(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "other", "other-plugins", {"pgharness.metrics": {"equal": "good_plugins:equal"}}, {}, "2.1")
    install(tmp_path / "old", "Demo_Plugins", {"pgharness.metrics": {"fail": "good_plugins:equal"}}, {}, "0.9")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "other"), str(tmp_path / "old")])
    forget()
    with pytest.raises(PluginBroken, match=r"in demo-plugins 1\.0, is broken: other-plugins 2\.1 has one of that name"):
        plugins.load("metrics", "equal")
    assert plugins.check("metrics", "fail").distribution == "demo-plugins 1.0", (
        "an older one further down does not count"
    )


def test_metadata_that_cannot_be_read_hides_no_other(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info = tmp_path / "bad" / "bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pgharness.models]\nno value at all\n")
    monkeypatch.syspath_prepend(str(tmp_path / "bad"))
    forget()
    assert plugins.names("models") == sorted(MODELS)
    assert "metadata" in caplog.text


# -- models and metrics


def test_a_model_is_called_as_a_python_function_is(site: Path, tmp_path: Path) -> None:
    assert ask(tmp_path, spec("answer", parameters={"prefix": "writes"})).text == "writes a"
    assert ask(tmp_path, spec("later")).data == {"later": 1}
    assert ask(tmp_path, spec("scribe"), times=3).text == "note 3"
    with pytest.raises(
        RequestRejected, match=r"plugin \"answer\"\(item, prefix='said'\) cannot be called with an item"
    ):
        ask(tmp_path, spec("answer", parameters={"tone": "dry"}))


@pytest.mark.parametrize("name", ["raising", "leaving", "hanging", "unheard_of"])
@pytest.mark.parametrize("provider", ["plugin", "metric"])
def test_a_broken_or_unknown_one_is_rejected_with_what_to_do(
    site: Path, tmp_path: Path, name: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if provider == "metric":
        monkeypatch.setattr(plugins, "find", lambda kind, name, find=plugins.find: find("models", name))
    model = spec(f"plugin:{name}" if provider == "metric" else name, provider, timeout_seconds=0.2)
    with pytest.raises(RequestRejected, match=rf"model 'm': .*plugin \"{name}\"") as caught:
        ask(tmp_path, model, seconds=1)
    assert "retry_failed" in str(caught.value.hint)
    assert name != "raising" or "raising.py" in str(caught.value.text)


def metric(name: str, **fields: Any) -> ModelSpec:
    return spec(f"plugin:{name}", "metric", **fields)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25, (0.25, 1)), (1, (1, 1)), (True, (1, 1)), ([3, 4], (3, 4)), ([0, 0.5], (0, 0.5))],
)
def test_a_metric_gives_a_share_or_a_score_and_its_maximum(
    site: Path, tmp_path: Path, value: object, expected: tuple[float, float]
) -> None:
    item = {"output": ["kept"], "target": None}
    found = ask(tmp_path, metric("give", parameters={"value": value}), item)
    assert (found.data["score"], found.data["max_score"]) == expected
    assert item == {"output": ["kept"], "target": None}, "it has copies"


@pytest.mark.parametrize(
    "value", [None, 1.5, -0.1, "0.5", [1], [1, 0], [2, 1], [1, 1e9], [0, 0], [1, "2"], {}, 10**400, "nan"]
)
def test_anything_else_is_no_score(site: Path, tmp_path: Path, value: object) -> None:
    with pytest.raises(InvalidOutput, match=r'plugin "give" gave .* which is no score') as caught:
        ask(tmp_path, metric("give", parameters={"value": value}), {"output": [], "target": 1})
    assert "from 0 to 1" in str(caught.value.hint)


def test_a_metric_that_raises_or_hangs_fails_its_item_alone(site: Path, tmp_path: Path) -> None:
    item = {"output": "a", "target": "a"}
    with pytest.raises(CodeFailed, match='plugin "fail" raised LookupError: no such word') as caught:
        ask(tmp_path, metric("fail"), item)
    assert "good_plugins.py" in str(caught.value.text)
    with pytest.raises(TimedOut, match=r'plugin "hang" gave no answer within 0\.1 s'):
        ask(tmp_path, metric("hang", timeout_seconds=0.1), item)
    assert ask(tmp_path, metric("equal"), item).data["score"] == 1


def test_a_metric_is_asked_with_the_note_and_the_target_and_no_prompt() -> None:
    definition = {"config": {}, "cycle_times": None, "software_version": "", "run": "r", "seed": 5, "prompts": {}}
    case = {"name": "c", "target": [1]}
    item = Item(1, "grade", 3, metric("equal"), case, 0, 0, 1, note="text", tries=2)
    request = Requests(definition).of(item)
    assert (request.messages, request.item, request.attempt) == ((), {"output": "text", "target": [1]}, 3)
    assert not item.is_scored_here
    assert Item(1, "grade", 3, spec("regex", "metric"), case, 0, 0, 1).is_scored_here


# -- hooks


def heard(function: Callable[[dict[str, Any]], object], *events: dict[str, Any], seconds: float = 0.3) -> None:
    """Let a hook hear events, to the end."""

    async def run() -> None:
        hook = hooks._Hook("ears", seconds)
        for event in events:
            hook.put(json.dumps(event))
        plugins_load = plugins.load
        plugins.load = lambda *args, **kwargs: function  # type: ignore[assignment]
        try:
            task = asyncio.create_task(hook.run(1))
            await asyncio.wait_for(hook.ended(), 30)
        finally:
            plugins.load = plugins_load
        task.cancel()

    asyncio.run(run())


def test_a_hook_that_raises_hears_the_next_event(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []

    def hook(event: dict[str, Any]) -> None:
        told.append(event["n"])
        raise (SystemExit, StopIteration, ValueError)[event["n"]]("oh")

    heard(hook, *({"n": n} for n in range(3)))
    assert told == [0, 1, 2]
    assert len([record for record in caplog.records if "hook ears raised" in record.getMessage()]) == 3


def test_a_hook_that_hangs_is_left_and_after_some_times_no_more_called(caplog: pytest.LogCaptureFixture) -> None:
    gate, told = threading.Event(), []

    def hook(event: dict[str, Any]) -> None:
        told.append(event["n"])
        if event["n"]:
            gate.wait(20)

    heard(hook, *({"n": n} for n in range(12)), seconds=0.05)
    gate.set()
    assert told == list(range(9)), "the first returned, eight hang"
    assert caplog.text.count("takes longer than 0.05 seconds") == 8
    assert caplog.text.count("hangs in 8 calls already, and misses") == 3


def test_an_async_hook_is_awaited() -> None:
    told: list[int] = []

    async def hook(event: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        told.append(event["n"])

    heard(hook, {"n": 1})
    assert told == [1]


def test_only_events_of_runs_are_told() -> None:
    class Ear:
        def __init__(self) -> None:
            self.told: list[str] = []

        def put(self, payload: str) -> None:
            self.told.append(payload)

    ear = Ear()
    wanted = [json.dumps({"event": "run.started"}), json.dumps({"event": "run.completed", "run_id": 1})]
    others = ['{"event": "run.told"}', '{"event": "model.blocked"}', "{", "", "[]", "3", '{"event": 3}']
    hooks._tell([ear], [*others, *wanted, *others])  # type: ignore[list-item]
    assert ear.told == wanted
