"""What the documents show is what happens: the README is typed into psql, and every name that they mention exists."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import typer
from psycopg import Connection

from pgharness import schema
from pgharness.cli import app
from pgharness.embedded import find_bindir
from pgharness.settings import VARIABLES

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(
        ROOT / "docs" / f"{name}.md"
        for name in (
            *("tutorial", "operations", "simulator", "caching", "batches", "ensembles", "hedging"),
            "migrating-from-the-clinical-runner",
        )
    ),
    *sorted(ROOT.glob("experiments/**/README.md")),
]
# design: insert an instance, add_cases, insert a combination, expected_workload, start_run, run_progress, cancel_run,
# resume_run, retry_failed
DESIGN_STATEMENTS = 9
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_STATEMENT_END = re.compile(r";\s*$", re.MULTILINE)


def fences(document: Path) -> list[tuple[str, str]]:
    """Return a document's fenced blocks: language and text."""
    return [(match[1], match[2]) for match in _FENCE.finditer(document.read_text())]


def typed(url: str, statements: str) -> str:
    """Return what psql prints for statements."""
    psql = find_bindir()[0] / "psql"
    asked = [
        str(psql),
        "--no-psqlrc",
        "--quiet",
        "--set=ON_ERROR_STOP=1",
        "--pset=footer=off",
        "--dbname",
        url,
        "--file=-",
    ]
    done = subprocess.run(asked, input=statements, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(url: str, line: str, cwd: Path) -> None:
    """Run a command line of a document against a database; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line, comments=True)],
        cwd=cwd,
        env=os.environ | {"PGHARNESS_DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{line}\n{done.stderr}"


def words(output: str) -> list[str]:
    """Return what psql printed, without the width of its columns."""
    return re.sub(r"-{3,}", "---", output).replace("|", " | ").split()


def is_same(shown: str, real: str) -> bool:
    """Whether two words say the same; decimals may differ by what another platform's arithmetic would make of them."""
    if shown == real:
        return True
    try:
        return "." in shown and math.isclose(float(shown), float(real), rel_tol=0.02)
    except ValueError:
        return False


def test_readme_does_what_it_shows(url: str, tmp_path: Path) -> None:
    output, compared, workers = "", 0, 0
    for language, text in fences(ROOT / "README.md"):
        if language == "sql":
            output = typed(url, text)
        elif language == "text":
            shown, real = words(text), words(output)
            differences = [pair for pair in zip(shown, real, strict=False) if not is_same(*pair)]
            assert len(shown) == len(real) and not differences, (
                f"{differences}\nThe README shows\n{text}\nbut it is\n{output}"
            )
            compared += 1
        elif text.startswith("pgharness worker"):
            command(url, text, cwd=tmp_path)
            workers += 1
    assert (compared, workers) == (2, 1)


def test_tutorial_leads_to_a_comparison(url: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    compared = ""
    for match in _FENCE.finditer(text):
        language, block = match[1], match[2]
        if language == "json":
            named = re.findall(r"`([a-z]+\.jsonl)`", text[: match.start()])[-1]
            (tmp_path / named).write_text(block)
        elif language == "sql":
            printed = typed(url, block)
            compared = printed if "as difference" in block else compared
            # the models of the tutorial cost money: simulated ones of the same name take their place
            typed(url, _SIMULATED)
        else:
            for line in block.splitlines():
                if line.startswith("pgharness") and not line.startswith("pgharness demo"):
                    command(url, line, cwd=tmp_path)
    assert re.search(r"^\s+3 \|\s+-?0\.\d+ \|\s+0\.\d+$", compared, re.MULTILINE)
    assert len((tmp_path / "grades.csv").read_text().splitlines()) == 1 + 2 * 15 * 2 * 2


_SIMULATED = """
    update pgharness.models
       set provider = 'simulator', model = '', parameters = '{"latency_seconds": 0}', requests_per_minute = null
     where provider in ('openai', 'anthropic');
"""


def test_readme_needs_no_more_statements_than_the_design() -> None:
    text = "".join(text for language, text in fences(ROOT / "README.md") if language == "sql")
    _, start, rest = text.partition("insert into pgharness.instances")
    workflow, end, _ = rest.partition("select pgharness.retry_failed(1)")
    assert start and end
    assert len(_STATEMENT_END.findall(workflow)) + 1 <= DESIGN_STATEMENTS


@pytest.mark.parametrize(("name", "most"), [("README.md", 120), ("CONTRIBUTING.md", 60)])
def test_documents_stay_short(name: str, most: int) -> None:
    assert len((ROOT / name).read_text().splitlines()) <= most


def test_operations_lists_every_setting() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    assert not [name for name in VARIABLES if f"| `{name}` |" not in text and "TEST" not in name]


def test_changelog_names_every_migration() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert not [script.name for script in schema.migrations() if f"`{script.name}`" not in text]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_sql_that_exists(document: Path, db: Connection[Any]) -> None:
    known = db.execute(
        """
        select relname::text from pg_class where relnamespace = 'pgharness'::regnamespace
        union select proname::text from pg_proc where pronamespace = 'pgharness'::regnamespace
        """
    ).fetchall()
    text = re.sub(r'entry-points\."pgharness\.\w+"|\b(from|import) pgharness\.[\w.]+', "", document.read_text())
    named = set(re.findall(r"\bpgharness\.([a-z_]+)\b", text))
    assert not named - {name for (name,) in known}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_show_only_statements_that_the_database_understands(document: Path, db: Connection[Any]) -> None:
    text = document.read_text()
    blocks = [block for language, block in fences(document) if language == "sql"]
    inline = [code for code in _INLINE.findall(_FENCE.sub("", text)) if "pgharness." in code]
    statements = [
        statement.strip()
        for block in (*blocks, *inline)
        for statement in _STATEMENT_END.split(block)
        if re.match(r"(select|with|insert|update|delete) ", statement.strip())
    ]
    for statement in statements:
        try:
            with db.transaction(force_rollback=True):
                db.execute(statement.encode())
        except psycopg.Error as exc:
            # that a thing it names is not there is well; a name or a type that does not exist is not
            assert exc.sqlstate is not None and exc.sqlstate[:2] in ("PH", "23"), f"{statement}\n{exc}"


def _command_lines(document: Path) -> Iterator[list[str]]:
    """Yield the words of each pgharness command that a document shows."""
    text = document.read_text()
    lines = [line for language, block in fences(document) if language == "sh" for line in block.splitlines()]
    lines += _INLINE.findall(_FENCE.sub("", text))
    for line in lines:
        line = line.split(" #")[0].strip()
        if re.match(r"pgharness [a-z]", line):
            yield line.split(" -- ")[0].split()[1:]


def _options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_commands_and_options_that_exist(document: Path) -> None:
    for arguments in _command_lines(document):
        group: Any = typer.main.get_command(app)
        known = _options(group) | {"--help"}
        for name in arguments:
            if not hasattr(group, "commands") or name.startswith("-"):
                break
            assert name in group.commands, arguments
            group = group.commands[name]
            known |= _options(group)
        used = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert not used - known, arguments
