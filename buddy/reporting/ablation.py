"""BUDDY's ablations, a table of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buddy.reporting import measures, published
from buddy.reporting.accuracy import ERROR_NOTE, headline_note
from buddy.reporting.grid import Cell, Grid, Row, noise_note, rank
from buddy.reporting.labels import (
    coordinates,
    number,
    one_path,
    provenance,
    trained_by,
)
from buddy.reporting.study import Study
from buddy.study.settings import Ablation, Table, Variant


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
            f"Average over {len(study.tasks)} tasks, best of each column bold. {headline_note(study.tasks)}",
            *noise_note(cell for row in rows for cell in row.cells),
            *_held(study, axes, ablation),
            *trained_by(study, study.ablation_rows(ablation.name)),
            *one_path(study, backbone, study.ablation_rows(ablation.name)),
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
