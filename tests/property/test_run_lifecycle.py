"""A run against a small model of what it should be: any actions in any order, and the two never disagree.

The model knows the rules of a run and nothing of how they are kept. After every action the database must say what the
model says, and have no orphan: no counter without rows, no row outside of the plan, no work that nobody will do.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.pq import TransactionStatus

from world import (
    Row,
    add_instance,
    call,
    failure,
    finish,
    grade,
    jobs,
    load,
    note,
    orphans,
    record,
    register,
    run_of,
    start,
    take,
    value,
    work_off,
)

NOTES, GRADES_EACH, ATTEMPTS = 3, 2, 2
GRADES = NOTES * GRADES_EACH
FINISHED = ("completed", "failed", "cancelled")
COSTS = st.sampled_from([Decimal("0"), Decimal("0.25"), Decimal("1")])


def _key(outcome: Row) -> tuple[str, int, str]:
    return outcome["kind"], outcome["ordinal"], outcome["result"]


class Model:
    """What a run is, by its rules."""

    def __init__(self, threshold: Decimal, budget: Decimal | None) -> None:
        self.status = "running"
        self.threshold, self.budget = threshold, budget
        self.cost = Decimal(0)
        self.done: set[tuple[str, int]] = set()
        self.failed: set[tuple[str, int]] = set()
        self.attempts: dict[tuple[str, int], int] = {}
        self.tries: dict[tuple[str, int], int] = {}
        self.calls: set[str] = set()

    def count(self, items: set[tuple[str, int]], kind: str) -> int:
        return sum(item[0] == kind for item in items)

    @property
    def skipped(self) -> int:
        return self.count(self.failed, "note") * GRADES_EACH

    def is_missing(self, kind: str, ordinal: int) -> bool:
        """Whether an item can be made now: not over, and a grade's note is there."""
        if (kind, ordinal) in self.done | self.failed:
            return False
        return 0 <= ordinal < NOTES if kind == "note" else ("note", ordinal // GRADES_EACH) in self.done

    def is_past(self, threshold: Decimal) -> bool:
        return len(self.failed) + self.skipped > threshold * (NOTES + GRADES)

    def settle(self) -> None:
        if self.is_past(self.threshold):
            self.status = "failed"
        elif len(self.done) + len(self.failed) + self.skipped == NOTES + GRADES:
            self.status = "completed"
        elif self.status == "running" and self.budget is not None and self.cost >= self.budget:
            self.status = "paused"

    def record(self, outcomes: list[Row]) -> None:
        for made in (made for outcome in outcomes for made in outcome["calls"]):
            if made["started_at"] not in self.calls:  # else it was sent before
                self.calls.add(made["started_at"])
                self.cost += Decimal(made["cost_usd"])
        if self.status in FINISHED:
            return
        # successes count first, notes before grades: that is what recording in one statement means
        for outcome in sorted(outcomes, key=lambda o: (o["result"] != "succeeded", o["kind"] != "note")):
            item = outcome["kind"], outcome["ordinal"]
            if not self.is_missing(*item):
                continue
            if outcome["result"] == "succeeded":
                self.done.add(item)
                self.attempts.pop(item, None)
                self.tries.pop(item, None)
                continue
            if self.tries.get(item, 0) >= outcome["attempt"]:
                continue
            self.tries[item] = max(self.tries.get(item, 0) + 1, outcome["attempt"])
            self.attempts[item] = self.attempts.get(item, 0) + outcome["spends_attempt"]
            if self.attempts[item] >= ATTEMPTS or not outcome["is_retryable"]:
                self.failed.add(item)
        self.settle()

    def act(self, action: str, budget: Decimal | None = None, threshold: Decimal | None = None) -> str | None:
        """Do what a control function does; returns the SQLSTATE with which it refuses."""
        match action:
            case "pause_run" | "cancel_run":
                wanted = {"pause_run": "paused", "cancel_run": "cancelled"}[action]
                if self.status == wanted:
                    return None
                if self.status != "running" and (self.status, action) != ("paused", "cancel_run"):
                    return "PH003"
                self.status = wanted
            case "resume_run":
                budget = self.budget if budget is None else budget
                threshold = self.threshold if threshold is None else threshold
                if self.status == "completed" or (self.status == "failed" and self.is_past(threshold)):
                    return "PH003"
                if budget is not None and budget <= self.cost:
                    return "PH006"
                self.budget, self.threshold = budget, threshold
                if self.status != "running":
                    self.status = "running"
                    self.settle()
            case "requeue_run":
                if self.status != "running":
                    return "PH003"
                self.settle()
            case "retry_failed":
                if self.status == "cancelled":
                    return "PH003"
                if self.failed:
                    self.attempts = {item: spent for item, spent in self.attempts.items() if item not in self.failed}
                    self.failed.clear()
                    if self.status in FINISHED:
                        self.status = "running"
                        self.settle()
        return None


class RunLifecycle(RuleBasedStateMachine):
    """One run, its controllers and its workers."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        super().__init__()
        self.db = db

    @initialize(
        threshold=st.sampled_from([Decimal(0), Decimal("0.25"), Decimal("0.5"), Decimal(1)]),
        budget=st.sampled_from([None, None, Decimal("0.5"), Decimal(3)]),
    )
    def begin(self, threshold: Decimal, budget: Decimal | None) -> None:
        add_instance(
            self.db,
            cases=NOTES,
            rubrics_per_case=1,
            grade_replications=GRADES_EACH,
            max_attempts=ATTEMPTS,
            retry_delay_seconds=0,
            failure_threshold=threshold,
        )
        self.run = start(self.db, budget_usd=budget) if budget else start(self.db)
        self.worker = register(self.db)
        self.model = Model(threshold, budget)
        self.sent: list[Row] = []

    # -- people

    @rule(
        action=st.sampled_from(["pause_run", "cancel_run", "resume_run", "resume_run", "retry_failed", "requeue_run"])
    )
    def control(self, action: str) -> None:
        self._act(action)

    @rule(
        budget=st.sampled_from([None, Decimal("0.25"), Decimal(2), Decimal(50)]),
        threshold=st.sampled_from([None, Decimal(0), Decimal("0.4"), Decimal(1)]),
    )
    def resume_with_other_limits(self, budget: Decimal | None, threshold: Decimal | None) -> None:
        self._act("resume_run", budget, threshold)

    def _act(self, action: str, budget: Decimal | None = None, threshold: Decimal | None = None) -> None:
        expected, refusal = self.model.act(action, budget, threshold), None
        given = {"budget_usd": budget, "failure_threshold": threshold}
        given = {name: limit for name, limit in given.items() if limit is not None}
        try:
            with self.db.transaction():
                named = "".join(f", {name} => %s" for name in given)
                value(self.db, f"select pgharness.{action}(%s{named})", self.run, *given.values())
        except psycopg.ProgrammingError as error:
            refusal = error.sqlstate
        assert refusal == expected

    # -- workers

    @rule(
        items=st.lists(
            st.tuples(
                st.sampled_from(["note", "grade"]),
                st.integers(-1, GRADES),
                st.sampled_from(["good", "bad", "lost", "limited"]),
                COSTS,
            ),
            min_size=1,
            max_size=4,
            unique_by=lambda item: item[:2],
        )
    )
    def record_anything(self, items: list[tuple[str, int, str, Decimal]]) -> None:
        """Outcomes that nobody asked for: twice, late, out of range, of notes that are not there."""
        self._record([self._outcome(*item) for item in items])

    @precondition(lambda self: bool(self.sent))
    @rule(data=st.data())
    def send_again(self, data: st.DataObject) -> None:
        """What a worker does that never heard whether its outcomes were committed."""
        self._record(
            data.draw(st.lists(st.sampled_from(self.sent), min_size=1, max_size=3, unique_by=_key), label="again")
        )

    @precondition(lambda self: bool(jobs(self.db)))
    @rule(
        ends=st.sampled_from(["finished", "finished", "dies", "handed back"]),
        luck=st.lists(
            st.tuples(st.sampled_from(["good", "good", "good", "bad", "lost", "limited", "cut off"]), COSTS),
            min_size=6,
            max_size=6,
        ),
    )
    def work_on_a_slice(self, ends: str, luck: list[tuple[str, Decimal]]) -> None:
        self._let_time_pass()
        job = take(self.db, self.worker)
        assert job is not None, "a job that is due could not be taken"
        items = load(self.db, self.worker, job["args"])
        assert all(self.model.is_missing(job["args"]["kind"], item["ordinal"]) for item in items)
        tried = [
            self._outcome(job["args"]["kind"], item["ordinal"], result, cost)
            for item, (result, cost) in zip(items, luck, strict=False)
            if result != "cut off"
        ]
        if tried:
            self._record(tried)
        if ends == "dies" or (len(tried) < len(items) and ends == "finished"):
            self.db.execute("select pgharness.lose_worker('host', 1); select pgharness.sweep()")
            self.worker = register(self.db)
        elif ends == "handed back" and value(
            self.db, "select count(*) from procrastinate.procrastinate_jobs where id = %s", job["id"]
        ):
            # a worker gives an unfinished slice back only to a run that still goes on
            if self.model.status == "running" and run_of(self.db, self.run)["epoch"] == job["args"]["epoch"]:
                self.db.execute(
                    "select procrastinate.procrastinate_retry_job_v2(%s, now(), null, null, null)", (job["id"],)
                )
            else:
                finish(self.db, job)
        else:
            finish(self.db, job)

    @rule()
    def sweep(self) -> None:
        self.db.execute("select pgharness.sweep()")

    @rule()
    def lose_the_queue_and_find_it_again(self) -> None:
        self.db.execute("delete from procrastinate.procrastinate_jobs")
        if self.model.status == "running":
            self._act("requeue_run")

    def _let_time_pass(self) -> None:
        """Make scheduled jobs due: for the queue it is as late as the transaction is old."""
        self.db.execute("update procrastinate.procrastinate_jobs set scheduled_at = null")

    def _outcome(self, kind: str, ordinal: int, result: str, cost: Decimal) -> Row:
        calls = [call(float(cost))]
        if result == "good":
            return note(self.run, ordinal, calls=calls) if kind == "note" else grade(self.run, ordinal, calls=calls)
        limits = (
            {"spends_attempt": False, "retry_after": 0} if result == "limited" else {"is_retryable": result == "bad"}
        )
        return failure(self.run, kind, ordinal, calls=calls, **limits)

    def _record(self, outcomes: list[Row]) -> None:
        self.sent += [outcome for outcome in outcomes if outcome not in self.sent]
        self.model.record(outcomes)
        learned = record(self.db, self.worker, *outcomes)
        assert [row["status"] for row in learned] == [self.model.status]

    # -- always

    @invariant()
    def the_database_says_what_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        row, model = run_of(self.db, self.run), self.model
        assert row["status"] == model.status
        for kind in ("note", "grade"):
            assert row[f"{kind}s_succeeded"] == model.count(model.done, kind)
            assert row[f"{kind}s_failed"] == model.count(model.failed, kind)
        assert row["grades_skipped"] == model.skipped
        assert row["note_cost_usd"] + row["grade_cost_usd"] == model.cost
        assert (row["finished_at"] is not None) == (model.status in FINISHED)
        assert (row["reason"] is not None) == (model.status in ("paused", "failed", "cancelled"))
        assert orphans(self.db) == []

    def teardown(self) -> None:
        """From wherever it is, the run can be brought to its end."""
        try:
            if hasattr(self, "model") and self.db.info.transaction_status == TransactionStatus.INTRANS:
                self._bring_to_its_end()
        finally:
            self.db.rollback()

    def _bring_to_its_end(self) -> None:
        if self.model.status in ("paused", "cancelled"):
            self._act("resume_run", Decimal(10_000))
        self.db.execute("update pgharness.runs set budget_usd = null")
        self.model.budget = None
        self._act("retry_failed")
        self._let_time_pass()
        work_off(self.db, self.worker)
        assert run_of(self.db, self.run)["status"] == "completed"
        assert orphans(self.db) == []


def test_a_run_does_what_its_model_does(url: str) -> None:
    with psycopg.connect(url) as db:
        run_state_machine_as_test(
            lambda: RunLifecycle(db),  # type: ignore[arg-type]  # any factory will do
            settings=settings(
                max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
