"""A Slurm cluster for the tests of this folder, brought up once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import slurmd


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurmd.Cluster]:
    """A running one-node Slurm; without one the tests are skipped, or fail where BUDDY_REQUIRE_SLURM=1."""
    lacking = slurmd.missing()
    if lacking:
        reason = f"Slurm is not installed here ({', '.join(lacking)}); Debian: apt-get install slurm-wlm munge"
        if os.environ.get("BUDDY_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with slurmd.cluster() as running:
        yield running
