"""A study read whole: every record, run and checkpoint, and what of it is missing, damaged or of other settings.

Planning looks at names, sizes and ends of files. Here everything is opened: files against the list that their job left
(`buddy.study.manifest`), records against their schema and against the path they stand in, runs and checkpoints against the
study's settings. No torch is needed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from buddy.errors import UserError
from buddy.storage import checkpoints
from buddy.storage.digests import differences
from buddy.study import manifest, progress
from buddy.study.config import Config, Run
from buddy.study.records import Record, find
from buddy.study.settings import NOT_OF_PEERS

Kind = Literal["missing", "damaged", "other settings"]

DEPTHS = ("accuracy", "generation", "trace", "breakdown")
"""Kinds whose folders hold a record for each depth of their run, and no other file."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as the study has it.

    Attributes:
        kind: what is wrong with it.
        path: the file or folder.
        what: in words.
        remove: what a repair removes, so that the next start makes it again.
    """

    kind: Kind
    path: Path
    what: str
    remove: tuple[Path, ...] = ()


def study(settings: Config, folder: Path) -> Iterator[Problem]:
    """Everything that is wrong with a study, in the order of its stages.

    Args:
        settings: the study.
        folder: its folder.
    """
    runs = {run.path: run for run in settings.runs()}
    for output in progress.outputs(settings):
        path = folder / output
        if not path.exists():
            yield Problem("missing", path, "not made yet, or removed")
        elif output.startswith(("runs/", "predictors/", "gates/")):
            yield from _run(settings, runs, folder, path)
        elif path.is_dir():
            yield from _records(settings, runs, folder, path)
        elif output.startswith("records/"):
            yield from _record(folder, path, (path,))
        else:
            yield from _json(path)
    for place in ("runs", "predictors", "gates"):
        for kept in sorted((folder / place).rglob(checkpoints.FOLDER)):
            yield from _checkpoints(settings, kept)


def _run(settings: Config, runs: Mapping[str, Run], folder: Path, path: Path) -> Iterator[Problem]:
    """A run: its files as its training left them, its settings as the study has them."""
    place = path.parent
    name = place.relative_to(folder / place.relative_to(folder).parts[0]).as_posix()
    remove = (place, folder / "records" / "training" / f"{name}.json")
    for what in manifest.lacking(place, by_content=True):
        yield Problem("damaged", place, what, remove)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        trained, seed = dict(content["training"]), content["seed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Problem("damaged", path, f"not a run ({error})", remove)
        return
    run = runs.get(name)
    if run is None:
        # Of a predictor nothing more is known here; gates are told only what they read.
        yield from _settings(settings, trained, place, remove) if "gates" in place.relative_to(folder).parts[:1] else ()
        return
    if seed != run.seed:
        yield Problem("other settings", place, f"seed is {seed}, here {run.seed}", remove)
    yield from _settings(settings, trained, place, remove)


def _settings(settings: Config, found: Mapping[str, Any], path: Path, remove: tuple[Path, ...]) -> Iterator[Problem]:
    """Settings of a training against the study's, those that its method reads."""
    unread = {"save_steps", *(() if "/method~buddy/" in path.as_posix() else NOT_OF_PEERS)}
    (backbone,) = re.findall("/backbone~([^/]+)", path.as_posix())[-1:] or [settings.study.backbones[0]]
    wanted = settings.training_of(backbone).model_dump(mode="json", exclude=unread)
    # A run without LoRA has rank 0, and one that learns nothing has no data.
    absent = {"lora_rank": 0, "data": None}
    shared = [name for name in wanted if name in found and found[name] != absent.get(name, found)]
    different = list(differences({name: found[name] for name in shared}, {name: wanted[name] for name in shared}))
    if different:
        yield Problem("other settings", path, "; ".join(different), remove)


def _records(settings: Config, runs: Mapping[str, Run], folder: Path, path: Path) -> Iterator[Problem]:
    """A folder of records: all of them there, each whole and where it belongs."""
    listed = manifest.lacking(path, by_content=True)
    for what in listed:
        yield Problem("missing" if what.endswith("missing") else "damaged", path, what, (path,))
    if listed:
        return
    kind, _, name = path.relative_to(folder / "records").as_posix().partition("/")
    run = runs.get(re.sub(r"/dataset~[^/]+$", "", name))
    if kind in DEPTHS and run is not None:
        for removed in settings.depths(run):
            if not (path / f"removed~{removed}.json").is_file():
                yield Problem("missing", path / f"removed~{removed}.json", "not made yet, or removed", (path,))
    for record in find(path):
        yield from _record(folder, record, (path,), settings)


def _record(folder: Path, path: Path, remove: tuple[Path, ...], settings: Config | None = None) -> Iterator[Problem]:
    """A record against its schema, and against what its path says of it."""
    try:
        record = Record.read(path)
    except UserError as error:
        yield Problem("damaged", path, str(error).removeprefix(f"{path}: "), remove)
        return
    said = dict(part.split("~", 1) for part in path.relative_to(folder).with_suffix("").parts if "~" in part)
    found: dict[str, Any] = {"backbone": record.backbone, "method": record.method, "seed": record.seed}
    if record.kind in DEPTHS and record.budget is not None and path.name.startswith("removed~"):
        said["removed"] = path.stem.removeprefix("removed~")
        found["removed"] = record.budget.removed
    if record.kind in ("importance", "calibration"):
        found.pop("seed")
        found.pop("method")
    wrong = [f"{name} is {value}" for name, value in found.items() if name in said and str(value) != said[name]]
    if wrong:
        yield Problem("damaged", path, f"it is not what its path says: {', '.join(wrong)}", remove)
    if record.kind == "accuracy" and settings is not None:
        wanted = settings.evaluation.model_dump(mode="json", include={"limit", "few_shot", "tasks"})
        measured: dict[str, Any] = {
            name: record.metrics[name] for name in ("limit", "few_shot") if name in record.metrics
        }
        measured["tasks"] = list(record.metrics.get("tasks", {}))
        different = list(differences(measured, {name: wanted[name] for name in measured}))
        if different:
            yield Problem("other settings", path, "; ".join(different), remove)


def _json(path: Path) -> Iterator[Problem]:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        yield Problem("damaged", path, f"not readable ({error})", (path,))


def _checkpoints(settings: Config, folder: Path) -> Iterator[Problem]:
    for path in checkpoints.found_below(folder):
        try:
            made_by = checkpoints.made_by(path)
        except checkpoints.Damaged as error:
            yield Problem("damaged", path, str(error), (path,))
            continue
        if path.parent == folder and "recipe" in made_by:  # of stage 1; those of parts have settings of their own
            yield from _settings(settings, made_by["settings"], path, (path,))


def repair(problems: list[Problem], folder: Path) -> list[Path]:
    """Remove what must be made again.

    Args:
        problems: from `study`.
        folder: the study's; nothing outside it is touched.

    Returns:
        What was removed.
    """
    removed = []
    for path in dict.fromkeys(path for problem in problems for path in problem.remove):
        if not path.exists() or not path.resolve().is_relative_to(folder.resolve()):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed
