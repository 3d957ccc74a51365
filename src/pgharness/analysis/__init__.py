"""Analyses of what runs found: scores out of the database, statistics over them, results that explain themselves.

`load_scores` reads a million grades in seconds; `compare`, `agreement`, `power` and `sweep` are pure functions of what
it returns. `KINDS` is what the database calls them.
"""

from pgharness.analysis.agreement import Agreement, Measure, agreement
from pgharness.analysis.comparison import Comparison, GroupEstimate, PairComparison, compare
from pgharness.analysis.kinds import KINDS, analyse, analyse_scores, library_versions
from pgharness.analysis.planning import Detectable, PowerAdvice, power
from pgharness.analysis.scores import CaseTable, Combination, Run, Scores, load_scores
from pgharness.analysis.sweep import Point, Sweep, Trend, sweep

__all__ = [
    "KINDS",
    "Agreement",
    "CaseTable",
    "Combination",
    "Comparison",
    "Detectable",
    "GroupEstimate",
    "Measure",
    "PairComparison",
    "Point",
    "PowerAdvice",
    "Run",
    "Scores",
    "Sweep",
    "Trend",
    "agreement",
    "analyse",
    "analyse_scores",
    "compare",
    "library_versions",
    "load_scores",
    "power",
    "sweep",
]
