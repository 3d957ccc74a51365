"""Connections: how few a worker needs, directly and through PgBouncer, which may pool sessions or transactions."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from procrastinate.sql import queries
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from command_line import CommandLine
from pgharness import archiving, database, schema
from pgharness.embedded import EmbeddedPostgres, temporary_root
from pgharness.queue import qualified

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
SERVERS = 5  # that PgBouncer opens at most when it pools transactions
PER_WORKER = 4  # as documented: one that records, two for other statements, one that listens


@dataclass
class Pooled:
    """A database through a PgBouncer of its own: the way in, and the direct one."""

    url: str
    direct: str

    @property
    def servers(self) -> int:
        """How many server connections PgBouncer holds."""
        with psycopg.connect(make_conninfo(self.url, dbname="pgbouncer"), autocommit=True) as console:
            return sum("pooled" in row for row in psycopg.ClientCursor(console).execute("show servers"))


@contextlib.contextmanager
def pgbouncer(url: str, mode: str, size: int) -> Iterator[Pooled]:
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    server = conninfo_to_dict(url)
    folder = Path(tempfile.mkdtemp(prefix="pgb", dir="/tmp"))
    account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    if account:
        # it refuses to be root; the server lets in only its own account
        account = pwd.getpwuid(os.stat(str(server["host"])).st_uid)
        os.chown(folder, account.pw_uid, account.pw_gid)
    config = folder / "pgbouncer.ini"
    forwarded = " ".join(f"{key}={server[key]}" for key in ("host", "port", "dbname", "user") if server.get(key))
    config.write_text(
        f"[databases]\npooled = {forwarded}\n[pgbouncer]\nlisten_addr =\nunix_socket_dir = {folder}\nlisten_port = 6432\n"
        f"auth_type = any\nadmin_users = {server['user']}\npool_mode = {mode}\ndefault_pool_size = {size}\n"
        f"pidfile = {folder}/pid\n"
    )
    identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
    process = subprocess.Popen(
        [PGBOUNCER, "-q", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **identity
    )
    pooled = make_conninfo("", host=str(folder), port=6432, user=server.get("user"), dbname="pooled")
    try:
        _wait_until_reachable(pooled, process)
        yield Pooled(pooled, url)
    finally:
        process.terminate()
        process.wait(timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_reachable(conninfo: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        try:
            psycopg.connect(conninfo, connect_timeout=2).close()
            return
        except psycopg.OperationalError as exc:
            error = exc
            if process.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
    pytest.fail(f"pgbouncer cannot be reached: {error}")


@pytest.fixture
def sessions(url: str) -> Iterator[Pooled]:
    """The test database through a PgBouncer in session mode."""
    with pgbouncer(url, "session", 30) as pooled:
        yield pooled


@pytest.fixture
def transactions(url: str) -> Iterator[Pooled]:
    """The test database through a PgBouncer in transaction mode, with few server connections."""
    with pgbouncer(url, "transaction", SERVERS) as pooled:
        yield pooled


# -- runs and workers


def define(connection: Connection[Any], notes: int, latency: float = 0.0) -> None:
    parameters = json.dumps({"latency_seconds": latency, "latency_spread": 0})
    connection.execute(
        "insert into pgharness.models (name, provider, parameters) values ('sim', 'simulator', %s)", (parameters,)
    )
    connection.execute("insert into pgharness.cases (name, input, target) values ('a', '\"1 + 1\"', '\"2\"')")
    connection.execute(
        "insert into pgharness.instances (name, note_replications, rubrics_per_case) values ('sums', %s, 0)", (notes,)
    )
    connection.execute("select pgharness.add_cases('sums')")
    connection.execute(
        "insert into pgharness.model_combinations (instance, generator, grader) values ('sums', 'sim', 'sim')"
    )


def start(connection: Connection[Any]) -> None:
    connection.execute("select pgharness.start_run('sums')")


def ended(connection: Connection[Any]) -> tuple[Any, ...] | None:
    found = connection.execute("select status, notes_succeeded, grades_succeeded from pgharness.runs").fetchone()
    return None if found is None or found[0] == "running" else found


@contextlib.contextmanager
def workers(url: str, count: int, folder: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a supervisor with so many processes in a session of its own, and stop it; their log is `workers.log`."""
    environment = CommandLine(url, environment={"PGHARNESS_STALE_SECONDS": "2"} | variables)
    with (folder / "workers.log").open("a") as log:
        process = environment.start(
            "worker",
            "--workers",
            str(count),
            "--queues",
            "note,grade",
            *arguments,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
        process.terminate()
        process.wait(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def value(connection: Connection[Any], query: str) -> Any:
    found = connection.execute(query.encode()).fetchone()
    return found[0] if found else None


def processes(connection: Connection[Any]) -> int:
    """How many worker processes take work."""
    query = "select count(*) from pgharness.workers where status = 'running' and queue_worker_id is not null"
    return int(value(connection, query))


def held(connection: Connection[Any]) -> int:
    """How many connections worker processes hold, supervisors not counted."""
    query = "select count(*) from pg_stat_activity where datname = current_database() and application_name like 'pgharness %'"
    return int(value(connection, query))


# -- directly


def test_workers_hold_few_connections_and_leak_none(tmp_path: Path) -> None:
    root = temporary_root()
    server = EmbeddedPostgres(root, durable=False)
    assert database.WORKER_CONNECTIONS == PER_WORKER
    count = 3
    try:
        url = server.ensure()
        with psycopg.connect(url, autocommit=True) as db:
            schema.upgrade(db)
            define(db, 1_500, latency=0.1)
            with workers(url, count, tmp_path, "--concurrency", "20"):
                wait(lambda: processes(db) == count, "workers at work")
                assert held(db) <= PER_WORKER * count
                start(db)
                most = 0
                for _ in range(100):
                    most = max(most, held(db))
                    time.sleep(0.01)
                assert count < most <= PER_WORKER * count
                server.stop()
                assert server.ensure() == url
                with psycopg.connect(url, autocommit=True) as db:
                    wait(lambda: value(db, "select notes_succeeded from pgharness.runs") > 500, "work after a restart")
                    assert held(db) <= PER_WORKER * count
                    wait(lambda: ended(db), "end of run")
                    assert ended(db) == ("completed", 1_500, 1_500)
                    # all listen again, and nothing else is left from before
                    listening = "select count(*) from pg_stat_activity where application_name = 'pgharness listener'"
                    wait(lambda: value(db, listening) == count, "listeners")
                    assert held(db) <= PER_WORKER * count
        with psycopg.connect(url, autocommit=True) as db:
            wait(lambda: held(db) == 0, "the last connection's end", seconds=5)
    finally:
        server.close()
        shutil.rmtree(root, ignore_errors=True)


# -- through PgBouncer


def test_a_run_completes_through_pgbouncer_in_session_mode(sessions: Pooled, tmp_path: Path) -> None:
    assert not database.shares_servers(sessions.url)
    with psycopg.connect(sessions.url, autocommit=True) as db:
        define(db, 20)
        start(db)
        with workers(sessions.url, 1, tmp_path, "--concurrency", "5", "--exit-when-idle") as process:
            assert process.wait(timeout=60) == 0
        assert ended(db) == ("completed", 20, 20)
    with psycopg.connect(sessions.direct, autocommit=True) as db:
        assert database.hears(sessions.url, db)


@pytest.mark.parametrize("listens", [False, True], ids=["polling", "listening"])
def test_many_workers_share_few_servers_in_transaction_mode_and_a_crash_loses_nothing(
    transactions: Pooled, tmp_path: Path, listens: bool
) -> None:
    assert database.shares_servers(transactions.url)
    count, notes = 4, 800
    chosen = transactions.direct if listens else "off"
    with psycopg.connect(transactions.direct, autocommit=True) as db:
        define(db, notes, latency=0.1)
        with workers(transactions.url, count, tmp_path, "--concurrency", "15", PGHARNESS_LISTEN_URL=chosen):
            wait(lambda: processes(db) == count, "workers at work")
            listeners = "select count(*) from pg_stat_activity where application_name = 'pgharness listener'"
            wait(lambda: value(db, listeners) == (count if listens else 0), "those that listen")
            start(db)
            wait(lambda: value(db, "select notes_succeeded from pgharness.runs") > 100, "a part of the run")
            os.kill(value(db, "select pid from pgharness.workers where status = 'running' limit 1"), signal.SIGKILL)
            most = heard = 0
            while not ended(db):
                most = max(most, transactions.servers)
                heard = max(heard, value(db, listeners))
                time.sleep(0.05)
            assert ended(db) == ("completed", notes, notes)
            assert value(db, "select count(*) from pgharness.notes") == notes
            assert value(db, "select count(*) from pgharness.grades") == notes
            assert 1 <= most <= SERVERS
            assert heard <= (count if listens else 0)


def test_a_pooler_in_transaction_mode_is_noticed_and_never_asked_to_listen(
    transactions: Pooled, tmp_path: Path
) -> None:
    with psycopg.connect(transactions.direct, autocommit=True) as db:
        define(db, 5)
        with workers(transactions.url, 1, tmp_path, "--concurrency", "5"):
            wait(lambda: processes(db) == 1, "worker")
            start(db)
            wait(lambda: ended(db), "end of run")
        listens = "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen%'"
        assert value(db, listens) == 0
    assert "a pooler in transaction mode carries no notifications" in (tmp_path / "workers.log").read_text()


def test_a_small_run_is_not_held_up_by_a_big_one_without_notifications(transactions: Pooled, tmp_path: Path) -> None:
    with psycopg.connect(transactions.direct, autocommit=True) as db:
        define(db, 3_000, latency=0.2)
        with workers(transactions.url, 1, tmp_path, "--concurrency", "20", PGHARNESS_LISTEN_URL="off"):
            start(db)
            wait(lambda: value(db, "select notes_succeeded from pgharness.runs") > 100, "a part of the big run")
            db.execute("update pgharness.instances set note_replications = 5 where name = 'sums'")
            start(db)
            wait(lambda: value(db, "select status from pgharness.runs where id = 2") == "completed", "small run", 15)
            assert value(db, "select status from pgharness.runs where id = 1") == "running"
            db.execute("select pgharness.cancel_run(1)")


def test_commands_need_no_session(transactions: Pooled, tmp_path: Path) -> None:
    with psycopg.connect(transactions.direct, autocommit=True) as direct:
        direct.execute("drop schema pgharness cascade; drop schema procrastinate cascade")
    line = CommandLine(transactions.url, environment={"PGHARNESS_LISTEN_URL": "off"})
    line.run("init")
    assert line.run("migrate").out == "the schema is up to date\n"
    with contextlib.ExitStack() as stack:
        # commands of others between ours, on the same few server connections, some of which leave their settings there
        for number in range(SERVERS + 2):
            other = stack.enter_context(psycopg.connect(transactions.url, autocommit=True))
            if number % 2:
                other.execute("set search_path = pg_catalog")
        with psycopg.connect(transactions.url, autocommit=True) as db:
            define(db, 30)
            start(db)
            line.run("worker", "--exit-when-idle", "--concurrency", "5", "--queues", "note,grade")
            assert ended(db) == ("completed", 30, 30)
        assert "completed" in line.run("status", "sums/1").out
        assert line.run("export", "note_results", "--run", "sums/1").out.count("\n") == 30
        line.run("export", "note_results", "--run", "sums/1", "--out", str(tmp_path / "notes.csv"))
        line.run("rerun", "sums/1")
        line.run("cancel", "sums/2")
        findings = {row["subject"]: row for row in line.run("doctor", "--json").json}
        assert findings["listener"]["verdict"] == "ok" and "off" in findings["listener"]["finding"]
        assert findings["connections"]["verdict"] == "ok"
    with database.connect(transactions.url) as connection:
        kept = archiving.archive_run(connection, transactions.url, "sums/1", tmp_path)
        assert kept.rows["notes"] == 30
        archiving.restore_run(connection, kept.path)


def test_doctor_tells_how_workers_would_hear_of_new_work(transactions: Pooled) -> None:
    def listener(url: str, **variables: str) -> tuple[str, str]:
        found = {row["subject"]: row for row in CommandLine(url, environment=variables).run("doctor", "--json").json}
        return found["listener"]["verdict"], found["listener"]["finding"]

    at_once = ("ok", "workers hear of new work at once")
    assert listener(transactions.direct) == at_once
    assert listener(transactions.url, PGHARNESS_LISTEN_URL=transactions.direct) == at_once
    verdict, finding = listener(transactions.url)
    assert verdict == "warning" and "transaction mode" in finding
    elsewhere = make_conninfo(transactions.direct, dbname="postgres")
    verdict, finding = listener(transactions.url, PGHARNESS_LISTEN_URL=elsewhere)
    assert verdict == "warning" and "do not arrive" in finding
    verdict, finding = listener(transactions.url, PGHARNESS_LISTEN_URL="postgresql://ana:secret@localhost:1/nothing")
    assert verdict == "warning" and "cannot connect" in finding and "secret" not in finding


@pytest.mark.parametrize("name", sorted(queries.keys() - {"listen_queue"}))
def test_every_statement_of_the_queue_names_its_schema(url: str, name: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("set search_path = ''")
        query = qualified(queries[name]).replace("%%", "%")
        for number, parameter in enumerate(dict.fromkeys(_parameters(query)), 1):
            query = query.replace(f"%({parameter})s", f"${number}")
        connection.execute(f"prepare of_the_queue as {query}".encode())


def _parameters(query: str) -> Iterator[str]:
    for part in query.split("%(")[1:]:
        yield part.partition(")")[0]
