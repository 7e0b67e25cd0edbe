"""The budget predictor: how it learned (Figure 12), what it is worth, and what is left of a task's score where it sets each
input's depth (Figure 13)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buddy.reporting import published, style
from buddy.reporting.generation import FILTERS
from buddy.reporting.labels import DATASETS, TASK_LABELS, setting
from buddy.reporting.measured import Accuracy, Generation, Points, Predicted, Score, Training
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, gap, panels, reason, whole_numbers
from buddy.resampling import ratio
from buddy.study.planned_figures import subjects
from buddy.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {"loss": "Loss", "reward": "Reward", "entropy": "Nats below the\nuniform entropy"}
UNIFORM = "Uniform policy"
DECIDED = "One depth for each input"
RANDOM = "Same depths, random inputs"
COLUMNS = 4
"""Panels side by side in Figure 13."""
PRESETS = {"paper": "Paper's recipe", "tuned": "Tuned recipe"}


def training_curves(study: Study) -> Figure:
    """Figure 12: loss, reward and entropy while the predictor is trained, a column per preset.

    Entropy is drawn as what it lacks to that of the policy that picks every depth equally often, the dashed line: a policy
    that stays there has learned nothing, one that reaches the dotted line has one depth for each input. Several seeds are
    thin lines of one colour.
    """
    presets = list(study.config.predictor.presets)
    found = {preset: _curves(study, preset) for preset in presets}
    figure, every = panels(len(CURVES), len(presets), style.COLUMN_IN, 1.1, share=False)
    for place, axes in enumerate(every):
        name, preset = list(CURVES)[place // len(presets)], presets[place % len(presets)]
        if place < len(presets):
            axes.set_title(PRESETS[preset])
        _curve_panel(axes, name, preset, found[preset])
        if place % len(presets) == 0:
            axes.set_ylabel(CURVES[name])
        if place >= len(every) - len(presets) and found[preset]:
            axes.set_xlabel("Update" if preset == "paper" else "Pass")
    figure.align_ylabels(every[:: len(presets)])
    trained = [one.backbone for curves in found.values() for one in curves]
    return finish(figure, every, setting(study, "training", *dict.fromkeys(trained)) if trained else None)


def _curves(study: Study, preset: str) -> list[Training]:
    """The trainings of a preset's predictors, one per seed, of the first backbone that has any."""
    for backbone in subjects(study.config, study.config.predicting_backbones()):
        main = study.main(backbone)
        trained = study.of(Training, backbone, main.path)
        found = [one for one in trained if one.preset == preset and one.seed in main.seeds]
        if found:
            return sorted(found, key=lambda one: one.seed)
    return []


def _curve_panel(axes: Axes, name: str, preset: str, trained: Sequence[Training]) -> None:
    curves = [one.curve.get(name, ()) for one in trained]
    if not any(curves):
        reason(axes, f"not measured: no {name} of a predictor by {PRESETS[preset].lower()}")
        return
    uniform = trained[0].entropy_uniform
    for curve in curves:
        steps, values = (np.array([pair[of] for pair in curve]) for of in range(2))
        shown = uniform - values if name == "entropy" else values
        axes.plot(steps, shown, color=style.mark(preset).color, linewidth=1.0 if len(curves) == 1 else 0.6, zorder=3)
    axes.ticklabel_format(useOffset=False)
    if name == "entropy":
        axes.axhline(0, color=style.GREY, linewidth=0.9, linestyle=style.DASHED, label=UNIFORM)
        axes.axhline(uniform, color=style.GREY, linewidth=0.9, linestyle=style.DOTTED, label=DECIDED)
        axes.set_ylim(-0.08 * uniform, 1.08 * uniform)


def against_constant(study: Study) -> Figure:
    """Figure 13: what the predictor is worth on held-out inputs, and the depths it chose, per data set.

    First panel: cross-entropy against mean depth on the first data set. Then, per data set, how far each line is below
    constant depths at the same mean depth (their lower hull, which mixing two constants at random reaches): above 0 it
    pays to look at the input. The oracle knows every input's losses. Intervals of 95 % over inputs, paired for the gain.
    Last, where tasks were scored at the predictor's depths, what is left of each one's score (`_kept_panel`).
    """
    backbone, found = _evaluated(study)
    planned = study.config.predictor.datasets
    datasets = sorted({name for _, name in found}, key=lambda name: (name not in planned, [*planned, name].index(name)))
    if not datasets:
        return empty("Predictor against constant depth", "not measured: no budget records of a predictor")
    presets = list(dict.fromkeys(preset for preset, _ in found))
    kept = _kept(study, backbone)
    figure, above, below, lowest = _layout(len(datasets), len(presets), kept=bool(kept))
    for place, (dataset, axes) in enumerate(zip([datasets[0], *datasets], above, strict=True)):
        shown = {preset: found[preset, dataset] for preset in presets if (preset, dataset) in found}
        label = TASK_LABELS.get(dataset, DATASETS.get(dataset, dataset))
        axes.set_title(f"{label}: gain" if place else f"{label}: nats per token")
        (_gain_panel if place else _frontier_panel)(axes, shown)
        if place >= len(above) - COLUMNS:
            axes.set_xlabel("Mean depth (blocks)")
    if lowest is not None:
        _kept_panel(lowest, study, backbone, kept)
    most = max(max(metrics.histogram) / max(1, sum(metrics.histogram)) for metrics in found.values())
    for preset, axes in zip(presets, below, strict=True):
        chosen = {dataset: found[preset, dataset] for dataset in datasets if (preset, dataset) in found}
        image = _choices_panel(axes, chosen, most)
        axes.set_title(f"{PRESETS.get(preset, preset)}: depths chosen")
    figure.colorbar(image, ax=below, label="Share of inputs", pad=0.02)
    return finish(figure, above)


