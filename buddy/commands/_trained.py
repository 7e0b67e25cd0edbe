"""What every training leaves: a run folder, a training record, and no checkpoints."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from buddy import runs
from buddy.commands._common import tracked, write_record
from buddy.storage import checkpoints
from buddy.study.records import Budget, Stopwatch, claim

if TYPE_CHECKING:
    from buddy.routing.policy import Policy
    from buddy.tracking import Tracker
    from buddy.training.sft import Trained

logger = logging.getLogger(__name__)


def claim_run(out: Path, record: Path | None) -> None:
    """Make sure, before any work, that a run and its record may be written.

    Raises:
        UserError: something else is there.
    """
    runs.claim(out)
    if record:
        claim(record, "--record")


@dataclass(frozen=True)
class Making:
    """A run that is being trained.

    Attributes:
        out: its folder.
        info: its ``run.json``.
        record: training record to write, if any.
        model: what is trained; anything with ``dtype`` and ``device``.
        tracker: its W&B run.
        watch: started when the training began.
    """

    out: Path
    info: runs.RunInfo
    record: Path | None
    model: Any
    tracker: Tracker
    watch: Stopwatch

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the training's curves."""
        self.tracker.log(values, step=step)

    def keep(self, policy: Policy, result: Trained, examples: int, facts: dict[str, Any] | None = None) -> None:
        """Save the trained run and its record; its checkpoints have done their work.

        Args:
            policy: with its final state.
            result: outcome of the training.
            examples: number of examples it was trained on.
            facts: further metrics of the record.
        """
        from buddy import backbones

        info = self.info
        info.probes = _paths(result.probes)
        info.backbone_source = backbones.portable(info.backbone_folder(self.out))
        runs.save(self.out, info, policy, result.adapted)
        metrics: dict[str, Any] = {
            "steps": result.steps,
            "epochs": info.training.get("epochs", 0) if result.steps else 0,
            "examples": examples,
            "tokens": result.tokens,
            "positions": result.positions,
            "batch_size": result.batch_size or None,
            "objective": info.training.get("loss") if result.steps else None,
            "final_loss": result.curve[-1]["loss"] if result.curve else None,
            "curve": result.curve,
            **({"probes": result.probes} if result.probes else {}),
            "trainable_parameters": result.trainable,
            "router_parameters": sum(p.numel() for p in policy.parameters()),
            **(facts or {}),
        }
        if self.record is not None:
            removed = info.variant.get("removed")
            budget = None if removed is None else Budget.of(policy.blocks - removed, policy.blocks)
            digests = runs.RunInfo.read(self.out).digests
            write_record(
                self.record, "training", info, metrics, examples, budget, self.model, self.watch, digests=digests
            )
        # Last: a job killed before this line trains nothing anew.
        shutil.rmtree(self.out / checkpoints.FOLDER, ignore_errors=True)
        self.tracker.summary({key: value for key, value in metrics.items() if isinstance(value, int | float | str)})
        typer.echo(f"{self.out}: {_told(metrics, info.probes)}")


@contextmanager
def making(
    stage: str,
    model: Any,
    info: runs.RunInfo,
    out: Path,
    record: Path | None,
    reads: Iterable[Path | None],
    config: dict[str, Any] | None = None,
    part: str = "",
) -> Iterator[Making]:
    """Begin a run's folder, and follow its training on W&B.

    Args:
        stage: job type.
        model, info, out, record: as in `Making`; a record may lie in the run's folder, as a part of it.
        reads: what of the study it is made from; None is nothing.
        config: every setting of the job; what ``run.json`` says of the training by default.
        part: as in `buddy.commands._common.tracked`.
    """
    config = info.training if config is None else config
    apart = record is not None and record.parent != out
    with tracked(stage, info, config, part, reads, [out, record if apart else None]) as tracker:
        watch = Stopwatch(str(model.device))
        runs.begin(out)
        yield Making(out, info, record, model, tracker, watch)


def told_of(data: Path) -> dict[str, Any]:
    """What ``run.json`` says of the data that a run was trained on."""
    from buddy.data import inputs

    answered_by = inputs.answered_by(data)
    return {"data": data.name, **({} if answered_by is None else {"answered_by": answered_by})}


def _told(metrics: dict[str, Any], probes: dict[str, int]) -> str:
    """What came out of a training, in a line."""
    steps = f"{metrics['steps']} steps on {metrics['examples']} examples" if metrics["steps"] else "nothing to train"
    loss = "" if metrics["final_loss"] is None else f", loss {metrics['final_loss']:.4f}"
    if not probes:
        return steps + loss
    paths = f"{probes['paths']} path{'' if probes['paths'] == 1 else 's'} over {probes['prompts']} probe prompts"
    return f"{steps}{loss}, {paths} with {probes['removed']} blocks removed"


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
