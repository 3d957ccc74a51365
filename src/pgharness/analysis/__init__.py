"""Analyses of what runs found: scores out of the database, statistics over them, results that explain themselves.

`load_scores` reads a million grades in seconds; `compare`, `agreement`, `power` and `sweep` are pure functions of what
it returns. `KINDS` is what the database calls them. The names are made when they are first asked for: a worker, which
has others compute, needs none of the libraries.
"""

import importlib

_PLACES = {
    "SELECTING": "kinds",
    "Agreement": "graders",
    "CaseTable": "scores",
    "Combination": "scores",
    "Comparison": "comparison",
    "Detectable": "planning",
    "GroupEstimate": "comparison",
    "KINDS": "kinds",
    "Measure": "graders",
    "PairComparison": "comparison",
    "Point": "trends",
    "PowerAdvice": "planning",
    "Run": "scores",
    "Scores": "scores",
    "Sweep": "trends",
    "Trend": "trends",
    "agreement": "graders",
    "analyse": "kinds",
    "analyse_scores": "kinds",
    "compare": "comparison",
    "library_versions": "kinds",
    "load_scores": "scores",
    "power": "planning",
    "sweep": "trends",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"pgharness.analysis.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
