"""The Decision Module and the choice it leads to: token scores, their running mean, exact top-k, straight-through gates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

START = 0.05
"""What the last layer's weights begin with, as a share of PyTorch's usual start."""


class DecisionModule(nn.Module):
    """Linear -> SiLU -> Linear, applied token by token (paper sec. 4.2.1, C.1).

    It begins with scores near zero, so that the first routes are the prior's. With PyTorch's usual start the random
    biases, whose deviation is 0.1, would weigh as much as omega times the standardised prior, and a short training would
    not outlive them.

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
        nn.init.zeros_(self.up.bias)
        with torch.no_grad():
            self.up.weight *= START

    @torch.no_grad()
    def fold(self, mean: Tensor, deviation: Tensor) -> None:
        """Take standardisation into the first layer: features ``x`` are read as ``(x - mean) / deviation`` from now on.

        A decode step so costs what it did.

        Args:
            mean, deviation: (width,), of the features that the weights were trained on.
        """
        self.down.weight.div_(deviation)
        self.down.bias.sub_(self.down.weight @ mean)

    def forward(self, features: Tensor) -> Tensor:
        """Score every candidate block for every token.

        Args:
            features: (B, S, width), any float dtype; computed in this module's own dtype, outside autocast.

        Returns:
            (B, S, candidates); larger means keep.
        """
        features = features.to(self.down.weight.dtype)
        # This runs between two blocks of every decode step: entering a context for nothing is a good part of its time.
        if not torch.is_autocast_enabled(features.device.type):
            return self.up(nn.functional.silu(self.down(features)))
        with torch.autocast(features.device.type, enabled=False):
            return self.up(nn.functional.silu(self.down(features)))


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

    The sum is kept in double precision: over thousands of steps it stays what pooling the whole prefix again would give.

    Attributes:
        total: (B, candidates) float64, sum of the scores of the tokens seen; updated in place.
        count: (B, 1) float64, number of them; updated in place.
    """

    total: Tensor
    count: Tensor

    @classmethod
    def empty(cls, batch: int, candidates: int, device: torch.device) -> RunningMean:
        """Nothing seen yet."""
        total = torch.zeros(batch, candidates, dtype=torch.float64, device=device)
        return cls(total, total.new_zeros(batch, 1))

    def add(self, scores: Tensor, mask: Tensor | None) -> None:
        """Take in the scores of new tokens: scores (B, S, candidates), mask (B, S), True where a token counts."""
        if mask is None:
            self.total += scores.sum(1, dtype=torch.float64)
            self.count += scores.shape[1]
        else:
            weight = mask.to(scores.dtype)
            self.total += (scores * weight.unsqueeze(-1)).sum(1, dtype=torch.float64)
            self.count += weight.sum(1, keepdim=True)

    def add_each(self, scores: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """Take in tokens one after the other, those of the prompt together; the mean as each of them finds it.

        Args:
            scores: (B, S, candidates).
            mask: boolean (B, S), True where a token counts.
            prompt: boolean (B, S), the leading tokens that are pooled together.

        Returns:
            (B, S, candidates) float64: for a token of the prompt the mean over the whole prompt, for another one the
            mean over everything up to and including it.
        """
        weight = mask.to(torch.float64)
        total = self.total.unsqueeze(1) + (scores.double() * weight.unsqueeze(-1)).cumsum(1)
        count = self.count + weight.cumsum(1)
        whole = (prompt & mask).sum(1, keepdim=True)  # a prompt's tokens come first: its last sum is the prompt's
        seen = (prompt & mask).cumsum(1)
        last = (seen == whole).to(torch.int8).argmax(1, keepdim=True)
        place = torch.where(prompt, last, torch.arange(mask.shape[1], device=mask.device))
        means = total / count.clamp(min=1).unsqueeze(-1)
        means = means.gather(1, place.unsqueeze(-1).expand_as(means))
        self.total += (scores * weight.unsqueeze(-1)).sum(1, dtype=torch.float64)
        self.count += weight.sum(1, keepdim=True)
        return means

    def mean(self) -> Tensor:
        """(B, candidates) float64; zero where no token was seen."""
        return self.total / self.count.clamp(min=1)


def straight_through(mask: Tensor, scores: Tensor) -> Tensor:
    """Gates that are the hard mask in the forward pass and softmax(scores) in the backward pass (paper sec. 4.2.3).

    Args:
        mask: boolean (..., C).
        scores: (..., C), the scores the mask was chosen from.

    Returns:
        (..., C) in the dtype of ``scores``, values exactly 0 or 1.
    """
    soft = scores.softmax(-1)
    # `soft - soft.detach()` is exactly zero, where `mask + soft - soft.detach()` would round.
    return mask.to(soft.dtype) + (soft - soft.detach())
