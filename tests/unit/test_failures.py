"""A failed job's own line, told from what stands around it."""

import os

import pytest

from buddy import cli
from buddy.study.failures import Failure, summary

BAR = "  0%|   | 0/8\r 12%|#  | 1/8\r"


@pytest.mark.parametrize(
    ("log", "line", "mistake"),
    [
        ("INFO loading\nbuddy: --data: results/x: not found\n", "buddy: --data: results/x: not found", True),
        (f"{BAR}buddy: --out /: is not writable\n\n", "buddy: --out /: is not writable", True),
        ("buddy: first\nwandb: waiting for the process to finish\n", "buddy: first", True),
        ("Traceback (most recent call last):\n  File x\nRuntimeError: CUDA error\n", "RuntimeError: CUDA error", False),
        ("buddy: interrupted\n", "buddy: interrupted", False),
        ("buddy: unexpected error: KeyError\n", "buddy: unexpected error: KeyError", False),
        (
            f"{BAR}slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***\n",
            "slurmstepd: error: *** JOB 7 CANCELLED DUE TO TIME LIMIT ***",
            False,
        ),
        (None, "(it left no log)", False),
    ],
)
def test_the_line_that_says_why(tmp_path, log, line, mistake):
    path = tmp_path / "job.log"
    if log is not None:
        path.write_text(log)
    failure = Failure("train", "runs/a/run.json", (path,), "snakemake --cores 1 runs/a/run.json")
    assert failure.said[0] == line
    assert failure.by_mistake is mistake
    text = summary([failure])
    assert f"train: {line}" in text.splitlines()
    assert "runs/a/run.json" in text
    assert ("job.log" in text) is (log is not None)
    assert text.endswith("alone  snakemake --cores 1 runs/a/run.json")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA error: an illegal access"),
        ConnectionError("no network"),
        FileNotFoundError(2, "No such file", "x.json"),
        OSError(28, "No space left on device", "results/x"),
        ValueError("a bug"),
    ],
)
def test_a_mistake_is_what_the_command_line_ends_with_status_2(tmp_path, capsys, error):
    text, status = cli._told(error)
    with pytest.raises(SystemExit):
        cli._stop(text, status)
    (tmp_path / "job.log").write_text(capsys.readouterr().err)
    assert Failure("train", "x", (tmp_path / "job.log",), "").by_mistake is (status == 2)


def test_what_slurm_captured_counts_where_the_job_did_not_begin(tmp_path):
    """A job that is refused before it starts leaves the log of an earlier try as it was."""
    own, around = tmp_path / "own.log", tmp_path / "17.log"
    own.write_text("buddy: an earlier try\n")
    os.utime(own, (0, 0))
    around.write_text("WorkflowError in file Snakefile:\nbuddy: config.yaml: the study was edited\nsrun: error\n")
    failure = Failure("evaluate", "records/a", (own, around), "snakemake records/a")
    assert failure.said == ("buddy: config.yaml: the study was edited", around)
