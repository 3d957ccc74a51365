"""Ensembles against scripted members on a scripted clock: whom they ask, when they stop, and what they make of it."""

from __future__ import annotations

import asyncio
import json
import selectors
import textwrap
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pgharness.errors import (
    CodeFailed,
    InsufficientResponses,
    ModelError,
    NoConsensus,
    RateLimited,
    Refused,
    RequestRejected,
    ServerFailed,
    Unavailable,
)
from pgharness.gateway.calls import Member
from pgharness.gateway.ensemble import Ensemble
from pgharness.gateway.ensemble_options import EnsembleParameters
from pgharness.types import Completion, Message, ModelSpec, Request, Trail, Usage

ASKED = Request(messages=(Message("user", "x" * 400),), seed=7)


class ScriptedClock(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while anything can be done, and then jumps to what comes next."""

    def __init__(self) -> None:
        super().__init__(_Jumps(self))
        self.now = 1000.0

    def time(self) -> float:
        return self.now


class _Jumps(selectors.DefaultSelector):
    def __init__(self, loop: ScriptedClock) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everybody waits, and for nothing"
            self._loop.now += timeout
        return events


def on_scripted_clock(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run something, and see that it leaves no task behind."""

    async def watched() -> Any:
        try:
            return await work()
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task outlives its request"

    with asyncio.Runner(loop_factory=ScriptedClock) as runner:
        return runner.run(watched())


Step = str | dict[str, Any] | Completion | Exception


@dataclass
class Scripted:
    """A member that answers by a script: after so many seconds, what each step says; text with `confidence`."""

    name: str
    seconds: float = 0.0
    steps: Sequence[Step] = ("yes",)
    requests: list[Request] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(id=ord(self.name[0]), name=self.name, provider="simulator", input_usd_per_million=1.0)

    async def __call__(self, request: Request) -> Completion:
        self.began.append(asyncio.get_running_loop().time() - 1000.0)
        self.requests.append(request)
        step = self.steps[min(len(self.requests), len(self.steps)) - 1]
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("answered")
        if isinstance(step, Exception):
            raise step
        if isinstance(step, dict):
            return Completion(text=json.dumps(step), data=step, usage=Usage(100, 20), finish_reason="stop")
        return step if isinstance(step, Completion) else Completion(text=step, usage=Usage(100, 20, 5))


def sure(text: str, confidence: float | None) -> Completion:
    return Completion(text=text, confidence=confidence, usage=Usage(100, 20))


def scripted(name: str, *steps: Step, seconds: float = 0.0) -> Scripted:
    return Scripted(name, seconds=seconds, steps=steps or ("yes",))


def ensemble(
    members: Sequence[Any], *, allows_code: bool = False, weights: Mapping[str, float] | None = None, **options: Any
) -> Ensemble:
    names: list[Any] = [member.spec.name for member in members]
    if weights:
        names = [{"model": name, "weight": weights[name]} for name in names]
    specs = tuple(member.spec for member in members)
    spec = ModelSpec(id=1, name="panel", provider="ensemble", parameters={"members": names, **options}, members=specs)
    return Ensemble(spec, members, allows_code=allows_code)


def answer(members: Sequence[Any], request: Request = ASKED, **options: Any) -> tuple[Completion, dict[str, Any]]:
    """Return the answer of an ensemble and its composition, which has to be JSON."""
    completion = on_scripted_clock(lambda: ensemble(members, **options)(request))
    assert isinstance(completion, Completion)
    assert completion.composition is not None
    return completion, json.loads(json.dumps(completion.composition, allow_nan=False))


def failure(members: Sequence[Any], request: Request = ASKED, **options: Any) -> tuple[ModelError, dict[str, Any]]:
    """Return the error of an ensemble and its composition."""
    with pytest.raises(ModelError) as raised:
        answer(members, request, **options)
    assert raised.value.composition is not None
    return raised.value, json.loads(json.dumps(raised.value.composition, allow_nan=False))


def asked(members: Sequence[Scripted]) -> str:
    return "".join(member.name for member in members if member.requests)


# ---- votes -----------------------------------------------------------------------------------------------------------


def test_a_majority_answers_in_the_words_of_its_first_member() -> None:
    members = [scripted("a", "No."), scripted("b", " Yes"), scripted("c", "yes", seconds=3)]
    completion, told = answer(members)
    assert (completion.text, completion.model, completion.confidence) == (" Yes", "b", pytest.approx(2 / 3))
    assert completion.usage == Usage(300, 60, 15)
    assert told == {
        "strategy": "parallel",
        "vote": "majority",
        "responses": 3,
        "winner": "b",
        "consensus": 0.666667,
        "tie": False,
        "votes": {"no.": 1, "yes": 2},
        "failures": [],
    }


def test_the_order_of_answers_does_not_matter_and_a_tie_is_told() -> None:
    slow = {"a": 3.0, "b": 1.0, "c": 2.0}
    for delays in (slow, dict.fromkeys(slow, 0.0)):
        members = [
            scripted(name, text, seconds=delays[name]) for name, text in zip("abc", ("x", "y", "z"), strict=True)
        ]
        completion, told = answer(members)
        assert completion.text == "x"
        assert (told["tie"], told["tied"], told["consensus"]) == (True, ["x", "y", "z"], 0.333333)


@pytest.mark.parametrize(
    ("options", "winner", "consensus"),
    [
        ({"vote": "majority"}, "b", 2 / 3),
        ({"vote": "weighted", "weights": {"a": 0.5, "b": 0.3, "c": 0.1}}, "a", 0.5 / 0.9),
        ({"vote": "weighted", "confidence": "reported"}, "a", 0.9 / 1.5),
        ({"vote": "best_confidence", "confidence": "reported"}, "a", 0.9),
        (
            {"vote": "weighted", "confidence": "reported", "weights": {"a": 0.1, "b": 1.0, "c": 1.0}},
            "b",
            0.6 / (0.09 + 0.6),
        ),
    ],
)
def test_each_vote_has_its_own_winner(options: dict[str, Any], winner: str, consensus: float) -> None:
    members = [scripted("a", sure("x", 0.9)), scripted("b", sure("y", 0.2)), scripted("c", sure("y", 0.4))]
    completion, told = answer(members, **options)
    assert told["winner"] == winner
    assert completion.confidence == pytest.approx(consensus)


def test_unanimity_is_asked_for_and_refused() -> None:
    completion, _ = answer([scripted("a", "yes"), scripted("b", "YES")], vote="unanimous")
    assert completion.confidence == 1.0
    error, told = failure([scripted("a", "yes"), scripted("b", "no")], vote="unanimous")
    assert isinstance(error, NoConsensus)
    assert (error.outcome, error.is_retryable, error.spends_attempt) == ("no_consensus", True, True)
    assert (error.text, error.input_tokens, error.output_tokens) == ("yes", 200, 40)
    assert (told["votes"], told["below"]) == ({"yes": 1, "no": 1}, "min_consensus")


def test_an_answer_whose_confidence_is_not_known_counts_with_the_default_and_is_told() -> None:
    members = [scripted("a", sure("x", None)), scripted("b", sure("y", 0.4)), scripted("c", sure("z", float("nan")))]
    _, told = answer(members, vote="best_confidence", confidence="reported", default_confidence=0.3)
    assert (told["winner"], told["without_confidence"]) == ("b", ["a", "c"])
    _, told = answer(members, vote="best_confidence", confidence="reported")
    assert (told["winner"], told["consensus"]) == ("a", 0.5)


def test_a_stated_confidence_is_taken_out_of_text_and_not_voted_on() -> None:
    members = [
        scripted("a", "x\nconfidence: 0.4"),
        scripted("b", "y\nconfidence: 0.9"),
        scripted("c", "y\nConfidence: 50%"),
    ]
    completion, told = answer(members, vote="weighted", confidence="stated")
    assert (completion.text, told["votes"]) == ("y", {"x": 0.4, "y": 1.4})
    data = [scripted(name, {"n": n, "confidence": c}) for name, n, c in (("a", 1, 0.4), ("b", 2, 0.9), ("c", 2, 0.8))]
    completion, told = answer(data, vote="majority", confidence="stated")
    assert completion.data == {"n": 2, "confidence": 0.9}
    assert told["votes"] == {'{"n":1}': 1, '{"n":2}': 2}


@pytest.mark.parametrize(
    ("options", "texts", "winner", "votes"),
    [
        ({"normalise": "number"}, ("It is 4.", "5", "4.0"), "It is 4.", {"4": 2, "5": 1}),
        ({"normalise": "boolean"}, ("no", "Yes!", "That is true"), "Yes!", {"false": 1, "true": 2}),
        ({"normalise": "json"}, ("[1, 2]", '{"a": 1}', '{"a":1.0}'), '{"a": 1}', {"[1,2]": 1, '{"a":1}': 2}),
        ({"normalise": "none"}, ("Yes", "yes", "yes"), "yes", {"Yes": 1, "yes": 2}),
        ({"field": "a"}, ('{"a": 1, "b": 1}', '{"a": 2}', '{"a": 2, "b": 5}'), '{"a": 2}', {"1": 1, "2": 2}),
        ({"field": "a.b"}, ('{"a": {"b": "x"}}', '{"a": {"b": "y"}}', '{"a": {"b": "X"}}'), None, {"x": 2, "y": 1}),
    ],
)
def test_answers_are_normalised_before_they_vote(
    options: dict[str, Any], texts: tuple[str, ...], winner: str | None, votes: dict[str, int]
) -> None:
    completion, told = answer([scripted(name, text) for name, text in zip("abc", texts, strict=True)], **options)
    assert (completion.text, told["votes"]) == (winner or texts[0], votes)


def test_an_answer_that_cannot_be_read_is_a_failure() -> None:
    members = [scripted("a", "no idea"), scripted("b", "4"), scripted("c", "5 or so"), scripted("d", "4")]
    _, told = answer(members, normalise="number")
    assert (told["responses"], told["votes"]) == (3, {"4": 2, "5": 1})
    assert told["failures"] == [
        {"member": "a", "outcome": "invalid_output", "error": "a: the answer holds nothing to vote on (number)"}
    ]
    _, told = answer(
        [scripted("a", '{"b": 1}'), scripted("b", "[]"), scripted("c", '{"x": 1}')], field="x", min_responses=1
    )
    assert [found["error"] for found in told["failures"]] == [
        "a: the answer has no field 'x'",
        "b: the answer has no field 'x'",
    ]


# ---- panels of judges ------------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "verdicts": {
            "type": "array",
            "minItems": 2,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "rationale": {"type": "string", "minLength": 1},
                    "satisfaction": {"type": "number", "minimum": 0, "maximum": 100},
                },
                "required": ["rationale", "satisfaction"],
            },
        }
    },
    "required": ["verdicts"],
}
GRADE = Request(messages=(), schema=SCHEMA, schema_name="verdicts", seed=1)


