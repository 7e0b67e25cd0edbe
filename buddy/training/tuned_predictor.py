"""A recipe for the budget predictor that learns: the exact expectation over depths, at every price.

What GRPO samples is measured once: the cross-entropy of each training response at each depth of a coarse grid
(`buddy.training.depth_losses.loss_table`). From then on no backbone is needed, and the expected reward of a policy is a sum:

    reward(prompt, depth; price) = -((1 - price) * loss(prompt, depth) + price * cost(depth))
    loss of the network = -mean over prompts and prices of sum over depths of pi(depth | prompt, price) * reward
                          + mean squared error of the estimated losses

Losses are differences from full depth, prompt by prompt: how hard a response is in itself says nothing about depth, and
would drown what does. They are divided by their mean at the shallowest depth, and costs run from 0 to 1, so that prices
mean the same on every backbone: at 0.5 full depth and the shallowest are worth the same to the average prompt. The
squared error makes every depth of every prompt a target, where the expectation alone looks at the depths near the chosen
one; with a few hundred prompts it is the better teacher.

A fifth of the prompts is held out; the state that does best on them is kept. The entropy needs no weight: the sharpness
of the policy is learnt, and the expectation rewards it as far as depths can be told apart.

The numbers below were chosen by five-fold cross-validation on training data alone: SmolLM2-135M with the demo's router,
192 questions of eight tasks, eleven depths from 18 to 30. Area between the predictor's frontier and the convex hull of
constant depths, nats times fraction of blocks, mean of three splits: 0.062 with dropout 0.5, as with the best of three on
held-out prompts; 0.049 without the squared error, 0.047 without dropout. The best of three is kept because dropout 0.5
is too much where depths are easy to tell apart.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.errors import UserError
from buddy.policies.predictor import BudgetPredictor
from buddy.settings import Predictor
from buddy.training.grpo import entropy

logger = logging.getLogger(__name__)

OnLog = Callable[[int, dict[str, float]], None]

HIDDEN = 128
SHARPNESS_RATE = 1e-2
WEIGHT_DECAY = 0.01
TRIALS = ((0.5, 3e-4), (0.2, 1e-3), (0.0, 1e-3))
"""Dropout of inputs and hidden layer, and the learning rate that goes with it. The best on held-out prompts is kept: the
first where prompts are few and depths hard to tell apart, the last where they are many or easy."""
BATCH, PRICES_DRAWN = 32, 8
HELD_OUT = 0.2
PATIENCE = 60
"""Passes without a better held-out reward after which training ends."""
PRICES = torch.linspace(0.02, 0.98, 25)
"""Where rewards are measured."""
FEWEST = 4


def expected_cost(logits: Tensor, losses: Tensor, cost: Tensor, price: Tensor) -> Tensor:
    """Minus the expected reward of a policy.

    Args:
        logits: (P, B, K), of the policy at P prices.
        losses: (B, K), scaled.
        cost: (K,).
        price: (P, B) or (P, 1).

    Returns:
        (P, B).
    """
    price = price.unsqueeze(-1)
    return (logits.softmax(-1) * ((1 - price) * losses + price * cost)).sum(-1)


def prepare(predictor: BudgetPredictor, contexts: Tensor, losses: Tensor) -> Tensor:
    """Set what a predictor takes from its training prompts: standardisation, the unit of loss, the mean loss.

    Args:
        predictor: priced.
        contexts: (N, width).
        losses: (N, K), cross-entropies, nats.

    Returns:
        (N, K) float32, the losses as differences from full depth, scaled.
    """
    rises = losses.double() - losses[:, -1:].double()
    typical = rises[:, 0].square().mean().sqrt().clamp(min=1e-6)
    # A model to which depth is worth nothing on average has no such mean to go by.
    predictor.nats.copy_(torch.maximum(rises[:, 0].mean(), typical / 10))
    predictor.mean.copy_(contexts.mean(0))
    predictor.scale.copy_(contexts.std(0, correction=0).clamp(min=1e-8))
    scaled = (rises / predictor.nats.double()).float()
    predictor.rise.copy_(scaled.mean(0))
    return scaled


def fit(
    predictor: BudgetPredictor,
    contexts: Tensor,
    losses: Tensor,
    blocks: int,
    settings: Predictor,
    seed: int = 0,
    on_log: OnLog | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Train a priced predictor in place on a table of losses; takes seconds, on the host.

    Args:
        predictor: fresh, on the host.
        contexts: (N, width) float32.
        losses: (N, K), cross-entropies of its depths, nats.
        blocks: number of blocks L.
        settings: the section `predictor` of the study.
        seed: of what is held out, the order of prompts, the prices and dropout. That of the weights is the caller's.
        on_log: called with (pass, values) after every pass; the passes of all trials are counted through, and ``trial``
            says which one it is of.

    Returns:
        Of the trial that was kept, a point per pass, the first one before training: trial, its number; means over the
        prompts trained on and over prices of loss, reward, ce (nats per token), entropy (nats), mean_budget, and histogram,
        how often each depth is the likeliest; held_out, the loss on the prompts held out; sharpness. And the pass whose
        state was kept.

    Raises:
        UserError: too few prompts.
    """
    if len(contexts) < FEWEST:
        raise UserError(f"examples: {len(contexts)} prompts cannot be trained on and held out; take at least {FEWEST}")
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed))
    count = max(round(HELD_OUT * len(contexts)), 1)
    test, train = order[:count], order[count:]
    prepare(predictor, contexts[train], losses[train])
    table = _Table(contexts, losses, ((losses - losses[:, -1:]) / predictor.nats).float(), train, test, blocks)
    trials = []
    for number, (dropout, rate) in enumerate(TRIALS):
        twin = copy.deepcopy(predictor)
        curve, kept = _trial(twin, table, dropout, rate, settings.epochs, seed, number, on_log)
        trials.append((curve[kept]["held_out"], number, curve, kept, twin))
    _, number, curve, kept, twin = min(trials, key=lambda trial: trial[:2])
    logger.info("dropout %g is the best on held-out prompts, after pass %d", TRIALS[number][0], kept)
    predictor.load_state_dict(twin.state_dict())
    return curve, kept


