"""The documents about experiments in code are done as they stand: files written, commands run, statements typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import dict_row

import e2e.test_readme as readme

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "experiments-in-code.md"
MIGRATION = ROOT / "docs" / "migrating-from-athanor-and-scryptorum.md"
SUBSTRATE = ROOT / "experiments" / "substrate_shift" / "README.md"
DOCUMENTS = [GUIDE, MIGRATION, SUBSTRATE]
_FILE = re.compile(r"# (\S+\.py)\n")


def done(url: str, folder: Path, *arguments: str, text: str | None = None) -> str:
    """Run Python in a project's folder; it must succeed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PGHARNESS_", "PG"))}
    kept |= {"PGHARNESS_DATABASE_URL": url, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(folder / "src")])}
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=kept, input=text, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, f"{shlex.join(arguments)}\n{ended.stdout}{ended.stderr}"
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout


def follow(text: str, url: str, folder: Path) -> int:
    """Do what a document shows, in its order; return how many blocks that were.

    A block of Python that begins with the name of a file is that file, any other is executed.
    """
    blocks = [(match[1], match[2]) for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]
    for language, block in blocks:
        if language == "sql":
            readme.typed(url, block)
        elif language == "python" and (named := _FILE.match(block)):
            file = folder / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block)
        elif language == "python":
            done(url, folder, "-", text=block)
        else:
            assert language == "sh", language
            for line in block.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program in ("pgharness", "python"), line
                done(url, folder, *(["-m", "pgharness"] if program == "pgharness" else []), *arguments)
    return len(blocks)


def rows(url: str, query: str) -> list[dict[str, Any]]:
    with psycopg.connect(url, row_factory=dict_row) as connection:
        return connection.execute(query.encode()).fetchall()


def states(url: str) -> dict[str, tuple[str, str]]:
    return {row["name"]: (row["kind"], row["status"]) for row in rows(url, "select * from pgharness.runs")}


def test_guide_does_what_it_shows(url: str, tmp_path: Path) -> None:
    assert follow(GUIDE.read_text(), url, tmp_path) == 15
    assert states(url) == {
        "reviews/1": ("trial", "completed"),
        "reviews-all/1": ("trial", "completed"),
        "decorated/1": ("trial", "completed"),
        "staged/1": ("trial", "completed"),
        "tuning-v1": ("milestone", "completed"),
        "reviews-v1": ("milestone", "completed"),
        "reviews-one/1": ("trial", "completed"),
        "reviews-one/2": ("trial", "cancelled"),
    }
    results = rows(url, "select key from pgharness.run_results where run = 'reviews-all/1' order by key")
    assert [row["key"] for row in results] == ["lamp", "mug", "pen", "return", "rug"]
    metrics = rows(url, "select run, name, value from pgharness.run_metrics where name <> 'kind' order by run, name")
    assert [(row["run"], row["name"], row["value"]) for row in metrics] == [
        ("decorated/1", "accuracy", 1),
        ("staged/1", "accuracy", 1),
        ("staged/1", "accuracy", 1),
        ("tuning-v1", "loss", 0.2),
    ]
    assert (tmp_path / "reviews-v1" / "manifest.json").exists()


def test_guide_names_every_public_name() -> None:
    import pgharness

    text = GUIDE.read_text()
    assert not [name for name in pgharness.__all__ if name != "__version__" and name not in text]


def test_athanors_quick_start_is_translated_whole(url: str, tmp_path: Path) -> None:
    text = MIGRATION.read_text().partition("## From Scryptorum")[0]
    assert follow(text, url, tmp_path) == 3
    assert states(url) == {"three/1": ("trial", "completed")}
    found = rows(url, "select key, value from pgharness.run_results where run = 'three/1' order by key")
    assert {row["key"]: row["value"] for row in found} == {
        f"iteration_{i}": {"iteration": i, "model": "gpt-4", "output": "..."} for i in (1, 2, 3)
    }
    (progress,) = rows(url, "select position, total from pgharness.run_progress")
    assert progress == {"position": 3, "total": 3}
    lines = rows(url, "select level, message from pgharness.logs")
    assert {"level": "info", "message": "Starting experiment with 3 iterations"} in lines


