"""One GPU for each job on a machine that has several: who comes first takes the first that is free.

Slurm gives a job its GPU; on a workstation nobody does. Where several jobs may have one at a time (``snakemake --resources
gpu=4``), the workflow names them in `VARIABLE`, and a job keeps one until its process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from buddy.errors import UserError

VARIABLE = "BUDDY_GPUS"
"""GPUs that jobs may take, by commas, as CUDA_VISIBLE_DEVICES would name them."""

_taken: list[tuple[str, int]] = []
"""The GPU of this process, and the descriptor of its lock, which the system lets go of when the process ends."""


def take() -> str | None:
    """Take a GPU for this process, which sees no other from then on; before anything asks CUDA.

    Returns:
        Its name; None where `VARIABLE` is not set.

    Raises:
        UserError: other jobs have them all.
    """
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if not names:
        return None
    if not _taken:
        free = next((found for name in names if (found := _lock(name)) is not None), None)
        if free is None:
            raise UserError(f"{VARIABLE}: other jobs have all of {', '.join(names)}; start fewer at a time")
        _taken.append(free)
    os.environ["CUDA_VISIBLE_DEVICES"] = _taken[0][0]
    return _taken[0][0]


def _lock(name: str) -> tuple[str, int] | None:
    folder = Path(tempfile.gettempdir()) / f"buddy-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / f"{name.replace('/', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return name, descriptor
