"""A plan of what is still to be done: jobs, GPU-hours, the longest chain of jobs that wait for each other, and memory."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from buddy.errors import unknown
from buddy.study import devices, planned_figures, progress, results
from buddy.study.estimates import Estimates
from buddy.study.jobs import Job, Jobs, closure


@dataclass
class Row:
    """A stage of the plan.

    Attributes:
        stage: its name.
        jobs: those that are to be done.
        done: how many are done.
        seconds: that they take together.
        longest: that the longest of them takes.
        minutes: the largest time limit.
        memory: bytes on the device, of the largest; 0 for a stage that loads no model.
        host_mb: host memory of the largest.
    """

    stage: str
    jobs: list[Job] = field(default_factory=list)
    done: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    minutes: int = 0
    memory: float = 0.0
    host_mb: int = 0


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        rows: stage by stage, in the order in which they run.
        chain: the longest chain of jobs, the first one first.
        largest: the job that holds most on the device; None where none loads a model.
    """

    rows: Sequence[Row]
    chain: Sequence[Job]
    largest: Job | None

    @property
    def jobs(self) -> int:
        """How many jobs are to be done."""
        return sum(len(row.jobs) for row in self.rows)

    @property
    def gpu_seconds(self) -> float:
        """Time that they hold a GPU."""
        return sum(row.seconds for row in self.rows if row.memory)


def wanted(jobs: Jobs, targets: Sequence[str]) -> list[Job]:
    """The jobs behind targets of the workflow, as ``snakemake TARGETS`` would plan them.

    Args:
        jobs: the study's.
        targets: names of tables and figures, ``all``, or paths of outputs; none is ``all``.

    Raises:
        UserError: there is no such target.
    """
    if not targets or "all" in targets:
        return results.of_study(jobs)
    tables = jobs.study.measured_tables()
    figures = planned_figures.planned(jobs.study)
    everything = {path: job for job in results.of_study(jobs) for path in job.paths}
    found = []
    for target in targets:
        if target in tables:
            found.append(jobs("table", table=target))
        elif target in figures:
            found.append(jobs("figure", figure=target))
        elif target in everything:
            found.append(everything[target])
        else:
            raise unknown("target", target, ["all", *tables, *figures])
    return closure(found)


def plan(estimates: Estimates, asked: Iterable[Job]) -> Plan:
    """What of these jobs is not done, and what it takes."""
    rows: dict[str, Row] = {}
    ends: dict[Job, float] = {}
    before: dict[Job, Job | None] = {}
    for job in asked:
        row = rows.setdefault(job.stage, Row(job.stage))
        if progress.state(job, estimates.folder, started=False, alive=False) == "done":
            row.done += 1
            continue
        seconds, demand = estimates.seconds(job), estimates.demand(job)
        row.jobs.append(job)
        row.seconds += seconds
        row.longest = max(row.longest, seconds)
        if demand is not None:
            row.minutes = max(row.minutes, estimates.minutes(job))
            row.memory = max(row.memory, demand.memory(estimates.device))
            row.host_mb = max(row.host_mb, estimates.host_mb(job))
        waits = max((one for one in job.needs if one in ends), key=ends.__getitem__, default=None)
        before[job] = waits
        ends[job] = seconds + (ends[waits] if waits is not None else 0.0)
    return Plan(list(rows.values()), _chain(ends, before), _largest(estimates, rows.values()))


def _chain(ends: dict[Job, float], before: dict[Job, Job | None]) -> list[Job]:
    chain: list[Job] = []
    job = max(ends, key=ends.__getitem__, default=None)
    while job is not None:
        chain.append(job)
        job = before[job]
    return chain[::-1]


def makespan(estimates: Estimates, found: Plan, gpus: int) -> float:
    """Seconds until all is done on so many GPUs, a job on each: what is ready and has the longest chain behind it begins.

    Jobs without a model run beside them.
    """
    todo = {job: estimates.seconds(job) for row in found.rows for job in row.jobs}
    after: dict[Job, list[Job]] = {job: [] for job in todo}
    waiting = {job: [one for one in job.needs if one in todo] for job in todo}
    for job, needed in waiting.items():
        for one in needed:
            after[one].append(job)
    behind: dict[Job, float] = {}
    for job in reversed(list(todo)):
        behind[job] = todo[job] + max((behind[one] for one in after[job]), default=0.0)
    free, now, order = gpus, 0.0, 0
    running: list[tuple[float, int, Job]] = []
    ready = [job for job in todo if not waiting[job]]
    while ready or running:
        ready.sort(key=behind.__getitem__)
        for job in ready[::-1]:
            if job.kind.cost is None or free:
                free -= job.kind.cost is not None
                order += 1
                heapq.heappush(running, (now + todo[job], order, job))
                ready.remove(job)
        now, _, ended = heapq.heappop(running)
        free += ended.kind.cost is not None
        for job in after[ended]:
            waiting[job].remove(ended)
            ready += [job] if not waiting[job] else []
    return now


def _largest(estimates: Estimates, rows: Iterable[Row]) -> Job | None:
    held = {
        job: demand.memory(estimates.device)
        for row in rows
        for job in row.jobs
        if (demand := estimates.demand(job)) is not None
    }
    return max(held, key=held.__getitem__, default=None)


def read(jobs: Jobs, folder: Path, device: str, targets: Sequence[str] = ()) -> tuple[Estimates, Plan]:
    """A study's plan on a device.

    Raises:
        UserError: no such device or target.
    """
    estimates = Estimates(jobs, folder, devices.device(device), lambda: results.of_study(jobs))
    return estimates, plan(estimates, wanted(jobs, targets))
