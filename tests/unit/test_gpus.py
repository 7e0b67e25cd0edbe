"""Several jobs on one machine, a GPU for each; no GPU is needed to tell them apart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import os, sys
from buddy.errors import UserError
from buddy.storage import gpus
try:
    taken = gpus.take(), gpus.take()  # a second time it is the same one
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
print(*taken, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
input()
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Starts one, which keeps its GPU until it is told to end; what it says of it, and the process."""
    started = []

    def start(names):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "BUDDY_GPUS": names}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        one = subprocess.Popen(
            [sys.executable, "-c", JOB], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(one)
        return one.stdout.readline().split("\n")[0], one

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_each_job_has_a_gpu_of_its_own_and_gives_it_back(job):
    first, second = job("4,GPU-a1"), job("4,GPU-a1")
    assert [first[0], second[0]] == ["4 4 4", "GPU-a1 GPU-a1 GPU-a1"]
    said, third = job("4,GPU-a1")
    assert said == "BUDDY_GPUS: other jobs have all of 4, GPU-a1; start fewer at a time"
    assert third.wait() == 2
    second[1].send_signal(signal.SIGKILL)
    second[1].wait()
    assert job("4,GPU-a1")[0] == "GPU-a1 GPU-a1 GPU-a1"


def test_where_none_are_named_nothing_changes(job):
    assert job("")[0] == "None None None"
