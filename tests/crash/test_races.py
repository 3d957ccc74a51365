"""Two things at once inside one worker: an engine on a real database, with a model that answers when the test says so.

Each test is a moment at which a worker once lost an item, a call or a place, or could have.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import pytest

import world
from pgharness.database import Database, Line
from pgharness.execution import Engine, HandedBack, Slice
from pgharness.execution import slices as loading
from pgharness.execution.recorder import Recorder
from pgharness.gateway.limits import Limits
from pgharness.types import Completion, ModelSpec, Request


class Calls:
    """A model: its calls in flight by case, each ended by `answer`."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Future[Any]] = {}
        self.started: list[str] = []
        self.cancelled: list[str] = []

    async def __call__(self, request: Request) -> Completion:
        name = request.item["case"]["name"]
        self.started.append(name)
        self.open[name] = asyncio.get_running_loop().create_future()
        try:
            text = await self.open[name]
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            del self.open[name]
        return Completion(text=text) if isinstance(text, str) else Completion(text="data", data=text)

    def answer(self, text: object = "a note") -> None:
        for call in self.open.values():
            if not call.done():
                call.set_result(text)

    def completer(self, spec: ModelSpec, *_: object) -> Calls:
        return self


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def opened(lab: Any, model: Any, *, concurrency: int = 2, kind: Any = Engine) -> AsyncIterator[Any]:
    """An engine on the lab's database, as a registered worker."""
    pool = Database(lab.url, size=4)
    async with pool.opened():
        engine = kind(pool, model, worker_id=await registered(pool), concurrency=concurrency)
        try:
            yield engine
        finally:
            engine.abort()
            await engine.close()


async def registered(pool: Database) -> int:
    columns: Mapping[str, Any] = {"host": "here", "pid": random.getrandbits(30), "version": "0", "queues": ["note"]}
    found = await pool.call("register_worker", **columns, concurrency=1)
    worker_id: int = found[0]["register_worker"]
    return worker_id


def sliced(run_id: int, first: int, last: int, *, epoch: int = 0, **more: Any) -> Slice:
    return Slice(run_id, "note", epoch, first=first, last=last, **more)


def states(lab: Any) -> list[dict[str, Any]]:
    """What the database says of runs, as a heartbeat answers it."""
    columns = ("run_id", "status", "epoch")
    return [dict(zip(columns, row, strict=True)) for row in lab.rows("select id, status, epoch from pgharness.runs")]


def note_count(lab: Any) -> int:
    count: int = lab.value("select count(*) from pgharness.notes")
    return count


@pytest.fixture
def run_id(lab: Any) -> int:
    lab.simulator()
    lab.instance(cases=8, generator="sim")
    started: int = lab.start()
    return started


async def test_a_cancelled_run_aborts_the_calls_of_slices_that_were_loaded_at_once(lab: Any, run_id: int) -> None:
    model = Calls()
    async with opened(lab, model, concurrency=8) as engine:
        slices = [asyncio.create_task(engine.run_slice(sliced(run_id, first, first + 1))) for first in (0, 2, 4, 6)]
        await until(lambda: len(model.open) == 8)
        lab.db.execute("select pgharness.cancel_run(1)")
        engine.apply_states(states(lab))
        await until(lambda: len(model.cancelled) == 8, 2)
        await asyncio.gather(*slices)
        assert engine.open_runs == []


async def test_a_resumed_run_loses_no_item_that_waited_when_it_was_paused(lab: Any, run_id: int) -> None:
    model = Calls()
    async with opened(lab, model) as engine:
        first = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 7)))
        await until(lambda: len(model.open) == 2)
        lab.db.execute("select pgharness.pause_run(1)")
        engine.apply_states(states(lab))
        lab.db.execute("select pgharness.resume_run(1)")
        second = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 7, epoch=1)))
        while not (first.done() and second.done()):
            await until(lambda: model.open or (first.done() and second.done()))
            model.answer()
            await asyncio.sleep(0.005)
        await asyncio.gather(first, second)
        assert note_count(lab) == 8
        assert sorted(model.started) == sorted(set(model.started)), "an item was asked for twice"
    lab.assert_complete(run_id)


