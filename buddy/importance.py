"""How important each block is: one definition for priors, peers and figures.

Every indicator is measured on windows of a calibration corpus and kept per window, so that averages, box plots and
orders of removal come from the same numbers. Larger always means more important.

- ``delta_ppl``: perplexity without the block minus perplexity of the full model (paper appendix B; Shortened LLaMA).
- ``taylor``: what a Taylor expansion of the loss says of setting the block's weights to zero (`TAYLOR`).
- ``cosine``: 1 - cos between the final representation (normed, mean over tokens) with and without the block.
- ``block_influence``: 1 - cos between the block's input and output, mean over tokens (ShortGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm import tqdm

from buddy.errors import UserError, unknown
from buddy.routing.blocks import Stack
from buddy.routing.types import Block, CausalLM


def windows(tokenizer: Any, text: str, samples: int, length: int, seed: int | None = None) -> Tensor:
    """Non-overlapping windows of ``length`` tokens of a corpus: the first ones, or a random choice.

    The corpus is tokenised once, without special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the corpus.
        samples, length: number of windows N, and tokens T of each.
        seed: of a random choice among all windows, in random order; None takes the first ones.

    Returns:
        (samples, length) int64.

    Raises:
        UserError: the corpus is too short, and it says how many windows it holds; or a window is longer than the model's
            context.
    """
    if length > (longest := getattr(tokenizer, "model_max_length", length)):
        raise UserError(f"--length: windows of {length} tokens are longer than the model's context of {longest}")
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    whole = len(ids) // length
    if whole < samples:
        raise UserError(
            f"--samples: {samples} windows of {length} tokens asked for, the corpus holds {whole} ({len(ids)} tokens)"
        )
    cut = ids[: whole * length].view(whole, length)
    if seed is None:
        return cut[:samples]
    return cut[torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:samples]]


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
def _without_each_block(
    backbone: CausalLM,
    ids: Tensor,
    measure: Callable[[Stack, Tensor], Tensor],
    kept: Sequence[int] | None = None,
    candidates: Collection[int] | None = None,
) -> list[Tensor]:
    """``measure`` on the last states of the model, then without each block in turn; the shared prefix runs once.

    Args:
        backbone: causal language model.
        ids: (B, S).
        measure: called with the blocks and the last block's output (B, S, H).
        kept: the model's blocks, in order; all of the backbone's by default.
        candidates: those of them that are left out in turn; each of them by default.
    """
    stack = Stack(backbone, ids)
    kept = range(len(stack)) if kept is None else kept
    states = [stack.embedded]
    for block in kept:
        states.append(stack.run(states[-1], [block]))
    measured = [measure(stack, states[-1])]
    for place, block in enumerate(kept):
        if candidates is None or block in candidates:
            measured.append(measure(stack, stack.run(states[place], kept[place + 1 :])))
    return measured


def removal_nll(
    backbone: CausalLM,
    ids: Tensor,
    kept: Sequence[int] | None = None,
    candidates: Collection[int] | None = None,
) -> Tensor:
    """Negative log-likelihood of the model, then without each block: ids (B, S) to (B, 1 + C), nats per token.

    Args:
        backbone: causal language model.
        ids: (B, S).
        kept: the model's blocks, in order; all of the backbone's by default.
        candidates: the C of them that are left out in turn; each of them by default.
    """

    def nll(stack: Stack, hidden: Tensor) -> Tensor:
        return window_nll(stack.logits(hidden), ids)

    return torch.stack(_without_each_block(backbone, ids, nll, kept, candidates), dim=1)


def removal_ppl(
    backbone: CausalLM,
    ids: Tensor,
    kept: Sequence[int],
    candidates: Collection[int] | None = None,
    batch_size: int = 1,
    bar: Any = None,
) -> tuple[float, dict[int, float]]:
    """Perplexity of a corpus by some of the backbone's blocks, and without each of them in turn.

    Args:
        backbone: causal language model.
        ids: (N, S) windows.
        kept: the model's blocks, in order.
        candidates: those of them that are left out in turn; each of them by default.
        batch_size: windows per pass.
        bar: a progress bar to advance by a step per window; its own by default.
    """
    parts = []
    with nullcontext(bar) if bar is not None else tqdm(total=len(ids), desc="perplexity", unit="window") as shown:
        for batch in ids.split(batch_size):
            parts.append(removal_nll(backbone, batch, kept, candidates).double().cpu())
            shown.update(len(batch))
    full, *without = torch.cat(parts).mean(0).exp().tolist()
    left_out = [block for block in kept if candidates is None or block in candidates]
    return full, dict(zip(left_out, without, strict=True))


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
    rows = []
    with _differentiable(backbone, layers):
        for window in ids.split(1):
            _backward(backbone, window)
            rows.append([_weight_times_gradient(layer) for layer in layers])
            backbone.zero_grad(set_to_none=True)
    return torch.tensor(rows)


def _weight_times_gradient(layer: Block) -> float:
    products = ((p.detach().float() * p.grad.float()).abs().sum() for p in layer.parameters() if p.grad is not None)
    return float(sum(products))


@contextmanager
def _differentiable(backbone: CausalLM, layers: Sequence[Block]) -> Iterator[None]:
    """Gradients for the weights of the blocks and for nothing else; all is as before afterwards."""
    wanted = {id(parameter) for layer in layers for parameter in layer.parameters()}
    frozen = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    try:
        for parameter in frozen:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        backbone.zero_grad(set_to_none=True)
        for parameter, flag in frozen.items():
            parameter.requires_grad_(flag)


def _backward(backbone: CausalLM, window: Tensor) -> None:
    """Leave the gradient of one window's loss in the weights: window (1, S)."""
    stack = Stack(backbone, window)
    window_nll(stack.logits(stack.run(stack.embedded, range(len(stack)))), window).sum().backward()


