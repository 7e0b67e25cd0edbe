"""BUDDY: a budgeted score over the source block's KV cache, refreshed at every step (paper sec. 4.2, 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.errors import UserError
from buddy.policies.decision import DecisionModule, RunningMean, source_feature, straight_through
from buddy.policies.predictor import Asked, DepthPredictor, make, scaled_state
from buddy.routing.budget import Budget, executed_per_sequence, price_of
from buddy.routing.policy import Choices, Policy
from buddy.routing.profiling import PREDICTOR, mark
from buddy.routing.ranking import first_places, keep_top, ranking


@dataclass
class BuddyState:
    """What BUDDY remembers of a batch.

    Attributes:
        first: (B, candidates) boolean, the places of a ranking that the budget keeps.
        every: (B, L) boolean, all true: the route before anything is left out.
        bias: (candidates,) float64, omega times the prior.
        pooled: running mean of token scores.
        asked: what the budget predictor has been shown; None where the budget is settled.
    """

    first: Tensor
    every: Tensor
    bias: Tensor
    pooled: RunningMean
    asked: Asked | None = None


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
        prompts_noted: whether the state has mean and deviation of what prompts pooled to in training (`note_prompts`).
        predictor: settings of the budget predictor (`DepthPredictor.settings`); None leaves every budget to the caller.
    """

    prior: Tensor
    prompts_mean: Tensor
    prompts_deviation: Tensor
    capturable = True
    shares = True

    def __init__(
        self,
        blocks: int,
        width: int,
        feature: str = "value",
        source_block: int = 1,
        omega: float = 0.1,
        rank: int = 32,
        prior: Tensor | None = None,
        predictor: dict[str, Any] | None = None,
        prompts_noted: bool = False,
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
        self.predictor: DepthPredictor | None = None if predictor is None else make(width, predictor)
        self.prompts_noted = prompts_noted
        if prompts_noted:
            self.register_buffer("prompts_mean", torch.zeros(width))
            self.register_buffer("prompts_deviation", torch.ones(width))

    def note_prompts(self, pooled: Tensor) -> None:
        """Keep what training prompts pooled to, so that one can say how far other prompts are from them.

        Args:
            pooled: (N, width), mean features of N prompts.
        """
        if self.prompts_noted:
            self.prompts_mean.copy_(pooled.mean(0))
            self.prompts_deviation.copy_(pooled.std(0, correction=0))

    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again; weights and prior come from its state dict."""
        return {
            "blocks": self.blocks,
            "width": self.width,
            "feature": self.feature,
            "source_block": self.source_block,
            "omega": self.omega,
            "rank": self.rank,
            **({} if self.predictor is None else {"predictor": self.predictor.settings()}),
            **({"prompts_noted": True} if self.prompts_noted else {}),
        }

    @property
    def candidates(self) -> slice:
        """Blocks that may be skipped: after the source block, before the last."""
        return slice(self.source_block, self.blocks - 1)

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> BuddyState:
        """Resolve the budget and start an empty running mean.

        None, ``auto`` and ``auto:PRICE`` leave the budget to the predictor, which is asked once per sequence, at the
        first decision; what it chooses holds from then on.
        """
        asked = self._asked(budget, batch, device) if budget is None or isinstance(budget, str) else None
        executed = executed_per_sequence(1.0 if asked else budget, batch, self.blocks, self.always, device)  # type: ignore[arg-type]
        candidates = self.prior.shape[0]
        return BuddyState(
            first=first_places(executed - self.always, candidates),
            every=torch.ones(batch, self.blocks, dtype=torch.bool, device=device),
            bias=(self.omega * self.prior.double()).to(device),
            pooled=RunningMean.empty(batch, candidates, device),
            asked=asked,
        )

    def _asked(self, budget: str | None, batch: int, device: torch.device) -> Asked:
        """A question to the predictor, before it has been shown anything."""
        price = None if budget is None else price_of(budget)
        if self.predictor is None:
            raise UserError(
                f"budget: {budget} asks the budget predictor, and this run has none; give a budget in (0, 1], or train one "
                "(buddy predictor --run RUN --data DIR --out RUN2)"
            )
        return Asked(self.predictor.accepted(price), RunningMean.empty(batch, self.predictor.width, device))

    @property
    def reads_states(self) -> bool:
        """Where the budget predictor does."""
        return self.predictor is not None and self.predictor.reads_states

    def see(self, state: BuddyState, hidden: Tensor, mask: Tensor | None) -> None:
        """Show the predictor the prompt's states, if it is asked."""
        if state.asked is not None:
            with mark(PREDICTOR):
                state.asked.pooled.add(scaled_state(hidden), mask)

    def _settle(self, state: BuddyState) -> None:
        """Let the predictor choose the depth of every sequence, if that was left to it."""
        if state.asked is None:
            return
        assert self.predictor is not None
        with mark(PREDICTOR):
            depths = self.predictor.choose(state.asked.pooled.mean().float(), state.asked.price)
            state.first = first_places(depths - self.always, self.prior.shape[0])
            state.asked = None

    def observe(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Score the new tokens and add them to the running mean."""
        features = source_feature(keys, values, self.feature)
        state.pooled.add(self.decision(features), mask)
        if state.asked is not None and not self.reads_states:
            state.asked.pooled.add(features.float(), mask)

    def scores(self, state: BuddyState) -> Tensor:
        """Fused scores ``s + omega * prior`` of the candidate blocks, (B, candidates) float64, before softmax."""
        return state.pooled.mean() + state.bias

    def decide(self, state: BuddyState) -> Tensor:
        """Exactly ``executed`` blocks per sequence; softmax is monotone, so the choice needs only the scores."""
        self._settle(state)
        return state.every.scatter(1, ranking(self.scores(state)) + self.source_block, state.first)

    def choices(self, state: BuddyState) -> Choices:
        """The fused scores, and how many of the candidates each sequence keeps."""
        self._settle(state)
        return Choices(self.scores(state), state.first, self.source_block, 1)

    def choices_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Choices:
        """The same for every token, by cumulative means."""
        return Choices(self._scores_each(state, keys, values, mask, prompt), state.first, self.source_block, 1)

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
        self._settle(state)
        return self._gates(state, self.scores(state))

    def gates_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """Straight-through gates of every token's own route."""
        return self._gates(state, self._scores_each(state, keys, values, mask, prompt))

    def _scores_each(self, state: BuddyState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        features = source_feature(keys, values, self.feature)
        scores = self.decision(features)
        if state.asked is not None:
            if not self.reads_states:
                state.asked.pooled.add(features.float(), mask & prompt)
            self._settle(state)
        return state.pooled.add_each(scores, mask, prompt) + state.bias

    def _gates(self, state: BuddyState, scores: Tensor) -> Tensor:
        chosen = straight_through(keep_top(scores, state.first), scores)
        return torch.nn.functional.pad(chosen, (self.source_block, 1), value=1.0)
