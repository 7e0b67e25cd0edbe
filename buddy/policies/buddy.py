"""BUDDY: a budgeted score over the source block's KV cache, refreshed at every step (paper sec. 4.2, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.errors import UserError
from buddy.routing.budget import Budget, executed_per_sequence
from buddy.routing.decision import (
    DecisionModule,
    RunningMean,
    first_places,
    keep_top,
    ranking,
    source_feature,
    straight_through,
)
from buddy.routing.policy import Policy


@dataclass
class BuddyState:
    """What BUDDY remembers of a batch.

    Attributes:
        first: (B, candidates) boolean, the places of a ranking that the budget keeps.
        every: (B, L) boolean, all true: the route before anything is left out.
        bias: (candidates,) float64, omega times the prior.
        pooled: running mean of token scores.
    """

    first: Tensor
    every: Tensor
    bias: Tensor
    pooled: RunningMean


class BuddyPolicy(Policy):
    """Scores the blocks after the source block, fuses a prior, keeps exactly as many as the budget allows.

    Args:
        blocks: number of blocks L.
        width: KV heads x head size of the backbone.
        feature: what is read: ``key``, ``value`` or ``key+value``.
        source_block: block whose KV is read, counted from 1; the blocks up to it always run, and so does the last.
        omega: weight of the prior.
        rank: hidden width of the Decision Module.
        prior: standardised prior of the candidate blocks, (candidates,); None means no prior.
    """

    prior: Tensor
    capturable = True

    def __init__(
        self,
        blocks: int,
        width: int,
        feature: str = "value",
        source_block: int = 1,
        omega: float = 0.1,
        rank: int = 32,
        prior: Tensor | None = None,
    ) -> None:
        super().__init__()
        candidates = blocks - source_block - 1
        if candidates < 1:
            raise UserError(f"source_block: {source_block} leaves no block of {blocks} to choose from")
        self.blocks = blocks
        self.width = width
        self.feature = feature
        self.source_block = source_block
        self.omega = omega
        self.rank = rank
        self.decision = DecisionModule(width, candidates, rank)
        prior = torch.zeros(candidates) if prior is None else prior
        if prior.shape != (candidates,):
            raise UserError(f"prior: {tuple(prior.shape)} values for {candidates} candidate blocks")
        self.register_buffer("prior", prior.float())

    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again; weights and prior come from its state dict."""
        return {
            "blocks": self.blocks,
            "width": self.width,
            "feature": self.feature,
            "source_block": self.source_block,
            "omega": self.omega,
            "rank": self.rank,
        }

    @property
    def candidates(self) -> slice:
        """Blocks that may be skipped: after the source block, before the last."""
        return slice(self.source_block, self.blocks - 1)

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> BuddyState:
        """Resolve the budget and start an empty running mean."""
        if budget is None:
            raise UserError("budget: None asks the budget predictor, and this run has none; give a budget in (0, 1]")
        executed = executed_per_sequence(budget, batch, self.blocks, self.always, device)
        candidates = self.prior.shape[0]
        return BuddyState(
            first=first_places(executed - self.always, candidates),
            every=torch.ones(batch, self.blocks, dtype=torch.bool, device=device),
            bias=(self.omega * self.prior.double()).to(device),
            pooled=RunningMean.empty(batch, candidates, device),
        )

    def observe(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Score the new tokens and add them to the running mean."""
        state.pooled.add(self.decision(source_feature(keys, values, self.feature)), mask)

    def scores(self, state: BuddyState) -> Tensor:
        """Fused scores ``s + omega * prior`` of the candidate blocks, (B, candidates) float64, before softmax."""
        return state.pooled.mean() + state.bias

    def decide(self, state: BuddyState) -> Tensor:
        """Exactly ``executed`` blocks per sequence; softmax is monotone, so the choice needs only the scores."""
        return state.every.scatter(1, ranking(self.scores(state)) + self.source_block, state.first)

    def decide_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """One pass over all tokens: cumulative means of their scores, top-k for each."""
        scores = self._scores_each(state, keys, values, mask, prompt)
        return torch.nn.functional.pad(keep_top(scores, state.first), (self.source_block, 1), value=True)

    def diagnostics(self, state: BuddyState) -> dict[str, float]:
        """Mean entropy of the softmax over the scores, nats."""
        entropy = torch.distributions.Categorical(logits=self.scores(state)).entropy()
        return {"score_entropy": entropy.mean().item()}

    def gates(self, state: BuddyState) -> Tensor:
        """Straight-through gates of the chosen route, 1 for the blocks that always run."""
        return self._gates(state, self.scores(state))

    def gates_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """Straight-through gates of every token's own route."""
        return self._gates(state, self._scores_each(state, keys, values, mask, prompt))

    def _scores_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        scores = self.decision(source_feature(keys, values, self.feature))
        return state.pooled.add_each(scores, mask, prompt) + state.bias

    def _gates(self, state: BuddyState, scores: Tensor) -> Tensor:
        chosen = straight_through(keep_top(scores, state.first), scores)
        return torch.nn.functional.pad(chosen, (self.source_block, 1), value=1.0)
