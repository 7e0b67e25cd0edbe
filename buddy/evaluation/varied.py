"""Routes that differ: what a router costs whose sequences agree on nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.policies.buddy import BuddyPolicy, BuddyState
from buddy.routing.budget import Budget

SEED = 0


@dataclass
class VariedState(BuddyState):
    """BUDDY's, and how many passes it has seen, (1,) int64, counted in place."""

    passes: Any = None


class VariedPolicy(BuddyPolicy):
    """BUDDY's router at work, and then scores that are drawn: independent for every sequence, block and step.

    It does all that the router does, so it takes as long. Its routes have as many blocks as the budget says, and within
    that every route is as likely as any other. A trained router may take one path for all; this one is the other end.

    Args:
        policy: the router whose work is done.
        batch: sequences B that it has draws for.
        steps: passes that it has draws for; then they begin again.
        seed: of the draws.
    """

    drawn: Tensor

    def __init__(self, policy: BuddyPolicy, batch: int, steps: int, seed: int = SEED) -> None:
        super().__init__(**{name: value for name, value in policy.settings().items() if name != "predictor"})
        self.load_state_dict({name: value for name, value in policy.state_dict().items() if "predictor" not in name})
        candidates = policy.prior.shape[0]
        draws = torch.rand(steps, batch, candidates, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("drawn", draws)
        self.to(policy.prior.device)

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> VariedState:
        """As BUDDY's, before the first pass."""
        return VariedState(
            **vars(super().begin(budget, batch, device)), passes=torch.zeros(1, dtype=torch.int64, device=device)
        )

    def observe(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Score the new tokens as BUDDY does, and count the pass."""
        super().observe(state, keys, values, mask)
        assert isinstance(state, VariedState)
        state.passes += 1

    def scores(self, state: BuddyState) -> Tensor:
        """The draws of this pass; the router's own scores are computed, and weigh nothing."""
        assert isinstance(state, VariedState)
        drawn = self.drawn.index_select(0, (state.passes - 1) % len(self.drawn)).squeeze(0)
        return drawn + 0 * super().scores(state)
