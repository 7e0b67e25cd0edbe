"""An untouched backbone that a command measures, before anything is trained: importance, a peer's choice of blocks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.commands._common import backbone_folder, check_one_gpu, provenance, tracked
from buddy.study.config import Run
from buddy.study.records import Budget, Record, Stopwatch
from buddy.tracking import Tracker


@dataclass(frozen=True)
class MeasuredBackbone:
    """A loaded backbone.

    Attributes:
        folder: where it was loaded from.
        run: what the study calls it, with the method that it is measured for.
        study: study it belongs to.
        model, tokenizer: as `buddy.runs.load_backbone` gives them.
    """

    folder: Path
    run: Run
    study: str
    model: Any
    tokenizer: Any

    @property
    def blocks(self) -> int:
        """Number of its blocks, L."""
        return self.model.config.num_hidden_layers

    def watch(self) -> Stopwatch:
        """A stopwatch for a measurement that begins now."""
        return Stopwatch(str(self.model.device))

    def tracked(
        self, stage: str, config: dict[str, Any], writes: Iterable[Path | None], part: str = "", *reads: Path
    ) -> AbstractContextManager[Tracker]:
        """The W&B run of this measurement, or none where it writes nothing; as `buddy.commands._common.tracked`."""
        if not any(written := list(writes)):
            return nullcontext(Tracker())
        return tracked(stage, self.study, self.run, config, part, [self.folder, *reads], written)

    def write(
        self,
        kind: str,
        path: Path,
        metrics: dict[str, Any],
        items: int,
        watch: Stopwatch,
        removed: int | None = None,
    ) -> None:
        """Write one record.

        Args:
            kind, metrics: of the record.
            path: its file.
            items: number of items behind the metrics.
            watch: started when the measurement began.
            removed: number of blocks left out; None where no depth applies.
        """
        from buddy.backbones.fingerprint import of_backbone

        Record(
            kind=kind,
            study=self.study,
            backbone=self.run.backbone,
            method=self.run.method,
            metrics=metrics,
            n=items,
            budget=None if removed is None else Budget.of(self.blocks - removed, self.blocks),
            digests={"backbone": of_backbone(self.folder)},
            **provenance(self.model, watch),
        ).write(path)


def open_backbone(backbone: Path, method: str, study: str, name: str, device: str, dtype: str) -> MeasuredBackbone:
    """Load a backbone to measure.

    Args:
        backbone: its folder, or its name in a study.
        method: what it is measured for.
        study, name: study it belongs to, and its name there; its folder's by default.
        device, dtype: as in `buddy.runs.load`.

    Raises:
        UserError: there is no such backbone, it cannot be loaded, or several GPUs are visible.
    """
    from buddy.runs import load_backbone

    folder = backbone_folder(backbone)
    model, tokenizer = load_backbone(folder, device, dtype)
    check_one_gpu(model.device.type)
    return MeasuredBackbone(folder, Run(name or folder.name, method, (), 0), study, model, tokenizer)
