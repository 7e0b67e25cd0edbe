"""Where the records of a study lie: in its own folder, or in one that was measured elsewhere (``study.records``)."""

from __future__ import annotations

from pathlib import Path

from buddy.errors import UserError, choices
from buddy.study.config import Config
from buddy.study.records import KINDS


def records_folder(config: Config, folder: str | Path, origin: str) -> Path:
    """The folder of records that a study's tables and figures are built from.

    Args:
        config: the study.
        folder: ``results/<study>``; its ``records/`` is the answer unless the study names other records.
        origin: file or files that the settings came from, for the message.

    Raises:
        UserError: ``study.records`` names a folder without records; it is taken from the working directory.
    """
    given = config.study.records
    if given is None:
        return Path(folder) / "records"
    if _holds_records(Path(given)):
        return Path(given)
    wrong = "holds no records" if Path(given).is_dir() else f"no such folder in {Path.cwd()}"
    below = Path(given) / "records"
    hint = f"did you mean {below}?" if _holds_records(below) else f"expected a folder that holds {choices(KINDS)}"
    raise UserError(f"{origin}: study.records: {given}: {wrong}; {hint}")


def _holds_records(folder: Path) -> bool:
    return any((folder / kind).is_dir() for kind in KINDS)
