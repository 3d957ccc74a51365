"""Reports in every format: what people and models wrote is shown and does nothing, and the same data give the same bytes."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest

from pgharness.errors import Conflict, HarnessError, InvalidArgument
from pgharness.report import figures, latex, markdown
from pgharness.report.files import FORMATS, csv_of, files_of, read_earlier, write
from pgharness.report.model import (
    Column,
    Figure,
    Paragraph,
    Points,
    Report,
    Section,
    Table,
    Verbatim,
    cleaned,
    drawn,
    shown,
    some_of,
    usd,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\" onmouseover=\"alert(1)' x='",
    "{{ 7 * 7 }}{% raw %}",
    r"\input{/etc/passwd}\write18{id}%",
    "$x$ & #1 ~ ^ _ { } \\\\ \\end{document}",
    "| a | b |\n---\n# heading",
    "```\n~~~\n<b>fence</b>",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png) www.evil.example <http://evil.example>",
    "=cmd|' /C calc'!A0",
    "\t=1+1",
    "@SUM(1)",
    "-2+3",
    "nul\x00 bell\x07 escape\x1b[31m delete\x7f c1\x9b",
    "\u202eevil\u202c \u2066isolated\u2069 \u200b zero",
    "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u4e2d\u6587 \U0001f9ea e\u0301 Łódź ½",
    "'''\"\"\"\\N{BELL}\n__import__('os')",
    "x;=1+1;y",
    "x" * 3000,
    "a " * 2000,
    "]]></svg><!-- -->",
    "",
)


def table(key: str, text: str) -> Table:
    columns = (
        Column("name", text or "name"),
        Column("mean", "Mean", "score", text),
        Column("more", "More", is_detail=True),
    )
    return Table(key, text or "caption", columns, ((text, 0.5, text), ("plain", None, "")), (text or "note",))


def report_of(text: str) -> Report:
    """Return a report in which a text stands everywhere that a text may stand."""
    word = text or "empty"
    rows = (
        {"label": text, "value": 0.5, "low": 0.4, "high": 0.6},
        {"label": "b", "value": 0.1, "low": None, "high": None},
    )
    drawn = Figure("f", "intervals", word, word, "mean score", rows)
    blocks = (Paragraph(word), Points((word, "b")), Verbatim(word, text), drawn, table("t", text))
    return Report(word, word, (word,), (Section("s", word, blocks),), (word,), software={"pgharness": "0"})


@pytest.fixture(scope="module")
def whole() -> Report:
    """A report with all hostile texts and every kind of figure."""
    values = (
        {"label": text, "value": 0.1 * n, "low": 0.1 * n - 0.1, "high": 0.1 * n + 0.1} for n, text in enumerate(HOSTILE)
    )
    rows = tuple(values)
    bins = tuple({"label": row["label"], "bins": [0, 3, 1, 0], "median": 0.4, "count": 4} for row in rows[:3])
    drawn = (
        Figure("intervals", "intervals", "c", "a", "x", rows),
        Figure(
            "differences",
            "differences",
            "c",
            "a",
            "x",
            tuple({**row, "differs": n % 2 == 0} for n, row in enumerate(rows)),
        ),
        Figure("distributions", "distributions", "c", "a", "x", bins),
        Figure(
            "costs", "costs", "c", "a", "x", tuple({**row, "cost": 0.001 * (n + 1)} for n, row in enumerate(rows[:9]))
        ),
        Figure("latencies", "latencies", "c", "a", "x", tuple({**row, "low": 1.0, "high": 90.0} for row in rows)),
    )
    columns = (Column("name", "Name"), Column("mean", "Mean", "score"), Column("p", "p", "p"))
    long = Table("long", "Long", columns, tuple((text, 0.1, 0.0001) for text in HOSTILE * 3))
    sections = tuple(
        Section(f"s{n}", f"Section {n}", report_of(text).sections[0].blocks[:3]) for n, text in enumerate(HOSTILE)
    )
    return Report(
        "Report", "", HOSTILE[:4], (Section("all", "All", (*drawn, long)), *sections), software={"pgharness": "0"}
    )


def text_of(made: Report, name: str) -> str:
    return files_of(made, [name])[0].content.decode()


# -- values


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (None, "score", "\u2013"),
        (0.12345, "score", "0.123"),
        (-0.12345, "difference", "\u22120.123"),
        (0.2, "difference", "+0.200"),
        (-0.0001, "difference", "0.000"),
        (0.0004, "p", "<.001"),
        (0.0416, "p", ".042"),
        (1.0, "p", ">.999"),
        (1234567, "count", "1,234,567"),
        (0.0001234, "usd", "0.000123"),
        (1234.5, "usd", "1,234.50"),
        (float("nan"), "score", "\u2013"),
        (True, "flag", "yes"),
        ("2026-01-02T03:04:05.678+00:00", "time", "2026-01-02 03:04:05"),
    ],
)
def test_values_are_written_as_their_kind_asks(value: Any, kind: Any, expected: str) -> None:
    assert shown(value, kind) == expected


def test_amounts_keep_two_digits_that_mean_something() -> None:
    assert [usd(amount) for amount in (0, 0.5, 0.0123, 0.00000123, 12.345)] == [
        "0",
        "0.500",
        "0.0123",
        "0.00000123",
        "12.35",
    ]


def test_what_no_page_can_show_is_replaced_and_letters_stay() -> None:
    assert cleaned("a\x00\x1b\u202e\r\nb\t\u05d0\u05d1 中 é") == "a\ufffd\ufffd\ufffd\nb\t\u05d0\u05d1 中 é"


def test_pages_show_the_beginning_of_a_long_table_and_say_where_all_of_it_is() -> None:
    columns = (Column("name", "Name"), Column("mean", "Mean", "score"))
    rows = tuple((f"row-{n}.", n / 10_000) for n in range(10_000))
    long, data = Table("long", "Long", columns, rows), Table("data", "Data", columns, rows, is_data=True)
    made = Report("r", "", ("s",), (Section("s", "S", (long, data)),), software={"pgharness": "0"})
    page, told = text_of(made, "html"), "of 10,000 rows; all are in tables/long.csv"
    assert len(page) < 500_000 and page.count("<tr>") == 2 * 1_001 and page.count("<details>") == 1
    assert told in page and "of 10,000 rows; all are in tables/data.csv" in page
    for name in ("md", "latex"):
        text = text_of(made, name)
        assert len(text) < 30_000
        text = re.sub(r"\\hspace\{0pt\}|[{}]", "", text)
        assert "row-200." not in text and told in text and "All 10,000 rows are in" in text
    assert len(json.loads(text_of(made, "json"))["sections"][0]["blocks"][1]["rows"]) == 10_000
    assert [file.content.count(b"\r\n") for file in files_of(made, ["csv"])] == [10_001] * 2
    book = json.loads(text_of(made, "ipynb"))
    shown_rows = "".join(
        "".join(out["data"]["text/plain"]) for cell in book["cells"] for out in cell.get("outputs", ())
    )
    assert shown_rows.count("row-") == 400


def test_words_from_right_to_left_do_not_move_the_numbers_beside_them() -> None:
    text = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd: 14 cases"
    apart = "\u2068\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd\u2069: 14 cases"
    made = report_of(text)
    assert f"<p>{apart}</p>" in text_of(made, "html") and f"\n{apart}\n" in text_of(made, "md")
    assert r"\rightleft{" in text_of(made, "latex") and text in json.loads(text_of(made, "json"))["summary"]


def test_a_figure_of_many_rows_shows_the_first_and_says_so() -> None:
    rows = [{"label": f"m{n}", "value": n, "low": None, "high": None} for n in range(1_000)]
    made = drawn("f", "intervals", "Means.", "x", rows, lambda row: row["label"])
    assert len(made.rows) == 40 and made.caption == "Means. The first 40 of 1,000: the tables have all."
    assert made.alt.endswith("m38; m39.") and len(figures.draw(made, "png")) > 1_000
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more" and some_of(["a"]) == "a"


def test_of_a_difference_both_names_are_seen() -> None:
    one, two = "the first of two long names", "the second of two long names"
    row = {"label": f"{one} - {two}", "of": [one, two], "value": 1.0, "low": None, "high": None, "differs": True}
    shown_row = figures._labelled_with(Figure("f", "differences", "c", "a", "x", (row,)))[0].rows[0]
    assert shown_row["label"] == "the first …ong names \N{MINUS SIGN} the second…ong names"


# -- HTML


class _Page(HTMLParser):
    """Collects the elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def shape(made: Report) -> list[tuple[str, list[str]]]:
    """Return the elements of a report's page with the names of their attributes, figures left out."""
    page = re.sub(r"<svg.*?</svg>", "", text_of(made, "html"), flags=re.DOTALL)
    return [(tag, sorted(attributes)) for tag, attributes in _Page(page).elements]


