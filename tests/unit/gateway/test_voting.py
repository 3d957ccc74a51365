"""Votes: what answers are normalised to, who wins, what a mean is, and what theory says."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from pgharness.gateway.voting import (
    Ballot,
    average,
    effective_members,
    elect,
    is_settled,
    label_of,
    majority_error,
    measured,
    misfit,
    stated_confidence,
)


def ballots(*labels: str, **columns: list[float]) -> list[Ballot]:
    """Return ballots in the members' order; `weight` and `confidence` are columns beside the labels."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)] or [{}] * len(labels)
    return [Ballot(place, label, **row) for place, (label, row) in enumerate(zip(labels, rows, strict=True))]


# ---- normalisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("normalise", "same"),
    [
        ("text", ["Paris", " paris ", "PARIS\n"]),
        ("text", ["New  York", "new\nyork"]),
        ("text", ["Zürich", "zu\u0308rich"]),
        ("text", [{"answer": "Paris", "n": 1}, {"n": 1.0, "answer": " paris"}]),
        ("number", ["72", "72.0", "#### 72", "$72", "It is 2 x 36 = 72.", "7.2e1", 72, 72.0, "+72"]),
        ("number", ["1,234.5", "€ 1,234.5", "1\u00a0234.5", "1\u202f234.5", "1\u2009234.5", 1234.5]),
        ("number", ["1,234,567", "1\u202f234\u202f567 people", "from 1,000 to 1,234,567.0"]),
        ("number", ["5", "1, 2, 5", "wait...5", "v1.2.3 has 5 bugs", "in 2020 005", "It is 5, or so", "10:5"]),
        ("number", ["-3", "\N{MINUS SIGN}3", "-$3", "the answer is -3"]),
        ("number", ["0", "-0", "-0.0", 0]),
        (
            "boolean",
            ["Yes", "yes, because it is no trouble", "True.", "1", True, 1, "That is correct", "It isn't false"],
        ),
        ("boolean", ["yes", "There is no doubt: yes", "No question, it is true", "It cannot be false", "1.0", 1.0]),
        (
            "boolean",
            ["no", "There is no doubt that it is wrong", "It is no longer true", "It cannot be true", "No way!"],
        ),
        ("boolean", ["no", "0.0", 0.0]),
        ("boolean", ["No", "no, that is not correct", "FALSE", "0", False, 0, "That is not true", "incorrect", "n"]),
        ("json", ['{"a": 1, "b": [2]}', '```json\n{"b": [2.0], "a": 1}\n```', {"b": [2], "a": 1}]),
        ("none", ["Paris", "Paris"]),
        ("none", [{"a": 1, "b": 2}, {"b": 2, "a": 1}]),
    ],
)
def test_answers_that_mean_the_same_have_one_label(normalise: str, same: list[Any]) -> None:
    assert len({label_of(value, normalise) for value in same} - {None}) == 1
    assert None not in [label_of(value, normalise) for value in same]


@pytest.mark.parametrize(
    ("normalise", "one", "other"),
    [
        ("text", "Paris", "Paris."),
        ("text", {"a": True}, {"a": 1}),
        ("number", "3-4 days", "3"),
        ("number", "9007199254740993", "9007199254740995"),
        ("json", '{"a": "Paris"}', '{"a": "paris"}'),
        ("json", "[1, 2]", "[2, 1]"),
        ("none", "Paris", "paris"),
    ],
)
def test_answers_that_differ_have_two_labels(normalise: str, one: Any, other: Any) -> None:
    assert label_of(one, normalise) != label_of(other, normalise)


@pytest.mark.parametrize(
    ("normalise", "value"),
    [
        *[("text", ""), ("text", " \n"), ("none", "")],
        *[("number", "seven"), ("number", "1e999"), ("number", True), ("number", None), ("number", [72])],
        *[("boolean", "maybe"), ("boolean", "I am not sure, yes?"), ("boolean", "I don't know"), ("boolean", "cat")],
        *[("number", text) for text in ("1,2,3", "1,5", "5,,6", "1.000,50", "1 000", "1 234 567", "1.2.3", "0,123")],
        *[("number", text) for text in ("12,345,6", "1..10", "10 options, of which 1,5", "1\u00a0000,5")],
        *[("boolean", "It is unclear whether yes"), ("boolean", 2), ("boolean", None)],
        *[
            ("boolean", text)
            for text in ("I have no idea", "I've no clue: yes?", "no way to tell", "No doubt", "No answer")
        ],
        *[("boolean", text) for text in ("I cannot say no", "can't say", "It can not be determined. No?", "not known")],
        *[("json", "{"), ("json", "NaN"), ("json", "the answer is 4"), ("json", "[" * 100_000)],
    ],
)
def test_an_answer_without_what_is_asked_for_has_no_label(normalise: str, value: Any) -> None:
    assert label_of(value, normalise) is None


