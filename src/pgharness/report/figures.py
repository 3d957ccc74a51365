"""Figures as vector graphics: drawn from a report's data alone, the same bytes for the same data.

Colours are of Okabe & Ito (2008), told apart by people who are blind to some colours; what a colour says, a shape or a
place says too. Ink is drawn in a colour of its own, which a page replaces by that of its text.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

from pgharness.report.model import RIGHT_TO_LEFT, Figure, cleaned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK = "#1b1b1f"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#7f7f87"
_WIDTH = 5.8
_LABEL = 34  # letters
_NAME = 20  # of one of two
_FONT = "DejaVu Sans"  # comes with matplotlib, as does a font that has a box for every letter
_BOXES = "Last Resort High-Efficiency"
_SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "pgharness",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.size": 9,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.left": False,
    "grid.color": GREY,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
}
_lock = threading.Lock()  # matplotlib's settings are the process's


def draw(figure: Figure, form: Literal["svg", "pdf", "png"]) -> bytes:
    """Return a figure in a format; the same data give the same bytes with the same version of matplotlib."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure, families = _labelled_with(figure)
    with _lock, matplotlib.rc_context(cast(Any, _SETTINGS | {"font.family": families})):
        canvas = Canvas(figsize=(_WIDTH, _height(figure)), layout="constrained")
        FigureCanvasAgg(canvas)
        _PAINTERS[figure.kind](canvas, figure)
        out = io.BytesIO()
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[form]
        canvas.savefig(out, format=form, metadata=dates, dpi=150, transparent=form == "svg")
    return out.getvalue()


def inline_svg(figure: Figure) -> str:
    """Return a figure as an SVG element for a page, its ink in the page's own colour, without a size of its own."""
    text = draw(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    # ids are unique within a figure alone
    rest = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{figure.key}-", rest)
    return f'{head} aria-hidden="true">{rest}'.replace(INK, "currentColor")


def _height(figure: Figure) -> float:
    count = max(len(figure.rows), 1)
    match figure.kind:
        case "distributions":
            return 0.9 + 0.6 * count
        case "costs":
            return 3.4
        case _:
            return 0.9 + 0.34 * count


def short(label: str, most: int = _LABEL) -> str:
    """Return a label as a figure shows it: one line, its middle left out if it is long."""
    text = " ".join(cleaned(label).split())
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def _label(row: dict[str, Any]) -> str:
    """Return a row's label; of a difference, both names are to be seen."""
    text = short(row["label"])
    if "of" in row and text != row["label"]:
        text = " \N{MINUS SIGN} ".join(short(name, _NAME) for name in row["of"])
    # from left to right, be its first word from right to left
    return f"\u200e{text}" if RIGHT_TO_LEFT.search(text) else text


def _labelled_with(figure: Figure) -> tuple[Figure, list[str]]:
    """Return a figure with labels that can be drawn, and the fonts for that.

    These are the usual one, and what this computer has of other scripts; what no font of it has becomes U+FFFD.
    """
    from matplotlib.font_manager import fontManager

    labels = [_label(row) for row in figure.rows]
    fonts, lacking = [_FONT], set(map(ord, "".join(labels))) - _glyphs(_FONT)
    others = {font.name for font in fontManager.ttflist if (font.style, font.weight) == ("normal", 400)} - {_BOXES}
    for name in sorted(others if lacking else (), key=lambda name: ("Sans" not in name, name)):
        if lacking & _glyphs(name):
            fonts.append(name)
            lacking -= _glyphs(name)
    shown = [label.translate(dict.fromkeys(lacking, "\ufffd")) for label in labels]
    rows = tuple(row | {"label": label} for row, label in zip(figure.rows, shown, strict=True))
    return replace(figure, rows=rows), fonts


@cache
def _glyphs(family: str) -> frozenset[int]:
    """Return the code points that a font can draw; none of one made of pictures, which has no outlines."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=[family])))
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def _labelled(axes: Axes, figure: Figure) -> list[int]:
    """Give each row a line with its label, the first on top; return the lines' places."""
    places = list(range(len(figure.rows)))
    axes.set_yticks(places, [row["label"] for row in figure.rows])
    axes.set_ylim(len(figure.rows) - 0.4, -0.6)
    axes.set_xlabel(figure.axis)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return places


def _intervals(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.subplots()
    for place, row in zip(_labelled(axes, figure), figure.rows, strict=True):
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=BLUE, linewidth=2.2, solid_capstyle="butt")
        axes.plot(row["value"], place, marker="o", markersize=6.5, color=BLUE)


def _differences(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.subplots()
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for place, row in zip(_labelled(axes, figure), figure.rows, strict=True):
        color = ORANGE if row["differs"] else GREY
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2.2, solid_capstyle="butt")
        fill = color if row["differs"] else "white"
        axes.plot(row["value"], place, marker="o", markersize=6.5, markeredgewidth=1.6, color=color, mfc=fill)


def _distributions(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.subplots()
    most = max((max(row["bins"]) for row in figure.rows), default=0) or 1
    for place, row in zip(_labelled(axes, figure), figure.rows, strict=True):
        width, floor = 1 / len(row["bins"]), place + 0.38
        middles = [(number + 0.5) * width for number in range(len(row["bins"]))]
        axes.bar(middles, [-0.8 * count / most for count in row["bins"]], 0.92 * width, floor, color=BLUE, alpha=0.75)
        axes.axhline(floor, color=INK, linewidth=0.6)
        axes.plot([row["median"]] * 2, [floor, floor - 0.85], color=ORANGE, linewidth=2)
        told = f"{row['count']:,} case{'' if row['count'] == 1 else 's'}"
        axes.text(1.01, place, told, transform=axes.get_yaxis_transform(), verticalalignment="center", fontsize=8)
    axes.set_xlim(0, 1)


def _costs(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.subplots()
    shapes = "osD^vP*X"
    colors = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00")
    for place, row in enumerate(figure.rows):
        look: dict[str, Any] = {"marker": shapes[place % len(shapes)], "color": colors[place % len(colors)]}
        axes.plot(row["cost"], row["value"], linestyle="", markersize=8, label=row["label"], **look)
    axes.set_xlabel(figure.axis)
    axes.set_ylabel("mean score")
    axes.spines["left"].set_visible(True)
    costs = [row["cost"] for row in figure.rows]
    if min(costs) > 0 and max(costs) / min(costs) > 20:
        _stretch(axes)
    else:
        axes.locator_params(axis="x", nbins=5)
    axes.margins(0.12)
    axes.grid()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def _stretch(axes: Axes) -> None:
    """Make the x axis logarithmic, its numbers written out: powers need the markup that labels may not have."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _latencies(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.subplots()
    for place, row in zip(_labelled(axes, figure), figure.rows, strict=True):
        axes.plot([row["low"], row["high"]], [place, place], color=GREEN, linewidth=1.4)
        axes.plot(row["low"], place, marker="o", markersize=6.5, color=GREEN)
        axes.plot(row["value"], place, marker="|", markersize=11, markeredgewidth=2, color=GREEN)
        axes.plot(row["high"], place, marker="o", markersize=5.5, color=GREEN, mfc="white")
    lows, highs = ([row[end] for row in figure.rows] for end in ("low", "high"))
    if min(lows) > 0 and max(highs) / min(lows) > 20:
        _stretch(axes)
    else:
        axes.set_xlim(left=0)


_PAINTERS: dict[str, Callable[[Canvas, Figure], None]] = {
    "intervals": _intervals,
    "differences": _differences,
    "distributions": _distributions,
    "costs": _costs,
    "latencies": _latencies,
}
