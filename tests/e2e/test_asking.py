"""Models from the command line: listed, added, asked."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
import pytest
from psycopg import Connection

from command_line import CommandLine

CALM = ("--provider", "simulator", "--set", "latency_seconds=0")


@pytest.fixture
def shell(url: str) -> CommandLine:
    return CommandLine(url)


def test_a_model_is_added_once_and_changed_only_when_asked(shell: CommandLine) -> None:
    assert "model calm added" in shell.call("models", "add", "calm", *CALM).out
    assert "is there already" in shell.call("models", "add", "calm", *CALM).out
    refused = shell.call("models", "add", "calm", *CALM, "--set", "quality=0.5", status=1)
    assert 'model "calm" exists with other values' in refused.err and "--replace" in refused.err
    assert "changed" in shell.call("models", "add", "calm", *CALM, "--set", "quality=0.5", "--replace").out
    (found,) = (row for row in shell.call("models", "list", "--json").json if row["name"] == "calm")
    assert (found["provider"], found["parameters"]) == ("simulator", {"latency_seconds": 0, "quality": 0.5})
    assert "calm" in shell.call("models", "list").out


def test_a_model_is_added_with_its_prices(shell: CommandLine) -> None:
    shell.call("models", "add", "dear", *CALM, "--input-usd", "1000", "--output-usd", "4000.5")
    told = shell.call("ask", "dear", "The patient has had a cough for nine days.", "--json").json
    (call,) = told["calls"]
    cost = (1000 * call["input_tokens"] + 4000.5 * call["output_tokens"]) / 1e6
    assert call["cost_usd"] == pytest.approx(cost) and cost > 0
    assert "--input-usd" in shell.call("models", "add", "gift", *CALM, "--input-usd", "-1", status=2).err


def test_what_cannot_be_a_model_is_refused_with_what_to_type(shell: CommandLine) -> None:
    refused = shell.call("models", "add", "panel", "--provider", "ensemble", "--member", "nobody", status=1)
    assert 'its member "nobody" does not exist' in refused.err and "select name from" in refused.err
    refused = shell.call("models", "add", "local", "--provider", "openai_compatible", "--model", "x", status=1)
    assert 'model "local" does not say where it is' in refused.err and "http://localhost" in refused.err
    assert 'model "nobody" does not exist' in shell.call("ask", "nobody", "Well?", status=1).err


def test_a_composite_is_asked_like_any_model_and_shows_what_each_call_was(shell: CommandLine, url: str) -> None:
    for name in ("a", "b", "c"):
        shell.call("models", "add", name, *CALM)
    members = [word for name in ("a", "b", "c") for word in ("--member", name)]
    shell.call("models", "add", "panel", "--provider", "ensemble", *members)
    told = shell.call("ask", "panel", "The patient has had a cough for nine days.", "--json").json
    assert [call["model"] for call in told["calls"]] == ["panel", "a", "b", "c"]
    assert told["text"] and 0 < told["composition"]["consensus"] <= 1
    shown = shell.call("ask", "panel", "The patient has had a cough for nine days.").out
    assert told["text"].splitlines()[0] in shown and "consensus" in shown
    shell.call("models", "add", "outer", "--provider", "hedge", "--member", "panel")
    shown = shell.call("ask", "outer", "The patient has had a cough for nine days.").out
    indents = [
        line[: len(line) - len(line.lstrip())] + line.split()[0] for line in shown.splitlines() if "succeeded" in line
    ]
    assert indents[:2] == ["outer", "  panel"] and sorted(indents[2:]) == ["    a", "    b", "    c"]
    assert "total: " in shown
    with psycopg.connect(url) as connection:
        assert _count(connection, "calls") == 0, "nothing is recorded"
        assert _count(connection, "models where name in ('a', 'b', 'c', 'panel')") == 4


def test_parameters_that_are_set_count_as_in_a_combination(shell: CommandLine) -> None:
    for name in ("a", "b", "c"):
        shell.call("models", "add", name, *CALM)
    members = [word for name in ("a", "b", "c") for word in ("--member", name)]
    shell.call("models", "add", "panel", "--provider", "ensemble", *members)
    told = shell.call("ask", "panel", "A cough?", "--set", "vote=mean", status=1)
    assert "has no number" in told.err, "what simulators write is no number"
    told = shell.call("ask", "panel", "A cough?", "--set", "strategy=sequential", "--set", "max_members=1", "--json")
    assert [call["model"] for call in told.json["calls"]] == ["panel", "a"]
    refused = shell.call("ask", "panel", "A cough?", "--set", "temperature=1", status=1)
    assert "temperature: is not known" in " ".join(refused.err.split())
    refused = shell.call("ask", "a", "A cough?", "--set", "latency_secondz=1", status=1)
    assert "latency_secondz: is not known" in " ".join(refused.err.split())
    assert "cannot exchange members" in shell.call("ask", "panel", "A cough?", "--set", 'members=["a"]', status=1).err
    refused = shell.call("models", "add", "other", "--provider", "ensemble", *members, "--model", "gpt", status=1)
    assert "model of an ensemble would do nothing" in " ".join(refused.err.split())


def test_what_the_guide_to_ensembles_asks_is_answered(shell: CommandLine, url: str) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "ensembles.md").read_text()
    inserts = re.search(r"^```sql\n(insert into pgharness.models.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    asked = re.search(r'^pgharness (ask \w+ ".*")$', guide, re.MULTILINE)
    assert inserts is not None and asked is not None
    with psycopg.connect(url) as connection:
        connection.execute(inserts[1].encode())
    assert "consensus" in shell.call(*shlex.split(asked[1]), "--set", "max_members=2", "--set", "min_responses=1").out


def _count(connection: Connection[tuple[int]], table: str) -> int:
    found = connection.execute(f"select count(*) from pgharness.{table}".encode()).fetchone()
    assert found is not None
    return found[0]


def test_an_ask_gives_up_on_a_model_that_cannot_be_reached(shell: CommandLine) -> None:
    nowhere = ("--provider", "openai_compatible", "--model", "x", "--base-url", "http://127.0.0.1:1/v1")
    shell.call("models", "add", "nowhere", *nowhere)
    told = shell.call("ask", "nowhere", "Hello?", status=1)
    assert "no connection to 127.0.0.1:1" in " ".join(told.err.split()) and told.out.count("unavailable") == 3
