"""Every number of every table of a report, computed again from the rows of grades, calls and failures alone."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import krippendorff
import numpy as np
import psycopg
import pytest
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import brentq
from statsmodels.stats.multitest import multipletests

import planted
import world
from command_line import CommandLine

Key = tuple[Any, ...]
Numbers = Mapping[str, float | int | None]
CASES = 13  # so few that all their signs can be counted
PLAN = [
    {"first": "hasty", "second": "careful", "direction": "lower"},
    {"first": "twin", "second": "careful"},
]
_GRADES = """
select c.name as combination, ca.name as case_name, n.ordinal as note, n.overlap, ru.author, g.replication,
       (g.score / g.max_score)::double precision as score
  from pgharness.grades as g
  join pgharness.notes as n on n.run_id = g.run_id and n.ordinal = g.note_ordinal
  join pgharness.run_combinations as c on c.run_id = g.run_id and c.number = n.combination_number
  join pgharness.run_cases as rc on rc.run_id = g.run_id and rc.number = n.case_number
  join pgharness.cases as ca on ca.id = rc.case_id
  join pgharness.rubrics as ru on ru.id = g.rubric_id
 where g.run_id = %s order by c.number, n.ordinal, ru.author, g.replication
"""
_CALLS = """
select m.name as model, c.kind, c.outcome, c.input_tokens, c.output_tokens, c.cached_tokens, c.cost_usd::double precision as cost_usd,
       c.latency_ms::double precision as latency_ms
  from pgharness.calls as c join pgharness.models as m on m.id = c.model_id where c.run_id = %s
"""


class Checked:
    """The tables of a report, and which of their columns were found right."""

    def __init__(self, report: dict[str, Any]) -> None:
        blocks = [block for section in report["sections"] for block in section["blocks"] if block["type"] == "table"]
        self.rows = {block["key"]: block["rows"] for block in blocks}
        self.left = {
            (block["key"], column["key"])
            for block in blocks
            for column in block["columns"]
            if column["kind"] not in ("text", "time", "flag")
        }

    def table(self, key: str, by: str, expected: Mapping[Key, Numbers], *, within: float = 1e-9) -> None:
        """Assert that a table has just these rows, known by some columns, and these numbers."""
        found = {tuple(row[name] for name in by.split()): row for row in self.rows[key]}
        assert len(found) == len(self.rows[key]) and found.keys() == expected.keys(), key
        for place, numbers in expected.items():
            for name, number in numbers.items():
                wanted = None if number is None else pytest.approx(number, rel=within, abs=within)
                assert found[place][name] == wanted, (key, place, name)
                self.left.discard((key, name))


@pytest.fixture(scope="module")
def lab(server_url: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a report on a run some of whose notes and grades failed, and a connection to its database."""
    with world.cloned(server_url, template) as url, psycopg.connect(url, autocommit=True) as db:
        names = planted.add_cases(db, CASES)
        db.execute(planted.MODELS)
        db.execute(
            "update pgharness.models set parameters = parameters || '{\"error_rate\": 0.35}' where name = 'study/hasty'"
        )
        db.execute(
            "update pgharness.models set parameters = parameters || '{\"invalid_rate\": 0.1}' where name = 'study/judge'"
        )
        db.execute(
            "insert into pgharness.instances (name, note_replications, grade_replications, retry_delay_seconds, max_attempts, seed)"
            " values ('study', 3, 2, 0.01, 2, 6)"
        )
        db.execute("select pgharness.add_cases('study', names => %s)", (names,))
        for name, generator in planted.COMBINATIONS:
            db.execute(
                "insert into pgharness.model_combinations (instance, name, generator, grader) values ('study', %s, %s, 'study/judge')",
                (name, generator),
            )
        db.execute("select pgharness.preregister('study', %s, test => 't', alpha => 0.01)", (json.dumps(PLAN),))
        run = world.start(db, "study")
        cli, out = CommandLine(url), tmp_path_factory.mktemp("numbers")
        cli.work()
        cli.call("report", "study/1", "--format", "json,html,md", "--out", str(out))
        yield db, run, out


def test_every_number_of_every_table_follows_from_the_rows(lab: tuple[world.Database, int, Path]) -> None:
    db, run, out = lab
    made = Checked(json.loads((out / "report.json").read_text()))
    grades = world.rows(db, _GRADES, run)
    cases = _case_means(grades)
    assert {"study/1"} == {row["name"] for row in world.rows(db, "select name from pgharness.runs")}
    check_results(made, grades, cases)
    check_comparisons(made, cases)
    check_agreement(made, grades)
    check_cases(made, grades, cases)
    check_costs(made, db, run)
    check_failures(made, db, run)
    # the bootstrap of Krippendorff's alpha is checked in its own tests; here, that it is about its value
    for row in made.rows["agreement"]:
        assert row["low"] <= row["value"] <= row["high"]
    assert made.left == set()


