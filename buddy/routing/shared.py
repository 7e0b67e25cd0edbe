"""Routes for a batch as a whole: the best by its sequences' scores among those that call few different blocks.

A decode step reads the weights of every block that any sequence of the batch runs. Sequences that choose on their own
agree on few: at half depth, eight of them call nearly every block, and nothing is saved. Here a bound holds for a step:
it calls at most ``slack`` blocks more than its deepest sequence runs, and every sequence still runs exactly as many as
its budget says.

What is maximised is the sum of the sequences' scores over the blocks that they run. With scores that a softmax turns into
probabilities, as BUDDY's are, it is the joint log-probability of the chosen blocks, up to a constant.

- ``slack`` 0, one set for all (`nested`): sequences of equal budget share a route, and a smaller budget's route is part of
  every larger one's. Exact where all budgets are equal. Otherwise greedy, from the smallest budget up.
- ``slack`` above 0 (`pooled`): the batch chooses a pool of blocks, and each sequence its best ones in the pool. The best
  pool is the maximum of a submodular function (NP-hard); what is taken is the better of two: one grown greedily, which
  is at least 1 - 1/e of the best, counted from each sequence's lowest score; and the blocks that are missed most if all
  the others are there, which is every sequence's own choice as soon as these fit into the bound. So a larger slack is
  never worse.

All of it is done on the device, in shapes that the host knows: a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.errors import UserError
from buddy.routing.budget import Budget, executed_per_sequence
from buddy.routing.policy import Choices, Policy
from buddy.routing.ranking import keep_top


@dataclass(frozen=True)
class Sharing:
    """How the routes of a batch are chosen together; known on the host, and built into graphs.

    Attributes:
        slack: blocks that a step may call beyond those of its deepest sequence.
        rounds: greedy choices that it takes: the number of different budgets without slack, and with it the number of
            blocks that the pool has more than the smallest budget; an upper bound where a predictor chooses the budgets.
    """

    slack: int
    rounds: int

    @classmethod
    def of(cls, slack: int | None, policy: Policy, budget: Budget | None, batch: int) -> Sharing | None:
        """What a slack means for these sequences; None if they may choose independently: nothing is asked, or they can
        do nothing that it forbids.

        Args:
            slack: at least 0; None leaves sequences independent.
            policy: chooses the blocks.
            budget: of the batch, as in `Policy.begin`.
            batch: number of sequences B.

        Raises:
            UserError: no such slack, or a policy that cannot choose for a batch.
        """
        if slack is None:
            return None
        if not isinstance(slack, int) or isinstance(slack, bool) or slack < 0:
            raise UserError(f"slack: {slack!r} is not a number of blocks, 0 or more; None leaves sequences independent")
        if batch == 1 or policy.nested:
            return None
        if not policy.shares:
            raise UserError(
                f"slack: {type(policy).__name__} does not score single blocks, so it cannot choose for a batch; leave it out"
            )
        always, blocks = policy.always, policy.blocks
        if budget is None or isinstance(budget, str):
            return cls(slack, batch if slack == 0 else blocks - always)
        counts = set(executed_per_sequence(budget, batch, blocks, always, "cpu").tolist())
        if max(counts) + slack >= blocks and slack:
            return None
        return cls(slack, len(counts) if slack == 0 else max(counts) + slack - min(counts))


def decide(policy: Policy, state: Any, sharing: Sharing | None) -> Tensor:
    """The route of every sequence, boolean (B, L): its own choice, or what the batch chooses together."""
    if sharing is None:
        return policy.decide(state)
    return _routes(policy.choices(state), sharing)


def decide_each(
    policy: Policy, state: Any, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor, sharing: Sharing | None
) -> Tensor:
    """The route of every token, boolean (B, S, L), as decoding token by token would have it.

    The batch's step n has every sequence's n-th token after its prompt, and no sequence that has none.

    Args:
        policy, state, keys, values, mask, prompt: as in `Policy.decide_each`.
        sharing: None leaves sequences to themselves.
    """
    if sharing is None:
        return policy.decide_each(state, keys, values, mask, prompt)
    choices = policy.choices_each(state, keys, values, mask, prompt)
    step = torch.where(mask, (mask & ~prompt).cumsum(1), -1)
    route = torch.ones(*mask.shape, policy.blocks, dtype=torch.bool, device=mask.device)
    for number in range(int(step.max()) + 1):
        here = step == number
        rows = here.any(1).nonzero().flatten()
        columns = here[rows].int().argmax(1)  # a prompt's tokens have the same scores
        some = choices._replace(scores=choices.scores[rows, columns], first=choices.first[rows])
        chosen = route[:, 0].clone()
        chosen[rows] = _routes(some, sharing)
        route = torch.where(here.unsqueeze(-1), chosen.unsqueeze(1), route)
    return route


def _routes(choices: Choices, sharing: Sharing) -> Tensor:
    """(B, L): the routes that a batch chooses together."""
    chosen = nested(choices, sharing.rounds) if sharing.slack == 0 else pooled(choices, sharing.slack, sharing.rounds)
    return torch.nn.functional.pad(chosen, (choices.before, choices.after), value=True)


def nested(choices: Choices, rounds: int) -> Tensor:
    """One set of blocks per budget, each part of the next larger one.

    From the smallest budget up, the set takes in the blocks that the sequences of that budget score highest in sum. A
    sequence of a larger budget will have blocks of its own choice later; all that it has to say here is what it loses by
    a block that it would not have chosen.

    Args:
        choices: what is chosen from.
        rounds: different budgets at most.

    Returns:
        Boolean (B, C).
    """
    scores, keep = choices.scores, choices.first.sum(1, keepdim=True)
    lost = (scores - _lowest_kept(scores, keep)).clamp(max=0)
    place = _places(scores)
    route, taken = torch.zeros_like(choices.first), torch.zeros_like(choices.first[0])
    for _ in range(rounds):
        level = keep.masked_fill(keep <= taken.sum(), len(place) + 1).min()  # one that no budget has, if none is left
        here = keep == level
        gain = (scores.masked_fill(~here, 0) + lost.masked_fill(keep <= level, 0)).sum(0)
        order = gain.masked_fill(taken, math.inf).argsort(descending=True, stable=True)
        taken = torch.zeros_like(taken).scatter(0, order, place < level)
        route = route | (here & taken)
    return route


def pooled(choices: Choices, slack: int, rounds: int) -> Tensor:
    """Each sequence's best blocks of a pool that has ``slack`` blocks more than the largest budget.

    Args:
        choices: what is chosen from.
        slack: at least 1.
        rounds: blocks that the pool has more than the smallest budget, at most.

    Returns:
        Boolean (B, C).
    """
    scores, first = choices.scores, choices.first
    size = first.sum(1).max() + slack
    grown, missed = _grown(choices, size, rounds), _missed(choices, size)
    pool = torch.where(_worth(choices, grown) > _worth(choices, missed), grown, missed)
    return keep_top(scores.masked_fill(~pool, -math.inf), first)


def _grown(choices: Choices, size: Tensor, rounds: int) -> Tensor:
    """A pool (C,) built block by block, always by the one that adds most to the sum of scores.

    Up to the smallest budget every sequence runs all of it, so these blocks are the best in sum. Then a block is worth
    to a sequence what it scores above the lowest block that it would replace; that is the lowest of all where none has
    to be replaced yet.
    """
    scores, keep = choices.scores, choices.first.sum(1, keepdim=True)
    place, floor = _places(scores), scores.amin(1, keepdim=True)
    order = scores.sum(0).argsort(descending=True, stable=True)
    pool = torch.zeros_like(choices.first[0]).scatter(0, order, place < keep.min())
    for _ in range(rounds):
        replaced = torch.maximum(_lowest_kept(scores.masked_fill(~pool, -math.inf), keep), floor)
        gain = (scores - replaced).clamp(min=0).sum(0).masked_fill(pool, -1)
        pool = pool | ((place == gain.argmax()) & (pool.sum() < size))
    return pool


def _missed(choices: Choices, size: Tensor) -> Tensor:
    """The pool (C,) of the blocks whose absence alone costs most; blocks that no sequence wants come last."""
    scores, first = choices.scores, choices.first
    keep = first.sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    substitute = scores.sort(descending=True).values.gather(1, keep)
    wanted = keep_top(scores, first).any(0)
    cost = (scores - substitute).clamp(min=0).sum(0).masked_fill(~wanted, -1)
    order = cost.argsort(descending=True, stable=True)
    return torch.zeros_like(wanted).scatter(0, order, _places(scores) < size)


def _worth(choices: Choices, pool: Tensor) -> Tensor:
    """Sum of the scores of what the sequences run, without shape, if each takes its best of the pool."""
    held = choices.scores.masked_fill(~pool, -math.inf).sort(descending=True).values
    return held.masked_fill(~choices.first, 0).sum()


def _lowest_kept(scores: Tensor, keep: Tensor) -> Tensor:
    """(B, 1): the lowest score that each sequence keeps, if it keeps as many of the highest; infinite if it keeps none."""
    ranked = scores.sort(descending=True).values
    return ranked.gather(1, (keep - 1).clamp(min=0)).masked_fill(keep == 0, math.inf)


def _places(scores: Tensor) -> Tensor:
    """(C,): the places of a ranking of the candidates, from 0."""
    return torch.arange(scores.shape[1], device=scores.device)
