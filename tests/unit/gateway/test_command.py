"""Programs at a pinned commit: what they are told, what becomes of their answers, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pgharness.errors import CodeFailed, InvalidOutput, ModelError, RequestRejected, ServerFailed, TimedOut
from pgharness.gateway.command import Command
from pgharness.types import ModelSpec, Request, Usage

SRC = Path(__file__).parents[3] / "src"
GIT = shutil.which("git")
pytestmark = pytest.mark.skipif(GIT is None, reason="git is not installed")

ECHO = """
    import json, os, sys
    asked = json.load(sys.stdin)
    told = {name: value for name, value in os.environ.items() if name.startswith("PGHARNESS_")}
    print(json.dumps({"asked": asked, "told": told, "environment": sorted(os.environ), "folder": os.getcwd()}))
"""


class Repository:
    """A git repository to commit programs to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        person = ("-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(self.path), *person, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, source: str, *, name: str = "note.py") -> str:
        """Commit a program and return the commit's hash."""
        (self.path / name).write_text(textwrap.dedent(source))
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", f"Write {name}")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "program")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache root; what is read-only in it becomes removable at the end."""
    root = tmp_path / "cache"
    yield root
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o700)


@pytest.fixture(autouse=True)
def plain_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")


def program(
    cache: Path, repository: Repository | str | None = None, *, timeout_seconds: float = 30.0, **parameters: Any
) -> Command:
    where = str(repository.path) if isinstance(repository, Repository) else repository
    parameters = (
        {"command": [sys.executable, "note.py"]} | parameters | ({} if where is None else {"repository": where})
    )
    spec = ModelSpec(
        id=1, name="scribe", provider="command", model="gpt-x", parameters=parameters, timeout_seconds=timeout_seconds
    )
    return Command(spec, cache_root=cache)


def inline(cache: Path, source: str, **settings: Any) -> Command:
    """A program given on the command line: no repository is needed to see what becomes of its answer."""
    return program(cache, command=[sys.executable, "-c", textwrap.dedent(source)], **settings)


def request(version: str | None = None, *, case_input: Any = "The patient coughs.", **more: Any) -> Request:
    item = {
        "case": {"name": "cough", "input": case_input, "metadata": {"ward": 3}},
        "config": {"style": "brief"},
        "software_version": version,
        "overlap": 100,
        "cycle_times": [0, 30],
        "replication": 4,
    }
    return Request(messages=(), seed=99, attempt=2, is_reasoning=True, item=item | more)


async def failure(command: Command, asked: Request | None = None) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await command(asked or request())
    return caught.value