def test_the_pages_show_the_numbers_of_the_tables(lab: tuple[world.Database, int, Path]) -> None:
    _, _, out = lab
    report = json.loads((out / "report.json").read_text())
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for row in Checked(report).rows["pairs"]:
        shown = [f"{row[name]:+.3f}".replace("-", "\u2212") for name in ("difference", "low", "high")]
        cells = "".join(
            f'<td class="number" data-sort="{row[name]}">{one}</td>\n'
            for name, one in zip(("difference", "low", "high"), shown, strict=True)
        )
        assert cells in page
        assert f"| {row['first']} | {row['second']} | {' | '.join(shown)} |" in text
    # what the summary says of differences is what the tables say
    differing = [row for row in Checked(report).rows["pairs"] if "higher" in row["verdict"]]
    said = " ".join(report["summary"])
    assert f"{len(differing)} of 3 comparisons are statistically significant" in said
    assert all(f"{abs(row['difference']):+.3f}" in said for row in differing)


# -- by hand


def _case_means(grades: list[world.Row]) -> dict[str, dict[str, float]]:
    """Return each combination's mean score of each case: of its notes, each the mean of its grades."""
    notes: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for row in grades:
        notes[row["combination"], row["case_name"], row["note"]].append(row["score"])
    of_case: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (combination, case, _), scores in notes.items():
        of_case[combination][case].append(float(np.mean(scores)))
    return {name: {case: float(np.mean(means)) for case, means in found.items()} for name, found in of_case.items()}


def _t_interval(values: np.ndarray[Any, Any], level: float = 0.95) -> tuple[float, float]:
    half = stats.t.isf((1 - level) / 2, len(values) - 1) * stats.sem(values)
    return float(values.mean() - half), float(values.mean() + half)


def check_results(made: Checked, grades: list[world.Row], cases: dict[str, dict[str, float]]) -> None:
    expected = {}
    for name, means in cases.items():
        values = np.array(list(means.values()))
        notes: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in grades:
            if row["combination"] == name:
                notes[row["case_name"], row["overlap"]][row["note"]].append(row["score"])
        cells = [[float(np.mean(each)) for each in found.values()] for found in notes.values()]
        squares = sum(sum((score - np.mean(cell)) ** 2 for score in cell) for cell in cells)
        low, high = _t_interval(values)
        expected[(name,)] = {
            "mean": values.mean(),
            "low": low,
            "high": high,
            "standard_error": stats.sem(values),
            "cases": len(values),
            "notes": sum(map(len, cells)),
            "grades": sum(row["combination"] == name for row in grades),
            "replication_sd": math.sqrt(squares / sum(len(cell) - 1 for cell in cells)),
            "min_score": min(map(min, cells)),
            "max_score": max(map(max, cells)),
        }
    made.table("results", "combination", expected)


def check_comparisons(made: Checked, cases: dict[str, dict[str, float]]) -> None:
    differences = {}
    for one, two in combinations(cases, 2):
        shared = sorted(cases[one].keys() & cases[two].keys())
        differences[one, two] = np.array([cases[one][case] - cases[two][case] for case in shared])
    tests = {key: _tests(values) for key, values in differences.items()}
    corrected = multipletests([chosen["p_value"] for chosen, _ in tests.values()], method="holm")[1]
    expected = {}
    for (key, values), p in zip(differences.items(), corrected, strict=True):
        size, (low, high) = len(values), _t_interval(values)
        chosen, other = tests[key]
        ends = _effect_interval(stats.ttest_1samp(values, 0).statistic, size)
        expected[key] = {
            "difference": values.mean(),
            "low": low,
            "high": high,
            "standard_error": stats.sem(values),
            "p_corrected": p,
            "effect": values.mean() / values.std(ddof=1),
            "effect_low": ends[0],
            "effect_high": ends[1],
            "cases": size,
            **chosen,
        }
        row = next(row for row in made.rows["pairs"] if (row["first"], row["second"]) == key)
        assert row["alternative_p"] == pytest.approx(other, abs=1e-9)
        made.left.discard(("pairs", "alternative_p"))
    made.table("pairs", "first second", expected, within=1e-8)
    made.table("power", "first second", {key: _detectable(values) for key, values in differences.items()}, within=1e-6)
    planned = {
        ("hasty scores lower than careful",): -differences["careful", "hasty"],
        ("twin differs from careful",): -differences["careful", "twin"],
    }
    raw = [stats.ttest_1samp(values, 0).pvalue for values in planned.values()]
    hypotheses = {}
    for (key, values), p, holm in zip(planned.items(), raw, multipletests(raw, method="holm")[1], strict=True):
        low, high = _t_interval(values, 0.99)
        hypotheses[key] = {"difference": values.mean(), "low": low, "high": high, "p_value": p, "p_corrected": holm}
        hypotheses[key] |= {"cases": len(values)}
    made.table("hypotheses", "hypothesis", hypotheses, within=1e-8)
    check_overall(made, cases)


