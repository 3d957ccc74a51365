"""Models in trouble, and models with limits: two workers on two "hosts" share what a model may be asked.

The workers live as long as the module; every test has an instance and a provider of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from world import cloned


@pytest.fixture(scope="module")
def shared(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory, lab_class: Any) -> Iterator[Any]:
    """A laboratory with two groups of workers, of 10 calls each, for all tests of this module."""
    with cloned(server_url, template) as url:
        lab = lab_class(url, Path(tmp_path_factory.mktemp("shared")))
        try:
            groups = [lab.workers(1, concurrency=10, waits=False) for _ in range(2)]
            for group in groups:
                lab.wait(lambda group=group: lab.at_work(group), "worker", group=group)
            yield lab
        finally:
            lab.close()


@pytest.fixture
def vendor(shared: Any, stub: Any, request: pytest.FixtureRequest) -> Any:
    """Define a model of the stub, named after the test; called with its columns, it returns the name."""

    def define(**columns: Any) -> str:
        base_url = stub.base_url("openai_compatible")
        name: str = shared.model(request.node.name, "openai_compatible", model="m", base_url=base_url, **columns)
        return name

    return define


def failures(lab: Any, run_id: int) -> list[tuple[Any, ...]]:
    query = "select kind, status, cause, attempts, delays from pgharness.failures where run_id = %s order by ordinal"
    found: list[tuple[Any, ...]] = lab.rows(query, run_id)
    return found


def outcomes(lab: Any, run_id: int) -> dict[str, int]:
    return dict(lab.rows("select outcome, count(*) from pgharness.calls where run_id = %s group by 1", run_id))


def test_a_rate_limit_spends_no_attempt_and_is_waited_for_by_every_worker(shared: Any, stub: Any, vendor: Any) -> None:
    stub.retry_after = "1.5"
    stub.play(*["rate_limited"] * 3)
    shared.instance("limited", cases=12, generator=vendor(max_concurrency=3), max_attempts=1)
    run_id = shared.start("limited")
    shared.wait_for_end(run_id)
    shared.assert_complete(run_id)
    assert outcomes(shared, run_id) == {"rate_limited": 3, "succeeded": 12}
    refused = [at for at, _ in stub.arrivals[:3]]
    # each of the three waits as long as it was told to, and meanwhile nobody else is sent there
    assert stub.arrivals[3][0] - refused[0] >= 1.5
    assert shared.value("select max(attempts) from pgharness.notes where run_id = %s", run_id) == 2
    gone = "select count(*) from pgharness.failures where run_id = %s"
    assert shared.value(gone, run_id) == 0


def test_an_outage_is_sat_out_without_spending_an_attempt(shared: Any, stub: Any, vendor: Any) -> None:
    stub.retry_after = "0.3"
    stub.play(*["dropped"] * 2, *["unavailable"] * 18)
    shared.instance("outage", cases=5, generator=vendor(), max_attempts=1)
    run_id = shared.start("outage")
    shared.wait(lambda: len(stub.requests) >= 10, "some rounds of calls in vain")
    assert {row[1:4] for row in failures(shared, run_id)} <= {("waiting", "unavailable", 0)}
    shared.wait_for_end(run_id)
    shared.assert_complete(run_id)
    assert outcomes(shared, run_id) == {"unavailable": 20, "succeeded": 5}


def test_a_grader_is_told_what_was_wrong_and_the_last_answer_is_kept(shared: Any, stub: Any, vendor: Any) -> None:
    """The first grader learns from it, the second one never does."""

    def answer(request: Any) -> str:
        messages = request.body["messages"]
        if len(messages) > 2 and "hopeless-1" not in json.dumps(messages):
            return json.dumps({"verdicts": [{"rationale": "fine", "satisfaction": 80}] * 2})
        return json.dumps({"verdicts": [{"rationale": "fine", "satisfaction": 180}] * 2})

    stub.answer = answer
    shared.model("note-writer", parameters={"latency_seconds": 0})
    grader = vendor()
    for name in ("learning", "hopeless"):
        columns = {"rubrics_per_case": 1, "max_attempts": 2, "failure_threshold": 1}
        prompt = "{{ case_name }}: {{ note }}"
        shared.instance(name, cases=1, generator="note-writer", grader=grader, grade_prompt=prompt, **columns)
    learning, hopeless = shared.start("learning"), shared.start("hopeless")
    shared.wait_for_end(learning)
    shared.assert_complete(learning)
    assert shared.value("select attempts from pgharness.grades where run_id = %s", learning) == 2
    asked = [r.body["messages"] for r in stub.requests if "learning-1" in json.dumps(r.body)]
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][:2] == asked[0]
    assert "180" in asked[1][2]["content"]
    assert "less than or equal to 100" in asked[1][3]["content"] and "verdict 1" in asked[1][3]["content"]

    shared.wait_for_end(hopeless)
    assert failures(shared, hopeless) == [("grade", "failed", "invalid_output", 2, 0)]
    kept = shared.rows("select answer, error from pgharness.failures where run_id = %s", hopeless)
    assert "180" in kept[0][0] and "satisfaction" in kept[0][1]
    assert outcomes(shared, hopeless) == {"succeeded": 1, "invalid_output": 2}


def test_a_budget_stops_a_run_with_at_most_the_calls_in_flight_beyond_it(shared: Any, stub: Any, vendor: Any) -> None:
    stub._latency = 0.2
    generator = vendor(input_usd_per_million=5_000, output_usd_per_million=20_000 - 5_000 / 3)
    shared.instance("costly", cases=200, generator=generator)
    run_id = shared.start("costly", budget_usd=50)
    shared.wait_for_end(run_id, "paused")
    shared.wait(lambda: stub.in_flight == 0, "the calls in flight to end")
    each = shared.value("select max(cost_usd) from pgharness.calls where run_id = %s", run_id)
    spent = "select note_cost_usd from pgharness.runs where id = %s"
    shared.wait(lambda: shared.value(spent, run_id) == each * len(stub.requests), "all calls on record")
    # 2 x 10 calls in flight, begun while the outcomes of as many were being written
    assert 50 <= shared.value(spent, run_id) <= 50 + each * 2 * 2 * 10
    assert "budget" in shared.value("select reason from pgharness.runs where id = %s", run_id)
    made = len(stub.requests)
    shared.wait_for_quiet_queue()
    assert len(stub.requests) == made
    shared.db.execute("select pgharness.cancel_run(%s)", (run_id,))


def test_a_run_fails_at_its_threshold_and_its_other_calls_are_aborted(shared: Any, stub: Any, vendor: Any) -> None:
    stub.play(*["refusal"] * 6, *["slow"] * 100)
    shared.instance("failing", cases=60, generator=vendor(), max_attempts=1, failure_threshold=0.09)
    run_id = shared.start("failing")
    shared.wait_for_end(run_id, "failed")
    shared.wait(lambda: stub.in_flight == 0, "the calls in flight to end", 3)
    shared.wait_for_quiet_queue()
    shared.assert_consistent()
    assert shared.value("select notes_failed from pgharness.runs where id = %s", run_id) == 6
    assert len(stub.requests) <= 6 + 2 * 10


def test_no_more_calls_at_once_than_a_model_allows_all_workers_together(shared: Any, stub: Any, vendor: Any) -> None:
    stub._latency = 0.05
    generator = vendor(max_concurrency=4)
    shared.instance("scarce", cases=60, generator=generator)
    for _ in range(3):  # each begins with idle workers
        run_id = shared.start("scarce")
        shared.wait_for_end(run_id)
        shared.assert_complete(run_id)
    assert 3 <= stub.most_in_flight <= 4
    workers = "select count(distinct worker_id) from pgharness.calls where model_id = pgharness._model_id(%s)"
    assert shared.value(workers, generator) == 2


def test_no_more_requests_a_minute_than_a_model_allows_all_workers_together(
    shared: Any, stub: Any, vendor: Any
) -> None:
    """600 a minute are 10 a second; the bucket holds what two seconds bring."""
    shared.instance("paced", cases=50, generator=vendor(requests_per_minute=600))
    started_at = time.monotonic()
    run_id = shared.start("paced")
    shared.wait_for_end(run_id)
    arrivals = [at for at, _ in stub.arrivals]
    assert len(arrivals) == 50
    assert arrivals[-1] - arrivals[0] > 2.5 and time.monotonic() - started_at < 10
    for first in range(len(arrivals)):
        for last in range(first, len(arrivals)):
            allowed = 20 + 10 * (arrivals[last] - arrivals[first]) * 1.1 + 3
            assert last - first + 1 <= allowed, f"{last - first + 1} within {arrivals[last] - arrivals[first]} s"
