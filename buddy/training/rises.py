"""How much each depth moves a model's own predictions on an input: the table that preset ``rise`` is fitted to.

The rise of an input at a depth is the mean over its tokens of KL(full depth || depth), prompt and response alike. It needs no
right answer, and it is dense: a prompt of fifty tokens has fifty of them, where the loss of a one-word answer is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.types import CausalLM
from buddy.storage.checkpoints import Checkpoints
from buddy.training import fingerprints
from buddy.training.depth_losses import SHARD, Rollouts, Row

TOKENS = 64
"""Tokens of an example whose states are kept, at most, evenly spread: wide states of long inputs would fill a disk."""


@dataclass(frozen=True)
class RiseTable:
    """What N examples' T tokens say.

    Attributes:
        contexts: (N, H) float32, mean state of what a predictor reads of each.
        rises: (N, K) float64, mean rise over all tokens of each, nats.
        states: (T, H) float16, of the tokens that were kept.
        token_rises: (T, K) float32, theirs.
        owner: (T,) int64, the example that a token is of.
    """

    contexts: Tensor
    rises: Tensor
    states: Tensor
    token_rises: Tensor
    owner: Tensor


def rise_table(
    backbone: CausalLM,
    policy: BuddyPolicy,
    rows: Sequence[Row],
    depths: Sequence[int],
    batch_size: int = 8,
    folder: Path | None = None,
) -> RiseTable:
    """Measure it; what is done is kept in ``folder``, and not done again.

    Args:
        backbone, policy: as for `Rollouts`.
        rows: N examples.
        depths: K numbers of executed blocks.
        batch_size: examples per pass.
        folder: None keeps nothing.
    """
    from safetensors.torch import load, save

    parts = []
    models = {"router": fingerprints.of_weights(policy.decision), "backbone": fingerprints.of_weights(backbone)}
    with tqdm(total=len(rows), desc=f"rises at {len(depths)} depths", unit="example") as bar:
        for number, start in enumerate(range(0, len(rows), SHARD)):
            part = rows[start : start + SHARD]
            said = {"examples": fingerprints.of_examples(part), "depths": list(depths), "batch_size": batch_size}
            kept = Checkpoints(folder, said | models) if folder else None
            name = f"rises-{number:05d}.safetensors"
            done = kept.read(name) if kept else None
            if done is None:
                found = _measured(backbone, policy, part, depths, batch_size, bar)
                if kept:
                    kept.write(name, save(found))
            else:
                found = load(done)
                bar.update(len(part))
            parts.append({**found, "owner": found["owner"] + start})
    return RiseTable(**{name: torch.cat([part[name] for part in parts]) for name in RiseTable.__annotations__})


def _measured(
    backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Row], depths: Sequence[int], batch_size: int, bar: Any
) -> dict[str, Tensor]:
    """A part of the table, its examples in their order; owners are counted from 0."""
    found: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]), reverse=True)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch = Rollouts(backbone, policy, [rows[member] for member in members], by_state=True)
        tokens = zip(batch.token_states(), batch.token_rises(depths), strict=True)
        for member, context, (states, rises) in zip(members, batch.contexts, tokens, strict=True):
            mean = rises.double().mean(0) if len(rises) else rises.new_zeros(len(depths)).double()
            chosen = _spread(len(rises)).to(rises.device)
            found[member] = context.cpu(), mean.cpu(), states[chosen].half().cpu(), rises[chosen].cpu()
        bar.update(len(members))
    every = [found[member] for member in range(len(rows))]
    counts = torch.tensor([len(states) for _, _, states, _ in every])
    return {
        "contexts": torch.stack([context for context, _, _, _ in every]),
        "rises": torch.stack([rises for _, rises, _, _ in every]),
        "states": torch.cat([states for _, _, states, _ in every]),
        "token_rises": torch.cat([rises for _, _, _, rises in every]),
        "owner": torch.arange(len(rows)).repeat_interleave(counts),
    }


def _spread(count: int) -> Tensor:
    """Places of at most `TOKENS` of so many tokens."""
    if count <= TOKENS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, TOKENS).round().long()
