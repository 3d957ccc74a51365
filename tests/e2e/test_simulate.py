"""`pgharness simulate` as its users have it: a process to point load at, and a model for workers."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import Connection

import world
from command_line import CommandLine


class Server:
    """A server process: where it listens, what it prints to make it a model, and what it has counted."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.printed = ""
        while not self.printed.endswith(";\n"):
            line = process.stdout.readline()
            assert line, f"it ended: {self.printed}{process.communicate()[1]}"
            self.printed += line
        self.statement = self.printed[self.printed.index("insert into") :]
        self.url = re.findall(r"http://[\d.:]+/v1", self.printed)[0]

    def post(self, content: str = "The knee is swollen.", **body: Any) -> tuple[int, Any]:
        asked = {"model": "simulator", "messages": [{"role": "user", "content": content}]} | body
        try:
            with urllib.request.urlopen(
                f"{self.url}/chat/completions", json.dumps(asked).encode(), timeout=20
            ) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as exc:
            return exc.code, json.load(exc)

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(self.url.replace("/v1", "/stats"), timeout=20) as reply:
            found: dict[str, int] = json.load(reply)
            return found

    def until(self, condition: Callable[[dict[str, int]], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition(self.stats()):
            assert time.monotonic() < deadline, self.stats()
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """End it by a signal; return its status, and what it printed last."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@contextmanager
def served(*arguments: str) -> Iterator[Server]:
    process = CommandLine().start("simulate", "--port", "0", *arguments)
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_end_and_says_what_it_did(number: int) -> None:
    with served("--set", "latency_seconds=0") as server:
        status, answer = server.post()
        assert status == 200 and "Plan:" in answer["choices"][0]["message"]["content"]
        assert server.stats() == server.stats() | {"requests": 1, "completed": 1, "cancelled": 0, "in_flight": 0}
        ended, out, err = server.end(number)
    assert (ended, err) == (0, "")
    assert out.strip().startswith("1 requests: 1 completed, 0 refused")


def test_it_ends_at_once_though_requests_are_in_flight() -> None:
    with served("--set", "latency_seconds=10000") as server:
        caught: list[Exception] = []

        def ask() -> None:
            try:
                server.post()
            except (OSError, ValueError) as exc:
                caught.append(exc)

        client = threading.Thread(target=ask)
        client.start()
        server.until(lambda stats: stats["in_flight"] == 1)
        ended, _, err = server.end()
        client.join(20)
    assert (ended, err) == (0, "") and len(caught) == 1


def test_a_client_that_disconnects_is_counted_and_frees_its_place() -> None:
    with served("--set", "latency_seconds=10000", "--concurrency-limit", "1") as server:
        address = re.findall(r"//([\d.]+):(\d+)", server.url)[0]
        body = json.dumps({"model": "simulator", "messages": [{"role": "user", "content": "x"}]})
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()
            )
            server.until(lambda stats: stats["in_flight"] == 1)
            assert server.post()[0] == 429
        server.until(lambda stats: stats["cancelled"] == 1)
        assert server.stats() == server.stats() | {"requests": 2, "in_flight": 0, "refused": 1, "completed": 0}


def test_options_and_parameters_reach_every_model_it_serves() -> None:
    options = ["--set", "latency_seconds=0", "--set", "quality=1", "--requests-per-second-limit", "0.001"]
    with served(*options, "--set", "retry_after_seconds=30", "--model", "it's a", "--model", "b") as server:
        assert server.post(model="it's a")[0] == 200
        assert server.post(model="b")[0] == 429
        assert "'it''s a'" in server.statement and server.statement.count(server.url) == 2


def test_what_it_prints_makes_it_a_model_for_workers(db: Connection[Any], url: str) -> None:
    with served("--set", "latency_seconds=0.01", "--set", "error_rate=0.1") as server:
        db.execute(server.statement.encode())
        world.add_instance(db, cases=10, combinations=[("simulator-over-http", "simulator-over-http")])
        db.execute("update pgharness.models set parameters = '{\"seed\": 1}' where name = 'simulator-over-http'")
        run = world.start(db)
        db.commit()
        CommandLine(url).work()
        stats = server.stats()
    with psycopg.connect(url) as fresh:
        assert world.run_of(fresh, run)["status"] == "completed"
        counted = world.value(fresh, "select count(*) from pgharness.calls where run_id = %s", run)
        assert world.value(fresh, "select count(*) from pgharness.notes where run_id = %s", run) == 10
    assert stats["requests"] == counted == stats["completed"] + stats["failed"]
    assert stats["completed"] >= 30  # 10 notes and 20 grades


def test_a_wrong_command_line_is_refused_by_name() -> None:
    done = CommandLine().call("simulate", "--set", "latency_secs=1", status=1)
    assert "latency_secs" in done.err and "latency_seconds" in done.err
    done = CommandLine().call("simulate", "--set", "latency_seconds", status=2)
    assert "KEY=VALUE" in done.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CommandLine().call("simulate", "--port", port, status=1)
    assert port in done.err and "--port 0" in done.err
