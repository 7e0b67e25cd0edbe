"""A copy of this checkout for tests that run the workflow, and what Snakemake says it would do there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def clone(folder: Path) -> Path:
    """This checkout as a user would have it: what git holds or would take, links as links."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def snakemake(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake of this environment in a folder, the package taken from that folder."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def planned(folder: Path, *arguments: str) -> dict[str, int]:
    """Number of jobs per rule that a dry run announces."""
    result = snakemake(folder, "-n", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    counts: dict[str, int] = {}
    for block in re.findall(r"Job stats:\n.*\n-+ +-+\n((?:.+\n)+)", result.stdout + result.stderr):
        counts.update({name: int(count) for name, count in re.findall(r"^(\S+) +(\d+)$", block, re.M)})
    counts.pop("total", None)
    return counts
