"""What a static peer finds: a removal order and the scores behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from buddy.errors import UserError
from buddy.routing.types import CausalLM


@dataclass(frozen=True)
class Removal:
    """A removal order and its scores.

    Attributes:
        order: removed blocks, from 0, the first removed first.
        rounds: each block's score in each round of measuring, the lowest of which was removed. A one-shot method
            measures once, and all blocks, also those that it may not remove; an iterative one before each removal.
        ppl: perplexity of the full model, where the method measures it.
    """

    order: list[int]
    rounds: list[dict[int, float]]
    ppl: float | None = None


@dataclass(frozen=True)
class Peer:
    """A static method with one criterion.

    Attributes:
        find: called with backbone, windows (N, S) on its device, number of blocks to remove, blocks that may be
            removed, and windows per pass.
        protected: blocks that its authors never remove; negative indices count from the end.
        score: what its scores are, in words.
    """

    find: Callable[[CausalLM, Tensor, int, Sequence[int], int], Removal]
    protected: tuple[int, ...]
    score: str


def lowest(scores: Mapping[int, float], candidates: Sequence[int], count: int) -> list[int]:
    """The ``count`` candidates with the lowest scores, ascending; of equal scores the earlier block first.

    Raises:
        UserError: a score is not a finite number, so nothing can be ranked by it.
    """
    for block in candidates:
        if not math.isfinite(scores[block]):
            raise UserError(f"block {block}: its score is {scores[block]}; try --dtype float32 or other weights")
    return sorted(candidates, key=lambda block: (scores[block], block))[:count]
