"""The automatic choice of a test, which explains itself: the design decides, then what the data can bear.

The design comes first: paired or independent, clustered or not, binary or numeric, two groups or more. Where means
are compared, Welch's test is taken without a preliminary test of variances, which would spoil its level (Zimmerman
2004). Pairs whose differences are clearly not normal keep the mean and get its p-value from random signs; small
independent samples get ranks. A robust alternative is always reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pgharness.stats.assumptions import equal_variances, shapiro_wilk
from pgharness.stats.groups import brunner_munzel, check_options, mann_whitney, paired_t, welch_t, wilcoxon_signed_rank
from pgharness.stats.posthoc import dunn, games_howell, nemenyi
from pgharness.stats.proportions import (
    chi_squared,
    cochran_q,
    expected_counts,
    fisher_exact,
    mcnemar,
    outcome_table,
    paired_table,
    two_proportion_z,
)
from pgharness.stats.resampling import paired_permutation_test, permutation_test
from pgharness.stats.results import Alternative, Assumption, Result
from pgharness.stats.samples import (
    FloatArray,
    InvalidSample,
    NanPolicy,
    Rng,
    codes,
    differences_are_constant,
    differences_of,
    is_constant,
    listed,
    named_samples,
)
from pgharness.stats.several import friedman, kruskal_wallis, repeated_measures_anova, welch_anova

Outcome = Literal["binary", "ordinal", "continuous"]
LARGE = 30
MOST_PERMUTED = 1000
MOST_SHIFTED = 10_000  # pairs for which a test that stands beside another also estimates a shift
ZIMMERMAN = "Zimmerman (2004), British Journal of Mathematical and Statistical Psychology 57"


@dataclass(frozen=True, slots=True)
class Choice:
    """A test chosen for a design: its result, a robust alternative's, and the reasons in the order of the decision."""

    result: Result
    alternative: Result | None
    outcome: Outcome
    reasons: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the test and its alternative fall on the same side of alpha."""
        return self.alternative is None or self.result.is_significant() == self.alternative.is_significant()

    @property
    def explanation(self) -> str:
        """The decision and its outcome as sentences."""
        text = f"{self.result.test}: {'; '.join(self.reasons)}. {self.result.apa}"
        if self.alternative is not None:
            word = "agrees" if self.agrees else "does not agree: report both"
            text += f" The alternative {word}: {self.alternative.apa}"
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return the choice as JSON-safe values."""
        return {
            "result": self.result.as_dict(),
            "alternative": self.alternative.as_dict() if self.alternative else None,
            "agrees": self.agrees,
            "outcome": self.outcome,
            "reasons": list(self.reasons),
        }


def compare(
    groups: Mapping[Any, object] | Sequence[object],
    *,
    paired: bool,
    outcome: Outcome | None = None,
    clusters: Iterable[Any] | None = None,
    alternative: Alternative = "two-sided",
    alpha: float = 0.05,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
    rng: Rng = 0,
) -> Choice:
    """Compare two or more groups by the test that fits their design, and say why.

    paired says that value i of every group belongs to the same case. outcome is seen from the values if it is not
    given: only 0 and 1 are binary, others continuous; ordinal has to be said. clusters, for pairs, has one label for
    each pair where several belong to one case (replications). Raises InvalidSample for what no test can use.
    """
    check_options(alternative, alpha)
    samples = _read(groups, paired, names, nan)
    kind, seen = _outcome(samples, outcome)
    reasons = [f"{len(samples)} {'paired' if paired else 'independent'} groups", seen]
    if clusters is not None:
        return _clustered(samples, paired, kind, reasons, clusters, alternative, alpha, rng)
    if len(samples) > 2 and alternative != "two-sided":
        raise InvalidSample(f"alternative is {alternative!r}: {len(samples)} groups have no direction; compare two")
    if len(samples) == 2:
        choose = {(True, True): _binary_pairs, (True, False): _numeric_pairs, (False, True): _binary_groups}.get(
            (paired, kind == "binary"), _numeric_groups
        )
        return choose(samples, kind, reasons, alternative, alpha, rng)
    several = {
        (True, True): _binary_conditions,
        (True, False): _numeric_conditions,
        (False, True): _binary_several,
    }.get((paired, kind == "binary"), _numeric_several)
    return several(samples, kind, reasons, alpha)


