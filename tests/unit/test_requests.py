"""Requests: what is made once for many items is what each of them would be asked alone."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import pytest

from pgharness.execution.items import Item
from pgharness.execution.requests import Requests
from pgharness.types import ModelSpec

CASE = {"name": "visit-1", "input": "A cough for nine days.", "target": None, "metadata": {}}
RUBRIC = {"author": "ann", "criteria": [{"criterion": "Says nine days.", "weight": 100}]}
PROMPTS = {
    "note_system": "You write.",
    "note": "Sum up: {{ case_text }}",
    "grade_system": "",
    "grade": "{% for c in criteria %}{{ c.number }}. {{ c.criterion }}{% endfor %} <{{ note }}>",
}


def requests(**prompts: str) -> Requests:
    row = {"seed": 7, "config": {}, "cycle_times": False, "software_version": None, "run": "r/1"}
    return Requests({**row, "prompts": PROMPTS | prompts})


def item(kind: Any = "note", **fields: Any) -> Item:
    spec = ModelSpec(id=1, name="m", provider="simulator")
    made: dict[str, Any] = {"case": CASE, "combination_number": 0, "overlap": 100, "replication": 1, "ordinal": 5}
    return Item(run_id=1, kind=kind, spec=spec, **made | fields)


def texts(made: Requests, asked: Item) -> list[str]:
    return [message.content for message in made.of(asked).messages]


def test_the_notes_of_a_case_are_asked_in_the_same_words() -> None:
    made = requests()
    assert made.of(item()).messages is made.of(item(ordinal=6, replication=2)).messages
    assert texts(made, item()) == ["You write.", "Sum up: A cough for nine days."]


def test_what_differs_by_replication_or_overlap_is_asked_anew() -> None:
    made = requests(note="{{ case_name }} {{ replication }} {{ overlap }}")
    assert texts(made, item())[1] == "visit-1 1 100"
    assert texts(made, item(replication=2, overlap=50))[1] == "visit-1 2 50"


def test_each_note_is_graded_in_its_own_words() -> None:
    made = requests()
    assert texts(made, item("grade", rubric=RUBRIC, note="first")) == ["1. Says nine days. <first>"]
    assert texts(made, item("grade", rubric=RUBRIC, note="{{ second }}")) == ["1. Says nine days. <{{ second }}>"]
    other = {"author": "bob", "criteria": [{"criterion": "Names the cough.", "weight": 100}]}
    assert texts(made, item("grade", rubric=other, note="third")) == ["1. Names the cough. <third>"]


def test_a_retry_says_what_was_wrong_after_the_same_words() -> None:
    made = requests()
    first = made.of(item()).messages
    retry = item(cause="invalid_output", answer="{", error="not JSON", tries=1)
    messages = made.of(retry).messages
    assert messages[:2] == first and [message.role for message in messages[2:]] == ["assistant", "user"]
    assert "not JSON" in messages[3].content and made.of(retry).attempt == 2
    assert made.of(item()).messages is first


@pytest.mark.parametrize("kind", ["note", "grade"])
def test_a_seed_is_of_the_run_the_kind_and_the_item(kind: str) -> None:
    digest = blake2b(f"7/{kind}/5".encode(), digest_size=4).digest()
    assert requests().of(item(kind, rubric=RUBRIC, note="x")).seed == int.from_bytes(digest, "big") >> 1


def test_more_cases_than_are_kept_are_all_asked_about() -> None:
    made = requests()
    cases = [CASE | {"input": f"case {number}"} for number in range(1_500)]
    for _ in range(2):
        assert [texts(made, item(case=case))[1] for case in cases] == [f"Sum up: case {n}" for n in range(1_500)]
    made.forget()
    assert texts(made, item(case=cases[3]))[1] == "Sum up: case 3"
