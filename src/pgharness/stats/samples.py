"""Reading what a test is given: array-likes and long tables become clean arrays, or an error that says what to do.

Every function of the package reads its input here, so that missing values, infinities, text, empty and too small
samples mean the same everywhere. Nothing is dropped unless the caller says so (`nan="omit"`).
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pgharness.stats.results import Group

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
NanPolicy = Literal["raise", "omit"]
Rng = np.random.Generator | int

_POWERS = np.array([float(10**digits) for digits in range(23)])  # the powers of ten that a double holds exactly
_LARGEST = 1e70  # fourth powers of what is larger, or smaller than its inverse, leave the range of doubles
_LARGEST_WHOLE = 2.0**53
_OMIT_HINT = 'pass nan="omit" to leave them out'


class InvalidSample(ValueError):
    """A sample cannot be used for what was asked; the message names it and says what to do."""


def generator(rng: Rng) -> np.random.Generator:
    """Return a random generator: the one given, or a new one with the seed given (an integer that is not negative)."""
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, bool) or not isinstance(rng, numbers.Integral) or rng < 0:
        raise InvalidSample(f"rng is {rng!r}: give a seed (an integer from 0) or a numpy.random.Generator")
    return np.random.default_rng(int(rng))


def sample(
    values: object, *, name: str = "values", nan: NanPolicy = "raise", minimum: int = 1, any_size: bool = False
) -> FloatArray:
    """Return one sample as float64, shape (n,), n >= minimum.

    values is a list, tuple, numpy array, pandas or other series of numbers or booleans (true is 1); None and what is
    masked is NaN. Raises InvalidSample for text, more than one dimension, infinities, NaN (unless omitted), too few
    values, whole numbers that a double does not hold, and (unless any_size) values whose fourth powers it does not.
    """
    array = _numbers(values, name, any_size=any_size)
    missing = np.isnan(array)
    if missing.any():
        _refuse_nan(nan, f"{name} has {_count(int(missing.sum()), 'missing value')} of {len(array)}")
        array = array[~missing]
    _enough(len(array), minimum, name)
    return array


def pairs(
    first: object,
    second: object,
    *,
    names: tuple[str, str] = ("first", "second"),
    nan: NanPolicy = "raise",
    minimum: int = 1,
) -> tuple[FloatArray, FloatArray]:
    """Return two aligned samples as float64, both of shape (n,): element i of both belongs to unit i.

    With nan="omit" a pair goes when either of its values is missing. Raises InvalidSample as `sample` does, and for
    samples of unequal length.
    """
    one, two = _numbers(first, names[0]), _numbers(second, names[1])
    if len(one) != len(two):
        raise InvalidSample(
            f"{names[0]} has {len(one)} values and {names[1]} has {len(two)}: pairs need one of each for every unit; "
            "align them by case, or use a test for independent groups"
        )
    missing = np.isnan(one) | np.isnan(two)
    if missing.any():
        _refuse_nan(nan, f"{_count(int(missing.sum()), 'pair')} of {len(one)} ({names[0]}, {names[1]}) has no value")
        one, two = one[~missing], two[~missing]
    _enough(len(one), minimum, f"the pairs of {names[0]} and {names[1]}", "pair")
    return one, two


def named_samples(
    groups: Mapping[Any, object] | Sequence[object],
    *,
    names: Sequence[str] | None = None,
    nan: NanPolicy = "raise",
    minimum: int = 1,
    at_least: int = 2,
) -> dict[str, FloatArray]:
    """Return several independent samples by name, in the order given: a mapping's keys, `names`, or group 1, 2, ...

    Raises InvalidSample as `sample` does, for fewer groups than at_least and for two groups of one name.
    """
    if isinstance(groups, Mapping):
        labels, values = [str(key) for key in groups], list(groups.values())
    else:
        values = listed(groups, "groups", "samples")
        labels = [f"group {number}" for number in range(1, len(values) + 1)]
    if names is not None:
        if len(names) != len(values):
            raise InvalidSample(f"{len(names)} names for {len(values)} groups: give one name for each group")
        labels = [str(label) for label in names]
    if len(values) < at_least:
        raise InvalidSample(f"{_count(len(values), 'group')} given, at least {at_least} are needed")
    if len(set(labels)) < len(labels):
        raise InvalidSample(f"two groups have the same name ({', '.join(labels)}): rename one")
    return {label: sample(one, name=label, nan=nan, minimum=minimum) for label, one in zip(labels, values, strict=True)}


def listed(values: Any, name: str, of: str) -> list[Any]:
    """Return what was given as a list. Raises InvalidSample for what is none."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise InvalidSample(f"{name} is a {type(values).__name__}: give a list or a mapping of {of}")
    return list(values)


