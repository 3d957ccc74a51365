"""The section that compares: differences on shared cases, each with its test and what that allows to say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

from pgharness.analysis import Comparison, PairComparison, compare, load_scores
from pgharness.database import Row
from pgharness.report.model import (
    Block,
    Column,
    Figure,
    Paragraph,
    Points,
    Section,
    Table,
    counted,
    drawn,
    shown,
    some_of,
    table_of,
)
from pgharness.report.reading import RunData
from pgharness.stats.results import Result

_SENTENCES = 15

_PAIRS = (
    Column("first", "First"),
    Column("second", "Second"),
    Column("difference", "Difference", "difference", "Mean over shared cases of first minus second."),
    Column("low", "CI low", "difference"),
    Column("high", "CI high", "difference"),
    Column("standard_error", "SE", "score", "Standard error of the difference.", is_detail=True),
    Column("p_value", "p", "p", "Of the test, before correction."),
    Column("p_corrected", "Corrected p", "p", "Corrected for all pairs of this table."),
    Column("verdict", "Verdict", about="What the corrected test allows to say."),
    Column("effect", "Effect size", "number", "Standardised; the column Effect says which one it is."),
    Column("effect_low", "Effect low", "number", is_detail=True),
    Column("effect_high", "Effect high", "number", is_detail=True),
    Column("effect_name", "Effect", about="Which effect size.", is_detail=True),
    Column("cases", "Cases", "count", "Cases that both have: the pairs that are tested."),
    Column("test", "Test"),
    Column("statistic", "Statistic", "number", "Of the test.", is_detail=True),
    Column("df", "df", "number", "Degrees of freedom of the test.", is_detail=True),
    Column("alternative", "Robust alternative", about="Another test of the same pair.", is_detail=True),
    Column("alternative_p", "Its p", "p", "Not corrected.", is_detail=True),
)
_OVERALL = (
    Column("test", "Test"),
    Column("groups", "Groups", "count"),
    Column("cases", "Cases", "count", "Cases that all of them have."),
    Column("statistic_name", "Statistic"),
    Column("statistic", "Value", "number"),
    Column("df", "df", "number"),
    Column("df_error", "df of error", "number"),
    Column("p_value", "p", "p"),
)


@dataclass(frozen=True, slots=True)
class Family:
    """Comparisons whose p-values were corrected together, and what they are of."""

    key: str
    title: str
    comparison: Comparison


def families(connection: Connection[Any], data: Sequence[RunData], *, alpha: float) -> tuple[Family, ...]:
    """Return the comparisons of a report: the combinations of each run, and where there are several runs, those.

    Runs are compared by each combination that two or more of them have with the same models; without any, as a whole if
    each has a single combination. A mean over different combinations is compared with nothing.
    """
    found = [
        Family(f"pairs_{place}" if len(data) > 1 else "pairs", f"Combinations of run {run.name}", run.comparison)
        for place, run in enumerate(data, 1)
        if run.comparison and len(run.comparison.groups) > 1
    ]
    scored = [run for run in data if run.scores]
    shared = _shared(scored)
    for place, (name, runs) in enumerate(shared, 1):
        scores = load_scores(connection, [run.run_id for run in runs]).select(combinations=[name])
        made = compare(scores, by="run", alpha=alpha)
        found.append(Family(f"runs_{place}", f"Runs with combination {name}", made))
    if not shared and len(scored) > 1 and all(len(run.combinations) == 1 for run in scored):
        scores = load_scores(connection, [run.run_id for run in scored])
        found.append(Family("runs", "Runs, each of one combination", compare(scores, by="run", alpha=alpha)))
    return tuple(found)


def _shared(data: Sequence[RunData]) -> list[tuple[str, list[RunData]]]:
    """Return the combinations that several runs have with the same models and parameters, with those runs."""
    found: dict[str, tuple[str, list[RunData]]] = {}
    for run in data:
        for row in run.combinations:
            made = json.dumps([row["name"], _identity(row["generator"]), _identity(row["grader"])], sort_keys=True)
            found.setdefault(made, (row["name"], []))[1].append(run)
    return [(name, runs) for name, runs in found.values() if len(runs) > 1]


def _identity(model: Row | None) -> object:
    return model and [model.get(name) for name in ("name", "provider", "model", "parameters", "members")]


def comparisons(data: Sequence[RunData], found: Sequence[Family]) -> Section:
    """A table, the sentences and a figure for each family of comparisons."""
    blocks: list[Block] = []
    for family in found:
        blocks += _family(family, is_titled=len(found) > 1)
    if not found:
        blocks.append(Paragraph("There is one group of scores, so there is nothing to compare."))
    elif len(data) > 1 and not any(family.comparison.by == "run" for family in found):
        text = "The runs have no combination in common with the same models and parameters, so runs are not compared."
        blocks.append(Paragraph(text))
    return Section("comparisons", "Comparisons", tuple(blocks))


def _family(family: Family, *, is_titled: bool) -> list[Block]:
    made = family.comparison
    level = f"{100 * (1 - made.alpha):g}%"
    tested = [pair for pair in made.pairs if pair.p_value is not None]
    notes = [
        "Differences are first minus second, over the cases that both have.",
        f"Intervals are of {level} and not corrected; the verdict follows the corrected p-value at alpha = "
        f"{made.alpha:g}. "
        + (
            f"{counted(len(tested), 'p-value')} corrected together ({made.correction.capitalize()})."
            if len(tested) > 1
            else "There is one test, so nothing to correct."
        ),
    ]
    caption = family.title if is_titled else "Pairwise differences on shared cases"
    blocks: list[Block] = []
    blocks.append(table_of(family.key, caption, _PAIRS, [_pair_row(pair) for pair in made.pairs], notes))
    blocks.append(_differences(family, level))
    if made.overall is not None:
        blocks.append(_overall(family, made.overall.result))
    sentences = [pair.sentence for pair in made.pairs]
    if len(sentences) > _SENTENCES:
        sentences = [*sentences[:_SENTENCES], f"{len(sentences) - _SENTENCES} more pairs are in the table."]
    blocks.append(Points(tuple(sentences)))
    blocks += _reasons(made)
    return blocks


def _overall(family: Family, result: Result) -> Table:
    note = "It asks whether any of them differ at all; the pairs are judged by their own corrected tests."
    row = _statistic(result) | {"groups": len(family.comparison.groups), "p_value": result.p_value}
    row |= {"cases": result.n if isinstance(result.n, int) else None}
    return table_of(f"overall_{family.key}", f"{family.title}: all together", _OVERALL, [row], [note])


def _statistic(result: Result | None) -> Row:
    if result is None:
        return {}
    df = result.df[0] if isinstance(result.df, tuple) else result.df
    return {
        "test": result.test,
        "statistic_name": result.statistic_name,
        "statistic": result.statistic,
        "df": df,
        "df_error": result.df[1] if isinstance(result.df, tuple) else None,
    }


def _pair_row(pair: PairComparison) -> Row:
    other = pair.choice.alternative if pair.choice else None
    effect = pair.effect
    return {
        "first": pair.first,
        "second": pair.second,
        "cases": pair.cases,
        "difference": pair.difference,
        "standard_error": pair.standard_error,
        "low": pair.interval.low if pair.interval else None,
        "high": pair.interval.high if pair.interval else None,
        "effect_name": effect.name if effect else None,
        "effect": effect.value if effect else None,
        "effect_low": effect.interval.low if effect and effect.interval else None,
        "effect_high": effect.interval.high if effect and effect.interval else None,
        **_statistic(pair.choice.result if pair.choice else None),
        "p_value": pair.p_value,
        "p_corrected": pair.p_corrected,
        "alternative": other.test if other else None,
        "alternative_p": other.p_value if other else None,
        "verdict": pair.verdict,
    }


def _differences(family: Family, level: str) -> Figure:
    points = [
        {
            "label": f"{pair.first} \N{MINUS SIGN} {pair.second}",
            "of": [pair.first, pair.second],
            "value": pair.difference,
            "low": pair.interval.low if pair.interval else None,
            "high": pair.interval.high if pair.interval else None,
            "differs": bool(pair.differs),
        }
        for pair in family.comparison.pairs
        if pair.difference is not None
    ]
    caption = (
        f"{family.title}: mean differences with {level} intervals; filled where the corrected test finds a difference."
    )
    axis = "difference of mean scores"
    return drawn(f"differences_{family.key}", "differences", caption, axis, points, _difference_in_words)


def _difference_in_words(point: dict[str, Any]) -> str:
    ends = f"{shown(point['low'], 'difference')}, {shown(point['high'], 'difference')}"
    return f"{point['label']}: {shown(point['value'], 'difference')} [{ends}]"


def _reasons(made: Comparison) -> list[Block]:
    """Say why these tests: once for each set of reasons, and what about the data weakens them."""
    reasons: dict[str, list[str]] = {}
    warnings: dict[str, list[str]] = {}
    for pair in made.pairs:
        name = f"{pair.first} against {pair.second}"
        if pair.choice is not None:
            told = f"{pair.choice.result.test}: {'; '.join(pair.choice.reasons)}"
            reasons.setdefault(told, []).append(name)
        for warning in pair.warnings:
            warnings.setdefault(warning, []).append(name)
    items = [f"Why {told} ({_named(names, made)})." for told, names in reasons.items()]
    items += [f"Note: {warning} ({_named(names, made)})." for warning, names in warnings.items()]
    items += [f"Note: {warning}." for warning in made.warnings]
    return [Points(tuple(items))] if items else []


def _named(names: list[str], made: Comparison) -> str:
    return "all pairs" if len(names) == len(made.pairs) > 1 else some_of(names)
