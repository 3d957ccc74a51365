"""What was registered before a run started: its hypotheses, tested as planned, and every deviation from the plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pgharness import stats
from pgharness.analysis import PairComparison, compare
from pgharness.database import Row
from pgharness.errors import InvalidArgument
from pgharness.report.model import Block, Column, Paragraph, Points, Section, counted, shown, table_of
from pgharness.report.reading import RunData, run_column

_BY_AUTHOR = "mean_score by "
_CORRECTIONS = {
    "bonferroni": "Bonferroni",
    "holm": "Holm",
    "hochberg": "Hochberg",
    "bh": "Benjamini-Hochberg",
    "by": "Benjamini-Yekutieli",
}
_HYPOTHESES = (
    Column("hypothesis", "Hypothesis"),
    Column("text", "In words"),
    Column("difference", "Difference", "difference", "Mean over shared cases of the first minus the second."),
    Column("low", "CI low", "difference"),
    Column("high", "CI high", "difference"),
    Column("p_value", "p", "p", "Two-sided, before correction."),
    Column("p_corrected", "Corrected p", "p", "Corrected for the registered hypotheses alone."),
    Column("cases", "Cases", "count", "Cases that both have."),
    Column("test", "Test", is_detail=True),
    Column("verdict", "Verdict"),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run as it was frozen at the run's start, a row for each of its hypotheses with what came of it.

    trouble says why nothing could be tested as planned.
    """

    run: RunData
    planned: Row
    rows: list[Row]
    trouble: str = ""

    @property
    def rule(self) -> str:
        """At which level its hypotheses are judged, and how they are corrected."""
        correction = f", corrected ({_CORRECTIONS[self.planned['correction']]})" if len(self.rows) > 1 else ""
        return f"alpha = {self.planned['alpha']:g}{correction}"


def plans(data: Sequence[RunData]) -> tuple[Plan, ...]:
    """Return the plan of each run that has one, its hypotheses tested as planned."""
    found = []
    for run in data:
        planned = (run.provenance["definition"] or {}).get("preregistration")
        if isinstance(planned, dict):
            found.append(_tested(run, planned))
    return tuple(found)


def registered(data: Sequence[RunData], found: Sequence[Plan], *, alpha: float) -> Section | None:
    """The registered hypotheses with their tests, and how run and report deviate from the plan; None without a plan."""
    planned_runs = {plan.run.run_id for plan in found}
    blocks: list[Block] = []
    for run in data:
        if run.late_plans and run.run_id not in planned_runs:
            at = shown(run.late_plans[0]["created_at"], "time")
            text = f"after it had started: run {run.name} has no plan, and all that follows is exploratory."
            blocks.append(Paragraph(f"A plan was registered at {at}, {text}"))
    if not found:
        return Section("preregistration", "Preregistration", tuple(blocks)) if blocks else None
    deviations: list[str] = []
    for plan in found:
        where = f"Run {plan.run.name}: " if len(data) > 1 else ""
        planned = plan.planned
        count = len(planned["hypotheses"])
        blocks.append(
            Paragraph(
                f"{where}Registered by {planned['created_by']} at {shown(planned['created_at'], 'time')}, before the "
                f"run started: {count} {'hypothesis' if count == 1 else 'hypotheses'} on {planned['primary_metric']}, "
                f"test {planned['test']}, alpha = {planned['alpha']:g}, correction {planned['correction']}, with "
                f"{counted(planned['case_count'], 'case')}."
            )
        )
        deviations += [f"{where}{text}" for text in _deviations(plan, alpha)]
    if rows := [{"run": plan.run.name} | row for plan in found for row in plan.rows]:
        columns = (*run_column(data), *_HYPOTHESES)
        levels = " and ".join(dict.fromkeys(f"{100 * (1 - plan.planned['alpha']):g}%" for plan in found))
        note = (
            "Tests are two-sided; a directed hypothesis is supported only if the difference has its direction as well. "
            f"Intervals are of {levels} and not corrected."
        )
        blocks.append(table_of("hypotheses", "Registered hypotheses", columns, rows, [note]))
    blocks.append(Paragraph("Deviations from the plan:" if deviations else "There is no deviation from the plan."))
    blocks += [Points(tuple(deviations))] if deviations else []
    return Section("preregistration", "Preregistration", tuple(blocks))


