"""What hedging brings and costs: real hedges around simulated models, on scripted time, so that hours pass in seconds.

Everything random is drawn from the seeds 1, 2 and 3 (1 alone with --quick), so the table is the same on every machine,
its last line apart: that one is the time that a hedge takes of the process.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from bed import Bed
from figures import Line
from numpy.typing import NDArray

from pgharness.gateway.calls import Member
from pgharness.gateway.ensemble import Ensemble
from pgharness.gateway.hedging import Hedge
from pgharness.gateway.observations import Observations
from pgharness.gateway.simulator import Simulator
from pgharness.types import Completion, Message, ModelSpec, Request, Trail

sys.path.append(str(Path(__file__).parents[1]))
from virtual_time import run

CONCURRENCY = 10
SPREAD, TAIL_RATE, TAIL_FACTOR = 0.3, 0.02, 20.0
TAIL = {"latency_spread": SPREAD, "latency_tail_rate": TAIL_RATE, "latency_tail_factor": TAIL_FACTOR}
HEAVY_TAILED = {"latency_seconds": 1.0, **TAIL}
MIXED = {"latency_seconds": 0.3, "seconds_per_1k_input_tokens": 0.1, "seconds_per_1k_output_tokens": 15.0, **TAIL}
LEARNED = 500  # calls, after which an adaptive delay is judged
DRAWS = 1_000_000
Answer = Callable[[Request], Awaitable[Completion]]


def spec_of(parameters: dict[str, Any]) -> ModelSpec:
    known = {"quality": 1.0} | parameters
    return ModelSpec(id=1, name="simulated", provider="simulator", parameters=known, timeout_seconds=86_400)


def hedge_of(spec: ModelSpec, delay: dict[str, Any] | None, **options: Any) -> Answer:
    """Return a hedge around a simulated model, or the model alone."""
    model = Simulator(spec)
    if delay is None:
        return model
    parameters = {"members": [spec.name], "delay": delay, **options}
    hedge = ModelSpec(id=2, name="hedge", provider="hedge", parameters=parameters, members=(spec,))
    return Hedge(hedge, [Member(spec, model)], Observations())


# Calls on scripted time -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Played:
    """What became of calls: how long each took, how much it would take usually, the delay, and further requests."""

    seconds: NDArray[np.float64]
    usual: NDArray[np.float64]
    delays: NDArray[np.float64]
    hedges: NDArray[np.int64]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    @property
    def extra(self) -> float:
        """Further requests of a hundred calls."""
        return 100.0 * float(self.hedges.mean())

    @property
    def slowdown(self) -> float:
        """The 99th percentile of how many times longer a call took than one like it usually does."""
        return float(np.percentile(self.seconds / self.usual, 99))


def play(answer: Answer, requests: Sequence[tuple[Request, float]]) -> Played:
    """Make calls, ten at once, of requests and their usual seconds."""

    async def main() -> Played:
        clock = asyncio.get_running_loop().time
        waiting = iter(enumerate(requests))
        told = np.zeros((len(requests), 3))

        async def work() -> None:
            for place, (request, _) in waiting:
                begun = clock()
                composition = (await answer(request)).composition or {}
                delay = composition.get("delay_ms")
                told[place] = clock() - begun, math.inf if delay is None else delay / 1000, composition.get("hedges", 0)

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
        usual = np.array([seconds for _, seconds in requests])
        return Played(told[:, 0], usual, told[:, 1], told[:, 2].astype(np.int64))

    return run(main())


def alike(count: int, seed: int) -> list[tuple[Request, float]]:
    """Return requests of one size."""
    question = Request(messages=(Message("user", "What is it?"),), item={"case": {"target": "nothing"}})
    return [(replace(question, seed=seed * 1_000_000 + place), 1.0) for place in range(count)]


def mixed(count: int, seed: int) -> list[tuple[Request, float]]:
    """Return four grades (a long prompt, a short answer) for each note (a long answer), all of different sizes."""
    rng = np.random.default_rng(seed)
    requests = []
    for place in range(count):
        is_note = rng.random() < 0.2
        prompt, answer = np.array([1_500, 800] if is_note else [3_000, 60]) * np.exp(0.3 * rng.standard_normal(2))
        request = Request(
            messages=(Message("user", "?" * int(4 * prompt)),),
            parameters={"max_tokens": 2_000 if is_note else 200},
            item={"case": {"target": "!" * int(4 * answer)}},
            seed=seed * 1_000_000 + place,
        )
        requests.append((request, 0.3 + 0.1 * prompt / 1000 + 15 * answer / 1000))
    return requests


# The figures ----------------------------------------------------------------------------------------------------------


def hedging(bed: Bed) -> Iterator[Line]:
    """Measure what each strategy does to the tail and to the number of requests, and what a hedge costs the process."""
    seeds, count = range(1, bed.repeats + 1), 2_000 if bed.is_quick else 10_000
    yield from _tails(seeds, count)
    for price in (1.0, 5.0):
        yield _adaptive(seeds, price)
    yield from _workload(seeds, count)
    yield from _overheads(bed.repeats)


def _tails(seeds: Sequence[int], count: int) -> Iterator[Line]:
    """Compare the strategies with the model alone: lognormal latency, a median of 1 s, 2% of the calls 20 times slower."""
    spec = spec_of(HEAVY_TAILED)
    alone = [play(hedge_of(spec, None), alike(count, seed)) for seed in seeds]
    strategies: dict[str, dict[str, Any]] = {
        "percentile 95": {"strategy": "percentile", "percentile": 95.0},
        "adaptive": {"strategy": "adaptive"},
        "workload 95": {"strategy": "workload", "percentile": 95.0},
        "fixed, 2 s": {"strategy": "fixed", "seconds": 2.0},
        "exponential": {"strategy": "exponential", "initial_seconds": 1.0, "max_seconds": 20.0},
    }
    for name, delay in strategies.items():
        hedged = [play(hedge_of(spec, delay), alike(count, seed)) for seed in seeds]
        is_judged = name == "percentile 95"
        wins = statistics.median(played.extra for played in hedged)
        yield Line(
            "hedging",
            f"P99 of {count:,} calls, {name}",
            "s",
            [played.percentile(99) for played in hedged],
            "the model alone",
            [played.percentile(99) for played in alone],
            at_most=0.4 if is_judged else None,
            remark=f"P95 {statistics.median(played.percentile(95) for played in hedged):.3g} s, extra requests {wins:.2g}%",
        )
        if is_judged:
            yield Line(
                "hedging",
                f"extra requests of 100 calls, {name}",
                "",
                [played.extra for played in hedged],
                "what may be spent",
                [6.0] * len(hedged),
                at_most=1.0,
            )


def _adaptive(seeds: Sequence[int], price: float) -> Line:
    """Weigh the delays that are chosen once 500 calls were made against the best fixed one, on the true distribution."""
    rng = np.random.default_rng(0)
    first, second = (
        np.exp(SPREAD * rng.standard_normal(DRAWS)) * np.where(rng.random(DRAWS) < TAIL_RATE, TAIL_FACTOR, 1.0)
        for _ in range(2)
    )
    found = np.geomspace(0.5, 30, 120)
    weighed = np.array([np.minimum(first, at + second).mean() + price * (first > at).mean() for at in found])
    options = {"strategy": "adaptive", "extra_request_seconds": price}
    spec = spec_of(HEAVY_TAILED)
    chosen = []
    for seed in seeds:
        delays = play(hedge_of(spec, options, max_extra=1.0), alike(3 * LEARNED, seed)).delays[LEARNED:]
        chosen.append(float(np.interp(np.minimum(delays, found[-1]), found, weighed).mean()))
    never = first.mean()
    return Line(
        "hedging",
        f"adaptive after {LEARNED} calls, an extra request worth {price:g} s: mean latency and price",
        "s",
        chosen,
        f"the best fixed delay, {found[weighed.argmin()]:.3g} s, found by search",
        [float(weighed.min())] * len(chosen),
        at_most=1.05,
        remark=f"the model alone: {never:.3g} s",
    )


def _workload(seeds: Sequence[int], count: int) -> Iterator[Line]:
    """Compare a delay by the size of the request with one for all, on a workload of notes and grades."""
    spec = spec_of(MIXED)
    played = {
        strategy: [
            play(hedge_of(spec, {"strategy": strategy, "percentile": 95.0}), mixed(count, seed)) for seed in seeds
        ]
        for strategy in ("workload", "percentile")
    }
    measures: dict[str, tuple[str, Callable[[Played], float], float | None]] = {
        "P99 of the slowdown": ("times", lambda each: each.slowdown, 1.0),
        "mean latency": ("s", lambda each: float(each.seconds.mean()), 1.0),
        "P95": ("s", lambda each: each.percentile(95), 1.0),
        "P99": ("s", lambda each: each.percentile(99), None),
        "extra requests of 100 calls": ("", lambda each: each.extra, None),
    }
    for name, (unit, measure, most) in measures.items():
        yield Line(
            "hedging",
            f"notes and grades mixed, workload 95: {name}",
            unit,
            [measure(each) for each in played["workload"]],
            "percentile 95",
            [measure(each) for each in played["percentile"]],
            at_most=most,
        )


def _overheads(repeats: int) -> Iterator[Line]:
    """Time calls of models that answer at once, in a composite and by themselves, by the processor's time."""
    specs = [_numbered(spec_of({"latency_seconds": 0}), number) for number in (1, 3, 4)]
    models = [Simulator(spec) for spec in specs]

    async def each(request: Request) -> Completion:
        return [await model(request) for model in models][-1]

    hedge = hedge_of(specs[0], {"strategy": "percentile", "percentile": 95.0})
    for what, composite, alone, calls in (
        ("a hedge around it", hedge, models[0], 1),
        ("an ensemble of it", _panel(specs[:1], models[:1]), models[0], 1),
        ("an ensemble of three of them, for each of its three calls", _panel(specs, models), each, 3),
    ):
        ours, theirs = [], []
        for _ in range(repeats):
            both, own = uvloop.run(_best(composite, alone))
            ours.append((both - own) / calls)
            theirs.append(own / calls)
        named = f"a call of a model that answers at once: what is added by {what}"
        yield Line("hedging", named, "µs", ours, "the model alone", theirs, limit=100)


def _panel(specs: list[ModelSpec], models: list[Simulator]) -> Ensemble:
    parameters = {"members": [spec.name for spec in specs]}
    panel = ModelSpec(id=2, name="panel", provider="ensemble", parameters=parameters, members=tuple(specs))
    return Ensemble(panel, [Member(spec, model) for spec, model in zip(specs, models, strict=True)])


def _numbered(spec: ModelSpec, number: int) -> ModelSpec:
    return spec.model_copy(update={"id": number, "name": f"simulated {number}"})


async def _best(*answers: Answer) -> list[float]:
    """Return the microseconds that a call takes of each, the best of a hundred times a hundred calls in turn.

    The best counts, for what else runs on the machine slows the caches, too.
    """
    question = Request(messages=(Message("user", "What is it?"),), item={"case": {"target": "nothing"}}, seed=1)

    async def microseconds(answer: Answer, count: int = 100) -> float:
        requests = [replace(question, trail=Trail(datetime.now(UTC))) for _ in range(count)]
        begun = time.process_time()
        for request in requests:
            await answer(request)
        return (time.process_time() - begun) / count * 1e6

    seen = [[await microseconds(answer) for answer in answers] for _ in range(100)]
    return [min(of_one) for of_one in zip(*seen, strict=True)]
