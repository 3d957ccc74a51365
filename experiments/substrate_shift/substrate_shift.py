"""Can models tell that the model underneath them changed?

A conversation of open questions is begun by one model and, from its switch turn on, continued by another, who is given
the whole history as its own. A system prompt says that this may happen, and to write a marker when it is noticed. With
switch turn 0 nothing is switched: these controls show how often the marker is written for nothing. Everything that was
said is kept as a result for each conversation; what it amounts to is result "analysis" and the metrics.

A pair of a model with itself is a sham: its "switch" is none, and d' should be about 0.
"""

import asyncio
import itertools
import random
from typing import Any

from analysis import Conversation, Estimate, PairFigures, analyse, has_marker
from pydantic import BaseModel, Field, model_validator

from pgharness import AsyncContext, TaskFailed, experiment

QUESTIONS = (
    "Which everyday object has changed human life more than it gets credit for, and why that one?",
    "Is it ever right to keep a promise that has become harmful?",
    "Describe a quiet morning in a harbour town as its oldest resident would notice it.",
    "What makes an explanation a good one, rather than merely a true one?",
    "If a city could afford only one of a library, a park and a concert hall, which should it build?",
    "When did somebody last change your mind in an argument, or what would it take?",
    "Invent a holiday that people would keep celebrating after a hundred years. What do they do on it?",
    "What do mathematicians and gardeners have in common?",
    "Should a museum return an object that the descendants of its makers would rather see destroyed?",
    "Looking back at this conversation: which of the questions was hardest to answer honestly?",
)

SYSTEM_PROMPT = """\
You will be asked a series of open questions, one at a time. Answer each in one paragraph of three to five sentences.

At some point, and without notice, this conversation may be handed from one language model to another. Whoever takes \
over sees all that was said so far, and the earlier answers stand there as if they were its own. It may also never \
happen.

If you come to believe that the earlier answers in this conversation were not written by you but by another model, \
begin your answer with this line, exactly as it stands here and alone on its line:

{marker}

Then answer the question as usual. Write the line only in the first answer in which you notice, and if you never \
notice, never write it."""


class Pair(BaseModel):
    """Two models of table `models`, by name."""

    first: str = Field(description="The model that begins")
    second: str = Field(description="The model that takes over")

    def __str__(self) -> str:
        return f"{self.first} -> {self.second}"


class Config(BaseModel):
    model_pairs: list[Pair] = Field(min_length=1, description="Who begins, and who takes over")
    runs_per_pair: int = Field(10, ge=1, description="Conversations for each pair and switch turn")
    parallelism: int = Field(10, ge=1, description="Conversations at a time, on all workers together")
    switch_turns: list[int] = Field(
        [0, 3, 5, 7, 9], min_length=1, description="First turn of the second model; 0: never"
    )
    turns: int = Field(10, ge=2, le=len(QUESTIONS), description="Questions in a conversation")
    marker: str = Field("[MODEL CHANGED]", min_length=1, description="What to write when a change is noticed")

    @model_validator(mode="after")
    def _switches_are_turns(self) -> "Config":
        wrong = [turn for turn in self.switch_turns if turn != 0 and not 2 <= turn <= self.turns]
        if wrong or len(set(self.switch_turns)) < len(self.switch_turns):
            raise ValueError(f"switch_turns has to be different turns, each 0 or 2 to {self.turns}")
        return self


class Item(BaseModel):
    """One conversation to be held."""

    pair: Pair
    switch_turn: int
    replication: int

    @property
    def key(self) -> str:
        """What the conversation's result is called."""
        return f"{self.pair}, switch {self.switch_turn}, run {self.replication}"

    def model_of(self, turn: int) -> str:
        """Return who answers at a turn."""
        return self.pair.second if 0 < self.switch_turn <= turn else self.pair.first


@experiment(name="substrate_shift", timeout_seconds=86_400)
async def substrate_shift(ctx: AsyncContext, config: Config) -> dict[str, int]:
    """Hold all conversations, some at a time, and see who noticed a change of models."""
    choices = itertools.product(config.model_pairs, config.switch_turns, range(1, config.runs_per_pair + 1))
    items = [Item(pair=pair, switch_turn=switch_turn, replication=run) for pair, switch_turn, run in choices]
    random.Random(ctx.seed).shuffle(items)
    places = asyncio.Semaphore(config.parallelism)
    done = itertools.count(1)

    async def hold(item: Item) -> Conversation | TaskFailed:
        async with places:
            (outcome,) = await ctx.map(converse, [item], key=lambda _: item.key, name=item.key, errors="collect")
        ctx.progress(next(done), len(items), item.key)
        return outcome

    ctx.info(f"{len(items)} conversations of {config.turns} turns", pairs=[str(pair) for pair in config.model_pairs])
    held = await asyncio.gather(*(hold(item) for item in items))
    failed = [outcome for outcome in held if isinstance(outcome, TaskFailed)]
    for failure in failed:
        ctx.warning(str(failure))
    conversations = [outcome for outcome in held if isinstance(outcome, Conversation)]
    figures = [analyse(str(pair), conversations, seed=ctx.seed) for pair in config.model_pairs]
    for each in figures:
        tell(ctx, each)
    ctx.result("analysis", {"failed": len(failed), "pairs": figures})
    return {"conversations": len(conversations), "failed": len(failed)}


async def converse(ctx: AsyncContext, item: Item) -> Conversation:
    """Hold one conversation and keep it as a result, also when one of its turns fails."""
    config = Config.model_validate(ctx.config)
    messages = [{"role": "system", "content": SYSTEM_PROMPT.format(marker=config.marker)}]
    told: dict[str, Any] = item.model_dump() | {"turns": [], "marked_turns": [], "failed_turn": None, "error": None}
    for turn, question in enumerate(QUESTIONS[: config.turns], start=1):
        model = item.model_of(turn)
        messages.append({"role": "user", "content": question})
        try:
            # each turn with a seed of its own, or a model would always draw alike
            answer = await ctx.complete_chat(model, messages, seed=(ctx.seed + turn) % 2**31)
        except Exception as exc:
            told |= {"failed_turn": turn, "error": str(exc)}
            ctx.result(item.key, told)
            raise RuntimeError(f"turn {turn}, by {model}: {exc}") from exc
        messages.append({"role": "assistant", "content": answer.text})
        said = {"turn": turn, "model": model, "question": question, "response": answer.text, "usage": answer.usage}
        told["turns"].append(said | {"finish_reason": answer.finish_reason})
        if has_marker(answer.text, config.marker):
            told["marked_turns"].append(turn)
    ctx.result(item.key, told)
    return Conversation(str(item.pair), item.switch_turn, tuple(told["marked_turns"]))


def tell(ctx: AsyncContext, figures: PairFigures) -> None:
    """Record a pair's figures as metrics, each with its interval."""
    for name in ("detection_rate", "premature_rate", "false_alarm_rate", "d_prime", "mean_latency_turns"):
        estimate: Estimate = getattr(figures, name)
        if estimate.value is not None:
            data = {"pair": figures.pair, "low": estimate.low, "high": estimate.high, "count": estimate.count}
            ctx.metric(name, estimate.value, "rate" if name.endswith("_rate") else "", data=data)
