#!/usr/bin/env python3
"""How far are benchmark contexts from what a router is trained on? Read with the prompts' template, without it, and mixed.

    python benchmarks/templates.py BACKBONE --data DIR [--prompts 512] [--items 200] [--json]

BACKBONE is a folder or a name as for `buddy train`; DIR holds data sets made by `buddy data`: alpaca, and any multiple-choice
tasks. A row per way of training: what the router reads of Alpaca's prompts is all of them (prompt), what is not the
template (question), or all of them with every second prompt asked without the template (mixed). A column per task: the mean
distance of its contexts, as in accuracy records; and of whole Alpaca prompts, as they are timed and traced.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from buddy import runs
from buddy.commands._common import backbone_folder
from buddy.data import inputs
from buddy.data.choices import item_of
from buddy.data.tasks import STOCK, tasks
from buddy.data.templates import Example
from buddy.evaluation.distance import distances
from buddy.policies.buddy import BuddyPolicy
from buddy.routing import kv
from buddy.routing.model import RoutedModel
from buddy.training import prompts
from buddy.training.examples import encode


def bare(example: Example) -> Example:
    """The same example, asked in its own words alone."""
    own = "\n".join(example.prompt[start:end] for start, end in example.own)
    return Example(own or example.prompt, example.response, example.ends)


def measured(backbone: Path, data: Path, count: int, items: int) -> dict[str, dict[str, float]]:
    """Distances by way of training, then by task."""
    model, tokenizer = runs.load_backbone(backbone, "auto", "auto")
    names = sorted(name for name in STOCK if name != "gsm8k" and (data / name).is_dir())
    contexts = {}
    for name, task in zip(names, tasks(data, names)[1], strict=True):
        found = [item_of(task, document, tokenizer, 2048).shared for document in list(task.eval_docs)[:items]]
        contexts[name] = [tokens for tokens in found if tokens]
    examples = inputs.training(data / "alpaca")[:count]
    whole = encode(tokenizer, examples, 2048)
    contexts["whole prompts"] = [row["input_ids"][: row["prompt_length"]] for row in whole]
    mixed = [bare(example) if place % 2 else example for place, example in enumerate(examples)]
    ways = {
        "prompt": whole,
        "question": encode(tokenizer, examples, 2048, "question"),
        "mixed": encode(tokenizer, mixed, 2048),
    }
    told: dict[str, dict[str, float]] = {}
    for way, rows in ways.items():
        policy = BuddyPolicy(model.config.num_hidden_layers, kv.width(model), prompts_noted=True).to(model.device)
        prompts.note(model, policy, rows, 8)
        routed = RoutedModel(model, policy, tokenizer=tokenizer)
        told[way] = {}
        for name, tokens in contexts.items():
            away = distances(routed, tokens)
            assert away is not None
            told[way][name] = away.mean().item()
    return told


def table(told: dict[str, dict[str, Any]]) -> str:
    """For people."""
    names = list(next(iter(told.values())))
    lines = ["".join([f"{'':10}", *(f"{name:>15}" for name in names)])]
    lines += ["".join([f"{way:10}", *(f"{found[name]:>15.2f}" for name in names)]) for way, found in told.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=prompts.NOTED)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measured(backbone_folder(given.backbone, option="BACKBONE"), given.data, given.prompts, given.items)
    print(json.dumps(found, indent=1) if given.json else table(found))
