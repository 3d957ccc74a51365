"""Several keys of one model: used in turn, and one that is refused rests while the others go on."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from pgharness.errors import RateLimited, RequestRejected
from pgharness.gateway.transport import Transport
from pgharness.types import Message, ModelSpec, Request
from scripted_vendor import Answer, ScriptedVendor, Sent

ANSWER = {"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}], "usage": {}}
REQUEST = Request((Message("user", "How are you?"),))
NAMES = ["HOUSE_KEY", "HOUSE_KEY_2", "SPARE_TOKEN"]


class Vendor:
    """An API that knows its keys by what it is told to answer them; its clock stands still unless moved."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked: Counter[str] = Counter()
        self.refusals: dict[str, Answer] = {}
        self.server = ScriptedVendor(decide=self.answer)
        self.transport = Transport(clock=lambda: self.now)

    def answer(self, sent: Sent) -> Answer:
        key = sent.headers["authorization"].removeprefix("Bearer ")
        self.asked[key] += 1
        return self.refusals.get(key) or Answer(ANSWER)

    def spec(self, names: str = ", ".join(NAMES)) -> ModelSpec:
        values = {"id": 1, "name": "m", "provider": "openai_compatible", "model": "m", "api_key_env": names}
        return ModelSpec.model_validate(values | {"base_url": f"{self.server.url}/v1"})


@pytest.fixture
async def vendor(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Vendor]:
    for number, name in enumerate(NAMES):
        monkeypatch.setenv(name, f"secret-number-{number}")
    vendor = Vendor()
    async with vendor.server, contextlib.aclosing(vendor.transport):
        yield vendor


def refusal(status: int, **headers: str) -> Answer:
    return Answer({"error": {"message": "no"}}, status, headers)


async def test_keys_are_used_in_turn(vendor: Vendor) -> None:
    ask = vendor.transport.completer(vendor.spec())
    for _ in range(9):
        await ask(REQUEST)
    assert vendor.asked == {"secret-number-0": 3, "secret-number-1": 3, "secret-number-2": 3}


async def test_a_key_over_its_limit_rests_as_long_as_it_was_told_while_the_others_go_on(vendor: Vendor) -> None:
    ask = vendor.transport.completer(vendor.spec())
    vendor.refusals["secret-number-0"] = refusal(429, **{"retry-after": "10"})
    with pytest.raises(RateLimited):
        await ask(REQUEST)
    vendor.refusals.clear()
    for _ in range(6):
        await ask(REQUEST)
    assert vendor.asked == {"secret-number-0": 1, "secret-number-1": 3, "secret-number-2": 3}
    vendor.now += 10
    for _ in range(3):
        await ask(REQUEST)
    assert vendor.asked["secret-number-0"] == 2


async def test_when_all_rest_the_one_that_comes_back_first_is_asked(vendor: Vendor) -> None:
    ask = vendor.transport.completer(vendor.spec())
    for number, seconds in enumerate((30, 5, 20)):
        vendor.refusals[f"secret-number-{number}"] = refusal(429, **{"retry-after": str(seconds)})
    for _ in NAMES:
        with pytest.raises(RateLimited):
            await ask(REQUEST)
    vendor.refusals.clear()
    await ask(REQUEST)
    assert vendor.asked["secret-number-1"] == 2


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_is_not_accepted_costs_no_call(vendor: Vendor, status: int) -> None:
    ask = vendor.transport.completer(vendor.spec())
    vendor.refusals["secret-number-0"] = refusal(status)
    for _ in range(4):
        assert (await ask(REQUEST)).text == "fine"
    assert vendor.asked["secret-number-0"] == 1


async def test_when_no_key_is_accepted_the_call_is_rejected_and_names_none_of_them(vendor: Vendor) -> None:
    ask = vendor.transport.completer(vendor.spec())
    for number in range(3):
        vendor.refusals[f"secret-number-{number}"] = Answer(
            {"error": {"message": f"Incorrect API key provided: secret-number-{number}."}}, 401
        )
    with pytest.raises(RequestRejected) as caught:
        await ask(REQUEST)
    assert sum(vendor.asked.values()) == 3
    assert "secret-number" not in json.dumps([str(caught.value), caught.value.hint, repr(caught.value.args)])


async def test_a_key_that_this_host_lacks_is_passed_over(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOUSE_KEY")
    ask = vendor.transport.completer(vendor.spec())
    for _ in range(4):
        await ask(REQUEST)
    assert vendor.asked == {"secret-number-1": 2, "secret-number-2": 2}
    with pytest.raises(RequestRejected, match="HOUSE_KEY, which is not set"):
        await vendor.transport.completer(vendor.spec("HOUSE_KEY"))(REQUEST)


async def test_a_limit_of_a_single_key_is_said_as_before(vendor: Vendor) -> None:
    vendor.refusals["secret-number-0"] = refusal(429, **{"retry-after": "7"})
    ask = vendor.transport.completer(vendor.spec("HOUSE_KEY"))
    for _ in range(2):
        with pytest.raises(RateLimited) as caught:
            await ask(REQUEST)
        assert caught.value.retry_after == 7
