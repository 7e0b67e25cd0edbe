"""Which paths BUDDY takes: how many in one generation (Figure 4), which blocks run (Figures 6, 9, 10 and 11), and the
properties of all methods, measured, in place of the paper's Table 1 of ticks.

Budget strict: the largest deviation from the depth asked for. Budget flexible: the checkpoints that the study's depths
need. Input adaptive: distinct paths over the prompts. Decode adaptive: distinct paths in one generation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from buddy.reporting import measured, published, style
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import (
    DATASETS,
    TASK_LABELS,
    coordinates,
    either,
    one_path,
    provenance,
    series_labels,
    setting,
    trained_by,
)
from buddy.reporting.measured import Trace
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, panels, reason, removed_axis, shifts
from buddy.resampling import mean_interval
from buddy.study.planned_figures import HEAT_MAPS, subjects
from buddy.study.settings import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR = style.MARKS["buddy"].color
_LINES = {
    "alpaca": style.Mark(_COLOUR, "o"),
    "samsum": style.Mark(_COLOUR, "s", style.DASHED),
    "gsm8k": style.Mark(_COLOUR, "^", style.DOTTED),
}
"""Data sets whose prompts are answered by generation: all are BUDDY, so all have its colour."""


def paths_per_generation(study: Study) -> Figure:
    """Figure 4: distinct paths in a generation against depth, a line per data set; mean with 95 % interval over prompts."""
    title = "Distinct paths per generation"
    for backbone in subjects(study.config, study.config.traced_backbones()):
        found = _paths(study, backbone)
        if found:
            break
    else:
        return empty(title, "not measured: no traces of BUDDY")
    figure, (axes,) = panels(1, 1, style.COLUMN_IN, 1.8)
    axes.set_title(f"{title}, {backbone}")
    deepest = study.removed(backbone)[-1]
    for (dataset, points), shift in zip(found.items(), shifts(len(found), deepest), strict=True):
        means, low, high = (np.array([points[removed][of] for removed in points]) for of in range(3))
        bars = [means - low, high - means]
        line = _LINES[dataset].line()
        axes.errorbar(
            [removed + shift for removed in points], means, yerr=bars, elinewidth=0.7, label=DATASETS[dataset], **line
        )
        _published_paths(study, backbone, axes, dataset)
    removed_axis(axes, [0, *study.removed(backbone)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Blocks removed")
    axes.set_ylabel("Paths")
    prompts = {one.prompts for one in _traced(study, backbone) if one.dataset in found}
    told = f"mean over {either(prompts)} prompts, {style.INTERVAL}"
    return finish(figure, [axes], f"{setting(study, 'trace', backbone)}; {told}")


def _traced(study: Study, backbone: str, removed: int | None = None) -> list[Trace]:
    """BUDDY's traces, with its first seed."""
    main = study.main(backbone)
    depths = study.removed(backbone) if removed is None else [removed]
    found = [one for depth in depths for one in study.of(Trace, backbone, main.path, depth)]
    return [one for one in found if one.seed == main.seeds[0]]


def _paths(study: Study, backbone: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By data set and depth: mean over prompts and its 95 % interval."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for one in _traced(study, backbone):
        if one.dataset in _LINES:
            paths = one.figures["distinct_paths_per_generation"]
            found.setdefault(one.dataset, {})[one.removed or 0] = mean_interval(paths.values)
    return {name: found[name] for name in sorted(found)}


def _published_paths(study: Study, backbone: str, axes: Axes, dataset: str) -> None:
    """The paper's figures, if it is the paper's backbone and variant: the same line in grey."""
    paper = published.backbone(backbone, study.config.backbones[backbone])
    points = published.figure(4, paper, study.main(backbone).variant, dataset)
    if points:
        line = {**_LINES[dataset].line(), "color": style.GREY, "fillstyle": "none", "linewidth": 0.8}
        axes.plot(list(points), list(points.values()), label=f"{DATASETS[dataset]}, published", **line)


def heat_map(name: str, study: Study) -> Figure:
    """Figures 6, 9, 10 and 11: the share of passes in which each block ran, a row per data set, at one of the depths."""
    place = HEAT_MAPS[name]
    backbones = [
        one for one in subjects(study.config, study.config.traced_backbones()) if len(study.removed(one)) > place
    ]
    for backbone in backbones:
        removed = study.removed(backbone)[place]
        found = {one.dataset: one.block_frequency for one in _traced(study, backbone, removed)}
        if found:
            return _heat_panel(study, backbone, removed, found)
    why = "no traces of BUDDY at this depth" if backbones else f"no traced backbone has {place + 1} depths"
    return empty("Executed blocks by task", f"not measured: {why}")


def _heat_panel(study: Study, backbone: str, removed: int, found: Mapping[str, tuple[float, ...]]) -> Figure:
    order = [*TASK_LABELS, *DATASETS]
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    figure, (axes,) = panels(1, 1, style.COLUMN_IN, 0.55 + 0.19 * max(3, len(names)))
    blocks = study.blocks(backbone)
    lengths = {len(values) for values in found.values()}
    if lengths != {blocks}:
        reason(axes, f"not drawn: the traces have {lengths} blocks, {backbone} has {blocks}")
        return figure
    # A white grid keeps single cells apart in print.
    image = axes.pcolormesh(
        np.arange(blocks + 1) + 0.5,
        np.arange(len(names) + 1),
        np.array([found[name] for name in names]),
        cmap=style.HEAT,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.2,
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(names)) + 0.5, [TASK_LABELS.get(name, DATASETS.get(name, name)) for name in names])
    axes.set_xticks([1, *range(5, blocks + 1, 5)])
    axes.tick_params(length=0)
    axes.set_xlabel("Block")
    axes.set_title(f"{backbone}, {removed} of {blocks} blocks removed")
    figure.colorbar(image, ax=axes, label="Share of passes", pad=0.02)
    return finish(figure, [axes], setting(study, "trace", backbone))


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
    every = _every_traced(study, name, backbone, series)
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


