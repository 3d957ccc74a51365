"""The response cache: what models answered, kept in the database for everybody.

An answer is found by a digest of all that shaped it: the model and its parameters, the question, which replication it
is and the run's seed. Names, prices, limits and ids are no part of it, nor is which try it was.

Questions of many callers go to the database together. While an answer that will be kept is on its way, a claim says so,
and whoever has the same question waits for it. A claim is taken when everything else is in hand, and nobody waits while
holding anything that a holder of a claim may need; so claims never wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from pgharness.database import TRANSIENT, Database, Row
from pgharness.errors import HarnessError, NotCached
from pgharness.gateway.callables import storable
from pgharness.gateway.calls import reads_items
from pgharness.types import Completion, ModelSpec, Request, Usage

logger = logging.getLogger(__name__)
Mode = Literal["off", "read", "write", "replay"]
_TOGETHER_SECONDS = 0.002  # so long a question waits for others
_POLL_SECONDS = (0.05, 0.25)
_MOST_KEYS = 500  # in one statement
_CLAIM_SECONDS = 60.0  # beyond what the calls of a model may take
_KEY_VERSION = 1
_KEPT_COLUMNS = (
    *("run_id", "model_id", "response_key", "response"),
    *("finish_reason", "request_id", "answered_by", "composition", "latency_ms"),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer from the cache, and what it had cost in USD."""

    completion: Completion
    cost_usd: float


