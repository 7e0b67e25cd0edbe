"""Delta PPL of every block, with the shared prefix and the naive way: what either costs, and that both agree.

    python benchmarks/delta_ppl.py results/demo/backbones/smollm2-135m [--samples 2] [--length 256] [--corpus FILE]

The naive way runs a model of L - 1 blocks for each of L blocks: L + L(L - 1) block passes with the full model. With the
shared prefix, what lies before the removed block runs once: L + L(L - 1)/2. Embedding and head, L + 1 times each, cost
the same either way, so the ratio lies above the blocks' own (L + 1)/2L, by the head's share. Both ways take turns on
each window. Without a corpus, tokens are random: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from buddy import runs
from buddy.data import inputs
from buddy.importance import removal_nll, window_nll, windows
from buddy.routing.sliced import sliced


@torch.no_grad()
def naive_nll(backbone, ids: Tensor) -> Tensor:
    """What `removal_nll` returns, from whole passes of Hugging Face models that lack a block: (B, S) to (B, 1 + L)."""
    blocks = range(backbone.config.num_hidden_layers)
    models = [backbone, *(sliced(backbone, [index for index in blocks if index != gone]) for gone in blocks)]
    return torch.stack([window_nll(model(ids, use_cache=False).logits, ids) for model in models], dim=1)


def timed(way: Callable[..., Tensor], backbone, ids: Tensor) -> tuple[Tensor, float]:
    """A result and the seconds until the device had it."""
    start = time.perf_counter()
    found = way(backbone, ids)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


def expected_ratio(backbone) -> float:
    """Multiply-adds of the shared way over the naive way, by the weights that each token passes."""
    blocks = len(backbone.get_decoder().layers)
    block = sum(p.numel() for p in backbone.get_decoder().layers[0].parameters())
    head = (blocks + 1) * backbone.get_output_embeddings().weight.numel()
    passes = blocks * (blocks - 1)
    return ((blocks + passes / 2) * block + head) / ((blocks + passes) * block + head)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="folder of a backbone")
    parser.add_argument("--corpus", help="prose: a data set folder or a text file; random tokens without")
    parser.add_argument("--samples", type=int, default=2, help="windows, timed in turns")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args()
    backbone, tokenizer = runs.load_backbone(options.backbone, options.device)
    if options.corpus:
        ids = windows(tokenizer, inputs.prose(options.corpus), options.samples, options.length)
    else:
        ids = torch.randint(10, backbone.config.vocab_size, (options.samples, options.length))
    ids = ids.to(backbone.device)
    for way in (removal_nll, naive_nll):  # warm up on a few tokens
        way(backbone, ids[:1, :8])
    seconds, apart = {"shared": 0.0, "naive": 0.0}, 0.0
    for window in tqdm(ids.split(1), unit="window"):
        shared, took = timed(removal_nll, backbone, window)
        seconds["shared"] += took
        naive, took = timed(naive_nll, backbone, window)
        seconds["naive"] += took
        apart = max(apart, (shared - naive).abs().max().item())
    blocks = len(backbone.get_decoder().layers)
    print(f"{blocks} blocks, {options.samples} windows of {options.length} tokens, {backbone.device.type}")
    print(f"shared prefix {seconds['shared']:.2f} s, naive {seconds['naive']:.2f} s")
    print(
        f"ratio {seconds['shared'] / seconds['naive']:.3f}; expected by weights passed {expected_ratio(backbone):.3f}"
    )
    print(f"of which blocks alone {(blocks + 1) / (2 * blocks):.3f}")
    print(f"largest difference of a window's loss: {apart:.2e} nats")


if __name__ == "__main__":
    main()