def judge(name: str, *satisfactions: float) -> Scripted:
    return scripted(
        name, {"verdicts": [{"rationale": f"{name}{n}", "satisfaction": s} for n, s in enumerate(satisfactions)]}
    )


def test_a_panel_of_judges_gives_the_mean_of_each_verdict() -> None:
    judges = [judge("a", 90, 10), judge("b", 80, 20), judge("c", 40, 60), judge("d", 200, 0), judge("e", 50)]
    completion, told = answer(judges, GRADE, vote="mean")
    verdicts = [{"rationale": "b0", "satisfaction": 70}, {"rationale": "b1", "satisfaction": 30}]
    assert completion.data == {"verdicts": verdicts}
    assert json.loads(completion.text) == completion.data
    assert [found["member"] for found in told["deviations"]] == ["a", "b", "c"]
    assert (told["winner"], told["responses"]) == ("b", 3)
    assert told["failures"] == [
        {
            "member": "d",
            "outcome": "invalid_output",
            "error": "d: the answer.verdicts[0].satisfaction breaks maximum 100",
        },
        {"member": "e", "outcome": "invalid_output", "error": "e: the answer.verdicts breaks minItems 2"},
    ]
    assert 0.5 < told["consensus"] == round(completion.confidence or 0, 6) < 0.8
    completion, _ = answer([*judges[:3], judge("z", 100, 100)], GRADE, vote="median")
    assert [verdict["satisfaction"] for verdict in completion.data["verdicts"]] == [85, 40]


