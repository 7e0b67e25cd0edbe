"""What a command is given as data: a folder that `buddy data` made, or a text file."""

from __future__ import annotations

import json
from pathlib import Path

from buddy.data.catalogue import PROSE, entry
from buddy.data.rows import Row
from buddy.data.store import PROVENANCE, read
from buddy.data.templates import prompts, text_of
from buddy.errors import UserError


def pairs(folder: str | Path, training: bool = False) -> list[tuple[str, str]]:
    """Prompts and responses of an instruction, dialogue or problem set.

    Args:
        folder: a data set folder.
        training: read the training split, and not the one that measurements read.

    Raises:
        UserError: not a data set folder, or a set without prompts.
    """
    name, rows = _rows(Path(folder), training)
    return prompts(name, rows)


def prose(path: str | Path) -> str:
    """The running text of a prose set's folder, or of a plain text file.

    Raises:
        UserError: neither is there, or the set is not prose.
    """
    path = Path(path)
    if path.is_dir():
        name, rows = _rows(path)
        if "text" not in rows[0]:
            raise UserError(f"{path}: data set {name} is not prose")
        return text_of(rows)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: neither a data set folder (`buddy data`) nor a text file ({error})") from None


def is_prose(folder: str | Path) -> bool:
    """Whether a data set folder holds running text, and no prompts.

    Raises:
        UserError: not a data set folder.
    """
    return entry(name_of(folder)).kind == PROSE


def name_of(folder: str | Path) -> str:
    """The data set that a folder holds, whatever the folder is called.

    Raises:
        UserError: not a data set folder.
    """
    try:
        name: str = json.loads((Path(folder) / PROVENANCE).read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: not a data set (no {PROVENANCE}); make it with `buddy data`") from None
    return name


def _rows(folder: Path, training: bool = False) -> tuple[str, list[Row]]:
    name = name_of(folder)
    data = entry(name)
    return name, read(folder, (training and data.train) or data.evaluation)
