"""What a process remembers of what its tasks asked."""

from __future__ import annotations

import gc
from typing import Any

from pgharness.gateway import Gateway
from pgharness.sdk.chat import Chat
from pgharness.sdk.scope import Scope
from pgharness.types import Message, ModelSpec

QUESTION = [Message("user", "Why?")]


def scope(ordinal: int) -> Scope:
    nobody: Any = None
    return Scope(
        run_id=1, run="r", kind="trial", ordinal=ordinal, attempt=1, emit=lambda kind, row: None, services=nobody
    )


def test_a_repeated_question_is_counted_within_a_try_and_forgotten_with_it() -> None:
    nothing: Any = None
    chat = Chat(nothing, nothing, {"run_id": 1, "max_concurrency": None})
    first = scope(0)
    assert [chat._count(first, "gpt", QUESTION) for _ in range(3)] == [1, 2, 3]
    assert chat._count(first, "other", QUESTION) == chat._count(scope(0), "gpt", QUESTION) == 1
    for ordinal in range(1_000):
        assert chat._count(scope(ordinal), "gpt", QUESTION) == 1
    gc.collect()
    assert len(chat._asked) == 1 and chat._count(first, "gpt", QUESTION) == 4


def test_parameters_are_laid_where_they_mean_something() -> None:
    simulator = ModelSpec(id=1, name="s", provider="simulator", parameters={"quality": 1})
    vendor = ModelSpec(id=2, name="v", provider="openai", model="gpt", parameters={"max_tokens": 9})
    hedge = ModelSpec(id=3, name="h", provider="hedge", parameters={"members": ["v"]}, members=(vendor,))
    panel = ModelSpec(
        id=4, name="p", provider="ensemble", parameters={"members": ["h", "s"]}, members=(hedge, simulator)
    )
    assert Gateway.laid_over(vendor, {"max_tokens": 5}) == (vendor, {"max_tokens": 5}), "it goes with the request"
    changed, taken = Gateway.laid_over(simulator, {"noise": 2})
    assert (changed.parameters, taken) == ({"quality": 1, "noise": 2}, {})
    changed, taken = Gateway.laid_over(panel, {"vote": "unanimous", "max_tokens": 5})
    assert changed.parameters == {"members": ["h", "s"], "vote": "unanimous"} and taken == {"max_tokens": 5}
    inner, sampled = changed.members
    assert inner == hedge, "an option of the panel is none of its members'"
    assert sampled.parameters == {"quality": 1, "max_tokens": 5}, "which a simulator refuses"
