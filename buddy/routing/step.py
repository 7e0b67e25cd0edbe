"""One pass through the blocks, whatever chooses them: what a block is given, and what it leaves in the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from buddy.errors import UserError
from buddy.routing.attention import reading_rows
from buddy.routing.call import RouteState, Routing
from buddy.routing.kv import RoutedCache, Tap, project
from buddy.routing.profiling import CACHE, DECISION, GATHER, mark
from buddy.routing.schedule import Rows
from buddy.routing.types import Block, Decoder
from buddy.routing.views import twin

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one block, each (B, KV heads, S, head size)."""


@dataclass
class Step(ABC):
    """One pass over S new tokens of B sequences, block by block; its forms say which sequences and tokens run which.

    What a form needs is here: the blocks with their arguments, and what the policy reads.
    """

    decoder: Decoder
    routing: Routing
    cache: RoutedCache | None
    new: int
    causal: Any
    attention_mask: Tensor | None
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    state: RouteState

    def __post_init__(self) -> None:
        self.past = self.cache.length if self.cache is not None else 0
        self.kv = self.cache.policy if self.cache is not None else self.routing.kv
        self.in_place = False
        self.states: list[Tensor] = []
        self._inputs: dict[int, tuple[Any, ...]] = {}

    @abstractmethod
    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block; those before it are kept in `states` if that is asked for."""

    def _keep(self, hidden: Tensor) -> Tensor:
        """The same, noted among the `states` if the call asks for them."""
        if self.routing.keeps_states:
            self.states.append(hidden)
        return hidden

    # ---- the blocks ----------------------------------------------------------------------------------------------

    def _read(self, hidden: Tensor) -> tuple[Tensor, KeysValues | None]:
        """Run the blocks up to the source block; without a cache, what that block would have written into it."""
        source, written = self.routing.policy.source_block, None
        for index in range(source):
            if self.cache is None and index == source - 1:
                hidden, keys, values = self._uncached(index, hidden, self._arguments(index), hands_out=True)
                written = keys, values
            else:
                hidden = self.block(index, hidden)
            self._keep(hidden)
        return hidden, written

    def _for_some(self, index: int, hidden: Tensor, running: Rows | None, skipping: Rows | None) -> Tensor:
        """One block for the rows that run it; ``running`` None means all, ``skipping`` None means none."""
        if skipping is not None:
            self.skip(index, hidden, skipping)
        if running is None:
            return self.block(index, hidden)
        if not len(running):
            return hidden
        with mark(GATHER):
            part = hidden[running.index]
        part = self.block(index, part, running)
        with mark(GATHER):
            return hidden.index_copy(0, running.index, part)

    def block(
        self,
        index: int,
        hidden: Tensor,
        rows: Rows | None = None,
        columns: slice | None = None,
        written: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Run one block of the backbone on all sequences, or on a sub-batch.

        Args:
            index: the block.
            hidden: (n, S, H).
            rows, columns: which sequences and tokens of the pass these are; None means all.
            written: boolean (B, 1, S, 1), the tokens whose K/V are left, those of the others being zero; None means all.
            present: boolean (B, S), the tokens whose K/V may be seen, where that is not for the cache to know.

        Returns:
            (n, S, H).
        """
        cache, arguments = self.cache, self._arguments(index, rows, columns, present)
        if cache is None:
            return self._uncached(index, hidden, arguments, written)[0]
        cache.rows, cache.offset, cache.written = rows, columns.start if columns is not None else 0, written
        try:
            return self._caching(index)(hidden, past_key_values=cache, use_cache=True, **arguments)
        finally:
            cache.rows, cache.offset, cache.written = None, 0, None

    def _arguments(
        self, index: int, rows: Rows | None = None, columns: slice | None = None, present: Tensor | None = None
    ) -> dict[str, Any]:
        """What a block is called with beside the states and the cache."""
        position_ids, rotary, mask = self._inputs_of(index, rows, columns)
        return {
            "attention_mask": mask if present is None else self._present_mask(present),
            "position_ids": position_ids,
            "position_embeddings": rotary,
            **({"rows": rows} if self.in_place else {}),
        }

    def _caching(self, index: int) -> Block:
        """The block for a pass with a cache, which a block that checkpoints itself would drop."""
        if self.in_place:
            if not self.routing.readers:
                self.routing.readers.extend(map(reading_rows, self.decoder.layers))
            return self.routing.readers[index]
        return _unchecked(self.decoder.layers[index])

    def _uncached(
        self,
        index: int,
        hidden: Tensor,
        arguments: dict[str, Any],
        written: Tensor | None = None,
        hands_out: bool = False,
    ) -> tuple[Tensor, ...]:
        """Run one block without a cache: its output, and if it ``hands_out`` them its keys and values, with gradients.

        A block that checkpoints its forward pass drops its cache argument, and with it what `Tap` has to know. So the
        engine checkpoints block and tap together: what is computed again in the backward pass is the same function.
        """
        layer = self.decoder.layers[index]
        run = partial(_tapped, _unchecked(layer), arguments, written, hands_out)
        if layer.training and layer.gradient_checkpointing and torch.is_grad_enabled():
            outputs: tuple[Tensor, ...] = layer._gradient_checkpointing_func(run, hidden)
            return outputs
        return run(hidden)

    def skip(self, index: int, hidden: Tensor, rows: Rows) -> None:
        """A block that these rows skip: the state passes by; under ``project`` it leaves its K/V."""
        if self.cache is not None and self.kv == "project":
            with mark(GATHER):
                part = hidden[rows.index]
            self._project(index, part, rows)

    def _project(self, index: int, hidden: Tensor, rows: Rows | None, columns: slice | None = None) -> None:
        """Write the K/V of a skipped block for the states (n, S, H) of these rows (policy ``project`` only)."""
        cache = self.cache
        if cache is None or self.kv != "project":
            return
        _, rotary, _ = self._inputs_of(index, rows, columns)
        layer = self.decoder.layers[index]
        with mark(CACHE):  # keys and values for later steps are all that this pass gets out of the block
            keys, values = project(layer.self_attn, layer.input_layernorm(hidden), *rotary)
        cache.rows, cache.offset = rows, columns.start if columns is not None else 0
        cache.blocks[index].update(keys, values)
        cache.rows, cache.offset = None, 0

    # ---- what a block is given ---------------------------------------------------------------------------------------

    def _inputs_of(self, index: int, rows: Rows | None, columns: slice | None) -> tuple[Any, Any, Any]:
        """Positions, rotary embedding and attention mask of a sub-batch; cut out once for all blocks that share it."""
        key = id(rows)
        if key not in self._inputs:
            cut = partial(_take, rows=rows, columns=columns)
            self._inputs[key] = (
                cut(self.position_ids),
                (cut(self.rotary[0]), cut(self.rotary[1])),
                self._shared_mask(rows, columns),
            )
        position_ids, rotary, mask = self._inputs[key]
        if self._leaves_out(index):
            assert self.cache is not None
            assert self.cache.present is not None
            mask = self._present_mask(self.cache.present[index, :, : self.past + self.new])
        return position_ids, rotary, mask

    def _shared_mask(self, rows: Rows | None, columns: slice | None) -> Any:
        """The attention mask of blocks that miss nothing: what `attend_rows` or Hugging Face's attention expects."""
        if self.in_place:
            return self._allowed
        if rows is None or self.causal is None:
            return self.causal
        mask = self.causal if self.causal.shape[0] == 1 else self.causal[rows.index]
        if columns is None or columns == slice(0, self.new):
            return mask
        if len(rows) == 1 and self.decoder.config._attn_implementation == "sdpa":
            return None  # one prompt cut to its own tokens has no padding: attention takes its causal shortcut
        return mask[:, :, columns, columns]

    def _leaves_out(self, index: int) -> bool:
        """Whether attention in this block must leave positions out (policy ``mask`` only)."""
        cache = self.cache
        return cache is not None and self.past > 0 and not cache.complete[index] and self.kv == "mask"

    @cached_property
    def _allowed(self) -> Tensor | None:
        """Boolean (B or 1, 1, S, T): what each new token may see, were nothing missing; None means everything."""
        total = self.past + self.new
        allowed = None
        if self.new > 1:
            square = torch.ones(self.new, total, dtype=torch.bool, device=self.position_ids.device)
            allowed = square.tril(self.past)[None, None]
        if self.attention_mask is not None:
            real = self.attention_mask[:, None, None, :total].bool()
            allowed = real if allowed is None else allowed & real
        return allowed

    def _present_mask(self, present: Tensor) -> Tensor:
        """`_allowed` without the positions whose K/V a block lacks; in the form that the attention in use expects.

        Args:
            present: boolean (B, T), the positions whose K/V it has.
        """
        mask = present[:, None, None]
        mask = (mask if self._allowed is None else mask & self._allowed).expand(-1, -1, self.new, -1).clone()
        # A padding token may have nothing to see; letting it see itself keeps its (unused) output finite.
        own = torch.arange(self.new, device=mask.device)
        mask[:, :, own, self.past + own] = True
        implementation = self.decoder.config._attn_implementation
        if self.in_place or implementation == "sdpa":
            return mask
        if implementation == "eager":
            return torch.zeros_like(mask, dtype=self.rotary[0].dtype).masked_fill(
                ~mask, torch.finfo(self.rotary[0].dtype).min
            )
        raise UserError(f"kv: policy mask needs attention sdpa or eager, not {implementation}")

    # ---- what the policy reads ---------------------------------------------------------------------------------------

    def read(self, input_ids: Tensor | None, hidden: Tensor) -> None:
        """Show the policy the tokens of the prompt, before any block runs."""
        if input_ids is None:
            raise UserError(f"{type(self.routing.policy).__name__} reads tokens: give input_ids, not inputs_embeds")
        with mark(DECISION):
            self.routing.policy.read(self.state.policy_state, input_ids, self._prompt_tokens(hidden))

    def _source_states(self, written: KeysValues | None) -> KeysValues:
        """Keys and values of the new tokens in the source block; empty where the policy reads none."""
        source = self.routing.policy.source_block
        if source == 0:
            nothing = self.position_ids.new_zeros(1, 1, self.new, 0, dtype=torch.float32)
            return nothing, nothing
        if self.cache is not None:
            return self.cache.window(source - 1, self.new)
        assert written is not None
        return written

    def _readable(self, context: Tensor | None = None) -> Tensor | None:
        """(B, S) boolean mask of the new tokens that are real and read, and of the context if one is given; None means all."""
        mask = self._real()
        for part in (context, self.routing.read_mask):
            if part is not None and part.shape[1] == self.new:
                mask = part.bool() if mask is None else mask & part.bool()
        return mask

    def _real(self) -> Tensor | None:
        """(B, S) boolean mask of the new tokens that are no padding; None means all."""
        return None if self.attention_mask is None else self.attention_mask[:, -self.new :].bool()

    def _prompt_tokens(self, hidden: Tensor) -> Tensor | None:
        """(B, S) boolean: the prompt's tokens that the policy reads; None means all."""
        mask = self._readable(self.routing.context_mask)
        if self.routing.form == "sequence":
            return mask
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return mask & self._prompt(mask)

    def _prompt(self, mask: Tensor) -> Tensor:
        """(B, S) boolean: the leading tokens that a prefill would have taken in together."""
        context = self.routing.context_mask
        if self.past:
            return torch.zeros_like(mask)
        if context is not None:
            return context.bool()
        return mask & (mask.cumsum(1) == 1)

    def _note(self, route: Tensor) -> None:
        """Add the route (B, L) of a pass to the trace; the causal form notes it for every token."""
        if self.routing.form == "causal":
            self.routing.trace.add_each(route.unsqueeze(1).expand(-1, self.new, -1))
        else:
            self.routing.trace.add(route, self.new)


