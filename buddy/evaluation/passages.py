"""Held-out text in tokens: a prompt, and what follows it and is scored.

Of instructions, dialogues and problems it is the response to the prompt, as text alone: without a token that ends it,
which a backbone that was never taught to stop would be judged by. Prose is cut into windows whose second half continues
the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.data import inputs
from buddy.data.catalogue import entry
from buddy.errors import UserError
from buddy.settings import corpus_name


@dataclass(frozen=True)
class Passage:
    """One item.

    Attributes:
        place: row of the data set's split, or window of the prose, from 0.
        tokens: prompt and continuation.
        prompt: how many of them are the prompt, at least 1 and less than all.
    """

    place: int
    tokens: tuple[int, ...]
    prompt: int

    @property
    def scored(self) -> int:
        """Tokens of the continuation."""
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Passages:
    """Items of one data set.

    Attributes:
        name: of the data set.
        rows: which of its rows they are, in words.
        items: in the order of their places.
    """

    name: str
    rows: str
    items: tuple[Passage, ...]

    @property
    def sha256(self) -> str:
        """Of the items' tokens: scores can be compared item by item where it is equal."""
        content = [[passage.place, passage.prompt, *passage.tokens] for passage in self.items]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read(
    path: str | Path, tokenizer: Any, count: int, max_length: int, training: Mapping[str, Any] | None = None
) -> Passages:
    """Items of a data set.

    Args:
        path: a data set folder from `buddy data`, or a text file.
        tokenizer: the backbone's.
        count: number of items, fewer where the set has no more that fit.
        max_length: longest item, tokens; a longer response is cut, and a prompt that leaves no room for one is left out.
        training: settings that the run was trained with (``data``, ``examples``), to tell whether it has seen the items.
            A set without an evaluation split (Alpaca) is scored on its last rows, training takes its first.

    Raises:
        UserError: neither a data set folder nor a text file, a set without prompts or prose, or no item fits.
    """
    path = Path(path)
    name = corpus_name(str(path)) if path.is_file() else path.name
    if path.is_file() or inputs.is_prose(path):
        return Passages(
            name, "evaluation split" if path.is_dir() else "text", _windows(path, tokenizer, count, max_length)
        )
    pairs = inputs.pairs(path)
    data = entry(inputs.name_of(path))
    own = data.evaluation != data.train
    found = []
    for place in range(len(pairs)) if own else reversed(range(len(pairs))):
        passage = _answered(place, pairs[place], tokenizer, max_length)
        if passage is not None:
            found.append(passage)
        if len(found) == count:
            break
    if not found:
        raise UserError(f"max_length: no prompt of {path} leaves room for a response in {max_length} tokens")
    items = tuple(sorted(found, key=lambda passage: passage.place))
    return Passages(name, "evaluation split" if own else _last_rows(name, items, training or {}), items)


def _answered(place: int, pair: tuple[str, str], tokenizer: Any, max_length: int) -> Passage | None:
    """A response after its prompt, tokenised apart as in training; None where nothing of it fits."""
    prompt = tokenizer(pair[0]).input_ids
    response = tokenizer(pair[1], add_special_tokens=False).input_ids
    tokens = tuple(prompt + response)[:max_length]
    return Passage(place, tokens, len(prompt)) if 0 < len(prompt) < len(tokens) else None


def _windows(path: Path, tokenizer: Any, count: int, max_length: int) -> tuple[Passage, ...]:
    """Disjoint windows of equal length, spread evenly over the text; the first half of each is the prompt."""
    # A long text is tokenised as one: the warning that it exceeds the model's context does not apply to its windows.
    tokens = tokenizer(inputs.prose(path), add_special_tokens=False, verbose=False).input_ids
    there = len(tokens) // max_length
    if not there:
        raise UserError(f"max_length: {path} has {len(tokens)} tokens and no window of {max_length}")
    places = sorted({step * there // count for step in range(count)})
    prompt = max_length // 2
    return tuple(
        Passage(place, tuple(tokens[place * max_length : (place + 1) * max_length]), prompt) for place in places
    )


def _last_rows(name: str, items: Sequence[Passage], training: Mapping[str, Any]) -> str:
    """What the items of a set without an evaluation split are, and whether training has seen them."""
    if training.get("data") == name and items[0].place < (training.get("examples") or float("inf")):
        return "last rows, trained on"
    return "last rows"
