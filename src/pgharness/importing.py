"""Importing: files of cases, rubrics and models.

All or nothing: one transaction, and every wrong row is named by its line before anything is kept. Importing the same
thing twice changes nothing. Files are streamed, so their size does not matter.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import urlsplit

from psycopg import Connection
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pgharness import database
from pgharness.errors import ImportRefused
from pgharness.types import Provider

FileFormat = Literal["jsonl", "csv"]
OnProgress = Callable[[int, int | None], None]
_Stream = BinaryIO | io.BufferedIOBase

MAX_PROBLEMS = 20
BATCH_ROWS = 1_000
BATCH_CHARACTERS = 4_000_000
_TURNS = ("transcript", "profile", "chart")


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import of a file did, in rows."""

    inserted: int = 0
    updated: int = 0
    unchanged: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """How to import a file: its format where its name does not say; whether to replace what is there, or only check."""

    file_format: FileFormat | None = None
    replace: bool = False
    dry_run: bool = False
    on_progress: OnProgress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseColumns:
    """Which columns of a file make a case; several inputs become one object.

    Without them, the columns are name, input or transcript (with profile and chart), target, dataset and metadata.
    Every other column goes to the metadata, which no built-in prompt shows to a generator. With a dataset, a case
    without a name is called after it and its row, as in gsm8k/0001.
    """

    dataset: str | None = None
    name: str | None = None
    inputs: tuple[str, ...] = ()
    target: str | None = None


_OPTIONS = FileOptions()
_COLUMNS = CaseColumns()


# -- files


def import_cases(
    connection: Connection[Any], source: str | Path, columns: CaseColumns = _COLUMNS, options: FileOptions = _OPTIONS
) -> Imported:
    """Import a JSONL or CSV file ("-" is standard input) of cases; raises ImportRefused naming up to 20 wrong lines."""
    json_columns = {"input", "metadata", "target", *_TURNS, *columns.inputs, columns.target or "target"}
    return _import_file(_Importer(connection, "import_cases", options), source, _CaseReader(columns).read, json_columns)


def import_rubrics(connection: Connection[Any], source: str | Path, options: FileOptions = _OPTIONS) -> Imported:
    """Import a JSONL or CSV file of rubrics; raises ImportRefused naming up to 20 wrong lines.

    A rubric that is there with the same case, author and criteria stays as it is, or with `replace` takes over the
    file's validation and comments.
    """
    return _import_file(_Importer(connection, "import_rubrics", options), source, _read_rubric, {"criteria"})


def import_models(connection: Connection[Any], source: str | Path, options: FileOptions = _OPTIONS) -> Imported:
    """Import a JSONL or CSV file of models, by the columns of table models; a column with a key is refused."""
    return _import_file(_Importer(connection, "import_models", options), source, _read_model, {"parameters"})


class _Wrong(ValueError):
    """A row cannot be imported: the field and what is wrong with it."""


class _Enough(Exception):
    """There are as many problems as a person wants to read."""


class _DryRun(Exception):
    """Everything was fine, and is to be rolled back."""


@dataclass(slots=True)
class _Row:
    """One row of a file: the line on which it starts, its number, and its fields or what kept it from having any."""

    line: int
    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


class _Importer:
    """Sends rows to a function of the database in batches, and gathers what is wrong with them."""

    def __init__(self, connection: Connection[Any], function: str, options: FileOptions) -> None:
        self.connection = connection
        self.options = options
        self.counts = {"inserted": 0, "updated": 0, "unchanged": 0}
        self.problems: dict[int, str] = {}
        self._function = function
        self._batch: list[str] = []
        self._size = 0
        self._lines: dict[str, int] = {}

    def add(self, line: int, row: Mapping[str, Any]) -> None:
        """Take a row; a second one of the same name never replaces the first."""
        text = _storable({"line": line, **row})
        name = row.get("name")
        first = self._lines.setdefault(name, line) if isinstance(name, str) else line
        if first != line or row.get("parent") is not None:
            self.flush()  # it has to see the rows before it
        self._batch.append(text)
        self._size += len(text)
        if first != line:
            self.flush(first_lines={line: first})
        elif len(self._batch) >= BATCH_ROWS or self._size >= BATCH_CHARACTERS:
            self.flush()

    def refuse(self, line: int, problem: str) -> None:
        """Note what is wrong with a line; raises _Enough at the last one that anybody wants to read."""
        self.problems[line] = problem
        if len(self.problems) >= MAX_PROBLEMS:
            raise _Enough

    def flush(self, *, first_lines: Mapping[int, int] | None = None) -> None:
        """Send what is there."""
        if not self._batch:
            return
        rows, self._batch, self._size = "[" + ",".join(self._batch) + "]", [], 0
        replace = self.options.replace and not first_lines
        (done,) = database.call(self.connection, self._function, rows=rows, replace=replace)
        for outcome in self.counts:
            self.counts[outcome] += done[outcome]
        for problem in done["problems"]:
            line = problem["line"]
            first = (first_lines or {}).get(line)
            self.refuse(line, f"name: is also on line {first}, with other content" if first else problem["problem"])


