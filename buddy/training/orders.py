"""Removal orders searched on examples, for the loss of their responses.

Taking out one block after the other, as SLEB does, gets stuck: a run of neighbouring blocks may be missed least of all
sets, while each of its beginnings is beaten by scattered blocks. So a set for the deepest pruning is searched first:

1. of all runs of neighbouring blocks, and of sets known beforehand, the one that costs least is the start;
2. blocks are exchanged for as long as that lowers the cost. What comes back is looked for among the removed blocks whose
   return alone helps most, what goes instead among those whose removal alone costs least; their pairs are measured.

Shallower prunings leave out the beginning of an order of that set: the next block is the one whose absence costs least
beside those that are gone. A block's cost seldom falls when others go, so only the blocks that were cheapest when last
measured are measured anew (lazy greedy search).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor

from buddy.routing.types import CausalLM
from buddy.training.routes import Bundle, Loss, Row, by_length

BACK, OUT = 3, 5
"""Blocks that may come back, and blocks that may go instead, of which all pairs are measured."""
AT_ONCE = 3
"""Blocks measured anew together: they share the blocks before the first of them."""


class Search:
    """Examples on which sets of blocks are left out.

    Args:
        backbone: causal language model, in evaluation mode.
        rows: the examples.
        candidates: blocks that may be left out.
        loss: as in `Bundle`.
        batch_size: examples per pass.
    """

    def __init__(
        self,
        backbone: CausalLM,
        rows: Sequence[Row],
        candidates: Sequence[int],
        loss: Loss = "ce",
        batch_size: int = 8,
    ) -> None:
        self.candidates = list(candidates)
        self._blocks = len(backbone.get_decoder().layers)
        self._bundles = [
            Bundle(backbone, [rows[member] for member in members], loss) for members in by_length(rows, batch_size)
        ]
        self._examples = len(rows)
        self._known: dict[frozenset[int], float] = {}

    def costs(self, sets: Iterable[Collection[int]]) -> list[float]:
        """Mean loss without each set of blocks; what was measured before is not measured again."""
        wanted = [frozenset(each) for each in sets]
        new = [each for each in dict.fromkeys(wanted) if each not in self._known]
        if new:
            routes = torch.stack([route(list(each), len(each), self._blocks) for each in new])
            total = torch.zeros(len(new), dtype=torch.float64)
            for bundle in self._bundles:
                total += bundle.losses(routes.expand(len(bundle), -1, -1)).sum(0)
            self._known |= dict(zip(new, (total / self._examples).tolist(), strict=True))
        return [self._known[each] for each in wanted]

    def best(self, sets: Sequence[Collection[int]]) -> frozenset[int]:
        """The set that costs least, of equal ones the first."""
        costs = self.costs(sets)
        return frozenset(sets[costs.index(min(costs))])

    def runs(self, length: int) -> list[frozenset[int]]:
        """All runs of neighbouring candidates of that length."""
        return [frozenset(self.candidates[at : at + length]) for at in range(len(self.candidates) - length + 1)]

    def climb(self, start: Collection[int], exchanges: int = 8) -> frozenset[int]:
        """Exchange one block of a set for another for as long as that lowers the cost, so many times at most.

        What could go instead is ranked once, beside the set that the climb starts from.
        """
        now = frozenset(start)
        if not exchanges:
            return now
        out = self._cheapest([block for block in self.candidates if block not in now], now.__or__)
        for _ in range(exchanges):
            back = self._cheapest(sorted(now), now.__sub__)[:BACK]
            others = [block for block in out if block not in now][:OUT]
            following = self.best([now, *(now - {one} | {other} for one in back for other in others)])
            if following == now:
                break
            out += [block for block in now - following if block not in out]
            now = following
        return now

    def _cheapest(self, blocks: Sequence[int], changed: Callable[[frozenset[int]], frozenset[int]]) -> list[int]:
        """Blocks by what their going, or coming back, costs."""
        costs = dict(zip(blocks, self.costs([changed(frozenset([block])) for block in blocks]), strict=True))
        return sorted(blocks, key=lambda block: costs[block])

    def order(self, blocks: Collection[int]) -> list[int]:
        """A set's blocks in the order in which they are left out; of equal costs the earlier block goes."""
        now, *costs = self.costs([(), *([block] for block in sorted(blocks))])
        rises = {block: cost - now for block, cost in zip(sorted(blocks), costs, strict=True)}
        order: list[int] = []
        fresh = set(blocks)
        while len(order) < len(blocks):
            cheapest = sorted(rises, key=lambda block: (rises[block], block))
            if cheapest[0] in fresh:
                now += rises.pop(cheapest[0])
                order.append(cheapest[0])
                fresh.clear()
                continue
            stale = [block for block in cheapest if block not in fresh][:AT_ONCE]
            measured = self.costs([[*order, block] for block in stale])
            rises |= {block: cost - now for block, cost in zip(stale, measured, strict=True)}
            fresh.update(stale)
        return order


def route(order: Sequence[int], removed: int, blocks: int) -> Tensor:
    """Boolean (L,): the route without the first ``removed`` blocks of an order."""
    found = torch.ones(blocks, dtype=torch.bool)
    found[list(order[:removed])] = False
    return found
