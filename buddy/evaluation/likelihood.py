"""How likely held-out text is under a routed model, and how near it stays to the whole one: sharper than accuracy.

Of every item's continuation, token by token: the NLL under the routed model, in nats; KL(whole || routed) of the
next-token distributions, in nats; and whether both have the same most likely token. The *whole* model is the backbone at
full depth without LoRA. An item's value is the mean over its tokens.

Each token is scored under the route that decoding would have given it, in one pass over prompt and continuation:

- ``recompute``: the engine's causal form; the prompt shares a route, then each token has its own.
- ``reuse``: the prompt's route is kept.

A gated policy (FiRST) routes once, by the prompt alone, so both are the same for it, as they are for every policy whose
route does not change; and where a sequence keeps one route, the K/V of skipped blocks are read by nothing, so the K/V
policies are the same as well. What is the same is computed once.

The ``metrics`` of a record of kind ``likelihood``:

- ``datasets``: by name ``rows`` (which), ``n``, ``sha256`` of the items, ``places`` (rows or windows), ``tokens`` scored
  per item, ``whole_nll`` per item, ``executed`` (mean blocks per item), ``paths`` (different routes per item, the
  prompt's included), ``distinct_paths`` and ``distinct_paths_over_prompts`` (among all items, and among their prompts),
  and ``nll``, ``kl`` and ``agreement``: mean, low, high (95 % interval over resampled items) and values per item.
- ``average`` over the data sets, each counting alike: mean, low and high of ``nll``, ``kl`` and ``agreement``.
- of all items: ``tokens`` scored, ``executed_mean``, ``executed_min`` and ``executed_max`` over the steps of decoding,
  ``distinct_paths``, ``distinct_paths_over_prompts``, ``changed_steps_mean`` (share of steps on another route than the
  one before).
- ``kv``, ``decode``, ``items`` (asked of each data set) and ``max_length``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from buddy.evaluation import traces
from buddy.evaluation.passages import Passage, Passages
from buddy.resampling import INTERVAL_RESAMPLES, estimate
from buddy.routing.engine import Routing, routed
from buddy.routing.model import RoutedModel
from buddy.routing.types import CausalLM
from buddy.settings import Likelihood

MEASURES = ("nll", "kl", "agreement")
LOGITS_AT_ONCE = 2**24
"""Logits made at a time: 64 MB in float32, of which the whole model and each mode have a copy or two."""
DIGITS = 6
"""Decimals that a record keeps of a value."""


class Mode(NamedTuple):
    """How a response is routed: fraction of blocks, K/V of skipped blocks, ``recompute`` or ``reuse``, and the bound on
    what a step of the batch calls (`RoutedModel.generate`), with which an item's score depends on the items beside it."""

    budget: float
    kv: str
    decode: str
    slack: int | None = None


@dataclass(frozen=True)
class Score:
    """One item in one mode.

    Attributes:
        nll: minus the mean log-probability of the continuation's tokens, nats.
        kl: mean divergence from the whole model's next-token distributions, nats.
        agreement: share of the tokens at which both would choose the same one greedily.
        whole_nll: ``nll`` of the whole model.
        routes: boolean (scored tokens, L): that of the prompt, which gives the first token, then that of each decode step.
    """

    nll: float
    kl: float
    agreement: float
    whole_nll: float
    routes: Tensor


def modes(budgets: Sequence[float], settings: Likelihood) -> list[Mode]:
    """Every combination of depth, K/V policy and decode mode that is scored."""
    return [Mode(budget, kv, decode) for budget in budgets for kv in settings.kv for decode in settings.decode]


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    model: RoutedModel, whole: CausalLM, passages: Sequence[Passage], wanted: Sequence[Mode], batch_size: int = 8
) -> dict[Mode, list[Score]]:
    """Score items in every mode; the whole model takes each item once.

    Args:
        model: the run, in evaluation mode.
        whole: the backbone without LoRA, in evaluation mode; the model's own where it has none.
        passages: the items; those of like length share a batch.
        wanted: budgets, K/V policies and decode modes.
        batch_size: items per pass.

    Returns:
        In each mode a score per item, in the order given.
    """
    order = sorted(range(len(passages)), key=lambda place: -len(passages[place].tokens))  # trouble comes at once
    found: dict[Mode, dict[int, Score]] = {mode: {} for mode in wanted}
    with tqdm(total=len(order), desc=f"scoring {len(wanted)} modes", unit="item") as bar:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = Batch.of([passages[place] for place in places], model.device)
            for mode, scores in _scored(model, whole, batch, wanted).items():
                found[mode].update(zip(places, scores, strict=True))
            bar.update(len(places))
    return {mode: [scores[place] for place in range(len(passages))] for mode, scores in found.items()}


