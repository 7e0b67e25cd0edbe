"""``buddy solve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands._options import with_settings
from buddy.settings import Generation


@with_settings(Generation, leave_out=("backbones",))
def solve(
    run: Annotated[Path, typer.Option(help="run folder, or a backbone folder for the dense model")],
    data: Annotated[Path, typer.Option(help="folder of data sets, one folder per task, from `buddy data`")],
    out: Annotated[Path, typer.Option(help="folder for the records: removed~N.json")],
    settings: Generation,
    removed: Annotated[str, typer.Option(help="numbers of removed blocks, one record each, such as 0,4,8")] = "0",
    study: Annotated[str, typer.Option(help="study it belongs to; the run's by default")] = "",
    name: Annotated[str, typer.Option(help="the backbone's name, for a dense model")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
) -> None:
    """Let a run write the answers to word problems (GSM8K) at several budgets; lm-evaluation-harness scores them.

    \b
    Examples:
      buddy solve --run results/demo/runs/.../seed~0 --data results/demo/data --removed 4,8 --out records
      buddy solve --run results/demo/backbones/smollm2-135m --data results/demo/data --limit 8 --new-tokens 128 \\
          --out records
    """
    import os

    # The data sets are local files; looking for them on the Hub would stall a node without network.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    from buddy import runs
    from buddy.commands._common import check_depths, check_one_gpu, provenance, run_of, tracked
    from buddy.commands._options import counts
    from buddy.evaluation import accuracy
    from buddy.evaluation.harness import BuddyLM
    from buddy.records import Budget, Record, Stopwatch

    depths = sorted(set(counts(removed, "--removed")))  # W&B takes points in ascending order
    model = runs.load(run, kv=settings.kv, device=device, dtype=dtype)
    check_one_gpu(model.device.type)
    check_depths(model, depths)
    info = model.origin.info
    info.study, info.backbone = study or info.study or "adhoc", name or info.backbone
    lm = BuddyLM(model, decode=settings.decode, batch_size=settings.batch_size)
    config = {**settings.model_dump(), "removed": depths, "training": info.training}
    reads = [run, *(data / task for task in settings.tasks)]
    with tracked("solve", info.study, run_of(info), config, "", reads, [out]) as tracker:
        for count in depths:
            budget = Budget.of(model.blocks - count, model.blocks)
            watch = Stopwatch(str(model.device))
            metrics = accuracy.solve(lm, budget.fraction, settings, data)
            Record(
                kind="generation",
                study=info.study,
                backbone=info.backbone,
                method=info.method,
                metrics=metrics,
                n=sum(task["n"] for task in metrics["tasks"].values()),
                variant={**info.variant, "kv": settings.kv} if info.variant else {},
                seed=info.seed,
                budget=budget,
                **provenance(model, watch),
            ).write(out / f"removed~{count}.json")
            scores = _scores(metrics)
            line = ", ".join(f"{task} {100 * score:.1f}" for task, score in scores.items())
            typer.echo(f"{count} of {model.blocks} blocks removed: {line}")
            tracker.log(scores, step=count)


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """Shares of exact matches by task and filter, such as ``gsm8k/strict-match``."""
    return {
        f"{task}/{name}": score
        for task, found in metrics["tasks"].items()
        for name, score in found["exact_match"].items()
    }