def _every_traced(study: Study, name: str, backbone: str, series: Series) -> dict[str, list[Cell]]:
    """Every traced figure as a cell per depth and data set."""
    cells: dict[str, list[Cell]] = {metric: [] for metric in _UNITS}
    for removed in series.depths:
        found = {
            (one.dataset, metric): _measure(figure, one)
            for one in study.of(Trace, backbone, series.path, removed)
            if one.seed in series.seeds
            for metric, figure in one.figures.items()
        }
        at = coordinates(study, name, backbone, series, removed)
        for dataset in study.config.trace.datasets:
            for metric, unit in _UNITS.items():
                where = {**at, "dataset": dataset, "over_depths": "", "metric": metric, "unit": unit}
                cells[metric].append(Cell(where, found.get((dataset, metric), Measure())))
    return cells


def _measure(figure: measured.Figure, trace: Trace) -> Measure:
    """A traced figure; what has a value for each prompt has a standard error over them."""
    values = figure.values
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Measure(
        value=figure.value,
        stderr=error,
        low=figure.low,
        high=figure.high,
        n=figure.n,
        seeds=1,
        executed_mean=trace.executed_mean,
        note="",
    )


def _largest(cells: list[Cell], series: Series) -> Cell:
    """The cell with the largest value; its note tells how many depths it is the largest of, if not of all."""
    known = [cell for cell in cells if cell.measure.value is not None]
    if not known:
        return Cell({**_undecided(cells[0].at), "over_depths": "largest"}, Measure())
    largest = max(known, key=lambda cell: cell.measure.value or 0.0)
    missing = {cell.at["removed"] for cell in cells} - {cell.at["removed"] for cell in known}
    there = len(series.depths) - len(missing)
    note = f"{there} of {len(series.depths)} depths" if missing else ""
    return Cell({**largest.at, "over_depths": "largest"}, replace(largest.measure, note=note))


def _undecided(at: Mapping[str, Any]) -> dict[str, Any]:
    """Coordinates without depth and data set."""
    return {**at, **dict.fromkeys(("removed", "executed", "fraction", "dataset"))}


def _what_columns_mean(study: Study, backbone: str, depths: list[int]) -> str:
    settings = study.config.trace
    traced = [one for one in study.of(Trace, backbone) if one.dataset in settings.datasets]
    prompts = either(one.prompts for one in traced) or str(settings.prompts)
    tokens = either(one.new_tokens for one in traced) or str(settings.new_tokens)
    sets = (
        f" of each of {', '.join(settings.datasets)}" if len(settings.datasets) > 1 else f" of {settings.datasets[0]}"
    )
    return (
        f"Deviation: largest difference, in blocks, between the depth asked for and the one that ran, over all passes and "
        f"prompts. Checkpoints: runs needed for {', '.join(map(str, depths))} blocks removed. Paths over prompts: distinct "
        f"paths of the prefills of {prompts} prompts{sets}. Paths per generation: distinct paths within a generation of "
        f"up to {tokens} tokens, mean over the prompts. Each at the depth where it is largest; the CSV has every depth."
    )
