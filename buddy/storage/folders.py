"""Folders that commands write into: never one of the user's own, and whole or absent where they are made at once.

Every folder that a command makes carries a mark, the file ``.buddy.json``: what the folder holds, and which files were
put there. A command writes into a folder that is absent, empty, or carries the mark of the same kind; whatever else it
finds is the user's and stays as it is. The mark is a file of its own because Snakemake deletes a rule's outputs
(``backbone.json``, ``run.json``) before it runs the rule again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from buddy.errors import UserError
from buddy.storage.files import check_writable, permitted, write_json

MARK = ".buddy.json"


def _never(folder: Path) -> bool:
    return False


def claim(out: str | Path, holds: str, unmarked: Callable[[Path], bool] = _never) -> Path:
    """Make sure that a command may write into a folder, and touch nothing.

    Args:
        out: the folder.
        holds: what the command puts there, such as "a backbone"; a folder marked as anything else is not taken.
        unmarked: tells a folder of that kind that was made before there were marks.

    Returns:
        The folder, absolute, links in it as they are.

    Raises:
        UserError: it is a file, cannot be read or written, or holds what no command of this kind has made.
    """
    folder = Path(os.path.abspath(out))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    try:
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"--out {out}: cannot be read ({error.strerror})") from None
    if found and (MARK in found or not unmarked(folder)):
        foreign = _foreign(folder, holds, found)
        if foreign:
            shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise UserError(
                f"--out {out}: holds other files than {holds} that buddy made ({shown}); nothing was touched: "
                "name a new or empty folder"
            )
    check_writable(folder, f"--out {out}")
    if folder.exists():  # it is replaced through its parent
        check_writable(folder.parent, f"--out {out}")
    return folder


def mark(folder: Path, holds: str, files: Iterable[str] | None = None) -> None:
    """Mark a folder as made by a command.

    Args:
        folder: it must exist.
        holds: as for `claim`.
        files: names of all that was put there, where a later command replaces the folder as a whole.
    """
    write_json(folder / MARK, {"holds": holds, **({} if files is None else {"files": sorted(files)})})


@contextmanager
def fresh(
    out: str | Path,
    holds: str,
    unmarked: Callable[[Path], bool] = _never,
    keeps: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield an empty sibling of ``out`` that takes its place, marked, on success and vanishes on failure.

    Args:
        out, holds, unmarked: as for `claim`.
        keeps: tells what of the old folder moves into the new one; None replaces it as a whole.

    Raises:
        UserError: as `claim`.
    """
    out = claim(out, holds, unmarked)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        yield partial
        mark(partial, holds, None if keeps else [entry.name for entry in partial.iterdir()])
        partial.chmod(permitted(0o777))
        claim(out, holds, unmarked)  # making it may have taken hours
        for entry in filter(keeps, out.iterdir()) if keeps and out.exists() else ():
            entry.rename(partial / entry.name)
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _foreign(folder: Path, holds: str, found: list[str]) -> list[str]:
    """Of the names in a folder those that no command of this kind has put there; all of them without its mark."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        ours = content["holds"] == holds
        files = content.get("files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found
    if not ours:
        return found
    return [] if files is None else [name for name in found if name not in (*files, MARK)]


def _replace(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``; a folder cannot be renamed over one that holds files."""
    if not out.exists():
        os.rename(new, out)
        return
    aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    os.rename(out, aside / out.name)
    try:
        os.rename(new, out)
    except OSError:
        os.rename(aside / out.name, out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
