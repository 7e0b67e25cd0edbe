"""How long a job may take: a share of its backbone's hours, more at each retry."""

from __future__ import annotations

SHORTEST = 15
"""Minutes that every job gets at least: loading a backbone takes some, however small the work."""


def minutes(share: float, hours: float, attempt: int = 1, times: int = 1, at_most: int | None = None) -> int:
    """Time limit of a job.

    Args:
        share: of the backbone's hours, that of the job's stage (`buddy.study.jobs`).
        hours: of the backbone, ``backbones.NAME.hours``.
        attempt: 1 for the first try; the second gets twice the time, the third three times.
        times: how often its work is done (a pass per batch size).
        at_most: the limit of the partition for a retry; the first try asks for what it needs.
    """
    wanted = max(SHORTEST, int(60 * hours * share * times)) * attempt
    return wanted if at_most is None or attempt == 1 else min(wanted, at_most)
