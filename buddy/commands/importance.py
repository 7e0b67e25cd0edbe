"""``buddy importance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands._options import with_settings
from buddy.settings import SHORTEST_WINDOW, Importance


@with_settings(Importance, leave_out=("corpus", "length"))
def importance(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    corpus: Annotated[Path, typer.Option(help="prose: a data set folder from `buddy data`, or a text file")],
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
    seed: Annotated[
        int | None,
        typer.Option(help="draw the windows at random with this seed; the first ones without", min=0, max=2**32 - 1),
    ] = None,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Estimate how important each block is, on a calibration corpus; the record is a prior for training.

    \b
    Examples:
      buddy importance --backbone results/demo/backbones/smollm2-135m --corpus results/demo/data/wikitext2 \\
          --indicator taylor --samples 8 --length 256 --out taylor.json
      buddy importance --backbone DIR --corpus book.txt --indicator cosine --seed 1 --out cosine.json
      buddy importance --backbone DIR --corpus book.txt --indicator taylor --length 128,256 --out by-length
    """
    from buddy.backbones.fingerprint import of_backbone
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, tracked
    from buddy.commands._options import choice
    from buddy.data import inputs
    from buddy.importance import INDICATORS, TAYLOR, estimate, windows
    from buddy.runs import load_backbone
    from buddy.study.config import Run
    from buddy.study.records import Record, Stopwatch, claim, claim_folder

    choice("--indicator", indicator, tuple(INDICATORS))
    choice("--taylor", taylor, TAYLOR)
    lengths = _lengths(length)
    (claim_folder if len(lengths) > 1 else claim)(out)
    text = inputs.prose(corpus)
    backbone = backbone_folder(backbone)
    model, tokenizer = load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    run = Run(name or backbone.name, "dense", (), 0)
    facts = {"indicator": indicator, "corpus": corpus.name, "samples": settings.samples, "window_seed": seed}
    facts |= {"taylor": taylor} if indicator == "taylor" else {}
    # Before anything is measured: a corpus that is too short for one of them leaves no record of the others.
    cut = {size: windows(tokenizer, text, settings.samples, size, seed) for size in lengths}
    file = f"indicator~{indicator}.json"
    files = {size: out / f"length~{size}" / file for size in lengths} if len(lengths) > 1 else {lengths[0]: out}
    part = f"{indicator}/{corpus.name}/{length}"
    config = {**facts, "lengths": lengths}
    with tracked("importance", study, run, config, part, [backbone, corpus], files.values()) as tracker:
        for size, ids in cut.items():
            watch = Stopwatch(str(model.device))
            found = estimate(model, ids, indicator, taylor=taylor)
            values = found.values.tolist()
            Record(
                kind="importance",
                study=study,
                backbone=run.backbone,
                method="dense",
                metrics={**facts, "length": size, "values": values, "per_sample": found.per_window.tolist()},
                n=settings.samples,
                digests={"backbone": of_backbone(backbone)},
                **provenance(model, watch),
            ).write(files[size])
            blocks = {f"block_{index}": value for index, value in enumerate(values)}
            tracker.log(blocks, step=size)
        tracker.summary(blocks)


def _lengths(text: str) -> list[int]:
    """Window lengths from ``256,512``, ascending, each once.

    Raises:
        UserError: something else, or a window too short.
    """
    from buddy.commands._options import counts
    from buddy.errors import UserError

    lengths = sorted(set(counts(text, "--length")))
    if lengths[0] < SHORTEST_WINDOW:
        raise UserError(f"--length: {lengths[0]} is not at least {SHORTEST_WINDOW}")
    return lengths
