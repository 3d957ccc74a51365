"""Hedging end to end: by SQL alone with one worker, and over real sockets, where losers are cancelled on the wire."""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
from aiohttp import web

import world
from command_line import CommandLine
from pgharness.gateway import Gateway
from pgharness.types import Completion, Message, ModelSpec, Request, Trail
from stub_provider import INPUT_TOKENS, OUTPUT_TOKENS, Recorded, Scene, StubProvider

DEFINITIONS = """
insert into pgharness.models (name, provider, parameters, input_usd_per_million, output_usd_per_million)
select name, 'simulator', parameters::jsonb, 1, 4
  from (values ('tailed', '{"latency_seconds": 0.02, "latency_spread": 0.2, "latency_tail_rate": 0.1, "latency_tail_factor": 50, "quality": 1}'),
               ('quick', '{"latency_seconds": 0.02, "quality": 1}'),
               ('never', '{"latency_seconds": 60, "latency_spread": 0}'),
               ('down', '{"latency_seconds": 0.01, "error_rate": 1}')) as m (name, parameters);

insert into pgharness.models (name, provider, parameters) values
  ('fixed', 'hedge', '{"members": ["tailed"], "max_extra": 1, "delay": {"strategy": "fixed", "seconds": 0.1}}'),
  ('percentile', 'hedge', '{"members": ["tailed"], "max_extra": 0.2, "delay": {"strategy": "percentile", "percentile": 90}}'),
  ('adaptive', 'hedge', '{"members": ["tailed"], "max_extra": 0.2, "delay": {"strategy": "adaptive", "extra_request_seconds": 0.1}}'),
  ('workload', 'hedge', '{"members": ["tailed"], "max_extra": 0.2, "delay": {"strategy": "workload", "percentile": 90}}'),
  ('exponential', 'hedge', '{"members": ["tailed"], "max_extra": 1, "delay": {"strategy": "exponential"}}'),
  ('tiers', 'hedge', '{"members": ["never", "down", "quick"], "max_extra": 2, "delay": [{"strategy": "fixed", "seconds": 0.05}, {"strategy": "fixed", "seconds": 0.5}]}'),
  ('capped', 'hedge', '{"members": ["tailed"], "max_extra": 0.02, "delay": {"strategy": "fixed", "seconds": 0.001}}');

insert into pgharness.cases (name, input, target)
select 'question ' || n, to_jsonb(format('How much is %s plus one?', n)), to_jsonb((n + 1)::text) from generate_series(1, 100) as n;

insert into pgharness.instances (name, experiment, max_attempts) values ('plain', 'note_grade', 1), ('hedged', 'note_grade', 1), ('together', 'note_grade', 1);
select pgharness.add_cases(name, names => (select array_agg(name) from pgharness.cases))
  from pgharness.instances where name in ('plain', 'hedged', 'together');
insert into pgharness.model_combinations (instance, name, generator, grader) values ('plain', 'tailed', 'tailed', 'exact_match');
insert into pgharness.model_combinations (instance, name, generator, grader)
select 'hedged', name, name, 'exact_match' from unnest('{fixed,percentile,adaptive,workload,exponential,tiers,capped}'::text[]) as name;
"""


@pytest.fixture(scope="module")
def done(server_url: str, template: str) -> Iterator[world.Database]:
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        db.execute(DEFINITIONS)
        for instance in ("plain", "hedged"):  # what the first run observes is the history that the second begins with
            db.execute("select run_id from pgharness.start_run(%s)", (instance,))
            CommandLine(url).work("--concurrency", "50", timeout=120)
        yield db


def seen(db: world.Database, model: str) -> world.Row:
    found = world.rows(db, "select * from pgharness.hedging where run = 'hedged/1' and model = %s", model)
    assert len(found) == 1
    return found[0]


def test_every_note_is_made_and_every_call_is_a_row(done: world.Database) -> None:
    statuses = world.rows(done, "select run, status, notes_succeeded from pgharness.run_progress order by run")
    assert [tuple(row.values()) for row in statuses] == [("hedged/1", "completed", 700), ("plain/1", "completed", 100)]
    assert world.value(done, "select min(score) from pgharness.note_results where run = 'hedged/1'") == 1
    assert world.orphans(done) == []
    rows = world.rows(done, "select model, call_count, extra_count from pgharness.hedging")
    requests = "select count(*) from pgharness.member_calls where parent = %s"
    for row in rows:
        assert world.value(done, requests, row["model"]) == row["call_count"] + row["extra_count"]


