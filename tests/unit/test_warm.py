"""Commands that a waiting process runs end, write and die as they do alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STARTER = """\
import os, sys, time
from buddy import warm
warm.start()
print(os.environ[warm.VARIABLE], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def waiting():
    """The path of a socket behind which a process waits."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    path = Path(starter.stdout.readline().strip())
    until(path.exists)
    yield path
    starter.stdin.close()
    starter.wait()
    until(lambda: not path.parent.exists())  # it ends with the process that it is there for


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "BUDDY_WARM"}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def until(ready, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def buddy(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "buddy", *arguments],
        cwd=folder,
        env=environment(**more),
        capture_output=True,
        text=True,
    )


COMMANDS = [
    ("backbone", "--random", "tiny-llama", "--name", "tiny", "--blocks", "6", "--out", "made"),
    ("backbone", "--random", "tiny-lama", "--name", "tiny", "--blocks", "6", "--out", "other"),
    ("importance", "--backbone", "nowhere", "--corpus", "x", "--indicator", "taylor", "--out", "x.json"),
    ("nonsense",),
    ("train", "--help"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_a_command_says_and_leaves_what_it_does_alone(waiting, tmp_path, arguments):
    ended = []
    for name, how in (("alone", {}), ("warm", {"BUDDY_WARM": str(waiting)})):
        (tmp_path / name).mkdir()
        done = buddy(tmp_path / name, *arguments, **how)
        made = {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.suffix in (".safetensors", ".json") and not path.name.startswith(".")
        }
        ended.append((done.returncode, done.stdout, done.stderr, made))
    assert ended[0] == ended[1]


def forked(waiting: Path, folder: Path, **more: str) -> bool:
    """Whether the waiting process does a command's work: then the command itself imports next to nothing."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "buddy", "importance", "--help"],
        cwd=folder,
        env=environment(BUDDY_WARM=str(waiting), **more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    return "buddy.cli" not in done.stderr


def test_it_is_the_waiting_process_that_works(waiting, tmp_path):
    """A command in another environment than the one that was imported in does its work itself."""
    assert forked(waiting, tmp_path)
    assert not forked(waiting, tmp_path, HF_HUB_OFFLINE="maybe")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_end_of_a_command_is_the_end_of_its_work(waiting, tmp_path, number, status):
    made = buddy(tmp_path, "backbone", "--random", "tiny-llama", "--name", "tiny", "--blocks", "6", "--out", "tiny")
    assert made.returncode == 0, made.stderr
    (tmp_path / "text.txt").write_text("words and words " * 20000)
    long = ("importance", "--backbone", "tiny", "--corpus", "text.txt", "--indicator", "delta_ppl", "--samples", "2000")
    process = subprocess.Popen(
        [sys.executable, "-m", "buddy", *long, "--length", "128", "--out", "made.json"],
        cwd=tmp_path,
        env=environment(BUDDY_WARM=str(waiting)),
        stderr=subprocess.DEVNULL,
    )
    until(lambda: working(waiting))
    time.sleep(1)  # it is in the middle of its work, which takes half a minute
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    until(lambda: not working(waiting))
    assert not (tmp_path / "made.json").exists()


def working(waiting: Path) -> list[str]:
    """Processes that work for the one that waits."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            children = (folder / "task" / folder.name / "children").read_text().split()
            if str(waiting).encode() in words and children:
                return children
    return []


def test_whoever_leaves_while_asking_ends_nobody_else(waiting, tmp_path):
    """Askers that are killed half-way, or say nothing that can be read, cost no other command its end."""
    for said in (b"", b"\0\0\0", (1000).to_bytes(8, "big") + b"{", (4).to_bytes(8, "big") + b"nope"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
            asker.connect(str(waiting))
            asker.sendall(said)
    assert forked(waiting, tmp_path)
