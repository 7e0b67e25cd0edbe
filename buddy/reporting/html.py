"""A grid as a web page of its own, for reports that show files as a browser does."""

from __future__ import annotations

from html import escape

from buddy.reporting.grid import Cell, Grid
from buddy.reporting.render import Markup, labels, notes

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
        cells = [f"<td class='label'>{escape(label)}</td>" for label in labels(row)]
        cells += [f"<td>{_cell(cell)}</td>" for cell in row.cells]
        lines.append(f"<tr{' class=group' if row.starts_group else ''}>{''.join(cells)}</tr>")
    told = "".join(f"<p><small>{escape(note)}</small></p>\n" for note in notes(grid))
    return "\n".join([*lines, "</tbody></table>", told, _table(grid.below) if grid.below else ""])


def _cell(cell: Cell | None) -> str:
    text = _HTML.cell(cell)
    return f"<span title='{escape(cell.measure.note)}'>{text}</span>" if cell and cell.measure.note else text


_HTML = Markup(escape, {1: "<b>{}</b>", 2: "<u>{}</u>"}, "<small>{}</small>")
