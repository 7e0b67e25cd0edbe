"""A grid as text: tidy CSV, Markdown, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from buddy.reporting.grid import FIGURES, Cell, Grid, Row

MISSING = "\N{EN DASH}"
DAGGER = "†"
NEAR_SIGN = "\N{ALMOST EQUAL TO}"
PAGE_ROWS = 48
"""Rows of a LaTeX table that fit on a page under its caption and above its notes."""


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
        labels = [*row.labels[:-1], row.labels[-1] + (f" {DAGGER}" if row.limited else "")]
        lines.append("| " + " | ".join([*labels, *(_markdown_cell(cell) for cell in row.cells)]) + " |")
    title = f"**{grid.name.replace('table', 'Table ').replace('_', ' ').capitalize()}.** {grid.caption}"
    published = "In parentheses: the figure published in the paper." if grid.has_published else ""
    notes = "".join(f"{note}  \n" for note in [*grid.notes, grid.error_note, published] if note)
    below = f"\n{to_markdown(grid.below)}" if grid.below else ""
    return f"{title}\n\n" + "\n".join(lines) + f"\n\n{notes}{below}"


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if cell.text:
        return cell.text
    text = _number(cell.measure.value, cell.decimals)
    text = {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(cell.rank, text)
    if cell.measure.value is not None and cell.measure.stderr is not None:
        text += f" ± {cell.measure.stderr:.{cell.decimals}f}"
    if cell.near:
        text += f" {NEAR_SIGN}"
    if cell.published is not None:
        text += f" ({cell.published:.{cell.decimals}f})"
    return text


def _number(value: float | None, decimals: int) -> str:
    return MISSING if value is None else f"{value:.{decimals}f}"


def to_latex(grid: Grid) -> str:
    r"""``table`` environments that need ``\usepackage{booktabs}`` and nothing else; a long table takes several."""
    pages = _pages(grid.rows)
    parts = [_latex_page(grid, rows, continued=place > 0) for place, rows in enumerate(pages)]
    below = [to_latex(grid.below)] if grid.below else []
    return "\n".join([r"% Needs \usepackage{booktabs}.", *parts, *below])


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
    """One ``table`` environment; the first has the label that the text refers to, and the notes."""
    labels, columns = len(grid.label_headers), len(grid.headers)
    # The widest table has five labels and eleven figures a row: smaller type keeps it on the paper.
    size, space = (r"\scriptsize", 2) if labels + columns > 12 or labels > 4 else (r"\footnotesize", 3)
    environment = "table*" if columns > 6 else "table"
    notes = " ".join([*grid.notes, *([grid.error_note] if grid.latex_errors else [])])
    caption = escape(grid.caption) + (" (Continued.)" if continued else "")
    label = rf"\label{{tab:{grid.name}}}"
    below = rf"\par\vspace{{2pt}}\parbox{{0.95\linewidth}}{{\footnotesize {escape(notes)}}}"
    return "\n".join(
        [
            rf"\begin{{{environment}}}[{'p' if continued else 't'}]",
            rf"\centering{size}\setlength{{\tabcolsep}}{{{space}pt}}",
            rf"\caption{{{caption}}}",
            *([] if continued else [label]),
            # The box centres a table that is wider than the text, instead of letting it run off to the right.
            rf"\makebox[\linewidth]{{\begin{{tabular}}{{@{{}}{'l' * labels}{'r' * columns}@{{}}}}",
            r"\toprule",
            " & ".join(escape(header) for header in [*grid.label_headers, *grid.headers]) + r" \\",
            r"\midrule",
            *_latex_rows(grid, rows),
            r"\bottomrule",
            r"\end{tabular}}",
            *([] if continued else [below]),
            rf"\end{{{environment}}}",
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
    labels = [escape(label) for label in row.labels]
    if previous is not None and not row.starts_group:
        for index in range(len(labels) - 1):
            if row.labels[: index + 1] == previous.labels[: index + 1]:
                labels[index] = ""
    if row.limited:
        labels[-1] += r"$^\dagger$"
    cells = [_latex_cell(cell, index in grid.latex_errors) for index, cell in enumerate(row.cells)]
    return " & ".join([*labels, *cells]) + r" \\"


def _latex_cell(cell: Cell | None, with_error: bool) -> str:
    if cell is None:
        return ""
    if cell.text:
        return escape(cell.text)
    text = escape(_number(cell.measure.value, cell.decimals))
    text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(cell.rank, text)
    if with_error and cell.measure.value is not None and cell.measure.stderr is not None:
        text += rf" {{\scriptsize$\pm$ {cell.measure.stderr:.{cell.decimals}f}}}"
    if cell.near:
        text += f" {escape(NEAR_SIGN)}"
    return text


_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    NEAR_SIGN: r"$\approx$",
    **{MISSING: "--", "±": r"$\pm$", "†": r"$^\dagger$", "<": r"\textless{}", ">": r"\textgreater{}"},
}


def escape(text: str) -> str:
    """Text as LaTeX prints it; a character that plain LaTeX lacks becomes a question mark."""
    return "".join(_LATEX.get(character, character if character.isascii() else "?") for character in text)
