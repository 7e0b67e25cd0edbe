"""From rows to figures with their uncertainty: averages over tasks and seeds, speed-ups over the dense model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from buddy.reporting.study import Study

NOT_MEASURED = "not measured"
RESAMPLES = 1000
"""Bootstrap resamples behind the standard error of a median; the generator's seed is fixed."""


@dataclass(frozen=True)
class Measure:
    """One figure of a table or plot; ``value`` is None where nothing was measured, and ``note`` says so.

    Attributes:
        value: percent for accuracies, tokens/s, ratio or MB for latency; the mean over seeds.
        stderr: standard error in the same unit. Over a task's items for an accuracy, sqrt(sum of squares) / tasks
            for the average. Seeds see the same items, so theirs is averaged and not divided by their number.
            For latency: bootstrap over the timed passes.
        low, high: 10th and 90th percentile over the timed passes.
        seed_sd: standard deviation between seeds, where there are several.
        n: items, or timed passes.
        seeds: number of seeds behind it.
        limit: items per task the evaluation was cut to, if it was.
        note: why the value is absent or incomplete.
    """

    value: float | None = None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
    seed_sd: float | None = None
    n: int | None = None
    seeds: int = 0
    limit: int | None = None
    note: str = NOT_MEASURED


def accuracy(study: Study, backbone: str, series: str, method: str, removed: int) -> dict[str, Measure]:
    """Accuracies in percent of one row: per task of the study, and ``average`` over them.

    A seed enters the average only with all its tasks.
    """
    seeds = study.seeds(backbone, series, method)
    per_seed: dict[int, dict[str, Measure]] = {}
    for row in study.accuracy_rows.get((backbone, series, removed), []):
        if row["seed"] not in seeds:
            continue
        measure = Measure(
            value=100 * row["value"],
            stderr=_percent(row["stderr"]),
            n=int(row["n"]),
            seeds=1,
            limit=_integer(row["limit"]),
            note="",
        )
        per_seed.setdefault(row["seed"], {})[row["task"]] = measure
    found = {
        task: over_seeds([tasks[task] for tasks in per_seed.values() if task in tasks], len(seeds))
        for task in study.tasks
    }
    complete = [tasks for tasks in per_seed.values() if set(study.tasks) <= set(tasks)]
    whole = [average([tasks[task] for task in study.tasks]) for tasks in complete]
    found["average"] = over_seeds(whole, len(seeds))
    missing = [task for task in study.tasks if found[task].value is None]
    if missing and len(missing) < len(study.tasks):
        found["average"] = replace(found["average"], note=f"{NOT_MEASURED}: {', '.join(missing)}")
    return found


def average(tasks: Sequence[Measure]) -> Measure:
    """Plain mean over tasks; its standard error is sqrt(sum of squared errors) / number of tasks."""
    errors = [task.stderr for task in tasks]
    known = [error for error in errors if error is not None]
    return Measure(
        value=_mean(task.value for task in tasks),
        stderr=math.sqrt(sum(error**2 for error in known)) / len(tasks) if len(known) == len(tasks) else None,
        n=sum(task.n or 0 for task in tasks),
        seeds=1,
        limit=max((task.limit for task in tasks if task.limit is not None), default=None),
        note="",
    )


def over_seeds(seeds: Sequence[Measure], expected: int) -> Measure:
    """Mean over seeds; the note tells if fewer were measured than the study has."""
    if not seeds:
        return Measure()
    values = [seed.value for seed in seeds if seed.value is not None]
    return Measure(
        value=_mean(values),
        stderr=_mean(seed.stderr for seed in seeds),
        low=_mean(seed.low for seed in seeds),
        high=_mean(seed.high for seed in seeds),
        seed_sd=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        n=seeds[0].n,
        seeds=len(seeds),
        limit=max((seed.limit for seed in seeds if seed.limit is not None), default=None),
        note="" if len(seeds) >= expected else f"{len(seeds)} of {expected} seeds",
    )


