"""Which of several routes suits an input: what each costs it is predicted from what the router reads.

A network of the Decision Module's form (Linear, SiLU, Linear on every token, then the mean) predicts by how much each
route costs an input more or less than the routes do on average. Costs of language are noisy and inputs few, so training is
stopped where the predictions for inputs left out are best, and that may be at the start, where they are the averages over
all inputs. (Training the choice itself, by its expected cost, got stuck: once a second-best route is preferred throughout,
its gradient is gone.)
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

FOLDS = 4
STEPS, EVERY = 240, 12
RATE, DECAY = 5e-3, 0.1


class Pooled(nn.Module):
    """A Decision Module's form, on standardised tokens of many inputs at once.

    Args:
        width: of a token's features.
        rank: hidden width.
        outcomes: values that come out.
        generator: of its start, which gives every input zeros.
    """

    def __init__(self, width: int, rank: int, outcomes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, outcomes)
        with torch.no_grad():
            for parameter in self.down.parameters():
                parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) / width**0.5)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor, owner: Tensor, count: int) -> Tensor:
        """(count, outcomes): means over the tokens of each input; ``owner`` (tokens,) says whose they are."""
        every = self.up(nn.functional.silu(self.down(tokens)))
        sums = torch.zeros(count, every.shape[1]).index_add(0, owner, every)
        return sums / torch.bincount(owner, minlength=count).clamp(min=1).unsqueeze(1)


def predicted(tokens: Sequence[Tensor], costs: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """What each route costs each input, predicted by networks that have not seen the input.

    Args:
        tokens: features of N inputs' tokens, (tokens, width) each.
        costs: (N, K), what each route costs each input.
        rank: hidden width of the network.
        generator: of its start.

    Returns:
        (N, K) float64, in the unit of ``costs``, as differences to an input's mean over the routes.
    """
    every = torch.cat(list(tokens))
    every = (every - every.mean(0)) / every.std(0, correction=0).clamp(min=1e-6)
    owner = torch.arange(len(tokens)).repeat_interleave(torch.tensor([len(each) for each in tokens]))
    offsets = costs - costs.mean(1, keepdim=True)
    start = Pooled(every.shape[1], rank, costs.shape[1], generator)
    folds = torch.arange(len(tokens)) % FOLDS
    histories = torch.zeros(STEPS // EVERY + 1, *costs.shape, dtype=torch.float64)
    for fold in range(FOLDS):
        out = folds == fold
        mean = offsets[~out].mean(0)
        scale = (offsets[~out] - mean).std().clamp(min=1e-9)
        target = ((offsets - mean) / scale).float()
        for step, found in enumerate(_trained(deepcopy(start), every, owner, target, ~out)):
            histories[step, out] = mean + scale * found[out].double()
    errors = (histories - offsets).square().mean((1, 2))
    return histories[int(errors.argmin())]


def _trained(network: Pooled, tokens: Tensor, owner: Tensor, target: Tensor, seen: Tensor) -> list[Tensor]:
    """Predictions (N, K) for all inputs, at the start and after every so many steps on those that are ``seen``."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    found = []
    for step in range(STEPS + 1):
        values = network(tokens, owner, len(target))
        if step % EVERY == 0:
            found.append(values.detach())
        optimizer.zero_grad()
        (values - target)[seen].square().mean().backward()
        optimizer.step()
    return found