# -- two groups


def _binary_pairs(
    samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alternative: Alternative, alpha: float, rng: Rng
) -> Choice:
    table = paired_table(*samples.values(), names=_two(samples))
    reasons.append("only pairs that disagree carry information, so McNemar's test, with mid-p near its level")
    options: dict[str, Any] = dict(alternative=alternative, alpha=alpha)
    return Choice(mcnemar(table, **options), mcnemar(table, method="exact", **options), kind, tuple(reasons))


def _binary_groups(
    samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alternative: Alternative, alpha: float, rng: Rng
) -> Choice:
    table = outcome_table(samples)
    options: dict[str, Any] = dict(alternative=alternative, alpha=alpha)
    exact, approximate = fisher_exact(table, **options), two_proportion_z(table, **options)
    if not table.sum(axis=0).all():
        return Choice(exact, None, kind, (*reasons, "all outcomes are equal"))
    check = expected_counts(table)
    if check.is_met:
        reasons.append(f"expected counts are large enough for z ({check.note})")
        return Choice(approximate, exact, kind, tuple(reasons))
    reasons.append(f"expected counts are too small for z ({check.note}), so Fisher's exact test")
    return Choice(replace(exact, assumptions=(check,)), approximate, kind, tuple(reasons))


def _numeric_pairs(
    samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alternative: Alternative, alpha: float, rng: Rng
) -> Choice:
    one, two = samples.values()
    options: dict[str, Any] = dict(alternative=alternative, alpha=alpha, names=_two(samples))
    ranks = wilcoxon_signed_rank(one, two, shift=kind == "ordinal" or len(one) <= MOST_SHIFTED, **options)
    if kind == "ordinal":
        reasons.append("ordinal values have an order but no distances, so signed ranks")
        return Choice(ranks, None, kind, tuple(reasons))
    if len(one) < 2 or (differences_are_constant(one, two) and bool(differences_of(one, two).any())):
        reasons.append("all pairs differ by the same amount, so signs are all there is to go by")
        return Choice(paired_permutation_test(one, two, rng=rng, **options), ranks, kind, tuple(reasons))
    check = _normality({"the differences": differences_of(one, two)})
    if len(one) > MOST_PERMUTED:
        reasons.append(f"more than {MOST_PERMUTED:,} pairs, so their mean is nearly normal")
    elif any(one.is_met is False for one in check):
        reasons.append(
            f"{len(one)} pairs whose differences are not normal (Shapiro-Wilk), so their mean under random signs, "
            "which needs no normality where either system could have had either score"
        )
        signs = paired_permutation_test(one, two, mid_p=True, rng=rng, **options)
        return Choice(replace(signs, assumptions=check), ranks, kind, tuple(reasons))
    else:
        reasons.append(f"{len(one)} pairs without evidence against normal differences (Shapiro-Wilk)")
    return Choice(replace(paired_t(one, two, **options), assumptions=check), ranks, kind, tuple(reasons))


def _numeric_groups(
    samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alternative: Alternative, alpha: float, rng: Rng
) -> Choice:
    one, two = samples.values()
    options: dict[str, Any] = dict(alternative=alternative, alpha=alpha, names=_two(samples))
    if min(len(one), len(two)) < 2 or (is_constant(one) and is_constant(two) and one[0] != two[0]):
        reasons.append("too little varies for a t test, so permutations")
        return Choice(permutation_test(one, two, rng=rng, **options), None, kind, tuple(reasons))
    ranks = _ranks(one, two, options)
    if kind == "ordinal":
        reasons.append("ordinal values have an order but no distances, so ranks")
        return Choice(ranks, None, kind, tuple(reasons))
    check = (*_normality(samples), equal_variances(samples))
    if _bears_means(check[:-1], [one, two], reasons):
        reasons.append(f"Welch's test holds whether variances are equal or not ({ZIMMERMAN})")
        return Choice(replace(welch_t(one, two, **options), assumptions=check), ranks, kind, tuple(reasons))
    reasons.append("Brunner-Munzel from 10 values a group, which allows unequal variances; below, Mann-Whitney")
    return Choice(
        replace(ranks, assumptions=check), permutation_test(one, two, rng=rng, **options), kind, tuple(reasons)
    )


