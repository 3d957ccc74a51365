"""A run as files that need no pgharness to be read: JSON lines, its artifacts, its code, a manifest with checksums.

A folder or an archive appears under its name when it is whole, and what is there already is never overwritten. Rows
are streamed, so a run's size does not matter.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from psycopg import Connection

from pgharness import __version__, database, plugins
from pgharness.cli.session import plain
from pgharness.database import Row
from pgharness.errors import Conflict, HarnessError

_FORMAT = "pgharness run"
_FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_ARTIFACTS = "artifacts"
_LONGEST_NAME = 150


def finite(value: Any) -> Any:
    """Return a number as JSON can hold it: infinities and what is no number become texts."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# -- what is read


def versions_of(connection: Connection[Any], run_id: int, definition: Mapping[str, Any]) -> list[Row]:
    """Return the versions of its code that a run was executed with, in that order; else the one it was started with."""
    experiment = definition.get("experiment")
    used = sorted(database.rows(connection, "run_versions", run_id=run_id), key=lambda row: row["started_at"])
    found = [database.rows(connection, "experiment_versions", id=row["version_id"])[0] for row in used]
    if not found and (code := definition.get("code")):
        stored = database.rows(connection, "experiments", name=experiment)
        if stored:
            filters = {"experiment_id": stored[0]["id"], "digest": code["digest"]}
            found = database.rows(connection, "experiment_versions", **filters)
    return [{"experiment": experiment} | row for row in found]


def artifacts_of(connection: Connection[Any], run_id: int) -> list[Row]:
    """Return the artifacts of a run, each with the path below a folder under which it may be saved."""
    rows = database.rows(connection, "artifacts", run_id=run_id, order="id")
    taken: set[str] = set()
    for row in rows:
        row["path"] = _free(_safe(row["name"]), taken)
    return rows


