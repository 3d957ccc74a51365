"""Reports of real runs: every number is the database's, texts of models do nothing, and archives give the same numbers."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import planted
import world
from command_line import CommandLine
from pgharness import Context, experiment
from pgharness.sdk import direct
from pgharness.settings import Settings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reports.md"
PRIMOCK57 = ROOT.parent / "shared" / "data" / "primock57"
EVIL = r"<script>alert(1)</script>|$x$ \input{/etc/passwd} `=cmd()`"


class Lab:
    """A database with two finished runs of the study, and the reports made of them."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.cli = CommandLine(url)
        with psycopg.connect(url, autocommit=True) as db:
            names = planted.add_cases(db, 12)
            db.execute("update pgharness.cases set name = %s where name = 'visit 12'", (EVIL,))
            names[-1] = EVIL
            self.run = planted.start(db, "study", cases=names)
            combinations = (*planted.COMBINATIONS[:2], (EVIL, "study/twin"))
            self.other = planted.start(db, "again", cases=names, combinations=combinations, seed=7)
        self.cli.work()

    def report(self, *arguments: str) -> dict[str, Any]:
        """Make a report and return what its JSON holds."""
        out = self.folder / f"report{len(list(self.folder.iterdir()))}"
        self.cli.call("report", *arguments, "--format", "json", "--out", str(out))
        read: dict[str, Any] = json.loads((out / "report.json").read_text())
        return read


