"""The paper's tables, rebuilt from a study's records: accuracy by budget, ablations, latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from buddy.errors import unknown
from buddy.reporting import measures, published
from buddy.reporting.grid import Cell, Grid, Row, add_notes, rank
from buddy.reporting.labels import DATASETS, EXECUTIONS, TASK_LABELS, method_label, series_labels
from buddy.reporting.measures import LATENCY_METRICS, Measure
from buddy.reporting.study import Study
from buddy.settings import Ablation, Table, Variant

ERROR_NOTE = "± standard error over a task's items; that of the average is sqrt(sum of squares) / number of tasks."
PASSES_NOTE = "± bootstrap standard error of the median over the timed passes."


def names(study: Study) -> list[str]:
    """The tables that the study measures, in the order of their numbers."""
    return list(study.config.measured_tables())


def resolve(study: Study, asked: str) -> str:
    """The table meant by ``2`` or ``table2``.

    Raises:
        UserError: the study does not measure it.
    """
    measured = names(study)
    for name in (asked, f"table{asked}"):
        if name in measured:
            return name
    raise unknown(f"--table of study {study.name}", asked, measured or ["(it measures none)"])


def build(study: Study, name: str) -> Grid:
    """Build one table of the study.

    Args:
        study: settings and records.
        name: a name from `names`; cells without a record are marked and explained, never an error.
    """
    table = study.config.study.tables[name]
    builders: dict[str, Callable[[Study, str, Table], Grid]] = {
        "accuracy": _accuracy,
        "ablation": _ablation,
        "latency": _latency,
    }
    return add_notes(builders[table.kind](study, name, table))


def number(name: str) -> int:
    """The paper's number of a table, 0 if its name has none."""
    return int("".join(filter(str.isdigit, name)) or 0)


def _accuracy(study: Study, name: str, table: Table) -> Grid:
    """Rows: dense, then at each depth every method; columns: tasks and their average."""
    backbone = str(table.backbone)
    columns = [*study.tasks, "average"]
    series = study.series(backbone)
    label = series_labels(series)
    rows: list[Row] = []
    for removed in [0, *study.removed(backbone)]:
        group: list[Row] = []
        for one, method in series.items():
            if (method == "dense") == (removed == 0):
                cells = _accuracy_cells(study, name, backbone, one, method, removed)
                # One method needs no rule between depths, only one below the dense row.
                starts = not group and (len(series) > 2 or removed == study.removed(backbone)[0])
                group.append(Row((str(removed), label[one]), list(cells), starts_group=starts))
        if removed:
            for column in range(len(columns)):
                rank(row.cells[column] for row in group)
        rows += group
    mean = "Avg." if study.whole_suite else f"Avg. of {len(study.tasks)}"
    notes = ["Accuracy in percent, length-normalised where the task has it."]
    if any(cell is not None and cell.rank for row in rows for cell in row.cells):
        notes.append("At each depth the best method is bold, the second underlined.")
    return Grid(
        name=name,
        caption=f"Accuracy of {backbone} ({study.blocks(backbone)} blocks) with blocks removed.",
        label_headers=("Removed", "Method"),
        headers=(*(TASK_LABELS[task] for task in study.tasks), mean),
        rows=rows,
        error_note=ERROR_NOTE,
        latex_errors=frozenset({len(study.tasks)}),
        notes=[*notes, *_provenance(study, "accuracy", backbone)],
    )


def _accuracy_cells(study: Study, name: str, backbone: str, series: str, method: str, removed: int) -> list[Cell]:
    paper = published.backbone(backbone, study.config.backbones[backbone])
    beside = published.accuracy(number(name), paper, method, removed)
    variant: Mapping[str, Any] = {}
    if method == "buddy":
        variant = study.config.buddy_run(backbone, study.config.study.main.model_dump(), 0).variant
        beside = beside if dict(variant) == published.MAIN_VARIANT else {}
    if not study.whole_suite:
        beside.pop("average", None)
    at = _coordinates(study, name, backbone, method, variant, removed)
    found = measures.accuracy(study, backbone, series, method, removed)
    return [
        Cell({**at, "task": task, "unit": "%"}, found[task], beside.get(task)) for task in [*study.tasks, "average"]
    ]


def _coordinates(
    study: Study, name: str, backbone: str, method: str, variant: Mapping[str, Any], removed: int
) -> dict[str, Any]:
    blocks = study.blocks(backbone)
    return {
        "table": name,
        "study": study.name,
        "backbone": backbone,
        "method": method,
        **{axis: variant.get(axis) for axis in Variant.model_fields},
        "removed": removed,
        "executed": blocks - removed,
        "fraction": round((blocks - removed) / blocks, 6),
    }