@dataclass(frozen=True)
class Batch:
    """Items padded on the right; the last token of each is predicted and not read.

    Attributes:
        ids: (B, S) int64.
        mask: (B, S) int64, 1 for real tokens.
        prompt: (B, S) boolean, the tokens that the policy reads before it decides.
        scored: (B, S) boolean, where a token of the continuation is predicted: at the end of the prompt, and after.
        targets: (N,) int64, those tokens, in the order of ``scored``.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor
    scored: Tensor
    targets: Tensor

    @classmethod
    def of(cls, passages: Sequence[Passage], device: torch.device) -> Batch:
        """Pad these items."""
        read = torch.tensor([[len(passage.tokens) - 1] for passage in passages])
        prompt = torch.tensor([[passage.prompt] for passage in passages])
        columns = torch.arange(int(read.max()))
        ids = nn.utils.rnn.pad_sequence([torch.tensor(passage.tokens[:-1]) for passage in passages], batch_first=True)
        targets = [token for passage in passages for token in passage.tokens[passage.prompt :]]
        mask = columns < read
        parts = (ids, mask.long(), columns < prompt, mask & (columns >= prompt - 1), torch.tensor(targets))
        return cls(*(part.to(device) for part in parts))

    def rows(self, chosen: Tensor) -> Batch:
        """Some of the items, given by a boolean (B,), with no more padding than they need."""
        width = int(self.mask[chosen].sum(1).max())
        own = self.scored.nonzero()[:, 0]
        ids, mask, prompt, scored = (part[chosen, :width] for part in (self.ids, self.mask, self.prompt, self.scored))
        return Batch(ids, mask, prompt, scored, self.targets[chosen[own]])


@dataclass(frozen=True)
class Pass:
    """What a pass over a batch left: last states (N, H) where tokens are scored, and their routes (N, L), on the CPU."""

    states: Tensor
    routes: Tensor


def _scored(model: RoutedModel, whole: CausalLM, batch: Batch, wanted: Sequence[Mode]) -> dict[Mode, list[Score]]:
    """The scores of one batch in every mode."""
    told = _states(whole, batch)
    passes = {
        mode: one
        for budget in dict.fromkeys(mode.budget for mode in wanted)
        for mode, one in _passes(model, batch, [mode for mode in wanted if mode.budget == budget])
    }
    distinct = list({id(one): one for one in passes.values()}.values())
    own, measured = _compared(
        whole.get_output_embeddings(),
        told,
        model.backbone.get_output_embeddings(),
        [one.states for one in distinct],
        batch.targets,
    )
    lengths = batch.scored.sum(1).tolist()
    items = {id(one): _items(values, own, one.routes, lengths) for one, values in zip(distinct, measured, strict=True)}
    return {mode: items[id(one)] for mode, one in passes.items()}


def _states(whole: CausalLM, batch: Batch) -> Tensor:
    """(N, H): the whole model's last states where tokens are scored."""
    output = whole.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    states: Tensor = output.last_hidden_state[batch.scored]
    return states


def _passes(model: RoutedModel, batch: Batch, wanted: Sequence[Mode]) -> Iterator[tuple[Mode, Pass]]:
    """Every mode of one budget with its pass; modes that must agree share one.

    Under a bound each mode has a pass of its own. Without one, routes come from K/V of blocks that always run, so no K/V
    policy changes them. Where a sequence keeps one route, a block that it skips is never run for it, so nothing reads what
    stands for that block's K/V.
    """
    anew: dict[str, Pass] = {}
    kept: Pass | None = None
    for mode in sorted(wanted, key=lambda mode: mode.decode != "recompute"):
        if mode.slack is not None:
            yield mode, _run(model, batch, mode)
            continue
        before = next(iter(anew.values()), None)
        if mode.decode == "recompute":
            if mode.kv not in anew:
                anew[mode.kv] = _run(model, batch, mode) if before is None else _again(model, batch, mode, before)
            yield mode, anew[mode.kv]
        else:
            if kept is None:
                kept = _run(model, batch, mode) if before is None else _again(model, batch, mode, before)
            yield mode, kept


def _again(model: RoutedModel, batch: Batch, mode: Mode, before: Pass) -> Pass:
    """A pass in another mode than ``before``, which had a route per token: for the items whose route changed there; that
    of the others is the same."""
    changes = _changes(batch, before.routes)
    if not changes.any():
        return before
    again = _run(model, batch.rows(changes), mode)
    tokens = changes[batch.scored.nonzero()[:, 0]]
    states, routes = before.states.clone(), before.routes.clone()
    states[tokens], routes[tokens.cpu()] = again.states, again.routes
    return Pass(states, routes)


def _changes(batch: Batch, routes: Tensor) -> Tensor:
    """(B,) boolean: the items whose tokens do not all have the same route (N, L)."""
    rows = batch.scored.nonzero()[:, 0]
    starts = batch.scored.sum(1).cumsum(0) - batch.scored.sum(1)
    other = (routes != routes[starts.cpu()][rows.cpu()]).any(1).to(rows.device)
    return torch.zeros(len(batch.ids), device=rows.device).index_add(0, rows, other.float()) > 0


