"""``buddy solve``."""

from __future__ import annotations

from typing import Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._common import check_auto, keep_off_the_hub
from buddy.commands._measured import auto_record, open_run
from buddy.commands._options import with_settings
from buddy.settings import Generation
from buddy.study.records import Budget


@with_settings(Generation, leave_out=("backbones",))
def solve(
    run: arg.RunOrBackbone,
    data: arg.TaskData,
    out: arg.RecordsOut,
    settings: Generation,
    removed: arg.Removed = "0",
    budget: arg.AutoBudget = "",
    study: arg.StudyOfRun = "",
    name: arg.NameIfDense = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Let a run write the answers to word problems (GSM8K) at several budgets; lm-evaluation-harness scores them.

    \b
    Examples:
      buddy solve --run results/demo/runs/.../seed~0 --data results/demo/data --removed 4,8 --out records
      buddy solve --run results/demo/backbones/smollm2-135m --data results/demo/data --limit 8 --new-tokens 128 \\
          --out records
      buddy solve --run RUN2 --data results/demo/data --budget auto --out records
    """
    keep_off_the_hub()

    from buddy.data.tasks import check_examples
    from buddy.evaluation import accuracy
    from buddy.evaluation.harness import BuddyLM

    check_examples(data, settings.tasks, settings.few_shot)
    measured = open_run(run, None if budget else removed, out, settings.kv, device, dtype, study, name)
    model = measured.model
    if budget:
        check_auto(model, budget)
    lm = BuddyLM(model, decode=settings.decode, slack=settings.slack, batch_size=settings.batch_size)

    def measure(depth: Budget) -> tuple[dict[str, Any], int]:
        metrics = accuracy.solve(lm, depth.fraction, settings, data)
        return metrics, accuracy.items(metrics)

    reads = [data / task for task in settings.tasks]
    stage = "solve-auto" if budget else "solve"
    with measured.tracked(stage, measured.config(settings), [out], reads=reads) as tracker:
        if budget:
            watch = measured.watch()
            metrics = {**accuracy.solve(lm, budget, settings, data), "budget": budget}
            measured.write("generation", auto_record(out, budget), None, metrics, accuracy.items(metrics), watch)
            typer.echo(f"{metrics['executed_mean']:.2f} of {model.blocks} blocks on average: {_line(metrics)}")
            tracker.summary({"executed_predicted": metrics["executed_mean"], **_scores(metrics)})
        for count, metrics in measured.records("generation", out, measure, _line):
            tracker.at_depth(count, _scores(metrics), _scores(metrics))


def _line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{task} {100 * score:.1f}" for task, score in _scores(metrics).items())


def _scores(metrics: dict[str, Any]) -> dict[str, float]:
    """Shares of exact matches by task and filter, such as ``gsm8k/strict-match``."""
    return {
        f"{task}/{name}": score
        for task, found in metrics["tasks"].items()
        for name, score in found["exact_match"].items()
    }
