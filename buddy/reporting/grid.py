"""A table before it is written: rows of measured cells, ranked, with the paper's figures beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from buddy.reporting.measures import NORMAL, Array, Measure
from buddy.reporting.study import Series
from buddy.resampling import estimate

FIGURES = (
    *("value", "stderr", "p10", "p90", "seed_sd", "n", "seeds"),
    *("published", "difference", "executed_mean", "limit", "note"),
)
"""Columns of a tidy CSV after the coordinates of the cell (see `buddy.reporting.measures.Measure`)."""


NEAR = "among the best: inside the noise"
WIDE = 0.2
"""Share of a speed-up above which its standard error leaves little of it: a timed pass has stalled."""
BEYOND = 1.05
"""Times the ideal, a whole model's blocks over those that run, above which a speed-up is not depth's alone."""


@dataclass
class Cell:
    """One cell.

    Attributes:
        at: its coordinates, the first columns of its row in the CSV.
        measure: what was measured.
        published: the paper's figure for the same cell, in the same unit.
        decimals: shown digits after the point.
        rank: 1 best (bold), 2 second (underlined), 0 neither.
        near: whether it is the best or inside its noise, where that holds several, none of which is then bold.
        doubt: why its figure is not to be relied on; "" where nothing speaks against it.
        text: shown in place of the number.
    """

    at: Mapping[str, Any]
    measure: Measure
    published: float | None = None
    decimals: int = 2
    rank: int = 0
    near: bool = False
    doubt: str = ""
    text: str = ""

    def doubted(self, ideal: float) -> Cell:
        """The cell of a speed-up, with what its own error or the ideal speak against it."""
        value, error = self.measure.value, self.measure.stderr
        wide = value is not None and error is not None and error > WIDE * abs(value)
        beyond = value is not None and value > BEYOND * ideal
        told = [f"its error is above {WIDE:.0%} of it" if wide else "", "it is above the ideal" if beyond else ""]
        return replace(self, doubt=" and ".join(filter(None, told)))

    def record(self) -> dict[str, Any]:
        """The cell as one row of the CSV; the difference is ours minus the paper's."""
        measure = self.measure
        known = measure.value is not None and self.published is not None
        difference = measure.value - self.published if known else None  # type: ignore[operator]
        limited = limit_text([measure.limit]) if measure.limit is not None else ""
        return {
            **self.at,
            **{name: getattr(measure, name) for name in ("value", "stderr", "seed_sd", "n", "seeds")},
            **{name: getattr(measure, name) for name in ("executed_mean", "limit")},
            "p10": measure.low,
            "p90": measure.high,
            "published": self.published,
            "difference": difference,
            "note": "; ".join(filter(None, [measure.note, limited, NEAR if self.near else "", self.doubt, self.text])),
        }


@dataclass
class Row:
    """A row of a table.

    Attributes:
        labels: of its columns to the left.
        cells: None is a cell that has no meaning here.
        starts_group: whether a new group of rows starts with it.
        unshown: cells that only the CSV has.
    """

    labels: tuple[str, ...]
    cells: list[Cell | None]
    starts_group: bool = False
    unshown: list[Cell] = field(default_factory=list)

    @property
    def limited(self) -> bool:
        """Whether any of it was measured on a part of a task only."""
        return any(cell is not None and cell.measure.limit is not None for cell in self.cells)


@dataclass
class Grid:
    """A whole table.

    Attributes:
        name: ``table2``.
        caption: one sentence.
        label_headers, headers: of the label columns and of the cells.
        rows: from top to bottom.
        error_note: what ± means, printed where errors are.
        latex_errors: indices of the columns whose standard error LaTeX shows (Markdown shows all).
        notes: lines under the table.
        below: a second table in the same files, with columns of its own.
        tidy: rows of its CSV, where one row is not one cell.
    """

    name: str
    caption: str
    label_headers: tuple[str, ...]
    headers: tuple[str, ...]
    rows: list[Row]
    error_note: str = ""
    latex_errors: frozenset[int] = frozenset()
    notes: list[str] = field(default_factory=list)
    below: Grid | None = None
    tidy: list[dict[str, Any]] | None = None

    @property
    def has_published(self) -> bool:
        """Whether the paper has a figure for any of its cells."""
        return any(cell is not None and cell.published is not None for row in self.rows for cell in row.cells)

    def records(self) -> list[dict[str, Any]]:
        """The tidy table: one dictionary per cell, or what ``tidy`` has."""
        if self.tidy is not None:
            return self.tidy
        own = [cell.record() for row in self.rows for cell in [*row.cells, *row.unshown] if cell is not None]
        return own + (self.below.records() if self.below else [])


def rank(cells: Iterable[Cell | None], second: bool = True, lowest: bool = False) -> None:
    """Mark the best of the cells and, if asked, the second best, as they read after rounding. The best is the highest, or
    the lowest. Where others read the same or are inside its noise, they and it are marked as that, and none is best.

    A cell measured at another depth than it stands for does not compete. With fewer than two that do there is nothing to
    compare and nothing is marked.
    """
    measured = [cell for cell in cells if cell is not None and cell.measure.value is not None]
    measured = [cell for cell in measured if not cell.measure.off_depth]
    if len(measured) < 2:
        return
    from scipy.stats import rankdata

    shown = np.array([float(f"{cell.measure.value:.{cell.decimals}f}") for cell in measured])
    places = rankdata(shown if lowest else -shown, method="min")
    first = measured[int(np.argmin(places))]
    others = [(cell, place) for cell, place in zip(measured, places, strict=True) if cell is not first]
    near = [cell for cell, place in others if place == 1 or inside_noise(first.measure, cell.measure)]
    if near:
        for cell in (first, *near):
            cell.near = True
        return
    first.rank = 1
    for cell, place in others:
        cell.rank = 2 if second and place == 2 else 0


