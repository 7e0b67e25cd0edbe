"""``buddy check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._study import study_folder
from buddy.errors import UserError
from buddy.storage import locks
from buddy.study import check as checking
from buddy.study import config


def check(
    study: Annotated[str, typer.Argument(help="study: its name, or its folder")],
    results: arg.Results = Path("results"),
    repair: Annotated[bool, typer.Option("--repair", help="remove what must be made again")] = False,
) -> None:
    """Read every record, run and checkpoint of a study whole, and name what is missing, damaged or of other settings.

    Nothing is changed without --repair, which removes what is damaged or of other settings: the next start of Snakemake
    makes it again. The status is 0 where all is well or repaired, and 1 where something was found.

    \b
    Examples:
      buddy check demo
      buddy check --repair /data/results/paper
    """

    folder = study_folder(study, results)
    if repair and (busy := locks.owners(folder)):
        lock, owner = next(iter(busy.items()))
        raise UserError(f"--repair: {folder} is at work: {owner} holds {lock}; wait until it has ended")
    problems = list(checking.study(config.read(folder / "study.json"), folder))
    for problem in problems:
        typer.echo(f"{problem.kind}: {problem.path}: {problem.what}")
    removed = checking.repair(problems, folder) if repair else []
    for path in removed:
        typer.echo(f"removed {path}")
    missing = sum(problem.kind == "missing" for problem in problems)
    wrong = len(problems) - missing
    typer.echo(f"{folder}: {missing} missing, {wrong} damaged or of other settings" + (", removed" if removed else ""))
    if problems and not repair:
        raise typer.Exit(1)
