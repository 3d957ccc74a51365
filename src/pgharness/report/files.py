"""A report as files: which files a format is made of, their writing, and whether an earlier report says the same."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pgharness.errors import Conflict, HarnessError, InvalidArgument
from pgharness.report import figures, html, latex, markdown, notebook
from pgharness.report.model import Block, Report, Table, cleaned

_FORMAT = "pgharness report"
_FORMAT_VERSION = 1
# two computers round the last digits differently
_TOLERANCE = 1e-9
_NUMBER = re.compile(r"[0-9]*\.[0-9]+|[0-9]+")
# where a cell begins, be it that a semicolon, a tab or a line's end parts cells where the file is opened
_FORMULA = re.compile(r"(?:^|(?<=[;\t\n]))(?=[\s\x00-\x1f]*[=+\-@\uff1d\uff0b\uff0d\uff20])")


@dataclass(frozen=True, slots=True)
class File:
    """One file of a report: its path below the report's folder, and its bytes."""

    path: str
    media_type: str
    content: bytes


def files_of(report: Report, formats: Sequence[str]) -> list[File]:
    """Return the files of a report in some formats. Raises InvalidArgument for a format that there is not."""
    for name in formats:
        if name not in FORMATS:
            raise InvalidArgument(f"there is no format {name!r}", hint=f"It is one of {', '.join(FORMATS)}.")
    found: dict[str, File] = {}
    for name in dict.fromkeys(formats):
        for file in _MAKERS[name](report):
            found[file.path] = file
    return list(found.values())


def write(files: Iterable[File], folder: Path, *, force: bool = False) -> list[Path]:
    """Write files below a folder, each whole or not at all; return their paths.

    Raises Conflict where one is there already, unless `force`, and HarnessError where one cannot be written.
    """
    chosen = [(folder / file.path, file) for file in files]
    there = [path for path, _ in chosen if path.exists()]
    if there and not force:
        raise Conflict(
            f"{there[0]} exists already" + (f", and {len(there) - 1} more" if len(there) > 1 else ""),
            hint="Give --force to overwrite, or choose another --out.",
        )
    for path, file in chosen:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, file.content)
        except OSError as exc:
            raise HarnessError(f"{path} cannot be written: {exc.strerror}", hint="Choose another --out.") from exc
    return [path for path, _ in chosen]