TAYLOR = ("window", "corpus", "net", "second")
"""Taylor variants. With w a weight, g_n the gradient of window n's loss and g the mean of g_n over the N windows,
a block's importance is

- ``window``: the mean over n of sum |w g_n|: windows do not cancel. The default.
- ``corpus``: sum |w g|, the gradient of the whole corpus's loss. Shortened LLaMA's "Taylor", in its paper and in its
  code, whose README calls it "Taylor+" where the first four and the last two blocks are kept.
- ``net``: |sum w g|: signs cancel, so this is the expansion's own estimate of how the loss changes.
- ``second``: sum |w g - mean over n of (w g_n)^2 / 2|, with the squared gradient for the Hessian's diagonal
  (LLM-Pruner's "param_mix").

``window`` adds up all parameters of a block; the others only those called weight (projections and norms, no biases),
as Shortened LLaMA's code does. They keep a running sum of the block's weights in float32, ``second`` two of them.
"""


def taylor_of_corpus(backbone: CausalLM, ids: Tensor, variant: str) -> Importance:
    """Taylor importance of a variant that adds gradients up over windows before it takes absolute values.

    Args:
        backbone: causal language model.
        ids: (N, S) windows.
        variant: one of `TAYLOR` but ``window``.

    Returns:
        ``per_window`` is the same variant on each window alone; ``values`` is not its mean.
    """
    layers = backbone.get_decoder().layers
    weights = [[p for name, p in layer.named_parameters() if name.endswith("weight")] for layer in layers]
    first = [[torch.zeros_like(p, dtype=torch.float32) for p in block] for block in weights]
    square = [[torch.zeros_like(f) for f in block] if variant == "second" else [] for block in first]
    rows = []
    with _differentiable(backbone, layers):
        for window in tqdm(ids.split(1), desc=f"importance taylor ({variant})", unit="window"):
            _backward(backbone, window)
            row = []
            for block, firsts, squares in zip(weights, first, square, strict=True):
                products = [p.detach().float() * p.grad.float() for p in block]
                squared = [x.square() for x in products] if squares else []
                row.append(_salience(products, squared, variant))
                for total, x in zip(firsts + squares, products + squared, strict=True):
                    total += x / len(ids)
            rows.append(row)
            backbone.zero_grad(set_to_none=True)
    values = [_salience(*sums, variant) for sums in zip(first, square, strict=True)]
    return Importance(torch.tensor(values).double(), torch.tensor(rows).double())


def _salience(first: list[Tensor], square: list[Tensor], variant: str) -> float:
    """A block's importance from the mean of w g, and of (w g)^2 where wanted, of each of its weights."""
    if variant == "net":
        return abs(float(sum(x.sum() for x in first)))
    if variant == "second":
        first = [x - s / 2 for x, s in zip(first, square, strict=True)]
    return float(sum(x.abs().sum() for x in first))


INDICATORS: dict[str, Callable[[CausalLM, Tensor], Tensor]] = {
    "delta_ppl": removal_nll,
    "taylor": taylor,
    "cosine": cosine,
    "block_influence": block_influence,
}


def estimate(
    backbone: CausalLM, ids: Tensor, indicator: str, batch_size: int = 1, taylor: str = "window"
) -> Importance:
    """Importance of every block, over the corpus and in every window.

    Args:
        backbone: causal language model.
        ids: (N, S) windows.
        indicator: one of `INDICATORS`.
        batch_size: windows per pass.
        taylor: variant of the indicator ``taylor``, one of `TAYLOR`.

    Raises:
        UserError: an unknown indicator or variant.
    """
    if indicator not in INDICATORS:
        raise unknown("indicator", indicator, INDICATORS)
    if taylor not in TAYLOR:
        raise unknown("taylor", taylor, TAYLOR)
    ids = ids.to(backbone.device)
    if indicator == "taylor" and taylor != "window":
        return taylor_of_corpus(backbone, ids, taylor)
    parts = []
    with tqdm(total=len(ids), desc=f"importance {indicator}", unit="window") as bar:
        for batch in ids.split(batch_size):
            parts.append(INDICATORS[indicator](backbone, batch).double().cpu())
            bar.update(len(batch))
    measured = torch.cat(parts)
    if indicator == "delta_ppl":
        # A corpus's perplexity is exp of its mean NLL, not the mean of its windows' perplexities.
        corpus, window = measured.mean(0).exp(), measured.exp()
        return Importance(corpus[1:] - corpus[0], window[:, 1:] - window[:, :1])
    return Importance(measured.mean(0), measured)
