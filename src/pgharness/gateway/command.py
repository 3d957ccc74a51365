"""Provider `command`: a program of the user's own answers, as it was at a pinned git commit.

`models.parameters` of such a model:

| key | means |
|---|---|
| `command` | the program and its arguments, a list; run in the checkout's top folder |
| `repository` | where the program lives: a local path or a git URL. Without it the program runs in an empty folder |
| `environment` | names of the worker's environment variables to pass on, for example `["OPENAI_API_KEY"]` |
| `env_prefix` | begins the names of the variables below; default `PGHARNESS_` |
| anything else | the program's own parameters, such as a temperature |

The program runs at the run's `software_version`: a hash (abbreviated or not), a tag or a branch. A branch means what it
pointed at when this worker first needed it, so give a hash or a tag; the answer's `model` records the commit that gave
it. Each host makes one read-only checkout per commit for all that run there: a program writes to `TMPDIR`, never beside
its code. Submodules are not fetched.

It reads one JSON object on standard input: `case` (without its target, unless it grades), `config`, `model` (name,
model, is_reasoning, parameters), and `note` and `rubric` when it is used as a grader. It prints its note, as JSON, to
standard output: an object or any other value, or `{"note": ..., "usage": {"input_tokens": 1, "output_tokens": 2}}` to
have its tokens counted. It exits with 0; any other status fails the attempt, with the end of its standard error kept.
Past the model's timeout, and when its run is cancelled, it and all that it started get SIGTERM, and SIGKILL 0.8
seconds later. In its environment:

| variable | holds |
|---|---|
| `PGHARNESS_MODEL` | `models.model`; empty leaves the choice to the program |
| `PGHARNESS_IS_REASONING` | `true` or `false` |
| `PGHARNESS_PARAMETERS` | the model's other parameters and the combination's, as JSON |
| `PGHARNESS_CASE` | the case's name |
| `PGHARNESS_OVERLAP`, `PGHARNESS_CYCLE_TIMES` | the transcript overlap; the cycle times, as a JSON list |
| `PGHARNESS_REPLICATION`, `PGHARNESS_SEED`, `PGHARNESS_ATTEMPT` | which replication, its seed, which attempt at it |
| `PGHARNESS_SOFTWARE_VERSION` | the full hash of the commit that runs |

Of the worker's own environment it sees PATH, HOME, LANG, TMPDIR, VIRTUAL_ENV and what `environment` names. The values
of the latter, if of six characters or more, are taken out of everything that is kept: pass what is not secret in the
config or the parameters. It is no sandbox: the program has the worker's rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from pgharness.errors import CodeFailed, InvalidOutput, ModelError, RequestRejected, ServerFailed, TimedOut, Unavailable
from pgharness.gateway.callables import completion_of, storable
from pgharness.gateway.parameters import read_parameters
from pgharness.types import Completion, ModelSpec, Request, Usage

_STDOUT_BYTES = 10_000_000
_STDERR_BYTES = 64_000
_KEPT_CHARACTERS = 4_000  # of standard error
_KEPT_OUTPUT = 20_000  # characters of an answer that is none
_GRACE_SECONDS = 0.8
_GIT_SECONDS = 600.0
_SHORTEST_SECRET = 6
_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
_TOKENS = ("input_tokens", "output_tokens", "cached_tokens")
_FULL_HASH = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_SCP_ADDRESS = re.compile(r"[^/]+:(?!//)")
_URL_WITH_SECRET = re.compile(r"https?://[^/]*@|[^/]+://[^/@]+:[^/]*@")
_EXHAUSTED = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETXTBSY})
_GIT_PLACES = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR"})

_EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class CommandParameters(BaseModel):
    """The parameters of a model that is a program; any others are the program's own, handed to it as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    command: list[str] = Field(min_length=1)
    repository: str | None = Field(default=None, min_length=1)
    env_prefix: _EnvironmentName = "PGHARNESS_"
    environment: list[_EnvironmentName] = []


