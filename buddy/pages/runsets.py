"""Which runs a panel shows: a row of a table, the grid of an ablation, as conditions on run configs.

A table's row and a page's line say the same only if they are over the same runs. So conditions are taken from what the
tables are built of (`buddy.reporting.study.Series`, `buddy.study.config.Config.ablation_runs`), axis by axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from buddy.reporting.study import Series
from buddy.study.config import Config, Run
from buddy.study.settings import Ablation, Variant

CONSTANT = ("dense", "dense_lora", "buddy")
"""Methods of which one run has every depth; a peer is another run at each."""


@dataclass(frozen=True)
class Runset:
    """Runs that are shown together.

    Attributes:
        name: as the page calls them: the label of the table's row.
        where: values that a run's config may have, by key; of a run that is shown all are met.
    """

    name: str
    where: Mapping[str, tuple[Any, ...]]

    def filters(self) -> Any:
        """The conditions, as W&B's reports take them."""
        from wandb_workspaces import expr

        conditions = [
            expr.Config(key) == values[0] if len(values) == 1 else expr.Config(key).isin(list(values))
            for key, values in self.where.items()
        ]
        return expr.And(*conditions)

    def also(self, **where: Any) -> Runset:
        """The same with further conditions, a value each."""
        return Runset(self.name, {**self.where, **{key: (value,) for key, value in where.items()}})

    def among(self, **where: tuple[Any, ...]) -> Runset:
        """The same with other values of these keys, any of which is met."""
        return Runset(self.name, {**self.where, **where})


def of_series(series: Series, label: str, backbone: str, shared: Mapping[str, Any]) -> Runset:
    """The runs behind a row of a table: all seeds, and of a peer all depths.

    Args:
        series: the row.
        label: its label in the table.
        backbone: of the table.
        shared: conditions of the study, a value each.
    """
    axes = {"backbone": backbone, "method": series.method, "lora": series.lora, **series.variant}
    depths = {} if series.method in CONSTANT else {"removed": series.depths}
    return Runset(label, {**_single({**shared, **axes}), "seed": series.seeds, **depths})


def of_ablation(config: Config, ablation: Ablation, shared: Mapping[str, Any]) -> Runset:
    """The runs of an ablation's grid: its values of each axis, and what it holds fixed.

    A run without prior has omega 0, so omega is not fixed where the prior varies; and a grid that is not every
    combination of its values names its runs.
    """
    runs = config.ablation_runs(ablation)
    axes = {axis: _values(run.variant[axis] for run in runs) for axis in Variant.model_fields}
    lora = _values(run.variant.get("lora", "trained") for run in runs)
    own = {"backbone": (ablation.backbone,), "method": ("buddy",), "lora": lora, **axes}
    found = Runset(ablation.name, {**_single(shared), **own, "seed": _values(run.seed for run in runs)})
    if {run for run in config.runs() if _meets(run, found)} != set(runs):
        return Runset(ablation.name, {**found.where, "run": tuple(run.path for run in runs)})
    return found


def _meets(run: Run, runset: Runset) -> bool:
    told = {"backbone": run.backbone, "method": run.method, "seed": run.seed, "lora": "trained", **run.variant}
    return all(told[key] in values for key, values in runset.where.items() if key in told)


def _single(where: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {key: (value,) for key, value in where.items()}


def _values(found: Iterable[Any]) -> tuple[Any, ...]:
    """Each value once, in the order of the grid."""
    return tuple(dict.fromkeys(found))


def seeds(runsets: Sequence[Runset]) -> int:
    """The largest number of seeds that a line is the mean of."""
    return max((len(runset.where.get("seed", ())) for runset in runsets), default=1)
