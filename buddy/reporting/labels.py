"""How methods, tasks, data sets and executions are written in tables, legends and the terminal."""

from __future__ import annotations

from collections.abc import Mapping

TASK_LABELS = {
    "openbookqa": "OBQA",
    "piqa": "PIQA",
    "boolq": "BoolQ",
    "siqa": "SIQA",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "winogrande": "WinoGrande",
}
_METHODS = {
    "dense": "Dense",
    "shortened_llama": "Shortened LLaMA",
    "shortgpt": "ShortGPT",
    "sleb": "SLEB",
    "pudding": "PuDDing",
    "first": "FiRST",
    "buddy": "BUDDY",
}
EXECUTIONS = {
    "dense": "Dense",
    "sliced": "Sliced",
    "reuse": "BUDDY (reuse)",
    "recompute": "BUDDY (recompute)",
    "mixed": "BUDDY (mixed budgets)",
}
COMPONENTS = {
    "backbone": "Backbone compute",
    "decision": "Decision Module",
    "gather_scatter": "Gather/scatter",
    "cache": "K/V cache",
    "other": "Other",
    "total": "Total",
    "unprofiled": "Without the profiler",
}
"""Parts of a routed pass (the paper's Table 8 has the first three), all of it, and all of it when nobody looks."""
DATASETS = {"alpaca": "Alpaca", "samsum": "SAMSum"}


def fraction(executed: int, blocks: int) -> str:
    """Share of blocks executed with two decimals, halves rounded up: 20 of 32 is 0.63."""
    hundredths = (200 * executed + blocks) // (2 * blocks)
    return f"{hundredths // 100}.{hundredths % 100:02d}"


def method_label(method: str) -> str:
    """A method's name as its authors write it."""
    return _METHODS.get(method, method)


def series_labels(series: Mapping[str, str]) -> dict[str, str]:
    """Labels of series (see `buddy.reporting.study.Study.series`); those that share a method also name their axes."""
    methods = list(series.values())
    labels = {}
    for one, method in series.items():
        axes = [level.replace("~", " ") for level in one.split("/") if not level.startswith("method~")]
        alone = methods.count(method) == 1 or not axes
        labels[one] = method_label(method) if alone else f"{method_label(method)} ({', '.join(axes)})"
    return labels
