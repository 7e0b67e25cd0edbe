"""What a command is given as data: a folder that `buddy data` made, or a text file."""

from __future__ import annotations

from pathlib import Path

from buddy.data.catalogue import PROSE, entry
from buddy.data.rows import Row
from buddy.data.sources import PROVENANCE, described
from buddy.data.store import read
from buddy.data.templates import Example, examples, questions, text_of
from buddy.errors import UserError


def prompts(folder: str | Path) -> list[str]:
    """Prompts of an instruction, dialogue or problem set, of the split that measurements read; it needs no responses.

    Args:
        folder: a data set folder.

    Raises:
        UserError: not a data set folder, or a set without prompts.
    """
    return questions(*_rows(Path(folder)))


def pairs(folder: str | Path) -> list[tuple[str, str]]:
    """Prompts and responses of the split that measurements read.

    Args:
        folder: a data set folder.

    Raises:
        UserError: not a data set folder, or a set without prompts or without responses.
    """
    return [(one.prompt, one.response) for one in examples(*_rows(Path(folder)))]


def training(folder: str | Path) -> list[Example]:
    """Prompts and responses to train on.

    Args:
        folder: a data set folder.

    Raises:
        UserError: not a data set folder, or a set without prompts or without responses.
    """
    return examples(*_rows(Path(folder), training=True))


def answered_by(folder: str | Path) -> str | None:
    """Name of the backbone that answered a data set's prompts; None where the responses are the set's own."""
    answers = described(Path(folder)).get("answers")
    return str(answers["by"]) if answers else None


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
    name = described(Path(folder)).get("name")
    if name is None:
        raise UserError(f"{folder}: not a data set (no {PROVENANCE}); make it with `buddy data`")
    return str(name)


def _rows(folder: Path, training: bool = False) -> tuple[str, list[Row]]:
    name = name_of(folder)
    data = entry(name)
    return name, read(folder, (training and data.train) or data.evaluation)