def _ranks(one: FloatArray, two: FloatArray, options: dict[str, Any]) -> Result:
    overlap = one.min() <= two.max() and two.min() <= one.max()
    if min(len(one), len(two)) >= 10 and overlap:
        try:
            return brunner_munzel(one, two, **options)
        except InvalidSample:  # groups that touch in one value leave it no variance
            pass
    return mann_whitney(one, two, **options)


# -- more groups


def _binary_conditions(samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alpha: float) -> Choice:
    reasons.append("yes-no outcomes of the same cases, so Cochran's Q")
    table = np.column_stack(list(samples.values()))
    return Choice(
        cochran_q(table, alpha=alpha), friedman(table, alpha=alpha, names=list(samples)), kind, tuple(reasons)
    )


def _binary_several(samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alpha: float) -> Choice:
    table = outcome_table(samples)
    plain = chi_squared(table, alpha=alpha)
    if not table.sum(axis=0).all():
        return Choice(plain, None, kind, tuple(reasons))
    permuted = chi_squared(table, alpha=alpha, n_resamples=9999)
    if plain.assumptions[0].is_met:
        reasons.append("expected counts are large enough for chi-squared")
        return Choice(plain, permuted, kind, tuple(reasons))
    reasons.append(f"expected counts are too small for the chi-squared distribution ({plain.assumptions[0].note})")
    return Choice(permuted, plain, kind, tuple(reasons))


def _numeric_conditions(samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alpha: float) -> Choice:
    table, names = np.column_stack(list(samples.values())), list(samples)
    ranks = friedman(table, alpha=alpha, names=names)
    ranks = replace(ranks, comparisons=nemenyi(table, names=names))
    if kind == "ordinal":
        reasons.append("ordinal values have an order but no distances, so ranks within cases")
        return Choice(ranks, None, kind, tuple(reasons))
    centred = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0)
    if np.ptp(centred) <= 1e-12 * max(float(np.abs(table).max()), 1e-300):
        reasons.append("all cases differ between conditions by the same amounts, so ranks within cases")
        return Choice(ranks, None, kind, tuple(reasons))
    check = _normality({"the residuals": centred.ravel()})
    if _bears_means(check, list(samples.values()), reasons):
        reasons.append("Greenhouse-Geisser always, since a test of sphericity misses violations in small samples")
        means = repeated_measures_anova(table, alpha=alpha, names=names)
        return Choice(replace(means, assumptions=(*means.assumptions, *check)), ranks, kind, tuple(reasons))
    return Choice(replace(ranks, assumptions=check), None, kind, tuple(reasons))


def _numeric_several(samples: dict[str, FloatArray], kind: Outcome, reasons: list[str], alpha: float) -> Choice:
    ranks = kruskal_wallis(samples, alpha=alpha)
    if not is_constant(np.concatenate(list(samples.values()))):
        ranks = replace(ranks, comparisons=dunn(samples, level=1 - alpha))
    constant = [name for name, one in samples.items() if len(one) < 2 or is_constant(one)]
    if kind == "ordinal" or constant:
        why = "ordinal values have an order but no distances" if kind == "ordinal" else f"{constant[0]} does not vary"
        reasons.append(f"{why}, so ranks")
        return Choice(ranks, None, kind, tuple(reasons))
    check = (*_normality(samples), equal_variances(samples))
    if _bears_means(check[:-1], list(samples.values()), reasons):
        reasons.append(f"Welch's ANOVA holds whether variances are equal or not ({ZIMMERMAN})")
        found = games_howell(samples, level=1 - alpha, intervals=False)
        means = replace(welch_anova(samples, alpha=alpha), assumptions=check, comparisons=found)
        return Choice(means, ranks, kind, tuple(reasons))
    return Choice(replace(ranks, assumptions=check), None, kind, tuple(reasons))


# -- reading and deciding


