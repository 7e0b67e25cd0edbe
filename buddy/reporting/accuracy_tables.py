"""Tables of accuracy: by method and budget, and BUDDY's ablations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from buddy.reporting import measures, published
from buddy.reporting.coordinates import coordinates, number, one_path, provenance, trained_by
from buddy.reporting.grid import NEAR, Cell, Grid, Row, ran, rank
from buddy.reporting.labels import TASK_LABELS, series_labels
from buddy.reporting.render import NEAR_SIGN
from buddy.reporting.significance import difference
from buddy.reporting.study import Series, Study
from buddy.settings import HEADLINE
from buddy.study.settings import Ablation, Table, Variant

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


def rank_columns(rows: Sequence[Row], series: Sequence[Series], lowest: Sequence[bool] | None = None) -> None:
    """Rank columns among the rows of one depth: those with LoRA, and apart from them those without.

    Args:
        rows: of one depth.
        series: what each row shows.
        lowest: of each column from the left whether its lowest is best, and no column after; None: in all the highest.
    """
    for lora in ("trained", "none"):
        group = [row for row, one in zip(rows, series, strict=True) if one.lora == lora]
        for column, low in enumerate(lowest or [False] * (len(group[0].cells) if group else 0)):
            rank((row.cells[column] for row in group), lowest=low)


def headline_note(tasks: Sequence[str]) -> str:
    """A note on which of the harness's accuracies each task is shown by."""
    normalised = [TASK_LABELS[task] for task in tasks if HEADLINE[task] == "acc_norm"]
    plain = [TASK_LABELS[task] for task in tasks if HEADLINE[task] == "acc"]
    parts = [f"length-normalised (acc_norm) for {', '.join(normalised)}"] if normalised else []
    parts += [f"plain (acc) for {', '.join(plain)}"] if plain else []
    return f"Accuracy in percent, {' and '.join(parts)}."


def rank_note(rows: Iterable[Row], series: Iterable[Series]) -> list[str]:
    """What bold and underlined mean, if anything is."""
    if not any(cell is not None and cell.rank for row in rows for cell in row.cells):
        return []
    pruned = {one.lora for one in series if one.depths != (0,)}
    apart = ", with LoRA and without it apart" if len(pruned) > 1 else ""
    return [f"At each depth the best method is bold, the second underlined{apart}."]


def ablation(study: Study, name: str, table: Table) -> Grid:
    """Rows: values of the axes; columns: depths; cells: average over the tasks, best of each column bold."""
    ablation = study.config.ablation(str(table.ablation))
    backbone = ablation.backbone
    paper = published.backbone(backbone, study.config.backbones[backbone])
    axes = _axes(ablation)
    depths = study.removed(backbone)
    rows = []
    for series in study.ablation_rows(ablation.name):
        cells: list[Cell | None] = []
        for removed in depths:
            found = measures.accuracy(study, backbone, series, removed)["average"]
            beside = published.ablation(number(name), paper, series.variant, removed) if study.whole_suite else None
            at = coordinates(study, name, backbone, series, removed)
            cells.append(Cell({**at, "task": "average", "unit": "%"}, found, beside))
        rows.append(Row(tuple(_axis_label(axis, series.variant) for axis in axes), cells))
    for column, removed in enumerate(depths):
        rank((row.cells[column] for row in rows), second=False)
        _mark_noise(study, backbone, removed, [row.cells[column] for row in rows], study.ablation_rows(ablation.name))
    what = " and ".join(axis.replace("_", " ") for axis in axes)
    return Grid(
        name=name,
        caption=f"BUDDY's average accuracy by {what}, {backbone} ({study.blocks(backbone)} blocks).",
        label_headers=tuple(axis.replace("_", " ").capitalize() for axis in axes),
        headers=tuple(f"{removed} removed" for removed in depths),
        rows=rows,
        error_note=ERROR_NOTE,
        latex_errors=frozenset(range(len(depths))),
        notes=[
            f"Average over {len(study.tasks)} tasks, best of each column bold. {headline_note(study.tasks)}",
            *([NOISE_NOTE] if any(cell is not None and cell.near for row in rows for cell in row.cells) else []),
            *_held(study, axes, ablation),
            *trained_by(study, study.ablation_rows(ablation.name)),
            *one_path(study, backbone, study.ablation_rows(ablation.name)),
            *provenance(study, "accuracy", backbone),
        ],
    )


NOISE_RESAMPLES = 2000
NOISE_NOTE = (
    f"{NEAR_SIGN} {NEAR}: the 95 % interval of the difference from the best of the column, by a paired bootstrap over the "
    "items, holds 0. Not corrected for the number of rows; another training would add noise of its own."
)


def _mark_noise(
    study: Study, backbone: str, removed: int, cells: Sequence[Cell | None], series: Sequence[Series]
) -> None:
    """Mark the cells of a column that are no worse than its best for all that the items say."""
    best = next((one for cell, one in zip(cells, series, strict=True) if cell is not None and cell.rank == 1), None)
    for cell, one in zip(cells, series, strict=True):
        if best is None or cell is None or cell.rank == 1 or cell.measure.value is None or cell.measure.off_depth:
            continue
        found = difference(study, backbone, best, one, removed, NOISE_RESAMPLES)
        cell.near = found.value is not None and found.low <= 0 <= found.high


def _axes(ablation: Ablation) -> list[str]:
    """The axes that name its rows: those that vary, else those it sets, else the first."""
    given = [axis for axis in Variant.model_fields if getattr(ablation, axis)]
    return ablation.axes() or given or ["feature"]


def _axis_label(axis: str, variant: Mapping[str, Any]) -> str:
    if axis == "omega" and variant["prior"] == "none":
        return "(no prior)"
    value = variant[axis]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _held(study: Study, axes: list[str], ablation: Ablation) -> list[str]:
    """One note on the axes that the ablation holds fixed."""
    main = study.config.study.main.model_dump()
    fixed = {axis: (getattr(ablation, axis) or [main[axis]])[0] for axis in main if axis not in axes}
    if fixed.get("prior") == "none":
        fixed.pop("omega", None)
    text = ", ".join(f"{axis.replace('_', ' ')} {value}" for axis, value in fixed.items())
    return [f"Held fixed: {text}."] if text else []
