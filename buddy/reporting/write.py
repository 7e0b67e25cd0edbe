"""Put tables and figures in a study's folder, each file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from buddy.reporting import figures, render, tables
from buddy.reporting.study import Study


def table(study: Study, name: str) -> list[Path]:
    """Build one table and write it as ``tables/<name>.csv``, ``.md`` and ``.tex``."""
    grid = tables.build(study, name)
    texts = {"csv": render.to_csv(grid), "md": render.to_markdown(grid), "tex": render.to_latex(grid)}
    stem = name if name.startswith("table") else f"table{name}"
    return [_replace(study.folder / "tables" / f"{stem}.{kind}", text.encode()) for kind, text in texts.items()]


def figure(study: Study, name: str) -> list[Path]:
    """Draw one figure and write it as ``figures/<name>.pdf`` and ``.png``."""
    files = figures.build(study, name)
    return [_replace(study.folder / "figures" / f"{name}.{kind}", content) for kind, content in files.items()]


def _replace(path: Path, content: bytes) -> Path:
    """Write beside the target first, so that a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
