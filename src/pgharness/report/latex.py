"""A report as LaTeX: article class, booktabs tables, figures as PDF files beside it.

pdflatex, lualatex and xelatex make a PDF of it. Everything that people and models wrote goes through `escaped`: it
becomes letters, never a command. Letters that the fonts do not have are shown as their code point: with pdflatex those
of other scripts than Latin, with the others those that no font of the computer's has.
"""

from __future__ import annotations

import math
import re

from pgharness.report.model import (
    RIGHT_TO_LEFT,
    Block,
    Column,
    Figure,
    Paragraph,
    Points,
    Report,
    Table,
    Value,
    Verbatim,
    cleaned,
    shown,
)

_COMMANDS = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "-": "{-}",  # two are no dash
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    ",": "{,}",
    "\N{MINUS SIGN}": r"\ensuremath{-}",
    "\N{EN DASH}": r"\textendash{}",
    "\N{EM DASH}": r"\textemdash{}",
    "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    "\N{LEFT SINGLE QUOTATION MARK}": r"\textquoteleft{}",
    "\N{RIGHT SINGLE QUOTATION MARK}": r"\textquoteright{}",
    "\N{LEFT DOUBLE QUOTATION MARK}": r"\textquotedblleft{}",
    "\N{RIGHT DOUBLE QUOTATION MARK}": r"\textquotedblright{}",
    "\N{PLUS-MINUS SIGN}": r"\ensuremath{\pm}",
    "\N{MULTIPLICATION SIGN}": r"\ensuremath{\times}",
    "\N{LESS-THAN OR EQUAL TO}": r"\ensuremath{\leq}",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ensuremath{\geq}",
    "\N{RIGHTWARDS ARROW}": r"\ensuremath{\rightarrow}",
    "\N{MICRO SIGN}": r"\ensuremath{\mu}",
    "\N{NO-BREAK SPACE}": "~",
    "\N{REPLACEMENT CHARACTER}": r"\framebox{?}",
}
_SPOKEN = {"\N{DEGREE SIGN}", "\N{SECTION SIGN}", "\N{POUND SIGN}", "\N{COPYRIGHT SIGN}"}
_EXTENDED = frozenset("ĄąĆćČčĎďĐđĘęĚěĞğİıĹĺĽľŁłŃńŇňŐőŒœŔŕŘřŚśŞşŠšŢţŤťŮůŰűŸŹźŻżŽž")  # Latin
_UNBROKEN = 9
_WIDE = 110  # characters that a line of a table of the smallest size may take
_MOST_ROWS = 200
_MOST_LETTERS = 400  # of a cell
_LONG = 40  # lines beyond which a table may go over pages

_HEAD = r"""\documentclass[10pt]{article}
\usepackage{iftex}
\newcommand{\codepoint}[1]{\texttt{\footnotesize{[}U+#1{]}}\hspace{0pt}}
\newif\ifdone
\ifPDFTeX
  \usepackage[T1]{fontenc}
  \usepackage[utf8]{inputenc}
  \usepackage{lmodern}
  \usepackage{textcomp}
  \newcommand{\letter}[1]{\codepoint{#1}}
  \newcommand{\rightleft}[1]{#1}
\else
  \usepackage{fontspec}
  \setmainfont{Latin Modern Roman}[Ligatures=TeXReset]
  \setmonofont{Latin Modern Mono}[Ligatures=TeXReset]
  \newcommand{\otherfonts}{}
  \newcommand{\otherfont}[2]{\IfFontExistsTF{#2}{\newfontfamily{#1}{#2}\expandafter\def\expandafter\otherfonts\expandafter{\otherfonts\try#1}}{}}
  \otherfont{\fontA}{DejaVu Sans}
  \otherfont{\fontB}{Noto Sans CJK SC}
  \otherfont{\fontC}{Noto Sans SC}
  \otherfont{\fontD}{WenQuanYi Micro Hei}
  \otherfont{\fontE}{Arial Unicode MS}
  \otherfont{\fontF}{Noto Sans Devanagari}
  \otherfont{\fontG}{Noto Sans Thai}
  \otherfont{\fontH}{Noto Emoji}
  \DeclareRobustCommand{\letter}[1]{\global\donefalse
    \def\try##1{\ifdone\else{##1\iffontchar\font"#1 \global\donetrue\char"#1 \fi}\fi}\try\relax\otherfonts
    \ifdone\else\codepoint{#1}\fi}
  \ifLuaTeX \newcommand{\rightleft}[1]{{\textdir TRT #1}}
  \else \TeXXeTstate=1 \newcommand{\rightleft}[1]{\beginR #1\endR} \fi
\fi
\usepackage[a4paper,margin=2.2cm]{geometry}
\usepackage{array}
\usepackage{booktabs}
\usepackage{longtable}
\usepackage{graphicx}
\usepackage{float}
\usepackage[hidelinks]{hyperref}
\setlength{\parindent}{0pt}
\setlength{\parskip}{0.5em}
\setlength{\tabcolsep}{3pt}
\setlength{\abovecaptionskip}{4pt}
\setlength{\belowcaptionskip}{4pt}
\emergencystretch=3em
\newcolumntype{L}[1]{>{\raggedright\arraybackslash}p{#1}}
\newcolumntype{R}[1]{>{\raggedleft\arraybackslash}p{#1}}
"""


