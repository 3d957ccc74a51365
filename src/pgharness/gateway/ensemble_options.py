"""The options of an ensemble, as they stand in `models.parameters`; docs/ensembles.md explains them with examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

Strategy = Literal["parallel", "sequential", "hedged", "cascade"]
Vote = Literal["majority", "weighted", "best_confidence", "unanimous", "mean", "median"]
Normalisation = Literal["text", "number", "boolean", "json", "none"]
AVERAGES = ("mean", "median")
_OF_STRATEGY = {
    "enough_consensus": "sequential",
    "hedge_delay_seconds": "hedged",
    "confident_at": "cascade",
    "stops_early": "parallel",
}


class MemberParameters(BaseModel):
    """One member: the name of a model, and how much its answer counts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str = Field(description="name of the model")
    weight: float = Field(
        default=1.0, gt=0, le=1e6, description="how much its answer counts in a weighted vote or mean"
    )


class EnsembleParameters(BaseModel):
    """How an ensemble asks its members, and what it makes of their answers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    members: list[str | MemberParameters] = Field(
        min_length=1, max_length=100, description='models in order: names, or {"model": name, "weight": number}'
    )
    strategy: Strategy = Field(
        default="parallel",
        description="parallel asks all at once; sequential one after the other until enough of them agree; hedged the "
        "first, and the next one whenever no answer comes; cascade from cheap to dear until one is confident",
    )
    vote: str = Field(
        default="majority",
        description="majority, weighted, best_confidence (default of a cascade), unanimous, mean, median, or "
        "package.module:function",
    )
    normalise: str = Field(
        default="text",
        description="what makes answers equal: text (case and space do not count), number, boolean, json, none, or "
        "package.module:function",
    )
    field: str | None = Field(
        default=None, min_length=1, description="vote on this key of JSON answers alone; a.b for one within another"
    )
    confidence: Literal["none", "reported", "stated"] = Field(
        default="none",
        description="reported: from log-probabilities (of members with logprobs: true), by a function, or a member's "
        "own consensus; stated: the key confidence of JSON, or a last line such as confidence: 0.8",
    )
    default_confidence: float = Field(default=0.5, ge=0, le=1, description="of an answer whose confidence is not known")
    max_members: int | None = Field(default=None, ge=1, description="ask no more than so many, the first ones")
    min_responses: int | None = Field(
        default=None,
        ge=1,
        description="usable answers needed: by default half of the members (parallel), 2 (sequential) or 1",
    )
    min_consensus: float = Field(default=0.0, ge=0, le=1, description="consensus that is needed")
    below: Literal["fail", "answer", "escalate"] = Field(
        default="fail",
        description="with fewer answers or less consensus: fail; answer all the same, and say so; or escalate to the "
        "last member, which is asked only then and decides",
    )
    timeout_seconds: float | None = Field(
        default=None, gt=0, le=86_400, description="for each member's answer, its wait for limits included"
    )
    enough_consensus: float = Field(
        default=0.7, ge=0, le=1, description="sequential: ask no more members from this consensus on"
    )
    hedge_delay_seconds: float = Field(
        default=1.0, ge=0, le=86_400, description="hedged: ask the next one after so long without an answer"
    )
    confident_at: float = Field(
        default=0.9, ge=0, le=1, description="cascade: ask no more members after an answer this confident"
    )
    stops_early: bool = Field(
        default=False, description="parallel: cancel the members that can no longer change the outcome"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_cascade(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("strategy") == "cascade":
            return {"vote": "best_confidence", **values}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> EnsembleParameters:
        for problem in self._problems():
            raise ValueError(problem)
        return self

    def _problems(self) -> Iterator[str]:
        choices = {"vote": (self.vote, get_args(Vote)), "normalise": (self.normalise, get_args(Normalisation))}
        for name, (value, known) in choices.items():
            if value not in known and not is_reference(value):
                yield f"{name} is {value!r}; use {', '.join(known)} or package.module:function"
        for name, strategy in _OF_STRATEGY.items():
            if name in self.model_fields_set and self.strategy != strategy:
                yield f"{name} is for strategy {strategy}, and this one is {self.strategy}"
        is_sure = self.confidence != "none"
        if not is_sure and (self.vote == "best_confidence" or self.strategy == "cascade"):
            what = "vote best_confidence" if self.vote == "best_confidence" else "strategy cascade"
            yield f"{what} needs to know how confident answers are: set confidence to reported or stated"
        if not is_sure and self.vote == "weighted" and all(isinstance(member, str) for member in self.members):
            yield 'vote weighted needs weights ({"model": "a", "weight": 2}), or confidence as reported or stated'
        if self.stops_early and self.vote not in ("majority", "weighted", "unanimous"):
            yield f"stops_early does not know when a vote by {self.vote} is settled: use majority, weighted, unanimous"
        if self.vote == "unanimous" and "min_consensus" in self.model_fields_set:
            yield "vote unanimous needs a consensus of 1: leave min_consensus out, or use majority"
        if self.vote in AVERAGES and self.normalise not in ("text", "number", "json"):
            yield f"vote {self.vote} reads numbers by itself: leave normalise {self.normalise} out"
        if self.vote in AVERAGES and self.field is not None:
            yield f"vote {self.vote} is made of all numbers of JSON: leave field out"
        if self.below == "escalate" and len(self.members) < 2:
            yield "below escalate needs a member that votes, and a last one to escalate to"
        if self.min_responses is not None and self.min_responses > self.asked:
            yield f"min_responses is {self.min_responses}, and {self.asked} members are asked"

    @property
    def asked(self) -> int:
        """How many members vote, at most: without the one that is kept back to escalate to."""
        voters = len(self.members) - (self.below == "escalate")
        return min(voters, self.max_members or voters)

    @property
    def needed(self) -> int:
        """How many usable answers are needed."""
        if self.min_responses is not None:
            return self.min_responses
        return {"parallel": math.ceil(self.asked / 2), "sequential": min(2, self.asked)}.get(self.strategy, 1)

    @property
    def needed_consensus(self) -> float:
        """What consensus is needed."""
        return 1.0 if self.vote == "unanimous" else self.min_consensus


def is_reference(option: str) -> bool:
    """Tell whether an option names a function: package.module:function."""
    module, colon, name = option.partition(":")
    return bool(colon) and all(part.isidentifier() for part in f"{module}.{name}".split("."))
