"""How each peer becomes a run: its choice of blocks, then LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from buddy.baselines.pudding import Omission, pool
from buddy.data.choices import training_contexts, training_items
from buddy.policies.first import FirstPolicy
from buddy.policies.pudding import PuddingPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing import kv
from buddy.routing.policy import Policy
from buddy.settings import First, Pudding
from buddy.storage import tensors
from buddy.training import first as gates
from buddy.training import pudding as router
from buddy.training.job import Job
from buddy.training.sft import Trained


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
        omissions: orders of removal, from `buddy.baselines.pudding.find_pool`.
        settings: the section `pudding`.
        tasks: folder of the data sets that the router learns from.
    """
    sets = pool(omissions, job.removed)
    found = training_items(tasks, settings.tasks, job.tokenizer, settings.router_items)
    items = [item for questions in found.values() for item in questions]
    torch.manual_seed(job.seed)
    policy = PuddingPolicy(
        job.blocks,
        [list(one) for one in sets],
        encoder=settings.encoder,
        width=kv.width(job.backbone),
        tokenizer=job.tokenizer,
    )
    losses = router.omission_losses(job.backbone, items, list(sets), settings.batch_size, job.folder)
    fit = router.fit_router(policy, job.backbone, items, losses, settings, job.seed, job.folder)
    trained = job.lora(policy, never_run=sorted(set.intersection(*map(set, sets))))
    named = [{"blocks": list(blocks), "found_for": names} for blocks, names in sets.items()]
    return Peer(policy, trained, {"sets": named, "router": asdict(fit)})


def first_gates(job: Job) -> FirstPolicy:
    """FiRST's gates as they start."""
    torch.manual_seed(job.seed)
    return FirstPolicy(job.blocks, job.backbone.config.hidden_size)


def first(job: Job, settings: First, tasks: Path | None = None, trained: Path | None = None) -> Peer:
    """A gate in each block, trained first; a threshold for the depth asked for; then LoRA.

    Args:
        job: what every peer is given.
        settings: the section `first`.
        tasks: folder of the data sets on whose contexts the threshold is chosen; None takes instruction prompts.
        trained: file of the gates' weights; None trains them here.
    """
    policy = first_gates(job)
    if trained is not None:
        tensors.fill(policy, trained)
        policy.to(job.backbone.device)
    contexts = None
    if tasks is not None and settings.tasks:
        contexts = training_contexts(tasks, settings.tasks, job.tokenizer, settings.calibration_prompts)
    fitted = gates.fit(job, policy, settings, contexts, trained is not None)
    return Peer(policy, fitted, {"threshold": fitted.threshold, "executed_mean": fitted.executed_mean})
