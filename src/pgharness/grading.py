"""Grading: a rubric and a note become a request, an answer becomes verdicts, a metric becomes a score.

A grading model must give, for each criterion in order, a rationale and a satisfaction from 0 to 100. Anything else is
InvalidOutput, with words that the model can act on at its next attempt. Scores are computed from verdicts by the
database, so that no two workers can weigh differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import regex
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pgharness.errors import InvalidOutput, RequestRejected
from pgharness.prompts import text_of

TARGET_CRITERION = "The output agrees with the target."
_PATTERN_SECONDS = 2.0
# a sign after a word or a number is a hyphen or a range: the last number of "3-4 days" is 4; re's digits are float()'s
_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")


class Verdict(TypedDict):
    """One criterion's verdict: why, and how far it is met (0..100)."""

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)  # type: ignore[misc]

    rationale: Annotated[str, Field(min_length=1)]
    satisfaction: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


_VERDICTS = TypeAdapter(list[Verdict])


@dataclass(frozen=True, slots=True)
class Score:
    """A metric's score out of its maximum."""

    score: float
    max_score: float = 1.0


def criteria_values(rubric: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return a rubric's criteria as templates see them, numbered from 1; without one, agreement with the target."""
    criteria = rubric["criteria"] if rubric else [{"criterion": TARGET_CRITERION, "weight": 100}]
    return [{**criterion, "number": number} for number, criterion in enumerate(criteria, start=1)]


@lru_cache(maxsize=256)
def verdict_schema(count: int) -> Mapping[str, Any]:
    """Return the JSON Schema of an answer with so many verdicts: one object for each number, not to be changed."""
    verdict = {
        "type": "object",
        "properties": {
            "rationale": {"type": "string", "minLength": 1},
            "satisfaction": {"type": "number", "minimum": 0, "maximum": 100},
        },
        "required": ["rationale", "satisfaction"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"verdicts": {"type": "array", "items": verdict, "minItems": count, "maxItems": count}},
        "required": ["verdicts"],
        "additionalProperties": False,
    }


def read_verdicts(answer: Any, count: int, *, text: str) -> list[Verdict]:
    """Return the verdicts of an answer, or raise InvalidOutput saying which one is wrong and how.

    A bare array is accepted as well as {"verdicts": [...]}.
    """
    found = answer.get("verdicts") if isinstance(answer, dict) else answer
    if not isinstance(found, list):
        raise InvalidOutput('the answer has no array under "verdicts"', text=text)
    if len(found) != count:
        raise InvalidOutput(f"the answer has {len(found)} verdicts for {count} criteria", text=text)
    try:
        return _VERDICTS.validate_python(found)
    except ValidationError as exc:
        problem = exc.errors()[0]
        index, *place = problem["loc"]
        where = ".".join(str(part) for part in place) or "it"
        raise InvalidOutput(f"verdict {int(index) + 1}: {where}: {problem['msg']}", text=text) from None


def score_metric(metric: str, parameters: Mapping[str, Any], output: Any, target: Any) -> Score:
    """Score an output against a target by a metric: exact_match, numeric_match, contains or regex; 1 or 0.

    Texts are compared without surrounding white space. numeric_match compares the last number of the output with the
    last number of the target (so "#### 72" means 72). Raises RequestRejected for a target or option that no output
    could ever match.
    """
    found, wanted = text_of(output).strip(), text_of(target).strip() if target is not None else ""
    match metric:
        case "exact_match":
            return Score(float(_normal(found, parameters) == _normal(wanted, parameters)))
        case "contains":
            return Score(float(_normal(wanted, parameters) in _normal(found, parameters)))
        case "numeric_match":
            expected = _numbers(wanted)
            if not expected:
                raise RequestRejected(f"numeric_match needs a number as target, not {wanted[:80]!r}")
            given = _numbers(found)
            tolerances = (parameters.get("relative_tolerance", 1e-9), parameters.get("absolute_tolerance", 0.0))
            close = given and math.isclose(given[-1], expected[-1], rel_tol=tolerances[0], abs_tol=tolerances[1])
            return Score(float(bool(close)))
        case "regex":
            return Score(float(_search(str(parameters.get("pattern", wanted)), found, parameters)))
        case _:
            raise RequestRejected(
                f"metric {metric!r} does not exist", hint="Use exact_match, numeric_match, contains or regex."
            )


def _normal(text: str, parameters: Mapping[str, Any]) -> str:
    if parameters.get("ignore_space"):
        text = " ".join(text.split())
    return text.casefold() if parameters.get("ignore_case") else text


def _numbers(text: str) -> Sequence[float]:
    text = text.replace("\N{MINUS SIGN}", "-")
    return [float(number.replace(",", "")) for number in _NUMBER.findall(text)]


def _search(pattern: str, text: str, parameters: Mapping[str, Any]) -> bool:
    try:
        flags = regex.IGNORECASE if parameters.get("ignore_case") else 0
        return regex.search(pattern, text, flags, timeout=_PATTERN_SECONDS) is not None
    except regex.error as exc:
        raise RequestRejected(f"pattern {pattern[:80]!r} is not a regular expression: {exc}") from None
    except TimeoutError:
        raise RequestRejected(
            f"pattern {pattern[:80]!r} took longer than {_PATTERN_SECONDS} s on this output"
        ) from None
