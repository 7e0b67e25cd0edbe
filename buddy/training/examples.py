"""From prompts and responses to padded batches that know where the prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from buddy.data.templates import Example
from buddy.errors import UserError

IGNORED = -100
"""Label of a token that does not enter the loss (torch's convention)."""


def encode(tokenizer: Any, pairs: Sequence[tuple[str, str] | Example], max_length: int) -> list[dict[str, Any]]:
    """Tokenise prompt and response; a response that comes to its end has the end-of-sequence token there.

    Args:
        tokenizer: the backbone's.
        pairs: prompts and responses, and whether these come to their end; a pair of two does.
        max_length: longest example, tokens; the response is cut to fit, then the example dropped if none is left.

    Returns:
        Rows of ``input_ids`` (list of int) and ``prompt_length`` (tokens of the prompt).

    Raises:
        UserError: no example fits.
    """
    rows = []
    for prompt, response, ends in starmap(Example, pairs):
        start = tokenizer(prompt).input_ids
        end = [*tokenizer(response, add_special_tokens=False).input_ids, *([tokenizer.eos_token_id] if ends else [])]
        ids = (start + end)[:max_length]
        if len(ids) > len(start):
            rows.append({"input_ids": ids, "prompt_length": len(start)})
    if not rows:
        raise UserError(f"max_length: no example's prompt is shorter than {max_length} tokens")
    return rows


@dataclass
class Collator:
    """Pads a list of rows of `encode` on the right.

    Attributes:
        pad: token id of the padding.
        loss_on: ``response`` or ``all``: which tokens are labels.
        pool_over: ``prompt`` or ``all``: which tokens the router may read.
    """

    pad: int
    loss_on: str = "response"
    pool_over: str = "prompt"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch: ``input_ids``, ``attention_mask``, ``labels``, ``context_mask``, each (B, S) int64."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask, labels, context = torch.zeros_like(ids), torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for i, row in enumerate(rows):
            tokens, prompt = torch.tensor(row["input_ids"]), row["prompt_length"]
            n, first = len(tokens), prompt if self.loss_on == "response" else 0
            ids[i, :n], mask[i, :n] = tokens, 1
            labels[i, first:n] = tokens[first:]
            context[i, : prompt if self.pool_over == "prompt" else n] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "context_mask": context}
