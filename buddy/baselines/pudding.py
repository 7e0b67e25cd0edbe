"""PuDDing's pool of omission sets (Wee, Park and Lee, ICML 2025, arXiv 2502.04348).

For each task and criterion blocks are removed one after the other, as SLEB does: the one without which the task's
training questions are answered best, measured anew after each removal. A set of n blocks is the first n of such an order.
Which set a prompt gets, `buddy.policies.pudding` decides.

With l the mean log-likelihood of an answer's tokens, the criteria are

- ``likelihood``: minus l of the right answer;
- ``likelihood_diff``: minus the sum over the wrong answers of l(right) - l(wrong).

What the paper leaves open is taken from its public code (tada0347/PuDDing): the first and the last block are no
candidates; of equal scores the earlier block goes; the questions are the first 128 of each training split; and with more
than two choices the difference is the sum above. Its pool is five tasks times two criteria, ten sets.

It differs in the format of the questions. The code asks "Question: ...\\nAnswer: ..." throughout, and scores the whole
sentence in WinoGrande. Here a question has the words in which its task is evaluated (`buddy.data.choices`).

What is measured is measured once: blocks before a candidate run once for all candidates behind it, a context once for
all its answers, and rounds in which two criteria have removed the same blocks for both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from buddy.baselines.removal import lowest
from buddy.data.choices import Item, Tokens
from buddy.errors import UserError, unknown
from buddy.routing.blocks import Stack
from buddy.routing.padding import padded
from buddy.routing.types import CausalLM

logger = logging.getLogger(__name__)

CRITERIA = ("likelihood", "likelihood_diff")


@dataclass(frozen=True)
class Omission:
    """A removal order found for a task by a criterion.

    Attributes:
        task, criterion: what it was searched for.
        order: removed blocks, from 0, the first removed first.
        scores: in each round the score without each candidate, the lowest of which was removed.
    """

    task: str
    criterion: str
    order: list[int]
    scores: list[dict[int, float]]

    def content(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Omission:
        """From what `content` gave, also by way of JSON, which turns numbers that are keys into text."""
        scores = [{int(block): float(score) for block, score in round_.items()} for round_ in content["scores"]]
        return cls(content["task"], content["criterion"], list(content["order"]), scores)


def pool(omissions: Sequence[Omission], removed: int) -> dict[tuple[int, ...], list[str]]:
    """The omission sets for a number of removed blocks: the first of each order, equal sets merged.

    Args:
        omissions: from `find_pool`, with orders at least this long.
        removed: blocks per set.

    Returns:
        Each set, ascending, with the ``task/criterion`` that lead to it.

    Raises:
        UserError: an order is too short.
    """
    sets: dict[tuple[int, ...], list[str]] = {}
    for omission in omissions:
        if len(omission.order) < removed:
            raise UserError(f"removed: {removed} blocks asked for, the pool's orders have {len(omission.order)}")
        name = f"{omission.task}/{omission.criterion}"
        sets.setdefault(tuple(sorted(omission.order[:removed])), []).append(name)
    return sets


def find_pool(
    backbone: CausalLM,
    items: Mapping[str, Sequence[Item]],
    removed: int,
    criteria: Sequence[str] = CRITERIA,
    batch_size: int = 16,
) -> list[Omission]:
    """Search an order of removal for every task and criterion.

    Args:
        backbone: causal language model.
        items: training questions by task.
        removed: blocks to remove; the pool for fewer blocks is the beginning of each order.
        criteria: of `CRITERIA`.
        batch_size: questions per pass.

    Raises:
        UserError: an unknown criterion, or more blocks to remove than may be.
    """
    blocks = len(backbone.get_decoder().layers)
    if not 1 <= removed <= blocks - 2:
        raise UserError(f"removed: {removed} is not between 1 and {blocks - 2} (the first and last block always run)")
    for criterion in criteria:
        if criterion not in CRITERIA:
            raise unknown("criterion", criterion, CRITERIA)
    found = []
    for task, questions in items.items():
        search = _Search(backbone, questions, batch_size)
        # The criterion that measures all answers goes first: what it has measured serves the other.
        by_criterion = {
            criterion: search.run(task, criterion, removed) for criterion in sorted(set(criteria), reverse=True)
        }
        found += [by_criterion[criterion] for criterion in criteria]
    return found


class _Search:
    """The greedy searches of one task, which share what they measure.

    Args:
        backbone: causal language model.
        items: the task's questions.
        batch_size: questions per pass.
    """

    def __init__(self, backbone: CausalLM, items: Sequence[Item], batch_size: int) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.pairs = [pair for item in items for pair in zip(item.contexts, item.answers, strict=True)]
        choices = torch.tensor([len(item.answers) for item in items])
        first = choices.cumsum(0) - choices
        self.right = first + torch.tensor([item.right for item in items])
        # How much each answer's likelihood counts: K for the right one of K, minus 1 for every one.
        self.difference = -torch.ones(len(self.pairs), dtype=torch.float64)
        self.difference[self.right] += choices
        self.questions = len(items)
        self._measured: dict[tuple[bool, tuple[int, ...]], dict[int, Tensor]] = {}

    def run(self, task: str, criterion: str, removed: int) -> Omission:
        """Remove one block after another; arguments as in `find_pool`."""
        kept = list(range(len(self.backbone.get_decoder().layers)))
        order: list[int] = []
        rounds: list[dict[int, float]] = []
        with tqdm(total=removed, desc=f"pudding {task} {criterion}", unit="round") as bar:
            for _ in range(removed):
                candidates = kept[1:-1]
                rounds.append(self._scores(criterion, kept, candidates))
                order += lowest(rounds[-1], candidates, 1)
                kept.remove(order[-1])
                bar.update()
                bar.set_postfix_str(f"removed {order[-1]}, score {rounds[-1][order[-1]]:.4g}")
        logger.info("pudding: %s by %s removes %s", task, criterion, ",".join(map(str, order)))
        return Omission(task, criterion, order, rounds)

    def _scores(self, criterion: str, kept: Sequence[int], candidates: Sequence[int]) -> dict[int, float]:
        """The criterion without each candidate, mean over the questions."""
        if criterion == "likelihood_diff":
            measured = self._likelihoods(True, kept, candidates)
            return {block: -float(self.difference @ value) / self.questions for block, value in measured.items()}
        if (True, tuple(kept)) in self._measured:
            measured = {block: value[self.right] for block, value in self._likelihoods(True, kept, candidates).items()}
        else:
            measured = self._likelihoods(False, kept, candidates)
        return {block: -float(value.mean()) for block, value in measured.items()}

    def _likelihoods(self, every: bool, kept: Sequence[int], candidates: Sequence[int]) -> dict[int, Tensor]:
        """Log-likelihoods without each candidate, (P,) float64, of every answer or of the right ones alone."""
        key = every, tuple(kept)
        if key not in self._measured:
            pairs = self.pairs if every else [self.pairs[index] for index in self.right.tolist()]
            self._measured[key] = self._measure(pairs, kept, candidates)
        return self._measured[key]

    @torch.no_grad()
    def _measure(
        self, pairs: Sequence[tuple[Tokens, Tokens]], kept: Sequence[int], candidates: Sequence[int]
    ) -> dict[int, Tensor]:
        found = {block: torch.zeros(len(pairs), dtype=torch.float64) for block in candidates}
        places: dict[Tokens, list[int]] = {}
        for place, (context, _) in enumerate(pairs):
            places.setdefault(context, []).append(place)
        questions = [(context, tuple(pairs[place][1] for place in same)) for context, same in places.items()]
        where = list(places.values())
        for members in by_length(questions, self.batch_size):
            batch = Answers([questions[member] for member in members])
            stack = batch.stack(self.backbone)
            here = [place for member in members for place in where[member]]
            hidden = stack.embedded
            for place, block in enumerate(kept):
                if block in found:
                    without = stack.run(hidden, kept[place + 1 :])
                    found[block][here] = batch.likelihood(stack, without)
                hidden = stack.run(hidden, [block])
        return found


Question = tuple[Tokens, tuple[Tokens, ...]]
"""A context, and the answers to it that are scored, each of at least one token."""


def by_length(questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first, so that memory trouble comes at once."""

    def tokens(index: int) -> int:
        context, answers = questions[index]
        return len(context) + sum(map(len, answers))

    order = sorted(range(len(questions)), key=tokens, reverse=True)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


