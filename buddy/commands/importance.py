"""``buddy importance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_backbone
from buddy.commands._options import choice, counts, with_settings
from buddy.errors import UserError
from buddy.settings import SHORTEST_WINDOW, Importance
from buddy.study.records import claim, claim_folder


@with_settings(Importance, leave_out=("corpus", "length"))
def importance(
    backbone: arg.Backbone,
    corpus: arg.Corpus,
    indicator: Annotated[str, typer.Option(help="delta_ppl, taylor, cosine or block_influence")],
    out: Annotated[
        Path,
        typer.Option(help="record to write (JSON); with several lengths a folder, for length~N/indicator~NAME.json"),
    ],
    settings: Importance,
    length: Annotated[
        str, typer.Option(help="tokens per window; several, such as 256,512, are measured one after the other")
    ] = str(Importance().length),
    taylor: Annotated[
        str, typer.Option(help="variant of taylor: window, corpus (Shortened LLaMA's), net or second")
    ] = "window",
    seed: arg.WindowSeed = None,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Estimate how important each block is, on a calibration corpus; the record is a prior for training.

    \b
    Examples:
      buddy importance --backbone results/demo/backbones/smollm2-135m --corpus results/demo/data/wikitext2 \\
          --indicator taylor --samples 8 --length 256 --out taylor.json
      buddy importance --backbone DIR --corpus book.txt --indicator cosine --seed 1 --out cosine.json
      buddy importance --backbone DIR --corpus book.txt --indicator taylor --length 128,256 --out by-length
    """
    from buddy.data import inputs
    from buddy.importance import INDICATORS, TAYLOR, estimate, windows

    choice("--indicator", indicator, tuple(INDICATORS))
    choice("--taylor", taylor, TAYLOR)
    lengths = _lengths(length)
    (claim_folder if len(lengths) > 1 else claim)(out)
    text = inputs.prose(corpus)
    opened, tokenizer = open_backbone(backbone, "dense", study, name, device, dtype)
    facts = {"indicator": indicator, "corpus": corpus.name, "samples": settings.samples, "window_seed": seed}
    facts |= {"taylor": taylor} if indicator == "taylor" else {}
    # Before anything is measured: a corpus that is too short for one of them leaves no record of the others.
    cut = {size: windows(tokenizer, text, settings.samples, size, seed) for size in lengths}
    file = f"indicator~{indicator}.json"
    files = {size: out / f"length~{size}" / file for size in lengths} if len(lengths) > 1 else {lengths[0]: out}
    part = f"{indicator}/{corpus.name}/{length}"
    config = {**facts, "lengths": lengths}
    with opened.tracked("importance", config, files.values(), part, [corpus]) as tracker:
        for size, ids in cut.items():
            watch = opened.watch()
            found = estimate(opened.model, ids, indicator, taylor=taylor)
            values = found.values.tolist()
            metrics = {**facts, "length": size, "values": values, "per_sample": found.per_window.tolist()}
            opened.write("importance", files[size], None, metrics, settings.samples, watch)
            blocks = {f"block_{index}": value for index, value in enumerate(values)}
            tracker.log(blocks, step=size)
        tracker.summary(blocks)


def _lengths(text: str) -> list[int]:
    """Window lengths from ``256,512``, ascending, each once.

    Raises:
        UserError: something else, or a window too short.
    """
    lengths = sorted(set(counts(text, "--length")))
    if lengths[0] < SHORTEST_WINDOW:
        raise UserError(f"--length: {lengths[0]} is not at least {SHORTEST_WINDOW}")
    return lengths
