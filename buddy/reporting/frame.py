"""Records as one tidy frame: one row per record and task or metric."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from buddy.errors import UserError
from buddy.reporting import plausible
from buddy.study.config import UNSAID
from buddy.study.records import Record, find
from buddy.tasks import headline

log = logging.getLogger(__name__)

VARIANT = ("feature", "prior", "omega", "source_block", "recipe", "criterion", "lora", "kv", "decode")
ENVIRONMENT = ("device", "dtype", "torch", "transformers", "threads")
COLUMNS = (
    *("file", "kind", "study", "backbone", "method", "series", *VARIANT, "seed", "fraction", "executed", "removed"),
    *("dataset", "batch_size", "engine", "execution", "slack", "removed_per_sequence"),
    *("phase", "component", "context", "task", "filter", "indicator", "corpus", "length", "preset"),
    *("metric", "value", "stderr", "low", "high", "values", "items", "detail", "n"),
    *("limit", "few_shot", "executed_mean", "prompts", "new_tokens", "tokens", "steps"),
    *(*ENVIRONMENT, "commit", "wall_s", "gpu_s"),
)
"""Columns of the frame.

``series`` is the run without its backbone, its seed and (of a peer) its depth, as in its path; ``value`` is in the unit that ``metric`` names
(accuracies are fractions); ``low`` and ``high`` are the 10th and 90th percentile and ``values`` the single passes, or
prompts, where the record has them; ``items`` has one digit per item of a task, 1 where it was right, and ``detail`` what a
figure needs and fits no row (`_importance`, `_curve`, `_budget`, `_likelihood`). ``corpus`` and ``length`` of an importance are those
that its path names: None is the study's own. ``executed_mean`` is the number of blocks that really ran, ``slack`` the bound on
what a step of a batch called, where one was asked for. Of a batch of mixed budgets, ``removed`` is the mean and ``removed_per_sequence`` a tuple.
"""
PROBE_PATHS = "probe_paths"
"""Metric of a training: distinct paths of the probe prompts at its end."""
AUTO = "auto"
"""Execution of a profiled pass whose depths the budget predictor chose."""
_NOT_SERIES = (
    *("backbone", "seed", "dataset", "batch", "engine", "execution", "slack", "removed"),
    *("indicator", "corpus", "length", "kv", "decode", "preset"),
)
_RATES = ("prefill_tok_s", "decode_tok_s")
_RATIOS = (
    *(f"{phase}_{of}" for of in ("speedup", "of_sliced", "of_ideal") for phase in ("prefill", "decode")),
    *("decode_of_called", "total_of_ideal"),
)
_NUMBERS = ("called_mean", "paths_mean", "decode_gb_s", "copy_gb_s", "peak_memory_mb")


def load(folder: str | Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Read every record in a folder.

    A record that is damaged, incomplete, impossible, or of an older or newer form is named in a warning and left out: one
    such file never stops the others.

    Args:
        folder: the folder of records, as `buddy.study.layout.records_folder` finds it.

    Returns:
        A frame with ``COLUMNS``, empty if nothing has been measured; and what was left out: the reason by the file's
        path below the folder.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for path in find(folder):
        try:
            record = Record.read(path)
            levels = dict(part.split("~", 1) for part in path.relative_to(folder).with_suffix("").parts if "~" in part)
            measured = list(_rows(record, levels))
            plausible.check(record.kind, measured)
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            # The file is JSON with a record's keys, but its metrics are not those of its kind.
            reason = f"not a complete record ({type(error).__name__}: {error})"
        else:
            reason = ""
        if reason:
            log.warning("skipped %s: %s", path, reason)
            skipped[path.relative_to(folder).as_posix()] = reason
        else:
            head = {**_head(record), "file": str(path), "series": _series(path, folder, record)}
            rows += [{**head, **row} for row in measured]
    return pd.DataFrame(rows, columns=list(COLUMNS)), skipped


def series_of(run_path: str) -> str:
    """A run's path (`buddy.study.config.Run.path`) without its backbone, seed and depth: equal for runs to be averaged, and
    for a peer's runs at its depths."""
    return "/".join(part for part in run_path.split("/") if "~" in part and part.split("~")[0] not in _NOT_SERIES)


def _series(path: Path, folder: str | Path, record: Record) -> str:
    levels = path.relative_to(folder).parent.as_posix()
    return series_of(levels) or f"method~{record.method}"


def _head(record: Record) -> dict[str, Any]:
    budget = record.budget
    variant = {**UNSAID, **record.variant} if record.method == "buddy" else record.variant
    return {
        **{axis: variant.get(axis) for axis in VARIANT},
        **{name: record.environment.get(name) for name in ENVIRONMENT},
        **{name: getattr(record, name) for name in ("kind", "study", "backbone", "method", "seed", "n", "commit")},
        **{name: getattr(record, name) for name in ("wall_s", "gpu_s")},
        "fraction": budget.fraction if budget else None,
        "executed": budget.executed if budget else None,
        "removed": budget.removed if budget else None,
    }


