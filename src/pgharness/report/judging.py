"""The sections that judge the evidence: whether graders agree, what could have been found, what cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

from pgharness.analysis import Measure, agreement, power
from pgharness.errors import InvalidArgument
from pgharness.report.comparing import Family
from pgharness.report.model import Block, Column, Paragraph, Points, Section, counted, shown, table_of
from pgharness.report.reading import RunData, run_column

_FEW_CASES = 30
_BETWEEN: dict[Literal["author", "replication"], str] = {
    "author": "rubric authors",
    "replication": "repeated grades by one rubric",
}
_MEASURES = (
    Column("between", "Between"),
    Column("raters", "Raters"),
    Column("measure", "Measure"),
    Column("value", "Value", "score"),
    Column("low", "CI low", "score"),
    Column("high", "CI high", "score"),
    Column("units", "Rated", "count", "How many things two or more of them rated."),
    Column("method", "Method", is_detail=True),
)
_POWER = (
    Column("first", "First"),
    Column("second", "Second"),
    Column("cases", "Shared cases", "count"),
    Column("sd", "SD of differences", "score", "Of the differences by case."),
    Column("detectable", "Detectable difference", "score", "Found with 80% power, by one test without correction."),
)


def agreements(data: Sequence[RunData], *, alpha: float) -> Section:
    """How far rubric authors agree, and the grader with itself."""
    rows = []
    warnings: dict[str, None] = {}
    for run in data:
        for between, name in _BETWEEN.items():
            if run.scores is None:
                continue
            with suppress(InvalidArgument):  # nothing was graded twice in this way
                found = agreement(run.scores, between=between, alpha=alpha)
                # of two raters, what holds of all holds of the pair
                measures = {(measure.raters, measure.name): measure for measure in found.measures}
                rows += [{"run": run.name, "between": name} | _measure(measure) for measure in measures.values()]
                warnings |= dict.fromkeys(found.warnings)
    if not rows:
        text = "No note was graded twice by one rubric or by rubrics of two authors, so agreement cannot be told."
        return Section("agreement", "Agreement of grades", (Paragraph(text),))
    notes = ["ICC and Krippendorff's alpha are 1 for perfect agreement and about 0 for none."]
    notes += [f"{warning[0].upper()}{warning[1:]}." for warning in warnings]
    columns = (*run_column(data), *_MEASURES)
    blocks: list[Block] = [table_of("agreement", "Agreement between grades of the same notes", columns, rows, notes)]
    spread = [row for run in data for row in run.replication_agreement]
    if spread:
        columns = (
            *run_column(data),
            Column("combination", "Combination"),
            Column("rubric_author", "Rubric author"),
            Column("note_count", "Notes", "count"),
            Column("replication_sd", "SD between grades", "score"),
            Column("mean_absolute_difference", "Mean absolute difference", "score"),
        )
        caption = "How far repeated grades of one note by one rubric differ"
        blocks.append(table_of("replication_agreement", caption, columns, spread))
    return Section("agreement", "Agreement of grades", tuple(blocks))


def _measure(measure: Measure) -> dict[str, object]:
    value = measure.value
    return {
        "raters": " / ".join(measure.raters) if len(measure.raters) < 4 else counted(len(measure.raters), "rater"),
        "measure": measure.name,
        "value": None if value != value else value,
        "low": measure.interval.low if measure.interval else None,
        "high": measure.interval.high if measure.interval else None,
        "units": measure.units,
        "method": measure.method,
    }


def powers(data: Sequence[RunData], *, alpha: float) -> Section | None:
    """What difference each pair of combinations could have found; None where there is no pair."""
    rows, sentences = [], []
    for run in data:
        if run.scores is None or run.comparison is None or len(run.comparison.groups) < 2:
            continue
        with suppress(InvalidArgument):  # no pair varies
            for pair in power(run.scores, by="combination", alpha=alpha).pairs:
                row = {"run": run.name, "first": pair.first, "second": pair.second, "cases": pair.cases}
                rows.append(row | {"sd": pair.sd, "detectable": pair.detectable})
                sentences.append(pair.sentence)
    if not rows:
        return None
    notes = (
        "Sensitivity of the design as it was run, by the observed spread of differences. This is not power at "
        "the observed "
        "effect, which only restates the p-value (Hoenig & Heisey 2001).",
    )
    columns = (*run_column(data), *_POWER)
    table = table_of("power", f"What the design could find, at alpha = {alpha:g} and 80% power", columns, rows, notes)
    return Section("power", "Sensitivity", (table, Points(tuple(sentences[:10]))))


def limits(data: Sequence[RunData], found: Sequence[Family], *, is_registered: bool) -> Section:
    """What the design cannot show, in plain words; every item follows from the rows."""
    told: dict[str, list[str]] = {}
    for run in data:
        for text in (*_of_sample(run), *_of_graders(run), *_of_execution(run)):
            told.setdefault(text, []).append(run.name)
    items = [_about(text, names, data) for text, names in told.items()]
    tests = sum(1 for family in found for pair in family.comparison.pairs if pair.p_value is not None)
    if len(found) > 1:
        items.append(
            f"P-values are corrected within each of the {len(found)} tables of comparisons, not over all {tests} "
            "tests together."
        )
    if any(pair.differs is False for family in found for pair in family.comparison.pairs):
        items.append(
            "Where no difference was shown, that is not evidence of equality: see Sensitivity for what could be found."
        )
    if tests and not is_registered:
        items.append(
            "No hypothesis or primary metric was registered before the runs started, so the comparisons are "
            "exploratory."
        )
    if any(run.is_code for run in data):
        items.append(
            "Results and metrics of code are what the code said; nothing here tests them or says how sure they are."
        )
    return Section("limits", "Limits", (Points(tuple(items)),) if items else (Paragraph("None is known."),))


def gravest(data: Sequence[RunData]) -> str:
    """Return what the summary should not be read without; nothing where nothing is that grave."""
    found = [f"run {run.name} is {run.progress['status']}" for run in data if run.progress["status"] != "completed"]
    scored = [max(group.cases for group in run.comparison.groups) for run in data if run.comparison]
    if scored and min(scored) < _FEW_CASES:
        found.append(f"only {counted(min(scored), 'case')} {'has' if min(scored) == 1 else 'have'} a score")
    if scored and any(row["generator"].get("provider") == "simulator" for run in data for row in run.combinations):
        found.append("generators are simulated")
    return f"Mind that {' and that '.join(found)}: see Limits." if found else ""


def _about(text: str, runs: Sequence[str], data: Sequence[RunData]) -> str:
    """Return a limit with the runs that have it, unless all have."""
    if len(runs) == len(data):
        return f"{text[0].upper()}{text[1:]}"
    return f"Run {runs[0]}: {text}" if len(runs) == 1 else f"Runs {', '.join(runs)}: {text}"


def _of_sample(run: RunData) -> list[str]:
    made, items = run.provenance, []
    cases = max((group.cases for group in run.comparison.groups), default=0) if run.comparison else 0
    if 0 < cases < _FEW_CASES:
        items.append(
            f"only {counted(cases, 'case')} {'has' if cases == 1 else 'have'} a score: intervals lean on the cases' "
            "being roughly normal, and small differences stay unseen."
        )
    if cases:
        items.append(
            "intervals and tests hold for cases drawn like these; of other kinds of cases, prompts or later "
            "versions of "
            "the models they say nothing."
        )
    if cases and (made["note_replications"] or 1) == 1:
        items.append(
            "each case has one note of each combination, so chance in generation cannot be told from the case."
        )
    if cases and (made["grade_replications"] or 1) == 1 and _graded_by_models(run):
        items.append("each note has one grade of each rubric, so the grader's own noise was not measured.")
    if made["seed"] is not None and cases:
        items.append(f"all was made with one seed ({made['seed']}) and one set of prompts; others were not tried.")
    return items


def _graded_by_models(run: RunData) -> bool:
    return any(row["grader"] and row["grader"].get("provider") != "metric" for row in run.combinations)


def _of_graders(run: RunData) -> list[str]:
    items = []
    if _graded_by_models(run):
        items.append(
            "grades come from models and no person graded the same notes in this run: that the grader is right is an "
            "assumption, not a finding."
        )
    own = [row["name"] for row in run.combinations if row["grader"] and _same(row["generator"], row["grader"])]
    if own:
        items.append(
            f"the grader is the generator itself in {', '.join(own)}: models tend to prefer their own answers, so "
            "these "
            "scores may be too high."
        )
    graders = {(row["grader"] or {}).get("name") for row in run.combinations}
    if len(graders) > 1:
        items.append("combinations have different graders, so their scores differ by the graders' strictness as well.")
    if any(row["generator"].get("provider") == "simulator" for row in run.combinations):
        items.append("generators are simulated: the scores say nothing about real models.")
    written = [row["author"] for row in run.rubrics if not row["is_human"]]
    if written:
        items.append(f"rubrics of {', '.join(written)} were written by models.")
    return items


def _same(generator: dict[str, object], grader: dict[str, object]) -> bool:
    return all(generator.get(name) == grader.get(name) for name in ("provider", "model", "base_url")) and (
        bool(generator.get("model")) or generator.get("name") == grader.get("name")
    )


def _of_execution(run: RunData) -> list[str]:
    row, items = run.progress, []
    if row["status"] in ("running", "paused"):
        items.append(f"the run is {row['status']}: its numbers will change, and looking early spoils p-values.")
    elif row["status"] != "completed":
        reason = f" ({row['reason']})" if row["reason"] else ""
        items.append(f"the run is {row['status']}{reason}, so it is not whole.")
    failed = row["notes_failed"] + row["grades_failed"]
    open_ = run.missing
    if failed or open_:
        told = [f"{counted(failed, 'item')} failed for good"] if failed else []
        told += [f"{counted(open_, 'item')} {'is' if open_ == 1 else 'are'} undecided"] if open_ else []
        items.append(f"{' and '.join(told)}: what is missing may not be missing at random.")
    if row["status"] == "completed" and run.provenance["response_cache"] not in (None, "off"):
        items.append(
            f"answers may come from the response cache ({run.provenance['response_cache']}), so they are not "
            "independent of "
            "earlier runs, and latencies and costs are not those of fresh calls."
        )
    if any("(dirty)" in commit for commit in run.provenance["worker_git_commits"] or []):
        items.append("workers ran in a working directory with changes that were not committed.")
    if row["notes_succeeded"] and not run.provenance["worker_versions"]:
        items.append("no worker of this harness is on record for the run, so its software versions are unknown.")
    items += [f"a budget of {shown(row['budget_usd'], 'usd')} USD applied."] if row["budget_usd"] else []
    return items
