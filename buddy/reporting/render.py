"""A grid as text: tidy CSV, Markdown, LaTeX, and a web page for reports that show files as a browser does."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buddy.reporting.grid import FIGURES, Cell, Grid, Row

MISSING = "\N{EN DASH}"
DAGGER = "†"
NEAR_SIGN = "\N{ALMOST EQUAL TO}"
DOUBT_SIGN = "\N{DOUBLE DAGGER}"
PAGE_ROWS = 48
"""Rows of a LaTeX table that fit on a page under its caption and above its notes."""


@dataclass(frozen=True)
class Markup:
    """How a kind of file writes what a cell shows.

    Attributes:
        escape: text as the file needs it.
        ranks: patterns of the best (1) and the second (2).
        small: pattern of what stands beside the figure: its error and the paper's figure.
    """

    escape: Callable[[str], str]
    ranks: Mapping[int, str]
    small: str = "{}"

    def cell(self, cell: Cell | None, with_error: bool = True, with_published: bool = True) -> str:
        """The text of a cell, or its figure with its mark, its error, whether it is near the best, and the paper's."""
        if cell is None:
            return ""
        if cell.text:
            return self.escape(cell.text)
        measure, digits = cell.measure, cell.decimals
        number = MISSING if measure.value is None else f"{measure.value:.{digits}f}"
        parts = [self.ranks.get(cell.rank, "{}").format(self.escape(number))]
        if with_error and measure.value is not None and measure.stderr is not None:
            parts.append(self.small.format(self.escape(f"± {measure.stderr:.{digits}f}")))
        if cell.doubt:
            parts.append(self.escape(DOUBT_SIGN))
        if cell.near:
            parts.append(self.escape(NEAR_SIGN))
        if with_published and cell.published is not None:
            parts.append(self.small.format(f"({cell.published:.{digits}f})"))
        return " ".join(parts)


def labels(row: Row) -> list[str]:
    """A row's labels, the last with a dagger where a part of a task was measured."""
    return [*row.labels[:-1], row.labels[-1] + (f" {DAGGER}" if row.limited else "")]


def notes(grid: Grid) -> list[str]:
    """The lines under a table that shows errors and the paper's figures."""
    published = "In parentheses: the figure published in the paper." if grid.has_published else ""
    return [note for note in [*grid.notes, grid.error_note, published] if note]


def to_csv(grid: Grid) -> str:
    """One row per cell: coordinates, value, uncertainty, the paper's figure and the difference; full precision."""
    records = grid.records()
    at = list(dict.fromkeys(key for cell in records for key in cell if key not in FIGURES))
    stream = io.StringIO()
    figures = [name for name in FIGURES if not records or any(name in cell for cell in records)]
    writer = csv.DictWriter(stream, [*at, *figures], lineterminator="\n")
    writer.writeheader()
    for cell in records:
        writer.writerow({key: _plain(value) for key, value in cell.items()})
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    # Six decimals keep every item of a task apart and drop the noise of binary fractions.
    return float(f"{value:.6f}") if isinstance(value, float) else value


def to_markdown(grid: Grid) -> str:
    """A GitHub table: value ± standard error, the paper's figure in parentheses; best bold, second underlined."""
    headers = [*grid.label_headers, *grid.headers]
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("|" + ":--|" * len(grid.label_headers) + "--:|" * len(grid.headers))
    for row in grid.rows:
        lines.append("| " + " | ".join([*labels(row), *map(_MARKDOWN.cell, row.cells)]) + " |")
    title = f"**{grid.name.replace('table', 'Table ').replace('_', ' ').capitalize()}.** {grid.caption}"
    told = "".join(f"{note}  \n" for note in notes(grid))
    below = f"\n{to_markdown(grid.below)}" if grid.below else ""
    return f"{title}\n\n" + "\n".join(lines) + f"\n\n{told}{below}"


_MARKDOWN = Markup(str, {1: "**{}**", 2: "<u>{}</u>"})


def to_latex(grid: Grid) -> str:
    r"""Floats that need ``booktabs`` and ``graphicx``; a long table takes several.

    TeX measures each: what is wider than a column goes over both, and what is wider still is scaled to the page.
    """
    pages = _pages(grid.rows)
    parts = [_latex_page(grid, rows, continued=place > 0) for place, rows in enumerate(pages)]
    below = [to_latex(grid.below)] if grid.below else []
    return "\n".join([_PREAMBLE, *parts, *below])


_PREAMBLE = r"""% Needs \usepackage{booktabs} and \usepackage{graphicx}.
\ifdefined\buddytable\else\newsavebox{\buddytable}\fi"""


