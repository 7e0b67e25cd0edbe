"""Accuracy of one run at several budgets: lm-eval's results, reduced to what a record keeps."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from buddy.data.tasks import PREFIX, tasks
from buddy.evaluation.harness import BuddyLM
from buddy.settings import Evaluation

KEPT = ("acc", "acc_norm", "exact_match")


def measure(lm: BuddyLM, budget: float, settings: Evaluation, data: Path) -> dict[str, Any]:
    """Run the tasks at one budget.

    Args:
        lm: the model; its budget is set here.
        budget: fraction of blocks.
        settings: the section `evaluation` of the study.
        data: folder of materialised data sets.

    Returns:
        ``metrics`` of an accuracy record: per task acc, acc_norm, their standard errors, n and one digit per item;
        the mean number of blocks executed; few_shot, limit and the harness version.
    """
    from lm_eval import simple_evaluate

    lm.budget = budget
    lm.reset_count()
    manager, chosen = tasks(data, settings.tasks)
    results = simple_evaluate(
        model=lm,
        tasks=chosen,
        task_manager=manager,
        num_fewshot=settings.few_shot,
        limit=settings.limit,
        batch_size=settings.batch_size,
        bootstrap_iters=1000,
    )
    assert results is not None
    return {
        "tasks": {
            name: _task_metrics(results["results"][PREFIX + name], results["samples"][PREFIX + name])
            for name in settings.tasks
        },
        "executed_mean": lm.executed_mean,
        "few_shot": settings.few_shot,
        "limit": settings.limit,
        "routing": settings.routing,
        "lm_eval": metadata.version("lm_eval"),
    }


def _task_metrics(result: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    kept: dict[str, Any] = {"n": len(samples), "items": {}}
    for key, value in result.items():
        metric = key.split(",")[0]
        if metric.removesuffix("_stderr") in KEPT and isinstance(value, int | float):
            kept[metric] = value
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    for metric in KEPT:
        if ordered and metric in ordered[0]:
            kept["items"][metric] = "".join(str(int(sample[metric])) for sample in ordered)
    return kept
