"""Digests of what a checkpoint is made from: weights as they are loaded, examples as they are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from buddy.storage.digests import digest

SAMPLES = 4096
"""Values of a tensor that are looked at: of two models one tensor is never the same in all of them but by being it."""


@torch.no_grad()
def of_weights(module: nn.Module) -> str:
    """A digest of a module's state: names, shapes, dtypes, and of each tensor up to `SAMPLES` values, evenly spread.

    It takes a fraction of a second, whatever the size, and is the same on every device.
    """
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        flat = value.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)].cpu().contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def of_examples(rows: Iterable[Mapping[str, Any]]) -> str:
    """A digest of tokenized examples in their order: tokens, where the prompt ends, and what of it is read if not all."""
    kept = ("input_ids", "prompt_length", "read_length", "question")
    return digest([[row[name] for name in kept if row.get(name) is not None] for row in rows])
