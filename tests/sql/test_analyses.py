"""Analyses in the database: what they read, who asks for them, what is kept, what is told without a worker."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pandas as pd
import psycopg
import pytest
import statsmodels.formula.api as smf
from scipy import stats as scipy_stats

from pgharness.analysis import KINDS, SELECTING, Scores, analyse, compare, load_scores
from pgharness.errors import DatabaseError, InvalidArgument
from pgharness.stats import Interval
from world import add_instance, finish, grade, load, note, record, refused, register, rows, start, take, value

Database = psycopg.Connection[Any]


def graded_run(
    db: Database, instance: str = "trial", *, effects: tuple[float, ...] = (0, 10), **columns: object
) -> int:
    """Run an instance of two combinations; a grade's satisfaction depends on its case, its note and its combination."""
    fields = {"note_replications": 2, "grade_replications": 2, "rubrics_per_case": 2} | columns
    if not value(db, "select exists (select from pgharness.instances where name = %s)", instance):
        pairs = tuple(("simulator", "simulator") for _ in effects)
        add_instance(db, instance, cases=5, combinations=pairs, **fields)
    run = start(db, instance)
    do_work(db, run, effects)
    return run


def do_work(db: Database, run: int, effects: tuple[float, ...] = (0, 10), *, at_most: int = 1_000_000) -> None:
    """Make notes and grades of what is queued."""
    worker = register(db)
    random = np.random.default_rng(run)
    while at_most > 0 and (job := take(db, worker)) is not None:
        items = load(db, worker, job["args"])
        for item in items:
            if job["args"]["kind"] == "note":
                record(db, worker, note(run, item["ordinal"]))
            else:
                base = 40 + 3 * (item["case_id"] % 7) + effects[item["combination_number"]]
                one, two = np.clip(base + random.normal(0, 4, 2), 0, 100).round(1)
                record(db, worker, grade(run, item["ordinal"], float(one), float(two)))
        at_most -= len(items)
        finish(db, job)


def test_scores_are_those_of_grade_results(tx: Database) -> None:
    first = graded_run(tx, cycle_transcript_overlaps=[0, 50])
    second = graded_run(tx)
    scores = load_scores(tx, [first, second])
    assert len(scores) == value(tx, "select count(*) from pgharness.grade_results") == 2 * 5 * 2 * 2 * 2 * 2 * 2
    assert rows_of(scores) == sorted(
        tuple(row.values())
        for row in rows(
            tx,
            "select run, combination, case_name, overlap, replication, rubric_author, grade_replication, (score / max_score)::double precision as score"
            " from pgharness.grade_results",
        )
    )
    means = {
        (row["run_id"], row["combination"]): row["mean_score"]
        for row in rows(tx, "select * from pgharness.combination_scores")
    }
    table = scores.select(runs=[scores.runs[0].name]).case_table("combination")
    assert [round(float(mean), 4) for mean in table.means.mean(axis=1)] == [
        float(means[first, name]) for name in table.names
    ]
    assert np.bincount(scores.note).tolist() == [4] * len(np.bincount(scores.note))


def rows_of(scores: Scores) -> list[tuple[Any, ...]]:
    """Return scores as the view grade_results has them, sorted."""
    return sorted(
        zip(
            [scores.runs[code].name for code in scores.run],
            [scores.combinations[code] for code in scores.combination],
            [scores.cases[code] for code in scores.case],
            scores.overlap.tolist(),
            scores.replication.tolist(),
            [scores.authors[code] for code in scores.author],
            scores.grade_replication.tolist(),
            scores.score.tolist(),
            strict=True,
        )
    )


def test_runs_without_grades_are_refused(tx: Database) -> None:
    add_instance(tx)
    with pytest.raises(InvalidArgument, match="no grades to analyse"):
        load_scores(tx, [start(tx)])
    tx.execute("""select pgharness.register_experiment('dice', '', 'dice', 'dice', 'a', '', '{}')""")
    tx.execute("insert into pgharness.instances (name, experiment) values ('dice', 'dice')")
    with pytest.raises(InvalidArgument, match=r"no grades to analyse .*dice/1"):
        load_scores(tx, [start(tx, "dice")])
    with pytest.raises(DatabaseError, match="run with id 4711 does not exist"):
        load_scores(tx, [4711])


