"""What is settled of a run: stored sums that no view can be told from its grades by, whatever happens to these."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection

from pgharness import archiving
from world import (
    Row,
    add_cases,
    add_instance,
    call,
    clear,
    failure,
    grade,
    lost,
    note,
    orphans,
    record,
    register,
    rows,
    run_of,
    start,
    value,
)

Database = Connection[Any]
CASES, OVERLAPS, REPLICATIONS = 3, (50, 100), 6
CELLS = CASES * len(OVERLAPS) * 2
STRIDE = 4  # two rubrics, two grades by each; of the metric's combination one
SUMS = ("_score_sums", "_note_sums", "_pair_sums", "_spread_sums", "_case_scores")
VIEWS = (
    "scores",
    "combination_scores",
    "author_agreement",
    "replication_agreement",
    "combination_estimates",
    "paired_differences",
    "cost_per_correct",
    "cost_per_point",
)
STORED = ("settled_scores", "settled_note_scores", "settled_pairs", "settled_spreads")


@pytest.fixture
def db(shared_url: str) -> Iterator[Database]:
    with psycopg.connect(shared_url, autocommit=True) as connection:
        clear(connection)
        yield connection


class Work:
    """A run of two combinations, one graded by a metric, and a worker who makes its items in whatever order."""

    def __init__(self, db: Database, seed: int = 0) -> None:
        self.db, self.random = db, random.Random(seed)
        add_instance(
            db,
            cases=CASES,
            combinations=(("simulator", "simulator"), ("simulator", "exact_match")),
            note_replications=REPLICATIONS,
            grade_replications=2,
            cycle_transcript_overlaps=list(OVERLAPS),
            failure_threshold=1,
        )
        self.run, self.worker = start(db), register(db)
        self.notes = CELLS * REPLICATIONS
        self.pending = {("note", ordinal) for ordinal in range(self.notes)}
        self.failed: set[tuple[str, int]] = set()

    def do(self, count: int, *, failures: float = 0.0, disorder: int = 3 * CELLS) -> None:
        """Make the next items, about in the order of the plan; some fail for good, some of the others first wait."""
        order = sorted(sorted(self.pending), key=lambda item: self.place(item) + self.random.random() * disorder)
        outcomes = []
        for item in order[:count]:
            if self.random.random() < failures:
                if self.random.random() < 0.5:
                    outcomes.append(failure(self.run, *item, spends_attempt=False))
                    continue
                outcomes.append(lost(self.run, *item))
                self.failed.add(item)
            else:
                outcomes.append(self.made(*item))
            self.pending.remove(item)
        record(self.db, self.worker, *outcomes)

    def made(self, kind: str, ordinal: int) -> Row:
        if kind == "note":
            each = STRIDE if ordinal % 2 == 0 else 1
            self.pending |= {("grade", ordinal * STRIDE + k) for k in range(each)}
            return note(self.run, ordinal)
        if ordinal // STRIDE % 2:
            return grade(self.run, ordinal, score=self.random.randint(0, 1), max_score=1, verdicts=None, calls=[])
        return grade(self.run, ordinal, self.random.randint(0, 100), self.random.randint(0, 100))

    def place(self, item: tuple[str, int]) -> int:
        return item[1] if item[0] == "note" else item[1] // STRIDE

    def retry(self) -> None:
        self.db.execute("select pgharness.retry_failed(%s)", (self.run,))
        self.pending |= self.failed
        self.failed.clear()

    def settle(self, most: int = 1000) -> int:
        """Settle a step, however small it is; return how many notes it had."""
        query = "select pgharness.settle_scores(least_grades => 1, least_replications => 1, most_notes => %s)"
        return int(value(self.db, query, most))

    @property
    def settled(self) -> int:
        return int(run_of(self.db, self.run)["settled_notes"])

    def look(self, names: tuple[str, ...]) -> dict[tuple[str, ...], float | None]:
        """Return every number that some views or functions show, by where it stands."""
        found = {}
        for name in names:
            query = f"{name}(%s)" if name.startswith("_") else f"{name} where run_id = %s"
            for row in rows(self.db, f"select * from pgharness.{query}", self.run):
                texts = {key: each for key, each in row.items() if isinstance(each, str) or key in KEYS}
                for key in row.keys() - texts:
                    found[(name, str(sorted(texts.items())), key)] = None if row[key] is None else float(row[key])
        return found

    def compare(self) -> None:
        """Assert that all is as if nothing were settled, and that nothing is that may still come."""
        settled, looks = self.settled, [self.look(SUMS), self.look(VIEWS)]
        assert all(self.place(item) >= settled for item in self.pending)
        with self.db.transaction(force_rollback=True):
            self.db.execute("update pgharness.runs set settled_notes = 0")
            plain = [self.look(SUMS), self.look(VIEWS)]
        for seen, expected, error in zip(looks, plain, (1e-9, 1.01e-4), strict=True):  # views round to four places
            assert seen.keys() == expected.keys()
            assert seen == {key: pytest.approx(number, abs=error) for key, number in expected.items()}


KEYS = ("cell", "rubric_number", "rubric_a", "rubric_b", "combination_number", "case_number", "overlap")


@pytest.mark.parametrize("seed", range(6))
def test_no_view_tells_what_is_settled_from_what_is_not(db: Database, seed: int) -> None:
    work = Work(db, seed)
    steps = 0
    while work.pending:
        work.do(work.random.randint(1, 40), failures=0.1)
        if work.random.random() < 0.5:
            steps += work.settle(most=work.random.choice((1, 2 * CELLS, 1000))) > 0
            work.compare()
        if work.failed and work.random.random() < 0.05:
            work.retry()
            assert work.settled == 0
            work.compare()
    assert steps >= 1
    assert run_of(db, work.run)["status"] == "completed"
    while work.settle(most=2 * CELLS):
        work.compare()
    assert work.settled == work.notes
    assert orphans(db) == []


def test_what_failed_is_opened_again_and_counts_when_it_is_made(db: Database) -> None:
    work = Work(db)
    while work.pending:
        work.do(50, failures=0.2)
    assert work.failed and work.settle() == work.notes
    before = work.look(VIEWS)
    work.retry()
    assert work.settled == 0 and run_of(db, work.run)["reopenings"] == 1
    while work.pending:
        work.do(50)
    assert work.look(VIEWS) != before
    assert work.settle() == work.notes
    work.compare()


def test_a_retry_of_nothing_opens_nothing(db: Database) -> None:
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    assert work.settle() == work.notes
    work.retry()
    assert work.settled == work.notes


def test_a_step_has_to_be_worth_it(db: Database) -> None:
    work = Work(db)
    record(db, work.worker, *(work.made("note", o) for o in range(4 * CELLS)))
    *grades, last = sorted(item for item in work.pending if item[0] == "grade")
    record(db, work.worker, *(work.made(*item) for item in grades))
    four = "select pgharness.settle_scores(least_grades => 1)"  # replications, by default
    assert value(db, four) == 0
    record(db, work.worker, work.made(*last))
    assert value(db, "select pgharness.settle_scores()") == 0
    assert value(db, "select pgharness.settle_scores(least_grades => %s)", len(grades) + 2) == 0
    few = (4 * CELLS - 1) // 5  # a step would be more than five times as large
    assert value(db, "select pgharness.settle_scores(least_grades => 1, most_notes => %s)", few) == 0
    assert value(db, "select pgharness.settle_scores(least_grades => %s)", len(grades) + 1) == 4 * CELLS
    assert value(db, four) == 0
    assert work.settled == 4 * CELLS


def test_a_grade_below_what_is_settled_opens_all_again(db: Database) -> None:
    """None comes there in any way that is known; if one did, it would count."""
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    assert work.settle() == work.notes
    db.execute("delete from pgharness.grades where ordinal = 0")
    db.execute(
        "update pgharness.runs set grades_succeeded = grades_succeeded - 1, status = 'running', finished_at = null, activated_at = now()"
    )
    record(db, work.worker, grade(work.run, 0, 7, 7))
    assert work.settled == 0
    work.compare()
    assert work.settle() == work.notes
    work.compare()


def test_authors_agree_whichever_of_them_comes_first_in_a_case(db: Database) -> None:
    add_cases(db, 2, authors=("ann", "bob"))
    db.execute(
        "update pgharness.rubrics set validated_at = now() + case when (case_name, author) in"
        " (('case-1', 'ann'), ('case-2', 'bob')) then interval '1 hour' else '0' end"
    )
    add_instance(db, cases=0, note_replications=4, rubrics_per_case=2)
    db.execute("select pgharness.add_cases('trial', names => '{case-1,case-2}')")
    run, worker = start(db), register(db)
    record(db, worker, *(note(run, ordinal) for ordinal in range(8)))
    for ordinal in range(8):
        scores = {"ann": 10 + 5 * ordinal, "bob": 50 + 5 * ordinal + ordinal % 3}
        authors = rows(
            db,
            "select r.author from pgharness.run_rubrics as rr join pgharness.rubrics as r on r.id = rr.rubric_id"
            " where rr.case_number = %s order by rr.number",
            ordinal % 2,
        )
        record(db, worker, *(grade(run, 2 * ordinal + k, *[scores[a["author"]]] * 2) for k, a in enumerate(authors)))
    plain = """
        select corr(a.normalised_score, b.normalised_score), avg(a.normalised_score - b.normalised_score)
          from pgharness.grades as a join pgharness.rubrics as of_a on of_a.id = a.rubric_id and of_a.author = 'ann'
          join pgharness.grades as b on b.run_id = a.run_id and b.note_ordinal = a.note_ordinal
          join pgharness.rubrics as of_b on of_b.id = b.rubric_id and of_b.author = 'bob'"""
    correlation, difference = next(iter(db.execute(plain)))
    assert correlation > 0.99
    view = "select correlation, mean_difference from pgharness.author_agreement where author_a = 'ann'"
    for _ in range(2):
        assert tuple(map(float, next(iter(db.execute(view))))) == pytest.approx((correlation, difference), abs=1e-4)
        db.execute("select pgharness.settle_scores(least_grades => 1, least_replications => 1)")
    assert run_of(db, run)["settled_notes"] == 8


def test_a_mean_of_exactly_a_half_is_correct_in_any_order_of_addition(db: Database) -> None:
    add_instance(db, cases=1, rubrics_per_case=1, note_replications=6, grade_replications=3)
    run, worker = start(db), register(db)
    for ordinal, scores in enumerate(permutations((12, 97, 41))):
        record(db, worker, note(run, ordinal))
        for k, score in enumerate(scores):
            record(db, worker, grade(run, 3 * ordinal + k, score, score))
    counts = "select correct_count from pgharness.cost_per_correct"
    for _ in range(2):
        assert value(db, counts) == 6
        db.execute("select pgharness.settle_scores(least_grades => 1, least_replications => 1)")
    assert run_of(db, run)["settled_notes"] == 6
    assert value(db, "select correct_count from pgharness.costs_per_correct(%s, 0.5000000001)", run) == 6


def test_the_oldest_worker_alive_settles(db: Database) -> None:
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    younger = register(db, pid=2)
    query = "select pgharness.settle_scores(%s, least_grades => 1, least_replications => 1)"
    assert value(db, query, younger) == 0
    db.execute("update pgharness.workers set status = 'lost' where id = %s", (work.worker,))
    assert value(db, query, younger) == work.notes


def test_what_is_opened_again_while_it_is_summed_up_is_not_settled(db: Database, shared_url: str) -> None:
    work = Work(db)
    while work.pending:
        work.do(50, failures=0.2)
    settling = "select pgharness.settle_scores(least_grades => 1, least_replications => 1)"
    with (
        psycopg.connect(shared_url) as retrier,
        psycopg.connect(shared_url) as settler,
        ThreadPoolExecutor(1) as thread,
    ):
        retrier.execute("select pgharness.retry_failed(%s)", (work.run,))
        record(retrier, work.worker, *(work.made(*item) for item in sorted(work.failed)))
        waiting = thread.submit(value, settler, settling)  # it has read the run as it was, and sums it up
        while not value(db, "select cardinality(pg_blocking_pids(%s)) > 0", settler.info.backend_pid):
            assert not waiting.done()
        retrier.commit()
        assert waiting.result(10) == 0
        settler.commit()
    work.pending -= work.failed
    assert work.settled == 0
    work.compare()
    work.do(10_000)
    assert work.settle() == work.notes
    work.compare()


def test_a_run_that_is_being_settled_is_deleted_with_its_sums(db: Database, shared_url: str) -> None:
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    settling = "select pgharness.settle_scores(least_grades => 1, least_replications => 1)"
    with (
        psycopg.connect(shared_url) as settler,
        psycopg.connect(shared_url) as deleter,
        ThreadPoolExecutor(1) as thread,
    ):
        assert value(settler, settling) == work.notes
        assert value(db, settling) == 0  # one at a time
        waiting = thread.submit(deleter.execute, "delete from pgharness.runs")
        while not value(db, "select cardinality(pg_blocking_pids(%s)) > 0", deleter.info.backend_pid):
            assert not waiting.done()
        settler.commit()
        waiting.result(10)
        deleter.commit()
    assert [value(db, f"select count(*) from pgharness.{table}") for table in STORED] == [0, 0, 0, 0]


def test_an_archived_run_leaves_no_sums_and_is_settled_when_it_is_back(
    db: Database, shared_url: str, tmp_path: Path
) -> None:
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    assert work.settle() == work.notes
    db.execute("update pgharness.workers set status = 'stopped'")
    before = work.look(VIEWS)
    done = archiving.archive_run(db, shared_url, str(work.run), tmp_path)
    assert [value(db, f"select count(*) from pgharness.{table}") for table in STORED] == [0, 0, 0, 0]
    assert (work.settled, work.settle(), work.look(("scores",))) == (0, 0, {})
    archiving.restore_run(db, done.path)
    work.compare()
    assert work.settle() == work.notes
    assert work.look(VIEWS) == {key: pytest.approx(number, abs=1.01e-4) for key, number in before.items()}


def test_an_outcome_that_is_sent_again_after_its_run_was_archived_is_not_counted(
    db: Database, shared_url: str, tmp_path: Path
) -> None:
    work = Work(db)
    work.pending.remove(("note", 0))
    work.made("note", 0)
    again = note(work.run, 0, calls=[call(1)])
    record(db, work.worker, again)
    work.do(10_000)
    work.do(10_000)
    db.execute("update pgharness.workers set heartbeat_at = now() - interval '31 seconds'")
    counted = "select run_count, call_count, cost_usd from pgharness.cost_by_model where model = 'simulator'"
    before, cost = rows(db, counted), run_of(db, work.run)["note_cost_usd"]
    done = archiving.archive_run(db, shared_url, str(work.run), tmp_path)
    record(db, work.worker, again)
    assert (rows(db, counted), run_of(db, work.run)["note_cost_usd"]) == (before, cost)
    archiving.restore_run(db, done.path)
    assert (rows(db, counted), orphans(db)) == (before, [])


def test_a_settled_run_that_is_read_from_its_archive_shows_the_same(
    db: Database, shared_url: str, url: str, tmp_path: Path
) -> None:
    work = Work(db)
    work.do(10_000)
    work.do(10_000)
    assert work.settle() == work.notes
    db.execute("update pgharness.workers set status = 'stopped'")
    done = archiving.archive_run(db, shared_url, str(work.run), tmp_path, keep=True)
    before, work.db = work.look(VIEWS), psycopg.connect(url, autocommit=True)
    with work.db:
        archiving.adopt_runs(work.db, [done.path])
        assert work.look(VIEWS) == {key: pytest.approx(number, abs=1.01e-4) for key, number in before.items()}
