"""Prompts: templates see a case as people would read it, insert data untouched, and fail with their own name."""

from __future__ import annotations

from typing import Any

import pytest

from pgharness.errors import RequestRejected
from pgharness.prompts import Prompt, case_facts, text_of
from pgharness.types import Message

TURNS = [{"speaker": "Doctor", "text": "Any cough?"}, {"speaker": "Patient", "text": "No."}]
CASE = {"name": "visit-1", "input": TURNS, "target": {"plan": "rest"}, "metadata": {"site": "north"}}


def values(**fields: Any) -> dict[str, Any]:
    return case_facts(CASE | fields) | {"config": {"style": "brief"}, "overlap": 50, "replication": 2}


def rendered(template: str, system: str = "", **fields: Any) -> tuple[Message, ...]:
    return Prompt("note", system, template).render(values(**fields))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (TURNS, "Doctor: Any cough?\nPatient: No."),
        ([{"text": "alone"}, {"speaker": "", "text": "nobody"}], "alone\nnobody"),
        ({"transcript": TURNS}, "Transcript:\nDoctor: Any cough?\nPatient: No."),
        (
            {"transcript": TURNS, "past_history": "asthma", "empty": None},
            "Past history:\nasthma\n\nTranscript:\nDoctor: Any cough?\nPatient: No.",
        ),
        ({"question": "1 + 1"}, '{\n  "question": "1 + 1"\n}'),
        ([], "[]"),
        ([1, "two"], '[\n  1,\n  "two"\n]'),
        ([{"speaker": "Doctor"}], '[\n  {\n    "speaker": "Doctor"\n  }\n]'),
        ({"transcript": "one text"}, '{\n  "transcript": "one text"\n}'),
        ("Ünïcödé", "Ünïcödé"),
        ({"name": "Ünï"}, '{\n  "name": "Ünï"\n}'),
        (None, "null"),
        (72, "72"),
        (True, "true"),
    ],
)
def test_json_becomes_text_as_a_person_would_read_it(value: Any, text: str) -> None:
    assert text_of(value) == text


def test_templates_see_the_case_and_the_run() -> None:
    template = (
        "{{ case_name }}|{{ case_text }}|{{ input[0].text }}|{{ target }}|{{ metadata.site }}|{{ config.style }}|"
        "{{ overlap }}|{{ replication }}"
    )
    (message,) = rendered(template)
    assert message == Message(
        "user", 'visit-1|Doctor: Any cough?\nPatient: No.|Any cough?|{\n  "plan": "rest"\n}|north|brief|50|2'
    )


def test_what_is_kept_of_a_case_is_what_its_items_see() -> None:
    facts = case_facts(CASE)
    assert values() == facts | {"config": {"style": "brief"}, "overlap": 50, "replication": 2}


def test_a_name_in_metadata_is_found_and_a_method_of_its_dict_stays_what_it_is() -> None:
    metadata = {"site": "north", "items": "not a method", "deep": {"er": 1}}
    template = "{{ metadata.site }} {{ metadata.deep.er }} {{ metadata.items is callable }} {{ metadata['items'] }}"
    assert rendered(template, metadata=metadata)[0].content == "north 1 True not a method"


def test_jinjas_own_names_are_there() -> None:
    assert rendered("{% for i in range(3) %}{{ i }}{% endfor %}{{ dict(a=1).a }}")[0].content == "0121"


def test_a_case_without_target_and_metadata_has_none_and_nothing() -> None:
    template = "{% if target is none %}no target{% endif %} {{ metadata }}"
    assert rendered(template, target=None, metadata=None)[0].content == "no target {}"


def test_system_and_user_become_messages_in_order() -> None:
    assert rendered("Write.", system="You are brief: {{ config.style }}.") == (
        Message("system", "You are brief: brief."),
        Message("user", "Write."),
    )


def test_an_empty_prompt_is_no_message() -> None:
    assert [message.role for message in rendered("Write.", system="")] == ["user"]
    assert [message.role for message in rendered("Write.", system="{% if false %}x{% endif %}\n ")] == ["user"]


