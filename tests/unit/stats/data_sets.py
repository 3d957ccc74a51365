"""Random data sets for comparing implementations: continuous, tied, skewed, tiny, large, shifted, and of wild scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

KINDS = ("normal", "tied", "skewed", "binary-ish", "large scale", "small scale")


def draw(rng: np.random.Generator, kind: str, size: int | tuple[int, ...]) -> NDArray[np.float64]:
    match kind:
        case "normal":
            return rng.normal(0.3, 1.7, size)
        case "tied":
            return rng.integers(0, 6, size).astype(float)
        case "skewed":
            return rng.lognormal(0, 1, size)
        case "binary-ish":
            return rng.choice([0.0, 0.5, 1.0], size=size, p=[0.2, 0.2, 0.6])
        case "large scale":
            return rng.normal(1e6, 1e5, size)
        case _:
            return rng.normal(0, 1e-6, size)


def varied(values: NDArray[np.float64]) -> bool:
    return len(np.unique(values)) > 1


def two_groups(
    count: int = 200, *, seed: int = 1, least: int = 2, most: int = 40
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield so many pairs of groups that both vary, of unequal sizes."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        kind = KINDS[made % len(KINDS)]
        one, two = (draw(rng, kind, int(rng.integers(least, most))) for _ in range(2))
        two = two + rng.choice([0.0, 0.0, 1.0]) * one.std()
        if varied(one) and varied(two):
            made += 1
            yield one, two


def paired(
    count: int = 200, *, seed: int = 2, least: int = 3, most: int = 40
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield so many paired samples whose differences vary."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        kind = KINDS[made % len(KINDS)]
        size = int(rng.integers(least, most))
        one, two = draw(rng, kind, size), draw(rng, kind, size)
        if kind == "normal":
            two = one + rng.normal(0.2, 0.5, size)
        if varied(one - two):
            made += 1
            yield one, two


def several_groups(
    count: int = 200, *, seed: int = 3, least: int = 2, most: int = 25
) -> Iterator[list[NDArray[np.float64]]]:
    """Yield so many lists of three to six groups that all vary."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        kind = KINDS[made % len(KINDS)]
        groups = [draw(rng, kind, int(rng.integers(least, most))) for _ in range(int(rng.integers(3, 7)))]
        if all(varied(one) for one in groups):
            made += 1
            yield groups


def tables(count: int = 200, *, seed: int = 4) -> Iterator[NDArray[np.float64]]:
    """Yield so many tables of 3 to 20 subjects under 3 to 6 conditions."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        kind = KINDS[made % len(KINDS)]
        table = draw(rng, kind, (int(rng.integers(3, 21)), int(rng.integers(3, 7))))
        if all(varied(column) for column in table.T) and all(varied(row) for row in table):
            made += 1
            yield table


def tables_2x2(count: int = 200, *, seed: int = 31, least: int = 0) -> Iterator[NDArray[np.intp]]:
    """Yield so many 2 x 2 tables of counts, small and large, without an empty row or column."""
    rng = np.random.default_rng(seed)
    made = 0
    while made < count:
        cells = rng.integers(least, rng.choice([4, 12, 60, 2000]), (2, 2))
        if cells.sum(axis=1).all() and cells.sum(axis=0).all():
            made += 1
            yield cells
