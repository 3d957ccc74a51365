"""The figures of providers that refuse: how near two workers come to a limit that nobody told them, and at what price.

The provider is `pgharness simulate` in a process of its own, which answers 429 above its limit.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bed import Bed, connected, make_world, scalar, start_run
from figures import Line

_CONCURRENCY = 200  # of each worker: far more than any of the limits
_SETTLED_SHARE = 0.9
_REFUSED_PERCENT = 2.0

_WITHIN = """
select count(*) filter (where outcome = 'succeeded'), count(*) filter (where outcome = 'rate_limited')
  from (select outcome, extract(epoch from started_at + make_interval(secs => latency_ms / 1000.0)
                                         - (select min(started_at) from pgharness.calls)) as at from pgharness.calls) as call
 where at >= %s and at < %s
"""


@dataclass(frozen=True, slots=True)
class Storm:
    """A limit of a provider: an option of `pgharness simulate`, and the calls a second that it lets through."""

    what: str
    option: str
    limit: int
    latency: float
    calls_per_second: float


STORMS = (
    Storm("100 requests a second", "--requests-per-second-limit", 100, 0.3, 100.0),
    Storm("20 requests a second", "--requests-per-second-limit", 20, 1.0, 20.0),
    Storm("40 requests at once, of 0.3 s", "--concurrency-limit", 40, 0.3, 40 / 0.3),
    Storm("10 requests at once, of 0.5 s", "--concurrency-limit", 10, 0.5, 10 / 0.5),
)


def storms(bed: Bed) -> Iterator[Line]:
    """Compare what two workers get through in steady state with the provider's limit; count what it refuses."""
    for storm in STORMS:
        seen = [_look(bed, storm) for _ in range(bed.repeats)]
        yield Line(
            "storms",
            f"{storm.what}, that nobody configured; 2 workers of {_CONCURRENCY} places",
            "calls/s",
            [rate for rate, _, _ in seen],
            "what the provider lets through",
            [storm.calls_per_second] * len(seen),
            at_least=_SETTLED_SHARE,
        )
        yield Line(
            "storms",
            f"{storm.what}: requests refused once settled",
            "%",
            [settled for _, settled, _ in seen],
            "from the first request on",
            [max(whole, 0.01) for _, _, whole in seen],
            limit=_REFUSED_PERCENT,
        )


def _look(bed: Bed, storm: Storm) -> tuple[float, float, float]:
    """Return calls a second once settled, and the percentages refused then and in all."""
    ramp, window = (20.0, 15.0) if bed.is_quick else (45.0, 30.0)
    server = [sys.executable, "-m", "pgharness", "simulate", "--port", "0", "--set", f"latency_seconds={storm.latency}"]
    server += ["--set", "latency_spread=0", "--model", "stub", storm.option, str(storm.limit)]
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bed.database())
        connection = stack.enter_context(connected(url))
        program = stack.enter_context(bed.program(server))
        assert program.stdout is not None
        base_url = next(word for line in program.stdout for word in line.split() if word.startswith("http://"))
        make_world(connection, base_url=base_url, are_brief=True)
        for _ in range(2):
            stack.enter_context(bed.worker(url, _CONCURRENCY))
        run_id = start_run(connection, math.ceil(2 * storm.calls_per_second * (ramp + window)))
        time.sleep(ramp + window + 2 * storm.latency + 1)  # as long as is looked at, and until that is recorded
        connection.execute("select from pgharness.cancel_run(%s)", (run_id,))
        answered, refused = connection.execute(_WITHIN.encode(), (ramp, ramp + window)).fetchone() or (0, 0)
        every = scalar(
            connection, "select count(*) from pgharness.calls where outcome in ('succeeded', 'rate_limited')"
        )
        refusals = scalar(connection, "select count(*) from pgharness.calls where outcome = 'rate_limited'")
    return answered / window, 100 * refused / max(answered + refused, 1), 100 * refusals / max(every, 1)
