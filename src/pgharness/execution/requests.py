"""What the model of an item is asked, made from the run's definition; what many items share is made once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, get_args

from pgharness.database import Row
from pgharness.errors import InvalidOutput
from pgharness.execution.items import Item
from pgharness.gateway.calls import facts_for, reads_items
from pgharness.grading import criteria_values, verdict_schema
from pgharness.prompts import Outline, Prompt, case_facts, prompt_of, text_of
from pgharness.types import ItemKind, Message, Request

_CACHED_INPUTS = 1_000


@dataclass(slots=True, eq=False)
class _Inputs:
    """A case, with the rubric of a grade, and what is made of them; kept here, so that no others get their identity."""

    case: Row
    rubric: Row | None
    criteria: list[Row]
    outline: Outline | None  # of the messages, unless they differ by more than the note
    values: Row  # if there is none: what templates see in all items of these inputs


class Requests:
    """Makes the requests of one run."""

    def __init__(self, definition: Row) -> None:
        self._definition = definition
        self._prompts: dict[ItemKind, Prompt] = {}
        self._inputs: OrderedDict[tuple[ItemKind, int, int], _Inputs] = OrderedDict()  # by identity
        self._facts = {name: definition[name] for name in ("config", "cycle_times", "software_version", "run")}
        self._seeds = {
            kind: blake2b(f"{definition['seed']}/{kind}/".encode(), digest_size=4) for kind in get_args(ItemKind)
        }

    def of(self, item: Item) -> Request:
        """Return what to ask for an item. Raises ModelError for a prompt that cannot be used."""
        if item.spec.provider == "metric":
            given = {"output": item.note, "target": item.case.get("target")}
            return Request(messages=(), seed=self._seed(item), attempt=item.tries + 1, item=given)
        prompt = self._prompt(item.kind)
        inputs = self._inputs_of(item, prompt)
        question = messages = self._messages(item, prompt, inputs)
        if item.cause == InvalidOutput.outcome and item.answer:
            messages += (
                Message("assistant", item.answer),
                Message(
                    "user",
                    f"This answer cannot be used: {item.error}. Answer again, in full and in the form asked for.",
                ),
            )
        return Request(
            messages=messages,
            schema=verdict_schema(len(inputs.criteria)) if item.kind == "grade" else None,
            schema_name="verdicts",
            is_reasoning=item.spec.is_reasoning,
            seed=self._seed(item),
            attempt=item.tries + 1,
            item=self._item_facts(item, inputs) if reads_items(item.spec) else {},
            replication=item.replication,
            run_seed=self._definition["seed"],
            note_replication=item.note_replication,
            question=None if messages is question else question,
            rejected=item.tries if item.cause == InvalidOutput.outcome else 0,
        )

    def _prompt(self, kind: ItemKind) -> Prompt:
        if kind not in self._prompts:
            prompts = self._definition["prompts"]
            self._prompts[kind] = prompt_of(kind, prompts[f"{kind}_system"], prompts[kind])
        return self._prompts[kind]

    def _inputs_of(self, item: Item, prompt: Prompt) -> _Inputs:
        key = (item.kind, id(item.case), id(item.rubric))
        inputs = self._inputs.get(key)
        if inputs is None:
            criteria: list[Row] = []
            values = {**case_facts(item.case), "config": self._definition["config"]}
            if item.kind == "grade":
                criteria = criteria_values(item.rubric)
                values |= {"criteria": criteria, "rubric_author": (item.rubric or {}).get("author")}
            outline = prompt.outline(values)
            inputs = _Inputs(item.case, item.rubric, criteria, outline, values if outline is None else {})
            self._inputs[key] = inputs
            if len(self._inputs) > _CACHED_INPUTS:
                self._inputs.popitem(last=False)
        return inputs

    def forget(self) -> None:
        """Give back the memory of what was made for items; for a run that has none here now."""
        self._inputs.clear()

    def _messages(self, item: Item, prompt: Prompt, inputs: _Inputs) -> tuple[Message, ...]:
        note = text_of(item.note) if item.kind == "grade" else ""
        if inputs.outline is not None:
            return inputs.outline.messages(note)
        values = {**inputs.values, "overlap": item.overlap, "replication": item.replication}
        if item.kind == "grade":
            values["note"] = note
        return prompt.render(values)

    def _item_facts(self, item: Item, inputs: _Inputs) -> Mapping[str, Any]:
        facts = {"case": item.case, "overlap": item.overlap, "replication": item.replication, **self._facts}
        if item.kind == "grade":
            facts |= {"note": item.note, "rubric": {"criteria": inputs.criteria}}
        return facts_for(item.spec, facts)

    def _seed(self, item: Item) -> int:
        """Return an item's own seed (31 bits, which every provider takes), from the run's."""
        digest = self._seeds[item.kind].copy()
        digest.update(b"%d" % item.ordinal)
        return int.from_bytes(digest.digest(), "big") >> 1