def matrix(
    values: object,
    *,
    name: str = "measurements",
    nan: NanPolicy = "raise",
    minimum: tuple[int, int] = (2, 2),
) -> FloatArray:
    """Return measurements of subjects under conditions as float64, shape (subjects, conditions).

    With nan="omit" a subject goes when any of its values is missing. Raises InvalidSample for other shapes, and as
    `sample` does.
    """
    if isinstance(values, np.ndarray) and values.ndim == 2:
        table = _numbers(values.ravel(), name).reshape(values.shape)
    else:
        table = _table(values, name)
    missing = np.isnan(table).any(axis=1)
    if missing.any():
        _refuse_nan(nan, f"{name}: {_count(int(missing.sum()), 'subject')} of {len(table)} has missing values")
        table = table[~missing]
    _enough(table.shape[0], minimum[0], name, "complete subject")
    _enough(table.shape[1], minimum[1], name, "condition")
    return table


def counts(table: object, *, name: str = "table", shape: tuple[int, int] | None = None) -> IntArray:
    """Return a table of counts as integers, shape (rows, columns), at least 2 x 2 or exactly `shape`.

    Raises InvalidSample for other shapes, for what is not a count (a whole number from 0) and for an empty row.
    """
    cells = matrix(table, name=name)
    if (cells < 0).any() or (cells != np.floor(cells)).any():
        raise InvalidSample(
            f"{name} has cells that are not counts: give whole numbers from 0, not shares or percentages"
        )
    if shape is not None and cells.shape != shape:
        found = " x ".join(map(str, cells.shape))
        raise InvalidSample(f"{name} is {found}: this needs {shape[0]} x {shape[1]}")
    if cells.sum() == 0:
        raise InvalidSample(f"{name}: all counts are 0")
    return cells.astype(np.intp)


def binary(values: object, *, name: str = "values", nan: NanPolicy = "raise") -> FloatArray:
    """Return one sample of yes-no outcomes, 0 and 1, shape (n,); raises InvalidSample for any other value."""
    array = sample(values, name=name, nan=nan)
    others = array[(array != 0) & (array != 1)]
    if len(others):
        raise InvalidSample(f"{name} has {others[0]:g}: outcomes must be 0 or 1 (or booleans)")
    return array


def is_constant(values: FloatArray) -> bool:
    """Say whether all values are equal, up to the rounding error of their magnitude."""
    if len(values) == 0:
        return True
    spread = float(np.ptp(values))
    return bool(spread <= 10 * np.finfo(np.float64).eps * float(np.max(np.abs(values))))


def differences_are_constant(one: FloatArray, two: FloatArray) -> bool:
    """Say whether all pairs differ by one amount, up to the rounding error of the values that are subtracted."""
    spread = float(np.ptp(one - two))
    scale = max(float(np.max(np.abs(one))), float(np.max(np.abs(two))))
    error = float(np.finfo(np.float64).eps) * scale
    return spread <= 10 * error or (spread <= 200 * error and is_constant(differences_of(one, two)))


def differences_of(one: FloatArray, two: FloatArray) -> FloatArray:
    """Return first minus second without the rounding error of subtracting: 0.3 - 0.1 is 0.2, so ties stay ties."""
    error = 4 * float(np.finfo(np.float64).eps) * np.maximum(np.abs(one), np.abs(two))
    digits = np.floor(-np.log10(np.where(error > 0, error, 0.01))).astype(int) - 1
    differences = np.asarray(one - two)
    usual = (digits >= 0) & (digits < len(_POWERS))
    powers = _POWERS[np.where(usual, digits, 0)]  # exact, so the quotient below is the double nearest to the decimal
    rounded: FloatArray = np.rint(differences * powers) / powers
    for place in np.flatnonzero(~usual):
        rounded[place] = round(float(differences[place]), int(digits[place]))
    return rounded


