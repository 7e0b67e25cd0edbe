"""Starts on a real Slurm that meet what a killed Snakemake left there, and studies that were edited meanwhile."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import finished
import pytest
import slurmd
import watch
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(watch.TIMEOUT_S + 120)]

OFTEN = "--slurm-init-seconds-before-status-checks=2"
STUDY = ("--configfile", "small.yaml", OFTEN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study of which one evaluation is to be done; the file `slow` makes it take for ever, `mistake` a mistake."""
    return finished.failing(finished.finished(tmp_path / "clone"))


def wait(ready: Callable[[], object], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.5)


def run(cluster: slurmd.Cluster, folder: Path) -> str:
    """What a whole call prints; the notes of an earlier one make room."""
    notes = folder.parent / f"{folder.name}-notes"
    if notes.exists():
        notes.rename(notes.with_name(f"{notes.name}-{time.monotonic_ns()}"))
    return watch.finish(cluster, folder, watch.start(cluster, folder, *STUDY)).output


def queued(cluster: slurmd.Cluster) -> list[str]:
    return cluster.command("squeue", "--noheader", "--format=%j").split()


def test_jobs_that_outlive_their_snakemake_are_not_doubled(cluster: slurmd.Cluster, folder: Path) -> None:
    (folder / "slow").touch()
    process = watch.start(cluster, folder, *STUDY)
    wait((folder / "started").exists, "job")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (name,) = queued(cluster)

    output = run(cluster, folder)
    assert f"1 jobs of study small are still in Slurm, of a Snakemake that is gone (process {process.pid} on" in output
    assert f"scancel --name={name}" in output
    assert queued(cluster) == [name]
    assert (folder / "tries").read_text().split() == ["evaluate"]

    cluster.command("scancel", f"--name={name}")
    wait(lambda: not queued(cluster), "empty queue")
    (folder / "slow").unlink()
    (folder / "mistake").touch()
    output = run(cluster, folder)
    assert (folder / "tries").read_text().split() == ["evaluate"] * 2, "a mistake is not tried again"
    end = output[output.index("1 job failed:") :]
    assert "evaluate: buddy: --data: nothing there" in end
    assert re.search(r"  alone  snakemake \S+ --profile slurm --configfile small\.yaml", end)


def test_a_job_refuses_a_study_that_was_edited_while_it_waited(cluster: slurmd.Cluster, folder: Path) -> None:
    cluster.command("sbatch", "--gpus=2", "--mem=10", "--output=/dev/null", "--wrap=sleep 3000", "--job-name=blocks")
    process = watch.start(cluster, folder, *STUDY)
    wait(lambda: any(name != "blocks" for name in queued(cluster)), "waiting job")
    edited = {**finished.SMALL, "evaluation": {**finished.SMALL["evaluation"], "limit": 3}}
    (folder / "small.yaml").write_text(yaml.safe_dump(edited))
    cluster.command("scancel", "--name=blocks")
    output = watch.finish(cluster, folder, process).output
    assert not (folder / "tries").exists(), "it has measured nothing"
    end = output[output.index("1 job failed:") :]
    assert "the study was edited after this job was submitted (evaluation.limit is null, here 3)" in end


def test_a_limit_of_the_partition_is_told_before_the_first_job(cluster: slurmd.Cluster, folder: Path) -> None:
    cluster.command("scontrol", "update", f"PartitionName={cluster.partition}", "MaxTime=00:10:00")
    try:
        output = run(cluster, folder)
    finally:
        cluster.command("scontrol", "update", f"PartitionName={cluster.partition}", "MaxTime=UNLIMITED")
    assert "Rule evaluate asks for 60 minutes, partition work grants 10 (MaxTime)" in output
    assert not (folder / "tries").exists()
    assert queued(cluster) == []
