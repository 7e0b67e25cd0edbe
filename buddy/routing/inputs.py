"""What a routed pass or generation is given, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from buddy.errors import UserError
from buddy.routing.budget import Budget, same_budget
from buddy.routing.kv import RoutedCache
from buddy.routing.policy import Policy
from buddy.routing.types import CausalLM


def check_tokens(
    backbone: CausalLM, policy: Policy, input_ids: Any, inputs_embeds: Any, attention_mask: Any
) -> tuple[int, int]:
    """Refuse inputs of the wrong kind or shape.

    Args:
        backbone: says how wide embeddings are.
        policy: says whether it has to read tokens.
        input_ids: (B, S) integers, or None.
        inputs_embeds: (B, S, H), or None.
        attention_mask: two dimensions, or None.

    Returns:
        (B, S) of the inputs; of the embeddings where both are given, and (1, 1) where nothing is.

    Raises:
        UserError: what is wrong, with the shape found and the one that is needed.
    """
    given = [("input_ids", input_ids, 2), ("inputs_embeds", inputs_embeds, 3), ("attention_mask", attention_mask, 2)]
    for name, value, dimensions in given:
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise UserError(f"{name}: a tensor is needed, not {type(value).__name__}")
        if value.dim() != dimensions:
            axes = "(batch, tokens)" if dimensions == 2 else "(batch, tokens, width)"
            raise UserError(f"{name}: shape {tuple(value.shape)}, where routing needs {axes}")
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise UserError(f"input_ids: {input_ids.dtype} values, where token numbers are needed")
    if inputs_embeds is not None:
        width = backbone.config.hidden_size
        if inputs_embeds.shape[-1] != width:
            raise UserError(f"inputs_embeds: width {inputs_embeds.shape[-1]}, the backbone has {width}")
        if policy.reads_tokens:
            raise UserError(f"inputs_embeds: {type(policy).__name__} reads tokens; give input_ids")
    source = input_ids if inputs_embeds is None else inputs_embeds
    if source is None:
        return 1, 1
    batch, tokens = source.shape[:2]
    if batch == 0 or tokens == 0:
        raise UserError(f"input_ids: shape {tuple(source.shape)} holds no token")
    return batch, tokens


def check_vocabulary(backbone: CausalLM, input_ids: Tensor | None) -> None:
    """Refuse tokens that have no embedding; asks the device once.

    Raises:
        UserError: names the token.
    """
    if input_ids is None or input_ids.numel() == 0:
        return
    size = backbone.get_input_embeddings().weight.shape[0]
    least, most = (int(value) for value in torch.aminmax(input_ids))
    if least < 0 or most >= size:
        raise UserError(f"input_ids: token {least if least < 0 else most} is outside the vocabulary of {size}")


def check_cache(cache: Any, blocks: int, batch: int, budget: Budget | None) -> int:
    """Refuse a cache that a call cannot go on from.

    Args:
        cache: what was given as ``past_key_values``; None is none.
        blocks: number of blocks L of the model.
        batch: number of sequences B of the call.
        budget: of the call; None goes on with the cache's.

    Returns:
        Tokens that it holds.

    Raises:
        UserError: not a routed cache, one of another model or batch, or one that was started with another budget.
    """
    if cache is None:
        return 0
    if not isinstance(cache, RoutedCache):
        raise UserError(
            f"past_key_values: a {type(cache).__name__} has no routing state; give a cache that this model made "
            "(`new_cache`, or what `generate` returns with return_dict_in_generate=True)"
        )
    if len(cache.blocks) != blocks:
        raise UserError(f"past_key_values: a cache of {len(cache.blocks)} blocks, the model has {blocks}")
    if cache.batch and cache.batch != batch:
        raise UserError(f"past_key_values: the cache holds {cache.batch} sequences, the call has {batch}")
    state = cache.routing
    if budget is not None and state is not None and not same_budget(budget, state.budget, batch, blocks):
        raise UserError(f"budget: {budget}, but the cache was started with {state.budget}, which it keeps")
    return cache.length


def check_mask(attention_mask: Tensor | None, batch: int, past: int, new: int) -> None:
    """Refuse an attention mask that does not say of every token, past and new, whether it is real.

    Raises:
        UserError: with the shape found and the one that is needed.
    """
    if attention_mask is not None and attention_mask.shape != (batch, past + new):
        raise UserError(f"attention_mask: shape {tuple(attention_mask.shape)}, where {(batch, past + new)} is needed")


def new_tokens(past: int, tokens: int, attention_mask: Tensor | None) -> int:
    """How many of the tokens given to a generation are new to its cache.

    As with Hugging Face, a second turn gives the whole conversation, or only what is new under a mask of the whole.

    Raises:
        UserError: the tokens are neither.
    """
    if past == 0:
        return tokens
    if attention_mask is not None and attention_mask.shape[1] == past + tokens:
        return tokens
    if tokens <= past:
        raise UserError(
            f"input_ids: {tokens} tokens, but the cache holds {past} already; give the whole conversation, or only the new "
            "tokens with an attention_mask of the whole"
        )
    return tokens - past
