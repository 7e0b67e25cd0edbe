"""``buddy report``: tables, figures and a summary from a study's records."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._common import tracked_job
from buddy.errors import UserError, needs
from buddy.tracking import Tracker

log = logging.getLogger(__name__)


def report(
    study: arg.GivenStudy,
    results: arg.Results = Path("results"),
    table: Annotated[list[str] | None, typer.Option(help="table to build, 2 or table2; repeat for more")] = None,
    figure: Annotated[
        list[str] | None, typer.Option(help="figure to draw, 4, figure4 or another name; repeat for more")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="the study beside the paper, and BUDDY against each peer, as tables")
    ] = False,
    all_: Annotated[bool, typer.Option("--all", help="every table and figure that the study measures")] = False,
    track: Annotated[bool, typer.Option("--track", help="log each table and figure as a W&B run")] = False,
    reads: Annotated[
        list[Path] | None, typer.Option("--reads", help="records behind it, for W&B's lineage; repeat for more")
    ] = None,
    summary: Annotated[bool, typer.Option("--summary", help="print accuracy, speed and where the plots are")] = False,
) -> None:
    """Build tables and figures from a study's records, or print its summary.

    Reads study.json and records/ in the study's folder, or the folder of records that the study names (study.records),
    and nothing else: no GPU, no model, no network. Tables go to tables/ as CSV (one row per cell, with standard error
    and the paper's figure), Markdown and LaTeX; figures go to figures/ as PDF and PNG. What has not been measured yet
    shows as a dash, or as a panel with the reason in it.

    --compare writes tables/compare (every cell that the study and the paper both have) and tables/significance (BUDDY
    minus each peer at equal depth, by a paired bootstrap).

    Examples:

      buddy report --study demo --summary

      buddy report --study demo --table 4

      buddy report --study demo --table 2 --table table6 --figure latency --figure 12

      buddy report --study demo --compare

      buddy report --study /data/results/paper --all
    """
    from buddy.reporting import figures, tables, write
    from buddy.reporting.study import load
    from buddy.reporting.summary import summary as summarise

    needs("scipy", "matplotlib")
    folder = _folder(study, results)
    found = load(folder)
    if not (table or figure or all_ or compare or summary):
        measured = ", ".join(tables.names(found)) or "it measures none"
        raise UserError(
            f"nothing asked of {found.name}: give --summary, --all, --compare, --table ({measured}) or --figure "
            f"({', '.join(figures.NAMES)})"
        )
    # Every name is checked before the first file is written.
    asked_tables = list(dict.fromkeys(tables.resolve(found, name) for name in table or []))
    asked_figures = list(dict.fromkeys(figures.resolve(found, name) for name in figure or []))
    tracked = partial(_tracked, track, found.name, reads or [], folder)
    for name in tables.names(found) if all_ else asked_tables:
        with tracked("table", name) as job:
            _show(job, {name: write.table(found, name)})
    for name in figures.names(found) if all_ else asked_figures:
        with tracked("figure", name) as job:
            _show(job, {name: write.figure(found, name)})
    if compare or all_:
        with tracked("table", "compare", "significance") as job:
            _show(job, write.comparison(found))
    if summary:
        typer.echo(summarise(folder))


def _tracked(
    wanted: bool, study: str, reads: list[Path], folder: Path, stage: str, *names: str
) -> AbstractContextManager[Tracker | None]:
    """The W&B run of a table or a figure, of two that are made together under the first one's name; nothing at all where
    none is wanted."""
    if not wanted:
        return nullcontext()
    writes = [folder / f"{stage}s" / name for name in names]
    return tracked_job(stage, study, names[0], "report", {stage: names[0]}, reads=reads, writes=writes)


def _folder(study: str, results: Path) -> Path:
    """The folder of a study given by folder or by name."""
    return Path(study) if (Path(study) / "study.json").is_file() or "/" in study else results / study


def _show(job: Tracker | None, made: dict[str, list[Path]]) -> None:
    """Say what was written, by name, and show the table or the picture among it on W&B."""
    import pandas as pd

    for name, paths in made.items():
        if job is not None and paths[0].suffix == ".csv":
            job.table(name, pd.read_csv(paths[0]))
        elif job is not None:
            job.image(name, paths[-1])
        for path in paths:
            log.info("wrote %s", path)