@pytest.mark.parametrize(
    ("text", "data", "confidence", "rest"),
    [
        ("Paris\nconfidence: 0.8", None, 0.8, "Paris"),
        ("Paris\n\n**Confidence:** 80%\n", None, 0.8, "Paris"),
        ("Paris\nConfidence (0-1) = .75", None, 0.75, "Paris"),
        ("Paris\nconfidence: 85", None, 0.85, "Paris"),
        ("confidence: 1", None, 1.0, ""),
        ("Paris\nconfidence: 120", None, None, "Paris"),
        ("Paris\nconfidence: 5", None, None, "Paris"),
        ("Paris\nconfidence: 1.2", None, None, "Paris"),
        ("Paris\nconfidence: 10", None, None, "Paris"),
        ("Paris\nconfidence: 10.5", None, 0.105, "Paris"),
        ("Paris\nconfidence: 5%", None, 0.05, "Paris"),
        ("Paris\nConfidence: **9/10**", None, 0.9, "Paris"),
        ("Paris\nconfidence: 4 out of 5", None, 0.8, "Paris"),
        ("Paris\nconfidence: 90 / 100", None, 0.9, "Paris"),
        ("Paris\nconfidence: 11/10", None, None, "Paris"),
        ("confidence: 0.8\nParis", None, None, "confidence: 0.8\nParis"),
        ("Paris", None, None, "Paris"),
        ("{}", {"confidence": 0.3}, 0.3, "{}"),
        ("{}", {"confidence": "90%"}, 0.9, "{}"),
        ("{}", {"confidence": "about 90% sure"}, 0.9, "{}"),
        ("{}", {"confidence": "9/10"}, 0.9, "{}"),
        ("{}", {"confidence": "0.8"}, 0.8, "{}"),
        ("{}", {"confidence": 85}, 0.85, "{}"),
        ("{}", {"confidence": 5}, None, "{}"),
        ("{}", {"confidence": 1.2}, None, "{}"),
        ("{}", {"confidence": -0.3}, None, "{}"),
        ("{}", {"confidence": "-0.3"}, None, "{}"),
        ("{}", {"confidence": "between 0.2 and 0.9"}, None, "{}"),
        ("{}", {"confidence": float("nan")}, None, "{}"),
        ("{}", {"confidence": "high"}, None, "{}"),
        ("{}", {"confidence": True}, None, "{}"),
        ("{}", {"answer": 4}, None, "{}"),
        ("[]", [0.3], None, "[]"),
    ],
)
def test_a_stated_confidence_is_read_and_taken_out(text: str, data: Any, confidence: float | None, rest: str) -> None:
    assert stated_confidence(text, data) == (confidence, rest)


# ---- votes -----------------------------------------------------------------------------------------------------------


def test_the_majority_wins_and_the_consensus_is_its_share() -> None:
    decision = elect(ballots("a", "b", "b", "c"), "majority")
    assert (decision.winner.place, decision.consensus, decision.tied) == (1, 0.5, ())
    assert decision.votes == {"a": 1, "b": 2, "c": 1}


def test_a_tie_goes_to_the_more_confident_else_to_the_first_and_is_told() -> None:
    decision = elect(ballots("b", "a", "a", "b"), "majority")
    assert (decision.winner.place, decision.tied) == (0, ("b", "a"))
    decision = elect(ballots("b", "a", "a", "b", confidence=[0.5, 0.9, 0.9, 0.5]), "majority")
    assert (decision.winner.place, decision.tied) == (1, ("b", "a"))


def test_weights_and_confidences_multiply() -> None:
    decision = elect(ballots("a", "b", "b", weight=[4, 1, 1], confidence=[0.25, 0.8, 0.4]), "weighted")
    assert decision.winner.label == "b"
    assert decision.votes == pytest.approx({"a": 1.0, "b": 1.2})
    assert decision.consensus == pytest.approx(1.2 / 2.2)


def test_what_was_not_waited_for_is_not_part_of_a_consensus() -> None:
    assert elect(ballots("a", "a", "a"), "majority", 2).consensus == 0.6
    assert elect(ballots("a", "b", weight=[3, 1]), "weighted", 2).consensus == 0.5
    assert elect(ballots("a", "b", confidence=[0.8, 0.6]), "best_confidence", 2).consensus == 0.8


