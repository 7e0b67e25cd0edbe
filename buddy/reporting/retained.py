"""What is left of a task's score where the budget predictor sets each input's depth, beside the share of blocks that ran (the
last panel of Figure 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buddy.reporting import published, style
from buddy.reporting.generation import FILTERS
from buddy.reporting.labels import DATASETS, TASK_LABELS
from buddy.reporting.measured import Accuracy, Generation, Score
from buddy.reporting.study import Series, Study
from buddy.reporting.style import gap
from buddy.resampling import ratio
from buddy.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Kept(NamedTuple):
    """Shares of one task, in percent: of the reference's score, its 95 % interval, and of the blocks."""

    score: float
    low: float
    high: float
    depth: float


def kept(study: Study, backbone: str) -> dict[str, dict[str, Kept]]:
    """Shares by preset and task, of the first seed; {} where nothing was scored."""
    whole = _whole_scores(study, backbone)
    main, found = study.main(backbone), dict[str, dict[str, Kept]]()
    for one in _scored(study, backbone, main):
        for task, scored in _scores(one).items() if one.preset and one.seed == main.seeds[0] else ():
            if task in whole and whole[task].value:
                share = 100 * scored.value / whole[task].value
                depth = 100 * (scored.executed_mean or 0.0) / study.blocks(backbone)
                left = Kept(share, *_ends(scored, whole[task], share), depth)
                found.setdefault(str(one.preset), {})[task] = left
    order = [preset for preset in study.config.predictor.presets if preset in found]
    return {preset: {task: found[preset][task] for task in _asked(study) if task in found[preset]} for preset in order}


def _asked(study: Study) -> list[str]:
    """The tasks and problems that may be scored at predicted depths, in the paper's order."""
    predictor, tasks = study.config.predictor, study.tasks
    return [*(task for task in TASKS if task in tasks or task in predictor.tasks), *predictor.problems]


def _scored(study: Study, backbone: str, series: Series, removed: int | None = None) -> list[Accuracy | Generation]:
    """Records of a series' scores and answers, at all depths or at one."""
    tasks = study.of(Accuracy, backbone, series.path, removed)
    return [*tasks, *study.of(Generation, backbone, series.path, removed)]


def _scores(record: Accuracy | Generation) -> dict[str, Score]:
    """By task or problem set the score that is shown: of answers the strict exact match, as in Table 12."""
    if isinstance(record, Accuracy):
        return dict(record.scores)
    return {task: score for (task, used), score in record.answers.items() if used == FILTERS[0]}


class Whole(NamedTuple):
    """What the whole model scores on a task: a fraction, and the share of seeds that got each item right, (n,)."""

    value: float
    items: NDArray[np.float64] | None


def _whole_scores(study: Study, backbone: str) -> dict[str, Whole]:
    """Of every task and problem set that the whole model was scored on: means over its seeds."""
    series = _whole_model(study, backbone)
    if series is None:
        return {}
    seeds: dict[str, list[Score]] = {}
    for one in _scored(study, backbone, series, 0):
        for task, score in _scores(one).items() if one.seed in series.seeds else ():
            seeds.setdefault(task, []).append(score)
    return {
        task: Whole(float(np.mean([one.value for one in scores])), _right([one.items for one in scores]))
        for task, scores in seeds.items()
    }


def _right(texts: Sequence[str | None]) -> NDArray[np.float64] | None:
    """Mean over texts of one digit per item, (n,); None where one is absent or of other items."""
    known = [np.frombuffer(text.encode(), np.uint8) - ord("0") for text in texts if text]
    if len(known) < len(texts) or len({len(one) for one in known}) != 1:
        return None
    return np.mean(known, axis=0, dtype=np.float64)


def _ends(scored: Score, whole: Whole, share: float) -> tuple[float, float]:
    """The interval of a share, by a paired bootstrap of the ratio; the share itself where a record has no items."""
    ours, theirs = _right([scored.items]), whole.items
    if ours is None or theirs is None or len(ours) != len(theirs) or not theirs.any():
        return share, share
    found = ratio([ours], [theirs])
    return 100 * found.low, 100 * found.high


def _whole_model(study: Study, backbone: str) -> Series | None:
    """What a score is a share of: the dense model, fine-tuned like the run where the study has that."""
    compared = {one.method: one for one in study.compared(backbone)}
    return compared.get("dense_lora") or compared.get("dense")


MOST_UPRIGHT = 5
"""Names of tasks that stand side by side in a column."""


def _beside(count: int) -> list[float]:
    """Sideways shifts of that many marks at one tick."""
    return [0.3 * (place - (count - 1) / 2) for place in range(count)]


def kept_panel(axes: Axes, study: Study, backbone: str, found: Mapping[str, Mapping[str, Kept]]) -> None:
    """Both shares of every task, a column of marks per preset: filled for the score, hollow for the depth."""
    tasks = [task for task in _asked(study) if any(task in shares for shares in found.values())]
    for (preset, shares), shift in zip(found.items(), _beside(len(found)), strict=True):
        places = [place + shift for place, task in enumerate(tasks) if task in shares]
        mine = [shares[task] for task in tasks if task in shares]
        mark = style.mark(preset)
        errors = [
            [gap(one.score, one.low) for one in mine],
            [gap(one.high, one.score) for one in mine],
        ]
        options: dict[str, Any] = {"linestyle": "none", "color": mark.color, "marker": mark.marker}
        axes.errorbar(places, [one.score for one in mine], yerr=errors, elinewidth=0.7, **options)
        axes.plot(places, [one.depth for one in mine], fillstyle="none", **options)
    paper = published.backbone(backbone, study.config.backbones[backbone])
    theirs = published.retention(paper, study.main(backbone).variant)
    shown = [(place, theirs[task]) for place, task in enumerate(tasks) if task in theirs]
    for which, marker in enumerate("x+"):
        axes.plot([at for at, _ in shown], [pair[which] for _, pair in shown], marker, color=style.GREY)
    rotation: dict[str, Any] = (
        {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(tasks) > MOST_UPRIGHT else {}
    )
    axes.set_xticks(range(len(tasks)), [{**TASK_LABELS, **DATASETS}[task] for task in tasks], **rotation)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0, None)
    axes.set_ylabel("Share (%)")
    whole = _whole_model(study, backbone)
    name = "dense model with LoRA" if whole and whole.method == "dense_lora" else "dense model"
    also = ";\npublished: cross and plus" if shown else ""
    axes.set_title(f"Filled: score, of the {name}'s; hollow: blocks that ran{also}", fontsize=7)
