"""A finished (or half-finished) study, as reporting sees it: its settings and its records."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

from buddy.errors import UserError, choices
from buddy.methods import METHODS
from buddy.reporting import measured
from buddy.reporting.measured import Latency, Measured, series_of
from buddy.settings import Engine
from buddy.study import config
from buddy.study.config import Config, Run
from buddy.study.layout import records_folder
from buddy.tasks import PAPERS, TASKS

T = TypeVar("T", bound=Measured)

"""Order of methods in tables and legends: the paper's, BUDDY last."""


class Race(NamedTuple):
    """What the executions that are timed against each other have in common."""

    dataset: str
    batch_size: int
    engine: str

    @classmethod
    def of(cls, timed: Latency) -> Race:
        """The race that a record is of."""
        return cls(timed.dataset, timed.batch_size, timed.engine)


@dataclass(frozen=True)
class Series:
    """Runs of one method that differ in their seed only, and of a peer in their depth: a row at each depth, or a line.

    Attributes:
        path: as its records name it (`buddy.reporting.measured.series_of`).
        method: its method.
        variant: its axes, without a peer's ``removed``.
        seeds: what it is averaged over.
        depths: numbers of removed blocks at which it is measured, ascending.
        runs: number of runs behind all depths, for one seed.
    """

    path: str
    method: str
    variant: Mapping[str, Any]
    seeds: tuple[int, ...]
    depths: tuple[int, ...]
    runs: int

    @property
    def recipe(self) -> str | None:
        """The recipe of BUDDY's router; None of another method."""
        return self.variant.get("recipe")

    @property
    def lora(self) -> str:
        """Whether it was fine-tuned: ``trained`` or ``none``."""
        return str(self.variant.get("lora", "none" if self.method == "dense" else "trained"))


