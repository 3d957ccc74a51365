"""What was registered before a run started: its hypotheses, tested as planned, and every deviation from the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pgharness import stats
from pgharness.analysis import PairComparison, compare
from pgharness.database import Row
from pgharness.errors import InvalidArgument
from pgharness.report.model import Block, Column, Paragraph, Points, Section, shown
from pgharness.report.reading import RunData
from pgharness.report.sections import counted, run_column, table_of

_BY_AUTHOR = "mean_score by "
_HYPOTHESES = (
    Column("hypothesis", "Hypothesis"),
    Column("text", "In words"),
    Column("difference", "Difference", "difference", "Mean over shared cases of the first minus the second."),
    Column("low", "CI low", "difference"),
    Column("high", "CI high", "difference"),
    Column("p_value", "p", "p", "Two-sided, before correction."),
    Column("p_corrected", "Corrected p", "p", "Corrected for the registered hypotheses alone."),
    Column("verdict", "Verdict"),
)


def plan_of(run: RunData) -> Row | None:
    """Return what was registered for a run, as it was frozen at its start; None without."""
    found = (run.provenance["definition"] or {}).get("preregistration")
    return found if isinstance(found, dict) else None


def registered(data: Sequence[RunData], *, alpha: float) -> Section | None:
    """The registered hypotheses with their tests, and how run and report deviate from the plan; None without a plan."""
    blocks: list[Block] = []
    rows: list[Row] = []
    deviations: list[str] = []
    for run in data:
        plan = plan_of(run)
        if plan is None:
            continue
        where = f"Run {run.name}: " if len(data) > 1 else ""
        blocks.append(
            Paragraph(
                f"{where}registered by {plan['created_by']} at {shown(plan['created_at'], 'time')}, before the run "
                f"started: {len(plan['hypotheses'])} {'hypothesis' if len(plan['hypotheses']) == 1 else 'hypotheses'} "
                f"on {plan['primary_metric']}, test {plan['test']}, alpha = {plan['alpha']:g}, correction "
                f"{plan['correction']}, with {counted(plan['case_count'], 'case')}."
            )
        )
        tested, troubles = _tested(run, plan)
        rows += [{"run": run.name} | row for row in tested]
        deviations += [f"{where}{text}" for text in (*_deviations(run, plan, alpha), *troubles)]
    if not blocks:
        return None
    if rows:
        columns = (*run_column(data), *_HYPOTHESES)
        note = (
            "Tests are two-sided; a directed hypothesis is supported only if the difference has its direction as well."
        )
        blocks.append(table_of("hypotheses", "Registered hypotheses", columns, rows, [note]))
    blocks.append(Paragraph("Deviations from the plan:" if deviations else "There is no deviation from the plan."))
    blocks += [Points(tuple(deviations))] if deviations else []
    return Section("preregistration", "Preregistration", tuple(blocks))


def _tested(run: RunData, plan: Row) -> tuple[list[Row], list[str]]:
    """Test each hypothesis as planned; return the rows, and what could not be done as planned."""
    if run.scores is None:
        return [], ["there are no grades, so no hypothesis could be tested."]
    scores = run.scores
    if plan["primary_metric"].startswith(_BY_AUTHOR):
        author = plan["primary_metric"].removeprefix(_BY_AUTHOR)
        try:
            scores = scores.select(authors=[author])
        except InvalidArgument as exc:
            return [], [f"the primary metric could not be computed: {exc}."]
    made = compare(scores, by="combination", alpha=plan["alpha"], test=plan["test"])
    pairs = {(pair.first, pair.second): pair for pair in made.pairs}
    found: list[tuple[Row, PairComparison | None, int]] = []
    for hypothesis in plan["hypotheses"]:
        names = hypothesis["first"], hypothesis["second"]
        sign = 1 if names in pairs else -1
        found.append((hypothesis, pairs.get(names) or pairs.get(names[::-1]), sign))
    values = [pair.p_value for _, pair, _ in found if pair is not None and pair.p_value is not None]
    corrected = iter(stats.adjust(values, correction=plan["correction"]).adjusted if values else ())
    rows = []
    for hypothesis, pair, sign in found:
        p = float(next(corrected)) if pair is not None and pair.p_value is not None else None
        rows.append(_row(hypothesis, pair, sign, p, plan["alpha"]))
    return rows, []


def _row(hypothesis: Row, pair: PairComparison | None, sign: int, p: float | None, alpha: float) -> Row:
    direction = hypothesis.get("direction") or "different"
    said = "differs from" if direction == "different" else f"scores {direction} than"
    row: dict[str, Any] = {
        "hypothesis": f"{hypothesis['first']} {said} {hypothesis['second']}",
        "text": hypothesis.get("text"),
        "verdict": "cannot be tested",
    }
    if pair is None or pair.difference is None:
        return row
    difference = sign * pair.difference
    ends = sorted(sign * end for end in (pair.interval.low, pair.interval.high)) if pair.interval else [None, None]
    row |= {"difference": difference, "low": ends[0], "high": ends[1], "p_value": pair.p_value, "p_corrected": p}
    if p is not None:
        agrees = {"higher": difference > 0, "lower": difference < 0, "different": True}[direction]
        row["verdict"] = "supported" if p < alpha and agrees else "contradicted" if p < alpha else "not supported"
    return row


def _deviations(run: RunData, plan: Row, alpha: float) -> list[str]:
    items = []
    for row in run.deviations:
        if row["deviation"] != "analyses":  # this report tests what was planned
            where = "" if row["analysis_id"] is None else f"analysis {row['analysis_id']}, "
            items.append(
                f"{where}{row['deviation']}: planned {row['planned'] or 'none'}, was {row['actual'] or 'none'}."
            )
    if run.progress["status"] != "completed":
        items.append(f"the run is {run.progress['status']}.")
    failed = run.progress["notes_failed"] + run.progress["grades_failed"]
    if failed:
        items.append(f"{failed:,} notes or grades failed and are missing from the tests.")
    if plan["alpha"] != alpha:
        items.append(f"outside of this section the report uses alpha = {alpha:g}, planned was {plan['alpha']:g}.")
    planned = {frozenset((each["first"], each["second"])) for each in plan["hypotheses"]}
    compared = [frozenset((pair.first, pair.second)) for pair in run.comparison.pairs] if run.comparison else []
    more = sum(1 for pair in compared if pair not in planned)
    if more:
        items.append(f"the report compares {counted(more, 'further pair')} of combinations, which is exploratory.")
    return items
