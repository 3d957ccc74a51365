"""A report as one HTML file that needs nothing else: figures inline, tables that sort, light and dark, wide and narrow.

The page's policy allows its own script by the script's hash and no other, nor anything from elsewhere: should a text
of a model ever get through the escaping, it still could not run.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from pgharness.report import figures
from pgharness.report.model import Figure, Paragraph, Points, Report, Table, Value, Verbatim, cleaned, isolated, shown

_MOST_ROWS = 1_000  # of a table: more make a page slow, and nobody reads them


@cache
def _environment() -> Environment:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"shown": shown, "cleaned": cleaned, "isolated": isolated, "sort_key": _sort_key}
    kinds = {"Figure": Figure, "Paragraph": Paragraph, "Points": Points, "Table": Table, "Verbatim": Verbatim}
    made.tests |= {name.lower(): lambda block, kind=kind: isinstance(block, kind) for name, kind in kinds.items()}
    return made


def _text(name: str) -> str:
    return (files("pgharness.report") / name).read_text(encoding="utf-8")


def _sort_key(value: Value) -> str:
    """Return what a cell is sorted by: numbers unrounded, so that they sort as they are."""
    return "" if value is None else str(float(value)) if isinstance(value, int | float) else cleaned(value)[:200]


def render(report: Report) -> str:
    """Return a report as one HTML page."""
    script, style = _text("report.js"), _text("report.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    drawn = {figure.key: figures.inline_svg(figure) for figure in report.figures}
    template = _environment().from_string(_text("report.html.j2"))
    return template.render(report=report, script=script, style=style, policy=policy, drawn=drawn, most_rows=_MOST_ROWS)
