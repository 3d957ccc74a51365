"""Delays that are learned from a window of latencies: a percentile, the best trade of latency for requests, by size.

Percentiles are of the product-limit estimate (Kaplan and Meier, 1958), which counts a request that was cut for as long
as it was waited for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgharness.gateway.delays import (
    FIELDS,
    AdaptiveOptions,
    End,
    PercentileOptions,
    Size,
    Window,
    WorkloadOptions,
)

Array = NDArray[np.floating[Any]]

FEWEST = 20  # observations, before a policy trusts what it learned
_REFRESHES = 20  # times that a policy looks at its window while that fills anew
# the shares that are asked again, whose delays are the arms of a bandit unless arms are given
_SHARES = np.append(np.geomspace(0.5, 0.001, 31), 0.0)
_ATOMS = 400  # to which a long window is thinned where every candidate is weighed against it
_BEYOND = 3.0  # how many times the longest observation a request lasts of which more is not known
_RIDGE = 1e-3


def latencies(window: Window) -> tuple[Array, NDArray[np.bool_]]:
    """Return the seconds of a window's observations, and which of them are cut."""
    rows = _rows(window)
    return rows[:, 0], rows[:, 1] > 0


def sizes_in(window: Window) -> Array:
    """Return the prompt and answer tokens of a window's observations, a row each."""
    return _rows(window)[:, 2:]


def _rows(window: Window) -> Array:
    return np.frombuffer(window.numbers()).reshape(-1, FIELDS)


# -- distributions


class Survival:
    """The share of requests that take longer than a time, by the product-limit estimate.

    `times` are the moments at which it falls, in order; `shares` what is left just after each. What is left after the
    longest observation was all cut; it is taken to last thrice as long as that, lest a hedge that works so well that no
    slow request is ever seen to its end be given up as needless.
    """

    def __init__(self, times: Array, shares: Array) -> None:
        self.times = times
        self.shares = shares

    @classmethod
    def of(cls, seconds: Array, is_cut: NDArray[np.bool_], weights: Array | None = None) -> Survival:
        """Estimate it from observations, at least one; `weights` count one several times, or in part."""
        order = np.lexsort((is_cut, seconds))  # at one time, what ended before what was cut
        seconds, has_ended = seconds[order], ~is_cut[order]
        weights = np.ones(len(seconds)) if weights is None else weights[order]
        at_risk = np.cumsum(weights[::-1])[::-1]
        shares = np.cumprod(1.0 - np.where(has_ended, weights / at_risk, 0.0))
        longest = seconds[-1]
        times, shares = seconds[has_ended], np.maximum(shares[has_ended], 0.0)
        if not len(shares) or shares[-1] > 1e-9:
            times, shares = np.append(times, _BEYOND * longest), np.append(shares, 0.0)
        return cls(times, shares)

    def at(self, time: Array | float) -> Any:
        """Return the share that takes longer than a time."""
        return np.concatenate(([1.0], self.shares))[np.searchsorted(self.times, time, side="right")]

    def time(self, share: Array | float) -> Any:
        """Return the shortest time that no more than a share of the requests exceed."""
        places = np.searchsorted(-self.shares, -1e-12 - np.asarray(share))
        return self.times[np.minimum(places, len(self.times) - 1)]

    def percentile(self, percent: float) -> float:
        """Return the shortest time within which so many percent of the requests end."""
        return float(self.time(1.0 - percent / 100.0))

    def thinned(self, atoms: int) -> Survival:
        """Return one that falls at no more than so many moments, the slow ones all among them as far as they fit."""
        if len(self.times) <= atoms:
            return self
        tail = atoms // 2
        body = np.linspace(0, len(self.times) - tail - 1, atoms - tail).astype(np.intp)
        places = np.concatenate((body, np.arange(len(self.times) - tail, len(self.times))))
        return Survival(self.times[places], self.shares[places])


def hedged_means(first: Survival, second: Survival, delays: Array) -> Array:
    """Return, for each delay, the mean latency of requests that are asked again after it: E min(L, delay + L')."""
    times = first.times
    masses = -np.diff(first.shares, prepend=1.0)
    # the mean of min(L', x) rises by the share still waiting: exact at the times, linear between them
    edges = np.concatenate(([0.0], second.times))
    waited = np.concatenate(([0.0], np.cumsum(np.diff(edges) * np.concatenate(([1.0], second.shares[:-1])))))
    beyond = times[None, :] - delays[:, None]
    late = np.interp(np.maximum(beyond, 0.0), edges, waited)
    means: Array = np.where(beyond > 0, delays[:, None] + late, times[None, :]) @ masses
    return means


# -- policies


