"""What the figures are compared with, each a program of its own, as the worker is.

    baselines.py jobs URL --count 3000       Procrastinate's no-op jobs: stock app, stock worker
    baselines.py idle URL                    a stock worker that prints the time at which each job starts
    baselines.py httpx URL --concurrency 100 a bare loop of httpx over aiohttp, without database or harness
    baselines.py aiohttp URL                 the same loop with aiohttp itself

All but `idle` print one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import httpx
from bed import NOTE, Process
from httpx_aiohttp import AiohttpTransport
from procrastinate import App, PsycopgConnector

from pgharness.gateway.providers import wire_format
from pgharness.grading import verdict_schema
from pgharness.types import Message, ModelSpec, Request

_HEADERS = {"content-type": "application/json"}


def _app(url: str) -> App:
    app = App(connector=PsycopgConnector(conninfo=url))

    @app.task(name="noop")
    async def noop() -> None:
        pass

    @app.task(name="stamp")
    async def stamp() -> None:
        print(time.time(), flush=True)

    return app


async def run_jobs(url: str, *, count: int, concurrency: int) -> dict[str, Any]:
    """Queue no-op jobs, let a worker do them all; time from the first one's start to the last one's end."""
    app = _app(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for _ in range(0, count, 1000):
            await app.tasks["noop"].batch_defer_async(*[{} for _ in range(1000)])
        await app.run_worker_async(concurrency=concurrency, wait=False)
        row = await app.connector.execute_query_one_async(
            "select count(*) filter (where type = 'succeeded') as jobs, "
            "extract(epoch from max(at) - min(at))::float as seconds "
            "from procrastinate_events where type in ('started', 'succeeded')"
        )
    return {"jobs": row["jobs"], "seconds": row["seconds"]}


async def idle(url: str) -> None:
    """Wait for jobs until told to stop."""
    app = _app(url)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        print("ready", flush=True)
        await app.run_worker_async()


Post = Callable[[str, bytes], Awaitable[object]]


@contextlib.asynccontextmanager
async def _httpx() -> AsyncIterator[Post]:
    """Open httpx's requests over aiohttp, without httpx's client between them: the fastest way to use it."""
    transport = AiohttpTransport(client=lambda: aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
    timeout = {"timeout": httpx.Timeout(60.0).as_dict()}

    async def post(url: str, content: bytes) -> object:
        request = httpx.Request("POST", url, content=content, headers=_HEADERS, extensions=timeout)
        response = await transport.handle_async_request(request)
        text = await response.aread()
        if response.status_code != 200:
            raise RuntimeError(f"the stub answered {response.status_code}: {text!r}")
        return json.loads(text)

    async with transport:
        yield post


@contextlib.asynccontextmanager
async def _aiohttp() -> AsyncIterator[Post]:
    """Open a client of aiohttp's own, as its manual has it."""
    timeout = aiohttp.ClientTimeout(total=60.0)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def post(url: str, content: bytes) -> object:
            async with session.post(url, data=content, headers=_HEADERS, raise_for_status=True) as response:
                return await response.json()

        yield post


async def loop_http(
    opened: contextlib.AbstractAsyncContextManager[Post],
    base_url: str,
    *,
    concurrency: int,
    ramp: float,
    window: float,
) -> dict[str, Any]:
    """Keep so many requests in flight; return when each started and ended, and what the process used."""
    spec = ModelSpec(id=1, name="stub", provider="openai_compatible", model="stub", base_url=base_url)
    wire = wire_format(spec)
    messages = (Message("system", "You write clear, accurate and concise notes."), Message("user", NOTE * 2))
    calls = [wire.encode(spec, Request(messages, schema=schema)) for schema in (None, verdict_schema(4))]
    contents = [json.dumps(call.body).encode() for call in calls]
    spans: list[tuple[float, float]] = []
    until = time.time() + ramp + window + 1.0

    async def ask(post: Post, number: int) -> None:
        for turn in itertools.count(number):
            start = time.time()
            if start >= until:
                return
            await post(calls[0].url, contents[turn % 2])
            spans.append((start, time.time()))

    async with opened as post:
        await asyncio.gather(*(ask(post, number) for number in range(concurrency)))
    return {"spans": spans, "resident_mb": Process(os.getpid()).resident_mb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("jobs", "idle", "httpx", "aiohttp"))
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--concurrency", type=int, default=100)
    parser.add_argument("--ramp", type=float, default=3.0)
    parser.add_argument("--window", type=float, default=4.0)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
    if options.program == "jobs":
        print(json.dumps(asyncio.run(run_jobs(options.url, count=options.count, concurrency=options.concurrency))))
    elif options.program == "idle":
        asyncio.run(idle(options.url))
    else:
        opened = _aiohttp() if options.program == "aiohttp" else _httpx()
        load = {"concurrency": options.concurrency, "ramp": options.ramp, "window": options.window}
        print(json.dumps(asyncio.run(loop_http(opened, options.url, **load))))


if __name__ == "__main__":
    main()
