"""The sections on scores: means with their uncertainty, what code recorded, and each case, the outlying ones first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgharness.analysis import Scores
from pgharness.database import Row
from pgharness.report.model import (
    Block,
    Column,
    Figure,
    Paragraph,
    Section,
    Table,
    Value,
    drawn,
    shown,
    some_of,
    table_of,
)
from pgharness.report.reading import RunData, label, run_column

_LISTED_OUTLIERS = 12
_LISTED_LOWEST = 8
_FEWEST_CASES = 5  # among which one can be called an outlier
# a modified z beyond 3.5 marks an outlier: Iglewicz & Hoaglin (1993), How to detect and handle outliers
_OUTLYING = 3.5
_BINS = 20
_OVERLAPS = 101  # percentages

_SCORES = (
    Column("combination", "Combination", about="Generator and grader, as frozen at the start of the run."),
    Column(
        "mean", "Mean score", "score", "Mean over cases, of the mean of each one's notes; a share of the highest score."
    ),
    Column("low", "CI low", "score"),
    Column("high", "CI high", "score"),
    Column("standard_error", "SE", "score", "Standard error over cases."),
    Column("cases", "Cases", "count", "Cases with a scored note: what is sampled."),
    Column("notes", "Notes", "count", "Notes with a grade."),
    Column("grades", "Grades", "count"),
    Column("replication_sd", "Replication SD", "score", "Spread between notes of one case.", is_detail=True),
    Column("min_score", "Lowest", "score", "Of a note.", is_detail=True),
    Column("max_score", "Highest", "score", "Of a note.", is_detail=True),
)


def estimates(data: Sequence[RunData]) -> list[Row]:
    """Return the estimate of each run's combinations, in the order of the run, as rows."""
    rows = []
    for run in data:
        if run.scores is None or run.comparison is None:
            continue
        spreads = _spreads(run.scores)
        for group in run.comparison.groups:
            rows.append(
                {
                    "run": run.name,
                    "combination": group.name,
                    "label": label(data, run.name, group.name),
                    "cases": group.cases,
                    "notes": group.notes,
                    "grades": group.grades,
                    "mean": group.mean,
                    "standard_error": group.standard_error,
                    "low": group.interval.low if group.interval else None,
                    "high": group.interval.high if group.interval else None,
                    **spreads[group.name],
                }
            )
    return rows


def _spreads(scores: Scores) -> dict[str, Row]:
    """Return each combination's lowest and highest note, and the pooled spread of notes of one case and overlap."""
    notes, first = scores.note_means()
    combination = scores.combination[first].astype(np.int64)
    place = (combination * len(scores.cases) + scores.case[first]) * _OVERLAPS + scores.overlap[first]
    places, cell = np.unique(place, return_inverse=True)
    means = np.bincount(cell, notes) / np.bincount(cell)
    size = len(scores.combinations)
    squares = np.bincount(combination, (notes - means[cell]) ** 2, size)
    freedom = np.bincount(combination, minlength=size) - np.bincount(
        places // (len(scores.cases) * _OVERLAPS), minlength=size
    )
    found = {}
    for number in np.unique(combination):
        mine = notes[combination == number]
        found[scores.combinations[number]] = {
            "replication_sd": float(np.sqrt(squares[number] / freedom[number])) if freedom[number] else None,
            "min_score": float(mine.min()),
            "max_score": float(mine.max()),
        }
    return found


def results(data: Sequence[RunData]) -> Section:
    """The mean score of each combination with its uncertainty, and what a run's code recorded."""
    blocks: list[Block] = []
    rows = estimates(data)
    if rows:
        level = next(f"{100 * (1 - run.comparison.alpha):g}%" for run in data if run.comparison)
        notes: tuple[str, ...] = (
            "Scores are shares of the highest possible score, 0 to 1. A case counts once, however many notes it has; "
            f"standard errors count cases, and the {level} intervals use Student's t. They are not cut off at 0 or 1.",
            "Whether two intervals overlap says little about a difference: see Comparisons.",
        )
        scored = {(row["run"], row["combination"]) for row in rows}
        planned = [(run.name, row["name"]) for run in data for row in run.combinations]
        lacking = [label(data, *each) for each in planned if each not in scored]
        if lacking:
            notes = (f"Without a score: {some_of(lacking)}.", *notes)
        columns = (*run_column(data), *_SCORES)
        blocks.append(table_of("results", f"Mean scores with {level} confidence intervals", columns, rows, notes))
        blocks.append(_intervals(rows, level))
        blocks.append(_distributions(data))
    elif not all(run.is_code for run in data):
        blocks.append(Paragraph("No note has a grade, so there are no scores to report."))
    blocks += _recorded(data)
    return Section("results", "Results", tuple(blocks) or (Paragraph("The runs recorded no results."),))


def _recorded(data: Sequence[RunData]) -> list[Block]:
    """Return what the code of runs recorded: its results, and its metrics in short."""
    blocks: list[Block] = []
    if rows := [{"run": run.name} | row for run in data for row in run.results]:
        columns = (*run_column(data), Column("key", "Result"), Column("value", "Value"))
        blocks.append(
            table_of("recorded_results", "Results that the code recorded, the latest of each key", columns, rows)
        )
    if rows := [{"run": run.name} | row for run in data for row in run.metrics]:
        columns = (
            *run_column(data),
            Column("name", "Metric"),
            Column("value_count", "Values", "count"),
            Column("mean_value", "Mean", "measure"),
            Column("min_value", "Lowest", "measure"),
            Column("max_value", "Highest", "measure"),
            Column("last_value", "Last", "measure"),
        )
        blocks.append(table_of("recorded_metrics", "Metrics that the code recorded", columns, rows))
    return blocks


