"""What simulated models say: notes of a case's facts, verdicts on a note, JSON that fits a schema, and wrong answers.

Pure functions of what was asked and a seed. A note repeats more or fewer facts of its case; a grader finds in it what
the rubric asks for, by the words of each criterion.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pgharness.gateway.simulated_world import NORMAL, draws

_CLINICIANS = frozenset({"clinician", "doctor", "dr", "gp", "nurse", "physician", "provider", "therapist"})
_TELLING_WORD = re.compile(
    r"(?!(?:about|after|also|been|both|does|each|from|have|must|notes?|other|patient|should|that|their|them|then|there|"
    r"these|they|this|those|were|what|when|where|which|while|whether|will|with|without|your|documents|documented|"
    r"mentions|states|includes|records|clearly|correctly)\b)\b[^\W\d_][^\W_]{3,}|\b\d[^\W_]*"
)
_PLANS = (
    "Advice given; review in two weeks or sooner if worse.",
    "Safety-netting explained; follow up as needed.",
    "Continue present treatment and review with results.",
    "Supportive care discussed; return if symptoms persist.",
)
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_DEEP = 6  # a schema that refers to itself gets no optional parts below this depth


def note(
    facts: Sequence[tuple[str, str]], seed: int, *, told_share: Callable[[float], float], output_tokens: int
) -> str:
    """Return a note that repeats some of a case's facts: how many is its hidden quality, made of a draw."""
    size, quality, choice, *luck = draws(seed, 3 + len(facts))
    plan = _PLANS[int(choice * len(_PLANS))]
    if not facts:
        return f"Summary: no information was given.\nPlan: {plan}"
    room = int(output_tokens * 4 * math.exp(0.25 * NORMAL.inv_cdf(size))) // 90 + 1
    step = max(1.0, len(facts) / room)
    share = told_share(quality)
    told: list[str] = []
    discussed: list[str] = []
    for place in range(min(room, len(facts))):
        if luck[place] < share:
            speaker, text = facts[int(place * step)]
            (discussed if speaker in _CLINICIANS else told).append(text)
    if not told and not discussed:
        told.append(facts[0][1])
    if not any(speaker for speaker, _ in facts):
        return f"Summary: {'; '.join(told)}.\nPlan: {plan}"
    return (
        f"Subjective: {'; '.join(told) or 'no history recorded'}.\n"
        f"Discussed: {'; '.join(discussed) or 'nothing further recorded'}.\nPlan: {plan}"
    )


def facts_of(value: Any) -> list[tuple[str, str]]:
    """Return a case's facts as (speaker, clause): the turns that say something, the sentences, or the JSON's leaves."""
    return [(speaker.lower(), _shortened(text)) for speaker, text in _facts(value)]


