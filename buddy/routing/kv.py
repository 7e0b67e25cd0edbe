"""The KV cache of a routed model: every block has the same length, whether it ran at a token or not.

A block that is skipped at a token computes no key and value for it. What stands in its place is the K/V policy:

- ``zero``: zeros, as the paper does. A zero key scores 0 and so still takes softmax weight.
- ``mask``: the position is left out of that block's attention.
- ``project``: the block's own k/v projections of the state that passes by (two small products, no attention, no MLP).

Keys and values live in buffers that grow geometrically: what a generation may come to is no reason to hold memory before
it does. A decode step writes one column; a sub-batch writes its rows and attends to them where they lie
(`buddy.routing.attention`). Nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from buddy.routing.profiling import CACHE, mark
from buddy.routing.schedule import Rows
from buddy.routing.types import CausalLM


@dataclass(eq=False)
class Extent:
    """What the blocks of a cache have in common. They and their cache hold it, and none of them holds the cache: so the
    buffers are gone with the last reference to it, and no garbage has to be collected for that.

    Attributes:
        capacity: columns of the buffers.
        length: tokens held.
        batch: number of sequences B; 0 before the first pass.
        rows: rows of the batch that the block now running works on; None means all.
        offset: first of the pass's columns that it works on (a group of prompts leaves out padding).
        written: (B, 1, S, 1) boolean, the tokens whose K/V the block now running leaves; None means all.
    """

    capacity: int
    length: int = 0
    batch: int = 0
    rows: Rows | None = None
    offset: int = 0
    written: Tensor | None = None


def _of_extent(name: str) -> Any:
    """An attribute of a cache that stands in its extent."""
    return property(lambda cache: getattr(cache.extent, name), lambda cache, value: setattr(cache.extent, name, value))


class BlockCache(CacheLayerMixin):
    """Keys and values of one block: (B, KV heads, capacity, head size), of which ``extent.length`` columns are filled."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, extent: Extent) -> None:
        super().__init__()
        self.extent = extent

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros for the whole batch, shaped like these states but ``extent.capacity`` long."""
        extent = self.extent
        _, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(extent.batch, heads, extent.capacity, size)
        self.values = value_states.new_zeros(extent.batch, heads, extent.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns of ``extent.rows``, and return what attention reads.

        That is the states just given while nothing came before them, and afterwards the filled columns of the whole
        batch, as views.
        """
        with mark(CACHE):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            extent = self.extent
            key_states, value_states = _left(key_states, extent.written), _left(value_states, extent.written)
            start = extent.length + extent.offset
            end = start + key_states.shape[-2]
            rows = extent.rows
            if rows is None:
                self.keys[:, :, start:end] = key_states
                self.values[:, :, start:end] = value_states
            else:
                self.keys[rows.index, :, start:end] = key_states
                self.values[rows.index, :, start:end] = value_states
        if extent.length == 0:
            return key_states, value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self, capacity: int) -> None:
        """Move to longer buffers; the new columns are zero."""
        if self.is_initialized:
            extra = capacity - self.keys.shape[2]
            self.keys = torch.nn.functional.pad(self.keys, (0, 0, 0, extra))
            self.values = torch.nn.functional.pad(self.values, (0, 0, 0, extra))

    def get_seq_length(self) -> int:
        """Columns filled, the same for every block."""
        return self.extent.length

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """(length of keys, offset of the first) that attention will see for this many new tokens."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.extent.length + new, 0

    def get_max_length(self) -> int:
        """-1: it grows as needed."""
        return -1

    get_max_cache_shape = get_max_length


class RoutedCache(Cache):
    """A cache for `RoutedModel`; it also carries the routing state of its sequences.

    Args:
        blocks: number of blocks L.
        policy: what stands for the K/V of a skipped block: ``zero``, ``mask`` or ``project``.
        capacity: columns of the buffers, which are allocated as blocks first write. Full ones double.
        limit: tokens that it is expected to hold at most; short of it, buffers do not double beyond it.

    Attributes:
        extent: capacity, length and what else its blocks have in common; its fields are attributes of the cache too.
        present: (L, B, capacity) boolean under ``mask``: where a block has K/V. None until a route is recorded.
        complete: per block, whether no position of it is missing: known on the host, so that no step has to ask.
        routing: the policy's state and the current route, kept by the engine.
        graph: captured decode steps (`buddy.routing.graphs.decoder`), or None.
    """

    capacity: int = _of_extent("capacity")
    length: int = _of_extent("length")
    batch: int = _of_extent("batch")
    rows: Rows | None = _of_extent("rows")
    offset: int = _of_extent("offset")
    written: Tensor | None = _of_extent("written")

    def __init__(self, blocks: int, policy: str = "zero", capacity: int = 64, limit: int = 0) -> None:
        self.extent = Extent(max(capacity, 1))
        self.blocks = [BlockCache(self.extent) for _ in range(blocks)]
        super().__init__(layers=list(self.blocks))
        self.policy = policy
        self.limit = limit
        self.present: Tensor | None = None
        self.complete = [True] * blocks
        self.routing: Any = None
        self.graph: Any = None

    def reserve(self, batch: int, new: int) -> None:
        """Make room for ``new`` columns of ``batch`` sequences before a forward pass."""
        if self.batch and batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} sequences, the input {batch}")
        self.batch = batch
        total = self.length + new
        if total > self.capacity:
            room = 2 * self.capacity
            if total <= self.limit:
                room = min(room, self.limit)
            self.capacity = max(total, room)
            for block in self.blocks:
                block.grow(self.capacity)
            if self.present is not None:
                self.present = torch.nn.functional.pad(self.present, (0, self.capacity - self.present.shape[-1]))

    def record(self, route: Tensor, new: int, everywhere: list[bool]) -> None:
        """Remember which positions of the pass under way each block leaves out (policy ``mask`` only).

        Args:
            route: boolean (B, L), or (B, S, L) with a route per token, on the cache's device.
            new: number of tokens S of the pass.
            everywhere: per block, whether the whole route names it.
        """
        if self.policy != "mask":
            return
        if self.present is None:
            self.present = torch.zeros(
                len(self.blocks), self.batch, self.capacity, dtype=torch.bool, device=route.device
            )
        by_block = route.T.unsqueeze(-1) if route.dim() == 2 else route.permute(2, 0, 1)
        self.present[:, :, self.length : self.length + new] = by_block
        self.complete = [before and now for before, now in zip(self.complete, everywhere, strict=True)]

    def commit(self, new: int) -> None:
        """Count the columns that the forward pass just wrote."""
        self.length += new

    def window(self, block: int, new: int) -> tuple[Tensor, Tensor]:
        """Keys and values that this block wrote for the ``new`` tokens of the pass under way: (B, heads, new, size)."""
        layer = self.blocks[block]
        columns = slice(self.length, self.length + new)
        return layer.keys[:, :, columns], layer.values[:, :, columns]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the routing state does not follow a selection of sequences."""
        raise NotImplementedError("sequences cannot be picked out of a routed cache: their routing state would stay")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: the routing state does not follow beams."""
        raise NotImplementedError("beam search does not work with routing: routes belong to sequences, not beams")

    def crop(self, *_: Any) -> None:
        """Refused: routing has no way back (assisted decoding needs one)."""
        raise NotImplementedError("a routed cache cannot be cropped: running scores cannot be taken back")


class Tap:
    """Stands in for a cache where none is kept (training, scoring), gradients intact.

    Attributes:
        keys, values: what the block would have written.
        written: (B, 1, S, 1) boolean, the tokens whose K/V are left; those of the others are zero. None means all.
    """

    def __init__(self, written: Tensor | None = None) -> None:
        self.written = written
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Remember and hand back."""
        self.keys, self.values = _left(key_states, self.written), _left(value_states, self.written)
        return self.keys, self.values


def _left(states: Tensor, written: Tensor | None) -> Tensor:
    """What tokens leave of their states (B, heads, S, size): zeros where ``written`` (B, 1, S, 1) says that they do not."""
    return states if written is None else states.masked_fill(~written, 0)


def width(backbone: CausalLM) -> int:
    """Width of a token's keys, or values, in one block: heads times their size."""
    return int(backbone.config.num_key_value_heads * backbone.get_decoder().layers[0].self_attn.head_dim)


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