# -- without a worker


def test_the_quantile_of_t_is_scipys(tx: Database) -> None:
    freedom = [*range(1, 200), 500, 1_000, 10_000, 1_000_000]
    found = rows(
        tx,
        "select pgharness._student_t(df) as t from unnest(%s::bigint[]) with ordinality as f (df, n) order by n",
        freedom,
    )
    assert [row["t"] for row in found] == pytest.approx(scipy_stats.t.ppf(0.975, freedom).tolist(), abs=1e-6)
    assert value(tx, "select pgharness._student_t(0)") is None


@pytest.mark.parametrize("grades", [1, 2])
def test_estimates_and_differences_are_those_of_the_library_and_of_a_clustered_regression(
    tx: Database, grades: int
) -> None:
    run = graded_run(tx, effects=(0, 10, 4), rubrics_per_case=grades, grade_replications=grades)
    scores = load_scores(tx, [run])
    expected = compare(scores, test="t")
    found = rows(tx, "select * from pgharness.combination_estimates where run_id = %s order by combination", run)
    assert [row["combination"] for row in found] == [group.name for group in expected.groups]
    for row, group in zip(found, expected.groups, strict=True):
        assert (row["grade_count"], row["note_count"], row["case_count"]) == (group.grades, group.notes, group.cases)
        assert group.interval is not None
        close(row, group.mean, group.standard_error, group.interval, "mean_score")
    differences = rows(tx, "select * from pgharness.paired_differences where run_id = %s order by 3, 4", run)
    assert [(row["combination_a"], row["combination_b"]) for row in differences] == [
        (p.first, p.second) for p in expected.pairs
    ]
    for row, pair in zip(differences, expected.pairs, strict=True):
        assert pair.interval is not None
        close(row, pair.difference, pair.standard_error, pair.interval, "mean_difference")
        frame = pd.DataFrame(
            rows(
                tx,
                "select case_name, score, case when combination = %s then 1 else 0 end as is_a from pgharness.note_results"
                " where run_id = %s and combination in (%s, %s)",
                pair.first,
                run,
                pair.first,
                pair.second,
            )
        )
        frame["score"] = exact_scores(tx, run, pair.first, pair.second)
        fit = smf.ols("score ~ is_a", frame).fit(
            cov_type="cluster", cov_kwds={"groups": pd.factorize(frame["case_name"])[0], "use_correction": False}
        )
        # without its corrections, the regression's variance is (G - 1) / G of the one by cases
        assert fit.params["is_a"] == pytest.approx(row["mean_difference"], abs=1e-9)
        assert fit.bse["is_a"] * np.sqrt(5 / 4) == pytest.approx(row["standard_error"], rel=1e-9)


def exact_scores(db: Database, run: int, *names: str) -> list[float]:
    """Return the notes' scores that note_results rounds, in its order."""
    return [
        row["score"]
        for row in rows(
            db,
            "select (select avg(g.normalised_score) from pgharness.grades as g where g.run_id = r.run_id and g.note_ordinal = r.note_ordinal) as score"
            " from pgharness.note_results as r where r.run_id = %s and r.combination = any (%s)",
            run,
            list(names),
        )
    ]


