"""Prior normalisation: from raw block importance to values in (0, 1) and to the standardised prior that is fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buddy.errors import UserError

EPSILON = 1e-8


def normalise(importance: Tensor, indicator: str, clip: float | None = 3.0) -> Tensor:
    """Normalise raw importance over the candidate blocks (paper appendix B).

    In order: negative values clipped (larger means more important), ``log(1 + x)`` for the heavy-tailed indicators
    (not for cosine), robust z-score ``(x - median) / (IQR + eps)``, clipped at +-``clip``, then the rank map
    ``(1 + rank) / (C + 1)`` into (0, 1). Ties share their mean rank.

    Args:
        importance: (C,), one raw value per candidate block.
        indicator: ``delta_ppl``, ``taylor`` or ``cosine``.
        clip: bound of the robust z-score; None leaves it unbounded.

    Returns:
        (C,) float64 in (0, 1), increasing in importance.
    """
    x = importance.double().clamp(min=0)
    if indicator != "cosine":
        x = torch.log1p(x)
    low, middle, high = torch.quantile(x, torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype))
    z = (x - middle) / (high - low + EPSILON)
    if clip is not None:
        z = z.clamp(-clip, clip)
    return (1 + _mean_rank(z)) / (len(z) + 1)


def _mean_rank(x: Tensor) -> Tensor:
    """Rank from 0, ties sharing the mean of their ranks."""
    below = (x.unsqueeze(0) < x.unsqueeze(1)).sum(1)
    equal = (x.unsqueeze(0) == x.unsqueeze(1)).sum(1)
    return below.double() + (equal.double() - 1) / 2


def standardise(prior: Tensor) -> Tensor:
    """The prior as it is fused, ``(p - mean) / (std + eps)`` (paper sec. 4.2.2); population standard deviation."""
    p = prior.double()
    return (p - p.mean()) / (p.std(correction=0) + EPSILON)


def fused(importance: Sequence[float], indicator: str, blocks: int, source_block: int) -> Tensor | None:
    """The prior that a router fuses, from raw importance.

    Args:
        importance: one raw value per block.
        indicator: as in `normalise`, or ``none``.
        blocks: of the backbone, L.
        source_block: block whose K/V the router reads, counted from 1; candidates are those after it but the last.

    Returns:
        (candidates,) float32, standardised; None for the indicator ``none``.

    Raises:
        UserError: the values are of a backbone with another number of blocks.
    """
    if indicator == "none":
        return None
    if len(importance) != blocks:
        raise UserError(f"--prior: it rates {len(importance)} blocks, the backbone has {blocks}")
    candidates = torch.tensor(importance, dtype=torch.float64)[source_block : blocks - 1]
    return standardise(normalise(candidates, indicator)).float()
