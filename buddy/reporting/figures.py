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
from buddy.reporting.study import Race, Series, Study

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
LEGEND_IN = 0.6
"""Height of a legend that the heights of `_panels` allow for, inches."""
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
    standard error; dense dashed in its band, dense with LoRA dash-dotted, chance dotted.

    A point stands at the depth that really ran, which is not always the one asked for.
    """
    backbones = [name for name in study.config.study.backbones if _any_accuracy(study, name)]
    if not backbones:
        raise UserError(f"{study.folder}: no accuracy records of the study's backbones to draw")
    columns = min(len(backbones), 4 if len(backbones) != 5 else 3)
    figure, panels = _panels(
        math.ceil(len(backbones) / columns), columns, style.PAGE_IN if columns > 1 else style.COLUMN_IN, 2.35
    )
    drawn: list[Measure] = []
    for place, (backbone, axes) in enumerate(zip(backbones, panels, strict=False)):
        drawn += _accuracy_panel(study, backbone, axes)
        if len(backbones) > 1:
            axes.set_title(f"{backbone} ({study.blocks(backbone)} blocks)")
        if place % columns == 0:
            axes.set_ylabel(f"Average accuracy of {len(study.tasks)} tasks (%)")
    for spare in panels[len(backbones) :]:
        spare.remove()
    limits = {measure.limit for measure in drawn if measure.limit is not None}
    told = [limit_text(limits)] if limits else []
    told += ["points at the mean depth that ran"] if any(measure.off_depth for measure in drawn) else []
    return _finish(figure, panels[: len(backbones)], "; ".join(told).capitalize() or None)


def _any_accuracy(study: Study, backbone: str) -> bool:
    return any((backbone, one.path, x) in study.accuracy_rows for one in study.compared(backbone) for x in one.depths)


def _depths(study: Study, backbone: str) -> list[int]:
    return [0, *study.removed(backbone)]


def _accuracy_panel(study: Study, backbone: str, axes: Axes) -> list[Measure]:
    """Draw one backbone; returns what it shows."""
    depths = _depths(study, backbone)
    blocks = study.blocks(backbone)
    compared = study.compared(backbone)
    labels = series_labels(compared)
    lines = [one.path for one in compared if one.depths != (0,)]
    shift = dict(zip(lines, _shifts(len(lines), depths[-1]), strict=True))
    shown: list[Measure] = []
    for one, mark in zip(compared, _marks(compared), strict=True):
        found = [(removed, measures.accuracy(study, backbone, one, removed)["average"]) for removed in one.depths]
        points = [
            (_removed(removed, blocks, point) + shift.get(one.path, 0.0), point)
            for removed, point in found
            if point.value is not None
        ]
        shown += [point for _, point in points]
        if one.depths == (0,) and points:
            _reference_level(axes, points[0][1], mark, band=one.method == "dense")
        _line(axes, points, [point.stderr or 0.0 for _, point in points], mark, labels[one.path])
    chance = 100 * sum(CHANCE[task] for task in study.tasks) / len(study.tasks)
    axes.axhline(chance, color=style.GREY, linewidth=0.9, linestyle=style.DOTTED, zorder=1, label=REFERENCES[0])
    _budget_axis(axes, depths, blocks)
    _reach(axes, depths[-1], [_removed(depths[-1], blocks, point) for point in shown])
    return shown


def _marks(series: Sequence[Series]) -> list[style.Mark]:
    """The mark of each: that of its method, the marker filled otherwise where the method has several."""
    before = [[other.method for other in series[:place]] for place in range(len(series))]
    return [style.mark(one.method, others.count(one.method)) for one, others in zip(series, before, strict=True)]


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


def _reach(axes: Axes, deepest: int, xs: Sequence[float]) -> None:
    """Widen the axis for methods that ran fewer blocks than the deepest pruning leaves."""
    if max(xs, default=0.0) > deepest:
        axes.set_xlim(right=1.06 * max(xs))


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
    height = figure.get_figheight()
    figure.set_figheight(height + len(entries))  # room for any legend while they are tried
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
            # Panels keep their size under a legend of many methods.
            figure.set_figheight(height + max(0.0, legend.get_window_extent().height / figure.dpi - LEGEND_IN))
            break
        legend.remove()
    return figure
