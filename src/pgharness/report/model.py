"""What a report is: sections of paragraphs, tables and figures' data, the numbers as they are, not as they are shown.

Every format is a view of this one document, so no number is computed twice. Texts are as people and models wrote them:
a format escapes them, and `cleaned` takes out what no format can show.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

Kind = Literal["text", "count", "score", "difference", "p", "number", "measure", "usd", "ms", "time", "flag"]
"""How a column's values are written: a score with three decimals, a difference with its sign, a p as the APA has it."""

Value = str | int | float | bool | None
FigureKind = Literal["intervals", "differences", "distributions", "costs", "latencies"]

_LONGEST = 400
_DRAWN = 40  # lines that a figure has room for
# controls, and what turns the direction of the text around it: neither has a place in a table
_UNSHOWABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)

RIGHT_TO_LEFT = re.compile(
    "([\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+(?: [\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]+)*)"
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; `about` says what it is, and a detail is left out where there is little room."""

    key: str
    label: str
    kind: Kind = "text"
    about: str = ""
    is_detail: bool = False

    @property
    def is_number(self) -> bool:
        """Whether its values are numbers, which stand at the right."""
        return self.kind not in ("text", "time", "flag")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of values in the order of the columns; notes stand below it.

    One that is data is there to be computed with: its rows stand where they can be folded or sorted, and in the files
    of data, but not in a text.
    """

    key: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    is_data: bool = False

    def without_details(self) -> Table:
        """Return the table without the columns that are details."""
        kept = [place for place, column in enumerate(self.columns) if not column.is_detail]
        rows = tuple(tuple(row[place] for place in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[place] for place in kept), rows=rows)

    def beginning(self, most: int) -> Table:
        """Return the table with at most so many rows, the first ones, and a note that says where the others are."""
        if len(self.rows) <= most:
            return self
        rows = f"The first {most:,} of {len(self.rows):,} rows; all" if most else f"All {len(self.rows):,} rows"
        note = f"{rows} are in tables/{self.key}.csv (format csv) and in report.json (format json)."
        return replace(self, rows=self.rows[:most], notes=(note, *self.notes))


@dataclass(frozen=True, slots=True)
class Figure:
    """What a figure shows, as data: `rows` are objects whose keys its kind decides (see figures.py)."""

    key: str
    kind: FigureKind
    caption: str
    alt: str
    axis: str
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Points:
    """A list of plain texts."""

    items: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A text as it is, line by line: a prompt, a configuration, a command."""

    title: str
    text: str


Block = Paragraph | Points | Table | Figure | Verbatim


@dataclass(frozen=True, slots=True)
class Section:
    """A headed part of a report."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """A report on one or several runs; `summary` stands before everything, and `software` is what made the report."""

    title: str
    subtitle: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    runs: tuple[str, ...] = ()
    alpha: float = 0.05
    software: dict[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in the order of the report."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Table))

    @property
    def figures(self) -> tuple[Figure, ...]:
        """All figures, in the order of the report."""
        return tuple(block for section in self.sections for block in section.blocks if isinstance(block, Figure))

    def table(self, key: str) -> Table:
        """Return the table of a key; raises KeyError where the report has none."""
        for table in self.tables:
            if table.key == key:
                return table
        raise KeyError(key)


def table_of(
    key: str,
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> Table:
    """Return rows of a view as a table of the columns' keys; objects become JSON."""
    values = tuple(tuple(_cell(row.get(column.key)) for column in columns) for row in rows)
    return Table(key, caption, tuple(columns), values, tuple(notes))


def _cell(value: Any) -> Value:
    return json.dumps(value, ensure_ascii=False, sort_keys=True) if isinstance(value, (dict, list)) else value


def drawn(
    key: str,
    kind: FigureKind,
    caption: str,
    axis: str,
    rows: Sequence[dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
) -> Figure:
    """Return rows as a figure, which says in words what it shows; of very many it shows the first ones."""
    kept = tuple(rows[:_DRAWN])
    if len(rows) > _DRAWN:
        caption = f"{caption} The first {_DRAWN} of {len(rows):,}: the tables have all."
    return Figure(key, kind, caption, f"{caption} {'; '.join(map(told, kept))}.", axis, kept)


def counted(number: float, noun: str) -> str:
    """Return a count with its noun: 1 case, 24 cases."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def some_of(names: Sequence[str], most: int = 6) -> str:
    """Return names as a list, at most so many of them, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain(value: Any) -> Any:
    """Return a value of the database as a report holds it: numbers as float, times as text, NaN as None."""
    match value:
        case Decimal() | float():
            return float(value) if math.isfinite(value) else None
        case datetime():
            return value.isoformat()
        case dict():
            return {str(name): plain(item) for name, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _ if is_dataclass(value) and not isinstance(value, type):
            return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
        case _:
            return value


def cleaned(text: str) -> str:
    """Return a text without what no page can show: controls and marks of direction become U+FFFD."""
    return _UNSHOWABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def isolated(text: str) -> str:
    """Return a text as `cleaned` does, in which words from right to left do not move the numbers beside them."""
    return RIGHT_TO_LEFT.sub("\u2068\\1\u2069", cleaned(text))


def shown(value: Value, kind: Kind = "text") -> str:
    """Return a value as people read it; nothing is shown as a dash, and a long text by its beginning."""
    if value is None or value == "":
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        text = " ".join(cleaned(value).split())
        if kind == "time":
            return text[:19].replace("T", " ")
        return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return _number(value, kind)


def _number(value: float, kind: Kind) -> str:
    if not math.isfinite(value):
        return "\N{EN DASH}"
    match kind:
        case "count":
            text = f"{value:,.0f}"
        case "score":
            text = f"{value:.3f}"
        case "difference":
            text = f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"
        case "p":
            if value < 0.001:
                return "<.001"
            return ">.999" if value > 0.999 else f"{value:.3f}".removeprefix("0")
        case "measure":
            text = f"{value:,.6g}"
        case "usd":
            text = usd(value)
        case "ms":
            text = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        case _:
            text = f"{value:,.2f}" if abs(value) < 10_000 else f"{value:,.3g}"
            text = text.removeprefix("-") if text == "-0.00" else text
    return text.replace("-", "\N{MINUS SIGN}")


def usd(amount: float) -> str:
    """Return an amount of USD: cents of large ones, else two digits that mean something."""
    if amount == 0:
        return "0"
    if abs(amount) >= 1:
        return f"{amount:,.2f}"
    places = min(8, 1 - math.floor(math.log10(abs(amount))) + 1)
    return f"{amount:.{places}f}"
