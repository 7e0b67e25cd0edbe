"""The route ribbon: which blocks ran for each token of a generation, at several budgets of one checkpoint.

Tokens across, blocks down, a row of panels per budget. Of each data set the first prompt is shown, and of the tasks, after
which nothing is generated, the prompt's route alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buddy.reporting import style
from buddy.reporting.labels import DATASETS, TASK_LABELS, fraction, series_labels, setting
from buddy.reporting.measured import Example, Trace
from buddy.reporting.study import Study
from buddy.reporting.style import empty
from buddy.study.planned_figures import subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Routes token by token"
BUDGETS = 3
"""Most rows: the shallowest, the middle and the deepest traced."""
TOKENS = 48
"""Most columns of all generations together; each shows its first tokens."""
LETTERS_IN = 17
"""Letters of a title per inch."""
STATES = ("Skipped", "Ran", "Ran, skipped elsewhere in its row")
COLOURS = ("#FFFFFF", "#C6DBEC", style.MARKS["buddy"].color)

Routes = NDArray[np.bool_]


def ribbon(study: Study) -> Figure:
    """The first prompt's generation of each data set, and the first prompt's route of each task, by budget."""
    for backbone in subjects(study.config, study.config.traced_backbones()):
        found = _examples(study, backbone)
        if found:
            return _ribbons(study, backbone, found)
    return empty(TITLE, "not measured: no traces of BUDDY that have an example")


def _examples(study: Study, backbone: str) -> dict[int, dict[str, Example]]:
    """The examples of BUDDY's first seed by removed blocks and data set, at most ``BUDGETS`` depths; those of data sets and
    tasks that were not traced at all of the depths are left out."""
    main = study.main(backbone)
    by_depth: dict[int, dict[str, Example]] = {}
    for one in study.of(Trace, backbone, main.path):
        if one.example is not None and one.seed == main.seeds[0]:
            by_depth.setdefault(one.removed or 0, {})[one.dataset] = one.example
    depths = sorted(by_depth)
    if len(depths) > BUDGETS:
        depths = [depths[0], depths[len(depths) // 2], depths[-1]]
    everywhere = set.intersection(*(set(by_depth[depth]) for depth in depths)) if depths else set()
    order = [name for name in (*DATASETS, *TASK_LABELS) if name in everywhere]
    return {depth: {name: by_depth[depth][name] for name in order} for depth in depths} if order else {}


class Strip(NamedTuple):
    """A panel: what it is called, its routes (passes, L), and the word below each."""

    title: str
    routes: Routes
    words: Sequence[str]


def _ribbons(study: Study, backbone: str, found: Mapping[int, Mapping[str, Example]]) -> Figure:
    from matplotlib.figure import Figure

    rows = {removed: _strips(examples) for removed, examples in found.items()}
    widths = [max(len(strip.routes) for strip in column) for column in zip(*rows.values(), strict=True)]
    width = style.COLUMN_IN if sum(widths) <= TOKENS // 2 else style.PAGE_IN
    figure = Figure(figsize=(width, 1.45 * len(rows) + 0.9), layout="constrained")
    grid = figure.subplots(len(rows), len(widths), squeeze=False, sharey=True, width_ratios=widths)
    blocks = study.blocks(backbone)
    for (removed, strips), row in zip(rows.items(), grid, strict=True):
        differ = _differ([strip.routes for strip in strips])
        for strip, axes, cells in zip(strips, row, widths, strict=True):
            _panel(axes, strip, differ, cells)
        row[0].set_ylabel(f"{blocks - removed} of {blocks} blocks\nbudget {fraction(blocks - removed, blocks)}")
    for strip, axes, cells in zip(rows[min(rows)], grid[0], widths, strict=True):
        name, _, prompt = strip.title.partition("\n")
        letters = int(LETTERS_IN * max((width - 0.6) * cells / sum(widths) - 0.1, 0.6))
        title = f"{name}\n{_printable(_end(prompt, letters))}".strip()
        axes.set_title(title, fontsize=7, parse_math=False)
    _legend(figure, study, backbone, any(len(strip.routes) > 1 for strip in rows[min(rows)]))
    return figure


def _strips(examples: Mapping[str, Example]) -> list[Strip]:
    """A strip for each data set, its prompt below its name, and one of all tasks."""
    sets = {name: one for name, one in examples.items() if name in DATASETS}
    tasks = {TASK_LABELS[name]: one for name, one in examples.items() if name not in DATASETS}
    most = TOKENS // max(1, len(sets))
    found = [
        Strip(f"{DATASETS[name]}\n{' '.join(one.prompt.split())}", np.array(one.routes[:most]), one.tokens[:most])
        for name, one in sets.items()
    ]
    return found + ([Strip("Tasks", np.array([one.routes[0] for one in tasks.values()]), [*tasks])] if tasks else [])


def _legend(figure: Figure, study: Study, backbone: str, generated: bool) -> None:
    from matplotlib.patches import Patch

    width = figure.get_figwidth()
    main = study.main(backbone)
    whose = (
        f"One checkpoint of {series_labels([main])[main.path]} at every budget, {setting(study, 'trace', backbone)}."
    )
    passes = "Above a token the pass that gave it; the first one read the prompt."
    notes = [whose, passes if generated else "The pass that read the prompt.", "Of a task its prompt's pass alone."]
    legend = figure.legend(
        [Patch(facecolor=colour, edgecolor=style.GREY, linewidth=0.4) for colour in COLOURS],
        STATES,
        loc="outside lower center",
        ncols=3 if width == style.PAGE_IN else 1,
        title=style.wrapped(" ".join(notes[: 2 + generated]), width),
        title_fontsize=style.NOTE_SIZE,
    )
    legend.get_title().set_multialignment("center")


def _differ(columns: Sequence[Routes]) -> Routes:
    """(L,) which blocks ran at some of the passes and not at others."""
    every = np.concatenate(columns)
    return np.asarray(every.any(0) & ~every.all(0))


def _panel(axes: Axes, strip: Strip, differ: Routes, cells: int) -> None:
    """Routes as columns, what they gave below; ``cells``: columns that there is room for."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    passes, blocks = strip.routes.shape
    states = strip.routes.astype(int) + (strip.routes & differ)
    axes.pcolormesh(
        np.arange(passes + 1) - 0.5,
        np.arange(blocks + 1) + 0.5,
        states.T,
        cmap=ListedColormap(COLOURS),
        vmin=0,
        vmax=2,
        edgecolors="white",
        linewidth=0.25,
    )
    axes.set_xlim(-0.5, cells - 0.5)
    axes.set_ylim(blocks + 0.5, 0.5)
    axes.set_yticks([1, *range(10, blocks + 1, 10)])
    told = [_printable(word.strip(" ") or word) for word in strip.words]
    axes.set_xticks(range(passes), told, rotation=90, fontsize=5.5, parse_math=False)
    axes.tick_params(length=0, pad=1)
    axes.spines[["left", "bottom"]].set_visible(False)
    # A frame: a generation that ended early is not one that skips.
    frame: dict[str, Any] = {"fill": False, "edgecolor": style.GREY, "linewidth": 0.5, "clip_on": False}
    axes.add_patch(Rectangle((-0.5, 0.5), passes, blocks, **frame))


def _end(text: str, letters: int) -> str:
    """The last words of a text that there is room for."""
    return text if len(text) <= letters else f"\N{HORIZONTAL ELLIPSIS} {text[2 - letters :].partition(' ')[2]}"


def _printable(text: str) -> str:
    """Text as the figures' font can print it: line breaks of a token as ``\\n``, what the font lacks as a square."""
    known = _letters()
    lines = [line.encode("unicode_escape").decode() if not line.isprintable() else line for line in text.split("\n")]
    joined = "\n".join(lines) if len(lines) > 1 and all(lines) else "\\n".join(lines)
    return "".join(letter if letter == "\n" or ord(letter) in known else "\N{WHITE SQUARE}" for letter in joined)


@cache
def _letters() -> frozenset[int]:
    """Code points that the figures' font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=style.FAMILY))).get_charmap())
