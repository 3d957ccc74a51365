"""A run through PgBouncer in session mode, listener and all."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@pytest.fixture
def pooled_url(url: str) -> Iterator[str]:
    """Connection string of the test database through a PgBouncer of its own."""
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
        f"auth_type = any\npool_mode = session\ndefault_pool_size = 30\npidfile = {folder}/pid\n"
    )
    identity = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
    process = subprocess.Popen(
        [PGBOUNCER, "-q", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", **identity
    )
    pooled = make_conninfo("", host=str(folder), port=6432, user=server.get("user"), dbname="pooled")
    try:
        _wait_until_reachable(pooled, process)
        yield pooled
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


def test_a_run_completes_through_pgbouncer_in_session_mode(pooled_url: str) -> None:
    with psycopg.connect(pooled_url, autocommit=True) as connection:
        connection.execute("insert into pgharness.cases (name, input, target) values ('a', '\"1 + 1\"', '\"2\"')")
        connection.execute("insert into pgharness.instances (name, note_replications) values ('sums', 20)")
        connection.execute("select pgharness.add_cases('sums')")
        connection.execute(
            "insert into pgharness.model_combinations (instance, generator, grader) values ('sums', 'simulator', 'exact_match')"
        )
        connection.execute("select pgharness.start_run('sums')")
        subprocess.run(
            [sys.executable, "-m", "pgharness", "worker", "--concurrency", "5", "--exit-when-idle"],
            env={**os.environ, "PGHARNESS_DATABASE_URL": pooled_url},
            check=True,
            timeout=60,
        )
        row = connection.execute("select status, notes_succeeded, grades_succeeded from pgharness.runs").fetchone()
    assert row == ("completed", 20, 20)
