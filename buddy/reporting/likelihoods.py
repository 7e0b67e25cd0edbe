"""Likelihoods of one series at a depth, item by item, and the difference of two on the same items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buddy.reporting.measures import DEPTH_TOLERANCE
from buddy.reporting.significance import Difference, paired
from buddy.reporting.study import Series, Study
from buddy.resampling import INTERVAL_RESAMPLES, RESAMPLES, Estimate, estimate

Array = NDArray[np.float64]

MEASURES = ("nll", "kl", "agreement")
UNITS = {"nll": "nats per token", "kl": "nats per token", "agreement": "%"}
SCALES = {"nll": 1.0, "kl": 1.0, "agreement": 100.0}
"""How many of a measure's unit in tables are 1 in the records."""
AVERAGE = "average"
"""Stands for all data sets, each counting alike."""


class Mode(NamedTuple):
    """How responses were routed: K/V of skipped blocks, and ``recompute`` or ``reuse``."""

    kv: str
    decode: str


def main_mode(study: Study) -> Mode:
    """The mode that tables show: the first of each in the study."""
    settings = study.config.likelihood
    return Mode(settings.kv[0], settings.decode[0])


@dataclass(frozen=True)
class Scored:
    """What was measured of a series at a depth in a mode.

    Attributes:
        values: by measure and data set, the value of each item, (n,), the mean over seeds.
        which: by data set, the items' digest and which rows they are.
        tokens: by data set, tokens scored.
        means: by measure the average over the data sets, seed by seed, in the unit of `UNITS`.
        paths: distinct paths over all tokens, seed by seed.
        executed: mean number of blocks that ran.
        off_depth: whether that misses the depth asked for, with any seed.
    """

    values: Mapping[str, Mapping[str, Array]]
    which: Mapping[str, Mapping[str, Any]]
    tokens: Mapping[str, int]
    means: Mapping[str, Sequence[float]]
    paths: Sequence[int]
    executed: float
    off_depth: bool

    @property
    def seeds(self) -> int:
        """Number of seeds behind it."""
        return len(self.paths)

    def estimate(self, measure: str, dataset: str = AVERAGE) -> Estimate:
        """A measure's mean with its interval, in the unit of `UNITS`; of a data set, or the average of all."""
        groups = self.values[measure]
        scale = SCALES[measure]
        return estimate(
            [scale * values for name, values in groups.items() if dataset in (AVERAGE, name)], INTERVAL_RESAMPLES
        )


def scored(study: Study, backbone: str, series: Series, removed: int, mode: Mode) -> Scored | None:
    """What the records have of it; None where no seed has all data sets of the study. Seeds on other items than the first
    one's are left out."""
    datasets: list[str] = [*study.config.likelihood.datasets]
    rows = study.likelihood_rows.get((backbone, series.path, removed, *mode), [])
    seeds = [
        found for seed in series.seeds if (found := _of_seed(rows, seed)) and {*datasets} <= {name for name, _ in found}
    ]
    if not seeds:
        return None
    which = {name: seeds[0][name, "nll"]["detail"] for name in datasets}
    seeds = [
        found
        for found in seeds
        if all(found[name, "nll"]["detail"]["sha256"] == which[name]["sha256"] for name in datasets)
    ]
    items = {
        measure: {name: np.array([found[name, measure]["values"] for found in seeds]) for name in datasets}
        for measure in MEASURES
    }  # (seeds, n) each
    depths = [float(found[ALL, "distinct_paths"]["executed_mean"]) for found in seeds]
    asked = study.blocks(backbone) - removed
    return Scored(
        values={measure: {name: each.mean(0) for name, each in found.items()} for measure, found in items.items()},
        which=which,
        tokens={name: int(seeds[0][name, "nll"]["tokens"]) for name in datasets},
        means={
            measure: [
                SCALES[measure] * float(mean) for mean in np.mean([each.mean(1) for each in found.values()], axis=0)
            ]
            for measure, found in items.items()
        },
        paths=[int(found[ALL, "distinct_paths"]["value"]) for found in seeds],
        executed=float(np.mean(depths)),
        off_depth=any(abs(mean - asked) > DEPTH_TOLERANCE for mean in depths),
    )


ALL = ""
"""Data set of a row that is about all of them."""


def _of_seed(rows: Iterable[Mapping[str, Any]], seed: int) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The rows of one seed by data set and metric."""
    mine = [row for row in rows if row["seed"] == seed]
    return {(row["dataset"] if isinstance(row["dataset"], str) else ALL, row["metric"]): row for row in mine}


def difference(one: Scored | None, other: Scored | None, measure: str, dataset: str = AVERAGE) -> Difference:
    """``one`` minus ``other`` on the same items, by a paired bootstrap over the items of each data set.

    Args:
        one, other: of the same backbone and depth; None was not measured.
        measure: one of `MEASURES`; the difference is in the unit of `UNITS`.
        dataset: a data set, or the average of all.
    """
    if one is None or other is None:
        return Difference(note="not measured")
    off = [found for found in (one, other) if found.off_depth]
    if off:
        return Difference(note=f"ran {off[0].executed:.1f} blocks")
    if any(found["sha256"] != other.which[name]["sha256"] for name, found in one.which.items()):
        return Difference(note="not the same items")
    groups = [
        values - other.values[measure][name]
        for name, values in one.values[measure].items()
        if dataset in (AVERAGE, name)
    ]
    tested = measure == "nll" and dataset == AVERAGE
    return paired(groups, RESAMPLES if tested else INTERVAL_RESAMPLES, SCALES[measure])
