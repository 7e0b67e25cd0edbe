"""Calls of Snakemake that meet what earlier ones left: locks, damaged records, edited studies, jobs that failed."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import finished
import pytest
import yaml
from checkout import planned, snakemake
from finished import ACCURACY, RUN, SMALL, STUDY

from buddy.storage.digests import digest
from buddy.storage.files import write_json
from buddy.storage.processes import Process
from buddy.study import sessions
from buddy.study.config import merge, parse


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished study."""
    folder = finished.finished(tmp_path_factory.mktemp("clone"))
    assert planned(folder, *STUDY) == {}
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "clone", symlinks=True)


def session(folder, process, **fields):
    """As a call of Snakemake notes itself."""
    os.chdir(folder)
    one = sessions.Session(process, "small", "snakemake", **fields)
    one.write()
    return one


@pytest.fixture(autouse=True)
def back():
    before = os.getcwd()
    yield
    os.chdir(before)


def lock(folder, names=f"{ACCURACY}\n"):
    path = folder / ".snakemake/locks/0.output.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(names)
    return path


def gone():
    """A process that has been and is no more."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Process.this()
    process = Process(me.host, child.pid, _started(child.pid), me.since)
    child.kill()
    child.communicate()
    assert not process.alive
    return process


def _started(pid):
    from buddy.storage import processes

    return processes._started(pid)


# ---- what is gone or cut is made again -----------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "stage"),
    [
        (lambda f: (f / ACCURACY / "removed~8.json").unlink(), "evaluate"),
        (lambda f: cut(f / ACCURACY / "removed~4.json"), "evaluate"),
        (lambda f: cut(f / f"results/small/records/training/{RUN}.json"), "train"),
        (lambda f: (f / f"results/small/records/training/{RUN}.json").unlink(), "train"),
    ],
)
def test_a_record_that_is_gone_or_cut_is_made_again(folder, spoil, stage):
    spoil(folder)
    jobs = planned(folder, *STUDY)
    assert jobs.pop(stage) == 1
    assert jobs["table"] >= 1
    assert set(jobs) <= {"evaluate", "table", "figure", "all"}


# ---- locks ---------------------------------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_snakemake_is_removed_with_a_line(folder):
    left, other = lock(folder), folder / ".snakemake/locks/1.output.lock"
    other.write_text("results/another/records\n")
    session(folder, gone())
    result = snakemake(folder, "-n", *STUDY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Removed .snakemake/locks/0.output.lock: its Snakemake is gone." in result.stdout + result.stderr
    assert not left.exists()
    assert other.exists()  # another study's


def test_the_lock_of_a_live_one_stays_and_its_process_is_named(folder):
    left = lock(folder)
    session(folder, Process.this())
    shutil.rmtree(folder / ACCURACY)
    result = snakemake(folder, "--cores", "1", ACCURACY, *STUDY)
    assert result.returncode != 0
    assert f"Study small is at work already: process {os.getpid()} on" in result.stdout + result.stderr
    assert "cannot be locked" in result.stdout + result.stderr
    assert left.exists()


# ---- what a job refuses --------------------------------------------------------------------------------------------------


def test_a_job_refuses_a_study_that_was_edited_since_it_was_submitted(folder):
    content = parse(merge(yaml.safe_load((folder / "config.yaml").read_text()), SMALL)).model_dump(mode="json")
    write_json(folder / "results/small/study.json", content)
    (folder / "small.yaml").write_text(
        yaml.safe_dump({**SMALL, "evaluation": {"tasks": ["piqa", "arc_easy"], "limit": 3}})
    )
    remote = ("--mode", "remote", "--cores", "1", "--nolock", "--force", ACCURACY)
    result = snakemake(folder, *remote, *STUDY, BUDDY_STUDY=digest(content))
    said = [line for line in (result.stdout + result.stderr).splitlines() if "buddy: " in line]
    assert result.returncode != 0
    assert said == [
        "buddy: config.yaml with small.yaml: the study was edited after this job was submitted "
        "(evaluation.limit is null, here 3). Put it back, or stop Snakemake (Ctrl-C) and start it again."
    ]


# ---- jobs that fail, and jobs that outlive their Snakemake ---------------------------------------------------------------


@pytest.fixture
def failing(folder):
    return finished.failing(folder)


@pytest.mark.parametrize(("mistake", "tries"), [(True, 1), (False, 3)])
def test_a_failed_jobs_own_line_stands_at_the_end_and_a_mistake_is_not_tried_again(failing, mistake, tries):
    if mistake:
        (failing / "mistake").touch()
    result = snakemake(failing, "--cores", "1", *STUDY)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert (failing / "tries").read_text().split() == ["evaluate"] * tries, output
    end = output[output.index("1 job failed:") :]
    assert len(end.splitlines()) <= 12, end
    line = "buddy: --data: nothing there" if mistake else "RuntimeError: CUDA error"
    assert f"evaluate: {line}\n  makes  {ACCURACY}\n  log    results/small/logs/evaluate/{RUN}.log\n" in end
    (command,) = re.findall(r"  alone  (.*)", end)
    assert shlex.split(command) == ["snakemake", ACCURACY, "--cores", "1", "--configfile", "small.yaml"]


def test_after_kill_9_the_same_command_names_what_still_runs_and_then_recovers(failing):
    (failing / "slow").touch()
    environment = {**os.environ, "PYTHONPATH": str(failing)}
    first = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", *STUDY],
        cwd=failing, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (failing / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)  # Snakemake alone: its job goes on
    first.wait()
    try:
        again = snakemake(failing, "--cores", "1", *STUDY)
        output = again.stdout + again.stderr
        assert again.returncode != 0
        assert "Removed .snakemake/locks/" in output
        (job,) = re.findall(r"is still being written by process (\d+) on .*End it: kill \1;", output)
        assert (failing / "tries").read_text().split() == ["evaluate"]  # it was not started a second time
        os.kill(int(job), signal.SIGTERM)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    (failing / "slow").unlink()
    (failing / "mistake").touch()
    time.sleep(1)
    last = snakemake(failing, "--cores", "1", *STUDY)
    assert "evaluate: buddy: --data: nothing there" in last.stdout + last.stderr  # the job itself was reached
    assert json.loads((failing / "results/small/study.json").read_text())["study"]["name"] == "small"


# Rules that were written anew


def test_what_the_same_command_made_stands_when_its_rule_is_written_anew(folder):
    small = {**SMALL, "data": {"source": "embedded"}}
    (folder / "small.yaml").write_text(yaml.safe_dump(small))
    sets = {name: f"results/small/data/{name}/data.json" for name in ("piqa", "arc_easy")}
    for output in sets.values():
        (folder / output).unlink()
    made = snakemake(folder, "--cores", "1", *sets.values(), *STUDY)
    assert made.returncode == 0, made.stderr
    # as an older form of the rule would have been noted: options in another order, and those of one another
    for name, note in {name: _noted(folder, output) for name, output in sets.items()}.items():
        content = json.loads(note.read_text())
        command, log = content["shellcmd"].split(" > ")
        words = shlex.split(command)
        pairs = [words[at : at + 2] for at in range(4, len(words), 2)]
        source = {"piqa": "embedded", "arc_easy": "elsewhere"}[name]
        told = [word for option, value in pairs[::-1] for word in (option, source if option == "--source" else value)]
        old = {"code": "python -m buddy data {params.x} > {log:q} 2>&1", "params": ["'x'"]}
        note.write_text(json.dumps({**content, **old, "shellcmd": f"{shlex.join([*words[:4], *told])} > {log}"}))
    again = snakemake(folder, "-n", "--cores", "1", *sets.values(), *STUDY)
    assert "1 outputs stand" in again.stdout + again.stderr
    assert re.findall(r"rule data:\n +output: (\S+)", again.stdout + again.stderr) == [sets["arc_easy"]]


def _noted(folder, output):
    """The file in which Snakemake notes how an output was made."""
    found = sessions.notes("metadata", folder / ".snakemake")
    return found[next(path for path in found if path.as_posix() == output)]


# Several GPUs


@pytest.mark.parametrize(
    ("arguments", "visible", "named"),
    [
        (("--cores", "1"), "", "-"),
        (("--cores", "1", "--resources", "gpu=1"), "", "-"),
        (("--profile", "workflow/profiles/workstation"), "", "0,1,2,3"),
        (("--cores", "1", "--resources", "gpu=2"), "5,7", "5,7"),
    ],
)
def test_where_jobs_share_several_gpus_they_are_named_to_each(folder, arguments, visible, named):
    main = "import os\nfrom pathlib import Path\nfrom buddy import cli\n"
    told = 'Path("told").write_text(os.environ.get("BUDDY_GPUS", "-"))\ncli.main()\n'
    (folder / "buddy/__main__.py").write_text(main + told)
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "data": {"source": "embedded"}}))
    data = "results/small/data/piqa/data.json"
    (folder / data).unlink()
    ran = snakemake(folder, data, *arguments, *STUDY, CUDA_VISIBLE_DEVICES=visible)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "told").read_text() == named
