"""``buddy pool``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Pudding


@with_settings(Pudding, leave_out=("router_items", "encoder", "epochs", "batch_size", "learning_rate"))
def pool(
    backbone: Annotated[Path, typer.Option(help="backbone folder, from `buddy backbone`, or its name in a study")],
    data: Annotated[Path, typer.Option(help="folder of data sets, one folder per task, from `buddy data`")],
    removed: Annotated[
        int, typer.Option(help="number of blocks to remove; smaller sets are beginnings of larger ones")
    ],
    settings: Pudding,
    out: Annotated[Path | None, typer.Option(help="record to write (JSON)")] = None,
    study: Annotated[str, typer.Option(help="study it belongs to")] = "adhoc",
    name: Annotated[str, typer.Option(help="the backbone's name in the study; its folder's name by default")] = "",
    batch_size: Annotated[int, typer.Option(help="questions per pass", min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Search PuDDing's pool of omission sets: per task and criterion, the blocks that its questions miss least.

    \b
    Examples:
      buddy pool --backbone results/demo/backbones/smollm2-135m --data results/demo/data --removed 8 \\
          --tasks piqa,arc_easy --pool-items 8 --out pool.json
      buddy adapt --method pudding --backbone DIR --calibration pool.json --tasks results/demo/data --removed 8 \\
          --data results/demo/data/alpaca --pudding-tasks piqa,arc_easy --out pudding-8
    """
    from buddy.backbones.fingerprint import of_backbone
    from buddy.baselines.pudding import find_pool
    from buddy.commands._common import backbone_folder, check_one_gpu, provenance, tracked
    from buddy.data.choices import training_items
    from buddy.runs import load_backbone
    from buddy.study.config import Run
    from buddy.study.records import Budget, Record, Stopwatch, claim

    if out:
        claim(out)
    backbone = backbone_folder(backbone)
    model, tokenizer = load_backbone(backbone, device, dtype)
    check_one_gpu(model.device.type)
    blocks = model.config.num_hidden_layers
    items = training_items(data, settings.tasks, tokenizer, settings.pool_items)
    run = Run(name or backbone.name, "pudding", (), 0)
    facts: dict[str, Any] = {
        "method": "pudding",
        "blocks": blocks,
        "tasks": settings.tasks,
        "criteria": settings.criteria,
        "items": settings.pool_items,
    }
    with tracked("pool", study, run, facts, "", [backbone], [out]) if out else nullcontext() as tracker:
        watch = Stopwatch(str(model.device))
        found = find_pool(model, items, removed, settings.criteria, batch_size)
        facts["omissions"] = [omission.content() for omission in found]
        if out and tracker:
            Record(
                kind="calibration",
                study=study,
                backbone=run.backbone,
                method="pudding",
                metrics=facts,
                n=settings.pool_items * len(settings.tasks),
                budget=Budget.of(blocks - removed, blocks),
                digests={"backbone": of_backbone(backbone)},
                **provenance(model, watch),
            ).write(out)
            tracker.summary({f"{one.task}/{one.criterion}": ",".join(map(str, one.order)) for one in found})
    for one in found:
        typer.echo(f"{one.task} by {one.criterion} removes {','.join(map(str, one.order))}")
