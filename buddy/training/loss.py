"""What training minimises at every labelled token: cross-entropy, or the divergence from the untouched backbone.

The vocabulary is the widest axis of a small model, so logits are made for the tokens that count alone, a part of them at
a time, and the gradient of their states is taken with them: no pass keeps more than one part's logits. Both losses have
the same gradient, the student's probabilities minus the target's. It is written out: where student and teacher agree to
the last bit it is exactly zero, and an optimiser that divides by the gradient's size finds no noise to follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from buddy.routing.types import CausalLM
from buddy.training.examples import IGNORED

LOGITS_AT_ONCE = 2**25
"""Logits of a part: 128 MB in float32, of which a few copies exist at a time."""

Scored = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Called with log-probabilities (n, V) of some tokens and the place of their first among all: losses (n,) and their
slopes by the logits (n, V)."""


def predicting(labels: Tensor) -> Tensor:
    """Where a labelled token is predicted: boolean (B, S), one place before each label of (B, S)."""
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != IGNORED
    return counts


def next_tokens(labels: Tensor) -> Tensor:
    """The labelled tokens (N,), in the order of the places that `predicting` marks."""
    following = labels[:, 1:]
    return following[following != IGNORED]


def cross_entropies(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """Minus the log-probability of each token, nats.

    Args:
        head: from states to logits; frozen.
        states: (N, H), last states where the tokens are predicted; the gradient goes to them.
        targets: (N,) int64.

    Returns:
        (N,), float32 unless the head computes in more.
    """

    def scored(logs: Tensor, first: int) -> tuple[Tensor, Tensor]:
        tokens = targets[first : first + len(logs)].unsqueeze(-1)
        slopes = logs.exp()
        slopes.scatter_add_(-1, tokens, slopes.new_full(tokens.shape, -1))
        return -logs.gather(-1, tokens).squeeze(-1), slopes

    losses: Tensor = _Scores.apply(states, head, scored)
    return losses


def divergences(head: nn.Linear, states: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each next-token distribution, nats.

    Args:
        head: from states to logits, the same for both; frozen.
        states: (N, H), the student's last states; the gradient goes to them.
        teacher: (N, H), the teacher's.

    Returns:
        (N,), float32 unless the head computes in more.
    """

    def scored(logs: Tensor, first: int) -> tuple[Tensor, Tensor]:
        told = _log_probabilities(head(teacher[first : first + len(logs)]))
        likely = told.exp()
        return (likely * (told - logs)).sum(-1), logs.exp() - likely

    losses: Tensor = _Scores.apply(states, head, scored)
    return losses


@torch.no_grad()
def untouched(model: CausalLM, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Last states (B, S, H) of the backbone as it was before training: every block, no LoRA, no dropout.

    Args:
        model: the model in training, with PEFT around it or not.
        input_ids, attention_mask: (B, S).
    """
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            return untouched(model.get_base_model(), input_ids, attention_mask)
    training = model.training
    model.eval()
    try:
        output = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        model.train(training)
    states: Tensor = output.last_hidden_state
    return states


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


class _Scores(torch.autograd.Function):
    """Losses of tokens by their states, part by part; what the head would keep for the way back is used at once."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: nn.Linear, scored: Scored) -> Tensor:
        if any(parameter.requires_grad for parameter in head.parameters()):
            raise ValueError("the head must be frozen: it gets no gradient here")
        size = max(LOGITS_AT_ONCE // head.out_features, 1)
        losses: list[Tensor] = []
        slopes: list[Tensor] = []
        for first in range(0, len(states), size):
            part = states[first : first + size].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            loss, slope = scored(_log_probabilities(logits.detach()), first)
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                slopes += torch.autograd.grad(logits, part, slope.to(logits.dtype))
        ctx.save_for_backward(torch.cat(slopes) if slopes else torch.zeros_like(states))
        return torch.cat(losses) if losses else states.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (upstream[0].unsqueeze(-1) * slopes).to(slopes.dtype), None, None
