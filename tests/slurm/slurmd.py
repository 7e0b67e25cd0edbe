"""A real one-node Slurm in a temporary folder, for tests: munge, slurmctld and slurmd, with pretend GPUs.

No systemd, no root, nothing under /etc: every daemon runs in the foreground as a child of this process and as
its user, on free ports, so that several such clusters live side by side. `cluster` brings one up and, however
the body ends, takes every process of it down again. Run by hand, it gives a shell inside a cluster::

    python tests/slurm/slurmd.py            # or: python tests/slurm/slurmd.py COMMAND ARGUMENTS
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
SYSTEM_FOLDERS = "/usr/sbin:/sbin:/usr/local/sbin"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")
START_S = 60


def missing() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if _which(name) is None]


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}")


@dataclass
class Cluster:
    """A running one-node cluster.

    Attributes:
        folder: configuration, state, logs; removed with the cluster.
        environment: variables of a process that talks to this cluster, in place of `os.environ`.
        partition: where jobs go by default; its jobs can be preempted and are then requeued.
        urgent: partition whose jobs preempt the others.
    """

    folder: Path
    environment: dict[str, str]
    partition: str = "work"
    urgent: str = "urgent"
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, *arguments: str) -> str:
        """Standard output of a Slurm command (``squeue``, ``scontrol``, ...) run against this cluster."""
        done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def completed(self) -> list[dict[str, str]]:
        """What slurmctld itself logged at the end of each job (``JobId``, ``JobState``, ``Name``, ``WorkDir``, ...)."""
        log = self.folder / "jobcomp.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [dict(pair.split("=", 1) for pair in line.split() if "=" in pair) for line in lines]

    def logs(self, lines: int = 20) -> str:
        """The ends of the daemons' logs, for an error message."""
        parts = []
        for log in sorted(self.folder.glob("*.out.log")):
            tail = log.read_text(errors="replace").splitlines()[-lines:]
            parts.append(f"--- {log.name}\n" + "\n".join(tail))
        return "\n".join(parts)


@contextlib.contextmanager
def cluster(gpus: int = 2, cpus: int = 64, memory_mb: int = 500_000) -> Iterator[Cluster]:
    """Bring a cluster up for the time of the ``with`` body.

    Args:
        gpus: pretend GPUs of its node, at most 4; jobs that ask for one queue for them as they would for real ones.
        cpus, memory_mb: what the node claims to have, whatever the machine has, so that any job fits.

    Raises:
        RuntimeError: the daemons did not come up; the message holds their logs.
    """
    # Short, because a Unix socket's path may have 108 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    made = Cluster(folder, _environment(folder))
    try:
        _configure(made, gpus, cpus, memory_mb)
        _start(made)
        yield made
    finally:
        _stop(made)
        shutil.rmtree(folder, ignore_errors=True)


def _environment(folder: Path) -> dict[str, str]:
    """Variables under which Slurm's commands find this cluster and no other."""
    shim = folder / "bin"
    shim.mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    path = f"{shim}:{kept.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}"
    configuration = str(folder / "slurm.conf")
    # Inside a job, Snakemake's Slurm plugin drops every SLURM_ variable but the job's identity before it calls srun,
    # which then looks for the configuration under /etc. This srun names the configuration again.
    wrapper = shim / "srun"
    wrapper.write_text(f'#!/bin/sh\nSLURM_CONF={configuration} exec {_which("srun")} "$@"\n')
    wrapper.chmod(0o755)
    return {**kept, "PATH": path, "SLURM_CONF": configuration}


def _configure(made: Cluster, gpus: int, cpus: int, memory_mb: int) -> None:
    """Write slurm.conf and its companions."""
    folder = made.folder
    user = getpass.getuser()
    host = socket.gethostname().split(".")[0]
    controller_port, node_port = _free_ports(2)
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until its first credential has expired: seconds here, not the usual two minutes.
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.log
ReturnToService=2
KillWait=5
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory_mb} Gres=gpu:{gpus} State=UNKNOWN
PartitionName={made.partition} Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName={made.urgent} Nodes={host} MaxTime=INFINITE PriorityTier=10 State=UP
""")
    # Devices that every machine has stand in for GPUs; Slurm hands them out one job at a time, as it would real ones.
    lines = [f"Name=gpu File={device}" for device in DEVICES[:gpus]]
    (folder / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
    if _version() >= (23, 11):
        # From this release on slurmd insists on cgroups unless told otherwise; a container has none to give.
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def _start(made: Cluster) -> None:
    """Start the daemons in order and wait until the node takes jobs."""
    folder = made.folder
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    # --force: munged warns, and would refuse, when a parent of its files is writable by others, as /tmp is.
    _daemon(
        made,
        "munged",
        "--foreground",
        "--force",
        f"--socket={folder}/munge.socket",
        f"--key-file={key}",
        f"--pid-file={folder}/munged.pid",
        f"--log-file={folder}/munged.log",
        f"--seed-file={folder}/munged.seed",
    )
    _wait(made, "munged's socket", lambda: (folder / "munge.socket").is_socket())
    _daemon(made, "slurmctld", "-D")
    _wait(made, "slurmctld", lambda: "UP" in made.command("scontrol", "ping"))
    _daemon(made, "slurmd", "-D")
    _wait(made, "an idle node", lambda: "idle" in made.command("sinfo", "--noheader", "--format=%T").split())


def _daemon(made: Cluster, program: str, *arguments: str) -> None:
    executable = _which(program)
    if executable is None:
        raise RuntimeError(f"{program} is not installed")
    log = (made.folder / f"{program}.out.log").open("wb")
    made.daemons.append(
        subprocess.Popen(
            [executable, *arguments],
            env=made.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    )
    log.close()


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent does: a killed test leaves no daemon behind."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait(made: Cluster, what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    problem = ""
    while time.monotonic() < deadline:
        ended = [daemon for daemon in made.daemons if daemon.poll() is not None]
        if ended:
            raise RuntimeError(f"{ended[0].args} ended with {ended[0].returncode}\n{made.logs()}")
        try:
            if ready():
                return
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            problem = f" ({error})"
        time.sleep(0.2)
    raise RuntimeError(f"no {what} after {START_S} s{problem}\n{made.logs()}")


def _stop(made: Cluster) -> None:
    """End jobs, then daemons, then whatever process still belongs to this cluster."""
    if len(made.daemons) == 3:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            made.command("scancel", "--user", getpass.getuser())
            deadline = time.monotonic() + 10
            while made.command("squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
    for daemon in reversed(made.daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for process in _processes_of(made.folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _processes_of(folder: Path) -> list[int]:
    """Processes, other than this one, whose environment names this cluster's configuration."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or belongs to somebody else
            continue
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _version() -> tuple[int, int]:
    text = subprocess.run([_which("slurmd") or "slurmd", "-V"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


if __name__ == "__main__":
    if missing():
        sys.exit(f"not installed: {', '.join(missing())} (Debian: apt-get install slurm-wlm munge)")
    with cluster() as running:
        sys.exit(subprocess.call(sys.argv[1:] or [os.environ.get("SHELL", "/bin/sh")], env=running.environment))
