"""Grading: verdicts that fit or an error to act on, and metrics that score as people would."""

from __future__ import annotations

import json
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgharness.errors import InvalidOutput, RequestRejected
from pgharness.grading import criteria_values, read_verdicts, score_metric, verdict_schema

GOOD = {"rationale": "It says so.", "satisfaction": 80}


def score(metric: str, output: Any, target: Any, **parameters: Any) -> float:
    result = score_metric(metric, parameters, output, target)
    assert result.max_score == 1
    return result.score


# -- what the grader is asked


def test_criteria_are_numbered_from_one_and_keep_what_their_authors_added() -> None:
    rubric = {"criteria": [{"criterion": "a", "weight": 10, "source": "guideline"}, {"criterion": "b", "weight": 5}]}
    assert criteria_values(rubric) == [
        {"criterion": "a", "weight": 10, "source": "guideline", "number": 1},
        {"criterion": "b", "weight": 5, "number": 2},
    ]


def test_without_a_rubric_the_one_criterion_is_the_target() -> None:
    assert criteria_values(None) == [{"criterion": "The output agrees with the target.", "weight": 100, "number": 1}]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"rationale": st.text(min_size=1), "satisfaction": st.integers(0, 100) | st.floats(0, 100)}
        ),
        min_size=1,
        max_size=5,
    )
)
def test_what_fits_the_schema_is_read_as_it_is(verdicts: list[dict[str, Any]]) -> None:
    answer = {"verdicts": verdicts}
    jsonschema.validate(answer, verdict_schema(len(verdicts)))
    assert read_verdicts(answer, len(verdicts), text="") == verdicts
    assert read_verdicts(verdicts, len(verdicts), text="") == verdicts  # models like to leave the wrapping out


def test_grades_of_one_size_are_asked_with_one_schema() -> None:
    assert verdict_schema(3) is verdict_schema(3)
    assert verdict_schema(3) != verdict_schema(4)


# -- what the grader answers


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, "no array"),
        ("80", "no array"),
        ({}, "no array"),
        ({"verdicts": {"1": GOOD}}, "no array"),
        ({"grades": [GOOD, GOOD]}, "no array"),
        ([], "0 verdicts for 2 criteria"),
        ({"verdicts": [GOOD]}, "1 verdicts for 2 criteria"),
        ({"verdicts": [GOOD] * 3}, "3 verdicts for 2 criteria"),
        ([GOOD, "fully met"], "verdict 2: it: "),
        ([GOOD, {"rationale": "Yes."}], "verdict 2: satisfaction: Field required"),
        ([{"satisfaction": 1}, GOOD], "verdict 1: rationale: Field required"),
        ([GOOD, GOOD | {"rationale": ""}], "verdict 2: rationale: "),
        ([GOOD, GOOD | {"rationale": None}], "verdict 2: rationale: "),
        ([GOOD | {"satisfaction": 101}, GOOD], "verdict 1: satisfaction: "),
        ([GOOD | {"satisfaction": -0.1}, GOOD], "verdict 1: satisfaction: "),
        ([GOOD | {"satisfaction": "80"}, GOOD], "verdict 1: satisfaction: "),
        ([GOOD | {"satisfaction": True}, GOOD], "verdict 1: satisfaction: "),
        ([GOOD | {"satisfaction": float("nan")}, GOOD], "verdict 1: satisfaction: "),
        ([GOOD | {"satisfaction": None}, GOOD], "verdict 1: satisfaction: "),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_in_words_a_model_can_act_on(answer: Any, problem: str) -> None:
    with pytest.raises(InvalidOutput) as caught:
        read_verdicts(answer, 2, text="as received")
    assert problem in str(caught.value)
    assert caught.value.text == "as received"
    assert caught.value.is_retryable and caught.value.spends_attempt


def test_other_keys_of_a_verdict_are_ignored() -> None:
    assert read_verdicts([GOOD | {"criterion": "a", "confidence": "high"}], 1, text="") == [GOOD]


# -- metrics


@pytest.mark.parametrize(
    ("output", "target", "options", "expected"),
    [
        ("yes", "yes", {}, 1),
        (" yes\n", "yes", {}, 1),
        ("Yes", "yes", {}, 0),
        ("Yes", "yes", {"ignore_case": True}, 1),
        ("STRASSE", "straße", {"ignore_case": True}, 1),
        ("a  b\tc", "a b c", {}, 0),
        ("a  b\tc", "a b c", {"ignore_space": True}, 1),
        ("yes.", "yes", {}, 0),
        ({"a": 1, "b": [2]}, {"a": 1, "b": [2]}, {}, 1),
        (72, "72", {}, 1),
        ("", "", {}, 1),
        ("", None, {}, 1),
    ],
)
def test_exact_match(output: Any, target: Any, options: dict[str, Any], expected: float) -> None:
    assert score("exact_match", output, target, **options) == expected


