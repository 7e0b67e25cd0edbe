"""``buddy status``."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._study import study_folder
from buddy.study import config, progress
from buddy.study.progress import STATES

if TYPE_CHECKING:
    from buddy.study.progress import Job, Stage

SHOWN = 5
CLEAR = "\033[H\033[2J"
"""Takes a terminal's cursor home and empties the screen."""


def status(
    study: arg.GivenStudy,
    results: arg.Results = Path("results"),
    all_: Annotated[bool, typer.Option("--all", help="name every job that is not done")] = False,
    watch: Annotated[
        float | None, typer.Option(help="look again every N seconds until all is done, or Ctrl-C", min=1)
    ] = None,
) -> None:
    """Show how far a study has come: jobs done, running, failed and missing, and hours spent, stage by stage.

    Reads study.json, the files that jobs leave, their logs, and Snakemake's markers; runs nothing. For accuracy and
    speed: buddy report --summary.

    \b
    Examples:
      buddy status --study demo
      buddy status --study /data/results/paper --all
      buddy status --study demo --watch 30
    """

    folder = study_folder(study, results)
    while True:
        stages = progress.read(config.read(folder / "study.json"), folder)
        if watch and sys.stdout.isatty():
            typer.echo(CLEAR, nl=False)
        for line in _lines(stages, folder, all_):
            typer.echo(line)
        if not watch or all(stage.count("done") == len(stage.jobs) for stage in stages):
            return
        time.sleep(watch)


def _lines(stages: list[Stage], folder: Path, everything: bool) -> Iterator[str]:

    width = max(len(stage.name) for stage in stages)
    yield f"{'stage':{width}}" + "".join(f"{name:>9}" for name in STATES) + f"{'hours':>10}{'GPU hours':>11}"
    for stage in stages:
        counts = "".join(f"{stage.count(state) or '-':>9}" for state in STATES)
        yield f"{stage.name:{width}}{counts}{_hours(stage.hours):>10}{_hours(stage.gpu_hours):>11}"
    counts = "".join(f"{sum(stage.count(state) for stage in stages) or '-':>9}" for state in STATES)
    hours, gpu_hours = (sum(getattr(stage, name) for stage in stages) for name in ("hours", "gpu_hours"))
    yield f"{'all':{width}}{counts}{_hours(hours):>10}{_hours(gpu_hours):>11}"
    for state in STATES[1:]:
        jobs = [job for stage in stages for job, found in stage.jobs.items() if found == state]
        if jobs and (everything or state != "missing"):
            yield f"\n{state}:"
            yield from (
                f"  {job.stage} {job.name}{_reason(job, folder, state)}"
                for job in jobs[: None if everything else SHOWN]
            )
            if len(jobs) > SHOWN and not everything:
                yield f"  and {len(jobs) - SHOWN} more (--all names them)"


def _hours(hours: float) -> str:
    return "-" if hours == 0 else f"{hours:.2f}"


def _reason(job: Job, folder: Path, state: str) -> str:
    """The last line of a failed job's log."""
    log = folder / "logs" / f"{job.place}.log"
    if state != "failed":
        return ""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return " (interrupted before it wrote a log)"
    return f"\n    {lines[-1][:160] if lines else 'interrupted'}\n    {log}"
