"""What a run found and cost: each view, against numbers that are worked out here from what was recorded."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from psycopg import Connection
from scipy import stats

import world
from story import CASES, COMBINATIONS, GRADE_REPLICATIONS, NOTE_REPLICATIONS, OVERLAPS, Note, Story, told
from world import Row, record, rows, value

CLOSE = 6e-5  # views round to 4 places


@pytest.fixture(scope="module")
def whole_story(server_url: str, template: str) -> Iterator[Story]:
    with told(server_url, template) as story:
        yield story


@pytest.fixture
def story(whole_story: Story) -> Iterator[Story]:
    """The run, in a transaction that is rolled back."""
    with whole_story.db.transaction(force_rollback=True):
        yield whole_story


def pick(row: Row, names: str) -> tuple[Any, ...]:
    return tuple(row[name] for name in names.split())


def floats(row: Row, names: Sequence[str]) -> dict[str, float]:
    return {name: float(row[name]) for name in names}


PLACE = "case_name combination overlap replication"


# -- notes, grades, criteria


def test_note_results_has_every_note(story: Story) -> None:
    found = {row["note_ordinal"]: row for row in story.view("note_results")}
    written = [note for note in story.notes if note.state == "succeeded"]
    grade_counts = Counter(grade.note for grade in story.graded)
    assert found.keys() == {note.ordinal for note in written}
    for note in written:
        row, text = found[note.ordinal], f"note {note.ordinal}"
        assert pick(row, PLACE) == note.place
        assert pick(row, "note output attempts grade_count") == (text, text, len(note.calls), grade_counts[note])
        assert (row["score"] is None) == (note not in story.scores)
        if row["score"] is not None:
            assert float(row["score"]) == pytest.approx(story.scores[note], abs=CLOSE)
        assert row["cost_usd"] == sum(call.cost_usd for call in note.calls)
        assert row["input_tokens"] == sum(call.input_tokens for call in note.calls)
        assert row["latency_ms"] == note.calls[-1].latency_ms


def test_grade_results_has_every_grade(story: Story) -> None:
    found = {row["ordinal"]: row for row in story.view("grade_results")}
    assert found.keys() == {grade.ordinal for grade in story.graded}
    for grade in story.graded:
        row = found[grade.ordinal]
        assert pick(row, PLACE) == grade.place
        assert pick(row, "note_ordinal rubric_author grade_replication") == (
            grade.note.ordinal,
            grade.author,
            grade.replication,
        )
        assert pick(row, "score max_score") == (grade.score, grade.max_score)
        assert float(row["normalised_score"]) == pytest.approx(grade.share, abs=CLOSE)
        by_metric = grade.author is None
        assert row["cost_usd"] == (None if by_metric else sum(call.cost_usd for call in grade.calls))
        assert row["latency_ms"] == (None if by_metric else grade.calls[-1].latency_ms)


def test_criterion_results_has_every_criterion_of_every_grade(story: Story) -> None:
    found = defaultdict(list)
    for row in sorted(story.view("criterion_results"), key=lambda row: row["criterion_number"]):
        found[row["ordinal"]].append(pick(row, "criterion weight satisfaction score rationale rubric_author"))
    for grade in story.graded:
        by_metric: list[tuple[Any, ...]] = [("exact_match", 1, 100 * grade.score, grade.score, None, None)]
        by_rubric = [(*part, f"because {part[0]}", grade.author) for part in grade.parts]
        assert found.pop(grade.ordinal) == (by_rubric or by_metric)
    assert not found


def test_a_model_that_grades_against_the_target_has_one_criterion(tx: Connection[Any]) -> None:
    world.add_instance(tx, "by target", rubrics_per_case=0)
    run, worker = world.start(tx, "by target"), world.register(tx)
    record(tx, worker, world.note(run, 0))
    record(tx, worker, world.grade(run, 0, 40))
    [row] = rows(tx, "select * from pgharness.criterion_results where run_id = %s", run)
    assert pick(row, "weight satisfaction score criterion") == (100, 40, 40, "The output agrees with the target.")


# -- scores


def test_scores_by_case_combination_overlap_and_author(story: Story) -> None:
    cells: dict[tuple[Any, ...], dict[Note, list[float]]] = defaultdict(lambda: defaultdict(list))
    for grade in story.graded:
        cells[(*grade.place[:3], grade.author)][grade.note].append(grade.share)
    found = {pick(row, "case_name combination overlap rubric_author"): row for row in story.view("scores")}
    assert found.keys() == cells.keys()
    for key, notes in cells.items():
        row, scores = found[key], [statistics.fmean(shares) for shares in notes.values()]
        assert pick(row, "note_count grade_count") == (len(notes), sum(map(len, notes.values())))
        expected = {"mean_score": statistics.fmean(scores), "min_score": min(scores), "max_score": max(scores)}
        if len(scores) > 1:
            expected["replication_sd"] = statistics.stdev(scores)
        else:
            assert row["replication_sd"] is None
        assert floats(row, list(expected)) == pytest.approx(expected, abs=CLOSE)


def clustered_error(clusters: Sequence[Sequence[float]]) -> float:
    """Return the CR1 standard error of a mean: the sandwich of a regression on a constant."""
    y = np.concatenate(clusters)
    bread = np.linalg.inv(np.ones((1, len(y))) @ np.ones((len(y), 1)))
    meat = np.zeros((1, 1))
    for cluster in clusters:
        gradient = np.ones((1, len(cluster))) @ (np.array(cluster) - y.mean())
        meat += np.outer(gradient, gradient)
    return float(np.sqrt(len(clusters) / (len(clusters) - 1) * (bread @ meat @ bread)[0, 0]))


def test_combination_scores_have_errors_clustered_by_case(story: Story) -> None:
    found = {row["combination"]: row for row in story.view("combination_scores")}
    assert found.keys() == set(COMBINATIONS)
    for combination, name in enumerate(COMBINATIONS):
        clusters, cells = defaultdict(list), defaultdict(list)
        for note, score in story.scores.items():
            if note.combination == combination:
                clusters[note.case].append(score)
                cells[note.case, note.overlap].append(score)
        scores = np.concatenate(list(clusters.values()))
        error = clustered_error(list(clusters.values()))
        half = stats.t.ppf(0.975, len(clusters) - 1) * error
        squares = sum(np.var(cell) * len(cell) for cell in cells.values())
        expected = {
            "mean_score": scores.mean(),
            "standard_error": error,
            "confidence_low": scores.mean() - half,
            "confidence_high": scores.mean() + half,
            "replication_sd": math.sqrt(squares / sum(len(cell) - 1 for cell in cells.values())),
            "min_score": scores.min(),
            "max_score": scores.max(),
        }
        written = [note for note in story.notes if note.combination == combination and note.state == "succeeded"]
        grades = [grade for grade in story.graded if grade.note.combination == combination]
        row = found[name]
        assert floats(row, list(expected)) == pytest.approx(expected, abs=CLOSE)
        assert pick(row, "case_count note_count grade_count") == (len(clusters), len(written), len(grades))


def add_scored_run(db: Connection[Any], scores: Sequence[Sequence[float]]) -> int:
    """Add a run with one list of note scores a case, of which the rows alone are made; return its id."""
    replications = max(map(len, scores))
    world.add_instance(
        db, cases=len(scores), combinations=(("simulator", "exact_match"),), note_replications=replications
    )
    run = world.start(db)
    for case, notes in enumerate(scores):
        for replication, score in enumerate(notes):
            ordinal = replication * len(scores) + case
            db.execute(
                "insert into pgharness.notes"
                " (run_id, ordinal, case_number, combination_number, overlap, replication, attempts, output)"
                " values (%s, %s, %s, 0, 100, %s, 1, '\"\"')",
                (run, ordinal, case, replication + 1),
            )
            db.execute(
                "insert into pgharness.grades"
                " (run_id, note_ordinal, rubric_number, replication, ordinal, attempts, score, max_score)"
                " values (%s, %s, 0, 1, %s, 1, %s, 1)",
                (run, ordinal, ordinal, score),
            )
    return run


@pytest.mark.parametrize("cases", [2, 3, 7, 11, 12, 13, 30])
def test_confidence_intervals_use_students_t(tx: Connection[Any], cases: int) -> None:
    generator = np.random.default_rng(cases)
    scores = [generator.uniform(0, 1, size=generator.integers(1, 4)).round(4).tolist() for _ in range(cases)]
    [row] = rows(tx, "select * from pgharness.combination_scores where run_id = %s", add_scored_run(tx, scores))
    error = clustered_error(scores)
    assert float(row["standard_error"]) == pytest.approx(error, abs=CLOSE)
    width = float(row["confidence_high"] - row["confidence_low"])
    assert width == pytest.approx(2 * stats.t.ppf(0.975, cases - 1) * error, abs=2 * CLOSE)


def test_uncertainty_over_one_case_is_unknown(tx: Connection[Any]) -> None:
    [row] = rows(tx, "select * from pgharness.combination_scores where run_id = %s", add_scored_run(tx, [[0.5, 0.7]]))
    assert pick(row, "mean_score standard_error confidence_low confidence_high") == (Decimal("0.6"), None, None, None)
    assert float(row["replication_sd"]) == pytest.approx(statistics.stdev((0.5, 0.7)), abs=CLOSE)


def test_equal_scores_leave_no_uncertainty(tx: Connection[Any]) -> None:
    [row] = rows(tx, "select * from pgharness.combination_scores where run_id = %s", add_scored_run(tx, [[0.1]] * 3))
    assert pick(row, "standard_error confidence_low confidence_high") == (0, Decimal("0.1"), Decimal("0.1"))
    assert row["replication_sd"] is None


def test_a_combination_without_grades_has_no_score(tx: Connection[Any]) -> None:
    world.add_instance(tx, combinations=(("simulator", None),))
    run, worker = world.start(tx), world.register(tx)
    record(tx, worker, world.note(run, 0))
    [row] = rows(tx, "select * from pgharness.combination_scores where run_id = %s", run)
    assert pick(row, "case_count note_count grade_count mean_score standard_error") == (0, 1, 0, None, None)


# -- agreement


def test_author_agreement_compares_the_rubrics_of_two_authors(story: Story) -> None:
    shares: dict[tuple[Note, str], list[float]] = defaultdict(list)
    for grade in story.graded:
        if grade.author is not None:
            shares[grade.note, grade.author].append(grade.share)
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for note, (a, b) in itertools.product(story.notes, itertools.combinations(("ann", "bob", "carl"), 2)):
        if (note, a) in shares and (note, b) in shares:
            both = statistics.fmean(shares[note, a]), statistics.fmean(shares[note, b])
            pairs[note.place[1], a, b].append(both)
    found = {pick(row, "combination author_a author_b"): row for row in story.view("author_agreement")}
    assert found.keys() == pairs.keys() and len(found) == 6
    for key, scores in pairs.items():
        of_a, of_b = np.array(scores).T
        expected = {
            "mean_difference": np.mean(of_a - of_b),
            "mean_absolute_difference": np.mean(abs(of_a - of_b)),
            "correlation": stats.pearsonr(of_a, of_b).statistic,
        }
        assert found[key]["note_count"] == len(scores)
        assert floats(found[key], list(expected)) == pytest.approx(expected, abs=CLOSE)


def test_authors_whose_scores_never_vary_have_no_correlation(tx: Connection[Any]) -> None:
    world.add_instance(tx, cases=6)
    run, worker = world.start(tx), world.register(tx)
    record(tx, worker, *(world.note(run, note) for note in range(6)))
    grades = itertools.product(range(6), range(2))
    record(tx, worker, *(world.grade(run, note * 2 + rubric, 33, 10 * note * rubric) for note, rubric in grades))
    [row] = rows(tx, "select * from pgharness.author_agreement where run_id = %s", run)
    assert pick(row, "note_count correlation") == (6, None)


def test_an_author_with_two_rubrics_of_a_case_counts_once(tx: Connection[Any]) -> None:
    """Imported runs may have such authors: their score of a note is the mean of its grades by either rubric."""
    world.add_instance(tx, cases=3, rubrics_per_case=2)
    run, worker = world.start(tx), world.register(tx)
    tx.execute(
        "insert into pgharness.rubrics (case_name, author, validation, criteria)"
        " select case_name, author, 'accepted', criteria from pgharness.rubrics where author = 'ann'"
    )
    tx.execute(
        "insert into pgharness.run_rubrics (run_id, case_number, number, rubric_id)"
        " select rc.run_id, rc.number, 3, max(r.id) from pgharness.run_cases as rc"
        " join pgharness.rubrics as r on r.case_id = rc.case_id and r.author = 'ann' group by rc.run_id, rc.number"
    )
    tx.execute("set local session_replication_role = replica")  # or the definition is frozen
    tx.execute("update pgharness.run_combinations set rubric_count = 3 where run_id = %s", (run,))
    tx.execute("update pgharness.run_definitions set grade_stride = 3 where run_id = %s", (run,))
    tx.execute("update pgharness.runs set grade_count = 9 where id = %s", (run,))
    tx.execute("set local session_replication_role = origin")
    record(tx, worker, *(world.note(run, note) for note in range(3)))
    given = [(10, 40, 30), (60, 50, 90), (20, 20, 70)]  # by rubrics 1 to 3 of each case's note
    authors = value(
        tx,
        "select array_agg(r.author order by rr.number) from pgharness.run_rubrics as rr"
        " join pgharness.rubrics as r on r.id = rr.rubric_id where rr.run_id = %s and rr.case_number = 0",
        run,
    )
    grades = itertools.product(range(3), range(3))
    record(tx, worker, *(world.grade(run, n * 3 + k, given[n][k], given[n][k]) for n, k in grades))
    ann = [statistics.fmean(s for s, name in zip(note, authors, strict=True) if name == "ann") for note in given]
    bob = [statistics.fmean(s for s, name in zip(note, authors, strict=True) if name == "bob") for note in given]
    [row] = rows(tx, "select * from pgharness.author_agreement where run_id = %s", run)
    assert pick(row, "author_a author_b note_count") == ("ann", "bob", 3)
    expected = {
        "mean_difference": np.mean(np.subtract(ann, bob)) / 100,
        "mean_absolute_difference": np.mean(np.abs(np.subtract(ann, bob))) / 100,
        "correlation": stats.pearsonr(ann, bob).statistic,
    }
    assert floats(row, list(expected)) == pytest.approx(expected, abs=CLOSE)


def test_replication_agreement_compares_grades_of_one_note_and_rubric(story: Story) -> None:
    cells: dict[tuple[str, str], dict[Note, list[float]]] = defaultdict(lambda: defaultdict(list))
    for grade in story.graded:
        if grade.author is not None:
            cells[grade.place[1], grade.author][grade.note].append(grade.share)
    found = {pick(row, "combination rubric_author"): row for row in story.view("replication_agreement")}
    assert found.keys() == cells.keys()
    for key, notes in cells.items():
        several = [shares for shares in notes.values() if len(shares) > 1]
        squares = sum(np.var(shares) * len(shares) for shares in several)
        pairs = [pair for shares in several for pair in itertools.combinations(shares, 2)]
        expected = {
            "replication_sd": math.sqrt(squares / sum(len(shares) - 1 for shares in several)),
            "mean_absolute_difference": statistics.fmean(abs(a - b) for a, b in pairs),
        }
        assert pick(found[key], "note_count grade_count") == (len(several), sum(map(len, several)))
        assert floats(found[key], list(expected)) == pytest.approx(expected, abs=CLOSE)


def test_replications_are_compared_over_all_their_pairs(tx: Connection[Any]) -> None:
    satisfactions = (20, 90, 20, 65)
    world.add_instance(tx, cases=1, grade_replications=len(satisfactions))
    run, worker = world.start(tx), world.register(tx)
    record(tx, worker, world.note(run, 0))
    record(tx, worker, *(world.grade(run, place, given, given) for place, given in enumerate(satisfactions)))
    [row] = rows(tx, "select * from pgharness.replication_agreement where run_id = %s", run)
    differences = [abs(a - b) / 100 for a, b in itertools.combinations(satisfactions, 2)]
    assert float(row["mean_absolute_difference"]) == pytest.approx(statistics.fmean(differences), abs=CLOSE)


# -- models and costs


def test_model_performance_has_calls_latencies_tokens_and_cost(story: Story) -> None:
    found = {pick(row, "model kind"): row for row in story.view("model_performance")}
    assert found.keys() == {("a", "note"), ("b", "note"), ("judge", "grade")}
    for key, row in found.items():
        calls = [call for call in story.calls if (call.model, call.kind) == key]
        outcomes = Counter(call.outcome for call in calls)
        failed = len(calls) - outcomes["succeeded"] - outcomes["rate_limited"]
        counts = (len(calls), outcomes["succeeded"], outcomes["rate_limited"], failed)
        assert pick(row, "call_count calls_succeeded calls_rate_limited calls_failed") == counts
        latencies = [call.latency_ms for call in calls if call.outcome == "succeeded"]
        for percent in (50, 90, 95, 99):
            assert float(row[f"latency_p{percent}_ms"]) == pytest.approx(np.percentile(latencies, percent), abs=0.051)
        for name in ("input_tokens", "output_tokens", "cached_tokens", "cost_usd"):
            assert row[name] == sum(getattr(call, name) for call in calls)
        assert row["wasted_cost_usd"] == sum(call.cost_usd for call in calls if call.outcome != "succeeded")


def test_costs_by_run_and_by_model_add_up(story: Story) -> None:
    [run] = story.view("cost_by_run")
    total = sum(call.cost_usd for call in story.calls)
    notes = [note for note in story.notes if note.state == "succeeded"]
    assert pick(run, "call_count cost_usd note_cost_usd wasted_cost_usd input_tokens") == (
        len(story.calls),
        total,
        sum(call.cost_usd for call in story.calls if call.kind == "note"),
        sum(call.cost_usd for call in story.calls if call.outcome != "succeeded"),
        sum(call.input_tokens for call in story.calls),
    )
    assert float(run["usd_per_note"]) == pytest.approx(float(total) / len(notes), abs=1e-8)
    models = rows(story.db, "select * from pgharness.cost_by_model")
    assert len(models) == value(story.db, "select count(*) from pgharness.models")
    assert sum(row["cost_usd"] for row in models) == total
    counts = Counter(call.model for call in story.calls)
    assert {row["model"]: row["call_count"] for row in models if row["call_count"]} == counts
    assert {row["model"]: row["run_count"] for row in models if row["run_count"]} == dict.fromkeys(counts, 1)


# -- how it was made


def test_run_provenance_says_how_a_run_was_made(story: Story) -> None:
    environment = '{"git_commit": "abc", "git_is_dirty": true}'
    worker = value(
        story.db, "select pgharness.register_worker('host', 9, '9.9', '{note}', 1, environment => %s)", environment
    )
    world.load(story.db, worker, {"run_id": story.run, "kind": "note", "epoch": 0, "ordinals": [0]})
    rerun = value(story.db, "select run_id from pgharness.rerun(%s)", story.run)
    [row] = story.view("run_provenance")
    made = pick(row, "seed software_version experiment case_count note_replications grade_replications")
    assert made == (4, "abc123", "note_grade", CASES, NOTE_REPLICATIONS, GRADE_REPLICATIONS)
    assert row["transcript_overlaps"] == list(OVERLAPS)
    assert [pair["combination"] for pair in row["models"]] == list(COMBINATIONS)
    assert pick(row["models"][0]["generator"], "input_usd_per_million parameters") == (2, {})
    assert row["prompts"].keys() == {"note_system", "note", "grade_system", "grade"}
    assert row["started_by"] == value(story.db, "select session_user") and len(row["cases_digest"]) == 64
    assert pick(row, "worker_versions worker_git_commits") == (["0.1.0", "9.9"], ["abc (dirty)"])
    assert len(row["worker_environments"]) == 2
    [again] = rows(story.db, "select * from pgharness.run_provenance where run_id = %s", rerun)
    assert pick(again, "rerun_of definition worker_versions") == ("story/1", row["definition"], [])


def test_run_results_has_the_latest_value_of_a_key(story: Story) -> None:
    for key, given in (("verdict", "1"), ("other", "true"), ("verdict", "2")):
        story.db.execute("select pgharness.record_result(%s, %s, %s)", (story.run, key, given))
    assert {row["key"]: row["value"] for row in story.view("run_results")} == {"verdict": 2, "other": True}
