"""The figures by name, and which of them a study plans to measure: no pandas, so that a workflow can ask."""

from __future__ import annotations

from buddy.config import Config

NAMES = ("accuracy_vs_budget", "latency", *(f"figure{number}" for number in (1, 2, *range(4, 14))), "ablation")
"""Every figure. Those with a number are the paper's (its Figure 3 is a drawing of the method); 14 is not among them."""
ORDERS = {
    "figure1": ("delta_ppl", "taylor"),
    "figure7": ("delta_ppl", "taylor"),
    "figure8": ("cosine", "block_influence"),
}
"""Indicators whose removal orders a figure shows: 1 on the study's corpus, 7 on another one, 8 on both."""
HEAT_MAPS = {"figure9": 0, "figure10": 1, "figure6": 2, "figure11": 3}
"""Execution heat maps, by the place of their depth among the study's (the paper's 4, 8, 12 and 16 of 32 blocks)."""


def planned(config: Config) -> list[str]:
    """The figures whose records a study plans to measure, in the order of ``NAMES``; any of ``NAMES`` can be drawn."""
    fused = {run.variant.get("prior", "none") for run in config.runs()} - {"none"}
    traces = "buddy" in config.study.methods and bool(config.traced_backbones())
    depths = max((len(config.removed(name)) for name in config.traced_backbones()), default=0)
    wanted = {
        "accuracy_vs_budget": True,
        "latency": bool(config.timed_backbones()),
        "figure1": bool(fused & set(ORDERS["figure1"])),
        "figure4": traces,
        **{name: traces and place < depths for name, place in HEAT_MAPS.items()},
        "figure12": bool(config.predicting_runs()),
        "figure13": bool(config.predicting_runs()),
        "ablation": any(ablation.axes() for ablation in config.study.ablations),
    }
    return [name for name in NAMES if wanted.get(name)]


def subjects(config: Config, chosen: list[str]) -> list[str]:
    """Backbones that a figure of one backbone may show, the first that was measured: those of ablations come first.

    Args:
        config: the study.
        chosen: the backbones that its records are measured on.
    """
    ablated = [ablation.backbone for ablation in config.study.ablations]
    return sorted(chosen, key=lambda name: name not in ablated)
