"""Who a process is, and whether it still runs: by host, boot and start time, or by its job in Slurm."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

AT_WORK = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
"""States of a Slurm job that has nodes. One that waits again after a preemption has no process."""


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same number.

    Attributes:
        host, pid: where it runs, and its number there.
        started: boot of the host and the process's start in it; "" where the system does not say.
        since: when it was noted, for people.
        job: its Slurm job, if it is one's.
    """

    host: str
    pid: int
    started: str
    since: str
    job: str = ""

    @classmethod
    def this(cls) -> Process:
        """The process that asks."""
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()), now, os.environ.get("SLURM_JOB_ID", ""))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Process:
        """From what `content` gave.

        Raises:
            TypeError, KeyError: it is something else.
        """
        return cls(**{name: content[name] for name in ("host", "pid", "started", "since", "job")})

    def content(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self)

    @property
    def alive(self) -> bool:
        """Whether it still runs; what cannot be known, on another host and outside Slurm, counts as running."""
        if self.host == socket.gethostname():
            return _started(self.pid) == self.started if self.started else _exists(self.pid)
        if not self.job:
            return True
        # The job that asks has been queued again: what it was before is gone.
        return self.job != os.environ.get("SLURM_JOB_ID") and slurm_state(self.job) in (*AT_WORK, "unknown")

    def __str__(self) -> str:
        inside = f", job {self.job} of Slurm" if self.job else ""
        return f"process {self.pid} on {self.host}{inside}, since {self.since}"


def slurm_state(job: str) -> str:
    """What Slurm says of a job: its state, "gone" if it knows none, "unknown" if it cannot be asked."""
    lines = query("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    if lines is None:
        return "unknown"
    return lines[0] if lines else "gone"


def query(*command: str) -> list[str] | None:
    """The lines that a command of Slurm's prints; None where it is not installed, fails or does not answer."""
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return None
    return [line for line in asked.stdout.splitlines() if line.strip()]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _started(pid: int) -> str:
    """Boot and start of a process, from /proc; "" where there is none, or no such process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"


def read(path: Path) -> Process | None:
    """The process that a file names; None for a file that is gone or damaged."""
    try:
        return Process.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError):
        return None