class Command:
    """Answer with a program's output; see the module for what it is given and what it prints."""

    def __init__(self, spec: ModelSpec, *, cache_root: Path) -> None:
        self._spec = spec
        self._parameters = read_parameters(spec, CommandParameters)
        self._cache_root = cache_root
        self._checkouts: _Checkouts | None = None
        if self._parameters.repository is not None:
            self._checkouts = _Checkouts(self._parameters.repository, cache_root)

    async def __call__(self, request: Request) -> Completion:
        """Run the program for this request; when cancelled, end it and all that it started first."""
        folder, commit, prefix = await self._place(request.item)
        environment = self._environment(request, commit)
        command = self._parameters.command
        self._check_program(command[0], folder, environment.get("PATH"))
        ended = await _run(
            [*prefix, *command],
            folder=folder,
            environment=environment,
            text=json.dumps(self._question(request)),
            timeout_seconds=self._spec.timeout_seconds,
        )
        return self._completion(ended, commit, wants_json=request.schema is not None)

    def _program_parameters(self, request: Request) -> dict[str, Any]:
        return {**(self._parameters.model_extra or {}), **request.parameters}

    async def _place(self, item: Mapping[str, Any]) -> tuple[Path, str | None, Sequence[str]]:
        """Return the folder to run in, the commit that lies there, and what to put before the command."""
        with _cache_errors(self._cache_root):
            if self._checkouts is None:
                empty = self._cache_root / "empty"
                empty.mkdir(mode=0o555, parents=True, exist_ok=True)
                return empty, None, ()
            version = str(item.get("software_version") or "").strip()
            if not version:
                raise RequestRejected(
                    f"model '{self._spec.name}' runs a program of {self._checkouts.repository}, at no version",
                    hint="Set the instance's software_version to a commit.",
                )
            folder, commit = await self._checkouts.folder(version)
            return folder, commit, await self._checkouts.protection()

    def _question(self, request: Request) -> dict[str, Any]:
        item = request.item
        return {
            "case": item.get("case"),
            "config": item.get("config"),
            "model": {
                "name": self._spec.name,
                "model": self._spec.model,
                "is_reasoning": request.is_reasoning,
                "parameters": self._program_parameters(request),
            },
        } | {key: item[key] for key in ("note", "rubric") if key in item}

    def _environment(self, request: Request, commit: str | None) -> dict[str, str]:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        for name in self._parameters.environment:
            if name not in os.environ:
                raise RequestRejected(
                    f"model '{self._spec.name}' passes on {name}, which this worker's environment lacks",
                    hint=f"Start workers with {name} set, or take it out of the model's parameters.environment.",
                )
            environment[name] = os.environ[name]
        item = request.item
        told = {
            "MODEL": self._spec.model,
            "IS_REASONING": "true" if request.is_reasoning else "false",
            "PARAMETERS": json.dumps(self._program_parameters(request)),
            "CASE": (item.get("case") or {}).get("name"),
            "OVERLAP": item.get("overlap"),
            "CYCLE_TIMES": json.dumps(item.get("cycle_times") or []),
            "REPLICATION": item.get("replication"),
            "SEED": request.seed,
            "ATTEMPT": request.attempt,
            "SOFTWARE_VERSION": commit,
        }
        environment |= {f"{self._parameters.env_prefix}{key}": str(told[key]) for key in told if told[key] is not None}
        return environment | {"PYTHONDONTWRITEBYTECODE": "1"}

    def _check_program(self, program: str, folder: Path, search_path: str | None) -> None:
        path = folder / program
        if "/" in program:
            is_found = path.is_file() and os.access(path, os.X_OK)
        else:
            is_found = shutil.which(program, path=search_path) is not None
        if not is_found:
            where = f"{path} is not an executable file" if "/" in program else "the worker's PATH does not have it"
            raise RequestRejected(
                f"model '{self._spec.name}' cannot run '{program}': {where}",
                hint="Check parameters.command, and the file's mode in the repository.",
            )

    def _completion(self, ended: _Ended, commit: str | None, *, wants_json: bool) -> Completion:
        """Return the note that was printed, or raise what became of the program."""
        program = self._parameters.command[0]
        secrets = self._secrets()
        complaint = _text(ended.stderr, secrets)[-_KEPT_CHARACTERS:]
        if ended.timed_out:
            raise TimedOut(f"'{program}' gave no answer within {self._spec.timeout_seconds:g} s", text=complaint)
        if ended.is_cut:
            raise InvalidOutput(
                f"'{program}' printed more than {_STDOUT_BYTES:,} bytes",
                text=_text(ended.stdout, secrets)[:_KEPT_OUTPUT],
            )
        if ended.status != 0:
            how = f"was ended by signal {-ended.status}" if ended.status < 0 else f"exited with status {ended.status}"
            raise CodeFailed(f"'{program}' {how}", text=complaint or _text(ended.stdout, secrets)[:_KEPT_OUTPUT])
        if not ended.stdout.strip():
            raise InvalidOutput(f"'{program}' printed nothing", text=complaint)
        try:
            note = json.loads(ended.stdout, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as exc:
            raise InvalidOutput(
                f"'{program}' printed something that is not JSON: {exc}",
                text=_text(ended.stdout, secrets)[:_KEPT_OUTPUT],
                hint="Print one JSON value to standard output, and anything else to standard error.",
            ) from None
        usage = Usage()
        counts = note.get("usage") if isinstance(note, dict) and "note" in note else None
        if isinstance(counts, dict) and any(name in counts for name in _TOKENS):
            usage, note = _usage(counts, program), note["note"]
        completion = completion_of(note, wants_json=wants_json, secrets=secrets)
        return replace(completion, usage=usage, model=commit)

    def _secrets(self) -> list[str]:
        """Return what must not be kept, longest first: the values passed on, as they are and as JSON writes them."""
        values = {os.environ.get(name, "") for name in self._parameters.environment}
        long = {value for value in values if len(value) >= _SHORTEST_SECRET}
        return sorted(long | {json.dumps(value)[1:-1] for value in long}, key=len, reverse=True)


def _text(printed: bytes, secrets: Iterable[str] = ()) -> str:
    """Return what was printed, fit to be kept."""
    text: str = storable(printed.decode(errors="replace"), secrets)
    return text


def _usage(counts: Mapping[str, Any], program: str) -> Usage:
    tokens = [counts.get(name, 0) for name in _TOKENS]
    if not all(type(count) is int and 0 <= count < 2**31 for count in tokens):
        raise InvalidOutput(
            f"'{program}' printed a usage that is not a count of tokens",
            hint='Print "usage": {"input_tokens": 1, "output_tokens": 2}, with whole numbers.',
        )
    return Usage(*tokens)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


class _Checkouts:
    """One read-only checkout per commit of a repository, made once on this host whoever asks first."""

    def __init__(self, repository: str, cache_root: Path) -> None:
        if _URL_WITH_SECRET.match(repository):
            raise RequestRejected(
                "the repository's URL holds a user's password or token, and would be stored with it",
                hint="Use a git credential helper, or ssh.",
            )
        is_remote = "://" in repository or _SCP_ADDRESS.match(repository) is not None
        self.repository = repository if is_remote else str(Path(repository).expanduser().resolve())
        key = hashlib.blake2b(self.repository.encode(), digest_size=8).hexdigest()
        self._trees = cache_root / "worktrees" / key
        self._mirror = cache_root / "repositories" / f"{key}.git" if is_remote else None
        self._commits: dict[str, str] = {}
        self._protection: Sequence[str] | None = None

    async def folder(self, version: str) -> tuple[Path, str]:
        """Return the checkout of a version and its full hash, making it where this host has none."""
        version = self._commits.get(version, version)
        if _FULL_HASH.fullmatch(version) and (self._trees / version).is_dir():
            return self._trees / version, version
        self._trees.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with _exclusive(self._trees / "lock"):
            source = await self._source(version)
            commit = await self._resolve(source, version)
            tree = self._trees / commit
            if not tree.is_dir():
                await self._check_out(source, commit, tree)
        self._commits[version] = commit
        return tree, commit

    async def protection(self) -> Sequence[str]:
        """Return what to put before a command so that root too is bound by a file's mode, where the host can."""
        if self._protection is None:
            guard: list[str] = []
            if os.geteuid() == 0 and (setpriv := shutil.which("setpriv")):
                guard = [setpriv, "--inh-caps=-dac_override", "--bounding-set=-dac_override", "--"]
                probe = await _run([*guard, "true"], folder=self._trees, environment=dict(os.environ))
                guard = guard if probe.status == 0 else []
            self._protection = guard
        return self._protection

    async def _source(self, version: str) -> str:
        """Return the path of a repository to check out from: the user's own, or a copy of a remote one's branches."""
        if self._mirror is None:
            if not Path(self.repository).is_dir():
                raise RequestRejected(
                    f"repository {self.repository} does not exist on this host",
                    hint="Clone it to that path on every worker's host, or give a URL.",
                )
            found = await self._git("rev-parse", "--git-dir")
            if found.status != 0:
                raise RequestRejected(f"{self.repository} cannot be used as a git repository: {_last_words(found)}")
            return self.repository
        mirror = str(self._mirror)
        self._mirror.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = await self._git("init", "--quiet", "--bare", "--", mirror)
        if made.status == 0 and _FULL_HASH.fullmatch(version):
            known = await self._git("cat-file", "-e", version, folder=mirror)
            if known.status == 0:
                return mirror
        branches_and_tags = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
        fetched = await self._git("fetch", "--quiet", "--", self.repository, *branches_and_tags, folder=mirror)
        if fetched.status != 0:
            raise ServerFailed(f"cannot fetch {self.repository}: {_last_words(fetched)}", text=_words(fetched))
        return mirror

    async def _resolve(self, source: str, version: str) -> str:
        found = await self._git("rev-parse", "--verify", "--end-of-options", f"{version}^{{commit}}", folder=source)
        if found.status != 0:
            where = f"git -C {self.repository} fetch --all --tags" if self._mirror is None else "git push"
            raise RequestRejected(
                f"commit '{version}' is not in repository {self.repository}: {_last_words(found)}",
                hint=f"Check software_version; if it is right, run: {where}",
            )
        return found.stdout.decode().strip()

    async def _check_out(self, source: str, commit: str, tree: Path) -> None:
        """Build a checkout beside its place and move it there whole; what a killed worker left there goes first."""
        for left_over in self._trees.glob(f".{commit}.*"):
            await asyncio.to_thread(_remove, left_over)
        building = tree.with_name(f".{commit}.{os.getpid()}")
        ended = await self._git("clone", "--quiet", "--shared", "--no-checkout", "--", source, str(building))
        if ended.status == 0:
            ended = await self._git("checkout", "--quiet", "--detach", commit, folder=str(building))
        if ended.status != 0:
            raise CodeFailed(
                f"cannot check out {commit} of {self.repository}: {_last_words(ended)}", text=_words(ended)
            )
        await asyncio.to_thread(_make_read_only, building)
        building.rename(tree)

    async def _git(self, *arguments: str, folder: str | None = None) -> _Ended:
        """Run git with no hooks, no prompts, and nothing of an outer git command's environment."""
        folder = folder or (self.repository if self._mirror is None else str(self._trees))
        environment = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
        environment |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", "GIT_CEILING_DIRECTORIES": str(Path(folder).parent)}
        settings = ("-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0")
        ended = await _run(
            ["git", *settings, *arguments], folder=Path(folder), environment=environment, timeout_seconds=_GIT_SECONDS
        )
        if ended.timed_out:
            raise TimedOut(f"git {arguments[0]} of {self.repository} took longer than {_GIT_SECONDS:g} s")
        return ended


def _words(ended: _Ended) -> str:
    return _text(ended.stderr).strip()[-_KEPT_CHARACTERS:]


def _last_words(ended: _Ended) -> str:
    return _words(ended).rpartition("\n")[2] or f"git exited with status {ended.status}"


def _make_read_only(tree: Path) -> None:
    for folder, _, files in os.walk(tree, topdown=False):
        for path in [*(os.path.join(folder, name) for name in files), folder]:
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode):  # what a link points to may lie elsewhere
                os.chmod(path, stat.S_IMODE(mode) & ~0o222)


