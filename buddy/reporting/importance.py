"""In which order blocks would be removed: from window to window (Figures 1, 7 and 8) and by context length (Figure 2).

The order of a window ranks its blocks by importance: the least important would be removed first. Where the boxes are
long, or the rows differ, no fixed order suits every input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from buddy.reporting import style
from buddy.reporting.labels import INDICATORS, setting
from buddy.reporting.measured import Importance
from buddy.reporting.study import Study
from buddy.reporting.style import empty, finish, panels, reason
from buddy.settings import corpus_name
from buddy.study.planned_figures import ORDERS, orders, subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PTB = "ptb"
COLOURS = {"delta_ppl": "#0072B2", "taylor": "#D55E00", "cosine": "#009E73", "block_influence": "#CC79A7"}


BOXES = "boxes: quartiles over the windows, with the median; whiskers: 5th to 95th percentile"


def removal_orders(windows: Sequence[Sequence[float]]) -> np.ndarray:
    """The place of each block in each window's order of removal.

    Args:
        windows: (N, L) importance of each block in each window; larger is more important.

    Returns:
        (N, L) float64, 1 for the block removed first to L for the last; equal blocks share the mean of their places.
    """
    from scipy.stats import rankdata

    return np.asarray(rankdata(windows, axis=1))


def own_corpus(study: Study) -> Figure:
    """Figure 1: box plots of the removal order over windows of the study's calibration corpus."""
    return _boxes(study, "figure1", [None])


def other_corpus(study: Study) -> Figure:
    """Figure 7: the same on the study's other corpora."""
    return _boxes(study, "figure7", [*_others(study)])


def other_indicators(study: Study) -> Figure:
    """Figure 8: the same by further indicators, on the calibration corpus and on others where they were measured."""
    found = {one.corpus for one in _records(study) if one.indicator in ORDERS["figure8"]}
    return _boxes(study, "figure8", [None, *(other for other in _others(study) if other in found)])


def _records(study: Study) -> list[Importance]:
    return [one for one in study.records if isinstance(one, Importance)]


def _others(study: Study) -> list[str]:
    """Other corpora than the study's own: those that it plans; else PTB, unless only a third one was measured."""
    if study.config.ordered_backbones() and study.config.orders.corpora:
        return [corpus_name(corpus) for corpus in study.config.orders.corpora]
    found = {one.corpus for one in _records(study) if one.corpus is not None}
    return [PTB if PTB in found or not found else min(found)]


def _boxes(study: Study, name: str, corpora: Sequence[str | None]) -> Figure:
    """A row per indicator and corpus that the study plans or that was measured, of the first backbone that has any of them;
    every one with the reason where there is neither."""
    wanted = [(indicator, corpus) for corpus in corpora for indicator in ORDERS[name]]
    measured = {
        backbone: {pair: one for pair in wanted if (one := _find(study, backbone, *pair)) is not None}
        for backbone in subjects(study.config, study.config.study.backbones)
    }
    backbone, found = max(measured.items(), key=lambda item: len(item[1]))
    planned = _planned(study, name)
    wanted = [pair for pair in wanted if pair in found or pair in planned] or wanted
    figure, every = panels(len(wanted), 1, style.COLUMN_IN, 1.25, share=False)
    for pair, axes in zip(wanted, every, strict=True):
        indicator, corpus = pair
        title = f"{INDICATORS[indicator]}, {corpus or corpus_name(study.config.importance.corpus)}, {backbone}"
        if pair in found:
            axes.set_title(f"{title}, {len(found[pair].windows)} windows")
            _box_panel(axes, found[pair], COLOURS[indicator])
        else:
            axes.set_title(title)
            reason(axes, f"not measured: no importance record of {indicator} on {corpus or 'the calibration corpus'}")
    return finish(figure, every, f"{setting(study, 'importance', backbone)}; {BOXES}" if found else None)


def _planned(study: Study, name: str) -> set[tuple[str, str | None]]:
    """Indicators and corpora, None the study's own, that it plans to measure for a figure."""
    files = [file.removesuffix(".json").split("/") for file in orders(study.config, name)]
    levels = [dict(part.split("~", 1) for part in file) for file in files]
    return {(one["indicator"], one.get("corpus")) for one in levels}


def _find(study: Study, backbone: str, indicator: str, corpus: str | None) -> Importance | None:
    """An indicator on a corpus (None: the study's own) with windows of the study's length."""
    for one in study.of(Importance, backbone):
        if (one.indicator, one.corpus, one.length) == (indicator, corpus, None):
            return one
    return None


def _box_panel(axes: Axes, found: Importance, colour: str) -> None:
    """Median, quartiles, and the 5th and 95th percentile of each block's place."""
    places = removal_orders(found.windows)
    blocks = places.shape[1]
    axes.boxplot(
        places,
        positions=range(1, blocks + 1),
        whis=(5, 95),
        widths=0.65,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "alpha": 0.55, "linewidth": 0.5},
        medianprops={"color": style.INK, "linewidth": 1.1},
        whiskerprops={"linewidth": 0.6},
        capprops={"linewidth": 0.6},
    )
    _block_axis(axes, blocks, range(1, blocks + 1))
    axes.set_xlabel("Block")
    axes.set_ylim(0, blocks + 1)
    axes.set_ylabel("Removed as number")


def _block_axis(axes: Axes, blocks: int, positions: Sequence[int]) -> None:
    """A tick at the first block and at every fifth one; blocks count from 1."""
    shown = [block for block in range(1, blocks + 1) if block == 1 or block % 5 == 0]
    axes.set_xticks([positions[block - 1] for block in shown], [str(block) for block in shown])


def by_length(study: Study) -> Figure:
    """Figure 2: mean removal order of each block, by the length of the context; a panel per indicator."""
    for backbone in subjects(study.config, study.config.study.backbones):
        found = {name: _lengths(study, backbone, name) for name in ORDERS["figure2"]}
        found = {name: rows for name, rows in found.items() if len(rows) > 1}
        if found:
            return _length_maps(study, backbone, found)
    return empty("Removal order by context length", "not measured: no importance records at several context lengths")


def _lengths(study: Study, backbone: str, indicator: str) -> dict[int, np.ndarray]:
    """Mean place of each block (L,) by context length in tokens, ascending."""
    measured = [one for one in study.of(Importance, backbone) if one.indicator == indicator and one.length is not None]
    own = [one for one in measured if one.corpus is None] or measured
    found = {one.length or 0: removal_orders(one.windows).mean(0) for one in own}
    return dict(sorted(found.items()))


def _length_maps(study: Study, backbone: str, found: Mapping[str, Mapping[int, np.ndarray]]) -> Figure:
    figure, every = panels(len(found), 1, style.COLUMN_IN, 1.5, share=False)
    blocks = study.blocks(backbone)
    for (indicator, rows), axes in zip(found.items(), every, strict=True):
        image = axes.imshow(np.stack(list(rows.values())), cmap=style.HEAT, vmin=1, vmax=blocks, aspect="auto")
        axes.set_title(f"{INDICATORS[indicator]}, {backbone}")
        lengths = list(rows)
        ticks = range(0, len(lengths), max(1, len(lengths) // 5))
        axes.set_yticks(ticks, [str(lengths[place]) for place in ticks])
        axes.set_ylabel("Context (tokens)")
        _block_axis(axes, blocks, range(blocks))
    every[-1].set_xlabel("Block")
    figure.colorbar(image, ax=every, label="Removed as number,\nmean over windows", shrink=0.9)
    return finish(figure, every, setting(study, "importance", backbone))