def close(row: dict[str, Any], value: float | None, error: float | None, interval: Interval, column: str) -> None:
    assert row[column] == pytest.approx(value, abs=1e-12)
    assert row["standard_error"] == pytest.approx(error, rel=1e-9)
    # the quantile of t is right to six digits
    assert (row["confidence_low"], row["confidence_high"]) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_an_unfinished_run_counts_the_cases_that_have_grades(tx: Database) -> None:
    add_instance(tx, cases=5, combinations=(("simulator", "simulator"),) * 2, note_replications=3, rubrics_per_case=2)
    run = start(tx)
    do_work(tx, run, at_most=25)
    expected = compare(load_scores(tx, [run]))
    assert len({group.notes for group in expected.groups}) + len({pair.cases for pair in expected.pairs}) > 0
    found = {row["combination"]: row for row in rows(tx, "select * from pgharness.combination_estimates")}
    for group in expected.groups:
        row = found[group.name]
        assert (row["case_count"], row["note_count"], row["grade_count"]) == (group.cases, group.notes, group.grades)
        assert row["mean_score"] == pytest.approx(group.mean, abs=1e-12)


def test_runs_are_compared_on_the_cases_of_both(tx: Database) -> None:
    first, second = graded_run(tx), graded_run(tx)
    found = rows(tx, "select * from pgharness.paired_run_differences('trial/1', %s)", str(second))
    assert [(row["combination_a"], row["combination_b"]) for row in found][:2] == [
        ("combination 0",) * 2,
        ("combination 1",) * 2,
    ]
    assert len(found) == 4
    scores = load_scores(tx, [first, second])
    for row in found[:2]:
        pair = compare(scores.select(combinations=[row["combination_a"]])).pairs[0]
        assert pair.interval is not None
        close(row, pair.difference, pair.standard_error, pair.interval, "mean_difference")
    with refused(tx, "PH001", "nothing", "trial/1"):
        tx.execute("select * from pgharness.paired_run_differences('trial/1', 'nothing')")


# -- asking


def ask(
    db: Database, kind: str = "compare", runs: str = "{trial/1}", options: object = None, **more: object
) -> dict[str, Any]:
    named = "".join(f", {name} => %s" for name in more)
    query = f"select * from pgharness.request_analysis(%s, runs => %s, options => %s{named})"
    return rows(db, query, kind, runs, json.dumps(options or {}), *more.values())[0]


def made(db: Database, row: dict[str, Any], version: str = "0.1.0") -> dict[str, Any]:
    """Make an analysis as a worker does, in this transaction."""
    worker = register(db, pid=int(row["id"]) + 1000)
    assert [one["id"] for one in rows(db, "select * from pgharness.take_analysis(%s)", worker)] == [row["id"]]
    found = analyse(db, row["kind"], row["run_ids"], row["options"])
    digest = value(db, "select pgharness.analysis_digest(%s)", row["run_ids"])
    kept = (row["id"], worker, digest, json.dumps({"pgharness": version}), json.dumps(found.as_dict(), allow_nan=False))
    assert value(db, "select pgharness.finish_analysis(%s, %s, %s, %s, %s)", *kept)
    return rows(db, "select * from pgharness.analysis_results where analysis_id = %s", row["id"])[0]


def test_sql_and_python_know_the_same_kinds_and_options(tx: Database) -> None:
    found = rows(
        tx,
        "select kind, array_agg(option) as options, array_agg(option) filter (where is_required) as required from pgharness._analysis_options() group by 1",
    )
    assert {row["kind"]: set(row["options"]) for row in found} == {
        name: {*kind.options, *SELECTING} for name, kind in KINDS.items()
    }
    assert {row["kind"]: set(row["required"] or ()) for row in found} == {
        name: {*kind.required} for name, kind in KINDS.items()
    }


