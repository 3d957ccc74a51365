"""Samples are read the same way everywhere, and what cannot be used is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pgharness.stats.samples import (
    InvalidSample,
    codes,
    describe,
    differences_are_constant,
    differences_of,
    from_records,
    generator,
    is_constant,
    matrix,
    named_samples,
    pairs,
    sample,
)

ROWS = [
    {"value": 1.0, "group": "a", "case": 7, "person": "x"},
    {"value": 2.0, "group": "b", "case": 7, "person": "x"},
    {"value": 3.0, "group": "a", "case": 8, "person": "y"},
    {"value": 5.0, "group": "a", "case": 8, "person": "y"},
    {"value": 6.0, "group": "b", "case": 8, "person": "y"},
    {"value": 9.0, "group": "b", "case": 9, "person": "z"},
]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.int8),
        pd.Series([1, 2, 3]),
        pd.Series([1, 2, 3], dtype="Int64"),
        [Decimal(1), Decimal(2), Decimal(3)],
        (number for number in (1, 2, 3)),
        range(1, 4),
    ],
)
def test_anything_like_numbers_becomes_float64(values: object) -> None:
    array = sample(values)
    assert array.dtype == np.float64 and array.tolist() == [1.0, 2.0, 3.0]


def test_booleans_are_zero_and_one() -> None:
    assert sample([True, False]).tolist() == [1.0, 0.0]
    assert sample(np.array([True, False])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: sample([], name="scores"), "scores: empty, at least 1 value needed"),
        (lambda: sample([1.0], name="scores", minimum=2), "scores: 1 value, at least 2 needed"),
        (lambda: sample([1, None, np.nan]), 'values has 2 missing values of 3: pass nan="omit" to leave them out'),
        (lambda: sample([None], nan="omit"), "values: empty"),
        (lambda: sample([1, np.inf]), "values has 1 infinite value of 2"),
        (lambda: sample(["1"]), "values has '1', which is not a number"),
        (lambda: sample("123"), "values is a str"),
        (lambda: sample(3), "values is a int: give a list or array of numbers"),
        (lambda: sample({"a": 1}), "values is a dict"),
        (lambda: sample([[1, 2], [3, 4]]), "more than one dimension"),
        (lambda: sample(np.ones((2, 2))), "more than one dimension"),
        (lambda: sample([1 + 2j]), "is not a number"),
        (lambda: sample([1, np.nan], nan="drop"), 'nan is \'drop\': it is "raise" or "omit"'),  # type: ignore[arg-type]
        (lambda: pairs([1, 2], [1], names=("old", "new")), "old has 2 values and new has 1"),
        (lambda: pairs([1, None], [1, 2]), '1 pair of 2 \\(first, second\\) has no value: pass nan="omit"'),
        (lambda: named_samples([[1, 2]]), "1 group given, at least 2 are needed"),
        (lambda: named_samples({1: [1], "1": [2]}), "same name"),
        (lambda: named_samples([[1], [2]], names=["a"]), "1 names for 2 groups"),
        (lambda: named_samples({"a": [1], "b": []}), "b: empty"),
        (lambda: matrix([[1, 2], [3]]), "unequal lengths"),
        (lambda: matrix([1, 2]), "row 1 of measurements|must be a table"),
        (lambda: matrix(np.ones(3)), "must be a table"),
        (lambda: matrix([[1, 2]]), "1 complete subject, at least 2 needed"),
        (lambda: matrix([[1], [2]]), "1 condition, at least 2 needed"),
        (lambda: matrix([[1, None], [2, 3]]), '1 subject of 2 has missing values: pass nan="omit"'),
        (lambda: generator(-1), "rng is -1"),
        (lambda: generator("seed"), "rng is 'seed'"),  # type: ignore[arg-type]
        (lambda: from_records([{"value": 1}]), "row 1 has no column 'group'; it has value"),
        (lambda: from_records([1]), "row 1 is a int"),
        (lambda: from_records(3), "records must be rows"),
        (lambda: from_records({"value": [1], "kind": ["a"]}), "no column 'group'; it has value, kind"),
        (lambda: from_records({"value": [1, 2], "group": ["a"]}), "unequal lengths"),
        (lambda: from_records([{"value": 1, "group": None}]), "column 'group' has 1 missing label"),
        (lambda: from_records([{"value": None, "group": "a"}]), "column 'value' has 1 missing value of 1"),
        (lambda: from_records([]), "empty"),
        (lambda: from_records(ROWS).table(), "no cluster column"),
        (lambda: from_records(ROWS[:1] + ROWS[-1:], cluster="case").table(), "nothing to pair"),
        (lambda: codes(["a", None]), "cluster has 1 missing label"),
        (lambda: codes(["a"], length=2), "1 labels for 2 values"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(read: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        read()


def test_missing_values_go_only_when_the_caller_says_so() -> None:
    assert sample([1, None, np.nan, pd.NA, pd.NaT, 2], nan="omit").tolist() == [1.0, 2.0]
    one, two = pairs([1, 2, None], [None, 3, 4], nan="omit")
    assert one.tolist() == [2.0] and two.tolist() == [3.0]
    assert matrix([[1, 2], [None, 3], [4, 5]], nan="omit").tolist() == [[1.0, 2.0], [4.0, 5.0]]


def test_groups_keep_their_names_and_order() -> None:
    assert list(named_samples({"z": [1], "a": [2]})) == ["z", "a"]
    assert list(named_samples([[1], [2]])) == ["group 1", "group 2"]
    assert list(named_samples([[1], [2]], names=["old", "new"])) == ["old", "new"]


@pytest.mark.parametrize(
    "form", [list, pd.DataFrame, lambda rows: {key: [row[key] for row in rows] for key in rows[0]}]
)
def test_a_long_table_is_read_from_rows_columns_and_data_frames(form: Callable[[Any], object]) -> None:
    table = from_records(form(ROWS), cluster="case", subject="person")
    assert table.group_names == ("a", "b")
    assert {name: values.tolist() for name, values in table.groups().items()} == {"a": [1, 3, 5], "b": [2, 6, 9]}
    assert table.codes("cluster").tolist() == [0, 0, 1, 1, 1, 2]
    units, values = table.table("cluster")
    assert units == [7, 8] and values.tolist() == [[1.0, 2.0], [4.0, 6.0]]
    assert table.table()[0] == ["x", "y"]


def test_rows_without_a_value_take_their_labels_with_them() -> None:
    rows = [*ROWS, {"value": None, "group": "c", "case": 1, "person": "x"}]
    assert from_records(rows, cluster="case", nan="omit").group_names == ("a", "b")


def test_constants_are_recognised_up_to_rounding_error() -> None:
    assert is_constant(np.array([0.3, 0.1 + 0.2]))
    assert is_constant(np.array([]))
    assert is_constant(np.array([0.0, 0.0]))
    assert not is_constant(np.array([0.3, 0.3001]))
    assert differences_are_constant(np.array([0.3, 0.4]), np.array([0.1, 0.2]))
    assert not differences_are_constant(np.array([0.3, 0.4]), np.array([0.1, 0.21]))


def test_equal_differences_are_equal_after_subtracting() -> None:
    one, two = np.array([0.3, 0.9, 0.7, 1e15, 0.1 + 0.2]), np.array([0.1, 0.7, 0.9, 1e15, 0.3])
    assert differences_of(one, two).tolist() == [0.2, 0.2, -0.2, 0.0, 0.0]
    assert differences_of(np.array([3e-5, 1e20]), np.array([1e-5, -1e20])).tolist() == [2e-5, 2e20]


def test_a_generator_is_a_seed_or_itself() -> None:
    rng = np.random.default_rng(3)
    assert generator(rng) is rng
    assert generator(3).random() == np.random.default_rng(3).random()
    assert generator(np.int64(3)).random() == np.random.default_rng(3).random()  # type: ignore[arg-type]


def test_a_group_is_described() -> None:
    group = describe("a", np.array([1.0, 2.0, 6.0]))
    assert (group.n, group.mean, group.median) == (3, 3.0, 2.0)
    assert group.sd == pytest.approx(7**0.5)
    assert describe("a", np.array([1.0])).as_dict()["sd"] is None
