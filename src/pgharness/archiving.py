"""Archiving: a finished run's notes, grades and calls move into a file, and come back as they were.

Nothing leaves the database before its file was written, made durable, read back and given its name. Then one
transaction deletes the rows if they are still those in the file, or nothing; rows come back in one transaction too.
Both stream, so a run's size does not matter. The file is a ZIP of JSON lines: it can be read without pgharness.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from psycopg import Connection

from pgharness import __version__, database
from pgharness.errors import Conflict, HarnessError

OnProgress = Callable[[int], None]

_FORMAT = "pgharness archive"
_FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
# zlib's default level makes prose 8% smaller, and takes more than twice the time
_LEVEL = 3
_DERIVED = ("settled_notes", "reopenings")  # of runs: what is settled of them is summed up where they are
_BATCH_ROWS = 5_000
_BATCH_BYTES = 4_000_000
_CHECKSUM = "the first 60 bits of each line's SHA-256 (15 hexadecimal digits, without its line feed), summed"
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True, slots=True)
class Archive:
    """A run's file, with the number of rows of each table in it, and whether these rows are in the database too."""

    run_id: int
    run: str
    path: Path
    digest: str
    file_bytes: int
    rows: dict[str, int]
    is_detached: bool


def archive_run(
    connection: Connection[Any],
    url: str,
    run: str,
    folder: Path,
    *,
    keep: bool = False,
    on_progress: OnProgress | None = None,
) -> Archive:
    """Write a finished run, given by name or id, into a file in a folder, and delete its bulk unless it is to be kept.

    The same rows give a file of the same name, so after any interruption it can be called again. `url` is the database
    of `connection`, from which one state is read. Raises NotFound, WrongState (the run is not finished, is archived, or
    is being archived), Conflict (its rows changed meanwhile), and HarnessError when the file cannot be written.
    """
    with _file_errors(folder), database.snapshot(url) as source:
        (opened,) = database.call(source, "open_archive", run=run)
        content, about = _documented(opened["open_archive"])
        # the same name for the same run, so that a try that was killed leaves at most this file to the next
        identity = _digest({name: content[name] for name in ("run_id", "run", "created_at")})
        partial = folder / f".{_stem(content['run'])}-{identity[:12]}.partial"
        try:
            _make(folder)
            digest = _write(source, content, about, partial, on_progress)
            if _checked(partial)["digest"] != digest:
                raise HarnessError(
                    f"{partial} does not hold what was written", hint="Check the disk; nothing was lost."
                )
            path = folder / f"{_stem(content['run'])}-{digest[:12]}.zip"
            partial.replace(path)
            _sync(folder)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        size = path.stat().st_size
    if not keep:
        database.call(
            connection,
            "detach_run",
            run_id=content["run_id"],
            digest=digest,
            file_name=path.name,
            file_bytes=size,
            content=content,
        )
    return Archive(content["run_id"], content["run"], path, digest, size, _counts(content), is_detached=not keep)


def restore_run(connection: Connection[Any], path: Path, *, on_progress: OnProgress | None = None) -> Archive:
    """Bring the rows of an archived run back from its file; a run whose rows are back already stays as it is.

    The file is read whole before anything is changed. Raises NotFound, WrongState or Conflict when it is not the
    archive of a run of this database, and HarnessError when it is damaged.
    """
    manifest = _checked(path)
    content = manifest["content"]
    run_id, done = content["run_id"], 0
    with _file_errors(path), connection.transaction(), zipfile.ZipFile(path) as file:
        (archive,) = database.call(connection, "begin_restore", run_id=run_id, digest=manifest["digest"])
        if archive["restored_at"] is None:
            for member in content["members"]:
                for batch in _batches(file, member["name"]) if member["is_detached"] else ():
                    rows = b"[" + b",".join(batch) + b"]"
                    database.call(connection, "restore_rows", run_id=run_id, member=member["name"], rows=rows.decode())
                    done += len(batch)
                    if on_progress:
                        on_progress(done)
            database.call(connection, "finish_restore", run_id=run_id)
    size = path.stat().st_size
    return Archive(run_id, content["run"], path, manifest["digest"], size, _counts(content), is_detached=False)


def adopt_runs(connection: Connection[Any], paths: Iterable[Path]) -> list[str]:
    """Put archived runs with all that they rest on into a private database, from their files alone; return their names.

    The database has to be at this version and to hold no run, and its role to be its superuser. Raises Conflict for
    files that are not of one database or not of different runs, and HarnessError for a damaged one.
    """
    names: list[str] = []
    seen: dict[tuple[str, int], bytes] = {}
    for path in paths:
        content = _checked(path)["content"]
        if content["run"] in names:
            raise Conflict(f"{path} holds run {content['run']!r}, which another file holds", hint="Give each run once.")
        with _file_errors(path), zipfile.ZipFile(path) as file:
            for member in content["members"]:
                columns = [column["name"] for column in member["columns"] if column["name"] not in _DERIVED]
                for batch in _batches(file, member["name"]):
                    _check_same(member["name"], batch, seen, path)
                    rows = b"[" + b",".join(batch) + b"]"
                    database.adopt_rows(connection, member["name"], columns, rows.decode())
                    if member["name"] == "run_combinations":
                        models = {model["id"]: model for line in batch for model in _models(json.loads(line))}
                        for model in models.values():  # one by one, for each may have other columns
                            database.adopt_rows(connection, "models", model, json.dumps([model]))
        names.append(content["run"])
    return names


