"""The Decision Module and the choice it leads to: token scores, their running mean, exact top-k, straight-through gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class DecisionModule(nn.Module):
    """Linear -> SiLU -> Linear, applied token by token (paper sec. 4.2.1, C.1).

    Because it looks at one token at a time and the pooling is a mean, the pooled score of a growing prefix is a running
    sum: each decode step costs this module on one token, whatever the context length.

    Args:
        width: size of a token's feature, KV heads x head size.
        candidates: number of blocks to score.
        rank: hidden width r (32 in the paper).
    """

    def __init__(self, width: int, candidates: int, rank: int = 32) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, candidates)

    def forward(self, features: Tensor) -> Tensor:
        """Score every candidate block for every token.

        Args:
            features: (B, S, width), any float dtype; computed in this module's own dtype, outside autocast.

        Returns:
            (B, S, candidates); larger means keep.
        """
        with torch.autocast(features.device.type, enabled=False):
            return self.up(nn.functional.silu(self.down(features.to(self.down.weight.dtype))))


def source_feature(keys: Tensor, values: Tensor, feature: str) -> Tensor:
    """A token's feature from the source block's KV cache (paper sec. 4.3, Table 5).

    Args:
        keys, values: (B, KV heads, S, head size), keys as the cache holds them (after rotary embedding).
        feature: ``key``, ``value`` or ``key+value`` (their element-wise sum).

    Returns:
        (B, S, KV heads * head size).
    """
    states = {"key": lambda: keys, "value": lambda: values, "key+value": lambda: keys + values}[feature]()
    return states.transpose(1, 2).flatten(2)


@dataclass
class RunningMean:
    """Mean of token scores over everything seen so far, padding excluded.

    Attributes:
        total: (B, candidates), sum of the scores of the tokens seen.
        count: (B, 1), number of them.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, batch: int, candidates: int, like: Tensor) -> RunningMean:
        """Nothing seen yet; dtype and device of ``like``."""
        return cls(like.new_zeros(batch, candidates), like.new_zeros(batch, 1))

    def add(self, scores: Tensor, mask: Tensor | None) -> None:
        """Take in the scores of new tokens: scores (B, S, candidates), mask (B, S), True where a token counts."""
        if mask is None:
            self.total = self.total + scores.sum(1)
            self.count = self.count + scores.shape[1]
        else:
            weight = mask.to(scores.dtype).unsqueeze(-1)
            self.total = self.total + (scores * weight).sum(1)
            self.count = self.count + weight.sum(1)

    def mean(self) -> Tensor:
        """(B, candidates); zero where no token was seen."""
        return self.total / self.count.clamp(min=1)


def keep_top(scores: Tensor, keep: Tensor) -> Tensor:
    """Keep exactly ``keep[b]`` candidates of sequence ``b``: the highest scores, ties to the earlier block.

    Args:
        scores: (B, C).
        keep: (B,), integers in [0, C].

    Returns:
        Boolean mask (B, C).
    """
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return rank < keep.to(rank.device).unsqueeze(-1)


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """Gates that are the hard mask in the forward pass and softmax(scores) in the backward pass (paper sec. 4.2.3).

    Args:
        mask: boolean (B, C).
        scores: (B, C), the scores the mask was chosen from.

    Returns:
        (B, C) in the dtype of ``scores``, values exactly 0 or 1.
    """
    soft = scores.softmax(-1)
    # `soft - soft.detach()` is exactly zero, where `mask + soft - soft.detach()` would round.
    return mask.to(soft.dtype) + (soft - soft.detach())
