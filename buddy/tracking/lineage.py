"""What a job reads and makes, as W&B artifacts: table ← records ← run ← backbone.

A study's paths say what lies there, so a path is all that a job has to name. Weights stay where they are: of a backbone
and of a run the artifact holds the JSON file that describes it, and the names and sizes of its weight files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.storage.digests import digest
from buddy.storage.files import read_json
from buddy.study import manifest, records

ROOMS = {
    "backbones": "backbone",
    "data": "data",
    "runs": "run",
    "predictors": "predictor",
    "records": "records",
    "tables": "table",
    "figures": "figure",
}
"""Folders of a study, and the artifact type of what lies there."""

DESCRIPTIONS = {"backbone": "backbone.json", "data": "data.json", "run": "run.json", "predictor": "run.json"}
WEIGHTS = (".safetensors", ".bin", ".pt")
LONGEST_NAME = 128


@dataclass(frozen=True)
class Thing:
    """Something of a study that a job reads or makes.

    Attributes:
        study: the study.
        kind: artifact type, a value of ``ROOMS``.
        path: below the study's folder; a table or figure without its ending.
        place: the path on this machine.
    """

    study: str
    kind: str
    path: str
    place: Path

    @property
    def name(self) -> str:
        """The artifact's name: readable, and by its last eight digits no other's."""
        values = "-".join(part.rpartition("~")[2] for part in self.path.split("/")[1:])
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.study}-{self.kind}-{values.removesuffix('.json')}")
        return f"{readable[: LONGEST_NAME - 9]}-{digest(self.study, self.path)[:8]}"

    def files(self) -> dict[str, Path]:
        """Name in the artifact and file of all that it holds; {} where nothing is there."""
        if self.kind in DESCRIPTIONS:
            file = self.place / DESCRIPTIONS[self.kind]
            return {file.name: file} if file.is_file() else {}
        if self.kind in ("table", "figure"):
            return {file.name: file for file in sorted(self.place.parent.glob(f"{self.place.name}.*"))}
        if self.place.is_file():
            return {self.place.name: self.place}
        return {file.relative_to(self.place).as_posix(): file for file in records.find(self.place)}

    def metadata(self) -> dict[str, Any]:
        """Where it lies, what describes it, and which weight files (name: bytes) stay there."""
        found: dict[str, Any] = {"study": self.study, "path": self.path}
        if self.kind not in DESCRIPTIONS:
            return found
        if not (description := read_json(self.place / DESCRIPTIONS[self.kind])):
            return found
        found["description"] = description
        weights = [file for file in sorted(self.place.rglob("*")) if file.suffix in WEIGHTS]
        found["weights"] = {file.relative_to(self.place).as_posix(): file.stat().st_size for file in weights}
        return found


def things(paths: Iterable[str | Path], study: str) -> list[Thing]:
    """What lies at these paths, once each; paths outside the study's folder have no place in its lineage."""
    found = [thing(path, study) for path in paths]
    return list(dict.fromkeys(one for one in found if one is not None))


def thing(path: str | Path, study: str) -> Thing | None:
    """What a path of a study is; None for a path outside the study's folder."""
    path = Path(path).absolute()
    parts = path.parts
    for place in range(len(parts) - 2, 0, -1):
        if parts[place - 1] == study and parts[place] in ROOMS:
            kind = ROOMS[parts[place]]
            if kind in DESCRIPTIONS and path.name == DESCRIPTIONS[kind]:
                path = path.parent
            elif kind in ("table", "figure"):
                path = path.with_suffix("")
            elif kind == "records":
                path = _made_together(path, len(parts) - place - 1)
            return Thing(study, kind, "/".join(path.parts[place:]), path)
    return None


def _made_together(path: Path, levels: int) -> Path:
    """The folder that a job has made with a record in it, or the record itself, where it is all that its job has made.

    A finished job lists what it has left (`buddy.study.manifest`); of records without a list nobody knows.
    """
    for folder in path.parents[: levels - 1]:
        if (folder / manifest.NAME).is_file():
            return folder
    return path
