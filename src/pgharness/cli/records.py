"""Commands that show what runs recorded: list, show, logs, results, diff, artifacts, export."""

from __future__ import annotations

import difflib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from psycopg import Connection
from rich.text import Text

from pgharness import database
from pgharness.cli import exports
from pgharness.cli.configs import flattened
from pgharness.cli.runs import progress_of, shortened
from pgharness.cli.session import Json, Run, duration, plain, print_json, session_of, stderr, stdout, table, usd
from pgharness.database import Row
from pgharness.errors import NotFound

Level = Literal["debug", "info", "warning", "error"]

_LEVELS = ("debug", "info", "warning", "error")
_POLL_SECONDS = 0.2
_QUIET_SECONDS = 0.5
_LATE_SECONDS = (1.0, 30.0)
_SWEEP_SECONDS = 5.0
_PAGE = 5_000
_FEW = 20
_DIFF_LINES = 200


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="What runs recorded: results, metrics, logs, artifacts.")
    group.command("list")(list_runs)
    for command in (show, logs, results, diff, artifacts, export):
        group.command()(command)
    app.add_typer(group, name="runs")


def compact(value: Any, length: int = 60) -> str:
    """Return a JSON value as a cell shows it: six digits of a number, the beginning of what is long."""
    match value:
        case float():
            text = f"{value:.6g}"
        case str():
            text = value
        case _:
            text = json.dumps(value, ensure_ascii=False)
    return shortened(text, length)


# -- list and show