def test_numbers_in_texts_are_averaged_and_weighted() -> None:
    members = [scripted("a", "about 10"), scripted("b", "20"), scripted("c", "none")]
    completion, told = answer(members, vote="mean", weights={"a": 3, "b": 1, "c": 1})
    assert (completion.text, completion.data, told["failures"][0]["member"]) == ("12.5", None, "c")


def test_an_answer_of_another_shape_is_left_out_of_a_mean() -> None:
    members = [scripted("a", {"x": 1, "y": 1}), scripted("b", {"x": 3}), scripted("c", {"x": 5})]
    completion, told = answer(members, vote="mean")
    assert (completion.data, told["responses"]) == ({"x": 4}, 2)
    assert told["failures"][0]["error"] == "a: the answer has another shape than most"
    error, _ = failure(members, vote="mean", min_responses=3)
    assert isinstance(error, InsufficientResponses)


@pytest.mark.parametrize(
    ("shapes", "options", "asks", "mean"),
    [
        (["a", "ab", "a", "a"], {"strategy": "sequential"}, "abc", {"a": 1}),
        (["ab", "a", "ab", "a"], {"strategy": "sequential", "min_responses": 2}, "abc", {"a": 1, "b": 1}),
        (
            ["a", "ab", "a", "a"],
            {"strategy": "cascade", "confidence": "stated", "default_confidence": 1},
            "a",
            {"a": 1},
        ),
        (
            ["a", "ab", "a", "a"],
            {"strategy": "cascade", "confidence": "stated", "default_confidence": 1, "min_responses": 2},
            "abc",
            {"a": 1},
        ),
        (["a", "ab", "a", "a"], {"strategy": "hedged", "min_responses": 2}, "abc", {"a": 1}),
    ],
)
def test_answers_of_another_shape_are_not_enough_for_a_mean(
    shapes: Sequence[str], options: dict[str, Any], asks: str, mean: dict[str, int]
) -> None:
    members = [scripted(name, dict.fromkeys(keys, 1)) for name, keys in zip("abcd", shapes, strict=True)]
    options = {"vote": "mean", **options}
    completion, told = answer(members, **options)
    assert (asked(members), completion.data, told["responses"]) == (asks, mean, len(told["deviations"]))


def test_asking_in_turn_for_a_mean_stops_where_too_few_of_one_shape_are_left() -> None:
    members = [scripted(name, {name: 1}) for name in "abcde"]
    error, _ = failure(members, vote="mean", strategy="sequential", min_responses=3)
    assert (isinstance(error, InsufficientResponses), asked(members)) == (True, "abcd")


def test_a_number_that_is_not_finite_does_not_fit_where_an_integer_is_asked_for() -> None:
    schema = {"type": "object", "properties": {"s": {"type": "integer"}}}
    members = [scripted(name, {"s": s}) for name, s in zip("abcd", (1, float("inf"), float("nan"), 1), strict=True)]
    _, told = answer(members, Request(messages=(), schema=schema))
    assert [(found["outcome"], found["error"]) for found in told["failures"]] == [
        ("invalid_output", "b: the answer.s is no integer"),
        ("invalid_output", "c: the answer.s is no integer"),
    ]


# ---- failures and thresholds -----------------------------------------------------------------------------------------