async def test_a_slice_ends_only_when_an_item_that_another_one_has_in_flight_is_durable(lab: Any, run_id: int) -> None:
    model = Calls()
    async with opened(lab, model) as engine:
        first = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 0)))
        await until(lambda: model.open)
        second = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 0)))
        other = asyncio.create_task(engine.run_slice(sliced(run_id, 1, 1)))
        await until(lambda: len(model.open) == 2)
        assert not second.done()
        first_call = model.open["trial-1"]
        first_call.cancel()  # as if only that call were aborted: the second slice has to make the note
        await until(lambda: len(model.started) == 3)
        model.answer()
        await asyncio.gather(second, other)
        with contextlib.suppress(HandedBack):
            await first
        assert note_count(lab) == 2


async def test_paused_items_wait_for_nothing(lab: Any, run_id: int) -> None:
    """Or a paused run would keep others from the worker for as long as its calls take."""
    model = Calls()
    async with opened(lab, model) as engine:
        work = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 7)))
        await until(lambda: len(model.open) == 2)
        lab.db.execute("select pgharness.pause_run(1)")
        engine.apply_states(states(lab))
        await asyncio.wait_for(engine.wait_for_room(), 1)
        assert len(model.open) == 2
        model.answer()
        await work
        assert note_count(lab) == 2 and len(model.started) == 2


async def test_drain_hands_back_at_once_what_waits_for_a_blocked_model(lab: Any) -> None:
    lab.simulator("limited", requests_per_minute=600)
    lab.instance(cases=4, generator="limited")
    run_id = lab.start()
    lab.db.execute("select pgharness.block_model(id, 3600) from pgharness.models where name = 'limited'")
    model = Calls()
    async with opened(lab, model) as engine:
        work = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 3)))
        await until(lambda: lab.value("select count(*) from pgharness.model_limits") and engine.open_runs)
        engine.drain()
        with pytest.raises(HandedBack):
            await asyncio.wait_for(work, 2)
        assert model.started == []


async def test_items_that_were_given_away_and_come_back_at_once_are_made(lab: Any, run_id: int) -> None:
    lab.db.execute("delete from procrastinate.procrastinate_jobs")
    lab.db.execute("select pgharness._defer_range(%s, 'note', 0, 7, 8)", (run_id,))
    worker_id = world.register(lab.db)
    job = world.take(lab.db, worker_id)
    assert job is not None
    slices: list[asyncio.Task[None]] = []

    class Fast(Database):
        """Fetches the new job before it has heard that it was made."""

        async def call(self, function: str, /, **arguments: Any) -> list[dict[str, Any]]:
            answer = await super().call(function, **arguments)
            if function == "share_slice":
                given = Slice(run_id, "note", 0, ordinals=arguments["ordinals"])
                slices.append(asyncio.create_task(giver.run_slice(given)))
                await until(lambda: any(item.twins for item in giver._claims.values()))
            return answer

    model, pool = Calls(), Fast(lab.url, size=4)
    async with pool.opened():
        giver = Engine(pool, model, worker_id=worker_id, concurrency=2)  # type: ignore[arg-type]
        slices.append(asyncio.create_task(giver.run_slice(Slice(**job["args"], job_id=job["id"]))))
        await until(lambda: len(model.open) == 2)
        giver.apply_states([{"run_id": run_id, "status": "running", "epoch": 0, "idle_elsewhere": 10}])
        await until(lambda: len(slices) == 2)
        while not all(each.done() for each in slices):
            model.answer()
            await asyncio.sleep(0.005)
        await asyncio.gather(*slices)
        await giver.close()
    assert note_count(lab) == 8 and sorted(model.started) == sorted(set(model.started))


async def test_an_abort_keeps_what_has_been_answered(lab: Any, run_id: int) -> None:
    model = Calls()
    async with opened(lab, model) as engine:
        work = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 7)))
        await until(lambda: len(model.open) == 2)
        model.answer()
        await until(lambda: not engine.in_flight or len(model.started) > 2)
        engine.abort()
        with pytest.raises(HandedBack):
            await asyncio.wait_for(work, 5)
        await until(lambda: note_count(lab) == 2)
    calls = dict(lab.rows("select outcome, count(*) from pgharness.calls group by 1"))
    assert calls["succeeded"] == 2 and sum(calls.values()) == len(model.started)


