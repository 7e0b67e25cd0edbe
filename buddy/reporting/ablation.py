"""BUDDY's ablations: a table of each, and all of a backbone in one figure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from buddy.reporting import measures, published, style
from buddy.reporting.accuracy import ERROR_NOTE, headline_note
from buddy.reporting.grid import NEAR, Cell, Grid, Row, rank
from buddy.reporting.labels import (
    INDICATORS,
    coordinates,
    number,
    one_path,
    provenance,
    trained_by,
)
from buddy.reporting.render import NEAR_SIGN
from buddy.reporting.significance import difference
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, panels, reason
from buddy.settings import FEATURES, PRIORS
from buddy.study.settings import Ablation, Table, Variant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


_MARKS = {
    "none": style.Mark(style.INK, "D"),
    "delta_ppl": style.Mark("#0072B2", "o"),
    "cosine": style.Mark("#009E73", "s", (0, (5, 1.5, 1, 1.5))),
    "taylor": style.Mark("#D55E00", "^", (0, (4, 1.5))),
}


@dataclass(frozen=True)
class Point:
    """One variant: its axes, mean accuracy over tasks and depths in percent, and the standard error of that."""

    variant: Mapping[str, object]
    value: float
    stderr: float

    @property
    def row(self) -> tuple[str, int]:
        """Its row of panels: recipe and source block."""
        return str(self.variant["recipe"]), int(str(self.variant["source_block"]))


def ablation_figure(study: Study) -> Figure:
    """Rows of panels: source blocks, by recipe of the router; columns: features; lines: priors over omega. Every point is
    one trained variant.

    Nothing is averaged over axes. A study that varies one axis at a time has no such grid: it gets a panel per axis, with
    a line per depth.
    """
    title = "Ablations of BUDDY"
    backbones = list(dict.fromkeys(ablation.backbone for ablation in study.config.study.ablations))
    for backbone in backbones:
        points = measured(study, backbone)
        if points:
            break
    else:
        why = "no accuracy records of their variants at every depth" if backbones else "the study has no ablation"
        return empty(title, f"not measured: {why}")
    return (_grid if _is_crossed(points) else _one_at_a_time)(study, backbone, points)


def _is_crossed(points: Sequence[Point]) -> bool:
    """Whether most panels of the grid would have several variants to compare."""
    counts = Counter((point.row, point.variant["feature"]) for point in points)
    rows, features = (len({panel[of] for panel in counts}) for of in range(2))
    return 2 * sum(count > 1 for count in counts.values()) >= rows * features


def _one_at_a_time(study: Study, backbone: str, points: Sequence[Point]) -> Figure:
    """A panel per ablation of one axis, a line per depth: panels of a grid would be all but empty."""
    shown = [one for one in study.config.study.ablations if one.backbone == backbone and len(one.axes()) == 1]
    figure, every = panels(math.ceil(len(shown) / 2), min(2, len(shown)), style.COLUMN_IN, 1.35)
    for place, (one, axes) in enumerate(zip(shown, every, strict=False)):
        _axis_panel(study, one, axes)
        axes.set_title(one.axes()[0].replace("_", " ").capitalize())
        if place % 2 == 0:
            axes.set_ylabel("Accuracy (%)")
    for spare in every[len(shown) :]:
        spare.remove()
    return finish(figure, every[: len(shown)], f"{backbone}: mean over {len(study.tasks)} tasks \N{PLUS-MINUS SIGN} SE")


def _axis_panel(study: Study, one: Ablation, axes: Axes) -> None:
    (axis,) = one.axes()
    series = study.ablation_rows(one.name)
    for removed, (marker, dash) in zip(study.removed(one.backbone), cycle(_DEPTHS)):
        found = [measures.accuracy(study, one.backbone, variant, removed)["average"] for variant in series]
        known = [(place, each.value, each.stderr or 0.0) for place, each in enumerate(found) if each.value is not None]
        if known:
            xs, ys, errors = zip(*known, strict=True)
            mark = style.Mark(style.MARKS["buddy"].color, marker, dash)
            axes.errorbar(xs, ys, yerr=errors, elinewidth=0.7, label=f"{removed} removed", **mark.line())
    values = [str(variant.variant[axis]) if axis != "omega" else f"{variant.variant[axis]:g}" for variant in series]
    axes.set_xticks(
        range(len(values)),
        [value.replace("_", " ").replace("delta", "\N{GREEK CAPITAL LETTER DELTA}") for value in values],
    )
    axes.set_xlim(-0.4, len(values) - 0.6)


_DEPTHS = (("o", "-"), ("s", style.DASHED), ("^", style.DOTTED), ("D", style.DASHDOTTED))
"""Markers and dashes of depths."""


def _grid(study: Study, backbone: str, points: Sequence[Point]) -> Figure:
    """A panel per recipe, source block and feature, a line per prior over omega."""
    features = [name for name in FEATURES if any(point.variant["feature"] == name for point in points)]
    rows = sorted({point.row for point in points})
    several = len({recipe for recipe, _ in rows}) > 1
    omegas = sorted({float(str(point.variant["omega"])) for point in points if point.variant["prior"] != "none"})
    width = style.COLUMN_IN if len(features) == 1 else style.PAGE_IN
    figure, every = panels(len(rows), len(features), width, 1.25 if len(rows) > 1 else 1.9)
    for place, axes in enumerate(every):
        row, feature = rows[place // len(features)], features[place % len(features)]
        here = [point for point in points if (point.row, point.variant["feature"]) == (row, feature)]
        _panel(axes, here, omegas)
        if len(every) > 1:
            recipe, source = row
            axes.set_title(f"feature {feature}, source block {source}" + (f", {recipe}" if several else ""))
        if place % len(features) == 0:
            axes.set_ylabel("Accuracy (%)")
        if place >= len(every) - len(features) and here:
            axes.set_xlabel("Omega")
    depths = ", ".join(map(str, study.removed(backbone)))
    return finish(
        figure, every, f"{backbone}: mean over {len(study.tasks)} tasks and over {depths} blocks removed, ± SE"
    )


def measured(study: Study, backbone: str) -> list[Point]:
    """Every variant on a backbone that was evaluated at all depths: the main one, and those of all ablations."""
    series = {study.main(backbone).path: study.main(backbone)}
    for ablation in study.config.study.ablations:
        if ablation.backbone == backbone:
            series |= {one.path: one for one in study.ablation_rows(ablation.name)}
    found = (_point(study, backbone, one) for one in series.values())
    return [point for point in found if point is not None]


def _point(study: Study, backbone: str, series: Series) -> Point | None:
    """Depths see the same items, so their errors are averaged, not divided by their number."""
    averages = [measures.accuracy(study, backbone, series, removed)["average"] for removed in study.removed(backbone)]
    values = [average.value for average in averages if average.value is not None]
    if len(values) < len(averages):
        return None
    error = sum(average.stderr or 0.0 for average in averages) / len(averages)
    return Point(series.variant, sum(values) / len(values), error)


def _panel(axes: Axes, points: Sequence[Point], omegas: Sequence[float]) -> None:
    """A line per prior; the variant without one, which has no omega, stands at the left."""
    if not points:
        reason(axes, "no such variant measured")
        return
    for prior in PRIORS:
        mine = sorted(
            (omegas.index(float(str(point.variant["omega"]))) + 1 if prior != "none" else 0, point.value, point.stderr)
            for point in points
            if point.variant["prior"] == prior
        )
        if mine:
            xs, ys, errors = zip(*mine, strict=True)
            shift = 0.06 * (PRIORS.index(prior) - 2) if prior != "none" else 0.0
            label = INDICATORS.get(prior, "No prior")
            at = [x + shift for x in xs]
            axes.errorbar(at, ys, yerr=errors, elinewidth=0.7, label=label, **_MARKS[prior].line())
    axes.set_xticks(range(len(omegas) + 1), ["\N{EN DASH}", *(f"{omega:g}" for omega in omegas)])
    axes.set_xlim(-0.5, len(omegas) + 0.5)
