"""What is written beside figures: names of methods, tasks, data sets and executions, a cell's coordinates in the CSV, and
the notes on where its records come from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from buddy.methods import METHODS
from buddy.reporting.measured import KINDS, Training
from buddy.reporting.study import Series, Study, is_main_criterion
from buddy.settings import Loss, RouterRecipe
from buddy.study.config import UNSAID
from buddy.study.settings import Variant
from buddy.tasks import TASKS

TASK_LABELS = {name: task.label for name, task in TASKS.items()}
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
    return (METHODS[method].label if method in METHODS else method) + (f" ({', '.join(told)})" if told else "")


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


def number(name: str) -> int:
    """The paper's number of a table, 0 if its name has none."""
    return int("".join(filter(str.isdigit, name)) or 0)


def coordinates(study: Study, name: str, backbone: str, series: Series, removed: int) -> dict[str, Any]:
    """The first columns of a cell's row in the CSV; an axis that does not apply is None."""
    blocks = study.blocks(backbone)
    return {
        "table": name,
        "study": study.name,
        "backbone": backbone,
        "method": series.method,
        **{axis: series.variant.get(axis) for axis in (*Variant.model_fields, "criterion")},
        "lora": series.lora,
        "removed": removed,
        "executed": blocks - removed,
        "fraction": round((blocks - removed) / blocks, 6),
    }


def provenance(study: Study, kind: str, *backbones: str) -> list[str]:
    """One note on where and how often the records were measured."""
    measured = [one for backbone in backbones for one in study.of(KINDS[kind], backbone)]
    devices = sorted({", ".join(filter(None, (one.device, one.dtype))) for one in measured} - {""})
    seeds = len(study.config.study.seeds)
    parts = [f"Measured on {' and '.join(devices)}."] if devices else []
    if study.config.study.records is not None:
        parts.append(f"Records: {study.config.study.records}.")
    if kind == "accuracy" and seeds > 1:
        parts.append(f"What was trained is the mean of {seeds} seeds.")
    notes = [" ".join(parts)] if parts else []
    return notes + left_out(study, kind, *backbones)


def setting(study: Study, kind: str, *backbones: str) -> str:
    """``smollm2-135m on cpu (AMD EPYC)``: the backbones of a figure, and where its records of a kind were measured."""
    measured = [one for backbone in backbones for one in study.of(KINDS[kind], backbone)]
    devices = sorted({one.device for one in measured if one.device})
    return " on ".join(filter(None, [" and ".join(backbones), " and ".join(devices)]))


def left_out(study: Study, kind: str, *backbones: str) -> list[str]:
    """One note that names the records of a kind that could not be used; none where all could."""
    of = [f"backbone~{backbone}" for backbone in backbones]
    files = [
        file for file in study.skipped if file.split("/")[0] == kind and any(name in file.split("/") for name in of)
    ]
    if not files:
        return []
    told = [f"{file}: {study.skipped[file]}" for file in files[:SHOWN]]
    more = [f"and {len(files) - SHOWN} more"] if len(files) > SHOWN else []
    return [f"Left out, as if not measured: {'; '.join(told + more)}."]


SHOWN = 3
"""Records that a note names; of the others it says how many."""

LOSSES: dict[Loss, str] = {
    "ce": "cross-entropy of the data's tokens",
    "kl": "KL divergence from the backbone at full depth without LoRA",
}
"""What `training.loss` is called in tables."""


def trained_by(study: Study, series: Collection[Series]) -> list[str]:
    """One note on what the methods that are compared were trained to minimise; none where none was trained."""
    trained = any(
        one.lora == "trained" or (METHODS[one.method].trained and METHODS[one.method].kind != "static")
        for one in series
    )
    text = LOSSES[study.config.training.loss]
    if study.config.data.answers == "backbone":
        text += ", on prompts that the backbone answered itself"
    start = study.config.router.start
    taken = [f"BUDDY's router is that of {start}; here LoRA alone was trained, along its routes."] if start else []
    tuned = any(one.recipe == "tuned" for one in series)
    return [f"Trained by {text}.", *(taken if tuned else [])] if trained else []


def one_path(study: Study, backbone: str, series: Iterable[Series]) -> list[str]:
    """A note for each router that takes one path whatever the prompt, by the probes at the end of its training."""
    shown = [one for one in series if one.method == "buddy"]
    labels = variant_labels(shown)
    notes = []
    for one in shown:
        trained = [run for run in study.of(Training, backbone, one.path) if run.seed in one.seeds]
        probed = [run.probes for run in trained if run.probes]
        stuck = [probes for probes in probed if probes.paths == 1]
        if stuck:
            prompts, removed = (either(getattr(probes, of) for probes in stuck) for of in ("prompts", "removed"))
            seeds = f" with {len(stuck)} of {len(probed)} seeds" if len(probed) > 1 else ""
            notes.append(
                f"{labels[one.path]}: one path over {prompts} probe prompts with {removed} blocks removed{seeds}; there it "
                "does what a static list does."
            )
    return notes


def either(values: Iterable[float]) -> str:
    """The different whole numbers among the values: ``16`` or ``8 or 16``."""
    return " or ".join(str(number) for number in sorted({int(value) for value in values}))
