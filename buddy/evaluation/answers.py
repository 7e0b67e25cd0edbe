"""The prompts of a data set answered by a backbone: text to train on that needs no labels, and no one's answers.

Greedily, every block at work. What is done is kept after every few batches, so a killed job answers nothing twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from buddy.data.catalogue import entry
from buddy.data.rows import Row
from buddy.data.templates import CUT, questions
from buddy.evaluation import traces
from buddy.routing.model import RoutedModel
from buddy.storage.checkpoints import Checkpoints
from buddy.storage.digests import digest

SHARD = 4
"""Batches whose answers are written together."""


def answer(
    model: RoutedModel, weights: str, name: str, rows: Sequence[Row], new_tokens: int, batch_size: int, folder: Path
) -> tuple[list[Row], dict[str, Any]]:
    """Put the model's own response into every row; goes on where a killed call ended.

    Args:
        model: a dense model.
        weights: a digest of its weights: other answers are not gone on from.
        name: data set.
        rows: its rows; responses in them are replaced.
        new_tokens: longest answer, tokens.
        batch_size: prompts of like length that are answered together.
        folder: where answers are kept until all are there; gone afterwards.

    Returns:
        The rows in their order, those whose answer had not ended by then marked as cut; and ``new_tokens``, ``rows``,
        ``cut`` (how many of them) and ``weights``.
    """
    prompts = questions(name, rows)
    made_by = {
        "data": name,
        "prompts": digest(prompts),
        "weights": weights,
        "dtype": str(model.dtype),
        "new_tokens": new_tokens,
        "batch_size": batch_size,
    }
    tokens = [model.tokenizer(prompt).input_ids for prompt in prompts]
    found: dict[int, tuple[str, bool]] = {}
    kept = Checkpoints(folder, made_by)
    with tqdm(total=len(rows), desc="answering", unit="prompt") as bar:
        for place, members in enumerate(_shards(tokens, SHARD * batch_size)):
            content = kept.read(f"answers-{place:05d}")
            if content is None:
                given = _answers(model, [tokens[number] for number in members], new_tokens, batch_size, bar)
                kept.write(f"answers-{place:05d}", json.dumps(given).encode())
            else:
                given = json.loads(content)
                bar.update(len(members))
            found.update((number, (text, ends)) for number, (text, ends) in zip(members, given, strict=True))
    column = str(entry(name).response)
    answered = [_row(row, column, *found[number]) for number, row in enumerate(rows)]
    shutil.rmtree(folder, ignore_errors=True)
    cut = sum(not ends for _, ends in found.values())
    return answered, {"new_tokens": new_tokens, "rows": len(rows), "cut": cut, "weights": weights}


def _shards(tokens: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Numbers of the prompts in parts, the longest first: of like length, and trouble with memory comes at once."""
    order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _answers(
    model: RoutedModel, tokens: Sequence[list[int]], new_tokens: int, batch_size: int, bar: Any
) -> list[tuple[str, bool]]:
    """Text of each answer, and whether it came to its end."""
    ends = traces.end_tokens(model)
    found: dict[int, tuple[str, bool]] = {}
    for numbers, answers in traces.batches(model, tokens, 1.0, "reuse", new_tokens, batch_size):
        texts = model.tokenizer.batch_decode([one.tokens for one in answers], skip_special_tokens=True)
        for number, one, text in zip(numbers, answers, texts, strict=True):
            found[number] = text, one.tokens[-1] in ends
        bar.update(len(numbers))
    return [found[number] for number in range(len(tokens))]


def _row(row: Row, column: str, text: str, ends: bool) -> Row:
    kept = {name: value for name, value in row.items() if name != CUT}
    return {**kept, column: text, **({} if ends else {CUT: True})}
