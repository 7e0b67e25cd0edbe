"""PuDDing's router: what each omission set costs on training questions, and a network that learns to predict it.

From the public code (tada0347/PuDDing): the targets are the mean log-likelihoods of the right answer's tokens under each
set (here with the sign of a loss), learnt by mean squared error; AdamW with weight decay 0.01, 500 steps of linear
warm-up and linear decay to zero; a fifth of the questions is held out. Ours:

- The router is trained on prompts as it will see them, a row per question: its context, or what the contexts of its
  options share (`buddy.data.choices.Item.shared`). There, rows have an answer behind the question, one row per choice.
- Targets are standardised: by each set's mean, and by one deviation for all sets, which leaves the order of the errors
  as it is. Before its first step the router so gives every prompt the set that is best on average.
- The state with the lowest held-out error is kept, the one before the first step among them.
- Warm-up takes at most a tenth of the steps, which small data would not outlast otherwise.

Training needs a forward pass per question and set, which no later stage repeats; both halves leave what they have done
below the run's checkpoints, and go on from it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from buddy.baselines.pudding import Answers, by_length, outputs_without
from buddy.data.choices import Item, Tokens
from buddy.errors import UserError
from buddy.policies.pudding import BACKBONE, PuddingPolicy, StateReader, TextReader
from buddy.routing.blocks import Stack
from buddy.routing.padding import leading, padded
from buddy.routing.types import CausalLM
from buddy.settings import Pudding
from buddy.storage.checkpoints import FOLDER, Checkpoints
from buddy.storage.digests import digest
from buddy.training import divergence, fingerprints

logger = logging.getLogger(__name__)

WARMUP_STEPS = 500
WEIGHT_DECAY = 0.01
HELD_OUT = 0.2
SHARD = 1024
"""Questions whose losses are written together."""

STATE_RATE, ENCODER_RATE = 3e-3, 1e-5
"""Learning rates by default: of the network on the backbone's states, and of an encoder (the public code's).

The first is the best of 1e-4 to 1e-2 in 10 epochs on SmolLM2-135M, 192 questions of eight tasks, four sets of four blocks,
mean of five splits: held-out error 3.56 against 4.13 for a constant, loss 4.12 against 4.25 for one set and 3.81 at best.
"""


# ---- the targets ---------------------------------------------------------------------------------------------------------


def omission_losses(
    backbone: CausalLM,
    items: Sequence[Item],
    sets: Sequence[Sequence[int]],
    batch_size: int = 16,
    folder: Path | None = None,
) -> Tensor:
    """What each omission set costs on each question: minus the mean log-likelihood of the right answer's tokens.

    Args:
        backbone: causal language model, without LoRA.
        items: N questions.
        sets: omission sets.
        batch_size: questions per pass.
        folder: the run's; what is done is kept in its checkpoints, and not done again. None keeps nothing.

    Returns:
        (N, sets) float64, nats per token.
    """
    parts = []
    weights = fingerprints.of_weights(backbone) if folder else ""
    with tqdm(total=len(items), desc="omission losses", unit="question") as bar:
        for number, start in enumerate(range(0, len(items), SHARD)):
            pairs = [item.solution for item in items[start : start + SHARD]]
            made_by = {"sets": list(sets), "questions": digest(pairs), "backbone": weights}
            kept = Checkpoints(folder / FOLDER / "pudding", made_by) if folder else None
            name = f"losses-{number:05d}.json"
            done = kept.read(name) if kept else None
            if done is None:
                found = _losses(backbone, pairs, sets, batch_size, bar).tolist()
                if kept:
                    kept.write(name, json.dumps(found).encode())
            else:
                found = json.loads(done)
                bar.update(len(pairs))
            parts.append(torch.tensor(found, dtype=torch.float64))
    return torch.cat(parts)


@torch.no_grad()
def _losses(
    backbone: CausalLM, pairs: Sequence[tuple[Tokens, Tokens]], sets: Sequence[Sequence[int]], batch_size: int, bar: Any
) -> Tensor:
    losses = torch.zeros(len(pairs), len(sets), dtype=torch.float64)
    questions = [(context, (answer,)) for context, answer in pairs]
    for members in by_length(questions, batch_size):
        batch = Answers([questions[index] for index in members])
        stack = batch.stack(backbone)
        columns = [-batch.likelihood(stack, hidden) for hidden in outputs_without(stack, sets)]
        losses[members] = torch.stack(columns, dim=1)
        bar.update(len(members))
    return losses


# ---- the router ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How well a router predicts, on prompts of questions that it was not trained on.

    The state that is kept was picked on the same prompts, so with few of them the figures flatter it a little.

    Attributes:
        prompts, held_out: prompts in all, and those held out.
        mse: mean squared error, (nats per token) squared; ``mse_constant`` is that of each set's mean.
        best_share: how often the chosen set is the best one; ``best_share_single`` is that of one set for all.
        loss: mean loss of the chosen set, nats per token; ``loss_single`` that of the set which is best on the questions
            trained on, ``loss_mean`` that of a random one, ``loss_oracle`` that of the best one for each prompt.
        chosen: how often each set is chosen.
        kept_epoch: the epoch whose state was kept; 0 is the state before training.
        curve: error in training and on held-out prompts after each epoch, standardised.
    """

    prompts: int
    held_out: int
    mse: float
    mse_constant: float
    best_share: float
    best_share_single: float
    loss: float
    loss_single: float
    loss_mean: float
    loss_oracle: float
    chosen: list[int]
    kept_epoch: int
    curve: list[dict[str, float]]


