"""What routes cost: the loss of any example along any routes, measured; shared work done once.

An example's route holds for prompt and response, as the prefill's choice does. Routes of one example share their states up
to the block where they first differ; what several of them need is run once, the states of all examples of a batch
together, and the head is asked about the response alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from buddy.policies.decision import source_feature
from buddy.routing.blocks import Stack
from buddy.routing.padding import leading, padded
from buddy.routing.types import CausalLM
from buddy.training import loss as losses

Row = Mapping[str, Any]
"""An example in tokens, as `buddy.training.examples.encode` makes it: ``input_ids`` and ``prompt_length``, and
``question`` where less than the prompt is read."""

Loss = Literal["ce", "kl"]


class Bundle:
    """A batch of examples, each of which can take several routes.

    Args:
        backbone: causal language model, in evaluation mode.
        rows: B examples.
        loss: ``ce``, cross-entropy of the response; ``kl``, divergence from the same model at full depth.
    """

    @torch.no_grad()
    def __init__(self, backbone: CausalLM, rows: Sequence[Row], loss: Loss = "ce") -> None:
        ids = [list(row["input_ids"]) for row in rows]
        prompts = [int(row["prompt_length"]) for row in rows]
        self._tokens = padded(ids).to(backbone.device)
        self._read = leading(prompts, self._tokens.shape[1])
        for place, row in enumerate(rows):
            if row.get("question"):
                self._read[place] = False
                self._read[place, row["question"]] = True
        before = leading([length - 1 for length in map(len, ids)], self._tokens.shape[1])
        self._predicts = (before & ~leading([prompt - 1 for prompt in prompts], before.shape[1])).to(backbone.device)
        # One row's masks and positions serve any number of rows: padding is on the right, where nobody looks.
        self._stack = Stack(backbone, self._tokens[:1])
        self._head = backbone.get_output_embeddings()
        self._hidden = self._stack.decoder.embed_tokens(self._tokens)
        self._told = (
            self._outputs(torch.ones(len(rows), 1, len(self._stack), dtype=torch.bool))[0] if loss == "kl" else None
        )

    def __len__(self) -> int:
        return len(self._tokens)

    @torch.no_grad()
    def features(self, source_block: int, feature: str) -> Tensor:
        """(tokens, width) float32 on the host: what a router reads of the prompts, token by token, one example after the other."""
        source = source_block - 1
        hidden = self._stack.run(self._hidden, range(source))
        _, keys, values = self._stack.tapped(hidden, source)
        return source_feature(keys, values, feature).float().cpu()[self._read]

    @torch.no_grad()
    def losses(self, routes: Tensor) -> Tensor:
        """Mean loss over each response.

        Args:
            routes: boolean (B, R, L), True where a block runs.

        Returns:
            (B, R) float64 on the host, nats per token.
        """
        states, owners, place = self._outputs(routes)
        means = torch.zeros(len(states), dtype=torch.float64)
        for row, (state, owner) in enumerate(zip(states, owners.tolist(), strict=True)):
            where = self._predicts[owner]
            if self._told is None:
                each = losses.cross_entropies(self._head, state[where], self._tokens[owner, 1:][where[:-1]])
            else:
                each = losses.divergences(self._head, state[where], self._told[owner][where])
            means[row] = each.double().mean().cpu()
        return means[place].view(routes.shape[:2])

    def _outputs(self, routes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed last states (states, S, H), the example of each, and the state of each route (B * R)."""
        examples, each, _ = routes.shape
        runs = routes.reshape(examples * each, -1).cpu()
        states, owners = self._hidden, torch.arange(examples)
        place = owners.repeat_interleave(each)
        for block in range(len(self._stack)):
            # A state goes on in one or two ways, as its routes run the block, skip it, or part here.
            ways, place = torch.unique(2 * place + runs[:, block], return_inverse=True)
            owners, running = owners[ways // 2], ways % 2 == 1
            states = states[(ways // 2).to(states.device)]
            if running.any():
                index = running.nonzero().squeeze(1).to(states.device)
                states = states.index_copy(0, index, self._stack.run(states[index], [block]))
        return self._stack.normed(states), owners, place


def by_length(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Indices of examples in batches of like length, the longest first, so that memory trouble comes at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure(
    backbone: CausalLM, rows: Sequence[Row], routes: Tensor, loss: Loss = "ce", batch_size: int = 8, bar: Any = None
) -> Tensor:
    """Losses of N examples along R routes each.

    Args:
        backbone: causal language model, in evaluation mode.
        rows: N examples.
        routes: boolean (N, R, L).
        loss: as in `Bundle`.
        batch_size: examples per pass.
        bar: a progress bar that counts examples.

    Returns:
        (N, R) float64 on the host, nats per token of the response.
    """
    found = torch.zeros(routes.shape[:2], dtype=torch.float64)
    for members in by_length(rows, batch_size):
        found[members] = Bundle(backbone, [rows[member] for member in members], loss).losses(routes[members])
        if bar is not None:
            bar.update(len(members))
    return found
