"""Tables of accuracy: by method and budget, and BUDDY's ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buddy.reporting import measures, published
from buddy.reporting.cells import coordinates, number, provenance
from buddy.reporting.grid import Cell, Grid, Row, rank
from buddy.reporting.labels import TASK_LABELS, series_labels
from buddy.reporting.study import Study
from buddy.settings import Ablation, Table, Variant

ERROR_NOTE = "± standard error over a task's items; that of the average is sqrt(sum of squares) / number of tasks."


def accuracy(study: Study, name: str, table: Table) -> Grid:
    """Rows: dense, then at each depth every method; columns: tasks and their average."""
    backbone = str(table.backbone)
    columns = [*study.tasks, "average"]
    series = study.series(backbone)
    label = series_labels(series)
    rows: list[Row] = []
    for removed in [0, *study.removed(backbone)]:
        group: list[Row] = []
        for one, method in series.items():
            if (method == "dense") == (removed == 0):
                cells = _accuracy_cells(study, name, backbone, one, method, removed)
                # One method needs no rule between depths, only one below the dense row.
                starts = not group and (len(series) > 2 or removed == study.removed(backbone)[0])
                group.append(Row((str(removed), label[one]), list(cells), starts_group=starts))
        if removed:
            for column in range(len(columns)):
                rank(row.cells[column] for row in group)
        rows += group
    mean = "Avg." if study.whole_suite else f"Avg. of {len(study.tasks)}"
    notes = ["Accuracy in percent, length-normalised where the task has it."]
    if any(cell is not None and cell.rank for row in rows for cell in row.cells):
        notes.append("At each depth the best method is bold, the second underlined.")
    return Grid(
        name=name,
        caption=f"Accuracy of {backbone} ({study.blocks(backbone)} blocks) with blocks removed.",
        label_headers=("Removed", "Method"),
        headers=(*(TASK_LABELS[task] for task in study.tasks), mean),
        rows=rows,
        error_note=ERROR_NOTE,
        latex_errors=frozenset({len(study.tasks)}),
        notes=[*notes, *provenance(study, "accuracy", backbone)],
    )


def _accuracy_cells(study: Study, name: str, backbone: str, series: str, method: str, removed: int) -> list[Cell]:
    paper = published.backbone(backbone, study.config.backbones[backbone])
    beside = published.accuracy(number(name), paper, method, removed)
    variant: Mapping[str, Any] = {}
    if method == "buddy":
        variant = study.config.buddy_run(backbone, study.config.study.main.model_dump(), 0).variant
        beside = beside if dict(variant) == published.MAIN_VARIANT else {}
    if not study.whole_suite:
        beside.pop("average", None)
    at = coordinates(study, name, backbone, method, variant, removed)
    found = measures.accuracy(study, backbone, series, method, removed)
    return [
        Cell({**at, "task": task, "unit": "%"}, found[task], beside.get(task)) for task in [*study.tasks, "average"]
    ]


def ablation(study: Study, name: str, table: Table) -> Grid:
    """Rows: values of the axes; columns: depths; cells: average over the tasks, best of each column bold."""
    ablation = study.config.ablation(str(table.ablation))
    backbone = ablation.backbone
    paper = published.backbone(backbone, study.config.backbones[backbone])
    axes = _axes(ablation)
    depths = study.removed(backbone)
    rows = []
    for variant, series in study.ablation_rows(ablation.name):
        cells: list[Cell | None] = []
        for removed in depths:
            found = measures.accuracy(study, backbone, series, "buddy", removed)["average"]
            beside = published.ablation(number(name), paper, variant, removed) if study.whole_suite else None
            at = coordinates(study, name, backbone, "buddy", variant, removed)
            cells.append(Cell({**at, "task": "average", "unit": "%"}, found, beside))
        rows.append(Row(tuple(_axis_label(axis, variant) for axis in axes), cells))
    for column in range(len(depths)):
        rank((row.cells[column] for row in rows), second=False)
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
            f"Average accuracy over {len(study.tasks)} tasks in percent, best of each column bold.",
            *_held(study, axes, ablation),
            *provenance(study, "accuracy", backbone),
        ],
    )


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