def _remove(tree: Path) -> None:
    for folder, _, _ in os.walk(tree):
        os.chmod(folder, 0o700)
    shutil.rmtree(tree, ignore_errors=True)


@contextlib.asynccontextmanager
async def _exclusive(path: Path) -> AsyncIterator[None]:
    """Hold a lock that the kernel gives back when its process dies, however it dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _cache_errors(cache_root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise CodeFailed(
            f"cannot use the cache in {cache_root}: {exc.strerror or exc}", hint="It must be a folder to write to."
        ) from exc


@dataclass(frozen=True, slots=True)
class _Ended:
    """What became of a process; `is_cut` says that it printed too much, `status` is negative for a signal."""

    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    is_cut: bool


class _Process(asyncio.SubprocessProtocol):
    """Collects what a process prints.

    Not asyncio's own Process, whose wait() ends only when every pipe is closed: a grandchild that outlives the
    process holds them open.
    """

    def __init__(self) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.is_cut = False
        self.exited = asyncio.Event()
        self.done = asyncio.Event()
        self.silent = asyncio.Event()
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.stderr += data
            del self.stderr[:-_STDERR_BYTES]
        elif not self.is_cut:
            self.stdout += data
            if len(self.stdout) > _STDOUT_BYTES:
                self.is_cut = True
                self.done.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self.silent.set()

    def process_exited(self) -> None:
        self.exited.set()
        self.done.set()


async def _run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    text: str = "",
    timeout_seconds: float = 60.0,
) -> _Ended:
    """Run a program in a session of its own, and leave none of it behind, however this ends."""
    starting = asyncio.ensure_future(_start(command, folder, environment))
    try:
        transport, process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        with contextlib.suppress(ModelError):
            await _end(*await starting)
        raise
    timed_out = False
    try:
        stdin = cast(asyncio.WriteTransport, transport.get_pipe_transport(0))
        if not stdin.is_closing():  # it may have ended already
            stdin.write(text.encode())
            stdin.close()
        try:
            async with asyncio.timeout(timeout_seconds):
                await process.done.wait()
        except TimeoutError:
            timed_out = True
    finally:
        await _end(transport, process)
    status = transport.get_returncode()
    return _Ended(
        status=-signal.SIGKILL if status is None else status,
        stdout=bytes(process.stdout),
        stderr=bytes(process.stderr),
        timed_out=timed_out,
        is_cut=process.is_cut,
    )


async def _start(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> tuple[asyncio.SubprocessTransport, _Process]:
    loop = asyncio.get_running_loop()
    try:
        return await loop.subprocess_exec(_Process, *command, cwd=folder, env=dict(environment), start_new_session=True)
    except (OSError, ValueError) as exc:
        reason = f"cannot start '{command[0]}': {getattr(exc, 'strerror', None) or exc}"
        if isinstance(exc, OSError) and exc.errno in _EXHAUSTED:
            raise Unavailable(reason) from exc
        raise RequestRejected(reason, hint="It must be installed, and be a program, on every worker's host.") from exc


async def _end(transport: asyncio.SubprocessTransport, process: _Process) -> None:
    """End what is left of a process's group, read what it still had to say, and close its pipes."""
    try:
        await _end_group(transport.get_pid())
        # Only a process that left the group, or one stuck in the kernel, can keep these waiting.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.exited.wait()
                await process.silent.wait()
    finally:
        transport.close()


async def _end_group(group: int) -> None:
    is_left = _signal_group(group, signal.SIGTERM)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_SECONDS):
                while is_left:
                    await asyncio.sleep(0.01)
                    is_left = _signal_group(group, 0)
    finally:
        if is_left:
            _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Signal a process group; say whether it was there."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
