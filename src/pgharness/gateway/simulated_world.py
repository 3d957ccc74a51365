"""The world that simulated models answer in: what each is like, how long it takes, when it is down, and what it knows.

Models of one error group find the same cases hard: a one-factor Gaussian copula. A model's trouble with a case is a
standard normal number, part of it the group's draw for that case, the rest its own; an answer is right where the
trouble is below the quantile of the chance to be right. So that chance is what it is without a group, and only the
errors of models come together. A case is known by its name, so all models, runs and processes see the same hard cases.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import random
import struct
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import to_json

Clock = Callable[[], float]

NORMAL = NormalDist()
_UNIT = 2.0**-64
_SURE = 1e-9  # nothing that is stated is surer
_NOTE_SPREAD = 0.12  # of the share of its facts that a note repeats


def draws(seed: int, count: int) -> list[float]:
    """Return numbers between 0 and 1, the same for the same seed: much cheaper than to begin a random.Random anew.

    More of them begin with the same ones.
    """
    digest = hashlib.shake_128(seed.to_bytes(8)).digest(4 * count)
    return [(number + 0.5) * 2.0**-32 for number in struct.unpack(f"<{count}I", digest)]


def normal(draw: int) -> float:
    """Return the standard normal number of a draw of 64 bits."""
    return NORMAL.inv_cdf((draw + 0.5) * _UNIT * (1 - 1e-12))


# ---- parameters ------------------------------------------------------------------------------------------------------


class LatencyPart(BaseModel):
    """One kind of call in a mixture: how common it is, and how long it takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    weight: float = Field(gt=0, description="how common it is, as a share of all weights")
    seconds: float = Field(ge=0, description="median time to an answer")
    spread: float = Field(default=0.3, ge=0, le=5, description="sigma of the lognormal; 0 is constant")


class Outage(BaseModel):
    """A stretch of time in which requests fare differently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    start_seconds: float = Field(ge=0, description="when it begins, after outage_epoch")
    seconds: float = Field(gt=0, description="how long it lasts")
    kind: Literal["error", "unavailable", "rate_limit", "hang", "slow"] = Field(
        description="status 500 after the usual time; 503 or 429 at once; no answer within the timeout; or slower"
    )
    factor: float = Field(default=10.0, ge=1, description="how many times slower; of kind slow")

    @property
    def fault(self) -> str | None:
        """Return the fault of every request that comes in it."""
        return {"error": "server_error", "rate_limit": "rate_limited", "slow": None}.get(self.kind, self.kind)


class SimulatorParameters(BaseModel):
    """What a simulated model is like: its speed, its faults and how good its answers are."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    latency_seconds: float = Field(
        default=0.05, ge=0, description="median time to an answer; 0 answers without a pause"
    )
    latency_spread: float = Field(default=0.3, ge=0, le=5, description="sigma of the lognormal latency; 0 is constant")
    latency_mixture: list[LatencyPart] = Field(
        default_factory=list,
        description="kinds of calls, each with weight, seconds and spread, in place of the two above",
    )
    latency_tail_rate: float = Field(default=0.0, ge=0, le=1, description="fraction of calls that are slow")
    latency_tail_factor: float = Field(default=10.0, ge=1, description="how many times longer those take")
    seconds_per_1k_input_tokens: float = Field(
        default=0.0, ge=0, description="how much 1000 tokens of the prompt add to the median"
    )
    seconds_per_1k_output_tokens: float = Field(
        default=0.0, ge=0, description="how much 1000 tokens of the answer add to the median"
    )
    error_rate: float = Field(default=0.0, ge=0, le=1, description="fraction of requests that fail like a status 500")
    rate_limit_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that fail like a status 429, at once")
    retry_after_seconds: float | None = Field(
        default=1.0, ge=0, description="what a 429 asks to wait; null says nothing"
    )
    timeout_rate: float = Field(
        default=0.0, ge=0, le=1, description="fraction that take longer than the model's timeout"
    )
    invalid_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that do not fit the schema asked for")
    refusal_rate: float = Field(default=0.0, ge=0, le=1, description="fraction that are refused")
    outages: list[Outage] = Field(
        default_factory=list, description="stretches with start_seconds, seconds, kind and factor; the first that fits"
    )
    outage_epoch: AwareDatetime | None = Field(
        default=None,
        strict=False,
        description="when their time begins, with time zone; null: at the process's first request to such a model",
    )
    requests_per_second_limit: float | None = Field(
        default=None, gt=0, description="requests a second of a process above which 429 is the answer"
    )
    concurrency_limit: int | None = Field(
        default=None, ge=1, description="requests at once of a process above which 429 is the answer"
    )
    quality: float = Field(default=0.8, ge=0, le=1, description="facts that a note repeats; targets that are answered")
    ability: float | None = Field(
        default=None, description="in place of quality, for cases with a difficulty; where they meet the chance is 0.5"
    )
    discrimination: float = Field(
        default=6.0, gt=0, description="how steeply the chance falls with difficulty: logistic(d * (ability - it))"
    )
    difficulty_key: str = Field(default="difficulty", description="key of a case's metadata with its difficulty")
    error_group: str | None = Field(default=None, min_length=1, description="models of one group err on the same cases")
    error_correlation: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="correlation of their trouble; share of cases with one tempting wrong answer",
    )
    confidence_insight: float = Field(
        default=0.5, ge=0, le=0.99, description="how much of its trouble a model knows when it states its confidence"
    )
    calibration_noise: float = Field(
        default=0.0, ge=0, le=10, description="standard deviation added to the log-odds of its stated confidence"
    )
    leniency: float = Field(default=0.0, ge=-1, le=1, description="how far a grader leans towards 0 (-1) or 100 (1)")
    noise: float = Field(default=8.0, ge=0, le=100, description="standard deviation of a grader's satisfaction")
    output_tokens: int = Field(default=300, ge=1, le=100_000, description="median length of a note")

    @model_validator(mode="after")
    def _rates_share_one_whole(self) -> SimulatorParameters:
        if sum(rate for _, rate in self.faults()) > 1 + 1e-9:
            raise ValueError(
                "error_rate, rate_limit_rate, timeout_rate, invalid_rate and refusal_rate exceed 1 together"
            )
        return self

    @model_validator(mode="after")
    def _correlation_is_with_a_group(self) -> SimulatorParameters:
        if self.error_group is None and "error_correlation" in self.model_fields_set:
            raise ValueError("error_correlation needs an error_group: the models that err together")
        return self

    def faults(self) -> tuple[tuple[str, float], ...]:
        """Return each fault with its probability, in the order in which a draw is compared with them."""
        return (
            ("rate_limited", self.rate_limit_rate),
            ("server_error", self.error_rate),
            ("timeout", self.timeout_rate),
            ("refused", self.refusal_rate),
            ("invalid", self.invalid_rate),
        )