def _tested(run: RunData, planned: Row) -> Plan:
    """Test each hypothesis as planned."""
    scores = run.scores
    if scores is None:
        return Plan(run, planned, [], "there are no grades, so no hypothesis could be tested.")
    if planned["primary_metric"].startswith(_BY_AUTHOR):
        try:
            scores = scores.select(authors=[planned["primary_metric"].removeprefix(_BY_AUTHOR)])
        except InvalidArgument as exc:
            return Plan(run, planned, [], f"the primary metric could not be computed: {exc}.")
    made = compare(scores, by="combination", alpha=planned["alpha"], test=planned["test"])
    pairs = {(pair.first, pair.second): pair for pair in made.pairs}
    found: list[tuple[Row, PairComparison | None, int]] = []
    for hypothesis in planned["hypotheses"]:
        names = hypothesis["first"], hypothesis["second"]
        sign = 1 if names in pairs else -1
        found.append((hypothesis, pairs.get(names) or pairs.get(names[::-1]), sign))
    values = [pair.p_value for _, pair, _ in found if pair is not None and pair.p_value is not None]
    corrected = iter(stats.adjust(values, correction=planned["correction"]).adjusted if values else ())
    rows = []
    for hypothesis, pair, sign in found:
        p = float(next(corrected)) if pair is not None and pair.p_value is not None else None
        rows.append(_row(hypothesis, pair, sign, p, planned["alpha"]))
    return Plan(run, planned, rows)


def _row(hypothesis: Row, pair: PairComparison | None, sign: int, p: float | None, alpha: float) -> Row:
    direction = hypothesis.get("direction") or "different"
    said = "differs from" if direction == "different" else f"scores {direction} than"
    row: dict[str, Any] = {
        "hypothesis": f"{hypothesis['first']} {said} {hypothesis['second']}",
        "text": hypothesis.get("text"),
        "cases": pair.cases if pair else 0,
        "verdict": "cannot be tested",
    }
    if pair is None or pair.difference is None:
        return row
    difference = sign * pair.difference
    ends = sorted(sign * end for end in (pair.interval.low, pair.interval.high)) if pair.interval else [None, None]
    row |= {"difference": difference, "low": ends[0], "high": ends[1], "p_value": pair.p_value, "p_corrected": p}
    row["test"] = pair.choice.result.test if pair.choice else None
    if p is not None:
        agrees = {"higher": difference > 0, "lower": difference < 0, "different": True}[direction]
        row["verdict"] = "supported" if p < alpha and agrees else "contradicted" if p < alpha else "not supported"
    return row


def _deviations(plan: Plan, alpha: float) -> Iterator[str]:
    """Say what is not as planned: of the run, of analyses of it in the database, and of this report."""
    run, planned = plan.run, plan.planned
    if plan.trouble:
        yield plan.trouble
    for row in run.deviations:
        if row["deviation"] != "analyses":  # this report tests what was planned
            where = "" if row["analysis_id"] is None else f"analysis {row['analysis_id']}, "
            yield f"{where}{row['deviation']}: planned {row['planned'] or 'none'}, was {row['actual'] or 'none'}."
    for row in plan.rows:
        if row["verdict"] == "cannot be tested":
            yield f"not tested: {row['hypothesis']}; they share {counted(row['cases'], 'case')} with grades."
        elif row["cases"] != planned["case_count"]:
            count = counted(row["cases"], "case")
            yield f"{row['hypothesis']}: tested on {count}, planned were {planned['case_count']:,}."
    if run.progress["status"] != "completed":
        yield f"the run is {run.progress['status']}."
    failed = run.progress["notes_failed"] + run.progress["grades_failed"]
    if failed:
        yield f"{failed:,} notes or grades failed and are missing from the tests."
    others = [
        f"{name} {used}, planned was {was}"
        for name, used, was in (
            ("alpha =", f"{alpha:g}", f"{planned['alpha']:g}"),
            ("test", "auto", planned["test"]),
            ("correction", "holm", planned["correction"]),
            ("metric", "mean_score", planned["primary_metric"]),
        )
        if used != was
    ]
    if others:
        yield f"outside of this section the report uses {'; '.join(others)}."
    hypotheses = {frozenset((each["first"], each["second"])) for each in planned["hypotheses"]}
    compared = [frozenset((pair.first, pair.second)) for pair in run.comparison.pairs] if run.comparison else []
    more = sum(1 for pair in compared if pair not in hypotheses)
    if more:
        yield f"the report compares {counted(more, 'further pair')} of combinations, which is exploratory."
    for late in run.late_plans:
        at = shown(late["created_at"], "time")
        yield f"another plan was registered at {at}, after the run had started: it is not used."