@dataclass(frozen=True)
class _Table:
    """What a fit is given: contexts (N, width), losses (N, K) in nats and scaled, and which rows are trained on."""

    contexts: Tensor
    losses: Tensor
    scaled: Tensor
    train: Tensor
    test: Tensor
    blocks: int


def _trial(
    predictor: BudgetPredictor,
    table: _Table,
    dropout: float,
    rate: float,
    epochs: int,
    seed: int,
    number: int,
    on_log: OnLog | None,
) -> tuple[list[dict[str, Any]], int]:
    """Train with one dropout; the predictor is left in its best state, that of the pass returned."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = _optimiser(predictor, rate)
    curve = [{**_point(predictor, table, 0), "trial": number}]
    best, kept = 0, copy.deepcopy(predictor.state_dict())
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=epochs, desc=f"predictor, dropout {dropout:g}", unit="pass") as bar,
    ):
        torch.manual_seed(seed)  # of dropout
        for epoch in range(1, epochs + 1):
            for rows in table.train[torch.randperm(len(table.train), generator=generator)].split(BATCH):
                _update(predictor, optimiser, table.contexts[rows], table.scaled[rows], dropout, generator)
            curve.append({**_point(predictor, table, epoch), "trial": number})
            bar.update()
            bar.set_postfix(held_out=f"{curve[-1]['held_out']:.4f}", entropy=f"{curve[-1]['entropy']:.3f}")
            if on_log is not None:
                values = {key: value for key, value in curve[-1].items() if isinstance(value, float)}
                on_log(number * epochs + epoch, {**values, "trial": number, "pass": epoch})
            if curve[-1]["held_out"] < curve[best]["held_out"]:
                best, kept = epoch, copy.deepcopy(predictor.state_dict())
            elif epoch - best >= PATIENCE:
                break
    predictor.load_state_dict(kept)
    return curve, best


def _optimiser(predictor: BudgetPredictor, rate: float) -> torch.optim.Optimizer:
    network = [*predictor.down.parameters(), *predictor.up.parameters()]
    return torch.optim.AdamW(
        [
            {"params": network, "lr": rate, "weight_decay": WEIGHT_DECAY},
            {"params": [predictor.log_sharpness], "lr": SHARPNESS_RATE, "weight_decay": 0.0},
        ]
    )


def _update(
    predictor: BudgetPredictor,
    optimiser: torch.optim.Optimizer,
    contexts: Tensor,
    scaled: Tensor,
    dropout: float,
    generator: torch.Generator,
) -> None:
    prices = torch.rand(PRICES_DRAWN, len(contexts), generator=generator)
    optimiser.zero_grad(set_to_none=True)
    objective(predictor, contexts, scaled, prices, dropout).backward()
    optimiser.step()


def objective(
    predictor: BudgetPredictor, contexts: Tensor, scaled: Tensor, prices: Tensor, dropout: float = 0.0
) -> Tensor:
    """What is minimised.

    Args:
        predictor: priced.
        contexts: (B, width).
        scaled: (B, K), from `prepare`.
        prices: (P, B).
        dropout: of inputs and hidden layer.
    """
    estimated = predictor.losses(contexts, dropout)
    policy = expected_cost(predictor.weighed(estimated, prices), scaled, predictor.cost, prices)
    return policy.mean() + (estimated - scaled).square().mean()


@torch.no_grad()
def _point(predictor: BudgetPredictor, table: _Table, step: int) -> dict[str, Any]:
    """A point of the curve."""
    prices = PRICES.unsqueeze(1)

    def loss_on(rows: Tensor) -> tuple[Tensor, float]:
        logits = predictor(table.contexts[rows], prices.expand(-1, len(rows)))
        return logits, float(expected_cost(logits, table.scaled[rows], predictor.cost, prices).mean())

    (logits, loss), (_, held_out) = loss_on(table.train), loss_on(table.test)
    chances = logits.softmax(-1)
    return {
        "step": step,
        "loss": loss,
        "reward": -loss,
        "ce": float((chances * table.losses[table.train]).sum(-1).mean()),
        "entropy": float(entropy(logits).mean()),
        "mean_budget": float((chances * predictor.depths).sum(-1).mean() / table.blocks),
        "histogram": torch.bincount(logits.argmax(-1).flatten(), minlength=len(predictor.depths)).tolist(),
        "held_out": held_out,
        "sharpness": float(predictor.log_sharpness.exp()),
    }