def _intervals(rows: Sequence[Row], level: str) -> Figure:
    points = [{"label": row["label"], "value": row["mean"], "low": row["low"], "high": row["high"]} for row in rows]
    caption = f"Mean score of each combination with its {level} confidence interval over cases."
    return drawn("estimates", "intervals", caption, "mean score", points, _interval_in_words)


def _interval_in_words(point: dict[str, Any]) -> str:
    text = f"{point['label']} {shown(point['value'], 'score')}"
    if point["low"] is None:
        return text
    return f"{text} [{shown(point['low'], 'score')}, {shown(point['high'], 'score')}]"


def _distributions(data: Sequence[RunData]) -> Figure:
    rows = [
        {
            "label": label(data, each.run.name, each.combination),
            "bins": np.histogram(each.means.clip(0, 1), _BINS, (0, 1))[0].tolist(),
            "median": float(np.median(each.means)),
            "count": len(each.means),
        }
        for each in _scored(data)
    ]
    caption = f"Cases by their mean score, in {_BINS} bins; the line marks the median case."
    return drawn(
        "distributions",
        "distributions",
        caption,
        "mean score of a case",
        rows,
        lambda row: f"{row['label']}: median {shown(row['median'], 'score')}",
    )


# -- cases


_CASES = (
    Column("case", "Case"),
    Column("combination", "Combination"),
    Column("mean", "Mean score", "score", "Mean of the case's notes."),
)
_OUTLIERS = (
    *_CASES,
    Column("away", "From the median case", "difference"),
    Column("z", "Modified z", "number", "0.6745 x (mean - median) / median absolute deviation."),
)


@dataclass(frozen=True, slots=True)
class _Scored:
    """The cases that a run's combination has a score of, and those scores."""

    run: RunData
    combination: str
    cases: list[str]
    means: NDArray[np.float64]
    notes: NDArray[np.int64]

    def row(self, place: int, **more: object) -> Row:
        mean = float(self.means[place])
        return {"run": self.run.name, "combination": self.combination, "case": self.cases[place], "mean": mean} | more


def _scored(data: Sequence[RunData]) -> Iterator[_Scored]:
    for run in data:
        if run.cases is None:
            continue
        for name, means, notes in zip(run.cases.names, run.cases.means, run.cases.notes, strict=True):
            places = np.flatnonzero(~np.isnan(means))
            yield _Scored(run, name, [run.cases.cases[place] for place in places], means[places], notes[places])


def cases(data: Sequence[RunData]) -> Section | None:
    """The cases that score unlike the others, per combination, the lowest ones, and the mean of each; None without."""
    if all(run.cases is None for run in data):
        return None
    found: list[Row] = []
    lowest: list[Row] = []
    for each in _scored(data):
        if len(each.cases) < _FEWEST_CASES:
            continue
        away = each.means - np.median(each.means)
        spread = float(np.median(np.abs(away)))
        z = 0.6745 * away / spread if spread else np.full(len(away), np.nan)
        first = np.argsort(each.means, kind="stable")[:_LISTED_LOWEST]
        rows = [
            each.row(place, away=float(away[place]), z=float(z[place]) if spread else None)
            for place in {*np.flatnonzero(np.abs(z) > _OUTLYING), *first}
        ]
        found += [row for row in rows if row["z"] is not None and abs(row["z"]) > _OUTLYING]
        lowest += rows
    blocks = [*_outlying(data, found, lowest)] if lowest else []
    return Section("cases", "Cases", (*blocks, _all_cases(data)))


def _outlying(data: Sequence[RunData], found: list[Row], lowest: list[Row]) -> Iterator[Block]:
    columns = (*run_column(data), *_OUTLIERS)
    found.sort(key=lambda row: (-abs(row["z"]), row["case"], row["combination"]))
    lowest.sort(key=lambda row: (row["mean"], row["case"], row["combination"]))
    rule = f"Modified z-scores beyond ±{_OUTLYING} of a combination's case means (Iglewicz & Hoaglin 1993)"
    if found:
        more = f"The {_LISTED_OUTLIERS} farthest of {len(found):,}." if len(found) > _LISTED_OUTLIERS else ""
        notes = [text for text in (f"{rule}. None was left out of any result.", more) if text]
        yield table_of("outliers", "Outlying cases", columns, found[:_LISTED_OUTLIERS], notes)
    else:
        yield Paragraph(f"No case is an outlier by the rule used. Rule: {rule[0].lower()}{rule[1:]}.")
    caption = "The lowest-scoring cases, worth reading first"
    yield table_of("lowest_cases", caption, columns, lowest[:_LISTED_LOWEST])


def _all_cases(data: Sequence[RunData]) -> Table:
    """Return what all tests are made of: with it, others can make them again."""
    columns = (*run_column(data), *_CASES, Column("notes", "Notes", "count", "Notes with a grade."))
    rows: list[tuple[Value, ...]] = []
    for each in _scored(data):
        first = (each.run.name,) if len(data) > 1 else ()
        values = zip(each.cases, each.means.tolist(), each.notes.tolist(), strict=True)
        rows += [(*first, case, each.combination, mean, notes) for case, mean, notes in values]
    notes = ("All tests and intervals of combinations follow from these means alone.",)
    return Table("cases", "Mean score of each case", columns, tuple(rows), notes, is_data=True)
