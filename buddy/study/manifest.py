"""What a finished job left in a folder: every file with its size and SHA-256, in ``.files.json`` beside them.

A job's records, or a run, are one result: where a file of it is deleted, cut short or changed by hand, the rest does not
say so. With the list, planning a study sees at a glance (by size) what has to be made again, and `buddy check` by
content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from buddy.storage import checkpoints
from buddy.storage.files import sha256, write_json

NAME = ".files.json"


LISTED_ELSEWHERE = ("backbone.json", "data.json", "encoder.json")
"""Their folders' files, gigabytes some of them, have their SHA-256 there."""


def write(folder: Path) -> None:
    """List the files of a finished folder of records, or of a run; anything else is left alone."""
    if not folder.is_dir() or any((folder / name).exists() for name in LISTED_ELSEWHERE):
        return
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in _files(folder)
    }
    write_json(folder / NAME, files)


def remove(folder: Path) -> None:
    """Remove the list of a folder whose files are about to change."""
    if folder.is_dir():
        (folder / NAME).unlink(missing_ok=True)


def lacking(folder: Path, by_content: bool = False) -> list[str]:
    """What is wrong with a folder since its job has ended, a phrase per file; nothing where it has no list.

    Args:
        folder: of one job.
        by_content: read every file, instead of looking at its size.
    """
    path = folder / NAME
    if not path.is_file():
        return []
    try:
        listed = {name: (entry["bytes"], entry["sha256"]) for name, entry in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return [f"{NAME} is damaged"]
    return [
        f"{name} is {problem}"
        for name, (size, content) in listed.items()
        if (problem := _problem(folder / name, size, content if by_content else None))
    ]


def cut_short(path: Path) -> bool:
    """Whether a JSON file that `buddy.study.records.write_json` wrote has lost its end; looks at its last bytes alone."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 16))
        end = stream.read().rstrip()
    # Inner braces are indented, so a line that is one brace is the last; an object without keys is one line.
    return not (end.endswith((b"\n}", b"\n]")) or end in (b"{}", b"[]"))


def _problem(path: Path, size: int, content: str | None) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != size:
        return "cut short or changed"
    return "changed" if content is not None and sha256(path) != content else None


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.name.startswith(".") and name.parts[0] != checkpoints.FOLDER:
            yield name.as_posix()
