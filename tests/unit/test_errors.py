"""Errors: one tree, drawn as it is; a SQLSTATE says the class, a class says what to do."""

from __future__ import annotations

import inspect
import pickle

import pytest

from pgharness import errors
from pgharness.errors import (
    BY_SQLSTATE,
    Conflict,
    DatabaseError,
    HarnessError,
    InvalidArgument,
    ModelError,
    NotCached,
    NotFound,
    RateLimited,
    RequestRejected,
    Unavailable,
    WrongState,
    from_sqlstate,
)

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, HarnessError)]
MODEL_ERRORS = [kind for kind in CLASSES if issubclass(kind, ModelError)]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    parents: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.strip(" │├└─").split(" ")[0]
        if name in {kind.__name__ for kind in CLASSES}:
            depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
            parents[depth:] = [name]
            drawn[name] = parents[depth - 1] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in CLASSES if kind.__base__}


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("PH001", NotFound),
        ("PH002", InvalidArgument),
        ("PH003", WrongState),
        ("PH004", Conflict),
        ("23505", InvalidArgument),
        ("23514", InvalidArgument),
        ("22P02", InvalidArgument),
        ("42501", DatabaseError),
        ("PH999", DatabaseError),
        (None, DatabaseError),
    ],
)
def test_a_sqlstate_says_the_class(sqlstate: str | None, kind: type[DatabaseError]) -> None:
    error = from_sqlstate(sqlstate, "what", hint="remedy", detail="facts")
    assert type(error) is kind
    assert (str(error), error.hint, error.detail, error.sqlstate) == ("what", "remedy", "facts", sqlstate)


def test_every_code_of_ours_has_a_class_of_its_own() -> None:
    assert len(set(BY_SQLSTATE.values())) == len(BY_SQLSTATE)
    assert set(BY_SQLSTATE) == {f"PH00{number}" for number in range(1, 8)}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if not issubclass(kind, ModelError)])
def test_a_docstring_is_the_default_message(kind: type[HarnessError]) -> None:
    assert str(kind()) == (kind.__doc__ or "").strip()
    assert str(kind("other")) == "other"


@pytest.mark.parametrize("kind", MODEL_ERRORS)
def test_only_waiting_spends_no_attempt_and_only_what_cannot_succeed_is_not_tried_again(kind: type[ModelError]) -> None:
    error = kind("what", retry_after=7, text="answer", http_status=500)
    assert error.spends_attempt is (kind not in (RateLimited, Unavailable))
    assert error.is_retryable is (kind not in (RequestRejected, NotCached))
    assert (error.retry_after, error.text, error.http_status) == (7, "answer", 500)


def test_every_way_in_which_a_model_fails_has_its_own_word() -> None:
    words = [kind.outcome for kind in MODEL_ERRORS]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("kind", CLASSES)
def test_errors_travel_between_processes(kind: type[HarnessError]) -> None:
    error = kind("what")
    error.hint = "remedy"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.hint) == (kind, "what", "remedy")