def test_scryptorums_quick_start_is_translated_whole(url: str, tmp_path: Path) -> None:
    text = MIGRATION.read_text().partition("## From Scryptorum")[2]
    assert follow(text, url, tmp_path) == 7
    assert states(url) == {
        "sentiment_analysis/2": ("milestone", "completed"),
        "sentiment_analysis/3": ("trial", "completed"),
        "sentiment_analysis/1": ("trial", "completed"),
        "staged_sentiment/1": ("trial", "completed"),
        "manual_experiment/1": ("milestone", "completed"),
    }
    metrics = rows(url, "select name, value, metric_type from pgharness.run_metrics where run = 'sentiment_analysis/2'")
    assert metrics == [{"name": "accuracy", "value": 0.85, "metric_type": "accuracy"}]
    calls = rows(
        url, "select model, input, output from pgharness.run_llm_calls where run = 'sentiment_analysis/2' order by id"
    )
    assert [row["input"] for row in calls] == [
        {"review": review} for review in ("Great product!", "Terrible service", "Love it!")
    ]
    assert {(row["model"], row["output"]) for row in calls} == {("gpt-4", "positive")}
    timings = rows(url, "select operation from pgharness.run_timings where run = 'sentiment_analysis/2'")
    assert timings == [{"operation": "data_loading"}]
    (call,) = rows(url, "select * from pgharness.run_llm_calls where run = 'manual_experiment/1'")
    assert (call["model"], call["input"], call["output"], call["duration_ms"]) == (
        "gpt-3.5",
        "test prompt",
        "test response",
        150,
    )


# -- every call that the old documents name


ATHANOR = [
    "mix setup", "mix ecto.setup", "iex -S mix phx.server", "use Athanor.Experiment", "def run(ctx)", "def experiment",
    "Experiment.Definition.new", "Experiment.Definition.configuration", "Experiment.ConfigSchema.new",
    "Experiment.ConfigSchema.field", "required: true", "Athanor.Runtime.config(ctx)", "Athanor.Runtime.log(ctx, :info",
    "Athanor.Runtime.log(ctx, :warn", ":error", "Athanor.Runtime.log_batch", "Athanor.Runtime.result",
    "Athanor.Runtime.progress", "Athanor.Runtime.complete", "Athanor.Runtime.fail", "Athanor.Runtime.cancelled?",
    "throw(:cancelled)", "{:error,", "Athanor.Runtime.start_run", "Athanor.Runtime.cancel_run",
    "Athanor.Experiments.list_results", "Athanor.Repo.all", "Athanor.Experiments.Result", "psycopg2.connect",
    "pd.read_sql", "pd.json_normalize", "Kino.DataTable.new", "/experiments", "runs_per_pair", "parallelism",
    "model_pairs", "experiment_instances", "experiment_runs", "run_results", "run_logs", "mix test", "mix precommit",
]  # fmt: skip
SCRYPTORUM = [
    "uv sync", "pip install -e .", "scryptorum init", "--experiments-dir", "--project-name", ".scryptorum",
    "scryptorum create-project", "--parent-dir", "scryptorum create-experiment", "--project-root",
    "scryptorum list-experiments", "scryptorum list-runs", "--module", "-m", "--script", "-s", "--milestone", "--run-id",
    "python -m", "from scryptorum import experiment, metric, timer, llm_call", "@experiment(name=", "@metric(name=",
    "metric_type=", "@timer(", "@llm_call(model=", "log_input=True", "log_output=True", "batch_processor",
    "BaseRunnable", "prepare", "score", "cleanup", "self.config.get", "self.run.log_event", "self.run.log_llm_call",
    "self.run.log_metric", "Experiment(\".\"", "RunType.MILESTONE", "create_run", "run.log_metric", "run.log_llm_call",
    "run.TimerContext", "run.finish()", "trial run", "milestone run", "run.jsonl", "metrics.jsonl", "timings.jsonl",
    "registry.register", "HTTPServerPlugin",
]  # fmt: skip


@pytest.mark.parametrize(("title", "calls"), [("Athanor", ATHANOR), ("Scryptorum", SCRYPTORUM)])
def test_table_has_every_old_call(title: str, calls: list[str]) -> None:
    section = re.split(r"^## From ", MIGRATION.read_text(), flags=re.MULTILINE)
    (text,) = [part for part in section if part.startswith(title)]
    olds = "\n".join(line.split(" | ")[0] for line in text.splitlines() if line.startswith("| "))
    assert not [call for call in calls if call not in olds]


# -- and what the other documents are held to


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    readme.test_links_lead_somewhere(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_sql_that_exists(document: Path, db: Connection[Any]) -> None:
    text = document.read_text()
    known = db.execute(
        """
        select relname::text from pg_class where relnamespace = 'pgharness'::regnamespace
        union select proname::text from pg_proc where pronamespace = 'pgharness'::regnamespace
        """
    ).fetchall()
    named = set(re.findall(r"\bpgharness\.([a-z_]+)\b(?!`\.)", text)) - {"experiments"}
    assert not named - {name for (name,) in known}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_only_statements_that_the_database_understands(document: Path, db: Connection[Any]) -> None:
    readme.test_documents_show_only_statements_that_the_database_understands(document, db)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_commands_and_options_that_exist(document: Path) -> None:
    readme.test_documents_name_only_commands_and_options_that_exist(document)
