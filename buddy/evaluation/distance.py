"""How far what a router reads is from what it was trained on, in deviations of the training prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buddy.policies.buddy import BuddyPolicy
from buddy.policies.predictor import mean_feature
from buddy.routing.blocks import Stack
from buddy.routing.model import RoutedModel
from buddy.routing.padding import leading, padded

LEAST = 1e-6
"""Deviation that a feature has at least, so that one which never moved in training divides nothing by zero."""


@torch.no_grad()
def distances(model: RoutedModel, contexts: Sequence[Sequence[int]], batch_size: int = 16) -> Tensor | None:
    """How far each context is from the prompts that the router was trained on.

    The mean feature of the context's tokens is standardised, feature by feature, by mean and deviation of the training
    prompts' (`buddy.training.prompts.note`); the distance is the root of the mean square. Of a training prompt it is about 1.

    Args:
        model: the run, in evaluation mode.
        contexts: token ids of N contexts, each at least one.
        batch_size: contexts per pass, which ends at the source block.

    Returns:
        (N,) float32 on the host; None where the policy has no such router, or was trained before this was kept.
    """
    policy = model.policy
    if not isinstance(policy, BuddyPolicy) or not policy.prompts_noted:
        return None
    order = sorted(range(len(contexts)), key=lambda place: -len(contexts[place]))
    found = torch.zeros(len(contexts))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = [contexts[place] for place in places]
        stack, source = Stack(model.backbone, padded(rows).to(model.device)), policy.source_block - 1
        _, keys, values = stack.tapped(stack.run(stack.embedded, range(source)), source)
        real = leading([*map(len, rows)], keys.shape[2]).to(model.device)
        pooled = mean_feature(keys, values, policy.feature, real)
        standard = (pooled - policy.prompts_mean) / policy.prompts_deviation.clamp(min=LEAST)
        found[places] = standard.square().mean(-1).sqrt().cpu()
    return found
