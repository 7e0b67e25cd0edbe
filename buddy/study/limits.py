"""How long a job may take: a share of its backbone's hours, more at each retry."""

from __future__ import annotations

SHORTEST = 15
"""Minutes that every job gets at least: loading a backbone takes some, however small the work."""

SHARES = {
    **dict.fromkeys(("importance", "corpus_orders", "length_orders", "evaluate_auto"), 0.25),
    **dict.fromkeys(("calibrate", "predictor", "budget_eval", "evaluate", "solve"), 0.5),
    **dict.fromkeys(("train", "adapt", "pool", "answers"), 1.0),
    **dict.fromkeys(("trace", "breakdown"), 0.1),
    **dict.fromkeys(("rouge", "latency", "score"), 0.2),
}
"""Of each rule whose jobs go to the cluster: the share of the backbone's training hours that its first try gets."""


def minutes(rule: str, hours: float, attempt: int = 1, times: int = 1, at_most: int | None = None) -> int:
    """Time limit of a job.

    Args:
        rule: one of `SHARES`.
        hours: of the backbone, ``backbones.NAME.hours``.
        attempt: 1 for the first try; the second gets twice the time, the third three times.
        times: how often its work is done (a pass per batch size).
        at_most: the limit of the partition for a retry; the first try asks for what it needs.
    """
    wanted = max(SHORTEST, int(60 * hours * SHARES[rule] * times)) * attempt
    return wanted if at_most is None or attempt == 1 else min(wanted, at_most)
