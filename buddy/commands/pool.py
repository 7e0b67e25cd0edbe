"""``buddy pool``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._measured import open_backbone
from buddy.commands._options import with_settings
from buddy.settings import Pudding
from buddy.study.records import claim


@with_settings(Pudding, leave_out=("router_items", "encoder", "epochs", "batch_size", "learning_rate"))
def pool(
    backbone: arg.Backbone,
    data: arg.TaskData,
    removed: Annotated[
        int, typer.Option(help="number of blocks to remove; smaller sets are beginnings of larger ones")
    ],
    settings: Pudding,
    out: arg.RecordOut = None,
    study: arg.Study = "adhoc",
    name: arg.Name = "",
    batch_size: Annotated[int, typer.Option(help="questions per pass", min=1)] = 16,
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Search PuDDing's pool of omission sets: per task and criterion, the blocks that its questions miss least.

    \b
    Examples:
      buddy pool --backbone results/demo/backbones/smollm2-135m --data results/demo/data --removed 8 \\
          --tasks piqa,arc_easy --pool-items 8 --out pool.json
      buddy adapt --method pudding --backbone DIR --calibration pool.json --tasks results/demo/data --removed 8 \\
          --data results/demo/data/alpaca --pudding-tasks piqa,arc_easy --out pudding-8
    """
    from buddy.baselines.pudding import find_pool
    from buddy.data.choices import training_items

    if out:
        claim(out)
    opened, tokenizer = open_backbone(backbone, "pudding", study, name, device, dtype)
    items = training_items(data, settings.tasks, tokenizer, settings.pool_items)
    facts: dict[str, Any] = {
        "method": "pudding",
        "blocks": opened.blocks,
        "tasks": settings.tasks,
        "criteria": settings.criteria,
        "items": settings.pool_items,
    }
    with opened.tracked("pool", facts, [out]) as tracker:
        watch = opened.watch()
        found = find_pool(opened.model, items, removed, settings.criteria, batch_size)
        facts["omissions"] = [omission.content() for omission in found]
        if out:
            opened.write("calibration", out, removed, facts, settings.pool_items * len(settings.tasks), watch)
        tracker.summary({f"{one.task}/{one.criterion}": ",".join(map(str, one.order)) for one in found})
    for one in found:
        typer.echo(f"{one.task} by {one.criterion} removes {','.join(map(str, one.order))}")
