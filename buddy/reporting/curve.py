"""A budget curve of any folder of likelihood records, no study needed: what held-out text costs at each depth."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from buddy.errors import UserError
from buddy.reporting import measured, style
from buddy.reporting.labels import DATASETS, fraction, method_label
from buddy.reporting.measured import Figure, Likelihood
from buddy.reporting.measures import Measure
from buddy.reporting.summary import aligned
from buddy.storage.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn


@dataclass(frozen=True)
class Point:
    """One data set at one depth.

    Attributes:
        method, dataset, kv, decode: which line it is on.
        removed, blocks: of the backbone's blocks.
        nll: nats per token, with its 95 % interval.
        kl: nats of divergence from the whole backbone, and ``agreement``: share of tokens with the same most probable one.
        paths: distinct ones over all tokens.
    """

    method: str
    dataset: str
    kv: str
    decode: str
    removed: int
    blocks: int
    nll: Figure
    kl: Figure
    agreement: Figure
    paths: float

    @property
    def line(self) -> tuple[str, str, str, str]:
        """What it has in common with the other depths."""
        return self.method, self.dataset, self.kv, self.decode


def points(folder: str | Path) -> list[Point]:
    """What the records below a folder say, line by line, from the whole model down.

    Raises:
        UserError: it is no folder, or holds no likelihood record.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--records: {folder} is not a folder")
    records = [one for one in measured.load(folder)[0] if isinstance(one, Likelihood)]
    if not records:
        raise UserError(
            f"--records: {folder} holds no likelihood records; `buddy score --out {folder} ...` writes them"
        )
    found = [
        Point(
            method=one.method,
            dataset=name,
            kv=one.kv,
            decode=one.decode,
            removed=one.removed or 0,
            blocks=(one.executed or 0) + (one.removed or 0),
            nll=texts.figures["nll"],
            kl=texts.figures["kl"],
            agreement=texts.figures["agreement"],
            paths=one.paths,
        )
        for one in records
        for name, texts in one.datasets.items()
    ]
    return sorted(found, key=lambda point: (point.line, point.removed))


def table(found: Sequence[Point]) -> str:
    """The points as lines of text, a column each."""
    rows = [["method", "data", "removed", "budget", "nats", "95 % interval", "KL", "same", "paths"]]
    for point in found:
        rows.append(
            [
                method_label(point.method) + _modes(point, found),
                DATASETS.get(point.dataset, point.dataset),
                str(point.removed),
                fraction(point.blocks - point.removed, point.blocks),
                f"{point.nll.value:.3f}",
                f"{point.nll.low:.3f}-{point.nll.high:.3f}",
                f"{point.kl.value:.3f}",
                f"{100 * point.agreement.value:.1f} %",
                f"{point.paths:.0f}",
            ]
        )
    return "\n".join([*aligned(rows, labels=2), *_NOTES])


_NOTES = (
    "nats: per token of held-out text, with the 95 % interval of a bootstrap over its pieces; KL: nats of",
    "divergence from the whole backbone; same: tokens for which both hold the same one most probable;",
    "paths: distinct ones over all tokens, 1 is what a fixed list of blocks does.",
)


def save(found: Sequence[Point], stem: Path) -> list[Path]:
    """Write ``STEM.csv``, ``STEM.pdf`` and ``STEM.png``."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        [
            "method",
            "dataset",
            "kv",
            "decode",
            "removed",
            "budget",
            "nll",
            "nll_low",
            "nll_high",
            "kl",
            "agreement",
            "paths",
        ]
    )
    for one in found:
        budget = round((one.blocks - one.removed) / one.blocks, 6)
        figures = (one.nll.value, one.nll.low, one.nll.high, one.kl.value, one.agreement.value)
        rows.writerow([*one.line, one.removed, budget, *figures, one.paths])
    written = [write_bytes(stem.with_name(f"{stem.name}.csv"), text.getvalue().encode())]
    with style.applied():
        for kind, content in style.rendered(_drawn(found)).items():
            written.append(write_bytes(stem.with_name(f"{stem.name}.{kind}"), content))
    return written


def _drawn(found: Sequence[Point]) -> Drawn:
    figure, (axes,) = style.panels(1, 1, 3.4, 2.3)
    lines = list(dict.fromkeys(point.line for point in found))
    for place, line in enumerate(lines):
        of = [point for point in found if point.line == line]
        alike = [other[0] for other in lines[:place]].count(line[0])
        label = ", ".join([method_label(line[0]), DATASETS.get(line[1], line[1])]) + _modes(of[0], found)
        style.line(
            axes,
            [((one.blocks - one.removed) / one.blocks, Measure(one.nll.value)) for one in of],
            [
                [style.gap(one.nll.value, one.nll.low) for one in of],
                [style.gap(one.nll.high, one.nll.value) for one in of],
            ],
            style.mark(line[0] if line[0] in style.MARKS else "dense", alike),
            label,
        )
    axes.set_xlabel("Fraction of blocks executed")
    axes.set_ylabel("Nats per token of held-out text")
    return style.finish(figure, [axes], style.INTERVAL)


def _modes(point: Point, found: Sequence[Point]) -> str:
    """K/V policy and decode mode, where several were scored."""
    several = len({(one.kv, one.decode) for one in found}) > 1
    return f" ({point.kv}, {point.decode})" if several else ""