def test_the_rest_answers_when_some_fail() -> None:
    members = [scripted("a", ServerFailed("broken", input_tokens=7)), scripted("b"), scripted("c", ValueError("bug"))]
    completion, told = answer(members, min_responses=1)
    assert (completion.text, completion.usage) == ("yes", Usage(107, 20, 5))
    assert told["failures"] == [
        {"member": "a", "outcome": "server_error", "error": "broken"},
        {"member": "c", "outcome": "code_failed", "error": "ValueError: bug"},
    ]


def test_half_of_the_members_have_to_answer() -> None:
    for failing, fails in ((1, False), (2, True)):
        members = [
            *[scripted("a", Refused("no", text="I will not")) for _ in range(failing)],
            *[scripted("b")] * (3 - failing),
        ]
        if not fails:
            assert answer(members)[0].text == "yes"
            continue
        error, told = failure(members)
        assert isinstance(error, InsufficientResponses)
        assert error.outcome == "insufficient_responses"
        assert str(error).startswith("panel: 2 of 3 members have to give a usable answer, and 1 did (refused: no; ")
        assert (error.text, error.is_retryable, error.spends_attempt) == ("I will not", True, True)
        assert (told["responses"], told["below"], told["votes"]) == (1, "min_responses", {"yes": 1})


@pytest.mark.parametrize(
    ("errors", "retryable", "spends", "wait"),
    [
        ([RateLimited("slow", retry_after=2), Unavailable("down", retry_after=5)], True, False, 5),
        ([RateLimited("slow"), Unavailable("down")], True, False, None),
        ([RateLimited("slow", retry_after=2), ServerFailed("broken")], True, True, None),
        ([RateLimited("slow", retry_after=2), RequestRejected("wrong")], False, True, None),
        ([RequestRejected("wrong"), RequestRejected("wrong")], False, True, None),
    ],
)
def test_delays_spend_no_attempt_and_what_cannot_succeed_is_not_tried_again(
    errors: list[ModelError], retryable: bool, spends: bool, wait: float | None
) -> None:
    error, _ = failure([scripted("a"), *[scripted("b", error) for error in errors]], min_responses=3)
    assert (error.is_retryable, error.spends_attempt, error.retry_after) == (retryable, spends, wait)


@pytest.mark.parametrize(
    ("options", "texts", "below"),
    [
        ({"min_consensus": 0.6}, ("x", "y", "z"), "min_consensus"),
        ({"min_responses": 3}, ("x", "y", ServerFailed("broken")), "min_responses"),
        ({"vote": "unanimous"}, ("x", "x", "y"), "min_consensus"),
    ],
)
def test_below_a_threshold_it_fails_answers_or_escalates(options: dict[str, Any], texts: Any, below: str) -> None:
    def members() -> list[Scripted]:
        return [scripted(name, text) for name, text in zip("abc", texts, strict=True)]

    _, told = failure(members(), **options)
    assert told["below"] == below

    completion, told = answer(members(), **options, below="answer")
    assert (completion.text, told["below"]) == ("x", below)

    panel = [*members(), scripted("d", sure("from d", 0.7))]
    completion, told = answer(panel, **options, below="escalate")
    assert (completion.text, completion.model, completion.confidence) == ("from d", "d", 0.7)
    assert (told["below"], told["winner"], told["is_escalated"]) == (below, "d", True)
    assert completion.usage.input_tokens == 100 * sum(isinstance(text, str) for text in texts) + 100


def test_the_last_member_is_asked_only_to_decide() -> None:
    members = [scripted("a", "x"), scripted("b", "x"), scripted("c", "y")]
    completion, told = answer(members, below="escalate", min_consensus=0.6)
    assert (completion.text, asked(members), told["votes"]) == ("x", "ab", {"x": 2})


def test_a_last_member_that_fails_decides_how_it_goes_on() -> None:
    members = [scripted("a", "x"), scripted("b", "y"), scripted("c", RateLimited("slow", retry_after=9))]
    error, told = failure(members, below="escalate", min_consensus=0.6)
    assert isinstance(error, NoConsensus)
    assert (error.spends_attempt, error.retry_after, told["failures"][0]["member"]) == (False, 9, "c")
    members = [scripted("a", RequestRejected("wrong")), scripted("c", ServerFailed("broken"))]
    error, _ = failure(members, below="escalate")
    assert (error.is_retryable, error.spends_attempt) == (True, True)
    members[1].steps = [RequestRejected("wrong")]
    assert failure(members, below="escalate")[0].is_retryable is False


def test_with_nobody_to_answer_it_fails_even_where_it_would_answer_all_the_same() -> None:
    error, told = failure([scripted("a", ServerFailed("broken"))], below="answer")
    assert isinstance(error, InsufficientResponses)
    assert "winner" not in told


# ---- strategies ------------------------------------------------------------------------------------------------------


def test_all_are_asked_at_once_and_the_slowest_decides_the_latency() -> None:
    members = [scripted("a", seconds=3), scripted("b", seconds=5), scripted("c", seconds=1)]
    completion, seconds = timed(members)
    assert (completion.text, seconds) == ("yes", 5)
    assert [member.began for member in members] == [[0], [0], [0]]


