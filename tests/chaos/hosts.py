"""What the storm breaks: a durable server, hosts with worker processes, and the network between one of them and the server.

Everything is real: processes are killed by signals, the server is restarted by its own programs, and the network is a
cable between network namespaces. Where those cannot be made, a proxy that stops forwarding stands in for the cable.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pgharness.embedded import EmbeddedPostgres

SOURCES = Path(__file__).parents[2] / "src"
SERVER_PORT = 5432
STOP_SECONDS = 60.0
_POLL_SECONDS = 0.05


# Processes ------------------------------------------------------------------------------------------------------------


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; tell whether there was a process to receive it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent and command line of every process that is not a zombie."""
    if not Path("/proc/self/stat").exists():
        command = ["ps", "-axww", "-o", "pid=,ppid=,stat=,command="]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            pid, parent, state, *words = line.split(None, 3)
            if not state.startswith("Z"):
                yield int(pid), int(parent), "".join(words)
        return
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(name), int(parent), os.fsdecode(Path("/proc", name, "cmdline").read_bytes())


def _session(pid: int) -> int | None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        return os.getsid(pid)
    return None


# The network ----------------------------------------------------------------------------------------------------------


class Network(Protocol):
    """The way from one host to the server, which can be cut so that what is sent is lost, and mended.

    A host behind one that `is_addressed` is known to the server by its address.
    """

    @property
    def way(self) -> str: ...
    @property
    def is_addressed(self) -> bool: ...
    @property
    def prefix(self) -> Sequence[str]: ...
    def url(self) -> str: ...
    def cut(self) -> None: ...
    def mend(self) -> None: ...
    def close(self) -> None: ...