def test_weights_that_differ_by_rounding_alone_are_a_tie() -> None:
    decision = elect(ballots("a", "b", "b", weight=[0.3, 0.1, 0.2]), "weighted")
    assert (decision.winner.label, decision.tied) == ("b", ("a", "b")), "b has the confidence of two"


def test_the_most_confident_answer_wins_whatever_the_others_say() -> None:
    decision = elect(ballots("a", "b", "b", "c", confidence=[0.8, 0.6, 0.9, 0.1]), "best_confidence")
    assert (decision.winner.place, decision.consensus) == (2, 0.9)
    assert decision.votes == {"a": 0.8, "b": 0.9, "c": 0.1}


def test_a_vote_without_any_confidence_still_decides() -> None:
    decision = elect(ballots("a", "b", confidence=[0, 0]), "weighted")
    assert (decision.winner.place, decision.consensus, decision.tied) == (0, 0.0, ("a", "b"))


@pytest.mark.parametrize(
    ("labels", "left", "min_consensus", "answers_below", "settled"),
    [
        ("aaa", 2, 0.0, False, True),  # 3 of 5 is the majority
        ("aaab", 1, 0.0, False, True),
        ("aab", 1, 0.0, False, False),  # b may draw level
        ("aa", 2, 0.0, False, False),
        ("aaa", 2, 0.6, False, True),
        ("aaa", 2, 0.7, False, False),  # 3 of 5 would not suffice
        ("ab", 3, 1.0, False, True),  # not unanimous any more
        ("ab", 3, 1.0, True, False),  # who wins still matters
        ("aaab", 1, 1.0, True, True),
        ("aaa", 0, 1.0, False, True),
    ],
)
def test_a_vote_is_settled_when_nobody_can_change_it(
    labels: str, left: float, min_consensus: float, answers_below: bool, settled: bool
) -> None:
    decision = elect(ballots(*labels), "majority")
    assert is_settled(decision, left, min_consensus=min_consensus, answers_below=answers_below) is settled


def test_a_settled_vote_stays_what_it_is() -> None:
    for labels in itertools.product("abc", repeat=5):
        whole = elect(ballots(*labels), "majority")
        for length, threshold in itertools.product(range(1, 5), (0.0, 0.6, 1.0)):
            early = elect(ballots(*labels[:length]), "majority")
            if is_settled(early, 5 - length, min_consensus=threshold, answers_below=False):
                suffices = whole.consensus >= threshold
                assert suffices == (early.votes[early.winner.label] / 5 >= threshold)
                assert not suffices or whole.winner.label == early.winner.label


# ---- means -----------------------------------------------------------------------------------------------------------


def numbers(*values: Any, weights: list[float] | None = None) -> list[Ballot]:
    found = [measured(value, "text") for value in values]
    assert None not in found
    weights = weights or [1.0] * len(values)
    return [
        Ballot(place, shape[0], weight, 1.0, shape[1])
        for place, (shape, weight) in enumerate(zip(found, weights, strict=True))
        if shape is not None
    ]


@pytest.mark.parametrize(
    ("how", "values", "weights", "result"),
    [
        ("mean", ["about 70", "80", "90."], None, 80),
        ("mean", [1, 2], [3, 1], 1.25),
        ("mean", [0.1, 0.1, 0.1], [0.3, 0.3, 0.3], 0.1),
        ("median", [1, 100, 3], None, 3),
        ("median", [1, 2, 3, 100], None, 2.5),
        ("median", [1, 2, 100], [1, 1, 5], 100),
        ("median", [1, 2, 3], [1, 1, 2], 2.5),
        ("median", [1, 2], [0.0, 0.0], 1.5),
    ],
)
def test_means_and_medians_are_weighted(how: str, values: list[Any], weights: Any, result: float) -> None:
    assert average(numbers(*values, weights=weights), how).result == result


def verdicts(*pairs: tuple[str, float]) -> dict[str, Any]:
    return {"verdicts": [{"rationale": rationale, "satisfaction": satisfaction} for rationale, satisfaction in pairs]}


