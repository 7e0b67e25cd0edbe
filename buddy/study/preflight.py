"""Before a study goes to a Slurm cluster: what would go wrong hours later, asked of Slurm in seconds.

Each finding says which line to edit. Errors are what cannot work (a time limit no partition grants, a GPU type the
cluster has not, a status command that loses the end of jobs, so that Snakemake waits for ever); warnings are what may
not. Whatever Slurm does not answer is left out: a cluster without accounting has no limits to ask for.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from buddy.errors import UserError
from buddy.storage.processes import query
from buddy.study import devices, results
from buddy.study.config import Config
from buddy.study.estimates import Estimates
from buddy.study.jobs import Jobs

PROFILE = "workflow/profiles/slurm/config.yaml"

LONGEST_POLL_S = 180
"""Seconds between two looks at a long job: the executor lets its polls grow to this."""

SPARE_S = 60
"""For the look itself, and a controller that is slow to answer."""

FREE_GB = 20
"""Below this much free space in the results a study is likely to fill the disk."""


@dataclass(frozen=True)
class Asked:
    """What a job asks of the cluster.

    Attributes:
        name: its rule.
        minutes: time limit of its first try.
        partition, account, gpu_model: "" for the cluster's default.
        gpus: number of GPUs.
    """

    name: str
    minutes: int
    partition: str = ""
    account: str = ""
    gpus: int = 0
    gpu_model: str = ""


@dataclass(frozen=True)
class Partition:
    """A partition as ``scontrol show partition`` tells it; ``minutes`` is its MaxTime, None without a limit."""

    name: str
    default: bool
    up: bool
    minutes: int | None


@dataclass
class Findings:
    """What was found.

    Attributes:
        errors: keep a study from starting.
        warnings: do not.
        minutes_at_most: by rule, what its partition grants.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    minutes_at_most: dict[str, int] = field(default_factory=dict)

    def error(self, text: str) -> None:
        """Note an error, once."""
        if text not in self.errors:
            self.errors.append(text)


def check(asked: Iterable[Asked], jobs: int | None, status_command: str | None, results: Path) -> Findings:
    """Hold what jobs ask for against what the cluster grants.

    Args:
        asked: by every job that goes to the cluster.
        jobs: how many may be queued or running at once (-j); None for any number.
        status_command: ``squeue`` or ``sacct``, how the end of a job is learnt.
        results: the study's folder, for free space.
    """
    found = Findings()
    asked = list(dict.fromkeys(asked))
    _status(status_command, found)
    known = partitions()
    if known:
        _time(asked, known, found)
        _gpus(asked, known, found)
    _submissions(jobs, found)
    _accounts(asked, found)
    _space(results, found)
    return found


def read_profile(folder: Path) -> dict[str, Any]:
    """The settings of a Snakemake profile.

    Raises:
        UserError: there is none, or it is no YAML mapping.
    """
    path = folder / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--profile: {path}: not readable ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"--profile: {path}: not a profile")
    return content


def of_study(study: Config, profile: Mapping[str, Any], folder: Path) -> list[Asked]:
    """What the jobs of a study ask for, rule by rule, each for its longest job."""
    jobs = Jobs(study)
    planned = results.of_study(jobs)
    estimates = Estimates(jobs, folder, devices.device(study.limits.device), lambda: planned)
    longest: dict[str, int] = {}
    for job in planned:
        if job.kind.cost:
            longest[job.stage] = max(longest.get(job.stage, 0), estimates.minutes(job))
    default = profile.get("default-resources") or {}
    own = profile.get("set-resources") or {}
    asked = []
    for stage, minutes in longest.items():
        said = {**default, **(own.get(stage) or {})}
        asked.append(
            Asked(
                stage,
                minutes,
                str(said.get("slurm_partition") or ""),
                str(said.get("slurm_account") or ""),
                gpus=1,
                gpu_model=str(said.get("gpu_model") or ""),
            )
        )
    return asked


def partitions() -> dict[str, Partition]:
    """The cluster's partitions by name; {} where Slurm does not answer."""
    found = {}
    for line in query("scontrol", "show", "partition", "--oneliner") or []:
        values = dict(word.split("=", 1) for word in line.split() if "=" in word)
        limit = values.get("MaxTime", "UNLIMITED")
        found[values["PartitionName"]] = Partition(
            values["PartitionName"],
            default=values.get("Default") == "YES",
            up=values.get("State", "UP") == "UP",
            minutes=None if limit in ("UNLIMITED", "INFINITE") else _minutes(limit),
        )
    return found


def partition_of(asked: Asked, known: dict[str, Partition]) -> Partition | None:
    """The partition a job goes to; None where it is not known."""
    if asked.partition:
        return known.get(asked.partition)
    return next((one for one in known.values() if one.default), None)