def _pages(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in pages of at most PAGE_ROWS, cut where groups start (a longer group has a page of its own)."""
    groups: list[list[Row]] = []
    for row in rows:
        if row.starts_group or not groups:
            groups.append([])
        groups[-1].append(row)
    pages: list[list[Row]] = [[]]
    for group in groups:
        if pages[-1] and len(pages[-1]) + len(group) > PAGE_ROWS:
            pages.append([])
        pages[-1] += group
    return pages


def _latex_page(grid: Grid, rows: Sequence[Row], continued: bool) -> str:
    """One float; the first has the label that the text refers to, and the notes."""
    left, columns = len(grid.label_headers), len(grid.headers)
    # Smaller type where there are many columns, before anything is scaled.
    size, space = (r"\scriptsize", 2) if left + columns > 12 or left > 4 else (r"\footnotesize", 3)
    told = " ".join([*grid.notes, *([grid.error_note] if grid.latex_errors else [])])
    caption = escape(grid.caption) + (" (Continued.)" if continued else "")
    label = rf"\label{{tab:{grid.name}}}"
    below = rf"\par\vspace{{2pt}}\parbox{{0.95\linewidth}}{{\footnotesize {escape(told)}}}"
    return "\n".join(
        [
            rf"\sbox{{\buddytable}}{{{size}\setlength{{\tabcolsep}}{{{space}pt}}"
            rf"\begin{{tabular}}{{@{{}}{'l' * left}{'r' * columns}@{{}}}}",
            r"\toprule",
            " & ".join(escape(header) for header in [*grid.label_headers, *grid.headers]) + r" \\",
            r"\midrule",
            *_latex_rows(grid, rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\edef\buddyfloat{\ifdim\wd\buddytable>\columnwidth table*\else table\fi}",
            rf"\begin{{\buddyfloat}}[{'p' if continued else 't'}]",
            rf"\centering{size}",
            rf"\caption{{{caption}}}",
            *([] if continued else [label]),
            r"\ifdim\wd\buddytable>\linewidth\resizebox{\linewidth}{!}{\usebox{\buddytable}}\else\usebox{\buddytable}\fi",
            *([] if continued else [below]),
            r"\end{\buddyfloat}",
            "",
        ]
    )


def _latex_rows(grid: Grid, rows: Sequence[Row]) -> list[str]:
    """Rows with rules between groups, and a little space where a label left of the last one changes."""
    body: list[str] = []
    previous: Row | None = None
    for row in rows:
        if row.starts_group and previous is not None:
            body.append(r"\midrule")
        elif len(row.labels) > 2 and previous is not None and row.labels[:-1] != previous.labels[:-1]:
            body.append(r"\addlinespace[2pt]")
        body.append(_latex_row(grid, row, previous))
        previous = row
    return body


def _latex_row(grid: Grid, row: Row, previous: Row | None) -> str:
    """One row; a label that repeats the row above (with all labels left of it) is left blank."""
    shown = [escape(label) for label in row.labels]
    if previous is not None and not row.starts_group:
        for index in range(len(shown) - 1):
            if row.labels[: index + 1] == previous.labels[: index + 1]:
                shown[index] = ""
    if row.limited:
        shown[-1] += r"$^\dagger$"
    cells = [
        _LATEX.cell(cell, with_error=index in grid.latex_errors, with_published=False)
        for index, cell in enumerate(row.cells)
    ]
    return " & ".join([*shown, *cells]) + r" \\"


_CHARACTERS = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    NEAR_SIGN: r"$\approx$",
    **{
        MISSING: "--",
        "±": r"$\pm$",
        "†": r"$^\dagger$",
        DOUBT_SIGN: r"$^\ddagger$",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
    },
}


def escape(text: str) -> str:
    """Text as LaTeX prints it; a character that plain LaTeX lacks becomes a question mark."""
    return "".join(_CHARACTERS.get(character, character if character.isascii() else "?") for character in text)


_LATEX = Markup(escape, {1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}, r"{{\scriptsize{}}}")


_STYLE = """
body { font-family: system-ui, sans-serif; font-size: 14px; margin: 1.5em; color: #1a1a1a; background: #fff }
table { border-collapse: collapse; margin: 1em 0; border-top: 2px solid; border-bottom: 2px solid }
th { border-bottom: 1px solid; text-align: right; vertical-align: bottom }
th, td { padding: 0.25em 0.7em }
td { text-align: right; font-variant-numeric: tabular-nums }
th.label, td.label { text-align: left }
tr.group td { border-top: 1px solid #999 }
small { color: #666 }
"""


def to_html(grid: Grid) -> str:
    """A page that needs no other file: best bold, second underlined, the paper's figure and ± in small print."""
    title = html.escape(grid.name.replace("_", " "))
    head = f"<head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style></head>"
    return f"<!DOCTYPE html>\n<html lang='en'>{head}\n<body>\n{_html_table(grid)}</body></html>\n"


def _html_table(grid: Grid) -> str:
    headers = [f"<th class='label'>{html.escape(name)}</th>" for name in grid.label_headers]
    headers += [f"<th>{html.escape(name)}</th>" for name in grid.headers]
    lines = [f"<p>{html.escape(grid.caption)}</p>", "<table>", f"<thead><tr>{''.join(headers)}</tr></thead>", "<tbody>"]
    for row in grid.rows:
        cells = [f"<td class='label'>{html.escape(label)}</td>" for label in labels(row)]
        cells += [f"<td>{_html_cell(cell)}</td>" for cell in row.cells]
        lines.append(f"<tr{' class=group' if row.starts_group else ''}>{''.join(cells)}</tr>")
    told = "".join(f"<p><small>{html.escape(note)}</small></p>\n" for note in notes(grid))
    return "\n".join([*lines, "</tbody></table>", told, _html_table(grid.below) if grid.below else ""])


def _html_cell(cell: Cell | None) -> str:
    text = _HTML.cell(cell)
    return f"<span title='{html.escape(cell.measure.note)}'>{text}</span>" if cell and cell.measure.note else text


_HTML = Markup(html.escape, {1: "<b>{}</b>", 2: "<u>{}</u>"}, "<small>{}</small>")