class Answers:
    """Questions as one batch: a row has a context once, and behind it its answers, which do not see each other.

    Rows are padded on the right, where causal attention does not look.

    Args:
        questions: B contexts with their answers.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        rows, positions, parts = [], [], []
        self._counts = []
        places = []
        for row, (context, answers) in enumerate(questions):
            ids, position, part = [*context], [*range(len(context))], [0] * len(context)
            for number, answer in enumerate(answers, start=1):
                # An answer's first token is predicted from the context's last one, its others from those before them.
                columns = [len(context) - 1, *range(len(ids), len(ids) + len(answer) - 1)]
                places += [(row, column, token) for column, token in zip(columns, answer, strict=True)]
                self._counts.append(len(answer))
                ids += answer[:-1]
                position += range(len(context), len(context) + len(answer) - 1)
                part += [number] * (len(answer) - 1)
            rows.append(ids)
            positions.append(position)
            parts.append(part)
        self.ids, self._positions, self._parts = (padded(values) for values in (rows, positions, parts))
        self._row, self._column, self._target = torch.tensor(places).T
        self._alone = all(len(answers) == 1 for _, answers in questions)

    def stack(self, backbone: CausalLM) -> Stack:
        """The backbone's blocks for this batch.

        Raises:
            UserError: an attention that takes no mask of our own.
        """
        device = backbone.device
        stack = Stack(backbone, self.ids.to(device))
        if not self._alone:
            positions = self._positions.to(device)
            stack.arguments |= {
                "attention_mask": self._mask(backbone, stack.embedded),
                "position_ids": positions,
                "position_embeddings": stack.decoder.rotary_emb(stack.embedded, position_ids=positions),
            }
        return stack

    def _mask(self, backbone: CausalLM, like: Tensor) -> Tensor:
        """(B, 1, S, S): a token sees the context and its own answer, up to itself."""
        parts = self._parts
        seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
        seen = seen.tril().unsqueeze(1).to(like.device)
        implementation = backbone.config._attn_implementation
        if implementation == "sdpa":
            return seen
        if implementation == "eager":
            return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, torch.finfo(like.dtype).min)
        raise UserError(f"omission sets: answers are scored with attention sdpa or eager, not {implementation}")

    def likelihood(self, stack: Stack, hidden: Tensor) -> Tensor:
        """Mean log-likelihood of each answer's tokens, nats.

        Args:
            stack: from `stack`.
            hidden: (B, S, H), the last block's output.

        Returns:
            One per answer, question by question, float64 on the host.
        """
        device = hidden.device
        logits = stack.logits(hidden[self._row.to(device), self._column.to(device)]).float()
        scores = -cross_entropy(logits, self._target.to(device), reduction="none").double().cpu()
        return torch.stack([answer.mean() for answer in scores.split(self._counts)])


def outputs_without(stack: Stack, sets: Sequence[Sequence[int]]) -> list[Tensor]:
    """Last states (B, S, H) without each set of blocks; what sets have in common at their beginning runs once."""
    ways = [(stack.embedded, list(range(len(sets))))]
    for block in range(len(stack)):
        further = []
        for hidden, members in ways:
            running = [member for member in members if block not in sets[member]]
            skipping = [member for member in members if block in sets[member]]
            if skipping:
                further.append((hidden, skipping))
            if running:
                further.append((stack.run(hidden, [block]), running))
        ways = further
    last = {member: hidden for hidden, members in ways for member in members}
    return [last[member] for member in range(len(sets))]
