"""Ensembles: several models answer one request, and a vote makes one answer of theirs.

Some members failing is normal: the answers of the others count, and `composition` says who failed and how. The members'
calls are rows of their own, so the cost of an answer is their sum and its latency the time that passed. A member that
is no longer needed is cancelled and waited for: no call outlives the request that it was made for.

A model that is listed more than once is asked for as many samples: each with a seed and a number of its own.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, ClassVar

from pgharness.errors import (
    CodeFailed,
    InsufficientResponses,
    InvalidOutput,
    ModelError,
    NoConsensus,
    RequestRejected,
    TimedOut,
)
from pgharness.gateway import voting
from pgharness.gateway.callables import PythonCallable, storable
from pgharness.gateway.calls import Member, below, model_error, used_tokens
from pgharness.gateway.ensemble_options import AVERAGES, EnsembleParameters, is_reference
from pgharness.gateway.parameters import read_parameters
from pgharness.gateway.replies import json_of
from pgharness.gateway.voting import Ballot, Decision
from pgharness.types import Completion, ModelSpec, Request, Usage

_SHORT = 200
_NUMBERS = 1_000  # more than hedges below a member ever need to tell their requests apart


@dataclass(slots=True, eq=False)
class _Poll:
    """What came of one request so far; answers and failures by the member's place."""

    request: Request
    ballots: list[Ballot] = field(default_factory=list)
    answers: dict[int, Completion] = field(default_factory=dict)
    failures: dict[int, ModelError] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)  # whose confidence is not known
    used: tuple[int, int, int] = (0, 0, 0)

    @property
    def unanswered(self) -> list[int]:
        """Whom it asked and did not wait for."""
        return [place for place in self.asked if place not in self.answers and place not in self.failures]

    def use(self, reply: Completion | ModelError) -> None:
        """Count what a reply used."""
        (read, written, cached), more = self.used, used_tokens(reply)
        self.used = read + more[0], written + more[1], cached + more[2]


