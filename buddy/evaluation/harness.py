"""A routed model as a language model of lm-evaluation-harness, registered as ``buddy``.

What is scored is what is claimed: every request runs through the policy, and the count of executed blocks is kept
beside the scores. The route of a multiple-choice request is read from its context alone, under its mask, so that no
answer chooses the path it is scored on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from buddy.routing.model import RoutedModel
from buddy.runs import load

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("buddy")
class BuddyLM(TemplateLM):
    """Scores and generates at one budget.

    Once this module is imported, lm-eval knows it by name: ``simple_evaluate(model="buddy", model_args="run=PATH,budget=0.75")``.

    Args:
        run: a `RoutedModel`, or the path of a run or a backbone.
        budget: fraction of blocks; 1 runs them all; ``auto`` and ``auto:PRICE`` leave it to the run's budget predictor.
        decode: ``recompute`` or ``reuse``, for tasks that generate.
        slack: blocks that a step of a batch may call beyond those that its deepest sequence runs; None leaves sequences
            independent (`RoutedModel.generate`). With it, what an item gets depends on which others share its batch.
        routing: how answers and texts are scored. ``sequence``: the context's route holds for the answer too. ``causal``:
            each token of the answer has the route that decoding it would have had.
        batch_size: sequences per pass.
        max_length: longest input, tokens; longer contexts lose their beginning. The backbone's own limit by default.
        load_settings: passed to `buddy.load` when ``run`` is a path.
    """

    def __init__(
        self,
        run: RoutedModel | str,
        budget: float | str = 1.0,
        decode: str = "recompute",
        slack: int | str | None = None,
        routing: str = "sequence",
        batch_size: int | str = 16,
        max_length: int | None = None,
        **load_settings: Any,
    ) -> None:
        super().__init__()
        load_settings.pop("max_batch_size", None)
        self.model = run if isinstance(run, RoutedModel) else load(run, **load_settings)
        self.tokenizer = self.model.tokenizer
        self.budget = budget if str(budget).startswith("auto") else float(budget)
        self.decode = decode
        self.slack = None if slack is None else int(slack)
        self.routing = routing
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 16
        self.max_length = int(max_length or min(self.model.config.max_position_embeddings, 4096))
        self.reset_count()

    @property
    def _depth(self) -> str:
        return self.budget if isinstance(self.budget, str) else f"{self.budget:.3g}"

    def reset_count(self) -> None:
        """Forget the blocks counted so far."""
        self._blocks_run, self._passes = 0, 0

    @property
    def executed_mean(self) -> float:
        """Mean number of blocks that a sequence executed in a pass, since `reset_count`."""
        return self._blocks_run / max(self._passes, 1)

    def _count(self) -> None:
        executed = self.model.trace.executed()
        self._blocks_run += int(executed.sum())
        self._passes += executed.numel()

    @property
    def eot_token_id(self) -> int:
        """End-of-sequence token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: the beginning-of-sequence token, or the end's."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless told."""
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special).input_ids

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices in batches of like length, the longest first, so that memory trouble comes at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        # Answers of one token share their input (BoolQ's yes and no): one pass scores them all.
        shared: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, answer) in enumerate(requests):
            shared.setdefault((len(context), *context, *answer[:-1]), []).append(i)
        groups = list(shared.values())
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc=f"scoring at {self._depth}", disable=disable_tqdm) as bar:
            for batch in self._batches([sum(map(len, requests[group[0]][1:])) for group in groups]):
                members = [groups[i] for i in batch]
                scores = self._score([[requests[i][1:] for i in group] for group in members])
                for i, score in zip((i for group in members for i in group), scores, strict=True):
                    results[i] = score
                bar.update(sum(map(len, members)))
        return results

    @torch.no_grad()
    def _score(self, groups: list[list[tuple[list[int], list[int]]]]) -> list[tuple[float, bool]]:
        """Score (context, answer) pairs: log-likelihood in nats of each answer, and whether it is the greedy one.

        Args:
            groups: pairs that differ at most in their answer's last token, and so share one row of the batch.
        """
        inputs = [(context + answer)[-(self.max_length + 1) : -1] for (context, answer), *_ in groups]
        answer_length = [len(group[0][1]) for group in groups]
        longest = max(map(len, inputs))
        ids = torch.full((len(inputs), longest), self.tokenizer.pad_token_id)
        mask, context = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(inputs):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            context[i, : max(len(row) - answer_length[i] + 1, 1)] = True
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
        self._count()
        return [
            _answer_score(logits[i, starts[i] - first :], answer)
            for i, group in enumerate(groups)
            for _, answer in group
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, nats, in windows of at most `max_length` tokens."""
        results = []
        for text in (request.args[0] for request in requests):
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            )
            scored = self._loglikelihood_tokens([(("", ""), c, a) for c, a in windows], disable_tqdm=disable_tqdm)
            results.append(sum(score for score, _ in scored))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts generated until a stop string, greedily unless a request asks for sampling."""
        results = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(i)
        with tqdm(total=len(requests), desc=f"generating at {self._depth}", disable=disable_tqdm) as bar:
            for members in groups.values():
                settings = dict(requests[members[0]].args[1])
                for batch in self._batches([len(requests[i].args[0]) for i in members]):
                    texts = self._generate([requests[members[i]].args[0] for i in batch], dict(settings))
                    for i, text in zip(batch, texts, strict=True):
                        results[members[i]] = text
                    bar.update(len(batch))
        return results

    def _generate(self, prompts: list[str], settings: dict[str, Any]) -> list[str]:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        new = int(settings.pop("max_gen_toks", 256))
        settings.pop("do_sample", None)
        temperature = float(settings.pop("temperature", 0.0) or 0.0)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        )
        rows = [self.tok_encode(prompt)[-(self.max_length - new) :] for prompt in prompts]
        inputs = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        ids: Tensor = self.model.generate(
            inputs["input_ids"].to(self.model.device),
            inputs["attention_mask"].to(self.model.device),
            budget=self.budget,
            decode=self.decode,
            slack=self.slack,
            max_new_tokens=new,
            pad_token_id=self.tokenizer.pad_token_id,
            **({"stop_strings": until, "tokenizer": self.tokenizer} if until else {}),
            **sampling,
        )
        self._count()
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [min((text.split(stop)[0] for stop in until), key=len, default=text) for text in texts]


def _answer_score(logits: Tensor, answer: list[int]) -> tuple[float, bool]:
    """Score one answer from the logits (S, V) that start where its first token is predicted."""
    target = torch.tensor(answer, device=logits.device)
    predicted = logits[: len(answer)].float().log_softmax(-1)
    greedy = bool((predicted.argmax(-1) == target).all())
    return predicted.gather(-1, target.unsqueeze(-1)).sum().item(), greedy
