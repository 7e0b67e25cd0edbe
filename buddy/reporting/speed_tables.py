"""Tables of time: prefill and decode speed, and what a pass and a routing step spend their time on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

from buddy.reporting import measures, published
from buddy.reporting.coordinates import coordinates, either, number, one_path, provenance
from buddy.reporting.frame import AUTO
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import COMPONENTS, DATASETS, EXECUTIONS, PREDICTOR
from buddy.reporting.measures import LATENCY_METRICS, Measure
from buddy.reporting.study import Race, Study
from buddy.study.settings import Table

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
        error_note=PASSES_NOTE,
        notes=[
            *_latency_notes(study, backbone, shown),
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
            cells.append(Cell(at, found.get(metric, Measure()), beside.get(metric), DECIMALS[unit]))
    span = f"{min(depths)}\N{EN DASH}{max(depths)}" if depths else str(removed)
    dataset = DATASETS.get(race.dataset, race.dataset)
    label = EXECUTIONS[execution] + ("" if slack is None else f", slack {slack}")
    return Row((dataset, str(race.batch_size), race.engine, span, label), cells)


def _metrics_of(row: Row) -> set[str]:
    return {cell.at["metric"] for cell in row.cells if cell is not None and cell.measure.value is not None}


def _latency_notes(study: Study, backbone: str, shown: set[str]) -> list[str]:
    """How it was timed, by the records, and what the columns that are shown mean."""
    rows = [row for race in study.races(backbone) for row in study.race_rows(backbone, race)]
    notes = [how_timed(study, rows)]
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
    captured = [[row["value"] for row in rows if row["metric"] == f"capture_{of}"] for of in ("seconds", "memory_mb")]
    if all(captured):
        seconds, megabytes = map(max, captured)
        notes.append(f"Capturing the graphs of one execution took at most {seconds:.1f} s and {megabytes:.0f} MB.")
    return notes


def how_timed(study: Study, rows: Sequence[Mapping[str, Any]]) -> str:
    """How the records behind these rows of the frame were timed."""
    told = [either(row[of] for row in rows) for of in ("prompts", "new_tokens")]
    over = f" over {told[0]} prompts, {told[1]} new tokens" if rows else ""
    return (
        f"Median of the timed passes{over}, batch {either(study.config.latency.batch_sizes)}. Executions take turns "
        "within a pass; a speed-up is the median over passes of the ratio to the dense model in the same pass and engine."
    )


def breakdown(study: Study, name: str, table: Table) -> Grid:
    """Rows: depth, component; columns: milliseconds and share of the pass, prefill and decode step apart. Below it:
    what routing a decode step costs at longer contexts."""
    backbone = str(table.backbone)
    depths = study.removed(backbone)
    profiled = [row for removed in depths for row in measures.profiled(study, backbone, removed)]
    batch, tokens, steps = (either(row[of] for row in profiled) for of in ("batch_size", "tokens", "steps"))
    mean, predicted = measures.predicted_breakdown(study, backbone)
    auto = {**_everywhere(study, name, backbone), "execution": AUTO}
    grid = Grid(
        name=name,
        caption=f"What BUDDY's prefill and decode step spend their time on, {backbone} "
        f"({study.blocks(backbone)} blocks).",
        label_headers=("Removed", "Component"),
        headers=("Prefill ms", "%", "Decode ms", "%"),
        rows=[
            *(row for removed in depths for row in _breakdown_rows(study, name, backbone, removed)),
            *(_component_rows(AUTO, auto, predicted, {}) if predicted else ()),
        ],
        below=_routing_cost(study, name, backbone),
    )
    if profiled:
        grid.notes.append(
            f"By the profiler: a prefill of {batch} x {tokens} tokens and the mean of {steps} decode steps after it, each "
            "of the repeat whose total is the median. The profiler takes time of its own: small shares are upper bounds."
        )
    if predicted:
        grid.notes.append(
            f"Auto: the budget predictor chooses each sequence's depth, here {mean:.1f} blocks on average."
        )
    if grid.has_published:
        grid.notes.append(PUBLISHED_BREAKDOWN_NOTE)
    grid.notes += one_path(study, backbone, [study.main(backbone)])
    grid.notes += provenance(study, "breakdown", backbone)
    return grid


PUBLISHED_BREAKDOWN_NOTE = (
    "The paper (5 x 256 tokens, an A100) names neither depth nor phase for its figures; that many tokens at once are a "
    "prefill, so they stand in its columns, at every depth. They do not add up to 100 %: 79.50 + 5.67 + 3.28 = 88.45."
)


def _breakdown_rows(study: Study, name: str, backbone: str, removed: int) -> list[Row]:
    """Components of one depth and their total."""
    found = measures.breakdown(study, backbone, removed)
    rows, settings = measures.profiled(study, backbone, removed), study.config.breakdown
    shape = (rows[0]["batch_size"], rows[0]["tokens"]) if rows else (settings.batch_size, settings.tokens)
    paper = published.backbone(backbone, study.config.backbones[backbone], trained=False)
    beside = published.breakdown(number(name), paper, *map(int, shape))
    at = coordinates(study, name, backbone, study.main(backbone), removed)
    return _component_rows(str(removed), at, found, beside)


def _everywhere(study: Study, name: str, backbone: str) -> dict[str, Any]:
    """Coordinates of what has no one depth."""
    at = coordinates(study, name, backbone, study.main(backbone), 0)
    return {key: value for key, value in at.items() if key not in ("removed", "executed", "fraction")}


def _component_rows(
    depth: str,
    at: Mapping[str, Any],
    found: Mapping[tuple[str, str, str], Measure],
    beside: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    shown: list[Row] = []
    for component, label in COMPONENTS.items():
        if component == PREDICTOR and depth != AUTO:
            continue
        cells: list[Cell | None] = []
        for phase in ("prefill", "decode"):
            for metric, unit in (("ms", "ms"), ("percent", "%")):
                # It is asked at the prefill alone.
                absent = component == PREDICTOR and phase == "decode"
                if absent or (component in ("total", "unprofiled") and metric == "percent"):
                    cells.append(None)
                    continue
                theirs = beside.get(component, {}).get(metric) if phase == "prefill" else None
                where = {**at, "phase": phase, "component": component, "metric": metric, "unit": unit}
                cells.append(Cell(where, found.get((phase, component, metric), Measure()), theirs))
        shown.append(Row((depth, label), cells, starts_group=not shown))
    return shown


def _routing_cost(study: Study, name: str, backbone: str) -> Grid | None:
    """Routing of one decode step by context: the running sum, and what scoring the whole context again would cost."""
    at, rows = _everywhere(study, name, backbone), []
    for context, found in measures.routing_cost(study, backbone).items():
        cells: list[Cell | None] = [
            Cell({**at, "context": context, "metric": metric, "unit": "ms"}, found[metric], decimals=3)
            for metric in ("routing_ms", "reread_ms")
        ]
        rows.append(Row((str(context),), cells))
    if not rows:
        return None
    return Grid(
        name="routing_cost",
        caption=f"Routing one decode step of {backbone} after a context of that many tokens.",
        label_headers=("Context",),
        headers=("Routing ms", "Re-reading ms"),
        rows=rows,
        error_note=PASSES_NOTE,
        notes=["Routing: the new token is scored and added to a running sum. Re-reading: the whole context is scored."],
    )