# ---- time ------------------------------------------------------------------------------------------------------------


class Latency:
    """How long answers take: lognormal, a mixture, a tail, and more for more tokens."""

    def __init__(self, parameters: SimulatorParameters) -> None:
        mixture = parameters.latency_mixture
        self._parts = [(part.seconds, part.spread) for part in mixture]
        self._parts = self._parts or [(parameters.latency_seconds, parameters.latency_spread)]
        weights = list(itertools.accumulate(part.weight for part in mixture))
        self._bounds = [weight / weights[-1] for weight in weights[:-1]]  # between parts
        self._tail_rate = parameters.latency_tail_rate
        self._tail_factor = parameters.latency_tail_factor
        self._per_input = parameters.seconds_per_1k_input_tokens / 1000
        self._per_output = parameters.seconds_per_1k_output_tokens / 1000
        self.follows_output = self._per_output > 0
        self.is_none = not (any(seconds for seconds, _ in self._parts) or self._per_input or self._per_output)

    def seconds(self, draw: int, input_tokens: int, output_tokens: int) -> float:
        """Return the seconds of a draw of 64 bits."""
        kind, tail = draws(draw, 2) if self._bounds or self._tail_rate else (0.0, 1.0)
        seconds, spread = self._parts[bisect.bisect(self._bounds, kind)]
        seconds += self._per_input * input_tokens + self._per_output * output_tokens
        if spread:
            seconds *= math.exp(spread * normal(draw))
        return seconds * self._tail_factor if tail < self._tail_rate else seconds


class TrueLimit:
    """What a provider really carries, which it tells nobody: so many requests a second, and so many at once.

    What a second carries may come at once.
    """

    def __init__(self, per_second: float | None, at_once: int | None, clock: Clock) -> None:
        self._per_second = per_second
        self._at_once = at_once
        self._clock = clock
        self._most = max(1.0, per_second or 0.0)
        self._left = self._most
        self._filled_at: float | None = None
        self._in_use = 0

    def enter(self) -> bool:
        """Begin a request and return True, unless it is one too many."""
        if self._at_once is not None and self._in_use >= self._at_once:
            return False
        if self._per_second is not None:
            now = self._clock()
            since = 0.0 if self._filled_at is None else max(0.0, now - self._filled_at)
            self._left = min(self._most, self._left + since * self._per_second)
            self._filled_at = now
            if self._left < 1 - 1e-9:
                return False
            self._left -= 1
        self._in_use += 1
        return True

    def leave(self) -> None:
        """End a request that was begun."""
        self._in_use -= 1


