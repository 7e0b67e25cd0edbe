"""``buddy importance``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Importance


@with_settings(Importance, leave_out=("corpus",))
def importance(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    corpus: Annotated[Path, typer.Option(help="prose: a data set folder from `buddy data`, or a text file")],
    indicator: Annotated[str, typer.Option(help="delta_ppl, taylor, cosine or block_influence")],
    out: Annotated[Path, typer.Option(help="record to write (JSON)")],
    settings: Importance,
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
    """
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, tracked
    from buddy.commands._options import choice
    from buddy.config import Run
    from buddy.data import inputs
    from buddy.importance import INDICATORS, TAYLOR, estimate, windows
    from buddy.records import Record, Stopwatch
    from buddy.runs import load_backbone

    choice("--indicator", indicator, tuple(INDICATORS))
    choice("--taylor", taylor, TAYLOR)
    text = inputs.prose(corpus)
    backbone = backbone_folder(backbone)
    model, tokenizer = load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    run = Run(name or backbone.name, "dense", (), 0)
    variant = {"taylor": taylor} if indicator == "taylor" else {}
    config = {"indicator": indicator, **variant, "window_seed": seed, **settings.model_dump()}
    with tracked("importance", study, run, config, indicator, [backbone, corpus], [out]) as tracker:
        watch = Stopwatch(str(model.device))
        ids = windows(tokenizer, text, settings.samples, settings.length, seed)
        found = estimate(model, ids, indicator, taylor=taylor)
        metrics: dict[str, Any] = {
            "indicator": indicator,
            "corpus": corpus.name,
            "samples": settings.samples,
            "length": settings.length,
            "window_seed": seed,
            **variant,
            "values": found.values.tolist(),
            "per_sample": found.per_window.tolist(),
        }
        Record(
            kind="importance",
            study=study,
            backbone=run.backbone,
            method="dense",
            metrics=metrics,
            n=settings.samples,
            **provenance(model, watch),
        ).write(out)
        tracker.summary({f"block_{index}": value for index, value in enumerate(metrics["values"])})
