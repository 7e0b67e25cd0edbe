"""How figures look: one column wide, 8 pt, a palette that colour-blind readers and grey printers can tell apart.

Colours are Okabe and Ito's (2008) with three of Tol's; a method keeps its colour, marker and line in every figure.
Files are the same bytes for the same records: no dates, no versions.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
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


MARKS = {
    "dense": Mark(INK, "D", DASHED),
    "dense_lora": Mark("#8C510A", "d", DASHDOTTED),
    "buddy": Mark("#0072B2", "o"),
    "buddy_tuned": Mark("#332288", "*", (0, (7, 1.2))),
    "recompute": Mark("#0072B2", "o"),
    "reuse": Mark("#D55E00", "s", (0, (4, 1.5))),
    "sliced": Mark("#555555", "^", (0, (5, 1.5, 1, 1.5))),
    "shortened_llama": Mark("#E69F00", "X", (0, (4, 1.5))),
    "shortgpt": Mark("#009E73", "s", (0, (5, 1.5, 1, 1.5))),
    "sleb": Mark("#CC79A7", "^", (0, (2, 1.2))),
    "pudding": Mark("#882255", "v", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    "first": Mark("#56B4E9", "P", (0, (1, 1.2))),
    # The budget predictor's presets, and what it is held against.
    "paper": Mark("#D55E00", "s", (0, (4, 1.5))),
    "tuned": Mark("#0072B2", "o"),
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


_RC: dict[str, Any] = {
    "font.family": "STIXGeneral",
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
