"""Money: budgets of runs, instances and projects, prices with dates, estimates with an interval, cost of what is correct."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from psycopg import Connection

from world import add_instance, call, grade, note, record, refused, register, rows, run_of, start, value

Database = Connection[Any]


def in_project(db: Database, *names: str, budget: float | None = None, **columns: Any) -> None:
    """Add instances of 4 notes without grades to a project."""
    db.execute("insert into pgharness.projects (name, budget_usd) values ('clinic', %s)", (budget,))
    for name in names:
        add_instance(db, name, cases=4, combinations=[("simulator", None)], project="clinic", **columns)


def spend(db: Database, worker: int, run: int, ordinal: int, usd: float) -> str:
    """Record a note that cost so much; return the state of the run."""
    record(db, worker, note(run, ordinal, calls=[call(usd)]))
    return str(run_of(db, run)["status"])


# -- budgets


def test_what_runs_spend_is_counted_on_their_instance_and_project_and_outlives_them(tx: Database) -> None:
    in_project(tx, "one", "two")
    worker, runs = register(tx), [start(tx, name) for name in ("one", "two")]
    for run, usd in zip(runs, (1.5, 2.25), strict=True):
        spend(tx, worker, run, 0, usd)
    same = note(runs[0], 1, calls=[call(0.25)])
    record(tx, worker, same)
    record(tx, worker, same)
    seen = {(row["scope"], row["subject"]): row["spent_usd"] for row in rows(tx, "select * from pgharness.budgets")}
    assert seen == {
        ("project", "clinic"): 4,
        ("instance", "one"): Decimal("1.75"),
        ("instance", "two"): Decimal("2.25"),
        ("run", "one/1"): Decimal("1.75"),
        ("run", "two/1"): Decimal("2.25"),
    }
    tx.execute("delete from pgharness.runs where id = %s", (runs[0],))
    assert value(tx, "select spent_usd from pgharness.budgets where scope = 'project'") == 4


@pytest.mark.parametrize("scope", ["instance", "project"])
def test_a_spent_budget_pauses_its_runs_and_one_command_continues_them(tx: Database, scope: str) -> None:
    in_project(tx, "one")
    subject = {"instance": "one", "project": "clinic"}[scope]
    set_budget = f"select * from pgharness.set_{scope}_budget(%s, %s)"
    assert rows(tx, set_budget, subject, 2) == []
    worker, run, other = register(tx), start(tx, "one"), start(tx, "one")
    assert spend(tx, worker, run, 0, 1.5) == "running"
    assert spend(tx, worker, run, 1, 0.75) == "paused"
    reason = run_of(tx, run)["reason"]
    assert reason.startswith(f'the budget of {scope} "{subject}", 2 USD, is spent (2.2500 USD); continue with: ')
    assert run_of(tx, other)["status"] == "running"
    tx.execute("select pgharness.sweep()")
    assert run_of(tx, other)["status"] == "paused", "it has no calls to learn of it by"
    with refused(
        tx, "PH006", f'{scope} "{subject}" has spent 2.2500 USD of its budget of 2 USD', f"set_{scope}_budget"
    ):
        tx.execute("select pgharness.resume_run(%s, budget_usd => 100)", (run,))
    with refused(tx, "PH006", f"set_{scope}_budget"):
        start(tx, "one")
    with refused(tx, "PH006", "its budget would be 1 USD", f"set_{scope}_budget('{subject}', 5.5"):
        rows(tx, set_budget, subject, 1)
    resumed = rows(tx, reason.partition("continue with: ")[2].replace("select ", "select * from ", 1))
    assert [(row["run_id"], row["status"]) for row in resumed] == [(run, "running"), (other, "running")]
    assert value(tx, f"select budget_usd from pgharness.budgets where scope = '{scope}'") == 4


def test_the_command_that_goes_on_knows_what_calls_in_flight_have_cost(tx: Database) -> None:
    in_project(tx, "one")
    worker, run = register(tx), start(tx, "one", budget_usd=Decimal("0.1"))
    assert spend(tx, worker, run, 0, 0.11) == "paused"
    assert run_of(tx, run)["reason"].endswith(f"select pgharness.resume_run({run}, budget_usd => 0.2);")
    assert spend(tx, worker, run, 1, 0.5) == "paused"
    command = run_of(tx, run)["reason"].partition("continue with: ")[2]
    assert command == f"select pgharness.resume_run({run}, budget_usd => 0.92);"
    tx.execute(command.encode())
    assert run_of(tx, run)["status"] == "running"


@pytest.mark.parametrize("usd", [0, -1, 1e9, "infinity", "nan"])
@pytest.mark.parametrize(("scope", "subject"), [("instance", "one"), ("project", "clinic")])
def test_a_budget_that_nobody_can_have_is_refused(tx: Database, scope: str, subject: str, usd: object) -> None:
    in_project(tx, "one")
    with refused(tx, "PH002", "budget"):
        rows(tx, f"select * from pgharness.set_{scope}_budget(%s, %s)", subject, usd)


def test_a_budget_is_raised_under_the_name_that_its_project_has_now(tx: Database) -> None:
    in_project(tx, "one", budget=1)
    worker, run = register(tx), start(tx, "one")
    assert spend(tx, worker, run, 0, 2) == "paused"
    tx.execute("update pgharness.projects set name = 'hospital'")
    resumed = rows(tx, "select * from pgharness.set_project_budget('hospital', 50)")
    assert [(row["run_id"], row["status"]) for row in resumed] == [(run, "running")]


def test_a_run_paused_by_hand_or_at_its_own_budget_is_not_resumed_by_a_larger_project(tx: Database) -> None:
    in_project(tx, "one", budget=1)
    worker, run, held = register(tx), start(tx, "one", budget_usd=Decimal("1.5")), start(tx, "one")
    tx.execute("select pgharness.pause_run(%s)", (held,))
    assert spend(tx, worker, run, 0, 2) == "paused"
    assert rows(tx, "select * from pgharness.set_project_budget('clinic', 50)") == []
    assert {run_of(tx, each)["status"] for each in (run, held)} == {"paused"}


def lease(db: Database, worker: int, run: int, in_use: int, wanted: int = 1_000) -> int | None:
    """Return how many calls a worker may begin."""
    found: int | None = value(
        db, "select may_begin from pgharness.lease_run(%s, %s, %s, %s)", worker, run, in_use, wanted
    )
    return found


def test_no_more_calls_begin_than_what_is_left_can_pay_for(tx: Database) -> None:
    in_project(tx, "one")
    tx.execute("update pgharness.instances set note_replications = 100")
    first, second = register(tx, pid=1), register(tx, pid=2)
    tx.execute("update pgharness.workers set concurrency = 30")
    run = start(tx, "one", budget_usd=Decimal(10))
    assert lease(tx, first, run, 0) == 30, "nothing is known of the costs: one call in each place"
    assert spend(tx, first, run, 0, 0.5) == "running"
    assert lease(tx, first, run, 20) == 0, "the other half is 19 less those that are begun"
    assert lease(tx, first, run, 4) == 15
    assert lease(tx, second, run, 0) == 0, "all others are the first worker's"
    assert lease(tx, first, run, 4, 0) == 8, "and now half of it, for the second one wants some"
    tx.execute("select pgharness.lose_worker('host', 1)")
    assert lease(tx, second, run, 0) == 19
    for ordinal in range(1, 19):
        assert spend(tx, second, run, ordinal, 0.5) == "running"
    assert lease(tx, second, run, 0) == 1
    assert spend(tx, second, run, 19, 0.25) == "running"
    assert lease(tx, second, run, 1) == 0
    assert lease(tx, second, run, 0) == 1, "the last one may cost more than is left"
    assert spend(tx, second, run, 20, 0.5) == "paused"
    assert lease(tx, second, run, 0) == 0
    assert value(tx, "select left_usd from pgharness.budgets where scope = 'run'") == Decimal("-0.25")


def test_what_the_cache_answers_makes_calls_no_cheaper(tx: Database) -> None:
    in_project(tx, "one")
    tx.execute("update pgharness.instances set note_replications = 100")
    worker = register(tx)
    run = start(tx, "one", budget_usd=Decimal(10))
    cached = [note(run, ordinal, calls=[call(0, outcome="cached")]) for ordinal in range(1, 50)]
    record(tx, worker, note(run, 0, calls=[call(1.0)]), *cached)
    assert lease(tx, worker, run, 0) == 9


def test_code_has_to_pay_too(tx: Database) -> None:
    """Its calls are of tasks, of which one makes many; what asks for it has no places of its own."""
    in_project(tx, "one")
    worker, asker = register(tx), register(tx, pid=2)
    tx.execute("update pgharness.workers set concurrency = 0 where id = %s", (asker,))
    run = start(tx, "one", budget_usd=Decimal(10))
    assert lease(tx, asker, run, 0, 1) == 10, "nothing is known of the costs yet"
    asked = [call(0.5, started_at=f"2026-01-01T00:00:0{number}Z") for number in range(4)]
    columns = "run_id, kind, ordinal, attempt, model_id, outcome, cost_usd, latency_ms, started_at, worker_id"
    for each in asked:
        tx.execute(
            f"insert into pgharness.calls ({columns}) values (%s, 'task', 0, 1, %s, 'succeeded', 0.5, 1, %s, %s)".encode(),
            (run, value(tx, "select id from pgharness.models where name = 'simulator'"), each["started_at"], worker),
        )
    tx.execute("update pgharness.runs set task_cost_usd = 2 where id = %s", (run,))
    assert lease(tx, asker, run, 0, 1) == 16


def test_a_worker_without_calls_keeps_none_from_the_others(tx: Database) -> None:
    """It asks no more: the last call that a budget can pay for must not be its own for ever."""
    in_project(tx, "one")
    first, second = register(tx, pid=1), register(tx, pid=2)
    run = start(tx, "one", budget_usd=Decimal(10))
    assert spend(tx, first, run, 0, 9.75) == "running"
    assert lease(tx, first, run, 0, 1) == 1
    assert lease(tx, second, run, 0, 1) == 0
    assert lease(tx, first, run, 0, 0) == 0
    assert lease(tx, second, run, 0, 1) == 1


def test_a_run_without_budgets_need_not_ask(tx: Database) -> None:
    in_project(tx, "one")
    run, worker = start(tx, "one"), register(tx)
    cap = "select max_concurrency from pgharness.heartbeat(%s, '{}', 'running', %s, '{}')"
    assert value(tx, cap, worker, [run]) is None
    assert value(tx, "select pgharness.load_run(%s) ->> 'max_concurrency'", run) is None
    assert lease(tx, worker, run, 3) is None
    tx.execute("update pgharness.projects set budget_usd = 5")
    assert value(tx, cap, worker, [run]) is not None
    assert value(tx, "select pgharness.load_run(%s) ->> 'max_concurrency'", run) is not None


# -- prices


def test_a_run_takes_the_prices_of_its_start_and_keeps_them(tx: Database) -> None:
    at = datetime(2026, 6, 1, tzinfo=UTC)
    add_instance(tx, cases=1)
    tx.execute("update pgharness.models set input_usd_per_million = 1, output_usd_per_million = 2")
    tx.execute(
        "insert into pgharness.model_prices (model, valid_from, valid_until, input_usd_per_million) values"
        " ('simulator', '2026-01-01', null, 10), ('simulator', '2026-05-01', '2026-07-01', 5), ('simulator', '2027-01-01', null, 20)"
    )
    seen = {}
    for now in ("2025-06-01", "2026-02-01", "2026-06-01", "2026-08-01", "2027-06-01"):
        tx.execute("select set_config('pgharness.fake_now', %s, true)", (now,))
        [price] = rows(tx, "select * from pgharness.present_prices where model = 'simulator'")
        frozen = value(tx, "select generator from pgharness.run_combinations where run_id = %s", start(tx))
        assert frozen["input_usd_per_million"] == price["input_usd_per_million"]
        assert (price["output_usd_per_million"], frozen["output_usd_per_million"]) == (2, 2)
        until = price["valid_until"]
        seen[now] = (int(price["input_usd_per_million"]), until and until.date().isoformat())
        if now == "2026-06-01":
            assert until > at
    assert seen == {
        "2025-06-01": (1, "2026-01-01"),
        "2026-02-01": (10, "2026-05-01"),
        "2026-06-01": (5, "2026-07-01"),
        "2026-08-01": (10, "2027-01-01"),
        "2027-06-01": (20, None),
    }
    again = value(tx, "select run_id from pgharness.rerun('trial/1')")
    frozen = value(tx, "select generator from pgharness.run_combinations where run_id = %s", again)
    assert frozen["input_usd_per_million"] == 20, "a rerun is paid for now"


def test_prices_name_a_model_and_end_after_they_begin(tx: Database) -> None:
    insert = "insert into pgharness.model_prices (model, valid_from, valid_until, input_usd_per_million) values (%s, '2026-02-01', %s, 1)"
    with refused(tx, "PH001", "nobody"):
        tx.execute(insert, ("nobody", None))
    with refused(tx, "PH002", "valid_until is 2026-01-01"):
        tx.execute(insert, ("simulator", "2026-01-01"))
    tx.execute(insert, ("simulator", None))
    with refused(tx, "23505", "model_prices_model_id_valid_from_key"):
        tx.execute(insert, ("simulator", None))


def test_a_rerun_pays_the_prices_of_its_own_start(tx: Database) -> None:
    tx.execute("update pgharness.models set input_usd_per_million = 1 where name = 'simulator'")
    members = json.dumps({"members": ["simulator"]})
    tx.execute("insert into pgharness.models (name, provider, parameters) values ('panel', 'ensemble', %s)", (members,))
    add_instance(tx, cases=1, combinations=[("simulator", None), ("panel", None)])
    first = start(tx)
    tx.execute(
        "insert into pgharness.model_prices (model, valid_from, input_usd_per_million)"
        " values ('simulator', pgharness.clock() - interval '1 minute', 100)"
    )
    tx.execute("update pgharness.models set parameters = parameters || '{\"quality\": 0.1}' where name = 'simulator'")
    second = value(tx, "select run_id from pgharness.rerun(%s)", first)
    frozen = (
        "select array_agg(coalesce(generator -> 'members' -> 0, generator) ->> %s order by number)"
        " from pgharness.run_combinations where run_id = %s"
    )
    for run, price in ((first, "1"), (second, "100")):
        assert [float(each) for each in value(tx, frozen, "input_usd_per_million", run)] == [float(price)] * 2
    assert value(
        tx, "select generator -> 'parameters' from pgharness.run_combinations where run_id = %s limit 1", second
    ) == value(
        tx, "select generator -> 'parameters' from pgharness.run_combinations where run_id = %s limit 1", first
    ), "all else is as it was"


def test_history_is_repriced_by_a_view_alone(tx: Database) -> None:
    add_instance(tx, cases=1, combinations=[("simulator", None)])
    model, worker, run = value(tx, "select id from pgharness.models where name = 'simulator'"), register(tx), start(tx)
    record(tx, worker, note(run, 0, calls=[call(0.5, model_id=model, input_tokens=1_000_000, output_tokens=0)]))
    tx.execute(
        "insert into pgharness.model_prices (model, valid_from, input_usd_per_million) values ('simulator', '2020-01-01', 3)"
    )
    [row] = rows(tx, "select cost_usd, present_cost_usd from pgharness.repriced_runs where run_id = %s", run)
    assert row == {"cost_usd": Decimal("0.5"), "present_cost_usd": 3}


@pytest.mark.parametrize("name", ["A_KEY", "A_TOKEN", "OPENAI_API_KEY,OPENAI_API_KEY_2", "A_KEY , B_TOKEN"])
def test_a_model_may_name_several_keys(tx: Database, name: str) -> None:
    tx.execute(
        "insert into pgharness.models (name, provider, model, api_key_env) values ('m', 'openai', 'm', %s)", (name,)
    )


@pytest.mark.parametrize("name", ["PATH", "A_KEY,PATH", "A_KEY,", ",A_KEY", "sk-abc", "A_KEY;B_KEY", "A_KEY_X"])
def test_nothing_else_is_the_name_of_a_key(tx: Database, name: str) -> None:
    with refused(tx, "PH002", "is not the name of an environment variable"):
        tx.execute(
            "insert into pgharness.models (name, provider, model, api_key_env) values ('m', 'openai', 'm', %s)", (name,)
        )


# -- estimates


def estimate(db: Database) -> tuple[float, float, float]:
    [row] = rows(
        db, "select low_cost_usd, cost_usd, high_cost_usd from pgharness.expected_workload where instance = 'trial'"
    )
    return float(row["low_cost_usd"]), float(row["cost_usd"]), float(row["high_cost_usd"])


def test_an_estimate_from_text_has_a_wide_interval_and_past_calls_narrow_it(tx: Database) -> None:
    """Past calls cost 1 and 3 USD in turn: a mean of 2, a deviation of 1, over 100 calls; the run has 100 notes."""
    add_instance(tx, cases=10, note_replications=10, combinations=[("simulator", None)])
    tx.execute("update pgharness.models set input_usd_per_million = 1 where name = 'simulator'")
    low, middle, high = estimate(tx)
    assert (low, high) == (pytest.approx(middle / 2, abs=1e-6), pytest.approx(middle * 1.5, abs=1e-6))
    model, worker, run = value(tx, "select id from pgharness.models where name = 'simulator'"), register(tx), start(tx)
    used = {"model_id": model, "output_tokens": 0}
    record(
        tx, worker, *(note(run, n, calls=[call(0, input_tokens=10**6 * (1 + 2 * (n % 2)), **used)]) for n in range(100))
    )
    low, middle, high = estimate(tx)
    spread = 1.645 * 1.005 * (100 + 100**2 / 100) ** 0.5
    assert (low, middle, high) == pytest.approx((200 - spread, 200, 200 + spread), rel=1e-3)


def test_members_without_a_price_are_named(tx: Database) -> None:
    tx.execute("insert into pgharness.models (name, provider, model) values ('priceless', 'openai', 'm')")
    for name, member in (("panel", "priceless"), ("panel of panels", "panel")):
        members = json.dumps({"members": [member, "simulator"]})
        tx.execute(
            "insert into pgharness.models (name, provider, parameters) values (%s, 'ensemble', %s)", (name, members)
        )
    add_instance(tx, cases=1, combinations=[("panel of panels", None)])
    assert value(tx, "select unpriced_models from pgharness.expected_workload") == ["priceless"]


def test_what_the_members_of_a_composite_cost_is_what_it_costs(tx: Database) -> None:
    tx.execute(
        "insert into pgharness.models (name, provider, input_usd_per_million) values ('a', 'simulator', 1), ('b', 'simulator', 2)"
    )
    parameters = json.dumps({"members": ["a", "b"]})
    tx.execute(
        "insert into pgharness.models (name, provider, parameters) values ('panel', 'ensemble', %s)", (parameters,)
    )
    add_instance(tx, cases=10, combinations=[("panel", None)])
    assert estimate(tx)[1] > 0, "by text length, the sum of its members"
    ids = {row["name"]: row["id"] for row in rows(tx, "select name, id from pgharness.models")}
    worker, run = register(tx), start(tx)
    for n in range(10):
        own = call(0, model_id=ids["panel"], input_tokens=0, output_tokens=0)
        members = [
            call(0, model_id=ids[name], input_tokens=10**6, output_tokens=0, parent_started_at=own["started_at"])
            for name in ("a", "b")
        ]
        record(tx, worker, note(run, n, calls=[own, *members]))
    [usage] = rows(tx, "select * from pgharness.model_usage where model = 'panel'")
    assert (usage["item_count"], usage["usd_per_item"], usage["usd_deviation"]) == (
        10,
        pytest.approx(3),
        pytest.approx(0),
    )
    assert estimate(tx) == pytest.approx((30, 30, 30))


def test_a_composite_that_code_asks_ten_times_for_an_item_costs_each_time_what_its_members_did(tx: Database) -> None:
    tx.execute(
        "insert into pgharness.models (name, provider, input_usd_per_million) values ('a', 'simulator', 1), ('b', 'simulator', 2)"
    )
    for name, members in (("quick", ["a"]), ("panel", ["quick", "b"])):
        tx.execute(
            "insert into pgharness.models (name, provider, parameters) values (%s, 'ensemble', %s)",
            (name, json.dumps({"members": members})),
        )
    add_instance(tx, cases=1, combinations=[("panel", None)])
    ids = {row["name"]: row["id"] for row in rows(tx, "select name, id from pgharness.models")}
    made = []
    for _ in range(10):
        own = call(0, model_id=ids["panel"], input_tokens=0, output_tokens=0)
        below = {"input_tokens": 0, "output_tokens": 0, "parent_started_at": own["started_at"]}
        quick = call(0, model_id=ids["quick"], **below)
        million = {"input_tokens": 10**6, "output_tokens": 0}
        made += [own, quick, call(0, model_id=ids["b"], parent_started_at=own["started_at"], **million)]
        made += [call(0, model_id=ids["a"], parent_started_at=quick["started_at"], **million)]
    record(tx, register(tx), note(start(tx), 0, calls=made))
    [usage] = rows(tx, "select * from pgharness.model_usage where model = 'panel'")
    assert (usage["item_count"], usage["usd_per_item"]) == (10, pytest.approx(3))


# -- cost of what is correct


def test_cost_per_correct_answer_and_per_point(tx: Database) -> None:
    """Two combinations over 4 cases: a cheap one that has 1 of 4 right, and a dear one that has 3."""
    tx.execute("insert into pgharness.models (name, provider) values ('simulator-2', 'simulator')")
    add_instance(
        tx, cases=4, combinations=[("simulator", "exact_match"), ("simulator-2", "exact_match")], rubrics_per_case=0
    )
    worker, run = register(tx), start(tx)
    for n in range(8):
        is_dear = n % 2
        record(tx, worker, note(run, n, calls=[call(0.1 + 0.3 * is_dear)]))
        is_right = n < 2 or (is_dear and n < 6)
        record(tx, worker, grade(run, n, verdicts=None, score=int(is_right), max_score=1, calls=[]))
    cheap, dear = rows(
        tx, "select * from pgharness.cost_per_correct where run_id = %s order by combination_number", run
    )
    assert [(row["note_count"], row["correct_count"], row["usd_per_correct"]) for row in (cheap, dear)] == [
        (4, 1, Decimal("0.4")),
        (4, 3, Decimal("0.53333333")),
    ]
    base, more = rows(tx, "select * from pgharness.cost_per_point where run_id = %s order by usd_per_note", run)
    assert (base["extra_points"], base["usd_per_point"]) == (0, None)
    assert (more["baseline"], more["extra_points"], more["extra_usd_per_note"]) == (
        base["combination"],
        50,
        Decimal("0.3"),
    )
    assert more["usd_per_point"] == Decimal("0.006")
    assert [row["correct_count"] for row in rows(tx, "select * from pgharness.costs_per_correct(%s, 1.1)", run)] == [
        0,
        0,
    ]