class _CancelsFirst(Engine):
    """An engine that learns of a cancellation after an item's task was made, and before its first step."""

    has_heard = False

    def _fill_places(self) -> None:
        super()._fill_places()
        if self.in_flight and not self.has_heard:
            self.has_heard = True
            self.apply_states([{"run_id": self.open_runs[0], "status": "cancelled", "epoch": 0}])


async def test_items_that_were_cancelled_before_their_first_step_leave_their_places(lab: Any, run_id: int) -> None:
    model = Calls()
    async with opened(lab, model, kind=_CancelsFirst) as engine:
        with contextlib.suppress(HandedBack):
            await engine.run_slice(sliced(run_id, 0, 7))
        await asyncio.wait_for(engine.wait_for_room(), 1)
        assert model.started == []


async def test_inputs_that_others_push_out_of_the_cache_are_not_missed(
    lab: Any, run_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_CACHED_INPUTS", 2)
    model = Calls()
    async with opened(lab, model, concurrency=100) as busy:
        slices = []
        for parts in ([(0, 1)], [(0, 3), (4, 7)] * 5, [(1, 2), (2, 5), (6, 6)] * 5):
            slices += [asyncio.create_task(busy.run_slice(sliced(run_id, *part))) for part in parts]
            await until(lambda: len(model.open) >= parts[0][1] + 1)  # noqa: B023
        while not all(work.done() for work in slices):
            model.answer()
            await asyncio.sleep(0.005)
        await asyncio.gather(*slices)
    lab.assert_complete(run_id)


async def test_a_setting_that_cannot_be_used_fails_its_items_and_not_the_worker(lab: Any) -> None:
    lab.model("odd", "openai", model="m", parameters={"max_tokens": "many"}, tokens_per_minute=1000)
    lab.instance(cases=2, generator="odd", max_attempts=1, failure_threshold=1)
    run_id = lab.start()
    async with opened(lab, Calls()) as engine:
        await engine.run_slice(sliced(run_id, 0, 1))
    failures = lab.rows("select status, cause, error, answer from pgharness.failures")
    assert [row[:2] for row in failures] == [("failed", "code_failed")] * 2
    assert all("many" in error and "Traceback" in answer for _, _, error, answer in failures)


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize("depth", [800, 100_000], ids=["for the server", "for Python"])
async def test_an_answer_that_is_nested_too_deep_fails_its_item_and_no_other(lab: Any, run_id: int, depth: int) -> None:
    name = lab.value("select current_database()")
    lab.db.execute(f"alter database {name} set max_stack_depth = '100kB'")
    model = Calls()
    async with opened(lab, model, concurrency=8) as engine:
        work = asyncio.create_task(engine.run_slice(sliced(run_id, 0, 7)))
        await until(lambda: len(model.open) == 8)
        model.open["trial-1"].set_result(nested(depth))
        await until(lambda: lab.value("select count(*) from pgharness.failures"))
        model.answer()
        await work
    assert note_count(lab) == 7
    assert lab.rows("select cause, status from pgharness.failures") == [("not_recordable", "failed")]
    assert lab.value("select count(*) from pgharness.calls") == 8, "the refused call was paid as well"


async def test_the_recorder_survives_errors_that_nobody_foresaw(lab: Any) -> None:
    class Faulty(Line):
        def call(self, function: str, /, **arguments: object) -> list[dict[str, Any]]:
            raise ZeroDivisionError

    lost: list[Any] = []
    recorder = Recorder(
        Faulty(lab.url), 1, keeps_grades=False, on_written=lambda *_: None, on_lost=lambda *told: lost.append(told)
    )
    outcome = {"run_id": 1, "kind": "note", "ordinal": 0, "attempt": 1, "result": "succeeded", "calls": []}
    for number in range(2):
        recorder.add(outcome, number)
        await until(lambda: lost and lost[-1][0] == number, 2)  # noqa: B023
        assert lost[-1][0] == number and isinstance(lost[-1][1], ZeroDivisionError)
    await recorder.close()


# -- the limits of a model, shared


def spec(lab: Any, name: str) -> ModelSpec:
    row = lab.value("select to_jsonb(m) from pgharness.models as m where name = %s", name)
    return ModelSpec.model_validate(row)


class Shared:
    """The limits of one worker, whose callers wait until a model's gate admits them."""

    def __init__(self, pool: Database, worker_id: int) -> None:
        self.limits = Limits(pool, worker_id, self._wake)
        self._changed = asyncio.Event()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def slot(self, model: ModelSpec) -> AsyncIterator[None]:
        gate = self.limits.of_model(model)
        assert gate is not None
        gate.waiting += 1
        try:
            while not gate.admits():
                await self._changed.wait()
        finally:
            gate.waiting -= 1
        gate.enter()
        try:
            yield
        finally:
            gate.leave()
            self._wake()


async def test_workers_that_come_and_go_never_exceed_a_models_concurrency_together(lab: Any) -> None:
    lab.simulator("scarce", max_concurrency=3)
    model, rng = spec(lab, "scarce"), random.Random(7)
    in_flight = most = done = 0

    async def call(limits: Shared) -> None:
        nonlocal in_flight, most, done
        async with limits.slot(model):
            in_flight += 1
            most = max(most, in_flight)
            try:
                await asyncio.sleep(rng.random() * 0.02)
            finally:
                in_flight -= 1
        done += 1

    async def work(limits: Shared) -> None:
        for _ in range(12):  # bursts, with pauses in which everything is given back
            calls = [asyncio.create_task(call(limits)) for _ in range(rng.randrange(1, 6))]
            if rng.random() < 0.3:
                calls[-1].cancel()
            await asyncio.wait(calls, timeout=30)
            assert all(each.done() for each in calls), "a caller waits for ever"
            await asyncio.sleep(rng.random() * 0.05)

    pool = Database(lab.url, size=6)
    async with pool.opened():
        shared = [Shared(pool, await registered(pool)) for _ in range(3)]
        await asyncio.gather(*(work(limits) for limits in shared))
        await asyncio.gather(*(each.limits.close() for each in shared))
    assert most <= 3 and done > 60


async def test_a_wait_that_a_provider_asked_of_one_worker_reaches_another_that_was_idle(lab: Any) -> None:
    lab.model("vendor", "openai", model="m", base_url="http://127.0.0.1:1")
    model = spec(lab, "vendor")
    pool = Database(lab.url, size=4)
    async with pool.opened():
        here, there = Shared(pool, await registered(pool)), Shared(pool, await registered(pool))
        for limits in (here, there):
            async with limits.slot(model):
                pass
        await until(lambda: lab.value("select count(*) from pgharness.model_limits"))
        here.limits.block(model.id, 3600)
        await until(lambda: lab.value("select blocked_until is not null from pgharness.model_limits"))
        async with asyncio.timeout(5):
            with contextlib.suppress(TimeoutError):
                while True:
                    async with asyncio.timeout(0.5), there.slot(model):
                        await asyncio.sleep(0.05)
        await asyncio.gather(here.limits.close(), there.limits.close())


async def test_a_run_that_starts_is_welcome_however_much_of_others_waits(lab: Any) -> None:
    lab.simulator()
    lab.instance("big", cases=10, generator="sim", note_replications=200)
    lab.instance("small", cases=10, generator="sim", note_replications=200)
    big, small = lab.start("big"), lab.start("small")
    async with opened(lab, Calls(), concurrency=20) as engine:
        work = [asyncio.create_task(engine.run_slice(sliced(big, 0, 1_499)))]
        await until(lambda: engine.narrowed == {"except_runs": [big]})
        engine.hear_news()
        assert not engine.welcomes(big)
        engine.hear_news()
        assert engine.welcomes(small)
        # but runs of which little waits are not taken without end
        runs = [lab.start("small") for _ in range(70)]
        work += [asyncio.create_task(engine.run_slice(sliced(run_id, 0, 17))) for run_id in runs]
        await until(lambda: len(engine.open_runs) == 71 and sum(run.waiting for run in engine._runs.values()) > 2_500)
        engine.hear_news()
        assert not engine.welcomes(small)
        engine.abort()
        await asyncio.gather(*work, return_exceptions=True)
