"""What a training starts from: a prior, from `buddy importance`, a peer's choice of blocks, and FiRST's gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from buddy import runs
from buddy.errors import UserError, unknown
from buddy.settings import PRIORS, READ_BY_GATES, First, Training
from buddy.storage.digests import differences
from buddy.storage.files import read_json, sha256
from buddy.study.records import Record
from buddy.study.settings import NOT_OF_GATES


class Prior(NamedTuple):
    """Raw importance of every block, by the indicator of that name, and the digest of its record; "none" without one."""

    indicator: str
    values: tuple[float, ...]
    digests: dict[str, str]


def prior(path: Path | None, backbone: Path) -> Prior:
    """The prior in an importance record.

    Raises:
        UserError: not an importance record, one of another backbone, or an indicator that is no prior.
    """
    if path is None:
        return Prior("none", (), {})
    record = Record.read(path)
    if record.kind != "importance":
        raise UserError(f"--prior: {path} is a record of kind {record.kind}, not importance")
    indicator = record.metrics["indicator"]
    if indicator not in PRIORS[1:]:
        raise unknown(f"--prior: {path}: indicator", indicator, PRIORS[1:])
    runs.check_backbone(backbone, record.digests.get("backbone"), f"--prior: {path}")
    return Prior(indicator, tuple(record.metrics["values"]), {"prior": sha256(path)})


def calibration(method: str, path: Path | None, removed: int, backbone: Path) -> Record | None:
    """The record that a peer's choice of blocks comes from; None for a method that needs none.

    Raises:
        UserError: it is missing, of another kind, method or backbone, or too short.
    """
    if method in ("dense_lora", "first"):
        return None
    if path is None:
        raise UserError(f"--calibration: {method} needs the record of `buddy calibrate --method {method}`")
    record = Record.read(path)
    if record.kind != "calibration" or record.method != method:
        raise UserError(f"--calibration: {path} is a record of kind {record.kind} and method {record.method}")
    runs.check_backbone(backbone, record.digests.get("backbone"), f"--calibration: {path}")
    if removed > (most := record.budget.removed if record.budget else 0):
        raise UserError(f"--removed: {removed} blocks asked for, {path} removes at most {most}")
    return record


TRAINING = "training.json"
"""In a folder of gates: the record of their training. It is no record of the study's: what is shown is a run's."""


class Gates(NamedTuple):
    """File of the gates' weights, the digest of it, and what they cost (``wall_s``, ``gpu_s``), as far as that is known."""

    weights: Path | None
    digests: dict[str, str]
    facts: dict[str, Any]


def gates(method: str, folder: Path | None, backbone: Path, training: Training, first: First, seed: int) -> Gates:
    """FiRST's gates that were trained before.

    Raises:
        UserError: they are given to another method, damaged, of another backbone, or made with other settings.
    """
    if folder is None:
        return Gates(None, {}, {})
    if method != "first":
        raise UserError(f"--gates: {method} has none; they are FiRST's")
    info = runs.RunInfo.read(folder)
    if info.method != "first" or info.policy_settings.get("thresholds"):
        raise UserError(f"--gates: {folder} is a run of {info.method}, not what `buddy gates` makes")
    runs.check(folder, info)
    runs.check_backbone(backbone, info.digests.get("backbone"), f"--gates: {folder}")
    unread = {"data", "save_steps", "logging_steps", *NOT_OF_GATES}
    same = {"seed": seed, **training.model_dump(exclude=unread), "first": _read(first.model_dump())}
    made = {"seed": info.seed, **info.training, "first": _read(info.training.get("first", {}))}
    wrong = list(differences({name: made[name] for name in same if name in made}, same))
    if wrong:
        raise UserError(f"--gates: {folder} was made with other settings ({'; '.join(wrong)}); make it again")
    cost = read_json(folder / TRAINING)
    spent = {name: cost[name] for name in ("wall_s", "gpu_s") if name in cost}
    return Gates(folder / runs.ROUTER_FILE, {"gates": info.digests["router"]}, {"gates": spent} if spent else {})


def _read(section: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name in READ_BY_GATES}
