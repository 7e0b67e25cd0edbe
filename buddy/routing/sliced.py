"""The sliced model: blocks physically taken out. It is the speed limit of a depth, and the reference in tests."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from buddy.routing.types import Block, CausalLM


def sliced(backbone: CausalLM, kept: Sequence[int]) -> CausalLM:
    """A Hugging Face model of the same class with only the ``kept`` blocks, sharing their weights.

    Args:
        backbone: causal language model; it is not changed.
        kept: block indices (from 0), in order.
    """
    result = _shallow(backbone)
    result.config = copy.deepcopy(backbone.config)
    result.config.num_hidden_layers = len(kept)
    if getattr(result.config, "layer_types", None):
        result.config.layer_types = [backbone.config.layer_types[index] for index in kept]
    decoder = _shallow(backbone.get_decoder())
    decoder.config = result.config
    decoder.layers = nn.ModuleList([_renumbered(decoder.layers[index], place) for place, index in enumerate(kept)])
    result.model = decoder
    return result


def _shallow(module: Any) -> Any:
    """A module whose children and parameters are the same objects, but whose tables of them are its own."""
    twin = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(twin, table, dict(getattr(module, table)))
    return twin


def _renumbered(layer: Block, place: int) -> Block:
    """The block under another index, by which it finds its part of the cache."""
    twin = _shallow(layer)
    twin.self_attn = _shallow(layer.self_attn)
    twin.self_attn.layer_idx = place
    return twin
