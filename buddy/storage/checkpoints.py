"""What a killed job goes on from: files below its run's folder that say what made them, and that they are whole.

A training that went on from somebody else's checkpoint would be wrong without a word, and one that cannot get past a
half-written checkpoint would never end. So everything that is kept carries what made it (settings, data, prior,
backbone, seed, method) and the SHA-256 of its content. What another making left is set aside, with a line that says in
what they differ; what is damaged is passed over, and the one before it is taken. All of it goes when the run is
complete. No torch is imported here: `buddy check` reads checkpoints, too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.storage.digests import differences, digest
from buddy.storage.files import sha256, write_bytes, write_json

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
"""Below a run's folder: what its making keeps until the run is complete."""

SEAL = "seal.json"
"""In a checkpoint that is a folder of its own: what made it, and the SHA-256 of its other files."""

KEPT = 2
"""Checkpoints of a series that are kept: where the last one is damaged, the one before it serves."""


class Damaged(Exception):
    """A checkpoint that is not whole: cut short, half-written, or of an older format."""


@dataclass(frozen=True)
class Checkpoints:
    """The place where one computation keeps what it has done.

    Attributes:
        folder: where; it need not exist.
        made_by: everything that the result depends on, as JSON-able values; long ones as digests.
    """

    folder: Path
    made_by: Mapping[str, Any]

    # ---- single files -------------------------------------------------------------------------------------------------

    def write(self, name: str, content: bytes) -> None:
        """Keep a file, whole or not at all."""
        seal = {"made_by": self._made_by, "sha256": hashlib.sha256(content).hexdigest()}
        write_bytes(self.folder / name, json.dumps(seal).encode() + b"\n" + content)

    def read(self, name: str) -> bytes | None:
        """What `write` kept under this name; None where there is nothing of this making that is whole."""
        path = self.folder / name
        return contents(path)[1] if path.is_file() and self._ours(path) else None

    # ---- a series of files, one per step ------------------------------------------------------------------------------

    def write_step(self, step: int, content: bytes) -> None:
        """Keep the state at a step, and of the steps before it the last."""
        self.write(f"step-{step:08d}", content)
        for old in self._series("step-*")[KEPT:]:
            old.unlink()

    def last_step(self) -> bytes | None:
        """The state at the last step that is whole and of this making; None where there is none."""
        found = self._last("step-*")
        return contents(found)[1] if found else None

    # ---- folders that somebody else writes (transformers' Trainer: checkpoint-N) --------------------------------------

    def seal(self, checkpoint: Path) -> None:
        """Say of a finished checkpoint what made it, and what its files hold."""
        write_json(checkpoint / SEAL, {"made_by": self._made_by, "files": dict(_digests(checkpoint))})

    def last(self) -> Path | None:
        """The last checkpoint folder that is whole and of this making; None where there is none."""
        return self._last("checkpoint-*")

    # ---- what is ours and whole ---------------------------------------------------------------------------------------

    def _last(self, pattern: str) -> Path | None:
        return next(filter(self._ours, self._series(pattern)), None)

    def _series(self, pattern: str) -> list[Path]:
        """Checkpoints by their number, the last first."""
        return sorted(self.folder.glob(pattern), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)

    def _ours(self, path: Path) -> bool:
        """Whether a checkpoint may be gone on from; one that may not is out of the way afterwards."""
        try:
            found = made_by(path)
        except Damaged as error:
            logger.warning("%s: passed over and removed: %s", path, error)
            _remove(path)
            return False
        if found == self._made_by:
            return True
        aside = self.folder / f"aside-{digest(found)}" / path.name
        logger.warning(
            "%s: not of this making (%s): set aside as %s", path, "; ".join(differences(found, self._made_by)), aside
        )
        aside.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        os.replace(path, aside)
        return False

    @property
    def _made_by(self) -> dict[str, Any]:
        """As JSON gives it back: lists for tuples, text for keys."""
        return json.loads(json.dumps(self.made_by))


def made_by(path: Path) -> dict[str, Any]:
    """What made a checkpoint, once it has been read whole.

    Args:
        path: a file or a folder that `Checkpoints` keeps.

    Raises:
        Damaged: it is not whole; says in what.
    """
    if path.is_file():
        return contents(path)[0]["made_by"]
    try:
        seal = json.loads((path / SEAL).read_text(encoding="utf-8"))
        expected, made = dict(seal["files"]), dict(seal["made_by"])
    except OSError:
        raise Damaged(f"it was cut off before it was finished (no {SEAL})") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{SEAL} is damaged") from None
    found = dict(_digests(path))
    for name, value in expected.items():
        if found.get(name) != value:
            raise Damaged(f"{name} is {'damaged' if name in found else 'missing'}")
    return made


def contents(path: Path) -> tuple[dict[str, Any], bytes]:
    """The seal and the content of a single file.

    Raises:
        Damaged: it is not whole.
    """
    head, _, content = path.read_bytes().partition(b"\n")
    try:
        seal = json.loads(head)
        whole = seal["sha256"] == hashlib.sha256(content).hexdigest() and isinstance(seal["made_by"], dict)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Damaged("it is cut short or damaged")
    return seal, content


def found_below(folder: Path) -> Iterator[Path]:
    """Every checkpoint below a folder, what was set aside left out."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith((".", "aside-")):
            continue
        if path.is_file() or path.name.startswith("checkpoint-"):
            yield path
        else:
            yield from found_below(path)


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            yield path.relative_to(folder).as_posix(), sha256(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
