"""How each peer becomes a run: its choice of blocks, then LoRA by the recipe that BUDDY is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from buddy.data.choices import training_items
from buddy.peers.pudding import Omission, pool
from buddy.policies.first import FirstPolicy
from buddy.policies.pudding import PuddingPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.policy import Policy
from buddy.routing.types import CausalLM
from buddy.settings import First, Pudding, Training
from buddy.training import first as gates
from buddy.training import pudding as router
from buddy.training import sft
from buddy.training.recipe import Recipe
from buddy.training.sft import Trained


@dataclass(frozen=True)
class Job:
    """What the making of every peer is given.

    Attributes:
        backbone, tokenizer: the frozen model on its device.
        pairs: instruction data, prompts and responses.
        settings: the section `training`; a LoRA rank of 0 trains no LoRA.
        removed: number of blocks to leave out.
        folder: the run's; checkpoints are kept below it.
        seed: of all that is random.
        on_log: called with (step, values) at every log line.
    """

    backbone: CausalLM
    tokenizer: Any
    pairs: Sequence[tuple[str, str]]
    settings: Training
    removed: int
    folder: Path
    seed: int
    on_log: Callable[[int, dict[str, float]], None] | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return int(self.backbone.config.num_hidden_layers)

    def lora(self, policy: Policy, never_run: Sequence[int] = ()) -> Trained:
        """Train LoRA through the routes of a policy that has nothing to learn any more; nothing at rank 0.

        Args:
            policy: chooses the blocks.
            never_run: blocks, from 0, that it never chooses, and that get no LoRA.
        """
        if self.settings.lora_rank == 0:
            return Trained()
        return sft.train(
            self.backbone,
            self.tokenizer,
            policy,
            self.pairs,
            self.settings,
            Recipe(without_lora=never_run),
            self.folder,
            self.seed,
            self.on_log,
        )


@dataclass(frozen=True)
class Peer:
    """A peer that is ready to be saved: its policy, the outcome of its training, and facts for its record."""

    policy: Policy
    trained: Trained
    facts: dict[str, Any]


def static(job: Job, order: Sequence[int]) -> Peer:
    """A fixed removal: the first blocks of an order; an empty one is the dense model, which LoRA alone changes."""
    policy = StaticPolicy(job.blocks, order[: job.removed])
    return Peer(policy, job.lora(policy, never_run=policy.removal_order), {"removed_blocks": policy.removal_order})


def pudding(job: Job, omissions: Sequence[Omission], settings: Pudding, tasks: Path) -> Peer:
    """A pool of omission sets, a router that learns which one suits a prompt, and one LoRA for all sets.

    Args:
        job: what every peer is given.
        omissions: orders of removal, from `buddy.peers.pudding.find_pool`.
        settings: the section `pudding`.
        tasks: folder of the data sets that the router learns from.
    """
    sets = pool(omissions, job.removed)
    found = training_items(tasks, settings.tasks, job.tokenizer, settings.router_items)
    items = [item for questions in found.values() for item in questions]
    attention = job.backbone.get_decoder().layers[0].self_attn
    torch.manual_seed(job.seed)
    policy = PuddingPolicy(
        job.blocks,
        [list(one) for one in sets],
        encoder=settings.encoder,
        width=job.backbone.config.num_key_value_heads * attention.head_dim,
        tokenizer=job.tokenizer,
    )
    losses = router.omission_losses(job.backbone, items, list(sets), settings.batch_size, job.folder)
    fit = router.fit_router(policy, job.backbone, items, losses, settings, job.seed, job.folder)
    trained = job.lora(policy, never_run=sorted(set.intersection(*map(set, sets))))
    named = [{"blocks": list(blocks), "found_for": names} for blocks, names in sets.items()]
    return Peer(policy, trained, {"sets": named, "router": asdict(fit)})


def first(job: Job, settings: First) -> Peer:
    """A gate in each block, trained first; a threshold for the depth asked for; then LoRA."""
    torch.manual_seed(job.seed)
    policy = FirstPolicy(job.blocks, job.backbone.config.hidden_size)
    fitted = gates.fit(
        job.backbone,
        job.tokenizer,
        policy,
        job.pairs,
        job.settings,
        settings,
        job.removed,
        job.folder,
        job.seed,
        job.on_log,
        lora=job.settings.lora_rank > 0,
    )
    return Peer(policy, fitted, {"threshold": fitted.threshold, "executed_mean": fitted.executed_mean})