def slope(gate: Tensor, like: Tensor) -> Tensor:
    """A factor that is exactly zero and has the gate's gradient."""
    gate = gate.to(like.dtype)
    return gate - gate.detach()


def _unchecked(layer: Block) -> Block:
    """The block, or where it checkpoints its forward pass a twin that leaves that to its caller."""
    checkpoints = layer.training and layer.gradient_checkpointing
    return twin(layer, gradient_checkpointing=False) if checkpoints else layer


def _tapped(
    layer: Block, arguments: dict[str, Any], written: Tensor | None, hands_out: bool, hidden: Tensor
) -> tuple[Tensor, ...]:
    """A block's output without a cache, and if it ``hands_out`` them its keys and values."""
    tap = Tap(written)
    out = layer(hidden, past_key_values=tap, use_cache=False, **arguments)
    if not hands_out:
        return (out,)
    if tap.keys is None or tap.values is None:
        raise RuntimeError("the source block wrote no keys and values")
    return out, tap.keys, tap.values


def _take(tensor: Tensor, rows: Rows | None, columns: slice | None) -> Tensor:
    """Rows and columns of (B or 1, S, ...), where a first dimension of 1 is shared by all rows."""
    if rows is not None and tensor.shape[0] > 1:
        tensor = tensor[rows.index]
    return tensor if columns is None else tensor[:, columns]
