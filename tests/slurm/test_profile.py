"""The profiles themselves: they load, and the lines that a user edits do what they say. Needs no Slurm."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import watch

ROOT = Path(__file__).resolve().parents[2]
STUDY = "tests/tiny.yaml"


def dry_run(profile: str | Path) -> str:
    """What Snakemake would do for the small study."""
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--profile", profile, "--configfile", STUDY, "--forceall"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "profile", ["slurm", "workflow/profiles/slurm", "workflow/profiles/local", "workflow/profiles/workstation"]
)
def test_a_profile_loads_from_the_clone(profile: str) -> None:
    assert watch.jobs_in(dry_run(profile))


def test_the_lines_a_user_edits(tmp_path: Path) -> None:
    text = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
    text = re.sub(r"^(  )# (slurm_(?:partition|account):)", r"\1\2", text, flags=re.M)
    begin, end = text.index("# set-resources:"), text.index("\n\n", text.index("# set-resources:"))
    text = text[:begin] + re.sub(r"^# ", "", text[begin:end], flags=re.M) + text[end:]
    text = text.replace("slurm_partition: gpu ", "slurm_partition: general ", 1)
    (tmp_path / "config.yaml").write_text(text)

    blocks = {job.rule: job for job in watch.jobs_in(dry_run(tmp_path)).values()}
    on_gpu = {rule for rule, job in blocks.items() if job.gpus}
    assert on_gpu == watch.ON_GPU
    for rule in on_gpu:  # a rule that asks for a GPU and is missing in the profile would run on any type
        assert "gpu_model=a100" in blocks[rule].text
        assert "slurm_partition=gpu" in blocks[rule].text
        assert "slurm_account=my-project" in blocks[rule].text
    assert not any("gpu_model" in job.text for rule, job in blocks.items() if rule not in on_gpu)
