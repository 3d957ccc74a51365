"""The simulated model: repeatable, honest about what it was asked, and better when it is told to be better."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgharness.errors import InvalidOutput, ModelError, RateLimited, Refused, RequestRejected, ServerFailed, TimedOut
from pgharness.gateway.simulator import Simulator
from pgharness.types import Completion, Message, ModelSpec, Request

TRANSCRIPT = [
    {"speaker": "Clinician", "text": "Good morning, what brings you in today?"},
    {"speaker": "Patient", "text": "My left knee has been swollen since I fell on the stairs on Sunday."},
    {"speaker": "Clinician", "text": "Can you put weight on it, and does it lock or give way?"},
    {"speaker": "Patient", "text": "I can walk slowly, but it gave way twice yesterday at the station."},
    {"speaker": "Patient", "text": "I took ibuprofen in the evening and it helped a little with the pain."},
    {"speaker": "Clinician", "text": "I will arrange an X-ray, and please rest it with ice four times daily."},
]
CRITERIA = [
    {"criterion": "Records the swollen left knee after the fall on Sunday", "weight": 40},
    {"criterion": "Records that the knee gave way twice", "weight": 30},
    {"criterion": "Mentions ibuprofen in the evening", "weight": 20},
    {"criterion": "Plans an X-ray, rest and ice", "weight": 10},
]


def model(name: str = "simulated", *, timeout_seconds: float = 120.0, **parameters: Any) -> Simulator:
    parameters = {"latency_seconds": 0.0} | parameters
    spec = ModelSpec(id=1, name=name, provider="simulator", parameters=parameters, timeout_seconds=timeout_seconds)
    return Simulator(spec)


def note_request(seed: int, *, case_input: Any = TRANSCRIPT, attempt: int = 1, **case: Any) -> Request:
    messages = (Message("system", "You write notes."), Message("user", "x" * 400))
    item = {"case": {"name": "knee", "input": case_input, **case}}
    return Request(messages=messages, seed=seed, attempt=attempt, item=item)


def grade_schema(count: int) -> dict[str, Any]:
    verdict = {
        "type": "object",
        "properties": {
            "rationale": {"type": "string"},
            "satisfaction": {"type": "number", "minimum": 0, "maximum": 100},
        },
        "required": ["rationale", "satisfaction"],
        "additionalProperties": False,
    }
    verdicts = {"type": "array", "items": verdict, "minItems": count, "maxItems": count}
    return {"type": "object", "properties": {"verdicts": verdicts}, "required": ["verdicts"]}


def grade_request(note: Any, seed: int = 1, *, criteria: list[dict[str, Any]] = CRITERIA, attempt: int = 1) -> Request:
    return Request(
        messages=(Message("user", "Grade this note."),),
        schema=grade_schema(len(criteria)),
        seed=seed,
        attempt=attempt,
        item={"case": {"name": "knee", "input": TRANSCRIPT}, "note": note, "rubric": {"criteria": criteria}},
    )


async def outcome(simulator: Simulator, request: Request) -> Completion | ModelError:
    try:
        return await simulator(request)
    except ModelError as error:
        return error


async def mean_satisfaction(grader: Simulator, notes: list[str]) -> float:
    grades = [(await grader(grade_request(note, seed))).data["verdicts"] for seed, note in enumerate(notes)]
    return statistics.mean(verdict["satisfaction"] for verdicts in grades for verdict in verdicts)


async def test_the_same_request_gets_the_same_answer_from_another_process_of_the_same_model() -> None:
    assert await model()(note_request(7)) == await model()(note_request(7))
    assert await model()(grade_request("A note.")) == await model()(grade_request("A note."))


async def test_another_replication_and_another_model_answer_differently() -> None:
    answer = await model()(note_request(7))
    assert (await model()(note_request(8))).text != answer.text
    assert (await model()(note_request(8))).request_id != answer.request_id
    assert (await model("other")(note_request(7))).request_id != answer.request_id
    assert len({(await model()(note_request(seed))).text for seed in range(30)}) > 20


async def test_a_note_is_built_from_the_words_of_its_case() -> None:
    text = (await model(quality=1.0)(note_request(1))).text
    assert "left knee has been swollen" in text
    assert "X-ray" in text
    assert "Subjective:" in text and "Plan:" in text


@pytest.mark.parametrize(
    "case_input",
    [
        {"transcript": TRANSCRIPT, "profile": "a runner"},
        "The sky is grey today. It will rain before noon.",
        {"age": 71, "problems": ["asthma", {"name": "gout"}], "empty": None},
        ["one", 2, None, True],
        [{"speaker": "Patient"}, {"text": "Short."}],
        [{"speaker": "Patient", "text": "Yes."}, "noise"],
        [],
        {},
        "",
        None,
        17,
    ],
    ids=repr,
)
async def test_a_note_is_written_for_any_json(case_input: Any) -> None:
    completion = await model(quality=1.0)(note_request(3, case_input=case_input))
    assert completion.text.strip()
    assert completion.data is None


async def test_a_case_of_json_is_repeated_by_name_and_value() -> None:
    text = (await model(quality=1.0)(note_request(3, case_input={"age": 71, "problems": [{"name": "gout"}]}))).text
    assert "age 71" in text and "name gout" in text


async def test_usage_is_four_characters_a_token() -> None:
    completion = await model()(note_request(3))
    assert completion.usage.input_tokens == (len("You write notes.") + 400) // 4
    assert completion.usage.output_tokens == len(completion.text) // 4
    assert completion.finish_reason == "stop"
    assert completion.model == "simulated"


async def test_output_tokens_is_about_the_length_of_a_note_of_a_long_case() -> None:
    turns = [
        {"speaker": "Patient", "text": f"On day {day} the pain was {day % 9} of ten, worse at night."}
        for day in range(400)
    ]
    short = [await model(output_tokens=100, quality=1.0)(note_request(seed, case_input=turns)) for seed in range(20)]
    long = [await model(output_tokens=1000, quality=1.0)(note_request(seed, case_input=turns)) for seed in range(20)]
    assert 40 < statistics.median(completion.usage.output_tokens for completion in short) < 160
    assert 400 < statistics.median(completion.usage.output_tokens for completion in long) < 1600


@pytest.mark.parametrize(
    "target", ["42", "#### 1,250", "B", "yes", "No", "True", "Paris", "a long reference answer", "", 3.5]
)
async def test_a_target_is_answered_as_often_as_quality_says(target: Any) -> None:
    simulator = model(quality=0.7)
    answers = [(await simulator(note_request(seed, target=target))).text for seed in range(400)]
    wanted = target if isinstance(target, str) else json.dumps(target)
    assert 0.6 < answers.count(wanted) / len(answers) < 0.8
    wrong = [answer for answer in answers if answer != wanted]
    assert wrong and all(answer.strip() for answer in wrong)
    if wanted:
        assert not any(wanted in answer for answer in wrong), "a wrong answer must fail `contains` too"


async def test_a_target_of_json_is_answered_with_data() -> None:
    completion = await model(quality=1.0)(note_request(1, target={"drug": "ibuprofen"}))
    assert completion.data == {"drug": "ibuprofen"} == json.loads(completion.text)


async def test_a_grade_has_one_verdict_a_criterion_and_fits_its_schema() -> None:
    completion = await model()(grade_request("The left knee is swollen after a fall."))
    jsonschema.validate(completion.data, grade_schema(len(CRITERIA)))
    assert json.loads(completion.text) == completion.data
    assert all(len(verdict["rationale"]) > 20 for verdict in completion.data["verdicts"])


async def test_a_grader_prefers_the_note_that_covers_the_criterion() -> None:
    grader = model(noise=0.0)
    verdicts = (await grader(grade_request("The left knee is swollen since a fall on Sunday." * 8))).data["verdicts"]
    assert verdicts[0]["satisfaction"] >= 90
    assert verdicts[2]["satisfaction"] < 40
    assert "ibuprofen" in verdicts[2]["rationale"]


async def test_a_grader_prefers_a_note_that_is_long_enough() -> None:
    whole = "Swollen left knee after a fall on Sunday; the knee gave way twice. "
    assert await mean_satisfaction(model(noise=0.0), [whole]) < await mean_satisfaction(model(noise=0.0), [whole * 6])


async def test_better_generators_score_better() -> None:
    scores = []
    for quality in (0.1, 0.5, 0.95):
        notes = [(await model(quality=quality)(note_request(seed))).text for seed in range(60)]
        scores.append(await mean_satisfaction(model(), notes))
    assert scores == sorted(scores)
    assert scores[2] - scores[0] > 15


async def test_lenient_graders_score_higher() -> None:
    notes = [(await model()(note_request(seed))).text for seed in range(30)]
    strict, even, lenient = [await mean_satisfaction(model(leniency=lean), notes) for lean in (-1, 0.0, 1)]
    assert strict < even < lenient


async def test_grade_replications_differ_by_the_noise_alone() -> None:
    def spread(data: list[Any]) -> float:
        return statistics.pstdev(grade["verdicts"][0]["satisfaction"] for grade in data)

    note = "The left knee was swollen. " * 12
    silent = [(await model(noise=0.0)(grade_request(note, seed))).data for seed in range(200)]
    noisy = [(await model(noise=8.0)(grade_request(note, seed))).data for seed in range(200)]
    assert spread(silent) == 0
    assert 6 < spread(noisy) < 10


@pytest.mark.parametrize("note", [{"plan": "ice", "knee": "swollen"}, ["ice"], None, "", "\0", 5])
async def test_any_note_can_be_graded(note: Any) -> None:
    jsonschema.validate((await model()(grade_request(note))).data, grade_schema(len(CRITERIA)))


async def test_verdicts_follow_the_schema_where_it_asks_for_another_number_than_the_rubric_has() -> None:
    request = grade_request("note")
    request = Request(messages=request.messages, schema=grade_schema(7), seed=1, item=request.item)
    jsonschema.validate((await model()(request)).data, grade_schema(7))


SCHEMAS: list[dict[str, Any]] = [
    grade_schema(3),
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 3}, "b": {"enum": ["x", "y"]}}},
    {"type": "object", "properties": {"a": {"const": 5}, "b": {"type": "boolean"}, "c": {"type": "null"}}},
    {"type": "object", "properties": {"a": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}}},
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": -5}, "b": {"type": "integer", "minimum": 900}},
    },
    {
        "type": "object",
        "properties": {"a": {"type": "string", "minLength": 200}, "b": {"type": "string", "maxLength": 3}},
    },
    {
        "type": "object",
        "properties": {"a": {"type": ["string", "null"]}, "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
    },
    {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 6}},
    },
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 0}}},
    {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}},
        "required": ["tree"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    "parent": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["name"],
            }
        },
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
async def test_answers_fit_any_schema(schema: dict[str, Any]) -> None:
    for seed in range(20):
        completion = await model()(Request(messages=(), schema=schema, seed=seed))
        jsonschema.validate(completion.data, schema)
        assert json.loads(completion.text) == completion.data


_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.integers(-50, 50).flatmap(
        lambda lower: st.integers(lower, 90).map(lambda upper: {"type": "integer", "minimum": lower, "maximum": upper})
    ),
    st.floats(-5, 5).map(lambda lower: {"type": "number", "minimum": lower, "maximum": lower + 0.5}),
    st.integers(0, 80).map(lambda least: {"type": "string", "minLength": least, "maxLength": least + 5}),
)


@settings(max_examples=60, deadline=None)
@given(
    schema=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            _LEAVES,
            lambda inner: st.tuples(inner, st.integers(0, 3), st.integers(0, 2)).map(
                lambda part: {"type": "array", "items": part[0], "minItems": part[1], "maxItems": part[1] + part[2]}
            ),
            max_leaves=4,
        ),
        max_size=4,
    ).map(lambda properties: {"type": "object", "properties": properties, "required": list(properties)}),
    seed=st.integers(0, 2**63 - 1),
)
def test_answers_fit_random_schemas(schema: dict[str, Any], seed: int) -> None:
    completion = asyncio.run(model()(Request(messages=(), schema=schema, seed=seed)))
    jsonschema.validate(completion.data, schema)


@pytest.mark.parametrize(
    ("rate", "error"),
    [
        ("rate_limit_rate", RateLimited),
        ("error_rate", ServerFailed),
        ("timeout_rate", TimedOut),
        ("refusal_rate", Refused),
    ],
)
async def test_faults_come_as_often_as_their_rate(rate: str, error: type[ModelError]) -> None:
    outcomes = [await outcome(model(**{rate: 0.25}), note_request(seed)) for seed in range(800)]
    assert 0.2 < sum(isinstance(found, error) for found in outcomes) / len(outcomes) < 0.3
    assert all(isinstance(found, (error, Completion)) for found in outcomes)


async def test_a_retry_can_succeed_and_a_repeated_attempt_cannot() -> None:
    simulator = model(error_rate=0.5)
    failed = [seed for seed in range(200) if isinstance(await outcome(simulator, note_request(seed)), ServerFailed)]
    again = [await outcome(simulator, note_request(seed, attempt=1)) for seed in failed]
    retried = [await outcome(simulator, note_request(seed, attempt=2)) for seed in failed]
    assert all(isinstance(found, ServerFailed) for found in again)
    assert 0.3 < sum(isinstance(found, Completion) for found in retried) / len(failed) < 0.7


async def test_a_rate_limit_says_how_long_to_wait() -> None:
    error = await outcome(model(rate_limit_rate=1.0, retry_after_seconds=2.5), note_request(1))
    assert isinstance(error, RateLimited)
    assert (error.retry_after, error.http_status) == (2.5, 429)
    silent = await outcome(model(rate_limit_rate=1.0, retry_after_seconds=None), note_request(1))
    assert isinstance(silent, RateLimited) and silent.retry_after is None


async def test_a_refusal_keeps_its_text_and_tokens() -> None:
    error = await outcome(model(refusal_rate=1.0), note_request(1))
    assert isinstance(error, Refused)
    assert error.text and error.input_tokens and error.output_tokens


@pytest.mark.parametrize("schema", [grade_schema(4), SCHEMAS[1], {"type": "object", "additionalProperties": True}])
async def test_invalid_answers_never_fit_and_take_several_forms(schema: dict[str, Any]) -> None:
    item = grade_request("note").item if "verdicts" in schema.get("properties", {}) else {}
    forms = set()
    for seed in range(60):
        found = await outcome(model(invalid_rate=1.0), Request(messages=(), schema=schema, seed=seed, item=item))
        if isinstance(found, Completion):
            forms.add("misshapen")
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(found.data, schema | {"required": list(schema.get("properties", ()))})
        else:
            assert isinstance(found, InvalidOutput) and found.text
            forms.add(str(found.finish_reason))
            with pytest.raises(ValueError):
                json.loads(found.text)
    assert forms == {"misshapen", "length", "stop"}


async def test_text_cannot_be_invalid() -> None:
    assert isinstance(await outcome(model(invalid_rate=1.0), note_request(1)), Completion)


async def test_without_latency_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forbidden(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    monkeypatch.setattr(asyncio, "sleep", forbidden)
    simulator = model(timeout_rate=0.3, rate_limit_rate=0.3)
    outcomes = [await outcome(simulator, note_request(seed)) for seed in range(40)]
    assert {type(found) for found in outcomes} == {Completion, TimedOut, RateLimited}


async def test_latency_is_lognormal_around_its_median(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def record(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    for seed in range(500):
        await model(latency_seconds=2.0, latency_spread=0.3)(note_request(seed))
    assert 1.85 < statistics.median(slept) < 2.15
    assert 0.5 < min(slept) < 1.2 and 3.2 < max(slept) < 8
    slept.clear()
    await model(latency_seconds=2.0, latency_spread=0.0)(note_request(1))
    assert slept == [2.0]


async def test_a_slow_answer_is_a_timeout_after_the_models_timeout() -> None:
    started = time.monotonic()
    error = await outcome(model(latency_seconds=30.0, timeout_seconds=0.05), note_request(1))
    assert isinstance(error, TimedOut)
    assert 0.04 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"temperature": 0.2}, "temperature"),
        ({"latency_seconds": -1}, "latency_seconds"),
        ({"latency_seconds": "fast"}, "latency_seconds"),
        ({"latency_seconds": float("nan")}, "latency_seconds"),
        ({"quality": 1.5}, "quality"),
        ({"leniency": -2}, "leniency"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"output_tokens": 10.5}, "output_tokens"),
        ({"noise": True}, "noise"),
        ({"error_rate": 0.6, "timeout_rate": 0.6}, "error_rate"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        model(**parameters)
    assert named in str(caught.value)
    assert "simulated" in str(caught.value)
    assert caught.value.hint and "latency_seconds" in caught.value.hint
