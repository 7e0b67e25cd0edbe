"""Stage 1: the Decision Module and LoRA, trained together by next-token cross-entropy (paper sec. 4.2.3, 5.1, C.3).

TRL's `SFTTrainer` owns the loop (batches, optimiser steps, schedule, checkpoints, logs); one method of it is replaced,
the loss, because its own replaces the backbone's forward pass and a routed pass would be dropped without a word.
Every example of a batch draws its own depth, uniformly from the deepest pruning of the study to full depth, so that
every block keeps being trained and one model serves every budget.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from buddy.policies.buddy import BuddyPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.types import CausalLM
from buddy.settings import Training
from buddy.training.examples import IGNORED, Collator, encode

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
ROUTER_STATE = "router.safetensors"


def next_token_loss(logits: Tensor, labels: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of each labelled token given what precedes it, nats.

    Args:
        logits: (B, S, V).
        labels: (B, S), ``IGNORED`` where a token does not count.
        count: what the sum is divided by (tokens of an accumulated batch); the labelled tokens here by default.
    """
    targets = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    return total / count


def draw_depths(batch: int, shallowest: int, blocks: int, seed: int, step: int, part: int) -> list[int]:
    """Executed blocks of each example, uniform over ``shallowest .. blocks``.

    A pure function of seed, step and part of the step, so a resumed training draws what an uninterrupted one would.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + part)
    return torch.randint(shallowest, blocks + 1, (batch,), generator=generator).tolist()


@dataclass
class Trained:
    """Outcome of a training: the adapted model (None without LoRA), the log, tokens seen and seconds taken."""

    adapted: Any
    curve: list[dict[str, float]]
    steps: int
    tokens: int
    trainable: int


def train(
    backbone: CausalLM,
    tokenizer: Any,
    policy: BuddyPolicy,
    pairs: Sequence[tuple[str, str]],
    settings: Training,
    most_removed: int,
    folder: Path,
    seed: int = 0,
    on_log: Any = None,
) -> Trained:
    """Train router and LoRA on one device; goes on from the last checkpoint below ``folder`` if there is one.

    Args:
        backbone: frozen causal language model on its device.
        tokenizer: its tokenizer.
        policy: BUDDY's policy, trained in place (float32).
        pairs: prompts and responses.
        settings: the section `training` of the study.
        most_removed: deepest pruning of the study; depths are drawn from there to full depth.
        folder: where checkpoints are kept while it runs.
        seed: of LoRA's start, the order of examples and the depths.
        on_log: called with (step, values) at every log line.
    """
    from transformers import set_seed

    set_seed(seed)
    rows = encode(tokenizer, pairs, settings.max_length)
    if len(rows) < len(pairs):
        logger.warning(
            "%d of %d examples have prompts over %d tokens and were left out",
            len(pairs) - len(rows),
            len(pairs),
            settings.max_length,
        )
    model, adapted = _with_lora(backbone, settings)
    model.add_module(_POLICY, policy.to(backbone.device))
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()
    try:
        trainer = _trainer(model, tokenizer, rows, settings, most_removed, folder, seed, on_log)
        checkpoint = _last_checkpoint(folder / CHECKPOINTS)
        if checkpoint:
            logger.info("resuming from %s", checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        delattr(model, _POLICY)
    curve = [_curve_point(entry) for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) + sum(
        p.numel() for p in policy.parameters()
    )
    return Trained(adapted, curve, trainer.state.global_step, trainer.tokens, trainable)


_POLICY = "depth_policy"  # the router's name inside the trained model while training lasts


def _with_lora(backbone: CausalLM, settings: Training) -> tuple[CausalLM, Any]:
    """The model to train, and the same as a PeftModel (None without LoRA)."""
    backbone.requires_grad_(False)
    if settings.lora_rank == 0:
        return backbone, None
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(backbone, lora)
    return adapted, adapted


def _base(model: CausalLM) -> CausalLM:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; one cut off while it was written has no trainer state and is passed over."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if complete else None


def _curve_point(entry: dict[str, Any]) -> dict[str, float]:
    names = ("step", "loss", "executed_fraction", "score_entropy", "tok_s", "learning_rate", "grad_norm")
    return {name: float(entry[name]) for name in names if name in entry}


def _trainer(
    model: CausalLM,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    settings: Training,
    most_removed: int,
    folder: Path,
    seed: int,
    on_log: Any,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig

    on_gpu = next(model.parameters()).is_cuda
    arguments = SFTConfig(
        output_dir=str(folder / CHECKPOINTS),
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
        save_total_limit=1,
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
    return router_trainer_class()(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator(tokenizer.pad_token_id, settings.loss_on, settings.pool_over),
        processing_class=tokenizer,
        optimizers=(_optimizer(model, settings), None),
        settings=settings,
        most_removed=most_removed,
        on_log=on_log,
    )


def _optimizer(model: CausalLM, settings: Training) -> torch.optim.Optimizer:
    """AdamW over LoRA and router; the router may have its own rate."""
    router = list(getattr(model, _POLICY).parameters())
    known = {id(parameter) for parameter in router}
    adapter = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": router, "lr": settings.router_learning_rate or settings.learning_rate}]
    if adapter:
        groups.append({"params": adapter, "lr": settings.learning_rate})
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)


def router_trainer_class() -> type:
    """`SFTTrainer` with the routed loss; built on first use, since importing TRL takes seconds."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from trl import SFTTrainer

    class RouterTrainer(SFTTrainer):
        """SFT in which every example runs at its own depth."""

        def __init__(self, *, settings: Training, most_removed: int, on_log: Any = None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.settings = settings
            self.on_log = on_log
            self.policy: BuddyPolicy = getattr(self.model, _POLICY)
            self.shallowest = self.policy.blocks - most_removed
            self.tokens = 0
            self._part, self._last_step = 0, -1
            self._since, self._tokens_since = time.perf_counter(), 0

        def compute_loss(
            self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Cross-entropy of a routed pass, each example at a depth of its own."""
            depths = self._depths(len(inputs["input_ids"]))
            routing = Routing(
                self.policy,
                budget=[depth / self.policy.blocks for depth in depths],
                form=self.settings.routing,
                kv=self.settings.kv,
                context_mask=inputs["context_mask"],
                gradient=model.training,
            )
            with routed(_base(self.model), routing):
                outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            loss = next_token_loss(outputs.logits, inputs["labels"], num_items_in_batch)
            self._note(routing, inputs)
            return (loss, outputs) if return_outputs else loss

        def _depths(self, batch: int) -> list[int]:
            step = self.state.global_step
            self._part = self._part + 1 if step == self._last_step else 0
            self._last_step = step
            return draw_depths(batch, self.shallowest, self.policy.blocks, self.args.seed, step, self._part)

        @torch.no_grad()
        def _note(self, routing: Routing, inputs: dict[str, Tensor]) -> None:
            """Collect what the next log line averages."""
            metrics = self._metrics["train"]
            metrics["executed_fraction"].append(routing.trace.frequency().mean().item())
            assert routing.state is not None
            scores = self.policy.scores(routing.state.policy_state)
            metrics["score_entropy"].append(torch.distributions.Categorical(logits=scores).entropy().mean().item())
            tokens = int(inputs["attention_mask"].sum())
            self.tokens += tokens
            self._tokens_since += tokens

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """Add tokens/s, and hand the line on."""
            if "loss" in logs:
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
            save_file(state, folder / ROUTER_STATE, metadata={"tokens": str(self.tokens)})

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """None: checkpoints are not published."""

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            """Adapter and router from the checkpoint."""
            if hasattr(self.model, "peft_config"):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            path = Path(resume_from_checkpoint) / ROUTER_STATE
            self.policy.load_state_dict(load_file(path))
            with safe_open(path, "pt") as stored:
                self.tokens = int(stored.metadata()["tokens"])

    return RouterTrainer