class _Learned(ABC):
    """A delay taken from a window, anew after every few observations: a look costs more than a request may."""

    def __init__(self, window: Window, initial_seconds: float | None) -> None:
        self._window = window
        self._initial_seconds = initial_seconds
        self._next_look = 0

    def _is_known(self) -> bool:
        """Tell whether the window says enough, having looked at it if it is time to."""
        if len(self._window) < FEWEST:
            return False
        if self._window.count >= self._next_look:
            self._next_look = self._window.count + max(1, len(self._window) // _REFRESHES)
            self._look()
        return True

    @abstractmethod
    def _look(self) -> None:
        """Take what is needed from the window."""

    def learn(self, end: End) -> None:  # noqa: B027 - most have nothing to add
        """All that it knows is in the window."""


class Percentile(_Learned):
    """A percentile of the latency."""

    def __init__(self, options: PercentileOptions, window: Window) -> None:
        super().__init__(window, options.initial_seconds)
        self._percentile = options.percentile
        self._seconds = 0.0

    def seconds(self, size: Size) -> float | None:
        return self._seconds if self._is_known() else self._initial_seconds

    def _look(self) -> None:
        self._seconds = Survival.of(*latencies(self._window)).percentile(self._percentile)


class Adaptive(_Learned):
    """A bandit whose arms are delays, by bootstrap Thompson sampling.

    One observed latency says what every delay would have led to, so an arm need not be pulled to be known: the
    distribution in the window gives the mean latency of each, E min(L, d + L'), and how many extra requests it makes,
    P(L > d). The arm whose latency plus price of extra requests is lowest is chosen on a distribution drawn anew at
    each look, the window with random weights (the Bayesian bootstrap of Rubin, 1981): so it tries others as often as
    they may still be better (Eckles and Kaptein, 2014; Osband and Van Roy, 2015). Delays that would make more extra
    requests than `max_extra` are none of its arms.
    """

    def __init__(
        self,
        options: AdaptiveOptions,
        window: Window,
        next_window: Window,
        *,
        max_extra: float,
        seed: int,
    ) -> None:
        super().__init__(window, options.initial_seconds)
        self._options = options
        self._next_window = next_window
        self._max_extra = max_extra
        self._rng = np.random.default_rng(seed)
        self._seconds = math.inf

    def seconds(self, size: Size) -> float | None:
        return self._seconds if self._is_known() else self._initial_seconds

    def _look(self) -> None:
        delays = self._arms(Survival.of(*latencies(self._window)))
        first = second = self._drawn(self._window)
        if self._next_window is not self._window and len(self._next_window) >= FEWEST:
            second = self._drawn(self._next_window)
        self._seconds = float(delays[np.argmin(objective(self._options.extra_request_seconds, first, second, delays))])

    def _drawn(self, window: Window) -> Survival:
        seconds, is_cut = latencies(window)
        return Survival.of(seconds, is_cut, self._rng.standard_exponential(len(seconds))).thinned(_ATOMS)

    def _arms(self, known: Survival) -> Array:
        given = self._options.candidates
        delays = np.append(known.time(_SHARES) if given is None else given, math.inf)
        arms: Array = delays[known.at(delays) <= self._max_extra]
        return arms


def objective(price: float | None, first: Survival, second: Survival, delays: Array) -> Array:
    """Return what an adaptive delay makes small, for each of some delays: latency plus the price of extra requests.

    `first` and `second` are the latencies of the request that is waited for, and of the one that is made then.
    """
    price = first.percentile(50.0) if price is None else price
    finite = np.minimum(delays, first.times[-1])  # after which nothing is left to wait for
    weighed: Array = hedged_means(first, second, finite) + price * first.at(finite)
    return weighed


class Workload(_Learned):
    """A percentile of the latency given the request: its prompt, and the answer that is expected.

    The logarithm of the latency is a linear function of the logarithms of both, fitted by least squares; the delay is
    what it predicts times a percentile of what it leaves unexplained (by the product-limit estimate, as some is cut).
    """

    def __init__(self, options: WorkloadOptions, window: Window) -> None:
        super().__init__(window, options.initial_seconds)
        self._percentile = options.percentile
        self._factor = 1.0
        self._means = [0.0, 0.0]
        self._slopes = [0.0, 0.0]

    def seconds(self, size: Size) -> float | None:
        if not self._is_known():
            return self._initial_seconds
        exponent = 0.0
        for tokens, mean, slope in zip(size, self._means, self._slopes, strict=True):
            if tokens:
                exponent += slope * (math.log1p(tokens) - mean)
        return self._factor * math.exp(exponent)

    def _look(self) -> None:
        seconds, is_cut = latencies(self._window)
        sizes = sizes_in(self._window)
        known = sizes > 0
        features = np.log1p(sizes)
        means = features.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        features = np.where(known, features - means, 0.0)  # what is not known of a request says nothing
        logs = np.log(np.maximum(seconds, 1e-6))
        ridge = _RIDGE * len(logs) * np.eye(2)  # so that sizes that are all alike get no slope
        slopes = np.linalg.solve(features.T @ features + ridge, features.T @ (logs - logs.mean()))
        self._means, self._slopes = means.tolist(), slopes.tolist()
        self._factor = Survival.of(np.exp(logs - features @ slopes), is_cut).percentile(self._percentile)
