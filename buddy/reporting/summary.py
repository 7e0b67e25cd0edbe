"""A study in a few lines of at most 80 columns for the terminal: accuracy against budget, speed, and where the rest is."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from buddy.reporting import figures, measures
from buddy.reporting.generation import FILTERS, TASK
from buddy.reporting.grid import NEAR, Cell, limit_text, ran, rank
from buddy.reporting.labels import DATASETS, EXECUTIONS, fraction, one_path, series_labels
from buddy.reporting.measures import Measure
from buddy.reporting.peer_latency import lines
from buddy.reporting.render import DAGGER, MISSING, NEAR_SIGN
from buddy.reporting.study import Race, Series, Study, load
from buddy.study.planned_figures import FIRST

STAR = "*"
WIDTH = 80


def summary(folder: str | Path) -> str:
    """The summary of a study's records, about one screen of plain text.

    Args:
        folder: ``results/<study>``.

    Raises:
        UserError: there is no such study.
    """
    study = load(folder)
    parts = [_accuracy(study, backbone) for backbone in study.config.study.backbones]
    parts += filter(None, [_answers(study, backbone) for backbone in study.config.answering_backbones()])
    parts += [_latency(study, backbone) for backbone in study.config.timed_backbones()]
    source = study.config.study.records
    place = f"{study.folder}; records of {source}" if source else f"{study.folder}"
    return "\n\n".join([_filled(f"Study {study.name} ({place})"), *parts, _files(study)])


def _accuracy(study: Study, backbone: str) -> str:
    compared = study.compared(backbone)
    scores = {
        one.path: {removed: measures.accuracy(study, backbone, one, removed)["average"] for removed in one.depths}
        for one in compared
    }
    title = f"Accuracy of {backbone}, average of {len(study.tasks)} tasks, % ± standard error"
    return _by_depth(study, backbone, title, compared, scores)


def _answers(study: Study, backbone: str) -> str:
    """Exact matches on GSM8K, or "" where nothing has been answered yet."""
    answering = study.answering(backbone)
    shown = (TASK, FILTERS[0])
    scores = {
        one.path: {
            removed: measures.answers(study, backbone, one, removed).get(shown, Measure()) for removed in one.depths
        }
        for one in answering
    }
    if not any(measure.value is not None for row in scores.values() for measure in row.values()):
        return ""
    title = f"Exact match of {backbone} on GSM8K (strict), % ± standard error"
    return _by_depth(study, backbone, title, answering, scores)


def _by_depth(
    study: Study, backbone: str, title: str, series: list[Series], scores: dict[str, dict[int, Measure]]
) -> str:
    """A row per method, a column per depth; the best of each is starred as a table has it bold, and marked as a table has it
    where it is inside the noise of others, with LoRA and without it apart."""
    depths = [0, *study.removed(backbone)]
    blocks = study.blocks(backbone)
    labels = series_labels(series)
    shown = {path: {removed: Cell({}, measure) for removed, measure in row.items()} for path, row in scores.items()}
    for lora in ("trained", "none"):
        for removed in depths[1:]:
            rank((shown[one.path].get(removed) for one in series if one.lora == lora), second=False)
    every = [cell for row in shown.values() for cell in row.values()]
    starred, near = any(cell.rank for cell in every), any(cell.near for cell in every)
    blank = " " if starred or near else ""  # figures stay in line with marked ones
    rows = []
    for one in series:
        row = shown[one.path]
        limited = any(cell.measure.limit is not None for cell in row.values())
        cells = [
            _percent(row[removed].measure) + _mark(row[removed], blank) if removed in row else "" for removed in depths
        ]
        rows.append([labels[one.path] + (f" {DAGGER}" if limited else ""), *cells])
    head = ["blocks removed", *(f"{removed}" for removed in depths)]
    executed = ["fraction executed", *(fraction(blocks - removed, blocks) for removed in depths)]
    measured = [measure for row in scores.values() for measure in row.values()]
    limits = {measure.limit for measure in measured if measure.limit is not None}
    notes = [f"{DAGGER} {limit_text(limits)}"] if limits else []
    if starred:
        notes.append(f"{STAR} best at its depth")
    if near:
        notes.append(f"{NEAR_SIGN} {NEAR} (95 %)")
    if any(measure.off_depth for measure in measured):
        notes.append("[N] blocks that ran on average, where not as many as asked for")
    notes += one_path(study, backbone, series)
    return "\n".join([_filled(title), *aligned([head, executed, *rows]), *map(_filled, notes)])


def _mark(cell: Cell, blank: str) -> str:
    return STAR if cell.rank else NEAR_SIGN if cell.near else blank


def _percent(measure: Measure) -> str:
    if measure.value is None:
        return MISSING
    error = "" if measure.stderr is None else f" ± {measure.stderr:.2f}"
    return f"{measure.value:.2f}{error}" + (f" [{measure.executed_mean:.1f}]" if measure.off_depth else "")


def _latency(study: Study, backbone: str) -> str:
    columns = ("prefill_tok_s", "prefill_speedup", "decode_tok_s", "decode_speedup")
    rows = [["data set", "removed", "execution", "prefill", "speed-up", "decode", "speed-up"]]
    for race in study.shown_races(backbone):
        for removed in (0, *study.removed(backbone)):
            for execution in ["dense"] if removed == 0 else ["sliced", "reuse", "recompute"]:
                found = measures.latency(study, backbone, race, execution, removed)
                if found or execution in ("dense", "recompute"):
                    cells = [_rate(found.get(metric), metric) for metric in columns]
                    rows.append([DATASETS.get(race.dataset, race.dataset), str(removed), EXECUTIONS[execution], *cells])
            rows += _peer_rows(study, backbone, race, removed, columns)
    told = [f"Speed of {backbone}", study.race_text(backbone), "tokens/s, median of the timed passes"]
    notes = one_path(study, backbone, study.timed(backbone))
    return "\n".join([_filled(", ".join(filter(None, told))), *aligned(rows, labels=3), *map(_filled, notes)])


def _peer_rows(study: Study, backbone: str, race: Race, removed: int, columns: Sequence[str]) -> list[list[str]]:
    """The timed peers that were measured at a depth."""
    rows = []
    peers = [line for line in lines(study, backbone) if line.execution == "reuse"] if removed else []
    for line in peers:
        found = measures.latency(study, backbone, race, line.execution, removed, line.series.path)
        if found:
            cells = [_rate(found.get(metric), metric) for metric in columns]
            label = line.label + ran([found[columns[0]]])
            rows.append([DATASETS.get(race.dataset, race.dataset), str(removed), label, *cells])
    return rows


def _rate(measure: Measure | None, metric: str) -> str:
    if measure is None or measure.value is None:
        return MISSING
    return f"{measure.value:.1f}" if metric.endswith("tok_s") else f"{measure.value:.2f}x"


def _files(study: Study) -> str:
    """Where the plots and tables are, which to look at first, and how to make what is not there yet."""
    asked = figures.names(study)
    drawn = [name for name in asked if (study.folder / "figures" / f"{name}.png").is_file()]
    lines = [f"Figures: {len(drawn)} of {len(asked)} drawn, {study.folder / 'figures'} (.png, .pdf)"]
    first = [name for name in FIRST if name in drawn] or drawn
    lines += [f"  first of all {study.folder / 'figures' / first[0]}.png"] if first else []
    tables = list((study.folder / "tables").glob("*.md"))
    lines.append(f"Tables: {len(tables)} written, {study.folder / 'tables'} (.md, .csv, .tex, .html)")
    if len(drawn) < len(asked):
        lines.append(f"  all of them: buddy report --study {study.name} --all")
    return "\n".join(lines)


def _filled(text: str) -> str:
    """Text in lines of the terminal's width; paths stay whole."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def aligned(rows: list[list[str]], labels: int = 1) -> list[str]:
    """Rows as columns of equal width: label columns to the left, figures to the right; figures that do not fit beside the
    others go below, beside the labels again."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines: list[str] = []
    for columns in _groups(widths, labels):
        for row in rows:
            if not any(row[column] for column in columns[labels:]):
                continue
            cells = [
                row[column].ljust(widths[column]) if column < labels else row[column].rjust(widths[column])
                for column in columns
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _groups(widths: list[int], labels: int) -> list[list[int]]:
    """Columns side by side: the labels, and as many others as there is room for."""
    groups: list[list[int]] = [[]]
    for column in range(labels, len(widths)):
        if groups[-1] and sum(2 + widths[one] for one in [*range(labels), *groups[-1], column]) > WIDTH:
            groups.append([])
        groups[-1].append(column)
    return [[*range(labels), *group] for group in groups]
