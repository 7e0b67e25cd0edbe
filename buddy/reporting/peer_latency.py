"""Speed of all methods (the paper's Table 14): static, PuDDing, FiRST and BUDDY beside the dense model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import NamedTuple

from buddy.reporting import measures, published
from buddy.reporting.grid import Cell, Grid, Row, doubt_note, ran
from buddy.reporting.labels import DATASETS, method_label, number, one_path, provenance, series_labels
from buddy.reporting.latency import ALWAYS, DECIMALS, PASSES_NOTE, how_timed
from buddy.reporting.measures import LATENCY_METRICS, Measure
from buddy.reporting.study import Race, Series, Study
from buddy.study.settings import Table

_PAPERS_TABLES = {"dense": 4, "buddy": 4, "pudding": 14, "first": 14}
"""Where the paper has a method's speed."""


class Line(NamedTuple):
    """What a row at each depth shows: an execution in a series' races."""

    method: str
    label: str
    series: Series
    execution: str


def lines(study: Study, backbone: str) -> list[Line]:
    """What is timed at each depth, in the order of the table: the static model is that of BUDDY's race."""
    timed = study.timed(backbone)
    label = series_labels(timed)
    found: list[Line] = []
    for one in timed:
        if one.method == "buddy":
            if "sliced" in study.config.latency.executions:
                found.insert(0, Line("sliced", "Static (sliced)", one, "sliced"))
            found.append(Line("buddy", label[one.path], one, "recompute"))
        else:
            found.append(Line(one.method, label[one.path], one, "reuse"))
    return found


def reference(study: Study, backbone: str) -> Line | None:
    """The dense model that is shown: of BUDDY's race where there is one, else of the first method's."""
    timed = sorted(study.timed(backbone), key=lambda one: one.method != "buddy")
    return Line("dense", method_label("dense"), timed[0], "dense") if timed else None


def peer_latency(study: Study, name: str, table: Table) -> Grid:
    """Rows: batch size and engine (named where there are several), depth, method; columns: per data set prefill and
    decode rates, each with its speed-up over dense."""
    backbone = str(table.backbone)
    shown = lines(study, backbone)
    dense = reference(study, backbone)
    races = study.races(backbone, {line.series.path for line in shown})
    pairs = list(dict.fromkeys((race.batch_size, race.engine) for race in races))
    labels = (len({size for size, _ in pairs}) > 1, len({engine for _, engine in pairs}) > 1, True, True)
    rows: list[Row] = []
    for size, engine in pairs:
        group = [_row(study, name, backbone, (size, engine), dense, 0)] if dense else []
        for place, removed in enumerate(study.removed(backbone)):
            at_depth = [_row(study, name, backbone, (size, engine), line, removed) for line in shown]
            # One line needs no rule between depths, only one below the dense row.
            for row in at_depth[:1]:
                row.starts_group = len(at_depth) > 1 or place == 0
            group += at_depth
        for index, row in enumerate(group):
            row.starts_group |= index == 0
            row.labels = tuple(compress(row.labels, labels))
        rows += group
    datasets = [DATASETS.get(dataset, dataset) for dataset in study.config.latency.datasets]
    return Grid(
        name=name,
        caption=f"Prefill and decode speed of all methods, {backbone} ({study.blocks(backbone)} blocks).",
        label_headers=tuple(compress(("Batch", "Engine", "Removed", "Method"), labels)),
        headers=tuple(
            header
            for dataset in datasets
            for header in (f"{dataset} prefill", "Speed-up", f"{dataset} decode", "Speed-up")
        ),
        rows=rows,
        latex_errors=frozenset(range(4 * len(datasets))),
        error_note=PASSES_NOTE,
        notes=[
            *_notes(study, backbone, races, shown, dense),
            *doubt_note(rows),
            *one_path(study, backbone, study.timed(backbone)),
            *provenance(study, "latency", backbone),
        ],
    )


def _row(study: Study, name: str, backbone: str, pair: tuple[int, str], line: Line, removed: int) -> Row:
    size, engine = pair
    cells: list[Cell | None] = []
    for dataset in study.config.latency.datasets:
        cells += _cells(study, name, backbone, Race(dataset, size, engine), line, removed)
    rates = [cell.measure for cell in cells[:: len(ALWAYS)] if cell is not None]
    return Row((str(size), engine, str(removed), line.label + ran(rates)), cells)


def _cells(study: Study, name: str, backbone: str, race: Race, line: Line, removed: int) -> list[Cell]:
    """The rates and speed-ups of one race."""
    found = measures.latency(study, backbone, race, line.execution, removed, line.series.path)
    beside: Mapping[str, float] = {}
    if number(name) == 14 and line.method in _PAPERS_TABLES and (race.batch_size, race.engine) == (1, "eager"):
        paper = published.backbone(backbone, study.config.backbones[backbone], trained=False)
        beside = published.latency(_PAPERS_TABLES[line.method], paper, line.method, removed, race.dataset)
    blocks = study.blocks(backbone)
    at = {
        **{"table": name, "study": study.name, "backbone": backbone, **race._asdict(), "method": line.method},
        **{"execution": line.execution, "removed": removed, "executed": blocks - removed},
        "fraction": round((blocks - removed) / blocks, 6),
    }
    cells = []
    for metric in ALWAYS:
        unit = LATENCY_METRICS[metric]
        told = {**at, "metric": metric, "unit": unit}
        cell = Cell(told, found.get(metric, Measure()), beside.get(metric), DECIMALS[unit])
        cells.append(cell.doubted(blocks / (blocks - removed)) if metric.endswith("speedup") else cell)
    return cells


def _notes(study: Study, backbone: str, races: list[Race], shown: list[Line], dense: Line | None) -> list[str]:
    """How it was timed, by the records, and what may be compared."""
    timed = [one for race in races for line in shown for one in study.race(backbone, race, line.series.path)]
    notes = [f"Rates in tokens/s. {how_timed(study, timed)}"]
    if dense is not None and len({line.series.path for line in shown}) > 1:
        whose = series_labels([dense.series])[dense.series.path]
        notes.append(
            "A peer is another run at each depth, and each has a race of its own with its own dense model, over which its "
            f"speed-up is; the dense row is that of {whose}'s race. Speed-ups compare across races; rates do only as far as "
            "the machine's speed did not drift between them."
        )
    if any(line.method == "sliced" for line in shown):
        notes.append("Static: the model with as many blocks cut out, as ShortGPT, Shortened LLaMA and SLEB leave it.")
    return notes