def _replace(path: Path, content: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


# -- formats


def _markdown(report: Report) -> Iterator[File]:
    yield File("report.md", "text/markdown", markdown.render(report).encode())
    yield from _drawn(report, "svg", "image/svg+xml")


def _html(report: Report) -> Iterator[File]:
    yield File("report.html", "text/html", html.render(report).encode())


def _latex(report: Report) -> Iterator[File]:
    yield File("report.tex", "application/x-tex", latex.render(report).encode())
    yield from _drawn(report, "pdf", "application/pdf")


def _notebook(report: Report) -> Iterator[File]:
    yield File("report.ipynb", "application/x-ipynb+json", notebook.render(report, as_json(report)).encode())


def _json(report: Report) -> Iterator[File]:
    text = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    yield File("report.json", "application/json", f"{text}\n".encode("utf-8", "replace"))


def _csv(report: Report) -> Iterator[File]:
    for table in report.tables:
        yield File(f"tables/{table.key}.csv", "text/csv", csv_of(table).encode())


def _drawn(report: Report, form: Any, media_type: str) -> Iterator[File]:
    for figure in report.figures:
        yield File(f"figures/{figure.key}.{form}", media_type, figures.draw(figure, form))


_MAKERS: Mapping[str, Callable[[Report], Iterator[File]]] = {
    "html": _html,
    "md": _markdown,
    "latex": _latex,
    "ipynb": _notebook,
    "json": _json,
    "csv": _csv,
}
FORMATS = tuple(_MAKERS)


def csv_of(table: Table) -> str:
    """Return a table as CSV (RFC 4180), its numbers unrounded; before what a spreadsheet would compute stands a '."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow([column.key for column in table.columns])
    for row in table.rows:
        writer.writerow([_csv_cell(value) for value in row])
    return out.getvalue()


def _csv_cell(value: object) -> object:
    return _FORMULA.sub("'", cleaned(value)) if isinstance(value, str) else value


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as JSON-safe values: all of it, numbers unrounded, a row an object by its columns' keys."""
    return {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "software": dict(report.software),
        "title": report.title,
        "subtitle": report.subtitle,
        "runs": list(report.runs),
        "alpha": report.alpha,
        "summary": list(report.summary),
        "sections": [
            {"key": section.key, "title": section.title, "blocks": [_block(block) for block in section.blocks]}
            for section in report.sections
        ],
    }


def _block(block: Block) -> dict[str, Any]:
    match block:
        case Table():
            return {
                "type": "table",
                "key": block.key,
                "caption": block.caption,
                "columns": [
                    {each.name: getattr(column, each.name) for each in fields(column)} for column in block.columns
                ],
                "rows": [dict(zip((column.key for column in block.columns), row, strict=True)) for row in block.rows],
                "notes": list(block.notes),
            }
        case _:
            values = {each.name: getattr(block, each.name) for each in fields(block)}
            kind = type(block).__name__.lower()
            return {"type": kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# -- checking


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier report, from its file of format json: its runs in their order, its tables' rows, its sentences."""

    path: Path
    runs: tuple[str, ...]
    alpha: float
    version: str
    tables: Mapping[str, list[dict[str, Any]]]
    texts: Mapping[str, str]

    def ordered(self, runs: Sequence[str]) -> list[str]:
        """Return runs in the order of the earlier report, if they are its runs."""
        return list(self.runs) if sorted(runs) == sorted(self.runs) else list(runs)

    def differences(self, report: Report) -> list[str]:
        """Return where a report differs, nothing where it agrees.

        Numbers may differ by 1e-9 of their size, those in sentences by one in the last digit.
        """
        if sorted(self.runs) != sorted(report.runs):
            return [f"the file is on {', '.join(self.runs)}, this report on {', '.join(report.runs)}"]
        made = as_json(report)
        now, texts = _tables(made), _texts(made)
        lone = self.tables.keys() ^ now.keys()
        found = [f"table {key} is only in {'the file' if key in self.tables else 'this report'}" for key in lone]
        for key in self.tables.keys() & now.keys():
            found += _row_differences(key, self.tables[key], now[key])
        for place in self.texts.keys() | texts.keys():
            one, two = self.texts.get(place, ""), texts.get(place, "")
            if not _say_the_same(one, two):
                found.append(f"{place}: {one!r} in the file, {two!r} now")
        return sorted(found)


def read_earlier(path: Path) -> Earlier:
    """Read a report from its file of format json. Raises HarnessError for a file that holds no report."""
    try:
        report = json.loads(path.read_bytes())
        if report["format"] != _FORMAT:
            raise ValueError("it says to be something else")
        if report["format_version"] > _FORMAT_VERSION:
            raise ValueError("a newer pgharness wrote it")
        version = str(report["software"]["pgharness"])
        tables, texts = _tables(report), _texts(report)
        return Earlier(path, tuple(report["runs"]), float(report["alpha"]), version, tables, texts)
    except OSError as exc:
        raise HarnessError(f"{path} cannot be read: {exc.strerror}", hint="Check the path.") from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise HarnessError(
            f"{path} is not a report in JSON: {exc}", hint="Make one: pgharness report RUN --format json --out DIR"
        ) from exc


def _tables(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    blocks = [block for section in report["sections"] for block in section["blocks"]]
    return {block["key"]: list(block["rows"]) for block in blocks if block["type"] in ("table", "figure")}


def _texts(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the sentences of a report by their place; which analyses deviate from a plan, no archive knows."""
    found = {f"summary, paragraph {number}": text for number, text in enumerate(report["summary"], 1)}
    for section in report["sections"]:
        if section["key"] == "preregistration":
            continue
        for number, block in enumerate(section["blocks"], 1):
            texts = block["items"] if block["type"] == "points" else [block["text"]] if "text" in block else []
            found |= {f"section {section['key']}, {number}.{place}": text for place, text in enumerate(texts, 1)}
    return found


def _say_the_same(one: str, two: str) -> bool:
    """Whether two texts are the same but for the last digits of their numbers."""
    if one == two:
        return True
    numbers = zip(_NUMBER.findall(one), _NUMBER.findall(two), strict=False)
    return _NUMBER.sub("0", one) == _NUMBER.sub("0", two) and all(
        a == b or ("." in a and abs(float(a) - float(b)) <= 1.001 * 10.0 ** -len(a.partition(".")[2]))
        for a, b in numbers
    )


def _row_differences(key: str, then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    if len(then) != len(now):
        return [f"table {key} has {len(then)} rows in the file, {len(now)} now"]
    return [
        f"table {key}, row {number}, {name}: {one.get(name)!r} in the file, {two.get(name)!r} now"
        for number, (one, two) in enumerate(zip(then, now, strict=True), 1)
        for name in sorted(one.keys() | two.keys())
        if not _agree(one.get(name), two.get(name))
    ]


def _agree(one: Any, two: Any) -> bool:
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=_TOLERANCE, abs_tol=1e-12)
    return bool(one == two)
