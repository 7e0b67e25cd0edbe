"""The main job on a real Slurm: `snakemake --profile slurm -j 64`, and what happens to jobs that end early."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import slurmd
import watch
from checkout import clone

from buddy.study import config, records

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(watch.TIMEOUT_S + 120)]

ROOT = Path(__file__).resolve().parents[2]
STUDY = "tests/tiny.yaml"
HEAVY = {watch.VERBS.get(rule, rule) for rule in watch.ON_GPU} - {"gates"}  # FiRST is not among the methods below
SMALL = """\
study: {methods: [dense, buddy, sleb, pudding], removed: {tiny: [1]}, peers_removed: {tiny: [1]}, ablations: []}
predictor: {presets: [tuned]}
"""
"""Of the small study what has every rule in it once: the cluster is this machine."""
OFTEN = "--slurm-init-seconds-before-status-checks=2"

PROBE = """\
localrules: all, fetch
rule all:
    input: "work.txt", "fails_once.txt", "hangs_once.txt"
rule fetch:
    output: "fetch.txt"
    shell: "python -m buddy fetch {output}"
rule work:
    input: "fetch.txt"
    output: "work.txt"
    shell: "python -m buddy work {output}"
rule fails_once:
    input: "fetch.txt"
    output: "fails_once.txt"
    shell: "python -m buddy fails_once {output}"
rule hangs_once:
    input: "fetch.txt"
    output: "hangs_once.txt"
    resources: gpu=2
    shell: "python -m buddy hangs_once {output}"
"""
PROBE_COMMAND = """\
import os, sys, time
verb, out = sys.argv[1:]
with open(out + ".tries", "a") as tries:
    tries.write(os.environ.get("SLURM_JOB_ID", "none") + "\\n")
if len(open(out + ".tries").readlines()) == 1:
    if verb == "fails_once":
        sys.exit("the first try fails")
    if verb == "hangs_once":
        time.sleep(600)
open(out, "w").close()
"""


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """A workflow of four small jobs under this repository's Slurm profile."""
    folder = tmp_path / "probe"
    (folder / "buddy").mkdir(parents=True)
    (folder / "Snakefile").write_text(PROBE)
    (folder / "buddy" / "__main__.py").write_text(PROBE_COMMAND)
    (folder / "slurm").symlink_to((ROOT / "slurm").resolve())
    return folder


def test_a_study_runs_through_slurm_and_nowhere_else(cluster: slurmd.Cluster, tmp_path: Path) -> None:
    folder = clone(tmp_path / "clone")
    (folder / "small.yaml").write_text(SMALL)
    process = watch.start(cluster, folder, "--configfile", STUDY, "small.yaml", OFTEN)
    run = watch.finish(cluster, folder, process)

    assert run.returncode == 0, run.output[-6000:] + cluster.logs()
    assert run.faults(HEAVY) == []
    assert all(job.finished for job in run.jobs.values())
    assert any(job.gpus for job in run.remote()), "no job asked for a GPU"
    kept = {log.stem for log in (folder / ".snakemake" / "slurm_logs").rglob("*.log")}
    assert kept == set(run.ended), "each Slurm job's log is kept"

    study = config.read(folder / "config.yaml", folder / STUDY, folder / "small.yaml")
    trained = [one for one in study.runs() if one.method != "dense"]
    results = folder / "results" / study.study.name
    count = {
        kind: len(list(records.find(results / "records" / kind)))
        for kind in ("training", "accuracy", "latency", "breakdown")
    }
    assert {one.method for one in trained} == {"buddy", "sleb", "pudding"}
    assert len(trained) == 3
    assert count["training"] == len(trained) + len(study.predictor.presets)
    assert count["accuracy"] == 1 + sum(len(study.depths(one)) for one in trained) == 4
    assert count["latency"] > 0
    assert count["breakdown"] > 0
    for table in study.measured_tables():
        assert (results / "tables" / f"{table}.csv").is_file()


def test_preempted_and_failed_jobs_come_back(cluster: slurmd.Cluster, probe: Path) -> None:
    process = watch.start(cluster, probe, OFTEN)
    hanging = probe / "hangs_once.txt.tries"
    deadline = time.monotonic() + 120
    while not hanging.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    cluster.command(
        "sbatch", f"--partition={cluster.urgent}", "--gpus=2", "--mem=10", "--output=/dev/null", "--wrap=true"
    )
    run = watch.finish(cluster, probe, process)

    assert run.returncode == 0, run.output[-6000:] + cluster.logs()
    assert run.faults({"work", "fails_once", "hangs_once"}) == []
    jobs = {job.rule: job for job in run.jobs.values()}
    preempted = hanging.read_text().split()
    assert preempted == jobs["hangs_once"].submitted * 2, "Slurm queued the same job again"
    failed = (probe / "fails_once.txt.tries").read_text().split()
    assert failed == jobs["fails_once"].submitted
    assert len(set(failed)) == 2, "Snakemake submitted it once more"
    assert run.ended[failed[0]]["JobState"] == "FAILED"
    for job in failed:
        assert list((probe / ".snakemake" / "slurm_logs" / "rule_fails_once").rglob(f"{job}.log"))


def test_the_watch_sees_jobs_that_ran_outside_slurm(cluster: slurmd.Cluster, probe: Path) -> None:
    process = watch.start(cluster, probe, "--executor", "local", "work.txt")
    run = watch.finish(cluster, probe, process)

    assert run.returncode == 0, run.output[-6000:]
    (fault,) = run.faults({"work"})
    assert fault.startswith("ran outside Slurm")
    assert "buddy work" in fault
