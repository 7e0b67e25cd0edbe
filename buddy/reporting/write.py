"""Put tables and figures in a study's folder, each file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from buddy.reporting import figures, render, tables
from buddy.reporting.compare import compare
from buddy.reporting.grid import Grid
from buddy.reporting.significance import significance
from buddy.reporting.study import Study
from buddy.storage.files import write_bytes


def table(study: Study, name: str) -> list[Path]:
    """Build one table and write it as ``tables/<name>.csv``, ``.md``, ``.tex`` and ``.html``."""
    return _written(study, tables.build(study, name), name)


def comparison(study: Study) -> dict[str, list[Path]]:
    """The study beside the paper (``tables/compare``), and BUDDY against its peers (``tables/significance``)."""
    built = (compare(study), significance(study))
    return {grid.name: _written(study, grid, grid.name) for grid in built}


def _written(study: Study, grid: Grid, stem: str) -> list[Path]:
    texts = {
        "csv": render.to_csv(grid),
        "md": render.to_markdown(grid),
        "tex": render.to_latex(grid),
        "html": render.to_html(grid),
    }
    return [write_bytes(study.folder / "tables" / f"{stem}.{kind}", text.encode()) for kind, text in texts.items()]


def figure(study: Study, name: str) -> list[Path]:
    """Draw one figure and write it as ``figures/<name>.pdf`` and ``.png``."""
    files = figures.build(study, name)
    return [write_bytes(study.folder / "figures" / f"{name}.{kind}", content) for kind, content in files.items()]
