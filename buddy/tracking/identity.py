"""Whose run it is: a study is known by an id in its folder, so two people's ``demo`` in one project are two."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from buddy.storage.digests import digest

STUDY_ID = "study_id"
"""File in a study's folder. A copy of the folder is the same study."""


def study_id(folder: Path) -> str:
    """The id that a folder has, or gets here; jobs that begin at the same time agree.

    Args:
        folder: the study's.

    Raises:
        OSError: there is none, and it cannot be written.
    """
    file = folder / STUDY_ID
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / f".{STUDY_ID}.{os.getpid()}.{secrets.token_hex(4)}"
        own.write_text(f"{secrets.token_hex(6)}\n", encoding="utf-8")
        try:
            os.link(own, file)  # whole, and the first one's
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(own, file)
        finally:
            own.unlink(missing_ok=True)
    return file.read_text(encoding="utf-8").strip()


def run_id(of: str, stage: str, run_path: str) -> str:
    """The id of a job's W&B run, the same for every attempt at it.

    Args:
        of: the study's id.
        stage, run_path: what the job makes.
    """
    return digest(of, stage, run_path)


def next_id(run: str) -> str:
    """The id that a run goes on under whose own was deleted on the server, where it is refused for ever."""
    return digest(run, "deleted")
