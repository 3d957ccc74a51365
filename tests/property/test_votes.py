"""Votes agree with a brute-force count in exact arithmetic, in whatever order answers come, ties included."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pgharness.gateway.voting import (
    Ballot,
    Decision,
    average,
    elect,
    is_settled,
    label_of,
    majority_error,
    measured,
    misfit,
)

QUICK = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# Few labels and coarse numbers, so that ties are common.
TENTHS = st.integers(1, 10)
ROWS = st.lists(st.tuples(st.sampled_from("abc"), TENTHS, TENTHS), min_size=1, max_size=9)
VOTES = st.sampled_from(["majority", "weighted", "best_confidence"])
NUMBERS = st.one_of(st.integers(-100, 100), st.floats(-1e6, 1e6, allow_nan=False))


def ballots_of(rows: Sequence[tuple[str, int, int]]) -> list[Ballot]:
    return [Ballot(place, label, w / 10, c / 10) for place, (label, w, c) in enumerate(rows)]


def by_label(rows: Sequence[tuple[str, int, int]], value: Callable[[int, int], Fraction]) -> dict[str, list[Fraction]]:
    found = defaultdict(list)
    for label, weight, confidence in rows:
        found[label].append(value(weight, confidence))
    return found


def counted(rows: Sequence[tuple[str, int, int]], vote: str) -> tuple[str, Fraction, set[str]]:
    """Return the winning label, the consensus and the labels that were level, by a count of fractions."""
    match vote:
        case "majority":
            scores = {label: sum(found) for label, found in by_label(rows, lambda w, c: Fraction(1)).items()}
        case "weighted":
            scores = {label: sum(found) for label, found in by_label(rows, lambda w, c: Fraction(w * c, 100)).items()}
        case _:
            scores = {label: max(found) for label, found in by_label(rows, lambda w, c: Fraction(c, 10)).items()}
    most = max(scores.values())
    level = {label for label, score in scores.items() if score == most}
    confidences = {label: sum(found) for label, found in by_label(rows, lambda w, c: Fraction(c, 10)).items()}
    best = max(confidences[label] for label in level)
    winner = next(label for label, _, _ in rows if label in level and confidences[label] == best)
    consensus = most if vote == "best_confidence" else Fraction(most) / sum(scores.values())
    return winner, Fraction(consensus), level


@QUICK
@given(ROWS, VOTES)
def test_a_vote_agrees_with_a_brute_force_count(rows: list[tuple[str, int, int]], vote: str) -> None:
    decision = elect(ballots_of(rows), vote)
    winner, consensus, level = counted(rows, vote)
    assert decision.winner.label == winner
    assert abs(decision.consensus - float(consensus)) < 1e-9
    assert set(decision.tied) == (level if len(level) > 1 else set())


@QUICK
@given(ROWS, VOTES)
def test_the_winner_is_a_real_answer_the_first_or_the_most_confident_of_its_label(
    rows: list[tuple[str, int, int]], vote: str
) -> None:
    ballots = ballots_of(rows)
    winner = elect(ballots, vote).winner
    same = [ballot for ballot in ballots if ballot.label == winner.label]
    assert winner == (max(same, key=lambda ballot: ballot.confidence) if vote == "best_confidence" else same[0])


@QUICK
@given(ROWS, VOTES, st.randoms(use_true_random=False))
def test_the_order_in_which_answers_come_does_not_matter(rows: list[Any], vote: str, order: Any) -> None:
    ballots = ballots_of(rows)
    shuffled = list(ballots)
    order.shuffle(shuffled)
    assert elect(shuffled, vote) == elect(ballots, vote)


@QUICK
@given(ROWS, VOTES, st.randoms(use_true_random=False))
def test_the_order_of_members_decides_ties_alone(rows: list[Any], vote: str, order: Any) -> None:
    decision = elect(ballots_of(rows), vote)
    order.shuffle(rows)
    other = elect(ballots_of(rows), vote)
    assert set(other.tied) == set(decision.tied)
    assert abs(other.consensus - decision.consensus) < 1e-9
    assert other.winner.label == decision.winner.label or {other.winner.label, decision.winner.label} <= set(other.tied)


@QUICK
@given(ROWS, VOTES, st.permutations("xyz"))
def test_the_names_of_answers_do_not_matter(rows: list[Any], vote: str, names: Sequence[str]) -> None:
    renamed = dict(zip("abc", names, strict=True))
    decision = elect(ballots_of(rows), vote)
    other = elect([ballot._replace(label=renamed[ballot.label]) for ballot in ballots_of(rows)], vote)
    assert (other.winner.place, other.consensus) == (decision.winner.place, decision.consensus)
    assert other.tied == tuple(renamed[label] for label in decision.tied)


@QUICK
@given(ROWS, st.sampled_from("abc"))
def test_a_vote_more_for_the_winner_keeps_it_the_winner(rows: list[Any], label: str) -> None:
    decision = elect(ballots_of(rows), "majority")
    more = elect(ballots_of([*rows, (decision.winner.label, 10, 10)]), "majority")
    assert (more.winner.label, more.tied) == (decision.winner.label, ())
    assert more.consensus >= decision.consensus


@QUICK
@given(ROWS, st.sampled_from(["majority", "weighted"]), st.integers(1, 9), st.integers(0, 10))
def test_a_vote_that_stops_early_claims_no_more_than_all_would(
    rows: list[Any], vote: str, heard: int, threshold: int
) -> None:
    ballots = ballots_of(rows)
    early, left = elect(ballots[:heard], vote), sum(b.weight if vote == "weighted" else 1 for b in ballots[heard:])
    if is_settled(early, left, min_consensus=threshold / 10, answers_below=True):
        whole = elect(ballots, vote)
        assert whole.winner.label == early.winner.label
        assert elect(ballots[:heard], vote, left).consensus <= whole.consensus + 1e-9


# ---- means -----------------------------------------------------------------------------------------------------------


def averaged(values: Sequence[Any], how: str, weights: Sequence[float]) -> Decision:
    ballots = []
    for place, (value, weight) in enumerate(zip(values, weights, strict=True)):
        found = measured(value, "text")
        assert found is not None
        ballots.append(Ballot(place, found[0], weight, 1.0, found[1]))
    return average(ballots, how)


@QUICK
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=7), st.sampled_from(["mean", "median"]), st.data())
def test_means_agree_with_the_library_and_stay_within_the_answers(rows: list[Any], how: str, data: Any) -> None:
    values = [{"a": [one], "b": other, "c": "text"} for one, other in rows]
    decision = averaged(values, how, [1.0] * len(values))
    for column, found in zip(zip(*rows, strict=True), (decision.result["a"][0], decision.result["b"]), strict=True):
        expected = statistics.fmean(column) if how == "mean" else statistics.median(map(float, column))
        assert abs(found - expected) <= 1e-9 * max(1.0, *map(abs, column))
        assert min(column) <= found <= max(column)
    assert 0 <= decision.consensus <= 1
    order = data.draw(st.permutations(values))
    shuffled = averaged(order, how, [1.0] * len(values))
    assert shuffled.result == decision.result
    assert abs(shuffled.consensus - decision.consensus) < 1e-9


@QUICK
@given(st.lists(st.tuples(NUMBERS, st.integers(1, 4)), min_size=1, max_size=5), st.sampled_from(["mean", "median"]))
def test_a_weight_counts_like_as_many_answers(rows: list[tuple[float, int]], how: str) -> None:
    weighted = averaged([value for value, _ in rows], how, [float(weight) for _, weight in rows]).result
    repeated = [value for value, weight in rows for _ in range(weight)]
    plain = averaged(repeated, how, [1.0] * len(repeated)).result
    assert abs(weighted - plain) <= 1e-9 * max(1.0, *(abs(value) for value, _ in rows))


FORMS: list[dict[str, Any]] = [
    {"type": ["integer", "null"]},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0}]},
    {"enum": [1, 3, 5]},
    {"type": "number", "maximum": 50},
]


@QUICK
@given(st.lists(st.lists(st.sampled_from([1, 3, 5]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_means_fit_the_schema_that_the_answers_fit(rows: list[list[int]]) -> None:
    schema = {"properties": {name: {"anyOf": [form]} for name, form in zip("abcd", FORMS, strict=True)}}
    ballots = [Ballot(place, "", value=dict(zip("abcd", row, strict=True))) for place, row in enumerate(rows)]
    for how in ("mean", "median"):
        result = average(ballots, how, schema).result
        assert misfit(result, schema) is None
        assert abs(result["d"] - average(ballots, how).result["d"]) < 1e-9


# ---- normalisation and theory ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


@QUICK
@given(JSON, st.sampled_from(["text", "number", "boolean", "json", "none"]))
def test_every_answer_has_one_label_or_none(value: Any, normalise: str) -> None:
    label = label_of(value, normalise)
    assert label is None or (isinstance(label, str) and label)
    if normalise == "text" and isinstance(value, str) and label is not None:
        assert label_of(f"  {label.upper()}\n", "text") == label_of(label.upper(), "text")


@QUICK
@given(st.integers(-(10**12), 10**12), st.sampled_from([",", "\u00a0", "\u2009", "\u202f"]), st.integers(0, 99))
def test_a_number_is_read_as_it_was_written(number: int, gap: str, cents: int) -> None:
    written = f"{number:,}".replace(",", gap)
    assert label_of(f"It is {written}, or so.", "number") == str(number)
    assert float(label_of(f"${written}.{cents:02}", "number") or "nan") == float(f"{number}.{cents:02}")


@settings(QUICK, max_examples=100)
@given(st.floats(0, 1), st.integers(1, 15), st.floats(0, 1))
def test_a_majority_errs_as_its_mirror_image_is_right(error: float, members: int, correlation: float) -> None:
    wrong = majority_error(error, members, correlation=correlation)
    right = majority_error(1 - error, members, correlation=correlation)
    assert 0 <= wrong <= 1
    assert abs(wrong + right - 1) < 1e-6
