"""Chosen blocks of a backbone on hidden states, without cache or policy: what importance estimates are made of."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from buddy.routing.kv import Tap
from buddy.routing.types import CausalLM


class Stack:
    """The blocks of a backbone, callable one stretch at a time on a batch of whole sequences (no padding).

    A removal study runs the blocks before the removed one once and only recomputes what lies behind it.

    Args:
        backbone: causal language model.
        input_ids: (B, S).
    """

    def __init__(self, backbone: CausalLM, input_ids: Tensor) -> None:
        self.backbone = backbone
        self.decoder = backbone.get_decoder()
        self.embedded = self.decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        self.arguments = {
            "attention_mask": create_causal_mask(
                config=self.decoder.config,
                inputs_embeds=self.embedded,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            ),
            "position_ids": positions,
            "past_key_values": None,
            "use_cache": False,
            "position_embeddings": self.decoder.rotary_emb(self.embedded, position_ids=positions),
        }

    def __len__(self) -> int:
        return len(self.decoder.layers)

    def run(self, hidden: Tensor, blocks: Iterable[int]) -> Tensor:
        """Pass hidden states (B, S, H) through these blocks in order."""
        for index in blocks:
            hidden = self.decoder.layers[index](hidden, **self.arguments)
        return hidden

    def tapped(self, hidden: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pass hidden states (B, S, H) through one block: its output, and the keys and values (B, heads, S, size) that
        it would have left in a cache."""
        tap = Tap()
        hidden = self.decoder.layers[block](hidden, **(self.arguments | {"past_key_values": tap}))
        assert tap.keys is not None
        assert tap.values is not None
        return hidden, tap.keys, tap.values

    def inputs(self) -> list[Tensor]:
        """Input of every block, and the output of the last: L + 1 tensors (B, S, H)."""
        states = [self.embedded]
        for index in range(len(self)):
            states.append(self.run(states[-1], [index]))
        return states

    def normed(self, hidden: Tensor) -> Tensor:
        """Final norm: (B, S, H)."""
        return self.decoder.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (B, S, V)."""
        return self.backbone.get_output_embeddings()(self.normed(hidden))