NOISE_RESAMPLES = 2000
CLEAR = (1.0, 4.0)
"""Standard errors of a difference below which it is noise, and above which it is not, whatever the shape of its items."""
NOISE_NOTE = (
    f"\N{ALMOST EQUAL TO} {NEAR}; none is bold where the 95 % interval of a difference from the best holds 0, by a paired "
    "bootstrap over the items (where a record has no items, by both standard errors). Not corrected for the number of rows; "
    "another training would add noise of its own."
)


def inside_noise(one: Measure, other: Measure) -> bool:
    """Whether the 95 % interval of the difference of two figures holds 0: by a paired bootstrap over the items that both
    have, else by their standard errors, as if independent; without either nothing speaks against the difference."""
    if one.samples and [len(each) for each in one.samples] == [len(each) for each in other.samples]:
        gaps = [ours - theirs for ours, theirs in zip(one.samples, other.samples, strict=True)]
        middle, error = abs(float(np.mean([gap.mean() for gap in gaps]))), _spread(gaps)
        if not CLEAR[0] * error <= middle <= CLEAR[1] * error:  # no bootstrap says otherwise
            return middle < CLEAR[0] * error
        found = estimate(gaps, NOISE_RESAMPLES)
        return found.low <= 0 <= found.high
    errors = (_error(one), _error(other))
    if errors[0] is None or errors[1] is None or one.value is None or other.value is None:
        return False
    return abs(one.value - other.value) <= NORMAL * math.hypot(errors[0], errors[1])


def _error(measure: Measure) -> float | None:
    """The standard error, of the items where they are known: what is printed may be half of an interval."""
    return measure.stderr if not measure.samples else _spread(measure.samples)


def _spread(groups: Sequence[Array]) -> float:
    """Standard error of the mean of the groups' means."""
    return math.sqrt(sum(float(np.var(each, ddof=min(1, len(each) - 1))) / len(each) for each in groups)) / len(groups)


def rank_columns(rows: Sequence[Row], series: Sequence[Series], lowest: Sequence[bool] | None = None) -> None:
    """Rank columns among the rows of one depth: those with LoRA, and apart from them those without.

    Args:
        rows: of one depth.
        series: what each row shows.
        lowest: of each column from the left whether its lowest is best, and no column after; None: in all the highest.
    """
    for lora in ("trained", "none"):
        group = [row for row, one in zip(rows, series, strict=True) if one.lora == lora]
        for column, low in enumerate(lowest or [False] * (len(group[0].cells) if group else 0)):
            rank((row.cells[column] for row in group), lowest=low)


def rank_note(rows: Iterable[Row], series: Iterable[Series]) -> list[str]:
    """What bold, underlined and the mark of noise mean, if anything is."""
    cells = [cell for row in rows for cell in row.cells if cell is not None]
    pruned = {one.lora for one in series if one.depths != (0,)}
    apart = ", with LoRA and without it apart" if len(pruned) > 1 else ""
    ranked = any(cell.rank for cell in cells)
    told = [f"At each depth the best method is bold, the second underlined{apart}."] if ranked else []
    return told + noise_note(cells)


def noise_note(cells: Iterable[Cell | None]) -> list[str]:
    """What the mark of noise means, if any cell has it."""
    return [NOISE_NOTE] if any(cell is not None and cell.near for cell in cells) else []


def doubt_note(rows: Iterable[Row]) -> list[str]:
    """What the mark of a doubtful speed-up means, if any has it."""
    if not any(cell is not None and cell.doubt for row in rows for cell in row.cells):
        return []
    return [
        f"\N{DOUBLE DAGGER}: not to be relied on: its error is above {WIDE:.0%} of it (a timed pass stalled), or it is more than "
        f"{BEYOND - 1:.0%} above the ideal, the model's blocks over those that run."
    ]


OFF_DEPTH_NOTE = (
    "(ran N): the mean number of blocks that really ran, where it is not the one asked for; such a row is not ranked."
)


def ran(measures: Iterable[Measure]) -> str:
    """`` (ran 27.3)`` where any of a row's figures was measured at another depth than asked for, else ""; one number
    per figure where they differ."""
    found = list(measures)
    if not any(measure.off_depth for measure in found):
        return ""
    means = ["\N{EN DASH}" if measure.executed_mean is None else f"{measure.executed_mean:.1f}" for measure in found]
    return f" (ran {' / '.join(means[:1] if len(set(means)) == 1 else means)})"


def limit_text(limits: Iterable[int | None]) -> str:
    """``limited to N items per task`` for the limits found."""
    found = sorted({limit for limit in limits if limit is not None})
    return f"limited to {' or '.join(map(str, found))} items per task"


def add_notes(grid: Grid) -> Grid:
    """Append the notes that its cells call for: other depths, limited rows, missing cells, missing seeds."""
    cells = [cell for row in grid.rows for cell in row.cells if cell is not None and not cell.text]
    if any(cell.measure.off_depth for cell in cells):
        grid.notes.append(OFF_DEPTH_NOTE)
    limits = {cell.measure.limit for cell in cells} - {None}
    if limits:
        grid.notes.append(f"† {limit_text(limits)}.")
    if any(cell.measure.value is None for cell in cells):
        grid.notes.append("\N{EN DASH} not measured.")
    partial = {cell.measure.note for cell in cells if cell.measure.note.endswith(("seeds", "depths", "runs"))}
    if partial:
        grid.notes.append(f"Incomplete: some cells have {' or '.join(sorted(partial))}.")
    if grid.below is not None:
        add_notes(grid.below)
    return grid