def test_a_panel_of_judges_is_averaged_verdict_by_verdict_in_the_words_of_the_nearest() -> None:
    decision = average(
        numbers(
            verdicts(("good", 100), ("bad", 0)),
            verdicts(("fair", 80), ("poor", 30)),
            verdicts(("weak", 30), ("ok", 60)),
        ),
        "mean",
    )
    assert decision.result == verdicts(("fair", 70), ("poor", 30))
    assert decision.winner.place == 1
    assert decision.deviations == pytest.approx({0: (30 / 100 + 30 / 60) / 2, 1: 0.05, 2: (40 / 100 + 30 / 60) / 2})
    assert decision.consensus == pytest.approx(1 - (0.4 + 0.05 + 0.45) / 3)


def test_what_all_agree_on_is_the_result_and_a_consensus_of_one() -> None:
    decision = average(numbers(*[verdicts(("same", 99.9))] * 3, weights=[0.4, 0.3, 0.3]), "mean")
    assert (decision.result, decision.consensus) == (verdicts(("same", 99.9)), 1.0)


def test_integers_stay_integers_where_the_schema_asks_for_them() -> None:
    schema = {
        "properties": {"n": {"$ref": "#/$defs/count"}, "x": {"type": "number"}, "l": {"items": {"type": "integer"}}},
        "$defs": {"count": {"type": "integer"}},
    }
    values = [{"x": 1, "n": 1, "l": [1, 5]}, {"l": [2, 6], "n": 2, "x": 2}, {"x": 4, "n": 2, "l": [2, 6]}]
    assert average(numbers(*values), "mean", schema).result == {"l": [2, 6], "n": 2, "x": pytest.approx(7 / 3)}


@pytest.mark.parametrize(
    ("schema", "values", "result"),
    [
        ({"type": ["integer", "null"]}, (10, 20, 79), 36),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, (10, 20, 79), 36),
        ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/count"}]}, (10, 20, 79), 36),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, (1, 2), 1.5),
        ({"type": ["number", "null"]}, (1, 2), 1.5),
        ({"enum": [1, 3, 5]}, (1, 5, 5), 5),  # 3.67, and 4, are not allowed
        ({"enum": [1, 3, 5]}, (1, 5), 3),
        ({"type": "integer", "minimum": 2}, (2, 3), 2),
        ({"type": "number", "enum": [0.5, 1.5]}, (0.5, 0.5, 1.5), 0.5),
        ({"type": "integer"}, (2 * 10**15, 4 * 10**15), 3 * 10**15),
    ],
)
def test_a_mean_fits_the_schema(schema: dict[str, Any], values: tuple[float, ...], result: float) -> None:
    whole = {"properties": {"a": schema}, "$defs": {"count": {"type": "integer"}}}
    found = average(numbers(*[{"a": value} for value in values]), "mean", whole).result["a"]
    assert (found, type(found)) == (result, type(result))
    jsonschema.validate({"a": found}, whole)


def test_a_mean_fits_the_schema_within_forms_and_free_keys() -> None:
    schema = {
        "properties": {
            "inner": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/inner"}]},
            "free": {"type": "object", "additionalProperties": {"type": "integer"}},
        },
        "$defs": {
            "inner": {
                "type": "object",
                "oneOf": [{"required": ["m"]}, {"required": ["n"]}],
                "properties": {"n": {"items": {"type": "integer"}}},
            }
        },
    }
    values = [{"inner": {"n": [n]}, "free": {"x": n}} for n in (1, 2, 2)]
    assert average(numbers(*values), "mean", schema).result == {"inner": {"n": [2]}, "free": {"x": 2}}


def test_a_mean_that_fits_no_form_is_the_answer_of_the_nearest() -> None:
    low = {"properties": {"n": {"maximum": 1}, "m": {"maximum": 0}}}
    high = {"properties": {"n": {"minimum": 10}, "m": {"minimum": 10}}}
    values = [{"n": 12, "m": 12}, {"n": 1, "m": 0}]
    decision = average(numbers(*values), "mean", {"oneOf": [low, high], "properties": {"m": {}}})
    assert (decision.winner.place, decision.result) == (0, values[0])


def test_only_answers_of_the_commonest_shape_are_averaged() -> None:
    decision = average(numbers({"a": 1}, {"a": 2, "b": 2}, {"a": 3}), "mean")
    assert decision.result == {"a": 2}
    assert set(decision.deviations) == {0, 2}


@pytest.mark.parametrize(
    "value", ["none", {"#": "x"}, [], None, True, 1e200, float("nan"), {"a": 10**400}, "[" * 100_000]
)
def test_nothing_is_averaged_without_numbers_that_can_be(value: Any) -> None:
    assert measured(value, "text") is None
    assert measured(value, "json") is None


