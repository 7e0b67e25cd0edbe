"""``buddy breakdown``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands._options import with_settings
from buddy.settings import Breakdown


@with_settings(Breakdown, leave_out=("backbones",))
def breakdown(
    run: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[Path, typer.Option(help="prompts: a data set folder from `buddy data` (alpaca, samsum)")],
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, such as 4,8,12,16")],
    out: Annotated[Path, typer.Option(help="folder for the records: removed~N.json")],
    settings: Breakdown,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Profile what a routed pass spends its time on, and time a routing step at longer contexts.

    \b
    Examples:
      buddy breakdown --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --removed 8 \\
          --batch-size 2 --tokens 64 --steps 4 --out records
      buddy breakdown --run RUN --data DIR --removed 4,16 --contexts 128,1024,8192 --out records
    """
    from buddy import runs
    from buddy.commands._common import check_depths, check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import counts
    from buddy.data import inputs
    from buddy.errors import UserError
    from buddy.evaluation import breakdown as profiling
    from buddy.records import Budget, Record, Stopwatch

    depths = sorted(set(counts(removed, "--removed")))
    prompts = [prompt for prompt, _ in inputs.pairs(data)]
    model = runs.load(run, kv=settings.kv, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    info = model.origin.info
    if not model.policy.source_block:
        raise UserError(f"--run: {run} does not route by keys and values (method {info.method}); give a trained run")
    check_depths(model, depths)
    config = {**settings.model_dump(), "removed": depths, "training": info.training}
    with tracked("breakdown", info.study, run_of(info), config, data.name, [run], [out]) as tracker:
        watch = Stopwatch(str(model.device))
        for count, metrics in profiling.breakdown(model, prompts, depths, settings):
            Record(
                kind="breakdown",
                study=info.study,
                backbone=info.backbone,
                method=info.method,
                metrics=metrics,
                n=settings.repeats,
                variant={**info.variant, "kv": settings.kv, "decode": "recompute"},
                seed=info.seed,
                budget=Budget.of(model.blocks - count, model.blocks),
                **provenance(model, watch),
            ).write(out / f"removed~{count}.json")
            shares = {
                f"{phase}/{name}_percent": part["percent"]
                for phase, found in metrics["phases"].items()
                for name, part in found["components"].items()
            }
            tracker.log(shares, step=count)
            watch = Stopwatch(str(model.device))
        longest = max(metrics["contexts"], key=lambda entry: entry["context"])
        tracker.summary(
            {f"{way}_at_{longest['context']}": longest[way]["median"] for way in ("routing_ms", "reread_ms")}
        )
