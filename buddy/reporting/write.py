"""Put tables and figures in a study's folder, each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from buddy.records import write_bytes
from buddy.reporting import figures, render, tables
from buddy.reporting.study import Study


def table(study: Study, name: str) -> list[Path]:
    """Build one table and write it as ``tables/<name>.csv``, ``.md`` and ``.tex``."""
    grid = tables.build(study, name)
    texts = {"csv": render.to_csv(grid), "md": render.to_markdown(grid), "tex": render.to_latex(grid)}
    stem = name if name.startswith("table") else f"table{name}"
    return [write_bytes(study.folder / "tables" / f"{stem}.{kind}", text.encode()) for kind, text in texts.items()]


def figure(study: Study, name: str) -> list[Path]:
    """Draw one figure and write it as ``figures/<name>.pdf`` and ``.png``."""
    files = figures.build(study, name)
    return [write_bytes(study.folder / "figures" / f"{name}.{kind}", content) for kind, content in files.items()]
