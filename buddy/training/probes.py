"""Does the router route? Its scores on a fixed set of prompts, looked at before, while and after it is trained.

The loss cannot tell: LoRA lowers it along one path for all prompts just as well. The blocks up to the source block are all
that a look takes, so it costs a thirtieth of a forward pass on a model of thirty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.blocks import Stack
from buddy.routing.padding import padded
from buddy.routing.policy import Policy
from buddy.routing.ranking import first_places, keep_top
from buddy.routing.types import CausalLM

PROMPTS = 64
"""Prompts that are looked at."""
BATCH = 16


def figures(scores: Tensor, prior: Tensor, kept: int) -> dict[str, float]:
    """What scores say about routes.

    Args:
        scores: (N, C), fused scores of the candidate blocks for N prompts.
        prior: (C,), what the scores are before the router adds anything; all equal where there is no prior.
        kept: candidates that run.

    Returns:
        ``paths``, distinct routes; ``off_prior``, share of prompts that take another one than the prior's (absent without
        a prior); ``spread_prompts``, deviation between prompts, mean over blocks, and ``spread_blocks``, deviation
        between blocks, mean over prompts; ``margin``, by how much the last block that runs beats the first that does not,
        mean over prompts (absent where all or none run); ``entropy`` of the softmax over the blocks, nats, mean over
        prompts. Deviations are those of the population.
    """
    scores, prior = scores.double(), prior.double()
    count, candidates = scores.shape
    places = torch.full((count + 1,), kept, device=scores.device)
    routes = keep_top(torch.cat([scores, prior.to(scores.device).unsqueeze(0)]), first_places(places, candidates))
    found = {"paths": float(len(routes[:-1].unique(dim=0)))}
    if prior.max() > prior.min():
        found["off_prior"] = (routes[:-1] != routes[-1]).any(-1).double().mean().item()
    found["spread_prompts"] = scores.std(0, correction=0).mean().item()
    found["spread_blocks"] = scores.std(1, correction=0).mean().item()
    if 0 < kept < candidates:
        falling = scores.sort(dim=-1, descending=True).values
        found["margin"] = (falling[:, kept - 1] - falling[:, kept]).mean().item()
    logs = scores.log_softmax(-1)
    found["entropy"] = -(logs.exp() * logs).sum(-1).mean().item()
    return found


@dataclass(frozen=True)
class Probes:
    """Prompts whose routes are looked at, and the depth at which they are.

    Attributes:
        prompts: token ids, and the places of those that are read.
        removed: blocks left out.
    """

    prompts: Sequence[tuple[Sequence[int], Sequence[int]]]
    removed: int

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], removed: int) -> Probes:
        """The first different prompts of examples in tokens (`buddy.training.examples.encode`)."""
        prompts = dict.fromkeys(
            (
                tuple(row["input_ids"][: row["prompt_length"]]),
                tuple(row.get("question") or range(row["prompt_length"])),
            )
            for row in rows
        )
        return cls(list(prompts)[:PROMPTS], removed)

    def summary(self) -> dict[str, int]:
        """How many prompts are looked at, and at which depth."""
        return {"prompts": len(self.prompts), "removed": self.removed}

    @torch.no_grad()
    def look(self, backbone: CausalLM, policy: Policy) -> dict[str, float]:
        """`figures` of a router as it stands; adapters in the backbone count, neither is changed.

        Args:
            backbone: the model that the router reads.
            policy: the router, on its device.

        Raises:
            TypeError: a policy that does not score blocks.
        """
        if not isinstance(policy, BuddyPolicy):
            raise TypeError(f"{type(policy).__name__} has no scores to look at")
        modes = backbone.training, policy.training
        backbone.eval()
        policy.eval()
        try:
            order = sorted(self.prompts, key=lambda prompt: len(prompt[0]))
            parts = [self._scores(backbone, policy, order[at : at + BATCH]) for at in range(0, len(order), BATCH)]
        finally:
            backbone.train(modes[0])
            policy.train(modes[1])
        kept = policy.blocks - self.removed - policy.always
        return figures(torch.cat(parts), policy.begin(1.0, 1, backbone.device).bias, kept)

    @staticmethod
    def _scores(
        backbone: CausalLM, policy: BuddyPolicy, prompts: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Tensor:
        """(B, candidates), as a prefill of these prompts would find them."""
        ids = padded([tokens for tokens, _ in prompts]).to(backbone.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, read) in zip(mask, prompts, strict=True):
            row[list(read)] = True
        stack, source = Stack(backbone, ids), policy.source_block - 1
        _, keys, values = stack.tapped(stack.run(stack.embedded, range(source)), source)
        state = policy.begin(1.0, len(prompts), backbone.device)
        policy.observe(state, keys, values, mask)
        return policy.scores(state)