def timed(members: Sequence[Any], **options: Any) -> tuple[Completion, float]:
    async def work() -> tuple[Completion, float]:
        completion = await ensemble(members, **options)(ASKED)
        return completion, asyncio.get_running_loop().time() - 1000.0

    found = on_scripted_clock(work)
    assert isinstance(found, tuple)
    return found


def test_members_that_cannot_change_the_outcome_are_cancelled_where_that_is_wanted() -> None:
    def members() -> list[Scripted]:
        return [scripted(name, seconds=n) for n, name in enumerate("abcde", start=1)]

    assert timed(members())[1] == 5
    panel = members()
    completion, seconds = timed(panel, stops_early=True)
    assert (seconds, [member.ends for member in panel]) == (3, [["answered"]] * 3 + [["cancelled"]] * 2)
    assert completion.composition is not None
    assert (completion.composition["cancelled"], completion.composition["responses"]) == (["d", "e"], 3)
    assert timed(members(), stops_early=True, min_consensus=0.8)[1] == 4
    assert timed(members(), stops_early=True, min_responses=5)[1] == 5
    weights = {"a": 1.0, "b": 5.0, "c": 1.0, "d": 1.0, "e": 1.0}
    panel = [scripted(name, name, seconds=n) for n, name in enumerate("abcde", start=1)]
    completion, seconds = timed(panel, stops_early=True, vote="weighted", weights=weights, min_responses=2)
    assert (completion.text, seconds) == ("b", 2)


@pytest.mark.parametrize(
    ("texts", "options", "stopped_at", "consensus"),
    [
        ("xxxyy", {"min_consensus": 0.6}, 3, (0.6, 0.6)),
        ("xxxxx", {}, 3, (0.6, 1.0)),  # only the share that is certain, and that may be too little
        ("xyxxz", {}, 4, (0.6, 0.6)),
        (
            "xxyzz",
            {"vote": "weighted", "weights": dict(zip("abcde", (4.0, 2.0, 1.0, 1.0, 1.0), strict=True))},
            3,
            (6 / 9,) * 2,
        ),
    ],
)
def test_a_vote_that_stopped_early_does_not_count_on_whom_it_did_not_hear(
    texts: str, options: dict[str, Any], stopped_at: int, consensus: tuple[float, float]
) -> None:
    def members() -> list[Scripted]:
        return [scripted(name, text, seconds=n) for n, (name, text) in enumerate(zip("abcde", texts, strict=True), 1)]

    early, seconds = timed(members(), stops_early=True, **options)
    whole, _ = timed(members(), **options)
    assert (seconds, early.text, whole.text) == (stopped_at, "x", "x")
    assert (early.confidence, whole.confidence) == pytest.approx(consensus)


def test_members_that_failed_are_no_part_of_what_is_certain() -> None:
    members = [scripted("a", ServerFailed("x")), *[scripted(name, seconds=n) for n, name in enumerate("bcd")]]
    completion, told = answer(members, stops_early=True)
    assert (told["cancelled"], completion.confidence) == (["d"], pytest.approx(2 / 3))


def test_a_vote_that_cannot_be_unanimous_stops_early() -> None:
    members = [
        scripted("a", "x", seconds=1),
        scripted("b", "y", seconds=2),
        scripted("c", seconds=9),
        scripted("d", seconds=9),
    ]
    error, told = failure(members, vote="unanimous", stops_early=True)
    assert isinstance(error, NoConsensus)
    assert told["cancelled"] == ["c", "d"]


@pytest.mark.parametrize(
    ("answers", "options", "asks", "wins"),
    [
        ("xx???", {}, "ab", "x"),
        ("xyxzw", {}, "abcde", "x"),
        ("xyxx?", {}, "abcd", "x"),
        ("xyx??", {"enough_consensus": 0.6}, "abc", "x"),
        ("x????", {"min_responses": 1}, "a", "x"),
        ("xx???", {"min_responses": 3}, "abcde", "?"),
        ("xxx??", {"min_responses": 3}, "abc", "x"),
        ("xyzvw", {"max_members": 3}, "abc", "x"),
        ("xxyyy", {"min_consensus": 1.0, "enough_consensus": 0.0}, "ab", "x"),
    ],
)
def test_one_after_the_other_is_asked_until_they_agree(
    answers: str, options: dict[str, Any], asks: str, wins: str
) -> None:
    members = [scripted(name, text, seconds=1) for name, text in zip("abcde", answers, strict=True)]
    completion, seconds = timed(members, strategy="sequential", **options)
    assert (asked(members), completion.text, seconds) == (asks, wins, len(asks))


def test_asking_in_turn_stops_where_too_few_are_left() -> None:
    members = [scripted("a", ServerFailed("x")), scripted("b", ServerFailed("y")), scripted("c")]
    error, _ = failure(members, strategy="sequential")
    assert isinstance(error, InsufficientResponses)
    assert asked(members) == "ab"
    assert error.is_retryable, "the one that was not asked may answer next time"


