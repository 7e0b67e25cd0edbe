"""One forward pass through the blocks that the policy names.

The Hugging Face model stays as it is: `routed` lends its decoder this module's block loop for the duration of a call
and takes it back afterwards. Embeddings, masks, rotary embedding, blocks, final norm and head are the model's own, so a
route that names every block computes what the untouched model computes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from buddy.errors import UserError
from buddy.routing.budget import Budget
from buddy.routing.kv import RoutedCache, SourceTap, project
from buddy.routing.policy import Policy
from buddy.routing.trace import Trace
from buddy.routing.types import Block, CausalLM, Decoder
from buddy.settings import MODEL_TYPES


@dataclass
class Routing:
    """How one call is routed.

    Attributes:
        policy: chooses the blocks.
        budget: fraction of blocks, one or one per sequence; None lets the policy choose.
        every: choose a new path at every n-th decode step; 0 keeps the path of the prefill.
        context_mask: (B, S), True where the policy may read a token of a pass over a whole sequence; None means every
            token under the attention mask. Answers that are being scored must not choose their own route.
        gradient: training: gates are straight-through and skipped blocks are computed to give them a gradient.
        trace: filled with the routes of the call.
        gates: (B, L), straight-through gates of the pass under way, in training.
        state: state of the sequences of the last pass, for logging.
    """

    policy: Policy
    budget: Budget | None
    every: int = 1
    context_mask: Tensor | None = None
    gradient: bool = False
    trace: Trace = field(default_factory=Trace)
    gates: Tensor | None = None
    state: RouteState | None = None


@dataclass
class RouteState:
    """Routing of the sequences in a cache: the policy's own state, the route (B, L), and the steps taken."""

    policy_state: Any
    route: Tensor | None = None
    step: int = 0


def check_supported(backbone: CausalLM) -> None:
    """Refuse a backbone whose block loop this engine does not reproduce.

    Raises:
        UserError: an architecture that is not supported, or sliding-window attention in use.
    """
    config = backbone.config
    if config.model_type not in MODEL_TYPES:
        raise UserError(f"backbone: architecture {config.model_type!r} is not supported; {', '.join(MODEL_TYPES)} are")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError("backbone: sliding-window attention is in use; only full attention is supported")


@contextmanager
def routed(backbone: CausalLM, routing: Routing) -> Iterator[Routing]:
    """Within the context, passes through this backbone follow ``routing``; outside, it is untouched.

    Args:
        backbone: a causal language model of a supported architecture (adapters may be injected into its layers).
        routing: how to route.
    """
    decoder = backbone.get_decoder()
    if "forward" in vars(decoder):
        raise RuntimeError("this backbone is being routed already")
    decoder.forward = partial(run_blocks, decoder, routing)
    try:
        yield routing
    finally:
        del decoder.forward


def run_blocks(
    decoder: Decoder,
    routing: Routing,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: RoutedCache | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **_: Any,
) -> BaseModelOutputWithPast:
    """The decoder's forward pass with routing; arguments and result as in Hugging Face's.

    Args:
        decoder: the model without its head (``LlamaModel`` and its like).
        routing: how to route.
        input_ids: (B, S) new tokens, or ``inputs_embeds`` (B, S, H).
        attention_mask: (B, past + S), 1 for real tokens.
        past_key_values: the cache; None keeps no K/V (training, scoring).
    """
    hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, new = hidden.shape[:2]
    cache = past_key_values
    if cache is not None and not isinstance(cache, RoutedCache):
        raise TypeError(f"a routed pass needs a RoutedCache, not {type(cache).__name__}")
    if cache is not None:
        cache.reserve(batch, new)
    past = cache.length if cache is not None else 0
    if position_ids is None:
        position_ids = (torch.arange(new, device=hidden.device) + past).unsqueeze(0)
    causal = create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    routing.state = _state(routing, cache, batch, hidden.device)
    step = Step(
        decoder=decoder,
        routing=routing,
        cache=cache,
        new=new,
        causal=causal,
        attention_mask=attention_mask,
        position_ids=position_ids,
        rotary=decoder.rotary_emb(hidden, position_ids=position_ids),
        state=routing.state,
    )
    hidden = step.run(hidden)
    if cache is not None:
        cache.commit(new)
    step.state.step += 1
    return BaseModelOutputWithPast(last_hidden_state=decoder.norm(hidden), past_key_values=cache)


