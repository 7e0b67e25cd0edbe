"""The budget predictor: how it learned (Figure 12), and what it is worth (Figure 13)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from buddy.reporting import style
from buddy.reporting.labels import DATASETS, TASK_LABELS, setting
from buddy.reporting.measured import Points, Predicted, Training
from buddy.reporting.retained import kept, kept_panel
from buddy.reporting.study import Study
from buddy.reporting.style import empty, finish, gap, panels, reason, whole_numbers
from buddy.study.planned_figures import subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES = {"loss": "Loss", "reward": "Reward", "entropy": "Nats below the\nuniform entropy"}
UNIFORM = "Uniform policy"
DECIDED = "One depth for each input"
RANDOM = "Same depths, random inputs"
POOLED = "all"
"""What stands for all data sets together in records."""
PRESETS = {"paper": "Paper's recipe", "tuned": "Tuned recipe", "rise": "Rise recipe"}
POINTS = {"paper": "Update", "tuned": "Pass", "rise": "Penalty, from the largest"}
"""What a curve is over."""


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
            axes.set_xlabel(POINTS[preset])
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

    Above, on the first data set: cross-entropy against mean depth, and how far each line is below constant depths at the same
    mean depth (their lower hull, which mixing two constants at random reaches): above 0 it pays to look at the input. The
    oracle knows every input's losses. Predictors of another loss than the first one's are left out there. Then the mean gain
    over all prices, each in its own loss, data set by data set, and the depths chosen. Last, where tasks were scored at them, what is left of each one's score (`buddy.reporting.retained`).
    """
    backbone, found = _evaluated(study)
    planned = study.config.predictor.datasets
    datasets = sorted({name for _, name in found}, key=lambda name: (name not in planned, [*planned, name].index(name)))
    if not datasets:
        return empty("Predictor against constant depth", "not measured: no budget records of a predictor")
    presets = sorted({preset for preset, _ in found}, key=lambda preset: [*PRESETS, preset].index(preset))
    left = kept(study, backbone)
    figure, frontier, gain, own, chosen, lowest = _layout(len(datasets), len(presets), scored=bool(left))
    first = _of_one_loss({preset: found[preset, datasets[0]] for preset in presets if (preset, datasets[0]) in found})
    _frontier_panel(frontier, first)
    _gain_panel(gain, first)
    frontier.set_title(_named(datasets[0]))
    gain.set_title(_named(datasets[0]))
    _own_panel(own, found, datasets, presets)
    if lowest is not None:
        kept_panel(lowest, study, backbone, left)
    most = max(max(metrics.histogram) / max(1, sum(metrics.histogram)) for metrics in found.values())
    for place, (preset, axes) in enumerate(zip(presets, chosen, strict=True)):
        image = _choices_panel(axes, {name: found.get((preset, name)) for name in datasets}, most)
        axes.set_title(f"{PRESETS.get(preset, preset)}: depths chosen", fontsize=7)
        axes.tick_params(labelleft=place == 0)
    figure.colorbar(image, ax=chosen, label="Share of inputs", pad=0.02)
    told = f"{style.INTERVAL} over the inputs; gain: nats per token below constant depths of the same mean"
    return finish(figure, [frontier, gain, own], f"{setting(study, 'budget', backbone)}; {told}")


def _named(dataset: str) -> str:
    return {**TASK_LABELS, **DATASETS, POOLED: "All, pooled"}.get(dataset, dataset)


def _layout(datasets: int, presets: int, scored: bool) -> tuple[Figure, Axes, Axes, Axes, list[Axes], Axes | None]:
    """Panels of one column: frontier and gain side by side, the gains by data set, the depths chosen by preset, and where
    tasks were scored one more."""
    from matplotlib.figure import Figure

    low = 0.6 + 0.14 * datasets
    heights = [1.7, 0.55 + 0.15 * datasets, low] + [1.75] * scored
    figure = Figure(figsize=(style.COLUMN_IN, sum(heights) + 0.35), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2 * presets, height_ratios=heights)
    frontier, gain = figure.add_subplot(grid[0, :presets]), figure.add_subplot(grid[0, presets:])
    own = figure.add_subplot(grid[1, :])
    chosen = [figure.add_subplot(grid[2, slice(2 * place, 2 * place + 2)]) for place in range(presets)]
    return figure, frontier, gain, own, chosen, figure.add_subplot(grid[3, :]) if scored else None


