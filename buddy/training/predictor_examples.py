"""Prompts with the response they ought to get, in tokens: what a budget predictor learns from, and what it must not see.

Instructions, dialogues and problems have a response; of a multiple-choice question it is the right answer, after the
words in which the task is evaluated. A data set without an evaluation split of its own (Alpaca) keeps back the last fifth
of its rows from the predictor. Stage 1 may have been trained on those: they are new to the predictor, not to the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from buddy.data import inputs
from buddy.data.catalogue import CATALOGUE, CHOICE
from buddy.data.choices import Item, item_of, training_items
from buddy.data.sources import PROVENANCE
from buddy.data.tasks import tasks
from buddy.errors import UserError
from buddy.training.examples import encode

HELD_BACK = 0.2
"""Share of a data set without an evaluation split that no predictor is trained on."""


def training_rows(folder: Path, tokenizer: Any, count: int | None, max_length: int) -> list[dict[str, Any]]:
    """Examples that a predictor may learn from.

    Args:
        folder: a data set folder, named after a task if it is one.
        tokenizer: the backbone's.
        count: the first so many; all by default.
        max_length: longest example, tokens.

    Returns:
        Rows of ``input_ids`` and ``prompt_length``, as of `encode`; those of questions also have ``read_length``, the
        tokens that router and predictor read: what the contexts of the options share.
    """
    if _is_choice(folder):
        return [_row(item) for item in training_items(folder.parent, [folder.name], tokenizer, None)[folder.name]][
            :count
        ]
    pairs = inputs.training(folder)
    kept = pairs[: _first_held_back(len(pairs))] if _fingerprint(folder) else pairs
    return encode(tokenizer, kept[:count], max_length)


def held_out_rows(
    folder: Path, tokenizer: Any, count: int | None, max_length: int, trained_on: Mapping[str, str]
) -> tuple[list[dict[str, Any]], str]:
    """Examples that the predictor has not seen.

    Args:
        folder, tokenizer, count, max_length: as in `training_rows`.
        trained_on: the result of `fingerprints` for what the predictor was trained on.

    Returns:
        The rows, and which they are: ``evaluation split``; of a set that has none, ``held back`` where it was trained on
        this very file, or ``all rows``.
    """
    if _is_choice(folder):
        _, (task,) = tasks(folder.parent, [folder.name])
        items = [item_of(task, document, tokenizer, 2048) for document in list(task.eval_docs)[:count]]
        return [_row(item) for item in items], "evaluation split"
    pairs: Sequence[Any] = inputs.pairs(folder)
    which = "evaluation split"
    if file := _fingerprint(folder):
        which = "held back" if file in trained_on.values() else "all rows"
        pairs = pairs[_first_held_back(len(pairs)) :] if which == "held back" else pairs
    return encode(tokenizer, pairs[:count], max_length), which


def fingerprints(folders: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of the files whose last rows are kept back, by folder name."""
    found = {folder.name: _fingerprint(folder) for folder in folders if not _is_choice(folder)}
    return {name: file for name, file in found.items() if file is not None}


def _is_choice(folder: Path) -> bool:
    data = CATALOGUE.get(folder.name)
    return data is not None and data.kind == CHOICE


def _row(item: Item) -> dict[str, Any]:
    context, answer = item.solution
    return {"input_ids": [*context, *answer], "prompt_length": len(context), "read_length": len(item.shared)}


def _first_held_back(rows: int) -> int:
    return rows - math.ceil(HELD_BACK * rows)


def _fingerprint(folder: Path) -> str | None:
    """SHA-256 of the one split of a data set that has no other; None where evaluation has its own.

    Raises:
        UserError: not a data set folder.
    """
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        data = CATALOGUE[content["name"]]
        return str(content["splits"][data.evaluation]["sha256"]) if data.evaluation == data.train else None
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: not a data set (no {PROVENANCE}); make it with `buddy data`") from None
