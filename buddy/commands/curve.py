"""``buddy curve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.errors import UserError, needs
from buddy.storage.files import check_writable


def curve(
    records: Annotated[Path, typer.Option(help="folder of records from `buddy score`, of one run or several")],
    out: Annotated[
        Path | None, typer.Option(help="draw it, too: this name with .png, .pdf and .csv added; replaces such files")
    ] = None,
) -> None:
    """Print and draw a budget curve: what held-out text costs at each depth, from the records of `buddy score`.

    A line per run, data set, K/V policy and decode mode: nats per token with their 95 % interval, the divergence from the
    whole backbone, and how often both would say the same. No study is needed, and no model.

    \b
    Examples:
      buddy curve --records my/records
      buddy curve --records my/records --out my/curve
    """
    from buddy.reporting import curve as curves

    needs("scipy", "matplotlib")
    if out is not None:
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder; name the files' common beginning, such as {out / 'curve'}")
        check_writable(out.absolute().parent, f"--out {out}")
    found = curves.points(records)
    typer.echo(curves.table(found))
    if out is not None:
        written = curves.save(found, out)
        typer.echo(f"{', '.join(str(path) for path in written)}: written")
