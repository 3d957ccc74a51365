"""The kinds of analyses: what each is called in the database, which function makes it, and what it may be told."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from psycopg import Connection

from pgharness import __version__, stats
from pgharness.analysis.comparison import compare
from pgharness.analysis.graders import agreement
from pgharness.analysis.planning import power
from pgharness.analysis.scores import Scores, load_scores
from pgharness.analysis.trends import sweep
from pgharness.errors import InvalidArgument

SELECTING = ("combinations", "cases", "authors")


class Analysed(Protocol):
    """What an analysis returns."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-safe values."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of analysis; options are what it may be told besides which scores to use."""

    function: Callable[..., Analysed]
    options: frozenset[str]
    required: frozenset[str] = frozenset()


def ablation(scores: Scores, **options: Any) -> Analysed:
    """Compare each variant with one baseline, which has to be named."""
    return compare(scores, **options)


_COMPARING = frozenset({"by", "alpha", "correction", "baseline", "test", "outcome", "seed"})
KINDS: dict[str, Kind] = {
    "compare": Kind(compare, _COMPARING),
    "ablation": Kind(ablation, _COMPARING, required=frozenset({"baseline"})),
    "sweep": Kind(sweep, frozenset({"parameter", "alpha", "correction"}), required=frozenset({"parameter"})),
    "agreement": Kind(agreement, frozenset({"between", "scale", "alpha", "seed"})),
    "power": Kind(
        power,
        frozenset({"by", "alpha", "power", "baseline", "difference", "note_usd", "grade_usd", "case_usd"}),
    ),
}


def analyse(connection: Connection[Any], kind: str, run_ids: Sequence[int], options: Mapping[str, Any]) -> Analysed:
    """Load what an analysis needs and make it. Raises InvalidArgument for what cannot be analysed, and says why."""
    return analyse_scores(load_scores(connection, run_ids), kind, options)


def analyse_scores(scores: Scores, kind: str, options: Mapping[str, Any]) -> Analysed:
    """Make an analysis of scores that are loaded already."""
    if kind not in KINDS:
        raise InvalidArgument(f"there is no analysis of kind {kind!r}", hint=f"It is one of {', '.join(KINDS)}.")
    known = KINDS[kind]
    unknown = sorted(options.keys() - known.options - set(SELECTING))
    if unknown:
        raise InvalidArgument(
            f"{kind} has no option {unknown[0]!r}", hint=f"It has {', '.join(sorted(known.options | set(SELECTING)))}."
        )
    if lacking := sorted(known.required - options.keys()):
        raise InvalidArgument(f"{kind} needs the option {lacking[0]!r}", hint=f"Give it: --set {lacking[0]}=VALUE")
    chosen = {name: _listed(name, options[name]) for name in SELECTING if name in options}
    try:
        return known.function(
            scores.select(**chosen), **{name: value for name, value in options.items() if name not in SELECTING}
        )
    except stats.InvalidSample as exc:
        raise InvalidArgument(str(exc)) from exc


def library_versions() -> dict[str, str]:
    """Return what computed an analysis: it is made again when this changes."""
    libraries = {name: version(name) for name in ("numpy", "scipy")}
    return {"pgharness": __version__, "python": platform.python_version()} | libraries


def _listed(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise InvalidArgument(f"{name} is {value!r}: give a list of names")
    return value
