"""Accuracy by method and budget: a table per backbone, and one figure of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from buddy.reporting import measures, published, style
from buddy.reporting.grid import Cell, Grid, Row, limit_text, ran, rank_columns, rank_note
from buddy.reporting.labels import (
    TASK_LABELS,
    coordinates,
    number,
    one_path,
    provenance,
    series_labels,
    setting,
    trained_by,
)
from buddy.reporting.measured import Accuracy
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.reporting.style import budget_axis, empty, finish, line, panels, shifts
from buddy.study.settings import Table
from buddy.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR_NOTE = "± standard error over a task's items; that of the average is sqrt(sum of squares) / number of tasks."


def accuracy(study: Study, name: str, table: Table) -> Grid:
    """Rows: dense, without and with LoRA; then at each depth every method of the study, BUDDY last, and after them those
    without LoRA. Columns: tasks and their average."""
    backbone = str(table.backbone)
    compared = study.compared(backbone)
    label = series_labels(compared)
    rows: list[Row] = []
    for removed in [0, *study.removed(backbone)]:
        at_depth = [one for one in compared if removed in one.depths]
        group = [_accuracy_row(study, name, backbone, one, label[one.path], removed) for one in at_depth]
        if removed:
            rank_columns(group, at_depth)
        if group:
            # One method needs no rule between depths, only one below the dense row.
            group[0].starts_group = len(group) > 1 or removed in (0, study.removed(backbone)[0])
        rows += group
    mean = "Avg." if study.whole_suite else f"Avg. of {len(study.tasks)}"
    return Grid(
        name=name,
        caption=f"Accuracy of {backbone} ({study.blocks(backbone)} blocks) with blocks removed.",
        label_headers=("Removed", "Method"),
        headers=(*(TASK_LABELS[task] for task in study.tasks), mean),
        rows=rows,
        error_note=ERROR_NOTE,
        latex_errors=frozenset({len(study.tasks)}),
        notes=[
            headline_note(study.tasks),
            *rank_note(rows, compared),
            *trained_by(study, compared),
            *one_path(study, backbone, compared),
            *provenance(study, "accuracy", backbone),
        ],
    )


def _accuracy_row(study: Study, name: str, backbone: str, series: Series, label: str, removed: int) -> Row:
    paper = published.backbone(backbone, study.config.backbones[backbone])
    beside: dict[str, float] = {}
    if published.has_figures_of(series.method, series.variant):
        beside = published.accuracy(number(name), paper, series.method, removed)
    if not study.whole_suite:
        beside.pop("average", None)
    at = coordinates(study, name, backbone, series, removed)
    found = measures.accuracy(study, backbone, series, removed)
    cells: list[Cell | None] = [
        Cell({**at, "task": task, "unit": "%"}, found[task], beside.get(task)) for task in [*study.tasks, "average"]
    ]
    return Row((str(removed), label + ran(one for one in found.values() if one.value is not None)), cells)


def headline_note(tasks: Sequence[str]) -> str:
    """A note on which of the harness's accuracies each task is shown by."""
    normalised = [TASK_LABELS[task] for task in tasks if TASKS[task].headline == "acc_norm"]
    plain = [TASK_LABELS[task] for task in tasks if TASKS[task].headline == "acc"]
    parts = [f"length-normalised (acc_norm) for {', '.join(normalised)}"] if normalised else []
    parts += [f"plain (acc) for {', '.join(plain)}"] if plain else []
    return f"Accuracy in percent, {' and '.join(parts)}."


CHANCE_LABEL = "Chance"


