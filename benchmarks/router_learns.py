#!/usr/bin/env python3
"""Does a router learn routes that depend on the input? A task whose best routes are known exactly.

    python benchmarks/router_learns.py [--recipe paper|tuned] [--task easy|marker] [--updates 300] [--seed 0] [--json]

A tiny Llama of ten blocks, eight of which may be left out, is pretrained so that two kinds of prompts need different
blocks. The answer is a walk through the alphabet, another one for each kind. A letter's code has four parts, and each
candidate block may write one part alone: blocks 1, 3, 5 and 7 learn them for prompts of the first kind and are silent for
the second, blocks 2, 4, 6 and 8 the reverse. With four blocks left out, all 70 routes are scored for both kinds: the best
fixed route and the oracle (the best route of each kind) are exact. Then the router is trained, the backbone frozen, as
`buddy train` does it, and its routes are scored on fresh prompts.

  easy     the kinds use different letters: every token tells the kind
  marker   the kinds differ in one token of thirteen

``closed`` is the share of the gap between the best fixed route and the oracle that the router closes: 1 is the oracle,
0 the best fixed route, less than 0 is worse than that. An update sees eight examples; the tuned recipe has as many as the
paper's updates would see, and measures 768 of them at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from buddy.backbones.untrained import byte_tokenizer
from buddy.importance import estimate
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.priors import fused
from buddy.routing.engine import Routing, routed
from buddy.settings import Router, Training
from buddy.training import router, sft
from buddy.training.examples import Collator, encode
from buddy.training.recipe import Recipe, drawn

BLOCKS, WIDTH, HEAD = 10, 64, 16
CANDIDATES = range(1, BLOCKS - 1)
OWN = ((1, 3, 5, 7), (2, 4, 6, 8))
"""The blocks that prompts of each kind need."""
REMOVED = 4
LETTERS = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
PROMPT, RESPONSE = 12, 8
BATCH = 8
VALUE_RMS = 0.046
"""Of the first block's values: SmolLM2-135M's."""
TOKENIZER = byte_tokenizer()


@dataclass(frozen=True)
class Task:
    """Pairs of prompt and response of two kinds.

    Attributes:
        name: ``easy`` or ``marker``.
        walks: for each kind the letter that follows each letter.
    """

    name: str
    walks: tuple[Sequence[int], Sequence[int]]

    @classmethod
    def of(cls, name: str, seed: int) -> Task:
        """A task whose walks are drawn by a seed; each goes once through the alphabet."""
        walks = []
        for kind in (0, 1):
            order = random.Random(1000 * seed + kind).sample(range(26), 26)
            walks.append([order[(order.index(letter) + 1) % 26] for letter in range(26)])
        return cls(name, (walks[0], walks[1]))

    def pair(self, kind: int, rng: random.Random) -> tuple[str, str]:
        """A random prompt of that kind, and its response."""
        alphabet = LETTERS[kind if self.name == "easy" else 0]
        head = str(kind) if self.name == "marker" else "0"
        prompt = [rng.randrange(26) for _ in range(PROMPT - 1)]
        response, letter = [], prompt[-1]
        for _ in range(RESPONSE):
            letter = self.walks[kind][letter]
            response.append(letter)
        return head + "".join(alphabet[i] for i in prompt), "".join(alphabet[i] for i in response)

    def batch(self, kind: int, count: int, rng: random.Random) -> dict[str, Tensor]:
        """Examples of one kind as tensors."""
        return Collator(TOKENIZER.pad_token_id)(encode(TOKENIZER, [self.pair(kind, rng) for _ in range(count)], 64))


# ---- the backbone ---------------------------------------------------------------------------------------------------------


def part_of(block: int) -> list[int]:
    """The residual dimensions that a candidate block may write: one part of a letter's code."""
    place = OWN[block not in OWN[0]].index(block)
    return list(range(16 + 12 * place, 28 + 12 * place))


