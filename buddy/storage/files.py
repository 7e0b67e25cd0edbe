"""Files written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from buddy.errors import UserError


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that files cannot be written into or that cannot be made, before hours of work.

    Raises:
        UserError: it cannot; names ``what``, and the place that is in the way.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UserError(f"{what}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{what}: {there} is not writable")


def write_json(path: str | Path, content: Any) -> Path:
    """Write JSON atomically; NaN and infinities, which JSON does not know, are refused."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return write_bytes(path, f"{text}\n".encode())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write a file beside its target first and rename it, so that a killed job leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(temporary, permitted(0o666))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def permitted(mode: int) -> int:
    """What of these permissions the user's umask leaves: temporary files and folders are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    return mode & ~umask


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
