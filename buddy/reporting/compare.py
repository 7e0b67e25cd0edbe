"""The study beside the paper: every cell that both have, with the difference and what our interval says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from buddy.reporting import measures, published, tables
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import DATASETS, TASK_LABELS
from buddy.reporting.measured import KINDS, Rouge, Trace
from buddy.reporting.measures import Measure
from buddy.reporting.significance import BETTER, UNCLEAR, WORSE
from buddy.reporting.study import Study
from buddy.resampling import mean_interval

TIMED = ("latency", "peer_latency", "breakdown", "training_cost")
"""Kinds of tables whose figures depend on the machine."""
PAPERS_DEVICE = "A100"


@dataclass(frozen=True)
class Overlap:
    """One cell that both have.

    Attributes:
        table: its table or figure.
        labels: backbone, removed blocks, row and column.
        cell: ours, with the paper's figure beside it.
        low, high: 95 % interval of ours, None where it has none.
        verdict: what the interval says, or why it says nothing.
    """

    table: str
    labels: tuple[str, str, str, str]
    cell: Cell
    low: float | None
    high: float | None
    verdict: str


def overlaps(study: Study) -> list[Overlap]:
    """Every measured cell of the study's tables, and point of Figures 4 and 5, that the paper has too."""
    found = [one for name in tables.names(study) for one in _of_table(study, name)]
    return [*found, *_of_figure_4(study), *_of_figure_5(study)]


def _of_table(study: Study, name: str) -> Iterator[Overlap]:
    kind = study.config.measured_tables()[name].kind
    if kind == "likelihood":  # the paper has none
        return
    grid = tables.build(study, name)
    for row in grid.rows:
        for cell in row.cells:
            if cell is None or cell.published is None or cell.measure.value is None:
                continue
            backbone = str(cell.at["backbone"])
            hardware = kind in TIMED and not _same_device(study, kind, backbone)
            axes = kind == "ablation"
            told = [
                f"{header} {label}" if axes else label
                for header, label in zip(grid.label_headers, row.labels, strict=True)
            ]
            removed = "" if cell.at["removed"] is None else str(cell.at["removed"])
            labels = (backbone, removed, ", ".join(told) if axes else told[-1], _column(cell.at))
            yield _overlap(name, labels, cell, interval(cell.measure), hardware)


def _column(at: Any) -> str:
    """What a cell shows, from its coordinates."""
    parts = [at.get(name) for name in ("dataset", "task", "phase", "metric")]
    known = [str(part) for part in parts if part]
    return " ".join(TASK_LABELS.get(part, DATASETS.get(part, part.replace("_", " "))) for part in known)


def _same_device(study: Study, kind: str, backbone: str) -> bool:
    """Whether all of a backbone's records of a kind are from the paper's kind of GPU."""
    of = {"peer_latency": "latency", "training_cost": "training"}.get(kind, kind)
    return all(PAPERS_DEVICE in str(one.device) for one in study.of(KINDS[of], backbone))


def interval(measure: Measure) -> tuple[float, float] | None:
    """The 95 % interval of a figure: its standard error, and where there are several seeds that of their mean."""
    if measure.value is None or measure.stderr is None:
        return None
    seeds = (measure.seed_sd or 0.0) ** 2 / max(1, measure.seeds)
    half = measures.NORMAL * math.sqrt(measure.stderr**2 + seeds)
    return measure.value - half, measure.value + half


def _overlap(
    table: str,
    labels: tuple[str, str, str, str],
    cell: Cell,
    ends: tuple[float | None, float | None] | None,
    other_hardware: bool = False,
) -> Overlap:
    low, high = ends or (None, None)
    return Overlap(table, labels, cell, low, high, _verdict(cell, low, high, other_hardware))


def _verdict(cell: Cell, low: float | None, high: float | None, other_hardware: bool) -> str:
    measure, theirs = cell.measure, cell.published
    if other_hardware:
        return "other hardware"
    if measure.off_depth:
        return f"ran {measure.executed_mean:.1f} blocks" if measure.executed_mean is not None else "other depth"
    if measure.limit is not None:
        return f"first {measure.limit} items only"
    if low is None or high is None or theirs is None:
        return "no interval"
    return BETTER if low > theirs else WORSE if high < theirs else UNCLEAR


def _of_figure_4(study: Study) -> Iterator[Overlap]:
    """Distinct paths per generation."""
    for backbone in (run.backbone for run in study.config.traced_runs()):
        main = study.main(backbone)
        paper = published.backbone(backbone, study.config.backbones[backbone])
        for removed in study.removed(backbone):
            for one in study.of(Trace, backbone, main.path, removed):
                theirs = published.figure(4, paper, main.variant, one.dataset).get(removed)
                if theirs is not None and one.seed == main.seeds[0]:
                    paths = one.figures["distinct_paths_per_generation"]
                    mean, low, high = mean_interval(paths.values)
                    labels = (backbone, str(removed), "BUDDY", DATASETS.get(one.dataset, one.dataset) + " paths")
                    at = {"backbone": backbone, "method": "buddy", "removed": removed, "dataset": one.dataset}
                    measure = Measure(value=mean, n=paths.n, seeds=1, note="")
                    yield _overlap("figure4", labels, Cell({**at, "unit": "paths"}, measure, theirs), (low, high))


