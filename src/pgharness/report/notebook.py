"""A report as a Jupyter notebook: its data are inside, its tables and figures are made from them by its own cells.

It needs Python alone to run, and draws its figures where matplotlib is installed. Texts of models are in its data and
in escaped Markdown, never in its code.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pgharness.report import figures, markdown
from pgharness.report.model import Figure, Paragraph, Points, Report, Table, Verbatim, shown

_SETUP = '''\
"""Everything below is made from `report`: change it, plot it, compute with it; no database and no network is needed."""

import html
import io
import json

try:
    from IPython.display import HTML, Image, display
except ImportError:
    HTML = Image = display = None
try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

TABLES = {block["key"]: block for part in report["sections"] for block in part["blocks"] if block["type"] == "table"}
FIGURES = {block["key"]: block for part in report["sections"] for block in part["blocks"] if block["type"] == "figure"}


def rows(key):
    """Return a table's rows, a dict each: pandas.DataFrame(rows(key)) is its data frame."""
    return TABLES[key]["rows"]


BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#7f7f87"
FORMS = {"score": ".3f", "difference": "+.3f", "p": ".3f", "count": ",.0f", "number": ",.2f", "ms": ",.4g"}


def shown(value, kind="text"):
    """Return a value as a table shows it; rows() has it unrounded."""
    if value is None:
        return "-"
    if kind == "p" and value < 0.001:
        return "<.001"
    return str(value) if isinstance(value, (str, bool)) else format(value, FORMS.get(kind, ",.6g"))


def table(key, most=200):
    """Show a table: its first rows, of very many; rows() has all."""
    found = TABLES[key]
    columns = [column for column in found["columns"] if not column["is_detail"]]
    lines = [[shown(row[column["key"]], column["kind"]) for column in columns] for row in found["rows"][:most]]
    if HTML is None:
        print(found["caption"], *("\\t".join(line) for line in lines), sep="\\n")
        return
    cells = lambda tag, texts: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)
    head = cells("th", (column["label"] for column in columns))
    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    caption = html.escape(found["caption"])
    display(HTML(f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"))


def figure(key):
    """Draw a figure."""
    found = FIGURES[key]
    lines = found["rows"]
    if Figure is None:
        print("pip install matplotlib draws:", found["caption"])
        return
    canvas = Figure(figsize=(8, 1.2 + 0.4 * len(lines)), layout="constrained")
    axes = canvas.subplots()
    labels = [line["label"].replace("$", "\\\\$")[:60] for line in lines]
    if found["kind"] == "distributions":
        for place, line in enumerate(lines):
            top = max(line["bins"]) or 1
            width = 1 / len(line["bins"])
            middles = [(n + 0.5) * width for n in range(len(line["bins"]))]
            axes.bar(middles, [0.8 * n / top for n in line["bins"]], width, place, color=BLUE)
            axes.plot([line["median"]] * 2, [place, place + 0.8], color=ORANGE)
    elif found["kind"] == "costs":
        axes.scatter([line["cost"] for line in lines], [line["value"] for line in lines])
        for line, label in zip(lines, labels):
            axes.annotate(label, (line["cost"], line["value"]), xytext=(5, 5), textcoords="offset points")
    else:
        for place, line in enumerate(lines):
            color = {None: BLUE, True: ORANGE, False: GREY}[line.get("differs")]
            fill = "white" if color == GREY else color
            if line["low"] is not None:
                axes.plot([line["low"], line["high"]], [place, place], color=color)
            if found["kind"] == "latencies":
                axes.plot(line["low"], place, "o", color=color)
                axes.plot(line["value"], place, "|", color=color, markersize=12)
                axes.plot(line["high"], place, "o", color=color, mfc="white")
            else:
                axes.plot(line["value"], place, "o", color=color, mfc=fill)
        if found["kind"] == "differences":
            axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    if found["kind"] != "costs":
        axes.margins(y=0.5 / max(len(lines), 1))
        axes.set_yticks(range(len(lines)), labels)
        axes.invert_yaxis() if found["kind"] != "distributions" else None
    axes.set_xlabel(found["axis"])
    if display is not None:
        drawn = io.BytesIO()
        canvas.savefig(drawn, format="png", dpi=110)
        display(Image(drawn.getvalue()))
'''


def render(report: Report, data: Mapping[str, Any]) -> str:
    """Return a report as a notebook (nbformat 4.5), which holds data, the report as JSON-safe values."""
    cells = [_text("\n\n".join([f"# {markdown.escaped(report.title)}", *_emphasised(report.subtitle)]))]
    cells.append(_text("\n\n".join(["## Summary", *map(markdown.escaped, report.summary)])))
    literal = json.dumps(data, ensure_ascii=True, allow_nan=False)
    cells.append(_code(f"import json\n\nreport = json.loads({literal!r})"))
    cells.append(_code(_SETUP))
    for section in report.sections:
        cells.append(_text(f"## {markdown.escaped(section.title)}"))
        for block in section.blocks:
            match block:
                case Table():
                    cells.append(_code(f"table({block.key!r})", _plain_output(block)))
                    cells += [_text("\n\n".join(map(markdown.escaped, block.notes)))] if block.notes else []
                case Figure():
                    cells.append(_code(f"figure({block.key!r})", _drawn_output(block)))
                    cells.append(_text(f"*{markdown.escaped(block.caption)}*"))
                case Paragraph() | Points() | Verbatim():
                    cells.append(_text(markdown.block_of(block)))
    book = {
        "cells": [cell | {"id": f"cell-{number}"} for number, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(book, indent=1, ensure_ascii=True) + "\n"


def _emphasised(text: str) -> Iterator[str]:
    if text:
        yield f"*{markdown.escaped(text)}*"


def _text(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source.splitlines(keepends=True)}


def _code(source: str, *outputs: dict[str, Any]) -> dict[str, Any]:
    lines = source.splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": list(outputs), "source": lines}


def _plain_output(table: Table) -> dict[str, Any]:
    kept = table.without_details().beginning(markdown.MOST_ROWS)
    lines = [[column.label for column in kept.columns]]
    lines += [[shown(value, c.kind) for c, value in zip(kept.columns, row, strict=True)] for row in kept.rows]
    widths = [min(40, max(map(len, column))) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return {"output_type": "display_data", "metadata": {}, "data": {"text/plain": text.splitlines(keepends=True)}}


def _drawn_output(figure: Figure) -> dict[str, Any]:
    image = base64.b64encode(figures.draw(figure, "png")).decode()
    data = {"image/png": image, "text/plain": [figure.alt]}
    return {"output_type": "display_data", "metadata": {}, "data": data}
