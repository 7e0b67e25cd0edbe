"""Training of a routed model, token by token (`buddy.training.loss`): one loop for BUDDY and every peer.

TRL's `SFTTrainer` owns the loop (batches, optimiser steps, schedule, checkpoints, logs); one method of it is replaced,
the loss, because its own replaces the backbone's forward pass and a routed pass would be dropped without a word. What
differs between methods (the depths of the examples, whether the policy learns, whether LoRA does) is their `Recipe`.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddy.data.templates import Example
from buddy.routing.engine import Routing, routed
from buddy.routing.policy import Policy
from buddy.routing.types import CausalLM
from buddy.settings import Training
from buddy.storage import checkpoints
from buddy.storage.checkpoints import Checkpoints
from buddy.training import batches, divergence, fingerprints
from buddy.training import loss as losses
from buddy.training.examples import Collator, encode
from buddy.training.probes import Probes
from buddy.training.recipe import Recipe

logger = logging.getLogger(__name__)

CHECKPOINTS = checkpoints.FOLDER
ROUTER_STATE = "router.safetensors"


@dataclass
class Trained:
    """Outcome of a training, or of none at all.

    Attributes:
        adapted: the model with its LoRA, as PEFT has it; None without LoRA.
        curve: a point per log line.
        steps, tokens: updates made, and real tokens seen.
        positions: tokens and padding that were computed.
        batch_size: sequences in a pass at the end: fewer than the settings say where those did not fit into memory.
        trainable: parameters that learnt.
        probes: what the router does with prompts (`buddy.training.probes.figures`), ``first`` before training and ``last``
            after it, how many ``prompts`` they are, and how many blocks are ``removed``; empty without a router.
    """

    adapted: Any = None
    curve: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    positions: int = 0
    batch_size: int = 0
    trainable: int = 0
    probes: dict[str, Any] = field(default_factory=dict)


def train(
    backbone: CausalLM,
    tokenizer: Any,
    policy: Policy,
    pairs: Sequence[tuple[str, str] | Example],
    settings: Training,
    recipe: Recipe,
    folder: Path,
    seed: int = 0,
    on_log: Any = None,
) -> Trained:
    """Train policy, LoRA or both on one device; goes on from the last whole checkpoint of this very training.

    Where a batch does not fit into the device's memory, half of it is computed at a time and twice as many parts make an
    update, from the last checkpoint on. Where neither learns, nothing is done but a look at the probes.

    Args:
        backbone: frozen causal language model on its device.
        tokenizer: its tokenizer.
        policy: chooses the blocks; trained in place (float32) if the recipe says so.
        pairs: prompts and responses.
        settings: the section `training` of the study.
        recipe: which depths the examples run at, and what of the model is trained.
        folder: where checkpoints are kept while it runs.
        seed: of LoRA's start, the order of examples and the depths.
        on_log: called with (step, values) at every log line.

    Raises:
        Diverged: a loss or a gradient is not finite; the checkpoints until then are kept.
    """
    from transformers import set_seed

    set_seed(seed)
    rows = encode(tokenizer, pairs, settings.max_length, settings.pool_over)
    if len(rows) < len(pairs):
        logger.warning(
            "%d of %d examples have prompts over %d tokens and were left out",
            len(pairs) - len(rows),
            len(pairs),
            settings.max_length,
        )
    kept = Checkpoints(folder / CHECKPOINTS, _made_by(backbone, policy, rows, settings, recipe, seed))
    model, adapted = _with_lora(backbone, settings, recipe)
    policy.requires_grad_(recipe.trains_policy)
    model.add_module(_POLICY, policy.to(backbone.device))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        if not trainable:
            return Trained(probes=_looked_at(backbone, policy, rows, recipe))
        start = {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}
        first, trainer = None, None
        while trainer is None:
            trainer = _trainer(model, tokenizer, rows, settings, recipe, kept, seed, on_log)
            first = trainer.look() if first is None else first
            checkpoint = kept.last()
            if checkpoint:
                logger.info("resuming from %s", checkpoint)
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except torch.OutOfMemoryError:
                if settings.batch_size % 2:
                    raise
                settings, trainer = _halved(settings), None
            if trainer is None:  # no sooner: the error holds on to what did not fit
                _begin_again(model, start)
        last = trainer.look()
    finally:
        delattr(model, _POLICY)
    curve = [_curve_point(entry) for entry in trainer.state.log_history if "loss" in entry]
    probes = {**trainer.probes.summary(), "first": first, "last": last} if trainer.probes else {}
    steps, tokens = trainer.state.global_step, trainer.tokens
    logger.info("%.1f %% of the positions that were computed are tokens", 100 * tokens / max(trainer.positions, 1))
    return Trained(adapted, curve, steps, tokens, trainer.positions, settings.batch_size, trainable, probes)


def _halved(settings: Training) -> Training:
    """The settings with half of the batch at a time, and the same examples in an update."""
    batch, parts = settings.batch_size // 2, settings.gradient_accumulation * 2
    logger.warning(
        "out of memory at batch_size %d: goes on with batch_size %d and gradient_accumulation %d, the same examples in each "
        "update",
        settings.batch_size,
        batch,
        parts,
    )
    return settings.model_copy(update={"batch_size": batch, "gradient_accumulation": parts})


def _begin_again(model: CausalLM, start: dict[str, Tensor]) -> None:
    """What learns is as it was before training, and nothing of the attempt holds memory."""
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in start:
                value.copy_(start[name])
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _looked_at(backbone: CausalLM, policy: Policy, rows: list[dict[str, Any]], recipe: Recipe) -> dict[str, Any]:
    """Probes of a router that nothing changes."""
    if not recipe.probed:
        return {}
    probes = Probes.of(rows, recipe.probed)
    seen = probes.look(backbone, policy)
    return {**probes.summary(), "first": seen, "last": seen}


_POLICY = "depth_policy"  # the policy's name inside the trained model while training lasts


def _made_by(
    backbone: CausalLM, policy: Policy, rows: list[dict[str, Any]], settings: Training, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """All that a checkpoint depends on; the policy's state has its prior, and its start."""
    return {
        "settings": settings.model_dump(exclude={"save_steps", "data"}),
        "recipe": recipe.made_by(),
        "seed": seed,
        "examples": fingerprints.of_examples(rows),
        "order": batches.ORDER,
        "policy": {"settings": policy.settings(), "state": fingerprints.of_weights(policy)},
        "backbone": fingerprints.of_weights(backbone),
    }


