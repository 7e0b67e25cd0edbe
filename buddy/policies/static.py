"""A fixed list of removed blocks, the same for every input: the static peers and the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from buddy.errors import BudgetError, UserError
from buddy.routing.budget import Budget, executed_per_sequence
from buddy.routing.policy import Policy


class StaticPolicy(Policy):
    """Leaves out the first blocks of a removal order; the dense model has an empty order.

    Args:
        blocks: number of blocks L.
        removal_order: block indices (from 0), the first to be removed first. A budget that removes n blocks removes the
            first n of them.
    """

    capturable = True
    nested = True

    def __init__(self, blocks: int, removal_order: Sequence[int] = ()) -> None:
        super().__init__()
        order = [int(index) for index in removal_order]
        if len(set(order)) != len(order) or any(not 0 <= index < blocks for index in order):
            raise UserError(f"removal_order: {order} must name blocks between 0 and {blocks - 1}, each once")
        self.blocks = blocks
        self.removal_order = order

    @property
    def always(self) -> int:
        """Every block outside the removal order runs."""
        return self.blocks - len(self.removal_order)

    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again."""
        return {"blocks": self.blocks, "removal_order": self.removal_order}

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> Tensor:
        """The routes themselves, (B, L): they depend on nothing else. Without a budget, the whole order is removed."""
        if budget is None:
            budget = self.always / self.blocks
        try:
            executed = executed_per_sequence(budget, batch, self.blocks, self.always, "cpu")
        except BudgetError as error:
            if self.removal_order:
                raise
            raise BudgetError(f"{error}; the dense model runs every block: use budget 1") from None
        route = torch.ones(batch, self.blocks, dtype=torch.bool)
        for row, count in enumerate(executed.tolist()):
            route[row, self.removal_order[: self.blocks - count]] = False
        return route.to(device)

    def decide(self, state: Tensor) -> Tensor:
        """The routes that `begin` made."""
        return state

    def decide_each(self, state: Tensor, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """The same for every token."""
        return state.unsqueeze(1).expand(-1, mask.shape[1], -1)