def _import_file(
    importer: _Importer, source: str | Path, read: Callable[[_Row], Mapping[str, Any]], json_columns: set[str]
) -> Imported:
    path, options, number = Path(source), importer.options, 0
    kind = options.file_format or _format_of(path)
    with contextlib.suppress(_DryRun), importer.connection.transaction():
        with _opened(path) as stream, contextlib.suppress(_Enough):
            total = _count_lines(stream) if kind == "jsonl" and options.on_progress else None
            for row in _read_jsonl(stream) if kind == "jsonl" else _read_csv(stream, json_columns):
                number = row.number
                try:
                    if row.problem:
                        raise _Wrong(row.problem)
                    importer.add(row.line, read(row))
                except _Wrong as exc:
                    importer.refuse(row.line, str(exc))
                if options.on_progress and number % BATCH_ROWS == 0:
                    options.on_progress(number, total)
            importer.flush()
            if options.on_progress:
                options.on_progress(number, number)
        if importer.problems:
            raise _refusal(path, importer.problems)
        if not number:
            raise ImportRefused(
                f"{path.name} has no rows", hint="It needs one JSON object a line, or a CSV header and rows."
            )
        if options.dry_run:
            raise _DryRun
    return Imported(**importer.counts)


def _refusal(path: Path, problems: Mapping[int, str]) -> ImportRefused:
    lines = [f"line {line}: {problem}" for line, problem in sorted(problems.items())]
    count = f"{'at least ' if len(lines) >= MAX_PROBLEMS else ''}{len(lines)} wrong row{'s' if len(lines) > 1 else ''}"
    return ImportRefused(
        f"{path.name} has {count}; nothing was imported",
        detail="\n".join(lines),
        hint="Mend these lines and import the file again; with --dry-run it is only checked.",
    )


def _format_of(path: Path) -> FileFormat:
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    match suffix.lower():
        case ".jsonl" | ".ndjson":
            return "jsonl"
        case ".csv":
            return "csv"
        case _:
            raise ImportRefused(
                f"{path.name} does not say whether it is JSONL or CSV",
                hint="Name it .jsonl or .csv (.gz after it is fine), or say --format jsonl or --format csv.",
            )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Stream]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except gzip.BadGzipFile as exc:
        raise ImportRefused(
            f"{path.name} is not a gzip file: {exc}", hint="Take the .gz off its name, or compress it."
        ) from exc
    except (EOFError, zlib.error) as exc:
        raise ImportRefused(f"{path.name} is cut off or damaged: {exc}", hint="Copy or download it again.") from exc
    except OSError as exc:
        raise ImportRefused(
            f"{path} cannot be read: {exc.strerror or exc}", hint="Check the path and its permissions."
        ) from exc


def _count_lines(stream: _Stream) -> int | None:
    """Return how many lines there are, where that can be known without losing any."""
    if isinstance(stream, gzip.GzipFile) or not stream.seekable():
        return None
    count = sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
    stream.seek(0)
    return count


def _lines(stream: _Stream) -> Iterator[tuple[int, str]]:
    for line, data in enumerate(stream, start=1):
        try:
            yield line, (data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data).decode()
        except UnicodeDecodeError as exc:
            raise ImportRefused(f"line {line} is not UTF-8: {exc.reason}", hint="Save the file as UTF-8.") from exc


