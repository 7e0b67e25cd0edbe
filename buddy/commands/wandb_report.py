"""``buddy wandb-report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._study import study_folder
from buddy.tracking import modes


def wandb_report(
    study: arg.GivenStudy,
    results: arg.Results = Path("results"),
    entity: Annotated[str, typer.Option(help="W&B user or team; by default the study's, else the key's owner")] = "",
    project: Annotated[str, typer.Option(help="W&B project; the study's by default")] = "",
) -> None:
    """Make a W&B Report of a study, or renew it, and print its link.

    It shows accuracy against budget, the ablation axes as parallel coordinates, latency, training curves, the tables
    and the figures, over the runs that the study's jobs have logged; `buddy wandb-sync` sends those kept offline.
    Needs a key: WANDB_API_KEY, or `wandb login` once.

    \b
    Examples:
      buddy wandb-report --study demo
      buddy wandb-report --study paper --entity my-team --project buddy
    """
    from buddy.pages import report
    from buddy.reporting.study import load

    found = load(study_folder(study, results))
    modes.require_server("report")
    told = found.config.tracking
    link = report.save(found, entity or told.entity, project or told.project)
    typer.echo(link)
