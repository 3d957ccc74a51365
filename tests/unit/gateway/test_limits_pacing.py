"""What a process knows of a model's pace, by a clock that the tests move."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgharness.errors import InvalidOutput, ModelError, RateLimited, ServerFailed, TimedOut, Unavailable
from pgharness.gateway.pacing import FIRST_WINDOW, OUTAGE_AFTER, Pacer


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacer(clock: Clock) -> Pacer:
    return Pacer(clock)


def refused(wait: float | None = None) -> RateLimited:
    return RateLimited("slow down", retry_after=wait)


def begin(pacer: Pacer, count: int) -> int:
    """Begin as many calls as may, up to a number; return how many."""
    begun = 0
    while begun < count and pacer.admits():
        pacer.begin()
        begun += 1
    return begun


class Traffic:
    """Calls that begin whenever they may, each as one ends, and take as long as they are told to."""

    def __init__(self, pacer: Pacer, clock: Clock) -> None:
        self.pacer, self.clock = pacer, clock
        self.began: list[float] = []

    def trip(self, latency: float = 0.1) -> int:
        """Have all calls in flight answered after so many seconds; return how many they were."""
        self._begin()
        ending, self.began = self.began, []
        self.clock.now += latency
        for began in ending:
            assert self.pacer.end(began) is None
            self._begin()
        return len(ending)

    def _begin(self) -> None:
        self.began += [self.clock.now] * begin(self.pacer, 100_000)


def test_the_window_begins_small_and_doubles_each_round_trip(pacer: Pacer, clock: Clock) -> None:
    traffic = Traffic(pacer, clock)
    sizes = [traffic.trip() for _ in range(8)]
    assert sizes[0] == FIRST_WINDOW
    assert all(1.9 <= after / before <= 2.1 for before, after in itertools.pairwise(sizes))
    assert sizes[-1] > 1_000


def test_a_window_that_is_not_used_does_not_grow(pacer: Pacer, clock: Clock) -> None:
    for _ in range(100):
        began = clock.now
        assert begin(pacer, 2) == 2
        clock.now += 0.1
        pacer.end(began)
        pacer.end(began)
    assert pacer.window == FIRST_WINDOW


def test_the_window_starts_where_the_model_was_known_to_hold(pacer: Pacer) -> None:
    pacer.learn(None, 400)
    assert begin(pacer, 1_000) == 400


def test_latency_that_swells_with_the_window_stops_it_and_throughput_that_grows_does_not(clock: Clock) -> None:
    """A server that does 40 calls at once and lets the others queue."""
    pacer = Pacer(clock)
    traffic = Traffic(pacer, clock)
    for _ in range(60):
        traffic.trip(0.1 * max(1.0, pacer.window / 40))
        assert pacer.window <= 200
    assert pacer.window >= 40
    healthy = Traffic(Pacer(clock), clock)
    assert [healthy.trip() for _ in range(13)][-1] > 1_000


def test_a_first_refusal_holds_everything_until_it_was_reported(pacer: Pacer, clock: Clock) -> None:
    traffic = Traffic(pacer, clock)
    for _ in range(4):
        traffic.trip()
    began = clock.now
    clock.now += 0.01
    assert pacer.end(began, refused()) == pytest.approx(0.05)
    assert not pacer.admits() and pacer.room == 0 and pacer.seconds_to_wait is None
    assert pacer.end(began, refused()) is None, "it is on its way"
    report = pacer.report()
    assert report.refused == 2 and report.wait == 0 and not report.failed
    pacer.learn(100.0)
    assert pacer.admits()


def test_a_report_says_what_was_accepted_before_the_refusal(pacer: Pacer, clock: Clock) -> None:
    """Calls that began a second ago and later, without those that were refused; also those still without an answer."""
    pacer.learn(None, 10_000)
    for _ in range(40):
        begin(pacer, 5)
        clock.now += 0.05
    began = clock.now
    begin(pacer, 30)
    for _ in range(30):
        pacer.end(began, refused())
    assert pacer.report().accepted == pytest.approx(100, rel=0.06)


def test_a_rate_is_kept_to_the_call_without_bursts(pacer: Pacer, clock: Clock) -> None:
    pacer.learn(100.0)
    begun = 0
    for _ in range(1_000):
        clock.now += 0.01
        count = begin(pacer, 1_000)
        assert count <= 6
        begun += count
    assert begun == pytest.approx(1_000, abs=6)
    clock.now += 3_600
    assert begin(pacer, 1_000) <= 6, "an idle hour is no burst"
    assert pacer.seconds_to_wait == pytest.approx(0.01, abs=0.0101)


@settings(deadline=None, max_examples=50)
@given(rate=st.floats(0.1, 2_000), steps=st.lists(st.floats(0.0, 0.5), min_size=1, max_size=200))
def test_no_more_begins_than_the_rate_allows(rate: float, steps: list[float]) -> None:
    clock = Clock()
    pacer = Pacer(clock)
    pacer.learn(rate)
    start, begun = clock.now, 0
    for step in steps:
        clock.now += step
        begun += begin(pacer, 10_000)
        assert begun <= (clock.now - start) * rate + max(rate * 0.05, 1) + 1


def test_a_refused_call_is_charged_thrice(pacer: Pacer, clock: Clock) -> None:
    pacer.learn(10.0)
    begin(pacer, 1)
    began = clock.now
    pacer.end(began, refused())
    clock.now += 0.25
    assert not pacer.admits()
    clock.now += 0.1
    assert pacer.admits()


def test_a_single_refusal_among_many_answers_waits_for_nothing(pacer: Pacer, clock: Clock) -> None:
    pacer.learn(1_000.0)
    for _ in range(100):
        clock.now += 0.01
        began = clock.now
        for _ in range(begin(pacer, 10)):
            pacer.end(began)
    began = clock.now
    clock.now += 0.01
    pacer.begin()
    pacer.end(began, refused(1.0))
    assert pacer.report().wait == 0
    clock.now += 0.01
    assert pacer.admits()


def test_when_nothing_is_accepted_it_waits_as_long_as_it_was_told_or_doubles(pacer: Pacer, clock: Clock) -> None:
    waits = []
    for told in (7.0, None, None, None):
        began = clock.now
        pacer.begin()
        clock.now += 0.01
        assert pacer.end(began, refused(told)) is not None
        report = pacer.report()
        assert report.refused == 0, "nothing is known of the limit"
        waits.append(report.wait)
        pacer.learn(None)
        clock.now += report.wait
    assert waits == [7, 2, 4, 8]


def test_refusals_of_all_calls_that_began_in_knowledge_of_the_first_are_an_exhausted_quota(clock: Clock) -> None:
    pacer = Pacer(clock)
    pacer.learn(1_000.0)
    for _ in range(100):
        clock.now += 0.01
        began = clock.now
        for _ in range(begin(pacer, 10)):
            pacer.end(began)
    for _ in range(6):
        clock.now += 0.01
        began = clock.now
        pacer.begin()
        pacer.end(began, refused(40.0))
    assert pacer.report().wait == 40


@pytest.mark.parametrize("failure", [Unavailable, ServerFailed, TimedOut])
def test_failures_in_a_row_are_reported_at_once_and_hold_everything(
    pacer: Pacer, clock: Clock, failure: type[ModelError]
) -> None:
    for count in range(1, OUTAGE_AFTER + 1):
        began = clock.now
        pacer.begin()
        clock.now += 0.1
        assert pacer.end(began, failure("down", retry_after=3.0)) == (0.0 if count == OUTAGE_AFTER else None)
    assert not pacer.admits()
    report = pacer.report()
    assert (report.failed, report.answered, report.error, report.wait) == (OUTAGE_AFTER, 0, "down", 3)


def test_calls_in_flight_when_a_model_goes_out_of_service_are_spared_and_probes_are_not(
    pacer: Pacer, clock: Clock
) -> None:
    began, error = clock.now, ServerFailed("down")
    pacer.window = 2 * OUTAGE_AFTER
    assert begin(pacer, 1_000) == 2 * OUTAGE_AFTER
    clock.now += 0.1
    for count in range(2 * OUTAGE_AFTER):
        assert pacer.is_spared(began, error) == (count >= OUTAGE_AFTER)
        assert not pacer.is_spared(began, InvalidOutput("not JSON")), "it answered"
        pacer.end(began, error)
    pacer.learn(None)
    clock.now += 1
    probed = clock.now
    pacer.begin()
    clock.now += 0.1
    assert not pacer.is_spared(probed, error)
    assert pacer.end(probed, error) == 0.0, "what became of a probe is told at once"
    pacer.learn(None)
    pacer.begin()
    pacer.end(clock.now)
    assert not pacer.is_spared(began, error), "it is in service again"


def test_any_answer_ends_a_row_of_failures_even_an_unusable_one(pacer: Pacer, clock: Clock) -> None:
    for count in range(3 * OUTAGE_AFTER):
        began = clock.now
        pacer.begin()
        clock.now += 0.1
        error = InvalidOutput("not JSON") if count % OUTAGE_AFTER == OUTAGE_AFTER - 1 else Unavailable("down")
        assert pacer.end(began, error) is None
    assert pacer.admits()
    assert pacer.report().failed == 0


def test_aborted_calls_say_nothing_and_leave_their_places(pacer: Pacer) -> None:
    assert begin(pacer, 1_000) == FIRST_WINDOW
    for _ in range(FIRST_WINDOW):
        pacer.cancel()
    assert begin(pacer, 1_000) == FIRST_WINDOW
    report = pacer.report()
    assert (report.refused, report.failed, report.answered) == (0, 0, 0)
