"""Which paths BUDDY takes: how many in one generation (Figure 4), and which blocks run (Figures 6, 9, 10 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from buddy.reporting import published, style
from buddy.reporting.labels import DATASETS, TASK_LABELS
from buddy.reporting.panels import empty, finish, panels, reason, removed_axis
from buddy.reporting.study import Study
from buddy.resampling import mean_interval
from buddy.study.planned_figures import HEAT_MAPS, subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR = style.MARKS["buddy"].color
_LINES = {
    "alpaca": style.Mark(_COLOUR, "o"),
    "samsum": style.Mark(_COLOUR, "s", style.DASHED),
    "gsm8k": style.Mark(_COLOUR, "^", style.DOTTED),
}
"""Data sets whose prompts are answered by generation: all are BUDDY, so all have its colour."""


def paths_per_generation(study: Study) -> Figure:
    """Figure 4: distinct paths in a generation against depth, a line per data set; mean with 95 % interval over prompts."""
    title = "Distinct paths per generation"
    for backbone in subjects(study.config, study.config.traced_backbones()):
        found = _paths(study, backbone)
        if found:
            break
    else:
        return empty(title, "not measured: no traces of BUDDY")
    figure, (axes,) = panels(1, 1, style.COLUMN_IN, 1.8)
    axes.set_title(f"{title}, {backbone}")
    for dataset, points in found.items():
        means, low, high = (np.array([points[removed][of] for removed in points]) for of in range(3))
        bars = [means - low, high - means]
        line = _LINES[dataset].line()
        axes.errorbar(list(points), means, yerr=bars, elinewidth=0.7, label=DATASETS[dataset], **line)
        _published_paths(study, backbone, axes, dataset)
    removed_axis(axes, [0, *study.removed(backbone)])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Blocks removed")
    axes.set_ylabel("Paths")
    prompts = {int(row["prompts"]) for row in _traced(study, backbone) if row["dataset"] in found}
    return finish(figure, [axes], f"Mean over {' or '.join(map(str, sorted(prompts)))} prompts, 95 % interval")


def _traced(study: Study, backbone: str, removed: int | None = None) -> list[dict[str, Any]]:
    """Rows of BUDDY's traces, with its first seed."""
    main = study.main(backbone)
    depths = study.removed(backbone) if removed is None else [removed]
    rows = [row for depth in depths for row in study.trace_rows.get((backbone, main.path, depth), [])]
    return [row for row in rows if row["seed"] == main.seeds[0]]


def _paths(study: Study, backbone: str) -> dict[str, dict[int, tuple[float, float, float]]]:
    """By data set and depth: mean over prompts and its 95 % interval."""
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for row in _traced(study, backbone):
        if row["metric"] == "distinct_paths_per_generation" and row["dataset"] in _LINES:
            found.setdefault(row["dataset"], {})[int(row["removed"])] = mean_interval(row["values"])
    return {name: found[name] for name in sorted(found)}


def _published_paths(study: Study, backbone: str, axes: Axes, dataset: str) -> None:
    """The paper's figures, if it is the paper's backbone and variant: the same line in grey."""
    paper = published.backbone(backbone, study.config.backbones[backbone])
    points = published.figure(4, paper, study.main(backbone).variant, dataset)
    if points:
        line = {**_LINES[dataset].line(), "color": style.GREY, "fillstyle": "none", "linewidth": 0.8}
        axes.plot(list(points), list(points.values()), label=f"{DATASETS[dataset]}, published", **line)


def heat_map(name: str, study: Study) -> Figure:
    """Figures 6, 9, 10 and 11: the share of passes in which each block ran, a row per data set, at one of the depths."""
    place = HEAT_MAPS[name]
    backbones = [
        one for one in subjects(study.config, study.config.traced_backbones()) if len(study.removed(one)) > place
    ]
    for backbone in backbones:
        removed = study.removed(backbone)[place]
        rows = [row for row in _traced(study, backbone, removed) if row["metric"] == "block_frequency"]
        if rows:
            return _heat_panel(study, backbone, removed, {row["dataset"]: row["values"] for row in rows})
    why = "no traces of BUDDY at this depth" if backbones else f"no traced backbone has {place + 1} depths"
    return empty("Executed blocks by task", f"not measured: {why}")


def _heat_panel(study: Study, backbone: str, removed: int, found: Mapping[str, tuple[float, ...]]) -> Figure:
    order = [*TASK_LABELS, *DATASETS]
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    figure, (axes,) = panels(1, 1, style.COLUMN_IN, 0.55 + 0.19 * max(3, len(names)))
    blocks = study.blocks(backbone)
    lengths = {len(values) for values in found.values()}
    if lengths != {blocks}:
        reason(axes, f"not drawn: the traces have {lengths} blocks, {backbone} has {blocks}")
        return figure
    # A white grid keeps single cells apart in print.
    image = axes.pcolormesh(
        np.arange(blocks + 1) + 0.5,
        np.arange(len(names) + 1),
        np.array([found[name] for name in names]),
        cmap=style.HEAT,
        vmin=0,
        vmax=1,
        edgecolors="white",
        linewidth=0.2,
    )
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(names)) + 0.5, [TASK_LABELS.get(name, DATASETS.get(name, name)) for name in names])
    axes.set_xticks([1, *range(5, blocks + 1, 5)])
    axes.tick_params(length=0)
    axes.set_xlabel("Block")
    axes.set_title(f"{backbone}, {removed} of {blocks} blocks removed")
    figure.colorbar(image, ax=axes, label="Share of passes", pad=0.02)
    return figure
