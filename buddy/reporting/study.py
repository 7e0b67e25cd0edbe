"""A finished (or half-finished) study, as reporting sees it: its settings and the frame of its records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pandas as pd

from buddy import config
from buddy.config import Config
from buddy.errors import UserError, choices
from buddy.reporting import frame as frames
from buddy.reporting.frame import series_of
from buddy.reporting.source import records_folder
from buddy.settings import TASKS, Engine

METHOD_ORDER = ("dense", "shortened_llama", "shortgpt", "sleb", "pudding", "first")
"""Order of methods in tables and legends, as in the paper; methods not named here follow, BUDDY comes last."""


class Race(NamedTuple):
    """What the executions that are timed against each other have in common."""

    dataset: str
    batch_size: int
    engine: str


@dataclass(frozen=True)
class Study:
    """Settings and records of one study."""

    folder: Path
    config: Config
    frame: pd.DataFrame

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
        return self.tasks == list(TASKS)

    @cached_property
    def accuracy_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "accuracy", ("backbone", "series", "removed"))

    @cached_property
    def latency_rows(self) -> dict[tuple[str, str, str, int, str], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series, and the fields of a `Race`."""
        return _grouped(self.frame, "latency", ("backbone", "series", *Race._fields))

    @cached_property
    def breakdown_rows(self) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
        """Rows of the frame by backbone, series and number of removed blocks."""
        return _grouped(self.frame, "breakdown", ("backbone", "series", "removed"))

    def blocks(self, backbone: str) -> int:
        """Number of blocks L of a backbone."""
        return self.config.backbones[backbone].blocks

    def removed(self, backbone: str) -> list[int]:
        """Numbers of removed blocks at which it measures a backbone, ascending."""
        return sorted(self.config.removed(backbone))

    def main_series(self, backbone: str) -> str:
        """The series of BUDDY's main variant."""
        return series_of(Config.buddy_run(backbone, self.config.study.main.model_dump(), 0).path)

    def races(self, backbone: str) -> list[Race]:
        """What is timed on a backbone, in the order of the tables: per data set every batch size of the study.

        Engines are those of the study that were measured; none measured, its first.
        """
        timed = self._timed(backbone)
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

    def race_rows(self, backbone: str, race: Race) -> list[dict[str, Any]]:
        """Rows of the frame that one race left, of BUDDY's main variant and what it is timed against."""
        return self.latency_rows.get((backbone, self.main_series(backbone), *race), [])

    def _timed(self, backbone: str) -> set[Race]:
        """Races of the study of which there are records."""
        mine = (backbone, self.main_series(backbone))
        settings = self.config.latency
        return {
            Race(dataset, int(size), engine)
            for (*whose, dataset, size, engine) in self.latency_rows
            if tuple(whose) == mine
            and dataset in settings.datasets
            and size in settings.batch_sizes
            and engine in settings.engines
        }

    def series(self, backbone: str) -> dict[str, str]:
        """The methods compared on a backbone: series to method, in the order of the tables, dense first.

        Those that the study names, whether measured or not, and every other method of which there are records.
        """
        found = {
            series: rows[0]["method"]
            for (name, series, _), rows in self.accuracy_rows.items()
            if name == backbone and rows[0]["method"] not in ("dense", "buddy")
        }
        if "dense" in self.config.study.methods:
            found["method~dense"] = "dense"
        if "buddy" in self.config.study.methods:
            found[self.main_series(backbone)] = "buddy"

        def position(item: tuple[str, str]) -> tuple[int, str]:
            series, method = item
            known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
            return known + (method == "buddy"), series

        return dict(sorted(found.items(), key=position))

    def seeds(self, backbone: str, series: str, method: str) -> list[int]:
        """Seeds that a series is averaged over: the study's, or for a method it does not name those recorded."""
        if method == "dense":
            return self.config.study.seeds[:1]
        if method == "buddy":
            return list(self.config.study.seeds)
        recorded = [rows for key, rows in self.accuracy_rows.items() if key[:2] == (backbone, series)]
        return sorted({row["seed"] for rows in recorded for row in rows})

    def ablation_rows(self, name: str) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Variants of an ablation with their series, in the order of its values."""
        found: dict[str, Mapping[str, Any]] = {}
        for run in self.config.ablation_runs(self.config.ablation(name)):
            found.setdefault(series_of(run.path), run.variant)
        for series, variant in found.items():
            yield variant, series


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
    return Study(folder, parsed, frames.load(records_folder(parsed, folder, str(path))))
