"""``buddy trace``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._common import keep_off_the_hub
from buddy.commands._measured import open_run
from buddy.commands._options import with_settings
from buddy.settings import Trace
from buddy.study.records import Budget


@with_settings(Trace, leave_out=("backbones", "datasets", "tasks"))
def trace(
    run: arg.RunOrBackbone,
    data: Annotated[Path, typer.Option(help="prompts: a data set folder from `buddy data`, of text or of a task")],
    out: arg.RecordsOut,
    settings: Trace,
    removed: arg.Removed = "0",
    study: arg.StudyOfRun = "",
    name: arg.NameIfDense = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Record which blocks ran: how exactly a budget is kept, how paths differ by prompt and by step, and the first prompt's
    generation token by token.

    \b
    Examples:
      buddy trace --run results/demo/runs/.../seed~0 --data results/demo/data/alpaca --removed 4,8 --out records
      buddy trace --run RUN --data results/demo/data/piqa --removed 12 --prompts 50 --new-tokens 1 --out records
    """
    keep_off_the_hub()

    from buddy.evaluation import traces

    prompts = traces.prompts(data)[: settings.prompts]
    measured = open_run(run, removed, out, settings.kv, device, dtype, study, name)
    model = measured.model

    def measure(budget: Budget) -> tuple[dict[str, Any], int]:
        found = traces.answers(
            model, prompts, budget.fraction, settings.decode, settings.new_tokens, settings.batch_size
        )
        facts = {"dataset": data.name, "prompts": len(prompts)}
        said = settings.model_dump(include={"new_tokens", "decode"})
        summed = traces.summary([answer.routes for answer in found], budget.executed)
        shown = traces.example(model.tokenizer, prompts[0], found[0])
        return {**facts, **said, **summed, "example": shown}, len(prompts)

    with measured.tracked("trace", measured.config(settings, dataset=data.name), [out], data.name) as tracker:
        for count, metrics in measured.records("trace", out, measure, _line):
            numbers = _numbers(metrics)
            paths = {name: numbers[name] for name in ("distinct_paths_over_prompts", "distinct_paths_per_generation")}
            tracker.at_depth(count, numbers, paths)


def _line(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['executed_mean']:.2f} executed ({metrics['executed_min']} to {metrics['executed_max']}), "
        f"{metrics['distinct_paths_over_prompts']} distinct paths over {metrics['prompts']} prompts, "
        f"{metrics['distinct_paths_per_generation']['mean']:.1f} per generation"
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that make a curve over the depth."""
    per_generation = metrics["distinct_paths_per_generation"]["mean"]
    return {
        **{key: value for key, value in metrics.items() if isinstance(value, int | float)},
        "distinct_paths_per_generation": per_generation,
    }
