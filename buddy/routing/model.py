"""The routed model: a Hugging Face backbone, a policy, and one way to run them together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from buddy.errors import UserError, choices
from buddy.routing import inputs, options
from buddy.routing.budget import Budget
from buddy.routing.engine import Routing, check_supported, routed
from buddy.routing.graphs import decoders
from buddy.routing.kv import RoutedCache
from buddy.routing.options import Options
from buddy.routing.policy import Policy
from buddy.routing.shared import Sharing
from buddy.routing.trace import Trace
from buddy.routing.types import CausalLM
from buddy.settings import ENGINES, KV_POLICIES, ROUTING_FORMS

log = logging.getLogger(__name__)

DEFAULT_TOKENS = 20
"""New tokens of a generation for which nothing says it, as Hugging Face has it."""

GRAPH_TOKENS = 32
"""New tokens from which on capturing graphs is worth the while, as engine ``auto`` has it."""


AHEAD = {"eager": 64, "graph": 1024}
"""Tokens that a generation has room for from the start, if it may come to as many: ``max_new_tokens`` is often a mere
limit, and most answers are short. Growing costs a copy, and with graphs capturing again."""


class RoutedModel(nn.Module):
    """A backbone whose blocks are chosen by a policy, within a budget.

    The backbone is an ordinary ``...ForCausalLM``: its class, parameter names and state dict are Hugging Face's, and
    outside a call of this model it behaves as if nothing had been added.

    Args:
        backbone: causal language model (Llama, Qwen2 or Qwen3 architecture).
        policy: chooses the blocks.
        kv: what stands for the K/V of a skipped block: ``zero``, ``mask`` or ``project``.
        tokenizer: the backbone's, for convenience.
        origin: the run it was loaded from (`buddy.runs.Origin`), which `save` copies.

    Attributes:
        trace: routes of the last call of `forward` or `generate`.

    Example:
        >>> model = buddy.load("results/demo/runs/...")
        >>> inputs = model.tokenizer("The capital of France is", return_tensors="pt")
        >>> model.generate(**inputs, budget=0.75, max_new_tokens=16)
        >>> model.trace.paths()
    """

    def __init__(
        self, backbone: CausalLM, policy: Policy, kv: str = "zero", tokenizer: Any = None, origin: Any = None
    ) -> None:
        super().__init__()
        check_supported(backbone)
        if kv not in KV_POLICIES:
            raise UserError(f"kv: {kv!r} is not one of {choices(KV_POLICIES)}")
        if policy.blocks != backbone.config.num_hidden_layers:
            raise UserError(f"policy for {policy.blocks} blocks, backbone has {backbone.config.num_hidden_layers}")
        self.backbone: CausalLM = backbone
        self.policy = policy
        self.kv = kv
        self.tokenizer = tokenizer
        self.origin = origin
        self.trace = Trace()

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone."""
        return self.backbone.dtype

    @property
    def blocks(self) -> int:
        """Number of blocks L."""
        return self.policy.blocks

    def save(self, folder: str | Path) -> Path:
        """Write the run this model was loaded from to another folder, with the router as it is now.

        Args:
            folder: where; the backbone is referred to, not copied.

        Raises:
            UserError: the model was not loaded from a run.
        """
        if self.origin is None:
            raise UserError("save: this model was not loaded from a run; `buddy.runs.save` writes one from its parts")
        return self.origin.save(folder, self.policy)

    def new_cache(
        self, capacity: int = 64, engine: str = "eager", batch: int = 1, limit: int | None = None
    ) -> RoutedCache:
        """An empty cache for this model.

        Args:
            capacity: tokens it has room for before it grows.
            engine: ``eager``; ``graph``, whose decode steps are captured CUDA graphs; or ``auto``, which takes graphs where
                they are possible. What keeps graphs from being used is logged.
            batch: number of sequences B, which graphs have to know.
            limit: tokens it may come to: given that, it has room for some more than ``capacity`` (`AHEAD`), and grows no
                further than this before it must.
        """
        if engine not in ("auto", *ENGINES):
            raise UserError(f"engine: {engine!r} is not one of {choices(('auto', *ENGINES))}")
        reason = None if engine == "eager" else decoders.obstacle(self)
        graphs = engine != "eager" and reason is None
        if limit is not None:
            capacity = min(capacity + AHEAD["graph" if graphs else "eager"], limit)
        if graphs:
            return decoders.lease(self, capacity, batch)
        if reason is not None:
            log.log(logging.WARNING if engine == "graph" else logging.INFO, "no CUDA graphs: %s", reason)
        return RoutedCache(self.blocks, self.kv, capacity, limit or 0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        budget: Budget | None = None,
        decode: str | int = "recompute",
        slack: int | None = None,
        routing: str = "sequence",
        context_mask: Tensor | None = None,
        past_key_values: RoutedCache | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: (B, S) new tokens; or ``inputs_embeds`` (B, S, H).
            attention_mask: (B, past + S), 1 for real tokens.
            budget: fraction of blocks, one or one per sequence; None lets the policy choose (the budget predictor), and
                so do ``auto`` and, at a price in [0, 1], ``auto:0.3``. A cache keeps the budget it was started with.
            decode: ``recompute`` chooses a new path at every step, ``reuse`` keeps the prefill's, an integer n chooses at
                every n-th step.
            slack: as in `generate`; a cache keeps that, too, as it was started with.
            routing: ``sequence``: the tokens of this pass share their sequence's route. ``causal``: each token has the
                route that decoding would give it, so one pass has the logits of as many decode steps.
            context_mask: (B, S), True where the policy may read; by default all real tokens. With ``causal`` it marks the
                prompt, which shares a route; by default that is the first token.
            past_key_values: cache of an earlier call.
            use_cache: return a cache to go on from.
            kwargs: arguments of the backbone's forward pass (``labels``, ``logits_to_keep``, ``output_hidden_states`` and
                the like); `buddy.routing.options` says of each what becomes of it.

        Returns:
            Logits (B, S, V), and the cache if asked for. Routes are in `trace`.

        Raises:
            BudgetError: an illegal budget.
            UserError: inputs or arguments that cannot be honoured, before anything is computed.
        """
        options.check_pass(kwargs, self.config)
        if routing not in ROUTING_FORMS:
            raise UserError(f"routing: {routing!r} is not one of {choices(ROUTING_FORMS)}")
        embeddings = kwargs.get("inputs_embeds")
        if (input_ids is None) == (embeddings is None):
            raise UserError("forward: give either input_ids or inputs_embeds")
        batch, new = inputs.check_tokens(self.backbone, self.policy, input_ids, embeddings, attention_mask)
        past = inputs.check_cache(past_key_values, self.blocks, batch, budget)
        inputs.check_mask(attention_mask, batch, past, new)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache(2 * new)
        call = Routing(self.policy, budget, _every(decode), routing, self.kv, context_mask, slack=slack)
        self.trace = call.trace
        with routed(self.backbone, call):
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **kwargs,
            )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        budget: Budget | None = None,
        decode: str | int = "recompute",
        slack: int | None = None,
        engine: str = "auto",
        past_key_values: RoutedCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate with the backbone's own ``generate``, so that sampling, stopping and streaming are as usual.

        Args:
            input_ids: (B, S) prompts, padded left.
            attention_mask: (B, S), 1 for real tokens; as with Hugging Face it is inferred from padding where none is
                given.
            budget: fraction of blocks, one or one per sequence; None asks the policy (the budget predictor, once per
                sequence, at the prompt), and so do ``auto`` and, at a price in [0, 1], ``auto:0.3``.
            decode: ``recompute``, ``reuse`` or an integer, as in `forward`.
            slack: how many different blocks a step of a batch may call beyond those that its deepest sequence runs: 0 is
                one set for all, of which smaller budgets run a part; None, the default, leaves sequences independent. It
                buys speed, since a step reads every block that is called; a sequence runs as many blocks as ever.
            engine: ``eager``; ``graph``, which decodes by captured CUDA graphs; ``auto``, which takes graphs on a GPU if
                the generation is long enough to pay for their capture. What keeps graphs from being used is logged. A
                cache that is given goes on with its own.
            past_key_values: cache of an earlier turn, as ``return_dict_in_generate=True`` returns it. ``input_ids`` are
                then the whole conversation, or what is new of it under a mask of the whole. Scores, budget and steps go
                on where they stopped, so that a turn is routed as one pass over everything would be.
            kwargs: arguments of ``GenerationMixin.generate``; `buddy.routing.options` says of each, and of every field of
                ``GenerationConfig``, whether it is honoured, translated or refused.

        Returns:
            (B, S + new) tokens, or what ``return_dict_in_generate`` asks for. `trace` holds a route per step.

        Raises:
            BudgetError: an illegal budget.
            UserError: inputs or options that cannot be honoured, or an engine that does not exist; in all cases before
                anything is computed.
        """
        asked = Options(kwargs, self.backbone)
        if input_ids is not None and kwargs.get("inputs") is not None:
            raise UserError("generate: give either input_ids or inputs")
        input_ids = kwargs.get("inputs") if input_ids is None else input_ids
        embeddings = kwargs.get("inputs_embeds")
        batch, tokens = inputs.check_tokens(self.backbone, self.policy, input_ids, embeddings, attention_mask)
        inputs.check_vocabulary(self.backbone, input_ids)
        copies = asked["num_return_sequences"] or 1
        past = inputs.check_cache(past_key_values, self.blocks, batch * copies, budget)
        if past and embeddings is not None:
            raise UserError(
                "generate: inputs_embeds start a conversation; give input_ids to go on from past_key_values"
            )
        fresh = inputs.new_tokens(past, tokens, attention_mask)
        inputs.check_mask(attention_mask, batch, past, fresh)
        if budget is not None or (self.policy.source_block and not past):
            self.policy.begin(budget, batch, torch.device("cpu"))
        Sharing.of(slack, self.policy, budget, batch)
        routing = Routing(self.policy, budget, _every(decode), slack=slack)
        self.trace = routing.trace
        if past_key_values is None:
            past_key_values = self._cache_for(tokens, self._expected(tokens, asked), batch * copies, engine)
        try:
            with routed(self.backbone, routing):
                output = self.backbone.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    **asked.translated(self.tokenizer),
                )
        except (ValueError, TypeError) as error:
            if routing.state is not None or isinstance(error, UserError):
                raise
            raise UserError(f"generate: {' '.join(str(error).split())}") from error  # its own checks of the options
        if asked["use_cache"] is False and not isinstance(output, Tensor):
            output.past_key_values = None
        return output

    def _cache_for(self, prompt: int, new: int, batch: int, engine: str) -> RoutedCache:
        """A cache for a generation of this many new tokens."""
        if engine == "auto" and new < GRAPH_TOKENS:
            engine = "eager"
        return self.new_cache(prompt, engine, batch, limit=prompt + new)

    def _expected(self, prompt: int, asked: Options) -> int:
        """New tokens there has to be room for."""
        most = asked["max_new_tokens"] or (asked["max_length"] or prompt + DEFAULT_TOKENS) - prompt
        return most if isinstance(most, int) and most > 0 else DEFAULT_TOKENS


def _every(decode: str | int) -> int:
    """Steps between choices of a path: ``recompute`` 1, ``reuse`` 0 (never again), or the number given."""
    if decode == "recompute":
        return 1
    if decode == "reuse":
        return 0
    if isinstance(decode, int) and not isinstance(decode, bool) and decode >= 1:
        return decode
    raise UserError(f"decode: {decode!r} is not recompute, reuse or a number of steps of at least 1")