def describe(name: str, values: FloatArray) -> Group:
    """Return the description of one sample."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Group(name, len(values), float(np.mean(values)), sd, float(np.median(values)))


@dataclass(frozen=True, slots=True)
class LongForm:
    """A long table: one row for each measurement, columns of equal length.

    value is float64, shape (n,); group, cluster (the case) and subject are labels, the last two optional. Labels are
    kept as they were given.
    """

    value: FloatArray
    group: tuple[Any, ...]
    cluster: tuple[Any, ...] | None = None
    subject: tuple[Any, ...] | None = None

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups' names in the order in which they first appear."""
        return tuple(dict.fromkeys(str(label) for label in self.group))

    def groups(self) -> dict[str, FloatArray]:
        """Return each group's values, in the order of their rows."""
        labels = np.array([str(label) for label in self.group], dtype=object)
        return {name: self.value[labels == name] for name in self.group_names}

    def codes(self, column: Literal["cluster", "subject"]) -> IntArray:
        """Return a column's labels as integers 0..k-1 in order of appearance, shape (n,)."""
        return codes(self._labels(column), name=column)

    def table(self, by: Literal["cluster", "subject"] | None = None) -> tuple[list[Any], FloatArray]:
        """Return the units that every group has, and their values, shape (units, groups).

        Several values of a unit in one group are averaged. by is the column that names units: by default the subject,
        else the cluster. Raises InvalidSample if no unit is in all groups.
        """
        column = by or ("subject" if self.subject is not None else "cluster")
        labels = self._labels(column)
        sums: dict[Any, dict[str, list[float]]] = {}
        for label, group, value in zip(labels, self.group, self.value, strict=True):
            sums.setdefault(label, {}).setdefault(str(group), []).append(float(value))
        names = self.group_names
        units = [label for label, found in sums.items() if len(found) == len(names)]
        if not units:
            raise InvalidSample(f"no {column} has a value in each of the groups {', '.join(names)}: nothing to pair")
        return units, np.array([[np.mean(sums[unit][name]) for name in names] for unit in units], dtype=np.float64)

    def _labels(self, column: Literal["cluster", "subject"]) -> tuple[Any, ...]:
        labels = self.cluster if column == "cluster" else self.subject
        if labels is None:
            raise InvalidSample(f"the table has no {column} column: name it, as in from_records(..., {column}='case')")
        return labels


def from_records(
    records: object,
    *,
    value: str = "value",
    group: str = "group",
    cluster: str | None = None,
    subject: str | None = None,
    nan: NanPolicy = "raise",
) -> LongForm:
    """Read a long table: rows as mappings (what a query returns), a mapping of columns, or a data frame.

    The other arguments name its columns. A row without a group, cluster or subject is refused; one without a value
    is missing, so refused or omitted by `nan`.
    """
    wanted = [column for column in (value, group, cluster, subject) if column is not None]
    columns = _columns(records, wanted)
    numbers_ = _numbers(columns[value], value)
    keep = ~np.isnan(numbers_)
    if not keep.all():
        _refuse_nan(nan, f"column {value!r} has {_count(int((~keep).sum()), 'missing value')} of {len(numbers_)}")
    labels: dict[str, tuple[Any, ...]] = {}
    for column in wanted[1:]:
        labels[column] = tuple(label for label, kept in zip(columns[column], keep, strict=True) if kept)
        empty = sum(1 for label in labels[column] if _is_missing(label))
        if empty:
            raise InvalidSample(
                f"column {column!r} has {_count(empty, 'missing label')}: fill them or leave the rows out"
            )
    _enough(int(keep.sum()), 1, f"the table of {value!r}", "row")
    return LongForm(
        numbers_[keep],
        labels[group],
        labels[cluster] if cluster is not None else None,
        labels[subject] if subject is not None else None,
    )


def codes(labels: Iterable[Any], *, name: str = "cluster", length: int | None = None) -> IntArray:
    """Return labels as integers 0..k-1 in order of appearance, shape (n,); length is how many there must be."""
    given = labels if isinstance(labels, range) else list(labels)
    if length is not None and len(given) != length:
        raise InvalidSample(f"{name} has {len(given)} labels for {length} values: give one for each value")
    if isinstance(labels, range):
        return np.arange(len(labels))
    if set(map(type, given)) == {int} and (numbers_ := np.array(given)).dtype.kind == "i":  # many cases, most often
        _, first, code = np.unique(numbers_, return_index=True, return_inverse=True)
        return np.argsort(np.argsort(first))[code]
    given = [label.item() if isinstance(label, np.generic) else label for label in given]
    empty = sum(1 for label in given if _is_missing(label))
    if empty:
        raise InvalidSample(f"{name} has {_count(empty, 'missing label')}: fill them or leave the rows out")
    places: dict[Any, int] = {}
    return np.array([places.setdefault(label, len(places)) for label in given], dtype=np.intp)


