"""Records that a training starts from: a prior, from `buddy importance`, and a peer's choice of blocks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from buddy import runs
from buddy.errors import UserError, unknown
from buddy.settings import PRIORS
from buddy.storage.files import sha256
from buddy.study.records import Record


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