def test_no_text_adds_an_element_or_an_attribute_to_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "inline_svg", lambda figure: "<svg></svg>")  # they are looked at by themselves
    plain = shape(report_of("plain"))
    for text in filter(None, HOSTILE):
        assert shape(report_of(text)) == plain, text[:60]


def test_no_text_adds_an_element_to_a_figure(whole: Report) -> None:
    drawn = {tag for figure in whole.figures for tag, _ in _Page(figures.inline_svg(figure)).elements}
    assert drawn == {"svg", "defs", "style", "g", "path", "use", "clippath", "rect"}


def test_the_page_shows_the_texts_as_they_are() -> None:
    for text in HOSTILE[:3]:
        assert text in _Page(text_of(report_of(text), "html")).text


def test_the_page_needs_nothing_from_elsewhere_and_is_accessible(whole: Report) -> None:
    text = text_of(whole, "html")
    page = _Page(text)
    outside = [
        (t, a)
        for t, a in page.elements
        if any(k in ("src", "srcset", "data", "action") for k in a) or t in ("link", "iframe")
    ]
    assert outside == []
    assert all((a.get("href") or a.get("xlink:href") or "#").startswith("#") for _, a in page.elements)
    heads = [a for t, a in page.elements if t == "th"]
    assert heads and all(a.get("scope") in ("col", "row") for a in heads)
    pictures = [a for t, a in page.elements if a.get("role") == "img"]
    assert len(pictures) == len(whole.figures) and all(a.get("aria-label") for a in pictures)
    assert sum(t == "script" for t, _ in page.elements) == 1 and "unsafe-eval" not in text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


