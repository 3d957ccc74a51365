"""What Scryptorum's document promises holds here: a test for each item, named for it, on a real database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pgharness import Runnable, RunType, Tracker, batch_processor, experiment, llm_call, metric, timer
from pgharness.errors import HarnessError
from pgharness.sdk import direct
from pgharness.settings import Settings

SOURCES = Path(__file__).parents[2] / "src"
SENTIMENT = '''
from pgharness import Context, experiment, llm_call, metric, timer

@experiment(name="sentiment_analysis")
def main(ctx: Context):
    """Analyze sentiment of customer reviews."""
    accuracy = calculate_accuracy([analyze(review) for review in load()])
    ctx.artifact("report.txt", f"{accuracy}")
    return accuracy

@timer("data_loading")
def load():
    return ["Great product!", "Terrible service"]

@llm_call(model="gpt-4")
def analyze(review: str) -> str:
    return "positive"

@metric(name="accuracy", metric_type="accuracy")
def calculate_accuracy(results):
    return 0.85

if __name__ == "__main__":
    main()
'''


class Project:
    """A Python project in a folder, and a database."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder

    def write(self, name: str, text: str) -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip())
        return file

    def python(self, *arguments: str, status: int = 0, cwd: Path | None = None) -> str:
        """Run Python in the project and return what it printed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGHARNESS_", "PG"))}
        kept |= {"PGHARNESS_DATABASE_URL": self.url, "PYTHONPATH": f"{SOURCES}{os.pathsep}{self.folder / 'src'}"}
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd or self.folder,
            env=kept | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, f"{done.stdout}{done.stderr}"
        return done.stdout

    def pgharness(self, *arguments: str, **options: Any) -> str:
        return self.python("-m", "pgharness", *arguments, **options)

    def rows(self, query: str, *values: object) -> list[dict[str, Any]]:
        with psycopg.connect(self.url, row_factory=dict_row, autocommit=True) as connection:
            return connection.execute(query.encode(), values or None).fetchall()

    def column(self, query: str) -> list[Any]:
        return [next(iter(row.values())) for row in self.rows(query)]

    def execute(self, of: Any, **options: Any) -> direct.Outcome:
        return direct.execute(of, url=self.url, settings=Settings.from_env(), is_echoed=False, **options)


@pytest.fixture
def project(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("PGHARNESS_DATABASE_URL", url)
    return Project(url, tmp_path)


# -- projects, experiments, runs


def test_init_makes_a_python_project_one_and_commands_find_it_from_below(project: Project) -> None:
    project.pgharness("init", "--experiments-dir", "research", "--project", "nlp")
    marker = (project.folder / ".pgharness").read_text()
    assert "research" in marker and "nlp" in marker
    project.write("research/sentiment.py", SENTIMENT)
    below = project.folder / "deep" / "down"
    below.mkdir(parents=True)
    assert "sentiment_analysis" in project.pgharness("experiments", "list", cwd=below)
    project.pgharness("run", "sentiment_analysis", cwd=below)


def test_create_project_standalone(project: Project) -> None:
    folder = project.folder / "study"
    folder.mkdir()
    project.pgharness("init", "--project", "study", cwd=folder)
    assert (folder / "experiments").is_dir()


def test_create_experiment_and_run_it(project: Project) -> None:
    project.pgharness("init", "--experiments-dir", "experiments")
    project.pgharness("experiments", "new", "entity extraction")
    project.pgharness("run", "entity extraction")
    assert project.column("select status from pgharness.runs") == ["completed"]


def test_list_experiments_and_runs(project: Project) -> None:
    project.write("experiments/sentiment.py", SENTIMENT)
    project.write("experiments/other.py", "from pgharness import experiment\n@experiment\ndef other(): pass\n")
    project.pgharness("run", "sentiment_analysis")
    listed = json.loads(project.pgharness("experiments", "list", "--json"))
    assert {row["experiment"]: row["run_count"] for row in listed if row["kind"] == "code"} == {
        "sentiment_analysis": 1,
        "other": 0,
    }
    runs = json.loads(project.pgharness("runs", "list", "--experiment", "sentiment_analysis", "--json"))
    assert [row["run"] for row in runs] == ["sentiment_analysis/1"]


def test_a_run_cannot_be_told_anything_once_it_is_finished(project: Project) -> None:
    run = Tracker("manual").create_run()
    run.log_metric("loss", 1)
    run.finish()
    with pytest.raises(HarnessError):
        run.log_metric("loss", 2)
    assert project.column("select value from pgharness.run_metrics") == [1]


# -- running


def test_the_same_code_runs_as_trial_and_as_milestone_by_a_flag(project: Project) -> None:
    project.write("src/lab/__init__.py", "")
    project.write("src/lab/sentiment.py", SENTIMENT)
    project.pgharness("run", "sentiment_analysis", "--module", "lab.sentiment")
    project.pgharness("run", "sentiment_analysis", "--module", "lab.sentiment", "--milestone")
    kinds = project.column("select kind from pgharness.runs order by id")
    assert kinds == ["trial", "milestone"]
    values = project.column("select value from pgharness.run_metrics")
    assert values == [0.85, 0.85]


def test_run_a_script(project: Project) -> None:
    script = project.write("anywhere/script.py", SENTIMENT)
    project.pgharness("run", "sentiment_analysis", "-s", str(script))
    assert project.column("select status from pgharness.runs") == ["completed"]


def test_run_a_module_with_python(project: Project) -> None:
    project.write("src/lab/__init__.py", "")
    project.write("src/lab/sentiment.py", SENTIMENT)
    printed = project.python("-m", "lab.sentiment", "--milestone", "--run-id", "paper")
    assert "completed" in printed
    (row,) = project.rows("select kind, name from pgharness.runs")
    assert row == {"kind": "milestone", "name": "paper"}


def test_run_id_names_a_milestone_and_only_one(project: Project) -> None:
    script = str(project.write("script.py", SENTIMENT))
    command = ("run", "sentiment_analysis", "--script", script)
    project.pgharness(*command, "--run-id", "v1.0", status=2)
    project.pgharness(*command, "--milestone", "--run-id", "v1.0")
    project.pgharness(*command, "--milestone", "--run-id", "v1.0", status=1)
    assert project.column("select name from pgharness.runs") == ["v1.0"]


def test_trials_are_reset_each_time_and_milestones_stay(project: Project) -> None:
    script = str(project.write("script.py", SENTIMENT))
    for options in ((), ("--milestone",), (), ("--milestone",), ()):
        project.pgharness("run", "sentiment_analysis", "--script", script, *options)
    assert sorted(project.column("select kind from pgharness.runs")) == ["milestone", "milestone", "trial"]
    names = project.column("select name from pgharness.runs")
    assert len(set(names)) == 3
    with pytest.raises(psycopg.Error, match="milestone"):
        project.rows("delete from pgharness.runs where kind = 'milestone' returning id")


def test_milestones_preserve_code_configuration_and_artifacts(project: Project) -> None:
    git = ("git", "-C", str(project.folder), "-c", "user.name=t", "-c", "user.email=t@example.org")
    script = project.write("script.py", SENTIMENT)
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "first")):
        subprocess.run([*git, *command], check=True)
    script.write_text(script.read_text() + "# changed since\n")
    project.pgharness("run", "sentiment_analysis", "-s", str(script), "--milestone")
    (version,) = project.rows(
        "select v.* from pgharness.run_versions join pgharness.experiment_versions as v on v.id = version_id"
    )
    assert version["source"] == script.read_text()
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (version["git_commit"], version["is_dirty"]) == (head, True)
    assert "+# changed since" in version["git_diff"]
    query = "select c.content from pgharness.run_artifacts as a join pgharness.artifact_contents as c using (digest) where a.name = 'report.txt'"
    assert project.column(query) == [b"0.85"]
    folder = project.folder / "kept"
    project.pgharness("runs", "export", "sentiment_analysis/1", "--out", str(folder))
    texts = {file.name: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert b"0.85" in texts.values() and any(b"# changed since" in text for text in texts.values())


# -- decorators


@timer("data_preparation")
def prepare_data() -> list[str]:
    time.sleep(0.02)
    return ["a", "b"]


@llm_call(model="gpt-4")
def call_llm(prompt: str, api_key: str = "sk-secret") -> str:
    return prompt.upper()


@llm_call(model="gpt-4", log_input=False, log_output=False)
def call_quietly(prompt: str) -> str:
    return prompt


@metric(name="f1_score", metric_type="f1")
def evaluate(results: list[str]) -> float:
    return 0.82


@experiment(name="my_experiment")
def run_experiment() -> float:
    results = [call_llm(item) for item in prepare_data()]
    call_quietly("hush")
    return evaluate(results)


def test_experiment_decorator_makes_experiment_and_run(project: Project) -> None:
    outcome = project.execute(run_experiment)
    assert (outcome.run, outcome.status, outcome.result) == ("my_experiment/1", "completed", 0.82)
    assert project.column("select experiment from pgharness.experiment_list where kind = 'code'") == ["my_experiment"]


def test_metric_decorator_records_what_is_returned(project: Project) -> None:
    project.execute(run_experiment)
    found = project.rows("select name, value, metric_type from pgharness.run_metrics")
    assert found == [{"name": "f1_score", "value": 0.82, "metric_type": "f1"}]


def test_timer_decorator_records_how_long_it_took(project: Project) -> None:
    project.execute(run_experiment)
    (row,) = project.rows("select operation, duration_ms from pgharness.run_timings")
    assert row["operation"] == "data_preparation" and row["duration_ms"] >= 20


def test_llm_call_decorator_records_input_output_and_timing(project: Project) -> None:
    project.execute(run_experiment)
    found = project.rows("select model, input, output, duration_ms from pgharness.run_llm_calls order by id")
    assert [(row["model"], row["input"], row["output"]) for row in found] == [
        ("gpt-4", {"prompt": "a", "api_key": "[redacted]"}, "A"),
        ("gpt-4", {"prompt": "b", "api_key": "[redacted]"}, "B"),
        ("gpt-4", None, None),
    ]
    assert all(row["duration_ms"] >= 0 for row in found)


@batch_processor(batch_size=10, parallel=False)
def process_items(item: int) -> int:
    return item * item


@batch_processor(batch_size=4, parallel=True)
def process_in_threads(item: int) -> tuple[int, str]:
    evaluate([])
    return item, threading.current_thread().name


@experiment(name="batches")
def batches() -> list[Any]:
    return [process_items(range(25)), process_in_threads(range(8))]


def test_batch_processor_batches_and_logs(project: Project) -> None:
    squares, threaded = project.execute(batches).result
    assert squares == [n * n for n in range(25)]
    assert [item for item, _ in threaded] == list(range(8))
    lines = project.column("select message from pgharness.logs where message like 'process_items%' order by id")
    assert len(lines) == 3 and "25" in lines[-1]
    assert len(project.rows("select * from pgharness.run_metrics")) == 8, "threads know their run"


# -- thread-safe logging


@experiment(name="threads")
def threads() -> None:
    import contextvars

    def work() -> None:
        for _ in range(50):
            call_llm("x")
            evaluate([])

    workers = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def test_metrics_timings_and_calls_are_logged_by_many_threads(project: Project) -> None:
    project.execute(threads)
    counts = [project.column(f"select count(*) from pgharness.{view}") for view in ("run_metrics", "run_llm_calls")]
    assert counts == [[400], [400]]


# -- classes


_stages: list[str] = []


@experiment(name="staged")
class SentimentAnalysisRunnable(Runnable):
    def prepare(self) -> None:
        _stages.append("prepare")
        self.model_config = self.config.get("model", {})
        self.run.log_event("model_configured", self.model_config)  # type: ignore[attr-defined]

    def run(self) -> str:
        _stages.append("run")
        self.run.log_llm_call(model="gpt-4", input="review", output="positive")  # type: ignore[attr-defined]
        return "done"

    def score(self) -> None:
        _stages.append("score")
        self.run.log_metric("accuracy", 0.9, "accuracy")  # type: ignore[attr-defined]

    def cleanup(self) -> None:
        _stages.append("cleanup")


@experiment(name="breaking")
class Breaking(SentimentAnalysisRunnable.function):  # type: ignore[misc,name-defined]
    def run(self) -> str:
        raise ValueError("broken")


def test_a_class_goes_through_its_stages_and_tells_its_run(project: Project) -> None:
    _stages.clear()
    outcome = project.execute(SentimentAnalysisRunnable)
    assert (outcome.status, outcome.result) == ("completed", "done")
    assert _stages == ["prepare", "run", "score", "cleanup"]
    assert project.rows("select name, value, metric_type from pgharness.run_metrics") == [
        {"name": "accuracy", "value": 0.9, "metric_type": "accuracy"}
    ]
    assert project.rows("select model, input, output from pgharness.run_llm_calls") == [
        {"model": "gpt-4", "input": "review", "output": "positive"}
    ]
    events = project.rows("select message, data from pgharness.logs where task is not null")
    assert {"message": "model_configured", "data": {"event": {}}} in events


def test_a_class_cleans_up_when_it_breaks(project: Project) -> None:
    _stages.clear()
    outcome = project.execute(Breaking)
    assert (outcome.status, outcome.reason) == ("failed", "ValueError: broken")
    assert _stages == ["prepare", "cleanup"]


def test_a_class_is_run_by_its_dotted_name(project: Project) -> None:
    project.write(
        "my_module.py",
        """
        from pgharness import Runnable, experiment

        @experiment(name="sentiment_analysis")
        class SentimentAnalysisRunnable(Runnable):
            def run(self):
                return 1
        """,
    )
    project.pgharness("run", "sentiment_analysis", "-m", "my_module.SentimentAnalysisRunnable")
    assert project.column("select value from pgharness.run_results") == [1]


# -- the manual interface


def test_manual_runs_log_metrics_calls_and_timings(project: Project) -> None:
    run = Tracker("manual_experiment").create_run(RunType.MILESTONE)
    try:
        run.log_metric("custom_metric", 0.92, "f1_score")
        run.log_llm_call("gpt-3.5", "test prompt", "test response", 150.0)
        with run.timer("data_processing"):
            time.sleep(0.01)
    finally:
        run.finish()
    (row,) = project.rows("select kind, status from pgharness.runs")
    assert row == {"kind": "milestone", "status": "completed"}
    assert project.rows("select name, value, metric_type from pgharness.run_metrics") == [
        {"name": "custom_metric", "value": 0.92, "metric_type": "f1_score"}
    ]
    assert project.rows("select model, input, output, duration_ms from pgharness.run_llm_calls") == [
        {"model": "gpt-3.5", "input": "test prompt", "output": "test response", "duration_ms": 150}
    ]
    (timing,) = project.rows("select operation, duration_ms from pgharness.run_timings")
    assert timing["operation"] == "data_processing" and timing["duration_ms"] >= 10


def test_manual_runs_are_known_to_decorators_and_fail_when_their_block_raises(project: Project) -> None:
    with pytest.raises(ValueError, match="went wrong"), Tracker("manual").create_run("trial") as run:
        evaluate([])
        raise ValueError("it went wrong")
    (row,) = project.rows("select name, status, reason from pgharness.runs")
    assert row == {"name": run.name, "status": "failed", "reason": "ValueError: it went wrong"}
    assert project.column("select value from pgharness.run_metrics") == [0.82]


# -- logs as files, plugins


def test_logs_metrics_and_timings_are_had_as_json_lines(project: Project) -> None:
    project.pgharness("run", "sentiment_analysis", "-s", str(project.write("script.py", SENTIMENT)))
    folder = project.folder / "out"
    project.pgharness("runs", "export", "sentiment_analysis/1", "--out", str(folder))
    lines = {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in folder.glob("*.jsonl")}
    assert [(row["name"], row["value"], row["type"]) for row in lines["metrics"]] == [("accuracy", 0.85, "accuracy")]
    assert [row["operation"] for row in lines["timings"]] == ["data_loading"]
    events = lines["run"]
    assert (events[0]["event_type"], events[0]["run_type"]) == ("run_started", "trial")
    assert [row["output"] for row in events if row["event_type"] == "llm_call"] == ["positive", "positive"]
    assert events[-1]["event_type"] == "run_finished" and events[-1]["duration_seconds"] >= 0
    log = project.pgharness("runs", "logs", "sentiment_analysis/1", "--json")
    assert all({"created_at", "level", "message", "data"} <= set(json.loads(line)) for line in log.splitlines())


def test_installed_packages_bring_experiments_along(project: Project) -> None:
    """In the place of a registry of plugins: entry points."""
    place = project.folder / "src"
    project.write("src/plugin_of_theirs.py", "from pgharness import experiment\n@experiment\ndef plugged(): return 5\n")
    (place / "plugin-1.dist-info").mkdir()
    (place / "plugin-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (place / "plugin-1.dist-info" / "entry_points.txt").write_text(
        "[pgharness.experiments]\nplugin = plugin_of_theirs\n"
    )
    project.pgharness("run", "plugged")
    assert project.column("select value from pgharness.run_results") == [5]
