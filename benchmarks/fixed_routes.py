#!/usr/bin/env python3
"""Is choosing by the input worth it? A run of BUDDY against every fixed route that its training knew, on held-out items.

    python benchmarks/fixed_routes.py RUN --record TRAINING.json --data DIR[,DIR...] [--removed 8] [--items 100] [--json]

Same weights (LoRA included), same items, same depth: loss per token of each continuation along the routes that the router
chooses from the prompt, along every removal order of the pool that the tuned recipe searched, along the router's most
frequent route, and along the best of all these for each item (the oracle, which nobody can choose). Differences are
paired by item, with 95 % intervals over items resampled within data sets. TRAINING.json is the run's training record.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import buddy
from buddy.evaluation import passages
from buddy.policies.buddy import BuddyPolicy
from buddy.resampling import estimate
from buddy.study.records import Record
from buddy.training import router
from buddy.training.orders import route
from buddy.training.routes import Loss, measure


@torch.no_grad()
def compared(run: Path, record: Path, folders: list[Path], removed: int, items: int, loss: Loss) -> dict[str, Any]:
    """Everything that is printed."""
    model = buddy.load(run)
    model.backbone.requires_grad_(False)
    sets = [passages.read(folder, model.tokenizer, items, 256, model.origin.info.training) for folder in folders]
    rows = [{"input_ids": item.tokens, "prompt_length": item.prompt} for one in sets for item in one.items]
    sizes = [len(one.items) for one in sets]
    policy = model.policy
    assert isinstance(policy, BuddyPolicy)
    chosen = router.taken(policy, router.read(model.backbone, policy, rows, 8), [removed])[:, 0]
    orders = Record.read(record).metrics["router"]["orders"]
    fixed = {name: route(order, removed, model.blocks) for name, order in orders.items()}
    counts = Counter(tuple(row) for row in chosen.tolist())
    fixed["most frequent"] = torch.tensor(counts.most_common(1)[0][0])
    routes = torch.stack([chosen, *(one.expand(len(rows), -1) for one in fixed.values())], 1)
    with tqdm(total=len(rows), desc=f"losses along {routes.shape[1]} routes", unit="item") as bar:
        losses = measure(model.backbone, rows, routes, loss, bar=bar)
    groups = losses.split(sizes)
    best = 1 + int(torch.stack([group.mean(0) for group in groups]).mean(0)[1:].argmin())
    return {
        "run": str(run), "removed": removed, "loss": loss, "items": dict(zip((f.name for f in folders), sizes, strict=True)),
        "paths": len(counts),
        "paths_by_set": [len({tuple(row) for row in part.tolist()}) for part in chosen.split(sizes)],
        "chosen": _estimate([group[:, 0] for group in groups]),
        "fixed": {name: _estimate([group[:, place] for group in groups]) for place, name in enumerate(fixed, start=1)},
        "best_fixed": [*fixed][best - 1],
        "chosen_minus_best_fixed": _estimate([group[:, 0] - group[:, best] for group in groups]),
        "oracle_minus_best_fixed": _estimate([group.min(1).values - group[:, best] for group in groups]),
        "by_set": [_estimate([group[:, 0] - group[:, best]]) for group in groups],
    }  # fmt: skip


def _estimate(groups: list[Tensor]) -> dict[str, float]:
    found = estimate([group.numpy() for group in groups])
    return {"mean": found.value, "low": found.low, "high": found.high}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--record", type=Path, required=True, help="its training record")
    parser.add_argument("--data", required=True, help="data set folders, by commas")
    parser.add_argument("--removed", type=int, default=8, help="blocks left out (default: 8)")
    parser.add_argument("--items", type=int, default=100, help="of each data set (default: 100)")
    parser.add_argument(
        "--loss", choices=("ce", "kl"), default="ce", help="NLL, or divergence from the same weights whole"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    folders = [Path(part) for part in given.data.split(",")]
    found = compared(given.run, given.record, folders, given.removed, given.items, given.loss)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.run}: {given.removed} blocks removed, {sum(found['items'].values())} items, nats per token")
    for name, value in (
        ("router", found["chosen"]),
        *(("fixed " + name, value) for name, value in found["fixed"].items()),
    ):
        print(f"  {name:24} {_text(value)}")
    print(f"  {'router - best fixed':24} {_text(found['chosen_minus_best_fixed'])}   ({found['best_fixed']})")
    print(f"  {'oracle - best fixed':24} {_text(found['oracle_minus_best_fixed'])}")
    for folder, value, paths in zip(folders, found["by_set"], found["paths_by_set"], strict=True):
        print(f"    {folder.name:22} {_text(value)}   {paths} paths")


def _text(value: dict[str, float]) -> str:
    return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"


if __name__ == "__main__":
    main()
