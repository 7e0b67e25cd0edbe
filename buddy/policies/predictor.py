"""The budget predictor: how many blocks a prompt is worth (paper sec. 4.4), asked once per sequence.

It reads the prompt as one mean vector: of what the router reads in the source block, or of the states that leave that block.
There are three forms.

Without a price (the paper's) it is a categorical policy over depths: Linear, SiLU, Linear, the Decision Module's shape
and hidden width, since the paper gives none. It begins as the uniform policy.

With a price it estimates what each depth loses on this prompt, on a scale on which the shallowest depth
loses about 1 and full depth nothing, and weighs that against what the depth costs, on a scale from 0 to 1, too:

    logits = -sharpness * ((1 - price) * loss(prompt) + price * cost)

The price is an input, so one predictor serves all of them. It begins with the same loss for every prompt, which is the
best constant depth at each price; what it learns is how prompts differ from that.

The third (`RisePredictor`) weighs in the same way what each depth is estimated to move the prompt's own next-token
distributions away from those of full depth; its estimate is a sum over tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from buddy.errors import BudgetError, UserError
from buddy.policies.decision import RunningMean, source_feature

SHARPNESS = 10.0
"""Where the sharpness of a priced policy begins: it grows as far as the depths can be told apart."""


def mean_feature(keys: Tensor, values: Tensor, feature: str, mask: Tensor | None) -> Tensor:
    """What a predictor is given of a prompt: the mean of what the router reads of its tokens.

    Args:
        keys, values: (B, KV heads, S, head size), the source block's.
        feature: ``key``, ``value`` or ``key+value``.
        mask: boolean (B, S), True where a token may be read; None means all.

    Returns:
        (B, KV heads * head size) float32.
    """
    tokens = source_feature(keys, values, feature).float()
    pooled = RunningMean.empty(len(tokens), tokens.shape[-1], tokens.device)
    pooled.add(tokens, mask)
    return pooled.mean().float()


@dataclass
class Asked:
    """A question to the predictor: at which price, and what of the prompts it has been shown, (B, width) pooled."""

    price: float | None
    pooled: RunningMean


def mean_state(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """What a `RisePredictor` is given of a prompt: the mean of its tokens' states behind the source block, each scaled to a
    root mean square of 1, since a few tokens' are large.

    Args:
        hidden: (B, S, H).
        mask: boolean (B, S), True where a token may be read; None means all.

    Returns:
        (B, H) float32; zeros where there is no token to read.
    """
    pooled = RunningMean.empty(len(hidden), hidden.shape[-1], hidden.device)
    pooled.add(scaled_state(hidden), mask)
    return pooled.mean().float()


def scaled_state(hidden: Tensor) -> Tensor:
    """States (..., H) in float32, each with a root mean square of 1."""
    return nn.functional.rms_norm(hidden.float(), hidden.shape[-1:])


class DepthPredictor(nn.Module, ABC):
    """What all forms have in common: depths to choose from, and how a price is weighed.

    Args:
        depths: numbers K of executed blocks to choose from, ascending.
        preset: name of the recipe it is trained by, for messages.
        price: the price taken where none is given, in [0, 1]; None makes a policy without a price.

    Attributes:
        width: size of a context.
        reads_states: whether contexts are of `mean_state`; else of `mean_feature`.
        loss: what its losses are: ``ce``, cross-entropy of a response; ``kl``, divergence of a whole input from full depth.
        rise: (K,) mean loss of each depth over the training prompts, scaled; priced policies only, like the next two.
        nats: (), the nats per token that are a loss of 1.
        cost: (K,) what each depth costs, from 0 to 1.
    """

    depths: Tensor
    rise: Tensor
    nats: Tensor
    cost: Tensor
    width: int
    reads_states = False
    loss: Literal["ce", "kl"] = "ce"

    def __init__(self, depths: Sequence[int], preset: str, price: float | None) -> None:
        super().__init__()
        if len(depths) < 2 or sorted(set(depths)) != list(depths):
            raise UserError(f"depths: {list(depths)} are not two or more depths in ascending order")
        self.preset = preset
        self.price = price
        self.register_buffer("depths", torch.tensor(depths), persistent=False)
        if self.priced:
            cost = torch.tensor(depths, dtype=torch.float32)
            self.register_buffer("cost", (cost - cost[0]) / (cost[-1] - cost[0]), persistent=False)
            self.register_buffer("rise", 1 - self.cost)
            self.register_buffer("nats", torch.ones(()))

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Arguments of `make`, besides the width, that build it again; what is learnt comes from its state dict."""

    @abstractmethod
    def sharpness(self) -> float | Tensor:
        """Of a priced policy: how much a difference of 1 in loss or cost moves its logits."""

    @abstractmethod
    def read(self, contexts: Tensor, dropout: float = 0.0) -> Tensor:
        """What prompts say of the depths, (B, K): how far their losses are from the mean, or logits."""

    @property
    def priced(self) -> bool:
        """Whether it takes a price."""
        return self.price is not None

    def accepted(self, price: float | None) -> float | None:
        """The price in force where this one is asked for; None asks for the predictor's own.

        Raises:
            BudgetError: a price, and this predictor takes none.
        """
        if price is not None and not self.priced:
            raise BudgetError(
                f"budget: auto:{price:g} names a price, and this run's predictor (preset {self.preset}) takes none; "
                "say auto, or train one of preset tuned"
            )
        return self.price if price is None else price

    def losses(self, contexts: Tensor, dropout: float = 0.0) -> Tensor:
        """Estimated loss of each depth on each prompt, (B, K); of a priced policy. Dropout is for training."""
        return self.rise + self.read(contexts, dropout)

    def weighed(self, losses: Tensor, price: float | Tensor) -> Tensor:
        """Logits (..., B, K) from losses (B, K) and a price, or prices (..., B); of a priced policy."""
        price = price.unsqueeze(-1) if isinstance(price, Tensor) else price
        return -self.sharpness() * ((1 - price) * losses + price * self.cost)

    def forward(self, contexts: Tensor, price: float | Tensor | None = None) -> Tensor:
        """Logits of the depths.

        Args:
            contexts: (B, width) float32, from `mean_feature` or `mean_state`.
            price: of a priced policy; one for all, or (..., B).

        Returns:
            (B, K), or (..., B, K) for a tensor of prices.
        """
        if not self.priced:
            return self.read(contexts)
        assert price is not None
        return self.weighed(self.losses(contexts), price)

    def choose(self, contexts: Tensor, price: float | None = None) -> Tensor:
        """The depth of every prompt, (B,) int64: the likeliest one."""
        with torch.autocast(contexts.device.type, enabled=False):
            return self.depths[self(contexts, price).argmax(-1)]