def test_the_same_question_is_answered_once_until_the_grades_change(tx: Database) -> None:
    add_instance(tx, cases=3, combinations=(("simulator", "simulator"),) * 2, rubrics_per_case=2)
    run = start(tx)
    do_work(tx, run, at_most=10)
    first = ask(tx)
    assert (first["status"], first["run_ids"], first["requested_by"]) == (
        "pending",
        [run],
        value(tx, "select session_user::text"),
    )
    assert ask(tx, runs=f"{{{run},trial/1}}")["id"] == first["id"], "by id, and twice, is the same"
    assert ask(tx, options={"alpha": 0.01})["id"] != first["id"]
    tx.execute("delete from pgharness.analyses where id <> %s", (first["id"],))
    assert made(tx, first)["is_current"]
    assert ask(tx)["id"] == first["id"]
    assert value(tx, "select id from pgharness.request_analysis('compare', array[%s])", run) == first["id"]
    again = ask(tx, anew=True)
    assert again["id"] != first["id"]
    made(tx, again)
    do_work(tx, run)
    assert not value(tx, "select is_current from pgharness.analysis_results where analysis_id = %s", again["id"])
    changed = ask(tx)
    assert changed["id"] not in (first["id"], again["id"])
    made(tx, changed)
    tx.execute("update pgharness.workers set version = '0.2.0'")
    assert ask(tx)["id"] != changed["id"], "another version of the code may find something else"


