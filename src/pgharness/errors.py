"""Every error that pgharness raises on purpose, and how a database error becomes one.

    HarnessError
    ├── DatabaseError            the server refused a statement
    │   ├── NotFound             PH001
    │   ├── InvalidArgument      PH002, and Postgres's own constraint and syntax-of-value errors
    │   ├── WrongState           PH003
    │   ├── Conflict             PH004
    │   ├── LeaseLost            PH005
    │   ├── BudgetExceeded       PH006
    │   └── SchemaOutOfDate      PH007
    ├── SettingsError            an option or environment variable cannot be used
    ├── EmbeddedError            the embedded server cannot be found, started or reached
    ├── ImportRefused            a file to import has wrong rows
    ├── PluginBroken             an installed plugin cannot be imported, or failed at what it is for
    └── ModelError               a model did not give a usable answer
        ├── RateLimited          429, 529 or a quota: wait, spend no attempt
        ├── Unavailable          an outage (no connection, 502, 503, 504): wait, spend no attempt
        ├── ServerFailed         500 and other server errors
        ├── TimedOut             no answer within the model's timeout
        ├── InvalidOutput        an answer that does not fit what was asked
        ├── Refused              a content filter or a refusal
        ├── RequestRejected      4xx: the same request will never succeed
        ├── NotCached            a replay has no answer to this in the response cache
        ├── CodeFailed           a user's program or callable failed
        ├── InsufficientResponses  too few members of an ensemble answered
        └── NoConsensus          the members of an ensemble agree too little

Callers steer by class and attributes, never by message text. `hint` is what to type next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class HarnessError(Exception):
    """Something went wrong in pgharness."""

    def __init__(self, message: str | None = None, *, hint: str | None = None, detail: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.hint = hint
        self.detail = detail


class DatabaseError(HarnessError):
    """The database refused a statement."""

    sqlstate: str | None = None


class NotFound(DatabaseError):
    """The named thing does not exist."""


class InvalidArgument(DatabaseError):
    """A value cannot be used."""


class WrongState(DatabaseError):
    """The thing is in a state that does not allow this."""


class Conflict(DatabaseError):
    """The request contradicts an earlier one."""


class LeaseLost(DatabaseError):
    """Another worker has taken over."""


class BudgetExceeded(DatabaseError):
    """The budget is spent."""


class SchemaOutOfDate(DatabaseError):
    """The database schema does not fit this version of pgharness."""


class SettingsError(HarnessError):
    """An option or environment variable cannot be used."""


class EmbeddedError(HarnessError):
    """The embedded Postgres server cannot be used."""


class ImportRefused(HarnessError):
    """The file has rows that cannot be imported; nothing was imported."""


class PluginBroken(HarnessError):
    """An installed plugin cannot be used; `text` holds its traceback, or what it printed."""

    def __init__(self, message: str | None = None, *, text: str | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.text = text


class ModelError(HarnessError):
    """A model did not give a usable answer.

    `outcome` is the word stored in `calls.outcome`; `is_retryable` says whether asking again can help;
    `retry_after` is the number of seconds that the server asked to wait; `text` is the answer as received;
    `composition` is how a composite came to fail, as JSON.
    """

    outcome: ClassVar[str] = "error"
    is_retryable: bool = True
    spends_attempt: bool = True

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        http_status: int | None = None,
        request_id: str | None = None,
        text: str | None = None,
        finish_reason: str | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
        cached_tokens: int = 0,
        hint: str | None = None,
        composition: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.composition = composition
        self.retry_after = retry_after
        self.http_status = http_status
        self.request_id = request_id
        self.text = text
        self.finish_reason = finish_reason
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.cached_tokens = cached_tokens


class RateLimited(ModelError):
    """The provider asked to slow down."""

    outcome = "rate_limited"
    spends_attempt = False


class Unavailable(ModelError):
    """The provider could not be reached, or said that it is down; or was not asked, for it is known to be."""

    outcome = "unavailable"
    spends_attempt = False
    was_asked: bool = True


class ServerFailed(ModelError):
    """The provider answered with a server error."""

    outcome = "server_error"


class TimedOut(ModelError):
    """No answer came within the model's timeout."""

    outcome = "timeout"


class InvalidOutput(ModelError):
    """The answer does not fit what was asked."""

    outcome = "invalid_output"


class Refused(ModelError):
    """The model or its content filter refused to answer."""

    outcome = "refused"


class RequestRejected(ModelError):
    """The provider rejected the request; the same request will never succeed."""

    outcome = "rejected"
    is_retryable = False


class NotCached(ModelError):
    """The response cache has no answer to this, and nobody may be asked."""

    outcome = "not_cached"
    is_retryable = False


class CodeFailed(ModelError):
    """A user's program or callable failed; `text` holds its traceback or standard error."""

    outcome = "code_failed"


class InsufficientResponses(ModelError):
    """Too few members of an ensemble gave a usable answer; how they failed says whether asking again can help."""

    outcome = "insufficient_responses"


class NoConsensus(ModelError):
    """The members of an ensemble agree too little."""

    outcome = "no_consensus"


BY_SQLSTATE: dict[str, type[DatabaseError]] = {
    "PH001": NotFound,
    "PH002": InvalidArgument,
    "PH003": WrongState,
    "PH004": Conflict,
    "PH005": LeaseLost,
    "PH006": BudgetExceeded,
    "PH007": SchemaOutOfDate,
}


NOT_PERMITTED = "42501"
"""The SQLSTATE of what a role may not do."""

# what to do about refusals of Postgres itself, which have no hint
_HINTS = {
    "23505": "Choose another: it has to be unique.",
    NOT_PERMITTED: "Migrate as the owner of the database; to use it, be granted pgharness_author, _worker or _reader.",
}


def from_sqlstate(sqlstate: str | None, message: str, *, hint: str | None, detail: str | None) -> DatabaseError:
    """Return the error of a SQLSTATE; classes 22 and 23 are wrong values, anything unknown a DatabaseError."""
    code = sqlstate or ""
    kind = BY_SQLSTATE.get(code) or (InvalidArgument if code[:2] in ("22", "23") else DatabaseError)
    error = kind(message, hint=hint or _HINTS.get(code), detail=detail)
    error.sqlstate = sqlstate
    return error
