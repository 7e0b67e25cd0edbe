"""BUDDY's ablations in one figure: every variant minus the main run, on the same items, so that what both get right cancels.

A variant by another recipe of the router is held against that recipe's run. Variants are marks without lines: between two
features, or a prior and none, there is nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from buddy.reporting import measures, style
from buddy.reporting.labels import INDICATORS, setting
from buddy.reporting.significance import Difference, compared, items_of
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, panels, reason
from buddy.resampling import INTERVAL_RESAMPLES
from buddy.settings import FEATURES, PRIORS
from buddy.study.settings import Ablation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MINUS_MAIN = "Accuracy minus\nthe main run's (points)"
_PRIORS = {
    "none": style.Mark(style.INK, "D"),
    "delta_ppl": style.Mark("#0072B2", "o"),
    "cosine": style.Mark("#009E73", "s"),
    "taylor": style.Mark("#D55E00", "^"),
}
_DEPTHS = tuple(
    style.Mark(colour, marker)
    for colour, marker in (("#6BAED6", "o"), ("#2171B5", "s"), ("#08306B", "^"), (style.INK, "D"))
)
"""Marks of depths, the darker the deeper."""


def ablation_figure(study: Study) -> Figure:
    """Rows of panels: source blocks, by recipe of the router; columns: features; marks: priors over omega. Every point is
    one trained variant.

    Nothing is averaged over axes. A study that varies one axis at a time has no such grid: it gets a panel per axis, with
    a mark per depth.
    """
    title = "Ablations of BUDDY"
    backbones = list(dict.fromkeys(ablation.backbone for ablation in study.config.study.ablations))
    for backbone in backbones:
        found = measured(study, backbone)
        if found:
            break
    else:
        why = "no accuracy records of their variants at every depth" if backbones else "the study has no ablation"
        return empty(title, f"not measured: {why}")
    return _grid(study, backbone, found) if _is_crossed(found) else _one_at_a_time(study, backbone)


def minus_main(study: Study, backbone: str, series: Series, depths: Sequence[int]) -> Difference | None:
    """A variant minus the run that it varies, the mean over depths; without an interval where items are missing, None where
    either was not measured at all of them."""
    base = study.main(backbone, series.recipe)
    averages = [_averages(study, backbone, one, depths) for one in (series, base)]
    known = [[value for value in row if value is not None] for row in averages]
    if any(len(row) < len(depths) for row in known):
        return None
    # All depths see the same items: an item counts with its mean over them.
    ours, theirs = ([items_of(study, backbone, one, removed) for removed in depths] for one in (series, base))
    found = compared(study, _mean(ours), _mean(theirs), INTERVAL_RESAMPLES)
    return (
        found
        if found.value is not None
        else Difference(float(np.mean(known[0]) - np.mean(known[1])), math.nan, math.nan)
    )


def _mean(depths: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """By task the mean of each item over depths, of tasks whose items all depths have."""
    whole = [task for task in depths[0] if all(len(one.get(task, ())) == len(depths[0][task]) for one in depths)]
    return {task: np.mean([one[task] for one in depths], axis=0) for task in whole}


def measured(study: Study, backbone: str) -> list[Series]:
    """Every variant on a backbone that was evaluated at all depths: the main one, and those of all ablations."""
    series = {study.main(backbone).path: study.main(backbone)}
    for ablation in study.config.study.ablations:
        if ablation.backbone == backbone:
            series |= {one.path: one for one in study.ablation_rows(ablation.name)}
    return [one for one in series.values() if None not in _averages(study, backbone, one, study.removed(backbone))]


def _averages(study: Study, backbone: str, series: Series, depths: Sequence[int]) -> list[float | None]:
    return [measures.accuracy(study, backbone, series, removed)["average"].value for removed in depths]


def _place(series: Series) -> tuple[str, int]:
    """The row of panels of a variant: recipe and source block."""
    return str(series.recipe), int(series.variant["source_block"])


def _is_crossed(found: Sequence[Series]) -> bool:
    """Whether most panels of the grid would have several variants to compare."""
    counts = Counter((_place(one), one.variant["feature"]) for one in found)
    rows, features = (len({panel[of] for panel in counts}) for of in range(2))
    return 2 * sum(count > 1 for count in counts.values()) >= rows * features


def _note(study: Study, backbone: str, over: str = "") -> str:
    told = f"mean over {len(study.tasks)} tasks{over}, {style.INTERVAL} over the items; hollow: the main run itself"
    return f"{setting(study, 'accuracy', backbone)}; {told}"


def _mark(axes: Axes, place: float, minus: Difference, mark: style.Mark, label: str, itself: bool) -> None:
    """One variant; the main run, which differs from itself by nothing, is hollow."""
    value = minus.value or 0.0
    bars = [[value - minus.low], [minus.high - value]]
    options: dict[str, Any] = {"color": mark.color, "marker": mark.marker, "fillstyle": "none" if itself else "full"}
    axes.errorbar(place, value, yerr=bars, elinewidth=0.7, linestyle="none", label=label, zorder=3, **options)


def _zero(axes: Axes) -> None:
    """The level of the main run, on an axis that does not magnify less than a point."""
    axes.update_datalim([(0, -1), (0, 1)], updatex=False)
    axes.axhline(0, color=style.GREY, linewidth=0.9, linestyle=style.DASHED, zorder=1)


# ---- one axis at a time ----------------------------------------------------------------------------------------------


def _one_at_a_time(study: Study, backbone: str) -> Figure:
    """A panel per ablation of one axis, a mark per depth: panels of a grid would be all but empty."""
    shown = [one for one in study.config.study.ablations if one.backbone == backbone and len(one.axes()) == 1]
    rows = math.ceil(len(shown) / 2)
    figure, every = panels(rows, min(2, len(shown)), style.COLUMN_IN, 1.35 if rows > 1 else 1.7)
    for place, (one, axes) in enumerate(zip(shown, every, strict=False)):
        _axis_panel(study, one, axes)
        axes.set_title(one.axes()[0].replace("_", " ").capitalize())
        if place % 2 == 0:
            axes.set_ylabel(MINUS_MAIN)
    for spare in every[len(shown) :]:
        spare.remove()
    return finish(figure, every[: len(shown)], _note(study, backbone))


def _axis_panel(study: Study, one: Ablation, axes: Axes) -> None:
    (axis,) = one.axes()
    series = study.ablation_rows(one.name)
    depths = study.removed(one.backbone)
    _zero(axes)
    for removed, mark, shift in zip(depths, cycle(_DEPTHS), _beside(len(depths))):
        for place, variant in enumerate(series):
            minus = minus_main(study, one.backbone, variant, [removed])
            if minus is not None:
                itself = variant.path == study.main(one.backbone, variant.recipe).path
                _mark(axes, place + shift, minus, mark, f"{removed} removed", itself)
    values = [f"{variant.variant[axis]:g}" if axis == "omega" else str(variant.variant[axis]) for variant in series]
    axes.set_xticks(range(len(values)), [_value(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)


def _value(text: str) -> str:
    return text.replace("_", " ").replace("delta", "\N{GREEK CAPITAL LETTER DELTA}")


def _beside(count: int) -> list[float]:
    """Sideways shifts of that many marks at one tick: bars that coincide stand side by side."""
    step = min(0.16, 0.6 / max(1, count))
    return [step * (place - (count - 1) / 2) for place in range(count)]


# ---- a grid ----------------------------------------------------------------------------------------------------------


def _grid(study: Study, backbone: str, found: Sequence[Series]) -> Figure:
    """A panel per recipe, source block and feature that were measured, a mark per prior over omega."""
    features = [name for name in FEATURES if any(one.variant["feature"] == name for one in found)]
    rows = sorted(set(map(_place, found)))
    several = len({recipe for recipe, _ in rows}) > 1
    grids = [one for one in study.config.study.ablations if one.backbone == backbone]
    intended = {
        (_place(one), one.variant["feature"])
        for one in [study.main(backbone), *(row for grid in grids for row in study.ablation_rows(grid.name))]
    }
    omegas = sorted({float(one.variant["omega"]) for one in found if one.variant["prior"] != "none"})
    width = style.COLUMN_IN if len(features) == 1 else style.PAGE_IN
    figure, every = panels(len(rows), len(features), width, 1.25 if len(rows) > 1 else 1.9)
    for place, axes in enumerate(every):
        row, feature = rows[place // len(features)], features[place % len(features)]
        if (row, feature) not in intended:  # a grid need not have every combination
            axes.remove()
            continue
        here = [one for one in found if (_place(one), one.variant["feature"]) == (row, feature)]
        _panel(study, backbone, axes, here, omegas)
        if len(every) > 1:
            recipe, source = row
            axes.set_title(f"feature {feature}, source block {source}" + (f", {recipe}" if several else ""))
        if place % len(features) == 0:
            axes.set_ylabel(MINUS_MAIN)
        if place >= len(every) - len(features) and here:
            axes.set_xlabel("Omega")
    depths = ", ".join(map(str, study.removed(backbone)))
    return finish(figure, every, _note(study, backbone, f" and over {depths} blocks removed"))


def _panel(study: Study, backbone: str, axes: Axes, here: Sequence[Series], omegas: Sequence[float]) -> None:
    """Marks of each prior, the mean over depths; the variant without one, which has no omega, stands at the left."""
    if not here:
        reason(axes, "no such variant measured")
        return
    _zero(axes)
    for prior, shift in zip(PRIORS, _beside(len(PRIORS)), strict=True):
        for one in (one for one in here if one.variant["prior"] == prior):
            minus = minus_main(study, backbone, one, study.removed(backbone))
            if minus is not None:
                place = omegas.index(float(one.variant["omega"])) + 1 + shift if prior != "none" else 0.0
                itself = one.path == study.main(backbone, one.recipe).path
                _mark(axes, place, minus, _PRIORS[prior], INDICATORS.get(prior, "No prior"), itself)
    axes.set_xticks(range(len(omegas) + 1), ["\N{EN DASH}", *(f"{omega:g}" for omega in omegas)])
    axes.set_xlim(-0.5, len(omegas) + 0.5)
