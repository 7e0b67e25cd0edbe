"""Rewards per second: depths of an example scored together, against one whole pass per example and depth.

    python benchmarks/rollouts.py RUN --data results/demo/data/alpaca [--examples 8] [--group 4]

Prints a line per set of depths: the group that GRPO draws (G depths of the paper's policy, uniform), and the grid of the
tuned recipe. The two ways take turns on the same examples in the same process, and every reward of one is checked
against the other. The naive way is generous: it asks the head about the response alone, as the other does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from buddy import runs
from buddy.evaluation.latency import wait
from buddy.routing.model import RoutedModel
from buddy.training import grpo, predictor, predictor_examples
from buddy.training.depth_losses import Rollouts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of BUDDY")
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument("--examples", type=int, default=8, help="examples per repeat")
    parser.add_argument("--batch", type=int, default=2, help="examples scored together")
    parser.add_argument("--group", type=int, default=4, help="depths drawn for an example")
    parser.add_argument("--max-length", type=int, default=256, help="longest example, tokens")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way; medians are printed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    model = runs.load(options.run, device=options.device)
    rows = predictor_examples.training_rows(options.data, model.tokenizer, options.examples, options.max_length)
    policy: Any = model.policy
    drawn = grpo.draw(torch.zeros(len(rows), policy.blocks - policy.always), options.group, 0, 0) + policy.always + 1
    most = model.origin.info.training.get("most_removed", policy.blocks // 2)
    grid = predictor.depths_of(policy, "tuned", 9, most)
    print(f"{'depths':>22} {'rewards':>8} {'naive /s':>9} {'shared /s':>10} {'ratio':>6} {'largest difference':>19}")
    for name, depths in ((f"{options.group} drawn", drawn.tolist()), (f"grid of {len(grid)}", [grid] * len(rows))):
        print(line(model, rows, depths, name, options.batch, options.repeats), flush=True)


def line(model: RoutedModel, rows: list[Any], depths: list[list[int]], name: str, batch: int, repeats: int) -> str:
    """Time both ways in turns, and compare what they say."""
    seconds: dict[str, list[float]] = {"naive": [], "shared": []}
    for repeat in range(repeats + 1):  # the first one warms up
        found = {}
        for way, score in (("naive", naive), ("shared", shared)):
            wait(model.device)
            start = time.perf_counter()
            found[way] = score(model, rows, depths, batch)
            wait(model.device)
            if repeat:
                seconds[way].append(time.perf_counter() - start)
    difference = (found["naive"] - found["shared"]).abs().max().item()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    assert difference < tolerance, f"the two ways differ by {difference:.4g} nats"
    count = sum(map(len, depths))
    rates = {way: count / statistics.median(times) for way, times in seconds.items()}
    ratio = rates["shared"] / rates["naive"]
    return f"{name:>22} {count:>8} {rates['naive']:>9.2f} {rates['shared']:>10.2f} {ratio:>6.2f} {difference:>19.2e}"


@torch.no_grad()
def naive(model: RoutedModel, rows: list[Any], depths: list[list[int]], batch: int) -> torch.Tensor:
    """One example, one depth, one whole pass at a time."""
    losses = []
    for row, wanted in zip(rows, depths, strict=True):
        ids, first = torch.tensor([row["input_ids"]], device=model.device), row["prompt_length"]
        context = (torch.arange(ids.shape[1]) < first)[None].to(model.device)
        answer = torch.arange(first - 1, ids.shape[1] - 1, device=model.device)
        for depth in wanted:
            budget = depth / model.blocks
            logits = model(ids, budget=budget, context_mask=context, logits_to_keep=answer).logits[0]
            losses.append(cross_entropy(logits.float(), ids[0, first:]).double().cpu())
    return torch.stack(losses).view(len(rows), -1)


def shared(model: RoutedModel, rows: list[Any], depths: list[list[int]], batch: int) -> torch.Tensor:
    """All depths of some examples together."""
    policy: Any = model.policy
    parts = []
    for start in range(0, len(rows), batch):
        part = slice(start, start + batch)
        parts.append(Rollouts(model.backbone, policy, rows[part]).losses(depths[part]))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
