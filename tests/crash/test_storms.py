"""Providers that refuse: two workers find a limit that nobody told them of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol

import pytest
from aiohttp import web

from stub_provider import StubProvider, _error, _record


class Limiter(Protocol):
    """What a provider admits."""

    def admits(self) -> bool: ...
    def ended(self) -> None: ...


class Bucket:
    """So many requests a second, and as many at once after a pause."""

    def __init__(self, rate: float) -> None:
        self.rate = self.level = rate
        self.at = time.monotonic()

    def admits(self) -> bool:
        now = time.monotonic()
        self.level, self.at = min(self.rate, self.level + (now - self.at) * self.rate), now
        is_admitted = self.level >= 1
        self.level -= is_admitted
        return is_admitted

    def ended(self) -> None: ...


class Places:
    """So many requests at once."""

    def __init__(self, count: int) -> None:
        self.free = count

    def admits(self) -> bool:
        is_admitted = self.free > 0
        self.free -= is_admitted
        return is_admitted

    def ended(self) -> None:
        self.free += 1


class Storm:
    """A stub that refuses with 429 what its limiter does not admit."""

    def __init__(self, stub: StubProvider, limiter: Limiter, latency: float) -> None:
        self.accepted = self.refused = 0
        stub._is_recording = False
        serve: Callable[..., Any] = stub._serve

        async def limited(provider: str, request: web.Request) -> web.StreamResponse:
            if not limiter.admits():
                self.refused += 1
                recorded = await _record(provider, request)
                return _error(recorded, 429, "rate_limit_error", "slow down", {"retry-after": "1"})
            self.accepted += 1
            try:
                await asyncio.sleep(latency)
                response: web.StreamResponse = await serve(provider, request)
                return response
            finally:
                limiter.ended()

        stub._serve = limited  # type: ignore[method-assign]

    def refused_share(self) -> float:
        """Return the share of the requests that were refused."""
        return self.refused / (self.refused + self.accepted)


@pytest.mark.parametrize(
    ("limiter", "latency"),
    [(Bucket(120), 0.05), (Places(24), 0.2)],
    ids=["requests a second", "requests at once"],
)
def test_two_workers_learn_a_limit_that_nobody_told_them(lab: Any, stub: Any, limiter: Limiter, latency: float) -> None:
    storm = Storm(stub, limiter, latency)
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.instance("storm", cases=100, note_replications=20, generator="vendor", max_attempts=1)
    for _ in range(2):
        lab.workers(1, concurrency=100)
    run_id = lab.start("storm")
    lab.wait_for_end(run_id, seconds=120)
    lab.assert_complete(run_id)
    assert storm.refused_share() <= 0.06, "until the limit is known, too: of 200 at once nearly all would be"
    [(learned, refusals)] = lab.rows(
        "select requests_per_minute, (select count(*) from pgharness.calls where outcome = 'rate_limited')"
        " from pgharness.learned_limits"
    )
    assert learned is not None and refusals == storm.refused


def test_an_outage_gets_probes_alone_and_costs_no_note(lab: Any, stub: Any) -> None:
    stub.always = "server_error"
    lab.model("vendor", "openai_compatible", model="m", base_url=stub.base_url("openai_compatible"))
    lab.instance("outage", cases=200, generator="vendor", max_attempts=2)
    for _ in range(2):
        lab.workers(1, concurrency=10)
    run_id = lab.start("outage")
    state = "select state from pgharness.circuit_breakers"
    lab.wait(lambda: lab.value(state) in ("open", "half_open"), "an open circuit")
    before = len(stub.arrivals)
    lab.wait(lambda: lab.value("select trips from pgharness.model_limits") >= 4, "three probes in vain")
    assert len(stub.arrivals) - before <= 20 + 4, "the calls in flight, and the probes"
    stub.always = None
    lab.wait_for_end(run_id, seconds=60)
    lab.assert_complete(run_id)
    assert lab.value(state) == "closed"
    assert lab.value("select last_error from pgharness.circuit_breakers") is not None


@pytest.mark.parametrize(
    ("provider", "parameters"),
    [("ensemble", '{"members": ["dead", "a", "b"], "min_responses": 2}'), ("hedge", '{"members": ["dead", "b"]}')],
    ids=["ensemble", "hedge"],
)
def test_composites_do_without_a_member_that_is_out_of_service(lab: Any, provider: str, parameters: str) -> None:
    lab.model("dead", "openai_compatible", model="m", base_url="http://127.0.0.1:1/v1")
    for name in "ab":
        lab.simulator(name, latency_seconds=0.02)
    lab.model("composite", provider, parameters=parameters)
    lab.instance("outage", cases=300, generator="composite", max_attempts=1)
    lab.workers(1, concurrency=20)
    run_id = lab.start("outage")
    lab.wait_for_end(run_id, seconds=60)
    lab.assert_complete(run_id)
    asked = "select count(*) from pgharness.calls as c join pgharness.models as m on m.id = c.model_id where m.name = 'dead'"
    assert 10 <= lab.value(asked) <= 40, "until it counts as out of service, and probes"
