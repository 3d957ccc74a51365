"""Comparing systems on the cases that they share: estimates, differences, tests, and what may be said of them.

The case is the unit: notes and grades of a case are averaged first, and standard errors count cases. The test of each
pair is chosen by `pgharness.stats.compare`; p-values of all pairs are corrected together, and a verdict says that two
systems differ only where the corrected test does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from pgharness import stats
from pgharness.analysis.scores import By, CaseTable, Scores, place_of
from pgharness.stats.multiplicity import Correction
from pgharness.stats.results import Effect, Interval, Result, apa_estimate, apa_p, json_safe
from pgharness.stats.samples import FloatArray
from pgharness.stats.selection import Choice, Outcome

_FEW_CASES = 10
Test = Literal["auto", "t", "wilcoxon", "sign", "permutation", "mcnemar"]
_CORRECTION_NAMES = {
    "bonferroni": "Bonferroni",
    "holm": "Holm",
    "hochberg": "Hochberg",
    "bh": "Benjamini-Hochberg",
    "by": "Benjamini-Yekutieli",
}


@dataclass(frozen=True, slots=True)
class GroupEstimate:
    """The mean score of one group (0..1) with its standard error over cases; both ends are None for a single case."""

    name: str
    grades: int
    notes: int
    cases: int
    mean: float
    standard_error: float | None
    interval: Interval | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PairComparison:
    """Two groups on the cases that they share; difference is first minus second, in units of the score.

    standard_error and df are of the mean difference by case, None where it does not vary or one case alone is shared;
    interval is the one that goes with the test, or else Student's t. choice is the test with its reasons and the
    alternative beside it, None where nothing can be tested; p_value is its p-value, p_corrected that value corrected
    for all pairs. differs is what the corrected test says, None without a test.
    """

    first: str
    second: str
    cases: int
    difference: float | None
    standard_error: float | None
    df: float | None
    interval: Interval | None
    effect: Effect | None
    choice: Choice | None
    p_value: float | None
    p_corrected: float | None
    differs: bool | None
    verdict: str
    sentence: str
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-safe values."""
        found = {name: json_safe(getattr(self, name)) for name in self.__slots__ if name != "choice"}
        chosen, other = (self.choice.result, self.choice.alternative) if self.choice else (None, None)
        return found | {
            "test": chosen.test if chosen else None,
            "reasons": list(self.choice.reasons) if self.choice else [],
            "result": json_safe(chosen),
            "alternative": json_safe(other),
            "agrees": self.choice.agrees if self.choice else None,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Groups of scores with their estimates, and their pairs: all of them, or each with the baseline.

    overall tests whether several groups differ at all, on the cases that all share; None for two. p_corrected of pairs
    are corrected by `correction`; alpha is the level of tests, 1 - alpha that of intervals.
    """

    by: By
    alpha: float
    correction: Correction
    baseline: str | None
    groups: tuple[GroupEstimate, ...]
    pairs: tuple[PairComparison, ...]
    overall: Choice | None
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-safe values."""
        return {name: json_safe(getattr(self, name)) for name in self.__slots__}


def compare(
    scores: Scores,
    *,
    by: By | None = None,
    alpha: float = 0.05,
    correction: Correction = "holm",
    baseline: str | None = None,
    test: Test = "auto",
    outcome: Outcome | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare combinations or runs (by default runs, if there are several) on the cases that they share.

    baseline names the group that all others are compared with (each other minus it); without, every pair is compared.
    test fixes the test beforehand in place of the automatic choice; outcome says what scores are ("binary", "ordinal",
    "continuous") where that is not to be seen from them. seed is for tests by permutation.
    """
    by = by or ("run" if len(scores.runs) > 1 else "combination")
    table = scores.case_table(by)
    drafts = [
        _pair(table, *pair, alpha=alpha, test=test, outcome=outcome, seed=seed)
        for pair in pairs_of(table, by, baseline)
    ]
    return Comparison(
        by=by,
        alpha=alpha,
        correction=correction,
        baseline=baseline,
        groups=tuple(_estimate(table, place, alpha) for place in range(len(table.names))),
        pairs=_judged(drafts, alpha, correction),
        overall=_overall(table, alpha, outcome) if test == "auto" else None,
        warnings=warnings_of(scores, table, by),
    )


def pairs_of(table: CaseTable, by: By, baseline: str | None) -> list[tuple[int, int]]:
    """Return the places of all pairs of groups, or of each group with the baseline."""
    if baseline is None:
        return list(combinations(range(len(table.names)), 2))
    base = place_of(baseline, table.names, by)
    return [(place, base) for place in range(len(table.names)) if place != base]


def warnings_of(scores: Scores, table: CaseTable, by: By) -> tuple[str, ...]:
    """Return what about the data weakens any comparison of these groups."""
    found = [
        f"run {run.name} is {run.status}: stopping a run for what its scores look like spoils the p-values"
        for run in scores.runs
        if run.status in ("running", "paused")
    ]
    if len(table.names) < 2:
        found.append(f"there is one {by} with grades, so nothing to compare it with")
    if by == "run" and len({frozenset(one.name for one in run.combinations) for run in scores.runs}) > 1:
        found.append("the runs have different combinations: a difference of runs is one of their mixtures")
    if by == "combination":
        every = [one for run in scores.runs for one in run.combinations]
        models = {(one.name, one.generator, one.grader, str(one.parameters)) for one in every}
        if len(models) > len({name for name, *_ in models}):
            found.append("combinations of one name have different models or parameters in these runs, and count as one")
    used = table.notes[:, table.shared()]
    if used.size and (used != used[0]).any():
        found.append("the groups have different numbers of graded notes of a case; every case counts once all the same")
    return tuple(found)


def _estimate(table: CaseTable, place: int, alpha: float) -> GroupEstimate:
    means = table.means[place]
    means = means[~np.isnan(means)]
    name, error, interval = table.names[place], None, None
    warnings: tuple[str, ...] = ("one case says nothing of how cases vary",)
    mean = float(means.mean())
    if len(means) > 1:
        found = stats.mean_score(means, cases=range(len(means)), level=1 - alpha)
        mean, error, interval, warnings = found.value, found.standard_error, found.interval, found.warnings
    return GroupEstimate(
        name, int(table.grades[place]), int(table.notes[place].sum()), len(means), mean, error, interval, warnings
    )


def _pair(
    table: CaseTable, first: int, second: int, *, alpha: float, test: Test, outcome: Outcome | None, seed: int
) -> PairComparison:
    """Return a comparison without its correction: its verdict and sentence are still to come."""
    names = (table.names[first], table.names[second])
    shared = table.shared(first, second)
    one, two = table.means[first][shared], table.means[second][shared]
    dropped = int((~np.isnan(table.means[[first, second]])).any(axis=0).sum()) - len(one)
    warnings: tuple[str, ...] = (f"{dropped} cases that only one of them has were left out",) if dropped else ()
    draft = PairComparison(
        *names,
        cases=len(one),
        difference=float(np.mean(one) - np.mean(two)) if len(one) else None,
        standard_error=None,
        df=None,
        interval=None,
        effect=None,
        choice=None,
        p_value=None,
        p_corrected=None,
        differs=None,
        verdict="cannot be compared",
        sentence=f"{names[0]} and {names[1]} cannot be compared: they share {len(one)} cases, at least 2 are needed.",
        warnings=warnings,
    )
    if len(one) < 2:
        return draft
    choice = _tested(dict(zip(names, (one, two), strict=True)), test, alpha, outcome, seed)
    draft = replace(draft, choice=choice, p_value=choice.result.p_value, effect=choice.result.effect)
    try:
        means = choice.result if choice.result.test == "Paired t test" else stats.paired_t(one, two, alpha=alpha)
    except stats.InvalidSample:  # equally far apart in every case
        return replace(
            draft, warnings=(*warnings, "the difference is the same in every case: it has no standard error")
        )
    assert not isinstance(means.df, tuple)
    if means is choice.result and len(one) < _FEW_CASES:
        warnings += (f"only {len(one)} shared cases: the p-value and interval lean on normality",)
    return replace(
        draft,
        difference=means.estimate,
        standard_error=float(np.std(one - two, ddof=1) / math.sqrt(len(one))),
        df=means.df,
        interval=_interval_of(choice.result) or means.interval or Interval(0.0, 0.0, 1 - alpha),
        effect=means.effect or choice.result.effect,
        warnings=warnings,
    )


def _interval_of(result: Result) -> Interval | None:
    """Return the interval of the mean difference that goes with a test, so that both tell the same; None without."""
    if result.estimate_name not in ("mean difference", "difference of proportions") or result.interval is None:
        return None
    return result.interval if math.isfinite(result.interval.width) else None


def _tested(groups: dict[str, FloatArray], test: Test, alpha: float, outcome: Outcome | None, seed: int) -> Choice:
    if test == "auto":
        return stats.compare(groups, paired=True, alpha=alpha, outcome=outcome, rng=seed)
    one, two = groups.values()
    first, second = groups
    options: dict[str, Any] = dict(alpha=alpha, names=(first, second))
    result: Result
    match test:
        case "t":
            result = stats.paired_t(one, two, **options)
        case "wilcoxon":
            result = stats.wilcoxon_signed_rank(one, two, **options)
        case "sign":
            result = stats.sign_test(one, two, **options)
        case "permutation":
            result = stats.paired_permutation_test(one, two, rng=seed, **options)
        case "mcnemar":
            result = stats.mcnemar(stats.paired_table(one, two, names=(first, second)), alpha=alpha)
    return Choice(result, None, outcome or "continuous", ("the test was fixed beforehand",))


def _judged(drafts: Sequence[PairComparison], alpha: float, correction: Correction) -> tuple[PairComparison, ...]:
    tested = [draft.p_value for draft in drafts if draft.p_value is not None]
    corrected = iter(stats.adjust(tested, correction=correction).adjusted if tested else ())
    named = _CORRECTION_NAMES[correction] if len(tested) > 1 else None
    return tuple(draft if draft.p_value is None else _told(draft, next(corrected), alpha, named) for draft in drafts)


def _told(draft: PairComparison, corrected: float, alpha: float, named: str | None) -> PairComparison:
    assert draft.choice is not None and draft.difference is not None and draft.p_value is not None
    differs = corrected < alpha
    result = draft.choice.result
    verdict, ending = "no difference shown", "no difference was shown, which is not evidence that there is none"
    if differs:
        verdict = f"{draft.first if draft.difference > 0 else draft.second} scores higher"
        ending = "they differ"
        if draft.difference == 0:
            verdict, ending = "differs", "they differ, though not in their means"
    said = apa_estimate("mean difference", draft.difference, draft.interval)
    correction = f", {apa_p(corrected).replace('p', 'corrected p', 1)} ({named})" if named else ""
    warnings = draft.warnings
    if draft.interval is not None and (0 in draft.interval) == (draft.p_value < alpha):
        warnings += ("the interval of the mean and the test do not tell the same: report both",)
    if not draft.choice.agrees:
        warnings += ("the test and its alternative do not agree: report both",)
    sentence = (
        f"{draft.first} against {draft.second} on {draft.cases} shared cases: {said}; {result.test}, "
        f"{apa_p(draft.p_value)}{correction}: {ending}."
    )
    return replace(draft, p_corrected=corrected, differs=differs, verdict=verdict, sentence=sentence, warnings=warnings)


def _overall(table: CaseTable, alpha: float, outcome: Outcome | None) -> Choice | None:
    shared = table.shared()
    if len(table.names) < 3 or int(shared.sum()) < 3:
        return None
    groups = dict(zip(table.names, table.means[:, shared], strict=True))
    try:
        return stats.compare(groups, paired=True, alpha=alpha, outcome=outcome)
    except stats.InvalidSample:  # nothing varies
        return None
