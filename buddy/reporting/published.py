"""The paper's published figures, transcribed (BUDDY, arXiv 2606.09514), and which of our cells they belong beside.

The CSV files in ``published/`` ship with the package. A figure is handed out only for the same cell: same table,
backbone, method, number of removed blocks, and for ablations the same full variant.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from buddy.errors import unknown
from buddy.reporting.study import is_main_criterion
from buddy.settings import FolderSource, HubSource, RandomSource
from buddy.study.settings import Backbone

FILES = ("accuracy", "ablations", "latency", "breakdown", "figures", "gsm8k", "training_cost")
BACKBONES = ("llama3-8b", "qwen2.5-7b-instruct", "llama2-7b", "llama1-13b")
TASK_NAMES = {"openbookqa": "obqa"}
"""Tasks that the transcription calls by another name than the study does."""

# The ablations and the latency tables name no backbone where the figures stand; the main variant's row in Tables 6
# and 7 equals Llama2-7B's row in Table 10, and the latency breakdown (Table 8) is stated for Llama2-7B.
ABLATION_BACKBONE = "llama2-7b"
LATENCY_BACKBONE = "llama2-7b"
BREAKDOWN_BATCH = (5, 256)
"""Sequences, and tokens of each, in the pass of Table 8."""
_COMPONENTS = {"backbone_compute": "backbone", "decision_module": "decision", "gather_scatter": "gather_scatter"}

_REPOSITORIES = {
    "meta-llama/llama-2-7b": "llama2-7b",
    "meta-llama/llama-2-7b-hf": "llama2-7b",
    "yahma/llama-13b-hf": "llama1-13b",
    "meta-llama/meta-llama-3.1-8b": "llama3-8b",
    "meta-llama/llama-3.1-8b": "llama3-8b",
    # The paper does not say which of the two its Llama3-8B is; `buddy.reporting.compare` holds both against its dense row.
    "meta-llama/meta-llama-3-8b": "llama3-8b",
    "qwen/qwen2.5-7b-instruct": "qwen2.5-7b-instruct",
}

FIGURE_BACKBONE = "llama2-7b"
"""Backbone of Figures 4 and 5, which the paper does not name: that of its other analyses."""

MAIN_VARIANT = {"feature": "value", "prior": "taylor", "omega": 0.1, "source_block": 1, "recipe": "paper"}
"""The variant behind the paper's BUDDY rows."""


def has_figures_of(method: str, variant: Mapping[str, Any]) -> bool:
    """Whether a method's variant is the one behind the paper's rows: its main one, with LoRA.

    Args:
        method: its name.
        variant: its axes (`buddy.study.config.Run.variant`).
    """
    if method == "buddy":
        return dict(variant) == MAIN_VARIANT  # without LoRA it has one axis more
    return variant.get("lora", "trained") == "trained" and is_main_criterion(method, variant.get("criterion"))


# Table 5's row `value` equals Table 6's row `none`: it was run without a prior. The others vary the main variant.
_FIXED = {5: {"prior": "none"}}
_AXES = {"start_layer": "source_block"}


@cache
def load(name: str) -> list[dict[str, Any]]:
    """One transcribed file as published, row by row, by its name without ``.csv`` (see ``FILES``); numbers as numbers.

    Raises:
        UserError: no such file.
    """
    if name not in FILES:
        raise unknown("published figures", name, FILES)
    text = (resources.files(__package__) / "published" / f"{name}.csv").read_text(encoding="utf-8")
    return [{column: _value(cell) for column, cell in row.items()} for row in csv.DictReader(text.splitlines())]


def _value(cell: str) -> str | int | float:
    for number in (int, float):
        try:
            return number(cell)
        except ValueError:
            pass
    return cell


def _rows(name: str, **wanted: object) -> list[dict[str, Any]]:
    """Rows of a file that have these values."""
    return [row for row in load(name) if all(row[column] == value for column, value in wanted.items())]


def backbone(name: str, definition: Backbone, trained: bool = True) -> str | None:
    """The paper's backbone that a study's backbone is, or None.

    A repository of the paper counts under whatever name the study gives it; another repository or a folder counts
    if the study calls it by the paper's name.

    Args:
        name: the study's name for it.
        definition: its section of the study.
        trained: False where the weights' values do not matter (timing): random weights of the architecture count.
    """
    source = definition.source
    if isinstance(source, RandomSource):
        same = not trained and source.layers is None and source.random in BACKBONES
        return source.random if same else None
    if isinstance(source, HubSource) and source.hub.lower() in _REPOSITORIES:
        return _REPOSITORIES[source.hub.lower()]
    return name if isinstance(source, HubSource | FolderSource) and name in BACKBONES else None


def accuracy(table: int, backbone: str | None, method: str, removed: int) -> dict[str, float]:
    """Published accuracies in percent of one row of Tables 2, 3, 10 or 11: per task, and ``average``; {} if none."""
    ours = {paper: study for study, paper in TASK_NAMES.items()} | {"avg": "average"}
    for row in _rows("accuracy", table=table, backbone=backbone, method=method, removed_blocks=removed):
        scores = list(row)[list(row).index("removed_blocks") + 1 :]
        return {ours.get(column, column): float(row[column]) for column in scores}
    return {}