@pytest.mark.parametrize("model", ["fixed", "percentile", "adaptive", "workload", "exponential"])
def test_each_strategy_cuts_the_tail(done: world.Database, model: str) -> None:
    row = seen(done, model)
    assert (row["strategy"], row["call_count"]) == (model, 100)
    assert 0 < row["won_count"] <= row["hedged_count"] == row["extra_count"]
    plain = "select latency_p95_ms from pgharness.model_performance where run = 'plain/1'"
    assert float(row["latency_p95_ms"]) < 0.8 * float(world.value(done, plain))


def test_history_makes_a_percentile_known_from_the_first_call_on(done: world.Database) -> None:
    unknown = """select count(*) from pgharness.composite_calls
                  where model = 'percentile' and (composition ->> 'delay_ms') is null and composition -> 'hedges' <> '0'"""
    assert world.value(done, unknown) == 0
    assert 20 < seen(done, "percentile")["delay_p50_ms"] < 1000


def test_tiers_are_asked_in_turn_and_a_failure_does_not_wait_for_its_delay(done: world.Database) -> None:
    row = seen(done, "tiers")
    assert (row["hedge_rate"], row["win_rate"], row["extra_count"]) == (1, 1, 200)
    assert 500 < row["latency_p50_ms"] < 1500, "never at first, down after 50 ms, and quick 500 ms later"
    outcomes = (
        "select model, outcome, count(*) from pgharness.member_calls where parent = 'tiers' group by 1, 2 order by 1"
    )
    assert [tuple(row.values()) for row in world.rows(done, outcomes)] == [
        ("down", "server_error", 100),
        ("never", "cancelled", 100),
        ("quick", "succeeded", 100),
    ]


def test_the_share_of_extra_requests_is_kept(done: world.Database) -> None:
    row = seen(done, "capped")
    assert 0 < row["extra_count"] <= 2
    assert row["held_back_count"] > 50


def test_what_was_cancelled_is_paid_for(done: world.Database) -> None:
    row = seen(done, "fixed")
    cost = "select sum(cost_usd) as cost, sum(cost_usd) filter (where is_estimated) as estimated from pgharness.member_calls where parent = 'fixed'"
    found = world.rows(done, cost)[0]
    assert float(row["cost_usd"]) == pytest.approx(float(found["cost"]))
    assert 0 < float(found["estimated"]) <= float(row["extra_cost_usd"]) + 1e-9
    whole = "select note_cost_usd = (select sum(cost_usd) from pgharness.calls where run_id = r.id) from pgharness.runs as r where name = 'hedged/1'"
    assert world.value(done, whole)


# -- over sockets


class Slow(StubProvider):
    """Never answers the first request of a question, and all others at once."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    async def _act(self, scene: Scene, recorded: Recorded, request: web.Request) -> web.StreamResponse:
        named = re.search(r"question \d+", str(recorded.body))
        assert named is not None
        self.calls[named[0]] += 1
        return await super()._act("slow" if self.calls[named[0]] == 1 else scene, recorded, request)


def open_sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_thousand_losers_leave_nothing_behind(tmp_path: Path) -> None:
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    async with Slow() as stub:
        gateway = Gateway(cache_root=tmp_path)
        member = ModelSpec(
            id=1,
            name="a",
            provider="openai_compatible",
            model="m",
            base_url=stub.base_url("openai_compatible"),
            input_usd_per_million=1,
        )
        parameters = {"members": ["a"], "max_extra": 1, "delay": {"strategy": "fixed", "seconds": 0.02}}
        spec = ModelSpec(id=2, name="hedge", provider="hedge", parameters=parameters, members=(member,))
        hedge = gateway.completer(spec)
        places = asyncio.Semaphore(100)

        async def ask(number: int) -> tuple[Completion, Trail]:
            trail = Trail(datetime.now(UTC))
            async with places:
                return await hedge(Request(messages=(Message("user", f"question {number}"),), trail=trail)), trail

        answers = await asyncio.gather(*map(ask, range(1_000)))
        for completion, trail in answers:
            assert completion.composition is not None
            assert completion.composition["hedges"] == 1  # and whichever came second to the server won
            assert sorted(row["outcome"] for row in trail.calls) == ["cancelled", "succeeded"]
            loser = next(row for row in trail.calls if row["outcome"] == "cancelled")
            assert (loser["is_estimated"], loser["input_tokens"]) == (True, INPUT_TOKENS)
            assert 0 < loser["output_tokens"] <= OUTPUT_TOKENS
        await stub.wait_until(lambda: stub.disconnects == 1_000 and stub.in_flight == 0)
        assert stub.problems == []
        assert len(stub.requests) == 2_000
        assert stub.connections <= 200, "those of losers are closed, the others are kept for the next calls"
        await gateway.aclose()
        await until(lambda: stub.connections == 0)
    await until(lambda: asyncio.all_tasks() <= tasks and open_sockets() <= sockets)
