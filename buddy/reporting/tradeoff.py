"""Accuracy against the decode speed-up that was measured, not the depth that was asked for.

BUDDY is one line, as one checkpoint serves every depth; a peer has a dot for each of its checkpoints. Above stands what the
depths would give if nothing but blocks took time: a point's distance to it is what routing and the rest of the model cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from buddy.methods import kind
from buddy.reporting import measures, style
from buddy.reporting.accuracy import marks, task_average
from buddy.reporting.grid import limit_text
from buddy.reporting.labels import DATASETS, series_labels, setting
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, gap, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TO_IDEAL: dict[str, Any] = {
    **{"color": "#A8A8A8", "linewidth": 0.8, "zorder": 1},
    **{"marker": "o", "markevery": [1], "fillstyle": "none"},
}
TITLE = "Accuracy against measured speed"
BARS = f"Bars: {style.ONE_ERROR} of the accuracy; {style.PASSES}. Grey: from BUDDY to the ideal of its depth."


def accuracy_vs_speed(study: Study) -> Figure:
    """A panel per timed backbone: average accuracy against the median decode speed-up over the dense model, on the first
    data set of the shown races (`Study.shown_races`).

    Static methods have the speed of the model with as many blocks cut out, timed in BUDDY's race; others their own.
    """
    found = {backbone: _points(study, backbone) for backbone in study.config.timed_backbones()}
    found = {backbone: points for backbone, points in found.items() if points}
    if not found:
        return empty(TITLE, "not measured: no backbone has both accuracy and latency records of BUDDY")
    width = style.COLUMN_IN if len(found) == 1 else style.PAGE_IN
    figure, every = panels(1, len(found), width, 2.35)
    for (backbone, points), axes in zip(found.items(), every, strict=True):
        _panel(study, backbone, points, axes)
        if len(found) > 1:
            axes.set_title(backbone)
    every[0].set_ylabel(task_average(study))
    return finish(figure, every, _note(study, found))


Points = dict[str, list[tuple[int, Measure, Measure]]]
"""By series: removed blocks, speed-up and accuracy."""


def _points(study: Study, backbone: str) -> Points:
    """What has both figures; nothing unless BUDDY's main variant has."""
    found: Points = {}
    for one in study.compared(backbone):
        for removed in one.depths:
            speed = _speed_up(study, backbone, one, removed)
            score = measures.accuracy(study, backbone, one, removed)["average"]
            if speed is not None and speed.value is not None and score.value is not None:
                found.setdefault(one.path, []).append((removed, speed, score))
    return found if study.main(backbone).path in found else {}


def _speed_up(study: Study, backbone: str, series: Series, removed: int) -> Measure | None:
    """The decode speed-up of a method at a depth; None where it was not timed."""
    of = {"whole": ("dense", None), "static": ("sliced", None), "routed": ("recompute", series.path)}
    execution, path = of.get(str(kind(series.method)), ("reuse", series.path))
    race = study.shown_races(backbone)[0]
    return measures.latency(study, backbone, race, execution, removed, path).get("decode_speedup")


def _panel(study: Study, backbone: str, points: Points, axes: Axes) -> None:
    compared = study.compared(backbone)
    labels = series_labels(compared)
    blocks = study.blocks(backbone)
    depths = study.removed(backbone)
    for one, mark in zip(compared, marks(compared), strict=True):
        known = points.get(one.path, [])
        if not known:
            continue
        xs, ys = [speed.value or 0.0 for _, speed, _ in known], [score.value or 0.0 for _, _, score in known]
        below = [gap(speed.value, speed.low) for _, speed, _ in known]
        above = [gap(speed.high, speed.value) for _, speed, _ in known]
        line = mark.line() | ({} if one.method == "buddy" else {"linestyle": "none"})
        errors = [score.stderr or 0.0 for _, _, score in known]
        options: dict[str, Any] = {
            "elinewidth": 0.7,
            "label": labels[one.path],
            "zorder": 4 if one.method == "buddy" else 3,
        }
        axes.errorbar(xs, ys, yerr=errors, xerr=[below, above], **options, **line)
        if one.method == "buddy":
            for removed, x, y in zip([removed for removed, _, _ in known], xs, ys, strict=True):
                axes.plot([x, ideal(blocks, removed)], [y, y], **_TO_IDEAL)
    axes.set_xlabel("Decode speed-up over dense, measured")
    above_axis = axes.secondary_xaxis("top")
    above_axis.set_xticks([ideal(blocks, removed) for removed in (0, *depths)], [str(one) for one in (0, *depths)])
    above_axis.set_xlabel(f"Ideal of so many of {blocks} blocks removed")
    above_axis.tick_params(length=2.5, pad=1)
    reached = [speed.value or 1.0 for known in points.values() for _, speed, _ in known]
    style.span(axes.set_xlim, [1.0, ideal(blocks, depths[-1]), *reached])
    every = [(score.value or 0.0, speed) for known in points.values() for _, speed, score in known]
    style.cut_bars(axes, every, sideways=True)


def ideal(blocks: int, removed: int) -> float:
    """The speed-up if nothing but blocks took time."""
    return blocks / (blocks - removed)


def _note(study: Study, found: Mapping[str, Points]) -> str:
    first = next(iter(found))
    race = study.shown_races(first)[0]
    limits = {score.limit for points in found.values() for known in points.values() for _, _, score in known} - {None}
    timed = ", ".join(filter(None, [DATASETS.get(race.dataset, race.dataset), study.race_text(first)]))
    told = f"{setting(study, 'latency', *found)}; timed on {timed}."
    return " ".join([told, BARS, *([f"Accuracy {limit_text(limits)}."] if limits else [])])