def _tests(values: np.ndarray[Any, Any]) -> tuple[Numbers, float]:
    """Return the test of so few differences, the t test unless they are not normal, and its alternative's p-value."""
    ranks = stats.wilcoxon(values, method="exact").pvalue
    if stats.shapiro(values).pvalue > 0.05:
        t = stats.ttest_1samp(values, 0)
        return {"p_value": t.pvalue, "statistic": t.statistic, "df": len(values) - 1}, ranks
    chosen = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1 == 1
    sums, seen = np.where(chosen, values, -values).sum(axis=1), values.sum()
    ties = np.isclose(sums, seen, rtol=0, atol=1e-12)
    tails = [np.mean(ties / 2 + (beyond & ~ties)) for beyond in (sums > seen, sums < seen)]
    # what the same signs do not reject lies between means of parts of the differences
    means = np.sort([values[part].mean() for part in chosen[1:]])
    low, high = np.interp([0.025 * len(sums), 0.975 * len(sums)], np.arange(1, len(sums)), means)
    return {"p_value": min(1, 2 * min(tails)), "statistic": values.mean(), "df": None, "low": low, "high": high}, ranks


def _effect_interval(t: float, size: int) -> list[float]:
    """Return the interval of a standardised mean: the noncentral t distributions of which t is an end of the middle."""

    def shift(quantile: float) -> float:
        found = brentq(lambda c: _noncentral_t(t, size - 1, c) - quantile, t - 12, t + 12, xtol=1e-13)
        return float(found) / math.sqrt(size)

    return [shift(0.975), shift(0.025)]


def _noncentral_t(t: float, df: int, shift: float) -> float:
    """Return the chance of at most t, from its definition: a normal over the root of a chi squared per df."""
    density = stats.chi2(df)
    return float(
        quad(
            lambda x: stats.norm.cdf(t * math.sqrt(x / df) - shift) * density.pdf(x),
            0,
            density.isf(1e-14),
            epsabs=1e-13,
            limit=200,
        )[0]
    )


def _detectable(values: np.ndarray[Any, Any]) -> Numbers:
    size, sd = len(values), values.std(ddof=1)
    limit = stats.t.isf(0.025, size - 1)

    def missed(effect: float) -> float:
        shift = effect * math.sqrt(size)
        return float(stats.nct.sf(limit, size - 1, shift) + stats.nct.cdf(-limit, size - 1, shift) - 0.8)

    return {"cases": size, "sd": sd, "detectable": brentq(missed, 0.1, 2, xtol=1e-12) * sd}


def check_overall(made: Checked, cases: dict[str, dict[str, float]]) -> None:
    """Repeated-measures ANOVA with Greenhouse and Geisser's correction, on the cases that all combinations have."""
    shared = sorted(set.intersection(*(set(means) for means in cases.values())))
    table = np.array([[means[case] for means in cases.values()] for case in shared])
    n, k = table.shape
    between = n * ((table.mean(axis=0) - table.mean()) ** 2).sum() / (k - 1)
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    covariance = np.cov(table.T)
    centred = covariance - covariance.mean(axis=0) - covariance.mean(axis=1, keepdims=True) + covariance.mean()
    epsilon = np.trace(centred) ** 2 / ((k - 1) * (centred**2).sum())
    ratio = between / ((rest**2).sum() / ((n - 1) * (k - 1)))
    df = (k - 1) * epsilon, (k - 1) * (n - 1) * epsilon
    expected = {"groups": k, "cases": n, "statistic": ratio, "df": df[0], "df_error": df[1]}
    test = ("Repeated-measures ANOVA, Greenhouse-Geisser corrected",)
    made.table("overall_pairs", "test", {test: expected | {"p_value": stats.f.sf(ratio, *df)}}, within=1e-8)


