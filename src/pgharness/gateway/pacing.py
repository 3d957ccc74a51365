"""How fast one process may call one model: what it has seen of what the model takes and refuses. No I/O.

Three things hold calls back, none of which anybody configures.

- A *window* of calls in flight, while no limit of the model is known: it begins small and grows by one for every call
  that is answered, so it doubles each round trip, as TCP's slow start does. It stops where a step more made calls
  slower and no more of them (the idea of gradient limiters: latency that swells with concurrency is a queue).
- A *rate*, once the model has refused calls: this process's share of what all workers together may begin a second. It
  comes from the database, which lowers it to what was accepted and raises it gently (AIMD). A refused call is charged
  extra, so a rate that has become too high is felt at once, before anybody agreed on another one.
- A *wait* when everything is refused: as long as the provider asks, or a second, doubling.

Requests that were accepted are counted by when they began: refusals come back soon, answers may take a minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pgharness.errors import ModelError, RateLimited, ServerFailed, TimedOut, Unavailable

FIRST_WINDOW = 10
_OUTAGES = (Unavailable, ServerFailed, TimedOut)
OUTAGE_AFTER = 10  # failures in a row, after which a model counts as out of service
LONGEST_WAIT = 60.0
_BIN_SECONDS = 0.05
_BINS = 1_280  # 64 seconds
_SECOND = round(1 / _BIN_SECONDS)
_FEW = 10  # accepted calls that tell no rate
_ENOUGH = 40  # accepted calls, after which no longer span is looked at
_LONGEST_GAP = 15 * _SECOND  # a pause in demand, beyond which a span is not about a limit any more
_BURST_SECONDS = 0.05  # what may begin at once after a pause, in seconds of the rate
_REFUSAL_CHARGE = 2.0  # calls that a refused one takes beside itself
_REPORT_SECONDS = 0.5  # between two reports of refusals
_PLATEAU_SECONDS = 10.0
_GROWTH = 1.0  # of the window, for each call that is answered
_IN_A_ROW = 5  # refusals of calls that began after the first of them was heard of: everything is refused


@dataclass(frozen=True, slots=True)
class Report:
    """What a process has seen since its last report.

    `accepted` is calls begun and not refused a second, of late; `peak` the most of them in flight, or those in flight
    when one was refused; `refused_ago` the seconds since the last refused call began; `is_short` whether the rate kept
    calls waiting; `wait` for how long to send nothing; `failed` how often it failed since it last answered; `answered`
    how often it did.
    """

    accepted: float = 0.0
    peak: int = 0
    refused: int = 0
    refused_ago: float = 0.0
    is_short: bool = False
    wait: float = 0.0
    failed: int = 0
    answered: int = 0
    error: str | None = None


class Pacer:
    """What one process knows of one model. `clock` gives seconds, from any start."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.rate: float | None = None  # calls that may begin a second; None: no limit is known
        self.window: float = FIRST_WINDOW  # calls in flight, while no limit is known
        self.is_held = False  # nothing begins until there is an answer to a report
        self._tokens = 1.0
        self._filled_at = clock()
        self._since = clock()  # from when on what is counted is about the present rate
        self._bin = int(clock() / _BIN_SECONDS)
        self._begun = [0] * _BINS
        self._ended = [0] * _BINS
        self._in_flight = 0
        self._epoch = _Epoch(clock())
        self._refused = 0
        self._refused_at = 0.0
        self._is_reporting = False
        self._is_short = False
        self._row_since = float("inf")  # when a row of refusals began
        self._row = 0
        self._waits = 0
        self._wait = 0.0
        self._failures_in_a_row = 0
        self._out_since = float("-inf")  # from when on the model counts as out of service
        self._failed = 0
        self._answered = 0
        self._wait_out = 0.0
        self._error: str | None = None
        self._reported_at = float("-inf")

    # -- beginning

    def admits(self) -> bool:
        """Tell whether a call may begin now."""
        if self.is_held:
            return False
        if self.rate is None:
            return self._in_flight < self.window
        self._fill()
        if self._tokens < 1.0:
            self._is_short = True
            return False
        return True

    @property
    def room(self) -> int:
        """How many calls may begin now."""
        if self.is_held:
            return 0
        if self.rate is None:
            return max(int(self.window) - self._in_flight, 0)
        self._fill()
        return max(int(self._tokens), 0)

    @property
    def seconds_to_wait(self) -> float | None:
        """After how many seconds another call may begin; None: when one has ended, or a report is answered."""
        if self.rate is None or self.is_held:
            return None
        self._fill()
        return max(1.0 - self._tokens, 0.0) / self.rate

    def begin(self) -> None:
        """A call begins."""
        self._begun[self._turn() % _BINS] += 1
        self._in_flight += 1
        if self.rate is not None:
            self._tokens -= 1.0

    def _fill(self) -> None:
        now = self._clock()
        assert self.rate is not None
        self._tokens = min(self._tokens + (now - self._filled_at) * self.rate, max(self.rate * _BURST_SECONDS, 1.0))
        self._filled_at = now

    def _turn(self) -> int:
        """Return the number of the present bin, those since the last one emptied."""
        now = int(self._clock() / _BIN_SECONDS)
        for number in range(max(self._bin, now - _BINS) + 1, now + 1):
            self._begun[number % _BINS] = self._ended[number % _BINS] = 0
        self._bin = max(self._bin, now)
        return self._bin

    # -- ending

    def end(self, began: float, error: ModelError | None = None) -> float | None:
        """A call that began at this time of the clock has ended; return in how many seconds to report, if soon."""
        self._in_flight -= 1
        now = self._turn()
        if isinstance(error, RateLimited):
            return self._refuse(began, error)
        self._ended[now % _BINS] += 1
        if isinstance(error, _OUTAGES):
            self._failures_in_a_row += 1
            self._failed += 1
            self._error = str(error)
            self._wait_out = max(self._wait_out, error.retry_after or 0.0)
            if self._failures_in_a_row < OUTAGE_AFTER or (self._failures_in_a_row % OUTAGE_AFTER and self._in_flight):
                return None
            if self._failures_in_a_row == OUTAGE_AFTER:
                self._out_since = self._clock()
            self.is_held = True
            return 0.0
        self._failed = self._failures_in_a_row = self._waits = 0
        self._out_since = float("-inf")
        if began > self._row_since:
            self._row_since = float("inf")
        self._answered += 1
        if self.rate is None:
            self._grow(self._clock() - began)
        return None

    def is_spared(self, began: float, error: ModelError) -> bool:
        """Tell whether a failure says nothing of its call: it was in flight when the model went out of service."""
        return isinstance(error, _OUTAGES) and began <= self._out_since

    def cancel(self) -> None:
        """A call was aborted, and says nothing."""
        self._in_flight -= 1
        self._ended[self._turn() % _BINS] += 1

    def _refuse(self, began: float, error: RateLimited) -> float | None:
        number = int(began / _BIN_SECONDS)
        if self._bin - number < _BINS:
            self._begun[number % _BINS] -= 1
        self._tokens -= _REFUSAL_CHARGE
        self._refused += 1
        self._refused_at = max(self._refused_at, began)
        if self._row_since == float("inf"):
            self._row_since, self._row = self._clock(), 0
        self._row += began > self._row_since
        if self._accepted(number)[0] < _FEW or self._row >= _IN_A_ROW:
            if not self._wait:
                self._waits += 1
                self.window = max(self.window / 2, 1.0)
            self._wait = max(self._wait, error.retry_after or min(2.0 ** (self._waits - 1), LONGEST_WAIT))
        if self.rate is None:
            self.is_held = True
        if self._is_reporting or (self._clock() - self._reported_at < _REPORT_SECONDS and not self.is_held):
            return None
        self._is_reporting = True
        # by then it is known what became of the calls that began before the first refusal was heard of
        return min(max(self._clock() - began, _BIN_SECONDS), 1.0)

    # -- what is known

    def _accepted(self, last: int) -> tuple[int, float]:
        """Return how many calls that began up to a bin were not refused, and in how many seconds."""
        since = int(self._since / _BIN_SECONDS)
        first = max(last - _SECOND + 1, self._bin - _BINS + 1)
        if first < since <= last - _SECOND // 2:
            first = since  # enough is known of the present rate
        count = sum(self._begun[number % _BINS] for number in range(first, last + 1))
        gap = 0
        while count < _ENOUGH and first > max(since, self._bin - _BINS + 1) and gap < _LONGEST_GAP:
            first -= 1
            begun = self._begun[first % _BINS]
            count += begun
            gap = 0 if begun else gap + 1
        return count, (last - first + 0.5 - gap) * _BIN_SECONDS

    def _levels(self, last: int) -> list[int]:
        """Return the calls in flight at the ends of a second's bins, the latest first; refused ones do not count."""
        later = range(last + 1, self._bin + 1)
        levels = [self._in_flight + sum(self._ended[n % _BINS] - self._begun[n % _BINS] for n in later)]
        for n in range(last, last - _SECOND, -1):
            levels.append(levels[-1] + self._ended[n % _BINS] - self._begun[n % _BINS])
        return levels

    def report(self) -> Report:
        """Return what was seen since the last report."""
        self._turn()
        last = int(self._refused_at / _BIN_SECONDS) if self._refused else self._bin
        count, seconds = self._accepted(last)
        told = Report(
            accepted=max(count, 0) / seconds,
            peak=self._levels(last)[0] if self._refused else max(self._levels(last)),
            refused=self._refused if count >= _FEW else 0,
            is_short=self._is_short,
            refused_ago=self._clock() - self._refused_at if self._refused else 0.0,
            wait=max(self._wait, self._wait_out),
            failed=self._failed,
            answered=self._answered,
            error=self._error if self._failed else None,
        )
        if self._refused:
            self._reported_at = self._clock()
        self._refused, self._wait = 0, 0.0
        self._is_reporting = self._is_short = False
        self._failed, self._answered, self._wait_out = 0, 0, 0.0
        return told

    def learn(self, rate: float | None, window: int = 0) -> None:
        """The database says what this process may begin a second, or how many calls were once in flight together."""
        if rate is None:
            self.window = max(self.window, window)
        elif self.rate is None or rate < 0.99 * self.rate:
            self._since = self._clock()
            if self.rate is None:
                self._filled_at, self._tokens = self._clock(), 1.0
        if rate is None and self.rate is not None:
            self._epoch = _Epoch(self._clock())
        self.rate = rate
        self.is_held = False

    # -- the window

    def _grow(self, latency: float) -> None:
        epoch = self._epoch
        epoch.count += 1
        epoch.latency += latency
        is_used = 2 * self._in_flight >= self.window
        if is_used and not epoch.is_suspect and self._clock() >= epoch.held_until:
            self.window += _GROWTH
        if is_used and epoch.count >= epoch.window:
            self._epoch = epoch.next(self._clock(), self.window)
            if self._epoch.held_until > self._clock() >= epoch.held_until:
                self.window = self._epoch.window


class _Epoch:
    """A round trip of a whole window: how many calls a second it brought, and how long they took."""

    def __init__(self, now: float, window: float = FIRST_WINDOW) -> None:
        self.begun = now
        self.window = window
        self.count = 0
        self.latency = 0.0
        self.before: tuple[float, float, float] | None = None  # window, calls a second and latency to compare with
        self.is_suspect = False
        self.held_until = 0.0

    def next(self, now: float, window: float) -> _Epoch:
        """Return the epoch that follows: larger, or no larger to look again, or as small as the one before."""
        after = _Epoch(now, window)
        rate, latency = self.count / max(now - self.begun, 1e-6), self.latency / self.count
        if self.held_until > now:
            after.held_until = self.held_until
        elif self.before is not None and rate < 1.1 * self.before[1] and latency > 1.25 * self.before[2]:
            if self.is_suspect:
                after.window, after.held_until = self.before[0], now + _PLATEAU_SECONDS
            else:
                after.before, after.is_suspect = self.before, True
        else:
            after.before = (self.window, rate, latency)
        return after