def _layout(datasets: int, presets: int, kept: bool) -> tuple[Figure, list[Axes], list[Axes], Axes | None]:
    """Panels of the data sets, below them one per preset, and where scores were kept one more."""
    from matplotlib.figure import Figure

    count = datasets + 1
    columns = 2 if datasets == 1 else min(COLUMNS, count)
    rows = math.ceil(count / columns)
    low = 0.75 + 0.15 * datasets
    width = style.COLUMN_IN if datasets == 1 else style.PAGE_IN
    stacked = presets if datasets == 1 else 1
    heights = [1.6] * rows + [low] * stacked + [1.5] * kept
    figure = Figure(figsize=(width, sum(heights) + 0.35), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns * presets, height_ratios=heights)
    above = [
        figure.add_subplot(grid[place // columns, slice(presets * (place % columns), presets * (place % columns + 1))])
        for place in range(count)
    ]
    spans = [(rows + place, slice(None)) for place in range(presets)]
    if stacked == 1:
        spans = [(rows, slice(columns * place, columns * (place + 1))) for place in range(presets)]
    below = [figure.add_subplot(grid[span]) for span in spans]
    return figure, above, below, figure.add_subplot(grid[-1, :]) if kept else None


def _evaluated(study: Study) -> tuple[str, dict[tuple[str, str], Predicted]]:
    """The first backbone that has any records, and those of the first seed by preset and data set."""
    for backbone in subjects(study.config, study.config.predicting_backbones()):
        main = study.main(backbone)
        records = study.of(Predicted, backbone, main.path)
        found = {(str(one.preset), str(one.dataset)): one for one in records if one.seed == main.seeds[0]}
        if found:
            return backbone, found
    return "", {}


def _frontier_panel(axes: Axes, shown: Mapping[str, Predicted]) -> None:
    """Cross-entropy against mean depth: constants with their band, oracle, presets, and their depths on random inputs."""
    _band(axes, _widest(shown)[0].constants)
    _points(axes, _widest(shown)[0].oracle, "oracle", "Oracle")
    for preset, metrics in shown.items():
        random = [{**point, "ce_mean": point["random"]} for point in metrics.predictor]
        _points(axes, random, "random", RANDOM)
        _points(axes, metrics.predictor, preset, PRESETS.get(preset, preset))
    _limits(axes, shown)


def _widest(shown: Mapping[str, Predicted]) -> list[Predicted]:
    """The records, that of a preset with prices first: its table of depths is the one that its points lie on."""
    return sorted(shown.values(), key=lambda metrics: metrics.price is None)


def _gain_panel(axes: Axes, shown: Mapping[str, Predicted]) -> None:
    """Nats below constant depths at the same mean depth."""
    axes.axhline(0, color=style.mark("constant").color, linewidth=0.9, zorder=1)
    first = _widest(shown)[0]
    depths, hull = (np.array([corner[of] for corner in first.hull]) for of in ("depth_mean", "ce_mean"))
    oracle = [
        {**point, "gain": float(np.interp(point["depth_mean"], depths, hull)) - point["ce_mean"]}
        for point in first.oracle
    ]
    _points(axes, oracle, "oracle", "Oracle", "gain")
    for preset, metrics in shown.items():
        points = metrics.predictor
        _points(
            axes, [{**point, "gain": point["constant"] - point["random"]} for point in points], "random", RANDOM, "gain"
        )
        _points(axes, points, preset, PRESETS.get(preset, preset), "gain")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * len(shown) * (high - low))
    told = [f"{preset} {_gain(metrics)}" for preset, metrics in shown.items()]
    axes.text(0.98, 0.98, "\n".join(told), transform=axes.transAxes, ha="right", va="top", fontsize=6)
    whole_numbers(axes)


def _gain(metrics: Predicted) -> str:
    """How far a predictor is below constant depths, with its interval."""
    gain = metrics.gain
    return f"{gain['value']:.2f} [{gain['low']:.2f}, {gain['high']:.2f}]"


def _band(axes: Axes, points: Points) -> None:
    depths, means, low, high = ([point[of] for point in points] for of in ("depth_mean", "ce_mean", "low", "high"))
    mark = style.mark("constant")
    axes.fill_between(depths, low, high, color=mark.color, alpha=0.15, linewidth=0)
    axes.plot(depths, means, label="Constant depth", **mark.line())


def _points(axes: Axes, points: Points, mark: str, label: str, of: str = "ce_mean") -> None:
    """Points in the order of their depth, a preset's with intervals; prices that lead to the same point are one."""
    once = [point for _, point in sorted({(point["depth_mean"], point[of]): point for point in points}.items())]
    ends = ("gain_low", "gain_high") if of == "gain" else ("low", "high")
    bars = (
        [[gap(point[of], point[ends[0]]) for point in once], [gap(point[ends[1]], point[of]) for point in once]]
        if mark in PRESETS
        else None
    )
    depths, values = [point["depth_mean"] for point in once], [point[of] for point in once]
    axes.errorbar(depths, values, yerr=bars, elinewidth=0.6, label=label, **style.mark(mark).line())


def _limits(axes: Axes, shown: Mapping[str, Predicted]) -> None:
    """Show the depths that the predictors reach: constants far below them cost several times as much."""
    blocks = max(metrics.blocks for metrics in shown.values())
    points = [point for metrics in shown.values() for point in metrics.predictor]
    least = min(point["depth_mean"] for point in points)
    lowest = min(point["ce_mean"] for metrics in shown.values() for point in metrics.oracle)
    highest = max(max(point["high"], point["random"]) for point in points)
    span = max(blocks - least, 1.0)
    axes.set_xlim(least - 0.08 * span, blocks + 0.05 * span)
    whole_numbers(axes)
    axes.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))