def _evaluated(study: Study) -> tuple[str, dict[tuple[str, str], Predicted]]:
    """The first backbone that has any records, and those of the first seed by preset and data set."""
    for backbone in subjects(study.config, study.config.predicting_backbones()):
        main = study.main(backbone)
        records = study.of(Predicted, backbone, main.path)
        found = {(str(one.preset), str(one.dataset)): one for one in records if one.seed == main.seeds[0]}
        if found:
            return backbone, found
    return "", {}


LOSSES = {"ce": "Loss (nats per token)", "kl": "KL (nats per token)"}


def _of_one_loss(shown: Mapping[str, Predicted]) -> dict[str, Predicted]:
    """The presets whose losses are of the kind that the first one's are: others stand on no common axis with them."""
    kinds = [metrics.loss for metrics in shown.values()]
    return {preset: metrics for preset, metrics in shown.items() if metrics.loss == kinds[0]}


def _frontier_panel(axes: Axes, shown: Mapping[str, Predicted]) -> None:
    """Cross-entropy against mean depth: constants with their band, oracle, presets, and their depths on random inputs."""
    _band(axes, _widest(shown)[0].constants)
    _points(axes, _widest(shown)[0].oracle, "oracle", "Oracle")
    for preset, metrics in shown.items():
        random = [{**point, "ce_mean": point["random"]} for point in metrics.predictor]
        _points(axes, random, "random", RANDOM)
        _points(axes, metrics.predictor, preset, PRESETS.get(preset, preset))
    _limits(axes, shown)
    axes.set_xlabel("Mean depth (blocks)")
    axes.set_ylabel(LOSSES[_widest(shown)[0].loss])


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
    axes.set_xlabel("Mean depth (blocks)")
    axes.set_ylabel("Gain (nats per token)")
    whole_numbers(axes)


def _own_panel(
    axes: Axes, found: Mapping[tuple[str, str], Predicted], datasets: Sequence[str], presets: Sequence[str]
) -> None:
    """The mean gain over all prices: a row per data set, a mark per preset, with its interval."""
    axes.axvline(0, color=style.mark("constant").color, linewidth=0.9, zorder=1)
    for row, dataset in enumerate(datasets):
        for place, preset in enumerate(presets):
            if (preset, dataset) in found:
                gain = found[preset, dataset].gain
                mark = style.mark(preset)
                bars = [[gap(gain["value"], gain["low"])], [gap(gain["high"], gain["value"])]]
                at = row + 0.28 * (place - (len(presets) - 1) / 2)
                axes.errorbar(gain["value"], at, xerr=bars, color=mark.color, marker=mark.marker, elinewidth=0.7)
    axes.set_yticks(range(len(datasets)), [_named(name) for name in datasets])
    axes.set_ylim(len(datasets) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Mean gain over all prices (nats per token)")


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


def _choices_panel(axes: Axes, found: Mapping[str, Predicted | None], most: float) -> Any:
    """The depths chosen at a predictor's own price, a row per data set; returns the image."""
    known = [metrics for metrics in found.values() if metrics is not None]
    blocks = max(metrics.blocks for metrics in known)
    shares = np.full((len(found), blocks), np.nan)  # what was not evaluated stays white
    for row, metrics in zip(shares, found.values(), strict=True):
        if metrics is not None:
            row[:] = 0
            row[np.array(metrics.choices) - 1] = np.array(metrics.histogram) / max(1, sum(metrics.histogram))
    image = axes.imshow(
        shares, cmap=style.HEAT, vmin=0, vmax=most, aspect="auto", extent=(0.5, blocks + 0.5, len(found), 0)
    )
    axes.set_yticks([place + 0.5 for place in range(len(found))], [_named(name) for name in found])
    axes.set_xlim(min(min(metrics.choices) for metrics in known) - 0.5, blocks + 0.5)
    axes.tick_params(length=0)
    axes.set_xlabel("Depth (blocks)")
    whole_numbers(axes)
    return image
