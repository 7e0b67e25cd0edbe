"""From records to figures with their uncertainty: averages over tasks and seeds, medians of timed passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from buddy.reporting.measured import Accuracy, Breakdown, Figure, Generation, Latency, Parts, Score
from buddy.reporting.study import Race, Series, Study
from buddy.resampling import plain_bootstrap

Array = NDArray[np.float64]

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
        samples: by task or data set the value of each item, (n,), in the same unit and the mean over seeds: what tells it
            apart from another figure of the same items; () where they are not known.
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
    samples: tuple[Array, ...] = field(default=(), compare=False, repr=False)


def accuracy(study: Study, backbone: str, series: Series, removed: int) -> dict[str, Measure]:
    """Accuracies in percent of one row: per task of the study, and ``average`` over them.

    A seed enters the average only with all its tasks.
    """
    seeds = series.seeds
    per_seed: dict[int, dict[str, Measure]] = {}
    for one in study.of(Accuracy, backbone, series.path, removed):
        if one.seed in seeds:
            scores = {task: scored(score, one) for task, score in one.scores.items()}
            per_seed.setdefault(one.seed, {}).update(scores)
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
    for one in study.of(Generation, backbone, series.path, removed):
        for key, share in one.answers.items() if one.seed in series.seeds else ():
            found.setdefault(key, []).append(scored(share, one))
    return {key: over_seeds(seeds, len(series.seeds)) for key, seeds in found.items()}


def scored(figure: Figure, record: Accuracy | Generation) -> Measure:
    """One seed's score in percent."""
    executed_mean = figure.executed_mean if isinstance(figure, Score) else getattr(record, "executed_mean", None)
    return Measure(
        value=100 * figure.value,
        stderr=None if figure.stderr is None else 100 * figure.stderr,
        n=figure.n,
        seeds=1,
        limit=record.limit,
        executed_mean=executed_mean,
        off_depth=_misses(executed_mean, record.executed),
        note="",
        samples=(_percent(figure.items),) if isinstance(figure, Score) and figure.items else (),
    )


def _percent(items: str) -> Array:
    """Of each item, a digit, 100 where it was right."""
    return 100.0 * (np.frombuffer(items.encode(), np.uint8).astype(np.float64) - ord("0"))


def _misses(executed_mean: float | None, asked: int | None) -> bool:
    """Whether another number of blocks ran than was asked for; a record may not say how many."""
    return executed_mean is not None and asked is not None and abs(executed_mean - asked) > DEPTH_TOLERANCE


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
        samples=tuple(one for task in tasks for one in task.samples) if all(task.samples for task in tasks) else (),
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
        samples=_over_seeds([seed.samples for seed in seeds]),
    )


def _over_seeds(seeds: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """Of each item the mean over seeds; () where they have not all the same items."""
    if len({tuple(map(len, one)) for one in seeds}) != 1:
        return ()
    return tuple(np.mean(same, axis=0) for same in zip(*seeds, strict=True))


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
            metric: _timed(figure, one.executed_mean, _misses(one.executed_mean, one.executed) and not _of_many(one))
            for one in study.race(backbone, race, series)
            if (one.execution, one.removed, one.seed) == (execution, removed, seed)
            and (execution != "varied" or one.slack == slack)
            for metric, figure in one.figures.items()
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


def _of_many(timed: Latency) -> bool:
    """Whether its sequences have depths of their own, so that there is no one depth to miss."""
    return timed.execution in ("mixed", "nested", "full")


def bounds(study: Study, backbone: str, race: Race) -> list[int | None]:
    """Under which bounds varied routes were timed in a race; None, without one, first."""
    found = {one.slack for one in study.race(backbone, race) if one.execution == "varied"}
    return sorted(found, key=lambda slack: -1 if slack is None else slack)


def mixtures(study: Study, backbone: str, race: Race, execution: str = "mixed") -> dict[int, tuple[int, ...]]:
    """Batches of mixed budgets in a race: mean number of removed blocks to that of each sequence."""
    timed = [one for one in study.race(backbone, race) if one.execution == execution]
    return dict(sorted((one.removed or 0, one.removed_per_sequence) for one in timed if one.removed_per_sequence))


def breakdown(study: Study, backbone: str, removed: int) -> dict[tuple[str, str, str], Measure]:
    """What the main variant's passes spend at a depth, by phase, component and unit (``ms`` or ``percent``)."""
    return {key: part for one in profiled(study, backbone, removed) for key, part in _spent(one.parts).items()}


def predicted_breakdown(study: Study, backbone: str) -> tuple[float, dict[tuple[str, str, str], Measure]]:
    """The same where the budget predictor chooses each sequence's depth, and the mean depth that it chose; {} if not
    measured. The records of all depths have the same, and the first one's is taken."""
    for removed in study.removed(backbone):
        for one in profiled(study, backbone, removed):
            if one.auto:
                return one.auto_executed, _spent(one.auto, one.auto_executed)
    return 0.0, {}


def _spent(parts: Parts, executed_mean: float | None = None) -> dict[tuple[str, str, str], Measure]:
    return {key: _timed(figure, executed_mean) for key, figure in parts.items()}


def routing_cost(study: Study, backbone: str) -> dict[int, dict[str, Measure]]:
    """Milliseconds of routing one decode step by context length: ``routing_ms`` and ``reread_ms``.

    Depth plays no part in it: the records of all depths have the same figures, and the first one's are taken.
    """
    found: dict[int, dict[str, Measure]] = {}
    for removed in study.removed(backbone):
        for one in profiled(study, backbone, removed):
            for context, costs in one.contexts.items():
                found.setdefault(context, {name: _timed(cost) for name, cost in costs.items()})
    return dict(sorted(found.items()))


def profiled(study: Study, backbone: str, removed: int) -> list[Breakdown]:
    """Breakdowns at a depth, of the first seed: one run is profiled, as one is timed."""
    found = study.of(Breakdown, backbone, study.main(backbone).path, removed)
    return [one for one in found if one.seed == study.config.study.seeds[0]]


def _timed(figure: Figure, executed_mean: float | None = None, off_depth: bool = False) -> Measure:
    """A timed figure, with its standard error where the record has the single passes."""
    return Measure(
        value=figure.value,
        stderr=bootstrap(figure.values),
        low=figure.low,
        high=figure.high,
        n=figure.n,
        seeds=1,
        executed_mean=executed_mean,
        off_depth=off_depth,
        note="",
    )


@cache
def bootstrap(passes: tuple[float, ...]) -> float | None:
    """Bootstrap standard error of the median of the timed passes; None for a single pass."""
    if len(passes) < 2:
        return None
    return float(plain_bootstrap(passes, np.median).standard_error)


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None if there is nothing to average or a value is unknown."""
    known = list(values)
    if not known or any(value is None for value in known):
        return None
    return float(np.mean(np.asarray(known, dtype=float)))
