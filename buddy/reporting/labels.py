"""How methods, tasks, data sets and executions are written in tables, legends and the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from buddy.reporting.study import Series, is_main_criterion
from buddy.settings import RouterRecipe
from buddy.study.config import UNSAID

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
    "dense_lora": "Dense (LoRA)",
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
    "full": "BUDDY (all blocks)",
    "reuse": "BUDDY (reuse)",
    "recompute": "BUDDY (recompute)",
    "varied": "BUDDY (varied routes)",
    "mixed": "BUDDY (mixed budgets)",
    "nested": "BUDDY (nested budgets)",
}
_CRITERIA = {
    "block_influence": "block influence",
    "ppl": "PPL",
    "taylor": "Taylor",
    "ppl_unprotected": "PPL, every block",
}
INDICATORS = {
    "delta_ppl": "\N{GREEK CAPITAL LETTER DELTA} PPL",
    "taylor": "Taylor",
    "cosine": "Cosine",
    "block_influence": "Block influence",
}
PREDICTOR = "predictor"
COMPONENTS = {
    "backbone": "Backbone compute",
    "decision": "Decision Module",
    PREDICTOR: "Budget Predictor",
    "gather_scatter": "Gather/scatter",
    "cache": "K/V cache",
    "other": "Other",
    "total": "Total",
    "unprofiled": "Without the profiler",
}
"""Parts of a routed pass, of them the budget predictor only where it is asked (the paper's Table 8 has the backbone, the
decision and gather/scatter), all of it, and all of it when nobody looks."""
DATASETS = {"alpaca": "Alpaca", "samsum": "SAMSum", "gsm8k": "GSM8K", "wikitext2": "WikiText-2", "ptb": "PTB"}


def fraction(executed: int, blocks: int) -> str:
    """Share of blocks executed with two decimals, halves rounded up: 20 of 32 is 0.63."""
    hundredths = (200 * executed + blocks) // (2 * blocks)
    return f"{hundredths // 100}.{hundredths % 100:02d}"


def method_label(method: str, told: Sequence[str] = ()) -> str:
    """A method's name as its authors write it, with what else there is to tell of it: ``SLEB (no LoRA)``."""
    return _METHODS.get(method, method) + (f" ({', '.join(told)})" if told else "")


def buddy_label(recipe: RouterRecipe) -> str:
    """BUDDY with a router of that recipe; the paper's goes without saying."""
    return method_label("buddy", _of_recipe(recipe))


def _of_recipe(recipe: str | None) -> list[str]:
    return [] if recipe in (None, UNSAID["recipe"]) else [str(recipe)]


def series_labels(series: Sequence[Series]) -> dict[str, str]:
    """Labels of series by their path: the method, what ranks its blocks where that is not plain, a recipe of the router
    other than the paper's, and a want of LoRA."""
    return {one.path: method_label(one.method, told) for one, told in zip(series, _told(series), strict=True)}


def variant_labels(series: Sequence[Series]) -> dict[str, str]:
    """Labels of series by their path, as `series_labels`, with the axes in which two of one label differ."""
    labels = series_labels(series)
    found = {}
    for one, told in zip(series, _told(series), strict=True):
        alike = [other.variant for other in series if labels[other.path] == labels[one.path]]
        apart = [axis for axis in one.variant if len({str(variant.get(axis)) for variant in alike}) > 1]
        differs = [f"{axis.replace('_', ' ')} {one.variant[axis]}" for axis in apart]
        found[one.path] = method_label(one.method, [*told, *differs])
    return found


def _told(series: Sequence[Series]) -> list[list[str]]:
    """What is told of each beside its method."""
    criteria: dict[str, set[str]] = {}
    for one in series:
        criteria.setdefault(one.method, set()).add(str(one.variant.get("criterion")))
    every = []
    for one in series:
        criterion = one.variant.get("criterion")
        plain = criterion is None or (len(criteria[one.method]) == 1 and is_main_criterion(one.method, criterion))
        told = [] if plain else [_CRITERIA.get(str(criterion), str(criterion))]
        told += _of_recipe(one.recipe)
        told += ["no LoRA"] if one.method != "dense" and one.lora == "none" else []
        every.append(told)
    return every
