"""Prefill and decode speed, side by side in one process.

Dense is the untouched Hugging Face model; *sliced* has the blocks physically removed and is the limit for its depth;
*reuse* and *recompute* are the routed model. Repeats are interleaved, so that a machine that drifts drifts for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

from buddy.routing.model import RoutedModel
from buddy.routing.sliced import sliced
from buddy.settings import Latency


@dataclass(frozen=True)
class Contender:
    """One thing that is timed: an execution at a depth."""

    execution: str
    removed: int
    begin: Callable[[int], Any]
    """Makes a cache with room for that many tokens."""
    step: Callable[[Tensor, Tensor, Any], Tensor]
    """(new ids (B, S), mask (B, past + S), cache) to logits of the last position (B, V)."""


def contenders(model: RoutedModel, removed: Sequence[int], executions: Sequence[str]) -> list[Contender]:
    """What is timed: dense first, then every execution at every depth."""
    found = [_plain("dense", 0, model.backbone)]
    for count in removed:
        if "sliced" in executions:
            # Which blocks go does not matter for time; the sliced model keeps the first ones and the last.
            kept = [*range(model.blocks - count - 1), model.blocks - 1]
            found.append(_plain("sliced", count, sliced(model.backbone, kept)))
        for decode in ("reuse", "recompute"):
            if decode in executions:
                found.append(_routed(decode, count, model))
    return found


def _plain(execution: str, removed: int, backbone: Any) -> Contender:
    def step(ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        outputs = backbone(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits[:, -1]

    return Contender(execution, removed, lambda _: DynamicCache(config=backbone.config), step)


def _routed(decode: str, removed: int, model: RoutedModel) -> Contender:
    budget = (model.blocks - removed) / model.blocks

    def step(ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        outputs = model(
            ids, mask, budget=budget, decode=decode, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return outputs.logits[:, -1]

    return Contender(decode, removed, model.new_cache, step)


@torch.no_grad()
def time_batch(contender: Contender, ids: Tensor, mask: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of decoding ``new_tokens`` tokens greedily: ids and mask (B, S), padded left."""
    cache = contender.begin(ids.shape[1] + new_tokens)
    _wait(ids)
    start = time.perf_counter()
    token = contender.step(ids, mask, cache).argmax(-1, keepdim=True)
    _wait(ids)
    middle = time.perf_counter()
    for _ in range(new_tokens):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        token = contender.step(token, mask, cache).argmax(-1, keepdim=True)
    _wait(ids)
    return middle - start, time.perf_counter() - middle


def _wait(tensor: Tensor) -> None:
    """GPU work is asynchronous: wait for it before reading the clock."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def batches(
    tokenizer: Any, prompts: Sequence[str], batch_size: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Prompts as (ids, mask) batches, padded left, in the order given."""
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": [tokenizer(prompt).input_ids for prompt in prompts[start : start + batch_size]]}
        padded = tokenizer.pad(rows, padding_side="left", return_tensors="pt")
        found.append((padded["input_ids"].to(device), padded["attention_mask"].to(device)))
    return found


def benchmark(
    model: RoutedModel, prompts: Sequence[str], removed: Sequence[int], settings: Latency, dataset: str
) -> list[tuple[Contender, dict[str, Any]]]:
    """Time every contender on the same prompts.

    Args:
        model: the run to time, in evaluation mode.
        prompts: texts.
        removed: numbers of removed blocks.
        settings: the section `latency` of the study.
        dataset: where the prompts come from, for the record.

    Returns:
        Each contender with the ``metrics`` of its latency record.
    """
    racing = contenders(model, removed, settings.executions)
    work = batches(model.tokenizer, prompts, settings.batch_size, model.device)
    rates: dict[Contender, list[tuple[float, float]]] = {contender: [] for contender in racing}
    peaks: dict[Contender, float | None] = {}
    total = (settings.warmup + settings.repeats) * len(racing)
    with tqdm(total=total, desc=f"latency {dataset}", unit="pass") as bar:
        for repeat in range(-settings.warmup, settings.repeats):
            for contender in racing:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                times = [time_batch(contender, ids, mask, settings.new_tokens) for ids, mask in work]
                if repeat >= 0:
                    rates[contender].append(_rates(work, times, settings.new_tokens))
                    peaks[contender] = _peak_memory_mb()
                bar.update()
    shared = {
        "dataset": dataset,
        "batch_size": settings.batch_size,
        "prompts": len(prompts),
        "prompt_tokens_mean": sum(int(mask.sum()) for _, mask in work) / len(prompts),
        "new_tokens": settings.new_tokens,
        "repeats": settings.repeats,
    }
    return [
        (contender, {**shared, **_metrics(contender, rates), "peak_memory_mb": peaks[contender]})
        for contender in racing
    ]


def _peak_memory_mb() -> float | None:
    """Most GPU memory held since the counter was reset, MB of 2**20 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None


def _rates(
    work: Sequence[tuple[Tensor, Tensor]], times: Sequence[tuple[float, float]], new: int
) -> tuple[float, float]:
    """Tokens per second of one pass over all prompts: prefill (real prompt tokens) and decode."""
    prompt_tokens = sum(int(mask.sum()) for _, mask in work)
    decoded = sum(len(ids) for ids, _ in work) * new
    return prompt_tokens / sum(t for t, _ in times), decoded / sum(t for _, t in times)


def _metrics(contender: Contender, rates: dict[Contender, list[tuple[float, float]]]) -> dict[str, Any]:
    dense = next(c for c in rates if c.execution == "dense")
    limit = next((c for c in rates if c.execution == "sliced" and c.removed == contender.removed), None)
    metrics: dict[str, Any] = {"execution": contender.execution}
    for place, phase in enumerate(("prefill", "decode")):
        values = [rate[place] for rate in rates[contender]]
        median = statistics.median(values)
        metrics[f"{phase}_tok_s"] = {
            "median": median,
            "p10": _quantile(values, 0.1),
            "p90": _quantile(values, 0.9),
            "values": values,
        }
        metrics[f"{phase}_speedup"] = median / statistics.median(rate[place] for rate in rates[dense])
        metrics[f"{phase}_of_sliced"] = (
            median / statistics.median(rate[place] for rate in rates[limit]) if limit is not None else None
        )
    return metrics


def _quantile(values: Sequence[float], q: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()
