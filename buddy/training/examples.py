"""From prompts and responses to padded batches that know where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from buddy.data.templates import Example, Spans
from buddy.errors import UserError

IGNORED = -100
"""Label of a token that does not enter the loss (torch's convention)."""


def encode(
    tokenizer: Any, pairs: Sequence[tuple[str, str] | Example], max_length: int, pool_over: str = "prompt"
) -> list[dict[str, Any]]:
    """Tokenise prompt and response; a response that comes to its end has the end-of-sequence token there.

    Args:
        tokenizer: the backbone's.
        pairs: prompts and responses, and whether these come to their end; a pair of two does.
        max_length: longest example, tokens; the response is cut to fit, then the example dropped if none is left.
        pool_over: ``question`` tells of each prompt which tokens are its own and not the template's.

    Returns:
        Rows of ``input_ids`` (list of int) and ``prompt_length`` (tokens of the prompt); with ``question`` also that, the
        places of the prompt's own tokens.

    Raises:
        UserError: no example fits, or a tokenizer that cannot say where its tokens stand.
    """
    rows = []
    by_question = pool_over == "question"
    if by_question and not tokenizer.is_fast:
        raise UserError("pool_over: question needs a tokenizer with a fast form (tokenizer.json)")
    told = {"return_offsets_mapping": True} if by_question else {}
    for prompt, response, ends, own in starmap(Example, pairs):
        asked = tokenizer(prompt, **told)
        start = asked.input_ids
        end = [*tokenizer(response, add_special_tokens=False).input_ids, *([tokenizer.eos_token_id] if ends else [])]
        ids = (start + end)[:max_length]
        if len(ids) > len(start):
            question = {"question": _within(asked.offset_mapping, own)} if by_question else {}
            rows.append({"input_ids": ids, "prompt_length": len(start), **question})
    if not rows:
        raise UserError(f"max_length: no example's prompt is shorter than {max_length} tokens")
    return rows


def _within(places: Sequence[tuple[int, int]], spans: Spans) -> list[int]:
    """Which tokens, standing at these places of a text, reach into one of its spans; all if none does, or there is none."""
    inside = [
        token for token, (start, end) in enumerate(places) if any(start < last and end > first for first, last in spans)
    ]
    return inside or list(range(len(places)))


@dataclass
class Collator:
    """Pads a list of rows of `encode` on the right.

    Attributes:
        pad: token id of the padding.
        loss_on: ``response`` or ``all``: which tokens are labels.
        pool_over: ``prompt``, ``question`` or ``all``: which tokens the router may read.
    """

    pad: int
    loss_on: str = "response"
    pool_over: str = "prompt"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch: ``input_ids``, ``attention_mask``, ``labels``, ``context_mask``, each (B, S) int64.

        With ``question`` also ``read_mask``: 0 for those tokens of the prompts that are the template's.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask, labels, context = torch.zeros_like(ids), torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            tokens, prompt = torch.tensor(row["input_ids"]), row["prompt_length"]
            n, first = len(tokens), prompt if self.loss_on == "response" else 0
            ids[i, :n], mask[i, :n] = tokens, 1
            labels[i, first:n] = tokens[first:]
            context[i, : n if self.pool_over == "all" else prompt] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "context_mask": context}
        return {**batch, "read_mask": self._read(rows, mask)} if self.pool_over == "question" else batch

    @staticmethod
    def _read(rows: list[dict[str, Any]], mask: Tensor) -> Tensor:
        read = mask.clone()
        for i, row in enumerate(rows):
            read[i, : row["prompt_length"]] = 0
            read[i, row["question"]] = 1
        return read
