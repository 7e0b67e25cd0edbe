"""How far a study has come: which of its jobs are done, running, failed or missing, and what they took.

Everything is read from files: the study's settings say which jobs there are, their outputs that they are done, their
logs and Snakemake's own markers what became of the others. Nothing is imported that a laptop lacks.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from buddy.storage.files import read_json
from buddy.study import manifest, results, sessions
from buddy.study.config import Config
from buddy.study.jobs import Job, Jobs
from buddy.study.records import find

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")


@dataclass
class Stage:
    """The jobs of one stage, and the hours that those which ended took (GPU hours as far as records tell them)."""

    name: str
    jobs: dict[Job, State] = field(default_factory=dict)
    hours: float = 0.0
    gpu_hours: float = 0.0

    def count(self, state: State) -> int:
        """Number of jobs in a state."""
        return sum(found == state for found in self.jobs.values())


def read(study: Config, folder: Path) -> list[Stage]:
    """Where a study stands.

    Args:
        study: its settings.
        folder: its folder, ``results/{study}``.

    Returns:
        Its stages in the order in which they run, those without jobs left out.
    """
    started, alive = markers(folder)
    stages: dict[str, Stage] = {}
    for job in jobs(study):
        stage = stages.setdefault(job.stage, Stage(job.stage))
        begun = any(_within(one, output) for one in started for output in job.outputs)
        stage.jobs[job] = state(job, folder, begun, alive)
        hours, gpu_hours = spent(job, folder)
        stage.hours += hours
        stage.gpu_hours += gpu_hours
    return list(stages.values())


def state(job: Job, folder: Path, started: bool, alive: bool) -> State:
    """What became of a job.

    Args:
        job: the job.
        folder: the study's folder.
        started: Snakemake has started it and not seen its end.
        alive: Snakemake is at work.
    """
    if started:
        return "running" if alive else "failed"
    paths = [folder / output for output in job.outputs]
    if all(path.exists() for path in paths):
        return "missing" if any(map(_problems, paths)) else "done"
    return "failed" if (folder / "logs" / f"{job.place}.log").exists() else "missing"


def spent(job: Job, folder: Path) -> tuple[float, float]:
    """Hours that a job took, and hours that it held a GPU; of Snakemake's benchmark, else of the records."""
    wall = gpu = 0.0
    # A job that makes several records at once writes the same seconds into each.
    seconds = {(one.get("wall_s", 0.0), one.get("gpu_s", 0.0)) for one in _records(job, folder)}
    wall, gpu = (sum(column) for column in zip(*seconds, strict=True)) if seconds else (0.0, 0.0)
    try:
        with (folder / "benchmarks" / f"{job.place}.tsv").open() as stream:
            wall = sum(float(row["s"]) for row in csv.DictReader(stream, delimiter="\t"))
    except (OSError, KeyError, ValueError, TypeError):
        pass
    return wall / 3600, gpu / 3600


def ran_on(job: Job, folder: Path) -> str:
    """The device that a job's record names; "" where it left none."""
    for content in _records(job, folder):
        return str(content.get("environment", {}).get("device", ""))
    return ""


def _records(job: Job, folder: Path) -> Iterator[Mapping[str, Any]]:
    told = [folder / output for output in job.outputs if output.startswith("records/")]
    # Gates have the record of their training in their own folder.
    told += [(folder / output).with_name("training.json") for output in job.outputs if output.startswith("gates/")]
    for made in told:
        for path in [made] if made.is_file() else find(made):
            if content := read_json(path):
                yield content


def _within(path: str, output: str) -> bool:
    return path == output or path.startswith(f"{output}/")


def jobs(study: Config) -> list[Job]:
    """Every job of a study, in the order of its stages."""
    return results.of_study(Jobs(study))


def outputs(study: Config) -> list[str]:
    """Every file, and every folder of records, that a study's jobs make for its tables and figures, below its folder."""
    return [output for job in jobs(study) if job.stage not in ("table", "figure") for output in job.outputs]


def damaged(study: Config, folder: Path) -> Iterator[tuple[Path, str]]:
    """Outputs that are there and not whole, each with what is wrong, seen at a glance: nothing is read but ends of files.

    Args:
        study: its settings.
        folder: its folder.
    """
    for output in outputs(study):
        path = folder / output
        # What is not there is made anyway.
        if path.exists() and (problems := _problems(path)):
            yield path, "; ".join(problems[:3])


def _problems(path: Path) -> list[str]:
    """What is wrong with an output that is there: a folder of records, a run, or another file."""
    listed = manifest.lacking(path.parent if path.name == "run.json" else path)
    return listed or (_cut_short(path) if path.is_dir() or path.suffix == ".json" else [])


def _cut_short(path: Path) -> list[str]:
    if path.is_file():
        return ["cut short"] if manifest.cut_short(path) else []
    records = find(path)
    return (
        [f"{one.relative_to(path)} is cut short" for one in records if manifest.cut_short(one)]
        if records
        else ["empty"]
    )


def markers(folder: Path) -> tuple[set[str], bool]:
    """What Snakemake notes about a study.

    Returns:
        Outputs below the study's folder whose jobs have started and not ended, and whether Snakemake is at work (or was
        killed, and left its lock).
    """
    folder = folder.absolute()
    for place in (folder.parent.parent, Path.cwd()):
        kept = place / sessions.FOLDER
        if kept.is_dir():
            break
    else:
        return set(), False
    outputs = {(place / output) for output in sessions.started(kept)}
    below = {output.relative_to(folder).as_posix() for output in outputs if output.is_relative_to(folder)}
    return below, sessions.locked(kept)