def test_what_is_inserted_is_never_interpreted() -> None:
    hostile = "{{ config }} {% for x in y %} <b>&amp;</b> {{ ''.__class__ }}"
    assert rendered("{{ case_text }}", input=hostile)[0].content == hostile
    assert rendered("{{ target }}", target=hostile)[0].content == hostile


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ input.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(RequestRejected, match="note_prompt cannot be rendered"):
        rendered(template)


def test_a_name_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(RequestRejected) as caught:
        rendered("{{ transcrypt }}")
    assert str(caught.value) == "note_prompt cannot be rendered: 'transcrypt' is undefined"
    assert caught.value.hint is not None and "case_text" in caught.value.hint and "instances" in caught.value.hint


def test_a_missing_part_of_a_value_is_named() -> None:
    with pytest.raises(RequestRejected, match="no attribute 'age'"):
        rendered("{{ metadata.age }}")


def test_a_template_that_fails_while_it_runs_is_named() -> None:
    with pytest.raises(RequestRejected, match=r"grade_system_prompt cannot be rendered: .* by zero"):
        Prompt("grade", "{{ 1 // 0 }}", "x").render(values())


@pytest.mark.parametrize(
    ("system", "user", "problem"),
    [
        ("", "{% if %}", "note_prompt is not a valid template (line 1)"),
        ("", "fine\nfine\n{{ case_text", "note_prompt is not a valid template (line 3)"),
        ("{% endfor %}", "fine", "note_system_prompt is not a valid template (line 1)"),
    ],
)
def test_a_malformed_template_is_refused_with_its_name_and_line(system: str, user: str, problem: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        Prompt("note", system, user)
    assert str(caught.value).startswith(problem)
    assert not caught.value.is_retryable


SHARED = {"criteria": [{"number": 1, "criterion": "says so"}], "rubric_author": "ann", "config": {"style": "brief"}}


@pytest.mark.parametrize(
    "user",
    [
        "{{ note }}",
        "Grade {{ case_name }}: {% for c in criteria %}{{ c.number }} {{ c.criterion }} {% endfor %}<{{ note }}>",
        "{% if target is not none %}{{ note }}{% endif %}{{ note }}",
        "by {{ rubric_author }} in a {{ config.style }} style, no note at all",
    ],
)
@pytest.mark.parametrize("note", ["Rest for 3 days.", "{{ note }} {% x %}", "a\nb\\", ""])
def test_an_outline_says_what_a_rendering_says(user: str, note: str) -> None:
    shared = case_facts(CASE) | SHARED
    prompt = Prompt("grade", "You grade.", user)
    outline = prompt.outline(shared)
    assert outline is not None
    assert outline.messages(note) == prompt.render({**shared, "overlap": 0, "replication": 1, "note": note})


@pytest.mark.parametrize(
    "user",
    [
        "{{ note | upper }}",
        "{{ note ~ 'x' }}",
        "{% if note %}a{% endif %}",
        "{% set text %}{{ note }}{% endset %}{{ text | length }}",
        "{% filter upper %}{{ note }}{% endfilter %}",
        "{% macro shout() %}{{ note }}{% endmacro %}{{ shout() | upper }}",
        "{{ note }} {{ replication }}",
        "{{ note }} {{ overlap }}",
        "{{ ['a', 'b'] | random }} {{ note }}",
        "{{ lipsum() }}",
        "{{ [['a', 'b']] | map('random') | first }} {{ note }}",
        "{% autoescape true %}{{ note }}{% endautoescape %}",
        "{% block body %}{{ note }}{% endblock %}{{ self.body() | upper }}",
        "{% for x in [[[]]] recursive %}{{ note }}{{ loop(x) | upper }}{% endfor %}",
        "{{ transcrypt }}",
        "{{ 1 // 0 }}",
    ],
)
def test_messages_that_may_differ_have_no_outline(user: str) -> None:
    assert Prompt("grade", "", user).outline(case_facts(CASE) | SHARED) is None


def test_a_note_is_nothing_that_a_note_prompt_could_use() -> None:
    assert Prompt("note", "", "{{ note }}").outline(case_facts(CASE) | {"config": {}}) is None