def escaped(text: str) -> str:
    """Return a text as LaTeX that shows it as one line; long words may be broken."""
    parts = RIGHT_TO_LEFT.split(" ".join(cleaned(text).split()))
    return "".join(rf"\rightleft{{{_words(part)}}}" if place % 2 else _words(part) for place, part in enumerate(parts))


def _words(text: str) -> str:
    return "".join(_word(word) for word in re.split("( )", text))


def _word(word: str) -> str:
    parts, since = [], 0
    for letter in word:
        parts.append(_letter(letter))
        since += 1
        if letter in '/_-.,:;=|&?"\\' or since >= _UNBROKEN * 2:
            parts.append(r"\hspace{0pt}" if len(word) > _UNBROKEN else "")
            since = 0
    return "".join(parts)


def _letter(letter: str) -> str:
    if letter in _COMMANDS:
        return _COMMANDS[letter]
    code = ord(letter)
    # what T1 and inputenc know: ASCII, Latin-1's letters and Latin Extended-A
    if 0x20 <= code < 0x7F or (0xC0 <= code <= 0xFF and code not in (0xD7, 0xF7)) or letter in _SPOKEN:
        return letter
    if letter in _EXTENDED:
        return letter
    # those that are written without spaces between words: a line may end after each
    return rf"\letter{{{code:04X}}}" + (r"\hspace{0pt}" if 0x2E80 <= code < 0xFB00 else "")


def render(report: Report) -> str:
    """Return a report as a LaTeX document; its figures are files in the folder `figures`."""
    parts = [
        _HEAD,
        rf"\title{{{escaped(report.title)}}}",
        rf"\author{{\parbox{{0.9\linewidth}}{{\centering {escaped(report.subtitle)}}}}}",
        r"\date{}",
    ]
    parts += [r"\begin{document}", r"\maketitle", r"\begin{abstract}"]
    parts.append("\n\n".join(escaped(text) for text in report.summary))
    parts.append(r"\end{abstract}")
    for section in report.sections:
        parts.append(rf"\section{{{escaped(section.title)}}}")
        parts += [_block(block) for block in section.blocks]
    parts.append(r"\end{document}")
    return "\n".join(parts) + "\n"


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"{escaped(block.text)}\n"
        case Points():
            items = "\n".join(rf"\item {escaped(item)}" for item in block.items)
            return f"\\begin{{itemize}}\n{items}\n\\end{{itemize}}\n"
        case Verbatim():
            lines = (_line(line) for line in cleaned(block.text).split("\n"))
            text = "\n".join(lines)
            head = f"\\paragraph{{{escaped(block.title)}}}\\mbox{{}}\\par"
            return f"{head}\n{{\\footnotesize\\ttfamily\\raggedright\n{text}}}\n"
        case Figure():
            return (
                "\\begin{figure}[H]\n\\centering\n"
                f"\\includegraphics[width=0.92\\linewidth]{{figures/{block.key}.pdf}}\n"
                f"\\caption{{{escaped(block.caption)}}}\n\\end{{figure}}\n"
            )
        case Table():
            return _table(block.without_details().beginning(0 if block.is_data else _MOST_ROWS))


