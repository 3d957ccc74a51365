"""Scores made up from a model whose parts are known: cases, notes and grades each add noise of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pgharness.analysis import Combination, Run, Scores


def made_scores(
    effects: Sequence[float],
    *,
    cases: int = 40,
    replications: int = 2,
    authors: int = 1,
    grades: int = 1,
    runs: Sequence[Run] | None = None,
    seed: int = 0,
    case_sd: float = 0.15,
    note_sd: float = 0.05,
    grade_sd: float = 0.02,
    is_binary: bool = False,
) -> Scores:
    """Return scores of one combination an effect (`system 0`, `system 1`, ...), the same in every run.

    A score is 0.5 + effect + the case's part + the note's + the grade's; binary ones say whether that is above 0.5.
    """
    rng = np.random.default_rng(seed)
    systems = tuple(f"system {number}" for number in range(len(effects)))
    combinations = tuple(Combination(name, name, "judge") for name in systems)
    runs = runs or (Run(1, "made/1", combinations=combinations),)
    shape = (len(runs), len(effects), cases, replications, authors, grades)
    places = [axis.ravel().astype(np.int32) for axis in np.indices(shape)]
    run, combination, case, replication, author, grade = places
    score = (
        0.5
        + np.array(effects)[combination]
        + rng.normal(0, case_sd, cases)[case]
        + np.repeat(rng.normal(0, note_sd, shape[:4]).ravel(), authors * grades)
        + rng.normal(0, grade_sd, len(run))
    )
    return Scores(
        run=run,
        combination=combination,
        case=case,
        note=np.repeat(np.arange(len(run) // (authors * grades), dtype=np.int32), authors * grades),
        overlap=np.zeros(len(run), dtype=np.int32),
        replication=replication + np.int32(1),
        author=author,
        grade_replication=grade + np.int32(1),
        score=(score > 0.5).astype(np.float64) if is_binary else score,
        runs=tuple(runs),
        combinations=systems,
        cases=tuple(f"case {number}" for number in range(cases)),
        authors=tuple(f"author {number}" for number in range(authors)),
    )
