"""What training costs (the paper's Table 9): hours of a run, of the runs that all depths need, and of the predictor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from buddy.methods import METHODS
from buddy.reporting import published
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import coordinates, number, provenance, series_labels, trained_by
from buddy.reporting.measured import Training
from buddy.reporting.measures import Measure, over_seeds
from buddy.reporting.study import Series, Study
from buddy.study.settings import Table

_PAPERS = {"run": "sft", "predictor_paper": "grpo"}
"""Columns of BUDDY's row that the paper has."""


def training_cost(study: Study, name: str, table: Table) -> Grid:
    """Rows: backbones and what is trained on them; columns: hours of one run, runs for all depths and their hours, and
    hours of the budget predictor by each preset."""
    backbones = [table.backbone] if table.backbone else study.config.study.backbones
    presets = study.config.predictor.presets if study.config.predicting_runs() else []
    rows: list[Row] = []
    every: list[Series] = []
    for backbone in backbones:
        trained = [one for one in study.compared(backbone) if _is_trained(one)]
        labels = series_labels(trained)
        group = [_row(study, name, backbone, one, labels[one.path], presets) for one in trained]
        for row in group[:1]:
            row.starts_group = True
        rows += group
        every += trained
    return Grid(
        name=name,
        caption="Hours of training.",
        label_headers=("Backbone", "Method"),
        headers=("One run", "Runs", "All depths", *(f"Predictor ({preset})" for preset in presets)),
        rows=rows,
        notes=[
            "Hours that a GPU was held, or of wall-clock time where there was none; seeds are averaged. Runs: trainings that "
            "the study's depths need. FiRST's gates are trained once: they count in each run, and once in all depths. Not "
            "counted: estimating importance, searching what a peer removes, evaluation.",
            *trained_by(study, every),
            *provenance(study, "training", *backbones),
        ],
    )


def _is_trained(series: Series) -> bool:
    method = METHODS[series.method]
    return method.trained and (series.lora == "trained" or method.kind != "static")


def _row(study: Study, name: str, backbone: str, series: Series, label: str, presets: list[Any]) -> Row:
    mine = [one for one in study.of(Training, backbone, series.path) if one.seed in series.seeds]
    runs = [one for one in mine if one.preset is None]
    found = {
        "run": _hours([_of(one) + one.shared_s / 3600 for one in runs], series.runs * len(series.seeds)),
        "runs": Measure(value=float(series.runs), seeds=len(series.seeds), note=""),
        "all": _total(runs, series),
    }
    for preset in presets if series.path == study.main(backbone).path else ():
        hours = [_of(one) for one in mine if one.preset == preset]
        found[f"predictor_{preset}"] = _hours(hours, len(series.seeds))
    at = coordinates(study, name, backbone, series, 0)
    at = {**at, **dict.fromkeys(("removed", "executed", "fraction"))}
    beside = _published(study, name, backbone, series)
    cells: list[Cell | None] = []
    for metric in ("run", "runs", "all", *(f"predictor_{preset}" for preset in presets)):
        where = {**at, "metric": metric, "unit": "runs" if metric == "runs" else "h"}
        digits = 0 if metric == "runs" else 2
        cells.append(Cell(where, found[metric], beside.get(metric), digits) if metric in found else None)
    return Row((backbone, label), cells)


def _published(study: Study, name: str, backbone: str, series: Series) -> dict[str, float]:
    """The paper's hours of the same cells: BUDDY's main variant only."""
    if series.method != "buddy" or not published.has_figures_of(series.method, series.variant):
        return {}
    theirs = published.training_cost(number(name), published.backbone(backbone, study.config.backbones[backbone]))
    return {metric: theirs[column] for metric, column in _PAPERS.items() if column in theirs}


def _of(one: Training) -> float:
    """Hours of one record."""
    return float(one.gpu_s or one.wall_s) / 3600


def _hours(hours: list[float], expected: int) -> Measure:
    """Mean over runs; the note tells if some are missing."""
    measure = over_seeds([Measure(value=value, n=1, seeds=1, note="") for value in hours], 0)
    missing = f"{len(hours)} of {expected} runs" if hours and len(hours) < expected else measure.note
    return Measure(
        value=measure.value, n=len(hours) or None, seeds=measure.seeds, seed_sd=measure.seed_sd, note=missing
    )


def _total(runs: Sequence[Training], series: Series) -> Measure:
    """Hours of all runs that the depths need, mean over seeds; None before all of them are trained."""
    if len(runs) < series.runs * len(series.seeds):
        return Measure()
    shared = sum({one.seed: one.shared_s / 3600 for one in runs}.values())
    hours = (sum(map(_of, runs)) + shared) / len(series.seeds)
    return Measure(value=hours, n=len(runs), seeds=len(series.seeds), note="")