def check_agreement(made: Checked, grades: list[world.Row]) -> None:
    by_author: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    by_replication: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for row in grades:
        by_author[row["note"]][row["author"]].append(row["score"])
        by_replication[row["note"], row["author"]][row["replication"]] = row["score"]
    raters = next(row["raters"] for row in made.rows["agreement"] if row["measure"] == "r").split(" / ")
    empty = [math.nan]
    authors = np.array([[np.mean(found.get(name, empty)) for name in raters] for found in by_author.values()])
    repeats = np.array([[found.get(1, math.nan), found.get(2, math.nan)] for found in by_replication.values()])
    expected: dict[Key, Numbers] = {}
    for what, rated, form in (("rubric authors", authors, "ICC2"), ("repeated grades by one rubric", repeats, "ICC1")):
        both = rated[~np.isnan(rated).any(axis=1)]
        alpha = krippendorff.alpha(both.T, level_of_measurement="interval")
        expected[what, form] = _icc(both, form) | {"units": len(both)}
        expected[what, "Krippendorff alpha"] = {"value": alpha, "units": len(both)}
        if form == "ICC2":
            found = stats.pearsonr(*both.T)
            ends = found.confidence_interval()
            expected[what, "r"] = {"value": found.statistic, "low": ends.low, "high": ends.high, "units": len(both)}
            bias, ends = both[:, 0] - both[:, 1], _t_interval(both[:, 0] - both[:, 1])
            expected[what, "mean difference"] = {"value": bias.mean(), "low": ends[0], "high": ends[1]}
    made.table("agreement", "between measure", expected)
    spread: dict[Key, Numbers] = {}
    combination = {row["note"]: row["combination"] for row in grades}
    for name in {row["combination"] for row in grades}:
        for author in raters:
            pairs = np.array(
                [
                    [*found.values()]
                    for (note, of), found in by_replication.items()
                    if (combination[note], of) == (name, author) and len(found) == 2
                ]
            )
            gaps = pairs[:, 0] - pairs[:, 1]
            spread[name, author] = {"note_count": len(pairs), "replication_sd": math.sqrt((gaps**2).mean() / 2)}
            spread[name, author] |= {"mean_absolute_difference": abs(gaps).mean()}
    made.table("replication_agreement", "combination rubric_author", spread, within=5.1e-5)  # the view rounds


