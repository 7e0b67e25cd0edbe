"""Where the saving goes: from the time that a depth would take if nothing but blocks took time, to the time measured.

Step by step, in percent of the dense model's time for a decoded token: what stays outside the blocks (the model with as many
blocks cut out), what routing adds where the trained run chooses the paths, and what a batch adds whose sequences go ways of
their own (routes drawn for each of them, the worst case).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from buddy.reporting import measures, style
from buddy.reporting.labels import DATASETS, series_labels, setting
from buddy.reporting.measures import Measure
from buddy.reporting.study import Race, Study
from buddy.reporting.style import empty, finish, gap, panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Where the saving goes"
IDEAL = "Ideal: blocks that run"
STEPS = {
    "sliced": ("Outside the blocks", style.MARKS["sliced"].color),
    "recompute": ("Routing, paths of the run", style.MARKS["buddy"].color),
    "varied": ("Paths drawn for each sequence", "#E69F00"),
}
"""What each execution adds to the one before it, and its colour."""
PANELS = 3
"""Most batch sizes: the smallest, a middle one and the largest."""


class Level(NamedTuple):
    """Percent of the dense model's time: the median, and the 10th and 90th percentile of the timed passes."""

    value: float
    low: float
    high: float


def savings(study: Study) -> Figure:
    """A panel per batch size of the first timed backbone; in it, per depth, the steps from the ideal to what was measured."""
    for backbone in study.config.timed_backbones():
        races = [race for race in _races(study, backbone) if any(_levels(study, backbone, race).values())]
        if races:
            break
    else:
        return empty(TITLE, "not measured: no latency records of BUDDY or of a model with blocks cut out")
    if len(races) > PANELS:
        races = [races[0], races[len(races) // 2], races[-1]]
    found = [_levels(study, backbone, race) for race in races]
    steps = [name for name in STEPS if any(name in each for levels in found for each in levels.values())]
    figure, every = panels(1, len(races), style.COLUMN_IN, 2.0)
    for race, levels, axes in zip(races, found, every, strict=True):
        _panel(axes, levels, {removed: _ideal(study, backbone, removed) for removed in levels}, steps)
        axes.set_title(f"batch {race.batch_size}")
        axes.set_xlabel("Blocks removed")
    every[0].set_ylabel("Time per decoded token,\n% of the dense model's")
    style.span(every[0].set_ylim, [100, *_reached(study, backbone, found)])
    return finish(figure, every, _note(study, backbone, races))


def _races(study: Study, backbone: str) -> list[Race]:
    """Those of the shown engine and data set, by batch size."""
    shown = study.shown_races(backbone)[0]
    return [one for one in study.races(backbone) if (one.dataset, one.engine) == (shown.dataset, shown.engine)]


def _levels(study: Study, backbone: str, race: Race) -> dict[int, dict[str, Level]]:
    """By depth what was timed of the steps."""
    found: dict[int, dict[str, Level]] = {}
    for removed in study.removed(backbone):
        timed = {name: measures.latency(study, backbone, race, name, removed).get("decode_speedup") for name in STEPS}
        found[removed] = {name: _level(one) for name, one in timed.items() if one is not None and one.value}
    return found


def _level(speed_up: Measure) -> Level:
    """Time from speed-up."""
    value, low, high = (100 / (one or speed_up.value or 1.0) for one in (speed_up.value, speed_up.high, speed_up.low))
    return Level(value, low, high)


def _ideal(study: Study, backbone: str, removed: int) -> float:
    return 100 * (1 - removed / study.blocks(backbone))


def _reached(study: Study, backbone: str, found: Sequence[Mapping[int, Mapping[str, Level]]]) -> list[float]:
    """What the axis has to hold: ideals and medians."""
    medians = [level.value for levels in found for each in levels.values() for level in each.values()]
    return [*medians, *(_ideal(study, backbone, removed) for removed in study.removed(backbone))]


def _panel(
    axes: Axes, levels: Mapping[int, Mapping[str, Level]], ideals: Mapping[int, float], steps: Sequence[str]
) -> None:
    axes.axhline(100, color=style.INK, linewidth=0.9, linestyle=style.DASHED, zorder=1, label="Dense")
    width = 0.72 / len(steps)
    for place, (removed, found) in enumerate(levels.items()):
        before = ideals[removed]
        axes.hlines(before, place - 0.36, place + 0.36, color="#A8A8A8", linewidth=1.4, zorder=2, label=IDEAL)
        for step, name in enumerate(steps):
            if name in found:
                _step(axes, place - 0.36 + width * (step + 0.5), width, before, found[name], name)
                before = found[name].value
    axes.set_xticks(range(len(levels)), [str(removed) for removed in levels])
    axes.set_xlim(-0.6, len(levels) - 0.4)
    axes.tick_params(axis="x", length=0)


def _step(axes: Axes, place: float, width: float, before: float, level: Level, name: str) -> None:
    """From one level to the next, up or, where it is faster, down."""
    label, colour = STEPS[name]
    axes.bar(place, level.value - before, width, bottom=before, color=colour, label=label, zorder=3, linewidth=0)
    bars = [[gap(level.value, level.low)], [gap(level.high, level.value)]]
    axes.errorbar(place, level.value, yerr=bars, color=style.INK, elinewidth=0.6, marker="_", markersize=5, zorder=4)


def _note(study: Study, backbone: str, races: Sequence[Race]) -> str:
    main = study.main(backbone)
    label = series_labels([main])[main.path]
    race = races[0]
    several = {race.batch_size: _paths(study, backbone, race) for race in races}
    known = [f"{size}: {mean:.1f}" for size, mean in several.items() if mean is not None and size > 1]
    paths = [f"Paths of the run at once, by batch: {', '.join(known)}."] if known else []
    dataset = DATASETS.get(race.dataset, race.dataset)
    told = f"{label}, {setting(study, 'latency', backbone)}, {dataset}, {race.engine}."
    return " ".join([told, *paths, f"Bars: {style.PASSES}."])


def _paths(study: Study, backbone: str, race: Race) -> float | None:
    """The most distinct paths that sequences of the trained run took at once, on average over steps, at any depth."""
    found = [measures.latency(study, backbone, race, "recompute", removed) for removed in study.removed(backbone)]
    known = [one["paths_mean"].value for one in found if "paths_mean" in one]
    return max((value for value in known if value is not None), default=None)