async def until(condition: Callable[[], object], *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits for its parent to notice does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def pids(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


# ---- what a program is told ------------------------------------------------------------------------------------------


async def test_a_program_gets_its_case_on_standard_input_and_its_settings_in_its_environment(
    repository: Repository, cache: Path
) -> None:
    commit = repository.commit(ECHO)
    completion = await program(cache, repository, temperature=0.5)(request(commit))
    assert completion.data["asked"] == {
        "case": {"name": "cough", "input": "The patient coughs.", "metadata": {"ward": 3}},
        "config": {"style": "brief"},
        "model": {"name": "scribe", "model": "gpt-x", "is_reasoning": True, "parameters": {"temperature": 0.5}},
    }
    assert completion.data["told"] == {
        "PGHARNESS_MODEL": "gpt-x",
        "PGHARNESS_IS_REASONING": "true",
        "PGHARNESS_PARAMETERS": '{"temperature": 0.5}',
        "PGHARNESS_CASE": "cough",
        "PGHARNESS_OVERLAP": "100",
        "PGHARNESS_CYCLE_TIMES": "[0, 30]",
        "PGHARNESS_REPLICATION": "4",
        "PGHARNESS_SEED": "99",
        "PGHARNESS_ATTEMPT": "2",
        "PGHARNESS_SOFTWARE_VERSION": commit,
    }
    assert completion.model == commit
    assert json.loads(completion.text) == completion.data


async def test_a_program_that_grades_gets_note_and_rubric(cache: Path) -> None:
    command = inline(cache, "import json, sys; print(json.dumps(sorted(json.load(sys.stdin))))")
    completion = await command(request(note={"plan": "rest"}, rubric={"criteria": []}))
    assert completion.data == ["case", "config", "model", "note", "rubric"]


async def test_a_program_sees_nothing_of_the_workers_environment_but_what_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHARNESS_DATABASE_URL", "postgresql://worker:secret@db/x")
    monkeypatch.setenv("SCRIBE_KEY", "sk-named-and-passed")
    monkeypatch.setenv("OTHER_KEY", "sk-not-named")
    completion = await inline(cache, ECHO, environment=["SCRIBE_KEY"])(request())
    seen = {name for name in completion.data["environment"] if not name.startswith("PGHARNESS_")}
    assert "SCRIBE_KEY" in seen
    assert seen <= {
        "SCRIBE_KEY",
        "PATH",
        "HOME",
        "LANG",
        "TMPDIR",
        "VIRTUAL_ENV",
        "PYTHONDONTWRITEBYTECODE",
        "LC_CTYPE",
    }
    assert "PGHARNESS_DATABASE_URL" not in completion.data["told"]


async def test_the_prefix_of_the_variables_is_the_users(cache: Path) -> None:
    completion = await inline(cache, ECHO, env_prefix="SCRIBE_")(request())
    assert completion.data["told"] == {}
    assert {"SCRIBE_MODEL", "SCRIBE_SEED", "SCRIBE_OVERLAP"} <= set(completion.data["environment"])


async def test_without_a_repository_a_program_runs_in_an_empty_folder(cache: Path) -> None:
    completion = await inline(cache, "import json, os; print(json.dumps([os.getcwd(), os.listdir()]))")(request())
    assert completion.data == [str((cache / "empty").resolve()), []]
    assert completion.model is None


async def test_a_large_case_reaches_the_program_and_one_that_it_does_not_read_does_no_harm(cache: Path) -> None:
    big = "word " * 400_000
    length = inline(cache, "import json, sys; print(len(json.load(sys.stdin)['case']['input']))")
    assert (await length(request(case_input=big))).data == len(big)
    assert (await inline(cache, "print(1)")(request(case_input=big))).data == 1


# ---- commits and checkouts -------------------------------------------------------------------------------------------


async def test_a_version_is_the_program_as_it_was_then(repository: Repository, cache: Path) -> None:
    old = repository.commit("print(1)")
    new = repository.commit("print(2)")
    command = program(cache, repository)
    assert (await command(request(old))).data == 1
    assert (await command(request(new))).data == 2
    assert (await command(request(old))).data == 1


async def test_short_hashes_tags_and_branches_are_resolved_to_the_full_hash(
    repository: Repository, cache: Path
) -> None:
    commit = repository.commit("print(1)")
    repository.git("tag", "--annotate", "--message", "First", "v1")
    repository.git("branch", "feature/x")
    command = program(cache, repository)
    for version in (commit, commit[:9], commit.upper(), "v1", "feature/x", "main"):
        assert (await command(request(version))).model == commit
    trees = [path for path in (cache / "worktrees").glob("*/*") if path.is_dir()]
    assert [tree.name for tree in trees] == [commit]


async def test_a_branch_that_moves_does_not_change_a_worker_that_has_begun(repository: Repository, cache: Path) -> None:
    first = repository.commit("print(1)")
    command = program(cache, repository)
    assert (await command(request("main"))).model == first
    repository.commit("print(2)")
    assert (await command(request("main"))).model == first


async def test_uncommitted_changes_are_not_run(repository: Repository, cache: Path) -> None:
    commit = repository.commit("print(1)")
    (repository.path / "note.py").write_text("print(3)")
    assert (await program(cache, repository)(request(commit))).data == 1
    assert repository.git("status", "--porcelain") == "M note.py"
    assert len(repository.git("worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("version", ["0123456789abcdef0123456789abcdef01234567", "v9", "--help", "main:note.py", "a b"])
async def test_a_commit_that_does_not_exist_is_refused_by_name(
    repository: Repository, cache: Path, version: str
) -> None:
    repository.commit("print(1)")
    error = await failure(program(cache, repository), request(version))
    assert isinstance(error, RequestRejected)
    assert version in str(error) and str(repository.path) in str(error)
    assert error.hint and "fetch" in error.hint


@pytest.mark.parametrize("version", [None, "", "  "])
async def test_a_repository_without_a_version_is_refused(
    repository: Repository, cache: Path, version: str | None
) -> None:
    repository.commit("print(1)")
    error = await failure(program(cache, repository), request(version))
    assert isinstance(error, RequestRejected)
    assert error.hint and "software_version" in error.hint


async def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path, repository: Repository, cache: Path) -> None:
    commit = repository.commit("print(1)")
    missing = await failure(program(cache, str(tmp_path / "nowhere")), request(commit))
    assert isinstance(missing, RequestRejected) and "nowhere" in str(missing)
    (repository.path / "sub").mkdir()
    inside = await failure(program(cache, str(repository.path / "sub")), request(commit))
    assert isinstance(inside, RequestRejected) and "sub" in str(inside)


async def test_a_checkout_cannot_be_written_to(repository: Repository, cache: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("nothing on this host binds root to a file's mode")
    (repository.path / "data").mkdir()
    (repository.path / "data" / "facts.txt").write_text("fact")
    commit = repository.commit(
        """
        import json, os, helper
        errors = []
        for path in ("note.py", "new.txt", "data/facts.txt", "data/new.txt", ".git/config"):
            try:
                open(path, "a").close()
            except OSError as exc:
                errors.append(type(exc).__name__)
        print(json.dumps(errors))
        """
    )
    commit = repository.commit("", name="helper.py")
    command = program(cache, repository)
    assert (await command(request(commit))).data == ["PermissionError"] * 5
    tree = next((cache / "worktrees").glob(f"*/{commit}"))
    assert not list(tree.rglob("__pycache__"))
    assert not [path for path in tree.rglob("*") if not path.is_symlink() and path.stat().st_mode & 0o222]


async def test_what_a_link_in_a_checkout_points_to_keeps_its_mode(
    tmp_path: Path, repository: Repository, cache: Path
) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    outside.chmod(0o644)
    (repository.path / "link").symlink_to(outside)
    await program(cache, repository)(request(repository.commit("print(1)")))
    assert outside.stat().st_mode & 0o777 == 0o644


WORKER = """
    import asyncio, os, sys
    from pathlib import Path
    from pgharness.gateway.command import Command
    from pgharness.types import ModelSpec, Request

    cache, repository, commit, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    parameters = {"command": [sys.executable, "note.py"], "repository": repository}
    command = Command(ModelSpec(id=1, name="scribe", provider="command", parameters=parameters), cache_root=cache)

    async def main():
        asked = Request(messages=(), item={"case": {}, "software_version": commit})
        print(sum([answer.data for answer in await asyncio.gather(*(command(asked) for _ in range(count)))]))

    asyncio.run(main())
"""


def worker(cache: Path, repository: Repository, commit: str, *, path: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(SRC), "PATH": path}
    source = textwrap.dedent(WORKER)
    arguments = [sys.executable, "-c", source, str(cache), str(repository.path), commit, "2"]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def git_in_front(tmp_path: Path, script: str) -> str:
    """Return a PATH on which git first runs a line of shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(f'#!/bin/sh\n{script}\nexec {GIT} "$@"\n')
    (folder / "git").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


async def test_racing_workers_make_one_checkout(tmp_path: Path, repository: Repository, cache: Path) -> None:
    commit = repository.commit("print(1)")
    path = git_in_front(tmp_path, f'case " $* " in *" clone "*) echo clone >> {tmp_path}/clones;; esac')
    workers = [worker(cache, repository, commit, path=path) for _ in range(8)]
    answers = [await asyncio.to_thread(started.communicate, timeout=120) for started in workers]
    assert [out.strip() for out, _ in answers] == ["2"] * 8, [err for _, err in answers]
    assert (tmp_path / "clones").read_text().split() == ["clone"]
    assert {entry.name for entry in next((cache / "worktrees").iterdir()).iterdir()} == {"lock", commit}


async def test_a_worker_killed_in_the_middle_of_a_checkout_leaves_nothing_that_matters(
    tmp_path: Path, repository: Repository, cache: Path
) -> None:
    commit = repository.commit("print(1)")
    hanging = tmp_path / "hanging"
    path = git_in_front(tmp_path, f'case " $* " in *" checkout "*) echo $$ > {hanging}; exec sleep 600;; esac')
    started = worker(cache, repository, commit, path=path)
    try:
        await until(lambda: pids(hanging))
        started.kill()
        started.communicate()
        assert (await program(cache, repository)(request(commit))).data == 1
        assert {entry.name for entry in next((cache / "worktrees").iterdir()).iterdir()} == {"lock", commit}
    finally:
        started.kill()
        os.kill(pids(hanging)[0], signal.SIGKILL)


async def test_cancelling_a_checkout_ends_git_and_lets_the_next_worker_begin(
    tmp_path: Path, repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = repository.commit("print(1)")
    hanging = tmp_path / "hanging"
    normal_path = os.environ["PATH"]
    monkeypatch.setenv(
        "PATH", git_in_front(tmp_path, f'case "$*" in *checkout*) echo $$ > {hanging}; sleep 600;; esac')
    )
    running = asyncio.create_task(program(cache, repository)(request(commit)))
    await until(lambda: pids(hanging))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not is_alive(pids(hanging)[0]), seconds=1)
    monkeypatch.setenv("PATH", normal_path)
    assert (await program(cache, repository)(request(commit))).data == 1


async def test_a_remote_repository_is_fetched_when_a_commit_is_not_known_yet(
    repository: Repository, cache: Path, tmp_path: Path
) -> None:
    url = f"file://{repository.path}"
    old = repository.commit("print(1)")
    command = program(cache, url)
    assert (await command(request(old))).data == 1
    new = repository.commit("print(2)")
    repository.git("tag", "v2")
    assert (await command(request(new))).data == 2
    unknown = await failure(command, request("v3"))
    assert isinstance(unknown, RequestRejected) and "v3" in str(unknown) and url in str(unknown)
    repository.path.rename(tmp_path / "gone")
    assert (await program(cache, url)(request(old))).data == 1, "a commit that is here needs no network"
    unreachable = await failure(program(cache, url), request("v2"))
    assert isinstance(unreachable, ServerFailed) and url in str(unreachable) and unreachable.text


@pytest.mark.parametrize("url", ["https://token@host/x.git", "https://me:word@host/x", "ssh://me:word@host/x"])
def test_a_url_that_holds_a_secret_is_refused_unseen(cache: Path, url: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        program(cache, url)
    assert "token" not in str(caught.value).replace("password or token", "") and "word@" not in str(caught.value)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note", [{"plan": "rest"}, ["a", 1], 12.5, True, {}, {"note": "x"}, {"note": 1, "usage": "often"}]
)
async def test_any_json_is_a_note(cache: Path, note: Any) -> None:
    completion = await inline(cache, f"import json; print(json.dumps({note!r}))")(request())
    assert completion.data == note and json.loads(completion.text) == note
    assert completion.finish_reason == "stop"


async def test_a_json_string_is_a_note_of_text(cache: Path) -> None:
    completion = await inline(cache, """print('"Dear colleague, \\\\u00e9"')""")(request())
    assert (completion.text, completion.data) == ("Dear colleague, é", None)


async def test_a_usage_beside_the_note_is_counted(cache: Path) -> None:
    source = """print('{"note": {"plan": "rest"}, "usage": {"input_tokens": 900, "output_tokens": 45}}')"""
    completion = await inline(cache, source)(request())
    assert completion.data == {"plan": "rest"}
    assert completion.usage == Usage(900, 45)


@pytest.mark.parametrize("count", ['"many"', "-1", "1.5", "true", "1e99"])
async def test_a_usage_that_is_no_count_is_refused(cache: Path, count: str) -> None:
    error = await failure(inline(cache, f"""print('{{"note": 1, "usage": {{"input_tokens": {count}}}}}')"""))
    assert isinstance(error, InvalidOutput) and "usage" in str(error)


@pytest.mark.parametrize(
    "source",
    [
        "print('Thinking...'); print('{}')",
        "print('{\"a\": NaN}')",
        "print('{\"a\": 1e999}')",
        "print('{\"a\": ')",
        "print('[' * 100_000)",
        "import sys; sys.stdout.buffer.write(b'\\xff\\xfe\\x00')",
    ],
)
async def test_output_that_is_not_json_is_refused_and_kept(cache: Path, source: str) -> None:
    error = await failure(inline(cache, source))
    assert isinstance(error, InvalidOutput)
    assert error.text and len(error.text) <= 20_000
    error.text.encode()
    assert "\0" not in error.text


@pytest.mark.parametrize("source", ["", "print('  ')", "print('null')", "print('\"\"')"])
async def test_an_answer_of_nothing_is_refused(cache: Path, source: str) -> None:
    assert isinstance(await failure(inline(cache, source)), InvalidOutput)


async def test_characters_that_postgres_cannot_store_are_replaced(cache: Path) -> None:
    completion = await inline(cache, """print('{"a": "x\\\\u0000y", "b": "\\\\ud800", "c": "\\\\\\\\u0000"}')""")(
        request()
    )
    assert completion.data == {"a": "x\ufffdy", "b": "\ufffd", "c": "\\u0000"}


async def test_a_program_that_fails_keeps_the_end_of_its_standard_error(cache: Path) -> None:
    source = "import sys; print('{}'); sys.stderr.write('start' + 'x' * 100_000 + 'end'); sys.exit(3)"
    error = await failure(inline(cache, source))
    assert isinstance(error, CodeFailed)
    assert "status 3" in str(error)
    assert error.text and len(error.text) == 4_000 and error.text.endswith("xend")
    traceback = await failure(inline(cache, "raise ValueError('bad \\0 case')"))
    assert traceback.text and "ValueError: bad \ufffd case" in traceback.text


async def test_a_program_ended_by_a_signal_has_failed(cache: Path) -> None:
    error = await failure(inline(cache, "import os; os.kill(os.getpid(), 11)"))
    assert isinstance(error, CodeFailed) and "signal 11" in str(error)


async def test_secrets_that_were_passed_on_are_in_nothing_that_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = 'sk-"quoted"\\ümlaut-123456'
    monkeypatch.setenv("SCRIBE_KEY", secret)
    monkeypatch.setenv("FLAG", "1")
    head = "import json, os, sys; key = os.environ['SCRIBE_KEY'];"
    ends = {
        "note": "print(json.dumps({'key': key, key: [f'Bearer {key}'], 'count': 11}))",
        "not JSON": "print('leaked', key, json.dumps(key))",
        "failure": "sys.exit(f'leaked {key} {json.dumps(key)}')",
        "silence": "sys.stderr.write(f'leaked {key}')",
        "too long": "print(key * 1_000_000)",
    }
    for end, source in ends.items():
        command = inline(cache, head + source, environment=["SCRIBE_KEY", "FLAG"])
        if end == "note":
            completion = await command(request())
            assert completion.data == {"key": "[redacted]", "[redacted]": ["Bearer [redacted]"], "count": 11}
            kept = repr(completion)
        else:
            error = await failure(command)
            kept = f"{error} {error.text} {error.hint} {error!r}"
            assert "[redacted]" in kept, end
        assert "quoted" not in kept and "123456" not in kept, end


async def test_output_is_capped(cache: Path) -> None:
    below = await inline(cache, "print('[\"' + 'x' * 9_000_000 + '\"]')")(request())
    assert len(below.data[0]) == 9_000_000
    endless = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    error = await failure(inline(cache, endless))
    assert isinstance(error, InvalidOutput) and "10,000,000" in str(error)
    assert error.text and len(error.text) <= 20_000


# ---- endings ---------------------------------------------------------------------------------------------------------

# Writes its own pid and a grandchild's, which ignores SIGTERM, as it does itself when told to.
FAMILY = """
    import os, signal, subprocess, sys, time
    family, stubborn = {family!r}, {stubborn!r}
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ignore if stubborn else "import time; time.sleep(600)"],
                             stdout=subprocess.PIPE if stubborn else None)
    if stubborn:
        child.stdout.readline()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(family + ".new", "w") as file:
        file.write(f"{{os.getpid()}} {{child.pid}}")
    os.rename(family + ".new", family)
    {then}
"""


def family(
    cache: Path, tmp_path: Path, *, stubborn: bool = False, then: str = "time.sleep(600)", **settings: Any
) -> Command:
    source = textwrap.dedent(FAMILY).format(family=str(tmp_path / "family"), stubborn=stubborn, then=then)
    return inline(cache, source, **settings)


@pytest.mark.parametrize("stubborn", [False, True])
async def test_past_its_timeout_a_program_is_ended_with_its_children(
    cache: Path, tmp_path: Path, stubborn: bool
) -> None:
    then = "sys.stderr.write('still thinking'); sys.stderr.flush(); time.sleep(600)"
    error = await failure(family(cache, tmp_path, stubborn=stubborn, then=then, timeout_seconds=1.5))
    assert isinstance(error, TimedOut)
    assert "1.5 s" in str(error) and error.text == "still thinking"
    assert len(pids(tmp_path / "family")) == 2
    await until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "family")), seconds=1)


async def test_a_cancelled_program_is_ended_at_once_with_its_children(cache: Path, tmp_path: Path) -> None:
    running = asyncio.create_task(family(cache, tmp_path)(request()))
    await until(lambda: pids(tmp_path / "family"))
    cancelled = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - cancelled < 1.5
    await until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "family")), seconds=1)


async def test_a_cancelled_program_that_ignores_sigterm_is_killed(cache: Path, tmp_path: Path) -> None:
    running = asyncio.create_task(family(cache, tmp_path, stubborn=True)(request()))
    await until(lambda: pids(tmp_path / "family"))
    cancelled = time.monotonic()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert 0.7 < time.monotonic() - cancelled < 2  # SIGTERM had its chance, and a cancelled run ends in time
    await until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "family")), seconds=1)


async def test_a_second_cancellation_kills_without_waiting(cache: Path, tmp_path: Path) -> None:
    running = asyncio.create_task(family(cache, tmp_path, stubborn=True)(request()))
    await until(lambda: pids(tmp_path / "family"))
    running.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    again = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert time.monotonic() - again < 1.5
    await until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "family")), seconds=1)


async def test_a_program_may_tidy_up_when_it_is_asked_to_end(cache: Path, tmp_path: Path) -> None:
    started, tidied = tmp_path / "started", tmp_path / "tidied"
    source = f"""
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (open({str(tidied)!r}, "w").close(), sys.exit(0)))
        open({str(started)!r}, "w").close()
        time.sleep(600)
    """
    running = asyncio.create_task(inline(cache, source)(request()))
    await until(started.exists)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert tidied.exists()


async def test_cancelling_while_a_program_starts_leaves_none_behind(cache: Path, tmp_path: Path) -> None:
    born = tmp_path / "born"
    born.mkdir()
    source = f"import os, time; open(os.path.join({str(born)!r}, str(os.getpid())), 'w').close(); time.sleep(600)"
    for turns in range(12):
        running = asyncio.create_task(inline(cache, source)(request()))
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await until(lambda: not any(is_alive(int(path.name)) for path in born.iterdir()), seconds=1)


async def test_a_child_left_running_neither_delays_the_answer_nor_survives_it(cache: Path, tmp_path: Path) -> None:
    asked = time.monotonic()
    completion = await family(cache, tmp_path, then="print(7, flush=True)")(request())
    assert completion.data == 7
    assert time.monotonic() - asked < 10
    await until(lambda: not any(is_alive(pid) for pid in pids(tmp_path / "family")), seconds=1)


async def test_a_child_that_leaves_the_group_cannot_hold_up_the_answer(cache: Path, tmp_path: Path) -> None:
    escaped = tmp_path / "escaped"
    source = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open({str(escaped)!r}, "w").write(str(child.pid))
        print(7)
    """
    try:
        assert (await inline(cache, source)(request())).data == 7
    finally:
        os.kill(pids(escaped)[0], signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="this system does not list a process's open files")
async def test_no_file_and_no_zombie_is_left(cache: Path, tmp_path: Path, repository: Repository) -> None:
    commit = repository.commit("print(1)")
    await program(cache, repository)(request(commit))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        await program(cache, repository)(request(commit))
        await failure(inline(cache, "import sys; sys.exit(1)"))
        await failure(inline(cache, "import time; time.sleep(600)", timeout_seconds=0.1))
        await failure(program(cache, command=["./missing"]))
    assert len(os.listdir("/proc/self/fd")) == before
    with contextlib.suppress(ChildProcessError):  # no child at all
        assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


# ---- wrong settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"command": None}, "command"),
        ({"command": []}, "command"),
        ({"command": "python note.py"}, "command"),
        ({"command": ["x", 1]}, "command.1"),
        ({"repository": ""}, "repository"),
        ({"repository": 5}, "repository"),
        ({"environment": ["A=B"]}, "environment.0"),
        ({"environment": "OPENAI_API_KEY"}, "environment"),
        ({"env_prefix": "my-"}, "env_prefix"),
    ],
)
def test_parameters_that_cannot_be_used_are_named(cache: Path, parameters: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestRejected) as caught:
        program(cache, **parameters)
    assert f"{named}:" in str(caught.value) and "scribe" in str(caught.value)