def _run(model: RoutedModel, batch: Batch, mode: Mode) -> Pass:
    """One routed pass over a batch."""
    # A kept route is the prompt's for all tokens: the form of one route per sequence runs no block that the sequence skips.
    form, every = ("causal", 1) if mode.decode == "recompute" else ("sequence", 0)
    routing = Routing(model.policy, mode.budget, every, form, mode.kv, batch.prompt, slack=mode.slack)
    with routed(model.backbone, routing):
        output = model.backbone.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    routes = torch.stack(routing.trace.steps, 1).expand(-1, batch.ids.shape[1], -1)
    return Pass(output.last_hidden_state[batch.scored], routes[batch.scored.cpu()])


def _compared(
    whole_head: nn.Linear, told: Tensor, head: nn.Linear, states: Sequence[Tensor], targets: Tensor
) -> tuple[Tensor, Tensor]:
    """What follows from last states, a part of the tokens at a time, so that few logits exist at once.

    Args:
        whole_head, told: the whole model's head and states (N, H).
        head, states: the routed model's, states (N, H) per pass.
        targets: (N,), the tokens that follow.

    Returns:
        The whole model's NLL (N,), and per pass NLL, KL and agreement (passes, 3, N); float64 on the CPU.
    """
    size = max(LOGITS_AT_ONCE // head.out_features, 1)
    own = torch.zeros(len(targets), dtype=torch.float64)
    found = torch.zeros(len(states), len(MEASURES), len(targets), dtype=torch.float64)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        token = targets[part].unsqueeze(-1)
        whole = whole_head(told[part]).float().log_softmax(-1)
        likely, greedy = whole.exp(), whole.argmax(-1)
        own[part] = -whole.gather(-1, token).squeeze(-1).cpu()
        for place, one in enumerate(states):
            logs = head(one[part]).float().log_softmax(-1)
            nll = -logs.gather(-1, token).squeeze(-1)
            divergence = (likely * (whole - logs)).sum(-1).clamp(min=0)  # rounding may take it below
            found[place, :, part] = torch.stack([nll, divergence, (logs.argmax(-1) == greedy).float()]).double().cpu()
    return own, found


def _items(measured: Tensor, own: Tensor, routes: Tensor, lengths: list[int]) -> list[Score]:
    """Means of tokens (3, N), and the whole model's NLL (N,), item by item."""
    scores = []
    for one, whole, ran in zip(measured.split(lengths, 1), own.split(lengths), routes.split(lengths), strict=True):
        nll, kl, agreement = one.mean(1).tolist()
        scores.append(Score(nll, kl, agreement, whole.mean().item(), ran))
    return scores


# ---- what it says ----------------------------------------------------------------------------------------------------


def summary(sets: Sequence[Passages], scores: Sequence[Score], mode: Mode, settings: Likelihood) -> dict[str, Any]:
    """The metrics of a record.

    Args:
        sets: the data sets.
        scores: of all their items, in order.
        mode: how they were scored.
        settings: the section `likelihood` of the study.
    """
    found, start = {}, 0
    for one in sets:
        found[one.name] = _of_set(one, scores[start : start + len(one.items)])
        start += len(one.items)
    ran = traces.summary([score.routes for score in scores], round(mode.budget * scores[0].routes.shape[1]))
    return {
        "datasets": found,
        "average": {name: interval([one[name]["values"] for one in found.values()]) for name in MEASURES},
        "tokens": sum(len(score.routes) for score in scores),
        **{name: ran[name] for name in ("executed_mean", "executed_min", "executed_max", "changed_steps_mean")},
        **_paths(scores),
        **{"kv": mode.kv, "decode": mode.decode, "items": settings.items, "max_length": settings.max_length},
    }


def _of_set(passages: Passages, scores: Sequence[Score]) -> dict[str, Any]:
    """One data set's part of a record."""
    values = {name: [round(getattr(score, name), DIGITS) for score in scores] for name in MEASURES}
    return {
        "rows": passages.rows,
        "n": len(scores),
        "sha256": passages.sha256,
        "places": [passage.place for passage in passages.items],
        "tokens": [passage.scored for passage in passages.items],
        "whole_nll": [round(score.whole_nll, DIGITS) for score in scores],
        "executed": [round(score.routes.sum(1).double().mean().item(), DIGITS) for score in scores],
        "paths": [len(_distinct([score.routes])) for score in scores],
        **_paths(scores),
        **{name: {**interval([found]), "values": found} for name, found in values.items()},
    }


def interval(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """``mean`` over data sets, ``low`` and ``high``: its 95 % interval over items resampled within each."""
    found = estimate([np.asarray(values) for values in groups], INTERVAL_RESAMPLES)
    return {"mean": found.value, "low": found.low, "high": found.high}


def _paths(scores: Sequence[Score]) -> Mapping[str, int]:
    return {
        "distinct_paths": len(_distinct([score.routes for score in scores])),
        "distinct_paths_over_prompts": len(_distinct([score.routes[:1] for score in scores])),
    }


def _distinct(routes: Sequence[Tensor]) -> set[tuple[bool, ...]]:
    """The different rows of several (n, L)."""
    return {tuple(route) for one in routes for route in one.unique(dim=0).tolist()}
