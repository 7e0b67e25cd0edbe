"""Figure 5: summaries generated with the prompt's path kept (reuse) against a path chosen at every step (recompute)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from buddy.reporting import published, style
from buddy.reporting.labels import DATASETS, EXECUTIONS
from buddy.reporting.panels import empty, finish, gap, panels, removed_axis, shifts
from buddy.reporting.study import Study
from buddy.study.planned_figures import subjects

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}
MODES = ("reuse", "recompute")


def rouge(study: Study) -> Figure:
    """ROUGE-1 and ROUGE-L against depth, a line per decode mode with the records' 95 % intervals."""
    for backbone in subjects(study.config, study.config.study.backbones):
        rows = _rows(study, backbone)
        if rows:
            break
    else:
        return empty("ROUGE of reuse and recompute", "not measured: no ROUGE records of BUDDY")
    dataset = min({row["dataset"] for row in rows}, key=lambda name: (name != "samsum", name))
    figure, every = panels(1, len(MEASURES), style.COLUMN_IN, 1.7, share=False)
    for (measure, title), axes in zip(MEASURES.items(), every, strict=True):
        axes.set_title(title)
        for mode, shift in zip(MODES, shifts(2, study.removed(backbone)[-1], 0.022), strict=True):
            chosen = [row for row in rows if (row["dataset"], row["metric"], row["decode"]) == (dataset, measure, mode)]
            _line(axes, chosen, mode, shift)
            _published(study, backbone, axes, f"{measure}_{mode}", mode)
        removed_axis(axes, [0, *study.removed(backbone)])
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("Blocks removed")
    every[0].set_ylabel(f"{backbone} on {DATASETS.get(dataset, dataset)}")
    return finish(figure, every, "95 % intervals over the prompts")


def _rows(study: Study, backbone: str) -> list[dict[str, Any]]:
    main = study.main(backbone)
    rows = [
        row for removed in study.removed(backbone) for row in study.rouge_rows.get((backbone, main.path, removed), [])
    ]
    return [row for row in rows if row["seed"] == main.seeds[0]]


def _line(axes: Axes, rows: list[dict[str, Any]], mode: str, shift: float) -> None:
    if rows:
        bars = [[gap(row["value"], row["low"]) for row in rows], [gap(row["high"], row["value"]) for row in rows]]
        xs, ys = [row["removed"] + shift for row in rows], [row["value"] for row in rows]
        axes.errorbar(xs, ys, yerr=bars, elinewidth=0.7, label=EXECUTIONS[mode], **style.mark(mode).line())


def _published(study: Study, backbone: str, axes: Axes, series: str, mode: str) -> None:
    """The paper's points in the mode's colour, if it is the paper's backbone and variant."""
    paper = published.backbone(backbone, study.config.backbones[backbone])
    points = published.figure(5, paper, study.main(backbone).variant, series)
    if points:
        mark = style.mark(mode)
        axes.plot(list(points), list(points.values()), "x", color=mark.color)
        axes.plot([], [], "x", color=style.GREY, label="Published")  # one entry for both modes