@dataclass(frozen=True)
class Study:
    """Settings and records of one study."""

    folder: Path
    config: Config
    records: Sequence[Measured]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Records that were left out: the reason by the file's path below the folder of records."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.config.study.name

    @property
    def tasks(self) -> list[str]:
        """The tasks it evaluates, in the paper's order."""
        return [task for task in TASKS if task in self.config.evaluation.tasks]

    @property
    def whole_suite(self) -> bool:
        """Whether its average is over the paper's eight tasks."""
        return self.tasks == list(PAPERS)

    def of(self, kind: type[T], backbone: str, series: str | None = None, removed: int | None = None) -> list[T]:
        """Records of a kind on a backbone, in the order of their files.

        Args:
            kind: a class of `buddy.reporting.measured`.
            backbone: by name.
            series: of this series only (`Series.path`).
            removed: at this depth only.
        """
        found: list[T] = self._by_series.get((kind, backbone, series), [])
        return [one for one in found if removed in (None, one.removed)]

    @cached_property
    def _by_series(self) -> dict[tuple[type[Measured], str, str | None], list[Any]]:
        groups: dict[tuple[type[Measured], str, str | None], list[Any]] = {}
        for one in self.records:
            for series in (None, one.series):
                groups.setdefault((type(one), one.backbone, series), []).append(one)
        return groups

    def blocks(self, backbone: str) -> int:
        """Number of blocks L of a backbone."""
        return self.config.backbones[backbone].blocks

    def removed(self, backbone: str) -> list[int]:
        """Numbers of removed blocks at which it measures a backbone, ascending."""
        return sorted(self.config.removed(backbone))

    def main(self, backbone: str, recipe: str | None = None) -> Series:
        """BUDDY's main variant, with LoRA if the study has it: what the latency and the breakdown table show; or the same
        with another recipe of its router."""
        run = self.config.main_run(backbone)
        axes = run.variant if recipe is None else {**run.variant, "recipe": recipe}
        run = replace(run, axes=tuple(axes.items()))
        (series,) = self._series(replace(run, seed=seed) for seed in self.config.study.seeds)
        return series

    def races(self, backbone: str, series: Collection[str] | None = None) -> list[Race]:
        """What is timed on a backbone, in the order of the tables: per data set every batch size of the study.

        Engines are those of the study that were measured; none measured, its first. ``series`` are those whose records
        count, BUDDY's main variant by default.
        """
        timed = self._timed(backbone, series)
        measured = {race.engine for race in timed}
        engines = [engine for engine in get_args(Engine) if engine in measured] or self.config.latency.engines[:1]
        sizes = sorted(self.config.latency.batch_sizes)
        return [
            Race(name, size, engine) for name in self.config.latency.datasets for size in sizes for engine in engines
        ]

    def shown_races(self, backbone: str) -> list[Race]:
        """The races that the figure and the summary show, one per data set.

        They have the smallest batch size that was timed. Their engine is graph where it was timed, else eager: a GPU
        that decodes eagerly waits for the host, and a ratio over such a dense model says little about depth.
        """
        timed = self._timed(backbone)
        size = min(race.batch_size for race in timed or self.races(backbone))
        engines = {race.engine for race in timed if race.batch_size == size}
        engine = "graph" if "graph" in engines else "eager"
        return [Race(name, size, engine) for name in self.config.latency.datasets]

    def race_text(self, backbone: str) -> str:
        """``batch 1, engine graph`` of the shown races; "" where one sequence was timed eagerly and nothing else."""
        shown = self.shown_races(backbone)[0]
        timed = {(race.batch_size, race.engine) for race in self._timed(backbone)}
        return "" if timed <= {(1, "eager")} else f"batch {shown.batch_size}, engine {shown.engine}"

    def race(self, backbone: str, race: Race, series: str | None = None) -> list[Latency]:
        """What one race timed, of a series (BUDDY's main variant by default) and what it is timed against. A peer is another
        run at each depth: its series has a race, and a dense model, for each."""
        timed = self.of(Latency, backbone, series or self.main(backbone).path)
        return [one for one in timed if Race.of(one) == race]

    def _timed(self, backbone: str, series: Collection[str] | None = None) -> set[Race]:
        """Races of the study of which there are records."""
        settings = self.config.latency
        found = {
            Race.of(one) for path in series or [self.main(backbone).path] for one in self.of(Latency, backbone, path)
        }
        return {
            race
            for race in found
            if race.dataset in settings.datasets
            and race.batch_size in settings.batch_sizes
            and race.engine in settings.engines
        }

    def compared(self, backbone: str) -> list[Series]:
        """What the accuracy table compares on a backbone, whether measured or not, in the order of the tables."""
        return _in_order(self._series(self.config.compared_runs(backbone)))

    def answering(self, backbone: str) -> list[Series]:
        """What answers problems by generation, and has its paths traced, on a backbone, in the order of the tables."""
        return _in_order(self._series(self.config.answering_runs(backbone)))

    def timed(self, backbone: str) -> list[Series]:
        """What is timed on a backbone, in the order of the tables."""
        return _in_order(self._series(self.config.timed_runs(backbone)))

    def ablation_rows(self, name: str) -> list[Series]:
        """The variants of an ablation, in the order of its values."""
        return self._series(self.config.ablation_runs(self.config.ablation(name)))

    def _series(self, runs: Iterable[Run]) -> list[Series]:
        """Runs that are averaged over, or differ in a peer's depth, together."""
        groups: dict[str, list[Run]] = {}
        for run in runs:
            groups.setdefault(series_of(run.path), []).append(run)
        return [
            Series(
                path=path,
                method=group[0].method,
                variant={axis: value for axis, value in group[0].variant.items() if axis != "removed"},
                seeds=tuple(sorted({run.seed for run in group})),
                depths=tuple(sorted({depth for run in group for depth in self.config.depths(run)})),
                runs=len({run.axes for run in group}),
            )
            for path, group in groups.items()
        ]


def is_main_criterion(method: str, criterion: object) -> bool:
    """Whether it is what a static peer's paper ranks blocks by; other methods have no criterion, None."""
    known = METHODS[method].criteria if method in METHODS else ()
    return criterion == (known[0] if known else None)


def _in_order(series: Iterable[Series]) -> list[Series]:
    """Methods as in the paper; those without LoRA after all with it, as they compete among themselves."""

    def place(one: Series) -> tuple[bool, int]:
        return one.method != "dense" and one.lora == "none", METHODS[one.method].row

    return sorted(series, key=place)


def load(folder: str | Path) -> Study:
    """Read a study's settings and all its records.

    Args:
        folder: ``results/<study>``, which holds ``study.json`` and, unless ``study.records`` names another folder,
            ``records/``.

    Raises:
        UserError: there is no such study, its settings are damaged, or the folder that it names holds no records.
    """
    folder = Path(folder)
    path = folder / "study.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = sorted(p.parent.name for p in folder.parent.glob("*/study.json"))
        hint = f"studies in {folder.parent}: {choices(others)}" if others else f"{folder.parent} holds no study"
        raise UserError(f"{path}: not found; {hint}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable study ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a mapping of sections, found {type(content).__name__}")
    parsed = config.parse(content, str(path))
    return Study(folder, parsed, *measured.load(records_folder(parsed, folder, str(path))))
