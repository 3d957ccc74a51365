"""Samples are read the same way everywhere, and what cannot be used is refused with what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2

from pgharness import stats
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


NORMAL = np.random.default_rng(191).normal(size=24)
TWO = [
    "student_t",
    "welch_t",
    "mann_whitney",
    "brunner_munzel",
    "paired_t",
    "wilcoxon_signed_rank",
    "sign_test",
    "permutation_test",
    "cohen_d",
    "hedges_g",
    "paired_permutation_test",
    "bootstrap_difference",
    "glass_delta",
    "cohen_dz",
    "cliff_delta",
    "common_language_effect",
    "pearson",
    "spearman",
    "kendall",
    "matched_rank_biserial",
    "bland_altman",
    "bayesian_t",
    "bayesian_signed_rank",
]
GROUPS = [
    "one_way_anova",
    "welch_anova",
    "kruskal_wallis",
    "tukey_hsd",
    "games_howell",
    "dunn",
    "equal_variances",
    "eta2",
    "omega2",
    "epsilon2",
]
TABLES = ["repeated_measures_anova", "friedman", "mauchly", "nemenyi", "intraclass_correlations"]
SINGLE = ["bootstrap", "shapiro_wilk", "anderson_darling", "dagostino", "confidence_sequence"]
QUICK = {"n_resamples": 99}


def asked(function: str, values: Any) -> Any:
    """What a function says of values beside normal ones, in the form that it takes."""
    made = getattr(stats, function)
    if function in SINGLE:
        return made(values, **(QUICK if function == "bootstrap" else {}))
    if function in TWO:
        return made(values, NORMAL, **(QUICK if "permutation" in function or "bootstrap" in function else {}))
    return made(
        [values, NORMAL, NORMAL + 1] if function in GROUPS else list(zip(values, values[::-1], values, strict=True))
    )


@pytest.mark.parametrize("function", [*TWO, *GROUPS, *TABLES, *SINGLE, "compare"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (NORMAL * 1e300, "too far from 1"),
        (NORMAL * 1e160, "too far from 1"),
        (np.array([5e-324, 0.0, 1e-323] * 8), "too far from 1"),
        (NORMAL * 1e-170, "too far from 1"),
        ([2**53 + i for i in range(24)], "to the last digit"),
        (np.arange(24, dtype=np.uint64) + np.uint64(2**63), "to the last digit"),
        ([10**400, *range(23)], "no double"),
        (np.ma.array(NORMAL, mask=[True] + [False] * 23), "missing|no value"),
        ([math.inf, *NORMAL[1:]], "infinite"),
        ([None, *NORMAL[1:]], "missing|no value"),
        ([*NORMAL[1:], 1j], "not a number"),
    ],
    ids=[
        "huge",
        "squares overflow",
        "denormal",
        "squares vanish",
        "int",
        "uint64",
        "bigint",
        "masked",
        "inf",
        "none",
        "complex",
    ],
)
def test_no_function_computes_with_what_doubles_do_not_hold(function: str, values: Any, message: str) -> None:
    with pytest.raises(InvalidSample, match=message):
        asked(function, values) if function != "compare" else stats.compare([values, NORMAL], paired=True)


@pytest.mark.parametrize("function", [*TWO, *GROUPS, *TABLES, *SINGLE])
def test_values_of_any_usual_size_are_computed_or_refused_in_words(function: str) -> None:
    for scale in (1e-60, 1e60):
        for values in (NORMAL * scale, (np.arange(24.0) + 100) * scale, np.array([0.0] * 23 + [1.0]) * scale):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    asked(function, values)
                except InvalidSample as refused:
                    assert any(word in str(refused) for word in ("do not overlap", "equal", "same amount"))


def test_groups_that_all_but_do_not_vary_have_intervals_all_the_same() -> None:
    first, second = np.arange(12) * 1e-6, np.arange(12) * 1e-6 + 1e3
    for effect in (stats.eta2([first, second]), stats.omega2([first, second])):
        assert effect.interval is not None and 0.999 < effect.interval.low <= effect.value <= effect.interval.high <= 1
    d = stats.cohen_d(second, first)
    # a t of so many standard errors leaves only the error of the standard deviation, which is chi-squared
    assert d.interval is not None
    ends = [d.value * math.sqrt(chi2.ppf(tail, 22) / 22) for tail in (0.025, 0.975)]
    assert (d.interval.low, d.interval.high) == pytest.approx(ends, rel=1e-6)
