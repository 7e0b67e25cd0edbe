"""The KV cache of a routed model: every block has the same length, whether it ran at a token or not.

A block that is skipped at a token computes no key and value for it. What stands in its place is the K/V policy:

- ``zero``: zeros, as the paper does. A zero key scores 0 and so still takes softmax weight.
- ``mask``: the position is left out of that block's attention.
- ``project``: the block's own k/v projections of the state that passes by (two small products, no attention, no MLP).

Keys and values live in buffers that grow geometrically; a decode step writes one column and copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class BlockCache(CacheLayerMixin):
    """Keys and values of one block: (B, KV heads, capacity, head size), of which ``owner.length`` columns are filled."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, owner: RoutedCache) -> None:
        super().__init__()
        self.owner = owner
        self.present: Tensor | None = None  # (B, capacity) bool, only under `mask`: where real K/V stand

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros for the whole batch, shaped like these states but ``owner.capacity`` long."""
        owner = self.owner
        _, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(owner.batch, heads, owner.capacity, size)
        self.values = value_states.new_zeros(owner.batch, heads, owner.capacity, value_states.shape[-1])
        if owner.policy == "mask":
            self.present = torch.zeros(owner.batch, owner.capacity, dtype=torch.bool, device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns of ``owner.rows`` and return those rows' keys and values up to and including them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end, rows = self.owner.length, self.owner.length + key_states.shape[-2], self.owner.rows
        if rows is None:
            self.keys[:, :, start:end] = key_states
            self.values[:, :, start:end] = value_states
            if self.present is not None:
                self.present[:, start:end] = True
            return self.keys[:, :, :end], self.values[:, :, :end]
        self.keys[rows, :, start:end] = key_states
        self.values[rows, :, start:end] = value_states
        if self.present is not None:
            self.present[rows, start:end] = True
        return self.keys[rows, :, :end], self.values[rows, :, :end]

    def grow(self, capacity: int) -> None:
        """Move to longer buffers; the new columns are zero and absent."""
        if not self.is_initialized:
            return
        extra = capacity - self.keys.shape[2]
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
        self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))
        if self.present is not None:
            self.present = torch.nn.functional.pad(self.present, (0, extra))

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        if self.is_initialized:
            self.keys, self.values = self.keys[rows], self.values[rows]
            self.present = None if self.present is None else self.present[rows]

    def get_seq_length(self) -> int:
        """Columns filled, the same for every block."""
        return self.owner.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length of keys, offset of the first) that attention will see for this many new tokens."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.owner.length + new, 0

    def get_max_length(self) -> int:
        """-1: it grows as needed."""
        return -1

    get_max_cache_shape = get_max_length


class RoutedCache(Cache):
    """A cache for `RoutedModel`; it also carries the routing state of its sequences.

    Args:
        blocks: number of blocks L.
        policy: what stands for the K/V of a skipped block: ``zero``, ``mask`` or ``project``.
        capacity: columns to allocate at first; a good guess spares the growth.

    Attributes:
        length: tokens held.
        rows: rows of the batch that the block now running works on, (n,) int64; None means all.
        routing: the policy's state and the current route, kept by the engine.
    """

    def __init__(self, blocks: int, policy: str = "zero", capacity: int = 64) -> None:
        self.blocks = [BlockCache(self) for _ in range(blocks)]
        super().__init__(layers=list(self.blocks))
        self.policy = policy
        self.capacity = max(capacity, 1)
        self.length = 0
        self.batch = 0
        self.rows: Tensor | None = None
        self.routing: Any = None

    def reserve(self, batch: int, new: int) -> None:
        """Make room for ``new`` columns of ``batch`` sequences before a forward pass."""
        if self.batch and batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, the input {batch}")
        self.batch = batch
        if self.length + new > self.capacity:
            self.capacity = max(self.length + new, 2 * self.capacity)
            for block in self.blocks:
                block.grow(self.capacity)

    def commit(self, new: int) -> None:
        """Count the columns that the forward pass just wrote."""
        self.length += new
        self.rows = None

    def window(self, block: int, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values that this block wrote for the ``new`` tokens of the pass under way: (B, heads, new, size)."""
        layer = self.blocks[block]
        columns = slice(self.length, self.length + new)
        return layer.keys[:, :, columns], layer.values[:, :, columns]

    def missing(self, block: int) -> bool:
        """Whether attention in this block must leave positions out (policy ``mask`` only)."""
        layer = self.blocks[block]
        if self.policy != "mask" or self.length == 0:
            return False
        return layer.present is None or not bool(layer.present[:, : self.length].all())

    def write(self, block: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write K/V of these rows for a block that does not run (policy ``project``)."""
        self.rows = rows
        self.blocks[block].update(keys, values)
        self.rows = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        for block in self.blocks:
            block.select(indices)
        self.batch = len(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: the routing state does not follow beams."""
        raise NotImplementedError("beam search does not work with routing: routes belong to sequences, not beams")

    def crop(self, *_: Any) -> None:
        """Refused: routing has no way back (assisted decoding needs one)."""
        raise NotImplementedError("a routed cache cannot be cropped: running scores cannot be taken back")


class SourceTap:
    """Stands in for a cache where none is kept (training): remembers what the source block would have written."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Remember and hand back, gradients intact."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states


def project(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """K/V that a block would have written for normalised states, without its queries, attention and MLP.

    Args:
        attention: the block's ``self_attn`` (Llama, Qwen2, Qwen3).
        hidden: (n, S, H), after the block's input norm.
        cos, sin: rotary embedding, (n or 1, S, head size).

    Returns:
        keys (after rotary embedding) and values, each (n, KV heads, S, head size).
    """
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(hidden).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    values = attention.v_proj(hidden).view(shape).transpose(1, 2)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat((-second, first), dim=-1) * sin, values
