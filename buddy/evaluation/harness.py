"""A routed model as a language model of lm-evaluation-harness, registered as ``buddy``.

What is scored is what is claimed: every request runs through the policy, and the count of executed blocks is kept
beside the scores. The route of a multiple-choice request is read from its context alone, under its mask, so that no
answer chooses the path it is scored on; of contexts that differ by option, from what they share
(`buddy.evaluation.questions`), so that all options of a question are scored by one network.

Everything else is the harness's own model for Hugging Face: generation options, stop sequences, chat templates, the token
that begins a text, length limits. At budget 1 it scores and generates what that one does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from buddy.errors import UserError
from buddy.evaluation.questions import Question, Read, asked_by, differing, reads
from buddy.routing.model import RoutedModel
from buddy.routing.padding import leading, padded
from buddy.runs import load

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts (None for a window of a longer one), and the tokens of context and answer."""


class Asked(NamedTuple):
    """A request in tokens.

    Attributes:
        context, answer: its tokens.
        read: what the policy reads of the context.
        question: to which it belongs.
    """

    context: list[int]
    answer: list[int]
    read: Read
    question: Question


@dataclass
class Tally:
    """What ran for the requests of a task.

    Attributes:
        blocks, passes: blocks executed by the sequences of all passes, and how many sequences those were.
        routes: the question and the route of each sequence, as the context had it.
    """

    blocks: int = 0
    passes: int = 0
    routes: list[tuple[Question, bytes]] = field(default_factory=list)

    @property
    def executed_mean(self) -> float:
        """Mean number of blocks that a sequence executed in a pass."""
        return self.blocks / max(self.passes, 1)

    @property
    def differing(self) -> float:
        """Share of the questions whose options took more than one route."""
        return differing(self.routes)


