"""From rows to figures with their uncertainty: averages over tasks and seeds, medians of timed passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from buddy.reporting.frame import AUTO
from buddy.reporting.study import Race, Series, Study
from buddy.resampling import INTERVAL_RESAMPLES

NOT_MEASURED = "not measured"
DEPTH_TOLERANCE = 0.05
"""Blocks by which the mean depth of a measurement may miss the one asked for and still count as it."""
NORMAL = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Measure:
    """One figure of a table or plot; ``value`` is None where nothing was measured, and ``note`` says so.

    Attributes:
        value: percent for accuracies and shares of a pass, tokens/s, ratio, GB/s, MB or ms for timings; the mean over
            seeds.
        stderr: standard error in the same unit. Over a task's items for an accuracy, sqrt(sum of squares) / tasks
            for the average. Seeds see the same items, so theirs is averaged and not divided by their number.
            For timings: bootstrap over the timed passes.
        low, high: 10th and 90th percentile over the timed passes, or over prompts.
        seed_sd: standard deviation between seeds, where there are several.
        n: items, timed passes, or prompts.
        seeds: number of seeds behind it.
        limit: items per task the evaluation was cut to, if it was.
        executed_mean: number of blocks that ran on average; the mean over seeds.
        off_depth: whether that misses the depth asked for (by more than ``DEPTH_TOLERANCE``) in any of the seeds.
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
    executed_mean: float | None = None
    off_depth: bool = False
    note: str = NOT_MEASURED


def accuracy(study: Study, backbone: str, series: Series, removed: int) -> dict[str, Measure]:
    """Accuracies in percent of one row: per task of the study, and ``average`` over them.

    A seed enters the average only with all its tasks.
    """
    seeds = series.seeds
    per_seed: dict[int, dict[str, Measure]] = {}
    for row in study.accuracy_rows.get((backbone, series.path, removed), []):
        if row["seed"] in seeds:
            per_seed.setdefault(row["seed"], {})[row["task"]] = _scored(row)
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


def answers(study: Study, backbone: str, series: Series, removed: int) -> dict[tuple[str, str], Measure]:
    """Exact matches in percent of generated answers, by task and filter; {} if not measured."""
    found: dict[tuple[str, str], list[Measure]] = {}
    for row in study.generation_rows.get((backbone, series.path, removed), []):
        if row["seed"] in series.seeds:
            found.setdefault((row["task"], row["filter"]), []).append(_scored(row))
    return {key: over_seeds(seeds, len(series.seeds)) for key, seeds in found.items()}


def _scored(row: Mapping[str, Any]) -> Measure:
    """One seed's score in percent."""
    return Measure(
        value=100 * row["value"],
        stderr=_percent(row["stderr"]),
        n=int(row["n"]),
        seeds=1,
        limit=_integer(row["limit"]),
        **_depth(row),
        note="",
    )


def _depth(row: Mapping[str, Any]) -> dict[str, Any]:
    """``executed_mean`` and ``off_depth``; a record may not say how many blocks ran, and where sequences have depths
    of their own (mixed budgets, a predictor's) there is no one depth to miss."""
    mean = None if pd.isna(row["executed_mean"]) else float(row["executed_mean"])
    misses = mean is not None and abs(mean - row["executed"]) > DEPTH_TOLERANCE
    return {"executed_mean": mean, "off_depth": misses and row["execution"] not in ("mixed", "nested", "full", AUTO)}


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
        executed_mean=_mean(task.executed_mean for task in tasks),
        off_depth=any(task.off_depth for task in tasks),
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
        executed_mean=_mean(seed.executed_mean for seed in seeds),
        off_depth=any(seed.off_depth for seed in seeds),
        note="" if len(seeds) >= expected else f"{len(seeds)} of {expected} seeds",
    )


LATENCY_METRICS = {
    "paths_mean": "paths",
    "called_mean": "blocks",
    "prefill_tok_s": "tok/s",
    "prefill_speedup": "x",
    "prefill_of_sliced": "x",
    "prefill_of_ideal": "x",
    "decode_tok_s": "tok/s",
    "decode_speedup": "x",
    "decode_of_sliced": "x",
    "decode_of_ideal": "x",
    "decode_of_called": "x",
    "total_of_ideal": "x",
    "decode_gb_s": "GB/s",
    "decode_of_copy": "x",
    "peak_memory_mb": "MB",
}
"""Metrics of the latency table and their units, in its order; ``decode_of_copy`` is decode_gb_s over copy_gb_s."""