def _with_lora(backbone: CausalLM, settings: Training, recipe: Recipe) -> tuple[CausalLM, Any]:
    """The model to train, and the same as a PeftModel (None without LoRA)."""
    backbone.requires_grad_(False)
    if settings.lora_rank == 0 or not recipe.lora:
        return backbone, None
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        exclude_modules=_modules_of(recipe.without_lora),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(backbone, lora)
    return adapted, adapted


def _modules_of(blocks: Sequence[int]) -> str | None:
    """A pattern for the modules of these blocks, as PEFT matches names; None for no blocks."""
    return rf".*\.layers\.({'|'.join(map(str, blocks))})\..*" if blocks else None


def _base(model: CausalLM) -> CausalLM:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _curve_point(entry: dict[str, Any]) -> dict[str, float]:
    """What a log line keeps: numbers of the step, and the policy's own; not how far and how long it has run."""
    left_out = ("epoch", "total_flos", "num_tokens", "mean_token_accuracy", "entropy")
    return {
        name: float(value)
        for name, value in entry.items()
        if name not in left_out and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _trainer(
    model: CausalLM,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: Training,
    recipe: Recipe,
    kept: Checkpoints,
    seed: int,
    on_log: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    on_gpu = next(model.parameters()).is_cuda
    arguments = SFTConfig(
        output_dir=str(kept.folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_steps=settings.save_steps,
        save_total_limit=checkpoints.KEPT,
        bf16=on_gpu,  # TRL turns bfloat16 on by itself, on CPUs too, where it is many times slower
        use_cpu=not on_gpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        report_to="none",
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=on_gpu,
        disable_tqdm=False,
    )
    return routed_trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(tokenizer.pad_token_id, settings.loss_on, settings.pool_over),
        processing_class=tokenizer,
        optimizers=(_optimizer(model, settings), None),
        settings=settings,
        recipe=recipe,
        kept=kept,
        lengths=[len(row["input_ids"]) for row in rows],
        probes=Probes.of(rows, recipe.probed) if recipe.probed else None,
        on_log=on_log,
    )


def _optimizer(model: CausalLM, settings: Training) -> torch.optim.Optimizer:
    """AdamW over LoRA and router, whichever is trained; the router may have its own rate."""
    router = [p for p in getattr(model, _POLICY).parameters() if p.requires_grad]
    known = {id(parameter) for parameter in router}
    adapter = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    rates = ((router, settings.router_learning_rate or settings.learning_rate), (adapter, settings.learning_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in rates if parameters]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)


def routed_trainer_class() -> type:
    """`SFTTrainer` with the routed loss; built on first use, since importing TRL takes seconds."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from trl import SFTTrainer

    class RoutedTrainer(SFTTrainer):
        """SFT in which a policy says which blocks each example runs through."""

        def __init__(
            self,
            *,
            settings: Training,
            recipe: Recipe,
            kept: Checkpoints,
            lengths: Sequence[int],
            probes: Probes | None = None,
            on_log: Any = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            assert self.optimizer is not None  # it was given one
            divergence.watch(self.optimizer, lambda: self.state.global_step + 1)
            self.settings = settings
            self.recipe = recipe
            self.kept = kept
            self.lengths = lengths
            self.probes = probes
            self.on_log = on_log
            self.policy: Policy = getattr(self.model, _POLICY)
            self.tokens = self.positions = 0
            self._part, self._last_step = 0, -1
            self._since, self._tokens_since = time.perf_counter(), 0

        def _get_train_sampler(self, train_dataset: Any = None) -> batches.LikeLengths:
            update = self.settings.batch_size * self.settings.gradient_accumulation
            return batches.LikeLengths(self.lengths, update, self.args.seed)

        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The study's loss of a routed pass, each example at the depth that the recipe gives it."""
            where = losses.predicting(inputs["labels"])
            with self.accelerator.autocast():
                told = self._told(inputs)[where] if self.settings.loss == "kl" else None
                routing, states = self._routed_pass(inputs, model.training)
                head = _base(self.model).get_output_embeddings()
                if told is None:
                    each = losses.cross_entropies(head, states[where], losses.next_tokens(inputs["labels"]))
                else:
                    each = losses.divergences(head, states[where], told)
            # Examples that are accumulated are averaged over all their tokens, not part by part.
            loss = each.sum() / (max(len(each), 1) if num_items_in_batch is None else num_items_in_batch)
            if self.recipe.penalty is not None and model.training:
                # Accumulated steps add up to one update, so each brings its share.
                loss = loss + self.recipe.penalty(routing) / self.args.gradient_accumulation_steps
            divergence.check_loss(loss, self.state.global_step + 1)
            self._note(routing, inputs)
            return (loss, {"last_hidden_state": states}) if return_outputs else loss

        def _told(self, inputs: dict[str, Tensor]) -> Tensor:
            """Last states (B, S, H) of the teacher, the backbone as it was before training."""
            return losses.untouched(self.model, inputs["input_ids"], inputs["attention_mask"])

        def _routed_pass(self, inputs: dict[str, Tensor], training: bool) -> tuple[Routing, Tensor]:
            """How the examples were routed, and their last states (B, S, H)."""
            routing = Routing(
                self.policy,
                budget=self._budgets(len(inputs["input_ids"])),
                form=self.settings.routing,
                kv=self.settings.kv,
                context_mask=inputs["context_mask"],
                read_mask=inputs.get("read_mask"),
                gradient=training and self.recipe.trains_policy,
            )
            base = _base(self.model)
            with routed(base, routing):
                output = base.get_decoder()(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
                )
            return routing, output.last_hidden_state

        def _budgets(self, batch: int) -> list[float] | None:
            step = self.state.global_step
            self._part = self._part + 1 if step == self._last_step else 0
            self._last_step = step
            return self.recipe.budgets(batch, self.args.seed, step, self._part)

        @torch.no_grad()
        def _note(self, routing: Routing, inputs: dict[str, Tensor]) -> None:
            """Collect what the next log line averages."""
            metrics = self._metrics["train"]
            metrics["executed_fraction"].append(routing.trace.frequency().mean().item())
            assert routing.state is not None
            for name, value in self.policy.diagnostics(routing.state.policy_state).items():
                metrics[name].append(value)
            tokens = int(inputs["attention_mask"].sum())
            self.tokens += tokens
            self.positions += inputs["attention_mask"].numel()
            self._tokens_since += tokens

        def look(self) -> dict[str, float]:
            """What the router does with the probes at this moment; nothing where there are none."""
            if self.probes is None:
                return {}
            with self.accelerator.autocast():
                return self.probes.look(_base(self.model), self.policy)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """Add tokens/s and what the router does, and hand the line on."""
            if "loss" in logs:
                logs.update({f"probe_{name}": value for name, value in self.look().items()})
                now = time.perf_counter()
                logs["tok_s"] = round(self._tokens_since / max(now - self._since, 1e-9), 1)
                self._since, self._tokens_since = now, 0
            super().log(logs, *args, **kwargs)
            if self.on_log is not None and "loss" in logs and math.isfinite(logs["loss"]):
                self.on_log(self.state.global_step, _curve_point({**logs, "step": self.state.global_step}))

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            """A checkpoint holds the adapter and the router, not the backbone."""
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            model: CausalLM = self.model
            if hasattr(model, "peft_config"):
                model.save_pretrained(str(folder))
            state = {name: value.contiguous() for name, value in self.policy.state_dict().items()}
            counted = {"tokens": str(self.tokens), "positions": str(self.positions)}
            save_file(state, folder / ROUTER_STATE, metadata=counted)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """Sealed when all its files are written: one without a seal was cut off."""
            super()._save_checkpoint(*args, **kwargs)
            self.kept.seal(self.kept.folder / f"checkpoint-{self.state.global_step}")

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None: checkpoints are not published."""

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Adapter and router from the checkpoint."""
            if hasattr(self.model, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            path = Path(resume_from_checkpoint) / ROUTER_STATE
            self.policy.load_state_dict(load_file(path))
            with safe_open(path, "pt") as stored:
                self.tokens, self.positions = (int(stored.metadata()[name]) for name in ("tokens", "positions"))

    return RoutedTrainer
