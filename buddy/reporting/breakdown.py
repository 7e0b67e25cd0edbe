"""What a pass and a routing step spend their time on (the paper's Table 8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buddy.reporting import measures, published
from buddy.reporting.grid import Cell, Grid, Row
from buddy.reporting.labels import (
    COMPONENTS,
    PREDICTOR,
    coordinates,
    either,
    number,
    one_path,
    provenance,
)
from buddy.reporting.latency import PASSES_NOTE
from buddy.reporting.measured import AUTO
from buddy.reporting.measures import Measure
from buddy.reporting.study import Study
from buddy.study.settings import Table


def breakdown(study: Study, name: str, table: Table) -> Grid:
    """Rows: depth, component; columns: milliseconds and share of the pass, prefill and decode step apart. Below it:
    what routing a decode step costs at longer contexts."""
    backbone = str(table.backbone)
    depths = study.removed(backbone)
    profiled = [one for removed in depths for one in measures.profiled(study, backbone, removed)]
    batch, tokens, steps = (either(getattr(one, of) for one in profiled) for of in ("batch_size", "tokens", "steps"))
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
    shape = next(iter(measures.profiled(study, backbone, removed)), study.config.breakdown)
    paper = published.backbone(backbone, study.config.backbones[backbone], trained=False)
    beside = published.breakdown(number(name), paper, shape.batch_size, shape.tokens)
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