def _safe(name: str) -> list[str]:
    """Return a name as steps of a path that stays below its folder, on any system."""
    steps = [re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", step).strip() for step in re.split(r"[/\\]", name)]
    kept = [step.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore") for step in steps]
    return [step for step in kept if step.strip(".")] or ["artifact"]


def _free(steps: list[str], taken: set[str]) -> str:
    """Return a path that is no other file's nor other file's folder, in any case of letters, and take it."""
    if any("/".join(steps[:n]).lower() in taken for n in range(1, len(steps))):
        steps = ["_".join(steps)]  # one of its folders is a file
    stem, dot, suffix = steps[-1].partition(".")
    path, number = "/".join(steps), 1
    while path.lower() in taken or f"{path.lower()}/" in taken:
        number += 1
        path = "/".join([*steps[:-1], f"{stem}~{number}{dot}{suffix}"])
    taken.add(path.lower())
    taken.update("/".join(steps[:n]).lower() + "/" for n in range(1, len(steps)))
    return path


def save_artifact(connection: Connection[Any], row: Row, folder: Path) -> None:
    """Write an artifact below a folder. Raises Conflict where another file is there, HarnessError for a damaged one."""
    file = folder / row["path"]
    stored = database.rows(connection, "artifact_contents", digest=row["digest"])
    content: bytes = stored[0]["content"] if stored else b""
    if hashlib.sha256(content).hexdigest() != row["digest"]:
        raise HarnessError(f"the content of artifact {row['name']!r} is damaged", hint="Restore a backup.")
    if file.is_file() and file.read_bytes() == content:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as opened:
            opened.write(content)
    except FileExistsError as exc:
        raise Conflict(f"{file} exists already, with another content", hint="Choose another folder.") from exc
    except OSError as exc:
        raise HarnessError(f"{file} cannot be written: {exc.strerror}", hint="Choose another folder.") from exc


# -- what is written


def export_run(url: str, record: Row, *, out: Path | None, archive: Path | None) -> dict[str, Any]:
    """Write a run into a folder, an archive, or both; return the manifest. Raises Conflict where something is there."""
    for place in filter(None, (out, archive)):
        if place.exists() and not (place is out and place.is_dir() and not any(place.iterdir())):
            raise Conflict(f"{place} exists already", hint="Choose another name.")
    try:
        with _partial(out or archive or Path()) as folder:
            manifest = _write(url, record, folder)
            if archive is not None:
                _pack(folder, archive, manifest)
            if out is not None:
                with suppress(OSError):
                    out.rmdir()  # an empty one gives way
                folder.rename(out)
    except OSError as exc:
        where = exc.filename or out or archive
        raise HarnessError(f"{where} cannot be written: {exc.strerror}", hint="Choose another place.") from exc
    return manifest


def export_as(
    url: str, record: Row, *, exporter: str, out: Path, seconds: float = plugins.IMPORT_SECONDS
) -> dict[str, Any]:
    """Let an exporter's plugin write a run in its own form; return the manifest of the files that it was given.

    Raises Conflict where something is there, PluginBroken when the plugin fails; then nothing is there.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} exists already", hint="Choose another name.")
    export = plugins.load("exporters", exporter, seconds=seconds)
    plugin = plugins.find("exporters", exporter)
    try:
        with _partial(out) as staging:
            given, made = staging / "run", staging / "made" / out.name
            given.mkdir()
            made.parent.mkdir()
            manifest = _write(url, record, given)
            try:
                export(given, made)
            except (Exception, SystemExit) as exc:
                raise plugin.failed(exc) from exc
            if not made.exists():
                raise plugin.broken("it wrote nothing")
            with suppress(OSError):
                out.rmdir()  # an empty folder gives way
            made.rename(out)
    except OSError as exc:
        raise HarnessError(f"{exc.filename or out} cannot be written: {exc.strerror}", hint="Choose another.") from exc
    return manifest


@contextmanager
def _partial(place: Path) -> Iterator[Path]:
    """Make a folder beside a place, which is gone afterwards unless it was renamed."""
    place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(url: str, record: Row, folder: Path) -> dict[str, Any]:
    run_id = record["run_id"]
    counts: dict[str, int] = {}

    def write(name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        counts[name] = _write_lines(folder / name, lines)

    with ExitStack() as stack:
        # one each, for each has a cursor of its own; a run that is over does not change between them
        connections = [stack.enter_context(database.snapshot(url)) for _ in range(3)]
        write("run.jsonl", _events(connections, record))
        connection = connections[0]
        write("metrics.jsonl", map(_metric, _rows(connection, "run_metrics", run_id)))
        write("timings.jsonl", map(_timing, _rows(connection, "run_timings", run_id)))
        write("results.jsonl", map(_result, _rows(connection, "results", run_id)))
        tasks = _rows(connection, "task_results", run_id, order="ordinal")
        write("tasks.jsonl", ({key: row[key] for key in row if key not in ("run_id", "run")} for row in tasks))
        for row in artifacts_of(connection, run_id):
            save_artifact(connection, row, folder / _ARTIFACTS)
        (definition,) = database.rows(connection, "run_definitions", run_id=run_id)
        versions = versions_of(connection, run_id, definition["definition"])
        kept = artifacts_of(connection, run_id)
    for version in versions:
        _write_code(folder / "code", version)
    (folder / _ARTIFACTS).mkdir(exist_ok=True)
    manifest = _manifest(record, definition["definition"], versions, kept) | {"files": list(_files(folder, counts))}
    (folder / _MANIFEST).write_text(_json(manifest, indent=2) + "\n", "utf-8")
    return manifest


def _manifest(record: Row, definition: Row, versions: list[Row], artifacts: list[Row]) -> dict[str, Any]:
    names = ("run_id", "run", "experiment", "instance", "kind", "status", "reason", "started_at", "finished_at")
    code = ("number", "digest", "module", "function", "git_commit", "is_dirty", "created_by", "created_at")
    kept = ("name", "media_type", "digest", "size_bytes", "task", "created_at")
    return {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "pgharness": __version__,
        "exported_at": datetime.now(UTC),
        "run": {key: record[key] for key in (*names, "active_seconds", "cost_usd")},
        "definition": definition,
        "code": [{key: version[key] for key in code} for version in versions],
        "artifacts": [{key: row[key] for key in kept} | {"path": f"{_ARTIFACTS}/{row['path']}"} for row in artifacts],
    }


def _files(folder: Path, counts: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        told = {"path": name, "sha256": digest, "size_bytes": file.stat().st_size}
        yield told | ({"rows": counts[name]} if name in counts else {})


def _write_code(folder: Path, version: Row) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"version-{version['number']}.py").write_text(version["source"], "utf-8", newline="")
    if version["git_diff"]:
        (folder / f"version-{version['number']}.diff").write_text(version["git_diff"], "utf-8", newline="")


def _pack(folder: Path, archive: Path, manifest: Mapping[str, Any]) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(f".{archive.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as opened:
            for name in (_MANIFEST, *(file["path"] for file in manifest["files"])):
                opened.write(folder / name, name)
        partial.rename(archive)
    finally:
        partial.unlink(missing_ok=True)


# -- lines


def _rows(connection: Connection[Any], view: str, run_id: int, order: str = "id") -> Iterator[Row]:
    for columns, rows in database.stream(connection, view, order=order, run_id=run_id):
        for values in rows:
            yield dict(zip(columns, values, strict=True))


def _write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    with file.open("w", encoding="utf-8", errors="replace", newline="\n") as opened:
        for line in lines:
            opened.write(_json(line) + "\n")
            count += 1
    return count


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, default=plain, ensure_ascii=False, indent=indent)


def _told(row: Row, *names: str) -> dict[str, Any]:
    """Return some columns of a row where they say something; a task only when it is not the run's function."""
    task = {"task": row["task"]} if row.get("task") else {}
    return {name: finite(row[name]) for name in names if row[name] not in (None, "", {})} | task


def _at(row: Row, event: str | None = None) -> dict[str, Any]:
    return {"timestamp": row["created_at"]} | ({} if event is None else {"event_type": event})


def _metric(row: Row) -> dict[str, Any]:
    value = {"name": row["name"], "value": finite(row["value"]), "type": row["metric_type"]}
    return _at(row) | {"run_id": row["run"]} | value | _told(row, "step", "data")


def _timing(row: Row) -> dict[str, Any]:
    return _at(row) | {"run_id": row["run"], "operation": row["operation"]} | _told(row, "duration_ms")


def _result(row: Row) -> dict[str, Any]:
    return _at(row) | {"key": row["key"], "value": row["value"]} | _told(row)


def _log(row: Row) -> dict[str, Any]:
    return _at(row, "log") | {"level": row["level"], "message": row["message"]} | _told(row, "data")


def _llm_call(row: Row) -> dict[str, Any]:
    values = {"model": row["model"], "input": row["input"], "output": row["output"]}
    return _at(row, "llm_call") | values | _told(row, "duration_ms", "error")


def _events(connections: list[Connection[Any]], record: Row) -> Iterator[Mapping[str, Any]]:
    """Yield what happened in a run, in the order of time as far as each kind's own order allows."""
    run_id = record["run_id"]
    models = {row["id"]: row["name"] for row in database.rows(connections[0], "models")}

    def call(row: Row) -> dict[str, Any]:
        asked = {"created_at": row["started_at"], "task": row["ordinal"]} | row
        told = {"model": models.get(row["model_id"]), "output": row["answer"], "duration_ms": row["latency_ms"]}
        names = ("outcome", "error", "input_tokens", "output_tokens", "cached_tokens", "cost_usd")
        return _at(asked, "llm_call") | told | _told(asked, *names)

    sources: list[tuple[str, Callable[[Row], dict[str, Any]]]] = [("logs", _log), ("run_llm_calls", _llm_call)]
    streams = [map(make, _rows(each, view, run_id)) for (view, make), each in zip(sources, connections, strict=False)]
    streams.append(map(call, _rows(connections[2], "calls", run_id)))
    started = {"timestamp": record["started_at"], "event_type": "run_started", "run_id": record["run"]}
    yield started | {"run_type": record["kind"], "instance": record["instance"], "experiment": record["experiment"]}
    yield from heapq.merge(*streams, key=lambda event: event["timestamp"])
    if record["finished_at"] is not None:
        ended = {"timestamp": record["finished_at"], "event_type": "run_finished", "run_id": record["run"]}
        yield ended | {
            "status": record["status"],
            "reason": record["reason"],
            "duration_seconds": record["active_seconds"],
        }