@pytest.mark.parametrize(
    ("confidences", "options", "asks", "wins"),
    [
        ((0.95, 0.1, 0.1), {}, "a", "a"),
        ((0.5, 0.9, 0.1), {}, "ab", "b"),
        ((0.5, 0.6, 0.2), {}, "abc", "b"),
        ((0.5, 0.6, 0.2), {"confident_at": 0.6}, "ab", "b"),
        ((None, 0.95, 0.2), {}, "ab", "b"),
        ((None, 0.95, 0.2), {"default_confidence": 1.0}, "a", "a"),
        ((0.95, 0.3, 0.2), {"min_responses": 2}, "ab", "a"),
        ((0.5, 0.6, 0.2), {"max_members": 2}, "ab", "b"),
    ],
)
def test_a_cascade_goes_on_to_the_dearer_until_one_is_confident(
    confidences: tuple[float | None, ...], options: dict[str, Any], asks: str, wins: str
) -> None:
    members = [scripted(name, sure(name, c)) for name, c in zip("abc", confidences, strict=True)]
    completion, told = answer(members, strategy="cascade", confidence="reported", **options)
    assert (asked(members), completion.text, told["vote"]) == (asks, wins, "best_confidence")


def test_a_cascade_goes_on_after_a_failure() -> None:
    members = [scripted("a", ServerFailed("broken")), scripted("b", "x\nconfidence: 0.95"), scripted("c")]
    completion, told = answer(members, strategy="cascade", confidence="stated")
    assert (completion.text, asked(members), told["failures"][0]["member"]) == ("x", "ab", "a")


@pytest.mark.parametrize(
    ("delays", "options", "began", "ends", "seconds"),
    [
        ((0.5, 1, 1), {}, [[0], [], []], [["answered"], [], []], 0.5),
        ((9, 0.75, 1), {}, [[0], [1], []], [["cancelled"], ["answered"], []], 1.75),
        ((9, 9, 0.5), {}, [[0], [1], [2]], [["cancelled"], ["cancelled"], ["answered"]], 2.5),
        ((9, 9, 9.5), {}, [[0], [1], [2]], [["answered"], ["cancelled"], ["cancelled"]], 9),
        ((9, 9, 9), {"hedge_delay_seconds": 4}, [[0], [4], [8]], [["answered"], ["cancelled"], ["cancelled"]], 9),
        ((9, 2, 1), {"hedge_delay_seconds": 0}, [[0], [0], [0]], [["cancelled"], ["cancelled"], ["answered"]], 1),
        ((9, 9, 9), {"max_members": 2}, [[0], [1], []], [["answered"], ["cancelled"], []], 9),
        ((2, 3, 9), {"min_responses": 2}, [[0], [1], [2]], [["answered"], ["answered"], ["cancelled"]], 4),
    ],
)
def test_a_backup_is_asked_when_no_answer_comes(
    delays: tuple[float, ...], options: dict[str, Any], began: Any, ends: Any, seconds: float
) -> None:
    members = [scripted(name, seconds=delay) for name, delay in zip("abc", delays, strict=True)]
    completion, took = timed(members, strategy="hedged", **options)
    assert (completion.text, took) == ("yes", seconds)
    assert ([member.began for member in members], [member.ends for member in members]) == (began, ends)


@pytest.mark.parametrize("delays", [(0, 0, 0), (3, 3, 9), (5, 4, 3)])
@pytest.mark.parametrize("needed", [1, 2])
def test_an_answer_that_comes_in_the_same_moment_as_the_first_has_no_vote(delays: Sequence[float], needed: int) -> None:
    members = [
        scripted(name, sure(text, None), seconds=delay)
        for name, text, delay in zip("abc", ("x", "x" if needed == 2 else "y", "z"), delays, strict=True)
    ]
    hedged = {"strategy": "hedged", "hedge_delay_seconds": 0 if delays[0] < 5 else 1}
    completion, told = answer(members, **hedged, min_responses=needed, confidence="reported", default_confidence=0.4)
    assert (completion.text, completion.confidence, told["tie"]) == ("x", 1.0, False)
    assert (told["responses"], told["failures"]) == (needed, [])
    assert told["cancelled"] == ["a", "b", "c"][needed:]
    assert told["without_confidence"] == ["a", "b", "c"][:needed]


def test_a_backup_is_asked_at_once_when_all_before_it_failed() -> None:
    members = [
        scripted("a", ServerFailed("x"), seconds=0.25),
        scripted("b", ServerFailed("y"), seconds=5),
        scripted("c"),
    ]
    completion, seconds = timed(members, strategy="hedged")
    assert (completion.model, seconds) == ("c", 1.25)
    error, _ = failure([scripted("a", ServerFailed("x")), scripted("b", RateLimited("y"))], strategy="hedged")
    assert (str(error).count("server_error: x"), error.spends_attempt) == (1, True)


@pytest.mark.parametrize("strategy", ["parallel", "sequential", "hedged", "cascade"])
def test_a_member_has_its_own_time(strategy: str) -> None:
    members = [scripted("a", seconds=60), scripted("b", sure("b", 0.95), seconds=1)]
    options = {"confidence": "reported"} if strategy == "cascade" else {}
    options |= {"hedge_delay_seconds": 30.0} if strategy == "hedged" else {}  # type: ignore[dict-item]
    completion, seconds = timed(members, strategy=strategy, timeout_seconds=10, min_responses=1, **options)
    assert (completion.text, members[0].ends) == ("b", ["cancelled"])
    assert seconds == {"parallel": 10}.get(strategy, 11)
    assert completion.composition is not None
    assert completion.composition["failures"] == [
        {"member": "a", "outcome": "timeout", "error": "a gave no answer within the ensemble's 10 s"}
    ]


