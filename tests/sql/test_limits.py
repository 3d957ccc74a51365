"""What a model may be asked at once and per minute, whoever asks: leases, buckets and waiting periods."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import Connection

from world import refused, register, rows, value

Database = Connection[Any]
EXAMPLES = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def set_clock(db: Database, seconds: float) -> None:
    """Make it so many seconds after noon for the harness."""
    db.execute("select set_config('pgharness.fake_now', %s, true)", ((NOON + timedelta(seconds=seconds)).isoformat(),))


def add_model(db: Database, **limits: int | None) -> int:
    names, marks = ", ".join(["name", "provider", *limits]), ", ".join(["%s"] * (len(limits) + 2))
    return int(
        value(
            db,
            f"insert into pgharness.models ({names}) values ({marks}) returning id",
            "limited",
            "simulator",
            *limits.values(),
        )
    )


def lease(db: Database, worker: int, model: int, in_use: int = 0, wanted: int = 0) -> int:
    return int(value(db, "select granted from pgharness.lease_model(%s, %s, %s, %s)", worker, model, in_use, wanted))


def ask(db: Database, model: int, requests: int, tokens: int = 0) -> Any:
    """Take requests; returns how many were granted and the seconds to wait."""
    row = db.execute(
        "select granted, wait_seconds from pgharness.take_requests(%s, %s, %s)", (model, requests, tokens)
    ).fetchone()
    assert row is not None
    return row


# -- leases


@EXAMPLES
@given(data=st.data())
def test_workers_together_never_hold_more_than_a_model_allows(tx: Database, data: st.DataObject) -> None:
    with tx.transaction(force_rollback=True):
        limit = data.draw(st.integers(1, 12), label="limit")
        model, workers = add_model(tx, max_concurrency=limit), [register(tx, pid=pid) for pid in range(3)]
        granted, in_use = dict.fromkeys(workers, 0), dict.fromkeys(workers, 0)
        for _ in range(data.draw(st.integers(1, 25), label="steps")):
            worker = data.draw(st.sampled_from(workers), label="worker")
            if data.draw(st.integers(0, 9), label="dies") == 0:
                tx.execute("update pgharness.workers set status = 'lost' where id = %s", (worker,))
                workers[workers.index(worker)] = register(tx, pid=100)
                granted, in_use = ({w: old.get(w, 0) for w in workers} for old in (granted, in_use))
                continue
            in_use[worker] = data.draw(st.integers(0, granted[worker]), label="in use")
            wanted = data.draw(st.integers(0, 15), label="wanted")
            granted[worker] = lease(tx, worker, model, in_use[worker], wanted)
            assert in_use[worker] <= granted[worker] <= in_use[worker] + wanted
            assert sum(granted.values()) <= limit


@EXAMPLES
@given(limit=st.integers(1, 20), in_use=st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_workers_that_ask_in_turn_come_to_equal_shares(tx: Database, limit: int, in_use: list[int]) -> None:
    with tx.transaction(force_rollback=True):
        model, workers = add_model(tx, max_concurrency=limit), [register(tx, pid=pid) for pid in range(3)]
        granted = [lease(tx, worker, model, 0, wanted) for worker, wanted in zip(workers, in_use, strict=True)]
        for _ in range(3):  # all want more than there is, and calls end between two askings
            granted = [lease(tx, worker, model, 0, 100) for worker in workers]
        assert sum(granted) <= limit
        assert min(granted) >= (limit // 3 if limit >= 3 else 0)
        assert sum(granted) >= min(limit, max(limit // 3 * 3, 1))


def test_a_lone_worker_gets_all_and_a_limit_that_is_lowered_or_raised_counts_at_once(tx: Database) -> None:
    model, worker = add_model(tx, max_concurrency=8), register(tx)
    assert lease(tx, worker, model, 0, 5) == 5
    assert lease(tx, worker, model, 0, 50) == 8
    tx.execute("update pgharness.models set max_concurrency = 3 where id = %s", (model,))
    assert lease(tx, worker, model, 8, 5) == 8, "calls in flight are not taken back"
    assert lease(tx, register(tx, pid=2), model, 0, 5) == 0
    assert lease(tx, worker, model, 2, 5) == 2, "an equal share for each of two"
    tx.execute("update pgharness.models set max_concurrency = null where id = %s", (model,))
    [answer] = rows(tx, "select * from pgharness.lease_model(%s, %s, 2, 500)", worker, model)
    assert (answer["granted"], answer["max_concurrency"], answer["rate"]) == (502, None, None)
    assert (answer["is_rate_limited"], answer["blocked_seconds"]) == (False, 0)


def test_what_dead_workers_held_is_free_again(tx: Database) -> None:
    model, dead, living = add_model(tx, max_concurrency=4), register(tx, pid=1), register(tx, pid=2)
    assert lease(tx, dead, model, 0, 4) == 4
    assert lease(tx, living, model, 0, 4) == 0
    tx.execute("select pgharness.lose_worker('host', 1)")
    assert lease(tx, living, model, 0, 4) == 4
    tx.execute("select pgharness.sweep()")
    assert value(tx, "select count(*) from pgharness.model_leases where worker_id = %s", dead) == 0
    tx.execute("select * from pgharness.heartbeat(%s, '{}', 'stopped', '{}', '{}')", (living,))
    assert lease(tx, register(tx, pid=3), model, 0, 4) == 4


def test_workers_that_ask_at_the_same_time_do_not_hold_more_together(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as db:
        model, workers = (
            add_model(db, max_concurrency=5, requests_per_minute=60),
            [register(db, pid=pid) for pid in range(4)],
        )
        barrier = threading.Barrier(4)
        since = time.monotonic()

        def run(worker: int) -> tuple[int, int]:
            with psycopg.connect(url, autocommit=True) as mine:
                barrier.wait(10)
                held = [lease(mine, worker, model, 0, 5) for _ in range(10)]
                return held[-1], sum(ask(mine, model, 1)[0] for _ in range(3))

        with ThreadPoolExecutor(4) as pool:
            held, taken = zip(*pool.map(run, workers), strict=True)
        assert sum(held) <= 5 and min(held) >= 0
        assert 2 <= sum(taken) <= 2 + time.monotonic() - since, "two seconds' worth, and what came since"


# -- buckets


def test_a_bucket_holds_two_seconds_and_fills_at_its_rate(tx: Database) -> None:
    model = add_model(tx, requests_per_minute=120)
    set_clock(tx, 0)
    assert ask(tx, model, 10) == (4, 0)
    assert ask(tx, model, 10) == (0, pytest.approx(0.5))
    set_clock(tx, 0.25)
    assert ask(tx, model, 10) == (0, pytest.approx(0.25))
    set_clock(tx, 0.5)
    assert ask(tx, model, 1) == (1, 0)
    set_clock(tx, 3600)
    assert ask(tx, model, 10) == (4, 0), "an idle hour is no burst"
    set_clock(tx, 3599)
    assert ask(tx, model, 10) == (0, pytest.approx(0.5)), "a clock that goes back takes nothing"


def test_a_slow_rate_still_lets_one_request_through(tx: Database) -> None:
    model = add_model(tx, requests_per_minute=1)
    for minute in range(3):
        set_clock(tx, 60 * minute)
        assert ask(tx, model, 3) == (1, 0)
        assert ask(tx, model, 3) == (0, pytest.approx(60))


def test_tokens_are_counted_as_estimated_and_settled_as_used(tx: Database) -> None:
    model = add_model(tx, tokens_per_minute=6_000)
    set_clock(tx, 0)
    assert ask(tx, model, 4, 400) == (2, 0), "200 tokens are two seconds' worth, 100 a request"
    assert ask(tx, model, 1, 50) == (0, pytest.approx(0.5))
    assert ask(tx, model, 0, -80) == (0, 0), "the two used 120"
    assert ask(tx, model, 1, 50) == (1, 0)
    assert ask(tx, model, 0, 100) == (0, 0), "and then 100 more"
    assert ask(tx, model, 1, 50) == (0, pytest.approx(1.2))
    set_clock(tx, 1.2)
    assert ask(tx, model, 1, 50) == (1, 0)
    set_clock(tx, 100)
    assert ask(tx, model, 0, -10_000) == (0, 0)
    assert ask(tx, model, 10, 1_000) == (2, 0), "what is given back makes no burst either"


def test_a_request_larger_than_the_bucket_waits_until_its_tokens_have_come(tx: Database) -> None:
    model = add_model(tx, tokens_per_minute=600)
    set_clock(tx, 0)
    assert ask(tx, model, 1, 20) == (1, 0)
    assert ask(tx, model, 1, 300) == (0, pytest.approx(30))
    set_clock(tx, 29)
    assert ask(tx, model, 1, 300)[0] == 0
    set_clock(tx, 30)
    assert ask(tx, model, 1, 300) == (1, 0)


def test_the_scarcer_of_requests_and_tokens_decides(tx: Database) -> None:
    model = add_model(tx, requests_per_minute=300, tokens_per_minute=3_000)
    set_clock(tx, 0)
    assert ask(tx, model, 10, 500) == (2, 0)
    set_clock(tx, 10)
    assert ask(tx, model, 50, 50) == (10, 0)
    assert ask(tx, model, 1, 1)[0] == 0


def test_a_limit_that_is_set_later_starts_full_whatever_was_used_before(tx: Database) -> None:
    model = add_model(tx, tokens_per_minute=60_000)
    set_clock(tx, 0)
    assert ask(tx, model, 500, 500) == (500, 0)
    tx.execute("update pgharness.models set requests_per_minute = 60 where id = %s", (model,))
    assert ask(tx, model, 5, 5) == (2, 0)
    tx.execute(
        "update pgharness.models set requests_per_minute = null, tokens_per_minute = null where id = %s", (model,)
    )
    assert ask(tx, model, 10_000, 10**9) == (10_000, 0)
    assert ask(tx, model, 10_000, 1) == (10_000, 0)
    tx.execute("update pgharness.models set tokens_per_minute = 60 where id = %s", (model,))
    assert ask(tx, model, 2, 2) == (2, 0)
    assert ask(tx, model, 1_000_000_000, 1)[0] == 0


@EXAMPLES
@given(data=st.data())
def test_no_more_is_granted_than_the_rate_brings(tx: Database, data: st.DataObject) -> None:
    with tx.transaction(force_rollback=True):
        requests_a_minute = data.draw(st.integers(1, 600), label="requests a minute")
        tokens_a_minute = data.draw(st.integers(60, 60_000), label="tokens a minute")
        model = add_model(tx, requests_per_minute=requests_a_minute, tokens_per_minute=tokens_a_minute)
        clock = requests = tokens = 0.0
        largest = 0.0
        for _ in range(data.draw(st.integers(1, 20), label="steps")):
            clock += data.draw(st.floats(0, 20), label="seconds")
            wanted, each = (
                data.draw(st.integers(1, 30), label="requests"),
                data.draw(st.integers(1, 500), label="tokens"),
            )
            set_clock(tx, clock)
            granted, wait = ask(tx, model, wanted, wanted * each)
            assert 0 <= granted <= wanted and (wait == 0) == (granted > 0)
            requests, tokens, largest = requests + granted, tokens + granted * each, max(largest, each)
            assert requests <= max(requests_a_minute / 30, 1) + clock * requests_a_minute / 60 + 0.001
            assert tokens <= max(tokens_a_minute / 30, largest) + clock * tokens_a_minute / 60 + 0.001
            if granted == 0:
                set_clock(tx, clock := clock + wait + 0.001)
                again, _ = ask(tx, model, 1, each)
                assert again == 1, "whoever waits as long as told gets one"
                requests, tokens = requests + 1, tokens + each


# -- waiting periods


def test_a_model_is_blocked_for_everybody_until_the_longest_wait_is_over(tx: Database) -> None:
    model, worker = add_model(tx, max_concurrency=3), register(tx)
    blocked = "select blocked_seconds from pgharness.lease_model(%s, %s, 0, 1)"
    set_clock(tx, 0)
    assert value(tx, blocked, worker, model) == 0
    for seconds in (10, 4, 0, -5):
        tx.execute("select pgharness.block_model(%s, %s)", (model, seconds))
        assert value(tx, blocked, worker, model) == pytest.approx(10)
    set_clock(tx, 7)
    assert value(tx, blocked, register(tx, pid=2), model) == pytest.approx(3)
    set_clock(tx, 10)
    assert value(tx, blocked, worker, model) == 0
    tx.execute("select pgharness.block_model(%s, 1e15)", (model,))
    assert value(tx, blocked, worker, model) == pytest.approx(86_400)


def test_limits_of_a_model_that_does_not_exist_are_refused(tx: Database) -> None:
    worker = register(tx)
    for call in (
        f"lease_model({worker}, 987654321, 0, 1)",
        "take_requests(987654321, 1, 1)",
        "block_model(987654321, 1)",
    ):
        with refused(tx, "23503", "987654321"):
            tx.execute(f"select * from pgharness.{call}".encode())
    with refused(tx, "23503", "987654321"):
        tx.execute("select * from pgharness.lease_model(987654321, %s, 0, 1)", (add_model(tx, max_concurrency=1),))


# -- learned limits


def tell(db: Database, worker: int, model: int, **told: object) -> Any:
    """Report what calls met; return the answer."""
    arguments = {"worker_id": worker, "model_id": model, "in_use": 10, "wanted": 100} | told
    named = ", ".join(f"{name} => %s" for name in arguments)
    return rows(db, f"select * from pgharness.lease_model({named})", *arguments.values())[0]


def test_a_refusal_lowers_the_rate_to_just_below_what_was_accepted_once_for_all_calls_before(tx: Database) -> None:
    model, first, second = add_model(tx), register(tx, pid=1), register(tx, pid=2)
    set_clock(tx, 0)
    assert tell(tx, first, model, accepted=60)["rate"] is None
    assert tell(tx, second, model, accepted=40, refused=5, refused_ago=0.1)["rate"] == pytest.approx(47.5)
    assert tell(tx, first, model, accepted=20, refused=5, refused_ago=0.2)["rate"] == pytest.approx(47.5), "known"
    set_clock(tx, 0.5)
    assert tell(tx, first, model, accepted=50, refused=5, refused_ago=0.1)["rate"] == pytest.approx(0.95 * 90 / 2)


def test_a_few_refusals_lower_nothing(tx: Database) -> None:
    model, worker = add_model(tx), register(tx)
    set_clock(tx, 0)
    assert tell(tx, worker, model, accepted=1_000, refused=5)["rate"] is None
    assert tell(tx, worker, model, accepted=1_000, refused=6)["rate"] == pytest.approx(950)


def test_a_rate_grows_gently_while_it_is_used_up_and_faster_the_longer_nothing_is_refused(tx: Database) -> None:
    model, worker = add_model(tx), register(tx)
    rates = []
    for second in range(60):
        set_clock(tx, second)
        refused = 10 if second in (0, 2) else 0
        told = tell(tx, worker, model, accepted=100, refused=refused, refused_ago=0.1, is_short=second < 50)
        rates.append(told["rate"])
    assert rates[0] == pytest.approx(95)
    assert rates[1] == pytest.approx(95 * 1.1), "not confirmed yet: it may be far too low"
    assert rates[2] == pytest.approx(95)
    assert all(1.009 <= after / before <= 1.021 for before, after in itertools.pairwise(rates[2:12]))
    assert rates[49] / rates[48] == pytest.approx(1.08)
    assert rates[50:] == [rates[49]] * 10, "what is not used up is not too little"


@EXAMPLES
@given(demand=st.lists(st.tuples(st.floats(0, 200), st.integers(0, 50)), min_size=2, max_size=5))
def test_workers_share_a_rate_and_what_one_does_not_use_is_for_the_others(
    tx: Database, demand: list[tuple[float, int]]
) -> None:
    with tx.transaction(force_rollback=True):
        model, workers = add_model(tx), [register(tx, pid=pid) for pid in range(len(demand))]
        set_clock(tx, 0)
        tell(tx, workers[0], model, accepted=100, refused=10)
        shares = []
        for _ in range(2):
            shares = [
                tell(tx, worker, model, accepted=min(accepted, 95 / len(demand)), wanted=wanted)["rate"]
                for worker, (accepted, wanted) in zip(workers, demand, strict=True)
            ]
        assert all(share >= 95 / len(demand) - 1e-6 for share in shares)
        greedy = [share for share, (_, wanted) in zip(shares, demand, strict=True) if wanted]
        used = sum(min(accepted, 95 / len(demand)) for accepted, wanted in demand if not wanted)
        assert sum(greedy) + used <= 95 * len(demand) and all(share <= 95 + 1e-6 for share in shares)
        if len(greedy) == len(demand):
            assert sum(shares) == pytest.approx(95)


def test_a_learned_number_of_calls_in_flight_is_shared_like_a_configured_one_and_given_up(tx: Database) -> None:
    model, first, second = add_model(tx), register(tx, pid=1), register(tx, pid=2)
    set_clock(tx, 0)
    tell(tx, first, model, accepted=100, refused=10)
    tx.execute("update pgharness.model_limits set learned_concurrency = 20.9, trial_at = null")
    answers = [tell(tx, worker, model, in_use=15) for worker in (first, second)]
    assert [answer["max_concurrency"] for answer in answers] == [20, 20]
    assert [answer["target"] for answer in answers] == [20, 10], "those beyond it are not replaced"
    assert tell(tx, first, model, in_use=15)["target"] == 10


def test_workers_begin_where_the_model_was_known_to_hold(tx: Database) -> None:
    model, worker = add_model(tx), register(tx)
    for peak, known in ((100, 100), (110, 100), (200, 200), (20, 200)):
        assert tell(tx, worker, model, peak=peak)["proven_concurrency"] == known


def test_everything_refused_is_a_wait_for_all_unless_others_are_answered(tx: Database) -> None:
    model, first, second = add_model(tx), register(tx, pid=1), register(tx, pid=2)
    set_clock(tx, 0)
    tell(tx, second, model, accepted=50)
    assert tell(tx, first, model, wait=30)["blocked_seconds"] == 0
    tell(tx, second, model, accepted=0)
    assert tell(tx, first, model, wait=30)["blocked_seconds"] == pytest.approx(30)
    assert tell(tx, second, model)["blocked_seconds"] == pytest.approx(30)


# -- circuit breakers


def breaker(db: Database) -> tuple[str, int]:
    [row] = rows(db, "select state, failures from pgharness.circuit_breakers")
    return row["state"], row["failures"]


def test_ten_failures_in_a_row_open_the_circuit_and_a_probe_at_a_time_tries_to_close_it(tx: Database) -> None:
    model, first, second = add_model(tx), register(tx, pid=1), register(tx, pid=2)
    set_clock(tx, 0)
    tell(tx, first, model, failed=6, error="status 503")
    tell(tx, second, model, answered=1)
    assert breaker(tx) == ("closed", 0)
    tell(tx, first, model, failed=6, error="status 503")
    assert breaker(tx) == ("closed", 6)
    answer = tell(tx, second, model, failed=4, in_use=3, error="status 503")
    assert breaker(tx) == ("open", 10)
    assert (answer["target"], answer["blocked_seconds"]) == (3, pytest.approx(1))
    seconds = 0.0
    for wait in (1, 2, 4, 8, 16, 32, 60, 60):
        set_clock(tx, seconds := seconds + wait - 0.01)
        assert tell(tx, first, model, in_use=0)["target"] == 0
        set_clock(tx, seconds := seconds + 0.01)
        probe = tell(tx, first, model, in_use=0)
        assert (probe["target"], probe["blocked_seconds"]) == (1, 0)
        assert tell(tx, second, model, in_use=0)["target"] == 0
        assert breaker(tx)[0] == "half_open"
        tell(tx, second, model, in_use=0, answered=1)
        assert breaker(tx)[0] == "half_open", "an answer to a call from before says nothing"
        tell(tx, first, model, in_use=0, failed=1, error="status 503")
        assert breaker(tx)[0] == "open"
    set_clock(tx, seconds + 60)
    assert tell(tx, second, model, in_use=0)["target"] == 1
    assert tell(tx, second, model, in_use=0, answered=1)["max_concurrency"] is None
    assert breaker(tx) == ("closed", 0)
    assert value(tx, "select last_error from pgharness.circuit_breakers") == "status 503"


def test_a_probe_comes_when_the_provider_said_and_another_when_its_worker_died(tx: Database) -> None:
    model, first, second = add_model(tx), register(tx, pid=1), register(tx, pid=2)
    set_clock(tx, 0)
    assert tell(tx, first, model, failed=10, wait=20.0, error="503")["blocked_seconds"] == pytest.approx(20)
    set_clock(tx, 20)
    assert tell(tx, first, model, in_use=0)["target"] == 1
    assert tell(tx, second, model, in_use=0)["blocked_seconds"] == pytest.approx(125), "the model's timeout, and 5 s"
    set_clock(tx, 145)
    assert tell(tx, second, model, in_use=0)["target"] == 1