def test_a_text_is_averaged_as_json_where_that_is_asked_for() -> None:
    assert measured('```json\n{"a": 1}\n```', "json") == ('{"a": "#"}', {"a": 1})
    assert measured('{"a": 1}', "number") == ('"#"', 1.0)


# ---- schemas ---------------------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 3},
        "score": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
        "kind": {"enum": ["a", "b"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 2},
        "rank": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "is": {"const": True},
    },
    "required": ["name"],
    "$defs": {"tag": {"type": ["string", "boolean"]}},
}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({"name": "x"}, None),
        ({"name": "x", "score": 0, "kind": "a", "tags": ["t", True], "rank": None, "is": True, "more": 1}, None),
        ({"name": "x", "rank": 3.0}, None),
        ([], "the answer is no object"),
        ({}, "the answer lacks 'name'"),
        ({"name": ""}, "the answer.name breaks minLength 1"),
        ({"name": "long"}, "the answer.name breaks maxLength 3"),
        ({"name": 3}, "the answer.name is no string"),
        ({"name": "x", "score": -1}, "the answer.score breaks minimum 0"),
        ({"name": "x", "score": 1}, "the answer.score breaks exclusiveMaximum 1"),
        ({"name": "x", "score": True}, "the answer.score is no number"),
        ({"name": "x", "kind": "c"}, "the answer.kind is none of the values allowed"),
        ({"name": "x", "tags": []}, "the answer.tags breaks minItems 1"),
        ({"name": "x", "tags": ["t", 3]}, "the answer.tags[1] is no string or boolean"),
        ({"name": "x", "tags": ["t"] * 3}, "the answer.tags breaks maxItems 2"),
        ({"name": "x", "rank": 1.5}, "the answer.rank fits none of the forms allowed"),
        ({"name": "x", "is": False}, "the answer.is is none of the values allowed"),
    ],
)
def test_an_answer_that_does_not_fit_its_schema_is_told(value: Any, problem: str | None) -> None:
    assert misfit(value, SCHEMA) == problem
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(value) == (problem is None)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_finite_number_is_no_integer(value: float) -> None:
    assert misfit({"s": value}, {"properties": {"s": {"type": "integer"}}}) == "the answer.s is no integer"
    assert misfit({"name": "x", "rank": value}, SCHEMA) == "the answer.rank fits none of the forms allowed"
    assert misfit(10**400, {"type": "integer"}) is None


# ---- theory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "members", "expected"),
    [
        (0.2, 1, 0.2),
        (0.2, 3, 3 * 0.2**2 * 0.8 + 0.2**3),
        (0.3, 2, 0.3),  # a tie is wrong half of the time: a second member alone changes nothing
        (0.1, 5, 10 * 0.1**3 * 0.9**2 + 5 * 0.1**4 * 0.9 + 0.1**5),
        (0.5, 7, 0.5),
        (0.0, 3, 0.0),
        (1.0, 4, 1.0),
    ],
)
def test_a_majority_errs_as_the_binomial_says(error: float, members: int, expected: float) -> None:
    assert majority_error(error, members) == pytest.approx(expected)


def test_correlated_errors_are_between_independent_ones_and_one_member() -> None:
    found = [majority_error(0.2, 5, correlation=rho) for rho in (0, 0.01, 0.2, 0.6, 0.99, 1)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.05792)
    assert found[-1] == 0.2
    # the chance p of an error is Beta(0.8, 3.2), of which any two errors have the correlation 1 / (0.8 + 3.2 + 1)
    square, cube = 0.8 * 1.8 / (4 * 5), 0.8 * 1.8 * 2.8 / (4 * 5 * 6)
    assert majority_error(0.2, 3, correlation=0.2) == pytest.approx(3 * (square - cube) + cube)


def test_effective_members() -> None:
    assert effective_members(5, 0) == 5
    assert effective_members(5, 1) == 1
    assert effective_members(5, 0.25) == 2.5
    for wrong in ((0, 0.5), (3, -0.1), (3, 1.1)):
        with pytest.raises(ValueError, match="at least one member"):
            effective_members(*wrong)
    with pytest.raises(ValueError, match="from 0 to 1"):
        majority_error(1.2, 3)


def test_the_guide_says_what_these_functions_do() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "ensembles.md").read_text()
    shown = re.findall(r"^((?:majority_error|effective_members)\(.*\)) +# ([0-9.]+):", guide, re.MULTILINE)
    functions = {"majority_error": majority_error, "effective_members": effective_members}
    assert [round(eval(call, functions), 3) for call, _ in shown] == [float(value) for _, value in shown] != []
