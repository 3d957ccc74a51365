"""Votes: which of several answers wins, how far the others agree with it, and what theory expects of that.

Pure functions of their arguments. An answer is normalised to a label first, and answers with one label agree. Sums are
exact and ballots are read in the members' order, so a decision never depends on the order in which answers came. A tie
goes to the label whose ballots have more confidence together, else to the one of the member that is listed first.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pgharness.gateway.replies import json_of

_LARGEST = 1e100  # beyond it a sum of numbers may overflow
_SAME = 1e-9  # sums of weights that differ by less, relatively, are a tie


class Ballot(NamedTuple):
    """One answer as it votes: `place` is its member's in the ensemble's order, `value` is what a mean is made of."""

    place: int
    label: str
    weight: float = 1.0
    confidence: float = 1.0
    value: Any = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a vote came to.

    `winner` is the ballot whose answer is given, `consensus` a number from 0 to 1, `votes` what each label got, `tied`
    the labels between which a tie was broken. Of a mean or median: `result` is the number or JSON that it made, and
    `deviations` says how far each place is from it (0 to 1).
    """

    winner: Ballot
    consensus: float
    votes: Mapping[str, float]
    tied: tuple[str, ...] = ()
    result: Any = None
    deviations: Mapping[int, float] = field(default_factory=dict)


# ---- normalisation ---------------------------------------------------------------------------------------------------

_GAP = "\u00a0\u2007\u2009\u202f"  # no-break and thin spaces, which part thousands as commas do
# Figures that belong together, whether or not they are a number; a plain space may part thousands, too, or two numbers.
# A sign after a word or a number is a hyphen or a range: the last number of "3-4 days" is 4.
_FIGURES = re.compile(
    r"((?<!\w)[-+])?(?:[$€£¥]\s?)?"
    rf"((?:(?<!\.)\.)?\d(?:(?:[.,]+|[{_GAP}]|(?<!\d{{4}}) (?=\d{{3}}(?!\d)))?\d)*)([eE][-+]?\d+)?"
)
_DIGITS = re.compile(rf"(?:[1-9]\d{{0,2}}(?:[,{_GAP}]\d{{3}})+|\d+)?(?:\.\d+)?")
_UNGROUPED = str.maketrans("", "", f",{_GAP}")
_NOT = r"(?:\b(?:can)?not|n['\u2019]t)"
_DECISIVE = re.compile(
    r"(?P<uncertain>\b(?:maybe|perhaps|possibly|unsure|uncertain|unclear|unknown|undecided)\b"
    r"|\bno\s+(?:idea|clue|opinion|answer|way\s+(?:to|of)\s+(?:know|tell|say)\w*)\b"
    rf"|{_NOT}\s+(?:be\s+)?(?:sure|certain|known?|sa(?:y|id)|tell|told|answer(?:ed)?|determined?|decided?)\b)"
    rf"|(?P<negation>{_NOT}\s+(?:be\s+)?)?\b(?:(?P<yes>yes|yep|yeah|true|correct|affirmative)"
    r"|no(?!\s+(?:doubt|question|problem|trouble|matter)\b)|nope|false|incorrect|wrong)\b",
    re.IGNORECASE,
)
_TERSE = {"y": True, "t": True, "1": True, "1.0": True, "n": False, "f": False, "0": False, "0.0": False}
_SHARE = r"(?P<number>\d+(?:\.\d+)?|\.\d+)(?:\s*(?:(?P<percent>%)|(?:/|out of)\s*(?P<whole>[1-9]\d{0,2})))?"
_SHARE_ALONE = re.compile(rf"[^\d.,+-]*{_SHARE}\D*", re.IGNORECASE)  # "about 80%", but no range
_STATED = re.compile(rf"[\s*_#>-]*confidence[^\n:=]{{0,40}}[:=][\s*_]*{_SHARE}[\s*_.]*", re.IGNORECASE)


def label_of(value: Any, normalise: str) -> str | None:
    """Return the label of an answer (text, or JSON), or None for one that holds nothing of the kind asked for.

    - text: case and white space do not count, in the texts of JSON neither
    - number: the last number of the text; currency signs and thousands' commas do not count. Where its last figures are
      no number (1,5 or 1 000 or 1.2.3) it holds none: which one was meant is a guess
    - boolean: the first word that says yes or no (true, correct, wrong, ...), "not" before it counted; none where words
      before it say that nobody knows
    - json: the JSON that the text is, in a Markdown fence or not, whatever the order of keys
    - none: as it is
    """
    try:
        match normalise:
            case "number":
                number = number_of(value)
                return None if number is None else _number_text(number)
            case "boolean":
                answer = _boolean(value)
                return None if answer is None else str(answer).lower()
            case "json":
                return _canonical(json_of(value) if isinstance(value, str) else value, str)
            case "text":
                return (_plain(value) if isinstance(value, str) else _canonical(value, _plain)) or None
            case _:
                return (value if isinstance(value, str) else _canonical(value, str)) or None
    except (ValueError, RecursionError):
        return None


