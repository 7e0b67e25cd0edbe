"""Budget arithmetic: from a fraction of blocks to an exact count, and which fractions are legal.

A budget ``b`` in (0, 1] executes ``round(b * L)`` of ``L`` blocks, rounded half up (paper sec. 4.1). The blocks up to
the source block and the last one always run, so a budget must keep at least those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from buddy.errors import BudgetError

Budget = float | Sequence[float] | Tensor | str
"""One fraction for the whole batch, or one per sequence; ``auto`` or ``auto:PRICE`` leaves it to a budget predictor."""


def price_of(budget: str) -> float | None:
    """The price in ``auto:0.3``, in [0, 1]; None where ``auto`` leaves it to the predictor.

    Raises:
        BudgetError: another string, or a price outside [0, 1].
    """
    word, colon, text = budget.partition(":")
    if word == "auto" and not colon:
        return None
    try:
        price = float(text) if word == "auto" else math.nan
    except ValueError:
        price = math.nan
    if not 0 <= price <= 1:
        raise BudgetError(
            f"budget: {budget!r} is neither a number in (0, 1] nor auto nor auto:PRICE with a price in [0, 1]"
        )
    return price


def round_half_up(x: float) -> int:
    """The nearest integer, halves upwards: 22.5 is 23 (Python's ``round`` gives 22).

    The small term absorbs binary fractions: 0.29 * 100 is 28.999999999999996.
    """
    return math.floor(x + 0.5 + 1e-9)


def executed_blocks(budget: float, blocks: int, always: int = 2) -> int:
    """Number of blocks that a budget executes.

    Args:
        budget: fraction of blocks, in (0, 1].
        blocks: number of blocks L of the backbone.
        always: how many of them run whatever the budget.

    Raises:
        BudgetError: the budget is outside (0, 1] or cannot hold the blocks that always run; names the nearest legal ones.
    """
    if not isinstance(budget, int | float) or isinstance(budget, bool) or math.isnan(budget):
        raise BudgetError(f"budget: {budget!r} is not a number in (0, 1]")
    executed = round_half_up(budget * blocks)
    if 0 < budget <= 1 and executed >= always:
        return executed
    if budget > 1:
        raise BudgetError(f"budget: {budget:g} is over 1; the largest is 1, which runs all {blocks} blocks")
    lowest = [f"{k / blocks:.4g} ({k} blocks)" for k in range(always, min(always + 2, blocks) + 1)]
    raise BudgetError(
        f"budget: {budget:g} would run {max(executed, 0)} of {blocks} blocks, but {always} always run; "
        f"the nearest legal budgets are {', '.join(lowest)}"
    )


def executed_per_sequence(budget: Budget, batch: int, blocks: int, always: int, device: torch.device | str) -> Tensor:
    """Executed blocks of each sequence of a batch.

    Args:
        budget: one fraction, or as many as there are sequences (a shorter list whose length divides the batch is
            repeated in place, as ``num_return_sequences`` expands prompts).
        batch: number of sequences B.
        blocks, always: as in `executed_blocks`.
        device: where the result lives.

    Returns:
        Integer tensor of shape (B,).

    Raises:
        BudgetError: an illegal fraction, or a number of fractions that does not fit the batch.
    """
    if isinstance(budget, str):
        price_of(budget)
        raise BudgetError(f"budget: {budget!r} asks a budget predictor, and this run has none; give a number in (0, 1]")
    if isinstance(budget, Tensor):
        budget = budget.tolist()
    if not isinstance(budget, Sequence):
        return torch.full((batch,), executed_blocks(budget, blocks, always), device=device)
    if len(budget) == 0 or batch % len(budget):
        raise BudgetError(f"budget: {len(budget)} fractions do not fit a batch of {batch} sequences")
    fractions: Sequence[Any] = budget
    counts = torch.tensor([executed_blocks(b, blocks, always) for b in fractions], device=device)
    return counts.repeat_interleave(batch // len(budget))


def same_budget(one: Budget | None, other: Budget | None, batch: int, blocks: int) -> bool:
    """Whether two budgets run as many blocks of each sequence of a batch, or leave it to a predictor at one price.

    Args:
        one, other: fractions that are legal, or ``auto`` and the like; None is ``auto``.
        batch: number of sequences B.
        blocks: number of blocks L.
    """
    return one is other or _executed(one, batch, blocks) == _executed(other, batch, blocks)


def _executed(budget: Budget | None, batch: int, blocks: int) -> str | list[int]:
    if budget is None or isinstance(budget, str):
        return budget or "auto"
    fractions = budget.tolist() if isinstance(budget, Tensor) else budget
    if not isinstance(fractions, Sequence):
        fractions = [fractions]
    return [round_half_up(fraction * blocks) for fraction in fractions for _ in range(batch // len(fractions))]
