"""How far a study has come: which of its jobs are done, running, failed or missing, and what they took.

Everything is read from files: the study's settings say which jobs there are, their outputs that they are done, their
logs and Snakemake's own markers what became of the others. Nothing is imported that a laptop lacks.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from buddy.settings import STATIC_PEERS
from buddy.study import manifest, planned_figures, sessions
from buddy.study.config import Config, Run
from buddy.study.records import find
from buddy.study.settings import Table

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")


@dataclass(frozen=True)
class Job:
    """One job of the study.

    Attributes:
        stage: the rule.
        name: path of its log and of its benchmark below ``logs/{stage}`` and ``benchmarks/{stage}``, without ending; ""
            where the stage has one job.
        output: what it makes, below the study's folder: a file, or a folder of records.
    """

    stage: str
    name: str
    output: str

    @property
    def record(self) -> str | None:
        """The record of a training, below the study's folder; None of another job."""
        return f"records/training/{self.name}.json" if self.output.startswith(("runs/", "predictors/")) else None

    @property
    def place(self) -> str:
        """Path of its log below ``logs``, and of its benchmark below ``benchmarks``, without ending."""
        return f"{self.stage}/{self.name}" if self.name else self.stage


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
    for job in dict.fromkeys(jobs(study)):
        stage = stages.setdefault(job.stage, Stage(job.stage))
        begun = any(output == job.output or output.startswith(f"{job.output}/") for output in started)
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
    output = folder / job.output
    if output.exists():
        return "missing" if _problems(output) else "done"
    return "failed" if (folder / "logs" / f"{job.place}.log").exists() else "missing"


def spent(job: Job, folder: Path) -> tuple[float, float]:
    """Hours that a job took, and hours that it held a GPU; of Snakemake's benchmark, else of the records."""
    wall = gpu = 0.0
    made = folder / job.output
    # A job that makes several records at once writes the same seconds into each.
    seconds = {(one.get("wall_s", 0.0), one.get("gpu_s", 0.0)) for one in _records(job, folder, made)}
    wall, gpu = (sum(column) for column in zip(*seconds, strict=True)) if seconds else (0.0, 0.0)
    try:
        with (folder / "benchmarks" / f"{job.place}.tsv").open() as stream:
            wall = sum(float(row["s"]) for row in csv.DictReader(stream, delimiter="\t"))
    except (OSError, KeyError, ValueError, TypeError):
        pass
    return wall / 3600, gpu / 3600


def _records(job: Job, folder: Path, made: Path) -> Iterator[Mapping[str, Any]]:
    if job.record:
        made = folder / job.record
    elif not job.output.startswith("records/"):
        return
    for path in [made] if made.is_file() else find(made):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            yield content


def outputs(study: Config) -> Iterator[str]:
    """Every file, and every folder of records, that a study's jobs make for its tables and figures, below its folder."""
    for job in dict.fromkeys(jobs(study)):
        if job.stage == "budget_eval":
            names = [*study.predictor.datasets, *(["all"] if len(study.predictor.datasets) > 1 else [])]
            yield from (f"{job.output}/dataset~{name}.json" for name in names)
        elif job.stage not in ("table", "figure"):
            yield job.output
            if job.record:
                yield job.record


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


def jobs(study: Config) -> Iterator[Job]:
    """Every job of a study, in the order of its stages."""
    if study.study.records is None:
        yield from _inputs(study)
        yield from _makers(study)
        yield from _measurements(study)
    for name in study.measured_tables():
        yield Job("table", name, f"tables/{name}.csv")
    for name in planned_figures.planned(study) if study.study.records is None else []:
        yield Job("figure", name, f"figures/{name}.png")


def _inputs(study: Config) -> Iterator[Job]:
    for name in study.study.backbones:
        yield Job("backbone", name, f"backbones/{name}/backbone.json")
    for name in _datasets(study):
        yield Job("data", name, f"data/{name}/data.json")
    for run in study.runs() if study.data.answers == "backbone" else []:
        if run.method != "dense":
            name = f"answered_by~{run.backbone}/{study.training.data}"
            yield Job("answers", name, f"data/{name}/data.json")
    if "pudding" in study.study.methods and study.pudding.encoder != "backbone":
        yield Job("encoder", "", "encoder/encoder.json")


