"""What training prompts pooled to: kept with the router, so that one can say how far other prompts are from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.types import CausalLM
from buddy.training.router import read

NOTED = 512
"""Training prompts whose features are pooled."""


@torch.no_grad()
def note(backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    """Keep mean and deviation, over the first training prompts, of the mean feature that the router reads of a prompt.

    Args:
        backbone: as it is when the router is used: with its adapter, in evaluation mode.
        policy: trained; takes the figures.
        rows: examples in tokens, read as in training (`buddy.training.examples.encode`).
        batch_size: prompts per pass.
    """
    training = backbone.training
    backbone.eval()
    try:
        tokens = read(backbone, policy, rows[:NOTED], batch_size)
    finally:
        backbone.train(training)
    policy.note_prompts(torch.stack([each.double().mean(0) for each in tokens]))
