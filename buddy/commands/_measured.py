"""What is measured, a run or an untouched backbone: opened once, checked before anything is measured, and its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from buddy import runs
from buddy.commands._common import backbone_folder, check_depths, check_one_gpu, tracked, write_record
from buddy.commands._options import counts
from buddy.settings import KV, Settings
from buddy.study.records import Budget, Stopwatch, claim_folder
from buddy.tracking import Tracker

if TYPE_CHECKING:
    from buddy.routing.model import RoutedModel


@dataclass(frozen=True)
class Measured:
    """A loaded model, and what its records say of it.

    Attributes:
        folder: where it was loaded from.
        info: what the run folder says, or what was said of a backbone.
        model: a `buddy.routing.model.RoutedModel`, or a backbone as Hugging Face loads it.
        blocks: number of its blocks, L.
        depths: numbers of removed blocks that it is measured at, ascending, as W&B takes points; each is legal for it.
        kv: K/V of skipped blocks; None where that is no axis of the records.
    """

    folder: Path
    info: runs.RunInfo
    model: Any
    blocks: int
    depths: tuple[int, ...] = ()
    kv: KV | None = None

    def budget(self, removed: int) -> Budget:
        """The budget that leaves out so many blocks."""
        return Budget.of(self.blocks - removed, self.blocks)

    def watch(self) -> Stopwatch:
        """A stopwatch for a measurement that begins now."""
        return Stopwatch(str(self.model.device))

    def say(self, removed: int, *words: str) -> None:
        """Print what came out at a depth: its modes, if any, and the figures."""
        typer.echo(f"{', '.join([f'{removed} of {self.blocks} blocks removed', *words[:-1]])}: {words[-1]}")

    def config(self, settings: Settings, **more: str) -> dict[str, Any]:
        """Every setting of a measurement at several depths, for W&B; ``removed`` is an axis of peers, one number."""
        return {**settings.model_dump(), **more, "removed_at": list(self.depths), "training": self.info.training}

    def tracked(
        self,
        stage: str,
        config: dict[str, Any],
        writes: Iterable[Path | None],
        part: str = "",
        reads: Iterable[Path] = (),
    ) -> AbstractContextManager[Tracker]:
        """The W&B run of this measurement, none where it writes nothing; as `buddy.commands._common.tracked`."""
        if not any(written := list(writes)):
            return nullcontext(Tracker())
        return tracked(stage, self.info, config, part, [self.folder, *reads], written)

    def records(
        self,
        kind: str,
        out: Path,
        measure: Callable[[Budget], tuple[dict[str, Any], int]],
        line: Callable[[dict[str, Any]], str],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Measure depth after depth; each has its record, ``removed~N.json``, and its line before the next begins.

        Args:
            kind: of the records.
            out: folder for them.
            measure: the metrics at a budget, and the number of items behind them.
            line: the metrics in a few words.

        Yields:
            The number of removed blocks, and the metrics.
        """
        for removed in self.depths:
            watch = self.watch()
            metrics, items = measure(self.budget(removed))
            self.write(kind, out / f"removed~{removed}.json", removed, metrics, items, watch)
            self.say(removed, line(metrics))
            yield removed, metrics

    def write(
        self,
        kind: str,
        path: Path,
        removed: int | None,
        metrics: dict[str, Any],
        items: int,
        watch: Stopwatch,
        method: str | None = None,
        variant: dict[str, Any] | None = None,
        **axes: str,
    ) -> None:
        """Write one record.

        Args:
            kind, metrics: of the record.
            path: its file.
            removed: number of removed blocks; None where no depth applies, or each input had its own.
            items: number of items behind the metrics.
            watch: started when the measurement began.
            method, variant: of what was measured, where that is not the run itself.
            axes: of the measurement, besides the run's own and ``kv``.
        """
        kv = {} if self.kv is None else {"kv": self.kv}
        own = {**self.info.variant, **kv, **axes} if self.info.variant else {}
        write_record(
            path,
            kind,
            self.info,
            metrics,
            items,
            None if removed is None else self.budget(removed),
            self.model,
            watch,
            method=method or self.info.method,
            variant=own if variant is None else variant,
        )


def auto_record(out: Path, budget: str) -> Path:
    """The record of what was measured at a predictor's depths, ``auto`` or at a price."""
    return out / f"{budget.replace(':', '~')}.json"


def open_run(
    run: Path,
    removed: str | None,
    out: Path,
    kv: KV | None,
    device: str,
    dtype: str,
    study: str | None = None,
    name: str = "",
    suits: Callable[[RoutedModel], None] = lambda model: None,
) -> Measured:
    """Load a run to measure.

    Args:
        run: run folder, or a backbone folder for the dense model.
        removed: numbers of removed blocks, such as ``0,4,8``; None for a measurement without a depth.
        out: folder for the records, checked before anything is loaded.
        kv: K/V of skipped blocks; None for the run's own, which the records then do not name.
        device, dtype: as in `buddy.runs.load`.
        study: study it belongs to; the run's own, or ``adhoc``, where it is empty. None leaves it as it is.
        name: the backbone's name, for a dense model; its folder's by default.
        suits: raises an error of its own where the run cannot be measured that way.

    Raises:
        UserError: records cannot be written there, there is no such run, a depth is not legal for it, or several GPUs are visible.
    """
    claim_folder(out)
    depths = [] if removed is None else sorted(set(counts(removed, "--removed")))
    model = runs.load(run, kv=kv, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    suits(model)
    check_depths(model, depths)
    info = model.origin.info
    if study is not None:
        info.study = study or info.study or "adhoc"
    info.backbone = name or info.backbone
    return Measured(run, info, model, model.blocks, tuple(depths), kv)


def open_backbone(backbone: Path, method: str, study: str, name: str, device: str, dtype: str) -> tuple[Measured, Any]:
    """Load an untouched backbone to measure, and its tokenizer.

    Args:
        backbone: its folder, or its name in a study.
        method: what it is measured for.
        study, name: study it belongs to, and its name there; its folder's by default.
        device, dtype: as in `buddy.runs.load`.

    Raises:
        UserError: there is no such backbone, it cannot be loaded, or several GPUs are visible.
    """
    from buddy.backbones.fingerprint import of_backbone

    folder = backbone_folder(backbone)
    model, tokenizer = runs.load_backbone(folder, device, dtype)
    check_one_gpu(model.device.type)
    info = runs.RunInfo(method, "", {}, name or folder.name, str(folder), study=study)
    info.digests = {"backbone": of_backbone(folder)}
    return Measured(folder, info, model, model.config.num_hidden_layers), tokenizer