def latency(
    study: Study,
    backbone: str,
    race: Race,
    execution: str,
    removed: int,
    series: str | None = None,
    slack: int | None = None,
) -> dict[str, Measure]:
    """Figures of one row of the latency table, for a timed series (BUDDY's main variant by default); {} if not measured."""
    per_seed: dict[str, list[Measure]] = {}
    for seed in study.config.study.seeds:
        timed = {
            row["metric"]: _timed(row)
            for row in study.race_rows(backbone, race, series)
            if (row["execution"], int(row["removed"]), row["seed"]) == (execution, removed, seed)
            and (execution != "varied" or _bound(row) == slack)
        }
        read, copied = timed.get("decode_gb_s"), timed.get("copy_gb_s")
        if read and copied and read.value is not None and copied.value:
            timed["decode_of_copy"] = replace(read, value=read.value / copied.value)
        for metric in LATENCY_METRICS:
            if metric in timed:
                per_seed.setdefault(metric, []).append(timed[metric])
    found = {metric: over_seeds(seeds, 1) for metric, seeds in per_seed.items()}
    if execution == "dense":
        # Dense is its own reference: 1 by definition, so its record says nothing.
        for phase in ("prefill", "decode") if found else ():
            rate = found[f"{phase}_tok_s"]
            found[f"{phase}_speedup"] = replace(rate, value=1.0, stderr=None, low=None, high=None, seed_sd=None)
    return found


def _bound(row: Mapping[str, Any]) -> int | None:
    """The slack of a timed batch; None where its sequences chose independently."""
    return None if row["slack"] is None or pd.isna(row["slack"]) else int(row["slack"])


def bounds(study: Study, backbone: str, race: Race) -> list[int | None]:
    """Under which bounds varied routes were timed in a race; None, without one, first."""
    found = {_bound(row) for row in study.race_rows(backbone, race) if row["execution"] == "varied"}
    return sorted(found, key=lambda slack: -1 if slack is None else slack)


def mixtures(study: Study, backbone: str, race: Race, execution: str = "mixed") -> dict[int, tuple[int, ...]]:
    """Batches of mixed budgets in a race: mean number of removed blocks to that of each sequence."""
    rows = [row for row in study.race_rows(backbone, race) if row["execution"] == execution]
    found = {int(row["removed"]): row["removed_per_sequence"] for row in rows}
    return {removed: depths for removed, depths in sorted(found.items()) if isinstance(depths, tuple)}


def breakdown(study: Study, backbone: str, removed: int) -> dict[tuple[str, str, str], Measure]:
    """What the main variant's passes spend at a depth, by phase, component and unit (``ms`` or ``percent``)."""
    rows = [row for row in profiled(study, backbone, removed) if row["execution"] != AUTO]
    return _components(rows)


def predicted_breakdown(study: Study, backbone: str) -> tuple[float, dict[tuple[str, str, str], Measure]]:
    """The same where the budget predictor chooses each sequence's depth, and the mean depth that it chose; {} if not
    measured. The records of all depths have the same, and the first one's is taken."""
    for removed in study.removed(backbone):
        rows = [row for row in profiled(study, backbone, removed) if row["execution"] == AUTO]
        if rows:
            return float(rows[0]["executed_mean"]), _components(rows)
    return 0.0, {}


def _components(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], Measure]:
    return {
        (row["phase"], row["component"], row["metric"]): _timed(row)
        for row in rows
        if isinstance(row["component"], str)
    }


def routing_cost(study: Study, backbone: str) -> dict[int, dict[str, Measure]]:
    """Milliseconds of routing one decode step by context length: ``routing_ms`` and ``reread_ms``.

    Depth plays no part in it: the records of all depths have the same figures, and the first one's are taken.
    """
    found: dict[int, dict[str, Measure]] = {}
    for removed in study.removed(backbone):
        for row in profiled(study, backbone, removed):
            if not pd.isna(row["context"]):
                found.setdefault(int(row["context"]), {}).setdefault(row["metric"], _timed(row))
    return dict(sorted(found.items()))


def profiled(study: Study, backbone: str, removed: int) -> list[dict[str, Any]]:
    """Rows of the frame behind a breakdown at a depth, of the first seed: one run is profiled, as one is timed."""
    rows = study.breakdown_rows.get((backbone, study.main(backbone).path, removed), [])
    return [row for row in rows if row["seed"] == study.config.study.seeds[0]]


def _timed(row: Mapping[str, Any]) -> Measure:
    """A timed figure, with spread and standard error where the record has the single passes."""
    measure = Measure(value=float(row["value"]), n=int(row["n"]), seeds=1, note="", **_depth(row))
    if not isinstance(row["values"], tuple):
        return measure
    return replace(measure, stderr=bootstrap(row["values"]), low=float(row["low"]), high=float(row["high"]))


@cache
def bootstrap(passes: tuple[float, ...]) -> float | None:
    """Bootstrap standard error of the median of the timed passes; None for a single pass."""
    if len(passes) < 2:
        return None
    random = np.random.default_rng(0)
    return float(np.median(random.choice(passes, (INTERVAL_RESAMPLES, len(passes))), axis=1).std(ddof=1))


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
