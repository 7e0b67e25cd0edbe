"""What every training leaves: a run folder, a training record, and no checkpoints."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from buddy.routing.policy import Policy
    from buddy.runs import RunInfo
    from buddy.tracking import Tracker
    from buddy.training.sft import Trained

logger = logging.getLogger(__name__)


def keep(
    out: Path,
    info: RunInfo,
    policy: Policy,
    result: Trained,
    examples: int,
    record: Path | None,
    tracker: Tracker,
    provenance: dict[str, Any],
    facts: dict[str, Any] | None = None,
) -> None:
    """Save a trained run and its record; its checkpoints have done their work.

    Args:
        out: run folder.
        info: its ``run.json``.
        policy: with its final state.
        result: outcome of the training.
        examples: number of examples it was trained on.
        record: training record to write, if any.
        tracker: its W&B run, for the summary.
        provenance: environment, commit and seconds (`buddy.commands._common.provenance`).
        facts: further metrics of the record.
    """
    from buddy import backbones, runs
    from buddy.storage import checkpoints
    from buddy.study.records import Budget, Record

    info.probes = _paths(result.probes)
    info.backbone_source = backbones.portable(info.backbone_folder(out))
    runs.save(out, info, policy, result.adapted)
    metrics: dict[str, Any] = {
        "steps": result.steps,
        "epochs": info.training.get("epochs", 0) if result.steps else 0,
        "examples": examples,
        "tokens": result.tokens,
        "objective": info.training.get("loss") if result.steps else None,
        "final_loss": result.curve[-1]["loss"] if result.curve else None,
        "curve": result.curve,
        **({"probes": result.probes} if result.probes else {}),
        "trainable_parameters": result.trainable,
        "router_parameters": sum(p.numel() for p in policy.parameters()),
        **(facts or {}),
    }
    removed = info.variant.get("removed")
    if record is not None:
        Record(
            kind="training",
            study=info.study,
            backbone=info.backbone,
            method=info.method,
            metrics=metrics,
            n=examples,
            variant=info.variant,
            seed=info.seed,
            budget=Budget.of(policy.blocks - removed, policy.blocks) if removed is not None else None,
            digests=runs.RunInfo.read(out).digests,
            **provenance,
        ).write(record)
    shutil.rmtree(
        out / checkpoints.FOLDER, ignore_errors=True
    )  # last: a job killed before this line trains nothing anew
    tracker.summary({key: value for key, value in metrics.items() if isinstance(value, int | float | str)})


def told_of(data: Path) -> dict[str, Any]:
    """What ``run.json`` says of the data that a run was trained on."""
    from buddy.data import inputs

    answered_by = inputs.answered_by(data)
    return {"data": data.name, **({} if answered_by is None else {"answered_by": answered_by})}


def _paths(probes: dict[str, Any]) -> dict[str, int]:
    """What ``run.json`` says of a router's paths; a router that takes one for every prompt is told of."""
    if not probes:
        return {}
    found = {"paths": int(probes["last"]["paths"]), "prompts": probes["prompts"], "removed": probes["removed"]}
    if found["paths"] == 1:
        logger.warning(
            "the router ends on one path: with %(removed)d blocks removed, all %(prompts)d probe prompts take it", found
        )
    return found
