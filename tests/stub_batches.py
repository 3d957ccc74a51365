"""A stand-in for the batch endpoints of OpenAI and Anthropic, with their live ones beside them: one real HTTP server.

    with serving() as vendor:
        spec = ModelSpec(provider="openai", base_url=vendor.base_url("openai"), ...)
        ...
        assert vendor.problems == []         # what the requests got wrong, had the vendor been asked
        assert vendor.billed == {("openai", "question"): 1}

It counts what it bills by provider and question (the last user message), in batches and in live calls. A batch ends after
so many polls, fails or expires in parts as it is told, and hangs at any step once, so that who asked can be killed.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from aiohttp import web

from stub_provider import _CHECKS, Recorded, _answer, example

Fate = Literal["succeeded", "errored", "rejected", "expired"]
STEPS = ("upload:before", "upload:after", "create:before", "create:after", "poll", "results", "cancel")


@dataclass
class Held:
    """A batch as the vendor keeps it."""

    id: str
    provider: str
    requests: list[tuple[str, dict[str, Any]]]
    created_at: datetime
    metadata: dict[str, str] = field(default_factory=dict)
    input_file: str = ""
    polls: int = 0
    is_cancelled: bool = False
    state: Literal["running", "ended", "failed"] = "running"
    fates: dict[str, str] = field(default_factory=dict)  # by custom_id
    output_file: str | None = None
    error_file: str | None = None
    error: str | None = None


class BatchVendor:
    """The server. Its attributes script what comes; `billed`, `batches`, `files` and `log` are what came."""

    def __init__(self) -> None:
        self.polls_to_end = 1
        self.done_before_cancel = 0  # how many requests of a batch it has done when it is told to cancel it
        self.fate: Callable[[str, int], Fate] = lambda question, times_asked: "succeeded"
        self.answer: Callable[[str], str] = lambda question: f"Note on: {question}"
        self.validation_errors: list[str] = []  # codes with which the next batches fail, one each
        self.refusals: dict[str, list[int]] = {}  # statuses of the next answers, by step
        self.holds: set[str] = set()  # steps at which it hangs once
        self.reached = threading.Event()
        self.billed: Counter[tuple[str, str]] = Counter()
        self.live: Counter[tuple[str, str]] = Counter()
        self.asked: Counter[str] = Counter()
        self.batches: dict[str, Held] = {}
        self.files: dict[str, tuple[str, bytes]] = {}
        self.log: list[str] = []
        self.problems: list[str] = []
        self.url = ""
        self._number = 0
        self._runner: web.AppRunner | None = None

    def base_url(self, provider: str) -> str:
        """Return the base_url of a model of this provider."""
        return self.url + ("/anthropic" if provider == "anthropic" else "/openai/v1")

    async def start(self) -> None:
        app = web.Application(client_max_size=512 * 1024 * 1024)
        root = "/openai/v1"
        app.router.add_post(f"{root}/chat/completions", self._live("openai"))
        app.router.add_post(f"{root}/responses", self._live("openai_responses"))
        app.router.add_post(f"{root}/files", self._upload)
        app.router.add_get(f"{root}/files", self._list_files)
        app.router.add_get(f"{root}/files/{{id}}/content", self._content)
        app.router.add_delete(f"{root}/files/{{id}}", self._delete_file)
        app.router.add_post(f"{root}/batches", self._create)
        app.router.add_get(f"{root}/batches", self._list)
        app.router.add_get(f"{root}/batches/{{id}}", self._poll)
        app.router.add_post(f"{root}/batches/{{id}}/cancel", self._cancel)
        root = "/anthropic/v1/messages"
        app.router.add_post(root, self._live("anthropic"))
        app.router.add_post(f"{root}/batches", self._create)
        app.router.add_get(f"{root}/batches", self._list)
        app.router.add_get(f"{root}/batches/{{id}}", self._poll)
        app.router.add_get(f"{root}/batches/{{id}}/results", self._content)
        app.router.add_post(f"{root}/batches/{{id}}/cancel", self._cancel)
        app.router.add_delete(f"{root}/batches/{{id}}", self._delete_batch)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    # -- what others do there

    def plant(self, provider: str, requests: int, created_at: datetime | None = None) -> str:
        """Put somebody else's batch there, which has ended; its id."""
        held = Held(self._id("foreign"), provider, [], created_at or datetime.now(UTC), state="ended")
        held.requests = [(f"theirs-{n}", {"model": "m", "messages": []}) for n in range(requests)]
        held.fates = {name: "succeeded" for name, _ in held.requests}
        self.batches[held.id] = held
        return held.id

    # -- handlers

    def _id(self, kind: str) -> str:
        self._number += 1
        return f"{kind}-{self._number}"

    async def _at(self, step: str, request: web.Request) -> None:
        """Be at a step: hang there, or refuse, if that was asked for."""
        self.log.append(step)
        if step in self.holds:
            self.holds.discard(step)
            self.reached.set()
            await asyncio.Event().wait()  # until the client is gone
        if refusals := self.refusals.get(step):
            status = refusals.pop(0)
            error = {"type": "api_error", "message": f"refused with {status}", "code": None}
            body = json.dumps({"type": "error", "error": error})
            raise _refusal(status, body)

    def _live(self, provider: str) -> Any:
        async def handle(request: web.Request) -> web.Response:
            body = await request.json()
            recorded = self._checked(provider, body, dict(request.headers))
            question = question_of(body)
            self.live[provider, question] += 1
            return web.json_response(self._answer(recorded, question))

        return handle

    def _checked(self, provider: str, body: dict[str, Any], headers: dict[str, str]) -> Recorded:
        recorded = Recorded(provider, "", "", {name.lower(): value for name, value in headers.items()}, body)
        self.problems += _CHECKS[provider](recorded)
        if not recorded.key:
            self.problems.append("no API key")
        return recorded

    def _answer(self, recorded: Recorded, question: str) -> dict[str, Any]:
        text = self.answer(question) if recorded.schema is None else json.dumps(example(recorded.schema))
        return _answer("success", recorded, text, self._id("answer"))

    async def _upload(self, request: web.Request) -> web.Response:
        if request.content_length is None:
            self.problems.append("the length of the upload is not said")
        fields = await request.post()
        await self._at("upload:before", request)
        if fields.get("purpose") != "batch":
            self.problems.append(f"purpose is {fields.get('purpose')!r}")
        file = fields["file"]
        assert isinstance(file, web.FileField)
        id = self._id("file")
        self.files[id] = (file.filename, file.file.read())
        await self._at("upload:after", request)
        return web.json_response({"id": id, "object": "file", "filename": file.filename, "purpose": "batch"})

    async def _list_files(self, request: web.Request) -> web.Response:
        files = [{"id": id, "filename": name} for id, (name, _) in reversed(self.files.items())]
        return web.json_response({"object": "list", "data": files, "has_more": False})

    async def _delete_file(self, request: web.Request) -> web.Response:
        self.log.append("delete")
        self.files.pop(request.match_info["id"], None)
        return web.json_response({"deleted": True})

    async def _delete_batch(self, request: web.Request) -> web.Response:
        self.log.append("delete")
        return web.json_response({"id": request.match_info["id"], "type": "message_batch_deleted"})

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self._at("create:before", request)
        held = Held(self._id("batch"), "anthropic", [], datetime.now(UTC))
        if "/anthropic/" in request.path:
            held.requests = [(each["custom_id"], each["params"]) for each in body["requests"]]
        else:
            held.provider = "openai_responses" if body["endpoint"] == "/v1/responses" else "openai"
            held.metadata, held.input_file = body["metadata"], body["input_file_id"]
            lines = [json.loads(line) for line in self.files[held.input_file][1].splitlines()]
            held.requests = [(line["custom_id"], line["body"]) for line in lines]
            self.problems += [
                f"a line asks for {line['url']}"
                for line in lines
                if (line["method"], line["url"]) != ("POST", body["endpoint"])
            ]
            if body["completion_window"] != "24h" or len({each["model"] for _, each in held.requests}) != 1:
                self.problems.append("the batch is not for one model within 24h")
        names = [name for name, _ in held.requests]
        if not names or len(set(names)) != len(names) or not all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", n) for n in names):
            self.problems.append(f"custom_ids: {names[:3]}")
        for _, asked in held.requests:
            self._checked(held.provider, asked, dict(request.headers))
            self.asked[question_of(asked)] += 1
        if self.validation_errors:
            held.error, held.state = self.validation_errors.pop(0), "failed"
        self.batches[held.id] = held
        await self._at("create:after", request)
        return web.json_response(_told(held))

    async def _list(self, request: web.Request) -> web.Response:
        self.log.append("list")
        is_anthropic = "/anthropic/" in request.path
        known = [held for held in self.batches.values() if (held.provider == "anthropic") == is_anthropic]
        return web.json_response({"data": [_told(held) for held in reversed(known)], "has_more": False})

    async def _poll(self, request: web.Request) -> web.Response:
        await self._at("poll", request)
        held = self.batches.get(request.match_info["id"])
        if held is None:
            return web.json_response({"error": {"message": "no such batch", "type": "not_found_error"}}, status=404)
        held.polls += 1
        if held.state == "running" and held.polls >= self.polls_to_end:
            self._work(held, len(held.requests))
        return web.json_response(_told(held))

    async def _cancel(self, request: web.Request) -> web.Response:
        held = self.batches[request.match_info["id"]]
        if held.state == "running":
            held.is_cancelled = True
            self._work(held, self.done_before_cancel)
        await self._at("cancel", request)
        return web.json_response(_told(held))

    def _work(self, held: Held, most: int) -> None:
        for number, (name, body) in enumerate(held.requests):
            question = question_of(body)
            if number >= most:
                held.fates[name] = "canceled"
                continue
            held.fates[name] = self.fate(question, self.asked[question])
            if held.fates[name] == "succeeded":
                self.billed[held.provider, question] += 1
        held.state = "ended"
        if held.provider != "anthropic":
            held.output_file, held.error_file = self._id("file"), self._id("file")
            lines = [json.dumps(self._openai_line(held, name, body)) for name, body in held.requests]
            is_good = [held.fates[name] == "succeeded" for name, _ in held.requests]
            for file, wanted in ((held.output_file, True), (held.error_file, False)):
                text = "\n".join(line for line, good in zip(lines, is_good, strict=True) if good is wanted)
                self.files[file] = (file, text.encode())

    async def _content(self, request: web.Request) -> web.StreamResponse:
        if "/anthropic/" in request.path:
            held = self.batches[request.match_info["id"]]
            text = "\n".join(json.dumps(self._anthropic_line(held, name, body)) for name, body in held.requests)
        else:
            text = self.files[request.match_info["id"]][1].decode()
        response = web.StreamResponse(headers={"content-type": "application/octet-stream"})
        await response.prepare(request)
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines):
            if number == len(lines) // 2 and number:  # half of them have arrived
                try:
                    await self._at("results", request)
                except web.HTTPException:  # too late for a status
                    assert request.transport is not None
                    request.transport.abort()
                    return response
            await response.write(line.encode())
        return response

    def _openai_line(self, held: Held, name: str, body: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"id": self._id("line"), "custom_id": name, "response": None, "error": None}
        match held.fates[name]:
            case "succeeded":
                answer = self._answer(Recorded(held.provider, "", "", {}, body), question_of(body))
                return line | {"response": {"status_code": 200, "request_id": f"req-{name}", "body": answer}}
            case "errored" | "rejected" as fate:
                status = 500 if fate == "errored" else 400
                error = {"error": {"message": "it broke", "type": "server_error", "code": None}}
                return line | {"response": {"status_code": status, "request_id": f"req-{name}", "body": error}}
            case fate:
                return line | {"error": {"code": f"batch_{'expired' if fate == 'expired' else 'cancelled'}"}}

    def _anthropic_line(self, held: Held, name: str, body: dict[str, Any]) -> dict[str, Any]:
        match held.fates[name]:
            case "succeeded":
                answer = self._answer(Recorded("anthropic", "", "", {}, body), question_of(body))
                return {"custom_id": name, "result": {"type": "succeeded", "message": answer}}
            case "errored" | "rejected" as fate:
                kind = "api_error" if fate == "errored" else "invalid_request_error"
                error = {"type": "error", "error": {"type": kind, "message": "it broke"}}
                return {"custom_id": name, "result": {"type": "errored", "error": error}}
            case fate:
                return {"custom_id": name, "result": {"type": fate}}


