"""Prompts: Jinja templates over a case, rendered to messages.

Templates are the experiment author's text and run in Jinja's sandbox; what they insert (transcripts, notes, targets) is
data and is never interpreted. A template that does not work fails its items with the template's name and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pgharness.errors import RequestRejected
from pgharness.types import Message

_DICT_NAMES = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without its detour over an exception for what lies in a dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_NAMES:
            return obj[attribute]
        return super().getattr(obj, attribute)


_ENVIRONMENT = _Environment(undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)


_MARKS = re.compile(r"\{[{%#]")
_OF_A_CASE = frozenset({"case_name", "case_text", "input", "target", "metadata", "config"})


class Prompt:
    """A system and a user template, compiled once a run."""

    def __init__(self, kind: str, system: str, user: str) -> None:
        self._templates = [
            (name, role, _renderer(name, text))
            for name, role, text in ((f"{kind}_system_prompt", "system", system), (f"{kind}_prompt", "user", user))
            if text
        ]
        self.is_of_case = _is_of_case(system) and _is_of_case(user)
        """Whether all items of a case get the same messages."""

    def render(self, values: Mapping[str, Any]) -> tuple[Message, ...]:
        """Return the messages for these values; raises RequestRejected naming the template and what it lacks."""
        messages = []
        for name, role, rendered in self._templates:
            try:
                text = rendered(values)
            except Exception as exc:
                raise RequestRejected(
                    f"{name} cannot be rendered: {exc}",
                    hint=f"It may use {', '.join(sorted(values))}; mend it in pgharness.instances and start a new run.",
                ) from exc
            if text.strip():
                messages.append(Message("system" if role == "system" else "user", text))
        return tuple(messages)


def _renderer(name: str, text: str) -> Callable[[Mapping[str, Any]], str]:
    template = _compile(name, text)
    if not _MARKS.search(text):
        constant = template.render()
        return lambda values: constant
    # one context for all renderings: making one takes longer than most templates
    context, known = template.new_context(), dict(template.globals)

    def rendered(values: Mapping[str, Any]) -> str:
        context.parent, context.vars, context.exported_vars = {**known, **values}, {}, set()
        return "".join(template.root_render_func(context))

    return rendered


def _compile(name: str, text: str) -> jinja2.Template:
    try:
        return _ENVIRONMENT.from_string(text)
    except jinja2.TemplateSyntaxError as exc:
        raise RequestRejected(
            f"{name} is not a valid template (line {exc.lineno}): {exc.message}",
            hint="Mend it in pgharness.instances and start a new run.",
        ) from exc


def _is_of_case(text: str) -> bool:
    """Tell whether a template says the same of a case each time: it uses nothing of its items, and no chance."""
    tree = _ENVIRONMENT.parse(text)
    has_chance = any(used.name == "random" for used in tree.find_all(jinja2.nodes.Filter))
    return not has_chance and jinja2.meta.find_undeclared_variables(tree) <= _OF_A_CASE


def text_of(value: Any) -> str:
    """Return JSON as a person would read it: a text as it is, a transcript as lines, anything else indented."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get("transcript"), list):
        rest = {key: item for key, item in value.items() if key != "transcript"}
        parts = [f"{key.replace('_', ' ').capitalize()}:\n{text_of(item)}" for key, item in rest.items() if item]
        return "\n\n".join([*parts, f"Transcript:\n{text_of(value['transcript'])}"])
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "text" in turn for turn in value):
        return "\n".join(
            f"{turn['speaker']}: {turn['text']}" if turn.get("speaker") else str(turn["text"]) for turn in value
        )
    return json.dumps(value, indent=2, ensure_ascii=False)


def case_facts(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what templates see of a case in every item; worth keeping, for a transcript takes long to become text."""
    target = case.get("target")
    return {
        "case_name": case["name"],
        "case_text": text_of(case["input"]),
        "input": case["input"],
        "target": None if target is None else text_of(target),
        "metadata": case.get("metadata") or {},
    }


def case_values(
    case: Mapping[str, Any], *, config: Mapping[str, Any], overlap: int, replication: int
) -> dict[str, Any]:
    """Return what templates see of a case in one item."""
    return {**case_facts(case), "config": config, "overlap": overlap, "replication": replication}
