"""What cells of every table are told by: their coordinates in the CSV, and where their records come from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from buddy.reporting.frame import PROBE_PATHS
from buddy.reporting.labels import variant_labels
from buddy.reporting.study import Series, Study
from buddy.settings import STATIC_PEERS, Loss
from buddy.study.settings import Variant


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
    rows = study.frame[(study.frame.kind == kind) & study.frame.backbone.isin(backbones)]
    told = {tuple(part for part in pair if isinstance(part, str)) for pair in zip(rows.device, rows.dtype, strict=True)}
    devices = sorted(", ".join(parts) for parts in told if parts)
    seeds = len(study.config.study.seeds)
    parts = [f"Measured on {' and '.join(devices)}."] if devices else []
    if study.config.study.records is not None:
        parts.append(f"Records: {study.config.study.records}.")
    if kind == "accuracy" and seeds > 1:
        parts.append(f"What was trained is the mean of {seeds} seeds.")
    notes = [" ".join(parts)] if parts else []
    return notes + left_out(study, kind, *backbones)


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


def trained_by(study: Study, series: Iterable[Series]) -> list[str]:
    """One note on what the methods that are compared were trained to minimise; none where none was trained."""
    trained = any(one.lora == "trained" or one.method not in ("dense", *STATIC_PEERS) for one in series)
    text = LOSSES[study.config.training.loss]
    if study.config.data.answers == "backbone":
        text += ", on prompts that the backbone answered itself"
    return [f"Trained by {text}."] if trained else []


def one_path(study: Study, backbone: str, series: Iterable[Series]) -> list[str]:
    """A note for each router that takes one path whatever the prompt, by the probes at the end of its training."""
    shown = [one for one in series if one.method == "buddy"]
    labels = variant_labels(shown)
    notes = []
    for one in shown:
        rows = [row for row in study.training_rows.get((backbone, one.path), []) if row["seed"] in one.seeds]
        probed = [row for row in rows if row["metric"] == PROBE_PATHS]
        stuck = [row for row in probed if row["value"] == 1]
        if stuck:
            prompts, removed = (either(row[name] for row in stuck) for name in ("prompts", "removed"))
            seeds = f" with {len(stuck)} of {len(probed)} seeds" if len(probed) > 1 else ""
            notes.append(
                f"{labels[one.path]}: one path over {prompts} probe prompts with {removed} blocks removed{seeds}; there it "
                "does what a static list does."
            )
    return notes


def either(values: Iterable[float]) -> str:
    """The different whole numbers among the values: ``16`` or ``8 or 16``."""
    return " or ".join(str(number) for number in sorted({int(value) for value in values}))
