"""The paper's recipe for the budget predictor: GRPO over depths (sec. 4.4, C.4, D.7).

For each prompt a group of G depths is drawn from the policy. Each one's reward is
``-lambda_perf * CE - lambda_cost * b``, standardised within the group (population standard deviation, as the paper says
no more); the loss is ``-mean(A log pi) - beta * entropy``. There is no clipping and no reference policy: every batch is
used for one update, so the ratio of new to old policy is 1.

The order of examples and the depths drawn are functions of seed and step alone, so a resumed training repeats what an
uninterrupted one would have done.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.types import CausalLM
from buddy.settings import READ_BY_PRESET, Predictor
from buddy.storage.checkpoints import Checkpoints
from buddy.training import divergence, fingerprints
from buddy.training.depth_losses import Rollouts, Row

OnLog = Callable[[int, dict[str, float]], None]

EPSILON = 1e-6
"""Added to a group's standard deviation: a group whose depths are all the same has no advantage."""


def standardised(rewards: Tensor) -> Tensor:
    """Advantages (B, G) of rewards (B, G): standardised within each group."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + EPSILON)


def grpo_loss(logits: Tensor, actions: Tensor, advantages: Tensor, entropy_weight: float) -> Tensor:
    """``-mean(A log pi) - beta * entropy``.

    Args:
        logits: (B, K), of the policy.
        actions: (B, G) int64, which of the K were drawn.
        advantages: (B, G).
        entropy_weight: beta.
    """
    log_pi = logits.log_softmax(-1)
    return -(advantages * log_pi.gather(1, actions)).mean() - entropy_weight * entropy(logits).mean()


def entropy(logits: Tensor) -> Tensor:
    """Entropy (...) of policies with these logits (..., K), nats."""
    log_pi = logits.log_softmax(-1)
    return -(log_pi.exp() * log_pi).sum(-1)


def batch_of(rows: Sequence[Row], size: int, seed: int, step: int) -> list[Row]:
    """The examples of a step: pass after pass over all of them, each in another order."""
    found = []
    for place in range(step * size, (step + 1) * size):
        turn, index = divmod(place, len(rows))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed * 1_000_003 + turn))
        found.append(rows[int(order[index])])
    return found


def draw(logits: Tensor, group: int, seed: int, step: int) -> Tensor:
    """Depths of a step, (B, group) int64 on the host: which of the K, drawn from the policy (B, K)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + 1)
    chances = logits.detach().double().softmax(-1).cpu()
    return torch.multinomial(chances, group, replacement=True, generator=generator)


def train(
    backbone: CausalLM,
    policy: BuddyPolicy,
    rows: Sequence[Row],
    settings: Predictor,
    folder: Path,
    seed: int = 0,
    on_log: OnLog | None = None,
) -> list[dict[str, Any]]:
    """Train the policy's predictor in place; goes on from the last whole checkpoint of this very training.

    Args:
        backbone: frozen causal language model.
        policy: has a predictor without a price, on the backbone's device.
        rows: examples.
        settings: the section `predictor` of the study.
        folder: where checkpoints are kept.
        seed: of the order of examples and the depths drawn.
        on_log: called with (step, values) at every log line.

    Returns:
        A point per log line: step, means of loss, reward, ce (nats per token), entropy (nats) and mean_budget since the
        last one, and histogram, how often each depth was drawn.
    """
    run = _Run(policy, settings, rows, seed, Checkpoints(folder, _made_by(backbone, policy, rows, settings, seed)))
    run.resume()
    with tqdm(total=settings.steps, initial=run.step, desc="predictor (paper)", unit="step") as bar:
        while run.step < settings.steps:
            run.update(backbone)
            bar.update()
            if run.step % settings.logging_steps == 0 or run.step == settings.steps:
                point = run.log()
                bar.set_postfix(entropy=f"{point['entropy']:.4f}", ce=f"{point['ce']:.3f}")
                if on_log is not None:
                    on_log(run.step, {name: value for name, value in point.items() if isinstance(value, float)})
            if run.step % settings.save_steps == 0 and run.step < settings.steps:
                run.save()
    return run.curve


class _Run:
    """A training under way, and all that a checkpoint has to hold of it."""

    def __init__(
        self, policy: BuddyPolicy, settings: Predictor, rows: Sequence[Row], seed: int, kept: Checkpoints
    ) -> None:
        assert policy.predictor is not None
        self.policy, self.predictor = policy, policy.predictor
        self.settings, self.rows, self.seed, self.kept = settings, rows, seed, kept
        self.optimiser = torch.optim.Adam(self.predictor.parameters(), lr=settings.learning_rate)
        divergence.watch(self.optimiser, lambda: self.step + 1)
        self.step = 0
        self.curve: list[dict[str, Any]] = []
        self._begin_window()

    def _begin_window(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)
        self.drawn = torch.zeros(len(self.predictor.depths), dtype=torch.int64)
        self.since = self.step

    def update(self, backbone: CausalLM) -> None:
        """Draw, score and learn from one batch."""
        settings, depths = self.settings, self.predictor.depths.cpu()
        batch = Rollouts(backbone, self.policy, batch_of(self.rows, settings.batch_size, self.seed, self.step))
        logits = self.predictor(batch.contexts)
        actions = draw(logits, settings.group, self.seed, self.step)
        losses = batch.losses(depths[actions].tolist())
        budgets = depths[actions].double() / self.policy.blocks
        rewards = -settings.quality_weight * losses - settings.cost_weight * budgets
        advantages = standardised(rewards).to(logits)
        loss = grpo_loss(logits, actions.to(logits.device), advantages, settings.entropy_weight)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        means = (loss.item(), rewards.mean(), losses.mean(), entropy(logits.detach()).mean().item(), budgets.mean())
        self.sums += torch.tensor([float(mean) for mean in means], dtype=torch.float64)
        self.drawn += torch.bincount(actions.flatten(), minlength=len(self.drawn))

    def log(self) -> dict[str, Any]:
        """Close the window of this log line."""
        names = ("loss", "reward", "ce", "entropy", "mean_budget")
        means = dict(zip(names, (self.sums / (self.step - self.since)).tolist(), strict=True))
        self.curve.append({"step": self.step, **means, "histogram": self.drawn.tolist()})
        self._begin_window()
        return self.curve[-1]

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "weights": self.predictor.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": {"step": self.step, "curve": self.curve, "since": self.since},
            "window": [self.sums, self.drawn],
        }
        stream = io.BytesIO()
        torch.save(content, stream)
        self.kept.write_step(self.step, stream.getvalue())

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        kept = self.kept.last_step()
        if kept is None:
            return
        content = torch.load(io.BytesIO(kept), weights_only=True, map_location="cpu")
        self.predictor.load_state_dict(content["weights"])
        self.optimiser.load_state_dict(content["optimiser"])
        for name, value in content["progress"].items():
            setattr(self, name, value)
        self.sums, self.drawn = content["window"]


def _made_by(
    backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Row], settings: Predictor, seed: int
) -> dict[str, Any]:
    """All that a checkpoint depends on."""
    return {
        "settings": settings.model_dump(include={*READ_BY_PRESET["paper"]} - {"save_steps"}),
        "seed": seed,
        "examples": fingerprints.of_examples(rows),
        "policy": {"settings": policy.settings(), "state": fingerprints.of_weights(policy)},
        "backbone": fingerprints.of_weights(backbone),
    }
