"""What a process remembers of what its tasks asked."""

from __future__ import annotations

import gc
from typing import Any

from pgharness.sdk.chat import Chat
from pgharness.sdk.scope import Scope
from pgharness.types import Message

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
