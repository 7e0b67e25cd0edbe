"""PuDDing (Wee, Park and Lee, ICML 2025, arXiv 2502.04348): one of several omission sets for each prompt.

A router reads the prompt and predicts, for every omission set of a pool (`buddy.baselines.pudding`), the loss that the
backbone would have without its blocks: minus the mean log-likelihood of the right answer's tokens. The set with the
lowest prediction is left out, from the prefill to the last token that is decoded.

The paper's router is BERT-base with one output per set. Here it is any Hugging Face encoder, or, where none can be had,
a small network on the mean keys and values of the backbone's first block. Either way it reads what inference has seen:
the prompt. (The public code trains its router on questions with an answer behind them, each of the choices in turn.)

LoRA, where it is trained, is one adapter for all sets, and each training example goes by the set that the router picks.
The public code has an adapter per set; those could not be merged into the weights, and would cost memory times the size
of the pool. A router on the backbone's own states sees them as the adapter of the first block leaves them, though it was
fitted before; one that reads text does not depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from buddy.errors import BudgetError, UserError
from buddy.policies.decision import RunningMean
from buddy.routing.budget import Budget, executed_per_sequence
from buddy.routing.policy import Policy

BACKBONE = "backbone"
"""The encoder that is no model of its own: keys and values of the backbone's first block."""

Truth = Callable[[list[list[int]]], Tensor]
"""Called with the token ids of B prompts: the loss of every set, (B, sets)."""


@dataclass
class PuddingState:
    """What PuDDing remembers of a batch.

    Attributes:
        full: (B, 1) boolean, sequences at full depth, for which nothing is chosen.
        route: (B, L) boolean, the route once it is chosen.
        pooled: running mean of the prompt's keys and values (not where text is read).
        losses: (B, sets) float32, predicted loss of each set.
        decided: whether the route is chosen; from then on nothing is read.
    """

    full: Tensor
    route: Tensor
    pooled: RunningMean
    losses: Tensor
    decided: bool = False


