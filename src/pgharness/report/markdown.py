"""A report as Markdown (GitHub's), with its figures as SVG files beside it."""

from __future__ import annotations

import re

from pgharness.report.model import Block, Figure, Paragraph, Points, Report, Table, Verbatim, cleaned, isolated, shown

_SPECIAL = re.compile(r"([\\`*_\[\]|~$@])")
# what makes a list, a heading, a quotation or a rule when a line begins with it
_LEADING = re.compile(r"^(\s*)([#+\-=>]|\d{1,9}(?=[.)](?:\s|$)))")
MOST_ROWS = 200
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def escaped(text: str) -> str:
    """Return a text as a line of Markdown that shows it as it is."""
    return _LEADING.sub(lambda found: f"{found[1]}{_literal(found[2])}", _inline(text))


def _inline(text: str) -> str:
    line = " ".join(isolated(text).split())
    line = _SPECIAL.sub(r"\\\1", line)
    line = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], line)
    return line.replace("://", r"\://").replace("www.", r"www\.")


def _literal(start: str) -> str:
    return "".join(f"&#{ord(letter)};" for letter in start)


def render(report: Report, *, has_figures: bool = True) -> str:
    """Return a report as Markdown; its figures are files in the folder `figures`."""
    parts = [f"# {escaped(report.title)}", f"*{escaped(report.subtitle)}*" if report.subtitle else "", "## Summary"]
    parts += [escaped(text) for text in report.summary]
    for section in report.sections:
        parts.append(f"## {escaped(section.title)}")
        parts += [block_of(block) for block in section.blocks if has_figures or not isinstance(block, Figure)]
    return "\n\n".join(part for part in parts if part) + "\n"


def block_of(block: Block) -> str:
    """Return one block of a report as Markdown."""
    match block:
        case Paragraph():
            return escaped(block.text)
        case Points():
            return "\n".join(f"- {escaped(item)}" for item in block.items)
        case Verbatim():
            return f"**{escaped(block.title)}**\n\n{fenced(block.text)}"
        case Figure():
            image = f"![{escaped(block.alt)}](figures/{block.key}.svg)"
            return f"{image}\n\n*{escaped(block.caption)}*"
        case Table():
            return _table(block.without_details().beginning(0 if block.is_data else MOST_ROWS))


def fenced(text: str) -> str:
    """Return a text in a fence that nothing in it ends."""
    fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", text)), default=0))
    return f"{fence}text\n{cleaned(text)}\n{fence}"


def _table(table: Table) -> str:
    notes = [escaped(note) for note in table.notes]
    if not table.rows and notes:
        return "\n\n".join((f"**{escaped(table.caption)}**", *notes))
    head = " | ".join(escaped(column.label) for column in table.columns)
    rule = " | ".join("--:" if column.is_number else ":--" for column in table.columns)
    lines = [f"**{escaped(table.caption)}**", "", f"| {head} |", f"| {rule} |"]
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        lines.append("| " + " | ".join(_inline(shown(value, column.kind)) for column, value in cells) + " |")
    lines += [f"\n{note}" for note in notes]
    return "\n".join(lines)
