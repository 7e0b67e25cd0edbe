"""Speed-up over the dense model against depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buddy.reporting import measures, style
from buddy.reporting.labels import DATASETS, EXECUTIONS
from buddy.reporting.panels import empty, finish, gap, line, panels, removed_axis, shifts
from buddy.reporting.study import Race, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IDEAL = "Ideal: blocks / executed"


def latency(study: Study) -> Figure:
    """Speed-up over dense against blocks removed, prefill and decode apart, per data set: a line per execution, bars
    from the 10th to the 90th percentile; the ideal is L over the number of blocks executed.

    Batch size and engine are those of `Study.shown_races`.
    """
    races = {backbone: study.shown_races(backbone) for backbone in study.config.timed_backbones()}
    backbones = [
        backbone
        for backbone, shown in races.items()
        if any(measures.latency(study, backbone, race, "dense", 0) for race in shown)
    ]
    if not backbones:
        return empty("Speed-up over dense", "not measured: no latency records of the timed backbones")
    datasets = study.config.latency.datasets
    wanted = [(b, race, phase) for b in backbones for race in races[b] for phase in ("prefill", "decode")]
    # One backbone fits a column: a row per data set. Several take the page: a row per backbone.
    columns, width = (2, style.COLUMN_IN) if len(backbones) == 1 else (2 * len(datasets), style.PAGE_IN)
    rows = len(wanted) // columns
    figure, every = panels(rows, columns, width, 1.35 if rows > 1 else 1.8)  # a single row bears the whole legend
    for place, ((backbone, race, phase), axes) in enumerate(zip(wanted, every, strict=True)):
        _speed_panel(study, backbone, race, phase, axes)
        if place < columns or len(backbones) == 1:
            axes.set_title(f"{DATASETS.get(race.dataset, race.dataset)}, {phase}")
        if place >= len(wanted) - columns:
            axes.set_xlabel("Blocks removed")
        if place % columns == 0:
            axes.set_ylabel("Speed-up over dense" if len(backbones) == 1 else f"{backbone}\nspeed-up over dense")
    told = {backbone: study.race_text(backbone) for backbone in backbones}
    alike = len(set(told.values())) == 1
    note = told[backbones[0]] if alike else "; ".join(f"{name}: {text}" for name, text in told.items() if text)
    return finish(figure, every, note[:1].upper() + note[1:] or None)


def _speed_panel(study: Study, backbone: str, race: Race, phase: str, axes: Axes) -> None:
    depths = [0, *study.removed(backbone)]
    blocks = study.blocks(backbone)
    curve = [depths[-1] * step / 50 for step in range(51)]
    ideal = [blocks / (blocks - removed) for removed in curve]
    axes.axhline(1, color=style.INK, linewidth=0.9, linestyle=style.DASHED, zorder=1, label=EXECUTIONS["dense"])
    axes.plot(curve, ideal, color="#A8A8A8", linewidth=0.9, zorder=1, label=IDEAL)
    executions = ("sliced", "reuse", "recompute")
    for execution, shift in zip(executions, shifts(len(executions), depths[-1], 0.022), strict=True):
        points = []
        for removed in depths:
            found = measures.latency(study, backbone, race, execution, removed).get(f"{phase}_speedup")
            if found is not None and found.value is not None:
                points.append((removed + shift, found))
        below = [gap(point.value, point.low) for _, point in points]
        above = [gap(point.high, point.value) for _, point in points]
        line(axes, points, [below, above], style.mark(execution), EXECUTIONS[execution])
    removed_axis(axes, depths)