def _rows(record: Record, levels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of one record; ``levels`` are the ``axis~value`` of its path."""
    if record.kind == "accuracy":
        yield from _accuracy(record)
    elif record.kind == "generation":
        yield from _generation(record)
    elif record.kind == "trace":
        yield from _trace(record)
    elif record.kind == "latency":
        yield from _latency(record)
    elif record.kind == "breakdown":
        yield from _breakdown(record)
    elif record.kind == "importance":
        yield from _importance(record, levels)
    elif record.kind == "rouge":
        yield from _rouge(record, levels)
    elif record.kind == "likelihood":
        yield from _likelihood(record)
    elif record.kind == "budget":
        yield from _budget(record, levels)
    elif record.kind == "training":
        yield from _training(record)
    else:
        yield from _scalars(record)


def _scalars(record: Record) -> Iterator[dict[str, Any]]:
    for name, value in record.metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield {"metric": name, "value": float(value)}


def _training(record: Record) -> Iterator[dict[str, Any]]:
    """One row per scalar; of a router, one with the paths it ends on; of a budget predictor, one with its curve."""
    preset = record.metrics.get("preset")
    for row in _scalars(record):
        yield {**row, "preset": preset}
    if probes := record.metrics.get("probes"):
        last = float(probes["last"]["paths"])
        at = {"prompts": int(probes["prompts"]), "removed": int(probes["removed"])}
        yield {**at, "metric": PROBE_PATHS, "value": last}
    if preset is not None:
        uniform = float(record.metrics["entropy_uniform"])
        yield {"metric": "curve", "value": uniform, "detail": _curve(record.metrics["curve"]), "preset": preset}


def _curve(points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[tuple[float, float], ...]]:
    """Every logged figure as its (step, value) pairs."""
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((float(point["step"]), float(value)))
    return {name: tuple(pairs) for name, pairs in found.items()}


def _importance(record: Record, levels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One row; its detail is the importance of each block in each window, (N, L)."""
    windows = tuple(tuple(map(float, window)) for window in record.metrics["per_sample"])
    if not windows or len({len(window) for window in windows}) != 1:
        raise ValueError("per_sample is not (windows, blocks)")
    at = {"indicator": record.metrics["indicator"], "corpus": levels.get("corpus")}
    length = int(levels["length"]) if "length" in levels else None
    yield {**at, "length": length, "metric": "importance", "detail": windows, "n": len(windows)}


def _rouge(record: Record, levels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One row per ROUGE figure, with its interval."""
    if record.budget is None:
        raise ValueError("no budget")
    common = {"dataset": record.metrics.get("dataset", levels.get("dataset"))}
    common["decode"] = record.metrics.get("decode", levels.get("decode"))
    for name in ("rouge1", "rougeL"):
        found = record.metrics[name]
        yield {**common, "metric": name, **{at: float(found[key]) for at, key in _INTERVAL.items()}}


_LIKELIHOODS = ("nll", "kl", "agreement")


def _likelihood(record: Record) -> Iterator[dict[str, Any]]:
    """Two kinds of rows: of each data set every measure, with its values item by item, and in ``detail`` which items they
    are; of the record how many distinct paths there were, over how many tokens."""
    if record.budget is None:
        raise ValueError("no budget")
    metrics = record.metrics
    common = {"kv": metrics["kv"], "decode": metrics["decode"], "executed_mean": float(metrics["executed_mean"])}
    for dataset, scored in metrics["datasets"].items():
        which = {"rows": scored["rows"], "sha256": scored["sha256"], "max_length": int(metrics["max_length"])}
        told = {**common, "dataset": dataset, "detail": which, "n": int(scored["n"]), "tokens": sum(scored["tokens"])}
        for name in _LIKELIHOODS:
            values = tuple(map(float, scored[name]["values"]))
            if len(values) != told["n"]:
                raise ValueError(f"{dataset}: {len(values)} values of {name} for {told['n']} items")
            yield {**told, "metric": name, "values": values, **{at: scored[name][key] for at, key in _INTERVAL.items()}}
    for name in ("distinct_paths", "distinct_paths_over_prompts"):
        yield {**common, "metric": name, "value": float(metrics[name]), "tokens": int(metrics["tokens"])}


_INTERVAL = {"value": "mean", "low": "low", "high": "high"}


_PREDICTED = ("blocks", "choices", "histogram", "price", "constants", "hull", "predictor", "oracle", "gain")


def _budget(record: Record, levels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One row per scalar, and one whose detail is all that was measured of a budget predictor on a data set."""
    absent = [name for name in _PREDICTED if name not in record.metrics]
    if absent:
        raise ValueError(f"no {', '.join(absent)}")
    at = {"preset": record.metrics.get("preset", levels.get("preset"))}
    at["dataset"] = record.metrics.get("dataset", levels.get("dataset"))
    for row in _scalars(record):
        yield {**row, **at}
    yield {**at, "metric": "budget", "detail": record.metrics}


def _accuracy(record: Record) -> Iterator[dict[str, Any]]:
    """One row per task, its headline score (`buddy.tasks`). With a preset there is no budget:
    the budget predictor set it for each input."""
    preset = record.variant.get("preset")
    if record.budget is None and preset is None:
        raise ValueError("no budget")
    for task, scores in record.metrics["tasks"].items():
        metric = headline(task, scores)
        yield {
            "task": task,
            "metric": metric,
            "value": float(scores[metric]),
            "stderr": _number(scores.get(f"{metric}_stderr")),
            "items": (scores.get("items") or {}).get(metric),
            "n": int(scores["n"]),
            "limit": record.metrics.get("limit"),
            "few_shot": record.metrics.get("few_shot"),
            "executed_mean": scores.get("executed_mean", record.metrics.get("executed_mean")),
            "preset": preset,
        }


def _generation(record: Record) -> Iterator[dict[str, Any]]:
    """One row per task and filter (the way an answer is found in the text): the share of exact matches."""
    if record.budget is None:
        raise ValueError("no budget")
    metrics = record.metrics
    common = {name: metrics.get(name) for name in ("limit", "few_shot", "executed_mean", "new_tokens")}
    for task, scores in metrics["tasks"].items():
        errors = scores.get("exact_match_stderr") or {}
        for name, value in scores["exact_match"].items():
            yield {
                **{**common, "task": task, "filter": name, "n": int(scores["n"])},
                **{"metric": "exact_match", "value": float(value), "stderr": _number(errors.get(name))},
            }


_TRACED = ("executed_min", "executed_max", "largest_deviation", "distinct_paths_over_prompts", "changed_steps_mean")


def _trace(record: Record) -> Iterator[dict[str, Any]]:
    """One row per figure that sums up the paths of all prompts."""
    if record.budget is None:
        raise ValueError("no budget")
    metrics = record.metrics
    common = {name: metrics[name] for name in ("dataset", "executed_mean")}
    common |= {name: int(metrics[name]) for name in ("prompts", "new_tokens")}
    yield {**common, "metric": "executed_mean", "value": float(metrics["executed_mean"])}
    for name in _TRACED:
        if metrics.get(name) is not None:
            yield {**common, "metric": name, "value": float(metrics[name])}
    paths = metrics["distinct_paths_per_generation"]
    yield {**common, "metric": "distinct_paths_per_generation", **_spread(paths), "value": float(paths["mean"])}
    frequency = tuple(map(float, metrics["block_frequency"]))
    yield {**common, "metric": "block_frequency", "value": sum(frequency) / len(frequency), "values": frequency}


def _latency(record: Record) -> Iterator[dict[str, Any]]:
    """One row per rate, and per ratio, bandwidth, memory and capture figure that the record has."""
    if record.budget is None:
        raise ValueError("no budget")
    metrics = record.metrics
    common = {
        **{name: metrics[name] for name in ("dataset", "engine", "execution")},
        **{name: int(metrics[name]) for name in ("batch_size", "prompts", "new_tokens")},
        "slack": metrics.get("slack"),
        "removed_per_sequence": tuple(metrics.get("removed_per_sequence") or ()) or None,
        "executed_mean": metrics.get("executed_mean"),
        "n": int(metrics["repeats"]),
    }
    for name in _RATES:
        yield {**common, "metric": name, **_spread(metrics[name])}
    for name in _RATIOS:
        if metrics.get(name) is not None:
            yield {**common, "metric": name, **_spread(metrics[name])}
    for name in _NUMBERS:
        if metrics.get(name) is not None:
            yield {**common, "metric": name, "value": float(metrics[name])}
    for name, value in (metrics.get("capture") or {}).items():
        yield {**common, "metric": f"capture_{name}", "value": float(value)}


def _breakdown(record: Record) -> Iterator[dict[str, Any]]:
    """One row per phase, component and unit, with the total as a component, with and without the profiler; and two per
    context length."""
    if record.budget is None:
        raise ValueError("no budget")
    metrics = record.metrics
    common = {name: int(metrics[name]) for name in ("batch_size", "tokens", "steps")}
    yield from _phases(metrics["phases"], common)
    if predicted := metrics.get("auto"):
        mean = float(predicted["executed_mean"])
        yield from _phases(predicted["phases"], {**common, "execution": AUTO, "executed_mean": mean})
    for at in metrics["contexts"]:
        for name in ("routing_ms", "reread_ms"):
            yield {**common, "context": int(at["context"]), "metric": name, **_spread(at[name])}


def _phases(phases: Mapping[str, Any], common: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for phase, spent in phases.items():
        parts = {
            **spent["components"],
            "total": {"ms": spent["total_ms"]},
            "unprofiled": {"ms": spent["unprofiled_ms"]},
        }
        for component, figures in parts.items():
            for unit, value in figures.items():
                yield {**common, "phase": phase, "component": component, "metric": unit, "value": float(value)}


def _spread(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Median, 10th and 90th percentile and the single passes."""
    return {
        "value": float(measured["median"]),
        "low": float(measured["p10"]),
        "high": float(measured["p90"]),
        "values": tuple(float(value) for value in measured["values"]),
    }


def _number(value: Any) -> float | None:
    """A number, or None for what the harness writes where it has none (null, "N/A")."""
    return float(value) if isinstance(value, int | float) else None
