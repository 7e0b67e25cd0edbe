"""The figures of the main study, drawn from its records: accuracy against budget, and speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from buddy.errors import UserError, unknown
from buddy.reporting import measures, style
from buddy.reporting.grid import limit_text
from buddy.reporting.labels import DATASETS, EXECUTIONS, fraction, series_labels
from buddy.reporting.measures import Measure
from buddy.reporting.study import Race, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHANCE = {
    "openbookqa": 1 / 4,
    "piqa": 1 / 2,
    "boolq": 1 / 2,
    "siqa": 1 / 3,
    "hellaswag": 1 / 4,
    "arc_easy": 1 / 4,
    "arc_challenge": 1 / 4,
    "winogrande": 1 / 2,
}
"""Accuracy of a blind guess: one over the number of choices."""
REFERENCES = ("Chance", "Ideal: blocks / executed")


def names(study: Study) -> list[str]:
    """The figures that the study measures."""
    return ["accuracy_vs_budget", *(["latency"] if study.config.timed_backbones() else [])]


def resolve(study: Study, asked: str) -> str:
    """Check the name of a figure.

    Raises:
        UserError: the study does not measure it.
    """
    if asked not in names(study):
        raise unknown(f"--figure of study {study.name}", asked, names(study))
    return asked


def build(study: Study, name: str) -> dict[str, bytes]:
    """Draw one figure.

    Returns:
        The files' contents by kind, ``pdf`` and ``png``.

    Raises:
        UserError: none of its records exist.
    """
    draw: dict[str, Callable[[Study], Figure]] = {"accuracy_vs_budget": accuracy_vs_budget, "latency": latency}
    with style.applied():
        return style.rendered(draw[name](study))


def accuracy_vs_budget(study: Study) -> Figure:
    """Average accuracy in percent against blocks removed: a panel per backbone, a line per method, bars ± one
    standard error; dense dashed in its band, chance dotted."""
    backbones = [name for name in study.config.study.backbones if _any_accuracy(study, name)]
    if not backbones:
        raise UserError(f"{study.folder}: no accuracy records of the study's backbones to draw")
    columns = min(len(backbones), 4 if len(backbones) != 5 else 3)
    figure, panels = _panels(
        math.ceil(len(backbones) / columns), columns, style.PAGE_IN if columns > 1 else style.COLUMN_IN, 2.35
    )
    limits: set[int] = set()
    for place, (backbone, axes) in enumerate(zip(backbones, panels, strict=False)):
        limits |= _accuracy_panel(study, backbone, axes)
        if len(backbones) > 1:
            axes.set_title(f"{backbone} ({study.blocks(backbone)} blocks)")
        if place % columns == 0:
            axes.set_ylabel(f"Average accuracy of {len(study.tasks)} tasks (%)")
    for spare in panels[len(backbones) :]:
        spare.remove()
    return _finish(figure, panels[: len(backbones)], limit_text(limits).capitalize() if limits else None)


def _any_accuracy(study: Study, backbone: str) -> bool:
    return any(
        (backbone, one, x) in study.accuracy_rows for one in study.series(backbone) for x in _depths(study, backbone)
    )


def _depths(study: Study, backbone: str) -> list[int]:
    return [0, *study.removed(backbone)]


def _accuracy_panel(study: Study, backbone: str, axes: Axes) -> set[int]:
    """Draw one backbone; returns the item limits of what it shows."""
    depths = _depths(study, backbone)
    series = study.series(backbone)
    labels = series_labels(series)
    lines = [one for one, method in series.items() if method != "dense"]
    shift = dict(zip(lines, _shifts(len(lines), depths[-1]), strict=True))
    limits = set()
    for place, (one, method) in enumerate(series.items()):
        found = {x: measures.accuracy(study, backbone, one, method, x)["average"] for x in depths}
        points = [(x + shift.get(one, 0.0), point) for x, point in found.items() if point.value is not None]
        limits |= {point.limit for _, point in points if point.limit is not None}
        errors = [point.stderr or 0.0 for _, point in points]
        if method == "dense" and points:
            _dense_band(axes, points[0][1])
        _line(axes, points, errors, style.mark(method, place), labels[one])
    chance = 100 * sum(CHANCE[task] for task in study.tasks) / len(study.tasks)
    axes.axhline(chance, color=style.GREY, linewidth=0.9, linestyle=style.DOTTED, zorder=1, label=REFERENCES[0])
    _budget_axis(axes, depths, study.blocks(backbone))
    return limits


def _dense_band(axes: Axes, dense: Measure) -> None:
    """The dense model's level across all depths, in a band of one standard error."""
    if dense.value is None:
        return
    error = dense.stderr or 0.0
    axes.axhspan(dense.value - error, dense.value + error, color="#E8E8E8", linewidth=0, zorder=0)
    axes.axhline(dense.value, color=style.INK, linewidth=0.9, linestyle=style.DASHED, zorder=1)