@pytest.fixture(scope="module")
def lab(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with world.cloned(server_url, template) as url:
        yield Lab(url, tmp_path_factory.mktemp("reports"))


def tables(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {
        block["key"]: block["rows"]
        for section in report["sections"]
        for block in section["blocks"]
        if block["type"] == "table"
    }


def queried(lab: Lab, query: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(lab.url) as db:
        return [
            tuple(float(v) if type(v).__name__ == "Decimal" else v for v in row)
            for row in db.execute(query.encode(), values or None).fetchall()
        ]


def equal(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], tolerance: float = 1e-9) -> None:
    """Assert that rows are those expected, numbers within a tolerance."""
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        for a, b in zip(one, two, strict=True):
            if isinstance(a, float) and b is not None:
                assert math.isclose(a, float(b), rel_tol=tolerance, abs_tol=tolerance), (one, two)
            else:
                assert a == b, (one, two)


_CASE_SCORES = """
with note as (
    select n.run_id, n.combination_number, n.case_number, n.ordinal, avg(g.score / g.max_score)::double precision as score
      from pgharness.notes as n join pgharness.grades as g on g.run_id = n.run_id and g.note_ordinal = n.ordinal
     where n.run_id = %s group by n.run_id, n.combination_number, n.case_number, n.ordinal
), scored as (
    select c.number, c.name, note.case_number, avg(note.score) as score
      from note join pgharness.run_combinations as c on c.run_id = note.run_id and c.number = note.combination_number
     group by c.number, c.name, note.case_number
)
"""


def test_every_number_of_the_results_is_the_databases(lab: Lab) -> None:
    read = tables(lab.report("study/1"))
    keys = ("combination", "mean", "standard_error", "cases", "notes", "grades")
    expected = queried(
        lab,
        _CASE_SCORES
        + "select s.name, avg(s.score), stddev_samp(s.score) / sqrt(count(*)), count(*), t.notes, t.grades from scored as s"
        " join (select n.combination_number, count(distinct n.ordinal) as notes, count(*) as grades from pgharness.notes as n"
        " join pgharness.grades as g on g.run_id = n.run_id and g.note_ordinal = n.ordinal where n.run_id = %s group by 1) as t"
        " on t.combination_number = s.number group by s.number, s.name, t.notes, t.grades order by s.number",
        lab.run,
        lab.run,
    )
    equal([tuple(row[key] for key in keys) for row in read["results"]], expected)
    for row in read["results"]:  # t(11) at 97.5%
        assert math.isclose(row["high"] - row["mean"], 2.200985160082949 * row["standard_error"], rel_tol=1e-9)
        assert math.isclose(row["mean"] - row["low"], row["high"] - row["mean"], rel_tol=1e-9)
    pairs = queried(
        lab,
        _CASE_SCORES
        + "select a.name, b.name, avg(a.score - b.score), stddev_samp(a.score - b.score) / sqrt(count(*)), count(*)"
        " from scored as a join scored as b on b.case_number = a.case_number and b.number > a.number"
        " group by a.number, a.name, b.number, b.name order by a.number, b.number",
        lab.run,
    )
    equal(
        [tuple(row[k] for k in ("first", "second", "difference", "standard_error", "cases")) for row in read["pairs"]],
        pairs,
    )


def test_every_number_of_costs_and_failures_is_the_databases(lab: Lab) -> None:
    read = tables(lab.report("study/1"))
    equal(
        [tuple(row[k] for k in ("call_count", "input_tokens", "output_tokens", "cost_usd")) for row in read["costs"]],
        queried(
            lab,
            "select count(*), sum(input_tokens), sum(output_tokens), sum(cost_usd) from pgharness.calls where run_id = %s",
            lab.run,
        ),
    )
    equal(
        [
            tuple(row[k] for k in ("kind", "model", "call_count", "calls_failed", "cost_usd"))
            for row in read["models_performance"]
        ],
        queried(
            lab,
            "select c.kind, m.name, count(*), count(*) filter (where c.outcome <> 'succeeded'), sum(c.cost_usd) from pgharness.calls as c"
            " join pgharness.models as m on m.id = c.model_id where c.run_id = %s group by c.kind, m.name order by 1, 2",
            lab.run,
        ),
    )
    for row, query in (
        ("notes", "select note_count from pgharness.runs where id = %s"),
        (
            "notes_failed",
            "select count(*) from pgharness.failures where run_id = %s and kind = 'note' and status = 'failed'",
        ),
        (
            "grades_failed",
            "select count(*) from pgharness.failures where run_id = %s and kind = 'grade' and status = 'failed'",
        ),
    ):
        assert [(read["completeness"][0][row],)] == queried(lab, query, lab.run)


def test_the_planted_difference_is_found_and_no_other(lab: Lab) -> None:
    report = lab.report("study/1")
    verdicts = {(row["first"], row["second"]): row["verdict"] for row in tables(report)["pairs"]}
    assert verdicts == {
        ("careful", "hasty"): "careful scores higher",
        ("careful", "twin"): "no difference shown",
        ("hasty", "twin"): "twin scores higher",
    }
    told = " ".join(report["summary"])
    assert (
        "2 of 3 comparisons are statistically significant" in told and "For the others no difference was shown" in told
    )
    assert "careful scores higher than hasty (+0." in told and "twin scores higher than hasty (+0." in told


def test_where_nothing_is_found_the_word_is_not_there(lab: Lab) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        names = [name for (name,) in db.execute("select name from pgharness.cases order by id").fetchall()]
        planted.start(
            db,
            "same",
            cases=names,
            combinations=(planted.COMBINATIONS[0], planted.COMBINATIONS[2]),
            grade_replications=1,
        )
    lab.cli.work()
    out = lab.folder / "same"
    lab.cli.call("report", "same/1", "--format", "html,md,latex,json", "--out", str(out))
    for name in ("report.html", "report.md", "report.tex", "report.json"):
        assert "significant" not in (out / name).read_text(), name
    text = (out / "report.md").read_text()
    assert "did not show a difference at alpha = 0.05; that is not evidence that there is none." in text
    assert "grader's own noise was not measured" in text and "so the comparisons are exploratory" in text


def test_all_formats_of_hostile_names_can_be_used(lab: Lab) -> None:
    out = lab.folder / "all"
    lab.cli.call("report", "again/1", "--format", "html,md,latex,ipynb,json,csv", "--out", str(out))
    page = (out / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;|$x$" in page
    assert r"\input{/etc" not in (out / "report.tex").read_text()
    assert "<script>" not in (out / "report.md").read_text()
    assert (out / "tables" / "results.csv").read_text().startswith("combination,mean,low,high,")
    assert {path.suffix for path in (out / "figures").iterdir()} == {".svg", ".pdf"}
    if shutil.which("pdflatex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "report.tex"]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-3000:]
    again = lab.folder / "once-more"
    lab.cli.call("report", "again/1", "--format", "html,md,latex,ipynb,json,csv", "--out", str(again))
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == {
        path.relative_to(out): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.suffix not in (".aux", ".log", ".out") and path.name != "report.pdf"
    }


def test_archives_alone_give_the_same_numbers(lab: Lab, tmp_path: Path) -> None:
    out, archives = tmp_path / "report", tmp_path / "archives"
    lab.cli.call("report", "study/1", "again/1", "--format", "json", "--out", str(out))
    lab.cli.call("archive", "study/1", "again/1", "--keep", "--out", str(archives))
    files = sorted(map(str, archives.iterdir()))
    clean = CommandLine(home=tmp_path / "clean")
    done = clean.run("report", "--archive", *files, "--check", str(out / "report.json"), "--out", str(tmp_path / "new"))
    assert f"all numbers of {out / 'report.json'} are reproduced" in done.out
    assert (tmp_path / "new" / "report.html").exists() and not (tmp_path / "clean").exists()
    then = json.loads((out / "report.json").read_text())
    then["sections"][0]["blocks"][0]["rows"][0]["mean"] += 1e-6
    (out / "report.json").write_text(json.dumps(then))
    done = clean.run("report", "--archive", *files, "--check", str(out / "report.json"), status=1)
    assert "says something else in 1 place" in done.err and "table results, row 1, mean" in done.err


def test_a_registered_plan_and_its_deviations_are_reported(lab: Lab) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        names = [name for (name,) in db.execute("select name from pgharness.cases order by id").fetchall()]
        db.execute(planted.MODELS)
        db.execute("insert into pgharness.instances (name, experiment) values ('planned', 'note_grade')")
        db.execute("select pgharness.add_cases('planned', names => %s)", (names,))
        for name, generator in planted.COMBINATIONS:
            db.execute(
                "insert into pgharness.model_combinations (instance, name, generator, grader) values ('planned', %s, %s, 'study/judge')",
                (name, generator),
            )
        plan = [
            {"first": "hasty", "second": "careful", "direction": "lower", "text": "Haste makes waste."},
            {"first": "twin", "second": "careful", "direction": "higher"},
        ]
        db.execute("select pgharness.preregister('planned', %s, alpha => 0.01)", (json.dumps(plan),))
        db.execute("update pgharness.instances set note_replications = 8 where name = 'planned'")
        world.start(db, "planned")
    lab.cli.work()
    report = lab.report("planned/1")
    rows = tables(report)["hypotheses"]
    assert [(row["hypothesis"], row["verdict"]) for row in rows] == [
        ("hasty scores lower than careful", "supported"),
        ("twin scores higher than careful", "not supported"),
    ]
    section = next(each for each in report["sections"] if each["key"] == "preregistration")
    deviations = " ".join(section["blocks"][-1]["items"])
    assert "note replications: planned 1, was 8" in deviations
    assert "uses alpha = 0.05, planned was 0.01." in deviations and "1 further pair of combinations" in deviations


def test_every_kind_of_deviation_from_a_plan_is_reported(lab: Lab, tmp_path: Path) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        names = [name for (name,) in db.execute("select name from pgharness.cases order by id").fetchall()]
        planted.start(db, "strayed", cases=names[:6])  # a run before the plan
        plan = [{"first": "careful", "second": "hasty", "direction": "higher"}, {"first": "twin", "second": "careful"}]
        db.execute(
            "select pgharness.preregister('strayed', %s, 'mean_score by ann', 't', 0.01, 'bh')", (json.dumps(plan),)
        )
        db.execute("delete from pgharness.instance_cases where case_name = %s", (names[5],))
        db.execute("delete from pgharness.model_combinations where instance = 'strayed' and name = 'twin'")
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader) values ('strayed', 'late', 'study/hasty', 'study/judge')"
        )
        world.start(db, "strayed")
        db.execute("select pgharness.preregister('strayed', %s)", (json.dumps(plan[:1]),))
        lab.cli.work()
        db.execute(
            "select pgharness.request_analysis('compare', runs => '{strayed/2}', options => '{\"alpha\": 0.2, \"test\": \"sign\"}')"
        )
        lab.cli.work()
    report = lab.report("strayed/2")
    section = next(each for each in report["sections"] if each["key"] == "preregistration")
    told = " ".join(section["blocks"][-1]["items"])
    for text in (
        "cases: planned 6, was 5.",
        "runs before it was registered: planned 0, was 1.",
        "careful scores higher than hasty: tested on 5 cases, planned were 6.",
        "not tested: twin differs from careful; they share 0 cases with grades.",
        "outside of this section the report uses alpha = 0.05, planned was 0.01; test auto, planned was t; correction holm,"
        " planned was bh; metric mean_score, planned was mean_score by ann.",
        "the report compares 2 further pairs of combinations, which is exploratory.",
        "another plan was registered at",
        "alpha: planned 0.01, was 0.2.",
        "test: planned t, was sign.",
        "metric: planned mean_score by ann, was mean_score.",
        "correction: planned bh, was holm.",
        "hypothesis not tested: planned twin against careful, was none.",
        "extra comparison: planned none, was",
    ):
        assert text in told, text
    assert report["summary"][1].startswith(
        "0 of 2 registered hypotheses are supported at alpha = 0.01, corrected (Benja"
    )
    assert "cannot be tested: twin differs from careful." in report["summary"][1]
    assert report["summary"][2].startswith("Beyond the plan: ")
    # what analyses did is not in an archive, and all numbers are
    (tmp_path / "report.json").write_text(json.dumps(report))
    lab.cli.call("archive", "strayed/2", "--keep", "--out", str(tmp_path))
    done = lab.cli.call(
        "report", "--archive", *map(str, tmp_path.glob("*.zip")), "--check", str(tmp_path / "report.json")
    )
    assert "are reproduced" in done.out


def test_a_plan_that_came_after_the_start_is_told_and_not_used(lab: Lab) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        db.execute(
            "select pgharness.preregister('study', %s)", (json.dumps([{"first": "careful", "second": "hasty"}]),)
        )
    report = lab.report("study/1")
    section = next(each for each in report["sections"] if each["key"] == "preregistration")
    assert re.match(
        r"A plan was registered at .*, after it had started: run study/1 has no plan, and all",
        section["blocks"][0]["text"],
    )
    assert "hypotheses" not in tables(report) and "registered hypothes" not in " ".join(report["summary"])
    limits = next(each for each in report["sections"] if each["key"] == "limits")["blocks"][0]["items"]
    assert any(
        item.startswith("No hypothesis or primary metric was registered before the runs started") for item in limits
    )


def test_a_report_asked_for_in_sql_is_made_by_a_worker_once(lab: Lab, tmp_path: Path) -> None:
    query = (
        "select * from pgharness.request_report('study/1', formats => '{html,json,csv}', compared_with => '{again/1}')"
    )
    with psycopg.connect(lab.url, autocommit=True) as db:
        (asked,) = world.rows(db, query)
        assert asked["status"] == "pending" and asked["run_ids"] == [lab.run, lab.other]
        failed = world.rows(db, "select * from pgharness.request_report(%s)", lab.run)[0]["id"]
        db.execute("update pgharness.reports set run_ids = '{4711}' where id = %s", (failed,))
        said = lab.cli.call("report", "--fetch", str(asked["id"]), "--out", str(tmp_path / "x"), status=1).err
        assert f"report {asked['id']} is pending" in said and not (tmp_path / "x").exists()
        lab.cli.work()
        (made,) = world.rows(db, "select * from pgharness.reports where id = %s", asked["id"])
        assert (made["status"], made["title"], made["error"]) == (
            "succeeded",
            "Comparison of runs study/1 and again/1",
            None,
        )
        assert world.rows(db, query)[0]["id"] == asked["id"]
        # what an analysis did since is in a report, so the old one is not it
        db.execute("select pgharness.request_analysis('compare', runs => '{again/1}')")
        lab.cli.work()
        assert world.rows(db, query)[0]["id"] > failed
        (broken,) = world.rows(db, "select status, error, hint from pgharness.reports where id = %s", failed)
        assert broken == {
            "status": "failed",
            "error": 'run "4711" does not exist',
            "hint": "List runs: pgharness status",
        }
        stored = world.rows(
            db, "select path, digest, content from pgharness.report_files where report_id = %s", asked["id"]
        )
    out, direct = tmp_path / "fetched", tmp_path / "direct"
    lab.cli.call("report", "--fetch", str(asked["id"]), "--out", str(out))
    lab.cli.call("report", "study/1", "again/1", "--format", "html,json,csv", "--out", str(direct))
    files = {path.relative_to(direct).as_posix(): path.read_bytes() for path in direct.rglob("*") if path.is_file()}
    assert {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()} == files
    assert {row["path"]: row["content"] for row in stored} == files
    assert all(hashlib.sha256(row["content"]).hexdigest() == row["digest"] for row in stored)


@experiment(name="told")
def told(ctx: Context) -> None:
    ctx.result("conclusion", {"is": "<b>|good|</b>"})
    ctx.metric("accuracy", 0.75)
    ctx.metric("accuracy", 1.0)


def test_what_code_recorded_is_reported(lab: Lab) -> None:
    direct.execute(told, url=lab.url, settings=Settings.from_env(), is_echoed=False)
    report = lab.report("told/1")
    read = tables(report)
    assert read["recorded_results"] == [{"key": "conclusion", "value": '{"is": "<b>|good|</b>"}'}]
    assert read["recorded_metrics"] == [
        {
            "name": "accuracy",
            "value_count": 2,
            "mean_value": 0.875,
            "min_value": 0.75,
            "max_value": 1.0,
            "last_value": 1.0,
        }
    ]
    assert read["completeness"] == [{"run": "told/1", "status": "completed", "tasks": 1, "tasks_failed": 0}]
    assert "results" not in read and "pairs" not in read


def test_a_run_that_has_hardly_begun_is_reported_as_such(lab: Lab) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        names = [name for (name,) in db.execute("select name from pgharness.cases order by id").fetchall()]
        run = planted.start(db, "begun", cases=names[:1])
        assert "No note has a grade" in json.dumps(lab.report("begun/1"))
        db.execute("select pgharness.pause_run(%s)", (run,))
    report = lab.report(str(run), "study/1")
    assert report["runs"] == ["begun/1", "study/1"]
    items = [
        item for section in report["sections"] if section["key"] == "limits" for item in section["blocks"][0]["items"]
    ]
    assert "Run begun/1: the run is paused: its numbers will change, and looking early spoils p-values." in items
    assert any(item.startswith("Run begun/1: 30 items are undecided") for item in items)


def test_the_page_about_reports_runs_as_written(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(lab.url, autocommit=True) as db:
        names = [name for (name,) in db.execute("select name from pgharness.cases order by id").fetchall()]
        planted.start(db, "triage-v2", cases=names, combinations=planted.COMBINATIONS[:2])
        world.start(db, "triage-v2")
        lab.cli.work()
        monkeypatch.chdir(tmp_path)
        blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
        for language, text in blocks:
            if language == "sql":
                db.execute(text.encode())
                continue
            for line in text.strip().splitlines():
                words = shlex.split(line, comments=True)[1:]
                found = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
                last = lab.cli.call(*found).out
    assert [language for language, _ in blocks] == ["sh", "sql", "sh"]
    assert "all numbers of report/report.json are reproduced" in last and (tmp_path / "compared" / "report.md").exists()


@pytest.mark.skipif(
    not (PRIMOCK57 / "cases.jsonl").exists(), reason=f"PriMock57 is not part of the project, and not in {PRIMOCK57}"
)
def test_a_report_on_primock57_asked_for_in_sql_says_what_the_views_say(url: str) -> None:
    cli = CommandLine(url)
    cli.call("import", "cases", str(PRIMOCK57 / "cases.jsonl"), "--dataset", "primock57", "--input", "transcript")
    cli.call("import", "rubrics", str(PRIMOCK57 / "rubrics.jsonl"))
    with psycopg.connect(url, autocommit=True) as db:
        for name, quality in (("careful", 0.9), ("careful too", 0.9), ("hasty", 0.4), ("judge", 0.8)):
            parameters = {"quality": quality, "output_tokens": 1000, "latency_seconds": 0}
            db.execute(
                "insert into pgharness.models (name, provider, parameters, input_usd_per_million) values (%s, 'simulator', %s, 2)",
                (name, json.dumps(parameters)),
            )
        db.execute(
            "insert into pgharness.instances (name, note_replications, grade_replications, seed) values ('primock', 3, 2, 57)"
        )
        db.execute("select pgharness.add_cases('primock', eligible => true, dataset => 'primock57')")
        db.execute(
            "insert into pgharness.model_combinations (instance, name, generator, grader)"
            " select 'primock', n, n, 'judge' from unnest('{careful,careful too,hasty}'::text[]) as n"
        )
        db.execute("select pgharness.start_run('primock')")
        cli.work(timeout=200)
        report = world.value(db, "select id from pgharness.request_report('primock/1', formats => '{json}')")
        analysis = world.value(db, "select id from pgharness.request_analysis('compare', runs => '{primock/1}')")
        cli.work()
        text = world.value(
            db, "select convert_from(content, 'UTF8') from pgharness.report_files where report_id = %s", report
        )
        read = tables(json.loads(text))
        views = {
            "results": (
                "combination_estimates",
                "combination mean_score standard_error case_count note_count grade_count",
            ),
            "pairs": ("paired_differences", "combination_a combination_b mean_difference standard_error case_count"),
            "costs": ("cost_by_run", "call_count input_tokens output_tokens note_cost_usd grade_cost_usd cost_usd"),
            "models_performance": (
                "model_performance",
                "model kind call_count calls_failed latency_p50_ms latency_p95_ms cost_usd",
            ),
            "replication_agreement": ("replication_agreement", "combination rubric_author note_count replication_sd"),
        }
        keys = {
            "results": "combination mean standard_error cases notes grades",
            "pairs": "first second difference standard_error cases",
        }
        for key, (view, columns) in views.items():
            expected = world.rows(db, f"select {', '.join(columns.split())} from pgharness.{view} order by 1, 2")
            found = [tuple(row[name] for name in keys.get(key, columns).split()) for row in read[key]]
            equal(sorted(found), [tuple(row.values()) for row in expected])
        columns = "first second difference confidence_low confidence_high p_value p_corrected verdict effect_size"
        expected = world.rows(
            db,
            f"select {', '.join(columns.split())} from pgharness.analysis_comparisons where analysis_id = %s order by number",
            analysis,
        )
        names = ["first", "second", "difference", "low", "high", "p_value", "p_corrected", "verdict", "effect"]
        equal([tuple(row[name] for name in names) for row in read["pairs"]], [tuple(row.values()) for row in expected])
    verdicts = {(row["first"], row["second"]): row["verdict"] for row in read["pairs"]}
    assert verdicts == {
        ("careful", "careful too"): "no difference shown",
        ("careful", "hasty"): "careful scores higher",
        ("careful too", "hasty"): "careful too scores higher",
    }


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("nosuch", "--out", "x"), 1, 'run "nosuch" does not exist'),
        (("study/1",), 2, "--out"),
        (("study/1", "--out", "x", "--format", "pdf"), 2, "'pdf' is no format"),
        (("nosuch.zip", "--archive", "--out", "x"), 1, "nosuch.zip cannot be used"),
        (("study/1", "--check", "nosuch.json"), 1, "nosuch.json cannot be read"),
    ],
)
def test_mistakes_are_told(lab: Lab, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    out = [str(tmp_path / word) if word == "x" else word for word in arguments]
    assert said in " ".join(lab.cli.call("report", *out, status=status).err.split())
    assert list(tmp_path.iterdir()) == []
