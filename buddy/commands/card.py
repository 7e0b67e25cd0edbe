"""``buddy card``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._options import counts
from buddy.commands._run import measured_of
from buddy.errors import UserError
from buddy.runs import RunInfo
from buddy.storage.files import check_writable, write_bytes


def card(
    run: Annotated[Path | None, typer.Option(help="run folder")] = None,
    study: Annotated[str, typer.Option(help="study: its name, or its folder; instead of --run")] = "",
    results: arg.Results = Path("results"),
    removed: Annotated[
        str, typer.Option(help="of --run: numbers of removed blocks; by default all measured ones")
    ] = "",
    records: Annotated[
        Path | None, typer.Option(help="of --run: folder of its records, where they are not in its study's")
    ] = None,
    backbone: Annotated[Path | None, typer.Option(help="of --run: backbone folder, where it has moved")] = None,
    license: Annotated[
        str, typer.Option(help="licence of the backbone, as the Hub spells it; by default what its card names")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="file to write; printed by default")] = None,
) -> None:
    """Write a card, Markdown: what a run or a study is, what was measured of it and how sure that is, and what was not.

    It says the scores at each depth, the data and the loss it was trained on, where its backbone is from and under which
    licence, the commit, the device, and what was not measured. The card of an exported model says the same.

    \b
    Examples:
      buddy card --study demo
      buddy card --run results/demo/runs/.../seed~0 --removed 8 --out card.md
      buddy card --run my-run --records my-records
    """
    from buddy.backbones import licence
    from buddy.reporting import cards
    from buddy.reporting.study import load

    if (run is None) == (not study):
        raise UserError("give --run or --study, one of them")
    if out is not None:
        _claim(out, cards.MARK)
    if study:
        folder = Path(study) if (Path(study) / "study.json").is_file() or "/" in study else results / study
        found = load(folder)
        names = found.config.study.backbones
        licences = {name: license or licence.of(folder / "backbones" / name) for name in names}
        text = cards.of_study(found, licences)
    else:
        assert run is not None
        info = RunInfo.read(run)
        place = backbone or info.backbone_folder(run)
        measured = measured_of(run, info, records)
        asked = counts(removed, "--removed") if removed else cards.depths(measured)
        text = cards.of_run(asdict(info), measured, asked, license or licence.of(place))
    if out is None:
        typer.echo(text, nl=False)
        return
    write_bytes(out, text.encode())
    typer.echo(f"{out}: written")


def _claim(out: Path, mark: str) -> None:
    """Make sure that a card may be written to a file: absent, or a card."""
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(mark.encode())):
        raise UserError(f"--out {out}: is not a card that buddy made; nothing was touched: name a new file")
    check_writable(Path(os.path.abspath(out)).parent, f"--out {out}")
