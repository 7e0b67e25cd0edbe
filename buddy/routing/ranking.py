"""Blocks by their scores: the first k of each sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def first_places(keep: Tensor, candidates: int) -> Tensor:
    """Which places of a ranking are kept: keep (B,) integers in [0, candidates], to boolean (B, candidates)."""
    return torch.arange(candidates, device=keep.device) < keep.unsqueeze(-1)


def ranking(scores: Tensor) -> Tensor:
    """Candidates (..., C) by falling score, ties to the earlier block."""
    return scores.detach().argsort(dim=-1, descending=True, stable=True)


def keep_top(scores: Tensor, first: Tensor) -> Tensor:
    """Keep exactly as many candidates as `first_places` says: the highest scores, ties to the earlier block.

    Args:
        scores: (B, ..., C).
        first: boolean (B, C), from `first_places`.

    Returns:
        Boolean mask (B, ..., C).
    """
    order = ranking(scores)
    kept = first.view(len(first), *[1] * (scores.dim() - 2), -1).expand_as(order)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept)