def _datasets(study: Config) -> list[str]:
    runs = study.runs()
    methods = {run.method for run in runs}
    tables = study.measured_tables().values()
    kinds = {table.kind for table in tables}
    names = [study.training.data] if methods - {"dense"} else []
    names += [study.importance.corpus] if study.importances() else []
    names += study.orders.corpora if study.ordered_backbones() else []
    names += [study.peers.corpus] if methods & set(STATIC_PEERS) else []
    names += study.pudding.tasks if "pudding" in methods else []
    names += study.evaluation.tasks
    names += study.generation.tasks if "generation" in kinds else []
    names += study.trace.datasets if "properties" in kinds or _traces(study) else []
    names += study.trace.tasks if _traces(study) else []
    names += ["samsum"] if study.summarising_runs() else []
    names += study.likelihood.datasets if study.scored_backbones() else []
    if study.predicting_runs():
        names += study.predictor.data if "paper" in study.predictor.presets else []
        names += study.predictor.tuned_data if "tuned" in study.predictor.presets else []
        names += study.predictor.datasets
    names += study.latency.datasets if study.timed_backbones() else []
    names += [min(study.latency.datasets)] if "breakdown" in kinds else []
    return [name for name in dict.fromkeys(names) if not Path(name).is_file()]


def _makers(study: Config) -> Iterator[Job]:
    runs = study.runs()
    for backbone, indicator in study.importances():
        name = f"backbone~{backbone}/indicator~{indicator}"
        yield Job("importance", name, f"records/importance/{name}.json")
    yield from _orders(study)
    for run in runs:
        if run.method in STATIC_PEERS:
            name = f"backbone~{run.backbone}/method~{run.method}/criterion~{run.variant['criterion']}"
            yield Job("calibrate", name, f"records/calibration/{name}.json")
    for run in runs:
        if run.method == "pudding":
            name = f"backbone~{run.backbone}"
            yield Job("pool", name, f"records/calibration/{name}/method~pudding.json")
    for stage, mine in (("train", True), ("adapt", False)):
        for run in runs:
            if run.method != "dense" and (run.method == "buddy") is mine:
                yield Job(stage, run.path, f"runs/{run.path}/run.json")
    for name in study.predictors():
        yield Job("predictor", name, f"predictors/{name}/run.json")


def _orders(study: Config) -> Iterator[Job]:
    """What Figures 2, 7 and 8 show: a job for each corpus, and one for all context lengths."""
    files = [file for name in planned_figures.ORDERS for file in planned_figures.orders(study, name)]
    for name in (file.removesuffix(".json") for file in files):
        backbone, *level, indicator = name.split("/")
        if "corpus~" in name:
            yield Job("corpus_orders", name, f"records/importance/{name}.json")
        elif level == [f"length~{max(study.orders.lengths, default=0)}"]:  # the last of them to be measured
            yield Job("length_orders", f"{backbone}/{indicator}", f"records/importance/{name}.json")


def _measurements(study: Config) -> Iterator[Job]:
    for run in study.runs():
        yield Job("evaluate", run.path, f"records/accuracy/{run.path}")
    for name in study.predictors():
        if study.predictor.tasks:
            yield Job("evaluate_auto", name, f"records/predicted/{name}/auto.json")
        yield Job("budget_eval", name, f"records/budget/{name}")
    tables = list(study.measured_tables().values())
    for table in tables:
        for run in _answering(study, table, "generation"):
            yield Job("solve", run.path, f"records/generation/{run.path}")
    for table in tables:
        for run in _answering(study, table, "properties"):
            yield from _per_dataset("trace", run, study.trace.datasets)
    for run in _traces(study):
        yield from _per_dataset("trace", run, [*study.trace.datasets, *study.trace.tasks])
    for run in study.summarising_runs():
        yield from _per_dataset("rouge", run, ["samsum"])
    for run in study.scored_runs():
        yield Job("score", run.path, f"records/likelihood/{run.path}")
    for run in _timed(study, tables):
        yield from _per_dataset("latency", run, study.latency.datasets)
    for table in tables:
        if table.kind == "breakdown" and table.backbone:
            path = study.main_run(table.backbone).path
            yield Job("breakdown", path, f"records/breakdown/{path}")


def _answering(study: Config, table: Table, kind: str) -> Iterator[Run]:
    if table.kind == kind:
        backbones = study.answering_backbones() if kind == "generation" else [table.backbone]
        for backbone in filter(None, backbones):
            yield from study.answering_runs(backbone)


def _traces(study: Config) -> list[Run]:
    """The runs whose paths figures show."""
    traced = study.traced_backbones() if "buddy" in study.study.methods else []
    return [study.main_run(backbone) for backbone in traced]


def _timed(study: Config, tables: Iterable[Table]) -> Iterator[Run]:
    for backbone in study.timed_backbones():
        yield study.main_run(backbone)
    for table in tables:
        if table.kind == "peer_latency" and table.backbone:
            yield from study.timed_runs(table.backbone)


def _per_dataset(stage: str, run: Run, datasets: Iterable[str]) -> Iterator[Job]:
    for name in datasets:
        yield Job(stage, f"{run.path}/dataset~{name}", f"records/{stage}/{run.path}/dataset~{name}")