class Ensemble:
    """Answer with what the members' answers come to, as EnsembleParameters say.

    A function as `vote` or `normalise` runs only where `allows_code` says so.
    """

    def __init__(self, spec: ModelSpec, members: Sequence[Member], *, allows_code: bool = False) -> None:
        options = read_parameters(spec, EnsembleParameters)
        names = [member if isinstance(member, str) else member.model for member in options.members]
        if names != [member.spec.name for member in members]:
            raise RequestRejected(
                f"ensemble '{spec.name}' names the members {', '.join(names)}, and was made with others",
                hint="A combination cannot exchange members: insert another ensemble.",
            )
        self._spec = spec
        self._options = options
        self._members = members
        self._names = names
        self._weights = [1.0 if isinstance(member, str) else member.weight for member in options.members]
        self._samples = [names[:place].count(name) for place, name in enumerate(names)]
        self._asked, self._needed, self._needed_consensus = options.asked, options.needed, options.needed_consensus
        self._step = _NUMBERS ** _ensembles_in(spec)
        self._arbiter = len(names) - 1 if options.below == "escalate" else None
        self._vote = self._function(options.vote, allows_code)
        self._normalise = self._function(options.normalise, allows_code)

    def _function(self, option: str, allows_code: bool) -> _Function | None:
        if not is_reference(option):
            return None
        if not allows_code:
            raise RequestRejected(
                f"ensemble '{self._spec.name}' runs code ({option}), which this worker does not allow",
                hint="Start workers with --allow-code if you trust everyone who may insert models, "
                "then select pgharness.retry_failed(run_id => ...);",
            )
        return _Function(self._spec, option)

    async def __call__(self, request: Request) -> Completion:
        """Return what the members' answers come to.

        Raises InsufficientResponses when too few answered, NoConsensus when they agree too little.
        """
        poll = _Poll(request)
        match self._options.strategy:
            case "parallel":
                await self._ask_all(poll)
            case "sequential":
                await self._ask_in_turn(poll, self._is_agreed)
            case "cascade":
                await self._ask_in_turn(poll, self._is_confident)
            case "hedged":
                await self._ask_with_backups(poll)
        self._estimate_cancelled(poll)
        decision = await self._decide(poll)
        short_of = self._short_of(poll, decision)
        if decision is not None and (short_of is None or self._options.below == "answer"):
            return self._completion(poll, decision, short_of)
        assert short_of is not None
        if self._arbiter is not None:
            await self._ask(poll, self._arbiter)
            if self._arbiter in poll.answers:
                return self._escalated(poll, decision, short_of)
        raise self._error(poll, decision, short_of)

    # -- asking

    async def _ask(self, poll: _Poll, place: int) -> None:
        """Ask one member: its answer becomes a ballot, and whatever goes wrong a failure."""
        poll.asked.append(place)
        try:
            completion = await self._answer(poll.request, place)
            if not completion.is_cached:
                poll.use(completion)
            await self._take(poll, place, completion)
        except Exception as exc:
            error = poll.failures[place] = model_error(exc)
            poll.use(error)

    async def _answer(self, request: Request, place: int) -> Completion:
        member, seconds = self._members[place], self._options.timeout_seconds
        if sample := self._samples[place]:
            seed = request.seed
            if seed is not None:
                seed = int.from_bytes(blake2b(f"{seed}/{sample}".encode(), digest_size=4).digest(), "big") >> 1
            request = replace(request, seed=seed, number=request.number + sample * self._step)
        if seconds is None:
            return await member(request)
        try:
            async with asyncio.timeout(seconds):
                return await member(request)
        except TimeoutError:
            raise TimedOut(f"{member.spec.name} gave no answer within the ensemble's {seconds:g} s") from None

    async def _take(self, poll: _Poll, place: int, completion: Completion) -> None:
        """Count an answer, or raise InvalidOutput for one that cannot vote."""
        options, schema = self._options, poll.request.schema
        if schema is not None and (problem := voting.misfit(completion.data, schema)):
            raise self._unusable(place, completion, problem)
        value = completion.text if completion.data is None else completion.data
        confidence: float | None = 1.0
        if options.confidence != "none":
            completion, value = self._stated(completion, value)
            confidence = completion.confidence
        known = options.default_confidence if confidence is None else confidence
        if place != self._arbiter:
            label, value = await self._label(place, completion, value)
            if options.strategy == "hedged" and self._count(poll) >= self._needed:
                return  # another one came first, if by a moment
            poll.ballots.append(Ballot(place, label, self._weights[place], known, value))
        if confidence is None:
            poll.unsure.append(place)
        poll.answers[place] = completion

    def _stated(self, completion: Completion, value: Any) -> tuple[Completion, Any]:
        """Return an answer with the confidence that counts, and what of it is voted on: not its confidence."""
        known = completion.confidence
        if self._options.confidence == "stated":
            known, text = voting.stated_confidence(completion.text, completion.data)
            if completion.data is None:
                completion = replace(completion, text=text)
                value = text
            elif isinstance(value, dict) and self._options.field is None and self._options.vote not in AVERAGES:
                value = {name: inner for name, inner in value.items() if name != "confidence"}
        if known is not None and not 0 <= known <= 1:
            known = None
        return replace(completion, confidence=known), value

    async def _label(self, place: int, completion: Completion, value: Any) -> tuple[str, Any]:
        """Return what an answer is voted on by, and the value that a mean is made of."""
        options = self._options
        if options.field is not None:
            try:
                value = json_of(value) if isinstance(value, str) else value
                for name in options.field.split("."):
                    value = value[name]
            except (ValueError, TypeError, KeyError):
                raise self._unusable(place, completion, f"the answer has no field {options.field!r}") from None
        if options.vote in AVERAGES:
            if (measured := voting.measured(value, options.normalise)) is None:
                raise self._unusable(place, completion, "the answer has no number")
            return measured
        normalise = options.normalise
        if self._normalise is not None:
            value, normalise = await self._normalise.of(copy.deepcopy(value)), "none"
        label = None if value is None else voting.label_of(value, normalise)
        if label is None:
            raise self._unusable(place, completion, f"the answer holds nothing to vote on ({options.normalise})")
        return label, value

    def _unusable(self, place: int, completion: Completion, problem: str) -> InvalidOutput:
        return InvalidOutput(f"{self._names[place]}: {problem}", text=completion.text)

    # -- strategies

    async def _ask_all(self, poll: _Poll) -> None:
        """Ask all members at once; where asked to, cancel those that can no longer change anything."""
        if self._asked == 1:
            return await self._ask(poll, 0)
        async with asyncio.TaskGroup() as group:
            if self._options.stops_early:
                tasks = [group.create_task(self._ask(poll, place)) for place in range(self._asked)]
                for task in tasks:
                    task.add_done_callback(lambda _: self._stop_if_settled(poll, tasks))
            else:
                for place in range(1, self._asked):
                    group.create_task(self._ask(poll, place))
                await self._ask(poll, 0)
        return None

    def _stop_if_settled(self, poll: _Poll, tasks: Sequence[asyncio.Task[None]]) -> None:
        options = self._options
        waiting = [place for place, task in enumerate(tasks) if not task.done()]
        if not waiting or len(poll.ballots) < self._needed:
            return
        decision = voting.elect(poll.ballots, options.vote)
        left, answers_below = self._worth(waiting), options.below == "answer"
        if voting.is_settled(decision, left, min_consensus=self._needed_consensus, answers_below=answers_below):
            for place in waiting:
                tasks[place].cancel()

    def _worth(self, places: Sequence[int]) -> float:
        """Return what the ballots of some members are worth together, at most."""
        return math.fsum([self._weights[place] if self._options.vote == "weighted" else 1.0 for place in places])

    def _count(self, poll: _Poll) -> int:
        """Return how many answers count: of a mean those of the commonest shape."""
        if self._options.vote in AVERAGES:
            return max(Counter([ballot.label for ballot in poll.ballots]).values(), default=0)
        return len(poll.ballots)

    async def _ask_in_turn(self, poll: _Poll, is_enough: Callable[[_Poll], Awaitable[bool]]) -> None:
        """Ask one member after the other until that is enough, or too few are left to be enough."""
        needed, asked = self._needed, self._asked
        for place in range(asked):
            if self._count(poll) + asked - place < needed and self._options.below != "answer":
                return
            await self._ask(poll, place)
            if place in poll.answers and self._count(poll) >= needed and await is_enough(poll):
                return

    async def _is_agreed(self, poll: _Poll) -> bool:
        decision = await self._decide(poll)
        enough = max(self._options.enough_consensus, self._needed_consensus)
        return decision is not None and decision.consensus >= enough - 1e-9

    async def _is_confident(self, poll: _Poll) -> bool:
        return any(ballot.confidence >= self._options.confident_at for ballot in poll.ballots)

    async def _ask_with_backups(self, poll: _Poll) -> None:
        """Ask the first member, and the next one whenever the delay has passed or all asked before have failed."""
        asked, delay = self._asked, self._options.hedge_delay_seconds
        if asked == 1:
            return await self._ask(poll, 0)
        clock = asyncio.get_running_loop().time
        async with asyncio.TaskGroup() as group:
            running: set[asyncio.Task[None]] = set()
            place, due = 0, clock()
            while self._count(poll) < self._needed and (running or place < asked):
                if place < asked and (not running or clock() >= due):
                    running.add(group.create_task(self._ask(poll, place)))
                    place, due = place + 1, clock() + delay
                    continue
                patience = due - clock() if place < asked else None
                _, running = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            for task in running:
                task.cancel()
        return None

    def _estimate_cancelled(self, poll: _Poll) -> None:
        """Complete the rows of members that were cancelled: their providers bill them all the same.

        They are taken to have read the whole question, and to have written like the members that answered: as fast, and
        at most as much.
        """
        trail = poll.request.trail
        if trail is None or not any(row["outcome"] == "cancelled" for row in trail.calls):
            return
        specs = {spec.id: spec for spec in self._spec.leaves()}
        rows = [row for row in below(trail.calls, {"started_at": trail.parent_started_at}) if row["model_id"] in specs]
        answered = [row for row in rows if row["outcome"] == "succeeded"]
        written = math.fsum([row["output_tokens"] for row in answered])
        per_ms = written / (math.fsum([row["latency_ms"] for row in answered]) or 1.0)
        read = sum([len(message.content) for message in poll.request.messages]) // 4
        for row in rows:
            if row["outcome"] == "cancelled" and not row.get("is_estimated"):
                tokens = read, round(min(per_ms * row["latency_ms"], written / max(len(answered), 1)))
                cost = specs[row["model_id"]].price(*tokens)
                row.update(input_tokens=tokens[0], output_tokens=tokens[1], cost_usd=cost, is_estimated=True)

    # -- deciding

    async def _decide(self, poll: _Poll) -> Decision | None:
        """Return what the ballots come to, or None where there is none."""
        if not poll.ballots:
            return None
        if self._options.vote in AVERAGES:
            return voting.average(poll.ballots, self._options.vote, poll.request.schema)
        if self._vote is None:
            left = self._worth(poll.unanswered) if self._options.stops_early else 0.0
            return voting.elect(poll.ballots, self._options.vote, left)
        ballots = sorted(poll.ballots, key=lambda ballot: ballot.place)
        return _decision(ballots, await self._vote.of([self._response(poll, ballot) for ballot in ballots]))

    def _response(self, poll: _Poll, ballot: Ballot) -> dict[str, Any]:
        """Return an answer as a function that votes sees it."""
        completion = poll.answers[ballot.place]
        return {
            "member": self._names[ballot.place],
            "text": completion.text,
            "data": copy.deepcopy(completion.data),
            "confidence": completion.confidence,
            "weight": ballot.weight,
            "label": ballot.label,
        }

    def _short_of(self, poll: _Poll, decision: Decision | None) -> str | None:
        """Return which option a vote falls short of; an answer that a mean is not made of is a failure."""
        if decision is not None and decision.deviations:
            for ballot in poll.ballots:
                if ballot.place not in decision.deviations:
                    answer = poll.answers.pop(ballot.place)
                    problem = "the answer has another shape than most"
                    poll.failures[ballot.place] = self._unusable(ballot.place, answer, problem)
            poll.ballots = [ballot for ballot in poll.ballots if ballot.place in decision.deviations]
        if decision is None or len(poll.ballots) < self._needed:
            return "min_responses"
        return "min_consensus" if decision.consensus < self._needed_consensus - 1e-9 else None

    # -- results

    def _completion(self, poll: _Poll, decision: Decision, short_of: str | None) -> Completion:
        winner = poll.answers[decision.winner.place]
        text, data = winner.text, winner.data
        if decision.deviations:
            text = json.dumps(decision.result, ensure_ascii=False)
            data = None if data is None else decision.result
        return Completion(
            text=text,
            data=data,
            usage=Usage(*poll.used),
            finish_reason=winner.finish_reason,
            model=self._names[decision.winner.place],
            confidence=decision.consensus,
            composition=self._composition(poll, decision, short_of),
        )

    def _escalated(self, poll: _Poll, decision: Decision | None, short_of: str) -> Completion:
        answer = poll.answers[len(self._names) - 1]
        return Completion(
            text=answer.text,
            data=answer.data,
            usage=Usage(*poll.used),
            finish_reason=answer.finish_reason,
            model=self._names[-1],
            confidence=answer.confidence,
            composition=self._composition(poll, decision, short_of) | {"winner": self._names[-1], "is_escalated": True},
        )

    def _composition(self, poll: _Poll, decision: Decision | None, short_of: str | None) -> dict[str, Any]:
        """Return how the answer came about, as the JSON that is kept with the call."""
        names = self._names
        told: dict[str, Any] = {"strategy": self._options.strategy, "vote": self._options.vote}
        told["responses"] = len(poll.ballots)
        if decision is not None:
            told["winner"] = names[decision.winner.place]
            told["consensus"] = round(decision.consensus, 6)
            told["tie"] = bool(decision.tied)
            if decision.tied:
                told["tied"] = [_short(label) for label in decision.tied]
            if decision.deviations:
                told["deviations"] = [
                    {"member": names[place], "deviation": round(value, 6)}
                    for place, value in decision.deviations.items()
                ]
            else:
                told["votes"] = {_short(label): round(count, 6) for label, count in decision.votes.items()}
        told["failures"] = [
            {"member": names[place], "outcome": error.outcome, "error": _short(str(error))}
            for place, error in sorted(poll.failures.items())
        ]
        if stopped := poll.unanswered:
            told["cancelled"] = [names[place] for place in stopped]
        if poll.unsure:
            told["without_confidence"] = [names[place] for place in sorted(poll.unsure)]
        if short_of is not None:
            told["below"] = short_of
        return told

    def _error(self, poll: _Poll, decision: Decision | None, short_of: str) -> ModelError:
        """Return the failure of a vote that fell short.

        It spends no attempt where nothing but delays stood in the way, and asks to wait for the longest of them.
        """
        failures = poll.failures
        facts: dict[str, Any] = dict(zip(Usage.__slots__, poll.used, strict=True))
        facts["composition"] = self._composition(poll, decision, short_of)
        error: ModelError
        if short_of == "min_consensus":
            assert decision is not None
            error = NoConsensus(
                f"{self._spec.name}: the members agree too little: a consensus of {self._needed_consensus:.3g} is "
                f"needed, and it is {decision.consensus:.3g}",
                text=poll.answers[decision.winner.place].text,
                hint='Lower min_consensus, or set below: "answer" gives the leading answer, "escalate" asks another.',
                **facts,
            )
            reasons = [failure for place, failure in failures.items() if place == self._arbiter]
        else:
            reasons = [failure for _, failure in sorted(failures.items())]
            told = "; ".join(f"{failure.outcome}: {_short(str(failure))}" for failure in reasons)
            error = InsufficientResponses(
                f"{self._spec.name}: {self._needed} of {self._asked} members have to give a usable answer, and "
                f"{len(poll.ballots)} did ({told})",
                text=reasons[0].text if reasons else None,
                **facts,
            )
            hopeless = sum(not failure.is_retryable for place, failure in failures.items() if place != self._arbiter)
            error.is_retryable = self._asked - hopeless >= self._needed or any(
                failure.is_retryable for place, failure in failures.items() if place == self._arbiter
            )
        if reasons and not any(failure.spends_attempt for failure in reasons):
            error.spends_attempt = False
            error.retry_after = max([failure.retry_after or 0.0 for failure in reasons]) or None
        return error


