"""``buddy latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buddy.commands._options import with_settings
from buddy.settings import Latency


@with_settings(Latency, leave_out=("backbones", "datasets"))
def latency(
    run: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[Path, typer.Option(help="prompts: a data set folder from `buddy data` (alpaca, samsum)")],
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, such as 4,8,12,16")],
    out: Annotated[Path, typer.Option(help="folder for the records: execution~E/removed~N.json")],
    settings: Latency,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Time prefill and decode, the dense and the sliced model beside the routed one, in interleaved repeats.

    \b
    Examples:
      buddy latency --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --removed 4,8 \\
          --prompts 4 --new-tokens 32 --out records
      buddy latency --run RUN --data DIR --removed 16 --batch-size 4 --executions dense,recompute --out records
    """
    from buddy import runs
    from buddy.commands._common import check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import counts
    from buddy.data import inputs
    from buddy.evaluation.latency import benchmark
    from buddy.records import Budget, Record, Stopwatch
    from buddy.routing.budget import executed_blocks

    depths = sorted(set(counts(removed, "--removed")))
    prompts = [prompt for prompt, _ in inputs.pairs(data)][: settings.prompts]
    model = runs.load(run, kv=settings.kv, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    for count in depths:
        executed_blocks((model.blocks - count) / model.blocks, model.blocks, model.policy.always)
    info = model.origin.info
    config = {**settings.model_dump(), "removed": depths, "training": info.training}
    with tracked("latency", info.study, run_of(info), config, data.name) as tracker:
        watch = Stopwatch(str(model.device))
        for contender, metrics in benchmark(model, prompts, depths, settings, data.name):
            is_buddy = contender.execution in ("reuse", "recompute")
            Record(
                kind="latency",
                study=info.study,
                backbone=info.backbone,
                method=info.method if is_buddy else contender.execution,
                metrics=metrics,
                n=settings.repeats,
                variant={**info.variant, "kv": settings.kv, "decode": contender.execution} if is_buddy else {},
                seed=info.seed,
                budget=Budget.of(model.blocks - contender.removed, model.blocks),
                **provenance(model, watch),
            ).write(out / f"execution~{contender.execution}" / f"removed~{contender.removed}.json")
            tracker.log(
                {
                    f"{contender.execution}/{phase}_tok_s": metrics[f"{phase}_tok_s"]["median"]
                    for phase in ("prefill", "decode")
                },
                step=contender.removed,
            )
