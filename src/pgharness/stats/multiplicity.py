"""Several tests at once: p-values adjusted so that the chance of a false claim stays what it was meant to be.

An adjusted p-value is compared with alpha itself. Bonferroni, Holm and Hochberg bound the chance of any false claim
(family-wise error); Benjamini-Hochberg and Benjamini-Yekutieli the expected share of false claims among all claims.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pgharness.stats.results import json_safe
from pgharness.stats.samples import FloatArray, InvalidSample, listed, sample

Correction = Literal["bonferroni", "holm", "hochberg", "bh", "by"]
SOURCES: dict[str, str] = {
    "bonferroni": "Bonferroni (1936); family-wise error under any dependence",
    "holm": "Holm (1979), Scandinavian Journal of Statistics 6; family-wise error under any dependence",
    "hochberg": "Hochberg (1988), Biometrika 75; family-wise error of independent or positively dependent tests",
    "bh": "Benjamini & Hochberg (1995), JRSS B 57; false discovery rate of independent or positively dependent tests",
    "by": "Benjamini & Yekutieli (2001), Annals of Statistics 29; false discovery rate under any dependence",
}


@dataclass(frozen=True, slots=True)
class Adjusted:
    """Adjusted p-values of a family of tests, in the order in which they were given, with the tests' names."""

    names: tuple[str, ...]
    p_values: tuple[float, ...]
    adjusted: tuple[float, ...]
    correction: Correction
    method: str

    def significant(self, alpha: float = 0.05) -> tuple[str, ...]:
        """Return the names of the tests whose adjusted p-value is below alpha."""
        return tuple(name for name, value in zip(self.names, self.adjusted, strict=True) if value < alpha)

    def as_dict(self) -> dict[str, Any]:
        """Return the family as JSON-safe values."""
        return {
            "names": list(self.names),
            "p_values": json_safe(self.p_values),
            "adjusted": json_safe(self.adjusted),
            "correction": self.correction,
            "method": self.method,
        }


def adjust(p_values: Mapping[str, float] | Sequence[float], *, correction: Correction = "holm") -> Adjusted:
    """Return the adjusted p-values of a family of tests.

    p_values is a list, or a mapping of each test's name to its p-value, all in 0..1. Holm is never less powerful than
    Bonferroni and assumes no more, so it is the default.
    """
    if correction not in _STEPS:
        raise InvalidSample(f"correction is {correction!r}: it is one of {', '.join(_STEPS)}")
    if isinstance(p_values, Mapping):
        names, given = tuple(map(str, p_values)), list(p_values.values())
    else:
        given = listed(p_values, "p_values", "p-values")
        names = tuple(f"test {number}" for number in range(1, len(given) + 1))
    array = sample(given, name="p_values", any_size=True)
    if (array < 0).any() or (array > 1).any():
        raise InvalidSample(f"p_values has {array[(array < 0) | (array > 1)][0]:g}: p-values are in 0..1")
    order = np.argsort(array, kind="stable")
    adjusted = np.empty(len(array))
    adjusted[order] = np.minimum(_STEPS[correction](array[order]), 1.0)
    return Adjusted(names, tuple(array.tolist()), tuple(adjusted.tolist()), correction, SOURCES[correction])


# each takes p-values in ascending order


def _bonferroni(ordered: FloatArray) -> FloatArray:
    return ordered * len(ordered)


def _holm(ordered: FloatArray) -> FloatArray:
    return np.maximum.accumulate(ordered * np.arange(len(ordered), 0, -1))


def _hochberg(ordered: FloatArray) -> FloatArray:
    return _from_above(ordered * np.arange(len(ordered), 0, -1))


def _benjamini_hochberg(ordered: FloatArray) -> FloatArray:
    return _from_above(ordered * len(ordered) / np.arange(1, len(ordered) + 1))


def _benjamini_yekutieli(ordered: FloatArray) -> FloatArray:
    return _benjamini_hochberg(ordered) * float((1 / np.arange(1, len(ordered) + 1)).sum())


def _from_above(values: FloatArray) -> FloatArray:
    return np.minimum.accumulate(values[::-1])[::-1]


_STEPS: dict[str, Callable[[FloatArray], FloatArray]] = {
    "bonferroni": _bonferroni,
    "holm": _holm,
    "hochberg": _hochberg,
    "bh": _benjamini_hochberg,
    "by": _benjamini_yekutieli,
}
