"""What a method trains, and at which depths: the part of training in which BUDDY and its peers differ.

Data, template, loss, optimiser, schedule and LoRA are the same for all of them (`buddy.settings.Training`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from buddy.routing.engine import Routing

Budgets = Callable[[int, int, int, int], list[float] | None]
"""Called with (batch size, seed, step, part of the step): a budget per example, or None for the policy's own."""


def own(batch: int, seed: int, step: int, part: int) -> list[float] | None:
    """The policy's own depth, for every example."""
    return None


def drawn(most_removed: int, blocks: int, often: Sequence[int] = (), share: float = 0.0) -> Budgets:
    """A depth per example, uniform from the deepest pruning of the study to full depth (paper sec. 4.2.3).

    With full depth among them every block keeps being trained, and one model serves every budget.

    Args:
        most_removed: blocks left out at most.
        blocks: number of blocks L.
        often: numbers of removed blocks that a share of the examples has instead, each as often as the others.
        share: that share, 0 to 1.
    """

    def budgets(batch: int, seed: int, step: int, part: int) -> list[float]:
        depths = draw_depths(batch, blocks - most_removed, blocks, seed, step, part)
        if often and share:
            generator = _generator(seed, step, part, 1)
            preferred = torch.tensor(often)[torch.randint(len(often), (batch,), generator=generator)]
            chosen = torch.rand(batch, generator=generator) < share
            depths = torch.where(chosen, blocks - preferred, torch.tensor(depths)).tolist()
        return [depth / blocks for depth in depths]

    return budgets


def draw_depths(batch: int, shallowest: int, blocks: int, seed: int, step: int, part: int) -> list[int]:
    """Executed blocks of each example, uniform over ``shallowest .. blocks``.

    A pure function of seed, step and part of the step, so a resumed training draws what an uninterrupted one would.
    """
    return torch.randint(shallowest, blocks + 1, (batch,), generator=_generator(seed, step, part)).tolist()


def _generator(seed: int, step: int, part: int, other: int = 0) -> torch.Generator:
    """Random numbers of one part of one step; ``other`` ones for another purpose."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + part + (other << 61))


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        budgets: depths of the examples.
        trains_policy: the policy's parameters learn, through gates that carry gradients.
        lora: LoRA learns (if the settings give it a rank).
        without_lora: blocks, from 0, that have none, because they never run.
        penalty: added to the loss, from the routing of the pass; None adds nothing.
        constants: what ``budgets`` and ``penalty`` hold inside, by name: a checkpoint tells recipes apart by them.
        probed: number of removed blocks at which the router's routes are looked at (`buddy.training.probes`); 0 for a
            policy without a router of that kind.
    """

    budgets: Budgets = own
    trains_policy: bool = False
    lora: bool = True
    without_lora: Sequence[int] = ()
    penalty: Callable[[Routing], Tensor] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    probed: int = 0

    def made_by(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return {
            "trains_policy": self.trains_policy,
            "lora": self.lora,
            "without_lora": list(self.without_lora),
            **self.constants,
        }