def number_of(value: Any) -> float | None:
    """Return the number that an answer is, or the last one of its text; None where there is none."""
    if isinstance(value, str):
        found = deque(_FIGURES.finditer(value.replace("\N{MINUS SIGN}", "-")), maxlen=1)
        if not found or not _DIGITS.fullmatch(found[0][2]):
            return None
        sign, digits, power = found[0].groups("")
        value = float(f"{sign}{digits.translate(_UNGROUPED)}{power}")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) + 0.0 if abs(value) <= _LARGEST else None  # -0 is 0


def _boolean(value: Any) -> bool | None:
    if not isinstance(value, str):
        return value if isinstance(value, bool) else _TERSE.get(str(value))
    if (terse := _TERSE.get(value.strip().strip(".").lower())) is not None:
        return terse
    found = _DECISIVE.search(value)
    if found is None or found["uncertain"]:
        return None
    return (found["yes"] is not None) != (found["negation"] is not None)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()).casefold())


def _number_text(number: float) -> str:
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)


def _canonical(value: Any, text: Callable[[str], str]) -> str:
    return json.dumps(_plainly(value, text), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _plainly(value: Any, text: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        return {str(name): _plainly(inner, text) for name, inner in value.items()}
    return [_plainly(inner, text) for inner in value] if isinstance(value, list | tuple) else value


def stated_confidence(text: str, data: Any) -> tuple[float | None, str]:
    """Return the confidence that an answer states of itself, and its text without the line that does.

    It is the field `confidence` of JSON, else a last line such as "confidence: 0.8", "Confidence: 80%" or one that ends
    in 9/10. A bare number above 10 is a percentage; one above 1 may be of 5, 10 or 100, so it is not known.
    """
    if data is not None:
        stated = data.get("confidence") if isinstance(data, Mapping) else None
        if not isinstance(stated, str):
            return _share(number_of(stated)), text
        found = _SHARE_ALONE.fullmatch(stated)
    else:
        body, _, last = text.rstrip().rpartition("\n")
        found = _STATED.fullmatch(last)
        text = text if found is None else body.rstrip()
    if found is None:
        return None, text
    return _share(float(found["number"]), 100.0 if found["percent"] else float(found["whole"] or 0)), text


def _share(number: float | None, whole: float = 0.0) -> float | None:
    if number is None:
        return None
    share = number / (whole or (100.0 if number > 10 else 1.0))
    return share if 0 <= share <= 1 else None


# ---- votes -----------------------------------------------------------------------------------------------------------


def elect(ballots: Sequence[Ballot], vote: str, left: float = 0.0) -> Decision:
    """Decide a vote by majority (or unanimous), weighted or best_confidence; there has to be a ballot.

    The consensus is the winner's share of the ballots, of the weights (each times its confidence), or its confidence.
    With ballots that were not waited for, worth at most `left` together, it is the share that is certain without them.
    The winner is the first of its label in the members' order, by best_confidence the most confident one.
    """
    groups: dict[str, list[Ballot]] = {}
    for ballot in sorted(ballots, key=_place):
        groups.setdefault(ballot.label, []).append(ballot)
    votes: dict[str, float]
    match vote:
        case "weighted":
            votes = {label: math.fsum([b.weight * b.confidence for b in group]) for label, group in groups.items()}
        case "best_confidence":
            votes = {label: max([b.confidence for b in group]) for label, group in groups.items()}
        case _:
            votes = {label: len(group) for label, group in groups.items()}
    tied = _highest(votes)
    label = tied[0]
    if len(tied) > 1:
        label = _highest({one: math.fsum([b.confidence for b in groups[one]]) for one in tied})[0]
    winner = groups[label][0]
    if vote == "best_confidence":
        winner = max(groups[label], key=lambda ballot: ballot.confidence)
        consensus = winner.confidence
    else:
        total = math.fsum(votes.values()) + left
        consensus = min(votes[label] / total, 1.0) if total else 0.0
    return Decision(winner, consensus, votes, tuple(tied) if len(tied) > 1 else ())


def _place(ballot: Ballot) -> int:
    return ballot.place


def _highest(votes: Mapping[str, float]) -> list[str]:
    most = max(votes.values())
    return [label for label, count in votes.items() if count == most or math.isclose(count, most, rel_tol=_SAME)]


def is_settled(decision: Decision, left: float, *, min_consensus: float, answers_below: bool) -> bool:
    """Tell whether ballots to come, worth at most `left` together, can no longer change what a vote leads to.

    That is who wins, and whether the consensus suffices; who wins does not matter where it cannot suffice, unless such
    a vote is answered all the same.
    """
    most = decision.votes[decision.winner.label]
    next_most = max((count for label, count in decision.votes.items() if label != decision.winner.label), default=0.0)
    whole = math.fsum(decision.votes.values()) + left
    is_hopeless = whole > 0 and (most + left) / whole < min_consensus
    if is_hopeless and not answers_below:
        return True
    has_won = most - next_most > left * (1 + _SAME) + _SAME * most
    return has_won and (is_hopeless or most / whole >= min_consensus)


# ---- means -----------------------------------------------------------------------------------------------------------


def measured(value: Any, normalise: str) -> tuple[str, Any] | None:
    """Return the shape and the value of an answer that a mean is made of; None for one without a number.

    A text counts as the JSON that it is (normalised as `json`), else as its last number. Numbers of answers of one
    shape can be averaged place by place.
    """
    try:
        if isinstance(value, str):
            value = json_of(value) if normalise == "json" else number_of(value)
        shape = json.dumps(_shape(value), sort_keys=True)
    except (ValueError, OverflowError, RecursionError):
        return None
    return None if next(_numbers(value), None) is None else (shape, value)


def _shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not abs(value) <= _LARGEST:  # NaN is not
        raise ValueError("too large")
    return "#"


def average(ballots: Sequence[Ballot], how: str, schema: Mapping[str, Any] | None = None) -> Decision:
    """Return the weighted mean or median, number by number; labels are shapes, and those of the commonest count.

    Each ballot counts with its weight times its confidence. What is no number is taken from the winner: the ballot
    whose numbers are nearest to the result, the first of several. A number that `schema` does not allow is rounded, and
    is the winner's where that is not allowed either.

    A deviation is the mean over the numbers of |x - result| / largest |x| of all; the consensus is 1 less their mean,
    so it is 1 where all agree, and 0 where they are as far apart as numbers of that size can be.
    """
    shape = elect(ballots, "majority").winner.label
    ordered = sorted([ballot for ballot in ballots if ballot.label == shape], key=_place)
    rows = [list(_numbers(ballot.value)) for ballot in ordered]
    weights = [ballot.weight * ballot.confidence for ballot in ordered]
    if not any(weights):
        weights = [1.0] * len(ordered)
    middle = _mean if how == "mean" else _median
    columns = list(zip(*rows, strict=True))
    averages = [min(max(middle(column, weights), min(column)), max(column)) for column in columns]
    scales = [max(map(abs, column)) or 1.0 for column in columns]
    deviations = [
        math.fsum([abs(x - a) / scale for x, a, scale in zip(row, averages, scales, strict=True)]) / len(averages)
        for row in rows
    ]
    nearest = min(range(len(ordered)), key=deviations.__getitem__)
    winner = ordered[nearest]
    result = _rebuilt(winner.value, iter(averages), schema, schema or {})
    if schema and misfit(result, schema):
        result = winner.value
    return Decision(
        winner,
        min(max(1 - math.fsum(deviations) / len(deviations), 0.0), 1.0),
        {},
        result=result,
        deviations={ballot.place: deviation for ballot, deviation in zip(ordered, deviations, strict=True)},
    )


def _numbers(value: Any) -> Iterator[float]:
    """Yield the numbers of JSON, those of an object in the order of its sorted keys."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield from _numbers(value[name])
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def _rebuilt(value: Any, numbers: Iterator[float], schema: Any, root: Mapping[str, Any]) -> Any:
    """Return a copy of JSON with other numbers: each exact, else rounded, else as it was, as the schema allows."""
    if isinstance(value, Mapping):
        form = _form(value, schema, root)
        named, others = form.get("properties", {}), form.get("additionalProperties")
        new = {name: _rebuilt(value[name], numbers, named.get(name, others), root) for name in sorted(value)}
        return {name: new[name] for name in value}
    if isinstance(value, list):
        items = _form(value, schema, root).get("items")
        return [_rebuilt(inner, numbers, items, root) for inner in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    number = next(numbers)
    exact = int(number) if number.is_integer() and abs(number) < 2**63 else number
    return next((new for new in (exact, round(number)) if not _misfit(new, schema, root)), value)


def _form(value: Any, schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema together with the one of its forms (anyOf, oneOf) that JSON has."""
    form = _resolved(schema, root)
    for choice in form.get("anyOf") or form.get("oneOf") or ():
        if not _misfit(value, choice, root):
            return {**form, **_form(value, choice, root)}
    return form


def _mean(numbers: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum([x * w for x, w in zip(numbers, weights, strict=True)]) / math.fsum(weights)


def _median(numbers: Sequence[float], weights: Sequence[float]) -> float:
    """Return where half of the weight lies below and half above; halfway where that is between two numbers."""
    pairs = sorted(pair for pair in zip(numbers, weights, strict=True) if pair[1] > 0)
    half = math.fsum(weights) / 2
    for place, (number, _) in enumerate(pairs):
        below = math.fsum([weight for _, weight in pairs[: place + 1]])
        if math.isclose(below, half, rel_tol=_SAME) and place + 1 < len(pairs):
            return (number + pairs[place + 1][0]) / 2
        if below > half:
            return number
    return pairs[-1][0]


# ---- schemas ---------------------------------------------------------------------------------------------------------

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: value.is_integer() if isinstance(value, float) else type(value) is int,
}
# what each keyword limits, of values of which type, and whether it is kept
_BOUNDS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": ("number", lambda value, bound: value >= bound),
    "maximum": ("number", lambda value, bound: value <= bound),
    "exclusiveMinimum": ("number", lambda value, bound: value > bound),
    "exclusiveMaximum": ("number", lambda value, bound: value < bound),
    "minLength": ("string", lambda value, bound: len(value) >= bound),
    "maxLength": ("string", lambda value, bound: len(value) <= bound),
    "minItems": ("array", lambda value, bound: len(value) >= bound),
    "maxItems": ("array", lambda value, bound: len(value) <= bound),
}


def misfit(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Return where and how JSON does not fit a schema, or None.

    Knows the keywords that models are asked with (those of every vendor's strict mode, and bounds); others, and
    properties that a schema does not name, are left to whoever asked.
    """
    problem = _misfit(value, schema, schema)
    return problem and f"the answer{problem}"


def _misfit(value: Any, schema: Any, root: Mapping[str, Any]) -> str | None:
    for keyword, wanted in _resolved(schema, root).items():
        if keyword == "type":
            kinds = [wanted] if isinstance(wanted, str) else wanted
            if not any([_TYPES[kind](value) for kind in kinds if kind in _TYPES]):
                return f" is no {' or '.join(kinds)}"
        elif keyword in _BOUNDS:
            kind, is_kept = _BOUNDS[keyword]
            if _TYPES[kind](value) and not is_kept(value, wanted):
                return f" breaks {keyword} {wanted}"
        elif keyword == "properties" and isinstance(value, dict):
            for name, inner in value.items():
                if name in wanted and (problem := _misfit(inner, wanted[name], root)):
                    return f".{name}{problem}"
        elif keyword == "items" and isinstance(value, list):
            for place, inner in enumerate(value):
                if problem := _misfit(inner, wanted, root):
                    return f"[{place}]{problem}"
        elif keyword == "required" and isinstance(value, dict):
            for name in wanted:
                if name not in value:
                    return f" lacks {name!r}"
        elif (keyword == "enum" and value not in wanted) or (keyword == "const" and value != wanted):
            return " is none of the values allowed"
        elif keyword in ("anyOf", "oneOf") and all(_misfit(value, choice, root) for choice in wanted):
            return " fits none of the forms allowed"
    return None


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a schema, or the part of the whole that it refers to."""
    for _ in range(8):
        if not (isinstance(schema, dict) and isinstance(schema.get("$ref"), str)):
            break
        target: Any = root
        for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target.get(step) if step and isinstance(target, Mapping) else target
        schema = target
    return schema if isinstance(schema, Mapping) else {}


# ---- theory ----------------------------------------------------------------------------------------------------------


def majority_error(error: float, members: int, *, correlation: float = 0.0) -> float:
    """Return how often a majority of members is wrong that are each wrong with probability `error`.

    A question has one right and one wrong answer; half of the ties of an even number are wrong. Independent errors
    make the upper tail of the binomial distribution (Condorcet's jury theorem). With a `correlation` between the errors
    of any two (0 to 1) their number is beta-binomial, the exchangeable model in which a question's difficulty varies.
    """
    from scipy.stats import betabinom, binom

    if not (0 <= error <= 1 and 0 <= correlation <= 1 and members >= 1):
        raise ValueError("error and correlation are from 0 to 1, and there is at least one member")
    if correlation == 1 or min(error, 1 - error) < 1e-12:
        return float(error)
    if correlation < 1e-6:  # the other one's arithmetic would lose more than the difference that it makes
        wrong: Any = binom(members, error)
    else:
        spread = (1 - correlation) / correlation
        wrong = betabinom(members, error * spread, (1 - error) * spread)
    tie = wrong.pmf(members // 2) / 2 if members % 2 == 0 else 0.0
    return float(min(wrong.sf(members // 2) + tie, 1.0))


def effective_members(members: int, correlation: float) -> float:
    """Return how many independent members are worth as much as these, of correlation rho: N / (1 + (N - 1) rho).

    It is the number whose mean has the same variance (Kish's design effect).
    """
    if not (members >= 1 and 0 <= correlation <= 1):
        raise ValueError("there is at least one member, and correlation is from 0 to 1")
    return members / (1 + (members - 1) * correlation)
