"""FiRST's two phases: gates on a frozen backbone, then LoRA on the routes that they take (`buddy.policies.first`).

Phase 1 trains the gates alone, softly, by the loss of the study plus a penalty on their mean probability. Then the
threshold is chosen, on unlabelled contexts of the tasks that it will be asked, because depth follows the text: a threshold
from instruction prompts ran another number of blocks there. Phase 2 freezes the gates and trains LoRA; the paper does not
say on which forward pass, and we take the one of inference: the prompt's route, hard. LoRA moves what the gates read, so the
threshold is chosen once more at the end. Nothing in phase 1 depends on the depth asked for; the threshold does.

The gates may come from a training of their own (`train_gates`), which serves every depth. What each phase leaves is kept below the run's checkpoints until the run is complete, so a killed training repeats no
phase that was through.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from buddy.policies.first import FirstPolicy, FirstState
from buddy.routing.engine import Routing
from buddy.storage.checkpoints import FOLDER, Checkpoints
from buddy.storage.digests import digest
from buddy.training import fingerprints
from buddy.training.examples import encode
from buddy.training.job import Job, OnLog
from buddy.training.recipe import Recipe
from buddy.training.sft import Trained, train
from buddy.training.threshold import Calibration, achieved, calibrate

if TYPE_CHECKING:
    from buddy.settings import First

logger = logging.getLogger(__name__)


@dataclass
class Fitted(Trained):
    """Outcome of both phases together: the curve and the steps of the second go on where the first ended.

    Attributes:
        threshold: mean probability from which a block runs.
        executed_mean: blocks that the prompts of calibration execute with it, on average, with LoRA.
    """

    threshold: float = 0.5
    executed_mean: float = 0.0


def train_gates(job: Job, policy: FirstPolicy, first: First) -> Trained:
    """Phase 1 alone, for every depth; arguments as in `fit`."""
    return _gates(job, policy, first, Checkpoints(job.folder / FOLDER / "first", _made_by(job, policy, first)))


def fit(
    job: Job,
    policy: FirstPolicy,
    first: First,
    contexts: Sequence[Sequence[int]] | None = None,
    trained: bool = False,
) -> Fitted:
    """Train the gates, choose their threshold for one depth, train LoRA; goes on where a killed call ended.

    Args:
        job: what every peer is given; the number of blocks to leave out is a mean over prompts, steps are logged
            counted through both phases, and a LoRA rank of 0 leaves out the second.
        policy: its gates are trained in place, and it gets the threshold.
        first: the section `first`.
        contexts: token ids of the prompts that the threshold is chosen on; those of the instruction data by default.
        trained: the gates are what `train_gates` made of them, and stay so; their curve and steps are not counted here.
    """
    prompts = _prompts(job, first) if contexts is None else contexts
    work = job.folder / FOLDER / "first"
    kept = Checkpoints(work, {**_made_by(job, policy, first), "prompts": digest([list(one) for one in prompts])})
    gates = Trained() if trained else _gates(job, policy, first, kept)
    found = _threshold(job, policy, first, kept, prompts)
    policy.thresholds = {job.removed: found.threshold}
    second = replace(job, folder=work / "lora", on_log=_later(job.on_log, gates.steps)).lora(policy)
    if second.adapted is not None:
        found = _chosen(job, policy, first, prompts)
        policy.thresholds = {job.removed: found.threshold}
    both = Fitted(**_parts(gates), threshold=found.threshold, executed_mean=found.executed_mean)
    logger.info("%d blocks asked for, %.2f executed on average", policy.blocks - job.removed, found.executed_mean)
    return replace(
        both,
        adapted=second.adapted,
        curve=both.curve + [{**point, "step": point["step"] + gates.steps} for point in second.curve],
        steps=gates.steps + second.steps,
        tokens=gates.tokens + second.tokens,
        positions=gates.positions + second.positions,
        batch_size=second.batch_size or gates.batch_size,
        trainable=gates.trainable + second.trainable,
    )


def recipe(policy: FirstPolicy, skip_weight: float) -> Recipe:
    """Phase 1: the gates alone, every block computed, and running a block has a price."""

    def full_depth(batch: int, seed: int, step: int, part: int) -> list[float]:
        return [1.0] * batch

    def penalty(routing: Routing) -> Tensor:
        assert routing.state is not None
        state: FirstState = routing.state.policy_state
        return skip_weight * policy.mean_probability(state)

    return Recipe(full_depth, trains_policy=True, lora=False, penalty=penalty, constants={"skip_weight": skip_weight})


def _made_by(job: Job, policy: FirstPolicy, first: First) -> dict[str, Any]:
    """All that the two phases depend on, in what both keep."""
    return {
        "settings": job.settings.model_dump(exclude={"save_steps", "data"}),
        "first": first.model_dump(),
        "removed": job.removed,
        "seed": job.seed,
        "pairs": digest(list(job.pairs)),
        "gates": fingerprints.of_weights(policy),
        "backbone": fingerprints.of_weights(job.backbone),
    }


def _gates(job: Job, policy: FirstPolicy, first: First, kept: Checkpoints) -> Trained:
    """Phase 1, or what it left."""
    from safetensors.torch import load, save

    weights, outcome = kept.read("gates.safetensors"), kept.read("gates.json")
    if weights is not None and outcome is not None:
        policy.load_state_dict(load(weights))
        policy.to(job.backbone.device)
        return Trained(**json.loads(outcome))
    changed = {"epochs": first.epochs, "learning_rate": first.learning_rate, "router_learning_rate": None}
    trained = train(
        job.backbone,
        job.tokenizer,
        policy,
        job.pairs,
        job.settings.model_copy(update=changed),
        recipe(policy, first.skip_weight),
        kept.folder / "gates",
        job.seed,
        job.on_log,
    )
    state = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    kept.write("gates.safetensors", save(state))
    kept.write("gates.json", json.dumps(_parts(trained)).encode())
    return trained


def _prompts(job: Job, first: First) -> list[list[int]]:
    """The first prompts of the instruction data."""
    rows = encode(job.tokenizer, job.pairs, job.settings.max_length)[: first.calibration_prompts]
    return [row["input_ids"][: row["prompt_length"]] for row in rows]


def _threshold(
    job: Job, policy: FirstPolicy, first: First, kept: Checkpoints, prompts: Sequence[Sequence[int]]
) -> Calibration:
    """The threshold along which LoRA is trained, or what was found before."""
    done = kept.read("threshold.json")
    if done is not None:
        return Calibration(**json.loads(done))
    found = _chosen(job, policy, first, prompts)
    kept.write("threshold.json", json.dumps(asdict(found)).encode())
    return found


def _chosen(job: Job, policy: FirstPolicy, first: First, prompts: Sequence[Sequence[int]]) -> Calibration:
    """The threshold, and the depth that it gives the model as it stands."""
    if first.threshold is None:
        return calibrate(job.backbone, policy, prompts, job.removed, job.settings.batch_size)
    return achieved(job.backbone, policy, prompts, job.removed, first.threshold, job.settings.batch_size)


_KEPT = ("adapted", "curve", "steps", "tokens", "positions", "batch_size", "trainable")


def _parts(trained: Trained) -> dict[str, Any]:
    """The fields of an outcome, the adapted model not copied."""
    return {name: getattr(trained, name) for name in _KEPT}


def _later(on_log: OnLog | None, steps: int) -> OnLog | None:
    """Steps counted on from the phase before."""
    if on_log is None:
        return None
    return lambda step, values: on_log(step + steps, {**values, "step": step + steps})
