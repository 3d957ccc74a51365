"""Prompts: Jinja templates over a case, rendered to messages.

Templates are the experiment author's text and run in Jinja's sandbox; what they insert (transcripts, notes, targets) is
data and is never interpreted. A template that does not work fails its items with the template's name and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from secrets import token_hex
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
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


# What a template may consist of so that text which is inserted stays as it is: nothing that calls or captures.
_PLAIN = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.If,
    nodes.For,
    nodes.Name,
    nodes.Const,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Filter,
    nodes.Test,
    nodes.Compare,
    nodes.Operand,
    nodes.BinExpr,
    nodes.UnaryExpr,
    nodes.CondExpr,
    nodes.List,
    nodes.Tuple,
)
_MARKS = re.compile(r"\{[{%#]")
_NOTE_MARK = f"<note {token_hex(16)}>"


class Outline:
    """Messages that were rendered once, with a mark where the note of each item goes."""

    def __init__(self, messages: tuple[Message, ...]) -> None:
        self._messages = messages
        self._has_note = any(_NOTE_MARK in message.content for message in messages)

    def messages(self, note: str) -> tuple[Message, ...]:
        """Return the messages for a note."""
        if not self._has_note:
            return self._messages
        filled = [(message, message.content.replace(_NOTE_MARK, note)) for message in self._messages]
        return tuple(
            message if content is message.content else Message(message.role, content)
            for message, content in filled
            if content is message.content or content.strip()
        )


class Prompt:
    """A system and a user template, compiled."""

    def __init__(self, kind: str, system: str, user: str) -> None:
        self._templates = [
            (name, role, _renderer(name, text))
            for name, role, text in ((f"{kind}_system_prompt", "system", system), (f"{kind}_prompt", "user", user))
            if text
        ]
        self._variables = _variables(system, kind) | _variables(user, kind)

    def outline(self, values: Mapping[str, Any]) -> Outline | None:
        """Return what all items with these values share but for their note; None when they share no more than that."""
        if not self._variables <= values.keys():
            return None
        try:
            return Outline(self.render({**values, "note": _NOTE_MARK}))
        except RequestRejected:
            return None  # each of the items will say so, and what its templates may use

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


@lru_cache(maxsize=64)
def prompt_of(kind: str, system: str, user: str) -> Prompt:
    """Return the prompt of two templates, compiled once however many runs have them: that takes milliseconds."""
    return Prompt(kind, system, user)


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


def _variables(text: str, kind: str) -> set[str]:
    """Return what a template's text depends on; not a grade's note, when it only stands there as it is."""
    tree = _ENVIRONMENT.parse(text)
    names = jinja2.meta.find_undeclared_variables(tree)
    # chance, and whatever might be: these are names that no values have
    names |= {type(node).__name__ for node in tree.find_all(nodes.Node) if not _is_plain(node)}
    inserted = [part for output in tree.find_all(nodes.Output) for part in output.nodes if _is_note(part)]
    is_inserted = len(inserted) == sum(map(_is_note, tree.find_all(nodes.Name)))
    return names - {"note"} if kind == "grade" and is_inserted else names


def _is_plain(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name not in ("random", "map")  # which may name the other
    return isinstance(node, _PLAIN) and not (isinstance(node, nodes.For) and node.recursive)


def _is_note(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "note"


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