def _clustered(
    samples: dict[str, FloatArray],
    paired: bool,
    kind: Outcome,
    reasons: list[str],
    clusters: Iterable[Any],
    alternative: Alternative,
    alpha: float,
    rng: Rng,
) -> Choice:
    if not paired or len(samples) != 2:
        raise InvalidSample(
            "clusters are for two paired groups: average the replications of each case for other designs"
        )
    one, two = samples.values()
    labels = codes(clusters, name="clusters", length=len(one))
    reasons.append(f"{int(labels.max()) + 1} clusters: replications of a case are not independent")
    sizes = np.bincount(labels)
    averages = [np.bincount(labels, weights=values) / sizes for values in (one, two)]
    options: dict[str, Any] = dict(alternative=alternative, alpha=alpha, names=_two(samples))
    reasons.append("the clusters' averages are compared, each counting once")
    inner = _numeric_pairs(dict(zip(samples, averages, strict=True)), "continuous", reasons, alternative, alpha, rng)
    robust = inner.alternative  # random signs of averages and of sums would be one test twice
    if inner.result.test != "Paired permutation test":
        robust = paired_permutation_test(one, two, clusters=labels.tolist(), rng=rng, **options)
    return Choice(inner.result, robust, kind, inner.reasons)


def _read(
    groups: Mapping[Any, object] | Sequence[object], paired: bool, names: Sequence[str] | None, nan: NanPolicy
) -> dict[str, FloatArray]:
    if not paired:
        return named_samples(groups, names=names, nan=nan)
    values: dict[str, object] = dict(zip(*_titles(groups, names), strict=True))
    lists: dict[str, Any] = {
        name: one if isinstance(one, np.ndarray) else listed(one, name, "numbers") for name, one in values.items()
    }
    lengths = {name: len(one) for name, one in lists.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidSample(f"paired groups need one value for each case, but have {lengths}: align them by case")
    if nan == "omit":
        keep = [
            i for i in range(min(lengths.values(), default=0)) if not any(_missing(one[i]) for one in lists.values())
        ]
        lists = {name: [one[i] for i in keep] for name, one in lists.items()}
    return named_samples(lists)


def _titles(groups: Any, names: Sequence[str] | None) -> tuple[list[str], list[object]]:
    values = list(groups.values()) if isinstance(groups, Mapping) else listed(groups, "groups", "samples")
    titles = list(map(str, groups)) if isinstance(groups, Mapping) else [f"group {i + 1}" for i in range(len(values))]
    if names is not None:
        if len(names) != len(values):
            raise InvalidSample(f"{len(names)} names for {len(values)} groups: give one name for each group")
        titles = list(names)
    return titles, values


def _missing(value: Any) -> bool:
    return value is None or bool(value != value)


def _outcome(samples: dict[str, FloatArray], outcome: Outcome | None) -> tuple[Outcome, str]:
    values = np.unique(np.concatenate(list(samples.values())))
    looks_binary = bool(np.isin(values, (0.0, 1.0)).all())
    if outcome is None:
        return ("binary", "all values are 0 or 1") if looks_binary else ("continuous", "numeric values")
    if outcome not in ("binary", "ordinal", "continuous"):
        raise InvalidSample(f'outcome is {outcome!r}: it is "binary", "ordinal" or "continuous"')
    if outcome == "binary" and not looks_binary:
        raise InvalidSample(f"outcome is binary, but there is a value {values[(values != 0) & (values != 1)][0]:g}")
    return outcome, f"{outcome} values, as was said"


def _normality(samples: dict[str, FloatArray]) -> tuple[Assumption, ...]:
    return tuple(shapiro_wilk(one, name=name) for name, one in samples.items() if len(one) >= 3)


def _bears_means(checks: tuple[Assumption, ...], samples: list[FloatArray], reasons: list[str]) -> bool:
    """Say whether means can be compared: large samples bear much, small ones only what looks normal."""
    smallest = min(len(one) for one in samples)
    failed = [check.name for check in checks if check.is_met is False]
    if smallest >= LARGE:
        reasons.append(f"at least {LARGE} values in each group, so means are nearly normal")
        return True
    if failed:
        reasons.append(f"{smallest} values and no {failed[0]} (Shapiro-Wilk), so ranks")
        return False
    reasons.append(f"{smallest} values without evidence against normality (Shapiro-Wilk)")
    return True


def _two(samples: dict[str, FloatArray]) -> tuple[str, str]:
    first, second = samples
    return first, second
