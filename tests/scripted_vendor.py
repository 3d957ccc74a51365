"""A vendor that answers over real HTTP what a test has scripted, and remembers what it was sent.

async with ScriptedVendor({"id": "file-1"}, Answer({}, status=404)) as vendor:
    ...  # ask vendor.url twice
    assert vendor.asked == ["POST /v1/files", "GET /v1/files/file-1"]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Sent:
    """One request as it arrived; header names are in lower case."""

    method: str
    path: str  # as it was sent, with its query
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """JSON, or bytes as they are; `breaks_off` ends the connection before the end of the answer."""

    payload: Any = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks_off: bool = False


DROPPED = Answer(breaks_off=True)  # no answer at all


class ScriptedVendor:
    """The server: `answers` come in turn (JSON stands for an Answer of it), or `decide` makes each."""

    def __init__(self, *answers: Any, decide: Callable[[Sent], Answer] | None = None) -> None:
        self.answers = list(answers)
        self.sent: list[Sent] = []
        self.url = ""
        self._decide = decide or self._next
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> ScriptedVendor:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def asked(self) -> list[str]:
        return [f"{sent.method} {sent.path}" for sent in self.sent]

    def _next(self, _: Sent) -> Answer:
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Answer) else Answer(answer)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.sent.append(Sent(request.method, request.raw_path, headers, await request.read()))
        answer = self._decide(self.sent[-1])
        body = answer.payload if isinstance(answer.payload, bytes) else json.dumps(answer.payload).encode()
        if not answer.breaks_off:
            return web.Response(status=answer.status, headers=answer.headers, body=body)
        response = web.StreamResponse(status=answer.status, headers=answer.headers)
        if body:
            await response.prepare(request)
            await response.write(body)
        assert request.transport is not None
        request.transport.close()
        return response
