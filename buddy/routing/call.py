"""How one call is routed, and what is known of its sequences from one pass to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from buddy.routing.budget import Budget
from buddy.routing.kv import RoutedCache
from buddy.routing.policy import Policy
from buddy.routing.shared import Sharing
from buddy.routing.trace import Trace
from buddy.routing.types import Block


@dataclass
class Routing:
    """How one call is routed.

    Attributes:
        policy: chooses the blocks.
        budget: fraction of blocks, one or one per sequence; None lets the policy choose.
        every: choose a new path at every n-th decode step; 0 keeps the path of the prefill.
        form: ``sequence``: all tokens of a pass share their sequence's route. ``causal``: each token has the route that
            decoding token by token would give it, the prompt one route.
        kv: K/V of a skipped block where no cache says it, in passes of the causal form.
        context_mask: (B, S), True where the policy may read a token of a pass over a whole sequence; None means every
            token under the attention mask. Answers that are being scored must not choose their own route. In the causal
            form it marks the prompt; None means that the first token alone is the prompt.
        read_mask: (B, S), False where the policy reads nothing of such a pass, whatever the other mask says: a prompt's
            template, which is part of the prompt. None means that it reads every token.
        gradient: training: gates are straight-through and skipped blocks are computed to give them a gradient; those of
            a gated policy are soft.
        grouping: go path by path (True) or block by block (False); None leaves it to `plan.grouping_pays`.
        slack: blocks that a pass may call beyond those of its deepest sequence (`buddy.routing.shared`); None leaves
            every sequence to itself.
        trace: filled with the routes of the call.
        gates: gates of the last pass with their gradient, (B, L) or (B, S, L), in training.
        state: state of the sequences of the last pass, for logging.
        keeps_states: whether the pass under way hands out its hidden states, block by block.
        readers: the blocks as sub-batches run them (`attention.reading_rows`), made once for all passes of the call.
    """

    policy: Policy
    budget: Budget | None
    every: int = 1
    form: str = "sequence"
    kv: str = "zero"
    context_mask: Tensor | None = None
    read_mask: Tensor | None = None
    gradient: bool = False
    grouping: bool | None = None
    slack: int | None = None
    trace: Trace = field(default_factory=Trace)
    gates: Tensor | None = None
    state: RouteState | None = None
    keeps_states: bool = False
    readers: list[Block] = field(default_factory=list)


@dataclass
class RouteState:
    """Routing of the sequences in a cache.

    Attributes:
        policy_state: the policy's own.
        budget: what they were started with.
        route: the current route, boolean (B, L).
        full: whether it names every block for every sequence; on the host.
        step: passes taken, a prefill being the first.
        sharing: how the batch chooses together; None if each sequence does on its own.
    """

    policy_state: Any
    budget: Budget | None = None
    route: Tensor | None = None
    full: bool = True
    step: int = 0
    sharing: Sharing | None = None


def state_of(routing: Routing, cache: RoutedCache | None, batch: int, device: torch.device) -> RouteState:
    """The routing state of these sequences: from their cache, or fresh."""
    if cache is not None and cache.routing is not None:
        return cache.routing
    sharing = Sharing.of(routing.slack, routing.policy, routing.budget, batch)
    state = RouteState(routing.policy.begin(routing.budget, batch, device), routing.budget, sharing=sharing)
    if cache is not None:
        cache.routing = state
    return state