class PuddingPolicy(Policy):
    """Leaves out the set of blocks with the lowest predicted loss; chosen once per prompt.

    Args:
        blocks: number of blocks L.
        sets: omission sets, each n different blocks (from 0) without the first and the last.
        encoder: ``backbone``, or folder or Hub name of a Hugging Face encoder. Weights and tokenizer of an encoder
            become part of the policy's state, so that a run does not depend on where they came from.
        width: KV heads x head size of the backbone (``backbone`` only).
        hidden: hidden width of the network on keys and values (``backbone`` only).
        encoder_config: configuration of a saved policy's encoder, whose weights come from its state dict; None fetches
            both from ``encoder``.
        tokenizer: the backbone's, to turn tokens into text for an encoder; a saved policy has it in its state dict.

    Attributes:
        loss_mean, loss_scale: (sets,) and (), by which predictions are standardised (from `buddy.training.pudding`).

    Raises:
        UserError: sets that are no sets of equally many middle blocks, or an encoder that cannot be read.
    """

    capturable = True
    loss_mean: Tensor
    loss_scale: Tensor
    options: Tensor

    def __init__(
        self,
        blocks: int,
        sets: Sequence[Sequence[int]],
        encoder: str = BACKBONE,
        width: int = 0,
        hidden: int = 64,
        encoder_config: dict[str, Any] | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.sets = [sorted(int(block) for block in found) for found in sets]
        self.removed = _size(self.sets, blocks)
        self.encoder, self.width, self.hidden = encoder, width, hidden
        self.truth: Truth | None = None
        self.reads_tokens = encoder != BACKBONE
        self.source_block = 0 if self.reads_tokens else 1
        self.predictor: StateReader | TextReader
        if self.reads_tokens:
            self.predictor = TextReader(encoder, len(self.sets), encoder_config, tokenizer)
        else:
            self.predictor = StateReader(2 * width, hidden, len(self.sets))
        options = torch.ones(len(self.sets), blocks, dtype=torch.bool)
        for row, found in zip(options, self.sets, strict=True):
            row[found] = False
        self.register_buffer("options", options, persistent=False)
        self.register_buffer("loss_mean", torch.zeros(len(self.sets)))
        self.register_buffer("loss_scale", torch.ones(()))
        self.eval()

    @property
    def always(self) -> int:
        """Every set leaves as many blocks."""
        return self.blocks - self.removed

    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again; what was learnt or read comes from its state dict."""
        settings: dict[str, Any] = {"blocks": self.blocks, "sets": self.sets, "encoder": self.encoder}
        if isinstance(self.predictor, TextReader):
            return settings | {"encoder_config": self.predictor.config}
        return settings | {"width": self.width, "hidden": self.hidden}

    def train(self, mode: bool = True) -> PuddingPolicy:
        """Always in evaluation mode: while LoRA is trained, the router chooses as it will at inference."""
        return super().train(False)

    def replace_predictor(self, truth: Truth) -> None:
        """Choose by the true losses of a prompt's tokens instead of predictions."""
        self.truth = truth
        self.reads_tokens = True

    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> PuddingState:
        """Nothing read, nothing chosen. Legal budgets are that of the sets, which is also None, and 1."""
        if budget is None:
            budget = self.always / self.blocks
        try:
            executed = executed_per_sequence(budget, batch, self.blocks, 1, "cpu").tolist()
            wrong = [count for count in executed if count not in (self.always, self.blocks)]
            reason = (
                f"budget: {wrong[0] / self.blocks:.4g} would run {wrong[0]} of {self.blocks} blocks" if wrong else ""
            )
        except BudgetError as error:
            reason = str(error).split(";")[0]
        if reason:
            raise BudgetError(
                f"{reason}; these omission sets have {self.removed} blocks: the legal budgets are "
                f"{self.always / self.blocks:.4g} ({self.always} blocks) and 1 ({self.blocks} blocks)"
            )
        return PuddingState(
            full=torch.tensor([[count == self.blocks] for count in executed], device=device),
            route=torch.ones(batch, self.blocks, dtype=torch.bool, device=device),
            pooled=RunningMean.empty(batch, 2 * self.width, device),
            losses=torch.zeros(batch, len(self.sets), device=device),
        )

    @torch.no_grad()
    def observe(self, state: PuddingState, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Add the prompt's keys and values to their mean; nothing once the route is chosen."""
        if not state.decided and self.source_block:
            states = torch.cat([keys, values], dim=1).transpose(1, 2).flatten(2)
            state.pooled.add(states.float(), mask)

    @torch.no_grad()
    def read(self, state: PuddingState, input_ids: Tensor, mask: Tensor | None) -> None:
        """Predict from the prompt's tokens (B, S), those under ``mask``."""
        ids = input_ids.tolist()
        if mask is not None:
            ids = [
                [token for token, seen in zip(*row, strict=True) if seen]
                for row in zip(ids, mask.tolist(), strict=True)
            ]
        if self.truth is not None:
            state.losses.copy_(self.truth(ids))
        elif isinstance(self.predictor, TextReader):
            state.losses.copy_(self.predict(self.predictor.text(ids)))

    def predict(self, inputs: Any) -> Tensor:
        """Predicted loss of every set, (B, sets) float32, nats per token.

        Args:
            inputs: for ``backbone`` the mean keys and values of the prompts, (B, 2 * width); otherwise B texts.
        """
        with _outside_autocast(self.loss_mean.device.type):
            return self.loss_mean + self.loss_scale * self.predictor(inputs)

    @torch.no_grad()
    def decide(self, state: PuddingState) -> Tensor:
        """The set with the lowest predicted loss, of equals the first; later calls give the same route again."""
        if not state.decided:
            if not self.reads_tokens:
                state.losses.copy_(self.predict(state.pooled.mean()))
            state.route.copy_(self.options[state.losses.argmin(1)] | state.full)
            state.decided = True
        return state.route

    def decide_each(self, state: PuddingState, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """The prompt's route for every token."""
        self.observe(state, keys, values, mask & prompt)
        return self.decide(state).unsqueeze(1).expand(-1, mask.shape[1], -1)


class StateReader(nn.Module):
    """Mean keys and values of a prompt to standardised losses: standardise, Linear, SiLU, Linear.

    Args:
        width: of the states, keys and values together.
        hidden: hidden width.
        sets: number of outputs.

    Attributes:
        mean, scale: (width,), by which states are standardised (from `buddy.training.pudding`).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, hidden: int, sets: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, sets)
        nn.init.zeros_(self.outer.weight)  # untrained, every prompt gets the set that is best on average
        nn.init.zeros_(self.outer.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        """States (B, width) of any float dtype to (B, sets) float32."""
        standard = (states.float() - self.mean) / self.scale
        return self.outer(nn.functional.silu(self.inner(standard)))


class TextReader(nn.Module):
    """A Hugging Face encoder's state of the first token, and one linear output per omission set.

    The state goes through the encoder's own pooler where it has one, and dropout in training, as in the classifiers that
    transformers builds on BERT. Texts that are too long lose their end.

    Args:
        source: folder or Hub name.
        sets: number of outputs.
        config: configuration to build the encoder from without weights; None reads weights too.
        tokenizer: the backbone's tokenizer; None where a state dict brings it.

    Raises:
        UserError: no encoder there, or a tokenizer that cannot be kept in a state dict.
    """

    def __init__(self, source: str, sets: int, config: dict[str, Any] | None, tokenizer: Any) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        self._texts: Any = None
        self._words: Any = None
        if config is None:
            self.model = _read(source, AutoModel.from_pretrained, dtype=torch.float32, use_safetensors=True)
        else:
            self.model = AutoModel.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
        self.config: dict[str, Any] = json.loads(self.model.config.to_json_string(use_diff=True))
        if tokenizer is not None:
            self._texts = _backend(tokenizer, "the backbone")
            words = _read(source, AutoTokenizer.from_pretrained)
            self._words = _backend(words, source)
            longest = getattr(self.model.config, "max_position_embeddings", 512)
            self._words.enable_truncation(min(longest, words.model_max_length))
            pad = self.model.config.pad_token_id or 0
            self._words.enable_padding(pad_id=pad, pad_token=self._words.id_to_token(pad))
        size = self.model.config.hidden_size
        self.dropout = nn.Dropout(getattr(self.model.config, "hidden_dropout_prob", 0.1))
        self.head = nn.Linear(size, sets)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def text(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The backbone's tokens as text, without its special tokens."""
        return [self._texts.decode(list(row), skip_special_tokens=True) for row in ids]

    def forward(self, texts: Sequence[str]) -> Tensor:
        """B texts to (B, sets) float32."""
        device = self.head.weight.device
        rows = self._words.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows], device=device)
        mask = torch.tensor([row.attention_mask for row in rows], device=device)
        outputs = self.model(input_ids=ids, attention_mask=mask)
        pooled = getattr(outputs, "pooler_output", None)
        return self.head(self.dropout(outputs.last_hidden_state[:, 0] if pooled is None else pooled))

    def get_extra_state(self) -> Tensor:
        """Both tokenizers, as bytes: the state dict alone can read a prompt."""
        if self._texts is None:  # not loaded yet
            return torch.empty(0, dtype=torch.uint8)
        text = json.dumps([self._texts.to_str(), self._words.to_str()])
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take both tokenizers from a state dict."""
        from tokenizers import Tokenizer

        self._texts, self._words = map(Tokenizer.from_str, json.loads(bytes(state.cpu().numpy())))


def _size(sets: Sequence[Sequence[int]], blocks: int) -> int:
    """Blocks per omission set.

    Raises:
        UserError: there are no sets, they differ in size, or one has a block that always runs.
    """
    sizes = {len(found) for found in sets}
    if len(sizes) != 1 or sizes == {0}:
        raise UserError(
            f"sets: {len(sets)} omission sets of {sorted(sizes)} blocks; all must have equally many, at least 1"
        )
    for found in sets:
        if len(set(found)) != len(found) or found[0] < 1 or found[-1] > blocks - 2:
            raise UserError(f"sets: {list(found)} must name blocks between 1 and {blocks - 2}, each once")
    return sizes.pop()


def _read(source: str, load: Callable[..., Any], **arguments: Any) -> Any:
    """What transformers finds at a folder or on the Hub.

    Raises:
        UserError: nothing that it can read.
    """
    try:
        return load(source, trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"encoder: {source!r} is neither {BACKBONE} nor the folder or Hub name of an encoder ({reason})"
        ) from None


def _backend(tokenizer: Any, whose: str) -> Any:
    """A copy of the tokenizer's fast backend, which can be written as text.

    Raises:
        UserError: it has none.
    """
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UserError(
            f"encoder: the tokenizer of {whose} has no fast form (tokenizer.json), which a router by text needs"
        )
    return Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


def _outside_autocast(device: str) -> AbstractContextManager[Any]:
    """Predictions are made in float32, in training as at inference."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
