"""``buddy data``: fetch a data set."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from buddy.data.catalogue import CATALOGUE
from buddy.settings import Data

_SOURCE = Data.model_fields["source"]


def data(
    name: Annotated[str, typer.Option(help="data set: " + ", ".join(CATALOGUE))],
    out: Annotated[Path, typer.Option(help="folder to make")],
    source: Annotated[str, typer.Option(help=_SOURCE.description)] = _SOURCE.default,
    study: Annotated[str, typer.Option(help="study it is for: logs a W&B run; none without")] = "",
) -> None:
    """Fetch a data set: one JSON Lines file per split, and data.json, which says where they came from.

    Commands that read the folder need no network. The embedded sets are small and original; they have the columns
    of the published ones, so that both go through the same code.

    Examples:

    \b
      # The published PIQA
      buddy data --name piqa --source hub --out results/main/data/piqa
    \b
      # The small set inside this package
      buddy data --name piqa --source embedded --out results/demo/data/piqa
    \b
      # Your own rows, in /mine/piqa.validation.jsonl and /mine/piqa.train.jsonl
      buddy data --name piqa --source /mine --out results/mine/data/piqa
    """
    from buddy.commands._common import tracked_job
    from buddy.data import materialise

    config = {"data": name, "source": source}
    with tracked_job("data", study, name, "data", config, writes=[out]) if study else nullcontext() as job:
        content = materialise(name, source, out)
        if job is not None:
            job.summary({f"{split}_rows": facts["rows"] for split, facts in content["splits"].items()})
    sizes = ", ".join(f"{split} {facts['rows']} rows" for split, facts in content["splits"].items())
    typer.echo(f"{out}: {name} from {source}, {sizes}")
