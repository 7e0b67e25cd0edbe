"""How figures look, and what they share: marks, panels, the axis of depths, lines with bars, one legend below all panels,
and a reason in place of what was not measured.

One column wide, 8 pt, a palette that colour-blind readers and grey printers can tell apart: Okabe and Ito's (2008) with
three of Tol's; a method keeps its colour, marker and line in every figure. Files are the same bytes for the same records:
no dates, no versions.
"""

from __future__ import annotations

import io
import logging
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from buddy.methods import METHODS, Method
from buddy.reporting.labels import fraction
from buddy.reporting.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN_IN = 3.4
PAGE_IN = 7.0
DPI = 200
INK = "#222222"
HEAT = "cividis"
"""Colour map of heat maps: even in lightness, so it prints in grey."""
GREY = "#767676"
DASHED = (0, (3.6, 1.6))
DOTTED = (0, (1, 1.6))
DASHDOTTED = (0, (3.6, 1.4, 1, 1.4))


@dataclass(frozen=True)
class Mark:
    """Colour, marker, dash and filling of one line."""

    color: str
    marker: str
    dash: Any = "-"
    fill: Literal["full", "none", "left", "right", "bottom", "top"] = "full"

    def line(self) -> dict[str, Any]:
        """Keyword arguments of a matplotlib line."""
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash, "fillstyle": self.fill}


def _of(method: Method) -> Mark:
    color, marker, dashes = method.mark or (GREY, "p", ())
    return Mark(color, marker, (0, dashes) if dashes else "-")


MARKS = {
    **{name: _of(method) for name, method in METHODS.items()},
    "buddy_tuned": Mark("#332288", "*", (0, (7, 1.2))),
    "recompute": Mark("#0072B2", "o"),
    "reuse": Mark("#D55E00", "s", (0, (4, 1.5))),
    "sliced": Mark("#555555", "^", (0, (5, 1.5, 1, 1.5))),
    # The budget predictor's presets, and what it is held against.
    "paper": Mark("#D55E00", "s", (0, (4, 1.5))),
    "tuned": Mark("#0072B2", "o"),
    "rise": Mark("#CC79A7", "v", (0, (3, 1, 1, 1))),
    "constant": Mark("#555555", "^", (0, (5, 1.5, 1, 1.5))),
    "random": Mark("#E69F00", "X", (0, (2, 1.2))),
    "oracle": Mark("#009E73", "D", (0, (1, 1.2))),
}
FILLS: tuple[Literal["full", "none", "left", "right", "bottom", "top"], ...] = (
    *("full", "none", "left", "right", "bottom", "top"),
)


def mark(name: str, variant: int = 0) -> Mark:
    """The mark of a method or execution; its second, third, ... variant has the same with the marker filled otherwise."""
    return replace(MARKS[name], fill=FILLS[variant % len(FILLS)])


FAMILY = "STIXGeneral"
_RC: dict[str, Any] = {
    "font.family": FAMILY,
    "mathtext.fontset": "stix",
    "font.size": 8,
    "text.hinting": "none",
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.titlepad": 4,
    "axes.labelpad": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.6,
    "errorbar.capsize": 1.6,
    "legend.frameon": False,
    "legend.handlelength": 2.7,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.3,
    "legend.borderaxespad": 0.2,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "pdf.fonttype": 42,
}


@contextmanager
def applied() -> Iterator[None]:
    """Draw and save inside this: the settings hold here and nowhere else in the process."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(_RC)
        logging.getLogger("fontTools").setLevel(logging.WARNING)  # it tells every glyph it embeds
        yield


def rendered(figure: Figure) -> dict[str, bytes]:
    """The figure as the bytes of a PDF and of a PNG at 200 dpi, the same for the same figure."""
    metadata: dict[str, dict[str, Any]] = {
        "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
        "png": {"Software": None},
    }
    files = {}
    for kind, fields in metadata.items():
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=DPI, metadata=fields)
        files[kind] = stream.getvalue()
    return files


LEGEND_IN = 0.6
"""Height of a legend that the heights of `panels` allow for, inches."""
ONE_ERROR = "\N{PLUS-MINUS SIGN} one standard error"
PASSES = "10th to 90th percentile of the timed passes"
INTERVAL = "95 % intervals"
"""What bars of figures are, the one or the other."""
PUBLISHED = "ublished"
REFERENCES = ("Uniform policy", "Chance", "Ideal: blocks / executed")
"""Entries of legends that come after what was measured, like those whose label ends with ``PUBLISHED``."""


def panels(rows: int, columns: int, width: float, height: float, share: bool = True) -> tuple[Figure, list[Axes]]:
    """Panels in reading order; ``width`` of the figure, ``height`` of a row, inches; ``share``: one vertical axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=share).ravel().tolist()


def reason(axes: Axes, text: str) -> None:
    """Leave a panel empty but for why it is."""
    axes.set_axis_off()
    inches = axes.get_window_extent().width / axes.figure.dpi
    told = textwrap.fill(text, max(16, int(15 * inches)))
    axes.text(0.5, 0.5, told, transform=axes.transAxes, ha="center", va="center", color=GREY, style="italic")


def wrapped(text: str, width: float) -> str:
    """Text below a figure in lines of its width, inches."""
    return "\n".join(textwrap.wrap(text, int(LETTERS_PER_IN * width)))