def dense(backbone: str) -> dict[str, float]:
    """Published accuracies in percent of one of the paper's backbones as it is, per task; {} if none."""
    for row in _rows("accuracy", backbone=backbone, method="dense"):
        found = accuracy(row["table"], backbone, "dense", 0)
        return {task: value for task, value in found.items() if task != "average"}
    return {}


def answers(table: int, backbone: str | None, method: str, removed: int) -> float | None:
    """Published exact match in percent on GSM8K (Table 12); None where the paper has no such cell.

    Args:
        table: number of the table.
        backbone: the paper's backbone (`backbone`).
        method: its name.
        removed: number of removed blocks.
    """
    found = _rows("gsm8k", table=table, method=method, removed_blocks=removed)
    return float(found[0][backbone]) if found and backbone in BACKBONES and backbone in found[0] else None


@cache
def _ablations() -> dict[tuple[int, int], list[tuple[dict[str, Any], float]]]:
    """Per table and number of removed blocks: every cell's full variant and its average accuracy in percent."""
    cells: dict[tuple[int, int], list[tuple[dict[str, Any], float]]] = {}
    for row in load("ablations"):
        axis = _AXES.get(row["axis"], row["axis"])
        value: Any = {"omega": float, "source_block": int}.get(axis, str)(row["value"])
        variant = {**MAIN_VARIANT, **_FIXED.get(row["table"], {}), axis: value}
        if variant["prior"] == "none":
            variant["omega"] = 0.0
        cells.setdefault((row["table"], row["removed_blocks"]), []).append((variant, float(row["avg_accuracy"])))
    return cells


def ablation(table: int, backbone: str | None, variant: Mapping[str, Any], removed: int) -> float | None:
    """Published average accuracy in percent of a variant in Table 5, 6, 7 or 13; None where the paper has no such cell.

    Args:
        table: number of the table.
        backbone: the paper's backbone (`backbone`).
        variant: feature, prior, omega (0 without a prior), source_block and recipe.
        removed: number of removed blocks.
    """
    if backbone != ABLATION_BACKBONE:
        return None
    for cell, value in _ablations().get((table, removed), []):
        if all(variant[axis] == cell[axis] for axis in cell):
            return value
    return None


def latency(table: int, backbone: str | None, method: str, removed: int, dataset: str) -> dict[str, float]:
    """Published prefill and decode tokens/s and speed-ups (on an A100) of one row of Table 4 or 14; {} if none."""
    found = _rows("latency", table=table, method=method, removed_blocks=removed, dataset=dataset)
    if backbone != LATENCY_BACKBONE or not found:
        return {}
    columns = ("prefill_tok_s", "prefill_speedup", "decode_tok_s", "decode_speedup")
    return {column: float(found[0][column]) for column in columns}


def figure(number: int, backbone: str | None, variant: Mapping[str, Any], series: str) -> dict[int, float]:
    """Published points of a line of Figure 4 or 5, by number of removed blocks; {} if none.

    Args:
        number: of the figure.
        backbone: the paper's backbone (`backbone`).
        variant: axes of the run that ours is about.
        series: the line: a data set (4), or a measure and a decode mode such as ``rouge1_reuse`` (5).
    """
    if backbone != FIGURE_BACKBONE or number not in (4, 5) or not has_figures_of("buddy", variant):
        return {}
    return {int(row["x"]): float(row["value"]) for row in _rows("figures", figure=number, series=series)}


def retention(backbone: str | None, variant: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Published share of the score that the budget predictor keeps, and of the compute it uses, in percent, by task
    (Figure 13); {} if none, and for a predictor of another variant than the paper's."""
    if backbone != FIGURE_BACKBONE or not has_figures_of("buddy", variant):
        return {}
    kept, used = (
        {row["x"]: float(row["value"]) for row in _rows("figures", figure=13, series=name)}
        for name in ("retention", "flops_ratio")
    )
    ours = {theirs: name for name, theirs in TASK_NAMES.items()}
    return {ours.get(task, task): (kept[task], used[task]) for task in map(str, kept)}


def training_cost(table: int, backbone: str | None) -> dict[str, float]:
    """Published hours of training of one row of Table 9 (on an A100), ``sft`` and ``grpo``; {} if none."""
    for row in _rows("training_cost", table=table, backbone=backbone):
        return {name: float(row[f"{name}_hours"]) for name in ("sft", "grpo")}
    return {}


def breakdown(table: int, backbone: str | None, batch_size: int, tokens: int) -> dict[str, dict[str, float]]:
    """Published time of a pass (on an A100) by component, in ``ms`` and ``percent`` (Table 8); {} if none.

    The paper states neither how many blocks were removed nor the phase; 5 x 256 tokens at once are a prefill. Its
    percentages add up to 88.45: what the rest was spent on is not said.

    Args:
        table: number of the table.
        backbone: the paper's backbone (`backbone`).
        batch_size: sequences in the pass.
        tokens: tokens of each.
    """
    if backbone != LATENCY_BACKBONE or (batch_size, tokens) != BREAKDOWN_BATCH:
        return {}
    return {
        _COMPONENTS[row["component"]]: {"ms": float(row["latency_ms"]), "percent": float(row["percent"])}
        for row in _rows("breakdown", table=table)
    }
