"""Sequences of different lengths as one batch, padded on the right, where causal attention does not look."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, S) int64 on the host, zeros behind the shorter rows."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def leading(lengths: Sequence[int], width: int) -> Tensor:
    """(B, width) boolean on the host: the first tokens of each row, as many as ``lengths`` says."""
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
