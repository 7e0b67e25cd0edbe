"""Batches of like length: a shuffle that pads little.

Alpaca's examples differ in length by a factor of twenty, so a batch drawn at random is half padding, which is computed and
thrown away. Here the shuffled examples are sorted within pools of many batches; their batches are shuffled again. Which
examples meet still differs from epoch to epoch, and the order is a function of seed and epoch alone, so that a resumed
training sees what an uninterrupted one would. The longest batch of the first epoch comes first: what does not fit into
memory is known at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50
"""Batches whose examples are sorted together."""
ORDER = "like lengths"
"""What checkpoints call the order: one of another order is not gone on from."""


class LikeLengths(Sampler[int]):
    """Places of examples, in the order of an epoch.

    Args:
        lengths: tokens of each example.
        batch: examples of an update: the parts that are accumulated are of like length, too.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of another epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        whole = len(order) - len(order) % self.batch
        batches = [one for pool in _parts(order[:whole], POOL * self.batch) for one in self._sorted(pool)]
        shuffled = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        if self.epoch == 0 and shuffled:
            longest = max(shuffled, key=lambda batch: max(self.lengths[place] for place in batch))
            shuffled.remove(longest)
            shuffled.insert(0, longest)
        for batch in [*shuffled, order[whole:]]:  # an incomplete one is the last
            yield from batch

    def _sorted(self, pool: list[int]) -> list[list[int]]:
        return _parts(sorted(pool, key=self.lengths.__getitem__), self.batch)


def _parts(places: list[int], size: int) -> list[list[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]
