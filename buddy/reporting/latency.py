"""Prefill and decode speed of BUDDY by execution: the table (the paper's Table 4), and speed-ups against depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import TYPE_CHECKING

from buddy.reporting import measures, published, style
from buddy.reporting.grid import Cell, Grid, Row, doubt_note
from buddy.reporting.labels import (
    DATASETS,
    EXECUTIONS,
    either,
    number,
    one_path,
    provenance,
    setting,
)
from buddy.reporting.measured import Latency
from buddy.reporting.measures import LATENCY_METRICS, Measure
from buddy.reporting.study import Race, Study
from buddy.reporting.style import empty, finish, gap, line, panels, removed_axis, shifts
from buddy.study.settings import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PASSES_NOTE = "± bootstrap standard error of the median over the timed passes."


def latency(study: Study, name: str, table: Table) -> Grid:
    """Rows: data set, batch size, engine, depth, execution; columns: rates, speed-ups, shares of what a sliced model
    reaches, memory. Batch and engine are named where there are several."""
    backbone = str(table.backbone)
    races = study.races(backbone)
    labels = (True, len({race.batch_size for race in races}) > 1, len({race.engine for race in races}) > 1, True, True)
    rows: list[Row] = []
    for race in races:
        group = _latency_rows(study, name, backbone, race)
        group[0].starts_group = True
        rows += group
    shown = {metric for row in rows for metric in _metrics_of(row)}
    columns = [metric for metric in LATENCY_METRICS if metric in shown or metric in ALWAYS]
    for row in rows:
        by_metric = {cell.at["metric"]: cell for cell in row.cells if cell is not None}
        row.cells = [by_metric.get(metric) for metric in columns]
        row.labels = tuple(compress(row.labels, labels))
    return Grid(
        name=name,
        caption=f"Prefill and decode speed of {backbone} ({study.blocks(backbone)} blocks) with blocks removed.",
        label_headers=tuple(compress(("Data set", "Batch", "Engine", "Removed", "Execution"), labels)),
        headers=tuple(_LATENCY_HEADERS[metric] for metric in columns),
        rows=rows,
        latex_errors=frozenset(place for place, metric in enumerate(columns) if metric in ALWAYS),
        error_note=PASSES_NOTE,
        notes=[
            *_latency_notes(study, backbone, shown),
            *doubt_note(rows),
            *one_path(study, backbone, [study.main(backbone)]),
            *provenance(study, "latency", backbone),
        ],
    )


ALWAYS = ("prefill_tok_s", "prefill_speedup", "decode_tok_s", "decode_speedup")
"""Metrics that every timed row has."""
_LATENCY_HEADERS = {
    "paths_mean": "Paths",
    "called_mean": "Called",
    "prefill_tok_s": "Prefill tok/s",
    "prefill_speedup": "Speed-up",
    "prefill_of_sliced": "Of sliced",
    "prefill_of_ideal": "Of ideal",
    "decode_tok_s": "Decode tok/s",
    "decode_speedup": "Speed-up",
    "decode_of_sliced": "Of sliced",
    "decode_of_ideal": "Of ideal",
    "decode_of_called": "Of called",
    "total_of_ideal": "Both of ideal",
    "decode_gb_s": "GB/s",
    "decode_of_copy": "Of copy",
    "peak_memory_mb": "Peak MB",
}
DECIMALS = {"paths": 1, "blocks": 1, "tok/s": 1, "x": 2, "GB/s": 1, "MB": 0}
"""Shown digits after the point by unit."""


def _latency_rows(study: Study, name: str, backbone: str, race: Race) -> list[Row]:
    """Dense first, and the engine with all blocks; then at each depth what was timed, and BUDDY (recompute) whether timed
    or not, as the best case, varied routes as the worst; then mixed budgets."""
    rows = [_latency_row(study, name, backbone, race, "dense", 0)]
    full = _latency_row(study, name, backbone, race, "full", 0)
    rows += [full] if _metrics_of(full) else []
    for removed in study.removed(backbone):
        for execution in ("sliced", "reuse", "recompute"):
            row = _latency_row(study, name, backbone, race, execution, removed)
            if execution == "recompute" or _metrics_of(row):
                rows.append(row)
        for slack in measures.bounds(study, backbone, race):
            row = _latency_row(study, name, backbone, race, "varied", removed, slack=slack)
            rows += [row] if _metrics_of(row) else []
    for execution in ("mixed", "nested"):
        for removed, depths in measures.mixtures(study, backbone, race, execution).items():
            rows.append(_latency_row(study, name, backbone, race, execution, removed, depths))
    return rows


def _latency_row(
    study: Study,
    name: str,
    backbone: str,
    race: Race,
    execution: str,
    removed: int,
    depths: tuple[int, ...] = (),
    slack: int | None = None,
) -> Row:
    """One row; of mixed budgets, ``removed`` is the mean and ``depths`` says what each sequence's is; ``slack`` is the
    bound of varied routes."""
    method = execution if execution in ("dense", "sliced") else "buddy"
    beside: Mapping[str, float] = {}
    if execution in ("dense", "recompute") and (race.batch_size, race.engine) == (1, "eager"):
        # The paper's BUDDY re-routes at every decode step; it times no sliced model, no captured graphs, one sequence.
        paper = published.backbone(backbone, study.config.backbones[backbone], trained=False)
        beside = published.latency(number(name), paper, method, removed, race.dataset)
    found = measures.latency(study, backbone, race, execution, removed, slack=slack)
    blocks = study.blocks(backbone)
    cells: list[Cell | None] = []
    for metric, unit in LATENCY_METRICS.items():
        if metric in found or metric in ALWAYS:
            at = {
                **{"table": name, "study": study.name, "backbone": backbone, **race._asdict(), "method": method},
                **{"execution": execution, "removed": removed, "executed": blocks - removed},
                **{"fraction": round((blocks - removed) / blocks, 6), "metric": metric, "unit": unit},
                **({"removed_per_sequence": " ".join(map(str, depths))} if depths else {}),
                **({} if slack is None else {"slack": slack}),
            }
            cell = Cell(at, found.get(metric, Measure()), beside.get(metric), DECIMALS[unit])
            cells.append(cell.doubted(blocks / (blocks - removed)) if metric.endswith("speedup") else cell)
    span = f"{min(depths)}\N{EN DASH}{max(depths)}" if depths else str(removed)
    dataset = DATASETS.get(race.dataset, race.dataset)
    label = EXECUTIONS[execution] + ("" if slack is None else f", slack {slack}")
    return Row((dataset, str(race.batch_size), race.engine, span, label), cells)


def _metrics_of(row: Row) -> set[str]:
    return {cell.at["metric"] for cell in row.cells if cell is not None and cell.measure.value is not None}


def _latency_notes(study: Study, backbone: str, shown: set[str]) -> list[str]:
    """How it was timed, by the records, and what the columns that are shown mean."""
    timed = [one for race in study.races(backbone) for one in study.race(backbone, race)]
    notes = [how_timed(study, timed)]
    if shown & {"prefill_of_sliced", "decode_of_sliced"}:
        notes.append("Of sliced: the same ratio to the model with as many blocks cut out.")
    if shown & {"prefill_of_ideal", "decode_of_ideal"}:
        notes.append("Of ideal: the same ratio to the mean time of the sliced models of its sequences' depths.")
    if "called_mean" in shown:
        notes.append(
            "Paths: different routes among the sequences of the batch; called: blocks that any of them runs, each read once; "
            "both of a decode step, on average."
        )
    if "decode_of_called" in shown:
        notes.append(
            "Of called: the same ratio to a sliced model with as many blocks as are called (between sliced and dense)."
        )
    if any(measures.bounds(study, backbone, race) for race in study.races(backbone)):
        notes.append(
            "Varied: routes drawn for every sequence and step; slack: blocks that a step may call beyond those of one sequence "
            "(0: one set for all)."
        )
    if "decode_gb_s" in shown:
        notes.append("GB/s: weights, keys and values that decoding reads; of copy: over the device's copy bandwidth.")
    captured = [
        [one.figures[name].value for one in timed if name in one.figures]
        for name in ("capture_seconds", "capture_memory_mb")
    ]
    if all(captured):
        seconds, megabytes = map(max, captured)
        notes.append(f"Capturing the graphs of one execution took at most {seconds:.1f} s and {megabytes:.0f} MB.")
    return notes


def how_timed(study: Study, timed: Sequence[Latency]) -> str:
    """How these records were timed."""
    prompts, tokens = either(one.prompts for one in timed), either(one.new_tokens for one in timed)
    over = f" over {prompts} prompts, {tokens} new tokens" if timed else ""
    return (
        f"Median of the timed passes{over}, batch {either(study.config.latency.batch_sizes)}. Executions take turns "
        "within a pass; a speed-up is the median over passes of the ratio to the dense model in the same pass and engine."
    )


IDEAL = "Ideal: blocks / executed"


def speed_ups(study: Study) -> Figure:
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
    drawn = []
    for place, ((backbone, race, phase), axes) in enumerate(zip(wanted, every, strict=True)):
        drawn.append(_speed_panel(study, backbone, race, phase, axes))
        if place < columns or len(backbones) == 1:
            axes.set_title(f"{DATASETS.get(race.dataset, race.dataset)}, {phase}")
        if place >= len(wanted) - columns:
            axes.set_xlabel("Blocks removed")
        if place % columns == 0:
            axes.set_ylabel("Speed-up over dense" if len(backbones) == 1 else f"{backbone}\nspeed-up over dense")
    ideals = [study.blocks(one) / (study.blocks(one) - study.removed(one)[-1]) for one in backbones]
    # All panels share one axis, which medians and ideals set: one stalled pass leaves the lines apart.
    style.span(every[0].set_ylim, [1.0, *ideals, *(point.value for points in drawn for _, point in points)])
    for points, axes in zip(drawn, every, strict=True):
        style.cut_bars(axes, points)
    told = {backbone: study.race_text(backbone) for backbone in backbones}
    alike = len(set(told.values())) == 1
    races_told = [told[backbones[0]]] if alike else [f"{name}: {text}" for name, text in told.items() if text]
    of_one = [setting(study, "latency", *backbones)] if len(backbones) == 1 else []
    return finish(figure, every, "; ".join(filter(None, [*of_one, *races_told, f"bars: {style.PASSES}"])))


def _speed_panel(study: Study, backbone: str, race: Race, phase: str, axes: Axes) -> list[tuple[float, Measure]]:
    """Draw one phase of a race; returns its points."""
    drawn: list[tuple[float, Measure]] = []
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
        drawn += points
    removed_axis(axes, depths)
    return drawn
