"""``buddy wandb-sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._study import study_folder
from buddy.errors import UserError
from buddy.tracking import modes, sync


def wandb_sync(
    study: arg.GivenStudy,
    results: arg.Results = Path("results"),
    entity: Annotated[str, typer.Option(help="W&B user or team; by default where each run was to go")] = "",
    project: Annotated[str, typer.Option(help="W&B project; by default where each run was to go")] = "",
    workers: Annotated[int, typer.Option(min=1, help="runs sent at a time")] = 4,
) -> None:
    """Send the W&B runs that jobs have kept offline: those of compute nodes without network, or without a key.

    What was sent before is not sent again, so it can be called as often as you like, also while a study runs: what a
    running job has written so far is sent once the job has ended. Needs a key: WANDB_API_KEY, or `wandb login` once.

    \b
    Examples:
      buddy wandb-sync --study demo
      buddy wandb-sync --study /data/results/paper --entity my-team --project buddy --workers 8
    """

    folder = study_folder(study, results) / "wandb"
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; no job of this study has kept a W&B run (was W&B disabled?)")
    modes.require_server("runs")
    outcome = sync.send(folder, entity or None, project or None, workers)
    typer.echo(
        f"{outcome.sent} sent, {outcome.already} sent before, {outcome.running} of jobs that are still running, "
        f"{len(outcome.failed)} failed"
    )
    if outcome.failed:
        place, why = next(iter(outcome.failed.items()))
        raise UserError(
            f"W&B: {len(outcome.failed)} runs were not sent, the first is {place} ({why}); the next call tries again"
        )