def _choices_panel(axes: Axes, found: Mapping[str, Predicted], most: float) -> Any:
    """The depths chosen at a predictor's own price, a row per data set; returns the image."""
    blocks = max(metrics.blocks for metrics in found.values())
    shares = np.zeros((len(found), blocks))
    for row, metrics in zip(shares, found.values(), strict=True):
        row[np.array(metrics.choices) - 1] = np.array(metrics.histogram) / max(1, sum(metrics.histogram))
    image = axes.imshow(
        shares, cmap=style.HEAT, vmin=0, vmax=most, aspect="auto", extent=(0.5, blocks + 0.5, len(found), 0)
    )
    axes.set_yticks(
        [place + 0.5 for place in range(len(found))],
        [TASK_LABELS.get(name, DATASETS.get(name, name)) for name in found],
    )
    least = min(min(metrics.choices) for metrics in found.values())
    axes.set_xlim(least - 0.5, blocks + 0.5)
    axes.tick_params(length=0)
    axes.set_xlabel("Depth (blocks)")
    whole_numbers(axes)
    return image


class Kept(NamedTuple):
    """Shares of one task, in percent: of the reference's score, its 95 % interval, and of the blocks."""

    score: float
    low: float
    high: float
    depth: float


def _kept(study: Study, backbone: str) -> dict[str, dict[str, Kept]]:
    """Shares by preset and task, of the first seed; {} where nothing was scored."""
    whole = _whole_scores(study, backbone)
    main, found = study.main(backbone), dict[str, dict[str, Kept]]()
    for one in _scored(study, backbone, main):
        for task, scored in _scores(one).items() if one.preset and one.seed == main.seeds[0] else ():
            if task in whole and whole[task].value:
                share = 100 * scored.value / whole[task].value
                depth = 100 * (scored.executed_mean or 0.0) / study.blocks(backbone)
                kept = Kept(share, *_ends(scored, whole[task], share), depth)
                found.setdefault(str(one.preset), {})[task] = kept
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


def _beside(count: int) -> list[float]:
    """Sideways shifts of that many marks at one tick."""
    return [0.3 * (place - (count - 1) / 2) for place in range(count)]


def _kept_panel(axes: Axes, study: Study, backbone: str, found: Mapping[str, Mapping[str, Kept]]) -> None:
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
    axes.set_xticks(range(len(tasks)), [{**TASK_LABELS, **DATASETS}[task] for task in tasks])
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(0, None)
    axes.set_ylabel("Percent")
    whole = _whole_model(study, backbone)
    name = "dense model with LoRA" if whole and whole.method == "dense_lora" else "dense model"
    also = "; published: cross and plus" if shown else ""
    axes.set_title(f"Filled: score, of the {name}'s. Hollow: blocks executed{also}")
