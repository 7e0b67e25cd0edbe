"""``buddy preflight``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.errors import UserError
from buddy.storage.processes import query
from buddy.study import config as studies
from buddy.study import preflight as flight


def preflight(
    config: Annotated[
        list[Path] | None, typer.Argument(help="study file and its overlays; config.yaml by default")
    ] = None,
    profile: Annotated[Path, typer.Option(help="Snakemake profile for Slurm: its folder")] = Path("slurm"),
    jobs: Annotated[
        int | None, typer.Option(help="jobs queued or running at once; the profile's by default", min=1)
    ] = None,
    results: arg.Results = Path("results"),
) -> None:
    """Ask a Slurm cluster, in seconds, whether a study can run there, and say which line to edit where it cannot.

    MinJobAge against how often the end of a job is looked for, time limits against the partitions', the number of jobs
    against yours, GPU types, account and free space. `snakemake --profile slurm` asks the same before its first job.

    \b
    Examples:
      buddy preflight
      buddy preflight config.yaml workflow/demo.yaml --jobs 200
    """

    if query("scontrol", "ping") is None:
        raise UserError("no Slurm answers here (scontrol ping); run it where you would call sbatch")
    study = studies.read(*(config or [Path("config.yaml")]))
    settings = flight.read_profile(profile)
    folder = results / study.study.name
    asked = flight.of_study(study, settings, folder)
    found = flight.check(asked, jobs or settings.get("jobs"), settings.get("slurm-status-command"), folder)
    for line in found.warnings:
        typer.echo(f"warning: {line}")
    for line in found.errors:
        typer.echo(f"error: {line}")
    typer.echo(f"{len(found.errors)} errors, {len(found.warnings)} warnings")
    if found.errors:
        raise typer.Exit(1)
