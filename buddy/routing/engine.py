"""One forward pass through the blocks that the policy names.

The Hugging Face model stays as it is: `routed` lends its decoder this module's block loop for the duration of a call
and takes it back afterwards. Embeddings, masks, rotary embedding, blocks, final norm and head are the model's own, so a
route that names every block computes what the untouched model computes, bit for bit.

The forms of a pass are files of their own: `by_sequence`, `by_token` and `by_gate`, on `step`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from buddy.errors import UserError
from buddy.routing.by_gate import ByGate
from buddy.routing.by_sequence import BySequence
from buddy.routing.by_token import ByToken
from buddy.routing.call import RouteState, Routing, state_of
from buddy.routing.kv import RoutedCache
from buddy.routing.policy import GatedPolicy
from buddy.routing.step import Step
from buddy.routing.types import CausalLM, Decoder
from buddy.settings import MODEL_TYPES

__all__ = ["RouteState", "Routing", "check_supported", "routed", "run_blocks"]


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
    if getattr(config, "is_causal", None) is False:
        raise UserError("backbone: its config.json says is_causal=false; only causal attention is routed")


class _Here(threading.local):
    """How the calling thread routes its passes, by the identity of the decoder."""

    def __init__(self) -> None:
        self.routings: dict[int, Routing] = {}


_here = _Here()

_borrowers: Counter[int] = Counter()
"""Threads that route passes through a decoder, by its identity: the last one takes the lent loop back."""

_lending = threading.Lock()


@contextmanager
def routed(backbone: CausalLM, routing: Routing) -> Iterator[Routing]:
    """Within the context, this thread's passes through the backbone follow ``routing``.

    Outside it, and in every other thread, the backbone is untouched.

    Args:
        backbone: a causal language model of a supported architecture (adapters may be injected into its layers).
        routing: how to route.
    """
    decoder = backbone.get_decoder()
    routings = _here.routings
    if id(decoder) in routings:
        raise RuntimeError("this backbone is being routed already")
    with _lending:
        own = vars(decoder).get("forward")  # a copy made while another thread routed the original has a lent one
        if own is not None and getattr(own, "func", None) is not _dispatch:
            raise RuntimeError("this backbone's decoder has a forward pass of its own, which routing would replace")
        decoder.forward = partial(_dispatch, decoder)
        _borrowers[id(decoder)] += 1
    routings[id(decoder)] = routing
    try:
        yield routing
    finally:
        del routings[id(decoder)]
        with _lending:
            _borrowers[id(decoder)] -= 1
            if _borrowers[id(decoder)] == 0:
                del _borrowers[id(decoder)], decoder.forward


def _dispatch(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a decoder while some thread routes it: routed in that thread, its own in all others."""
    routing = _here.routings.get(id(decoder))
    if routing is None:
        return type(decoder).forward(decoder, *args, **kwargs)
    return run_blocks(decoder, routing, *args, **kwargs)


def run_blocks(
    decoder: Decoder,
    routing: Routing,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: RoutedCache | None = None,
    inputs_embeds: Tensor | None = None,
    output_hidden_states: bool | None = None,
    **_: Any,
) -> BaseModelOutputWithPast:
    """The decoder's forward pass with routing; arguments and result as in Hugging Face's.

    Args:
        decoder: the model without its head (``LlamaModel`` and its like).
        routing: how to route.
        input_ids: (B, S) new tokens, or ``inputs_embeds`` (B, S, H).
        attention_mask: (B, past + S), 1 for real tokens.
        past_key_values: the cache; None keeps no K/V (training, scoring).
        output_hidden_states: return the states too: the embeddings, what left each block (a block that a sequence skips
            leaves its state as it was), the last after the norm. What the backbone's configuration says by default.
    """
    hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    batch, new = hidden.shape[:2]
    cache = past_key_values
    if cache is not None and not isinstance(cache, RoutedCache):
        raise TypeError(f"a routed pass needs a RoutedCache, not {type(cache).__name__}")
    past = cache.length if cache is not None else 0
    if output_hidden_states is None:
        output_hidden_states = decoder.config.output_hidden_states
    routing.keeps_states = bool(output_hidden_states)
    if cache is not None:
        if cache.graph is not None:
            stepped = cache.graph.step(cache, routing, hidden, attention_mask, position_ids)
            if stepped is not None:
                return stepped
        cache.reserve(batch, new)
    if position_ids is None:
        position_ids = (torch.arange(new, device=hidden.device) + past).unsqueeze(0)
    causal = create_causal_mask(
        config=decoder.config,
        inputs_embeds=hidden,
        attention_mask=attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
    )
    routing.state = state_of(routing, cache, batch, hidden.device)
    step = form_of(routing)(
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
    if routing.policy.reads_tokens and routing.state.route is None:
        step.read(input_ids, hidden)
    hidden = step.run(hidden)
    if cache is not None:
        cache.commit(new)
    last = decoder.norm(hidden)
    return BaseModelOutputWithPast(
        last_hidden_state=last,
        past_key_values=cache,
        hidden_states=(*step.states[:-1], last) if routing.keeps_states else None,
    )


def form_of(routing: Routing) -> type[Step]:
    """The form of the pass that comes next."""
    assert routing.state is not None
    if isinstance(routing.policy, GatedPolicy):
        return ByGate if routing.gradient or routing.state.route is None else BySequence
    return ByToken if routing.form == "causal" else BySequence
