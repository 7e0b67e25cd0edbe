"""Who ran where: Snakemake's own account of a run, held against what slurmctld and the processes themselves say.

Three sources that know nothing of each other: Snakemake's output (which jobs it calls local, which it submitted),
slurmctld's job completion log, and a note left by every Python process at its start (`leave_notes`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

import slurmd

TIMEOUT_S = 1500
ON_GPU = {
    *("importance", "corpus_orders", "length_orders", "answers", "train", "calibrate"),
    *("pool", "gates", "adapt", "predictor"),
    *("evaluate", "solve", "trace", "rouge", "score", "latency", "breakdown", "budget_eval"),
    *("evaluate_auto", "evaluate_whole", "solve_auto"),
}
"""Rules that ask for a GPU: none of their jobs may run where Snakemake runs."""
ANSWERS = "data --answers-by"
"""A verb that fetches where Snakemake runs, and with this option loads a backbone and asks it."""
VERBS = {
    **{"corpus_orders": "importance", "length_orders": "importance"},
    **{"budget_eval": "budget-eval", "answers": ANSWERS},
    **{"evaluate_auto": "evaluate", "evaluate_whole": "evaluate", "solve_auto": "solve"},
}
"""Verb of ``python -m buddy`` that such a rule runs, where that is not its name."""
NOTE = """\
import json, os, sys
with open(os.path.join(os.environ["NOTES"], f"{os.getpid()}.json"), "w") as note:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_GPUS_ON_NODE")
    json.dump({"argv": sys.orig_argv, **{name: os.environ.get(name) for name in names}}, note)