def question_of(body: dict[str, Any]) -> str:
    """Return what a request asks: its last message."""
    messages = body.get("messages") or body.get("input") or [{"content": ""}]
    return str(messages[-1]["content"])


def _refusal(status: int, body: str) -> web.HTTPException:
    class Refusal(web.HTTPException):
        status_code = status

    return Refusal(text=body, content_type="application/json")


def _told(held: Held) -> dict[str, Any]:
    fates = Counter(held.fates.values())
    if held.provider == "anthropic":
        counts = {name: fates.get(name, 0) for name in ("succeeded", "canceled", "expired")}
        counts["errored"] = fates.get("errored", 0) + fates.get("rejected", 0)
        counts["processing"] = len(held.requests) - sum(counts.values())
        state = "ended" if held.state == "ended" else "in_progress"
        created_at = held.created_at.isoformat().replace("+00:00", "Z")
        told = {"id": held.id, "type": "message_batch", "processing_status": state, "request_counts": counts}
        return told | {"created_at": created_at, "results_url": None}
    status = {"running": "in_progress", "failed": "failed", "ended": "cancelled" if held.is_cancelled else "completed"}
    errors = {"data": [{"code": held.error, "message": f"the batch failed: {held.error}"}]} if held.error else None
    return {
        "id": held.id,
        "object": "batch",
        "status": status[held.state],
        "metadata": held.metadata,
        "input_file_id": held.input_file,
        "output_file_id": held.output_file,
        "error_file_id": held.error_file,
        "errors": errors,
        "created_at": int(held.created_at.timestamp()),
        "request_counts": {"total": len(held.requests), "completed": fates.get("succeeded", 0), "failed": 0},
    }


@contextmanager
def serving() -> Iterator[BatchVendor]:
    """Serve from a thread of its own, so that a test may block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    vendor = BatchVendor()
    asyncio.run_coroutine_threadsafe(vendor.start(), loop).result(20)
    try:
        yield vendor
    finally:
        asyncio.run_coroutine_threadsafe(vendor.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