def _minutes(text: str) -> int:
    """Slurm's [days-]hours:minutes:seconds in whole minutes."""
    days, _, clock = text.rpartition("-")
    hours, minutes, _ = (int(part) for part in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + minutes


def configuration(name: str) -> str | None:
    """A value of ``scontrol show config``; None where it is not said."""
    for line in query("scontrol", "show", "config") or []:
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return None


def _status(command: str | None, found: Findings) -> None:
    age = configuration("MinJobAge")
    seconds = re.match(r"\d+", age) if age else None
    if command == "squeue" and seconds and int(seconds[0]) < LONGEST_POLL_S + SPARE_S:
        found.error(
            f"MinJobAge is {seconds[0]} s: squeue forgets an ended job before Snakemake looks again (up to "
            f"{LONGEST_POLL_S} s later), which would then wait for ever. Set slurm-status-command: sacct in {PROFILE} "
            f"(if `sacct` lists your jobs), or have MinJobAge={LONGEST_POLL_S + SPARE_S} or more in slurm.conf."
        )
    if command == "sacct" and query("sacct", "--noheader", "-X", "--format=JobID") is None:
        found.error(
            f"`sacct` does not answer (no accounting here?), so the end of a job would never be learnt. Set "
            f"slurm-status-command: squeue in {PROFILE}."
        )


def _time(asked: Sequence[Asked], known: dict[str, Partition], found: Findings) -> None:
    for name in sorted({one.partition for one in asked if one.partition and one.partition not in known}):
        found.error(f"slurm_partition: {name} is no partition of this cluster ({', '.join(known)}). Edit {PROFILE}.")
    if any(not one.partition for one in asked) and not any(one.default for one in known.values()):
        found.error(
            f"The cluster has no default partition: name one of {', '.join(known)} as slurm_partition in {PROFILE}."
        )
    longest: dict[tuple[str, str], int] = {}
    for one in asked:
        partition = partition_of(one, known)
        if partition is None:
            continue
        if not partition.up:
            found.error(f"Partition {partition.name} is not up; rule {one.name} would wait. Edit {PROFILE}.")
        if partition.minutes is not None:
            found.minutes_at_most[one.name] = min(
                partition.minutes, found.minutes_at_most.get(one.name, partition.minutes)
            )
        if partition.minutes is not None and one.minutes > partition.minutes:
            longest[partition.name, one.name] = max(one.minutes, longest.get((partition.name, one.name), 0))
    for (name, rule), minutes in longest.items():
        found.error(
            f"Rule {rule} asks for {minutes} minutes, partition {name} grants {known[name].minutes} (MaxTime): it would wait "
            f"for ever. Set another slurm_partition in {PROFILE}, or `hours` of the backbone in config.yaml (a "
            "training that runs out of time goes on from its last checkpoint)."
        )


def _gpus(asked: Sequence[Asked], known: dict[str, Partition], found: Findings) -> None:
    lines = query("sinfo", "--noheader", "--format=%R %G")
    if lines is None:
        return
    offered: dict[str, set[str]] = {}
    for line in lines:
        name, _, gres = line.partition(" ")
        offered.setdefault(name, set()).update(re.findall(r"gpu:((?:[A-Za-z][^:,(]*)?)", gres))
    for one in asked:
        partition = partition_of(one, known)
        if not one.gpus or partition is None:
            continue
        types = offered.get(partition.name, set())
        if not types:
            found.error(
                f"Rule {one.name} asks for a GPU, partition {partition.name} has none. Set slurm_partition in {PROFILE}; "
                "`sinfo -o '%P %G'` lists partitions with theirs."
            )
        elif one.gpu_model and one.gpu_model not in types:
            named = ", ".join(sorted(filter(None, types))) or "none with a name: leave gpu_model out"
            found.error(
                f"gpu_model: {one.gpu_model} (rule {one.name}) is not a type of partition {partition.name} ({named}). Edit "
                f"{PROFILE}."
            )


def _submissions(jobs: int | None, found: Findings) -> None:
    """-j against the number of jobs that a user may have in the queue: what is over it is refused, try after try."""
    said = {"MaxJobCount of the cluster": configuration("MaxJobCount")}
    user = getpass.getuser()
    for what, command in (
        ("MaxSubmitJobs of your account", ("show", "assoc", f"user={user}", "format=MaxSubmitJobs")),
        ("MaxSubmitJobsPerUser of the QOS", ("show", "qos", "normal", "format=MaxSubmitJobsPerUser")),
    ):
        values = [value for line in query("sacctmgr", "-nP", *command) or [] if (value := line.strip()).isdigit()]
        said[what] = min(values, key=int) if values else None
    known = {what: int(limit) for what, limit in said.items() if limit and limit.isdigit()}
    what = min(known, key=known.__getitem__, default="")
    if what and (jobs is None or jobs > known[what]):
        found.error(
            f"-j {jobs or 'unlimited'} is more than {what}, {known[what]}: further jobs would be refused and use up their "
            f"retries. Start with -j {known[what]} or fewer (less what else you have in the queue)."
        )


def _accounts(asked: Sequence[Asked], found: Findings) -> None:
    lines = query("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=Account")
    known = {line.strip() for line in lines or []}
    for account in sorted({one.account for one in asked if one.account}):
        if known and account.lower() not in {name.lower() for name in known}:
            found.error(f"slurm_account: {account} is not one of yours ({', '.join(sorted(known))}). Edit {PROFILE}.")


def _space(results: Path, found: Findings) -> None:
    there = next(place for place in (results.absolute(), *results.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e9
    if free < FREE_GB:
        found.warnings.append(f"{free:.0f} GB are free in {there}; a study of large backbones may need more.")
    if not os.access(there, os.W_OK):
        found.error(f"{there} is not writable.")
