"""What a design could have found, and where the next dollar buys most precision."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from pgharness import stats
from pgharness.analysis.comparison import pairs_of, warnings_of
from pgharness.analysis.scores import By, Scores
from pgharness.errors import InvalidArgument
from pgharness.stats.evaluation import (
    PrecisionAdvice,
    VarianceParts,
    advise_precision,
    coded_variance_parts,
    difference_parts,
)
from pgharness.stats.power import PairedMeans, PilotAdvice, advise_from_pilot, detectable_effect
from pgharness.stats.results import json_safe


@dataclass(frozen=True, slots=True)
class Detectable:
    """What a pair's design finds with the power asked for: detectable is a difference in units of the score.

    parts splits the variance of the difference; advice says what to buy more of; needed says how many cases find the
    difference that would matter, where one was given.
    """

    first: str
    second: str
    cases: int
    sd: float
    detectable: float
    parts: VarianceParts
    advice: PrecisionAdvice
    needed: PilotAdvice | None
    sentence: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class PowerAdvice:
    """What the pairs of a comparison could have found, at the level alpha before corrections, with a power."""

    by: By
    alpha: float
    power: float
    pairs: tuple[Detectable, ...]
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the advice as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


def power(
    scores: Scores,
    *,
    by: By | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
    baseline: str | None = None,
    difference: float | None = None,
    note_usd: float | None = None,
    grade_usd: float | None = None,
    case_usd: float = 0.0,
) -> PowerAdvice:
    """Say what difference each pair could have found, and what to buy more of.

    difference is the smallest that would matter, in units of the score (0..1). Prices are by default what the runs'
    notes and grades cost.
    """
    by = by or ("run" if len(scores.runs) > 1 else "combination")
    table = scores.case_table(by)
    parts = _parts(scores, by)
    prices, remarks = _prices(scores, note_usd, grade_usd)
    pairs = []
    warnings = [*warnings_of(scores, table, by), *remarks]
    for first, second in pairs_of(table, by, baseline):
        one, two = table.names[first], table.names[second]
        shared = table.shared(first, second)
        differences = table.means[first][shared] - table.means[second][shared]
        sides = parts[one], parts[two]
        if sides[0] is None or sides[1] is None or len(differences) < 2 or not np.ptp(differences) > 1e-12:
            warnings.append(f"{one} and {two}: too few shared cases, or differences that do not vary")
            continue
        pairs.append(
            _pair(
                (one, two),
                differences,
                difference_parts(sides[0], sides[1], differences),
                level=(alpha, power),
                difference=difference,
                prices=(*prices, case_usd),
            )
        )
    if not pairs:
        raise InvalidArgument(
            "there is no pair whose power could be told" + (f" ({warnings[-1]})" if warnings else ""),
            hint="Power needs two combinations or runs with grades of at least 2 shared cases.",
        )
    return PowerAdvice(by, alpha, power, tuple(pairs), tuple(warnings))


def _parts(scores: Scores, by: By) -> dict[str, VarianceParts | None]:
    """Return each group's variance parts, None where it has too few cases."""
    codes, names = scores.groups(by)
    found = dict[str, VarianceParts | None]()
    for number in np.unique(codes):
        mine = scores.rows(codes == number)
        case = np.unique(mine.case, return_inverse=True)[1]
        try:
            found[names[number]] = coded_variance_parts(mine.score, case, mine.note.astype(np.intp))
        except stats.InvalidSample:
            found[names[number]] = None
    return found


def _pair(
    names: tuple[str, str],
    differences: np.ndarray[Any, np.dtype[np.float64]],
    parts: VarianceParts,
    *,
    level: tuple[float, float],
    difference: float | None,
    prices: tuple[float, float, float],
) -> Detectable:
    cases, sd = len(differences), float(np.std(differences, ddof=1))
    alpha, wanted = level
    found = _detectable(cases, wanted, alpha) * sd
    note_usd, grade_usd, case_usd = prices
    # a difference is paid twice: each of its notes and grades is made by both systems
    advice = advise_precision(parts, note_usd=2 * note_usd, grade_usd=2 * grade_usd, case_usd=case_usd)
    needed = None
    if difference is not None:
        needed = advise_from_pilot(sd, cases, difference=abs(difference), power=wanted, alpha=alpha)
    sentence = (
        f"{names[0]} against {names[1]}: {cases} shared cases find a difference of {found:.3f} with "
        f"{100 * wanted:.0f}% power at alpha = {alpha:g}, one pair alone; {advice.reason}."
    )
    if needed is not None:
        sentence += f" For a difference of {abs(difference or 0):g}: {needed.reason}."
    return Detectable(*names, cases, sd, found, parts, advice, needed, sentence, parts.warnings)


@functools.cache
def _detectable(cases: int, power: float, alpha: float) -> float:
    """Return the mean difference that so many pairs find, in standard deviations: the same for all pairs of a run."""
    return detectable_effect(PairedMeans(0.5), cases, power=power, alpha=alpha).effect


def _prices(
    scores: Scores, note_usd: float | None, grade_usd: float | None
) -> tuple[tuple[float, float], tuple[str, ...]]:
    known = [
        [price for price in (getattr(run, name) for run in scores.runs) if price is not None]
        for name in ("note_usd", "grade_usd")
    ]
    note, grade = (
        given if given is not None else (sum(found) / len(found) if found else 0.0)
        for given, found in zip((note_usd, grade_usd), known, strict=True)
    )
    if note + grade <= 0:
        return (1.0, 1.0), ("nothing was paid for these runs: a note and a grade are taken to cost the same",)
    return (note, grade), ()