@pytest.mark.parametrize("strategy", ["parallel", "sequential", "hedged", "cascade"])
def test_an_ensemble_of_one_is_that_model(strategy: str) -> None:
    options = {"confidence": "reported"} if strategy == "cascade" else {}
    completion, told = answer([scripted("a", sure("x", 0.2))], strategy=strategy, **options)
    assert (completion.text, told["responses"], told["winner"]) == ("x", 1, "a")


@pytest.mark.parametrize("strategy", ["parallel", "sequential", "hedged", "cascade"])
def test_cancelled_it_cancels_and_awaits_whom_it_asked(strategy: str) -> None:
    options = {"confidence": "reported"} if strategy == "cascade" else {}
    members = [scripted("a", seconds=60), scripted("b", seconds=60)]

    async def work() -> None:
        task = asyncio.create_task(ensemble(members, strategy=strategy, **options)(ASKED))  # type: ignore[arg-type]
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [end for member in members for end in member.ends] == ["cancelled"] * len(asked(members))

    on_scripted_clock(work)
    assert asked(members) == ("ab" if strategy in ("parallel", "hedged") else "a")


# ---- calls -----------------------------------------------------------------------------------------------------------


def recorded(members: Sequence[Scripted], **options: Any) -> tuple[Completion, list[dict[str, Any]]]:
    """Return the answer of an ensemble of real members around scripted ones, and the rows of their calls by model."""
    trail = Trail(datetime.now(UTC))
    request = Request(messages=ASKED.messages, seed=7, trail=trail)
    completion, _ = answer([Member(member.spec, member) for member in members], request, **options)
    return completion, sorted(trail.calls, key=lambda row: row["model_id"])


def test_every_call_of_a_member_is_a_row() -> None:
    members = [scripted("a"), scripted("b", ServerFailed("broken")), scripted("c")]
    completion, rows = recorded(members)
    assert [row["outcome"] for row in rows] == ["succeeded", "server_error", "succeeded"]
    assert len({row["started_at"] for row in rows}) == 3
    assert sum(row["input_tokens"] for row in rows) == completion.usage.input_tokens == 200
    assert sum(row["cost_usd"] for row in rows) == pytest.approx(200e-6)


def test_a_cancelled_call_is_billed_by_estimate() -> None:
    members = [scripted(name, seconds=seconds) for name, seconds in (("a", 0.0), ("b", 0.0), ("c", 60.0))]
    completion, rows = recorded(members, stops_early=True)
    assert (rows[2]["outcome"], rows[2]["is_estimated"], rows[2]["input_tokens"]) == ("cancelled", True, 100)
    assert 0 <= rows[2]["output_tokens"] <= 20
    assert rows[2]["cost_usd"] == pytest.approx(100e-6)
    assert completion.usage.input_tokens == 200


def test_a_call_that_took_too_long_is_billed_by_estimate() -> None:
    _, rows = recorded([scripted("a"), scripted("b", seconds=60.0)], timeout_seconds=10)
    assert (rows[1]["outcome"], rows[1]["is_estimated"], rows[1]["input_tokens"]) == ("cancelled", True, 100)


def test_a_model_that_is_listed_again_gives_another_sample() -> None:
    member = scripted("a", "x", "y", "y")
    completion, told = answer([member] * 3)
    assert (completion.text, told["votes"]) == ("y", {"x": 1, "y": 2})
    assert member.requests[0] == ASKED
    assert (
        len({request.seed for request in member.requests}) == len({request.number for request in member.requests}) == 3
    )
    assert all(0 <= (request.seed or 0) < 2**31 for request in member.requests)
    again = scripted("a", "x", "y", "y")
    answer([again] * 3)
    assert again.requests == member.requests


def test_samples_of_nested_ensembles_have_numbers_of_their_own() -> None:
    leaf = scripted("a")
    inner = ensemble([leaf, leaf])
    outer = ensemble([Member(_spec_of(inner), inner)] * 3)
    on_scripted_clock(lambda: outer(ASKED))
    assert len({request.number for request in leaf.requests}) == 6


def _spec_of(inner: Ensemble) -> ModelSpec:
    return inner._spec


def test_an_ensemble_votes_in_another_with_its_consensus() -> None:
    inner = ensemble([scripted("a", "x"), scripted("b", "x"), scripted("c", "y")])
    outer = [Member(_spec_of(inner), inner), scripted("d", sure("y", 0.6))]
    completion, told = answer(outer, vote="best_confidence", confidence="reported")
    assert (completion.text, told["consensus"]) == ("x", 0.666667)


def test_what_is_kept_of_long_answers_is_short_and_can_be_stored() -> None:
    members = [
        scripted("a", "x" * 5000),
        scripted("b", "x" * 5000 + "y"),
        scripted("c", "\0"),
        scripted("d", ServerFailed("e" * 999)),
    ]
    _, told = answer(members)
    assert len(told["votes"]) == 3
    assert max(map(len, [*told["votes"], told["failures"][0]["error"]])) <= 200
    assert "\0" not in "".join(told["votes"])


# ---- functions -------------------------------------------------------------------------------------------------------