def untrained(seed: int) -> LlamaForCausalLM:
    """The backbone before pretraining: letters are read in some dimensions, and written in others, part by part."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENIZER), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=BLOCKS,
            num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD, max_position_embeddings=128,
            initializer_range=0.1, bos_token_id=TOKENIZER.bos_token_id, eos_token_id=TOKENIZER.eos_token_id,
            pad_token_id=TOKENIZER.pad_token_id, tie_word_embeddings=False,
        )
    )  # fmt: skip
    codes = random.Random(seed).sample(list(itertools.product(range(3), repeat=4)), 27)
    with torch.no_grad():
        for index in (0, BLOCKS - 1):  # they always run, and do nothing but leave keys and values
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.v_proj.weight.normal_(0, VALUE_RMS / WIDTH**0.5)
        model.model.embed_tokens.weight.normal_(0, 1)
        model.model.embed_tokens.weight[:, 16:] = 0
        model.lm_head.weight.zero_()
        for place, text in enumerate([*LETTERS[0], *LETTERS[1], TOKENIZER.eos_token]):
            code = codes[26 if place == 52 else place % 26]
            (token,) = TOKENIZER(text, add_special_tokens=False).input_ids
            for part, value in enumerate(code):
                first = 16 + 12 * part + 4 * value
                model.lm_head.weight[token, first : first + 4] = 1.0
        for block in CANDIDATES:
            for weight in _writing(model, block):
                weight *= _rows(block)
    return model


def _writing(model: LlamaForCausalLM, block: int) -> list[Tensor]:
    layer = model.model.layers[block]
    return [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]


def _rows(block: int) -> Tensor:
    mask = torch.zeros(WIDTH, 1)
    mask[part_of(block)] = 1
    return mask


def pretrained(task: Task, seed: int, steps: int) -> LlamaForCausalLM:
    """The backbone: each block writes its part for its own kind, and nothing for the other."""
    model, rng = untrained(seed), random.Random(seed)
    model.requires_grad_(False)
    learning = [parameter for block in CANDIDATES for parameter in model.model.layers[block].parameters()]
    for parameter in learning:
        parameter.requires_grad_(True)
    for block in CANDIDATES:
        for weight in _writing(model, block):
            weight.register_hook(_rows(block).mul)
    optimizer = torch.optim.AdamW(learning, lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(_pretraining_loss(model, task.batch(kind, 16, rng), kind, rng) for kind in (0, 1)).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False).eval()


def _pretraining_loss(model: LlamaForCausalLM, batch: dict[str, Tensor], kind: int, rng: random.Random) -> Tensor:
    """Cross-entropy along the kind's own blocks, the others silent, and there or not as chance has it."""
    decoder, hidden = model.model, model.model.embed_tokens(batch["input_ids"])
    length = hidden.shape[1]
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    silence = torch.zeros(())
    for block in CANDIDATES:
        change = decoder.layers[block](hidden, attention_mask=mask, position_embeddings=rotary) - hidden
        if block in OWN[kind]:
            hidden = hidden + change
        else:
            silence = silence + change[:, PROMPT:].square().mean()
            hidden = hidden + change.detach() * (rng.random() < 0.5)
    return silence + _loss(model.lm_head(decoder.norm(hidden)), batch["labels"])


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# ---- what is known exactly ------------------------------------------------------------------------------------------------


@torch.no_grad()
def landscape(model: LlamaForCausalLM, tests: Sequence[dict[str, Tensor]]) -> tuple[float, float]:
    """Loss of the best fixed route and of the oracle, by trying all routes."""
    found = []
    for chosen in itertools.combinations(CANDIDATES, len(CANDIDATES) - REMOVED):
        found.append([_along(model, test, (0, *chosen, BLOCKS - 1)) for test in tests])
    table = torch.tensor(found)
    return table.mean(1).min().item(), table.min(0).values.mean().item()


def _along(model: LlamaForCausalLM, batch: dict[str, Tensor], blocks: Sequence[int]) -> float:
    """Loss of a batch with these blocks alone, in a plain loop that knows nothing of routing."""
    decoder, hidden = model.model, model.model.embed_tokens(batch["input_ids"])
    length = hidden.shape[1]
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for block in blocks:
        hidden = decoder.layers[block](hidden, attention_mask=mask, position_embeddings=rotary)
    return _loss(model.lm_head(decoder.norm(hidden)), batch["labels"]).item()