"""


@dataclass
class Job:
    """One job as Snakemake tells it."""

    number: int
    rule: str
    local: bool
    gpus: int
    text: str
    submitted: list[str] = field(default_factory=list)
    finished: bool = False


@dataclass
class Run:
    """A finished call of Snakemake.

    Attributes:
        returncode, output: of the call.
        jobs: Snakemake's jobs by its number for them.
        ended: slurmctld's log of the jobs of this run, by Slurm's number for them.
        notes: what each Python process that a job started saw at its start.
        commands: for each rule, the verbs of the watched program (``python -m buddy VERB``) that it runs.
    """

    folder: Path
    returncode: int
    output: str
    jobs: dict[int, Job]
    ended: dict[str, dict[str, str]]
    notes: list[dict[str, str | None]]
    commands: dict[str, set[str]]

    def faults(self, heavy: set[str]) -> list[str]:
        """Every sign that a job which is not local ran outside Slurm; empty when all is well.

        Args:
            heavy: verbs that must have run, and in Slurm, whatever Snakemake calls their rules.
        """
        return [*self._unsubmitted(), *self._uncounted(), *self._strays(heavy), *self._without_gpus()]

    def remote(self) -> list[Job]:
        """Jobs that are not local."""
        return [job for job in self.jobs.values() if not job.local]

    def _unsubmitted(self) -> list[str]:
        return [f"job {job.number} ({job.rule}) never went to Slurm" for job in self.remote() if not job.submitted]

    def _uncounted(self) -> list[str]:
        completed = {number for number, job in self.ended.items() if job["JobState"] == "COMPLETED"}
        claimed = {job.submitted[-1] for job in self.remote() if job.finished and job.submitted}
        finished = sum(job.finished for job in self.remote())
        faults = []
        if completed != claimed:
            faults.append(f"slurmctld completed jobs {sorted(completed)}, Snakemake claims {sorted(claimed)}")
        if len(completed) != finished:
            faults.append(
                f"slurmctld completed {len(completed)} jobs, Snakemake finished {finished} that are not local"
            )
        return faults

    def _strays(self, heavy: set[str]) -> list[str]:
        """Processes outside Slurm that have no business there, and Slurm jobs without their process."""
        local = {verb for job in self.jobs.values() if job.local for verb in self.commands.get(job.rule, ())} - heavy
        seen = {verb_of(note["argv"]) for note in self.notes}
        faults = [f"`buddy {verb}` never ran" for verb in sorted(heavy - seen)]
        for note in self.notes:
            verb = verb_of(note["argv"])
            if verb is not None and note["SLURM_JOB_ID"] is None and verb not in local:
                faults.append(f"ran outside Slurm: {' '.join(note['argv'])}")
        inside = {(note["SLURM_JOB_ID"], verb_of(note["argv"])) for note in self.notes}
        for job in self.remote():
            for verb in self.commands.get(job.rule, ()):
                if job.finished and job.submitted and (job.submitted[-1], verb) not in inside:
                    faults.append(f"no `buddy {verb}` of job {job.number} saw SLURM_JOB_ID={job.submitted[-1]}")
        return faults

    def _without_gpus(self) -> list[str]:
        faults = []
        for job in self.remote():
            for note in self.notes:
                inside = job.submitted and note["SLURM_JOB_ID"] == job.submitted[-1]
                if inside and verb_of(note["argv"]) and int(note["SLURM_GPUS_ON_NODE"] or 0) != job.gpus:
                    faults.append(f"{job.rule} asked for {job.gpus} GPUs and saw {note['SLURM_GPUS_ON_NODE']}")
        return faults


def verb_of(argv: list[str]) -> str | None:
    """VERB of ``python -m buddy VERB``; None for any other process."""
    for at in range(len(argv) - 2):
        if argv[at : at + 2] == ["-m", "buddy"]:
            return full_verb(argv[at + 2], argv)
    return None


def full_verb(verb: str, words: Container[str]) -> str:
    """The verb, with the option that makes it another one."""
    return ANSWERS if verb == "data" and "--answers-by" in words else verb


def start(cluster: slurmd.Cluster, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``snakemake --profile slurm -j 64`` in ``folder``; every Python process under it leaves a note."""
    notes = folder.parent / f"{folder.name}-notes"
    notes.mkdir()
    (notes / "sitecustomize.py").write_text(NOTE)
    environment = {
        **cluster.environment,
        "PATH": f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
        "PYTHONPATH": str(notes),
        "NOTES": str(notes),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "-j", "64", *arguments]
    with output_of(folder).open("wb") as stream:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish(cluster: slurmd.Cluster, folder: Path, process: subprocess.Popen[bytes]) -> Run:
    """Wait for a call begun with `start` and gather what each side says about it."""
    try:
        process.wait(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    output = output_of(folder).read_text(errors="replace")
    ended = {job["JobId"]: job for job in cluster.completed() if job.get("WorkDir") == str(folder)}
    notes = [json.loads(note.read_text()) for note in (folder.parent / f"{folder.name}-notes").glob("*.json")]
    return Run(folder, process.returncode, output, jobs_in(output), ended, notes, _commands(folder))


def output_of(folder: Path) -> Path:
    """File that receives what Snakemake prints."""
    return folder.parent / f"{folder.name}.out"


def jobs_in(output: str) -> dict[int, Job]:
    """Snakemake's jobs by its number for them, from what it printed."""
    jobs: dict[int, Job] = {}
    for local, rule, block in re.findall(r"^(local)?(?:rule|checkpoint) (\w+):\n((?:    .*\n)+)", output, re.M):
        number = re.search(r"^    jobid: (\d+)$", block, re.M)
        gpus = re.search(r"\bgpu=(\d+)", block)
        if number is not None:
            new = Job(int(number[1]), rule, bool(local), int(gpus[1]) if gpus else 0, block)
            jobs.setdefault(new.number, new)
    for number, slurm in re.findall(r"^Job (\d+) has been submitted with SLURM jobid (\d+)", output, re.M):
        jobs[int(number)].submitted.append(slurm)
    for number in re.findall(r"^Finished jobid: (\d+)", output, re.M):
        jobs[int(number)].finished = True
    return jobs


def _commands(folder: Path) -> dict[str, set[str]]:
    """Verbs of each rule, from what Snakemake noted for each output file."""
    commands: dict[str, set[str]] = {}
    for path in (folder / ".snakemake" / "metadata").rglob("*"):
        if path.is_file():
            content = json.loads(path.read_text())
            command = content.get("shellcmd") or ""
            verbs = re.findall(r"-m buddy (\S+)", command)
            commands.setdefault(content["rule"], set()).update(full_verb(verb, command) for verb in verbs)
    return commands
