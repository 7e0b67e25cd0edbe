"""Training of the budget predictor on a finished run: backbone and router stay as they are (paper sec. 4.4).

Three presets. ``paper`` is GRPO with every published value (`buddy.training.grpo`). ``tuned`` takes the exact expectation
over a coarse grid of depths, at any price (`buddy.training.tuned_predictor`). ``rise`` estimates, token by token, how far each
depth moves the model's predictions (`buddy.training.rise_predictor`).

Why not TRL's `GRPOTrainer`: its actions are tokens. It generates completions with the model it trains, scores their text
and differentiates through their log-probabilities; here an action is a depth, the response is given, and no gradient
passes through the backbone. Every part of it that costs something would have to be replaced. Nor does
`transformers.Trainer` help where the trained network is a small MLP, two prompts make a batch, and the sampling has to go
on where a killed job stopped. So the loop is a plain one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from buddy.errors import UserError, unknown
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.predictor import BudgetPredictor, DepthPredictor, RisePredictor
from buddy.routing.budget import round_half_up
from buddy.routing.types import CausalLM
from buddy.settings import PREDICTOR_PRESETS, Predictor
from buddy.training import grpo, rise_predictor, tuned_predictor
from buddy.training.depth_losses import Row, loss_table
from buddy.training.rises import rise_table

EXAMPLES: dict[str, int | None] = {"paper": None, "tuned": 2000, "rise": 400}
"""Examples of each data set that a preset takes where nothing else is said: but for ``paper`` all of them are measured at every
depth, and of ``rise`` every token is an example."""

FOLDER = "predictor"
"""Below a run's checkpoints: what a killed training goes on from."""


@dataclass(frozen=True)
class Fitted:
    """Outcome of a predictor's training.

    Attributes:
        curve: a point per log line (`grpo.train`, `tuned_predictor.fit`).
        steps: updates of ``paper``, passes of ``tuned``, of ``rise`` the penalties that were tried.
        kept: the step whose state is the result: the last one of ``paper``, of the others the best on held-out prompts.
        said: what else the record says, of ``rise`` (`rise_predictor.fit`).
    """

    curve: list[dict[str, Any]]
    steps: int
    kept: int
    said: dict[str, Any] = field(default_factory=dict)

    @property
    def result(self) -> dict[str, Any]:
        """The point of the curve that belongs to the result."""
        return next(point for point in self.curve if point["step"] == self.kept)


def depths_of(policy: BuddyPolicy, preset: str, grid: int, most_removed: int) -> list[int]:
    """The depths that a preset chooses from, executed blocks, ascending.

    ``paper``: one to all of the blocks that may be skipped. The others: about ``grid`` depths, evenly spread from the
    deepest pruning that the run was trained for up to full depth; budgets below it are nobody's choice.

    Args:
        policy: ranks the blocks.
        preset: ``paper``, ``tuned`` or ``rise``.
        grid: number of depths.
        most_removed: blocks left out at most.

    Raises:
        UserError: an unknown preset.
    """
    if preset not in PREDICTOR_PRESETS:
        raise unknown("preset", preset, PREDICTOR_PRESETS)
    if preset == "paper":
        return list(range(policy.always + 1, policy.blocks + 1))
    lowest = max(policy.blocks - most_removed, policy.always)
    if lowest >= policy.blocks:
        raise UserError(f"depths: of {policy.blocks} blocks {lowest} always run; there is nothing to choose")
    span = policy.blocks - lowest
    return sorted({lowest + round_half_up(span * place / (grid - 1)) for place in range(grid)})


def train(
    backbone: CausalLM,
    policy: BuddyPolicy,
    rows: Sequence[Row],
    preset: str,
    settings: Predictor,
    most_removed: int,
    folder: Path,
    seed: int = 0,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> Fitted:
    """Give a policy a budget predictor and train it; goes on where a killed call ended.

    Args:
        backbone: frozen causal language model, with its adapter.
        policy: on the backbone's device; it gets the predictor, and nothing else of it changes.
        rows: examples, from `buddy.training.predictor_examples`; for ``rise`` each with ``set``, its data set.
        preset: ``paper``, ``tuned`` or ``rise``.
        settings: the section `predictor` of the study.
        most_removed: blocks left out at most in the run's own training.
        folder: where what is done is kept meanwhile.
        seed: of the predictor's weights and all that is drawn.
        on_log: called with (step, values) at every log line.
    """
    depths = depths_of(policy, preset, settings.depths, most_removed)
    if preset == "rise":
        return _train_rise(backbone, policy, rows, depths, settings, folder / FOLDER, seed, on_log)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if preset == "paper":
            predictor = BudgetPredictor(policy.width, depths, preset, hidden=policy.rank)
        else:
            predictor = BudgetPredictor(
                policy.width, depths, preset, hidden=tuned_predictor.HIDDEN, price=settings.price
            )
    if preset == "paper":
        policy.predictor = predictor.to(backbone.device)
        curve = grpo.train(backbone, policy, rows, settings, folder / FOLDER, seed, on_log)
        kept = curve[-1]["step"]
    else:
        contexts, losses = loss_table(backbone, policy, rows, depths, settings.table_batch, folder / FOLDER)
        curve, kept = tuned_predictor.fit(predictor, contexts, losses, policy.blocks, settings, seed, on_log)
        policy.predictor = predictor.to(backbone.device)
    policy.requires_grad_(False)
    return Fitted(curve, curve[-1]["step"], kept)


def _train_rise(
    backbone: CausalLM,
    policy: BuddyPolicy,
    rows: Sequence[Row],
    depths: Sequence[int],
    settings: Predictor,
    folder: Path,
    seed: int,
    on_log: Callable[[int, dict[str, float]], None] | None,
) -> Fitted:
    table = rise_table(backbone, policy, rows, depths, settings.table_batch, folder)
    predictor = RisePredictor(table.contexts.shape[1], depths, "rise", settings.price)
    sets = [str(row["set"]) for row in rows]
    curve, kept, said = rise_predictor.fit(predictor, table, sets, policy.blocks, seed, on_log)
    policy.predictor = predictor.to(backbone.device)
    policy.requires_grad_(False)
    return Fitted(curve, len(curve), kept, said)


def facts(predictor: DepthPredictor, fitted: Fitted) -> dict[str, Any]:
    """What a training record says beside the curve."""
    result = fitted.result
    return {
        "preset": predictor.preset,
        "depths": predictor.depths.tolist(),
        "price": predictor.price,
        "kept_step": fitted.kept,
        **({"kept_trial": result["trial"]} if "trial" in result else {}),
        "final_loss": result["loss"],
        "final_entropy": result["entropy"],
        "final_mean_budget": result["mean_budget"],
        "entropy_uniform": math.log(len(predictor.depths)),
        "predictor_parameters": sum(parameter.numel() for parameter in predictor.parameters()),
        **fitted.said,
    }
