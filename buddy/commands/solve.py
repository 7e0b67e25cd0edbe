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
    from buddy.commands._common import keep_off_the_hub
    from buddy.commands._measured import open_run

    keep_off_the_hub()

    from buddy.data.tasks import check_examples
    from buddy.evaluation import accuracy
    from buddy.evaluation.harness import BuddyLM
    from buddy.study.records import Budget

    check_examples(data, settings.tasks, settings.few_shot)
    measured = open_run(run, removed, out, settings.kv, device, dtype, study, name)
    model = measured.model
    lm = BuddyLM(model, decode=settings.decode, slack=settings.slack, batch_size=settings.batch_size)

    def measure(budget: Budget) -> tuple[dict[str, Any], int]:
        metrics = accuracy.solve(lm, budget.fraction, settings, data)
        return metrics, accuracy.items(metrics)

    reads = [data / task for task in settings.tasks]
    with measured.tracked("solve", settings, out, reads=reads) as tracker:
        for count, metrics in measured.records("generation", out, measure):
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