class _Function(PythonCallable):
    """A function of the user's that votes or normalises; it has the time of the ensemble's `timeout_seconds`."""

    _given: ClassVar[str] = "one argument"

    def __init__(self, spec: ModelSpec, reference: str) -> None:
        super().__init__(spec.model_copy(update={"model": reference, "parameters": {}}))

    async def of(self, argument: Any) -> Any:
        """Return what the function makes of an argument."""
        return (await self(Request(messages=(), item={"argument": argument}))).data

    def _arguments(self, request: Request) -> tuple[Any, ...]:
        return (request.item["argument"],)

    def _completion(self, answer: object, *, wants_json: bool) -> Completion:
        return Completion(text="", data=answer)


def _decision(ballots: Sequence[Ballot], answer: Any) -> Decision:
    """Return the decision that a function came to: the index of a ballot, or {"index", "consensus"}."""
    index, consensus = (answer.get("index"), answer.get("consensus")) if isinstance(answer, dict) else (answer, None)
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(ballots):
        counted = voting.elect(ballots, "majority").votes
        share = counted[ballots[index].label] / len(ballots) if consensus is None else consensus
        if isinstance(share, int | float) and 0 <= share <= 1:
            return Decision(ballots[index], float(share), counted)
    raise CodeFailed(
        f"the function voted {answer!r:.200} on {len(ballots)} answers",
        hint='Return the index of the answer that wins, or {"index": 0, "consensus": 0.8}.',
    )


def _ensembles_in(spec: ModelSpec) -> int:
    """Return how many ensembles deep a model is."""
    return (spec.provider == "ensemble") + max(map(_ensembles_in, spec.members), default=0)


def _short(text: str) -> str:
    """Return a text that can be stored, of no more than 200 characters; one that is cut ends in a digest of it."""
    text = storable(text)
    if len(text) <= _SHORT:
        return text
    return f"{text[: _SHORT - 10]}… {blake2b(text.encode(), digest_size=4).hexdigest()}"
