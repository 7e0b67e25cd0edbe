"""``buddy encoder``."""

from __future__ import annotations

from typing import Annotated

import typer

from buddy.commands import _arguments as arg


def encoder(
    source: Annotated[str, typer.Option(help="repository on the Hugging Face Hub, owner/name, or a local folder")],
    out: arg.Folder,
    revision: Annotated[str, typer.Option(help="commit, tag or branch on the Hub")] = "main",
) -> None:
    """Fetch the encoder with which PuDDing's router reads prompts, so that no other job needs the network.

    \b
    Examples:
      buddy encoder --source google-bert/bert-base-uncased --out bert
      buddy adapt --method pudding --pudding-encoder bert ...
    """
    from buddy.backbones.encoder import fetch

    found = fetch(source, out, revision)
    typer.echo(f"{out}: {source}" + (f" at {found['commit']}" if found["commit"] else ""))