class ResponseCache:
    """What one process asks of the cache. `worker_id` is the worker whose claims these are: they end with it."""

    def __init__(
        self, database: Database, worker_id: int, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._database = database
        self._worker_id = worker_id
        self._sleep = sleep
        self._looks: dict[bytes, list[asyncio.Future[Row]]] = {}
        self._claims: dict[bytes, tuple[float, list[asyncio.Future[Row]]]] = {}
        self._waits: dict[bytes, list[asyncio.Future[Row]]] = {}
        self._held: dict[bytes, asyncio.Future[Row]] = {}  # who in this process asks a question
        self._kept: list[Row] = []
        self._released: list[bytes] = []
        self._has_news = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def answers(self, mode: Mode, run_id: int) -> Answers | None:
        """Return the cache as a run uses it; None for one that does not."""
        return None if mode == "off" else Answers(self, mode, run_id)

    async def look(self, key: bytes) -> Stored | None:
        """Return the answer to a question, if there is one."""
        return _stored(await self._asked(self._looks.setdefault(key, []), self._seek))

    async def claim(self, key: bytes, seconds: float) -> Stored | bool:
        """Try to become the one who asks a question: true, or the answer, or false when somebody asks it now."""
        row = await self._asked(self._claims.setdefault(key, (seconds, []))[1], self._seek)
        return _stored(row) or row["state"] == "mine"

    async def wait(self, key: bytes) -> Stored | None:
        """Return the answer to a question that somebody asks, or None once nobody does."""
        return _stored(await self._asked(self._waits.setdefault(key, []), self._poll))

    def keep(self, call: Row) -> None:
        """Have the answer of a call kept soon, whatever becomes of its item; that ends the claim of its question."""
        self._kept.append(call)
        self._start(self._write)

    def release(self, key: bytes) -> None:
        """Give up a claim, because there is no answer."""
        self._released.append(key)
        self._start(self._write)

    def hear(self, keys: Iterable[bytes]) -> None:
        """These questions have answers now, or no claim: those who wait for them look at once."""
        for key in keys:
            self._held.pop(key, None)
            if key in self._waits:
                self._has_news.set()

    async def close(self) -> None:
        """Write what is left and stop."""
        for name in ("_seek", "_poll"):
            if name in self._tasks:
                self._tasks[name].cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        name = work.__name__
        if name not in self._tasks or self._tasks[name].done():
            self._tasks[name] = asyncio.create_task(work())

    async def _asked(self, places: list[asyncio.Future[Row]], work: Callable[[], Coroutine[Any, Any, None]]) -> Row:
        future: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        places.append(future)
        self._start(work)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._disown(future.result())  # it came in the very step in which it was no longer wanted
            raise

    def _disown(self, row: Row) -> None:
        if row["state"] == "mine":
            self.release(bytes(row["key"]))

    async def _seek(self) -> None:
        """Take what is asked to the database, one statement at a time.

        The database gives a worker its own claims again, because it may not have heard of them; so what somebody in
        this process asks already is only looked at.
        """
        while self._looks or self._claims:
            await self._sleep(_TOGETHER_SECONDS)
            looks = {key: self._looks.pop(key) for key in list(self._looks)[:_MOST_KEYS]}
            claims = {key: self._claims.pop(key) for key in list(self._claims)[:_MOST_KEYS]}
            new = {key: seconds for key, (seconds, _) in claims.items() if key not in self._held}
            futures = [future for found in looks.values() for future in found]
            futures += [future for _, found in claims.values() for future in found]
            try:
                rows = await self._database.persist(
                    "seek_responses",
                    worker_id=self._worker_id,
                    keys=[*looks, *(key for key in claims if key in self._held)],
                    claims=list(new),
                    seconds=list(new.values()),
                )
            except Exception as exc:
                _fail(futures, exc)
                for key in new:  # it may have been granted all the same
                    self.release(key)
                continue
            for row in rows:
                key = bytes(row["key"])
                others = row | {"state": "taken"} if row["state"] == "mine" else row
                _tell(looks.get(key, ()), others)
                if key in new:
                    self._grant(claims[key][1], row, others)
                elif key in claims and row["state"] == "free":  # it was given up meanwhile
                    self._held.pop(key, None)
                    self._claims.setdefault(key, (claims[key][0], []))[1].extend(claims[key][1])
                elif key in claims:
                    _tell(claims[key][1], row)

    def _grant(self, claimants: Sequence[asyncio.Future[Row]], row: Row, others: Row) -> None:
        """Tell claimants of one question how it stands; one of them asks."""
        waiting = [future for future in claimants if not future.done()]
        if row["state"] == "mine":
            self._held[bytes(row["key"])] = waiting[0] if waiting else claimants[0]
            if not waiting:
                self._disown(row)
        _tell(waiting[:1], row)
        _tell(waiting[1:], others)

    async def _poll(self) -> None:
        """Look again and again for what others ask, for all who wait in one statement."""
        pause, most = _POLL_SECONDS
        while self._waits:
            await self._paused(pause)
            keys = list(self._waits)[:_MOST_KEYS]
            try:
                rows = await self._database.persist("seek_responses", worker_id=self._worker_id, keys=keys)
            except Exception as exc:
                _fail([future for key in keys for future in self._waits.pop(key)], exc)
                continue
            ended = [row for row in rows if row["state"] != "taken"]
            for row in ended:
                _tell(self._waits.pop(bytes(row["key"])), row)
            for key in keys:
                if key in self._waits:  # behind those that were not looked at
                    found = [future for future in self._waits.pop(key) if not future.done()]
                    if found:
                        self._waits[key] = found
            pause = _POLL_SECONDS[0] if ended else min(pause * 1.5, most)

    async def _paused(self, seconds: float) -> None:
        ends = [asyncio.ensure_future(self._sleep(seconds)), asyncio.ensure_future(self._has_news.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        self._has_news.clear()

    async def _write(self) -> None:
        while self._kept or self._released:
            kept, self._kept = self._kept[:_MOST_KEYS], self._kept[_MOST_KEYS:]
            released, self._released = self._released, []
            heard = [bytes.fromhex(call["response_key"][2:]) for call in kept] + released
            ended = {key: self._held.get(key) for key in heard}
            try:
                if kept:
                    await self._database.persist("keep_responses", calls=_dumped(kept))
            except Exception as exc:  # they will be asked again
                logger.warning("%s answers could not be kept: %s", len(kept), exc)
                released = heard
            if released:
                with contextlib.suppress(HarnessError, *TRANSIENT):
                    await self._database.persist("release_responses", worker_id=self._worker_id, keys=released)
            self.hear(key for key, holder in ended.items() if self._held.get(key) is holder)


class Answers:
    """The response cache as one run uses it."""

    def __init__(self, cache: ResponseCache, mode: Mode, run_id: int) -> None:
        self._cache = cache
        self._mode = mode
        self._run_id = run_id
        self._identities: dict[int, tuple[ModelSpec, Row]] = {}

    @property
    def keeps(self) -> bool:
        """Whether new answers are kept."""
        return self._mode == "write"

    @property
    def may_ask(self) -> bool:
        """Whether a model may be asked at all."""
        return self._mode != "replay"

    def key(self, spec: ModelSpec, request: Request, *, is_member: bool = False) -> bytes:
        """Return the digest of all that shapes the answer to a request.

        What was said of an answer that could not be used is a part of a member's question. Of an item's own question it
        is none: what the item got in the end is the answer to what it was asked.
        """
        messages = request.messages if is_member or request.question is None else request.question
        parameters: Mapping[str, Any] = request.parameters
        if not spec.members:
            parameters = {**spec.parameters, **parameters}
        question = {
            "version": _KEY_VERSION,
            "model": self._identity(spec),
            "parameters": parameters,
            "is_reasoning": spec.is_reasoning or request.is_reasoning,
            "messages": [(message.role, message.content) for message in messages],
            "schema": request.schema,
            "schema_name": request.schema_name if request.schema is not None else None,
            "replication": (request.replication, request.note_replication),
            "run_seed": request.run_seed,
            "number": request.number,
            "rejected": request.rejected if is_member else 0,
        }
        if reads_items(spec):
            question["item"] = {name: value for name, value in request.item.items() if name != "run"}
        return hashlib.sha256(_canonical(question)).digest()

    def _identity(self, spec: ModelSpec) -> Row:
        known = self._identities.get(id(spec))
        if known is None:
            known = self._identities[id(spec)] = spec, _identity(spec)
        return known[1]

    async def found(
        self, spec: ModelSpec, key: bytes, ask: Callable[[], Awaitable[Completion | None]]
    ) -> Stored | Completion:
        """Return the answer that is there, or else what asking gave.

        `ask` makes the call once it has claimed it, and returns None when somebody else has. Raises what it raises,
        and NotCached.
        """
        stored = await self.look(spec, key)
        while stored is None:
            completion = await ask()
            if completion is not None:
                return completion
            stored = await self.wait(key)
        return stored

    async def look(self, spec: ModelSpec, key: bytes) -> Stored | None:
        """Return the answer that is there. Raises NotCached when there is none and the run only replays."""
        stored = await self._cache.look(key)
        if stored is None and self._mode == "replay":
            raise NotCached(
                f"the response cache has no answer of model '{spec.name}' to this, and the run only replays",
                hint="Run it once with response_cache => 'write', which asks and keeps the answers; "
                "then select pgharness.retry_failed(run_id => ...);",
            )
        return stored

    async def claim(self, spec: ModelSpec, key: bytes) -> Stored | bool:
        """Ask whether to make the call now: true, or the answer, or false when to `wait` for somebody else's."""
        return True if not self.keeps else await self._cache.claim(key, 2 * _longest(spec) + _CLAIM_SECONDS)

    async def wait(self, key: bytes) -> Stored | None:
        """Return the answer that somebody else asks for now, or None when nobody does any more."""
        return await self._cache.wait(key)

    def entry(self, key: bytes, call: Row, completion: Completion, members: Iterable[Row], *, replaces: bool) -> Row:
        """Return what a call's row says so that its answer is kept with it; nothing unless the run keeps answers.

        `members` are the calls that a composite made for it. `replaces` is for an answer of no use in the cache.
        """
        if not self.keeps:
            return {}
        calls = list(members) or [call]
        response = {
            "answer": completion.text,
            "data": None if completion.data is None else json.dumps(completion.data, ensure_ascii=False),
            "input_tokens": completion.usage.input_tokens,
            "output_tokens": completion.usage.output_tokens,
            "cached_tokens": completion.usage.cached_tokens,
            "confidence": completion.confidence,
            # of a member that was answered from the cache, what it would have cost
            "cost_usd": sum(made.get("cost_usd", 0.0) + made.get("saved_usd", 0.0) for made in calls),
        }
        return {"response_key": f"\\x{key.hex()}", "response": response | ({"replaces": True} if replaces else {})}

    def keep(self, key: bytes, call: Row, completion: Completion, members: Iterable[Row] = ()) -> Row:
        """Have an answer kept soon; returns what its call's row says of that."""
        entry = self.entry(key, call, completion, members, replaces=False)
        if entry:
            self._cache.keep({"run_id": self._run_id, **call, **entry})
        return {name: value for name, value in entry.items() if name == "response_key"}

    def release(self, key: bytes) -> None:
        """Let others ask, because there is no answer."""
        if self.keeps:
            self._cache.release(key)


def _identity(spec: ModelSpec) -> Row:
    """Return what of a model shapes its answers."""
    identity: Row = {"provider": spec.provider, "model": spec.model, "base_url": spec.base_url}
    if spec.provider == "simulator":
        identity["name"] = spec.name  # it draws from it
    if spec.members:
        options = {name: value for name, value in spec.parameters.items() if name != "members"}
        named: Any = spec.parameters.get("members")
        shares = [
            {name: value for name, value in each.items() if name != "model"} if isinstance(each, dict) else {}
            for each in (named if isinstance(named, list) else [])
        ]
        identity |= {"options": options, "shares": shares, "members": [_member(member) for member in spec.members]}
    return identity


def _member(spec: ModelSpec) -> Row:
    return _identity(spec) | {"parameters": {} if spec.members else spec.parameters, "is_reasoning": spec.is_reasoning}


def _longest(spec: ModelSpec) -> float:
    """Return how many seconds a call of a model may take: a composite may ask its members one after the other."""
    return sum(map(_longest, spec.members)) or spec.timeout_seconds


def _canonical(value: Any) -> bytes:
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # half a character, or an integer of more than 64 bits
        return json.dumps(value, sort_keys=True, default=str).encode()


def _dumped(calls: Sequence[Row]) -> str:
    return json.dumps(storable([{name: call.get(name) for name in _KEPT_COLUMNS} for call in calls]), default=str)


def _stored(row: Row) -> Stored | None:
    if row["state"] != "found":
        return None
    completion = Completion(
        text=row["answer"],
        data=None if row["data"] is None else json.loads(row["data"]),
        usage=Usage(row["input_tokens"], row["output_tokens"], row["cached_tokens"]),
        finish_reason=row["finish_reason"],
        request_id=row["request_id"],
        model=row["answered_by"],
        confidence=row["confidence"],
        composition=row["composition"],
        is_cached=True,
    )
    return Stored(completion, float(row["cost_usd"]))


def _tell(futures: Iterable[asyncio.Future[Row]], row: Row) -> None:
    for future in futures:
        if not future.done():
            future.set_result(row)


def _fail(futures: Iterable[asyncio.Future[Row]], error: Exception) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)