@pytest.mark.parametrize(
    ("output", "target", "options", "expected"),
    [
        ("The answer is B.", "B", {}, 1),
        ("the answer is b.", "B", {}, 0),
        ("the answer is b.", "B", {"ignore_case": True}, 1),
        ("nothing", "B", {}, 0),
        ({"plan": "start losartan"}, "losartan", {}, 1),
    ],
)
def test_contains(output: Any, target: Any, options: dict[str, Any], expected: float) -> None:
    assert score("contains", output, target, **options) == expected


@pytest.mark.parametrize(
    ("output", "target", "options", "expected"),
    [
        ("18 - 6 = 12, so 12 * 6 = 72 dollars", "#### 72", {}, 1),
        ("It is 71.", "72", {}, 0),
        ("72.000", 72, {}, 1),
        ("$1,234.50", "1234.5", {}, 1),
        ("-5", "5", {}, 0),
        ("the sum is .5", "0.5", {}, 1),
        ("1.5e3", 1500, {}, 1),
        ("about 99", 100, {}, 0),
        ("about 99", 100, {"relative_tolerance": 0.02}, 1),
        ("about 99", 100, {"absolute_tolerance": 1}, 1),
        ("about 98", 100, {"absolute_tolerance": 1}, 0),
        ("I do not know", 100, {}, 0),
        ("", 100, {}, 0),
        ({"answer": 7}, 7, {}, 1),
        ("72, and that is all.", "72", {}, 1),
        ("9" * 400, "1", {}, 0),
        ("in 3-4 days", 4, {}, 1),
        ("on 2026-05-07", 7, {}, 1),
        ("x = -4", -4, {}, 1),
        ("x = \N{MINUS SIGN}4", -4, {}, 1),
        ("5 - 7 = -2", -2, {}, 1),
    ],
)
def test_numeric_match_compares_the_last_numbers(
    output: Any, target: Any, options: dict[str, Any], expected: float
) -> None:
    assert score("numeric_match", output, target, **options) == expected


def test_numeric_match_refuses_a_target_that_no_output_could_match() -> None:
    with pytest.raises(RequestRejected, match="needs a number as target, not 'seventy-two'"):
        score("numeric_match", "72", "seventy-two")


@pytest.mark.parametrize(
    ("output", "target", "options", "expected"),
    [
        ("BP 134/82", r"\d+/\d+", {}, 1),
        ("no reading", r"\d+/\d+", {}, 0),
        ("Losartan", "losartan", {}, 0),
        ("Losartan", "losartan", {"ignore_case": True}, 1),
        ("Losartan 50 mg", "unused", {"pattern": r"\b50\s*mg\b"}, 1),
        ("one\ntwo", r"(?m)^two$", {}, 1),
    ],
)
def test_regex(output: Any, target: Any, options: dict[str, Any], expected: float) -> None:
    assert score("regex", output, target, **options) == expected


def test_a_pattern_that_is_none_is_refused_with_its_fault() -> None:
    with pytest.raises(RequestRejected, match=r"pattern '\(a' is not a regular expression: missing \)"):
        score("regex", "a", "(a")


def test_a_pattern_that_explodes_is_ended_and_named() -> None:
    begun = time.monotonic()
    with pytest.raises(RequestRejected, match="took longer than"):
        score("regex", "a" * 60 + "!", "(a|aa|a?)+$")
    assert time.monotonic() - begun < 10


def test_an_unknown_metric_is_refused_with_those_that_exist() -> None:
    with pytest.raises(RequestRejected) as caught:
        score("bleu", "a", "a")
    assert "'bleu' does not exist" in str(caught.value)
    assert caught.value.hint is not None and "numeric_match" in caught.value.hint


@settings(deadline=None)
@example("\U0001ccf0")  # a digit of a newer Unicode than Python's
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_every_output_that_a_program_can_give_is_scored(output: Any) -> None:
    assert score("exact_match", output, json.loads(json.dumps(output)) if output is not None else output) in (0, 1)
    for metric, target in (("contains", "x"), ("numeric_match", 1), ("regex", "x")):
        assert score(metric, output, target) in (0, 1)
