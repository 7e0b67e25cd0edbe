"""Attention of a sub-batch that reads the whole batch's cache where it lies, without copying keys or values.

Hugging Face's attention wants keys and values of exactly the sequences in the pass; picking a block's sub-batch out of
the cache would copy them at every block and step. `reading_rows` gives a block an attention function that takes the keys
and values of the whole batch and is told which rows the queries belong to.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from buddy.routing.schedule import Rows
from buddy.routing.types import Block
from buddy.routing.views import twin

NAME = "buddy_rows"

CALL_BYTES = {"cpu": 250_000, "cuda": 20_000_000}
"""Bytes of keys and values whose reading takes as long as one more call of the attention kernel."""


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scaled dot-product attention with grouped queries, keys and values never repeated.

    The query heads that share a key head are laid out as further query positions of it.

    Args:
        queries: (n, heads, S, head size).
        keys, values: (n, KV heads, T, head size), any strides.
        mask: boolean, broadcastable to (n, 1, S, T), True where a key may be seen; None lets all be seen.
        scale: factor of the scores.

    Returns:
        (n, heads, S, head size).
    """
    n, heads, new, size = queries.shape
    groups = heads // keys.shape[1]
    packed = queries.reshape(n, heads // groups, groups * new, size)
    if mask is not None and new > 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(n, heads, new, values.shape[-1])


def attend_rows(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, rows: Rows | None
) -> Tensor:
    """Attention of some sequences of a batch on the batch's keys and values.

    Few scattered rows are read run by run (nothing else is read); many rows in one call over the whole batch, when what
    it reads in vain costs less than the calls it saves.

    Args:
        queries: (n, heads, S, head size) of the rows.
        keys, values: (B, KV heads, T, head size) of all sequences.
        mask: boolean, broadcastable to (B, 1, S, T), or None.
        scale: factor of the scores.
        rows: which sequences the queries belong to; None means all.
    """
    if rows is None:
        return attend(queries, keys, values, mask, scale)
    batch = len(keys)
    row_bytes = 2 * keys[0].numel() * keys.element_size()
    if (batch - len(rows)) * row_bytes < (len(rows.runs) - 1) * CALL_BYTES.get(keys.device.type, 0):
        whole = queries.new_zeros(batch, *queries.shape[1:]).index_copy_(0, rows.index, queries)
        return attend(whole, keys, values, mask, scale)[rows.index]
    parts, start = [], 0
    for first, end in rows.runs:
        part = mask if mask is None or len(mask) == 1 else mask[first:end]
        parts.append(attend(queries[start : start + end - first], keys[first:end], values[first:end], part, scale))
        start += end - first
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    rows: Rows | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`attend_rows` in the form that Hugging Face's attention modules call."""
    return attend_rows(query, key, value, attention_mask, scaling, rows).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _interface)


def reading_rows(block: Block) -> Block:
    """The block, attending by `attend_rows`: its mask is boolean and for the whole batch, and it is called with ``rows``.

    It is a `twin`: the backbone's own block attends as before, in this thread and in others. It reads a cache, so it
    never checkpoints its forward pass.
    """
    config = copy.copy(block.self_attn.config)
    config._attn_implementation = NAME
    return twin(block, self_attn=twin(block.self_attn, config=config), gradient_checkpointing=False)