@register_model("buddy")
class BuddyLM(HFLM):
    """Scores and generates at one budget.

    Once this module is imported, lm-eval knows it by name: ``simple_evaluate(model="buddy", model_args="run=PATH,budget=0.75")``.

    Args:
        run: a `RoutedModel`, or the path of a run or a backbone.
        budget: fraction of blocks; 1 runs them all; ``auto`` and ``auto:PRICE`` leave it to the run's budget predictor.
        decode: ``recompute``, ``reuse`` or a number of steps, for tasks that generate.
        slack: blocks that a step of a batch may call beyond those that its deepest sequence runs; None leaves sequences
            independent (`RoutedModel.generate`). With it, what an item gets depends on which others share its batch.
        routing: how answers and texts are scored. ``sequence``: the context's route holds for the answer too. ``causal``:
            each token of the answer has the route that decoding it would have had.
        batch_size: sequences per pass.
        max_length: longest input, tokens; longer contexts lose their beginning, with a warning. The backbone's own limit
            by default.
        add_bos_token, prefix_token_id, think_end_token, enable_thinking, chat_template_args: as for lm-eval's ``hf``.
        load_settings: passed to `buddy.load` when ``run`` is a path.

    Raises:
        UserError: the run cannot be loaded, or its tokenizer has no token to begin a text with.
    """

    def __init__(
        self,
        run: RoutedModel | str,
        budget: float | str = 1.0,
        decode: str | int = "recompute",
        slack: int | str | None = None,
        routing: str = "sequence",
        batch_size: int | str = 16,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **load_settings: Any,
    ) -> None:
        load_settings.pop("max_batch_size", None)
        model = run if isinstance(run, RoutedModel) else load(run, **load_settings)
        harness = logging.getLogger(HFLM.__module__)
        level = harness.level
        harness.setLevel(logging.ERROR)  # it warns that options of loading are ignored: the model is loaded already
        try:
            super().__init__(
                model.backbone,
                backend="causal",
                tokenizer=model.tokenizer,
                batch_size=int(batch_size) if str(batch_size).isdigit() else 16,
                max_length=max_length,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
                think_end_token=think_end_token,
                enable_thinking=enable_thinking,
                chat_template_args=chat_template_args,
            )
        finally:
            harness.setLevel(level)
        if self.prefix_token_id is None:
            raise UserError(
                "tokenizer: it has neither a bos nor an eos token to begin a text with; give prefix_token_id"
            )
        self._model = model  # what the harness calls from here on
        self.budget = budget if str(budget).startswith("auto") else float(budget)
        self.decode = int(decode) if str(decode).isdigit() else decode
        self.slack = None if slack is None else int(slack)
        self.routing = routing
        self.reset_count()

    @property
    def _depth(self) -> str:
        return self.budget if isinstance(self.budget, str) else f"{self.budget:.3g}"

    def reset_count(self) -> None:
        """Forget the blocks counted so far."""
        self.all = Tally()
        self.tallies: dict[str, Tally] = {}
        self._questions: list[Question] = []

    @property
    def executed_mean(self) -> float:
        """Mean number of blocks that a sequence executed in a pass, since `reset_count`."""
        return self.all.executed_mean

    def _count(self, rows: Sequence[Asked] = ()) -> None:
        """Count what ran in the last pass: for all, and by task for the ``rows`` of a batch of requests."""
        executed = self.model.trace.executed()
        self.all.blocks += int(executed.sum())
        self.all.passes += executed.numel()
        for number, row in enumerate(rows):
            tally = self.tallies.setdefault(row.question.task, Tally())
            tally.blocks += int(executed[:, number].sum())
            tally.passes += len(executed)
            tally.routes.append((row.question, self.model.trace.steps[0][number].numpy().tobytes()))

    def get_model_info(self) -> dict[str, Any]:
        """What of the model the harness notes beside its results; nothing is looked up on the Hub."""
        return {"model_num_parameters": self.model.backbone.num_parameters(), "model_dtype": self.model.dtype}

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of like length, the longest first, so that memory trouble comes at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's answer, nats, and whether it is the greedy one; a route per question."""
        self._questions = asked_by(requests)
        try:
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._questions = []
        return found

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        self._check_lengths(requests)
        questions = self._questions or [Question("", place) for place in range(len(requests))]
        contexts, answers = [one[1] for one in requests], [one[2] for one in requests]
        asked = list(map(Asked, contexts, answers, reads(questions, contexts, answers, self.max_length), questions))
        # Answers of one token share their input (BoolQ's yes and no): one pass scores them all.
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, one in enumerate(asked):
            shared.setdefault((len(one.context), *one.read, *one.context, *one.answer[:-1]), []).append(i)
        groups = list(shared.values())
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc=f"scoring at {self._depth}", disable=disable_tqdm) as bar:
            for batch in self._batches([len(contexts[group[0]]) + len(answers[group[0]]) for group in groups]):
                members = [groups[i] for i in batch]
                scores = self._score([[asked[i] for i in group] for group in members])
                for i, score in zip((i for group in members for i in group), scores, strict=True):
                    results[i] = score
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], score)
                bar.update(sum(map(len, members)))
        return results

    def _check_lengths(self, requests: list[Request]) -> None:
        """Say how many requests lose their beginning.

        Raises:
            UserError: an answer that has no token, or more than the model can take in.
        """
        over = []
        for texts, context, answer in requests:
            if not answer or len(answer) > self.max_length:
                shown = f" {texts[1]!r}" if texts is not None else ""
                raise UserError(
                    f"answer{shown:.60}: {len(answer)} tokens; it needs 1 to {self.max_length}, the longest input"
                )
            over.append(len(context) + len(answer) - self.max_length - 1)
        longer = [tokens for tokens in over if tokens > 0]
        if longer:
            log.warning(
                "%d of %d requests are longer than %d tokens and are cut from the left, by %d tokens at most",
                *(len(longer), len(requests), self.max_length, max(longer)),
            )

    @torch.no_grad()
    def _score(self, groups: list[list[Asked]]) -> list[tuple[float, bool]]:
        """Score requests: log-likelihood in nats of each answer, and whether it is the greedy one.

        Args:
            groups: requests that differ at most in their answer's last token, and so share one row of the batch.
        """
        rows = [group[0] for group in groups]
        inputs = [(row.context + row.answer)[-(self.max_length + 1) : -1] for row in rows]
        answer_length = [len(row.answer) for row in rows]
        longest = max(map(len, inputs))
        ids = torch.full((len(inputs), longest), self.tokenizer.pad_token_id)
        mask, context = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(inputs):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            context[i, self._readable(rows[i], len(row))] = True
        # Only the answers' logits are needed; the head over a large vocabulary is a good part of a small model.
        starts = [max(len(row) - n, 0) for row, n in zip(inputs, answer_length, strict=True)]
        first, device = min(starts), self.model.device
        logits = self.model(
            ids.to(device),
            mask.to(device),
            budget=self.budget,
            slack=self.slack,
            routing=self.routing,
            context_mask=context.to(device),
            logits_to_keep=torch.arange(first, longest, device=device),
        ).logits
        self._count(rows)
        return [
            _answer_score(logits[i, starts[i] - first :], one.answer) for i, group in enumerate(groups) for one in group
        ]

    def _readable(self, row: Asked, taken: int) -> slice:
        """What the policy reads of the last ``taken`` tokens of a request, its answer's last one left out.

        In the causal form these are the prompt, whose tokens share a route: it begins with the first token, and has one.
        """
        cut = len(row.context) + len(row.answer) - 1 - taken
        first, last = max(row.read.first - cut, 0), max(row.read.last - cut, 0)
        return slice(0, max(last, 1)) if self.routing == "causal" else slice(first, last)

    @torch.no_grad()
    def routes(self, contexts: Sequence[Sequence[int]]) -> list[bytes]:
        """The route that each context would have by itself at the budget in force, as a prefill chooses it.

        Args:
            contexts: token ids, N of them; of one that is too long the end counts.
        """
        cut = [list(context)[-self.max_length :] for context in contexts]
        found = [b""] * len(cut)
        for batch in self._batches([*map(len, cut)]):
            ids = padded([cut[i] for i in batch])
            mask = leading([len(cut[i]) for i in batch], ids.shape[1]).long()
            self.model(ids.to(self.model.device), mask.to(self.model.device), budget=self.budget, logits_to_keep=1)
            for number, i in enumerate(batch):
                found[i] = self.model.trace.steps[0][number].numpy().tobytes()
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats, in windows of at most `max_length` tokens.

        The first token is scored after the one that begins a text. A tokenizer that adds that token by itself does not do
        so here, or it would stand there twice (lm-eval's ``hf`` scores such a text so with ``add_bos_token=False``).
        """
        results = []
        for (text,) in (request.args for request in requests):
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(None, c, a) for c, a in windows], disable_tqdm=disable_tqdm)
            results.append(sum(score for score, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts generated until a stop string, as lm-eval's ``hf`` generates them.

        Raises:
            UserError: so many new tokens are asked for that no prompt has room beside them; an option of generation that
                does not work with routing.
        """
        for request in requests:
            new = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if not 0 < new < self.max_length:
                raise UserError(
                    f"max_gen_toks: {new} leaves no room for prompt and answer in a context of {self.max_length} tokens"
                )
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        """Tokens (B, S + new) of a batch of prompts, padded left."""
        ids: Tensor = super()._model_generate(
            context, max_length, stop, budget=self.budget, decode=self.decode, slack=self.slack, **settings
        )
        self._count()
        return ids


def _answer_score(logits: Tensor, answer: list[int]) -> tuple[float, bool]:
    """Score one answer from the logits (S, V) that start where its first token is predicted."""
    target = torch.tensor(answer, device=logits.device)
    predicted = logits[: len(answer)].float().log_softmax(-1)
    greedy = bool((predicted.argmax(-1) == target).all())
    return predicted.gather(-1, target.unsqueeze(-1)).sum().item(), greedy