def _state(routing: Routing, cache: RoutedCache | None, batch: int, device: torch.device) -> RouteState:
    """The routing state of these sequences: from their cache, or fresh."""
    if cache is not None and cache.routing is not None:
        return cache.routing
    state = RouteState(routing.policy.begin(routing.budget, batch, device))
    if cache is not None:
        cache.routing = state
    return state


@dataclass
class Step:
    """One pass over S new tokens of B sequences, block by block."""

    decoder: Decoder
    routing: Routing
    cache: RoutedCache | None
    new: int
    causal: Any
    attention_mask: Tensor | None
    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    state: RouteState

    def run(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, S, H) after the last block."""
        source = self.routing.policy.source_block
        tap = SourceTap() if self.cache is None else None
        for index in range(source):
            with _uncheckpointed(self.decoder.layers[index]):
                hidden = self.block(index, hidden, None, tap if index == source - 1 else None)
        rows = self.choose(tap)
        for index in range(source, len(self.decoder.layers)):
            if self.routing.gates is not None:
                hidden = self.gated_block(index, hidden, rows[index])
                continue
            running, skipping = rows[index]
            if skipping is not None:
                self.skip(index, hidden, skipping)
            if running is None:
                hidden = self.block(index, hidden, None)
            elif len(running):
                hidden = hidden.index_copy(0, running, self.block(index, hidden[running], running))
        return hidden

    def choose(self, tap: SourceTap | None) -> list[tuple[Tensor | None, Tensor | None]]:
        """Let the policy read and decide; for each block, the rows that run it and those that skip it (None: all, none)."""
        routing, state = self.routing, self.state
        policy = routing.policy
        if policy.source_block and (routing.every or state.route is None):
            keys, values = self._source_states(tap)
            policy.observe(state.policy_state, keys, values, self._readable())
        if state.route is None or (routing.every and state.step % routing.every == 0):
            state.route = policy.decide(state.policy_state)
            routing.gates = policy.gates(state.policy_state) if routing.gradient else None
        route = state.route.cpu()  # the one read from the device in a pass
        routing.trace.add(route, self.new)
        device = self.rotary[0].device
        return [_split(column, device) for column in route.T]

    def _source_states(self, tap: SourceTap | None) -> tuple[Tensor, Tensor]:
        if self.cache is not None:
            return self.cache.window(self.routing.policy.source_block - 1, self.new)
        assert tap is not None
        if tap.keys is None or tap.values is None:
            raise RuntimeError("the source block wrote no keys and values")
        return tap.keys, tap.values

    def _readable(self) -> Tensor | None:
        """(B, S) mask of the new tokens that the policy may read; None means all."""
        mask = None if self.attention_mask is None else self.attention_mask[:, -self.new :].bool()
        context = self.routing.context_mask
        if context is not None and context.shape[1] == self.new:
            mask = context.bool() if mask is None else mask & context.bool()
        return mask

    def block(self, index: int, hidden: Tensor, rows: Tensor | None, tap: SourceTap | None = None) -> Tensor:
        """Run one block of the backbone on all sequences, or on a sub-batch: hidden (n, S, H) to the same shape."""
        cache: Any = tap
        if self.cache is not None:
            self.cache.rows = rows
            cache = self.cache
        result = self.decoder.layers[index](
            hidden,
            attention_mask=self._mask(index, hidden, rows),
            position_ids=_take(self.position_ids, rows),
            past_key_values=cache,
            use_cache=self.cache is not None,
            position_embeddings=(_take(self.rotary[0], rows), _take(self.rotary[1], rows)),
        )
        if self.cache is not None:
            self.cache.rows = None
        return result

    def skip(self, index: int, hidden: Tensor, rows: Tensor) -> None:
        """A block that these rows skip: the state passes by; under ``project`` it leaves its K/V."""
        if self.cache is None or self.cache.policy != "project":
            return
        layer = self.decoder.layers[index]
        states = layer.input_layernorm(hidden[rows])
        keys, values = project(layer.self_attn, states, _take(self.rotary[0], rows), _take(self.rotary[1], rows))
        self.cache.write(index, rows, keys, values)

    def gated_block(self, index: int, hidden: Tensor, rows: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Training form of ``h + M * F(h)``: exact forward pass, a gradient for every gate (paper sec. 4.2.3).

        Sequences that run the block get its output; the others keep their state, and the block is still evaluated for
        them, without a graph, because ``dL/dM = <dL/dh, F(h)>`` needs F. What the gate multiplies is detached: with M
        equal to 0 or 1 the backbone's own gradient is that of the hard path.
        """
        running, skipping = rows
        assert self.routing.gates is not None
        gate = self.routing.gates[:, index].to(hidden.dtype)
        gate = (gate - gate.detach()).view(-1, 1, 1)  # exactly zero, with the gate's gradient
        if skipping is None:
            out = self.block(index, hidden, None)
            return out + gate * (out - hidden).detach()
        with torch.no_grad():
            residual = torch.zeros_like(hidden)
            residual[skipping] = self.block(index, hidden[skipping], skipping) - hidden[skipping]
        out = hidden
        if running is not None and len(running):
            ran = self.block(index, hidden[running], running)
            out = hidden.index_copy(0, running, ran)
            residual[running] = (ran - hidden[running]).detach()
        return out + gate * residual

    def _mask(self, index: int, hidden: Tensor, rows: Tensor | None) -> Tensor | None:
        """Attention mask of one block: the shared causal one, minus positions whose K/V are missing."""
        if self.cache is None or not self.cache.missing(index):
            return None if self.causal is None else _take(self.causal, rows)
        return self._mask_without_missing(index, hidden, rows)

    def _mask_without_missing(self, index: int, hidden: Tensor, rows: Tensor | None) -> Tensor:
        cache = self.cache
        assert cache is not None
        past, end = cache.length, cache.length + self.new
        layer = cache.blocks[index]
        allowed = torch.ones(self.new, end, dtype=torch.bool, device=hidden.device).tril(past)[None, None]
        if self.attention_mask is not None:
            allowed = allowed & self.attention_mask[:, None, None, :end].bool()
        seen = torch.ones(cache.batch, end, dtype=torch.bool, device=hidden.device)
        seen[:, :past] = False if layer.present is None else layer.present[:, :past]
        allowed = _take((allowed & seen[:, None, None]), rows)
        # A padding query may attend to nothing; letting it see itself keeps its (unused) output finite.
        own = torch.arange(self.new, device=hidden.device)
        allowed[:, :, own, past + own] = True
        implementation = self.decoder.config._attn_implementation
        if implementation == "sdpa":
            return allowed
        if implementation == "eager":
            return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
        raise UserError(f"kv: policy mask needs attention sdpa or eager, not {implementation}")


@contextmanager
def _uncheckpointed(layer: Block) -> Iterator[None]:
    """Gradient checkpointing withholds the cache from a block, and with it the source block's K/V from the policy."""
    checkpointing = getattr(layer, "gradient_checkpointing", False)
    layer.gradient_checkpointing = False
    try:
        yield
    finally:
        layer.gradient_checkpointing = checkpointing


def _split(column: Tensor, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Rows that run a block and rows that skip it, from its column of the route; (None, None) when all run."""
    if bool(column.all()):
        return None, None
    return column.nonzero().flatten().to(device), (~column).nonzero().flatten().to(device)


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Rows of a tensor whose first dimension is the batch, or 1 for all alike."""
    return tensor if rows is None or tensor.shape[0] == 1 else tensor[rows]
