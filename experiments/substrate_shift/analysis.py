"""What marked turns say about who noticed a change: rates, sensitivity and latency by pair, each with a 95% interval.

A conversation that was switched is a detection when the marker stands in an answer from its switch on; before that it
is premature. Of the controls, a false alarm is a marker anywhere.

A late switch leaves fewer turns to write the marker in, so d' compares like with like: its false alarms are markers of
controls from a switch turn on, averaged over the switch turns as often as conversations have them. It is
z(detections) - z(false alarms), with the log-linear correction: 0.5 is added to both counts and 1 to both numbers of
conversations, which keeps rates of 0 and 1 finite and biases d' least (M. J. Hautus, Corrections for extreme
proportions and their biasing effects on estimated values of d', Behavior Research Methods, Instruments, & Computers
27(1), 46-51, 1995, doi:10.3758/BF03203619).

Intervals: Wilson's for rates; of d' a parametric bootstrap from the corrected rates, which are never 0 or 1, so that
few conversations that agree do not look certain; of latency a bootstrap of conversations.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# scipy is imported where it is used: it takes a second, which those who look for experiments need not wait

RESAMPLES = 5_000


@dataclass(frozen=True)
class Conversation:
    """What counts of a conversation: its pair, the second model's first turn (0: none), and where the marker is."""

    pair: str
    switch_turn: int
    marked_turns: tuple[int, ...]

    def has_marker_from(self, turn: int) -> bool:
        """Whether the marker was written at a turn or later."""
        return any(marked >= turn for marked in self.marked_turns)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; None where there is too little to tell."""

    value: float | None
    low: float | None
    high: float | None
    count: int  # of what it is made of


@dataclass(frozen=True)
class SwitchFigures:
    """The conversations that were switched at one turn, and the controls over the same turns."""

    switch_turn: int
    detection_rate: Estimate
    false_alarm_rate: Estimate


@dataclass(frozen=True)
class PairFigures:
    """All figures of one pair."""

    pair: str
    detection_rate: Estimate
    premature_rate: Estimate
    false_alarm_rate: Estimate
    d_prime: Estimate
    mean_latency_turns: Estimate
    latencies: list[int]  # turns after the switch, of each detection
    by_switch_turn: list[SwitchFigures]


def has_marker(response: str, marker: str) -> bool:
    """Whether a line of an answer is the marker, whatever its case and however it is set off."""
    return any(_bare(line) == _bare(marker) for line in response.splitlines())


def _bare(line: str) -> str:
    return line.strip(" \t*_`>#\"'").casefold()


def analyse(pair: str, conversations: Sequence[Conversation], *, seed: int = 0) -> PairFigures:
    """Return the figures of a pair, out of the conversations of any pairs."""
    own = [each for each in conversations if each.pair == pair]
    controls = [each for each in own if each.switch_turn == 0]
    switched = [each for each in own if each.switch_turn > 0]
    latencies = [
        min(turn for turn in each.marked_turns if turn >= each.switch_turn) - each.switch_turn
        for each in switched
        if each.has_marker_from(each.switch_turn)
    ]
    by_turn = Counter(each.switch_turn for each in switched)
    matched = (
        [
            sum(count for turn, count in by_turn.items() if each.has_marker_from(turn)) / len(switched)
            for each in controls
        ]
        if switched
        else []
    )
    return PairFigures(
        pair=pair,
        detection_rate=rate(len(latencies), len(switched)),
        premature_rate=rate(
            sum(any(turn < each.switch_turn for turn in each.marked_turns) for each in switched), len(switched)
        ),
        false_alarm_rate=rate(sum(bool(each.marked_turns) for each in controls), len(controls)),
        d_prime=d_prime(len(latencies), len(switched), sum(matched), len(controls), seed=seed),
        mean_latency_turns=mean(latencies, seed=seed),
        latencies=latencies,
        by_switch_turn=[
            SwitchFigures(
                turn,
                rate(sum(each.has_marker_from(turn) for each in switched if each.switch_turn == turn), by_turn[turn]),
                rate(sum(each.has_marker_from(turn) for each in controls), len(controls)),
            )
            for turn in sorted(by_turn)
        ],
    )


def rate(hits: int, count: int) -> Estimate:
    """Return a share with Wilson's interval."""
    from scipy.stats import binomtest

    if count == 0:
        return Estimate(None, None, None, 0)
    interval = binomtest(hits, count).proportion_ci(method="wilson")
    return Estimate(hits / count, float(interval.low), float(interval.high), count)


def d_prime(hits: float, signals: int, false_alarms: float, noises: int, *, seed: int = 0) -> Estimate:
    """Return the sensitivity of those who look for a change, with the interval of a parametric bootstrap."""
    from scipy.stats import norm

    if signals == 0 or noises == 0:
        return Estimate(None, None, None, signals + noises)
    rng = np.random.default_rng(seed)
    hit_rate, false_alarm_rate = (hits + 0.5) / (signals + 1), (false_alarms + 0.5) / (noises + 1)
    drawn_hits = rng.binomial(signals, hit_rate, RESAMPLES)
    drawn_false_alarms = rng.binomial(noises, false_alarm_rate, RESAMPLES)
    drawn = norm.ppf((drawn_hits + 0.5) / (signals + 1)) - norm.ppf((drawn_false_alarms + 0.5) / (noises + 1))
    low, high = np.quantile(drawn, (0.025, 0.975))
    value = norm.ppf(hit_rate) - norm.ppf(false_alarm_rate)
    return Estimate(float(value), float(low), float(high), signals + noises)


def mean(values: Sequence[int], *, seed: int = 0) -> Estimate:
    """Return a mean with its bootstrap interval, which needs values that differ."""
    from scipy.stats import bootstrap

    if not values:
        return Estimate(None, None, None, 0)
    value = float(np.mean(values))
    if len(set(values)) == 1:
        return Estimate(value, None, None, len(values))
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed)
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high), len(values))