def _read_jsonl(stream: _Stream) -> Iterator[_Row]:
    number = 0
    for line, text in _lines(stream):
        if not text.strip():
            continue
        number += 1
        row = _Row(line, number)
        try:
            found = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as exc:
            row.problem = f"is not JSON: {exc.msg} at column {exc.colno}"
        except (ValueError, RecursionError) as exc:
            row.problem = f"is not JSON: {exc}"
        else:
            if isinstance(found, dict):
                row.fields = found
            else:
                row.problem = "is not a JSON object; write one object a line"
        yield row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _read_csv(stream: _Stream, json_columns: set[str]) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # a transcript is longer than the default of 131,072
    reader = csv.reader((text for _, text in _lines(stream)), strict=True)
    header: list[str] = []
    number, line = 0, 1
    while True:
        row = _Row(line, number + 1)
        try:
            cells = next(reader, None)
        except csv.Error as exc:
            raise ImportRefused(
                f"line {reader.line_num} is not CSV: {exc}", hint="Quote cells with commas, quotes or line ends."
            ) from exc
        line = reader.line_num + 1
        if cells is None:
            return
        if not header:
            header = _header(cells)
        elif cells:
            number += 1
            if len(cells) == len(header):
                row.fields = {
                    column: _cell(column, cell, json_columns) for column, cell in zip(header, cells, strict=True)
                }
            else:
                row.problem = f"has {len(cells)} cells for {len(header)} columns"
            yield row


def _header(cells: list[str]) -> list[str]:
    for place, column in enumerate(cells, start=1):
        if not column.strip() or cells.index(column) != place - 1:
            what = f'"{column}" is twice in' if column.strip() else f"column {place} has no name in"
            raise ImportRefused(f"{what} the CSV header", hint="Give each column a name of its own.")
    return cells


def _cell(column: str, cell: str, json_columns: set[str]) -> Any:
    """Return a cell, parsed where its column may hold JSON and it looks like some: a text may start with [ as well."""
    if column in json_columns and cell.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(cell, parse_constant=_refuse_constant)
    return cell