def list_runs(
    context: typer.Context,
    instance: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this instance.")] = None,
    experiment: Annotated[str | None, typer.Option(metavar="NAME", help="Only those of this experiment.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="At most so many.")] = 20,
    as_json: Json = False,
) -> None:
    """List the latest runs, newest first.

    Example: pgharness runs list --experiment dice --limit 5
    """
    with session_of(context).connection() as connection:
        chosen = database.call(connection, "latest_runs", instance=instance, experiment=experiment, most=limit)
        rows = []
        for each in chosen:
            progress = database.rows(connection, "run_progress", run_id=each["id"])
            rows += [row | {"experiment": _definition(connection, each["id"]).get("experiment")} for row in progress]
    if as_json:
        print_json(rows)
    elif rows:
        stdout.print(table(rows, _RUNS))
    else:
        stdout.print("No runs: pgharness run EXPERIMENT")


_RUNS: dict[str, Any] = {
    "id": "run_id",
    "run": "run",
    "experiment": "experiment",
    "kind": "kind",
    "status": "status",
    "done": lambda row: None if row["percent_done"] is None else f"{float(row['percent_done']):g}%",
    "took": lambda row: duration(row["active_seconds"]),
    "USD": lambda row: usd(row["cost_usd"]),
}


def _definition(connection: Connection[Any], run_id: int) -> dict[str, Any]:
    found = database.rows(connection, "run_definitions", run_id=run_id)
    return found[0]["definition"] if found else {}


def record_of(connection: Connection[Any], run: str) -> Row:
    """Return all that there is to say of a run in short: state, definition, versions, results, sums, artifacts."""
    row = progress_of(connection, run)
    run_id = row["run_id"]
    definition = _definition(connection, run_id)
    failed = database.rows(connection, "task_results", run_id=run_id, status="failed", order="ordinal", limit=_FEW)
    metrics, timings = _sums(connection, "run_metrics", run_id, "name", "value"), _timings(connection, run_id)
    return row | {
        "experiment": definition.get("experiment"),
        "config": definition.get("config", {}),
        "seed": definition.get("seed"),
        "versions": [
            {key: value for key, value in version.items() if key not in ("source", "git_diff", "config_schema")}
            for version in exports.versions_of(connection, run_id, definition)
        ],
        "results": {each["key"]: each["value"] for each in _latest(connection, run_id)},
        "metrics": metrics,
        "timings": timings,
        "artifacts": [
            {key: each[key] for key in ("name", "size_bytes", "media_type", "digest")}
            for each in database.rows(connection, "artifacts", run_id=run_id, order="id")
        ],
        "failed_tasks": [{key: each[key] for key in _FAILED_TASK} for each in failed],
    }


_FAILED_TASK = ("ordinal", "map", "key", "error", "traceback")


def _latest(connection: Connection[Any], run_id: int) -> list[Row]:
    return database.rows(connection, "run_results", run_id=run_id, order="key")


def _sums(connection: Connection[Any], view: str, run_id: int, name: str, value: str) -> list[Row]:
    """Return count, mean, extremes and the last of what was recorded under each name; infinities as texts."""
    sums: dict[str, list[float]] = {}
    for columns, rows in database.stream(connection, view, order="id", run_id=run_id):
        at, of = columns.index(name), columns.index(value)
        for row in rows:
            number = row[of]
            has = sums.setdefault(row[at], [0, 0.0, number, number, number])
            has[:] = [has[0] + 1, has[1] + number, min(has[2], number), max(has[3], number), number]
    found = [
        {name: key, "count": int(count), "mean": total / count, "minimum": least, "maximum": most, "last": last}
        for key, (count, total, least, most, last) in sorted(sums.items())
    ]
    return [{key: exports.finite(value) for key, value in row.items()} for row in found]


def _timings(connection: Connection[Any], run_id: int) -> list[Row]:
    rows = _sums(connection, "run_timings", run_id, "operation", "duration_ms")
    names = {"mean": "mean_ms", "minimum": "minimum_ms", "maximum": "maximum_ms", "last": "last_ms"}
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def show(context: typer.Context, run: Run, as_json: Json = False) -> None:
    """Show a run: state, configuration, code, results, metrics, timings, artifacts, failures.

    Example: pgharness runs show dice/1
    """
    with session_of(context).connection() as connection:
        record = record_of(connection, run)
    if as_json:
        print_json(record)
    else:
        print_run(record, is_whole=True)


def print_run(record: Row, *, is_whole: bool = False) -> None:
    """Print a run for people: how it ended and what it gave; whole, also what it was made of."""
    stdout.print(Text(_state_line(record)), soft_wrap=True)
    for task in record["failed_tasks"][:1]:
        _, _, frames = (task["traceback"] or "").rpartition("Traceback (most recent call last):\n")
        stdout.print(Text("\n".join(frames.rstrip().splitlines()[-_FEW:]), style="dim"), soft_wrap=True)
    if is_whole:
        if record["config"]:
            stdout.print(table(_pairs(flattened(record["config"])), _PAIR, title="\nconfiguration"))
        for version in record["versions"]:
            commit = version["git_commit"] and f", commit {version['git_commit'][:12]}"
            changes = " with changes" if version["is_dirty"] else ""
            code = f"code   version {version['number']} of {version['experiment']}{commit or ''}{changes}"
            stdout.print(Text(f"\n{code}"), soft_wrap=True)
    if record["results"]:
        stdout.print(table(_pairs(record["results"]), _PAIR, title="\nresults"))
    if record["metrics"]:
        stdout.print(table(record["metrics"], _METRICS, title="\nmetrics"))
    if record["timings"] and is_whole:
        stdout.print(table(record["timings"], _TIMINGS, title="\ntimings"))
    if record["artifacts"] and is_whole:
        stdout.print(table(record["artifacts"], _ARTIFACTS, title="\nartifacts"))
    if record["failed_tasks"] and is_whole:
        stdout.print(table(record["failed_tasks"], _FAILED, title="\nfailed tasks"))
    if record["task_count"] == 0:
        stdout.print(Text(f"\nits notes and grades: pgharness status {shlex.quote(record['run'])}"), soft_wrap=True)
        return
    command = "logs" if is_whole else "show"
    more = "" if is_whole else f", its log: pgharness runs logs {shlex.quote(record['run'])}"
    what = "its log" if is_whole else "more"
    stdout.print(Text(f"\n{what}: pgharness runs {command} {shlex.quote(record['run'])}{more}"), soft_wrap=True)


def _state_line(record: Row) -> str:
    line = f"run {record['run_id']} ({record['run']}) is {record['status']}"
    if record["status"] == "running":
        line += f", {record['percent_done']}% done"
    else:
        seconds = float(record["active_seconds"])
        line += f" after {duration(seconds) if seconds >= 60 else f'{seconds:.1f} seconds'}"
    if record["cost_usd"]:
        line += f", {usd(record['cost_usd'])} USD"
    return line + (f"\nbecause {record['reason']}" if record["reason"] else "")


def _pairs(values: Mapping[str, Any]) -> list[Row]:
    return [{"key": key, "value": compact(value)} for key, value in values.items()]


_PAIR: dict[str, Any] = {"key": "key", "value": "value"}
_METRICS: dict[str, Any] = {"name": "name", "count": "count"} | {
    name: lambda row, name=name: compact(row[name]) for name in ("mean", "minimum", "maximum", "last")
}
_TIMINGS: dict[str, Any] = {"operation": "operation", "count": "count"} | {
    f"{name} ms": lambda row, name=name: compact(row[f"{name}_ms"]) for name in ("mean", "minimum", "maximum")
}
_ARTIFACTS: dict[str, Any] = {"artifact": "name", "bytes": "size_bytes", "type": "media_type"}
_FAILED: dict[str, Any] = {
    "task": "ordinal",
    "map": "map",
    "key": lambda row: shortened(row["key"], 30),
    "error": lambda row: shortened(row["error"] or "", 120),
}


# -- logs


def logs(
    context: typer.Context,
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    level: Annotated[Level, typer.Option(help="Lines of this level and above.")] = "debug",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line each.")] = False,
) -> None:
    """Print the log of a run, oldest line first.

    Example: pgharness runs logs dice/1 -f --level info
    """
    with session_of(context).connection() as connection:
        run_id = progress_of(connection, run)["run_id"]
        try:
            if follow:
                for lines in _follow(connection, run_id, level):
                    _print_lines(lines, as_json)
            else:
                _print_lines(_stored(connection, run_id, level), as_json)
        except KeyboardInterrupt:
            stderr.print(Text(f"\nrun {run_id} goes on; cancel it with: pgharness cancel {run_id}"))
            raise typer.Exit(130) from None


def _stored(connection: Connection[Any], run_id: int, level: Level) -> Iterator[Row]:
    for columns, rows in database.stream(connection, "logs", order="id", run_id=run_id):
        for values in rows:
            row = dict(zip(columns, values, strict=True))
            if _LEVELS.index(row["level"]) >= _LEVELS.index(level):
                yield {key: row[key] for key in ("id", "created_at", "level", "message", "data", "task", "attempt")}


def _print_lines(lines: Iterator[Row] | list[Row], as_json: bool) -> None:
    for line in lines:
        if as_json:
            text = json.dumps(line, default=plain, ensure_ascii=False)
        else:
            at = line["created_at"].astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
            task = f" [task {line['task']}]" if line["task"] else ""
            data = f"  {json.dumps(line['data'], ensure_ascii=False)}" if line["data"] else ""
            text = f"{at} {line['level']:7}{task} {line['message']}{data}"
        sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _follow(connection: Connection[Any], run_id: int, level: Level) -> Iterator[list[Row]]:
    """Yield the lines of a run as they come, until it has ended and said its last."""
    tail = _Tail(connection, run_id, level)
    was_running, quiet_at = False, None
    while True:
        found = database.rows(connection, "runs", id=run_id)  # before its lines: what it said before its end is read
        if not found:
            raise NotFound(f"run {run_id} was deleted", hint="List runs: pgharness runs list")
        is_over = found[0]["finished_at"] is not None
        lines = tail.read(is_thorough=is_over)
        yield lines
        was_running = was_running or not is_over
        if is_over:
            now = time.monotonic()
            quiet_at = now + _QUIET_SECONDS if lines or quiet_at is None else quiet_at
            if not was_running or now >= quiet_at:
                return
        time.sleep(_POLL_SECONDS)


class _Tail:
    """Reads each line of a log once, those too that show up below one that was read.

    Ids are given before a line is committed, so a line of another process may come late: what was read within the last
    second is always looked over again, and every few seconds what was read within the last half minute.
    """

    def __init__(self, connection: Connection[Any], run_id: int, level: Level) -> None:
        self._connection = connection
        self._arguments = {"run_id": run_id, "lowest": level, "most": _PAGE}
        self._settled = 0
        self._seen: dict[int, float] = {}  # when a line was read, in the order of reading
        self._swept_at = time.monotonic()

    def read(self, *, is_thorough: bool = False) -> list[Row]:
        """Return the lines that were not read before, in their order."""
        now = time.monotonic()
        if is_thorough or now > self._swept_at + _SWEEP_SECONDS:
            self._settled, self._swept_at = self._read_before(now - _LATE_SECONDS[1]), now
            self._seen = {line: at for line, at in self._seen.items() if line > self._settled}
            after = self._settled
        else:
            after = self._read_before(now - _LATE_SECONDS[0])
        new: list[Row] = []
        while True:
            page = database.call(self._connection, "read_log", after=after, **self._arguments)
            new += [row for row in page if row["id"] not in self._seen]
            self._seen |= {row["id"]: now for row in page if row["id"] not in self._seen}
            if len(page) < _PAGE:
                return new
            after = page[-1]["id"]

    def _read_before(self, moment: float) -> int:
        return max((line for line, at in self._seen.items() if at < moment), default=self._settled)


# -- results


def results(
    context: typer.Context,
    run: Run,
    key: Annotated[str | None, typer.Option(help="Only what is under this key.")] = None,
    history: Annotated[bool, typer.Option("--history", help="Older ones of each key too, oldest first.")] = False,
    as_json: Json = False,
) -> None:
    """Print the results of a run: the latest of each key, or all.

    Example: pgharness runs results dice/1 --key sum --history
    """
    with session_of(context).connection() as connection:
        run_id = progress_of(connection, run)["run_id"]
        filters: dict[str, Any] = {"run_id": run_id} | ({} if key is None else {"key": key})
        view, order = ("results", "id") if history else ("run_results", "key")
        rows = database.rows(connection, view, order=order, **filters)
        if key is not None and not rows:
            known = ", ".join(row["key"] for row in _latest(connection, run_id)[:_FEW])
            raise NotFound(f'run "{run}" has no result "{key}"', hint=f"It has: {known}." if known else "It has none.")
    rows = [{name: row[name] for name in ("key", "value", "created_at")} for row in rows]
    if as_json:
        print_json(rows)
    elif rows:
        columns: dict[str, Any] = {"key": "key", "value": lambda row: compact(row["value"], 500), "at": "created_at"}
        stdout.print(table(rows, columns))
    else:
        stdout.print("No results.")


# -- diff


def diff(
    context: typer.Context,
    first: Annotated[str, typer.Argument(metavar="A", help="A run's name or id.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another run's name or id.")],
    as_json: Json = False,
) -> None:
    """Compare two runs: configuration, code, results, mean metrics.

    Example: pgharness runs diff dice/1 dice/2
    """
    with session_of(context).connection() as connection:
        a, b = record_of(connection, first), record_of(connection, second)
        sources = [
            exports.versions_of(connection, run["run_id"], _definition(connection, run["run_id"])) for run in (a, b)
        ]
    told: Row = {
        "a": {key: a[key] for key in _SIDE},
        "b": {key: b[key] for key in _SIDE},
        "config": _differences(
            flattened(a["config"]) | {"seed": a["seed"]}, flattened(b["config"]) | {"seed": b["seed"]}
        ),
        "code": _code_difference(*(each[-1] if each else None for each in sources)),
        "results": _differences(a["results"], b["results"]),
        "metrics": _differences(*({row["name"]: row["mean"] for row in run["metrics"]} for run in (a, b)), all_of=True),
    }
    if as_json:
        print_json(told)
        return
    for side in ("a", "b"):
        stdout.print(Text(f"{side}  {told[side]['run']} is {told[side]['status']}"))
    for part in ("config", "results", "metrics"):
        if told[part]:
            stdout.print(table(told[part], _DIFFERENCE, title=f"\n{part}"))
        else:
            stdout.print(f"\n{part}: the same" if part != "metrics" else "\nmetrics: none")
    _print_code_difference(told["code"])


_SIDE = ("run_id", "run", "experiment", "instance", "kind", "status")
_DIFFERENCE: dict[str, Any] = {
    "": "key",
    "a": lambda row: compact(row["a"]) if row["in_a"] else None,
    "b": lambda row: compact(row["b"]) if row["in_b"] else None,
    "b - a": lambda row: compact(row["difference"]),
}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], *, all_of: bool = False) -> list[Row]:
    """Return the keys whose values differ, or all of them."""
    found = []
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if all_of or (key in a) != (key in b) or x != y or isinstance(x, bool) != isinstance(y, bool):
            numbers = [n for n in (x, y) if isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)]
            difference = numbers[1] - numbers[0] if len(numbers) == 2 else None
            found.append({"key": key, "a": x, "b": y, "in_a": key in a, "in_b": key in b, "difference": difference})
    return found