def _columns(records: object, wanted: list[str]) -> dict[str, list[Any]]:
    if isinstance(records, Mapping) or hasattr(records, "columns"):
        table: Any = records
        present = [str(column) for column in (table if isinstance(records, Mapping) else table.columns)]
        lacking = [column for column in wanted if column not in present]
        if lacking:
            raise InvalidSample(f"the table has no column {lacking[0]!r}; it has {', '.join(present)}")
        columns = {column: list(table[column]) for column in wanted}
        if len({len(column) for column in columns.values()}) > 1:
            raise InvalidSample("the table's columns have unequal lengths")
        return columns
    if not isinstance(records, Iterable):
        raise InvalidSample("records must be rows (mappings), a mapping of columns, or a data frame")
    rows = list(records)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise InvalidSample(f"row {number} is a {type(row).__name__}: rows must be mappings of column to value")
        lacking = [column for column in wanted if column not in row]
        if lacking:
            raise InvalidSample(f"row {number} has no column {lacking[0]!r}; it has {', '.join(map(str, row))}")
    return {column: [row[column] for row in rows] for column in wanted}


def _table(values: object, name: str) -> FloatArray:
    try:
        rows = [_numbers(row, f"row {number} of {name}") for number, row in enumerate(_rows(values), start=1)]
    except TypeError:
        raise InvalidSample(
            f"{name} must be a table: one row for each subject, one column for each condition"
        ) from None
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise InvalidSample(f"the rows of {name} have unequal lengths {sorted(widths)}: one value for each condition")
    return np.array(rows, dtype=np.float64).reshape(len(rows), widths.pop() if widths else 0)


def _rows(values: object) -> Iterable[Any]:
    if hasattr(values, "to_numpy"):
        return list(values.to_numpy())
    if isinstance(values, np.ndarray) and values.ndim != 2:
        raise TypeError
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError
    return list(values)


def _numbers(values: object, name: str, *, any_size: bool = False) -> FloatArray:
    """Return values as float64 with NaN for what is missing; refuse what is not a finite number or missing."""
    if isinstance(values, np.ma.MaskedArray) and values.dtype.kind in "biuf":
        values = np.ma.filled(values.astype(np.float64), np.nan)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "biuf":
        array = values.astype(np.float64)
        if values.dtype.kind in "iu" and (np.abs(array) > _LARGEST_WHOLE).any():
            array = np.array([_number(value, name) for value in values.tolist()])
    else:
        is_scalar = isinstance(values, np.ndarray) and values.ndim == 0
        if is_scalar or isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise InvalidSample(f"{name} is a {type(values).__name__}: give a list or array of numbers")
        array = np.array([_number(value, name) for value in values], dtype=np.float64)
    infinite = int(np.isinf(array).sum())
    if infinite:
        raise InvalidSample(f"{name} has {_count(infinite, 'infinite value')} of {len(array)}: remove or replace them")
    largest = float(np.nanmax(np.abs(array), initial=0.0))
    if not any_size and largest and not 1 / _LARGEST < largest < _LARGEST:
        raise InvalidSample(f"{name} goes up to {largest:.3g}, too far from 1 to compute with: give it in other units")
    return array


def _number(value: Any, name: str) -> float:
    if isinstance(value, (numbers.Real, np.bool_, Decimal)):
        try:
            number = float(value)
        except (OverflowError, ValueError):  # a whole number of hundreds of digits, or a signalling NaN
            raise InvalidSample(f"{name} has a {type(value).__name__} that is no double: convert it first") from None
        if isinstance(value, numbers.Integral) and int(number) != value:
            raise InvalidSample(
                f"{name} has {value}, which a double does not hold to the last digit: subtract what all have in common"
            )
        return number
    if _is_missing(value):
        return float("nan")
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        raise InvalidSample(f"{name} has more than one dimension: give one list of numbers")
    raise InvalidSample(f"{name} has {value!r}, which is not a number: convert it first")


def _is_missing(value: Any) -> bool:
    if value is None or value is np.ma.masked or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and value != value


def _refuse_nan(nan: NanPolicy, found: str) -> None:
    if nan not in ("raise", "omit"):
        raise InvalidSample(f'nan is {nan!r}: it is "raise" or "omit"')
    if nan == "raise":
        raise InvalidSample(f"{found}: {_OMIT_HINT}")


def _enough(count: int, minimum: int, name: str, unit: str = "value") -> None:
    if count == 0 and minimum > 0:
        raise InvalidSample(f"{name}: empty, at least {_count(minimum, unit)} needed")
    if count < minimum:
        raise InvalidSample(f"{name}: {_count(count, unit)}, at least {minimum} needed")


def _count(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"
