"""What Athanor's document promises holds here: a test for each item, named for it, on a real database."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from pydantic import BaseModel, Field

from code_lab import CodeLab, opened
from pgharness import Cancelled, Context, experiment
from pgharness.sdk import direct, discovery
from pgharness.settings import Settings

SUBSTRATE_SHIFT = Path(__file__).parents[2] / "experiments" / "substrate_shift"


class Config(BaseModel):
    iterations: int = Field(10, ge=1, le=100, title="Iterations", description="Number of test iterations")
    model: str = Field("gpt-4", title="Model")
    temperature: float = 0.5
    is_verbose: bool = False
    style: str = Field("plain", json_schema_extra={"enum": ["plain", "terse"]})
    tags: list[str] = []
    required_name: str


def execute(url: str, of: Any, **options: Any) -> direct.Outcome:
    return direct.execute(of, url=url, settings=Settings.from_env(), is_echoed=False, **options)


def rows(url: str, query: str, *values: object) -> list[dict[str, Any]]:
    with psycopg.connect(url, row_factory=dict_row, autocommit=True) as connection:
        return connection.execute(query.encode(), values or None).fetchall()


@pytest.fixture
def lab(url: str, tmp_path: Path) -> Iterator[CodeLab]:
    """A project with workers."""
    with opened(url, tmp_path) as lab:
        yield lab


@experiment(name="configured")
def configured(ctx: Context, config: Config) -> Any:
    """Tests something interesting."""
    return [dict(ctx.config), config.iterations]


def registered(url: str) -> dict[str, Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        arguments = {
            key: json.dumps(value) if isinstance(value, dict) else value
            for key, value in configured.registration().items()
        }
        names = ", ".join(f"{name} => %({name})s" for name in arguments)
        connection.execute(f"select pgharness.register_experiment({names})".encode(), arguments)
    return rows(url, "select * from pgharness.experiment_list where experiment = 'configured'")[0]


# -- core concepts


def test_experiments_are_defined_in_code_with_name_description_and_schema(url: str) -> None:
    row = registered(url)
    assert (row["kind"], row["description"]) == ("code", "Tests something interesting.")
    (stored,) = rows(url, "select config_schema from pgharness.experiments where name = 'configured'")
    properties = stored["config_schema"]["properties"]
    assert {name: field.get("type") for name, field in properties.items()} == {
        "iterations": "integer",
        "model": "string",
        "temperature": "number",
        "is_verbose": "boolean",
        "style": "string",
        "tags": "array",
        "required_name": "string",
    }
    wanted = {
        "default": 10,
        "minimum": 1,
        "maximum": 100,
        "title": "Iterations",
        "description": "Number of test iterations",
    }
    assert wanted.items() <= properties["iterations"].items()
    assert stored["config_schema"]["required"] == ["required_name"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "required_name"),
        ({"required_name": "x", "iterations": 101}, "iterations"),
        ({"required_name": "x", "iterations": "ten"}, "iterations"),
        ({"required_name": "x", "style": "long"}, "style"),
        ({"required_name": "x", "tags": [1]}, "tags"),
        ({"required_name": "x", "unknown": 1}, "unknown"),
    ],
)
def test_the_schema_refuses_configurations(url: str, config: dict[str, Any], field: str) -> None:
    registered(url)
    statement = "insert into pgharness.instances (name, experiment, config) values ('i', 'configured', %s) returning id"
    with pytest.raises(psycopg.Error, match=field):
        rows(url, statement, json.dumps(config))


def test_experiments_are_versioned_and_reproducible(lab: CodeLab) -> None:
    source = "from pgharness import experiment\n@experiment\ndef versioned(): return {}\n"
    for version in (1, 2):
        lab.write("versioned", source.format(version))
        lab.python("-m", "pgharness", "run", "versioned", "--keep-trials")
    found = lab.rows("""
        select r.name, v.number, v.source from pgharness.run_versions as u
          join pgharness.runs as r on r.id = u.run_id join pgharness.experiment_versions as v on v.id = u.version_id order by 1
    """)
    assert found == [("versioned/1", 1, source.format(1)), ("versioned/2", 2, source.format(2))]
    assert [lab.results(run)["return"] for run in (1, 2)] == [1, 2]


def test_an_instance_is_run_many_times_with_the_same_configuration(url: str) -> None:
    first = execute(url, configured, instance="twice", config={"required_name": "a", "iterations": 3})
    second = execute(url, configured, instance="twice")
    assert (first.run, second.run) == ("twice/1", "twice/2")
    assert first.result == second.result
    assert first.result[1] == 3
    execute(url, configured, instance="twice", config={"required_name": "b"})
    kept = rows(
        url, "select definition -> 'config' ->> 'required_name' as name from pgharness.run_definitions order by run_id"
    )
    assert [row["name"] for row in kept] == ["a", "a", "b"], "a run keeps the configuration that it was started with"


def test_runs_are_isolated_from_each_others_failures(lab: CodeLab) -> None:
    lab.write(
        "neighbours",
        """
        import os, time
        from pgharness import Context, experiment

        @experiment
        def dies(ctx: Context):
            os._exit(3)

        @experiment
        def lives(ctx: Context):
            while ctx.config == {} and not os.path.exists(os.environ["LAB"] + "/dead.gate"):
                time.sleep(0.01)
            return "alive"
        """,
    )
    lab.worker(serves="lives")
    lives = lab.start("lives")
    lab.wait(lambda: lab.root(lives)["attempts"] == 1, "the first run to begin")
    lab.run("dies", status="failed", seconds=60)
    lab.open_gate("dead")
    lab.wait_for_end(lives)
    assert (lab.results(lives), lab.root(lives)["attempts"]) == ({"return": "alive"}, 1)


# -- creating an experiment


@experiment(name="my_experiment")
def my_experiment(ctx: Context, config: Config) -> None:
    total = config.iterations
    ctx.log("info", f"Starting experiment with {total} iterations")
    ctx.progress(0, total)
    for i in range(1, total + 1):
        ctx.check_cancelled()
        ctx.result(f"iteration_{i}", {"iteration": i, "model": config.model, "output": "..."})
        ctx.progress(i, total)
    ctx.complete()
    raise AssertionError("complete() ends the run")


def test_the_example_runs(url: str) -> None:
    outcome = execute(url, my_experiment, config={"iterations": 100, "required_name": "x"})
    assert (outcome.status, outcome.reason) == ("completed", None)
    (row,) = rows(url, "select status, position, total, percent_done from pgharness.run_progress")
    assert (row["status"], row["position"], row["total"], row["percent_done"]) == ("completed", 100, 100, 100)
    found = rows(url, "select value from pgharness.run_results where key like 'iteration%'")
    assert sorted(row["value"]["iteration"] for row in found) == list(range(1, 101))


def test_experiments_are_discovered_at_runtime(lab: CodeLab) -> None:
    lab.write("early", "from pgharness import experiment\n@experiment\ndef early(): return 1\n")
    lab.worker(serves="early")
    lab.write("late", "from pgharness import experiment\n@experiment\ndef late(): return 2\n")
    query = "select 1 from pgharness.experiment_list where experiment = 'late' and is_served"
    lab.wait(lambda: lab.rows(query), "the new experiment to be found", 40)
    assert lab.results(lab.run("late")) == {"return": 2}


# -- runtime


def test_runtime_config_is_the_instances_configuration(url: str) -> None:
    outcome = execute(url, configured, config={"required_name": "x", "tags": ["a"]})
    assert outcome.result[0] == {
        "iterations": 10,
        "model": "gpt-4",
        "temperature": 0.5,
        "is_verbose": False,
        "style": "plain",
        "tags": ["a"],
        "required_name": "x",
    }


@experiment(name="logging")
def logs(ctx: Context) -> None:
    ctx.log("info", "Processing item")
    ctx.log("warn", "Retrying request", attempt=2)
    ctx.error("Failed to connect")
    ctx.log_batch([("info", "Step 1 complete", None), ("debug", "Step 2 complete", {"took": 3})])


def test_runtime_log_keeps_level_message_and_metadata_in_order(url: str) -> None:
    execute(url, logs)
    found = rows(url, "select level, message, data from pgharness.logs where task is not null order by id")
    assert [tuple(row.values()) for row in found] == [
        ("info", "Processing item", {}),
        ("warning", "Retrying request", {"attempt": 2}),
        ("error", "Failed to connect", {}),
        ("info", "Step 1 complete", {}),
        ("debug", "Step 2 complete", {"took": 3}),
    ]


@experiment(name="telling")
def results(ctx: Context) -> None:
    ctx.result("model_response", {"input": "prompt", "output": "response", "tokens": 12})
    ctx.result("nothing", None)
    ctx.result("score", 0.25)
    ctx.result("score", 0.5)


def test_runtime_result_is_persisted_as_json_under_its_key(url: str) -> None:
    execute(url, results)
    found = rows(url, "select key, value from pgharness.run_results order by key")
    assert {row["key"]: row["value"] for row in found} == {
        "model_response": {"input": "prompt", "output": "response", "tokens": 12},
        "nothing": None,
        "score": 0.5,
    }
    history = rows(url, "select value from pgharness.results where key = 'score' order by id")
    assert [row["value"] for row in history] == [0.25, 0.5]


class Connected(BaseModel):
    url: str


@experiment(name="watched")
def watched(ctx: Context, config: Connected) -> list[Any]:
    ctx.progress(5, 100)
    ctx.progress(50, 100, "Halfway done")
    began = time.monotonic()
    while time.monotonic() < began + 20:
        (row,) = rows(config.url, "select position, total, message, status from pgharness.run_progress")
        if row["position"] == 50:
            return list(row.values())
        time.sleep(0.01)
    raise AssertionError("it was not to be seen while it ran")


def test_runtime_progress_is_seen_and_broadcast_while_it_runs(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute("listen pgharness")
        assert execute(url, watched, config={"url": url}).result == [50, 100, "Halfway done", "running"]
        told = [json.loads(note.payload)["event"] for note in listener.notifies(timeout=0.2)]
    assert {"run.started", "run.told", "run.completed"} <= set(told)


@experiment(name="completing")
def completes(ctx: Context) -> None:
    ctx.complete()


@experiment(name="failing")
def fails(ctx: Context) -> None:
    ctx.fail("API rate limit exceeded")


@experiment(name="raising")
def raises() -> None:
    raise ValueError("not what was expected")


def test_runtime_complete_completes_the_run(url: str) -> None:
    outcome = execute(url, completes)
    assert (outcome.status, outcome.reason) == ("completed", None)


def test_runtime_fail_fails_the_run_with_its_message(url: str) -> None:
    outcome = execute(url, fails)
    assert (outcome.status, outcome.reason) == ("failed", "API rate limit exceeded")


def test_an_exception_fails_the_run_with_its_trace(url: str) -> None:
    outcome = execute(url, raises)
    assert (outcome.status, outcome.reason) == ("failed", "ValueError: not what was expected")
    (row,) = rows(url, "select traceback from pgharness.task_results")
    assert "in raises" in row["traceback"]


_said: list[str] = []


@experiment(name="cancelling")
def cancels(ctx: Context, config: Connected) -> None:
    rows(config.url, "select pgharness.cancel_run(%s::bigint)", ctx.run_id)
    began = time.monotonic()
    try:
        while not ctx.is_cancelled and time.monotonic() < began + 20:
            time.sleep(0.01)
        _said.append("saw it")
    except Cancelled:
        _said.append("was interrupted")
        raise
    finally:
        _said.append("cleaned up")


def test_runtime_cancelled_lets_the_code_clean_up_and_exit(url: str) -> None:
    _said.clear()
    outcome = execute(url, cancels, config={"url": url})
    assert (outcome.status, outcome.reason) == ("cancelled", "cancelled by hand")
    assert _said[-1] == "cleaned up" and len(_said) == 2


# -- executing


def test_start_run_and_cancel_run_of_an_existing_instance(lab: CodeLab) -> None:
    lab.write(
        "endless",
        """
        import time
        from pgharness import Context, experiment

        @experiment
        def endless(ctx: Context):
            ctx.info("begun")
            while True:  # and never asks whether it is cancelled
                time.sleep(0.01)
        """,
    )
    lab.worker(serves="endless")
    lab.db.execute("insert into pgharness.instances (name, experiment) values ('forever', 'endless')")
    run_id = lab.value("select run_id from pgharness.start_run('forever')")
    lab.wait(lambda: "begun" in lab.messages(run_id), "the run to begin")
    lab.db.execute("select pgharness.cancel_run(%s::bigint)", (run_id,))
    assert lab.value("select status from pgharness.runs where id = %s", run_id) == "cancelled"
    lab.wait(lambda: not lab.workers[0].run_pids, "its process to end", 60)


def test_runs_and_results_are_to_be_watched_and_listed(lab: CodeLab) -> None:
    lab.write("quick", "from pgharness import experiment\n@experiment\ndef quick(): print('said'); return [1]\n")
    command = ("-m", "pgharness")
    lab.python(*command, "run", "quick")
    assert "quick/1" in lab.python(*command, "runs", "list").stdout
    assert "said" in lab.python(*command, "runs", "logs", "quick/1").stdout
    listed = json.loads(lab.python(*command, "runs", "results", "quick/1", "--json").stdout)
    assert "return" in json.dumps(listed)


# -- analysing


def test_list_results_of_a_run_and_query_them_by_key(url: str) -> None:
    first, second = execute(url, results), execute(url, results)
    found = rows(url, "select key, value, created_at from pgharness.run_results where run_id = %s", first.run_id)
    assert [row["key"] for row in sorted(found, key=lambda row: row["key"])] == ["model_response", "nothing", "score"]
    query = "select run_id from pgharness.run_results where run_id = %s and key = 'model_response' and value ->> 'tokens' = '12'"
    assert rows(url, query, second.run_id) == [{"run_id": second.run_id}]


def test_results_load_into_pandas(url: str) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is in the extra `notebook`")
    execute(url, results)
    frame = pandas.DataFrame(rows(url, "select key, value from pgharness.run_results where key = 'model_response'"))
    wide = pandas.concat([frame, pandas.json_normalize(frame["value"].tolist())], axis=1)
    assert wide.loc[0, ["input", "output", "tokens"]].tolist() == ["prompt", "response", 12]


def test_substrate_shift_has_its_options() -> None:
    found = discovery.discover([str(SUBSTRATE_SHIFT)])
    schema = found.experiments["substrate_shift"].config_schema()
    assert {"runs_per_pair", "parallelism", "model_pairs"} <= set(schema["properties"])


# -- data model


def test_data_model_has_instances_runs_results_and_logs(url: str) -> None:
    execute(url, my_experiment, config={"required_name": "x", "iterations": 1})
    (instance,) = rows(url, "select name, description, config from pgharness.instances")
    assert instance["config"]["iterations"] == 1
    (run,) = rows(url, "select status, created_at, finished_at, reason from pgharness.runs")
    assert run["status"] == "completed" and run["finished_at"] >= run["created_at"]
    (result,) = rows(url, "select run_id, key, value, created_at from pgharness.run_results")
    assert (result["run_id"], result["key"]) == (1, "iteration_1")
    (log,) = rows(url, "select run_id, level, message, data, created_at from pgharness.logs where task is not null")
    assert re.match("Starting experiment with 1", log["message"])


def test_many_results_and_logs_of_many_threads_all_arrive_in_order(url: str) -> None:
    execute(url, crowded)
    found = rows(url, "select key, value from pgharness.results order by id")
    of_each = {name: [row["value"] for row in found if row["key"] == name] for name in {row["key"] for row in found}}
    assert of_each == {f"thread-{number}": list(range(200)) for number in range(8)}


@experiment(name="crowded")
def crowded(ctx: Context) -> None:
    def tell(number: int) -> None:
        for step in range(200):
            ctx.result(f"thread-{number}", step)
            ctx.info(f"{number} {step}")

    threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