def test_a_command_is_required(cache: Path) -> None:
    with pytest.raises(RequestRejected, match="command: Field required"):
        Command(ModelSpec(id=1, name="scribe", provider="command"), cache_root=cache)


async def test_a_variable_that_the_worker_lacks_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRIBE_KEY", raising=False)
    error = await failure(inline(cache, "print(1)", environment=["SCRIBE_KEY"]))
    assert isinstance(error, RequestRejected) and "SCRIBE_KEY" in str(error)


@pytest.mark.parametrize(
    "name", ["no-such-program-here", "", "./missing", "./plain.txt", "/nonexistent/program", "./folder"]
)
async def test_a_program_that_is_not_there_is_named(repository: Repository, cache: Path, name: str) -> None:
    (repository.path / "folder").mkdir()
    (repository.path / "folder" / "keep").touch()
    commit = repository.commit("no program", name="plain.txt")
    error = await failure(program(cache, repository, command=[name]), request(commit))
    assert isinstance(error, RequestRejected) and name in str(error) and error.hint


async def test_an_executable_of_the_checkout_can_be_the_program(repository: Repository, cache: Path) -> None:
    script = repository.path / "note.sh"
    script.write_text('#!/bin/sh\necho "[\\"$1\\", \\"$PGHARNESS_OVERLAP\\"]"\n')
    script.chmod(0o755)
    commit = repository.commit("")
    assert (await program(cache, repository, command=["./note.sh", "a b"])(request(commit))).data == ["a b", "100"]


async def test_a_file_that_no_system_can_run_is_refused(repository: Repository, cache: Path) -> None:
    (repository.path / "broken").write_bytes(b"\x7fELF nothing")
    (repository.path / "broken").chmod(0o755)
    error = await failure(program(cache, repository, command=["./broken"]), request(repository.commit("")))
    assert isinstance(error, (RequestRejected, CodeFailed)) and "./broken" in str(error)


async def test_a_cache_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = await failure(inline(tmp_path / "file", "print(1)"))
    assert isinstance(error, CodeFailed) and str(tmp_path / "file") in str(error)
