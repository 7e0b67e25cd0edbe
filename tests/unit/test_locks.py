"""One writer at a time, and no lock that outlives its process."""

import dataclasses
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from buddy.errors import UserError
from buddy.storage import locks, processes
from buddy.storage.processes import Process

HOLD = "import sys; from buddy.storage import locks\nwith locks.held(sys.argv[1]):\n print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that writes `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_who_comes_second_is_refused_until_the_first_has_ended(tmp_path, holder):
    with pytest.raises(UserError, match=rf"out: is being written by process {holder.pid} on {socket.gethostname()}"):
        locks.held(tmp_path / "out").__enter__()
    with locks.held(tmp_path / "other", None):
        assert {path.name for path in locks.owners(tmp_path)} == {".other.lock", ".out.lock"}
    holder.communicate()
    with locks.held(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_removed_with_a_line(tmp_path, holder, caplog):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert locks.owners(tmp_path) == {}
    with locks.held(tmp_path / "out"):
        assert processes.read(tmp_path / ".out.lock").pid == os.getpid()
    (line,) = caplog.messages
    assert f"process {holder.pid}" in line
    assert line.endswith("which is gone: removed")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_let_go_when_its_work_fails(tmp_path):
    with pytest.raises(KeyError), locks.held(tmp_path / "a", tmp_path / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_number_given_again_is_another_process(tmp_path):
    """After a reboot, or when numbers have run out, somebody else has it."""
    me = Process.this()
    assert me.alive
    assert not dataclasses.replace(me, started="another boot 17").alive
    assert not dataclasses.replace(me, pid=2**22 + 1).alive


@pytest.mark.parametrize("text", ["", "{}", "not json"])
def test_an_illegible_lock_that_is_old_is_removed(tmp_path, text):
    lock = tmp_path / ".out.lock"
    lock.write_text(text)
    os.utime(lock, (0, 0))
    with locks.held(tmp_path / "out"):
        assert processes.read(lock) is not None


# On another host only Slurm can say.

SQUEUE = """#!/bin/sh
case "$*" in
  *--jobs=1) echo RUNNING ;;
  *--jobs=2) echo PENDING ;;
  *--jobs=3) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
  *) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize(("job", "alive"), [("1", True), ("2", False), ("3", False), ("4", True), ("", True)])
def test_a_process_on_another_host_lives_as_long_as_its_job(tmp_path, monkeypatch, job, alive):
    squeue = tmp_path / "squeue"
    squeue.write_text(SQUEUE)
    squeue.chmod(squeue.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    far = dataclasses.replace(Process.this(), host="node-of-another-name", job=job)
    assert far.alive is alive
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert far.alive is (alive and job != "1")  # the same job, queued again: its first process is gone