def _code_difference(a: Row | None, b: Row | None) -> Row:
    names = ("experiment", "number", "digest", "module", "git_commit", "is_dirty")
    told: Row = {side: version and {key: version[key] for key in names} for side, version in (("a", a), ("b", b))}
    lines: list[str] = []
    if a and b and a["source"] != b["source"]:
        titles = [f"{version['module']} (version {version['number']})" for version in (a, b)]
        texts = [version["source"].splitlines() for version in (a, b)]
        lines = list(difflib.unified_diff(texts[0], texts[1], titles[0], titles[1], lineterm=""))
    is_same = (a and (a["experiment"], a["digest"])) == (b and (b["experiment"], b["digest"]))
    return told | {"is_same": is_same, "diff": "\n".join(lines)}


def _print_code_difference(code: Row) -> None:
    if code["is_same"]:
        stdout.print("\ncode: the same")
        return
    words = [
        version and f"version {version['number']} of {version['experiment']}" for version in (code["a"], code["b"])
    ]
    stdout.print(Text(f"\ncode: {words[0] or 'none'}, {words[1] or 'none'}"))
    lines: Sequence[str] = code["diff"].splitlines()
    for line in lines[:_DIFF_LINES]:
        stdout.print(Text(line), soft_wrap=True)
    if len(lines) > _DIFF_LINES:
        stdout.print(f"{len(lines) - _DIFF_LINES:,} more lines: add --json")
    if not lines:
        stdout.print("its own module is the same; a file that it imports differs")


