"""One writer at a time: who writes into a folder holds a lock beside it, and whoever comes second is refused.

A scheduler that lost track of a job starts it again while the first one still works; two trainings in one folder would
destroy each other's checkpoints. The lock of ``runs/NAME`` is ``runs/.NAME.lock`` and names its process. That of a
process which is gone (killed, out of memory, power lost) is removed with a line.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from buddy.errors import UserError
from buddy.storage import processes
from buddy.storage.files import check_writable
from buddy.storage.processes import Process

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""A lock without a legible owner that is younger is being written."""


@contextmanager
def held(*outputs: str | Path | None) -> Iterator[None]:
    """Keep everybody else from writing these files and folders meanwhile.

    Args:
        outputs: files or folders, which need not exist; None is nothing.

    Raises:
        UserError: somebody writes one of them, which names the process, or it cannot be written.
    """
    with ExitStack() as stack:
        for output in outputs:
            if output is not None:
                stack.enter_context(_held(Path(os.path.abspath(output))))
        yield


def lock_of(output: Path) -> Path:
    """The lock file of a file or folder."""
    return output.parent / f".{output.name}.lock"


def owners(folder: Path) -> dict[Path, Process]:
    """Locks below a folder whose processes still run."""
    found = {path: processes.read(path) for path in folder.rglob(".*.lock")}
    return {path: owner for path, owner in found.items() if owner is not None and owner.alive}


@contextmanager
def _held(output: Path) -> Iterator[None]:
    lock, me = lock_of(output), Process.this()
    check_writable(lock.parent, str(output))
    lock.parent.mkdir(parents=True, exist_ok=True)
    while not _taken(lock, me):
        owner = processes.read(lock)
        if owner is None and _age(lock) < GRACE_S:
            time.sleep(0.1)
        elif owner is not None and owner.alive:
            raise UserError(
                f"{output}: is being written by {owner}; wait until it has ended, or end it "
                f"(if it is long gone, remove {lock})"
            )
        else:
            logger.warning("%s: left by %s, which is gone: removed", lock, owner or "nobody who could be read")
            _remove(lock, owner)
    try:
        yield
    finally:
        if processes.read(lock) == me:
            lock.unlink(missing_ok=True)


def _taken(lock: Path, me: Process) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        json.dump(me.content(), stream)
    return True


def _remove(lock: Path, owner: Process | None) -> None:
    """Remove a lock that was left behind, but not the one that somebody else has put in its place meanwhile."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    try:
        os.rename(lock, aside)
        if processes.read(aside) != owner:
            os.rename(aside, lock)
    except FileNotFoundError:
        return
    aside.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Seconds since a file was written; none for one that is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