@pytest.mark.parametrize(
    ("kind", "runs", "options", "code", "said"),
    [
        ("guess", "{trial/1}", {}, "PH002", "It is one of ablation, agreement, compare, power, sweep"),
        (None, "{trial/1}", {}, "PH002", "no analysis of kind null"),
        ("compare", "{}", {}, "PH002", "request_analysis("),
        ("compare", None, {}, "PH002", "no run is named"),
        ("compare", "{nothing}", {}, "PH001", "trial/1"),
        ("compare", '{"x\'; drop table pgharness.runs; --"}', {}, "PH001", "does not exist"),
        ("compare", "{trial/1}", [1], "PH002", "not an object"),
        ("compare", "{trial/1}", {"colour": 1}, "PH002", "It has alpha, authors, baseline"),
        ("compare", "{trial/1}", {"alpha": 2}, "PH002", "a number from 0.0001 to 0.5"),
        ("compare", "{trial/1}", {"alpha": "NaN"}, "PH002", "a number from"),
        ("compare", "{trial/1}", {"alpha": None}, "PH002", "a number from"),
        ("compare", "{trial/1}", {"seed": 1.5}, "PH002", "a whole number"),
        ("compare", "{trial/1}", {"correction": "guess"}, "PH002", "one of bonferroni, holm"),
        ("compare", "{trial/1}", {"combinations": "combination 0"}, "PH002", "a list of names"),
        ("compare", "{trial/1}", {"combinations": []}, "PH002", "a list of names"),
        ("compare", "{trial/1}", {"combinations": ["nobody"]}, "PH001", "combination 0"),
        ("ablation", "{trial/1}", {}, "PH002", 'needs the option "baseline"'),
        ("ablation", "{trial/1}", {"baseline": "nobody"}, "PH001", "combination 0"),
        ("sweep", "{trial/1}", {"parameter": 3}, "PH002", "a text"),
        ("power", "{trial/1}", {"difference": 0}, "PH002", "a number from"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(
    tx: Database, kind: str | None, runs: str | None, options: object, code: str, said: str
) -> None:
    add_instance(tx, combinations=(("simulator", "simulator"),) * 2)
    start(tx)
    with refused(tx, code, said):
        tx.execute(
            "select pgharness.request_analysis(%s, runs => %s, options => %s)", (kind, runs, json.dumps(options))
        )


def test_who_died_of_an_analysis_leaves_it_to_another_and_five_are_enough(tx: Database) -> None:
    graded_run(tx)
    asked = ask(tx)
    workers = [register(tx, pid=number) for number in range(100, 107)]
    take = "select * from pgharness.take_analysis(%s)"
    assert len(rows(tx, take, workers[0])) == 1
    assert rows(tx, take, workers[1]) == [], "somebody has it"
    for before, worker in itertools.pairwise(workers[:5]):
        tx.execute("update pgharness.workers set status = 'lost' where id = %s", (before,))
        assert [row["attempts"] for row in rows(tx, take, worker)] == [workers.index(worker) + 1]
        assert not value(tx, "select pgharness.finish_analysis(%s, %s, '', '{}', '{}')", asked["id"], before), (
            "too late"
        )
    tx.execute("update pgharness.workers set status = 'stopped' where id = %s", (workers[4],))
    assert [row["attempts"] for row in rows(tx, take, workers[6])] == [5], "it was only told to stop"
    tx.execute("update pgharness.workers set heartbeat_at = now() - interval '1 hour' where id = %s", (workers[6],))
    assert rows(tx, take, workers[5]) == []
    found = rows(tx, "select status, error, hint from pgharness.analysis_results")[0]
    assert found["status"] == "failed" and "died 5 times" in found["error"] and "memory" in found["hint"]
    assert ask(tx)["id"] != asked["id"], "what failed may be asked for again"


def test_views_read_what_was_found(tx: Database) -> None:
    run = graded_run(tx, effects=(0, 30))
    scores = load_scores(tx, [run])
    found = made(tx, ask(tx))
    pair = compare(scores).pairs[0]
    row = rows(tx, "select * from pgharness.analysis_comparisons where analysis_id = %s", found["analysis_id"])[0]
    assert (row["first"], row["second"], row["verdict"], row["is_different"]) == (
        "combination 0",
        "combination 1",
        pair.verdict,
        True,
    )
    assert (row["difference"], row["p_value"], row["p_corrected"]) == (pair.difference, pair.p_value, pair.p_corrected)
    assert row["sentence"] == pair.sentence and row["confidence_high"] < 0 < row["p_value"] < row["alpha"] == 0.05
    assert [row["mean_score"] for row in rows(tx, "select * from pgharness.analysis_groups order by number")] == [
        group.mean for group in compare(scores).groups
    ]
    made(tx, ask(tx, "agreement"))
    assert rows(tx, "select * from pgharness.analysis_measures")[0]["raters"] == ["bob", "ann"]
    made(tx, ask(tx, "power", options={"difference": 0.1}))
    power = rows(tx, "select * from pgharness.analysis_powers")[0]
    assert 0 < power["detectable_difference"] < 1 and power["safe_cases"] >= power["needed_cases"] >= 2


def test_a_sweep_reads_the_config_of_its_runs(tx: Database) -> None:
    runs = []
    tx.execute(
        """insert into pgharness.experiments (name, config_schema) values ('shots', '{"properties": {"shots": {"type": "integer"}}}')"""
    )
    for shots in (0, 2, 4):
        if not runs:
            runs.append(graded_run(tx, effects=(0, 0), experiment="shots", config='{"shots": 0}'))
            continue
        tx.execute("update pgharness.instances set config = %s where name = 'trial'", (json.dumps({"shots": shots}),))
        runs.append(graded_run(tx, effects=(10 * shots, 0)))
    made(tx, ask(tx, "sweep", "{trial/1,trial/2,trial/3}", {"parameter": "shots"}))
    found = rows(tx, "select * from pgharness.analysis_trends order by number")
    assert [(row["series"], row["rises"], row["point_count"]) for row in found] == [
        ("combination 0", 1, 3),
        ("combination 1", 0, 3),
    ]
    assert found[0]["slope"] == pytest.approx(0.1, abs=0.02)


# -- planning


def plan(db: Database, hypotheses: object = None, **more: object) -> dict[str, Any]:
    named = "".join(f", {name} => %s" for name in more)
    given = [{"first": "combination 0", "second": "combination 1"}] if hypotheses is None else hypotheses
    return rows(db, f"select * from pgharness.preregister('trial', %s{named})", json.dumps(given), *more.values())[0]


def deviations(db: Database) -> list[tuple[str, str | None, str | None]]:
    found = rows(db, "select * from pgharness.preregistration_deviations order by deviation, actual")
    return [(row["deviation"], row["planned"], row["actual"]) for row in found]


def test_a_run_that_went_as_planned_has_no_deviations_and_one_that_did_not_has_each(tx: Database) -> None:
    add_instance(tx, cases=4, combinations=(("simulator", "simulator"),) * 3, note_replications=2, rubrics_per_case=1)
    planned = plan(
        tx, [{"first": f"combination {a}", "second": f"combination {b}"} for a, b in ((0, 1), (0, 2), (2, 1))]
    )
    assert plan(tx, planned["hypotheses"])["id"] == planned["id"]
    run = start(tx)
    assert deviations(tx) == [("analyses", "at least 1", "0")]
    do_work(tx, run, (0, 5, 10))
    made(tx, ask(tx))
    assert deviations(tx) == []
    made(
        tx,
        ask(
            tx,
            options={
                "alpha": 0.1,
                "test": "sign",
                "correction": "bh",
                "authors": ["bob"],
                "combinations": ["combination 0", "combination 1"],
                "cases": ["trial-1", "trial-2"],
            },
        ),
    )
    assert deviations(tx) == [
        ("alpha", "0.05", "0.1"),
        ("correction", "holm", "bh"),
        ("hypothesis not tested", "combination 0 against combination 2", None),
        ("hypothesis not tested", "combination 2 against combination 1", None),
        ("metric", "mean_score", "mean_score by bob"),
        ("selected cases", "all", "2"),
        ("test", "auto", "sign"),
    ]


def test_what_changed_between_plan_and_run_is_told(tx: Database) -> None:
    add_instance(tx, cases=4, combinations=(("simulator", "simulator"),) * 3, rubrics_per_case=1)
    start(tx)
    plan(tx)
    tx.execute("update pgharness.instances set note_replications = 3 where name = 'trial'")
    tx.execute("delete from pgharness.instance_cases where case_name = 'trial-4'")
    run = start(tx)
    do_work(tx, run, (0, 5, 10), at_most=10**6)
    made(tx, ask(tx, runs="{trial/2}"))
    assert deviations(tx) == [
        ("cases", "4", "3"),
        ("extra comparison", None, "combination 0 against combination 2"),
        ("extra comparison", None, "combination 1 against combination 2"),
        ("note replications", "1", "3"),
        ("runs before it was registered", "0", "1"),
    ]


def test_a_plan_never_changes_and_a_run_keeps_its_own(tx: Database) -> None:
    add_instance(tx, combinations=(("simulator", "simulator"),) * 2)
    first = plan(tx)
    with refused(tx, "PH003", "never changes"):
        tx.execute("update pgharness.preregistrations set alpha = 0.5")
    run = start(tx)
    assert plan(tx, alpha=0.01)["id"] != first["id"]
    kept = "select definition #>> '{preregistration,alpha}' from pgharness.run_definitions where run_id = %s"
    assert value(tx, kept, run) == "0.05"
    assert value(tx, kept, start(tx)) == "0.01"
    assert value(tx, kept, value(tx, "select run_id from pgharness.rerun(%s)", run)) == "0.05"


@pytest.mark.parametrize(
    ("hypotheses", "options", "code", "said"),
    [
        ({}, {}, "PH002", "not a list"),
        ([], {}, "PH002", "no hypothesis"),
        (["a > b"], {}, "PH002", "direction"),
        ([{"first": "combination 0"}], {}, "PH002", "combination is missing"),
        ([{"first": "combination 0", "second": "nobody"}], {}, "PH001", "combination 1"),
        ([{"first": "combination 0", "second": "combination 0"}], {}, "PH002", "with itself"),
        (
            [{"first": "combination 0", "second": "combination 1", "direction": "up"}],
            {},
            "PH002",
            "higher, lower or different",
        ),
        (
            [{"first": "combination 0", "second": "combination 1", "p": 0}],
            {},
            "PH002",
            "first, second, direction and text",
        ),
        (None, {"alpha": 3}, "PH002", "a number from"),
        (None, {"test": "best"}, "PH002", "one of auto"),
        (None, {"correction": "none"}, "PH002", "one of bonferroni"),
        (None, {"primary_metric": "best"}, "PH002", "mean_score"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(
    tx: Database, hypotheses: object, options: dict[str, object], code: str, said: str
) -> None:
    add_instance(tx, combinations=(("simulator", "simulator"),) * 2)
    with refused(tx, code, said):
        plan(tx, hypotheses, **options)