def accuracy_vs_budget(study: Study) -> Figure:
    """Average accuracy in percent against blocks removed: a panel per backbone, a line per method, bars ± one
    standard error; dense dashed in its band, dense with LoRA dash-dotted, chance dotted.

    A point stands at the depth that really ran, which is not always the one asked for.
    """
    backbones = [name for name in study.config.study.backbones if _any_accuracy(study, name)]
    if not backbones:
        return empty("Accuracy against budget", "not measured: no accuracy records of the study's backbones")
    columns = min(len(backbones), 4 if len(backbones) != 5 else 3)
    figure, every = panels(
        math.ceil(len(backbones) / columns), columns, style.PAGE_IN if columns > 1 else style.COLUMN_IN, 2.35
    )
    drawn: list[Measure] = []
    for place, (backbone, axes) in enumerate(zip(backbones, every, strict=False)):
        drawn += _accuracy_panel(study, backbone, axes)
        if len(backbones) > 1:
            axes.set_title(f"{backbone} ({study.blocks(backbone)} blocks)")
        if place % columns == 0:
            axes.set_ylabel(task_average(study))
    for spare in every[len(backbones) :]:
        spare.remove()
    limits = {measure.limit for measure in drawn if measure.limit is not None}
    told = [setting(study, "accuracy", *backbones)] if len(backbones) == 1 else []
    told += [f"bars and band: {style.ONE_ERROR}"]
    told += [limit_text(limits)] if limits else []
    told += ["points at the mean depth that ran"] if any(measure.off_depth for measure in drawn) else []
    return finish(figure, every[: len(backbones)], "; ".join(told))


def task_average(study: Study) -> str:
    """The label of an axis of average accuracies."""
    return f"Average accuracy of {len(study.tasks)} tasks (%)"


def _any_accuracy(study: Study, backbone: str) -> bool:
    return any(study.of(Accuracy, backbone, one.path, x) for one in study.compared(backbone) for x in one.depths)


def _accuracy_panel(study: Study, backbone: str, axes: Axes) -> list[Measure]:
    """Draw one backbone; returns what it shows."""
    depths = [0, *study.removed(backbone)]
    blocks = study.blocks(backbone)
    compared = study.compared(backbone)
    labels = series_labels(compared)
    lines = [one.path for one in compared if one.depths != (0,)]
    shift = dict(zip(lines, shifts(len(lines), depths[-1]), strict=True))
    shown: list[Measure] = []
    for one, mark in zip(compared, marks(compared), strict=True):
        found = [(removed, measures.accuracy(study, backbone, one, removed)["average"]) for removed in one.depths]
        points = [
            (_removed(removed, blocks, point) + shift.get(one.path, 0.0), point)
            for removed, point in found
            if point.value is not None
        ]
        shown += [point for _, point in points]
        if one.depths == (0,) and points:
            _reference_level(axes, points[0][1], mark, band=one.method == "dense")
        line(axes, points, [point.stderr or 0.0 for _, point in points], mark, labels[one.path])
    chance = 100 * sum(1 / TASKS[task].choices for task in study.tasks) / len(study.tasks)
    axes.axhline(chance, color=style.GREY, linewidth=0.9, linestyle=style.DOTTED, zorder=1, label=CHANCE_LABEL)
    budget_axis(axes, depths, blocks)
    _reach(axes, depths[-1], [_removed(depths[-1], blocks, point) for point in shown])
    return shown


def marks(series: Sequence[Series]) -> list[style.Mark]:
    """The mark of each: that of its method and recipe, the marker filled otherwise where there are several of them."""
    names = ["buddy_tuned" if one.recipe == "tuned" else one.method for one in series]
    return [style.mark(name, names[:place].count(name)) for place, name in enumerate(names)]


def _removed(removed: int, blocks: int, point: Measure) -> float:
    """Blocks that a measurement left out on average."""
    return blocks - point.executed_mean if point.off_depth and point.executed_mean is not None else removed


def _reference_level(axes: Axes, dense: Measure, mark: style.Mark, band: bool) -> None:
    """The level of an unpruned model across all depths; ``band``: within one standard error."""
    if dense.value is None:
        return
    if band:
        error = dense.stderr or 0.0
        axes.axhspan(dense.value - error, dense.value + error, color="#E8E8E8", linewidth=0, zorder=0)
    axes.axhline(dense.value, color=mark.color, linewidth=0.9, linestyle=mark.dash, zorder=1)


def _reach(axes: Axes, deepest: int, xs: Sequence[float]) -> None:
    """Widen the axis for methods that ran fewer blocks than the deepest pruning leaves."""
    if max(xs, default=0.0) > deepest:
        axes.set_xlim(right=1.06 * max(xs))