def _storable(row: Mapping[str, Any]) -> str:
    """Return a row as JSON; raises _Wrong for what Postgres cannot store."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong("holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as exc:
        raise _Wrong(f"cannot be stored as JSON: {exc}") from None
    if "\\u0000" in text:
        for column, value in row.items():
            if any("\0" in found for found in _texts(value)):
                raise _Wrong(f"{column}: holds the character U+0000, which Postgres cannot store")
    return text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


# -- rows


class _CaseReader:
    """Makes cases of rows."""

    def __init__(self, columns: CaseColumns) -> None:
        self._columns = columns

    def read(self, row: _Row) -> dict[str, Any]:
        rest = dict(row.fields)
        case = {"input": self._input(rest), "target": self._target(rest)}
        dataset = self._columns.dataset or rest.pop("dataset", None) or None
        if dataset is not None and not (isinstance(dataset, str) and dataset.strip()):
            raise _Wrong("dataset: is not a name")
        case["name"] = self._name(rest, row.number, dataset)
        metadata = rest.pop("metadata", None) or {}
        if not isinstance(metadata, dict):
            raise _Wrong("metadata: is not a JSON object")
        if both := sorted(metadata.keys() & rest.keys()):
            raise _Wrong(f"metadata: has {both[0]}, which is a column as well")
        return {**case, "dataset": dataset, "metadata": {**rest, **metadata}}

    def _name(self, rest: dict[str, Any], number: int, dataset: str | None) -> str:
        column = self._columns.name or "name"
        if column not in rest:
            if self._columns.name:
                raise _Wrong(f"{column}: is missing; {_has(rest)}")
            if dataset is None:
                raise _Wrong(
                    "name: is missing; say which column holds it with --name, or number the rows with --dataset"
                )
            return f"{dataset}/{number:04d}"
        name = rest.pop(column)
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            raise _Wrong(f"{column}: is not a name")
        if len(name) > 500:
            raise _Wrong(f"{column}: has {len(name)} characters, more than 500")
        return name

    def _input(self, rest: dict[str, Any]) -> Any:
        if self._columns.inputs:
            found = {column: _taken(rest, column) for column in self._columns.inputs}
            if len(found) > 1:
                return found
            column, value = next(iter(found.items()))
        elif "input" in rest and "transcript" in rest:
            raise _Wrong("input: there is a transcript as well; say which is the input with --input")
        elif "transcript" in rest:
            _check_transcript(rest["transcript"])
            return {column: value for column in _TURNS if (value := rest.pop(column, None)) not in (None, "")}
        elif "input" in rest:
            column, value = "input", rest.pop("input")
        else:
            raise _Wrong(f"input: is missing; {_has(rest)}; say which column is the input with --input")
        if value in (None, "", [], {}):
            raise _Wrong(f"{column}: is empty")
        return value

    def _target(self, rest: dict[str, Any]) -> Any:
        value = _taken(rest, self._columns.target) if self._columns.target else rest.pop("target", None)
        return None if value == "" else value


def _taken(rest: dict[str, Any], column: str) -> Any:
    if column not in rest:
        raise _Wrong(f"{column}: is missing; {_has(rest)}")
    return rest.pop(column)


def _has(rest: Mapping[str, Any]) -> str:
    return f"the row has {', '.join(list(rest)[:10]) or 'nothing else'}"


def _check_transcript(value: Any) -> None:
    if not value or not isinstance(value, str | list | dict):
        raise _Wrong("transcript: is empty" if not value else "transcript: is neither a text nor a list of turns")
    for number, turn in enumerate(value if isinstance(value, list) else [], start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("text"), str):
            raise _Wrong(f'transcript: turn {number} is not an object with a "text"')


_Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]


class _RubricRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    case: _Name
    author: _Name
    validation: Literal["not_evaluated", "accepted", "refused"] = "not_evaluated"
    validated_at: AwareDatetime | None = None
    criteria: list[Any]
    comments: str | None = None
    generator: _Name | None = None
    parent: _Name | None = None


_Limit = Annotated[int, Field(gt=0, lt=2**31)]
_Price = Annotated[float, Field(ge=0, lt=1_000_000, allow_inf_nan=False)]


class _ModelRow(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: _Name
    description: str = ""
    provider: Provider
    model: str = ""
    base_url: str | None = None
    api_key_env: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    is_reasoning: bool = False
    timeout_seconds: float = Field(120, gt=0, le=86_400)
    max_concurrency: _Limit | None = None
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    input_usd_per_million: _Price | None = None
    output_usd_per_million: _Price | None = None
    cached_input_usd_per_million: _Price | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> _ModelRow:
        if not self.model and self.provider not in ("simulator", "command"):
            raise ValueError("model: is missing; give the provider's name of the model")
        if self.provider == "openai_compatible" and not self.base_url:
            raise ValueError("base_url: is missing; give the server's address, for example http://127.0.0.1:8000/v1")
        if self.base_url:
            address = urlsplit(self.base_url)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError("base_url: is no http or https address")
            if address.username or address.password:
                raise ValueError("base_url: holds a user or password; name the variable that has it in api_key_env")
        if any(_holds_secret(key) for key in self.parameters):
            raise ValueError("parameters: hold a key; keep it in an environment variable, and name that in api_key_env")
        return self


_SECRET = re.compile(r"(^|[_\s-])(api[_\s-]?key|key|token|secret|password|authorization)$", re.IGNORECASE)


def _holds_secret(column: str) -> bool:
    return _SECRET.search(column.strip()) is not None


def _read_rubric(row: _Row) -> dict[str, Any]:
    given = {column: value for column, value in row.fields.items() if value not in (None, "")}
    return _validated(_RubricRow, given).model_dump(mode="json", exclude_none=True)


def _read_model(row: _Row) -> dict[str, Any]:
    for column in row.fields:
        if _holds_secret(column):
            raise _Wrong(
                f"{column}: keys are never stored; put the key into an environment variable of the workers, "
                "and that variable's name into the column api_key_env"
            )
    given = {column: value for column, value in row.fields.items() if value not in (None, "")}
    return _validated(_ModelRow, given).model_dump(mode="json", exclude_unset=True)


def _validated(model: type[BaseModel], fields: Mapping[str, Any]) -> BaseModel:
    """Return a row as its type; raises _Wrong with field and reason, never with the value: it may be a secret."""
    try:
        return model.model_validate(fields)
    except ValidationError as exc:
        problem = exc.errors(include_input=False, include_url=False)[0]
    except RecursionError:
        raise _Wrong("is nested too deeply") from None
    where = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "missing":
            raise _Wrong(f"{where}: is missing; {_has(fields)}")
        case "extra_forbidden":
            raise _Wrong(f"{where}: is no column of these; they are {', '.join(model.model_fields)}")
        case "value_error":
            raise _Wrong(str(problem["ctx"]["error"]))
        case _:
            raise _Wrong(f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
