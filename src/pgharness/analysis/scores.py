"""Scores of runs as arrays: what a million grades need to be analysed in seconds.

A grade is a row of numbers: codes that point into short lists of names, and its score as a share of the highest
possible one (0..1). A note's score is the mean of its grades, a case's the mean of its notes, as in the views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection

from pgharness import database
from pgharness.errors import InvalidArgument
from pgharness.stats.samples import FloatArray, IntArray

CodeArray = NDArray[np.int32]
By = Literal["combination", "run"]
TARGET = "target"  # what grades against a case's target have for an author

# A row of COPY's binary format: the number of columns, then each column's length and value.
_GRADE = np.dtype(
    [
        ("columns", ">i2"),
        *(("l0", ">i4"), ("note", ">i8")),
        *(("l1", ">i4"), ("rubric", ">i4")),
        *(("l2", ">i4"), ("replication", ">i4")),
        *(("l3", ">i4"), ("score", ">f8")),
    ]
)
_COLUMNS = ("note_ordinal", "rubric_number", "replication", "normalised_score")


@dataclass(frozen=True, slots=True)
class Combination:
    """A generator with a grader, as a run froze them; parameters are the generator's."""

    name: str
    generator: str
    grader: str | None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run besides its scores; the costs are of one note and one grade, None where nothing is."""

    id: int
    name: str
    status: str = "completed"
    config: Mapping[str, Any] = field(default_factory=dict)
    combinations: tuple[Combination, ...] = ()
    note_usd: float | None = None
    grade_usd: float | None = None


@dataclass(frozen=True, slots=True)
class CaseTable:
    """Mean score of every group at every case, shape (groups, cases), NaN where a group has no score of a case.

    notes, of the same shape, counts what each mean is of; grades has the grades of each group.
    """

    names: tuple[str, ...]
    cases: tuple[str, ...]
    means: FloatArray
    notes: IntArray
    grades: IntArray

    def shared(self, *groups: int) -> NDArray[np.bool_]:
        """Return which cases have a score in all of some groups (of all, if none is named), shape (cases,)."""
        chosen = list(groups) or list(range(len(self.names)))
        return np.asarray(~np.isnan(self.means[chosen]).any(axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Grades in long form: all arrays have shape (grades,); codes point into the tuple of the same meaning.

    run, combination, case and author are codes into runs, combinations, cases and authors. note has the same code for
    grades of one note. overlap, replication (of the note, from 1) and grade_replication (from 1) are numbers.
    """

    run: CodeArray
    combination: CodeArray
    case: CodeArray
    note: CodeArray
    overlap: CodeArray
    replication: CodeArray
    author: CodeArray
    grade_replication: CodeArray
    score: FloatArray
    runs: tuple[Run, ...]
    combinations: tuple[str, ...]
    cases: tuple[str, ...]
    authors: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)

    def select(
        self,
        *,
        runs: Iterable[str] | None = None,
        combinations: Iterable[str] | None = None,
        cases: Iterable[str] | None = None,
        authors: Iterable[str] | None = None,
    ) -> Scores:
        """Return the grades of some runs, combinations, cases and rubric authors only, by name.

        Raises InvalidArgument for a name that is not among them.
        """
        keep = np.ones(len(self), dtype=bool)
        for what, column, known, wanted in (
            ("run", self.run, self.run_names, runs),
            ("combination", self.combination, self.combinations, combinations),
            ("case", self.case, self.cases, cases),
            ("rubric author", self.author, self.authors, authors),
        ):
            if wanted is not None:
                chosen = [place_of(name, known, what) for name in wanted]
                keep &= np.isin(column, chosen)
        if not keep.any():
            raise InvalidArgument("no grade is left of what was selected", hint="Select less narrowly.")
        return self if keep.all() else self.rows(keep)

    def rows(self, keep: NDArray[Any]) -> Scores:
        """Return some of the grades: those of a mask, or at some places."""
        arrays = {name: getattr(self, name)[keep] for name in _ARRAYS}
        return replace(self, **arrays | {"note": _dense(arrays["note"])})

    @property
    def run_names(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    def groups(self, by: By) -> tuple[CodeArray, tuple[str, ...]]:
        """Return each grade's group and the groups' names."""
        if by not in ("combination", "run"):
            raise InvalidArgument(f'by is {by!r}: it is "combination" or "run"')
        return (self.combination, self.combinations) if by == "combination" else (self.run, self.run_names)

    def note_means(self) -> tuple[FloatArray, IntArray]:
        """Return each note's score, the mean of its grades, and a grade of it, both of shape (notes,)."""
        counts = np.bincount(self.note)
        first = np.zeros(len(counts), dtype=np.intp)
        first[self.note[::-1]] = np.arange(len(self) - 1, -1, -1)
        return np.bincount(self.note, self.score) / counts, first

    def case_table(self, by: By) -> CaseTable:
        """Reduce to one mean per group and case: of the case's notes, each the mean of its grades.

        Groups and cases without a grade are left out.
        """
        codes, names = self.groups(by)
        means, first = self.note_means()
        group, case = codes[first].astype(np.intp), self.case[first].astype(np.intp)
        shape = (len(names), len(self.cases))
        place = group * shape[1] + case
        notes = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
        sums = np.bincount(place, means, minlength=shape[0] * shape[1]).reshape(shape)
        table = np.divide(sums, notes, out=np.full(shape, np.nan), where=notes > 0)
        grades = np.bincount(codes, minlength=shape[0])
        rows, columns = np.flatnonzero(notes.sum(axis=1)), np.flatnonzero(notes.sum(axis=0))
        return CaseTable(
            tuple(names[row] for row in rows),
            tuple(self.cases[column] for column in columns),
            table[rows][:, columns],
            notes[rows][:, columns],
            grades[rows],
        )


_ARRAYS = ("run", "combination", "case", "note", "overlap", "replication", "author", "grade_replication", "score")


def place_of(name: str, known: Sequence[str], what: str) -> int:
    """Return a name's place in a list of names. Raises InvalidArgument, which says what there is."""
    try:
        return list(known).index(name)
    except ValueError:
        some = ", ".join(map(repr, known[:5])) + (", ..." if len(known) > 5 else "")
        raise InvalidArgument(f"there is no {what} {name!r} here", hint=f"There is {some}.") from None


def load_scores(connection: Connection[Any], run_ids: Sequence[int]) -> Scores:
    """Read the grades of some runs. Raises InvalidArgument when there are none, or a run is archived."""
    parts: list[dict[str, NDArray[Any]]] = []
    runs: list[Run] = []
    combinations, cases, authors = (dict[Any, int]() for _ in range(3))
    case_names: list[str] = []
    notes = 0
    for run_id in dict.fromkeys(run_ids):
        plan = database.call(connection, "score_plan", run_id=run_id)[0]["score_plan"]
        packed = database.binary_rows(connection, "grades", _COLUMNS, run_id=run_id)
        table = np.frombuffer(packed, dtype=_GRADE)
        part = _places(plan, table, len(runs))
        part["combination"] = _coded([one["name"] for one in plan["combinations"]], combinations)[part["combination"]]
        before = len(cases)
        part["case"] = _coded(plan["case_ids"], cases)[part["case"]]
        case_names += [name for id, name in zip(plan["case_ids"], plan["cases"], strict=True) if cases[id] >= before]
        rubrics = np.full((len(plan["case_ids"]), max([0, *plan["rubric_numbers"]]) + 1), -1, dtype=np.int32)
        rubrics[:, 0] = _coded([TARGET], authors)[0]
        rubrics[plan["rubric_cases"], plan["rubric_numbers"]] = _coded(plan["rubric_authors"], authors)
        part["author"] = rubrics[part.pop("case_number"), part.pop("rubric")]
        part["note"] = _dense(part["note"]) + np.int32(notes)
        notes += int(part["note"].max(initial=notes - 1)) + 1 - notes
        parts.append(part)
        runs.append(_run(plan, len(table)))
    if not sum(len(part["score"]) for part in parts):
        named = ", ".join(run.name for run in runs) or "none"
        raise InvalidArgument(
            f"there are no grades to analyse (runs: {named})",
            hint="See what the runs did: select * from pgharness.run_progress;",
        )
    return Scores(
        **{name: np.concatenate([part[name] for part in parts]) for name in _ARRAYS},
        runs=tuple(runs),
        combinations=tuple(combinations),
        cases=tuple(case_names),
        authors=tuple(authors),
    )


def _places(plan: Mapping[str, Any], table: NDArray[Any], run: int) -> dict[str, NDArray[Any]]:
    """Return the columns of a run's grades in the order of the plan, places as the run numbers them.

    A note's ordinal says its place in the plan, as `pgharness._note_place` has it: combinations vary fastest.
    """
    ordinal = table["note"].astype(np.int64)
    rubric, replication = table["rubric"].astype(np.int32), table["replication"].astype(np.int32)
    order = np.lexsort((replication, rubric, ordinal))  # sums then do not depend on where the rows lay
    ordinal = ordinal[order]
    overlaps = np.array(plan["overlaps"], dtype=np.int32)
    combination_count, case_count = len(plan["combinations"]), len(plan["case_ids"])
    row = ordinal // combination_count
    case = (row % case_count).astype(np.int32)
    row //= case_count
    return {
        "run": np.full(len(order), run, dtype=np.int32),
        "combination": (ordinal % combination_count).astype(np.int32),
        "case": case,
        "case_number": case,
        "note": ordinal,
        "overlap": overlaps[row % len(overlaps)],
        "replication": (row // len(overlaps) + 1).astype(np.int32),
        "rubric": rubric[order],
        "grade_replication": replication[order],
        "score": table["score"].astype(np.float64)[order],
    }


def _run(plan: Mapping[str, Any], grades: int) -> Run:
    if plan["archive"] is not None:
        raise InvalidArgument(
            f"run {plan['run']} is archived in {plan['archive']}", hint="Bring it back: pgharness unarchive FILE"
        )
    notes = plan["notes_succeeded"]
    return Run(
        id=plan["run_id"],
        name=plan["run"],
        status=plan["status"],
        config=plan["config"],
        combinations=tuple(Combination(**one) for one in plan["combinations"]),
        note_usd=plan["note_cost_usd"] / notes if notes else None,
        grade_usd=plan["grade_cost_usd"] / grades if grades else None,
    )


def _coded(labels: Sequence[Any], known: dict[Any, int]) -> CodeArray:
    """Return the codes of labels, new ones counted on."""
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int32)


def _dense(codes: NDArray[Any]) -> CodeArray:
    """Return codes 0..k-1 in the order of the values."""
    if len(codes) == 0:
        return codes.astype(np.int32)
    if (codes[1:] >= codes[:-1]).all():
        return np.concatenate([[0], np.cumsum(codes[1:] != codes[:-1])]).astype(np.int32)
    return np.unique(codes, return_inverse=True)[1].astype(np.int32)
