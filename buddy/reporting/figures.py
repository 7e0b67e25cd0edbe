"""The figures of a study by name, drawn from its records: the paper's by their numbers, and those it does not have.

Any of them can be drawn for any study; what was not measured is a panel with the reason in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from buddy.errors import unknown
from buddy.reporting import style
from buddy.reporting.accuracy import accuracy_vs_budget
from buddy.reporting.generation import rouge
from buddy.reporting.importance import by_length, other_corpus, other_indicators, own_corpus
from buddy.reporting.latency import speed_ups
from buddy.reporting.measured import Accuracy, Importance, Latency, Measured, Predicted, Rouge, Trace, Training
from buddy.reporting.paths import heat_map, paths_per_generation
from buddy.reporting.predictor import against_constant, training_curves
from buddy.reporting.ribbon import ribbon
from buddy.reporting.savings import savings
from buddy.reporting.study import Study
from buddy.reporting.tradeoff import accuracy_vs_speed
from buddy.reporting.variants import ablation_figure
from buddy.study.planned_figures import HEAT_MAPS, NAMES, ORDERS, planned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAW: dict[str, Callable[[Study], Figure]] = {
    "accuracy_vs_budget": accuracy_vs_budget,
    "accuracy_vs_speed": accuracy_vs_speed,
    "latency": speed_ups,
    "savings": savings,
    "route_ribbon": ribbon,
    "figure1": own_corpus,
    "figure2": by_length,
    "figure4": paths_per_generation,
    "figure5": rouge,
    **{name: partial(heat_map, name) for name in HEAT_MAPS},
    "figure7": other_corpus,
    "figure8": other_indicators,
    "figure12": training_curves,
    "figure13": against_constant,
    "ablation": ablation_figure,
}


NEEDS: dict[str, tuple[type[Measured], ...]] = {
    **dict.fromkeys(("accuracy_vs_budget", "ablation"), (Accuracy,)),
    **dict.fromkeys(("latency", "savings"), (Latency,)),
    "accuracy_vs_speed": (Accuracy, Latency),
    **dict.fromkeys(ORDERS, (Importance,)),
    "figure5": (Rouge,),
    "figure12": (Training,),
    "figure13": (Predicted,),
}
"""Records without which a figure shows nothing; the others need traces."""


def names(study: Study) -> list[str]:
    """The figures that the study plans to measure, or has records of all the same."""
    orders = [one for one in study.records if isinstance(one, Importance)]
    extra = {
        "figure5": any(isinstance(one, Rouge) for one in study.records),
        "figure2": any(one.length is not None for one in orders),
        "figure7": any(one.corpus is not None for one in orders),
        "figure8": any(one.indicator in ("cosine", "block_influence") for one in orders),
    }
    intended = planned(study.config)
    named = [name for name in NAMES if name in intended or extra.get(name)]
    if study.config.study.records is None:
        return named
    # Records given are all that there will ever be: what they lack is no figure of the study.
    there = {type(one) for one in study.records}
    return [name for name in named if set(NEEDS.get(name, (Trace,))) <= there]


def resolve(study: Study, asked: str) -> str:
    """The figure meant by ``4``, ``figure4`` or another name.

    Raises:
        UserError: there is no such figure.
    """
    for name in (asked, f"figure{asked}"):
        if name in NAMES:
            return name
    raise unknown(f"--figure of study {study.name}", asked, NAMES)


def build(study: Study, name: str) -> dict[str, bytes]:
    """Draw one figure.

    Args:
        study: settings and records.
        name: one of `buddy.study.planned_figures.NAMES`.

    Returns:
        The files' contents by kind, ``pdf`` and ``png``.
    """
    with style.applied():
        return style.rendered(DRAW[name](study))