@torch.no_grad()
def routed_loss(
    model: LlamaForCausalLM, policy: BuddyPolicy, tests: Sequence[dict[str, Tensor]]
) -> tuple[float, int, list[float]]:
    """Loss of the router's own routes, distinct routes, and the share of each kind's own blocks among those kept."""
    losses, routes, own = [], set(), []
    for kind, batch in enumerate(tests):
        routing = Routing(policy, (BLOCKS - REMOVED) / BLOCKS, context_mask=batch["context_mask"])
        with routed(model, routing):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        losses.append(_loss(logits, batch["labels"]).item())
        assert routing.state is not None
        route = routing.state.route
        assert route is not None
        routes |= {tuple(row) for row in route.tolist()}
        own.append(route[:, list(OWN[kind])].float().mean().item())
    return sum(losses) / len(losses), len(routes), own


# ---- the router -----------------------------------------------------------------------------------------------------------


def train(model: LlamaForCausalLM, task: Task, recipe: str, updates: int, seed: int, folder: Path) -> BuddyPolicy:
    """A router trained by one of the recipes, the backbone frozen."""
    rng = random.Random(7919 * (seed + 1))
    pairs = [task.pair(rng.randrange(2), rng) for _ in range(BATCH * updates)]
    torch.manual_seed(seed)
    policy = BuddyPolicy(BLOCKS, 2 * HEAD, prior=_prior(model, pairs[:32]))
    if recipe == "tuned":
        held_out = len(pairs) // 8
        examples = min(len(pairs) - held_out, 768)
        settings = Router(examples=examples, held_out=held_out, orders=3, rounds=3, search_examples=48, batch_size=64)
        router.fit(model, TOKENIZER, policy, pairs, settings, Training(max_length=64), [REMOVED], None, seed)
        return policy
    settings = Training(
        epochs=1, batch_size=BATCH, max_length=64, lora_rank=0, logging_steps=max(updates // 8, 1), save_steps=10**6
    )  # fmt: skip
    sft.train(
        model, TOKENIZER, policy, pairs, settings, Recipe(drawn(REMOVED, BLOCKS), trains_policy=True), folder, seed
    )
    return policy


def _prior(model: LlamaForCausalLM, pairs: Sequence[tuple[str, str]]) -> Tensor | None:
    """The paper's prior: Taylor importance, on prompts of both kinds."""
    ids = torch.tensor([row["input_ids"] for row in encode(TOKENIZER, pairs, 64)])
    return fused(estimate(model, ids, "taylor").values.tolist(), "taylor", BLOCKS, source_block=1)


def measured(task: Task, model: LlamaForCausalLM, recipe: str, updates: int, seed: int) -> dict[str, Any]:
    """What is known of a backbone's routes, and what a router makes of it."""
    tests = [task.batch(kind, 64, random.Random(104729 + kind)) for kind in (0, 1)]
    fixed, oracle = landscape(model, tests)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        policy = train(model, task, recipe, updates, seed, Path(folder))
    seconds = time.perf_counter() - started
    loss, paths, own = routed_loss(model.eval(), policy, tests)
    return {
        "task": task.name, "recipe": recipe, "seed": seed, "updates": updates, "fixed": fixed, "oracle": oracle,
        "loss": loss, "closed": (fixed - loss) / (fixed - oracle), "paths": paths, "own_blocks": own, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("paper", "tuned"), default="tuned")
    parser.add_argument("--task", choices=("easy", "marker"), default="easy")
    parser.add_argument("--updates", type=int, default=300, help="of eight examples each (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of task, backbone and router (default: 0)")
    parser.add_argument("--pretraining", type=int, default=600, help="steps that make the backbone (default: 600)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    task = Task.of(given.task, given.seed)
    model = pretrained(task, given.seed, given.pretraining)
    found = measured(task, model, given.recipe, given.updates, given.seed)
    if given.json:
        print(json.dumps(found))
        return
    print(f"{found['task']}, recipe {found['recipe']}, {found['updates']} updates, seed {found['seed']}")
    print(f"  loss        {found['loss']:.3f} (best fixed route {found['fixed']:.3f}, oracle {found['oracle']:.3f})")
    print(f"  closed      {found['closed']:.2f}")
    print(
        f"  paths       {found['paths']}; own blocks kept {', '.join(f'{share:.2f}' for share in found['own_blocks'])}"
    )
    print(f"  seconds     {found['seconds']:.1f}")


if __name__ == "__main__":
    main()