def _line(line: str) -> str:
    """Return a line of a text as it is, its indentation kept; an empty one is a little space."""
    if not line.strip():
        return r"\par\smallskip"
    indent = len(line) - len(line.lstrip())
    return rf"\noindent\hspace*{{{indent * 0.5:.1f}em}}{escaped(line)}\par"


def _table(table: Table) -> str:
    notes = "".join(rf"\par {escaped(note)}" for note in table.notes)
    if not table.rows and notes:
        return f"\\textbf{{{escaped(table.caption)}}}{notes}\n"
    size, columns, line_count = _layout(table)
    head = " & ".join(rf"\textbf{{{escaped(column.label)}}}" for column in table.columns) + r" \\"
    rows = [
        " & ".join(escaped(_cell(value, column)) for column, value in zip(table.columns, row, strict=True)) + r" \\"
        for row in table.rows
    ]
    notes = f"\\par\\smallskip{{\\footnotesize\\raggedright{notes}\\par}}\n" if notes else ""
    caption = escaped(table.caption)
    if line_count > _LONG:
        lines = [rf"{{{size}\begin{{longtable}}{{{columns}}}", rf"\caption{{{caption}}}\\", r"\toprule", head]
        lines += [r"\midrule", r"\endfirsthead", r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule"]
        lines += [r"\endfoot", *rows, r"\end{longtable}}", notes]
    else:
        lines = [
            r"\begin{table}[H]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"{size}\begin{{tabular}}{{{columns}}}",
        ]
        lines += [r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", notes + r"\end{table}"]
    return "\n".join(lines) + "\n"


def _cell(value: Value, column: Column) -> str:
    """Return a value as a cell shows it, not longer than a page has room for: a code point takes that of 8 letters."""
    text = shown(value, column.kind)
    most = _MOST_LETTERS // (8 if _printed(text) > 2 * len(text) else 1)
    return text if len(text) <= most else f"{text[:most]}…"


def _printed(text: str) -> int:
    """Return how many letters wide a text is where all letters of other scripts are shown as code points."""
    return len(text) if text.isascii() else sum(8 if ord(letter) > 0x2BF else 1 for letter in text)


def _layout(table: Table) -> tuple[str, str, int]:
    """Return the letters' size, the columns' widths, which fill the line and no more, and about how many lines."""
    wanted = [_width(table, place) for place in range(len(table.columns))]
    size = r"\small" if sum(wanted) < 75 else r"\footnotesize" if sum(wanted) < 95 else r"\scriptsize"
    total = max(sum(wanted), 60)
    if sum(wanted) > _WIDE:  # texts give way, numbers cannot
        texts = sum(w for w, c in zip(wanted, table.columns, strict=True) if not c.is_number)
        room = max(_WIDE - (sum(wanted) - texts), texts * 0.25)
        wanted = [w if c.is_number else w * room / texts for w, c in zip(wanted, table.columns, strict=True)]
        total = sum(wanted)
    shares = [each / total for each in wanted]
    lines = 0
    for row in table.rows:
        cells = [_cell(value, column) for value, column in zip(row, table.columns, strict=True)]
        lines += max(math.ceil(_printed(cell) / (share * _WIDE)) for cell, share in zip(cells, shares, strict=True))
    return size, "".join(map(_column, table.columns, shares)), lines


def _width(table: Table, place: int) -> float:
    column = table.columns[place]
    texts = [shown(row[place], column.kind) for row in table.rows]
    longest = max((len(text) for text in texts), default=0)
    word = max(min(len(column.label), 9), *(len(word) for word in column.label.split()))
    return max(word * 1.15, min(longest, 60 if not column.is_number else 14)) + 1.5


def _column(column: Column, share: float) -> str:
    letter = "R" if column.is_number else "L"
    return rf"{letter}{{\dimexpr {share:.4f}\linewidth-2\tabcolsep\relax}}"
