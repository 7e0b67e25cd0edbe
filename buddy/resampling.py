"""The bootstrap over items, once for all that is averaged over data sets: scores, likelihoods, differences and ratios.

An average is the plain mean of the data sets' means, so each kind of text counts alike whatever its number of items.
Items are resampled within their data set. What each figure means, and what it was checked against: docs/statistics.md. This
module imports no torch: comparisons are made on laptops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 10_000
"""Of a comparison with a p value: enough that the least one, corrected for 250 comparisons, is still below 0.05."""
INTERVAL_RESAMPLES = 1000
"""Of an interval or a standard error on which no verdict rests."""
MANY = 0.1
"""Different values per item, from which on drawing items is faster than drawing how often each value occurs."""
ENTRIES_AT_ONCE = 2**22
"""Drawn items that are held at a time."""


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
        means += _resampled(np.asarray(found, dtype=np.float64), resamples, random) / len(groups)
    low, high = np.percentile(means, (2.5, 97.5))
    beyond = min(np.sum(means <= 1e-12), np.sum(means >= -1e-12))
    p = min(1.0, 2 * (1 + float(beyond)) / (1 + resamples))
    value = float(np.mean([np.mean(found) for found in groups]))
    return Estimate(value, float(low), float(high), p, sum(map(len, groups)))


def ratio(ours: Sequence[Array], theirs: Sequence[Array], resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Our mean over data sets, divided by theirs on the same items, with interval; ``p`` is that it is not 1.

    A resample takes the same items of both, so what they have in common cancels.

    Args:
        ours, theirs: per data set the value of each item, (n,); none below 0.
        resamples, seed: as in `estimate`.

    Raises:
        ValueError: other items, or theirs are all 0.
    """
    if [len(one) for one in ours] != [len(one) for one in theirs]:
        raise ValueError("not the same items")
    if not any(np.any(np.asarray(one) > 0) for one in theirs):
        raise ValueError("nothing to divide by: all of theirs are 0")
    random = np.random.default_rng(seed)
    sums = np.zeros((resamples, 2))
    for pair in zip(ours, theirs, strict=True):
        both = np.stack([np.asarray(one, dtype=np.float64) for one in pair], 1)
        values, counts = np.unique(both, axis=0, return_counts=True)
        drawn = random.multinomial(len(both), counts / len(both), size=resamples)
        sums += drawn @ values / len(both)
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where no item of theirs that is above 0 was drawn there is no ratio: it counts as beyond every other.
        ratios = np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.inf)
    low, high = np.percentile(ratios, (2.5, 97.5), method="nearest")
    means = [float(np.mean([np.mean(one) for one in side])) for side in (ours, theirs)]
    beyond = min(np.sum(ratios <= 1 + 1e-12), np.sum(ratios >= 1 - 1e-12))
    p = min(1.0, 2 * (1 + float(beyond)) / (1 + resamples))
    return Estimate(means[0] / means[1], float(low), float(high), p, sum(map(len, ours)))


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of the values (n,), and the low and high end of its 95 % interval by a bootstrap over them: the mean itself for
    one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    ends = plain_bootstrap(values, np.mean, seed).confidence_interval
    return mean, float(ends.low), float(ends.high)


def plain_bootstrap(values: Sequence[float], statistic: Callable[..., Any], seed: int = 0) -> Any:
    """A statistic of values (n,), n at least 2, over resamples of them: its standard error and 95 % interval by percentiles
    (`scipy.stats.bootstrap`). What is averaged over data sets resamples each of them: `estimate`."""
    from scipy import stats

    return stats.bootstrap((values,), statistic, n_resamples=INTERVAL_RESAMPLES, method="percentile", rng=seed)


def _resampled(found: Array, resamples: int, random: np.random.Generator) -> Array:
    """Means (resamples,) of n items taken with replacement from (n,)."""
    values, counts = np.unique(found, return_counts=True)
    if len(values) <= MANY * len(found):  # right and wrong: it is enough to draw how often each value occurs
        drawn: Array = random.multinomial(len(found), counts / len(found), size=resamples) @ values / len(found)
        return drawn
    at_once = max(ENTRIES_AT_ONCE // len(found), 1)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    return np.concatenate([found[random.integers(len(found), size=(size, len(found)))].mean(1) for size in sizes])
