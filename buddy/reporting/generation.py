"""What is generated: GSM8K's answers on all backbones that answer (the paper's Table 12), and summaries with the prompt's
path kept (reuse) against a path chosen at every step (recompute; Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from buddy.reporting import measured, measures, published, style
from buddy.reporting.grid import Cell, Grid, Row, ran, rank_columns, rank_note
from buddy.reporting.labels import (
    DATASETS,
    EXECUTIONS,
    coordinates,
    either,
    number,
    one_path,
    provenance,
    series_labels,
    setting,
    trained_by,
)
from buddy.reporting.measured import Generation, Rouge
from buddy.reporting.measures import Measure
from buddy.reporting.study import Series, Study
from buddy.reporting.style import empty, finish, gap, panels, removed_axis, shifts
from buddy.study.planned_figures import subjects
from buddy.study.settings import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILTERS = ("strict-match", "flexible-extract")
"""The harness's ways to find an answer in GSM8K's texts; the first is the one shown, the CSV has both."""
TASK = "gsm8k"


def generation(study: Study, name: str, table: Table) -> Grid:
    """Rows: dense, then at each depth every method; columns: backbones; cells: exact match in percent."""
    backbones = [table.backbone] if table.backbone else study.config.answering_backbones()
    # Backbones of one study have the same methods, but not always the same depths.
    answering = {backbone: {one.path: one for one in study.answering(backbone)} for backbone in backbones}
    every = {path: one for series in answering.values() for path, one in series.items()}
    label = series_labels(list(every.values()))
    rows: list[Row] = []
    for removed in sorted({0, *(removed for backbone in backbones for removed in study.removed(backbone))}):
        at_depth = [
            one
            for path, one in every.items()
            if any(removed in series[path].depths for series in answering.values() if path in series)
        ]
        group = [_row(study, name, answering, one.path, label[one.path], removed) for one in at_depth]
        if removed:
            rank_columns(group, at_depth)
        for row in group[:1]:
            row.starts_group = True
        rows += group
    return Grid(
        name=name,
        caption="Exact match on GSM8K, answered by generation, with blocks removed.",
        label_headers=("Removed", "Method"),
        headers=tuple(backbones),
        rows=rows,
        error_note="± standard error over the problems.",
        latex_errors=frozenset(range(len(backbones))),
        notes=[
            *_how_answered(study, backbones),
            *rank_note(rows, every.values()),
            *trained_by(study, every.values()),
            *_one_path(study, answering),
            *provenance(study, "generation", *backbones),
        ],
    )


def _one_path(study: Study, answering: Mapping[str, Mapping[str, Series]]) -> list[str]:
    """Routers that take one path, backbone by backbone."""
    notes = {backbone: one_path(study, backbone, series.values()) for backbone, series in answering.items()}
    named = len(answering) > 1
    return [f"{backbone}: {note}" if named else note for backbone, told in notes.items() for note in told]


def _row(
    study: Study, name: str, answering: Mapping[str, Mapping[str, Series]], path: str, label: str, removed: int
) -> Row:
    """One method at one depth; a backbone that is not pruned to it has no cell."""
    shown: list[Cell | None] = []
    unshown: list[Cell] = []
    for backbone, series in answering.items():
        if path in series and removed in series[path].depths:
            first, *others = _cells(study, name, backbone, series[path], removed)
            shown.append(first)
            unshown += others
        else:
            shown.append(None)
    missed = ran(cell.measure for cell in shown if cell is not None)
    return Row((str(removed), label + missed), shown, unshown=unshown)


def _cells(study: Study, name: str, backbone: str, series: Series, removed: int) -> list[Cell]:
    """One cell per filter, the shown one first; the paper's figure stands beside that."""
    beside = None
    if published.has_figures_of(series.method, series.variant):
        paper = published.backbone(backbone, study.config.backbones[backbone])
        beside = published.answers(number(name), paper, series.method, removed)
    found = measures.answers(study, backbone, series, removed)
    at = {**coordinates(study, name, backbone, series, removed), "task": TASK}
    return [
        Cell(
            {**at, "filter": used, "unit": "%"},
            found.get((TASK, used), Measure()),
            beside if used == FILTERS[0] else None,
        )
        for used in FILTERS
    ]


def _how_answered(study: Study, backbones: list[str]) -> list[str]:
    """What the records say of the prompts and answers, and which answers count."""
    answered = [one for backbone in backbones for one in study.of(Generation, backbone)]
    shots = either(one.few_shot for one in answered if one.few_shot is not None)
    tokens = either(one.new_tokens for one in answered)
    told = [f"Solved examples in the prompt: {shots}"] if shots else []
    told += [f"answers of up to {tokens} new tokens"] if tokens else []
    return [
        "Exact match in percent, by the harness's strict-match; the CSV has flexible-extract too. The paper does not say "
        "which it used." + (f" {', '.join(told)}." if told else "")
    ]


MEASURES = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}
MODES = ("reuse", "recompute")


def rouge(study: Study) -> Figure:
    """ROUGE-1 and ROUGE-L against depth, a line per decode mode with the records' 95 % intervals."""
    for backbone in subjects(study.config, study.config.study.backbones):
        found = _summaries(study, backbone)
        if found:
            break
    else:
        return empty("ROUGE of reuse and recompute", "not measured: no ROUGE records of BUDDY")
    dataset = min({str(one.dataset) for one in found}, key=lambda name: (name != "samsum", name))
    figure, every = panels(1, len(MEASURES), style.COLUMN_IN, 1.7, share=False)
    for (measure, title), axes in zip(MEASURES.items(), every, strict=True):
        axes.set_title(title)
        for mode, shift in zip(MODES, shifts(2, study.removed(backbone)[-1], 0.022), strict=True):
            chosen = [one for one in found if (one.dataset, one.decode) == (dataset, mode)]
            _line(axes, {(one.removed or 0) + shift: one.figures[measure] for one in chosen}, mode)
            _published(study, backbone, axes, f"{measure}_{mode}", mode)
        removed_axis(axes, [0, *study.removed(backbone)])
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("Blocks removed")
    every[0].set_ylabel(f"{backbone} on {DATASETS.get(dataset, dataset)}")
    return finish(figure, every, f"{setting(study, 'rouge', backbone)}; {style.INTERVAL} over the prompts")


def _summaries(study: Study, backbone: str) -> list[Rouge]:
    """Those of BUDDY's first seed, by depth."""
    main = study.main(backbone)
    found = [one for removed in study.removed(backbone) for one in study.of(Rouge, backbone, main.path, removed)]
    return [one for one in found if one.seed == main.seeds[0]]


def _line(axes: Axes, points: Mapping[float, measured.Figure], mode: str) -> None:
    if points:
        known = points.values()
        bars = [[gap(one.value, one.low) for one in known], [gap(one.high, one.value) for one in known]]
        ys = [one.value for one in known]
        axes.errorbar([*points], ys, yerr=bars, elinewidth=0.7, label=EXECUTIONS[mode], **style.mark(mode).line())


def _published(study: Study, backbone: str, axes: Axes, series: str, mode: str) -> None:
    """The paper's points in the mode's colour, if it is the paper's backbone and variant."""
    paper = published.backbone(backbone, study.config.backbones[backbone])
    points = published.figure(5, paper, study.main(backbone).variant, series)
    if points:
        mark = style.mark(mode)
        axes.plot(list(points), list(points.values()), "x", color=mark.color)
        axes.plot([], [], "x", color=style.GREY, label="Published")  # one entry for both modes
