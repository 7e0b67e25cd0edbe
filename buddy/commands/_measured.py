"""A run that is measured at several depths: opened once, checked before anything is measured, a record per depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from buddy.commands._common import check_depths, check_one_gpu, provenance, run_of, tracked
from buddy.commands._options import counts
from buddy.settings import KV, Settings
from buddy.study.records import Budget, Record, Stopwatch, claim_folder

if TYPE_CHECKING:
    from buddy.routing.model import RoutedModel
    from buddy.runs import RunInfo
    from buddy.tracking import Tracker


@dataclass(frozen=True)
class Measured:
    """A loaded run and the depths it is measured at.

    Attributes:
        folder: where it was loaded from.
        model: the run.
        depths: numbers of removed blocks, ascending, as W&B takes points; each is legal for the run.
        kv: K/V of skipped blocks; None where that is the run's own affair, and no axis of the records.
    """

    folder: Path
    model: RoutedModel
    depths: list[int]
    kv: KV | None

    @property
    def info(self) -> RunInfo:
        """What the run folder says, or what was said of a dense model."""
        return self.model.origin.info

    def budget(self, removed: int) -> Budget:
        """The budget that leaves out so many blocks."""
        return Budget.of(self.model.blocks - removed, self.model.blocks)

    def watch(self) -> Stopwatch:
        """A stopwatch for a measurement that begins now."""
        return Stopwatch(str(self.model.device))

    def say(self, removed: int, *words: str) -> None:
        """Print what came out at a depth: its modes, if any, and the figures."""
        typer.echo(f"{', '.join([f'{removed} of {self.model.blocks} blocks removed', *words[:-1]])}: {words[-1]}")

    def tracked(
        self, stage: str, settings: Settings, out: Path, part: str = "", reads: Iterable[Path] = ()
    ) -> AbstractContextManager[Tracker]:
        """The W&B run of this measurement; arguments as in `buddy.commands._common.tracked`."""
        config = {**settings.model_dump(), "removed": self.depths, "training": self.info.training}
        run = run_of(self.info)
        return tracked(stage, self.info.study, run, config, part, [self.folder, *reads], [out])

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
            removed: number of removed blocks; None where each input had its own.
            items: number of items behind the metrics.
            watch: started when the measurement began.
            method, variant: of what was measured, where that is not the run itself.
            axes: of the measurement, besides the run's own and ``kv``.
        """
        info = self.info
        kv = {} if self.kv is None else {"kv": self.kv}
        own = {**info.variant, **kv, **axes} if info.variant else {}
        Record(
            kind=kind,
            study=info.study,
            backbone=info.backbone,
            method=method or info.method,
            metrics=metrics,
            n=items,
            variant=own if variant is None else variant,
            seed=info.seed,
            budget=None if removed is None else self.budget(removed),
            digests=info.digests,
            **provenance(self.model, watch),
        ).write(path)


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
    from buddy import runs

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
    return Measured(run, model, depths, kv)