def fit_router(
    policy: PuddingPolicy,
    backbone: CausalLM,
    items: Sequence[Item],
    losses: Tensor,
    settings: Pudding,
    seed: int = 0,
    folder: Path | None = None,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> Fit:
    """Teach a policy to predict the losses of its sets; it is left on the backbone's device, in evaluation mode.

    Args:
        policy: trained in place. The seed of its weights is the caller's to set before building it.
        backbone: causal language model, without LoRA.
        items: N questions.
        losses: (N, sets), from `omission_losses`.
        settings: the section `pudding` of the study.
        seed: of what is held out, the order of prompts and dropout.
        folder: the run's; the trained router is kept in its checkpoints, and not trained again. None keeps nothing.
        on_log: called with (epoch, errors) after every epoch.

    Returns:
        How well it predicts.

    Raises:
        UserError: fewer than two questions.
    """
    policy.to(backbone.device)
    asking = [index for index, item in enumerate(items) if item.shared]  # the others leave nothing to read
    rows, losses = [items[index].shared for index in asking], losses[asking]
    if len(rows) < 2:
        raise UserError(f"router_items: {len(rows)} questions cannot be trained on and held out; take at least 2")
    rate = settings.learning_rate or (STATE_RATE if policy.encoder == BACKBONE else ENCODER_RATE)
    made_by = {
        "settings": {"epochs": settings.epochs, "batch_size": settings.batch_size, "learning_rate": rate},
        "seed": seed,
        "sets": policy.sets,
        "prompts": digest(rows),
        "losses": digest(losses.tolist()),
        "router": fingerprints.of_weights(policy),
        "backbone": fingerprints.of_weights(backbone),
    }
    kept = Checkpoints(folder / FOLDER / "pudding", made_by) if folder else None
    fit, state = (kept.read("router.json"), kept.read("router.safetensors")) if kept else (None, None)
    if fit is not None and state is not None:
        from safetensors.torch import load

        policy.load_state_dict(load(state))
        return Fit(**json.loads(fit))
    held = _held_out(len(rows), seed)
    found = _fit(policy, router_inputs(policy, backbone, rows), losses, held, settings, rate, seed, on_log)
    if kept:
        from safetensors.torch import save

        state = save({name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()})
        kept.write("router.safetensors", state)
        kept.write("router.json", json.dumps(asdict(found)).encode())
    return found


def _held_out(questions: int, seed: int) -> Tensor:
    """(N,) boolean, a random fifth."""
    held = torch.zeros(questions, dtype=torch.bool)
    order = torch.randperm(questions, generator=torch.Generator().manual_seed(seed))
    held[order[: max(round(HELD_OUT * questions), 1)]] = True
    return held


def router_inputs(policy: PuddingPolicy, backbone: CausalLM, prompts: Sequence[Tokens], batch_size: int = 32) -> Any:
    """What the policy's predictor is given for these prompts: mean keys and values (R, 2 * width), or R texts."""
    if isinstance(policy.predictor, TextReader):
        return policy.predictor.text(prompts)
    inputs = torch.zeros(len(prompts), 2 * policy.width)
    batches = list(by_length([(prompt, ()) for prompt in prompts], batch_size))
    for members in tqdm(batches, desc="router inputs", unit="batch"):
        inputs[members] = _mean_states(policy, backbone, [prompts[index] for index in members])
    return inputs


@torch.no_grad()
def _mean_states(policy: PuddingPolicy, backbone: CausalLM, prompts: Sequence[Tokens]) -> Tensor:
    """Run the first block, and let the policy observe it as in a prefill: (B, 2 * width) on the host."""
    ids = padded(prompts).to(backbone.device)
    mask = leading([*map(len, prompts)], ids.shape[1]).to(backbone.device)
    stack = Stack(backbone, ids)
    _, keys, values = stack.tapped(stack.embedded, 0)
    state = policy.begin(None, len(prompts), backbone.device)
    policy.observe(state, keys, values, mask)
    return state.pooled.mean().float().cpu()


def _fit(
    policy: PuddingPolicy,
    inputs: Any,
    targets: Tensor,
    held: Tensor,
    settings: Pudding,
    rate: float,
    seed: int,
    on_log: Callable[[int, dict[str, float]], None] | None,
) -> Fit:
    """Standardise, train, keep the best state, and measure it."""
    train, test = (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
    _standardise(policy, inputs, targets, train)
    device = policy.loss_mean.device
    goal = (targets.to(device) - policy.loss_mean) / policy.loss_scale
    predictor = policy.predictor
    steps = settings.epochs * -(-len(train) // settings.batch_size)
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    divergence.watch(optimiser)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _Schedule(steps))
    best, kept, kept_epoch = _error(predictor, inputs, goal, test), _copy(predictor), 0
    curve = [{"epoch": 0.0, "held_out": best}]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), tqdm(total=steps, desc="router", unit="step") as bar:
        torch.manual_seed(seed)  # of dropout
        for epoch in range(1, settings.epochs + 1):
            predictor.train()
            total = 0.0
            for rows in train[torch.randperm(len(train), generator=generator)].split(settings.batch_size):
                loss = (predictor(_take(inputs, rows, device)) - goal[rows]).square().mean()
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.item() * len(rows) / len(train)
                bar.update()
            curve.append({"epoch": float(epoch), "train": total, "held_out": _error(predictor, inputs, goal, test)})
            bar.set_postfix(curve[-1])
            if on_log is not None:
                on_log(epoch, curve[-1])
            if curve[-1]["held_out"] < best:
                best, kept, kept_epoch = curve[-1]["held_out"], _copy(predictor), epoch
    predictor.load_state_dict(kept)
    policy.eval()
    return _measured(policy, inputs, targets, train, test, kept_epoch, curve)


class _Schedule:
    """Linear warm-up, then linearly to zero: the share of the peak rate at a step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.warmup = steps, min(WARMUP_STEPS, steps // 10)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return max(self.steps - step, 0) / max(self.steps - self.warmup, 1)


def _standardise(policy: PuddingPolicy, inputs: Any, targets: Tensor, train: Tensor) -> None:
    """Means and deviations of the rows trained on."""
    policy.loss_mean.copy_(targets[train].mean(0))
    policy.loss_scale.copy_((targets[train] - targets[train].mean(0)).square().mean().sqrt().clamp(min=1e-6))
    if isinstance(policy.predictor, StateReader):
        policy.predictor.mean.copy_(inputs[train].mean(0))
        policy.predictor.scale.copy_(inputs[train].std(0, correction=0).clamp(min=1e-6))


def _take(inputs: Any, rows: Tensor, device: torch.device) -> Any:
    return inputs[rows].to(device) if isinstance(inputs, Tensor) else [inputs[row] for row in rows.tolist()]


def _copy(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def _outputs(predict: Callable[[Any], Tensor], inputs: Any, rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([predict(_take(inputs, part, device)) for part in rows.split(256)])


def _error(predictor: torch.nn.Module, inputs: Any, goal: Tensor, rows: Tensor) -> float:
    """Mean squared error of standardised predictions, without dropout."""
    predictor.eval()
    return float((_outputs(predictor, inputs, rows, goal.device) - goal[rows]).square().mean())


def _measured(
    policy: PuddingPolicy,
    inputs: Any,
    targets: Tensor,
    train: Tensor,
    test: Tensor,
    kept_epoch: int,
    curve: list[dict[str, float]],
) -> Fit:
    predicted = _outputs(policy.predict, inputs, test, policy.loss_mean.device).double().cpu()
    true, mean = targets[test].double(), targets[train].double().mean(0)
    best, single = true.argmin(1), mean.argmin()
    chosen = predicted.argmin(1)
    fit = Fit(
        prompts=len(targets),
        held_out=len(test),
        mse=float((predicted - true).square().mean()),
        mse_constant=float((mean - true).square().mean()),
        best_share=float((chosen == best).double().mean()),
        best_share_single=float((best == single).double().mean()),
        loss=float(true.gather(1, chosen.unsqueeze(1)).mean()),
        loss_single=float(true[:, single].mean()),
        loss_mean=float(true.mean()),
        loss_oracle=float(true.amin(1).mean()),
        chosen=torch.bincount(chosen, minlength=true.shape[1]).tolist(),
        kept_epoch=kept_epoch,
        curve=curve,
    )
    logger.info(
        "router: best set for %.0f %% of held-out prompts; loss %.4f (one set for all %.4f, oracle %.4f)",
        *(100 * fit.best_share, fit.loss, fit.loss_single, fit.loss_oracle),
    )
    return fit