LETTERS_PER_IN = 22
"""Letters of a note per inch."""
NOTE_SIZE = 7
LINE_IN = 0.13
"""Size of its letters, and height of a line."""


def empty(title: str, text: str) -> Figure:
    """A figure of one column that only says why there is nothing to draw."""
    figure, (axes,) = panels(1, 1, COLUMN_IN, 1.2)
    axes.set_title(title)
    reason(axes, text)
    return figure


def line(axes: Axes, points: Sequence[tuple[float, Measure]], errors: Any, mark: Mark, label: str) -> None:
    """A line through measured points, with bars of these half lengths, if there are any points."""
    if points:
        xs, ys = [x for x, _ in points], [float(point.value or 0.0) for _, point in points]
        axes.errorbar(xs, ys, yerr=errors, elinewidth=0.7, label=label, zorder=3, **mark.line())


def budget_axis(axes: Axes, depths: Sequence[int], blocks: int) -> None:
    """Blocks removed below, fraction executed above."""
    removed_axis(axes, depths)
    axes.set_xlabel("Blocks removed")
    above = axes.secondary_xaxis("top")
    above.set_xticks(depths, [fraction(blocks - removed, blocks) for removed in depths])
    above.set_xlabel("Fraction of blocks executed")
    above.spines["top"].set_visible(False)
    above.tick_params(length=0, pad=1)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def removed_axis(axes: Axes, depths: Sequence[int]) -> None:
    """Blocks removed, a tick at each depth."""
    margin = 0.06 * depths[-1]
    axes.set_xlim(-margin, depths[-1] + margin)
    axes.set_xticks(depths)


def span(set_limits: Callable[[float, float], Any], values: Iterable[float | None], margin: float = 0.06) -> None:
    """Let an axis reach over these values and a little more, whatever bars stick out."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    room = margin * ((high - low) or 1.0)
    set_limits(low - room, high + room)


def cut_bars(axes: Axes, points: Iterable[tuple[float, Measure]], sideways: bool = False) -> None:
    """An arrow at the edge of the panel where the bar of a point goes on beyond it.

    Args:
        axes: with the limits that it will have.
        points: where on the other axis each measurement stands.
        sideways: whether the bars are horizontal.
    """
    limits = axes.get_xlim() if sideways else axes.get_ylim()
    options: dict[str, Any] = {"color": INK, "markersize": 3, "linestyle": "none", "zorder": 5, "clip_on": False}
    for other, point in points:
        below = point.low is not None and point.low < limits[0]
        above = point.high is not None and point.high > limits[1]
        for cut, edge, marker in ((below, limits[0], "<v"), (above, limits[1], ">^")):
            if cut:
                place = ([edge], [other]) if sideways else ([other], [edge])
                axes.plot(*place, marker=marker[0 if sideways else 1], **options)


def shifts(lines: int, deepest: int, step: float = 0.014) -> list[float]:
    """Sideways shifts, in blocks, that keep the error bars of neighbouring lines apart: at most 3 % of the axis."""
    step = min(step, 0.06 / max(1, lines - 1)) * deepest
    return [step * (place - (lines - 1) / 2) for place in range(lines)]


def gap(upper: float | None, lower: float | None) -> float:
    """Length of a bar between two figures, 0 where one is unknown."""
    return max(0.0, upper - lower) if upper is not None and lower is not None else 0.0


def finish(figure: Figure, panels: Sequence[Axes], note: str | None = None) -> Figure:
    """Add one legend below all panels, each entry once, in as few rows as fit, under a note on the figure, which is wrapped
    to its width; and return the figure."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    # Reference curves come after what was measured.
    entries = {
        label: entries[label]
        for label in sorted(entries, key=lambda label: label in REFERENCES or label.endswith(PUBLISHED))
    }
    if entries:
        _legend(figure, entries, note)
    elif note:
        footnote(figure, note)
    return figure


def footnote(figure: Figure, note: str) -> None:
    """What a figure without a legend has to say of itself, below its panels, which keep their size."""
    told = wrapped(note, figure.get_figwidth())
    figure.set_figheight(figure.get_figheight() + LINE_IN * (1 + told.count("\n")))
    figure.supxlabel(told, fontsize=NOTE_SIZE)


def _legend(figure: Figure, entries: Mapping[str, Any], note: str | None) -> None:
    """A legend in as few rows as fit under its note."""
    told = wrapped(note, figure.get_figwidth()) if note else None
    height = figure.get_figheight()
    figure.set_figheight(height + len(entries))  # room for any legend while they are tried
    for rows in range(1, len(entries) + 1):
        columns = math.ceil(len(entries) / rows)
        # matplotlib fills a legend column by column; people read row by row.
        labels = [label for start in range(columns) for label in list(entries)[start::columns]]
        handles = [entries[label] for label in labels]
        options: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
        legend = figure.legend(handles, labels, title=told, title_fontsize=NOTE_SIZE, **options)
        legend.get_title().set_multialignment("center")
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            # Panels keep their size under a legend of many methods.
            figure.set_figheight(height + max(0.0, legend.get_window_extent().height / figure.dpi - LEGEND_IN))
            break
        legend.remove()