class World:
    """What the simulated models of one process share: a clock, when its time began, and the limits of each model."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_at: float | None = None
        self._limits: dict[tuple[str, float | None, int | None], TrueLimit] = {}

    def outage(self, parameters: SimulatorParameters) -> Outage | None:
        """Return the outage that a model has now."""
        now = self._clock()
        if parameters.outage_epoch is not None:
            began_at = parameters.outage_epoch.timestamp()
        else:
            began_at = self._began_at = now if self._began_at is None else self._began_at
        for outage in parameters.outages:
            if outage.start_seconds <= now - began_at < outage.start_seconds + outage.seconds:
                return outage
        return None

    def limit(self, name: str, parameters: SimulatorParameters) -> TrueLimit | None:
        """Return the limit of a model, the same for all that simulate it here, or None."""
        terms = (parameters.requests_per_second_limit, parameters.concurrency_limit)
        if terms == (None, None):
            return None
        return self._limits.setdefault((name, *terms), TrueLimit(*terms, self._clock))


@functools.lru_cache(maxsize=16)
def world_of(clock: Clock) -> World:
    """Return the world of a clock: one for all models of a process, and another for each scripted clock."""
    return World(clock)


# ---- knowledge -------------------------------------------------------------------------------------------------------


class Belief(NamedTuple):
    """How an answer comes out: right or not, and how sure of it the model says that it is."""

    is_right: bool
    confidence: float


class Competence:
    """How well a model does with a case: its chance, its trouble, and what it knows of either."""

    def __init__(self, parameters: SimulatorParameters) -> None:
        self._parameters = parameters
        self._group = parameters.error_group
        self._correlation = parameters.error_correlation if self._group is not None else 0.0

    def chance(self, case: Mapping[str, Any]) -> float:
        """Return the chance that a case is answered rightly."""
        ability = self._parameters.ability
        difficulty = None if ability is None else _number((case.get("metadata") or {}), self._parameters.difficulty_key)
        if ability is None or difficulty is None:
            return self._parameters.quality
        return logistic(self._parameters.discrimination * (ability - difficulty))

    def belief(self, case: Mapping[str, Any], seed: int) -> Belief:
        """Return what becomes of an answer; stated confidences of 0.7 are right in 70% of cases, but for the noise.

        A model knows a part of its trouble, as a noisy signal, and states the chance to be right that follows from it.
        """
        draw, hint, error = draws(seed, 3)
        chance = self.chance(case)
        is_right = draw < chance
        trouble = NORMAL.inv_cdf(draw)
        if self._correlation:
            trouble = self._shared_trouble(case, trouble)
            is_right = chance > 0 and (chance >= 1 or trouble < NORMAL.inv_cdf(chance))
        known = self._parameters.confidence_insight
        bar = NORMAL.inv_cdf(min(max(chance, _SURE), 1 - _SURE))
        signal = math.sqrt(known) * trouble + math.sqrt(1 - known) * NORMAL.inv_cdf(hint)
        confidence = NORMAL.cdf((bar - math.sqrt(known) * signal) / math.sqrt(1 - known))
        if self._parameters.calibration_noise:
            confidence = min(max(confidence, _SURE), 1 - _SURE)
            odds = math.log(confidence / (1 - confidence))
            confidence = logistic(odds + self._parameters.calibration_noise * NORMAL.inv_cdf(error))
        return Belief(is_right, min(max(confidence, _SURE), 1 - _SURE))

    def told_share(self, case: Mapping[str, Any], draw: float) -> float:
        """Return the share of a case's facts that a note repeats."""
        ease = NORMAL.inv_cdf(draw)
        if self._correlation:
            ease = -self._shared_trouble(case, -ease)
        return self.chance(case) + _NOTE_SPREAD * ease

    def mistake(self, case: Mapping[str, Any], seed: int) -> random.Random:
        """Return what a wrong answer is drawn from: the same for a whole group, in cases that tempt it."""
        if self._correlation:
            _, temptation, shared_seed = self._shared(case)
            if (temptation + 0.5) * _UNIT < self._correlation:
                return random.Random(shared_seed)
        return random.Random(seed)

    def _shared_trouble(self, case: Mapping[str, Any], own: float) -> float:
        shared = normal(self._shared(case)[0])
        return math.sqrt(self._correlation) * shared + math.sqrt(1 - self._correlation) * own

    def _shared(self, case: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return what all models of the group draw for a case."""
        name = case.get("name")
        known_by = name.encode() if isinstance(name, str) and name else to_json(case.get("input"))
        digest = hashlib.blake2b(f"{self._group}\0".encode() + known_by, digest_size=24)
        trouble, temptation, seed = struct.unpack("<3Q", digest.digest())
        return trouble, temptation, seed


def logistic(odds: float) -> float:
    """Return the probability of log-odds."""
    if odds < 0:
        return math.exp(max(odds, -700.0)) / (1 + math.exp(max(odds, -700.0)))
    return 1 / (1 + math.exp(-odds))


def _number(facts: Mapping[str, Any], key: str) -> float | None:
    """Return the finite number under a key; a text that is one counts, for a CSV file has nothing else."""
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