def _check_same(member: str, lines: Iterable[bytes], seen: dict[tuple[str, int], bytes], path: Path) -> None:
    """Raise Conflict for a row that another file has under the same id with another content."""
    if member in ("runs", "cases", "rubrics"):
        for line in lines:
            if seen.setdefault((member, json.loads(line)["id"]), line) != line:
                raise Conflict(
                    f"{path} is not of the database of the other files: a row of {member} is another one there",
                    hint="Report on archives of one database at a time.",
                )


def _models(combination: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the models of a frozen combination, those of ensembles and hedges with their members."""
    waiting = [combination["generator"], combination["grader"]]
    while waiting:
        model = waiting.pop()
        if isinstance(model, dict) and "id" in model:
            yield {name: value for name, value in model.items() if value is not None}
            waiting += model.get("members") or []


def finished_runs(connection: Connection[Any], before: datetime) -> list[str]:
    """Return the names of the runs that finished before a time and are not archived, oldest first."""
    found = [
        row
        for row in database.rows(connection, "runs", order="id")
        if row["finished_at"] is not None and row["finished_at"] < before and row["archived_at"] is None
    ]
    return [row["name"] for row in found]


# -- writing


class _Tally:
    """What is known of a member's lines: their number, the SHA-256 of them all, and the checksum of their set."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self.rows = 0
        self.checksum = 0

    def add(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self._sha256.update(line + b"\n")
            self.checksum += int(hashlib.sha256(line).hexdigest()[:15], 16)
            self.rows += 1

    @property
    def figures(self) -> dict[str, Any]:
        """As a manifest has them; the checksum as text, since it is larger than what others read as a number."""
        return {"rows": self.rows, "sha256": self._sha256.hexdigest(), "checksum": str(self.checksum)}


def _documented(opened: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an archive has to hold, and apart from it what the comments in the database say of that."""
    about = {}
    for member in opened["members"]:
        columns = {column["name"]: column.pop("about", None) for column in member["columns"]}
        about[member["name"]] = {"about": member.pop("about"), "columns": {k: v for k, v in columns.items() if v}}
    return opened, about


def _write(
    source: Connection[Any],
    content: dict[str, Any],
    about: Mapping[str, Any],
    path: Path,
    on_progress: OnProgress | None,
) -> str:
    """Write a file and see it onto the disk; the counts and digests of its members are added to the content."""
    done = 0
    with path.open("wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=_LEVEL) as file:
            for member in content["members"]:
                tally = _Tally()
                with file.open(_member(member["name"]), "w", force_zip64=True) as out:
                    for batch in _exported(source, content["run_id"], member["name"]):
                        tally.add(batch)
                        out.write(b"\n".join(batch) + b"\n")
                        done += len(batch)
                        if on_progress:
                            on_progress(done)
                member |= tally.figures
            digest = _digest(content)
            manifest = {
                "format": _FORMAT,
                "format_version": _FORMAT_VERSION,
                "pgharness": __version__,
                "written_at": datetime.now(UTC).isoformat(),
                "digest": digest,
                "checksum": _CHECKSUM,
                "content": content,
                "about": about,
            }
            file.writestr(_MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
        stream.flush()
        os.fsync(stream.fileno())
    return digest


def _exported(source: Connection[Any], run_id: int, member: str) -> Iterator[list[bytes]]:
    after = None
    while rows := database.call(source, "archive_rows", run_id=run_id, member=member, after=after):
        after = rows[-1]["archive_rows"]
        yield [row["archive_rows"].encode() for row in rows]


def _make(folder: Path) -> None:
    """Make a folder where there is none, and see its name onto the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(folder: Path) -> None:
    """See a folder's new names onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _stem(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", run).strip("-.")[:80] or "run"


def _member(table: str) -> str:
    return f"{table}.jsonl"


def _counts(content: Mapping[str, Any]) -> dict[str, int]:
    return {member["name"]: member["rows"] for member in content["members"]}


# -- reading


def _checked(path: Path) -> dict[str, Any]:
    """Read a file whole and return its manifest; raises HarnessError unless it holds what that says."""
    with _file_errors(path):
        try:
            with zipfile.ZipFile(path) as file:
                manifest = json.loads(file.read(_MANIFEST))
                if manifest["format"] != _FORMAT:
                    raise ValueError("its manifest is of something else")
                if manifest["format_version"] > _FORMAT_VERSION:
                    raise HarnessError(
                        f"{path} was written by pgharness {manifest['pgharness']}, which is newer",
                        hint="Upgrade this installation: pip install --upgrade pgharness.",
                    )
                if _digest(manifest["content"]) != manifest["digest"]:
                    raise ValueError("its manifest was changed")
                for member in manifest["content"]["members"]:
                    tally = _Tally()
                    for batch in _batches(file, member["name"]):
                        tally.add(batch)
                    if tally.figures != {name: member[name] for name in tally.figures}:
                        raise ValueError(f"{_member(member['name'])} is not what was written")
                return dict(manifest)
        except _DAMAGE as exc:
            raise HarnessError(
                f"{path} is damaged, or no archive of a run: {exc}",
                hint="Take another copy of the file; nothing was changed.",
            ) from exc


def _batches(file: zipfile.ZipFile, table: str) -> Iterator[list[bytes]]:
    """Yield the lines of a member, so many at a time as are handled at once."""
    with file.open(_member(table)) as stream:
        batch: list[bytes] = []
        size = 0
        for line in _lines(stream):
            batch.append(line)
            size += len(line)
            if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    for line in stream:
        yield line.removesuffix(b"\n")


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into HarnessError."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HarnessError(
                f"the disk of {path} is full", hint="Nothing was lost. Free some space, or choose another --out."
            ) from exc
        raise HarnessError(
            f"{exc.filename or path} cannot be used: {exc.strerror or exc}",
            hint="Nothing was lost. Check the path and its permissions, or choose another.",
        ) from exc
