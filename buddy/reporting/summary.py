"""A study in a few lines for the terminal: accuracy against budget, speed, and where the plots are."""

from __future__ import annotations

from pathlib import Path

from buddy.reporting import figures, measures
from buddy.reporting.grid import limit_text
from buddy.reporting.labels import DATASETS, EXECUTIONS, fraction, series_labels
from buddy.reporting.measures import Measure
from buddy.reporting.render import DAGGER, MISSING
from buddy.reporting.study import Study, load


def summary(folder: str | Path) -> str:
    """The summary of a study's records, about one screen of plain text.

    Args:
        folder: ``results/<study>``.

    Raises:
        UserError: there is no such study.
    """
    study = load(folder)
    parts = [_accuracy(study, backbone) for backbone in study.config.study.backbones]
    parts += [_latency(study, backbone) for backbone in study.config.timed_backbones()]
    source = study.config.study.records
    place = f"{study.folder}; records of {source}" if source else f"{study.folder}"
    return "\n\n".join([f"Study {study.name} ({place})", *parts, _files(study)])


def _accuracy(study: Study, backbone: str) -> str:
    depths = study.removed(backbone)
    blocks = study.blocks(backbone)
    series = study.series(backbone)
    labels = series_labels(series)
    rows = []
    limits: set[int] = set()
    for one, method in series.items():
        columns = [0] if method == "dense" else depths
        found = {removed: measures.accuracy(study, backbone, one, method, removed)["average"] for removed in columns}
        limited = {measure.limit for measure in found.values() if measure.limit is not None}
        limits |= limited
        cells = [_percent(found[removed]) if removed in found else "" for removed in (0, *depths)]
        rows.append([labels[one] + (f" {DAGGER}" if limited else ""), *cells])
    head = ["blocks removed", "0", *(f"{removed}" for removed in depths)]
    executed = ["fraction executed", *(fraction(blocks - removed, blocks) for removed in (0, *depths))]
    title = f"Accuracy of {backbone}, average of {len(study.tasks)} tasks, % ± standard error"
    notes = [f"{DAGGER} {limit_text(limits)}"] if limits else []
    return "\n".join([title, *_aligned([head, executed, *rows]), *notes])


def _percent(measure: Measure) -> str:
    if measure.value is None:
        return MISSING
    return f"{measure.value:.2f}" + ("" if measure.stderr is None else f" ± {measure.stderr:.2f}")


def _latency(study: Study, backbone: str) -> str:
    columns = ("prefill_tok_s", "prefill_speedup", "decode_tok_s", "decode_speedup")
    rows = [["data set", "removed", "execution", "prefill tok/s", "speed-up", "decode tok/s", "speed-up"]]
    for race in study.shown_races(backbone):
        for removed in (0, *study.removed(backbone)):
            for execution in ["dense"] if removed == 0 else ["sliced", "reuse", "recompute"]:
                found = measures.latency(study, backbone, race, execution, removed)
                if found or execution in ("dense", "recompute"):
                    cells = [_rate(found.get(metric), metric) for metric in columns]
                    rows.append([DATASETS.get(race.dataset, race.dataset), str(removed), EXECUTIONS[execution], *cells])
    title = ", ".join(filter(None, [f"Speed of {backbone}", study.race_text(backbone), "median of the timed passes"]))
    return "\n".join([title, *_aligned(rows, labels=3)])


def _rate(measure: Measure | None, metric: str) -> str:
    if measure is None or measure.value is None:
        return MISSING
    return f"{measure.value:.1f}" if metric.endswith("tok_s") else f"{measure.value:.2f}x"


def _files(study: Study) -> str:
    """Where the plots and tables are, or how to make them."""
    lines = []
    for name in figures.names(study):
        path = study.folder / "figures" / f"{name}.png"
        if path.is_file():
            lines.append(f"plot   {path} (and .pdf)")
        else:
            lines.append(f"plot   {name}: not drawn yet (buddy report --study {study.name} --figure {name})")
    tables = sorted((study.folder / "tables").glob("*.md"), key=lambda path: (len(path.name), path.name))
    lines += [f"table  {path} (and .csv, .tex)" for path in tables]
    return "\n".join(lines)


def _aligned(rows: list[list[str]], labels: int = 1) -> list[str]:
    """Rows as columns of equal width: label columns to the left, figures to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < labels else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines
