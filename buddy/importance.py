"""How important each block is: one definition for priors, peers and figures.

Every indicator is measured on windows of a calibration corpus and kept per window, so that averages, box plots and
orders of removal come from the same numbers. Larger always means more important.

- ``delta_ppl``: perplexity without the block minus perplexity of the full model (paper appendix B; Shortened LLaMA).
- ``taylor``: first-order Taylor, the sum over the block's weights of |weight * gradient of the loss|.
- ``cosine``: 1 - cos between the final representation (normed, mean over tokens) with and without the block.
- ``block_influence``: 1 - cos between the block's input and output, mean over tokens (ShortGPT).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm import tqdm

from buddy.errors import UserError, unknown
from buddy.routing.stack import Stack
from buddy.routing.types import Block, CausalLM


def windows(tokenizer: Any, text: str, samples: int, length: int) -> Tensor:
    """The first ``samples`` non-overlapping windows of ``length`` tokens of a corpus.

    The corpus is tokenised once, without special tokens.

    Returns:
        (samples, length) int64.

    Raises:
        UserError: the corpus is too short; says how many windows it holds.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    whole = len(ids) // length
    if whole < samples:
        raise UserError(
            f"samples: {samples} windows of {length} tokens asked for, the corpus holds {whole} ({len(ids)} tokens)"
        )
    return ids[: samples * length].view(samples, length)


def window_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token negative log-likelihood of each window, nats: logits (B, S, V), ids (B, S) to (B,)."""
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(-1)


@dataclass(frozen=True)
class Importance:
    """Importance of the blocks: ``values`` (L,) over the corpus, ``per_window`` (N, L); float64 on the CPU."""

    values: Tensor
    per_window: Tensor


@torch.no_grad()
def _without_each_block(backbone: CausalLM, ids: Tensor, measure: Callable[[Stack, Tensor], Tensor]) -> list[Tensor]:
    """``measure`` on the full model's last states, then without block 0, 1, ...; the shared prefix runs once."""
    stack = Stack(backbone, ids)
    states = stack.inputs()
    measured = [measure(stack, states[-1])]
    for block in range(len(stack)):
        measured.append(measure(stack, stack.run(states[block], range(block + 1, len(stack)))))
    return measured


def removal_nll(backbone: CausalLM, ids: Tensor) -> Tensor:
    """Negative log-likelihood of the full model, then without each block: ids (B, S) to (B, 1 + L), nats per token."""
    return torch.stack(_without_each_block(backbone, ids, lambda stack, h: window_nll(stack.logits(h), ids)), dim=1)


def cosine(backbone: CausalLM, ids: Tensor) -> Tensor:
    """1 - cos between summary representations with and without each block: ids (B, S) to (B, L)."""
    full, *without = _without_each_block(backbone, ids, lambda stack, h: stack.normed(h).float().mean(1))
    return torch.stack([1 - cosine_similarity(full, other, dim=-1) for other in without], dim=1)


@torch.no_grad()
def block_influence(backbone: CausalLM, ids: Tensor) -> Tensor:
    """1 - cos between each block's input and output, mean over tokens: ids (B, S) to (B, L)."""
    states = [state.float() for state in Stack(backbone, ids).inputs()]
    pairs = pairwise(states)
    return torch.stack([1 - cosine_similarity(before, after, dim=-1).mean(-1) for before, after in pairs], dim=1)


def taylor(backbone: CausalLM, ids: Tensor) -> Tensor:
    """Sum over a block's weights of |weight * gradient| of each window's loss: ids (B, S) to (B, L)."""
    layers = backbone.get_decoder().layers
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    frozen = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    rows = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(id(parameter) in wanted)
        for window in ids.split(1):
            stack = Stack(backbone, window)
            loss = window_nll(stack.logits(stack.run(stack.embedded, range(len(stack)))), window).sum()
            loss.backward()
            rows.append([_weight_times_gradient(layer) for layer in layers])
            backbone.zero_grad(set_to_none=True)
    finally:
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)
    return torch.tensor(rows)


def _weight_times_gradient(layer: Block) -> float:
    products = ((p.detach().float() * p.grad.float()).abs().sum() for p in layer.parameters() if p.grad is not None)
    return float(sum(products))


INDICATORS: dict[str, Callable[[CausalLM, Tensor], Tensor]] = {
    "delta_ppl": removal_nll,
    "taylor": taylor,
    "cosine": cosine,
    "block_influence": block_influence,
}


def estimate(backbone: CausalLM, ids: Tensor, indicator: str, batch_size: int = 1) -> Importance:
    """Importance of every block, over the corpus and in every window.

    Args:
        backbone: causal language model.
        ids: (N, S) windows.
        indicator: one of `INDICATORS`.
        batch_size: windows per pass.

    Raises:
        UserError: an unknown indicator.
    """
    if indicator not in INDICATORS:
        raise unknown("indicator", indicator, INDICATORS)
    parts = []
    with tqdm(total=len(ids), desc=f"importance {indicator}", unit="window") as bar:
        for batch in ids.to(backbone.device).split(batch_size):
            parts.append(INDICATORS[indicator](backbone, batch).double().cpu())
            bar.update(len(batch))
    measured = torch.cat(parts)
    if indicator == "delta_ppl":
        # A corpus's perplexity is exp of its mean NLL, not the mean of its windows' perplexities.
        corpus, window = measured.mean(0).exp(), measured.exp()
        return Importance(corpus[1:] - corpus[0], window[:, 1:] - window[:, :1])
    return Importance(measured.mean(0), measured)