def _line(axes: Axes, points: Sequence[tuple[float, Measure]], errors: Any, mark: style.Mark, label: str) -> None:
    if points:
        xs, ys = [x for x, _ in points], [float(point.value or 0.0) for _, point in points]
        axes.errorbar(xs, ys, yerr=errors, elinewidth=0.7, label=label, zorder=3, **mark.line())


def _budget_axis(axes: Axes, depths: Sequence[int], blocks: int) -> None:
    """Blocks removed below, fraction executed above."""
    _removed_axis(axes, depths)
    axes.set_xlabel("Blocks removed")
    above = axes.secondary_xaxis("top")
    above.set_xticks(depths, [fraction(blocks - removed, blocks) for removed in depths])
    above.set_xlabel("Fraction of blocks executed")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, pad=1)


def _removed_axis(axes: Axes, depths: Sequence[int]) -> None:
    margin = 0.06 * depths[-1]
    axes.set_xlim(-margin, depths[-1] + margin)
    axes.set_xticks(depths)


def _shifts(lines: int, deepest: int, step: float = 0.014) -> list[float]:
    """Sideways shifts, in blocks, that keep the error bars of neighbouring lines apart: at most 3 % of the axis."""
    step = min(step, 0.06 / max(1, lines - 1)) * deepest
    return [step * (place - (lines - 1) / 2) for place in range(lines)]


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
        raise UserError(f"{study.folder}: no latency records of the timed backbones to draw")
    datasets = study.config.latency.datasets
    wanted = [(b, race, phase) for b in backbones for race in races[b] for phase in ("prefill", "decode")]
    # One backbone fits a column: a row per data set. Several take the page: a row per backbone.
    columns, width = (2, style.COLUMN_IN) if len(backbones) == 1 else (2 * len(datasets), style.PAGE_IN)
    rows = len(wanted) // columns
    figure, panels = _panels(rows, columns, width, 1.35 if rows > 1 else 1.8)  # a single row bears the whole legend
    for place, ((backbone, race, phase), axes) in enumerate(zip(wanted, panels, strict=True)):
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
    return _finish(figure, panels, note[:1].upper() + note[1:] or None)


def _speed_panel(study: Study, backbone: str, race: Race, phase: str, axes: Axes) -> None:
    depths = _depths(study, backbone)
    blocks = study.blocks(backbone)
    curve = [depths[-1] * step / 50 for step in range(51)]
    ideal = [blocks / (blocks - removed) for removed in curve]
    axes.axhline(1, color=style.INK, linewidth=0.9, linestyle=style.DASHED, zorder=1, label=EXECUTIONS["dense"])
    axes.plot(curve, ideal, color="#A8A8A8", linewidth=0.9, zorder=1, label=REFERENCES[1])
    executions = ("sliced", "reuse", "recompute")
    for execution, shift in zip(executions, _shifts(len(executions), depths[-1], 0.022), strict=True):
        points = []
        for removed in depths:
            found = measures.latency(study, backbone, race, execution, removed).get(f"{phase}_speedup")
            if found is not None and found.value is not None:
                points.append((removed + shift, found))
        below = [_gap(point.value, point.low) for _, point in points]
        above = [_gap(point.high, point.value) for _, point in points]
        _line(axes, points, [below, above], style.mark(execution), EXECUTIONS[execution])
    _removed_axis(axes, depths)


def _gap(upper: float | None, lower: float | None) -> float:
    return max(0.0, upper - lower) if upper is not None and lower is not None else 0.0


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Panels in reading order that share their vertical axis; ``width`` of the figure, ``height`` of a row, inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=True).ravel().tolist()


def _finish(figure: Figure, panels: Sequence[Axes], note: str | None = None) -> Figure:
    """Add one legend below all panels, each entry once, in as few rows as fit, and return the figure."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    # Reference curves come after what was measured.
    entries = {label: entries[label] for label in sorted(entries, key=REFERENCES.__contains__)}
    for rows in range(1, len(entries) + 1):
        columns = math.ceil(len(entries) / rows)
        # matplotlib fills a legend column by column; people read row by row.
        labels = [label for start in range(columns) for label in list(entries)[start::columns]]
        handles = [entries[label] for label in labels]
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, title=note, title_fontsize=7.5
        )
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    return figure
