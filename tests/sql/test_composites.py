"""Composites: their members are checked when they are written, kept through renames, and frozen with a run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from psycopg import Connection
from pydantic import BaseModel, ValidationError

from pgharness.gateway.ensemble_options import EnsembleParameters
from pgharness.gateway.hedging import HedgeParameters
from pgharness.gateway.simulated_world import SimulatorParameters
from world import add_instance, call, note, record, refused, register, rows, start, value

Database = Connection[Any]


def add_model(db: Database, name: str, provider: str = "simulator", **parameters: object) -> int:
    """Insert a model and return its id."""
    query = "insert into pgharness.models (name, provider, parameters) values (%s, %s, %s) returning id"
    added: int = value(db, query, name, provider, json.dumps(parameters))
    return added


@pytest.fixture
def members(tx: Database) -> Database:
    """Models a, b and c, and a metric."""
    for name in "abc":
        add_model(tx, name)
    tx.execute("insert into pgharness.models (name, provider, model) values ('exact', 'metric', 'exact_match')")
    return tx


def test_a_composite_knows_its_members_in_their_order(members: Database) -> None:
    panel = add_model(members, "panel", "ensemble", members=["c", {"model": "a", "weight": 2}, "c"])
    linked = "select m.name from pgharness.model_members as mm join pgharness.models as m on m.id = mm.member_id"
    assert [row["name"] for row in rows(members, f"{linked} where mm.model_id = %s order by mm.number", panel)] == [
        *("c", "a", "c")
    ]
    members.execute("""update pgharness.models set parameters = '{"members": ["b"]}' where name = 'panel'""")
    assert [row["name"] for row in rows(members, f"{linked} where mm.model_id = %s", panel)] == ["b"]
    members.execute("update pgharness.models set provider = 'simulator', parameters = '{}' where name = 'panel'")
    assert rows(members, f"{linked} where mm.model_id = %s", panel) == []


def test_a_member_that_is_renamed_stays_one_and_cannot_be_deleted(members: Database) -> None:
    add_model(members, "panel", "ensemble", members=["a", {"model": "b", "weight": 2}], vote="weighted")
    members.execute("update pgharness.models set name = 'renamed ' || name where name in ('a', 'b')")
    assert value(members, "select parameters from pgharness.models where name = 'panel'") == {
        "members": ["renamed a", {"model": "renamed b", "weight": 2}],
        "vote": "weighted",
    }
    with refused(members, "PH003", 'model "renamed a" is a member of "panel"', "give it other members"):
        members.execute("delete from pgharness.models where name = 'renamed a'")


def test_a_member_goes_with_all_that_it_is_a_member_of(members: Database) -> None:
    add_model(members, "panel", "ensemble", members=["a", "b"])
    members.execute("delete from pgharness.models where name = 'panel'")
    members.execute("delete from pgharness.models where name in ('a', 'b')")
    assert value(members, "select count(*) from pgharness.model_members") == 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "needs members"),
        ({"members": []}, "needs members"),
        ({"members": "a"}, "needs members"),
        ({"members": [3]}, "neither a name nor an object"),
        ({"members": [{"weight": 1}]}, "neither a name nor an object"),
        ({"members": ["a", "nobody"]}, '"nobody" does not exist'),
        ({"members": ["a", "exact"]}, '"exact" is a metric'),
        ({"members": ["a", "panel"]}, '"panel" is itself'),
    ],
)
@pytest.mark.parametrize("provider", ["ensemble", "hedge"])
def test_wrong_members_are_refused(members: Database, provider: str, parameters: dict[str, Any], message: str) -> None:
    with refused(members, "PH002", message):
        add_model(members, "panel", provider, **parameters)


@pytest.mark.parametrize(
    ("provider", "parameters", "messages"),
    [
        ("ensemble", {"voting": "majority"}, ["voting", "known are", "For example"]),
        ("ensemble", {"strategy": "all"}, ["strategy", "parallel"]),
        ("ensemble", {"min_consensus": 2}, ["min_consensus"]),
        ("hedge", {"delay": {"strategy": "percentile", "percentile": 20}}, ["percentile"]),
        ("hedge", {"delay": {"strategy": "soon"}}, ["delay"]),
    ],
)
def test_parameters_that_a_composite_does_not_have_are_refused(
    members: Database, provider: str, parameters: dict[str, Any], messages: list[str]
) -> None:
    with refused(members, "PH002", 'model "panel"', *messages):
        add_model(members, "panel", provider, members=["a", "b"], **parameters)
    add_model(members, "panel", provider, members=["a", "b"])
    add_instance(members, combinations=[])
    combine = "insert into pgharness.model_combinations (instance, generator, generator_parameters) values ('trial', 'panel', %s)"
    with refused(members, "PH002", 'combination with "panel"', *messages):
        members.execute(combine.encode(), (json.dumps(parameters),))
    with refused(members, "PH002", "cannot exchange the members"):
        members.execute(combine.encode(), (json.dumps({"members": ["c"]}),))


@pytest.mark.parametrize(("provider", "shape"), [("ensemble", EnsembleParameters), ("hedge", HedgeParameters)])
def test_the_database_and_the_workers_know_the_same_parameters(
    tx: Database, provider: str, shape: type[BaseModel]
) -> None:
    assert value(tx, "select pgharness._composite_schema(%s)", provider) == bare(shape.model_json_schema())


def test_the_database_and_the_workers_know_the_same_simulators(tx: Database) -> None:
    assert value(tx, "select pgharness._simulator_schema()") == bare(SimulatorParameters.model_json_schema())


OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ensemble": [
        {"vote": "bogus"},
        {"vote": "my_votes:elect"},
        {"vote": "my.votes:a.b", "normalise": "my:n"},
        {"vote": "9votes:elect"},
        {"normalise": "foo"},
        {"enough_consensus": 0.5},
        {"strategy": "sequential", "enough_consensus": 0.5},
        {"hedge_delay_seconds": 1},
        {"strategy": "hedged", "hedge_delay_seconds": 1},
        {"strategy": "cascade"},
        {"strategy": "cascade", "confidence": "stated", "confident_at": 0.5},
        {"strategy": "cascade", "vote": "majority"},
        {"confident_at": 0.5},
        {"vote": "best_confidence"},
        {"vote": "best_confidence", "confidence": "reported"},
        {"vote": "weighted"},
        {"vote": "weighted", "confidence": "reported"},
        {"vote": "weighted", "members": [{"model": "a", "weight": 2}, "b"]},
        {"stops_early": True},
        {"stops_early": True, "vote": "mean"},
        {"stops_early": False, "strategy": "sequential"},
        {"vote": "unanimous", "min_consensus": 0.5},
        {"vote": "unanimous"},
        {"vote": "mean", "normalise": "boolean"},
        {"vote": "median", "normalise": "json"},
        {"vote": "mean", "field": "a.b"},
        {"field": "a.b"},
        {"below": "escalate", "members": ["a"]},
        {"below": "escalate"},
        {"below": "escalate", "min_responses": 2},
        {"min_responses": 2},
        {"min_responses": 3},
        {"min_responses": 2, "max_members": 1},
        {"min_responses": None, "max_members": None},
    ],
    "hedge": [
        {"delay": []},
        {"delay": [{"strategy": "fixed", "seconds": 1}]},
        {"delay": [{"strategy": "fixed", "seconds": 1}] * 2},
        {"delay": [{"strategy": "fixed", "seconds": 1}] * 2, "max_hedges": 2},
        {"delay": {"strategy": "exponential", "min_seconds": 2, "max_seconds": 1}},
        {"delay": {"strategy": "exponential", "min_seconds": 6}},
        {"delay": {"strategy": "exponential", "min_seconds": 1, "max_seconds": 2}},
        {"delay": [{"strategy": "exponential", "min_seconds": 2, "max_seconds": 1}]},
    ],
}


@pytest.mark.parametrize(
    ("provider", "options"),
    [(provider, options) for provider, sets in OPTIONS.items() for options in sets],
    ids=lambda each: json.dumps(each) if isinstance(each, dict) else each,
)
def test_the_database_and_the_workers_agree_on_what_options_mean_together(
    tx: Database, provider: str, options: dict[str, Any]
) -> None:
    parameters = {"members": ["a", "b"]} | options
    shape = {"ensemble": EnsembleParameters, "hedge": HedgeParameters}[provider]
    problem = None
    try:
        shape.model_validate(parameters)
    except ValidationError as exc:
        problem = exc.errors()[0]["msg"].removeprefix("Value error, ")
    found = value(tx, "select pgharness._composite_problem(%s, %s)", provider, json.dumps(parameters))
    if problem is None or provider == "hedge":
        assert (found is None) == (problem is None)
    else:
        assert found == problem


def bare(schema: Any) -> Any:
    """Return a JSON Schema without what is for people."""
    if isinstance(schema, list):
        return [bare(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: bare(inner) for name, inner in each.items()} if key in ("properties", "$defs") else bare(each)
        for key, each in schema.items()
        if key not in ("title", "description", "default", "discriminator")
    }


def test_a_composite_cannot_ask_itself_nor_be_endlessly_deep(members: Database) -> None:
    add_model(members, "one", "ensemble", members=["a"])
    add_model(members, "two", "hedge", members=["one"])
    with refused(members, "PH002", "would ask itself", "one -> two -> one"):
        members.execute("""update pgharness.models set parameters = '{"members": ["b", "two"]}' where name = 'one'""")
    with refused(members, "PH002", 'member "one" is itself'):
        members.execute("""update pgharness.models set parameters = '{"members": ["one"]}' where name = 'one'""")
    add_model(members, "three", "ensemble", members=["two"])
    with refused(members, "PH002", "more than 4 models deep", "four -> three -> two -> one -> a"):
        add_model(members, "four", "ensemble", members=["three"])


def test_what_changes_a_member_keeps_to_what_holds_for_those_that_ask_it(members: Database) -> None:
    for name, below in (("one", "a"), ("two", "one"), ("three", "two"), ("pair", "c")):
        add_model(members, name, "ensemble", members=[below])
    with refused(members, "PH002", "more than 4 models deep", "one -> pair -> c"):
        members.execute("""update pgharness.models set parameters = '{"members": ["pair"]}' where name = 'one'""")
    with refused(members, "PH003", 'is a member of "one"'):
        members.execute(
            "update pgharness.models set provider = 'metric', model = 'exact_match', parameters = '{}' where name = 'a'"
        )


def test_a_run_freezes_a_composite_with_its_members(members: Database) -> None:
    add_model(members, "panel", "ensemble", members=["b", "a"])
    add_model(members, "outer", "hedge", members=["panel", "c"])
    add_instance(members, combinations=[("outer", None)])
    run = start(members)
    members.execute("""update pgharness.models set parameters = '{"quality": 0.1}' where name = 'a'""")
    frozen = value(members, "select generator from pgharness.run_combinations where run_id = %s", run)
    assert [member["name"] for member in frozen["members"]] == ["panel", "c"]
    assert [member["name"] for member in frozen["members"][0]["members"]] == ["b", "a"]
    assert frozen["members"][0]["members"][1]["parameters"] == {}
    assert value(members, "select pgharness.load_model('outer')")["members"] == [
        value(members, "select pgharness.load_model('panel')"),
        value(members, "select pgharness.load_model('c')"),
    ]


def test_calls_of_members_are_rows_beside_the_one_they_were_made_for(members: Database) -> None:
    panel = add_model(members, "panel", "ensemble", members=["a", "b"])
    add_instance(members, combinations=[("panel", None)])
    run, worker = start(members), register(members)
    ids = {row["name"]: row["id"] for row in rows(members, "select name, id from pgharness.models")}
    begun = "2026-01-01T00:00:00Z"
    own = call(0, model_id=panel, started_at=begun, composition={"consensus": 0.5}, latency_ms=20)
    parts = [
        call(0.5, model_id=ids["a"], started_at="2026-01-01T00:00:00.000001Z", parent_started_at=begun, number=0),
        call(
            0.25,
            **{"model_id": ids["b"], "started_at": "2026-01-01T00:00:00.000002Z", "parent_started_at": begun},
            **{"outcome": "cancelled", "is_estimated": True},
        ),
    ]
    outcome = note(run, 0, calls=[own, *parts])
    record(members, worker, outcome)
    record(members, worker, outcome)
    assert value(members, "select note_cost_usd from pgharness.runs where id = %s", run) == 0.75
    found = rows(members, "select * from pgharness.composite_calls where run_id = %s", run)
    assert len(found) == 1
    assert (found[0]["model"], found[0]["member_count"], float(found[0]["cost_usd"])) == ("panel", 2, 0.75)
    assert (found[0]["composition"], found[0]["latency_ms"]) == ({"consensus": 0.5}, 20)
    told = rows(members, "select * from pgharness.member_calls where run_id = %s order by started_at", run)
    assert [(row["model"], row["parent"], row["outcome"], row["is_estimated"]) for row in told] == [
        ("a", "panel", "succeeded", False),
        ("b", "panel", "cancelled", True),
    ]
