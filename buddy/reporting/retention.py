"""What is left of a task's score where a budget predictor sets each input's depth, and how deep it went (Figure 13)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from buddy.reporting import measures, published, style
from buddy.reporting.labels import TASK_LABELS
from buddy.reporting.study import Series, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Kept(NamedTuple):
    """Shares of one task, in percent: of the reference's score, its standard error, and of the blocks."""

    score: float
    stderr: float | None
    depth: float


def measured(study: Study, backbone: str) -> dict[str, dict[str, Kept]]:
    """Shares by preset and task, of the first seed; {} where nothing was scored."""
    reference = _reference(study, backbone)
    main, found = study.main(backbone), dict[str, dict[str, Kept]]()
    for row in study.predicted_rows.get((backbone, main.path), []):
        full = reference.get(row["task"])
        if row["seed"] == main.seeds[0] and full:
            error = None if pd.isna(row["stderr"]) else 10_000 * row["stderr"] / full
            share = Kept(10_000 * row["value"] / full, error, 100 * row["executed_mean"] / study.blocks(backbone))
            found.setdefault(row["preset"], {})[row["task"]] = share
    order = [preset for preset in study.config.predictor.presets if preset in found]
    return {preset: {task: found[preset][task] for task in study.tasks if task in found[preset]} for preset in order}


def reference(study: Study, backbone: str) -> Series | None:
    """What a score is a share of: the dense model, fine-tuned like the run where the study has that."""
    compared = {one.method: one for one in study.compared(backbone)}
    return compared.get("dense_lora") or compared.get("dense")


def _reference(study: Study, backbone: str) -> dict[str, float]:
    """Scores of the whole model in percent, by task."""
    series = reference(study, backbone)
    scores = {} if series is None else measures.accuracy(study, backbone, series, 0)
    return {task: score.value for task, score in scores.items() if score.value}


def _beside(count: int) -> list[float]:
    """Sideways shifts of that many marks at one tick."""
    return [0.3 * (place - (count - 1) / 2) for place in range(count)]


def panel(axes: Axes, study: Study, backbone: str, found: Mapping[str, Mapping[str, Kept]]) -> None:
    """Both shares of every task, a column of marks per preset: filled for the score, hollow for the depth."""
    tasks = [task for task in study.tasks if any(task in shares for shares in found.values())]
    for (preset, shares), shift in zip(found.items(), _beside(len(found)), strict=True):
        places = [place + shift for place, task in enumerate(tasks) if task in shares]
        mine = [shares[task] for task in tasks if task in shares]
        mark = style.mark(preset)
        errors = [measures.NORMAL * (one.stderr or 0.0) for one in mine]
        options: dict[str, Any] = {"linestyle": "none", "color": mark.color, "marker": mark.marker}
        axes.errorbar(places, [one.score for one in mine], yerr=errors, elinewidth=0.7, **options)
        axes.plot(places, [one.depth for one in mine], fillstyle="none", **options)
    paper = published.backbone(backbone, study.config.backbones[backbone])
    theirs = published.retention(paper, study.main(backbone).variant)
    shown = [(place, theirs[task]) for place, task in enumerate(tasks) if task in theirs]
    for which, marker in enumerate("x+"):
        axes.plot([at for at, _ in shown], [pair[which] for _, pair in shown], marker, color=style.GREY)
    axes.set_xticks(range(len(tasks)), [TASK_LABELS[task] for task in tasks])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0, None)
    axes.set_ylabel("Percent")
    whole = reference(study, backbone)
    name = "dense model with LoRA" if whole and whole.method == "dense_lora" else "dense model"
    also = "; published: cross and plus" if shown else ""
    axes.set_title(f"Filled: score, of the {name}'s. Hollow: blocks executed{also}")
