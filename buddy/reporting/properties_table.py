"""Measured properties of the methods, in place of the paper's Table 1 of ticks.

Budget strict: the largest deviation from the depth asked for. Budget flexible: the checkpoints that the study's depths
need. Input adaptive: distinct paths over the prompts. Decode adaptive: distinct paths in one generation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from buddy.reporting.coordinates import coordinates, either, one_path, provenance, trained_by
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import series_labels
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.study.settings import Table

_UNITS = {
    "largest_deviation": "blocks",
    "distinct_paths_over_prompts": "paths",
    "distinct_paths_per_generation": "paths",
    "executed_mean": "blocks",
    "executed_min": "blocks",
    "executed_max": "blocks",
    "changed_steps_mean": "share",
}
"""Traced figures and their units: the CSV has all of them at every depth."""
_SHOWN = {"largest_deviation": 0, "distinct_paths_over_prompts": 0, "distinct_paths_per_generation": 2}
"""Traced figures that the table shows, with their digits after the point."""

CLAIMS_NOTE = (
    "The paper claims all four for BUDDY: the depth is kept, one checkpoint serves every depth, the path follows the "
    "input and may change at every decode step. Of PuDDing it says that a path stays through decoding, of FiRST that it "
    "keeps no strict depth."
)


def properties(study: Study, name: str, table: Table) -> Grid:
    """Rows: methods; columns: largest deviation, checkpoints, distinct paths over prompts and per generation."""
    backbone = str(table.backbone)
    pruning = [one for one in study.answering(backbone) if one.depths != (0,)]
    label = series_labels(pruning)
    depths = study.removed(backbone)
    rows = [_row(study, name, backbone, one, label[one.path]) for one in pruning]
    return Grid(
        name=name,
        caption=f"Properties of the methods as measured on {backbone} ({study.blocks(backbone)} blocks).",
        label_headers=("Method",),
        headers=("Deviation", "Checkpoints", "Paths over prompts", "Paths per generation"),
        rows=rows,
        error_note="± standard error over the prompts.",
        latex_errors=frozenset({3}),
        notes=[
            _what_columns_mean(study, backbone, depths),
            CLAIMS_NOTE,
            *trained_by(study, pruning),
            *one_path(study, backbone, pruning),
            *provenance(study, "trace", backbone),
        ],
    )


def _row(study: Study, name: str, backbone: str, series: Series, label: str) -> Row:
    every = _traced(study, name, backbone, series)
    shown: dict[str, Cell] = {}
    for metric, decimals in _SHOWN.items():
        shown[metric] = replace(_largest(every[metric], series), decimals=decimals)
    checkpoints = Cell(
        {**_undecided(every["largest_deviation"][0].at), "over_depths": "all", "metric": "checkpoints", "unit": "runs"},
        Measure(value=float(series.runs), n=len(series.depths), note=""),
        decimals=0,
    )
    deviation, *paths = shown.values()
    others = [cell for cells in every.values() for cell in cells if cell.measure.value is not None]
    return Row((label,), [deviation, checkpoints, *paths], unshown=others)


def _traced(study: Study, name: str, backbone: str, series: Series) -> dict[str, list[Cell]]:
    """Every traced figure as a cell per depth and data set."""
    cells: dict[str, list[Cell]] = {metric: [] for metric in _UNITS}
    for removed in series.depths:
        found = {
            (row["dataset"], row["metric"]): _measure(row)
            for row in study.trace_rows.get((backbone, series.path, removed), [])
            if row["seed"] in series.seeds
        }
        at = coordinates(study, name, backbone, series, removed)
        for dataset in study.config.trace.datasets:
            for metric, unit in _UNITS.items():
                where = {**at, "dataset": dataset, "over_depths": "", "metric": metric, "unit": unit}
                cells[metric].append(Cell(where, found.get((dataset, metric), Measure())))
    return cells


def _measure(row: Mapping[str, Any]) -> Measure:
    """A traced figure; what has a value for each prompt has a standard error over them."""
    mean = float(row["executed_mean"])
    measure = Measure(value=float(row["value"]), n=int(row["n"]), seeds=1, executed_mean=mean, note="")
    values = row["values"]
    if not isinstance(values, tuple):
        return measure
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return replace(measure, stderr=error, low=float(row["low"]), high=float(row["high"]))


def _largest(cells: list[Cell], series: Series) -> Cell:
    """The cell with the largest value; its note tells how many depths it is the largest of, if not of all."""
    measured = [cell for cell in cells if cell.measure.value is not None]
    if not measured:
        return Cell({**_undecided(cells[0].at), "over_depths": "largest"}, Measure())
    largest = max(measured, key=lambda cell: cell.measure.value or 0.0)
    missing = {cell.at["removed"] for cell in cells} - {cell.at["removed"] for cell in measured}
    there = len(series.depths) - len(missing)
    note = f"{there} of {len(series.depths)} depths" if missing else ""
    return Cell({**largest.at, "over_depths": "largest"}, replace(largest.measure, note=note))


def _undecided(at: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates without depth and data set."""
    return {**at, **dict.fromkeys(("removed", "executed", "fraction", "dataset"))}


def _what_columns_mean(study: Study, backbone: str, depths: list[int]) -> str:
    settings = study.config.trace
    traced = [row for key, found in study.trace_rows.items() if key[0] == backbone for row in found]
    rows = [row for row in traced if row["dataset"] in settings.datasets]
    prompts = either(row["prompts"] for row in rows) or str(settings.prompts)
    tokens = either(row["new_tokens"] for row in rows) or str(settings.new_tokens)
    sets = (
        f" of each of {', '.join(settings.datasets)}" if len(settings.datasets) > 1 else f" of {settings.datasets[0]}"
    )
    return (
        f"Deviation: largest difference, in blocks, between the depth asked for and the one that ran, over all passes and "
        f"prompts. Checkpoints: runs needed for {', '.join(map(str, depths))} blocks removed. Paths over prompts: distinct "
        f"paths of the prefills of {prompts} prompts{sets}. Paths per generation: distinct paths within a generation of "
        f"up to {tokens} tokens, mean over the prompts. Each at the depth where it is largest; the CSV has every depth."
    )