def _of_figure_5(study: Study) -> Iterator[Overlap]:
    """ROUGE of reuse and recompute on SAMSum."""
    for backbone in study.config.study.backbones:
        if not study.of(Rouge, backbone):
            continue
        main = study.main(backbone)
        paper = published.backbone(backbone, study.config.backbones[backbone])
        scored = [
            one for one in study.of(Rouge, backbone, main.path) if (one.dataset, one.seed) == ("samsum", main.seeds[0])
        ]
        for removed in dict.fromkeys(one.removed for one in scored):
            for one in (one for one in scored if one.removed == removed):
                for metric, figure in one.figures.items():
                    theirs = published.figure(5, paper, main.variant, f"{metric}_{one.decode}").get(removed or 0)
                    if theirs is not None:
                        labels = (backbone, str(removed), f"BUDDY ({one.decode})", metric)
                        at = {"backbone": backbone, "method": "buddy", "removed": removed, "dataset": "samsum"}
                        at |= {"decode": one.decode, "metric": metric, "unit": "share"}
                        measure = Measure(value=figure.value, n=figure.n, seeds=1, note="")
                        yield _overlap("figure5", labels, Cell(at, measure, theirs, 3), (figure.low, figure.high))


def compare(study: Study) -> Grid:
    """The table of every overlapping cell: ours, its interval, theirs, the difference and the verdict."""
    found = overlaps(study)
    rows: list[Row] = []
    for place, one in enumerate(found):
        starts = place == 0 or (found[place - 1].table, *found[place - 1].labels[:2]) != (one.table, *one.labels[:2])
        rows.append(
            Row((one.table.replace("table", "Table ").replace("figure", "Figure "), *one.labels), _cells(one), starts)
        )
    return Grid(
        name="compare",
        caption=f"Study {study.name} beside the paper: every cell that both have.",
        label_headers=("Cell of", "Backbone", "Removed", "Row", "Column"),
        headers=("Ours", "Low", "High", "Theirs", "Difference", "Ours is"),
        rows=rows,
        tidy=[_record(study, one) for one in found],
        notes=[*_notes(found), *fits(study)],
    )


def fits(study: Study) -> list[str]:
    """Where several of the study's backbones may be the same one of the paper's, which dense row fits its own better: a note
    for each, once two of them are scored on the whole of a task."""
    candidates: dict[str, list[str]] = {}
    for name in study.config.study.backbones:
        theirs = published.backbone(name, study.config.backbones[name])
        if theirs is not None:
            candidates.setdefault(theirs, []).append(name)
    notes = []
    for theirs, names in candidates.items():
        rows = {name: row for name in names if (row := _dense(study, name))}
        beside = published.dense(theirs)
        shared = [task for task in beside if rows and all(task in row for row in rows.values())]
        if len(rows) > 1 and shared:
            notes.append(_fit(theirs, {task: beside[task] for task in shared}, rows))
    return notes


def _dense(study: Study, backbone: str) -> dict[str, Measure]:
    """The tasks on whose every item the backbone as it is was scored."""
    for series in study.compared(backbone):
        if series.method == "dense":
            found = measures.accuracy(study, backbone, series, 0)
            return {task: one for task, one in found.items() if one.value is not None and one.limit is None}
    return {}


def _fit(theirs: str, beside: dict[str, float], rows: dict[str, dict[str, Measure]]) -> str:
    off = {name: [abs((row[task].value or 0.0) - beside[task]) for task in beside] for name, row in rows.items()}
    mean = {name: sum(gaps) / len(gaps) for name, gaps in off.items()}
    inside = {
        name: sum(low <= beside[task] <= high for task in beside for low, high in [interval(row[task]) or (0.0, 0.0)])
        for name, row in rows.items()
    }
    ranked = sorted(rows, key=mean.__getitem__)
    told = "; ".join(f"{name} {mean[name]:.2f} points ({inside[name]} of {len(beside)})" for name in ranked)
    return (
        f"Which backbone is the paper's {theirs}? Mean distance of the dense row from the published one (and on how many "
        f"tasks that lies in our interval): {told}. {ranked[0]} fits better."
    )


def _cells(one: Overlap) -> list[Cell | None]:
    value, theirs = one.cell.measure.value or 0.0, one.cell.published or 0.0
    numbers = (value, one.low, one.high, theirs, value - theirs)
    shown: list[Cell | None] = [
        None if number is None else Cell({}, Measure(value=number, note=""), decimals=one.cell.decimals)
        for number in numbers
    ]
    return [*shown, Cell({}, Measure(note=""), text=one.verdict)]


def _record(study: Study, one: Overlap) -> dict[str, Any]:
    """The cell's own row with the interval and the verdict."""
    own = {"table": one.table, "study": study.name, **one.cell.at}
    return {**own, **one.cell.record(), **own, "low": one.low, "high": one.high, "verdict": one.verdict}


def _notes(found: list[Overlap]) -> list[str]:
    if not found:
        return ["Nothing that the paper reports was measured on one of its backbones."]
    counts = {name: sum(one.verdict == name for one in found) for name in (BETTER, WORSE, UNCLEAR)}
    told = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [
        f"{len(found)} cells: {told}, without a verdict {len(found) - sum(counts.values())}.",
        "The interval is ours (95 %; several seeds enter it). The paper's figures have none and are taken as exact; each "
        "cell is judged by itself, so about one verdict in twenty would be wrong if nothing differed.",
        f"Other hardware: a time that was not measured on the paper's GPU ({PAPERS_DEVICE}).",
    ]
