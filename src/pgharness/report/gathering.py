"""Gathering: one pass over runs' views and their analysis makes the document that every format shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from psycopg import Connection

from pgharness import __version__
from pgharness.report.comparing import comparisons, families
from pgharness.report.costs import costs, failures
from pgharness.report.judging import agreements, limits, powers
from pgharness.report.methods import methods, provenance
from pgharness.report.model import Paragraph, Report, Section, Verbatim
from pgharness.report.overview import reproduction, summary, title
from pgharness.report.reading import read
from pgharness.report.registered import plans, registered
from pgharness.report.results import cases, results


def gather(connection: Connection[Any], runs: Sequence[str], *, alpha: float = 0.05) -> Report:
    """Return the report on runs given by name or id, which are compared if there are several.

    Read it over a snapshot, so that its numbers are of one state. alpha is the level of tests, 1 - alpha that of
    intervals. Raises NotFound, and WrongState for an archived run.
    """
    data = [read(connection, run, alpha=alpha) for run in dict.fromkeys(runs)]
    data = list({run.run_id: run for run in data}.values())
    found = families(connection, data, alpha=alpha)
    planned = plans(data)
    heading, subtitle = title(data)
    names = tuple(run.name for run in data)
    commands, about = reproduction(names)
    sections = (
        results(data),
        registered(data, planned, alpha=alpha),
        comparisons(data, found) if any(run.scores for run in data) else None,
        powers(data, alpha=alpha),
        agreements(data, alpha=alpha) if any(run.scores for run in data) else None,
        cases(data),
        costs(data),
        failures(data),
        limits(data, found, is_registered=len(planned) == len(data)),
        methods(data, _STATISTICS if any(run.scores for run in data) else ()),
        provenance(data),
        Section("reproduction", "Reproduction", (Paragraph(about), Verbatim("Commands", commands))),
    )
    return Report(
        title=heading,
        subtitle=subtitle,
        summary=summary(data, found, planned),
        sections=tuple(section for section in sections if section is not None),
        runs=names,
        alpha=alpha,
        software={"pgharness": __version__},
    )


_STATISTICS = (
    "A note's score is the mean of its grades, a case's the mean of its notes: the case is the unit, so repeated "
    "notes and "
    "grades do not count as more evidence than they are (Miller 2024, Adding error bars to evals).",
    "Combinations and runs are compared on the cases that they share. The test follows from the design and the "
    "data and is "
    "named with its reasons beside each comparison, and a robust alternative is given in the data (JSON, CSV).",
    "P-values are corrected for all comparisons of a table; a difference is only called one where the corrected "
    "test says so.",
)