def _ablation(study: Study, name: str, table: Table) -> Grid:
    """Rows: values of the axes; columns: depths; cells: average over the tasks, best of each column bold."""
    ablation = study.config.ablation(str(table.ablation))
    backbone = ablation.backbone
    paper = published.backbone(backbone, study.config.backbones[backbone])
    axes = _axes(ablation)
    depths = study.removed(backbone)
    rows = []
    for variant, series in study.ablation_rows(ablation.name):
        cells: list[Cell | None] = []
        for removed in depths:
            found = measures.accuracy(study, backbone, series, "buddy", removed)["average"]
            beside = published.ablation(number(name), paper, variant, removed) if study.whole_suite else None
            at = _coordinates(study, name, backbone, "buddy", variant, removed)
            cells.append(Cell({**at, "task": "average", "unit": "%"}, found, beside))
        rows.append(Row(tuple(_axis_label(axis, variant) for axis in axes), cells))
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
            f"Average accuracy over {len(study.tasks)} tasks in percent, best of each column bold.",
            *_held(study, axes, ablation),
            *_provenance(study, "accuracy", backbone),
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


def _latency(study: Study, name: str, table: Table) -> Grid:
    """Rows: data set, depth, execution; columns: rates, speed-ups, and the share of a sliced model's rate."""
    backbone = str(table.backbone)
    rows: list[Row] = []
    shown: set[str] = set()
    for dataset in study.config.latency.datasets:
        group = _latency_rows(study, name, backbone, dataset)
        if group:
            group[0].starts_group = True
        rows += group
        shown |= {metric for row in group for metric in _metrics_of(row)}
    columns = [metric for metric in LATENCY_METRICS if metric in shown or metric in _ALWAYS]
    for row in rows:
        by_metric = {cell.at["metric"]: cell for cell in row.cells if cell is not None}
        row.cells = [by_metric.get(metric) for metric in columns]
    settings = study.config.latency
    return Grid(
        name=name,
        caption=f"Prefill and decode speed of {backbone} ({study.blocks(backbone)} blocks) with blocks removed.",
        label_headers=("Data set", "Removed", "Execution"),
        headers=tuple(_LATENCY_HEADERS[metric] for metric in columns),
        rows=rows,
        error_note=PASSES_NOTE,
        notes=[
            f"Median of the timed passes over {settings.prompts} prompts, {settings.new_tokens} new tokens, batch "
            f"{settings.batch_size}; speed-up over the dense model timed in the same process.",
            *_provenance(study, "latency", backbone),
        ],
    )


_ALWAYS = ("prefill_tok_s", "prefill_speedup", "decode_tok_s", "decode_speedup")
_LATENCY_HEADERS = {
    "prefill_tok_s": "Prefill tok/s",
    "prefill_speedup": "Speed-up",
    "prefill_of_sliced": "Of sliced",
    "decode_tok_s": "Decode tok/s",
    "decode_speedup": "Speed-up",
    "decode_of_sliced": "Of sliced",
    "peak_memory_mb": "Peak MB",
}
_DECIMALS = {"tok/s": 1, "x": 2, "MB": 0}


def _latency_rows(study: Study, name: str, backbone: str, dataset: str) -> list[Row]:
    """Dense first; then at each depth what was timed, and BUDDY (recompute) whether timed or not."""
    rows = [_latency_row(study, name, backbone, dataset, "dense", 0)]
    for removed in study.removed(backbone):
        group = []
        for execution in ("sliced", "reuse", "recompute"):
            row = _latency_row(study, name, backbone, dataset, execution, removed)
            if execution == "recompute" or any(cell.measure.value is not None for cell in row.cells if cell):
                group.append(row)
        rows += group
    return rows


def _latency_row(study: Study, name: str, backbone: str, dataset: str, execution: str, removed: int) -> Row:
    paper = published.backbone(backbone, study.config.backbones[backbone], trained=False)
    method = {"recompute": "buddy", "reuse": "buddy"}.get(execution, execution)
    # The paper's BUDDY re-routes at every decode step; it times no sliced model.
    beside = published.latency(number(name), paper, method, removed, dataset) if execution != "reuse" else {}
    found = measures.latency(study, backbone, dataset, execution, removed)
    blocks = study.blocks(backbone)
    cells: list[Cell | None] = []
    for metric, unit in LATENCY_METRICS.items():
        if metric in found or metric in _ALWAYS:
            at = {
                **{"table": name, "study": study.name, "backbone": backbone, "dataset": dataset, "method": method},
                **{"execution": execution, "removed": removed, "executed": blocks - removed},
                **{"fraction": round((blocks - removed) / blocks, 6), "metric": metric, "unit": unit},
            }
            cells.append(Cell(at, found.get(metric, Measure()), beside.get(metric), _DECIMALS[unit]))
    return Row((DATASETS.get(dataset, dataset), str(removed), EXECUTIONS[execution]), cells)


def _metrics_of(row: Row) -> set[str]:
    return {cell.at["metric"] for cell in row.cells if cell is not None and cell.measure.value is not None}


def _provenance(study: Study, kind: str, backbone: str) -> list[str]:
    """One note on where and how often the records were measured."""
    rows = study.frame[(study.frame.kind == kind) & (study.frame.backbone == backbone)]
    told = {tuple(part for part in pair if isinstance(part, str)) for pair in zip(rows.device, rows.dtype, strict=True)}
    devices = sorted(", ".join(parts) for parts in told if parts)
    seeds = len(study.config.study.seeds)
    parts = [f"Measured on {' and '.join(devices)}."] if devices else []
    if kind == "accuracy" and seeds > 1:
        parts.append(f"{method_label('buddy')} is the mean of {seeds} seeds.")
    return [" ".join(parts)] if parts else []
