"""What inputs cost at several depths under teacher forcing, shared work done once: cross-entropies of responses, or how far
the whole input's next-token distributions rise from those of full depth.

The route of an example is read from its prompt alone and holds for the response, as a budget's choice at the prefill
does. Routes of one example are nested: a deeper one keeps every block of a shallower one, because both keep the first
places of the same ranking. So the depths of an example have their beginning in common, and each stretch of blocks is
run once for all depths that take it, the stretches of all examples of a batch together. Tokens, the blocks up to the
source block and the ranking are shared by all depths; the head is asked about the response alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from buddy.policies.buddy import BuddyPolicy
from buddy.policies.predictor import mean_feature, mean_state, scaled_state
from buddy.routing.blocks import Stack
from buddy.routing.padding import leading, padded
from buddy.routing.ranking import ranking
from buddy.routing.types import CausalLM
from buddy.storage.checkpoints import Checkpoints
from buddy.training import fingerprints

Row = Mapping[str, Any]
"""An example in tokens, as `buddy.training.examples.encode` makes it: ``input_ids`` and ``prompt_length``; and
``read_length``, where less than the prompt is read."""

HEAD_TOKENS = 512
"""Tokens whose logits are held at once: a vocabulary is wide."""

SHARD = 64
"""Examples of a table that are written together."""


class Rollouts:
    """A batch of examples whose responses can be scored at any depth.

    Args:
        backbone: causal language model, with its adapter merged or in place.
        policy: ranks the blocks; its predictor, if it has one, is not asked.
        rows: B examples.
        by_state: what a budget predictor reads: the states behind the source block, or what the router reads in it.

    Attributes:
        contexts: (B, width) float32, what a budget predictor is given.
    """

    @torch.no_grad()
    def __init__(self, backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Row], by_state: bool = False) -> None:
        self.policy = policy
        self._by_state = by_state
        self._ids = [list(row["input_ids"]) for row in rows]
        self._prompts = [int(row["prompt_length"]) for row in rows]
        ids = padded(self._ids).to(backbone.device)
        read = [int(row.get("read_length", row["prompt_length"])) for row in rows]
        prompt = leading(read, ids.shape[1]).to(backbone.device)
        # One row's masks and positions serve any number of rows: padding is on the right, where nobody looks.
        self._stack = Stack(backbone, ids[:1])
        self._read(self._stack.decoder.embed_tokens(ids), prompt)

    def _read(self, hidden: Tensor, prompt: Tensor) -> None:
        """Run the blocks up to the source block, and rank the others by what the prompt left there."""
        policy, stack = self.policy, self._stack
        source = policy.source_block - 1
        hidden, keys, values = stack.tapped(stack.run(hidden, range(source)), source)
        state = policy.begin(1.0, len(hidden), hidden.device)
        policy.observe(state, keys, values, prompt)
        self._places = ranking(policy.scores(state)).argsort(-1).tolist()
        by_state = self._by_state
        self.contexts = mean_state(hidden, prompt) if by_state else mean_feature(keys, values, policy.feature, prompt)
        self._hidden = hidden

    @torch.no_grad()
    def losses(self, depths: Sequence[Sequence[int]]) -> Tensor:
        """Mean cross-entropy of each response at these depths.

        Args:
            depths: for each example the same number D of depths, executed blocks; one may occur twice.

        Returns:
            (B, D) float64 on the host, nats per token of the response.
        """
        found = {}
        for example, depth, hidden in self._outputs([sorted(set(row)) for row in depths]):
            found[example, depth] = self._loss(example, hidden)
        values = [[found[example, depth] for depth in row] for example, row in enumerate(depths)]
        return torch.stack([torch.stack(row) for row in values]).double().cpu()

    def token_states(self) -> list[Tensor]:
        """Of each example the states behind the source block, as a predictor reads them, of the tokens that `token_rises`
        tells of: (n, H) float32."""
        return [scaled_state(row[1 : max(len(ids) - 1, 1)]) for row, ids in zip(self._hidden, self._ids, strict=True)]

    @torch.no_grad()
    def token_rises(self, depths: Sequence[int]) -> list[Tensor]:
        """How far each token's prediction of the next one is from that of full depth, KL(full depth || depth), nats.

        Prompt and response alike, from the second token to the last but one: the first one's state is that of a token
        without a context, whatever the input, and after the last one nothing follows.

        Args:
            depths: D of them, the same for all examples.

        Returns:
            Of each example (n, D) float32; zeros at full depth.
        """
        full, wanted = self.policy.blocks, sorted({*depths, self.policy.blocks})
        states = {(example, depth): hidden for example, depth, hidden in self._outputs([wanted] * len(self._ids))}
        found = []
        for example, ids in enumerate(self._ids):
            tokens = slice(1, max(len(ids) - 1, 1))
            every = zip(*(states[example, depth][tokens].split(HEAD_TOKENS) for depth in (full, *depths)), strict=True)
            found.append(torch.cat([self._divergences(whole, parts) for whole, *parts in every]))
        return found

    def _divergences(self, whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """KL divergences (n, D) of the distributions that last states, D of (n, H), lead to from those of full depth."""
        theirs = self._stack.logits(whole).float().log_softmax(-1)
        chances = theirs.exp()
        ours = (self._stack.logits(states).float().log_softmax(-1) for states in parts)
        return torch.stack([(chances * (theirs - one)).sum(-1) for one in ours], -1)

    def _outputs(self, depths: Sequence[Sequence[int]]) -> list[tuple[int, int, Tensor]]:
        """(example, depth, last states (S, H)) of all: a tree of states that branches where routes part."""
        policy, stack = self.policy, self._stack
        ways = [(example, tuple(wanted)) for example, wanted in enumerate(depths)]
        hidden = self._hidden
        for block in range(policy.source_block, policy.blocks - 1):
            skipping, running = [], []
            for row, (example, wanted) in enumerate(ways):
                place = self._places[example][block - policy.source_block]
                runs = tuple(depth for depth in wanted if place < depth - policy.always)
                skips = tuple(depth for depth in wanted if place >= depth - policy.always)
                skipping += [(row, (example, skips))] if skips else []
                running += [(row, (example, runs))] if runs else []
            if not running:
                continue
            ran = stack.run(_rows(hidden, [row for row, _ in running]), [block])
            hidden = torch.cat([_rows(hidden, [row for row, _ in skipping]), ran]) if skipping else ran
            ways = [way for _, way in (*skipping, *running)]
        hidden = stack.run(hidden, [policy.blocks - 1])
        return [(example, depth, hidden[row]) for row, (example, (depth,)) in enumerate(ways)]

    def _loss(self, example: int, hidden: Tensor) -> Tensor:
        """Mean cross-entropy of one response, float64, from last states (S, H)."""
        first, ids = self._prompts[example], self._ids[example]
        targets = torch.tensor(ids[first:], device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        states = hidden[first - 1 : len(ids) - 1]
        for part, goal in zip(states.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True):
            total += cross_entropy(self._stack.logits(part).float(), goal, reduction="sum").double()
        return total / len(targets)


def _rows(hidden: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of (R, S, H), without a copy where they are all of it."""
    return hidden if list(rows) == list(range(len(hidden))) else hidden[torch.tensor(rows, device=hidden.device)]