class BudgetPredictor(DepthPredictor):
    """A network that chooses a depth for each prompt.

    Args:
        width: size of a context, KV heads x head size.
        hidden: hidden width of the network.
        depths, preset, price: as of `DepthPredictor`.

    Attributes:
        mean, scale: (width,), what contexts are standardised by; zeros and ones until they are set.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, width: int, depths: Sequence[int], preset: str, hidden: int = 32, price: float | None = None
    ) -> None:
        super().__init__(depths, preset, price)
        self.width = width
        self.hidden = hidden
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, len(depths))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        if self.priced:
            self.log_sharpness = nn.Parameter(torch.tensor(SHARPNESS).log())

    def settings(self) -> dict[str, Any]:
        """As there."""
        return {"depths": self.depths.tolist(), "preset": self.preset, "hidden": self.hidden, "price": self.price}

    def sharpness(self) -> Tensor:
        """It is learnt."""
        return self.log_sharpness.exp()

    def read(self, contexts: Tensor, dropout: float = 0.0) -> Tensor:
        """By the network."""
        inputs = nn.functional.dropout((contexts - self.mean) / self.scale, dropout)
        return self.up(nn.functional.dropout(nn.functional.silu(self.down(inputs)), dropout))


class RisePredictor(DepthPredictor):
    """Estimates for each token what leaving blocks out does to the next token's distribution, and takes the mean.

    The estimate is linear in a token's state, so the mean over tokens is that of their mean state:

        loss(prompt) = rise + (mean state - mean) @ weight

    Args:
        states: size H of the hidden states.
        depths, preset, price: as of `DepthPredictor`.

    Attributes:
        mean: (H,), mean state of the training prompts.
        weight: (H, K), in units of ``nats``; zeros, with which every prompt gets the best constant depth, until it is set.
    """

    mean: Tensor
    reads_states = True
    loss: Literal["ce", "kl"] = "kl"

    def __init__(self, states: int, depths: Sequence[int], preset: str, price: float) -> None:
        super().__init__(depths, preset, price)
        self.width = states
        self.register_buffer("mean", torch.zeros(states))
        self.weight = nn.Parameter(torch.zeros(states, len(depths)))

    def settings(self) -> dict[str, Any]:
        """As there."""
        own = {"depths": self.depths.tolist(), "preset": self.preset, "price": self.price}
        return {"states": self.width, **own}

    def sharpness(self) -> float:
        """Estimates know their own scale; nothing is sampled."""
        return SHARPNESS

    def read(self, contexts: Tensor, dropout: float = 0.0) -> Tensor:
        """By the linear map; a prompt of which nothing could be read is like the mean."""
        known = contexts.abs().amax(-1, keepdim=True) > 0
        return ((contexts - self.mean) * known) @ self.weight


def make(width: int, settings: Mapping[str, Any]) -> DepthPredictor:
    """A predictor from its settings.

    Args:
        width: size of what the router reads of a token, KV heads x head size.
        settings: of one of the forms.
    """
    return RisePredictor(**settings) if "states" in settings else BudgetPredictor(width, **settings)
