"""Budgets under load: two hosts with hundreds of calls in flight stop in time, and one command goes on."""

from __future__ import annotations

from typing import Any

PRICE = {"input_usd_per_million": 1_000, "output_usd_per_million": 1_000}


def test_a_budget_holds_with_500_calls_in_flight_on_two_hosts(lab: Any) -> None:
    """What is spent beyond it is less than the calls cost that were in flight: the last calls are counted one by one."""
    generator = lab.simulator("priced", latency_seconds=0.4, latency_spread=0.3, **PRICE)
    lab.instance("costly", cases=100, note_replications=60, generator=generator)
    for _ in range(2):
        lab.workers(1, concurrency=250)
    first = lab.start("costly", budget_usd=100_000)
    done = "select notes_succeeded from pgharness.runs where id = %s"
    lab.wait(lambda: lab.value(done, first) >= 500, "some calls, to know what one costs")
    lab.db.execute("select pgharness.cancel_run(%s)", (first,))
    each = lab.value("select avg(cost_usd) from pgharness.calls where run_id = %s and outcome = 'succeeded'", first)

    run_id = lab.start("costly", budget_usd=float(each) * 3_500)
    in_flight = (
        "select coalesce(sum((in_flight -> %s ->> 'note')::integer), 0) from pgharness.workers where status = 'running'"
    )
    lab.wait(lambda: lab.value(in_flight, str(run_id)) >= 450, "500 calls in flight")
    lab.wait_for_end(run_id, "paused", 60)
    lab.wait(lambda: lab.value(in_flight, str(run_id)) == 0, "the calls in flight to end")
    lab.wait_for_quiet_queue()
    [(spent, budget, reason)] = lab.rows(
        "select pgharness._cost_usd(r), r.budget_usd, r.reason from pgharness.runs as r where id = %s", run_id
    )
    assert budget <= spent <= budget + each * 20, f"{(spent - budget) / each} calls beyond it"
    assert lab.value("select sum(cost_usd) from pgharness.calls where run_id = %s", run_id) == spent
    assert lab.value("select spent_usd from pgharness.instance_spending") == lab.value(
        "select sum(note_cost_usd) from pgharness.runs"
    )
    command = reason.partition("continue with: ")[2]
    assert command.startswith(f"select pgharness.resume_run({run_id}, budget_usd => ")
    lab.db.execute(command)
    lab.wait_for_end(run_id, seconds=60)
    lab.assert_complete(run_id)


def test_the_budget_of_a_project_stops_all_its_runs_and_one_command_goes_on(lab: Any) -> None:
    generator = lab.simulator("priced", latency_seconds=0.1, **PRICE)
    lab.db.execute("insert into pgharness.projects (name, budget_usd) values ('clinic', 60)")
    for name in ("one", "two"):
        lab.instance(name, cases=40, note_replications=25, generator=generator, project="clinic")
    lab.workers(2, concurrency=20)
    runs = [lab.start(name) for name in ("one", "two")]
    for run_id in runs:
        lab.wait_for_end(run_id, "paused")
    spent = "select spent_usd from pgharness.project_spending"
    [each] = lab.rows("select max(cost_usd) from pgharness.calls")[0]
    assert 60 <= lab.value(spent) <= 60 + each * 40
    assert lab.value(spent) == lab.value("select sum(note_cost_usd) from pgharness.runs")
    for (reason,) in lab.rows("select reason from pgharness.runs"):
        assert reason.startswith('the budget of project "clinic", 60 USD, is spent (6')
        assert "select pgharness.set_project_budget('clinic', 120);" in reason
    lab.db.execute("select pgharness.set_project_budget('clinic', 100000)")
    for run_id in runs:
        lab.wait_for_end(run_id)
        lab.assert_complete(run_id)
    held = "select count(*) from pgharness.run_leases where in_use + granted > 0"
    lab.wait(lambda: not lab.value(held), "workers without calls to keep none from each other")