# -- Markdown


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_markdown_shows_a_text_as_one_line_without_markup(text: str) -> None:
    line = markdown.escaped(text)
    assert "\n" not in line and "<" not in line
    assert not re.search(r"(?<!\\)[\\`*_\[\]|~$@](?![\\`*_\[\]|~$@:.])", line.replace("\\\\", ""))
    assert not re.search(r"(?<!\\)://|(?<!\\)www\.", line) and not re.match(r"\s*([#>+\-=]|\d+[.)]\s)", line)


def test_markdown_tables_keep_their_columns_and_fences_hold() -> None:
    for text in HOSTILE:
        lines = re.sub("^(`{3,}).*?^\\1$", "", text_of(report_of(text), "md"), flags=re.DOTALL | re.MULTILINE).split(
            "\n"
        )
        rows = [line for line in lines if line.startswith("| ")]
        assert len(rows) == 4 and {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert markdown.fenced("a\n````\nb").startswith("`````text\n")


# -- LaTeX


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_latex_has_no_command_that_is_not_ours(text: str) -> None:
    ours = r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar|textquotedbl|textquotesingle|textasciigrave"
    ours += r"|text(en|em)dash|ldots|textquote(dbl)?(left|right)|ensuremath|pm|times|leq|geq|rightarrow|mu|framebox|texttt|footnotesize"
    ours += r"|hspace|letter|rightleft|[{}$&#%_])"
    rest = re.sub(ours, "", latex.escaped(text))
    assert "\\" not in rest and not re.search(r"[$&#%_^]", rest) and "\n" not in rest


@pytest.mark.parametrize("program", ["pdflatex", "lualatex"])
def test_latex_compiles_whatever_the_texts(whole: Report, tmp_path: Path, program: str) -> None:
    needed = {"pdflatex": "lmodern.sty", "lualatex": "luaotfload.sty"}[program]
    if shutil.which(program) is None or subprocess.run(["kpsewhich", needed], capture_output=True).returncode != 0:
        pytest.skip(f"{program} is not installed")
    write(files_of(whole, ["latex"]), tmp_path)
    command = [program, "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert "Float too large" not in done.stdout and not re.search(r"Overfull .vbox \(\d\d", done.stdout)


# -- notebook, JSON, CSV


def test_the_notebook_is_valid_and_runs_offline_from_its_own_data(whole: Report, tmp_path: Path) -> None:
    text = text_of(whole, "ipynb")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    code = "\n\n".join(cell.source for cell in book.cells if cell.cell_type == "code")
    code += "\n\nassert rows('long')[0]['mean'] == 0.1"
    (tmp_path / "cells.py").write_text(code)
    command = [sys.executable, "-I", "-W", "ignore", str(tmp_path / "cells.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Long" in done.stdout


def test_json_holds_every_text_and_number_as_it_is(whole: Report) -> None:
    read = json.loads(text_of(whole, "json"))
    long = next(block for block in read["sections"][0]["blocks"] if block.get("key") == "long")
    assert [row["name"] for row in long["rows"]] == [row[0] for row in whole.table("long").rows]
    assert long["rows"][0] == {"name": HOSTILE[0], "mean": 0.1, "p": 0.0001}


def test_csv_has_one_line_a_row_and_nothing_that_a_spreadsheet_computes() -> None:
    for text in HOSTILE:
        made = table("t", text)
        rows = list(csv.reader(io.StringIO(csv_of(made), newline="")))
        assert rows[0] == ["name", "mean", "more"] and len(rows) == 3
        assert not re.match(r"\s*[=+\-@]", rows[1][0]) and rows[1][1] == "0.5"
        # where a semicolon parts columns, a text with one is still one cell
        cells = [cell for row in csv.reader(io.StringIO(csv_of(made), newline=""), delimiter=";") for cell in row]
        assert not any(re.match(r"\s*[=+\-@]", cell) for cell in cells)
        assert rows[1][0].replace("'", "") == cleaned(text).replace("'", "")


# -- figures


def test_a_logarithmic_axis_has_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(figures._SETTINGS, "svg.fonttype", "none")
    rows = (
        {"label": "a", "low": 1.0, "value": 50.0, "high": 90.0},
        {"label": "$b$", "low": 2.0, "value": 3.0, "high": 4.0},
    )
    text = figures.draw(Figure("f", "latencies", "c", "a", "ms", rows), "svg").decode()
    assert "math" not in text and ">10</text>" in text and ">$b$</text>" in text


def test_a_label_in_a_figure_is_short_and_can_be_drawn() -> None:
    assert figures.short("x" * 100) == f"{'x' * 17}…{'x' * 16}"
    rows = ({"label": "a\u05d0\n\u0378 c", "value": 1.0, "low": None, "high": None},)
    drawn, fonts = figures._labelled_with(Figure("f", "intervals", "c", "a", "x", rows))
    assert drawn.rows[0]["label"] == "\u200ea\u05d0 \ufffd c" and fonts[0] == "DejaVu Sans"


def test_every_format_gives_the_same_bytes_again_and_warns_of_nothing(whole: Report) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert files_of(whole, FORMATS) == files_of(whole, FORMATS)


# -- files


def test_files_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    made = files_of(report_of("plain"), ["md", "csv"])
    paths = write(made, tmp_path / "new")
    assert [path.relative_to(tmp_path / "new").as_posix() for path in paths] == [
        "report.md",
        "figures/f.svg",
        "tables/t.csv",
    ]
    paths[0].write_text("mine")
    with pytest.raises(Conflict, match="exists already, and 2 more"):
        write(made, tmp_path / "new")
    assert paths[0].read_text() == "mine"
    write(made, tmp_path / "new", force=True)
    assert paths[0].read_bytes() == made[0].content
    with pytest.raises(HarnessError, match="cannot be written"):
        write(made, paths[0])


def test_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no format 'pdf'"):
        files_of(report_of("plain"), ["pdf"])


def test_an_earlier_report_is_compared_number_by_number(tmp_path: Path) -> None:
    made = report_of("plain")
    (path,) = write(files_of(made, ["json"]), tmp_path)
    earlier = read_earlier(path)
    assert earlier.differences(made) == [] and earlier.ordered(["plain"]) == ["plain"]
    moved = replace(made.table("t"), rows=(("plain", 0.5 + 1e-12, "plain"), ("plain", 0.1, "")))
    other = replace(made, sections=(Section("s", "s", (*made.sections[0].blocks[:-1], moved)),))
    assert earlier.differences(other) == ["table t, row 2, mean: None in the file, 0.1 now"]
    path.write_text("{}")
    with pytest.raises(HarnessError, match="is not a report in JSON"):
        read_earlier(path)
