"""A grid as a web page of its own, for reports that show files as a browser does."""

from __future__ import annotations

from html import escape

from buddy.reporting.grid import Cell, Grid
from buddy.reporting.render import DAGGER, MISSING

STYLE = """
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
    title = escape(grid.name.replace("_", " "))
    head = f"<head><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style></head>"
    return f"<!DOCTYPE html>\n<html lang='en'>{head}\n<body>\n{_table(grid)}</body></html>\n"


def _table(grid: Grid) -> str:
    headers = [f"<th class='label'>{escape(name)}</th>" for name in grid.label_headers]
    headers += [f"<th>{escape(name)}</th>" for name in grid.headers]
    lines = [f"<p>{escape(grid.caption)}</p>", "<table>", f"<thead><tr>{''.join(headers)}</tr></thead>", "<tbody>"]
    for row in grid.rows:
        labels = [*row.labels[:-1], row.labels[-1] + (f" {DAGGER}" if row.limited else "")]
        cells = [f"<td class='label'>{escape(label)}</td>" for label in labels]
        cells += [f"<td>{_cell(cell)}</td>" for cell in row.cells]
        lines.append(f"<tr{' class=group' if row.starts_group else ''}>{''.join(cells)}</tr>")
    published = "In parentheses: the figure published in the paper." if grid.has_published else ""
    notes = "".join(
        f"<p><small>{escape(note)}</small></p>\n" for note in [*grid.notes, grid.error_note, published] if note
    )
    return "\n".join([*lines, "</tbody></table>", notes, _table(grid.below) if grid.below else ""])


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    measure, digits = cell.measure, cell.decimals
    text = MISSING if measure.value is None else f"{measure.value:.{digits}f}"
    text = {1: f"<b>{text}</b>", 2: f"<u>{text}</u>"}.get(cell.rank, text)
    if measure.value is not None and measure.stderr is not None:
        text += f" <small>± {measure.stderr:.{digits}f}</small>"
    if cell.published is not None:
        text += f" <small>({cell.published:.{digits}f})</small>"
    return f"<span title='{escape(measure.note, quote=True)}'>{text}</span>" if measure.note else text
