"""The figures by name, and which of them a study plans to measure: light, so that a workflow can ask."""

from __future__ import annotations

from buddy.settings import corpus_name
from buddy.study.config import Config

NAMES = (
    "accuracy_vs_budget",
    "accuracy_vs_speed",
    "latency",
    "savings",
    "route_ribbon",
    *(f"figure{number}" for number in (1, 2, *range(4, 14))),
    "ablation",
)
"""Every figure. Those with a number are the paper's (its Figure 3 is a drawing of the method); 14 is not among them."""
FIRST = ("accuracy_vs_speed", "accuracy_vs_budget", "latency", "route_ribbon")
"""Figures to look at first, the first of them that is there."""
ORDERS = {
    "figure1": ("delta_ppl", "taylor"),
    "figure2": ("delta_ppl", "taylor"),
    "figure7": ("delta_ppl", "taylor"),
    "figure8": ("cosine", "block_influence"),
}
"""Indicators whose removal orders a figure shows: 1 on the study's corpus, 2 at several context lengths, 7 on other
corpora, 8 on the study's and on others."""
HEAT_MAPS = {"figure9": 0, "figure10": 1, "figure6": 2, "figure11": 3}
"""Execution heat maps, by the place of their depth among the study's (the paper's 4, 8, 12 and 16 of 32 blocks)."""


def planned(config: Config) -> list[str]:
    """The figures whose records a study plans to measure, in the order of ``NAMES``; any of ``NAMES`` can be drawn."""
    traces = bool(config.traced_runs())
    depths = max((len(config.removed(name)) for name in config.traced_backbones()), default=0)
    wanted = {
        "accuracy_vs_budget": True,
        **dict.fromkeys(("accuracy_vs_speed", "latency", "savings"), bool(config.timed_backbones())),
        **{name: bool(orders(config, name)) for name in ORDERS},
        **dict.fromkeys(("route_ribbon", "figure4"), traces),
        "figure5": bool(config.summarising_runs()),
        **{name: traces and place < depths for name, place in HEAT_MAPS.items()},
        "figure12": bool(config.predicting_runs()),
        "figure13": bool(config.predicting_runs()),
        "ablation": any(ablation.axes() for ablation in config.study.ablations),
    }
    return [name for name in NAMES if wanted.get(name)]


def orders(config: Config, name: str) -> list[str]:
    """The importance records that a study plans to measure for a figure of removal orders, below its records of that
    kind.

    Args:
        config: the study.
        name: one of ``ORDERS``.
    """
    backbones = subjects(config, config.ordered_backbones())
    wanted = [indicator for indicator in ORDERS[name] if indicator in config.orders.indicators]
    levels = {
        "figure1": [""],
        "figure2": [f"length~{length}/" for length in config.orders.lengths],
        "figure7": [f"corpus~{corpus_name(corpus)}/" for corpus in config.orders.corpora],
    }
    levels["figure8"] = levels["figure1"] + levels["figure7"]
    found = [
        f"backbone~{one}/{level}indicator~{indicator}.json"
        for one in backbones
        for level in levels[name]
        for indicator in wanted
    ]
    return list(dict.fromkeys([*_fused(config), *found])) if name == "figure1" else found


def _fused(config: Config) -> list[str]:
    """Records of Figure 1 that are measured anyway: those of the first backbone whose runs fuse its indicators."""
    measured = config.importances()
    for one in subjects(config, config.study.backbones):
        found = [indicator for indicator in ORDERS["figure1"] if (one, indicator) in measured]
        if found:
            return [f"backbone~{one}/indicator~{indicator}.json" for indicator in found]
    return []


def subjects(config: Config, chosen: list[str]) -> list[str]:
    """Backbones that a figure of one backbone may show, the first that was measured: those of ablations come first.

    Args:
        config: the study.
        chosen: the backbones that its records are measured on.
    """
    ablated = [ablation.backbone for ablation in config.study.ablations]
    return sorted(chosen, key=lambda name: name not in ablated)