FUNCTIONS = """
    def last(responses):
        assert [sorted(r) for r in responses] == [["confidence", "data", "label", "member", "text", "weight"]] * len(responses)
        responses[0]["data"]["mine"] = True
        return len(responses) - 1

    async def sure(responses):
        return {"index": max(range(len(responses)), key=lambda n: responses[n]["data"]["n"]), "consensus": 0.8}

    def first_letter(value):
        return value[0] if isinstance(value, str) and value else None

    def broken(responses):
        raise KeyError("oh")

    def nonsense(responses):
        return "the second"
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "house_votes.py").write_text(textwrap.dedent(FUNCTIONS))
    monkeypatch.syspath_prepend(tmp_path)


async def test_a_function_votes(functions: None) -> None:
    members = [scripted("a", {"n": 1}), scripted("b", {"n": 5}), scripted("c", {"n": 1})]
    completion = await ensemble(members, vote="house_votes:last", allows_code=True)(ASKED)
    assert (completion.data, completion.confidence, completion.model) == ({"n": 1}, pytest.approx(2 / 3), "c")
    completion = await ensemble(members, vote="house_votes:sure", allows_code=True, min_consensus=0.8)(ASKED)
    assert (completion.data, completion.confidence) == ({"n": 5}, 0.8)
    with pytest.raises(NoConsensus):
        await ensemble(members, vote="house_votes:sure", allows_code=True, min_consensus=0.9)(ASKED)


async def test_a_function_normalises(functions: None) -> None:
    members = [scripted("a", "Paris"), scripted("b", "Pisa"), scripted("c", "Rome"), scripted("d", {"n": 1})]
    completion = await ensemble(members, normalise="house_votes:first_letter", allows_code=True)(ASKED)
    assert completion.composition is not None
    assert completion.composition["votes"] == {"P": 2, "R": 1}
    assert completion.composition["failures"][0]["member"] == "d"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("broken", "house_votes:broken raised KeyError: 'oh'"),
        ("nonsense", "the function voted 'the second' on 2 answers"),
    ],
)
async def test_a_function_that_fails_is_told(functions: None, function: str, message: str) -> None:
    with pytest.raises(CodeFailed) as raised:
        await ensemble([scripted("a"), scripted("b")], vote=f"house_votes:{function}", allows_code=True)(ASKED)
    assert str(raised.value) == message


@pytest.mark.parametrize("option", ["vote", "normalise"])
def test_functions_run_where_code_may_run_alone(option: str) -> None:
    with pytest.raises(RequestRejected, match=r"runs code \(house_votes:last\)") as raised:
        ensemble([scripted("a")], **{option: "house_votes:last"})
    assert "--allow-code" in (raised.value.hint or "")


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"vote": "plurality"}, "vote is 'plurality'; use majority, weighted, "),
        ({"normalise": "lower"}, "normalise is 'lower'; use text, number, "),
        ({"strategy": "random"}, "strategy: Input should be 'parallel', "),
        ({"vote": "weighted"}, "vote weighted needs weights"),
        ({"vote": "best_confidence"}, "vote best_confidence needs to know how confident answers are"),
        ({"strategy": "cascade", "vote": "majority"}, "strategy cascade needs to know how confident answers are"),
        ({"hedge_delay_seconds": 2}, "hedge_delay_seconds is for strategy hedged, and this one is parallel"),
        ({"strategy": "hedged", "stops_early": True}, "stops_early is for strategy parallel"),
        ({"vote": "mean", "stops_early": True}, "stops_early does not know when a vote by mean is settled"),
        ({"vote": "unanimous", "min_consensus": 0.5}, "vote unanimous needs a consensus of 1"),
        ({"vote": "mean", "normalise": "boolean"}, "vote mean reads numbers by itself"),
        ({"vote": "median", "field": "x"}, "vote median is made of all numbers of JSON"),
        ({"min_responses": 3}, "min_responses is 3, and 2 members are asked"),
        ({"min_responses": 2, "below": "escalate"}, "min_responses is 2, and 1 members are asked"),
        ({"min_responses": 2, "max_members": 1}, "min_responses is 2, and 1 members are asked"),
        ({"min_consensus": 2}, "min_consensus: Input should be less than or equal to 1"),
        ({"weights": {"a": 0, "b": 1}}, "weight: Input should be greater than 0"),
        ({"quorum": 2}, "quorum: is not known"),
        ({"min_responses": 3}, "cannot use: min_responses is 3"),
        ({"weights": {"a": 1, "b": -1}}, "cannot use: members.1.weight: Input should be greater than 0"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_reason(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestRejected) as raised:
        ensemble([scripted("a"), scripted("b")], **options)
    assert problem in str(raised.value)
    assert "model 'panel' has parameters that provider 'ensemble' cannot use" in str(raised.value)
    assert raised.value.hint == f"Known parameters: {', '.join(EnsembleParameters.model_fields)}."


def test_an_ensemble_does_not_take_other_members_than_it_names() -> None:
    spec = ModelSpec(id=1, name="panel", provider="ensemble", parameters={"members": ["a", "z"]})
    with pytest.raises(RequestRejected, match="ensemble 'panel' names the members a, z, and was made with others"):
        Ensemble(spec, [scripted("a"), scripted("b")])  # type: ignore[list-item]


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in EnsembleParameters.model_fields.values())
