"""What the making of every peer is given, and LoRA by the recipe that BUDDY is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buddy.data.templates import Example
from buddy.routing.policy import Policy
from buddy.routing.types import CausalLM
from buddy.settings import Training
from buddy.training import sft
from buddy.training.recipe import Recipe

OnLog = Callable[[int, dict[str, float]], None]
"""Called with (step, values) at every log line."""


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
    pairs: Sequence[tuple[str, str] | Example]
    settings: Training
    removed: int
    folder: Path
    seed: int
    on_log: OnLog | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return int(self.backbone.config.num_hidden_layers)

    def lora(self, policy: Policy, never_run: Sequence[int] = ()) -> sft.Trained:
        """Train LoRA through the routes of a policy that has nothing to learn any more; nothing at rank 0.

        Args:
            policy: chooses the blocks.
            never_run: blocks, from 0, that it never chooses, and that get no LoRA.
        """
        if self.settings.lora_rank == 0:
            return sft.Trained()
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
