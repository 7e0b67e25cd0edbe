"""The bootstrap over items, once for all that is averaged over data sets: scores, likelihoods, and their differences.

An average is the plain mean of the data sets' means, so each kind of text counts alike whatever its number of items.
Items are resampled within their data set. This module imports no torch: comparisons are made on laptops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
"""Of a comparison with a p value: enough that the least one, corrected for 250 comparisons, is still below 0.05."""


@dataclass(frozen=True)
class Estimate:
    """A mean over data sets of means over items.

    Attributes:
        value: the mean, in the unit of the items.
        low, high: its 95 % interval.
        p: two-sided, that it is not 0, by the share of resamples on the other side.
        items: number of items behind it.
    """

    value: float
    low: float
    high: float
    p: float
    items: int


def estimate(groups: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """The mean of the groups' means, with interval and p.

    Args:
        groups: per data set the value of each item, (n,), n at least 1. Of a paired comparison, the differences.
        resamples: of the items of every group.
        seed: of the resampling; the same for all that is estimated, so that an estimate can be repeated.
    """
    random = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for found in groups:
        # Where few values occur it is enough to draw how often each occurs among n items taken with replacement.
        values, counts = np.unique(found, return_counts=True)
        drawn = random.multinomial(len(found), counts / len(found), size=resamples)
        means += drawn @ values / len(found) / len(groups)
    low, high = np.percentile(means, (2.5, 97.5))
    beyond = min(np.sum(means <= 1e-12), np.sum(means >= -1e-12))
    p = min(1.0, 2 * (1 + float(beyond)) / (1 + resamples))
    value = float(np.mean([np.mean(found) for found in groups]))
    return Estimate(value, float(low), float(high), p, sum(map(len, groups)))
