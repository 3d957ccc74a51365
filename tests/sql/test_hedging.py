"""Hedging in SQL: what workers read of each other's latencies, and the view of what hedging brought and cost."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import Connection

from pgharness.database import Database
from pgharness.gateway.calls import Member
from pgharness.gateway.delays import Observation
from pgharness.gateway.hedging import Hedge, HedgeParameters
from pgharness.gateway.learned_delays import FEWEST, Survival
from pgharness.gateway.learned_delays import latencies as latencies_in
from pgharness.gateway.observations import Observations
from pgharness.gateway.simulator import Simulator
from pgharness.types import ModelSpec
from world import Row, add_instance, call, note, record, register, rows, start, value

Db = Connection[Any]
BEGUN = "2026-01-01T00:00:00"


class Stage:
    """A run of a hedge among models, whose calls are recorded as a worker does."""

    def __init__(self, db: Db, *, cases: int = 40) -> None:
        self.db = db
        for name in ("a", "b"):
            db.execute("insert into pgharness.models (name, provider) values (%s, 'simulator')", (name,))
        db.execute(
            """insert into pgharness.models (name, provider, parameters) values ('quick', 'hedge', '{"members": ["a", "b"]}')"""
        )
        add_instance(db, cases=cases, combinations=[("quick", None)])
        self.run = start(db)
        self.worker = register(db)
        self.ids = {row["name"]: row["id"] for row in rows(db, "select name, id from pgharness.models")}
        self._made = 0

    def member(
        self, model: str, milliseconds: float, *, place: int = 0, parent: str | None = None, **fields: object
    ) -> Row:
        """Return the row of a request that the hedge made, or that was made without one."""
        started = f"{BEGUN}.{self._made * 10 + place + 1:06}Z"
        known = {"model_id": self.ids[model], "latency_ms": milliseconds, "started_at": started}
        return call(0.25, **known, **({} if parent is None else {"parent_started_at": parent}), **fields)

    def record(self, *calls: Row) -> None:
        """Record the calls of the next note."""
        record(self.db, self.worker, note(self.run, self._made, calls=list(calls)))
        self._made += 1

    def hedged(self, *members: tuple[str, float, str], outcome: str = "succeeded", **composition: object) -> None:
        """Record a call of the hedge, with its requests: model, latency and outcome."""
        begun = f"{BEGUN}.{self._made * 10:06}Z"
        known = {"strategy": "fixed", "delay_ms": 100.0, "hedges": len(members) - 1, "winner_number": 0}
        own = call(
            0,
            model_id=self.ids["quick"],
            started_at=begun,
            outcome=outcome,
            latency_ms=max(latency for _, latency, _ in members),
            composition=known | composition,
        )
        parts = [
            self.member(model, latency, place=place, parent=begun, outcome=how)
            for place, (model, latency, how) in enumerate(members)
        ]
        self.record(own, *parts)

    def view(self) -> Row:
        found = rows(self.db, "select * from pgharness.hedging where run_id = %s", self.run)
        assert len(found) == 1
        return found[0]


@pytest.fixture
def stage(tx: Db) -> Stage:
    return Stage(tx)


def latencies(stage: Stage, model: str = "a", after: int | None = None) -> list[Row]:
    query = "select * from pgharness.recent_latencies(array[%s]::bigint[], array[%s]::bigint[])"
    return rows(stage.db, query, stage.ids[model], after)


# -- latencies


def test_latencies_are_those_of_answers_and_of_what_was_cut(stage: Stage) -> None:
    stage.record(stage.member("a", 500))
    stage.record(stage.member("a", 700, outcome="cancelled", input_tokens=0, output_tokens=0))
    stage.record(stage.member("a", 60_000, outcome="timeout", input_tokens=0, output_tokens=0))
    stage.record(stage.member("a", 86_400_000))
    for outcome in ("server_error", "rate_limited", "cached", "invalid_output"):
        stage.record(stage.member("a", 1, outcome=outcome))
    stage.record(stage.member("a", 0))
    stage.record(stage.member("b", 900))
    stage.db.execute("update pgharness.calls set batch_id = 1 where latency_ms = 86400000")
    found = latencies(stage)
    assert [(row["seconds"], row["is_cut"]) for row in found] == [(0.5, False), (0.7, True), (60, True)]
    assert {row["model_id"] for row in found} == {stage.ids["a"]}
    assert [row["prompt_tokens"] for row in found] == [10, 0, 0]


def test_answers_weigh_what_those_to_such_items_do_on_average(stage: Stage) -> None:
    for tokens in (100, 300):
        stage.record(stage.member("a", 500, output_tokens=tokens))
    assert [row["answer_tokens"] for row in latencies(stage)] == [200, 200]


def test_a_further_request_to_the_same_model_is_none_of_its_latencies(stage: Stage) -> None:
    stage.hedged(("a", 900, "cancelled"), ("a", 200, "succeeded"), winner_number=1)
    stage.hedged(("a", 800, "cancelled"), ("b", 300, "succeeded"), winner_number=1)
    assert [row["seconds"] for row in latencies(stage)] == [0.9, 0.8]
    assert [row["seconds"] for row in latencies(stage, "b")] == [0.3]


def test_latencies_are_read_on_from_where_one_was(stage: Stage) -> None:
    for milliseconds in (100, 200, 300):
        stage.record(stage.member("a", milliseconds))
    first = latencies(stage)
    assert [row["seconds"] for row in first] == [0.1, 0.2, 0.3]
    assert [row["call_id"] for row in first] == sorted(row["call_id"] for row in first)
    assert [row["seconds"] for row in latencies(stage, after=first[1]["call_id"])] == [0.3]
    assert latencies(stage, after=first[2]["call_id"]) == []


def test_the_latencies_of_several_models_come_at_once_and_no_more_than_are_needed(stage: Stage) -> None:
    insert = """insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, outcome, latency_ms, started_at)
        select %s, 'note', i, 1, %s, 'succeeded', i, clock_timestamp() from generate_series(1, 1500) as i"""
    for model in "ab":
        stage.db.execute(insert.encode(), (stage.run, stage.ids[model]))
    both = rows(
        stage.db,
        "select model_id, count(*), max(seconds) from pgharness.recent_latencies(array[%s, %s]::bigint[], array[null, 0]::bigint[]) group by 1 order by 1",
        stage.ids["a"],
        stage.ids["b"],
    )
    assert [(row["count"], row["max"]) for row in both] == [(1_000, 1.5), (200, 1.5)]


# -- sharing


@pytest.fixture
def shared(url: str) -> Iterator[Stage]:
    with psycopg.connect(url, autocommit=True) as db:
        yield Stage(db)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_window_begins_with_the_history_of_its_model(shared: Stage, url: str) -> None:
    for place in range(FEWEST):
        shared.record(shared.member("a", 1_000 + place))
    async with Database(url).opened() as database:
        observations = Observations(database)
        window = observations.window(shared.ids["a"])
        await until(lambda: len(window) == FEWEST)
        assert sorted(latencies_in(window)[0]) == [1 + place / 1_000 for place in range(FEWEST)]
        await observations.aclose()


async def test_what_other_workers_record_is_learned_and_ones_own_counts_once(shared: Stage, url: str) -> None:
    async with Database(url).opened() as database:
        observations = Observations(database)
        window = observations.window(shared.ids["a"])
        ours = shared.member("a", 500)
        observations.add(shared.ids["a"], Observation(0.5), datetime.fromisoformat(ours["started_at"]))
        shared.record(ours)
        shared.record(shared.member("a", 700))
        await until(lambda: window.count >= 2)
        shared.record(shared.member("a", 900, outcome="cancelled"))
        observations.add(shared.ids["a"], Observation(0.6))
        await until(lambda: window.count >= 4)
        seconds, is_cut = latencies_in(window)
        assert sorted(zip(seconds, is_cut, strict=True)) == [(0.5, False), (0.6, False), (0.7, False), (0.9, True)]
        await observations.aclose()


async def test_windows_go_on_without_the_database(url: str) -> None:
    database = Database(url)
    await database.open()
    observations = Observations(database)
    await database.close()
    for _ in range(3):
        observations.add(7, Observation(0.5))
    assert len(observations.window(7)) == 3
    await observations.aclose()


# -- the view


def test_the_view_counts_hedges_and_wins(stage: Stage) -> None:
    stage.hedged(("a", 50, "succeeded"), primary_ms=50, cost_usd=0.25)
    stage.hedged(
        ("a", 300, "cancelled"),
        ("b", 200, "succeeded"),
        winner_number=1,
        primary_ms=300,
        primary_is_cut=True,
        cost_usd=0.5,
        extra_usd=0.25,
    )
    stage.hedged(("a", 250, "succeeded"), ("b", 150, "cancelled"), primary_ms=250, cost_usd=0.5, extra_usd=0.25)
    stage.hedged(("a", 400, "succeeded"), primary_ms=400, held_back="max_extra", cost_usd=0.25)
    seen = stage.view()
    assert (seen["model"], seen["kind"], seen["strategy"]) == ("quick", "note", "fixed")
    assert (seen["call_count"], seen["hedged_count"], seen["won_count"], seen["extra_count"]) == (4, 2, 1, 2)
    assert (seen["hedge_rate"], seen["win_rate"], seen["extra_rate"]) == (0.5, 0.5, 0.5)
    assert (seen["held_back_count"], seen["delay_p50_ms"]) == (1, 100)
    assert (float(seen["cost_usd"]), float(seen["extra_cost_usd"]), float(seen["extra_cost_rate"])) == (1.5, 0.5, 0.5)
    own = value(stage.db, "select note_cost_usd from pgharness.runs where id = %s", stage.run)
    assert own == seen["cost_usd"], "what the view sums up is what the calls of the members cost"


def test_the_view_leaves_out_what_is_no_call(stage: Stage) -> None:
    stage.hedged(("a", 50, "succeeded"), primary_ms=50)
    stage.hedged(("a", 50, "succeeded"), primary_ms=1, outcome="cached")
    stage.record(stage.member("quick", 10, outcome="cancelled"))
    seen = stage.view()
    assert (seen["call_count"], seen["latency_p99_ms"]) == (1, 50)
    assert seen["win_rate"] is None


def test_the_view_leaves_out_calls_whose_members_were_answered_from_the_cache(stage: Stage) -> None:
    stage.hedged(("a", 240, "succeeded"), primary_ms=240)
    for _ in range(3):
        stage.hedged(("a", 20, "cached"), primary_ms=20)
    stage.hedged(("a", 300, "succeeded"), ("b", 20, "cached"), primary_ms=300)
    seen = stage.view()
    assert (seen["call_count"], seen["hedged_count"]) == (1, 0)
    assert (seen["latency_p50_ms"], seen["unhedged_p50_ms"]) == (240, 240)


def test_latency_without_hedging_is_the_product_limit_of_first_requests(tx: Db) -> None:
    stage = Stage(tx, cases=200)
    rng = np.random.default_rng(1)
    milliseconds = np.round(100 * np.exp(rng.standard_normal(200)), 1)
    is_cut = rng.random(200) < 0.3
    for time, cut in zip(milliseconds.tolist(), is_cut.tolist(), strict=True):
        stage.hedged(
            ("a", time, "cancelled" if cut else "succeeded"),
            primary_ms=time,
            **({"primary_is_cut": True} if cut else {}),
        )
    survival = Survival.of(milliseconds, is_cut)
    seen = stage.view()
    for percent in (50, 95):
        assert float(seen[f"unhedged_p{percent}_ms"]) == pytest.approx(survival.percentile(percent), abs=0.06)
    assert float(seen["latency_p50_ms"]) == pytest.approx(np.percentile(milliseconds, 50), abs=0.06)


def test_latency_without_hedging_is_left_open_where_nobody_saw_it(stage: Stage) -> None:
    for place in range(20):
        slow = place >= 18
        stage.hedged(
            ("a", 100 + place, "cancelled" if slow else "succeeded"),
            primary_ms=100 + place,
            **({"primary_is_cut": True} if slow else {}),
        )
    seen = stage.view()
    assert seen["unhedged_p50_ms"] == 109
    assert (seen["unhedged_p95_ms"], seen["unhedged_p99_ms"]) == (None, None)


def test_a_hedge_that_failed_counts_with_its_cost(stage: Stage) -> None:
    begun = f"{BEGUN}.5Z"
    composition = {
        "strategy": "fixed",
        "delay_ms": None,
        "hedges": 1,
        "winner_number": None,
        "primary_ms": None,
        "extra_usd": 0.5,
        "cost_usd": 0.5,
    }
    stage.record(
        call(0, model_id=stage.ids["quick"], outcome="server_error", started_at=begun, composition=composition)
    )
    seen = stage.view()
    assert (seen["call_count"], seen["hedged_count"], seen["won_count"], float(seen["extra_cost_usd"])) == (
        1,
        1,
        0,
        0.5,
    )
    assert (seen["latency_p50_ms"], seen["unhedged_p50_ms"], seen["delay_p50_ms"], seen["extra_cost_rate"]) == (
        None,
        None,
        None,
        None,
    )


def test_each_run_and_each_hedge_has_a_row_of_its_own(stage: Stage) -> None:
    stage.hedged(("a", 50, "succeeded"), primary_ms=50)
    first = stage.run
    stage.run, stage._made = start(stage.db, idempotency_key="again"), 0
    stage.hedged(("a", 70, "succeeded"), primary_ms=70)
    found = rows(stage.db, "select run_id, latency_p50_ms from pgharness.hedging order by run_id")
    assert [tuple(row.values()) for row in found] == [(first, 50), (stage.run, 70)]


def test_the_view_is_fast_among_many_calls(tx: Db) -> None:
    stage = Stage(tx)
    composition = {
        "strategy": "percentile",
        "delay_ms": 170.0,
        "hedges": 0,
        "winner": "a",
        "winner_number": 0,
        "cost_usd": 0.001,
    }
    tx.execute(
        """insert into pgharness.calls (run_id, kind, ordinal, attempt, model_id, outcome, latency_ms, started_at, composition)
           select %s, 'note', i, 1, %s, 'succeeded', 100 + i %% 977, now(),
                  %s::jsonb || jsonb_build_object('primary_ms', 100 + i %% 977) || case i %% 20 when 0 then '{"primary_is_cut": true, "hedges": 1}' else '{}' end::jsonb
             from generate_series(1, 100000) as i""",
        (stage.run, stage.ids["quick"], json.dumps(composition)),
    )
    tx.execute("set local statement_timeout = '10s'")  # about half a second on an idle machine
    seen = stage.view()
    assert (seen["call_count"], seen["hedged_count"]) == (100_000, 5_000)


# -- the guide

GUIDE = (Path(__file__).parents[2] / "docs" / "hedging.md").read_text()


def test_the_hedges_of_the_guide_can_be_made_and_its_queries_asked(tx: Db) -> None:
    for statements in re.findall(r"^```sql\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL):
        tx.execute(statements.encode())
    made = rows(tx, "select id, name, parameters from pgharness.models where provider = 'hedge'")
    assert len(made) == 5
    for row in made:
        names = row["parameters"]["members"]
        specs = tuple(ModelSpec(id=place, name=name, provider="simulator") for place, name in enumerate(names))
        hedge = ModelSpec(**row, provider="hedge", members=specs)
        Hedge(hedge, [Member(spec, Simulator(spec)) for spec in specs], Observations())


def test_the_guide_names_every_option_and_its_default() -> None:
    options = set(re.findall(r"^\| `(\w+)` +\|", GUIDE, re.MULTILINE))
    assert HedgeParameters.model_fields.keys() <= options
    shapes = HedgeParameters.model_json_schema()["$defs"].values()
    for shape in shapes:
        fields = shape["properties"]
        (line,) = re.findall(
            rf"^\| `{fields['strategy']['const']}` \|.*$",
            GUIDE.split("## Strategies")[1].split("## What")[0],
            re.MULTILINE,
        )
        told = fields.keys() - {"strategy"} - ({"initial_seconds"} if "min_seconds" not in fields else set())
        assert all(f"`{name}`" in line for name in told), line