# -- files


def artifacts(
    context: typer.Context,
    run: Run,
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", file_okay=False, help="Write them into this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the files that a run kept, or save them.

    Example: pgharness runs artifacts dice/1 --save plots
    """
    with session_of(context).connection() as connection:
        run_id = progress_of(connection, run)["run_id"]
        rows = exports.artifacts_of(connection, run_id)
        if save is not None:
            for row in rows:
                exports.save_artifact(connection, row, save)
                row["path"] = str(save / row["path"])
    columns = ("name", "size_bytes", "media_type", "digest", "task", "created_at")
    if as_json:
        print_json([{key: row[key] for key in (*columns, *(["path"] if save else []))} for row in rows])
    elif not rows:
        stdout.print("No artifacts.")
    else:
        stdout.print(table(rows, _ARTIFACTS | ({"file": "path"} if save else {})))


def export(
    context: typer.Context,
    run: Run,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="New folder to write it into.")] = None,
    archive: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="ZIP file to write it into.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", metavar="NAME", help="Let this exporter, a plugin, write --out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write all that a run recorded into files: JSON lines, its artifacts, its code, and a manifest with checksums.

    Example: pgharness runs export dice/1 --out dice-1 --archive dice-1.zip
    """
    if out is None and (archive is None or form is not None):
        raise typer.BadParameter("say where to write it.", param_hint="--out")
    if form is not None and archive is not None:
        raise typer.BadParameter("an exporter writes no archive.", param_hint="--archive")
    session = session_of(context)
    with session.connection() as connection:
        record = record_of(connection, run)
    if form is not None and out is not None:
        seconds = session.settings.plugin_seconds
        manifest = exports.export_as(session.url, record, exporter=form, out=out, seconds=seconds)
    else:
        manifest = exports.export_run(session.url, record, out=out, archive=archive)
    if as_json:
        print_json(manifest)
        return
    if form is not None:
        stdout.print(Text(f"{record['run']} is written to {out} as {form}"), soft_wrap=True)
        return
    for place in filter(None, (out, archive)):
        size = sum(file["size_bytes"] for file in manifest["files"])
        line = f"{record['run']} is written to {place}: {len(manifest['files'])} files, {size:,} bytes"
        stdout.print(Text(line), soft_wrap=True)
