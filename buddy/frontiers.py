"""Quality against depth: the frontiers of constant depths, of random ones, of the best per input, and of a predictor.

All of it is arithmetic on a table of cross-entropies, inputs by depths; no model is needed. Quality is compared at equal
mean depth. What can be had without looking at the input is the lower convex hull of the constant depths: a point between
two corners is reached by drawing one of the two at random, which is also the best random budget of that mean. So the hull
is what a predictor has to beat; it is at least as good as the constants themselves, and they are on or above it.

Intervals are percentiles over resampled inputs, the same inputs for everything that is compared, and everything that is
estimated from the inputs, the hull too, is estimated again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Places = NDArray[np.int64]
"""Which of the depths."""

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Table:
    """Cross-entropies of N inputs at D depths.

    Attributes:
        losses: (N, D), nats per token.
        depths: (D,) executed blocks, ascending, the last one full depth.
        blocks: number of blocks L.
        weights: (R, N), how much each input counts in each resampling; rows add up to 1. The first row counts all alike.
    """

    losses: Array
    depths: Array
    blocks: int
    weights: Array

    @classmethod
    def of(cls, losses: Any, depths: Any, blocks: int, resamples: int = 1000, seed: int = 0) -> Table:
        """A table with its resamplings."""
        losses = np.asarray(losses, dtype=np.float64)
        n = len(losses)
        counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        weights = np.concatenate([np.full((1, n), 1 / n), counts / n])
        return cls(losses, np.asarray(depths, dtype=np.float64), blocks, weights)

    def mean(self, values: Array) -> Array:
        """Means over inputs of (N, ...), in every resampling: (R, ...)."""
        return np.tensordot(self.weights, values, axes=1)

    def at(self, chosen: Places) -> tuple[Array, Array]:
        """Mean depth and mean loss, each (R, P), of choices (N, P), places in ``depths``."""
        return self.mean(self.depths[chosen]), self.mean(np.take_along_axis(self.losses, chosen, 1))

    def constant(self, depth: Array) -> Array:
        """(R, P): the hull of constant depths at these mean depths (R, P)."""
        means = self.mean(self.losses)
        return np.stack([np.interp(row, *hull(self.depths, own)) for row, own in zip(depth, means, strict=True)])

    def shuffled(self, chosen: Places) -> Array:
        """(R, P): the mean loss if the same choices (N, P) fell on inputs at random; an expectation."""
        shares = np.stack([self.mean((chosen == place).astype(float)) for place in range(len(self.depths))], -1)
        return np.einsum("rpd,rd->rp", shares, self.mean(self.losses))


def hull(depths: Array, losses: Array) -> tuple[Array, Array]:
    """The corners (depth, loss) of the lower convex hull of points (D,), from the shallowest to the deepest."""
    corners: list[tuple[float, float]] = []
    for point in zip(depths.tolist(), losses.tolist(), strict=True):
        while len(corners) > 1 and _turns_up_at(corners[-2], corners[-1], point) <= 0:
            corners.pop()
        corners.append(point)
    found = np.array(corners)
    return found[:, 0], found[:, 1]


def _turns_up_at(before: tuple[float, float], corner: tuple[float, float], after: tuple[float, float]) -> float:
    """Above zero where the line through three points bends upwards at the second."""
    return (corner[0] - before[0]) * (after[1] - before[1]) - (corner[1] - before[1]) * (after[0] - before[0])


def area(depth: Array, gain: Array, blocks: int) -> Array:
    """Areas under gains over mean depths, (R, P) each: trapezoids, nats per token times fraction of blocks, (R,)."""
    order = np.argsort(depth, axis=1, kind="stable")
    across, up = (np.take_along_axis(values, order, 1) for values in (depth / blocks, gain))
    return ((across[:, 1:] - across[:, :-1]) * (up[:, 1:] + up[:, :-1]) / 2).sum(1)


def interval(values: Array) -> dict[str, float]:
    """``value`` (the first, of all inputs alike), ``low`` and ``high`` of resampled values (R,)."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(values[1:], [tail, 100 - tail])
    return {"value": float(values[0]), "low": float(low), "high": float(high)}


def intervals(values: Array, name: str) -> list[dict[str, float]]:
    """The same for (R, P): P mappings of ``name``, ``low`` and ``high``."""
    found = [interval(column) for column in values.T]
    return [{name: one["value"], "low": one["low"], "high": one["high"]} for one in found]


def rank_correlation(one: Array, other: Array, weights: Array) -> dict[str, float] | None:
    """Spearman's correlation of two values per input (N,) with its interval; None where one of them does not vary.

    Args:
        one, other: (N,).
        weights: of a `Table`.
    """
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    counts = np.rint(weights * len(one)).astype(int)
    found = [_spearman(np.repeat(one, row), np.repeat(other, row)) for row in counts]
    return interval(np.array([found[0], *(value for value in found[1:] if np.isfinite(value))]))


def _spearman(one: Array, other: Array) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Array) -> Array:
    """Ranks (N,), ties sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]
