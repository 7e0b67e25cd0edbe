"""Where a study is, for commands that take ``--study``."""

from __future__ import annotations

from pathlib import Path

from buddy.errors import UserError, choices


def study_folder(study: str, results: Path) -> Path:
    """The folder of a study given by folder or by name.

    Raises:
        UserError: there is none; names those that are there.
    """
    folder = Path(study) if (Path(study) / "study.json").is_file() or "/" in study else results / study
    if not folder.is_dir():
        others = sorted(path.parent.name for path in folder.parent.glob("*/study.json"))
        hint = f"studies in {folder.parent}: {choices(others)}" if others else f"{folder.parent} holds no study"
        raise UserError(f"--study: {folder} not found; {hint}")
    return folder