def _icc(scores: np.ndarray[Any, Any], form: str) -> dict[str, float]:
    """Shrout & Fleiss (1979), with their intervals, of two ratings of each thing."""
    n, k = scores.shape
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    between = k * ((rows - scores.mean()) ** 2).sum() / (n - 1)
    within = ((scores - rows[:, None]) ** 2).sum() / (n * (k - 1))
    raters = n * ((columns - scores.mean()) ** 2).sum() / (k - 1)
    error = ((scores - rows[:, None] - columns + scores.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    if form == "ICC1":
        low = between / within / stats.f.ppf(0.975, n - 1, n * (k - 1))
        high = between / within * stats.f.ppf(0.975, n * (k - 1), n - 1)
        value = (between - within) / (between + (k - 1) * within)
        return {"value": value, "low": (low - 1) / (low + k - 1), "high": (high - 1) / (high + k - 1)}
    value = (between - error) / (between + (k - 1) * error + k * (raters - error) / n)
    f = raters / error
    top = (k - 1) * (n - 1) * (k * value * f + n * (1 + (k - 1) * value) - k * value) ** 2
    v = top / ((n - 1) * k**2 * value**2 * f**2 + (n * (1 + (k - 1) * value) - k * value) ** 2)
    upper, lower = stats.f.ppf(0.975, n - 1, v), stats.f.ppf(0.975, v, n - 1)
    rest = k * raters + (k * n - k - n) * error
    low = n * (between - upper * error) / (upper * rest + n * between)
    high = n * (lower * between - error) / (rest + n * lower * between)
    return {"value": value, "low": low, "high": high}


def check_cases(made: Checked, grades: list[world.Row], cases: dict[str, dict[str, float]]) -> None:
    notes: dict[Key, set[int]] = defaultdict(set)
    for row in grades:
        notes[row["case_name"], row["combination"]].add(row["note"])
    every = {
        (case, name): {"mean": mean, "notes": len(notes[case, name])}
        for name, means in cases.items()
        for case, mean in means.items()
    }
    made.table("cases", "case combination", every)
    away: dict[Key, dict[str, float]] = {}
    for name, means in cases.items():
        middle = np.median(list(means.values()))
        spread = np.median([abs(mean - middle) for mean in means.values()])
        for case, mean in means.items():
            away[case, name] = {"mean": mean, "away": mean - middle, "z": 0.6745 * (mean - middle) / spread}
    lowest = sorted(away, key=lambda key: (away[key]["mean"], *key))[:8]
    made.table("lowest_cases", "case combination", {key: away[key] for key in lowest})
    outlying = {key: row for key, row in away.items() if abs(row["z"]) > 3.5}
    if outlying or "outliers" in made.rows:
        made.table("outliers", "case combination", outlying)


def check_costs(made: Checked, db: world.Database, run: int) -> None:
    calls = world.rows(db, _CALLS, run)
    spent = {kind: sum(row["cost_usd"] for row in calls if row["kind"] == kind) for kind in ("note", "grade")}
    notes = world.value(db, "select count(*) from pgharness.notes where run_id = %s", run)
    total = {
        "call_count": len(calls),
        "input_tokens": sum(row["input_tokens"] for row in calls),
        "output_tokens": sum(row["output_tokens"] for row in calls),
        "note_cost_usd": spent["note"],
        "grade_cost_usd": spent["grade"],
        "cost_usd": sum(spent.values()),
        "usd_per_note": sum(spent.values()) / notes,
        "wasted_cost_usd": sum(row["cost_usd"] for row in calls if row["outcome"] != "succeeded"),
    }
    made.table("costs", "run", {("study/1",): total}, within=1e-8)
    expected: dict[Key, Numbers] = {}
    for key in {(row["model"], row["kind"]) for row in calls}:
        mine = [row for row in calls if (row["model"], row["kind"]) == key]
        fine = [row["latency_ms"] for row in mine if row["outcome"] == "succeeded"]
        limited = sum(row["outcome"] == "rate_limited" for row in mine)
        expected[key] = {
            "call_count": len(mine),
            "calls_succeeded": len(fine),
            "calls_rate_limited": limited,
            "calls_failed": len(mine) - len(fine) - limited,
            "cost_usd": sum(row["cost_usd"] for row in mine),
        }
        expected[key] |= {
            name: sum(row[name] for row in mine) for name in ("input_tokens", "output_tokens", "cached_tokens")
        }
        ranks = {f"latency_p{rank}_ms": round(float(np.percentile(fine, rank)), 1) for rank in (50, 90, 95, 99)}
        found = next(row for row in made.rows["models_performance"] if (row["model"], row["kind"]) == key)
        assert all(abs(found[name] - rank) < 0.1001 for name, rank in ranks.items())
        made.left -= {("models_performance", name) for name in ranks}
        assert all(one <= two for one, two in pairwise(ranks.values()))
    made.table("models_performance", "model kind", expected)
    prices = "select name, input_usd_per_million::double precision as input, output_usd_per_million::double precision as output from pgharness.models where name like 'study/%%'"
    made.table("models", "model", {(row.pop("name"),): row for row in world.rows(db, prices)})


def check_failures(made: Checked, db: world.Database, run: int) -> None:
    failed = world.rows(
        db, "select kind, cause, ordinal from pgharness.failures where run_id = %s and status = 'failed'", run
    )
    notes, grades = (sum(row["kind"] == kind for row in failed) for kind in ("note", "grade"))
    assert notes and grades, "the study is made so that some fail"
    planned = CASES * len(planted.COMBINATIONS) * 3
    expected = {"notes": planned, "notes_failed": notes, "grades": planned * 4, "grades_failed": grades}
    made.table("completeness", "run", {("study/1",): expected | {"grades_skipped": notes * 4, "missing": 0}})
    causes: dict[Key, dict[str, int]] = defaultdict(lambda: {"items_failed": 0, "calls_failed": 0})
    for row in failed:
        causes[row["kind"], row["cause"]]["items_failed"] += 1
    for row in world.rows(db, _CALLS, run):
        if row["outcome"] != "succeeded":
            causes[row["kind"], row["outcome"]]["calls_failed"] += 1
    made.table("failure_causes", "kind cause", causes)
    rubrics: dict[Key, dict[str, int]] = defaultdict(lambda: {"rubric_count": 0, "criterion_count": 0})
    for row in world.rows(db, "select author, jsonb_array_length(criteria) as criteria from pgharness.rubrics"):
        rubrics[(row["author"],)]["rubric_count"] += 1
        rubrics[(row["author"],)]["criterion_count"] += row["criteria"]
    made.table("rubrics", "author", rubrics)
