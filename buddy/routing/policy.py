"""What a depth policy is: the one interface that every method, ours and each peer, implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from buddy.errors import UserError
from buddy.routing.budget import Budget


class Choices(NamedTuple):
    """What a policy that scores single blocks chooses from, for a batch to choose together (`buddy.routing.shared`).

    Attributes:
        scores: (B, C) of the candidate blocks, the higher the better; floats.
        first: (B, C) boolean, the places of a sequence's ranking that its budget keeps.
        before, after: blocks ahead of and behind the candidates, which always run.
    """

    scores: Tensor
    first: Tensor
    before: int
    after: int


class Policy(nn.Module, ABC):
    """Decides which blocks run.

    The engine calls, in a forward pass: `begin` once per sequence batch, then for each pass `observe` with the source
    block's new keys and values, and `decide` where the path may change. Decisions live in the state that `begin`
    returns and that travels with the KV cache, so one policy serves many generations at once.

    Attributes:
        blocks: number of blocks L of the backbone.
        source_block: number of leading blocks that run before `decide` (0: it needs nothing from the pass).
        capturable: `observe` and `decide` change nothing but the tensors of the state, in place, and never ask the
            device for a value; a CUDA graph may hold them then.
        reads_tokens: `read` is called with the tokens of each prompt, before any block runs.
        reads_states: `see` is called with the states that left the source block, before the first `decide`.
        shares: it scores single blocks, so that a batch can choose together: it has `choices`.
        nested: of two routes at one step the one with fewer blocks is always part of the other, so that a batch calls no
            more blocks than its deepest sequence runs.
    """

    blocks: int
    source_block: int = 0
    capturable: bool = False
    reads_tokens: bool = False
    shares: bool = False
    nested: bool = False

    @property
    def always(self) -> int:
        """How many blocks run whatever the budget: the first ones up to the source block, and the last."""
        return max(self.source_block, 1) + 1

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments that build this policy again; learnt values come from its state dict."""

    @abstractmethod
    def begin(self, budget: Budget | None, batch: int, device: torch.device) -> Any:
        """Start routing a batch of sequences.

        Args:
            budget: fraction of blocks, one or one per sequence; None lets the policy choose.
            batch: number of sequences B.
            device: where decisions are made.

        Returns:
            The policy's state for these sequences.

        Raises:
            BudgetError: the budget cannot be met by this policy.
            UserError: ``budget`` is None and this policy has no way to choose.
        """

    def read(self, state: Any, input_ids: Tensor, mask: Tensor | None) -> None:
        """Take in the tokens of the prompts; called once, where `reads_tokens` says so.

        Args:
            state: from `begin`.
            input_ids: (B, S) int64.
            mask: boolean (B, S), True where a token may be read; None means all.
        """

    @property
    def reads_states(self) -> bool:
        """Whether `see` is called."""
        return False

    def see(self, state: Any, hidden: Tensor, mask: Tensor | None) -> None:
        """Take in the states of the prompts behind the source block; called once, where `reads_states` says so.

        Args:
            state: from `begin`.
            hidden: (B, S, H).
            mask: boolean (B, S), True where a token may be read; None means all.
        """

    def observe(self, state: Any, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
        """Take in what the source block wrote for the new tokens.

        Args:
            state: from `begin`.
            keys, values: (B, KV heads, S, head size) of the S new tokens, as the cache holds them.
            mask: (B, S), True where a token may be read; None means all.
        """

    @abstractmethod
    def decide(self, state: Any) -> Tensor:
        """Choose the route of every sequence: boolean (B, L), True where the block runs."""

    def choices(self, state: Any) -> Choices:
        """What `decide` chooses from, where the policy `shares`.

        Raises:
            UserError: it does not.
        """
        raise UserError(f"{type(self).__name__} does not score single blocks")

    def choices_each(self, state: Any, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Choices:
        """Take in tokens, and for each of them what decoding token by token would have it choose from.

        Args: as in `decide_each`.

        Returns:
            Choices whose scores are (B, S, C).

        Raises:
            UserError: the policy does not share.
        """
        raise UserError(f"{type(self).__name__} does not score single blocks")

    def decide_each(self, state: Any, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """Take in tokens and give each the route that decoding token by token would give it.

        This loop is the definition; a policy whose scores are sums overrides it with one that works on all tokens.

        Args:
            state: from `begin`.
            keys, values: (B, KV heads, S, head size) of the new tokens.
            mask: boolean (B, S), True where a token may be read.
            prompt: boolean (B, S), leading tokens that are read together and share a route (the prefill).

        Returns:
            Boolean (B, S, L).
        """
        route = torch.ones(*mask.shape, self.blocks, dtype=torch.bool, device=mask.device)
        if bool(prompt.any()):
            self.observe(state, keys, values, mask & prompt)
            route = torch.where(prompt.unsqueeze(-1), self.decide(state).unsqueeze(1), route)
        for token in range(mask.shape[1]):
            here = slice(token, token + 1)
            self.observe(state, keys[:, :, here], values[:, :, here], (mask & ~prompt)[:, here])
            route[:, token] = torch.where(prompt[:, here], route[:, token], self.decide(state))
        return route

    def diagnostics(self, state: Any) -> dict[str, float]:
        """Numbers on the last decision that are worth a curve while training; none by default."""
        return {}

    def gates(self, state: Any) -> Tensor:
        """Routes with a gradient, for training: (B, L) float, exactly 0 or 1 in value.

        Raises:
            UserError: the policy has nothing to train.
        """
        raise UserError(f"{type(self).__name__} has no router to train")

    def gates_each(self, state: Any, keys: Tensor, values: Tensor, mask: Tensor, prompt: Tensor) -> Tensor:
        """`decide_each` with a gradient, for training: (B, S, L) float, exactly 0 or 1 in value.

        Raises:
            UserError: the policy has nothing to train.
        """
        raise UserError(f"{type(self).__name__} has no router to train")


class GatedPolicy(Policy):
    """A policy whose route grows block by block in the prefill: `gate` sees each block's input before the block runs.

    The route holds from then on; `decide` gives it again. Such a policy reads no K/V (``source_block`` is 0).
    """

    @abstractmethod
    def gate(self, state: Any, index: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """Whether each sequence runs a block; called in the prefill, for every block in order.

        Args:
            state: from `begin`; it remembers the answer for `decide`.
            index: the block, from 0.
            hidden: (B, S, H), the block's input for the whole prompt of every sequence.
            mask: boolean (B, S), True where a token may be read; None means all.

        Returns:
            Boolean (B,), or None for a block that has no gate and always runs.
        """

    @abstractmethod
    def weights(self, state: Any, index: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """How much of a block's update each token takes in training, with a gradient.

        Args:
            state, index, hidden: as in `gate`.
            mask: boolean (B, S), True for the tokens that are no padding; None means all.

        Returns:
            (B, S) float in [0, 1], or None for a block that has no gate.
        """
