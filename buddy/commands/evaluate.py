"""``buddy evaluate``."""

from __future__ import annotations

import shutil
from statistics import fmean
from typing import Any

import typer

from buddy.commands import _arguments as arg
from buddy.commands._common import check_auto, keep_off_the_hub
from buddy.commands._measured import auto_record, open_run
from buddy.commands._options import with_settings
from buddy.settings import Evaluation
from buddy.storage.checkpoints import FOLDER, Checkpoints
from buddy.study.records import Budget
from buddy.tasks import percents
from buddy.tracking import Tracker


@with_settings(Evaluation)
def evaluate(
    run: arg.RunOrBackbone,
    data: arg.TaskData,
    out: arg.RecordsOut,
    settings: Evaluation,
    removed: arg.Removed = "0",
    budget: arg.AutoBudget = "",
    study: arg.StudyOfRun = "",
    name: arg.NameIfDense = "",
    device: arg.Device = "auto",
    dtype: arg.Dtype = "auto",
) -> None:
    """Measure accuracy with lm-evaluation-harness at several budgets; the backbone is loaded once.

    Killed, it goes on from the last task that it had scored when run again.

    \b
    Examples:
      buddy evaluate --run results/demo/runs/.../seed~0 --data results/demo/data --removed 4,8 --out records
      buddy evaluate --run results/demo/backbones/smollm2-135m --data results/demo/data --tasks piqa,arc_easy \\
          --limit 20 --out records
      buddy evaluate --run RUN2 --data results/demo/data --tasks piqa --budget auto --out records
    """
    keep_off_the_hub()

    from buddy.data.tasks import check_examples
    from buddy.evaluation import accuracy
    from buddy.evaluation.harness import BuddyLM
    from buddy.training import fingerprints

    check_examples(data, settings.tasks, settings.few_shot)
    measured = open_run(run, None if budget else removed, out, settings.kv, device, dtype, study, name)
    model = measured.model
    lm = BuddyLM(model, routing=settings.routing, batch_size=settings.batch_size)

    if budget:
        check_auto(model, budget)

    # Beside the folder of the records, which Snakemake removes when a job fails.
    made_by = {
        "backbone": fingerprints.of_weights(model.backbone),
        "policy": [model.policy.settings(), fingerprints.of_weights(model.policy)],
        **{"kv": settings.kv, "dtype": str(model.dtype)},
    }
    kept = Checkpoints(out.with_name(f".{out.name}.{FOLDER}"), made_by)

    def measure(depth: Budget) -> tuple[dict[str, Any], int]:
        metrics = accuracy.measure(lm, depth.fraction, settings, data, kept)
        return metrics, accuracy.items(metrics)

    reads = [data / task for task in settings.tasks]
    # At a predictor's depths, and on tasks that are scored there alone, a job is no point of a curve over budgets.
    stage = "evaluate-auto" if budget else "evaluate-whole" if "whole" in out.parts else "evaluate"
    with measured.tracked(stage, measured.config(settings), [out], reads=reads) as tracker:
        if budget:
            watch = measured.watch()
            metrics = accuracy.predicted(lm, budget, settings, data, kept)
            measured.write("accuracy", auto_record(out, budget), None, metrics, accuracy.items(metrics), watch)
            typer.echo(f"{metrics['executed_mean']:.2f} of {model.blocks} blocks on average: {_line(metrics)}")
            predicted = {"average_predicted": _average(metrics), "executed_predicted": metrics["executed_mean"]}
            tracker.summary({**predicted, **_numbers(metrics)})
        for count, metrics in measured.records("accuracy", out, measure, _line):
            show(tracker, measured.budget(count), metrics)
    shutil.rmtree(kept.folder, ignore_errors=True)


def show(tracker: Tracker, budget: Budget, metrics: dict[str, Any]) -> None:
    """Add an accuracy record's scores at a budget to the curves: as tables have them (percent, the mean over the tasks
    among them), and as the harness does."""
    shown = {f"accuracy/{task}": score for task, score in percents(metrics["tasks"]).items()}
    curves = {"budget": budget.fraction, "accuracy/average": _average(metrics), **shown, **_numbers(metrics)}
    tracker.at_depth(budget.removed, curves, {"average": _average(metrics)})


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Every figure by its task and name."""
    return {
        f"{task}/{key}": value
        for task, found in metrics["tasks"].items()
        for key, value in found.items()
        if key != "items"
    }


def _average(metrics: dict[str, Any]) -> float:
    return fmean(percents(metrics["tasks"]).values())


def _line(metrics: dict[str, Any]) -> str:
    scores = percents(metrics["tasks"])
    return ", ".join(f"{name} {score:.1f}" for name, score in scores.items()) + f"; mean {_average(metrics):.1f}"