def _facts(value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and isinstance(value.get("transcript"), list):
        value = value["transcript"]
    if isinstance(value, str):
        return [("", sentence) for sentence in re.split(r"(?<=[.!?])\s+", value) if sentence.strip()]
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "text" in value[0]:
        turns = [
            (str(turn.get("speaker", "")), str(turn.get("text", ""))) for turn in value if isinstance(turn, Mapping)
        ]
        return [turn for turn in turns if len(turn[1]) > 24] or [turn for turn in turns if turn[1].strip()]
    return list(itertools.islice(_leaves(value, ""), 200))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    elif value is not None and value != "":
        yield "", f"{name} {value}".strip()


def _shortened(text: str) -> str:
    """Return a fact as a clause of at most 160 characters, cut between words."""
    if len(text) > 160:
        text = text[:160].rsplit(" ", 1)[0]
    return text.strip(" .;?!\n")


def wrong_answer(target: str, rng: random.Random) -> str:
    """Return an answer that looks like the target, and neither equals nor contains it."""
    simple = target.strip()
    opposite = _OPPOSITES.get(simple.lower())
    candidates: list[str] = []
    if opposite is not None:
        candidates.append(opposite.capitalize() if simple[0].isupper() else opposite)
    elif re.fullmatch(r"[A-Ea-e]", simple):
        letters = "ABCDE" if simple.isupper() else "abcde"
        candidates.append(rng.choice(letters.replace(simple, "")))
    elif number := re.search(r"-?\d{1,15}(?:\.\d{1,6})?", simple):
        decimals = len(number.group().partition(".")[2])
        for _ in range(4):
            near = float(number.group()) * rng.choice((0.5, 0.9, 1.1, 2.0)) + rng.randint(1, 9)
            candidates.append(f"{simple[: number.start()]}{near:.{decimals}f}{simple[number.end() :]}")
    elif " " in simple:
        words = simple.split()
        candidates.append(" ".join(words[: max(1, len(words) * 2 // 3)]))
    return next((wrong for wrong in candidates if target not in wrong and simple not in wrong), "unknown")


def structured(item: Mapping[str, Any], schema: Mapping[str, Any], seed: int, *, leniency: float, noise: float) -> Any:
    """Return JSON that fits the schema; the schema of a grade gets satisfactions that the note has earned."""
    verdicts = schema.get("properties", {}).get("verdicts")
    rubric = item.get("rubric")
    if verdicts is not None and rubric is not None:
        count = verdicts.get("minItems", len(rubric["criteria"]))
        return {"verdicts": _verdicts(item.get("note"), rubric["criteria"], draws(seed, count), leniency, noise)}
    return _filled(schema, schema, random.Random(seed), 0)


def _verdicts(
    note: Any, criteria: Sequence[Mapping[str, Any]], luck: Sequence[float], leniency: float, noise: float
) -> list[dict[str, Any]]:
    """Judge a note by the share of each criterion's words that it has, and by whether it is long enough to say much."""
    text = (note if isinstance(note, str) else json.dumps(note, ensure_ascii=False)).lower()
    lean = 20.0 * leniency - 15.0 * max(0.0, 1.0 - len(text) / 300)
    verdicts: list[dict[str, Any]] = []
    for place, draw in enumerate(luck):
        found: list[str] = []
        missing: list[str] = []
        if place < len(criteria):
            for word, stem in _stems(str(criteria[place].get("criterion", ""))):
                (found if stem in text else missing).append(word)
        coverage = len(found) / (len(found) + len(missing)) if found or missing else 0.5
        error = lean + noise * NORMAL.inv_cdf(draw)
        satisfaction = round(15.0 + 80.0 * math.sqrt(coverage) + error)
        satisfaction = 0 if satisfaction < 0 else 100 if satisfaction > 100 else satisfaction
        verdicts.append({"rationale": _rationale(found, missing), "satisfaction": satisfaction})
    return verdicts


@functools.lru_cache(maxsize=4096)
def _stems(criterion: str) -> tuple[tuple[str, str], ...]:
    """Return the words of a criterion that carry meaning, each with the stem to look for in a note."""
    words = dict.fromkeys(_TELLING_WORD.findall(criterion.lower()) or criterion.lower().split())
    return tuple((word, word[:5]) for word in words)


def _rationale(found: Sequence[str], missing: Sequence[str]) -> str:
    if not missing:
        return f"The note covers this fully: {', '.join(found[:4])}." if found else "The note addresses this in part."
    if not found:
        return f"The note does not mention {', '.join(missing[:4])}."
    return f"The note mentions {', '.join(found[:3])}, but not {', '.join(missing[:3])}."


def _filled(schema: Any, root: Mapping[str, Any], rng: random.Random, depth: int) -> Any:
    """Return a value that fits a JSON Schema of the kind that models accept: no patterns, no formats."""
    if not isinstance(schema, Mapping):
        return None
    if "$ref" in schema:
        target: Any = root
        for step in str(schema["$ref"]).removeprefix("#").strip("/").split("/"):
            target = target[step] if step else target
        return _filled(target, root, rng, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(list(schema["enum"]))
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _filled(schema[choice][-1 if depth > _DEEP else 0], root, rng, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        wanted = schema.get("required", ()) if depth > _DEEP else schema.get("properties", {})
        return {name: _filled(schema["properties"][name], root, rng, depth + 1) for name in wanted}
    if kind == "array":
        least = schema.get("minItems", 0)
        length = least if depth > _DEEP else min(schema.get("maxItems", least + 2), max(least, 2))
        return [_filled(schema.get("items", {}), root, rng, depth + 1) for _ in range(length)]
    if kind in ("integer", "number"):
        return _number(schema, rng, is_integer=kind == "integer")
    if kind == "boolean":
        return rng.random() < 0.5
    return None if kind == "null" else _words(schema, rng)


def _number(schema: Mapping[str, Any], rng: random.Random, *, is_integer: bool) -> float:
    """Return a number within its bounds; a range open on one side is 100 wide."""
    lower = schema.get("minimum", schema.get("exclusiveMinimum"))
    upper = schema.get("maximum", schema.get("exclusiveMaximum"))
    lower = (0 if upper is None or upper > 0 else upper - 100) if lower is None else lower
    upper = lower + 100 if upper is None else upper
    if not is_integer:
        return lower + (upper - lower) * rng.uniform(0.05, 0.95)
    first = math.floor(lower) + 1 if "exclusiveMinimum" in schema else math.ceil(lower)
    last = math.ceil(upper) - 1 if "exclusiveMaximum" in schema else math.floor(upper)
    return rng.randint(first, max(first, last))


def _words(schema: Mapping[str, Any], rng: random.Random) -> str:
    """Return a sentence of a length that the schema allows."""
    text = rng.choice(_PLANS)
    least = int(schema.get("minLength", 0))
    while len(text) < least:
        text += " " + rng.choice(_PLANS)
    return text[: schema.get("maxLength")]


def lacking(data: dict[str, Any], schema: Mapping[str, Any]) -> Any:
    """Return an answer that lacks something which its schema asks for, the way a hasty model would."""
    if data.get("verdicts"):
        return data | {"verdicts": data["verdicts"][:-1]}
    required = schema.get("required")
    return {name: value for name, value in data.items() if name != required[-1]} if required else [data]
