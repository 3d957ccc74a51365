"""kill -9 of a worker at every step of a batch: each note is there once, and the vendor billed it once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from stub_batches import STEPS, BatchVendor, serving

CASES = 12
KILLED_AT = {"openai": set(STEPS) - {"cancel"}}
KILLED_AT["anthropic"] = KILLED_AT["openai"] - {"upload:before", "upload:after"}  # requests come with the batch itself
KEYS = {"OPENAI_API_KEY": "sk-crash-0123456789", "ANTHROPIC_API_KEY": "sk-crash-0123456789"}


@pytest.fixture
def vendor() -> Iterator[BatchVendor]:
    with serving() as served:
        yield served
        assert served.problems == []


def begin(lab: Any, vendor: BatchVendor, provider: str) -> int:
    """Start a run whose notes are asked in batches, with a metric that grades them."""
    lab.model("vendor", provider, model="m", base_url=vendor.base_url(provider), output_usd_per_million=40)
    lab.instance(cases=CASES, generator="vendor", grader="exact_match", batch_deadline_seconds=86_400)
    run_id: int = lab.start()
    return run_id


def hurry(lab: Any) -> bool:
    """Make what is due later due now, but nothing that a vendor is given time to list."""
    lab.db.execute(
        "update pgharness.batches set due_at = now()"
        " where finished_at is null and due_at > now() and status in ('planned', 'submitted')"
    )
    return False


def finish(lab: Any, vendor: BatchVendor, run_id: int) -> None:
    """Wait for the end of a run, and check that nothing was lost, repeated or paid for twice."""
    query = "select status from pgharness.runs where id = %s"
    lab.wait(lambda: hurry(lab) or lab.value(query, run_id) != "running", "end of the run", 120)
    lab.assert_complete(run_id)
    assert lab.value("select count(distinct output) from pgharness.notes") == CASES
    assert sorted(vendor.billed.values()) == [1] * CASES
    assert not vendor.live
    answered = "select count(*) from pgharness.calls where outcome = 'succeeded' and batch_id is not null"
    assert lab.value(answered) == CASES
    assert lab.value("select count(*) from pgharness.batch_items") == 0


@pytest.mark.crash
@pytest.mark.parametrize(
    ("provider", "step"),
    [(provider, step) for provider in ("openai", "anthropic") for step in STEPS if step in KILLED_AT[provider]],
)
def test_a_worker_killed_at_any_step_leaves_a_batch_that_another_ends(
    lab: Any, vendor: BatchVendor, provider: str, step: str
) -> None:
    run_id = begin(lab, vendor, provider)
    vendor.holds.add(step)
    group = lab.workers(1, waits=False, **KEYS)
    lab.wait(lambda: hurry(lab) or vendor.reached.is_set(), f"a request at {step}", 90, group=group)
    group.kill()
    lab.workers(1, waits=False, **KEYS)
    finish(lab, vendor, run_id)
    assert len(vendor.batches) == 1


@pytest.mark.crash
def test_a_worker_killed_while_it_cancels_at_the_deadline_leaves_the_rest_to_live_calls(
    lab: Any, vendor: BatchVendor
) -> None:
    vendor.polls_to_end, vendor.done_before_cancel = 1_000_000, CASES // 2
    run_id = begin(lab, vendor, "openai")
    vendor.holds.add("cancel")
    group = lab.workers(1, waits=False, **KEYS)
    lab.wait(lambda: hurry(lab) or "poll" in vendor.log, "a batch under way", 90, group=group)
    # the deadline is over, for the batch as for what would be gathered after it
    lab.db.execute("update pgharness.runs set batch_deadline_seconds = 1")
    lab.db.execute("update pgharness.batches set deadline_at = now(), due_at = now()")
    lab.wait(vendor.reached.is_set, "a request to cancel", 90, group=group)
    group.kill()
    lab.workers(1, waits=False, **KEYS)
    query = "select status from pgharness.runs where id = %s"
    lab.wait(lambda: hurry(lab) or lab.value(query, run_id) != "running", "end of the run", 120)
    lab.assert_complete(run_id)
    assert len(vendor.billed) == CASES // 2
    assert sorted((vendor.billed + vendor.live).values()) == [1] * CASES


@pytest.mark.crash
def test_workers_killed_again_and_again_while_they_collect(lab: Any, vendor: BatchVendor) -> None:
    run_id = begin(lab, vendor, "openai")
    for number in range(3):
        vendor.holds.add("results")
        vendor.reached.clear()
        group = lab.workers(1, waits=False, **KEYS)
        lab.wait(lambda: hurry(lab) or vendor.reached.is_set(), f"collection {number}", 90, group=group)
        group.kill()
    lab.workers(2, waits=False, **KEYS)
    finish(lab, vendor, run_id)