class Cable:
    """A network namespace with one cable to the machine of the server."""

    way = "network namespace"
    is_addressed = True

    def __init__(self) -> None:
        mark = uuid.uuid4().hex[:6]
        self._machine, self._cable = f"pghchaos-{mark}", f"pghc{mark}"
        subnet = f"10.{200 + int(mark[0], 16)}.{int(mark[1:3], 16)}"
        self.address = f"{subnet}.1"
        self.prefix = ["ip", "netns", "exec", self._machine]
        try:
            _ip("netns", "add", self._machine)
            _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self._machine)
            _ip("address", "add", f"{self.address}/24", "dev", self._cable)
            _ip("link", "set", self._cable, "up")
            _ip("-n", self._machine, "address", "add", f"{subnet}.2/24", "dev", "eth0")
            _ip("-n", self._machine, "link", "set", "eth0", "up")
            _ip("-n", self._machine, "link", "set", "lo", "up")
            with socket.socket() as probe:  # or the server would not start beside one that listens on every address
                probe.bind((self.address, SERVER_PORT))
        except BaseException:
            self.close()
            raise

    def url(self) -> str:
        return f"host={self.address} port={SERVER_PORT} user=pgharness dbname=pgharness"

    def cut(self) -> None:
        _ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        for words in (["link", "delete", self._cable], ["netns", "delete", self._machine]):
            subprocess.run(["ip", *words], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Proxy:
    """A forwarder from a local port to the server's socket, which while it is cut neither accepts, forwards nor closes."""

    way = "proxy"
    is_addressed = False
    prefix: Sequence[str] = ()

    def __init__(self, socket_path: Callable[[], Path]) -> None:
        self._socket_path = socket_path
        self._is_open = threading.Event()
        self._is_open.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self) -> str:
        return f"host=127.0.0.1 port={self._port} user=pgharness dbname=pgharness sslmode=disable gssencmode=disable"

    def cut(self) -> None:
        self._is_open.clear()

    def mend(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        self._listener.close()
        self._is_open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self._is_open.wait()
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(str(self._socket_path()))
                except OSError:
                    client.close()
                    server.close()
                    continue
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        data = b"-"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            self._is_open.wait()
            with contextlib.suppress(OSError):
                if data:
                    target.sendall(data)
                else:
                    target.shutdown(socket.SHUT_RDWR)
                    source.close()


def cable_or_reason() -> Cable | str:
    """Return a cable, or why there can be none here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need Linux, root and the program ip (package iproute2)"
    try:
        return Cable()
    except subprocess.CalledProcessError as exc:
        return f"network namespaces cannot be made here: {exc.stderr.strip()}"
    except OSError as exc:
        return f"a server cannot listen on an address of its own here: {exc}"


# The server -----------------------------------------------------------------------------------------------------------


class Server:
    """A durable embedded server, restarted in every way that a server is."""

    def __init__(self, folder: Path) -> None:
        """Make the server and the network to it; nothing runs yet."""
        cable = cable_or_reason()
        settings = {}
        if isinstance(cable, Cable):
            # a file of ours, because the embedded server writes its own anew at every start
            rules = folder / "pg_hba.conf"
            rules.write_text(
                f"local all all peer map=pgharness\nhost all all {cable.address}/24 trust\n", encoding="utf-8"
            )
            rules.chmod(0o644)
            settings = {"listen_addresses": cable.address, "hba_file": str(rules)}
        self.embedded = EmbeddedPostgres(folder / "server", durable=True, settings=settings)
        self.why_proxy = None if isinstance(cable, Cable) else cable
        self.network: Network = cable if isinstance(cable, Cable) else Proxy(self._socket)
        self.is_up = False
        self.url = ""

    def start(self) -> None:
        self.url = self.embedded.ensure()
        self.is_up = True

    def stop(self, how: str) -> None:
        """Stop the server: fast (sessions end, a checkpoint is written), immediate (no checkpoint) or kill (kill -9)."""
        self.is_up = False
        if how == "fast":
            self.embedded.stop()
            return
        pid = self.embedded.status().pid
        assert pid is not None, "the server does not run"
        kill(pid, signal.SIGQUIT if how == "immediate" else signal.SIGKILL)
        deadline = time.monotonic() + STOP_SECONDS
        while self.embedded.status().running:
            assert time.monotonic() < deadline, f"the server does not stop ({how})"
            time.sleep(_POLL_SECONDS)

    @property
    def backends(self) -> list[int]:
        """Ids of the processes that serve connections to our database."""
        postmaster = self.embedded.status().pid
        return [
            pid for pid, parent, command in processes() if parent == postmaster and " pgharness pgharness " in command
        ]

    def close(self) -> None:
        self.network.close()
        self.embedded.close()

    def _socket(self) -> Path:
        folder = self.embedded.status().socket_dir
        if folder is None:
            raise OSError("the server does not run")
        return folder / f".s.PGSQL.{SERVER_PORT}"


# Hosts ----------------------------------------------------------------------------------------------------------------


class Host:
    """A machine that runs one supervisor, and starts it again when it is gone, as an init system does."""

    def __init__(
        self,
        name: str,
        *,
        folder: Path,
        url: Callable[[], str],
        processes: int,
        concurrency: int,
        stale_seconds: float,
        network: Network | None = None,
        is_spared: bool = False,
    ) -> None:
        self.name = name
        self.network = network
        self.is_spared = is_spared
        self.process_count = processes
        self.frozen: set[int] = set()
        self.logs: list[Path] = []
        self._folder = folder
        self._url = url
        self._command = [sys.executable, "-m", "pgharness", "worker", "--workers", str(processes)]
        self._command += ["--concurrency", str(concurrency)]
        self._stale_seconds = stale_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._sessions: list[int] = []

    def start(self, queues: str = "note,grade") -> None:
        """Start the supervisor, which takes these kinds of work."""
        log = self._folder / f"{self.name}-{len(self.logs)}.log"
        self.logs.append(log)
        prefix = self.network.prefix if self.network else ()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*prefix, *self._command, "--queues", queues],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._sessions.append(self._process.pid)

    def _environment(self) -> Mapping[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        url = self.network.url() if self.network else self._url()
        kept |= {"PYTHONPATH": str(SOURCES), "PYTHONUNBUFFERED": "1", "PGHARNESS_DATABASE_URL": url}
        return kept | {"PGHARNESS_STALE_SECONDS": f"{self._stale_seconds:g}"}

    @property
    def supervisor(self) -> int | None:
        """Id of the supervisor, if one runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def status(self) -> int | None:
        """Exit status of the latest supervisor; None while it runs."""
        return self._process.poll() if self._process is not None else None

    @property
    def workers(self) -> list[int]:
        """Ids of the supervisor's worker processes, which live."""
        return [pid for pid, parent, command in processes() if parent == self.supervisor and "spawn_main" in command]

    @property
    def members(self) -> list[int]:
        """Ids of all processes that any supervisor of this host left or has, itself included."""
        return [pid for pid, _, _ in processes() if _session(pid) in self._sessions]

    def kill_all(self) -> None:
        """End every process of the host at once, as a loss of power does."""
        while members := self.members:  # a supervisor may start a process while we look
            for pid in members:
                kill(pid)
        self._reap()

    def kill_supervisor(self) -> None:
        if self.supervisor is not None:
            kill(self.supervisor)
            self._reap()

    def drain(self) -> None:
        """Ask the supervisor to end."""
        if self.supervisor is not None:
            kill(self.supervisor, signal.SIGTERM)

    def thaw(self) -> None:
        for pid in self.frozen:
            kill(pid, signal.SIGCONT)
        self.frozen.clear()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(STOP_SECONDS)

    def tail(self, length: int = 2_000) -> str:
        """Return the end of the latest log."""
        return self.logs[-1].read_text(errors="replace")[-length:] if self.logs else ""
