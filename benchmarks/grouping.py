"""By path or by block: what a batch of different routes costs either way, and which of the two the engine takes.

    python benchmarks/grouping.py results/demo/backbones/smollm2-135m [--batch 16] [--tokens 1,16,64,256]

Prints a line per prompt length: milliseconds of a pass block by block (gather and scatter at each block) and path by path
(whole sequences), over the same batch at full depth, for prompts of one length and for prompts between an eighth of it
and all of it; and the engine's choice. One token stands for a decode step after a prompt of 64. Routes come from a
random router, budgets from 0.5 to 1. `buddy.routing.schedule.FIXED_TOKENS` is chosen from this table.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tqdm import tqdm

from buddy import runs
from buddy.evaluation.latency import wait
from buddy.policies.buddy import BuddyPolicy
from buddy.routing.engine import Routing, routed
from buddy.routing.kv import RoutedCache
from buddy.routing.schedule import plan


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="folder of a backbone")
    parser.add_argument("--batch", type=int, default=16, help="sequences")
    parser.add_argument("--tokens", default="1,16,64,256", help="longest prompts, tokens; 1 is a decode step")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats; medians are printed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    model, _ = runs.load_backbone(options.backbone, options.device)
    model.eval()
    config = model.config
    head = model.get_decoder().layers[0].self_attn.head_dim
    policy = BuddyPolicy(config.num_hidden_layers, config.num_key_value_heads * head).to(model.device)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    budgets = torch.linspace(0.5, 1.0, options.batch).tolist()
    print(f"{'tokens':>6} {'lengths':>8} {'full ms':>8} {'by block':>9} {'by path':>8} {'paths':>6}  engine takes")
    for longest in map(int, options.tokens.split(",")):
        for lengths in ("equal",) if longest == 1 else ("equal", "varied"):
            print(line(model, policy, budgets, longest, lengths, options.repeats), flush=True)


@torch.no_grad()
def line(model, policy, budgets: list[float], longest: int, lengths: str, repeats: int) -> str:
    """Time one kind of batch."""
    batch, past = len(budgets), 64 if longest == 1 else 0
    sizes = torch.full((batch,), longest)
    if lengths == "varied":
        sizes = torch.randint(max(longest // 8, 1), longest + 1, (batch,), generator=torch.Generator().manual_seed(1))
        sizes[0] = longest
    ids = torch.randint(10, model.config.vocab_size, (batch, past + longest)).to(model.device)
    mask = (torch.arange(past + longest) >= past + longest - past - sizes[:, None]).long().to(model.device)
    times: dict[str, list[float]] = {"full": [], "block": [], "path": []}
    route: list[list[bool]] = []
    for repeat in tqdm(range(-1, repeats), desc=f"{longest} tokens, {lengths}", leave=False):
        for name, budget, grouping in (("full", 1.0, False), ("block", budgets, False), ("path", budgets, True)):
            cache = RoutedCache(model.config.num_hidden_layers, "zero", past + longest)
            routing = Routing(policy, budget, grouping=grouping)
            with routed(model, routing):
                if past:
                    model(ids[:, :past], mask[:, :past], past_key_values=cache, use_cache=True, logits_to_keep=1)
                wait(model.device)
                start = time.perf_counter()
                model(ids[:, past:], mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
                wait(model.device)
                if repeat >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
            route = routing.trace.steps[-1].tolist()
    full, block, path = (statistics.median(times[name]) for name in ("full", "block", "path"))
    tokens = [(longest - size, longest) for size in sizes.tolist()]
    choice = "by path" if plan(route, policy.source_block, model.device, tokens).groups else "by block"
    paths = len({tuple(row) for row in route})
    return f"{longest:>6} {lengths:>8} {full:>8.1f} {block:>9.1f} {path:>8.1f} {paths:>6}  {choice}"


if __name__ == "__main__":
    main()
