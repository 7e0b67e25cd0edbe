"""A folder that is whole or absent: written beside its target, renamed when finished."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from buddy.errors import UserError


@contextmanager
def fresh(out: str | Path, ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Yield an empty sibling of ``out`` that takes its place on success and vanishes on failure.

    Args:
        out: the folder to make; one of our own making is replaced, and so is an empty one.
        ours: tells a folder that this command made, and may replace, from a folder of the user's.
        what: what the folder holds, for the message.

    Raises:
        UserError: ``out`` is a file, or holds something else.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not ours(out):
        raise UserError(f"--out {out}: holds other files than {what}; name a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        _replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``; a folder cannot be renamed over one that holds files."""
    if not out.exists():
        os.rename(new, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old-"))
    try:
        os.rename(out, old / out.name)
        os.rename(new, out)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