LATENCY_METRICS = {
    "prefill_tok_s": "tok/s",
    "prefill_speedup": "x",
    "prefill_of_sliced": "x",
    "decode_tok_s": "tok/s",
    "decode_speedup": "x",
    "decode_of_sliced": "x",
    "peak_memory_mb": "MB",
}
"""Metrics of a latency record and their units, in the order of the table."""


def latency(study: Study, backbone: str, dataset: str, execution: str, removed: int) -> dict[str, Measure]:
    """Rates, ratios and memory of one row of the latency table, for BUDDY's main variant; {} if not measured."""
    rows = study.latency_rows.get((backbone, study.main_series(backbone), dataset), [])
    per_seed: dict[str, list[Measure]] = {}
    for seed in study.config.study.seeds:
        # One process timed all of a seed's executions, so its ratios compare like with like.
        timed = {(row["execution"], int(row["removed"]), row["metric"]): row for row in rows if row["seed"] == seed}
        for metric in LATENCY_METRICS:
            if (execution, removed, metric) in timed:
                per_seed.setdefault(metric, []).append(_timed(timed, execution, removed, metric))
    found = {metric: over_seeds(seeds, 1) for metric, seeds in per_seed.items()}
    if execution == "dense":
        # Dense is its own reference: 1 by definition, whether its record says so or says nothing.
        for phase in ("prefill", "decode") if found else ():
            rate = found[f"{phase}_tok_s"]
            found[f"{phase}_speedup"] = replace(rate, value=1.0, stderr=None, low=None, high=None, seed_sd=None)
    if execution == "sliced":
        found = {metric: measure for metric, measure in found.items() if not metric.endswith("of_sliced")}
    return found


def _timed(
    timed: Mapping[tuple[str, int, str], Mapping[str, Any]], execution: str, removed: int, metric: str
) -> Measure:
    """One figure of one process, with its standard error and its 10th and 90th percentile.

    The percentiles of a ratio are over all pairs of a pass of one and a pass of the other.
    """
    row = timed[execution, removed, metric]
    measure = Measure(value=float(row["value"]), n=int(row["n"]), seeds=1, note="")
    phase, _, kind = metric.partition("_")
    if kind == "tok_s":
        return replace(measure, stderr=bootstrap(row["values"]), low=float(row["low"]), high=float(row["high"]))
    reference = {"speedup": ("dense", 0), "of_sliced": ("sliced", removed)}.get(kind)
    other = timed.get((*reference, f"{phase}_tok_s")) if reference else None
    if other is None:
        return measure
    mine, theirs = timed[execution, removed, f"{phase}_tok_s"]["values"], other["values"]
    low, high = np.percentile(np.divide.outer(np.asarray(mine), np.asarray(theirs)), [10, 90])
    return replace(measure, stderr=bootstrap(mine, theirs), low=float(low), high=float(high))


@cache
def bootstrap(passes: tuple[float, ...], reference: tuple[float, ...] | None = None) -> float | None:
    """Bootstrap standard error of a median, or of the ratio of two medians; None for a single pass.

    Args:
        passes: one rate per timed pass.
        reference: the rates it is divided by.
    """
    if len(passes) < 2 or (reference is not None and len(reference) < 2):
        return None
    random = np.random.default_rng(0)
    medians = np.median(random.choice(passes, (RESAMPLES, len(passes))), axis=1)
    if reference is not None:
        medians = medians / np.median(random.choice(reference, (RESAMPLES, len(reference))), axis=1)
    return float(medians.std(ddof=1))


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None if there is nothing to average or a value is unknown."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return float(np.mean(np.asarray(known, dtype=float)))


def _percent(fraction: Any) -> float | None:
    return None if pd.isna(fraction) else 100 * float(fraction)


def _integer(value: Any) -> int | None:
    return None if pd.isna(value) else int(value)
