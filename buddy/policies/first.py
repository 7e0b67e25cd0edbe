"""FiRST (Jain et al., arXiv 2410.12513): a gate in front of each block, asked once per sequence, in the prefill.

A gate is one linear layer on the block's input, without a hidden layer, and a sigmoid: for each token the probability
that the block runs. At inference the prompt's mean decides, by a threshold (0.5 in the paper); the decision holds while
the sequence is decoded, so a block that is skipped has no keys and values and needs none. In training the block's update
is weighted by the probability, ``h + p * F(h)``, token by token.

What the paper leaves open, as far as its public text says, and what is done here:

- The soft update: the block's output is weighted by p and its input by 1 - p.
- Which blocks have gates: all but the first and the last, which always run, as with every method here.
- How gates start: at a constant probability (`START`), the same for all blocks.
- It has no budget: depth follows from the weight of the penalty. Here one number of blocks to leave out has a threshold
  that brings the mean depth over training prompts nearest to it (`buddy.training.first`), or the paper's 0.5. The depth
  of a single prompt is what its gates say.
- No code of the authors is known to us.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from buddy.errors import BudgetError, UserError
from buddy.routing.budget import Budget, executed_per_sequence
from buddy.routing.policy import GatedPolicy

START = 0.9
"""Probability at which every gate starts: near the pretrained model, and where the sigmoid still has a slope."""


@dataclass
class FirstState:
    """What FiRST remembers of a batch.

    Attributes:
        threshold: (B,) float64, mean probability from which a block runs; minus infinity at full depth.
        executed: (B,) int64, the number of blocks asked for; how many run, only the route says.
        route: (B, L) boolean, what the gates said so far; true where none was asked.
        probability: (B, L) float64, mean over the tokens read of each gate's probability; 1 where there is no gate. In
            training it carries a gradient.
        tokens: (B,) float64, number of tokens read.
    """

    threshold: Tensor
    executed: Tensor
    route: Tensor
    probability: Tensor
    tokens: Tensor


class FirstPolicy(GatedPolicy):
    """One linear gate per middle block, on the block's input; the prompt's mean against a threshold.

    Args:
        blocks: number of blocks L.
        width: size H of the hidden states.
        thresholds: for each number of blocks to leave out that may be asked for, the mean probability from which a block
            runs. Full depth needs none.
    """

    # After the prefill the route is fixed: a decode step asks this policy for nothing.
    capturable = True

    def __init__(self, blocks: int, width: int, thresholds: Mapping[int | str, float] | None = None) -> None:
        super().__init__()
        if blocks < 3:
            raise UserError(f"blocks: {blocks} leave none between the first and the last")
        self.blocks = blocks
        self.width = width
        self.weight = nn.Parameter(torch.zeros(blocks - 2, width))
        self.bias = nn.Parameter(torch.full((blocks - 2,), math.log(START / (1 - START))))
        self.thresholds = {int(removed): float(value) for removed, value in (thresholds or {}).items()}
        for removed in self.thresholds:
            if not 1 <= removed <= blocks - 2:
                raise UserError(f"thresholds: {removed} removed is not between 1 and {blocks - 2}")

    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again; the gates come from its state dict."""
        thresholds = {str(removed): value for removed, value in sorted(self.thresholds.items())}
        return {"blocks": self.blocks, "width": self.width, "thresholds": thresholds}

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> FirstState:
        """Look up the thresholds. Legal are full depth and the depths that have one; None is the only one there is."""
        if budget is None:
            budget = self._own_budget()
        executed = executed_per_sequence(budget, batch, self.blocks, self.always, "cpu")
        thresholds = [self._threshold(count) for count in executed.tolist()]
        shape = (batch, self.blocks)
        return FirstState(
            threshold=torch.tensor(thresholds, dtype=torch.float64, device=device),
            executed=executed.to(device),
            route=torch.ones(shape, dtype=torch.bool, device=device),
            probability=torch.ones(shape, dtype=torch.float64, device=device),
            tokens=torch.zeros(batch, dtype=torch.float64, device=device),
        )

    def _own_budget(self) -> float:
        if len(self.thresholds) != 1:
            raise UserError(f"budget: None is the one depth of a run, and this policy has {len(self.thresholds)}")
        return (self.blocks - next(iter(self.thresholds))) / self.blocks

    def _threshold(self, executed: int) -> float:
        """The threshold for a number of blocks to execute."""
        if executed == self.blocks:
            return -math.inf
        if self.blocks - executed in self.thresholds:
            return self.thresholds[self.blocks - executed]
        held = [self.blocks - removed for removed in sorted(self.thresholds, reverse=True)]
        legal = [f"{count / self.blocks:.4g} ({count} blocks)" for count in (*held, self.blocks)]
        raise BudgetError(
            f"budget: {executed / self.blocks:.4g} would run {executed} of {self.blocks} blocks, for which these gates have "
            f"no threshold; the legal budgets are {', '.join(legal)}"
        )

    def decide(self, state: FirstState) -> Tensor:
        """What the gates said in the prefill."""
        return state.route

    def gate(self, state: FirstState, index: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """Whether the mean over the tokens read reaches the threshold; a sequence without any runs every block."""
        if not self._has_gate(index):
            return None
        # In double precision: near 1, where gates end up, float32 has no room for thresholds.
        self._read(state, index, self._logits(index, hidden).double().sigmoid(), mask)
        runs = (state.probability[:, index] >= state.threshold) | (state.tokens == 0)
        state.route[:, index] = runs
        return runs

    def weights(self, state: FirstState, index: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """The probability of every token."""
        if not self._has_gate(index):
            return None
        probability = self._logits(index, hidden).sigmoid()
        self._read(state, index, probability.double(), mask)
        return probability

    def mean_probability(self, state: FirstState) -> Tensor:
        """Mean over blocks and tokens of the last pass, float64 without shape; the penalty of a training pass."""
        per_sequence = state.probability[:, 1:-1].mean(1)
        return (per_sequence * state.tokens).sum() / state.tokens.sum().clamp(min=1)

    def diagnostics(self, state: FirstState) -> dict[str, float]:
        """Mean probability of the gates."""
        return {"gate_probability": self.mean_probability(state).item()}

    def _has_gate(self, index: int) -> bool:
        return 0 < index < self.blocks - 1

    def _logits(self, index: int, hidden: Tensor) -> Tensor:
        """(B, S), in the gates' own dtype, outside autocast."""
        weight, bias = self.weight[index - 1 : index], self.bias[index - 1 : index]
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.to(weight.dtype), weight, bias).squeeze(-1)

    def _read(self, state: FirstState, index: int, probability: Tensor, mask: Tensor | None) -> None:
        """Note the mean over the tokens that may be read."""
        weight = torch.ones_like(probability) if mask is None else mask.to(probability.dtype)
        state.tokens = weight.sum(1)
        state.probability[:, index] = (probability * weight).sum(1) / state.tokens.clamp(min=1)
