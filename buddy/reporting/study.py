"""A finished (or half-finished) study, as reporting sees it: its settings and the frame of its records."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pandas as pd

from buddy.errors import UserError, choices
from buddy.methods import METHODS
from buddy.reporting import frame as frames
from buddy.reporting.frame import series_of
from buddy.settings import Engine
from buddy.study import config
from buddy.study.config import Config, Run
from buddy.study.layout import records_folder
from buddy.tasks import PAPERS, TASKS

"""Order of methods in tables and legends: the paper's, BUDDY last."""


class Race(NamedTuple):
    """What the executions that are timed against each other have in common."""

    dataset: str
    batch_size: int
    engine: str


@dataclass(frozen=True)
class Series:
    """Runs of one method that differ in their seed only, and of a peer in their depth: a row at each depth, or a line.

    Attributes:
        path: as in the frame (`buddy.reporting.frame.series_of`).
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
    frame: pd.DataFrame
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

    @cached_property
    def accuracy_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "accuracy", ("backbone", "series", "removed"))

    @cached_property
    def predicted_rows(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Rows of scores whose depth a budget predictor set, by backbone and series."""
        scored = self.frame[self.frame.preset.notna()]
        return _grouped(scored, "accuracy", ("backbone", "series"))

    @cached_property
    def generation_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "generation", ("backbone", "series", "removed"))

    @cached_property
    def trace_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "trace", ("backbone", "series", "removed"))

    @cached_property
    def latency_rows(self) -> dict[tuple[str, str, str, int, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series, and the fields of a `Race`."""
        return _grouped(self.frame, "latency", ("backbone", "series", *Race._fields))

    @cached_property
    def breakdown_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "breakdown", ("backbone", "series", "removed"))

    @cached_property
    def importance_rows(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone and indicator."""
        return _grouped(self.frame, "importance", ("backbone", "indicator"))

    @cached_property
    def rouge_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "rouge", ("backbone", "series", "removed"))

    @cached_property
    def likelihood_rows(self) -> dict[tuple[str, str, int, str, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series, number of removed blocks, K/V policy and decode mode."""
        return _grouped(self.frame, "likelihood", ("backbone", "series", "removed", "kv", "decode"))

    @cached_property
    def training_rows(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone and series: of runs, and of the budget predictors trained on them."""
        return _grouped(self.frame, "training", ("backbone", "series"))

    @cached_property
    def budget_rows(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone and series, of evaluated budget predictors."""
        return _grouped(self.frame, "budget", ("backbone", "series"))

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

    def race_rows(self, backbone: str, race: Race, series: str | None = None) -> list[dict[str, Any]]:
        """Rows of the frame that one race left, of a series (BUDDY's main variant by default) and what it is timed
        against. A peer is another run at each depth: its series has a race, and a dense model, for each."""
        return self.latency_rows.get((backbone, series or self.main(backbone).path, *race), [])

    def _timed(self, backbone: str, series: Collection[str] | None = None) -> set[Race]:
        """Races of the study of which there are records."""
        mine = [(backbone, one) for one in series or [self.main(backbone).path]]
        settings = self.config.latency
        return {
            Race(dataset, int(size), engine)
            for (*whose, dataset, size, engine) in self.latency_rows
            if tuple(whose) in mine
            and dataset in settings.datasets
            and size in settings.batch_sizes
            and engine in settings.engines
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


def _grouped(frame: pd.DataFrame, kind: str, by: tuple[str, ...]) -> dict[Any, list[dict[str, Any]]]:
    rows: dict[Any, list[dict[str, Any]]] = {}
    for row in frame[frame.kind == kind].to_dict("records"):
        rows.setdefault(tuple(row[name] for name in by), []).append({str(name): value for name, value in row.items()})
    return rows


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
    return Study(folder, parsed, *frames.load(records_folder(parsed, folder, str(path))))
