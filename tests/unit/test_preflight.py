"""What a cluster grants against what jobs ask for, told by commands that answer as Slurm's do."""

import pytest
from checkout import ROOT

from buddy.study import preflight
from buddy.study.preflight import Asked

ANSWERS = {
    "scontrol": """case "$*" in
  "show config") echo "MinJobAge               = {age} sec"; echo "MaxJobCount             = {count}" ;;
  "show partition --oneliner")
    echo "PartitionName=cpu AllowGroups=ALL Default=YES MaxTime=02:00:00 State=UP"
    echo "PartitionName=gpu AllowGroups=ALL Default=NO MaxTime=1-12:00:00 State=UP"
    echo "PartitionName=long Default=NO MaxTime=UNLIMITED State=DOWN" ;;
esac""",
    "sinfo": 'echo "cpu (null)"; echo "gpu gpu:a100:4(S:0-1),tmpdisk:9"; echo "gpu gpu:h100:8"; echo "long gpu:2"',
    "sacctmgr": """case "$*" in
  *format=MaxSubmitJobs) echo {submit} ;;
  *format=Account) echo ours; echo "theirs" ;;
esac""",
    "sacct": "exit {sacct}",
}
FINE = Asked("train", 36 * 60, "gpu", "ours", 1, "h100")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands."""

    def answers(age=300, count=10_000, submit="", sacct=0):
        for name, script in ANSWERS.items():
            text = script.format(age=age, count=count, submit=submit, sacct=sacct)
            (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    answers()
    return answers


def errors(*asked, jobs=64, status="squeue", results="/tmp"):
    from pathlib import Path

    return preflight.check(asked, jobs, status, Path(results)).errors


def test_what_fits_is_not_found_fault_with(cluster):
    assert errors(FINE) == []
    assert preflight.check([FINE], 64, "squeue", preflight.Path("/tmp")).minutes_at_most == {"train": 36 * 60}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked("train", 36 * 60 + 1, "gpu", gpus=1), ["train asks for 2161 minutes", "gpu grants 2160", "`hours`"]),
        (Asked("report", 121), ["report asks for 121 minutes", "partition cpu grants 120"]),
        (Asked("train", 60, "gpus", gpus=1), ["slurm_partition: gpus", "cpu, gpu, long"]),
        (Asked("train", 60, "long", gpus=1), ["Partition long is not up"]),
        (Asked("train", 60, gpus=1), ["asks for a GPU, partition cpu has none", "sinfo"]),
        (Asked("train", 60, "gpu", gpus=1, gpu_model="v100"), ["gpu_model: v100", "a100, h100"]),
        (Asked("train", 60, "gpu", "nobody", 1), ["slurm_account: nobody", "ours, theirs"]),
    ],
)
def test_what_cannot_work_names_what_to_edit(cluster, asked, words):
    (error,) = errors(asked)
    assert all(word in error for word in words), error
    assert "Edit workflow/profiles/slurm/config.yaml" in error or "workflow/profiles/slurm/config.yaml" in error


@pytest.mark.parametrize(
    ("age", "status", "fine"),
    [(50, "squeue", False), (239, "squeue", False), (240, "squeue", True), (50, "sacct", True)],
)
def test_squeue_must_remember_a_job_for_longer_than_the_longest_poll(cluster, age, status, fine):
    cluster(age=age)
    found = errors(FINE, status=status)
    assert (found == []) is fine
    if not fine:
        assert f"MinJobAge is {age} s" in found[0]
        assert "slurm-status-command: sacct" in found[0]


def test_a_status_command_that_does_not_answer(cluster):
    cluster(sacct=1)
    (error,) = errors(FINE, status="sacct")
    assert "slurm-status-command: squeue" in error


@pytest.mark.parametrize(
    ("limits_", "jobs", "said"),
    [({"submit": 20}, 64, 20), ({"submit": 64}, 64, None), ({"submit": 20}, None, 20), ({"count": 50}, 64, 50)],
)
def test_more_jobs_than_may_be_submitted(cluster, limits_, jobs, said):
    cluster(**limits_)
    found = errors(FINE, jobs=jobs)
    assert len(found) == (said is not None)
    assert all(f"Start with -j {said} or fewer" in error for error in found)


def test_by_hand_it_asks_with_the_profile_and_the_slowest_backbone(cluster, tmp_path, monkeypatch, capsys):
    from buddy import cli

    content = """
jobs: 30
slurm-status-command: squeue
default-resources: {slurm_partition: gpu}
set-resources: {train: {gpu_model: v100}}
"""
    (tmp_path / "config.yaml").write_text(content)
    cluster(submit=20)
    study = ROOT / "config.yaml"
    for arguments, expected in (([], ["v100", "-j 30"]), (["--jobs", "5"], ["v100"])):
        with pytest.raises(SystemExit) as ended:
            cli.main(["preflight", str(study), "--profile", str(tmp_path), *arguments])
        assert ended.value.code == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.startswith("error: ") for line in lines] == [True] * len(expected) + [False]
        assert all(word in " ".join(lines) for word in expected)  # what its largest backbone takes fits into MaxTime


def test_by_hand_without_slurm_is_one_line(monkeypatch, tmp_path, capsys):
    from buddy import cli

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.main(["preflight", str(ROOT / "config.yaml")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_where_slurm_does_not_answer_nothing_is_claimed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert errors(FINE) == []