def loss_table(
    backbone: CausalLM,
    policy: BuddyPolicy,
    rows: Sequence[Row],
    depths: Sequence[int],
    batch_size: int = 8,
    folder: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """What every example costs at every depth.

    Args:
        backbone, policy: as for `Rollouts`.
        rows: N examples.
        depths: D numbers of executed blocks.
        batch_size: examples per pass.
        folder: what is done is kept here, and not done again; None keeps nothing.

    Returns:
        Contexts (N, width) float32, and cross-entropies (N, D) float64, nats per token of the response.
    """
    from safetensors.torch import load, save

    contexts, losses = [], []
    models = {"router": fingerprints.of_weights(policy.decision), "backbone": fingerprints.of_weights(backbone)}
    with tqdm(total=len(rows), desc=f"losses at {len(depths)} depths", unit="example") as bar:
        for number, start in enumerate(range(0, len(rows), SHARD)):
            part = rows[start : start + SHARD]
            said = {"examples": fingerprints.of_examples(part), "depths": list(depths), "batch_size": batch_size}
            kept = Checkpoints(folder, said | models) if folder else None
            name = f"losses-{number:05d}.safetensors"
            done = kept.read(name) if kept else None
            if done is None:
                found = _measured(backbone, policy, part, depths, batch_size, bar)
                if kept:
                    kept.write(name, save(found))
            else:
                found = load(done)
                bar.update(len(part))
            contexts.append(found["contexts"])
            losses.append(found["losses"])
    return torch.cat(contexts), torch.cat(losses)


def _measured(
    backbone: CausalLM, policy: BuddyPolicy, rows: Sequence[Row], depths: Sequence[int], batch_size: int, bar: Any
) -> dict[str, Tensor]:
    contexts = torch.zeros(len(rows), policy.width)
    losses = torch.zeros(len(rows), len(depths), dtype=torch.float64)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]), reverse=True)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        batch = Rollouts(backbone, policy, [rows[member] for member in members])
        contexts[members] = batch.contexts.cpu()
        losses[members] = batch.losses([depths] * len(members))
        bar.update(len(members))
    return {"contexts": contexts, "losses": losses}
