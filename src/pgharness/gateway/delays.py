"""Delays: how long a hedge waits for an answer before it asks again.

A policy sees a window of latencies of the model that is waited for, and nothing else: no clock, no network, and what it
draws at random comes from a seed. Requests that were given up when another answered first are in the window too, as
cut: their latency is only known to be longer. Without them the window would fill with the fast requests, and the delay
would shrink from day to day.

What learns from a window is in learned_delays.py, which needs numpy: it is imported for the hedges that learn, so that
commands, and workers without such hedges, start without it.
"""

from __future__ import annotations

from array import array
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

End = Literal["unneeded", "won", "lost", "failed"]

WINDOW = 1_000  # observations
FIELDS = 4  # numbers of each


class Size(NamedTuple):
    """What a request weighs, in tokens: its prompt, and the answer that is expected; 0 where that is not known."""

    prompt: float = 0.0
    answer: float = 0.0


class Observation(NamedTuple):
    """How long a request took; one that `is_cut` was given up then, and would have taken longer."""

    seconds: float
    is_cut: bool = False
    size: Size = Size()


class Window:
    """The latest observations of one model; `count` is how many there ever were."""

    def __init__(self, size: int = WINDOW) -> None:
        self._numbers = array("d", bytes(FIELDS * 8 * size))
        self._size = size
        self.count = 0

    def __len__(self) -> int:
        return min(self.count, self._size)

    def add(self, observation: Observation) -> None:
        numbers, place = self._numbers, self.count % self._size * FIELDS
        seconds, is_cut, (numbers[place + 2], numbers[place + 3]) = observation
        numbers[place], numbers[place + 1] = seconds, is_cut
        self.count += 1

    def numbers(self) -> memoryview:
        """Return, for each observation in no particular order: seconds, 1 if it is cut, prompt and answer tokens."""
        return memoryview(self._numbers)[: FIELDS * len(self)]


# -- policies


class Delay(Protocol):
    """How long to wait for a request before another is made."""

    def seconds(self, size: Size) -> float | None:
        """Return the delay for a request of a size; infinity for never, None while too little is known."""

    def learn(self, end: End) -> None:
        """Take note of how a request ended: answered before the delay (`unneeded`), or hedged, and won by the new
        request, lost by it, or failed altogether."""


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FixedOptions(_Options):
    """Wait for a fixed time."""

    strategy: Literal["fixed"]
    seconds: float = Field(ge=0, description="the delay")


class PercentileOptions(_Options):
    """Wait for as long as most requests take."""

    strategy: Literal["percentile"]
    percentile: float = Field(
        default=95.0, ge=50, lt=100, description="the percentile of the model's latency that is the delay"
    )
    initial_seconds: float | None = Field(
        default=None, ge=0, description="the delay while fewer than 20 latencies are known; null: no hedging until then"
    )


class AdaptiveOptions(_Options):
    """Find the delay that trades latency against extra requests best."""

    strategy: Literal["adaptive"]
    extra_request_seconds: float | None = Field(
        default=None,
        ge=0,
        description="the price of an extra request: how many seconds of waiting one is worth; null: the median latency",
    )
    candidates: list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        min_length=1,
        max_length=200,
        description="the delays to choose among; null: percentiles, and never",
    )
    initial_seconds: float | None = Field(default=None, ge=0, description="as of percentile")


class WorkloadOptions(_Options):
    """Wait for as long as most requests of such a size take."""

    strategy: Literal["workload"]
    percentile: float = Field(
        default=95.0, ge=50, lt=100, description="the percentile of the latency, given the request, that is the delay"
    )
    initial_seconds: float | None = Field(default=None, ge=0, description="as of percentile")


class ExponentialOptions(_Options):
    """Wait less after each request that went well, longer after each that did not."""

    strategy: Literal["exponential"]
    initial_seconds: float = Field(default=0.1, gt=0, description="the first delay")
    min_seconds: float = Field(default=0.01, gt=0, description="the shortest delay")
    max_seconds: float = Field(default=5.0, gt=0, description="the longest delay")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> ExponentialOptions:
        if self.min_seconds > self.max_seconds:
            raise ValueError("min_seconds is above max_seconds")
        return self


DelayOptions = Annotated[
    FixedOptions | PercentileOptions | AdaptiveOptions | WorkloadOptions | ExponentialOptions,
    Field(discriminator="strategy"),
]


class Fixed:
    """Always the same."""

    def __init__(self, options: FixedOptions) -> None:
        self._seconds = options.seconds

    def seconds(self, size: Size) -> float | None:
        return self._seconds

    def learn(self, end: End) -> None:
        """There is nothing to learn."""


class Exponential:
    """A tenth shorter after a request that won or was not needed, half as long again after one that lost, double after
    a failure."""

    _FACTORS: ClassVar[dict[End, float]] = {"unneeded": 0.9, "won": 0.9, "lost": 1.5, "failed": 2.0}

    def __init__(self, options: ExponentialOptions) -> None:
        self._options = options
        self._seconds = self._bounded(options.initial_seconds)

    def _bounded(self, seconds: float) -> float:
        return min(max(seconds, self._options.min_seconds), self._options.max_seconds)

    def seconds(self, size: Size) -> float | None:
        return self._seconds

    def learn(self, end: End) -> None:
        self._seconds = self._bounded(self._seconds * self._FACTORS[end])


def delay_of(options: DelayOptions, window: Window, next_window: Window, *, max_extra: float, seed: int) -> Delay:
    """Return the policy of some options, by the windows of the model that is waited for and of the one asked next."""
    if isinstance(options, FixedOptions):
        return Fixed(options)
    if isinstance(options, ExponentialOptions):
        return Exponential(options)
    from pgharness.gateway.learned_delays import Adaptive, Percentile, Workload

    if isinstance(options, PercentileOptions):
        return Percentile(options, window)
    if isinstance(options, WorkloadOptions):
        return Workload(options, window)
    return Adaptive(options, window, next_window, max_extra=max_extra, seed=seed)
