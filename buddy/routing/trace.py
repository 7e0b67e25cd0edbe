"""What ran: the route of every sequence at every step of a generation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Trace:
    """Routes of one call, oldest first.

    Attributes:
        steps: one boolean tensor (B, L) per forward pass, on the CPU; step 0 is the prefill. A pass in which every token
            has its own route leaves one per token.
        tokens: number of tokens each of them took in.
    """

    steps: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def add(self, route: Tensor, tokens: int) -> None:
        """Append the route (B, L) of a pass over this many tokens per sequence."""
        self.steps.append(route.cpu())
        self.tokens.append(tokens)

    def add_each(self, route: Tensor) -> None:
        """Append the routes (B, S, L) of a pass whose tokens have a route each."""
        for token in route.unbind(1):
            self.add(token, 1)

    def __len__(self) -> int:
        return len(self.steps)

    def routes(self, sequence: int = 0) -> Tensor:
        """Boolean (steps, L): the route of one sequence at each step."""
        return torch.stack([step[sequence] for step in self.steps])

    def paths(self, sequence: int = 0) -> list[tuple[int, ...]]:
        """Executed blocks (indices from 0) of one sequence at each step."""
        return [tuple(route.nonzero().flatten().tolist()) for route in self.routes(sequence)]

    def distinct_paths(self, sequence: int = 0) -> int:
        """Number of different paths one sequence took."""
        return len(set(self.paths(sequence)))

    def executed(self) -> Tensor:
        """Integer (steps, B): blocks executed by each sequence at each step."""
        return torch.stack([step.sum(-1) for step in self.steps])

    def called(self) -> Tensor:
        """Integer (steps,): blocks that any sequence executed at each step, whose weights it had to read."""
        return torch.stack([step.any(0).sum() for step in self.steps])

    def paths_at_once(self) -> Tensor:
        """Integer (steps,): different paths among the sequences at each step."""
        return torch.tensor([len(step.unique(dim=0)) for step in self.steps])

    def frequency(self) -> Tensor:
        """(L,) float: how often each block ran, over sequences and steps."""
        return torch.cat(self.steps).float().mean(0)
